# SPDX-License-Identifier: Apache-2.0
"""Held-out score of every skill that needs a picture, a video or a recording, for any engine that can answer.

    python -m train_tiny.evaluate_media --model DIR                         # through gemma4
    python -m train_tiny.evaluate_media --model DIR --backend transformers
    python -m train_tiny.evaluate_media --model DIR --run RUN               # a training run, through transformers

Answers are generated greedily. `exact answer`: the whole text. `box`: the right label and an intersection over union
of at least 0.5 with the true box. `point`: the right label, inside the true box.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .evaluate import Result, table
from .media_rows import tokenize
from .pool import REAL_BUDGET
from .skills_media import SKILLS, Conversation, held_out

Answer = Callable[[Conversation], str]  # to its first question
_MEASURES = {"box": "IoU of 0.5 or more", "point": "inside the box"}


def overlap(a: Iterable[float], b: Iterable[float]) -> float:
    """Intersection over union of two boxes [ymin, xmin, ymax, xmax]."""
    (y0, x0, y1, x1), (v0, u0, v1, u1) = a, b
    common = max(0.0, min(y1, v1) - max(y0, v0)) * max(0.0, min(x1, u1) - max(x0, u0))
    whole = max(0.0, y1 - y0) * max(0.0, x1 - x0) + max(0.0, v1 - v0) * max(0.0, u1 - u0) - common
    return common / whole if whole > 0 else 0.0


def right(conversation: Conversation, text: str) -> bool:
    """Is this the answer to the conversation's only question?"""
    skill, _, answer = conversation.turns[0]
    if skill not in _MEASURES:
        return text == answer
    try:
        found, expected = json.loads(text)[0], json.loads(answer)[0]
        if found["label"] != expected["label"]:
            return False
        if skill == "box":
            return overlap(found["box_2d"], conversation.wanted) >= 0.5
        (y, x), (y0, x0, y1, x1) = found["point"], conversation.wanted
        return bool(y0 <= y <= y1 and x0 <= x <= x1)
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def evaluate(
    answer: Answer, *, skills: Iterable[str] = SKILLS, count: int = 100, seed: int = 1, show: int = 0
) -> list[Result]:
    """Score the skills on `count` held-out conversations each; the first `show` of each are printed."""
    results = []
    for skill in skills:
        hits = []
        for i, conversation in enumerate(held_out(skill, count, seed)):
            text = answer(conversation)
            hits.append(right(conversation, text))
            if i < show:
                print(f"{skill}: {conversation.turns[0][2]!r} -> {text!r}", flush=True)
        results.append(
            Result(skill, _MEASURES.get(skill.removesuffix("_alone"), "exact answer"), float(np.mean(hits)), len(hits))
        )
        if show:
            print(table(results[-1:]).splitlines()[-1], flush=True)
    return results


def gemma4_answer(directory: Path, budget: int = REAL_BUDGET) -> Answer:
    """This project's engine, from the pictures, frames and samples themselves; float32 on the weights as stored."""
    import gemma4

    from .speech import RATE, say

    model = gemma4.load(directory)

    def answer(conversation: Conversation) -> str:
        question = {"type": "text", "text": conversation.turns[0][1]}
        images: list = conversation.images
        if conversation.picture:
            content = [{"type": "image", "image": images[0], "image_tokens": budget}, question]
        elif conversation.clip:
            content = [{"type": "video", "video": images, "fps": 1, "image_tokens": budget}, question]
        else:
            assert conversation.said is not None
            content = [question, {"type": "audio", "audio": say(conversation.said).samples, "rate": RATE}]
        return model.generate([{"role": "user", "content": content}], max_tokens=60, temperature=0).text

    return answer


def transformers_answer(directory: Path, run: Path | None = None, budget: int = REAL_BUDGET) -> Answer:
    """The reference in float32: the weights of `directory`, or those of a training run on top of them."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    from . import pictures, sounds
    from .towers import build
    from .train_media import load_run

    if run is None:
        model = Gemma4ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    else:
        model = build(directory, 0)
        print("step", load_run(model, run))
    model.eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def answer(conversation: Conversation) -> str:
        doc = tokenize(conversation, tokenizer, budget)
        ids = torch.from_numpy(doc.ids[: doc.prompt_len]).long()[None]
        inputs = {}
        if doc.pictures:
            pixels, positions = pictures.stack(doc.pictures)
            if (ids == model.config.video_token_id).any():
                inputs = {"pixel_values_videos": pixels, "video_position_ids": positions}
                inputs["num_frames_per_video"] = torch.tensor([len(doc.pictures)])
            else:
                inputs = {"pixel_values": pixels, "image_position_ids": positions}
        if doc.recording is not None:
            inputs["input_features"], inputs["input_features_mask"] = sounds.stack([doc.recording])
        with torch.no_grad():
            out = model.generate(ids, **inputs, do_sample=False, max_new_tokens=60, eos_token_id=[1, 106])
        return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out accuracy of what a small model sees and hears.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a training run: its weights instead of the directory's weights")
    parser.add_argument("--backend", choices=("gemma4", "transformers"), default="gemma4")
    parser.add_argument("--skills", nargs="*", default=SKILLS)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=int, default=REAL_BUDGET, help="soft tokens of a picture")
    parser.add_argument("--show", type=int, default=0, help="print so many answers of each skill")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parsed = parser.parse_args()
    if parsed.run or parsed.backend == "transformers":
        answer = transformers_answer(parsed.model, parsed.run, parsed.budget)
    else:
        answer = gemma4_answer(parsed.model, parsed.budget)
    results = evaluate(answer, skills=parsed.skills, count=parsed.count, seed=parsed.seed, show=parsed.show)
    print(table(results))
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
