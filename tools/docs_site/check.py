# SPDX-License-Identifier: Apache-2.0
"""Check the built site: links inside it lead somewhere, nothing comes from a network, every public name has an entry.

    python tools/docs_site/check.py [build/site]     prints what is wrong; exit status 1 if anything

MkDocs in strict mode checks Markdown links alone. This reads the HTML: also links of templates, docstrings, notebooks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pages

FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
NOT_FETCHED = ("canonical", "next", "prev", "alternate")  # of <link rel=…>


class Page(HTMLParser):
    """The ids and links of one page. fetched: what a browser loads without a click."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if values.get(FETCHED.get(tag, "")) and values.get("rel") not in NOT_FETCHED:
            self.fetched.add(values[FETCHED[tag]])


def is_elsewhere(target: str) -> bool:
    return target.startswith(("http:", "https:", "//", "mailto:", "data:", "javascript:"))


def faults(site: Path) -> Iterator[str]:
    read = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not read:
        yield f"{site}: no page there"
    for path, page in read.items():
        if path.name == "404.html":  # its links are those of a server's root
            continue
        where = path.relative_to(site)
        for target in sorted(page.fetched):
            if target.startswith(("http:", "https:", "//")):
                yield f"{where}: fetches {target}: the site must open without a network"
        for target in sorted(page.links | page.fetched):
            if not is_elsewhere(target):
                yield from (f"{where}: {fault}" for fault in link_faults(path, target, read))
    yield from missing_entries(read, site)


def link_faults(path: Path, target: str, read: dict[Path, Page]) -> Iterator[str]:
    file, anchor = urldefrag(target)
    there = (path.parent / unquote(file)).resolve() if file else path
    if not there.is_file():
        yield f"links to {target}, which does not exist"
    elif anchor and there in read and unquote(anchor) not in read[there].ids:
        yield f"links to {target}: no such anchor"


def missing_entries(read: dict[Path, Page], site: Path) -> Iterator[str]:
    for module in pages.public_modules():
        page = read.get(site / "reference" / f"{module}.html")
        for name in pages.public_names(module):
            names = {f"{module}.{name}", f"{module}.model.{name}"}
            if not page or not names & page.ids:
                yield f"reference/{module}.html: no entry for {name}"


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else pages.ROOT / "build" / "site").resolve()
    found = list(faults(site))
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
