# SPDX-License-Identifier: Apache-2.0
"""Harvest: from a model, a corpus and names of sites to a dataset of activations. Stopped anyhow, it resumes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from gemma4 import checks
from gemma4.errors import FormatError
from gemma4.files import StrPath
from gemma4.harvest.corpus import WEIGHT_OF_TOKEN, Corpus, Scanning
from gemma4.harvest.dictionaries import make_coding, paths_of
from gemma4.harvest.edited import Edits, edit_set
from gemma4.harvest.finish import begin, finish
from gemma4.harvest.hashing import Going, each
from gemma4.harvest.local import run_here, run_processes
from gemma4.harvest.plan import FORMAT, VERSION, Options, Plan, SiteNames, differences, make_plan
from gemma4.harvest.ray_data import run_ray
from gemma4.harvest.readers import SampleBy
from gemma4.harvest.store import EDITS, MANIFEST, Store
from gemma4.harvest.worker import Ended, Event, Ran, Spec
from gemma4.interp.saved import SavedDtype
from gemma4.model import Model
from gemma4.narrow import is_dict

Engine: TypeAlias = Literal["local", "ray"]
Dictionaries: TypeAlias = StrPath | Iterable[StrPath | tuple[StrPath, str | None]] | Mapping[StrPath, str | None]
MAX_WORKERS = 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a harvest is.

    shards, n_shards  that are there, of those to make in all
    tokens            of this run, up to now
    total             tokens that this run will have had at the end: an estimate until then
    seconds           since the first step began
    """

    shards: int
    n_shards: int
    tokens: int
    total: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds left; None if unknown."""
        return (self.total - self.tokens) / self.rate if self.rate else None


@dataclass(frozen=True, slots=True)
class Harvested:
    """The end of `harvest`.

    path      the dataset's folder
    complete  whether every shard is there; not so after one part of several
    made, kept, n_shards   shards of this run, shards that were there already, all of them
    tokens, seconds        of this run
    """

    path: Path
    complete: bool
    made: int
    kept: int
    n_shards: int
    tokens: int
    seconds: float


def harvest(
    model: Model,
    corpus: StrPath | Iterable[StrPath],
    sites: SiteNames = (),
    *,
    out: StrPath,
    dtype: SavedDtype = "bf16",
    context: int | None = None,
    max_tokens: int | None = None,
    key: str | None = None,
    sample_by: SampleBy = "line",
    image_tokens: int | None = None,
    skip_damaged: bool = False,
    sae: Dictionaries = (),
    top_k: int | None = None,
    examples: int = 20,
    edits: Edits = (),
    shard_tokens: int = 1 << 14,
    workers: int = 1,
    engine: Engine = "local",
    part: tuple[int, int] = (0, 1),
    progress: Callable[[Progress], None] = lambda progress: None,
    scanning: Scanning = lambda weight, name: None,
) -> Harvested:
    """Run a model over a corpus and store activations. Run again after any end, it makes the shards that are missing.

        harvest(model, "text.jsonl", "blocks.{5,12}.hook_resid_post", out="acts", workers=2)
        dataset = gemma4.harvest.open("acts")

    corpus        files, or folders of files, of .jsonl, .txt, .parquet, .arrow (the last two need gemma4[harvest]), and
                  pictures, recordings and videos. A document is a text, token ids or chat messages, with media as parts
    sites         names, globs and braces; of every site a row for each token is stored. None with `sae` alone
    out           the dataset's folder: new, empty, or of the same harvest
    dtype         "bf16", "f16" or "f32": floats are rounded to nearest
    context       tokens of a sequence at most; longer documents continue in further sequences, each with BOS in front
                  if the document begins so. None = 1024, or the model's context. Nothing is packed or padded
    max_tokens    end the corpus there; None = all of it
    key           field or column of the content; None = the first of text, messages, tokens, input_ids
    sample_by     documents of .txt files: "line", "paragraph" (up to a blank line) or "document" (the file)
    image_tokens  budget of a picture; None = the model's
    skip_damaged  leave out documents that cannot be read (the manifest lists them) instead of raising: lines, rows and
                  messages that are none, media that are damaged or missing. A table that is damaged itself raises
    sae           paths of dictionaries that encode on the fly, or {path: site} or [(path, site), …] for files that do
                  not name the site; their features are stored sparse
    top_k         the strongest features of each row to keep; None = all that fire
    examples      strongest rows to note for each feature
    edits         edits of gemma4.edits, or the file of some (`save_edits`): the activations are those of the edited
                  model. The dataset keeps them (`Dataset.edits`). Their positions are those of each sequence, as in the
                  column pos; where a sequence has none of them, the edit rests
    shard_tokens  about the tokens of a shard: the work that an end loses at most
    workers       processes, each with the same number of the model's threads. The bytes do not depend on it
    engine        "local": processes of this machine. "ray": actors of Ray Data on all nodes of the cluster, which see
                  corpus, model and `out` under the same paths (gemma4[ray])
    part          (i, n): make only shards i, i + n, …, for job arrays; the job that ends last completes the dataset
    progress      called after every step; scanning: (weight, file) while the corpus is read for the first time

    Every shard that is there is compared with its checksum; damaged ones are made again, with a warning. Raises
    ValueError (an option; a folder of another harvest: the message says what changed; an edit that is limited to
    prompts or generated steps, takes from another prompt, or changes nothing that is stored), SiteError, FormatError (a
    damaged corpus: file and line), FileNotFoundError, OSError (disk full), RuntimeError (a worker died three times),
    KeyboardInterrupt within 100 ms of Ctrl-C. Whatever is raised, finished shards stay.
    """
    checks.integer("workers", workers, 1, MAX_WORKERS)
    checks.integer("examples", examples, 1, 10_000)
    checks.choice("engine", engine, get_args(Engine))
    _check_part(part)
    options = Options(dtype, context, max_tokens, shard_tokens, image_tokens, skip_damaged)
    codings = tuple(make_coding(path, site, top_k, examples, model.sites) for path, site in paths_of(sae))
    if top_k is not None and not codings:
        raise ValueError("top_k is of dictionaries: give one (sae=, --sae)")
    store = Store(Path(os.path.expanduser(checks.path("out", out))))
    _check_folder(store)
    edited = edit_set(edits, model, store)
    plan = make_plan(model, Corpus.open(corpus, key, sample_by), sites, options, codings, scanning, edited)
    begun = _is_begun(store, plan)
    there = _checked_shards(store, plan)
    if not begun:
        begin(store, plan)
    if edited.edits:
        store.write(EDITS, edited.data)
    todo = [shard for shard in range(part[0], len(plan.slices), part[1]) if shard not in there]
    tally = _Tally(plan, len(there), todo, progress)
    spec = Spec.of(model, plan, store, workers)
    if engine == "ray":
        run_ray(spec, todo, workers, tally.note)
    elif workers == 1:
        run_here(model, spec, todo, tally.note)
    else:
        run_processes(spec, todo, workers, tally.note)
    complete = set(store.found()).issuperset(range(len(plan.slices)))
    if complete:
        finish(store, plan)
    return Harvested(store.root, complete, len(todo), len(there), len(plan.slices), tally.tokens, tally.seconds)


def _check_part(part: Sequence[int]) -> None:
    if len(part) != 2:
        checks.fail("part", part, "a pair (number, of how many)")
    n_parts = checks.integer("part[1]", part[1], 1, 1 << 31)
    checks.integer("part[0]", part[0], 0, n_parts - 1)


def _check_folder(store: Store) -> None:
    """Raise before the corpus is read if the folder is not one for a harvest; make it if it is not there."""
    root = store.root
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; a harvest needs a folder")
    root.mkdir(parents=True, exist_ok=True)
    known = {MANIFEST, store.shards.name}
    if not any((root / name).exists() for name in known):
        others = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        if others:
            raise FileExistsError(f"{root} holds {others[0]!r} and is no harvest: give a new or empty folder")


def _is_begun(store: Store, plan: Plan) -> bool:
    """Whether the manifest is there. Raises ValueError if it is of another harvest, FormatError (another version)."""
    try:
        found = store.manifest()
    except FileNotFoundError:
        found = None
    except FormatError as error:
        warnings.warn(f"{error}: it is written again", stacklevel=2)
        found = None
    if found is not None:
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise FormatError(
                f"{store.root} is of format {found.get('format')!r:.40}, version {found.get('version')!r:.20}, "
                f"this is {FORMAT!r}, {VERSION}: give another folder"
            )
        before = found.get("plan")
        if not is_dict(before):
            warnings.warn(f"{store.root / MANIFEST} is damaged: it is written again", stacklevel=2)
        elif changes := list(differences(before, plan.facts)):
            raise ValueError(
                f"{store.root} is of another harvest: {'; '.join(changes)}. Give the same again, or another folder"
            )
        else:
            return found.get("digest") == plan.digest
    return False


def _checked_shards(store: Store, plan: Plan) -> set[int]:
    """The shards that are there and sound. Damaged ones are removed with a warning."""
    store.clean()
    there = store.found()
    beyond = [shard for shard in there if shard >= len(plan.slices)]
    if beyond:
        raise FormatError(f"{store.folder(beyond[0])} is of another harvest: this one has {len(plan.slices)} shards")
    digest = plan.digest

    def check(shard: int, going: Going) -> str | None:
        try:
            record = store.record(shard)
            if record is not None and record.plan == digest:
                store.check(shard, record, going)
        except FormatError as error:
            return str(error)
        if record is not None and record.plan != digest:
            raise FormatError(f"{store.folder(shard)} is of another harvest: move it away, or give another folder")
        return None

    damages = dict(zip(there, each(check, there), strict=True))
    for shard, damage in damages.items():
        if damage is not None:
            store.discard(shard)
            warnings.warn(f"{damage}; it is made again", stacklevel=2)
    return {shard for shard, damage in damages.items() if damage is None}


class _Tally:
    """Counts of a run, from its events."""

    def __init__(self, plan: Plan, there: int, todo: Sequence[int], progress: Callable[[Progress], None]) -> None:
        self._plan, self._there, self._progress = plan, there, progress
        self._n_shards = there + len(todo)
        self._weight = sum(plan.slices[shard].weight for shard in todo)
        self._done_weight = self._done_tokens = 0
        self._ended = 0
        self.tokens = 0
        self._start = time.monotonic()
        self.seconds = 0.0

    def note(self, event: Event) -> None:
        if isinstance(event, Ran):
            self.tokens += event.tokens
        if isinstance(event, Ended):
            self._ended += 1
            self._done_weight += self._plan.slices[event.shard].weight
            self._done_tokens += event.rows
        self.seconds = time.monotonic() - self._start
        self._progress(Progress(self._there + self._ended, self._n_shards, self.tokens, self._total(), self.seconds))

    def _total(self) -> int:
        """Tokens in all, by the weight of a token up to now."""
        if self._ended == self._n_shards - self._there:
            return self.tokens
        weight = self._done_weight / self._done_tokens if self._done_tokens else WEIGHT_OF_TOKEN
        return max(self.tokens, int(self._weight / max(weight, 1e-9)))
