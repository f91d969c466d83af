# SPDX-License-Identifier: Apache-2.0
"""Logits of prompts with images, videos and audio in them against transformers in float32, encoders included.

Models like E2B (all causal), like 26B and 31B, and like 12B (images and videos see themselves in sliding layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from . import towers
from .compare import difference, same_bits
from .towers import GetPair, Pair

IMAGE, VIDEO, AUDIO = 250, 251, 252  # ids of the placeholders, and what the engine calls them
KINDS = {IMAGE: -2, VIDEO: -3, AUDIO: -1}  # in the engine all below 0 are embeddings; the tests tell them apart
TYPES = {IMAGE: 1, VIDEO: 2, AUDIO: 3}


class Part(NamedTuple):
    """Of a prompt: token ids, or a medium: its placeholder, input rows and positions."""

    ids: Sequence[int] = ()
    kind: int = 0
    rows: Any = None
    positions: Any = None


@pytest.fixture(scope="module")
def pair(pair: GetPair) -> GetPair:
    """The same, with the placeholders' ids of these tests."""

    def get(name: str) -> Pair:
        found = pair(name)
        config = found.theirs.config
        config.image_token_id, config.video_token_id, config.audio_token_id = IMAGE, VIDEO, AUDIO
        return found

    return get


def text(n: int, seed: int = 0) -> Part:
    return Part(np.random.default_rng(n + 31 * seed).integers(3, 200, n).tolist())


def image(pair: Pair, width: int, height: int, kind: int = IMAGE, seed: int = 0) -> Part:
    """width x height in soft tokens."""
    pool = 1 if pair.tower.unified else 3
    return Part((), kind, *towers.image(pair.tower, pool * width, pool * height, seed))


def audio(pair: Pair, frames: int) -> Part:
    return Part((), AUDIO, towers.mel(pair.tower, frames))


# ---- both sides -----------------------------------------------------------------------------------------------------


