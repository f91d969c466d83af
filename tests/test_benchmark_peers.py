# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run.py beside other engines, of which fakes with known numbers take the place."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_models import E_LIKE, write_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Each notes when its process begins and ends, and refuses a prompt that it has seen. A word is a token, the first comes
# free. Times are chosen so that the rates are known: a prompt of n tokens runs at n / 2, n / 4 and n / 5 tokens/s.
NOTES = """
import atexit, os
def note(what):
    with open(os.environ["PEER_NOTES"], "a") as file:
        file.write(what + "\\n")
seen = set()
def fresh(text):
    assert text not in seen, "a prompt came twice"
    seen.add(text)
    return 1 + len(text.split())
"""
FAKES = {
    "openvino_genai": """
import notes
from types import SimpleNamespace as Some
notes.note("OpenVINO begins"); notes.atexit.register(notes.note, "OpenVINO ends")
GenerationConfig = Some
def mean(x):
    return lambda: Some(mean=x)
class VLMPipeline:
    def __init__(self, path, device, INFERENCE_NUM_THREADS):
        assert device == "CPU" and INFERENCE_NUM_THREADS == 1
    def get_tokenizer(self):
        return Some(encode=lambda text: Some(input_ids=Some(shape=[1, 1 + len(text.split())])))
    def generate(self, text, generation_config):
        assert generation_config.ignore_eos and not generation_config.apply_chat_template
        n, new = notes.fresh(text), generation_config.max_new_tokens
        return Some(perf_metrics=Some(get_num_input_tokens=lambda: n, get_num_generated_tokens=lambda: new,
                                      get_ttft=mean(2000.0), get_tpot=mean(50.0)))
""",
    "mistralrs": """
import notes
from types import SimpleNamespace as Some
notes.note("mistral.rs begins"); notes.atexit.register(notes.note, "mistral.rs ends")
assert notes.os.environ["RAYON_NUM_THREADS"] == "1"
CompletionRequest = Some
MultimodalArchitecture = Some(Gemma4="gemma4")
Which = Some(MultimodalPlain=Some)
class Runner:
    def __init__(self, which, in_situ_quant, token_source, prefix_cache_n):
        assert in_situ_quant == "Q4_0" and prefix_cache_n == 0
    def tokenize_text(self, text, add_special_tokens, enable_thinking):
        return [2, *map(len, text.split())]
    def send_completion_request(self, request):
        assert request.ignore_eos and request.temperature == 0
        n = notes.fresh(request.prompt)
        return Some(usage=Some(prompt_tokens=n, total_prompt_time_sec=4.0, completion_tokens=request.max_tokens,
                               total_completion_time_sec=(request.max_tokens - 1) / 30))
""",
    "litert_lm": """
import notes
from types import SimpleNamespace as Some
notes.note("LiteRT-LM begins"); notes.atexit.register(notes.note, "LiteRT-LM ends")
Backend = Some(CPU=Some)
class Session:
    def __enter__(self):
        self.going = True
        return self
    def __exit__(self, *error):
        pass
    def run_prefill(self, texts):
        (text,) = texts
        self.n, self.decoded = notes.fresh(text), 0
    def run_decode_async(self):
        while self.going:
            self.decoded += 1
            assert self.decoded < 100, "nobody stops it"
            yield "word"
    def cancel_process(self):
        self.going = False
    def get_benchmark_info(self):
        return Some(last_prefill_token_count=self.n, time_to_first_token_in_second=5.0,
                    last_decode_token_count=self.decoded, last_decode_tokens_per_second=40.0)
class Engine:
    def __init__(self, path, backend, cache_dir, enable_benchmark, use_ringbuffers_local_attention):
        assert backend.thread_count == 1 and enable_benchmark and cache_dir == ":nocache"
    def tokenize(self, text):
        return [2, *map(len, text.split())]
    def create_session(self, apply_prompt_template):
        assert not apply_prompt_template
        return Session()
""",
}
DISTRIBUTIONS = {"openvino-genai": "2026.4", "mistralrs": "0.9", "litert-lm-api": "0.18"}


@pytest.fixture(scope="module")
def modules() -> Any:
    """The modules of benchmarks/, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("run", "peers", "report", "text_worker", "export_litert")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.pop(0)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter in whose environment the fakes are installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name, text in {"notes": NOTES, **FAKES}.items():
        (folder / f"{name}.py").write_text(text)
    for name, version in DISTRIBUTIONS.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PEER_NOTES", str(tmp_path / "notes"))
    return str(script)


@pytest.fixture
def arguments(tmp_path: Path, python: str) -> list[str]:
    """run.py's, for this package and the three fakes on a small model."""
    model = write_checkpoint(tmp_path / "model", E_LIKE)
    for name in ("openvino/openvino_language_model.bin", "litert/model.litertlm"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"weights")
    words = ["--model", model, "--openvino", python, "--openvino-model", tmp_path / "openvino", "--mistralrs", python]
    words += ["--litert-lm", python, "--litert-lm-model", tmp_path / "litert" / "model.litertlm"]
    sizes = ["--threads", "1", "--rounds", "2", "--repeats", "2", "--prompt", "20", "--decode", "4", "--capture", "0"]
    return [*map(str, words), *sizes, "--json", str(tmp_path / "out.json")]


