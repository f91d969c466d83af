# SPDX-License-Identifier: Apache-2.0
"""Edits that leave a query no key: all of its scores are -inf, and their softmax would be NaN."""

import numpy as np
import pytest

from gemma4.edits import Add, KnockOut, Set

TEXT = "Once upon a time there was a little girl"
SCORES = "blocks.3.attn.hook_attn_scores"
NOTHING = r"hook_attn_scores: an edit leaves position {} no key in head {}: all of its scores are -inf"


def mask(*index, value=-np.inf):
    def edit(array, site):
        array[index] = value

    return edit


def test_the_reference_gives_nan():
    """What an error spares users: transformers' eager attention with a row of -inf in its mask."""
    torch = pytest.importorskip("torch")
    eager = pytest.importorskip("transformers.models.gemma3.modeling_gemma3").eager_attention_forward
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    masked = torch.zeros(1, 1, 4, 4)
    masked[:, :, 2] = -torch.inf
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 1, False
    out, weights = eager(module, q, k, v, masked, scaling=1.0)
    assert weights[:, :, 2].isnan().all() and out[:, 2].isnan().all() and not out[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize(
    ("hooks", "position", "head"),
    [
        ([(SCORES, mask(slice(None), 3))], 3, 0),
        ([(SCORES, mask(2, slice(4, None)))], 4, 2),
        ([("blocks.*.attn.hook_attn_scores", mask(1, -1))], 9, 1),
        ([Set(SCORES, -np.inf, pos=5)], 5, 0),
        ([Add(SCORES, -np.inf, head=1)], 0, 1),
        ([KnockOut((4, slice(0, 4)), 3), Add(SCORES, -np.inf, pos=4)], 4, 0),
        ([(SCORES, mask(0, 6, slice(3, None))), KnockOut((6, slice(0, 3)), 3)], 6, 0),  # neither does alone
    ],
)
def test_refused(tiny, hooks, position, head):
    plain = tiny.forward(TEXT)
    assert len(plain) == 10
    with tiny.new_sequence() as sequence:
        tiny.forward(TEXT, sequence=sequence)
        with pytest.raises(ValueError, match=NOTHING.format(position, head)):
            tiny.run_with_hooks(TEXT, hooks)
        with pytest.raises(ValueError, match=NOTHING.format(10, ".")):  # the position in the sequence
            tiny.run_with_hooks([7], [(SCORES, mask(slice(None)))], sequence=sequence)
        assert sequence.length == 10
    np.testing.assert_array_equal(tiny.forward(TEXT), plain)


def test_allowed(tiny):
    """One key is enough, also one that a later edit gives back, or that the query could not see before."""
    back = [(SCORES, mask(slice(None), 3)), (SCORES, mask(slice(None), 3, 1, value=0.5))]
    ahead = [(SCORES, mask(slice(None), 3)), (SCORES, mask(slice(None), 3, 5, value=0.5))]
    for hooks, key in ((back, 1), (ahead, 5)):
        with tiny.hooks(hooks):
            logits, cache = tiny.run_with_cache(TEXT, "blocks.3.attn.hook_pattern")
        np.testing.assert_array_equal(cache["blocks.3.attn.hook_pattern"][:, 3], np.eye(10)[[key] * 4])
        assert np.isfinite(logits).all()


def test_while_generating(tiny):
    """The error comes in the step in which it happens."""
    n = len(tiny.to_tokens(TEXT))
    steps = []

    def edit(array, site):
        steps.append(site.start)
        if len(steps) == 3:
            array[:] = -np.inf

    with pytest.raises(ValueError, match=NOTHING.format(n + 1, 0)):
        tiny.generate(TEXT, max_tokens=5, temperature=0, hooks=[(SCORES, edit)])
    assert steps == [0, n, n + 1]


@pytest.mark.parametrize("site", ["vision.blocks.0.attn.hook_attn_scores", "audio.blocks.1.attn.hook_attn_scores"])
def test_encoders(tiny, site):
    def encode():
        if site.startswith("vision"):
            return tiny.encode_image(np.full((48, 48, 3), 90, np.uint8))
        return tiny.encode_audio(np.sin(np.arange(8000, dtype=np.float32)), rate=16_000)

    plain = encode()
    for hook in ((site, mask(1, 2)), Set(site, -np.inf, head=1)):
        with (
            tiny.hooks([hook]),
            pytest.raises(ValueError, match=f"{site}: an edit leaves position [02] no key in head 1"),
        ):
            encode()
    with tiny.hooks([(site, mask(1, 2, slice(1, None)))]):
        assert np.isfinite(encode()).all()
    np.testing.assert_array_equal(encode(), plain)
