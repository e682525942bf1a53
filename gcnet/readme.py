"""What results fill in in README.md, between `<!-- NAME -->` and `<!-- /NAME -->`: no number is typed there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from gcnet import paths
from gcnet.claims import every_verdict, load_claims
from gcnet.comparison import PRUNER_NAMES, budget_table
from gcnet.reporting import to_markdown
from gcnet.study import Study

COMPARISON = "cifar10_vgg16_bn_quarter_comparison"
SPEED = "results/benchmarks/speed.md"


def fill(text: str) -> str:
    """The README's text with every block as the results are now. Raises ValueError for a block that nothing fills."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise ValueError(f"README block '{name}' is unknown; known: {', '.join(BLOCKS)}")
        return f"<!-- {name} -->\n{BLOCKS[name]()}<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def verdicts() -> str:
    """One row a claim: its verdict by study; studies on digits or of one seed only where there is no other."""
    found = {
        folder.name: every_verdict(folder).set_index("claim")
        for folder in sorted(paths.results("").glob("*/"))
        if folder.name not in ("smoke", COMPARISON)  # the comparison repeats the claims of the studies it gathers
    }
    rows = []
    for claim in load_claims():
        tested = {study: known.loc[claim["id"]] for study, known in found.items() if claim["id"] in known.index}
        # One seed decides nothing: such a study is told of only where there is no other.
        several = {study: row for study, row in tested.items() if row.n > 1 or row.verdict != "inconclusive"}
        tested = several or tested
        if len(tested) > 1:
            tested.pop("digits", None)
        for study, row in tested.items():
            counted = f"{row.supported}/{row.contradicted}/{row.inconclusive}"
            rows.append({"claim": row.statement, "study": f"`{study}`", "verdict": f"**{row.verdict}**",
                         "comparisons supported / contradicted / inconclusive": counted})  # fmt: skip
        if not tested:
            rows.append({"claim": claim["statement"], "study": "", "verdict": "not tested yet",
                         "comparisons supported / contradicted / inconclusive": ""})  # fmt: skip
    table = pd.DataFrame(rows)
    return f"{to_markdown(table.assign(claim=table.claim.mask(table.claim.duplicated(), '')))}\n{_margins()}\n"


def _margins() -> str:
    """What GC-Net's claims tolerate, from params/claims.yaml, in a sentence."""
    tests = [test for claim in load_claims() for test in claim.get("comparisons", ())]
    loss = {100 * test["margin"] for test in tests if test["measure"] == "shifted" and test.get("margin")}
    macs = {100 * test["margin"] for test in tests if test["measure"] == "macs"}
    close = {test["above"] for test in tests if "above" in test}
    loss, macs, close = (", ".join(f"{value:g}" for value in sorted(values)) for values in (loss, macs, close))
    return (
        f"*At least as accurate* tolerates a loss of {loss} points, *keep the multiply-accumulates* {macs} points of "
        f"the dense network's, and *close* is a rank correlation above {close}. A verdict is corrected for the number "
        "of comparisons of its claim; the intervals further up are not."
    )


# What the answer tells: (of what, study, claim, part of the measures told).
TOLD = (
    ("Later layers guided, VGG16-BN on CIFAR-10", "cifar10_vgg16_bn_quarter", "gcnet-1", "shift"),
    ("Later layers guided, ResNet-18 on CIFAR-10", "cifar10_resnet18_quarter", "gcnet-1", "shift"),
    ("Later layers guided, ResNet-18 on Fashion-MNIST", "fashion_mnist_resnet18_quarter", "gcnet-1", "shift"),
    ("Partial correlation against Pearson, VGG16-BN", "cifar10_vgg16_bn_quarter", "ours-5", "shift"),
    ("Magnitude and connectivity in one ranking, VGG16-BN", "cifar10_vgg16_bn_quarter_mix", "ours-6", "shift"),
    ("Whole filters, ghost against weights", "cifar10_vgg16_bn_quarter_structured", "structured-1", "- direct"),
    ("SNACS at the sparsity that it finds", "cifar10_vgg16_bn_quarter_snacs", "snacs-4", "shift"),
    ("FTWT at the same operations", "cifar10_vgg16_bn_quarter_ftwt", "ftwt-2", "shift"),
    ("CKA-SR's penalty in sparse training, clean images", "cifar10_resnet20_cka_sr", "cka-sr-3", "clean"),
)
NAMES = {"snacs": "SNACS", "mint": "MINT", "l1_block": "L1 blocks", "l1_filter": "L1 filters",
         "gcnet": "OS-SynFlow B25", "decoupled": "masks by image", "L1 filter": "static L1 filters",
         "B25 pearson": "B25", "BH pearson": "BH", "Full pearson": "Full", "rst": "static random masks",
         "rigl": "RigL", "rewind": "magnitude rewinding", "l1 Mix25 pearson": "Mix25", "l1 Mix100 pearson": "Mix100",
         "l1 Mix25 partial": "Mix25 partial", "l1 direct": "direct L1", "lamp direct": "direct LAMP"}  # fmt: skip


