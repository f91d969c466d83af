# SPDX-License-Identifier: Apache-2.0
"""Edits of activations as data: what to change, where and when. The engine applies them itself, without Python.

    with model.edit([Steer(direction, layer=6, scale=4), Ablate(head=(2, 3))]):
        model.generate("Once upon a time")

An edit stands wherever a hook can, and means the same as a hook that does the same arithmetic in float32: to the bit.
Of attention scores and patterns an edit changes the keys that a query sees: masked ones stay masked.
Edits and hooks of one site act in the order in which they were given, outer blocks first; captures see the result.

Every edit can be restricted by keyword:

    pos      positions of the sequence: an int, a slice, several ints, or None = all. Negative ones count from the end
             of the prompt, so -1 is its last token while tokens are generated, too.
    steps    steps of a generation: 0 is the prompt's, n that of the n-th generated token; None = all.
    prompts  prompts of a batch, by index; None = all.

An edit that could not act raises ValueError before anything is computed: a position that does not exist or lies in a
cached prefix, a prompt that the batch lacks, an edit all of whose numbers a later Set, Patch or Ablate sets, a site
inside an encoder if no prompt of the call has a medium for it. So do infinite values, which would become NaN.
"""

from gemma4.edits.arithmetic import Add, Clamp, ProjectOut, Scale, Set
from gemma4.edits.base import Edit
from gemma4.edits.files import load_control_vector, load_edits, save_edits
from gemma4.edits.recipes import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    FromPrompt,
    KnockOut,
    Patch,
    ScalePerLayerEmbedding,
    Steer,
)

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Edit",
    "ForbidExperts",
    "ForceExperts",
    "FromPrompt",
    "KnockOut",
    "Patch",
    "ProjectOut",
    "Scale",
    "ScalePerLayerEmbedding",
    "Set",
    "Steer",
    "load_control_vector",
    "load_edits",
    "save_edits",
]
