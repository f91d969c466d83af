# SPDX-License-Identifier: Apache-2.0
"""The `gemma4 bench` command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from gemma4.cli import media as cli_media
from gemma4.cli.terminal import console, emit, say, status
from gemma4.files import check_output, write_file

if TYPE_CHECKING:
    from gemma4.bench import Benchmark, RowsBenchmark

_DECODE, _BATCH = 32, "1,2,4,8,16"
_OF_PHASES = ("decode", "image", "audio", "video", "image_tokens")  # options that --batch and --curve do not have


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", default="tiny-e", help="as for --model elsewhere")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--decode", type=int, metavar="N", help=f"tokens generated after it (default: {_DECODE})")
    text = "prompts timed; rounds of --batch and --curve (default: %(default)s)"
    parser.add_argument("--repeats", type=int, default=5, help=text)
    text = f"instead: how fast these numbers of sequences decode together (without numbers: {_BATCH})"
    parser.add_argument("--batch", nargs="?", const=_BATCH, metavar="N,N", help=text)
    text = "instead: the cost of a step by its rows, of many sequences and of one"
    parser.add_argument("--curve", action="store_true", help=text)
    text = "numbers of rows of --curve, such as 1-16,24,32 (default: 1-10, and 12 more up to 64)"
    parser.add_argument("--rows", metavar="N,N-N", help=text)
    parser.add_argument("--precision", choices=("exact", "high", "fast"), help="default: the model's own")
    parser.add_argument("--profile", action="store_true", help="also a table of where the time goes, per operation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    text = 'draw --batch or --curve with the machine\'s limits: .png, .svg or .html (pip install "gemma4[plot]")'
    parser.add_argument("--plot", type=Path, metavar="FILE", help=text)
    cli_media.add_force(parser)
    cli_media.add_attachments(parser, "time the encoding of it, too (repeatable)")


def run_bench(args: argparse.Namespace) -> None:
    by_rows = args.batch is not None or args.curve
    _check_options(args, by_rows)
    for path in _outputs(args):
        check_output(path, force=args.force, devices=True)  # before the work
    if by_rows:
        _run_rows(args)
    else:
        _run_phases(args)


def _check_options(args: argparse.Namespace, by_rows: bool) -> None:
    if args.batch is not None and args.curve:
        raise ValueError("--batch or --curve: one of the two")
    if args.rows is not None and not args.curve:
        raise ValueError("--rows goes with --curve")
    if args.plot is not None and not by_rows:
        raise ValueError("--plot goes with --batch or --curve")
    given = [f"--{name.replace('_', '-')}" for name in _OF_PHASES if getattr(args, name) not in (None, [])]
    if by_rows and given:
        raise ValueError(f"{given[0]} goes neither with --batch nor with --curve")
    if args.plot is not None and args.json is not None and args.plot.absolute() == args.json.absolute():
        raise ValueError(f"--json and --plot both name {args.plot}")


def _outputs(args: argparse.Namespace) -> list[Path]:
    return [path for path in (args.json, args.plot) if path is not None]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("mmproj", "prompt", "repeats", "threads", "precision", "kv_dtype")
    return {name: getattr(args, name) for name in names}


def _run_phases(args: argparse.Namespace) -> None:
    from gemma4.bench import bench

    media = cli_media.parts(args)
    decode = _DECODE if args.decode is None else args.decode
    result = bench(args.model, media=media, image_tokens=args.image_tokens, decode=decode, **_options(args))
    emit(str(result))
    if args.profile:
        for name, speed in result.phases.items():
            console().print(speed.profile.table(result.limits, escape(f"{name}, {speed.tokens} tokens")))
    _write_json(args, result, [part[part["type"]] for part in media])


def _run_rows(args: argparse.Namespace) -> None:
    from gemma4 import bench

    counts, picture = _counts(args), None if args.plot is None else _picture(args.plot)
    options = _options(args) | {"progress": _progress}
    try:
        if args.curve:
            result = bench.bench_curve(args.model, counts or bench.CURVE_ROWS, **options)
        else:
            result = bench.bench_batch(args.model, counts, **options)
    finally:
        status("")
    emit(str(result))
    if args.profile:
        for curve in result.curves:
            for step in curve.steps:
                title = f"{step.rows} {'sequences' if curve.kind == 'sequences' else 'tokens of one sequence'}"
                console().print(step.profile.table(result.limits, title))
    _write_json(args, result)
    if picture is not None:
        write_file(args.plot, picture(result), force=args.force, inputs=result.inputs)
        say(f"picture: {args.plot}")


def _progress(i: int, n: int) -> None:
    status(f"round {i} of {n}")


def _picture(path: Path) -> Callable[[RowsBenchmark], bytes]:
    """Draws the file of that name. Raises before the work: ValueError (the name's ending), ImportError."""
    from gemma4.bench.plot import format_of, render_rows
    from gemma4.interp.media_plots import pyplot

    pyplot()
    kind = format_of(path)
    return lambda result: render_rows(result, kind)


def _write_json(args: argparse.Namespace, result: Benchmark | RowsBenchmark, inputs: Iterable[str] = ()) -> None:
    if args.json is not None:
        text = json.dumps(result.as_dict(), indent=1) + "\n"
        write_file(args.json, text.encode(), force=args.force, inputs=[*result.inputs, *inputs])


def _counts(args: argparse.Namespace) -> list[int]:
    """The numbers of --batch or --rows; empty without --rows. Raises ValueError."""
    option, text = ("--rows", args.rows) if args.curve else ("--batch", args.batch)
    return [] if text is None else [n for part in text.split(",") for n in _range(part, f"{option} {text!r:.60}")]


def _range(part: str, where: str) -> Iterator[int]:
    """One number, or with a dash all from one to another."""
    from gemma4.bench import MAX_ROWS

    low, dash, high = part.strip().partition("-")
    ends = [_number(end) for end in (low, high if dash else low)]
    if not 1 <= ends[0] <= ends[1] <= MAX_ROWS:
        example = "1-16,24,32" if where.startswith("--rows") else _BATCH
        raise ValueError(f"{where}: expected numbers from 1 to {MAX_ROWS}, such as {example}; found {part!r:.20}")
    yield from range(ends[0], ends[1] + 1)


def _number(text: str) -> int:
    """0 for what is no number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
