# SPDX-License-Identifier: Apache-2.0
"""Chats with images, sound and video: the ids of transformers' processor, soft tokens in the step, caches."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from media_files import Encoders, encoded, picture, tone
from small_models import E_LIKE, MULTIMODAL

import gemma4
from gemma4.errors import FormatError
from gemma4.load.config import parse_config
from gemma4.load.encoder_config import parse_encoders
from gemma4.media.medium import Modalities, read_audio, read_image, read_media
from gemma4.media.prompt import expander, locate
from gemma4.text.chat import ChatTemplate, encode_chat
from gemma4.text.tokenizer import Tokenizer

Image = pytest.importorskip("PIL.Image")
DATA = Path(__file__).parent / "data"
TEMPLATE = ChatTemplate((DATA / "chat_template.jinja").read_text())
EVERYTHING = Modalities(image=True, audio=True)


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image(height: int = 60, width: int = 90, seed: int = 0, **options) -> dict:
    return {"type": "image", "image": picture(height, width, seed), **options}


def sound(seconds: float = 0.5, seed: int = 0) -> dict:
    return {"type": "audio", "audio": tone(seconds, seed=seed)}


def film(n: int = 3, fps: float = 0.5) -> dict:
    return {"type": "video", "video": [picture(60, 90, seed) for seed in range(n)], "fps": fps}


CHATS = {
    "image": [user("What is this?", image())],
    "image first": [user(image(), "What is this?")],
    "two sizes": [user(image(500, 20), "and", image(40, 900, image_tokens=70), "differ how?")],
    "audio": [user("Transcribe.", sound(2.04))],
    "video": [user(film(4), "What moves?")],
    "everything": [
        {"role": "system", "content": "Be brief."},
        user("A", image(), "B", sound(), film(), "C", image(30, 30, 1), sound(0.02)),
        {"role": "assistant", "content": "Yes."},
        user("And now?", film(2, 24.0), image(seed=5)),
    ],
}


# -- against transformers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(lzma.decompress((DATA / "tokenizer.json.xz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return Tokenizer.load(tokenizer_file.parent)


@pytest.fixture(scope="module")
def processor():
    """transformers' processor without what needs torchvision (its fast image and video processors)."""
    module = pytest.importorskip("transformers.models.gemma4.processing_gemma4")

    class Processor(module.Gemma4Processor):
        def __init__(self):
            self.boi_token, self.image_token, self.eoi_token = "<|image>", "<|image|>", "<image|>"
            self.boa_token, self.audio_token, self.eoa_token = "<|audio>", "<|audio|>", "<audio|>"
            self.video_token = "<|video|>"

    return Processor()


def their_replacements(processor, media) -> dict[str, list[str]]:
    from transformers.models.gemma4 import feature_extraction_gemma4, image_processing_pil_gemma4
    from transformers.video_utils import VideoMetadata

    def patches(pixels, tokens):
        made = image_processing_pil_gemma4.Gemma4ImageProcessorPil(max_soft_tokens=tokens)
        return made(Image.fromarray(pixels), return_tensors="np")["num_soft_tokens_per_image"]

    found: dict[str, list[str]] = {"image": [], "video": [], "audio": []}
    for m in media:
        if m.kind == "image":
            inputs = {"num_soft_tokens_per_image": patches(m.content, m.image_tokens)}
            found["image"].append(processor.replace_image_token(inputs, 0))
        elif m.kind == "audio":
            inputs = feature_extraction_gemma4.Gemma4AudioFeatureExtractor()([m.content])
            found["audio"].append(processor.replace_audio_token(inputs, 0))
        else:
            frames = m.content
            metadata = VideoMetadata(len(frames.frames), frames.fps, frames_indices=frames.indices.tolist())
            inputs = {"num_soft_tokens_per_video": patches(frames.frames[0], 70), "video_metadata": [metadata]}
            found["video"].append(processor.replace_video_token(inputs, 0))
    return found


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_transformers(tokenizer, tokenizer_file, processor, name):
    transformers = pytest.importorskip("transformers")
    messages = CHATS[name]
    media = read_media(messages, modalities=EVERYTHING)
    ids = encode_chat(tokenizer, TEMPLATE, messages, expand=expander(media))
    theirs = their_replacements(processor, media)
    text = [TEMPLATE.render(messages)]
    text, _ = processor.get_text_with_replacements(text, theirs["image"], theirs["video"], theirs["audio"])
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    assert ids.tolist() == reference(text[0])["input_ids"]
    runs = locate(ids, media, tokenizer).runs
    soft = {"image": 258880, "audio": 258881, "video": 258884}
    of_runs = np.concatenate([np.arange(run.start, run.stop) for run in runs])
    assert np.array_equal(of_runs, np.flatnonzero(np.isin(ids, list(soft.values()))))
    assert all((ids[run.start : run.stop] == soft[run.medium.kind]).all() for run in runs)
    places = [m for kind in ("image", "audio", "video") for m in media if m.kind == kind for _ in range(m.n_runs)]
    assert len(runs) == len(places) and {id(run.medium) for run in runs} == {id(m) for m in media}
    for medium in media:
        firsts = [run.first for run in runs if run.medium is medium]
        assert firsts == [i * medium.run_length for i in range(medium.n_runs)]


