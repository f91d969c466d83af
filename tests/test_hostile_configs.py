# SPDX-License-Identifier: Apache-2.0
"""Configurations of Gemma 2 and 3, in every dialect, with anything in place of any value: read or refused, never a
model other than the one that the files hold."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import convert
from small_models import F, S, write_checkpoint
from test_earlier_models import CONFIGS

import gemma4
from gemma4 import FormatError
from gemma4.load.config import MAX_LAYERS, parse_config
from gemma4.load.names import text_tensors
from gemma4.quantization.gguf_file import head

LINEAR = {"rope_type": "linear", "factor": 8.0}
OLD_ROPE = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR, "sliding_window_pattern": 6}
NEW_ROPE = {F: LINEAR | {"rope_theta": 1e6}, S: {"rope_type": "default", "rope_theta": 1e4}}
PLAIN = {key: value for key, value in CONFIGS["gemma3"].items() if key != "rope_scaling"}
OUTSIDE = {"model_type": "gemma3", "vision_config": {}, "eos_token_id": [1, 106], "tie_word_embeddings": True}
DIALECTS: dict[str, dict[str, Any]] = {
    "gemma2": CONFIGS["gemma2"] | {"rope_theta": 1e4, "final_logit_softcapping": 30.0, "hidden_act": "gelu"},
    "gemma3, old": PLAIN | OLD_ROPE,
    "gemma3, new": PLAIN | {"rope_parameters": NEW_ROPE, "layer_types": [*[S] * 5, F]},
    "gemma3, multimodal": OUTSIDE | {"text_config": PLAIN | OLD_ROPE},
}
NEVER_THERE = (
    "_sliding_window_pattern", "rope_scaling", "rope_parameters", "use_bidirectional_attention", "attention_bias",
    "hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "layer_types", "rms_norm_eps",
    "tie_word_embeddings", "bos_token_id", "pad_token_id", "vision_config",
)  # fmt: skip
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**400, 10**5000, 0.0, -1.5, 0.99999999999, 1e-300, 1e300,
    float("nan"), float("inf"), "", "linear", "\ud800", [], [1], [S] * 6, [None] * 6, [[]] * 6, {}, {F: {}},
    {F: 1, S: 1}, {"rope_type": []}, {"rope_type": "linear", "factor": "8"}, {F: LINEAR | {"factor": 1e-300}},
]  # fmt: skip


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys of nested objects."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    table = raw
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return raw


@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_value_of_any_key_is_read_or_refused(dialect: str) -> None:
    raw = DIALECTS[dialect]
    parse_config(raw)
    inside = ("text_config",) if "text_config" in raw else ()
    refused = 0
    for path in {*places(raw), *((*inside, key) for key in NEVER_THERE)}:
        for value in HOSTILE:
            refused += 1
            with contextlib.suppress(FormatError, NotImplementedError):
                config = parse_config(changed(raw, path, value))
                assert 0 < config.n_layers <= MAX_LAYERS and 0 < config.attention_scale <= 1000
                if config.n_layers < 50:
                    assert text_tensors(config)
                    ropes = config.engine()["rope_inv_freq"]
                    assert all(np.isfinite(rope).all() and (rope >= 0).all() for rope in ropes), (path, value)
                refused -= 1
    assert refused > 200


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "rope_theta"])
@pytest.mark.parametrize("value", [None, "8", [8], {}, -1, True, float("nan"), 10**5000], ids=range(8))
def test_an_error_names_the_key_and_the_range(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=rf"config\.json: .*{key} is .*, expected an? (integer|number) in "):
        parse_config(DIALECTS["gemma3, old"] | {key: value})


@pytest.mark.parametrize("value", [None, [], "gemma3_text", 3])
def test_a_missing_text_config_is_named(value: Any) -> None:
    with pytest.raises(FormatError, match='model_type "gemma3" needs an object "text_config"'):
        parse_config(DIALECTS["gemma3, multimodal"] | {"text_config": value})


@pytest.mark.parametrize("inner", ["gemma2", "gemma4_text", "gemma4", "siglip", 3, None, ["gemma3_text"]])
def test_a_text_config_of_another_model_is_refused(inner: Any) -> None:
    raw = changed(DIALECTS["gemma3, multimodal"], ("text_config", "model_type"), inner)
    with pytest.raises(FormatError, match=r'text_config: model_type is .*, expected "gemma3_text"'):
        parse_config(raw)


# -- scaled positions under either name --------------------------------------------------------------------------------


@pytest.mark.parametrize("under", [("rope_scaling",), ("rope_parameters", "rope_scaling")])
def test_a_table_by_layer_type_may_be_called_rope_scaling(under: tuple[str, ...]) -> None:
    """transformers passes over it there, and positions of global layers would not be scaled."""
    config = parse_config(PLAIN | dict.fromkeys(under, NEW_ROPE))
    assert config == parse_config(DIALECTS["gemma3, new"])
    assert (config.rope[F].factor, config.rope[S].factor) == (8.0, 1.0)


def test_two_tables_that_differ_are_refused() -> None:
    other = changed(NEW_ROPE, (F, "factor"), 4.0)
    with pytest.raises(FormatError, match=r"rope_scaling is .*expected the same as rope_parameters"):
        parse_config(PLAIN | {"rope_parameters": NEW_ROPE, "rope_scaling": other})


# -- a configuration of other weights ----------------------------------------------------------------------------------

DISAGREEMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fewer layers": ("gemma3", {"num_hidden_layers": 5}, r"says 5 layers, but the files hold 'model\.layers\.5\."),
    "far fewer layers": ("gemma2", {"num_hidden_layers": 1, "layer_types": [S]}, "says 1 layers, but the files hold"),
    "more layers": ("gemma3", {"num_hidden_layers": 7}, r"model\.layers\.6\..* of 7 layers needs"),
    "types of fewer layers": ("gemma3", {"layer_types": [S] * 5}, "layer_types is 5 entries"),
    "Gemma 3 called Gemma 2": ("gemma3", {"model_type": "gemma2"}, r"says gemma2, which has no 'self_attn\.[kq]_norm"),
    "Gemma 2 called Gemma 3": ("gemma2", {"model_type": "gemma3_text"}, r"self_attn\.q_norm\.weight"),
    "Gemma 2 called VaultGemma": ("gemma2", {"model_type": "vaultgemma"}, "which has no 'post_attention_layernorm"),
    "VaultGemma called Gemma 2": ("vaultgemma", {"model_type": "gemma2"}, "post_attention_layernorm"),
    "Gemma 3 called Gemma 4": ("gemma3", {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                          "global_head_dim": 16}, "layer_scalar"),
    "wider": ("gemma3", {"hidden_size": 64}, "has shape .*the config asks for"),
    "fewer heads": ("gemma3", {"num_attention_heads": 2}, "has shape .*the config asks for"),
    "smaller vocabulary": ("gemma2", {"vocab_size": 300}, "has shape .*the config asks for"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_weights_of_another_configuration(case: str, tmp_path: Path) -> None:
    name, changes, message = DISAGREEMENTS[case]
    write_checkpoint(tmp_path, CONFIGS[name])
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    with pytest.raises(FormatError, match=message):
        gemma4.load(tmp_path)


def test_fewer_layers_in_a_gguf_file(tmp_path: Path) -> None:
    plain = CONFIGS["gemma3"] | {"query_pre_attn_scalar": 16}
    path = convert(write_checkpoint(tmp_path / "hf", plain), tmp_path / "x.gguf", keys={"gemma3.block_count": 5})
    with pytest.raises(FormatError, match=r"says 5 layers, but the files hold 'blk\.5\."):
        gemma4.load(path)


def test_tensors_beside_the_layers_are_no_layers(tmp_path: Path) -> None:
    """Encoders and what training left behind may be there."""
    from safetensors.numpy import load_file, save_file

    write_checkpoint(tmp_path, CONFIGS["gemma3"])
    tensors = load_file(tmp_path / "model.safetensors")
    one = np.ones(4, np.float32)
    more = {
        "vision_tower.vision_model.encoder.layers.9.layer_norm1.weight": one,
        "model.layers.0.self_attn.rotary_emb.inv_freq": one,
        "mtp.layers.7.input_layernorm.weight": one,
        "model.layers_of_another.9.weight": one,
    }
    save_file(tensors | more, tmp_path / "model.safetensors")
    with gemma4.load(tmp_path) as model:
        assert set(model.checkpoint.ignored) == set(more)


def test_other_gemmas_are_named(tmp_path: Path) -> None:
    for model_type in ("gemma", "gemma3n", "shieldgemma2", "t5gemma"):
        with pytest.raises(NotImplementedError, match=f"unsupported architecture '{model_type}'"):
            parse_config({"model_type": model_type, "text_config": PLAIN})
    (tmp_path / "x.gguf").write_bytes(head({"general.architecture": "gemma3n"}, []))
    with pytest.raises(NotImplementedError, match="gemma3n"):
        gemma4.load(tmp_path / "x.gguf")
