# SPDX-License-Identifier: Apache-2.0
"""Every site and the logits of our engine against transformers in float32, for every variant of the architecture."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import gemma4
from gemma4.load.config import EARLIER

from . import site_list, variants
from .compare import difference, first_failures
from .conftest import Reference
from .oracle import text_model

Get = Callable[[str, int], Reference]
Load = Callable[[str], gemma4.Model]
CASES = [(v.name, n) for v in variants.VARIANTS for n in v.prompt_lengths]


def test_every_family_has_variants() -> None:
    families = {variant.family for variant in variants.VARIANTS}
    assert families == set(variants.TEXT_CLASSES)
    assert {EARLIER[family] for family in families & set(EARLIER)} == set(EARLIER.values())


@pytest.mark.parametrize(("name", "n_tokens"), CASES)
def test_every_site(name: str, n_tokens: int, reference: Get, loaded: Load) -> None:
    expected = reference(name, n_tokens)
    logits, cache = loaded(name).run_with_cache(expected.ids.numpy(), names="*")
    assert set(cache) == set(expected.sites)
    assert first_failures(cache, expected.sites) == []
    assert difference(logits, expected.sites["hook_logits"]) is None


@pytest.mark.parametrize("name", [v.name for v in variants.VARIANTS])
def test_has_exactly_the_listed_sites(name: str, reference: Get, loaded: Load) -> None:
    n = variants.BY_NAME[name].prompt_lengths[0]
    sites = loaded(name).sites
    shapes = site_list.expected(reference(name, n).checkpoint.model, n)
    assert {site: sites[site].shape(n, n) for site in sites} == shapes


@pytest.mark.parametrize("name", ["e2b", "moe26b", "dense31b", "everything", "gemma2", "gemma3", "vaultgemma"])
def test_continues_a_cached_sequence_as_the_whole_prompt(name: str, reference: Get, loaded: Load) -> None:
    """Sites of a second run see the first run's keys: compared with transformers on the whole prompt."""
    n, cut = variants.LONG, variants.LONG - 9
    expected = reference(name, n)
    model = loaded(name)
    with model.new_sequence() as sequence:
        model.forward(expected.ids[:cut].numpy(), sequence=sequence, logits=None)
        _, cache = model.run_with_cache(expected.ids[cut:].numpy(), names="*", sequence=sequence)
    late = {site: _late(site, array, cut, n) for site, array in expected.sites.items()}
    window = variants.BY_NAME[name].window
    for site in [s for s in late if s.endswith("_used")]:  # keys that a window has left behind are gone
        kept = np.abs(cache[site]).reshape(n, -1).max(1) > 0
        assert kept[max(0, cut - window + 1) :].all()
        late[site] = np.where(kept[:, None, None], late[site], 0)
    assert first_failures(cache, late) == []


@pytest.mark.parametrize("name", ["e2b-seed1", "dense31b", "gemma2", "gemma3"])
def test_given_embeddings(name: str, reference: Get, loaded: Load) -> None:
    """Soft tokens: their per-layer table row is the pad token's, the projection is of what is given."""
    found, model, n = reference(name, 13), loaded(name), 13
    text = text_model(found.checkpoint.model)
    given = 2 * torch.from_numpy(found.sites["hook_embed"])[None]
    options = {}
    if getattr(text, "hidden_size_per_layer_input", 0):
        options["per_layer_inputs"] = text.get_per_layer_inputs(torch.zeros(1, n, dtype=torch.long), None)
    with torch.no_grad():
        out = found.checkpoint.model(inputs_embeds=given, use_cache=False, output_attentions=True, **options)
    logits = np.zeros((n, model.d_vocab), np.float32)
    run = (model.engine.new_sequence(), None, given[0].numpy(), np.arange(n, dtype=np.int32), logits)
    model.engine.step([run])
    assert difference(logits, out.logits[0].numpy()) is None


@pytest.mark.parametrize("name", ["e2b-seed1", "dense31b"])
def test_tokens_and_embeddings_in_one_run(name: str, reference: Get, loaded: Load) -> None:
    """A token id below 0 takes the position's embedding; all others take the table's row and leave theirs unread."""
    found, model, n = reference(name, 13), loaded(name), 13
    text, soft = text_model(found.checkpoint.model), torch.tensor([2, 3, 4, 9])
    embeddings = torch.from_numpy(found.sites["hook_embed"]).clone()
    embeddings[soft] *= -1.5
    options, ids = {}, found.ids.clone()
    if getattr(text, "hidden_size_per_layer_input", 0):
        ids[soft] = 0
        options["per_layer_inputs"] = text.get_per_layer_inputs(ids[None], None)
    with torch.no_grad():
        out = found.checkpoint.model(inputs_embeds=embeddings[None], use_cache=False, output_attentions=True, **options)
    tokens = found.ids.numpy().astype(np.int32)
    tokens[soft] = [-1, -1, -2, -7]
    given = np.full((n, embeddings.shape[1]), np.nan, np.float32)
    given[soft] = embeddings[soft]
    logits = np.zeros((n, model.d_vocab), np.float32)
    model.engine.step([(model.engine.new_sequence(), tokens, given, np.arange(n, dtype=np.int32), logits)])
    assert difference(logits, out.logits[0].numpy()) is None
    with pytest.raises(ValueError, match="token id -1 at position 2"):
        model.engine.step([(model.engine.new_sequence(), tokens, None, None, None)])


def _late(site: str, array: np.ndarray, cut: int, n: int) -> np.ndarray:
    """The rows of positions cut.. ; key axes stay whole."""
    if site.endswith(("hook_attn_scores", "hook_pattern")):
        return array[:, cut:]
    return array if site.endswith("_used") else array[cut:n]
