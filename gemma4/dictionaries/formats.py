# SPDX-License-Identifier: Apache-2.0
"""The formats of published dictionaries: Gemma Scope 1 and 2, SAELens, sparsify. Opening a file maps it.

Files are untrusted: each tensor is checked by name, type and shape, and small ones for NaN. What a format can express
but this reader does not compute exactly is a NotImplementedError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.weights import Activation, Gated, Norm, Threshold, TopK, Weights
from gemma4.errors import FormatError
from gemma4.interp.sites import canonical_name
from gemma4.load.fields import Fields
from gemma4.load.huggingface import read_json
from gemma4.load.mapped import MappedFile
from gemma4.load.mapped_npz import MappedNpz
from gemma4.load.safetensors import SafetensorsFile
from gemma4.narrow import is_dict, is_list

F32: TypeAlias = NDArray[np.float32]
_MOST = 1 << 31  # features, widths
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
_HOW_TO_CONVERT = (
    "pickles can run code, so they are never read. Convert it where you trust it: torch.load(path, weights_only=True), "
    "then SAELens's save_model, or safetensors.torch.save_file beside a cfg.json"
)


@dataclass(frozen=True, eq=False)
class Opened:
    """A dictionary as read from its files.

    format          "Gemma Scope 1", "Gemma Scope 2", "SAELens", "sparsify"
    site, site_out  names of ours, None where the files do not say
    transcoder      None: the files do not say
    skip_positions  positions at the start of a prompt that it was not trained on
    metadata        the configuration as stored
    """

    format: str
    file: MappedFile
    weights: Weights
    site: str | None
    site_out: str | None
    transcoder: bool | None
    metadata: dict[str, Any]
    skip_positions: int = 0


class _Tensors:
    """Checked access to the tensors of one file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.file.path}: {what}")

    def mapped(self, name: str, *shape: int | None) -> NDArray[Any]:
        """A view. shape: the expected sizes, None = any from 1 on."""
        if name not in self:
            self.fail(f"there is no tensor {name}; it has {', '.join(list(self.file.tensors)[:12])}")
        array = self.file.array(name)
        fits = len(array.shape) == len(shape) and all(
            want == found if want is not None else 0 < found < _MOST
            for want, found in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ["any" if size is None else size for size in shape]
            self.fail(f"{name} has shape {list(array.shape)}, expected [{', '.join(map(str, wanted))}]")
        if array.dtype.name not in _FLOATS or not array.dtype.isnative:
            self.fail(f"{name} is {array.dtype.str}, expected one of {', '.join(_FLOATS)}")
        return array

    def decoder(self, name: str, *shape: int | None) -> NDArray[Any]:
        """As `mapped`, for a matrix of which single rows are read."""
        array = self.mapped(name, *shape)
        self.file.advise_random(name)
        return array

    encoder = decoder

    def before_all(self, name: str) -> Callable[[], None]:
        """For `Weights`: the first call says that all of this matrix is read."""
        return cache(lambda: self.file.advise_whole(name))

    def vector(self, name: str, size: int, *, infinite: bool = False) -> F32:
        """A float32 copy without NaN, and unless `infinite` without infinities."""
        values = self.mapped(name, size).astype(np.float32)
        bad = np.isnan(values) if infinite else ~np.isfinite(values)
        if bad.any():
            first = int(np.argmax(bad))
            self.fail(f"{name}[{first}] is {values[first]}, expected a {'number' if infinite else 'finite number'}")
        return values


@dataclass(frozen=True, eq=False)
class OpenedLayers:
    """A dictionary of several layers as read from its files.

    weights    of each layer, whose output is that of all layers, [n_layers * d_out]; without biases
    b_dec      float32 [n_layers, d_out]
    skips      what each layer's input adds to its own output, [d_in, d_out]; None: no such matrix
    sites, sites_out   of each layer; None where the files do not say
    kind       "crosscoder", "clt"; None: the files do not say
    """

    files: tuple[MappedFile, ...]
    weights: tuple[Weights, ...]
    b_dec: F32
    skips: tuple[NDArray[Any] | None, ...]
    sites: tuple[str, ...] | None
    sites_out: tuple[str, ...] | None
    kind: Literal["crosscoder", "clt"] | None
    metadata: dict[str, Any]
    skip_positions: int


def open_dictionary(path: Path) -> Opened:
    """Raises FileNotFoundError, OSError, FormatError (damaged, no dictionary, a pickle), NotImplementedError."""
    reader, path = _recognise(path)
    opened = reader(path)
    opened.file.check()
    return opened


def _recognise(path: Path) -> tuple[Callable[[Path], Opened], Path]:
    if path.suffix.lower() in _PICKLES:
        raise FormatError(f"{path} is a pickle by its name; {_HOW_TO_CONVERT}")
    if path.suffix == ".npz":
        return _open_gemma_scope_1, path
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; give the folder or the file of a dictionary")
    for name, reader in _READERS.items():
        if (folder / name).is_file() and path in (folder, folder / name):
            return reader, folder / name
    if not path.is_dir():
        raise FormatError(
            f"{path} is no dictionary by its name, expected one of {', '.join(_READERS)}, or their folder"
        )
    found = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        raise FormatError(f"{folder} has {pickles[0]!r:.80}; {_HOW_TO_CONVERT}")
    if any(_LAYER_FILE.fullmatch(name) for name in found):
        raise ValueError(
            f"{folder} holds a dictionary of several layers: open it with gemma4.Crosscoder.load or "
            "gemma4.CrossLayerTranscoder.load"
        )
    shown = ", ".join(found[:8]) or "nothing"
    raise FormatError(f"{folder} holds {shown}; expected one of {', '.join(_READERS)}")


# -- Gemma Scope -------------------------------------------------------------------------------------------------------

_SCOPE_1_REPOSITORY = re.compile(r"gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att|transcoders)")
_SCOPE_1_SITES = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),  # the gain was folded into them
}
_SCOPE_2_PLACE = re.compile(
    r"gemma-scope-2-[\w.]+-(pt|it)/(?:snapshots/\w+/)?(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_"
)
_SCOPE_2_SITES = {
    "resid_post": ("hook_resid_post", "hook_resid_post"),
    "attn_out": ("attn.hook_z", "attn.hook_z"),
    "mlp_out": ("hook_mlp_out", "hook_mlp_out"),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}
