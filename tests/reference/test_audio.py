# SPDX-License-Identifier: Apache-2.0
"""The audio encoders against transformers in float32: every site, soft tokens, recordings of any length together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemma4
from gemma4.errors import FormatError

from . import towers
from .compare import difference, first_failures, same_bits
from .towers import GetPair

TOWERS = [t.name for t in towers.TOWERS if t.audio is not None and not t.unified]
UNIFIED = [t.name for t in towers.TOWERS if t.unified]
LENGTHS = [1, 2, 5, 13, 37, 52, 203]


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("name", TOWERS)
def test_every_site(name: str, frames: int, pair: GetPair) -> None:
    tower, theirs, ours = pair(name)
    mel = towers.mel(tower, frames)
    with torch.no_grad():
        expected = towers.audio_sites(theirs, mel)
    [soft], [cache] = ours.audio.run_with_cache([mel], "*")
    assert list(cache) == list(expected) == list(ours.audio.sites)
    assert first_failures(cache, expected) == []
    assert difference(soft, expected["audio.hook_projected"]) is None
    patterns = np.einsum("htj,jhd->thd", cache["audio.blocks.1.attn.hook_pattern"], cache["audio.blocks.1.attn.hook_v"])
    assert difference(patterns.astype(np.float32), expected["audio.blocks.1.attn.hook_z"]) is None


@pytest.mark.parametrize("frames", [452, 453, 1000])
def test_convolutions_in_slices(frames: int, pair: GetPair) -> None:
    """Patches of the second convolution are laid out 16 MB at a time: 113 of its rows, 4.5 s of sound."""
    tower, theirs, ours = pair("audio-real")
    assert tower.audio is not None and tower.audio["subsampling_conv_channels"][0] == 128
    mel = towers.mel(tower, frames)
    with torch.no_grad():
        expected = towers.audio_sites(theirs, mel)
    names = ["audio.hook_conv0", "audio.hook_conv1", "audio.hook_embed", "audio.hook_projected"]
    [soft], [cache] = ours.audio.run_with_cache([mel], names)
    assert first_failures(cache, {name: expected[name] for name in names}) == []
    assert difference(soft, expected["audio.hook_projected"]) is None
    # Where the halves of a recording do not reach each other, each is what it is alone.
    [_], [first] = ours.audio.run_with_cache([mel[: frames // 2]], names[:2])
    for name in names[:2]:
        n = len(first[name]) - 2
        assert same_bits(cache[name][:n], first[name][:n])


@pytest.mark.parametrize("name", UNIFIED)
def test_every_site_without_a_tower(name: str, pair: GetPair) -> None:
    tower, theirs, ours = pair(name)
    for frames in (1, 2, 33):
        samples = towers.mel(tower, frames)
        with torch.no_grad():
            expected = towers.unified_audio_sites(theirs, samples)
        [soft], [cache] = ours.audio.run_with_cache([samples], "*")
        assert list(cache) == list(expected) == list(ours.audio.sites)
        assert first_failures(cache, expected) == []
        assert difference(soft, expected["audio.hook_projected"]) is None


@pytest.mark.parametrize("name", TOWERS)
def test_padded_batch_of_the_reference(name: str, pair: GetPair) -> None:
    """The reference pads to the longest and masks; ours are as long as they are."""
    tower, theirs, ours = pair(name)
    mels = [towers.mel(tower, n) for n in (30, 7, 53, 52)]
    longest = max(map(len, mels))
    features = np.zeros((len(mels), longest, mels[0].shape[1]), np.float32)
    mask = np.zeros((len(mels), longest), bool)
    for i, mel in enumerate(mels):
        features[i, : len(mel)], mask[i, : len(mel)] = mel, True
    with torch.no_grad():
        out = theirs.model.get_audio_features(torch.from_numpy(features), torch.from_numpy(mask))
    for soft, theirs_padded, valid in zip(ours.audio.encode(mels), out.pooler_output, out.attention_mask, strict=True):
        assert difference(soft, theirs_padded[valid].numpy()) is None


@pytest.mark.parametrize("name", TOWERS)
def test_company_and_threads_change_no_bit(name: str, pair: GetPair) -> None:
    tower, _, ours = pair(name)
    mels = [towers.mel(tower, n) for n in LENGTHS]
    alone = [ours.audio.encode([mel])[0] for mel in mels]
    single = gemma4.load(ours.checkpoint.path, precision="exact", threads=1)
    for model, names in [(ours, []), (ours, "*"), (single, []), (single, "audio.blocks.1.attn.hook_pattern")]:
        together, _ = model.audio.run_with_cache(mels[::-1], names)
        assert all(same_bits(a, b) for a, b in zip(together[::-1], alone, strict=True))


def test_hooks_edit_the_tower(pair: GetPair) -> None:
    tower, _, ours = pair("audio")
    mel = towers.mel(tower, 61)
    [plain], [before] = ours.audio.run_with_cache([mel], "*")
    points = []

    def uniform(array: np.ndarray, site: gemma4.HookPoint) -> None:
        points.append((site.layer, len(site.positions)))
        array[:] = 1 / array.shape[-1]

    def zero(array: np.ndarray, site: gemma4.HookPoint) -> np.ndarray:
        return 0 * array

    hooks = [("audio.blocks.1.attn.hook_pattern", uniform), ("audio.blocks.2.hook_conv_out", zero)]
    with ours.hooks(hooks):
        [edited], [after] = ours.audio.run_with_cache([mel], "*")
    assert points == [(1, 16)]
    mean = after["audio.blocks.1.attn.hook_v"].mean(axis=0)
    np.testing.assert_allclose(after["audio.blocks.1.attn.hook_z"][3], mean, rtol=1e-4, atol=1e-6)
    assert same_bits(after["audio.blocks.2.hook_resid_conv"], after["audio.blocks.2.hook_resid_mid"])
    assert same_bits(after["audio.blocks.0.hook_resid_post"], before["audio.blocks.0.hook_resid_post"])
    assert not same_bits(edited, plain) and same_bits(ours.audio.encode([mel])[0], plain)


def test_from_samples(pair: GetPair) -> None:
    """30 s of sound are 750 soft tokens; what is too long or too short says so."""
    _, _, ours = pair("audio-real")
    samples = np.random.default_rng(0).standard_normal(16_000 * 30).astype(np.float32) / 8
    assert ours.encode_audio(samples).shape == (750, 64)
    short = ours.encode_audio(samples[:8000])
    assert short.shape == (13, 64) and same_bits(ours.encode_audio(samples[:8000], 16_000), short)
    for n in (16_000 * 31, 100):
        with pytest.raises(ValueError):
            ours.encode_audio(np.resize(samples, n))


def test_wrong_media_are_errors(pair: GetPair) -> None:
    tower, _, ours = pair("audio")
    mel = towers.mel(tower, 9)
    for wrong, message in [
        (mel[:, :5], "expected float32"),
        (mel[:0], "empty"),
        (mel[0], "expected"),
        (mel * np.nan, "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.audio.encode([wrong])


def test_damaged_towers(pair: GetPair) -> None:
    ours = pair("audio").ours
    config, tensors = ours.audio.config.engine(), ours.checkpoint.encoder_tensors("audio")
    for name in ("layers.1.lconv1d.depthwise_conv1d.weight", "output_proj.bias", "layers.0.self_attn.post.input_max"):
        with pytest.raises(FormatError, match=name):
            gemma4._engine.Encoder(ours.engine, config, {k: v for k, v in tensors.items() if k != name})
    changes: list[dict[str, Any]] = [
        *({"conv_channels": (0, 8)}, {"conv_channels": [32, 8]}, {"context_left": 1}, {"head_dim": 17}),
        *({"logit_cap": 0.0}, {"gradient_clipping": float("nan")}, {"conv_kernel": 1 << 20}),
        {"residual_weight": float("inf")},
    ]
    for change in changes:
        with pytest.raises(ValueError):
            gemma4._engine.Encoder(ours.engine, config | change, tensors)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="overlap"):
        gemma4._engine.Encoder(ours.engine, config | {"chunk": 40}, tensors)  # type: ignore[arg-type]
