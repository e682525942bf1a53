"""What counts as one budget, one point, and which networks compare; and that each number is its cell's."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from gcnet import cells, cost, figures, ftwt_cells, snacs_cells, structured_cells, sweep
from gcnet.comparison import COLUMNS, best_of_budgets, budget_table, comparison_table, settings
from gcnet.store import Store, read_json
from gcnet.study import Study


def rows() -> pd.DataFrame:
    facts = []
    systems = {"L1 direct": ("direct", 0.8, 0.5), "SNACS (δ 0.8)": ("SNACS", 0.7, 0.55), "FTWT": ("FTWT", 0.0, 0.7),
               "RST": ("sparse training", 0.8, 0.3)}  # fmt: skip
    for (name, (system, sparsity, macs)), seed, family in itertools.product(
        systems.items(), range(3), ("clean", "corrupted")
    ):
        network = "resnet20 x 0.5" if name == "RST" else "vgg16_bn x 0.25"
        accuracy = 0.9 - 0.2 * (family == "corrupted") + 0.01 * seed - 0.1 * (name == "FTWT")
        removed = sparsity + 0.1 * (seed - 1) * (system == "SNACS")
        left = macs + 0.04 * seed
        facts.append((name, removed, left, seed, family, accuracy, 9.0, 0.1, system, network))
    return pd.DataFrame(facts, columns=COLUMNS)


def test_the_seeds_of_a_setting_are_one_point() -> None:
    found = settings(rows())
    assert (found.groupby("method")[["macs", "setting"]].nunique() == 1).all(axis=None)
    names = dict(zip(found.method, found.setting, strict=True))
    assert names == {
        "L1 direct": "L1 direct (80%)",
        "SNACS (δ 0.8)": "SNACS (δ 0.8)",
        "FTWT": "FTWT (0%)",
        "RST": "RST (80%)",
    }


def test_two_sparsities_in_one_budget_are_two_settings() -> None:
    both = pd.concat([rows(), rows()[lambda r: r.method == "L1 direct"].assign(sparsity=0.95, accuracy=0.2)])
    table = budget_table(both, "macs")
    assert table.loc[("40% to 60% of the MACs", "L1 direct (80%)"), "clean"] == "91.0 [88.3, 93.7]"
    assert table.loc[("40% to 60% of the MACs", "L1 direct (95%)"), "clean"] == "20.0 [20.0, 20.0]"


def test_bold_and_best_are_of_all_settings_shown_or_not() -> None:
    better = rows()[lambda r: r.method == "L1 direct"].assign(
        method="L1 BH partial", accuracy=lambda r: r.accuracy + 0.05
    )
    worse = rows()[lambda r: r.method == "L1 direct"].assign(method="L1 FH", accuracy=lambda r: r.accuracy - 0.2)
    every = pd.concat([rows(), better, worse])
    best = best_of_budgets(every).set_index("budget")
    assert best.setting["40% to 60% of the MACs"] == "L1 BH partial (80%)"
    assert best.settings["40% to 60% of the MACs"] == 4
    table = budget_table(every, "macs", only_plain=True)
    assert list(table.loc["40% to 60% of the MACs"].index) == [
        "L1 direct (80%)",
        "SNACS (δ 0.8)",
        "L1 BH partial (80%)",
    ]
    assert "**" in table.loc[("40% to 60% of the MACs", "L1 BH partial (80%)"), "clean"]
    assert "**" not in table.loc[("40% to 60% of the MACs", "L1 direct (80%)"), "clean"]


def test_a_method_stands_in_one_budget_with_all_its_seeds() -> None:
    table = budget_table(rows(), "macs")
    assert list(table.index) == [
        ("60% to 80% of the MACs", "FTWT (0%)"), ("40% to 60% of the MACs", "L1 direct (80%)"),
        ("40% to 60% of the MACs", "SNACS (δ 0.8)"), ("20% to 40% of the MACs", "RST (80%) †"),
    ]  # fmt: skip
    assert table.loc[("40% to 60% of the MACs", "L1 direct (80%)"), "clean"] == "91.0 [88.3, 93.7]"
    assert table.loc[("60% to 80% of the MACs", "FTWT (0%)"), "MACs left"] == "74 %"


def test_matched_sparsity_is_among_masks_only() -> None:
    table = budget_table(rows(), "sparsity")
    assert "FTWT" not in table.index.get_level_values("method")
    assert ("80% removed", "L1 direct") in table.index
    # A method that finds its own sparsity stands once, at the mean over its seeds.
    assert [budget for budget, method in table.index if method.startswith("SNACS")] == ["70% removed"]


def test_figure_tells_theory_from_networks_that_run_fewer_operations() -> None:
    dense = rows()[lambda r: r.method == "L1 direct"].assign(method="dense", system="dense", macs=1.0, accuracy=0.9)
    figure = figures.pareto(settings(pd.concat([dense, rows()])), "title")
    hollow = {
        line.get_label(): line.get_markerfacecolor() == "white" for line in figure.axes[1].get_legend().get_lines()
    }
    assert hollow == {"dense": False, "direct": True, "SNACS": True, "FTWT": False, "sparse training": True,
                      "best at these MACs or fewer": False}  # fmt: skip
    assert figure.axes[1].get_ylim()[0] == 90 - figures.NEAR
    plt.close(figure)


# --- on a study -----------------------------------------------------------------------------------------------------

STUDY = Study.create(
    study="small", notebooks=["05", "06", "08", "10"], dataset="digits", channels=1, network="alexnet", width=0.125,
    seeds=[0], epochs=1, batch_size=40, train_images=120, crop_padding=0, flip=False, finetune_epochs=1,
    pruners=["l1"], sparsities=[0.5], guidance={"pearson": ["B25"]}, shifts=["contrast"], severities=[5],
    shift_images=30, device="cpu", precision="float32", snacs_deltas=[0.6], snacs_methods=["snacs", "mint", "gcnet"],
    snacs_images=10, snacs_mint_groups=2, snacs_mint_images=5, snacs_truth_samples=[100], snacs_truth_repeats=2,
    snacs_speed_groups=[4], snacs_speed_filters=16, snacs_speed_samples=60, ftwt_r=[0.8], ftwt_joint_r=[],
    ftwt_epochs=1, ftwt_latency_sizes=[32], ftwt_latency_batches=[1],
    structured_macs=[0.6], structured_methods=["B25", "tp_magnitude"], structured_finetune_epochs=1,
    structured_round_to=1,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*(images are fewer|parent filters)")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The store of the small study, and its comparison.csv."""
    root = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCNET_RUNS", str(root))
        for _, tasks in sweep.stages(STUDY):
            for run, *arguments in tasks:
                run(*arguments)
        return root, comparison_table(STUDY)


