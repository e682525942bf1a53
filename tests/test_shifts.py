"""Corruptions: the published definitions, one random stream an image, and clear errors."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gcnet import shifts
from gcnet.shifts import CORRUPTIONS, FAMILIES, NATURAL_SHIFTS, SEVERITY_TABLES, corrupt, load_cifar_c

PUBLISHED = {
    "noise": {"gaussian_noise", "shot_noise", "impulse_noise"},
    "blur": {"defocus_blur", "glass_blur", "motion_blur", "zoom_blur"},
    "weather": {"snow", "frost", "fog", "brightness"},
    "digital": {"contrast", "elastic_transform", "pixelate", "jpeg_compression"},
}
every_corruption = pytest.mark.parametrize("name", list(CORRUPTIONS))
every_table = pytest.mark.parametrize("table", list(SEVERITY_TABLES))
# No random number enters these.
DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def pictures(count: int = 4, channels: int = 3, height: int = 32, width: int | None = None) -> Tensor:
    """Different ramps and a bright disk, from integers only so that every machine has the same pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width or height), indexing="ij")
    images = []
    for k in range(count):
        ramps = [((2 + c) * x + (3 + k % 4) * y + 31 * k) * 32 // height for c in range(channels)]
        image = torch.stack([(ramp % 128 - 64).abs() * 2 + 40 for ramp in ramps])
        disk = (x - x.shape[1] // 2) ** 2 + (y - height // 2 + k % 5) ** 2 < (height // 4) ** 2
        image[:, disk] = torch.tensor([225, 60, 120][:channels]).unsqueeze(1)
        images.append(image)
    return torch.stack(images).to(torch.uint8)


def flat(level: int, count: int = 1, channels: int = 3, size: int = 32) -> Tensor:
    return torch.full((count, channels, size, size), level, dtype=torch.uint8)


def damage(before: Tensor, after: Tensor) -> float:
    return float((before.to(torch.float64) - after.to(torch.float64)).abs().mean())


# ---- the registry ------------------------------------------------------------------------------------------


def test_the_fifteen_published_corruptions_in_four_families() -> None:
    assert {f: {n for n in FAMILIES if FAMILIES[n] == f} for f in PUBLISHED} == PUBLISHED
    assert set(CORRUPTIONS) == set(FAMILIES)
    assert len(CORRUPTIONS) == 15


@every_table
def test_a_table_has_five_severities_for_each(table: str) -> None:
    assert set(SEVERITY_TABLES[table]) == set(CORRUPTIONS)
    assert {len(entry) for entry in SEVERITY_TABLES[table].values()} == {5}


def test_the_two_tables_differ_as_published() -> None:
    cifar, imagenet = SEVERITY_TABLES["cifar-c"], SEVERITY_TABLES["imagenet-c"]
    assert [p[0] for p in cifar["gaussian_noise"]] == [0.04, 0.06, 0.08, 0.09, 0.10]
    assert [p[0] for p in imagenet["gaussian_noise"]] == [0.08, 0.12, 0.18, 0.26, 0.38]
    assert [p[0] for p in cifar["jpeg_compression"]] == [80, 65, 58, 50, 40]
    assert [p[0] for p in imagenet["jpeg_compression"]] == [25, 18, 15, 10, 7]
    assert all(cifar[name] != imagenet[name] for name in cifar)


def test_natural_shifts_name_a_loader_and_the_data_set_they_shift() -> None:
    assert NATURAL_SHIFTS["stl10_32"] == ("stl10_32", "cifar10")
    assert NATURAL_SHIFTS["usps"] == ("usps", "mnist")


def test_a_new_corruption_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def dim(images: Tensor, draw: shifts.Draws, scale: float, severity: float) -> Tensor:
        return images - images // 10 * int(severity)

    monkeypatch.setitem(CORRUPTIONS, "dim", dim)
    assert corrupt(flat(100), "dim", 3).unique().tolist() == [70]


# ---- every corruption --------------------------------------------------------------------------------------


@every_table
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64])
@every_corruption
def test_shape_type_and_input_are_kept(name: str, size: int, channels: int, table: str) -> None:
    images = pictures(2, channels, size)
    before = images.clone()
    result = corrupt(images, name, 5, table=table)
    assert result.shape == images.shape and result.dtype == torch.uint8 and result.device == images.device
    assert torch.equal(images, before)
    assert not torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


