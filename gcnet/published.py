"""The numbers that the papers give (`reference/published.csv`, each with its source), to stand beside ours."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gcnet.errors import unknown
from gcnet.study import Study

FILE = Path(__file__).resolve().parent.parent / "reference" / "published.csv"


def published(system: str | None = None) -> pd.DataFrame:
    """system, method, dataset, network, dense_accuracy, accuracy, sparsity, macs_saved (fractions), source, note.

    system: SNACS, CKA-SR or FTWT; None for all. GC-Net's own numbers were not at hand. Raises ValueError for another.
    """
    table = pd.read_csv(FILE)
    if system is None:
        return table
    if system not in set(table.system):
        raise unknown("system with published numbers", system, dict.fromkeys(table.system))
    return table[table.system == system].reset_index(drop=True)


def beside(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """Every published CIFAR row and our setting, same system and network, that removes most nearly as much.

    rows: of comparison.csv. "removed" is the share of weights, for FTWT of multiply-accumulates; "change" is accuracy
    less the dense network's, where there is one. differs: in what the two runs are not alike. Systems that the study
    did not run are left out.
    """
    ours = _settings(rows)
    found = []
    for line in published().itertuples():
        alike = (ours.method.map(_family) == _family(line.method)) & (ours.network.map(_plain) == _plain(line.network))
        mine = ours[(ours.system == line.system) & alike]
        if not line.dataset.startswith("CIFAR") or mine.empty:
            continue
        removed = line.macs_saved if line.system == "FTWT" else line.sparsity
        near = mine.loc[(mine.removed - removed).abs().idxmin()]
        found.append(
            {
                "published": line.method,
                "on": f"{line.network}, {line.dataset}",
                "removed": removed,
                "accuracy": line.accuracy,
                "change": line.accuracy - line.dense_accuracy,
                "ours": near.method,
                "ours on": f"{near.network}, {study.dataset}",
                "ours removed": near.removed,
                "ours accuracy": near.accuracy,
                "ours change": near.accuracy - near.dense,
                "differs": ", ".join(
                    [
                        f"images ({line.dataset}: {study.dataset})",
                        f"width ({near.network.split(' x ')[-1]} of theirs)",
                        *([f"setting ({line.method}: {near.method})"] if _setting(line.method, near.method) else []),
                        line.note if isinstance(line.note, str) and line.note else "schedule",
                        f"ours last epoch, {near.seeds} seeds",
                    ]
                ),
                "source": line.source,
            }
        )
    return pd.DataFrame(found)


def _family(method: str) -> str:
    """A method without its setting: 'FTWT joint (r 0.92)' -> 'FTWT joint', 'SNACS with sensitivity' -> 'SNACS'."""
    return method.split(" (")[0].split(" with ")[0]


def _plain(network: str) -> str:
    """A network without its width, as both sides write it: 'VGG16-BN' and 'vgg16_bn x 0.25' -> 'vgg16bn'."""
    return network.split(" x ")[0].lower().replace("-", "").replace("_", "")


def _setting(theirs: str, ours: str) -> bool:
    """Whether both name a setting in brackets, and not the same one."""
    return "(" in theirs and "(" in ours and theirs.split("(")[1] != ours.split("(")[1]


def _settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Our clean accuracies, mean over seeds, one row a setting, under the systems' published names."""
    clean = rows[rows.shift_family == "clean"]
    names = {"peer of SNACS": "SNACS", "sparse training": "CKA-SR"}
    clean = clean.assign(
        system=clean.system.replace(names),
        removed=(1 - clean.macs).where(clean.system == "FTWT", clean.sparsity),
        level=(100 * clean.sparsity).round().where(clean.system.isin(["CKA-SR", "sparse training"]), 0),
    )
    dense = clean[clean.system == "dense"].groupby("network").accuracy.mean()
    grouped = clean[clean.system != "dense"].groupby(["system", "method", "level", "network"], sort=False)
    table = grouped.agg(removed=("removed", "mean"), accuracy=("accuracy", "mean"), seeds=("seed", "nunique"))
    table = table.reset_index()
    return table.assign(dense=table.network.map(dense))
