"""The panel of notebook 05: menus that choose a pruned network and a shift, and the curve that they move."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from gcnet import figures
from gcnet.progress import is_open


def shift_panel(shifts: pd.DataFrame) -> None:
    """Display menus for pruner, method, sparsity and shift, and accuracy by severity of what they choose.

    shifts: of `reporting.shift_table`. Headless: the figure of the first choice alone. Raises ValueError where no
    network is pruned.
    """
    choices = _choices(shifts)
    if not is_open():
        display(figures.severity_line(shifts, **{name: values[0] for name, values in choices.items()}))
        plt.close()
        return
    import ipywidgets as widgets

    labels = {"sparsity": [(f"{value:.0%} removed", value) for value in choices["sparsity"]]}
    menus = {name: widgets.Dropdown(options=labels.get(name, choices[name]), description=name) for name in choices}
    picture = widgets.HTML()

    def draw(_: Any = None) -> None:
        picture.value = _image(figures.severity_line(shifts, **{name: menu.value for name, menu in menus.items()}))

    for menu in menus.values():
        menu.observe(draw, names="value")
    draw()
    rows = list(menus.values())
    display(widgets.VBox([widgets.HBox(rows[:2]), widgets.HBox(rows[2:]), picture]))


def _choices(shifts: pd.DataFrame) -> dict[str, list[Any]]:
    rows = figures.with_methods(shifts[shifts.pruner != "none"])
    if rows.empty:
        raise ValueError("the panel needs at least one pruned network")
    methods = [name for name in rows.method.cat.categories if name in set(rows.method)]
    corruptions = [name for name in dict.fromkeys(rows["shift"]) if name != "clean"]
    return {
        "pruner": list(dict.fromkeys(rows.pruner)),
        "method": [name for name in methods if name != "direct"] or methods,
        "sparsity": sorted(set(rows.sparsity)),
        "shift": [figures.ALL_CORRUPTIONS, *corruptions],
    }


def _image(figure: Figure) -> str:
    """The figure as an <img> that is crisp at any size; its title is what a screen reader says."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{figure.axes[0].get_title(loc="left")}" src="data:image/svg+xml;base64,{encoded}">'
