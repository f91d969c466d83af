# SPDX-License-Identifier: Apache-2.0
"""A cached sequence: the tokens a model has read, with their keys and values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.core import Core, KVDtype
from gemma4.errors import FormatError, StateError
from gemma4.files import new_file
from gemma4.media.keys import is_soft, run_start
from gemma4.narrow import is_dict
from gemma4.npz import NpzFile

if TYPE_CHECKING:
    from gemma4._engine import Sequence as EngineSequence

__all__ = ["KVDtype", "Sequence", "new_sequence", "restore"]

_FORMAT = "gemma4-sequence-1"
_MAX_META = 1 << 20  # bytes of the description


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
        self._keys: list[int] = list(keys)  # token ids; for soft tokens numbers from the content (TokenizedPrompt.keys)

    @property
    def engine(self) -> EngineSequence:
        """The C engine's sequence, as a step takes it."""
        return self._engine

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
        """The smallest length > 0 that `truncate` can go back to: sliding layers evict keys that left their window."""
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
        """Drop positions >= length; 0 empties. Raises StateError below `min_truncate`, ValueError above `length`."""
        self._engine.truncate(checks.integer("length", length, 0, self.length))
        del self._tokens[length:], self._keys[length:]

    def rewind_to(self, keys: NDArray[np.integer]) -> int:
        """Keep the longest common prefix with `keys`, short of the last; returns how many positions were kept.

        keys: int [T], token ids, or `TokenizedPrompt.keys()` where there are media: an image is kept whole or not.
        The last position is always left to be run, because its logits are needed. If sliding layers have evicted too
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
        """Drop positions >= length, or all of them if sliding layers have evicted too much to stop there."""
        length = checks.integer("length", length, 0, self.length)
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
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  # its stub takes any of them for allow_pickle
        return Path(path)

    def record(self, ids: NDArray[np.int32], keys: NDArray[np.int64] | None, before: int) -> None:
        """Note which of `ids` the engine has processed since the cache held `before` positions. keys None: the ids."""
        taken = self._engine.length - before
        self._tokens.extend(ids[:taken].tolist())
        self._keys.extend((ids if keys is None else keys)[:taken].tolist())


def new_sequence(model: Core, *, capacity: int = 0, kv_dtype: KVDtype | None = None) -> Sequence:
    """See `Model.new_sequence`."""
    checks.integer("capacity", capacity, 0, model.context_length)
    if kv_dtype is not None:
        checks.choice("kv_dtype", kv_dtype, get_args(KVDtype))
    _ = model.fingerprint, model.layer_scalars  # a file truncated later could no longer give them
    return Sequence(model, model.engine.new_sequence(kv_dtype=kv_dtype or model.kv_dtype, capacity=capacity))


def restore(model: Core, path: str | os.PathLike[str]) -> Sequence:
    """A sequence as it was when `Sequence.save(path)` wrote it.

    Everything in the file is checked against the model before it is read: names, sizes, types, byte order, ids.
    Raises FormatError (not such a file, or damaged), StateError (written by another model), OSError.
    """
    fingerprint = model.fingerprint
    try:
        with NpzFile(path) as file:
            meta = _parse_meta(file.read_bytes("meta", _MAX_META))
            if meta.get("model") != fingerprint:
                found = str(meta.get("model"))[:60]
                raise StateError(
                    f"{os.fspath(path)} was saved by another model (fingerprint {found}, this one is {fingerprint}); "
                    "keys and values only make sense to the weights that made them"
                )
            saved = _Saved(file, meta, model)
            keys_and_values = saved.layers()
            tokens = saved.tokens()
            keys = saved.keys(tokens)
        engine = model.engine.new_sequence(kv_dtype=saved.kv_dtype)
        engine.load_state({"length": saved.length, "kv_dtype": saved.kv_dtype, "layers": keys_and_values})
    except ValueError as error:
        raise FormatError(f"{os.fspath(path)} is not a saved sequence, or is damaged: {error}") from None
    return Sequence(model, engine, tokens.tolist(), keys.tolist())


class _Saved:
    """A file of `Sequence.save`, whose description is `meta`. Raises FormatError where it does not fit the model."""

    def __init__(self, file: NpzFile, meta: dict[str, Any], model: Core) -> None:
        self._file, self._config, self._n_ids = file, model.engine_config, model.n_token_ids
        self.length = _integer(meta.get("length"), "length", model.context_length)
        if meta.get("kv_dtype") not in get_args(KVDtype):
            raise FormatError(
                f"kv_dtype is {str(meta.get('kv_dtype'))[:60]!r}, expected {', '.join(get_args(KVDtype))}"
            )
        self.kv_dtype: KVDtype = meta["kv_dtype"]
        self._firsts = self._first_positions(meta.get("first_positions"))
        self._check_names()

    def _first_positions(self, table: Any) -> dict[int, int]:
        """Layer -> the first position whose keys are kept, of every layer that has keys of its own."""
        own = [i for i, layer in enumerate(self._config["layers"]) if layer["kv_source"] == i]
        if not is_dict(table) or set(table) != set(map(str, own)):
            raise FormatError(f"first_positions must have one entry for each of the layers {own}")
        return {i: _integer(table[str(i)], f"the first position of layer {i}", self.length) for i in own}

    def _check_names(self) -> None:
        arrays = {"meta", "tokens", "keys", *(f"{kind}.{layer}" for kind in "kv" for layer in self._firsts)}
        others = set(self._file.names) - arrays
        if others or len(self._file.names) != len(set(self._file.names)):
            raise FormatError(f"it holds {min(others, default='a name twice')[:60]!r}, which no saved sequence does")

    def layers(self) -> dict[int, tuple[int, NDArray[Any], NDArray[Any]]]:
        """Layer -> (first position, keys, values), each [n, K, h] as `_engine.Sequence.state` gives them."""
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.uint8}[self.kv_dtype]
        out: dict[int, tuple[int, NDArray[Any], NDArray[Any]]] = {}
        for i, first in self._firsts.items():
            layer = self._config["layers"][i]
            width = layer["head_dim"] // 32 * 34 if self.kv_dtype == "q8_0" else layer["head_dim"]
            shape = (self.length - first, layer["n_kv_heads"], width)
            out[i] = (first, self._file.read(f"k.{i}", dtype, shape), self._file.read(f"v.{i}", dtype, shape))
        return out

    def tokens(self) -> NDArray[np.int32]:
        tokens = self._file.read("tokens", np.int32, (self.length,))
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._n_ids:
            raise FormatError(
                f"it holds token ids of {tokens.min()} to {tokens.max()}, expected 0 to {self._n_ids - 1}"
            )
        return tokens

    def keys(self, tokens: NDArray[np.int32]) -> NDArray[np.integer[Any]]:
        """Keys of media in place of their ids; older files have none."""
        if "keys" not in self._file.names:
            return tokens
        keys = self._file.read("keys", np.int64, (self.length,))
        wrong = np.flatnonzero(~is_soft(keys) & (keys != tokens))
        if len(wrong):
            raise FormatError(f"the key of position {wrong[0]} is {keys[wrong[0]]}, expected its id {tokens[wrong[0]]}")
        return keys


def _parse_meta(text: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its description is no JSON: {str(error)[:120]}") from None
    if not is_dict(meta) or meta.get("format") != _FORMAT:
        raise FormatError(f"its description is not of the format {_FORMAT!r}")
    return meta


def _integer(value: Any, what: str, most: int) -> int:
    if type(value) is int and 0 <= value <= most:
        return value
    found = "a huge integer" if isinstance(value, int) and value.bit_length() > 64 else repr(value)[:60]
    raise FormatError(f"{what} is {found}, expected an integer of 0 to {most}")
