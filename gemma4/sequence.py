# SPDX-License-Identifier: Apache-2.0
"""A timeline: the tokens a model has read and the keys and values it keeps of them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core, KVDtype
from gemma4.errors import FormatError, StateError
from gemma4.files import new_file
from gemma4.media.keys import run_start

if TYPE_CHECKING:
    from gemma4._engine import Sequence as EngineSequence

__all__ = ["KVDtype", "Sequence", "new_sequence", "restore"]

_FORMAT = "gemma4-sequence-1"


class Sequence:
    """A cached sequence of one model, made by `Model.new_sequence()`.

    `model.forward(ids, sequence=s)` continues it. One thread at a time may use it (StateError otherwise); different
    sequences of one model may be used by different threads. Use it as a context manager, or call `close()`, to give the
    memory back early.
    """

    def __init__(
        self, model: Core, engine: EngineSequence, tokens: Iterable[int] = (), keys: Iterable[int] = ()
    ) -> None:
        self._model = model
        self._engine = engine
        self._tokens: list[int] = list(tokens)
        self._keys: list[int] = list(keys)  # token ids, or for soft tokens what they are made of (TokenizedPrompt.keys)

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self._engine.length

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 [length]: the token ids in the cache (a copy); placeholders where images and sounds are."""
        return np.array(self._tokens, dtype=np.int32)

    @property
    def capacity(self) -> int:
        """The most positions it can hold."""
        return self._engine.capacity

    @property
    def kv_dtype(self) -> str:
        return self._engine.kv_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._engine.nbytes

    @property
    def min_truncate(self) -> int:
        """The smallest length > 0 that `truncate` can go back to: sliding layers forget what left their window."""
        return self._engine.min_truncate

    @property
    def closed(self) -> bool:
        return self._engine.closed

    def check_usable_by(self, model: Core) -> None:
        """Raises StateError if closed, ValueError if it belongs to another model."""
        if self.closed:
            raise StateError("the sequence is closed; make a new one with Model.new_sequence()")
        if self._model is not model:
            raise ValueError("the sequence belongs to another model")

    def fork(self) -> Sequence:
        """An independent copy; memory is shared until one of the two writes."""
        return Sequence(self._model, self._engine.fork(), self._tokens, self._keys)

    def truncate(self, length: int) -> None:
        """Forget positions >= length; 0 empties. Raises StateError below `min_truncate`, ValueError above `length`."""
        self._engine.truncate(length)
        del self._tokens[length:], self._keys[length:]

    def rewind_to(self, keys: NDArray[np.integer[Any]]) -> int:
        """Keep the longest common prefix with `keys`, short of the last; returns how many positions were kept.

        keys: int [T], token ids, or `TokenizedPrompt.keys()` where there are media: an image is kept whole or not.
        The last is always left to be run, because its logits are wanted. Where sliding layers have forgotten too
        much to go back that far, everything is dropped.
        """
        keys = keys.astype(np.int64)
        old = np.array(self._keys[: len(keys) - 1], dtype=np.int64)
        differs = np.flatnonzero(old != keys[: len(old)])
        keep = run_start(keys, int(differs[0]) if len(differs) else len(old))
        if keep < self.length:
            self.rewind(keep)
        return self.length

    def rewind(self, length: int) -> None:
        """Forget positions >= length, and all of them where sliding layers have forgotten too much to stop there."""
        self.truncate(length if length >= self.min_truncate else 0)

    def close(self) -> None:
        """Free the cache. Any later use raises StateError; closing twice is fine."""
        self._engine.close()
        self._tokens.clear()
        self._keys.clear()

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        if self.closed:
            return "Sequence(closed)"
        return f"Sequence({self.length}/{self.capacity} positions, {self.kv_dtype}, {self.nbytes / 2**20:.1f} MiB)"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tokens, keys and values to one .npz file (no pickle; written beside and renamed). Returns the path.

        `Model.restore(path)` of the same weights continues with the same bits.
        """
        state = self._engine.state()
        arrays: dict[str, NDArray[Any]] = {"tokens": self.tokens, "keys": np.array(self._keys, dtype=np.int64)}
        firsts: dict[str, int] = {}
        for layer, (first, keys, values) in state["layers"].items():
            firsts[str(layer)] = int(first)
            arrays[f"k.{layer}"], arrays[f"v.{layer}"] = keys, values
        meta = {
            "format": _FORMAT,
            "model": self._model.fingerprint,
            "length": state["length"],
            "kv_dtype": state["kv_dtype"],
            "first_positions": firsts,
        }
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        with new_file(path, force=True, inputs=self._model.checkpoint.inputs) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        return Path(path)

    def _record(self, ids: NDArray[np.int32], keys: NDArray[np.int64] | None, before: int) -> None:
        """Note which of `ids` the engine took in since the cache held `before` positions. keys None: the ids."""
        taken = self._engine.length - before
        self._tokens.extend(ids[:taken].tolist())
        self._keys.extend((ids if keys is None else keys)[:taken].tolist())


def new_sequence(model: Core, *, capacity: int = 0, kv_dtype: KVDtype | None = None) -> Sequence:
    """See `Model.new_sequence`."""
    _ = model.fingerprint  # a file that is cut short later could no longer give it
    return Sequence(model, model.engine.new_sequence(kv_dtype=kv_dtype or model.kv_dtype, capacity=capacity))


def restore(model: Core, path: str | os.PathLike[str]) -> Sequence:
    """A sequence as it was when `Sequence.save(path)` wrote it.

    Raises FormatError (not such a file, or damaged), StateError (written by another model), OSError.
    """
    path = Path(path)
    meta, arrays = _read(path)
    if meta["model"] != model.fingerprint:
        raise StateError(
            f"{path} was saved by another model (fingerprint {meta['model']}, this one is {model.fingerprint}); "
            "keys and values only make sense to the weights that made them"
        )
    layers = {
        int(layer): (int(first), arrays[f"k.{layer}"], arrays[f"v.{layer}"])
        for layer, first in meta["first_positions"].items()
    }
    sequence = new_sequence(model, kv_dtype=meta["kv_dtype"])
    try:
        sequence._engine.load_state({"length": meta["length"], "kv_dtype": meta["kv_dtype"], "layers": layers})
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: the saved cache does not fit this model: {error}") from error
    sequence._tokens = arrays["tokens"].tolist()
    sequence._keys = arrays["keys"].tolist()
    return sequence


def _read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        complete = meta["format"] == _FORMAT and len(arrays["tokens"]) == meta["length"] and meta["model"]
        keys = arrays.setdefault("keys", arrays["tokens"])  # older files have none
        complete = complete and keys.shape == arrays["tokens"].shape and keys.dtype.kind == "i"
        wanted = {f"{kind}.{layer}" for kind in "kv" for layer in meta["first_positions"]}
        if not complete or meta["kv_dtype"] not in get_args(KVDtype) or not wanted <= arrays.keys():
            raise ValueError("missing or inconsistent entries")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path} is not a saved sequence, or is damaged: {error}") from error
    return meta, arrays
