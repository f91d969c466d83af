# SPDX-License-Identifier: Apache-2.0
"""Measure one tool for interpretability on one checkpoint, in a process of its own; the last line printed is JSON.

    python benchmarks/interp_worker.py gemma4 --model DIR --tasks call,capture,memory,grid,steer

Each tool is a small class with the same verbs, so that the loops that take the times are the same for all. The tools
other than this package run transformers in bfloat16, the checkpoint's own type. Token ids are random.
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
from worker import memory

Ids = NDArray[np.int32]
GRID_TOKENS, CALL_TOKENS, RIGHT, WRONG = 20, 8, 5, 6


class Tool(Protocol):
    """What the tasks need of a tool."""

    n_layers: int
    d_model: int

    def forward(self, ids: Ids) -> None:
        """Logits of every position."""
        ...

    def capture(self, ids: Ids) -> int:
        """The residual stream after every layer, as arrays or tensors; returns how many. No head where that can be."""
        ...

    def capture_last(self, ids: Ids) -> None:
        """The same forward pass, keeping the last layer alone."""
        ...

    def grid(self, clean: Ids, corrupt: Ids, cells: list[tuple[int, int]]) -> list[float]:
        """Activation patching: for each cell (layer, position) the difference of two logits at the last position."""
        ...

    def decode(self, ids: Ids, n: int, direction: NDArray[np.float32] | None) -> float:
        """Seconds per token of greedy decoding after a prompt, with `direction` added after the middle layer."""
        ...


class Gemma4:
    """This package, in bfloat16 weights and float32 arithmetic."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        import gemma4

        self.model = gemma4.load(path, threads=threads)
        self.n_layers, self.d_model = self.model.n_layers, self.model.config.d_model

    def forward(self, ids: Ids) -> None:
        self.model.forward(ids)

    def capture(self, ids: Ids) -> int:
        return len(self.model.run_with_cache(ids, "blocks.*.hook_resid_post", logits=None)[1])

    def capture_last(self, ids: Ids) -> None:
        self.model.run_with_cache(ids, f"blocks.{self.n_layers - 1}.hook_resid_post", logits=None)

    def grid(self, clean: Ids, corrupt: Ids, cells: list[tuple[int, int]]) -> list[float]:
        from gemma4.interp import patching_grid

        layers, positions = (sorted(set(numbers)) for numbers in zip(*cells, strict=True))
        grid = patching_grid(self.model, clean, corrupt, (RIGHT, WRONG), layers=layers, positions=positions)
        return [float(grid.values[layers.index(i), positions.index(p)]) for i, p in cells]

    def decode(self, ids: Ids, n: int, direction: NDArray[np.float32] | None) -> float:
        from gemma4.edits import Steer

        hooks = [] if direction is None else [Steer(direction, self.n_layers // 2)]
        result = self.model.generate(ids, max_tokens=n, temperature=0, stop_ids=[], hooks=hooks)
        return result.timings.decode_s / (len(result.tokens) - 1)


class Transformers:
    """transformers with hooks on its layers."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.layers = self.model.model.layers
        self.n_layers, self.d_model = len(self.layers), self.model.config.hidden_size

    def tokens(self, ids: Ids) -> Any:
        return self.torch.from_numpy(ids.astype(np.int64))[None]

    def last(self, ids: Ids) -> Any:
        """logits_to_keep of the last position. As an integer it would drop the others from layers that share keys."""
        return self.torch.tensor([len(ids) - 1])

    def forward(self, ids: Ids) -> None:
        self.model(input_ids=self.tokens(ids), use_cache=False)

    def _kept(self, ids: Ids, layers: list[int]) -> dict[int, Any]:
        kept: dict[int, Any] = {}

        def keep(i: int) -> Callable[..., None]:
            return lambda module, args, output: kept.__setitem__(i, output)

        handles = [self.layers[i].register_forward_hook(keep(i)) for i in layers]
        self.model.model(input_ids=self.tokens(ids), use_cache=False)
        for handle in handles:
            handle.remove()
        return kept

    def capture(self, ids: Ids) -> int:
        return len(self._kept(ids, list(range(self.n_layers))))

    def capture_last(self, ids: Ids) -> None:
        self._kept(ids, [self.n_layers - 1])

    def grid(self, clean: Ids, corrupt: Ids, cells: list[tuple[int, int]]) -> list[float]:
        """Of the stream that enters a layer: of the first it is the embeddings'."""
        entering: dict[int, Any] = {}

        def keep(i: int) -> Callable[..., None]:
            return lambda module, args: entering.__setitem__(i, args[0])

        handles = [layer.register_forward_pre_hook(keep(i)) for i, layer in enumerate(self.layers)]
        self.model.model(input_ids=self.tokens(clean), use_cache=False)
        for handle in handles:
            handle.remove()
        return [self._patched(corrupt, layer, position, entering[layer]) for layer, position in cells]

    def _patched(self, ids: Ids, layer: int, position: int, clean: Any) -> float:
        def patch(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            x[:, position] = clean[:, position]
            return x, *args[1:]

        handle = self.layers[layer].register_forward_pre_hook(patch)
        logits = self.model(input_ids=self.tokens(ids), use_cache=False, logits_to_keep=self.last(ids)).logits[0, -1]
        handle.remove()
        return float(logits[RIGHT] - logits[WRONG])

    def decode(self, ids: Ids, n: int, direction: NDArray[np.float32] | None) -> float:
        handle = None
        if direction is not None:
            v = self.torch.from_numpy(direction).to(self.model.dtype)
            handle = self.layers[self.n_layers // 2].register_forward_hook(lambda module, args, output: output + v)
        out = self.model(input_ids=self.tokens(ids), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(n - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        seconds = (time.perf_counter() - start) / (n - 1)
        if handle:
            handle.remove()
        return seconds


class NNsight(Transformers):
    """nnsight around the same model."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        super().__init__(path, threads, dtype)
        import nnsight

        self.nnsight, self.wrapped = nnsight, nnsight.NNsight(self.model)

    def forward(self, ids: Ids) -> None:
        with self.wrapped.trace(self.tokens(ids), use_cache=False):
            self.nnsight.save(self.wrapped.lm_head.output)

    def _kept(self, ids: Ids, layers: list[int]) -> dict[int, Any]:
        with self.wrapped.trace(self.tokens(ids), use_cache=False, logits_to_keep=self.last(ids)):
            kept = self.nnsight.save([self.wrapped.model.layers[i].output for i in layers])
        return dict(zip(layers, kept, strict=True))

    def grid(self, clean: Ids, corrupt: Ids, cells: list[tuple[int, int]]) -> list[float]:
        raise NotImplementedError("measured for TransformerLens and hooks")

    def decode(self, ids: Ids, n: int, direction: NDArray[np.float32] | None) -> float:
        raise NotImplementedError("measured for hooks")


class TransformerLens:
    """TransformerLens' bridge around a model of transformers."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        import torch
        from transformer_lens.model_bridge import TransformerBridge

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = TransformerBridge.boot_transformers(str(path), device="cpu", dtype=getattr(torch, dtype))
        self.n_layers, self.d_model = self.model.cfg.n_layers, self.model.cfg.d_model

    def tokens(self, ids: Ids) -> Any:
        return self.torch.from_numpy(ids.astype(np.int64))[None]

    def forward(self, ids: Ids) -> None:
        self.model(self.tokens(ids))

    def capture(self, ids: Ids) -> int:
        ends = tuple(f"blocks.{i}.hook_resid_post" for i in range(self.n_layers))
        return len(self.model.run_with_cache(self.tokens(ids), names_filter=lambda name: name in ends)[1].cache_dict)

    def capture_last(self, ids: Ids) -> None:
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        self.model.run_with_cache(self.tokens(ids), names_filter=lambda name: name == last)

    def grid(self, clean: Ids, corrupt: Ids, cells: list[tuple[int, int]]) -> list[float]:
        names = {f"blocks.{layer}.hook_resid_pre" for layer, _ in cells}
        cache = self.model.run_with_cache(self.tokens(clean), names_filter=lambda name: name in names)[1]
        return [self._patched(corrupt, f"blocks.{layer}.hook_resid_pre", position, cache) for layer, position in cells]

    def _patched(self, ids: Ids, name: str, position: int, cache: Any) -> float:
        def patch(x: Any, hook: Any) -> Any:
            x = x.clone()
            x[:, position] = cache[name][:, position]
            return x

        logits = self.model.run_with_hooks(self.tokens(ids), fwd_hooks=[(name, patch)])[0, -1].float()
        return float(logits[RIGHT] - logits[WRONG])

    def decode(self, ids: Ids, n: int, direction: NDArray[np.float32] | None) -> float:
        raise NotImplementedError("measured for hooks")


TOOLS: dict[str, Callable[[Path, int, str], Tool]] = {
    "gemma4": Gemma4,
    "hooks": Transformers,
    "nnsight": NNsight,
    "transformer_lens": TransformerLens,
}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Samples of each task. The first call of each warms up, and does not count."""
    tool = TOOLS[args.tool](args.model, args.threads, args.dtype)
    random = np.random.default_rng(args.seed)
    ids = random.integers(16, args.vocab, args.tokens).astype(np.int32)
    tasks = {"call": call, "capture": capture, "memory": peak, "grid": grid, "steer": steer}
    result: dict[str, Any] = {}
    for name in args.tasks.split(","):
        try:
            result |= tasks[name](tool, ids, args)
        except NotImplementedError:
            continue
    return result


def call(tool: Tool, ids: Ids, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a call on a few tokens that captures every layer: of a model without arithmetic to speak of, what a
    call costs besides."""
    few = ids[:CALL_TOKENS]
    tool.capture(few)
    return {"call_s": [timed(lambda: tool.capture(few)) for _ in range(5 * args.repeats)]}


def capture(tool: Tool, ids: Ids, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a capture of every layer, and what it adds to that of the last alone, the two taking turns."""
    n_layers = tool.capture(ids)
    if n_layers != tool.n_layers:
        raise SystemExit(f"{args.tool} captured {n_layers} of {tool.n_layers} layers")
    tool.capture_last(ids)
    result: dict[str, list[float]] = {"capture_s": [], "capture_cost": []}
    for _ in range(args.repeats):
        alone = timed(lambda: tool.capture_last(ids))
        result["capture_s"].append(timed(lambda: tool.capture(ids)))
        result["capture_cost"].append(result["capture_s"][-1] / alone - 1)
    return result


def peak(tool: Tool, ids: Ids, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the peak resident set after a forward pass and a capture; it includes the weights, mapped or not."""
    tool.forward(ids)
    tool.capture(ids)
    return {"peak_rss": memory()["VmHWM"]}


def grid(tool: Tool, ids: Ids, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a patching grid of every layer and position. A tool that runs the cells one by one runs a sample of
    them, evenly spread, and its time is scaled up."""
    clean, corrupt = ids[:GRID_TOKENS], ids[:GRID_TOKENS].copy()
    corrupt[3] = ids[GRID_TOKENS]
    cells = [(layer, position) for layer in range(tool.n_layers) for position in range(GRID_TOKENS)]
    some = cells if args.tool == "gemma4" else cells[:: max(1, len(cells) // args.grid_sample)]
    tool.grid(clean, corrupt, some[:1])
    values: list[float] = []
    seconds = timed(lambda: values.extend(tool.grid(clean, corrupt, some)))
    return {"grid_s": [seconds * len(cells) / len(some)], "grid_values": values, "grid_cells": some}


def steer(tool: Tool, ids: Ids, args: argparse.Namespace) -> dict[str, Any]:
    """What steering adds to a decoded token, as a share; the runs with and without take turns."""
    direction = np.random.default_rng(0).standard_normal(tool.d_model).astype(np.float32)
    tool.decode(ids[:16], 4, direction)
    costs, seconds = list[float](), list[float]()
    for _ in range(args.repeats):
        plain = tool.decode(ids[:16], args.decode, None)
        seconds.append(tool.decode(ids[:16], args.decode, direction))
        costs.append(seconds[-1] / plain - 1)
    return {"steer_s": seconds, "steer_cost": costs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", default="call,capture,memory,grid,steer")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grid-sample", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16", help="of the tools that run transformers")
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    json.dump(measure(parser.parse_args()), sys.stdout)


if __name__ == "__main__":
    main()
