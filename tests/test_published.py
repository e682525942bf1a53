"""The published numbers: complete, in range, with their sources; and ours beside them."""

from __future__ import annotations

import pandas as pd
import pytest

from gcnet.comparison import COLUMNS
from gcnet.published import beside, published
from gcnet.study import Study


def test_every_number_is_a_fraction_with_a_source() -> None:
    table = published()
    assert table.source.str.len().gt(0).all()
    for name in ("dense_accuracy", "accuracy", "sparsity", "macs_saved"):
        assert table[name].dropna().between(0, 1).all()
    assert table[["sparsity", "macs_saved"]].notna().sum(axis=1).eq(1).all()
    assert not table.duplicated(["method", "dataset", "network", "sparsity", "macs_saved"]).any()
    assert set(published("FTWT").system) == {"FTWT"}
    with pytest.raises(ValueError, match="FTWT"):
        published("FTW")


def test_each_stands_beside_our_nearest_setting_of_the_same_method() -> None:
    network = "vgg16_bn x 0.25"
    lines = [
        ("dense", 0.0, 1.0, 0, "clean", 0.86, "dense"),
        ("dense", 0.0, 1.0, 0, "corrupted", 0.1, "dense"),
        ("SNACS (δ 0.8)", 0.7, 0.5, 0, "clean", 0.80, "SNACS"),
        ("SNACS (δ 0.9)", 0.85, 0.3, 0, "clean", 0.70, "SNACS"),
        ("L1 blocks (δ 0.9)", 0.85, 0.3, 0, "clean", 0.75, "peer of SNACS"),
        ("FTWT joint (r 0.92)", 0.0, 0.40, 0, "clean", 0.84, "FTWT"),
        ("FTWT joint (r 0.92)", 0.0, 0.50, 1, "clean", 0.82, "FTWT"),
        ("FTWT decoupled (r 0.92)", 0.0, 0.9, 0, "clean", 0.5, "FTWT"),
    ]
    rows = [
        (name, sparsity, macs, seed, family, accuracy, 1.0, 0.1, system, network)
        for name, sparsity, macs, seed, family, accuracy, system in lines
    ]
    found = beside(Study(dataset="cifar10-jpeg"), pd.DataFrame(rows, columns=COLUMNS))
    assert not found.on.str.contains("ImageNet").any()
    snacs = found[found.published == "SNACS"].iloc[0]
    assert (snacs.ours, snacs["ours removed"]) == ("SNACS (δ 0.9)", 0.85)
    assert snacs["ours change"] == pytest.approx(-0.16)
    joint = found[found.published == "FTWT joint (r 0.92)"].iloc[0]
    assert joint["ours accuracy"] == pytest.approx(0.83)  # the mean of both seeds
    assert joint["ours removed"] == pytest.approx(0.55)
    assert joint.change == pytest.approx(0.9355 - 0.9382)
    assert "2 seeds" in joint.differs
    assert not found.published.str.startswith(("RST", "MINT")).any()  # not run here
