# SPDX-License-Identifier: Apache-2.0
"""Beyond the first few positions, runs and slices, where mistakes once passed every test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gemma4
from gemma4 import StateError
from gemma4.load import checkpoint


@pytest.mark.parametrize("n", [64, 65, 128, 200])
def test_the_per_layer_table_on_disk(
    n: int, random_dir: Path, random_e: gemma4.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are read 64 at a time."""
    monkeypatch.setattr(checkpoint, "_RANDOM_FROM", 0)
    ids = np.random.default_rng(n).integers(3, 320, n).astype(np.int32)
    with gemma4.load(random_dir) as on_disk:
        assert on_disk.engine_config["ple_on_disk"] and not random_e.engine_config["ple_on_disk"]
        logits, cache = on_disk.run_with_cache(ids, "hook_ple_token")
    expected_logits, expected = random_e.run_with_cache(ids, "hook_ple_token")
    np.testing.assert_array_equal(cache["hook_ple_token"], expected["hook_ple_token"])
    np.testing.assert_array_equal(logits, expected_logits)


def test_a_fork_remembers_what_its_origin_forgot(random_e: gemma4.Model) -> None:
    ids = np.random.default_rng(0).integers(3, 320, 100).astype(np.int32)
    with random_e.new_sequence() as origin:
        for i in range(0, 100, 10):
            random_e.forward(ids[i : i + 10], sequence=origin, logits=None)
        fork = origin.fork()
        assert 1 < origin.min_truncate < 100
        assert fork.min_truncate == origin.min_truncate == fork.fork().min_truncate
        with pytest.raises(StateError, match=str(origin.min_truncate)):
            fork.truncate(origin.min_truncate - 1)
        fork.truncate(fork.min_truncate)
        again = random_e.forward(ids[len(fork) :], sequence=fork, logits="last")
    np.testing.assert_array_equal(again, random_e.forward(ids, logits="last"))


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_heads_edited_at_forty_positions(layer: int, random_e: gemma4.Model) -> None:
    """The branch is the edited heads' sum where they were edited, and the same bits as ever elsewhere."""
    ids = np.random.default_rng(1).integers(3, 320, 50).astype(np.int32)
    edited = np.arange(50) % 5 != 0
    name, out = f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.attn.hook_out"
    seen = {}

    def scale(result: np.ndarray, hook: object) -> None:
        result[edited] *= np.linspace(1.5, 2, edited.sum(), dtype=np.float32)[:, None, None]
        seen["edited"] = result.copy()

    def keep(array: np.ndarray, hook: object) -> None:
        seen["out"] = array.copy()

    _, plain = random_e.run_with_cache(ids, out)
    random_e.run_with_hooks(ids, [(name, scale), (out, keep)])
    expected = seen["edited"][:, 0].copy()
    for head in range(1, seen["edited"].shape[1]):
        expected += seen["edited"][:, head]
    np.testing.assert_array_equal(seen["out"][edited], expected[edited])
    np.testing.assert_array_equal(seen["out"][~edited], plain[out][~edited])
    assert (np.abs(seen["out"] - plain[out])[edited].max(1) > 0).all()


@pytest.mark.parametrize("positions", [None, [0, 3, -1]])
def test_captures_of_three_prompts_of_one_length(
    positions: list[int] | None, random_e: gemma4.Model, random_moe: gemma4.Model
) -> None:
    for model in (random_e, random_moe):
        prompts = [np.random.default_rng(seed).integers(3, 320, 11).astype(np.int32) for seed in range(3)]
        options = {} if positions is None else {"pos": positions}
        logits, caches = model.run_with_cache(prompts, "*", **options)
        for i, prompt in enumerate(prompts):
            alone_logits, alone = model.run_with_cache(prompt, "*", **options)
            np.testing.assert_array_equal(logits[i], alone_logits)
            assert list(caches[i]) == list(alone)
            for name in alone:
                np.testing.assert_array_equal(caches[i][name], alone[name], err_msg=f"{name} of prompt {i}")
