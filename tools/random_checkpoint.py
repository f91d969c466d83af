# SPDX-License-Identifier: Apache-2.0
"""Write a full-size Gemma 4 text checkpoint with random weights, in Hugging Face layout.

    python tools/random_checkpoint.py e2b DIR                          9.3 GB, one file, bfloat16
    python tools/random_checkpoint.py 26b-a4b DIR --shard-gb 5         50 GB in shards with an index
    python tools/random_checkpoint.py e2b-mini DIR --tokenizer tokenizer.json.xz
    python tools/random_checkpoint.py e2b DIR --layers 7                 2.2 GB, a cut: full width, few layers

For measuring speed and memory, and for tests of loading: such a model says nothing. Names and shapes are those of
`Gemma4ForCausalLM` / `Gemma4ForConditionalGeneration` (transformers 5.23, models/gemma4/modeling_gemma4.py), which
tests/test_house.py checks; neither torch nor transformers is needed here. Tensors are streamed: peak memory stays
below 1 GB for any size.
"""

import argparse
import json
import lzma
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}
SPECIAL_TOKENS = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
CHUNK = 1 << 22  # elements written at a time
Shapes = dict[str, tuple[int, ...]]

# What differs between the sizes (transformers' names, but for `pattern`: every pattern-th layer is global).
_E = {"hidden_size_per_layer_input": 256, "sliding_window": 512, "max_position_embeddings": 131072}
_BIG = {
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
    "num_kv_shared_layers": 0,
    "pattern": 6,
}
SIZES: dict[str, dict[str, Any]] = {
    "e2b": _E
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "pattern": 5,
    },
    "e4b": _E
    | {
        "hidden_size": 2560,
        "num_hidden_layers": 42,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "pattern": 6,
    },
    "12b": _BIG
    | {
        "hidden_size": 3840,
        "num_hidden_layers": 48,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "26b-a4b": _BIG
    | {
        "hidden_size": 2816,
        "num_hidden_layers": 30,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31b": _BIG
    | {
        "hidden_size": 5376,
        "num_hidden_layers": 60,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}
# As small as an image tower can be: some exporters of other engines refuse a model without one.
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": 16,
    "position_embedding_size": 10240,
}
# A mini keeps every branch of its size at full width with the fewest layers: one period of each kind of layer.
MINI_LAYERS = {"e2b": (10, 5), "e4b": (12, 6), "12b": (6, 0), "26b-a4b": (6, 0), "31b": (6, 0)}
for _size, (_layers, _shared) in MINI_LAYERS.items():
    SIZES[f"{_size}-mini"] = SIZES[_size] | {"num_hidden_layers": _layers, "num_kv_shared_layers": _shared}


def text_config(size: str, dtype: str = "bfloat16", **changes: Any) -> dict[str, Any]:
    """The `text_config` of one of SIZES, spelled as the released files spell it; `changes` replaces single entries.

    Raises ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
    config = SIZES[size] | changes
    pattern = config.pop("pattern")
    layers = range(1, config["num_hidden_layers"] + 1)
    return {
        "model_type": "gemma4_text",
        "dtype": dtype,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": ["sliding_attention" if i % pattern else "full_attention" for i in layers],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    } | config


def cut(size: str, layers: int, shared: int | None = None) -> dict[str, Any]:
    """The entries of `text_config` that make a cut of one of SIZES: fewer layers, everything else as it is.

    The last `shared` layers borrow keys (default: as large a part as in the whole model). Counted from its end, every
    `pattern`-th layer of the part that makes keys is global, and so in the part that borrows them, as in whole models.
    Raises ValueError if there is nothing to borrow from.
    """
    whole, pattern = SIZES[size], SIZES[size]["pattern"]
    if shared is None:
        shared = layers * whole["num_kv_shared_layers"] // whole["num_hidden_layers"]
    own = layers - shared
    if own < 1 or shared < 0 or (shared and not whole["num_kv_shared_layers"]):
        raise ValueError(f"{size} has no cut of {layers} layers of which {shared} borrow keys")
    kinds = [
        "full_attention" if left % pattern == 0 else "sliding_attention"
        for part in (own, shared)
        for left in reversed(range(part))
    ]
    if missing := set(kinds[own:]) - set(kinds[:own]):
        raise ValueError(f"{shared} layers cannot borrow keys: none of the {own} before them is {missing.pop()}")
    return {"num_hidden_layers": layers, "num_kv_shared_layers": shared, "layer_types": kinds}


def layer_shapes(config: dict[str, Any], layer: int, dead_kv: bool = False) -> Shapes:
    """Name (without `layers.{layer}.`) -> shape of one layer's tensors.

    dead_kv: also keys and values of the layers that borrow an earlier layer's; released E2B and E4B files hold them.
    """
    d = config["hidden_size"]
    shared = layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]
    return (
        _attention_shapes(config, layer, has_kv=dead_kv or not shared)
        | _mlp_shapes(d, config["intermediate_size"] * (2 if shared and config["use_double_wide_mlp"] else 1))
        | (_moe_shapes(config) if config["enable_moe_block"] else {})
        | (_ple_shapes(d, config["hidden_size_per_layer_input"]) if config["hidden_size_per_layer_input"] else {})
        | {"layer_scalar": (1,)}
    )


def _attention_shapes(config: dict[str, Any], layer: int, has_kv: bool) -> Shapes:
    d, is_global = config["hidden_size"], config["layer_types"][layer] == "full_attention"
    head = config["global_head_dim" if is_global else "head_dim"]
    q = config["num_attention_heads"] * head
    n_kv = config["num_key_value_heads"]
    if is_global and config["attention_k_eq_v"]:
        n_kv = config.get("num_global_key_value_heads", n_kv)
    shapes: Shapes = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.q_norm.weight": (head,),
        "self_attn.o_proj.weight": (d, q),
    }
    if has_kv:
        shapes |= {"self_attn.k_proj.weight": (n_kv * head, d), "self_attn.k_norm.weight": (head,)}
        if not (is_global and config["attention_k_eq_v"]):
            shapes["self_attn.v_proj.weight"] = (n_kv * head, d)
    return shapes


def _mlp_shapes(d: int, width: int) -> Shapes:
    return {
        "pre_feedforward_layernorm.weight": (d,),
        "post_feedforward_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (width, d),
        "mlp.up_proj.weight": (width, d),
        "mlp.down_proj.weight": (d, width),
    }


def _moe_shapes(config: dict[str, Any]) -> Shapes:
    d, n, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    return {
        "pre_feedforward_layernorm_2.weight": (d,),
        "post_feedforward_layernorm_1.weight": (d,),
        "post_feedforward_layernorm_2.weight": (d,),
        "router.scale": (d,),
        "router.per_expert_scale": (n,),
        "router.proj.weight": (n, d),
        "experts.gate_up_proj": (n, 2 * width, d),
        "experts.down_proj": (n, d, width),
    }


def _ple_shapes(d: int, width: int) -> Shapes:
    return {
        "per_layer_input_gate.weight": (width, d),
        "per_layer_projection.weight": (d, width),
        "post_per_layer_input_norm.weight": (d,),
    }


def tensor_shapes(config: dict[str, Any], prefix: str = "model.", dead_kv: bool = False) -> Shapes:
    """Name -> shape of every tensor of the checkpoint; the head is tied, so there is no `lm_head.weight`."""
    d, n = config["hidden_size"], config["num_hidden_layers"]
    shapes: Shapes = {"embed_tokens.weight": (config["vocab_size"], d)}
    if ple := config["hidden_size_per_layer_input"]:
        shapes |= {
            "embed_tokens_per_layer.weight": (config["vocab_size_per_layer_input"], n * ple),
            "per_layer_model_projection.weight": (n * ple, d),
            "per_layer_projection_norm.weight": (ple,),
        }
    for i in range(n):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(config, i, dead_kv).items()}
    return {prefix + name: shape for name, shape in (shapes | {"norm.weight": (d,)}).items()}


def vision_shapes(text: dict[str, Any]) -> Shapes:
    """Name -> shape of every tensor of the image tower VISION and of its projection into that text model."""
    d, width, rows = VISION["hidden_size"], VISION["intermediate_size"], VISION["position_embedding_size"]
    heads = VISION["num_attention_heads"] * VISION["head_dim"]
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layer: Shapes = {f"self_attn.{name}_proj.linear.weight": (heads, d) for name in "qkv"}
    layer |= {"self_attn.o_proj.linear.weight": (d, heads), "mlp.down_proj.linear.weight": (d, width)}
    layer |= {f"mlp.{name}_proj.linear.weight": (width, d) for name in ("gate", "up")}
    layer |= {f"self_attn.{name}_norm.weight": (VISION["head_dim"],) for name in "qk"}
    layer |= {f"{name}_layernorm.weight": (d,) for name in norms}
    patches, tower = "model.vision_tower.patch_embedder.", "model.vision_tower.encoder.layers."
    shapes: Shapes = {
        f"{patches}position_embedding_table": (2, rows, d),
        f"{patches}input_proj.weight": (d, 3 * VISION["patch_size"] ** 2),
        "model.embed_vision.embedding_projection.weight": (text["hidden_size"], d),
    }
    return shapes | {
        f"{tower}{i}.{name}": shape for i in range(VISION["num_hidden_layers"]) for name, shape in layer.items()
    }


class RandomWeights:
    """Values for a tensor, in chunks: N(0, 0.02) for matrices, near 1 for norms and scales.

    Values are drawn once and then read from random places of that pool: as fast as a disk, and no row repeats.
    """

    def __init__(self, dtype: np.dtype[Any], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.dtype = dtype
        self.pool = (self.random.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(dtype)

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray[Any, Any]]:
        """One-dimensional pieces of the tensor, in order."""
        left = int(np.prod(shape))
        if re.search(r"norm(_\d)?\.weight$|scalar$|scale$", name):
            yield self.random.normal(1.0, 0.05, left).astype(self.dtype)
            return
        while left:
            n = min(left, CHUNK)
            start = int(self.random.integers(0, self.pool.size - n + 1))
            yield self.pool[start : start + n]
            left -= n


def shards(shapes: Shapes, itemsize: int, limit: int) -> list[Shapes]:
    """The tensors in order, cut into files of at most `limit` bytes (a larger tensor gets its own); 0 = one file."""
    files: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        n = int(np.prod(shape)) * itemsize
        if limit and files[-1] and size + n > limit:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += n
    return files


def write_safetensors(file: BinaryIO, shapes: Shapes, dtype: str, weights: RandomWeights | None) -> int:
    """Write one file in the safetensors format; returns the number of bytes of tensor data.

    Without weights all values are zeros that take no room on the disk, where the file system can leave holes.
    """
    code, np_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * np_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    if weights is None:
        file.truncate(file.tell() + end)
        return end
    for name, shape in shapes.items():
        for chunk in weights.chunks(name, shape):
            file.write(chunk.tobytes())
    return end


def write_tensors(out: Path, shapes: Shapes, dtype: str, seed: int, shard_bytes: int) -> int:
    """Write `model.safetensors`, or shards and their index; returns the number of bytes of tensor data."""
    weights = RandomWeights(DTYPES[dtype][1], seed)
    files = shards(shapes, weights.dtype.itemsize, shard_bytes)
    total, index = 0, {}
    for i, part in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        with open(out / name, "wb") as file:
            total += write_safetensors(file, part, dtype, weights)
        index |= dict.fromkeys(part, name)
    if len(files) > 1:
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return total


def model_config(text: dict[str, Any], multimodal: bool, vision: bool = False) -> dict[str, Any]:
    """The whole config.json: the text model alone, or as the text part of the multimodal class (without towers, or with
    the image tower VISION)."""
    if not multimodal:
        return {"architectures": ["Gemma4ForCausalLM"]} | text
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": text["dtype"],
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": VISION if vision else None,
        "audio_config": None,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _write_tokenizer(out: Path, tokenizer: Path) -> None:
    data = tokenizer.read_bytes()
    (out / "tokenizer.json").write_bytes(lzma.decompress(data) if tokenizer.suffix == ".xz" else data)
    _write_json(out / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"} | SPECIAL_TOKENS)


def write_configs(out: Path, config: dict[str, Any], tokenizer: Path | None) -> None:
    """Everything but the weights into the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", config)
    generation = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    _write_json(
        out / "generation_config.json", generation | {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    )
    if tokenizer:
        _write_tokenizer(out, tokenizer)


def write_checkpoint(
    out: Path,
    text: dict[str, Any],
    *,
    multimodal: bool = True,
    dead_kv: bool = False,
    vision: bool = False,
    tokenizer: Path | None = None,
    seed: int = 0,
    shard_bytes: int = 0,
) -> int:
    """Write configs, tokenizer (if given) and weights into the directory `out`; returns the bytes of tensor data.

    vision: with the image tower VISION; only the multimodal class has one (ValueError).
    """
    if vision and not multimodal:
        raise ValueError("a text-only checkpoint has no image tower; leave out either")
    write_configs(out, model_config(text, multimodal, vision), tokenizer)
    shapes = tensor_shapes(text, "model.language_model." if multimodal else "model.", dead_kv)
    shapes |= vision_shapes(text) if vision else {}
    return write_tensors(out, shapes, text["dtype"], seed, shard_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description="write a Gemma 4 text checkpoint with random weights")
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("out", type=Path, help="directory to write into")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--text-only", action="store_true", help="Gemma4ForCausalLM: prefix model., no text_config")
    parser.add_argument("--dead-kv", action="store_true", help="also the unused k/v that released files hold")
    parser.add_argument("--vision", action="store_true", help="with an image tower, as small as can be")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or tokenizer.json.xz to put beside it")
    parser.add_argument("--vocab", type=int, default=262144, help="rows of both embedding tables")
    parser.add_argument("--layers", type=int, help="fewer than the size has: a cut of full width")
    parser.add_argument("--shared", type=int, help="of --layers, the last so many borrow keys (default: in proportion)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=0, help="cut into files of at most this size (0: one file)")
    args = parser.parse_args()
    if args.vision and args.text_only:
        parser.error("a text-only checkpoint has no image tower: leave out --vision or --text-only")
    if args.shared is not None and not args.layers:
        parser.error("--shared says how many of --layers borrow keys: give both")
    try:
        changes = cut(args.size, args.layers, args.shared) if args.layers else {}
    except ValueError as error:
        parser.error(str(error))
    changes |= {"vocab_size": args.vocab, "vocab_size_per_layer_input": args.vocab}
    text = text_config(args.size, args.dtype, **changes)
    total = write_checkpoint(
        args.out,
        text,
        multimodal=not args.text_only,
        dead_kv=args.dead_kv,
        vision=args.vision,
        tokenizer=args.tokenizer,
        seed=args.seed,
        shard_bytes=int(args.shard_gb * 1e9),
    )
    print(f"{args.out}: {args.size}, {args.dtype}, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
