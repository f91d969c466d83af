# SPDX-License-Identifier: Apache-2.0
"""Weight files that shrink while a model is loaded: clear exceptions, live sequences stay, the process lives.

Each case runs in a child, as what is tested for would end the process.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import gemma4
from gemma4.errors import FormatError, StateError
from gemma4.load.mapped import MappedFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows does not shrink mapped files")
IDS = np.array([2, 5, 6, 7, 8], np.int32)

CHILD = """
import os, sys
import numpy as np
import gemma4
from gemma4.interp.lens import logit_lens
path, folder = sys.argv[1:]
weights = path if path.endswith(".gguf") else os.path.join(path, "model.safetensors")
ids = np.array([2, 5, 6, 7, 8], np.int32)

def cut():
    os.truncate(weights, 4096)

model = gemma4.load(path)
sequence = model.new_sequence()
model.forward(ids, sequence=sequence)
logits, cache = model.run_with_cache(ids)
try:
    {action}
except gemma4.FormatError as error:
    print("FormatError:", error)
else:
    print("no error")
"""

AFTER = {
    "weight": "model.weight('layers.9.mlp.up_proj.weight')",
    "unembed": "model.unembed(np.array([1]))",
    "layer scalar": "model.layer_scalar(9)",
    "stored tensors": "[float(np.sum(a)) for a in model.tensors.values()]",
    "lens": "logit_lens(model, cache)",
    "forward": "model.forward(ids)",
    "generate": "model.generate(ids, max_tokens=2)",
    "image": "model.encode_image(np.zeros((48, 48, 3), np.uint8))",
}
INSIDE = {
    "a hook": "model.run_with_hooks(ids, [('blocks.0.hook_resid_pre', lambda z, site: cut())])",
    "a hook of generate": "model.generate(ids, hooks=[('blocks.0.hook_resid_pre', lambda z, site: cut())])",
    "an encoder's hook": "model.run_with_hooks(model.to_prompt([{'role': 'user', 'content': [{'type': 'image', "
    "'image': np.zeros((96, 96, 3), np.uint8)}]}]), [('vision.blocks.0.hook_resid_pre', lambda z, site: cut())])",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unquantised GGUF file and a directory of the shipped model."""
    folder = tmp_path_factory.mktemp("whole")
    gemma4.quantize("tiny-e", folder / "m.gguf", type="BF16")
    shutil.copytree(gemma4.load("tiny-e").checkpoint.path, folder / "m")
    return folder


def copy_of(source, kind, folder):
    if kind == "gguf":
        return shutil.copy(source / "m.gguf", folder / "m.gguf")
    return shutil.copytree(source / "m", folder / "m")


def run(source, kind, folder, action):
    command = [sys.executable, "-P", "-c", CHILD.replace("{action}", action)]
    command += [str(copy_of(source, kind, folder)), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["gguf", "directory"])
@pytest.mark.parametrize("name", AFTER)
def test_reading_after_the_file_shrank(source, tmp_path, kind, name):
    if (name, kind) == ("image", "gguf"):
        pytest.skip("this file has no encoders")
    done = run(source, kind, tmp_path, f"cut(); {AFTER[name]}")
    assert done.returncode == 0 and "FormatError" in done.stdout, done.stdout + done.stderr
    assert "is truncated" in done.stdout or "changed size" in done.stdout