@pytest.fixture
def table(computed: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    monkeypatch.setenv("GCNET_RUNS", str(computed[0]))
    return computed[1]


def wall(kind: str, inputs: dict) -> float:
    return read_json(Store().find(kind, inputs) / "entry.json")["wall_s"]


def test_every_system_of_a_study_has_its_rows(table: pd.DataFrame) -> None:
    assert tuple(table.columns) == COLUMNS
    named = table[table.shift_family == "clean"].set_index("method").system.to_dict()
    assert named == {
        "dense": "dense",
        "L1 direct": "direct",
        "L1 B25": "GC-Net",
        "SNACS (δ 0.6)": "SNACS",
        "MINT (δ 0.6)": "peer of SNACS",
        "OS-SynFlow B25 (δ 0.6)": "GC-Net",
        "FTWT decoupled (r 0.8)": "FTWT",
        "L1 filters, FTWT's MACs (r 0.8)": "peer of FTWT",
        "filters: B25 (0.6)": "structured",
        "filters: torch-pruning magnitude (0.6)": "structured",
    }
    assert set(table.shift_family) == {"clean", "corrupted"} and len(table) == 2 * len(named)
    assert set(table.network) == {"alexnet x 0.125"} and set(table.seed) == {0}
    assert table.accuracy.between(0, 1).all() and table.ece.between(0, 1).all()
    assert (table.macs > 0).all() and (table.macs <= 1).all() and (table.seconds > 0).all()
    assert (table[table.system != "dense"].macs < 1).all()


def test_every_number_is_that_of_its_cell(table: pd.DataFrame) -> None:
    rows = table[table.shift_family == "clean"].set_index("method")
    whole = cost.macs(cells.dense(STUDY, 0)[1], cells.example_input(STUDY))

    def check(name: str, macs: float, sparsity: float, seconds: float, accuracy: float) -> None:
        row = rows.loc[name]
        assert row.macs == pytest.approx(macs, abs=1e-9) and row.sparsity == pytest.approx(sparsity, abs=1e-9)
        assert row.seconds == pytest.approx(seconds) and row.accuracy == pytest.approx(accuracy)

    connectivity = wall("connectivity", cells.connectivity_inputs(STUDY, 0, "pearson"))
    scores = wall("snacs_scores", snacs_cells.scores_inputs(STUDY, 0))
    mint = wall("snacs_mint", snacs_cells.mint_inputs(STUDY, 0))
    assert min(connectivity, scores, mint) > 0

    def spent(folder: Path) -> float:
        return read_json(folder / "entry.json")["wall_s"]

    for cell, name, before in zip(cells.cells(STUDY)[1:], ("L1 direct", "L1 B25"), (0.0, connectivity), strict=True):
        found = cells.cell_result(STUDY, cell)
        check(name, found["macs"] / whole, 0.5, before + spent(cells.cell_folder(STUDY, cell)), found["accuracy"])
    names = {"snacs": ("SNACS", scores), "mint": ("MINT", mint), "gcnet": ("OS-SynFlow B25", connectivity)}
    for cell in snacs_cells.snacs_cells(STUDY)[1:]:
        name, before = names[cell.method]
        found = snacs_cells.cell_result(STUDY, cell)
        seconds = before + spent(snacs_cells.cell_folder(STUDY, cell))
        check(f"{name} (δ 0.6)", found["macs"] / whole, found["sparsity"], seconds, found["accuracy"])
    for cell, name in zip(ftwt_cells.gated_cells(STUDY), ("FTWT decoupled", "L1 filters, FTWT's MACs"), strict=True):
        found = ftwt_cells.gated_result(STUDY, cell)
        seconds = spent(ftwt_cells.gated_folder(STUDY, cell))
        check(f"{name} (r 0.8)", 1 - found["macs_reduction"], 0.0, seconds, found["accuracy"])
    for cell, name, before in zip(
        structured_cells.structured_cells(STUDY)[1:], ("B25", "torch-pruning magnitude"), (connectivity, 0.0),
        strict=True,
    ):  # fmt: skip
        found = structured_cells.cell_result(STUDY, cell)
        removed = 1 - found["parameters"] / found["parameters_dense"]
        seconds = before + spent(structured_cells.structured_folder(STUDY, cell))
        check(f"filters: {name} (0.6)", found["macs_left"] / whole, removed, seconds, found["accuracy"])
    assert rows.loc["dense"].seconds == pytest.approx(spent(cells.dense_folder(STUDY, 0)))


def test_only_what_the_study_runs_is_compared(table: pd.DataFrame) -> None:
    only = comparison_table(STUDY.model_copy(update={"notebooks": ("05",)}))
    assert set(only.system) == {"dense", "direct", "GC-Net"}
    pd.testing.assert_frame_equal(only, table[table.method.isin(set(only.method))].reset_index(drop=True))