def call(run: ModuleType, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    names = ("read_bytes_per_s", "f32_ops_per_s", "int8_ops_per_s", "bf16_ops_per_s", "flops")
    monkeypatch.setattr(run, "yardsticks", lambda threads: {name: [1e12] for name in names})
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    run.main()


def is_running(pid: int) -> bool:
    """A zombie, which has no threads any more, does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_peers_take_turns_with_ours(modules, monkeypatch, tmp_path, arguments, capsys):
    call(modules.run, monkeypatch, arguments)
    result = json.loads((tmp_path / "out.json").read_text())
    medians = {
        name: [metrics[metric]["median"] for metric in ("prefill_tps", "decode_tps")]
        for name, metrics in result["summary"].items()
        if name != "gemma4"
    }
    assert medians["OpenVINO"] == pytest.approx([20 / 2, 20])
    assert medians["mistral.rs"] == pytest.approx([20 / 4, 30])
    assert medians["LiteRT-LM"] == pytest.approx([20 / 5, 40])
    for name in medians:
        rounds, summary = result["rounds"][name], result["summary"][name]
        assert [len(one["prefill_tps"]) for one in rounds] == [2, 2]  # the first prompt does not count
        assert all(one["first_prefill_s"][0] > 1 and 1e6 < one["peak_rss"][0] < 1e9 for one in rounds)
        ours = [one["prefill_tps"] for one in result["rounds"]["gemma4"]]
        assert summary["prefill_tps"]["ratio"] == pytest.approx(
            sum(map(sum, ours)) / 4 / medians[name][0]
        )  # of two rounds of two samples every median is a mean
        assert summary["load_s"]["median"] > 0 and "capture_s" not in summary
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes == 2 * [f"{name} {what}" for name in medians for what in ("begins", "ends")]
    assert result["machine"]["packages"].items() >= DISTRIBUTIONS.items()
    printed = capsys.readouterr().out
    assert "prefill against" in re.sub(r"\s+", " ", printed) and "LiteRT-LM" in printed


@pytest.mark.slow
def test_transformers_captures_in_bfloat16(modules, monkeypatch, tmp_path, arguments):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(BENCHMARKS.parent / "tools"))
    try:
        maker = importlib.import_module("random_checkpoint")
    finally:
        sys.path.pop(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "vocab_size_per_layer_input": 128}
    text = maker.text_config("e2b", **maker.cut("e2b", 7), **small)
    maker.write_checkpoint(tmp_path / "cut", text)
    words = ["--model", str(tmp_path / "cut"), "--transformers", "--transformers-dtype", "bfloat16", "float32"]
    words += ["--threads", "1", "--rounds", "1", "--repeats", "2", "--prompt", "8", "--decode", "2", "--capture", "6"]
    call(modules.run, monkeypatch, [*words, "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    for name in ("gemma4", "transformers", "transformers float32"):
        (one,) = result["rounds"][name]
        assert len(one["prefill_tps"]) == len(one["capture_s"]) == 2
        assert one["capture_rss"][0] >= one["peak_rss"][0] > 1e6
        assert {"capture_s", "capture_rss"} <= result["summary"][name].keys()
    assert {"torch", "transformers"} <= result["machine"]["packages"].keys()


# ---- what is not there ----------------------------------------------------------------------------------------------


def test_missing_peers_come_with_their_setup(modules, tmp_path):
    peers = modules.peers
    for name, requirement in peers.REQUIREMENTS.items():
        with pytest.raises(peers.MissingPeer) as missing:
            peers.versions(name, str(tmp_path / "none"))
        assert "does not run (No such file" in str(missing.value) and requirement.setup in str(missing.value)
    with pytest.raises(
        peers.MissingPeer, match=r"lacks a package \(.*openvino-genai\)\. OpenVINO needs openvino-genai"
    ):
        peers.versions("OpenVINO", sys.executable)


def test_nothing_runs_where_a_peer_is_missing(modules, monkeypatch, arguments):
    monkeypatch.setattr(modules.run, "measure", lambda *_: pytest.fail("a round began"))
    with pytest.raises(SystemExit, match="mistralrs-env/bin/pip install mistralrs"):
        call(modules.run, monkeypatch, [*arguments, "--mistralrs", sys.executable])
    with pytest.raises(SystemExit, match=r"nowhere is no file, nor a directory that has \*\.bin"):
        call(modules.run, monkeypatch, [*arguments, "--openvino-model", "nowhere"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--model a --openvino p", "--openvino PYTHON and --openvino-model go together"),
        ("--model a --litert-lm-model f", "--litert-lm PYTHON and --litert-lm-model go together"),
        ("--model a.gguf --mistralrs p", "need --checkpoint DIR"),
        ("--model a.gguf --transformers", "need --checkpoint DIR"),
    ],
)
def test_options_that_belong_together(modules, monkeypatch, capsys, words, complaint):
    with pytest.raises(SystemExit):
        call(modules.run, monkeypatch, words.split())
    assert complaint in capsys.readouterr().err


def test_readme_has_every_setup_line(modules):
    readme = (BENCHMARKS / "README.md").read_text()
    assert [r.setup for r in modules.peers.REQUIREMENTS.values() if r.setup not in readme] == []
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (BENCHMARKS / "run.py").read_text()))
    peers = {option for option in options if re.search("transf|openv|mistral|litert|checkpoint", option)}
    assert len(peers) >= 8 and [option for option in sorted(peers) if option not in readme] == []


# ---- processes ------------------------------------------------------------------------------------------------------


def wait_until(condition: Any) -> None:
    """Fails only if it has not become true for a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_an_engine_leaves_running_ends_with_its_turn(modules):
    out, _, peak = modules.peers.run_process(["sh", "-c", "sleep 600 & echo $!"], 1)
    wait_until(lambda: not is_running(int(out)))
    assert 1e5 < peak < 1e9


def test_an_interrupted_turn_ends_its_engine(modules, monkeypatch, tmp_path):
    noted = tmp_path / "pid"

    def interrupt(*_: Any) -> None:
        wait_until(lambda: noted.exists() and noted.read_text().endswith("\n"))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "waitid", interrupt)
    with pytest.raises(KeyboardInterrupt):
        modules.peers.run_process(["sh", "-c", f"echo $$ > '{noted}'; exec sleep 600"], 1)
    wait_until(lambda: not is_running(int(noted.read_text())))


