# SPDX-License-Identifier: Apache-2.0
"""Every activation site of csrc/model/sites.inc, out of transformers' own forward pass in float32, of any Gemma.

What a module takes in or gives out is recorded by hooks; keys, values and the mask are recorded where transformers'
eager attention receives them. Only what no module boundary shows (norm scales, masked scores, per-head and per-expert
outputs) is computed here, from those recordings. test_oracle.py ties each computed site back to a recorded one.
"""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

Sites = dict[str, np.ndarray]


@dataclass
class AttentionCall:
    """What one layer's attention was given and its weights: q [1, H, T, h], k, v [1, K, S, h], mask [1, 1, T, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    weights: Tensor
    scaling: float
    softcap: float | None = None


@dataclass
class Recording:
    """Copies of what went into and came out of each module of the text model, by the module's name in it."""

    given: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    made: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    logits_raw: Tensor = field(default_factory=lambda: torch.empty(0))


def text_model(model: Any) -> Any:
    """The text model inside either class of checkpoint."""
    return getattr(model.model, "language_model", model.model)


def _tensors(values: Any) -> tuple[Tensor, ...]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return tuple(v.detach().clone() for v in values if isinstance(v, Tensor))


def _hook(recording: Recording, name: str, module: torch.nn.Module, stack: ExitStack) -> None:
    def before(_module: Any, args: Any, kwargs: Any) -> None:
        recording.given[name] = _tensors([*args, kwargs.get("hidden_states")])

    def after(_module: Any, _args: Any, output: Any) -> None:
        recording.made[name] = _tensors(output)

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _code_of(text: Any) -> Any:
    """The module of transformers that the model's class is defined in."""
    return sys.modules[type(text).__module__]


def _recording_attention(recording: Recording, eager: Any) -> Any:
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, q, k, v, mask, *args, **kwargs)
        copies = [tensor.detach().clone() for tensor in (q, k, v, mask, weights)]
        options = {"scaling": kwargs["scaling"], "softcap": kwargs.get("softcap")}
        recording.attention[module.layer_idx] = AttentionCall(*copies, **options)
        return output, weights

    return attend


@torch.no_grad()
def record(model: Any, ids: Tensor, **options: Any) -> Recording:
    """Run `model` over ids [T] (one sequence from its start); options go to transformers."""
    recording = Recording()
    with ExitStack() as stack:
        text = text_model(model)
        for name, module in text.named_modules():
            if name:
                _hook(recording, name, module, stack)
        _hook(recording, "lm_head", model.lm_head, stack)
        attend = _recording_attention(recording, _code_of(text).eager_attention_forward)
        stack.enter_context(mock.patch.object(_code_of(text), "eager_attention_forward", attend))
        # output_attentions keeps transformers from dropping positions in layers that share keys
        output = model(input_ids=ids[None], use_cache=False, output_attentions=True, **options)
        recording.logits = output.logits.clone()
    recording.logits_raw = recording.made["lm_head"][0]
    return recording


@torch.no_grad()
def sites_of(model: Any, ids: Tensor) -> Sites:
    """Every site of the model for one prompt, in forward order; the model's type (expert ids int32), no batch axis."""
    return sites_from(model, record(model, ids))


@torch.no_grad()
def sites_from(model: Any, recording: Recording) -> Sites:
    text = text_model(model)
    sites: dict[str, Tensor] = dict(_embedding(text, recording))
    for layer in range(len(text.layers)):
        sites |= {f"blocks.{layer}.{name}": value for name, value in _layer(text, recording, layer).items()}
    sites |= _final(model, text, recording)
    return {name: _numpy(value) for name, value in sites.items()}


def sites_in_float64(model: Any, ids: Tensor) -> Sites:
    """The same with every operation in float64, on the weights and embedding scales that `model` has in float32."""
    softmax = torch.nn.functional.softmax
    with ExitStack() as stack:  # transformers casts to float32 wherever half precision would not do
        stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        wide = mock.patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        stack.enter_context(wide)
        sites = sites_of(copy.deepcopy(model).double(), ids)
    assert {array.dtype for array in sites.values()} <= {np.dtype(np.float64), np.dtype(np.int32)}
    return sites


def _numpy(value: Tensor) -> np.ndarray:
    kind = value.dtype if value.is_floating_point() else torch.int32
    return np.ascontiguousarray(value.detach().to(kind).numpy())


def _norm(text: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """scale [T, 1] and x / scale, before the gain."""
    scale = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + text.config.rms_norm_eps)
    return scale, x / scale


def _ple_width(text: Any) -> int:
    return getattr(text, "hidden_size_per_layer_input", 0)


