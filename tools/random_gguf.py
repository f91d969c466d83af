# SPDX-License-Identifier: Apache-2.0
"""Write a full-size Gemma 4 text model with random weights as a GGUF file, without a checkpoint to quantise.

    python tools/random_gguf.py 26b-a4b 26b-a4b-q4_0.gguf --type Q4_0 --tokenizer tests/data/tokenizer.json.xz

14 GB in a minute or two, where the bf16 checkpoint would be 50 GB. For measuring speed and memory: the file is what
`gemma4 quantize` writes (its keys, its choice of types), filled with blocks of random weights. It wants gemma4
installed.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from random_checkpoint import SIZES, model_config, tensor_shapes, text_config, write_configs, write_safetensors

from gemma4.load import open_checkpoint
from gemma4.load.mapped import TensorInfo
from gemma4.quantization.codec import pack_rows
from gemma4.quantization.gguf_file import head, laid_out, padding
from gemma4.quantization.metadata import made_tensors, metadata
from gemma4.quantization.plan import KINDS, checked_type, plan

POOL = 1 << 22  # weights of a type that are packed once; a whole number of every block
CHUNK = 1 << 24  # bytes written at a time


class RandomBlocks:
    """Bytes of tensors: N(0, 0.02) in matrices, near 1 in norms and scales. A pool of each type is packed once, and
    tensors begin at random blocks of it, so that writing goes as fast as the disk."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.pools: dict[str, NDArray[np.uint8]] = {}

    def chunks(self, tensor: TensorInfo) -> Iterator[NDArray[np.uint8]]:
        if len(tensor.shape) == 1:
            yield self.random.normal(1.0, 0.05, tensor.shape).astype(np.float32).view(np.uint8)
            return
        if tensor.dtype not in self.pools:
            values = self.random.standard_normal((POOL // 256, 256), dtype=np.float32) * np.float32(0.02)
            self.pools[tensor.dtype] = pack_rows(tensor.dtype, values)
        pool = self.pools[tensor.dtype]
        left = tensor.nbytes
        while left:
            some = pool[self.random.integers(0, len(pool) // 2) :].reshape(-1)[: min(left, CHUNK)]
            yield some
            left -= len(some)


def write_tensor(file: BinaryIO, tensor: TensorInfo, blocks: RandomBlocks) -> None:
    for chunk in blocks.chunks(tensor):
        file.write(chunk.tobytes())
    file.write(bytes(padding(tensor.nbytes)))


def write_gguf(out: Path, text: dict[str, Any], kind: str, tokenizer: Path, seed: int = 0) -> int:
    """Write the file; returns its size in bytes. The checkpoint that it stands for is a file of holes for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder), model_config(text, multimodal=False), tokenizer)
        with open(Path(folder, "model.safetensors"), "wb") as file:
            write_safetensors(file, tensor_shapes(text), text["dtype"], None)
        with open_checkpoint(folder) as checkpoint, open(out, "wb") as file:
            planned, _ = plan(checkpoint, kind, {})
            made = made_tensors(checkpoint.config)
            more = [(name, "F32", values.shape) for name, values in made.items()]
            tensors = laid_out([*((t.name, t.dtype, t.shape) for t in planned), *more])
            file.write(head(metadata(checkpoint, kind) | {"general.name": out.stem}, tensors))
            blocks = RandomBlocks(seed)
            for tensor in tensors[: len(planned)]:
                write_tensor(file, tensor, blocks)
            for values in made.values():
                file.write(values.tobytes())
            return file.tell()


def main() -> None:
    parser = argparse.ArgumentParser(description="write a Gemma 4 text model with random weights as GGUF")
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--type", default="Q4_0", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or tokenizer.json.xz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = write_gguf(args.out, text_config(args.size), checked_type(args.type, KINDS), args.tokenizer, args.seed)
    print(f"{args.out}: {args.size}, {args.type.upper()}, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
