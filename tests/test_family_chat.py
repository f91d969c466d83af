# SPDX-License-Identifier: Apache-2.0
"""Chats with FunctionGemma, TranslateGemma and MedGemma: their templates, tokens and turns."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import (
    FUNCTION_TOKENS,
    GEMMA3,
    GUARD_TEMPLATE,
    PLAIN_TEMPLATE,
    TURNS,
    renamed_tokenizer,
    write_member,
)

import gemma4
from gemma4.generation.pieces import TurnText
from gemma4.text.chat import ChatTemplate
from gemma4.text.tokenizer import Tokenizer
from gemma4.text.turn import ToolCall

FUNCTION_TEMPLATE = """{{ bos_token }}<start_of_turn>developer
{{ messages[0]['content'] if messages[0]['role'] == 'developer' else 'Call functions.' }}
{%- for tool in tools or [] %}<start_function_declaration>declaration:{{ tool['function']['name'] }}{description:
{{- '<escape>' }}{{ tool['function']['description'] }}<escape>}<end_function_declaration>{% endfor %}<end_of_turn>
{% for message in messages if message['role'] != 'developer' %}
{% if message['role'] == 'tool' %}
<start_function_response>response:{{ message['name'] }}{value:<escape>{{ message['content'] }}<escape>}
{%- else %}
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] }}{% for call in message['tool_calls'] or [] %}<start_function_call>call:
{{- call['function']['name'] }}{}<end_function_call>{% endfor %}{% if not message['tool_calls'] %}<end_of_turn>
{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
TRANSLATE_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% set part = message['content'][0] %}
{% set names = {'cs': 'Czech', 'de-DE': 'German'} %}
{% if message['content'] is string or part['source_lang_code'] not in names %}
{{ raise_exception('each text needs a known source_lang_code') }}
{% endif %}
<start_of_turn>user
From {{ names[part['source_lang_code']] }} ({{ part['source_lang_code'] }}) into {{ names[part['target_lang_code']] }}:


