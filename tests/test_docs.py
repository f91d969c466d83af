# SPDX-License-Identifier: Apache-2.0
"""The documentation: every public name has an entry, links lead somewhere, what it imports exists and is public."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_dictionaries import saelens

import gemma4

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "docs_site"))
import check  # noqa: E402
import pages  # noqa: E402

FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)
CODE = re.compile(rf"{FENCED.pattern}|`[^`\n]+`", FENCED.flags)
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / source for source in ("README.md", *pages.PAGES)),
    *pages.cards(),
]
NOTEBOOKS = pages.notebooks()


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


# ---- the reference --------------------------------------------------------------------------------------------------


def test_every_public_name_has_an_entry():
    reference = pages.reference_pages()
    for module in pages.public_modules():
        text = reference[f"reference/{module}.md"]
        for name in pages.public_names(module):
            entry = rf"^::: {module}(\.model)?\.{name}$|<a id=\"{module}\.{name}\">"
            assert re.search(entry, text, re.M), f"{module}.{name} has no entry"


def test_the_reference_reads_the_sources_as_python_does():
    """pages.py imports nothing; what it finds is what an import finds."""
    assert "gemma4" in pages.public_modules() and "gemma4.edits" in pages.public_modules()
    for module in pages.public_modules():
        imported = importlib.import_module(module)
        names = pages.public_names(module)
        assert names
        assert set(names) >= set(getattr(imported, "__all__", ()))
        assert all(hasattr(imported, name) for name in names)


def test_names_that_have_their_entry_elsewhere_are_linked():
    page = pages.reference_pages()["reference/gemma4.md"]
    assert "(gemma4.dictionaries.md#gemma4.dictionaries.SAE)" in page and "::: gemma4.SAE\n" not in page
    assert "::: gemma4.model.load\n" in page  # gemma4.load is also a package


def imports(code: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that the code imports from this package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gemma4":
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gemma4."):
                    yield alias.name, "*"


def taught() -> Iterator[tuple[str, str, str]]:
    for path in DOCUMENTS:
        for language, code in FENCED.findall(path.read_text(encoding="utf-8")):
            if language == "python":  # line by line: some blocks are schemes, not programs
                lines = re.findall(r"^ *((?:from|import) gemma4.*)", code, re.M)
                yield from ((path.name, *found) for found in imports("\n".join(lines)))
    for path in NOTEBOOKS:
        code = "\n".join(re.sub(r"^[%!].*$", "", cell, flags=re.M) for cell in cells(path, "code"))
        yield from ((path.name, *found) for found in imports(code))


def test_what_the_documents_import_is_in_the_reference():
    modules = pages.public_modules()
    found = sorted(set(taught()))
    assert len(found) > 20
    for path, module, name in found:
        known = pages.public_names(module) if module in modules else []
        as_module = name != "*" and f"{module}.{name}" in modules
        from_module = module == "gemma4.interp.lens"  # the module of `gemma4.interp.logit_lens`
        assert name in known or as_module or from_module or (name == "*" and known), (
            f"{path} imports {name} from {module}: add the module to MODULES in tools/docs_site/pages.py, "
            "or the name to its __all__"
        )


# ---- links, as on a forge -------------------------------------------------------------------------------------------


def slugs(path: Path) -> set[str]:
    """Anchors of headings as forges make them."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    plain = (re.sub(r"[`*]|\]\([^)]*\)", "", title).lower() for title in re.findall(r"^#+ +(.+?) *$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def link_faults(source: Path, text: str) -> Iterator[str]:
    for match in pages.LINK.finditer(CODE.sub("", text)):
        target = (source.parent / match[1]).resolve()
        if not target.exists():
            yield f"{source.name}: no {match[1]}"
        elif target.is_dir() and not (target / "README.md").is_file() and source != ROOT / "README.md":
            yield f"{source.name}: {match[1]} is a folder, for which the site has no page"
        elif match[2] and target.suffix == ".md" and match[2][1:] not in slugs(target):
            yield f"{source.name}: no {match[2]} in {match[1]}"


def test_links_between_files_lead_somewhere():
    faults = [fault for path in DOCUMENTS for fault in link_faults(path, path.read_text(encoding="utf-8"))]
    faults += [fault for path in NOTEBOOKS for cell in cells(path, "markdown") for fault in link_faults(path, cell)]
    assert not faults
    text = "[a](guide.md#tokens-and-logits) [b](nowhere.md) [c](guide.md#nothing) `[d](x.md)` [e](../csrc)"
    assert len(list(link_faults(ROOT / "docs" / "sites.md", text))) == 3


def test_links_of_the_site_lead_to_its_pages():
    text = (
        "[a](../notebooks/01-first-look.ipynb) [b](../CONTRIBUTING.md#test) [c](../csrc/base/tensor.h) [d](sites.md)\n"
        "```python\nx[a](../README.md)\n```\n[e](../gemma4/pretrained/tiny-e) [f](https://example.org/a.md) [g](#x)\n"
    )
    after, copies = pages.relinked(text, "docs/guide.md", "guide.md")
    assert re.findall(r"\]\(([^)]*)\)", after) == [
        "tutorials/01-first-look.md",
        "contributing.md#test",
        "sources/csrc/base/tensor.h.txt",
        "sites.md",
        "../README.md",
        "models/tiny-e.md",
        "https://example.org/a.md",
        "#x",
    ]
    assert copies == {"csrc/base/tensor.h"}
    assert (
        "../guide.md" in pages.relinked("[a](../docs/guide.md)", "notebooks/01-first-look.ipynb", "tutorials/x.md")[0]
    )


# ---- the built site -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with one page and an empty reference."""
    page = '<a href="#here">a</a><h1 id="here"></h1><img src="a.png"><a href="https://example.org">b</a>'
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    (tmp_path / "a.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("", None),
        ('<a href="b.html">x</a>', "index.html: links to b.html, which does not exist"),
        ('<a href="index.html#there">x</a>', "index.html: links to index.html#there: no such anchor"),
        ('<img src="b%20c.png">', "index.html: links to b%20c.png, which does not exist"),
        (
            '<script src="https://example.org/x.js"></script>',
            "index.html: fetches https://example.org/x.js: the site must open without a network",
        ),
        ('<link rel="canonical" href="https://example.org/">', None),
    ],
)
def test_check_of_the_site(site, monkeypatch, more, fault):
    monkeypatch.setattr(pages, "public_modules", lambda: [])
    with (site / "index.html").open("a", encoding="utf-8") as file:
        file.write(more)
    assert list(check.faults(site)) == ([fault] if fault else [])


def test_check_of_the_site_misses_no_name(site):
    found = list(check.faults(site))
    assert "reference/gemma4.html: no entry for load" in found
    assert len(found) >= len(gemma4.__all__)
    assert next(check.faults(site / "nothing")).endswith("no page there")

    names = pages.public_names("gemma4.edits")
    (site / "reference").mkdir()
    entries = "".join(f'<h2 id="gemma4.edits.{name}"></h2>' for name in names if name != "Steer")
    (site / "reference" / "gemma4.edits.html").write_text(entries, encoding="utf-8")
    missing = [fault for fault in check.faults(site) if "gemma4.edits.html" in fault]
    assert missing == ["reference/gemma4.edits.html: no entry for Steer"]


def test_docstrings_become_lists():
    pytest.importorskip("griffe", reason="needs the extra docs")
    from docstrings import as_markdown

    text = (
        "What it does.\n\n    names   which: a glob,\n            or a list\n    pos     all\n\nRaises ValueError: no."
    )
    assert as_markdown(text) == (
        "What it does.\n\n- `names` – which: a glob,\n  or a list\n- `pos` – all\n\nRaises ValueError: no."
    )
    assert as_markdown("ids, x: int32 [pos]\nand so on") == "- `ids`, `x` – int32 [pos]\n  and so on"
    assert as_markdown("    site  where\n          head  is text here") == "- `site` – where\n  head  is text here"
    text = (
        "x: of each\nlayer. target: what to\nrebuild; n: how many. Raises ValueError (no\nlayer), and what\n`y` raises."
    )
    assert as_markdown(text) == (
        "- `x` – of each\n  layer.\n- `target` – what to\n  rebuild\n- `n` – how many.\n\n"
        "Raises ValueError (no\nlayer), and what\n`y` raises."
    )
    assert as_markdown("x: an array\nRaises TypeError.") == "- `x` – an array\n\nRaises TypeError."


def test_signs_in_docstrings_stay_signs():
    pytest.importorskip("griffe", reason="needs the extra docs")
    from docstrings import as_markdown

    assert as_markdown("bos: id of <bos>, in T*S*D `<x>*`") == "- `bos` – id of &lt;bos>, in T\\*S\\*D `<x>*`"


def test_code_in_docstrings_becomes_python():
    pytest.importorskip("griffe", reason="needs the extra docs")
    from docstrings import as_markdown

    text = "Does it.\n\n    with model.edit(x):\n        run()\n\n    stop()\n\nSee docs/guide.md, and (docs/sites.md)."
    assert as_markdown(text) == (
        "Does it.\n\n```python\nwith model.edit(x):\n    run()\n\nstop()\n```\n\n"
        "See [the guide](../guide.md), and ([the table of sites](../sites.md))."
    )


# ---- the command, the tutorials, the cards --------------------------------------------------------------------------


def test_the_page_of_the_command_has_every_option():
    text = pages.command_page()
    assert pages.command_page_of_installed().strip() == text.strip()
    sections = dict(zip(*[iter(re.split(r"^## gemma4 (\w+)$", text, flags=re.M)[1:])] * 2, strict=True))
    options = re.findall(r"^\| `(--[\w-]+)", sections["features"], re.M)
    assert {"--feature", "--search", "--html", "--sae", "--model", "--force"} <= set(options)
    assert "gemma4 generate [options] prompt\n" in sections["generate"]
    assert "gemma4 demo [options] [prompt]\n" in sections["demo"]
    assert "one of density, max, index" in sections["features"] and "| default: max; one of" in sections["features"]
    for name, section in sections.items():
        assert f"](#gemma4-{name})" in text
        rows = re.findall(r"^\| `.*", section, re.M)
        assert rows and not [row for row in rows if re.search(r"\|\s+\|$", row)], (
            f"gemma4 {name}: an option without help"
        )


def test_types_and_results_of_the_reference_exist():
    for path in pages.RESULTS:
        module, name = path.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), name), path
    text = pages.types_page()
    assert re.search(r"^- (\[\]\(\)\{ #[\w.]+ \})+`Where`: `int \| slice \| Iterable\[int\] \| None`$", text, re.M)
    assert "{ #gemma4.interp.cache.F32 }" in text and "`StrPath`" in text
    for module, names in pages.FIRST.items():
        assert set(names) <= set(pages.public_names(module))
    known = {name for module in pages.public_modules() for name in pages.public_names(module)}
    known |= {path.rsplit(".", 1)[1] for path in pages.RESULTS}
    assert {*pages.MADE_ELSEWHERE, *pages.EDITS} <= known


