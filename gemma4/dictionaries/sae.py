# SPDX-License-Identifier: Apache-2.0
"""Dictionaries for users: files in, sparse features and reconstructions out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.dictionaries.features import F32, Features, check_feature
from gemma4.dictionaries.formats import Opened, open_dictionary
from gemma4.dictionaries.shipped import locate
from gemma4.edits.recipes import Cache
from gemma4.html import Picture
from gemma4.html.cells import plain
from gemma4.interp.sites import canonical_name
from gemma4.load.mapped import MappedFile
from gemma4.narrow import is_dict

Activations: TypeAlias = ArrayLike | Cache
_MOST_FACTS = 24  # of a configuration, that a table shows
_SAMPLES, _SAMPLE = 64, 4096  # stretches of a file in its fingerprint, and their bytes


@dataclass(frozen=True, slots=True)
class Metrics:
    """How well a dictionary explains some activations.

    explained_variance  1 - |target - reconstruction|^2 / |target - mean|^2, over all positions; 1 is perfect
    l0                  mean number of features that fire at a position
    dead                share of the features that fire at none of these positions
    """

    explained_variance: float
    l0: float
    dead: float


class Dictionary:
    """The common part of autoencoders and transcoders. Its files stay mapped: only the pages in use take memory.

    format      "Gemma Scope 1", "Gemma Scope 2", "SAELens" or "sparsify"
    site        the site that it reads, by our name; None if its files do not say
    d_in, d_sae, d_out   widths of its input, features, output
    metadata    its configuration as stored
    skip_positions       positions at a prompt's start that it was not trained on: 4 for Gemma Scope 2 of -it models
                (<bos><start_of_turn>user newline), else 0. Of a cache they get no features.
    """

    _is_transcoder: ClassVar[bool]

    def __init__(self, opened: Opened, path: Path, site: str | None = None) -> None:
        self.path, self.format, self.metadata = path, opened.format, opened.metadata
        self.skip_positions = opened.skip_positions
        self.site = opened.site if site is None else canonical_name(site)
        self.d_in, self.d_sae, self.d_out = (getattr(opened.weights, name) for name in ("d_in", "d_sae", "d_out"))
        self._file, self._weights = opened.file, opened.weights

    @classmethod
    def _opened(cls, path: str | os.PathLike[str]) -> tuple[Opened, Path]:
        path = locate(path)
        opened = open_dictionary(path)
        if opened.transcoder is (not cls._is_transcoder):
            opened.file.close()
            kind, other = ("a transcoder", Transcoder) if opened.transcoder else ("an autoencoder", SAE)
            raise ValueError(f"{path} is {kind}: open it with gemma4.{other.__name__}.load")
        return opened, path

    # -- features ------------------------------------------------------------------------------------------------------

    def encode(self, x: Activations) -> Features:
        """The features that fire at each position.

            features = sae.encode(cache)       # or cache["blocks.3.hook_resid_post"]
            features[5].ids, features[5].values

        x  floats [pos, d_in], or [pos, heads, d_head] with heads * d_head = d_in; or an `ActivationCache` that holds
           `site`, of which `skip_positions` are left out

        Computed in float32, in blocks: the dense [pos, d_sae] never exists. Raises ValueError (another width, NaN or
        infinities), TypeError (no numbers), StateError (closed), FormatError (the file changed, or holds NaN).
        """
        if isinstance(x, Cache):
            return self._encode_captured(x)
        return self._encode(self._rows(x))

    def _encode_captured(self, cache: Cache) -> Features:
        features = self._encode(self._rows(cache))
        return without_rows(features, cache.positions < self.skip_positions)

    def _encode(self, rows: F32) -> Features:
        with self._file.reading():
            return self._weights.encode(rows)

    def pre_activations(self, x: Activations) -> F32:
        """The numbers that the activation function gets, dense, float32 [pos, d_sae]: SAELens's hook_sae_acts_pre.

        In gated dictionaries it is the magnitude. Arguments and errors as for `encode`; no position is left out.
        """
        rows = self._rows(x)
        with self._file.reading():
            return self._weights.pre_activations(rows)

    def decode(self, features: Features, x: Activations | None = None) -> F32:
        """The reconstruction, float32 [pos, d_out]; only decoder rows of features that fired are read.

        x: the input, which skip connections and dictionaries that normalise their input need besides. Raises ValueError
        (it is missing, or features of another dictionary), and what `encode` raises.
        """
        if features.d_sae != self.d_sae:
            raise ValueError(f"these are features of a dictionary of {features.d_sae}, this one has {self.d_sae}")
        if x is None and self._weights.needs_input():
            raise ValueError(f"{self!r} needs the input besides: decode(features, x)")
        rows = None if x is None else self._rows(x)
        if rows is not None and len(rows) != len(features):
            raise ValueError(f"features of {len(features)} positions, but x has {len(rows)}")
        with self._file.reading():
            return self._weights.decode(features, rows)

    def direction(self, feature: int) -> F32:
        """The direction that a feature writes, its row of the decoder, float32 [d_out]. Raises IndexError."""
        check_feature(feature, self.d_sae)
        with self._file.reading():
            return np.array(self._weights.w_dec[feature], np.float32)

    def values_of(self, feature: int, x: Activations) -> F32:
        """One feature at every position, float32 [pos]. Raises what `encode` raises, and IndexError."""
        check_feature(feature, self.d_sae)
        rows = self._rows(x)
        with self._file.reading():
            return self._weights.values_of(feature, rows)

    def add_feature(self, out: F32, feature: int, amounts: F32) -> None:
        """Change the site that the dictionary writes, in place, as if a feature fired more strongly.

        out: float32 [pos, d_out] (or heads). amounts: float32 [pos]; positions with 0 keep their bits.
        """
        check_feature(feature, self.d_sae)
        rows, at = out.reshape(len(out), -1), amounts != 0
        with self._file.reading():
            written = self._weights.written_by(feature, amounts[at], rows[at])
        rows[at] += written

    def __call__(self, x: Activations) -> F32:
        """decode(encode(x)), float32 [pos, d_out]."""
        return self.decode(self.encode(x), x)

    def _metrics(self, x: Activations, target: F32) -> Metrics:
        trained_on = x.positions >= self.skip_positions if isinstance(x, Cache) else np.ones(len(target), np.bool_)
        n = int(trained_on.sum())
        if not n:
            raise ValueError(f"metrics need at least one position from {self.skip_positions} on")
        features = self.encode(x)  # the others have none
        missed, target = (target - self.decode(features, x))[trained_on], target[trained_on]
        spread = np.square(target - target.mean(axis=0, dtype=np.float64)).sum()
        lost = np.square(missed, dtype=np.float64).sum()
        explained = 1 - lost / spread if spread else float("nan")
        dead = 1 - len(np.unique(features.ids)) / self.d_sae
        return Metrics(float(explained), len(features.ids) / n, dead)

    def _rows(self, x: Activations) -> F32:
        return as_rows(self._of_cache(x, self.site), self.d_in, f"{self!r} reads")

    def _of_cache(self, x: object, site: str | None) -> object:
        if not isinstance(x, Cache):
            return x
        if site is None:
            raise ValueError(
                f"the files of {self.path} do not name its site: give it to load, or pass the array itself"
            )
        return x[site]

    @cached_property
    def fingerprint(self) -> str:
        """Names a dictionary: 64 hexadecimal digits of its tensors' names and shapes, its configuration and a sample of
        its file, 64 pages. Raises what `encode` raises for a file that changed."""
        with self._file.reading():
            return fingerprint_of(self._file, self.metadata)

    @property
    def model_fingerprint(self) -> str | None:
        """`fingerprint` of the model whose activations it was trained on; None if its files do not say."""
        inner = self.metadata.get("metadata")
        found = inner.get("model_fingerprint") if is_dict(inner) else None
        return found if isinstance(found, str) else None

    # -- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the file. Using the dictionary afterwards raises StateError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to_html(self) -> Picture:
        """A table: format, site, widths, and the configuration as stored (long values are cut)."""
        facts = [("format", self.format), ("files", self.path.name), ("site", self.site or "unnamed")]
        facts += [(name, f"{getattr(self, name):,}") for name in ("d_in", "d_sae", "d_out", "skip_positions")]
        stored = [(name, f"{value!r:.120}") for name, value in list(self.metadata.items())[:_MOST_FACTS]]
        return Picture(type(self).__name__, plain(("", ""), facts + stored))

    def _repr_html_(self) -> str:
        return self.to_html().fragment()

    def _sites(self) -> str:
        return f"reads {self.site or 'an unnamed site'}"

    def __repr__(self) -> str:
        widths = f"{self.d_in} -> {self.d_sae} -> {self.d_out}"
        return f"{type(self).__name__}({self.format}, {widths}, {self._sites()})"


class SAE(Dictionary):
    """A sparse autoencoder. `site` is what it reads and reconstructs.

        sae = gemma4.SAE.load("gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium")
        _, cache = model.run_with_cache(ids, sae.site)
        sae.encode(cache)[-1].ids

    See `Dictionary` for the attributes.
    """

    _is_transcoder = False

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, site: str | None = None) -> Self:
        """Open the folder or the file of a dictionary; the format is recognised. Files are mapped, not read.

        path  Gemma Scope 1 (params.npz), Gemma Scope 2 (params.safetensors, config.json), SAELens
              (sae_weights.safetensors, cfg.json) or sparsify (sae.safetensors, cfg.json); or the name of a shipped
              one, "tiny-e/blocks.4.hook_resid_post": `gemma4.dictionaries.shipped_dictionaries` lists them
        site  the site that it reads, where the files do not say, or another one

        Raises FileNotFoundError, OSError, FormatError (damaged, another format, a pickle), NotImplementedError (an
        architecture or option that is not computed), ValueError (a transcoder).
        """
        opened, path = cls._opened(path)
        if opened.weights.d_in != opened.weights.d_out:
            opened.file.close()
            raise ValueError(f"{path} has other widths of input and output: open it with gemma4.Transcoder.load")
        return cls(opened, path, site)

    def error(self, x: Activations) -> F32:
        """The part that the reconstruction misses, x - sae(x), float32 [pos, d_in]."""
        return self._rows(x) - self(x)

    def metrics(self, x: Activations) -> Metrics:
        """Explained variance, L0 and the share of dead features on these activations."""
        return self._metrics(x, self._rows(x))


class Transcoder(Dictionary):
    """A transcoder: it reads `site` and reconstructs `site_out`, mostly an MLP's input and output.

    See `Dictionary` for the attributes.
    """

    _is_transcoder = True

    def __init__(self, opened: Opened, path: Path, site: str | None = None, site_out: str | None = None) -> None:
        self.site_out = opened.site_out if site_out is None else canonical_name(site_out)
        super().__init__(opened, path, site)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, site: str | None = None, site_out: str | None = None) -> Self:
        """As `SAE.load`; site_out: the site that it reconstructs, where the files do not say, or another one."""
        opened, path = cls._opened(path)
        return cls(opened, path, site, site_out)

    def error(self, x: Activations, target: Activations | None = None) -> F32:
        """The part that the reconstruction misses, target - transcoder(x), float32 [pos, d_out].

        target: the output to reconstruct, floats [pos, d_out]; None if x is a cache that holds `site_out`.
        """
        return self._target(x, target) - self(x)

    def metrics(self, x: Activations, target: Activations | None = None) -> Metrics:
        """Explained variance of the target, L0 and the share of dead features. Arguments as for `error`."""
        return self._metrics(x, self._target(x, target))

    def _target(self, x: Activations, target: Activations | None) -> F32:
        if target is None and not isinstance(x, Cache):
            raise ValueError("a transcoder's error needs the output besides: error(x, target), or a cache with both")
        given: object = x if target is None else target
        return as_rows(self._of_cache(given, self.site_out), self.d_out, f"{self!r} writes")

    def _sites(self) -> str:
        return f"{super()._sites()}, writes {self.site_out or 'an unnamed site'}"


def fingerprint_of(file: MappedFile, metadata: Mapping[str, object]) -> str:
    """64 hexadecimal digits of a configuration, the tensors' names and places in a file, and a sample of its bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, info in sorted(file.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.offset}\n".encode())
    last = max(file.nbytes - _SAMPLE, 0)
    for i in range(_SAMPLES):
        first = last * i // (_SAMPLES - 1)
        digest.update(file.buffer[first : first + _SAMPLE])
    return digest.hexdigest()


def as_rows(x: object, width: int, what: str) -> F32:
    """float32 [pos, width]; heads are concatenated. Raises TypeError, ValueError."""
    array = np.asarray(x)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"activations must be numbers, got {array.dtype}")
    if array.ndim not in (2, 3) or int(np.prod(array.shape[1:])) != width:
        raise ValueError(f"{what} [pos, {width}] (or [pos, heads, d_head] of that width), got {list(array.shape)}")
    rows = np.ascontiguousarray(array.reshape(len(array), width), np.float32)
    if not np.isfinite(rows).all():
        row = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise ValueError(f"the activations at row {row} hold NaN or infinities")
    return rows


def without_rows(features: Features, rows: NDArray[np.bool_]) -> Features:
    """The same positions, with nothing fired at those."""
    if not rows.any():
        return features
    kept = ~rows[features.rows]
    counts = np.where(rows, 0, features.counts)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Features(offsets, features.ids[kept], features.values[kept], features.d_sae)
