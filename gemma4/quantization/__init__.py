# SPDX-License-Identifier: Apache-2.0
"""Writing GGUF files: `gemma4.quantize`, and measuring the loss of quality."""

from gemma4.quantization.convert import quantize
from gemma4.quantization.divergence import Comparison, compare, sample_ids
from gemma4.quantization.plan import KINDS
from gemma4.quantization.result import QuantizationResult, TypeSummary, WrittenTensor

__all__ = [
    "KINDS",
    "Comparison",
    "QuantizationResult",
    "TypeSummary",
    "WrittenTensor",
    "compare",
    "quantize",
    "sample_ids",
]
