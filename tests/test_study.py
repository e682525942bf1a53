"""A study: what is written in a params file is what runs, or an error that says what was meant."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from gcnet import paths
from gcnet.shifts import CORRUPTIONS
from gcnet.study import Study


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "study: mine\nepochs: 7\nsparsities: [0.5]\nguidance: {cosine: [BH]}\n")
    study = Study.load(path, epochs=2)
    assert (study.study, study.epochs, study.sparsities, study.guidance) == ("mine", 2, (0.5,), {"cosine": ("BH",)})
    assert study.batch_size == Study().batch_size


def test_an_empty_file_is_the_default_study(tmp_path: Path) -> None:
    assert Study.load(write(tmp_path / "empty.yaml", "# nothing\n")) == Study()


STUDIES = sorted(path for path in paths.params().glob("*.yaml") if path.stem != "claims")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_loads_by_its_name_which_is_its_file(path: Path) -> None:
    assert Study.load(path.stem).study == path.stem


def test_a_study_does_not_change() -> None:
    study = Study()
    with pytest.raises(ValidationError, match="frozen"):
        study.epochs = 3


def test_a_study_travels_to_worker_processes() -> None:
    study = Study(epochs=3, guidance={"partial": ("B25",)})
    assert pickle.loads(pickle.dumps(study)) == study


@pytest.mark.parametrize("text", ["lr: 1e-4", "lr: 0.0001", "lr: '1e-4'", "lr: 1.0e-4"])
def test_numbers_that_yaml_takes_for_words(tmp_path: Path, text: str) -> None:
    lr = Study.load(write(tmp_path / "s.yaml", text)).lr
    assert isinstance(lr, float) and lr == 1e-4


@pytest.mark.parametrize("text", ["epochs: yes", "seeds: [no]", "lr: true", "sparsities: [false]", "channels: yes"])
def test_words_that_yaml_takes_for_booleans_are_no_numbers(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=text.split(":")[0]):
        Study.load(write(tmp_path / "s.yaml", text))


@pytest.mark.parametrize(
    ("values", "kind", "nearest"),
    [
        ({"dataset": "cifar_10"}, "data set", "cifar10"),
        ({"network": "vgg16bn"}, "network", "vgg16_bn"),
        ({"pruners": ["l1", "synflo"]}, "pruner", "synflow"),
        ({"guidance": {"pearsn": ["B25"]}}, "similarity", "pearson"),
        ({"guidance": {"pearson": ["Ful"]}}, "hybrid", "Full"),
        ({"flops_similarities": ["spearmen"]}, "similarity", "spearman"),
        ({"shifts": ["gausian_noise"]}, "shift", "gaussian_noise"),
        ({"natural_shifts": ["stl10-32"]}, "natural shift", "stl10_32"),
        ({"finetune_epoch": 2}, "parameter", "finetune_epochs"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(values: dict, kind: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown {kind} '.+'; did you mean '{nearest}'\? known: "):
        Study.create(**values)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ValueError) as told:
        Study.create(epoch=3, sparsity=[0.5], lr=-1)
    assert all(word in str(told.value) for word in ("'epochs'", "'sparsities'", "lr:"))
    assert "pydantic" not in str(told.value)


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_sparsities_outside_0_to_1_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="sparsit"):
        Study.create(sparsities=[0.5, value])


def test_sparsity_1_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"sparsity 1\.0 is outside \[0, 1\)"):
        Study.create(sparsities=[1.0])
    assert Study.create(sparsities=[0.0]).sparsities == (0.0,)


@pytest.mark.parametrize("value", [0, 6])
def test_severities_outside_1_to_5_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"severity {value} is outside 1\.\.5"):
        Study.create(severities=[value])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("lr", 0), ("width", 0), ("width", float("nan")), ("channels", 2),
        ("image_size", 4), ("val_share", 1.0), ("batch_size", 1), ("seeds", []), ("schedule", "cosine"),
        ("momentum", 1.0), ("precision", "float16"), ("tap", "bn"), ("severity_table", "cifar"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_parameter(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"(^|; ){name}"):
        Study.create(**{name: value})


@pytest.mark.parametrize("hybrid", ["Full", "FH", "BH", "B25", "F30", "B10", "F100"])
def test_any_split_can_be_asked_for(hybrid: str) -> None:
    assert Study.create(guidance={"pearson": [hybrid]}).guidance == {"pearson": (hybrid,)}


@pytest.mark.parametrize("hybrid", ["direct", "F101", "B", "X25"])
def test_what_is_no_guided_split_is_refused(hybrid: str) -> None:
    with pytest.raises(ValueError, match=f"unknown hybrid '{hybrid}'"):
        Study.create(guidance={"pearson": [hybrid]})


def test_folders_and_torchvision_networks_need_no_registry_line() -> None:
    study = Study.create(dataset="image_folder:/photos", network="torchvision:resnet18", width=1)
    assert (study.dataset, study.network) == ("image_folder:/photos", "torchvision:resnet18")


def test_a_missing_study_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "digits_small.yaml", "study: digits_small\n")
    with pytest.raises(FileNotFoundError, match=r"unknown study 'digit_small'; did you mean 'digits_small'\?"):
        Study.load(tmp_path / "digit_small.yaml")
    with pytest.raises(FileNotFoundError, match=r"unknown study 'smok'; did you mean 'smoke'\?"):
        Study.load("smok")


def test_a_file_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.yaml: a study file is a mapping of parameters, got list"):
        Study.load(write(tmp_path / "list.yaml", "- epochs\n- 3\n"))


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)broken\.yaml.*line 2"):
        Study.load(write(tmp_path / "broken.yaml", "epochs: 3\nseeds: [0, 1\n"))


def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml.*epochs"):
        Study.load(write(tmp_path / "mine.yaml", "epochs: many\n"))


def test_all_shifts_are_the_fifteen() -> None:
    assert len(Study(shifts=("all",)).corruptions) == 15
    assert set(Study(shifts=("fog", "all")).corruptions) == set(CORRUPTIONS)
    assert Study(shifts=("fog",)).corruptions == ("fog",)


def test_named_parameters_are_plain_json() -> None:
    chosen = Study(sparsities=(0.5, 0.9), tap=None).only("sparsities", "tap", "lr")
    assert json.loads(json.dumps(chosen)) == {"sparsities": [0.5, 0.9], "tap": None, "lr": 0.1}


def test_a_study_names_its_notebooks_by_number() -> None:
    assert Study().runs("06_snacs")
    study = Study.create(notebooks=["01", "05"])
    assert study.runs("05_shift_evaluation") and study.runs("01") and not study.runs("06_snacs")
    with pytest.raises(ValueError, match="two digits"):
        Study.create(notebooks=["5"])


def test_a_notebook_need_not_declare_every_parameter() -> None:
    assert Study.from_notebook({"seeds": [4], "something": 1}) == Study(seeds=(4,))


def test_a_notebook_shows_every_parameter_and_which_are_not_the_default() -> None:
    shown = Study.create(study="a<b", epochs=7, seeds=[0])._repr_html_()
    assert "study <b>a&lt;b</b>: vgg16_bn at 0.25 of its width, digits, 1 seed;" in shown
    assert "<b>epochs: 7</b>" in shown and "<code>width: 0.25</code>" in shown
    assert shown.count("<li>") == len(Study.model_fields)


def test_lists_may_come_as_text_as_papermill_gives_them() -> None:
    study = Study.create(seeds="[0, 1]", shifts="[fog]", guidance="{pearson: [BH]}")
    assert (study.seeds, study.shifts, study.guidance) == ((0, 1), ("fog",), {"pearson": ("BH",)})
    with pytest.raises(ValueError, match="seeds"):
        Study.create(seeds="[0, 1")
    with pytest.raises(ValueError, match="seeds"):
        Study.create(seeds="three")