def answer() -> str:
    """A sentence that counts, and differences in points of accuracy with their intervals, from the tables of claims."""
    rows = []
    for what, study, claim, measure in TOLD:
        for file in sorted((paths.results(study) / "tables").glob("*claims.csv")):
            told = _claims(file)
            told = told[(told.claim == claim) & told.measure.str.contains(measure, regex=False)]
            rows += [{"question": what, **_points(row)} for row in told.itertuples()]
    if not rows:
        return "No study has been run yet.\n"
    table = pd.DataFrame(rows)
    of_pruners = table[table.pruner != ""]
    keys = ["question", "compared"]
    wide = of_pruners.pivot(index=keys, columns="pruner", values="difference")
    wide = wide.reindex(pd.MultiIndex.from_frame(of_pruners[keys].drop_duplicates()))
    wide = wide[[name for name in PRUNER_NAMES.values() if name in wide]].fillna("").reset_index()
    plain = table[table.pruner == ""].drop(columns="pruner")
    parts = [to_markdown(part.assign(question=part.question.mask(part.question.duplicated(), "")))
             for part in (wide, plain) if len(part)]  # fmt: skip
    return "\n".join([_counted(), *parts])


def _claims(file: Path) -> pd.DataFrame:
    """A table of claims; what says nothing of pruner or collapse is ""."""
    return pd.read_csv(file, keep_default_na=False, na_values={"p": "", "p_holm": ""})


def _counted() -> str:
    """How often guidance of later layers is worse or better than direct pruning, over the studies that can tell."""
    tables = []
    for file in sorted(paths.results("").glob("*/tables/claims.csv")):
        table = _claims(file)
        study = file.parent.parent.name
        if study not in ("smoke", "digits", COMPARISON):
            shifted = table.measure.str.startswith("accuracy under shift")
            tables.append(table[(table.claim == "gcnet-1") & (table.n > 1) & shifted].assign(study=study))
    every = pd.concat(tables) if tables else pd.DataFrame(columns=["study"])
    if every.empty:
        return ""
    worse, better = every.ci_high < 0, every.ci_low > 0
    silent = int((better & every.collapsed.str.startswith("direct")).sum())
    neither = int((~worse & ~better & every.collapsed.str.contains(", ")).sum())
    lost = f", {neither} of them where networks of both sides let none through" if neither else ""
    return (
        f"Guidance of later layers (B25, BH) is less accurate under shift than direct pruning in {worse.sum()} of "
        f"{len(every)} settings (pruner, share removed and hybrid, in the {every.study.nunique()} studies of several "
        f"seeds), more accurate in {better.sum()}, {silent} of them where direct pruning lets no signal through; in "
        f"{len(every) - worse.sum() - better.sum()} the interval holds 0{lost}.\n"
    )


def _points(row: Any) -> dict[str, str]:
    sides = row.measure.split(": ")[-1].split(", beta")[0].split(" - ")
    compared = " against ".join(NAMES.get(side, side) for side in sides)
    at = f", {row.sparsity:.0%} removed" if row.sparsity else ""
    points = f"{100 * row.estimate:+.1f} [{100 * row.ci_low:+.1f}, {100 * row.ci_high:+.1f}]"
    apart = row.ci_low > 0 or row.ci_high < 0
    points = (f"**{points}**" if apart else points) + (" ‡" if row.collapsed else "")
    return {"compared": compared + at, "pruner": PRUNER_NAMES.get(row.pruner, row.pruner), "difference": points}


def systems() -> str:
    """One row a budget of operations and setting: the plain settings of the comparison, and each budget's best."""
    file = paths.results(COMPARISON) / "tables" / "comparison.csv"
    if not file.is_file():
        return "The systems have not been compared yet.\n"
    rows = pd.read_csv(file)
    table = budget_table(rows, "macs", only_plain=True)
    dense = rows[rows.system == "dense"].groupby("shift_family").accuracy.mean()
    whole = ", ".join(f"{100 * mean:.1f} % {family}" for family, mean in dense.items())
    study = Study.load(COMPARISON)
    tuned = {"masks and blocks": study.finetune_epochs, "FTWT and its static peer": study.ftwt_epochs,
             "whole filters": study.structured_finetune_epochs}  # fmt: skip
    epochs = ", ".join(f"{what} {count}" for what, count in tuned.items())
    scratch = f" Epochs from the start: dense {study.epochs}"
    scratch += f", sparse training {study.cka_epochs}." if study.runs("07") else "."
    return f"{to_markdown(table)}\nThe dense networks: {whole}. Epochs of fine-tuning: {epochs}.{scratch}\n"


def times() -> str:
    """One row a study with results: how long its sweep's processes computed, and on what."""
    rows = []
    for file in sorted(paths.results("").glob("*/tables/times.csv")):
        table = pd.read_csv(file)
        if file.parent.parent.name != "smoke":
            rows.append(
                {
                    "study": f"`{file.parent.parent.name}`",
                    "machine": ", ".join(sorted(set(table.device))),
                    "threads a process": ", ".join(map(str, sorted(set(table.threads)))),
                    "results": table.entries.sum(),
                    "process-minutes": f"{table.seconds.sum() / 60:.0f}",
                }
            )
    return to_markdown(pd.DataFrame(rows)) if rows else "No study has a table of times yet.\n"


