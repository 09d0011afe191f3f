"""Every notebook runs from top to bottom, checks what it says, and is kept with its outputs."""

from pathlib import Path

import jupytext
import nbformat
import pytest

from tests.notebooks import FOLDER, ROOT, run, sources


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_notebook_runs(source: Path) -> None:
    run(source)  # Notebooks assert what they claim.


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_outputs_are_those_of_the_source(source: Path) -> None:
    """If this fails, ``make notebooks`` repairs it."""
    path = source.with_suffix(".ipynb")
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.source) for cell in jupytext.read(source).cells
    ]
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    # Warnings are errors elsewhere, and people read outputs.
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert str(ROOT) not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 300_000, "use fewer or smaller plots"


def test_no_outputs_without_a_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in sources()}
