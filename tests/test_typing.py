# SPDX-License-Identifier: Apache-2.0
"""The types of the public face, as a user's checker sees them, and what help() and wrong options say."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

import gemma4
from gemma4.generation import GenerateOptions, Options
from gemma4.interp.lens import logit_lens

USER_CODE = Path(__file__).parent / "typing" / "user_code.py"
FACE = [getattr(gemma4, name) for name in gemma4.__all__]
ROOT = Path(__file__).parents[1]

# Rules that a file may switch off for all of its lines; everything else is strict everywhere.
SWITCHED_OFF = {
    "bench/plot.py": {"reportUnknownMemberType=false"},  # matplotlib's untyped **kwargs
    "interp/media_plots.py": {"reportUnknownMemberType=false"},  # matplotlib's untyped **kwargs
    "interp/plots.py": {"reportUnknownMemberType=false"},
    "text/sandbox.py": {"reportUnknownArgumentType=false", "reportUnknownVariableType=false"},  # any value, hot path
}
# Modules that no user imports: readers and writers of files, the command line, helpers.
INSIDE = re.compile(
    r"(load|cli|quantization)\.(?!__init__|divergence|result)|narrow|npz|files|_moved|__main__|"
    r"harvest\.(?!__init__|dataset|export|run)|checks|generation\.defaults|media\.(container|source)|text\.(literals|parts|repair|sandbox|tokenizer_file)"
)


@pytest.mark.slow
def test_user_code(tmp_path):
    """Every line that should pass does, and every one marked `# error: RULE` breaks that rule."""
    if find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    shutil.copy(USER_CODE, tmp_path)
    settings = {"typeCheckingMode": "strict", "include": ["user_code.py"], "reportUnusedExpression": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=600).stdout)
    found = {(one["range"]["start"]["line"] + 1, one.get("rule")) for one in report["generalDiagnostics"]}
    lines = USER_CODE.read_text(encoding="utf-8").splitlines()
    wanted = {(n, line.split("# error: ")[1]) for n, line in enumerate(lines, 1) if "# error: " in line}
    said = "\n".join(f"{one['range']['start']['line'] + 1}: {one['message']}" for one in report["generalDiagnostics"])
    assert {line for line, _ in found} == {line for line, _ in wanted} and wanted <= found, said
    assert len(wanted) > 10


def modules():
    """(path below gemma4/, text) of every module."""
    for path in sorted((ROOT / "gemma4").rglob("*.py")):
        yield path.relative_to(ROOT / "gemma4").as_posix(), path.read_text(encoding="utf-8")


def test_the_whole_package_is_strict():
    """A new module is strict by itself: the mode is, nothing is left out, and no file lowers it for itself."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    assert settings == {
        "include": ["gemma4"],
        "pythonVersion": "3.11",
        "typeCheckingMode": "strict",
        "enableTypeIgnoreComments": False,
        "reportMissingModuleSource": "none",
    }
    for name, text in modules():
        said = re.findall(r"^\s*#\s*pyright:\s*(.*)$", text, re.MULTILINE)
        assert {word for one in said for word in re.split(r",\s*", one)} == SWITCHED_OFF.get(name, set()), name


def test_exceptions_name_their_rule_and_their_reason():
    for name, text in modules():
        for line in text.splitlines():
            where = f"{name}: {line.strip()}"
            assert not re.search(r"#\s*type:\s*ignore", line), where
            if re.search(r"\S.*#\s*pyright:", line):
                assert re.search(r"# pyright: ignore\[report\w+\]  # \w", line), where


