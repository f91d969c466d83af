# SPDX-License-Identifier: Apache-2.0
"""The C engine (csrc/). Typed by hand; csrc/python/ implements it.

Nothing here parses files or knows names of checkpoints beyond Hugging Face's text-model tensor names; the package
around it (gemma4/load) does. Every call releases the GIL while it computes.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
F64: TypeAlias = NDArray[np.float64]

class LayerConfig(TypedDict):
    window: int  # keys up to its own that a query may see, itself included; 0 = all (a global layer)
    ahead: int  # keys after its own that it may see, as far as its run's `ends` go: 0 = none, 1 << 30 = all of them
    head_dim: int
    n_kv_heads: int
    d_mlp: int
    kv_source: int  # the layer whose keys and values this one attends to: its own index, or an earlier layer's
    k_eq_v: bool  # values are the normed k_proj output; there is no v_proj
    moe: bool
    rope: int  # index into Config["rope_inv_freq"]

class Config(TypedDict):
    d_model: int
    n_heads: int
    d_vocab: int
    d_ple: int  # width of a per-layer embedding; 0 = the model has none
    d_vocab_ple: int
    rms_norm_eps: float
    logit_softcap: float  # 0 = none
    embed_scale: float  # factor of the embedding table's rows
    ple_scale: float  # the same for the per-layer table
    pad_token: int  # positions without a token read its row of the per-layer table
    # embed_tokens_per_layer lies in the mapping of a *file*: its pages are released (madvise) after rows were read
    ple_on_disk: bool
    attention_scale: float  # factor of query-key dot products
    attention_softcap: float  # of the scaled scores, before the mask; 0 = none
    q_norm: bool  # RMSNorm of each head's query, and so on
    k_norm: bool
    v_norm: bool  # without a gain
    post_norms: bool  # outputs of attention and MLP pass a norm before the residual add
    layer_scalar: bool  # a layer multiplies the residual stream at its end
    unit_gains: bool  # norms are stored as w and multiply by 1 + w
    tied: bool  # the head is the embedding table; else there is a tensor lm_head.weight
    context_length: int
    n_experts: int
    top_k_experts: int
    d_expert: int
    rope_inv_freq: list[F32]  # each [head_dim / 2]
    layers: list[LayerConfig]

# name without the checkpoint's prefix ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "lm_head.weight" if
# untied) -> (dtype, shape, buffer, byte offset in the buffer). dtype: "F32", "F16", "BF16", or for matrices a block
# format of GGUF: "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
# "IQ4_XS". Experts: "experts.gate_up_proj" [E, 2M, D], or "experts.gate_proj" and "experts.up_proj" [E, M, D].
Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int, ...], Any, int]]

# sequence · token ids int32 [T] (or None; below 0: this position is an embedding) · embeddings float32 [T, d_model] (or
# None; already scaled; the per-layer table's row is the pad token's, 0; rows that have a token are not read)
# · positions within the run that need logits int32 [n] ascending (or None) · logits output float32 [n, d_vocab]
# (or None) · and, if some positions see later ones, ends int32 [T] ascending (or None): position i of the run sees
# positions before ends[i], i < ends[i] <= T, as far as each layer's `ahead` allows. No chunk divides such a stretch.
# · and, if layers before start_at_layer do not run, the residual stream resid float32 [T, d_model] that enters it (or
# None; all runs of a step have one, or none).
# · and what to find in each of the rows of logits (Picks, or None); then the array of logits may be None.
Run: TypeAlias = (
    tuple[Sequence, I32 | None, F32 | None, I32 | None, F32 | None]
    | tuple[Sequence, I32 | None, F32 | None, I32 | None, F32 | None, I32 | None]
    | tuple[Sequence, I32 | None, F32 | None, I32 | None, F32 | None, I32 | None, F32 | None]
    | tuple[Sequence, I32 | None, F32 | None, I32 | None, F32 | None, I32 | None, F32 | None, Picks | None]
)

# The largest logits of n rows: list the k largest and all equal to the last of them · list also those at most `within`
# below the largest (0: neither) · whether to sum · ids int32 [n, vocab], ascending, no -inf · their logits float32 [n,
# vocab] · found float64 [n, 4]: id of the largest (the lowest among equals), the largest (NaN if any is; then the rest
# is 0 and NaN), how many are listed, log of the sum of e^logit. Of ids and values only the listed entries are written.
Picks: TypeAlias = tuple[int, float, bool, I32, F32, F64]

# Copy a site out: site id · layer (0 for model-wide sites) · run index · array · rows.
#   array  C-contiguous float32 (int32 for expert ids) with the site's dims; "T" = number of rows kept, "S" = sequence
#          length after the step. Rows that the step never reaches are not written: pass zeros.
#   rows   int32 [T]: where in `array` each position of the run goes, -1 = not kept; None = all, in order.
#          ("SKh" sites ignore it.)
# Edit a site with a function: site id · layer · run index · callable · None. It gets a fresh array with the site's dims
# and returns None (no change, or edited in place) or an array of the same shape. A run with a function is never split
# into chunks, and none of its positions is skipped in shared-KV layers.
# Edit a site by arithmetic: site id · layer · run index · Edit · rows. Without Python and the GIL, chunks or no chunks.
#   rows   int32 [T]: for each position its index on the values' row axis, -1 = unchanged; None = 0, 1, 2, ...
Tap: TypeAlias = tuple[int, int, int, "NDArray[Any] | Callable[[NDArray[Any]], Any] | Edit", I32 | None]

# "add" (x += factor * value), "scale" (x *= factor), "set" (x = value), "project_out" (x -= factor * (x.v)/(v.v) * v
# along the last axis), "clamp" (min(max(x, low), high)) · factor · low · high · values, float32 with the site's number
# of dims and strides >= 0 (0: broadcast), or None · for each axis the span (first, end) that is edited, (0, 0): all
Edit: TypeAlias = tuple[str, float, float, float, F32 | None, tuple[tuple[int, int], ...]]

# A row of csrc/model/sites.inc: name · site id · layer (0 for model-wide sites) · dims ("T", "S" or a size) · "float32"
# or "int32" · meaning of "S": "" (there is none), "cached", "scores" or "pattern" · whether rows are pruned before it,
# in the last layer that computes keys · whether it can be changed · the axes' letters in sites.inc, as "THh"
SiteRow: TypeAlias = tuple[str, int, int, tuple[str | int, ...], str, str, bool, bool, str]

class Model:
    def __init__(self, config: Config, tensors: Tensors, *, threads: int = 0, precision: str = "exact") -> None:
        """Check names, shapes and dtypes and keep views of the weights (they are not copied).

        threads: 0 = the physical cores this process may use, at most its CPU quota. precision: "exact", "high" or
        "fast".
        Raises FormatError (missing tensor, wrong shape or dtype: got, expected), ValueError (config out of range).
        """
    threads: int  # read-only
    precision: Literal["exact", "high", "fast"]  # read-only
    isa: str  # read-only: "scalar", "avx2", "avx512"
    weight_bytes: int
    def new_sequence(self, *, kv_dtype: str = "f32", capacity: int = 0) -> Sequence:
        """An empty sequence. kv_dtype "f32", "f16", "bf16" or "q8_0"; capacity in positions, 0: all of the context."""
    def sites(self) -> list[SiteRow]:
        """Every site this model has, in forward order."""
    def step(
        self,
        runs: Seq[Run],
        taps: Seq[Tap] = (),
        *,
        stop_at_layer: int = -1,
        start_at_layer: int = 0,
        max_chunk: int = 0,
        in_order: bool = False,
        profile: F64 | None = None,
    ) -> None:
        """One ragged forward pass over any number of runs (sequences must differ).

        Long runs are cut into chunks of at most max_chunk rows in all (0 = 512); with precision "exact" results do
        not depend on it. in_order: a run is begun only once those before it are complete, so that its edits may read
        arrays that taps of those fill. On success every sequence has grown by its run. With stop_at_layer = n only
        layers 0..n-1 run, nothing is appended to the sequences, and logits must be None. With runs' resid layers
        start_at_layer, ... run on it, and nothing is appended either; each must compute its keys, or read those of a
        layer that runs.
        profile: float64 [len(profile_ops()), 6], to which the step adds each operation's calls, seconds, float32
        operations, integer operations, bfloat16 operations and bytes; the seconds add up to those of the step.
        Raises ValueError (token id out of range, empty run, bad rows), CapacityError (context overflow),
        StateError (closed sequence, or one in use by another thread), KeyboardInterrupt (within 100 ms of Ctrl-C;
        sequences keep whole chunks only: see `Sequence.length`), and any exception of an edit.
        """

class GuardedMap:
    """A read-only buffer over a mapped file. If the file loses pages while it is held, they read as zeros instead of
    ending the process by SIGBUS. A step or an encoding that has read such a page raises FormatError, and sequences
    keep their contents. Any other SIGBUS goes to the process's own handler."""

    def __init__(self, map: Any) -> None:
        """map: a result of `mmap.mmap`; it stays mapped as long as this object or a view of it is held."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def is_torn(self) -> bool:
        """Whether a lost page was read. Also reinstalls the handler if another one replaced it."""

class Sequence:
    length: int  # positions in the cache (read-only, as are the others)
    capacity: int
    kv_dtype: str
    closed: bool
    min_truncate: int  # the smallest length > 0 that truncate() accepts (sliding layers evict)
    nbytes: int
    def fork(self) -> Sequence:
        """An independent copy (copy-on-write, per layer)."""
    def truncate(self, length: int) -> None:
        """Drop positions >= length. 0 empties. Raises StateError below min_truncate."""
    def close(self) -> None: ...
    def state(self) -> dict[str, Any]:
        """{"length": int, "kv_dtype": str, "layers": {layer: (first position, k, v)}}; k, v are copies [n, K, h]
        (float32, float16, bf16 bits as uint16, or Q8_0 blocks as uint8)."""
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore into an empty sequence of the same model and kv_dtype. Raises ValueError on any mismatch."""

