# SPDX-License-Identifier: Apache-2.0
"""Decoding after a long prompt, in turns with llama.cpp.

    python benchmarks/long_context.py --model FILE.gguf --llamacpp LLAMA_CPP --json out.json

llama.cpp takes ten minutes for 16,384 tokens on two cores, too long for run.py, where every round begins anew. So here
both engines run the prompt once and stay: llama-server with the prompt in its one slot, this package with its sequence.
Then they take turns with some tokens each, the server stopped (SIGSTOP) while it is not its turn. Both take the most
likely token; random weights make nobody stop. Each turn goes on where the last one ended, since llama.cpp keeps no more
than the window of sliding layers and could not go back.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
from peers import find_llama_bench, warm

import gemma4

READY_SECONDS = 300  # for llama-server to load the file


class OurTurn:
    """This package."""

    def __init__(self, model: Path, threads: int) -> None:
        self.model = gemma4.load(model, threads=threads, precision="fast")
        self.sequence = self.model.new_sequence()
        self.logits: Any = None

    def prefill(self, ids: list[int]) -> float:
        """Run the prompt; seconds."""
        start = time.perf_counter()
        self.logits = self.model.forward(np.array(ids, np.int32), sequence=self.sequence, logits="last")
        return time.perf_counter() - start

    def decode(self, n: int) -> float:
        """n more tokens, each the most likely after what there was; tokens per second."""
        start = time.perf_counter()
        for _ in range(n):
            token = np.array([self.logits.argmax()], np.int32)
            self.logits = self.model.forward(token, sequence=self.sequence, logits="last")
        return n / (time.perf_counter() - start)


class TheirTurn:
    """A llama-server with one slot."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process, self.url = process, url
        self.ids: list[int] = []

    def prefill(self, ids: list[int]) -> float:
        """Run the prompt; seconds."""
        self.ids = list(ids)
        return float(self._complete(1)["timings"]["prompt_ms"]) / 1e3

    def decode(self, n: int) -> float:
        """n more tokens; tokens per second by its own clock, which leaves out the first (it counts as prompt)."""
        timings = self._complete(n + 1)["timings"]
        if timings["prompt_n"] > 4 or timings["predicted_n"] != n + 1:
            raise RuntimeError(f"llama-server ran {timings['prompt_n']} tokens of the prompt again: {timings}")
        return n / (float(timings["predicted_ms"]) / 1e3)

    def _complete(self, n: int) -> dict[str, Any]:
        body = {"prompt": self.ids, "n_predict": n, "cache_prompt": True, "temperature": 0, "samplers": ["top_k"]}
        body |= {"top_k": 1, "ignore_eos": True, "return_tokens": True, "id_slot": 0}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + "/completion", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=7200) as answer:
            result: dict[str, Any] = json.load(answer)
        self.ids += result["tokens"]
        return result


@contextmanager
def llama_server(folder: Path, gguf: Path, threads: int, n_context: int) -> Iterator[TheirTurn]:
    """A server of that file. Raises RuntimeError with the end of its output if it does not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [folder / "llama-server", "-m", gguf, "-t", threads, "-c", n_context, "-np", 1, "--host", "127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            if not _is_up(url, process):
                log.seek(0)
                raise RuntimeError(f"llama-server: {log.read().decode(errors='replace')[-800:]}")
            yield TheirTurn(process, url)
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def _is_up(url: str, process: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):  # 503 while it loads
            time.sleep(0.5)
    return False


def take_turns(ours: OurTurn, theirs: TheirTurn, n_tokens: int, n_rounds: int) -> dict[str, list[float]]:
    """Tokens per second of both in each round; who comes first changes from round to round."""
    rates: dict[str, list[float]] = {"gemma4": [], "llama.cpp": []}
    for i in range(n_rounds):
        for engine in ("gemma4", "llama.cpp") if i % 2 == 0 else ("llama.cpp", "gemma4"):
            if engine == "gemma4":
                theirs.process.send_signal(signal.SIGSTOP)
                rates[engine].append(ours.decode(n_tokens))
                theirs.process.send_signal(signal.SIGCONT)
            else:
                rates[engine].append(theirs.decode(n_tokens))
        print(f"round {i + 1}/{n_rounds}: {rates['gemma4'][-1]:.2f} against {rates['llama.cpp'][-1]:.2f} tokens/s",
              file=sys.stderr)  # fmt: skip
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--llamacpp", type=Path, required=True, help="folder of a built llama.cpp")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=16384, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args()
    try:
        server_folder = find_llama_bench(args.llamacpp)
    except FileNotFoundError as missing:
        parser.error(str(missing))
    warm([args.model])
    ours = OurTurn(args.model, args.threads)
    n_ids = ours.model.n_token_ids
    ids = np.random.default_rng(0).integers(n_ids // 8, n_ids * 3 // 4, args.context).tolist()
    n_context = args.context + (args.decode + 2) * args.rounds + 256
    with llama_server(server_folder, args.model, args.threads, n_context) as theirs:
        seconds = {"llama.cpp": theirs.prefill(ids), "gemma4": ours.prefill(ids)}
        for engine, taken in seconds.items():
            print(f"{engine}: prompt of {args.context} tokens in {taken:.0f} s", file=sys.stderr)
        ours.decode(2)
        rates = take_turns(ours, theirs, args.decode, args.rounds)
    quotients = [a / b for a, b in zip(rates["gemma4"], rates["llama.cpp"], strict=True)]
    for engine, values in rates.items():
        print(f"{engine:10} {median(values):6.3g} tokens/s ({min(values):.3g} to {max(values):.3g})")
    print(f"{'ratio':10} {median(quotients):6.3g} ({min(quotients):.3g} to {max(quotients):.3g})")
    if args.json:
        settings = {name: getattr(args, name) for name in ("context", "decode", "rounds", "threads")}
        record = {"machine": machine.record(), "model": args.model.name, "settings": settings}
        record |= {"prompt_s": seconds, "decode_tps": rates, "ratio": median(quotients)}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