def _embedding(text: Any, recording: Recording) -> dict[str, Tensor]:
    sites = {"hook_embed": recording.made["embed_tokens"][0][0]}
    if _ple_width(text):
        shape = (-1, len(text.layers), text.hidden_size_per_layer_input)
        sites["hook_ple_token"] = recording.made["embed_tokens_per_layer"][0][0].reshape(shape)
        sites["hook_ple_context"] = recording.made["per_layer_projection_norm"][0][0]
    return sites


def _layer(text: Any, recording: Recording, layer: int) -> dict[str, Tensor]:
    prefix = f"layers.{layer}"
    given = recording.given[prefix]
    sites: dict[str, Tensor] = {}
    ple = _ple_width(text)
    if ple:
        sites["hook_ple_in"] = given[1][0]
    sites["hook_resid_pre"] = given[0][0]
    sites |= _attention(text, recording, layer)
    sites["hook_resid_mid"] = sites["hook_resid_pre"] + sites["hook_attn_out"]
    sites |= _mlp(text, recording, layer, sites["hook_resid_mid"])
    sites["hook_resid_mlp"] = sites["hook_resid_mid"] + sites["hook_mlp_out"]
    if ple:
        sites |= _ple(recording, layer)
    if hasattr(text.layers[layer], "layer_scalar"):
        sites["hook_resid_unscaled"] = sites["hook_resid_mlp"] + sites.get("hook_ple_out", 0)
    sites["hook_resid_post"] = recording.made[prefix][0][0]
    return sites


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _attention(text: Any, recording: Recording, layer: int) -> dict[str, Tensor]:
    prefix, made = f"layers.{layer}", recording.made
    x, attention = recording.given[f"{prefix}.input_layernorm"][0][0], text.layers[layer].self_attn
    sites: dict[str, Tensor] = dict(zip(("ln1.hook_scale", "ln1.hook_normalized"), _norm(text, x), strict=True))
    sites["ln1.hook_out"] = made[f"{prefix}.input_layernorm"][0][0]
    sites |= _projections(attention, made, f"{prefix}.self_attn")
    sites |= _attend(attention, recording.attention[layer])
    z = recording.given[f"{prefix}.self_attn.o_proj"][0][0]
    sites["attn.hook_z"] = _heads(z, attention.head_dim)
    weight = _heads(attention.o_proj.weight, attention.head_dim)
    sites["attn.hook_result"] = torch.einsum("thd,Dhd->thD", sites["attn.hook_z"], weight)
    out = sites["attn.hook_out"] = made[f"{prefix}.self_attn.o_proj"][0][0]
    return sites | _post_norm(text, recording, "ln1_post", f"{prefix}.post_attention_layernorm", out, "hook_attn_out")


def _post_norm(text: Any, recording: Recording, norm: str, module: str, x: Tensor, out: str) -> dict[str, Tensor]:
    """What a branch adds to the residual stream, normed where the model does so."""
    if module not in recording.made:
        return {out: x}
    scale, normalized = _norm(text, x)
    return {f"{norm}.hook_scale": scale, f"{norm}.hook_normalized": normalized, out: recording.made[module][0][0]}


def _projections(attention: Any, made: dict[str, tuple[Tensor, ...]], prefix: str) -> dict[str, Tensor]:
    sites = {"attn.hook_q": _heads(made[f"{prefix}.q_proj"][0][0], attention.head_dim)}
    names = ["q_norm"]
    if computes_keys(attention):
        names += ["k_norm", "v_norm"]
        sites["attn.hook_k"] = _heads(made[f"{prefix}.k_proj"][0][0], attention.head_dim)
        if attention.v_proj is not None:
            sites["attn.hook_v"] = _heads(made[f"{prefix}.v_proj"][0][0], attention.head_dim)
    normed = {name: made[f"{prefix}.{name}"][0] for name in names if hasattr(attention, name)}
    if attention.config.model_type.startswith("gemma3"):  # norms after the heads' axis went to the front
        normed = {name: value.transpose(1, 2) for name, value in normed.items()}
    return sites | {f"attn.hook_{name}ed": value[0] for name, value in normed.items()}


def computes_keys(attention: Any) -> bool:
    return not getattr(attention, "is_kv_shared_layer", False)