_IT_PROLOGUE = 4  # <bos><start_of_turn>user\n: Gemma Scope 2 was not trained on it


def _open_gemma_scope_1(path: Path) -> Opened:
    """`params.npz`. The file does not name its site; its place in the published repositories does."""
    file = MappedNpz(path)
    tensors = _Tensors(file)
    w_enc = tensors.encoder("W_enc", None, None)
    d_in, d_sae = w_enc.shape
    w_dec = tensors.decoder("W_dec", d_sae, None)
    where = path.absolute().as_posix()
    kind, layer = _SCOPE_1_REPOSITORY.search(where), re.search(r"/layer_(\d+)/", where)
    site = site_out = None
    if kind and layer:
        names = _SCOPE_1_SITES[kind[1]]
        site, site_out = (name and f"blocks.{int(layer[1])}.{name}" for name in names)
    embedding = kind is not None and "/embedding/" in where
    if embedding:  # it was trained before the embedding is multiplied by sqrt(d_model)
        site = "hook_embed"
    transcoder = kind[1] == "transcoders" if kind else (True if w_dec.shape[1] != d_in else None)
    weights = Weights(
        w_enc,
        w_dec,
        tensors.vector("b_dec", w_dec.shape[1]),
        _jump_relu(tensors, "b_enc", d_sae),
        scale=d_in**-0.5 if embedding else 1.0,
        before_all=tensors.before_all("W_enc"),
    )
    return Opened("Gemma Scope 1", file, weights, site, site_out, transcoder, {})


def _jump_relu(tensors: _Tensors, bias: str, d_sae: int) -> Threshold:
    """A negative threshold is as 0, since its ReLU fires at no negative number."""
    threshold = np.maximum(tensors.vector("threshold", d_sae, infinite=True), 0)
    return Threshold(tensors.vector(bias, d_sae), threshold)


