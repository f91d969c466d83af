# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package. The engine raises these too (csrc/python/errors.c maps each status to one of them)."""


class Gemma4Error(Exception):
    """Base of every exception of this package."""


class FormatError(Gemma4Error, ValueError):
    """A damaged or mislabelled file or checkpoint: truncated, wrong shape or dtype, missing tensor."""


class StateError(Gemma4Error, RuntimeError):
    """An object's state does not allow this: closed, in use by another thread, positions already evicted."""


class CapacityError(Gemma4Error, ValueError):
    """More positions than the sequence's capacity (at most the model's context)."""


class SiteError(Gemma4Error, KeyError):
    """No such activation site in this model. The message lists the closest names."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
