# SPDX-License-Identifier: Apache-2.0
"""Where tiny-e's text model is told to look while it learns to answer about pictures and recordings."""

from __future__ import annotations

import random
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import gemma4  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from train_tiny import (  # noqa: E402
    hints,
    look,
    media_rows,
    pictures,
    pool,
    scenes,
    skills_media,
    sounds,
    speech,
    towers,
)
from train_tiny.train_media import Reader, tensors  # noqa: E402

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
WINDOW = 32
speaks = pytest.mark.skipif(find_library("espeak-ng") is None, reason="speech is made with espeak-ng")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> object:
    return towers.build(TINY, 0).eval()


def encoded(model, kind: str, number: int = 0) -> pool.Item:
    return pool.encode(model, *pool.source(kind, 7, number, small=0.5))


def test_places_are_written_while_looking_at_the_shape_that_was_asked_for(model, tokenizer: Tokenizer) -> None:
    scene = next(s for s in (pool.source("shapes", 7, i)[0] for i in range(50)) if len(s.shapes) == 3)
    item = pool.encode(model, scene)
    image = tokenizer.token_to_id("<|image|>")
    for skill in ("box", "point"):
        talk = skills_media.picture_conversation(random.Random(1), scene, turns=1, skill=skill)
        doc = media_rows.about(item, [talk], tokenizer)
        number = 1 + [thing.name in talk.turns[0][2] for thing in scene.shapes].index(True)
        written = [tokenizer.decode([i], skip_special_tokens=False) for i in doc.ids]
        end = doc.prompt_len + written[doc.prompt_len :].index("]")
        name = written.index("?" if skill == "box" else ".") - 1
        expected = np.zeros(len(doc.ids), np.int32)
        expected[name : end - 1] = number  # what writes the bracket need not look
        np.testing.assert_array_equal(doc.look, expected)
        assert "".join(written[: name + 1]).endswith(scene.shapes[number - 1].name)
        order = np.arange(len(doc.ids))
        np.testing.assert_array_equal((order - doc.name)[doc.name > 0], name)
        colours = {written[i].strip() for i in (order - doc.colour)[doc.colour > 0]}
        assert colours == {scene.shapes[number - 1].colour}
        assert (doc.colour > 0).sum() == (doc.look > 0).sum() == (doc.name > 0).sum() + 1
        box = np.array(scene.box_2d(scene.shapes[number - 1])) / 1000
        np.testing.assert_allclose(doc.place[doc.look > 0], np.tile(box, ((doc.look > 0).sum(), 1)), atol=1e-6)
        assert not doc.place[doc.look == 0].any()
        ranks = hints.targets(scene, *(3 * side for side in pictures.grid(scene.width, scene.height, 70))).rank
        np.testing.assert_array_equal(doc.thing[doc.ids == image], np.where(ranks < 0, 0, 1 + ranks))
        assert not doc.thing[doc.ids != image].any()


def test_digits_are_written_while_looking_at_them(tokenizer: Tokenizer) -> None:
    number = scenes.Thing("number", "red", (0.0, 96.0, 96.0, 144.0), "42", "", ((0.0, 48.0), (48.0, 96.0)))
    item = pool.Item(scenes.Scene(144, 144, (0, 0, 0), (number,), 0), (np.zeros((64, 128), np.float16),))
    seen = look.shown(item).reshape(8, 8)
    assert seen[6].tolist() == [1, 1, 1, 2, 2, 0, 0, 0] or seen[6].tolist() == [1, 1, 2, 2, 2, 0, 0, 0]
    assert not np.delete(seen, 6, axis=0).any()
    doc = media_rows.about(item, media_rows.ask(item, random.Random(0)), tokenizer)
    written = [tokenizer.decode([i]) for i in doc.ids]
    assert [written[i + 1] for i in np.nonzero(doc.look)[0]] == ["4", "2"]
    assert doc.look[doc.look > 0].tolist() == [1, 2]


def test_a_word_out_of_sight_is_looked_for_on_the_way() -> None:
    back = np.array([[0, 0, 0, 1, 2, 3, 4, 5]])
    wanted = look.at_word(back, 4)[0].numpy()
    assert not wanted[:3].any()
    assert [np.nonzero(row)[0].tolist() for row in wanted[3:]] == [[2], [2], [2], [2, 3, 4, 5], [2, 3, 4, 5]]


