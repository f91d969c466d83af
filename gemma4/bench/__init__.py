# SPDX-License-Identifier: Apache-2.0
"""How fast a model runs on this machine, and how near that is to the machine's limits: `gemma4 bench MODEL`.

from gemma4.bench import bench, bench_batch, bench_curve
print(bench("tiny-e"))                              # prefill, decode, media
print(bench_batch("tiny-e", [1, 2, 4, 8]))          # sequences that decode together
curve = bench_curve("tiny-e", range(1, 33))         # the cost of a step by its rows
curve.plot().savefig("curve.png")
"""

from gemma4.bench.cost import CostCurve, Fall, Rows, RowsBenchmark, StepCost
from gemma4.bench.machine import machine_text, measure_limits
from gemma4.bench.phases import Benchmark, Speed, bench, measure_medium, measure_model
from gemma4.bench.rows import BATCH, CURVE_ROWS, MAX_ROWS, RowsOptions, bench_batch, bench_curve

__all__ = [
    "BATCH",
    "CURVE_ROWS",
    "MAX_ROWS",
    "Benchmark",
    "CostCurve",
    "Fall",
    "Rows",
    "RowsBenchmark",
    "RowsOptions",
    "Speed",
    "StepCost",
    "bench",
    "bench_batch",
    "bench_curve",
    "machine_text",
    "measure_limits",
    "measure_medium",
    "measure_model",
]
