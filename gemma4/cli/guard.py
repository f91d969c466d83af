# SPDX-License-Identifier: Apache-2.0
"""`gemma4 guard`: scores of ShieldGemma as a table, or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from gemma4.cli.terminal import console, emit, styled, text_of, typed

if TYPE_CHECKING:
    from gemma4.guard import GuardScores
    from gemma4.model import Model


def add_guard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help='what a user wrote; "-" reads it from standard input')
    parser.add_argument("--file", metavar="FILE", help="read the text from this file instead")
    parser.add_argument("--response", metavar="TEXT", help="judge this answer to the text instead of the text")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME[=SENTENCE]",
        help="dangerous content, harassment, hate speech or sexually explicit, or a beginning of it; or a name and a "
        "guideline of your own (repeatable; default: those four)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="scores from here on count as violations (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--force", action="store_true", help="score with a model that is no ShieldGemma, too")


def run_guard(load: Callable[[], Model], args: argparse.Namespace) -> None:
    if (args.text is None) == (args.file is None):
        raise ValueError("give either a text or --file FILE")
    if not 0 <= args.threshold <= 1:  # before the model is loaded and runs
        raise ValueError(f"--threshold must be a number in 0..1, got {args.threshold}")
    text = text_of(args.file or "-") if args.text in (None, "-") else typed(args.text)
    response = None if args.response is None else typed(args.response)
    names = [typed(policy) for policy in args.policy or ()]
    model = load()
    found = model.guard(text, response, policies=_policies(names), force=args.force)
    violated = found.violated(args.threshold)
    if args.json:
        emit(json.dumps({"scores": found.scores, "violated": violated, "threshold": args.threshold}))
    else:
        _print_table(found, violated)


def _policies(given: list[str]) -> list[str] | dict[str, str] | None:
    """None if there are none; a mapping if they are sentences of the user's own. Raises ValueError for a mixture."""
    own = [policy.partition("=") for policy in given]
    if not any(equals for _, equals, _ in own):
        return given or None
    if not all(equals for _, equals, _ in own):
        raise ValueError("--policy: give names alone, or NAME=SENTENCE for each")
    found = {name: sentence for name, _, sentence in own}
    if len(found) < len(own):
        raise ValueError("--policy: each needs a name of its own")
    return found


def _print_table(found: GuardScores, violated: list[str]) -> None:
    out = console()
    table = Table("policy", "P(Yes)", "")
    for name, score in found.scores.items():
        bad = name in violated
        table.add_row(styled(name, out), f"{score:.4f}", styled("violated" if bad else "", out, "red"))
    out.print(table)
