# SPDX-License-Identifier: Apache-2.0
"""Model.profile, the machine's limits and `gemma4 bench`."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_models import E_LIKE, SLOW, write_checkpoint

import gemma4
from gemma4 import _engine
from gemma4.bench import bench, measure_limits
from gemma4.cli import main
from gemma4.load.dtypes import row_bytes
from gemma4.profile import ROW_OPS, Limits, OpTotal, Profile
from gemma4.quantization import quantize

TABLES = {"embedding rows", "per-layer rows"}
LIMITS = Limits(read_bytes=10e9, f32_work=100e9, int8_work=400e9, int16_work=200e9, bf16_work=1000e9)


def by_name(profile: Profile) -> dict[str, OpTotal]:
    return {op.name: op for op in profile.ops}


def matrix_bytes(model: gemma4.Model, *suffixes: str) -> int:
    """Stored bytes of the text model's matrices with these endings."""
    total = 0
    for name, (dtype, shape, _, _) in model.checkpoint.engine_tensors.items():
        if name.endswith(suffixes):
            total += int(np.prod(shape[:-1])) * row_bytes(dtype, shape[-1])
    return total


# ---- the profile --------------------------------------------------------------------------------------------------


def test_calls_bytes_and_work_of_one_token(random_e):
    with random_e.new_sequence() as sequence, random_e.profile() as profile:
        random_e.forward(np.array([5], np.int32), sequence=sequence, logits="last")
    ops = by_name(profile)
    layers = E_LIKE["num_hidden_layers"]
    own_kv = layers - E_LIKE["num_kv_shared_layers"]
    expected = {"q": layers, "k, v": own_kv, "o": layers, "gate, up": layers, "down": layers, "head": 1, "other": 1}
    expected |= {"attention, local": 4, "attention, global": 2, "embedding rows": 1, "per-layer gate": layers}
    assert {name: ops[name].calls for name in expected} == expected
    assert ops["norm"].calls == layers * (4 + 1 + 1) + 2 * own_kv + 2
    weights = {
        "q": ("self_attn.q_proj.weight",),
        "k, v": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "gate, up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": ("mlp.down_proj.weight",),
        "head": ("embed_tokens.weight",),
    }
    for name, suffixes in weights.items():
        stored = matrix_bytes(random_e, *suffixes)
        assert ops[name].bytes == stored
        assert ops[name].work == stored  # one row: two operations for each bf16 weight of two bytes
    assert set(ops) - set(expected) - ROW_OPS == {"per-layer rows", "per-layer context", "per-layer projection"}


