# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  word lists read better as one string
"""Questions about pictures, short videos and recordings, in chat form, with their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from . import scenes, speech, video
from .example import is_held_out
from .scenes import Scene, Thing
from .skills_chat import render
from .speech import Said

Turn = tuple[str, str, str]  # skill, question, answer


@dataclass(frozen=True)
class Conversation:
    """Turns about one picture, one video or one recording (exactly one of them is set).

    wanted   the box that a `box` or `point` question asks for, as [ymin, xmin, ymax, xmax] in thousandths
    """

    turns: tuple[Turn, ...]
    picture: Scene | None = None
    clip: video.Clip | None = None
    said: Said | None = None
    wanted: tuple[int, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The picture or the video's frames."""
        found = [self.picture] if self.picture else list(self.clip.frames) if self.clip else []
        return [scenes.draw(scene) for scene in found]

    def segments(self) -> list[tuple[str, str]]:
        """(what comes before an answer, the answer with its `<turn|>`) of each turn, in the template's form.

        The first holds one placeholder: `<|image|>`, `<|video|>` or `<|audio|>`.
        """
        kind = "image" if self.picture else "video" if self.clip else "audio"
        messages: list[dict[str, Any]] = []
        done, found = "", []
        for i, (_, question, answer) in enumerate(self.turns):
            content: Any = question
            if i == 0:  # pictures before the text, recordings after it, as Gemma's cards advise
                parts = [{"type": kind}, {"type": "text", "text": question}]
                content = parts if kind != "audio" else parts[::-1]
            messages.append({"role": "user", "content": content})
            before = render(messages)
            found.append((before[len(done) :], answer + "<turn|>"))
            done = before + answer + "<turn|>"
            messages.append({"role": "assistant", "content": answer})
        return found


def _a(name: str) -> str:
    return f"a {name}"


