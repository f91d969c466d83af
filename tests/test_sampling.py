# SPDX-License-Identifier: Apache-2.0
"""Sampling: the same distributions as transformers' processors, reproducible draws, log-probabilities, stop strings."""

import itertools
import math
import random
import time

import numpy as np
import pytest

from gemma4.generation.defaults import read_defaults
from gemma4.generation.sampling import (
    Edits,
    Sample,
    Sampler,
    SamplingParams,
    StopCriteria,
    _largest,
    _least,
    _weights,
    kth_largest,
    logprobs,
)
from gemma4.picks import Picker

NONE = np.zeros(0, np.int32)


def random_logits(seed, n=1000, scale=4.0):
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


def distribution(logits, params, ids=NONE, n_prompt=0):
    """The probabilities the sampler draws from, float64 [vocab]."""
    scores = edited(params, logits, ids, n_prompt)
    k = params.top_k if params.top_k < logits.size else 0
    top = Picker(logits.size, k).of(scores)
    tokens, kept = _largest(top, k) if k else (np.arange(logits.size), scores)
    weights = _weights(kept, top.top, params.temperature)
    weights = np.where(weights >= np.float32(_least(weights, params)), weights, 0)
    out = np.zeros(logits.size)
    out[tokens] = weights / weights.sum(dtype=np.float64)
    return out


def edited(params, logits, ids, n_prompt):
    return Edits(params).of(logits.copy(), ids, n_prompt)


def sorted_choice(logits, params, unit):
    """The token that a random number of the unit interval draws, by sorting and running sums of the whole row."""
    weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    if params.top_k and params.top_k < logits.size:
        weights[logits < np.sort(logits)[-params.top_k]] = 0
    floor = np.float32(params.min_p)
    if params.top_p < 1:
        descending = np.sort(weights)[::-1]
        sums = np.cumsum(descending, dtype=np.float64)
        floor = max(floor, descending[np.searchsorted(sums, params.top_p * sums[-1])])
    sums = np.cumsum(np.where(weights >= floor, weights, 0), dtype=np.float64)
    return int(np.searchsorted(sums, unit * sums[-1], side="right"))


# -- against transformers ----------------------------------------------------------------------------------------------

GRID = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
    for t, k, p, m in itertools.product((0.3, 1.0, 2.5), (0, 1, 64), (1.0, 0.95, 0.3, 0.0), (0.0, 0.1, 1.0))
]


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_filters_are_transformers_filters(settings):
    torch = pytest.importorskip("torch")
    import transformers as t

    chain = [t.TemperatureLogitsWarper(settings["temperature"])]
    if settings["top_k"]:
        chain.append(t.TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        chain.append(t.TopPLogitsWarper(settings["top_p"]))
    if settings["min_p"]:
        chain.append(t.MinPLogitsWarper(settings["min_p"]))
    for seed, n in ((0, 50), (1, 5000)):
        logits = random_logits(seed, n)
        scores = torch.from_numpy(logits.copy())[None]
        for processor in chain:
            scores = processor(torch.zeros(1, 0, dtype=torch.long), scores)
        expected = scores.double().softmax(-1)[0].numpy()
        ours = distribution(logits, SamplingParams(**settings))
        assert np.array_equal(ours > 0, expected > 0)
        assert np.allclose(ours, expected, rtol=2e-5, atol=1e-12)


def test_repetition_penalty_and_bias_are_transformers(ids=(3, 3, 7, 900, 12)):
    torch = pytest.importorskip("torch")
    import transformers as t

    logits, bias = random_logits(2), {5: 2.5, 7: -1.0, 12: -math.inf}
    scores = torch.from_numpy(logits.copy())[None]
    tokens = torch.tensor([ids])
    scores = t.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(tokens, scores)
    scores = t.RepetitionPenaltyLogitsProcessor(1.3)(tokens, scores)
    ours = edited(SamplingParams(repetition_penalty=1.3, logit_bias=bias), logits, np.array(ids, np.int32), 2)
    assert np.allclose(ours, scores[0].numpy(), rtol=1e-6)


def test_gemma_defaults_from_generation_config():
    config = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
        "eos_token_id": [1, 106, 50],
        "suppress_tokens": [258883, 258882],
        "transformers_version": "5",
    }
    params = SamplingParams.from_generation_config(config, seed=3, top_p=None, min_p=0.1, logit_bias={7: 1.0})
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (1.0, 64, 0.95, 0.1, 3)
    assert params.logit_bias == {258883: -math.inf, 258882: -math.inf, 7: 1.0}
    assert SamplingParams.from_generation_config({}).temperature == 0  # as transformers: greedy unless do_sample
    assert SamplingParams.from_generation_config({"temperature": 1.0}).temperature == 0
    assert SamplingParams.from_generation_config({}, temperature=0.7).temperature == 0.7
    with pytest.raises(TypeError):
        SamplingParams.from_generation_config({}, top_x=1)
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams.from_generation_config({}, top_p=7)


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": float("nan"), "do_sample": True},
        {"temperature": -1, "do_sample": True},
        {"temperature": "warm", "do_sample": True},
        {"do_sample": "perhaps"},
        {"top_k": 1.5},
        {"top_k": [64]},
        {"top_p": {}},
        {"repetition_penalty": 1e999},
        {"suppress_tokens": 5.5},
        {"suppress_tokens": ["x"]},
        {"suppress_tokens": [[1]]},
        {"eos_token_id": [[1]]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": 1e999},
        {"eos_token_id": True},
    ],
    ids=str,
)
def test_bad_generation_config(config):
    """Of what means nothing a warning tells; it is not used."""
    with pytest.warns(UserWarning, match=rf"generation_config.json: {next(iter(config))} is .*not used"):
        params = SamplingParams.from_generation_config(config)
    assert params == SamplingParams(temperature=1.0 if config.get("do_sample") is True else 0.0)


