# SPDX-License-Identifier: Apache-2.0
"""Parts of messages in the forms of other clients: each is understood or named in an error, in every role."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import Encoders, encoded, picture, tone, video

import gemma4
from gemma4.media.medium import Modalities, read_media
from gemma4.text.chat import ChatTemplate, check_messages, encode_chat
from gemma4.text.parts import KNOWN_TYPES, canonical

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("av")

ROLES = ("system", "user", "assistant", "tool")
QUESTION = {"type": "text", "text": "What is it?"}


def wav() -> bytes:
    import io

    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5), 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


PNG = encoded(Image.fromarray(picture(60, 90)), "PNG")
FILES = {"image": PNG, "audio": wav(), "video": video(np.stack([picture(48, 64, i) for i in range(3)]))}
MIMES = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
TEXTS = {kind: base64.b64encode(data).decode() for kind, data in FILES.items()}
URLS = {kind: f"data:{MIMES[kind]};base64,{text}" for kind, text in TEXTS.items()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media of a user")
    found = {kind: folder / f"a file.{MIMES[kind].split('/')[1]}" for kind in FILES}
    for kind, path in found.items():
        path.write_bytes(FILES[kind])
    return found


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    with gemma4.load("tiny-e") as found:
        Encoders(found, monkeypatch)
        yield found


def forms(kind: str, path: Path) -> dict[str, dict[str, Any]]:
    """One medium, as clients write it."""
    data, text, url, mime = FILES[kind], TEXTS[kind], URLS[kind], MIMES[kind]
    return {
        "bytes": {"type": kind, kind: data},
        "path": {"type": kind, kind: str(path)},
        "data URL": {"type": kind, kind: url},
        "file URL": {"type": kind, kind: path.as_uri()},
        "HF url": {"type": kind, "url": url},
        "HF url that is a path": {"type": kind, "url": str(path)},
        "HF path": {"type": kind, "path": path},
        "HF base64": {"type": kind, "base64": text, "mime_type": mime},
        "HF data set": {"type": kind, kind: {"bytes": data, "path": None}},
        "Anthropic base64": {"type": kind, "source": {"type": "base64", "media_type": mime, "data": text}},
        "Anthropic url": {
            "type": kind,
            "source": {"type": "url", "url": url},
            "cache_control": {"type": "ephemeral"},
        },
        "MCP": {"type": kind, "data": text, "mimeType": mime},
        "OpenAI url": {"type": f"{kind}_url", f"{kind}_url": {"url": url, "detail": "high"}},
        "OpenAI url alone": {"type": f"{kind}_url", f"{kind}_url": url},
        "URL-safe base64 in lines": {"type": kind, "base64": "\n".join(_lines(text.replace("+", "-").rstrip("=")))},
        "data URL with percent signs": {"type": kind, "url": f"DATA:,{quote_from_bytes(data)}"},
    }


def _lines(text: str) -> list[str]:
    return [text[i : i + 76] for i in range(0, len(text), 76)]


MORE_FORMS = {
    "Responses": {"type": "input_image", "image_url": URLS["image"], "detail": "auto"},
    "OpenAI sound": {"type": "input_audio", "input_audio": {"data": TEXTS["audio"], "format": "wav"}},
}


@pytest.mark.parametrize("kind", FILES)
def test_media_of_all_clients_are_the_same(kind: str, paths: dict[str, Path]) -> None:
    made = forms(kind, paths[kind])
    [expected] = read_media([{"role": "user", "content": [made["bytes"]]}], modalities=Modalities(True, True))
    for name, part in (made | MORE_FORMS).items():
        [found] = read_media([{"role": "user", "content": [part]}], modalities=Modalities(True, True))
        if found.kind == kind:
            assert found.digest == expected.digest, name
        else:
            assert name in MORE_FORMS
    assert [canonical([{"content": [part]}])[0]["content"][0]["type"] for part in MORE_FORMS.values()] == [
        "image",
        "audio",
    ]


def test_they_reach_the_prompt(model: Any, paths: dict[str, Path]) -> None:
    for kind in FILES:
        own = model.to_prompt([{"role": "user", "content": [{"type": kind, kind: FILES[kind]}, QUESTION]}])
        for name, part in forms(kind, paths[kind]).items():
            asked = [{"role": "user", "content": [part, {"type": "input_text", "text": "What is it?"}]}]
            before = copy.deepcopy(asked)
            found = model.to_prompt(asked)
            assert np.array_equal(found.keys(), own.keys()), name
            assert asked == before, "the caller's messages are the caller's"
    logits = model.forward(own, logits="last")
    assert np.array_equal(model.forward(found, logits="last"), logits)


def test_options_stand_beside_any_form(model: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": URLS["image"]}, "image_tokens": 140}
    [run] = model.to_prompt([{"role": "user", "content": [part]}]).runs
    assert run.medium.image_tokens == 140
    frames = [{"url": URLS["image"]}, PNG, {"type": "base64", "data": TEXTS["image"]}, URLS["image"]]
    runs = model.to_prompt([{"role": "user", "content": [{"type": "video", "video": frames, "fps": 2}]}]).runs
    assert [run.seconds()[0, 0] for run in runs] == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", ["text", "input_text", "output_text", "refusal"])
def test_texts_of_all_clients_are_the_same(model: Any, kind: str, role: str) -> None:
    def ids(content: Any) -> list[int]:
        asked = [{"role": "user", "content": "Hello"}, {"role": role, "content": content}]
        return model.to_prompt(asked).ids.tolist()

    assert ids([{"type": kind, "refusal" if kind == "refusal" else "text": "IMPORTANT"}]) == ids("IMPORTANT")


@pytest.mark.parametrize("role", ROLES)
def test_media_in_any_role(model: Any, role: str) -> None:
    part = {"type": "image_url", "image_url": {"url": URLS["image"]}}
    messages = [{"role": "user", "content": "Hello"}, {"role": role, "content": [part, QUESTION]}]
    [run] = model.to_prompt(messages).runs
    assert run.medium.content.shape == (60, 90, 3)


@pytest.mark.parametrize("role", ROLES)
def test_media_that_the_template_has_no_place_for(model: Any, role: str) -> None:
    """In this template, in tools' answers and in system messages."""
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% if m.role in ('user', 'assistant') and p.type == 'image' %}<|image|>"
        "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    model.chat_template = template
    messages = [{"role": "user", "content": "Hello"}, {"role": role, "content": [{"type": "image", "image": PNG}]}]
    if role in ("user", "assistant"):
        assert len(model.to_prompt(messages).runs) == 1
        return
    with pytest.raises(ValueError, match=r'0 places .* 1 parts of type "image"'):
        model.to_prompt(messages)


