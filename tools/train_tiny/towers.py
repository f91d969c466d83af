# SPDX-License-Identifier: Apache-2.0
"""The small vision and audio towers of `tiny-e`, as transformers' own configuration, and their first weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig, Gemma4VisionConfig

# E2B's towers in small: real patches (16 pixels), pooling (3 × 3), mel bins (128) and audio chunks (12).
VISION = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "position_embedding_size": 1024,
}
AUDIO = {  # the first convolution's channels / 4 must be the 32 mel rows that are left: transformers assumes it
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "subsampling_conv_channels": [128, 8],
    "output_proj_dims": 128,
}


CONSTANT = 0  # this channel of the patches' position table begins as 0.5 + 0.5 everywhere


def with_towers(text: Gemma4Config, *, clipped: bool = False) -> Gemma4Config:
    """The configuration of a text model with the towers added; training has no clipping."""
    vision = Gemma4VisionConfig(**VISION, use_clipped_linears=clipped)
    audio = Gemma4AudioConfig(**AUDIO, use_clipped_linears=clipped)
    values = text.to_dict() | {"vision_config": vision.to_dict(), "audio_config": audio.to_dict()}
    return Gemma4Config(**values)


def build(directory: Path, seed: int, *, clipped: bool = False) -> Gemma4ForConditionalGeneration:
    """`directory`'s text model in float32 with fresh towers (or those that the directory holds)."""
    torch.manual_seed(seed)
    config = with_towers(Gemma4Config.from_pretrained(directory), clipped=clipped)
    model = Gemma4ForConditionalGeneration(config)
    first_weights(model)
    found = load_file(directory / "model.safetensors")
    bounds = ("_min", "_max")  # of clipping, in a model whose towers are trained
    stored = {key: value.float() for key, value in found.items() if clipped or not key.endswith(bounds)}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    lost = [key for key in missing if "language_model" in key and not key.endswith("embed_scale")]
    if lost or unexpected:
        raise ValueError(f"{directory}: missing {lost[:3]}, unexpected {unexpected[:3]}")
    return model


@torch.no_grad()
def first_weights(model: Gemma4ForConditionalGeneration) -> None:
    """Matrices keep the size of what they carry; gains begin below 1, as the text model's; positions are waves."""
    for name, value in model.named_parameters():
        if "language_model" in name or "lm_head" in name:
            continue
        if "position_embedding_table" in name:
            value.copy_(waves(value.shape[1], value.shape[2]))
        elif value.ndim >= 2:
            value.normal_(0.0, 1 / math.sqrt(value[0].numel()))
        elif name.endswith("bias"):
            value.zero_()
        elif "post_" in name and name.endswith("norm.weight"):
            value.fill_(0.35)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value.fill_(0.6)
    for layer, offsets in zip(model.model.vision_tower.encoder.layers, OFFSETS, strict=True):
        look_around(layer.self_attn, offsets)


# Where the heads of each vision layer look at first: (x, y) patches away, or anywhere (None).
Offset = tuple[int, int] | None
OFFSETS: tuple[tuple[Offset, ...], ...] = (
    ((-1, 0), (1, 0), (0, -1)),
    ((0, 1), (0, -1), None),
    ((-2, 0), (2, 0), (0, 2)),
    ((0, -2), None, None),
)


def look_around(attention: nn.Module, offsets: tuple[Offset, ...]) -> None:
    """Make heads begin as local ones: keys and queries of the constant channel agree where RoPE turns by `offset`.

    A tower that begins like a convolution learns shapes and letters from far fewer pictures than one that must find
    out which patches are neighbours.
    """
    size = attention.head_dim
    quarter = size // 4  # frequencies of one axis; x has the first half of the head, y the second, each half-split
    speed = 100.0 ** (-torch.arange(quarter) / quarter)
    strength = (speed > 0.15).float()
    for head, offset in enumerate(offsets):
        rows = slice(head * size, (head + 1) * size)
        if offset is None:
            continue
        query = []
        for away in offset:  # the query is the key turned by the offset
            query += [strength * torch.cos(speed * away), strength * torch.sin(speed * away)]
        key = torch.cat([strength, torch.zeros(quarter)] * 2)
        for linear, constant in ((attention.q_proj.linear, torch.cat(query)), (attention.k_proj.linear, key)):
            linear.weight[rows] *= 0.5
            linear.weight[rows, CONSTANT] = 2.0 * constant


def waves(positions: int, channels: int) -> torch.Tensor:
    """[2, positions, channels]: sines and cosines of x in the first half of the channels, of y in the second.

    Places that training never reaches (the table is long, pictures are short) keep these values.
    """
    half = channels // 2
    periods = torch.logspace(math.log10(4), math.log10(400), half // 2)
    angles = torch.arange(positions)[:, None] * 2 * math.pi / periods
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.zeros(2, positions, channels)
    table[0, :, :half] = wave
    table[1, :, half:] = wave
    table[:, :, CONSTANT] = 0.5
    return table


def tower_parameters(model: nn.Module, which: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of "vision" or "audio": the tower and its projection."""
    marks = (f"{which}_tower.", f"embed_{which}.")
    return [(name, value) for name, value in model.named_parameters() if any(mark in name for mark in marks)]
