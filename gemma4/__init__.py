# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 on CPUs: run it, and read or edit every activation.

    import gemma4
    model = gemma4.load("tiny-e")
    logits, cache = model.run_with_cache("Once upon a time", names="blocks.*.hook_resid_post")
    for piece in model.stream("Once upon a time"): print(piece, end="")
    gemma4.quantize("tiny-e", "tiny-e.gguf", type="Q8_0")

Start with docs/install.md; docs/guide.md explains all of it, docs/sites.md lists every site.
"""

from typing import TYPE_CHECKING

from gemma4._engine import cpu_info
from gemma4._moved import moved
from gemma4.dictionaries import SAE, Crosscoder, CrossLayerTranscoder, Features, Transcoder
from gemma4.encoders.encoder import Encoder
from gemma4.errors import CapacityError, FormatError, Gemma4Error, SiteError, StateError
from gemma4.generation.stream import Generation, TextStream
from gemma4.guard import GuardScores
from gemma4.info import ModelInfo
from gemma4.interp.cache import ActivationCache
from gemma4.interp.hooks import HookPoint, NaNWarning
from gemma4.load import shipped_models
from gemma4.model import Model, load
from gemma4.quantization import quantize
from gemma4.sequence import Sequence

if not TYPE_CHECKING:  # modules that are imported at first use: parts of the package, and old names of modules
    _LATER = ("bench", "harvest")
    _BEFORE = ("chat", "decode", "generate", "sampling", "textflow", "tokenizer", "turn")
    __getattr__ = moved(__name__, {name: f"{__name__}.{name}:" for name in (*_LATER, *_BEFORE)})

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})


__version__ = "0.1.0"

__all__ = [
    "SAE",
    "ActivationCache",
    "CapacityError",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Encoder",
    "Features",
    "FormatError",
    "Gemma4Error",
    "Generation",
    "GuardScores",
    "HookPoint",
    "Model",
    "ModelInfo",
    "NaNWarning",
    "Sequence",
    "SiteError",
    "StateError",
    "TextStream",
    "Transcoder",
    "cpu_info",
    "load",
    "quantize",
    "shipped_models",
]
