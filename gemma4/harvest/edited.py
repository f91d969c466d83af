# SPDX-License-Identifier: Apache-2.0
"""Edits of a harvest: a file in the dataset's folder, and how they act in sequences of any length."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from gemma4 import checks
from gemma4.dictionaries.edits import FeatureEdit
from gemma4.dictionaries.sae import Dictionary
from gemma4.edits.base import Edit, SiteEdit, checked_edits
from gemma4.edits.files import Tensors, file_of, load_edits, parts_of
from gemma4.edits.recipes import FromPrompt, Patch
from gemma4.edits.scope import Bools, Extent, listed, mask_of
from gemma4.errors import FormatError, SiteError
from gemma4.files import StrPath
from gemma4.harvest.dictionaries import fingerprint
from gemma4.harvest.pieces import Piece
from gemma4.harvest.store import EDITS, Store
from gemma4.interp.hooks import Activated, bind_hooks, check_hooks, hooks_of
from gemma4.interp.sites import Site, SiteTable
from gemma4.load.encoder_config import MODALITIES
from gemma4.model import Model
from gemma4.narrow import is_dict, is_list

Edits: TypeAlias = StrPath | Edit | Iterable[Edit]


@dataclass(frozen=True, slots=True)
class EditSet:
    """The edits of a harvest. data: their file · facts: their description in the manifest, the same wherever their
    dictionaries are; None: there are no edits"""

    edits: tuple[Edit, ...] = ()
    data: bytes = b""
    facts: dict[str, Any] | None = None


def edit_set(given: Edits, model: Model, store: Store) -> EditSet:
    """Edits, or those of a file, checked for a harvest with this model.

    Raises TypeError (no edit, or one that is no data), ValueError (an edit that has no meaning in a harvest, or does
    not fit the model), SiteError, FormatError (no such file, or values of another model), FileNotFoundError.
    """
    if isinstance(given, str | os.PathLike):
        edits = load_edits(Path(os.path.expanduser(checks.path("edits", given))), model=model)
    else:
        edits = checked_edits(given)
    if not edits:
        return EditSet()
    for edit in edits:
        _check_scope(edit)
    _ = model.edit(edits)  # raises for one that does not fit
    rows, tensors = parts_of(edits, store.root.absolute())
    _check_models(rows, model)
    return EditSet(tuple(edits), file_of(rows, tensors), _facts(edits, rows, tensors))


def _check_scope(edit: Edit) -> None:
    if isinstance(edit, Patch) and isinstance(edit.value, FromPrompt):
        raise ValueError(f"{edit}: in a harvest no document takes from another one; give a cache or an array")
    if edit.prompts is not None:
        raise ValueError(f"{edit}: a harvest has documents, not the prompts of a batch; leave prompts= out")
    if edit.step_set not in (None, {0}):
        raise ValueError(f"{edit}: a harvest runs every sequence as a prompt, which is step 0; leave steps= out")


def _check_models(rows: object, model: Model) -> None:
    """Raise ValueError for values from a cache of another model."""
    if is_dict(rows) and {"cache", "model"} <= set(rows) and rows["model"] not in ("", model.fingerprint):
        found = f"{rows['model']!r:.40}, this one is {model.fingerprint!r}"
        raise ValueError(f"an edit's cache is of another model (fingerprint {found}): make the edit again")
    for one in rows.values() if is_dict(rows) else rows if is_list(rows) else ():
        _check_models(one, model)


def _facts(edits: Iterable[Edit], rows: list[dict[str, Any]], tensors: Tensors) -> dict[str, Any]:
    of_tensors = {
        name: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
        for name, array in tensors.items()
    }
    used = [edit.dictionary for edit in edits if isinstance(edit, FeatureEdit)]
    paths = dict.fromkeys(dictionary.path for dictionary in used if isinstance(dictionary, Dictionary))
    facts = {"edits": _without_places(rows), "tensors": of_tensors, "dictionaries": [fingerprint(p) for p in paths]}
    return cast("dict[str, Any]", json.loads(json.dumps(facts)))


def _without_places(value: object) -> object:
    """JSON of edits without the paths of dictionaries, which are named by fingerprints besides."""
    if is_list(value):
        return [_without_places(one) for one in value]
    if not is_dict(value):
        return value
    places = {"path", "beside"} if "fingerprint" in value else set[str]()
    return {key: _without_places(one) for key, one in value.items() if key not in places}


# -- what they can change ----------------------------------------------------------------------------------------------


def is_in_reach(edit: Edit, table: SiteTable, captured: Sequence[Site]) -> bool:
    """Whether it acts before a captured site, or there."""
    if _encoders_of(edit):
        return True
    order = {name: i for i, name in enumerate(table)}
    last = max(order[site.name] for site in captured)
    return any(order[part.site.name] <= last for part in edit.bound(table))


def sites_beyond(edits: Sequence[Edit], table: SiteTable, captured: Sequence[Site], stop: int | None) -> list[Site]:
    """Sites that edits name beyond the blocks that captures need; a run must reach all that is named.

    Raises ValueError if no edit changes what is captured.
    """
    reaching = [edit for edit in edits if is_in_reach(edit, table, captured)]
    if not reaching:
        order = list(table)
        first, last = edits[0].bound(table)[0].site.name, max((site.name for site in captured), key=order.index)
        raise ValueError(f"the edits would change nothing that is stored: {edits[0]} acts at {first}, after {last}")
    beyond: list[Site] = []
    for text in filter(None, (edit.within("") for edit in reaching)):
        try:
            _ = text.bound(table, stop_at_layer=stop)
        except SiteError:
            beyond += [part.site for part in text.bound(table)]
    return beyond


def check_effects(edits: Sequence[Edit], model: Model, context: int) -> None:
    """Raise ValueError for edits that act in no sequence of at most that many tokens, or contradict in a long one."""
    ends = [_ends(edit) for edit in edits]
    for edit, named in zip(edits, ends, strict=True):
        needed = [end + 1 if end >= 0 else -end for end in named]
        if listed(edit.pos) and not _encoders_of(edit) and min(needed) > context:
            raise ValueError(f"{edit}: no sequence has position {edit.pos}: the context is {context} (context=)")
    hooks = bind_hooks(model.sites, hooks_of([InSequence.of(edit, strict=True) for edit in edits]))
    for part in (act for _, acts in hooks for act in acts if isinstance(act, SiteEdit)):
        if part.rows and min(part.rows) < 0 <= max(part.rows):
            raise ValueError(
                f"{part.edit}: pos has a value for each position, and counts some from the end: in sequences of some "
                "lengths two would be the same; count all from one side"
            )
    furthest = min(max((abs(end) for named in ends for end in named), default=0), context)
    length = max(context, 2 * furthest + 2)  # so long that positions from the two ends do not meet
    check_hooks(hooks, Extent(0, length, length))


def check_hits(edits: Iterable[Edit], pieces: Iterable[Piece]) -> None:
    """Raise ValueError for an edit at positions, or of media, that no sequence has. It reads no further than needed."""
    left = [edit for edit in edits if edit.pos is not None or edit.within("") is None]
    n_pieces = 0
    for piece in pieces if left else ():
        n_pieces += 1
        left = [edit for edit in left if not _acts_in(edit, piece)]
        if not left:
            return
    if left and n_pieces:
        inside = " and ".join(_encoders_of(left[0]))
        what = f"media for the encoder of {inside}" if inside else f"position {left[0].pos}"
        raise ValueError(f"{left[0]} would never act: none of the {n_pieces:,} sequences has {what}")


def _acts_in(edit: Edit, piece: Piece) -> bool:
    if edit.within("") is None:
        return _has_media_of(edit, piece)
    length = len(piece)
    return bool(mask_of(edit.where, np.arange(length), length).any()) or _has_media_of(edit, piece)


def _ends(edit: Edit) -> list[int]:
    """The positions that an edit names, or the ends of its slice."""
    where = edit.where
    found = [where.start, where.stop] if isinstance(where, slice) else list(listed(where) or ())
    return [end for end in found if end is not None]


def _encoders_of(edit: Edit) -> list[str]:
    return [modality for modality in MODALITIES if edit.within(f"{modality}.") is not None]


def _has_media_of(edit: Edit, piece: Piece) -> bool:
    kinds = {"audio" if run.medium.kind == "audio" else "vision" for run in piece.prompt.runs}
    return not kinds.isdisjoint(_encoders_of(edit))


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class InSequence(Edit):
    """An edit in sequences of any length: positions that a sequence lacks are not edited there.

    strict: refuse one that others overwrite. In one short sequence edits may meet that elsewhere do not: there the last
    one counts.
    """

    edit: Edit
    strict: bool = False

    @classmethod
    def of(cls, edit: Edit, *, strict: bool = False) -> InSequence:
        return cls(edit=edit, strict=strict, pos=edit.pos)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("overwrites", self.strict and self.edit.overwrites)

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        return [replace(part, edit=self) for part in self.edit.bound(table, stop_at_layer=stop_at_layer)]

    def within(self, prefix: str) -> Edit | None:
        part = self.edit.within(prefix)
        return None if part is None else replace(self, edit=part)

    def check_extent(self, extent: Extent, *, cached: bool) -> Bools:
        positions = np.arange(0 if cached else extent.first, extent.end)
        return mask_of(self.where, positions, extent.n_prompt)

    def __str__(self) -> str:
        return str(self.edit)


class Editing:
    """The edits of a plan, in a worker."""

    def __init__(self, model: Model, edits: Iterable[Edit], captured: Sequence[Site]) -> None:
        self._model = model
        self._edits = [InSequence.of(edit) for edit in edits if is_in_reach(edit, model.sites, captured)]

    @classmethod
    def of(cls, model: Model, facts: dict[str, Any] | None, store: Store, captured: Sequence[Site]) -> Editing:
        """The edits of the dataset's folder. facts: as planned; None: there are none.

        Raises FormatError (others than planned), FileNotFoundError (a dictionary), OSError.
        """
        if facts is None:
            return cls(model, (), captured)
        edits = load_edits(store.root / EDITS, model=model)
        if _facts(edits, *parts_of(edits, store.root.absolute())) != facts:
            raise FormatError(f"{store.root / EDITS}, or a dictionary that it names, changed since the harvest began")
        return cls(model, edits, captured)

    @contextmanager
    def open(self, batch: Sequence[Piece], stop_at_layer: int | None) -> Iterator[None]:
        """The edits act on what runs inside: these sequences. Raises ValueError naming a document that they do not
        fit."""
        edits = [
            edit
            for edit in self._edits
            if edit.within("") is not None or any(_has_media_of(edit, piece) for piece in batch)
        ]
        try:
            with Activated(self._model, edits):
                yield
        except ValueError:
            hooks = bind_hooks(self._model.sites, hooks_of(edits), stop_at_layer=stop_at_layer)
            for piece in batch:
                try:
                    check_hooks(hooks, Extent(0, len(piece), len(piece)))
                except ValueError as error:
                    raise ValueError(f"document {piece.document} of the corpus (from 0): {error}") from None
            raise
