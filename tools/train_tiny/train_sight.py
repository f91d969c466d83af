# SPDX-License-Identifier: Apache-2.0
"""First stage of the vision tower: alone, from hints about every patch and soft token (hints.py).

    python -m train_tiny.train_sight --model ../gemma4/pretrained/tiny-e --out RUN --steps 3000

As in train.py, a step's data depends on (seed, step) alone and RUN/sight.pt holds the rest, also after SIGTERM.
"""

from __future__ import annotations

import argparse
import random

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import pictures, scenes
from .hints import COLOUR_CLASSES, KIND_CLASSES, SightHints, targets
from .stages import Stage, add_arguments, embeddings, optimizers_for, parse
from .towers import build, tower_parameters

# Budgets of soft tokens; the first half of the steps uses small ones.
SMALL, REAL = (20, 30), (70, 70, 70, 70, 70, 70, 140, 140, 280)
WEIGHTS = {"patch_character": 3.0, "word": 2.0, "digits": 2.0}  # of the hints' losses; letters are the hardest
PATCHES_A_STEP = 8 * 24 * 24


def budget(step: int, steps: int) -> int:
    """Small pictures first, real ones more and more often."""
    rng = random.Random(step)
    real = step >= 0.45 * steps and (step % 4 != 0 or step >= 0.8 * steps)
    return rng.choice(REAL if real else SMALL)


def batch(seed: int, step: int, steps: int) -> tuple[list[scenes.Scene], list[pictures.Patches]]:
    rng = random.Random(f"sight/{seed}/{step}")
    tokens = budget(step, steps)
    found = []
    for i in range(max(2, PATCHES_A_STEP // (tokens * 9))):
        kind = (scenes.shape_scene, scenes.text_scene, scenes.shape_scene, scenes.page_scene)[i % 4]
        if step > 0.4 * steps and i % 4 == 3:
            kind = scenes.text_scene
        found.append(scenes.sample(kind, rng, held_out=False))
    return found, [pictures.patches(scenes.draw(scene), tokens) for scene in found]


class Trainer:
    """The model, its vision tower under training, and the heads that teach it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seed = arguments.seed
        model = build(arguments.model, arguments.seed)
        tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        table = model.get_input_embeddings().weight.detach()
        names = (embeddings(tokenizer, table, n) for n in (scenes.WRITTEN, KIND_CLASSES, COLOUR_CLASSES))
        self.tower, self.embed = model.model.vision_tower, model.model.embed_vision
        self.hints = SightHints(model.config.vision_config.hidden_size, table.shape[1], *names)
        self.features: Tensor | None = None
        self.tower.encoder.register_forward_hook(self._keep)
        parameters = [p for _, p in tower_parameters(model, "vision")]
        optimizers = optimizers_for(parameters, self.hints.parameters(), arguments.lr, arguments.adam_lr)
        modules = {"tower": self.tower, "embed": self.embed, "hints": self.hints}
        self.stage = Stage(arguments.out / "sight.pt", modules, optimizers, arguments.steps)

    def _keep(self, module: nn.Module, inputs: object, output: BaseModelOutputWithPast) -> None:
        self.features = output.last_hidden_state

    def train_step(self) -> dict[str, float]:
        """One step; the loss and the share right of each hint."""
        found, cut = batch(self.seed, self.stage.step, self.stage.steps)
        pixels, positions = pictures.stack(cut)
        soft = self.embed(self.tower(pixels, positions).last_hidden_state)
        assert self.features is not None
        features = self.features[positions[..., 0] >= 0]
        wanted = [targets(scene, p.columns, p.rows) for scene, p in zip(found, cut, strict=True)]
        results = self.hints(features, soft, wanted)
        loss = torch.stack([loss * WEIGHTS.get(name, 1.0) for name, (loss, _) in results.items()]).sum()
        self.stage.update(loss)
        return {"loss": loss.item()} | {name: right.item() for name, (_, right) in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the vision tower what is where.")
    add_arguments(parser, steps=3000)
    trainer = Trainer(parse(parser))
    trainer.stage.run(trainer.train_step)


if __name__ == "__main__":
    main()