def test_text_may_speak_of_the_placeholders(tokenizer):
    """What a user types is never taken for a place of an image."""
    messages = [user("What does <|image|> mean, and <|audio|>?", image())]
    media = read_media(messages, modalities=EVERYTHING)
    ids = encode_chat(tokenizer, TEMPLATE, messages, expand=expander(media))
    prompt = locate(ids, media, tokenizer)
    assert [run.stop - run.start for run in prompt.runs] == [media[0].run_length]
    assert (ids == 258880).sum() == media[0].run_length and (ids == 258881).sum() == 0
    assert "What does <|image|> mean, and <|audio|>?" in tokenizer.decode(ids)


def test_a_template_that_knows_no_media(tokenizer):
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.role }}{% endfor %}")
    media = read_media([user(image())], modalities=EVERYTHING)
    with pytest.raises(ValueError, match=r'0 places .* for 1 parts of type "image"'):
        encode_chat(tokenizer, template, [user(image())], expand=expander(media))


def test_unified_counts_raw_frames():
    media = read_media([user(sound(2.0))], modalities=Modalities(True, True, raw_audio=True))
    assert media[0].run_length == 50
    assert read_audio(tone(40.0), raw=True).run_length == 1000  # no spectrogram, no limit of 30 s


def test_modalities_of_configurations():
    def of(raw):
        return Modalities.of(parse_encoders(raw, parse_config(raw)))

    effective, unified = (MULTIMODAL[kind] for kind in ("effective", "unified"))
    assert of(effective) == Modalities(True, True, False)
    assert of(effective | {"audio_config": None}) == Modalities(True, False, False)
    assert of(unified) == Modalities(True, True, True)
    assert of(E_LIKE) == Modalities.of({}) == Modalities()


# -- in a model, with encoders that draw numbers from the content ------------------------------------------------------


@pytest.fixture
def model():
    with gemma4.load("tiny-e") as model:
        yield model


@pytest.fixture
def encoders(model, monkeypatch) -> Encoders:
    return Encoders(model, monkeypatch)


def by_hand(model, prompt, encoders) -> np.ndarray:
    """Logits of a prompt through the engine alone: every row an embedding or a token of our own placing."""
    ids = prompt.ids.copy()
    rows = np.full((len(ids), model.engine_config["d_model"]), np.nan, np.float32)
    for run in prompt.runs:
        medium = run.medium
        options = (medium.image_tokens,) if medium.image_tokens else ()
        made = getattr(encoders, medium.kind)(medium.content, *options)
        rows[run.start : run.stop] = made[run.first : run.first + run.stop - run.start]
        ids[run.start : run.stop] = -1
    logits = np.empty((len(ids), model.d_vocab), np.float32)
    model.engine.step([(model.engine.new_sequence(), ids, rows, np.arange(len(ids), dtype=np.int32), logits)])
    return logits