def _attend(attention: Any, call: AttentionCall) -> dict[str, Tensor]:
    keys = call.k.repeat_interleave(attention.num_key_value_groups, dim=1)
    scores = (call.q @ keys.transpose(2, 3)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    sites = {"attn.hook_rot_q": call.q[0].transpose(0, 1)}
    if computes_keys(attention):
        sites["attn.hook_rot_k"] = call.k[0].transpose(0, 1)
    sites["attn.hook_k_used"] = call.k[0].transpose(0, 1)
    sites["attn.hook_v_used"] = call.v[0].transpose(0, 1)
    sites["attn.hook_attn_scores"] = scores.masked_fill(call.mask < 0, -torch.inf)[0]
    sites["attn.hook_pattern"] = call.weights[0]
    return sites


def _mlp(text: Any, recording: Recording, layer: int, x: Tensor) -> dict[str, Tensor]:
    prefix, made = f"layers.{layer}", recording.made
    sites: dict[str, Tensor] = dict(zip(("ln2.hook_scale", "ln2.hook_normalized"), _norm(text, x), strict=True))
    sites["mlp.hook_in"] = made[f"{prefix}.pre_feedforward_layernorm"][0][0]
    sites["mlp.hook_pre"] = made[f"{prefix}.mlp.gate_proj"][0][0]
    sites["mlp.hook_pre_linear"] = made[f"{prefix}.mlp.up_proj"][0][0]
    sites["mlp.hook_post"] = recording.given[f"{prefix}.mlp.down_proj"][0][0]
    sites["mlp.hook_out"] = made[f"{prefix}.mlp.down_proj"][0][0]
    out = sites["mlp.hook_out"]
    if getattr(text.layers[layer], "enable_moe_block", False):
        sites["mlp.hook_out_normed"] = made[f"{prefix}.post_feedforward_layernorm_1"][0][0]
        sites |= _moe(text, recording, layer)
        out = sites["moe.hook_sum"] = sites["mlp.hook_out_normed"] + sites["moe.hook_out_normed"]
    return sites | _post_norm(text, recording, "ln2_post", f"{prefix}.post_feedforward_layernorm", out, "hook_mlp_out")


def _moe(text: Any, recording: Recording, layer: int) -> dict[str, Tensor]:
    prefix, made = f"layers.{layer}", recording.made
    probabilities, weights, ids = made[f"{prefix}.router"]
    x = recording.given[f"{prefix}.experts"][0]
    sites = {
        "moe.hook_router_in": recording.given[f"{prefix}.router.proj"][0],
        "moe.hook_router_logits": made[f"{prefix}.router.proj"][0],
        "moe.hook_router_probs": probabilities,
        "moe.hook_expert_ids": ids,
        "moe.hook_expert_weights": weights,
        "moe.hook_in": x,
    }
    sites |= _experts(text.layers[layer].experts, x, ids, weights)
    sites["moe.hook_out"] = made[f"{prefix}.experts"][0]
    sites["moe.hook_out_normed"] = made[f"{prefix}.post_feedforward_layernorm_2"][0][0]
    return sites


def _experts(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Each chosen expert on its own, [T, k, ...], in the order of `ids`."""
    gate, up = torch.einsum("td,tkfd->tkf", x, experts.gate_up_proj[ids]).chunk(2, dim=-1)
    post = experts.act_fn(gate) * up
    out = torch.einsum("tkf,tkdf->tkd", post, experts.down_proj[ids]) * weights[..., None]
    names = ("expert_pre", "expert_pre_linear", "expert_post", "expert_out")
    return {f"moe.hook_{name}": value for name, value in zip(names, (gate, up, post, out), strict=True)}


def _ple(recording: Recording, layer: int) -> dict[str, Tensor]:
    prefix = f"layers.{layer}"
    return {
        "ple.hook_gate_pre": recording.made[f"{prefix}.per_layer_input_gate"][0][0],
        "ple.hook_gate": recording.made[f"{prefix}.act_fn"][0][0],
        "ple.hook_gated": recording.given[f"{prefix}.per_layer_projection"][0][0],
        "hook_ple_out": recording.made[f"{prefix}.post_per_layer_input_norm"][0][0],
    }


def logit_softcap(model: Any) -> float | None:
    """Of a whole model. Gemma3ForConditionalGeneration never applies the one of its config."""
    cap = text_model(model).config.final_logit_softcapping
    return None if isinstance(model, Gemma3ForConditionalGeneration) else cap


def _final(model: Any, text: Any, recording: Recording) -> dict[str, Tensor]:
    scale, normalized = _norm(text, recording.given["norm"][0][0])
    sites = {"ln_final.hook_scale": scale, "ln_final.hook_normalized": normalized}
    sites["ln_final.hook_out"] = recording.made["norm"][0][0]
    if logit_softcap(model) is not None:
        sites["hook_logits_raw"] = recording.logits_raw[0]
    sites["hook_logits"] = recording.logits[0]
    return sites
