# SPDX-License-Identifier: Apache-2.0
"""Hooks and captures of a run inside the encoders of its pictures, sounds and videos."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core
from gemma4.edits.base import Edit
from gemma4.encoders.encoder import encoder_of
from gemma4.encoders.soft_tokens import BOTH_WAYS, SOFT_ID, EncodedMedia, SoftRows, encode, stretch_ends
from gemma4.interp.cache import EncoderCache
from gemma4.interp.hooks import Hook, Nested, SiteHooks, bind_hooks, hooks_of
from gemma4.interp.sites import Names, Site, names_of
from gemma4.load.encoder_config import MODALITIES, Modality
from gemma4.media.medium import Kind, Medium
from gemma4.media.prompt import TokenizedPrompt


@dataclass(frozen=True, slots=True)
class EncoderTaps:
    """Hooks of one call, and the names of the sites that it keeps; names of the text model are ignored here.

    Media with hooks or captures are encoded anew. Edited results enter no cache.
    """

    hooks: tuple[Hook, ...] = ()
    names: Names = ()

    @classmethod
    def of(cls, model: Core, hooks: Iterable[Hook] = (), names: Names = ()) -> EncoderTaps:
        """Raises SiteError and NotImplementedError for names that the model's encoders lack, now and not at the first
        picture. Predicates are called when there is one.
        """
        hooks = tuple(hooks)
        for modality in MODALITIES:
            named = [
                hook
                for hook in hooks_of(hooks, f"{modality}.")
                if isinstance(hook, Edit | Nested) or not callable(hook[0])
            ]
            wanted: Names = [] if callable(names) else names_of(names, f"{modality}.")
            if named or wanted:
                encoder = encoder_of(model, modality)
                bind_hooks(encoder.sites, named)
                encoder.sites.select(wanted)
        return cls(hooks, names)

    def check(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """Raise ValueError for an edit that acts inside encoders alone, if no prompt of the call has their media.

        prompts: all of the call, by their index in the batch.
        """
        runs = [{_modality(run.medium.kind) for run in prompt.runs} for prompt in prompts]
        for edit in self.hooks:
            if not isinstance(edit, Edit) or edit.within("") is not None:
                continue
            inside = [modality for modality in MODALITIES if edit.within(f"{modality}.") is not None]
            if not any(edit.concerns(i) and found.intersection(inside) for i, found in enumerate(runs)):
                raise ValueError(
                    f"{edit} acts inside the encoder of {' and '.join(inside)} alone, but no prompt of this call "
                    "that it concerns has such a medium"
                )

    def encode(
        self, model: Core, medium: Medium, *, sequence: int, first: int
    ) -> tuple[NDArray[np.float32], list[dict[str, NDArray[np.float32]]]]:
        """Soft tokens float32 [n_runs * run_length, d_model], and the captures of each run ([] if none were requested).

        sequence, first: passed to hooks, the prompt's index in the batch and the medium's first run in the prompt.
        """
        hooks, sites = self._bound(model, medium.kind)
        if not hooks and not sites:
            return model.attached(EncodedMedia).get(model, medium), []
        made, caches = encode(model, medium, hooks, sites, sequence=sequence, first=first)
        return made, caches if sites else []

    def soft_rows(self, model: Core, prompt: TokenizedPrompt, start: int = 0, sequence: int = 0) -> SoftRows | None:
        """The soft rows of positions from start on; None if all are tokens. Media are encoded, or come from the cache.

        sequence: the prompt's index in the batch, for hooks.
        """
        runs = [(i, run) for i, run in enumerate(prompt.runs) if run.stop > start]
        if not runs:
            return None
        encoded: dict[int, Any] = {}  # by the number of the medium's first run
        caches: list[EncoderCache] = []
        ids = prompt.ids[start:].copy()
        both_ways = np.zeros(len(ids), np.bool_)
        # calloc: pages of text positions are never read, so they are never touched
        embeddings = np.zeros((len(ids), model.engine_config["d_model"]), np.float32)
        for i, run in runs:
            frame = run.first // run.medium.run_length
            if i - frame not in encoded:
                encoded[i - frame] = self.encode(model, run.medium, sequence=sequence, first=i - frame)
            rows, captured = encoded[i - frame]
            if captured:
                caches.append(EncoderCache(run, captured[frame]))
            begin = max(run.start, start)
            ids[begin - start : run.stop - start] = SOFT_ID[run.medium.kind]
            both_ways[begin - start : run.stop - start] = run.medium.kind in BOTH_WAYS
            first = run.first + begin - run.start
            embeddings[begin - start : run.stop - start] = rows[first : first + run.stop - begin]
        ends = stretch_ends(both_ways) if both_ways.any() else None
        return SoftRows(ids, embeddings, prompt.keys()[start:], ends, tuple(caches))

    def apart(self, model: Core, prompt: TokenizedPrompt) -> TokenizedPrompt:
        """The prompt with unique keys for media that hooks may edit: a cached sequence must not match them with its
        contents, nor match them later with the unedited media.
        """
        kinds: set[Kind] = {run.medium.kind for run in prompt.runs}
        edited = {kind for kind in kinds if self._bound(model, kind)[0]}
        if not edited:
            return prompt
        media = {id(run.medium): run.medium for run in prompt.runs if run.medium.kind in edited}
        fresh = {key: dataclasses.replace(medium, digest=os.urandom(16)) for key, medium in media.items()}
        runs = (dataclasses.replace(run, medium=fresh.get(id(run.medium), run.medium)) for run in prompt.runs)
        return TokenizedPrompt(prompt.ids, tuple(runs))

    def _bound(self, model: Core, kind: Kind) -> tuple[SiteHooks, list[Site]]:
        modality = _modality(kind)
        hooks, names = hooks_of(self.hooks, f"{modality}."), names_of(self.names, f"{modality}.")
        if not hooks and not names:  # an encoder without hooks and captures need not be bound
            return [], []
        encoder = encoder_of(model, modality)
        return bind_hooks(encoder.sites, hooks), encoder.sites.select(names)


def _modality(kind: Kind) -> Modality:
    return "audio" if kind == "audio" else "vision"