# -- Anthropic's calls and results -----------------------------------------------------------------------------------


def test_tools_as_anthropic_writes_them(model: Any) -> None:
    theirs = [
        {"role": "user", "content": [{"type": "text", "text": "Weather in Rome and Oslo?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Two cities.", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": "b", "name": "get_time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": "12:00"},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    calls = [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}},
        {"id": "b", "type": "function", "function": {"name": "get_time", "arguments": {}}},
    ]
    ours = [
        {"role": "user", "content": "Weather in Rome and Oslo?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Two cities.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "name": "get_time", "content": "12:00"},
        {"role": "tool", "tool_call_id": "a", "name": "get_weather", "content": "sunny"},
        {"role": "user", "content": "And?"},
    ]
    assert model.to_prompt(theirs).ids.tolist() == model.to_prompt(ours).ids.tolist()
    assert [message["role"] for message in canonical(theirs)] == [message["role"] for message in ours]
    text = model.to_string(model.to_prompt([*theirs[:2], {**theirs[2], "content": theirs[2]["content"][:2]}]).ids)
    assert "response:get_time{" in text and "response:get_weather{" in text and text.endswith("<tool_response|>")


def test_a_picture_that_a_tool_gave(model: Any) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TEXTS["image"]}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "here"}, image]}
    [run] = model.to_prompt([{"role": "user", "content": "Draw."}, {"role": "user", "content": [result]}]).runs
    assert run.medium.content.shape == (60, 90, 3)


def test_the_order_of_words_and_results_is_kept() -> None:
    content = [QUESTION, {"type": "tool_result", "tool_use_id": 1, "content": "a"}, {"type": "text", "text": "b"}]
    roles = [(m["role"], m["content"]) for m in canonical([{"role": "user", "content": content}])]
    assert roles == [("user", [QUESTION]), ("tool", "a"), ("user", [{"type": "text", "text": "b"}])]


