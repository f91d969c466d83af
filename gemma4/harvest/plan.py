# SPDX-License-Identifier: Apache-2.0
"""The plan of a harvest: everything that its bytes depend on, and nothing else (no worker, thread or engine)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4._engine import cpu_info
from gemma4.harvest.corpus import WEIGHT_OF_TOKEN, Corpus, Reading, Scan, Scanning, Slice
from gemma4.harvest.dictionaries import Coding
from gemma4.harvest.edited import EditSet, check_effects, check_hits, sites_beyond
from gemma4.harvest.hashing import Going, each, update
from gemma4.harvest.pieces import Cutter, Limit
from gemma4.interp.hooks import active_hooks
from gemma4.interp.saved import SavedDtype
from gemma4.interp.sites import ENCODER_PREFIXES, Site, SiteTable
from gemma4.model import Model
from gemma4.narrow import is_dict, is_list

SiteNames: TypeAlias = str | Iterable[str]

FORMAT, VERSION = "gemma4.harvest", 1
DEFAULT_CONTEXT = 1024
_SAMPLE = 4096  # bytes
_NUMERICS = 1  # raised when the same model gives other bits than before
# Keys of the description's parts that may change without a change of any byte
_NAMES = {"model": "name", "corpus": "files", "dictionaries": "name"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Engine-free and picklable. A shard is one slice of the corpus, with this for all of them.

    sites: stored, in forward order · codings: dictionaries that encode on the fly · stop_at_layer: where runs may end ·
    facts: the description in the manifest
    """

    corpus: Corpus
    slices: tuple[Slice, ...]
    limit: Limit | None
    cutter: Cutter
    sites: tuple[Site, ...]
    dtype: SavedDtype
    codings: tuple[Coding, ...]
    stop_at_layer: int | None
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """64 hex digits: plans with the same one give the same bytes."""
        return hashlib.sha256(json.dumps(identity(self.facts), sort_keys=True).encode()).hexdigest()

    @property
    def captured(self) -> list[str]:
        """Names of the sites to capture."""
        return list(dict.fromkeys([site.name for site in self.sites] + [coding.site for coding in self.codings]))


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a harvest: see `gemma4.harvest.harvest`."""

    dtype: SavedDtype
    context: int | None
    max_tokens: int | None
    shard_tokens: int
    image_tokens: int | None
    skip_damaged: bool

    def __post_init__(self) -> None:
        checks.choice("dtype", self.dtype, get_args(SavedDtype))
        checks.integer("shard_tokens", self.shard_tokens, 1, 1 << 40)
        checks.boolean("skip_damaged", self.skip_damaged)
        if self.max_tokens is not None:
            checks.integer("max_tokens", self.max_tokens, 1, 1 << 62)


def make_plan(
    model: Model,
    corpus: Corpus,
    sites: SiteNames,
    options: Options,
    codings: tuple[Coding, ...] = (),
    scanning: Scanning = lambda weight, name: None,
    edited: EditSet | None = None,
) -> Plan:
    """Read the corpus once, take the fingerprints, and decide on the shards.

    Raises ValueError (options, sites that cannot be stored by rows, nothing to store, edits that would change nothing),
    SiteError, FormatError (a damaged corpus), OSError, StateError (open hooks or edits).
    """
    if active_hooks(model):
        raise ValueError(
            "a harvest inside `with model.hooks(...)`, edit or attach: leave the block first; edits as data can be "
            "given (edits=, --edits)"
        )
    chosen = select_sites(model.sites, sites)
    if not chosen and not codings:
        raise ValueError("nothing to harvest: name sites or a dictionary")
    context = min(DEFAULT_CONTEXT, model.context_length) if options.context is None else options.context
    checks.integer("context", context, 2, model.context_length)
    image_tokens = model.image_tokens if options.image_tokens is None else options.image_tokens
    cutter = Cutter(context, image_tokens, options.skip_damaged)
    edits = () if edited is None else edited.edits
    captured = [*chosen, *(model.sites[coding.site] for coding in codings)]
    stop = stop_layer(model.sites, captured)
    if edits:
        check_effects(edits, model, context)
        stop = stop_layer(model.sites, [*captured, *sites_beyond(edits, model.sites, captured, stop)])
    scan = corpus.scan(options.shard_tokens * WEIGHT_OF_TOKEN, options.skip_damaged, scanning)
    corpus = scan.corpus
    limit = None
    if options.max_tokens is not None:
        limit = cutter.limit(model, corpus, scan.slices, options.max_tokens)
    slices = scan.slices if limit is None else tuple(part for part in scan.slices if part.first <= limit.document)
    with closing(Reading(corpus)) as reading:
        check_hits(edits, (p for part in slices for p in cutter.pieces(model, reading, part, limit, [])))
    facts = _facts(model, corpus, scan, chosen, codings, cutter, options) | {"n_shards": len(slices)}
    if edited is not None and edited.facts is not None:
        facts["edits"] = edited.facts
    return Plan(corpus, slices, limit, cutter, tuple(chosen), options.dtype, codings, stop, facts)


def _facts(
    model: Model,
    corpus: Corpus,
    scan: Scan,
    sites: list[Site],
    codings: tuple[Coding, ...],
    cutter: Cutter,
    options: Options,
) -> dict[str, Any]:
    names = [Path(file).name for file in corpus.files]
    texts = {"fingerprint": scan.fingerprint, "documents": scan.n_documents, "files": names}
    return {
        "model": {
            "name": model.checkpoint.path.name,
            "fingerprint": model_fingerprint(model),
            "precision": model.engine.precision,
            "kv_dtype": model.kv_dtype,
        },
        "arithmetic": arithmetic(model),
        "tokenizer": tokenizer_fingerprint(model),
        "corpus": texts | {"key": corpus.key, "sample_by": corpus.sample_by},
        "sites": [{"name": site.name, "row": list(row_shape(site)), "axes": _row_axes(site)} for site in sites],
        "dtype": options.dtype,
        "context": cutter.context,
        "max_tokens": options.max_tokens,
        "shard_tokens": options.shard_tokens,
        "image_tokens": cutter.image_tokens,
        "dictionaries": [coding.facts for coding in codings],
    }


# -- sites -------------------------------------------------------------------------------------------------------------


def select_sites(table: SiteTable, names: SiteNames) -> list[Site]:
    """Sites of names, globs and braces ("blocks.{5,12}.hook_resid_post"), in forward order.

    Raises SiteError (no such site), ValueError (a site of an encoder, or one with an axis of keys; braces that do not
    close), TypeError.
    """
    given = [names] if isinstance(names, str) else list(names)
    patterns = [pattern for name in given for pattern in expand_braces(checks.text("a site", name))]
    inside = [pattern for pattern in patterns if pattern.startswith(ENCODER_PREFIXES)]
    if inside:
        raise ValueError(f"{inside[0]!r}: sites inside encoders have no row for each token, and are not harvested")
    sites = table.select(patterns) if patterns else []
    squares = [site.name for site in sites if site.keys not in ("", "cached")]
    if squares:
        raise ValueError(
            f"{', '.join(squares[:4])}: these have a column for each key, so their rows differ in length; name the "
            "sites without them, or capture them with run_with_cache"
        )
    return sites


def expand_braces(pattern: str) -> list[str]:
    """The patterns that a shell makes of "a.{0,3,5..7}.b". Raises ValueError for braces that do not close."""
    begin = pattern.rfind("{")
    if begin < 0:
        if "}" in pattern:
            raise ValueError(f"site {pattern!r:.120}: a brace is closed that was not opened")
        return [pattern]
    end = pattern.find("}", begin)
    if end < 0:
        raise ValueError(f"site {pattern!r:.120}: a brace is not closed")
    head, tail = pattern[:begin], pattern[end + 1 :]
    return [
        whole
        for part in pattern[begin + 1 : end].split(",")
        for choice in _range(part.strip(), pattern)
        for whole in expand_braces(f"{head}{choice}{tail}")
    ]


def _range(part: str, pattern: str) -> list[str]:
    first, dots, last = part.partition("..")
    if not dots:
        return [part]
    if (
        not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit())
        or max(len(first), len(last)) > 4
    ):
        raise ValueError(f"site {pattern!r:.120}: {part!r:.40} is no range such as 0..5")
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise ValueError(f"site {pattern!r:.120}: the range {part} is empty")
    return [str(number) for number in numbers]


def row_shape(site: Site) -> tuple[int, ...]:
    """A row's shape, without the axis of positions (for keys and values in use: of keys, the same in a new run)."""
    return tuple(dim for dim in site.dims if isinstance(dim, int))


