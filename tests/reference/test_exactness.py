# SPDX-License-Identifier: Apache-2.0
"""precision="exact": however a prompt is cut, batched, threaded, cached or watched, the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma4

from . import steps, variants
from .compare import first_bit_differences, same_bits
from .conftest import Checkpoint

Load = Callable[..., gemma4.Model]
N = 41  # several windows of every variant below
NAMES = [
    "e2b",
    "moe26b",
    "dense31b",
    "odd-e",
    "odd-moe-f16",
    "everything",
    "window1",
    "e2b-bf16",
    "gemma2",
    "gemma3-odd",
]
KV = ["f32", "bf16"]
EVERY = pytest.mark.parametrize("name", NAMES)
EVERY_KV = pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [*((name, "f32") for name in NAMES), ("e2b", "bf16"), ("moe26b", "f16"), ("odd-e", "bf16"), ("wide", "q8_0")],
)


def prompt(name: str, n: int = N, seed: int = 0) -> steps.Ids:
    return variants.token_ids(variants.BY_NAME[name], n, seed).numpy().astype(np.int32)


def assert_same(ours: steps.Account, expected: steps.Account) -> None:
    assert first_bit_differences(ours.sites, expected.sites) == []
    assert same_bits(ours.logits, expected.logits)


@EVERY_KV
def test_any_chunking(name: str, kv_dtype: str, loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    expected = steps.whole(model, ids, kv_dtype=kv_dtype)
    for max_chunk in (1, 2, 3, 7, 64):
        assert_same(steps.whole(model, ids, kv_dtype=kv_dtype, max_chunk=max_chunk), expected)


def test_prompt_longer_than_the_default_chunk(loaded: Load) -> None:
    model, ids = loaded("long"), prompt("long", 600)
    expected = steps.whole(model, ids, max_chunk=600)
    assert_same(steps.whole(model, ids), expected)
    assert_same(steps.whole(model, ids, max_chunk=97), expected)


@EVERY_KV
def test_token_by_token(name: str, kv_dtype: str, loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    expected = steps.whole(model, ids, kv_dtype=kv_dtype)
    sequence = model.engine.new_sequence(kv_dtype=kv_dtype)
    for t in range(N):
        [account] = steps.run(model, [(sequence, ids[t : t + 1])])
        assert same_bits(account.logits, expected.logits[t : t + 1])
        assert late_differences(model, account, expected, t, t + 1) == []


def late_differences(
    model: gemma4.Model, account: steps.Account, expected: steps.Account, first: int, last: int
) -> list[str]:
    """Sites of a run over positions first..last-1 that are not those rows of the whole prompt's."""
    wanted = steps.rows(model, expected, first, last)
    ours = {n: steps.in_window(model, n, a, first) for n, a in account.sites.items()}
    return first_bit_differences(ours, {n: steps.in_window(model, n, a, first) for n, a in wanted.items()})


@EVERY_KV
def test_batched_in_any_order(name: str, kv_dtype: str, loaded: Load) -> None:
    model = loaded(name)
    prompts = [prompt(name, n, seed) for seed, n in enumerate((N, 1, 9))]
    expected = [steps.whole(model, ids, kv_dtype=kv_dtype) for ids in prompts]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        runs = [(model.engine.new_sequence(kv_dtype=kv_dtype), prompts[i]) for i in order]
        for i, account in zip(order, steps.run(model, runs, max_chunk=13), strict=True):
            assert_same(account, expected[i])


@EVERY_KV
def test_prefill_and_decode_mixed(name: str, kv_dtype: str, loaded: Load) -> None:
    """In one step: one new prompt, one continued prompt, two sequences at their last token."""
    model = loaded(name)
    cuts = [0, 20, N - 1, 5]
    prompts = [prompt(name, n, seed) for seed, n in enumerate((N, N, N, 6))]
    expected = [steps.whole(model, ids, kv_dtype=kv_dtype) for ids in prompts]
    runs = []
    for ids, cut in zip(prompts, cuts, strict=True):
        sequence = model.engine.new_sequence(kv_dtype=kv_dtype)
        if cut:
            model.engine.step([(sequence, ids[:cut], None, None, None)])
        runs.append((sequence, ids[cut:]))
    for account, whole, ids, cut in zip(steps.run(model, runs), expected, prompts, cuts, strict=True):
        assert same_bits(account.logits, whole.logits[cut:])
        assert late_differences(model, account, whole, cut, len(ids)) == []


