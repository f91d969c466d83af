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
from train_tiny import quantised  # noqa: E402
from train_tiny.evaluate import evaluate  # noqa: E402

COUNT = 50  # of the card's 200 held-out examples of each skill
SOME_SKILLS = ("brackets", "chat", "facts", "induction", "ioi", "tools", "translation")


def directory(name: str) -> Path:
    return Path(gemma4.__file__).parent / "pretrained" / name


def card_scores(name: str) -> list[tuple[str, str, float]]:
    """(skill, measure, score) of every row of the card's table; percentages as 0…1."""
    text = (directory(name) / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| ([\d.]+)( %)? \| \d+ \|$", text, flags=re.MULTILINE)
    return [(skill, measure, float(score) / (100 if percent else 1)) for skill, measure, score, percent in rows]


@pytest.mark.slow
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


def quantised_scores(name: str) -> dict[str, dict[str, tuple[float, float]]]:
    """type -> skill -> (score as stored, score quantised), from the card's second table; those of whole answers."""
    text = (directory(name) / "README.md").read_text(encoding="utf-8")
    section = text.split(quantised.HEADING)[1].split(quantised.BEFORE)[0]
    types = re.search(r"^\| skill \| measure \| bf16 \| ([\w |]+) \|$", section, flags=re.MULTILINE)
    assert types, f"the card of {name} has no table of quantised skills"
    found: dict[str, dict[str, tuple[float, float]]] = {type: {} for type in types[1].split(" | ")}
    for skill, *cells in re.findall(
        r"^\| (\w+) \| [\w ]+ \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", section, re.M
    ):
        stored, *rest = (float(cell) / 100 for cell in cells)
        for type, score in zip(found, rest, strict=True):
            found[type][skill] = stored, score
    return found


@pytest.mark.parametrize("type", quantised.TYPES)
@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_quantised_models_keep_their_skills(name: str, type: str) -> None:
    """The card's column holds on a sample, and is within five points of the stored weights' column."""
    claimed = quantised_scores(name)[type]
    assert len(claimed) >= 14
    assert all(score >= stored - 0.05 for stored, score in claimed.values())
    results = quantised.scores(directory(name), type, count=COUNT, skills=SOME_SKILLS)
    short = []
    for result in results:
        score = claimed[result.skill][1]
        if result.score < score - 3 * np.sqrt(max(score * (1 - score), 0.01) / result.count) - 0.01:
            short.append(f"{result.skill}: {result.score:.3f} of {result.count}, the card says {score:.3f}")
    assert not short


def test_the_table_replaces_itself(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    before = f"# x\n\n## Skills, held out\n\n| a |\n\n{quantised.BEFORE}\n\nso\n"
    card.write_text(before)
    for text in ("| first |", "| second |", "| second |"):
        quantised.put_into_card(card, text)
    after = card.read_text()
    assert after.count(quantised.HEADING) == 1 and "| second |" in after and "| first |" not in after
    assert re.sub(rf"{quantised.HEADING}.*(?={quantised.BEFORE})", "", after, flags=re.DOTALL) == before


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
