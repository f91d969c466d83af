# SPDX-License-Identifier: Apache-2.0
"""Second stage: the towers from train_sight and train_hearing, and the text model, learn to answer together.

    python -m train_tiny.train_media --model ../gemma4/pretrained/tiny-e --out RUN --steps 1500

RUN/sight.pt and RUN/hearing.pt are where the towers begin, RUN/media.pt holds this stage. Every step also has plain
text, so that the text skills stay. `--freeze` leaves the towers as they are: a step then costs what the text costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Gemma4ForConditionalGeneration

from . import media_rows, pictures, sounds
from .stages import Stage, add_arguments, load, optimizers_for, parse
from .towers import build


def soft_tokens(model: Gemma4ForConditionalGeneration, rows: media_rows.Rows) -> tuple[Tensor, Tensor]:
    """(soft tokens of all pictures, of all recordings) [tokens, hidden], in the rows' order."""
    base, width = model.model, model.config.text_config.hidden_size
    seen = heard = torch.zeros(0, width)
    if rows.pictures:
        pixels, positions = pictures.stack(rows.pictures)
        seen = base.embed_vision(base.vision_tower(pixels, positions).last_hidden_state)
    if rows.recordings:
        out = base.audio_tower(*sounds.stack(rows.recordings))
        heard = base.embed_audio(out.last_hidden_state[out.attention_mask])
    return seen, heard


class Reader(nn.Module):
    """The text model over embeddings with soft tokens put in: what Gemma4Model.forward does once they are encoded."""

    def __init__(self, model: Gemma4ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, seen: Tensor, heard: Tensor) -> Tensor:
        """ids [rows, length] → hidden states [rows, length, hidden] after the last norm."""
        config, text = self.model.config, self.model.model.language_model
        sights = (ids == config.image_token_id) | (ids == config.video_token_id)
        media = sights | (ids == config.audio_token_id)
        plain = ids.masked_fill(media, config.text_config.pad_token_id)
        embedded = text.embed_tokens(plain)
        pad = text.embed_tokens.weight[config.text_config.pad_token_id]
        per_layer = text.get_per_layer_inputs(plain, torch.where(media[..., None], pad, embedded))
        embedded = embedded.masked_scatter(sights[..., None].expand_as(embedded), seen)
        embedded = embedded.masked_scatter((media & ~sights)[..., None].expand_as(embedded), heard)
        return text(inputs_embeds=embedded, per_layer_inputs=per_layer, use_cache=False).last_hidden_state


def answer_loss(model: Gemma4ForConditionalGeneration, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[rows]·length → weighted cross-entropy of the next token, of those that count; sums are over each row."""
    counts = weights[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][counts])
    cap = model.config.text_config.final_logit_softcapping
    logits = torch.tanh(logits / cap) * cap
    losses = nn.functional.cross_entropy(logits, ids[:, 1:][counts], reduction="none") * weights[:, 1:][counts]
    return torch.zeros(ids.shape[0]).index_add(0, counts.nonzero()[:, 0], losses)


class Trainer:
    """The whole model under training."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seed = arguments.seed
        self.tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        self.model = build(arguments.model, arguments.seed)
        base = self.model.model
        load(arguments.out / "sight.pt", {"tower": base.vision_tower, "embed": base.embed_vision})
        load(arguments.out / "hearing.pt", {"tower": base.audio_tower, "embed": base.embed_audio})
        for name, value in self.model.named_parameters():
            value.requires_grad_(not arguments.freeze or "_tower." not in name)
        self.reader: Callable[..., Tensor] = Reader(self.model)
        if arguments.compile:
            self.reader = torch.compile(self.reader, dynamic=False)
        tables = [p for name, p in self.model.named_parameters() if "embed_tokens" in name]
        matrices = [p for name, p in self.model.named_parameters() if "embed_tokens" not in name]
        optimizers = optimizers_for(matrices, tables, arguments.lr, arguments.adam_lr)
        self.stage = Stage(arguments.out / "media.pt", {"model": self.model}, optimizers, arguments.steps, warmup=30)

    def train_step(self) -> dict[str, float]:
        """One step; the mean loss of each kind of rows."""
        share = self.stage.step / self.stage.steps
        rows = media_rows.batch(self.tokenizer, self.seed, self.stage.step, real=min(0.9, max(0.2, 1.5 * share)))
        ids, weights = torch.from_numpy(rows.ids).long(), torch.from_numpy(rows.weights)
        seen, heard = soft_tokens(self.model, rows)
        # torch.compile wants one shape: what is not used lies behind what is.
        seen, heard = (nn.functional.pad(soft, (0, 0, 0, ids.numel() - len(soft))) for soft in (seen, heard))
        losses = answer_loss(self.model, self.reader(ids, seen, heard), ids, weights)
        counted = weights[:, 1:].sum(1)
        self.stage.update(losses.sum() / counted.sum())
        kinds = list(media_rows.SHARE)
        parts = zip(
            losses.split(list(media_rows.SHARE.values())), counted.split(list(media_rows.SHARE.values())), strict=True
        )
        return {kind: (loss.sum() / count.sum()).item() for kind, (loss, count) in zip(kinds, parts, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the text model to read its towers.")
    add_arguments(parser, steps=1500, lr=1.5e-3)
    parser.add_argument("--freeze", action="store_true", help="leave the towers as they are")
    parser.add_argument("--compile", action="store_true", help="torch.compile the text model")
    trainer = Trainer(parse(parser))
    trainer.stage.run(trainer.train_step)


if __name__ == "__main__":
    main()
