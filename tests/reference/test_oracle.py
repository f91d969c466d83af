# SPDX-License-Identifier: Apache-2.0
"""The oracle is right: what it computes itself agrees with what transformers' modules recorded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from . import oracle, site_list, variants
from .conftest import Reference

Get = Callable[[str, int], Reference]
N = 13
NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
EVERY_VARIANT = pytest.mark.parametrize("name", [v.name for v in variants.VARIANTS])


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 3e-6) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def text_and_sites(reference: Get, name: str) -> tuple[Any, oracle.Recording, oracle.Sites]:
    found = reference(name, N)
    return oracle.text_model(found.checkpoint.model), found.recording, found.sites


def blocks(text: Any, sites: oracle.Sites) -> list[tuple[Any, dict[str, np.ndarray]]]:
    """Each layer's module, with its sites under their names within the layer."""
    found = []
    for i, block in enumerate(text.layers):
        prefix = f"blocks.{i}."
        found.append((block, {n.removeprefix(prefix): s for n, s in sites.items() if n.startswith(prefix)}))
    return found


@EVERY_VARIANT
def test_has_every_site_in_its_shape(reference: Get, name: str) -> None:
    sites = reference(name, N).sites
    assert {n: s.shape for n, s in sites.items()} == site_list.expected(reference(name, N).checkpoint.model, N)
    assert {s.dtype for n, s in sites.items() if not n.endswith("expert_ids")} == {np.dtype(np.float32)}


@EVERY_VARIANT
def test_directory_is_what_transformers_loads(reference: Get, name: str) -> None:
    variant, directory, model = reference(name, N).checkpoint
    cls = variant.model_class if variant.multimodal else AutoModelForCausalLM
    loaded = cls.from_pretrained(directory, dtype=torch.float32, **variants.eager(variant)).eval()
    variants.round_to(loaded, variants.DTYPES[variant.dtype])
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    again = oracle.record(loaded, variants.token_ids(variant, N))
    close(again.logits.numpy(), reference(name, N).recording.logits.numpy(), 2e-5)  # another memory layout, another sum


@EVERY_VARIANT
def test_residual_stream_adds_up(reference: Get, name: str) -> None:
    text, _, sites = text_and_sites(reference, name)
    before = sites["hook_embed"]
    for block, s in blocks(text, sites):
        assert np.array_equal(s["hook_resid_pre"], before)
        terms = [s["hook_resid_pre"], s["hook_attn_out"], s["hook_mlp_out"], s.get("hook_ple_out", np.float32(0))]
        scalar = block.layer_scalar.numpy() if hasattr(block, "layer_scalar") else np.float32([1])
        close(s["hook_resid_post"], scalar * sum(terms))
        if "hook_resid_unscaled" in s:
            assert np.array_equal(s["hook_resid_post"], s["hook_resid_unscaled"] * scalar)
        before = s["hook_resid_post"]


@EVERY_VARIANT
def test_norms_give_what_the_modules_gave(reference: Get, name: str) -> None:
    text, recording, sites = text_and_sites(reference, name)
    for i, (block, s) in enumerate(blocks(text, sites)):
        for site, module in NORMS.items():
            if not hasattr(block, module):
                assert f"{site}.hook_normalized" not in s
                continue
            gained = s[f"{site}.hook_normalized"] * gain(name, getattr(block, module))
            close(gained, recording.made[f"layers.{i}.{module}"][0][0].numpy())
            assert np.array_equal(recording.given[f"layers.{i}.{module}"][0][0].numpy(), _norm_input(site, s))
    close(sites["ln_final.hook_normalized"] * gain(name, text.norm), sites["ln_final.hook_out"])


def gain(name: str, norm: Any) -> np.ndarray:
    return norm.weight.detach().numpy() + variants.BY_NAME[name].stores_unit_gains


def _norm_input(site: str, s: dict[str, np.ndarray]) -> np.ndarray:
    """The site that the norm reads."""
    mlp = s.get("moe.hook_sum", s["mlp.hook_out"])
    inputs = {"ln1": s["hook_resid_pre"], "ln1_post": s["attn.hook_out"], "ln2": s["hook_resid_mid"], "ln2_post": mlp}
    return inputs[site]


@EVERY_VARIANT
def test_attention_parts_agree(reference: Get, name: str) -> None:
    text, _, sites = text_and_sites(reference, name)
    for block, s in blocks(text, sites):
        scores, pattern = s["attn.hook_attn_scores"], s["attn.hook_pattern"]
        soft = torch.softmax(torch.from_numpy(scores), -1).numpy()
        close(soft, pattern)
        assert np.array_equal(np.isneginf(scores), np.broadcast_to(_masked(block.self_attn), scores.shape))
        groups = block.self_attn.num_key_value_groups
        close(np.einsum("hts,shd->thd", pattern, s["attn.hook_v_used"].repeat(groups, 1)), s["attn.hook_z"])
        close(s["attn.hook_result"].sum(1), s["attn.hook_out"])


