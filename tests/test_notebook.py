# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and stay small."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import gemma4

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own: plots inline
    if "sees" in path.stem and not gemma4.load("tiny-e").modalities.image:
        pytest.skip("the shipped tiny-e has no towers")
    if "probe" in path.stem:
        pytest.importorskip("sklearn", reason="needs scikit-learn")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= 3


@pytest.mark.slow
def test_the_notebook_on_gemma_scope_takes_folders(tmp_path, monkeypatch):
    """Without variables it makes a stand-in; with them it works on what they name, here the stand-in as a -pt model."""
    [path] = [path for path in NOTEBOOKS if path.stem.endswith("gemma-scope")]
    text = []
    for folder in ("made", "given"):
        (tmp_path / folder).mkdir()
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": tmp_path / folder}}
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        text.append("".join(output.text for output in outputs if output.output_type == "stream"))
        if folder == "made":
            scope = next((tmp_path / "made").glob("gemma-scope*/resid_post/*"))
            (tmp_path / "made" / "gemma-3-stand-in-it").rename(tmp_path / "model-pt")
            config = json.loads((scope / "config.json").read_text())
            (scope / "config.json").write_text(json.dumps(config | {"model_name": "model-pt"}))
            monkeypatch.setenv("GEMMA3", str(tmp_path / "model-pt"))
            monkeypatch.setenv("GEMMA_SCOPE", str(scope))
    assert "random stand-in" in text[0] and "skips 4 positions" in text[0]
    assert (
        "your files" in text[1]
        and "skips 0 positions" in text[1]
        and not list((tmp_path / "given").rglob("*.safetensors"))
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_small(path):
    """And with its outputs: the tutorials of the site are the stored notebooks."""
    assert path.stat().st_size < 500_000
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 3
    assert not any(folder in line for folder in ("/home/", "/root/", "/tmp/") for line in path.read_text().splitlines())
