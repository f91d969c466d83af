# SPDX-License-Identifier: Apache-2.0
"""Dictionaries: sparse autoencoders and transcoders, which read activations as sums of a few features.

    sae = gemma4.SAE.load("path")              # Gemma Scope 1 and 2, SAELens, sparsify
    sae = gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post")                  # one that comes with the package
    features = sae.encode(cache)               # sparse: features[pos].ids, .values
    sae.decode(features), sae.error(cache), sae.metrics(cache)

    with model.attach(sae) as record: ...      # its reconstruction in the forward pass, with the error term
    with model.edit([ClampFeature(sae, 1721, 8.0)]): ...

Crosscoders and cross-layer transcoders do the same in several layers at once.

Files are mapped and untrusted. Formats, and traps of each: docs/guide.md.
"""

from gemma4.dictionaries.cross import Crosscoder, CrossLayerTranscoder, LayeredDictionary
from gemma4.dictionaries.edits import AblateFeature, ClampFeature, FeatureEdit, ScaleFeature
from gemma4.dictionaries.examples import Example, Examples, FeatureSource, Histogram, Ranked
from gemma4.dictionaries.features import Features, Fired
from gemma4.dictionaries.inside import Pass, Record
from gemma4.dictionaries.layered_splice import LayeredRecord
from gemma4.dictionaries.sae import SAE, Dictionary, Metrics, Transcoder
from gemma4.dictionaries.shipped import shipped_dictionaries

__all__ = [
    "SAE",
    "AblateFeature",
    "ClampFeature",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Dictionary",
    "Example",
    "Examples",
    "FeatureEdit",
    "FeatureSource",
    "Features",
    "Fired",
    "Histogram",
    "LayeredDictionary",
    "LayeredRecord",
    "Metrics",
    "Pass",
    "Ranked",
    "Record",
    "ScaleFeature",
    "Transcoder",
    "shipped_dictionaries",
]
