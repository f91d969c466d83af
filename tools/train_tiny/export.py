# SPDX-License-Identifier: Apache-2.0
"""Turn a training run into a Hugging Face directory: weights in bf16, tokenizer, template, generation defaults, card.

python -m train_tiny.export --name tiny-e --run RUN --tokenizer DIR --out DIR [--results results.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Gemma4Config

from .card import write_card
from .models import build
from .skills_chat import TEMPLATE

# Sampling defaults; the stop ids are `<eos>`, `<turn|>` and `<|tool_response>`, as in Gemma 4's -it models.
GENERATION: dict[str, Any] = {
    "bos_token_id": 2,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_NOT_OURS = ("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path")


def settings(config: Gemma4Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: what transformers would save, with this vocabulary's media tokens, less its classifier fields."""
    config.dtype = "bfloat16"
    ids = {
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "image_token_id": "<|image|>",
        "boa_token_id": "<|audio>",
        "eoa_token_id": "<audio|>",
        "eoa_token_index": "<audio|>",
        "audio_token_id": "<|audio|>",
        "video_token_id": "<|video|>",
    }
    values = config.to_dict() | {key: tokenizer.token_to_id(token) for key, token in ids.items()}
    values |= {"architectures": ["Gemma4ForConditionalGeneration"], "eos_token_id": GENERATION["eos_token_id"]}
    text = {key: value for key, value in values["text_config"].items() if key not in _NOT_OURS}
    return {key: value for key, value in (values | {"text_config": text}).items() if key not in _NOT_OURS}


def export(name: str, run: Path, tokenizer: Path, out: Path, results: Path | None) -> None:
    """Write everything a checkpoint directory holds."""
    out.mkdir(parents=True, exist_ok=True)
    vocab = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    model = build(name, vocab, 0)
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    weights = {
        key: value.to(torch.bfloat16).contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight" and not key.endswith("embed_scale")
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    _write_json(out / "config.json", settings(model.config, Tokenizer.from_file(str(tokenizer / "tokenizer.json"))))
    _write_json(out / "generation_config.json", GENERATION)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, out / file)
    shutil.copyfile(TEMPLATE, out / "chat_template.jinja")
    scores = json.loads(results.read_text(encoding="utf-8")) if results else []
    write_card(name, out, scores, state["step"], sum(value.numel() for value in weights.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a trained small model.")
    parser.add_argument("--name", choices=("tiny-e", "tiny-moe"), required=True)
    parser.add_argument("--run", type=Path, required=True, help="training folder (checkpoint.pt)")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="evaluate's --json of this directory, for the card")
    arguments = parser.parse_args()
    export(arguments.name, arguments.run, arguments.tokenizer, arguments.out, arguments.results)


if __name__ == "__main__":
    main()