class EncoderConfig(TypedDict):
    """Sizes that a kind does not have are 0."""

    kind: str  # "vision_tower", "vision_embedder", "audio_tower", "audio_embedder"
    d_in: int  # values of an input row: a patch's pixels, a frame's mel bins or samples
    d_soft: int  # width of the projection's input
    d_out: int  # d_model of the text model
    rms_norm_eps: float
    on_disk: bool  # the layers' linear weights are file mappings, whose pages may be released
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    clipped: bool
    n_positions: int
    pool: int
    standardize: bool
    rope_inv_freq: F32  # [head_dim / 4], of either axis
    conv_channels: tuple[int, int]
    conv_kernel: int
    chunk: int  # of audio attention, and its context, as in transformers' config
    context_left: int
    context_right: int
    logit_cap: float
    residual_weight: float
    gradient_clipping: float

# rows float32 [n, d_in] (patches in 0..1, log-mel frames, frames of samples) · positions int32 [n, 2] (x, y of each
# patch; None for audio) · where the soft tokens go, float32 [soft_tokens(n), d_out]
Medium: TypeAlias = tuple[F32, I32 | None, F32]

# site id · layer (0 for sites of the whole encoder) · index of the medium · where it goes, with the site's dims, or a
# callable or Edit that changes it · rows, as in Tap: of the site's axis "T", "N" or "U"
EncoderTap: TypeAlias = tuple[int, int, int, NDArray[Any] | Callable[[NDArray[Any]], Any] | Edit, I32 | None]

