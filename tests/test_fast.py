# SPDX-License-Identifier: Apache-2.0
"""precision="fast" against "exact" on the same quantised file: what rounding x to 8 bits costs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import write_calm_checkpoint
from tokenizers import Tokenizer

import gemma4
from gemma4.model import Precision
from gemma4.quantization import compare

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from train_tiny.evaluate import held_out  # noqa: E402
from train_tiny.mixture import tokenize  # noqa: E402

# Mean KL divergence in nats. tiny-e measures 4e-5. tiny-moe measures 4e-4 to 6e-4, and 1.6e-3 in Q5_1, where at one
# position of 7040 the rounding sends a token to another expert and costs 6 nats.
LIMITS = {"tiny-e": 2e-4, "tiny-moe": 2.5e-3}
SKILLS = ("story", "facts", "chat", "thinking", "tools", "translation")


def text_ids(name: str) -> np.ndarray:
    """Held-out examples of several skills, one after the other."""
    tokenizer = Tokenizer.from_file(str(Path(gemma4.__file__).parent / "pretrained" / name / "tokenizer.json"))
    documents = [tokenize(example, tokenizer) for skill in SKILLS for example in held_out(skill, tokenizer, 16)]
    return np.concatenate([document.ids for document in documents]).astype(np.int32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "Q4_K_M"])
@pytest.mark.parametrize("name", sorted(LIMITS))
def test_divergence_from_exact(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gemma4.quantize(name, path, type=kind)
    with gemma4.load(path, precision="exact") as exact, gemma4.load(path) as fast:
        assert fast.engine.precision == "fast"
        result = compare(exact, fast, text_ids(name))
    assert result.kl_mean <= LIMITS[name]
    assert result.top1_agreement >= 0.99


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"])
def test_full_width_k_quants(kind: str, tmp_path: Path) -> None:
    """No shipped model has rows of 256, so a random one; every matrix of it is quantised. Measured: 1.8e-4."""
    source = write_calm_checkpoint(tmp_path / "hf", Path(gemma4.__file__).parent / "pretrained" / "tiny-e")
    result = gemma4.quantize(source, tmp_path / "model.gguf", type=kind)
    assert {t.dtype for t in result.tensors} == {kind, "F32", "BF16"}
    ids = text_ids("tiny-e")[:512]
    with gemma4.load(result.path, precision="exact") as exact, gemma4.load(result.path) as fast:
        found = compare(exact, fast, ids)
    print(f"{kind}: {found}")
    assert found.kl_mean <= 4e-4 and found.top1_agreement >= 0.97


def test_decoding_agrees_with_the_prompt(tmp_path: Path) -> None:
    """A few rows and a tile multiply the same rounded x; what differs is one rounding of float32, now and then carried
    over the edge between two whole numbers."""
    path = tmp_path / "model.gguf"
    gemma4.quantize("tiny-e", path, type="Q4_0")
    with gemma4.load(path) as model:
        ids = model.to_tokens("When Mary and John went to the store, John gave a book to")
        whole = model.forward(ids)
        sequence = model.new_sequence()
        steps = np.concatenate([model.forward(ids[i : i + 1], sequence=sequence) for i in range(len(ids))])
    assert np.abs(whole - steps).max() <= 2e-2 * np.abs(whole).max()
    assert (whole.argmax(-1) == steps.argmax(-1)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "BF16"])
@pytest.mark.parametrize("name", sorted(LIMITS))
def test_looking_changes_nothing(name: str, kind: str, tmp_path: Path) -> None:
    """Scores and patterns are the ones that were used, to the bit, in prompts long enough for every way to multiply."""
    path = tmp_path / "model.gguf"
    gemma4.quantize(name, path, type=kind)
    with gemma4.load(path, precision="fast") as model:
        ids = text_ids(name)[:260]
        seen, unseen = model.new_sequence(), model.new_sequence()
        for part in (ids[:90], ids[90:93], ids[93:]):  # the second is too short for tiles, and the ring has turned
            logits, cache = model.run_with_cache(part, names="*", sequence=seen)
            expected = model.forward(part, sequence=unseen)
            assert np.array_equal(logits.view(np.int32), expected.view(np.int32))
            pattern = cache["blocks.0.attn.hook_pattern"]
            assert np.abs(pattern.sum(-1) - 1).max() < 1e-5


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("name", sorted(LIMITS))
def test_looking_at_pruned_rows_changes_nothing(name: str, kind: str, tmp_path: Path) -> None:
    """Above the last layer with keys only rows with logits are computed, unless captures and hooks keep more. The
    number of rows chooses the method: the rows with logits keep theirs."""
    path = tmp_path / "model.gguf"
    gemma4.quantize(name, path, type=kind)
    ids = text_ids(name)[:150]
    upper = f"blocks.{gemma4.load(name).n_layers - 1}"
    with gemma4.load(path, precision="fast") as model:
        for positions in ("last", [3, 90], list(range(40, 110))):
            expected = model.forward(ids, logits=positions)
            for names, pos in (("*", None), ("*hook_resid_post", [0, 149]), ("hook_logits", None)):
                logits, _ = model.run_with_cache(ids, names, pos=pos, logits=positions)
                assert np.array_equal(logits.view(np.int32), expected.view(np.int32)), (positions, names)
            for site in (f"{upper}.hook_mlp_out", f"{upper}.attn.hook_z", "blocks.0.hook_resid_pre"):
                logits = model.run_with_hooks(ids, [(site, lambda x, site: None)], logits=positions)
                assert np.array_equal(logits.view(np.int32), expected.view(np.int32)), (positions, site)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "BF16", "F32"])
@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_a_row_s_logits_do_not_depend_on_the_blocks_of_rows(kind: str, precision: Precision, tmp_path: Path) -> None:
    """The head takes 32 rows at a time, and what is left. (With fewer than 48, the pruned layers choose another method
    for plain weights in `fast`.)"""
    path = tmp_path / "model.gguf"
    gemma4.quantize("tiny-e", path, type=kind)
    with gemma4.load(path, precision=precision) as model:
        ids = text_ids("tiny-e")[:200]
        expected = model.forward(ids)
        least = 48 if precision == "fast" and kind in ("BF16", "F32") else 32
        for n in (n for n in (32, 33, 37, 38, 39, 63, 64, 65, 101) if n >= least):
            first = (200 - n) // 2
            logits = model.forward(ids, logits=list(range(first, first + n)))
            assert np.array_equal(logits.view(np.int32), expected[first : first + n].view(np.int32)), n


@pytest.mark.parametrize("kind", ["Q4_0", "BF16"])
def test_a_hook_that_keeps_a_long_prompt_whole_changes_nothing(kind: str, tmp_path: Path) -> None:
    """515 tokens are two chunks, with a hook one: in both, every row is computed by the method of many rows. Where that
    is OpenBLAS, the bits of a row depend on how many rows there are; its rounding is all that may differ."""
    blas = gemma4.cpu_info()["isa"] in ("scalar", "avx512", "avx512_vnni", "neon", "neon_dotprod", "neon_i8mm")
    path = tmp_path / "model.gguf"
    gemma4.quantize("tiny-e", path, type=kind)
    with gemma4.load(path, precision="fast") as model:
        ids = text_ids("tiny-e")[:515]
        for positions in ("all", "last"):
            expected = model.forward(ids, logits=positions)
            hook = ("blocks.1.hook_resid_pre", lambda x, site: None)
            logits = model.run_with_hooks(ids, [hook], logits=positions)
            if blas:
                assert np.abs(logits - expected).max() <= 2e-2 * np.abs(expected).max()
            else:
                assert np.array_equal(logits.view(np.int32), expected.view(np.int32))
