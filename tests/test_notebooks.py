"""The notebooks as files: no outputs, one parameters cell that is the default study, a first cell that says what for.

That they run is checked by `make reproduce STUDY=smoke`, which executes each of them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from gcnet.cells import DATA
from gcnet.study import Study

FOLDER = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((FOLDER / "notebooks").glob("*.ipynb"))
STUDIED = [path for path in NOTEBOOKS if not path.name.startswith("00_")]

# What the parameters of a system's own notebook begin with.
SYSTEM = {"06": "snacs_", "07": "cka_", "08": "ftwt_", "10": "structured_"}

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_the_series_is_numbered_without_gaps() -> None:
    assert [int(path.name[:2]) for path in NOTEBOOKS] == list(range(len(NOTEBOOKS))) and len(NOTEBOOKS) >= 6


@every
def test_no_outputs_are_committed(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@every
def test_the_first_cell_says_what_it_asks_needs_writes_and_takes(path: Path) -> None:
    first = nbformat.read(path, 4).cells[0].source
    assert first.startswith(f"# {path.name[:2]} · ")
    assert all(word in first for word in ("**Question.**", "**Needs**", "**Writes**", "**Takes**"))


@pytest.mark.parametrize("path", STUDIED, ids=lambda path: path.stem)
def test_the_parameters_cell_is_the_default_study(path: Path) -> None:
    tagged = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assigned = {}
    for line in ast.parse(tagged[0].source).body:
        assert isinstance(line, ast.AnnAssign)
        assigned[line.target.id] = ast.literal_eval(line.value)
    assert Study.create(**assigned) == Study()
    own = {name for name in Study.model_fields if name.startswith(SYSTEM.get(path.name[:2], "-"))}
    gcnet = {n for n in Study.model_fields if not n.startswith(tuple(SYSTEM.values()))} if path.name < "06" else set()
    assert set(assigned) >= ({"seeds", *DATA} | own | gcnet) - {"notebooks"}


@pytest.mark.parametrize("path", STUDIED, ids=lambda path: path.stem)
def test_no_cell_takes_the_name_of_a_parameter(path: Path) -> None:
    """A cell that is run again reads the parameters again."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            names = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)]
            assert not {n.id for n in names if isinstance(n.ctx, ast.Store)} & set(Study.model_fields)


def test_the_default_params_file_is_the_default_study() -> None:
    assert Study.load(FOLDER / "params" / "digits.yaml") == Study()


@pytest.mark.parametrize("path", sorted((FOLDER / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_params_file_is_a_study_of_its_name(path: Path) -> None:
    if path.stem != "claims":
        assert Study.load(path).study == path.stem


@every
def test_functions_in_notebooks_stay_short(path: Path) -> None:
    for source in code(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name


@every
def test_figures_and_tables_written_are_those_announced(path: Path) -> None:
    cells = nbformat.read(path, 4).cells
    for source in code(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("save_figure", "save_table"):
                name = node.args[2]
                if isinstance(name, ast.Constant):
                    assert name.value in cells[0].source, name.value
