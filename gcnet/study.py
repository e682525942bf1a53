"""A study: every parameter of a run, validated once, immutable, found in `params/<name>.yaml`."""

from __future__ import annotations

import html
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gcnet import paths
from gcnet.errors import unknown


def studies(folder: Path | None = None) -> list[str]:
    """Names of the studies in `params/` (or another folder): its YAML files with a `study:` line."""
    files = sorted((folder or paths.params()).glob("*.yaml"))
    return [p.stem for p in files if re.search(r"^study:", p.read_text(encoding="utf-8"), re.MULTILINE)]


class Study(BaseModel):
    """The parameters of one run; unknown keys are errors, names are checked against the registries.

    Shares and sparsities are fractions, sizes are pixels, learning rates are the schedule's peak.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    study: str = Field("digits", description="name: results go to results/<study>/")
    notebooks: tuple[str, ...] = Field((), description="the notebooks that the study runs, by number; (): every one")

    # data
    dataset: str = Field("digits", description="registry name, or image_folder:PATH")
    image_size: int = Field(32, ge=8, description="height and width the images are resized to")
    channels: Literal[1, 3] = 1
    val_share: float = Field(0.1, ge=0, lt=1, description="share of the training images kept for choices")
    split_seed: int = Field(0, ge=0)
    train_images: int = Field(0, ge=0, description="use only this many training images, class-balanced; 0: all")
    classes: int = Field(0, ge=0, description="use only the first so many classes; 0: all")
    natural_shifts: tuple[str, ...] = ()

    # network and its training
    network: str = "vgg16_bn"
    width: float = Field(0.25, gt=0, description="channel multiplier")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=2)
    lr: float = Field(0.1, gt=0)
    schedule: Literal["one_cycle", "step"] = "one_cycle"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    crop_padding: int = Field(2, ge=0, description="random crop after zero-padding by this many pixels; 0: none")
    flip: bool = Field(False, description="random horizontal flip")

    # GC-Net
    pruners: tuple[str, ...] = ("l1", "os_synflow")
    direct_pruners: tuple[str, ...] = Field((), description="more base pruners, run without guidance only")
    sparsities: tuple[float, ...] = (0.8, 0.95)
    guidance: dict[str, tuple[str, ...]] = Field(
        {"pearson": ("Full", "FH", "BH", "B25"), "partial": ("Full", "BH", "B25")},
        description="similarity metric -> hybrids run with it; direct pruning always runs",
    )
    tap: Literal["conv", "relu"] | None = Field(None, description="None: the similarity's own (conv; partial: relu)")
    classwise: bool = False
    absolute: bool = False
    residual: Literal["all", "nearest"] = "all"
    connectivity_images: int = Field(0, ge=0, description="training images that connectivity is measured on; 0: all")
    ghost_batchnorm: Literal["identity", "original"] = "identity"
    finetune_epochs: int = Field(2, ge=0)
    finetune_lr: float = Field(0.02, gt=0)
    flops_pruner: str = Field("os_synflow", description="the base pruner of Figure 4")
    flops_similarities: tuple[str, ...] = Field(
        ("pearson", "spearman", "cosine", "distance", "hsic", "mutual_information", "partial"),
        description="similarity metrics compared in Figure 4 (masks only, no fine-tuning)",
    )

    ablation_pruner: str = Field("os_synflow", description="the base pruner that each choice is flipped under")
    ablation_hybrid: str = Field("Full", description="the hybrid that each choice is flipped under")
    ablation_sparsity: float = Field(0.8, ge=0, lt=1)
    # CKA-SR
    cka_network: str = "resnet20"
    cka_width: float = Field(0.25, gt=0, description="channel multiplier of cka_network")
    cka_epochs: int = Field(3, ge=1)
    cka_methods: tuple[str, ...] = Field(("rst", "rigl", "rewind"), description="sparse training methods compared")
    cka_sparsities: tuple[float, ...] = Field((0.9, 0.98), min_length=1)
    cka_headline_sparsities: tuple[float, ...] = Field(
        (), description="sparsities run with every seed, the others with the first three; (): all"
    )
    cka_betas: tuple[float, ...] = Field(
        (1e-3, 1e-2), min_length=1, description="candidates for beta; the best on validation images is used"
    )
    cka_choice_seeds: tuple[int, ...] = Field((100,), min_length=1, description="seeds that beta is chosen on")
    cka_choice_sparsity: float = Field(0.95, ge=0, lt=1, description="sparsity of the RST runs that beta is chosen on")
    cka_samples: int = Field(8, ge=4, description="the penalty takes the first so many images of a batch")
    cka_every: int = Field(5, ge=1, description="the penalty acts on every so-manieth batch")
    cka_variant: Literal["cka_sr", "aug_cka_sr"] = "cka_sr"
    cka_reduction: Literal["sum", "mean"] | None = Field(None, description="None: the variant's own")
    cka_rewire_every: int = Field(20, ge=1, description="SET, RigL: steps between exchanges of weights")
    cka_rewire_fraction: float = Field(0.3, ge=0, le=1, description="SET, RigL: share exchanged at first")
    cka_rounds: int = Field(1, ge=1, description="magnitude rewinding: rounds of pruning")
    cka_rewind_epochs: int = Field(1, ge=0, description="magnitude rewinding: epochs whose weights are gone back to")
    cka_images: int = Field(512, ge=8, description="test images that similarity is measured on")
    cka_epsilons: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    cka_shift_methods: tuple[str, ...] = Field(("rst",), description="methods evaluated under shift")
    cka_guided_sparsity: float = Field(0.95, ge=0, lt=1, description="GC-Net on networks trained with CKA-SR; 0: not")
    # FTWT
    ftwt_r: tuple[float, ...] = Field(
        (0.8, 0.92), min_length=1, description="shares of a layer's activation that the wanted filters hold"
    )
    ftwt_joint_r: tuple[float, ...] = Field((0.92,), description="those that are trained jointly as well")
    ftwt_head_pool: Literal["max", "mean"] = "max"
    ftwt_head_scaled: bool = Field(True, description="softmax times its channels: the same heads, learnt faster")
    ftwt_head_start: Literal["targets", "random"] = Field(
        "targets", description="biases of the heads: how often a filter is wanted by the dense network, or random"
    )
    ftwt_epochs: int = Field(4, ge=1, description="of training with gates, from the dense network")
    ftwt_lr: float = Field(0.02, gt=0, description="the backbone's")
    ftwt_head_lr: float = Field(0.1, gt=0, description="the heads', constant")
    ftwt_head_cooldown: float = Field(0.5, ge=0, le=1, description="share of the epochs, the last, with frozen heads")
    ftwt_estimate_images: int = Field(0, ge=0, description="training images of the estimate before training; 0: all")
    ftwt_latency_sizes: tuple[int, ...] = Field((32, 64), description="image sizes that latency is measured at")
    ftwt_latency_batches: tuple[int, ...] = Field((1, 16), description="batch sizes that latency is measured at")

    # shift evaluation
    shifts: tuple[str, ...] = Field(("all",), description="corruption names, or 'all'")
    severities: tuple[int, ...] = (1, 3, 5)
    severity_table: Literal["cifar-c", "imagenet-c"] = "cifar-c"
    shift_images: int = Field(100, ge=0, description="test images that are corrupted, class-balanced; 0: all")

    # SNACS
    snacs_groups: int = Field(0, ge=0, description="groups a layer; 0: the largest divisor of its filters up to 64")
    snacs_images: int = Field(60, ge=1, description="training images a class that scores and limits are measured on")
    snacs_phi: Literal["mean", "square", "exp", "none"] = Field("mean", description="how weights scale the score")
    snacs_weights: Literal["absolute", "signed_global"] = "absolute"
    snacs_conditioning: Literal["residual", "projection"] = "residual"
    snacs_linear: Literal["closed", "hashed"] = "closed"
    snacs_scales: tuple[float, ...] = Field((2.0, 3.0, 4.0), min_length=1, description="hash widths of the ensemble")
    snacs_tolerance: float = Field(0.7, ge=0, le=1, description="share of the accuracy range that a limit may cost")
    snacs_rule: Literal["first", "last"] = "first"
    snacs_protected: float = Field(0.05, ge=0, le=1, description="share of a layer's groups that is protected")
    snacs_deltas: tuple[float, ...] = Field((0.8,), description="shares of the connections that are asked to go")
    snacs_methods: tuple[str, ...] = Field(
        ("snacs", "mint", "l1_block", "l1_filter", "gcnet"), description="compared at SNACS's sparsity"
    )
    snacs_mint_groups: int = Field(4, ge=1, description="groups a layer for MINT, whose cost is a tree a pair")
    snacs_mint_images: int = Field(30, ge=1, description="training images a class for MINT")
    snacs_truth_samples: tuple[int, ...] = Field((250, 1000, 4000), description="sample sizes of the Gaussian check")
    snacs_truth_repeats: int = Field(10, ge=2)
    snacs_speed_groups: tuple[int, ...] = Field((16, 32), description="group counts that are timed")
    snacs_speed_filters: int = Field(512, ge=1)
    snacs_speed_samples: int = Field(2000, ge=50)
    # structured pruning
    structured_macs: tuple[float, ...] = Field((0.7, 0.5), description="shares of the dense network's MACs left")
    structured_methods: tuple[str, ...] = Field(
        ("direct", "B25", "Full", "tp_magnitude", "tp_taylor"),
        description="how filters are scored: hybrids of the ghost, torch-pruning's importances (tp_*), or snacs",
    )
    structured_similarity: str = "pearson"
    structured_ranking: Literal["layer", "global"] = "layer"
    structured_round_to: int = Field(8, ge=1, description="filters are kept in multiples of this")
    structured_finetune_epochs: int = Field(2, ge=0)
    structured_finetune_lr: float = Field(0.02, gt=0)
    structured_latency_batches: tuple[int, ...] = (1, 64)
    structured_latency_variants: tuple[str, ...] = ("float32", "channels_last", "bfloat16")

    # machine
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _lists_as_text(cls, values: dict[str, Any]) -> dict[str, Any]:
        # `papermill -p seeds "[0, 1]"` hands over text.
        read = {}
        for name, value in values.items():
            field = cls.model_fields.get(name)
            if field and isinstance(value, str) and get_origin(field.annotation) in (tuple, dict):
                try:
                    value = yaml.safe_load(value)
                except yaml.YAMLError:
                    raise ValueError(f"{name}: {value!r} is not a list or mapping in YAML") from None
            read[name] = value
        return read

    @model_validator(mode="before")
    @classmethod
    def _yes_and_no_are_no_numbers(cls, values: dict[str, Any]) -> dict[str, Any]:
        # YAML reads yes, no, on and off as booleans, and pydantic would read those as 1 and 0.
        for name, value in values.items():
            field = cls.model_fields.get(name)
            if field and field.annotation is not bool:
                for item in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(item, bool):
                        raise ValueError(f"{name}: '{item}' is a truth value (yes, no, on, off are too in YAML)")
        return values

    @field_validator("*")
    @classmethod
    def _nothing_twice(cls, value: Any) -> Any:
        if isinstance(value, tuple) and (twice := [v for k, v in enumerate(value) if v in value[:k]]):
            raise ValueError(f"{twice[0]} stands there twice")
        return value

    @model_validator(mode="after")
    def _guided_where_it_is_shown(self) -> Study:
        if not any(self.guidance.values()) and any(self.runs(notebook) for notebook in ("03", "04")):
            raise ValueError("guidance: name a similarity and a hybrid, which notebooks 03 and 04 show")
        return self

    @field_validator("notebooks")
    @classmethod
    def _notebooks_by_number(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(r"\d\d", value):
                raise ValueError(f"notebook '{value}' is not two digits in quotes, such as \"05\"")
        return values

    def runs(self, notebook: str) -> bool:
        """Whether the study runs this notebook, given by its name or number: `study.runs("06_snacs")`."""
        return not self.notebooks or notebook[:2] in self.notebooks

    @field_validator("sparsities", "cka_sparsities")
    @classmethod
    def _sparsities_in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not (0 <= value < 1) or math.isnan(value):
                raise ValueError(f"sparsity {value} is outside [0, 1)")
        return values

    @field_validator("snacs_deltas")
    @classmethod
    def _deltas_in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"delta {value} is outside [0, 1]")
        return values

    @field_validator("ftwt_r", "ftwt_joint_r")
    @classmethod
    def _r_in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 < value <= 1:
                raise ValueError(f"r {value} is outside (0, 1]")
        return values

    @field_validator("severities")
    @classmethod
    def _severities_in_range(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        for value in values:
            if value not in (1, 2, 3, 4, 5):
                raise ValueError(f"severity {value} is outside 1..5 (0, the clean set, is always evaluated)")
        return values

    @field_validator("cka_betas", "cka_epsilons")
    @classmethod
    def _above_0(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if value <= 0:
                raise ValueError(f"{value} is not above 0")
        return values

    @model_validator(mode="after")
    def _cka_fits_together(self) -> Study:
        if "rewind" in self.cka_methods and self.cka_rewind_epochs >= self.cka_epochs:
            raise ValueError(f"cka_rewind_epochs {self.cka_rewind_epochs} must be below cka_epochs {self.cka_epochs}")
        if len(self.cka_betas) > 1 and not self.val_share:
            raise ValueError("cka_betas: choosing one of several needs validation images: val_share above 0")
        return self

    @field_validator("structured_macs")
    @classmethod
    def _shares_of_macs_in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 < value < 1:
                raise ValueError(f"share of MACs {value} is outside (0, 1)")
        return values

    @field_validator("structured_latency_batches")
    @classmethod
    def _batches_hold_an_image(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if min(values, default=1) < 1:
            raise ValueError(f"batch sizes {values} must be at least 1")
        return values

    @model_validator(mode="after")
    def _names_are_known(self) -> Study:
        # Imported here: study.py stands above every registry it checks against.
        from gcnet.connectivity import SIMILARITIES
        from gcnet.cost import VARIANTS
        from gcnet.data import DATASETS
        from gcnet.hybrid import mixing_exponent, side_and_share
        from gcnet.networks import NETWORKS
        from gcnet.pruning import PRUNERS
        from gcnet.shifts import CORRUPTIONS, NATURAL_SHIFTS
        from gcnet.snacs import METHODS as SNACS_METHODS
        from gcnet.sparse_training import METHODS as SPARSE_METHODS

        def check(kind: str, names: Any, known: Any) -> None:
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)

        if not self.dataset.startswith("image_folder:"):
            check("data set", [self.dataset], DATASETS)
        for name in (self.network, self.cka_network):
            if not name.startswith("torchvision:"):
                check("network", [name], NETWORKS)
        check("pruner", [*self.pruners, *self.direct_pruners, self.flops_pruner, self.ablation_pruner], PRUNERS)
        check("similarity", [*self.guidance, *self.flops_similarities, self.structured_similarity], SIMILARITIES)
        for r in self.ftwt_joint_r:
            if r not in self.ftwt_r:
                raise ValueError(f"ftwt_joint_r: {r} is not in ftwt_r {self.ftwt_r}, so there is nothing to compare")
        for name in chain.from_iterable(self.guidance.values()):
            if not mixing_exponent(name) and (name == "direct" or side_and_share(name)[1] == 0):
                raise ValueError(f"unknown hybrid '{name}' of guidance: it guides no layer (direct always runs)")
        check("SNACS method", self.snacs_methods, SNACS_METHODS)
        for name in self.structured_methods:
            if name not in ("tp_magnitude", "tp_taylor", "tp_random", "snacs"):
                side_and_share(name)
        check("variant", self.structured_latency_variants, VARIANTS)
        check("shift", self.shifts, [*CORRUPTIONS, "all"])
        check("natural shift", self.natural_shifts, NATURAL_SHIFTS)
        check("sparse training method", self.cka_methods, [m for m in SPARSE_METHODS if m != "dense"])
        check("sparsity of cka_sparsities", self.cka_headline_sparsities, self.cka_sparsities)
        check("method of cka_methods", self.cka_shift_methods, self.cka_methods)
        return self

    @property
    def corruptions(self) -> tuple[str, ...]:
        """The corruption names that `shifts` stands for."""
        from gcnet.shifts import CORRUPTIONS

        return tuple(CORRUPTIONS) if "all" in self.shifts else self.shifts

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Study:
        """Read a params file (a path, or the name of a study in `params/`); overrides win.

        Raises FileNotFoundError naming the nearest study, ValueError for unknown keys and values out of range.
        """
        path = Path(path)
        if path.suffix not in (".yaml", ".yml"):
            path = paths.params() / f"{path}.yaml"
        if not path.exists():
            raise FileNotFoundError(str(unknown("study", path.stem, studies(path.parent))))
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a study file is a mapping of parameters, got {type(values).__name__}")
        try:
            return cls.create(**{**values, **overrides})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def create(cls, **values: Any) -> Study:
        """Like the constructor, with errors that name the nearest parameter instead of a page of pydantic."""
        try:
            return cls(**values)
        except ValidationError as error:
            lines = []
            for item in error.errors():
                name = ".".join(map(str, item["loc"]))
                if item["type"] == "extra_forbidden":
                    lines.append(str(unknown("parameter", name, cls.model_fields)))
                else:
                    lines.append(f"{name}: {item['msg'].removeprefix('Value error, ')}".removeprefix(": "))
            raise ValueError("; ".join(lines)) from None

    @classmethod
    def from_notebook(cls, variables: dict[str, Any]) -> Study:
        """The study that a notebook's parameters cell (and papermill's injected one) spells out: pass `globals()`.

        A parameter that the notebook does not declare keeps its default.
        """
        return cls.create(**{name: variables[name] for name in cls.model_fields if name in variables})

    def _repr_html_(self) -> str:
        """In a notebook: what is studied in one line, every parameter (not the default's in bold) behind a click."""
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        lines = []
        for name, value in self.model_dump(mode="json").items():
            text = html.escape(f"{name}: {value}")
            default = getattr(self, name) == type(self).model_fields[name].get_default()
            lines.append(f"<li><code>{text}</code></li>" if default else f"<li><code><b>{text}</b></code></li>")
        return (
            f"<details><summary>study <b>{html.escape(self.study)}</b>: {html.escape(self.network)} at {self.width:g} "
            f"of its width, {html.escape(self.dataset)}, {seeds}; all parameters (bold: not the default)</summary>"
            f'<ul style="columns: 3; list-style: none; padding: 0">{"".join(lines)}</ul></details>'
        )

    def only(self, *names: str) -> dict[str, Any]:
        """The named parameters as plain JSON values: what goes into a store key."""
        return self.model_dump(mode="json", include=set(names))
