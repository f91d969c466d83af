# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of several layers: crosscoders and cross-layer transcoders of Gemma Scope 2.

features_i = jumprelu(x_i @ w_enc_i + b_enc_i)          of each layer i, sparse
out_l = sum_i features_i @ w_dec_i[:, l] + b_dec_l [+ x_l @ skip_l]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

from gemma4.dictionaries.features import F32, Features, check_feature
from gemma4.dictionaries.formats import OpenedLayers, open_layers
from gemma4.dictionaries.sae import as_rows, fingerprint_of, without_rows
from gemma4.dictionaries.weights import Weights, matmul
from gemma4.edits.recipes import Cache
from gemma4.interp.sites import canonical_name
from gemma4.memory import ready_blas
from gemma4.narrow import is_integer, is_list_or_tuple

LayeredActivations: TypeAlias = Sequence[ArrayLike] | Cache


class LayeredDictionary:
    """The common part of crosscoders and cross-layer transcoders. Its files stay mapped.

    sites, sites_out     of each layer: what it reads, and reconstructs; None if the files do not say
    n_layers, d_in, d_sae, d_out   layers; of each the widths of input, features and output
    metadata             its configuration as stored
    skip_positions       as of an `SAE`
    """

    format = "Gemma Scope 2"
    _kind: ClassVar[Literal["crosscoder", "clt"]]

    def __init__(self, opened: OpenedLayers, path: Path, sites: Sequence[str] | None, sites_out: Sequence[str] | None):
        self.path, self.metadata, self.skip_positions = path, opened.metadata, opened.skip_positions
        self.n_layers, self.d_out = opened.b_dec.shape
        self.d_in, self.d_sae = opened.weights[0].w_enc.shape
        self.sites = self._named(sites, opened.sites, "sites")
        self.sites_out = self._named(sites_out, opened.sites_out, "sites_out")
        self._opened = opened

    def _named(self, given: Sequence[str] | None, found: Sequence[str] | None, what: str) -> tuple[str, ...] | None:
        names = found if given is None else [canonical_name(name) for name in given]
        if names is not None and len(names) != self.n_layers:
            raise ValueError(f"{self.path} has {self.n_layers} layers, but {len(names)} {what}")
        return None if names is None else tuple(names)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        sites: Sequence[str] | None = None,
        sites_out: Sequence[str] | None = None,
    ) -> Self:
        """Open the folder with params_layer_0.safetensors and the others. Every layer is read; files are mapped.

        sites, sites_out: of each layer, where the files (config.json, the folder's name) do not say, or other ones

        Raises FileNotFoundError, OSError, FormatError (damaged, a layer is missing), NotImplementedError (another
        architecture), ValueError (a dictionary of the other kind, or another number of sites).
        """
        folder = Path(path)
        opened = open_layers(folder, cls._kind)
        try:
            if opened.kind not in (None, cls._kind):
                other = next(kind for kind in (Crosscoder, CrossLayerTranscoder) if kind._kind == opened.kind)
                raise ValueError(f"{folder} is of the kind {opened.kind}: open it with gemma4.{other.__name__}.load")
            return cls(opened, folder, sites, sites_out)
        except BaseException:
            for file in opened.files:
                file.close()
            raise

    # -- all layers ----------------------------------------------------------------------------------------------------

    def encode(self, x: LayeredActivations) -> list[Features]:
        """The features of each layer, in order.

        x: an `ActivationCache` that holds `sites`, whose first `skip_positions` get none; or floats [pos, d_in] (or
        heads) of each layer. Raises ValueError (another number of layers, another width, positions that differ, NaN),
        TypeError, StateError (closed), FormatError (a file changed, or holds NaN).
        """
        rows = self._inputs(x)
        with self._reading():
            found = [one.encode(part) for one, part in zip(self._opened.weights, rows, strict=True)]
        if not isinstance(x, Cache):
            return found
        return [without_rows(features, x.positions < self.skip_positions) for features in found]

    def decode(self, features: Sequence[Features], x: LayeredActivations | None = None) -> list[F32]:
        """The reconstruction of each layer, float32 [pos, d_out].

        features: of every layer, as `encode` gives them. x: the input, which affine skip connections need besides.
        Raises ValueError (x is missing, other features), and what `encode` raises.
        """
        self._check_features(features)
        inputs = None if x is None else self._inputs(x)
        if inputs is None and any(skip is not None for skip in self._opened.skips):
            raise ValueError(f"{self!r} needs the input besides: decode(features, x)")
        if inputs is not None and len(inputs[0]) != len(features[0]):
            raise ValueError(f"features of {len(features[0])} positions, but x has {len(inputs[0])}")
        out = np.zeros((len(features[0]), self.n_layers, self.d_out), np.float32)
        ready_blas()
        with self._reading():
            for weights, part in zip(self._opened.weights, features, strict=True):
                out += weights.decode(part, None).reshape(out.shape)
            out += self._opened.b_dec
            for layer, skip in enumerate(self._opened.skips):
                if skip is not None and inputs is not None:
                    out[:, layer] += matmul(inputs[layer], skip)
        return [np.ascontiguousarray(out[:, layer]) for layer in range(self.n_layers)]

    def __call__(self, x: LayeredActivations) -> list[F32]:
        """decode(encode(x)), float32 [pos, d_out] of each layer."""
        return self.decode(self.encode(x), x)

    def error(self, x: LayeredActivations, target: LayeredActivations | None = None) -> list[F32]:
        """The part that the reconstruction misses, target - reconstruction, float32 [pos, d_out] of each layer.

        target: the outputs to reconstruct. None: those of the cache x, or for a crosscoder x itself.
        """
        wanted = self._rows(self._target(x, target), self.sites_out, self.d_out, "sites_out")
        found = self(x)
        if len(wanted[0]) != len(found[0]):
            raise ValueError(f"x has {len(found[0])} positions, but target has {len(wanted[0])}")
        return [one - other for one, other in zip(wanted, found, strict=True)]

    # -- one layer -----------------------------------------------------------------------------------------------------

    def direction(self, layer: int, feature: int) -> F32:
        """A feature of a layer writes this to each layer, float32 [n_layers, d_out]. layer: 0 to n_layers - 1, in the
        order of `sites`. Raises IndexError."""
        weights = self._weights_of(layer)
        check_feature(feature, self.d_sae)
        with self._opened.files[layer].reading():
            row = np.array(weights.w_dec[feature], np.float32)
        return row.reshape(self.n_layers, self.d_out)

    def encode_layer(self, layer: int, x: ArrayLike) -> Features:
        """The features of one layer. x: floats [pos, d_in] of that layer's site. Raises what `encode` raises."""
        weights, rows = self._weights_of(layer), self._rows_of(layer, x)
        with self._opened.files[layer].reading():
            return weights.encode(rows)

    def pre_activations(self, layer: int, x: ArrayLike) -> F32:
        """The numbers that the activation function of one layer gets, dense, float32 [pos, d_sae]. As `encode_layer`;
        where a feature fires, it is its value to the bit."""
        weights, rows = self._weights_of(layer), self._rows_of(layer, x)
        with self._opened.files[layer].reading():
            return weights.pre_activations(rows)

    def values_of(self, layer: int, feature: int, x: ArrayLike) -> F32:
        """One feature of a layer at every position, float32 [pos]. As `encode_layer`. Raises IndexError besides."""
        weights, rows = self._weights_of(layer), self._rows_of(layer, x)
        check_feature(feature, self.d_sae)
        with self._opened.files[layer].reading():
            return weights.values_of(feature, rows)

    def written_by(self, layer: int, features: Features) -> F32:
        """Sums that a layer writes to each, float32 [pos, n_layers, d_out]. Raises what `decode` raises."""
        weights = self._weights_of(layer)
        if features.d_sae != self.d_sae:
            raise ValueError(f"these are features of a dictionary of {features.d_sae}, this one has {self.d_sae}")
        ready_blas()
        with self._opened.files[layer].reading():
            return weights.decode(features, None).reshape(len(features), self.n_layers, self.d_out)

    def bias(self, layer: int) -> F32:
        """The constant part of a layer's reconstruction, float32 [d_out]. Raises IndexError."""
        self._weights_of(layer)
        return self._opened.b_dec[layer]

    def has_skip(self, layer: int) -> bool:
        """Whether a layer's input goes into its reconstruction directly, by an affine skip connection. Raises
        IndexError."""
        self._weights_of(layer)
        return self._opened.skips[layer] is not None

    def skipped(self, layer: int, x: ArrayLike) -> F32:
        """The skip connection of a layer, applied to its input, float32 [pos, d_out]: zeros without one. As
        `encode_layer`."""
        self._weights_of(layer)
        rows, skip = self._rows_of(layer, x), self._opened.skips[layer]
        if skip is None:
            return np.zeros((len(rows), self.d_out), np.float32)
        ready_blas()
        with self._opened.files[layer].reading():
            return matmul(rows, skip)

    def check_feature(self, feature: object) -> tuple[int, int]:
        """A pair (layer, feature) of this dictionary. Raises TypeError (no pair), IndexError."""
        if not is_list_or_tuple(feature) or len(feature) != 2:
            raise TypeError(f"a feature of {self!r} is a pair (layer, feature), got {feature!r:.60}")
        layer, number = feature
        self._weights_of(cast(int, layer))
        return int(cast(int, layer)), check_feature(number, self.d_sae)

    def _weights_of(self, layer: int) -> Weights:
        if not is_integer(layer) or not 0 <= layer < self.n_layers:
            raise IndexError(f"there is no layer {layer!r:.40}, the dictionary has 0 to {self.n_layers - 1}")
        return self._opened.weights[layer]

    def _rows_of(self, layer: int, x: ArrayLike) -> F32:
        return as_rows(x, self.d_in, f"layer {layer} of {self!r} reads")

    @cached_property
    def fingerprint(self) -> str:
        """Names a dictionary: 64 hexadecimal digits of its configuration, and of each file the tensors' names and
        shapes and a sample. Raises FormatError for a file that changed."""
        with self._reading():
            return hashlib.sha256(
                "".join(fingerprint_of(file, self.metadata) for file in self._opened.files).encode()
            ).hexdigest()

    # -- checks --------------------------------------------------------------------------------------------------------

    def _target(self, x: LayeredActivations, target: LayeredActivations | None) -> LayeredActivations:
        if target is None and not isinstance(x, Cache):
            raise ValueError("the error needs the outputs besides: error(x, target), or a cache with both")
        return x if target is None else target

    def _inputs(self, x: LayeredActivations) -> list[F32]:
        return self._rows(x, self.sites, self.d_in, "sites")

    def _rows(self, x: LayeredActivations, sites: tuple[str, ...] | None, width: int, which: str) -> list[F32]:
        if isinstance(x, Cache):
            if sites is None:
                raise ValueError(f"the files of {self.path} do not name {which}: give them to load, or pass arrays")
            x = [cast("ArrayLike", x[site]) for site in sites]
        if len(x) != self.n_layers:
            raise ValueError(f"{self!r} has {self.n_layers} layers, got activations of {len(x)}")
        rows = [as_rows(part, width, f"layer {layer} has {which}") for layer, part in enumerate(x)]
        if len({len(part) for part in rows}) != 1:
            raise ValueError(f"the layers have other numbers of positions: {[len(part) for part in rows]}")
        return rows

    def _check_features(self, features: Sequence[Features]) -> None:
        if len(features) != self.n_layers:
            raise ValueError(f"{self!r} has {self.n_layers} layers, got features of {len(features)}")
        for layer, part in enumerate(features):
            if part.d_sae != self.d_sae or len(part) != len(features[0]):
                found = f"{len(part)} positions of {part.d_sae} features"
                raise ValueError(f"layer {layer}: {found}, expected {len(features[0])} of {self.d_sae}")

    # -- life ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with ExitStack() as files:
            for file in self._opened.files:
                files.enter_context(file.reading())
            yield

    def close(self) -> None:
        """Release the files. Using the dictionary afterwards raises StateError."""
        for file in self._opened.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        widths = f"{self.d_in} -> {self.d_sae} -> {self.n_layers} x {self.d_out}"
        return f"{type(self).__name__}({self.format}, {self.n_layers} layers, {widths})"


