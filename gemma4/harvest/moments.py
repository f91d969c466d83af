# SPDX-License-Identifier: Apache-2.0
"""Running mean, standard deviation and norm of a site's rows. Merged in a fixed order, so that the bits are fixed, too.

Ref: Chan, Golub, LeVeque, Algorithms for computing the sample variance (1983)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

F64: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """n rows · mean: float64, a row's shape · m2: sum of squared distances from the mean · norm: sum of L2 norms."""

    n: int
    mean: F64
    m2: F64
    norm: float

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Moments:
        return cls(0, np.zeros(shape), np.zeros(shape), 0.0)

    @classmethod
    def of(cls, rows: NDArray[np.float32]) -> Moments:
        """rows: float32 [n, ...], n >= 1. NaN and infinities go into the result."""
        wide = rows.reshape(len(rows), -1).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            norm = float(np.sqrt(np.einsum("nd,nd->n", wide, wide)).sum())
            mean = wide.mean(axis=0)
            wide -= mean
            m2 = np.einsum("nd,nd->d", wide, wide)
        return cls(len(rows), mean.reshape(rows.shape[1:]), m2.reshape(rows.shape[1:]), norm)

    def merged(self, later: Moments) -> Moments:
        """The moments of these rows and of those after them."""
        if not self.n or not later.n:
            return self if self.n else later
        n = self.n + later.n
        with np.errstate(invalid="ignore", over="ignore"):
            apart = later.mean - self.mean
            mean = self.mean + apart * (later.n / n)
            m2 = self.m2 + later.m2 + np.square(apart) * (self.n * later.n / n)
        return Moments(n, mean, m2, self.norm + later.norm)

    def std(self) -> F64:
        """sqrt(m2 / n); 0 without rows."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(self.m2 / max(self.n, 1))

    def mean_norm(self) -> float:
        return self.norm / max(self.n, 1)
