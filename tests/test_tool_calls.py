# SPDX-License-Identifier: Apache-2.0
"""Tool calls as models write them when they do not keep to the format: read where there is one meaning, never lost."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import gemma4
from gemma4.generation.pieces import TurnText
from gemma4.text.turn import ModelTurn, ToolCall, parse_turn

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
Q = '<|"|>'
TOOLS = ["weather", "note", "shell", "now", "pdf:make", "fs.read"]
OPEN, CLOSE = "<|tool_call>", "<tool_call|>"

REPAIRED = {
    "single quotes": ("call:weather{city:'Rome, IT'}", "weather", {"city": "Rome, IT"}),
    "single quotes around braces": ("call:note{a:'x',b:'1, 2: {3}'}", "note", {"a": "x", "b": "1, 2: {3}"}),
    "apostrophe in single quotes": ("call:note{a:'it's so', b:2}", "note", {"a": "it's so", "b": 2}),
    "escaped apostrophe": (r"call:note{a:'it\'s so'}", "note", {"a": "it's so"}),
    "single quoted keys": ("call:note{'a':'x','b':1}", "note", {"a": "x", "b": 1}),
    "triple quotes": ("call:note{a:'''x 'y' z'''}", "note", {"a": "x 'y' z"}),
    "parentheses": (f"call:weather(city={Q}Rome{Q}, days=3)", "weather", {"city": "Rome", "days": 3}),
    "parentheses, colons": ('call:weather(city: "Rome")', "weather", {"city": "Rome"}),
    "parentheses, nested": ("call:note(a=[1, 2], b={'c': f(1)})", "note", {"a": [1, 2], "b": {"c": "f(1)"}}),
    "parentheses around an object": ('call:weather({"city": "Rome"})', "weather", {"city": "Rome"}),
    "empty parentheses": ("call:now()", "now", {}),
    "equals signs": ("call:note{a=1, b='x=y'}", "note", {"a": 1, "b": "x=y"}),
    "no braces": ("call:now", "now", {}),
    "no prefix": (f"weather{{city:{Q}Rome{Q}}}", "weather", {"city": "Rome"}),
    "spaces": (f"call: weather {{city: {Q}Rome{Q} }}", "weather", {"city": "Rome"}),
    "colon after the name": ('weather: {"city": "Rome"}', "weather", {"city": "Rome"}),
    "quoted name": ('call:"weather"{city:"Rome"}', "weather", {"city": "Rome"}),
    "missing comma": (f"call:note{{a:{Q}x{Q}b:90}}", "note", {"a": "x", "b": 90}),
    "missing comma after a number": (
        "call:note{a:1 b:2\n c:true d:[3]}",
        "note",
        {"a": 1, "b": 2, "c": True, "d": [3]},
    ),
    "missing comma in a list": (f"call:note{{a:[{Q}x{Q} {Q}y{Q}]}}", "note", {"a": ["x", "y"]}),
    "missing comma after JSON": ('call:note{"a":"x" "b":{"c":1} "d":2}', "note", {"a": "x", "b": {"c": 1}, "d": 2}),
    "last quote missing": (f"call:shell{{cmd:{Q}ls -la}}", "shell", {"cmd": "ls -la"}),
    "last quote missing, nested": (f"call:note{{a:{{b:[{Q}x]}}}}", "note", {"a": {"b": ["x"]}}),
    "last quote missing, braces inside": (f"call:shell{{cmd:{Q}f() {{ x; }}}}", "shell", {"cmd": "f() { x; }"}),
    "last JSON quote missing": ('call:shell{"cmd":"ls -la}', "shell", {"cmd": "ls -la"}),
    "closed with another quote": (f'call:shell{{cmd:{Q}ls -la"}}', "shell", {"cmd": "ls -la"}),
    "opened with another quote": (f'call:shell{{cmd:"ls -la{Q}}}', "shell", {"cmd": "ls -la"}),
    "quotes inside, last one missing": (f'call:shell{{cmd:{Q}echo "a"}}', "shell", {"cmd": 'echo "a"'}),
    "brace missing": (f"call:shell{{cmd:{Q}ls{Q}", "shell", {"cmd": "ls"}),
    "brace missing after a number": ("call:note{a:1", "note", {"a": 1}),
    "brace missing after words": ("call:shell{cmd:ls -la", "shell", {"cmd": "ls -la"}),
    "bracket missing": ("call:note{a:[1,2}", "note", {"a": [1, 2]}),
    "inner brace missing": ("call:note{a:{b:1}", "note", {"a": {"b": 1}}),
    "parenthesis missing": ("call:note(a=1", "note", {"a": 1}),
    "only the brace": ("call:now{", "now", {}),
    "brace too many": ("call:note{a:1}}", "note", {"a": 1}),
    "words": ("call:shell{cmd:ls -la TMP, cwd:/}", "shell", {"cmd": "ls -la TMP", "cwd": "/"}),
    "words with braces": ("call:shell{cmd:awk '{print $1}' f}", "shell", {"cmd": "awk '{print $1}' f"}),
    "words with commas": ("call:note{a:one, two, b:3}", "note", {"a": "one, two", "b": 3}),
    "words with a colon": ("call:note{a:http://x.y/z?a=b,b:12:30}", "note", {"a": "http://x.y/z?a=b", "b": "12:30"}),
    "words with signs": ("call:shell{cmd:sort < a.txt}", "shell", {"cmd": "sort < a.txt"}),
    "no value": ("call:note{a:,b:2}", "note", {"a": "", "b": 2}),
    "quotes in JSON": ('call:note{"a":"say "hi" now","b":1}', "note", {"a": 'say "hi" now', "b": 1}),
    "brace in JSON": ('call:note{"a": "has } brace"}', "note", {"a": "has } brace"}),
    "path of Windows": (r'call:note{"a":"C:\Users\x"}', "note", {"a": r"C:\Users\x"}),
    "JSON call": ('{"name": "note", "arguments": {"a": 1}}', "note", {"a": 1}),
    "JSON call, parameters": ('call:{"name": "note", "parameters": {"a": null}}', "note", {"a": None}),
    "JSON call, arguments as text": (r'{"name": "note", "arguments": "{\"a\": 1}"}', "note", {"a": 1}),
    "JSON call without arguments": ('{"name": "now"}', "now", {}),
    "JSON call of OpenAI": ('{"type":"function","function":{"name":"now","arguments":{}}}', "now", {}),
    "call of Python": ("{'name': 'note', 'arguments': {'a': None, 'b': True}}", "note", {"a": None, "b": True}),
    "fence": ('```json\n{"name": "note", "arguments": {"a": 1}}\n```', "note", {"a": 1}),
    "namespaces": (f"call:google:mcp:fs.read{{p:{Q}a{Q}}}", "fs.read", {"p": "a"}),
    "namespace with a dot": (f"call:default_api.weather{{city:{Q}Rome{Q}}}", "weather", {"city": "Rome"}),
    "name with a colon": ("call:pdf:make{a:1}", "pdf:make", {"a": 1}),
    "name with a dot": ("call:fs.read{a:'x'}", "fs.read", {"a": "x"}),
    "typographic quotes": (
        "call:note{a:“Rome, b: 2”,b:«x»,“c”:‘it’s’}",
        "note",
        {"a": "Rome, b: 2", "b": "x", "c": "it’s"},
    ),
    "backticks": ("call:shell{cmd:`ls -la`}", "shell", {"cmd": "ls -la"}),
    "a single quoted key alone": ("call:note{'a':1}", "note", {"a": 1}),
    "an equals sign in words": ("call:note{a=x:1}", "note", {"a": "x:1"}),
    "another separator in the name": ("call:mcp:fs:read{p:1}", "fs.read", {"p": 1}),
    "the same member twice": ("call:note{a:1,a:1}", "note", {"a": 1}),
    "JSON call with an id": (
        '{"id": "c1", "type": "function", "name": "note", "arguments": {"a": 1}}',
        "note",
        {"a": 1},
    ),
    "the marker of a turn's end": (f"call:note{{a:{Q}say <turn|> now{Q}}}", "note", {"a": "say <turn|> now"}),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_one_meaning_is_read(name):
    body, tool, arguments = REPAIRED[name]
    expected = ModelTurn("", "", (ToolCall(tool, arguments),))
    for end in (f"{CLOSE}<|tool_response>", CLOSE, "<|tool_response>"):
        assert parse_turn(f"{OPEN}{body}{end}", tools=TOOLS) == expected


@pytest.mark.parametrize("name", REPAIRED)
def test_only_offered_tools_are_called(name):
    """What a stranger's text might make the model write must not become a call by repair."""
    body, tool, _ = REPAIRED[name]
    turn = parse_turn(f"{OPEN}{body}{CLOSE}", tools=["other"])
    assert tool in ("fs.read", "weather", "note", "shell") or not turn.tool_calls
    bare = parse_turn(f"{body}{CLOSE}", tools=["other"])
    assert not bare.tool_calls and bare.content == parse_turn(body).content