PAPER = [f"{data}_{network}" for data in ("cifar10", "fashion_mnist", "tiny_imagenet")
         for network in ("vgg16_bn", "resnet18")]  # fmt: skip


def plan() -> str:
    """What `make paper` would compute: dense trainings, cells, evaluated sets of images, gigabytes of networks kept."""
    from torch import nn

    from gcnet import networks
    from gcnet.cells import cells

    rows = []
    for name in PAPER:
        study = Study.load(name)
        model = networks.build(study.network, 10, channels=study.channels, width=study.width, seed=0)
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        found = cells(study)
        sets = 1 + len(study.corruptions) * len(study.severities) + len(study.natural_shifts)
        rows.append(
            {
                "study": f"`{name}`",
                "dense networks": len(study.seeds),
                "epochs of each": study.epochs,
                "pruned networks": sum(not cell.is_dense for cell in found),
                "epochs of fine-tuning": study.finetune_epochs,
                "evaluated sets of images": len(found) * sets,
                "kept weights, GB": f"{4e-9 * weights * sum(1 - cell.sparsity for cell in found):.0f}",
            }
        )
    return to_markdown(pd.DataFrame(rows))


def speed() -> str:
    """How many benchmarks reach their target, and one row for each that does not."""
    table = targets()
    if table.empty:
        return "No benchmark has been run yet.\n"
    missed = table[table.reached != "yes"]
    head = f"{len(table) - len(missed)} of {len(table)} targets were reached ([all of them]({SPEED})). "
    return head + (f"Missed:\n\n{to_markdown(missed.drop(columns='reached'))}" if len(missed) else "None was missed.\n")


def targets() -> pd.DataFrame:
    """One row a benchmark that has a target: what was measured and whether it reaches the target."""
    columns = ["benchmark", "case", "against", "measured", "target", "reached"]
    rows = []
    for file in sorted(paths.results("benchmarks").glob("*.csv")):
        table = pd.read_csv(file, keep_default_na=False)
        for row in table[table.target.astype(bool)].itertuples() if "target" in table else ():
            bound = re.match(r"(at most|at least) ([\d.]+) ?(s|MiB)?\b", row.target)
            if not bound:
                raise ValueError(f"{file.name}: target '{row.target}' is not 'at most' or 'at least' a number")
            side, limit, unit = bound.groups()
            value = float(row.ours_s if unit else row.ratio)
            reached = value <= float(limit) if side == "at most" else value >= float(limit)
            measured = f"{value:.3g} {unit}" if unit else f"{value:.3g}"
            rows.append({"benchmark": file.stem, "case": row.case, "against": row.peer, "measured": measured,
                         "target": row.target, "reached": "yes" if reached else "**no**"})  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def zoo() -> str:
    """How many networks of each library work, and what does not and why."""
    file = paths.results("benchmarks") / "zoo.csv"
    if not file.is_file():
        return (
            "`python -m benchmarks zoo` tries all of torchvision's classification networks and some of timm's on "
            "random weights; it takes about an hour and has not been run for this version.\n"
        )
    table = pd.read_csv(file, keep_default_na=False)
    head = "Tried on random weights (`python -m benchmarks zoo`; [every network](results/benchmarks/zoo.csv)):\n"
    lines, rows = [head], []
    for library, part in table.groupby("library", sort=False):
        tried = part[~part.masks.str.startswith("not tried")]
        ghost, snacs, smaller = (int((tried[what] == "yes").sum()) for what in ("masks", "snacs", "structured"))
        lines.append(
            f"- {library}: of {len(tried)} networks tried, the ghost's masks work on {ghost}, SNACS's on {snacs}, "
            f"smaller networks came from {smaller}."
        )
    for row in table.itertuples():
        for what, result in (("masks", row.masks), ("SNACS", row.snacs), ("smaller network", row.structured)):
            if result.startswith("no: ") or result == "wrong sparsity":
                reason = result.removeprefix("no: ").split(";")[0].split("(")[0].strip(" :,")
                rows.append({"network": row.network, "what": what, "why not": reason})
    if not rows:
        return "\n".join(lines) + "\n"
    why = pd.DataFrame(rows).groupby(["what", "why not"], sort=False).network.agg(", ".join).reset_index()
    return "\n".join(lines) + "\n\n" + to_markdown(why[["network", "what", "why not"]])


BLOCKS: dict[str, Callable[[], str]] = {
    "answer": answer,
    "verdicts": verdicts,
    "systems": systems,
    "times": times,
    "plan": plan,
    "speed": speed,
    "zoo": zoo,
}


def write() -> Path:
    """Fill in README.md, and write the table of every benchmark with a target; returns README.md's path."""
    table = targets()
    if len(table):
        (paths.project() / SPEED).write_text(to_markdown(table), encoding="utf-8")
    path = paths.project() / "README.md"
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path
