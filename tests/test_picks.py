# SPDX-License-Identifier: Apache-2.0
"""The largest logits of a row, the nucleus and draws in C: what NumPy finds by sorting and by running sums."""

import math

import numpy as np
import pytest

from gemma4 import _engine
from gemma4.generation.loop import Batch
from gemma4.generation.options import Options
from gemma4.generation.sampling import Sampler, SamplingParams
from gemma4.picks import Picker

SIZES = [1, 2, 15, 16, 17, 100, 511, 512, 513, 5000, 70_000]
KINDS = ["normal", "wide", "equal", "ties", "banned", "all but one banned"]


def row(kind, n, seed=0):
    rng = np.random.default_rng([seed, n, KINDS.index(kind)])
    x = (rng.standard_normal(n) * 3).astype(np.float32)
    if kind == "wide":
        x *= np.exp2(rng.integers(-30, 30, n)).astype(np.float32)
    if kind == "equal":
        x[:] = -1.5
    if kind == "ties":
        x = np.round(x)
    if kind == "banned":
        x[rng.random(n) < 0.9] = -np.inf
        x[n // 2] = 0.5
    if kind == "all but one banned":
        x[:], x[rng.integers(n)] = -np.inf, -7
    return x


# -- the largest logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_top_logits(kind, n):
    x = row(kind, n)
    exact = x[np.isfinite(x)].astype(np.float64)
    for k in (0, 1, 2, 5, 64, 1000, 60_000, n):
        found = Picker(n, k, log_sum=True).of(x)
        assert (found.best, found.top, found.n_vocab) == (int(x.argmax()), float(x.max()), n)
        assert found.log_sum == pytest.approx(x.max() + math.log(np.exp(exact - x.max()).sum()), abs=2e-6)
        least = np.sort(x)[-min(k, n)] if k else np.inf
        expected = np.flatnonzero((x >= least) & (x > -np.inf))
        assert np.array_equal(found.ids, expected) and np.array_equal(found.values, x[expected]), k
        assert found.ids.dtype == np.int32 and found.values.dtype == np.float32
    assert math.isnan(Picker(n, 1).of(x).log_sum)  # not requested


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_logits_near_the_largest(n, kind):
    x = row(kind, n)
    for within in (0.01, 1.5, 40.0):
        for k in (0, 3):
            near = x >= x.max() - np.float32(within)
            largest = x >= np.sort(x)[-min(k, n)] if k else np.zeros(n, bool)
            found = Picker(n, k, within=within).of(x)
            assert np.array_equal(found.ids, np.flatnonzero((near | largest) & (x > -np.inf)))
            assert np.array_equal(found.values, x[found.ids])


@pytest.mark.parametrize("n", SIZES)
def test_rows_that_allow_no_choice(n):
    for at in {0, n // 2, n - 1}:
        x = row("normal", n)
        x[at] = np.nan
        found = Picker(n, 3, log_sum=True).of(x)
        assert math.isnan(found.top) and math.isnan(found.log_sum) and found.best == 0 and not len(found.ids)
        x[at] = np.inf
        found = Picker(n, 3, log_sum=True).of(x)
        assert found.top == math.inf and found.best == at and math.isnan(found.log_sum)
    found = Picker(n, 3, log_sum=True).of(np.full(n, -np.inf, np.float32))
    assert found.top == -math.inf and not len(found.ids) and math.isnan(found.log_sum)


# -- nucleus and draw --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_nucleus_floor(kind, n):
    """The weight at which the running sum, from the largest on, reaches the share."""
    x = row(kind, n)
    weights = np.exp(x - x.max())
    descending = np.sort(weights)[::-1]
    sums = np.cumsum(descending, dtype=np.float64)
    for share in (0.0, 1e-9, 0.3, 0.5, 0.95, 0.999, 1.0):
        at = min(np.searchsorted(sums, share * weights.sum(dtype=np.float64)), np.searchsorted(sums, sums[-1]))
        found = _engine.nucleus_floor(weights, share)
        assert found == descending[at] or (share == 1 and 0 < found <= 1e-9)  # at 1 rounding decides


def test_nucleus_floor_of_weights_that_sum_exactly():
    weights = np.array([0, 1, 0.25, 0.5, 0, 0.25, 0], np.float32)
    for share, floor in ((0, 1), (0.5, 1), (0.5000001, 0.5), (0.75, 0.5), (0.76, 0.25), (1, 0.25)):
        assert _engine.nucleus_floor(weights, share) == floor


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 5000, 262_144])
def test_draw_is_that_of_running_sums(n):
    """Also at sums that are met exactly, at 0, and at the end; most weights of the last case are 0."""
    rng = np.random.default_rng(n)
    whole = rng.integers(0, 4, n).astype(np.float32)  # sums without rounding
    whole[rng.integers(n)] = 2
    sparse = whole * (rng.random(n) < 0.01)
    sparse[n // 2] = 2
    for weights in (whole, sparse):
        for least in (0, 1, 2):
            kept = np.where(weights >= least, weights, 0)
            sums = np.cumsum(kept, dtype=np.float64)
            total = sums[-1]
            met = rng.choice(sums[sums < total], 30) / total if (sums < total).any() else []
            for unit in (0.0, 0.5, 1 / 3, math.nextafter(1, 0), *rng.random(30), *met):
                expected = np.searchsorted(sums, unit * total, side="right")
                assert _engine.draw(weights, least, unit) == expected and kept[expected] > 0, (least, unit)


def test_draw_where_rounding_leaves_all_sums_short():
    weights = np.full(5000, 0.1, np.float32)
    weights[-3:] = 0
    assert _engine.draw(weights, 0.0, 1.0) == 4996  # no draw reaches 1; a weight of 0 is never drawn
    with pytest.raises(ValueError, match="nothing to draw"):
        _engine.draw(weights, 0.2, 0.5)


def test_bad_arguments():
    x, none = np.zeros(4, np.float32), np.zeros(0, np.float32)
    found = np.zeros((1, 4))
    ids, values = np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32)
    for call, error, words in [
        (lambda: _engine.draw(none, 0, 0), ValueError, "weights: a row of 0 values"),
        (lambda: _engine.draw(np.zeros(3), 0, 0), ValueError, "weights: expected a C-contiguous float32"),
        (lambda: _engine.nucleus_floor(none, 0.5), ValueError, "weights: a row of 0 values"),
        (lambda: _engine.nucleus_floor(values, 0.5), ValueError, "weights"),
        (lambda: _engine.top_logits(none, (0, 0.0, False, None, None, found)), ValueError, "logits: a row of 0 values"),
        (lambda: _engine.top_logits(x, None), TypeError, "picks are a tuple"),
        (lambda: _engine.top_logits(x, [1]), TypeError, "picks are a tuple"),
        (lambda: _engine.top_logits(x, (-1, 0.0, False, ids, values, found)), ValueError, "k and within are 0"),
        (lambda: _engine.top_logits(x, (0, -1.0, False, ids, values, found)), ValueError, "k and within are 0"),
        (lambda: _engine.top_logits(x, (0, math.nan, False, ids, values, found)), ValueError, "k and within are 0"),
        (lambda: _engine.top_logits(x, (0, 1.0, False, None, values, found)), ValueError, "ids"),
        (lambda: _engine.top_logits(x, (1, 0.0, False, ids[:, :3], values, found)), ValueError, "ids"),
        (lambda: _engine.top_logits(x, (1, 0.0, False, ids, None, found)), ValueError, "values"),
        (lambda: _engine.top_logits(x, (1, 0.0, False, ids, values, found[:, :3])), ValueError, "found"),
    ]:
        with pytest.raises(error, match=words):
            call()
    found.flags.writeable = False
    with pytest.raises(ValueError, match="found"):
        _engine.top_logits(x, (1, 0.0, False, ids, values, found))


