# SPDX-License-Identifier: Apache-2.0
"""Each variant is built and written once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from . import oracle, towers, variants

if TYPE_CHECKING:
    import gemma4


class Checkpoint(NamedTuple):
    """A variant on disk, with the reference model that has the same weights."""

    variant: variants.Variant
    directory: Path
    model: Any


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """checkpoint(name) -> Checkpoint."""
    torch.set_num_threads(1)  # the models are tiny

    @functools.cache
    def get(name: str) -> Checkpoint:
        variant = variants.BY_NAME[name]
        model = variants.build(variant)
        directory = tmp_path_factory.mktemp(name)
        variants.save(variant, model, directory)
        return Checkpoint(variant, directory, model)

    return get


class Reference(NamedTuple):
    """The oracle's account of one prompt."""

    checkpoint: Checkpoint
    ids: torch.Tensor
    recording: oracle.Recording
    sites: oracle.Sites


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Checkpoint]) -> Callable[[str, int], Reference]:
    """reference(name, n_tokens) -> Reference."""

    @functools.cache
    def get(name: str, n_tokens: int) -> Reference:
        found = checkpoint(name)
        ids = variants.token_ids(found.variant, n_tokens)
        recording = oracle.record(found.model, ids)
        return Reference(found, ids, recording, oracle.sites_from(found.model, recording))

    return get


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Checkpoint]) -> Callable[..., gemma4.Model]:
    """loaded(name, threads=1) -> our model of that variant, exact."""
    import gemma4

    @functools.cache
    def get(name: str, threads: int = 1) -> gemma4.Model:
        return gemma4.load(checkpoint(name).directory, precision="exact", threads=threads)

    return get


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> towers.GetPair:
    """Small random multimodal checkpoints by name."""
    return towers.pairs(tmp_path_factory.mktemp)
