# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, and the tools that other measurements rest on."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4 import _engine

ROOT = Path(__file__).resolve().parent.parent


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The file's text; empty for binary files."""
    data = path.read_bytes()
    return "" if b"\0" in data[:8192] else data.decode(errors="replace")


# ---- public paths -------------------------------------------------------------------------------------------------

# What could be imported before modules moved, each from where it was
OLD_PATHS = {
    "gemma4.chat": ("ChatTemplate", "ModelTurn", "ToolCall", "check_messages", "encode_chat", "parse_turn"),
    "gemma4.cli": ("main", "EXIT_ERROR", "EXIT_INTERRUPTED"),
    "gemma4.decode": ("Generation", "Timings"),
    "gemma4.demo": ("run_demo", "show_speed"),
    "gemma4.encoders": ("Encoder", "MediumLike", "encode_audio", "encode_image", "encode_video", "inputs_of"),
    "gemma4.generate": ("Generation", "Options", "TextStream", "Timings", "default_stop_ids", "generate", "stream"),
    "gemma4.info": ("ModelInfo", "count", "describe", "mapped_bytes", "peak_bytes", "resident_bytes", "size"),
    "gemma4.inputs": (
        "Messages",
        "PromptLike",
        "TokensLike",
        "as_ids",
        "as_tokenized",
        "is_messages",
        "tokenize_prompt",
    ),
    "gemma4.media.cache": ("EncodedMedia", "encode"),
    "gemma4.media.medium": ("Medium", "Modalities", "read_audio", "read_image", "read_media", "read_video"),
    "gemma4.media.prompt": (
        "EncoderCache",
        "SoftRows",
        "SoftRun",
        "TokenizedPrompt",
        "expander",
        "locate",
        "run_start",
    ),
    "gemma4.media.taps": ("EncoderTaps",),
    "gemma4.media.tasks": ("Passage", "detect", "transcribe"),
    "gemma4.model": ("Model", "Precision", "load"),
    "gemma4.sampling": (
        *("Processor", "Sample", "Sampler", "SamplingParams", "StopCriteria", "kth_largest", "logprobs"),
    ),
    "gemma4.sequence": ("KVDtype", "Sequence", "restore"),
    "gemma4.step": ("Output", "Positions", "Prompt", "run_step", "select_positions"),
    "gemma4.textflow": ("ContinuationText", "Piece", "TurnText"),
    "gemma4.tokenizer": ("CONTROL", "DecodeStream", "Tokenizer"),
    "gemma4.turn": ("ModelTurn", "ToolCall", "parse_arguments", "parse_turn"),
}


def test_old_public_paths():
    """In a fresh process: by attributes of the package alone where that has always sufficed, and as imports."""
    lazy = ("gemma4.cli", "gemma4.demo", "gemma4.media.tasks")  # a plain `import gemma4` never brought these
    eager = [f"{path}.{names[0]}" for path, names in OLD_PATHS.items() if path not in lazy]
    imports = [f"import {path}\nfrom {path} import {', '.join(names)}" for path, names in OLD_PATHS.items()]
    code = "\n".join(["import gemma4", *eager, *imports])
    subprocess.run([sys.executable, "-P", "-W", "error", "-c", code], check=True, cwd=ROOT.parent)


# ---- gemma4/ ----------------------------------------------------------------------------------------------------


