# SPDX-License-Identifier: Apache-2.0
"""Train `tiny-e` or `tiny-moe` with transformers' own Gemma4ForConditionalGeneration.

    python -m train_tiny.train --name tiny-e --tokenizer DIR --out RUN --steps 2500

The data of a step depends on (seed, step) alone and RUN/checkpoint.pt holds everything else, so the same command goes
on where it was stopped. RUN/log.jsonl gets a line every few steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from . import mixture
from .models import build
from .muon import Muon, split_parameters

BALANCE = 0.01  # weight of the expert load-balancing loss


def learning_rate(step: int, steps: int, warmup: int = 60) -> float:
    """Share of the peak rate: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def watch_routers(model: nn.Module) -> list[Tensor]:
    """Collect each router's load-balancing loss (Switch Transformer's: E·Σ share·probability) as the model runs."""
    losses: list[Tensor] = []

    def hook(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        probabilities, _, chosen = output
        experts = probabilities.shape[-1]
        share = torch.bincount(chosen.flatten(), minlength=experts).to(probabilities) / chosen.numel()
        losses.append(experts * (share * probabilities.mean(0)).sum())

    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(hook)
    return losses


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of the next token over [batch, length], each target with its weight."""
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


class Trainer:
    """Model, optimisers and the step they have reached."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
        self.device = torch.device(arguments.device)
        self.model = build(arguments.name, self.tokenizer.get_vocab_size(), arguments.seed)
        nn.Module.to(self.model, self.device)
        self.balance = watch_routers(self.model)
        self.forward = torch.compile(self.model, dynamic=False) if arguments.compile else self.model
        matrices, rest = split_parameters(self.model)
        adam = torch.optim.AdamW(rest, lr=arguments.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimizers = [(Muon(matrices, lr=arguments.lr), arguments.lr), (adam, arguments.adam_lr)]
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        return self.arguments.out / "checkpoint.pt"

    def save(self) -> None:
        """Write to a second name first: a stop in the middle must not cost the last good checkpoint."""
        partial = self.checkpoint.with_suffix(".partial")
        optimizers = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "step": self.step}, partial)
        os.replace(partial, self.checkpoint)

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def train_step(self) -> float:
        """One step; returns the loss."""
        ids, weights = mixture.batch(self.tokenizer, self.arguments.seed, self.step, self.arguments.tokens)
        ids_t, weights_t = torch.from_numpy(ids).long().to(self.device), torch.from_numpy(weights).to(self.device)
        share = learning_rate(self.step, self.arguments.steps)
        self.balance.clear()
        logits = self.forward(input_ids=ids_t, use_cache=False).logits
        loss = weighted_loss(logits, ids_t, weights_t)
        total = loss + BALANCE * torch.stack(self.balance).mean() if self.balance else loss
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def run(self) -> None:
        log = (self.arguments.out / "log.jsonl").open("a", encoding="utf-8")
        start, done, losses = time.time(), self.step, []
        until = self.arguments.until or self.arguments.steps
        while self.step < until:
            losses.append(self.train_step())
            if self.step % 10 == 0:
                speed = (self.step - done) * self.arguments.tokens / (time.time() - start)
                line = {"step": self.step, "loss": round(sum(losses) / len(losses), 4), "tokens_per_s": round(speed)}
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), flush=True)
                losses = []
            if self.step % self.arguments.save_every == 0 or self.step == until:
                self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Gemma 4.")
    parser.add_argument("--name", choices=("tiny-e", "tiny-moe"), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="length of the schedule")
    parser.add_argument("--until", type=int, default=0, help="stop at this step of the schedule")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak rate of Muon")
    parser.add_argument("--adam-lr", type=float, default=4e-3, help="peak rate of AdamW (embeddings, gains, routers)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.5 times as fast for tiny-e on a CPU")
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
