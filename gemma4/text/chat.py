# SPDX-License-Identifier: Apache-2.0
"""Messages to a prompt, by the checkpoint's own chat template, and a model's turn back into its parts.

A template is an untrusted program: it sees only plain JSON values, its size and its output are bounded, and it
runs in a metered sandbox (gemma4/text/sandbox.py). The same template writes the same bytes as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.narrow import is_dict, is_list, is_list_or_tuple, is_mapping, is_sequence
from gemma4.text.parts import canonical
from gemma4.text.sandbox import Meter, Sandbox, metered
from gemma4.text.tokenizer import Tokenizer
from gemma4.text.turn import ModelTurn, ToolCall, parse_turn

__all__ = ["ChatTemplate", "ModelTurn", "ToolCall", "encode_chat", "parse_turn"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_TEMPLATE, _MAX_OUTPUT, _MAX_DEPTH = 1 << 20, 1 << 26, 64
_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
# Names of thoughts in other formats; the first is passed on
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PLACES = ("<|image|>", "<|audio|>", "<|video|>")  # a template's placeholders for parts that are not text
_BOM = "\ufeff"  # some editors put it before a file's text
_SEAM = "\ue0f4"  # private-use character that marks a cut through a control token


class ChatTemplate:
    """A compiled chat template. Raises FormatError if the source is blank, not valid jinja2 or longer than 1 MiB.

    tokens: what the template may write as bos_token, eos_token, pad_token, unk_token.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        if len(source) > _MAX_TEMPLATE:
            raise FormatError(f"the chat template has {len(source)} characters, the limit is {_MAX_TEMPLATE}")
        self.source = source.removeprefix(_BOM)
        if is_blank(self.source):
            raise FormatError("the chat template is empty: it would leave out every message")
        self.tokens = _TOKENS | dict(tokens or {})
        try:
            with metered(Meter()):
                self._template = Sandbox().from_string(self.source)
        except MemoryError:
            raise
        except Exception as error:  # the compiler passes on any error that the source causes in Python
            raise FormatError(f"the chat template is not valid: {_words(error)[:300]}") from None

    @classmethod
    def load(cls, directory: str | Path) -> ChatTemplate | None:
        """From chat_template.jinja, else chat_template.json, else tokenizer_config.json; None if none has a template.

        A blank one counts as none. Raises FormatError if one of them is damaged.
        """
        directory = Path(directory)
        config = _json_object(directory / "tokenizer_config.json")
        tokens = {name: text for name in _TOKENS if (text := _token_text(config.get(name))) is not None}
        file = directory / "chat_template.jinja"
        if file.is_file() and not is_blank(text := _read_text(file)):
            return cls(text, tokens)
        for table in (_json_object(directory / "chat_template.json"), config):
            source = _named_template(table.get("chat_template"))
            if source is not None and not is_blank(source):
                return cls(source, tokens)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> str:
        """The prompt, which starts with bos_token exactly once.

        messages: {"role": system|developer|user|assistant|tool, "content": str or parts, ...}; see `check_messages`.
        Parts of unknown types are passed to the template.
        tools: JSON schemas ({"type": "function", "function": {...}}, or the inner object alone).
        enable_thinking None leaves the template's default; kwargs are passed to the template unchanged.
        Raises ValueError (bad messages or tools, or the template itself refused them: the message has its text).
        """
        values: dict[str, Any] = {**self.tokens, **_plain(kwargs), "add_generation_prompt": bool(add_generation_prompt)}
        values |= {"messages": check_messages(messages, others=True), "tools": _tools(tools)}
        values.setdefault("documents", None)
        if enable_thinking is not None:
            values["enable_thinking"] = bool(enable_thinking)
        return self._once(self._run(values))

    def _run(self, values: dict[str, Any]) -> str:
        out: list[str] = []
        size = 0
        try:
            with metered(Meter(_length(values))):
                for text in self._template.generate(values):
                    out.append(text)
                    size += len(text)
                    if size > _MAX_OUTPUT:
                        raise jinja2.TemplateError(f"it wrote more than {_MAX_OUTPUT} characters")
        except MemoryError:
            raise
        except Exception as error:  # any error of an untrusted program
            raise ValueError(f"the chat template failed: {_words(error)[:500]}") from error
        return "".join(out)

    def _once(self, text: str) -> str:
        """The text with one bos_token in front, also if whitespace precedes the template's own."""
        bos = self.tokens["bos_token"]
        while bos and text.lstrip().startswith(bos):
            text = text.lstrip()[len(bos) :]
        return bos + text