def test_odd_but_meaningful_generation_config(recwarn):
    config = {
        "temperature": "0.5", "top_k": "64", "top_p": "0.9", "repetition_penalty": 1, "do_sample": "true",
        "suppress_tokens": ["7", 8.0, -1, None], "eos_token_id": "106",
    }  # fmt: skip
    params = SamplingParams.from_generation_config(config)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.5, 64, 0.9, 1)
    assert params.logit_bias == {7: -math.inf, 8: -math.inf}
    for value, k in ((-1, 0), (64.0, 64), ("-1", 0), (None, 0)):
        assert SamplingParams.from_generation_config({"top_k": value}).top_k == k
    for value, ids in (("106", (106,)), ([1, "106", 50.0], (1, 106, 50)), (-1, None), ([4294967295, None], None)):
        assert read_defaults({"eos_token_id": value})[0].get("stop_ids") == ids
    assert not recwarn.list


# -- edits of the logits -----------------------------------------------------------------------------------------------


def test_presence_and_frequency_count_the_output_only():
    logits = np.zeros(10, np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    scores = edited(params, logits, np.array([1, 1, 2, 2, 3], np.int32), 2)
    assert scores.tolist() == [0, 0, -1.0, -0.75] + [0] * 6 and not logits.any()


def test_penalties_of_a_sequence_that_grows_shrinks_and_changes():
    """A sampler counts on from the last call; it may not matter what that call was."""
    rng, logits = np.random.default_rng(0), random_logits(0, 50)
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    edits, ids = Edits(params), rng.integers(0, 50, 60).astype(np.int32)
    for n, n_prompt in ((5, 3), (6, 3), (7, 3), (20, 3), (21, 10), (4, 3), (4, 4), (0, 0), (30, 0), (31, 0)):
        assert np.array_equal(edits.of(logits.copy(), ids[:n], n_prompt), edited(params, logits, ids[:n], n_prompt))
    other = rng.integers(0, 50, 60).astype(np.int32)
    for n in (32, 33):
        assert np.array_equal(edits.of(logits.copy(), other[:n], 9), edited(params, logits, other[:n], 9))


def test_order_of_operations():
    """Bias, penalties, processors, temperature: each sees what the one before it left."""
    seen = []

    def first(ids, logits):
        seen.append((ids.tolist(), logits.tolist()))
        return logits * 2

    def second(ids, logits):
        logits[1] = 20.0  # in place

    logits = np.array([1, 2, 3], np.float32)
    params = SamplingParams(temperature=0, logit_bias={0: 7.0}, repetition_penalty=2.0, processors=[first, second])
    assert Sampler(params).sample(logits, np.array([0], np.int32)).token == 1
    assert seen == [([0], [4.0, 2.0, 3.0])] and logits.tolist() == [1, 2, 3]


def test_bad_processors():
    logits = random_logits(0)
    for result, words in ((np.zeros(3), "shape"), (np.full(1000, np.nan), "NaN"), (np.full(1000, -np.inf), "banned")):
        with pytest.raises(ValueError, match=words):
            Sampler(SamplingParams(processors=(lambda ids, x, r=result: r,))).sample(logits, NONE)
    with pytest.raises(ZeroDivisionError):
        Sampler(SamplingParams(processors=(lambda ids, x: 1 / 0,))).sample(logits, NONE)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        ([0, math.nan, 1], "NaN"),
        ([math.nan] * 3, "NaN"),
        ([-math.inf] * 3, "banned"),
        ([0, math.inf], "inf"),
        ([], "one row"),
        ([[0, 1]], "one row"),
        (5, "one row"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_allow_no_choice(logits, words, temperature):
    with pytest.raises(ValueError, match=words):
        Sampler(SamplingParams(temperature=temperature)).sample(np.array(logits, np.float32), NONE)


def test_ids_outside_the_vocabulary():
    for params, ids in (
        (SamplingParams(logit_bias={1000: 1}), []),
        (SamplingParams(repetition_penalty=2), [1000]),
        (SamplingParams(frequency_penalty=1), [-1]),
    ):
        with pytest.raises(ValueError, match="vocabulary of 1000"):
            Sampler(params).sample(random_logits(0), np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": (-1, math.nan, math.inf, "1", None, True),
        "top_k": (-1, 1.5, "2", True),
        "top_p": (-0.1, 1.1, math.nan),
        "min_p": (-1, 2),
        "repetition_penalty": (0, -1, math.inf),
        "presence_penalty": (math.nan, 1e9),
        "frequency_penalty": ("x",),
        "seed": (-1, 1.5, 1 << 200),
        "logprobs": (-1, 1.0, True),
        "processors": ((7,),),
        "logit_bias": ([1], {"a": 1}, {1: math.inf}, {1: math.nan}, {-1: 0}, {1: None}, {1.5: 0}),
    }.items(),
)
def test_parameters_out_of_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})


