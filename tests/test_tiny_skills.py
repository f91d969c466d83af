# SPDX-License-Identifier: Apache-2.0
"""The shipped models do, through this engine, what their model cards say; and they are what transformers computes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import gemma4
from gemma4.load.huggingface import shipped_models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from train_tiny.evaluate import evaluate  # noqa: E402

COUNT = 50  # of the card's 200 held-out examples of each skill


def directory(name: str) -> Path:
    return Path(gemma4.__file__).parent / "pretrained" / name


def card_scores(name: str) -> list[tuple[str, str, float]]:
    """(skill, measure, score) of every row of the card's table; percentages as 0…1."""
    text = (directory(name) / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| ([\d.]+)( %)? \| \d+ \|$", text, flags=re.MULTILINE)
    return [(skill, measure, float(score) / (100 if percent else 1)) for skill, measure, score, percent in rows]


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_the_card_holds_through_this_engine(name: str) -> None:
    claimed = card_scores(name)
    assert len(claimed) >= 15, f"the card of {name} has no table of skills"
    model = gemma4.load(name)
    tokenizer = Tokenizer.from_file(str(directory(name) / "tokenizer.json"))
    results = evaluate(lambda ids: model.forward(ids), tokenizer, count=COUNT)
    found = {(r.skill, r.measure): r for r in results}
    short = []
    for skill, measure, score in claimed:
        result = found[skill, measure]
        if measure == "perplexity":
            fine = result.score < 1.15 * score
        else:  # a quarter of the sample may be this much worse by chance
            fine = result.score > score - 3 * np.sqrt(max(score * (1 - score), 0.01) / result.count) - 0.01
        if not fine:
            short.append(f"{skill} ({measure}): {result.score:.3f} of {result.count}, the card says {score:.3f}")
    assert not short


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_logits_equal_transformers(name: str) -> None:
    """In float32 on the stored bf16 weights; the reference rounds a table's scale to the weights' dtype, as we do."""
    torch = pytest.importorskip("torch")
    from transformers import Gemma4ForConditionalGeneration

    reference = Gemma4ForConditionalGeneration.from_pretrained(directory(name), dtype=torch.float32).eval()
    for module in reference.modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale.copy_(module.embed_scale.to(torch.bfloat16).float())
    model = gemma4.load(name)
    ids = model.to_tokens("Once upon a time there was a fox named Pip. When Mary and John went to the store, John gave")
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()
    logits = model.forward(ids)
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
