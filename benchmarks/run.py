# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of this package on one checkpoint, side by side with its peers.

    python benchmarks/run.py --model DIR
    python benchmarks/run.py --model DIR --llamacpp LLAMA_CPP --gguf FILE --transformers --json out.json --plot out.png

Every engine runs in a process of its own; rounds alternate between the engines; the file that an engine reads is in the
page cache before it starts. Reported are medians with the spread, and ratios taken round by round.
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
from peers import IK, UPSTREAM, Peer, Round, Settings, find_llama_bench, llamacpp, python_engine, warm


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
    parser.add_argument("--transformers", action="store_true", help="also measure transformers in bfloat16")
    parser.add_argument("--precision", choices=["exact", "fast"], help="of this package (default: the model's own)")
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
    if (args.llamacpp or args.ik_llamacpp) and not args.gguf:
        parser.error("llama.cpp needs --gguf FILE: the same weights for it to run")
    if args.transformers and is_gguf:
        parser.error("--transformers needs a Hugging Face directory as --model")
    return args


def peers(args: argparse.Namespace) -> list[Peer]:
    weights = [args.model] if args.model.is_file() else sorted(args.model.glob("*.safetensors"))
    if not weights:
        raise SystemExit(f"{args.model} is no GGUF file, nor has it *.safetensors")
    found = [Peer(report.OURS, weights, partial(python_engine, "gemma4", args.model, args.precision))]
    if args.other_build:
        run = partial(python_engine, "gemma4", args.model, args.precision, python=args.other_build)
        found.append(Peer("other build", weights, run))
    for name, folder, dialect in (("llama.cpp", args.llamacpp, UPSTREAM), ("ik_llama.cpp", args.ik_llamacpp, IK)):
        if folder:
            run = partial(llamacpp, find_llama_bench(folder), args.gguf, dialect=dialect)
            found.append(Peer(name, [args.gguf], run))
    if args.transformers:
        found.append(Peer("transformers", weights, partial(python_engine, "transformers", args.model, "bfloat16")))
    return found


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
    rounds = measure(peers(args), settings, args.rounds)
    work = cost.of_model(args.model, args.prompt)
    summary = report.summarize(rounds)
    result: dict[str, Any] = {
        "machine": machine.record(),
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