@speaks
def test_digits_are_transcribed_while_listening_to_where_each_was_said(model, tokenizer: Tokenizer) -> None:
    item = encoded(model, "digits")
    doc = media_rows.about(item, media_rows.ask(item, random.Random(0)), tokenizer)
    written = [tokenizer.decode([i]) for i in doc.ids]
    said = item.source.written.split()
    assert [written[i + 1] for i in np.nonzero(doc.look)[0]] == said
    heard = doc.thing[doc.thing > 0]
    assert set(heard.tolist()) == set(range(1, 1 + len(said)))
    assert (np.diff(heard) >= 0).all()
    ends = [stop for _, _, stop in speech.say(item.source).words]
    first = [np.nonzero(look.shown(item) == n)[0][0] * sounds.TOKEN for n in range(1, 1 + len(said))]
    np.testing.assert_allclose(first, ends, atol=0.1)


def test_the_weight_of_a_look_is_the_attention_that_the_model_has(model, tokenizer: Tokenizer) -> None:
    """Against eager attention's own weights; the second of two pictures has numbers of its own."""
    items = [encoded(model, "shapes", number) for number in (2, 3)]
    docs = [media_rows.about(item, media_rows.ask(item, random.Random(1), 8), tokenizer) for item in items]
    rows = media_rows.pack(iter(docs), tokenizer, 1200, 1, 128)
    fresh = towers.build(TINY, 0).eval()
    text = fresh.model.language_model
    gaze, near, weights = look.Gaze(text, 4, (0, 3)), look.Gaze(text, 2, (1,)), {}
    text.config._attn_implementation = "eager"
    for layer in (2, 4):
        attention = text.layers[layer].self_attn
        attention.register_forward_hook(lambda module, inputs, output: weights.update({module.layer_idx: output[1]}))
    given = list(tensors(rows, WINDOW))
    given[3:] = [torch.where(mask, 0.0, -torch.inf) for mask in given[3:]]  # what eager attention takes
    gone = rows.document[0] == 0  # padding sees nothing
    for mask in given[3:]:
        mask[:, :, gone] = 0
    with torch.no_grad():
        Reader(fresh)(*given)
        for one, mask in zip((gaze, near), media_rows.masks(rows, WINDOW).values(), strict=True):
            one.seen["attention_mask"] = torch.from_numpy(mask)
        mass, row = gaze.mass(look.at_thing(rows.look, rows.thing))
        name, _ = near.mass(look.at_word(rows.name, WINDOW))
    at = np.nonzero(rows.look[0])[0]
    assert len(at) == len(mass) > 50
    assert not row.any()
    for found, i in zip(mass, at, strict=True):
        there = (rows.thing[0] == rows.look[0, i]) & (rows.document[0] == rows.document[0, i])
        torch.testing.assert_close(found, weights[4][0, [0, 3], i][:, there].sum(1), rtol=0, atol=1e-5)
    asked = np.nonzero(rows.name[0])[0]
    close = [(n, i) for n, i in enumerate(asked) if rows.name[0, i] < WINDOW]
    assert len(asked) == len(name) > len(close) > 50
    for n, i in close:
        torch.testing.assert_close(name[n, 0], weights[2][0, 1, i, i - rows.name[0, i]], rtol=0, atol=1e-5)


def test_the_hints_teach(model, tokenizer: Tokenizer) -> None:
    """A few steps on one row: the heads look where they should, and what the layer leaves says the box."""
    fresh = towers.build(TINY, 0).requires_grad_(False)
    text = fresh.model.language_model
    item = encoded(model, "shapes", 2)
    doc = media_rows.about(item, media_rows.ask(item, random.Random(1), 4), tokenizer)
    rows = media_rows.pack(iter([doc]), tokenizer, len(doc.ids), 1, 128)
    gaze, place = look.Gaze(text, 4, (1,)), look.Place(text, 4, 128)
    wanted = look.at_thing(rows.look, rows.thing)
    boxes = torch.from_numpy(rows.colour > 0), torch.from_numpy(rows.place)
    parameters = [*text.layers[4].self_attn.requires_grad_(True).parameters(), *place.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    found = []
    for _ in range(12):
        Reader(fresh)(*tensors(rows, WINDOW))
        mass, _ = gaze.mass(wanted)
        error = place.error(*boxes)
        found.append((mass.mean().item(), error.item()))
        (error - mass.log().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1][0] > found[0][0] + 0.2, f"weight on what was asked for: {found[0][0]:.2f} -> {found[-1][0]:.2f}"
    assert found[-1][1] < found[0][1] / 2, f"distance of the edges: {found[0][1]:.2f} -> {found[-1][1]:.2f}"