# -- in a step ---------------------------------------------------------------------------------------------------------


def test_a_step_finds_what_its_logits_hold(random_e, prompt):
    ids, n_vocab = prompt[:9], random_e.d_vocab
    rows = np.array([2, 5, 8], np.int32)
    exact = random_e.forward(ids)[rows]
    for k, copies in ((0, False), (3, False), (3, True), (n_vocab, True)):
        picker = Picker(n_vocab, k, log_sum=True, rows=copies)
        logits = picker.buffer(3)
        assert (logits is not None) == copies
        with random_e.new_sequence() as sequence:
            run = (sequence.engine, ids, None, rows, logits, None, None, picker.arguments(3))
            random_e.engine.step([run], max_chunk=4)
        for i, expected in enumerate(exact):
            found, alone = picker.found(i), Picker(n_vocab, k, log_sum=True).of(expected)
            assert found[:3] == alone[:3]
            assert np.array_equal(found.ids, alone.ids) and np.array_equal(found.values, alone.values)
            assert logits is None or np.array_equal(logits[i], expected)


def test_a_step_without_room_for_logits(random_e, prompt):
    with random_e.new_sequence() as sequence, pytest.raises(ValueError, match="logits"):
        random_e.engine.step([(sequence.engine, prompt, None, np.zeros(1, np.int32), None)])