def test_gemma4_keeps_its_rooms():
    assert load_tool("check_layers").python_problems(ROOT / "gemma4") == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("core", "from gemma4.model import Model", "imports model, but core may only use"),
        ("core", "import gemma4.model", "imports model, but core may only use"),
        ("core", "from gemma4 import model", "imports model, but core may only use"),
        ("core", "from gemma4 import load_it", "imports gemma4, but core may only use"),
        ("media.image", "from gemma4.encoders.encoder import Encoder", "imports encoders.encoder, but media may only"),
        ("media.image", "from gemma4.load import open_checkpoint", "imports load, but media may only"),
        ("media.image", "if TYPE_CHECKING:\n    from gemma4.core import Core", "2: imports core, but media may only"),
        ("step", "from gemma4.generation.sampling import Sampler", "imports generation.sampling, but step may only"),
        ("encoders.encoder", "def f():\n    from gemma4 import model", "2: imports model, but encoders may only"),
        ("interp.hooks", "from gemma4.interp.cache import join_caches", "imports interp.cache, but interp.hooks may"),
        ("errors", "from gemma4 import units", "errors may only use nothing"),
        ("core", "from gemma4.chat import ChatTemplate", "imports chat, but core may only use"),
        ("serve", "import json", "serve is in no room"),
        ("media.image", "from . import video", "(relative) is in no room"),
        (
            "media.image",
            "from gemma4.media.video import f",
            "media.image -> media.video -> media.image import each other",
        ),
    ],
)
def test_room_check_finds(tmp_path, module, text, complaint):
    package = tmp_path / "gemma4"
    rooms = ("chat", "model", "core", "units", "load", "encoders.encoder", "generation.sampling", "interp.cache")
    for name in ("", *rooms, "media.video", module):
        path = package.joinpath(*name.split("."))
        path = path / "__init__.py" if name in ("", "load") else path.with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text("from gemma4.media.image import f" if name == "media.video" and "video" in text else "")
    package.joinpath(*module.split(".")).with_suffix(".py").write_text(text)
    found = load_tool("check_layers").python_problems(package)
    assert len(found) == 1 and complaint in found[0], found


# ---- csrc/ ------------------------------------------------------------------------------------------------------


def test_csrc_keeps_its_layers():
    assert load_tool("check_layers").problems(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("base/a.c", '#include "ops/linear.h"\n', "base:"),
        ("model/a.c", "#include <Python.h>\n", "only python/"),
        ("ops/a.c", '#include "gemma4.h"\n', "above it"),
        ("ops/a.c", '#include "linear.h"\n', "not a file of csrc/"),
        ("ops/a.c", "void f(void)\n{\n    abort();\n}\n", "abort"),
        ("ops/a.c", 'void f(void)\n{\n    fprintf(stderr, "x");\n}\n', "fprintf"),
        ("ops/a.c", "\n" * 801, "801 lines"),
        ("ops/a.c", "void f(void)\n{\n" + "    g();\n" * 119 + "}\n", "121 lines"),
        ("extra/a.c", "\n", "extra is not one of"),
    ],
)
def test_layer_check_finds(tmp_path, path, text, complaint):
    for name in ("ops/linear.h", "gemma4.h", path):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text if name == path else "")
    found = load_tool("check_layers").problems(tmp_path)
    assert [line for line in found if path in line and complaint.rstrip(":") in line], found


def test_layer_check_accepts(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "ops").mkdir()
    (tmp_path / "base" / "a.h").write_text("")
    body = '/* abort() and printf() in words */\n#include "base/a.h"\n#include <math.h>\n'
    (tmp_path / "ops" / "a.c").write_text(body + 'void f(void)\n{\n    snprintf(b, 4, "exit(1)");\n}\n')
    assert load_tool("check_layers").problems(tmp_path) == []


# ---- words --------------------------------------------------------------------------------------------------------


def test_words_of_the_glossary():
    assert load_tool("check_words").check() == []


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("csrc/ops/a.c", "int whole_number; /* two\n * gadgets */\n", "csrc/ops/a.c:2: 'gadgets': write widget"),
        ("csrc/a.inc", "/* Of the rows, the last. */\n", "csrc/a.inc:1: a comment opens"),
        (
            "gemma4/a.py",
            'def f():\n    """A gadget."""\n    return "gadget"\n',
            "gemma4/a.py:2: 'gadget': write widget",
        ),
        ("gemma4/a.py", "x = 1  # What it is\n", "gemma4/a.py:1: a comment opens"),
        ("docs/a.md", "# A\n\n`gadget` is code, a Gadget is not.\n", "docs/a.md:3: 'Gadget': write widget"),
    ],
)
def test_word_check_finds(tmp_path, path, text, found):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    (tmp_path / "CONTRIBUTING.md").write_text("## Words\n\n| instead of | write |\n|---|---|\n| `gadget` | widget |\n")
    problems = load_tool("check_words").check(tmp_path)
    assert len(problems) == 1 and problems[0].startswith(found), problems


