# SPDX-License-Identifier: Apache-2.0
"""Edits as data inside the encoders: each does what a Python function does there, to the bit."""

import re

import numpy as np
import pytest
from small_models import MULTIMODAL, write_multimodal_checkpoint

import gemma4
from gemma4.edits import Ablate, Add, Clamp, FromPrompt, Patch, ProjectOut, Scale, Set, load_edits, save_edits

KINDS = [
    ("effective", "vision"),
    ("effective", "audio"),
    ("large", "vision"),
    ("unified", "vision"),
    ("unified", "audio"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("multimodal")
    return {kind: gemma4.load(write_multimodal_checkpoint(root / kind, kind), threads=1) for kind in MULTIMODAL}


def media(encoder):
    """Two media of different sizes."""
    rng = np.random.default_rng(0)
    if encoder.modality == "audio":
        return [rng.standard_normal((n, encoder.config.d_in)).astype(np.float32) for n in (60, 92)]
    found = []
    for rows, columns in ((3, 6), (6, 6)):
        places = np.stack(np.meshgrid(range(columns), range(rows)), -1).reshape(-1, 2)
        found.append((rng.random((len(places), encoder.config.d_in), np.float32), places))
    return found


def differ(one, other):
    return any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("kind", "modality"), KINDS)
def test_edits_equal_functions_at_every_site(models, kind, modality):
    model = models[kind]
    encoder = getattr(model, modality)
    given = media(encoder)
    plain, (cache, _) = encoder.run_with_cache(given, "*")
    rng, inert = np.random.default_rng(1), []
    for number, (name, site) in enumerate(encoder.sites.items()):
        axis = site.dims.index(site.rows)
        rows, last = [1, 0], cache[name].shape[-1]
        v = rng.standard_normal(last).astype(np.float32)
        at = (*[slice(None)] * axis, rows)
        if "S" in site.dims:  # sizes differ by medium
            v = v[:1]
        edit, new = [
            (Add(name, v, 0.5, pos=rows), lambda x, v=v: x + np.float32(0.5) * v),
            (Scale(name, -2, pos=rows), lambda x: x * np.float32(-2)),
            (Clamp(name, -0.1, 0.2, pos=rows), lambda x: np.clip(x, np.float32(-0.1), np.float32(0.2))),
            (Set(name, v, pos=rows), lambda x, v=v: np.broadcast_to(v, x.shape)),
            (Ablate(name, pos=rows), np.zeros_like),
        ][number % 5]

        def fn(array, point, at=at, new=new):
            seen = np.isfinite(array[at])  # edits leave what attention does not see
            array[at] = np.where(seen, new(array[at]), array[at])

        if "hook_pattern" in name or "hook_attn_scores" in name:
            edit, fn = Scale(name, 0.5, pos=rows), lambda x, point, at=at: x.__setitem__(at, x[at] * np.float32(0.5))
        with model.edit(edit):
            by_data, by_data_cache = encoder.run_with_cache(given, "*")
        with model.hooks([(name, fn)]):
            by_function, by_function_cache = encoder.run_with_cache(given, "*")
        assert not differ(by_data, by_function), name
        for one, other in zip(by_data_cache, by_function_cache, strict=True):
            assert not differ(one.values(), other.values()), name
        if not differ(by_data, plain):
            inert.append(name)
    assert not inert


def test_heads_channels_and_several_rows(models):
    model = models["effective"]
    encoder = model.vision
    given, z, resid = media(encoder)[1:], "vision.blocks.0.attn.hook_z", "vision.blocks.1.hook_resid_pre"
    _, (cache,) = encoder.run_with_cache(given)
    v = np.random.default_rng(0).standard_normal((2, cache[resid].shape[1])).astype(np.float32)

    def heads(array, site):
        array[:, 1] *= np.float32(0.3)

    def rows(array, site):
        array[[-1, 3]] = v

    for edit, hook in (
        (Scale("vision.blocks.*.attn.hook_z", 0.3, head=1), ("vision.blocks.*.attn.hook_z", heads)),
        (Set(resid, v, pos=[-1, 3]), (resid, rows)),
        (Patch(z, cache[z] * 2, pos=range(36)), (z, lambda array, site: cache[z] * np.float32(2))),
        (Ablate(z, mean=cache[z].mean(0)), (z, lambda array, site: np.broadcast_to(cache[z].mean(0), array.shape))),
        (ProjectOut(resid, np.eye(1, v.shape[1])[0]), (resid, lambda array, site: array.__setitem__((..., 0), 0))),
    ):
        with model.edit(edit):
            by_data = encoder.encode(given)
        with model.hooks([hook]):
            assert not differ(by_data, encoder.encode(given)), edit
        assert differ(by_data, encoder.encode(given)), edit


@pytest.fixture(scope="module")
def tiny():
    return gemma4.load("tiny-e")


def question(seed):
    pytest.importorskip("PIL.Image")
    from media_files import picture

    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(48, 48, seed)}, {"type": "text", "text": "What?"}],
        }
    ]


