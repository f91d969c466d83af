# SPDX-License-Identifier: Apache-2.0
"""Measure one Python engine on one checkpoint, in a process of its own; the last line printed is JSON.

    python benchmarks/worker.py gemma4 --model DIR --threads 2 --prompt 512 --decode 32 --capture 256

Each engine is a small class with the same four verbs, so that the loop that takes the times is the same for all.
Times are in seconds. Token ids are random: what is measured does not depend on them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from peers import BATCH_PROMPT

Ids = NDArray[np.int32]


class Engine(Protocol):
    n_ids: int  # of the vocabulary

    def prefill(self, ids: Ids) -> None:
        """Run a prompt from nothing and keep its cache; logits of the last position."""
        ...

    def decode(self, token: int) -> None:
        """One more token after what was run so far; its logits."""
        ...

    def capture(self, ids: Ids, layer: int | None = None) -> int:
        """The residual stream after every layer (or one) at every position, as arrays; returns how many layers."""
        ...

    def decode_batch(self, tokens: Ids) -> None:
        """One more token for each of several sequences, all in one pass; the first call runs their prompts."""
        ...

    def forget(self) -> None:
        """Drop the cache."""
        ...


class Gemma4Engine:
    """This package."""

    def __init__(self, model: Path, threads: int, precision: str) -> None:
        import gemma4

        self.model = gemma4.load(model, threads=threads, precision=precision)  # type: ignore[arg-type]
        self.n_ids = self.model.n_token_ids
        self.sequence: Any = None
        self.batch: list[Any] = []

    def prefill(self, ids: Ids) -> None:
        self.sequence = self.model.new_sequence()
        self.model.forward(ids, sequence=self.sequence, logits="last")

    def decode(self, token: int) -> None:
        self.model.forward(np.array([token], np.int32), sequence=self.sequence, logits="last")

    def capture(self, ids: Ids, layer: int | None = None) -> int:
        names = f"blocks.{'*' if layer is None else layer}.hook_resid_post"
        _, cache = self.model.run_with_cache(ids, names=names, logits=None)
        return len([np.asarray(cache[name]) for name in cache])

    def decode_batch(self, tokens: Ids) -> None:
        if not self.batch:
            self.batch = [self.model.new_sequence() for _ in range(len(tokens))]
        rows = tokens if tokens.ndim == 2 else tokens[:, None]
        self.model.forward(list(rows), sequence=self.batch, logits="last")

    def forget(self) -> None:
        self.sequence, self.batch = None, []


class TransformersEngine:
    """The reference implementation in bfloat16, with its default attention."""

    def __init__(self, model: Path, threads: int, precision: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = transformers.AutoConfig.from_pretrained(model)
        name = (config.architectures or ["Gemma4ForConditionalGeneration"])[0]
        kind = getattr(transformers, name)
        self.torch = torch
        self.model = kind.from_pretrained(model, dtype=getattr(torch, precision)).eval()
        self.n_ids = config.get_text_config().vocab_size
        self.past: Any = None

    def _run(self, ids: Ids) -> None:
        tokens = self.torch.from_numpy(ids.astype(np.int64))[None]
        out = self.model(input_ids=tokens, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values

    def prefill(self, ids: Ids) -> None:
        self.past = None
        self._run(ids)

    def decode(self, token: int) -> None:
        self._run(np.array([token], np.int32))

    def decode_batch(self, tokens: Ids) -> None:
        raise NotImplementedError("not measured for transformers")

    def capture(self, ids: Ids, layer: int | None = None) -> int:
        tokens = self.torch.from_numpy(ids.astype(np.int64))[None]
        out = self.model.model(input_ids=tokens, output_hidden_states=True, use_cache=False)  # no head
        return len(out.hidden_states) - 1  # the first is the embedding

    def forget(self) -> None:
        self.past = None


ENGINES: dict[str, Callable[[Path, int, str], Engine]] = {"gemma4": Gemma4Engine, "transformers": TransformersEngine}


def random_ids(engine: Engine, random: np.random.Generator, *shape: int) -> Ids:
    """int32 of that shape, from the middle of the vocabulary."""
    return random.integers(engine.n_ids // 8, engine.n_ids * 3 // 4, shape).astype(np.int32)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory() -> dict[str, int]:
    """Bytes from /proc/self/status: peak resident set, and the part of the present one that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}


