# SPDX-License-Identifier: Apache-2.0
"""The `gemma4 harvest` command."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from gemma4.cli.media import add_image_tokens
from gemma4.cli.terminal import console, emit, say, shown
from gemma4.interp.saved import SavedDtype
from gemma4.units import count

if TYPE_CHECKING:
    from gemma4.harvest import Progress
    from gemma4.model import Model

_LINE_EVERY_S = 30.0  # of progress where there is no terminal
_DRAW_EVERY_S = 0.1  # while a corpus is read, which has many short documents


def add_harvest(parser: argparse.ArgumentParser) -> None:
    text = ".jsonl, .txt, .parquet, .arrow, pictures, recordings, or folders of them"
    parser.add_argument("--corpus", nargs="+", required=True, type=Path, metavar="FILE", help=text)
    text = 'names, globs and braces, such as "blocks.{5,12}.hook_resid_post"'
    parser.add_argument("--sites", nargs="+", default=[], metavar="SITE", help=text)
    text = "the dataset's folder: new, or one that this command began"
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=text)
    parser.add_argument("--dtype", choices=get_args(SavedDtype), default="bf16", help="default: %(default)s")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a sequence at most (default: 1024)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="end the corpus there")
    parser.add_argument("--key", help="field or column of the content (default: text, messages, tokens or input_ids)")
    text = "documents of .txt files (default: %(default)s)"
    parser.add_argument("--sample-by", choices=("line", "paragraph", "document"), default="line", help=text)
    add_image_tokens(parser)
    parser.add_argument("--skip-damaged", action="store_true", help="leave out documents that cannot be read")
    text = "encode on the fly with this dictionary, and store sparse features (repeatable)"
    parser.add_argument("--sae", action="append", default=[], metavar="PATH[=SITE]", help=text)
    parser.add_argument("--top-k", type=int, metavar="K", help="the strongest features of each token (default: all)")
    text = "edits of the model, as gemma4.edits.save_edits writes them: the activations are those of the edited model"
    parser.add_argument("--edits", type=Path, metavar="FILE", help=text)
    text = "about the tokens of a shard, the work that an end loses (default: %(default)s)"
    parser.add_argument("--shard-tokens", type=int, default=1 << 14, metavar="N", help=text)
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share --threads (default: 1)"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="for job arrays: part I of 0..N-1")


def _part(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
        raise argparse.ArgumentTypeError(f"expected I/N, such as 0/16, got {text!r:.40}")
    return int(number), int(of)


def run_harvest(model: Model, args: argparse.Namespace) -> None:
    from gemma4 import harvest

    names = ("out", "dtype", "context", "max_tokens", "key", "sample_by", "image_tokens", "skip_damaged", "top_k")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {name: getattr(args, name) for name in ("shard_tokens", "workers", "engine", "part")}
    try:
        with _Shown(console(stderr=True)) as shown_progress:
            done = harvest.harvest(
                model,
                args.corpus,
                args.sites,
                sae=[_dictionary(text) for text in args.sae],
                edits=() if args.edits is None else args.edits,
                progress=shown_progress.progress,
                scanning=shown_progress.scanning,
                **options,
            )
    except (ValueError, KeyError, ImportError):  # of the request itself
        raise
    except BaseException:
        if (args.out / "shards").is_dir():
            say("finished shards are kept: the same command resumes")
        raise
    rate = f", {done.tokens / done.seconds:,.0f} tokens/s" if done.seconds else ""
    kept = f" and {done.kept} that were there" if done.kept else ""
    say(f"{done.made} shards made{kept}, of {done.n_shards}; {done.tokens:,} tokens in {done.seconds:.1f} s{rate}")
    if not done.n_shards:
        say("the corpus holds no documents: the dataset is empty")
    if not done.complete:
        say("the dataset is not complete: other parts are missing")
    emit(str(done.path))


def _dictionary(text: str) -> tuple[str, str | None]:
    """PATH or PATH=SITE; a path that exists is taken as it is."""
    path, equals, site = text.rpartition("=")
    return (path, site) if equals and not Path(text).exists() else (text, None)


class _Shown:
    """Progress on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, out: Console) -> None:
        self._live = sys.stderr.isatty()
        columns = ("[progress.description]{task.description}", "{task.fields[facts]}")
        self._bars = Bars(
            TextColumn(columns[0]),
            BarColumn(),
            TextColumn(columns[1]),
            console=out,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bars.add_task("reading", total=None, facts="")
        self._last, self._drawn = time.monotonic(), -_DRAW_EVERY_S

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def scanning(self, weight: int, name: str) -> None:
        if time.monotonic() - self._drawn < _DRAW_EVERY_S:
            return
        self._drawn = time.monotonic()
        self._bars.update(self._task, facts=escape(shown(f"{name:.40} {count(weight)}B")))

    def progress(self, now: Progress) -> None:
        facts = f"{now.shards}/{now.n_shards} shards  {count(now.tokens)} tokens  {now.rate:,.0f}/s  {_left(now.eta)}"
        self._bars.update(self._task, description="harvest", completed=now.tokens, total=now.total, facts=facts)
        if not self._live and time.monotonic() - self._last > _LINE_EVERY_S:
            self._last = time.monotonic()
            say(facts)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} left"
