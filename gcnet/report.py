"""`results/<study>/report.html`: one page that can be mailed, of what a study's notebooks wrote; computes nothing."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gcnet import paths, run
from gcnet.claims import every_verdict
from gcnet.store import atomic_write, provenance
from gcnet.study import Study

TEMPLATES = Path(__file__).parent / "templates"
MOST_ROWS = 200  # of a table, on the page; the rest is in its CSV
LONGEST_CAPTION = 240  # characters
FOLDED_ROWS = 30  # a longer table is folded away
_NOT_COMPARED = ("device", "notebooks")  # parameters that change no result


@dataclass(frozen=True)
class Picture:
    name: str
    alt: str
    source: str  # data: address of the SVG

    @property
    def caption(self) -> str:
        """The first sentence of what the picture says; the rest are its numbers. '' where all is numbers."""
        sentence = self.alt.split(". ")[0].removesuffix(".")
        return sentence if len(sentence) <= LONGEST_CAPTION else ""


@dataclass(frozen=True)
class Table:
    name: str
    head: list[str]
    rows: list[list[str]]
    more: int  # rows that are not shown
    csv: str  # path from the project's folder

    @property
    def folded(self) -> bool:
        return len(self.rows) > FOLDED_ROWS


@dataclass
class Chapter:
    """What one notebook wrote."""

    name: str
    title: str
    question: str
    link: str  # its page, relative to the report
    says: str  # HTML: its last words, computed
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(name: str) -> tuple[Path, list[str]]:
    """Write results/<study>/report.html and a page for each executed notebook; returns (the report, what is missing).

    name: of a study in `params/`. The page holds what there is; what is missing, failed, or was made with other
    parameters than those of the params file now (then it is left out) is listed on it, with the command that makes it.
    It asks nothing of the network. Raises FileNotFoundError for an unknown study (naming the nearest) and for one that
    has no results.
    """
    from jinja2 import Environment, FileSystemLoader

    study = run.load_study(name)
    folder = paths.results(study.study)
    facts = _facts(folder)
    if not facts and not list(folder.glob("notebooks/*.ipynb")):
        raise FileNotFoundError(f"study '{name}' has no results yet: make reproduce STUDY={name}")
    other = {item: why for item, fact in facts.items() if (why := _differs(fact, study))}
    reasons: dict[str, list[str]] = {}
    for item, why in other.items():
        reasons.setdefault(why, []).append(item)
    chapters = list(_chapters(study, folder, set(other)))
    missing = _missing(study, folder)
    claims = every_verdict(folder, set(other))
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        study=study,
        summary=_summary(study, folder, claims, set(other)),
        claims=claims,
        forests=[p for c in chapters for p in c.pictures if p.name.endswith("_claims")],
        chapters=chapters,
        missing=missing,
        left_out=reasons,
        origins=_origins({item: fact for item, fact in facts.items() if item not in other}),
        parameters=study.model_dump(mode="json"),
        command=f"make reproduce STUDY={study.study}",
        made_by=provenance(),
    )
    with atomic_write(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    stale = [f"{len(items)} figures and tables {why}" for why, items in reasons.items()]
    return folder / "report.html", [*missing, *stale]


# --- what there is --------------------------------------------------------------------------------------------------


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    """{"figures/fig05_claims": what it was made from} of every figure and table."""
    files = sorted([*folder.glob("figures/*.json"), *folder.glob("tables/*.json")])
    return {f"{p.parent.name}/{p.stem}": json.loads(p.read_text(encoding="utf-8")) for p in files}


def _differs(fact: Mapping[str, Any], study: Study) -> str:
    """Why a figure or table is not of this study as its params file is now; '' if it is.

    A parameter that did not exist when it was made had the default's effect.
    """
    now = study.model_dump(mode="json")
    made = {name: f.get_default() for name, f in Study.model_fields.items()} | fact["study"]
    made = Study.model_construct(**made).model_dump(mode="json", warnings=False)
    names = [n for n in now if n not in _NOT_COMPARED and _plain(made.get(n)) != _plain(now[n])]
    return "made with " + ", ".join(f"{n} {made.get(n)}, now {now[n]}" for n in names[:3]) if names else ""


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _missing(study: Study, folder: Path) -> list[str]:
    """What the study's notebooks have not written yet."""
    lines = []
    for stage in run.stages(study.study):
        if stage == "sweep" or (folder / "notebooks" / f"{stage}.ipynb").exists():
            continue
        failed = folder / "notebooks" / f"{stage}.failed.ipynb"
        lines.append(f"{stage}: " + (f"failed, see {run.short(failed)}" if failed.exists() else "has not run"))
    return lines


