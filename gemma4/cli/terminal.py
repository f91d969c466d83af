# SPDX-License-Identifier: Apache-2.0
"""Output of the command: to stdout, stderr or a terminal.

Model output, file names, templates and tensor names are untrusted, and terminals execute control characters. So on a
terminal they are escaped ("\\x1b"), never sent; a pipe or a file gets the raw text. Characters that a stream's
encoding lacks are written as escapes, too, instead of ending the work.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from gemma4.files import read_limited

# C0 without newline and tab, DEL, C1; characters that change the direction of writing; lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_TEXT = 16 << 20  # bytes of a text file: 4 million tokens
_SURROGATE = re.compile("[\ud800-\udfff]")


def shown(text: str) -> str:
    """The text with control characters as escapes ("\\x1b", "\\r", "\\u202e"); newlines and tabs stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def emit(text: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print to stdout (or `stream`), at once."""
    out = stream or sys.stdout
    print(shown(text) if out.isatty() else text, end=end, file=out, flush=True)


def typed(text: str) -> str:
    """A text argument (not a path): UTF-8 also in an ASCII-only locale."""
    try:
        return os.fsencode(text).decode("utf-8") if _SURROGATE.search(text) else text
    except UnicodeError:
        return text


def text_of(name: str) -> str:
    """A text file, which may be anything, or "-", standard input. Raises ValueError (no regular file, too large, not
    UTF-8), OSError."""
    if name == "-":
        return sys.stdin.read()
    try:
        return "" if name == os.devnull else read_limited(name, _MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from None


def say(text: str) -> None:
    """Print a line for the user on stderr."""
    emit(f"gemma4: {text}", stream=sys.stderr)


def status(text: str) -> None:
    """Print a line on stderr that the next one replaces, "" to remove it; only on a terminal."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + shown(text), end="", file=sys.stderr, flush=True)


def console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Styled output. When piped it is wide enough that tables do not wrap."""
    stream = sys.stderr if stderr else sys.stdout
    made = Console(file=stream, width=None if stream.isatty() else 120, highlight=False, soft_wrap=soft_wrap)
    if made.is_terminal:
        made.push_render_hook(_ShowControls())
    return made


def styled(text: str, console: Console, style: str = "") -> Text:
    """Text for a console of `console()`, with control characters escaped."""
    return Text(shown(text) if console.is_terminal else text, style=style)


class _ShowControls(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


class _Shown:
    """A renderable whose text is escaped as by `shown`; the console's own control codes pass."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._renderable)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Standard streams that never fail on a character, and warnings as one line each, while the command runs."""
    with _closed_streams_replaced(), _streams_that_never_fail():
        yield


@contextlib.contextmanager
def _closed_streams_replaced() -> Iterator[None]:
    """Python has None for a standard stream that the caller closed: input is empty then, messages go nowhere."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    with contextlib.ExitStack() as stack:
        for name in closed:
            setattr(sys, name, stack.enter_context(open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")))
        if "stdout" in closed:
            say("standard output is closed: nothing is printed")
        try:
            yield
        finally:
            for name in closed:
                setattr(sys, name, None)


@contextlib.contextmanager
def _streams_that_never_fail() -> Iterator[None]:
    before = [(stream, stream.errors) for stream in _text_streams(sys.stdout, sys.stderr)]
    for stream, errors in before:
        if errors in ("strict", "surrogateescape"):  # the latter where the locale is C
            stream.reconfigure(errors="backslashreplace")
    for stream in _text_streams(sys.stdin):
        if stream.encoding.lower().replace("-", "") in ("ascii", "usascii", "ansi_x3.41968", "646"):
            stream.reconfigure(encoding="utf-8")  # a terminal sends UTF-8 whatever the locale is

    def show(message: Warning | str, *_: object) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        for stream, errors in before:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def _text_streams(*streams: object) -> list[TextIOWrapper]:
    return [stream for stream in streams if isinstance(stream, TextIOWrapper)]  # not streams replaced by a test