REFUSED = {
    "other syntax": "call:note:BEGIN_ARG a END_ARG",
    "nobody's namespace": "call:mcp:other{a:1}",
    "quote token inside": f"call:note{{a:{Q}x = {Q}y{Q}{Q}}}",
    "members in an open string": f"call:note{{a:{Q}Rome, days:3}}",
    "open apostrophe": "call:note{a:'tis the season}",
    "semicolons": "call:note{a:x;b:2}",
    "lines": "call:note{a:x\n b:y}",
    "no keys": "call:weather('Rome')",
    "brackets": "call:note[a:1]",
    "two commas": "call:note{a:1,,b:2}",
    "rest": "call:note{a:'x'} and more",
    "rest after a list": "call:note(a=[1]) and more",
    "rest after words": "call:note{a:x} and more",
    "rest after nested words": "call:note{a:{b:x}} and more",
    "a quote token at the end of words": f"call:note{{a:Rome{Q}}}",
    "open braces inside": f"call:shell{{cmd:{Q}f() {{ x}}",
    "JSON without a name": '{"arguments": {"a": 1}}',
    "JSON with a list of arguments": '{"name": "note", "arguments": [1]}',
    "JSON with words as arguments": '{"name": "note", "arguments": "x"}',
    "one of two calls is nobody's": '[{"name": "note"}, {"name": "rm"}]',
    "members beside the name": '{"name": "weather", "city": "Rome"}',
    "members beside the function": '{"function": {"name": "note"}, "arguments": {"a": 1}}',
    "arguments twice": '{"name": "note", "arguments": {}, "parameters": {"a": 1}}',
    "two values of one member": "call:note{a:1,a:2}",
    "two values of one member in words": "call:note{a:'x',a:'y'}",
    "two values of one member in JSON text": r'{"name": "note", "arguments": "{\"a\": 1, \"a\": 2}"}',
    "an open typographic quote": "call:note{a:“Rome}",
    "no calls": "[]",
    "words": "I would call note.",
    "too deep": "call:note{a:" + "[" * 100 + "'x'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_several_meanings_are_kept_as_text(name):
    body = REFUSED[name]
    assert parse_turn(f"{OPEN}{body}{CLOSE}Hm.", tools=TOOLS) == ModelTurn("Hm.", malformed=(body,))


@pytest.mark.parametrize("name", REPAIRED)
def test_cut_off_calls_are_not_completed(name):
    """Without a mark of the model's that the call is whole, its last value may be half of what it was to be."""
    body, tool, arguments = REPAIRED[name]
    turn = parse_turn(f"{OPEN}{body}", tools=TOOLS)
    whole = not re.search("missing|no braces|only the brace|another quote", name) or "comma" in name
    assert turn == ModelTurn("", "", (ToolCall(tool, arguments),) if whole else (), () if whole else (body,))


def test_several_calls_at_once():
    text = '[{"name": "now"}, {"name": "note", "arguments": {"a": 1}}]'
    both = (ToolCall("now"), ToolCall("note", {"a": 1}))
    assert parse_turn(OPEN + text + CLOSE, tools=TOOLS).tool_calls == both
    text = f"{OPEN}call:now(){CLOSE}{OPEN}call:note{{a:1{CLOSE}<|tool_response>"
    assert parse_turn(text, tools=TOOLS).tool_calls == both
    assert parse_turn(f"{OPEN}call:now{{}}call:note{{a:1}}{CLOSE}", tools=TOOLS).tool_calls == both
    text = f"{OPEN}call:weather{{city:{Q}Rome}}{CLOSE}{OPEN}call:weather{{city:{Q}Paris{Q}}}{CLOSE}"
    assert [call.arguments["city"] for call in parse_turn(text, tools=TOOLS).tool_calls] == ["Rome", "Paris"]


@pytest.mark.parametrize("between", ["", ",", ";\n", " ", "}", "."])
def test_what_follows_a_call_is_not_lost(between):
    """A second call, read or not, and words: before the closing token, and where there is none."""
    first, second = ToolCall("note", {"a": 1}), ToolCall("weather", {"city": "Rome"})
    for end in (CLOSE, f"{CLOSE}<turn|>", "<turn|>", "<|tool_response>", ""):
        read = parse_turn(f"{OPEN}call:note{{a:1}}{between}call:weather{{city:{Q}Rome{Q}}}{between}{end}", tools=TOOLS)
        assert read == ModelTurn("", "", (first, second))
        read = parse_turn(f"{OPEN}call:note{{a:1}}{between}call:weather{{city:'Rome'}}{end}", tools=TOOLS)
        assert read == ModelTurn("", "", (first, second))
        read = parse_turn(f"{OPEN}call:note{{a:1}}{between}now and more{end}", tools=TOOLS)
        assert read == ModelTurn("", "", (first,), ("now and more",))
    read = parse_turn(f"{OPEN}call:note{{a:1}}{between}call:note{{a:'x, b:2}}{CLOSE}Hm.", tools=TOOLS)
    assert read == ModelTurn("Hm.", "", (first,), ("call:note{a:'x, b:2}",))


def test_many_calls_in_one_stretch():
    text = OPEN + "call:note{a:1}" * 5000 + CLOSE
    assert len(parse_turn(text, tools=TOOLS).tool_calls) == 5000


def test_separators_that_several_tools_differ_in():
    for tools, name in ((["a.b", "a:b"], None), (["a.b", "a:b", "b"], "b"), (["a/b"], "a/b")):
        calls = parse_turn(f"{OPEN}call:a/b{{x:1}}{CLOSE}", tools=tools).tool_calls
        assert [call.name for call in calls] == [name or "a/b"]


def test_a_string_cannot_start_another_call():
    text = f"{OPEN}call:note{{a:hello }} call:shell{{cmd:rm}}}}{CLOSE}"
    assert [call.name for call in parse_turn(text, tools=TOOLS).tool_calls] == ["note"]


def test_the_longest_name_that_is_offered():
    for tools, name in ((["a.b.c", "c"], "a.b.c"), (["b.c", "c"], "b.c"), (["c"], "c"), (["a"], "a.b.c")):
        assert parse_turn(f"{OPEN}call:a.b.c{{}}{CLOSE}", tools=tools).tool_calls == (ToolCall(name),)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (".5", 0.5), ("-.5e1", -5.0), ("1.", 1.0), ("+3", 3), ("+.5", 0.5), ("1_000", 1000), ("1_000.5", 1000.5),
        ("-0.0", -0.0), ("True", True), ("False", False), ("None", None), ("true", True), ("null", None), ("1e3", 1e3),
        ("007", "007"), ("2024_01", "2024_01"), ("1e999", "1e999"), ("-", "-"), (".", "."), ("nan", "nan"),
        ("1.2.3", "1.2.3"), ("9" * 400, int("9" * 400)), ("TRUE", "TRUE"),
    ],
)  # fmt: skip
def test_literals(word, value):
    for text, tools in ((f"call:note{{a:{word},b:[{word}]}}", TOOLS), (f"call:note{{a:{word},b:[{word}]}}", ())):
        (call,) = parse_turn(OPEN + text + CLOSE, tools=tools).tool_calls
        assert repr(call.arguments) == repr({"a": value, "b": [value]})


