# SPDX-License-Identifier: Apache-2.0
"""Sites inside the encoders from the calls that take a prompt: hooks change the answer, captures hold what was there,
and nothing edited stays in a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from media_files import picture, tone

import gemma4
from gemma4 import HookPoint, SiteError
from gemma4.encoders.soft_tokens import inputs_of
from gemma4.media.medium import read_audio, read_image, read_video
from gemma4.media.prompt import SoftRun, TokenizedPrompt

from . import towers
from .compare import same_bits
from .test_media_models import PLACEHOLDER, TOWERS

pytest.importorskip("PIL.Image")
RESID = "vision.blocks.1.hook_resid_post"
SOUND = "audio.blocks.0.hook_resid_mid"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> gemma4.Model:
    tower = TOWERS["e2b"]
    directory = towers.save(tower, towers.build(tower), tmp_path_factory.mktemp("e2b"))
    return gemma4.load(directory, precision="exact", threads=2)


@pytest.fixture(autouse=True)
def nothing_kept(model: gemma4.Model) -> None:
    model.encoded_media.clear()


IMAGE = read_image(picture(60, 90), 70)
OTHER = read_image(picture(90, 60, seed=1), 70)
SPOKEN = read_audio(tone(0.4))
FILM = read_video([picture(40, 60, seed) for seed in range(3)], image_tokens=70)


def prompt_of(*parts: Any) -> TokenizedPrompt:
    """Numbers are tokens; a medium's runs lie between two tokens each."""
    ids: list[int] = [2]
    runs: list[SoftRun] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        for i in range(part.n_runs):
            start, n = len(ids) + 1, part.run_length
            runs.append(SoftRun(part, start, start + n, i * n))
            ids += [248, *[PLACEHOLDER[part.kind]] * n, 249]
    return TokenizedPrompt(np.array(ids, np.int32), tuple(runs))


def double(array: np.ndarray, site: HookPoint) -> np.ndarray:
    return 2 * array


def edited_by_hand(model: gemma4.Model, prompt: TokenizedPrompt, hooks: list) -> np.ndarray:
    """Soft tokens from the encoder's own call, put in place of the plain ones by a hook on the text model."""
    rows = np.zeros((len(prompt), model.engine_config["d_model"]), np.float32)
    with model.hooks(hooks):
        for run in prompt.runs:
            frame = run.first // run.medium.run_length
            encoder = model.audio if run.medium.kind == "audio" else model.vision
            patches, positions = inputs_of(encoder, run.medium)[frame]
            given = patches if positions is None else (patches, positions)
            rows[run.start : run.stop] = encoder.encode([given])[0]

    def put(array: np.ndarray, site: HookPoint) -> None:
        for run in prompt.runs:
            array[run.start : run.stop] = rows[run.start : run.stop]

    return model.run_with_hooks(prompt, [("hook_embed", put)])


@pytest.mark.parametrize("hook", [(RESID, double), (SOUND, double), (lambda name: name in (RESID, SOUND), double)])
def test_hooks_of_every_call_reach_the_encoders(model: gemma4.Model, hook: Any) -> None:
    prompt = prompt_of(5, IMAGE, 7, SPOKEN, FILM, 9)
    plain = model.forward(prompt)
    expected = edited_by_hand(model, prompt, [hook])
    assert np.abs(expected - plain).max() > 1e-3 * np.abs(plain).max()
    for _ in range(2):
        assert same_bits(model.run_with_hooks(prompt, [hook]), expected)
        with model.hooks([hook]):
            assert same_bits(model.forward(prompt), expected)
            assert same_bits(model.run_with_cache(prompt, "hook_embed")[0], expected)
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "logprobs": 1, "stop_ids": []}
    edited, untouched = model.generate(prompt, hooks=[hook], **options), model.generate(prompt, **options)
    assert edited.tokens[0] == expected[-1].argmax() and untouched.tokens[0] == plain[-1].argmax()
    assert edited.logprobs[0].logprob != untouched.logprobs[0].logprob
    assert same_bits(model.forward(prompt), plain)  # what the encoders' cache holds is the unedited


