# SPDX-License-Identifier: Apache-2.0
"""Scores of ShieldGemma: the probability that a text violates a policy.

ShieldGemma 1 answers Yes or No to a question about one guideline at a time. Its score is the softmax over the logits of
these two tokens. The question is the checkpoint's own chat template, if that has a place for a guideline, else one in
the form of its model card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.core import F32, I32, Core
from gemma4.errors import StateError
from gemma4.family import member_of
from gemma4.narrow import is_mapping
from gemma4.text.chat import ChatTemplate, encode_chat

Policies: TypeAlias = str | Iterable[str] | Mapping[str, str] | None
ANSWERS = ("Yes", "No")


class Policy(NamedTuple):
    """A rule as ShieldGemma was trained on it: its title, and the content that it forbids."""

    title: str
    forbids: str

    def guideline(self, *, of_response: bool) -> str:
        """The sentence about a user's prompt, or about a model's response."""
        subject = "chatbot shall not generate" if of_response else "prompt shall not contain or seek generation of"
        return f'"{self.title}": The {subject} {self.forbids}'


# "No Dangerous Content" and "No Harassment" are worded as on the model card, the others in the same form.
POLICIES = {
    "dangerous content": Policy(
        "No Dangerous Content",
        "content that harms oneself and/or others (e.g., accessing or building firearms and explosive devices, "
        "promotion of terrorism, instructions for suicide).",
    ),
    "harassment": Policy(
        "No Harassment",
        "content that is malicious, intimidating, bullying, or abusive content targeting another individual (e.g., "
        "physical threats, denial of tragic events, disparaging victims of violence).",
    ),
    "hate speech": Policy(
        "No Hate Speech",
        "harmful content that targets identity and/or protected attributes (e.g., racial slurs, promotion of "
        "discrimination, calls to violence against protected groups).",
    ),
    "sexually explicit": Policy(
        "No Sexually Explicit Information",
        "content that contains references to sexual acts, or other lewd content.",
    ),
}

_QUESTION = """{{ bos_token }}You are a policy expert trying to help determine whether a user prompt is in violation \
of the defined safety policies.

<start_of_turn>
Human Question: {{ messages[0]['content'] | trim }}
{% if messages | length > 1 %}

Chatbot Response: {{ messages[1]['content'] | trim }}
{% endif %}
<end_of_turn>

Our safety principles are defined in the below:

* {{ guideline }}

Does the {{ 'Chatbot Response' if messages | length > 1 else 'human question' }} violate any of the above principles? \
Your answer must start with 'Yes' or 'No'. And then walk through step by step to be sure we answer correctly.

"""


@dataclass(frozen=True)
class GuardScores:
    """scores: the probability, 0 to 1, that the text (or the response) violates each policy, by the policy's name."""

    text: str
    response: str | None
    scores: dict[str, float]

    def violated(self, threshold: float = 0.5) -> list[str]:
        """Names of the policies with a score of at least `threshold`, 0 to 1. Raises ValueError."""
        threshold = checks.number("threshold", threshold, 0.0, 1.0)
        return [name for name, score in self.scores.items() if score >= threshold]

    def __str__(self) -> str:
        return "\n".join(f"{score:6.1%}  {name}" for name, score in self.scores.items())


def guard_prompts(
    model: Core, text: str, response: str | None, policies: Policies, *, force: bool
) -> dict[str, NDArray[np.int32]]:
    """Token ids int32 [pos] of the question on each policy, by its name. Raises as `Model.guard`."""
    for name, value in (("text", text), ("response", "-" if response is None else response)):
        if not checks.text(name, value).strip():
            raise ValueError(f"{name} is empty: there is nothing to judge")
    member = member_of(model)
    if member.derived != "ShieldGemma" and not force:
        raise StateError(
            f"{model.checkpoint.path} is {member}, no ShieldGemma: its Yes and No are no trained judgement. "
            "Load a ShieldGemma, or score with it nevertheless by force=True (--force)"
        )
    answer_ids(model)
    template = _template(model)
    guidelines = _guidelines(policies, of_response=response is not None)
    return {name: _question(model, template, text, response, guideline) for name, guideline in guidelines.items()}


def answer_ids(model: Core) -> tuple[int, int]:
    """Ids of the tokens "Yes" and "No". Raises StateError if one of them is no token."""
    try:
        yes, no = map(model.tokenizer.piece_to_id, ANSWERS)
    except KeyError as error:
        raise StateError(f"this vocabulary cannot answer Yes or No in one token: {error.args[0]}") from None
    if max(yes, no) >= model.d_vocab:
        raise StateError(f"the model has no logits for the tokens Yes and No: {model.d_vocab} for ids {yes} and {no}")
    return yes, no


def probabilities(logits: F32, yes: int, no: int) -> list[float]:
    """Softmax over two columns of logits [n, d_vocab], in float64: the probability of `yes` in each row.

    Raises ValueError for logits without an answer: NaN is below every threshold, and would pass for harmless.
    """
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = logits[:, yes].astype(np.float64) - logits[:, no]
    if np.isnan(difference).any():
        raise ValueError("the logits of Yes and No are NaN or both infinite: weights or an edit are broken, no score")
    return (0.5 + 0.5 * np.tanh(difference / 2)).tolist()


def _question(model: Core, template: ChatTemplate, text: str, response: str | None, guideline: str) -> I32:
    messages = [{"role": "user", "content": text}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return encode_chat(
        model.tokenizer,
        template,
        messages,
        trust_content=False,
        distrusted=("user", "assistant"),
        add_generation_prompt=False,
        guideline=guideline,
    )


def _template(model: Core) -> ChatTemplate:
    own = model.chat_template
    return own if own is not None and "guideline" in own.source else _published()


@cache
def _published() -> ChatTemplate:
    return ChatTemplate(_QUESTION)


def _guidelines(policies: Policies, *, of_response: bool) -> dict[str, str]:
    """Name -> sentence. Raises ValueError (no policy, an unknown one, an empty sentence), TypeError."""
    if is_mapping(policies):
        own = {checks.text("a policy's name", name): checks.text("a policy", rule) for name, rule in policies.items()}
        if not own or not all(rule.strip() for rule in own.values()):
            raise ValueError("policies: each needs a sentence on what is forbidden, and there must be one")
        return own
    names = [policies] if isinstance(policies, str) else POLICIES if policies is None else list(policies)
    if not names:
        raise ValueError(f"policies is empty: name some of {', '.join(POLICIES)}, or None for all")
    return {name: POLICIES[name].guideline(of_response=of_response) for name in map(_policy_name, names)}


def _policy_name(given: object) -> str:
    """A known policy by its name, or by the beginning that only it has."""
    name = checks.text("a policy", given).strip().lower()
    found = [known for known in POLICIES if name and known.startswith(name)]
    if len(found) != 1:
        checks.fail("policies", given, f"some of {', '.join(POLICIES)}, or a mapping of names to your own sentences")
    return found[0]
