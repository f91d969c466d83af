# SPDX-License-Identifier: Apache-2.0
"""GGUF files of Gemma 2 and 3 against transformers: every site, with the numbers of layers that decide how scores are
scaled, and the keys that llama.cpp's converter leaves out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import convert

import gemma4

from . import oracle, variants
from .compare import first_failures
from .variants import GEMMA2, GEMMA3, F, S


def _layers(n: int, period: int) -> dict[str, Any]:
    return {"layer_types": [S if (i + 1) % period else F for i in range(n)], "num_hidden_layers": n}


_ROPE3 = {S: {"rope_type": "default", "rope_theta": 1e4}, F: GEMMA3["rope_parameters"][F]}
_ROPE2 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_UNCAPPED = {"final_logit_softcapping": None, "rope_parameters": _ROPE3}
# the width per head is 8, the head size 16: half of what a wrong rule would scale scores by
MODELS = {
    "gemma2-4-layers": ("gemma2", GEMMA2 | _ROPE2 | _layers(4, 2) | {"query_pre_attn_scalar": 16}),
    "gemma2-46-layers": ("gemma2", GEMMA2 | _ROPE2 | _layers(46, 2) | {"query_pre_attn_scalar": 8}),
    "gemma3-26-layers": ("gemma3", GEMMA3 | _UNCAPPED | _layers(26, 6) | {"query_pre_attn_scalar": 16}),
    "gemma3-62-layers": ("gemma3", GEMMA3 | _UNCAPPED | _layers(62, 6) | {"query_pre_attn_scalar": 8}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    family, text = MODELS[name]
    variant = replace(variants.BY_NAME[family], name=name, text=text)
    model = variants.build(variant)
    variants.save(variant, model, tmp_path / "hf")
    ids = variants.token_ids(variant, variants.LONG)
    expected = oracle.sites_from(model, oracle.record(model, ids))
    with gemma4.load(convert(tmp_path / "hf", tmp_path / "x.gguf", "F32")) as ours:
        _, cache = ours.run_with_cache(ids.numpy(), names="*")
    assert set(cache) == set(expected)
    assert first_failures(cache, expected) == []
