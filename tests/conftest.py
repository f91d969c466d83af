# SPDX-License-Identifier: Apache-2.0
"""Models for the tests of the Python face: the shipped tiny-e, and random small ones written as checkpoints."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import E_LIKE, MOE_LIKE, write_checkpoint

import gemma4

# What a script starts in the background ignores Ctrl-C, and so would the processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does SIGHUP under nohup.
if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("random-e"), E_LIKE)


@pytest.fixture(scope="session")
def random_e(random_dir: Path) -> gemma4.Model:
    """E2B-like, random weights, no tokenizer."""
    return gemma4.load(random_dir)


@pytest.fixture(scope="session")
def random_moe(tmp_path_factory: pytest.TempPathFactory) -> gemma4.Model:
    """26B-like, random weights, no tokenizer."""
    return gemma4.load(write_checkpoint(tmp_path_factory.mktemp("random-moe"), MOE_LIKE))


@pytest.fixture(scope="session")
def tiny() -> gemma4.Model:
    """The shipped, trained model."""
    return gemma4.load("tiny-e")


PROMPT = "When Mary and John went to the store"


@pytest.fixture(scope="session", params=["tiny-e", "tiny-moe"])
def model(request: pytest.FixtureRequest) -> gemma4.Model:
    """Each shipped model. Modules may have a `model` of their own."""
    return gemma4.load(request.param)


@pytest.fixture(scope="session")
def cache(model: gemma4.Model) -> gemma4.ActivationCache:
    """Every site of the model on PROMPT."""
    return model.run_with_cache(PROMPT, "*")[1]


@pytest.fixture
def prompt() -> np.ndarray:
    """int32 [12]: longer than the random models' window."""
    return np.array([2, 5, 9, 17, 5, 33, 64, 129, 7, 300, 11, 12], dtype=np.int32)
