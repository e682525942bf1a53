"""Keys of what was computed before: a change to one would compute every study again."""

from __future__ import annotations

from typing import Any

import pytest

from gcnet import cells, cka_cells, ftwt_cells, snacs_cells, structured_cells
from gcnet.cells import Cell
from gcnet.cka_cells import Run
from gcnet.ftwt_cells import GatedCell
from gcnet.snacs_cells import SnacsCell
from gcnet.store import Store
from gcnet.structured_cells import StructuredCell
from gcnet.study import Study

DIGITS = Study.create(precision="bfloat16", device="cpu")
OTHER = DIGITS.model_copy(update={"connectivity_images": 100, "tap": "relu", "classwise": True, "residual": "nearest"})
DIRECT, GUIDED = Cell("l1", "direct", "none", 0.8, 0), Cell("l1", "B25", "pearson", 0.8, 0)
IMAGES = "811968b880a38707caa56273fecf1e6dc5f63c3372e5cfa84b336a66de4c6f11"  # another resize gives others

ASKED = {
    "dense": lambda: cells.dense_folder(DIGITS, 0),
    "dense facts": lambda: cells.dense_facts(DIGITS, 0),
    "connectivity": lambda: cells.connectivity_matrices(DIGITS, 0, "pearson"),
    "connectivity otherwise": lambda: cells.connectivity_matrices(OTHER, 0, "partial"),
    "direct": lambda: cells.cell_folder(DIGITS, DIRECT),
    "guided": lambda: cells.cell_folder(DIGITS, GUIDED),
    "shift": lambda: cells.shift_rows(DIGITS, GUIDED),
    "shift, dense": lambda: cells.shift_rows(DIGITS, cells.dense_cell(0)),
    "corrupted": lambda: cells.corrupted_images(DIGITS, "fog", 3),
    "flops": lambda: cells.flops_rows(DIGITS, 0, "pearson"),
    "drift": lambda: cells.drift_rows(DIGITS, 0),
    "unshifted": lambda: cells.unshifted_rows(DIGITS, 0),
    "snacs scores": lambda: snacs_cells.analysis(DIGITS, 0),
    "snacs": lambda: snacs_cells.cell_folder(DIGITS, SnacsCell("snacs", 0.8, 0)),
    "gcnet in snacs": lambda: snacs_cells.shift_rows(DIGITS, SnacsCell("gcnet", 0.8, 0)),
    "cka run": lambda: cka_cells.run_folder(DIGITS, Run("rst", 0.9, 0.01, 0)),
    "cka shift": lambda: cka_cells.shifted(DIGITS, Run("rst", 0.9, 0.0, 0)),
    "cka guided": lambda: cka_cells.guided(DIGITS, Run("dense", 0.0, 0.0, 0), "B25"),
    "ftwt": lambda: ftwt_cells.gated_folder(DIGITS, GatedCell("joint", 0.92, 0)),
    "ftwt static": lambda: ftwt_cells.gated_folder(DIGITS, GatedCell("l1_filter", 0.8, 0)),
    "ftwt shift": lambda: ftwt_cells.gated_shift_rows(DIGITS, GatedCell("decoupled", 0.8, 0)),
    "structured": lambda: structured_cells.structured_folder(DIGITS, StructuredCell("B25", 0.5, 0)),
    "structured shift": lambda: structured_cells.structured_shift_rows(DIGITS, StructuredCell("direct", 0.5, 0)),
}
KEYS = {
    "dense": "dense-e7993f9d73d6be99",
    "dense facts": "dense_facts-61df20f217cd7b64",
    "connectivity": "connectivity-7c7336ecab695705",
    "connectivity otherwise": "connectivity-b3876e8fb8e74754",
    "direct": "cell-a428ed79ea65d5cc",
    "guided": "cell-527c54fcad58e40b",
    "shift": "shift-464667a4a4033928",
    "shift, dense": "shift-03097fde7d0e656b",
    "corrupted": "corrupted-b4bbdf9ebd85c5a1",
    "flops": "flops-11978744eb30bfea",
    "drift": "drift-9184fd866cb5223e",
    "unshifted": "unshifted-aefc1f30f81eca52",
    "snacs scores": "snacs_scores-fe535e93f50177d8",
    "snacs": "snacs_cell-92584acd9194f699",
    "gcnet in snacs": "snacs_shift-c544f172d7851bf7",
    "cka run": "cka_run-acabb1543e79e58b",
    "cka shift": "cka_shift-9a5f25f0847f4672",
    "cka guided": "cka_guided-d955e92f30a6dfa3",
    "ftwt": "ftwt_cell-226ad15e632914eb",
    "ftwt static": "ftwt_cell-4f72b480e6f382d0",
    "ftwt shift": "ftwt_shift-e287e9ef4f2b31fa",
    "structured": "structured-1c5737d3129f4e01",
    "structured shift": "structured_shift-61bdc0ee688567e1",
}


class AskedForError(Exception):
    """Carries the key that the store was asked for first."""


@pytest.mark.parametrize("name", ASKED)
def test_the_key_of_what_was_computed_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: Store, kind: str, inputs: dict[str, Any], *_: object) -> None:
        raise AskedForError(Store.key(kind, inputs))

    sets = cells.splits(DIGITS)
    for part in (sets.train, sets.val, sets.test):
        monkeypatch.setitem(part.__dict__, "sha256", IMAGES)
    monkeypatch.setattr(Store, "once", asked)
    with pytest.raises(AskedForError) as found:
        ASKED[name]()
    assert str(found.value) == KEYS[name]
