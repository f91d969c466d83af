# SPDX-License-Identifier: Apache-2.0
"""Whether a jump of the decoding rate is the engine's or the machine's: decoding takes turns with reads of memory.

    python benchmarks/steadiness.py MODEL --seconds 60

One sequence decodes again and again. Every few tokens as many threads read 256 MiB, adding up what they read. Turns are
sorted by the bandwidth found; the table shows the decoding rate of each fifth of them. Where the share of the bandwidth
stays the same while the rate jumps, memory is what jumps.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import gemma4
from gemma4 import _engine
from gemma4.bench.machine import READ_FLOATS, random_ids

PROMPT, TOKENS, PASSES, FIFTHS = 512, 8, 3, 5


def step_bytes(model: gemma4.Model, sequence: gemma4.Sequence, token: np.ndarray) -> float:
    """Bytes of weights, keys and values that one step reads."""
    with model.profile() as profile:
        model.forward(token, sequence=sequence)
    return profile.total.bytes


def turns(model: gemma4.Model, seconds: float) -> tuple[np.ndarray, float]:
    """float64 [n, 2]: tokens/s, and GB/s of the reads just after; and the GB that a token reads."""
    ids, memory = random_ids(model, PROMPT), np.ones(READ_FLOATS, np.float32)
    sequence = model.new_sequence()
    model.forward(ids, sequence=sequence, logits="last")
    n_bytes, found = step_bytes(model, sequence, ids[:1]), list[tuple[float, float]]()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for i in range(TOKENS):
            model.forward(ids[i : i + 1], sequence=sequence)
        rate = TOKENS / (time.perf_counter() - start)
        sequence.truncate(PROMPT)
        reads = max(_engine.read_rate(memory, model.engine.threads)[0] for _ in range(PASSES))
        found.append((rate, reads / 1e9))
    return np.array(found), n_bytes / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    model = gemma4.load(args.model, threads=args.threads)
    found, gigabytes = turns(model, args.seconds)
    found = found[np.argsort(found[:, 1])]
    print(f"{len(found)} turns, {gigabytes:.3f} GB a token; correlation {np.corrcoef(found.T)[0, 1]:.2f}")
    print("bandwidth, GB/s   tokens/s   decoding's share")
    for part in np.array_split(found, FIFTHS):
        rate, reads = np.median(part, axis=0)
        print(f"{reads:15.1f} {rate:10.1f} {rate * gigabytes / reads:17.0%}")


if __name__ == "__main__":
    main()