def test_a_failing_engine_is_quoted(modules):
    with pytest.raises(RuntimeError, match="failed: no such weights"):
        modules.peers.run_process(["sh", "-c", "echo no such weights >&2; exit 3"], 1)


# ---- prompts of text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_a_word", [1, 2])
def test_prompts_have_the_tokens_asked_for(modules, of_a_word):
    """Of words of two tokens, one token more where the number is odd."""
    engine = SimpleNamespace(count=lambda text: of_a_word * len(text.split()))
    rng = random.Random(0)
    for n in (1, 2, 33, 512):
        texts = [modules.text_worker.prompt(engine, n, rng) for _ in range(2)]
        assert [engine.count(text) for text in texts] == 2 * [n + n % of_a_word]
        assert n < 33 or texts[0] != texts[1]


@pytest.mark.parametrize(("n_prompt", "n_decoded"), [(19, 4), (20, 0)])
def test_an_engine_that_does_less_is_refused(modules, monkeypatch, n_prompt, n_decoded):
    worker = modules.text_worker
    engine = SimpleNamespace(
        count=lambda text: len(text.split()), run=lambda text, n: worker.Run(n_prompt, 1.0, n_decoded, 1.0)
    )
    monkeypatch.setitem(worker.ENGINES, "litert", lambda model, threads: engine)
    args = SimpleNamespace(engine="litert", model=None, threads=1, prompt=20, decode=4, repeats=1, seed=0)
    with pytest.raises(SystemExit, match=f"n_prompt={n_prompt}.*not 20 tokens and 4 after them"):
        worker.measure(args)


# ---- LiteRT-LM's export ---------------------------------------------------------------------------------------------


def test_export_gives_the_exporter_one_recipe(modules, monkeypatch, tmp_path):
    rules = {f"tf_lite_{name}": [{"regex": name}] for name in ("embedder", "per_layer_embedder", "prefill_decode")}
    quantizer = SimpleNamespace(recipe=SimpleNamespace(gemma4_mixed48_b32=lambda: rules))
    asked: dict[str, Any] = {}

    def export(**options: Any) -> None:
        asked.update(options, rules=json.loads(Path(options["quantization_recipe"]).read_text()))

    path = "litert_torch.generative.export_hf.export"
    for name in [path[:i] for i, letter in enumerate(path) if letter == "."]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, path, SimpleNamespace(export=export))
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", quantizer)
    model, out = tmp_path / "cut", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text('{"text_config": {}}')
    monkeypatch.setattr(sys, "argv", ["export_litert.py", str(model), str(out), "--prompt", "256"])
    modules.export_litert.main()
    assert asked["rules"] == [{"regex": "embedder"}, {"regex": "prefill_decode"}]
    assert (asked["model"], asked["output_dir"], asked["prefill_lengths"]) == (str(model), str(out), [256])
    assert asked["quantization_recipe"].endswith(".json")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--recipe", "gemma4_mixed9"])
    with pytest.raises(SystemExit, match="no recipe gemma4_mixed9; for Gemma 4 it has gemma4_mixed48_b32"):
        modules.export_litert.main()


def test_export_refuses_what_the_exporter_cannot_read(modules, monkeypatch, tmp_path, capsys):
    for text, complaint in ((None, "has no config.json"), ('{"model_type": "gemma4_text"}', "text-only class")):
        if text:
            (tmp_path / "config.json").write_text(text)
        monkeypatch.setattr(sys, "argv", ["export_litert.py", str(tmp_path), "out"])
        with pytest.raises(SystemExit):
            modules.export_litert.main()
        assert complaint in capsys.readouterr().err
