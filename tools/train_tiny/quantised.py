# SPDX-License-Identifier: Apache-2.0
"""What quantising does to a small model's skills: a table for its model card.

    python -m train_tiny.quantised --model DIR            # measures, prints, and puts the table into DIR/README.md

The model is written as GGUF in each type and scored like the original, with the arithmetic that `gemma4.load` picks for
it (whole numbers, precision="fast").
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

import gemma4

from .evaluate import Result, evaluate

TYPES = ("Q8_0", "Q4_0")
HEADING, BEFORE = "## Skills, quantised", "## How it was made"

_SECTION = """{heading}

{table}

The same held-out answers from GGUF files of these types, made by `gemma4 quantize` (every matrix, the embedding tables
included) and computed as `gemma4.load` does by default. To do it again:

```
cd tools && python -m train_tiny.quantised --model ../gemma4/pretrained/{name}
```

"""


def scores(model: Path, type: str | None, *, count: int = 200, skills: Iterable[str] | None = None) -> list[Result]:
    """Held-out scores of the model in `model`, quantised to `type` first (None: as it is)."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        path = model
        if type:
            path = Path(folder) / f"{type}.gguf"
            gemma4.quantize(model, path, type=type)
        with gemma4.load(path) as loaded:
            return evaluate(lambda ids: loaded.forward(ids), tokenizer, count=count, skills=skills)


def table(columns: dict[str, Sequence[Result]]) -> str:
    """Markdown: a row for each measure, a column for each type."""
    lines = [f"| skill | measure | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for row in zip(*columns.values(), strict=True):
        cells = [f"{r.score:.2f}" if r.measure == "perplexity" else f"{100 * r.score:.1f} %" for r in row]
        lines.append(f"| {row[0].skill} | {row[0].measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put_into_card(card: Path, text: str) -> None:
    """Add the section to a model card, or replace it."""
    old = card.read_text(encoding="utf-8")
    section = _SECTION.format(heading=HEADING, table=text, name=card.parent.name)
    without = re.sub(rf"^{HEADING}\n.*?(?=^{BEFORE}$)", "", old, flags=re.DOTALL | re.MULTILINE)
    if f"\n{BEFORE}\n" not in without:
        raise SystemExit(f"{card} has no heading {BEFORE!r} to put the table before")
    card.write_text(without.replace(f"\n{BEFORE}\n", f"\n{section}{BEFORE}\n", 1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="A small model's skills after quantising, into its card.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    columns = {
        type or "bf16": scores(arguments.model, type, count=arguments.count) for type in (None, *arguments.types)
    }
    text = table(columns)
    print(text)
    put_into_card(arguments.model / "README.md", text)


if __name__ == "__main__":
    main()