def test_attention_counts_keys_in_the_window(random_e, prompt):
    """Every query of local layers sees at most 8 keys, of global layers all before it; keys are read once."""
    with random_e.profile() as profile:
        random_e.forward(prompt, logits="all")
    ops, n, heads = by_name(profile), len(prompt), E_LIKE["num_attention_heads"]
    window, local, whole = E_LIKE["sliding_window"], E_LIKE["head_dim"], E_LIKE["global_head_dim"]
    pairs = sum(min(i + 1, window) for i in range(n))
    assert ops["attention, local"].work == 4 * (4 * pairs * heads * local)
    assert ops["attention, global"].work == 2 * (4 * (n * (n + 1) // 2) * heads * whole)
    assert ops["attention, global"].bytes == 2 * (2 * n * whole * 4)
    assert ops["attention, local"].bytes == 4 * (2 * n * local * 4)


def test_attention_in_steps_counts_the_same(random_e, prompt):
    with random_e.profile() as fused:
        random_e.forward(prompt)
    with random_e.profile() as in_steps:
        random_e.run_with_cache(prompt, names="blocks.*.attn.hook_pattern")
    for name in ("attention, local", "attention, global"):
        assert by_name(in_steps)[name][3:] == by_name(fused)[name][3:]


def test_experts(random_moe):
    with random_moe.profile() as profile:
        random_moe.forward(np.array([5], np.int32), logits="last")
    ops = by_name(profile)
    layers, share = 6, 2 / 8  # 2 of 8 experts
    assert ops["experts gate, up"].calls == ops["experts down"].calls == ops["router"].calls == layers
    assert ops["experts gate, up"].bytes == share * matrix_bytes(random_moe, "experts.gate_up_proj")
    assert ops["experts down"].bytes == share * matrix_bytes(random_moe, "experts.down_proj")


def test_quantised_products_count_as_int8(tmp_path):
    quantize(write_checkpoint(tmp_path / "m", E_LIKE | {"hidden_size": 64}), tmp_path / "m.gguf", type="Q8_0")
    ids = np.array([5, 6, 7], np.int32)
    for precision, is_int8 in (("fast", True), ("exact", False)):
        with gemma4.load(tmp_path / "m.gguf", precision=precision) as model, model.profile() as profile:
            model.forward(ids)
        q = by_name(profile)["q"]
        values = sum(
            np.prod(shape) for name, (_, shape, _, _) in model.checkpoint.engine_tensors.items() if "q_proj" in name
        )
        assert (q.int8_work if is_int8 else q.work) == 2 * 3 * values
        assert (q.work if is_int8 else q.int8_work) == 0


def test_seconds_add_up_to_the_steps(tmp_path_factory):
    """The engine's clock against ours, on a model big enough that Python's part is small (the best of three tries: the
    system may take the processor away at any point)."""
    model = gemma4.load(
        write_checkpoint(
            tmp_path_factory.mktemp("slow"),
            SLOW | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        )
    )
    ids = np.arange(64, dtype=np.int32)
    model.forward(ids, logits="last")
    in_engine, in_other = [], []
    for _ in range(3):
        with model.profile() as profile:
            start = time.perf_counter()
            model.forward(ids, logits="last")
            seconds = time.perf_counter() - start
        assert profile.total.seconds <= seconds and profile.total.calls == 1
        in_engine.append(profile.total.seconds / seconds)
        in_other.append(by_name(profile)["other"].seconds / seconds)
    assert max(in_engine) > 0.8 and min(in_other) < 0.1


def test_profiling_changes_no_bit_and_ends_with_its_block(random_e, random_moe, prompt):
    plain = random_e.forward(prompt)
    with random_e.profile() as outer:
        random_moe.forward(prompt)  # another model
        with random_e.profile() as inner:
            np.testing.assert_array_equal(random_e.forward(prompt), plain)
    random_e.forward(prompt)
    assert inner.ops == outer.ops
    assert outer.total.calls == 1


def test_failed_steps_count_too(random_e, prompt):
    def fails(array, site):
        raise RuntimeError("no")

    with random_e.profile() as profile, pytest.raises(RuntimeError):
        random_e.run_with_hooks(prompt, [("blocks.0.hook_mlp_out", fails)])
    assert profile.total.calls == 1 and "head" not in by_name(profile)


def test_engine_checks_the_array(random_e):
    sequence = random_e.engine.new_sequence()
    run = (sequence, np.array([5], np.int32), None, None, None)
    shape = (len(_engine.profile_ops()), 6)
    wrong = (np.zeros(shape, np.float32), np.zeros((3, 6)), np.zeros((6, shape[0])).T, [0.0])
    for array in wrong:
        with pytest.raises(ValueError, match="profile: expected a C-contiguous float64"):
            random_e.engine.step([run], profile=array)
    read_only = np.zeros(shape)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="profile is read-only"):
        random_e.engine.step([run], profile=read_only)
    assert sequence.length == 0


def test_share_of_the_nearer_limit():
    op = OpTotal("q", 1, 1.0, work=50e9, int8_work=0.0, bf16_work=0.0, bytes=2e9)
    assert op.least_seconds(LIMITS) == pytest.approx(0.5)
    assert op._replace(bytes=8e9).least_seconds(LIMITS) == pytest.approx(0.8)
    assert op._replace(work=0.0, int8_work=100e9).least_seconds(LIMITS) == pytest.approx(0.25)
    assert op._replace(work=0.0, int8_work=100e9, part="audio").least_seconds(LIMITS) == pytest.approx(0.5)
    assert op._replace(work=0.0, bf16_work=400e9).least_seconds(LIMITS) == pytest.approx(0.4)
    assert op._replace(name="norm", bytes=8e9).least_seconds(LIMITS) == pytest.approx(0.5)  # from cache


def test_printed_profile(random_e, prompt):
    with random_e.profile() as profile:
        random_e.forward(prompt)
    text = str(profile)
    assert "gate, up" in text and "other" in text and "all" in text
    assert str(Profile())  # nothing ran


def test_engine_counts_what_the_benchmark_counts(random_dir, random_e, prompt, monkeypatch):
    """benchmarks/cost.py works from the checkpoint's shapes alone."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import cost

    n = len(prompt)
    sequence = random_e.new_sequence()
    with random_e.profile() as prefill:
        random_e.forward(prompt[:-1], sequence=sequence, logits="last")
    with random_e.profile() as decode:
        random_e.forward(prompt[-1:], sequence=sequence)
    expected = cost.of_model(random_dir, n - 1)
    assert sum(op.work for op in prefill.ops if op.name not in ROW_OPS | TABLES) == expected.prefill_flops
    assert (
        sum(op.streamed for op in decode.ops if op.name not in TABLES) == cost.of_model(random_dir, n).bytes_per_token
    )
    assert (expected.kind, expected.has_experts, expected.prefill_int8) == ("BF16", False, 0)


# ---- the machine --------------------------------------------------------------------------------------------------


def test_read_rate_reads_everything():
    array = np.arange(1_000_003, dtype=np.float32) % 7
    rate, total = _engine.read_rate(array, 2)
    assert rate > 0 and total == pytest.approx(float(array.sum(dtype=np.float64)), rel=1e-5)
    for bad in (array.astype(np.float64), array[::2], array[:0]):
        with pytest.raises(ValueError):
            _engine.read_rate(bad, 1)


@pytest.mark.parametrize("kind", ["f32", "int8", "int16"])
def test_arithmetic_rate_is_a_limit(kind):
    """Not more than eight 64-byte products a cycle at 10 GHz, and not less than a NumPy loop's."""
    rate = max(_engine.arithmetic_rate(kind, 1) for _ in range(5))
    assert 0.1e9 < rate < 2 * 64 * 8 * 10e9
    with pytest.raises(ValueError, match="threads"):
        _engine.arithmetic_rate(kind, -1)


def test_arithmetic_rate_of_bf16():
    """Where there are instructions for it, no slower than float32; else 0."""
    has_bf16 = gemma4.cpu_info()["isa"] in ("avx512_bf16", "amx")
    rate = max(_engine.arithmetic_rate("bf16", 1) for _ in range(3))
    assert rate > 0.1e9 if has_bf16 else rate == 0


def test_arithmetic_rate_names():
    with pytest.raises(ValueError, match='"f32", "int8", "int16" or "bf16"'):
        _engine.arithmetic_rate("f64", 1)


# ---- the command --------------------------------------------------------------------------------------------------


def test_bench_of_a_small_model(random_dir):
    result = bench(random_dir, prompt=64, decode=8, repeats=2, threads=1)
    assert len(result.prefill.seconds) == 2 and len(result.decode.seconds) == 3
    assert result.prefill.rate > 0 and result.decode.rate > 0 and result.load_s < 60
    assert result.prefill.profile.total.calls == 1 and result.decode.profile.total.calls == 4
    for speed in (result.prefill, result.decode):
        assert all(0 < share < 3 for share in speed.share(result.limits))  # loosely: others use the machine too
    assert result.peak_bytes > 0 and "1 threads" in result.how
    if sys.platform == "linux":
        resident, huge = result.weights  # of all maps of the file: other tests' models, too
        assert resident >= 1 << 16 and 0 <= huge <= resident and "of it in huge pages" in str(result)


def test_bench_shortens_the_prompt_to_the_context(random_dir):
    result = bench(random_dir, prompt=10_000, decode=6, repeats=1)
    assert result.prompt == 250 and "250 tokens, not 10000" in str(result)
    with pytest.raises(ValueError, match="context is 256"):
        bench(random_dir, decode=256)
    with pytest.raises(ValueError, match="at least"):
        bench(random_dir, repeats=0)


def test_bench_command(random_dir, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--prompt", "32", "--decode", "8", "--repeats", "1", "--profile", "--json", str(out)]
    assert main(["bench", str(random_dir), *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"prefill +[\d.e+]+ tokens/s .*% of peak arithmetic", text)
    assert re.search(r"decode +[\d.e+]+ tokens/s .*% of read bandwidth", text)
    assert text.count("gate, up") == 2 and "of limit" in text
    record = json.loads(out.read_text())
    assert record["prefill"]["tokens_per_s"] > 0 and record["limits"]["read_bytes"] > 1e8
    assert {op["name"] for op in record["decode"]["ops"]} >= {"q", "head", "other"}
    assert main(["bench", str(random_dir), "--repeats", "0"]) == 2


def test_bench_command_encodes_media(tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a b.png")
    out = tmp_path / "bench.json"
    options = ["--prompt", "8", "--decode", "4", "--repeats", "2", "--profile", "--json", str(out)]
    options += ["--image", str(tmp_path / "a b.png"), "--image-tokens", "140"]
    assert main(["bench", "tiny-e", *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"image +\S+/a b\.png: [\d.]+ ms, .* tokens/s .*, 126 soft tokens, \d+% of peak arithmetic", text)
    assert text.count("vision: gate, up") == 1 and "126 tokens" in " ".join(text.split())  # a long path wraps
    record = json.loads(out.read_text())[f"image {tmp_path}/a b.png"]
    assert len(record["seconds"]) == 2 and {op["part"] for op in record["ops"]} == {"vision"}
    assert main(["bench", "tiny-moe", "--image", str(tmp_path / "a b.png")]) == 2
    assert "a b.png: this model has no vision encoder" in capsys.readouterr().err


def test_limits_are_positive():
    limits = measure_limits(1)
    assert min(limits.read_bytes, limits.f32_work, limits.int8_work, limits.int16_work) > 1e8


# ---- idle ---------------------------------------------------------------------------------------------------------


def test_idle_pool_uses_no_cpu(random_e, prompt):
    """After a step the threads sleep: over a second the process uses next to none of it."""
    random_e.forward(prompt)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.02


def test_a_long_prompt_occupies_every_thread(tmp_path):
    """Beside the calling thread the pool's work, too, in steps that are large enough."""
    model = gemma4.load(write_checkpoint(tmp_path / "slow", SLOW), precision="exact", threads=2)
    ids = np.arange(300, dtype=np.int32)
    before = time.process_time(), time.thread_time()
    model.forward(ids, logits="last")
    process, caller = time.process_time() - before[0], time.thread_time() - before[1]
    assert process - caller > 0.1 * process