def _origins(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each version of code and machine that figures and tables were drawn by: more than one is said."""
    rows: dict[str, dict[str, Any]] = {}
    for fact in facts.values():
        row = {
            "git": fact["git_sha"][:9] + (" (edited)" if fact["git_dirty"] else ""),
            "device": fact["device"],
            "platform": fact["platform"],
            "versions": ", ".join(f"{name} {version}" for name, version in fact["versions"].items()),
            "data_sha256": fact["data_sha256"],
        }
        computed = rows.setdefault(json.dumps(row), {**row, "count": 0, "computed_by": {}})
        computed["count"] += 1
        for sha, count in fact["results_computed_by"].items():
            computed["computed_by"][sha[:9]] = max(count, computed["computed_by"].get(sha[:9], 0))
    return sorted(rows.values(), key=lambda row: -row["count"])


# --- chapters -------------------------------------------------------------------------------------------------------


def _chapters(study: Study, folder: Path, left_out: set[str]) -> Iterator[Chapter]:
    import nbformat

    for file in sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if file.name.endswith(".failed.ipynb") or not study.runs(file.stem):
            continue
        notebook = nbformat.read(file, as_version=4)
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        title, question = _opening(notebook)
        chapter = Chapter(file.stem, title, question, _page(notebook, file, title), _last_words(notebook))
        for name in dict.fromkeys(re.findall(r'resolved,\s*"(\w+)"', code)):
            if (table := folder / "tables" / f"{name}.md").exists() and f"tables/{name}" not in left_out:
                chapter.tables.append(_table(table))
        for picture in sorted(folder.glob("figures/*.svg")):
            if _draws(code, picture.stem) and f"figures/{picture.stem}" not in left_out:
                chapter.pictures.append(_picture(picture))
        yield chapter


def _draws(code: str, name: str) -> bool:
    """Whether a notebook's code names the figure: as it is, or with a number at its end (`fig03_layers_{...}`)."""
    stem = re.sub(r"\d+$", "", name)
    return f'"{name}"' in code or (stem != name and f'"{stem}{{' in code)


def _opening(notebook: Any) -> tuple[str, str]:
    """(title, question) of the notebook's first cell."""
    text = notebook.cells[0].source
    title = text.splitlines()[0].lstrip("# ").strip()
    question = re.search(r"\*\*Question\.\*\*\s*(.+?)(?:\n\s*\n|$)", text, re.DOTALL)
    return title, " ".join(question[1].split()) if question else ""


def _last_words(notebook: Any) -> str:
    """The Markdown that the cell tagged `answer` (else the last one) displays, as HTML; '' where there is none."""
    from nbconvert.filters import markdown2html_mistune

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    last = next((cell for cell in code if "answer" in cell.metadata.get("tags", [])), code[-1])
    found = [output["data"]["text/markdown"] for output in last.outputs if "text/markdown" in output.get("data", {})]
    return markdown2html_mistune("".join(found[-1])) if found else ""


def _page(notebook: Any, file: Path, title: str) -> str:
    """Write the executed notebook as a page beside it; returns its address from the report."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_template_basedirs=[str(TEMPLATES)], template_name="notebook", embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    with atomic_write(file.with_suffix(".html")) as temporary:
        temporary.write_text(body, encoding="utf-8")
    return f"notebooks/{file.stem}.html"


def _picture(file: Path) -> Picture:
    alt = json.loads(file.with_suffix(".json").read_text(encoding="utf-8")).get("alt", "") or file.stem
    encoded = base64.b64encode(file.read_bytes()).decode()
    return Picture(file.stem, alt, f"data:image/svg+xml;base64,{encoded}")


def _table(file: Path) -> Table:
    """A table as it was rendered (`|` within a cell is escaped there)."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head, _, *rows = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return Table(file.stem, head, rows[:MOST_ROWS], max(0, len(rows) - MOST_ROWS), run.short(file.with_suffix(".csv")))


# --- the answer first -----------------------------------------------------------------------------------------------


def _summary(study: Study, folder: Path, claims: pd.DataFrame, left_out: set[str]) -> list[str]:
    """Sentences that say what was run and what came out, every number from the tables."""
    lines = [
        f"{study.network} at {study.width:g} of its width on {study.dataset}, {len(study.seeds)} "
        f"seed{'s' if len(study.seeds) > 1 else ''}; intervals are over seeds and shifts."
    ]
    summary = folder / "tables" / "shift_summary.csv"
    if summary.exists() and "tables/shift_summary" not in left_out:
        lines += _accuracies(pd.read_csv(summary))
    if len(claims):
        counts = claims.verdict.value_counts()
        words = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("supported", "contradicted", "inconclusive"))
        lines.append(f"Of {len(claims)} claims tested here: {words}.")
    return lines


def _accuracies(summary: pd.DataFrame) -> Iterator[str]:
    dense = summary[summary.pruner == "none"][["clean", "shifted"]].mean()
    yield f"Dense networks: {dense.clean:.1%} on clean test images, {dense.shifted:.1%} under shift."
    keys = ["sparsity", "pruner", "hybrid", "similarity"]
    means = summary[summary.pruner != "none"].groupby(keys, sort=False).shifted.mean().reset_index()
    for sparsity, part in means.groupby("sparsity"):
        direct, guided = (part[(part.hybrid == "direct") == is_direct] for is_direct in (True, False))
        if len(direct) and len(guided):
            best, other = guided.loc[guided.shifted.idxmax()], direct.loc[direct.shifted.idxmax()]
            yield (
                f"With {sparsity:.0%} of the weights removed, the best guided network ({best.pruner}, {best.hybrid}, "
                f"{best.similarity}) keeps {best.shifted:.1%} under shift, the best directly pruned ({other.pruner}) "
                f"{other.shifted:.1%}: the best of {len(guided)} and of {len(direct)}, so chance is in it; verdicts "
                "pair the same pruner."
            )
