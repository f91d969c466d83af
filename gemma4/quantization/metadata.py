# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's metadata: configuration, sampling, tokenizer and chat template under llama.cpp's keys.

Ref: llama.cpp conversion/gemma.py (keys) and gguf-py/gguf/vocab.py (token types). `gemma4.load` reads all of it back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.files import read_limited
from gemma4.load.checkpoint import Checkpoint
from gemma4.load.config import EARLIER, FULL, SLIDING, TextConfig
from gemma4.load.gguf import GgufArray
from gemma4.load.gguf_checkpoint import SAMPLING_KEYS, TOKEN_KEYS, GgufCheckpoint
from gemma4.load.gguf_config import ARCHITECTURE, ROPE_FREQS, architecture_of, parse_metadata
from gemma4.load.gguf_tokenizer import NAMED, PREFIX, merges_from_scores
from gemma4.load.mapped import TensorInfo
from gemma4.narrow import is_list
from gemma4.text.tokenizer import CONTROL, Tokenizer
from gemma4.text.tokenizer_file import MAX_FILE, read_table, steps_of, texts_overlap

# llama.cpp's number of a file's kind (llama_ftype), for display only
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K": 16, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
    "BF16": 32, "MXFP4": 38,
}  # fmt: skip
_QUANTISATION_VERSION = 2  # of ggml's block layouts
_OURS = ("general.file_type", "general.quantization_version", "general.alignment")  # not copied from another file
_STANDS_STILL = 1e30  # divisor of the frequency of a pair that does not rotate

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # tokenizer.ggml.token_type
_ALL_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_SCORE = -1000.0  # score of every token where merges determine the order
_TURN_ENDS = ("<turn|>", "<end_of_turn>")  # of Gemma 4's chat format, and of earlier models'
# control tokens that llama.cpp should show nevertheless, for clients that parse the answer
_VISIBLE = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *(
        "<start_function_call>",
        "<end_function_call>",
        "<start_function_response>",
        "<end_function_response>",
        "<escape>",
    ),
)


