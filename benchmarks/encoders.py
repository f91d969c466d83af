# SPDX-License-Identifier: Apache-2.0
"""The image and audio encoders at full size beside transformers, on random weights.

    python benchmarks/encoders.py [--encoder effective large audio] [--rounds 3] [--threads 2] [--json FILE]
                                  [--directory DIR]

Ours "exact" and "fast", and transformers (float32, its sdpa; its eager audio attention, there is no other) each in a
process of its own on the same checkpoint, which `--directory` keeps; they take turns in every round, with OpenBLAS's
sgemm in between. The input is the same: 2,160 patches, which are 240 soft tokens, or 30 s of audio. A short input warms
up. A rate counts the multiply-adds of matrix products and attention as two operations each. Ratios are medians over
rounds. Memory is the peak resident set of our process over what it had after its imports, and over the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import numpy as np

WIDTH, HEIGHT = 60, 36  # patches
FRAMES = 2999  # of 30 s
LARGE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}
EFFECTIVE = {"use_clipped_linears": True}
ENGINES = ("exact", "fast", "transformers")


# ---- checkpoints --------------------------------------------------------------------------------------------------


def tiny_text() -> dict[str, Any]:
    """A text model that costs nothing, of E2B's width."""
    layers = ["sliding_attention", "full_attention"]
    text = {"hidden_size": 1536, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": layers}
    return text | {"vocab_size": 256, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 0}


def write_checkpoint(encoder: str, directory: Path) -> None:
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig
    from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig

    torch.manual_seed(0)
    vision = {"effective": EFFECTIVE, "large": LARGE}.get(encoder)
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**tiny_text()),
        vision_config=None if vision is None else Gemma4VisionConfig(**vision),
        audio_config=Gemma4AudioConfig() if encoder == "audio" else None,
    )
    model = Gemma4ForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("k_norm.weight"):
                tensor.fill_(2 * tensor.shape[0] ** -0.5)  # scores of a spread that a trained model has
            elif name.endswith("std_bias"):
                tensor.zero_()
    model.save_pretrained(directory)


# ---- one engine, in its own process -------------------------------------------------------------------------------


def medium(encoder: str, d_in: int, short: bool) -> Any:
    """Patches and their positions, or a spectrogram."""
    rng = np.random.default_rng(0)
    if encoder == "audio":
        return rng.standard_normal((100 if short else FRAMES, d_in), dtype=np.float32)
    width, height = (6, 6) if short else (WIDTH, HEIGHT)
    y, x = np.divmod(np.arange(width * height), width)
    return rng.random((width * height, d_in), dtype=np.float32), np.stack([x, y], axis=1).astype(np.int32)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


class Ours:
    """This package."""

    def __init__(self, encoder: str, directory: Path, threads: int, precision: str) -> None:
        import gemma4
        import gemma4.media.audio
        import gemma4.media.image

        self.before = resident("VmRSS")
        self.name = encoder
        self.model = gemma4.load(directory, precision=precision, threads=threads)  # type: ignore[arg-type]
        self.encoder = self.model.audio if encoder == "audio" else self.model.vision
        self.d_in = self.encoder.config.d_in

    def encode(self, given: Any) -> np.ndarray:
        return self.encoder.encode([given])[0]

    def facts(self) -> dict[str, Any]:
        weights, copied = self.encoder.engine.weight_bytes, self.encoder.engine.copied_bytes
        peak = resident("VmHWM") - self.before
        return {
            "weight_bytes": weights,
            "copied_bytes": copied,
            "peak_bytes": peak,
            "work": self._audio_work() if self.name == "audio" else self._vision_work(),
            "preprocess_s": self._preprocess(),
        }

    def _vision_work(self) -> float:
        config, n = self.encoder.config, WIDTH * HEIGHT
        width = config.n_heads * config.head_dim
        layer = n * (4 * config.d_model * width + 3 * config.d_model * config.d_mlp) + 2 * n * n * width
        return 2 * (config.n_layers * layer + n * config.d_in * config.d_model + n // 9 * config.d_soft * config.d_out)

    def _audio_work(self) -> float:
        config = self.encoder.config
        n, d = self.encoder.engine.soft_tokens(FRAMES), config.d_model
        layer = n * d * (4 * config.d_mlp + 4 * d + 3 * d + config.conv_kernel + 2 * config.context_left)
        bins, (first, second) = config.d_in // 4, config.conv_channels
        convolutions = n * bins * 9 * (4 * first + first * second) + n * bins * second * d
        return 2 * (config.n_layers * layer + convolutions + n * d * config.d_soft + n * config.d_soft * config.d_out)

    def _preprocess(self) -> float:
        """Of a photograph of 1920 x 1152 pixels, decoded already; of 30 s at 16 kHz."""
        from gemma4.media import audio, image

        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (1152, 1920, 3), np.uint8)
        samples = rng.standard_normal(30 * 16000).astype(np.float32) / 10
        run = (lambda: audio.log_mel(samples)) if self.name == "audio" else lambda: image.preprocess(pixels, 280)
        return min(_timed(run) for _ in range(3))


