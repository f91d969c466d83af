# SPDX-License-Identifier: Apache-2.0
"""The extension module itself, called in ways that the package does not: what a sequence, a model and a signal handler
meet halfway through a call."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from gemma4 import _engine
from gemma4.errors import FormatError, StateError

IDS = np.arange(2, 200, dtype=np.int32)


def logits_after(engine, sequence, d_vocab):
    logits = np.zeros((1, d_vocab), np.float32)
    engine.step([(sequence, IDS[:3], None, np.array([2], np.int32), logits)])
    return logits


@pytest.fixture
def engine(random_e):
    return random_e.engine


@pytest.mark.parametrize("use", ["close", "truncate", "fork", "state", "step"])
def test_a_sequence_is_locked_while_a_step_reads_its_arguments(engine, use):
    sequence, caught = engine.new_sequence(), []
    calls = {
        "close": lambda: sequence.close(),
        "truncate": lambda: sequence.truncate(0),
        "fork": lambda: sequence.fork(),
        "state": lambda: sequence.state(),
        "step": lambda: engine.step([(sequence, IDS, None, None, None)]),
    }

    def no_taps():
        try:
            calls[use]()
        except StateError as error:
            caught.append(str(error))
        yield from ()

    engine.step([(sequence, IDS[:5], None, None, None)], no_taps())
    assert len(caught) == 1
    assert "in use by another call" in caught[0]
    assert sequence.length == 5


def test_locks_are_released_where_arguments_are_refused(engine):
    first, second = engine.new_sequence(), engine.new_sequence()
    runs = [(first, IDS[:5], None, None, None), (second, IDS[:5].astype(np.int64), None, None, None)]
    with pytest.raises(ValueError, match="tokens"):
        engine.step(runs)
    with pytest.raises(StateError, match="given twice"):
        engine.step([runs[0], runs[0]])
    with pytest.raises(TypeError, match="a tap is a tuple"):
        engine.step(runs[:1], [None])
    engine.step([runs[0], (second, IDS[:7], None, None, None)])
    assert (first.length, second.length) == (5, 7)


def test_a_state_that_is_refused_halfway_leaves_an_empty_sequence(engine, random_e):
    source, target = engine.new_sequence(), engine.new_sequence()
    for piece in np.split(IDS, 9):
        engine.step([(source, piece, None, None, None)])
    state = source.state()
    assert state["layers"][0][0] > len(IDS) // 2  # sliding layers have lost positions
    last = max(state["layers"])
    first, k, v = state["layers"][last]
    for wrong in [(first, k[:, :, :-1].copy(), v), (first, k), None]:
        damaged = {"length": state["length"], "layers": state["layers"] | {last: wrong}}
        with pytest.raises((ValueError, TypeError)):
            target.load_state(damaged)
        assert (target.length, target.min_truncate) == (0, 0)
    expected = logits_after(engine, engine.new_sequence(), random_e.d_vocab)
    np.testing.assert_array_equal(logits_after(engine, target, random_e.d_vocab), expected)
    assert all(first == 0 and k.shape[0] == 3 for first, k, _ in target.state()["layers"].values())


class OddItems(dict):
    """A mapping whose items() are not pairs."""

    def __init__(self, item):
        super().__init__(a=1)
        self.item = item

    def items(self):
        return [self.item]


@pytest.mark.parametrize("item", [["a", 1], ("a",), (), None, ("a", 1), (1, 2), ("a", None)])
def test_tensors_that_are_no_pairs(item):
    with pytest.raises((TypeError, ValueError)):
        _engine.Model({}, OddItems(item))


def test_rows_too_long_to_widen():
    n = 1 << 31
    with mmap.mmap(-1, n // 32 * 17) as zeros, pytest.raises(FormatError, match="2147483648 values"):
        _engine.dequantize("MXFP4", (n,), zeros, 0)


HANDLER = """
    import signal, sys
    import numpy as np
    import gemma4

    model = gemma4.load(sys.argv[1], threads=2)
    ids, long = np.arange(2, 9, dtype=np.int32), np.arange(900, dtype=np.int32) % 250 + 2
    expected, expected_long = model.forward(ids), model.forward(long, logits="last")
    answers = []


    def answer(*_):  # each alarm sets the next: on slow code handlers would interrupt each other without end
        answers.append(model.forward(ids))
        signal.setitimer(signal.ITIMER_REAL, 0.005)


    signal.signal(signal.SIGALRM, answer)
    answer()
    while len(answers) < 20:
        assert np.array_equal(model.forward(long, logits="last"), expected_long)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert all(np.array_equal(answer, expected) for answer in answers)
"""


def test_a_signal_handler_may_use_the_model_that_it_interrupts():
    command = [sys.executable, "-P", "-c", textwrap.dedent(HANDLER), "tiny-e"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