# ---- the repository -----------------------------------------------------------------------------------------------


def test_readme_commands_are_marked():
    commands = load_tool("readme_commands").commands((ROOT / "README.md").read_text())
    assert set(commands) >= {"run", "test"}
    assert "pip install" in commands["run"] and "gemma4" in commands["run"]
    assert "[test]" in commands["test"] and "pytest" in commands["test"]
    assert all("\n" not in command for command in commands.values()), "each is one line"


def test_command_line_entry_point_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["gemma4"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def changelog() -> dict[str, str]:
    """Version (or "Unreleased") -> its text, in the order of CHANGELOG.md."""
    parts = re.split(
        r"^## \[([^]]+)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    return dict(zip(parts[1::3], parts[3::3], strict=True))


def test_completion_finds_what_is_imported_at_first_use():
    code = (
        "import gemma4\n"
        "assert {'bench', 'harvest', 'interp'} <= set(dir(gemma4)) and 'sampling' not in dir(gemma4)\n"
        "assert set(gemma4.interp.__all__) <= set(dir(gemma4.interp))\n"
        "assert gemma4.harvest.open and gemma4.bench.bench_batch\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_import_brings_no_heavy_library():
    """Drawing, the network, media and the test oracles are imported where they are used."""
    heavy = {
        "PIL",
        "asyncio",
        "av",
        "http",
        "matplotlib",
        "rich",
        "safetensors",
        "scipy",
        "ssl",
        "torch",
        "transformers",
    }
    code = "import sys, gemma4; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "gemma4" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_one_version():
    """The installed metadata, the package and the newest release of the changelog say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]
    assert metadata.version("gemma4") == gemma4.__version__
    assert next(version for version in changelog() if version != "Unreleased") == gemma4.__version__


def test_changelog_keeps_its_form():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.count("\n## ") == len(changelog()), "a heading that is no version with a date"
    assert next(iter(changelog())) == "Unreleased"
    for version, entries in changelog().items():
        headings = re.findall(r"^### (.+)$", entries, flags=re.MULTILINE)
        assert headings and set(headings) <= kinds and len(set(headings)) == len(headings), version
        assert re.search(r"^- ", entries, flags=re.MULTILINE), f"{version} says nothing"


def test_one_wheel_for_every_python():
    """The stable ABI of the oldest Python that we support, the same in `make wheel` and on hosted machines."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=3.")
    assert project["tool"]["scikit-build"]["wheel"]["py-api"] == f"cp3{oldest}"
    assert project["tool"]["cibuildwheel"]["build"].startswith(f"cp3{oldest}-")
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert _engine.__file__.endswith(".abi3.so")
    repair = r"auditwheel repair --exclude '([^']*)'"
    hosted = re.findall(repair, project["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"])
    assert hosted == re.findall(repair, (ROOT / "Makefile").read_text()) != []
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    platforms = {entry["name"] for entry in workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]}
    assert {"linux-x86_64", "linux-aarch64", "macos-arm64", "windows-x86_64"} <= platforms


def test_sources_carry_the_licence():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    folders = ("csrc", "gemma4", "tools", "tests", "benchmarks")
    sources = [
        p
        for p in tracked_files()
        if p.suffix in {".py", ".pyi", ".c", ".h", ".inc"} and p.parts[len(ROOT.parts)] in folders
    ]
    assert sources
    assert [p.name for p in sources if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]] == []


def test_no_machine_paths_and_no_large_files():
    # spelled so that this file does not match itself
    path = re.compile(r"(?<![\w.$}/~])/(?:ro{2}t|wo[r]k|ho[m]e/\w+|Us[e]rs/\w+)/\w")
    files = tracked_files()
    assert files
    assert [p.name for p in files if path.search(text_of(p))] == []
    assert [p.name for p in files if p.stat().st_size > 10_000_000] == []


