# SPDX-License-Identifier: Apache-2.0
"""docs/sees-and-hears.png: where the shipped model's answers about a picture and a recording come from.

    python tools/sees_and_hears.py [--model tiny-e] [--output docs/sees-and-hears.png]

The same as in notebooks/02-sees-and-hears.ipynb, in one picture; needs gemma4[plot,media].
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

import gemma4
from gemma4.interp import plots
from gemma4.media.samples import samples

COLOURS = {"red": (215, 35, 35), "green": (35, 150, 50), "blue": (40, 70, 215)}


def scene() -> Image.Image:
    image = Image.new("RGB", (240, 160), (170, 170, 180))
    pen = ImageDraw.Draw(image)
    pen.ellipse((25, 45, 85, 105), fill=COLOURS["red"])
    pen.rectangle((150, 60, 215, 125), fill=COLOURS["green"])
    return image


def busiest(cache: gemma4.ActivationCache, rows: np.ndarray, run: Any) -> tuple[str, int]:
    """The site and head that attend most, from these rows, to a run of soft tokens."""
    shares = {
        (name, head): float(pattern[head, rows, run.start : run.stop].sum(axis=-1).mean())
        for name, pattern in cache.items()
        for head in range(len(pattern))
    }
    return max(shares, key=lambda key: shares[key])


def seen(model: gemma4.Model) -> list[Any]:
    question = "What colour is the circle?"
    parts = [{"type": "image", "image": scene()}, {"type": "text", "text": question}]
    prompt = model.to_prompt([{"role": "user", "content": parts}])
    [run] = prompt.runs
    names = ["blocks.*.attn.hook_pattern", "vision.hook_projected"]
    out = model.generate(prompt, capture=names, temperature=0, max_tokens=20)
    at = len(prompt) + 1  # of " is", which the colour follows
    name, head = busiest(out.cache, np.array([at]), run)
    attention = out.cache[name][head, at, run.start : run.stop]
    title = f"{question} {out.text}\n(where a head looks before {model.to_str_tokens(out.tokens)[2]!r})"
    soft = out.cache.media[0]["vision.hook_projected"]
    words = model.unembed(np.array([model.to_single_token(f" {colour}") for colour in COLOURS]))
    cosine = (words / np.linalg.norm(words, axis=1, keepdims=True)) @ (soft / np.linalg.norm(soft, axis=1)[:, None]).T
    titles = [f"soft tokens that\nare like {colour!r}" for colour in COLOURS]
    return [plots.picture(attention, run, titles=[title]), plots.picture(cosine, run, titles=titles)]


def heard(model: gemma4.Model) -> Any:
    [sample] = samples("speech_command")
    prompt = model.to_prompt(sample.messages)
    [run] = prompt.runs
    # the other layers see 32 positions only
    everywhere = [i for i, layer in enumerate(model.engine_config["layers"]) if not layer["window"]]
    names = [f"blocks.{i}.attn.hook_pattern" for i in everywhere]
    out = model.generate(prompt, capture=names, temperature=0, max_tokens=20)
    said = model.to_str_tokens(out.tokens)[:-1]
    rows = len(prompt) - 1 + np.arange(len(said))
    name, head = busiest(out.cache, rows, run)
    figure = plots.spectrogram(
        out.cache[name][head, rows, run.start : run.stop], run, titles=[plots.shown(t) for t in said]
    )
    figure.axes[0].set_title(f"{out.text} (what a head hears before each token)", fontsize=10)
    return figure


def stacked(figures: list[Any]) -> Image.Image:
    """Below each other, on white."""
    drawn = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, dpi=100)
        drawn.append(Image.open(file).convert("RGB"))
    whole = Image.new("RGB", (max(i.width for i in drawn), sum(i.height for i in drawn)), "white")
    top = 0
    for image in drawn:
        whole.paste(image, ((whole.width - image.width) // 2, top))
        top += image.height
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/sees-and-hears.png.")
    parser.add_argument("--model", default="tiny-e")
    parser.add_argument("--output", type=Path, default=Path("docs/sees-and-hears.png"))
    arguments = parser.parse_args()
    matplotlib.use("agg")
    model = gemma4.load(arguments.model)
    stacked([*seen(model), heard(model)]).quantize(256).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
