"""Random crops, flips and affine maps of a whole batch at once, on the batch's device."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Pads images of shape (batch, channels, height, width) with 0 and crops each to its size at a random offset.

    The shift is uniform in [-padding, padding] pixels. The generator is on the images' device.

    Example:
        >>> random_crop(torch.ones(2, 3, 8, 8), padding=2).shape
        torch.Size([2, 3, 8, 8])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Flips each image horizontally with probability 1/2; see :func:`random_crop`."""
    flips = torch.rand(images.shape[0], 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flips, images.flip(-1), images)


def random_affine(
    images: Tensor,
    degrees: float,
    zoom: float,
    shift: float,
    generator: torch.Generator | None = None,
    outside: Literal["zeros", "border"] = "zeros",
) -> Tensor:
    """Rotates, zooms and shifts each floating-point image at random, with bilinear interpolation.

    The angle is uniform in [-degrees, degrees], the factor of each axis in [1 - zoom, 1 + zoom], and the shift along
    each axis in [-shift, shift], as a fraction of the width or height. Pixels from outside the image are 0 or, for
    ``"border"``, the nearest pixel.
    """
    count, _, height, width = images.shape
    draw = torch.rand(5, count, generator=generator, device=images.device) * 2 - 1
    angle = draw[0] * math.radians(degrees)
    zoom_x, zoom_y = 1 / (1 + draw[1] * zoom), 1 / (1 + draw[2] * zoom)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # affine_grid maps output to input coordinates, in units of half the width and half the height.
    top = torch.stack([cosine * zoom_x, -sine * zoom_y * height / width, 2 * shift * draw[3]], dim=1)
    bottom = torch.stack([sine * zoom_x * width / height, cosine * zoom_y, 2 * shift * draw[4]], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=outside, align_corners=False)
