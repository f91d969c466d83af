# SPDX-License-Identifier: Apache-2.0
"""Dictionaries: sparse autoencoders and transcoders, which read activations as sums of a few features.

    sae = gemma4.SAE.load("path")              # Gemma Scope 1 and 2, SAELens, sparsify
    features = sae.encode(cache)               # sparse: features[pos].ids, .values
    sae.decode(features), sae.error(cache), sae.metrics(cache)

Files are mapped and untrusted. Formats, and traps of each: docs/guide.md.
"""

from gemma4.dictionaries.features import Features, Fired
from gemma4.dictionaries.sae import SAE, Dictionary, Metrics, Transcoder

__all__ = ["SAE", "Dictionary", "Features", "Fired", "Metrics", "Transcoder"]
