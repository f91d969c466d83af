# SPDX-License-Identifier: Apache-2.0
"""The `gemma4` command: every command's options, and what it runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from gemma4.cli import bench as cli_bench
from gemma4.cli import features as cli_features
from gemma4.cli import guard as cli_guard
from gemma4.cli import harvest as cli_harvest
from gemma4.cli import look
from gemma4.cli import media as cli_media
from gemma4.cli.terminal import console, emit, say, shown, status, streams, styled, text_of, typed
from gemma4.sequence import KVDtype

if TYPE_CHECKING:
    from gemma4.model import Model
    from gemma4.quantization import QuantizationResult

EXIT_FAULT, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
_PROGRESS_AFTER_S = 0.3  # a quick load prints nothing
_ERRORS = (ValueError, KeyError, RuntimeError, OSError, ImportError, MemoryError)  # errors that a user can fix
_HELP = (
    "/reset forgets the conversation, /info shows the model, /image FILE (/audio, /video) goes with the next message, "
    "/exit (or Ctrl-D) leaves, Ctrl-C stops an answer"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0; 2 with one line on stderr for an error (--debug: the traceback, too), like argparse for
    wrong usage; 130 after Ctrl-C; 1 for an internal fault, or if the reader of the output has closed it."""
    with streams():
        args = make_parser().parse_args(argv)
        try:
            with _ended_by_signals():
                args.run(args)
                sys.stdout.flush()
            return 0
        except KeyboardInterrupt:
            if argv is None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends: another Ctrl-C has nothing to stop
            say("interrupted")
            return EXIT_INTERRUPTED
        except BrokenPipeError:  # `gemma4 generate ... | head`
            sys.stderr.close()
            return EXIT_FAULT
        except Exception as error:
            if args.debug:
                emit(traceback.format_exc(), stream=sys.stderr)
            if isinstance(error, _ERRORS):
                say(f"error: {_one_line(error)}")
                return EXIT_ERROR
            hint = "" if args.debug else " (--debug shows where)"
            say(f"error: {type(error).__name__}: {_one_line(error)}{hint}")
            return EXIT_FAULT


class _Ended(BaseException):
    """SIGTERM or SIGHUP: remove partial files, restore the terminal, then let the signal take its effect."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP unwind like an exception before they end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in ending if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    except _Ended as ended:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """Escapes the user's arguments in messages like all other output."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            emit(message, end="", stream=file or sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """Every command with its options. tools/docs_site makes a page of it."""
    parser = _Parser(prog="gemma4", description="Gemma 4 on CPUs: run it and look inside.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = _command(commands, "demo", _demo, "stream a continuation, then show what happened inside")
    demo.add_argument("prompt", nargs="?", help="default: two that the shipped model knows how to go on with")
    demo.add_argument("--output", type=Path, help="the heat map (default: gemma4-demo.png, or a name that is free)")
    cli_media.add_force(demo)
    generate = _command(commands, "generate", _generate, "continue a prompt")
    generate.add_argument("prompt", help='text; "-" reads it from standard input')
    generate.add_argument("--chat", action="store_true", help="put the prompt through the chat template as a user turn")
    _add_sampling(generate)
    chat = _command(commands, "chat", _chat, "talk; the history stays in the KV cache")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--think", action="store_true", help="let the model think before it answers, and show it")
    cli_media.add_attachments(chat)
    _add_sampling(chat)
    detect = _command(commands, "detect", _detect, "draw boxes around what a picture shows")
    cli_media.add_detect(detect)
    transcribe = _command(commands, "transcribe", _transcribe, "write down what a recording says, or translate it")
    cli_media.add_transcribe(transcribe)
    guard = _command(commands, "guard", _guard, "score a text by policies with ShieldGemma")
    cli_guard.add_guard(guard)
    look.add_lens(_command(commands, "lens", _lens, "the next token that the model would say after each block"))
    text = "what each attention, MLP and per-layer embedding adds to the logit of the predicted token"
    look.add_attribute(_command(commands, "attribute", _attribute, text))
    text = "cards of a dictionary's features, from a harvest or from Gemma Scope 2's examples"
    cli_features.add_features(_command(commands, "features", _features, text))
    _command(commands, "info", _info, "what a model is and what it costs")
    _add_bench(commands)
    _add_quantize(commands)
    harvest = _command(commands, "harvest", _harvest, "run a model over a corpus and store activations; resumes")
    cli_harvest.add_harvest(harvest)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="for errors show the traceback, too")
    return parser


