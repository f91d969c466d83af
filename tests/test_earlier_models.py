# SPDX-License-Identifier: Apache-2.0
"""Gemma 2, Gemma 3 and VaultGemma through the public face: what they lack, what is refused, chat.

That their values are those of the reference implementation is for tests/reference to show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import F, S, random_tensors, write_checkpoint

import gemma4
from gemma4 import FormatError, SiteError
from gemma4.interp.lens import final_norm, logit_lens
from gemma4.load.config import EARLIER
from gemma4.quantization.gguf_file import head

SHARED: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "eos_token_id": [1, 106],
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": SHARED | {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "layer_types": [S, F] * 3},
    # these norms' gains are about 2: scores stay small enough that rounding is not amplified from layer to layer
    "gemma3": SHARED | {"model_type": "gemma3_text", "rope_scaling": LINEAR, "query_pre_attn_scalar": 384},
    "vaultgemma": SHARED | {"model_type": "vaultgemma", "final_logit_softcapping": None},
}
LACKS = {
    "gemma2": ["blocks.0.attn.hook_q_normed", "blocks.5.attn.hook_k_normed"],
    "gemma3": ["hook_logits_raw"],
    "vaultgemma": ["blocks.0.ln1_post.hook_scale", "blocks.3.ln2_post.hook_normalized", "hook_logits_raw"],
}
NOBODY_HAS = ["attn.hook_v_normed", "hook_resid_unscaled", "hook_ple_in", "moe.hook_in"]
TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{
'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

EVERY = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("earlier")
    return {name: write_checkpoint(root / name, config) for name, config in CONFIGS.items()}


def test_every_family_is_here() -> None:
    assert {EARLIER[raw["model_type"]] for raw in CONFIGS.values()} == set(EARLIER.values())


@EVERY
def test_parts_that_a_model_lacks_are_no_sites(name: str, folders: dict[str, Path]) -> None:
    with gemma4.load(folders[name]) as model:
        for site in LACKS[name] + [f"blocks.2.{stem}" for stem in NOBODY_HAS]:
            with pytest.raises(SiteError, match=r"no site .*closest|no site .*lists"):
                model.run_with_cache([2, 5], site)
        _, cache = model.run_with_cache([2, 5, 9], "*")
        assert list(cache) == list(model.sites)
        assert {array.shape[0] for name, array in cache.items() if name.endswith("attn.hook_out")} == {3}


@EVERY
def test_the_residual_stream_comes_apart(name: str, folders: dict[str, Path]) -> None:
    """Scalars of 1, gains of 1 + w, branches with or without a norm after them."""
    with gemma4.load(folders[name]) as model:
        assert [model.layer_scalar(i) for i in range(6)] == [1.0] * 6
        assert np.array_equal(model.gain("norm"), model.weight("norm.weight") + np.float32(1))
        _, cache = model.run_with_cache(list(range(2, 40)), "*")
        last = cache["blocks.5.hook_resid_post"]
        for per_head in (False, True):
            parts = cache.decompose_resid(per_head=per_head)
            np.testing.assert_allclose(parts.values.sum(0), last, atol=2e-5 * np.abs(last).max())
        np.testing.assert_allclose(final_norm(model, last), cache["ln_final.hook_out"], atol=1e-5)
        raw = cache["hook_logits_raw"] if "hook_logits_raw" in model.sites else cache["hook_logits"]
        np.testing.assert_allclose(cache.logit_attrs(cache.decompose_resid(), 7).sum(0), raw[:, 7], atol=1e-4)
        lens = logit_lens(model, cache)
        assert np.array_equal(lens.ids[-1, :, 0], cache["hook_logits"].argmax(-1))


@EVERY
def test_fast_is_near_exact(name: str, folders: dict[str, Path]) -> None:
    ids = [2, *range(5, 100)]
    with gemma4.load(folders[name]) as exact, gemma4.load(folders[name], precision="fast") as fast:
        expected = exact.forward(ids)
        assert np.abs(fast.forward(ids) - expected).mean() < 0.005 * np.abs(expected).max()


@EVERY
def test_sequences_continue_fork_and_return(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ids = [2, *range(5, 60)]
    with gemma4.load(folders[name]) as model:
        expected = model.forward(ids)
        sequence = model.new_sequence()
        model.forward(ids[:40], sequence=sequence, logits=None)
        saved, fork = sequence.save(tmp_path / "s.npz"), sequence.fork()
        for rest in (sequence, fork, model.restore(saved)):
            assert np.array_equal(model.forward(ids[40:], sequence=rest), expected[40:])


def test_a_missing_norm_is_named_and_none_is_guessed(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A model is what its config says: tensors do not decide."""
    from safetensors.numpy import save_file

    tensors = random_tensors(CONFIGS["gemma3"])
    del tensors["model.layers.2.self_attn.q_norm.weight"]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gemma3"]))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"layers\.2\.self_attn\.q_norm\.weight"):
        gemma4.load(tmp_path)


def test_writing_gguf_and_other_architectures_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="vaultgemma: only Gemma 2, 3 and 4 can be written as GGUF"):
        gemma4.quantize(folders["vaultgemma"], tmp_path / "v.gguf", type="Q8_0")
    for name in ("gemma2", "gemma3"):  # their scores are scaled as by no release
        with pytest.raises(NotImplementedError, match=f"{name} cannot say this model's attention_scale"):
            gemma4.quantize(folders[name], tmp_path / f"{name}.gguf", type="Q8_0")
    assert list(tmp_path.iterdir()) == []
    for architecture in ("gemma", "gemma3n", "gemma-embedding"):
        path = tmp_path / f"{architecture}.gguf"
        path.write_bytes(head({"general.architecture": architecture}, []))
        with pytest.raises(NotImplementedError, match=architecture):
            gemma4.load(path)


def test_pictures_of_gemma_3_are_refused(tmp_path: Path) -> None:
    """The text model of a multimodal checkpoint runs; its encoder is another than Gemma 4's."""
    text = {key: value for key, value in CONFIGS["gemma3"].items() if key != "eos_token_id"}
    config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "eos_token_id": [1, 106],
    }
    write_checkpoint(tmp_path, CONFIGS["gemma3"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 106]}))
    with gemma4.load(tmp_path) as model:
        assert model.config.eos_token_ids == (1, 106)
        assert model.forward([2, 5]).shape == (2, 320)
        assert all(layer["ahead"] for layer in model.engine_config["layers"])
        with pytest.raises(NotImplementedError, match="before Gemma 4 the text model alone"):
            model.encode_image(np.zeros((8, 8, 3), np.uint8))


def test_chat_with_the_turns_of_gemma_3(tmp_path: Path) -> None:
    tiny = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
    config = CONFIGS["gemma3"] | {"vocab_size": 2603}
    write_checkpoint(tmp_path, config)
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with gemma4.load(tmp_path) as model:
        messages = [{"role": "user", "content": "Hello"}]
        found = model.generate(messages, max_tokens=5, temperature=0.0)
        prompt = "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
        alone = model.generate(model.to_tokens(prompt, bos=False), max_tokens=5, temperature=0.0)
        assert list(found.tokens) == list(alone.tokens) and found.prompt_tokens == alone.prompt_tokens
