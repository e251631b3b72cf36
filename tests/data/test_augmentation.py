"""Random crops, flips and affine maps of image batches, compared with torchvision's."""

import math
from collections import Counter

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from lit_lipschitz.data.augmentation import random_affine, random_crop, random_flip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=400, size=8):
    return torch.arange(1, count * size * size + 1).reshape(count, 1, size, size)


def test_every_crop_is_a_window_of_the_padded_image_and_all_windows_come():
    batch = images()
    crops = random_crop(batch, 2, seeded())
    seen = set()
    for image, crop in zip(batch, crops, strict=True):
        windows = {(y, x): vision.crop(vision.pad(image, [2]), y, x, 8, 8) for y in range(5) for x in range(5)}
        (place,) = [key for key, window in windows.items() if torch.equal(window, crop)]
        seen.add(place)
    assert len(seen) == 25


def test_half_of_the_images_are_flipped():
    batch = images()
    flipped = random_flip(batch, seeded())
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(batch, flipped, strict=True)]
    kept = [torch.equal(b, a) for a, b in zip(batch, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 160 < sum(mirrored) < 240


def blob(x, y, height=32, width=32):
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    return torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 6.0)[None, None]


def centre(image):
    """Centre of mass of each image, relative to the middle."""
    height, width = image.shape[-2:]
    mass = image.sum(dim=(1, 2, 3))
    y = (image.sum(dim=(1, 3)) * (torch.arange(height) - (height - 1) / 2)).sum(dim=1) / mass
    x = (image.sum(dim=(1, 2)) * (torch.arange(width) - (width - 1) / 2)).sum(dim=1) / mass
    return x, y


@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
def test_rotation_keeps_the_distance_and_fills_the_range_of_angles(shape):
    height, width = shape
    batch = blob((width - 1) / 2 + 9, (height - 1) / 2, height, width).repeat(500, 1, 1, 1)
    x, y = centre(random_affine(batch, degrees=15, zoom=0, shift=0, generator=seeded()))
    assert torch.hypot(x, y) == pytest.approx(torch.full((500,), 9.0), abs=0.15)
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.min() == pytest.approx(-15, abs=0.6)
    assert angles.max() == pytest.approx(15, abs=0.6)
    assert angles.mean().abs() < 1.5


def test_zoom_and_shift_fill_their_ranges():
    batch = blob(15.5 + 8, 15.5).repeat(500, 1, 1, 1)
    x, _ = centre(random_affine(batch, degrees=0, zoom=0.1, shift=0, generator=seeded()))
    assert (x.min().item(), x.max().item()) == pytest.approx((7.2, 8.8), abs=0.1)
    batch = blob(15.5, 15.5).repeat(500, 1, 1, 1)
    x, y = centre(random_affine(batch, degrees=0, zoom=0, shift=0.1, generator=seeded()))
    for part in (x, y):
        assert (part.min().item(), part.max().item()) == pytest.approx((-3.2, 3.2), abs=0.15)
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.15


def test_an_affine_map_without_range_is_the_identity():
    batch = torch.rand(3, 2, 8, 8)
    torch.testing.assert_close(random_affine(batch, 0, 0, 0), batch)


@pytest.mark.parametrize(
    "augment",
    [
        lambda g: random_crop(images(), 2, g),
        lambda g: random_flip(images(), g),
        lambda g: random_affine(images().float(), 10, 0.1, 0.1, g),
    ],
)
def test_the_generator_decides(augment):
    assert torch.equal(augment(seeded(1)), augment(seeded(1)))
    assert not torch.equal(augment(seeded(1)), augment(seeded(2)))
    assert math.isfinite(augment(seeded(1)).sum().item())


def test_what_comes_in_from_outside_can_be_the_nearest_pixel():
    images = torch.full((50, 1, 8, 8), 3.0)
    for outside, least in (("border", 3.0), ("zeros", 0.0)):
        shifted = random_affine(
            images, degrees=0, zoom=0, shift=0.5, generator=torch.Generator().manual_seed(0), outside=outside
        )
        assert shifted.min().item() == pytest.approx(least, abs=1e-5)


def blobs(count):
    """Two spots of light, whose places tell rotation and shift."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    spots = [torch.exp(-((x - 16) ** 2 + (y - at) ** 2) / 8) * weight for at, weight in ((11, 1.0), (22, 0.5))]
    return torch.stack(spots)[None].repeat(count, 1, 1, 1)


def centers(batch):
    """Centre of mass of each spot, in pixels; shape (count, 2 spots, 2)."""
    mass = batch.sum(dim=(2, 3))
    pixels = torch.arange(batch.shape[-1], dtype=torch.float32)
    return torch.stack([(batch.sum(3) @ pixels) / mass, (batch.sum(2) @ pixels) / mass], dim=2)


def quantities(batch):
    """Angle between the spots in degrees, and the shift of their middle in pixels, down and right."""
    first, second = centers(batch).unbind(1)
    down, right = (second - first).unbind(1)
    middle = (first + second) / 2 - (centers(blobs(1))[0].sum(0) / 2)
    return {"angle": torch.rad2deg(torch.atan2(right, down)), "down": middle[:, 0], "right": middle[:, 1]}


COUNT = 2000
LIMIT = 1.63 * math.sqrt(2 / COUNT)  # two samples of one distribution are further apart in 1 of 100 cases


def distance(ours, theirs):
    """The statistic of Kolmogorov and Smirnov: the largest distance between two empirical distributions."""
    both = torch.cat([ours, theirs]).sort().values
    first, second = (
        torch.searchsorted(sample.sort().values, both, right=True) / len(sample) for sample in (ours, theirs)
    )
    return (first - second).abs().max().item()


@pytest.mark.parametrize(
    ("ours", "theirs", "looked_at"),
    [
        (
            {"degrees": 15, "zoom": 0, "shift": 0},
            {"degrees": 15},
            ["angle"],
        ),
        (
            {"degrees": 0, "zoom": 0, "shift": 0.1},
            {"degrees": 0, "translate": (0.1, 0.1)},
            ["down", "right"],
        ),
    ],
)
def test_affine_maps_are_distributed_as_torchvisions(ours, theirs, looked_at):
    torch.manual_seed(0)
    per_image = v2.RandomAffine(**theirs, interpolation=v2.InterpolationMode.BILINEAR)
    mine = quantities(random_affine(blobs(COUNT), generator=seeded(), **ours))
    reference = quantities(torch.stack([per_image(image) for image in blobs(COUNT)]))
    for name in looked_at:
        assert reference[name].std() > 1
        # torchvision shifts by whole pixels.
        spread = torch.rand(COUNT, generator=seeded(1)) - 0.5 if "translate" in theirs else 0
        assert distance(mine[name], reference[name] + spread) < LIMIT + (0.05 if "translate" in theirs else 0)


def test_crops_and_flips_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    per_image = v2.Compose([v2.RandomCrop(8, padding=2), v2.RandomHorizontalFlip()])
    image = torch.arange(1, 65).reshape(1, 1, 8, 8)
    batch = image.repeat(COUNT, 1, 1, 1)
    kinds = [
        Counter(tuple(crop.flatten().tolist()) for crop in crops)
        for crops in (random_flip(random_crop(batch, 2, seeded()), seeded(1)), map(per_image, batch))
    ]
    assert kinds[0].keys() == kinds[1].keys()
    assert len(kinds[0]) == 50  # 25 places, mirrored or not
    # Sum of squares over 49 degrees of freedom; above 74.9 in 1 of 100 cases.
    assert sum((kinds[0][kind] - kinds[1][kind]) ** 2 / (kinds[0][kind] + kinds[1][kind]) for kind in kinds[0]) < 74.9
