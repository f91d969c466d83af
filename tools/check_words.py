# SPDX-License-Identifier: Apache-2.0
"""Hold comments, docstrings and documents against the glossary in CONTRIBUTING.md ("Words"). `make lint` runs it.

    python tools/check_words.py     prints each place with a word that the glossary replaces; exit status 1 if any

Code and error texts are not read: names and messages change by deprecation, not by a glossary.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \|$", re.M)
C_COMMENT = re.compile(r"/\*.*?\*/", re.S)
FENCED = re.compile(r"^```.*?^```|`[^`\n]+`", re.S | re.M)
OPENING = re.compile(r"(?:Of|What)\b")
Place = tuple[int, str]  # line, text


def glossary(text: str) -> dict[str, str]:
    """The table under "## Words": word -> what to write. Raises ValueError if there is none."""
    section = re.search(r"^## Words\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    rows = dict(ROW.findall(section[1])) if section else {}
    if not rows:
        raise ValueError('CONTRIBUTING.md has no table of words under "## Words"')
    return rows


def c_comments(text: str) -> Iterator[Place]:
    for match in C_COMMENT.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[0]


def python_comments(text: str) -> Iterator[Place]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield node.body[0].lineno, docstring


def prose(text: str) -> Iterator[Place]:
    """A document without its code."""
    yield 1, FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)


def problems(places: Iterator[Place], words: dict[str, str], opening: bool) -> Iterator[Place]:
    """(line, what is wrong) for each word of the glossary, and for comments that open with "Of" or "What"."""
    patterns = {word: re.compile(rf"\b{re.escape(word)}s?\b", re.I) for word in words}
    for line, text in places:
        for word, pattern in patterns.items():
            # a word may be broken over two lines of a comment
            for match in pattern.finditer(text):
                yield line + text.count("\n", 0, match.start()), f"{match[0]!r}: write {words[word]}"
        if opening and OPENING.match(text.lstrip("/*# \n")):
            yield line, "a comment opens with the subject, not with Of or What"


def check(root: Path = ROOT) -> list[str]:
    """Every problem as "file:line: text"."""
    words = glossary((root / "CONTRIBUTING.md").read_text())
    found = []
    for pattern, reader, opening in (
        ("csrc/**/*.[ch]", c_comments, True),
        ("csrc/**/*.inc", c_comments, True),
        ("gemma4/**/*.py", python_comments, True),
        ("docs/*.md", prose, False),
        ("README.md", prose, False),
    ):
        for path in sorted(root.glob(pattern)):
            for line, text in problems(reader(path.read_text()), words, opening):
                found.append(f"{path.relative_to(root)}:{line}: {text}")
    return found


if __name__ == "__main__":
    found = check()
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
