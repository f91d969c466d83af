# SPDX-License-Identifier: Apache-2.0
"""Encoders in a file of their own beside a GGUF model: the same soft tokens as from the safetensors they came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_files import convert, convert_mmproj, pair, raw, string
from small_models import MULTIMODAL, write_multimodal_checkpoint

import gemma4
from gemma4.cli import main
from gemma4.errors import FormatError

gguf = pytest.importorskip("gguf")

CONVERTER = Path(os.environ.get("GEMMA4_LLAMACPP", "/nonexistent")) / "convert_hf_to_gguf.py"
KINDS = sorted(MULTIMODAL)
PICTURES = [
    np.random.default_rng(i).integers(0, 256, size).astype(np.uint8)
    for i, size in enumerate([(90, 60, 3), (48, 200, 3)])
]
SOUND = 0.1 * np.random.default_rng(3).standard_normal(30_000).astype(np.float32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """kind -> (Hugging Face directory, text model as GGUF alone in its folder)"""
    folder = tmp_path_factory.mktemp("sources")
    out = {}
    for kind in KINDS:
        source = write_multimodal_checkpoint(folder / kind, kind)
        (folder / f"{kind}-gguf").mkdir()
        out[kind] = source, convert(source, folder / f"{kind}-gguf" / "model.gguf")
    return out


def soft_tokens(model):
    """Of two pictures, and of a sound if the model hears: a list of float32 [n, d_model]."""
    out = [model.encode_image(picture, 70) for picture in PICTURES]
    assert len(out[0]) > 48
    return out + ([model.encode_audio(SOUND)] if model.modalities.audio else [])


def same_bits(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x.view(np.uint32), y.view(np.uint32)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_same_soft_tokens(sources, tmp_path, kind, precision, dtype):
    source, text = sources[kind]
    path = convert_mmproj(source, tmp_path / "x.gguf", dtype)
    with (
        gemma4.load(source, precision=precision) as expected,
        gemma4.load(text, mmproj=path, precision=precision) as model,
    ):
        assert dict(model.checkpoint.encoders) == dict(expected.checkpoint.encoders)
        assert model.modalities.image and model.modalities.audio == (kind != "large")
        assert same_bits(soft_tokens(model), soft_tokens(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["F16", "Q8_0"])
def test_rounded_weights(sources, tmp_path, kind, dtype):
    """The same as from a file that holds their values in float32, to the bit, and near the unrounded ones."""
    source, text = sources[kind]
    path = convert_mmproj(source, tmp_path / "x.gguf", dtype)
    tensors = gguf.GGUFReader(path).tensors
    assert dtype in {tensor.tensor_type.name for tensor in tensors}
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    plain = convert_mmproj(source, tmp_path / "plain.gguf", "F32", change=values)
    with gemma4.load(text, mmproj=path, precision="exact") as model, gemma4.load(text, mmproj=plain) as expected:
        found = soft_tokens(model)
        assert same_bits(found, soft_tokens(expected))
    with gemma4.load(source) as unrounded:
        for ours, wanted in zip(found, soft_tokens(unrounded), strict=True):
            assert np.abs(ours - wanted).max() <= {"F16": 2e-3, "Q8_0": 0.2}[dtype] * np.abs(wanted).max()


def test_softplus_of_float32_weights_is_undone_but_for_rounding(tmp_path):
    """The file holds the softplus rounded to float32, which several float32 have: audio may differ in the last bits."""
    source = write_multimodal_checkpoint(tmp_path / "source", "effective", np.float32)
    text = convert(source, tmp_path / "model.gguf")
    path = convert_mmproj(source, tmp_path / "x.gguf")
    with gemma4.load(source) as expected, gemma4.load(text, mmproj=path, precision="exact") as model:
        assert same_bits([model.encode_image(PICTURES[0])], [expected.encode_image(PICTURES[0])])
        found, wanted = model.encode_audio(SOUND), expected.encode_audio(SOUND)
        assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_softplus_of_any_size_is_undone():
    from gemma4.load.mmproj import _before_softplus

    steps = np.geomspace(1e-3, 80, 4001)
    x = np.concatenate([steps, -steps, [0.0]]).astype(ml_dtypes.bfloat16)
    stored = np.logaddexp(0, x.astype(np.float64)).astype(np.float32)
    assert np.array_equal(_before_softplus(stored, "x"), x.astype(np.float32))


def test_logits_of_a_prompt_that_holds_a_picture_and_a_sound(tmp_path):
    text = convert("tiny-e", tmp_path / "tiny-e.gguf")
    path = convert_mmproj(Path(gemma4.__file__).parent / "pretrained" / "tiny-e", tmp_path / "mmproj-tiny-e.gguf")
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": [*content, {"type": "audio", "audio": SOUND}]}]
    with gemma4.load("tiny-e", precision="exact") as expected, gemma4.load(text, precision="exact") as model:
        prompts = [m.to_prompt(messages, image_tokens=70) for m in (model, expected)]
        assert np.array_equal(prompts[0].ids, prompts[1].ids)
        assert same_bits([model.forward(prompts[0])], [expected.forward(prompts[1])])
        assert f"vision and audio encoders of {path}, found beside the model" in str(model.info())


# -- which file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair_of_files(sources, tmp_path):
    """(text model, its mmproj), alone in a folder"""
    source, text = sources["effective"]
    (tmp_path / "model.gguf").write_bytes(text.read_bytes())
    return tmp_path / "model.gguf", convert_mmproj(source, tmp_path / "mmproj-F32.gguf")


def test_found_beside_the_model(pair_of_files):
    text, path = pair_of_files
    with gemma4.load(text) as model:
        assert model.encode_image(PICTURES[0]).shape[1] == 48
        assert f"{path}, found beside the model" in str(model.info())
    path.rename(path.with_name("MMPROJ.GGUF"))
    with gemma4.load(text) as model:
        assert "audio" in model.checkpoint.encoders


def test_several_beside_the_model(pair_of_files):
    text, path = pair_of_files
    path.with_name("mmproj-F16.gguf").write_bytes(path.read_bytes())
    with gemma4.load(text) as model:
        assert "2 mmproj files beside the model, none used: name one of mmproj-F16.gguf, mmproj-F32.gguf" in str(
            model.info()
        )
        assert not model.modalities.image
    with gemma4.load(text, mmproj=path) as model:
        assert model.modalities.image and "found beside" not in str(model.info())


def test_one_beside_that_does_not_fit_is_said_and_not_used(pair_of_files):
    text, path = pair_of_files
    path.write_bytes(b"GGUF and nonsense that is longer than a head")
    with gemma4.load(text) as model:
        assert not model.modalities.image
        assert "mmproj-F32.gguf, found beside the model, is not used" in str(model.info())
    with pytest.raises(FormatError, match=r"mmproj-F32\.gguf"):
        gemma4.load(text, mmproj=path)


def test_none(sources):
    with gemma4.load(sources["effective"][1]) as model:
        with pytest.raises(NotImplementedError, match=r"model.gguf has no vision encoder.*mmproj="):
            model.encode_image(PICTURES[0])
        assert model.checkpoint.notes == ()


def test_only_gguf_models_take_one(sources, tmp_path):
    with pytest.raises(ValueError, match=r"mmproj 'x\.gguf': only a \.gguf model"):
        gemma4.load(sources["effective"][0], mmproj="x.gguf")
    with pytest.raises(FileNotFoundError, match=r"nowhere.gguf"):
        gemma4.load(sources["effective"][1], mmproj=tmp_path / "nowhere.gguf")


def test_a_file_that_changes_later(pair_of_files):
    text, path = pair_of_files
    with gemma4.load(text) as model:
        model.encode_image(PICTURES[0])
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(FormatError, match=r"mmproj-F32.gguf changed size"):
            model.encode_image(PICTURES[0])


def test_command_line(pair_of_files, capsys):
    text, path = pair_of_files
    moved = path.rename(path.with_name("encoders.gguf"))
    assert main(["info", "--model", str(text)]) == 0 and "encoder" not in capsys.readouterr().out
    assert main(["info", "--model", str(text), "--mmproj", str(moved)]) == 0
    assert f"vision and audio encoders of {moved}" in capsys.readouterr().out
    assert main(["bench", str(text), "--mmproj", str(text), "--prompt", "4", "--decode", "4"]) == 2
    assert "model.gguf: general.architecture is 'gemma4', expected 'clip'" in capsys.readouterr().err


# -- files that are wrong ----------------------------------------------------------------------------------------------

WRONG_KEYS = {
    "architecture": ({"general.architecture": "gemma4"}, "general.architecture is 'gemma4', expected 'clip'"),
    "no encoder": ({"clip.has_vision_encoder": False, "clip.has_audio_encoder": None}, "clip.has_vision_encoder is"),
    "flag": ({"clip.has_vision_encoder": 1}, "clip.has_vision_encoder is 1, expected true or false"),
    "projector": ({"clip.vision.projector_type": "gemma3"}, "projector_type is gemma3, expected gemma4v or gemma4uv"),
    "no projector": ({"clip.audio.projector_type": None}, "projector_type is None, expected gemma4a or gemma4ua"),
    "width": ({"clip.vision.projection_dim": 2048}, "projection_dim is 2048, expected 48, the width of the text model"),
    "no width": ({"clip.audio.projection_dim": None}, "clip.audio.projection_dim is None, expected an integer"),
    "mean": ({"clip.vision.image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.5, 0.5, 0.5\], expected \[0, 0, 0\]"),
    "layers": ({"clip.vision.block_count": 3}, r"the tensor v.blk.2.\S+ is missing, which its vision_tower needs"),
    "more layers": ({"clip.vision.block_count": 1 << 30}, "block_count is 1073741824, expected an integer in 1..1024"),
    "fewer layers": ({"clip.audio.block_count": 1}, "'a.blk.1.*, which no Gemma 4 audio encoder has"),
    "heads": ({"clip.vision.attention.head_count": 3}, "v.blk.0.attn_q.weight|num_key_value_heads"),
    "audio heads": ({"clip.audio.attention.head_count": 3}, "audio encoder: hidden_size is 64"),
    "patch": ({"clip.vision.patch_size": 14}, r"v.patch_embd.weight has shape \[64, 3, 16, 16\]"),
    "mlp": ({"clip.vision.feed_forward_length": 97}, r"ffn_gate.weight has shape \[96, 64\].* \[97, 64\]"),
    "epsilon": ({"clip.vision.attention.layer_norm_epsilon": -1.0}, "layer_norm_epsilon is -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG_KEYS))
def test_wrong_metadata(sources, tmp_path, case):
    source, text = sources["effective"]
    keys, words = WRONG_KEYS[case]
    path = convert_mmproj(source, tmp_path / "wrong.gguf", keys=keys)
    with pytest.raises(FormatError, match=f"wrong.gguf.*(?:{words})"):
        gemma4.load(text, mmproj=path)


WRONG_TENSORS = {
    "missing map": ({"v.blk.1.ffn_up.weight": None}, "v.blk.1.ffn_up.weight is missing"),
    "missing bound": ({"a.blk.0.attn_q.output_min": None}, "a.blk.0.attn_q.output_min is missing"),
    "missing table": ({"v.position_embd.weight": None}, "v.position_embd.weight is missing"),
    "missing convolution": ({"a.conv1d.1.weight": None}, "a.conv1d.1.weight is missing"),
    "table of one axis": ({"v.position_embd.weight": np.zeros((64, 64), "f4")}, "a tensor of 3 dimensions"),
    "narrow norm": ({"v.blk.0.ln1.weight": np.zeros(63, "f4")}, r"v.blk.0.ln1.weight has shape \[63\]"),
    "projection": ({"mm.input_projection.weight": np.zeros((47, 64), "f4")}, r"shape \[47, 64\].* \[48, 64\]"),
    "unknown": ({"a.conv1d.0.bias": np.zeros(128, "f4")}, "'a.conv1d.0.bias', which no Gemma 4 audio encoder has"),
    "odd channels": ({"a.conv1d.0.weight": np.zeros((126, 1, 3, 3), "f4")}, r"channels\[0\] is 126"),
}


@pytest.mark.parametrize("case", sorted(WRONG_TENSORS))
def test_wrong_tensors(sources, tmp_path, case):
    source, text = sources["effective"]
    change, words = WRONG_TENSORS[case]
    path = convert_mmproj(source, tmp_path / "wrong.gguf", change=change)
    with pytest.raises(FormatError, match=f"wrong.gguf.*{words}"):
        gemma4.load(text, mmproj=path)


def test_values_that_no_softplus_gives(sources, tmp_path):
    source, text = sources["effective"]
    for value in (0.0, -1.0, np.nan, np.inf):
        change = {"a.blk.1.per_dim_scale.weight": np.full(16, value, "f4")}
        path = convert_mmproj(source, tmp_path / "wrong.gguf", change=change)
        with gemma4.load(text, mmproj=path) as model, pytest.raises(FormatError, match=r"wrong.gguf: a.blk.1.per_dim"):
            model.encode_audio(SOUND)


def test_damaged_files(sources, tmp_path):
    """Cut anywhere, or with bytes of the head changed: loaded, or FormatError (NotImplementedError: another type)."""
    source, text = sources["effective"]
    good = convert_mmproj(source, tmp_path / "good.gguf").read_bytes()
    path, rng, refused = tmp_path / "damaged.gguf", np.random.default_rng(0), 0
    for i in range(120):
        data = bytearray(good)
        if i % 3:
            for at in rng.integers(0, 20_000, 3):
                data[at] = rng.integers(256)
        else:
            del data[int(rng.integers(len(data))) :]
        path.write_bytes(data)
        try:
            gemma4.load(text, mmproj=path).close()
        except (FormatError, NotImplementedError) as error:
            refused += 1
            assert "damaged.gguf" in str(error)
    assert refused >= 40


def test_an_mmproj_given_as_the_model(tmp_path):
    (tmp_path / "mmproj-x.gguf").write_bytes(raw([pair("general.architecture", 8, string("clip"))]))
    with pytest.raises(NotImplementedError, match=r"'clip': image and audio encoders; load the text model.*mmproj="):
        gemma4.load(tmp_path / "mmproj-x.gguf")


# -- llama.cpp's own converter, for whoever has it: GEMMA4_LLAMACPP=its folder -----------------------------------------


@pytest.mark.skipif(not CONVERTER.is_file(), reason="GEMMA4_LLAMACPP names no llama.cpp")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "q8_0"])
def test_files_of_the_converter(sources, tmp_path, kind, dtype):
    source, text = sources[kind]
    path = tmp_path / "mmproj.gguf"
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(source / name)
    config = json.loads((source / "config.json").read_text())
    architecture = "Gemma4UnifiedForConditionalGeneration" if kind == "unified" else "Gemma4ForConditionalGeneration"
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(_explicit(config) | {"architectures": [architecture]}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0] * 3, "image_std": [1] * 3}))
    command = [sys.executable, CONVERTER, "--mmproj", "--outtype", dtype, "--outfile", path, folder]
    subprocess.run(command, check=True, capture_output=True)
    bound = {"f32": 0, "bf16": 0, "f16": 2e-3, "q8_0": 0.2}[dtype]
    with gemma4.load(source) as expected, gemma4.load(text, mmproj=path, precision="exact") as model:
        assert dict(model.checkpoint.encoders) == dict(expected.checkpoint.encoders)
        for found, wanted in zip(soft_tokens(model), soft_tokens(expected), strict=True):
            assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def _explicit(config):
    """The converter wants numbers that transformers has defaults for."""
    vision = {"patch_size": 16, "pooling_kernel_size": 3} | config["vision_config"]
    audio = config["audio_config"]
    if audio is not None:
        audio = {"audio_embed_dim": 640} | audio
    return config | {"vision_config": vision, "audio_config": audio}
