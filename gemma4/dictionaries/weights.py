# SPDX-License-Identifier: Apache-2.0
"""The numbers of a dictionary, its encoder and its decoder. Large matrices stay where they are mapped.

pre = (norm(x) - b_in) @ W_enc + b_enc        values = activation(pre), sparse
out = denorm(values @ W_dec + b_dec) [+ x @ W_skip]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine
from gemma4.dictionaries.features import Features, join
from gemma4.errors import FormatError
from gemma4.memory import ready_blas

F32: TypeAlias = NDArray[np.float32]
Array: TypeAlias = NDArray[Any]
Norm: TypeAlias = Literal["none", "constant_norm_rescale", "layer_norm"]

_ROWS = 512  # positions at a time
_KEPT = 4 << 20  # with top-k: entries that all workers keep at a time, of 12 bytes
_COLUMNS = 4096  # decoder rows at a time, for their norms
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LAYER_NORM_EPS = 1e-5  # SAELens's


class Steps(NamedTuple):
    """From pre-activations x, which are without a bias, to the values of the features, each float32 [d_sae]:
    value = (x + before) * scale + after, where value > max(threshold, 0) and x + gate > 0. None: no such step."""

    before: F32 | None = None
    scale: F32 | None = None
    after: F32 | None = None
    gate: F32 | None = None
    threshold: F32 | None = None

    @property
    def negated(self) -> Steps:
        """Steps that give exactly the negative values."""
        ones = [one for one in (self.before, self.after) if one is not None]
        scale = np.ones_like(ones[0]) if self.scale is None else self.scale
        return self._replace(scale=-scale, after=None if self.after is None else -self.after)


class Activation(Protocol):
    """k: how many features a position has at most, the highest, of equal ones the first; None = any number.
    linear: the steps without a condition, up to the values that the activation function gets (SAELens's acts_pre)."""

    @property
    def k(self) -> int | None: ...

    def steps(self) -> Steps: ...
    def linear(self) -> Steps: ...


@dataclass(frozen=True, eq=False)
class Threshold:
    """ReLU, and JumpReLU: a feature fires strictly above its threshold."""

    b_enc: F32
    threshold: F32  # [d_sae], >= 0
    k: None = None

    def steps(self) -> Steps:
        return Steps(before=self.b_enc, threshold=self.threshold)

    def linear(self) -> Steps:
        return Steps(before=self.b_enc)


@dataclass(frozen=True, eq=False)
class TopK:
    """The k highest pre-activations, where they are positive."""

    b_enc: F32
    k: int
    ranked_by: Array | None = None  # W_dec: they are ranked, and returned, multiplied by the norms of its rows

    def steps(self) -> Steps:
        return Steps(before=self.b_enc, scale=None if self.ranked_by is None else _row_norms(self.ranked_by))

    def linear(self) -> Steps:
        return Steps(before=self.b_enc)


@dataclass(frozen=True, eq=False)
class Gated:
    """A feature fires where gate and magnitude are positive, as strongly as its magnitude."""

    b_gate: F32
    scale: F32  # exp(r_mag)
    b_mag: F32
    k: None = None

    def steps(self) -> Steps:
        return Steps(scale=self.scale, after=self.b_mag, gate=self.b_gate)

    def linear(self) -> Steps:
        return Steps(scale=self.scale, after=self.b_mag)


@lru_cache(maxsize=1)
def _threads() -> _engine.Threads:
    """One worker per core, for all dictionaries."""
    return _engine.Threads()


@dataclass(frozen=True, eq=False)
class Weights:
    """w_enc [d_in, d_sae], w_dec [d_sae, d_out] and w_skip [d_in, d_out] are of any float type, mapped.

    b_in      float32 [d_in], subtracted from the input; None = nothing
    norm      what is done to the input, and undone at the output of an autoencoder
    scale     the input is multiplied by this, the output of an autoencoder divided by it
    by_norm   the decoder's rows count as normalised: values are divided by their norms
    """

    w_enc: Array
    w_dec: Array
    b_dec: F32
    activation: Activation
    b_in: F32 | None = None
    norm: Norm = "none"
    scale: float = 1.0
    by_norm: bool = False
    w_skip: Array | None = None
    denormalise: bool = True  # transcoders do not: their output is another site's
    before_all: Callable[[], None] | None = None  # called before all of w_enc is read, not before single features are

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.w_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_dec.shape[1]

    def encode(self, x: F32) -> Features:
        """x: float32 [pos, d_in], finite. Raises FormatError (weights that are NaN), MemoryError."""
        if self.before_all:
            self.before_all()
        k = self.activation.k or 0
        n_rows = max(1, min(_ROWS, _KEPT // (k * _threads().n + 1)))
        parts = (x[first : first + n_rows] for first in range(0, len(x), n_rows))
        return join((self._encoded(part, 0, self.d_sae) for part in parts), self.d_sae)

    def _encoded(self, x: F32, first: int, n: int) -> Features:
        return Features(*self._encoder.encode(self._prepared(x), first, n), self.d_sae)

    def pre_activations(self, x: F32) -> F32:
        """float32 [pos, d_sae], before the activation function: where a feature fires, its value to the bit, unless
        features are ranked by norms. x, errors: as for `encode`."""
        if self.before_all:
            self.before_all()
        linear = self.activation.linear()
        encoders = [self._encoder_of(steps, 0) for steps in (linear, linear.negated)]
        out = np.empty((len(x), self.d_sae), np.float32)
        n_rows = max(1, min(_ROWS, _KEPT // self.d_sae))
        for first in range(0, len(x), n_rows):
            rows = self._prepared(x[first : first + n_rows])
            above, below = (Features(*encoder.encode(rows), self.d_sae).dense() for encoder in encoders)
            np.subtract(above, below, out=out[first : first + n_rows])
        return out

    @cached_property
    def _encoder(self) -> _engine.FeatureEncoder:
        return self._encoder_of(self.activation.steps(), self.activation.k or 0)

    def _encoder_of(self, steps: Steps, k: int) -> _engine.FeatureEncoder:
        """It reads the matrix where it is mapped. float64, which nobody publishes, is converted as a whole."""
        w = self.w_enc if self.w_enc.dtype.name in _STORED else self.w_enc.astype(np.float32)
        dtype = _STORED[w.dtype.name]
        w = w.view(f"u{w.itemsize}") if w.dtype.name == "bfloat16" else w
        inputs_first = _has_rows(w)
        if not inputs_first:
            w = w.T if _has_rows(w.T) else np.ascontiguousarray(w).T
        names = dict(zip(Steps._fields, steps, strict=True))
        return _engine.FeatureEncoder(_threads(), dtype, w, inputs_first, **names, k=k)

    def _prepared(self, x: F32) -> F32:
        factor, shift = self._norm_of(x)
        if self.norm != "none":
            eps = np.float32(_LAYER_NORM_EPS if self.norm == "layer_norm" else 0)
            x = x - shift
            x /= factor + eps
        if self.scale != 1:
            x = x * np.float32(self.scale)
        return x if self.b_in is None else x - self.b_in

    def _norm_of(self, x: F32) -> tuple[F32, F32]:
        """Factor and shift [pos, 1] with x = normalised * factor + shift."""
        one, zero = np.ones((len(x), 1), np.float32), np.zeros((len(x), 1), np.float32)
        if self.norm == "constant_norm_rescale":
            norms = np.linalg.norm(x, axis=1, keepdims=True) / np.float32(self.d_in**0.5)
            return np.where(norms > 0, norms, one), zero
        if self.norm == "layer_norm":
            return x.std(axis=1, ddof=1, keepdims=True), x.mean(axis=1, keepdims=True)
        return one, zero

    def values_of(self, feature: int, x: F32) -> F32:
        """One feature at every position, float32 [pos]: one column of the encoder, unless features compete."""
        if self.activation.k is not None:
            return self.encode(x).feature(feature)
        return self._encoded(x, feature, 1).feature(feature)

    def written_by(self, feature: int, amounts: F32, x: F32) -> F32:
        """The part of the output that a feature of these values gives, float32 [pos, d_out]. x: the input, used if its
        norm scales the output."""
        row = self.w_dec[feature].astype(np.float32)
        if self.by_norm:
            row /= _norms(row[None])[0] or 1
        part = amounts[:, None] * row
        if self.denormalise:
            part *= self._norm_of(x)[0] / np.float32(self.scale)
        return part

    def needs_input(self) -> bool:
        """Whether the output depends on the input besides through the features."""
        return self.w_skip is not None or (self.norm != "none" and self.denormalise)

    def decode(self, features: Features, x: F32 | None) -> F32:
        """float32 [pos, d_out]. x: the input, where `needs_input`. Only the rows of features that fired are read."""
        ready_blas()
        out = np.empty((len(features), self.d_out), np.float32)
        for row, (ids, values) in zip(out, features, strict=True):
            row[:] = self.b_dec
            if len(ids):
                row += self._written(ids, values)
        if self.denormalise and self.scale != 1:
            out /= np.float32(self.scale)
        if x is not None and self.denormalise and self.norm != "none":
            factor, shift = self._norm_of(x)
            out *= factor
            out += shift
        if x is not None and self.w_skip is not None:
            out += matmul(x, self.w_skip)
        if not np.isfinite(out).all():
            raise FormatError("the decoder's weights give NaN or infinities")
        return out

    def _written(self, ids: NDArray[np.int32], values: F32) -> F32:
        rows = self.w_dec[ids].astype(np.float32, copy=False)
        if self.by_norm:
            norms = _norms(rows)
            norms[norms == 0] = 1
            values = np.divide(values, norms, dtype=np.float32)
        return matmul(values[None], rows)[0]


def _row_norms(matrix: Array) -> F32:
    """float32 [rows]; reads all of it."""
    blocks = (matrix[first : first + _COLUMNS] for first in range(0, len(matrix), _COLUMNS))
    return np.concatenate([_norms(block.astype(np.float32)) for block in blocks])


def _norms(rows: F32) -> F32:
    """float32 [rows]. Raises FormatError for one that is NaN or overflows: its feature would silently never fire."""
    with np.errstate(over="ignore"):
        norms: F32 = np.linalg.norm(rows, axis=1)
    if not np.isfinite(norms).all():
        raise FormatError(
            f"the norms of the decoder's rows hold {norms[~np.isfinite(norms)][0]}, expected finite numbers"
        )
    return norms


def _has_rows(matrix: Array) -> bool:
    """Whether each row is contiguous, and the next one follows."""
    return matrix.strides[1] == matrix.itemsize and matrix.strides[0] >= matrix.shape[1] * matrix.itemsize


def matmul(x: F32, weights: Array) -> F32:
    """float32 [n, k] @ [k, m]. Weights of other types, or that do not lie aligned in their file, are copied."""
    return np.matmul(x, np.require(weights, np.float32, "A"))
