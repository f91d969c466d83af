# SPDX-License-Identifier: Apache-2.0
"""Divergence of a quantised model's predictions from those of its source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma4.inputs import as_ids
from gemma4.model import Model

_LOGITS = 1 << 24  # logits of either model at a time: 64 MB

# Text of a report without a file: a conversation as chat models have them.
SAMPLE: tuple[dict[str, str], ...] = (
    {"role": "user", "content": "What is the capital of France, and which river runs through it?"},
    {"role": "assistant", "content": "The capital of France is Paris. The river Seine runs through it."},
    {"role": "user", "content": "Count from one to ten, then tell me a very short story about a cat and a dog."},
    {
        "role": "assistant",
        "content": "One, two, three, four, five, six, seven, eight, nine, ten.\n\nOnce upon a time there was a little "
        'cat who was afraid of the dark. One night she met an old dog in the garden. "Come with me," said the dog, '
        '"and look up." They sat on the grass and looked at the stars, and the cat was not afraid any more.',
    },
    {"role": "user", "content": 'Thank you! How would you say "good morning, my friend" in Spanish?'},
    {"role": "assistant", "content": 'In Spanish, you would say: "Buenos días, mi amigo."'},
)


@dataclass(frozen=True)
class Comparison:
    """Over `n_positions` next-token predictions: KL divergences D(reference || model) in nats, their mean, 99th
    percentile and maximum, and the share of positions where both find the same token likeliest."""

    n_positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"{self.n_positions} positions: KL divergence mean {self.kl_mean:.3g}, 99th percentile {self.kl_p99:.3g}, "
            f"maximum {self.kl_max:.3g} nats; same most likely token at {100 * self.top1_agreement:.2f} %"
        )


def compare(
    reference: Model, model: Model, ids: Sequence[int] | NDArray[np.integer] | str, *, chunk: int = 512
) -> Comparison:
    """Run both models over token ids (or a text) and compare their predictions.

    ids: int [n]. They are run in pieces of at most `chunk` positions, each on its own; if they start with BOS, so does
    every piece. Raises ValueError (no ids, ids out of range, models of different vocabularies, chunk below 2).
    """
    if reference.d_vocab != model.d_vocab:
        raise ValueError(f"vocabularies of {reference.d_vocab} and {model.d_vocab} tokens cannot be compared")
    chunk = min(chunk, reference.context_length, model.context_length)
    if chunk < 2:
        raise ValueError(f"chunk is {chunk}, expected at least 2 positions")
    divergences: list[float] = []
    agreed = 0
    for a, b in _logits(reference, model, _chunks(as_ids(reference, ids), chunk, reference.config.bos_token_id)):
        divergences += [_divergence(x, y) for x, y in zip(a, b, strict=True)]
        agreed += int((a.argmax(1) == b.argmax(1)).sum())
    kl = np.array(divergences)
    return Comparison(len(kl), float(kl.mean()), float(np.quantile(kl, 0.99)), float(kl.max()), agreed / len(kl))


def sample_ids(model: Model) -> NDArray[np.int32]:
    """int32 [n]: a short built-in conversation, in the model's chat format if it has one."""
    if model.chat_template is None:
        return model.to_tokens("\n\n".join(turn["content"] for turn in SAMPLE))
    text = model.chat_template.render(SAMPLE, add_generation_prompt=False)
    return model.to_tokens(text)


def _chunks(ids: NDArray[np.int32], size: int, bos: int | None) -> Iterator[NDArray[np.int32]]:
    first = ids[:1] if bos is not None and ids[0] == bos else ids[:0]
    rest = ids[len(first) :]
    step = size - len(first)
    for at in range(0, max(len(rest), 1), step):
        yield np.concatenate([first, rest[at : at + step]])


def _logits(
    reference: Model, model: Model, chunks: Iterator[NDArray[np.int32]]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """float32 [m, d_vocab] of both, with m so small that they need little memory."""
    rows = max(1, _LOGITS // model.d_vocab)
    for ids in chunks:
        with reference.new_sequence(capacity=len(ids)) as a, model.new_sequence(capacity=len(ids)) as b:
            for at in range(0, len(ids), rows):
                piece = ids[at : at + rows]
                yield reference.forward(piece, sequence=a), model.forward(piece, sequence=b)


def _divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    p, q = (_log_softmax(x.astype(np.float64)) for x in (reference, logits))
    return max(0.0, float(np.dot(np.exp(p), p - q)))  # below 0 by rounding only


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
