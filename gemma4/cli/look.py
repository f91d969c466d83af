# SPDX-License-Identifier: Apache-2.0
"""`gemma4 lens` and `gemma4 attribute`: prompts in, a table in the terminal, HTML and PNG files out."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma4.cli.terminal import console, say, status, styled, text_of, typed
from gemma4.errors import CapacityError, FormatError
from gemma4.files import check_output, write_file
from gemma4.html import Picture
from gemma4.html.markup import Child, tag, visible
from gemma4.html.picture import left_out, note
from gemma4.narrow import is_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gemma4.interp.attribution import LogitAttribution
    from gemma4.interp.lens import LogitLens
    from gemma4.model import Model

_PANELS = 16  # of a PNG
_LAST = 24  # positions, unless --last says another number: each costs a pass of the head for every layer
_CELL, _BAR = 12, 24  # characters of the widest cell and of the longest bar
_FIELDS = ("text", "prompt")  # of a line of JSON


# ---- options ---------------------------------------------------------------------------------------------------------


def add_lens(parser: argparse.ArgumentParser) -> None:
    _add_prompts(parser)
    parser.add_argument("--top-k", type=int, default=5, help="tokens kept for each cell (default: %(default)s)")
    parser.add_argument("--target", metavar="TOKEN", help="also the probability of this token")
    text = "positions at the end of the prompt, 0 = all (default: %(default)s)"
    parser.add_argument("--last", type=int, default=_LAST, metavar="N", help=text)
    _add_outputs(parser)


def add_attribute(parser: argparse.ArgumentParser) -> None:
    _add_prompts(parser)
    text = "the token whose logit is explained (default: the one that the model predicts)"
    parser.add_argument("--target", metavar="TOKEN", help=text)
    parser.add_argument("--against", metavar="TOKEN", help="subtract this token's logit")
    parser.add_argument("--per-head", action="store_true", help="attention by head, experts one by one")
    text = "components in the terminal and the PNG, the largest first (default: %(default)s)"
    parser.add_argument("--top", type=int, default=20, metavar="N", help=text)
    text = "the position that predicts, negative ones from the end (default: the last)"
    parser.add_argument("--pos", type=int, default=-1, metavar="N", help=text)
    _add_outputs(parser)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help='text; "-" reads it from standard input')
    text = 'instead of one: a prompt on each line, or .jsonl with "text" or "prompt" in each object'
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    parser.add_argument("--chat", action="store_true", help="put prompts through the chat template as a user turn")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that opens without a network")
    parser.add_argument("--png", type=Path, metavar="FILE", help='write a picture (pip install "gemma4[plot]")')
    parser.add_argument("--force", action="store_true", help="replace files that exist")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The texts that the arguments name. Raises ValueError (none, or two sources), FormatError, OSError."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give a prompt, or --prompts FILE: one of the two")
    if args.prompts is None:
        return [text_of("-") if args.prompt == "-" else typed(args.prompt)]
    found = list(_lines(args.prompts))
    if not found:
        raise ValueError(f"{args.prompts} holds no prompt")
    return found


def _lines(path: Path) -> Iterator[str]:
    of_json = path.suffix in (".jsonl", ".ndjson")
    for at, line in enumerate(text_of(str(path)).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield _json_prompt(line, f"{path}, line {at}") if of_json else line


def _json_prompt(line: str, where: str) -> str:
    try:
        row: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON: {str(error)[:120]}") from None
    texts = [row[name] for name in _FIELDS if name in row] if is_dict(row) else [row]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise FormatError(f'{where}: expected an object with "text" or "prompt", or a string; got {line:.60}')
    return texts[0]


# ---- the commands ----------------------------------------------------------------------------------------------------


def run_lens(load: Callable[[], Model], args: argparse.Namespace) -> None:
    """Print the logit lens of each prompt: the likeliest next token after each block, at the last positions."""
    if args.last < 0:
        raise ValueError(f"--last {args.last}: expected a number of positions, 0 for all")
    prompts = prompts_of(args)
    _check_outputs(args, prompts)
    from gemma4.interp.lens import LENS_SITES, logit_lens

    model, out, done = load(), console(), _Done(args)
    target, every = _token(model, args.target), _all_ids(model, prompts, args)
    for text, ids in zip(_told(prompts), every, strict=True):
        kept = slice(-args.last, None) if args.last else None
        cache = model.run_with_cache(ids, LENS_SITES, pos=kept, logits=None)[1]
        lens = logit_lens(model, cache, top_k=args.top_k, target=target)
        _print_prompt(out, text, len(prompts))
        table, n_shown = _lens_table(lens, out)
        out.print(table)
        if n_shown < len(ids):
            more = "--last 0" if n_shown == len(lens.prompt) else "--html FILE, or a wider terminal,"
            out.print(styled(f"the last {n_shown} of {len(ids)} positions; {more} shows more", out, "dim"))
        done.add(text, lens, lens.to_html(), left_out(len(lens.prompt), len(ids), "positions", "--last 0"))
    done.write(f"Logit lens of {model.checkpoint.path.name}", model)


def run_attribute(load: Callable[[], Model], args: argparse.Namespace) -> None:
    """Print what each component adds to the logit of the predicted token, for each prompt."""
    if args.top < 1:
        raise ValueError(f"--top {args.top}: expected at least 1 component")
    prompts = prompts_of(args)
    _check_outputs(args, prompts)
    from gemma4.interp.attribution import dla

    model, out, done = load(), console(), _Done(args)
    target, against = (_token(model, token) for token in (args.target, args.against))
    every = _all_ids(model, prompts, args)
    for text, ids in zip(prompts, every, strict=True):
        _check_position(text, len(ids), args.pos)
    for text, ids in zip(_told(prompts), every, strict=True):
        of = target if against is None else (_predicted(model, ids, args.pos) if target is None else target, against)
        found = dla(model, ids, of, pos=args.pos, per_head=args.per_head, per_expert=args.per_head)
        _print_prompt(out, text, len(prompts))
        out.print(styled(f"{found.title}, at {visible(found.prompt[-1])}", out))
        out.print(_attribution_table(found, args.top))
        done.add(text, found, found.to_html())
    done.write(f"Logit attribution of {model.checkpoint.path.name}", model)


def _all_ids(model: Model, prompts: Sequence[str], args: argparse.Namespace) -> list[NDArray[np.int32]]:
    """Token ids of every prompt. Raises CapacityError before the first one runs, with the prompt that is too long."""
    every = [_ids(model, text, args) for text in prompts]
    for text, ids in zip(prompts, every, strict=True):
        if len(ids) > model.context_length:
            raise CapacityError(
                f"the prompt {text!r:.60} has {len(ids)} tokens; the model's context is {model.context_length}"
            )
    return every


def _ids(model: Model, text: str, args: argparse.Namespace) -> NDArray[np.int32]:
    return model.to_prompt([{"role": "user", "content": text}]).ids if args.chat else model.to_tokens(text)


def _check_position(text: str, n_tokens: int, pos: int) -> None:
    if not -n_tokens <= pos < n_tokens:
        raise ValueError(f"--pos {pos}: the prompt {text!r:.60} has {n_tokens} tokens, 0 to {n_tokens - 1}")


def _token(model: Model, text: str | None) -> int | None:
    return None if text is None else model.to_single_token(typed(text))


def _predicted(model: Model, ids: NDArray[np.int32], pos: int) -> int:
    return int(model.forward(ids, logits=pos)[0].argmax())


def _told(prompts: Sequence[str]) -> Iterator[str]:
    """The prompts, with a line of progress."""
    for at, text in enumerate(prompts):
        if len(prompts) > 1:
            status(f"prompt {at + 1} of {len(prompts)}")
        yield text
        status("")


# ---- tables ----------------------------------------------------------------------------------------------------------


def _print_prompt(out: Console, text: str, n_prompts: int) -> None:
    if n_prompts > 1:
        out.print(styled(f"\n{text}", out, "bold"))


def _lens_table(lens: LogitLens, out: Console) -> tuple[Table, int]:
    """As many of the last positions as fit beside each other, and their number."""
    tokens = [visible(token) for token in lens.prompt]
    cells = [[visible(best[0]) for best in layer] for layer in lens.tokens]
    columns = list(zip(tokens, *cells, strict=True))
    widths = [min(_CELL, max(map(cell_len, column))) + 2 for column in columns]
    room, first = out.width - (20 if lens.target_probs is None else 28), len(columns) - 1
    while first > 0 and sum(widths[first - 1 :]) <= room:
        first -= 1
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("block", no_wrap=True, min_width=5)
    for name, width in list(zip(tokens, widths, strict=True))[first:]:
        table.add_column(Text(name), no_wrap=True, overflow="ellipsis", width=width - 2)
    for name in ("p", *(["target"] if lens.target_probs is not None else [])):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(5, len(name)))
    for row in range(len(lens.labels) - 1, -1, -1):
        best = lens.probs[row, :, 0].tolist()
        words = [Text(word, style=_strength(p)) for word, p in zip(cells[row], best, strict=True)]
        goal = [] if lens.target_probs is None else [f"{lens.target_probs[row, -1]:.3f}"]
        table.add_row(lens.labels[row], *words[first:], f"{best[-1]:.3f}", *goal)
    return table, len(columns) - first


def _strength(p: float) -> str:
    return "bold green" if p > 0.5 else "" if p > 0.1 else "dim"


def _attribution_table(found: LogitAttribution, top: int) -> Table:
    """The largest contributions, the sum of the rest, and the sum of all."""
    values = found.values[:, -1]
    order: list[int] = np.argsort(-np.abs(values), kind="stable").tolist()
    scale = float(np.abs(values).max(initial=0)) or 1.0
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("component", no_wrap=True)
    table.add_column("logit", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for at in order[:top]:
        value = float(values[at])
        bar = Text("\u2588" * max(1, round(_BAR * abs(value) / scale)), "blue" if value >= 0 else "yellow")
        table.add_row(found.labels[at], f"{value:+.3f}", bar)
    if len(order) > top:
        table.add_row(f"{len(order) - top} others", f"{values[order[top:]].sum():+.3f}", "", style="dim")
    table.add_row("sum", f"{found.logits[-1]:+.3f}", "", style="bold")
    return table


# ---- files -----------------------------------------------------------------------------------------------------------


def _check_outputs(args: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Raise before the work what could go wrong with the files."""
    named = [path for path in (args.html, args.png) if path is not None]
    inputs = [] if args.prompts is None else [args.prompts]
    for path in named:
        check_output(path, force=args.force, inputs=inputs, devices=True)
    if len(named) == 2 and named[0].absolute() == named[1].absolute():
        raise ValueError(f"--html and --png both name {named[0]}")
    if args.png is not None:
        if len(prompts) > _PANELS:
            raise ValueError(f"a PNG shows at most {_PANELS} prompts, {args.prompts} has {len(prompts)}: use --html")
        from gemma4.interp.media_plots import pyplot

        pyplot()