@pytest.mark.parametrize(
    ("role", "part", "words"),
    [
        ("user", {"type": "tool_use", "name": "f", "input": {}}, 'type "tool_use" goes into a message of role assist'),
        ("user", {"type": "thinking", "thinking": "x"}, "goes into a message of role assistant"),
        ("assistant", {"type": "tool_result", "content": "x"}, "goes into a message of role user"),
        ("assistant", {"type": "tool_use", "input": {}}, 'needs "name", a string'),
        (
            "assistant",
            {"type": "tool_use", "id": [1], "name": "f"},
            '"id" of a part of type "tool_use" must be a string',
        ),
        ("user", {"type": "tool_result", "tool_use_id": {}, "content": "x"}, '"tool_use_id" of a part'),
        ("assistant", {"type": "thinking", "thinking": None}, 'needs "thinking", a string; it has thinking = None'),
        ("user", {"type": "tool_result", "output": "x"}, 'a part of type "tool_result" holds "content", not "output"'),
        ("assistant", {"type": "tool_use", "name": "f", "arguments": {}}, 'holds "input", not "arguments"'),
        ("user", {"type": "tool_result", "content": ["x"]}, "the content of a tool_result must be parts"),
        ("user", {"type": "tool_result", "content": [{"type": "document"}]}, "no part of type 'document'"),
    ],
)
def test_calls_and_results_in_wrong_places(role: str, part: dict, words: str) -> None:
    with pytest.raises(ValueError, match=rf"message 0, part 1 \({role}\): .*{words}"):
        check_messages([{"role": role, "content": [QUESTION, part]}])


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", ["file", "document", "Image", "image_pil", "", "input_file", "x" * 500])
def test_unknown_types_are_named(model: Any, role: str, kind: str) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": role, "content": [QUESTION, {"type": kind, "x": PNG}]}]
    calls = (model.to_prompt, model.generate, lambda m: encode_chat(model.tokenizer, model.chat_template, m))
    for call in calls:
        with pytest.raises(ValueError, match=rf"message 1, part 1 \({role}\): no part of type '{kind[:20]}") as info:
            call(messages)
        assert len(str(info.value)) < 500 and "input_image" in str(info.value)


def test_a_close_name_is_offered() -> None:
    with pytest.raises(ValueError, match='did you mean "image_url"'):
        check_messages([{"role": "user", "content": [{"type": "image-url"}]}])


MALFORMED = [
    ({"type": "text", "text": None}, 'type "text" needs "text", a string; it has text = None'),
    ({"type": "text", "text": 7}, "it has text = 7"),
    ({"type": "text", "content": "x"}, "it has type, content"),
    ({"type": "input_text"}, 'type "input_text" needs "text"'),
    ({"type": "refusal", "text": "x"}, 'needs "refusal"'),
    ({"type": "image_url"}, 'needs one of "image_url"; it has type'),
    ({"type": "input_image", "file_id": "f-1"}, 'needs one of "image_url"; it has type, file_id'),
    ({"type": "image", "image": PNG, "url": URLS["image"]}, 'needs one of "image" or .*it has type, image, url'),
    ({"type": "image_url", "image_url": {"detail": "low"}}, '"image_url" needs one of bytes.*found detail'),
    ({"type": "image_url", "image_url": {}}, "found nothing"),
    ({"type": "image_url", "image_url": {"url": {"url": "x"}}}, "found url"),
    ({"type": "image", "source": {"type": "file", "file_id": "x"}}, "found type, file_id"),
    ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "nothing is fetched.*example"),
    ({"type": "image", "image": "http://example.org/a.png"}, "nothing is fetched"),
    ({"type": "audio", "path": "s3://bucket/a.wav"}, "nothing is fetched from the net: s3://bucket"),
    ({"type": "video", "video": [PNG, "HTTPS://example.org/a.png"]}, "nothing is fetched"),
    ({"type": "image", "url": "nowhere.png"}, '"url" is neither a data URL nor the path of a file: .nowhere'),
    ({"type": "image", "base64": "&&&&"}, '"base64" is no base64'),
    ({"type": "image", "base64": "abcde"}, '"base64" is no base64'),
    ({"type": "image", "url": "data:image/png;base64,Ü"}, "no base64"),
    ({"type": "image", "url": "data:image/png;base64"}, "data URL without a comma"),
    ({"type": "text", "text": "see", "image_url": {"url": URLS["image"]}}, '"image_url" needs a part of its own'),
    ({"type": "input_text", "text": "see", "image": PNG}, '"image" needs a part of its own'),
    ({"type": "image_url", "image_url": "file://elsewhere/etc/passwd"}, "nothing is fetched from the net: file://else"),
]