class Crosscoder(LayeredDictionary):
    """A crosscoder: it reads the residual stream after some layers and reconstructs it after all of them.

        crosscoder = gemma4.Crosscoder.load("gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_65k_l0_medium")
        _, cache = model.run_with_cache(ids, crosscoder.sites)
        features = crosscoder.encode(cache)          # of each layer
        crosscoder.error(cache)

    See `LayeredDictionary` for the attributes. Without sites in the files, they are hook_resid_post of the layers in
    the folder's name.
    """

    _kind = "crosscoder"

    def __init__(self, opened: OpenedLayers, path: Path, sites: Sequence[str] | None, sites_out: Sequence[str] | None):
        super().__init__(opened, path, sites, sites_out)
        self.sites_out = self.sites_out or self.sites

    def _target(self, x: LayeredActivations, target: LayeredActivations | None) -> LayeredActivations:
        return x if target is None else target


class CrossLayerTranscoder(LayeredDictionary):
    """A cross-layer transcoder: it reads the MLPs' inputs and reconstructs the outputs of these and later MLPs.

        clt = gemma4.CrossLayerTranscoder.load("gemma-scope-2-1b-pt/clt/width_262k_l0_medium_affine")
        _, cache = model.run_with_cache(ids, [*clt.sites, *clt.sites_out])
        clt(cache)[5]                                # the reconstruction of layer 5's MLP output
        with model.attach(clt): ...                  # in the forward pass, with error terms

    See `LayeredDictionary` for the attributes. Without sites in the files, they are mlp.hook_in and hook_mlp_out of
    every layer.
    """

    _kind = "clt"
