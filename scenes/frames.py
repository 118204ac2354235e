"""What the frames of a scan see of its points: cameras that cannot be its own, and the best views of a part of it.

Axes: N points, C cells, V views.
"""

from itertools import product

import numpy as np
import torch

from fusion import link_views
from scenes.folder import CAMERAS, load_frames, load_scene, looks_like
from scenes.points import voxel_means, voxelise


def doubt_cameras(folder, scene, image_size):
    """Of frames that see under a quarter of a scan's points, at most one str: the flags of predict.py with which they
    see over twice as many, or that none is known where they see under 5 %."""
    coord, ids, shares = scene["coord"], scene["frame_ids"], {}
    coord, ids = coord[:: len(coord) // 4000 + 1], ids[:: -(-len(ids) // 8) or 1]
    for cameras, scale in product(CAMERAS, (None, 1, 0.01, 1e-3, 2e-4, 2.5e-4, 1e-4, 1 / 256)):  # TUM, Matterport
        frames = load_frames(folder, ids, image_size, False, scene["file_to_world"], cameras, scale)
        arrays = coord, *(frames[key] for key in ("world_to_camera", "intrinsics", "depth"))
        flags = f" --cameras {cameras}" * (cameras != CAMERAS[0]) + f" --depth-scale {scale}" * (scale is not None)
        shares[flags] = len(link_views(*map(torch.from_numpy, arrays)).point.unique()) / len(coord)
        if not ids or shares[""] >= 0.25:
            return []
    now, best = shares[""], max(shares, key=shares.get)
    if shares[best] > max(0.15, 2 * now):
        return [f"frames see {now:.0%} of the points; with{best} {shares[best]:.0%}"]
    return [f"frames see {now:.0%} of the points: do poses, intrinsics and depth belong to them?"] * (now < 0.05)


def warn(folders, classes, image_size, images):
    """Print what looks wrong in the first of these scene folders in which something does; images: whether frames will
    be used."""
    for folder in folders:
        scene = load_scene(folder, classes)
        doubts = doubt_cameras(folder, scene, image_size) if images else []
        if notes := looks_like(folder, scene["coord"]) + scene["notes"] + doubts:
            return print(f"warning: {folder}: {'; '.join(notes)}; docs/data.md says how to mend folders")


def sights(path, scene, voxel_size, placed):
    """Which cells, of 4 voxels, of a large scan its frames see, by small depth maps: (V, C) bool; the cell of each
    point (N,). placed: dict of arguments of load_frames."""
    grid, cell = voxelise(scene["coord"], 4 * voxel_size)
    cells = torch.from_numpy(voxel_means(scene["coord"], cell, len(grid)))
    frames = load_frames(path, scene["frame_ids"], (80, 60), colors=False, **placed)
    cameras, intrinsics, depth = (torch.from_numpy(frames[k]) for k in ("world_to_camera", "intrinsics", "depth"))
    links = link_views(cells, cameras, intrinsics, depth, tolerance=4 * voxel_size)
    seen = np.zeros((len(depth), len(cells)), bool)
    seen[links.view, links.point] = True
    return seen, cell


def best_views(seen, count):
    """Rows, ascending, of at most count views of seen (V, C) bool, each the one that sees most of what those before it
    have seen least often."""
    often, usable = np.zeros(seen.shape[1], int), seen.any(1)
    while usable.any() and count > 0:
        best = int(np.where(usable, (seen / (1.0 + often) ** 2).sum(1), -1).argmax())
        usable[best], count, often = False, count - 1, often + seen[best]
    return np.flatnonzero(seen.any(1) & ~usable).tolist()
