"""Similarity of representations (linear CKA): a measure over mini-batches, and the CKA-SR penalty for training.

CKA-SR (Ni et al. 2023, arXiv 2307.07389) adds to the loss how similar the outputs of a network's blocks are to each
other. A pair of blocks costs one inner product of two n x n Gram matrices, and each Gram matrix is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import activation
from torch.nn.modules.dropout import _DropoutNd

from gcnet.cost import evaluation_mode
from gcnet.errors import unknown
from gcnet.graph import trace
from gcnet.training import fast_bfloat16

# Variation below this share of a feature's size is rounding: such a block is dead, and similar to nothing (choice).
_DEAD = 1e-6
_CHUNK = 2**18  # elements
VARIANTS = ("cka_sr", "aug_cka_sr")
REDUCTIONS = ("sum", "mean")

# --- Gram matrices --------------------------------------------------------------------------------------------------


def _columns(features: Tensor) -> Tensor:
    """(n, ...) -> (n, D), a view. The order of D is that of the memory, which a Gram matrix does not see."""
    channels_last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return (features.permute(0, 2, 3, 1) if channels_last else features).reshape(len(features), -1)


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Columns of (n, D) in parts that stay in the processor's cache in float32: several times faster than at once."""
    width = max(256, _CHUNK // len(rows))
    return (slice(start, start + width) for start in range(0, rows.shape[1], width))


def _bfloat16_gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same from products that the hardware makes of bfloat16 numbers, exact but for sums of 16 significant bits.

    What rounding the product to bfloat16 took away is computed in the same way and added. Centring comes after, so the
    rows must vary by more than a little of their length; about 5 x faster than float32 (Xeon with AMX).
    """
    with torch.autocast(rows.device.type, enabled=False):
        coarse = rows @ rows.T
        gram = coarse.float() + torch.addmm(coarse, rows, rows.T, beta=-1).float()
    size, mean = gram.trace() / len(gram), gram.mean(0)
    mean = (mean + gram.mean(1)) / 2
    return gram - mean - mean[:, None] + mean.mean(), size


def _centred_gram(features: Tensor) -> tuple[Tensor, Tensor]:
    """The (n, n) Gram matrix of the rows less their mean, and the mean squared length of the rows before.

    In float32 (float64 stays); float32 copies are made of a chunk at a time.
    """
    rows = _columns(features)
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and fast_bfloat16(rows.device):
        gram, size = _bfloat16_gram(rows)
        if gram.trace() > 0.1 * len(gram) * size:
            return gram, size
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    gram = torch.zeros(len(rows), len(rows), dtype=dtype, device=rows.device)
    size = torch.zeros((), dtype=dtype, device=rows.device)
    for part in _chunks(rows):
        chunk = rows[:, part].to(dtype)
        mean = chunk.mean(0)
        chunk = chunk - mean if dtype == rows.dtype else chunk.sub_(mean)  # never the features themselves
        gram.addmm_(chunk, chunk.T)
        size += mean.square().sum()
    return gram, size + gram.trace() / len(gram)


class _Gram(torch.autograd.Function):
    """The first `samples` of features (n, ...) -> their centred Gram matrix over their size, which CKA ignores.

    What is kept for the gradient is the features themselves, which the network keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, samples: int) -> Tensor:
        gram, size = _centred_gram(features[:samples])
        ctx.size, ctx.samples = size.clamp_min(torch.finfo(gram.dtype).tiny), samples
        ctx.save_for_backward(features)
        return gram / ctx.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        # In the memory order of the features: another one (that of a slice's gradient, say) would be slow to add.
        dense = features.is_contiguous() or features.is_contiguous(memory_format=torch.channels_last)
        order = torch.preserve_format if dense else torch.contiguous_format
        result = torch.empty_like(features, memory_format=order)
        result[ctx.samples :] = 0
        rows, out = _columns(features[: ctx.samples]), _columns(result[: ctx.samples])
        with torch.autocast(features.device.type, enabled=False):
            # Centring this small matrix on both sides stands for centring the rows.
            both = (gradient + gradient.T) / ctx.size
            both = both - both.mean(0)
            both = both - both.mean(1, keepdim=True)
            if rows.dtype == torch.bfloat16:
                # The rows are bfloat16 and the result will be: only the small matrix needs its digits, as two terms.
                coarse = both.bfloat16()
                torch.mm(coarse, rows, out=out)
                out.addmm_((both - coarse).bfloat16(), rows)
            else:
                for chunk in _chunks(rows):
                    out[:, chunk] = both @ rows[:, chunk].to(both.dtype)
        return result, None


