# SPDX-License-Identifier: Apache-2.0
"""Sandbox of chat templates: jinja2's, with a meter on all work.

A template is an untrusted program, and one line can request a terabyte or run for a year. So every operation that makes
a value (operators, concatenation, literals, slices, filters, methods) reports its size to the meter first. Each loop
iteration and each macro call counts, and the meter also reads a clock. No step is long, so Ctrl-C always acts.
"""

# Values of templates have any type, and isinstance() stands in the way of each operation:
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import datetime
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK, MAX_SECONDS = 1 << 28, 10  # characters (list entries count 16), and seconds of computing
WORK_PER_INPUT = 64  # added for long conversations: this multiple of their own size
_MAX_PRODUCT, _MAX_ENTRIES, _MAX_NESTING, _MAX_BITS = 1 << 20, 1 << 20, 100, 4096
_ENTRY = 16
_SEQUENCES = (str, list, tuple)
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_MAX_NODES = 1 << 16  # nodes of the program: a large real template has a few thousand
_MAX_BRANCHES = 1000
_CHARGES_PER_LOOK, _MUCH = 64, 1 << 14  # the clock is read after this number of charges, and with each large one


class Meter:
    """The remaining work of one rendering or compilation."""

    def __init__(self, input_size: int = 0) -> None:
        self.limit = MAX_WORK + WORK_PER_INPUT * input_size
        self.left = self.limit
        self._n_charges = 0
        self.end = time.thread_time() + MAX_SECONDS

    def charge(self, work: int) -> None:
        """Account for `work` before it is done. Raises SecurityError if that is too much, or the time is over."""
        self.left -= _ENTRY + work
        if self.left < 0:
            raise SecurityError(f"it asks for more than the limit of {self.limit:,} characters of work")
        self._n_charges += 1
        if (self._n_charges % _CHARGES_PER_LOOK == 0 or work > _MUCH) and time.thread_time() > self.end:
            raise SecurityError(f"it computes for longer than the limit of {MAX_SECONDS} s")


_METER: ContextVar[Meter] = ContextVar("meter")


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Templates compile and run only inside this context."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


def _charge(work: int) -> None:
    _METER.get().charge(work)


def size_of(value: Any) -> tuple[int, int, int]:
    """(entries, characters, nesting) of a value written out in full. Raises SecurityError beyond the limits.

    An object that is reached twice counts twice but is walked once: [x, x] doubles with every step.
    """
    return _size_of(value, {}, 0)


def _size_of(value: Any, known: dict[int, tuple[int, int, int] | None], depth: int) -> tuple[int, int, int]:
    if isinstance(value, str):
        return 1, len(value), 0
    if isinstance(value, int):
        return 1, 2 + value.bit_length() // 3, 0
    items = None if value is None else _items(value)
    if items is None:
        return 1, 24, 0
    if depth > _MAX_NESTING:
        raise SecurityError(f"it nests values deeper than the limit of {_MAX_NESTING}")
    key = id(value)
    if key not in known:
        known[key] = None
        entries = text = nesting = 0
        for item in items:
            n, length, below = _size_of(item, known, depth + 1)
            entries, text, nesting = entries + n, text + length + 4, max(nesting, below)
        known[key] = entries + 1, text + 2, nesting + 1
    found = known[key]
    if found is None:
        raise SecurityError("it puts a value into itself")
    if found[0] > _MAX_ENTRIES:
        raise SecurityError(f"it makes a value of more than the limit of {_MAX_ENTRIES:,} entries")
    return found


def _items(value: Any) -> Iterable[Any] | None:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, _VIEWS):
        return value
    if isinstance(value, Namespace):
        return [part for pair in object.__getattribute__(value, "_Namespace__attrs").items() for part in pair]
    return None


def _text(value: Any) -> str:
    """str(value), accounted for."""
    if isinstance(value, str):
        return value
    _charge(size_of(value)[1])
    return str(value)


def _made(value: Any) -> Any:
    """Account for a value made of others, bounded by the sizes of its parts."""
    if isinstance(value, str):
        _charge(len(value))
    elif isinstance(value, list | tuple | dict):
        _charge(_ENTRY * len(value))
        size_of(value)
    elif hasattr(value, "__next__"):
        return _counted(value)
    return value


