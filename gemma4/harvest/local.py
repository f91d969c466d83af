# SPDX-License-Identifier: Apache-2.0
"""The local engine: shards made in this process, or in several that this one watches."""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import IO, Any

from gemma4.harvest.shard import ShardMaker
from gemma4.harvest.worker import Ended, Event, Note, Ran, Spec
from gemma4.model import Model

_TRIES = 3  # of a shard whose worker died
_COMMAND = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gemma4.harvest.worker import main; main()"


def run_here(model: Model, spec: Spec, shards: Iterable[int], note: Note) -> None:
    """Make the shards one after the other, with the model itself."""
    with ShardMaker(model, spec.plan, spec.store) as maker:
        for shard in shards:
            rows = maker.make(shard, lambda n_tokens: note(Ran(n_tokens)))
            note(Ended(shard, rows))


def run_processes(spec: Spec, shards: Iterable[int], workers: int, note: Note) -> None:
    """Make the shards in processes. One that dies is replaced, and its shard made by another.

    Raises what a worker raised, RuntimeError if workers died three times at the same shard. All have ended by then.
    """
    crew = _Crew(spec, shards, workers)
    try:
        crew.run(note)
    finally:
        crew.stop()
        spec.store.clean()


class _Crew:
    """The processes, a thread for each that talks to it, and the shards that are left."""

    def __init__(self, spec: Spec, shards: Iterable[int], workers: int) -> None:
        self._spec = spec.dumps()
        self._left = collections.deque(shards)
        self._workers = min(workers, len(self._left))
        self._deaths: collections.Counter[int] = collections.Counter()
        self._events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, note: Note) -> None:
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        ended = 0
        while ended < len(threads):
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                ended += 1
            else:
                note(event)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

    def _serve(self) -> None:
        """Keep one worker at work until no shard is left."""
        try:
            while (shard := self._next()) is not None:
                self._work(shard)
        except BaseException as error:
            self._events.put(error)
        else:
            self._events.put(None)

    def _next(self) -> int | None:
        with self._lock:
            return self._left.popleft() if self._left else None

    def _work(self, shard: int | None) -> None:
        """Start a worker and give it shards; returns when none is left, or it died."""
        with self._start() as process:
            if not self._put(process, self._spec) or "ready" not in self._get(process):
                return self._died(process, shard)
            while shard is not None:
                if not self._put(process, str(shard)):
                    return self._died(process, shard)
                while "shard" not in (event := self._get(process)):
                    if not event:
                        return self._died(process, shard)
                    self._events.put(Ran(event["ran"]))
                self._events.put(Ended(shard, event["rows"]))
                shard = self._next()
            _close(process)  # ends it
        return None

    def _start(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise RuntimeError("the harvest was stopped")
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for this process, which ends them
            )
            self._processes.append(process)
        return process

    def _put(self, process: subprocess.Popen[str], line: str) -> bool:
        try:
            print(line, file=_pipe(process.stdin), flush=True)
        except OSError:
            return False
        return True

    def _get(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """The next event; {} if the process is dead. Raises what it raised."""
        line = _pipe(process.stdout).readline()
        if not line.endswith("\n"):
            return {}
        event: dict[str, Any] = json.loads(line)
        if "error" in event:
            error: Exception = pickle.loads(base64.b64decode(event["pickle"]))
            raise error
        return event

    def _died(self, process: subprocess.Popen[str], shard: int | None) -> None:
        _close(process)
        status = process.wait()
        if shard is None or self._stopped:
            return
        with self._lock:
            self._deaths[shard] += 1
            self._left.appendleft(shard)
        if self._deaths[shard] >= _TRIES:
            raise RuntimeError(
                f"a worker died {_TRIES} times at shard {shard} ({_how(status)}); finished shards are kept"
            )


def _close(process: subprocess.Popen[str]) -> None:
    """Close standard input; a process that is dead does not take what is left to write."""
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # they were requested
    return stream


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # one without a name, such as most real-time signals
        name = f"signal {-status}"
    return f"{name}, perhaps for want of memory: try fewer workers" if name == "SIGKILL" else name