@pytest.mark.parametrize("name", CHATS)
def test_soft_tokens_reach_the_model(model, encoders, name):
    messages = [
        {**m, "content": [{**p, "image_tokens": 70} if p["type"] == "image" else p for p in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in CHATS[name]
    ]
    prompt = model.to_prompt(messages)
    assert encoders.calls == []  # nothing is encoded before it is needed
    logits, cache = model.run_with_cache(prompt, names="hook_embed")
    assert np.array_equal(logits, by_hand(model, prompt, encoders))
    assert np.array_equal(model.forward(prompt, logits="last"), logits[-1:])
    embed = cache["hook_embed"]
    for run in prompt.runs:
        rows = model.encoded_media.get(model, run.medium)
        assert np.array_equal(embed[run.start : run.stop], rows[run.first : run.first + run.stop - run.start])
    found = model.generate(messages, max_tokens=1, temperature=0, logprobs=1)
    assert found.prompt_tokens == len(prompt)
    assert found.tokens[0] == logits[-1].argmax()
    assert model.generate(prompt, max_tokens=1, temperature=0).tokens[0] == found.tokens[0]


def test_a_follow_up_question_encodes_nothing(model, encoders):
    first = [user(image(image_tokens=70), sound(), "What is this?")]
    with model.new_sequence() as sequence:
        answer = model.generate(first, max_tokens=4, temperature=0, sequence=sequence)
        assert sorted(encoders.calls) == ["audio", "image"]
        before = sequence.length
        second = [*first, {"role": "assistant", "content": answer.text}, user("And?", image(image_tokens=70))]
        found = model.generate(second, max_tokens=4, temperature=0, sequence=sequence)
        assert sorted(encoders.calls) == ["audio", "image"]  # the second image is the first one again
        assert found.timings.prefill_tokens < len(model.to_prompt(second)) - before + 20
    fresh = model.generate(second, max_tokens=4, temperature=0)
    assert fresh.tokens.tolist() == found.tokens.tolist()
    model.generate([user(image(image_tokens=70, seed=9), "?")], max_tokens=1)
    assert sorted(encoders.calls) == ["audio", "image", "image"]


def test_another_image_of_the_same_size_is_another_prompt(model, encoders):
    """The ids are equal: only the content tells the two apart."""
    asked = [[user(image(seed=seed, image_tokens=70), "What is this?")] for seed in (1, 2)]
    prompts = [model.to_prompt(messages) for messages in asked]
    assert np.array_equal(prompts[0].ids, prompts[1].ids) and not np.array_equal(prompts[0].keys(), prompts[1].keys())
    with model.new_sequence() as sequence:
        model.generate(asked[0], max_tokens=1, sequence=sequence)
        found = model.generate(asked[1], max_tokens=3, temperature=0, sequence=sequence)
        assert found.timings.prefill_tokens == len(prompts[1]) - prompts[1].runs[0].start
        again = model.generate(asked[1], max_tokens=3, temperature=0, sequence=sequence)
        assert again.timings.prefill_tokens == 1
    fresh = model.generate(asked[1], max_tokens=3, temperature=0)
    assert found.tokens.tolist() == again.tokens.tolist() == fresh.tokens.tolist()


@pytest.mark.parametrize("budgets", [(70, 140), (140, 70)])
def test_one_picture_at_two_budgets(model, budgets):
    """In one chat, through the model's own encoder: each place has the soft tokens of its budget."""
    pixels = picture(60, 90)
    parts = [{"type": "image", "image": pixels, "image_tokens": budget} for budget in budgets]
    prompt = model.to_prompt([user(*parts, "Which is sharper?")])
    alone = [model.encode_image(pixels, budget) for budget in budgets]
    assert [run.stop - run.start for run in prompt.runs] == [len(rows) for rows in alone]
    _, cache = model.run_with_cache(prompt, "hook_embed")
    for run, rows in zip(prompt.runs, alone, strict=True):
        assert np.array_equal(cache["hook_embed"][run.start : run.stop], rows)
    with model.new_sequence() as sequence:
        one, two = (model.to_prompt([user(part, "What?")]) for part in parts)
        model.forward(one, sequence=sequence, logits=None)
        assert sequence.rewind_to(two.keys()) == two.runs[0].start


def test_a_cache_that_ends_inside_an_image_starts_it_again(model, encoders):
    prompt = model.to_prompt([user("Look:", image(image_tokens=70), "?")])
    run = prompt.runs[0]
    with model.new_sequence() as sequence:
        model.forward(prompt, sequence=sequence, logits=None)
        sequence.truncate(run.start + 5)
        assert sequence.rewind_to(prompt.keys()) == run.start
        assert sequence.tokens.tolist() == prompt.ids[: run.start].tolist()


def test_saved_and_forked_sequences_know_their_images(model, encoders, tmp_path):
    messages = [user(image(image_tokens=70), "What is this?")]
    other = [user(image(seed=3, image_tokens=70), "What is this?")]
    prompt = model.to_prompt(messages)
    with model.new_sequence() as sequence:
        model.forward(prompt, sequence=sequence, logits=None)
        restored = model.restore(sequence.save(tmp_path / "chat.npz"))
        for copy in (restored, sequence.fork()):
            assert copy.fork().rewind_to(prompt.keys()) == len(prompt) - 1
            assert copy.rewind_to(model.to_prompt(other).keys()) == prompt.runs[0].start


def test_batches_and_plain_prompts_together(model, encoders):
    asked = [[user(image(image_tokens=70), "What?")], "Once upon a time", [user(sound(), "What?")]]
    together = model.generate(asked, max_tokens=3, temperature=0)
    alone = [model.generate(one, max_tokens=3, temperature=0) for one in asked]
    assert [g.tokens.tolist() for g in together] == [g.tokens.tolist() for g in alone]
    prompts = [model.to_prompt(asked[0]), model.to_tokens("Once"), model.to_prompt(asked[2])]
    for logits, prompt in zip(model.forward(prompts), prompts, strict=True):
        assert np.array_equal(logits, model.forward(prompt))


def test_the_cache_forgets_the_oldest(model, encoders):
    media = [read_image(picture(30, 30, seed), 70) for seed in range(3)]
    size = media[0].run_length * model.engine_config["d_model"] * 4
    kept = model.encoded_media
    kept.max_bytes = 2 * size
    for medium in (media[0], media[1], media[0], media[2], media[0]):
        kept.get(model, medium)
    assert encoders.calls == ["image"] * 3 and kept.nbytes == 2 * size
    kept.get(model, media[1])
    assert len(encoders.calls) == 4
    with pytest.raises(ValueError, match="read-only"):
        kept.get(model, media[1])[0, 0] = 1


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(None, 280), ({}, 280), ({"image_processor": {"max_soft_tokens": 140}}, 140), ({"image_processor": 7}, 280)]
    + [({"image_processor": {"max_soft_tokens": value}}, 280) for value in (71, "70", None, [70], -1)],
)
def test_the_budget_that_the_checkpoint_names(random_dir, tmp_path, stored, expected):
    for file in random_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    if stored is not None:
        (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    with gemma4.load(tmp_path) as found:
        assert found.image_tokens == expected


def test_pictures_take_the_models_own_budget(model, encoders):
    assert model.image_tokens == 70  # what it was trained with
    for given, expected in ((None, 70), (280, 280)):
        [run] = model.to_prompt([user(image())], image_tokens=given).runs
        assert run.medium.image_tokens == expected
    [run] = model.to_prompt([user(image(image_tokens=140))]).runs
    assert run.medium.image_tokens == 140


def test_runs_know_their_places(model, encoders):
    prompt = model.to_prompt([user(image(90, 60, image_tokens=70), sound(1.0), film(3))])
    picture_run, sound_run, *frames = prompt.runs
    boxes = picture_run.boxes()
    assert boxes.shape == (picture_run.stop - picture_run.start, 4) and boxes[-1].tolist()[2:] == [1, 1]
    spans = sound_run.seconds()
    assert spans[0].tolist() == pytest.approx([0, 0.04]) and spans[-1, 1] == pytest.approx(1.0, abs=0.041)
    assert [run.seconds()[0].tolist() for run in frames] == [[0, 0], [2, 2], [4, 4]]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_models_without_encoders_say_so(monkeypatch):
    model = gemma4.load("tiny-moe")
    with pytest.raises(NotImplementedError, match=r"cat\.png: this model has no vision encoder, it takes text"):
        model.generate([user({"type": "image", "image": "cat.png"})])
    Encoders(model, monkeypatch)
    model.checkpoint.hf_config.pop("audio_config")
    with pytest.raises(NotImplementedError, match="no audio encoder, it takes text, images, video"):
        model.generate([user(sound())])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, r'message 0, part 0: a part of type "image" needs "image"'),
        ({"type": "image", "url": "a.png"}, "it has type, url"),
        ({"type": "image", "image": picture(9, 9), "size": 3}, "no option 'size' for image; there are image_tokens"),
        ({"type": "video", "video": [picture(9, 9)], "rate": 3}, "fps, image_tokens, num_frames"),
        ({"type": "image", "image": picture(9, 9), "image_tokens": 71}, "got 71"),
        ({"type": "audio", "audio": np.zeros(16_000 * 31, np.float32)}, r"the audio: 31\.0 s .* transcribe"),
        ({"type": "audio", "audio": np.zeros(100, np.float32)}, "the audio: 100 samples .* too few"),
    ],
)
def test_bad_parts_are_refused(model, encoders, part, words):
    with pytest.raises(ValueError, match=words):
        model.generate([user(part)])