def named(settings):
    """Settings as a test's name: the same in every process, which the text of a function is not."""
    if not isinstance(settings, dict):
        return str(settings)
    return ", ".join(name if name == "processors" else f"{name}={value}" for name, value in settings.items())


KINDS_OF_SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 5, "logprobs": 30},
    {"temperature": 0.8},
    {"top_p": 0.7, "min_p": 0.01},
    {"min_p": 0.05, "temperature": 1.5, "logprobs": 4},
    {"min_p": 1.0, "presence_penalty": 1.0},
    {"top_k": 1 << 30},
    {"top_k": 20, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.1, "logprobs": 2},
    {"temperature": 0.0, "logit_bias": {3: 9.0}},
    {"processors": [lambda ids, logits: logits * 2]},
]


@pytest.mark.parametrize("settings", KINDS_OF_SAMPLING, ids=named)
def test_generation_samples_as_from_whole_rows(random_e, prompt, settings):
    """Three prompts side by side, one of which guesses: the tokens of a `Sampler` that is given every row."""
    with Batch(random_e) as batch:
        joined = [batch.join(prompt[i:], Options(max_tokens=8, seed=5, stop_ids=[], **settings)) for i in range(3)]
        while batch.running:
            one = joined[1]
            one.propose([] if one.finish else np.arange(3))
            batch.step()
    for one in joined:
        sampler = Sampler(Options(seed=5, **settings).sampling(random_e), stream=one.number)
        for i, sample in enumerate(one.samples):
            ids = one.ids[: one.n_prompt + i]
            assert sampler.sample(random_e.forward(ids, logits="last")[0], ids, one.n_prompt) == sample


@pytest.mark.parametrize(
    ("settings", "copied"),
    [
        ({"temperature": 0}, False),
        ({"temperature": 0, "logprobs": 5}, False),
        ({"top_k": 64, "top_p": 0.95, "min_p": 0.1, "logprobs": 0}, False),
        ({"min_p": 0.1}, False),
        ({"top_p": 0.95}, True),
        ({"top_p": 0.95, "min_p": 0.1}, True),
        ({"temperature": 0, "repetition_penalty": 1.1}, True),
        ({"top_k": 64, "logit_bias": {1: 1.0}}, True),
        ({"top_k": 64, "processors": [lambda ids, logits: None]}, True),
    ],
    ids=named,
)
def test_rows_are_copied_only_where_sampling_reads_them(settings, copied):
    picker = Sampler(SamplingParams(**settings)).picker(262_144)
    assert (picker.buffer(1) is not None) == copied == picker.needs_rows
