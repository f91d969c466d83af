# SPDX-License-Identifier: Apache-2.0
"""Every field of the text config on its own and in combinations that no released model has: each site follows from the
sites before it, and no way of running changes a bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gemma4
from gemma4 import _engine
from gemma4.interp.sites import SiteTable

from . import steps, variants
from .compare import difference, same_bits
from .test_exactness import assert_same

Load = Callable[..., gemma4.Model]
Sites = dict[str, NDArray[Any]]
N = 41
PLAIN = dict.fromkeys(("q_norm", "k_norm", "v_norm", "post_norms", "layer_scalar"), False)
COMBINATIONS: list[dict[str, Any]] = [
    {},
    PLAIN | {"attention_scale": 0.3},
    {"k_norm": False},
    {"v_norm": False},
    {"q_norm": False, "attention_scale": 0.2, "attention_softcap": 1.5},
    {"post_norms": False, "attention_softcap": 4.0},
    {"layer_scalar": False, "attention_scale": 1.7},
    {"unit_gains": True, "attention_scale": 0.25},
    PLAIN | {"unit_gains": True, "attention_scale": 0.1, "attention_softcap": 0.7},
]
# Fields that are no option of the forward pass, or that variants.py varies with the shapes of weights
IN_VARIANTS = frozenset(
    {"d_model", "n_heads", "d_vocab", "d_ple", "d_vocab_ple", "n_experts", "top_k_experts", "d_expert", "layers"}
    | {"rms_norm_eps", "logit_softcap", "embed_scale", "ple_scale", "pad_token", "ple_on_disk", "tied"}
    | {"context_length", "rope_inv_freq"}
)
# "moe26b" and "everything" have values that are the keys' projection, and pairs that do not rotate
NAMES = ["moe26b", "everything", "odd-e", "gemma3"]


def with_fields(model: gemma4.Model, fields: dict[str, Any]) -> gemma4.Model:
    """The same weights in an engine that is told otherwise."""
    other = copy.copy(model)
    config: Any = dict(model.engine_config)
    # what the model has no tensors for stays off
    config |= {key: value for key, value in fields.items() if key not in PLAIN or config[key]}
    other.engine_config, other.engine = config, _engine.Model(config, model.checkpoint.engine_tensors, threads=1)
    other.sites = SiteTable(other.engine.sites(), config["layers"])
    return other


def test_every_field_is_varied(loaded: Load) -> None:
    """A new field fails here until a combination above has it, or the list of those that variants.py varies."""
    combined = {key for fields in COMBINATIONS for key in fields}
    assert set(loaded("gemma2").engine_config) == combined | IN_VARIANTS


def rms(x: NDArray[Any], eps: float) -> NDArray[Any]:
    return x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + eps)


def near(ours: NDArray[Any], expected: NDArray[Any]) -> None:
    assert difference(ours, expected.astype(np.float32)) is None


def check_heads(model: gemma4.Model, layer: int, s: Sites) -> None:
    """Norms of queries, keys and values."""
    config, eps = model.engine_config, model.engine_config["rms_norm_eps"]
    for part in ("q", "k", "v"):
        projected, normed = s.get(f"attn.hook_{part}"), f"attn.hook_{part}_normed"
        made = part == "q" or config["layers"][layer]["kv_source"] == layer
        assert (normed in s) == (made and config[f"{part}_norm"])  # type: ignore[literal-required]
        if not made:
            continue
        expected = s["attn.hook_k"] if projected is None else projected  # values that are the keys' projection
        if normed in s:
            expected = rms(expected, eps)
            if part != "v":
                expected = expected * model.gain(f"layers.{layer}.self_attn.{part}_norm")
            near(s[normed], expected)
        if part == "v":
            near(s["attn.hook_v_used"], expected)
        else:
            near(np.linalg.norm(s[f"attn.hook_rot_{part}"], axis=-1), np.linalg.norm(expected, axis=-1))
            near(s[f"attn.hook_rot_{part}"][0], expected[0])  # position 0 is not rotated


def check_scores(model: gemma4.Model, s: Sites) -> None:
    """q . k by the scale, then the softcap, then the mask."""
    scale, cap = model.engine_config["attention_scale"], model.engine_config["attention_softcap"]
    q, k = s["attn.hook_rot_q"].astype(np.float64), s["attn.hook_k_used"].astype(np.float64)
    scores = np.einsum("thd,shd->hts", q, k.repeat(q.shape[1] // k.shape[1], 1)) * scale
    scores = cap * np.tanh(scores / cap) if cap else scores
    near(s["attn.hook_attn_scores"], np.where(np.isneginf(s["attn.hook_attn_scores"]), -np.inf, scores))


def check_branches(model: gemma4.Model, layer: int, s: Sites) -> None:
    """What is added to the residual stream, and the scalar."""
    config, eps = model.engine_config, model.engine_config["rms_norm_eps"]
    branches = [("attn.hook_out", "ln1_post", "post_attention_layernorm", "hook_attn_out")]
    mlp = "moe.hook_sum" if "moe.hook_sum" in s else "mlp.hook_out"
    branches += [(mlp, "ln2_post", "post_feedforward_layernorm", "hook_mlp_out")]
    for before, norm, tensor, after in branches:
        assert (f"{norm}.hook_scale" in s) == config["post_norms"]
        normed = rms(s[before], eps) * model.gain(f"layers.{layer}.{tensor}") if config["post_norms"] else s[before]
        near(s[after], normed)
    total = s["hook_resid_pre"] + s["hook_attn_out"] + s["hook_mlp_out"] + s.get("hook_ple_out", 0)
    assert ("hook_resid_unscaled" in s) == config["layer_scalar"]
    near(s["hook_resid_post"], total * model.layer_scalar(layer))
    near(s["ln1.hook_out"], rms(s["hook_resid_pre"], eps) * model.gain(f"layers.{layer}.input_layernorm"))


@pytest.mark.parametrize("fields", COMBINATIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sites_follow_from_each_other(name: str, fields: dict[str, Any], loaded: Load) -> None:
    model = with_fields(loaded(name), fields)
    ids = variants.token_ids(variants.BY_NAME[name], N).numpy().astype(np.int32)
    whole = steps.whole(model, ids)
    for layer in range(model.n_layers):
        prefix = f"blocks.{layer}."
        s = {key.removeprefix(prefix): value for key, value in whole.sites.items() if key.startswith(prefix)}
        check_heads(model, layer, s)
        check_scores(model, s)
        check_branches(model, layer, s)
    near(whole.sites["ln_final.hook_out"], whole.sites["ln_final.hook_normalized"] * model.gain("norm"))
    assert_same(steps.whole(model, ids, max_chunk=7), whole)
    quiet = np.zeros_like(whole.logits)
    model.engine.step([(model.engine.new_sequence(), ids, None, np.arange(N, dtype=np.int32), quiet)])
    assert same_bits(quiet, whole.logits)
    sequence = model.engine.new_sequence()
    model.engine.step([(sequence, ids[:30], None, None, None)])
    for t in range(30, N):  # token by token
        [account] = steps.run(model, [(sequence, ids[t : t + 1])])
        assert same_bits(account.logits, whole.logits[t : t + 1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_scale", 0.0),
        ("attention_scale", -1.0),
        ("attention_scale", float("nan")),
        ("attention_scale", float("inf")),
        ("attention_softcap", -1.0),
        ("attention_softcap", float("nan")),
        ("attention_softcap", float("inf")),
    ],
)
def test_numbers_out_of_range(field: str, value: float, loaded: Load) -> None:
    model = loaded("gemma2")
    config: Any = model.engine_config | {field: value}
    with pytest.raises(ValueError, match=field):
        _engine.Model(config, model.checkpoint.engine_tensors, threads=1)


@pytest.mark.parametrize("ahead", [-1, (1 << 30) + 1])
def test_ahead_out_of_range(ahead: int, loaded: Load) -> None:
    model = loaded("gemma2")
    config = copy.deepcopy(model.engine_config)
    config["layers"][1]["ahead"] = ahead
    with pytest.raises(ValueError, match="ahead"):
        _engine.Model(config, model.checkpoint.engine_tensors, threads=1)
