# SPDX-License-Identifier: Apache-2.0
"""What the training stages of the towers share: arguments, checkpoints, the loop."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .muon import Muon
from .train import learning_rate

SAVE_SECONDS = 240
Optimizers = Sequence[tuple[torch.optim.Optimizer, float]]  # with its peak learning rate


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, lr: float = 4e-3) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the text model's directory")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints of all stages")
    parser.add_argument("--steps", type=int, default=steps, help="length of the schedule")
    parser.add_argument("--lr", type=float, default=lr, help="peak rate of Muon")
    parser.add_argument("--adam-lr", type=float, default=lr, help="peak rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; sets torch's threads."""
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def embeddings(tokenizer: Tokenizer, table: Tensor, names: Sequence[str]) -> Tensor:
    """[names, hidden]: the mean embedding of the tokens of each name after a space (of a digit: alone)."""
    texts = [name if name.isdigit() else " " + name for name in names]
    return torch.stack([table[tokenizer.encode(text, add_special_tokens=False).ids].mean(0) for text in texts])


def optimizers_for(
    parameters: Iterable[nn.Parameter], rest: Iterable[nn.Parameter], lr: float, adam_lr: float
) -> Optimizers:
    """Muon for the matrices among `parameters`, AdamW for what has another shape and for `rest`."""
    found = list(parameters)
    others = [p for p in found if p.ndim != 2] + list(rest)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [(Muon([p for p in found if p.ndim == 2], lr=lr), lr), (adam, adam_lr)]


def save(path: Path, modules: Mapping[str, nn.Module], optimizers: Optimizers, step: int) -> None:
    """To a second name first: a stop in the middle must not cost the last good checkpoint."""
    state = {name: module.state_dict() for name, module in modules.items()}
    state |= {"optimizers": [optimizer.state_dict() for optimizer, _ in optimizers], "step": step}
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def load(path: Path, modules: Mapping[str, nn.Module], optimizers: Optimizers = ()) -> int:
    """Go on from `path` if it is there; returns the step it was saved at."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    for (optimizer, _), saved in zip(optimizers, state["optimizers"] if optimizers else [], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


@dataclass
class Stage:
    """A stage of training: what it saves in `path`, how it steps. `run` goes on where the last one stopped."""

    path: Path
    modules: Mapping[str, nn.Module]
    optimizers: Optimizers
    steps: int
    warmup: int = 60

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.step = load(self.path, self.modules, self.optimizers)
        self.stopping = False

    def update(self, loss: Tensor) -> None:
        """One step of the optimisers, the gradient's norm held to 1."""
        loss.backward()
        nn.utils.clip_grad_norm_([p for module in self.modules.values() for p in module.parameters()], 1.0)
        share = learning_rate(self.step, self.steps, self.warmup)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1

    def stop(self, *_: object) -> None:
        self.stopping = True

    def run(self, train_step: Callable[[], dict[str, float]]) -> None:
        """Until the schedule's end or SIGTERM; a line of means every 20 steps, a checkpoint every few minutes."""
        signal.signal(signal.SIGTERM, self.stop)
        start = saved = time.time()
        done, seen = self.step, []
        while self.step < self.steps and not self.stopping:
            seen.append(train_step())
            if self.step % 20 == 0:
                names = sorted({name for one in seen for name in one})
                values = {name: [one[name] for one in seen if name in one] for name in names}
                mean = {name: round(sum(found) / len(found), 3) for name, found in values.items()}
                pace = round((time.time() - start) / (self.step - done), 2)
                print(json.dumps({"step": self.step, "s": pace} | mean), flush=True)
                seen = []
            if time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
        self.save()

    def save(self) -> None:
        save(self.path, self.modules, self.optimizers, self.step)