class Transformers:
    def __init__(self, encoder: str, directory: Path, threads: int) -> None:
        import torch
        from transformers import Gemma4ForConditionalGeneration

        torch.set_num_threads(threads)
        model: Any = Gemma4ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa" if encoder != "audio" else None
        )
        self.torch, self.model, self.name = torch, model.eval().model, encoder
        config = model.config
        self.d_in = config.audio_config.subsampling_conv_channels[0] if encoder == "audio" else 768

    def encode(self, given: Any) -> np.ndarray:
        torch = self.torch
        with torch.no_grad():
            if self.name == "audio":
                mask = torch.ones(1, len(given), dtype=torch.bool)
                return self.model.get_audio_features(torch.from_numpy(given)[None], mask).pooler_output[0].numpy()
            patches, positions = (torch.from_numpy(array)[None] for array in given)
            return self.model.get_image_features(patches, positions.long()).pooler_output[0].numpy()

    def facts(self) -> dict[str, Any]:
        return {}


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def work(engine: str, encoder: str, directory: Path, threads: int) -> None:
    """Answers each line on stdin with one of JSON: "run" with the seconds of one pass, "facts" with what is known."""
    given = (encoder, directory, threads)
    model = Transformers(*given) if engine == "transformers" else Ours(*given, precision=engine)
    short, long = (medium(encoder, model.d_in, short) for short in (True, False))
    model.encode(short)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if line.strip() == "run":
            start = time.perf_counter()
            soft = model.encode(long)
            print(json.dumps(time.perf_counter() - start), flush=True)
            np.save(directory / f"{engine}.npy", soft)
        else:
            print(json.dumps(model.facts()), flush=True)


# ---- rounds -------------------------------------------------------------------------------------------------------


@contextmanager
def worker(engine: str, encoder: str, directory: Path, threads: int) -> Iterator[Callable[[str], Any]]:
    command = [sys.executable, __file__, "--worker", engine, "--encoder", encoder, "--directory", str(directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "--threads", str(threads)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def ask(question: str) -> Any:
            if question:
                print(question, file=stdin, flush=True)
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"the process of {engine} ended")
            return json.loads(line)

        ask("")
        yield ask
        stdin.close()


def sgemm(threads: int) -> float:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    code = "import machine; print(machine.sgemm_flops())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
    )
    return float(done.stdout)


def measure(encoder: str, rounds: int, threads: int, directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        write_checkpoint(encoder, directory)
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    flops = []
    with (
        worker("exact", encoder, directory, threads) as exact,
        worker("fast", encoder, directory, threads) as fast,
        worker("transformers", encoder, directory, threads) as theirs,
    ):
        for _ in range(rounds):
            for engine, ask in zip(ENGINES, (exact, fast, theirs), strict=True):
                seconds[engine].append(ask("run"))
            flops.append(sgemm(threads))
        facts = {"exact": exact("facts"), "fast": fast("facts")}
    soft = {engine: np.load(directory / f"{engine}.npy").astype(np.float64) for engine in ENGINES}
    return {"encoder": encoder, "threads": threads, "seconds": seconds, "sgemm_flops": flops, "facts": facts} | summary(
        seconds, flops, facts, soft
    )


def summary(
    seconds: dict[str, list[float]], flops: list[float], facts: dict[str, Any], soft: dict[str, np.ndarray]
) -> dict[str, Any]:
    a, b = soft["exact"], soft["fast"]
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    total = facts["exact"]["work"]
    return {
        "share_of_sgemm": statistics.median(total / s / f for s, f in zip(seconds["exact"], flops, strict=True)),
        "times_transformers": {
            engine: statistics.median(t / s for s, t in zip(seconds[engine], seconds["transformers"], strict=True))
            for engine in ("exact", "fast")
        },
        "largest_difference": float(np.abs(a - soft["transformers"]).max() / np.abs(a).max()),
        "least_cosine": float(cosine.min()),
        "over_weights_bytes": {
            engine: facts[engine]["peak_bytes"] - facts[engine]["weight_bytes"] for engine in ("exact", "fast")
        },
        "preprocess_share": facts["exact"]["preprocess_s"] / statistics.median(seconds["exact"]),
    }


def show(r: dict[str, Any]) -> None:
    times, total = {engine: statistics.median(r["seconds"][engine]) for engine in ENGINES}, r["facts"]["exact"]["work"]
    print(f"{r['encoder']}: sgemm {statistics.median(r['sgemm_flops']) / 1e9:.0f} GFLOP/s", file=sys.stderr)
    for engine in ENGINES:
        ratio = f"{r['times_transformers'][engine]:.2f} x transformers" if engine != "transformers" else ""
        print(
            f"  {engine:<13}{times[engine]:6.2f} s {total / times[engine] / 1e9:6.0f} GFLOP/s  {ratio}", file=sys.stderr
        )
    over = {engine: f"{n / 1e6:.0f} MB" for engine, n in r["over_weights_bytes"].items()}
    print(
        f"  exact {r['share_of_sgemm']:.0%} of sgemm, differs from transformers by {r['largest_difference']:.1e} of "
        f"the largest; cosine of fast {r['least_cosine']:.6f}; memory over the weights {over}; preprocessing "
        f"{r['preprocess_share']:.1%} of exact",
        file=sys.stderr,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=["effective", "large", "audio"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, help="where checkpoints are, or are made and kept")
    parser.add_argument("--json", type=Path, help="write, or add to, everything measured")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.encoder[0], options.directory, options.threads)
        return
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for encoder in options.encoder:
            directory = (options.directory or Path(temporary)) / encoder
            directory.mkdir(parents=True, exist_ok=True)
            results.append(measure(encoder, options.rounds, options.threads, directory))
            show(results[-1])
    if options.json:
        known = json.loads(options.json.read_text())["results"] if options.json.exists() else []
        kept = [r for r in known if r["encoder"] not in options.encoder]
        options.json.write_text(json.dumps({"machine": machine.record(), "results": kept + results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
