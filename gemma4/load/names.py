# SPDX-License-Identifier: Apache-2.0
"""Names of a Hugging Face checkpoint's tensors: the text decoder, the image and audio encoders.

The engine defines the names inside these and the shapes (csrc/model/text/weights.c, csrc/model/encoders/).
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from gemma4 import _engine
from gemma4.errors import FormatError
from gemma4.load.config import TextConfig
from gemma4.load.encoder_config import EncoderConfig

Shape = tuple[int, ...]
PLE_TABLE = "embed_tokens_per_layer.weight"

# Prefix of the text decoder -> name of an untied head. In order: Gemma4ForConditionalGeneration, an older
# multimodal layout (Gemma 3's released files), Gemma4Model alone, Gemma4ForCausalLM, Gemma4TextModel alone.
_LAYOUTS = {
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "language_model.": "lm_head.weight",
    "model.": "lm_head.weight",
    "": "lm_head.weight",
}


def text_prefix(stored: Container[str]) -> tuple[str, str]:
    """(prefix of the text decoder's names, full name of an untied head). Raises FormatError if it is missing."""
    for prefix, head in _LAYOUTS.items():
        if prefix + "embed_tokens.weight" in stored:
            return prefix, head
    tried = ", ".join(prefix + "embed_tokens.weight" for prefix in _LAYOUTS)
    raise FormatError(
        f"the weights hold no Gemma 4 text decoder, nor one of an earlier Gemma: none of {tried} is there"
    )


# Folders of an encoder's tensors; names inside them are unique. transformers renames the unified model's
# at loading; files exist under both names.
_ENCODER_FOLDERS = {
    "vision": ("vision_tower.", "vision_embedder.", "embed_vision.multimodal_embedder.", "embed_vision."),
    "audio": ("audio_tower.", "embed_audio."),
}


def encoder_names(stored: Iterable[str], modality: str) -> dict[str, str]:
    """Engine name -> stored name of every tensor of the "vision" or "audio" encoder; {} if there is none."""
    folders = [prefix + folder for folder in _ENCODER_FOLDERS[modality] for prefix in ("model.", "")]
    out: dict[str, str] = {}
    for name in stored:
        folder = next((folder for folder in folders if name.startswith(folder)), None)
        if folder is not None:
            out[name.removeprefix(folder)] = name
    return out


def text_tensors(config: TextConfig) -> dict[str, Shape]:
    """Name without prefix -> shape, of every tensor the text decoder reads, from the engine's table."""
    return dict(_engine.text_tensors(config.engine()))


def encoder_tensors(config: EncoderConfig) -> dict[str, Shape]:
    """Name without folder -> shape, of every tensor an encoder reads; a bound, a single number, is (1,) here."""
    return dict(_engine.encoder_tensors(config.engine()))
