# SPDX-License-Identifier: Apache-2.0
"""The pages of the site that are not in docs/: a hook of MkDocs (mkdocs.yml). `make docs` runs it.

Tutorials are the notebooks with their stored outputs. The reference has a page for every public package, with an entry
for every name of its `__all__`, and one for the command. Model cards, CONTRIBUTING.md and CHANGELOG.md become pages
where they stand. Links are written for the repository; here those to such files lead to their pages, and those to
sources to copies of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks-method.md",
    "notebooks/README.md": "tutorials/index.md",
    "tools/train_tiny/README.md": "models/training.md",
}
# Modules that users import from beside the packages with an `__all__`
MODULES = (
    "gemma4.bench.plot",
    "gemma4.interp.media_plots",
    "gemma4.interp.plots",
    "gemma4.media.audio",
    "gemma4.media.boxes",
    "gemma4.media.image",
    "gemma4.media.samples",
    "gemma4.media.tasks",
    "gemma4.media.video",
)
FIRST = {  # on the page of a module, before the others
    "gemma4": ("load", "Model"),
    "gemma4.dictionaries": ("SAE", "Transcoder", "Dictionary", "Features", "Crosscoder", "CrossLayerTranscoder"),
    "gemma4.generation": ("Generation", "Options"),
    "gemma4.harvest": ("harvest", "open", "Dataset"),
    "gemma4.html": ("attention", "tokens", "heat", "bars", "cards", "together"),
    "gemma4.interp": ("logit_lens", "dla", "patching_grid", "head_patching", "head_ablations"),
}
WITHOUT_METHODS = ("gemma4.edits",)  # what the engine asks of an edit is no concern of its user
MADE_ELSEWHERE = (  # by functions: their constructors are no concern of users
    *("Model", "SAE", "Transcoder", "Dictionary", "Crosscoder", "CrossLayerTranscoder", "LayeredDictionary"),
    *(
        "Dataset",
        "Sequence",
        "Encoder",
        "Tokenizer",
        "ChatTemplate",
        "Profile",
        "EncoderCache",
        "Continuation",
        "TextStream",
    ),
)
EDITS = ("AblateFeature", "ClampFeature", "FeatureEdit", "ScaleFeature")  # likewise, in gemma4.dictionaries
COMMAND_PAGE, TYPES_PAGE, RESULTS_PAGE = "reference/command.md", "reference/types.md", "reference/results.md"
RESULTS = (  # of public functions; nobody imports them
    "gemma4.interp.cache.Stack",
    "gemma4.interp.tables.Table",
    "gemma4.interp.sites.Site",
    "gemma4.interp.cache.EncoderCache",
    "gemma4.info.ModelInfo",
    "gemma4.profile.Profile",
    "gemma4.generation.pieces.Piece",
    "gemma4.text.turn.ToolCall",
    "gemma4.text.tokenizer.Tokenizer",
    "gemma4.text.chat.ChatTemplate",
    "gemma4.media.prompt.TokenizedPrompt",
    "gemma4.media.prompt.SoftRun",
    "gemma4.media.medium.Medium",
    "gemma4.media.medium.Modalities",
    "gemma4.media.silence.Segment",
)
NOT_PYTHON = ("gemma4.cli", "gemma4.text")  # the command; the parts of `Model` that handle text
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```.*?^```[^\n]*\n)", re.S | re.M)


# ---- what is public -------------------------------------------------------------------------------------------------


def public_names(module: str) -> list[str]:
    """The `__all__` of a module, or its functions and classes without underscore. Nothing is imported."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return sorted(ast.literal_eval(node.value), key=str.lower)
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in defined if not name.startswith("_")]


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_modules() -> list[str]:
    """The package, every folder in it with an `__all__`, and `MODULES`."""
    packages = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in sorted((ROOT / "gemma4").rglob("__init__.py"))
        if "__all__" in path.read_text(encoding="utf-8")
    ]
    return sorted({*packages, *MODULES} - {*NOT_PYTHON})


# ---- the reference --------------------------------------------------------------------------------------------------


def reference_pages() -> dict[str, str]:
    """Page -> Markdown; `::: gemma4.edits.Ablate` becomes the entry of that name (mkdocstrings)."""
    modules = public_modules()
    homes = {name: module for module in modules if module != "gemma4" for name in public_names(module)}
    return {f"reference/{module}.md": reference_page(module, homes) for module in modules}