@every_table
@every_corruption
def test_small_and_oblong_images(name: str, table: str) -> None:
    for shape in ((2, 3, 8, 8), (2, 1, 9, 20), (1, 3, 40, 24)):
        images = pictures(shape[0], shape[1], shape[2], shape[3])
        assert corrupt(images, name, 4, table=table).shape == shape


@every_corruption
def test_severity_zero_is_an_identical_copy(name: str) -> None:
    images = pictures()
    result = corrupt(images, name, 0)
    assert torch.equal(result, images) and result.data_ptr() != images.data_ptr()


@every_corruption
def test_no_images_give_no_images(name: str) -> None:
    assert corrupt(pictures()[:0], name, 3).shape == (0, 3, 32, 32)


@every_corruption
def test_the_seed_decides(name: str) -> None:
    images = pictures()
    first = corrupt(images, name, 3, seed=1)
    assert torch.equal(first, corrupt(images, name, 3, seed=1))
    assert torch.equal(first, corrupt(images, name, 3, seed=2)) == (name in DETERMINISTIC)


@every_corruption
def test_equal_images_get_different_draws(name: str) -> None:
    images = pictures(1).repeat(2, 1, 1, 1)
    one, other = corrupt(images, name, 3)
    assert torch.equal(one, other) == (name in DETERMINISTIC)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_an_image_does_not_depend_on_its_batch(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(CORRUPTIONS)))
    severity = data.draw(st.integers(1, 5))
    size = data.draw(st.sampled_from([17, 28, 32]))
    images = pictures(12, data.draw(st.sampled_from([1, 3])), size)
    start = data.draw(st.integers(0, 10))
    stop = data.draw(st.integers(start + 1, 12))
    whole = corrupt(images, name, severity, seed=3, first_index=7)
    part = corrupt(images[start:stop], name, severity, seed=3, first_index=7 + start)
    assert torch.equal(whole[start:stop], part)


@every_corruption
def test_chunks_inside_a_call_leave_no_trace(name: str) -> None:
    images = pictures(8).repeat(25, 1, 1, 1)  # more than one chunk
    whole = corrupt(images, name, 5)
    cuts = [0, 3, 60, 61, 187, 200]
    parts = [corrupt(images[a:b], name, 5, first_index=a) for a, b in pairwise(cuts)]
    assert torch.equal(whole, torch.cat(parts))


@every_corruption
def test_memory_layout_of_the_input_does_not_matter(name: str) -> None:
    images = pictures()
    expected = corrupt(images, name, 3)
    assert torch.equal(expected, corrupt(images.to(memory_format=torch.channels_last), name, 3))
    wide = pictures(4, 3, 32, 64)
    assert torch.equal(corrupt(wide[..., ::2], name, 3), corrupt(wide[..., ::2].contiguous(), name, 3))


@every_table
@every_corruption
def test_damage_grows_with_severity(name: str, table: str) -> None:
    images = pictures(24)
    damages = [damage(images, corrupt(images, name, s, table=table)) for s in range(6)]
    assert damages[0] == 0 < damages[2]
    # The published parameters do not grow with severity alone: elastic transform moves the whole image less
    # and bends it more, frost darkens the image under the ice, glass blur trades smoothing for rounds.
    if name not in {"elastic_transform", "frost", "glass_blur"}:
        assert damages[5] > 1.2 * damages[1]
        assert all(later >= 0.9 * earlier for earlier, later in pairwise(damages)), damages


