"""Linear CKA against its definition and independent libraries; the penalty's gradient, stages, hooks and errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gcnet import cka, networks
from gcnet.cka import (
    CKASparsityRegularizer,
    block_outputs,
    epsilon_sparsity,
    find_stages,
    linear_cka,
    minibatch_cka,
)

IMAGE = torch.zeros(1, 3, 32, 32)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def related(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two representations that share a part."""
    x = draw(n, 12, seed=seed)
    return x, x[:, :5] @ draw(5, 9, seed=seed + 1) + 0.5 * draw(n, 9, seed=seed + 2)


def hsic1(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator as it is written in the papers, with loops where it matters."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    for i in range(n):
        k[i, i] = m[i, i] = 0
    trace = sum((k[i] * m[:, i]).sum() for i in range(n))
    total = trace + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * m.sum(1)).sum()
    return float((total / (n * (n - 3))).detach())


def resnet(seed: int = 0, width: float = 0.25) -> nn.Module:
    return networks.build("resnet20", 10, width=width, seed=seed).train()


# --- the measure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 8, 24])
def test_the_unbiased_cka_is_the_ratio_of_its_definition(n: int) -> None:
    x, y = related(n)
    wanted = hsic1(x, y) / math.sqrt(hsic1(x, x) * hsic1(y, y))
    assert linear_cka(x, y).item() == pytest.approx(wanted, abs=1e-10)


def test_the_biased_cka_is_that_of_centred_features() -> None:
    x, y = related()
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y, unbiased=False).item() == pytest.approx(wanted.item(), abs=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_cores_of_an_independent_library_agree(unbiased: bool) -> None:
    core = pytest.importorskip("ckatorch.core", reason="ckatorch is not installed: pip install --no-deps ckatorch")
    x, y = related()
    theirs = core.cka_base(x, y, kernel="linear", unbiased=unbiased)
    assert linear_cka(x, y, unbiased).item() == pytest.approx(float(theirs), abs=1e-8)


@pytest.mark.parametrize("unbiased", [True, False])
@given(seed=st.integers(0, 50), scale=st.sampled_from([1e-4, 0.3, 1e5]), shift=st.floats(-50, 50))
@settings(max_examples=6)
def test_rotation_scale_and_translation_change_nothing(unbiased: bool, seed: int, scale: float, shift: float) -> None:
    x, y = related(seed=seed)
    rotation, _ = torch.linalg.qr(draw(12, 12, seed=seed + 7))
    moved = scale * (x @ rotation + shift)
    assert linear_cka(moved, y, unbiased).item() == pytest.approx(linear_cka(x, y, unbiased).item(), abs=1e-7)
    assert linear_cka(moved, x, unbiased).item() == pytest.approx(1, abs=1e-7)


def test_float32_keeps_digits_under_a_large_mean() -> None:
    x, y = related()
    assert linear_cka((x + 300).float(), y.float()).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, y = (t.requires_grad_() for t in related(7))
    maps = draw(6, 2, 3, 2).to(memory_format=torch.channels_last).requires_grad_()
    for unbiased in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, u=unbiased: linear_cka(a, b, u), (x, y))
        assert torch.autograd.gradcheck(lambda a, u=unbiased: linear_cka(a, y[:6].detach(), u), (maps,))


def test_unrelated_features_are_unrelated_only_to_the_unbiased_estimate() -> None:
    values = [linear_cka(draw(8, 500, seed=2 * k), draw(8, 500, seed=2 * k + 1)).item() for k in range(200)]
    assert abs(sum(values) / 200) < 0.06
    assert linear_cka(draw(8, 500), draw(8, 500, seed=1), unbiased=False).item() > 0.9


@pytest.mark.parametrize("value", [0.0, 3.3])
def test_features_that_do_not_vary_are_similar_to_nothing_and_get_no_gradient(value: float) -> None:
    dead, y = torch.full((8, 40), value, requires_grad=True), draw(8, 5, dtype=torch.float32).requires_grad_()
    result = linear_cka(dead, y)
    result.backward()
    assert result.item() == 0 and dead.grad.abs().max() == 0 and y.grad.abs().max() == 0


@pytest.mark.parametrize(("n", "unbiased"), [(3, True), (1, False)])
def test_too_few_samples_are_refused(n: int, unbiased: bool) -> None:
    with pytest.raises(ValueError, match=rf"needs at least {4 if unbiased else 2} samples, got {n}"):
        linear_cka(draw(n, 5), draw(n, 5), unbiased)


def test_different_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 5 rows, y has 6"):
        linear_cka(draw(5, 3), draw(6, 3))


