# SPDX-License-Identifier: Apache-2.0
"""Direct logit attribution: the share of each head, MLP, expert and per-layer embedding in a logit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.html import Picture, bars, heat
from gemma4.html.markup import visible
from gemma4.html.picture import FEW, left_out
from gemma4.inputs import TextOrIds, as_tokenized
from gemma4.interp.hooks import active_hooks, hooks_of
from gemma4.interp.lens import first_shown, texts_of
from gemma4.narrow import is_list_or_tuple
from gemma4.step import select_positions

if TYPE_CHECKING:
    from gemma4.interp.cache import ActivationCache
    from gemma4.model import Model
    from gemma4.step import Positions

F32: TypeAlias = NDArray[np.float32]
Target: TypeAlias = int | str | tuple[int | str, int | str] | None
_STEMS = {"hook_embed", "hook_mlp_out", "hook_ple_out", "ln_final.hook_scale"}
_OF_HEADS = {"attn.hook_result", "ln1_post.hook_scale"}
_OF_EXPERTS = {
    "mlp.hook_out_normed", "moe.hook_expert_ids", "moe.hook_expert_out", "moe.hook_out", "ln2_post.hook_scale",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class LogitAttribution:
    """Shares of components in a logit before the softcap.

    values     float32 [n, pos]: what the component adds to the logit; their sum over n is the logit
    labels     n names: "embed", "3_head_2", "3_mlp_out", "3_ple_out"; with experts "3_mlp_dense", "3_expert_17"; last,
               of a run inside open blocks, "edits"
    logits     float32 [pos]: the logit, or the difference of two, read off the final residual stream
    positions  int64 [pos], in the sequence
    tokens     int32 [pos] or, for a difference, [2, pos]: whose logit it is
    prompt     pos texts of the tokens at the positions
    names      pos texts of `tokens`, as they are shown: "·Mary", for a difference "·Mary less ·John"
    """

    values: F32
    labels: list[str]
    logits: F32
    positions: NDArray[np.int64]
    tokens: NDArray[np.int32]
    prompt: list[str] = field(default_factory=list[str])
    names: list[str] = field(default_factory=list[str])

    def top(self, k: int = 10, pos: int = -1) -> list[tuple[str, float]]:
        """The k largest shares in absolute value at one of `positions` (an index into them), largest first."""
        column = self.values[:, pos]
        order = np.argsort(-np.abs(column), kind="stable")[:k]
        return [(self.labels[i], float(column[i])) for i in order]

    def __repr__(self) -> str:
        size = f"LogitAttribution: {len(self.labels)} components, {len(self.positions)} positions"
        if not len(self.positions):
            return size
        shares = ", ".join(f"{label} {share:+.4g}" for label, share in self.top(4))
        return f"{size}; logit {self.logits[-1]:.4g} at position {self.positions[-1]}: {shares}, …"

    @property
    def title(self) -> str:
        """The explained logit, in words."""
        different = sorted(set(self.names))
        return f"Logit of {different[0] if len(different) == 1 else 'the predicted tokens'}, by component"

    def to_html(self, last: int | None = None) -> Picture:
        """Bars of one position; a table of components by positions if there are several.

        last: only that number of positions at the end, all if there are fewer. Raises ValueError (last below 1).
        """
        n = len(self.positions)
        first = first_shown(last, n)
        few = left_out(n - first, n, "positions")
        prompt = self.prompt or [str(position) for position in self.positions]
        if n - first == 1:
            total = f"At {visible(prompt[-1])}: they sum to {self.logits[-1]:.4g}."
            said = " ".join(part for part in (total, few) if part)
            return bars(self.labels, self.values[:, -1], title=self.title, small_print=said)
        rows = ["sum", *reversed(self.labels)]
        values = np.concatenate([self.logits[None], self.values[::-1]])[:, first:]
        return heat(values, rows, prompt[first:], title=self.title, corner="component", small_print=few)

    def _repr_html_(self) -> str:
        return self.to_html(min(FEW, len(self.positions)) or None).fragment()


def dla(
    model: Model,
    prompt: TextOrIds,
    of: Target = None,
    *,
    pos: Positions = "last",
    per_head: bool = True,
    per_expert: bool = True,
) -> LogitAttribution:
    """Direct logit attribution: what each component writes towards a token's logit.

        dla(model, "When Mary and John went to the store, John gave a book to", of=" Mary").top()

    prompt  text or ids of one prompt
    of      a token, as id or text that is one token; a pair of them: the difference of their logits; None: the token
            that the model finds likeliest at each position
    pos     positions to explain, an int, a slice or a list; "all" or None; ["last"]. The result has them
            ascending, each once
    per_head, per_expert   attention by head, MLPs by expert; False = as a whole: "3_attn_out", "3_mlp_out"

    Exact on these models: a component's output is multiplied by the layer scalars that follow and divided by the scale
    of the final norm, which are taken as they were in this run, as are those of the norms after attention, MLP and
    experts. So the shares sum to the logit before the softcap, up to float32's rounding in the forward pass.
    Inside open edits, hooks and attached dictionaries the last share, "edits", is what they changed in the residual
    stream between the components, or in a component's output after it was read (steering, `attach(error=False)`, an
    ablation of hook_attn_out).
    Raises ValueError (no such token or position), and what `Model.run_with_cache` raises.
    """
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    stems = _STEMS | (_OF_HEADS if per_head else {"hook_attn_out"}) | (_OF_EXPERTS if per_expert else set[str]())
    names = [name for name, site in model.sites.items() if site.stem in stems or name == last]
    tokenized = as_tokenized(model, prompt)
    where = np.unique(select_positions("all" if pos is None else pos, len(tokenized)))
    logits, cache = model.run_with_cache(tokenized, names, pos=where, logits=where if of is None else None)
    tokens = _tokens(model, of, logits, len(cache.positions))
    direction = _direction(model, cache, tokens)
    shares, labels = list[F32](), list[str]()
    for label, written in cache.components(per_head=per_head, per_expert=per_expert):
        shares.append(np.einsum("pd,pd->p", written, direction, dtype=np.float64).astype(np.float32))
        labels.append(label)
    total = np.einsum("pd,pd->p", cache[last], direction, dtype=np.float64).astype(np.float32)
    if hooks_of(active_hooks(model)):
        shares.append(total - np.sum(shares, axis=0, dtype=np.float64).astype(np.float32))
        labels.append("edits")
    texts, of_each = texts_of(model, cache.tokens), [texts_of(model, row) for row in np.atleast_2d(tokens)]
    explained = [" less ".join(map(visible, pair)) for pair in zip(*of_each, strict=True)]
    return LogitAttribution(np.stack(shares), labels, total, cache.positions, tokens, texts, explained)


def _tokens(model: Model, of: Target, logits: F32 | None, n: int) -> NDArray[np.int32]:
    if of is None:
        assert logits is not None
        return logits.argmax(-1).astype(np.int32)
    if not is_list_or_tuple(of):
        return np.full(n, _token(model, of), np.int32)
    if len(of) != 2:
        raise TypeError(f"of is a token or a pair of tokens, got {of!r:.80}")
    return np.array([[_token(model, token)] * n for token in of], np.int32).reshape(2, n)


def _token(model: Model, token: object) -> int:
    if isinstance(token, str):
        return model.to_single_token(token)
    return checks.integer("of", token, 0, model.d_vocab - 1)


def _direction(model: Model, cache: ActivationCache, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """[pos, d_model]: its dot product with a part of the final residual stream is that part's share."""
    rows = model.unembed(tokens.ravel()).astype(np.float64).reshape(*tokens.shape, -1)
    towards = rows if tokens.ndim == 1 else rows[0] - rows[1]
    return towards * model.gain("norm") / cache["ln_final.hook_scale"]