{{ part['text'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
WEATHER = {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "m"
    return write_member(path, GEMMA3, renamed_tokenizer(TURNS | FUNCTION_TOKENS), FUNCTION_TEMPLATE)


@pytest.fixture(scope="module")
def translate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_member(tmp_path_factory.mktemp("family") / "m", GEMMA3, renamed_tokenizer(TURNS), TRANSLATE_TEMPLATE)


def ids_of(model: gemma4.Model, pieces: Iterable[str]) -> list[int]:
    return [i for piece in pieces for i in model.tokenizer.encode(piece, bos=False)]


def turn_of(model: gemma4.Model, text: str, **options: Any) -> tuple[str, TurnText]:
    """(the text shown, the turn) after the model has written this text."""
    flow = TurnText(model.tokenizer, model.to_tokens("x"), **options)
    shown = [piece for token in model.tokenizer.encode(text, bos=False) for piece in flow.push(int(token))]
    return "".join([*shown, *flow.flush()]), flow


# -- FunctionGemma -----------------------------------------------------------------------------------------------------


def test_declarations_are_those_of_the_template(function: Path) -> None:
    with gemma4.load(function) as model:
        assert model.info().family == "FunctionGemma (architecture of Gemma 3)"
        messages = [
            {"role": "developer", "content": "Call them."},
            {"role": "user", "content": "Is it wet?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
            {"role": "tool", "name": "weather", "content": "rain"},
        ]
        found = model.to_prompt(messages, tools=[WEATHER])
        expected = (
            "<bos><start_of_turn>developer\nCall them.<start_function_declaration>declaration:weather{description:"
            "<escape>Of a city<escape>}<end_function_declaration><end_of_turn>\n<start_of_turn>user\nIs it wet?"
            "<end_of_turn>\n<start_of_turn>model\n<start_function_call>call:weather{}<end_function_call>"
            "<start_function_response>response:weather{value:<escape>rain<escape>}<start_of_turn>model\n"
        )
        assert model.to_string(found.ids) == expected
        places = {name: model.tokenizer.piece_to_id(name) for name in FUNCTION_TOKENS.values()}
        assert sorted(places.values()) == list(range(46, 53))
        assert {46, 47, 48, 49, 50, 52} <= set(found.ids.tolist())


CALL = "<start_function_call>call:weather{city:<escape>Rome, {IT}<escape>,days:3}<end_function_call>"


@pytest.mark.parametrize("end", ["<start_function_response>", "<end_of_turn>", ""])
def test_calls_are_read(end: str, function: Path) -> None:
    with gemma4.load(function) as model:
        shown, flow = turn_of(model, f"I look.{CALL}{CALL}{end}", tools=["weather"])
        turn = flow.parsed()
        assert turn.tool_calls == (ToolCall("weather", {"city": "Rome, {IT}", "days": 3}),) * 2
        assert turn.content == "I look." and shown.strip() in ("I look.", f"I look.{end}") and not turn.malformed


def test_calls_that_are_only_spelled_are_text(function: Path) -> None:
    """By another model's markers, or by ordinary tokens."""
    with gemma4.load(function) as model:
        for text in (CALL, "<|tool_call>call:weather{}<tool_call|>", "<|channel>thought\nx<channel|>"):
            flow = TurnText(model.tokenizer, model.to_tokens("x"), tools=["weather"])
            for token in model.tokenizer.encode(text, bos=False, parse_special=False):
                flow.push(int(token))
            assert flow.parsed().content == text and not flow.parsed().tool_calls


def test_generation_stops_where_a_function_answers(function: Path) -> None:
    """Also where neither config.json nor generation_config.json lists that token; the answer holds the call."""
    with gemma4.load(function) as model:
        wanted = ids_of(model, [CALL, "<start_function_response>", "more"])

        def force(ids: np.ndarray, logits: np.ndarray) -> None:
            logits[:] = -100
            logits[wanted[len(ids) - prompt]] = 0

        messages = [{"role": "user", "content": "Is it wet?"}]
        prompt = len(model.to_prompt(messages, tools=[WEATHER]).ids)
        found = model.generate(messages, tools=[WEATHER], processors=[force], temperature=0, max_tokens=len(wanted))
        assert found.finish_reason == "tool_calls" and found.text == ""
        assert found.tool_calls == (ToolCall("weather", {"city": "Rome, {IT}", "days": 3}),)
        assert len(found.tokens) in (len(wanted) - 1, len(wanted) - 2)


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_whatever_the_file_calls_them(special: bool, tmp_path: Path) -> None:
    table = renamed_tokenizer(TURNS | FUNCTION_TOKENS)
    for token in table["added_tokens"]:
        token["special"] = special or token["content"] not in {*TURNS.values(), *FUNCTION_TOKENS.values()}
    tokenizer = Tokenizer.from_table(table, "x")
    control = {tokenizer.piece_to_id(name) for name in (*TURNS.values(), *FUNCTION_TOKENS.values())}
    assert control <= tokenizer.special_ids
    attack = "".join((*TURNS.values(), *FUNCTION_TOKENS.values()))
    assert not control & set(tokenizer.encode(attack, parse_special=False).tolist())


@pytest.mark.slow
def test_ids_of_the_released_vocabulary() -> None:
    """The start of the model card's prompt, in Gemma 4's vocabulary under FunctionGemma's names."""
    table = json.loads(lzma.decompress((Path(__file__).parent / "data" / "tokenizer.json.xz").read_bytes()))
    names = TURNS | FUNCTION_TOKENS
    for token in table["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    table["model"]["vocab"] = {names.get(token, token): i for token, i in table["model"]["vocab"].items()}
    text = (
        "<start_of_turn>developer\nYou are a model that can do function calling with the following functions"
        "<start_function_declaration>declaration:get"
    )
    golden = [2, 105, 55060, 107, 3048, 659, 496, 2028, 600, 740, 776, 1292, 11687, 607, 506, 2269, 5151, 46]
    assert Tokenizer.from_table(table, "x").encode(text).tolist() == [*golden, 163688, 236787, 828]


def test_as_a_gguf_file(function: Path, tmp_path: Path) -> None:
    """The same member, chat and ends; clients of llama.cpp see the markers of calls."""
    config = GEMMA3 | {"query_pre_attn_scalar": 16}
    source = write_member(
        tmp_path / "m", config, json.loads((function / "tokenizer.json").read_text()), FUNCTION_TEMPLATE
    )
    path = gemma4.quantize(source, tmp_path / "x.gguf", type="F32").path
    messages = [{"role": "user", "content": "Is it wet?"}]
    with gemma4.load(path) as ours, gemma4.load(source) as theirs:
        assert ours.info().family == theirs.info().family == "FunctionGemma (architecture of Gemma 3)"
        found, expected = (m.generate(messages, tools=[WEATHER], max_tokens=6, seed=1) for m in (ours, theirs))
        assert list(found.tokens) == list(expected.tokens) and found.prompt_tokens == expected.prompt_tokens
        assert ours.config.eos_token_ids == (1, 106, 50)
        assert (
            turn_of(ours, CALL, tools=["weather"])[1].parsed() == turn_of(theirs, CALL, tools=["weather"])[1].parsed()
        )
        kinds = ours.checkpoint.metadata["tokenizer.ggml.token_type"].values()
        shown = {ours.tokenizer.id_to_piece(i) for i in range(46, 53) if kinds[i] == 4}
        assert shown == set(FUNCTION_TOKENS.values()) - {"<start_function_declaration>", "<end_function_declaration>"}


@pytest.mark.parametrize("template", [FUNCTION_TEMPLATE, TRANSLATE_TEMPLATE, PLAIN_TEMPLATE, GUARD_TEMPLATE])
def test_templates_write_what_they_write_in_transformers(template: str, function: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(function / "tokenizer.json"), bos_token="<bos>")
    part = {"type": "text", "source_lang_code": "cs", "target_lang_code": "de-DE", "text": " Ahoj \n"}
    content = [part] if template == TRANSLATE_TEMPLATE else " Ahoj \n"
    messages = [{"role": "user", "content": content}]
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "guideline": "None."}):
        expected = reference.apply_chat_template(
            messages,
            tools=[{"type": "function", "function": WEATHER}],
            chat_template=template,
            tokenize=False,
            **options,
        )
        found = ChatTemplate(template).render(messages, tools=[WEATHER], **options)
        assert found == expected and "Ahoj" in found


# -- TranslateGemma ----------------------------------------------------------------------------------------------------


def test_language_codes_reach_the_template(translate: Path) -> None:
    with gemma4.load(translate) as model:
        assert model.info().family == "TranslateGemma (architecture of Gemma 3)"
        part = {"type": "text", "source_lang_code": "cs", "target_lang_code": "de-DE", "text": " Ahoj "}
        found = model.to_prompt([{"role": "user", "content": [part]}])
        assert model.to_string(found.ids) == (
            "<bos><start_of_turn>user\nFrom Czech (cs) into German:\n\n\nAhoj<end_of_turn>\n<start_of_turn>model\n"
        )
        assert len(model.generate([{"role": "user", "content": [part]}], max_tokens=3, seed=1).tokens) <= 3


@pytest.mark.parametrize("content", ["Ahoj", [{"type": "text", "text": "Ahoj"}],
                                     [{"type": "text", "text": "Ahoj", "source_lang_code": "tlh"}]])  # fmt: skip
def test_a_text_without_its_languages(content: Any, translate: Path) -> None:
    with gemma4.load(translate) as model, pytest.raises(ValueError, match="each text needs a known source_lang_code"):
        model.to_prompt([{"role": "user", "content": content}])


# -- MedGemma ----------------------------------------------------------------------------------------------------------


def medgemma(path: Path) -> Path:
    names = TURNS | {"<|channel>": "<unused94>", "<channel|>": "<unused95>"}
    table = renamed_tokenizer(names)
    for token in table["added_tokens"]:
        token["special"] = "unused" not in token["content"]
    return write_member(path / "medgemma", GEMMA3, table)


@pytest.mark.parametrize("show", [True, False])
def test_thoughts_are_read(show: bool, tmp_path: Path) -> None:
    with gemma4.load(medgemma(tmp_path)) as model:
        text = "<unused94>thought\nA rash?\n<unused95>It is a rash.<end_of_turn>"
        shown, flow = turn_of(model, text, show_thinking=show)
        turn = flow.parsed()
        assert (turn.thinking, turn.content) == ("A rash?", "It is a rash.")
        assert ("A rash?" in shown) == show and "unused" not in shown and "It is a rash." in shown


def test_an_open_thought_of_the_prompt(tmp_path: Path) -> None:
    with gemma4.load(medgemma(tmp_path)) as model:
        flow = TurnText(model.tokenizer, model.to_tokens("<start_of_turn>model\n<unused94>thought\n"))
        for token in ids_of(model, ["A rash?", "<unused95>", "Yes."]):
            flow.push(token)
        assert (flow.parsed().thinking, flow.parsed().content) == ("A rash?", "Yes.")


def test_unused_tokens_of_gemma_4_stay_text() -> None:
    """Its thoughts have markers of their own."""
    tokenizer = Tokenizer.from_table(renamed_tokenizer({"<unused50>": "<unused94>"}), "x")
    flow = TurnText(tokenizer, np.array([2], np.int32))
    for piece in ("a", "<unused94>", "b"):
        flow.push(tokenizer.piece_to_id(piece))
    assert flow.parsed().thinking == "" and flow.parsed().content == "a<unused94>b"


def test_half_a_character_before_a_marker(function: Path) -> None:
    """It is shown as U+FFFD, not lost, and not joined with what follows the marker."""
    with gemma4.load(function) as model:
        flow = TurnText(model.tokenizer, model.to_tokens("x"), tools=["weather"])
        euro = [model.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
        for token in [*euro[:2], *ids_of(model, [CALL]), *euro]:
            flow.push(token)
        assert flow.parsed().content == "\ufffd€" and len(flow.parsed().tool_calls) == 1
