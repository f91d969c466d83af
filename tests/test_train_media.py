# SPDX-License-Identifier: Apache-2.0
"""The data that tiny-e's towers learn from says what is on the pictures and in the recordings; its rows are what
transformers' processors and forward pass would make of them."""

from __future__ import annotations

import json
import random
import re
import sys
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import gemma4  # noqa: E402
import gemma4.media.audio  # noqa: E402
import gemma4.media.image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from train_tiny import (  # noqa: E402
    hints,
    media_rows,
    pictures,
    pool,
    scenes,
    skills_media,
    sounds,
    speech,
    towers,
    video,
)
from train_tiny.evaluate_media import evaluate, gemma4_answer, overlap, right  # noqa: E402
from train_tiny.example import is_held_out  # noqa: E402
from train_tiny.export_media import calibrate  # noqa: E402
from train_tiny.train_media import Reader, tensors  # noqa: E402

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
speaks = pytest.mark.skipif(find_library("espeak-ng") is None, reason="speech is made with espeak-ng")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> object:
    return towers.build(TINY, 0).eval()


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [scenes.shape_scene, scenes.text_scene])
def test_what_is_on_a_picture_lies_inside_its_box_and_nowhere_else(generator) -> None:
    for seed in range(30):
        scene = generator(random.Random(seed))
        pixels = np.asarray(scenes.draw(scene)).astype(int)
        assert pixels.shape == (scene.height, scene.width, 3)
        drawn = np.abs(pixels - scene.ground).max(axis=2) > 0
        boxes = np.zeros_like(drawn)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            inside = np.s_[max(0, int(y0) - 1) : int(y1) + 3, max(0, int(x0) - 1) : int(x1) + 3]
            boxes[inside] = True
            rows, columns = np.nonzero(drawn[inside])
            assert np.ptp(rows) >= 0.8 * (y1 - y0) - 3, f"{thing.name} does not fill its box"
            assert np.ptp(columns) >= 0.8 * (x1 - x0) - 3, f"{thing.name} does not fill its box"
            colours = pixels[inside][drawn[inside]]
            near = np.abs(colours - scenes.COLOURS[thing.colour]).max(axis=1) <= 18
            assert near.mean() > (0.3 if thing.text else 0.95), f"{thing.name} has another colour"
        assert not (drawn & ~boxes).any()


def test_a_box_is_in_gemmas_order_and_scale() -> None:
    thing = scenes.Thing("circle", "red", (20.0, 10.0, 100.0, 30.0))
    assert scenes.Scene(200, 100, (0, 0, 0), (thing,), 0).box_2d(thing) == [100, 100, 300, 500]


def test_a_scene_follows_from_its_seed_and_held_out_scenes_are_kept_apart() -> None:
    assert scenes.shape_scene(random.Random(7)) == scenes.shape_scene(random.Random(7))
    for held_out in (False, True):
        keys = [scenes.sample(scenes.text_scene, random.Random(i), held_out=held_out).key for i in range(20)]
        assert {is_held_out("picture", key) for key in keys} == {held_out}


