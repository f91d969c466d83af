# SPDX-License-Identifier: Apache-2.0
"""Run one round of each engine in processes of their own, and bring what they report to the same units.

A round is {metric: [samples]}: load_s, prefill_tps and decode_tps (tokens per second), deep_decode_tps (after
`context` tokens), batch_decode_tps (`sequences` together, tokens of all), peak_rss (bytes), capture_s, capture_rss
(peak_rss after the captures), and of ours capture_cost (share of the time that capturing adds) and idle_cpu (share of a
core that the loaded model uses).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Round = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """What every engine is asked to do."""

    threads: int
    prompt: int = 512
    decode: int = 32
    capture: int = 256
    repeats: int = 3
    context: int = 0
    sequences: int = 0


@dataclass(frozen=True)
class Peer:
    """An engine with the file it reads: `run()` is one round."""

    name: str
    files: list[Path]
    run: Callable[[Settings], Round]


@dataclass(frozen=True)
class Requirement:
    """What the Python environment of a peer needs: packages, and the line that makes one."""

    packages: tuple[str, ...]
    setup: str


def _environment(name: str, packages: str) -> str:
    return f"python -m venv {name} && {name}/bin/pip install {packages}"


REQUIREMENTS = {
    "transformers": Requirement(("torch", "transformers"), _environment("torch-env", "numpy torch transformers")),
    "OpenVINO": Requirement(("openvino-genai",), _environment("openvino-env", "openvino-genai")),
    "mistral.rs": Requirement(("mistralrs",), _environment("mistralrs-env", "mistralrs")),
    "LiteRT-LM": Requirement(("litert-lm-api",), _environment("litert-env", "litert-lm")),
}


class MissingPeer(RuntimeError):
    """A peer that was asked for is not there; the message says how to set it up."""


_VERSIONS = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"


def versions(name: str, python: str) -> dict[str, str]:
    """package -> version of a peer of REQUIREMENTS in that interpreter's environment. Raises MissingPeer."""
    needed = REQUIREMENTS[name]
    advice = f"{name} needs {' and '.join(needed.packages)}. Set up: {needed.setup} (benchmarks/README.md)"
    try:
        done = subprocess.run([python, "-c", _VERSIONS, *needed.packages], capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingPeer(f"{python} does not run ({error.strerror}). {advice}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MissingPeer(f"{python} lacks a package ({last}). {advice}")
    return dict(zip(needed.packages, done.stdout.split(), strict=True))


def warm(files: list[Path]) -> None:
    """Read the files, so that loading is measured with them in the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


# A parent that starts nothing else: its children's peak resident set is the command's.
_MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print("\\n", time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
# each engine reads the thread count from another one; mistral.rs's threads are Rayon's
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def run_process(command: list[str], threads: int) -> tuple[str, float, int]:
    """Run to the end: (what it printed, seconds, peak resident set in bytes).

    Whatever the command started ends with it, also when this process is interrupted: an engine whose threads wait
    spinning would slow down the next one. Raises RuntimeError with the end of its error output if it fails.
    """
    offline = {"HF_HUB_OFFLINE": "1"}  # no engine looks for a newer model or a template on the way
    environment = os.environ | dict.fromkeys(THREADS, str(threads)) | offline
    # files, not pipes: what outlives the command would hold a pipe open
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as error:
        parent = subprocess.Popen(
            [sys.executable, "-c", _MEASURED, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            env=environment,
            start_new_session=True,
        )
        try:
            os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)  # still a zombie: its group's number is not reused
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()
        printed, complaints = (file.seek(0) or file.read() for file in (out, error))
    if parent.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {complaints.strip()[-800:]}")
    text, _, last = printed.rstrip().rpartition("\n")
    seconds, peak_kb = last.split()
    return text.rstrip(), float(seconds), int(peak_kb) * 1024


def _worker(
    script: str, engine: str, python: str, settings: Settings, more: tuple[str, ...] = (), **options: Any
) -> tuple[dict[str, Any], int]:
    """The object that a worker prints last, and its peak resident set in bytes. `more`: settings that it takes besides
    those of all workers."""
    options |= {name: getattr(settings, name) for name in ("threads", "prompt", "decode", "repeats", *more)}
    command = [python, str(Path(__file__).with_name(script)), engine]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    out, _, peak = run_process(command, settings.threads)
    return json.loads(out.rsplit("\n", 1)[-1]), peak


def python_engine(engine: str, model: Path, precision: str, settings: Settings, python: str = sys.executable) -> Round:
    """One round of worker.py, run by that interpreter: another one may have another build of gemma4."""
    more = ("capture", "context", "sequences")
    result, _ = _worker("worker.py", engine, python, settings, more, model=model, precision=precision)
    with_capture = result.get("memory_with_capture")
    return {
        "load_s": [result["load_s"]],
        "first_prefill_s": [result["first_prefill_s"]],
        "prefill_tps": [settings.prompt / seconds for seconds in result["prefill_s"]],
        "decode_tps": [len(result["decode_s"]) / sum(result["decode_s"])],
        "peak_rss": [result["memory"]["VmHWM"]],
        "anonymous": [result["memory"]["RssAnon"]],
        "huge": [result["huge"]],
        "capture_s": result.get("capture_s", []),
        "capture_rss": [with_capture["VmHWM"]] if with_capture else [],
        "capture_cost": result.get("capture_cost", []),
        "deep_decode_tps": _rates(result.get("deep_decode_s", []), 1),
        "batch_decode_tps": _rates(result.get("batch_decode_s", []), settings.sequences),
        "idle_cpu": [result["idle_cpu"]],
    }


def text_engine(engine: str, python: str, model: Path, settings: Settings) -> Round:
    """One round of text_worker.py, prompts and decoding, run by the interpreter of the engine's environment."""
    result, peak = _worker("text_worker.py", engine, python, settings, model=model)
    return {
        "load_s": [result["load_s"]],
        "first_prefill_s": [result["first_prefill_s"]],
        "prefill_tps": result["prefill_tps"],
        "decode_tps": result["decode_tps"],
        "peak_rss": [peak],
    }


def _rates(seconds: list[float], tokens: int) -> list[float]:
    return [tokens * len(seconds) / sum(seconds)] if seconds else []


@dataclass(frozen=True)
class Dialect:
    """How a llama.cpp is spoken to: options of every command, and of decoding n tokens after a depth."""

    options: tuple[Any, ...]
    decode: Callable[[int, int], tuple[Any, ...]]
    no_warmup: tuple[Any, ...]


UPSTREAM = Dialect((), lambda n, depth: ("-p", 0, "-n", n, "-d", depth), ("--no-warmup",))
# repacking at load is ik_llama.cpp's fastest setting
IK = Dialect(("-rtr", 1), lambda n, depth: ("-p", 0, "-n", 0, "-gp", f"{depth},{n}"), ("-w", 0))


def llamacpp(folder: Path, gguf: Path, settings: Settings, dialect: Dialect = UPSTREAM) -> Round:
    """One round of llama-bench: the prompt, then decoding at that depth, then loading alone; if asked for, decoding at
    a greater depth, and upstream's llama-batched-bench.

    It reports no load time, so that is the whole process for one token less the token.
    """

    def bench(*words: Any) -> tuple[dict[str, Any], float, int]:
        command = [folder / "llama-bench", "-m", gguf, "-t", settings.threads, "-o", "json", *dialect.options, *words]
        out, seconds, peak = run_process([str(word) for word in command], settings.threads)
        return json.loads(out[out.index("[") :])[0], seconds, peak

    def decode(depth: int) -> tuple[dict[str, Any], float, int]:
        return bench(*dialect.decode(settings.decode, depth), "-r", 1)

    prefill, _, peak_prefill = bench("-p", settings.prompt, "-n", 0, "-r", settings.repeats)
    short, _, peak_decode = decode(settings.prompt)
    one, seconds, _ = bench("-p", 0, "-n", 1, "-r", 1, *dialect.no_warmup)
    result = {
        "load_s": [seconds - one["avg_ns"] / 1e9],
        "prefill_tps": prefill["samples_ts"],
        "decode_tps": short["samples_ts"],
        "peak_rss": [max(peak_prefill, peak_decode)],
    }
    if settings.context:
        result["deep_decode_tps"] = decode(settings.context)[0]["samples_ts"]
    if settings.sequences and dialect is UPSTREAM:
        result["batch_decode_tps"] = [_batched(folder, gguf, settings)]
    return result


BATCH_PROMPT = 64  # tokens of each sequence before it is decoded together with the others


def _batched(folder: Path, gguf: Path, settings: Settings) -> float:
    """Tokens per second of all sequences together, from llama-batched-bench."""
    n = settings.sequences
    n_context = n * (512 + settings.decode)  # with less it says nothing
    sizes = ["-npp", BATCH_PROMPT, "-ntg", settings.decode, "-npl", n, "-c", n_context]
    command = [folder / "llama-batched-bench", "-m", gguf, "-t", settings.threads, *sizes]
    out, _, _ = run_process([*map(str, command), "--output-format", "jsonl"], settings.threads)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return float(json.loads(lines[-1])["speed_tg"])


def find_llama_bench(folder: Path) -> Path:
    """The folder that holds llama-bench: the given one, or build/bin below it. Raises FileNotFoundError."""
    for candidate in (folder, folder / "build" / "bin", folder / "bin"):
        if (candidate / "llama-bench").is_file():
            return candidate
    raise FileNotFoundError(
        f"no llama-bench in {folder}, its bin/ or its build/bin/: build llama.cpp first (README.md)"
    )
