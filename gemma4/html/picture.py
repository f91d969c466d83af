# SPDX-License-Identifier: Apache-2.0
"""Pictures of HTML: a fragment for a notebook, a page for a file. Both hold style and script, and fetch nothing."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from gemma4.files import StrPath, write_file
from gemma4.html.markup import Child, Markup, join, tag

FEW = 24  # columns of a picture that a notebook shows by itself
_COMMENT = ("//", "/*")
_HERE = Path(__file__).parent


@cache
def _asset(name: str) -> Markup:
    """The style or the script as it stands in the page: without indentation, blank lines and lines of comment."""
    lines = (line.strip() for line in (_HERE / name).read_text(encoding="utf-8").splitlines())
    return Markup("\n".join(line for line in lines if line and not line.startswith(_COMMENT)))


def _policy() -> str:
    """The page's own script and no other may run, and nothing may be fetched, whatever a token says."""
    digest = base64.b64encode(hashlib.sha256(_asset("view.js").encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


class Picture:
    """HTML that a notebook shows, and that `save` writes as a page which opens without a network.

    title: above the picture. body: what `gemma4.html`'s functions make.
    """

    def __init__(self, title: str, *body: Child) -> None:
        self.title, self.body = title, join(*body)

    def section(self, level: int = 3) -> Markup:
        """The picture without style and script, as a part of another."""
        heading = tag(f"h{level}", self.title) if self.title else None
        return tag("section", heading, self.body, class_="g4-picture")

    def fragment(self) -> str:
        """The picture with style and script, to be put into a page: what a notebook shows."""
        style, script = tag("style", _asset("view.css")), tag("script", _asset("view.js"))
        return join(style, tag("div", self.section(), class_="g4"), script)

    def _repr_html_(self) -> str:
        return self.fragment()

    def page(self) -> str:
        """A whole document."""
        head = tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", self.title or "gemma4"),
            tag("style", _asset("view.css")),
        )
        body = tag("body", tag("main", self.section(1), class_="g4"), tag("script", _asset("view.js")))
        return f"<!doctype html>\n{tag('html', head, body, lang='en', class_='g4-page')}\n"

    def save(self, path: StrPath, *, force: bool = False) -> Path:
        """Write the page, complete or not at all. Returns the path.

        Raises FileExistsError unless force, OSError, and else what `gemma4.files.write_file` raises.
        """
        write_file(path, self.page().encode(), force=force)
        return Path(path)

    def __repr__(self) -> str:
        return f"Picture({self.title!r:.80}, {len(self.body):,} characters of HTML)"


def together(title: str, *parts: Picture | Child) -> Picture:
    """Several pictures, and text or markup between them, as one."""
    return Picture(title, *(part.section() if isinstance(part, Picture) else part for part in parts))


def note(text: str | None) -> Markup | None:
    """A line of small print."""
    return tag("p", text, class_="g4-note") if text else None


def left_out(shown: int, n: int, what: str, how: str = "to_html()") -> str | None:
    """Small print for a picture that shows the last columns alone, and how to see the others."""
    return None if shown == n else f"The last {shown} of {n} {what}; {how} shows all."
