# SPDX-License-Identifier: Apache-2.0
"""Check the rules that keep csrc/ readable and embeddable, one line for each place that breaks one.

    python tools/check_layers.py [CSRC]

Layers     base < kernels < ops < model < python: a file includes only its own layer and those before it. gemma4.h, the
           public header, includes only base and the list of sites, and is for model, python and tests. Only python/
           knows Python and NumPy.
Library    nothing ends the process or writes to a stream: errors are statuses (tests/ are programs, and may).
Sizes      files of at most 800 lines, functions of at most 120.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = ("base", "kernels", "ops", "model", "python")
PUBLIC_HEADER = "gemma4.h"
LISTS_IN_PUBLIC_HEADER = ("model/sites.inc",)
USERS_OF_PUBLIC_HEADER = ("model", "python", "tests")
MAX_FILE, MAX_FUNCTION = 800, 120

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
PYTHON_HEADER = re.compile(r"^(Python|structmember|pythread)\.h$|^numpy/")
BANNED = re.compile(
    r"\b(?:(?:_?exit|_Exit|quick_exit|abort|v?f?printf|puts|fputs|putchar|perror)\s*\(|std(?:err|out)\b)"
)
NOT_CODE = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'", re.DOTALL)

Problem = tuple[int, str]  # line, what is wrong


def code_only(text: str) -> str:
    """The text with comments and literals blanked out; lines keep their numbers."""
    return NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def layer_of(path: str) -> str:
    """The layer of a path relative to csrc/: its first folder, or the file itself at the top."""
    return path.split("/", 1)[0]


def include_problem(layer: str, quote: str, target: str, csrc: Path) -> str | None:
    """What is wrong with one `#include` in a file of this layer, or None."""
    if PYTHON_HEADER.search(target):
        return None if layer == "python" else f"{layer}/ includes <{target}>: only python/ may"
    if quote == "<":
        return None
    if not (csrc / target).is_file():
        return f'"{target}" is not a file of csrc/: includes are written from csrc/'
    if target == PUBLIC_HEADER:
        return None if layer in USERS_OF_PUBLIC_HEADER else f"{layer}/ includes {PUBLIC_HEADER}, which is above it"
    if layer == PUBLIC_HEADER and target in LISTS_IN_PUBLIC_HEADER:
        return None
    target_layer = layer_of(target)
    if target_layer not in LAYERS:
        return None if layer == target_layer else f"{layer}/ includes {target_layer}/, which is no layer"
    allowed = allowed_layers(layer)
    return None if target_layer in allowed else f'includes "{target}", but may only use {" ".join(allowed)}'


def allowed_layers(layer: str) -> tuple[str, ...]:
    if layer == "tests":
        return LAYERS[:-1]
    if layer == PUBLIC_HEADER:
        return LAYERS[:1]
    return LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else ()


def include_problems(layer: str, text: str, csrc: Path) -> Iterator[Problem]:
    for match in INCLUDE.finditer(text):
        if problem := include_problem(layer, match[1], match[2], csrc):
            yield line_of(text, match.start()), problem


def banned_problems(layer: str, text: str) -> Iterator[Problem]:
    if layer == "tests":
        return
    code = code_only(text)
    for match in BANNED.finditer(code):
        yield line_of(code, match.start()), f"{match[0].strip(' (')}: a library returns a status (g4_fail) instead"


def size_problems(text: str) -> Iterator[Problem]:
    lines = text.splitlines()
    if len(lines) > MAX_FILE:
        yield len(lines), f"{len(lines)} lines in one file, at most {MAX_FILE}"
    start = 0
    for number, line in enumerate(lines, 1):
        if line == "{":  # the house style opens a function, and nothing else, with a brace in the first column
            start = number
        elif line == "}" and start:
            if number - start + 1 > MAX_FUNCTION:
                yield start, f"a function of {number - start + 1} lines, at most {MAX_FUNCTION}"
            start = 0


def file_problems(path: Path, csrc: Path) -> Iterator[Problem]:
    layer, text = layer_of(path.relative_to(csrc).as_posix()), path.read_text()
    if layer not in (*LAYERS, "tests", PUBLIC_HEADER):
        yield 1, f"{layer} is not one of {' '.join(LAYERS)} tests {PUBLIC_HEADER}"
    yield from include_problems(layer, text, csrc)
    yield from banned_problems(layer, text)
    yield from size_problems(text)


def problems(csrc: Path) -> list[str]:
    """One line for each rule broken anywhere under csrc: `file:line: what is wrong`."""
    files = sorted(p for p in csrc.rglob("*") if p.suffix in {".c", ".h", ".inc"})
    return [
        f"{path.relative_to(csrc.parent)}:{line}: {what}" for path in files for line, what in file_problems(path, csrc)
    ]


def main() -> int:
    csrc = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "csrc"
    found = problems(csrc)
    print("\n".join(found) if found else f"{csrc.name}: layers, library rules and sizes hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