GOLDEN: dict[str, tuple[float, list[int]]] = {
    "gaussian_noise": (109.197, [180, 25, 70, 143, 114, 159, 144, 56, 0, 44, 106, 118, 74, 113, 0, 170]),
    "shot_noise": (109.258, [142, 68, 74, 129, 91, 153, 102, 23, 61, 51, 129, 125, 95, 159, 30, 95]),
    "impulse_noise": (110.705, [168, 56, 72, 120, 106, 166, 102, 42, 44, 60, 140, 0, 98, 130, 46, 142]),
    "defocus_blur": (109.607, [164, 57, 69, 116, 101, 163, 104, 46, 43, 58, 137, 119, 104, 131, 46, 138]),
    "glass_blur": (109.114, [166, 56, 70, 118, 104, 164, 102, 42, 44, 58, 138, 116, 98, 130, 46, 140]),
    "motion_blur": (109.592, [163, 56, 70, 115, 94, 157, 116, 56, 46, 54, 130, 128, 108, 140, 51, 126]),
    "zoom_blur": (110.522, [158, 52, 69, 111, 95, 160, 103, 49, 51, 67, 139, 125, 112, 120, 48, 131]),
    "snow": (149.890, [199, 79, 96, 148, 135, 197, 129, 66, 66, 96, 169, 143, 124, 175, 81, 228]),
    "frost": (142.416, [168, 81, 73, 143, 117, 187, 127, 60, 47, 71, 196, 162, 125, 121, 50, 165]),
    "fog": (117.569, [143, 101, 33, 159, 169, 147, 121, 98, 32, 104, 105, 101, 117, 109, 83, 116]),
    "brightness": (146.998, [219, 107, 123, 171, 157, 217, 153, 93, 95, 111, 191, 167, 149, 181, 97, 193]),
    "contrast": (109.233, [137, 103, 88, 107, 116, 134, 94, 86, 104, 109, 113, 112, 122, 131, 80, 116]),
    "elastic_transform": (109.416, [157, 56, 68, 110, 91, 162, 97, 45, 48, 49, 117, 123, 119, 154, 49, 122]),
    "pixelate": (109.737, [168, 56, 72, 120, 106, 166, 102, 42, 44, 60, 140, 116, 98, 130, 46, 142]),
    "jpeg_compression": (109.712, [165, 63, 71, 120, 100, 170, 109, 46, 12, 59, 137, 127, 107, 135, 40, 133]),
}