def reference_page(module: str, homes: Mapping[str, str]) -> str:
    """Package docstring and entries. The package `gemma4` links to names that have their entry in another module."""
    entries, links = [], []
    first = FIRST.get(module, ())
    for name in sorted(public_names(module), key=lambda name: first.index(name) if name in first else len(first)):
        home = homes.get(name, module)
        if module == "gemma4" and name == "load":  # a function; gemma4.load is also a package
            entries.append("::: gemma4.model.load\n")
        elif module == "gemma4" and home != module:
            links.append(f'- <a id="{module}.{name}"></a>[`{name}`]({home}.md#{home}.{name}), from `{home}`')
        else:
            entries.append(f"::: {module}.{name}\n{entry_options(module, name)}")
    options = "    options: {show_root_heading: false, members: false, show_root_toc_entry: false, heading_level: 1}\n"
    about = f"# {module}\n\n::: {module}\n{options}"
    also = ["## Also here\n\n" + "\n".join(links) + "\n"] if links else []
    return "\n".join([about, *entries, *also])


def entry_options(module: str, name: str) -> str:
    options: list[str] = []
    if module in WITHOUT_METHODS or name in EDITS:
        options += ["members: false", "inherited_members: false"]
    if name in MADE_ELSEWHERE:
        options += ["merge_init_into_class: false"]
    return f"    options: {{{', '.join(options)}}}\n" if options else ""


def results_page() -> str:
    entries = [f"::: {name}\n{entry_options(*name.rsplit('.', 1))}" for name in RESULTS]
    return "\n".join(
        ["# What calls return\n\nObjects that calls return and that are not imported by name.\n", *entries]
    )


def types_page() -> str:
    """The type aliases of public signatures, with the anchors that these link to."""
    used, found = set[str](), dict[tuple[str, str], list[str]]()
    for path in sorted((ROOT / "gemma4").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used |= annotated(tree)
        for node in tree.body:
            for name, value in alias(node):
                text = value.value if isinstance(value, ast.Constant) else ast.unparse(value)
                found.setdefault((name, str(text)), []).append(f"{module}.{name}")
    intro = "Signatures use these names for longer types. They need not be imported: plain values of the type will do."
    items = [
        f"- {''.join(f'[](){{ #{path} }}' for path in paths)}`{name}`: `{text}`"
        for (name, text), paths in sorted(found.items(), key=lambda item: item[0][0].lower())
        if name in used and not name.startswith("_")
    ]
    return "\n".join(["# Types in signatures", "", intro, "", *items])


def alias(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """(name, type) if the statement could give a type a name."""
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias" and node.value:
        yield ast.unparse(node.target), node.value
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp | ast.Subscript):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))


