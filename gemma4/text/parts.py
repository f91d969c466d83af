# SPDX-License-Identifier: Apache-2.0
"""Parts of messages in OpenAI's, Anthropic's and Hugging Face's formats, converted to one form.

    {"type": "text", "text": str}
    {"type": "image" | "audio" | "video", that type: path, bytes or object, and options}

A part of any other type is an error that names it; no part is dropped.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote_to_bytes, urlsplit

from gemma4.narrow import is_list_or_tuple, is_mapping, is_sequence

MEDIA_TYPES = ("image", "audio", "video")
_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # key of each type's text
_SOURCES = ("url", "path", "base64", "data", "source")  # keys of Hugging Face's, Anthropic's and MCP's media
_MEDIA = {  # kinds, and the keys of their media
    **{kind: (kind, (kind, *_SOURCES)) for kind in MEDIA_TYPES},
    **{f"{kind}_url": (kind, (f"{kind}_url",)) for kind in MEDIA_TYPES},
    "input_image": ("image", ("image_url",)),
    "input_audio": ("audio", ("input_audio",)),
}
_ALL_SOURCES = tuple(dict.fromkeys(key for _, keys in _MEDIA.values() for key in keys))  # a part has one of them
_OF_MEDIA = tuple(key for key in _ALL_SOURCES if key not in _SOURCES)  # keys that only media have
_INSIDE = ("bytes", "base64", "data", "url", "path")  # keys of a medium that is itself an object; the first counts
_HINTS = ("detail", "format", "media_type", "mime_type", "mimeType", "cache_control")  # unused keys of other clients
_BY_CALLS = ("thinking", "tool_use", "tool_result")  # Anthropic's parts that become separate fields and messages
KNOWN_TYPES = tuple(sorted({*_TEXT, *_MEDIA, *_BY_CALLS}))


class _Place(NamedTuple):
    """A part's position, for errors."""

    message: int
    part: int
    role: Any

    def __str__(self) -> str:
        return f"message {self.message}, part {self.part}" + (f" ({self.role})" if isinstance(self.role, str) else "")


def canonical(messages: Sequence[object], *, others: bool = False) -> list[Any]:
    """The messages with every part in this module's form; entries that are not messages are left to the caller.

    Anthropic's thinking and tool_use parts become fields of their message, each tool_result a message of role "tool".
    others: parts of unknown types stay unchanged, for a template that may know them.
    Nothing is fetched or opened. Raises ValueError naming message, part and role: unknown types, text that
    is not a string, media without a source or with two, addresses, invalid base64.
    """
    found: list[Any] = []
    names: dict[Any, str] = {}  # names of the tools, by the ids of their calls
    for i, message in enumerate(messages):
        if not is_mapping(message):
            found.append(message)
            continue
        message = _with_own_fields(i, message, others)
        content = message.get("content")
        if is_list_or_tuple(content):
            found += _Split(i, message, names, others).messages(content)
        elif message.get("role") == "tool" and isinstance(content, int | float):
            found.append({**message, "content": json.dumps(content)})  # templates support texts and objects
        elif content is None or isinstance(content, str | Mapping | int | float):
            found.append(message)
        else:
            kind = type(content).__name__
            raise ValueError(f"message {i} ({message.get('role')}): content must be a string or parts, got {kind}")
    return found


# Fields of messages in other clients' forms that hold media: a template would pass over them
_MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio", "files", "attachments", "documents", "parts")


def _with_own_fields(i: int, message: Mapping[str, Any], others: bool) -> Mapping[str, Any]:
    """The message with OpenAI's function_call and refusal where templates look. Raises ValueError for media beside the
    content, and for calls of another role than the assistant's."""
    role = message.get("role")
    lost = [] if others else [key for key in _MEDIA_FIELDS if _is_given(message.get(key))]
    if lost:
        raise ValueError(f'message {i} ({role}): "{lost[0]}" is not read; give media as parts of the content')
    call, refusal = message.get("function_call"), message.get("refusal")
    if call and not message.get("tool_calls"):
        message = {**message, "tool_calls": [{"type": "function", "function": call}]}
    if isinstance(refusal, str) and not message.get("content"):
        message = {**message, "content": refusal}
    if message.get("tool_calls") and role not in ("assistant", "model"):
        raise ValueError(f"message {i} ({role}): tool calls go into a message of role assistant")
    return message