def _counted(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        _charge(0)
        yield item


def _seen(value: Any) -> Any:
    """Account for an operation that may look at all of a value, such as a comparison; returns the value."""
    if isinstance(value, str):
        _charge(len(value))
    elif _items(value) is not None:
        entries, text, _ = size_of(value)
        _charge(text + _ENTRY * entries)
    elif hasattr(value, "__next__"):
        return map(_seen, value)
    return value


class _Accounting(NodeTransformer):
    """Rewrites a template so that operations hidden from the environment go through a filter, or are charged for.

    The filters' names have a space: no template can write them.
    """

    def __init__(self) -> None:
        self._n_nodes = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._n_nodes += 1
        if self._n_nodes > _MAX_NODES:
            raise jinja2.TemplateSyntaxError(f"it has more than the limit of {_MAX_NODES:,} parts", node.lineno)
        return super().visit(node, *args, **kwargs)

    def _with_toll(self, node: Any) -> Any:
        self.generic_visit(node)
        text = sum(len(part.data) for child in node.body for part in _text_within(child))
        node.body.insert(0, nodes.ExprStmt(_toll_of(text, node), lineno=node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "a view")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "a view")
        return node

    def visit_If(self, node: nodes.If) -> nodes.If:
        if len(node.elif_) > _MAX_BRANCHES:  # Python's parser takes one level of its stack for each
            raise jinja2.TemplateSyntaxError(f"an if has more than the limit of {_MAX_BRANCHES} branches", node.lineno)
        return cast("nodes.If", self.generic_visit(node))  # which returns what it was given

    visit_Macro = visit_CallBlock = visit_Block = _with_toll

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._with_toll(node)
        if node.test is not None:
            node.test = nodes.And(_toll_of(0, node), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "a concat")

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        loaded = getattr(node, "ctx", "load") == "load"
        return _filter(node, "a value") if loaded and not all(isinstance(i, nodes.Const) for i in node.items) else node

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "a slice") if isinstance(node.arg, nodes.Slice) else node

    def visit_Const(self, node: nodes.Const) -> nodes.Const:
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise jinja2.TemplateSyntaxError("a number beyond what float64 holds", node.lineno)
        return node


