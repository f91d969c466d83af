# SPDX-License-Identifier: Apache-2.0
"""Train the dictionaries of the shipped models: sparse autoencoders and a transcoder, with a card for each.

    python tools/train_dictionaries.py --work DIR [NAME …]     default: all of RECIPES

Activations come from gemma4.harvest, over documents of the kind that the models were trained on. The numbers follow
from the seed, up to the rounding of torch's threads. Each result is a folder in SAELens's layout, its
matrices in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from train_tiny import mixture
from train_tiny.example import sample

import gemma4
from gemma4 import harvest
from gemma4.files import write_file
from gemma4.interp import DictionaryEvaluation, evaluate_dictionary
from gemma4.load.huggingface import PRETRAINED
from gemma4.load.safetensors import write_safetensors

TOKENS, HELD_OUT_DOCUMENTS = 300_000, 150
BATCH, RATE, WARM_UP, IDLE_STEPS = 1024, 2e-3, 50, 150
AUXILIARY, AUXILIARY_K = 1 / 32, 32  # loss of dead features on what the others miss, its weight and their number


@dataclass(frozen=True)
class Recipe:
    """site_out: of a transcoder; k: features that fire at a position, for a transcoder on average."""

    model: str
    site: str
    site_out: str | None = None
    d_sae: int = 1024
    k: int = 20
    steps: int = 1200

    @property
    def name(self) -> str:
        return f"{self.model}/{self.site}"

    @property
    def target(self) -> str:
        return self.site_out or self.site

    @property
    def folder(self) -> Path:
        return PRETRAINED / self.model / "dictionaries" / self.site


RECIPES = (
    Recipe("tiny-e", "blocks.4.hook_resid_post"),
    Recipe("tiny-e", "blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out", steps=800),
    Recipe("tiny-moe", "blocks.2.hook_resid_post"),
)


# ---- data -----------------------------------------------------------------------------------------------------------


def tokenizer_of(model: str) -> Tokenizer:
    return Tokenizer.from_file(str(PRETRAINED / model / "tokenizer.json"))


def training_documents(tokenizer: Tokenizer, seed: int) -> Iterator[NDArray[np.int32]]:
    """An endless stream of documents as in the models' own training."""
    return (document.ids for document in mixture.documents(tokenizer, random.Random(f"sae/{seed}"), late=True))