def test_ci_runs_every_test_of_fast_on_every_level():
    """Scalar code runs all but some files; the levels between it and the best, files listed by name and content."""
    lists = re.search(
        r"^ENGINE_TESTS=.*?^LEVEL_TESTS\+=[^\n]*", (ROOT / ".ci" / "run").read_text(), re.MULTILINE | re.DOTALL
    )
    assert lists
    command = [
        shutil.which("bash") or "bash",
        "-c",
        lists[0] + '\nprintf "%s\\n" "${ENGINE_TESTS[@]}" / "${LEVEL_TESTS[@]}"',
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    engine, levels = done.stdout.split("\n/\n")
    named = {path for path in (ROOT / "tests").rglob("test_*.py") if "fast" in path.stem}
    inside = {
        p for p in (ROOT / "tests").rglob("test_*.py") if re.search(r"^def test_\w*fast", p.read_text(), re.MULTILINE)
    }
    assert len(named) >= 3 and inside
    wanted = {path.relative_to(ROOT).as_posix() for path in named | inside}
    assert wanted <= set(levels.splitlines()) and "fast" in levels.splitlines()[-1]
    assert not [path for path in named if f"--ignore={path.relative_to(ROOT).as_posix()}" in engine]


def test_slow_selects_something():
    marked = [
        path.name for path in sorted((ROOT / "tests").rglob("test_*.py")) if "@pytest.mark.slow\n" in path.read_text()
    ]
    assert len(marked) >= 8


# ---- tools/random_checkpoint.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load_tool("random_checkpoint")


@pytest.mark.parametrize("multimodal", [False, True], ids=["text-only", "multimodal"])
@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b-a4b", "31b", "e2b-mini", "26b-a4b-mini"])
def test_random_checkpoint_has_transformers_shapes(maker, size, multimodal):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = maker.model_config(maker.text_config(size), multimodal)
    settings = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "model_type")}
    kind = transformers.Gemma4Config if multimodal else transformers.Gemma4TextConfig
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(kind(**settings))
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items() if name != "lm_head.weight"}
    text = maker.text_config(size)
    assert maker.tensor_shapes(text, "model.language_model." if multimodal else "model.") == theirs


def test_random_checkpoint_dead_kv_matches_the_released_count(maker):
    """The released E2B and E4B files hold these many keys and values that no layer uses."""
    for size, dead in (("e2b", 18_880_512), ("e4b", 55_055_616)):
        config = maker.text_config(size)
        count = [
            sum(int(maker.np.prod(shape)) for shape in maker.tensor_shapes(config, dead_kv=kv).values())
            for kv in (0, 1)
        ]
        assert count[1] - count[0] == dead


def test_random_checkpoint_files_load(maker, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "vocab_size_per_layer_input": 128}
    config = maker.text_config("e2b-mini", "float16", **small)
    total = maker.write_checkpoint(tmp_path, config, multimodal=False, shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shapes, dtypes, n_bytes = {}, set(), 0
    for name in sorted(set(index["weight_map"].values())):
        assert (tmp_path / name).stat().st_size < 2_000_000
        for key, array in safetensors.load_file(tmp_path / name).items():
            assert index["weight_map"][key] == name
            shapes[key] = array.shape
            dtypes.add(str(array.dtype))
            n_bytes += array.nbytes
            assert 0.2 < array.mean() < 1.5 if "norm" in key or "scal" in key else abs(array.mean()) < 0.01, key
    assert shapes == maker.tensor_shapes(config)
    assert dtypes == {"float16"}
    assert total == n_bytes == index["metadata"]["total_size"]


def test_random_checkpoint_image_tower_has_transformers_shapes(maker):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = maker.text_config("e2b-mini")
    config = maker.model_config(text, True, vision=True)
    with torch.device("meta"):
        model = transformers.Gemma4ForConditionalGeneration(
            transformers.Gemma4Config(**{key: config[key] for key in ("text_config", "vision_config", "audio_config")})
        )
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items() if ".language_model." not in name}
    assert maker.vision_shapes(text) == {name: shape for name, shape in theirs.items() if name != "lm_head.weight"}


