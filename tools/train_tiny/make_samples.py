# SPDX-License-Identifier: Apache-2.0
"""The pictures, clips and recordings in gemma4/media/samples: the first held-out ones of a seed, not a choice of them.

    python -m train_tiny.make_samples --out ../gemma4/media/samples [--seed 7] [--count 2]

The seed differs from that of the scores in the model card (1), so these are examples of the same kind, not the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from . import speech
from .skills_media import SKILLS, Conversation, held_out


def save(conversation: Conversation, skill: str, name: str, out: Path) -> dict[str, Any]:
    """Write the media; returns the sample's entry."""
    _, question, answer = conversation.turns[0]
    entry: dict[str, Any] = {"skill": skill, "question": question, "answer": answer}
    if conversation.said is not None:
        samples = speech.say(conversation.said).samples
        soundfile.write(out / f"{name}.flac", np.clip(samples, -1, 1), speech.RATE, subtype="PCM_16")
        return {**entry, "kind": "audio", "files": [f"{name}.flac"]}
    images = conversation.images
    names = [f"{name}.png"] if len(images) == 1 else [f"{name}-{i}.png" for i in range(len(images))]
    for file, image in zip(names, images, strict=True):
        image.save(out / file, optimize=True)
    entry |= {"kind": "image" if conversation.picture else "video", "files": names}
    return entry | ({"box": list(conversation.wanted)} if conversation.wanted else {})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the samples that come with the package.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, default=2, help="of each skill; one of each kind of recording")
    arguments = parser.parse_args()
    entries = []
    for skill in SKILLS:
        count = 1 if skill.startswith("speech_") else arguments.count
        for i, conversation in enumerate(held_out(skill, count, arguments.seed)):
            entries.append(save(conversation, skill, f"{skill}-{i}", arguments.out))
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    (arguments.out / "samples.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
