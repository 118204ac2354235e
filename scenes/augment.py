"""Augmentation of a scan in training, as Mask3D and Pointcept have it. Needs NumPy and SciPy alone. Each function takes
what it changes and a numpy Generator and returns new arrays; coord is (N, 3) f32 metres."""

import numpy as np
from scipy.ndimage import map_coordinates, uniform_filter1d

MAX_WARP_CELLS = 20_000_000  # of the elastic warp's noise grid, 12 bytes each: 160 000 cubic metres


def flip(coord, normal, rng):
    """Mirror x and y, each with probability 0.5."""
    sign = np.array([*rng.choice([-1, 1], 2), 1], np.float32)
    return coord * sign, normal * sign


def rotate(coord, normal, rng):
    """Turn about x and y by up to pi / 64, about z by any angle. scipy's Rotation would round to other last bits."""
    turn = np.eye(3)
    for limit, i, j in ((np.pi / 64, 1, 2), (np.pi / 64, 0, 2), (np.pi, 0, 1)):  # in the plane of axes i and j
        angle, single = rng.uniform(-limit, limit), np.eye(3)
        c, s = np.cos(angle), np.sin(angle)
        single[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
        turn = single @ turn
    turn = turn.T.astype(np.float32)
    return coord @ turn, normal @ turn


def scale(coord, rng):
    """Scale by 0.9 to 1.1."""
    return coord * np.float32(rng.uniform(0.9, 1.1))


def elastic(coord, rng, spacing, magnitude):
    """Shift points by smooth noise: Gaussian on a grid of this spacing (m), box-blurred, times magnitude (m)."""
    low = coord.min(0)
    shape = np.ceil((coord.max(0) - low) / spacing).astype(int) + 3
    noise = rng.standard_normal((3, *shape), np.float32)
    for axis in (1, 2, 3, 1, 2, 3):
        noise = uniform_filter1d(noise, 3, axis=axis, mode="constant")
    position = ((coord - low) / spacing + 1).T
    shift = [map_coordinates(n, position, order=1, mode="nearest") for n in noise]
    return coord + np.float32(magnitude) * np.stack(shift, 1)


def jitter(coord, rng):
    """5 mm of noise on every point."""
    return coord + np.float32(0.005) * rng.standard_normal(coord.shape, np.float32)


def recolor(color, rng):
    """Colours (N, 3) f32 0..255: auto-contrast with probability 0.2, one shift of all by up to 5 %, noise of 5 %."""
    if rng.random() < 0.2:
        low, high, blend = color.min(0), color.max(0), np.float32(rng.random())
        color = (1 - blend) * color + blend * (color - low) * (255 / np.maximum(high - low, 1))
    color = color + rng.uniform(-1, 1, 3).astype(np.float32) * np.float32(0.05 * 255)
    return (color + np.float32(0.05 * 255) * rng.standard_normal(color.shape, np.float32)).clip(0, 255)


def augment_points(coord, normal, rng):
    """All geometric augmentations: (N, 3), (N, 3) -> the same. The caller keeps the old coord for projection."""
    extent = np.ptp(np.quantile(coord[:: len(coord) // 1000 + 1], (0.01, 0.99), axis=0), axis=0)
    if np.prod(extent / 0.2 + 3) > MAX_WARP_CELLS:
        raise ValueError(f"the points span {' x '.join(f'{edge:.0f}' for edge in extent)} m, too much to warp in 0.2 m "
                         "cells; check the units (metres) and outliers, or cut the scene into parts")
    coord, normal = rotate(*flip(coord, normal, rng), rng)
    coord = scale(coord, rng)
    if rng.random() < 0.5 and np.prod(np.ptp(coord, axis=0) / 0.2 + 3, dtype=float) <= MAX_WARP_CELLS:  # none far off
        coord = elastic(elastic(coord, rng, 0.2, 0.4), rng, 0.8, 1.6)
    return jitter(coord, rng), normal


def augment_images(image, rng):
    """(V, 3, H, W) u8 -> the same: brightness and contrast of each view by up to 20 %. Pixels stay where they are."""
    gain, offset = (rng.uniform(*span, (len(image), 1, 1, 1)).astype(np.float32) for span in ((0.8, 1.2), (-25, 25)))
    return ((image - np.float32(127)) * gain + (127 + offset)).clip(0, 255).astype(np.uint8)


def blank(item, share, rng):
    """In training, a scene without what one branch reads: with probability share its images are one grey, with the same
    its points are one grey without normals. So the gate meets an empty branch, and each branch learns to do without the
    other. `whole` says that neither happened."""
    draw, grey = rng.random(2)
    images, points = draw < share, draw > 1 - share
    if images:
        item = item | {"image": np.full_like(item["image"], 255 * grey)}
    if points:
        item = item | {"color": np.full_like(item["color"], 2 * grey - 1), "normal": np.zeros_like(item["normal"])}
    return item | {"whole": np.array([not (images or points)])}