def _open_gemma_scope_2(path: Path) -> Opened:
    config = path.with_name("config.json")
    raw = read_json(config) if config.is_file() else {}
    fields = Fields(raw if config.is_file() else _scope_2_facts(path), str(config))
    architecture = fields.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise NotImplementedError(f"{config}: architecture {architecture!r:.60} is not read, only jump_relu")
    kind = str(fields.get("type", ""))
    if any(name in kind.lower() for name in ("crosscoder", "clt")):
        raise NotImplementedError(f"{config}: a {kind:.40} is not read yet")
    file = SafetensorsFile(path)
    tensors = _Tensors(file)
    w_enc = tensors.encoder("w_enc", None, None)
    d_in, d_sae = w_enc.shape
    if fields.integer("width", d_sae, 1, _MOST) != d_sae:
        tensors.fail(f"w_enc has {d_sae} features, width in {config.name} is {fields.get('width', d_sae)}")
    w_dec = tensors.decoder("w_dec", d_sae, None)
    d_out = w_dec.shape[1]
    affine = fields.boolean("affine_connection", "affine_skip_connection" in tensors)
    w_skip = tensors.mapped("affine_skip_connection", d_in, d_out) if affine else None
    if not affine and "affine_skip_connection" in tensors:
        tensors.fail(f"it has affine_skip_connection, but affine_connection in {config.name} is false")
    site, site_out = _site(fields, "hf_hook_point_in"), _site(fields, "hf_hook_point_out")
    transcoder = (site != site_out if site and site_out else None) if d_in == d_out and not affine else True
    weights = Weights(
        w_enc,
        w_dec,
        tensors.vector("b_dec", d_out),
        _jump_relu(tensors, "b_enc", d_sae),
        w_skip=w_skip,
        denormalise=False,
        before_all=tensors.before_all("w_enc"),
    )
    skip = _IT_PROLOGUE if str(fields.get("model_name", "")).endswith("-it") else 0
    return Opened("Gemma Scope 2", file, weights, site, site_out if transcoder else None, transcoder, raw, skip)


def _scope_2_facts(path: Path) -> dict[str, Any]:
    """The facts of a missing config.json that the place in the published repositories states; {} elsewhere."""
    place = _SCOPE_2_PLACE.search(path.absolute().as_posix())
    if not place:
        return {}
    site, site_out = (f"blocks.{int(place[3])}.{stem}" for stem in _SCOPE_2_SITES[place[2]])
    return {"model_name": f"gemma-3-{place[1]}", "hf_hook_point_in": site, "hf_hook_point_out": site_out}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, which says how to compute its dictionary")
    return read_json(path)


def _site(fields: Fields, *names: str) -> str | None:
    """The first of these fields that names a hook point, as our site."""
    for name in names:
        value = fields.get(name, None)
        if value is None or value == "":
            continue
        if not isinstance(value, str) or len(value) > 200:
            fields.fail(name, value, "a hook point's name")
        return canonical_name(value)
    return None


_LAYER_FILE = re.compile(r"params_layer_(\d+)\.safetensors")
_KINDS: Mapping[str, Literal["crosscoder", "clt"]] = {
    "crosscoder": "crosscoder",
    "clt": "clt",
    "cross_layer_transcoder": "clt",
}


_LAYERED_SITES = {"crosscoder": ("hook_resid_post", "hook_resid_post"), "clt": ("mlp.hook_in", "hook_mlp_out")}


