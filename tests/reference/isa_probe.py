# SPDX-License-Identifier: Apache-2.0
"""Run in a process of its own under GEMMA4_ISA: digests of every site of the checkpoints named, as JSON on stdout."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

import gemma4


def main(ids: list[int], directories: list[str]) -> None:
    steps = _load_steps()
    found = {"isa": gemma4.cpu_info()["isa"]}
    for directory in directories:
        model = gemma4.load(directory, precision="exact", threads=1)
        for kv_dtype in ("f32", "bf16"):
            account = steps.whole(model, np.array(ids, np.int32), kv_dtype=kv_dtype, max_chunk=17)
            found[f"{directory} {kv_dtype}"] = steps.digests([account])
    json.dump(found, sys.stdout)


def _load_steps():  # by path: the package's other modules need torch, which takes seconds to import
    spec = importlib.util.spec_from_file_location("steps", Path(__file__).parent / "steps.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
