# SPDX-License-Identifier: Apache-2.0
"""Every kind of edit against the same edit made in transformers by hooks on its modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

import gemma4
from gemma4 import dictionaries, edits
from gemma4.dictionaries import AblateFeature, ClampFeature, ScaleFeature
from gemma4.edits import (
    Ablate,
    Add,
    Clamp,
    ForbidExperts,
    ForceExperts,
    FromPrompt,
    KnockOut,
    Patch,
    ProjectOut,
    Scale,
    ScalePerLayerEmbedding,
    Set,
    Steer,
)

from . import variants
from .compare import difference
from .conftest import Checkpoint
from .oracle import text_model

VARIANTS = ["e2b-seed1", "everything", "moe26b-seed1", "dense31b-seed1", "gemma2", "gemma3"]
N = 13
Change = Callable[[Tensor], Tensor]
Theirs = list[tuple[str, str, Change]]  # module of the text model, the value of it, what to make of that


class Setting(NamedTuple):
    """A model, and what the cases need: sizes, a vector, and what another prompt has."""

    text: Any
    d: int
    n_heads: int
    v: np.ndarray
    other: Mapping[str, Tensor]  # layer output, attention's and MLP's addition of layer 1, and z, by the module's name
    cache: gemma4.ActivationCache


# ---- hooks of transformers ------------------------------------------------------------------------------------------


def replace_output(change: Change) -> Any:
    def after(_module: Any, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return after


def replace_argument(change: Change, name: str, place: int) -> Any:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return args, kwargs | {name: change(kwargs[name])}
        return (*args[:place], change(args[place]), *args[place + 1 :]), kwargs

    return before


def route(change: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    """The router's weights and experts, [T, k] each, from its probabilities [T, E]."""

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return output[0], *change(output[0])

    return after


def attach(module: Any, value: str, change: Any, stack: ExitStack) -> None:
    if value == "out":
        handle = module.register_forward_hook(replace_output(change))
    elif value == "route":
        handle = module.register_forward_hook(route(change))
    else:
        name = {"in": "input", "mask": "attention_mask", "ple": "per_layer_input"}[value]
        place = 1 if value == "ple" else 0
        handle = module.register_forward_pre_hook(replace_argument(change, name, place), with_kwargs=True)
    stack.callback(handle.remove)


@torch.no_grad()
def their_logits(model: Any, ids: Tensor, hooks: Theirs) -> np.ndarray:
    with ExitStack() as stack:
        for name, value, change in hooks:
            attach(text_model(model).get_submodule(name), value, change, stack)
        # output_attentions keeps transformers from dropping positions in layers that share keys
        return model(input_ids=ids[None], use_cache=False, output_attentions=True).logits[0].numpy()


# ---- cases ----------------------------------------------------------------------------------------------------------


