# SPDX-License-Identifier: Apache-2.0
"""`gemma4 demo`: from a prompt to its activations in a few seconds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gemma4.cli.look import image_of
from gemma4.cli.terminal import styled
from gemma4.files import check_output, free_name, write_file
from gemma4.generation.stream import Generation
from gemma4.info import peak_bytes, resident_bytes
from gemma4.interp.cache import ActivationCache
from gemma4.interp.lens import LENS_SITES, LogitLens, logit_lens
from gemma4.interp.plots import shown
from gemma4.model import Model
from gemma4.units import count, size

DEFAULT_OUTPUT = "gemma4-demo.png"
STORY = "Once upon a time there was a little"
# indirect object identification (Wang et al. 2022): the answer is the name that is not repeated
RIDDLE = "When Mary and John went to the store, John gave a book to"
_COMPONENTS = ("hook_attn_out", "hook_mlp_out", "hook_ple_out")
_ADDED = (("|attn|", 6), ("|mlp|", 6), ("|ple|", 6))  # their columns: name, width


def run_demo(
    model: Model,
    prompt: str | None,
    *,
    console: Console,
    output: Path | None,
    load_s: float,
    max_tokens: int = 64,
    force: bool = False,
) -> None:
    """Stream a continuation, then print activations per layer and save a heat map.

    output: None = gemma4-demo.png, or the next free name of that kind. force: replace an existing named file.
    """
    console.print(
        f"[bold]{escape(model.checkpoint.path.name)}[/]  {count(model.checkpoint.n_parameters)} parameters "
        f"({count(model.info().effective_parameters)} effective), {model.n_layers} layers, loaded in "
        f"{load_s * 1e3:.0f} ms; {model.engine.isa}, {model.engine.threads} threads\n"
    )
    show_speed(_stream(model, prompt or STORY, console, max_tokens), console)
    inside = prompt or RIDDLE
    ids = model.to_tokens(inside)
    sites = [*LENS_SITES, *(f"blocks.*.{name}" for name in _COMPONENTS if f"blocks.0.{name}" in model.sites)]
    _, cache = model.run_with_cache(ids, sites, logits=None)
    lens = logit_lens(model, cache)
    console.print(styled(f"\nInside, where the model reads the last word of {inside!r}:", console, "bold"))
    console.print(_layer_table(model, cache, lens))
    picture = _plot(lens, model.to_str_tokens(ids), output or Path(DEFAULT_OUTPUT), console)
    if picture is not None:
        _save(picture, output, force, model, console)


def picture_name(output: Path, force: bool) -> Path:
    """The file that the heat map goes to, with the ending of a picture. Raises as `check_output`."""
    is_device = output.exists() and not output.is_file() and not output.is_dir()
    named = output if output.suffix or is_device or not output.name else output.with_suffix(".png")
    check_output(named, force=force, devices=True)
    return named


def _stream(model: Model, prompt: str, console: Console, max_tokens: int) -> Generation:
    console.print(styled(prompt, console, "dim"), end="")
    with model.stream(prompt, max_tokens=max_tokens, temperature=0.0) as stream:
        for piece in stream:
            console.print(styled(piece, console), end="")
    console.print("\n")
    return stream.result


def show_speed(result: Generation, console: Console) -> None:
    """One line: speed and memory."""
    timings = result.timings
    console.print(
        f"prompt {result.prompt_tokens} tokens at {timings.prefill_rate:,.0f} tokens/s, "
        f"{len(result.tokens)} generated at {timings.decode_rate:,.0f} tokens/s; "
        f"memory {size(max(resident_bytes(), peak_bytes()))} at most",
        style="dim",
        highlight=False,
    )


def _layer_table(model: Model, cache: ActivationCache, lens: LogitLens) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, least in (
        ("block", 5),
        ("attention", 18),
        ("|resid|", 7),
        ("", 10),
        *_ADDED,
        ("logit lens: next token if it ended here", 9),
    ):
        table.add_column(name, justify="right" if name.startswith("|") else "left", no_wrap=True, min_width=least)
    top = float(lens.norms[:, -1].max())
    for row, label in enumerate(lens.labels):
        norm = float(lens.norms[row, -1])
        table.add_row(
            label,
            _kind(model, row - 1),
            f"{norm:.1f}",
            "\u2588" * max(1, round(10 * norm / top)),
            *(_norm(cache, row - 1, name) for name in _COMPONENTS),
            Text("  ").join(_words(lens, row)),
        )
    return table


def _kind(model: Model, layer: int) -> str:
    if layer < 0:
        return ""
    config = model.engine_config["layers"][layer]
    kind = f"local {config['window']}" if config["window"] else "global"
    return kind if config["kv_source"] == layer else f"{kind}, keys of {config['kv_source']}"


def _norm(cache: ActivationCache, layer: int, name: str) -> str:
    site = f"blocks.{layer}.{name}"
    return f"{np.linalg.norm(cache[site][-1]):.1f}" if site in cache else ""


def _words(lens: LogitLens, row: int) -> list[Text]:
    pairs = zip(lens.tokens[row][-1], lens.probs[row, -1], strict=True)
    return [Text(f"{shown(token)} {p:.2f}", style="bold green" if p > 0.5 else "") for token, p in list(pairs)[:3]]


def _plot(lens: LogitLens, tokens: list[str], output: Path, console: Console) -> bytes | None:
    """The heat map in the format of the file name; None where matplotlib is missing."""
    from gemma4.interp import plots

    try:
        return image_of(plots.overview(lens, tokens), output.suffix[1:] or "png")
    except ImportError as error:
        console.print(styled(f"no heat map: {error}", console, "yellow"))
        return None


def _save(picture: bytes, output: Path | None, force: bool, model: Model, console: Console) -> None:
    target = output or Path(DEFAULT_OUTPUT)
    if output is None:
        if not os.access(target.parent, os.W_OK):  # a read-only working folder is no reason to fail
            target = Path(tempfile.gettempdir()) / target.name
        target = free_name(target)
    write_file(target, picture, force=force, inputs=model.checkpoint.inputs)
    console.print(styled(f"heat map of every layer and position: {target.resolve()}", console), soft_wrap=True)
