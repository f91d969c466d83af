# SPDX-License-Identifier: Apache-2.0
"""Add trained towers to a text model's directory: weights in bf16, config.json.

    python -m train_tiny.export_media --model ../gemma4/pretrained/tiny-e --run RUN --out DIR [--results TEXT MEDIA]

The towers' linear layers get the clipping bounds that E2B's have: what they took in and gave out in `calibrate`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from . import pool
from .card import write_card
from .export import settings
from .towers import build
from .train_media import load_run

COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "README.md")


def _widen(module: Gemma4ClippableLinear, side: str, values: Tensor) -> None:
    """Let the bounds of "input" or "output" hold these values, in numbers that bf16 has."""
    low, high = getattr(module, f"{side}_min"), getattr(module, f"{side}_max")
    for bound, value in ((low, values.min()), (high, values.max())):
        outward = 1.01 * value  # bf16 has 8 bits: rounding moves less than this
        outward = outward.to(torch.bfloat16).float()
        bound.copy_(torch.minimum(bound, outward) if bound is low else torch.maximum(bound, outward))


@torch.no_grad()
def calibrate(model: Gemma4ForConditionalGeneration, steps: int, seed: int = 99) -> None:
    """Set every clipping bound to the range seen on `steps` training items of each kind: nothing there is clipped."""
    handles = []
    for module in model.modules():
        if isinstance(module, Gemma4ClippableLinear):
            for name in ("input", "output"):
                getattr(module, f"{name}_min").zero_()
                getattr(module, f"{name}_max").zero_()
            module.use_clipped_linears = False

            def watch(linear: nn.Module, inputs: tuple[Tensor], output: Tensor, owner: nn.Module = module) -> None:
                _widen(owner, "input", inputs[0])  # type: ignore[arg-type]
                _widen(owner, "output", output)  # type: ignore[arg-type]

            handles.append(module.linear.register_forward_hook(watch))
    for step in range(steps):
        for kind in pool.KINDS:
            pool.encode(model, *pool.source(kind, seed, step, small=0.1))
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, Gemma4ClippableLinear):
            module.use_clipped_linears = True


def export(directory: Path, run: Path, out: Path, steps: int = 200) -> int:
    """Write the checkpoint directory but for a new card; returns the number of parameters."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = build(directory, 0, clipped=True)
    trained = build(directory, 0)  # no clipping bounds in a run
    load_run(trained, run)
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    if unexpected or any(not key.endswith(("_min", "_max")) for key in missing):
        raise ValueError(f"{run}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    calibrate(model.eval(), steps)
    weights = {
        key: value.to(torch.bfloat16).contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight" and not key.endswith("embed_scale")
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(settings(model.config, tokenizer), indent=2) + "\n", encoding="utf-8")
    budget = {"image_processor": {"max_soft_tokens": pool.REAL_BUDGET}}
    (out / "processor_config.json").write_text(json.dumps(budget) + "\n", encoding="utf-8")
    for name in COPIED:
        shutil.copyfile(directory / name, out / name)
    return sum(value.numel() for value in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a small model with its towers.")
    parser.add_argument("--model", type=Path, required=True, help="the text model's directory")
    parser.add_argument("--run", type=Path, required=True, help="training folder (sight.pt, hearing.pt, media.pt)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--results", type=Path, nargs=2, help="evaluate's and evaluate_media's --json of that directory"
    )
    parser.add_argument("--text-steps", type=int, default=2200, help="what the card says of the text model's training")
    arguments = parser.parse_args()
    parameters = export(arguments.model, arguments.run, arguments.out)
    if arguments.results:
        scores, media = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.results)
        write_card(arguments.model.name, arguments.out, scores, arguments.text_steps, parameters, media)


if __name__ == "__main__":
    main()
