# SPDX-License-Identifier: Apache-2.0
"""The `gemma4` commands with media: attachments of a chat, detect, transcribe."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma4.cli.terminal import emit, status
from gemma4.files import free_name, write_file

if TYPE_CHECKING:
    from gemma4.media.medium import Kind, Medium
    from gemma4.media.silence import Segment
    from gemma4.model import Model

BUDGETS = (70, 140, 280, 560, 1120)


def add_attachments(parser: argparse.ArgumentParser, text: str = "attach to the first message (repeatable)") -> None:
    """--image, --audio, --video (repeatable) and --image-tokens."""
    for kind, example in (("image", "a.jpg"), ("audio", "b.mp3"), ("video", "c.mp4")):
        parser.add_argument(f"--{kind}", action="append", default=[], metavar=example.upper(), help=text)
    add_image_tokens(parser)


def add_image_tokens(parser: argparse.ArgumentParser) -> None:
    text = "soft tokens per image at most (default: what the checkpoint says, else 280); more show small print"
    parser.add_argument("--image-tokens", type=int, choices=BUDGETS, help=text)


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force, of the commands that write a file."""
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def add_detect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="PHOTO", help="the picture to look at")
    parser.add_argument("what", nargs="+", help='what to look for: "a car" "the red circle"')
    parser.add_argument(
        "--output", type=Path, help="the picture with boxes (default: PHOTO-boxes.png here, or a free name)"
    )
    add_force(parser)
    parser.add_argument("--prompt", help="ask this instead; {} stands for what is looked for")
    parser.add_argument("--max-tokens", type=int, default=512, help="of the answer at most (default: %(default)s)")
    add_image_tokens(parser)


def add_transcribe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", type=Path, metavar="RECORDING", help="wav, mp3, m4a, a film, of any length")
    parser.add_argument("--from", dest="source", default="English", metavar="LANGUAGE", help="default: %(default)s")
    parser.add_argument("--to", dest="target", metavar="LANGUAGE", help="translate, and print the translation")
    parser.add_argument("--max-tokens", type=int, default=512, help="per 30 seconds (default: %(default)s)")


def attachments(model: Model, args: argparse.Namespace) -> list[Medium]:
    """The media that the options name, read and checked."""
    return [attachment(model, part["type"], part[part["type"]], args.image_tokens) for part in parts(args)]


def parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The media that the options name, as parts of a message: pictures and videos before sound."""
    return [_part(kind, path) for kind in ("image", "video", "audio") for path in getattr(args, kind)]


def _part(kind: str, path: str) -> dict[str, Any]:
    return {"type": kind, kind: os.path.expanduser(path)}


def attachment(model: Model, kind: Kind, path: str, image_tokens: int | None) -> Medium:
    """One file as a part of a message. Raises as `read_media`."""
    from gemma4.media.medium import read_media

    message = {"content": [_part(kind, path)]}
    return read_media([message], modalities=model.modalities, image_tokens=image_tokens or model.image_tokens)[0]


def attach_line(model: Model, line: str, args: argparse.Namespace, say: Callable[[str], None]) -> list[Medium]:
    """The file that "/image FILE" names; an error is printed, and the conversation goes on."""
    kind, _, path = line[1:].partition(" ")
    try:
        return [attachment(model, cast("Kind", kind), path.strip(), args.image_tokens)]  # the commands are the kinds
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        say(f"error: {error}")
        return []


def with_media(text: str, media: list[Medium]) -> str | list[dict[str, Any]]:
    """A message's content: pictures before the text, sound after it, as the model card advises."""
    if not media:
        return text
    parts = [{"type": medium.kind, medium.kind: medium} for medium in media]
    seen, heard = ([part for part in parts if (part["type"] == "audio") == sound] for sound in (False, True))
    return [*seen, {"type": "text", "text": text}, *heard]


def run_detect(model: Model, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Print the found objects, one line each, and draw them."""
    from gemma4.media.boxes import Found, draw_boxes
    from gemma4.media.image import load_image
    from gemma4.media.tasks import detect

    pixels = load_image(args.image)
    options = {"image_tokens": args.image_tokens, "prompt": args.prompt, "max_tokens": args.max_tokens}
    found: list[Found] = []
    for what in args.what:  # one question each: the picture is encoded once
        here, answer = detect(model, pixels, what, **options)
        found += here
        if not here:
            say(f"{what}: no box or point in the answer: {' '.join(answer.text.split())[:300]!r}")
    height, width = pixels.shape[:2]
    for one in found:
        numbers = " ".join(str(round(value)) for value in one.pixels(height, width))
        emit(f"{'box' if one.box else 'point'}\t{numbers}\t{one.label}")
    if found:
        output = args.output or free_name(f"{args.image.stem}-boxes.png")
        _save(draw_boxes(pixels, found), output, args.force, (args.image, *model.checkpoint.inputs))
        say(f"{len(found)} found (top left bottom right in pixels, or y x); drawn in {output}")


def _save(picture: Any, output: Path, force: bool, inputs: Iterable[Path]) -> None:
    """Save the drawn answer. The text is printed already, so a failure loses only the picture."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    try:
        write_file(output, png.getvalue(), force=force, inputs=inputs)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}; name another file with --output") from None


def run_transcribe(model: Model, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Print the text passage by passage, with progress on stderr."""
    from gemma4.media.tasks import transcribe

    def on_start(i: int, n: int, segment: Segment) -> None:
        if i == 0 and n > 1:
            say(f"{args.audio}: longer than 30 s, cut at pauses into {n} parts")
        if n > 1:
            status(f"{_span(segment)}  part {i + 1} of {n}")

    languages = {"source": args.source, "target": args.target}
    for passage in transcribe(model, args.audio, on_start=on_start, max_tokens=args.max_tokens, **languages):
        if passage.count > 1:
            status("")
        if passage.segment.silent:
            say(f"{_span(passage.segment)}: silence")
            continue
        if args.target and not passage.translation:
            say(f"{_span(passage.segment)}: the model gave no translation; this is its answer")
        emit(passage.translation or passage.text)
        if not passage.segment.in_pause:
            say(f"{_span(passage.segment)}: no pause to cut at; a word at the end may be torn")


def _span(segment: Segment) -> str:
    return " to ".join(f"{int(second // 60):02d}:{second % 60:04.1f}" for second in segment.seconds)