# -- draws -------------------------------------------------------------------------------------------------------------


def draws(params, logits, n, stream=0):
    sampler = Sampler(params, stream)
    return [sampler.sample(logits, NONE).token for _ in range(n)]


def test_greedy():
    logits = random_logits(0)
    assert draws(SamplingParams(temperature=0), logits, 3) == [int(logits.argmax())] * 3
    assert draws(SamplingParams(temperature=0), np.array([1, 5, 5], np.float32), 1) == [1]
    assert (
        draws(SamplingParams(top_k=1), logits, 3)
        == draws(SamplingParams(top_p=0.0), logits, 3)
        == [int(logits.argmax())] * 3
    )


def test_seed_and_stream():
    logits = random_logits(1)
    first = draws(SamplingParams(seed=7), logits, 40)
    assert first == draws(SamplingParams(seed=7), logits, 40)
    assert first != draws(SamplingParams(seed=8), logits, 40) and first != draws(
        SamplingParams(seed=7), logits, 40, stream=1
    )
    assert draws(SamplingParams(), logits, 40) != draws(SamplingParams(), logits, 40)


def test_draws_do_not_depend_on_other_sequences():
    logits = random_logits(1)
    a, b = Sampler(SamplingParams(seed=7)), Sampler(SamplingParams(seed=9))
    mixed = []
    for _ in range(20):
        mixed.append(a.sample(logits, NONE).token)
        b.sample(logits, NONE)
    assert mixed == draws(SamplingParams(seed=7), logits, 20)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0}], ids=str)
def test_frequencies_follow_the_distribution(settings):
    """Pearson's chi-square over 20,000 draws; 80 is beyond its 99.999th percentile for 29 degrees of freedom."""
    logits, n = random_logits(3, 30, 1.5), 20_000
    params = SamplingParams(seed=1, **settings)
    expected = distribution(logits, params) * n
    counts = np.bincount(draws(params, logits, n), minlength=30)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 80


def test_banned_tokens_are_never_drawn():
    logits = np.full(1000, -np.inf, np.float32)
    logits[[5, 998]] = 1.0
    assert set(draws(SamplingParams(seed=0), logits, 300)) == {5, 998}
    logits[5] = logits[998] + np.float32(1e-3)  # and the extremes of the unit interval
    sampler = Sampler(SamplingParams())
    for value, token in ((0.0, 5), (math.nextafter(1, 0), 998)):
        sampler._rng = type("Fixed", (), {"random": lambda self, v=value: v})()
        assert sampler.sample(logits, NONE).token == token


@pytest.mark.parametrize(
    "settings",
    [*GRID[::5], {"top_k": 64, "top_p": 0.95}, {}, {"top_p": 0.95}, {"min_p": 0.05}, {"top_k": 64, "temperature": 0.7}],
    ids=str,
)
def test_the_same_seed_draws_what_sorting_gives(settings):
    """A draw is one number of NumPy's generator, looked up in running sums: no token may depend on how that is done."""
    params = SamplingParams(seed=11, **settings)
    for n in (3, 600, 20_000):
        logits = random_logits(n, n)
        sampler, rng = Sampler(params), np.random.default_rng(np.random.SeedSequence(11, spawn_key=(0,)))
        for _ in range(40):
            assert sampler.sample(logits, NONE).token == sorted_choice(logits, params, rng.random())


