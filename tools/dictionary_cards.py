# SPDX-License-Identifier: Apache-2.0
"""The card of a trained dictionary: figures on held-out documents, and features that a stated pattern explains.

    python tools/dictionary_cards.py           writes README.md beside each dictionary of train_dictionaries.RECIPES

A pattern is a function of the text alone. The card names the feature that agrees with it best, and how well, so that
the meaning of a feature is measured rather than read into its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from train_dictionaries import (
    HELD_OUT_DOCUMENTS,
    RECIPES,
    Recipe,
    evaluation,
    held_out_documents,
    opened,
    tokenizer_of,
)
from train_tiny import lexicon

import gemma4
from gemma4.interp import DictionaryEvaluation

DOCUMENTS, EXAMPLES, AROUND = 600, 4, 9
SHOWN = 0.6  # precision and recall of features on the card, at least
STRONG = 0.4  # a feature is on where it has this share of its greatest value

Pattern = Callable[[Sequence[str]], NDArray[np.bool_]]


@dataclass(frozen=True)
class Named:
    """The feature that agrees best with a pattern: share of its firings that the pattern explains, and of the pattern's
    places where it fires."""

    meaning: str
    feature: int
    precision: float
    recall: float
    examples: list[str]


# ---- patterns -------------------------------------------------------------------------------------------------------


def between(start: str, end: str) -> Pattern:
    """Tokens from `start` up to the one before `end`."""

    def found(tokens: Sequence[str]) -> NDArray[np.bool_]:
        inside, open_ = np.zeros(len(tokens), np.bool_), False
        for i, token in enumerate(tokens):
            open_ = (open_ or token == start) and token != end
            inside[i] = open_
        return inside

    return found


def words(names: Sequence[str]) -> Pattern:
    """Tokens that are one of these words after a space."""
    spaced = [f" {name}" for name in names]
    return lambda tokens: np.isin(tokens, spaced)


def before(names: Sequence[str]) -> Pattern:
    """The token before one of these words, where the word is an answer: after a copula, a colon or an arrow."""
    next_one = words(names)

    def found(tokens: Sequence[str]) -> NDArray[np.bool_]:
        due = np.append(next_one(tokens)[1:], False)
        return due & np.isin(tokens, [" is", ":", " ->", "->", "?", " in", " speak"])

    return found


def repeated(length: int) -> Pattern:
    """Tokens that stood before in the document, after the same `length` tokens."""

    def found(tokens: Sequence[str]) -> NDArray[np.bool_]:
        grams = [tuple(tokens[max(0, i - length) : i + 1]) for i in range(len(tokens))]
        return np.array([gram in grams[:i] for i, gram in enumerate(grams)], np.bool_)

    return found


def characters(allowed: str) -> Pattern:
    """Tokens of these characters alone."""
    return lambda tokens: np.array([bool(token.strip()) and not set(token.strip()) - set(allowed) for token in tokens])


_ENGLISH, _FRENCH, _GERMAN = (sorted({row[i] for row in lexicon.WORDS}) for i in range(3))
_COUNTRIES, _CAPITALS, _SPEECH, _CONTINENTS = (sorted({row[i] for row in lexicon.COUNTRIES}) for i in range(4))
PATTERNS: dict[str, Pattern] = {
    "a girl's name": words(lexicon.GIRLS),
    "a boy's name": words(lexicon.BOYS),
    "a country": words(_COUNTRIES),
    "a capital city": words(_CAPITALS),
    "a capital city is due": before(_CAPITALS),
    "a continent is due": before(_CONTINENTS),
    "a language is due": before(_SPEECH),
    "a German word": words(sorted(set(_GERMAN) - {*_ENGLISH, *_FRENCH})),
    "a German word is due": before(sorted(set(_GERMAN) - {*_ENGLISH, *_FRENCH})),
    "a French word": words(sorted(set(_FRENCH) - {*_ENGLISH, *_GERMAN})),
    "a French word is due": before(sorted(set(_FRENCH) - {*_ENGLISH, *_GERMAN})),
    "a place of a story or of two friends": words(lexicon.PLACES),
    "an object that is given": words(lexicon.OBJECTS),
    "an indefinite article": words(("a", "an")),
    "a plus sign": characters("+"),
    "*than* in a comparison": words(("than",)),
    "*year* in a range of years": words(("year",)),
    "a turn begins": between("<|turn>", "\n"),
    "a name of an animal": words([row[0] for row in lexicon.ANIMALS]),
    "an opening bracket": characters("([{"),
    "a closing bracket": characters(")]}"),
    "inside a tool call": between("<|tool_call>", "<tool_call|>"),
    "inside a thought": between("<|channel>", "<channel|>"),
    "a token of a second copy": repeated(3),
}


# ---- the best feature of each ---------------------------------------------------------------------------------------


def named_features(recipe: Recipe, documents: int = DOCUMENTS) -> list[Named]:
    """For each pattern the feature with the highest F1, best patterns first."""
    model, dictionary = gemma4.load(recipe.model), opened(recipe)
    texts, values = list[list[str]](), list[NDArray[np.float32]]()
    for ids in held_out_documents(tokenizer_of(recipe.model), documents, seed=1):
        _, cache = model.run_with_cache(ids, recipe.site, logits=None)
        texts.append(model.to_str_tokens(ids))
        values.append(dictionary.encode(cache).dense())
    every = np.concatenate(values)
    on = every > STRONG * every.max(axis=0)
    found = [_best(meaning, pattern, texts, every, on) for meaning, pattern in PATTERNS.items()]
    return sorted(found, key=lambda one: -one.precision * one.recall / max(1e-9, one.precision + one.recall))


def _best(
    meaning: str, pattern: Pattern, texts: list[list[str]], values: NDArray[np.float32], on: NDArray[np.bool_]
) -> Named:
    truth = np.concatenate([pattern(tokens) for tokens in texts])
    hits, fired = on[truth].sum(axis=0), on.sum(axis=0)
    feature = int(np.argmax(2 * hits / np.maximum(1, fired + truth.sum())))
    return Named(
        meaning,
        feature,
        float(hits[feature] / max(1, fired[feature])),
        float(hits[feature] / max(1, truth.sum())),
        _examples(texts, values[:, feature]),
    )


def _examples(texts: list[list[str]], values: NDArray[np.float32]) -> list[str]:
    """The strongest firing of each of the documents where it is strongest, with the text before it."""
    parts = np.split(values, np.cumsum([len(tokens) for tokens in texts])[:-1])
    best = sorted(range(len(texts)), key=lambda i: -float(parts[i].max()))[:EXAMPLES]
    shown = list[str]()
    for i in best:
        at = int(parts[i].argmax())
        left, here = "".join(texts[i][max(0, at - AROUND) : at]), texts[i][at]
        shown.append(f"{left}[[{here}]] {parts[i][at]:.1f}".replace("\n", "\\n"))
    return shown


# ---- text -----------------------------------------------------------------------------------------------------------

_CARD = """---
license: apache-2.0
library_name: gemma4
tags: [sparse-autoencoder, interpretability, tiny]
---