def _is_given(value: Any) -> bool:
    """Whether a field holds anything; arrays have no truth value."""
    return value is not None and not ((is_sequence(value) or is_mapping(value)) and len(value) == 0)


class _Split:
    """A message's parts, and their results: most often the same message."""

    def __init__(self, index: int, message: Mapping[str, Any], names: dict[Any, str], others: bool) -> None:
        self.index, self.message, self.names, self.others = index, message, names, others
        self.before: list[dict[str, Any]] = []  # results of tools, and the user's text before each
        self.parts: list[Any] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def messages(self, content: Sequence[Any]) -> list[dict[str, Any]]:
        for j, part in enumerate(content):
            place = _Place(self.index, j, self.message.get("role"))
            kind = part.get("type") if is_mapping(part) else None
            if not isinstance(kind, str):
                raise ValueError(
                    f'message {place.message} ({place.role}): each part of content must be an object with a "type"; '
                    f"part {j} is {part!r:.80}"
                )
            if kind in _BY_CALLS:
                getattr(self, f"_{kind}")(part, place)
            elif self.others and kind not in KNOWN_TYPES:
                self.parts.append(part)
            else:
                self.parts.append(_canonical_part(part, kind, place))
        if self.before and not self.parts:
            return self.before
        return [*self.before, self._rest()]

    def _rest(self) -> dict[str, Any]:
        message = {**self.message, "content": self.parts}
        if self.thoughts:
            message.setdefault("reasoning_content", "\n".join(self.thoughts))
        if self.calls:
            given = message.get("tool_calls") or ()
            message["tool_calls"] = [*(given if isinstance(given, list | tuple) else [given]), *self.calls]
        return message

    def _thinking(self, part: Mapping[str, Any], place: _Place) -> None:
        self._check_role(part, place, "assistant", "model")
        self.thoughts.append(_text(part, "thinking", place))

    def _tool_use(self, part: Mapping[str, Any], place: _Place) -> None:
        self._check_role(part, place, "assistant", "model")
        name = _text(part, "name", place)
        self.names[_call_id(part, "id", place)] = name
        _check_known(part, "input", ("id", "name"), place)
        function: dict[str, Any] = {"name": name, "arguments": {} if part.get("input") is None else part["input"]}
        self.calls.append({"id": part.get("id"), "type": "function", "function": function})

    def _tool_result(self, part: Mapping[str, Any], place: _Place) -> None:
        self._check_role(part, place, "user", "tool")
        _check_known(part, "content", ("tool_use_id", "is_error"), place)
        content: Any = "" if part.get("content") is None else part["content"]
        if is_list_or_tuple(content):
            content = [_inner_part(inner, place) for inner in content]
            if all(inner["type"] == "text" for inner in content):
                content = "\n".join(inner["text"] for inner in content)
        if self.parts:
            self.before.append({**self.message, "content": self.parts})
            self.parts = []
        call = _call_id(part, "tool_use_id", place)
        result = {"role": "tool", "tool_call_id": call, "content": content}
        self.before.append(result | ({"name": self.names[call]} if call in self.names else {}))

    @staticmethod
    def _check_role(part: Mapping[str, Any], place: _Place, *roles: str) -> None:
        if place.role not in roles:
            raise ValueError(f'{place}: a part of type "{part["type"]}" goes into a message of role {roles[0]}')


def _inner_part(part: Any, place: _Place) -> dict[str, Any]:
    if not is_mapping(part) or not isinstance(part.get("type"), str):
        raise ValueError(f'{place}: the content of a tool_result must be parts with a "type", got {part!r:.80}')
    return _canonical_part(part, part["type"], place)


def _canonical_part(part: Mapping[str, Any], kind: str, place: _Place) -> dict[str, Any]:
    if kind in _TEXT:
        text = _text(part, _TEXT[kind], place)
        media = [key for key in _OF_MEDIA if part.get(key) is not None]
        if media:
            raise ValueError(f'{place}: a part of type "{kind}" holds text alone; "{media[0]}" needs a part of its own')
        return {**part, "type": "text", "text": text}
    if kind in _MEDIA:
        medium, keys = _MEDIA[kind]
        return _medium(part, medium, keys, place)
    close = difflib.get_close_matches(kind.lower(), KNOWN_TYPES, 1)
    advice = f'did you mean "{close[0]}"? Known' if close else "known"
    raise ValueError(f"{place}: no part of type {kind!r:.80} is understood; {advice}: {', '.join(KNOWN_TYPES)}")


