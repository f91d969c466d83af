# SPDX-License-Identifier: Apache-2.0
"""First stage of the audio tower: alone, from hints about every soft token (hints.py).

    python -m train_tiny.train_hearing --model ../gemma4/pretrained/tiny-e --out RUN --steps 2000

As in train.py, a step's data depends on (seed, step) alone and RUN/hearing.pt holds the rest.
"""

from __future__ import annotations

import argparse
import random

import numpy as np
import torch
from tokenizers import Tokenizer

from . import sounds, speech
from .hints import HearingHints, sound_targets
from .stages import Stage, add_arguments, embeddings, optimizers_for, parse
from .towers import build, tower_parameters

RECORDINGS = 12  # a step


def written(word: str) -> str:
    """How a spoken word is transcribed."""
    if word in speech.DIGITS:
        return str(speech.DIGITS.index(word))
    return word.capitalize() if word.capitalize() in speech.CALLED else word


class Trainer:
    """The model, its audio tower under training, and the heads that teach it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seed = arguments.seed
        model = build(arguments.model, arguments.seed)
        tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        table = model.get_input_embeddings().weight.detach()
        self.tower, self.embed = model.model.audio_tower, model.model.embed_audio
        width = model.config.audio_config.output_proj_dims
        words = embeddings(tokenizer, table, [written(word) for word in speech.SPOKEN])
        self.hints = HearingHints(width, table.shape[1], words)
        parameters = [p for _, p in tower_parameters(model, "audio")]
        optimizers = optimizers_for(parameters, self.hints.parameters(), arguments.lr, arguments.adam_lr)
        modules = {"tower": self.tower, "embed": self.embed, "hints": self.hints}
        self.stage = Stage(arguments.out / "hearing.pt", modules, optimizers, arguments.steps)

    def train_step(self) -> dict[str, float]:
        """One step; the loss and the share right of each hint."""
        rng = random.Random(f"hearing/{self.seed}/{self.stage.step}")
        said = [speech.say(speech.sample(rng, held_out=False)) for _ in range(RECORDINGS)]
        features = [sounds.mel(sound.samples) for sound in said]
        goals = [sound_targets(sound, sounds.tokens(len(f))) for sound, f in zip(said, features, strict=True)]
        out = self.tower(*sounds.stack(features))
        hidden = out.last_hidden_state[out.attention_mask]
        heard, word = (torch.from_numpy(np.concatenate(part)) for part in zip(*goals, strict=True))
        results = self.hints(hidden, self.embed(hidden), heard, word)
        loss = torch.stack([loss for loss, _ in results.values()]).sum()
        self.stage.update(loss)
        return {"loss": loss.item()} | {name: right.item() for name, (_, right) in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the audio tower which sounds and words it hears.")
    add_arguments(parser, steps=2000)
    trainer = Trainer(parse(parser))
    trainer.stage.run(trainer.train_step)


if __name__ == "__main__":
    main()