def at(pos: Any, new: Change, head: slice | None = None) -> Change:
    """Changes positions of [1, T, ...]; with head, these columns."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        where = (slice(None), pos) if head is None else (slice(None), pos, head)
        x[where] = new(x[where])
        return x

    return change


ALL = slice(None)
RESID, Z = "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"


def cases(s: Setting) -> dict[str, tuple[edits.Edit, Theirs]]:
    v = torch.from_numpy(s.v)
    h = s.text.layers[1].self_attn.o_proj.in_features // s.n_heads
    second = slice(h, 2 * h)  # of hook_z
    resid, z, mlp = s.other["layers.2"], s.other["layers.1.self_attn.o_proj"], s.other["layers.1.mlp.down_proj"]
    mean = z[0, :, second].mean(0)

    def knock(x: Tensor) -> Tensor:
        x = x.expand(-1, s.n_heads, -1, -1).clone()
        x[:, 1, 6:, 4:6] = torch.finfo(x.dtype).min
        return x

    return {
        "Add": (Add(RESID, s.v, 0.5, pos=[2, 7]), [("layers.2", "out", at([2, 7], lambda x: x + 0.5 * v))]),
        "Scale": (Scale(RESID, 0.7), [("layers.2", "out", lambda x: 0.7 * x)]),
        "Scale neurons": (
            Scale("blocks.1.mlp.hook_post", -2, index=slice(3, 9)),
            [("layers.1.mlp.down_proj", "in", at(ALL, lambda x: -2 * x, slice(3, 9)))],
        ),
        "Set": (Set(RESID, s.v, pos=5), [("layers.2", "out", at([5], lambda x: v.expand_as(x)))]),
        "Clamp": (Clamp("blocks.1.mlp.hook_post", -0.1, 0.2), [("layers.1.mlp.down_proj", "in", clamp(-0.1, 0.2))]),
        "ProjectOut": (ProjectOut(RESID, s.v), [("layers.2", "out", lambda x: x - (x @ v)[..., None] / (v @ v) * v)]),
        "Steer": (Steer(s.v, [0, 2], 0.3), [(f"layers.{i}", "out", lambda x: x + 0.3 * v) for i in (0, 2)]),
        "Patch": (
            Patch(RESID, s.cache, pos=[1, -1], source_pos=[4, 2]),
            [("layers.2", "out", at([1, N - 1], lambda x: resid[:, [4, 2]]))],
        ),
        "Patch a head": (
            Patch(Z, s.cache, head=1, pos=[3]),
            [("layers.1.self_attn.o_proj", "in", at([3], lambda x: z[:, [3]][..., second], second))],
        ),
        "Patch FromPrompt": (
            Patch("blocks.1.mlp.hook_post", FromPrompt(0), pos=slice(2, 6), prompts=1),
            [("layers.1.mlp.down_proj", "in", at(slice(2, 6), lambda x: mlp[:, 2:6]))],
        ),
        "Ablate": (Ablate(head=(1, 1)), [("layers.1.self_attn.o_proj", "in", at(ALL, torch.zeros_like, second))]),
        "Ablate to the mean": (
            Ablate(head=(1, 1), mean=s.cache),
            [("layers.1.self_attn.o_proj", "in", at(ALL, lambda x: mean.expand_as(x), second))],
        ),
        "Ablate by resampling": (Ablate(RESID, resample=s.cache, pos=4), [("layers.2", "out", at([4], of(resid, 4)))]),
        "KnockOut": (KnockOut((slice(6, None), "pos 4-5"), 1, heads=1), [("layers.1.self_attn", "mask", knock)]),
    }


def clamp(low: float, high: float) -> Change:
    return lambda x: x.clamp(low, high)


def of(other: Tensor, position: int) -> Change:
    return lambda x: other[:, [position]]


def per_layer_cases() -> dict[str, tuple[edits.Edit, Theirs]]:
    def off(x: Tensor) -> Tensor:
        return 0.25 * x

    return {
        "ScalePerLayerEmbedding": (ScalePerLayerEmbedding(0.25, [1, 2]), [(f"layers.{i}", "ple", off) for i in (1, 2)])
    }


def expert_cases(text: Any) -> dict[str, tuple[edits.Edit, Theirs]]:
    router = text.layers[1].router
    n, k = router.proj.out_features, text.config.top_k_experts

    def without(barred: list[int]) -> Change:
        def change(logits: Tensor) -> Tensor:
            logits = logits.clone()
            logits[:, barred] = -torch.inf
            return logits

        return change

    def exactly(chosen: list[int], layer: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """These experts, with the probabilities that the router gave them among all, divided by their sum."""

        def change(probs: Tensor) -> tuple[Tensor, Tensor]:
            ids = torch.tensor(chosen).expand(len(probs), -1)
            weights = probs.gather(1, ids)
            return weights / weights.sum(-1, keepdim=True) * text.layers[layer].router.per_expert_scale[ids], ids

        return change

    forced = list(range(n - k, n))
    return {
        "ForbidExperts": (ForbidExperts(range(4), 1), [("layers.1.router.proj", "out", without([0, 1, 2, 3]))]),
        "ForceExperts": (
            ForceExperts(forced, [1, 2]),
            [(f"layers.{i}.router", "route", exactly(forced, i)) for i in (1, 2)],
        ),
        "ForceExperts, one": (
            ForceExperts(n - 1, 1),
            [("layers.1.router", "route", lambda probs: one_expert(probs, n - 1, k, router.per_expert_scale))],
        ),
    }


def one_expert(probs: Tensor, expert: int, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """All the weight on one expert; the other slots weigh nothing."""
    ids = torch.tensor([expert, *range(k - 1)]).expand(len(probs), -1)
    weights = torch.zeros(len(probs), k)
    weights[:, 0] = scale[expert]
    return weights, ids


def feature_cases(s: Setting, folder: Path) -> dict[str, tuple[edits.Edit, Theirs]]:
    """A dictionary of SAELens' standard kind: a = relu((x - b_dec) W_enc + b_enc). Feature 1 is edited."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (s.d, 20), "b_enc": (20,), "W_dec": (20, s.d), "b_dec": (s.d,)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": s.d, "d_sae": 20, "dtype": "float32"}
    config |= {"apply_b_dec_to_input": True, "metadata": {"hook_name": RESID}}
    (folder / "cfg.json").write_text(json.dumps(config))
    sae = gemma4.SAE.load(folder)
    w_enc, b_enc, w_dec, b_dec = (torch.from_numpy(tensors[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))

    def hooks(new: Change) -> Theirs:
        def change(x: Tensor) -> Tensor:
            old = torch.relu((x - b_dec) @ w_enc[:, 1] + b_enc[1])
            return x + (new(old) - old)[..., None] * w_dec[1]

        return [("layers.2", "out", change)]

    return {
        "ClampFeature": (ClampFeature(sae, 1, 0.5), hooks(lambda old: torch.full_like(old, 0.5))),
        "ScaleFeature": (ScaleFeature(sae, 1, 1.5), hooks(lambda old: 1.5 * old)),
        "AblateFeature": (AblateFeature(sae, 1), hooks(torch.zeros_like)),
    }


# ---- tests ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def setting(found: Checkpoint, ours: gemma4.Model, other: Tensor) -> Setting:
    """`other`: ids of the prompt that patches come from."""
    text, held = text_model(found.model), dict[str, Tensor]()
    keep: list[tuple[str, str]] = [
        ("layers.2", "out"),
        ("layers.1.self_attn.o_proj", "in"),
        ("layers.1.mlp.down_proj", "in"),
    ]
    their_logits(found.model, other, [(name, value, note(held, name)) for name, value in keep])
    d = text.config.hidden_size
    v = np.random.default_rng(d).standard_normal(d).astype(np.float32)
    _, cache = ours.run_with_cache(other.numpy(), [RESID, Z])
    return Setting(text, d, text.config.num_attention_heads, v, held, cache)


def note(held: dict[str, Tensor], name: str) -> Change:
    def change(x: Tensor) -> Tensor:
        held[name] = x.clone()
        return x

    return change


@pytest.mark.parametrize("name", VARIANTS)
def test_edits_are_those_of_hooks(
    name: str, checkpoint: Callable[[str], Checkpoint], loaded: Callable[[str], gemma4.Model], tmp_path: Path
) -> None:
    found, ours = checkpoint(name), loaded(name)
    ids, other = (variants.token_ids(found.variant, N, seed) for seed in (1, 2))
    s = setting(found, ours, other)
    table = cases(s) | feature_cases(s, tmp_path)
    if "blocks.1.hook_ple_in" in ours.sites:
        table |= per_layer_cases()
    if "blocks.1.moe.hook_out" in ours.sites and s.text.config.num_experts > 5:
        table |= expert_cases(s.text)
    plain, wrong = ours.forward(ids.numpy()), []
    for kind, (edit, hooks) in table.items():
        with ours.edit(edit):
            logits = ours.forward([other.numpy(), ids.numpy()])[1]
        if np.array_equal(logits, plain):
            wrong.append(f"{kind}: no effect")
        if found_wrong := difference(logits, their_logits(found.model, ids, hooks)):
            wrong.append(f"{kind}: {found_wrong}")
    assert wrong == []


def test_every_kind_is_tried(
    checkpoint: Callable[[str], Checkpoint], loaded: Callable[[str], gemma4.Model], tmp_path: Path
) -> None:
    """A new kind of edit needs a case here."""
    found = checkpoint("everything")
    s = setting(found, loaded("everything"), variants.token_ids(found.variant, N, 2))
    table = {**cases(s), **feature_cases(s, tmp_path), **per_layer_cases(), **expert_cases(s.text)}
    public = [vars(module)[name] for module in (edits, dictionaries) for name in module.__all__]
    kinds = {one.__name__ for one in public if isinstance(one, type) and issubclass(one, edits.Edit)}
    assert {type(edit).__name__ for edit, _ in table.values()} == kinds - {"Edit", "FeatureEdit"}  # bases
