# SPDX-License-Identifier: Apache-2.0
"""Prefill, decode and the encoding of media, one after the other: `gemma4 bench MODEL`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from gemma4 import checks
from gemma4.bench.machine import how_text, machine_text, measure_limits, opened, random_ids, timed
from gemma4.encoders.soft_tokens import encode
from gemma4.info import mapped_bytes, peak_bytes
from gemma4.media.medium import Medium, read_media
from gemma4.model import Model, Precision
from gemma4.profile import Limits, Profile
from gemma4.sequence import KVDtype
from gemma4.units import size


@dataclass(frozen=True)
class Speed:
    """One phase: prefill, decode, or the encoding of a picture, a recording or a video. seconds: of each timed call ·
    tokens: of one call, for media soft tokens · profile: of separate calls, not among the timed ones."""

    tokens: int
    seconds: tuple[float, ...]
    profile: Profile

    @property
    def rate(self) -> float:
        """Tokens per second, the median of the calls."""
        return self.tokens / median(self.seconds)

    def share(self, limits: Limits) -> tuple[float, float]:
        """(share of the machine's peak arithmetic, share of its read bandwidth) that a median call reaches."""
        total = self.profile.total
        per_step = 1 / max(total.calls, 1) / median(self.seconds)
        arithmetic = sum(op.arithmetic_seconds(limits) for op in self.profile.ops)
        return arithmetic * per_step, total.streamed / limits.read_bytes * per_step


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured: `print()` it.

    load_s           seconds of `gemma4.load`
    prefill, decode  a prompt with the logits of its last position; one token after that prompt
    peak_bytes       peak resident memory of the process up to the end of decoding, mapped weights included
        weights          bytes of the mapped files that are resident then, and how many of these lie in huge pages
        limits           of this machine, with the same number of threads, measured right after
    media            "image PATH" and so on: from decoded pixels or samples to soft tokens
    inputs           the model's files
    """

    model: str
    how: str
    prompt: int
    load_s: float
    prefill: Speed
    decode: Speed
    peak_bytes: int
    weights: tuple[int, int]
    limits: Limits
    notes: tuple[str, ...] = field(default=())
    media: dict[str, Speed] = field(default_factory=dict[str, Speed])
    inputs: tuple[Path, ...] = ()

    @property
    def phases(self) -> dict[str, Speed]:
        """Everything that was timed: "prefill", "decode", and the media."""
        return {"prefill": self.prefill, "decode": self.decode, **self.media}

    def __str__(self) -> str:
        arithmetic, _ = self.prefill.share(self.limits)
        _, reading = self.decode.share(self.limits)
        rows = [
            ("model", self.model),
            ("arithmetic", self.how),
            ("machine", machine_text(self.limits)),
            ("load", f"{self.load_s:.2f} s"),
            ("prefill", f"{_speed(self.prefill)}, {self.prompt} tokens, {arithmetic:.0%} of peak arithmetic"),
            ("decode", f"{_speed(self.decode)}, after {self.prompt}, {reading:.0%} of read bandwidth"),
            *((name.split()[0], self._medium(name, speed)) for name, speed in self.media.items()),
            ("peak memory", f"{size(self.peak_bytes)} resident, mapped weights included"),
            *([("weights", self._weights())] if self.weights[0] else []),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{label:<12} {value}" for label, value in rows)

    def _weights(self) -> str:
        resident, huge = self.weights
        return f"{size(resident)} of the files resident, {huge / resident:.0%} of it in huge pages"

    def _medium(self, name: str, speed: Speed) -> str:
        arithmetic, _ = speed.share(self.limits)
        file = name.partition(" ")[2]
        took = f"{1e3 * median(speed.seconds):.4g} ms"
        return f"{file}: {took}, {_speed(speed)}, {speed.tokens} soft tokens, {arithmetic:.0%} of peak arithmetic"

    def as_dict(self) -> dict[str, object]:
        """Plain numbers, for JSON."""
        speeds = {
            name: {
                "tokens_per_s": speed.rate,
                "seconds": list(speed.seconds),
                "share_of_arithmetic": speed.share(self.limits)[0],
                "share_of_bandwidth": speed.share(self.limits)[1],
                "ops": [op._asdict() for op in speed.profile.ops],
            }
            for name, speed in self.phases.items()
        }
        record: dict[str, object] = {"model": self.model, "how": self.how, "prompt": self.prompt, "load_s": self.load_s}
        record |= {"peak_bytes": self.peak_bytes, "weights": list(self.weights)}
        return record | {"limits": self.limits.__dict__, **speeds}


def _speed(speed: Speed) -> str:
    slow, fast = speed.tokens / max(speed.seconds), speed.tokens / min(speed.seconds)
    return f"{speed.rate:.4g} tokens/s ({slow:.4g} to {fast:.4g})"


def measure_model(model: Model, *, prompt: int, decode: int, repeats: int) -> tuple[Speed, Speed]:
    """Prefill and decode of random tokens. The first prompt and token warm up and do not count."""
    ids = random_ids(model, prompt + decode)
    sequence = model.new_sequence(capacity=min(model.context_length, prompt + decode))

    def prefill() -> None:
        sequence.truncate(0)
        model.forward(ids[:prompt], sequence=sequence, logits="last")

    def step(i: int) -> None:
        sequence_id = ids[prompt + i : prompt + i + 1]
        model.forward(sequence_id, sequence=sequence, logits="last")

    prefill()
    with model.profile() as prefill_profile:
        prefill()
    prefill_seconds = tuple(timed(prefill) for _ in range(repeats))
    step(0)
    n_profiled = min(16, decode // 2)
    with model.profile() as decode_profile:
        for i in range(1, 1 + n_profiled):
            step(i)
    decode_seconds = tuple(timed(lambda i=i: step(i)) for i in range(1 + n_profiled, decode))
    sequence.close()
    return Speed(prompt, prefill_seconds, prefill_profile), Speed(1, decode_seconds, decode_profile)


def measure_medium(model: Model, medium: Medium, *, repeats: int) -> Speed:
    """Encoding one picture, recording or video, including preparation of its pixels or samples. The first call, which
    binds the encoder, does not count."""

    def call() -> None:
        encode(model, medium)

    call()
    with model.profile() as profile:
        call()
    return Speed(medium.n_runs * medium.run_length, tuple(timed(call) for _ in range(repeats)), profile)


def bench(
    name_or_path: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    prompt: int = 512,
    decode: int = 32,
    repeats: int = 5,
    threads: int = 0,
    precision: Precision | None = None,
    kv_dtype: KVDtype | None = None,
    media: Sequence[Mapping[str, object]] = (),
    image_tokens: int | None = None,
) -> Benchmark:
    """Load a model and measure it: `repeats` prompts of `prompt` random tokens, then `decode` tokens after one, then
    `repeats` times the encoding of each of `media`, parts of a message as in a chat ({"type": "image", "image": …}).

    The prompt is shortened (with a note) where the model's context is too small. image_tokens: None = the model's.
    Raises ValueError for counts below 1 (decode: below 4), and what `gemma4.load` and `read_media` raise.
    """
    counts = {"prompt": prompt, "decode": decode, "repeats": repeats}
    prompt, decode, repeats = (checks.integer(name, n, -(1 << 31), 1 << 31) for name, n in counts.items())
    if prompt < 1 or repeats < 1 or decode < 4:
        raise ValueError(f"prompt {prompt}, repeats {repeats}, decode {decode}: expected at least 1, 1 and 4")
    model, load_s = opened(name_or_path, mmproj=mmproj, threads=threads, precision=precision, kv_dtype=kv_dtype)
    with model:
        budget = model.image_tokens if image_tokens is None else image_tokens
        found = read_media([{"content": list(media)}], modalities=model.modalities, image_tokens=budget)
        notes: list[str] = []
        room = model.context_length - decode
        if room < 1:
            raise ValueError(f"decode {decode}: the model's context is {model.context_length} positions")
        if prompt > room:
            notes.append(f"the prompt is {room} tokens, not {prompt}: the context is {model.context_length} positions")
            prompt = room
        speeds = measure_model(model, prompt=prompt, decode=decode, repeats=repeats)
        peak, weights = peak_bytes(), mapped_bytes(file.path for file in model.checkpoint.files)
        encoding = {f"{one.kind} {one.name}": measure_medium(model, one, repeats=repeats) for one in found}
        limits = measure_limits(model.engine.threads)  # last: its array would count as memory
        measured = (load_s, *speeds, peak, weights, limits)
        path, inputs = str(model.checkpoint.path), model.checkpoint.inputs
        return Benchmark(path, how_text(model), prompt, *measured, tuple(notes), encoding, inputs)