def metadata(checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    """All keys, for a file of this type or mix. Another GGUF file's are copied.

    Raises FormatError, NotImplementedError (a tokenizer that such a file cannot hold).
    """
    if isinstance(checkpoint, GgufCheckpoint):
        stored = checkpoint.metadata
        out = {key: value for key, value in stored.items() if key not in _OURS and not key.startswith("split.")}
    else:
        name = checkpoint.path.resolve().name
        architecture = _architecture(checkpoint.config)
        out = {"general.architecture": architecture, "general.type": "model", "general.name": name}
        model = _model(checkpoint.config) if architecture == ARCHITECTURE else _earlier_model(checkpoint.config)
        out |= {f"{architecture}.{key}": value for key, value in model.items()}
        out |= _sampling(checkpoint.generation_config) | _text(checkpoint, architecture)
    return out | {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": _QUANTISATION_VERSION}


def check(table: Mapping[str, Any], tensors: Iterable[TensorInfo], config: TextConfig, where: str) -> None:
    """Raise NotImplementedError if the keys would be read back as another model than `config`."""
    plain = {key: value.values() if isinstance(value, GgufArray) else value for key, value in table.items()
             if not key.startswith("tokenizer.") or isinstance(value, int)}  # fmt: skip
    freqs = made_tensors(config).get(ROPE_FREQS)
    read = parse_metadata(plain, {info.name: info for info in tensors}, freqs, (), where)
    # the keys do not say whether images see both ways, and these files hold the text model alone; gains have their 1
    ours = replace(config, unit_gains=False).engine("F32")
    theirs = replace(read, bidirectional=config.bidirectional).engine("F32")
    different = [key for key, value in ours.items() if not _equal(value, theirs[key])]
    if different:
        keys = f"GGUF's keys for {table['general.architecture']}"
        raise NotImplementedError(f"{where}: {keys} cannot say this model's {', '.join(different)}")


def _equal(a: Any, b: Any) -> bool:
    if is_list(a) and a and isinstance(a[0], np.ndarray):
        return len(a) == len(b) and all(map(np.array_equal, a, b))
    return bool(np.float32(a) == np.float32(b)) if isinstance(a, float) else a == b


def made_tensors(config: TextConfig) -> dict[str, NDArray[np.float32]]:
    """Tensors of the file that no checkpoint has: rope_freqs.weight of Gemma 4, float32 [head size / 2] of the global
    layers, the divisor of each pair's frequency."""
    if config.model_type in EARLIER:
        return {}
    full = config.layer_types.index(FULL)
    turns = config.rope[FULL].inv_freq(config.head_dim[full]) > 0
    return {ROPE_FREQS: np.where(turns, np.float32(1), np.float32(_STANDS_STILL))}


def _architecture(config: TextConfig) -> str:
    name = architecture_of(config)
    assert name is not None  # the caller refused the others
    return name


def _sampling(defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = {f"general.sampling.{key}": defaults.get(name) for key, name in SAMPLING_KEYS.items()}
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def _model(c: TextConfig) -> dict[str, Any]:
    full = c.layer_types.index(FULL)  # there always is one: the last
    local = c.layer_types.index(SLIDING) if SLIDING in c.layer_types else full
    out: dict[str, Any] = {
        **_shapes(c),
        "attention.sliding_window": c.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in c.layer_types],
        "attention.shared_kv_layers": c.n_layers - c.first_shared_layer,
        "embedding_length_per_layer_input": c.d_ple,
        "rope.freq_base": c.rope[FULL].theta,
        "rope.freq_base_swa": c.rope[c.layer_types[local]].theta,
    }
    for suffix, layer in (("", full), ("_swa", local)):
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            out[key + suffix] = c.head_dim[layer]
    if c.logit_softcap:
        out["final_logit_softcapping"] = c.logit_softcap
    if c.n_experts:
        out |= {"expert_count": c.n_experts, "expert_used_count": c.top_k_experts}
        out["expert_feed_forward_length"] = c.d_expert
    return out


def _earlier_model(c: TextConfig) -> dict[str, Any]:
    """Gemma 2 and 3. A key that llama.cpp's converter leaves out is written only where its default would be wrong."""
    family = EARLIER[c.model_type]
    rope = c.rope[FULL if FULL in c.layer_types else SLIDING]
    out: dict[str, Any] = {
        **_shapes(c),
        "attention.key_length": c.head_dim[0],
        "attention.value_length": c.head_dim[0],
        "rope.freq_base": rope.theta,
    }
    if rope.rope_type == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if SLIDING in c.layer_types:
        out |= {"attention.sliding_window": c.sliding_window, "rope.freq_base_swa": c.rope[SLIDING].theta}
    slides = [kind == SLIDING for kind in c.layer_types]
    if slides != [bool((i + 1) % family.period) for i in range(c.n_layers)]:
        out["attention.sliding_window_pattern"] = slides
    caps = {"final_logit_softcapping": c.logit_softcap, "attn_logit_softcapping": c.attention_softcap}
    return out | {key: value for key, value in caps.items() if value}


def _shapes(c: TextConfig) -> dict[str, Any]:
    """The keys that every architecture has."""
    return {
        "block_count": c.n_layers,
        "context_length": c.context_length,
        "embedding_length": c.d_model,
        "feed_forward_length": _one_or_all(c.d_mlp),
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": _one_or_all(c.n_kv_heads),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }


def _one_or_all(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def _text(checkpoint: Checkpoint, architecture: str) -> dict[str, Any]:
    if checkpoint.tokenizer_path is None:
        return {f"{PREFIX}model": "none", f"{architecture}.vocab_size": checkpoint.config.d_vocab}
    where = str(checkpoint.tokenizer_path)
    table = read_table(read_limited(checkpoint.tokenizer_path, MAX_FILE), where)
    Tokenizer.from_table(table, where)  # a file that cannot be read is refused there
    _check_same_ids(table, where)
    out = _vocabulary(table, checkpoint, architecture)
    template = checkpoint.load_chat_template()
    return out | ({} if template is None else {"tokenizer.chat_template": template.source})


def _vocabulary(table: Any, checkpoint: Checkpoint, architecture: str) -> dict[str, Any]:
    """The vocabulary's metadata from a parsed tokenizer.json. llama.cpp reads merges of Gemma 4, and scores of earlier
    models; this package reads merges where there are any."""
    where = str(checkpoint.tokenizer_path)
    added = {token["content"]: token for token in table.get("added_tokens") or ()}
    ids = table["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens, kinds = _tokens(ids, added, checkpoint.config.d_vocab, where)
    merges = [_merge(pair, where) for pair in table["model"]["merges"]]
    by_merges = architecture == ARCHITECTURE
    scores = (
        [_SCORE] * len(tokens) if by_merges else _scores(table["model"]["vocab"], added, merges, len(tokens), where)
    )
    return {
        f"{PREFIX}model": ARCHITECTURE if by_merges else "llama",
        f"{PREFIX}tokens": tokens,
        f"{PREFIX}scores": scores,
        f"{PREFIX}token_type": kinds,
        f"{PREFIX}merges": merges,
        **_special_ids(ids, checkpoint),
        f"{PREFIX}add_space_prefix": False,
        f"{PREFIX}add_bos_token": True,
    }


def _scores(
    vocab: Mapping[str, int], added: Mapping[str, Any], merges: list[str], rows: int, where: str
) -> list[float]:
    """Scores of a SentencePiece vocabulary, from which its merges follow: the earlier a token is merged, the higher.

    Runs of one character share a score: their merges are ordered by length. Raises NotImplementedError for merges that
    follow from no scores.
    """
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in merges)]
    last = {left + right: rank for rank, (left, right) in enumerate(pairs)}
    scores: dict[str, float] = {}
    score, until, runs = 0.0, -1, True  # the present score, the last merge of its tokens, and whether all are runs
    for rank, (left, right) in enumerate(pairs):
        token = left + right
        if token in scores:
            continue
        is_run = len(set(token)) == 1
        if rank > until:
            score, runs = -1.0 - len(scores), is_run
        elif not (runs and is_run):
            raise NotImplementedError(_no_scores(where, token))
        scores[token], until = score, max(until, last[token])
    out = [-1.0 - len(scores)] * rows
    for token, i in vocab.items():
        out[i] = scores.get(token, out[i])
    plain = {token: i for token, i in vocab.items() if token not in added}
    different = set(merges_from_scores(plain, out, where)) ^ {pair for pair in pairs if "".join(pair) not in added}
    if different:
        raise NotImplementedError(_no_scores(where, "".join(min(different))))
    return out


def _no_scores(where: str, token: str) -> str:
    what = f"the merges that make the token {token[:80]!r} do not follow from scores of tokens"
    return f"{where}: {what}, as the GGUF format of this model needs; texts would get other ids"


def _check_same_ids(table: Mapping[str, Any], where: str) -> None:
    """Raise NotImplementedError for properties that a GGUF file cannot express, and so would give texts other ids.

    A reader of the file replaces spaces by "▁", merges bytes where a character is no token, and finds added tokens
    anywhere in the text, in the middle of words as well.
    """
    for reason in _other_ids(table):
        raise NotImplementedError(f"{where}: {reason}; a GGUF file cannot say so, and texts would get other ids")


def _other_ids(table: Mapping[str, Any]) -> Iterator[str]:
    model = table["model"]
    added = {token["content"]: token for token in table.get("added_tokens") or ()}
    if not steps_of(table.get("normalizer"), "normalizers"):
        yield "normalizer is null: spaces are not written as ▁"
    if not model["merges"]:
        yield "there are no merges"
    if model.get("unk_token") != "<unk>" and not model["vocab"].keys() >= _ALL_BYTES:
        yield f"model.unk_token is {model.get('unk_token')!r:.80}, and not every byte has a token"
    for option in ("byte_fallback", "fuse_unk"):
        if not model.get(option):
            yield f"model.{option} is {str(model.get(option)).lower()}"
    for text, token in added.items():
        odd = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        if odd:
            yield f"the added token {text[:80]!r} has {odd[0]} = true"
        if token.get("normalized") and ({" ", "▁"} & set(text) or texts_overlap(text, added)):
            yield f"the added token {text[:80]!r} has normalized = true, and is spelled with spaces or overlaps another"
        if model["vocab"].get(text, token["id"]) != token["id"]:
            yield f"the added token {text[:80]!r} has another id in the vocabulary"
        if _token_type(text, token) == _BYTE:
            yield f"the added token {text[:80]!r} is spelled as a byte"
    for text in model["vocab"].keys() - added.keys():
        if text in NAMED or CONTROL.fullmatch(text):
            yield f"the token {text[:80]!r} is spelled as a control token and is none"


def _tokens(ids: Mapping[str, int], added: Mapping[str, Any], rows: int, where: str) -> tuple[list[str], list[int]]:
    """Spelling and type of every row of the embedding table; rows without a token get one that no text has."""
    top = max(ids.values(), default=-1)
    if top >= rows or min(ids.values(), default=0) < 0 or len(set(ids.values())) != len(ids):
        raise FormatError(f"{where}: token ids must be different and below the model's {rows}; the largest is {top}")
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    for text, i in ids.items():
        tokens[i], kinds[i] = text, _token_type(text, added.get(text))
    return tokens, kinds


def _token_type(text: str, added: Mapping[str, Any] | None) -> int:
    if text in _VISIBLE:
        return _USER_DEFINED
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return _BYTE
    if added is None:
        return _NORMAL
    return _CONTROL if added.get("special") or CONTROL.fullmatch(text) else _USER_DEFINED


def _merge(pair: Any, where: str) -> str:
    """A merge as "left right"; older tokenizer.json files have it so already."""
    line = pair if isinstance(pair, str) else " ".join(pair)
    if line.count(" ") != 1:
        raise NotImplementedError(f"{where}: the merge {line!r:.80} holds a space within a piece")
    return line


def _special_ids(ids: Mapping[str, int], checkpoint: Checkpoint) -> dict[str, Any]:
    out = {f"{PREFIX}{key}_token_id": ids.get(f"<{name.removesuffix('_token')}>") for name, key in TOKEN_KEYS.items()}
    if checkpoint.config.pad_token_id is not None:  # soft tokens read its row of the per-layer table
        out[f"{PREFIX}padding_token_id"] = checkpoint.config.pad_token_id
    ends = checkpoint.generation_config.get("eos_token_id", checkpoint.config.eos_token_ids)
    end = next((ids[text] for text in _TURN_ENDS if text in ids), None)
    if end is not None and end in (ends if isinstance(ends, (list, tuple)) else [ends]):
        out[f"{PREFIX}eot_token_id"] = end
    return {key: value for key, value in out.items() if value is not None} | _suppressed(checkpoint)


def _suppressed(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Ids that are never to be generated, of which 12B has two."""
    ids = checkpoint.generation_config.get("suppress_tokens")
    if not is_list(ids) or not ids:
        return {}
    valid = all(type(i) is int and 0 <= i < checkpoint.config.d_vocab for i in ids)
    return {f"{PREFIX}suppress_tokens": ids} if valid else {}