@EVERY_KV
def test_restored_forked_and_truncated(name: str, kv_dtype: str, loaded: Load, tmp_path: Path) -> None:
    model, ids, cut = loaded(name), prompt(name), N - 6
    expected = steps.whole(model, ids, kv_dtype=kv_dtype).logits[cut:]

    def rest(sequence: gemma4.Sequence) -> bool:
        return same_bits(model.forward(ids[cut:], sequence=sequence), expected)

    first = model.new_sequence(kv_dtype=kv_dtype)  # type: ignore[arg-type]
    model.forward(ids[:cut], sequence=first, logits=None)
    saved = first.save(tmp_path / "sequence.npz")
    fork = first.fork()
    assert rest(first)
    assert rest(fork)  # what the original wrote since is not the fork's
    assert rest(model.restore(saved))
    first.truncate(0)
    model.forward(ids[:cut], sequence=first, logits=None)
    assert rest(first)


@EVERY_KV
def test_truncate_and_redo(name: str, kv_dtype: str, loaded: Load) -> None:
    """Back by every amount that the sliding layers still allow, over other tokens, and redone."""
    model, ids, other = loaded(name), prompt(name), prompt(name, N, 5)
    expected = steps.whole(model, ids, kv_dtype=kv_dtype).logits
    for length in range(1, N):
        sequence = model.new_sequence(kv_dtype=kv_dtype)  # type: ignore[arg-type]
        model.forward(np.concatenate([ids[:length], other[:2]]), sequence=sequence, logits=None)
        if length < sequence.min_truncate:
            with pytest.raises(gemma4.StateError):
                sequence.truncate(length)
            continue
        sequence.truncate(length)
        assert sequence.length == length
        assert same_bits(model.forward(ids[length:], sequence=sequence), expected[length:])


def assert_every_way_back(model: gemma4.Model, sequence: gemma4.Sequence, ids: steps.Ids, step: int = 1) -> None:
    """Back by `step`, and again, as far as it goes: what was promised is there, what is refused is refused."""
    whole = steps.whole(model, ids, kv_dtype=sequence.kv_dtype).logits
    for length in range(sequence.length, 0, -step):
        if length < sequence.min_truncate:
            with pytest.raises(gemma4.StateError):
                sequence.truncate(length)
            continue
        sequence.truncate(length)
        with sequence.fork() as fork:
            assert same_bits(model.forward(ids[length:], sequence=fork), whole[length:]), length


