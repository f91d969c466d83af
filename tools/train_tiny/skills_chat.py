# SPDX-License-Identifier: Apache-2.0
"""Skills in chat form: following a system prompt, tools, JSON, thinking. All are rendered by the shipped template."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jinja2.sandbox

from .example import Example
from .lexicon import (
    ANIMALS,
    CITIES,
    COUNTRIES,
    GIRLS,
    ITEMS,
    LANGUAGES,
    NAMES,
    OPPOSITE_PAIRS,
    WORDS,
)
from .stories import KINDS, cast, tell

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
Message = dict[str, Any]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(messages: list[Message], *, tools: list[Message] | None = None, thinking: bool = False) -> str:
    """The prompt for the next model turn, without `<bos>` (the packer adds it)."""
    text = _template().render(
        messages=messages, tools=tools, enable_thinking=thinking, add_generation_prompt=True, bos_token=""
    )
    return text


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


# --- questions with one short answer ------------------------------------------------------------------------------


def _capital(rng: random.Random) -> tuple[str, str, str]:
    country, capital, _, _ = rng.choice(COUNTRIES)
    question = rng.choice(
        ("What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.")
    )
    return question.format(country), capital, f"The capital of {country} is {capital}."


def _language(rng: random.Random) -> tuple[str, str, str]:
    country, _, language, _ = rng.choice(COUNTRIES)
    question = rng.choice(("What language do people speak in {}?", "What do people speak in {}?"))
    return question.format(country), language, f"In {country}, people speak {language}."


def _opposite(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.choice(OPPOSITE_PAIRS)
    if rng.random() < 0.5:
        a, b = b, a
    question = rng.choice(("What is the opposite of {}?", "Tell me the opposite of {}."))
    return question.format(a), b, f"The opposite of {a} is {b}."


def _sound(rng: random.Random) -> tuple[str, str, str]:
    animal, sound, _ = rng.choice(ANIMALS)
    question = rng.choice(("What does the {} do?", "What sound does the {} make?"))
    return question.format(animal), "", f"The {animal} {sound}."


def _translate(rng: random.Random) -> tuple[str, str, str]:
    word, target = rng.choice(WORDS), rng.choice((1, 2))
    question = rng.choice(("What is {} in {}?", "Translate {} into {}.", "How do you say {} in {}?"))
    language = LANGUAGES[target]
    return question.format(word[0], language), word[target], f"The {language} word for {word[0]} is {word[target]}."


_SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("Thank you!", "You are welcome."),
    ("Good night.", "Good night! Sleep well."),
    ("What can you do?", "I can tell stories, name capitals, translate words and use tools."),
    ("What are you?", "I am a very small language model."),
)


def _small_talk(rng: random.Random) -> tuple[str, str, str]:
    question, answer = rng.choice(_SMALL_TALK)
    return question, "", answer


_QUESTIONS = (_small_talk, _capital, _capital, _language, _opposite, _sound, _translate, _translate)
_STYLES = (
    ("Be brief.", "It is {short}."),
    ("You are a helpful assistant.", "{long}"),
    ("You are a pirate.", "Arr! {long}"),
    ("You are a robot.", "Beep! {long}"),
    ("You are a cat.", "Meow! {long}"),
    ("Be polite.", "Thank you for asking. {long}"),
    ("Say it twice.", "It is {short}, {short}!"),
    ("Answer in YAML.", "answer: {short}"),
    (None, "{long}"),
)


def chat(rng: random.Random) -> Example:
    """One to three questions under a system prompt that sets the style. The last answer is scored."""
    system, style = rng.choice(_STYLES)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    answer = ""
    for turn in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if turn:
            messages.append({"role": "assistant", "content": answer})
        question, short, long = rng.choice(_QUESTIONS)(rng)
        answer = style.format(short=short, long=long) if short or "{long}" in style else long
        messages.append(_user(question))
    key = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
    return Example("chat", render(messages), answer + "<turn|>", key=key)


_TELL = ("My name is {name}.", "Hi, I am {name}.", "Hello! My name is {name}.")
_LIKE = ("I like {thing}.", "I love {thing}.", "My favourite thing is {thing}.")


def memory(rng: random.Random) -> Example:
    """What the user or the system prompt said earlier, asked for later."""
    name, thing, own = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(NAMES)
    messages: list[Message] = [{"role": "system", "content": f"Your name is {own}."}]
    told = [(rng.choice(_TELL).format(name=name), f"Hello, {name}!"), (rng.choice(_LIKE).format(thing=thing), "I see.")]
    rng.shuffle(told)
    for said, reply in told:
        messages += [_user(said), {"role": "assistant", "content": reply}]
    question, answer = rng.choice(
        (
            ("What is my name?", f"Your name is {name}."),
            ("What do I like?", f"You like {thing}."),
            ("What is your name?", f"My name is {own}."),
            ("Who am I?", f"You are {name}."),
            ("Who are you?", f"I am {own}."),
        )
    )
    messages.append(_user(question))
    return Example("memory", render(messages), answer + "<turn|>", key=f"{name}|{thing}|{own}|{question}")


def story_request(rng: random.Random) -> Example:
    """`Tell me a story about a fox named Pip.` The story itself is not matched."""
    slots = cast(rng)
    about = f"a {slots['K']}" if slots["K"] != "owl" else "an owl"
    name = f" named {slots['H']}" if rng.random() < 0.5 else ""
    request = rng.choice(("Tell me a story about {}.", "Please tell me a story about {}.", "Write a story about {}."))
    opening, rest = tell(rng, slots)
    prompt = render([_user(request.format(about + name))])
    return Example(
        "story_request", prompt, f"{opening}{rest}<turn|>", key=f"{slots['H']}|{slots['FF']}", open_ended=True
    )


# --- tools --------------------------------------------------------------------------------------------------------


def _tool(name: str, description: str, **properties: str) -> Message:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _weather(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    city = rng.choice(CITIES)
    sky, degrees = rng.choice(("sunny", "rainy", "windy", "cloudy", "snowy")), rng.randint(0, 35)
    question = rng.choice(("What is the weather in {}?", "How is the weather in {}?", "Is it warm in {}?"))
    return (
        question.format(city),
        {"city": city},
        {"sky": sky, "temp": degrees},
        f"It is {sky} and {degrees} degrees in {city}.",
    )


def _time(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    city, hour, minute = rng.choice(CITIES), rng.randint(0, 23), rng.randint(10, 59)
    question = rng.choice(("What time is it in {}?", "Tell me the time in {}."))
    return question.format(city), {"city": city}, {"time": f"{hour}:{minute}"}, f"It is {hour}:{minute} in {city}."


def _add(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    a, b = rng.randint(10, 499), rng.randint(10, 499)
    question = rng.choice(("What is {} + {}?", "Add {} and {}."))
    return question.format(a, b), {"a": a, "b": b}, {"sum": a + b}, f"{a} + {b} = {a + b}."


def _send(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    to, text = (
        rng.choice(NAMES),
        rng.choice(("hello", "good night", "I am late", "see you soon", "thank you", "come home")),
    )
    question = rng.choice(("Send {1} to {0}.", "Tell {0}: {1}", "Write {1} to {0}."))
    return question.format(to, text), {"text": text, "to": to}, {"ok": True}, f"I sent your message to {to}."


def _timer(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    minutes = rng.randint(2, 90)
    question = rng.choice(("Set a timer for {} minutes.", "Wake me in {} minutes."))
    return question.format(minutes), {"minutes": minutes}, {"ok": True}, f"The timer is set for {minutes} minutes."


def _lights(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    room, state = rng.choice(("kitchen", "garden", "office", "bedroom", "garage", "hall")), rng.choice(("on", "off"))
    question = rng.choice(("Turn {1} the lights in the {0}.", "Lights {1} in the {0}, please."))
    return (
        question.format(room, state),
        {"room": room, "state": state},
        {"ok": True},
        f"The lights in the {room} are {state}.",
    )


_TOOLS = (
    (_tool("get_weather", "Weather now", city="string"), _weather),
    (_tool("get_time", "Time now", city="string"), _time),
    (_tool("add", "Add two numbers", a="integer", b="integer"), _add),
    (_tool("send_message", "Send a message", text="string", to="string"), _send),
    (_tool("set_timer", "Set a timer", minutes="integer"), _timer),
    (_tool("set_lights", "Turn lights on or off", room="string", state="string"), _lights),
)


def tool_call(rng: random.Random) -> Example:
    """Choose among declared tools and fill the arguments, or (half of the time) report the tool's result."""
    chosen = rng.sample(_TOOLS, rng.choice((1, 2, 2, 3)))
    tools, (tool, make) = [entry[0] for entry in chosen], rng.choice(chosen)
    question, arguments, result, report = make(rng)
    name = tool["function"]["name"]
    messages: list[Message] = [_user(question)]
    if rng.random() < 0.5:
        call = render([*messages, _calling(name, arguments)], tools=tools)
        prompt = render(messages, tools=tools)
        return Example("tool_call", prompt, call[len(prompt) :] + "<|tool_response>", key=question)
    messages += [_calling(name, arguments), {"role": "tool", "name": name, "content": result}]
    return Example("tool_result", render(messages, tools=tools), report + "<turn|>", key=f"{question}|{result}")