def _text(part: Mapping[str, Any], key: str, place: _Place) -> str:
    text = part.get(key)
    if not isinstance(text, str):
        found = f"{key} = {text!r:.80}" if key in part else ", ".join(map(str, part))
        raise ValueError(f'{place}: a part of type "{part["type"]}" needs "{key}", a string; it has {found}')
    return text


def _check_known(part: Mapping[str, Any], key: str, others: tuple[str, ...], place: _Place) -> None:
    """Raise ValueError for a part that has something else in place of `key`, which may be missing."""
    unknown = [name for name in part if name not in ("type", key, *others, *_HINTS)]
    if part.get(key) is None and unknown:
        raise ValueError(f'{place}: a part of type "{part["type"]}" holds "{key}", not "{unknown[0]}"')


def _call_id(part: Mapping[str, Any], key: str, place: _Place) -> str | int | None:
    call = part.get(key)
    if call is not None and not isinstance(call, str | int):
        raise ValueError(
            f'{place}: "{key}" of a part of type "{part["type"]}" must be a string or an integer, got {call!r:.80}'
        )
    return call


def _medium(part: Mapping[str, Any], kind: str, keys: tuple[str, ...], place: _Place) -> dict[str, Any]:
    given = [key for key in _ALL_SOURCES if part.get(key) is not None]
    options = {key: value for key, value in part.items() if key not in (*_ALL_SOURCES, *_HINTS, "type")}
    if not given and part["type"] == kind:  # a placeholder without its medium, as templates accept it
        return {"type": kind, **options}
    if len(given) != 1 or given[0] not in keys:
        found, one_of = ", ".join(map(str, part)), " or ".join(f'"{key}"' for key in keys)
        raise ValueError(f'{place}: a part of type "{part["type"]}" needs one of {one_of}; it has {found}')

    def refuse(words: str) -> NoReturn:
        raise ValueError(f"{place}: {words} (it has {', '.join(map(str, part))})")

    key, value = given[0], part[given[0]]
    source = [_source(key, one, refuse) for one in value] if is_list_or_tuple(value) else _source(key, value, refuse)
    return {"type": kind, kind: source, **options}


def _source(key: str, value: Any, refuse: Callable[[str], NoReturn]) -> Any:
    """The path, bytes or object under a key of a part."""
    if is_mapping(value):
        inside = next((name for name in _INSIDE if value.get(name) is not None), None)
        if inside is None or isinstance(value[inside], Mapping):
            refuse(f'"{key}" needs one of {", ".join(_INSIDE)}; found {", ".join(map(str, value)) or "nothing"}')
        return _source(inside, value[inside], refuse)
    if key == "base64" and isinstance(value, bytes | bytearray):
        value = value.decode("latin-1")
    if key in ("base64", "data") and isinstance(value, str):
        return _from_base64(value, key, refuse)
    if not isinstance(value, str):
        return value
    if re.match(r"data:", value, re.IGNORECASE):
        return _from_data_url(value, key, refuse)
    if re.match(r"file:", value, re.IGNORECASE):
        from urllib.request import url2pathname  # here: it imports http and ssl

        address = urlsplit(value)
        if address.netloc.lower() not in ("", "localhost"):
            refuse(f"nothing is fetched from the net: {value[:80]}. Give a path, the bytes, or a data URL")
        return url2pathname(address.path)
    if re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
        refuse(f"nothing is fetched from the net: {value[:80]}. Give a path, the bytes, or a data URL")
    if key.endswith("url") and not os.path.isfile(value):
        refuse(f'"{key}" is neither a data URL nor the path of a file: {value[:80]!r}')
    return value


def _from_base64(text: str, key: str, refuse: Callable[[str], NoReturn]) -> bytes:
    """Decode base64 in the ordinary or the URL-safe alphabet, with white space and without padding as well."""
    if text.startswith("data:"):
        return _from_data_url(text, key, refuse)
    squeezed = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(squeezed + "=" * (-len(squeezed) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        refuse(f'"{key}" is no base64 ({error}): {text[:40]!r}')


def _from_data_url(url: str, key: str, refuse: Callable[[str], NoReturn]) -> bytes:
    head, comma, body = url[len("data:") :].partition(",")
    if not comma:
        refuse(f'"{key}" is a data URL without a comma: {url[:40]!r}')
    if "".join(head.lower().split()).endswith(";base64"):
        return _from_base64(unquote_to_bytes(body).decode("latin-1") if "%" in body else body, key, refuse)
    return unquote_to_bytes(body)
