# SPDX-License-Identifier: Apache-2.0
"""Pictures, clips and recordings as the trained towers encode them, kept on disk: what train_media draws from.

    python -m train_tiny.pool --model ../gemma4/pretrained/tiny-e --out RUN --kind shapes --count 6000

A tower costs ten times what the text model costs on the same soft tokens; encoded once, thousands of questions can be
asked about them. RUN/pool/KIND-SEED.npz holds the soft tokens; what they show follows from (kind, seed, number) alone.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Gemma4ForConditionalGeneration

from . import pictures, scenes, skills_media, sounds, speech
from .scenes import Scene
from .speech import Said
from .stages import load
from .towers import build
from .video import Clip

KINDS = ("shapes", "writing", "numbers", "clips", "speech", "digits")
_GENERATORS = {"shapes": scenes.shape_scene, "writing": scenes.text_scene, "numbers": scenes.number_scene}
# Soft tokens of a picture: Gemma 4's smallest budget, its next, one that trains in a third.
REAL_BUDGET, LARGE_BUDGET, SMALL_BUDGET = 70, 140, 25


@dataclass(frozen=True)
class Item:
    """A source and its soft tokens: one array [tokens, hidden] for a picture or recording, one per frame of a clip."""

    source: Scene | Clip | Said
    soft: tuple[NDArray[np.float16], ...]

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.soft]


def source(kind: str, seed: int, number: int, small: float = 0.0) -> tuple[Scene | Clip | Said, int]:
    """(what is shown or said, budget of soft tokens), from the training side of the split.

    small   share of pictures at the small budget; one in twenty has the large one
    """
    rng = random.Random(f"pool/{kind}/{seed}/{number}")
    draw = rng.random()
    budget = LARGE_BUDGET if draw > 0.95 else REAL_BUDGET
    if draw < small and kind not in ("writing", "numbers"):  # letters need their pixels
        budget = SMALL_BUDGET
    if kind in ("speech", "digits"):
        return speech.sample(rng, held_out=False, skill="digits" if kind == "digits" else None), 0
    if kind == "clips":
        clip = skills_media.video_conversation(rng, held_out=False).clip
        assert clip is not None
        return clip, budget
    while True:
        scene = scenes.sample(_GENERATORS[kind], rng, held_out=False)
        if scene.things:
            return scene, budget


@torch.no_grad()
def encode(model: Gemma4ForConditionalGeneration, shown: Scene | Clip | Said, budget: int = REAL_BUDGET) -> Item:
    """Draw or say it and run the tower."""
    base = model.model
    if isinstance(shown, Said):
        out = base.audio_tower(*sounds.stack([sounds.mel(speech.say(shown).samples)]))
        return Item(shown, (base.embed_audio(out.last_hidden_state[out.attention_mask]).half().numpy(),))
    frames = [shown] if isinstance(shown, Scene) else list(shown.frames)
    cut = [pictures.patches(scenes.draw(frame), budget) for frame in frames]
    pixels, positions = pictures.stack(cut)
    soft = base.embed_vision(base.vision_tower(pixels, positions).last_hidden_state)
    return Item(shown, tuple(part.half().numpy() for part in soft.split([p.tokens for p in cut])))


def load_towers(model: Gemma4ForConditionalGeneration, run: Path) -> None:
    """The towers of a training run, as its first two stages left them."""
    base = model.model
    load(run / "sight.pt", {"tower": base.vision_tower, "embed": base.embed_vision})
    load(run / "hearing.pt", {"tower": base.audio_tower, "embed": base.embed_audio})


def path(run: Path, kind: str, seed: int) -> Path:
    return run / "pool" / f"{kind}-{seed}.npz"


def make(model: Gemma4ForConditionalGeneration, run: Path, kind: str, count: int, seed: int, small: float) -> None:
    """Encode `count` items and store them."""
    items = []
    for number in range(count):
        items.append(encode(model, *source(kind, seed, number, small)))
        if (number + 1) % 500 == 0:
            print(f"{kind}: {number + 1}", flush=True)
    target = path(run, kind, seed)
    target.parent.mkdir(exist_ok=True)
    parts = [part for item in items for part in item.soft]
    shape = {"soft": np.concatenate(parts), "lengths": np.array([len(part) for part in parts])}
    with target.with_suffix(".partial").open("wb") as file:
        np.savez(file, **shape, parts=np.array([len(item.soft) for item in items]), small=np.array(small))
    target.with_suffix(".partial").replace(target)


def stored(run: Path, kind: str) -> list[Item]:
    """All items of a kind, of every seed. ValueError if there are none."""
    found = []
    for file in sorted((run / "pool").glob(f"{kind}-*.npz")):
        seed = int(file.stem.removeprefix(f"{kind}-"))
        data = np.load(file)
        soft = np.split(data["soft"], np.cumsum(data["lengths"])[:-1])
        ends = np.cumsum(data["parts"])
        for number, end in enumerate(ends):
            shown, _ = source(kind, seed, number, float(data["small"]))
            found.append(Item(shown, tuple(soft[end - data["parts"][number] : end])))
    if not found:
        raise ValueError(f"{run / 'pool'} has no {kind}: run train_tiny.pool first")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode pictures, clips and recordings for train_media.")
    parser.add_argument("--model", type=Path, required=True, help="the text model's directory")
    parser.add_argument("--out", type=Path, required=True, help="training folder (sight.pt, hearing.pt)")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--count", type=int, default=4000, help="of each kind")
    parser.add_argument("--small", type=float, default=0.2, help="share of pictures of 25 soft tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments.model, 0).eval()
    load_towers(model, arguments.out)
    for kind in arguments.kind:
        make(model, arguments.out, kind, arguments.count, arguments.seed, arguments.small)


if __name__ == "__main__":
    main()