def _row_axes(site: Site) -> str:
    return "".join(axis for axis, dim in zip(site.axes, site.dims, strict=True) if isinstance(dim, int))


def stop_layer(table: SiteTable, sites: Iterable[Site]) -> int | None:
    """The fewest blocks that reach all of these sites; None: all of them, and what follows."""
    early = {site.name for site in table.select(lambda name: True, stop_at_layer=0)}
    layers = [-1]
    for site in sites:
        if site.layer is not None:
            layers.append(site.layer)
        elif site.name not in early:
            return None
    return max(layers) + 1


# -- fingerprints ------------------------------------------------------------------------------------------------------


def model_fingerprint(model: Model) -> str:
    """64 hex digits from every byte of every stored tensor, and the configuration.

    Raises FormatError (a file changed).
    """
    tensors = model.tensors

    def of_tensor(name: str, going: Going) -> bytes:
        digest, flat = _begun_digest(name, tensors[name])
        update(digest, flat.data, going)
        return digest.digest()

    with model.checkpoint.reading():
        return hashlib.sha256(b"".join([_configuration(model), *each(of_tensor, sorted(tensors))])).hexdigest()


def sampled_fingerprint(model: Model) -> str:
    """64 hex digits from both ends of every stored tensor, those of encoders too: for a quick look at a copy.

    Raises FormatError (a file changed).
    """
    digest = hashlib.sha256(_configuration(model))
    with model.checkpoint.reading():
        for name in sorted(model.tensors):
            one, flat = _begun_digest(name, model.tensors[name])
            one.update(flat[:_SAMPLE].tobytes() + flat[-_SAMPLE:].tobytes())
            digest.update(one.digest())
    return digest.hexdigest()


