# SPDX-License-Identifier: Apache-2.0
"""The samples that come with the package are what they say."""

from __future__ import annotations

import pytest

from gemma4.media.medium import Modalities, read_media
from gemma4.media.samples import samples

pytest.importorskip("PIL.Image")
EVERYTHING = Modalities(image=True, audio=True)


def test_every_sample_is_a_question_about_one_medium():
    found = samples()
    assert len({sample.skill for sample in found}) == 13
    for sample in found:
        if sample.kind == "audio":
            pytest.importorskip("soundfile")
        [medium] = read_media(sample.messages, modalities=EVERYTHING, image_tokens=70)
        assert medium.kind == sample.kind and medium.n_runs == (3 if sample.kind == "video" else 1)
        texts = [part["text"] for part in sample.messages[0]["content"] if part["type"] == "text"]
        assert texts == [sample.question] and sample.answer
        assert bool(sample.box) == (sample.skill in ("box", "point"))
    directory = found[0].files[0].parent
    assert sum(file.stat().st_size for file in directory.iterdir() if file.is_file()) < 200_000
    with pytest.raises(ValueError, match=r"no samples of 'boxes'; there are caption, count, .* speech_translation"):
        samples("boxes")
