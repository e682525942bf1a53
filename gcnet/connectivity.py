"""How strongly each filter depends on each filter of the layers before it: one (C_out, C_in) matrix a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from gcnet.activations import Moments, Reservoir, Tap, Where, stream
from gcnet.errors import unknown
from gcnet.graph import LayerGraph, given_or_traced

# --- similarity of paired samples: parent (N, P), child (N, C) -> (C, P) ---------------------------------------------


def _paired(parent: Tensor, child: Tensor) -> tuple[Tensor, Tensor]:
    if parent.ndim != 2 or child.ndim != 2 or len(parent) != len(child):
        raise ValueError(f"parent {tuple(parent.shape)} and child {tuple(child.shape)} must be (N, filters) of one N")
    if len(parent) < 2:
        raise ValueError(f"a similarity needs at least 2 images, got {len(parent)}")
    return parent.double(), child.double()


def _ratio(cross: Tensor, child_square: Tensor, parent_square: Tensor) -> Tensor:
    """cross / sqrt(child x parent), 0 where either is constant."""
    scale = child_square.clamp_min(0).sqrt()[:, None] * parent_square.clamp_min(0).sqrt()[None, :]
    return torch.where(scale > 0, cross / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0).clamp(-1, 1)


def _alive(square: Tensor, mean: Tensor, count: int) -> Tensor:
    """Sums of squared deviations, with those that are rounding noise of a constant (float32 images) set to 0."""
    noise = count * (mean.abs() * 1e-7 + 1e-30).square()
    return torch.where(square > noise, square, 0.0)


def pearson(parent: Tensor, child: Tensor) -> Tensor:
    """Correlation of every child filter with every parent filter.

    parent: (N, P) per-image filter activations; child: (N, C), same images, same order.
    Returns (C, P) in [-1, 1]; 0 where either filter is constant. Raises ValueError if N < 2 or the rows differ.
    Source: GC-Net, Fig. 1 step 2.
    """
    parent, child = _paired(parent, child)
    n = len(parent)
    x, y = parent - parent.mean(0), child - child.mean(0)
    return _ratio(
        y.T @ x,
        _alive(y.square().sum(0), child.mean(0), n),
        _alive(x.square().sum(0), parent.mean(0), n),
    )


def cosine(parent: Tensor, child: Tensor) -> Tensor:
    """Cosine of the angle between activation vectors over the images, not centred. (C, P) in [-1, 1]. Choice."""
    parent, child = _paired(parent, child)
    return _ratio(child.T @ parent, child.square().sum(0), parent.square().sum(0))


def _average_ranks(x: Tensor) -> Tensor:
    """Ranks 1..N down each column; tied values share the mean of their ranks."""
    columns = x.T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns, right=False)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return ((below + up_to + 1).double() / 2).T


def spearman(parent: Tensor, child: Tensor) -> Tensor:
    """Rank correlation, ties sharing their mean rank. (C, P) in [-1, 1]. Choice."""
    parent, child = _paired(parent, child)
    return pearson(_average_ranks(parent), _average_ranks(child))


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def _centred_alignment(parent: Tensor, child: Tensor, kernel: Kernel) -> Tensor:
    """<HKH, HLH> / (|HKH| |HLH|) for one-dimensional kernels of every pair of filters, by blocks of rows.

    Filters are standardised first: both kernels used here do not depend on a filter's scale, and float32 then serves.
    """
    both = torch.cat([child, parent], 1)
    constant = both.amax(0) - both.amin(0) <= 1e-7 * both.abs().amax(0)
    both = ((both - both.mean(0)) / both.std(0).clamp_min(1e-300)).float().T.contiguous()  # (filters, N)
    filters, n = both.shape
    width = _median_distance(both)
    block = max(1, 2**24 // (filters * n))

    def rows(start: int) -> Tensor:
        return kernel(both[:, start : start + block, None], both[:, None, :], width)

    row_mean = torch.cat([rows(start).mean(2) for start in range(0, n, block)], 1)
    mean = row_mean.mean(1)
    c = child.shape[1]
    cross, own = both.new_zeros(c, filters - c), both.new_zeros(filters)
    for start in range(0, n, block):
        k = rows(start)
        k = (k - row_mean[:, start : start + block, None] - row_mean[:, None, :] + mean[:, None, None]).flatten(1)
        cross += k[:c] @ k[c:].T
        own += k.square().sum(1)
    own = torch.where(constant, 0.0, own)
    return _ratio(cross.double(), own[:c].double(), own[c:].double()).clamp_min(0)


def _median_distance(filters: Tensor) -> Tensor:
    """The median distance between two images, per filter (over at most 300 images): the RBF kernel's width."""
    few = filters[:, :: -(-filters.shape[1] // 300)]  # from all of them: they may come class after class
    median = torch.cat([(f[:, :, None] - f[:, None, :]).abs().flatten(1).median(1).values for f in few.split(64)])
    return torch.where(median > 0, median, 1.0)[:, None, None]


def distance_correlation(parent: Tensor, child: Tensor) -> Tensor:
    """Distance correlation (Szekely, Rizzo, Bakirov 2007, biased form). (C, P) in [0, 1]. Choice."""
    parent, child = _paired(parent, child)
    return _centred_alignment(parent, child, lambda a, b, _: (a - b).abs()).sqrt()


def hsic(parent: Tensor, child: Tensor) -> Tensor:
    """HSIC with RBF kernels of median width, normalised as in CKA (arXiv 1905.00414). (C, P) in [0, 1]. Choice."""
    parent, child = _paired(parent, child)
    return _centred_alignment(parent, child, lambda a, b, s: torch.exp(-0.5 * ((a - b) / s).square()))


def mutual_information(parent: Tensor, child: Tensor, *, widths: tuple[float, ...] = (0.4, 0.6, 0.9)) -> Tensor:
    """Mutual information of each pair by hashing, on the scale of a correlation: sqrt(1 - exp(-2 I)).

    Each coordinate is hashed to floor((x + b) / eps), co-occurrences of buckets are counted, and the plug-in value of
    an ensemble of eps (in standard deviations) is averaged; what the same count gives when images are re-paired at
    random is subtracted. (C, P) in [0, 1]. Source: the base estimator that SNACS uses, EDGE (arXiv 1801.09125);
    one count per bucket pair as a matrix product, widths and transform are choices.
    """
    parent, child = _paired(parent, child)
    n = len(parent)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(parent.device)
    total = parent.new_zeros(child.shape[1], parent.shape[1])
    for number, eps in enumerate(widths):
        x, bins = _hashed(parent, eps, number / len(widths))
        y, _ = _hashed(child, eps, (number + 0.5) / len(widths))
        for y_rows, sign in ((y, 1.0), (y[shuffled], -1.0)):
            total += sign * _plug_in(x, y_rows, bins)
    information = (total / len(widths)).clamp_min(0)
    varies = (child.std(0) > 1e-7 * child.abs().amax(0))[:, None] & (parent.std(0) > 1e-7 * parent.abs().amax(0))
    return torch.where(varies, (1 - torch.exp(-2 * information)).sqrt(), 0.0)


def _hashed(x: Tensor, eps: float, shift: float, reach: float = 3.0) -> tuple[Tensor, int]:
    """Bucket numbers 0..bins-1 of standardised columns; all beyond `reach` deviations shares the outer buckets."""
    z = (x - x.mean(0)) / x.std(0).clamp_min(1e-12)
    bins = int(2 * reach / eps) + 2
    return ((z + reach) / eps + shift).floor().long().clamp(0, bins - 1), bins


def _plug_in(x: Tensor, y: Tensor, bins: int) -> Tensor:
    """Plug-in mutual information (nats) of all pairs of hashed columns, counted by products of indicators."""
    n, parents = x.shape
    one_hot = torch.nn.functional.one_hot(x, bins).float().flatten(1)  # (N, P * bins)
    p_x = one_hot.mean(0).view(parents, bins)
    h_x = -torch.special.xlogy(p_x, p_x).sum(1)
    out = []
    for columns in y.split(max(1, int(2**24 // (parents * bins * bins)) or 1), 1):
        indicator = torch.nn.functional.one_hot(columns, bins).float().flatten(1)
        joint = (indicator.T @ one_hot / n).view(columns.shape[1], bins, parents, bins)
        p_y = indicator.mean(0).view(-1, bins)
        h_y = -torch.special.xlogy(p_y, p_y).sum(1)
        h_xy = -torch.special.xlogy(joint, joint).sum((1, 3))
        out.append(h_x[None, :] + h_y[:, None] - h_xy)
    return torch.cat(out).double()


def partial(parent: Tensor, child: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Correlation of every child with every parent given all other parents. (C, P) in [-1, 1].

    Beyond the GC-Net paper (ours): a parent that only moves together with a true parent gets no credit.
    """
    parent, child = _paired(parent, child)
    n = len(parent)
    x, y = parent - parent.mean(0), child - child.mean(0)
    x_square = _alive(x.square().sum(0), parent.mean(0), n)
    return _partial_from_moments(x.T @ x, x_square, y.T @ x, _alive(y.square().sum(0), child.mean(0), n), ridge)


def _partial_from_moments(
    own: Tensor, square: Tensor, cross: Tensor, child_square: Tensor, ridge: float = 1e-3
) -> Tensor:
    """Partial correlations from sums of products; own: (P, P), square: (P,), cross: (C, P), child_square: (C,).

    Standardised first, so `ridge` is a share of a unit variance and units do not matter.
    """
    r = _ratio(cross, child_square, square)
    s = _ratio(own, square, square)
    dead = square <= 0
    s = s + torch.diag(torch.where(dead, 1.0, ridge))
    inverse = torch.linalg.inv(s)
    b = r @ inverse  # regression coefficients of the standardised child on all parents
    # residual variance 1 - 2 b r + b S b, with the S that was inverted this is 1 - b r - ridge |b|^2
    residual = (1 - (b * r).sum(1) - ridge * b.square().sum(1)).clamp_min(1e-9)
    rho = b / (b.square() + residual[:, None] * inverse.diagonal()[None, :]).sqrt()
    alive = (child_square > 0)[:, None] & ~dead[None, :]
    return torch.where(alive, rho, 0.0)


# --- the registry: how a similarity is computed in one pass ---------------------------------------------------------


@dataclass(frozen=True)
class Similarity:
    """sampled: the function of paired samples. basis: what the pass must keep: moments, samples, or regression
    moments (the covariance of all that the layer receives). tap: where scalars are read unless asked otherwise."""

    sampled: Callable[[Tensor, Tensor], Tensor]
    basis: Literal["moments", "samples", "regression"] = "samples"
    tap: Where = "conv"
    most: int = 2000  # samples kept at most; fewer where the cost grows with their square


SIMILARITIES: dict[str, Similarity] = {
    "pearson": Similarity(pearson, "moments"),
    "cosine": Similarity(cosine, "moments"),
    "spearman": Similarity(spearman),
    "distance": Similarity(distance_correlation, most=500),
    "hsic": Similarity(hsic, most=500),
    "mutual_information": Similarity(mutual_information),
    "partial": Similarity(partial, "regression", "relu"),
}


def _from_moments(similarity: str, moments: Moments, child: Tap, parent: Tap) -> Tensor:
    n, cross = moments.count, moments.cross[child, parent]
    y_mean, x_mean = moments.mean[child], moments.mean[parent]
    y_square, x_square = moments.square[child], moments.square[parent]
    if similarity == "cosine":
        return _ratio(
            cross + n * torch.outer(y_mean, x_mean), y_square + n * y_mean.square(), x_square + n * x_mean.square()
        )
    y_square, x_square = _alive(y_square, y_mean, n), _alive(x_square, x_mean, n)
    if parent[1] == "input":
        return _partial_from_moments(moments.cross[parent, parent], x_square, cross, y_square)
    return _ratio(cross, y_square, x_square)


# --- from pairs of filters to a layer's matrix ----------------------------------------------------------------------


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """(C, parent's filters) -> (C, C_in): each input column takes its filter's value, 0 where the parent is absent."""
    index = index.to(matrix.device)
    return matrix[:, index.clamp_min(0)] * (index >= 0)


def _diagonal_blocks(matrix: Tensor, module: nn.Module) -> Tensor:
    """(C_out, C_in) -> (C_out, C_in / groups): what each output channel of a grouped convolution sees."""
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return matrix
    c_out, c_in = matrix.shape
    blocks = matrix.view(groups, c_out // groups, groups, c_in // groups)
    return torch.cat([blocks[g, :, g] for g in range(groups)])


@torch.no_grad()
def connectivity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    similarity: str = "pearson",
    tap: Where | None = None,
    classwise: bool = False,
    absolute: bool = False,
    graph: LayerGraph | None = None,
    residual: str | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """{layer: (C_out, C_in per group) float32} for every layer that has a parent, from one pass over the images.

    batches: iterable of (images, labels), images as the model takes them. similarity: a name in SIMILARITIES. tap:
    "conv" (the layer's own output) or "relu" (after BatchNorm and activation); None is the similarity's own (conv;
    relu for partial). classwise: computed within each class, averaged over the classes. absolute: the magnitude (of
    each class before averaging). residual: which parents a sum has, see `layer_graph`, where no graph is given.
    samples: images kept, drawn uniformly from the seed, for the similarities that need samples (default 2,000 for
    spearman and mutual_information, 500 for distance and hsic, whose cost grows with the square).
    The matrices of parents that meet in a sum are added, those of concatenated parents stand side by side, a
    flattened channel repeats its value. A layer that runs more than once is measured at its first call, and is no
    parent of itself. The model's mode and buffers are left as they were.
    Raises ValueError for an unknown name, fewer than 2 images, a layer whose rows are no multiple of the images;
    FloatingPointError for activations that are NaN.
    Source: GC-Net, Fig. 1 step 2 and Fig. 2; the rest of the parameters are choices.
    """
    if similarity not in SIMILARITIES:
        raise unknown("similarity", similarity, SIMILARITIES)
    kind = SIMILARITIES[similarity]
    where: Where = tap or kind.tap
    if where not in ("conv", "relu"):
        raise unknown("tap", where, ("conv", "relu"))
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("connectivity needs at least 2 images, got no batch at all")
    graph = given_or_traced(graph, model, first[0][:1].to(next(model.parameters()).device), residual)
    layers = [layer for layer in graph.layers if graph.others(layer)]
    if not layers:
        return {}
    pairs: list[tuple[Tap, Tap]] = []
    for layer in layers:
        if kind.basis == "regression":
            pairs += [((layer, where), (layer, "input")), ((layer, "input"), (layer, "input"))]
        else:
            pairs += [((layer, where), (parent, where)) for parent in graph.others(layer)]
    groups = {layer: graph.input_groups(layer) for layer in layers} if kind.basis == "regression" else {}
    taps = dict.fromkeys(chain.from_iterable(pairs))
    moments: dict[int, Moments] = {}
    reservoir = Reservoir(taps, samples or kind.most, seed)
    count = 0
    for values, labels in _at_least(_MERGED_AT_ONCE, _by_image(stream(model, chain([first], iterator), graph, taps))):
        count += len(labels)
        for layer, group in groups.items():
            values[layer, "input"] = _merged(values[layer, "input"], group)
        if kind.basis == "samples":
            reservoir.update(values, labels)
        else:
            for number, rows in _classes(labels, classwise):
                moments.setdefault(number, Moments(pairs)).update({t: values[t][rows] for t in taps})
    if count < 2:
        raise ValueError(f"connectivity needs at least 2 images, got {count}")

    def parts(child: Tap, parent: Tap) -> list[Tensor]:
        """The similarity of one pair of taps, one matrix a class (or one in all)."""
        if kind.basis == "samples":
            x, y = reservoir.values[parent], reservoir.values[child]
            rows = [r for _, r in _classes(reservoir.labels.to(x.device), classwise)]
            return [kind.sampled(x[r], y[r]) for r in rows if len(x[r]) > 1]
        return [_from_moments(similarity, m, child, parent) for m in moments.values() if m.count > 1]

    result = {}
    for layer in layers:
        module = model.get_submodule(layer)
        child: Tap = (layer, where)

        def pooled(parent: Tap, child: Tap = child) -> Tensor:
            found = parts(child, parent)
            if not found:
                raise ValueError("class-wise connectivity needs a class with at least 2 images")
            return sum(m.abs() if absolute else m for m in found) / len(found)

        if kind.basis == "regression":
            matrix = pooled((layer, "input"))
            fed = torch.stack([source.index >= 0 for source in graph.sources[layer]]).any(0).to(matrix.device)
            matrix = matrix[:, groups[layer].to(matrix.device)] * fed
        else:
            of_parent = {parent: pooled((parent, where)) for parent in graph.others(layer)}
            matrix = sum(_columns(of_parent[s.parent], s.index) for s in graph.sources[layer] if s.parent != layer)
        result[layer] = _diagonal_blocks(matrix, module).float()
    return result


def _by_image(
    batches: Iterable[tuple[dict[Tap, Tensor], Tensor]],
) -> Iterator[tuple[dict[Tap, Tensor], Tensor]]:
    """One row an image: where a layer sees several (windows, frames, one image after the other), their mean."""
    for values, labels in batches:
        for (layer, _), rows in values.items():
            if len(labels) and len(rows) % len(labels):
                raise ValueError(
                    f"layer '{layer}' gives {len(rows)} rows for {len(labels)} images: connectivity needs the same "
                    "number of rows for every image, those of one image after the other"
                )
        yield {tap: _mean_of_each(rows, len(labels)) for tap, rows in values.items()}, labels


def _mean_of_each(rows: Tensor, images: int) -> Tensor:
    return rows if len(rows) == images else rows.reshape(images, -1, rows.shape[1]).mean(1)


# Merging moments costs the same for one image as for hundreds, and much for wide networks: small batches wait.
_MERGED_AT_ONCE = 250


def _at_least(
    rows: int, batches: Iterable[tuple[dict[Tap, Tensor], Tensor]]
) -> Iterator[tuple[dict[Tap, Tensor], Tensor]]:
    """The batches, small ones joined until they have this many rows (the last may have fewer)."""
    waiting: list[tuple[dict[Tap, Tensor], Tensor]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(labels) for _, labels in waiting) >= rows:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[tuple[dict[Tap, Tensor], Tensor]]) -> tuple[dict[Tap, Tensor], Tensor]:
    if len(batches) == 1:
        return batches[0]
    values = {tap: torch.cat([part[tap] for part, _ in batches]) for tap in batches[0][0]}
    return values, torch.cat([labels for _, labels in batches])


def _merged(values: Tensor, group: Tensor) -> Tensor:
    """(N, C_in) -> (N, groups): the mean over the columns of each group."""
    count = int(group.max()) + 1
    group = group.to(values.device)
    if count == values.shape[1]:
        # numbered, but not in the columns' order
        return torch.empty_like(values).index_copy_(1, group, values)
    size = torch.bincount(group, minlength=count)
    return values.new_zeros(len(values), count).index_add_(1, group, values) / size


def _classes(labels: Tensor, classwise: bool) -> list[tuple[int, Tensor | slice]]:
    if not classwise:
        return [(0, slice(None))]
    return [(int(number), labels == number) for number in labels.unique()]
