# SPDX-License-Identifier: Apache-2.0
"""docs/html-pictures.png: pages of gemma4.html and of `gemma4 features` as a browser shows them.

    python tools/html_pictures.py [--output docs/html-pictures.png]

Attention patterns with one head enlarged and pointed at, a feature's card, and the logit lens of the shipped tiny-e.
Needs Chromium (Debian: chromium-headless-shell) and Pillow.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageChops

import gemma4
from gemma4 import harvest, html
from gemma4.cli.main import main as gemma4_command
from gemma4.interp import logit_lens
from gemma4.load.huggingface import PRETRAINED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from chromium import Browser

PROMPT = "When Mary and John went to the store, John gave a book to"
LAYER, HEAD, KEY = 9, 2, 2  # at the last token this head looks at " Mary"
SITE = "blocks.4.hook_resid_post"
FEATURE = 502  # the indefinite article: notebooks/10-features.ipynb
OPENINGS = ["Once upon a time", "One day, Lily", "There was a young fox named Pip.", "In a big green forest,"] * 8
WIDTH, LEFT, MARGIN = 1120, 560, 12  # pixels


def attention(model: gemma4.Model) -> html.Picture:
    _, cache = model.run_with_cache(PROMPT, "blocks.*.attn.hook_pattern", logits=None)
    tokens = model.to_str_tokens(model.to_tokens(PROMPT))
    return html.attention(cache["attn.hook_pattern", LAYER], tokens, title=f"Attention, block {LAYER}")


def write_card(model: gemma4.Model, folder: Path, page: Path) -> None:
    """The card of a feature over stories that the model writes, made as a user would."""
    answers = model.generate(OPENINGS, max_tokens=48, temperature=1.0, seed=1)
    texts = [start + answer.text for start, answer in zip(OPENINGS, answers, strict=True)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    dictionary = PRETRAINED / "tiny-e" / "dictionaries" / SITE
    harvest.harvest(model, [corpus], (), out=folder / "stories", sae=dictionary)
    options = ["--sae", str(dictionary), "--feature", str(FEATURE), "--examples", "6", "--context", "5"]
    if gemma4_command(["features", str(folder / "stories"), *options, "--html", str(page)]):
        raise SystemExit("gemma4 features failed")


def trimmed(screenshot: bytes) -> Image.Image:
    """Without the white below and beside it."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    assert box is not None
    return image.crop((0, 0, box[2] + MARGIN, box[3] + MARGIN))


def seen(browser: Browser, page: Path, width: int, point_at: int | None = None) -> Image.Image:
    """A page; of attention patterns with a head enlarged, and the cell of the last token and this key pointed at."""
    browser.open(page, width=width, height=1200)
    if point_at is not None:
        browser.click(".g4-head", HEAD)
        where = "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
        left, top, wide, high = browser.run(f"(e => {{ {where} }})(document.querySelector('.g4-map'))")
        n = len(browser.run("[...document.querySelectorAll('.g4-stage .g4-t')].map(e => 0)"))
        browser.point(left + (point_at + 0.5) * wide / n, top + (n - 0.5) * high / n)
    return trimmed(browser.screenshot(page.with_suffix(".png")).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/html-pictures.png.")
    parser.add_argument("--output", type=Path, default=Path("docs/html-pictures.png"))
    output = parser.parse_args().output
    model = gemma4.load("tiny-e")
    with TemporaryDirectory() as name:
        folder = Path(name)
        pages = [folder / f"{page}.html" for page in ("attention", "card", "lens")]
        attention(model).save(pages[0])
        write_card(model, folder, pages[1])
        logit_lens(model, PROMPT).to_html().save(pages[2])
        with Browser(folder / "profile") as browser:
            left = seen(browser, pages[0], LEFT, point_at=KEY)
            right = seen(browser, pages[1], WIDTH - LEFT)
            below = seen(browser, pages[2], WIDTH)
    top = max(left.height, right.height)
    whole = Image.new("RGB", (WIDTH, top + below.height), "white")
    for image, place in ((left, (0, 0)), (right, (LEFT, 0)), (below, (0, top))):
        whole.paste(image, place)
    whole.quantize(64).save(output, optimize=True)
    print(f"{output}: {whole.width} x {whole.height}, {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
