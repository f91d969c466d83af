# SPDX-License-Identifier: Apache-2.0
"""A few pictures, clips and recordings with questions and correct answers, for trying the shipped models.

Drawn and spoken (espeak-ng's voices) by tools/train_tiny/make_samples.py. They are of the kinds that the shipped models
were trained on, and held back from their training; they are the first of a seed, not selected by results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4.media.medium import Kind

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Sample:
    """skill: the tested skill, as in the model card · kind: "image", "video" (its frames a second apart) or "audio"

    box: of the requested object, if any: top, left, bottom, right in thousandths of the picture, else ()
    """

    skill: str
    question: str
    answer: str
    kind: Kind
    files: tuple[Path, ...]
    box: tuple[int, ...] = ()

    @property
    def part(self) -> dict[str, object]:
        """The picture, clip or recording as a part of a message."""
        if self.kind == "video":
            return {"type": "video", "video": list(self.files), "fps": 1.0}
        return {"type": self.kind, self.kind: self.files[0]}

    @property
    def messages(self) -> list[dict[str, object]]:
        """The question as a chat: pictures before the text, sound after it, as the model cards advise."""
        parts = [self.part, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": parts[::-1] if self.kind == "audio" else parts}]


def samples(skill: str | None = None) -> list[Sample]:
    """All samples, or those of one skill. Raises ValueError for a skill without samples."""
    found = [_sample(entry) for entry in json.loads((_HERE / "samples.json").read_text(encoding="utf-8"))]
    skills = list(dict.fromkeys(sample.skill for sample in found))
    if skill is not None and skill not in skills:
        raise ValueError(f"no samples of {skill!r}; there are {', '.join(skills)}")
    return [sample for sample in found if skill in (None, sample.skill)]


def _sample(entry: Mapping[str, Any]) -> Sample:
    files = tuple(_HERE / name for name in entry["files"])
    return Sample(entry["skill"], entry["question"], entry["answer"], entry["kind"], files, tuple(entry.get("box", ())))