def annotations(tree, prefix=""):
    """(name of function, argument or "return", annotation) of everything public in a module's or class's body."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from annotations(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            for one in given:
                if one is not None and one.annotation is not None:
                    yield prefix + node.name, one.arg, ast.unparse(one.annotation)
            if node.returns is not None:
                yield prefix + node.name, "return", ast.unparse(node.returns)


def test_no_any_in_what_public_modules_take():
    """Parameters of public functions have types; what they return may hold JSON, or be a module without types."""
    n_checked = 0
    for name, text in modules():
        module = name.removesuffix(".py").replace("/", ".")
        if INSIDE.match(module):
            continue
        for function, argument, annotation in annotations(ast.parse(text)):
            n_checked += 1
            if re.search(r"\bAny\b", annotation):
                of_json = argument == "return" and "dict[str, Any]" in annotation
                assert of_json or function == "pyplot", f"{module}.{function}({argument}: {annotation})"
    assert n_checked > 500


def public_functions():
    for thing in FACE:
        members = vars(thing).items() if inspect.isclass(thing) else [(thing.__name__, thing)]
        for base in [b for b in getattr(thing, "__mro__", ()) if b.__module__.startswith("gemma4.core")]:
            members = [*members, *vars(base).items()]
        for name, member in members:
            function = member.fget if isinstance(member, property) else getattr(member, "func", member)
            if inspect.isfunction(function) and (not name.startswith("_") or name == "__getitem__"):
                yield pytest.param(function, id=f"{thing.__name__}.{name}")


@pytest.mark.parametrize("function", list(public_functions()))
def test_no_any_in_public_signatures(function):
    """Neither in the implementation nor in any of its overloads; dict[str, Any] of JSON is none of a parameter."""
    for one in (function, *typing.get_overloads(function)):
        for name, annotation in one.__annotations__.items():
            assert not re.search(r"\bAny\b", str(annotation)), f"{name}: {annotation}"
        assert "return" in one.__annotations__


def test_options_have_one_set_of_names():
    names = [field.name for field in fields(Options)]
    assert names == list(GenerateOptions.__annotations__)
    for name in names:
        assert name in gemma4.Model.generate.__doc__.split("by name")[1], name


def test_help_tells_everything(capsys):
    help(gemma4.Model.generate)
    text = capsys.readouterr().out
    for words in ("max_tokens", "temperature", "messages", "[256]", "Raises", "CapacityError", "list of them"):
        assert words in text


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("max_new_tokens", "max_tokens"),
        ("max_length", "max_tokens"),
        ("num_predict", "max_tokens"),
        ("do_sample", "temperature"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topk", "top_k"),
        ("stop_sequences", "stop"),
        ("eos_token_id", "stop_ids"),
        ("repeat_penalty", "repetition_penalty"),
        ("enable_thinking", "think"),
        ("logits_processor", "processors"),
        ("past_key_values", "sequence"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_unknown_option_names_the_nearest(tiny, method, option, meant):
    with pytest.raises(TypeError, match=rf"^{option}: did you mean {meant}( or \w+)?\?$"):
        getattr(tiny, method)("Once", **{option: 5})


def test_unknown_options_are_all_named(tiny):
    with pytest.raises(
        TypeError, match=r"^max_new_tokens: did you mean max_tokens\?; wibble: no such option; max_tokens,"
    ):
        tiny.generate("Once", max_new_tokens=5, wibble=1, top_k=3)


DOCUMENTED = [
    gemma4.load, gemma4.quantize, logit_lens, *(getattr(gemma4.Model, name) for name in (
        "encode_audio", "encode_image", "encode_video", "forward", "hooks", "new_sequence", "restore", "run_from",
        "run_with_cache", "run_with_hooks", "stream", "to_prompt",
    )),
]  # fmt: skip


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda function: function.__name__)
def test_help_names_every_parameter_and_what_is_raised(function):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert name in ("self", "options", "path") or re.search(rf"\b{name}\b", text), name
    assert re.search(r"\bRaises\b", text)


def test_stream_names_every_option():
    for name in GenerateOptions.__annotations__:
        assert re.search(rf"\b{name}\b", gemma4.Model.stream.__doc__), name


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "3", True])
def test_the_lens_keeps_at_least_one_token(tiny, top_k):
    with pytest.raises(ValueError, match=r"^top_k must be an integer in 1\.\."):
        logit_lens(tiny, "Once", top_k=top_k)