def _begun_digest(name: str, tensor: NDArray[np.generic]) -> tuple[Any, NDArray[np.uint8]]:
    """A digest that has the tensor's name and form, and the bytes that it lacks."""
    return hashlib.sha256(f"{name} {tensor.dtype} {tensor.shape}".encode()), tensor.reshape(-1).view(np.uint8)


def _configuration(model: Model) -> bytes:
    """A digest of the text model, and of how media are prepared and encoded."""
    media = [dict(model.checkpoint.processor_config), sorted(map(repr, model.checkpoint.encoders.items()))]
    text = json.dumps([model.fingerprint, *media], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def arithmetic(model: Model) -> dict[str, Any]:
    """Facts of the machine on which the bits of the model's results depend. `exact` ones are the same everywhere."""
    if model.engine.precision == "exact":
        return {"version": _NUMERICS}
    return {"version": _NUMERICS, "isa": model.engine.isa, "blas": cpu_info()["blas"]}


def tokenizer_fingerprint(model: Model) -> str | None:
    """64 hex digits of the tokenizer and the chat template; None if the model has no tokenizer."""
    if model.checkpoint.tokenizer_path is None:
        return None
    template = model.chat_template
    source = "" if template is None else template.source
    return hashlib.sha256(f"{model.tokenizer.fingerprint}{source}".encode("utf-8", "surrogatepass")).hexdigest()


# -- comparison --------------------------------------------------------------------------------------------------------


def identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The description without names that no byte depends on."""
    return {key: _without(part, _NAMES[key]) if key in _NAMES else part for key, part in facts.items()}


def _without(part: object, name: str) -> object:
    """A dict, or a list of some, without that key."""
    if is_list(part):
        return [_without(one, name) for one in part]
    return {key: value for key, value in part.items() if key != name} if is_dict(part) else part


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A phrase for each part of two descriptions that differs."""
    before, now = identity(before), identity(now)
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old == new or key == "n_shards":
            continue
        if key == "edits":
            yield f"edits: {_edit_names(old)} before, {_edit_names(new)} now"
        elif is_dict(old) and is_dict(new):
            for inner in dict.fromkeys([*old, *new]):
                if old.get(inner) != new.get(inner):
                    yield f"{key} {inner}: {_brief(old.get(inner))} before, {_brief(new.get(inner))} now"
        elif key == "sites":
            yield f"sites: {_site_names(old)} before, {_site_names(new)} now"
        else:
            yield f"{key}: {_brief(old)} before, {_brief(new)} now"


def _site_names(sites: object) -> str:
    names = [site.get("name") for site in sites if is_dict(site)] if is_list(sites) else []
    return ", ".join(map(str, names))[:200] or "none"


def _edit_names(facts: object) -> str:
    """Their kinds, and the beginning of a digest of all that they are."""
    edits = facts.get("edits") if is_dict(facts) else None
    if not is_list(edits):
        return "none"
    kinds = ", ".join(str(edit.get("kind")) for edit in edits if is_dict(edit))
    return f"{kinds:.160} ({hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]})"


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text[:120]