# -- log-probabilities and selection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 1000, 2000])
def test_logprobs(n):
    torch = pytest.importorskip("torch")
    logits = random_logits(4)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    logprob, top = logprobs(logits, 17, n)
    order = np.argsort(-expected, kind="stable")[:n]
    assert logprob == pytest.approx(expected[17], abs=1e-5) and [i for i, _ in top] == order.tolist()
    assert [v for _, v in top] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_logprobs_are_the_model_s_own():
    """Neither bias nor temperature nor penalties change them; ties go by id; -inf is allowed, and listed at the end."""
    logits = np.array([1, 3, 3, -np.inf], np.float32)
    params = SamplingParams(temperature=0, logit_bias={0: 100.0}, repetition_penalty=2.0, logprobs=3)
    result = Sampler(params).sample(logits, np.array([1], np.int32))
    total = math.log(2 * math.exp(3) + math.exp(1))
    assert result.token == 0 and result.logprob == pytest.approx(1 - total)
    assert [i for i, _ in result.top_logprobs] == [1, 2, 0] and result.top_logprobs[0][1] == pytest.approx(3 - total)
    assert Sampler(SamplingParams(temperature=0)).sample(logits, NONE) == Sample(1)
    listed = Sampler(SamplingParams(temperature=0, logprobs=9)).sample(logits, NONE).top_logprobs
    assert [i for i, _ in listed] == [1, 2, 0, 3] and listed[3][1] == -math.inf


def test_kth_largest():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, k = int(rng.integers(1, 60_000)), int(rng.integers(1, 300))
        x = rng.choice([rng.standard_normal(n), rng.integers(0, 9, n).astype(float)]).astype(np.float32)
        x[rng.random(n) < rng.choice([0, 0.5, 0.999])] = -np.inf
        assert kth_largest(x, k) == (np.sort(x)[-k] if k < n else -math.inf)
        assert kth_largest(x, n + 1) == -math.inf


def test_of_two_stop_strings_at_one_place_the_longer_one_ends_it():
    for stops in (["ab", "abc"], ["abc", "ab"]):
        assert StopCriteria((), stops).push("x abcd") == ("x ", "abc")


@pytest.mark.parametrize("settings", [{"top_k": 64, "top_p": 0.95}, {}, {"top_p": 0.95}, {"min_p": 0.05}], ids=str)
def test_a_vocabulary_of_262144_is_fast(settings):
    """No full sort with top_k set, no running sum of it all without: 0.3 to 2 ms on one core, against 50 for a token of
    E2B; the bound allows for a busy machine."""
    logits = random_logits(5, 262_144, 3.0)
    sampler = Sampler(SamplingParams(seed=0, **settings))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        sampler.sample(logits, NONE)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02


# -- stop criteria -----------------------------------------------------------------------------------------------------


def run(stops, pieces):
    criteria = StopCriteria((), stops)
    shown = []
    for piece in pieces:
        text, stop = criteria.push(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, criteria.flush()], None


def every_split(text):
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces, last = [], 0
        for i, cut in enumerate(cuts, 1):
            if cut:
                pieces.append(text[last:i])
                last = i
        yield [*pieces, text[last:]]


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stop"),
    [
        ("hello STOP x", ["STOP"], "hello ", "STOP"),
        ("aaab", ["aab"], "a", "aab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("say STO", ["STOP"], "say STO", None),
        ("x\n\ny", ["\n\n"], "x", "\n\n"),
        ("abc", [], "abc", None),
        ("éé🤖z", ["é🤖"], "é", "é🤖"),
        ("SSTOP", ["STOP", "ST"], "S", None),
        ("END", ["END"], "", "END"),
    ],
)
def test_stop_strings_at_every_split(text, stops, shown, stop):
    for pieces in every_split(text):
        out, found = run(stops, pieces)
        assert "".join(out) == shown if stop else text.startswith("".join(out)), pieces
        assert found == stop if stop or len(stops) < 2 else found in stops


def test_nothing_of_a_stop_string_is_ever_shown():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(1, 20)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randrange(5))))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, found = run(stops, pieces)
        shown = "".join(out)
        assert text.startswith(shown) and not any(s in shown for s in stops)
        assert (found is None and shown == text) or (found is not None and text.startswith(shown + found))


def test_text_comes_as_soon_as_it_is_certain():
    criteria = StopCriteria((), ["STOP"])
    assert (
        criteria.push("a S") == ("a ", None)
        and criteria.push("Ta") == ("STa", None)
        and criteria.push("S") == ("", None)
    )
    assert criteria.flush() == "S" and criteria.flush() == ""
    assert (
        criteria.push("STOP tail") == ("", "STOP") and criteria.push("more") == ("", "STOP") and criteria.flush() == ""
    )


def test_stop_ids_and_bad_stops():
    criteria = StopCriteria([1, np.int32(106), 50], "one string")
    assert criteria.is_stop_id(106) and criteria.is_stop_id(np.int32(50)) and not criteria.is_stop_id(2)
    assert criteria.stop_strings == ("one string",)
    for bad in ([""], [7], [None]):
        with pytest.raises(ValueError, match="stop string"):
            StopCriteria((), bad)