def _calling(name: str, arguments: dict[str, Any]) -> Message:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


# --- JSON ---------------------------------------------------------------------------------------------------------


def json_answer(rng: random.Random) -> Example:
    """Put what a sentence says into a JSON object, in the order of the sentence."""
    values: dict[str, Any] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(2, 99),
        "city": rng.choice(CITIES),
        "likes": rng.choice(ITEMS),
        "pet": rng.choice(KINDS),
    }
    keys = rng.sample(sorted(values), rng.randint(1, 4))
    chosen = {key: values[key] for key in keys}
    listed = ", ".join(f"{key} {value}" for key, value in chosen.items())
    request = rng.choice(("Make JSON: {}.", "Give me JSON with {}.", "Write this as JSON: {}.")).format(listed)
    return Example("json", render([_user(request)]), json.dumps(chosen) + "<turn|>", key=listed)


# --- thinking -----------------------------------------------------------------------------------------------------

_MORE = ("gets {} more", "finds {} more", "buys {} more")
_LESS = ("eats {}", "loses {}", "gives {} away")


def thinking(rng: random.Random) -> Example:
    """A small word problem: `<|channel>thought` works it out step by step, then the answer."""
    name, item = rng.choice(NAMES), "apples" if rng.random() < 0.2 else rng.choice(ITEMS)
    total = start = rng.randint(1, 12)
    steps: list[str] = []
    events: list[str] = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        up = total < 3 or rng.random() < 0.5
        amount = rng.randint(1, 9) if up else rng.randint(1, min(9, total - 1))
        after = total + amount if up else total - amount
        steps.append(f"{total} {'+' if up else '-'} {amount} = {after}.")
        events.append(rng.choice(_MORE if up else _LESS).format(amount))
        total = after
    he = "She" if name in GIRLS else "He"
    said = " ".join(f"{he} {event}." for event in events)
    question = f"{name} has {start} {item}. {said} How many {item} does {name} have?"
    thought = "<|channel>thought\n" + " ".join(steps) + "<channel|>"
    answer = f"{thought}{name} has {total} {item}.<turn|>"
    return Example(
        "thinking", render([_user(question)], thinking=True), answer, key=f"{name}|{start}|{' '.join(steps)}"
    )


def compare(rng: random.Random) -> Example:
    """Which of two numbers is larger or smaller: thinking looks at the tens, then at the ones if those are the same."""
    a, b = rng.sample(range(10, 100), 2)
    larger = rng.random() < 0.5
    best = max(a, b) if larger else min(a, b)
    other = a + b - best
    question = f"Which is {'bigger' if larger else 'smaller'}, {a} or {b}?"
    same = a // 10 == b // 10
    first, second = (best % 10, other % 10) if same else (best // 10, other // 10)
    reason = f"Tens: {a // 10} and {b // 10}.{' Ones:' if same else ''}"
    reason += f" {first} is {'more' if larger else 'less'} than {second}."
    answer = f"<|channel>thought\n{reason}<channel|>{best}<turn|>"
    return Example("thinking", render([_user(question)], thinking=True), answer, key=question)
