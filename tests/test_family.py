# SPDX-License-Identifier: Apache-2.0
"""Names of the family's members: by shape, by chat template, by the names that files carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_models import GEMMA2, GEMMA3, GUARD_TEMPLATE, TURNS, renamed_tokenizer, write_member
from gguf_files import convert
from small_models import F, S, write_checkpoint

import gemma4
from gemma4.family import _SIZES, Member, member_of

FUNCTION = "{{ messages }}{{ '<start_function_declaration>' }}"
TRANSLATE = "{{ messages[0].content[0].source_lang_code }}"


def member(path: Path, config: dict[str, Any], template: str | None = None, **more: str) -> str:
    write_checkpoint(path, config)
    (path / "config.json").write_text(json.dumps(config | more))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    with gemma4.load(path) as model:
        assert model.info().family == str(member_of(model))
        assert f"family          {member_of(model)}" in str(model.info()).splitlines()
        return str(member_of(model))


@pytest.mark.parametrize(
    ("layers", "width", "base", "name"),
    [
        (26, 2304, "gemma2", "Gemma 2 2B"),
        (46, 4608, "gemma2", "Gemma 2 27B"),
        (18, 640, "gemma3_text", "Gemma 3 270M"),
        (26, 1152, "gemma3_text", "Gemma 3 1B"),
        (34, 2560, "gemma3_text", "Gemma 3 4B"),
        (26, 1152, "gemma2", "Gemma 2"),  # a size of another base
        (26, 2305, "gemma2", "Gemma 2"),
    ],
)
def test_released_sizes(layers: int, width: int, base: str, name: str, tmp_path: Path) -> None:
    small = {"intermediate_size": 2, "vocab_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = GEMMA2 | small | {"head_dim": 2, "model_type": base, "num_hidden_layers": layers, "hidden_size": width}
    assert member(tmp_path, config) == name


def test_sizes_of_gemma_4_are_those_of_the_released_configs() -> None:
    from test_config import RELEASED

    shapes = {(raw["num_hidden_layers"], raw["hidden_size"]): name for name, raw in RELEASED.items()}
    assert {shape: name.removesuffix("-A4B") for shape, name in _SIZES["Gemma 4"].items()} == shapes


def test_gemma_4_and_vaultgemma(tiny: gemma4.Model, tmp_path: Path) -> None:
    assert tiny.info().family == "Gemma 4"
    assert member(tmp_path, GEMMA2 | {"model_type": "vaultgemma"}) == "VaultGemma"


@pytest.mark.parametrize(
    ("folder", "config", "template", "name"),
    [
        ("x", GEMMA2, GUARD_TEMPLATE, "ShieldGemma (architecture of Gemma 2)"),
        ("shieldgemma-2b", GEMMA2, None, "ShieldGemma (architecture of Gemma 2)"),
        ("x", GEMMA3, FUNCTION, "FunctionGemma (architecture of Gemma 3)"),
        ("x", GEMMA3, TRANSLATE, "TranslateGemma (architecture of Gemma 3)"),
        ("medgemma-shieldgemma", GEMMA2, None, "ShieldGemma (architecture of Gemma 2)"),  # no MedGemma is a Gemma 2
        ("shieldgemma-2-4b-it", GEMMA3, None, "Gemma 3"),  # another model than ShieldGemma 1: it judges pictures
        ("MedGemma-1.5-4b-it", GEMMA3, None, "MedGemma (architecture of Gemma 3)"),
        ("med_gemma", GEMMA3, FUNCTION, "FunctionGemma (architecture of Gemma 3)"),  # a template counts before a name
        ("Gemma-SEA-LION-v3-9B-IT", GEMMA2, None, "SEA-LION (architecture of Gemma 2)"),
        ("Gemma-SEA-LION-v4-27B-IT", GEMMA3, None, "SEA-LION (architecture of Gemma 3)"),
        ("sarvam-translate", GEMMA3, None, "Sarvam-Translate (architecture of Gemma 3)"),
        ("gemma-3-1b-it", GEMMA3, "{{ messages }}", "Gemma 3"),
        ("gemma-3-1b-it", GEMMA3, "{% if", "Gemma 3"),  # a template that cannot be read
    ],
)
def test_derived_models(folder: str, config: dict[str, Any], template: str | None, name: str, tmp_path: Path) -> None:
    assert member(tmp_path / folder, config, template) == name


def test_names_in_the_files(tmp_path: Path) -> None:
    """A stored name counts before that of a folder; the hub's cache has the name in a folder above."""
    found = member(tmp_path / "functiongemma", GEMMA3, _name_or_path="google/medgemma-27b-text-it")
    assert found == "MedGemma (architecture of Gemma 3)"
    cached = tmp_path / "models--google--translategemma-4b-it" / "snapshots" / "0123abcd"
    assert member(cached, GEMMA3) == "TranslateGemma (architecture of Gemma 3)"
    assert member(tmp_path / "translategemma" / "0123abcd", GEMMA3) == "Gemma 3"
    assert str(Member("Gemma 3", "27B", "MedGemma")) == "MedGemma 27B (architecture of Gemma 3)"


def test_gguf_files(tmp_path: Path) -> None:
    config = GEMMA3 | {"query_pre_attn_scalar": 16, "vocab_size": 320, "layer_types": [S] * 5 + [F, S]}
    source = write_checkpoint(tmp_path / "hf", config)
    for key, wanted in (("general.name", "FunctionGemma"), ("general.basename", "FunctionGemma"), (None, "MedGemma")):
        keys = {key: "Functiongemma 270m It"} if key else {}
        with gemma4.load(convert(source, tmp_path / "medgemma.gguf", keys=keys)) as model:
            assert model.info().family == f"{wanted} (architecture of Gemma 3)"


def test_a_damaged_name_is_none(tmp_path: Path) -> None:
    config = GEMMA3 | {"_name_or_path": ["medgemma"]}
    path = write_member(tmp_path / "x", config, renamed_tokenizer(TURNS))
    with gemma4.load(path) as model:
        assert model.info().family == "Gemma 3"
