# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of this package on one checkpoint, side by side with its peers.

    python benchmarks/run.py --model DIR
    python benchmarks/run.py --model DIR --llamacpp LLAMA_CPP --gguf FILE --transformers --json out.json --plot out.png

    python benchmarks/run.py --model cut-q4_0.gguf --checkpoint cut --transformers torch-env/bin/python \\
        --openvino openvino-env/bin/python --openvino-model cut-openvino --mistralrs mistralrs-env/bin/python \\
        --litert-lm litert-env/bin/python --litert-lm-model cut-litert/model.litertlm

Every engine runs in a process of its own, one at a time; rounds alternate between the engines; the file that an engine
reads is in the page cache before it starts. Reported are medians with the spread, and ratios taken round by round. How
to set up each peer is in benchmarks/README.md; one that is asked for and not there is named before anything runs.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cost
import machine
import report
from peers import (
    IK,
    UPSTREAM,
    MissingPeer,
    Peer,
    Round,
    Settings,
    find_llama_bench,
    llamacpp,
    python_engine,
    text_engine,
    versions,
    warm,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face directory (tools/random_checkpoint.py) or GGUF file"
    )
    parser.add_argument("--llamacpp", type=Path, help="folder of a built llama.cpp; needs --gguf")
    parser.add_argument("--ik-llamacpp", type=Path, help="folder of a built ik_llama.cpp; needs --gguf")
    parser.add_argument("--gguf", type=Path, help="the same weights as GGUF (default: --model, if that is one)")
    parser.add_argument(
        "--other-build", metavar="PYTHON", help="interpreter of an environment with another build of this package"
    )
    python = {"metavar": "PYTHON", "help": "interpreter of its environment"}
    parser.add_argument("--transformers", nargs="?", const=sys.executable, metavar="PYTHON", help="default: this one")
    parser.add_argument("--transformers-dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--openvino", **python)
    parser.add_argument("--openvino-model", type=Path, metavar="DIR", help="exported by optimum-intel")
    parser.add_argument("--mistralrs", **python)
    parser.add_argument("--litert-lm", **python)
    parser.add_argument("--litert-lm-model", type=Path, metavar="FILE", help="exported by benchmarks/export_litert.py")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory for transformers and mistral.rs (default: --model, if that is one)",
    )
    parser.add_argument(
        "--precision", choices=["exact", "high", "fast"], help="of this package (default: the model's own)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="prompts and captures timed in each round")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--context", type=int, default=0, help="also decode after so many tokens (16384); 0: no")
    parser.add_argument("--sequences", type=int, default=0, help="also decode so many sequences together (10); 0: no")
    parser.add_argument("--capture", type=int, default=256, help="prompt length for the capture of all layers; 0: none")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--plot", type=Path, help="write a bar chart here (PNG)")
    args = parser.parse_args()
    is_gguf = args.model.suffix == ".gguf"
    args.precision = args.precision or ("fast" if is_gguf else "exact")
    args.gguf = args.gguf or (args.model if is_gguf else None)
    args.checkpoint = args.checkpoint or (None if is_gguf else args.model)
    if (args.llamacpp or args.ik_llamacpp) and not args.gguf:
        parser.error("llama.cpp needs --gguf FILE: the same weights for it to run")
    if (args.transformers or args.mistralrs) and not args.checkpoint:
        parser.error("--transformers and --mistralrs need --checkpoint DIR: the same weights in Hugging Face's layout")
    for name in ("openvino", "litert_lm"):
        if bool(getattr(args, name)) != bool(getattr(args, f"{name}_model")):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} PYTHON and {option}-model go together: its own export of the same weights")
    return args


def files_of(model: Path, pattern: str = "*.safetensors") -> list[Path]:
    """The files that an engine reads of a model, itself or a directory. Raises SystemExit if there are none."""
    files = [model] if model.is_file() else sorted(model.glob(pattern))
    if not files:
        raise SystemExit(f"{model} is no file, nor a directory that has {pattern}")
    return files