def is_blank(source: str) -> bool:
    """Whether a template writes nothing, whatever the messages."""
    return not source.removeprefix(_BOM).strip()


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _length(value: Any) -> int:
    """Characters of a plain JSON value."""
    if is_dict(value):
        return sum(len(key) + _length(item) for key, item in value.items() if isinstance(key, str))
    if is_list(value):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str) else 8


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, object]],
    *,
    trust_content: bool = True,
    distrusted: Collection[str] = ("user", "tool"),
    expand: Callable[[str], str] | None = None,
    tools: Sequence[Mapping[str, object]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    **kwargs: object,
) -> NDArray[np.int32]:
    """Messages to token ids, int32 [pos], <bos> exactly once. Other options as in `ChatTemplate.render`.

    trust_content=False keeps messages of the `distrusted` roles from writing control tokens: "<|turn>" in them becomes
    characters.
    expand: rewrites the rendered prompt, replacing the template's <|image|>, <|audio|>, <|video|> by media; in the
    messages' text these stay characters.
    Raises ValueError as `ChatTemplate.render`, and if the template omitted part of a message; the model's own turns may
    lose theirs, unless they are distrusted.
    """
    messages = check_messages(messages)
    if not trust_content or expand is not None:
        places = _any_of(_PLACES if expand else ())
        control = places if trust_content else _any_of(tokenizer.id_to_piece(token) for token in tokenizer.special_ids)
        messages = [_guard(m, control if m["role"] in distrusted else places) for m in messages]
    text = template.render(
        messages,
        tools=tools,
        enable_thinking=enable_thinking,
        add_generation_prompt=add_generation_prompt,
        **kwargs,
    )
    checked = [m["role"] != "assistant" or m["role"] in distrusted for m in messages]
    _check_kept(messages, checked, text.removeprefix(template.tokens["bos_token"]))
    _check_tools_kept(_tools(tools) or (), text)
    if trust_content and expand is None:
        return tokenizer.encode(text)
    # A control token cut in two is encoded as two texts, neither of which is one.
    first, *rest = (expand(text) if expand else text).split(_SEAM)
    return np.concatenate([tokenizer.encode(first), *(tokenizer.encode(text, bos=False) for text in rest)])


def _check_kept(messages: Sequence[Mapping[str, object]], checked: Sequence[bool], prompt: str) -> None:
    """Raise ValueError if a template omitted part of a checked message.

    White space does not count: templates trim. Texts usually follow the order of the messages.
    """
    prompt, at = _squeezed(prompt), 0
    for i, message in enumerate(messages):
        for text in _texts(message["content"]) if checked[i] else ():
            for words in (_squeezed(text), _squeezed(json.dumps(text, ensure_ascii=False)[1:-1])):
                found = prompt.find(words, at)
                found = prompt.find(words) if found < 0 else found
                if found >= 0:
                    break
            else:
                raise ValueError(
                    f"the chat template left out the text of message {i} ({message['role']}): {text!r:.80}; it was not "
                    "written for this kind of content"
                )
            at = found + len(words)


def _check_tools_kept(tools: Iterable[Mapping[str, Any]], prompt: str) -> None:
    names = [str(tool["function"]["name"]) for tool in tools]
    lost = [name for name in names if name not in prompt]
    if lost:
        raise ValueError(f"the chat template left out the tool {lost[0]!r:.80}: it was not written for tools")


def _texts(content: Any) -> list[str]:
    parts = content if is_list(content) else [{"type": "text", "text": content}]
    return [part["text"] for part in parts if part["type"] == "text" and isinstance(part.get("text"), str)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _any_of(pieces: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(pieces, key=len, reverse=True))) or r"(?!)")


def _guard(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda m: m[0][0] + _SEAM + m[0][1:], value.replace(_SEAM, ""))
    if is_dict(value):
        return {key: item if key in ("role", "type") else _guard(item, pattern) for key, item in value.items()}
    return [_guard(item, pattern) for item in value] if is_list(value) else value


