"""The panel of notebook 05, and the bar: in an open notebook only."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import ipywidgets as widgets
import pandas as pd
import pytest
from matplotlib.figure import Figure

from gcnet import figures, panel, progress

KEYS = ["pruner", "hybrid", "similarity", "sparsity", "seed", "shift", "severity", "accuracy"]
ROWS = [
    (pruner, hybrid, similarity, sparsity, seed, shift, severity, 0.9 - sparsity / 2 - severity / 20 - seed / 100)
    for pruner, hybrid, similarity, sparsity in [
        ("none", "none", "none", 0.0),
        ("l1", "direct", "none", 0.5),
        ("l1", "BH", "pearson", 0.5),
        ("l1", "BH", "partial", 0.5),
        ("l1", "direct", "none", 0.8),
        ("l1", "BH", "pearson", 0.8),
    ]
    for seed in (0, 1)
    for shift, severity in [("clean", 0), ("contrast", 1), ("contrast", 5), ("fog", 1), ("fog", 5), ("stl10_32", 1)]
]
SHIFTS = pd.DataFrame(ROWS, columns=KEYS)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(panel, "display", found.append)
    return found


def test_headless_it_is_one_figure(shown: list[Any]) -> None:
    panel.shift_panel(SHIFTS)
    (figure,) = shown
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_title(loc="left") == "L1, global, 50 % removed: all corruptions"


def test_in_an_open_notebook_every_menu_moves_the_curve(monkeypatch: pytest.MonkeyPatch, shown: list[Any]) -> None:
    monkeypatch.setattr(panel, "is_open", lambda: True)
    panel.shift_panel(SHIFTS)
    (box,) = shown
    first, second, picture = box.children
    menus = {menu.description: menu for row in (first, second) for menu in row.children}
    assert list(menus) == ["pruner", "method", "sparsity", "shift"]
    assert isinstance(picture, widgets.HTML)
    seen = {picture.value}
    for name, value in (("method", "BH partial"), ("sparsity", 0.8), ("shift", "fog"), ("shift", "stl10_32")):
        menus[name].value = value
        seen.add(picture.value)
    assert len(seen) == 5
    assert 'alt="L1, global, 80 % removed: stl10 32"' in picture.value


def test_without_a_pruned_network_there_is_nothing_to_choose(shown: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least one pruned network"):
        panel.shift_panel(SHIFTS[SHIFTS.pruner == "none"])


def test_the_curve_is_the_mean_over_seeds_and_corruptions() -> None:
    figure = figures.severity_line(SHIFTS, "l1", "BH", 0.8, "all corruptions")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["BH"] == pytest.approx([49.5, 44.5, 24.5])  # severities 0, 1, 5; the natural shift is no corruption
    assert set(lines) == {"dense", "direct", "BH"}


def test_a_notebook_is_open_only_in_a_kernel_that_was_not_started_headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GCNET_HEADLESS", raising=False)

    class ZMQInteractiveShell:
        pass

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not progress.is_open()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    assert progress.is_open()
    monkeypatch.setenv("GCNET_HEADLESS", "1")
    assert not progress.is_open()


def test_the_bar_shows_nothing_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(3, "cells") as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")
