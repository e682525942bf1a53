"""The report: one page of what there is, that says what is missing and asks nothing of the network."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gcnet import report, reporting
from gcnet.__main__ import main
from gcnet.reporting import in_words, save_figure, save_table, subject, to_markdown
from gcnet.study import Study

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = pd.DataFrame(
    {
        "claim": ["gcnet-1", "gcnet-1"],
        "statement": ["Later layers <guided> & earlier direct."] * 2,
        "verdict": ["supported", "inconclusive (n too small: would need about 9 seeds)"],
        "n": 3,
    }
)
SOURCE = """reporting.save_table(frame, resolved, "claims")
reporting.save_table(long, resolved, "long", rendered)
reporting.save_figure(figure, resolved, "fig05_claims")
name = f"fig05_shifts_{level}"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of one notebook that has run, and one that has not."""
    monkeypatch.chdir(tmp_path)
    for name in ("GCNET_RUNS", "GCNET_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text('study: tiny\nnotebooks: ["04", "05"]\nseeds: [0]\n')
    shutil.copy(ROOT / "params" / "claims.yaml", tmp_path / "params")
    for name in ("04_hybrids", "05_shift", "06_snacs"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
    study = Study.load("tiny")
    save_table(CLAIMS, study, "claims")
    save_table(pd.DataFrame({"a": range(500), "b": ["x|y"] * 500}), study, "long")
    figure, axis = plt.subplots(figsize=(2, 2))
    axis.plot([0, 1])
    for name in ("fig05_claims", "fig05_shifts_950", "fig04_other"):
        save_figure(figure, study, name, alt=f"{name} in words. l1 0.8: direct 72.4.")
    plt.close(figure)
    said = new_output("display_data", data={"text/markdown": "- **gcnet-1**: it holds."})
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# 05 · Under shift\n\n**Question.** Does it hold\nor not?\n\n**Needs** 04."),
            new_code_cell(SOURCE, execution_count=1, outputs=[said]),
        ]
    )
    folder = tmp_path / "results" / "tiny" / "notebooks"
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / "05_shift.ipynb")
    return tmp_path


class Outside(HTMLParser):
    """The addresses that a page loads something from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            loads = (name == "src" and tag != "a") or (name == "href" and tag == "link")
            if loads and value and not value.startswith("data:"):
                self.found.append(f"{tag} {value}")


def loads(page: str) -> list[str]:
    parser = Outside()
    parser.feed(page)
    return parser.found + re.findall(r"url\((?!['\"]?(?:data:|#))[^)]*\)|@import[^;]*", page)


def test_the_page_has_what_there_is_and_says_what_is_missing(project: Path) -> None:
    path, missing = report.write_report("tiny")
    assert path == project / "results" / "tiny" / "report.html"
    assert missing == ["04_hybrids: has not run"]  # and 06 is none of the study's
    page = path.read_text()
    assert "05 · Under shift" in page
    assert "Does it hold or not?" in page
    assert "<strong>gcnet-1</strong>: it holds." in page  # the notebook's last words
    assert "make reproduce STUDY=tiny" in page
    assert 'alt="fig05_claims in words. l1 0.8: direct 72.4."' in page
    assert "<figcaption>fig05_claims in words (<code>" in page
    assert "fig05_shifts_950" in page  # named by the notebook with its level left open
    assert "fig04_other" not in page  # drawn by no notebook that ran
    assert "Later layers &lt;guided&gt; &amp; earlier direct." in page
    assert 'class="verdict inconclusive"' in page  # not every comparison is supported


def test_long_tables_are_folded_and_cut_with_the_place_of_the_rest(project: Path) -> None:
    page = report.write_report("tiny")[0].read_text()
    assert "the first 200 of 500 rows; all in results/tiny/tables/long.csv" in page
    assert "<details><summary><strong>long</strong>, 500 rows" in page
    assert "<td>x|y</td>" in page