def test_the_list_of_tutorials_is_complete():
    listed = re.findall(r"\]\(([\w-]+\.ipynb)\)", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"))
    assert listed == [path.name for path in NOTEBOOKS]


def test_cards_of_dictionaries_follow_their_models():
    found = [pages.page_of(str(path.relative_to(ROOT))) for path in pages.cards()]
    assert found[:2] == ["models/tiny-e.md", "models/tiny-e.blocks.4.hook_resid_post.md"]
    assert [pages.card_title(path) for path in pages.cards()][:2] == ["tiny-e", "dictionary blocks.4.hook_resid_post"]
    assert len(found) == 2 + len(gemma4.dictionaries.shipped_dictionaries())


# ---- the same ten steps in each tool --------------------------------------------------------------------------------


def steps() -> list[list[str]]:
    """The code blocks of each step, their first line is a comment that names the tool."""
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    sections = re.split(r"^## \d+\. ", text, flags=re.M)[1:]
    return [[code for language, code in FENCED.findall(section) if language == "python"] for section in sections]


def edits_in_sentences(names: dict[str, Any]) -> list[Any]:
    """The edits that the page's sentences name in passing, made."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    return [eval(code, names) for code in re.findall(r"`(Steer\(.*?\))`", text)]


def test_the_ten_steps_run(tmp_path, monkeypatch):
    """Our code of every step, in one namespace, with a small SAE where the page has one; and what it says comes out."""
    found = steps()
    assert len(found) == 10
    assert [len([code for code in step if code.startswith("# gemma4\n")]) for step in found] == [1] * 10
    assert all(len(step) >= 2 for step in found)  # beside another tool's
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((512, 128), np.float32)
    weights = {"W_enc": wide.T.copy(), "W_dec": wide, "b_enc": np.full(512, -20, np.float32), "b_dec": np.zeros(128)}
    site = {"hook_name": "blocks.3.hook_resid_post"}
    saelens(tmp_path / "my-sae", {k: v.astype(np.float32) for k, v in weights.items()}, metadata=site)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for step in found:
        exec(compile(step[0], "docs/coming-from.md", "exec"), names)
    limited = edits_in_sentences(names)
    assert [(edit.pos, edit.steps) for edit in limited] == [(-1, None), (None, (1, 2, 3))]
    options = {"max_tokens": 5, "temperature": 0, "capture": "blocks.6.hook_resid_post"}
    last, answer = (
        names["model"].generate(names["start"], hooks=[edit], **options).cache["resid_post", 6] for edit in limited
    )
    story, n = names["story"], names["answer"].prompt_tokens
    assert np.array_equal(answer[:n], story[:n]) and (answer[n] != story[n]).any()
    assert np.array_equal(last[: n - 1], story[: n - 1]) and (last[n - 1] != story[n - 1]).any()
    mary, john = names["model"].to_single_token(" Mary"), names["model"].to_single_token(" John")
    assert names["pieces"][0] == "<bos>" and names["pieces"][10] == " John"  # the giver, at position 10
    assert names["logits"].shape == (15, names["model"].d_vocab) and names["resid"].shape == (15, 128)
    assert names["patched"].argmax() == mary
    assert names["model"].forward(names["other"], logits="last")[0].argmax() == john
    assert np.abs(names["ablated"] - names["logits"][-1]).max() > 0.1
    greedy = names["model"].generate(names["start"], max_tokens=5, temperature=0, hooks=[names["steer"]]).text
    assert greedy != names["answer"].text and names["steered"].tokens.size > 0
    assert len(names["guesses"]) == 11 and names["guesses"][-1] == " Mary" and names["guesses"][0] != " Mary"
    _, cache = names["model"].run_with_cache(names["prompt"], ["ln_final.hook_scale", "hook_logits_raw"])
    raw = cache["hook_logits_raw"][-1]
    np.testing.assert_allclose(names["whole"], raw[mary] - raw[john], rtol=1e-4)
    assert names["strongest"][0][0] == "9_head_0"
    assert len(names["fired"]) == len(names["values"]) > 0 and names["rebuilt"].shape == (15, 128)
    assert names["story"].shape == (names["answer"].prompt_tokens + 4, 128)
