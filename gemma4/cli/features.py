# SPDX-License-Identifier: Apache-2.0
"""`gemma4 features`: a dictionary's features as a table and cards, from a harvest or from Gemma Scope 2's examples."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gemma4.cli.terminal import console, say, styled, typed
from gemma4.files import check_output, write_file
from gemma4.html import Card, cards
from gemma4.html.markup import number, visible

if TYPE_CHECKING:
    from gemma4.dictionaries import Dictionary
    from gemma4.dictionaries.examples import Examples
    from gemma4.harvest import Dataset
    from gemma4.interp.dashboard import Logits
    from gemma4.model import Model

I64: TypeAlias = NDArray[np.int64]
_SEARCHED = 4096  # features whose raised tokens are computed at once
Near: TypeAlias = list[tuple[int, float]]  # other features, and how strongly they go together


def add_features(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(model=None)
    text = "a harvest made with --sae, or a folder of Gemma Scope 2 with its examples.safetensors"
    parser.add_argument("source", type=Path, metavar="DIR", help=text)
    text = "show this one (repeatable; default: the first --count of the order)"
    parser.add_argument("--feature", type=int, action="append", default=[], metavar="N", help=text)
    text = "only features whose strongest token, or a token that they raise, holds this text"
    parser.add_argument("--search", metavar="TEXT", help=text)
    parser.add_argument("--sort", choices=("density", "max", "index"), default="max", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="features to show (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="of each card (default: %(default)s)")
    parser.add_argument("--context", type=int, default=24, metavar="N", help="tokens around (default: %(default)s)")
    parser.add_argument("--dictionary", type=int, default=0, metavar="N", help="of a harvest with several (default: 0)")
    text = "of a harvest: the dictionary itself, for the tokens that a feature raises and lowers"
    parser.add_argument("--sae", type=Path, metavar="PATH", help=text)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write cards with a search field")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write Neuronpedia's JSON of the shown features")
    parser.add_argument("--model-id", metavar="NAME", help="Neuronpedia's name of the model, for --json")
    parser.add_argument("--source-id", metavar="NAME", help='Neuronpedia\'s, "13-gemmascope-2-res-16k", for --json')
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def run_features(load: Callable[[], Model], args: argparse.Namespace) -> None:
    """Print a table of features, and write cards and JSON."""
    for name in ("count", "examples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    for path in (args.html, args.json):
        if path is not None:
            check_output(path, force=args.force, devices=True)
    if args.html is not None and args.json is not None and args.html.absolute() == args.json.absolute():
        raise ValueError(f"--html and --json both name {args.html}")
    with ExitStack() as files:
        _show(_Shown(load, args, files), args)


def _show(shown: _Shown, args: argparse.Namespace) -> None:
    features = shown.chosen()
    out = console()
    out.print(styled(f"{shown.source!r}; {shown.n_alive:,} of them fire", out))
    if shown.model is None:
        out.print(styled("tokens are ids: --model MODEL gives their texts", out, "dim"))
    logits, near = shown.logits(features), shown.source.together(features)
    out.print(shown.table(features, logits))
    if args.html is not None:
        picture = cards(shown.cards(features, logits, near), title=f"Features of {args.source.resolve().name}")
        write_file(args.html, picture.page().encode(), force=args.force)
        say(f"page: {args.html}")
    if args.json is not None:
        text = json.dumps(shown.neuronpedia(features, logits, near), indent=1, allow_nan=False) + "\n"
        write_file(args.json, text.encode(), force=args.force)
        say(f"JSON: {args.json}")


class _Shown:
    """The source, and what gives tokens their texts."""

    def __init__(self, load: Callable[[], Model], args: argparse.Namespace, files: ExitStack) -> None:
        from gemma4.dictionaries.examples import Examples

        self._args = args
        self._dataset: Dataset | None = None
        is_harvest = (args.source / "manifest.json").exists()
        self.source: Examples = files.enter_context(self._open_harvest() if is_harvest else Examples.load(args.source))
        self.model = self._model(load)
        self._dictionary = None if args.sae is None else files.enter_context(self._open_dictionary(self.model))
        self.peaks, self.peak_tokens = self.source.peaks()
        self.n_alive = int((self.peaks > 0).sum())

    def _open_harvest(self) -> Examples:
        from gemma4 import harvest
        from gemma4.harvest.cards import HarvestedFeatures

        self._dataset = dataset = harvest.open(self._args.source)
        if not dataset.dictionaries:
            raise ValueError(f"{self._args.source} holds no features: harvest with --sae PATH")
        if not 0 <= self._args.dictionary < len(dataset.dictionaries):
            n = len(dataset.dictionaries)
            raise ValueError(f"--dictionary {self._args.dictionary}: {self._args.source} has {n}, counted from 0")
        return HarvestedFeatures(dataset, self._args.dictionary)

    def _model(self, load: Callable[[], Model]) -> Model | None:
        """The model of --model; of a harvest by a shipped model that one. Raises ValueError for another tokenizer."""
        from gemma4.load.huggingface import PRETRAINED

        facts: dict[str, Any] = {} if self._dataset is None else self._dataset.manifest["plan"]
        name = str(facts.get("model", {}).get("name"))
        if self._args.model is None and (PRETRAINED / name).is_dir() and name in ("tiny-e", "tiny-moe"):
            self._args.model = name
        if self._args.model is None:
            return None
        model = load()
        if facts:
            from gemma4.harvest.plan import tokenizer_fingerprint

            if tokenizer_fingerprint(model) != facts["tokenizer"]:
                raise ValueError(f"{self._args.source} was made with another tokenizer than {self._args.model}'s")
        return model if model.checkpoint.tokenizer_path else None

    def texts(self, ids: NDArray[np.integer]) -> list[str]:
        if self.model is None:
            return [f"<{token}>" for token in ids]
        return self.model.to_str_tokens(ids)

    def chosen(self) -> list[int]:
        """The features to show. Raises ValueError (there is no such one, none is left)."""
        args = self._args
        if args.feature:
            for feature in args.feature:
                if not 0 <= feature < self.source.d_sae:
                    raise ValueError(f"there is no feature {feature}, {args.source} has 0 to {self.source.d_sae - 1}")
            return list(dict.fromkeys(args.feature))
        alive = np.flatnonzero(self.peaks > 0)
        if args.search is not None:
            alive = alive[self._holding(typed(args.search), alive)]
        if not len(alive):
            looked = "" if args.search is None else f" with {args.search!r}"
            raise ValueError(f"{args.source}: no feature fires{looked}")
        by = {"index": alive, "max": -self.peaks[alive], "density": -self.source.densities[alive]}[args.sort]
        return alive[np.argsort(by, kind="stable")][: args.count].tolist()

    def _holding(self, words: str, features: I64) -> NDArray[np.bool_]:
        from gemma4.interp.dashboard import holding

        found = holding(words, self.texts(self.peak_tokens[features]))
        left = np.flatnonzero(~found)
        for first in range(0, len(left), _SEARCHED):
            part = left[first : first + _SEARCHED]
            for at, (up, _) in zip(part, self.logits(features[part].tolist()), strict=True):
                found[at] = holding(words, self.texts(up.tokens)).any()
        return found

    def logits(self, features: Sequence[int]) -> list[Logits]:
        """The tokens that each feature raises and lowers: as stored, or by --sae and the model's head."""
        if self._dictionary is None or self.model is None:
            return [self.source.logits(feature) for feature in features]
        from gemma4.interp.dashboard import direct_logits

        return direct_logits(self.model, self._dictionary, features)

    def _open_dictionary(self, model: Model | None) -> Dictionary:
        """That of --sae. Raises ValueError if it is not the one whose features are shown, or the model another one."""
        from gemma4.harvest.dictionaries import fingerprint, open_dictionary
        from gemma4.harvest.plan import model_fingerprint

        if model is None:
            raise ValueError("--sae needs --model besides: the model whose tokens the features raise")
        source, path = self._args.source, self._args.sae
        facts: dict[str, Any] | None = None
        if self._dataset is not None:
            facts = self._dataset.dictionaries[int(self._args.dictionary)]
        dictionary = open_dictionary(path, None if facts is None else facts["site"])
        if dictionary.d_sae != self.source.d_sae:
            raise ValueError(f"{dictionary!r} has {dictionary.d_sae} features, {source} {self.source.d_sae}")
        if self._dataset is not None and facts is not None:
            if fingerprint(path) != facts["fingerprint"]:
                raise ValueError(f"{path} is another dictionary than {facts['name']}, with which {source} was made")
            if model_fingerprint(model) != self._dataset.manifest["plan"]["model"]["fingerprint"]:
                raise ValueError(f"{source} was made with another model than {self._args.model}: other weights")
        return dictionary

    def table(self, features: Sequence[int], logits: Sequence[Logits]) -> Table:
        found = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, right in (("feature", True), ("fires at", True), ("largest", True), ("there", False)):
            found.add_column(name, justify="right" if right else "left", no_wrap=True)
        found.add_column("raises" if any(len(up.tokens) for up, _ in logits) else "", no_wrap=True)
        tokens = self.texts(self.peak_tokens[list(features)].clip(0))
        for feature, token, (up, _) in zip(features, tokens, logits, strict=True):
            density = f"{100 * self.source.density(feature):.3g} %"
            raised = "  ".join(map(visible, self.texts(up.tokens[:4])))
            there = visible(token) if self.peaks[feature] > 0 else ""
            found.add_row(str(feature), density, number(float(self.peaks[feature])), Text(there), Text(raised))
        return found

    def cards(self, features: Sequence[int], logits: Sequence[Logits], near: Sequence[Near]) -> list[Card]:
        from gemma4.interp.dashboard import feature_card

        return [feature_card(self.source, one, self.texts, **rest) for one, rest in self._each(features, logits, near)]

    def neuronpedia(
        self, features: Sequence[int], logits: Sequence[Logits], near: Sequence[Near]
    ) -> list[dict[str, Any]]:
        from gemma4.interp.dashboard import neuronpedia

        args = self._args
        names = {"model_id": args.model_id or "", "source_id": args.source_id or args.source.resolve().name}
        each = self._each(features, logits, near)
        return [neuronpedia(self.source, one, self.texts, **names, **rest) for one, rest in each]

    def _each(
        self, features: Sequence[int], logits: Sequence[Logits], near: Sequence[Near]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Each feature with the options of its card."""
        options = {"n_examples": self._args.examples, "context": self._args.context}
        found = zip(features, logits, near, strict=True)
        return [(feature, {**options, "logits": two, "near": others}) for feature, two, others in found]