def test_bad_files_are_refused_by_name(model, encoders, tmp_path):
    path = tmp_path / "torn.jpg"
    path.write_bytes(encoded(Image.fromarray(picture(90, 90)), "JPEG")[:900])
    with pytest.raises(FormatError, match=r"torn\.jpg"):
        model.stream([user({"type": "image", "image": str(path)}, "What is this?")])
    pytest.importorskip("soundfile")
    with pytest.raises(FormatError, match=r"the audio \(99 bytes\): not audio"):
        model.generate([user({"type": "audio", "audio": b"x" * 99})])
    with pytest.raises(FileNotFoundError, match=r"No such sound file: .*nowhere\.mp3"):
        model.generate([user({"type": "audio", "audio": tmp_path / "nowhere.mp3"})])


def test_an_encoder_that_gives_another_number_of_rows(model, monkeypatch):
    rows = np.zeros((3, model.engine_config["d_model"]), np.float32)
    model.checkpoint.hf_config = {**model.checkpoint.hf_config, "vision_config": {}}
    encoder = SimpleNamespace(config=SimpleNamespace(kind="vision_tower"), run=lambda *_, **__: ([rows], []))
    monkeypatch.setattr("gemma4.encoders.soft_tokens.encoder_of", lambda *_: encoder)
    with pytest.raises(RuntimeError, match="encoder gave"):
        model.generate([user(image())], max_tokens=1)
