# SPDX-License-Identifier: Apache-2.0
"""Names of activation sites: which exist, their shapes, selection, and errors for unknown names.

Names are TransformerLens's where it has one (docs/sites.md is the full table). Accepted besides: the names of
TransformerLens's bridge ("blocks.3.ln2.hook_in") and Hugging Face module paths ("model.layers.3.output").
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from gemma4.errors import SiteError
from gemma4.narrow import is_iterable

Names: TypeAlias = str | Iterable[str] | Callable[[str], object] | None
# The engine's facts on a site: `SiteRow` of _engine.pyi
SiteRow: TypeAlias = tuple[str, int, int, tuple[str | int, ...], str, str, bool, bool, str]

ENCODER_PREFIXES = ("vision.", "audio.")  # of the encoders' sites

# Not kept unless named: they grow with T*S, T*heads*d_model or T*d_vocab, and the logits are returned anyway.
KEPT_ONLY_WHEN_NAMED = frozenset(
    {"attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result", "hook_logits_raw", "hook_logits"}
)

_BLOCK = re.compile(r"(?:vision\.|audio\.)?blocks\.(\d+)\.(.+)")
_HF_STACK = r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers"  # by version and class of transformers
_HF_LAYER = re.compile(rf"{_HF_STACK}\.(\d+)\.(.+)")
_LAYERS = r"([^.]*[*?\[][^.]*)"  # a glob in the place of a layer's number
_BLOCKS = re.compile(rf"blocks\.{_LAYERS}\.(.+)")
_HF_LAYERS = re.compile(rf"{_HF_STACK}\.{_LAYERS}\.(.+)")
_ROWS = ("T", "N", "U")
GLOB = re.compile(r"[*?\[]")

# TransformerLens bridge name inside a block -> ours
_BRIDGE_BLOCK = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln1.hook_in": "hook_resid_pre",
    "attn.hook_in": "ln1.hook_out",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.q_norm.hook_out": "attn.hook_q_normed",
    "attn.k_norm.hook_out": "attn.hook_k_normed",
    "attn.v_norm.hook_out": "attn.hook_v_normed",
    "attn.o.hook_in": "attn.hook_z",
    "attn.o.hook_out": "attn.hook_out",
    "ln1_post.hook_in": "attn.hook_out",
    "ln1_post.hook_out": "hook_attn_out",
    "ln2.hook_in": "hook_resid_mid",
    "ln2.hook_out": "mlp.hook_in",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.in.hook_out": "mlp.hook_pre_linear",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.out.hook_out": "mlp.hook_out",
    "ln2_post.hook_out": "hook_mlp_out",
}
_BRIDGE_MODEL = {
    "embed.hook_out": "hook_embed",
    "unembed.hook_in": "ln_final.hook_out",
    "unembed.hook_out": "hook_logits",
}
# Hugging Face "layers.N.<module>.<input|output>" -> ours (the form Gemma Scope 2 configurations use)
_HF_BLOCK = {
    "input": "hook_resid_pre",
    "output": "hook_resid_post",
    "input_layernorm.output": "ln1.hook_out",
    "self_attn.q_proj.output": "attn.hook_q",
    "self_attn.k_proj.output": "attn.hook_k",
    "self_attn.v_proj.output": "attn.hook_v",
    "self_attn.q_norm.output": "attn.hook_q_normed",
    "self_attn.k_norm.output": "attn.hook_k_normed",
    "self_attn.v_norm.output": "attn.hook_v_normed",
    "self_attn.o_proj.input": "attn.hook_z",
    "self_attn.o_proj.output": "attn.hook_out",
    "self_attn.output": "attn.hook_out",
    "post_attention_layernorm.output": "hook_attn_out",
    "pre_feedforward_layernorm.input": "hook_resid_mid",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "mlp.gate_proj.output": "mlp.hook_pre",
    "mlp.up_proj.output": "mlp.hook_pre_linear",
    "mlp.down_proj.input": "mlp.hook_post",
    "mlp.input": "mlp.hook_in",
    "mlp.output": "mlp.hook_out",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "per_layer_input_gate.output": "ple.hook_gate_pre",
    "post_per_layer_input_norm.output": "hook_ple_out",
}
_HF_MODEL = {
    "model.embed_tokens.output": "hook_embed",
    "model.norm.output": "ln_final.hook_out",
    "lm_head.output": "hook_logits_raw",
}
_RAW_LOGITS = "hook_logits_raw"  # a site of models with a softcap alone


def reusable(names: Names) -> Names:
    """The same names, safe to iterate more than once. Raises TypeError if they are none."""
    if names is None or isinstance(names, str) or callable(names):
        return names
    if not is_iterable(names):
        raise TypeError(f"names must be a site name or glob, several of them, or a predicate, got {names!r:.80}")
    return list(names)


def names_of(names: Names, prefix: str = "") -> Names:
    """The `names` that begin with an encoder's prefix ("vision.", "audio."), or for "" those that do not.

    Predicates are called with every name of text model and encoders; None, the default, selects no encoder site.
    """
    names = reusable(names)
    if names is None:
        return [] if prefix else None
    if callable(names):
        return names
    return [name for name in ([names] if isinstance(names, str) else names) if _is_of(name, prefix)]


def _is_of(name: str, prefix: str) -> bool:
    return str(name).startswith(prefix) if prefix else not str(name).startswith(ENCODER_PREFIXES)


@dataclass(frozen=True, slots=True)
class Site:
    """One named intermediate of the forward pass.

    name      "blocks.3.hook_resid_post"
    id        the engine's number
    layer     its block; None for a site of the whole model
    dims      "T" (positions), "S" (key positions), an encoder's "N" (soft tokens) and "U", or a size
    dtype     float32, int32 for ids
    keys      what "S" means: "cached" (keys or values in use, by position), "scores" or "pattern"; "" without "S"
    pruned    whether, in the last layer that computes keys, only positions needed by some output pass it
    writable  whether a change has an effect
    axes      one letter for each of dims, that of csrc/model/sites.inc: "THh"
    """

    name: str
    id: int
    layer: int | None
    dims: tuple[str | int, ...]
    dtype: np.dtype[Any]
    keys: str
    pruned: bool
    writable: bool
    axes: str

    @property
    def rows(self) -> str:
        """The letter of its rows among `dims`: "T", an encoder's "N" or "U"; "" for cached keys and values."""
        return next((dim for dim in self.dims if isinstance(dim, str) and dim in _ROWS), "")

    @property
    def stem(self) -> str:
        """The name inside its block: "hook_resid_post" of "blocks.3.hook_resid_post"."""
        match = _BLOCK.fullmatch(self.name)
        return match.group(2) if match else self.name

    def shape(self, rows: int, keys: int) -> tuple[int, ...]:
        """Sizes of every axis for `rows` kept positions and `keys` key positions."""
        sizes = {"T": rows, "S": keys}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