def _add_bench(commands: Any) -> None:
    text = "how fast a model runs here, and how near that is to what the machine can do"
    parser = commands.add_parser("bench", help=text, description=text)
    parser.set_defaults(run=cli_bench.run_bench)
    cli_bench.add_bench(parser)
    _add_engine(parser)


def _add_quantize(commands: Any) -> None:
    text = "write a model as a GGUF file, quantised or not"
    parser = commands.add_parser("quantize", help=text, description=text)
    parser.set_defaults(run=_quantize)
    parser.add_argument("source", metavar="MODEL", help="Hugging Face directory, shipped model or unquantised .gguf")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--type", required=True, help="Q8_0, Q4_0, Q4_K_M, BF16 … (a wrong one lists all)")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="TENSOR=TYPE",
        help="another type for tensors of this GGUF name or glob (repeatable): per_layer_token_embd=Q8_0",
    )
    cli_media.add_force(parser)
    parser.add_argument("--threads", type=int, default=0, help="0 = the CPUs this process may use")
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="TEXTFILE",
        help="then measure the KL divergence from the source over this text (- = standard input, none = a short chat)",
    )


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", default="tiny-e", metavar="MODEL", help="Hugging Face directory, .gguf file or shipped model"
    )
    _add_engine(parser)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    text = "image and audio encoders of a .gguf model (default: the only mmproj*.gguf beside it)"
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help=text)
    parser.add_argument("--threads", type=int, default=0, help="0 = the CPUs this process may use")
    parser.add_argument(
        "--kv-dtype",
        choices=get_args(KVDtype),
        help="keys and values (default: f16 if weights are quantised, else f32)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens to generate at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="0 = greedy; default: the checkpoint's")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest; 0 = all; default: the checkpoint's")
    text = "draw from the fewest tokens whose probabilities sum to this; 1 = all; default: the checkpoint's"
    parser.add_argument("--top-p", type=float, help=text)
    text = "draw from no token below this share of the likeliest one's probability; default: the checkpoint's"
    parser.add_argument("--min-p", type=float, help=text)
    parser.add_argument("--seed", type=int, help="the same draws each time")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def _load(args: argparse.Namespace) -> Model:
    """Load, with a line of progress on stderr if it takes time and stderr is a terminal."""
    from gemma4.model import load  # late: `gemma4 --help` needs no engine

    start = time.perf_counter()

    def progress(done: int, total: int, name: str) -> None:
        if time.perf_counter() - start > _PROGRESS_AFTER_S:
            status("" if done == total else f"loading {done}/{total} files  {name:.60}")

    return load(args.model, mmproj=args.mmproj, threads=args.threads, kv_dtype=args.kv_dtype, progress=progress)


def _demo(args: argparse.Namespace) -> None:
    from gemma4.cli.demo import picture_name, run_demo

    output = picture_name(args.output, args.force) if args.output else None  # before the work
    start = time.perf_counter()
    model = _load(args)
    seconds = time.perf_counter() - start
    run_demo(
        model,
        args.prompt and typed(args.prompt),
        console=console(),
        output=output,
        force=args.force,
        load_s=seconds,
    )


def _generate(args: argparse.Namespace) -> None:
    from gemma4.cli.demo import show_speed

    text = sys.stdin.read() if args.prompt == "-" else typed(args.prompt)
    model = _load(args)
    prompt = [{"role": "user", "content": text}] if args.chat else text
    with model.stream(prompt, **_sampling(args)) as stream:
        for piece in stream:
            emit(piece, end="")
    emit("")
    show_speed(stream.result, console(stderr=True, soft_wrap=True))


def _info(args: argparse.Namespace) -> None:
    emit(str(_load(args).info()))


def _guard(args: argparse.Namespace) -> None:
    cli_guard.run_guard(lambda: _load(args), args)


def _quantize(args: argparse.Namespace) -> None:
    from gemma4.quantization import quantize

    overrides = dict(_override(text) for text in args.override)
    text = _report_text(args.report)
    watched = sys.stderr.isatty()
    progress_bar = Progress(
        *Progress.get_default_columns(), console=console(stderr=True), transient=True, disable=not watched
    )
    with progress_bar as bar:
        task = bar.add_task("quantize")

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(shown(f"{name:<32.32}")))

        result = quantize(
            args.source,
            args.out,
            type=args.type,
            overrides=overrides,
            force=args.force,
            threads=args.threads,
            progress=progress,
        )
    for note in result.notes:
        say(note)
    out = console()
    emit(str(result.path))
    out.print(result.table())
    if text is not None:
        _report(args, result, text, out)


