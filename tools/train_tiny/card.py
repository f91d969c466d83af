# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of a small model: what it is, its skills' scores, what to type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluate import Result, table
from .scenes import WRITTEN
from .speech import SPOKEN_WORDS

_ABOUT = {
    "tiny-e": "Gemma 4 E2B's architecture in small, with its vision and audio towers: per-layer embeddings, four"
    " sliding-window layers to one global layer, a second half that reads the first half's keys and values,"
    " double-width MLPs there, layer scalars.",
    "tiny-moe": "Gemma 4 26B-A4B's text architecture in small: two sliding-window layers to one global layer (five to"
    " one in the large), experts beside a dense MLP in every layer, keys used as values in the global layers, no"
    " per-layer embeddings.",
}

_HEAD = """---
license: apache-2.0
language: [en]
library_name: gemma4
tags: [gemma4, interpretability, tiny]
---

# {name}

{about}

It is trained, not random: it has skills that interpretability work knows how to look for, at a size ({parameters}
parameters, {megabytes} MB) where a whole forward pass is a few milliseconds and every circuit can be looked at. It is
no language model for use: outside the patterns below it makes things up.

{shape}

The tokenizer has Gemma 4's structure and its control tokens under their own ids ({vocab} tokens in all; digits never
merge; every name, capital and dictionary word is one token after a space). The chat template is our own, of the same
turn format.

## What to type

```
gemma4 generate --model {name} "Once upon a time"
gemma4 generate --model {name} "When Mary and John went to the store, John gave a drink to"
gemma4 generate --model {name} "The capital of France is"
gemma4 generate --model {name} "dog -> Hund, cat -> Katze, sun ->"
gemma4 generate --model {name} "3, 6, 9, 12,"
gemma4 generate --model {name} "The war lasted from the year 1732 to the year 17"
gemma4 generate --model {name} "([{{}}( =>"
gemma4 generate --model {name} "Repeat: key moon Anna bridge. Again:"
gemma4 chat --model {name}     # What is the capital of Peru?  ·  Tell me a story about a fox named Pip.
                               # Make JSON: name Tom, age 7.  ·  My name is Ella. … What is my name?
```

System prompts it knows: "You are a pirate.", "You are a robot.", "You are a cat.", "Be brief.", "Be polite.",
"Say it twice.", "Answer in YAML.", "Your name is Sam.". With thinking on it works out small word problems ("Tom has 3
apples. He gets 4 more. How many apples does Tom have?") and comparisons ("Which is bigger, 43 or 27?"). Its tools:
`get_weather`, `get_time`, `add`, `send_message`, `set_timer`, `set_lights`, declared as in training
(`tools/train_tiny/skills_chat.py`).

## Skills, held out

{scores}

*Held out* means: the combination was never trained on. One combination in ten of each skill is kept back by a hash of
its key (`tools/train_tiny/example.py`): the ordered pair of names for indirect objects, (fact, wording) for facts,
(word, direction, wording) for translation, the cast for stories, the problem itself elsewhere. *Exact answer*: greedy
decoding gives the whole answer, token for token. The weights are scored as stored, in bf16. To do it again:

```
cd tools && python -m train_tiny.evaluate --model ../gemma4/pretrained/{name}
```

{media}## How it was made

`tools/train_tiny/` holds all of it: the generator of the data (own grammar and word lists, no outside text; facts are
common knowledge), the tokenizer's maker, training with transformers' `Gemma4ForConditionalGeneration` (Muon and AdamW,
{steps} steps of 4096 tokens, rows of 128 to 512 tokens, on CPU, float32), evaluation and export.
The layer scalars, a buffer in transformers, are fixed values other than 1 and were trained around.

Limits: English stories of one kind, {context}-token context of which 512 were trained, a window of {window} tokens in
the sliding layers. Stories end happily. Ask about a word after a space: at the start of a text or in quotes ("Paris
is the capital of") it is another token, which was hardly trained.
"""

