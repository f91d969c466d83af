# SPDX-License-Identifier: Apache-2.0
"""Pictures as HTML of our own: attention patterns, coloured tokens, tables of cells, bars, cards of features.

    from gemma4 import html
    html.attention(cache["attn.hook_pattern", 3], model.to_str_tokens(ids))        # shows itself in a notebook
    html.tokens(model.to_str_tokens(ids), {"loss": losses}).save("loss.html")      # opens without a network

They take arrays and texts, whatever made them. Every text is escaped: tokens and prompts may be hostile.
"""

from gemma4.html.card import Card, Example, cards
from gemma4.html.cells import heat
from gemma4.html.patterns import attention
from gemma4.html.picture import Picture, together
from gemma4.html.ranked import bars
from gemma4.html.shaded import tokens

__all__ = ["Card", "Example", "Picture", "attention", "bars", "cards", "heat", "together", "tokens"]
