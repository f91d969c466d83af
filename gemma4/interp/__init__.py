# SPDX-License-Identifier: Apache-2.0
"""Looking inside: activation sites, caches, hooks, lenses, experiments, plots."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4.interp.attribution import LogitAttribution, dla
    from gemma4.interp.dictionary_loss import DictionaryEvaluation, evaluate_dictionary
    from gemma4.interp.experiments import Grid, head_ablations, head_patching, induction_scores, patching_grid
    from gemma4.interp.lens import LogitLens, logit_lens
    from gemma4.interp.paths import PathEffects, path_patching

__all__ = [
    "DictionaryEvaluation",
    "Grid",
    "LogitAttribution",
    "LogitLens",
    "PathEffects",
    "dla",
    "evaluate_dictionary",
    "head_ablations",
    "head_patching",
    "induction_scores",
    "logit_lens",
    "patching_grid",
    "path_patching",
]


def __getattr__(name: str) -> object:
    """Import at first use: the modules of hooks and sites are part of the model, on which these build."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gemma4.interp import attribution, dictionary_loss, experiments, lens, paths

    return next(
        getattr(module, name)
        for module in (lens, experiments, attribution, paths, dictionary_loss)
        if hasattr(module, name)
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