def check_messages(messages: Sequence[Mapping[str, object]], *, others: bool = False) -> list[dict[str, Any]]:
    """A copy of the messages in plain JSON types, checked. "model" is read as "assistant".

    Each needs a known role and content: a string, or a list of parts (gemma4/text/parts.py), or (assistant) tool_calls
    or tool_responses instead. JSON strings in tool_calls' arguments are parsed, as templates expect mappings.
    Thoughts under "thinking" or "reasoning" also go to "reasoning_content". others: parts of unknown types
    are accepted. Raises ValueError naming the message.
    """
    if isinstance(messages, str | bytes | Mapping) or not is_sequence(messages):
        raise ValueError(f'messages must be a list of {{"role", "content"}} objects, got {type(messages).__name__}')
    if not messages:
        raise ValueError("there are no messages")
    return [_check_message(i, _plain(message)) for i, message in enumerate(canonical(messages, others=others))]


def _check_message(i: int, message: Any) -> dict[str, Any]:
    if not is_dict(message):
        raise ValueError(f"message {i} must be an object with role and content, got {message!r:.80}")
    role = "assistant" if message.get("role") == "model" else message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {i} has the role {role!r:.80}; known: {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and not (role == "assistant" and (message.get("tool_calls") or message.get("tool_responses"))):
        raise ValueError(f"message {i} ({role}) has no content")
    if role != "tool" and not isinstance(content, str | list | None):
        raise ValueError(f"message {i} ({role}): content must be a string or a list of parts, got {content!r:.80}")
    message = {**message, "role": role}
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _check_calls(i, message["tool_calls"])
    thoughts = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _check_calls(i: int, calls: Any) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for call in calls if is_list(calls) else [calls]:
        function = call.get("function", call) if is_dict(call) else None
        if not is_dict(call) or not is_dict(function) or not isinstance(function.get("name"), str):
            wanted = '{"function": {"name", "arguments"}}'
            raise ValueError(f"message {i}: a tool call must be {wanted}, got {call!r:.80}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json_arguments(i, arguments)
        if arguments is not None and not isinstance(arguments, dict):
            raise ValueError(f"message {i}: the arguments of a tool call must be an object, got {arguments!r:.80}")
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out


def _json_arguments(i: int, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not is_dict(arguments):
        raise ValueError(f"message {i}: the arguments of a tool call must be a JSON object, got {text!r:.80}")
    return arguments


def _tools(tools: Sequence[Mapping[str, object]] | None) -> list[dict[str, Any]] | None:
    out: list[dict[str, Any]] = []
    for tool in tools or ():
        plain: Any = _plain(tool) if is_mapping(tool) else None
        if plain is not None and "function" not in plain and "name" in plain:
            plain = {"type": "function", "function": plain}
        if plain is None or not is_dict(function := plain.get("function")) or not isinstance(function.get("name"), str):
            raise ValueError(f'a tool must be {{"type": "function", "function": {{"name", …}}}}, got {tool!r:.80}')
        out.append(plain)
    return out or None


def _plain(value: Any, depth: int = 0) -> Any:
    """value in exact JSON types; any other value (an image, an array) becomes "<its type>", which no template reads."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages, tools and template arguments may be nested {_MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if is_mapping(value):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if is_list_or_tuple(value):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item(), depth + 1)
    if isinstance(value, str):
        return str.__str__(value)  # enums and other subclasses, as plain str
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return f"<{type(value).__name__}>"


def _read_text(file: Path) -> str:
    if file.stat().st_size > 4 * _MAX_TEMPLATE:
        raise FormatError(f"{file} has {file.stat().st_size} bytes: too long for a chat template")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8: {error}") from None


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON object, {} if the file is not there. tokenizer_config.json may be a few megabytes."""
    if not file.is_file():
        return {}
    if file.stat().st_size > 64 << 20:
        raise FormatError(f"{file} has {file.stat().st_size} bytes, the limit is 64 MiB")
    try:
        table = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON: {str(error)[:200]}") from None
    if not is_dict(table):
        raise FormatError(f"{file}: expected a JSON object, found {type(table).__name__}")
    return table


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or {"content": string}."""
    text = value.get("content") if is_dict(value) else value
    return text if isinstance(text, str) else None


def _named_template(value: Any) -> str | None:
    """A template, or the one named "default" of a list of {"name", "template"}."""
    if value is None or isinstance(value, str):
        return value
    if is_list(value):
        for entry in value:
            if is_dict(entry) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return entry["template"]
    raise FormatError('"chat_template" must be a string or a list with a template named "default"')