class SiteTable(Mapping[str, Site]):
    """Every site of one model, in forward order, by name.

    rows: what the engine's `Model.sites()` returns; layers: the engine configuration's list of layers.
    """

    def __init__(self, rows: Iterable[SiteRow], layers: Sequence[Mapping[str, object]]) -> None:
        self.layers = layers
        self._start = 0
        self._sites = {
            row[0]: Site(*row[:2], row[2] if _BLOCK.fullmatch(row[0]) else None, row[3], np.dtype(row[4]), *row[5:])
            for row in rows
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, name: str) -> Site:
        """The site of that name or alias; SiteError with the closest names where there is none."""
        canonical = self.canonical(name)
        if canonical not in self._sites:
            raise SiteError(self._explain(name, canonical))
        return self._sites[canonical]

    def canonical(self, name: str) -> str:
        """`canonical_name` in this model: without a softcap, the head's output is hook_logits."""
        found = canonical_name(name)
        uncapped = found == _RAW_LOGITS != name and found not in self._sites
        return "hook_logits" if uncapped else found

    def starting_at(self, layer: int) -> SiteTable:
        """The same table for runs of blocks `layer` and later alone: `select` leaves out the sites of earlier ones."""
        later = copy(self)
        later._start = layer
        return later

    def window(self, layer: int) -> int:
        """How many keys, up to its own, a query of this layer sees; 0 = all."""
        return cast(int, self.layers[layer]["window"])

    def select(self, names: Names = None, *, stop_at_layer: int | None = None) -> list[Site]:
        """The selected sites, in forward order.

        names: None (all but the few that grow with T*S or d_vocab), a name or glob ("*" is really all), several of
        them, or a predicate on the name. A name that matches nothing raises SiteError.
        stop_at_layer: only sites reached when blocks 0..n-1 run; naming a later one raises SiteError.
        """
        reached = self._reached(stop_at_layer)
        if names is None:
            return [site for site in reached.values() if site.stem not in KEPT_ONLY_WHEN_NAMED]
        if callable(names):
            return [site for site in reached.values() if names(site.name)]
        patterns = [names] if isinstance(names, str) else list(names)
        chosen = {name for pattern in patterns for name in self._matches(pattern, reached, stop_at_layer)}
        return [site for name, site in reached.items() if name in chosen]

    def _reached(self, stop_at_layer: int | None) -> dict[str, Site]:
        started = self._sites
        if self._start:
            started = {name: site for name, site in started.items() if site.layer is None or site.layer >= self._start}
        if stop_at_layer is None:
            return started
        reached: dict[str, Site] = {}
        in_blocks = False
        for name, site in started.items():
            if in_blocks if site.layer is None else site.layer >= stop_at_layer:
                break
            reached[name] = site
            in_blocks = site.layer is not None
        return reached

    def _matches(self, pattern: object, reached: Mapping[str, Site], stop_at_layer: int | None) -> list[str]:
        if not isinstance(pattern, str):
            raise TypeError(f"a site name is a string, got {type(pattern).__name__}")
        if not GLOB.search(pattern):
            name = self[pattern].name
            if name not in reached:
                layer = self[name].layer
                early = layer is not None and layer < self._start
                bound = f"start_at_layer={self._start}" if early else f"stop_at_layer={stop_at_layer}"
                raise SiteError(f"site {name!r} is not reached with {bound}")
            return [name]
        found = fnmatch.filter(reached, canonical_name(pattern))
        if not found:
            raise SiteError(f"no site of this model matches {pattern!r}{self._closest(pattern)}")
        return found

    def _explain(self, asked: str, name: str) -> str:
        match = _BLOCK.fullmatch(name)
        layer, stem = (int(match.group(1)), match.group(2)) if match else (None, name)
        if layer is not None and layer >= len(self.layers):
            n = len(self.layers)
            return f"no site {asked!r}: this model has {n} layers (blocks.0 to blocks.{n - 1})"
        having = [site.layer for site in self._sites.values() if site.layer is not None and site.stem == stem]
        if layer is not None and having:
            return f"no site {asked!r}: {self._why_absent(layer, stem)} Layers that have it: {_ranges(having)}."
        return f"no site {asked!r} in this model{self._closest(name)}"

    def _why_absent(self, layer: int, stem: str) -> str:
        config, block = self.layers[layer], f"blocks.{layer}"
        source = config["kv_source"]
        if source != layer:
            return (
                f"layer {layer} computes no keys or values of its own, it attends to those of layer {source} "
                f"(kv_source): see blocks.{source}.{stem} where they are made, or {block}.attn.hook_k_used and "
                f"{block}.attn.hook_v_used for what this layer attends to."
            )
        if config["k_eq_v"] and stem == "attn.hook_v":
            return (
                f"layer {layer} has no v_proj, its values are the k_proj output (attention_k_eq_v): see "
                f"{block}.attn.hook_k before the norm or {block}.attn.hook_v_normed after it."
            )
        return f"layer {layer} has no such part."

    def _closest(self, name: str) -> str:
        close = difflib.get_close_matches(name, list(self._sites), n=4, cutoff=0.5)
        if not close:
            return "; Model.sites lists the names"
        return "; closest: " + ", ".join(close)


def canonical_name(name: str) -> str:
    """Our name for a TransformerLens bridge name or Hugging Face module path; any other string unchanged.

    A glob may stand for the layer: "blocks.*.hook_out" is "blocks.*.hook_resid_post".
    """
    if name.startswith(ENCODER_PREFIXES):
        return name
    if match := _BLOCK.fullmatch(name):
        return f"blocks.{int(match.group(1))}.{_BRIDGE_BLOCK.get(match.group(2), match.group(2))}"
    if match := _HF_LAYER.fullmatch(name):
        stem = _HF_BLOCK.get(match.group(2))
        return f"blocks.{int(match.group(1))}.{stem}" if stem else name
    for pattern, stems in ((_BLOCKS, _BRIDGE_BLOCK), (_HF_LAYERS, _HF_BLOCK)):
        if (match := pattern.fullmatch(name)) and match.group(2) in stems:
            return f"blocks.{match.group(1)}.{stems[match.group(2)]}"
    plain = name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
    return _BRIDGE_MODEL.get(name) or _HF_MODEL.get(plain, name)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