def test_neither_page_nor_notebooks_load_anything(project: Path) -> None:
    path, _ = report.write_report("tiny")
    assert loads(path.read_text()) == []
    assert "default-src 'none'" in path.read_text()
    executed = path.parent / "notebooks" / "05_shift.html"
    assert 'href="notebooks/05_shift.html"' in path.read_text()
    assert "Does it hold" in executed.read_text()
    assert loads(executed.read_text()) == []
    assert "cdn" not in executed.read_text()


def test_what_was_made_with_other_parameters_is_left_out_and_said(project: Path) -> None:
    params = project / "params" / "tiny.yaml"
    params.write_text(params.read_text() + "epochs: 7\n")
    path, missing = report.write_report("tiny")
    assert missing[1:] == ["5 figures and tables made with epochs 20, now 7"]
    page = path.read_text()
    assert "tables/claims" in page
    assert "No claim was tested by what there is." in page
    assert "data:image/svg" not in page


def test_a_parameter_that_is_newer_than_a_result_had_the_effect_of_its_default(project: Path) -> None:
    file = project / "results" / "tiny" / "tables" / "claims.json"
    fact = json.loads(file.read_text())
    del fact["study"]["snacs_rule"], fact["study"]["guidance"]
    file.write_text(json.dumps(fact))
    assert report.write_report("tiny")[1] == ["04_hybrids: has not run"]


def test_results_of_two_versions_are_said(project: Path) -> None:
    assert "different versions" not in report.write_report("tiny")[0].read_text()
    file = project / "results" / "tiny" / "tables" / "claims.json"
    fact = json.loads(file.read_text())
    fact["git_sha"] = "f" * 40
    file.write_text(json.dumps(fact))
    page = report.write_report("tiny")[0].read_text()
    assert "drawn by 2 different versions" in page
    assert "f" * 9 in page


def test_a_failed_notebook_is_said(project: Path) -> None:
    (project / "results" / "tiny" / "notebooks" / "04_hybrids.failed.ipynb").write_text("{}")
    _, missing = report.write_report("tiny")
    assert missing == ["04_hybrids: failed, see results/tiny/notebooks/04_hybrids.failed.ipynb"]


