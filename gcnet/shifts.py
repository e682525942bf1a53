"""Distribution shifts: the fifteen common corruptions as batched tensor code, and the natural shifts by name.

Definitions and severities follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (arXiv 1903.12261), and its data sets CIFAR-10-C and ImageNet-C.

Three decisions shape the code:

- Every image has its own counter-based random stream, so a result never depends on how images are batched.
- Filters use weights in steps of 1/65536 on integer levels. Their sums then fit the 24 bits of a float32, so
  the order of summation, the batch size and the device cannot change a pixel.
- Levels are truncated to uint8 as CIFAR-10-C does (motion blur rounds, as the program behind it does); 1/1024
  of a level is added first, so that a value that is an integer up to float error keeps it.
"""

from __future__ import annotations

import io
import math
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gcnet.errors import unknown

# Each entry holds the parameters of severities 1 to 5, in the order in which the corruption takes them.
# Lengths are pixels at the table's own image size (REFERENCE_SIZES).
SEVERITY_TABLES: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {
    "cifar-c": {
        "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
        "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
        "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
        "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
        "elastic_transform": (
            (32 * 0, 32 * 0, 32 * 0.08),
            (32 * 0.05, 32 * 0.2, 32 * 0.07),
            (32 * 0.08, 32 * 0.06, 32 * 0.06),
            (32 * 0.1, 32 * 0.04, 32 * 0.05),
            (32 * 0.1, 32 * 0.03, 32 * 0.03),
        ),
        "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
        "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
    },
    "imagenet-c": {
        "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
        "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
        "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
        "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        # 244 is what the published code multiplies by, at images of 224.
        "elastic_transform": (
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ),
        "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
        "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
    },
}

REFERENCE_SIZES: dict[str, int] = {"cifar-c": 32, "imagenet-c": 224}

# Natural shifts: name -> (loader in gcnet.data, the data set whose test distribution it shifts).
NATURAL_SHIFTS: dict[str, tuple[str, str]] = {
    "stl10_32": ("stl10_32", "cifar10"),
    "usps": ("usps", "mnist"),
}

_SMALLEST = 8
_STEPS = 1 << 16


