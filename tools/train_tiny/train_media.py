# SPDX-License-Identifier: Apache-2.0
"""Last stage: the text model learns to read what the towers of train_sight and train_hearing encode.

    python -m train_tiny.train_media --model ../gemma4/pretrained/tiny-e --out RUN --steps 5000

The towers stay as they are; their soft tokens come from RUN/pool (pool.py). Plain text is held to what the untouched
text model says about it, by the divergence of the two, so that the text skills stay. RUN/media.pt holds the text model.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Gemma4ForConditionalGeneration

from . import media_rows, pool, skills_media
from .evaluate_media import right
from .look import Gaze, Place, at_thing, at_word
from .media_rows import Rows
from .stages import Stage, add_arguments, load, optimizers_for, parse
from .towers import build

LAYER, HEADS = 4, (0, 3)  # the full-attention layer with keys of its own; the heads that looked at pictures most
COLOUR = (1, 3)  # layer and head that is to look back at the colour asked for …
NAMES = ((2, 0), (3, 0))  # … and at the name's end: sliding layers, whose heads looked there from close by
PLACE_WEIGHT, PLACE_RATE = 5.0, 5e-3  # of the hint that is a head of its own


class Reader(nn.Module):
    """The text model over embeddings with soft tokens put in: what Gemma4Model.forward does once they are encoded."""

    def __init__(self, model: Gemma4ForConditionalGeneration) -> None:
        super().__init__()
        config = model.config
        self.text, self.pad = model.model.language_model, config.text_config.pad_token_id
        self.media = (config.image_token_id, config.video_token_id, config.audio_token_id)

    def forward(self, ids: Tensor, soft: Tensor, position: Tensor, full: Tensor, near: Tensor) -> Tensor:
        """ids, position [rows, length]; soft [rows, length, hidden]; masks [rows, 1, length, length] of the two kinds
        of layers → hidden states [rows, length, hidden] after the last norm.
        """
        image, video, audio = self.media
        media = (ids == image) | (ids == video) | (ids == audio)
        plain = ids.masked_fill(media, self.pad)
        embedded = self.text.embed_tokens(plain)
        pad = self.text.embed_tokens.weight[self.pad]
        per_layer = self.text.get_per_layer_inputs(plain, torch.where(media[..., None], pad, embedded))
        embedded = torch.where(media[..., None], soft, embedded)
        masks = {"full_attention": full, "sliding_attention": near}
        options = {"attention_mask": masks, "position_ids": position, "use_cache": False}
        return self.text(inputs_embeds=embedded, per_layer_inputs=per_layer, **options).last_hidden_state


def tensors(rows: Rows, window: int) -> tuple[Tensor, ...]:
    """What Reader takes."""
    masks = media_rows.masks(rows, window)
    parts = (rows.ids.astype("int64"), rows.soft, rows.position.astype("int64"), *masks.values())
    return tuple(torch.from_numpy(part) for part in parts)


def logits(text: nn.Module, hidden: Tensor, cap: float) -> Tensor:
    """[n, hidden] → [n, vocabulary]; the head is the embedding table."""
    return torch.tanh(hidden @ text.embed_tokens.weight.T / cap) * cap


def load_run(model: Gemma4ForConditionalGeneration, run: Path) -> int:
    """A training run's towers and text model; returns the last stage's step."""
    pool.load_towers(model, run)
    return load(run / "media.pt", {"text": model.model.language_model})


class Check:
    """Held-out conversations, encoded once. An answer is right if every token of it is the likeliest after those
    before it: the same as generating it greedily, except for boxes and points, where it is close to that.
    """

    def __init__(self, model: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, count: int) -> None:
        self.tokenizer = tokenizer
        self.held: dict[str, list[tuple[skills_media.Conversation, media_rows.MediaDocument]]] = {}
        for skill in skills_media.SKILLS:
            talks = skills_media.held_out(skill, count, seed=2)
            shown = [talk.picture or talk.clip or talk.said for talk in talks]
            items = [pool.encode(model, one) for one in shown if one]
            docs = [media_rows.about(item, [talk], tokenizer) for item, talk in zip(items, talks, strict=True)]
            self.held[skill] = list(zip(talks, docs, strict=True))

    @torch.no_grad()
    def score(self, reader: Reader, text: nn.Module, cap: float, window: int) -> dict[str, float]:
        """Share right of each skill."""
        result = {}
        for skill, pairs in self.held.items():
            hits = 0
            for talk, doc in pairs:
                rows = media_rows.pack(iter([doc]), self.tokenizer, media_rows.LENGTH, 1, doc.soft.shape[1])
                hidden = reader(*tensors(rows, window))[0, doc.prompt_len - 1 : len(doc.ids) - 1]
                best = logits(text, hidden, cap).argmax(1).tolist()
                hits += right(talk, self.tokenizer.decode(best, skip_special_tokens=True))
            result[skill] = round(hits / len(pairs), 2)
        return result


class Trainer:
    """The text model under training, and the untouched one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seed, self.keep, self.gaze_weight = arguments.seed, arguments.keep, arguments.gaze
        self.tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        self.model = build(arguments.model, arguments.seed)
        self.text = self.model.model.language_model
        config = self.model.config.text_config
        self.cap, self.window = config.final_logit_softcapping, config.sliding_window
        pool.load_towers(self.model, arguments.out)
        self.before = copy.deepcopy(self.model).requires_grad_(False)
        self.items = {kind: pool.stored(arguments.out, kind) for kind in pool.KINDS}
        self.check = Check(self.model, self.tokenizer, arguments.check) if arguments.check else None
        self.reader, self.teacher = Reader(self.model), Reader(self.before)
        self.gaze = Gaze(self.text, LAYER, HEADS)
        self.colour = Gaze(self.text, COLOUR[0], COLOUR[1:])
        self.names = [Gaze(self.text, layer, (head,)) for layer, head in NAMES]
        tables = [p for name, p in self.text.named_parameters() if "embed_tokens" in name]
        matrices = [p for name, p in self.text.named_parameters() if "embed_tokens" not in name]
        optimizers = optimizers_for(matrices, tables, arguments.lr, arguments.adam_lr)
        self.place = Place(self.text, LAYER, config.hidden_size)
        optimizers = [*optimizers, (torch.optim.AdamW(self.place.parameters(), weight_decay=0.0), PLACE_RATE)]
        modules = {"text": self.text, "place": self.place}
        self.stage = Stage(arguments.out / "media.pt", modules, optimizers, arguments.steps, warmup=30)

    def text_loss(self, hidden: Tensor, inputs: tuple[Tensor, ...], weights: Tensor) -> Tensor:
        """Divergence of the model's next token from the untouched model's, where the text counts."""
        counts = weights[:, 1:] > 0
        with torch.no_grad():
            wanted = logits(self.before.model.language_model, self.teacher(*inputs)[:, :-1][counts], self.cap)
        found = logits(self.text, hidden[:, :-1][counts], self.cap)
        losses = nn.functional.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none")
        weighted = weights[:, 1:][counts]
        return (losses.sum(1) * weighted).sum() / weighted.sum()

    def gaze_loss(self, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        """-log of the weight that heads put where they should look: each hint counts the same. And the mean weights."""
        kinds = [kind for kind, count in media_rows.SHARE.items() for _ in range(count)]
        colour, name = (at_word(back, self.window) for back in (rows.colour, rows.name))
        hints = [("gaze", self.gaze, at_thing(rows.look, rows.thing)), ("colour", self.colour, colour)]
        hints += [(f"name{gaze.layer}", gaze, name) for gaze in self.names]
        total, means = torch.zeros(()), {}
        for label, gaze, wanted in hints:
            mass, row = gaze.mass(wanted)
            for kind in ("shapes", "others"):
                mine = mass[torch.isin(row, torch.tensor([i for i, k in enumerate(kinds) if k == kind]))]
                if len(mine):
                    total = total - (mine + 1e-6).log().mean()
                    means[f"{label}_{kind}"] = mine.mean().item()
        return total, means

    def train_step(self) -> dict[str, float]:
        """One step; the mean loss of each kind of rows."""
        few = 0.8 if self.stage.step < 0.2 * self.stage.steps else 0.0  # where a thing is, before which thing it is
        rows = media_rows.batch(self.tokenizer, self.items, self.seed, self.stage.step, few=few)
        inputs, weights = tensors(rows, self.window), torch.from_numpy(rows.weights)
        hidden = self.reader(*inputs)
        gaze, seen = self.gaze_loss(rows)
        last = media_rows.SHARE["text"]
        kept = self.text_loss(hidden[-last:], tuple(part[-last:] for part in inputs), weights[-last:])
        counts = weights[:-last, 1:] > 0
        found = logits(self.text, hidden[:-last, :-1][counts], self.cap)
        losses = nn.functional.cross_entropy(found, inputs[0][:-last, 1:][counts], reduction="none")
        important = weights[:-last, 1:][counts]
        answers = (losses * important).sum() / important.sum()
        error = self.place.error(torch.from_numpy(rows.colour > 0), torch.from_numpy(rows.place))
        self.stage.update(answers + self.keep * kept + self.gaze_weight * gaze + PLACE_WEIGHT * error)
        kinds = [kind for kind, count in media_rows.SHARE.items() for _ in range(count) if kind != "text"]
        where = counts.nonzero()[:, 0]
        result = {"text": kept.item(), "place": error.item()} | seen
        for kind in dict.fromkeys(kinds):
            mine = torch.isin(where, torch.tensor([i for i, k in enumerate(kinds) if k == kind]))
            result[kind] = losses.detach()[mine].mean().item()
        if self.check and self.stage.step % 150 == 0:
            print(self.stage.step, self.check.score(self.reader, self.text, self.cap, self.window), flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the text model to read its towers.")
    add_arguments(parser, steps=5000, lr=2e-3)
    parser.add_argument("--keep", type=float, default=2.0, help="weight of the untouched text model")
    parser.add_argument("--gaze", type=float, default=0.1, help="weight of where to look")
    parser.add_argument("--check", type=int, default=0, help="held-out answers of each skill to score every 150 steps")
    trainer = Trainer(parse(parser))
    trainer.stage.run(trainer.train_step)


if __name__ == "__main__":
    main()
