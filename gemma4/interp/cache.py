# SPDX-License-Identifier: Apache-2.0
"""Captured activations of one sequence, and the arithmetic of the residual stream on them.

In Gemma 4 every block ends by multiplying the residual stream by a learned number s ("layer_scalar"):

    resid_post = s * (resid_pre + attn_out + mlp_out + ple_out)

so what a component wrote reaches a later layer multiplied by the scalars in between. The decompositions here account
for that; their parts sum to the residual stream up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.core import Core
from gemma4.dictionaries.features import Features
from gemma4.dictionaries.features import join as join_features
from gemma4.errors import SiteError, StateError
from gemma4.files import StrPath
from gemma4.html import Picture
from gemma4.interp import tables
from gemma4.interp.dataset import to_dataset
from gemma4.interp.pictures import cache_picture
from gemma4.interp.saved import Detached, Saved, SavedDtype, read_cache, write_cache
from gemma4.interp.sites import ENCODER_PREFIXES, Site, canonical_name
from gemma4.interp.tables import CosinesBy, NormsBy, Table
from gemma4.narrow import is_integer
from gemma4.units import size

if TYPE_CHECKING:
    from xarray import Dataset

    from gemma4.media.prompt import SoftRun

F32 = NDArray[np.float32]


class Stack(NamedTuple):
    """Several residual-stream vectors per position, with a name each."""

    values: F32  # float32 [n, pos, d_model]
    labels: list[str]  # n names


class CapturedArrays(Mapping[str, F32]):
    """Site name -> float32 array (int32 for expert ids), in forward order. Subclasses explain missing names."""

    def __init__(self, arrays: dict[str, F32]) -> None:
        self._arrays = arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())


class EncoderCache(CapturedArrays):
    """Activations inside an encoder of one picture, frame or recording: site name -> array, in forward order.

    run: which it is, and where in the prompt its soft tokens stand
    """

    def __init__(self, run: SoftRun, arrays: dict[str, F32]) -> None:
        super().__init__(arrays)
        self.run = run

    def __getitem__(self, name: str) -> F32:
        if name not in self._arrays:
            kind = self.run.medium.kind
            raise SiteError(f"{name!r} was not captured of this {kind}: ask for it with names= (docs/sites.md)")
        return self._arrays[name]

    def __repr__(self) -> str:
        run = self.run
        return f"EncoderCache: {len(self)} arrays of the {run.medium.kind} at positions {run.start} to {run.stop - 1}"


_ELSEWHERE = {  # options of TransformerLens -> what stands for them here
    "return_labels": "`labels` of the result, which it always has",
    "apply_ln": "`gemma4.interp.logit_lens`, which applies the final norm",
    "expand_neurons": "per_head",
}


def _face(value: F32 | Features) -> str:
    return repr(value) if isinstance(value, Features) else str(list(value.shape))


def _is_pair(key: object) -> bool:
    return isinstance(key, tuple) and len(cast("tuple[object, ...]", key)) == 2


class ActivationCache(CapturedArrays):
    """Site name -> float32 array (int32 for expert ids), in forward order.

    Each array owns its memory: the engine wrote into it directly, and nothing writes to it again. Axis T of an array
    (see docs/sites.md) runs over `positions`. `cache["resid_post", 3]` means `cache["blocks.3.hook_resid_post"]`;
    layer -1 is the last one.

    tokens:     int32 [T], the ids at the kept positions
    positions:  int64 [T], where in the sequence they stand
    media:      one EncoderCache for each picture, frame and recording of which sites inside the encoders were captured
                ("vision.…", "audio.…"): `cache.media[0]["vision.blocks.2.hook_resid_post"]`, `.run` says which it is

    Sites inside an attached dictionary are not listed, but found: `cache[name]`, and sparse in `features`.
    """

    _ran: Detached | None = None  # the model that ran, once another object is attached

    def __init__(
        self,
        model: Core | Detached,
        arrays: dict[str, F32],
        tokens: NDArray[np.int32],
        positions: NDArray[np.int64],
        media: tuple[EncoderCache, ...] = (),
    ) -> None:
        super().__init__(arrays)
        self._model = model
        self.tokens = tokens
        self.positions = positions
        self.media = media
        self._inside: dict[str, F32 | Features] = {}

    @property
    def features(self) -> dict[str, Features]:
        """The features captured inside attached dictionaries, by the names of their sites. `cache[name]` makes them
        dense, float32 [pos, d_sae]."""
        return {name: value for name, value in self._inside.items() if isinstance(value, Features)}

    def keep_inside(self, kept: Mapping[str, tuple[NDArray[np.int64], F32 | Features]]) -> None:
        """Add what passed sites inside dictionaries, by name: the positions of all rows, of which those of this cache
        are kept, and the rows."""
        for name, (positions, value) in kept.items():
            rows = np.isin(positions, self.positions)
            self._inside[name] = value.take(rows) if isinstance(value, Features) else value[rows]

    # Pickles hold the arrays, not the model and its file mapping; copies in one process share the model.

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": self._detached}

    def __copy__(self) -> ActivationCache:
        return self._with(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationCache:
        return self._with({key: deepcopy(value, memo) for key, value in self.__dict__.items() if key != "_model"})

    def _with(self, state: Mapping[str, Any]) -> ActivationCache:
        copy = object.__new__(type(self))
        copy.__dict__.update({"_model": self._model, **state})
        return copy

    @property
    def _detached(self) -> Detached:
        model = self._ran or self._model
        if isinstance(model, Detached):
            return model
        name = model.checkpoint.path.name
        return Detached(model.sites, model.n_layers, model.layer_scalars, name, model.fingerprint)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: StrPath, *, dtype: SavedDtype = "f32", force: bool = False) -> Path:
        """Write the cache to one .safetensors file, which `ActivationCache.load` reads. Returns the path.

            cache.save("run.safetensors", dtype="bf16")

        dtype  "f32"; or "f16" or "bf16": floats are rounded to nearest, and take half the room
        force  replace a file that exists

        The tensors are the sites by name, "tokens" int32 and "positions" int64; any reader of safetensors opens them.
        Features inside a dictionary stay sparse: offsets, ids and values after the name of their site.
        The file appears when it is complete. Raises ValueError (activations inside encoders, `media`, which only a
        pickle holds; f16 for numbers beyond 65504), FileExistsError unless force, OSError.
        """
        if self.media:
            raise ValueError(
                f"this cache holds activations inside encoders of {len(self.media)} pictures or sounds, which a "
                "safetensors file does not take: capture without vision.* and audio.*, or pickle the cache"
            )
        saved = Saved(self._detached, self._arrays, self.tokens, self.positions, self._inside)
        return write_cache(path, saved, dtype, force=force)

    @classmethod
    def load(cls, path: StrPath) -> ActivationCache:
        """The cache of a file that `save` wrote: float32 arrays in memory, without a model (see `attach`).

        It can be decomposed, and its values patched into other runs. Raises FormatError (damaged, or no such file's
        format), FileNotFoundError, OSError.
        """
        saved = read_cache(path)
        cache = cls(saved.model, saved.arrays, saved.tokens, saved.positions)
        cache._inside = dict(saved.inside)
        return cache

    @property
    def model_name(self) -> str:
        """Name of the model's files; "" in caches pickled by versions that did not note it."""
        return self._detached.name

    @property
    def fingerprint(self) -> str:
        """`Core.fingerprint` of the model that ran, 16 hex digits."""
        return self._detached.fingerprint

    def attach(self, model: Core, *, force: bool = False) -> None:
        """Attach a model to a loaded cache, for methods that need weights (`logit_attrs`, `per_head=True`).

        force: also one with the same sites and other weights than those that ran, such as a quantised copy.

        Raises ValueError for a model with other sites, or another model than the cache names unless force.
        """
        if list(model.sites.values()) != list(self._model.sites.values()):
            raise ValueError(f"the cache is of a model with other sites than {model!r}")
        if self.fingerprint not in ("", model.fingerprint) and not checks.boolean("force", force):
            ran = f"{self.model_name} (fingerprint {self.fingerprint})"
            raise ValueError(
                f"the cache is of another model, {ran}; {model!r} has the fingerprint {model.fingerprint}. "
                "attach(model, force=True) takes its weights nevertheless"
            )
        self._ran, self._model = self._detached, model

    def __getitem__(self, key: str | tuple[str, int]) -> F32:
        name = self._name(key)
        if name in self._inside:
            inside = self._inside[name]
            return inside.dense() if isinstance(inside, Features) else inside
        if name not in self._arrays:
            if name.startswith(ENCODER_PREFIXES):
                raise SiteError(f"{name!r} is inside an encoder: see cache.media, one cache for each picture or sound")
            site = self._model.sites[name]  # raises, with the closest names, if the model has no such site
            raise SiteError(f"{site.name!r} was not captured in this run: ask for it with names=")
        return self._arrays[name]

    def _name(self, key: str | tuple[str, int]) -> str:
        if isinstance(key, str):
            return self._model.sites.canonical(key)
        if not _is_pair(key):
            raise TypeError(f"a cache's key is a site name, or (name inside a block, layer), got {key!r:.80}")
        stem, layer = key
        if is_integer(layer) and -self._model.n_layers <= layer < 0:
            layer += self._model.n_layers
        block = f"blocks.{layer}"
        names = [canonical_name(f"{block}.{stem}"), f"{block}.hook_{stem}", f"{block}.attn.hook_{stem}"]
        for held in (self._arrays, self._model.sites):  # a site that was not captured is named as such
            for name in names:
                if name in held:
                    return name
        return names[0]

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str) and not _is_pair(key):
            return False
        name = self._name(cast("str | tuple[str, int]", key))
        return name in self._arrays or name in self._inside

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(one.nbytes for one in (*self.media, *self._inside.values()))

    def to_dict(self) -> dict[str, F32]:
        """A plain dict of the same arrays, e.g. for `np.savez`."""
        return dict(self._arrays)

    def __repr__(self) -> str:
        groups: dict[str, list[Site]] = {}
        for name in self._arrays:
            site = self._model.sites[name]
            groups.setdefault(site.stem, []).append(site)
        lines = [f"ActivationCache: {len(self)} arrays, {len(self.positions)} positions, {size(self.nbytes)}"]
        for stem, sites in groups.items():
            shapes = {self._arrays[site.name].shape for site in sites}
            where = f"  ({len(sites)} layers)" if sites[0].layer is not None else ""
            lines.append(f"  {stem:<28} {' '.join(str(list(shape)) for shape in sorted(shapes))}{where}")
        lines += [f"  {name}: {_face(value)}" for name, value in self._inside.items()]
        lines += [f"  media[{i}]: {cache!r}" for i, cache in enumerate(self.media)]
        return "\n".join(lines)

    def to_html(self) -> Picture:
        """A table of the sites with their shapes, and attention patterns if there are (the last positions)."""
        sites = {self._model.sites[name]: array for name, array in self._arrays.items()}
        media = [f"media[{i}]: {cache!r}" for i, cache in enumerate(self.media)]
        return cache_picture(sites, self._token_texts(), self.positions, media)

    def _repr_html_(self) -> str:
        return self.to_html().fragment()

    def _token_texts(self) -> list[str]:
        model = self._model
        if isinstance(model, Detached) or not model.checkpoint.tokenizer_path:
            return [str(token) for token in self.tokens]
        return model.to_str_tokens(self.tokens)

    def stack(self, stem: str) -> F32:
        """The same site of every captured layer: [n_layers, ...]. stem: the name inside a block, "hook_resid_post"."""
        found = list(self._found(stem).values())
        if len({array.shape for array in found}) > 1:
            raise ValueError(f"{stem!r} has a different shape in different layers: {[array.shape for array in found]}")
        return np.stack(found)

    def _found(self, name: str | tuple[str, int]) -> dict[Site, F32]:
        """A site by its key, or the same site of every captured layer by its name inside a block."""
        full = self._name(name)
        inside = (canonical_name(f"blocks.0.{name}").removeprefix("blocks.0."), f"hook_{name}", f"attn.hook_{name}")
        sites = {self._model.sites[one]: array for one, array in self._arrays.items()}
        found = {site: array for site, array in sites.items() if site.name == full or site.stem in inside}
        if not found:
            raise SiteError(f"no layer's {name!r} was captured in this run: ask for it with names=")
        return found

    # -- tables ------------------------------------------------------------------------------------------------------

    def norms(self, name: str | tuple[str, int], by: NormsBy = "pos") -> Table:
        """L2 norms, sqrt(sum of squares), of a site in every captured layer: values float32, labels the sites' names.

            cache.norms("resid_post").values        # [layers, pos]
            cache.norms("attn.hook_z", by="head").values    # [layers, pos, head]

        name  the name inside a block, as for `stack`; or the key of one site, as for `cache[...]`: one row
        by    "pos": [n, pos], over all other axes; "head": [n, pos, head], over the last axis alone; "site": [n], over
              the whole array. For keys and values in use, pos are the positions of the keys.

        Squares are summed in float64. Raises SiteError (not captured), ValueError (no heads, expert ids, masked scores,
        numbers of heads that differ among layers).
        """
        sites = self._found(name)
        return Table(tables.norms(sites, by), [site.name for site in sites])

    def cosine(self, a: str | tuple[str, int], b: str | tuple[str, int]) -> F32:
        """Cosine of the angle between two sites' vectors, position by position: a.b / (|a| |b|) along the last axis.

            cache.cosine(("resid_pre", 0), ("resid_post", 3))

        a, b: keys as for `cache[...]`. Returns float32 [pos], or [pos, head] for sites with heads; 0 where a vector is
        zero. Raises SiteError (not captured), ValueError (other shapes, expert ids, masked scores).
        """
        return tables.cosine({self._model.sites[self._name(key)]: self[key] for key in (a, b)})

    def cosine_matrix(self, name: str | tuple[str, int], by: CosinesBy = "layer") -> Table:
        """`cosine` between all pairs of layers, or of positions: values float32, labels the sites' names.

        name  as for `norms`
        by    "layer": values[p, i, j] compares layers i and j at position p, [pos, n, n]; "pos": values[i, p, q]
              compares positions p and q in layer i, [n, pos, pos]. Sites with heads have the head's axis before the
              last two.

        Raises as `norms`, and ValueError for a site of different shapes in different layers.
        """
        sites = self._found(name)
        return Table(tables.cosine_matrix(sites, by), [site.name for site in sites])

    def head_results(self, layer: int) -> F32:
        """Each head's share of a layer's attn.hook_out, float32 [pos, head, d_model].

        attn.hook_result where it was captured; else attn.hook_z through the head's columns of o_proj, which is that up
        to rounding, and needs d_head/d_model of its memory to keep. Raises SiteError (neither was captured),
        StateError (no model: `attach`), ValueError (no such layer).
        """
        layer = checks.integer("layer", layer, 0, self._model.n_layers - 1)
        block = f"blocks.{layer}.attn"
        if f"{block}.hook_result" in self:
            return self[f"{block}.hook_result"]
        return tables.head_results(
            self[f"{block}.hook_z"], self._weights.weight(f"layers.{layer}.self_attn.o_proj.weight")
        )

    def to_dataset(self) -> Dataset:
        """The arrays as an `xarray.Dataset`, by site name; they are not copied. Needs gemma4[xarray].

        Dimensions are pos, key, d_model, head, kv_head, d_head, d_mlp, d_ple, layer, expert, choice, d_expert, vocab;
        one of several sizes carries its size ("d_head_32"). Coordinates: pos (in the sequence), token (id, along pos),
        key. Attributes: model and fingerprint; of each variable its site, layer and the meaning of its axes.
        Activations inside encoders (`media`) are left out. Raises ImportError without xarray.
        """
        arrays = {self._model.sites[name]: array for name, array in self._arrays.items()}
        attrs = {"model": self.model_name, "fingerprint": self.fingerprint}
        return to_dataset(arrays, self.tokens, self.positions, attrs)

    # -- the residual stream -----------------------------------------------------------------------------------------

    def accumulated_resid(self, layer: int | None = None, *, incl_mid: bool = False, **unknown: object) -> Stack:
        """The residual stream at the input of each block 0..layer (scalars not carried forward).

        layer: the last one whose input is included; None = all blocks and the final residual stream.
        incl_mid: also after each attention. Needs hook_resid_pre (and hook_resid_mid, and the last hook_resid_post).
        Raises TypeError for an unknown option.
        """
        checks.known_names(unknown, ("layer", "incl_mid"), _ELSEWHERE)
        n_layers = self._model.n_layers
        last = n_layers if layer is None else self._checked(layer)
        values: list[F32] = []
        labels: list[str] = []
        for i in range(last + 1):
            values.append(self._resid(i))
            labels.append(f"{i}_pre" if i < n_layers else "final_post")
            if incl_mid and i < last:
                values.append(self[f"blocks.{i}.hook_resid_mid"])
                labels.append(f"{i}_mid")
        return Stack(np.stack(values), labels)

    def decompose_resid(
        self, layer: int | None = None, *, per_head: bool = False, per_expert: bool = False, **unknown: object
    ) -> Stack:
        """Contribution of each component to the residual stream entering block `layer` (None: to the final one).

        The values sum over their first axis to hook_resid_pre of that block, up to rounding, unless an edit or a hook
        changed the residual stream itself (as steering does; `gemma4.interp.dla` shows its share). per_head splits each
        attention into its heads, the norm after it frozen (needs ln1_post.hook_scale, and attn.hook_result or hook_z).
        per_expert splits each MLP with experts into the dense part ("3_mlp_dense") and every expert that a position
        has ("3_expert_17"), the norms after them frozen (needs mlp.hook_out_normed, moe.hook_out, moe.hook_expert_out
        and hook_expert_ids, ln2_post.hook_scale).
        Needs hook_embed, hook_attn_out, hook_mlp_out and (where the model has them) hook_ple_out of the layers before.
        Raises TypeError for an unknown option.
        """
        checks.known_names(unknown, ("layer", "per_head", "per_expert"), _ELSEWHERE)
        labels, values = zip(*self.components(layer, per_head=per_head, per_expert=per_expert), strict=True)
        return Stack(np.stack(values), list(labels))

    def components(
        self, layer: int | None = None, *, per_head: bool = False, per_expert: bool = False
    ) -> Iterator[tuple[str, F32]]:
        """The parts of `decompose_resid` one after the other, label and float32 [pos, d_model]: one is in memory."""
        last = self._model.n_layers if layer is None else self._checked(layer)
        ran = self._detached
        scalars = [ran.layer_scalar(i) for i in range(last)]
        remaining = np.cumprod([1.0, *reversed(scalars)])[::-1]  # remaining[i] = s_i * ... * s_(last-1)
        yield "embed", self["hook_embed"] * np.float32(remaining[0])
        for i in range(last):
            for label, written in self._written(i, per_head, per_expert):
                yield label, written * np.float32(remaining[i])

    def _written(self, layer: int, per_head: bool, per_expert: bool) -> Iterator[tuple[str, F32]]:
        if per_head:
            heads = self.head_results(layer)
            if self._weights.engine_config["post_norms"]:
                scale = self[f"blocks.{layer}.ln1_post.hook_scale"][:, None]  # [T, 1, 1]
                heads = heads / scale * self._weights.gain(f"layers.{layer}.post_attention_layernorm")
            for head in range(heads.shape[1]):
                yield f"{layer}_head_{head}", heads[:, head]
        else:
            yield f"{layer}_attn_out", self[f"blocks.{layer}.hook_attn_out"]
        if per_expert and f"blocks.{layer}.moe.hook_out" in self._model.sites:
            yield from self._of_experts(layer)
        else:
            yield f"{layer}_mlp_out", self[f"blocks.{layer}.hook_mlp_out"]
        if f"blocks.{layer}.hook_ple_out" in self._model.sites:
            yield f"{layer}_ple_out", self[f"blocks.{layer}.hook_ple_out"]

    def _of_experts(self, layer: int) -> Iterator[tuple[str, F32]]:
        """The shares of hook_mlp_out = norm(mlp.hook_out_normed + norm(moe.hook_out)), the norms' scales frozen."""
        block, model = f"blocks.{layer}", self._weights
        after = model.gain(f"layers.{layer}.post_feedforward_layernorm") / self[f"{block}.ln2_post.hook_scale"]
        yield f"{layer}_mlp_dense", (self[f"{block}.mlp.hook_out_normed"] * after).astype(np.float32, copy=False)
        total = self[f"{block}.moe.hook_out"]
        scale = np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + model.engine_config["rms_norm_eps"])
        after = after * model.gain(f"layers.{layer}.post_feedforward_layernorm_2") / scale
        ids, written = self[f"{block}.moe.hook_expert_ids"], self[f"{block}.moe.hook_expert_out"]
        for expert in np.unique(ids):
            chosen = (written * (ids == expert)[..., None]).sum(axis=1)
            yield f"{layer}_expert_{expert}", (chosen * after).astype(np.float32, copy=False)

    def logit_attrs(
        self,
        stack: Stack | F32,
        tokens: int | str | Sequence[int],
        incorrect_tokens: int | str | Sequence[int] | None = None,
    ) -> F32:
        """Direct logit attribution: each component's share of a token's logit before the softcap.

        stack: [n, pos, d_model], e.g. of `decompose_resid()`; the final norm's scale is frozen as it was in this run.
        tokens: one token (an id, or text that is exactly one token), or one id per position. With incorrect_tokens:
        the difference of the two logits. Returns float32 [n, pos]; summed over n it is hook_logits_raw of that token.
        """
        values = stack.values if isinstance(stack, Stack) else np.asarray(stack, dtype=np.float32)
        if values.shape[1:] != self._resid(self._model.n_layers).shape:
            checks.fail("stack", values.shape, f"[n, {len(self.tokens)}, d_model], as decompose_resid() gives it")
        model = self._weights
        direction = model.unembed(self._ids(tokens))
        if incorrect_tokens is not None:
            direction = direction - model.unembed(self._ids(incorrect_tokens))
        final = self._resid(model.n_layers)
        scale = np.sqrt(np.mean(final * final, axis=-1, keepdims=True) + model.engine_config["rms_norm_eps"])
        normed = values / scale * model.gain("norm")
        return np.einsum("npd,pd->np", normed, np.broadcast_to(direction, final.shape))

    def join(self, later: Sequence[ActivationCache]) -> ActivationCache:
        """One cache of this step of a sequence and the steps that followed it (prompt, then token by token).

        Axis T is concatenated. Where there is a key axis S, earlier steps saw fewer keys: their missing columns are 0
        (-inf in attn.hook_attn_scores), as for keys in the future; keys and values in use (no axis T) are the last
        step's. Raises SiteError if a later step did not capture a site of this one.
        """
        if not later:
            return self
        caches = [self, *later]
        joined = ActivationCache(
            self._weights,
            {name: _join(self._model.sites[name], [cache[name] for cache in caches]) for name in self},
            np.concatenate([cache.tokens for cache in caches]),
            np.concatenate([cache.positions for cache in caches]),
            tuple(medium for cache in caches for medium in cache.media),
        )
        joined._inside = {name: _join_inside([cache._kept_inside(name) for cache in caches]) for name in self._inside}
        return joined

    def _kept_inside(self, name: str) -> F32 | Features:
        if name not in self._inside:
            raise SiteError(f"{name!r} was not captured in this run: its dictionary was not attached")
        return self._inside[name]

    @property
    def _weights(self) -> Core:
        if isinstance(self._model, Detached):
            raise StateError("this cache was pickled or saved without its model: give it back with cache.attach(model)")
        return self._model

    def _ids(self, tokens: int | str | Sequence[int]) -> NDArray[np.int32]:
        if isinstance(tokens, str):
            return np.array([self._weights.to_single_token(tokens)], dtype=np.int32)
        ids = np.atleast_1d(tokens)
        if ids.dtype.kind not in "iu" or ids.shape not in ((1,), self.tokens.shape):
            checks.fail("tokens", tokens, f"a token id, a text that is one token, or {len(self.tokens)} ids")
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self._weights.d_vocab:
            raise ValueError(
                f"tokens hold ids of {ids.min()} to {ids.max()}, expected 0 to {self._weights.d_vocab - 1}"
            )
        return ids.astype(np.int32)

    def _resid(self, layer: int) -> F32:
        """The residual stream entering block `layer`; for the number of layers, the one leaving the last block."""
        before, after = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer - 1}.hook_resid_post"
        return self[after if layer > 0 and (after in self or before not in self) else before]

    def _checked(self, layer: int) -> int:
        return checks.integer("layer", layer, 0, self._model.n_layers)


def join_caches(caches: Sequence[ActivationCache]) -> ActivationCache:
    """The caches of consecutive steps of one sequence as one: see `ActivationCache.join`."""
    return caches[0].join(caches[1:])


def _join(site: Site, parts: list[F32]) -> F32:
    if "T" not in site.dims:
        return parts[-1]
    if "S" in site.dims:
        axis, keys = site.dims.index("S"), parts[-1].shape[site.dims.index("S")]
        fill = -np.inf if site.keys == "scores" else 0.0
        parts = [_pad(part, axis, keys, fill) for part in parts]
    return np.concatenate(parts, axis=site.dims.index("T"))


def _join_inside(parts: list[F32 | Features]) -> F32 | Features:
    features = [part for part in parts if isinstance(part, Features)]
    if features:
        return join_features(features, features[0].d_sae)
    return np.concatenate([part for part in parts if not isinstance(part, Features)])


def _pad(array: F32, axis: int, length: int, fill: float) -> F32:
    widths = [(0, length - n if i == axis else 0) for i, n in enumerate(array.shape)]
    return np.pad(array, widths, constant_values=fill)
