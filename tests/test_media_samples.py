# SPDX-License-Identifier: Apache-2.0
"""The samples that come with the package: what they say they are, and what the generators still make of their seed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gemma4.media.medium import Modalities, read_media
from gemma4.media.samples import samples

Image = pytest.importorskip("PIL.Image")
EVERYTHING = Modalities(image=True, audio=True)


def test_every_sample_is_a_question_about_one_medium():
    found = samples()
    assert len({sample.skill for sample in found}) == 15
    for sample in found:
        if sample.kind == "audio":
            pytest.importorskip("soundfile")
        [medium] = read_media(sample.messages, modalities=EVERYTHING, image_tokens=70)
        assert medium.kind == sample.kind and medium.n_runs == (3 if sample.kind == "video" else 1)
        texts = [part["text"] for part in sample.messages[0]["content"] if part["type"] == "text"]
        assert texts == [sample.question] and sample.answer
        assert bool(sample.box) == sample.skill.startswith(("box", "point"))
    directory = found[0].files[0].parent
    assert sum(file.stat().st_size for file in directory.iterdir() if file.is_file()) < 200_000
    with pytest.raises(ValueError, match=r"no samples of 'boxes'; there are caption, count, .* speech_translation"):
        samples("boxes")


def test_they_are_held_out_and_not_chosen():
    """The first conversations of seed 7 on the held-out side of the split, drawn as training's pictures are."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    try:
        from train_tiny.skills_media import SKILLS, held_out
    finally:
        sys.path.pop(0)
    assert list(dict.fromkeys(sample.skill for sample in samples())) == list(SKILLS)
    for skill in SKILLS:
        mine = samples(skill)
        for sample, conversation in zip(mine, held_out(skill, len(mine), 7), strict=True):
            assert (sample.question, sample.answer) == conversation.turns[0][1:]
            assert sample.box == tuple(conversation.wanted)
            if sample.kind != "audio":  # a voice wavers at random
                pictures = [np.asarray(Image.open(file).convert("RGB")) for file in sample.files]
                drawn = [np.asarray(image) for image in conversation.images]
                assert all(a.shape == b.shape for a, b in zip(pictures, drawn, strict=True))
                # fonts may differ in their edges from one version of matplotlib or FreeType to the next
                assert all((a == b).mean() > 0.97 for a, b in zip(pictures, drawn, strict=True))