class _Done:
    """Results so far, as far as a file needs them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._sections: list[Child] = []
        self._results: list[LogitLens | LogitAttribution] = []

    def add(self, prompt: str, found: LogitLens | LogitAttribution, picture: Picture, few: str | None = None) -> None:
        if self._args.html is not None:
            self._sections += [tag("p", prompt, class_="g4-text"), note(few), picture.section()]
        if self._args.png is not None:
            self._results.append(found)

    def write(self, title: str, model: Model) -> None:
        args = self._args
        inputs = [*model.checkpoint.inputs, *([] if args.prompts is None else [args.prompts])]
        if args.html is not None:
            page = Picture(title, self._sections).page()
            write_file(args.html, page.encode(), force=args.force, inputs=inputs)
            say(f"page: {args.html}")
        if args.png is not None:
            write_file(args.png, image_of(_figure(self._results, args)), force=args.force, inputs=inputs)
            say(f"picture: {args.png}")


def _figure(results: Sequence[LogitLens | LogitAttribution], args: argparse.Namespace) -> Figure:
    from gemma4.interp import plots
    from gemma4.interp.lens import LogitLens

    lenses = [found for found in results if isinstance(found, LogitLens)]
    if lenses:
        return plots.lens_panels(lenses)
    return plots.attribution_panels([found for found in results if not isinstance(found, LogitLens)], top=args.top)


def image_of(figure: Figure, kind: str = "png") -> bytes:
    """A figure as a file; scripts that the font lacks are drawn as boxes, without a warning."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(image, format=kind, dpi=130)  # pyright: ignore[reportUnknownMemberType]  # its **kwargs
    return image.getvalue()
