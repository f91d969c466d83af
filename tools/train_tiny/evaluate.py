# SPDX-License-Identifier: Apache-2.0
"""Held-out accuracy of each skill, for any engine: it needs only a function from token ids to logits.

    python -m train_tiny.evaluate --model DIR                          # through gemma4
    python -m train_tiny.evaluate --model DIR --backend transformers   # through the reference

An answer counts if greedy decoding from the prompt would give exactly this answer: every one of its tokens, `<turn|>`
included, is the argmax given those before it. The exceptions say so in their `measure`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import skills_text
from .example import Example, Generator, sample
from .lexicon import NAMES, PETS_HE, PETS_SHE
from .mixture import SHARES, Document, piece_range, tokenize
from .stories import KINDS

Logits = Callable[[list[NDArray[np.int32]]], Sequence[NDArray[np.float32]]]  # ids [pos] each → [pos, vocab] each
Score = Callable[[list[Example], list[Document], list[NDArray[np.float32]], Logits, Tokenizer], tuple[float, int]]


@dataclass(frozen=True)
class Result:
    """`score` in 0…1 (perplexity: ≥ 1) over `count` answers (or tokens, where `measure` says so)."""

    skill: str
    measure: str
    score: float
    count: int


def _predictions(doc: Document, logits: NDArray[np.float32], start: int | None = None) -> NDArray[np.intp]:
    """The argmax for each answer position."""
    return logits[(start or doc.prompt_len) - 1 : len(doc.ids) - 1].argmax(axis=1)


def exact(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """Share of answers reproduced in full."""
    del examples, run, tok
    hits = [bool((_predictions(d, x) == d.ids[d.prompt_len :]).all()) for d, x in zip(docs, logits, strict=True)]
    return float(np.mean(hits)), len(hits)


def exact_items(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """Share of answers reproduced but for the full stop: nothing in the prompt says how far to go on."""
    del examples, run, tok
    hits = [bool((_predictions(d, x) == d.ids[d.prompt_len :])[:-1].all()) for d, x in zip(docs, logits, strict=True)]
    return float(np.mean(hits)), len(hits)


def per_token(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """Share of answer tokens predicted (the last one excepted: nothing says that the text ends there)."""
    del examples, run, tok
    hits = [(_predictions(d, x) == d.ids[d.prompt_len :])[:-1] for d, x in zip(docs, logits, strict=True)]
    return float(np.mean(np.concatenate(hits))), sum(map(len, hits))


def later_year(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """Share of prompts that greedy decoding ends in two digits making a later year."""
    prompts = [doc.ids[: doc.prompt_len] for doc in docs]
    first = [x[doc.prompt_len - 1].argmax() for doc, x in zip(docs, logits, strict=True)]
    longer = [np.append(ids, np.int32(i)) for ids, i in zip(prompts, first, strict=True)]
    second = [x[-1].argmax() for x in run(longer)]
    hits = []
    for example, a, b in zip(examples, first, second, strict=True):
        end = (tok.id_to_token(int(a)) or "") + (tok.id_to_token(int(b)) or "")
        start = int(example.key[-2:])
        hits.append(len(end) == 2 and end.isdigit() and int(end) > start)
    return float(np.mean(hits)), len(hits)


def perplexity(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of a story after its opening."""
    del examples, run, tok
    losses = []
    for doc, x in zip(docs, logits, strict=True):
        rows = x[doc.prompt_len - 1 : len(doc.ids) - 1].astype(np.float64)
        top = rows.max(axis=1, keepdims=True)
        normal = np.log(np.exp(rows - top).sum(axis=1)) + top[:, 0]
        losses.append(normal - rows[np.arange(len(rows)), doc.ids[doc.prompt_len :]])
    joined = np.concatenate(losses)
    return float(np.exp(joined.mean())), len(joined)