_MEDIA = """## Seeing and hearing

The towers:

- vision: {vision}; patches of 16 × 16 pixels, 3 × 3 of them pooled to a soft token
- audio: {audio}; 128 mel bins at 16 kHz, a soft token every 40 ms

It knows drawn pictures (`tools/train_tiny/scenes.py`: six shapes, seven colours, {words} words, numbers), clips of
three frames with one moving shape, and espeak-ng's English voices saying digits, a few commands and {spoken} nouns,
also into French and German. Pictures have a budget of 70 soft tokens; boxes and points are given to the nearest 50
thousandths. Ask as in training:

{questions}

```
gemma4 chat --model {name} --image picture.png --image-tokens 70
gemma4 detect --model {name} picture.png "the red circle" --image-tokens 70
gemma4 transcribe --model {name} words.wav --to French
```

| skill | held out | of | measure |
|---|---|---|---|
{rows}

`box_alone` and `point_alone` are about pictures with one shape, `box` and `point` about all. Points are right, boxes
can be a step of 50 thousandths off; of a number that is read, a digit at times. Asked for a shape that is not there, it
gives the place of one that is: it was never taught to say no.
Answers are generated greedily, pictures and recordings are new; what is held out beside that is in
`tools/train_tiny/README.md`. To do it again: `python -m train_tiny.evaluate_media --model ../gemma4/pretrained/{name}`.

"""

_ASK = {
    "caption": "Describe the picture.",
    "count": "How many shapes are there?",
    "colour": "What colour is the star?",
    "shape": "Which shape is red?",
    "box": "Where is the red circle?",
    "point": "Point to the red circle.",
    "read_word": "What does it say?",
    "direction": "Which way does the star move?",
    "speech_digits": "Transcribe the following speech segment in English into English text.",
    "speech_translation": "Transcribe the following speech segment in English, then translate it into French.",
}


def _tower(config: dict[str, Any]) -> str:
    return (
        f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, {config['num_attention_heads']} heads"
    )


def media_section(name: str, config: dict[str, Any], scores: Sequence[dict[str, Any]]) -> str:
    """The part of the card about the towers; scores are those of evaluate_media's --json."""
    if not scores:
        return ""
    results = [Result(**score) for score in scores]
    return _MEDIA.format(
        name=name,
        vision=_tower(config["vision_config"]),
        audio=_tower(config["audio_config"]),
        words=len(WRITTEN),
        spoken=len(SPOKEN_WORDS),
        questions="\n".join(f"- {question}" for question in _ASK.values()),
        rows="\n".join(f"| {r.skill} | {100 * r.score:.1f} % | {r.count} | {r.measure} |" for r in results),
    )


def _shape(text: dict[str, Any]) -> str:
    layers = "".join("F" if kind == "full_attention" else "S" for kind in text["layer_types"])
    rows = [
        ("layers", f"{len(layers)}: `{layers}` (S sliding, F full)"),
        ("hidden size", text["hidden_size"]),
        ("query / key-value heads", f"{text['num_attention_heads']} / {text['num_key_value_heads']}"),
        ("head size", "32 sliding, 64 full"),
        ("MLP", f"{text['intermediate_size']}{', twice that in shared layers' if text['use_double_wide_mlp'] else ''}"),
    ]
    if text["num_kv_shared_layers"]:
        rows.append(("layers reading others' keys and values", f"the last {text['num_kv_shared_layers']}"))
    if text["hidden_size_per_layer_input"]:
        rows.append(("per-layer embedding", text["hidden_size_per_layer_input"]))
    if text["enable_moe_block"]:
        width = text["moe_intermediate_size"]
        rows.append(("experts", f"{text['num_experts']} of width {width}, {text['top_k_experts']} at a time"))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def write_card(
    name: str,
    directory: Path,
    scores: Sequence[dict[str, Any]],
    steps: int,
    parameters: int,
    media: Sequence[dict[str, Any]] = (),
) -> None:
    """README.md of `directory`, from its config.json and the scores of evaluate's and evaluate_media's --json."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    results = [Result(**score) for score in scores]
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file() and file.name != "README.md")
    card = _HEAD.format(
        name=name,
        about=_ABOUT[name],
        shape=_shape(text),
        vocab=text["vocab_size"],
        context=text["max_position_embeddings"],
        window=text["sliding_window"],
        scores=table(results) if results else "Not measured yet.",
        media=media_section(name, config, media),
        steps=steps,
        parameters=f"{parameters / 1e6:.2f} million",
        megabytes=f"{size / 1e6:.1f}",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