# --- stages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet20", [3, 3, 3]), ("resnet56", [9, 9, 9]), ("resnet18", [2, 2, 2, 2]), ("vgg16_bn", [2, 2, 3, 3, 3]),
     ("alexnet", [3])],
)  # fmt: skip
def test_stages_are_the_blocks_of_one_resolution(name: str, sizes: list[int]) -> None:
    model = networks.build(name, 10, width=0.25)
    stages = find_stages(model, IMAGE)
    assert [len(stage) for stage in stages] == sizes
    kind = networks.BasicBlock if name.startswith("resnet") else nn.ReLU
    assert all(isinstance(model.get_submodule(name), kind) for stage in stages for name in stage)


def test_every_network_of_the_registry_has_stages() -> None:
    for name in networks.NETWORKS:
        assert find_stages(networks.build(name, 10, width=0.25), IMAGE)


def test_stages_of_a_network_that_calls_functions() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.conv(x))

    assert find_stages(nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(3072, 2)), IMAGE) == (("0", "1"),)


def test_a_network_without_stages_is_refused_and_can_be_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"Sequential has no stages.*\(2 block outputs: 1, 4\).*stages="):
        CKASparsityRegularizer(model, IMAGE)
    assert CKASparsityRegularizer(model, stages=[["1", "4"]]).stages == (("1", "4"),)


def test_finding_stages_leaves_modes_and_buffers_alone() -> None:
    model = resnet()
    model.features[1].eval()
    before = copy.deepcopy(model.state_dict())
    CKASparsityRegularizer(model, IMAGE)
    assert model.training and not model.features[1].training and model.features[4].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- the penalty ----------------------------------------------------------------------------------------------------


def by_hand(outputs: dict[str, Tensor], stages: tuple[tuple[str, ...], ...], beta: float, mean: bool) -> Tensor:
    """One pair after the other, both orders."""
    values = [
        linear_cka(outputs[a], outputs[b]) for stage in stages for a in stage for b in stage if a != b
    ]  # fmt: skip
    return beta * torch.stack(values).sum() / (len(values) if mean else 1)


def outputs_of(model: nn.Module, names: tuple[str, ...], images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, i, out, n=n: found.update({n: out.clone()}))
        for n in names
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn"])
def test_the_penalty_and_its_gradient_are_those_of_pair_by_pair(name: str, reduction: str) -> None:
    model = networks.build(name, 10, width=0.25, seed=1).train()
    twin, images = copy.deepcopy(model), draw(12, 3, 32, 32, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE, beta=0.3, reduction=reduction)
    model(images)
    value = penalty()
    value.backward()
    outputs = {n: out[:8] for n, out in outputs_of(twin, penalty.names, images).items()}
    wanted = by_hand(outputs, penalty.stages, 0.3, reduction == "mean")
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * theirs.grad.abs().max().item() + 1e-9)


def test_the_augmented_variant_is_the_mean_over_all_pairs_of_the_biased_cka() -> None:
    model, images = resnet(), draw(8, 3, 32, 32, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE, beta=1.0, variant="aug_cka_sr")
    outputs = outputs_of(model, penalty.names, images)
    wanted = [linear_cka(outputs[a], outputs[b], unbiased=False) for a in penalty.names for b in penalty.names if a < b]
    penalty.step = 0
    model(images)
    assert penalty().item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-4)