@pytest.mark.parametrize("kind", ["gguf", "directory"])
@pytest.mark.parametrize("name", INSIDE)
def test_shrinking_inside_a_step(source, tmp_path, kind, name):
    if (name, kind) == ("an encoder's hook", "gguf"):
        pytest.skip("this file has no encoders")
    done = run(source, kind, tmp_path, INSIDE[name])
    assert done.returncode == 0 and "FormatError" in done.stdout, done.stdout + done.stderr
    assert "shorter while it was read" in done.stdout


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_a_live_sequence_is_saved_and_restored(source, tmp_path, kind):
    """Also after a step that failed in the middle: the sequence is what it was before."""
    action = (
        "\n    try: model.run_with_hooks([9], [('blocks.0.hook_resid_pre', lambda z, site: cut())], sequence=sequence)"
        "\n    except gemma4.FormatError: pass"
        "\n    assert sequence.length == 5 and sequence.tokens.tolist() == ids.tolist()"
        "\n    sequence.fork().save(folder + '/s.npz')"
    )
    done = run(source, kind, tmp_path, action)
    assert done.stdout == "no error\n", done.stdout + done.stderr
    whole = gemma4.load(source / ("m.gguf" if kind == "gguf" else "m"))
    restored, expected = whole.restore(tmp_path / "s.npz"), whole.new_sequence()
    whole.forward(IDS, sequence=expected)
    after = np.array([9, 10], np.int32)
    np.testing.assert_array_equal(whole.forward(after, sequence=restored), whole.forward(after, sequence=expected))


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_captures_are_pickled(source, tmp_path, kind):
    """They do not depend on the file any more, nor does what an unpickled one can do."""
    action = (
        "\n    cut(); import pickle; again = pickle.loads(pickle.dumps(cache))"
        "\n    values = again.decompose_resid().values.sum(axis=0)"
        "\n    assert np.allclose(values, cache['resid_post', 9], atol=1e-3)"
    )
    done = run(source, kind, tmp_path, action)
    assert done.stdout == "no error\n", done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_shrinking_under_quantize(source, tmp_path, kind):
    """What was read of pages that are gone is never published."""
    progress = "progress=lambda done, total, name: done < 100_000 or cut()"
    done = run(source, kind, tmp_path, f"gemma4.quantize(path, folder + '/q.gguf', type='Q8_0', {progress})")
    assert done.returncode == 0 and "changed size" in done.stdout, done.stdout + done.stderr
    assert [name for name in os.listdir(tmp_path) if name.startswith((".", "q"))] == []


def test_first_tokens_of_a_gguf_file(source, tmp_path):
    """Its tokenizer is read from the file when it is first wanted."""
    done = run(source, "gguf", tmp_path, "cut(); model.to_tokens('hi')")
    assert done.returncode == 0 and "changed size" in done.stdout, done.stdout + done.stderr


def test_arrays_that_were_handed_out_read_zeros(source, tmp_path):
    """A view of the file is the user's to read: the process lives, and `check` tells."""
    action = "views = list(model.tensors.values()); cut(); [float(np.sum(a)) for a in views]; print('lived'); "
    done = run(source, "directory", tmp_path, action + "model.checkpoint.check()")
    assert done.returncode == 0 and done.stdout.startswith("lived\nFormatError"), done.stdout + done.stderr


def test_beside_faulthandler(source, tmp_path):
    """pytest enables it, notebooks do: over ours it must not win, and other faults are still its own."""
    action = "import faulthandler; faulthandler.enable(); cut(); model.weight('layers.9.mlp.up_proj.weight')"
    assert "FormatError" in run(source, "directory", tmp_path, action).stdout
    shutil.rmtree(tmp_path / "m")
    other = (
        "import faulthandler, mmap; faulthandler.enable(); model.forward(ids); other = folder + '/o'; "
        "open(other, 'wb').write(bytes(9999)); file = open(other, 'r+b'); there = mmap.mmap(file.fileno(), 0); "
        "os.truncate(other, 0); there[5000]"
    )
    done = run(source, "directory", tmp_path, other)
    assert done.returncode == -7 and "Fatal Python error: Bus error" in done.stderr


def test_torn_stays_torn(tmp_path):
    """A file that is whole again under the same size and time is no longer the one that was mapped."""

    class Plain(MappedFile):
        def _parse(self):
            self.tensors = {}

        def array(self, name):
            raise NotImplementedError

    path = tmp_path / "a"
    path.write_bytes(bytes([1]) * 20_000)
    file, before = Plain(path), os.stat(path)
    view = np.frombuffer(file.view, np.uint8)
    os.truncate(path, 4096)
    assert view.sum() == 4096
    os.truncate(path, 20_000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FormatError, match="lost a part"):
        file.check()
    file.close()
    with pytest.raises(StateError):
        file.check()
    assert view.sum() == 4096  # the view keeps the map, and its guard
    assert faulthandler.is_enabled() in (True, False)
