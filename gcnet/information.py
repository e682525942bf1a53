"""How much a block of filters still says about another one, given all others: adaptive conditional mutual information.

Two estimators over all pairs of blocks of two layers at once: by hashing (linear in the images), and MINT's, by
minimum spanning trees, as the comparison. Information is in nats.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from gcnet.errors import unknown

CONDITIONINGS = ("residual", "projection")
LINEAR = ("closed", "hashed")

BUCKETS = 16  # of one coordinate at most; what lies further out shares the outermost ones
LEAST = 1e-6  # nats; below it connections are ranked by their weight alone
_FLOOR = 1e-6  # share of a unit variance that counts as unexplained where a regression explains everything
_PAIR = 10  # matrices of distances that one spanning tree needs at most, with its working copies
_THRESHOLD = 3.0  # standard deviations under independence that the hashed remainder must exceed to count

Groups = int | tuple[int, int]


def acmi(
    parent: Tensor,
    child: Tensor,
    groups: Groups,
    phi: Tensor | None = None,
    *,
    conditioning: str = "residual",
    linear: str = "closed",
    ridge: float = 1e-3,
    scales: tuple[float, ...] = (2.0, 3.0, 4.0),
    neighbours: int = 100,
    upper: float = math.inf,
    seed: int = 0,
    chunk: int = 2**23,
) -> Tensor:
    """Adaptive conditional mutual information of every child block with every parent block given the other parents.

    parent: (N, P), child: (N, C): a scalar a filter and image, same images, same order. groups: into how many
    contiguous blocks of equal size the filters fall, for both or as (child's, parent's). phi: (child groups, parent
    groups) weight of each connection; None gives the information itself.
    Returns (child groups, parent groups) float64: phi * max(I, 1e-6) where phi is given, so that connections without
    information are ranked by their weight; else I in nats, about 0 under independence (also a little below).

    conditioning "residual" (default, choice): what a ridge regression on all other parents explains is removed from
    both blocks (all parents at once, through one inverse). linear "closed": what the two residuals share linearly is
    counted by -1/2 log(1 - r^2) over their canonical correlations, less its mean under independence, and only what
    remains is hashed, along the leading canonical directions; it counts as far as it exceeds what independence gives
    by 3 standard deviations. Exact for Gaussian data. linear "hashed": the residuals are hashed as they are.
    conditioning "projection" (the literal reading of the paper): all other parents are projected at random on
    floor(log2(N / 10)) directions of two buckets each, and counts of triples of buckets are compared.

    The hash of a coordinate is floor((x + b) / eps); eps = each of `scales` times the mean distance to about the k-th
    neighbour (k = neighbours) on at most 500 images; each scale has its own shift b; the median over scales is taken.
    Terms of the sum are clipped at `upper`. What independence gives with the same bucket counts is subtracted.
    ridge: share of a unit variance. chunk: pairs x images held at once (projection: counts of triples). The base
    estimator is EDGE's (arXiv 1801.09125), of which SNACS's is a conditional form that was not published.

    A constant filter has no information (0). Warns when there are fewer images than buckets or hardly more images
    than parents. Raises ValueError for other shapes, NaN, fewer than 8 images, groups that do not divide.
    """
    if conditioning not in CONDITIONINGS:
        raise unknown("conditioning", conditioning, CONDITIONINGS)
    if linear not in LINEAR:
        raise unknown("linear", linear, LINEAR)
    if not scales or min(scales) <= 0 or neighbours < 1 or ridge <= 0:
        raise ValueError(f"scales {scales}, neighbours {neighbours} and ridge {ridge} must be positive")
    x, y, (child_groups, parent_groups) = _checked(parent, child, groups)
    if phi is not None and tuple(phi.shape) != (child_groups, parent_groups):
        raise ValueError(f"phi is {tuple(phi.shape)}; there are {child_groups} x {parent_groups} pairs of groups")
    x, y = x.view(len(x), parent_groups, -1), y.view(len(y), child_groups, -1)
    hashing = _Hash(tuple(scales), neighbours, upper)
    if conditioning == "projection":
        information = _projected(x, y, hashing, seed, chunk)
    else:
        information = _residual(x, y, hashing, linear, ridge, chunk)
    hashing.warn(len(x))
    return information if phi is None else phi.to(information) * information.clamp_min(LEAST)


def divisors(count: int) -> list[int]:
    return [d for d in range(1, count + 1) if count % d == 0]


def check_groups(filters: int, groups: int, what: str) -> int:
    """Raise ValueError, naming the divisors, unless `filters` fall into `groups` blocks of equal size."""
    if groups < 1 or filters % groups:
        raise ValueError(
            f"{groups} groups do not divide the {filters} filters of {what}; divisors: {divisors(filters)}"
        )
    return groups


def _checked(parent: Tensor, child: Tensor, groups: Groups) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Standardised float64 activations (constant filters become 0) and (child groups, parent groups)."""
    if parent.ndim != 2 or child.ndim != 2 or len(parent) != len(child):
        raise ValueError(f"parent {tuple(parent.shape)} and child {tuple(child.shape)} must be (N, filters) of one N")
    if len(parent) < 8:
        raise ValueError(f"an estimate of information needs at least 8 images, got {len(parent)}")
    of_child, of_parent = (groups, groups) if isinstance(groups, int) else groups
    check_groups(child.shape[1], of_child, "the child")
    check_groups(parent.shape[1], of_parent, "the parent")
    return _standardised(parent, "parent"), _standardised(child, "child"), (of_child, of_parent)


