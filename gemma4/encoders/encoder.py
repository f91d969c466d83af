# SPDX-License-Identifier: Apache-2.0
"""A model's image and audio encoders: from patches or spectrogram frames to soft tokens, with every intermediate.

An encoder is bound at its first use, so that a model used for text alone pays nothing for it. With precision="fast" the
weights of its layers are then copied as 12-bit integers (2 bytes each: `Encoder.engine.copied_bytes`), which takes
about a second for the largest, and the file's pages leave memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine
from gemma4.core import Core
from gemma4.edits.scope import Extent, Place
from gemma4.interp.hooks import HookPoint, SiteHooks, active_hooks, bind_hooks, check_hooks, hooks_of, works
from gemma4.interp.sites import Names, Site, SiteTable
from gemma4.load.encoder_config import EncoderConfig, Modality
from gemma4.narrow import is_sequence
from gemma4.profile import step_array

if TYPE_CHECKING:
    from gemma4._engine import EncoderTap

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
# (patches float32 [n, d_in] in 0..1, positions int32 [n, 2] of x and y), or audio frames float32 [n, d_in]
MediumLike: TypeAlias = "tuple[NDArray[np.generic], NDArray[np.integer]] | NDArray[np.generic]"


class Encoder:
    """The "vision" or "audio" encoder of a model. Made by `Model.vision` and `Model.audio`; threads may share it.

    modality  "vision" or "audio"
    config    EncoderConfig
    sites     every site by name, in forward order (docs/sites.md)
    """

    def __init__(self, model: Core, modality: Modality) -> None:
        checkpoint = model.checkpoint
        if modality not in checkpoint.encoders:
            others = ", ".join(checkpoint.encoders) or "none"
            what = "images and video" if modality == "vision" else "audio"
            raise NotImplementedError(
                f"{checkpoint.path} has no {modality} encoder (encoders it has: {others}): {what} need a model with one"
                f"{checkpoint.encoder_advice}"
            )
        checkpoint.check()
        self.modality: Modality = modality
        self.config: EncoderConfig = checkpoint.encoders[modality]
        self._model = model
        tensors = checkpoint.encoder_tensors(modality)
        copied = [buffer for name, (_, _, buffer, _) in tensors.items() if name.endswith(".linear.weight")]
        on_disk = all(isinstance(buffer, _engine.GuardedMap) for buffer in copied)
        self.engine = _engine.Encoder(model.engine, self.config.engine(on_disk), tensors)
        self.sites = SiteTable(self.engine.sites(), [dict[str, object]()] * self.config.n_layers)

    def __repr__(self) -> str:
        layers = f", {self.config.n_layers} layers" if self.config.n_layers else ""
        return f"<gemma4.Encoder {self.config.kind}{layers} of {self._model.checkpoint.path.name}>"

    def encode(self, media: Sequence[MediumLike]) -> list[F32]:
        """Soft tokens, float32 [n, d_model of the text model], of each medium: all in one pass, ragged, not padded.

        media: for vision pairs (patches float32 [n, d_in] in 0..1, positions int32 [n, 2]: x, y of each patch); for
        audio arrays float32 [frames, d_in]. Hooks of an enclosing `model.hooks` run.

        Raises ValueError (shapes, positions outside the table, a grid that does not pool), FormatError and StateError
        (weight files changed or closed), KeyboardInterrupt within 100 ms of Ctrl-C.
        """
        inputs = [self._checked(medium, i) for i, medium in enumerate(media)]
        return self.run(inputs, self.hooks())[0]

    def run_with_cache(
        self, media: Sequence[MediumLike], names: Names = None
    ) -> tuple[list[F32], list[dict[str, F32]]]:
        """Soft tokens as `encode` gives them, and the activations of each medium: site name -> float32 array.

        names: as in `Model.run_with_cache`. None = all but attention scores and patterns. Raises SiteError.
        """
        inputs = [self._checked(medium, i) for i, medium in enumerate(media)]
        return self.run(inputs, self.hooks(), self.sites.select(names))

    def hooks(self) -> SiteHooks:
        """The hooks of every open `model.hooks` block that name sites of this encoder."""
        return bind_hooks(self.sites, hooks_of(active_hooks(self._model), f"{self.modality}."))

    def _checked(self, medium: object, index: int) -> tuple[F32, I32 | None]:
        if self.modality == "audio":
            return self._rows(medium, f"audio {index}"), None
        if not is_sequence(medium) or len(medium) != 2:
            raise TypeError(f"image {index}: expected a pair (patches, positions), got {type(medium).__name__}")
        patches = self._rows(medium[0], f"image {index}")
        positions: NDArray[Any] = np.asarray(medium[1])
        if positions.shape != (len(patches), 2) or positions.dtype.kind not in "iu":
            raise ValueError(
                f"image {index}: positions are {positions.dtype} {positions.shape}, expected integers {len(patches), 2}"
            )
        if positions.size and (positions.min() < 0 or positions.max() >= self.config.n_positions):
            raise ValueError(
                f"image {index}: positions go from {positions.min()} to {positions.max()}, expected 0 to "
                f"{self.config.n_positions - 1}"
            )
        return patches, np.ascontiguousarray(positions, dtype=np.int32)

    def _rows(self, rows: object, what: str) -> F32:
        array: NDArray[Any] = np.asarray(rows)
        if array.ndim != 2 or array.shape[1] != self.config.d_in or array.dtype.kind not in "fiu":
            raise ValueError(f"{what}: got {array.dtype} {array.shape}, expected float32 [n, {self.config.d_in}]")
        if not len(array):
            raise ValueError(f"{what} is empty: there must be at least one row")
        array = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{what}: it holds NaN or infinity")
        return array

    def run(
        self,
        inputs: list[tuple[F32, I32 | None]],
        hooks: SiteHooks,
        capture: Iterable[Site] = (),
        *,
        sequence: int = 0,
        first: int = 0,
    ) -> tuple[list[F32], list[dict[str, F32]]]:
        """`encode` with only these hooks; sequence and the number of the first medium are passed to the hooks.

        inputs: (rows, positions; None for audio), float32 and int32, checked already.
        """
        self._model.checkpoint.check()
        soft = [np.empty((self.engine.soft_tokens(len(rows)), self.config.d_out), np.float32) for rows, _ in inputs]
        caches = [{site.name: self._empty(site, len(rows)) for site in capture} for rows, _ in inputs]
        taps: list[EncoderTap] = []
        for i, (rows, _) in enumerate(inputs):
            sizes = self._sizes(len(rows))
            check_hooks(hooks, lambda site, n=sizes: Extent(0, n[site.rows], n[site.rows], prompt=sequence))
            for site, acts in hooks:
                n = sizes[site.rows]
                point = HookPoint(site.name, site.layer, sequence, np.arange(n), first + i)
                place = Place(0, n, n, prompt=sequence)
                done = works(site, acts, point, self._model.nan_log, lambda edit, place=place: edit.taps(place))
                taps += [(site.id, site.layer or 0, i, *work) for work in done]
            taps += [(self.sites[name].id, self.sites[name].layer or 0, i, a, None) for name, a in caches[i].items()]
        media = [(rows, at, out) for (rows, at), out in zip(inputs, soft, strict=True)]
        with step_array(self._model, self.modality) as profile:
            self.engine.encode(media, taps, profile=profile)
        return soft, caches

    def _empty(self, site: Site, n_rows: int) -> F32:
        sizes = self._sizes(n_rows)
        return np.empty(tuple(sizes[dim] if isinstance(dim, str) else dim for dim in site.dims), np.float32)

    def _sizes(self, n_rows: int) -> dict[str, int]:
        """Sizes for the letters of a site's dims, for a medium of n_rows input rows."""
        n_soft = self.engine.soft_tokens(n_rows)
        inside = n_soft if self.config.kind == "audio_tower" else n_rows
        return {"T": inside, "S": inside, "N": n_soft, "U": (n_rows + 1) // 2}


class _Bound(dict[Modality, Encoder]):
    """The bound encoders of one model."""


def encoder_of(model: Core, modality: Modality) -> Encoder:
    """The model's encoder, bound at its first use. Raises NotImplementedError if the checkpoint has none."""
    bound = model.attached(_Bound)
    return bound[modality] if modality in bound else bound.setdefault(modality, Encoder(model, modality))
