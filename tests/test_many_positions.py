# SPDX-License-Identifier: Apache-2.0
"""Beyond the first few positions, runs and slices, where mistakes once passed every test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import E_LIKE, write_checkpoint

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


def filled(model: gemma4.Model, ids: np.ndarray, sequence: gemma4.Sequence, step: int = 10) -> gemma4.Sequence:
    for i in range(0, len(ids), step):
        model.forward(ids[i : i + step], sequence=sequence, logits=None)
    return sequence


@pytest.fixture(scope="module")
def wide_window(tmp_path_factory: pytest.TempPathFactory) -> gemma4.Model:
    """Its window is longer than the room that a new sequence begins with."""
    return gemma4.load(write_checkpoint(tmp_path_factory.mktemp("window"), E_LIKE | {"sliding_window": 80}))


@pytest.mark.parametrize("step", [1, 10, 40, 120])
def test_a_sequence_goes_back_by_a_window(step: int, wide_window: gemma4.Model) -> None:
    """At least, and as far as it says: there the sliding layers hold the keys that the next query sees, and no more."""
    model, window = wide_window, 80
    ids = np.random.default_rng(2).integers(3, 320, 240).astype(np.int32)
    expected = model.forward(ids)
    with filled(model, ids, model.new_sequence(), step) as sequence:
        assert 0 < sequence.min_truncate <= 240 - window
        sequence.truncate(sequence.min_truncate)
        layers = sequence._engine.state()["layers"].values()
        assert min(len(keys) for _, keys, _ in layers) == window - 1
        kept = sequence.length
        np.testing.assert_array_equal(model.forward(ids[kept:], sequence=sequence), expected[kept:])


def test_an_emptied_sequence_has_forgotten_nothing(random_e: gemma4.Model) -> None:
    ids = np.random.default_rng(3).integers(3, 320, 60).astype(np.int32)
    with filled(random_e, ids, random_e.new_sequence()) as sequence:
        assert sequence.min_truncate > 0
        sequence.truncate(0)
        assert sequence.min_truncate == 0
        random_e.forward(ids[:12], sequence=sequence, logits=None)
        assert all(first == 0 for first, _, _ in sequence._engine.state()["layers"].values())
        sequence.truncate(3)
        again = random_e.forward(ids[3:], sequence=sequence)
    np.testing.assert_array_equal(again, random_e.forward(ids)[3:])


@pytest.mark.parametrize("edited", [np.arange(50) % 5 != 0, np.arange(50) == 49, np.arange(50) == 20])
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_heads_edited_at_some_positions(layer: int, edited: np.ndarray, random_e: gemma4.Model) -> None:
    """The branch is the edited heads' sum where they were edited, and the same bits as ever elsewhere."""
    ids = np.random.default_rng(1).integers(3, 320, 50).astype(np.int32)
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