def test_random_checkpoint_cuts(maker):
    """A cut of all layers is the whole model; of seven layers four borrow keys of the three before them."""
    for size, whole in maker.SIZES.items():
        config = maker.text_config(size)
        assert maker.text_config(size, **maker.cut(size, whole["num_hidden_layers"])) == config
    config = maker.text_config("e2b", **maker.cut("e2b", 7))
    assert (config["num_hidden_layers"], config["num_kv_shared_layers"], config["hidden_size"]) == (7, 4, 1536)
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [2, 6]
    shapes = maker.tensor_shapes(config)
    assert [i for i in range(7) if f"model.layers.{i}.self_attn.k_proj.weight" in shapes] == [0, 1, 2]
    for size, layers, shared, complaint in (
        ("e2b", 7, 6, "none of the 1 before them is sliding_attention"),
        ("e2b", 7, 7, "no cut of 7 layers of which 7"),
        ("12b", 6, 2, "no cut of 6 layers of which 2"),
    ):
        with pytest.raises(ValueError, match=complaint):
            maker.cut(size, layers, shared)


def test_random_checkpoint_cut_with_an_image_tower_loads(maker, tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "vocab_size_per_layer_input": 128}
    text = maker.text_config("e2b", **maker.cut("e2b", 7), **small)
    maker.write_checkpoint(tmp_path, text, vision=True)
    with gemma4.load(tmp_path) as model:
        assert model.n_layers == 7 and model.vision
        assert np.isfinite(model.forward(np.arange(5, 15))).all()
    with pytest.raises(ValueError, match="no image tower"):
        maker.write_checkpoint(tmp_path, text, vision=True, multimodal=False)


def test_random_checkpoint_names_unknown_size(maker):
    with pytest.raises(ValueError, match=r"e3b.*e2b"):
        maker.text_config("e3b")


