# SPDX-License-Identifier: Apache-2.0
"""Interpretability, side by side with hooks of transformers, nnsight and TransformerLens on the same checkpoints.

    python benchmarks/interp.py --models FOLDER --peers PYTHON --json out.json

PYTHON is the interpreter of an environment with transformers, nnsight and transformer_lens. The checkpoints, with
random bfloat16 weights, are written into FOLDER if they are not there. Every tool runs in a process of its own; rounds
alternate between the tools; ratios are taken round by round.

    cut     ten layers of E2B at full width: capture of 512 tokens, peak memory, steering
    small   26 layers, about 130 million weights outside the tables: a patching grid of 26 layers x 20 positions
    thin    26 layers of width 64: a call on 8 tokens, where all but the tool's own work is negligible
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import machine

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import random_checkpoint

OURS = "gemma4"
PEERS = ("hooks", "nnsight", "transformer_lens")
VOCABULARY = 32_768
_NARROW = {
    "num_hidden_layers": 26,
    "pattern": 13,
    "num_kv_shared_layers": 10,
    "num_attention_heads": 4,
    "head_dim": 128,
}
_NARROW |= {"global_head_dim": 256, "hidden_size_per_layer_input": 64}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {  # name -> size, changes, tasks
    "cut": ("e2b-mini", {}, "capture,memory,steer"),
    "small": ("e2b", _NARROW | {"hidden_size": 640, "intermediate_size": 2048}, "capture,memory,grid,steer"),
    "thin": (
        "e2b",
        _NARROW | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "global_head_dim": 32},
        "call",
    ),
}
# metric -> the most that ours may be of each peer's, or (None) what it may be by itself
GOALS = {
    ("peak_rss", "ratio"): 0.5,
    ("call_s", "ratio"): 0.2,
    ("grid_s", "ratio"): 0.2,
    ("capture_cost", "own"): 0.03,
    ("steer_cost", "own"): 0.02,
}
UNITS = {"peak_rss": ("peak memory", 1e9, "GB"), "call_s": ("call on 8 tokens", 1e-3, "ms"), "grid_s": ("grid", 1, "s")}
UNITS |= {"capture_s": ("capture of 512 tokens", 1, "s"), "capture_cost": ("capture over its pass", 0.01, "%")}
UNITS |= {"steer_s": ("steered token", 1e-3, "ms"), "steer_cost": ("steering over its token", 0.01, "%")}
Rounds = dict[str, list[dict[str, Any]]]  # tool -> its rounds


def checkpoint(folder: Path, name: str, tokenizer: Path) -> Path:
    """The directory of a model of MODELS, written now if it is not there."""
    size, changes, _ = MODELS[name]
    path = folder / name
    if not (path / "model.safetensors").exists():
        vocabulary = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
        text = random_checkpoint.text_config(size, **changes, **vocabulary)
        random_checkpoint.write_checkpoint(path, text, multimodal=False, tokenizer=tokenizer)
    return path


def run(tool: str, path: Path, tasks: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    python = sys.executable if tool == OURS else args.peers
    command = [python, str(Path(__file__).with_name("interp_worker.py")), tool, "--model", str(path)]
    command += ["--tasks", tasks, "--threads", str(args.threads), "--tokens", str(args.tokens), "--seed", str(seed)]
    command += ["--repeats", str(args.repeats), "--decode", str(args.decode), "--vocab", str(VOCABULARY)]
    command += ["--grid-sample", str(args.grid_sample), "--dtype", args.dtype]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} on {path.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_grids(rounds: dict[str, dict[str, Any]]) -> None:
    """Raise SystemExit if the tools disagree on the patched runs. Only in float32: random weights amplify the rounding
    of bfloat16 from layer to layer."""
    for tool, found in rounds.items():
        if "grid_values" not in found or tool == OURS:
            continue
        ours = dict(zip(map(tuple, rounds[OURS]["grid_cells"]), rounds[OURS]["grid_values"], strict=True))
        mine = [ours[tuple(cell)] for cell in found["grid_cells"]]
        furthest = max(abs(a - b) for a, b in zip(mine, found["grid_values"], strict=True))
        if furthest > 1e-3 * max(map(abs, mine)):
            raise SystemExit(f"{tool} and {OURS} differ by {furthest:.3g} in a cell of the grid")


def summary(rounds: Rounds) -> dict[str, Any]:
    """metric -> tool -> its median, and the median of ours : theirs in each round."""
    found: dict[str, Any] = {}
    for metric in UNITS:
        values = {
            tool: [median(one[metric]) if isinstance(one[metric], list) else one[metric] for one in of if metric in one]
            for tool, of in rounds.items()
        }
        ours = values[OURS]
        if not ours:
            continue
        found[metric] = {tool: {"median": median(mine)} for tool, mine in values.items() if mine}
        for tool in found[metric].keys() - {OURS}:
            if not metric.endswith("_cost"):
                found[metric][tool]["ratio"] = median(a / b for a, b in zip(ours, values[tool], strict=True))
    return found


def table(name: str, found: dict[str, Any]) -> list[str]:
    lines = [f"{name}:"]
    for metric, tools in found.items():
        title, divisor, unit = UNITS[metric]
        own = GOALS.get((metric, "own"))
        goal = GOALS.get((metric, "ratio"))
        for tool, values in tools.items():
            line = f"  {title:<26} {tool:<18} {values['median'] / divisor:10.3f} {unit}"
            if "ratio" in values:
                met = "" if goal is None else f", goal {goal}: {'reached' if values['ratio'] <= goal else 'missed'}"
                line += f"   ours : theirs {values['ratio']:.3f}{met}"
            elif tool == OURS and own is not None:
                line += f"   goal {own / divisor:g}: {'reached' if values['median'] <= own else 'missed'}"
            lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder for the checkpoints, 3 GB")
    parser.add_argument("--peers", help="interpreter with transformers, nnsight, transformer_lens; default: ours alone")
    parser.add_argument("--tools", default=",".join(PEERS), help="which peers")
    parser.add_argument("--only", default=",".join(MODELS), help="which models")
    tokenizer = Path(__file__).parents[1] / "tests/data/tokenizer.json.xz"
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, help="TransformerLens needs one")
    parser.add_argument("--tasks", help="instead of each model's own: call, capture, memory, grid, steer")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the peers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--grid-sample", type=int, default=40, help="cells that a tool runs which runs them one by one")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args()
    tools = [OURS, *(args.tools.split(",") if args.peers else ())]
    results: dict[str, Any] = {"machine": machine.record(), "threads": args.threads}
    for name in args.only.split(","):
        path = checkpoint(args.models, name, args.tokenizer)
        rounds: Rounds = {tool: [] for tool in tools}
        for seed in range(args.rounds):
            for tool in tools:
                rounds[tool].append(run(tool, path, args.tasks or MODELS[name][2], args, seed))
            if args.dtype == "float32":
                check_grids({tool: of[-1] for tool, of in rounds.items()})
        results[name] = {"summary": summary(rounds), "rounds": rounds}
        print("\n".join(table(name, results[name]["summary"])), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
