# SPDX-License-Identifier: Apache-2.0
"""Execute notebooks and store their outputs, without times and paths of this machine. `make notebooks` runs it.

python tools/run_notebooks.py [NOTEBOOK …]     default: all of notebooks/
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

import gemma4

ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`. Raises CellExecutionError (a cell that fails)."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    ).execute()
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def without_paths(notebook: nbformat.NotebookNode, *folders: Path) -> None:
    """Shorten paths in printed text: what stands in one of the folders is named from there."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                for folder in folders:
                    output.text = output.text.replace(f"{folder}/", "")


def main() -> None:
    os.environ.pop("MPLBACKEND", None)  # the kernel's own, which stores pictures
    paths = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        with TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        without_paths(notebook, Path(gemma4.__file__).parents[1], Path(folder))
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