class Encoder:
    def __init__(self, model: Model, config: EncoderConfig, tensors: Tensors) -> None:
        """An image or audio encoder that computes on the model's threads. tensors: names as in Hugging Face files,
        without the folder ("encoder.layers.0.mlp.up_proj.linear.weight", "embedding_projection.weight").
        A model of precision "fast" copies the weights of layers as integers. Raises FormatError and ValueError as
        Model does, KeyboardInterrupt.
        """
    weight_bytes: int
    copied_bytes: int  # its own copies, besides weight_bytes
    def sites(self) -> list[SiteRow]:
        """As Model.sites(); dims: "T", "S" rows inside the encoder, "N" soft tokens, "U" half the input rows."""
    def soft_tokens(self, n_rows: int) -> int:
        """Soft tokens of a medium of n_rows input rows."""
    def encode(self, media: Seq[Medium], taps: Seq[EncoderTap] = (), *, profile: F64 | None = None) -> None:
        """All media in one ragged pass; results do not depend on the other media. profile: as in Model.step.

        Raises ValueError (positions out of range, a grid that does not pool), KeyboardInterrupt, and any exception of
        an edit.
        """

class Threads:
    n: int  # the caller included
    def __init__(self, n: int = 0) -> None:
        """Worker threads that several objects share; their calls take turns. 0: one per core."""