# ---- random streams ----------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` (torch has no full uint64 arithmetic)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _scramble(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, in place."""
    # >> repeats the sign bit in torch; the mask takes the repeats off.
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z ^= (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        z *= multiplier
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


class Draws:
    """Random numbers of a batch of images, one counter-based stream an image.

    Element j of image i's stream depends on (seed, name, severity, index of the image, j) only.
    Numbers have 16 bits: enough for 8-bit images, and four come out of one 64-bit hash. [choice]
    """

    def __init__(self, seed: int, name: str, severity: int, first: int, count: int, device: torch.device) -> None:
        self.count, self.device, self._used = count, device, 0
        base = torch.tensor([_signed(seed), zlib.crc32(name.encode()), severity], dtype=torch.int64)
        key = torch.zeros((), dtype=torch.int64)
        for word in base:
            key = _scramble(key + word + _GOLDEN)
        index = torch.arange(first, first + count, dtype=torch.int64)
        self._keys = _scramble(index * _GOLDEN + key).to(device).unsqueeze(1)

    def integers(self, *shape: int) -> Tensor:
        """The next numbers of every stream: (count, *shape) int32, uniform in 0..65535."""
        hashes = -(-math.prod(shape) // 4)
        counter = torch.arange(self._used + 1, self._used + hashes + 1, dtype=torch.int64, device=self.device)
        self._used += hashes
        bits = _scramble(counter * _GOLDEN + self._keys).view(torch.int16)[:, : math.prod(shape)]
        return bits.to(torch.int32).add_(_STEPS // 2).reshape(self.count, *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in (low, high): (count, *shape) float32."""
        return self.integers(*shape).to(torch.float32).add_(0.5).mul_((high - low) / _STEPS).add_(low)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers from a table of quantiles, at most 4.3 in size: (count, *shape) float32."""
        return _look_up(_normal_quantiles(self.device), self.integers(*shape))


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


@lru_cache(maxsize=4)
def _normal_quantiles(device: torch.device) -> Tensor:
    ranks = (torch.arange(_STEPS, dtype=torch.float64) + 0.5) / _STEPS
    return torch.special.ndtri(ranks).to(torch.float32).to(device)


# ---- shared pieces -----------------------------------------------------------------------------------------


def _quantise(levels: Tensor) -> Tensor:
    """Levels (float, about 0..255) to uint8: clipped and truncated (see the module's docstring)."""
    return levels.add(1 / 1024).clamp_(0, 255).to(torch.uint8)


def _exact(weights: Tensor) -> Tensor:
    """Non-negative weights scaled to sum to exactly 1 in steps of 1/65536; the largest takes the rest."""
    steps = torch.round(weights.to(torch.float64) / weights.to(torch.float64).sum() * _STEPS)
    steps.view(-1)[steps.argmax()] += _STEPS - steps.sum()
    return steps / _STEPS


def _filter(levels: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Correlate (N, C, H, W) integer levels with one odd square kernel; exact, see the module's docstring."""
    height, width = levels.shape[2:]
    kernel = _exact(kernel)
    half = kernel.shape[0] // 2
    used = kernel.nonzero() - half
    half_used = int(used.abs().max())
    if half_used == 0:
        return levels
    padded = F.pad(levels, (half_used,) * 4, mode=border)
    out = torch.zeros_like(levels)
    for dy, dx in used.tolist():
        top, left = dy + half_used, dx + half_used
        window = padded[:, :, top : top + height, left : left + width]
        out.add_(window, alpha=float(kernel[dy + half, dx + half]))
    return out


def _gaussian(sigma: float, radius: int) -> Tensor:
    """Unnormalised Gaussian at -radius..radius; a sigma of 0 is a single one."""
    if sigma <= 0:
        return torch.ones(1, dtype=torch.float64)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return torch.exp(-0.5 * (offsets / sigma) ** 2)


def _motion_blur(levels: Tensor, angle: Tensor, radius: float, sigma: float) -> Tensor:
    """Blur along a line that leaves every pixel at its image's angle, with the weights of half a Gaussian.

    levels: (N, C, H, W) integer levels; angle: (N,) degrees. Returns rounded levels.
    The line has 2 * ceil(radius) + 1 pixels, each the nearest to its place; outside, the edge is repeated.
    Source: ImageMagick's motion blur, which the published images were made with.
    """
    height, width = levels.shape[2:]
    steps = torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float64)
    weights = _exact(torch.exp(-0.5 * (steps / max(sigma, 1e-6)) ** 2))
    weights = [w for w in weights.tolist() if w > 0]
    reach = len(weights) - 1
    direction = torch.deg2rad(angle.to(torch.float64))
    steps = steps[: reach + 1].to(levels.device).unsqueeze(1)
    dx = torch.ceil(steps * torch.cos(direction) - 0.5).to(torch.int64) + reach
    dy = torch.ceil(steps * torch.sin(direction) - 0.5).to(torch.int64) + reach
    padded = F.pad(levels, (reach,) * 4, mode="replicate")
    # One (C, H, W) window for every shift of every image: a view, from which each image picks its own shift.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    image = torch.arange(len(levels), device=levels.device)
    out = torch.zeros_like(levels)
    for k, weight in enumerate(weights):
        out.add_(windows[image, dy[k], dx[k]], alpha=weight)
    return out.add_(0.5).floor_()


def _clipped_zoom(levels: Tensor, factor: float) -> Tensor:
    """Enlarge the centre of (N, C, H, W) by `factor` >= 1 with bilinear interpolation and keep the size."""
    kept = [math.ceil(size / factor) for size in levels.shape[2:]]
    size = [round(k * factor) for k in kept]
    top, left = ((full - k) // 2 for full, k in zip(levels.shape[2:], kept, strict=True))
    crop = levels[:, :, top : top + kept[0], left : left + kept[1]]
    if size != kept:
        crop = F.interpolate(crop, size=size, mode="bilinear", align_corners=True)
    top, left = ((s - full) // 2 for s, full in zip(size, levels.shape[2:], strict=True))
    return crop[:, :, top : top + levels.shape[2], left : left + levels.shape[3]]


def _plasma(draw: Draws, height: int, width: int, decay: float) -> Tensor:
    """Plasma fractals by the diamond-square algorithm on a torus: (N, height, width) in [0, 1].

    Made at the next power of two and cut, after the whole square is stretched to [0, 1].
    """
    size = 1 << (max(height, width) - 1).bit_length()
    field = torch.zeros(draw.count, size, size, device=draw.device)
    step, wibble = size, 100.0
    while step >= 2:
        half, cells = step // 2, size // step

        def moved(total: Tensor, wibble: float = wibble, cells: int = cells) -> Tensor:
            return total / 4 + draw.uniform(cells, cells, low=-(wibble**2), high=wibble**2)

        corners = field[:, ::step, ::step].clone()
        pairs = corners + corners.roll(-1, 1)
        centres = moved(pairs + pairs.roll(-1, 2))
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = moved(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        field[:, half::step, ::step] = moved(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay
    field -= field.amin((1, 2), keepdim=True)
    field /= field.amax((1, 2), keepdim=True)
    return field[:, :height, :width]


def _sample(levels: Tensor, x: Tensor, y: Tensor, *, around_pixels: bool) -> Tensor:
    """Bilinear samples of (N, C, H, W) at pixel coordinates (N, H, W); outside, the image is mirrored.

    around_pixels: mirrored around the outermost pixels' centres (True) or around their outer edges (False).
    """
    height, width = levels.shape[2:]
    if around_pixels:
        grid = torch.stack((x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1), -1)
    else:
        grid = torch.stack(((x + 0.5) * (2 / width) - 1, (y + 0.5) * (2 / height) - 1), -1)
    return F.grid_sample(levels, grid, mode="bilinear", padding_mode="reflection", align_corners=around_pixels)


# ---- noise -------------------------------------------------------------------------------------------------
# Every corruption takes (images, draw, scale, *parameters) and returns new uint8 images.
# images: uint8 (N, C, H, W); draw: their random streams; scale: image size / the table's reference size, by
# which lengths are multiplied.


def gaussian_noise(images: Tensor, draw: Draws, scale: float, sigma: float) -> Tensor:
    """Normal noise of standard deviation `sigma` (full range = 1), independent for every channel."""
    noise = _look_up(_normal_quantiles(draw.device) * (255 * sigma), draw.integers(*images.shape[1:]))
    return _quantise(noise.add_(images))


def shot_noise(images: Tensor, draw: Draws, scale: float, photons: float) -> Tensor:
    """Poisson noise of a sensor that counts `photons` at full brightness."""
    index = images.to(torch.int32).mul_(_STEPS).add_(draw.integers(*images.shape[1:]))
    return _look_up(_poisson_levels(int(photons), draw.device), index)


@lru_cache(maxsize=2)
def _poisson_levels(photons: int, device: torch.device) -> Tensor:
    """Level after shot noise of every (level, 16-bit random number), flat, by inverting the distribution."""
    mean = torch.arange(256, dtype=torch.float64).unsqueeze(1) * photons / 255
    count = torch.arange(photons, dtype=torch.float64)
    log_probability = torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)
    below = torch.round(log_probability.exp().cumsum(1) * _STEPS).to(torch.int64).clamp_(max=_STEPS)
    # Counts of `photons` and more are all white, so the last bin takes what is left.
    edges = F.pad(F.pad(below, (1, 0)), (0, 1), value=_STEPS)
    levels = _quantise(torch.arange(photons + 1, dtype=torch.float64) * 255 / photons)
    return levels.repeat(256).repeat_interleave(edges.diff(dim=1).reshape(-1)).to(device)


def impulse_noise(images: Tensor, draw: Draws, scale: float, amount: float) -> Tensor:
    """Salt and pepper: a share `amount` of all values becomes 0 or 255, half each, channels independent."""
    number = draw.integers(*images.shape[1:])
    changed, salted = round(amount * _STEPS), round(amount * _STEPS / 2)
    return images.masked_fill(number < changed, 0).masked_fill_(number < salted, 255)


# ---- blur --------------------------------------------------------------------------------------------------


def defocus_blur(images: Tensor, draw: Draws, scale: float, radius: float, alias_blur: float) -> Tensor:
    """Out-of-focus lens: a disk of `radius` px, itself smoothed by a small Gaussian of `alias_blur` px.

    At the reference size a pixel belongs to the disk if its centre does, as published; at others it counts
    with the share of its area inside, so that the blur grows smoothly with the size. [choice] A disk inside
    one pixel (3 px of 224 at 32) leaves the image as it is.
    """
    window = 1 if radius <= 8 else 2
    if scale != 1:
        window = max(1, math.ceil(window * scale))
    radius, alias_blur = radius * scale, alias_blur * scale
    half = math.ceil(radius + 0.5)
    parts = 1 if scale == 1 else 8
    places = (torch.arange((2 * half + 1) * parts, dtype=torch.float64) + 0.5) / parts - half - 0.5
    inside = (places**2 + places.unsqueeze(1) ** 2 <= radius**2 + 1e-9).to(torch.float64)
    disk = F.avg_pool2d(inside[None, None], parts)
    if disk.sum() == 0:
        disk[..., half, half] = 1
    line = _gaussian(alias_blur, window)
    line = line / line.sum()
    # Padding by the window on both sides lets the smoothed disk keep its rim.
    disk = F.conv2d(disk, (line * line.unsqueeze(1))[None, None], padding=2 * (len(line) // 2))
    return _quantise(_filter(images.to(torch.float32), disk[0, 0], "reflect"))


def glass_blur(images: Tensor, draw: Draws, scale: float, sigma: float, reach: float, rounds: float) -> Tensor:
    """Frosted glass: smooth, let every pixel take a random near one's value, `rounds` times, smooth again.

    Pixels are visited from the bottom right to the top left, and each takes what its partner, at most `reach`
    px away (never less than 1), holds at that moment. The published code means to swap the two, but swaps
    views of one array, so that its images have this copy. [choice]
    """
    sigma, reach = sigma * scale, max(1, round(reach * scale))
    radius = int(4 * sigma + 0.5)
    line = _gaussian(sigma, radius)
    kernel = line * line.unsqueeze(1)
    levels = _quantise(_filter(images.to(torch.float32), kernel, "replicate"))
    for _ in range(int(rounds)):
        source = _near_sources(draw, *images.shape[2:], reach)
        levels = levels.flatten(2).gather(2, source.unsqueeze(1).expand(-1, levels.shape[1], -1)).view_as(levels)
    return _quantise(_filter(levels.to(torch.float32), kernel, "replicate"))


def _near_sources(draw: Draws, height: int, width: int, reach: int) -> Tensor:
    """Where each pixel's value comes from after one round of glass blur: flat indices (N, height * width).

    A partner visited earlier holds a copy already, so its source is looked up in turn, by doubling, until no
    source changes: the same as visiting pixel by pixel.
    """
    rows, columns = height - 2 * reach, width - 2 * reach
    place = torch.arange(height * width, device=draw.device)
    if rows <= 0 or columns <= 0:
        return place.expand(draw.count, -1)
    moves = (draw.integers(2, rows, columns).to(torch.int64) * (2 * reach) >> 16) - reach
    source = place.view(1, height, width).repeat(draw.count, 1, 1)
    source[:, reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] += moves[:, 0] * width + moves[:, 1]
    source = source.flatten(1)
    if reach == 1:  # every move goes up or left, to pixels not visited yet
        return source
    # A source further on than the pixel itself was visited before it; any other still held its own value.
    last = torch.where(source > place, source, place)
    while not torch.equal(last, further := last.gather(1, last)):
        last = further
    return source.gather(1, last)


def motion_blur(images: Tensor, draw: Draws, scale: float, radius: float, sigma: float) -> Tensor:
    """Camera movement in a random direction within 45 degrees of the horizontal."""
    angle = draw.uniform(1, low=-45, high=45).squeeze(1)
    return _quantise(_motion_blur(images.to(torch.float32), angle, radius * scale, sigma * scale))


def zoom_blur(images: Tensor, draw: Draws, scale: float, stop: float, step: float) -> Tensor:
    """Movement towards the scene: the mean of the image and its zooms by 1, 1 + step, ... below `stop`."""
    levels = images.to(torch.float32)
    factors = np.arange(1, stop, step).tolist()
    total = levels.clone()
    for factor in factors:
        total += _clipped_zoom(levels, factor)
    return _quantise(total / (len(factors) + 1))


# ---- weather -----------------------------------------------------------------------------------------------


def snow(
    images: Tensor,
    draw: Draws,
    scale: float,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    keep: float,
) -> Tensor:
    """Snow fall: zoomed, thresholded, downwards blurred noise, added with its half turn to a whitened image.

    keep: weight of the image against its whitened version.
    """
    # Flakes smaller than a pixel are drawn on a finer grid and averaged; or more would pass the threshold.
    fine = max(1, round(1 / scale))
    scale = scale * fine
    noise = draw.normal(1, images.shape[2] * fine, images.shape[3] * fine).mul_(deviation).add_(mean)
    flakes = _clipped_zoom(noise, max(1.0, zoom * scale))
    flakes = torch.where(flakes < threshold, 0, flakes)
    flakes = _quantise(flakes * 255).to(torch.float32)
    angle = draw.uniform(1, low=-135, high=-45).squeeze(1)
    flakes = _motion_blur(flakes, angle, radius * scale, sigma * scale)
    if fine > 1:
        flakes = F.avg_pool2d(flakes, fine)
    levels = images.to(torch.float32)
    white = torch.maximum(levels, _grey(levels) * 1.5 + 127.5)
    return _quantise(keep * levels + (1 - keep) * white + flakes + flakes.flip(2, 3))


def _grey(levels: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of RGB, or the only channel."""
    if levels.shape[1] == 1:
        return levels
    return levels[:, :1] * 0.299 + levels[:, 1:2] * 0.587 + levels[:, 2:] * 0.114


def frost(images: Tensor, draw: Draws, scale: float, keep: float, ice: float) -> Tensor:
    """A frozen window: `keep` times the image plus `ice` times an ice texture.

    The published images use crops of photographs, which cannot be shipped. Here the ice is procedural
    [choice]: needles in three directions 120 degrees apart, turned at random for every image, grow out of a
    bluish crust whose thickness is a plasma fractal.
    """
    height, width = images.shape[2:]
    thickness = _plasma(draw, height, width, 1.8).unsqueeze(1)
    # From 128 px on needles are drawn on a grid of 64 to 127 px and enlarged, or they would be hair-thin.
    coarse = max(1, min(height, width) // 64)
    rows, columns = -(-height // coarse), -(-width // coarse)
    grain = min(rows, columns) / 32
    seeds = draw.integers(1, rows, columns) < round(0.03 * _STEPS / max(1.0, grain))
    # A seed on the rim would be repeated outside and come back as a band.
    seeds = F.pad(seeds[:, :, 1:-1, 1:-1].to(torch.float32) * 255, (1, 1, 1, 1))
    turn = draw.uniform(1, low=0, high=360).squeeze(1)
    directions = torch.cat((turn, turn + 120, turn + 240))
    needles = _motion_blur(seeds.repeat(3, 1, 1, 1), directions, 8 * grain, 4 * grain)
    needles = needles.view(3, *seeds.shape).sum(0).mul_(3 * max(1.0, grain)).clamp_(max=255)
    if coarse > 1:
        needles = F.interpolate(needles, size=(height, width), mode="bilinear", align_corners=True)
    texture = 30 + 170 * thickness + needles * (0.2 + 0.5 * thickness)
    if images.shape[1] == 3:
        texture = texture * torch.tensor((0.88, 0.97, 1.05), device=images.device).view(1, 3, 1, 1)
    return _quantise(images.to(torch.float32) * keep + texture.clamp(max=255) * ice)


def fog(images: Tensor, draw: Draws, scale: float, amount: float, decay: float) -> Tensor:
    """Fog: `amount` times a plasma fractal is added, the sum scaled back to the image's brightest value."""
    haze = _plasma(draw, *images.shape[2:], decay).unsqueeze(1)
    brightest = images.amax((1, 2, 3), keepdim=True).to(torch.float32)
    gain = brightest / (brightest + 255 * amount)
    return _quantise((haze * (255 * amount) + images) * gain)


def brightness(images: Tensor, draw: Draws, scale: float, amount: float) -> Tensor:
    """HSV value raised by `amount` (full range = 1): hue and saturation stay, channels grow by one factor."""
    value = images.amax(1, keepdim=True).to(torch.float32)
    raised = (value + 255 * amount).clamp_(max=255)
    return _quantise(torch.where(value > 0, images * (raised / value.clamp(min=1)), raised))


# ---- digital -----------------------------------------------------------------------------------------------


def contrast(images: Tensor, draw: Draws, scale: float, factor: float) -> Tensor:
    """Distances from every channel's own mean multiplied by `factor`."""
    # A sum of integers is exact whatever its order.
    mean = images.sum((2, 3), keepdim=True, dtype=torch.int64) / (images.shape[2] * images.shape[3])
    return _quantise((images - mean) * factor + mean)


def elastic_transform(images: Tensor, draw: Draws, scale: float, stretch: float, sigma: float, jitter: float) -> Tensor:
    """A rubber sheet: a random affine map, then displacements by smoothed noise.

    jitter: px by which the three points that define the affine map move; stretch: amplitude of the
    displacements before smoothing; sigma: px of the smoothing.
    Smoothing divides the amplitude by about sigma, so away from the reference size `stretch` is multiplied by
    scale^2: displacements then keep their share of the image's size. [choice]
    """
    height, width = images.shape[2:]
    stretch, sigma, jitter = stretch * scale**2, sigma * scale, jitter * scale
    levels = images.to(torch.float32)
    x, y = _affine_coordinates(draw, height, width, jitter)
    levels = _sample(levels, x, y, around_pixels=True)
    if stretch > 0:
        noise = draw.uniform(2, height, width, low=-1, high=1).to(torch.float64)
        smooth = noise @ _smoothing(width, sigma).to(draw.device).T
        smooth = (smooth.transpose(2, 3) @ _smoothing(height, sigma).to(draw.device).T).transpose(2, 3)
        moves = (smooth * stretch).to(torch.float32)
        columns = torch.arange(width, device=draw.device, dtype=torch.float32)
        rows = torch.arange(height, device=draw.device, dtype=torch.float32).unsqueeze(1)
        levels = _sample(levels, columns + moves[:, 0], rows + moves[:, 1], around_pixels=False)
    return _quantise(levels)


def _affine_coordinates(draw: Draws, height: int, width: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Where a random affine map fetches every pixel from: x and y, (N, height, width) each.

    The map sends three corners of a square around the centre to places moved by up to `jitter` px.
    """
    arm = min(height, width) // 3
    centre_x, centre_y = width // 2, height // 2
    corners = [
        (centre_x + arm, centre_y + arm),
        (centre_x + arm, centre_y - arm),
        (centre_x - arm, centre_y - arm),
    ]
    moves = draw.uniform(3, 2, low=-jitter, high=jitter)
    ends = [(moves[:, k, 0] + corners[k][0], moves[:, k, 1] + corners[k][1]) for k in range(3)]
    # The inverse map sends the sides of the moved triangle back to (0, 2 arm) and (2 arm, 0).
    ux, uy = ends[0][0] - ends[1][0], ends[0][1] - ends[1][1]
    vx, vy = ends[1][0] - ends[2][0], ends[1][1] - ends[2][1]
    area = (ux * vy - vx * uy) / (2 * arm)
    columns = torch.arange(width, device=draw.device, dtype=torch.float32)
    rows = torch.arange(height, device=draw.device, dtype=torch.float32).unsqueeze(1)
    from_x = columns - ends[1][0].view(-1, 1, 1)
    from_y = rows - ends[1][1].view(-1, 1, 1)

    def apply(a: Tensor, b: Tensor, shift: int) -> Tensor:
        return (a / area).view(-1, 1, 1) * from_x + (b / area).view(-1, 1, 1) * from_y + shift

    return apply(-uy, ux, corners[1][0]), apply(vy, -vx, corners[1][1])


@lru_cache(maxsize=16)
def _smoothing(size: int, sigma: float) -> Tensor:
    """Gaussian smoothing along one axis as a matrix (size, size), float64; outside, the edge mirrors."""
    radius = int(3 * sigma + 0.5)
    line = _gaussian(sigma, radius)
    offsets = torch.arange(len(line)) - len(line) // 2
    target = (torch.arange(size).unsqueeze(1) + offsets) % (2 * size)
    target = torch.minimum(target, 2 * size - 1 - target)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, target, (line / line.sum()).expand(size, -1).contiguous())


def pixelate(images: Tensor, draw: Draws, scale: float, share: float) -> Tensor:
    """Shrunk to `share` of its size by means over boxes, enlarged by repetition: as Pillow's BOX does."""
    levels = images
    for axis in (3, 2):
        levels = _shrink(levels, axis, max(1, int(images.shape[axis] * share)))
    for axis in (3, 2):
        size, small = images.shape[axis], levels.shape[axis]
        nearest = ((torch.arange(size, dtype=torch.float64) + 0.5) * (small / size)).to(torch.int64)
        levels = levels.index_select(axis, nearest.to(levels.device))
    return levels


def _shrink(levels: Tensor, axis: int, small: int) -> Tensor:
    """Rounded means over the pixels whose centres lie in each of `small` boxes along one axis."""
    size = levels.shape[axis]
    ratio = size / small
    centres = (torch.arange(small, dtype=torch.float64) + 0.5) * ratio
    first = (centres - 0.5 * ratio + 0.5).to(torch.int64).clamp_(min=0)
    shape = [1, 1, 1, 1]
    shape[axis] = small
    total = count = torch.zeros((), device=levels.device)
    for offset in range(math.ceil(ratio) + 1):
        pixel = first + offset
        # A centre on the border of two boxes belongs to the left one, as far as float64 tells, as in Pillow.
        place = (pixel - centres + 0.5) * (1 / ratio)
        inside = ((place > -0.5) & (place <= 0.5) & (pixel < size)).view(shape).to(levels.device)
        total = total + levels.index_select(axis, pixel.clamp(max=size - 1).to(levels.device)) * inside
        count = count + inside
    return (total / count + 0.5).floor_().to(torch.uint8)


def jpeg_compression(images: Tensor, draw: Draws, scale: float, quality: float) -> Tensor:
    """JPEG at `quality`, encoded and decoded for real on the CPU; one channel as a greyscale JPEG."""
    try:
        pixels = _jpeg_by_torchvision(images.cpu(), int(quality))
    except (ImportError, AttributeError):
        pixels = _jpeg_by_pillow(images.cpu(), int(quality))
    return pixels.to(images.device)


def _jpeg_by_torchvision(images: Tensor, quality: int) -> Tensor:
    """The faster way, to the same pixels; torchvision has announced to drop it, hence the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchvision.io import decode_jpeg, encode_jpeg  # imported here: it takes seconds

        return torch.stack(decode_jpeg(encode_jpeg(list(images), quality=quality)))


def _jpeg_by_pillow(images: Tensor, quality: int) -> Tensor:
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    out = np.empty_like(pixels)
    for k, image in enumerate(pixels):
        file = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture.save(file, "JPEG", quality=quality)
        out[k] = np.asarray(Image.open(file)).reshape(image.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


# ---- registry and entry points -----------------------------------------------------------------------------

Corruption = Callable[..., Tensor]

_MEMBERS: dict[str, tuple[Corruption, ...]] = {
    "noise": (gaussian_noise, shot_noise, impulse_noise),
    "blur": (defocus_blur, glass_blur, motion_blur, zoom_blur),
    "weather": (snow, frost, fog, brightness),
    "digital": (contrast, elastic_transform, pixelate, jpeg_compression),
}
CORRUPTIONS: dict[str, Corruption] = {f.__name__: f for members in _MEMBERS.values() for f in members}
FAMILIES: dict[str, str] = {f.__name__: family for family, members in _MEMBERS.items() for f in members}


def corrupt(
    images: Tensor, name: str, severity: int, seed: int = 0, *, table: str = "cifar-c", first_index: int = 0
) -> Tensor:
    """Images under one of the fifteen common corruptions.

    images: uint8 (N, C, H, W), C 1 or 3, H and W at least 8, any device; not modified.
    severity: 0 (an identical copy) to 5.
    table: whose parameters, `cifar-c` or `imagenet-c`; a corruption that is in CORRUPTIONS but not in the
    table gets the severity itself as its parameter.
    first_index: place of the first image in its data set. Image i is corrupted by the random stream of (seed,
    name, severity, first_index + i): corrupt(all)[100:200] equals corrupt(all[100:200], first_index=100).
    Returns uint8 of the same shape on the same device.
    Lengths in pixels are multiplied by min(H, W) / the table's own size (32 or 224). [choice]
    Raises ValueError for an unknown name or table, a severity outside 0..5 or images of another shape, and
    TypeError for another dtype. Source: arXiv 1903.12261.
    """
    if name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    if table not in SEVERITY_TABLES:
        raise unknown("severity table", table, SEVERITY_TABLES)
    if isinstance(severity, bool) or not isinstance(severity, int) or not 0 <= severity <= 5:
        raise ValueError(f"severity {severity!r}: must be an integer from 0 (clean) to 5")
    _check_images(images)
    if severity == 0 or len(images) == 0:
        return images.clone()
    parameters = SEVERITY_TABLES[table].get(name, ((1,), (2,), (3,), (4,), (5,)))[severity - 1]
    scale = min(images.shape[2:]) / REFERENCE_SIZES.get(table, 32)
    # A float temporary has 2 MB on a CPU (it stays in the cache) and 16 MB on an accelerator.
    budget = 1 << (19 if images.device.type == "cpu" else 22)
    chunk = max(1, budget // math.prod(images.shape[1:]))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].contiguous()
        draw = Draws(seed, name, severity, first_index + start, len(part), images.device)
        out[start : start + chunk] = CORRUPTIONS[name](part, draw, scale, *parameters)
    return out


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {kind}: must be a torch.uint8 tensor (N, C, H, W)")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < _SMALLEST:
        raise ValueError(f"images have shape {shape}: must be (N, C, H, W), C 1 or 3, H and W at least {_SMALLEST}")


def load_cifar_c(folder: str | Path, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """One corruption and severity of the published CIFAR-10-C files.

    folder: holds NAME.npy, uint8 (50000, 32, 32, 3) with severities 1 to 5 one after another, and labels.npy.
    Returns images uint8 (10000, 3, 32, 32) and labels int64 (10000,).
    Raises FileNotFoundError for a missing file, ValueError for a severity outside 1..5 or another shape.
    Source: CIFAR-10-C, arXiv 1903.12261.
    """
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        raise ValueError(f"severity {severity!r}: CIFAR-10-C has integers from 1 to 5")
    rows = slice(10_000 * (severity - 1), 10_000 * severity)
    folder = Path(folder)
    if not (folder / f"{name}.npy").is_file() and name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    images = _open_array(folder / f"{name}.npy", (50_000, 32, 32, 3))[rows]
    labels = _open_array(folder / "labels.npy", (50_000,))[rows]
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _open_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file, memory-mapped, after its shape and type were checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: CIFAR-10-C has one NAME.npy a corruption, and labels.npy")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole .npy file: {error}") from error
    if array.shape != shape or array.dtype.kind not in "ui":
        raise ValueError(f"{path} holds {array.dtype} {array.shape}: must be uint8 {shape}")
    return array
