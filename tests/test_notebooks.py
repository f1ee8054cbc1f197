"""Every notebook runs from a clean kernel and is committed with its outputs."""

import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = ("5_ladder", "6_scaling_up")  # they take more than a minute together


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_from_a_clean_kernel(path, tmp_path):
    if path.stem in LONGEST and "ALL_NOTEBOOKS" not in os.environ:
        pytest.skip("takes half a minute: ALL_NOTEBOOKS=1 runs it, as CI does")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(nbformat.read(path, as_version=4), timeout=300, resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_its_outputs_and_names_the_lecture(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and all(cell.outputs and cell.execution_count for cell in code)
    assert "Andrej Karpathy" in cells[0].source
