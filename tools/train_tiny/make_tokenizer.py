# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer of Gemma 4's structure, trained on this folder's own data.

The same: byte-fallback BPE without pre-tokenizing, the only normalisation is " " → "▁", digits and brackets never
merge, newline runs up to 31 are single tokens, the merge list is every split of every piece in id order, and ids 0–137
and 238–493 (control tokens, newline runs, bytes) are Gemma 4's own. Different: fewer pieces, and the media tokens sit
at the end of the vocabulary (Gemma 4 has them near 256000).

    python -m train_tiny.make_tokenizer --out DIR
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from .example import sample
from .lexicon import ANIMALS, CITIES, COUNTRIES, ITEMS, NAMES, OBJECTS, OPPOSITE_PAIRS, PLACES, WORDS
from .mixture import SHARES
from .stories import KINDS

SPECIALS = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}
MEDIA = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
NEWLINES, SPACES, FIRST_BYTE, FIRST_PIECE, RUN = 107, 138, 238, 494, 31

_WORD = re.compile(r"▁?[^\W\d_]+|▁\"|\.\"|▁->|▁=>")
_SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIALS.values()))


def word_counts(documents: int, seed: int = 0) -> Counter[str]:
    """Counts of the words (with their "▁") in a sample of the training data.

    The words that answers consist of get a minimum, so that a name, a capital or a translation is one token.
    """
    rng = random.Random(seed)
    names = sorted(SHARES)
    answers = [
        *NAMES,
        *PLACES,
        *OBJECTS,
        *ITEMS,
        *KINDS,
        *(w for row in (*WORDS, *COUNTRIES, *ANIMALS, *OPPOSITE_PAIRS) for w in row),
    ]
    counts: Counter[str] = Counter({"▁" + word: documents // 100 for word in answers})
    counts.update(dict.fromkeys((*NAMES, *CITIES, *ITEMS), documents // 100))
    for _ in range(documents):
        example = sample(SHARES[rng.choice(names)][0], rng, held_out=False)
        text = _SPECIAL.sub("\n", example.prompt + "\n" + example.answer).replace(" ", "▁")
        counts.update(_WORD.findall(text))
    return counts


def learn_pieces(counts: Counter[str], wanted: int) -> list[str]:
    """Plain BPE over whole words: the `wanted` most useful merges, in the order they were learnt."""
    words = {word: list(word) for word in counts}
    pieces: list[str] = []
    while len(pieces) < wanted:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = best[0] + best[1]
        if merged not in pieces:
            pieces.append(merged)
        for word, parts in words.items():
            if merged in word:
                words[word] = _merge(parts, best)
    return pieces


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def build_vocab(pieces: list[str], alphabet: list[str]) -> dict[str, int]:
    """Piece → id, laid out as the module's docstring says."""
    low = dict(SPECIALS)
    low.update({NEWLINES + i: "\n" * (i + 1) for i in range(RUN)})
    low.update({SPACES + i: "▁" * (i + 2) for i in range(RUN - 1)})
    low.update({FIRST_BYTE + i: f"<0x{i:02X}>" for i in range(256)})
    unused = 0
    for i in range(FIRST_PIECE):
        if i not in low:
            low[i] = f"<unused{unused}>"
            unused += 1
    rest = [*alphabet, *pieces, *MEDIA]
    return {piece: i for i, piece in [*sorted(low.items()), *enumerate(rest, FIRST_PIECE)]}


def build_merges(vocab: dict[str, int]) -> list[list[str]]:
    """Every split of every multi-character piece into two pieces, in id order; newline and space runs come first."""
    fixed = {*SPECIALS.values(), *MEDIA} | {p for p in vocab if re.fullmatch(r"<(unused\d+|0x..)>", p)}
    runs = [p for p in vocab if len(p) > 1 and set(p) in ({"\n"}, {"▁"})]
    words = [p for p in vocab if len(p) > 1 and p not in fixed and p not in runs]
    ordered = sorted(runs, key=lambda p: (-len(p), p)) + sorted(words, key=lambda p: vocab[p])
    return [[p[:k], p[k:]] for p in ordered for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]


def tokenizer_json(vocab: dict[str, int]) -> dict[str, object]:
    """The content of tokenizer.json."""
    special = {token: vocab[token] for token in [*SPECIALS.values(), *MEDIA]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags} for token, i in sorted(special.items(), key=lambda x: x[1])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**model, "vocab": vocab, "merges": build_merges(vocab)},
    }


def tokenizer_config() -> dict[str, object]:
    """The content of tokenizer_config.json."""
    names = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "padding_side": "left",
        **names,
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
        "video_token": "<|video|>",
    }


def make(out: Path, pieces: int = 2000, documents: int = 30_000) -> int:
    """Write tokenizer.json and tokenizer_config.json into `out`; returns the vocabulary's size."""
    counts = word_counts(documents)
    alphabet = sorted({c for word in counts for c in word} | {chr(c) for c in range(33, 127)} | {"▁"} - {"\n"})
    vocab = build_vocab(learn_pieces(counts, pieces), alphabet)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(
        json.dumps(tokenizer_json(vocab), ensure_ascii=False, indent=0), encoding="utf-8"
    )
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n", encoding="utf-8")
    return len(vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tokenizer of the small models.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=2000, help="learnt pieces beside bytes, specials and characters")
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.pieces), "tokens")


if __name__ == "__main__":
    main()
