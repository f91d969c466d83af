# SPDX-License-Identifier: Apache-2.0
"""Check the rules that keep csrc/ and gemma4/ readable and embeddable, one line for each place that breaks one.

    python tools/check_layers.py [CSRC [GEMMA4]]

Layers     base < kernels < ops < model < python: a file includes only its own layer and those before it. gemma4.h, the
           public header, includes only base and the list of sites, and is for model, python and tests. Only python/
           knows Python and NumPy.
Library    nothing ends the process or writes to a stream: errors are statuses (tests/ are programs, and may).
Sizes      files of at most 800 lines, functions of at most 120.
Rooms      gemma4/: a module imports only what the table ROOMS gives its room, also for types and inside functions; and
           no module imports itself, over however many others.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

LAYERS = ("base", "kernels", "ops", "model", "python")
PUBLIC_HEADER = "gemma4.h"
LISTS_IN_PUBLIC_HEADER = ("model/sites.inc",)
USERS_OF_PUBLIC_HEADER = ("model", "python", "tests")
MAX_FILE, MAX_FUNCTION = 800, 120

# Rooms of gemma4/, from the ground up: a module or a folder, and the rooms that it may use. A module is in the room of
# its longest name here. core knows no face, media no encoder, and nothing below generation samples.
ROOMS = {
    "_engine": "",
    "_moved": "",
    "errors": "",
    "memory": "",
    "units": "",
    "narrow": "",
    "checks": "narrow",
    "profile": "_engine",
    "picks": "_engine",
    "files": "errors",
    "npz": "errors files",
    "html": "files",
    "text": "narrow checks memory errors files",
    "load": "narrow checks errors files npz text _engine",
    "media": "narrow checks memory errors text load.encoder_config _moved",
    "interp.sites": "narrow errors",
    "edits": "narrow errors files load interp.sites",
    "interp.hooks": "narrow errors interp.sites edits",
    "dictionaries.features": "narrow html",
    "dictionaries": "narrow memory errors html load edits interp.sites interp.hooks dictionaries.features _engine",
    "core": "checks errors text load media interp.sites interp.hooks _engine",
    "interp.saved": "narrow checks errors files load interp.sites dictionaries.features",
    "interp.tables": "checks memory interp.sites",
    "interp.dataset": "media interp.sites",
    "interp.pictures": "html units interp.sites",
    "interp.cache": "narrow checks errors units files html interp.pictures media interp.sites interp.saved "
    "interp.tables interp.dataset core dictionaries.features",
    "encoders": "narrow checks edits media interp.sites interp.hooks core interp.cache profile "
    "load.encoder_config _engine",
    "sequence": "narrow checks errors files npz media.keys core _engine",
    "step": "narrow checks edits errors interp.sites interp.hooks interp.cache core encoders.soft_tokens sequence "
    "profile picks _engine",
    "inputs": "narrow checks errors text media core encoders sequence step",
    "generation": "narrow checks edits errors text media interp.sites interp.hooks interp.cache core encoders sequence "
    "step inputs picks _engine",
    "family": "errors core",
    "guard": "checks narrow errors text core family",
    "info": "units core family",
    "model": "narrow checks edits dictionaries load media interp.sites interp.hooks interp.cache core profile encoders "
    "sequence step inputs generation guard info",
    "interp": "narrow checks memory html edits dictionaries media interp.sites interp.hooks interp.cache sequence step "
    "inputs model",  # these run a model
    "media.tasks": "errors load media generation model",
    "harvest": "narrow checks edits errors files text load dictionaries dictionaries.features interp.sites "
    "interp.hooks interp.saved interp.dataset interp.cache media core inputs model _engine",
    "quantization": "narrow checks errors units files text load inputs model _engine",
    "bench": "narrow checks memory errors units html media encoders sequence profile info model interp.media_plots "
    "_engine",
    "cli": "narrow errors units files html media interp interp.cache interp.saved sequence generation guard info model "
    "media.tasks bench quantization dictionaries harvest load",
    "__main__": "cli",
    # former names of modules: they only hand on names, and nobody here imports them
    **dict.fromkeys(("chat", "tokenizer", "turn"), "text"),
    **dict.fromkeys(("decode", "generate", "sampling", "textflow"), "generation"),
    "demo": "cli",
    **dict.fromkeys(("media.cache", "media.taps"), "encoders"),
    "": "*",  # gemma4/__init__.py, the names that users see
}

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


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of the package by its name inside it ("" is the package itself) -> its file."""
    found = {}
    for path in sorted([*package.rglob("*.py"), *package.glob("*.pyi")]):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str | None:
    """The room of a module: its longest name, or that of a folder around it, in ROOMS."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), None)


def imports_of(tree: ast.AST, package: str, modules: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module inside the package) of each import, for types and inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.(relative)" if node.level else node.module  # a name that no room has
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == package:
                inside = name.removeprefix(package).removeprefix(".")
                yield node.lineno, inside if inside in modules else inside.rpartition(".")[0]


def room_problem(module: str, target: str) -> str | None:
    """What is wrong with one import, or None."""
    room, used = room_of(module), room_of(target)
    if room is None or used is None:
        return f"{(module if room is None else target) or 'gemma4'} is in no room of the table ROOMS"
    if ROOMS[room] == "*" or room == used:
        return None
    allowed = ROOMS[room].split()
    inside = any(target == name or target.startswith(f"{name}.") for name in allowed if room_of(name) == used)
    return None if inside else f"imports {target or 'gemma4'}, but {room} may only use {ROOMS[room] or 'nothing'}"


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle, [] if none do."""
    done: set[str] = set()

    def search(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := search(target, [*above, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module, []))), [])


def python_problems(package: Path) -> list[str]:
    """One line for each import that breaks a rule: `file:line: what is wrong`."""
    modules, found, graph = modules_of(package), [], {}
    for module, path in modules.items():
        where = path.relative_to(package.parent)
        imports = list(imports_of(ast.parse(path.read_text(encoding="utf-8")), package.name, modules))
        graph[module] = {target for _, target in imports} - {module}
        found += [f"{where}:{line}: {what}" for line, target in imports if (what := room_problem(module, target))]
        if room_of(module) is None:
            found.append(f"{where}:1: {module} is in no room of the table ROOMS")
    if circle := circle_in(graph):
        found.append(f"{package.name}: {' -> '.join([*circle, circle[0]])} import each other in a circle")
    return found


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    csrc, package = [Path(name) for name in sys.argv[1:3]] + [root / "csrc", root / "gemma4"][len(sys.argv[1:3]) :]
    found = problems(csrc) + python_problems(package)
    print("\n".join(found) if found else f"{csrc.name} and {package.name}: layers, library rules, sizes and rooms hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