def open_layers(folder: Path, kind: Literal["crosscoder", "clt"]) -> OpenedLayers:
    """A crosscoder or a cross-layer transcoder: params_layer_0.safetensors and so on, each with the encoder of its
    layer and the decoder from it to all.

    kind: used if its files do not say. Raises FileNotFoundError, OSError, FormatError (damaged, or a layer is missing),
    NotImplementedError.
    """
    config = folder / "config.json"
    raw = read_json(config) if config.is_file() else {}
    fields = Fields(raw, str(config))
    architecture = fields.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise NotImplementedError(f"{config}: architecture {architecture!r:.60} is not read, only jump_relu")
    paths = _layer_files(folder)
    files = list[SafetensorsFile]()
    try:
        for path in paths:
            files.append(SafetensorsFile(path))
        tensors = [_Tensors(file) for file in files]
        shape = tensors[0].mapped("w_dec", None, len(files), None).shape
        weights, b_dec, skips = zip(*(_layer(one, shape) for one in tensors), strict=True)
        stated = _kind(fields, folder)
        layers = _layers(folder, len(files), stated or kind)
        names = zip(("hf_hook_point_in", "hf_hook_point_out"), _LAYERED_SITES[stated or kind], strict=True)
        sites, sites_out = (_sites(fields, name, stem, layers) for name, stem in names)
        for file in files:
            file.check()
        return OpenedLayers(
            tuple(files),
            weights,
            np.stack(b_dec),
            skips,
            sites,
            sites_out,
            stated,
            raw,
            _IT_PROLOGUE if str(fields.get("model_name", "")).endswith("-it") else 0,
        )
    except BaseException:
        for file in files:
            file.close()
        raise


