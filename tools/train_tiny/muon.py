# SPDX-License-Identifier: Apache-2.0
"""Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for everything else.

Small models learn the skills here in about half the tokens AdamW alone needs.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic whose iteration pushes singular values towards 1


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns] → the nearest (semi-)orthogonal matrices, roughly."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step's root mean square is 0.2·lr per entry, as AdamW's (Liu et al. 2025)."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                buffer = state.setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(buffer, group["momentum"])  # Nesterov
                rows, columns = param.shape[-2:]
                stacked = param.view(-1, rows, columns), update.view(-1, rows, columns)
                shapes[rows, columns] += list(zip(*stacked, strict=True))
            for (rows, columns), pairs in shapes.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW)."""
    matrices, rest = [], []
    for name, param in model.named_parameters():
        inner = param.ndim >= 2 and "embed_tokens" not in name and "router" not in name
        (matrices if inner else rest).append(param)
    return matrices, rest