def test_nothing_is_lost_and_nothing_raises():
    """Random texts: each becomes calls of offered tools, or stays whole in content or malformed."""
    rng = random.Random(11)
    pieces = [
        "call:", "note", "{", "}", "(", ")", "[", "]", "a", ":", "=", ",", Q, '"', "'", "1", " ", "\n", "\\", '"""',
        '{"name":', "note{", "b:", "'x'", "arguments", "```json\n", "```",
    ]  # fmt: skip
    for _ in range(20_000):
        body = "".join(rng.choices(pieces, k=rng.randrange(16)))
        turn = parse_turn(f"{OPEN}{body}{CLOSE}", tools=["note"])
        assert all(call.name == "note" for call in turn.tool_calls) or body.lstrip().startswith("call:")
        assert turn.tool_calls or turn.malformed == (body,)


@pytest.mark.parametrize(
    "unit",
    ["'", '"', "}", "{", ",", "a:", "a:'", 'a:"x', "'}", ",a", "(", "a=1 ", "\\", "[", Q, "'''", "a:1,", " ", "''"],
)
@pytest.mark.parametrize(
    "start", ["call:note{a:", "call:note(", '{"name":', "call:note{a:'", 'call:note{a:["', "call:"]
)
def test_repair_takes_linear_time(unit, start):
    begin = time.perf_counter()
    parse_turn(OPEN + start + unit * (100_000 // len(unit)) + CLOSE, tools=["note"])
    assert time.perf_counter() - begin < 10


# -- in a stream -------------------------------------------------------------------------------------------------------


def spelled(model, text, at):
    """Ids of `text`, markers as their ids, tokenised in two parts cut at character `at` of what is not a marker."""
    ids = []
    for part in re.split(r"(<\|?\w+\|?>|<\|\"\|>)", text):
        cut = min(max(at, 0), len(part)) if not part.startswith("<") else 0
        at -= len(part) if not part.startswith("<") else 0
        for piece in (part[:cut], part[cut:]):
            ids += model.to_tokens(piece, bos=False).tolist() if piece else []
    return ids


STREAMED = {
    f"{OPEN}call:weather{{city:'Rome, IT'}}{CLOSE}<|tool_response>": ("", ["weather"], "tool_calls"),
    f"Wait.{OPEN}call:weather(city={Q}Rome{Q}){CLOSE}<|tool_response>": ("Wait.", ["weather"], "tool_calls"),
    f"call:weather{{city:'Rome'}}{CLOSE}<|tool_response>": ("", ["weather"], "tool_calls"),
    f"{OPEN}call:weather{{city:{Q}Rome}}<|tool_response>": ("", ["weather"], "tool_calls"),
    f"{OPEN}call:rm{{path:'/, x'}}{CLOSE}<turn|>": ("", [], "malformed"),
    "call:weather is what I would do.<turn|>": ("call:weather is what I would do.", [], "stop"),
    f"call:rm{{a:1}}{CLOSE}ok<turn|>": ("call:rm{a:1}ok", [], "stop"),
    "call<turn|>": ("call", [], "stop"),
    f"{OPEN}call:weather{{a:1}},call:weather{{a:2}}{CLOSE}<|tool_response>": ("", ["weather"] * 2, "tool_calls"),
    f"call:weather{{city:'R'}} or so{CLOSE}ok<turn|>": ("call:weather{city:'R'} or sook", [], "stop"),
}


@pytest.mark.parametrize("text", STREAMED)
def test_the_same_at_every_split(tiny, text):
    shown, names, _ = STREAMED[text]
    for at in range(len(re.sub(r"<[^>]*>", "", text)) + 1):
        *ids, end = spelled(tiny, text, at)
        flow = TurnText(tiny.tokenizer, tiny.to_tokens("<|turn>model\n"), tools=["weather"])
        pieces = [piece for token in ids for piece in flow.push(token)] + flow.end(end)
        turn = flow.parsed()
        assert "".join(pieces) == shown == turn.content and [call.name for call in turn.tool_calls] == names


@pytest.mark.parametrize("text", STREAMED)
def test_generate_loses_nothing(tiny, text):
    ids = iter(spelled(tiny, text, 0))

    def write(so_far, logits):
        logits[:] = -np.inf
        logits[next(ids)] = 0

    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    out = tiny.generate([{"role": "user", "content": "?"}], tools=tools, processors=[write], max_tokens=60)
    shown, names, finish = STREAMED[text]
    assert (out.text, [call.name for call in out.tool_calls], out.finish_reason) == (shown, names, finish)
    assert out.malformed == (("call:rm{path:'/, x'}",) if finish == "malformed" else ())


def test_thoughts_without_a_name_are_shown(tiny):
    flow = TurnText(tiny.tokenizer, tiny.to_tokens("<|turn>model\n"), show_thinking=True)
    ids = tiny.to_tokens("<|channel>hm<channel|>Yes.", bos=False)
    pieces = [piece for token in ids for piece in flow.push(int(token))] + flow.flush()
    assert (pieces[0], pieces[0].channel) == ("hm", "thinking")
    assert flow.parsed().thinking == "hm" and flow.parsed().content == "Yes."


@pytest.mark.parametrize(
    "text",
    [
        f"He wrote {OPEN}call:weather{{}}{CLOSE} there.",
        "<|channel>thought\nhm<channel|>x",
        f"a <turn|>{Q}b{Q} <|tool_response>c",
        "call:weather{}" + CLOSE,
    ],
)
def test_markers_spelled_by_ordinary_tokens_are_text(tiny, text):
    """A model that quotes a stranger's text must not call a tool by it."""
    flow = TurnText(tiny.tokenizer, tiny.to_tokens("<|turn>model\n"), tools=["weather"])
    ids = tiny.tokenizer.encode(text, bos=False, parse_special=False)
    pieces = [piece for token in ids for piece in flow.push(int(token))]
    turn = flow.parsed()
    assert "".join(pieces + flow.flush()) == turn.content == text and not turn.tool_calls + turn.malformed


def test_markers_spelled_within_a_string_stay_in_it(tiny):
    inner = f"say {Q} or {CLOSE} now"
    flow = TurnText(tiny.tokenizer, tiny.to_tokens("<|turn>model\n"), tools=["note"])
    for part, special in ((f"{OPEN}call:note{{a:{Q}", True), (inner, False), (f"{Q}}}{CLOSE}", True)):
        for token in tiny.tokenizer.encode(part, bos=False, parse_special=special):
            flow.push(int(token))
    assert flow.parsed().tool_calls == (ToolCall("note", {"a": inner}),)


def test_ids_beyond_the_tokenizer_do_not_lose_the_answer(tmp_path):
    """The model's table may be larger than its tokenizer."""
    shutil.copytree(TINY, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    table = json.loads(file.read_text())
    beyond = max(table["model"]["vocab"].values())
    table["model"]["vocab"] = {piece: i for piece, i in table["model"]["vocab"].items() if i != beyond}
    table["added_tokens"] = [token for token in table["added_tokens"] if token["id"] != beyond]
    file.write_text(json.dumps(table))
    model = gemma4.load(tmp_path / "m")
    word = int(model.to_tokens("x", bos=False)[0])

    def run(prompt):
        ids = iter([word, beyond, word, 1])

        def write(so_far, logits):
            logits[:] = -np.inf
            logits[next(ids)] = 0

        out = model.generate(prompt, processors=[write], max_tokens=9)
        assert out.tokens.tolist() == [word, beyond, word, 1] and out.finish_reason == "stop"
        return out.text

    piece = model.to_string([word])
    assert run("x") == run([{"role": "user", "content": "x"}]) == f"{piece}\ufffd{piece}"
