# SPDX-License-Identifier: Apache-2.0
"""What a row of a decoding step costs outside the engine: sampling, text, bookkeeping.

    python benchmarks/row_cost.py --model FOLDER --rows 1,4,16,64 --json out.json

A model of two narrow layers with Gemma 4's vocabulary of 262,144 is written into FOLDER if there is none, so nearly all
time of its steps is outside of its layers. Every kind of sampling decodes with `--rows` prompts side by side. Times are
processor time of the thread that runs the steps, which other programs disturb little; the smallest mean of `--repeats`
rounds of `--steps` steps counts.

    sampling      `Sampler`, from logits to a token
    text          text pieces, stop ids and stop strings
    bookkeeping   everything else outside `engine.step`: prompts, plans, sequences, outputs
    all           their sum, the goal is 0.2 ms
    hand-over     in `engine.step`, but no operation of the forward pass: arguments, copies of the logits
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import thread_time
from typing import Any
from unittest import mock

import machine

import gemma4
from gemma4.generation.loop import Batch, Continuation
from gemma4.generation.options import Options

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import random_checkpoint

NARROW = {"num_hidden_layers": 2, "pattern": 2, "num_kv_shared_layers": 0, "num_attention_heads": 2, "head_dim": 32}
NARROW |= {"global_head_dim": 32, "hidden_size": 64, "intermediate_size": 128, "hidden_size_per_layer_input": 32}
GEMMA = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, stop strings": {"temperature": 0.0, "stop": ["\n\nUser:", "</answer>", "STOP"]},
    "top_k 64, top_p 0.95": GEMMA,
    "+ penalties": GEMMA | {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    "+ min_p": GEMMA | {"min_p": 0.05},
    "+ logprobs 5": GEMMA | {"logprobs": 5},
    "+ stop strings": GEMMA | {"stop": ["\n\nUser:", "</answer>", "STOP"]},
    "+ logit bias": GEMMA | {"logit_bias": {7: 2.0, 9: -float("inf")}},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "temperature 1": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "top_p 0.95": {"temperature": 1.0, "top_k": 0, "top_p": 0.95},
    "min_p 0.05": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.05},
}
PARTS = ("sampling", "text", "bookkeeping", "all", "hand-over")
TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "tokenizer.json.xz"


def checkpoint(folder: Path) -> Path:
    """The narrow model, written now if it is not there."""
    path = folder / "row-cost"
    if not (path / "model.safetensors").exists():
        text = random_checkpoint.text_config("e2b", **NARROW)
        random_checkpoint.write_checkpoint(path, text, multimodal=False, tokenizer=TOKENIZER)
    return path


class Watch:
    """Adds up the processor time of calls."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = thread_time()
            try:
                return fn(*args, **kwargs)
            finally:
                self.seconds[name] += thread_time() - start

        return call


class Engine:
    """The model's engine, with its steps timed."""

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine = engine
        self.step = watch.timed("engine", engine.step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def watched(stack: ExitStack, model: gemma4.Model) -> Watch:
    """Times the parts of every step while `stack` is open."""
    watch = Watch()
    stack.enter_context(mock.patch.object(model, "engine", Engine(model.engine, watch)))
    for name, owner, method in (("accept", Continuation, "accept"), ("text", Continuation, "_text_of")):
        stack.enter_context(mock.patch.object(owner, method, watch.timed(name, getattr(owner, method))))
    return watch


def decode(model: gemma4.Model, kind: dict[str, Any], n_rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds per row and step by part: of each, the smallest mean of a round."""
    options = Options(max_tokens=1 + args.steps * (1 + args.repeats), seed=1, stop_ids=[], **kind)
    best: dict[str, float] = {}
    with ExitStack() as stack:
        watch = watched(stack, model)
        batch = stack.enter_context(Batch(model))
        for i in range(n_rows):
            batch.join([2, *range(1000 + i, 1000 + i + args.prompt)], options)
        batch.step()
        for _ in range(args.repeats):
            watch.seconds.clear()
            with model.profile() as profile:
                start = thread_time()
                for _ in range(args.steps):
                    batch.step()
                whole = thread_time() - start
            for part, seconds in parts(watch.seconds, whole, profile).items():
                best[part] = min(1e3 * seconds / args.steps / n_rows, best.get(part, float("inf")))
    return best


def parts(seconds: dict[str, float], whole: float, profile: Any) -> dict[str, float]:
    outside = whole - seconds["engine"]
    other = next(op.seconds for op in profile.ops if op.name == "other")
    return {
        "sampling": seconds["accept"] - seconds["text"],
        "text": seconds["text"],
        "bookkeeping": outside - seconds["accept"],
        "all": outside,
        "hand-over": other,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="where the checkpoint is written")
    parser.add_argument("--rows", default="1,4,16,64", help="numbers of prompts side by side")
    parser.add_argument("--kinds", default="", metavar="WORD", help="only kinds whose name contains this")
    parser.add_argument("--prompt", type=int, default=500, metavar="N", help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with gemma4.load(checkpoint(args.model), threads=args.threads) as model:
        print(f"{'ms per row and step':24}{'rows':>5}" + "".join(f"{part:>13}" for part in PARTS))
        for name, kind in KINDS.items():
            for n_rows in [int(n) for n in args.rows.split(",")] if args.kinds in name else []:
                times = decode(model, kind, n_rows, args)
                found.append({"kind": name, "rows": n_rows} | times)
                print(f"{name:24}{n_rows:5}" + "".join(f"{times[part]:13.3f}" for part in PARTS), flush=True)
    if args.json:
        args.json.write_text(json.dumps(machine.record() | {"row_cost": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