def expanded(pair: Pair, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [T] as the engine's run has them, embeddings float32 [T, d_model]."""
    ids: list[int] = []
    soft: list[tuple[int, np.ndarray]] = []
    for part in parts:
        if not part.kind:
            ids += part.ids
            continue
        encoder = pair.ours.audio if part.kind == AUDIO else pair.ours.vision
        [rows] = encoder.encode([part.rows if part.kind == AUDIO else (part.rows, part.positions)])
        soft.append((len(ids), rows))
        ids += [KINDS[part.kind]] * len(rows)
    embeddings = np.zeros((len(ids), pair.ours.engine_config["d_model"]), np.float32)
    for at, rows in soft:
        embeddings[at : at + len(rows)] = rows
    return np.array(ids, np.int32), embeddings


def both_ways(ids: np.ndarray) -> np.ndarray:
    """int32 [T]: up to where each position sees, images and frames to their own ends."""
    ends = np.arange(1, len(ids) + 1, dtype=np.int32)
    for i in reversed(range(len(ids) - 1)):
        if ids[i] <= KINDS[IMAGE] and ids[i + 1] <= KINDS[IMAGE]:
            ends[i] = ends[i + 1]
    return ends


def our_logits(
    pair: Pair,
    parts: Sequence[Part],
    *,
    max_chunk: int = 0,
    sequence: Any = None,
    taps: Sequence[Any] = (),
    of_rows: Sequence[int] | None = None,
) -> np.ndarray:
    ids, embeddings = expanded(pair, parts)
    rows = np.arange(len(ids), dtype=np.int32) if of_rows is None else np.array(of_rows, np.int32)
    logits = np.zeros((len(rows), pair.ours.d_vocab), np.float32)
    run = (sequence or pair.ours.engine.new_sequence(), ids, embeddings, rows, logits, both_ways(ids))
    pair.ours.engine.step([run], taps, max_chunk=max_chunk)
    return logits


def padded(parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of several sizes as the reference wants them: zeros, and positions of -1, up to the longest."""
    longest = max(len(part.rows) for part in parts)
    rows = np.zeros((len(parts), longest, parts[0].rows.shape[1]), np.float32)
    positions = np.full((len(parts), longest, 2), -1)
    for i, part in enumerate(parts):
        rows[i, : len(part.rows)], positions[i, : len(part.rows)] = part.rows, part.positions
    return torch.from_numpy(rows), torch.from_numpy(positions)


def their_logits(pair: Pair, parts: Sequence[Part], **options: Any) -> np.ndarray:
    ids, _ = expanded(pair, parts)
    names = {engine: token for token, engine in KINDS.items()}
    tokens = np.array([names.get(int(i), int(i)) for i in ids])
    types = np.array([TYPES.get(int(i), 0) for i in tokens])
    given: dict[str, Any] = {"input_ids": torch.from_numpy(tokens)[None], "use_cache": False} | options
    given["mm_token_type_ids"] = torch.from_numpy(types)[None]
    images = [part for part in parts if part.kind == IMAGE]
    if images:
        given["pixel_values"], given["image_position_ids"] = padded(images)
    frames = [part for part in parts if part.kind == VIDEO]
    if frames:
        given["pixel_values_videos"], given["video_position_ids"] = padded(frames)
        given["num_frames_per_video"] = torch.tensor([len(frames)])
    sounds = [part for part in parts if part.kind == AUDIO]
    if sounds:
        mask = np.arange(max(len(s.rows) for s in sounds)) < np.array([[len(s.rows)] for s in sounds])
        features = np.zeros((*mask.shape, sounds[0].rows.shape[1]), np.float32)
        for i, sound in enumerate(sounds):
            features[i, : len(sound.rows)] = sound.rows
        given["input_features"], given["input_features_mask"] = torch.from_numpy(features), torch.from_numpy(mask)
    if pair.tower.unified:
        given["attention_mask"] = _masks_of_generate(pair, given["mm_token_type_ids"])
    with torch.no_grad():
        return pair.theirs(**given).logits[0].numpy()


def _masks_of_generate(pair: Pair, types: torch.Tensor) -> Any:
    """What generate() of the unified class makes: images see themselves in sliding layers, inside the window. A bare
    forward of transformers 5.23 makes other masks (in all layers, beyond the window) than its own generate."""
    n, width = types.shape[1], pair.ours.engine_config["d_model"]
    return pair.theirs.create_masks_for_generate(
        config=pair.theirs.config,
        inputs_embeds=torch.zeros(1, n, width),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(n)[None],
        mm_token_type_ids=types,
        is_first_iteration=True,
    )


def check(pair: Pair, parts: Sequence[Part]) -> None:
    assert difference(our_logits(pair, parts), their_logits(pair, parts)) is None


# ---- every kind of model --------------------------------------------------------------------------------------------

VISION = ["media-26b", "media-31b", "media-12b"]  # of these, images see themselves
ALL = ["media-e2b", "media-pad", *VISION]


@pytest.mark.parametrize("name", ALL)
def test_one_image(name: str, pair: GetPair) -> None:
    p = pair(name)
    for width, height in [(1, 1), (2, 2), (5, 4)]:
        check(p, [text(3), image(p, width, height), text(6)])
    check(p, [image(p, 3, 2), text(2)])
    check(p, [text(2), image(p, 3, 2)])


@pytest.mark.parametrize("name", ALL)
def test_several_media(name: str, pair: GetPair) -> None:
    p = pair(name)
    check(p, [text(2), image(p, 2, 3), text(4), image(p, 4, 1, seed=1), text(9), image(p, 3, 3, seed=2), text(3)])
    frames = [part for i in range(3) for part in (text(4, i), image(p, 2, 2, VIDEO, seed=i))]
    check(p, [text(2), *frames, text(5)])
    check(p, [text(2), *frames, text(1), image(p, 3, 4), text(5)])
    if p.tower.audio is not None:
        check(p, [text(2), audio(p, 21), text(4)])
        check(p, [text(2), audio(p, 33), text(4), image(p, 2, 2), text(3), audio(p, 8), text(2), *frames, text(5)])


@pytest.mark.parametrize("name", ALL)
def test_image_longer_than_the_window(name: str, pair: GetPair) -> None:
    p = pair(name)
    assert p.tower.text["sliding_window"] < 20
    check(p, [text(3), image(p, 6, 6), text(12)])


# ---- images that see themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
def test_image_at_every_chunk_offset(name: str, pair: GetPair) -> None:
    """No chunk ends inside an image, however long a chunk may be: the same bits as in one piece."""
    p = pair(name)
    for before in range(9):
        parts = [text(before + 1), image(p, 3, 3), text(3), image(p, 2, 2, seed=3), text(4)]
        whole = our_logits(p, parts, max_chunk=1000)
        assert difference(whole, their_logits(p, parts)) is None
        for max_chunk in (1, 4, 8, 16):
            assert same_bits(our_logits(p, parts, max_chunk=max_chunk), whole)


@pytest.mark.parametrize("name", [*VISION, "media-shared"])
def test_few_rows_of_images(name: str, pair: GetPair) -> None:
    """Where layers share keys, only wanted rows reach them; each still sees its image to the end."""
    p = pair(name)
    parts = [text(3), image(p, 3, 3), text(2), image(p, 2, 2, seed=3), text(4)]
    whole = our_logits(p, parts)
    assert difference(whole, their_logits(p, parts)) is None
    n = len(whole)
    for wanted in ([4], [7], [3, 11], [5, 6, 14, n - 1], [15], [0, 12, 17], list(range(3, 12))):
        for max_chunk in (0, 8, 1000):
            some = our_logits(p, parts, max_chunk=max_chunk, of_rows=wanted)
            assert same_bits(some, whole[wanted]), (wanted, max_chunk)


@pytest.mark.parametrize("name", ALL)
def test_image_on_a_later_turn(name: str, pair: GetPair) -> None:
    """On top of a cache that the sliding layers have begun to forget."""
    p = pair(name)
    turns = [[text(7), image(p, 2, 2), text(5)], [text(30, 1)], [text(2, 2), image(p, 4, 3, seed=4), text(6, 3)]]
    sequence = p.ours.engine.new_sequence()
    ours = np.concatenate([our_logits(p, turn, sequence=sequence) for turn in turns])
    assert difference(ours, their_logits(p, [part for turn in turns for part in turn])) is None


@pytest.mark.parametrize("name", ALL)
def test_watched_patterns(name: str, pair: GetPair) -> None:
    """Who looks at scores and patterns changes no bit, and sees what the reference sees."""
    p = pair(name)
    parts = [text(4), image(p, 3, 3), text(5)]
    n, config = 18, p.ours.engine_config
    arrays = {}
    for site in p.ours.sites.select("blocks.*.attn.hook_pattern"):
        arrays[site.name] = (site, np.zeros(site.shape(n, n), np.float32))
    taps = [(site.id, site.layer, 0, array, None) for site, array in arrays.values()]
    assert same_bits(our_logits(p, parts, taps=taps), our_logits(p, parts))
    with torch.no_grad():
        seen = np.zeros((n, n), bool)
        back = np.arange(n)[:, None] - np.arange(n)[None]
        for name_, (_, pattern) in arrays.items():
            layer = config["layers"][int(name_.split(".")[1])]
            seen = back >= 0
            if layer["window"] and p.tower.text.get("use_bidirectional_attention") == "vision":
                block = (np.arange(n) >= 4) & (np.arange(n) < 13)
                seen |= block[:, None] & block[None]
            if layer["window"]:
                seen &= back < layer["window"]
            assert ((pattern > 0) == seen[None]).all(), name_


@pytest.mark.parametrize("name", VISION)
def test_threads_and_company(name: str, pair: GetPair) -> None:
    p = pair(name)
    prompts = [[text(3), image(p, 4, 4), text(2)], [text(9)], [image(p, 2, 5), text(1)]]
    alone = [our_logits(p, parts) for parts in prompts]
    runs, outs = [], []
    for parts in prompts:
        ids, embeddings = expanded(p, parts)
        outs.append(np.zeros((len(ids), p.ours.d_vocab), np.float32))
        rows = np.arange(len(ids), dtype=np.int32)
        runs.append((p.ours.engine.new_sequence(), ids, embeddings, rows, outs[-1], both_ways(ids)))
    p.ours.engine.step(runs, max_chunk=13)
    assert all(same_bits(a, b) for a, b in zip(outs, alone, strict=True))