@every_corruption
def test_golden_pixels(name: str) -> None:
    mean, pixels = GOLDEN[name]
    result = corrupt(pictures(), name, 4, seed=5).to(torch.int64)
    found = result.flatten()[:: result.numel() // 16][:16]
    assert float(result.to(torch.float64).mean()) == pytest.approx(mean, abs=0.02)
    assert int((found - torch.tensor(pixels)).abs().max()) <= 1, found.tolist()


# ---- the random streams ------------------------------------------------------------------------------------


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    draws = shifts.Draws(0, "fog", 1, 0, 64, torch.device("cpu"))
    numbers = draws.integers(4096).to(torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 65536
    # Standard errors: 1/12 and correlations of 64 * 4096 draws.
    assert float(numbers.mean() / 65536) == pytest.approx(0.5, abs=5 * 0.2887 / 512)
    assert float((numbers / 65536).var()) == pytest.approx(1 / 12, abs=0.001)
    between_neighbours = torch.corrcoef(torch.stack((numbers[:, :-1].flatten(), numbers[:, 1:].flatten())))
    between_images = torch.corrcoef(torch.stack((numbers[:-1].flatten(), numbers[1:].flatten())))
    assert abs(float(between_neighbours[0, 1])) < 5 / 512
    assert abs(float(between_images[0, 1])) < 5 / 512
    counts = torch.histc(numbers, 256, 0, 65536)
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    assert not torch.equal(draws.integers(4096), draws.integers(4096))


def test_the_hash_is_splitmix64() -> None:
    mask = (1 << 64) - 1

    def by_hand(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    values = [0, 1, 12345, 0x9E3779B97F4A7C15, mask]
    words = torch.tensor([shifts._signed(v) for v in values])
    assert [v & mask for v in shifts._scramble(words).tolist()] == [by_hand(v) for v in values]


def test_normal_draws() -> None:
    numbers = shifts.Draws(0, "snow", 1, 0, 64, torch.device("cpu")).normal(4096).to(torch.float64)
    assert abs(float(numbers.mean())) < 5 / 512
    assert float(numbers.std()) == pytest.approx(1, abs=0.01)
    assert float((numbers**4).mean()) == pytest.approx(3, abs=0.15)
    assert float((numbers < -1.6449).to(torch.float64).mean()) == pytest.approx(0.05, abs=0.003)


# ---- noise -------------------------------------------------------------------------------------------------


@every_table
@pytest.mark.parametrize("severity", [1, 3])
def test_gaussian_noise_has_the_sigma_of_the_table(severity: int, table: str) -> None:
    sigma = 255 * SEVERITY_TABLES[table]["gaussian_noise"][severity - 1][0]
    noise = corrupt(flat(128, 40), "gaussian_noise", severity, table=table).to(torch.float64) - 128
    # Truncation lowers the mean by half a level and adds 1/12 to the variance.
    assert float(noise.mean()) == pytest.approx(-0.5, abs=5 * sigma / math.sqrt(noise.numel()))
    assert float(noise.var()) == pytest.approx(sigma**2 + 1 / 12, rel=0.03)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_shot_noise_is_poisson(severity: int) -> None:
    photons = SEVERITY_TABLES["cifar-c"]["shot_noise"][severity - 1][0]
    counts = corrupt(flat(102, 40), "shot_noise", severity).to(torch.float64) * photons / 255
    expected = 0.4 * photons
    assert float(counts.mean()) == pytest.approx(expected, abs=photons / 255 + 0.02 * math.sqrt(expected))
    assert float(counts.var()) == pytest.approx(expected, rel=0.05)
    assert corrupt(flat(0), "shot_noise", severity).max() == 0


def test_shot_noise_probabilities() -> None:
    # 3 photons at level 85 (mean 1): P(0) = P(1) = 1/e, P(2) = P(1) / 2, and 3 or more is white.
    result = corrupt(flat(85, 60), "shot_noise", 5, table="imagenet-c")
    share = [float((result == level).to(torch.float64).mean()) for level in (0, 85, 170, 255)]
    assert share == pytest.approx([0.3679, 0.3679, 0.1839, 0.0803], abs=0.006)


@pytest.mark.parametrize("severity", [1, 5])
def test_impulse_noise_changes_the_share_of_the_table(severity: int) -> None:
    amount = SEVERITY_TABLES["cifar-c"]["impulse_noise"][severity - 1][0]
    result = corrupt(flat(77, 60), "impulse_noise", severity)
    error = 5 * math.sqrt(amount / 2 / result.numel())
    assert float((result == 255).to(torch.float64).mean()) == pytest.approx(amount / 2, abs=error)
    assert float((result == 0).to(torch.float64).mean()) == pytest.approx(amount / 2, abs=error)
    assert set(result.unique().tolist()) == {0, 77, 255}


# ---- blur --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
@pytest.mark.parametrize("severity", [1, 5])
def test_blurs_keep_a_flat_image(name: str, severity: int) -> None:
    assert torch.equal(corrupt(flat(93), name, severity), flat(93))


def test_defocus_of_a_point_is_the_smoothed_disk() -> None:
    image = flat(0)
    image[:, :, 16, 16] = 255
    blurred = corrupt(image, "defocus_blur", 4)[0, 0]
    # Radius 1: five equal pixels; a Gaussian of 0.2 px spreads less than 1e-5 of them.
    assert blurred[16, 16] == pytest.approx(255 / 5, abs=1)
    assert blurred[16, 15] == blurred[16, 17] == blurred[15, 16] == blurred[17, 16] == blurred[16, 16]
    assert int(blurred.to(torch.int64).sum()) == pytest.approx(255, abs=4)


def test_motion_blur_follows_a_line_with_half_a_gaussian() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 16, 20] = 255
    blurred = shifts._motion_blur(image, torch.zeros(1), 3, 2.0)[0, 0]
    weights = np.exp(-0.5 * (np.arange(7) / 2.0) ** 2)
    expected = np.floor(255 * weights / weights.sum() + 0.5)
    assert blurred[16, 14:21].flip(0).tolist() == pytest.approx(expected.tolist(), abs=1)
    assert blurred.sum() == blurred[16, 14:21].sum()
    diagonal = shifts._motion_blur(image, torch.full((1,), 45.0), 3, 2.0)[0, 0]
    # Whole steps nearest to k / sqrt(2): two of the seven places coincide with their neighbours.
    places = {round(k * math.sqrt(0.5)) for k in range(7)}
    assert {tuple(place) for place in diagonal.nonzero().tolist()} == {(16 - p, 20 - p) for p in places}


def test_each_image_moves_in_its_own_direction() -> None:
    image = torch.zeros(2, 1, 33, 33)
    image[:, :, 16, 16] = 255
    blurred = shifts._motion_blur(image, torch.tensor([0.0, -90.0]), 3, 2.0)
    assert torch.equal(blurred[0, 0, 16], blurred[1, 0, :, 16].flip(0))


def test_zoom_by_two_is_bilinear_between_the_corners_of_the_crop() -> None:
    row = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8) * 10
    zoomed = shifts._clipped_zoom(row, 2.0)[0, 0]
    # The middle four columns (20..50) stretched over eight.
    assert zoomed[0].tolist() == pytest.approx([20 + 30 * k / 7 for k in range(8)], abs=1e-4)


def test_glass_blur_is_the_pixel_by_pixel_shuffle() -> None:
    height, width, reach = 11, 13, 2
    draws = shifts.Draws(0, "glass_blur", 1, 0, 3, torch.device("cpu"))
    found = shifts._near_sources(draws, height, width, reach)
    draws = shifts.Draws(0, "glass_blur", 1, 0, 3, torch.device("cpu"))
    moves = draws.integers(2, height - 2 * reach, width - 2 * reach).to(torch.int64) * (2 * reach) >> 16
    for image in range(3):
        board = torch.arange(height * width).view(height, width)
        for y in range(height - reach, reach, -1):
            for x in range(width - reach, reach, -1):
                dy, dx = (moves[image, :, y - reach - 1, x - reach - 1] - reach).tolist()
                board[y, x] = board[y + dy, x + dx].clone()
        assert torch.equal(found[image].view(height, width), board)
    assert not torch.equal(found[0], found[1])


def test_filter_weights_are_exact_in_float32() -> None:
    weights = shifts._exact(torch.rand(7, 7, generator=torch.Generator().manual_seed(0)))
    assert float(weights.sum()) == 1
    assert torch.equal(weights * 65536, torch.round(weights * 65536))


# ---- weather -----------------------------------------------------------------------------------------------


def test_fog_keeps_the_brightest_value_as_its_limit() -> None:
    images = pictures(8)
    fogged = corrupt(images, "fog", 5)
    assert (fogged.amax((1, 2, 3)) <= images.amax((1, 2, 3))).all()
    assert corrupt(flat(0), "fog", 5).max() == 0


def test_plasma_fills_zero_to_one() -> None:
    draws = shifts.Draws(0, "fog", 1, 0, 5, torch.device("cpu"))
    field = shifts._plasma(draws, 32, 32, 2.0)
    assert field.amin((1, 2)).tolist() == [0] * 5 and field.amax((1, 2)).tolist() == [1] * 5
    rough = (field[:, :, 1:] - field[:, :, :-1]).abs().mean()
    assert rough < 0.1  # neighbours are alike: a fractal, not noise


def test_snow_and_frost_only_add_light_to_a_dark_image() -> None:
    for name in ("snow", "frost"):
        images = flat(20, 4)
        assert corrupt(images, name, 1).min() >= 20
        assert corrupt(images, name, 5).to(torch.float64).mean() > 40


def test_brightness_raises_hsv_value() -> None:
    image = flat(0)
    image[0, :, :, :] = torch.tensor([100, 50, 0], dtype=torch.uint8).view(3, 1, 1)
    # Severity 5 adds 76.5 to the largest channel and multiplies the others by 1.765.
    assert corrupt(image, "brightness", 5)[0, :, 0, 0].tolist() == [176, 88, 0]
    assert corrupt(flat(0), "brightness", 5).unique().tolist() == [76]
    assert corrupt(flat(230, channels=1), "brightness", 5).unique().tolist() == [255]


# ---- digital -----------------------------------------------------------------------------------------------


def test_contrast_shrinks_towards_the_mean_of_each_channel() -> None:
    image = flat(0, channels=1)
    image[:, :, :, 16:] = 200
    # Mean 100; factor 0.5 at severity 2.
    assert corrupt(image, "contrast", 2)[0, 0, 0, [0, 31]].tolist() == [50, 150]


@pytest.mark.parametrize("size", [28, 32, 45, 64])
@pytest.mark.parametrize("share", [0.95, 0.75, 0.65, 0.5, 0.3, 0.25])
def test_pixelate_is_pillows_box_filter(size: int, share: float) -> None:
    images = pictures(2, 3, size)
    draws = shifts.Draws(0, "pixelate", 1, 0, 2, torch.device("cpu"))
    result = shifts.pixelate(images, draws, 1.0, share)
    for image, found in zip(images, result, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        small = picture.resize((int(size * share), int(size * share)), Image.Resampling.BOX)
        expected = np.asarray(small.resize((size, size), Image.Resampling.BOX))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_jpeg_coders_agree(channels: int) -> None:
    images = pictures(3, channels)
    by_pillow = shifts._jpeg_by_pillow(images, 50)
    assert torch.equal(by_pillow, corrupt(images, "jpeg_compression", 4))
    assert not torch.equal(by_pillow, images)


def test_elastic_without_displacement_is_affine() -> None:
    # Severity 1 has no displacement field: a plane stays a plane inside.
    x = torch.arange(32, dtype=torch.uint8).expand(3, 3, 32, 32) * 7
    warped = corrupt(x.contiguous(), "elastic_transform", 1).to(torch.int64)[:, :, 12:20, 12:20]
    second = warped[..., 2:] - 2 * warped[..., 1:-1] + warped[..., :-2]
    assert int(second.abs().max()) <= 1
    assert not torch.equal(warped[0], warped[1])


def test_affine_map_sends_the_moved_corners_back() -> None:
    draws = shifts.Draws(0, "elastic_transform", 1, 0, 2, torch.device("cpu"))
    still_x, still_y = shifts._affine_coordinates(draws, 32, 24, 0.0)
    assert torch.allclose(still_x, torch.arange(24.0).expand(2, 32, 24), atol=1e-4)
    assert torch.allclose(still_y, torch.arange(32.0).view(1, 32, 1).expand(2, 32, 24), atol=1e-4)


@pytest.mark.parametrize(("size", "sigma"), [(32, 6.4), (32, 0.96), (16, 20.0)])
def test_smoothing_keeps_a_constant_and_mirrors_at_the_edge(size: int, sigma: float) -> None:
    from scipy.ndimage import gaussian_filter1d

    signal = np.sin(np.arange(size) * 0.7) + (np.arange(size) > size // 2)
    expected = gaussian_filter1d(signal, sigma, mode="reflect", radius=int(3 * sigma + 0.5))
    assert (shifts._smoothing(size, sigma).numpy() @ signal).tolist() == pytest.approx(expected.tolist())


# ---- errors ------------------------------------------------------------------------------------------------


def test_unknown_names_say_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"):
        corrupt(pictures(), "gausian_noise", 1)
    with pytest.raises(ValueError, match="unknown severity table 'cifar'; did you mean 'cifar-c'"):
        corrupt(pictures(), "fog", 1, table="cifar")


@pytest.mark.parametrize("severity", [-1, 6, 2.0, "3", True, None])
def test_severity_is_an_integer_from_0_to_5(severity: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"severity {severity!r}: must be an integer from 0")):
        corrupt(pictures(), "fog", severity)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 2, 32, 32), (2, 3, 7, 32), (2, 32, 32, 3)])
