# SPDX-License-Identifier: Apache-2.0
"""Positions given as embeddings read the pad token's row of the per-layer table, whichever token that is.

tests/reference/test_multimodal.py compares it with transformers (media-pad).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gemma4

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
IDS = np.array([2, -1, 30, -1, 41], np.int32)


def tiny_with_pad(folder: Path, pad: int | None) -> Path:
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["pad_token_id"] = pad
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def forward(model: gemma4.Model) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and what the per-layer table said: [T, layers, width]."""
    embeddings = np.random.default_rng(0).standard_normal((len(IDS), model.engine_config["d_model"]), np.float32)
    logits = np.zeros((len(IDS), model.d_vocab), np.float32)
    site = model.sites["hook_ple_token"]
    rows = np.zeros(site.shape(len(IDS), len(IDS)), np.float32)
    run = (model.engine.new_sequence(), IDS, embeddings, np.arange(len(IDS), dtype=np.int32), logits)
    model.engine.step([run], [(site.id, 0, 0, rows, None)])
    return logits, rows


@pytest.mark.parametrize("pad", [None, 0, 9])
def test_the_row_of_the_configured_token(tmp_path: Path, pad: int | None) -> None:
    with gemma4.load(tiny_with_pad(tmp_path / "hf", pad), precision="exact") as model:
        _, rows = forward(model)
        table = model.weight("embed_tokens_per_layer.weight")[pad or 0].reshape(rows.shape[1:])
        scale = np.float32(model.engine_config["ple_scale"])
        assert np.array_equal(rows[1], table * scale) and np.array_equal(rows[3], rows[1])
        assert not np.array_equal(rows[0], rows[1])


def test_gguf_files_keep_it(tmp_path: Path) -> None:
    source = tiny_with_pad(tmp_path / "hf", 9)
    made = gemma4.quantize(source, tmp_path / "pad.gguf", type="BF16")
    with gemma4.load(source, precision="exact") as model, gemma4.load(made.path, precision="exact") as gguf:
        assert gguf.config.pad_token_id == 9
        for ours, expected in zip(forward(gguf), forward(model), strict=True):
            assert np.array_equal(ours, expected)


def test_a_row_that_the_table_lacks(tmp_path: Path) -> None:
    source = tiny_with_pad(tmp_path / "hf", 300_000)
    with gemma4.load(source) as model:
        assert model.forward([2, 30]).shape == (2, model.d_vocab)
        with pytest.raises(
            ValueError, match=r"an embedding, which reads the rows of pad_token_id 300000 at position 1"
        ):
            forward(model)