def _standardised(x: Tensor, what: str) -> Tensor:
    x = x.double()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"activations of the {what} are not finite (NaN or infinity)")
    mean, std = x.mean(0), x.std(0, correction=0)
    alive = std > 1e-7 * x.abs().amax(0) + 1e-30
    return torch.where(alive, (x - mean) / std.clamp_min(1e-300), 0.0)


# --- hashing --------------------------------------------------------------------------------------------------------


class _Hash:
    """Buckets of coordinates and the information of pairs of them; keeps what a warning needs."""

    def __init__(self, scales: tuple[float, ...], neighbours: int, upper: float) -> None:
        self.scales, self.neighbours, self.upper = scales, neighbours, upper
        self.fewest = math.inf  # images a bucket
        self.condition = math.inf  # images a bucket of what is conditioned on

    def buckets(self, values: Tensor) -> Iterator[Tensor]:
        """(..., N) -> for each scale the bucket numbers (..., N) int64 in 0..BUCKETS-1."""
        eps = self._width(values)
        for number, scale in enumerate(self.scales):
            shift = (number + 0.5) / len(self.scales) + BUCKETS // 2
            yield values.div(scale * eps).add_(shift).floor_().clamp_(0, BUCKETS - 1).long()

    def _width(self, values: Tensor) -> Tensor:
        """(..., 1) the mean distance to about the k-th neighbour: half the window of k + 1 sorted values, averaged."""
        few = values[..., :: -(-values.shape[-1] // 500)].sort(-1).values
        count = few.shape[-1]
        k = max(2, min(round(self.neighbours * count / 500), count // 2))
        width = (few[..., k:] - few[..., :-k]).mean(-1, keepdim=True) / 2
        return torch.where(width > 0, width, 1.0)

    def pairs(self, x: Tensor, y: Tensor, threshold: float = 0.0) -> Tensor:
        """(c, g) information of coordinates x (c, g or 1, N) and y (c or 1, g, N), less what independence gives."""
        shape = torch.broadcast_shapes(x.shape, y.shape)
        pairs, n = shape[0] * shape[1], shape[2]
        number = torch.arange(pairs, device=x.device).view(*shape[:2], 1) * BUCKETS**2
        found = []
        for i, j in zip(self.buckets(x), self.buckets(y), strict=True):
            keys = (i * BUCKETS + j).add(number) if i.shape == j.shape else number + i * BUCKETS + j
            counts = torch.bincount(keys.flatten(), minlength=pairs * BUCKETS**2).view(pairs, BUCKETS, BUCKETS)
            information, independent = self._information(counts.double(), n)
            found.append(information - independent - threshold * (independent.clamp_min(0) / n).sqrt())
        return torch.stack(found).median(0).values.view(shape[:2])

    def _information(self, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Information in a table of counts (pairs, B, B), and its mean when images are re-paired at random."""
        rows, columns = counts.sum(2, keepdim=True), counts.sum(1, keepdim=True)
        used = (rows > 0).sum((1, 2)) * (columns > 0).sum((1, 2))
        self.fewest = min(self.fewest, n / used.double().mean().item())
        expected = rows * columns / n
        ratio = torch.where(expected > 0, counts / expected.clamp_min(1e-300), 0.0)
        terms = torch.special.xlogy(ratio, ratio).clamp_max(self.upper)
        by_chance = _excess(expected) * (1 - rows / n) * (1 - columns / n)
        return (expected * terms).sum((1, 2)) / n, by_chance.sum((1, 2)) / n

    def warn(self, n: int) -> None:
        if self.fewest < 1:
            warnings.warn(
                f"{n} images are fewer than the buckets they fall into ({self.fewest:.2f} images a bucket): the "
                "information is mostly noise; take more images or larger scales",
                stacklevel=3,
            )
        if self.condition < 5:
            warnings.warn(
                f"the buckets of the conditioning parents hold {self.condition:.1f} images on average, fewer than 5: "
                "the estimate falls to 0; take more images",
                stacklevel=3,
            )


def _poisson_excess() -> Tensor:
    """E[n log n] - m log m of a Poisson count of mean m, on a logarithmic grid of means from 1e-5 to 50."""
    mean = torch.linspace(math.log(1e-5), math.log(50.0), 1000, dtype=torch.float64)
    count = torch.arange(1, 150, dtype=torch.float64)
    share = (count * mean[:, None] - mean.exp()[:, None] - torch.lgamma(count + 1)).exp()
    return (share * count * count.log()).sum(1) - mean.exp() * mean


_EXCESS = _poisson_excess()


def _excess(mean: Tensor) -> Tensor:
    """How far the term n log(n / mean) of a table lies above 0 by chance: 1/2 for many images, less for few.

    Summed over a table this is the usual (rows - 1)(columns - 1) / 2, and right for nearly empty cells too.
    """
    table = _EXCESS.to(mean.device)
    low, high = math.log(1e-5), math.log(50.0)
    place = (mean.clamp_min(1e-5).log() - low) * ((len(table) - 1) / (high - low))
    below = place.long().clamp_max(len(table) - 2)
    inside = torch.lerp(table[below], table[below + 1], (place - below).clamp_max(1.0))
    return torch.where(mean > 50, 0.5 + 1 / (12 * mean.clamp_min(1)), torch.where(mean > 1e-5, inside, 0.0))


# --- conditioning by residuals --------------------------------------------------------------------------------------


def _residual(x: Tensor, y: Tensor, hashing: _Hash, linear: str, ridge: float, chunk: int) -> Tensor:
    """Information of blocks y (N, c, n) and x (N, g, m) given the other blocks of x."""
    n, parents = len(x), x.shape[1] * x.shape[2]
    if n < 2 * parents:
        warnings.warn(f"{n} images for {parents} parent filters: conditioning on them explains noise", stacklevel=4)
    flat = x.flatten(1)
    own = flat.T @ flat / n
    own += torch.diag(torch.where(own.diagonal() > 0, ridge, 1.0))
    inverse = torch.linalg.inv(own)
    blocks = _diagonal(inverse, x.shape[2])  # (g, m, m)
    # What remains of a block after regression on all others, and of a child after regression on all parents.
    v = torch.einsum("Ngm,gml->Ngl", (flat @ inverse).view_as(x), torch.linalg.inv(blocks))
    b = (y.flatten(1).T @ flat / n) @ inverse
    e = (y.flatten(1) - flat @ b.T).view_as(y)
    b = _pairs(b, y.shape[2], x.shape[2])  # (c, g, n, m)
    # A child's residual given all parents but g is u = e + v b'.
    vv = torch.einsum("Ngm,Ngl->gml", v, v) / n
    ev = _pairs(e.flatten(1).T @ v.flatten(1) / n, y.shape[2], x.shape[2])
    ee = torch.einsum("Ncm,Ncl->cml", e, e) / n
    uv = ev + b @ vv
    cross = ev @ b.mT
    uu = ee[:, None] + cross + cross.mT + b @ vv @ b.mT
    found = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    if linear == "closed":
        found += _gaussian(uu, uv, vv)
        alive = _alive(y)[:, None] * _alive(x)[None, :]
        found -= alive / (2 * max(1, n - parents))  # the mean of n m squared correlations under independence
    to_u, to_v = _directions(uu, uv, vv)
    step = max(1, chunk // (n * x.shape[1]))
    alone = x.shape[2] == y.shape[2] == 1
    of_v, of_e = v.permute(1, 0, 2).float(), e.permute(1, 0, 2).float()  # (g, N, m), (c, N, n)
    for start in range(0, y.shape[1], step):
        rows = slice(start, start + step)
        if alone:
            along_v, along_e = of_v[None, :, :, 0], of_e[rows, None, :, 0]
        else:
            along_v = torch.einsum("gNm,cgm->cgN", of_v, to_v[rows].float())
            along_e = torch.einsum("cNn,cgn->cgN", of_e[rows], to_u[rows].float())
        if linear == "hashed":
            slope = b[rows, :, 0] if alone else torch.einsum("cgn,cgnm->cgm", to_u[rows], b[rows])
            along_e = along_e + torch.einsum("gNm,cgm->cgN", of_v, slope.float())
        part = hashing.pairs(along_e, along_v, _THRESHOLD if linear == "closed" else 0.0)
        found[rows] += part.clamp_min(0) if linear == "closed" else part
    dead = (_alive(y) == 0)[:, None] | (_alive(x) == 0)[None, :]
    return torch.where(dead, 0.0, found)


def _alive(blocks: Tensor) -> Tensor:
    """How many filters of each block (N, blocks, size) are not constant, float64."""
    return (blocks.abs().amax(0) > 0).sum(1).double()


def _diagonal(matrix: Tensor, size: int) -> Tensor:
    """(k size, k size) -> the k blocks (k, size, size) on the diagonal."""
    k = len(matrix) // size
    return matrix.view(k, size, k, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _pairs(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """(c rows, g columns) -> (c, g, rows, columns)."""
    return matrix.view(matrix.shape[0] // rows, rows, -1, columns).transpose(1, 2)


def _gaussian(uu: Tensor, uv: Tensor, vv: Tensor) -> Tensor:
    """-1/2 sum log(1 - r^2) over the canonical correlations of each pair of blocks."""
    floor_u, floor_v = (_FLOOR * torch.eye(k, dtype=uu.dtype, device=uu.device) for k in uv.shape[2:])
    rest = uu - uv @ torch.linalg.inv(vv + floor_v) @ uv.mT
    return (torch.logdet(uu + floor_u) - torch.logdet(rest + floor_u)) / 2


def _directions(uu: Tensor, uv: Tensor, vv: Tensor) -> tuple[Tensor, Tensor]:
    """Leading canonical directions (c, g, n) and (c, g, m), scaled to unit variance."""
    floor_u, floor_v = (_FLOOR * torch.eye(k, dtype=uu.dtype, device=uu.device) for k in uv.shape[2:])
    root_u, root_v = torch.linalg.cholesky(uu + floor_u), torch.linalg.cholesky(vv + floor_v)
    white = torch.linalg.solve_triangular(root_u, uv, upper=False)
    white = torch.linalg.solve_triangular(root_v, white.mT, upper=False).mT
    left, right = _leading(white)
    left = torch.linalg.solve_triangular(root_u.mT, left[..., None], upper=True)[..., 0]
    right = torch.linalg.solve_triangular(root_v.mT, right[..., None], upper=True)[..., 0]
    return left, right


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors of (..., n, m) matrices."""
    right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[..., -1]
    left = torch.einsum("...nm,...m->...n", matrix, right)
    norm = left.norm(dim=-1, keepdim=True)
    first = torch.zeros_like(left)
    first[..., 0] = 1.0
    return torch.where(norm > 1e-12, left / norm.clamp_min(1e-12), first), right


# --- conditioning by random projection ------------------------------------------------------------------------------


def _projected(x: Tensor, y: Tensor, hashing: _Hash, seed: int, chunk: int) -> Tensor:
    """Information of blocks from counts of triples of buckets (child, parent, all other parents)."""
    n, groups, width = x.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(x.device)

    directions = max(1, min(groups * width - width, int(math.log2(max(2.0, n / 10)))))
    mixing = draw(groups, width, directions)
    everything = torch.einsum("Ngm,gmr->Nr", x, mixing)
    shift = draw(directions) / 4
    powers = 2 ** torch.arange(directions, device=x.device)
    along_x = torch.einsum("Ngm,gm->gN", x, draw(groups, width)) if width > 1 else x[:, :, 0].T
    along_y = torch.einsum("Ncm,cm->cN", y, draw(*y.shape[1:])) if y.shape[2] > 1 else y[:, :, 0].T
    by_y, by_x = list(hashing.buckets(along_y.contiguous())), list(hashing.buckets(along_x.contiguous()))
    found = torch.empty(y.shape[1], groups, dtype=torch.float64, device=x.device)
    for g in range(groups):
        # The projection of all parents but g is that of all minus that of g.
        others = everything - x[:, g] @ mixing[g]
        others = others / others.std(0).clamp_min(1e-12)
        z = ((others + shift > 0).long() * powers).sum(1)
        z = torch.unique(z, return_inverse=True)[1]
        buckets = int(z.max()) + 1
        hashing.condition = min(hashing.condition, n / buckets)
        step = max(1, chunk // max(n, BUCKETS**2 * buckets))
        members = []
        for i, j in zip(by_y, by_x, strict=True):
            mixed = _within(z, generator)
            parts = [
                _triples(part, j[g], z, hashing.upper) - _triples(part, j[g][mixed], z, hashing.upper)
                for part in i.split(step)
            ]
            members.append(torch.cat(parts))
        found[:, g] = torch.stack(members).median(0).values
    dead = (_alive(y) == 0)[:, None] | (_alive(x) == 0)[None, :]
    return torch.where(dead, 0.0, found)


def _within(z: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of the images that keeps each one's bucket z."""
    first, second = (
        torch.argsort(z + torch.rand(len(z), generator=generator, dtype=torch.float64).to(z.device)) for _ in range(2)
    )
    return torch.empty_like(first).index_copy_(0, first, second)


def _triples(i: Tensor, j: Tensor, z: Tensor, upper: float) -> Tensor:
    """(c,) mean over the images of clip(log r, 0, upper), r = N_ijk N_k / (N_ik N_jk); i (c, N), j and z (N,)."""
    count = int(z.max()) + 1
    child = torch.arange(len(i), device=i.device)[:, None] * BUCKETS

    def counted(keys: Tensor, size: int) -> Tensor:
        return torch.bincount(keys.flatten(), minlength=size)[keys].double()

    ik = (child + i) * count + z
    jk = j * count + z
    ratio = counted(ik * BUCKETS + j, len(i) * BUCKETS**2 * count) * counted(z, count)
    ratio = ratio / (counted(ik, len(i) * BUCKETS * count) * counted(jk, BUCKETS * count))
    return ratio.log().clamp(0, upper).mean(1)


# --- MINT's estimator -----------------------------------------------------------------------------------------------


def mint_gmi(
    parent: Tensor,
    child: Tensor,
    groups: Groups,
    phi: Tensor | None = None,
    *,
    seed: int = 0,
    only: int | None = None,
    memory: int = 2**30,
) -> Tensor:
    """MINT's geometric conditional mutual information of every pair of blocks, by minimum spanning trees.

    Arguments and shape of the result as in `acmi`; values in about [0, 1]. The images are cut in thirds, at random
    from the seed: those of the first take their parent block from the nearest neighbour, in the other parents, among
    the second; the third keeps its own. With R edges of the spanning tree over both that join one to the other,
    I = 1 - R / (N / 3). Pairs share distances: a child block's serve all parents, and those given the other parents are
    the distances in all parents less those in the block. The trees are scipy's, one a pair. only: the first so many
    parent blocks alone (the others still condition). memory: bytes of distances held at once, which say for how many
    child blocks they are kept; one pair needs about 10 matrices of (2/3 N)^2 float64 whatever it says. Source: MINT,
    arXiv 2003.08472.
    """
    x, y, (child_groups, parent_groups) = _checked(parent, child, groups)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).numpy()
    third = len(x) // 3
    x = x.cpu().numpy()[order].reshape(len(x), parent_groups, -1)
    y = y.cpu().numpy()[order].reshape(len(y), child_groups, -1)
    first, second, last = (slice(k * third, (k + 1) * third) for k in range(3))
    both = np.r_[first, last]
    all_near = _squared(x[first].reshape(third, -1), x[second].reshape(third, -1))
    all_both = _squared(x[both].reshape(2 * third, -1), x[both].reshape(2 * third, -1))
    wanted = parent_groups if only is None else only
    given = parent_groups > 1  # without other parents there is nothing to be near in
    found = np.empty((child_groups, wanted))
    step = max(1, memory // all_both.nbytes - _PAIR)
    for start in range(0, child_groups, step):
        children = range(start, min(start + step, child_groups))
        child_both = [_squared(y[both, c], y[both, c]) for c in children]
        for g in range(wanted):
            nearest = (all_near - _squared(x[first, g], x[second, g])).argmin(1) if given else np.arange(third)
            block = np.concatenate([x[second, g][nearest], x[last, g]])
            distance = all_both - _squared(x[both, g], x[both, g]) + _squared(block, block)
            for k, c in enumerate(children):
                found[c, g] = 1 - _joining(distance + child_both[k], third) / third
        child_both.clear()  # before the next ones are computed
    result = torch.from_numpy(found)
    return result if phi is None else phi.to(result) * result.clamp_min(LEAST)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (rows of a, rows of b)."""
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T, 0)


def _joining(squared: np.ndarray, third: int) -> int:
    """Edges of the minimum spanning tree that join the first `third` points to the others."""
    # scipy takes 0 for "no edge"; squares have the same tree as distances.
    tree = minimum_spanning_tree(np.triu(squared + 1e-12, 1)).tocoo()
    return int(((tree.row < third) != (tree.col < third)).sum())
