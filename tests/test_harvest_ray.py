# SPDX-License-Identifier: Apache-2.0
"""Harvests on Ray Data, on a cluster of two nodes on this machine. Needs ray, which the extra `test` leaves out."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4 import harvest as H

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
RESID = "blocks.{1,3}.hook_resid_post"


@pytest.fixture(scope="module")
def two_nodes():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model without a tokenizer, a corpus of ids, and the dataset that one process makes."""
    root = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    rows = [{"tokens": [2, *rng.integers(3, 300, int(n)).tolist()]} for n in rng.integers(5, 90, 60)]
    corpus = root / "ids.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gemma4.load(write_checkpoint(root / "model", E_LIKE), threads=1) as model:
        H.harvest(model, corpus, RESID, out=root / "whole", shard_tokens=100)
        yield model, corpus, root / "whole"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_bytes(two_nodes, case, tmp_path):
    model, corpus, whole = case
    done = H.harvest(model, corpus, RESID, out=tmp_path / "a", shard_tokens=100, workers=2, engine="ray")
    assert done.complete and done.made == done.n_shards > 10
    assert contents(tmp_path / "a") == contents(whole)
    done = H.harvest(model, corpus, RESID, out=tmp_path / "a", shard_tokens=100, workers=2, engine="ray")
    assert done.made == 0


def test_killed_actors_are_replaced(two_nodes, case, tmp_path):
    """Every process that is seen writing one of the first shards is killed."""
    model, corpus, whole = case
    killed: set[int] = set()
    ended = threading.Event()

    def kill():
        while not ended.is_set() and len(killed) < 3:
            for name in os.listdir(tmp_path / "a" / "shards") if (tmp_path / "a" / "shards").is_dir() else ():
                match = re.search(r"-(\d+)-[0-9a-f]{16}\.partial$", name)
                if match and int(match[1]) not in killed and len(killed) < 3:
                    killed.add(int(match[1]))
                    os.kill(int(match[1]), signal.SIGKILL)
            time.sleep(0.001)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        H.harvest(model, corpus, RESID, out=tmp_path / "a", shard_tokens=100, workers=2, engine="ray")
    finally:
        ended.set()
        thread.join()
    assert killed and os.getpid() not in killed
    assert contents(tmp_path / "a") == contents(whole)


def test_errors_of_actors_are_raised_as_they_are(two_nodes, case, tmp_path):
    model, _, _ = case
    (tmp_path / "bad.jsonl").write_text('{"tokens": [2, 3]}\n{"tokens": [2, 99999]}\n')
    with pytest.raises(ValueError, match="line 2: token id 99999"):
        H.harvest(model, tmp_path / "bad.jsonl", RESID, out=tmp_path / "a", shard_tokens=1, workers=2, engine="ray")
