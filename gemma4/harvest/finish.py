# SPDX-License-Identifier: Apache-2.0
"""The end of a harvest: numbers over all shards, and the manifest that makes it complete. Always in shard order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries import Features
from gemma4.errors import FormatError
from gemma4.files import new_file
from gemma4.harvest.dictionaries import Examples
from gemma4.harvest.hashing import facts_of
from gemma4.harvest.moments import Moments
from gemma4.harvest.plan import FORMAT, VERSION, Plan
from gemma4.harvest.shard import features_name
from gemma4.harvest.store import DATA, EDITS, RECORD, STATS, Record, Store
from gemma4.load.safetensors import SafetensorsFile, write_safetensors

Array: TypeAlias = NDArray[Any]


def begin(store: Store, plan: Plan) -> None:
    """Write the manifest of a harvest that is not complete."""
    store.write_manifest(_head(plan) | {"complete": False})


def finish(store: Store, plan: Plan) -> None:
    """Merge the shards' statistics and examples, and write the manifest.

    Raises FormatError (a damaged shard), OSError.
    """
    records = [_record(store, shard) for shard in range(len(plan.slices))]
    _write(store, STATS, _statistics(store, plan))
    names = [STATS]
    for number, coding in enumerate(plan.codings):
        found = _examples(store, number, Examples(coding.facts["d_sae"], coding.facts["examples"]), records)
        names.append(f"examples-{number}.safetensors")
        _write(store, names[-1], found)
    if "edits" in plan.facts:
        names.append(EDITS)
    done = {
        "complete": True,
        "rows": sum(record.rows for record in records),
        "sequences": sum(record.sequences for record in records),
        "skipped": [one for record in records for one in record.skipped],
        "shards": [_entry(store, shard, record) for shard, record in enumerate(records)],
        "files": {name: asdict(facts_of(store.root / name)) for name in names},
    }
    store.write_manifest(_head(plan) | done)
    store.clean(everything=True)


def _head(plan: Plan) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "digest": plan.digest, "plan": plan.facts}


def _record(store: Store, shard: int) -> Record:
    record = store.record(shard)
    if record is None:
        raise FormatError(f"shard {shard} is gone: run the harvest again")
    return record


def _entry(store: Store, shard: int, record: Record) -> dict[str, Any]:
    files = {name: asdict(facts) for name, facts in record.files.items()}
    files[RECORD] = asdict(facts_of(store.folder(shard) / RECORD))
    return {"rows": record.rows, "sequences": record.sequences, "documents": record.documents, "files": files}


def _write(store: Store, name: str, tensors: Mapping[str, Array]) -> None:
    with new_file(store.root / name, force=True) as file:
        write_safetensors(file, tensors)


def _statistics(store: Store, plan: Plan) -> dict[str, Array]:
    """mean, std float64 [a row's shape] and norm [1] of each site, and the number of rows."""
    names = [site.name for site in plan.sites if site.dtype == np.float32]
    moments: dict[str, Moments] = {}
    n_rows = 0
    for shard in range(len(plan.slices)):
        folder = store.folder(shard)
        rows = len(_tensors(folder / DATA, ["pos"])["pos"])
        found = _tensors(folder / STATS, [f"{name}.{part}" for name in names for part in ("mean", "m2", "norm")])
        n_rows += rows
        for name in names:
            one = Moments(rows, found[f"{name}.mean"], found[f"{name}.m2"], float(found[f"{name}.norm"][0]))
            moments[name] = moments[name].merged(one) if name in moments else one
    tensors: dict[str, Array] = {"rows": np.array([n_rows], np.int64)}
    for name, one in moments.items():
        tensors |= {f"{name}.mean": one.mean, f"{name}.std": one.std(), f"{name}.norm": np.array([one.mean_norm()])}
    return tensors


def _examples(store: Store, number: int, examples: Examples, records: list[Record]) -> dict[str, Array]:
    """A dictionary's strongest rows, under the names that Gemma Scope 2 has for them.

    activations float32, seq_ids int64 (in the dataset), positions int32 (in the sequence): [d_sae, n], -1 and 0 where
    there are no more; feature_frequencies float32 [d_sae]: share of the rows at which the feature fired
    """
    first = 0
    bounds: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    for shard, record in enumerate(records):
        folder = store.folder(shard)
        found = _tensors(folder / features_name(number), ["offsets", "ids", "values"])
        features = Features(found["offsets"], found["ids"], found["values"], len(examples.counts))
        examples.add(features, first)
        bounds.append(_tensors(folder / DATA, ["cu_seqlens"])["cu_seqlens"][1:] + first)
        first += record.rows
    ends = np.concatenate(bounds)
    rows = examples.rows
    seq_ids = np.searchsorted(ends, rows, side="right") - 1
    positions = rows - ends[np.maximum(seq_ids, 0)]
    return {
        "activations": examples.activations,
        "seq_ids": np.where(rows < 0, -1, seq_ids),
        "positions": np.where(rows < 0, -1, positions).astype(np.int32),
        "feature_frequencies": (examples.counts / max(first, 1)).astype(np.float32),
    }


def _tensors(path: Any, names: list[str]) -> dict[str, Array]:
    """Copies of some tensors of a file. Raises FormatError, OSError."""
    file = SafetensorsFile(path)
    try:
        missing = [name for name in names if name not in file.tensors]
        if missing:
            raise FormatError(f"{path} has no tensor {missing[0]!r:.80}")
        found = {name: np.array(file.array(name)) for name in names}
        file.check()
        return found
    finally:
        file.close()
