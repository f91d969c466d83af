# SPDX-License-Identifier: Apache-2.0
"""How much of the machine's peak arithmetic a prompt reaches where that peak moves.

    python benchmarks/peak_share.py --model FILE.gguf --json out.json

Shared processors were found to do between 0.6 and 2.5 TFLOP/s of AMX within minutes, so a peak measured once a round
(run.py) says little about the prompts beside it. Here they take turns: loops of multiply-adds for a tenth of a second
of each kind, a prompt, the loops again. A prompt's share is the time that its products would take at the mean rate of
the loops before and after it, each kind of product at its own, over the time it took.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import machine
import numpy as np
from numpy.typing import NDArray
from peers import warm

import gemma4
import gemma4.errors
from gemma4 import _engine
from gemma4.profile import Limits

KINDS = ("f32", "int8", "int16", "bf16")
LOOP_SECONDS = 0.1


def mean_limits(threads: int) -> Limits:
    """The mean rate of the loops of each kind over LOOP_SECONDS; reading is not limited."""
    rates = []
    for kind in KINDS:
        passes, end = [_engine.arithmetic_rate(kind, threads)], time.perf_counter() + LOOP_SECONDS
        while time.perf_counter() < end:
            passes.append(_engine.arithmetic_rate(kind, threads))
        rates.append(fmean(passes))
    return Limits(math.inf, *rates)


def take_turns(model: gemma4.Model, ids: NDArray[np.int32], n_turns: int) -> list[dict[str, float]]:
    """tokens per second, share of the peak, and the loops' rates before and after, of each prompt."""
    sequence, turns = model.new_sequence(), []
    model.forward(ids, sequence=sequence, logits="last")  # warms up
    before = mean_limits(model.engine.threads)
    for i in range(n_turns):
        sequence.truncate(0)
        with model.profile() as profile:
            start = time.perf_counter()
            model.forward(ids, sequence=sequence, logits="last")
            seconds = time.perf_counter() - start
        after = mean_limits(model.engine.threads)
        least = fmean(sum(op.arithmetic_seconds(limits) for op in profile.ops) for limits in (before, after))
        turn = {"tokens_per_s": len(ids) / seconds, "share": least / seconds}
        for kind in KINDS:
            turn[f"{kind}_ops_per_s"] = fmean(getattr(limits, f"{kind}_work") for limits in (before, after))
        turns.append(turn)
        print(f"turn {i + 1}/{n_turns}: {turn['tokens_per_s']:.4g} tokens/s, {turn['share']:.0%}", file=sys.stderr)
        before = after
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint: directory or GGUF file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=("exact", "fast"), default="fast")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args()
    precision: Literal["exact", "fast"] = args.precision
    try:
        warm([args.model])
        opened = gemma4.load(args.model, threads=args.threads, precision=precision)
    except (OSError, gemma4.errors.FormatError) as unreadable:
        parser.error(str(unreadable))
    with opened as model:
        ids = np.random.default_rng(0).integers(model.n_token_ids // 8, model.n_token_ids * 3 // 4, args.prompt)
        turns = take_turns(model, ids.astype(np.int32), args.turns)
    for name, scale, unit in [("tokens_per_s", 1, "tokens/s"), ("share", 100, "% of peak arithmetic")]:
        values = [turn[name] * scale for turn in turns]
        print(f"{median(values):6.3g} ({min(values):.3g} to {max(values):.3g}) {unit}")
    if args.json:
        settings = {name: getattr(args, name) for name in ("precision", "prompt", "threads")}
        record = {"machine": machine.record(), "model": args.model.name, "settings": settings}
        args.json.write_text(json.dumps(record | {"turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