def _gram(features: Tensor, samples: int) -> Tensor:
    """(samples, samples) in float32 whatever the precision around it; differentiable."""
    with torch.autocast(features.device.type, enabled=False):
        return _Gram.apply(features, samples)


def _u_centred(grams: Tensor) -> Tensor:
    """U-centring of (B, n, n) Gram matrices: inner products of two such are n (n - 3) times the unbiased HSIC.

    Source: Song et al. 2012 (HSIC_1), in the form of Szekely and Rizzo 2014. n >= 4.
    """
    n = grams.shape[-1]
    off = 1 - torch.eye(n, dtype=grams.dtype, device=grams.device)
    grams = grams * off
    means = grams.sum(1) / (n - 2)
    means = means - means.sum(1, keepdim=True) / (2 * (n - 1))
    return (grams - means[:, :, None] - means[:, None, :]) * off


def _similarities(grams: Tensor, unbiased: bool) -> Tensor:
    """(B, B) CKA of every pair of (B, n, n) Gram matrices over their size; rows and columns of dead blocks are 0."""
    centred = _u_centred(grams) if unbiased else grams  # rows were centred, so the biased form is done
    flat = centred.flatten(1)
    squares = flat.square().sum(1)
    alive = squares.detach() > (_DEAD**2 * grams.shape[-1]) ** 2
    # Both branches of `where` must be finite, or 0 times infinity is the gradient of a dead block.
    unit = torch.where(alive[:, None], flat, 0.0) / torch.where(alive, squares, 1.0).sqrt()[:, None]
    return unit @ unit.T


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = True) -> Tensor:
    """Linear CKA of two representations of the same n samples: a scalar, at most 1, differentiable.

    x, y: (n, ...) floating point, rows are samples; float64 is computed in float64, anything else in float32. 1 for the
    same up to rotation, scale and translation; the unbiased estimate is about 0 for unrelated features and may be
    negative, the biased one is near 1 for few samples whatever they are. Features that do not vary give 0.
    Raises ValueError for fewer than 4 samples (2 if biased) and for different numbers of samples.
    Source: Kornblith et al., arXiv 1905.00414; Nguyen et al., arXiv 2010.15327 (unbiased).
    """
    if len(x) != len(y):
        raise ValueError(f"linear_cka compares the same samples: x has {len(x)} rows, y has {len(y)}")
    least = 4 if unbiased else 2
    if len(x) < least:
        raise ValueError(f"linear_cka (unbiased={unbiased}) needs at least {least} samples, got {len(x)}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return _similarities(torch.stack([_gram(x.to(dtype), len(x)), _gram(y.to(dtype), len(y))]), unbiased)[0, 1]


# --- where a network's blocks end -----------------------------------------------------------------------------------

_ACTIVATION_MODULES = tuple(
    kind
    for kind in vars(activation).values()
    if isinstance(kind, type) and kind.__module__ == activation.__name__ and kind is not nn.MultiheadAttention
)
_ACTIVATIONS = frozenset(
    ["relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh", "tanh"]
)


class _Shapes(fx.Interpreter):
    """Runs a traced network once and keeps the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self.shapes[node] = tuple(value.shape)
        return value


def _function(node: fx.Node) -> str:
    """The plain name of what a node does, '' for a call of a module."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).strip("_")


def _is_activation(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _ACTIVATION_MODULES)
    return _function(node) in _ACTIVATIONS


def _returned_by(node: fx.Node) -> str:
    """The innermost module that is called once and whose output the node is; '' where there is none."""
    stacks = [other.meta.get("nn_module_stack") or {} for other in node.graph.nodes]
    keys = {(key, path) for stack in stacks for key, (path, _) in stack.items()}
    order = list(node.graph.nodes)
    for key, (path, _) in reversed((node.meta.get("nn_module_stack") or {}).items()):
        last = max(k for k, stack in enumerate(stacks) if key in stack)
        if order[last] is node and sum(p == path for _, p in keys) == 1:
            return str(path)
    return ""


def block_outputs(model: nn.Module, example_input: Tensor) -> dict[str, tuple[int, ...]]:
    """{module: shape of its output for one image} of the modules whose outputs CKA-SR compares, in execution order.

    In a network with additions of feature maps these are the blocks that end in one, after the activation that
    follows; in any other, the activations of feature maps. The stem and what comes after the maps are left out.
    A block whose output no module returns (in a forward of functions only) cannot be found.
    example_input: (N, C, H, W). Raises gcnet.graph.TraceError. Source: code (residual); choice (others).
    """
    with evaluation_mode(model), torch.no_grad():
        module = trace(model)
        run = _Shapes(module)
        run.run(example_input[:1])
    shapes = {node: shape for node, shape in run.shapes.items() if len(shape) >= 3}
    nodes = [node for node in module.graph.nodes if node in shapes]

    def is_join(node: fx.Node) -> bool:
        terms = [shapes.get(a) for a in node.args if isinstance(a, fx.Node)]
        return _function(node) in ("add", "iadd") and len(terms) == 2 and terms[0] == terms[1] is not None

    ends = [node for node in nodes if is_join(node)]
    for number, end in enumerate(ends):
        follower = next(iter(end.users), None)
        if len(end.users) == 1 and follower in shapes and _is_activation(follower, module):
            ends[number] = follower
    ends = ends or [node for node in nodes if _is_activation(node, module)]
    return {name: shapes[node][1:] for node in ends if (name := _returned_by(node))}


def find_stages(model: nn.Module, example_input: Tensor) -> tuple[tuple[str, ...], ...]:
    """Modules (by name) whose outputs are compared with each other: block outputs of one resolution, at least two.

    Three stages in a CIFAR ResNet, four in an ImageNet one; in VGG the activations between two poolings.
    Raises ValueError where there is none, gcnet.graph.TraceError for a network that cannot be traced.
    """
    found = block_outputs(model, example_input)
    grouped = groupby(found, key=lambda name: found[name][1:] if len(found[name]) == 3 else found[name])
    stages = tuple(names for _, names in ((key, tuple(group)) for key, group in grouped) if len(names) > 1)
    if not stages:
        raise ValueError(
            f"{type(model).__name__} has no stages: no two blocks or activations of the same resolution were found "
            f"({len(found)} block outputs: {', '.join(found) or 'none'}); name modules with stages=[['a', 'b'], ...]"
        )
    return stages


def _checked_stages(model: nn.Module, stages: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    known = [name for name, _ in model.named_modules() if name]
    names = list(chain.from_iterable(stages))
    for name in names:
        if name not in known:
            raise unknown("module", name, known)
    if len(set(names)) < len(names):
        raise ValueError(f"a module stands in the stages twice: {names}")
    if not names or any(len(stage) < 2 for stage in stages):
        raise ValueError(f"every stage needs at least two modules to compare, got {[list(s) for s in stages]}")
    return tuple(tuple(stage) for stage in stages)


# --- measuring ------------------------------------------------------------------------------------------------------


@contextmanager
def _recorded_grams(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that every forward pass fills with the centred Gram matrix of each layer's output, reduced at once."""
    grams: dict[str, Tensor] = {}

    def recorder(name: str):
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            with torch.autocast(output.device.type, enabled=False):
                grams[name] = _centred_gram(output)[0].double()

        return record

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in layers]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def minibatch_cka(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], layers: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Tensor]:
    """(names, (L, L) float64 CKA) of every pair of layers: unbiased HSIC summed over batches, then normalised once.

    batches: (images, labels) as the model takes them, of one size; what is smaller than the first batch is skipped.
    layers: module names, default all block outputs. Runs in eval mode; memory is one Gram matrix a layer.
    Layers that do not vary are similar to nothing (0, on the diagonal too).
    Raises ValueError for a first batch of fewer than 4 samples, no batch, an unknown layer.
    Source: Nguyen, Raghu, Kornblith, arXiv 2010.15327, eq. 2 (ratio of sums).
    """
    known = [name for name, _ in model.named_modules()]
    for name in layers or ():
        if name not in known:
            raise unknown("module", name, known)
    size, total, device = 0, torch.zeros(()), next(model.parameters()).device
    with evaluation_mode(model):
        for images, _ in batches:
            images = images.to(device)
            if not size:
                size = len(images)
                if size < 4:
                    raise ValueError(f"minibatch_cka needs batches of at least 4 samples, got {size}")
                layers = tuple(layers or block_outputs(model, images[:1]))
                if not layers:
                    raise ValueError(
                        f"no block outputs were found in {type(model).__name__}: name modules with layers="
                    )
            if len(images) < size:
                continue
            with _recorded_grams(model, layers) as grams:
                model(images)
            flat = _u_centred(torch.stack([grams[name] for name in layers])).flatten(1)
            total = total + flat @ flat.T / (size * (size - 3))
    if not size:
        raise ValueError("minibatch_cka needs images: got no batch at all")
    own = total.diagonal()
    alive = own > 0
    scale = torch.where(alive, own, 1.0).rsqrt() * alive
    return tuple(layers), (scale[:, None] * total * scale).cpu()


def epsilon_sparsity(model: nn.Module, epsilons: Sequence[float], masks: Mapping[str, Tensor] | None = None) -> dict:
    """{epsilon: share of the Conv2d and Linear weights with |w| < epsilon}, in [0, 1]; those that masks keep, if given.

    Raises ValueError for an epsilon that is not above 0. Source: CKA-SR (its notion of epsilon-sparsity).
    """
    if any(not epsilon > 0 for epsilon in epsilons):
        raise ValueError(f"epsilons must be above 0, got {list(epsilons)}")
    values = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            mask = (masks or {}).get(f"{name}.weight")
            weight = module.weight.detach().abs()
            values.append(weight.flatten() if mask is None else weight[mask.to(weight.device)])
    flat = torch.cat(values)
    return {epsilon: (flat < epsilon).double().mean().item() for epsilon in epsilons}


# --- the penalty ----------------------------------------------------------------------------------------------------


class CKASparsityRegularizer:
    """The CKA-SR penalty: hooks collect the outputs of the blocks in the forward pass that the task loss uses.

    In any loop, two lines:

        regularizer = CKASparsityRegularizer(model, images[:1])
        loss = cross_entropy(model(images), labels) + regularizer()

    and as `train(..., penalty=regularizer)`. Only the Gram matrices are kept (and, where a later operation overwrites
    a block's output in place, a copy of its samples). This branch runs in float32 in any surrounding precision.

    beta: weight of the sum over the ordered pairs of blocks of a stage, or of their mean (reduction). It does not
    transfer between depths as a sum: 9 unordered pairs in ResNet-20, 459 in ResNet-110. samples: the first so many of
    a batch (at least 4), None = all. every: on every so-manieth call; the others cost nothing and return 0, and so do
    batches with fewer samples. variant: "cka_sr" compares inside stages, unbiased; "aug_cka_sr" all pairs of the
    network, biased, mean.
    stages: names of modules, found if not given (`find_stages`), for which example_input (N, C, H, W) is needed.
    Raises ValueError for beta < 0, fewer than 4 samples, every < 1, unknown names, a network without stages.
    Source: paper (the penalty), code (samples 8, every 5, beta 1e-4 on CIFAR; None, 1, 1e-5 on ImageNet).
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | None = None,
        *,
        stages: Sequence[Sequence[str]] | None = None,
        beta: float = 1e-4,
        samples: int | None = 8,
        every: int = 5,
        reduction: str | None = None,
        variant: str = "cka_sr",
    ) -> None:
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta {beta} must be a finite number, at least 0")
        if samples is not None and samples < 4:
            raise ValueError(f"samples {samples}: the unbiased CKA needs at least 4 samples (8 or more are advised)")
        if every < 1:
            raise ValueError(f"every {every} must be at least 1")
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        if reduction is not None and reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        if stages is None and example_input is None:
            raise ValueError("CKA-SR needs example_input to find the stages of the network, or stages")
        found = find_stages(model, example_input) if stages is None else _checked_stages(model, stages)
        self.stages, self.beta, self.samples, self.every = found, beta, samples, every
        self.reduction = reduction or ("sum" if variant == "cka_sr" else "mean")
        self.variant, self.step = variant, 0
        self.names = tuple(chain.from_iterable(self.stages))
        self._pairs = self._pair_weights()
        self._overwritten = set(self.names) if example_input is None else self._written_in_place(model, example_input)
        self._grams: dict[str, Tensor] = {}
        self._short = False
        self._handles = [model.get_submodule(n).register_forward_hook(self._collector(n)) for n in self.names]

    def _pair_weights(self) -> Tensor:
        """(B, B): what each entry of the similarity matrix counts in the penalty; the diagonal is a constant, so 0."""
        stage = torch.tensor([k for k, names in enumerate(self.stages) for _ in names])
        same = stage[:, None] == stage if self.variant == "cka_sr" else torch.ones(len(stage), len(stage)).bool()
        weights = (same & ~torch.eye(len(stage), dtype=torch.bool)).float()
        return weights / weights.sum() if self.reduction == "mean" else weights

    @torch.no_grad()
    def _written_in_place(self, model: nn.Module, example_input: Tensor) -> set[str]:
        """The modules whose output a later operation overwrites: seen by running the example once."""
        if any(isinstance(module, _DropoutNd) and module.inplace for module in model.modules()):
            return set(self.names)  # which writes in training only, so that one run in eval mode would not show it
        seen: dict[str, tuple[Tensor, int]] = {}

        def look(name: str):
            return lambda module, inputs, output: seen.update({name: (output, output._version)})

        handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in self.names]
        try:
            with evaluation_mode(model):
                model(example_input[:1])
        finally:
            for handle in handles:
                handle.remove()
        return {name for name, (output, version) in seen.items() if output._version != version}

    def _collector(self, name: str):
        def collect(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not self.beta or self.step % self.every or not module.training or not torch.is_grad_enabled():
                return
            if not isinstance(output, Tensor):
                raise TypeError(f"CKA-SR: module '{name}' returns a {type(output).__name__}, not a tensor")
            self._short = len(output) < (self.samples or 4)
            if self._short:
                return
            count = self.samples or len(output)
            self._grams[name] = _gram(output[:count].clone() if name in self._overwritten else output, count)

        return collect

    def __call__(self, *_: Any) -> Tensor:
        """The penalty of the forward pass just made, a scalar to add to the loss; call it once after each.

        Arguments are ignored, so that it serves as `train`'s penalty. Raises RuntimeError where no forward pass in
        training mode came before.
        """
        due, grams, short = self.beta and self.step % self.every == 0, self._grams, self._short
        self.step, self._grams, self._short = self.step + 1, {}, False
        if not due or short:
            return torch.zeros((), device=self._pairs.device)
        missing = [name for name in self.names if name not in grams]
        if missing:
            raise RuntimeError(
                f"CKA-SR saw no output of {missing}: call it after a forward pass of the model in training mode, with "
                "gradients"
            )
        stacked = torch.stack([grams[name] for name in self.names])
        with torch.autocast(stacked.device.type, enabled=False):
            self._pairs = self._pairs.to(stacked.device)
            similarity = _similarities(stacked, self.variant == "cka_sr")
            return self.beta * (similarity * self._pairs).sum()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, int]:
        """What a resumed run must carry on: which step comes next."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = int(state["step"])