def cast_names(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """Where a story names someone it has named before: is the likeliest of all names one of this story's?"""
    del examples, run
    names = [tok.token_to_id("▁" + name) for name in (*NAMES, *PETS_HE, *PETS_SHE)]
    known = np.array([i for i in names if i is not None])
    hits = []
    for doc, x in zip(docs, logits, strict=True):
        seen: set[int] = set()
        for at, token in enumerate(doc.ids.tolist()):
            if token not in known:
                continue
            if token in seen:
                hits.append(int(known[x[at - 1][known].argmax()]) in seen)
            seen.add(token)
    return float(np.mean(hits)), len(hits)


def asked_hero(
    examples: list[Example], docs: list[Document], logits: list[NDArray[np.float32]], run: Logits, tok: Tokenizer
) -> tuple[float, int]:
    """Asked for a story about a fox, is its hero a fox? (argmax where the story names what its hero is)"""
    del run
    kinds = {tok.token_to_id("▁" + kind) for kind in (*KINDS, "girl", "boy")}
    hits = []
    for _, doc, x in zip(examples, docs, logits, strict=True):
        places = [i for i in range(doc.prompt_len, len(doc.ids)) if int(doc.ids[i]) in kinds]
        if places:
            hits.append(x[places[0] - 1].argmax() == doc.ids[places[0]])
    return float(np.mean(hits)), len(hits)


_SPECIAL_SCORES: dict[str, tuple[tuple[str, Score], ...]] = {
    "induction": (("tokens of the second copy", per_token),),
    "sequences": (("next three items", exact_items),),
    "greater_than": (("later year", later_year),),
    "story": (("perplexity", perplexity), ("known names", cast_names)),
    "story_request": (("hero as asked", asked_hero),),
}


def generators(tokenizer: Tokenizer) -> dict[str, Generator]:
    """Every skill's generator by name."""
    found: dict[str, Generator] = {name: shares[0] for name, shares in SHARES.items()}
    found["induction"] = partial(skills_text.induction, pieces=piece_range(tokenizer))
    return found


def held_out(skill: str, tokenizer: Tokenizer, count: int, seed: int = 1) -> list[Example]:
    """`count` distinct examples of a skill that training never saw (fewer if there are not so many)."""
    generator = generators(tokenizer)[skill]
    rng = random.Random(f"test/{seed}/{skill}")
    found: dict[str, Example] = {}
    for _ in range(count * 20):
        example = sample(generator, rng, held_out=True)
        found.setdefault(example.key, example)
        if len(found) == count:
            break
    return list(found.values())


def evaluate(
    logits: Logits, tokenizer: Tokenizer, *, skills: Iterable[str] | None = None, count: int = 200, seed: int = 1
) -> list[Result]:
    """Score every skill (or those named) on `count` held-out examples each."""
    results = []
    for skill in skills or sorted(generators(tokenizer)):
        examples = held_out(skill, tokenizer, count, seed)
        docs = [_without_eos(tokenize(example, tokenizer)) for example in examples]
        outputs = [np.asarray(x) for x in logits([doc.ids for doc in docs])]
        for measure, score in _SPECIAL_SCORES.get(skill, (("exact answer", exact),)):
            value, n = score(examples, docs, outputs, logits, tokenizer)
            results.append(Result(skill, measure, value, n))
    return results


def _without_eos(doc: Document) -> Document:
    """A plain-text answer is right whatever comes after it."""
    keep = len(doc.ids) - int(doc.ids[-1] == 1)
    return Document(doc.ids[:keep], doc.weights[:keep], doc.prompt_len)


def table(results: Iterable[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| skill | measure | held out | of |", "|---|---|---|---|"]
    for r in results:
        value = f"{r.score:.2f}" if r.measure == "perplexity" else f"{100 * r.score:.1f} %"
        lines.append(f"| {r.skill} | {r.measure} | {value} | {r.count} |")
    return "\n".join(lines)


def transformers_logits(directory: Path, dtype: str = "float32", batch: int = 16) -> Logits:
    """The reference: transformers, weights as stored (bf16) computed in float32."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    model = Gemma4ForConditionalGeneration.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def run(sequences: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        outputs: list[NDArray[np.float32]] = []
        for at in range(0, len(sequences), batch):
            part = sequences[at : at + batch]
            ids = torch.zeros((len(part), max(map(len, part))), dtype=torch.long)  # padded on the right: causal
            for row, sequence in zip(ids, part, strict=True):
                row[: len(sequence)] = torch.from_numpy(sequence)
            with torch.no_grad():
                values = model(input_ids=ids, use_cache=False).logits.float().numpy()
            outputs += [x[: len(sequence)] for x, sequence in zip(values, part, strict=True)]
        return outputs

    return run


def gemma4_logits(directory: Path) -> Logits:
    """This project's engine."""
    import gemma4

    model = gemma4.load(directory)
    return lambda sequences: model.forward(sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out accuracy of a small model's skills.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", choices=("gemma4", "transformers"), default="gemma4")
    parser.add_argument("--skills", nargs="*", help="default: all")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    arguments = parser.parse_args()
    run = gemma4_logits(arguments.model) if arguments.backend == "gemma4" else transformers_logits(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    results = evaluate(run, tokenizer, skills=arguments.skills, count=arguments.count, seed=arguments.seed)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
