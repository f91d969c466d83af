# SPDX-License-Identifier: Apache-2.0
"""A process that makes shards: numbers come in by standard input, events go out by standard output, a JSON line each.

The plan and the model's path come first, as one line of base64 of a pickle, from the process that started this one.
When that one ends, however, standard input ends, and this process with it.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO, TypeAlias

from gemma4.core import KVDtype, Precision
from gemma4.errors import FormatError
from gemma4.harvest.plan import Plan, arithmetic, sampled_fingerprint
from gemma4.harvest.shard import ShardMaker
from gemma4.harvest.store import Store
from gemma4.model import Model, load


@dataclass(frozen=True, slots=True)
class Ran:
    """A step of n tokens ended."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A shard of n rows is there."""

    shard: int
    rows: int


Event: TypeAlias = Ran | Ended
Note: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Spec:
    """All that a worker needs; picklable."""

    plan: Plan
    store: Store
    path: str
    mmproj: str | None
    precision: Precision
    kv_dtype: KVDtype
    threads: int
    fingerprint: str

    @classmethod
    def of(cls, model: Model, plan: Plan, store: Store, workers: int) -> Spec:
        """For workers that share the model's threads."""
        mmproj = model.checkpoint.mmproj_path
        threads = max(1, model.engine.threads // workers)
        path = str(model.checkpoint.path.absolute())
        here = Store(store.root.absolute())
        encoders = None if mmproj is None else str(mmproj.absolute())
        return cls(
            plan, here, path, encoders, model.engine.precision, model.kv_dtype, threads, sampled_fingerprint(model)
        )

    def load(self) -> Model:
        """Raises FormatError if the model is not the one of the plan, ValueError if this machine's results have other
        bits, and as `gemma4.load`."""
        model = load(
            self.path, mmproj=self.mmproj, threads=self.threads, precision=self.precision, kv_dtype=self.kv_dtype
        )
        if sampled_fingerprint(model) != self.fingerprint:
            raise FormatError(f"{self.path}, or the file of its encoders, changed since the harvest began")
        here, wanted = arithmetic(model), self.plan.facts["arithmetic"]
        if here != wanted:
            raise ValueError(
                f"a worker computes with {here}, the harvest with {wanted}: load the model with precision='exact', "
                "which gives the same bits everywhere"
            )
        return model

    def dumps(self) -> str:
        return base64.b64encode(pickle.dumps(self)).decode()


def main() -> None:
    """The process: `run_processes` starts it."""
    lines = _lines_until_end(sys.stdin)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library's print must not end up among the events
    try:
        spec: Spec = pickle.loads(base64.b64decode(next(lines)))
        with spec.load() as model, ShardMaker(model, spec.plan, spec.store) as maker:
            _send(out, {"ready": True})
            for line in lines:
                shard = int(line)
                rows = maker.make(shard, lambda n_tokens: _send(out, {"ran": n_tokens}))
                _send(out, {"shard": shard, "rows": rows})
    except Exception as error:
        pickled = base64.b64encode(pickled_error(error)).decode()
        _send(out, {"error": f"{type(error).__name__}: {error}", "pickle": pickled})


def _send(out: TextIO, event: dict[str, object]) -> None:
    print(json.dumps(event), file=out, flush=True)


def pickled_error(error: Exception) -> bytes:
    """The pickle of an exception, or of a RuntimeError with its words."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        return pickled
    except Exception:  # an exception of a library whose arguments are not those of its constructor
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _lines_until_end(stream: TextIO) -> Iterator[str]:
    """Lines of a stream, read by a thread; when the stream ends, so does the process, in the midst of its work."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()
