# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 on CPUs: run it, and see everything that happens inside.

import gemma4
model = gemma4.load("tiny-e")
logits, cache = model.run_with_cache("Once upon a time", names="blocks.*.hook_resid_post")
for piece in model.stream("Once upon a time"): print(piece, end="")
gemma4.quantize("tiny-e", "tiny-e.gguf", type="Q8_0")
"""

import sys

from gemma4 import media
from gemma4._engine import cpu_info
from gemma4.encoders import hooks, soft_tokens
from gemma4.encoders.encoder import Encoder
from gemma4.errors import CapacityError, FormatError, Gemma4Error, SiteError, StateError
from gemma4.generation import loop, pieces, sampling, stream
from gemma4.generation.stream import Generation, TextStream
from gemma4.info import ModelInfo
from gemma4.interp.cache import ActivationCache
from gemma4.interp.hooks import HookPoint, NaNWarning
from gemma4.load import shipped_models
from gemma4.model import Model, load
from gemma4.quantization import quantize
from gemma4.sequence import Sequence
from gemma4.text import chat, tokenizer, turn

# Modules by the names they had before: imports of these go on working.
_BEFORE = {"chat": chat, "tokenizer": tokenizer, "turn": turn, "sampling": sampling}
_BEFORE |= {"generate": stream, "decode": loop, "textflow": pieces}
globals().update(_BEFORE)
media.cache, media.taps = soft_tokens, hooks  # type: ignore[attr-defined]
sys.modules |= {f"gemma4.{name}": module for name, module in _BEFORE.items()}
sys.modules |= {"gemma4.media.cache": soft_tokens, "gemma4.media.taps": hooks}

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "CapacityError",
    "Encoder",
    "FormatError",
    "Gemma4Error",
    "Generation",
    "HookPoint",
    "Model",
    "ModelInfo",
    "NaNWarning",
    "Sequence",
    "SiteError",
    "StateError",
    "TextStream",
    "cpu_info",
    "load",
    "quantize",
    "shipped_models",
]
