"""How much each choice of the reconstruction matters: every one flipped alone from the defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from gcnet.cells import Cell, cell_result, shift_rows
from gcnet.evaluation import bootstrap, by_shift, holm, p_value
from gcnet.study import Study

# choice -> {setting: (parameters that differ from the default, similarity)}. The default is the package's, whatever the
# study sets.
CHOICES: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "tap": {"after BatchNorm and activation": ({"tap": "relu"}, "pearson")},
    "sign": {"absolute": ({"absolute": True}, "pearson")},
    "classes": {"within each class": ({"classwise": True}, "pearson")},
    "residual": {"nearest parents": ({"residual": "nearest"}, "pearson")},
    "images": {
        "100": ({"connectivity_images": 100}, "pearson"),
        "1,000": ({"connectivity_images": 1000}, "pearson"),
    },
    "ghost's BatchNorm": {"the original's": ({"ghost_batchnorm": "original"}, "pearson")},
    "similarity": {
        name: ({}, name) for name in ("spearman", "cosine", "distance", "hsic", "mutual_information", "partial")
    },
}
DEFAULT = ("default", "as in the README")


def variants() -> list[tuple[str, str]]:
    """(choice, setting) of every variant, the default first."""
    return [DEFAULT, *((choice, setting) for choice, settings in CHOICES.items() for setting in settings)]


def variant(study: Study, choice: str, setting: str, seed: int) -> tuple[Study, Cell]:
    """The study and cell that a variant stands for. Raises KeyError for a choice or setting that is not there."""
    base: dict[str, Any] = {
        "tap": None, "absolute": False, "classwise": False, "residual": "all", "connectivity_images": 0,
        "ghost_batchnorm": "identity",
    }  # fmt: skip
    changed, similarity = ({}, "pearson") if (choice, setting) == DEFAULT else CHOICES[choice][setting]
    cell = Cell(study.ablation_pruner, study.ablation_hybrid, similarity, study.ablation_sparsity, seed)
    return study.model_copy(update=base | changed), cell


def run_variant(study: Study, of: tuple[str, str, int]) -> str:
    changed, cell = variant(study, *of)
    cell_result(changed, cell)
    shift_rows(changed, cell)
    return f"{of[0]}: {of[1]}, seed {of[2]}"


def stages(study: Study) -> Iterable[tuple[str, list[Any]]]:
    """What the sweep computes for notebook 11."""
    yield "ablations", [(run_variant, study, (*which, seed)) for seed in study.seeds for which in variants()]


def ablation_rows(study: Study) -> pd.DataFrame:
    """One row a variant, seed and shift: choice, setting, seed, shift, severity, accuracy, macs."""
    rows = []
    for choice, setting in variants():
        for seed in study.seeds:
            changed, cell = variant(study, choice, setting, seed)
            macs = cell_result(changed, cell)["macs"]
            rows += [
                {
                    "choice": choice,
                    "setting": setting,
                    "seed": seed,
                    **{k: row[k] for k in ("shift", "severity", "accuracy")},
                    "macs": macs,
                }
                for row in shift_rows(changed, cell)
            ]
    return pd.DataFrame(rows)


def ablation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """ablations.csv: choice, setting, measure, estimate, ci_low, ci_high, n, p_holm.

    rows: of `ablation_rows`. estimate: the variant's accuracy minus the default's at the same seed (and shift), with
    the hierarchical bootstrap interval; measure is "clean" or "shifted". p_holm counts the rows where anything differs
    and is empty in the others: a choice that cannot matter in this network is no comparison.
    """
    keys = ["seed", "shift", "severity"]
    default = rows[rows.choice == DEFAULT[0]].set_index(keys).accuracy
    table, p = [], {}
    for (choice, setting), part in rows[rows.choice != DEFAULT[0]].groupby(["choice", "setting"], sort=False):
        difference = (part.set_index(keys).accuracy - default).rename("difference").reset_index()
        for measure, wanted in (("clean", difference.severity == 0), ("shifted", difference.severity > 0)):
            values = difference[wanted].pivot_table(index="seed", columns=["shift", "severity"], values="difference")
            if values.empty:
                continue
            found = bootstrap(by_shift(values))
            if values.to_numpy().any():
                p[len(table)] = p_value(found)
            table.append(
                {
                    "choice": choice,
                    "setting": setting,
                    "measure": measure,
                    "estimate": found.estimate,
                    "ci_low": found.low,
                    "ci_high": found.high,
                    "n": found.n,
                    "p_holm": np.nan,
                }
            )
    columns = ["choice", "setting", "measure", "estimate", "ci_low", "ci_high", "n", "p_holm"]
    found = pd.DataFrame(table, columns=columns)
    found.loc[list(p), "p_holm"] = holm(list(p.values()))
    return found