def in_huge_pages() -> int:
    """Bytes of mapped files that lie in huge pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("FilePmdMapped:"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All times of one round. The first prompt and the first token warm up (page faults, caches) and do not count."""
    random = np.random.default_rng(args.seed)
    engines: list[Engine] = []
    make = ENGINES[args.engine]
    result: dict[str, Any] = {"load_s": timed(lambda: engines.append(make(args.model, args.threads, args.precision)))}
    engine = engines[0]
    ids = random_ids(engine, random, args.prompt)
    tokens = random_ids(engine, random, args.decode + 1).tolist()
    result["first_prefill_s"] = timed(lambda: engine.prefill(ids))
    result["prefill_s"] = [timed(lambda: engine.prefill(ids)) for _ in range(args.repeats)]
    result["first_decode_s"] = timed(lambda: engine.decode(tokens[-1]))
    result["decode_s"] = [timed(lambda token=token: engine.decode(token)) for token in tokens[:-1]]
    result |= {"memory": memory(), "idle_cpu": idle_cpu(), "huge": in_huge_pages()}
    engine.forget()
    if args.context:
        result["deep_decode_s"] = deep_decode(engine, args, random)
    if args.sequences and args.engine == "gemma4":
        result["batch_decode_s"] = batch_decode(engine, args, random)
    if args.capture:
        result |= capture(engine, ids[: args.capture], args)
    return result


def idle_cpu() -> float:
    """Share of a core that this process uses in a second of doing nothing, its threads loaded and warm."""
    before = time.process_time()
    time.sleep(1)
    return time.process_time() - before


def deep_decode(engine: Engine, args: argparse.Namespace, random: np.random.Generator) -> list[float]:
    """Seconds of each token after `context` positions."""
    engine.prefill(random_ids(engine, random, args.context))
    tokens = random_ids(engine, random, args.decode + 1).tolist()
    engine.decode(tokens[-1])
    seconds = [timed(lambda token=token: engine.decode(token)) for token in tokens[:-1]]
    engine.forget()
    return seconds


def batch_decode(engine: Engine, args: argparse.Namespace, random: np.random.Generator) -> list[float]:
    """Seconds of each step of `sequences` tokens, after a short prompt of each sequence."""
    n = args.sequences
    engine.decode_batch(random_ids(engine, random, n, BATCH_PROMPT))
    steps = random_ids(engine, random, args.decode + 1, n)
    engine.decode_batch(steps[-1])
    seconds = [timed(lambda tokens=tokens: engine.decode_batch(tokens)) for tokens in steps[:-1]]
    engine.forget()
    return seconds


def capture(engine: Engine, ids: Ids, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of capturing every layer; of ours also what that adds to capturing the last layer alone, which makes the
    same forward pass run (every position through every layer, no head), the two taking turns."""
    engine.capture(ids)
    n_layers = engine.capture(ids[:2])
    result: dict[str, Any] = {"capture_layers": n_layers, "capture_s": [], "capture_cost": []}
    for _ in range(args.repeats):
        if args.engine == "gemma4":
            alone = timed(lambda: engine.capture(ids, n_layers - 1))
        result["capture_s"].append(timed(lambda: engine.capture(ids)))
        if args.engine == "gemma4":
            result["capture_cost"].append(result["capture_s"][-1] / alone - 1)
    return result | {"memory_with_capture": memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--precision", required=True, help="gemma4: exact, fast; transformers: bfloat16, float32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--capture", type=int, default=256, help="prompt length for the capture, 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=0, help="also decode after so many tokens, 0: no")
    parser.add_argument("--sequences", type=int, default=0, help="also decode so many sequences together, 0: no")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(measure(parser.parse_args())))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
