# SPDX-License-Identifier: Apache-2.0
"""What each row of csrc/model/sites.inc says of a site, against the forward pass that announces it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import gemma4
from gemma4.interp.sites import Site

ROOT = Path(__file__).resolve().parent.parent
IDS = np.array([2, 5, 9, 17, 5, 33, 64, 129, 7, 300, 11, 12], dtype=np.int32)


@pytest.fixture(params=["random_e", "random_moe"])
def model(request: pytest.FixtureRequest) -> gemma4.Model:
    return request.getfixturevalue(request.param)


def last_kv_layer(model: gemma4.Model) -> int:
    return max(layer["kv_source"] for layer in model.engine_config["layers"])


def where_rows_are_pruned(model: gemma4.Model) -> list[Site]:
    """Sites of the whole model, and those of the last layer that computes keys."""
    return [site for site in model.sites.values() if site.layer in (None, last_kv_layer(model))]


def rows_of_mlps(model: gemma4.Model, **options: object) -> float:
    """A number that grows with the rows that pass MLPs, in all layers together."""
    with model.profile() as profile:
        model.run_with_cache(IDS, **options)
    return sum(op.work for op in profile.ops if op.name == "gate, up")


def test_captures_are_complete_where_only_the_last_row_has_logits(model):
    """A row that said "before pruning" of a site after it would leave rows of the capture empty, or fail the pass."""
    for site in where_rows_are_pruned(model):
        _, whole = model.run_with_cache(IDS, site.name)
        _, cache = model.run_with_cache(IDS, site.name, logits="last")
        assert np.array_equal(cache[site.name], whole[site.name]), site.name


def test_pruning_stays_on_where_a_site_comes_before_it(model):
    """A row that said "after pruning" of a site before it would keep every row, four times slower and unseen."""
    few = rows_of_mlps(model, names=[], logits="last")
    many = rows_of_mlps(model, names=[], logits="all")
    assert many > few
    for site in where_rows_are_pruned(model):
        rows = rows_of_mlps(model, names=site.name, logits="last")
        assert rows == (many if site.pruned and site.keys != "cached" else few), site.name


def test_what_python_knows_of_a_site_is_what_its_row_says(model):
    text = (ROOT / "csrc/model/sites.inc").read_text()
    found = re.findall(r'^G4_SITE\((\w+), +"([^"]+)", +"(\w+)", +(\w+), +(\w+), +(\w+), +(\w+), +(\w+)\)$', text, re.M)
    rows = {name: facts for _, name, *facts in found}
    assert len(rows) == text.count("\nG4_SITE(")
    for site in model.sites.values():
        dims, _, pruned, keys, dtype, access = rows[re.sub(r"^blocks\.\d+\.", "blocks.{}.", site.name)]
        assert len(site.dims) == len(dims)
        assert site.pruned == (pruned == "AFTER") and site.writable == (access == "EDIT")
        assert site.keys == {"NONE": "", "CACHED": "cached", "SCORES": "scores", "PATTERN": "pattern"}[keys]
        assert site.dtype == {"F32": np.float32, "I32": np.int32}[dtype]


def test_sites_come_layer_by_layer_in_forward_order(model):
    layers = [-1 if site.layer is None else site.layer for site in model.sites.values()]
    inner = [layer for layer in layers if layer >= 0]
    assert inner == sorted(inner)
    first, last = layers.index(0), len(layers) - layers[::-1].index(inner[-1])
    assert set(layers[:first]) == set(layers[last:]) == {-1}


def test_an_edit_of_every_site_changes_the_logits(model):
    """A row that said EDIT of a value that nothing reads, or a TAP on a copy, would take edits and ignore them."""
    plain, rng = model.forward(IDS), np.random.default_rng(0)

    def change(array: np.ndarray, site: Site) -> np.ndarray:
        if array.dtype == np.int32:  # another expert for every token
            return np.roll(array, 1, axis=0)
        return array * rng.uniform(0.5, 1.5, array.shape).astype(np.float32)

    for site in filter(lambda site: site.writable, model.sites.values()):
        assert not np.array_equal(model.run_with_hooks(IDS, [(site.name, change)]), plain), site.name
