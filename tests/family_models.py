# SPDX-License-Identifier: Apache-2.0
"""Random small checkpoints of the models made from Gemma 2 and 3, with a tokenizer and a chat template.

The vocabulary is tiny-e's under the names that each model gives its control tokens. The templates are short ones of our
own, in each model's format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_models import write_checkpoint

import gemma4

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
N_TOKENS = 2603
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": N_TOKENS,
    "hidden_size": 64,  # its root is exact in bfloat16: transformers in float32 scales embeddings by the same
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 400,
    "sliding_window": 64,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
}
GEMMA3: dict[str, Any] = GEMMA2 | {"model_type": "gemma3_text", "num_hidden_layers": 7, "eos_token_id": [1, 106]}
TURNS = {"<|turn>": "<start_of_turn>", "<turn|>": "<end_of_turn>"}
FUNCTION_TOKENS = {
    "<|tool>": "<start_function_declaration>",
    "<tool|>": "<end_function_declaration>",
    "<|tool_call>": "<start_function_call>",
    "<tool_call|>": "<end_function_call>",
    "<|tool_response>": "<start_function_response>",
    "<tool_response|>": "<end_function_response>",
    '<|"|>': "<escape>",
}
PLAIN_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{
'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
GUARD_TEMPLATE = """{{ bos_token }}Act as a policy expert.
<start_of_turn>
{% for message in messages %}{{ 'Asked' if message['role'] == 'user' else 'Answered' }}: {{ message['content'] | trim }}
{% endfor %}<end_of_turn>
The rule: {{ guideline }}
Is it broken? Begin with Yes or No.
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def renamed_tokenizer(names: Mapping[str, str], pairs: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """tiny-e's tokenizer.json with other names for tokens, which stay in their places; `pairs` are merges to add, the
    result of each in the place of an unused token."""
    table = json.loads((TINY / "tokenizer.json").read_text())
    names = names | {f"<unused{i}>": "".join(pair) for i, pair in enumerate(pairs)}
    vocab = {names.get(token, token): i for token, i in table["model"]["vocab"].items()}
    pieces = {"".join(pair) for pair in pairs}
    added = [token | {"content": names.get(token["content"], token["content"])} for token in table["added_tokens"]]
    table["added_tokens"] = [token for token in added if token["content"] not in pieces]
    table["model"] |= {"vocab": vocab, "merges": [*table["model"]["merges"], *map(list, pairs)]}
    return table


def write_member(
    directory: Path, config: dict[str, Any], tokenizer: dict[str, Any], template: str | None = PLAIN_TEMPLATE
) -> Path:
    write_checkpoint(directory, config)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def write_shieldgemma(directory: Path, template: str | None = GUARD_TEMPLATE) -> Path:
    return write_member(directory, GEMMA2, renamed_tokenizer(TURNS, (("N", "o"),)), template)