def _masked(attention: Any) -> np.ndarray:
    """[T, S]: keys a query may not see, by the definition of the window."""
    query, key = np.mgrid[:N, :N]
    window = attention.sliding_window or N
    return (key > query) | (key <= query - window)


@EVERY_VARIANT
def test_keys_and_values_come_from_their_donors(reference: Get, name: str) -> None:
    text, _, sites = text_and_sites(reference, name)
    donor: dict[str, dict[str, np.ndarray]] = {}
    for block, s in blocks(text, sites):
        attention = block.self_attn
        if oracle.computes_keys(attention):
            donor[attention.layer_type] = s
        source = donor[attention.layer_type]
        assert np.array_equal(s["attn.hook_k_used"], source["attn.hook_rot_k"])
        values = "attn.hook_v_normed" if "attn.hook_v_normed" in source else "attn.hook_v"
        assert np.array_equal(s["attn.hook_v_used"], source[values])
        if "attn.hook_v_normed" in s:
            raw = s.get("attn.hook_v", s["attn.hook_k"])
            rms = np.sqrt((raw**2).mean(-1, keepdims=True) + text.config.rms_norm_eps)
            close(raw / rms, s["attn.hook_v_normed"])


@EVERY_VARIANT
def test_rotation_keeps_lengths_and_the_first_position(reference: Get, name: str) -> None:
    text, _, sites = text_and_sites(reference, name)
    for _, s in blocks(text, sites):
        q, rotated = s.get("attn.hook_q_normed", s["attn.hook_q"]), s["attn.hook_rot_q"]
        assert np.array_equal(q[0], rotated[0])
        close(np.linalg.norm(rotated, axis=-1), np.linalg.norm(q, axis=-1))


@EVERY_VARIANT
def test_mlp_and_ple_parts_agree(reference: Get, name: str) -> None:
    text, _, sites = text_and_sites(reference, name)
    for i, (_, s) in enumerate(blocks(text, sites)):
        close(_gelu(s["mlp.hook_pre"]) * s["mlp.hook_pre_linear"], s["mlp.hook_post"])
        if "hook_ple_in" in s:
            token, context = sites["hook_ple_token"][:, i], sites["hook_ple_context"][:, i]
            close((token + context) * np.float32(2**-0.5), s["hook_ple_in"])
            close(_gelu(s["ple.hook_gate_pre"]), s["ple.hook_gate"])
            close(s["ple.hook_gate"] * s["hook_ple_in"], s["ple.hook_gated"])


def _gelu(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return (0.5 * wide * (1 + np.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)))).astype(np.float32)


@pytest.mark.parametrize("name", [v.name for v in variants.VARIANTS if v.text.get("enable_moe_block")])
def test_experts_add_up_and_routing_has_no_ties(reference: Get, name: str) -> None:
    text, _, sites = text_and_sites(reference, name)
    for block, s in blocks(text, sites):
        probs, ids = s["moe.hook_router_probs"], s["moe.hook_expert_ids"]
        close(torch.softmax(torch.from_numpy(s["moe.hook_router_logits"]), -1).numpy(), probs)
        chosen = np.take_along_axis(probs, ids, -1)
        weights = chosen / chosen.sum(-1, keepdims=True) * block.router.per_expert_scale.detach().numpy()[ids]
        close(weights, s["moe.hook_expert_weights"])
        rms = np.sqrt((s["hook_resid_mid"] ** 2).mean(-1, keepdims=True) + text.config.rms_norm_eps)
        gain = block.router.scale.detach().numpy() * text.config.hidden_size**-0.5
        close(s["hook_resid_mid"] / rms * gain, s["moe.hook_router_in"])
        close(s["moe.hook_expert_out"].sum(1), s["moe.hook_out"])


@EVERY_VARIANT
def test_logits_follow_from_the_last_norm(reference: Get, name: str) -> None:
    model = reference(name, N).checkpoint.model
    text, _, sites = text_and_sites(reference, name)
    cap = oracle.logit_softcap(model)
    raw = sites["ln_final.hook_out"] @ model.lm_head.weight.detach().numpy().T
    close(cap * np.tanh(raw / cap) if cap else raw, sites["hook_logits"])
    if cap:
        close(raw, sites["hook_logits_raw"])
    tied = model.lm_head.weight is text.embed_tokens.weight
    assert tied == text.config.tie_word_embeddings