def peers(args: argparse.Namespace) -> list[Peer]:
    weights = files_of(args.model)
    found = [Peer(report.OURS, weights, partial(python_engine, "gemma4", args.model, args.precision))]
    if args.other_build:
        run = partial(python_engine, "gemma4", args.model, args.precision, python=args.other_build)
        found.append(Peer("other build", weights, run))
    for name, folder, dialect in (("llama.cpp", args.llamacpp, UPSTREAM), ("ik_llama.cpp", args.ik_llamacpp, IK)):
        if folder:
            run = partial(llamacpp, find_llama_bench(folder), args.gguf, dialect=dialect)
            found.append(Peer(name, [args.gguf], run))
    return found + python_peers(args)


def python_peers(args: argparse.Namespace) -> list[Peer]:
    """The peers that are Python packages, each in its environment. Raises SystemExit for a model that is not
    there."""
    found = list[Peer]()
    for dtype in args.transformers_dtype if args.transformers else ():
        run = partial(python_engine, "transformers", args.checkpoint, dtype, python=args.transformers)
        name = "transformers" if dtype == "bfloat16" else f"transformers {dtype}"
        found.append(Peer(name, files_of(args.checkpoint), run))
    for name, engine, python, model, pattern in (
        ("OpenVINO", "openvino", args.openvino, args.openvino_model, "*.bin"),
        ("mistral.rs", "mistralrs", args.mistralrs, args.checkpoint, "*.safetensors"),
        ("LiteRT-LM", "litert", args.litert_lm, args.litert_lm_model, "*.litertlm"),
    ):
        if python:
            found.append(Peer(name, files_of(model, pattern), partial(text_engine, engine, python, model)))
    return found


def peer_versions(args: argparse.Namespace) -> dict[str, str]:
    """package -> version in the environments of the peers. Raises SystemExit for one that is not there."""
    pythons = {
        "transformers": args.transformers,
        "OpenVINO": args.openvino,
        "mistral.rs": args.mistralrs,
        "LiteRT-LM": args.litert_lm,
    }
    try:
        each = [versions(name, python) for name, python in pythons.items() if python]
    except MissingPeer as missing:
        raise SystemExit(str(missing)) from missing
    return {package: version for found in each for package, version in found.items()}


def yardsticks(threads: int) -> Round:
    """What the machine does here and now, measured in a process of its own (OpenBLAS reads its thread count once)."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    code = f"import json, machine; print(json.dumps(machine.yardsticks({threads})))"
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
    return json.loads(out.stdout)


def measure(engines: list[Peer], settings: Settings, n_rounds: int) -> dict[str, list[Round]]:
    """engine -> its rounds; under YARDSTICKS, what the machine could do at the start of each round."""
    rounds: dict[str, list[Round]] = {name: [] for name in (report.YARDSTICKS, *(engine.name for engine in engines))}
    for i in range(n_rounds):
        rounds[report.YARDSTICKS].append(yardsticks(settings.threads))
        for engine in engines:
            print(f"round {i + 1}/{n_rounds}: {engine.name} (load average {os.getloadavg()[0]:.1f})", file=sys.stderr)
            warm(engine.files)
            rounds[engine.name].append(engine.run(settings))
    return rounds


def main() -> None:
    args = arguments()
    settings = Settings(
        threads=args.threads,
        prompt=args.prompt,
        decode=args.decode,
        capture=args.capture,
        repeats=args.repeats,
        context=args.context,
        sequences=args.sequences,
    )
    packages = peer_versions(args)
    rounds = measure(peers(args), settings, args.rounds)
    work = cost.of_model(args.model, args.prompt)
    summary = report.summarize(rounds)
    record = machine.record()
    record["packages"] |= packages
    result: dict[str, Any] = {
        "machine": record,
        "model": {"name": args.model.name} | asdict(work),
        "settings": asdict(settings) | {"precision": args.precision, "rounds": args.rounds},
        "summary": summary,
        "shares": report.shares(rounds, work, args.precision),
        "rounds": rounds,
    }
    report.show(result, work)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        report.plot(summary, args.plot)


if __name__ == "__main__":
    main()
