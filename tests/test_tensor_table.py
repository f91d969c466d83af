# SPDX-License-Identifier: Apache-2.0
"""The engine's tables of tensors, which loading reads: what they list is what a model needs, all of it and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_models import E_LIKE, MOE_LIKE, MULTIMODAL
from test_earlier_models import CONFIGS

import gemma4
from gemma4 import FormatError, _engine
from gemma4.load.config import parse_config
from gemma4.load.encoder_config import parse_encoders

TEXT = {"e": E_LIKE, "moe": MOE_LIKE, "untied": E_LIKE | {"tie_word_embeddings": False}, **CONFIGS}
ENCODERS = [(name, modality) for name, raw in MULTIMODAL.items() for modality in parse_encoders(raw, parse_config(raw))]
SMALL = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}


def ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: ("F32", shape, np.ones(shape, np.float32), 0) for name, shape in shapes.items()}


def assert_all_are_needed(make: Callable[[Any], Any], shapes: dict[str, tuple[int, ...]]) -> None:
    make(ones(shapes) | {"and.another": ("F32", (1,), np.ones(1, np.float32), 0)})
    for name, shape in shapes.items():
        with pytest.raises(FormatError, match=f"no tensor {name}"):
            make(ones({other: s for other, s in shapes.items() if other != name}))
        with pytest.raises(FormatError, match=rf"tensor {name} has shape"):
            make(ones(shapes | {name: (*shape[:-1], shape[-1] + 1)}))


@pytest.mark.parametrize("name", TEXT)
def test_text(name: str) -> None:
    config = parse_config(TEXT[name] | SMALL).engine()
    shapes = dict(_engine.text_tensors(config))
    assert ("lm_head.weight" in shapes) == (name == "untied")
    assert_all_are_needed(lambda tensors: _engine.Model(config, tensors, threads=1), shapes)


@pytest.mark.parametrize(("name", "modality"), ENCODERS)
def test_encoders(name: str, modality: Any, tiny: gemma4.Model) -> None:
    raw = MULTIMODAL[name]
    encoder = parse_encoders(raw, parse_config(raw))[modality].engine()
    shapes = dict(_engine.encoder_tensors(encoder))
    assert_all_are_needed(lambda tensors: _engine.Encoder(tiny.engine, encoder, tensors), shapes)


def test_a_config_that_is_none(tiny: gemma4.Model) -> None:
    for listed in (_engine.text_tensors, _engine.encoder_tensors):
        for bad in (None, {}, [], 3):
            with pytest.raises(ValueError, match="config"):
                listed(bad)  # type: ignore[arg-type]
    config = parse_encoders(MULTIMODAL["effective"], parse_config(MULTIMODAL["effective"]))["vision"].engine()
    with pytest.raises(ValueError, match="n_layers"):
        _engine.encoder_tensors(config | {"n_layers": 1 << 20})  # type: ignore[arg-type, operator]