def test_random_checkpoint_command(tmp_path):
    command = [
        sys.executable,
        ROOT / "tools" / "random_checkpoint.py",
        "12b-mini",
        tmp_path / "x",
        "--vocab",
        "64",
        "--dtype",
        "nope",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "bfloat16" in done.stderr


# ---- tools/random_gguf.py -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size, kind", [("e2b-mini", "Q4_K_M"), ("26b-a4b-mini", "Q4_0")])
def test_random_gguf_loads(maker, tmp_path, monkeypatch, size, kind):
    """The file that `gemma4 quantize` would have written, with other values in it."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    tokenizer = ROOT / "gemma4" / "pretrained" / "tiny-e" / "tokenizer.json"
    vocab = {"vocab_size": 2603, "vocab_size_per_layer_input": 2603}
    small = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 8}
    text = maker.text_config(size, "bfloat16", **vocab, **(small if "26b" in size else {"hidden_size": 256}))
    path, checkpoint = tmp_path / "random.gguf", tmp_path / "checkpoint"
    nbytes = load_tool("random_gguf").write_gguf(path, text, kind, tokenizer)
    assert nbytes == path.stat().st_size
    maker.write_checkpoint(checkpoint, text, multimodal=False, tokenizer=tokenizer)
    ours = gemma4.quantize(checkpoint, tmp_path / "quantised.gguf", type=kind)
    assert nbytes == ours.nbytes
    with gemma4.load(path) as model, gemma4.load(ours.path) as other:
        assert model.config == other.config
        logits = model.forward(np.arange(5, 15))
    assert np.isfinite(logits).all() and logits.std() > 0.01


# ---- tools/compare_builds.py --------------------------------------------------------------------------------------


MISTAKE = """

_right = Model.run_with_cache


def _wrong(self, *args, **options):
    logits, cache = _right(self, *args, **options)
    logits[-1] += self.d_vocab == 321
    return logits, cache


Model.run_with_cache = _wrong
"""


@pytest.fixture(scope="module")
def two_builds(tmp_path_factory) -> tuple[Path, Path, Path]:
    """This package in a folder, the same with a mistake in it, and a small plan of what to compare."""
    source = Path(gemma4.__file__).parent
    folders = [tmp_path_factory.mktemp(name) for name in ("right", "wrong")]
    for folder in folders:
        shutil.copytree(source, folder / "gemma4", ignore=shutil.ignore_patterns("pretrained", "__pycache__", "*.so"))
        (folder / "gemma4" / Path(_engine.__file__).name).symlink_to(_engine.__file__)
        if blas := importlib.util.find_spec("scipy_openblas32"):  # which the engine looks for beside its package
            (folder / "scipy_openblas32").symlink_to(Path(blas.origin).parent)
    with (folders[1] / "gemma4" / "__init__.py").open("a") as file:
        file.write(MISTAKE)
    files = tmp_path_factory.mktemp("files")
    for name, d_vocab in (("small", 320), ("other", 321)):
        write_checkpoint(files / name, E_LIKE | {"vocab_size": d_vocab, "vocab_size_per_layer_input": d_vocab})
    (files / "nobody's").mkdir()  # a checkpoint that no build can load
    text = [{"name": name, "prompts": [[5, 7, 11]]} for name in ("small", "other", "nobody's")]
    (files / "plan.json").write_text(json.dumps({"text": text, "media": [], "shipped": []}))
    return *folders, files


def compare_builds(*arguments: Path | str) -> tuple[int, str]:
    command = [sys.executable, "-P", str(ROOT / "tools" / "compare_builds.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_equal_builds_compare_equal(two_builds):
    right, _, files = two_builds
    status, text = compare_builds(right, sys.executable, "--files", files)
    assert status == 0, text
    assert "0 cases differ" in text and str(right) in text and "saved" not in text
    assert "nobody's/load: the base build fails" in text and text.count("the base build fails") == 1


@pytest.mark.slow
def test_a_build_with_a_mistake_is_seen(two_builds):
    right, wrong, files = two_builds
    status, text = compare_builds(right, wrong, "--files", files)
    assert status == 1, text
    assert re.search(
        r"^other/prompt of 3: 1 of \d+ differ, first logits: \d.*% of the values, by 1 ", text, re.MULTILINE
    ), text
    assert "small/" not in text and ": 1 cases differ" in text
    assert compare_builds(right, wrong, "--files", files, "--only", "small/*")[0] == 0
    status, text = compare_builds(files, wrong, "--files", files)
    assert status == 1 and f"{files} is neither an interpreter nor a folder" in text


# ---- tools/mutate.py ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mutate() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield load_tool("mutate")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_mistakes_can_be_planted(mutate):
    """Each text stands once in the sources. A few may have gone stale: mend tools/mutations.py, do not only delete."""
    stale = []
    for mistake in mutate.MISTAKES:
        assert mistake.old != mistake.new
        try:
            mutate.place_of(mistake, ROOT)
            mutate.test_files(mistake.tests, ROOT)
        except mutate.Stale as reason:
            stale.append(f"{mistake.what}: {reason}")
    assert len(mutate.MISTAKES) - len(stale) >= 60, stale


def test_a_mistake_is_planted_and_taken_out(mutate, tmp_path):
    (tmp_path / "gemma4").mkdir()
    file = tmp_path / "gemma4" / "some.py"
    file.write_text("a = 1\nb = 1\n")
    mistake = mutate.Mistake("b is 2", "b = 1", "b = 2", "api")
    with mutate.planted(mistake, tmp_path):
        assert file.read_text() == "a = 1\nb = 2\n"
    assert file.read_text() == "a = 1\nb = 1\n"
    for text in ("b = 1\nb = 1\n", "c = 1\n"):
        file.write_text(text)
        with pytest.raises(mutate.Stale, match="not once"), mutate.planted(mistake, tmp_path):
            pass


# ---- benchmarks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark_modules():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in ("cost", "report", "peers", "machine")}
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def small_e2b(maker, tmp_path_factory) -> tuple[Path, dict, dict]:
    """An E2B of 10 layers on disk, the last five sharing keys; its config and its matrices' sizes."""
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "vocab_size_per_layer_input": 128}
    config = maker.text_config("e2b-mini", **small)
    directory = tmp_path_factory.mktemp("e2b")
    maker.write_checkpoint(directory, config)
    return directory, config, {name: math.prod(shape) for name, shape in maker.tensor_shapes(config, "").items()}


