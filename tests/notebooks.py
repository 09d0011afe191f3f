"""Runs notebooks: their sources are ``notebooks/*.py``, and ``.ipynb`` beside them has the outputs.

``python -m tests.notebooks`` (``make notebooks``) runs all of them and writes the outputs anew;
names after it choose some.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"

#: As in the other tests: no silent change of dtype, and programs that were compiled before are not
#: compiled again. Plots go into the notebook.
ENVIRONMENT = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "test-programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
}


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.py"))


def run(source: Path) -> NotebookNode:
    """Run a notebook from top to bottom in a new process, where it lies.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    notebook = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"  # Random ids would change with every run.
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=os.environ | ENVIRONMENT)
    return notebook


def main(names: list[str]) -> None:
    for source in sources():
        if names and source.stem not in names:
            continue
        start = time.perf_counter()
        nbformat.write(run(source), source.with_suffix(".ipynb"))
        print(f"{source.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