@EVERY
@pytest.mark.parametrize("pieces", [[1] * (N - 9), [N - 9], [20, 12]], ids=["decoded", "prefilled", "in two"])
def test_truncate_again_and_again(name: str, pieces: list[int], loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    sequence = model.new_sequence()
    for piece in np.split(ids[: N - 9], np.cumsum(pieces)[:-1]):
        model.forward(piece, sequence=sequence, logits=None)
    assert_every_way_back(model, sequence, ids, step=2)


@EVERY
def test_truncate_after_restoring(name: str, loaded: Load, tmp_path: Path) -> None:
    model, ids = loaded(name), prompt(name)
    sequence = model.new_sequence()
    for t in range(N - 1):
        model.forward(ids[t : t + 1], sequence=sequence, logits=None)
    assert_every_way_back(model, model.restore(sequence.save(tmp_path / "s.npz")), ids, step=3)


class Stop(Exception):
    """Raised by a hook."""


def stop(array: Any, site: Any) -> None:
    raise Stop


@EVERY
def test_steps_that_do_not_count_leave_the_cache_as_it_was(name: str, loaded: Load) -> None:
    """stop_at_layer, and a hook that raises in the last layer: nothing is appended, no way back is invented."""
    model, ids, other = loaded(name), prompt(name), prompt(name, 23, 8)
    site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    for fails in (False, True):
        sequence = model.new_sequence()
        for t in range(N - 2):
            model.forward(ids[t : t + 1], sequence=sequence, logits=None)
        if fails:
            with pytest.raises(Stop):
                model.run_with_hooks(other, [(site, stop)], sequence=sequence)
        else:
            model.run_with_cache(other, names="*", stop_at_layer=model.n_layers, sequence=sequence)
        assert sequence.length == N - 2
        assert_every_way_back(model, sequence, ids)


@EVERY
def test_several_python_threads_share_a_model(name: str, loaded: Load) -> None:
    model = loaded(name)
    prompts = [prompt(name, 3 + 5 * seed, seed) for seed in range(8)]
    expected = [steps.whole(model, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for account, wanted in zip(pool.map(lambda ids: steps.whole(model, ids), prompts), expected, strict=True):
                assert_same(account, wanted)


@EVERY
def test_forks_do_not_touch_each_other(name: str, loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    others = [prompt(name, 8, seed) for seed in (1, 2, 3)]
    trunk = model.new_sequence()
    model.forward(ids, sequence=trunk, logits=None)
    branches = [trunk.fork() for _ in others]
    together = model.forward(others, sequence=branches)
    for other, logits in zip(others, together, strict=True):
        assert same_bits(logits, model.forward(np.concatenate([ids, other]))[N:])
        assert same_bits(logits, model.forward(other, sequence=trunk.fork()))


@EVERY
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_thread_count(name: str, threads: int, loaded: Load) -> None:
    ids = prompt(name)
    model = loaded(name, threads)
    assert model.engine.threads == threads
    assert_same(steps.whole(model, ids), steps.whole(loaded(name), ids))
    one = steps.whole(model, ids[:1])
    assert_same(one, steps.whole(loaded(name), ids[:1]))


@pytest.mark.slow
def test_every_instruction_set(loaded: Load, checkpoint: Callable[[str], Checkpoint]) -> None:
    ids = [int(i) for i in prompt("everything")]  # the smallest vocabulary: valid everywhere
    names = [*NAMES, "wide"]
    directories = [str(checkpoint(name).directory) for name in names]
    expected = {
        f"{directory} {kv}": steps.digests([steps.whole(loaded(name), np.array(ids, np.int32), kv_dtype=kv)])
        for name, directory in zip(names, directories, strict=True)
        for kv in KV
    }
    available = gemma4.cpu_info()["available"]
    assert "scalar" in available
    for isa in available:
        found = probe(isa, ids, directories)
        assert found.pop("isa") == isa
        assert found.keys() == expected.keys()
        for key, sites in expected.items():
            assert [site for site in sites if found[key][site] != sites[site]] == [], (isa, key)


def probe(isa: str, ids: list[int], directories: list[str]) -> dict[str, dict[str, str]]:
    script = Path(__file__).parent / "isa_probe.py"
    command = [sys.executable, str(script), json.dumps(ids), *directories]
    done = subprocess.run(command, env=os.environ | {"GEMMA4_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@EVERY
def test_capture_does_not_change_what_it_sees(name: str, loaded: Load) -> None:
    """Each kind of site watched alone, in all layers: where a fused kernel has to step aside."""
    model, ids = loaded(name), prompt(name)
    expected = steps.whole(model, ids)
    assert same_bits(model.forward(ids), expected.logits)
    for stem in dict.fromkeys(site.stem for site in model.sites.values()):
        names = [site.name for site in model.sites.values() if site.stem == stem]
        logits, cache = model.run_with_cache(ids, names=names)
        assert same_bits(logits, expected.logits), stem
        assert first_bit_differences(dict(cache), {n: expected.sites[n] for n in names}) == []


@EVERY
def test_edits_that_change_nothing(name: str, loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    expected = steps.whole(model, ids)
    assert same_bits(model.run_with_hooks(ids, [("*", lambda array, site: None)]), expected.logits)
    assert same_bits(model.run_with_hooks(ids, [("*", lambda array, site: array.copy())]), expected.logits)


@EVERY_KV
def test_logits_of_wanted_positions_only(name: str, kv_dtype: str, loaded: Load) -> None:
    """What nobody asks for is skipped, in the head and in layers that share keys; what is asked for is the same."""
    model, ids, more = loaded(name), prompt(name), prompt(name, 3, 9)
    expected = steps.whole(model, np.concatenate([ids, more]), kv_dtype=kv_dtype).logits
    asked: list[tuple[Any, list[int]]] = [(rows, rows) for rows in ([0], [3, 4, 17], [N - 1, 0])]
    for wanted, index in [("last", [N - 1]), ("all", list(range(N))), (None, []), *asked]:
        sequence = model.new_sequence(kv_dtype=kv_dtype)  # type: ignore[arg-type]
        logits = model.forward(ids, sequence=sequence, logits=wanted)
        if wanted is None:
            assert logits is None
        else:
            assert same_bits(logits, expected[index])
        assert same_bits(model.forward(more, sequence=sequence), expected[N:])


@EVERY
def test_kept_positions_and_early_stop(name: str, loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    expected = steps.whole(model, ids)
    kept = [0, 7, N - 1]
    _, cache = model.run_with_cache(ids, names="*", pos=kept, logits="last")
    for site, array in cache.items():
        index = tuple(kept if dim == "T" else slice(None) for dim in model.sites[site].dims)
        assert same_bits(array, np.ascontiguousarray(expected.sites[site][index])), site
    for layer in range(model.n_layers + 1):
        _, cache = model.run_with_cache(ids, names="*", stop_at_layer=layer)
        assert first_bit_differences(dict(cache), {n: expected.sites[n] for n in cache}) == []


@EVERY
def test_what_the_cache_holds_does_not_depend_on_the_way_there(name: str, loaded: Load) -> None:
    model, ids = loaded(name), prompt(name)
    states = []
    for pieces in ([ids], np.split(ids, range(1, N)), [ids[:17], ids[17:]]):
        sequence = model.engine.new_sequence()
        for piece in pieces:
            model.engine.step([(sequence, piece, None, None, None)], max_chunk=5)
        states.append(sequence.state())
    for state in states[1:]:
        assert state["length"] == N
        for layer, (_, *arrays) in states[0]["layers"].items():
            for array, other in zip(arrays, state["layers"][layer][1:], strict=True):
                common = min(len(array), len(other))
                assert common >= min(N, model.engine_config["layers"][layer]["window"] or N) - 1
                assert same_bits(np.ascontiguousarray(array[-common:]), np.ascontiguousarray(other[-common:]))


@pytest.mark.parametrize("name", ["moe26b", "dense31b", "window1"])
def test_given_embeddings_are_the_tokens(name: str, loaded: Load) -> None:
    """Soft tokens: a run of embeddings instead of ids, alone and after ids."""
    model, ids = loaded(name), prompt(name)
    expected = steps.whole(model, ids)
    embeddings = expected.sites["hook_embed"]
    for cut in (0, 17):
        sequence = model.engine.new_sequence()
        if cut:
            model.engine.step([(sequence, ids[:cut], None, None, None)])
        logits = np.zeros((N - cut, model.d_vocab), np.float32)
        rows = np.arange(N - cut, dtype=np.int32)
        model.engine.step([(sequence, None, embeddings[cut:], rows, logits)], max_chunk=7)
        assert same_bits(logits, expected.logits[cut:])


def test_a_context_of_many_blocks(loaded: Load) -> None:
    """More keys than one attention task holds scores for: the last 100 positions at once, in pieces, one by one."""
    n = 24_000
    model, ids = loaded("far"), prompt("far", n)
    together = model.forward(ids, logits=range(n - 100, n))
    sequence = model.new_sequence()
    model.forward(ids[:-100], sequence=sequence, logits=None)
    for first, last in ((0, 60), (60, 99), (99, 100)):
        logits = model.forward(ids[n - 100 + first : n - 100 + last], sequence=sequence)
        assert same_bits(logits, together[first:last])