def test_benchmark_cost_of_one_position(benchmark_modules, small_e2b):
    """Every matrix but the tables once, the head once, attention over itself."""
    directory, config, sizes = small_e2b
    cost = benchmark_modules["cost"].of_model(directory, 1)
    ple = sizes["embed_tokens_per_layer.weight"]
    vectors = [name for name in sizes if "norm" in name or "scalar" in name]
    heads = sum(8 * (512 if kind == "full_attention" else 256) for kind in config["layer_types"])
    assert cost.prefill_flops == 2 * (sum(sizes.values()) - ple - sum(sizes[name] for name in vectors)) + 4 * heads
    assert cost.bytes_resident == 2 * (sum(sizes.values()) - ple)
    assert (directory / "model.safetensors").stat().st_size > 2 * sum(sizes.values())


def test_benchmark_cost_of_one_more_position(benchmark_modules, small_e2b):
    """It passes through layers 0 to 3 whole and leaves keys and values in layer 4, the last that makes any."""
    directory, _, sizes = small_e2b
    of_model = benchmark_modules["cost"].of_model
    passed = {
        n: size for n, size in sizes.items() if n.startswith(tuple(f"layers.{i}." for i in range(4))) and size > 512
    }
    kept = sum(sizes[f"layers.4.self_attn.{kind}_proj.weight"] for kind in "kv")
    projection = sizes["per_layer_model_projection.weight"]
    # keys seen: two by the new position in layers 0 to 3; one more by the only position that runs in layers 4 to 9
    pairs = 4 * 2 * 256 + (4 * 256 + 2 * 512)
    more = of_model(directory, 2).prefill_flops - of_model(directory, 1).prefill_flops
    assert more == 2 * (sum(passed.values()) + kept + projection) + 4 * 8 * pairs


def test_benchmark_ratios_pair_the_rounds(benchmark_modules):
    report = benchmark_modules["report"]
    ours = [{"prefill_tps": [10.0, 12.0, 11.0], "load_s": [0.5]}, {"prefill_tps": [22.0], "load_s": [1.0]}]
    theirs = [{"prefill_tps": [5.5], "load_s": [2.0]}, {"prefill_tps": [11.0], "load_s": [4.0]}]
    summary = report.summarize({"gemma4": ours, "llama.cpp": theirs})
    assert summary["llama.cpp"]["prefill_tps"]["ratio"] == pytest.approx(2.0)
    assert summary["llama.cpp"]["load_s"]["ratio"] == pytest.approx(4.0)
    assert summary["gemma4"]["prefill_tps"] == {"median": 11.5, "min": 10.0, "max": 22.0}
    heads, rows = report.table(summary)
    assert heads == ["", "gemma4", "llama.cpp", "ratio"]
    assert rows[0][-1] == "2.00x" and len(rows) == 2
    heads, rows = report.long_table(summary)
    assert [row[:2] for row in rows] == [
        ["prefill, tokens/s", "gemma4"],
        ["", "llama.cpp"],
        ["load, s", "gemma4"],
        ["", "llama.cpp"],
    ]
    assert [row[3] for row in rows] == ["", "2.00x", "", "4.00x"] and rows[0][2] == "11.5 (10-22)"


def test_benchmark_results_say_what_they_are_of(benchmark_modules):
    record = benchmark_modules["machine"].record()
    assert record["level"] == gemma4.cpu_info()["isa"] and record["cpu"]
    assert abs((datetime.now(UTC) - datetime.fromisoformat(record["date"])).total_seconds()) < 60
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = record["commit"]
    assert (commit is None) == (not head) and (not head or head.startswith(commit.removesuffix("+")))
    heading = benchmark_modules["report"].heading
    assert all(str(record[key]) in heading(record) for key in ("cpu", "level", "commit", "date"))
    assert "commit not recorded" in heading({"cpu": "AMD EPYC", "cores": 2})


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "benchmarks" / "results").glob("*.json") if "summary" in json.loads(p.read_text())),
    ids=lambda path: path.stem,
)
def test_benchmark_results_of_earlier_versions_are_read(path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py", path], capture_output=True, text=True, check=True
    )
    assert "| prefill" in done.stdout and "level" in done.stdout.splitlines()[0]


def test_benchmark_of_harvests_runs(tmp_path):
    run = [sys.executable, ROOT / "benchmarks" / "harvest.py", "--tokens", "600", "--rounds", "1"]
    printed = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "forward passes alone" in printed and printed.count("of the forward passes") == 3
