# SPDX-License-Identifier: Apache-2.0
"""The engine of Ray Data: actors on all nodes keep the model and write their shards; only counts are sent back.

The corpus, the model and the dataset's folder must have the same paths on every node, and the package must be installed
there. Ray starts actors again that died, and gives their shards to others.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4.harvest.shard import ShardMaker
from gemma4.harvest.worker import Ended, Note, Ran, Spec, pickled_error
from gemma4.media.source import require


class Actor:
    """Loads the model at its first shard; Ray calls it on another thread than the one that made it."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._maker: ShardMaker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": [1 number]} -> {"shard", "rows", "error"}, the last the pickle of an exception or nothing."""
        [shard] = batch["shard"].tolist()
        try:
            if self._maker is None:
                self._maker = ShardMaker(self._spec.load(), self._spec.plan, self._spec.store)
            rows, error = self._maker.make(shard), b""
        except Exception as raised:
            rows, error = 0, pickled_error(raised)
        return {"shard": np.array([shard]), "rows": np.array([rows]), "error": np.array([error], object)}


def run_ray(spec: Spec, shards: Sequence[int], workers: int, note: Note) -> None:
    """Make the shards with that number of actors, in the Ray cluster that is initialized, else in one that it starts.

    Raises what an actor raised, ImportError without ray.
    """
    ray, data = require("ray"), require("ray.data")
    if not shards:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)  # a running cluster: RAY_ADDRESS
    try:
        data.DataContext.get_current().enable_progress_bars = False
        items = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        rows = items.map_batches(
            Actor,
            fn_constructor_args=(spec,),
            batch_size=1,
            concurrency=min(workers, len(shards)),
            num_cpus=spec.threads,
        )
        for row in rows.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            n_rows = int(row["rows"])
            note(Ran(n_rows))
            note(Ended(int(row["shard"]), n_rows))
    finally:
        if started:
            ray.shutdown()
        spec.store.clean()
