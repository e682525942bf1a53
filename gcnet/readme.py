"""What results fill in in README.md, between `<!-- NAME -->` and `<!-- /NAME -->`: no number is typed there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from gcnet import paths
from gcnet.claims import overall
from gcnet.reporting import to_markdown

HEADLINE = "cifar10_vgg16_bn_quarter"  # the study whose verdicts stand first


def fill(text: str) -> str:
    """The README's text with every block as the results are now. Raises ValueError for a block that nothing fills."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise ValueError(f"README block '{name}' is unknown; known: {', '.join(BLOCKS)}")
        return f"<!-- {name} -->\n{BLOCKS[name]()}<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def verdicts() -> str:
    """One row a claim of the headline study."""
    claims = overall(pd.read_csv(paths.results(HEADLINE) / "tables" / "claims.csv"))
    comparisons = claims[["supported", "contradicted", "inconclusive"]]
    counted = ["/".join(map(str, row)) for row in comparisons.itertuples(index=False)]
    table = pd.DataFrame({"claim": claims.statement, "verdict": "**" + claims.verdict + "**"})
    return to_markdown(table.assign(**{"comparisons supported / contradicted / inconclusive": counted}))


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


BLOCKS: dict[str, Callable[[], str]] = {"verdicts": verdicts, "times": times}


def write() -> Path:
    """Fill in README.md; returns its path."""
    path = paths.project() / "README.md"
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path
