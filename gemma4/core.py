# SPDX-License-Identifier: Apache-2.0
"""A loaded model as data: configuration, weights, sites, tokenizer. Steps, sequences, encoders and generation take it.

`gemma4.model.Model` is this with the methods that run it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine, checks
from gemma4.interp.hooks import NaNLog
from gemma4.interp.sites import SiteTable
from gemma4.load import Checkpoint, TextConfig
from gemma4.load.checkpoint import EngineTensor
from gemma4.load.dtypes import is_quantised, stored_rows
from gemma4.media.image import BUDGETS
from gemma4.media.medium import Modalities

if TYPE_CHECKING:
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
Precision: TypeAlias = Literal["exact", "high", "fast"]
KVDtype: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
T = TypeVar("T")


class Core:
    """A loaded model as data. Immutable weights: threads may share it.

    checkpoint     the opened files
    engine         the C engine's model; engine_config: the configuration it was built from
    kv_dtype       type in which new sequences keep keys and values
    sites          every site of the text model by name, in forward order (docs/sites.md)
    nan_log        sites where edits produced NaN
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int = 0,
        precision: Precision | None = None,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        threads = checks.integer("threads", threads, 0, checks.MAX_THREADS)
        if kv_dtype is not None and kv_dtype not in get_args(KVDtype):
            raise ValueError(f"kv_dtype must be one of {', '.join(get_args(KVDtype))} or None, got {kv_dtype!r}")
        if precision is None:
            precision = "fast" if checkpoint.quantised else "exact"
        checks.choice("precision", precision, get_args(Precision))
        self.checkpoint = checkpoint
        self.engine_config = checkpoint.engine_config
        self.engine = _engine.Model(
            checkpoint.engine_config,
            checkpoint.engine_tensors,
            threads=threads,
            precision=precision,
        )
        self.kv_dtype: KVDtype = kv_dtype or ("f16" if precision == "fast" else "f32")
        self.sites = SiteTable(self.engine.sites(), self.engine_config["layers"])
        self.nan_log = NaNLog()
        self._attached: dict[type, object] = {}
        self._attaching = threading.Lock()

    def attached(self, kind: type[T]) -> T:
        """The model's single `kind()` object, made at first use: state kept with it, such as bound encoders."""
        with self._attaching:
            if kind not in self._attached:
                self._attached[kind] = kind()
            return cast(T, self._attached[kind])

    # -- the checkpoint --------------------------------------------------------------------------------------------

    @property
    def config(self) -> TextConfig:
        """The text model's configuration, whichever spelling the checkpoint uses."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, NDArray[np.generic]]:
        """Every stored tensor under its stored name: read-only views of the file, bf16 as ml_dtypes.bfloat16."""
        return self.checkpoint.tensors

    @property
    def n_layers(self) -> int:
        return len(self.engine_config["layers"])

    @property
    def d_vocab(self) -> int:
        return self.engine_config["d_vocab"]

    @property
    def context_length(self) -> int:
        """The most positions a sequence of this model can hold."""
        return self.engine_config["context_length"]

    @property
    def n_token_ids(self) -> int:
        """Upper bound of input ids (exclusive): every embedding table has a row for smaller ids."""
        config = self.engine_config
        return min(config["d_vocab"], config["d_vocab_ple"]) if config["d_ple"] else config["d_vocab"]

    def __repr__(self) -> str:
        how = f"{self.engine.precision}, {self.engine.isa}"
        return f"<gemma4.Model {self.checkpoint.path.name}: {self.n_layers} layers, {how}>"

    def close(self) -> None:
        """Release the files; any later run raises StateError. Arrays handed out before stay valid."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def weight(self, name: str) -> F32:
        """A text-model tensor as float32 (a copy), without the checkpoint's prefix: "layers.0.mlp.up_proj.weight"."""
        return self._rows(name, slice(None))

    def gain(self, norm: str) -> F32:
        """The factor of a norm, float32: `norm` as in "layers.0.input_layernorm" or "norm" (the last one).

        The weight itself, or 1 + weight in models that store it so (Gemma 2 and 3 from Hugging Face).
        """
        weight = self.weight(f"{norm}.weight")
        return weight + np.float32(1) if self.engine_config["unit_gains"] else weight

    def layer_scalar(self, layer: int) -> float:
        """The number that block `layer` multiplies the residual stream by at its end; 1 in models without one."""
        if not self.engine_config["layer_scalar"]:
            return 1.0
        return float(self._rows(f"layers.{layer}.layer_scalar", slice(0, 1))[0])

    @cached_property
    def layer_scalars(self) -> list[float]:
        """`layer_scalar` of every block. Read when the first sequence is made, so that captures can be pickled whatever
        becomes of the files."""
        if not self.engine_config["layer_scalar"]:
            return [1.0] * self.n_layers
        with self.checkpoint.reading():
            return [float(self._view(f"layers.{i}.layer_scalar")[0]) for i in range(self.n_layers)]

    def unembed(self, ids: NDArray[np.integer] | slice) -> F32:
        """Rows of the output head, float32 [n, d_model]: logit before the softcap = row . ln_final.hook_out."""
        tied = "lm_head.weight" not in self.checkpoint.engine_tensors
        return self._rows("embed_tokens.weight" if tied else "lm_head.weight", ids)

    def _rows(self, name: str, ids: Any) -> F32:
        """A tensor, or some of its rows, unpacked to float32; only those rows are read."""
        dtype, shape, _, _ = self._stored(name)
        with self.checkpoint.reading():
            rows = self._view(name)[ids]
            if not is_quantised(dtype):
                return rows.astype(np.float32)
            unpacked = (*rows.shape[:-1], shape[-1])
            return _engine.dequantize(dtype, unpacked, np.ascontiguousarray(rows), 0)

    def _view(self, name: str) -> NDArray[Any]:
        return stored_rows(*self._stored(name))

    def _stored(self, name: str) -> EngineTensor:
        if name not in self.checkpoint.engine_tensors:
            raise KeyError(f"no tensor {name!r} in the text model")
        return self.checkpoint.engine_tensors[name]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell models apart: configuration, tensor shapes, and a sample of every tensor's bytes.

        Taken when the first sequence is made, so that a live sequence can be saved whatever becomes of the files.
        """
        with self.checkpoint.reading():
            return self._fingerprint()

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.checkpoint.hf_config, sort_keys=True, default=str).encode())
        for name in sorted(self.checkpoint.engine_tensors):
            dtype, shape, *_ = self.checkpoint.engine_tensors[name]
            flat = self._view(name).reshape(-1)
            digest.update(f"{name} {dtype} {tuple(shape)}".encode())
            digest.update(flat[:512].tobytes() + flat[-512:].tobytes())
        return digest.hexdigest()[:16]

    # -- text ----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use. Raises StateError if the checkpoint has none; token ids work without."""
        return self.checkpoint.load_tokenizer()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's own chat template, None if it has none."""
        return self.checkpoint.load_chat_template()

    def to_tokens(self, text: str, bos: bool = True) -> I32:
        """int32 [pos]: token ids of `text`, BOS first exactly once (bos=False: none added)."""
        return self.tokenizer.encode(text, bos=bos)

    def to_string(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode(ids)

    def to_str_tokens(self, text_or_ids: str | Iterable[int], bos: bool = True) -> list[str]:
        """One string per token, for labels in plots."""
        ids = self.to_tokens(text_or_ids, bos=bos) if isinstance(text_or_ids, str) else text_or_ids
        return self.tokenizer.str_tokens(ids)

    def to_single_token(self, text: str) -> int:
        """The id of text that is exactly one token. Raises ValueError otherwise, with the tokens it splits into."""
        ids = self.to_tokens(text, bos=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.tokenizer.str_tokens(ids)}")
        return int(ids[0])

    # -- images and sound ----------------------------------------------------------------------------------------

    @property
    def modalities(self) -> Modalities:
        """The modalities that the checkpoint has encoders for."""
        return Modalities.of(self.checkpoint.encoders, self.checkpoint.encoder_advice)

    @cached_property
    def image_tokens(self) -> int:
        """Default limit of soft tokens per picture: the value in processor_config.json, else 280."""
        processor: object = self.checkpoint.processor_config.get("image_processor")
        found = (
            cast("Mapping[str, object]", processor).get("max_soft_tokens") if isinstance(processor, Mapping) else None
        )
        return int(found) if isinstance(found, int) and found in BUDGETS else 280