class InPlace(nn.Module):
    """Every block's output is overwritten by the next one's ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x)))).mean((2, 3))


@pytest.mark.parametrize("told", [True, False])
def test_an_in_place_relu_does_not_reach_what_was_measured(told: bool) -> None:
    torch.manual_seed(0)
    model, images = InPlace().train(), draw(8, 3, 8, 8, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE if told else None, stages=[["a", "b"]], beta=0.5)
    model(images)
    value = penalty()
    value.backward()
    first = F.conv2d(images, model.a.weight.detach().clone().requires_grad_(), model.a.bias.detach())
    before = model.a(images)
    second = model.b(before.relu())
    assert first.shape[0] == 8
    assert value.item() == pytest.approx(linear_cka(before, second).item(), rel=1e-5)
    overwritten = linear_cka(before.relu(), second.relu()).item()
    assert abs(value.item() - overwritten) > 0.01  # what a hook that keeps the tensors would say
    wanted = torch.autograd.grad(linear_cka(before, second), model.a.weight)[0]
    assert torch.allclose(model.a.weight.grad, wanted, rtol=1e-3, atol=1e-7)


def test_only_every_fifth_call_costs_something() -> None:
    model, images = resnet(), draw(8, 3, 32, 32, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE)
    values = []
    for _ in range(11):
        model(images)
        values.append(penalty(model, images, None).item())
    assert [k for k, value in enumerate(values) if value] == [0, 5, 10]


def test_passes_without_gradients_or_in_eval_mode_are_not_collected() -> None:
    model, images = resnet(), draw(8, 3, 32, 32, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE)
    model.eval()(images)
    with torch.no_grad():
        model.train()(images)
    with pytest.raises(RuntimeError, match=r"saw no output of \['features.3'.*training mode"):
        penalty()


@pytest.mark.parametrize("count", [3, 7])
def test_a_short_batch_is_skipped(count: int) -> None:
    model = resnet()
    penalty = CKASparsityRegularizer(model, IMAGE, every=1)
    model(draw(count, 3, 32, 32, dtype=torch.float32))
    assert penalty().item() == 0
    model(draw(8, 3, 32, 32, dtype=torch.float32))
    assert penalty().item() != 0


def test_a_dead_block_gives_neither_nan_nor_gradient() -> None:
    model = resnet()
    dead = model.features[11]
    nn.init.constant_(dead.bn2.bias, -1e4)
    penalty = CKASparsityRegularizer(model, IMAGE, beta=1.0)
    model(draw(8, 3, 32, 32, dtype=torch.float32))
    value = penalty()
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert math.isfinite(value.item()) and all(bool(torch.isfinite(g).all()) for g in grads.values())
    assert grads["features.11.conv2.weight"].abs().max() == 0
    assert grads["features.10.conv2.weight"].abs().max() > 0  # compared with the third block of its stage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_this_branch_in_float32(dtype: torch.dtype) -> None:
    model, images = resnet(), draw(16, 3, 32, 32, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE, beta=1e-5)
    with torch.autocast("cpu", dtype):
        model(images)
        grams = penalty._grams
        value = penalty()
    assert value.dtype == torch.float32 and all(gram.dtype == torch.float32 for gram in grams.values())
    (65536 * value).backward()  # float16 is trained with a scaled loss
    rough = model.features[0].weight.grad / 65536
    exact = resnet()
    penalty = CKASparsityRegularizer(exact, IMAGE, beta=1e-5)
    exact(images)
    plain = penalty()
    plain.backward()
    direction = F.cosine_similarity(rough.flatten(), exact.features[0].weight.grad.flatten(), dim=0)
    assert direction > 0.9 and value.item() == pytest.approx(plain.item(), rel=0.1)


def test_beta_0_costs_nothing_and_removal_takes_the_hooks_away() -> None:
    model, images = resnet(), draw(8, 3, 32, 32, dtype=torch.float32)
    off = CKASparsityRegularizer(model, IMAGE, beta=0)
    model(images)
    assert off().item() == 0 and not off._grams
    on = CKASparsityRegularizer(model, IMAGE)
    on.remove()
    off.remove()
    model(images)
    assert not on._grams and all(not m._forward_hooks for m in model.modules())


def test_descending_the_penalty_makes_blocks_dissimilar() -> None:
    model, images = resnet(width=0.5), draw(32, 3, 32, 32, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, IMAGE, beta=1.0, samples=None, every=1, reduction="mean")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        model(images)
        loss = penalty()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta -0.1 must be a finite number, at least 0"),
        ({"beta": math.nan}, "beta nan"),
        ({"samples": 3}, "samples 3: the unbiased CKA needs at least 4"),
        ({"every": 0}, "every 0 must be at least 1"),
        ({"reduction": "summ"}, "unknown reduction 'summ'; did you mean 'sum'"),
        ({"variant": "aug"}, "unknown variant 'aug'; did you mean 'aug_cka_sr'|unknown variant 'aug'"),
        ({"stages": [["features.3", "features.44"]]}, "unknown module 'features.44'"),
        ({"stages": [["features.3"]]}, "at least two modules"),
        ({"stages": []}, "at least two modules"),
        ({"stages": [["features.3", "features.4"], ["features.4", "features.5"]]}, "stands in the stages twice"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CKASparsityRegularizer(resnet(), IMAGE, **options)
    with pytest.raises(ValueError, match="needs example_input"):
        CKASparsityRegularizer(resnet())


# --- heat maps and small weights ------------------------------------------------------------------------------------


def test_minibatch_cka_is_the_ratio_of_sums_and_skips_a_short_batch() -> None:
    model, images = resnet(), draw(26, 3, 32, 32, dtype=torch.float32)
    batches = [(part, torch.zeros(len(part))) for part in images.split(8)]
    names, matrix = minibatch_cka(model, batches)
    assert list(names) == list(block_outputs(model, IMAGE)) and matrix.shape == (9, 9) and model.training
    model.eval()
    sums = {(0, 0): 0.0, (0, 4): 0.0, (4, 4): 0.0}
    for part in images.split(8)[:3]:
        outputs = outputs_of(model, names, part)
        for i, j in sums:
            sums[i, j] += hsic1(*(outputs[names[k]].flatten(1).double() for k in (i, j)))
    assert matrix[0, 4].item() == pytest.approx(sums[0, 4] / math.sqrt(sums[0, 0] * sums[4, 4]), abs=1e-4)
    assert torch.allclose(matrix.diagonal(), torch.ones(9, dtype=torch.float64))


def test_minibatch_cka_refuses_what_it_cannot_measure() -> None:
    model = resnet()
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        minibatch_cka(model, [(torch.zeros(3, 3, 32, 32), torch.zeros(3))])
    with pytest.raises(ValueError, match="no batch at all"):
        minibatch_cka(model, [])
    with pytest.raises(ValueError, match=r"unknown module 'features\.33'"):
        minibatch_cka(model, [], ["features.33"])


def test_epsilon_sparsity_counts_small_weights_of_those_kept() -> None:
    model = nn.Linear(4, 1)
    model.weight.data = torch.tensor([[0.0, 0.005, -0.05, 0.5]])
    net = nn.Sequential(model)
    assert epsilon_sparsity(net, [0.01, 0.1]) == {0.01: 0.5, 0.1: 0.75}
    masks = {"0.weight": torch.tensor([[False, True, True, True]])}
    assert epsilon_sparsity(net, [0.01], masks) == {0.01: pytest.approx(1 / 3)}
    with pytest.raises(ValueError, match="epsilons must be above 0"):
        epsilon_sparsity(net, [0.0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples", [8, 16])
def test_the_gram_gradient_in_every_memory_order_and_precision(layout: str, dtype: torch.dtype, samples: int) -> None:
    x = 3 + draw(16, 5, 6, 4)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    elif layout == "matrix":
        x = x.flatten(1)
    x, weights = x.to(dtype), draw(samples, samples, seed=1)
    ours, plain = x.clone().requires_grad_(), x.double().requires_grad_()
    (cka._gram(ours, samples) * weights).sum().backward()
    rows = plain[:samples].flatten(1)
    size = rows.detach().square().sum(1).mean()
    rows = rows - rows.mean(0)
    (rows @ rows.T / size * weights).sum().backward()
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
    assert (ours.grad - plain.grad).abs().max() < exact * plain.grad.abs().max()


@pytest.mark.parametrize("offset", [0.0, 1.0, 50.0])
def test_bfloat16_features_have_the_gram_matrix_of_float32(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # 50: the rows hardly vary against their length, where centring the product would lose too much.
    x = (offset + draw(64, 16, 12, 12)).bfloat16().to(memory_format=torch.channels_last)
    rows = cka._columns(x).double()
    centred = rows - rows.mean(0)
    for hardware in {False, cka.fast_bfloat16(torch.device("cpu"))}:
        monkeypatch.setattr(cka, "fast_bfloat16", lambda device, hardware=hardware: hardware)
        gram, size = cka._centred_gram(x)
        assert gram.dtype == torch.float32
        assert (gram - centred @ centred.T).abs().max() < 1e-4 * rows.square().sum(1).mean()
        assert (gram - centred @ centred.T).norm() < 2e-4 * (centred @ centred.T).norm()
        assert size.item() == pytest.approx(rows.square().sum(1).mean().item(), rel=1e-4)


def test_large_maps_are_added_up_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (1 + draw(8, 3000)).float()
    whole = cka._centred_gram(x)
    monkeypatch.setattr(cka, "_CHUNK", 1)
    parts = cka._centred_gram(x)
    assert torch.allclose(whole[0], parts[0], rtol=1e-4, atol=1e-2) and torch.allclose(whole[1], parts[1])


def test_dropout_that_writes_in_place_does_not_reach_what_was_measured() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Dropout2d(0.5, inplace=True), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(),
        nn.Linear(64, 3),
    ).train()  # fmt: skip
    images = draw(8, 3, 8, 8, dtype=torch.float32)
    penalty = CKASparsityRegularizer(model, images[:1], beta=1.0, every=1, stages=[["1", "4"]])
    (model(images).sum() + penalty()).backward()
    assert model[0].weight.grad.isfinite().all()


def test_an_example_that_does_not_fit_leaves_no_hooks() -> None:
    model = resnet()
    stages = find_stages(model, torch.zeros(1, 3, 32, 32))
    with pytest.raises(RuntimeError):
        CKASparsityRegularizer(model, torch.zeros(1, 5, 32, 32), stages=stages)
    assert not any(module._forward_hooks for module in model.modules())