def test_shapes_that_are_not_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"images have shape {shape}")):
        corrupt(torch.zeros(shape, dtype=torch.uint8), "fog", 1)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 32, 32), np.zeros((1, 3, 32, 32), np.uint8)])
def test_other_types_are_refused(images: object) -> None:
    with pytest.raises(TypeError, match=r"images are (torch.float32|ndarray): must be a torch.uint8 tensor"):
        corrupt(images, "fog", 1)  # type: ignore[arg-type]


# ---- CIFAR-10-C files --------------------------------------------------------------------------------------


def sparse_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A .npy file of zeros that takes no disk."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def test_cifar_c_files_are_read(tmp_path: Path) -> None:
    pixels = sparse_array(tmp_path / "fog.npy", (50_000, 32, 32, 3))
    pixels[20_000, 1, 2] = (7, 8, 9)
    pixels.flush()
    labels = sparse_array(tmp_path / "labels.npy", (50_000,))
    labels[20_000] = 6
    labels.flush()
    images, targets = load_cifar_c(tmp_path, "fog", 3)
    assert images.shape == (10_000, 3, 32, 32) and images.dtype == torch.uint8
    assert images[0, :, 1, 2].tolist() == [7, 8, 9] and int(images.sum()) == 24
    assert targets.dtype == torch.int64 and targets[:2].tolist() == [6, 0]


def test_cifar_c_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fog\.npy is missing"):
        load_cifar_c(tmp_path, "fog", 1)
    with pytest.raises(ValueError, match="did you mean 'fog'"):
        load_cifar_c(tmp_path, "foog", 1)
    with pytest.raises(ValueError, match="severity 0: CIFAR-10-C has integers from 1 to 5"):
        load_cifar_c(tmp_path, "fog", 0)
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=re.escape("uint8 (10, 32, 32, 3): must be uint8 (50000, 32, 32, 3)")):
        load_cifar_c(tmp_path, "fog", 1)
    (tmp_path / "fog.npy").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"fog\.npy is not a whole \.npy file"):
        load_cifar_c(tmp_path, "fog", 1)