def test_studies_that_are_unknown_or_empty_are_errors(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--study", "tinny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    shutil.rmtree(project / "results")
    assert main(["report", "--study", "tiny"]) == 2
    assert "study 'tiny' has no results yet: make reproduce STUDY=tiny" in capsys.readouterr().err


def test_the_command_says_where_the_page_is_and_what_is_not_in_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--study", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "results/tiny/report.html" in said
    assert "not in it: 04_hybrids: has not run" in said
    assert "make reproduce STUDY=tiny" in said


def test_the_summary_gives_the_numbers_of_the_tables(project: Path) -> None:
    keys = ["pruner", "hybrid", "similarity", "sparsity", "seed", "clean", "shifted"]
    rows = [
        ("none", "none", "none", 0.0, 0, 0.9, 0.7),
        ("l1", "direct", "none", 0.8, 0, 0.8, 0.5),
        ("l1", "BH", "pearson", 0.8, 0, 0.8, 0.625),
        ("l1", "FH", "pearson", 0.8, 0, 0.8, 0.25),
    ]
    save_table(pd.DataFrame(rows, columns=keys), Study.load("tiny"), "shift_summary")
    page = report.write_report("tiny")[0].read_text()
    assert "Dense networks: 90.0% on clean test images, 70.0% under shift." in page
    assert "the best guided network (l1, BH, pearson) keeps 62.5% under shift" in page
    assert "directly pruned (l1) 50.0%: the best of 2 and of 1" in page


def test_a_table_in_words_names_every_number() -> None:
    index = pd.MultiIndex.from_tuples([("l1", 0.8), ("lamp", 0.95)], names=["pruner", "sparsity"])
    table = pd.DataFrame({"direct": ["**72.4 ± 0.4**", ""], "BH": ["65.8 ± 0.2", "1.0"]}, index=index)
    assert in_words(table) == "l1 0.8: direct 72.4 ± 0.4, BH 65.8 ± 0.2; lamp 0.95: BH 1.0"


def test_a_bar_in_a_head_or_cell_breaks_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(to_markdown(pd.DataFrame({"direct, |weight|": ["x|y"], "b": ["1"]})))
    table = report._table(tmp_path / "a.md")
    assert (table.head, table.rows) == (["direct, |weight|", "b"], [["x|y", "1"]])


def test_the_line_below_a_figure_says_which_seeds_it_shows() -> None:
    study = Study.create(study="small", seeds=[3, 4], width=0.5)
    assert subject(study, "fig06_x") == "vgg16_bn at 0.5 of its width, digits, 2 seeds (study small)"
    assert "digits, seed 3 (study small)" in subject(study, "fig06_x", [3])


def test_an_alt_text_without_numbers_is_followed_by_what_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCNET_RESULTS", str(tmp_path))
    monkeypatch.setattr(reporting, "_made_from", lambda study, extra: extra)
    figure, axes = plt.subplots(1, 2)
    axes[0].plot([1, 2], [10.0, 30.0], label="ours")
    axes[0].errorbar([1, 2], [5.0, 5.0], yerr=[1, 1], label="peer")
    axes[0].scatter([1, 2], [1.0, 2.0], label="seeds")
    axes[0].set(title="clean", xlabel="removed, %", ylabel="accuracy, %")
    axes[1].imshow([[0.25, 0.5]])
    axes[1].set_title("map")
    study = Study.create(study="small")
    save_figure(figure, study, "fig06_x", alt="Accuracy.", about="random numbers")
    words = json.loads((tmp_path / "small" / "figures" / "fig06_x.json").read_text())["alt"]
    assert words == (
        "Accuracy. clean: accuracy, % against removed, %: ours 10 to 30, peer 5, seeds 1 to 2; map: values 0.25 to 0.5"
    )
    assert figure.texts[-1].get_text() == "random numbers (study small)"
    plt.close(figure)


def test_a_caption_is_a_sentence_and_no_list_of_numbers() -> None:
    assert report.Picture("a", "Accuracy by layer. l1 0.8, l2 0.9", "").caption == "Accuracy by layer"
    assert report.Picture("a", "; ".join(["gcnet-1: -0.035, contradicted"] * 20), "").caption == ""


def test_each_shift_counts_once_however_many_severities_it_has() -> None:
    rows = pd.DataFrame(
        [("fog", 1, 0.9), ("fog", 5, 0.5), ("stl10_32", 1, 0.2), ("clean", 0, 1.0)],
        columns=["shift", "severity", "accuracy"],
    ).assign(seed=0, images=10, ece=0.1)
    found = reporting.each_shift_once(rows)
    assert dict(zip(found["shift"], found.accuracy, strict=True)) == pytest.approx({"fog": 0.7, "stl10_32": 0.2})
    assert set(found) == {"shift", "seed", "accuracy", "ece"}


def test_the_metric_that_leaves_the_fewest_operations() -> None:
    left = {"none": 10, "pearson": 50, "hsic": 40, "cosine": 40}
    flops = pd.DataFrame(
        [
            {"similarity": name, "hybrid": "Full", "sparsity": 0.8, "seed": seed, "macs_dense": 100,
             "macs": macs + seed * (name == "pearson")}
            for name, macs in left.items() for seed in range(4)
        ]
    )  # fmt: skip
    (row,) = reporting.fewest_operations(flops).itertuples()
    assert row.similarity == "cosine, hsic" and row.share == pytest.approx(0.4)
    assert row.less == pytest.approx(0.115) and row.beyond_chance
    same = reporting.fewest_operations(flops[flops.similarity.isin(["none", "hsic", "cosine"])]).iloc[0]
    assert same.less == 0 and not same.beyond_chance
