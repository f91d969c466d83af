# SPDX-License-Identifier: Apache-2.0
"""The vision encoders against transformers in float32: every site, soft tokens, images of any size together."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import gemma4
from gemma4.errors import FormatError, SiteError
from gemma4.media import image as media_image

from . import towers
from .compare import difference, first_failures, same_bits
from .towers import GetPair

TOWERS = [t.name for t in towers.TOWERS if t.vision is not None and not t.unified]
UNIFIED = [t.name for t in towers.TOWERS if t.unified]
SIZES = [(3, 3), (6, 3), (3, 12), (9, 6), (12, 15)]  # in patches


def sizes(tower: towers.Tower) -> list[tuple[int, int]]:
    pool = (tower.vision or {}).get("pooling_kernel_size", 3)
    return [(w // 3 * pool, h // 3 * pool) for w, h in SIZES]


@pytest.mark.parametrize("size", range(len(SIZES)))
@pytest.mark.parametrize("name", TOWERS)
def test_every_site(name: str, size: int, pair: GetPair) -> None:
    tower, theirs, ours = pair(name)
    patches, positions = towers.image(tower, *sizes(tower)[size])
    expected = towers.vision_sites(theirs, patches, positions)
    [soft], [cache] = ours.vision.run_with_cache([(patches, positions)], "*")
    assert list(cache) == list(expected) == list(ours.vision.sites)
    assert first_failures(cache, expected) == []
    assert difference(soft, expected["vision.hook_projected"]) is None


@pytest.mark.parametrize("name", UNIFIED)
def test_every_site_without_a_tower(name: str, pair: GetPair) -> None:
    tower, theirs, ours = pair(name)
    for size in [(1, 1), (5, 3), (2, 39)]:
        patches, positions = towers.image(tower, *size)
        expected = towers.unified_vision_sites(theirs, patches, positions)
        [soft], [cache] = ours.vision.run_with_cache([(patches, positions)], "*")
        assert list(cache) == list(expected) == list(ours.vision.sites)
        assert first_failures(cache, expected) == []
        assert difference(soft, expected["vision.hook_projected"]) is None


def test_renamed_tensors_of_the_unified_model(pair: GetPair, tmp_path: Path) -> None:
    """Files hold the names of before or after transformers' renaming."""
    tower, _, ours = pair("unified")
    tensors = load_file(ours.checkpoint.path / "model.safetensors")
    assert any(name.startswith("model.vision_embedder.") for name in tensors)
    save_file({_renamed(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((ours.checkpoint.path / "config.json").read_bytes())
    image = towers.image(tower, 4, 4)
    assert same_bits(gemma4.load(tmp_path).vision.encode([image])[0], ours.vision.encode([image])[0])


def _renamed(name: str) -> str:
    name = name.replace("embed_vision.", "embed_vision.multimodal_embedder.")
    return name.replace("vision_embedder.", "embed_vision.")


@pytest.mark.parametrize("name", TOWERS)
def test_company_and_threads_change_no_bit(name: str, pair: GetPair) -> None:
    """Images of several sizes in one call, watched or not, on one thread or two: what each gives alone."""
    tower, _, ours = pair(name)
    images = [towers.image(tower, *size) for size in sizes(tower)]
    alone = [ours.vision.run_with_cache([image], [])[0][0] for image in images]
    single = gemma4.load(ours.checkpoint.path, precision="exact", threads=1)
    for model, names in [(ours, []), (ours, "*"), (single, []), (single, "vision.blocks.1.attn.hook_pattern")]:
        together, caches = model.vision.run_with_cache(images[::-1], names)
        assert all(same_bits(a, b) for a, b in zip(together[::-1], alone, strict=True))
        for cache, (patches, _) in zip(caches, images[::-1], strict=True):
            if cache:
                assert cache["vision.blocks.1.attn.hook_pattern"].shape[1:] == (len(patches), len(patches))


def test_patches_in_any_order(pair: GetPair) -> None:
    tower, _, ours = pair("vision-effective")
    patches, positions = towers.image(tower, 6, 9)
    order = np.random.default_rng(0).permutation(len(patches))
    [a, b] = ours.vision.encode([(patches, positions), (patches[order], positions[order])])
    assert np.abs(a - b).max() <= 2e-5 * np.abs(a).max()


def test_more_rows_than_one_pass(pair: GetPair) -> None:
    """Many images are cut into passes, and a large one's MLP into slices."""
    tower, theirs, ours = pair("vision-effective")
    patches, positions = towers.image(tower, 60, 30)
    many = [(patches, positions)] * 2 + [towers.image(tower, 60, 60)] + [(patches, positions)]
    soft, _ = ours.vision.run_with_cache(many, [])
    assert all(same_bits(soft[0], other) for other in (soft[1], soft[3]))
    watched, [cache] = ours.vision.run_with_cache(many[:1], "vision.blocks.0.mlp.hook_post")
    assert same_bits(watched[0], soft[0]) and cache["vision.blocks.0.mlp.hook_post"].shape == (1800, 80)
    with torch.no_grad():
        out = theirs.model.get_image_features(torch.from_numpy(patches)[None], torch.from_numpy(positions).long()[None])
    assert difference(soft[0], out.pooler_output[0].numpy()) is None


def test_hooks_edit_the_tower(pair: GetPair) -> None:
    tower, _, ours = pair("vision-large")
    image = towers.image(tower, 6, 6)
    [plain], [before] = ours.vision.run_with_cache([image], "*")
    seen = []

    def double(array: np.ndarray, site: gemma4.HookPoint) -> np.ndarray:
        seen.append((site.name, site.layer, site.medium, len(site.positions)))
        return 2 * array

    def uniform(array: np.ndarray, site: gemma4.HookPoint) -> None:
        array[:] = 1 / array.shape[-1]

    with ours.hooks([("vision.blocks.1.hook_mlp_out", double), ("vision.blocks.2.attn.hook_pattern", uniform)]):
        [edited], [after] = ours.vision.run_with_cache([image, image][:1], "*")
        assert not same_bits(ours.vision.encode([image])[0], plain)
    assert seen[0] == ("vision.blocks.1.hook_mlp_out", 1, 0, 36)
    name = "vision.blocks.1.hook_resid_post"
    expected = before["vision.blocks.1.hook_resid_mid"] + 2 * before["vision.blocks.1.hook_mlp_out"]
    np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-6)
    values = after["vision.blocks.2.attn.hook_v_normed"].mean(axis=0)
    np.testing.assert_allclose(after["vision.blocks.2.attn.hook_z"][5], values, rtol=1e-4, atol=1e-6)
    assert same_bits(after["vision.blocks.0.hook_resid_post"], before["vision.blocks.0.hook_resid_post"])
    assert same_bits(ours.vision.encode([image])[0], plain) and not same_bits(edited, plain)


def test_text_runs_do_not_see_hooks_of_encoders(pair: GetPair) -> None:
    _, _, ours = pair("vision-effective")

    def fail(array: np.ndarray, site: gemma4.HookPoint) -> None:
        raise AssertionError(site.name)

    with ours.hooks([("vision.hook_soft", fail)]):
        ours.forward([2, 5, 7])
    with pytest.raises(SiteError, match="hook_resid_post"), ours.hooks([("vision.blocks.0.hook_resid_pos", fail)]):
        pass
    with pytest.raises(SiteError):
        ours.vision.run_with_cache([towers.image(towers.BY_NAME["vision-effective"], 3, 3)], "vision.blocks.9.hook_z")


@pytest.mark.parametrize("side", ["input_min", "input_max"])
def test_bounds_that_agree_on_one_side(side: str, tmp_path: Path) -> None:
    """q, k and v, gate and up each clamp what they are given by themselves, unless both of their bounds agree."""
    tower = towers.BY_NAME["vision-effective"]
    theirs = towers.build(tower)
    with torch.no_grad():
        for name, tensor in theirs.state_dict(keep_vars=True).items():
            if name.endswith(side):
                tensor.fill_(-0.75 if side == "input_min" else 0.75)
    ours = gemma4.load(towers.save(tower, theirs, tmp_path), precision="exact")
    patches, positions = towers.image(tower, 6, 6)
    expected = towers.vision_sites(theirs, patches, positions)
    _, [cache] = ours.vision.run_with_cache([(patches, positions)], "*")
    assert first_failures(cache, expected) == []


def test_pictures_and_videos(pair: GetPair) -> None:
    """From pixels: the patches that gemma4.media makes, of a picture and of every frame."""
    _, _, ours = pair("vision-wide")
    rng = np.random.default_rng(3)
    frames = [rng.integers(0, 256, (60, 90, 3), dtype=np.uint8) for _ in range(3)]
    found = media_image.preprocess(frames[0], 70)
    [soft] = ours.vision.encode([(found.patches, found.positions)])
    assert soft.shape == (found.n_soft_tokens, 64)
    assert same_bits(ours.encode_image(frames[0], image_tokens=70), soft)
    video = ours.encode_video(np.stack(frames), fps=1.0)
    assert same_bits(video[: len(soft)], soft) and len(video) == 3 * len(soft)


def test_ctrl_c_leaves_everything_usable(pair: GetPair) -> None:
    tower, _, ours = pair("vision-wide")
    image = towers.image(tower, 63, 63)
    [expected] = ours.vision.encode([image])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ours.vision.encode([image] * 100)
        assert time.monotonic() - start < 10  # all of them take minutes
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert same_bits(ours.vision.encode([image])[0], expected)


def test_wrong_media_are_errors(pair: GetPair) -> None:
    tower, _, ours = pair("vision-effective")
    patches, positions = towers.image(tower, 6, 6)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (patches, TypeError, "pair"),
        ((patches[:, :5], positions), ValueError, "expected float32"),
        ((patches, positions[:5]), ValueError, "positions are"),
        ((patches[:0], positions[:0]), ValueError, "empty"),
        ((patches[:35], positions[:35]), ValueError, "multiple of 9"),
        ((patches, positions + 60), ValueError, "expected 0 to 63"),
        ((patches, positions - 1), ValueError, "expected 0 to 63"),
        ((patches, positions.astype(np.float32)), ValueError, "positions are"),
        ((patches, positions * 2), ValueError, "soft token"),
        ((np.where(patches > 0.99, np.nan, patches), positions), ValueError, "NaN"),
    ]
    for medium, error, message in wrong:
        with pytest.raises(error, match=message):
            ours.vision.encode([medium])


def test_models_without_the_tower(pair: GetPair) -> None:
    text = gemma4.load("tiny-moe")
    for model, modality in [(text, "vision"), (text, "audio"), (pair("vision-effective").ours, "audio")]:
        with pytest.raises(NotImplementedError, match=f"no {modality} encoder"):
            getattr(model, modality)


def test_damaged_towers(pair: GetPair) -> None:
    ours = pair("vision-large").ours
    config, tensors = ours.vision.config.engine(), ours.checkpoint.encoder_tensors("vision")
    name = "encoder.layers.1.mlp.up_proj.linear.weight"
    dtype, shape, buffer, offset = tensors[name]
    cases = {
        "no tensor " + name: {k: v for k, v in tensors.items() if k != name},
        name + " has shape": tensors | {name: (dtype, shape[::-1], buffer, offset)},
        "std_bias": {k: v for k, v in tensors.items() if k != "std_bias"},
    }
    for message, given in cases.items():
        with pytest.raises(FormatError, match=message):
            gemma4._engine.Encoder(ours.engine, config, given)
    for change in ({"n_heads": 0}, {"head_dim": 2}, {"pool": 0}, {"n_layers": -1}, {"kind": "x"}, {"d_in": 1 << 20}):
        with pytest.raises(ValueError):
            gemma4._engine.Encoder(ours.engine, config | change, tensors)  # type: ignore[arg-type]