def _text_within(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """The literal text of a block; inner loops and macros are charged separately."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        for child in node.iter_child_nodes():
            yield from _text_within(child)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _toll_of(text: int, node: nodes.Node) -> nodes.Filter:
    return _filter(nodes.Const(text, lineno=node.lineno), "a toll")


def _toll(text: int) -> bool:
    _charge(text)
    return True


def _concat(parts: list[Any]) -> str:
    texts = [_text(part) for part in parts]
    _charge(sum(map(len, texts)))
    return "".join(texts)


def _slice(value: Any) -> Any:
    if isinstance(value, _SEQUENCES):
        _charge(len(value) * (1 if isinstance(value, str) else _ENTRY))
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers gives templates (utils/chat_template_utils.py), every value accounted for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols],
            optimized=False,  # constants would be computed at compile time
            finalize=_finalize,
        )  # fmt: skip
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        for name in _NO_FILTERS:
            self.filters.pop(name, None)
        self.filters |= _OWN_FILTERS
        self.filters = {name: _accounted(name, function) for name, function in self.filters.items()}
        self.filters |= {"a toll": _toll, "a concat": _concat, "a value": _made, "a slice": _slice}
        self.filters["a view"] = _seen
        self.tests = {name: _accounted_test(function) for name, function in self.tests.items()}
        functions = cast("dict[str, Any]", self.globals)  # jinja2 types it by its own entries alone
        functions["raise_exception"] = _raise
        functions["strftime_now"] = _now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Accounting().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_small(left, 1e6) and _small(right, 64)):
            raise SecurityError("a power in the chat template is too large")
        if operator == "*" and _repeats(left, right) > _MAX_PRODUCT:
            raise SecurityError("a repetition in the chat template is too large")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("%-formatting is not allowed in chat templates; use ~")
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _MAX_BITS:
                raise SecurityError(f"an integer in the chat template has more than the limit of {_MAX_BITS} bits")
        elif operator == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
            _charge((len(left) + len(right)) * (1 if isinstance(left, str) else _ENTRY))
        elif operator == "*":
            _charge(int(_repeats(left, right)) * _ENTRY)
        result = super().call_binop(context, operator, left, right)
        return result if isinstance(result, int | float) else _made(result)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _accounted_method(owner, __obj.__name__, args)
        else:
            _seen(owner) if isinstance(owner, list | tuple) else _charge(0)
        return _made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__
        if re.search(r"\d{4}|:[^}]*\{", form):
            raise SecurityError("a field width in the chat template is too large or computed")

        def formatted(*args: Any, **kwargs: Any) -> str:
            _charge(len(form) + form.count("{") * (1000 + size_of([*args, kwargs])[1]))
            return wrapped(*args, **kwargs)

        return formatted

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if obj is None or isinstance(obj, int | float | complex | bytes):
            return False  # (1).to_bytes(10**9)
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _NO_METHODS)


# Padding makes a gigabyte from a number, a translation table from a word; no chat format needs them.
_NO_METHODS = ("ljust", "rjust", "center", "zfill", "expandtabs", "translate", "encode")
_NO_FILTERS = (
    "format", "center", "wordwrap", "filesizeformat", "pprint", "striptags", "urlize", "xmlattr",
)  # fmt: skip


def _accounted_method(text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Account for the result of a method of `text`; returns its arguments, with iterators read."""
    if name == "join" and args:
        parts = list(args[0])
        _charge(sum(len(part) for part in parts if isinstance(part, str)) + len(text) * len(parts))
        return (parts, *args[1:])
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        _charge(len(text) + text.count(args[0]) * len(args[1]))
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args and isinstance(args[0], str) and args[0] else None
        n = text.count(separator) if separator and name != "splitlines" else len(text) // 2
        _charge(len(text) + 4 * _ENTRY * (n + 1))
    else:
        _charge(0)
    return args


_ELEMENT_FILTERS = (  # filters that return existing elements or numbers
    "abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length", "max", "min", "random",
)  # fmt: skip
_COMPARING_FILTERS = ("min", "max", "sort", "unique", "groupby", "dictsort")  # and make a key of each entry
_TEXT_FILTERS = {  # and the maximal number of characters from one
    "capitalize": 3, "lower": 3, "title": 3, "upper": 3, "e": 6, "escape": 6, "forceescape": 6, "urlencode": 12,
    "indent": 1, "replace": 1, "safe": 1, "string": 1, "trim": 1, "truncate": 1, "wordcount": 1,
}  # fmt: skip


def _accounted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose input and output are accounted for."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # behind the context or the environment
    growth = _TEXT_FILTERS.get(name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if growth is not None:
            value = args[at] if name == "urlencode" else _text(args[at])  # which takes pairs, too
            _charge(growth * size_of(value)[1])
            args = (*args[:at], value, *args[at + 1 :])
        elif name in _COMPARING_FILTERS:
            args = (*args[:at], _seen(args[at]), *args[at + 1 :])
        result = function(*args, **kwargs)
        return result if name in _ELEMENT_FILTERS else _made(result)

    return call


def _accounted_test(function: Callable[..., bool]) -> Callable[..., bool]:
    """A test, such as "equalto" and "in", whose values are accounted for."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> bool:
        return function(*map(_seen, args), **kwargs)

    return call


@pass_environment
def _join(environment: Any, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    parts: list[str] = []
    between = _text(d)
    for item in value:
        parts.append(_text(item))
        _charge(len(parts[-1]) + len(between))
    return between.join(parts)


def _replace(s: str, old: Any, new: Any, count: int | None = None) -> str:
    old, new = _text(old), _text(new)
    _charge(len(s) + s.count(old) * len(new))
    return s.replace(old, new, -1 if count is None else count)


@pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    total = start
    for item in iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable):
        if not isinstance(item, int | float) or not isinstance(total, int | float):
            raise SecurityError("the filter sum is for numbers in chat templates")
        total += item
    return total


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if method not in ("common", "ceil", "floor"):
        raise jinja2.TemplateError("method must be common, ceil or floor")
    if not -30 <= precision <= 30:
        raise SecurityError("the filter round takes a precision of -30 to 30 in chat templates")
    if method == "common":
        return round(value, precision)
    return getattr(math, method)(value * (10**precision)) / (10**precision)


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    _check_count("batch", linecount)
    row: list[Any] = []
    for item in value:
        row.append(item)
        if len(row) == linecount:
            yield row
            row = []
    if row:
        _charge(_ENTRY * linecount)
        yield row + [fill_with] * (linecount - len(row) if fill_with is not None else 0)


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or not 0 < count <= _MAX_ENTRIES:
        raise SecurityError(f"the filter {name} takes 1 to {_MAX_ENTRIES:,} in chat templates")


def _string(value: Any) -> Any:
    return value  # converted to text before, as for every text filter


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter this one does not escape HTML."""
    _check_indent(indent)
    entries, text, nesting = size_of(x)
    width = len(indent) if isinstance(indent, str) else indent or 0
    between = sum(map(len, separators)) if separators else 4
    _charge((12 if ensure_ascii else 6) * text + entries * (width * nesting + between))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_indent(width)
    _charge((s.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return do_indent(s, width, first, blank)


def _check_indent(indent: Any) -> None:
    if (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise SecurityError("an indent of more than 64 in the chat template")


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "join": _join, "replace": _replace, "sum": _sum, "round": _round, "batch": _batch, "string": _string,
    "tojson": _tojson, "indent": _indent,
}  # fmt: skip


@pass_context
def _finalize(context: Context, value: Any) -> str:
    text = _text(value)
    _charge(len(text))
    return text


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %}, which marks assistant text for training, renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    if len(form) > 1000:
        raise SecurityError("strftime_now takes a format of at most 1,000 characters in chat templates")
    return datetime.datetime.now().strftime(form)


def _repeats(left: Any, right: Any) -> float:
    """Length of sequence * number; 0 for numbers."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, _SEQUENCES):
            return len(items) * times if isinstance(times, int) else float("inf")
    return 0


def _small(value: Any, limit: float) -> bool:
    return isinstance(value, int | float) and abs(value) <= limit