BESIDE = {
    "images": [TEXTS["image"]], "image": PNG, "audio": {"id": "x"}, "videos": ["a.mp4"], "files": ["a.pdf"],
    "attachments": [{"name": "a"}], "documents": ["x"], "parts": [{"text": "x"}],
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", BESIDE)
def test_media_beside_the_content_are_not_passed_over(model: Any, role: str, name: str) -> None:
    """Ollama's and other clients' messages; empty ones hold nothing."""
    messages = [{"role": "user", "content": "Hello"}, {"role": role, "content": "x"}]
    plain = model.to_prompt(messages).ids.tolist()
    assert model.to_prompt([messages[0], messages[1] | {name: None}]).ids.tolist() == plain
    assert model.to_prompt([messages[0], messages[1] | {name: []}]).ids.tolist() == plain
    with pytest.raises(ValueError, match=rf'message 1 \({role}\): "{name}" is not read; give media as parts'):
        model.to_prompt([messages[0], messages[1] | {name: BESIDE[name]}])


def test_what_openai_puts_beside_the_content(model: Any) -> None:
    user = {"role": "user", "content": "Weather?"}
    call = {"name": "f", "arguments": '{"a": 1}'}
    ours = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    for content in ("", None):
        theirs = {"role": "assistant", "content": content, "function_call": call}
        assert "call:f{a:1}" in model.to_string(model.to_prompt([user, theirs]).ids)
        assert model.to_prompt([user, theirs]).ids.tolist() == model.to_prompt([user, ours]).ids.tolist()
        refused = {"role": "assistant", "content": content, "refusal": "No, sorry."}
        assert "No, sorry." in model.to_string(model.to_prompt([user, refused]).ids)
    with pytest.raises(ValueError, match=r"message 0 \(user\): tool calls go into a message of role assistant"):
        model.to_prompt([user | {"tool_calls": ours["tool_calls"]}])


@pytest.mark.parametrize("arguments", [[1], 7, True, "[1]", 1.5])
def test_arguments_are_objects(model: Any, arguments: Any) -> None:
    for message in (
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": arguments}]},
    ):
        with pytest.raises(ValueError, match=r"message 1: the arguments of a tool call must be"):
            model.to_prompt([{"role": "user", "content": "x"}, message])


@pytest.mark.parametrize("content", [0, False, 7, 0.0])
def test_results_that_are_false_are_said(model: Any, content: Any) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": content}
    text = model.to_string(model.to_prompt([{"role": "user", "content": [result]}]).ids)
    assert json.dumps(content) in text


def test_base64_in_bytes_and_blanks_in_a_data_url(model: Any) -> None:
    for part in (
        {"type": "image", "base64": TEXTS["image"].encode()},
        {"type": "image", "url": f"data:image/png; base64,{TEXTS['image']}"},
        {"type": "image", "url": f"data:image/png;base64 ,{TEXTS['image']}"},
    ):
        [run] = model.to_prompt([{"role": "user", "content": [part]}]).runs
        assert run.medium.content.shape == (60, 90, 3)


@pytest.mark.parametrize(("part", "words"), MALFORMED)
def test_malformed_parts_are_refused(model: Any, part: dict, words: str) -> None:
    for role in ("user", "tool"):
        asked = [{"role": "user", "content": "Hello"}, {"role": role, "content": [QUESTION, part]}]
        with pytest.raises(ValueError, match=rf"message 1, part 1 \({role}\): .*{words}"):
            model.to_prompt(asked)


def test_what_is_no_part(model: Any) -> None:
    for part in ("text", None, 7, ["x"], {"text": "x"}, {"type": None}, {"type": 7}):
        with pytest.raises(ValueError, match=r"message 0 \(user\): each part of content .* part 1 is"):
            model.to_prompt([{"role": "user", "content": [QUESTION, part]}])


@pytest.mark.parametrize("content", [0, 7, 2.5, True, False])
def test_numbers_of_tools_are_said(model: Any, content: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    found = [
        model.to_prompt([call, {"role": "tool", "content": c}]).ids.tolist() for c in (content, json.dumps(content))
    ]
    assert found[0] == found[1] and json.dumps(content) in model.to_string(found[0])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("content", [None, 7, 2.5, True, b"bytes", {"text": "x"}])
def test_content_that_is_none(model: Any, role: str, content: Any) -> None:
    with pytest.raises(ValueError, match=rf"message 1 \({role}\)"):
        model.to_prompt([{"role": "user", "content": "x"}, {"role": role, "content": content}])


# -- anything at all ---------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([
    "type", "text", "image", "audio", "video", "url", "path", "base64", "data", "source", "image_url", "input_audio",
    "content", "thinking", "name", "input", "tool_use_id", "refusal", "x",
])  # fmt: skip
STRINGS = st.sampled_from([*KNOWN_TYPES, "file", "data:,a", "data:;base64,YQ==", "http://a/b", "YQ==", "a\0b", "words"])
VALUES = st.recursive(
    STRINGS | st.none() | st.booleans() | st.integers() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
PARTS = st.dictionaries(KEYS, VALUES, max_size=4) | st.builds(
    lambda kind, rest: rest | {"type": kind}, STRINGS, st.dictionaries(KEYS, VALUES, max_size=3)
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(ROLES), st.lists(PARTS, min_size=1, max_size=3))
def test_any_parts_are_kept_or_refused(role: str, parts: list[dict]) -> None:
    """Every part comes out as a part, a call, a thought or a message, and once more the same; or a ValueError."""
    messages = [{"role": role, "content": parts}]
    try:
        found = canonical(messages)
    except ValueError as error:
        assert str(error).startswith("message 0")
        return
    kept = sum(len(message["content"]) for message in found if "tool_call_id" not in message)
    moved = sum(part["type"] in ("thinking", "tool_use", "tool_result") for part in parts)
    assert kept == len(parts) - moved
    assert canonical(found) == found