def test_a_predicate_does_not_keep_what_it_edited(model: gemma4.Model) -> None:
    """The first time that this picture is seen is under a hook that no name tells to be one of the encoder's."""
    prompt = prompt_of(IMAGE, 3)
    edited = model.run_with_hooks(prompt, [(lambda name: name == RESID, double)])
    assert model.encoded_media.nbytes == 0
    plain = model.forward(prompt)
    assert not same_bits(plain, edited) and model.encoded_media.nbytes > 0
    assert same_bits(model.run_with_hooks(prompt, [(lambda name: name == RESID, double)]), edited)


def test_a_cached_sequence_does_not_hide_an_edit_nor_keep_it(model: gemma4.Model) -> None:
    prompt = prompt_of(5, 6, IMAGE, 7, 8)
    options: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": 1}

    def logprob(**more: Any) -> float:
        return model.generate(prompt, **options, **more).logprobs[0].logprob

    plain, edited = logprob(), logprob(hooks=[(RESID, double)])
    assert plain != edited
    with model.new_sequence() as sequence:
        assert logprob(sequence=sequence) == plain
        found = model.generate(prompt, sequence=sequence, hooks=[(RESID, double)], **options)
        assert found.logprobs[0].logprob == edited
        assert found.timings.prefill_tokens == len(prompt) - prompt.runs[0].start  # what is before it is reused
        found = model.generate(prompt, sequence=sequence, **options)
        assert found.logprobs[0].logprob == plain
        assert found.timings.prefill_tokens == len(prompt) - prompt.runs[0].start
        assert logprob(sequence=sequence, hooks=[(SOUND, double)]) == plain  # there is no sound in it
        assert model.generate(prompt, sequence=sequence, **options).timings.prefill_tokens == 1
    with model.new_sequence() as sequence, model.hooks([(RESID, double)]):
        model.forward(prompt, sequence=sequence, logits=None)
        assert sequence.fork().rewind_to(prompt.keys()) == prompt.runs[0].start


def test_hooks_know_which_picture_it_is(model: gemma4.Model) -> None:
    seen: list[tuple[int, int, int]] = []

    def note(array: np.ndarray, site: HookPoint) -> None:
        assert site.positions.tolist() == list(range(len(array)))
        seen.append((site.sequence, site.medium, len(array)))

    prompts = [prompt_of(4, IMAGE, FILM, OTHER), prompt_of(4), prompt_of(SPOKEN, OTHER, 3, IMAGE)]
    hooks = [("vision.hook_soft", note), ("audio.hook_soft", note)]
    model.run_with_hooks(prompts, hooks)
    sizes = [[IMAGE, FILM, FILM, FILM, OTHER], [], [SPOKEN, OTHER, IMAGE]]
    expected = [(i, j, medium.run_length) for i, media in enumerate(sizes) for j, medium in enumerate(media)]
    assert seen == expected  # a video's frames are encoded once, not once for each of its runs
    seen.clear()
    model.generate(prompts, hooks=hooks, max_tokens=2, stop_ids=[])
    assert seen == expected  # in the prompt's pass alone
    seen.clear()
    twice = prompt_of(IMAGE, IMAGE)
    model.run_with_hooks(twice, hooks)
    assert [medium for _, medium, _ in seen] == [0, 1]


def test_an_edit_of_one_picture_of_two(model: gemma4.Model) -> None:
    def second(array: np.ndarray, site: HookPoint) -> None:
        if site.medium == 1:
            array[:] = 0

    prompt = prompt_of(IMAGE, 5, IMAGE, 7)
    first, last = prompt.runs
    with model.hooks([("vision.hook_projected", second)]):
        _, cache = model.run_with_cache(prompt, ["hook_embed", "vision.hook_projected"])
    assert not cache["hook_embed"][last.start : last.stop].any()
    assert same_bits(cache["hook_embed"][first.start : first.stop], model.encode_image(IMAGE.content, 70))
    assert cache.media[0]["vision.hook_projected"].any() and not cache.media[1]["vision.hook_projected"].any()


# -- captures ----------------------------------------------------------------------------------------------------------