def _override(text: str) -> tuple[str, str]:
    pattern, equals, dtype = text.partition("=")
    if not (pattern and equals and dtype):
        raise ValueError(f"--override {text!r:.120}: expected TENSOR=TYPE, such as per_layer_token_embd=Q8_0")
    return pattern, dtype


def _report_text(name: str | None) -> str | None:
    """Read before the work begins, so that a wrong name fails early. "" = the built-in conversation."""
    if not name:
        return name
    text = text_of(name)
    if not text.strip():
        raise ValueError(f"the text for --report is empty: {name}")
    return text


def _report(args: argparse.Namespace, result: QuantizationResult, text: str, out: Console) -> None:
    from gemma4.model import load
    from gemma4.quantization import compare, sample_ids

    with load(args.source, threads=args.threads) as source, load(result.path, threads=args.threads) as model:
        found = compare(source, model, text or sample_ids(source))
        which = f"against {args.source}, precision {model.engine.precision}"
    out.print(styled(f"{which}: {found}", out), soft_wrap=True)


def _chat(args: argparse.Namespace) -> None:
    model = _load(args)
    out = console(soft_wrap=True)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  # line editing in input()

        out.print(_HELP, style="dim")
    with model.new_sequence() as sequence:
        opening = [{"role": "system", "content": typed(args.system)}] if args.system else []
        attached = cli_media.attachments(model, args)
        messages, media = list(opening), list(attached)
        while (line := _read_line()) is not None:
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                messages, media = list(opening), list(attached)
            elif line.startswith(("/image ", "/audio ", "/video ")):
                media += cli_media.attach_line(model, line, args, say)
            elif line == "/info":
                emit(str(model.info()))
            elif line.startswith("/"):
                out.print(_HELP, style="dim")
            elif line:
                content = cli_media.with_media(line, media)
                if _answer(model, messages, content, sequence, args, out):
                    media = []


def _detect(args: argparse.Namespace) -> None:
    cli_media.run_detect(_load(args), args, say)


def _transcribe(args: argparse.Namespace) -> None:
    cli_media.run_transcribe(_load(args), args, say)


def _harvest(args: argparse.Namespace) -> None:
    cli_harvest.run_harvest(_load(args), args)


def _lens(args: argparse.Namespace) -> None:
    look.run_lens(lambda: _load(args), args)


def _attribute(args: argparse.Namespace) -> None:
    look.run_attribute(lambda: _load(args), args)


def _features(args: argparse.Namespace) -> None:
    cli_features.run_features(lambda: _load(args), args)


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(
    model: Model,
    messages: list[dict[str, Any]],
    content: Any,
    sequence: Any,
    args: argparse.Namespace,
    out: Console,
) -> bool:
    """One turn; after an error or Ctrl-C the conversation continues with the output so far. False after an error."""
    from gemma4.errors import CapacityError

    asked = [*messages, {"role": "user", "content": content}]
    options = {**_sampling(args), "think": args.think, "show_thinking": args.think}
    try:
        stream = model.stream(asked, sequence=sequence, **options)
    except CapacityError as error:
        say(f"error: {_one_line(error)} /reset starts afresh.")
        return False
    except (ValueError, NotImplementedError) as error:  # for example a template that refuses the message
        say(f"error: {_one_line(error)}")
        return False
    try:
        for piece in stream:
            out.print(styled(piece, out, "dim" if piece.channel == "thinking" else ""), end="")
    except KeyboardInterrupt:
        stream.close()
        out.print(" (stopped)", style="dim", end="")
    out.print()
    for call in stream.result.tool_calls:
        out.print(styled(f"{call.name}({call.arguments})", out, "cyan"))
    for text in stream.result.malformed:
        out.print(styled(f"a tool call that could not be read: {text}", out, "yellow"))
    messages[:] = [*asked, {"role": "assistant", "content": stream.result.text}]
    return True
