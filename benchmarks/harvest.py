# SPDX-License-Identifier: Apache-2.0
"""The rate of a harvest against the engine's own: the same batches, in the same rounds, with nothing stored.

    python benchmarks/harvest.py [--model DIR] [--site "blocks.5.hook_resid_post"] [--tokens 100000] [--rounds 5]

Prints tokens per second, median of the rounds: the forward passes alone; a harvest by one process with all threads; one
by as many workers as there are threads, a thread each. The forward passes capture the last site, as the engine leaves
out positions that nothing needs. A harvest's rate counts from its first step on, so that loading
models in workers is left out; reading the corpus, statistics, checksums and syncing are not. Ratios are medians over
rounds, whose parts follow each other closely.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import gemma4
from gemma4 import harvest
from gemma4.harvest.corpus import Corpus, Reading
from gemma4.harvest.pieces import batches
from gemma4.harvest.plan import Options, Plan, make_plan


def write_corpus(path: Path, n_ids: int, n_tokens: int, seed: int = 0) -> None:
    """Random token ids in documents of 64 to 512: the rate does not depend on them."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        while n_tokens > 0:
            ids = rng.integers(3, n_ids, int(rng.integers(64, 513)))
            print(json.dumps({"tokens": ids.tolist()}), file=file)
            n_tokens -= len(ids)


def forward_rate(model: gemma4.Model, plan: Plan) -> float:
    """Tokens per second of the plan's batches, as far as its sites need, with the last site captured and dropped."""
    skipped, reading = [], Reading(plan.corpus)
    pieces = [piece for part in plan.slices for piece in plan.cutter.pieces(model, reading, part, plan.limit, skipped)]
    steps = [[piece.prompt for piece in batch] for batch in batches(pieces)]
    last = plan.captured[-1:]
    model.run_with_cache(steps[0], last, stop_at_layer=plan.stop_at_layer, logits=None)
    start = time.perf_counter()
    for prompts in steps:
        model.run_with_cache(prompts, last, stop_at_layer=plan.stop_at_layer, logits=None)
    return sum(map(len, pieces)) / (time.perf_counter() - start)


def harvest_rate(model: gemma4.Model, corpus: Path, site: str, out: Path, *, shard_tokens: int, workers: int) -> float:
    """Tokens per second of a harvest into a new folder, from its first step on."""
    seen: list[harvest.Progress] = []
    options = {"shard_tokens": shard_tokens, "workers": workers}
    harvest.harvest(model, corpus, site, out=out, progress=seen.append, **options)
    return (seen[-1].tokens - seen[0].tokens) / (seen[-1].seconds - seen[0].seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-e")
    parser.add_argument("--site", default="blocks.*.hook_resid_post")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, gemma4.load(args.model, threads=args.threads) as model:
        root, threads = Path(folder), model.engine.threads
        write_corpus(root / "corpus.jsonl", model.n_token_ids, args.tokens)
        shard_tokens = min(1 << 14, args.tokens // (8 * threads))  # enough shards that workers end together
        options = Options("bf16", None, None, shard_tokens, None, False)
        plan = make_plan(model, Corpus.open(root / "corpus.jsonl"), args.site, options)
        rates: dict[str, list[float]] = {"forward": [], "one": [], "workers": []}
        for number in range(args.rounds):
            rates["forward"].append(forward_rate(model, plan))
            for name, workers in (("one", 1), ("workers", threads)):
                out = root / f"{name}-{number}"
                sizes = {"shard_tokens": shard_tokens, "workers": workers}
                rates[name].append(harvest_rate(model, root / "corpus.jsonl", args.site, out, **sizes))
    print(f"{args.model}, {args.site}, {threads} threads, {args.tokens:,} tokens, {args.rounds} rounds")
    for name, text in {
        "forward": "forward passes alone",
        "one": f"harvest, 1 worker of {threads} threads",
        "workers": f"harvest, {threads} workers of 1 thread",
    }.items():
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["forward"], strict=True))
        print(f"{text:<36} {statistics.median(rates[name]):>12,.0f} tokens/s  {ratio:6.3f} of the forward passes")


if __name__ == "__main__":
    main()