def test_captures_of_text_model_and_encoders_together(model: gemma4.Model) -> None:
    prompt = prompt_of(5, IMAGE, 7, SPOKEN, FILM, 9)
    names = ["blocks.0.hook_resid_post", "vision.blocks.*.attn.hook_pattern", RESID, SOUND]
    logits, cache = model.run_with_cache(prompt, names)
    assert same_bits(logits, model.forward(prompt)) and list(cache) == ["blocks.0.hook_resid_post"]
    assert [medium.run for medium in cache.media] == list(prompt.runs)
    for medium in cache.media:
        kind, frame = medium.run.medium.kind, medium.run.first // medium.run.medium.run_length
        encoder = model.audio if kind == "audio" else model.vision
        patches, positions = inputs_of(encoder, medium.run.medium)[frame]
        given = patches if positions is None else (patches, positions)
        wanted = [SOUND] if kind == "audio" else names[1:3]
        _, [expected] = encoder.run_with_cache([given], wanted)
        assert list(medium) == list(expected) and all(same_bits(medium[name], expected[name]) for name in expected)
    assert cache.nbytes == sum(a.nbytes for c in (cache, *cache.media) for a in c.values())
    assert "media[1]: EncoderCache: 1 arrays of the audio at positions" in repr(cache)
    out = model.generate(prompt, max_tokens=3, stop_ids=[], capture=iter(names))
    assert out.cache is not None and len(out.cache.positions) == len(prompt) + 2
    assert all(same_bits(a[name], b[name]) for a, b in zip(cache.media, out.cache.media, strict=True) for name in a)


def test_which_names_are_of_what(model: gemma4.Model) -> None:
    prompt = prompt_of(5, IMAGE, 7)
    assert model.run_with_cache(prompt)[1].media == () == model.run_with_cache(prompt, "*")[1].media
    assert model.run_with_cache(prompt, "audio.hook_soft")[1].media == ()  # nothing to hear
    assert model.run_with_cache([2, 3], "vision.*")[1].media == ()
    _, cache = model.run_with_cache(prompt, lambda name: name.endswith("hook_resid_mid"))
    assert len(cache) == model.n_layers and len(cache.media[0]) == model.vision.config.n_layers
    _, cache = model.run_with_cache(prompt, "vision.*", logits=None)
    assert len(cache) == 0 and set(cache.media[0]) == set(model.vision.sites)
    with pytest.raises(SiteError, match=r"see cache\.media"):
        cache["vision.hook_soft"]
    with pytest.raises(SiteError, match=r"not captured of this image"):
        cache.media[0]["vision.hook_sof"]


def test_a_wrong_name_is_an_error_before_anything_runs(model: gemma4.Model) -> None:
    def never(array: np.ndarray, site: HookPoint) -> None:
        raise AssertionError(site.name)

    hooks = [("hook_embed", never), ("vision.blocks.1.hook_resid_pos", never)]
    for call in (
        lambda: model.run_with_hooks([2, 3], hooks),
        lambda: model.generate([2, 3], hooks=hooks),
        lambda: model.stream([2, 3], capture="vision.blocks.1.hook_resid_pos"),
        lambda: model.run_with_cache([2, 3], ["hook_embed", "vision.blocks.1.hook_resid_pos"]),
    ):
        with pytest.raises(SiteError, match=r"vision\.blocks\.1\.hook_resid_post"):
            call()


def test_a_stream_has_the_hooks_it_was_made_with(model: gemma4.Model) -> None:
    prompt = prompt_of(5, IMAGE, 7)
    options: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": 1}
    plain = model.generate(prompt, **options).logprobs[0]
    with model.hooks([(RESID, double)]):
        edited = model.generate(prompt, **options).logprobs[0]
        stream = model.stream(prompt, **options)
    model.encoded_media.clear()
    list(stream)
    assert stream.result.logprobs[0] == edited != plain
    stream = model.stream(prompt, **options)
    with model.hooks([(RESID, double)]):
        list(stream)
    assert stream.result.logprobs[0] == plain == model.generate(prompt, **options).logprobs[0]


def test_models_without_the_encoder_say_so(random_e: gemma4.Model) -> None:
    for call in (
        lambda: random_e.generate([2, 3], hooks=[(RESID, double)]),
        lambda: random_e.run_with_cache([2, 3], "vision.hook_soft"),
    ):
        with pytest.raises(NotImplementedError, match="no vision encoder"):
            call()