def test_in_prompts(tiny, tmp_path):
    """Beside edits of the text model, limited to a prompt of the batch, saved; the encoder's cache stays unedited."""
    site, resid = "vision.blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"
    prompts = [tiny.to_prompt(question(seed)) for seed in (0, 1)]
    plain = tiny.forward(prompts)
    both = [Scale([site, resid], 0.5), Set("vision.hook_projected", 0.25, pos=[0, -1], prompts=1)]
    (edits := load_edits(save_edits(both, tmp_path / "e.safetensors")))

    def halve(array, point):
        array *= np.float32(0.5)

    def put(array, point):
        if point.sequence == 1:
            array[[0, -1]] = 0.25

    with tiny.hooks([([site, resid], halve), ("vision.hook_projected", put)]):
        expected = tiny.forward(prompts)
    with tiny.edit(edits):
        logits, caches = tiny.run_with_cache(prompts, ["vision.hook_projected", resid])
    assert not differ(logits, expected) and all(map(differ, [[x] for x in logits], [[x] for x in plain]))
    assert (caches[1].media[0]["vision.hook_projected"][[0, -1]] == 0.25).all()
    assert not (caches[0].media[0]["vision.hook_projected"][0] == 0.25).any()
    assert not differ(tiny.forward(prompts), plain)
    by_data, by_function = (
        tiny.generate(question(1), max_tokens=4, temperature=0, hooks=hooks).tokens
        for hooks in ([Scale(site, 0.5)], [(site, halve)])
    )
    assert by_data.tolist() == by_function.tolist()


def test_a_predicate_is_of_the_text_model(tiny):
    """As before encoders had edits: a value that fits the text model needs to fit no encoder."""
    seen = []
    edit = Add(lambda name: bool(seen.append(name)) or name.endswith("hook_resid_post"), np.ones(tiny.config.d_model))
    with tiny.edit(edit):
        tiny.forward(tiny.to_prompt(question(0)))
    assert seen and not any(name.startswith(("vision.", "audio.")) for name in seen)


@pytest.mark.parametrize(
    ("edit", "error", "complaint"),
    [
        (lambda: Scale("vision.blocks.99.hook_mlp_out", 2), gemma4.SiteError, "layers"),
        (lambda: Scale("vision.hook_nothing", 2), gemma4.SiteError, "hook_nothing"),
        (lambda: Add("vision.blocks.0.hook_mlp_out", np.ones(3)), ValueError, "do not fit vision.blocks.0"),
        (lambda: Scale("vision.blocks.0.hook_mlp_out", 2, pos=9999), ValueError, "position 9999 cannot be edited"),
        (lambda: Scale("vision.blocks.0.hook_mlp_out", 2, steps=1), ValueError, "step 0 alone"),
        (lambda: [Set("vision.hook_soft", 0), Ablate("vision.hook_soft")], ValueError, "both set"),
        (lambda: Patch("vision.hook_soft", FromPrompt(0)), ValueError, "encoders run before the step"),
    ],
)
def test_edits_that_cannot_act(tiny, edit, error, complaint):
    prompt = tiny.to_prompt(question(0))
    with pytest.raises(error, match=re.escape(complaint)), tiny.edit(edit()):
        tiny.forward(prompt)


def test_edits_of_an_encoder_need_a_medium(tiny):
    """A call without one could not be edited; one of its prompts is enough, and so is a site of the text model."""
    site, text, picture = "vision.blocks.0.hook_mlp_out", "Once upon a time", tiny.to_prompt(question(0))
    edit = Scale(site, 0.5)
    for call in (
        lambda given: tiny.run_with_hooks(given, [edit]),
        lambda given: tiny.generate(given, max_tokens=2, hooks=[edit]),
        lambda given: list(tiny.stream(given, max_tokens=2, hooks=[edit])),
    ):
        with pytest.raises(ValueError, match="acts inside the encoder of vision alone"):
            call(text)
        call(picture)
    for edit, given in (
        (Scale(site, 0.5), [text, picture]),
        (Scale([site, "blocks.0.hook_mlp_out"], 0.5), [text]),
        (Scale("vision.hook_soft", 0.5, prompts=1), [text, picture]),
        (Scale([site, "audio.*.hook_in"], 0.5), [picture]),
    ):
        with tiny.edit(edit):
            tiny.forward(given)
    for edit in (Scale(site, 0.5, prompts=0), Scale("audio.*.hook_in", 0.5)):
        with pytest.raises(ValueError, match="no prompt of this call"), tiny.edit(edit):
            tiny.forward([text, picture])
    with tiny.hooks([(site, lambda array, point: None)]):  # functions can
        tiny.forward(text)


def test_edits_that_keep_a_part(tiny):
    """At another site of the encoder, and of another head."""
    picture = tiny.to_prompt(question(0))
    for edits in (
        [Ablate("vision.blocks.*.hook_mlp_out"), Set("vision.blocks.0.hook_mlp_out", 1)],
        [Ablate("vision.blocks.0.attn.hook_z"), Set("vision.blocks.0.attn.hook_z", 1, head=0)],
    ):
        with tiny.edit(edits):
            tiny.forward(picture)


def test_caches_of_media_are_no_caches_of_prompts(tiny):
    _, cache = tiny.run_with_cache(tiny.to_prompt(question(0)), "vision.hook_soft")
    with pytest.raises(TypeError, match="give the array of one site"):
        Patch("vision.hook_soft", cache.media[0])
    with (
        pytest.raises(ValueError, match=r"give the array, cache\.media\[0\]"),
        tiny.edit(Patch("vision.hook_soft", cache)),
    ):
        pass


def test_a_model_without_the_encoder_says_so(models):
    with pytest.raises(NotImplementedError, match="no audio encoder"), models["large"].edit(Scale("audio.*", 2)):
        pass
