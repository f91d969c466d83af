# SPDX-License-Identifier: Apache-2.0
"""From pixels and samples to logits: our whole way (processors, prompt, encoders, masks, caches) against transformers'
own feature extractors and models in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

import gemma4
from gemma4.media.image import preprocess_unified
from gemma4.media.medium import Medium, read_audio, read_image, read_video
from gemma4.media.prompt import SoftRun, TokenizedPrompt

from . import towers, variants
from .compare import difference, same_bits
from .test_multimodal import AUDIO, IMAGE, TYPES, VIDEO, _masks_of_generate

PIL = pytest.importorskip("PIL.Image")
PLACEHOLDER = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
TOWERS = {
    "e2b": towers.Tower("e2b", vision=towers.EFFECTIVE, audio=towers.AUDIO_REAL, text=variants.E2B),
    "26b": towers.BY_NAME["media-26b"],
    "31b": towers.BY_NAME["media-31b"],
    "12b": towers.Tower(
        "12b",
        vision=towers.UNIFIED_VISION | {"patch_size": 16},
        audio=towers.UNIFIED_AUDIO | {"audio_embed_dim": 640},
        text=variants.UNIFIED | towers.BOTH_WAYS,
        unified=True,
    ),
}
HEARING = ("e2b", "12b")


class Pair(NamedTuple):
    tower: towers.Tower
    theirs: Any
    ours: gemma4.Model


Get = Callable[[str], Pair]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Get:
    torch.set_num_threads(1)

    @functools.cache
    def get(name: str) -> Pair:
        tower = TOWERS[name]
        theirs = towers.build(tower)
        directory = towers.save(tower, theirs, tmp_path_factory.mktemp(name))
        theirs.config.image_token_id, theirs.config.video_token_id, theirs.config.audio_token_id = IMAGE, VIDEO, AUDIO
        return Pair(tower, theirs, gemma4.load(directory, precision="exact", threads=2))

    return get


# ---- prompts --------------------------------------------------------------------------------------------------------

Part = int | tuple[Any, ...]  # so many text tokens, or a medium's kind and what makes one different from another


def medium(part: tuple[Any, ...], raw_audio: bool) -> Medium:
    kind, seed = part[0], part[1]
    rng = np.random.default_rng(seed)
    if kind == "audio":
        return read_audio(rng.normal(0, 0.1, part[2]), raw=raw_audio)
    sides = (part[2], part[3], 3)
    if kind == "image":
        return read_image(rng.integers(0, 256, sides, dtype=np.uint8), 70)
    return read_video([rng.integers(0, 256, sides, dtype=np.uint8) for _ in range(2)], image_tokens=70)


def prompt_of(pair: Pair, parts: Iterable[Part]) -> TokenizedPrompt:
    """A token before and after each run of a medium."""
    rng = np.random.default_rng(1)  # seed 0 has a tie of two experts, 4e-7 apart, in one prompt
    ids: list[int] = [2]
    runs: list[SoftRun] = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(3, 200, part).tolist()
            continue
        made = medium(part, pair.tower.unified)
        for i in range(made.n_runs):
            n = made.run_length
            runs.append(SoftRun(made, len(ids) + 1, len(ids) + 1 + n, i * n))
            ids += [248, *[PLACEHOLDER[made.kind]] * n, 249]
    return TokenizedPrompt(np.array(ids, np.int32), tuple(runs))


PORTRAIT, WIDE, FILM = ("image", 0, 120, 90), ("image", 1, 30, 140), ("video", 2, 40, 100)
SHORT, LONG = ("audio", 3, 4_001), ("audio", 4, 30_160)
PROMPTS: dict[str, tuple[Part, ...]] = {
    "text": (20,),
    "image": (3, PORTRAIT, 4),
    "image at the end": (9, WIDE),
    "one after another": (PORTRAIT, WIDE, 2, ("image", 5, 90, 90), 5),
    "video": (2, FILM, 3),
    "images and video": (7, PORTRAIT, 11, FILM, 1, WIDE, PORTRAIT, 6),
    "audio": (2, SHORT, 5),
    "everything": (4, LONG, 2, PORTRAIT, 3, FILM, SHORT, 6),
}
CASES = [
    (name, prompt)
    for name in TOWERS
    for prompt, parts in PROMPTS.items()
    if name in HEARING or not any(isinstance(part, tuple) and part[0] == "audio" for part in parts)
]


# ---- the oracle -----------------------------------------------------------------------------------------------------


def padded(arrays: list[np.ndarray], fill: float) -> torch.Tensor:
    longest = max(map(len, arrays))
    return torch.from_numpy(
        np.stack([np.pad(a, ((0, longest - len(a)), (0, 0)), constant_values=fill) for a in arrays])
    )


def pictures(pair: Pair, found: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    if pair.tower.unified:  # its processor needs torchvision; test_media_image.py compares ours with its parts
        made = [preprocess_unified(pixels, 70) for pixels in found]
        return padded([m.patches for m in made], 0), padded([m.positions for m in made], -1)
    out = Gemma4ImageProcessorPil(max_soft_tokens=70)([PIL.fromarray(pixels) for pixels in found], return_tensors="pt")
    return out["pixel_values"], out["image_position_ids"]


def sounds(pair: Pair, found: list[np.ndarray]) -> dict[str, torch.Tensor]:
    if not pair.tower.unified:
        out = Gemma4AudioFeatureExtractor()(found, return_tensors="pt")
    else:
        from transformers.models.gemma4_unified import feature_extraction_gemma4_unified as unified

        out = unified.Gemma4UnifiedAudioFeatureExtractor()(found, return_tensors="pt")
    return {name: out[name] for name in ("input_features", "input_features_mask")}


def their_logits(pair: Pair, prompt: TokenizedPrompt) -> np.ndarray:
    media = [run.medium for run in prompt.runs if run.first == 0]
    ids = torch.from_numpy(prompt.ids).long()[None]
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    given["mm_token_type_ids"] = torch.zeros_like(ids)
    for token, kind in TYPES.items():
        given["mm_token_type_ids"][ids == token] = kind
    if images := [m.content for m in media if m.kind == "image"]:
        given["pixel_values"], given["image_position_ids"] = pictures(pair, images)
    if videos := [m.content.frames for m in media if m.kind == "video"]:
        frames = [frame for video in videos for frame in video]
        given["pixel_values_videos"], given["video_position_ids"] = pictures(pair, frames)
        given["num_frames_per_video"] = torch.tensor([len(video) for video in videos])
    if recordings := [m.content for m in media if m.kind == "audio"]:
        given |= sounds(pair, recordings)
    if pair.tower.unified:
        given["attention_mask"] = _masks_of_generate(pair, given["mm_token_type_ids"])  # type: ignore[arg-type]
    with torch.no_grad():
        return pair.theirs(**given).logits[0].numpy()


# ---- comparisons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prompt"), CASES)
def test_logits(name: str, prompt: str, pair: Get) -> None:
    both = pair(name)
    tokenized = prompt_of(both, PROMPTS[prompt])
    assert difference(both.ours.forward(tokenized), their_logits(both, tokenized)) is None


@pytest.mark.parametrize("name", TOWERS)
def test_a_picture_on_the_third_turn(name: str, pair: Get) -> None:
    """Turn after turn on one cached sequence: the whole conversation's logits, theirs and, to the bit, ours."""
    both = pair(name)
    turns = [(30, WIDE, 5), (12, PORTRAIT, 3), (8, ("image", 6, 90, 120), 4, *([SHORT] if name in HEARING else []), 2)]
    whole = prompt_of(both, [part for turn in turns for part in turn])
    ends = [len(prompt_of(both, [part for turn in turns[: i + 1] for part in turn])) for i in range(3)]
    expected, together = their_logits(both, whole), both.ours.forward(whole)
    with both.ours.new_sequence() as sequence:
        for start, end in zip([0, *ends], ends, strict=False):
            inside = [run for run in whole.runs if start <= run.start < end]
            runs = tuple(SoftRun(run.medium, run.start - start, run.stop - start, run.first) for run in inside)
            logits = both.ours.forward(TokenizedPrompt(whole.ids[start:end], runs), sequence=sequence)
            assert difference(logits, expected[start:end]) is None
            assert same_bits(logits, together[start:end])


def test_hooks_and_captures_see_whole_pictures(pair: Get) -> None:
    model = pair("31b").ours
    prompt = prompt_of(pair("31b"), (5, PORTRAIT, 3))
    shapes = []
    hook = ("blocks.0.attn.hook_attn_scores", lambda scores, site: shapes.append(scores.shape))
    assert same_bits(model.run_with_hooks(prompt, [hook]), model.forward(prompt))
    assert shapes == [(16, len(prompt), len(prompt))]
    _, cache = model.run_with_cache(prompt, "blocks.0.attn.hook_attn_scores", pos=[prompt.runs[0].start])
    scores, last = cache["blocks.0.attn.hook_attn_scores"], prompt.runs[0].stop - 1
    assert scores.shape == (16, 1, len(prompt))
    assert np.isfinite(scores[:, 0, last]).all() and np.isneginf(scores[:, 0, last + 1 :]).all()