@pytest.mark.parametrize("budget", [70, 140, 280])
@pytest.mark.parametrize("size", [(96, 96), (288, 162), (100, 260), (640, 480)])
def test_patches_are_transformers_and_this_projects(budget: int, size: tuple[int, int]) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    image = scenes.draw(scenes.shape_scene(random.Random(budget))).resize(size)
    expected = Gemma4ImageProcessorPil(max_soft_tokens=budget)(image, return_tensors="pt")
    cut = pictures.patches(image, budget)
    pixels, positions = pictures.stack([cut])
    n = len(cut.values)
    assert cut.tokens == expected["num_soft_tokens_per_image"][0]
    torch.testing.assert_close(pixels[0], expected["pixel_values"][0, :n], rtol=0, atol=1e-6)
    assert torch.equal(positions[0], expected["image_position_ids"][0, :n])
    ours = gemma4.media.image.preprocess(image, budget)
    np.testing.assert_allclose(pixels[0].numpy(), ours.patches, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(positions[0].numpy(), ours.positions)


def test_the_hints_name_what_covers_a_patch() -> None:
    thing = scenes.Thing("star", "blue", (48.0, 0.0, 96.0, 48.0))
    number = scenes.Thing("number", "red", (0.0, 96.0, 96.0, 144.0), "42", "", ((0.0, 48.0), (48.0, 96.0)))
    scene = scenes.Scene(144, 144, (0, 0, 0), (thing, number), 0)
    found = hints.targets(scene, 9, 9)
    kinds = found.kind.reshape(3, 3)
    star, digits = 1 + scenes.KINDS.index("star"), 1 + hints.KIND_CLASSES.index("number")
    assert kinds.tolist() == [[0, star, 0], [0, 0, 0], [digits, digits, 0]]
    assert found.digits.reshape(3, 3, hints.SLOTS)[2, 0].tolist() == [4, 2, 10]
    assert found.patch_character.reshape(9, 9)[7, :6].tolist() == [30] * 3 + [28] * 3  # 4 4 4 2 2 2
    assert set(found.count.tolist()) == {1}
    np.testing.assert_allclose(found.place.reshape(3, 3, 4)[0, 1], [0, 1 / 3, 1 / 3, 2 / 3], atol=1e-3)


# --- video --------------------------------------------------------------------------------------------------------


def test_a_shape_moves_the_way_its_clip_says() -> None:
    seen = set()
    for seed in range(40):
        clip = video.clip(random.Random(seed))
        places = np.array([frame.things[0].centre for frame in clip.frames])
        moved = places[-1] - places[0]
        main = int(np.abs(moved).argmax())
        assert video.DIRECTIONS[clip.direction][main] == np.sign(moved[main])
        assert np.abs(moved)[main] > 2 * np.abs(moved)[1 - main]
        assert (places > 0).all()
        assert (places < clip.frames[0].width).all()
        seen.add(clip.direction)
    assert seen == set(video.DIRECTIONS)


# --- speech -------------------------------------------------------------------------------------------------------


@speaks
def test_words_are_where_the_recording_says() -> None:
    for seed in range(12):
        said = speech.sample(random.Random(seed), held_out=False)
        sound = speech.say(said)
        assert [word for word, _, _ in sound.words] == said.spoken.split()
        starts, stops = [start for _, start, _ in sound.words], [stop for _, _, stop in sound.words]
        assert starts == sorted(starts)
        assert stops[-1] < len(sound.samples) / speech.RATE
        power = sound.samples**2
        spoken = power[int(starts[0] * speech.RATE) : int(stops[-1] * speech.RATE)].mean()
        assert spoken > 4 * power[: int(0.04 * speech.RATE)].mean(), "the words are not where the voice is"
        assert speech.RATE * 0.3 < len(sound.samples) < speech.RATE * 6
        assert np.abs(sound.samples).max() <= 1.2


@speaks
def test_the_same_seed_says_the_same_words_at_the_same_times() -> None:
    """The samples differ: espeak-ng's voices waver at random."""
    said = speech.sample(random.Random(3), held_out=True, skill="digits")
    assert is_held_out("speech", said.spoken)
    first, again, other = speech.say(said), speech.say(said), speech.say(replace(said, speed=said.speed + 30))
    assert [word for word, _, _ in first.words] == [word for word, _, _ in again.words]
    np.testing.assert_allclose([w[1:] for w in first.words], [w[1:] for w in again.words], atol=0.05)
    assert first.words[-1][2] - first.words[0][1] > other.words[-1][2] - other.words[0][1] + 0.1, "faster is shorter"


def test_resampling_keeps_a_tone_and_drops_what_the_new_rate_cannot_hold() -> None:
    seconds = np.arange(22050) / 22050
    low, high = np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 9000 * seconds)
    out = speech.resample((low + high).astype(np.float32), 22050, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(out) == 16000
    assert np.abs(out - expected).max() < 1e-3


@pytest.mark.parametrize("samples", [1000, 16000, 23456])
def test_mel_features_are_this_projects_and_count_the_soft_tokens(samples: int) -> None:
    waves = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    features = sounds.mel(waves)
    np.testing.assert_allclose(features, gemma4.media.audio.log_mel(waves), rtol=0, atol=1e-5)
    assert sounds.tokens(len(features)) == gemma4.media.audio.n_soft_tokens(samples)


# --- rows ---------------------------------------------------------------------------------------------------------


KINDS = [kind for kind in pool.KINDS if kind not in ("speech", "digits") or find_library("espeak-ng")]
WINDOW = 32


def encoded(model, kind: str, number: int = 0) -> pool.Item:
    return pool.encode(model, *pool.source(kind, 7, number, small=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_every_branch_of_a_row_is_the_reference_forward_pass_alone(model, tokenizer: Tokenizer, kind: str) -> None:
    """Questions packed behind one picture = each asked alone of Gemma4ForConditionalGeneration, with its pixels."""
    items = [encoded(model, kind, number) for number in (0, 1)]
    asked = [media_rows.ask(item, random.Random(3), 4) for item in items]
    docs = [media_rows.about(item, talks, tokenizer) for item, talks in zip(items, asked, strict=True)]
    rows = media_rows.pack(iter(docs), tokenizer, 800, 1, 128)
    assert rows.document.max() == 2
    with torch.no_grad():
        hidden = Reader(model)(*tensors(rows, WINDOW))[0]
    for number, talk in enumerate(asked[1], 1):
        alone = media_rows.about(items[1], [talk], tokenizer)
        own = (rows.document[0] == 2) & np.isin(rows.branch[0], (0, number))
        np.testing.assert_array_equal(rows.ids[0, own], alone.ids)
        pixels = {}
        if talk.said is None:  # soft tokens are stored in half precision
            budget = pool.source(kind, 7, 1, small=0.5)[1]
            values, places = pictures.stack(media_rows.tokenize(talk, tokenizer, budget).pictures)
            pixels = {"pixel_values": values, "image_position_ids": places}
            if talk.clip:
                pixels = {"pixel_values_videos": values, "video_position_ids": places}
                pixels["num_frames_per_video"] = torch.tensor([len(values)])
        else:  # espeak-ng wavers: the soft tokens themselves, not those of a second recording
            one = media_rows.pack(iter([alone]), tokenizer, len(alone.ids), 1, 128)
        with torch.no_grad():
            ids = torch.from_numpy(alone.ids.astype(np.int64))[None]
            expected = (
                Reader(model)(*tensors(one, WINDOW))[0]
                if talk.said
                else model.model(input_ids=ids, **pixels).last_hidden_state[0]
            )
        torch.testing.assert_close(hidden[own], expected, rtol=0, atol=0.02)


def test_a_question_sees_neither_another_nor_another_picture(model, tokenizer: Tokenizer) -> None:
    items = [encoded(model, "shapes", number) for number in (2, 3)]
    docs = [media_rows.about(item, media_rows.ask(item, random.Random(1), 3), tokenizer) for item in items]
    rows = media_rows.pack(iter(docs), tokenizer, 800, 1, 128)
    sees = media_rows.masks(rows, WINDOW)["full_attention"][0, 0]
    assert not sees[rows.document[0] == 2][:, rows.document[0] == 1].any()
    second = (rows.document[0] == 1) & (rows.branch[0] == 2)
    assert sees[second][:, (rows.document[0] == 1) & (rows.branch[0] == 0)].all()
    assert not sees[second][:, (rows.document[0] == 1) & (rows.branch[0] == 1)].any()
    near = media_rows.masks(rows, WINDOW)["sliding_attention"][0, 0]
    assert near[rows.document[0] > 0].sum(1).max() == WINDOW


def test_a_pool_gives_back_what_was_encoded(model, tmp_path: Path) -> None:
    for kind in ("shapes", "clips"):
        pool.make(model, tmp_path, kind, count=3, seed=4, small=0.5)
        found = pool.stored(tmp_path, kind)
        assert [item.source for item in found] == [pool.source(kind, 4, i, 0.5)[0] for i in range(3)]
        for number, item in enumerate(found):
            again = pool.encode(model, *pool.source(kind, 4, number, 0.5))
            assert item.sizes == again.sizes
            assert all(np.array_equal(a, b) for a, b in zip(item.soft, again.soft, strict=True))
    with pytest.raises(ValueError, match="has no writing"):
        pool.stored(tmp_path, "writing")


def test_a_step_has_rows_of_every_kind_and_depends_on_its_number_alone(model, tokenizer: Tokenizer) -> None:
    items = {kind: [encoded(model, kind)] for kind in KINDS if kind not in ("speech", "digits")}
    items["speech"] = items["digits"] = items["clips"]
    rows, again = (media_rows.batch(tokenizer, items, 0, 5) for _ in range(2))
    assert rows.ids.shape == (sum(media_rows.SHARE.values()), media_rows.LENGTH)
    np.testing.assert_array_equal(rows.ids, again.ids)
    np.testing.assert_array_equal(rows.soft, again.soft)
    marks = [tokenizer.token_to_id(mark) for mark in media_rows.MARKS]
    np.testing.assert_array_equal(np.isin(rows.ids, marks), rows.soft.any(2))
    text = rows.ids[-media_rows.SHARE["text"] :]
    assert not np.isin(text, marks).any()


def test_answers_count_and_soft_tokens_do_not(tokenizer: Tokenizer) -> None:
    conversation = skills_media.held_out("box", 1)[0]
    doc = media_rows.tokenize(conversation, tokenizer)
    answer = tokenizer.decode(doc.ids[doc.prompt_len :].tolist(), skip_special_tokens=True)
    assert answer == conversation.turns[0][2]
    assert json.loads(answer)[0]["label"] in conversation.turns[0][1]
    digits = np.array([tokenizer.decode([i]).isdigit() for i in doc.ids[doc.prompt_len :]])
    np.testing.assert_array_equal(doc.weights[doc.prompt_len :], np.where(digits, media_rows.DIGIT_WEIGHT, 1.0))
    assert not doc.weights[: doc.prompt_len].any()
    soft = doc.ids == tokenizer.token_to_id("<|image|>")
    assert soft.sum() == doc.pictures[0].tokens
    assert not doc.weights[soft].any()


@pytest.mark.parametrize("skill", [s for s in skills_media.SKILLS if not s.startswith("speech")])
def test_the_right_answer_is_right_and_another_is_not(skill: str) -> None:
    first, second = skills_media.held_out(skill, 2)
    answer = first.turns[0][2]
    assert right(first, answer)
    assert not right(first, answer[:-2])
    if skill.removesuffix("_alone") in ("box", "point"):
        assert not right(first, answer.replace("label", "name"))
        assert not right(first, json.dumps([{"box_2d": [0, 0, 5, 5], "point": [0, 0], "label": "red circle"}]))
    else:
        assert right(first, second.turns[0][2]) == (answer == second.turns[0][2])


@pytest.mark.slow
def test_the_card_holds_for_what_the_shipped_model_sees_and_hears() -> None:
    """Through this engine, from pixels and samples, on a sample of what the card was measured on."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \| \d+ \| [\w. ]+ \|$", (TINY / "README.md").read_text("utf-8"), re.M)
    claimed = {skill: float(score) / 100 for skill, score in rows}
    assert set(claimed) == set(skills_media.SKILLS)
    skills = [s for s in skills_media.SKILLS if find_library("espeak-ng") or not s.startswith("speech")]
    for result in evaluate(gemma4_answer(TINY), skills=skills, count=15):
        score = claimed[result.skill]
        spread = 3 * np.sqrt(max(score * (1 - score), 0.02) / result.count)
        assert result.score >= score - spread, f"{result.skill}: {result.score:.2f} of 15, the card says {score:.2f}"


def test_overlap_of_boxes() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (0, 5, 10, 15)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


# --- towers -------------------------------------------------------------------------------------------------------


def test_the_first_heads_look_at_their_neighbours() -> None:
    model = towers.build(TINY, 0)
    towers.first_weights(model)
    tower = model.model.vision_tower
    side, seen = 15, []
    tower.config._attn_implementation = "eager"
    for layer in tower.encoder.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    place = torch.arange(side * side)
    positions = torch.stack([place % side, place // side], dim=-1)[None]
    with torch.no_grad():
        tower(0.5 + 0.1 * torch.rand(1, side * side, 768), positions)
    inner = (positions[0] >= 3).all(1) & (positions[0] < side - 3).all(1)
    for weights, offsets in zip(seen, towers.OFFSETS, strict=True):
        for head, offset in enumerate(offsets):
            if offset is None:
                continue
            queries = place[inner]
            mean = {
                (x, y): float(weights[0, head, queries, queries + x + side * y].mean())
                for x in range(-3, 4)
                for y in range(-3, 4)
            }
            assert max(mean, key=mean.__getitem__) == offset
            assert mean[offset] > 8 / side**2, "eight times what a head that looks everywhere gives"


@speaks
def test_calibrated_clipping_holds_what_training_data_has_and_clips_what_is_far_outside() -> None:
    clipped, free = towers.build(TINY, 0, clipped=True).eval(), towers.build(TINY, 0).eval()
    calibrate(clipped, steps=1, seed=5)
    shown = pool.source("shapes", 5, 0, small=0.1)
    linear = clipped.model.vision_tower.encoder.layers[0].mlp.gate_proj
    assert 0 < float(linear.input_max) < 100
    assert -100 < float(linear.output_min) < 0
    assert float(linear.input_max) == float(linear.input_max.to(torch.bfloat16))
    with torch.no_grad():
        assert np.array_equal(pool.encode(clipped, *shown).soft[0], pool.encode(free, *shown).soft[0])
        huge = torch.full((1, 96), 1e4)
        assert torch.equal(linear(huge), linear(linear.input_max.expand(1, 96)))


def test_the_towers_leave_the_text_model_alone(model, tokenizer: Tokenizer) -> None:
    from transformers import Gemma4ForConditionalGeneration

    ids = torch.tensor([tokenizer.encode("Once upon a time").ids])
    plain = Gemma4ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert sum(p.numel() for p in model.parameters()) * 2 < 9.5e6, "tiny-e is to stay within 10 MB in bf16"
