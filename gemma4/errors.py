# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package. The engine raises these too (csrc/python/errors.c maps each status to one of them)."""


class Gemma4Error(Exception):
    """Base of every exception that is ours."""


class FormatError(Gemma4Error, ValueError):
    """A file or checkpoint is not what it says it is: truncated, wrong shape or dtype, missing tensor."""


class StateError(Gemma4Error, RuntimeError):
    """An object is not in a state to do this: closed, in use by another thread, already forgotten positions."""


class CapacityError(Gemma4Error, ValueError):
    """More positions than the sequence's capacity (at most the model's context)."""


class SiteError(Gemma4Error, KeyError):
    """No such activation site in this model. The message lists the closest names."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