class FeatureEncoder:
    def __init__(
        self,
        threads: Threads,
        dtype: str,
        weights: NDArray[Any],
        inputs_first: bool,
        *,
        before: F32 | None = None,
        scale: F32 | None = None,
        after: F32 | None = None,
        gate: F32 | None = None,
        threshold: F32 | None = None,
        k: int = 0,
    ) -> None:
        """The encoder of a dictionary, which reads `weights` in place: "F32", "F16" or "BF16" (as uint16), at any
        address, with contiguous rows: [inputs, features] if inputs_first, else [features, inputs].

        value = (x @ w + before) * scale + after, each vector float32 [features]. A feature fires where its value is
        above max(threshold, 0), and x @ w + gate > 0. k: only the k highest of a row, of equal ones the first; 0 = all.
        Raises ValueError, TypeError.
        """
    def encode(self, x: F32, first: int = 0, n: int = -1) -> tuple[NDArray[np.int64], I32, F32]:
        """(offsets [m + 1], ids, values) of x [m, inputs]: row i has the entries offsets[i] to offsets[i + 1] - 1, by
        ascending id. Only the features [first, first + n), -1: all others. The same bits whatever the other rows, the
        threads and the instruction set.

        Raises FormatError (weights that give NaN or infinities), ValueError, MemoryError, KeyboardInterrupt.
        """

def cpu_info() -> dict[str, Any]:
    """{"isa": active level, "available": [...], "threads": default count, "blas": config string or ""}

    Levels: "scalar"; on x86-64 "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"; on Arm "neon",
    "neon_dotprod", "neon_i8mm". The best one is active, or the one that GEMMA4_ISA names.
    """

def text_tensors(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the config needs (csrc/model/text/weights.c has the table)."""

def encoder_tensors(config: EncoderConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The same for an encoder (csrc/model/encoders/); a bound is (1,). Raises ValueError if sizes are out of range."""

def profile_ops() -> tuple[str, ...]:
    """Names of a profile's rows."""

def arithmetic_rate(kind: str, threads: int) -> float:
    """Operations per second (a multiply-add counts as two) of a loop in registers on all threads, about 10 ms long.

    kind: "f32" (fma), "int8" (4-bit weights times bytes, as summed in the text model with precision="fast"), "int16"
    (16-bit products added in pairs, as in encoders with precision="fast") or "bf16" (0 without instructions).
    """

def read_rate(array: F32, threads: int) -> tuple[float, float]:
    """Bytes per second of reading the array once with all threads, and the sum of its values."""

def dequantize(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> F32:
    """A tensor's values, float32 of that shape, equal to the bit to those of the gguf package's dequantiser.

    Raises FormatError (unknown dtype, rows that are not a multiple of the block size, data outside the buffer).
    """

# testing: kernel entry points for tests/, one per row of csrc/kernels/kernels.inc
testing: Any

def top_logits(logits: F32, picks: Picks) -> None:
    """The largest of logits [vocab], as a step finds them in its own: n is 1. Raises ValueError, TypeError."""

def nucleus_floor(weights: F32, share: float) -> float:
    """The smallest of the fewest of the largest weights [n] that sum to at least `share` of all; n >= 1.

    Weights are 0 to 1, one of them above 0. Sums are float64. Raises ValueError (no weights), TypeError.
    """

def draw(weights: F32, least: float, unit: float) -> int:
    """The first index up to which the weights [n] that are >= least sum to more than `unit` of all those.

    0 <= unit < 1. Never one of weight 0. Sums are float64. Raises ValueError (no weight is above 0 and >= least),
    TypeError.
    """