def annotated(tree: ast.Module) -> set[str]:
    """The names in annotations of functions and methods without underscore."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            notes = [one.annotation for one in every] + [node.returns]
            found |= {name.id for note in notes if note for name in ast.walk(note) if isinstance(name, ast.Name)}
    return found


def command_page_of_installed() -> str:
    """`command_page` of the installed package: the folder of the sources, where MkDocs runs, has no engine."""
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"}
    )
    if done.returncode:
        raise RuntimeError(f"the page of the command needs the package installed: {done.stderr[-500:]}")
    return done.stdout


def command_page() -> str:
    """Every command of `gemma4` with its options, from the parser itself."""
    from gemma4.cli.main import make_parser

    parser = make_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    about = {one.dest: one.help for one in commands._choices_actions}
    rows = [f"| [`gemma4 {name}`](#gemma4-{name}) | {cell(about[name])} |" for name in commands.choices]
    listed = "\n".join(["| command | |", "|---|---|", *rows])
    intro = (
        "`gemma4 COMMAND --help` prints the same. A model is a Hugging Face directory, a .gguf file or the name of a "
        "shipped model. An error is one line, and the exit code 2: [Errors](../guide.md#errors)."
    )
    sections = [command_section(name, one) for name, one in commands.choices.items()]
    return "\n\n".join([f"# The command gemma4\n\n{intro}\n\n{listed}", *sections])


def command_section(name: str, parser: argparse.ArgumentParser) -> str:
    arguments = [action for action in parser._actions if not action.option_strings]
    usage = " ".join(["gemma4", name, "[options]", *map(placeholder, arguments)])
    rows = [option_row(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows.sort(key=lambda row: row.startswith("| `-"))  # arguments, then options
    table = "\n".join(["| argument | |", "|---|---|", *rows])
    about = cell(parser.description)
    return f"## gemma4 {name}\n\n{about[:1].upper()}{about[1:]}.\n\n```sh\n{usage}\n```\n\n{table}"


def placeholder(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return {"?": f"[{name}]", "+": f"{name} ...", "*": f"[{name} ...]"}.get(str(action.nargs), name)


def option_row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    names = [f"{option} {value}".strip() for option in action.option_strings] or [str(action.metavar or action.dest)]
    choices = f"one of {', '.join(map(str, action.choices))}" if action.choices else ""
    text = (action.help or "") % vars(action)
    if "default" not in text and action.default not in (None, False, 0, [], argparse.SUPPRESS):
        text += f" (default: {action.default})"
    return f"| {', '.join(f'`{one}`' for one in names)} | {cell('; '.join(filter(None, (text.strip(), choices))))} |"


def cell(text: str | None) -> str:
    """Plain text as Markdown, also inside a table."""
    return re.sub(r"([*_|<\[`\\])", r"\\\1", " ".join((text or "").split()))


# ---- the tutorials --------------------------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook_title(path: Path) -> str:
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    return first.splitlines()[0].removeprefix("# ")


def as_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    from nbconvert import MarkdownExporter

    resources = {"unique_key": path.stem, "output_files_dir": path.stem}
    body, resources = MarkdownExporter().from_filename(str(path), resources)
    return body, resources["outputs"]


# ---- links ----------------------------------------------------------------------------------------------------------


def page_of(source: str) -> str | None:
    """Where a file of the repository stands on the site: the page or, from docs/, the file; None for other sources."""
    if source in PAGES:
        return PAGES[source]
    if source == "README.md":
        return "index.md"
    path = Path(source)
    if path.parts[:1] == ("docs",):
        return str(Path(*path.parts[1:]))
    if path.parent == Path("notebooks") and path.suffix == ".ipynb":
        return f"tutorials/{path.stem}.md"
    if path.parts[:2] == ("gemma4", "pretrained") and path.name == "README.md":
        return f"models/{'.'.join(part for part in path.parts[2:-1] if part != 'dictionaries')}.md"
    return None


def relinked(text: str, source: str, page: str) -> tuple[str, set[str]]:
    """The text of the file `source` with links as of `page`, and the files of the repository to be copied for them."""
    copies: set[str] = set()

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
        if (ROOT / target).is_dir() and (ROOT / target / "README.md").is_file():
            target += "/README.md"
        if not (ROOT / target).is_file():
            return match[0]  # MkDocs says that there is no such page
        there = page_of(target)
        if there is None:
            copies.add(target)
            there = f"sources/{target}.txt"
        return os.path.relpath(there, os.path.dirname(page) or ".") + (match[2] or "")

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]  # not in code
    return "".join(parts), copies


# ---- the hook -------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of generated folders into the navigation."""
    folders = {
        "tutorials/": [{"Overview": "tutorials/index.md"}]
        + [{notebook_title(path): f"tutorials/{path.stem}.md"} for path in notebooks()],
        "reference/": [*reference_pages(), {"What calls return": RESULTS_PAGE}, {"Types in signatures": TYPES_PAGE}],
        "models/": [{card_title(source): page_of(str(source.relative_to(ROOT)))} for source in cards()]
        + [{"How they were trained": "models/training.md"}],
    }
    config.nav = [with_folders(entry, folders) for entry in config.nav or ()]
    return config


def with_folders(entry: object, folders: Mapping[str, list[object]]) -> object:
    if isinstance(entry, dict):
        return {title: with_folders(value, folders) for title, value in entry.items()}
    if isinstance(entry, list):
        return [with_folders(value, folders) for value in entry]
    return folders.get(entry, entry) if isinstance(entry, str) else entry


def cards() -> list[Path]:
    """Of the shipped models, each followed by those of its dictionaries."""
    folder = ROOT / "gemma4" / "pretrained"
    found = [*folder.glob("*/README.md"), *folder.glob("*/dictionaries/*/README.md")]
    return sorted(found, key=lambda path: path.parts)


def card_title(source: Path) -> str:
    name = source.parent.name
    return f"dictionary {name}" if "dictionaries" in source.parts else name


def markdown_sources() -> Iterator[tuple[str, str]]:
    """(file of the repository, page) of everything that is Markdown already, but not in docs/."""
    yield from PAGES.items()
    for card in cards():
        source = str(card.relative_to(ROOT))
        yield source, str(page_of(source))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    copies: set[str] = set()

    def add(page: str, content: str | bytes) -> None:
        files.append(File.generated(config, page, content=content))

    def add_page(text: str, source: str, page: str) -> None:
        text, needed = relinked(text, source, page)
        copies.update(needed)
        add(page, text)

    for file in files.documentation_pages():
        file.content_string, needed = relinked(file.content_string, f"docs/{file.src_uri}", file.src_uri)
        copies.update(needed)
    for source, page in markdown_sources():
        add_page((ROOT / source).read_text(encoding="utf-8"), source, page)
    for path in notebooks():
        body, pictures = as_markdown(path)
        source = f"notebooks/{path.name}"
        add_page(body, source, str(page_of(source)))
        for name, data in pictures.items():
            add(f"tutorials/{name}", data)
    for page, text in (
        reference_pages()
        | {COMMAND_PAGE: command_page_of_installed(), TYPES_PAGE: types_page(), RESULTS_PAGE: results_page()}
    ).items():
        add(page, text)
    for source in sorted(copies):
        add(f"sources/{source}.txt", (ROOT / source).read_bytes())
    return files


if __name__ == "__main__":
    print(command_page())
