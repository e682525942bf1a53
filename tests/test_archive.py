"""What a study computed goes into one file and comes out of it; what was left out is computed again."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from gcnet import archive, cka_cells, paths, sparse_training, structured_cells
from gcnet import cells as computing
from gcnet.cells import cell_folder, cell_result, cells, dense_folder, shift_rows
from gcnet.study import Study
from gcnet.sweep import sweep
from tests.test_sweep import STUDY as SMALL
from tests.test_sweep import Here, fail

STUDY = Study.create(**{**SMALL.model_dump(), "notebooks": ["01", "04", "05"]})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root / "runs"))
        patch.chdir(_project(root))
        with pytest.raises(ValueError, match="make sweep first"):
            archive.pack(STUDY)
        dense_folder(STUDY, 0)
        assert "5 of 5 cells" in archive.pack(STUDY)[1]
        assert sweep(STUDY, Here()) == []
        written, missing = archive.pack(STUDY)
        assert missing == []
        return written


def _project(root: Path) -> Path:
    (root / "params").mkdir(parents=True)
    (root / "notebooks").mkdir()
    return root


@pytest.fixture
def elsewhere(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine: the results folder came along, the store is empty."""
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "other"))
    monkeypatch.chdir(_project(tmp_path))
    (paths.results(STUDY.study)).mkdir(parents=True)
    shutil.copy(packed, archive.path(STUDY.study))
    return tmp_path


def test_an_unpacked_study_is_found_not_computed(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added, there = archive.unpack(STUDY.study)
    assert added > 5 and there == 0 and archive.unpack(STUDY.study) == (0, added)
    for name in ("train", "connectivity", "hybrid_masks", "score"):
        monkeypatch.setattr(computing, name, fail)
    assert sweep(STUDY, Here()) == []
    for cell in cells(STUDY):
        assert cell_result(STUDY, cell)["sparsity"] == cell.sparsity and len(shift_rows(STUDY, cell)) == 2


@pytest.mark.usefixtures("elsewhere")
def test_what_was_left_out_is_computed_where_it_is_wanted() -> None:
    archive.unpack(STUDY.study)
    cell = next(cell for cell in cells(STUDY) if not cell.is_dense)
    before = cell_result(STUDY, cell)
    folder = cell_folder(STUDY, cell)
    assert (folder / "model.safetensors").exists() and (folder / "masks.safetensors").exists()
    assert cell_result(STUDY, cell) == before


@pytest.mark.usefixtures("elsewhere")
def test_packing_again_gives_the_same_file_and_no_large_one(packed: Path) -> None:
    archive.unpack(STUDY.study)
    assert sweep(STUDY, Here()) == []
    assert archive.pack(STUDY)[0].read_bytes() == packed.read_bytes()
    names = zipfile.ZipFile(packed).namelist()
    assert any(n.startswith("dense-") and n.endswith("model.safetensors") for n in names)
    assert not any(n.startswith(("cell-", "corrupted-")) and not n.endswith(".json") for n in names)


def test_what_another_archive_holds_is_left_to_it(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.unpack(STUDY.study)
    second = STUDY.model_copy(update={"study": "second"})
    paths.results("second").mkdir()
    written, _ = archive.pack(second)
    names = zipfile.ZipFile(written).namelist()
    assert any(n.startswith("shift-") for n in names)
    assert not any(n.startswith(("dense-", "connectivity-")) for n in names)

    monkeypatch.setenv("GCNET_RUNS", str(elsewhere / "third"))
    assert archive.unpack("second")[0] > 5
    for name in ("train", "connectivity", "hybrid_masks", "score"):
        monkeypatch.setattr(computing, name, fail)
    assert sweep(second, Here()) == []
    # The first keeps what the second relies on, however often both are packed.
    assert archive.pack(STUDY)[0].stat().st_size > archive.pack(second)[0].stat().st_size
    archive.path(STUDY.study).unlink()
    with pytest.raises(FileNotFoundError, match=f"study '{STUDY.study}' has no"):
        archive.unpack("second")


OTHERS = {
    "06": {"snacs_images": 4, "snacs_methods": ["snacs"], "snacs_truth_samples": [50], "snacs_truth_repeats": 2,
           "snacs_speed_groups": [2], "snacs_speed_filters": 4, "snacs_speed_samples": 60, "snacs_groups": 2},
    "07": {"cka_width": 0.125, "cka_epochs": 1, "cka_methods": ["rst"], "cka_sparsities": [0.5], "cka_betas": [1e-3],
           "cka_rewind_epochs": 0, "cka_images": 16, "cka_guided_sparsity": 0},
    "08": {"ftwt_r": [0.9], "ftwt_joint_r": [], "ftwt_epochs": 1, "ftwt_latency_sizes": [32],
           "ftwt_latency_batches": [1]},
    "10": {"structured_macs": [0.7], "structured_methods": ["direct"], "structured_finetune_epochs": 0,
           "structured_round_to": 1},
}  # fmt: skip


@pytest.mark.parametrize("notebook", OTHERS)
def test_the_other_systems_are_found_after_unpacking_too(
    notebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_project(tmp_path))
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "runs"))
    paths.results(STUDY.study).mkdir(parents=True)
    study = Study.create(**{**SMALL.model_dump(), **OTHERS[notebook], "notebooks": [notebook]})
    assert sweep(study, Here()) == []
    assert archive.pack(study)[1] == []
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "other"))
    archive.unpack(study.study)
    left_out = archive.pack(study)[1]
    assert all("corruptions" in words for words in left_out), left_out
    # What notebooks look at beside the sweep asks for no network that the archive has left out.
    monkeypatch.setattr(computing, "train", fail)
    monkeypatch.setattr(sparse_training, "train", fail)
    if notebook == "07":
        assert [len(cka_cells.weight_shares(study, run)) for run in cka_cells.drawn_runs(study)] == [70, 70]
    if notebook == "10":
        assert structured_cells.structured_latency_rows(study) == []


def test_no_archive_and_a_damaged_one_are_said(elsewhere: Path) -> None:
    archive.path(STUDY.study).write_bytes(archive.path(STUDY.study).read_bytes()[:500])
    with pytest.raises(ValueError, match=r"store\.zip is damaged"):
        archive.unpack(STUDY.study)
    archive.path(STUDY.study).unlink()
    with pytest.raises(FileNotFoundError, match=r"no store\.zip"):
        archive.unpack(STUDY.study)


@pytest.mark.usefixtures("elsewhere")
def test_an_archive_cannot_write_outside_the_store() -> None:
    with zipfile.ZipFile(archive.path(STUDY.study), "w") as file:
        file.writestr("../evil.json", "{}")
    with pytest.raises(ValueError, match=r"no part of a store entry"):
        archive.unpack(STUDY.study)
