# SPDX-License-Identifier: Apache-2.0
"""Chat templates that ask for too much memory, time or digits are told so before the work is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gemma4.errors import FormatError
from gemma4.text.chat import ChatTemplate, encode_chat

USER = {"role": "user", "content": "x"}
NS = "{% set ns = namespace(s='ab', l=['ab'], x=10**60, d={}) %}"
BIG = "{% set big = ['a' * 1000000] * 99999 %}{% set same = ['a' * 999999 ~ 'a'] * 99999 %}"
UP = "{% for i in range(60) %}"
END = "{% endfor %}"

BOMBS = {
    "squares": NS + UP + "{% set ns.x = ns.x * ns.x %}" + END,
    "powers": NS + UP + "{% set ns.x = ns.x ** 3 %}" + END,
    "sums of integers": NS + "{% for i in range(99999) %}{% set ns.x = ns.x + ns.x %}" + END,
    "rounding": "{{ 1 | round(100000000, 'floor') }}",
    "rounding upwards": "{{ 1.5 | round(method='ceil', precision=999999999) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with a test": "{% set l = range(99999) | list %}{% for i in l %}"
    + "{% for j in l if j < 0 %}{% endfor %}" * 40 + END,
    "comparisons": "{% set l = range(99999) | list %}{% set m = l | list %}{% for i in l %}"
    + "{{ l == m }}" * 40 + END,
    "loops over characters": NS + "{% for i in 'a' * 1000000 %}{% for i in 'a' * 1000000 %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loops": "{% for i in [[[1]] * 9] * 9 recursive %}{{ loop([i] * 9) }}{% endfor %}",
    "call blocks": "{% macro m() %}" + "{{ caller() }}" * 30 + "{% endmacro %}"
    + "{% call m() %}" * 8 + "x" * 999 + "{% endcall %}" * 8,
    "plus": NS + UP + "{% set ns.s = ns.s + ns.s %}" + END,
    "tilde": NS + UP + "{% set ns.s = ns.s ~ ns.s %}" + END,
    "lists": NS + UP + "{% set ns.l = ns.l + ns.l %}" + END,
    "list in list": NS + UP + "{% set ns.l = [ns.l, ns.l] %}" + END + "{{ ns.l }}",
    "compared": NS + UP + "{% set ns.l = [ns.l, ns.l] %}" + END + "{{ ns.l == ns.l[0] }}",
    "tuple in tuple": NS + UP + "{% set ns.l = (ns.l, ns.l) %}" + END + "{{ {ns.l: 1} }}",
    "dict in dict": NS + UP + "{% set ns.d = dict(a=ns.d, b=ns.d) %}" + END + "{{ ns.d | tojson }}",
    "batches": NS + UP + "{% set ns.l = (ns.l | batch(2) | list) + (ns.l | batch(2) | list) %}" + END + "{{ ns.l }}",
    "deep": NS + "{% for i in range(9999) %}{% set ns.l = [ns.l] %}" + END + "{{ ns.l }}",
    "a namespace in itself": NS + "{% set ns.l = ns %}{{ ns }}",
    "namespaces": NS + "{% set n1 = namespace(a=ns) %}{% set ns.l = [n1] * 999 %}{% set n1.b = [ns.l] * 999 %}{{ n1 }}",
    "views": NS + "{% set big = 'a' * 1000000 %}{% set d = dict(a=[big] * 99999) %}{{ d.items() }}",
    "written out": "{{ [['a' * 1000000] * 9999] }}",
    "joined": "{{ (['a' * 1000000] * 9999) | join }}",
    "joined by": "{{ range(99999) | join('a' * 100000) }}",
    "joined by a method": "{{ ''.join(['a' * 1000000] * 9999) }}",
    "joined mappings": "{{ (['a' * 1000000] * 9999) | map('upper') | join }}",
    "joined attributes": "{{ ([{'a': 'a' * 1000000}] * 9999) | join(attribute='a') }}",
    "replaced": "{{ ('a' * 1000000) | replace('a', 'b' * 5000) }}",
    "replaced by a method": "{{ ('a' * 1000000).replace('a', 'b' * 5000) }}",
    "replaced nothing": "{{ ('a' * 1000000) | replace('', 'b' * 5000) }}",
    "translated": "{{ ('a' * 1000000).translate({97: 'b' * 5000}) }}",
    "split": "{{ (('a ' * 500000) ~ ('a ' * 500000)).split() * 1 }}" * 40,
    "split at": UP + "{% set x = ('aa' * 500000).split('a') %}" + END,
    "sliced": NS + "{% for i in range(99999) %}{% set ns.l = ns.l + [('a' * 1000000)[1:]] %}" + END,
    "filled": "{% set b = [1] | batch(600000000, 0) | first %}",
    "slices": "{% for b in [1] | slice(99999999999) %}{% endfor %}",
    "bytes": "{{ (1).to_bytes(5000000000, 'big') }}",
    "bits": "{{ true.to_bytes(5000000000, 'big') }}",
    "encoded": "{{ ('a' * 1000000).encode('utf-32').hex() }}",
    "fields": "{{ ('{0}' * 300000).format('a' * 1000000) }}",
    "mapped fields": "{{ ('{a}' * 300000).format_map({'a': 'a' * 1000000}) }}",
    "list fields": "{{ '{0}'.format(['a' * 1000000] * 9999) }}",
    "set block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}{% endset %}",
    "set block of text": "{% set x %}" + UP * 4 + "a" * 9999 + END * 4 + "{% endset %}",
    "macro of text": "{% macro m() %}" + "a" * 9999 + "{% endmacro %}" + UP * 4 + "{% set x = m() %}" + END * 4,
    "output": UP * 4 + "{{ 'a' * 9999 }}" + END * 4,
    "escaped": UP * 3 + "{% set x = ('<' * 1000000) | forceescape %}" + END * 3,
    "escaped at once": "{% set ns = namespace(s='<' * 1000000) %}" + "{% set ns.s = ns.s + ns.s %}" * 5
    + "{% set x = ns.s | forceescape %}",
    "split at once": "{% set ns = namespace(s='aab' * 300000) %}" + "{% set ns.s = ns.s + ns.s %}" * 5
    + "{% set x = ns.s.split('b') %}",
    "quoted": UP * 3 + "{% set x = ('<' * 1000000) | urlencode %}" + END * 3,
    "indented": "{{ ('\\n' * 1000000) | indent(64) }}" * 9,
    "indented JSON": NS + "{% for i in range(90) %}{% set ns.l = [ns.l] %}" + END
    + "{{ (ns.l * 9999) | tojson(indent=64) }}",
    "a sum of lists": "{{ ([['a'] * 999] * 9999) | sum(start=[]) }}",
    "a date": "{{ strftime_now('%c' * 500000) }}",
    "sorted": UP * 3 + "{% set x = range(99999) | sort | list %}" + END * 3,
    "lazily": UP * 4 + "{% set x = range(99999) " + "| map('string') " * 50 + "| list %}" + END * 4,
    "one half over the constructor": "{{ [1] | batch(600000000, 0) | first }}",
    "infinity": "{{ 1e400 | int }}",
    "the least of long texts": BIG + "{{ big | min }}",
    "sorted long texts": BIG + "{{ big | sort | length }}",
    "sorted lazily": BIG + "{{ big | map('string') | sort | length }}",
    "unique long texts": BIG + "{{ big | unique | list | length }}",
    "grouped long texts": "{{ ([{'a': 'a' * 1000000}] * 9999) | groupby('a') | list | length }}",
    "equal lists of long texts": BIG + "{{ big == same }}",
    "a long text in others": BIG + "{{ big[0] ~ 'b' in big }}",
    "long texts in others": BIG + "{{ same | select('in', big) | list | length }}",
    "equal to others": BIG + "{{ big | select('equalto', same[0]) | list | length }}",
    "equal by a test": BIG + "{{ big is eq same }}",
    "counted": BIG + "{{ big.count(same[0]) }}",
    "found": BIG + "{{ big.index(same[0] ~ 'b') }}",
    "branches": "{% if 0 %}" + "{% elif 0 %}" * 15_000 + "{% endif %}",
    "negative lengths": "{{ 'abc' | truncate(-1) }}",
    "a long integer": "{{ " + "9" * 9000 + " }}",
    "a long program": "{{ 1 }}" * 99999,
    "autoescape": "{% autoescape 1 | round(100000000, 'floor') %}{% endautoescape %}",
}  # fmt: skip

CHILD = """
import json, resource, sys, time
from gemma4.text import sandbox
from gemma4.text.chat import ChatTemplate, encode_chat
sandbox.MAX_SECONDS = 1  # of 10: loops that only take time are many here
bombs = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
def peak_mib():  # of this process; ru_maxrss begins with that of the parent
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
for name, source in bombs.items():
    start = time.thread_time()
    try:
        ChatTemplate("{{ messages[0].content }}" + source).render([{"role": "user", "content": "x"}])
        kind, words = "nothing", ""
    except BaseException as error:
        kind, words = type(error).__name__, str(error)
    peak = peak_mib()
    print(json.dumps([name, kind, words, time.thread_time() - start, peak]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes():
    """What each bomb does, all in one process that may not have more than 3 GB."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD], input=json.dumps(BOMBS), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_errors(outcomes, name):
    kind, words, seconds, peak = outcomes[name]  # peak: MiB so far, in the order of the bombs
    assert kind in ("ValueError", "FormatError") and "chat template" in words, (kind, words)
    assert seconds < 10 and peak < 500


def test_limits_are_in_the_message():
    for source, limit in (
        ("{{ ('a' * 1000000).split('a') | length }}" * 99, "characters"),
        (BOMBS["squares"], "4096 bits"),
    ):
        with pytest.raises(ValueError, match=f"the limit of .*{limit}|limit of {limit}"):
            ChatTemplate(source).render([USER])
    with pytest.raises(FormatError, match="limit of 65,536 parts"):
        ChatTemplate(BOMBS["a long program"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_acts():
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate(BOMBS["loops"] + BOMBS["lazily"]).render([USER])
    finally:
        timer.cancel()
    assert time.perf_counter() - start < 5


HONEST = {
    "a long conversation": ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", [USER] * 20_000),
    "a long text": ("{% for m in messages %}{{ (m.content ~ '\n') | trim | replace('x', 'y') }}{% endfor %}",
                    [USER | {"content": "x" * 9_000_000}] * 3),
    "text that grows": (NS + "{% for m in messages %}{% set ns.s = ns.s ~ m.content %}{% endfor %}{{ ns.s }}",
                        [USER | {"content": "word " * 40}] * 1000),
    "a list that grows": (NS + "{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}{{ ns.l | length }}",
                          [USER] * 300),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_templates_have_room(name):
    source, messages = HONEST[name]
    text = ChatTemplate(source).render(messages)
    assert text.startswith("<bos>") and len(text) > 5


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ [1, 2] | join('-') ~ [3.5, 'a'] }}", "1-2[3.5, 'a']"),
        ("{{ 'a-b' | replace('-', 1) }}{{ 'aab'.replace('a', 'b', 1) }}", "a1bbab"),
        ("{{ 2.456 | round(2) }} {{ 2.1 | round(method='ceil') }} {{ 25 | round(-1, 'floor') }}", "2.46 3.0 20.0"),
        ("{{ range(5) | batch(2, 'x') | list }}", "[[0, 1], [2, 3], [4, 'x']]"),
        ("{{ [1, 2.5] | sum }} {{ [{'a': 1}] | sum('a') }}", "3.5 1"),
        ("{{ {'b': 1, 'a': [1]} | dictsort | map('first') | list }}", "['a', 'b']"),
        ("{{ range(6) | select('odd') | map('string') | join(',') }}", "1,3,5"),
        ("{{ [3, 1, 2] | sort | reverse | list }}{{ 'abc' | reverse }}", "[3, 2, 1]cba"),
        ("{{ none }}{{ nothing }}{{ true ~ 1 }}{{ 'é' | upper }}", "NoneTrue1É"),
        ("{{ {'a': 1}.items() | list }}{{ {'a': 1} | items | list }}", "[('a', 1)][('a', 1)]"),
        ("{% for a, b in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}{% set x, y = 1, 2 %}{{ x + y }}", "123"),
        ("{% for i in range(3) if i != 1 %}{{ i }}{{ ',' if not loop.last }}{% endfor %}", "0,2"),
        ("{{ 'a b' | urlencode }} {{ {'k': 'v w'} | urlencode }} {{ '<' | e }}", "a%20b k=v+w &lt;"),
        ("{{ messages[0:1] | length }}{{ 'abcdef'[1:3] }}{{ [1, 2, 3][::-1] }}", "1bc[3, 2, 1]"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
    ],
)
def test_accounting_changes_no_result(source, text):
    assert ChatTemplate(source).render([USER]) == "<bos>" + text


# -- a byte order mark, and templates that are empty -------------------------------------------------------------------


def test_a_byte_order_mark_does_not_double_bos(tmp_path):
    body = "{{ bos_token }}{{ messages[0].content }}"
    for source in ("\ufeff" + body, "\n " + body, body):
        assert ChatTemplate(source).render([USER]) == "<bos>x"
    (tmp_path / "chat_template.jinja").write_text(body, encoding="utf-8-sig")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}', encoding="utf-8-sig")
    assert ChatTemplate.load(tmp_path).render([USER]) == "<bos>x"


@pytest.mark.parametrize("blank", ["", " \n\t", "\ufeff", "\ufeff \n"])
def test_an_empty_template_is_none(tmp_path, blank):
    with pytest.raises(FormatError, match="empty"):
        ChatTemplate(blank)
    (tmp_path / "chat_template.jinja").write_text(blank, encoding="utf-8")
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": blank}))
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert ChatTemplate.load(tmp_path).render([USER]) == "<bos>x"


# -- nothing that was said is left out without a word ------------------------------------------------------------------

LOSES = {
    "everything": ("{{ bos_token }}", [USER]),
    "all but the last": ("{{ messages[-1].content }}", [{"role": "user", "content": "first"}, USER]),
    "parts": ("{% for m in messages %}{{ m.content if m.content is string }}{% endfor %}",
              [{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
    "the second part": ("{{ messages[0].content[0].text }}",
                        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    "tool results": ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
                     [USER, {"role": "tool", "content": "42"}]),
    "the system's": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
                     [{"role": "system", "content": "Be brief."}, USER]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSES)
@pytest.mark.parametrize("trust", [True, False])
def test_a_template_that_leaves_out_text_is_an_error(tiny, name, trust):
    source, messages = LOSES[name]
    with pytest.raises(ValueError, match="left out the text of message"):
        encode_chat(tiny.tokenizer, ChatTemplate(source), messages, trust_content=trust)


def test_a_template_that_leaves_out_tools_is_an_error(tiny):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    template = ChatTemplate("{{ messages[0].content }}{{ tools[0].function.name if tools and tools[0].type }}")
    assert len(encode_chat(tiny.tokenizer, template, [USER], tools=tools)) > 2
    with pytest.raises(ValueError, match="left out the tool 'weather'"):
        encode_chat(tiny.tokenizer, ChatTemplate("{{ messages[0].content }}"), [USER], tools=tools)


def test_templates_may_trim_and_quote_and_move_text(tiny):
    messages = [
        {"role": "user", "content": "  two \n\n lines "},
        {"role": "assistant", "content": "<|channel>thought\nhm<channel|>dropped"},
        {"role": "user", "content": 'say "x"'},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "<|turn>?"}, {"type": "text", "text": " "}]},
    ]
    source = (
        "{{ messages[3].content }}{{ messages[0].content | trim | indent(2) }}{{ messages[2].content | tojson }}"
        "{{ messages[4].content[0].text }}"
    )
    for trust in (True, False):
        assert len(encode_chat(tiny.tokenizer, ChatTemplate(source), messages, trust_content=trust)) > 5
