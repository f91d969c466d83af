# SPDX-License-Identifier: Apache-2.0
"""Measure an engine that takes text and decodes by itself, in a process of its own; the last line printed is JSON.

    PYTHON benchmarks/text_worker.py openvino --model DIR --threads 2 --prompt 512 --decode 32

PYTHON is the interpreter of an environment that has the engine; nothing else of this repository is needed there. Each
engine is a small class with the same two verbs. Every prompt is another one, so that no engine finds its beginning in a
cache. Times are in seconds. The time to the first token is of the prompt and the choice of one token after it.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TEXT = """the cat sat on a mat and saw some old man who had come from far away with his small dog to buy bread for her
mother but it was late so they went back home over green hills under one big moon while rain fell into our river"""


@dataclass(frozen=True)
class Run:
    """What one prompt and the tokens after it took, as the engine reports it."""

    n_prompt: int
    first_token_s: float
    n_decoded: int  # after the first token
    decode_s: float


class TextEngine(Protocol):
    def count(self, text: str) -> int:
        """Tokens that the engine makes of that prompt."""
        ...

    def run(self, text: str, n: int) -> Run:
        """Run that prompt from nothing and decode n tokens after the first, none of which ends the text."""
        ...


class OpenVINO:
    """openvino-genai on a model that optimum-intel exported; VLMPipeline is its class for this model, also for text."""

    def __init__(self, model: Path, threads: int) -> None:
        import openvino_genai

        self.genai = openvino_genai
        self.pipe = openvino_genai.VLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)
        self.tokenizer = self.pipe.get_tokenizer()

    def count(self, text: str) -> int:
        return self.tokenizer.encode(text).input_ids.shape[1]

    def run(self, text: str, n: int) -> Run:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = n + 1, False, True
        config.apply_chat_template, config.stop_token_ids = False, set()
        found = self.pipe.generate(text, generation_config=config).perf_metrics  # in milliseconds
        n_decoded = found.get_num_generated_tokens() - 1
        decode_s = found.get_tpot().mean / 1e3 * n_decoded
        return Run(found.get_num_input_tokens(), found.get_ttft().mean / 1e3, n_decoded, decode_s)


class MistralRs:
    """mistral.rs, which quantises a Hugging Face directory to Q4_0 while it loads it."""

    def __init__(self, model: Path, threads: int) -> None:
        import mistralrs

        self.rs = mistralrs
        files = mistralrs.Which.MultimodalPlain(
            model_id=str(model),
            arch=mistralrs.MultimodalArchitecture.Gemma4,
            tokenizer_json=str(model / "tokenizer.json"),
        )
        self.runner = mistralrs.Runner(which=files, in_situ_quant="Q4_0", token_source="none", prefix_cache_n=0)

    def count(self, text: str) -> int:
        return len(self.runner.tokenize_text(text, True, None))

    def run(self, text: str, n: int) -> Run:
        request = self.rs.CompletionRequest(
            model="default", prompt=text, max_tokens=n + 1, temperature=0.0, ignore_eos=True
        )
        usage = self.runner.send_completion_request(request).usage
        return Run(
            usage.prompt_tokens,
            usage.total_prompt_time_sec,
            usage.completion_tokens - 1,
            usage.total_completion_time_sec,
        )


class LiteRT:
    """LiteRT-LM on a .litertlm file. Ring buffers for local attention are what its own benchmark takes."""

    def __init__(self, model: Path, threads: int) -> None:
        import litert_lm

        self.engine = litert_lm.Engine(
            str(model),
            backend=litert_lm.Backend.CPU(thread_count=threads),
            cache_dir=":nocache",  # else it writes a file beside the model, and a second load is another one
            enable_benchmark=True,
            use_ringbuffers_local_attention=True,
        )

    def count(self, text: str) -> int:
        return len(self.engine.tokenize(text))

    def run(self, text: str, n: int) -> Run:
        with self.engine.create_session(apply_prompt_template=False) as session:
            session.run_prefill([text])
            # a session has no limit of tokens: it is stopped after n pieces of text, a few tokens late
            for i, _ in enumerate(session.run_decode_async()):
                if i == n:
                    session.cancel_process()
            found = session.get_benchmark_info()
        n_decoded = found.last_decode_token_count
        decode_s = n_decoded / found.last_decode_tokens_per_second if n_decoded else 0.0
        return Run(found.last_prefill_token_count, found.time_to_first_token_in_second, n_decoded, decode_s)


ENGINES: dict[str, Callable[[Path, int], TextEngine]] = {
    "openvino": OpenVINO,
    "mistralrs": MistralRs,
    "litert": LiteRT,
}


def prompt(engine: TextEngine, n: int, rng: random.Random) -> str:
    """A text of random words that has n tokens or a few more."""
    words = list[str]()
    while (missing := n - engine.count(" ".join(words))) > 0:
        words += rng.choices(TEXT.split(), k=(missing + 1) // 2)  # not too many either where each has two tokens
    return " ".join(words)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All times of one round. The first prompt and its tokens warm up and do not count."""
    rng = random.Random(args.seed)
    start = time.perf_counter()
    engine = ENGINES[args.engine](args.model, args.threads)
    load_s = time.perf_counter() - start
    runs = list[Run]()
    for _ in range(1 + args.repeats):
        runs.append(engine.run(prompt(engine, args.prompt, rng), args.decode))
        if runs[-1].n_prompt < args.prompt or runs[-1].n_decoded < 1:
            raise SystemExit(f"{args.engine} ran {runs[-1]}, not {args.prompt} tokens and {args.decode} after them")
    return {
        "load_s": load_s,
        "first_prefill_s": runs[0].first_token_s,
        "prefill_tps": [run.n_prompt / run.first_token_s for run in runs[1:]],
        "decode_tps": [run.n_decoded / run.decode_s for run in runs[1:]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(measure(parser.parse_args())))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