# {name}

{intro}

```python
import gemma4

model = gemma4.load("{model}")
dictionary = gemma4.{kind}.load("{name}")
_, cache = model.run_with_cache("The capital of France is", {sites})
dictionary.encode(cache)[-1]       # the features that fire at the last token, and their values
```

| | |
|---|---|
| reads | `{site}` |
{writes}| features | {d_sae} |
| form | {form} |
| files | SAELens's layout; matrices in bfloat16, which both readers compute with in float32 |

On {documents} documents that neither model nor dictionary was trained on, {n_tokens} tokens of all
skills in equal numbers:

| measure | value |
|---|---|
| explained variance | {explained:.1f} % |
| features at a position | {l0:.1f} (L0) |
| dead features | {dead:.1f} % of these documents |
| loss | {loss:.3f} nats a token, of the model alone |
| loss spliced | {spliced:.3f} with the reconstruction in place of the site |
| loss ablated | {ablated:.3f} with zeros in place of the site |
| loss recovered | {recovered:.1f} % |

`gemma4.interp.evaluate_dictionary` measures all of it. To train and measure again: `python tools/train_dictionaries.py
--work DIR`, then `python tools/dictionary_cards.py`.

## Features with a measured meaning

A pattern is a function of the text, written down in `tools/dictionary_cards.py`. The feature beside it is the one that
agrees best. *Precision*: of the tokens where the feature is on (above {strong:.0f} % of its greatest value), the share
that fits the pattern. *Recall*: of the tokens that fit, the share where it is on.

| pattern | feature | precision | recall |
|---|---|---|---|
{table}

Where they are strongest, the token in double brackets, then the value:

{examples}
"""


def card(recipe: Recipe, result: DictionaryEvaluation, documents: int, named: Sequence[Named]) -> str:
    site_out = recipe.site_out
    shown = [one for one in named if min(one.precision, one.recall) >= SHOWN]
    table = [f"| {one.meaning} | {one.feature} | {one.precision:.2f} | {one.recall:.2f} |" for one in shown]
    examples = [
        "\n".join((f"Feature {one.feature}, {one.meaning}:\n", "```", *one.examples, "```\n")) for one in shown[:3]
    ]
    return _CARD.format(
        name=recipe.name,
        model=recipe.model,
        intro=(
            f"A sparse autoencoder of `{recipe.site}` of the shipped model `{recipe.model}`."
            if site_out is None
            else f"A transcoder of an MLP of the shipped model `{recipe.model}`: it reads what the MLP reads, and "
            "writes what the MLP adds to the residual stream, through features that can be named."
        ),
        kind="SAE" if site_out is None else "Transcoder",
        sites="dictionary.site" if site_out is None else "[dictionary.site, dictionary.site_out]",
        site=recipe.site,
        writes="" if site_out is None else f"| writes | `{site_out}` |\n",
        d_sae=recipe.d_sae,
        form=f"top-k, k = {recipe.k}"
        if site_out is None
        else f"JumpReLU with one threshold, trained as batch top-k, k = {recipe.k}",
        documents=documents,
        n_tokens=result.n_tokens,
        explained=100 * result.explained_variance,
        l0=result.l0,
        dead=100 * result.dead,
        loss=result.loss,
        spliced=result.loss_spliced,
        ablated=result.loss_ablated,
        recovered=100 * result.loss_recovered,
        strong=100 * STRONG,
        table="\n".join(table),
        examples="\n".join(examples).rstrip(),
    )


def main() -> None:
    for recipe in RECIPES:
        text = card(recipe, evaluation(recipe), HELD_OUT_DOCUMENTS, named_features(recipe))
        (recipe.folder / "README.md").write_text(text, encoding="utf-8")
        print(f"{recipe.folder / 'README.md'}: {len(text)} bytes")


if __name__ == "__main__":
    main()