def held_out_documents(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[NDArray[np.int32]]:
    """Documents of combinations that neither model nor dictionary was trained on, all skills in turn."""
    rng = random.Random(f"sae/held out/{seed}")
    generators = [mixture.SHARES[name][0] for name in sorted(mixture.SHARES)]
    return [
        mixture.tokenize(sample(generators[i % len(generators)], rng, held_out=True), tokenizer).ids
        for i in range(count)
    ]


def activations(model: str, sites: list[str], work: Path, seed: int) -> dict[str, Tensor]:
    """Site -> float32 [tokens, width], from a harvest in `work`, which resumes."""
    out = work / f"{model}-{seed}"
    corpus = work / f"{model}-{seed}.jsonl"
    if not corpus.exists():
        documents, left, lines = training_documents(tokenizer_of(model), seed), TOKENS, list[str]()
        while left > 0:
            ids = next(documents).tolist()
            lines.append(json.dumps({"tokens": ids}) + "\n")
            left -= len(ids)
        write_file(corpus, "".join(lines).encode(), force=True)  # whole, or not at all
    harvest.harvest(gemma4.load(model), corpus, sites, out=out, dtype="f32", max_tokens=TOKENS)
    with harvest.open(out) as dataset:
        return {site: torch.from_numpy(np.array(dataset[site])) for site in sites}


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass
class Scale:
    """x = scaled * std + mean, with one mean per component and one std for all."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scale:
        mean = x.mean(0)
        return cls(mean, (x - mean).square().mean().sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Trained:
    """Encoder and decoder between scaled activations. Each row of the decoder has norm 1."""

    def __init__(self, recipe: Recipe, d_in: int, d_out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.recipe = recipe
        decoder = torch.randn(recipe.d_sae, d_out, generator=generator)
        self.w_dec = decoder / decoder.norm(dim=1, keepdim=True)
        encoder = self.w_dec if recipe.site_out is None else torch.randn(recipe.d_sae, d_in, generator=generator)
        self.w_enc = (encoder / encoder.norm(dim=1, keepdim=True)).T.contiguous()
        self.b_enc, self.b_dec = torch.zeros(recipe.d_sae), torch.zeros(d_out)
        self.threshold: Tensor | None = None  # of a transcoder: the lowest value that it keeps
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.w_enc, self.w_dec, self.b_enc, self.b_dec]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations and the values that are kept: k of a row, or of a transcoder k a row on average."""
        pre = x @ self.w_enc + self.b_enc
        rows = pre if self.recipe.site_out is None else pre.view(1, -1)
        values, ids = rows.topk(self.recipe.k * (len(pre) // len(rows)), dim=1)
        values = values.relu()
        return pre, torch.zeros_like(rows).scatter(1, ids, values).view_as(pre)

    def loss(self, x: Tensor, y: Tensor, idle: Tensor) -> Tensor:
        """Squared error, and of features that have been idle for long the error on what is left. Updates `idle`."""
        pre, values = self.encode(x)
        missed = y - (values @ self.w_dec + self.b_dec)
        loss = missed.square().mean()
        idle += 1
        idle[(values > 0).any(0)] = 0
        dead = (idle > IDLE_STEPS).nonzero()[:, 0]
        if len(dead):
            best, ids = pre[:, dead].topk(min(AUXILIARY_K, len(dead)), dim=1)
            revived = torch.zeros(len(x), len(dead)).scatter(1, ids, best.relu()) @ self.w_dec[dead]
            loss = loss + AUXILIARY * (missed.detach() - revived).square().mean()
        return loss

    def tensors(self, scale_in: Scale, scale_out: Scale) -> dict[str, NDArray[np.generic]]:
        """As SAELens stores them, for activations as they are: the scales are folded in."""
        with torch.no_grad():
            w_enc = self.w_enc / scale_in.std
            w_dec = self.w_dec * scale_out.std
            b_dec = self.b_dec * scale_out.std + scale_out.mean
            subtracted = b_dec if self.recipe.site_out is None else torch.zeros(len(w_enc))
            # the stored encoder is rounded: its bias is computed for the rounded one
            w_enc = w_enc.bfloat16().float()
            b_enc = self.b_enc + (subtracted - scale_in.mean) @ w_enc
            floats = {"b_enc": b_enc, "b_dec": b_dec}
            if self.threshold is not None:
                floats["threshold"] = self.threshold.expand(len(b_enc))
        halves = {"W_enc": w_enc, "W_dec": w_dec}
        return {name: array.contiguous().numpy().astype(ml_dtypes.bfloat16) for name, array in halves.items()} | {
            name: np.ascontiguousarray(array.numpy()) for name, array in floats.items()
        }


def train(recipe: Recipe, x: Tensor, y: Tensor, steps: int, seed: int) -> tuple[Trained, Scale, Scale]:
    """x, y: float32 [tokens, width], of which the scaled ones are used."""
    scale_in, scale_out = Scale.of(x), Scale.of(y)
    found = Trained(recipe, x.shape[1], y.shape[1], seed)
    optimizer = torch.optim.Adam(found.parameters, lr=RATE, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed + 1)
    idle, lowest, start = torch.zeros(recipe.d_sae), torch.tensor(0.0), time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARM_UP, (steps - step) / (0.4 * steps))
        at = torch.randint(len(x), (BATCH,), generator=generator)
        loss = found.loss(scale_in(x[at]), scale_out(y[at]), idle)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            found.w_dec /= found.w_dec.norm(dim=1, keepdim=True)
        if step % 200 == 0:
            print(f"{recipe.name}: step {step}, loss {loss.item():.4f}, {time.monotonic() - start:.0f} s", flush=True)
    if recipe.site_out is not None:
        with torch.no_grad():
            kept = [
                found.encode(scale_in(x[i : i + BATCH]))[1]
                for i in range(0, min(len(x) - BATCH + 1, 32 * BATCH), BATCH)
            ]
            lowest = torch.stack([values[values > 0].min() for values in kept]).mean()
        found.threshold = lowest
    return found, scale_in, scale_out


# ---- files ----------------------------------------------------------------------------------------------------------


def configuration(recipe: Recipe, d_in: int, d_out: int) -> dict[str, object]:
    """cfg.json of SAELens 6. dtype is what it computes in."""
    metadata: dict[str, object] = {
        "sae_lens_version": "6.54.12",
        "model_name": recipe.model,
        "model_fingerprint": gemma4.load(recipe.model).fingerprint,
        "hook_name": recipe.site,
        "prepend_bos": True,
        "context_size": 1024,
    }
    config: dict[str, object] = {"d_in": d_in, "d_sae": recipe.d_sae, "dtype": "float32", "device": "cpu"}
    config |= {"normalize_activations": "none", "reshape_activations": "none"}
    if recipe.site_out is None:
        config |= {"architecture": "topk", "k": recipe.k, "apply_b_dec_to_input": True}
    else:
        config |= {"architecture": "jumprelu_transcoder", "d_out": d_out, "apply_b_dec_to_input": False}
        metadata["hook_name_out"] = recipe.site_out
    return config | {"metadata": metadata}


def save(recipe: Recipe, tensors: dict[str, NDArray[np.generic]]) -> None:
    recipe.folder.mkdir(parents=True, exist_ok=True)
    d_in, d_out = len(tensors["W_enc"]), tensors["W_dec"].shape[1]
    with (recipe.folder / "sae_weights.safetensors").open("wb") as file:
        write_safetensors(file, tensors)
    config = configuration(recipe, d_in, d_out)
    (recipe.folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def opened(recipe: Recipe) -> gemma4.SAE | gemma4.Transcoder:
    return (gemma4.SAE if recipe.site_out is None else gemma4.Transcoder).load(recipe.name)


def evaluation(recipe: Recipe, documents: int = HELD_OUT_DOCUMENTS) -> DictionaryEvaluation:
    """On held-out documents of all skills."""
    model = gemma4.load(recipe.model)
    return evaluate_dictionary(model, opened(recipe), held_out_documents(tokenizer_of(recipe.model), documents))


def main() -> None:
    names = [recipe.name for recipe in RECIPES]
    parser = argparse.ArgumentParser(description="Train the dictionaries of the shipped models.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--work", type=Path, required=True, help="folder of corpora and harvests")
    parser.add_argument("--steps", type=int, default=0, help="default: those of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the shipped ones were trained with 1")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(names)}")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        if arguments.names and recipe.name not in arguments.names:
            continue
        of_model = [one for one in RECIPES if one.model == recipe.model]
        sites = sorted({site for one in of_model for site in (one.site, one.target)})
        rows = activations(recipe.model, sites, arguments.work, arguments.seed)
        found, *scales = train(
            recipe, rows[recipe.site], rows[recipe.target], arguments.steps or recipe.steps, arguments.seed
        )
        save(recipe, found.tensors(*scales))


if __name__ == "__main__":
    main()
