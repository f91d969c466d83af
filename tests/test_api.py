# SPDX-License-Identifier: Apache-2.0
"""load, tokens, forward, sequences, save and restore, info."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import gemma4
from gemma4 import CapacityError, FormatError, StateError


def test_forward_shapes(random_e, prompt):
    logits = random_e.forward(prompt)
    assert logits.shape == (12, 320) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and np.abs(logits).max() <= 30  # the softcap


def test_logits_positions(random_e, prompt):
    every = random_e.forward(prompt)
    np.testing.assert_array_equal(random_e.forward(prompt, logits="last"), every[-1:])
    np.testing.assert_array_equal(random_e.forward(prompt, logits=3), every[3:4])
    np.testing.assert_array_equal(random_e.forward(prompt, logits=-2), every[-2:-1])
    np.testing.assert_array_equal(random_e.forward(prompt, logits=slice(2, 9, 3)), every[2:9:3])
    np.testing.assert_array_equal(random_e.forward(prompt, logits=[7, 0, 7]), every[[7, 0, 7]])
    np.testing.assert_array_equal(random_e.forward(prompt, logits=[2, 2, 5]), every[[2, 2, 5]])
    assert random_e.forward(prompt, logits=None) is None


def test_batch_is_ragged_and_equals_single_runs(random_e, prompt):
    prompts = [prompt, prompt[:1], prompt[3:10]]
    batch = random_e.forward(prompts)
    assert [len(x) for x in batch] == [12, 1, 7]
    for one, ids in zip(batch, prompts, strict=True):
        np.testing.assert_array_equal(one, random_e.forward(ids))


@pytest.mark.parametrize("kind", ["list", "int64", "uint16"])
def test_ids_of_any_integer_type(random_e, prompt, kind):
    ids = prompt.tolist() if kind == "list" else prompt.astype(kind)
    np.testing.assert_array_equal(random_e.forward(ids, logits="last"), random_e.forward(prompt, logits="last"))


def test_two_dimensional_ids_are_a_batch(random_e, prompt):
    rows = random_e.forward(np.stack([prompt, prompt[::-1]]), logits="last")
    np.testing.assert_array_equal(rows[1], random_e.forward(prompt[::-1], logits="last"))


def test_text_gets_one_bos(tiny):
    ids = tiny.to_tokens("Once upon a time")
    assert ids.dtype == np.int32 and ids[0] == tiny.tokenizer.bos_id
    assert np.count_nonzero(ids == tiny.tokenizer.bos_id) == 1
    np.testing.assert_array_equal(tiny.forward("Once upon a time"), tiny.forward(ids))
    assert tiny.to_string(tiny.to_tokens("Once upon a time", bos=False)) == "Once upon a time"
    assert len(tiny.to_str_tokens("Once upon a time")) == len(ids)


def test_sequence_continues_with_the_same_bits(random_e, prompt):
    whole = random_e.forward(prompt)
    with random_e.new_sequence() as s:
        first = random_e.forward(prompt[:5], sequence=s)
        rest = [random_e.forward(prompt[i : i + 1], sequence=s) for i in range(5, 12)]
        assert s.length == len(s) == 12
        np.testing.assert_array_equal(s.tokens, prompt)
    np.testing.assert_array_equal(np.concatenate([first, *rest]), whole)


def test_text_after_text_gets_no_second_bos(tiny):
    with tiny.new_sequence() as s:
        tiny.forward("Once upon", sequence=s)
        tiny.forward(" a time", sequence=s)
        assert np.count_nonzero(s.tokens == tiny.tokenizer.bos_id) == 1


def test_fork_and_truncate(random_e, prompt):
    with random_e.new_sequence() as s:
        random_e.forward(prompt[:7], sequence=s)
        fork = s.fork()
        assert fork.tokens.tolist() == s.tokens.tolist() == prompt[:7].tolist()
        a = random_e.forward(prompt[7:], sequence=s, logits="last")
        b = random_e.forward(prompt[7:], sequence=fork, logits="last")
        np.testing.assert_array_equal(a, b)
        s.truncate(0)
        assert s.length == 0 and len(s.tokens) == 0 and fork.length == 12
        np.testing.assert_array_equal(random_e.forward(prompt, sequence=s, logits="last"), a)


def test_truncate_within_the_window(random_e, prompt):
    with random_e.new_sequence() as s:
        random_e.forward(prompt, sequence=s)
        back = max(s.min_truncate, s.length - 1)
        s.truncate(back)
        np.testing.assert_array_equal(s.tokens, prompt[:back])
        again = random_e.forward(prompt[back:], sequence=s, logits="last")
    np.testing.assert_array_equal(again, random_e.forward(prompt, logits="last"))


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16"])
def test_save_and_restore(random_e, prompt, tmp_path, kv_dtype):
    s = random_e.new_sequence(kv_dtype=kv_dtype)
    random_e.forward(prompt[:9], sequence=s)
    path = s.save(tmp_path / "state.npz")
    expected = random_e.forward(prompt[9:], sequence=s)
    restored = random_e.restore(path)
    assert restored.kv_dtype == kv_dtype
    np.testing.assert_array_equal(restored.tokens, prompt[:9])
    np.testing.assert_array_equal(random_e.forward(prompt[9:], sequence=restored), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]  # nothing temporary left


def test_restore_refuses_another_model(random_e, random_moe, prompt, tmp_path):
    s = random_e.new_sequence()
    random_e.forward(prompt, sequence=s)
    s.save(tmp_path / "s.npz")
    with pytest.raises(StateError, match=r"saved by another model.*fingerprint"):
        random_moe.restore(tmp_path / "s.npz")


def test_restore_refuses_damaged_files(random_e, prompt, tmp_path):
    s = random_e.new_sequence()
    random_e.forward(prompt, sequence=s)
    whole = s.save(tmp_path / "s.npz").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match="not a saved sequence, or is damaged"):
            random_e.restore(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        random_e.restore(tmp_path / "nothing")


def test_restore_refuses_pickles_and_foreign_arrays(random_e, tmp_path):
    np.savez(tmp_path / "p.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError):
        random_e.restore(tmp_path / "p.npz")
    np.savez(tmp_path / "q.npz", x=np.zeros(3))
    with pytest.raises(FormatError):
        random_e.restore(tmp_path / "q.npz")


def test_sequences_of_another_model_or_twice(random_e, random_moe, prompt):
    s = random_moe.new_sequence()
    with pytest.raises(ValueError, match="belongs to another model"):
        random_e.forward(prompt, sequence=s)
    t = random_e.new_sequence()
    with pytest.raises(ValueError, match="appears twice"):
        random_e.forward([prompt, prompt], sequence=[t, t])
    with pytest.raises(ValueError, match="2 prompts need 2 sequences"):
        random_e.forward([prompt, prompt], sequence=[t])


def test_capacity_of_a_sequence(random_e, prompt):
    s = random_e.new_sequence(capacity=10)
    with pytest.raises(CapacityError, match=r"12 new tokens.*at most 10"):
        random_e.forward(prompt, sequence=s)
    assert s.length == 0
    random_e.forward(prompt[:10], sequence=s)


def test_sequences_in_threads(random_e, prompt):
    expected = random_e.forward(prompt)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(random_e.forward(prompt))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 8
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_outputs_stay_unchanged_by_later_calls(random_e, prompt):
    logits, cache = random_e.run_with_cache(prompt)
    copies = {name: array.copy() for name, array in cache.items()}
    first = logits.copy()
    random_e.run_with_cache(prompt[::-1].copy())
    np.testing.assert_array_equal(logits, first)
    for name, array in cache.items():
        np.testing.assert_array_equal(array, copies[name], err_msg=name)


def test_tensors_are_read_only_views(random_e):
    table = random_e.tensors["model.embed_tokens.weight"]
    assert table.dtype.name == "bfloat16" and table.shape == (320, 48)
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


def test_outputs_outlive_the_model(random_dir, prompt):
    model = gemma4.load(random_dir)
    logits, cache = model.run_with_cache(prompt, "blocks.*.hook_resid_post")
    table = model.tensors["model.embed_tokens.weight"]
    total = float(table.astype(np.float32).sum())
    del model
    assert np.isfinite(logits).all() and np.isfinite(cache["blocks.5.hook_resid_post"]).all()
    assert float(table.astype(np.float32).sum()) == total


def test_closed_model(random_dir, prompt):
    with gemma4.load(random_dir) as model:
        logits = model.forward(prompt)
    with pytest.raises(StateError, match="closed"):
        model.forward(prompt)
    assert np.isfinite(logits).all()


def test_info(random_e, random_moe):
    text = str(random_e.info())
    for expected in (
        "6 layers (2 global, 4 local with window 8)",
        "d_model 48",
        "2 layers share keys",
        "BF16",
        "256 pos",
    ):
        assert expected in text
    assert "2 of 8 experts" in str(random_moe.info())
    info = random_moe.info()
    assert 0 < info.effective_parameters < info.parameters
    assert info.isa in gemma4.cpu_info()["available"] and info.threads >= 1


def test_fingerprint_depends_on_the_weights(random_e, random_dir, random_moe):
    assert gemma4.load(random_dir).fingerprint == random_e.fingerprint != random_moe.fingerprint


def test_thread_counts_give_the_same_bits(random_dir, prompt):
    one, two = gemma4.load(random_dir, threads=1), gemma4.load(random_dir, threads=2)
    assert one.engine.threads == 1
    np.testing.assert_array_equal(one.forward(prompt), two.forward(prompt))


def test_kv_dtype_is_checked(random_dir, random_e):
    with pytest.raises(ValueError, match="kv_dtype"):
        gemma4.load(random_dir, kv_dtype="q4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks of 32, but layer 0 has heads of 16"):
        random_e.new_sequence(kv_dtype="q8_0")


def test_smaller_caches(tmp_path):
    """Each type of cache on the shipped model: its size, how far the logits move, and that it can be saved."""
    model = gemma4.load("tiny-e")
    ids = model.to_tokens("The old fox lives near the river. One day the old fox meets a small bear in the garden.")
    exact = model.forward(ids)
    sizes = {}
    for kv_dtype, bound in (("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)):
        s = model.new_sequence(kv_dtype=kv_dtype)
        moved = np.abs(model.forward(ids[:-4], sequence=s) - exact[:-4]).max() / np.abs(exact).max()
        assert 0 < moved < bound
        sizes[kv_dtype] = s.nbytes
        restored = model.restore(s.save(tmp_path / f"{kv_dtype}.npz"))
        np.testing.assert_array_equal(model.forward(ids[-4:], sequence=restored), model.forward(ids[-4:], sequence=s))
    assert sizes["q8_0"] * 32 == sizes["f16"] * 17 and sizes["f16"] == sizes["bf16"]


def test_a_step_that_ends_early_is_recorded(random_e, prompt, monkeypatch):
    """Ctrl-C keeps whole chunks: the sequence knows the tokens of those, and goes on from there."""
    engine = random_e.engine

    class Interrupted:
        def step(self, runs, taps, **options):
            [(sequence, ids, embeddings, _, _)] = runs
            engine.step([(sequence, ids[:5], embeddings, None, None)], taps)
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(engine, name)

    expected = random_e.forward(prompt)
    with random_e.new_sequence() as sequence:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(random_e, "engine", Interrupted())
            random_e.forward(prompt, sequence=sequence)
        assert sequence.tokens.tolist() == prompt[:5].tolist()
        np.testing.assert_array_equal(random_e.forward(prompt[5:], sequence=sequence), expected[5:])
