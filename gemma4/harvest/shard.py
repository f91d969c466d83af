# SPDX-License-Identifier: Apache-2.0
"""One shard: run the model on a slice of the corpus, and write what it shows."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries import Features
from gemma4.dictionaries.features import join
from gemma4.harvest.corpus import Reading
from gemma4.harvest.dictionaries import encode
from gemma4.harvest.edited import Editing
from gemma4.harvest.hashing import FileFacts, facts_of
from gemma4.harvest.moments import Moments
from gemma4.harvest.pieces import Piece, Skipped, batches
from gemma4.harvest.plan import Plan, row_shape
from gemma4.harvest.store import DATA, RECORD, STATS, Record, Store, TensorWriter, synced_file
from gemma4.interp.cache import ActivationCache
from gemma4.interp.saved import TYPES, narrowed
from gemma4.interp.sites import Site
from gemma4.load.safetensors import write_safetensors
from gemma4.model import Model

Ran: TypeAlias = Callable[[int], None]
Array: TypeAlias = NDArray[Any]


class ShardMaker:
    """Makes shards of a plan with one model: what every engine's worker holds. It keeps no thread-local state."""

    def __init__(self, model: Model, plan: Plan, store: Store) -> None:
        self._model, self._plan, self._store = model, plan, store
        self._digest = plan.digest
        captured = [model.sites[name] for name in plan.captured]
        self._editing = Editing.of(model, plan.facts.get("edits"), store, captured)
        self._reading = Reading(plan.corpus)
        with ExitStack() as stack:
            self._dictionaries = [stack.enter_context(coding.open()) for coding in plan.codings]
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Release the dictionaries and the corpus."""
        self._stack.close()
        self._reading.close()

    def __enter__(self) -> ShardMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make(self, shard: int, ran: Ran = lambda n_tokens: None) -> int:
        """Compute a shard and commit it. Returns its rows. ran: called after each step with the number of its tokens.

        Raises what reading the corpus and running the model raise, ValueError (f16 for numbers beyond 65504), OSError
        (disk full). Nothing of an unfinished shard stays.
        """
        part = self._plan.slices[shard]
        skipped: list[Skipped] = []
        limit = self._plan.limit
        pieces = list(self._plan.cutter.pieces(self._model, self._reading, part, limit, skipped))
        rows = sum(map(len, pieces))
        with self._store.new_shard(shard) as folder:
            try:
                facts = self._write(folder, pieces, ran)
                left_out = [[one.document, one.reason] for one in skipped]
                n_documents = part.count if limit is None else limit.documents_of(part)
                record = Record(self._digest, shard, rows, len(pieces), n_documents, facts, left_out)
                with synced_file(folder / RECORD) as file:
                    file.write(json.dumps(record.as_json(), indent=1, sort_keys=True).encode())
            except OSError as error:
                if error.filename is None and error.errno is not None:  # a write names no file
                    raise OSError(error.errno, error.strerror, str(self._store.root)) from error
                raise
        return rows

    def _write(self, folder: Path, pieces: Sequence[Piece], ran: Ran) -> dict[str, FileFacts]:
        moments = {site.name: Moments.none(row_shape(site)) for site in self._plan.sites if _is_float(site)}
        features: list[list[Features]] = [[] for _ in self._dictionaries]
        tensors = self._tensors(pieces)
        _check_room(self._store.root, tensors)
        with synced_file(folder / DATA) as file:
            writer = TensorWriter(file, tensors)
            for name, array in tokens_of(pieces).items():
                writer.put(name, array)
            row = 0
            for batch in batches(pieces):
                caches = self._run(batch)
                for site in self._plan.sites:
                    block = np.concatenate([cache[site.name] for cache in caches])
                    if site.name in moments:
                        moments[site.name] = moments[site.name].merged(Moments.of(block))
                    writer.put(site.name, narrowed(block, self._plan.dtype, site.name), row)
                self._encode(caches, features)
                n_tokens = sum(map(len, batch))
                row += n_tokens
                ran(n_tokens)
        self._write_features(folder, features)
        with synced_file(folder / STATS) as file:
            write_safetensors(file, _moment_tensors(moments))
        names = sorted(path.name for path in folder.iterdir())
        return {name: facts_of(folder / name) for name in names}

    def _tensors(self, pieces: Sequence[Piece]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        rows, dtype = sum(map(len, pieces)), TYPES[self._plan.dtype]
        sites = {
            site.name: (dtype if _is_float(site) else site.dtype, (rows, *row_shape(site))) for site in self._plan.sites
        }
        return sites | {name: (array.dtype, array.shape) for name, array in tokens_of(pieces).items()}

    def _run(self, batch: Sequence[Piece]) -> list[ActivationCache]:
        prompts, stop = [piece.prompt for piece in batch], self._plan.stop_at_layer
        names = self._plan.captured
        with self._editing.open(batch, stop):
            if stop is None:
                return self._model.run_with_cache(prompts, names, logits=None)[1]
            return self._model.run_with_cache(prompts, names, stop_at_layer=stop)[1]

    def _encode(self, caches: Sequence[ActivationCache], features: list[list[Features]]) -> None:
        if not self._dictionaries:
            return
        positions = np.concatenate([cache.positions for cache in caches]).astype(np.int32)
        for dictionary, coding, found in zip(self._dictionaries, self._plan.codings, features, strict=True):
            rows = np.concatenate([cache[coding.site] for cache in caches])
            found.append(encode(dictionary, coding, rows, positions))

    def _write_features(self, folder: Path, features: list[list[Features]]) -> None:
        for number, (dictionary, found) in enumerate(zip(self._dictionaries, features, strict=True)):
            joined = join(found, dictionary.d_sae)
            tensors = {"offsets": joined.offsets, "ids": joined.ids, "values": joined.values}
            with synced_file(folder / features_name(number)) as file:
                write_safetensors(file, tensors, {"d_sae": str(dictionary.d_sae)})


def features_name(number: int) -> str:
    return f"features-{number}.safetensors"


def tokens_of(pieces: Sequence[Piece]) -> dict[str, Array]:
    """The tensors of a shard that do not depend on activations.

    tokens int32, pos int32 (in the sequence), seq_id int64 (in the shard), token_type uint8: [rows]
    cu_seqlens int64 [sequences + 1]: sequence i has rows cu_seqlens[i] to cu_seqlens[i + 1] - 1
    seq_document, seq_start int64 [sequences]: the sequence's document in the corpus, and where in it it begins
    """
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    bounds: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    seq_id = np.repeat(np.arange(len(pieces)), lengths)
    return {
        "tokens": _joined([piece.prompt.ids for piece in pieces], np.int32),
        "pos": (np.arange(len(seq_id)) - bounds[seq_id]).astype(np.int32),
        "seq_id": seq_id.astype(np.int64),
        "token_type": _joined([piece.token_types() for piece in pieces], np.uint8),
        "cu_seqlens": bounds,
        "seq_document": np.array([piece.document for piece in pieces], np.int64),
        "seq_start": np.array([piece.start for piece in pieces], np.int64),
    }


def _joined(arrays: Sequence[Array], dtype: type[np.generic]) -> Array:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def _is_float(site: Site) -> bool:
    return site.dtype == np.float32


def _moment_tensors(moments: dict[str, Moments]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for name, one in moments.items():
        tensors |= {f"{name}.mean": one.mean, f"{name}.m2": one.m2, f"{name}.norm": np.array([one.norm])}
    return tensors


def _check_room(root: Path, tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
    """Raises OSError before the work if the disk has not enough space left."""
    need = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    free = shutil.disk_usage(root).free
    if free < need:
        raise OSError(errno.ENOSPC, f"the next shard needs {need:,} bytes, the disk has {free:,} left", str(root))
