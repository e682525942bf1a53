"""What counts as one budget, one point, and which networks compare."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import pandas as pd

from gcnet import figures
from gcnet.comparison import COLUMNS, budget_table, settings


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
    assert (
        found.groupby("method")["macs"].nunique().eq(1).all() and found.groupby("method")["level"].nunique().eq(1).all()
    )
    assert (found[found.system == "SNACS"].level == 0).all()


def test_a_method_stands_in_one_budget_with_all_its_seeds() -> None:
    table = budget_table(rows(), "macs")
    assert list(table.index) == [
        ("60% to 80% of the MACs", "FTWT"), ("40% to 60% of the MACs", "L1 direct"),
        ("40% to 60% of the MACs", "SNACS (δ 0.8)"), ("20% to 40% of the MACs", "RST †"),
    ]  # fmt: skip
    assert table.loc[("40% to 60% of the MACs", "L1 direct"), "clean"] == "91.0 [88.3, 93.7]"
    assert table.loc[("60% to 80% of the MACs", "FTWT"), "MACs left"] == "74 %"


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
                      "best so far": False}  # fmt: skip
    assert figure.axes[1].get_ylim()[0] == 90 - figures.NEAR
    plt.close(figure)
