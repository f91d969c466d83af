# SPDX-License-Identifier: Apache-2.0
"""The prompts of `gemma4 detect` and `gemma4 transcribe`, and how answers are parsed.

Wordings: Google's documentation of Gemma 4 (model card, cookbook). The shipped small models were trained on one each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from gemma4.load import shipped_models
from gemma4.media.audio import AudioLike, load_audio
from gemma4.media.boxes import Found, parse_boxes
from gemma4.media.image import ImageLike
from gemma4.media.silence import Segment, split

if TYPE_CHECKING:
    from gemma4.generation.loop import Generation
    from gemma4.generation.options import GenerateOptions
    from gemma4.model import Model

_DETECT = "Detect {}, output only ```json"
_DETECT_SHIPPED = "Where is the {}?"
_TRANSCRIBE = "Transcribe the following speech segment in {source} into {source} text."
_TRANSLATE = "Transcribe the following speech segment in {source}, then translate it into {target}."
_FORMAT = (
    " Output only the transcription, without newlines. Write numbers in digits: 1.7, not one point seven; 3, not three."
)
_FORMAT_BOTH = " First the transcription in {source}, then one newline, then '{target}: ', then the translation."


def is_shipped(model: Model) -> bool:
    """Whether it is one of the small models shipped with the package."""
    path = model.checkpoint.path
    return path.parent.name == "pretrained" and path.name in shipped_models()


def detect(
    model: Model, image: ImageLike, what: str, *, prompt: str | None = None, **options: Unpack[GenerateOptions]
) -> tuple[list[Found], Generation]:
    """Locate `what` ("a car", "the red circle") in a picture: the places found, and the whole answer.

    prompt: another question, with {} in place of `what`. options: as for `Model.generate`; greedy by default.
    Raises as `Model.generate`, and ValueError for an empty `what` or a prompt without {}.
    """
    if not what.strip():
        raise ValueError("say what to look for")
    if prompt is None and is_shipped(model):
        prompt, what = _DETECT_SHIPPED, re.sub(r"\A(?:the|an?)\s+", "", what.strip(), flags=re.I)
    question = prompt or _DETECT
    if "{}" not in question:
        raise ValueError(f"the prompt must have {{}} where the thing to look for goes, got {question!r}")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question.replace("{}", what.strip())}]
    messages = [{"role": "user", "content": parts}]
    answer = model.generate(messages, **_greedy(options))
    return parse_boxes(answer.text), answer


@dataclass(frozen=True, slots=True)
class Passage:
    """The transcript of a segment: number i of n; translation is "" if none was requested (or none came)."""

    number: int
    count: int
    segment: Segment
    text: str
    translation: str = ""


def transcribe(
    model: Model,
    audio: AudioLike,
    rate: int | None = None,
    *,
    source: str = "English",
    target: str | None = None,
    on_start: Callable[[int, int, Segment], None] | None = None,
    **options: Unpack[GenerateOptions],
) -> Iterator[Passage]:
    """Transcribe, and translate into `target`, a recording of any length, a passage at a time.

    A recording over 30 s is cut at pauses (`gemma4.media.silence.split`); silent segments give empty text without
    running the model. on_start(i, n, segment) is called before each. options: as for `Model.generate`; greedy by
    default. Raises as `load_audio` and `Model.generate`; errors of the file are raised before the first passage.
    """
    samples = load_audio(audio, rate)
    segments = split(samples)
    question = _question(model, source, target)

    def passages() -> Iterator[Passage]:
        for i, segment in enumerate(segments):
            if on_start is not None:
                on_start(i, len(segments), segment)
            answer = "" if segment.silent else _ask(model, samples[segment.start : segment.stop], question, options)
            yield Passage(i, len(segments), segment, *_parts(answer, target))

    return passages()


def _question(model: Model, source: str, target: str | None) -> str:
    text = (_TRANSLATE if target else _TRANSCRIBE) + ("" if is_shipped(model) else _FORMAT_BOTH if target else _FORMAT)
    return text.format(source=source, target=target)


def _ask(model: Model, samples: Any, question: str, options: GenerateOptions) -> str:
    parts = [{"type": "text", "text": question}, {"type": "audio", "audio": samples}]  # sound after text: model card
    return model.generate([{"role": "user", "content": parts}], **_greedy(options)).text.strip()


def _greedy(options: GenerateOptions) -> GenerateOptions:
    return {"temperature": 0.0, **options}


def _parts(answer: str, target: str | None) -> tuple[str, str]:
    """Transcript and translation: the answer has the second after "LANGUAGE:", at the start of a line or not."""
    if not target:
        return answer, ""
    said, mark, translated = answer.partition(f"{target}:")
    return (said.strip(), translated.strip()) if mark else (answer, "")