def _list(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + " and " + names[-1]


def coarse(values: Sequence[float]) -> list[int]:
    """Answers give places to the nearest 50 thousandths: 347 → 350. Finer ones took more questions to learn."""
    return [50 * round(value / 50) for value in values]


# --- pictures -----------------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: random.Random) -> Turn | None:
    """`A red circle and a blue square.`, from left to right; pictures of one to three shapes."""
    names = [_a(thing.name) for thing in scene.shapes]
    if not 1 <= len(names) <= 3 or scene.writing:
        return None
    question = rng.choice(("What is in the picture?", "Describe the picture."))
    return "caption", question, _list(names).capitalize() + "."


def count(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.writing or not scene.shapes:
        return None
    return "count", rng.choice(("How many shapes are there?", "Count the shapes.")), str(len(scene.shapes))


def _single(scene: Scene, attribute: str, rng: random.Random) -> Thing | None:
    """A shape that shares its kind (or colour) with no other on the picture."""
    values = [getattr(thing, attribute) for thing in scene.shapes]
    alone = [thing for thing in scene.shapes if values.count(getattr(thing, attribute)) == 1]
    return rng.choice(alone) if alone else None


def colour(scene: Scene, rng: random.Random) -> Turn | None:
    thing = _single(scene, "kind", rng)
    return None if thing is None else ("colour", f"What colour is the {thing.kind}?", f"It is {thing.colour}.")


def shape(scene: Scene, rng: random.Random) -> Turn | None:
    thing = _single(scene, "colour", rng)
    return None if thing is None else ("shape", f"Which shape is {thing.colour}?", f"The {thing.kind}.")


def box(scene: Scene, rng: random.Random) -> tuple[Turn, tuple[int, ...]] | None:
    """`Where is …?` → Gemma's `[{"box_2d": [ymin, xmin, ymax, xmax], "label": …}]`."""
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    wanted = scene.box_2d(thing)
    answer = json.dumps([{"box_2d": coarse(wanted), "label": thing.name}])
    return ("box", f"Where is the {thing.name}?", answer), tuple(wanted)


def point(scene: Scene, rng: random.Random) -> tuple[Turn, tuple[int, ...]] | None:
    """`Point to …` → `[{"point": [y, x], "label": …}]`: the middle of the box."""
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    y0, x0, y1, x1 = wanted = scene.box_2d(thing)
    answer = json.dumps([{"point": coarse([(y0 + y1) / 2, (x0 + x1) / 2]), "label": thing.name}])
    return ("point", f"Point to the {thing.name}.", answer), tuple(wanted)


def read(scene: Scene, rng: random.Random) -> Turn | None:
    """`What does it say?`, of a word or a number."""
    text = scene.writing
    if text is None:
        return None
    skill = "read_number" if text.kind == "number" else "read_word"
    return skill, rng.choice(("What does it say?", "Read the text.")), f"It says {text.text}."


# Some more often: a colour or a kind is where the text model learns to find a thing on a picture, a box is the hardest.
_ABOUT_SHAPES: tuple[Callable[..., Any], ...] = (*(caption, count, colour, shape, box, box, box, box, point, point),)


def picture_conversation(rng: random.Random, scene: Scene, *, turns: int, skill: str | None = None) -> Conversation:
    """Questions about one picture in any order; with `skill`, only that one (ValueError if the picture has none)."""
    asks = [read] if scene.writing else list(_ABOUT_SHAPES)
    rng.shuffle(asks)
    found: list[Turn] = []
    wanted: tuple[int, ...] = ()
    for ask in asks:
        made = ask(scene, rng)
        if made is None:
            continue
        turn, place = made if isinstance(made[0], tuple) else (made, ())
        if (skill is None or turn[0] == skill) and turn not in found:
            found.append(turn)
            wanted = place or wanted
        if len(found) == turns:
            break
    if not found:
        raise ValueError(f"nothing to ask about {scene.key}")
    return Conversation(tuple(found), picture=scene, wanted=wanted)


def video_conversation(rng: random.Random, *, held_out: bool) -> Conversation:
    while True:
        clip = video.clip(rng)
        if is_held_out("video", clip.key) == held_out:
            return clip_conversation(clip)


def clip_conversation(clip: video.Clip) -> Conversation:
    turn = ("direction", f"Which way does the {clip.shape.kind} move?", f"It moves {clip.direction}.")
    return Conversation((turn,), clip=clip)


# --- recordings ---------------------------------------------------------------------------------------------------

TRANSCRIBE = "Transcribe the following speech segment in English into English text."
TRANSLATE = "Transcribe the following speech segment in English, then translate it into {}."


def speech_conversation(rng: random.Random, said: Said, *, translate: bool) -> Conversation:
    """Gemma's own wordings. A translation is asked for where there is one: transcript, newline, `French: …`."""
    if translate and said.translations:
        language = rng.choice(sorted(said.translations))
        answer = f"{said.written}\n{language}: {said.translations[language]}"
        turn = ("speech_translation", TRANSLATE.format(language), answer)
    else:
        turn = (f"speech_{said.skill}", TRANSCRIBE, said.written)
    return Conversation((turn,), said=said)


# --- held out -----------------------------------------------------------------------------------------------------

SKILLS = (
    "caption count colour shape box_alone point_alone box point read_word read_number direction"
    " speech_digits speech_command speech_words speech_translation"
).split()


def held_out(skill: str, count: int, seed: int = 1) -> list[Conversation]:
    """`count` single-turn conversations that training never saw (README.md says what that means for each skill).

    `box_alone` and `point_alone`: of a picture that has that shape only.
    """
    rng = random.Random(f"test/{seed}/{skill}")
    found: list[Conversation] = []
    while len(found) < count:
        if skill == "direction":
            found.append(video_conversation(rng, held_out=True))
        elif skill.startswith("speech_"):
            kind = skill.removeprefix("speech_")
            said = speech.sample(rng, held_out=True, skill="words" if kind == "translation" else kind)
            found.append(speech_conversation(rng, said, translate=kind == "translation"))
        else:
            generator = scenes.text_scene if skill.startswith("read_") else scenes.shape_scene
            if skill.endswith("_alone"):
                generator = partial(scenes.shape_scene, count=1)
            scene = scenes.sample(generator, rng, held_out=True)
            try:
                found.append(picture_conversation(rng, scene, turns=1, skill=skill.removesuffix("_alone")))
            except ValueError:
                continue
    return found