def _layer_files(folder: Path) -> list[Path]:
    """The files of every layer, in order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the one with params_layer_0.safetensors")
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _LAYER_FILE.fullmatch(entry.name))}
    if sorted(found) != list(range(len(found))) or not found:
        held = ", ".join(map(str, sorted(found))) or "none"
        raise FormatError(f"{folder} has params_layer_N.safetensors of these layers: {held}; expected all from 0 on")
    return [found[layer] for layer in sorted(found)]


def _layer(tensors: _Tensors, shape: tuple[int, ...]) -> tuple[Weights, F32, NDArray[Any] | None]:
    """Weights, bias and skip connection of one layer. shape: of w_dec, [d_sae, n_layers, d_out], as in the first."""
    d_sae, n_layers, d_out = shape
    w_enc = tensors.encoder("w_enc", None, d_sae)
    w_dec = tensors.decoder("w_dec", d_sae, n_layers, d_out).reshape(d_sae, n_layers * d_out)
    skip = "affine_skip_connection"
    return (
        Weights(
            w_enc,
            w_dec,
            np.zeros(n_layers * d_out, np.float32),
            _jump_relu(tensors, "b_enc", d_sae),
            denormalise=False,
            before_all=tensors.before_all("w_enc"),
        ),
        tensors.vector("b_dec", d_out),
        tensors.mapped(skip, w_enc.shape[0], d_out) if skip in tensors else None,
    )


def _layers(folder: Path, n: int, kind: Literal["crosscoder", "clt"]) -> list[int] | None:
    """The layers' numbers in the model: of a CLT all, of a crosscoder those of the folder's name,
    layer_7_13_17_22_width_65k. None: it does not say."""
    if kind == "clt":
        return list(range(n))
    match = re.match(r"layers?((?:_\d+)+)_width", folder.absolute().name)
    numbers = [int(number) for number in match[1].split("_")[1:]] if match else []
    return numbers if len(numbers) == n else None


def _kind(fields: Fields, folder: Path) -> Literal["crosscoder", "clt"] | None:
    stated = str(fields.get("type", "")).lower()
    if stated in _KINDS:
        return _KINDS[stated]
    return next((_KINDS[part] for part in reversed(folder.absolute().parts[:-1]) if part in _KINDS), None)


def _sites(fields: Fields, name: str, stem: str, layers: list[int] | None) -> tuple[str, ...] | None:
    """One hook point for each layer; a single one is that of one layer, and stands for the same place in all. Without
    one, it is `stem` of each block."""
    value = fields.get(name, None)
    if is_list(value):
        if not all(isinstance(one, str) and len(one) <= 200 for one in value):
            fields.fail(name, value, "hook points' names")
        return tuple(canonical_name(cast(str, one)) for one in value)
    site = _site(fields, name) or f"blocks.0.{stem}"
    match = re.fullmatch(r"blocks\.\d+\.(.+)", site)
    if not match:
        fields.fail(name, site, "a place inside a block, or one for each layer")
    return None if layers is None else tuple(f"blocks.{layer}.{match[1]}" for layer in layers)


# -- SAELens -----------------------------------------------------------------------------------------------------------

_JUMP_RELUS = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_BATCH_TOPKS = ("batchtopk", "matryoshka_batchtopk")  # they are saved as jumprelu, when training ends
_NORMS = ("none", "constant_norm_rescale", "layer_norm")


def _open_saelens(path: Path) -> Opened:
    config = path.with_name("cfg.json")
    raw = _read_config(config)
    fields = Fields(raw, str(config))
    metadata = raw.get("metadata", {})
    if not is_dict(metadata):
        fields.fail("metadata", metadata, "an object")
    named = Fields(raw | metadata, str(config))
    _refuse_saelens(fields, named)
    architecture = _architecture(fields)
    file = SafetensorsFile(path)
    tensors = _Tensors(file)
    d_in, d_sae = fields.integer("d_in", None, 1, _MOST), fields.integer("d_sae", None, 1, _MOST)
    transcoder = architecture in _TRANSCODERS
    d_out = fields.integer("d_out", d_in, 1, _MOST) if transcoder else d_in
    w_enc, w_dec = tensors.encoder("W_enc", d_in, d_sae), tensors.decoder("W_dec", d_sae, d_out)
    if "scaling_factor" in tensors and (tensors.vector("scaling_factor", d_sae) != 1).any():
        raise NotImplementedError(f"{path}: a finetuning scaling_factor is not read")
    b_dec = tensors.vector("b_dec", d_out)
    by_norm = architecture == "topk" and fields.boolean("rescale_acts_by_decoder_norm", False)
    weights = Weights(
        w_enc,
        w_dec,
        b_dec,
        _saelens_activation(architecture, fields, tensors, d_sae, w_dec if by_norm else None),
        b_in=b_dec if not transcoder and fields.boolean("apply_b_dec_to_input", True) else None,
        norm=_saelens_norm(fields),
        by_norm=by_norm,
        w_skip=tensors.mapped("W_skip", d_out, d_in).T if "skip" in architecture else None,
        denormalise=not transcoder,
        before_all=tensors.before_all("W_enc"),
    )
    site = _site(named, "hf_hook_point_in", "hf_hook_name", "hook_name", "hook_point")
    site_out = _site(named, "hf_hook_point_out", "hf_hook_name_out", "hook_name_out") if transcoder else None
    return Opened("SAELens", file, weights, site, site_out, transcoder, raw)


def _architecture(fields: Fields) -> str:
    """Configurations before version 6 have "activation_fn_str" and its arguments beside "standard"."""
    architecture = fields.get("architecture", "standard")
    function = fields.get("activation_fn", fields.get("activation_fn_str", "relu"))
    if architecture in ("standard", "topk") and function == "topk":
        return "topk"
    if function != "relu":
        raise NotImplementedError(f"{fields.where}: activation function {function!r:.60}, only relu and topk are read")
    known = ("standard", "topk", "gated", *_JUMP_RELUS, *_TRANSCODERS, *_BATCH_TOPKS)
    if architecture not in known:
        raise NotImplementedError(
            f"{fields.where}: architecture {architecture!r:.60} is not read; known: {', '.join(dict.fromkeys(known))}"
        )
    return cast(str, architecture)


def _refuse_saelens(fields: Fields, named: Fields) -> None:
    if named.get("hook_head_index", None) is not None:
        raise NotImplementedError(f"{fields.where}: a dictionary of one attention head (hook_head_index) is not read")
    reshape = fields.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z", None):
        raise NotImplementedError(f"{fields.where}: reshape_activations {reshape!r:.60} is not read")


def _saelens_norm(fields: Fields) -> Norm:
    norm = fields.get("normalize_activations", "none") or "none"
    if norm not in _NORMS:
        why = (
            "its scale is not in the file: fold it with SAELens's fold_activation_norm_scaling_factor and save again"
            if norm in ("expected_average_only_in", True)
            else f"known: {', '.join(_NORMS)}"
        )
        raise NotImplementedError(f"{fields.where}: normalize_activations {norm!r:.60} is not read; {why}")
    return norm


def _saelens_activation(
    architecture: str, fields: Fields, tensors: _Tensors, d_sae: int, ranked_by: NDArray[Any] | None
) -> Activation:
    if architecture in _JUMP_RELUS:
        return _jump_relu(tensors, "b_enc", d_sae)
    if architecture in _BATCH_TOPKS:
        if "threshold" in tensors:
            return _jump_relu(tensors, "b_enc", d_sae)
        raise NotImplementedError(
            f"{fields.where}: a {architecture} of training has no threshold; save it for inference with SAELens "
            "(save_inference_model), which makes it jumprelu"
        )
    if architecture == "gated":
        return Gated(tensors.vector("b_gate", d_sae), _exp(tensors, "r_mag", d_sae), tensors.vector("b_mag", d_sae))
    b_enc = tensors.vector("b_enc", d_sae)
    if architecture == "topk":
        arguments = fields.get("activation_fn_kwargs", None)
        old = arguments.get("k") if is_dict(arguments) else None
        return TopK(b_enc, fields.integer("k", old, 1, d_sae), ranked_by)
    return Threshold(b_enc, np.zeros(d_sae, np.float32))


def _exp(tensors: _Tensors, name: str, size: int) -> F32:
    values = tensors.vector(name, size)
    with np.errstate(over="ignore"):
        scale = np.exp(values)
    if not np.isfinite(scale).all():
        first = int(np.argmin(np.isfinite(scale)))
        tensors.fail(f"{name}[{first}] is {values[first]}, expected a number whose exp is finite in float32")
    return scale


# -- sparsify ----------------------------------------------------------------------------------------------------------


def _open_sparsify(path: Path) -> Opened:
    """The site is in the folder's name, a module of the model: "layers.5", or "layers.5.mlp"."""
    config = path.with_name("cfg.json")
    raw = _read_config(config)
    fields = Fields(raw, str(config))
    activation = fields.get("activation", "topk")
    if activation != "topk":
        raise NotImplementedError(f"{config}: activation {activation!r:.60} is not read, only topk")
    if fields.boolean("signed", False):
        raise NotImplementedError(f"{config}: signed features (older versions of sparsify) are not read")
    d_in = fields.integer("d_in", None, 1, _MOST)
    file = SafetensorsFile(path)
    tensors = _Tensors(file)
    d_sae = fields.integer("num_latents", 0, 0, _MOST) or d_in * fields.integer("expansion_factor", 32, 1, _MOST)
    transcode = fields.boolean("transcode", False)
    w_enc = tensors.encoder("encoder.weight", d_sae, d_in).T
    w_dec = tensors.decoder("W_dec", d_sae, None if transcode else d_in)
    d_out = w_dec.shape[1]
    b_dec = tensors.vector("b_dec", d_out)
    activation = TopK(tensors.vector("encoder.bias", d_sae), fields.integer("k", 32, 1, d_sae))
    weights = Weights(
        w_enc,
        w_dec,
        b_dec,
        activation,
        b_in=None if transcode else b_dec,
        w_skip=tensors.mapped("W_skip", d_out, d_in).T if fields.boolean("skip_connection", False) else None,
        denormalise=False,
        before_all=tensors.before_all("encoder.weight"),
    )
    module = path.absolute().parent.name
    site = _module_site(module, "input" if transcode else "output")
    site_out = _module_site(module, "output") if transcode else None
    return Opened("sparsify", file, weights, site, site_out, transcode, raw)


def _module_site(module: str, end: str) -> str | None:
    name = f"{module}.{end}"
    found = canonical_name(name)
    return None if found == name else found


_READERS: Mapping[str, Callable[[Path], Opened]] = {
    "params.npz": _open_gemma_scope_1,
    "params.safetensors": _open_gemma_scope_2,
    "sae_weights.safetensors": _open_saelens,
    "sae.safetensors": _open_sparsify,
}
