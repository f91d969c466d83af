# SPDX-License-Identifier: Apache-2.0
"""Everything works on 128 KiB of stack: musl gives its threads no more, and `ulimit -s` and threading.stack_size can.

Each process prints the cases that it survived; one that overflows its stack dies of SIGSEGV and prints no more.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_models import MOE_LIKE, write_checkpoint

import gemma4

STACK_KIB = 128

SCRIPT = """
import sys, threading
import numpy as np
import gemma4

IDS = list(range(2, 66))
CASES = {
    "one token": lambda model: model.forward([2]),
    "a prompt": lambda model: model.forward(IDS),
    "a cache of 8 bits": lambda model: model.forward(IDS, sequence=model.new_sequence(kv_dtype="q8_0")),
    "every site": lambda model: model.run_with_cache(IDS, "*"),
    "edits": lambda model: model.run_with_hooks(IDS, [("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern)]),
    "an answer": lambda model: model.generate("Once upon", max_tokens=4),
    "an image": lambda model: model.encode_image(np.zeros((200, 300, 3), np.uint8)),
    "sound": lambda model: model.encode_audio(np.zeros(32000, np.float32)),
}

def run(source, precision, *names):
    model = gemma4.load(source, precision=precision, threads=2)
    for name in names:
        CASES[name](model)
        print(name, flush=True)

if sys.argv[1] == "thread":
    threading.stack_size(int(sys.argv[2]) * 1024)
    thread = threading.Thread(target=run, args=sys.argv[3:])
    thread.start()
    thread.join()
else:
    run(*sys.argv[3:])
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stack")
    quantised = folder / "tiny.gguf"
    gemma4.quantize("tiny-e", quantised, type="Q4_0")
    # keys that are stored as rotated pairs, and no tokenizer
    joined = write_checkpoint(folder / "joined", MOE_LIKE)
    return {"tiny-e": "tiny-e", "tiny-moe": "tiny-moe", "Q4_0": str(quantised), "joined keys": str(joined)}


TEXT = ["one token", "a prompt", "a cache of 8 bits", "every site", "edits", "an answer"]
CASES = {
    "tiny-e": [*TEXT, "an image", "sound"],
    "tiny-moe": TEXT,
    "Q4_0": TEXT,
    "joined keys": ["one token", "a prompt", "every site", "edits"],  # heads of 16: no whole block of 8 bits
}


@pytest.mark.skipif(sys.platform == "win32", reason="no ulimit")
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("source", list(CASES))
@pytest.mark.parametrize("where", ["process", "thread"])
def test_a_small_stack(where: str, source: str, precision: str, sources: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    shell = f'ulimit -s {STACK_KIB}; exec "$@"' if where == "process" else 'exec "$@"'
    arguments = [sys.executable, "-P", str(script), where, str(STACK_KIB), sources[source], precision, *CASES[source]]
    done = subprocess.run(["sh", "-c", shell, "sh", *arguments], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.splitlines()) == (0, CASES[source]), done.stderr[-500:]
