"""The scene folder: reading it, voxels, augmentation, superpoints from points, batches.

    <root>/{train,val,test}/<scene>/
      coord.npy (N,3) m   color.npy (N,3) 0..255   normal.npy (N,3), optional
      segment20.npy (N,) -1 = ignore   instance.npy (N,) -1 = none   superpoint.npy (N,), all three optional
      color/{i}.jpg  depth/{i}.png (u16 mm, 0 = none)  pose/{i}.txt (camera_to_world)
      intrinsic/intrinsic_color.txt

This is the layout of a ScanNet prepared by Pointcept, plus frames as ScanNet exports them; a folder without frames is a
valid 3D-only scene, one without labels can be predicted but not trained on.

The camera and the augmentation: voxels are made from augmented coordinates, and every voxel keeps `world_coord`, the
mean of its points' unaugmented coordinates. Only world_coord is ever projected. Images change in colour alone.

Axes: N points, M voxels, V views, S superpoints, G instances, L pieces (the points that a voxel and a superpoint
share), K classes, H, W image size.
"""

import signal
import warnings
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import map_coordinates, uniform_filter1d
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

IGNORE = -1
CLASS_NAMES = ("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
               "counter", "desk", "curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub",
               "otherfurniture")
NUM_CLASSES = len(CLASS_NAMES)
STUFF = (0, 1)  # wall and floor have no instances
THINGS = tuple(k for k in range(NUM_CLASSES) if k not in STUFF)
NYU40_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
CLASS_COLORS = np.array([  # the colours in which ScanNet's benchmark shows its classes
    (174, 199, 232), (152, 223, 138), (31, 119, 180), (255, 187, 120), (188, 189, 34), (140, 86, 75), (255, 152, 150),
    (214, 39, 40), (197, 176, 213), (148, 103, 189), (196, 156, 148), (23, 190, 207), (247, 182, 210), (219, 219, 141),
    (255, 127, 14), (158, 218, 229), (44, 160, 44), (112, 128, 144), (227, 119, 194), (82, 84, 163)], np.uint8)
MAX_WARP_CELLS = 20_000_000  # of the elastic warp's noise grid, 12 bytes each: 160 000 cubic metres
MAX_PIXELS = 2**24  # of an image: a damaged header must not ask for gigabytes
CACHE_BYTES = 2**30  # decoded scenes and frames that a loading process keeps
WARNED = set()  # folders without a usable frame of which this process has warned: Python itself forgets within a run


# ------------------------------------------------------------------------------------------------------------- reading


def load_scene(folder, num_classes=NUM_CLASSES):
    """Read one scene folder, frames apart.

    Returns:
        dict: name str, coord (N, 3) f32 metres, color (N, 3) u8, normal (N, 3) f32 unit (estimated where absent),
        segment (N,) int64 or None, instance (N,) int64 or None, superpoint (N,) int64 0..S-1 (computed where absent),
        frame_ids list of int in numeric order (frames with image, depth and a usable pose), frames_skipped int (pose
        not finite or not rigid).

    Raises:
        FileNotFoundError: no such folder, or no coord.npy in it.
        ValueError: a file that is truncated or of another shape, lengths that differ, labels out of range, coordinates
            or colours that are not finite; the message names the file, what was expected and what was found.
    """
    folder = Path(folder)
    if not (folder / "coord.npy").is_file():
        raise FileNotFoundError(f"{folder} is no scene folder: it has no coord.npy (N, 3)")
    coord = _read_array(folder / "coord.npy", (None, 3)).astype(np.float32)
    n = len(coord)
    if n == 0:
        raise ValueError(f"{folder / 'coord.npy'}: expected at least one point, found none")
    scene = {"name": folder.name, "coord": coord, "segment": None, "instance": None}
    color = _read_array(folder / "color.npy", (n, 3))
    for what, values in (("coordinates", coord), ("colours", color)):
        broken = int((~np.isfinite(values)).any(1).sum())
        if broken:
            raise ValueError(f"scene {folder.name}: {broken} of {n} points have {what} that are not finite; "
                             "remove these points from all files of the scene")
    if color.min() < 0 or color.max() > 255 or (color.dtype.kind == "f" and 0 < color.max() <= 1):
        raise ValueError(f"{folder / 'color.npy'}: expected colours in 0..255, found {color.min()}..{color.max()}")
    scene["color"] = color.astype(np.uint8)
    if (folder / "normal.npy").is_file():
        normal = np.nan_to_num(_read_array(folder / "normal.npy", (n, 3)).astype(np.float32))
        scene["normal"] = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    else:
        scene["normal"] = estimate_normals(coord)
    for key, file in (("segment", "segment20.npy"), ("instance", "instance.npy")):
        if (folder / file).is_file():
            scene[key] = _read_array(folder / file, (n,)).astype(np.int64)
    if scene["segment"] is not None:
        low, high = scene["segment"].min(), scene["segment"].max()
        if low < IGNORE or high >= num_classes:
            raise ValueError(f"{folder / 'segment20.npy'}: expected labels {IGNORE}..{num_classes - 1}, "
                             f"found {low}..{high}")
    stored = folder / "superpoint.npy"
    superpoint = _read_array(stored, (n,)) if stored.is_file() else superpoints_from_points(coord, scene["normal"])
    scene["superpoint"] = np.unique(superpoint, return_inverse=True)[1].ravel().astype(np.int64)
    scene["frame_ids"], scene["frames_skipped"] = usable_frames(folder)
    return scene


def load_frames(folder, frame_ids, image_size, colors=True):
    """Read frames, resized to one size, with intrinsics to match.

    Colour and depth images may differ in size (ScanNet: 1296x968 and 640x480): they are registered, so both are
    resized to image_size. A pixel's centre is an integer, so u' = (u + 0.5) s - 0.5 moves the principal point.

    Args:
        folder: scene folder.  frame_ids: list of int.  image_size: (W, H).
        colors: False leaves the image out, (V, 3, 0, 0): cache.py has what the tower makes of it.

    Returns:
        dict: image (V, 3, H, W) u8, depth (V, H, W) f32 metres (0 = no reading), world_to_camera (V, 4, 4) f32,
        intrinsics (V, 3, 3) f32 for image_size.

    Raises:
        ValueError: an image or a matrix that cannot be read; the message names the file.
    """
    folder, (width, height) = Path(folder), image_size
    frames = {"image": np.zeros((len(frame_ids), 3, height * colors, width * colors), np.uint8),
              "depth": np.zeros((len(frame_ids), height, width), np.float32),
              "world_to_camera": np.zeros((len(frame_ids), 4, 4), np.float32),
              "intrinsics": np.zeros((len(frame_ids), 3, 3), np.float32)}
    if not frame_ids:
        return frames
    camera = _read_matrix(folder / "intrinsic" / "intrinsic_color.txt", (3, 4))[:3, :3]
    if not np.isfinite(camera).all():
        raise ValueError(f"{folder / 'intrinsic' / 'intrinsic_color.txt'}: expected finite numbers, found {camera}")
    for i, frame in enumerate(frame_ids):
        color_file, depth_file = frame_files(folder, frame)
        image, size = _read_image(color_file, image_size, "RGB", Image.Resampling.BILINEAR, decode=colors)
        depth, _ = _read_image(depth_file, image_size, None, Image.Resampling.NEAREST)
        if colors:
            frames["image"][i] = image.transpose(2, 0, 1)
        frames["depth"][i] = depth.astype(np.float32) / 1000  # mm -> m
        pose = _read_matrix(folder / "pose" / f"{frame}.txt", (4,))
        frames["world_to_camera"][i, :3, :3] = pose[:3, :3].T  # the inverse of a rigid motion
        frames["world_to_camera"][i, :3, 3] = -pose[:3, :3].T @ pose[:3, 3]
        frames["world_to_camera"][i, 3, 3] = 1
        scale = np.array([width / size[0], height / size[1]])
        frames["intrinsics"][i] = camera
        frames["intrinsics"][i, :2] *= scale[:, None]
        frames["intrinsics"][i, :2, 2] += 0.5 * scale - 0.5
    return frames


def _read_array(path, shape):
    """A .npy of this shape (None = any length; a trailing axis of 1 is dropped), never a pickle."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: checks the size of the file first
        array = np.array(array) if isinstance(array, np.ndarray) else array
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; a scene folder needs it") from None
    except (ValueError, EOFError, OSError, OverflowError, TypeError, MemoryError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path}: expected an array of numbers, found a file that cannot be read: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected one array, found an archive of several")
    if array.ndim == len(shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        want = "(" + ", ".join("N" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{path}: expected shape {want}, found {array.shape}")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: expected numbers, found {array.dtype}")
    return array


def _read_matrix(path, rows):
    """A text file of a 4x4 (or 3x3) matrix; rows lists the numbers of rows allowed."""
    try:
        matrix = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a matrix as text, found a file that cannot be read: {error}") from None
    if matrix.shape not in [(r, r) for r in rows]:
        raise ValueError(f"{path}: expected {' or '.join(f'{r}x{r}' for r in rows)} numbers, found {matrix.shape}")
    return matrix


def _read_image(path, image_size, mode, resampling, decode=True):
    """An image as an array of image_size (None without decode), and the (W, H) of the file."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:  # an EPS of any name would start Ghostscript
            size = image.size
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}")
            if not decode:
                return None, size
            if mode:
                image.draft(mode, image_size)  # a JPEG of several times the size is decoded smaller
                image = image.convert(mode)
            elif image.mode not in ("I;16", "I"):
                raise ValueError(f"expected one channel of 16 bit, found mode {image.mode}")
            return np.asarray(image if image.size == tuple(image_size) else image.resize(image_size, resampling)), size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image, found a file that cannot be read: {error}") from None


def frame_files(folder, frame):
    """The colour and the depth file of a frame."""
    path = Path(folder, "color", f"{frame}.jpg")
    return path if path.exists() else path.with_suffix(".png"), Path(folder, "depth", f"{frame}.png")


def usable_frames(folder):
    """Ids of the frames that have all three files and a usable pose, in numeric order; number of those without."""
    ids = sorted(int(path.stem) for path in (folder / "pose").glob("*.txt") if path.stem.isdigit())
    ids = [i for i in ids if all(path.exists() for path in frame_files(folder, i))]
    usable = [i for i in ids if _is_rigid(_read_matrix(folder / "pose" / f"{i}.txt", (4,)))]
    images = sum(1 for _ in (folder / "color").glob("*.*"))
    if images and not usable and folder.resolve() not in WARNED:
        WARNED.add(folder.resolve())
        warnings.warn(f"scene {folder.name}: none of its {images} images has depth/{{i}}.png and a finite, rigid "
                      "pose/{i}.txt of its number, without leading zeros; used 3D-only", stacklevel=3)
    return usable, len(ids) - len(usable)


def _is_rigid(pose):
    """True where a 4x4 is finite and a rotation with a translation; ScanNet writes -inf where tracking was lost."""
    turn = pose[:3, :3]
    rigid = np.isfinite(pose).all() and np.allclose(turn @ turn.T, np.eye(3), atol=0.01) and np.linalg.det(turn) > 0
    return bool(rigid)


# -------------------------------------------------------------------------------------------------------------- voxels


def voxelise(coord, voxel_size):
    """Points -> voxels of a regular grid that starts at the points' lowest corner.

    The cell's number and the point's number are packed into one 64-bit integer, so a single plain sort (which NumPy
    runs in vector instructions, unlike an argsort) groups the points.

    Args:
        coord: (N, 3) float, metres, finite.  voxel_size: metres.

    Returns:
        grid_coord:     (M, 3) int64 >= 0, in ascending order (x first): the order of the points does not matter.
        point_to_voxel: (N,) int64, row of grid_coord of each point.

    Raises:
        ValueError: an extent of so many voxels that cell and point do not fit 63 bits.
    """
    n = len(coord)
    axes = []
    for axis in range(3):
        values = np.ascontiguousarray(coord[:, axis])
        axes.append((values - values.min()) / values.dtype.type(voxel_size))
    extent = [float(a.max()) for a in axes]  # still float: a cast to int64 would wrap without a word
    shape = [int(e) + 1 if e < 2**62 else 2**62 for e in extent]
    bits = max(1, (n - 1).bit_length())
    if (shape[0] * shape[1] * shape[2]).bit_length() + bits > 63:
        raise ValueError(f"{n} points span {shape[0]} x {shape[1]} x {shape[2]} voxels of {voxel_size} m, which "
                         "overflows; take a larger voxel size, or check the units (metres) and outliers")
    axes = [a.astype(np.int64) for a in axes]
    key = (axes[0] * shape[1] + axes[1]) * shape[2] + axes[2]
    key <<= bits
    key |= np.arange(n)
    key.sort()
    order = key & ((1 << bits) - 1)
    key >>= bits
    first = np.empty(n, bool)
    first[0] = True
    np.not_equal(key[1:], key[:-1], out=first[1:])
    point_to_voxel = np.empty(n, np.int64)
    point_to_voxel[order] = np.cumsum(first) - 1
    cell, z = np.divmod(key[first], shape[2])
    x, y = np.divmod(cell, shape[1])
    return np.stack([x, y, z], 1), point_to_voxel


def voxel_means(values, point_to_voxel, num_voxels):
    """(N, C) -> (M, C) f32: the mean over each voxel's points."""
    count = np.bincount(point_to_voxel, minlength=num_voxels)
    sums = [np.bincount(point_to_voxel, values[:, c], num_voxels) for c in range(values.shape[1])]
    return (np.stack(sums, 1) / count[:, None]).astype(np.float32)


def voxel_majority(labels, point_to_voxel, num_voxels, num_classes):
    """(N,) -> (M,) int64: the most frequent label among a voxel's labelled points (the lowest on a tie).

    IGNORE only where no point of the voxel is labelled.
    """
    labelled = labels != IGNORE
    key = point_to_voxel[labelled] * num_classes + labels[labelled]
    votes = np.bincount(key, minlength=num_voxels * num_classes).reshape(num_voxels, num_classes)
    return np.where(votes.any(1), votes.argmax(1), IGNORE)


def estimate_normals(coord, neighbours=12, chunk=50_000):
    """(N, 3) -> (N, 3) f32 unit: the direction of least spread of each point's neighbours; turned to where
    a room is seen from: up on level surfaces (down in the top tenth of the height, a ceiling), else to the middle. Zero
    where it is not defined."""
    tree, middle = cKDTree(coord), coord.mean(0)
    ceiling = coord[:, 2].min() + 0.9 * np.ptp(coord[:, 2])
    k = min(neighbours, len(coord))
    normal = np.zeros_like(coord, dtype=np.float32)
    for start in range(0, len(coord) if k >= 3 else 0, chunk):
        part = coord[start : start + chunk]
        near = coord[tree.query(part, k)[1]].astype(np.float64)  # (n, k, 3)
        near -= near.mean(1, keepdims=True)
        axes = np.linalg.eigh(near.transpose(0, 2, 1) @ near)[1]  # ascending spread
        out = axes[:, :, 0]
        inward = np.einsum("nc,nc->n", out[:, :2], (middle - part)[:, :2])
        upward = np.where(part[:, 2] > ceiling, -out[:, 2], out[:, 2])
        away = np.where(np.abs(out[:, 2]) > 0.5, upward, inward) < 0
        normal[start : start + chunk] = np.where(away[:, None], -out, out)
    return normal


def superpoints_from_points(coord, normal, angle=10.0, offset=0.02, neighbours=8, cell=1.0, smallest=20):
    """Over-segment a scan from its points alone: no mesh, no compiled extension.

    Components of the neighbour graph whose edges join points on one smooth surface (normals within an angle, and
    neither point off the other's tangent plane), cut at a coarse grid so that a wall is not one piece, tiny ones given
    to the nearest larger one.

    Args:
        coord, normal: (N, 3) float, metres and unit.
        angle:  degrees between normals.  offset: metres off the tangent plane.  neighbours: edges a point.
        cell:   metres, edge of the coarse grid.  smallest: points below which a piece is merged.

    Returns:
        (N,) int64, ids 0..S-1.
    """
    n, k = len(coord), min(neighbours + 1, len(coord))
    distance, near = (a.reshape(n, k) for a in cKDTree(coord).query(coord, k))
    reach = 3 * np.median(distance[:, 1:]) if k > 1 else 0.0
    a, b = np.repeat(np.arange(n), k), near.ravel()
    step = coord[b] - coord[a]
    off = np.maximum(np.abs((step * normal[a]).sum(1)), np.abs((step * normal[b]).sum(1)))
    smooth = np.abs((normal[a] * normal[b]).sum(1)) > np.cos(np.radians(angle))
    keep = smooth & (off < offset) & (distance.ravel() <= reach)
    graph = coo_matrix((np.ones(keep.sum(), bool), (a[keep], b[keep])), shape=(n, n))
    piece = connected_components(graph, directed=False)[1]
    corner = ((coord - coord.min(0)) // cell).astype(np.int64)
    piece = np.unique(np.column_stack([piece, corner]), axis=0, return_inverse=True)[1].ravel()
    large = np.bincount(piece)[piece] >= smallest
    if large.any() and not large.all():
        piece[~large] = piece[large][cKDTree(coord[large]).query(coord[~large])[1]]
    return np.unique(piece, return_inverse=True)[1].ravel().astype(np.int64)


# -------------------------------------------------------------------------------------------------------- augmentation
# Each takes what it changes and a numpy Generator and returns new arrays; coord is (N, 3) f32 metres.


def flip(coord, normal, rng):
    """Mirror x and y, each with probability 0.5."""
    sign = np.array([*rng.choice([-1, 1], 2), 1], np.float32)
    return coord * sign, normal * sign


def rotate(coord, normal, rng):
    """Turn about z by any angle, about x and y by up to pi / 64."""
    turn = np.eye(3)
    for axis, limit in ((0, np.pi / 64), (1, np.pi / 64), (2, np.pi)):
        angle = rng.uniform(-limit, limit)
        c, s, (i, j) = np.cos(angle), np.sin(angle), [a for a in range(3) if a != axis]
        single = np.eye(3)
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
        low, high = color.min(0), color.max(0)
        blend = np.float32(rng.random())
        color = (1 - blend) * color + blend * (color - low) * (255 / np.maximum(high - low, 1))
    color = color + rng.uniform(-1, 1, 3).astype(np.float32) * np.float32(0.05 * 255)
    color = color + np.float32(0.05 * 255) * rng.standard_normal(color.shape, np.float32)
    return color.clip(0, 255)


def augment_points(coord, normal, rng):
    """All geometric augmentations: (N, 3), (N, 3) -> the same. The caller keeps the old coord for projection."""
    extent = np.ptp(coord, axis=0).astype(np.float64)
    if np.prod(extent / 0.2 + 3) > MAX_WARP_CELLS:
        size = " x ".join(f"{e:.0f}" for e in extent)
        raise ValueError(f"the points span {size} m, too much to warp in 0.2 m cells; check the units (metres) and "
                         "outliers, or cut the scene into parts")
    coord, normal = rotate(*flip(coord, normal, rng), rng)
    coord = scale(coord, rng)
    if rng.random() < 0.5:
        coord = elastic(elastic(coord, rng, 0.2, 0.4), rng, 0.8, 1.6)
    return jitter(coord, rng), normal


def augment_images(image, rng):
    """(V, 3, H, W) u8 -> the same: brightness and contrast of each view by up to 20 %. Pixels stay where they are."""
    gain = rng.uniform(0.8, 1.2, (len(image), 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-25, 25, (len(image), 1, 1, 1)).astype(np.float32)
    return ((image - np.float32(127)) * gain + (127 + offset)).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- batches


def evenly_spread(values, count):
    """At most count of a list, from the first to the last in equal steps."""
    rows = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[row] for row in rows]


def scene_item(scene, frames, voxel_size, num_classes=NUM_CLASSES, rng=None, vary_images=True):
    """One scene as the networks take it.

    Args:
        scene: dict of `load_scene`.  frames: dict of `load_frames`.  voxel_size: metres.
        rng:   numpy Generator for the augmentation; None = none.  vary_images: False leaves the images as they are.

    Returns:
        dict of arrays, the keys of `collate` for one scene.
    """
    coord, color, normal = scene["coord"], scene["color"].astype(np.float32), scene["normal"]
    image = frames["image"]
    if rng is not None:
        coord, normal = augment_points(coord, normal, rng)
        color = recolor(color, rng)
        image = augment_images(image, rng) if vary_images else image
    grid_coord, point_to_voxel = voxelise(coord, voxel_size)
    m = len(grid_coord)
    means = voxel_means(np.concatenate([coord, scene["coord"], color, normal], 1), point_to_voxel, m)  # (M, 12)
    voxel_coord, world_coord, color, normal = np.split(means, 4, 1)
    middle = voxel_coord.mean(0)
    voxel_coord = voxel_coord - np.array([middle[0], middle[1], voxel_coord[:, 2].min()], np.float32)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    segment = scene["segment"]
    if segment is None:
        segment = np.full(len(coord), IGNORE, np.int64)
    superpoint = scene["superpoint"]
    point_instance, superpoint_instance, instance_label = instance_targets(segment, scene["instance"], superpoint,
                                                                           num_classes)
    piece, piece_points = np.unique(superpoint * m + point_to_voxel, return_counts=True)
    return {
        "name": scene["name"], "grid_coord": grid_coord.astype(np.int32), "coord": voxel_coord,
        "world_coord": world_coord, "color": color / np.float32(127.5) - 1, "normal": normal / np.maximum(length, 1e-6),
        "segment": voxel_majority(segment, point_to_voxel, m, num_classes), "point_segment": segment,
        "point_to_voxel": point_to_voxel, **frames, "image": image,
        "point_superpoint": superpoint, "point_instance": point_instance,
        "piece_voxel": piece % m, "piece_superpoint": piece // m, "piece_points": piece_points.astype(np.float32),
        "superpoint_instance": superpoint_instance, "instance_label": instance_label,
        "has_instances": np.array([scene["instance"] is not None]),
    }


def instance_targets(segment, instance, superpoint, num_classes=NUM_CLASSES):
    """What the query decoder is trained and judged by.

    An instance has the class of most of its labelled points; instances of STUFF and of no class are left out. A
    superpoint belongs to the instance that holds over half of its points.

    Args:
        segment: (N,) class or IGNORE.  instance: (N,) any id, below 0 = none; or None.  superpoint: (N,) 0..S-1.

    Returns:
        point_instance:      (N,) int64, class * 1000 + number from 1 on as the benchmark has it, 0 = none.
        superpoint_instance: (S,) int64, 0..G-1, IGNORE = none.
        instance_label:      (G,) int64 class of each instance; those that hold no superpoint are not among them.
    """
    s = superpoint.max() + 1
    nothing = np.zeros(len(segment), np.int64), np.full(s, IGNORE, np.int64), np.zeros(0, np.int64)
    if instance is None or (instance < 0).all():
        return nothing
    ids, own = np.unique(instance.clip(min=IGNORE), return_inverse=True)
    own = own.ravel() - (ids[0] == IGNORE)  # (N,) number of the instance, IGNORE = none
    label = voxel_majority(segment[own >= 0], own[own >= 0], own.max() + 1, num_classes)
    keep = ~np.isin(label, (IGNORE, *STUFF))
    own, label = np.append(np.where(keep, keep.cumsum() - 1, IGNORE), IGNORE)[own], label[keep]
    if not len(label):
        return nothing
    if len(label) > 999:
        raise ValueError(f"a scene may hold 999 instances (the benchmark's ids have no room for more), found "
                         f"{len(label)}; cut it into parts")
    point_instance = np.where(own >= 0, label[own] * 1000 + own + 1, 0)
    most = voxel_majority(own, superpoint, s, len(label))  # (S,) the instance with the most points, if any
    share = np.bincount(superpoint[own == most[superpoint]], minlength=s) / np.bincount(superpoint, minlength=s)
    owner = np.where(share > 0.5, most, IGNORE)
    held, owner = np.unique(np.append(owner, IGNORE), return_inverse=True)  # the first is IGNORE
    return point_instance, owner.ravel()[:-1] - 1, label[held[1:]]


class SceneDataset(torch.utils.data.Dataset):
    """The scenes of one split. dataset[i] or dataset[(epoch, i)]; what is random depends on (seed, epoch, i) alone.

    Args:
        root, split: folder and "train", "val" or "test".
        voxel_size:  metres.
        augment:     True: augmented, and `views` random frames; False: as it is, and `views` evenly spaced frames.
        views:       frames of a scene (all, where it has fewer); 0 reads no image.
        image_size:  (W, H) of the frames.

    Between epochs `use` may change how many views it reads, and whether as images or as maps of a frozen tower.

    Raises:
        FileNotFoundError: no such folder or no scene in it.
    """

    def __init__(self, root, split, *, voxel_size, augment=False, views=0, image_size=(160, 120),
                 num_classes=NUM_CLASSES, seed=0):
        folder = Path(root, split)
        self.folders = sorted(p.parent for p in folder.glob("*/coord.npy"))
        if not self.folders:
            raise FileNotFoundError(f"no scene in {folder}; generate rooms with: python rooms.py --out {root}, or give "
                                    "--data a folder with train/ and val/ scene folders")
        self.voxel_size, self.augment, self.views, self.image_size = voxel_size, augment, views, tuple(image_size)
        self.num_classes, self.seed = num_classes, seed
        self.cache, self.vary_images = None, augment
        self._cache, self._cached_bytes = {}, 0

    def use(self, views, cache=None, vary_images=True):
        """From here on other views: frames and maps that were kept in memory are forgotten where these change.

        Args:
            views:       frames of a scene.
            cache:       cache.FeatureCache, whose maps then stand in for the images; or None.
            vary_images: with augment alone; False as long as the image tower is frozen, so that an image gives the same
                         maps every time.
        """
        if (views, cache) != (self.views, self.cache):
            self._cache = {key: value for key, value in self._cache.items() if not isinstance(key, tuple)}
            self._cached_bytes = sum(map(_bytes_of, self._cache.values()))
        self.views, self.cache, self.vary_images = views, cache, vary_images

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, i))
        scene = self._once(i, lambda: load_scene(self.folders[i], self.num_classes))
        if self.augment and scene["segment"] is None:
            raise ValueError(f"{self.folders[i]} has no segment20.npy: it can be predicted but not trained on; move it "
                             "out of this split")
        ids = scene["frame_ids"]
        if self.augment:
            chosen = sorted(rng.permutation(ids).astype(int).tolist()[: self.views])
        else:
            chosen = evenly_spread(ids, self.views)
        single = [self._once((i, c), lambda c=c: self._frame(self.folders[i], c)) for c in chosen]
        empty = load_frames(self.folders[i], [], self.image_size, colors=self.cache is None)
        if self.cache is not None:
            empty |= {f"level_{k}": np.zeros((0, *shape), np.float16) for k, shape in enumerate(self.cache.shapes)}
        frames = {k: np.concatenate([empty[k], *(f[k] for f in single)]) for k in empty}
        return scene_item(scene, frames, self.voxel_size, self.num_classes, rng if self.augment else None,
                          self.vary_images)

    def _frame(self, folder, frame):
        """`load_frames` of one frame; with a cache without its image, but with the tower's maps of it."""
        frames = load_frames(folder, [frame], self.image_size, colors=self.cache is None)
        if self.cache is None:
            return frames
        levels = self.cache.read(folder, frame)
        if levels is None:
            raise ValueError(f"{self.cache.path(folder, frame)}: the tower's maps of frame {frame} of {folder} are "
                             "gone or damaged; go on with --resume, which makes them anew")
        return frames | {f"level_{k}": level[None] for k, level in enumerate(levels)}

    def _once(self, key, read):
        """What was read before, as long as the cache has room."""
        if key in self._cache:
            return self._cache[key]
        value = read()
        size = _bytes_of(value)
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[key] = value
            self._cached_bytes += size
        return value


def _bytes_of(arrays):
    return sum(value.nbytes for value in arrays.values() if isinstance(value, np.ndarray))


def collate(items):
    """Scenes -> one batch.

    Returns:
        dict of tensors: names (list of B str);
        grid_coord (M, 3) int32, batch_index (M,) int64, color (M, 3) f32 in [-1, 1], normal (M, 3) f32 augmented,
        coord (M, 3) f32 augmented, metres, xy from the middle of the scene, z above its lowest voxel,
        world_coord (M, 3) f32 NOT augmented, segment (M,) int64;
        image (V, 3, H, W) u8, depth (V, H, W) f32 metres, world_to_camera (V, 4, 4), intrinsics (V, 3, 3),
        view_batch (V,) int64, the scene of each view; with a cache image is (V, 3, 0, 0) and level_0, level_1, ...
        (V, C, h, w) f16 are what the frozen tower made of it;
        point_to_voxel (N,) int64 row of the batch's voxels, point_segment (N,) int64, point_batch (N,) int64,
        point_superpoint (N,) int64 row of the batch's superpoints, point_instance (N,) int64 (`instance_targets`);
        superpoint_batch (S,) int64, superpoint_instance (S,) int64, numbered within a scene;
        instance_label (G,) int64, instance_batch (G,) int64, has_instances (B,) bool, False = not annotated;
        piece_voxel, piece_superpoint (L,) int64 rows of the batch, piece_points (L,) f32 points that both share.
    """
    batch, voxels, superpoints = {"names": [item["name"] for item in items]}, 0, 0
    items = list(items)
    for i, item in enumerate(items):  # rows of a scene -> rows of the batch
        items[i] = item | {key: item[key] + voxels for key in ("point_to_voxel", "piece_voxel")} \
                        | {key: item[key] + superpoints for key in ("point_superpoint", "piece_superpoint")}
        voxels, superpoints = voxels + len(item["grid_coord"]), superpoints + len(item["superpoint_instance"])
    for key in items[0]:
        if key != "name":
            batch[key] = torch.from_numpy(np.concatenate([item[key] for item in items]))
    for key, like in (("batch_index", "grid_coord"), ("view_batch", "image"), ("point_batch", "point_segment"),
                      ("superpoint_batch", "superpoint_instance"), ("instance_batch", "instance_label")):
        counts = torch.tensor([len(item[like]) for item in items])
        batch[key] = torch.repeat_interleave(torch.arange(len(items)), counts)
    return batch


class EpochBatches(torch.utils.data.Sampler):
    """Batches of (epoch, index) pairs, so order and augmentation follow from (seed, epoch) in any worker process.

    share: (rank, world); of every batch process `rank` of `world` gets each world-th scene from its rank-th on. In
    training (shuffle) all get equally many: a batch that does not divide, as the last may, is completed from the start
    of the epoch's order. In evaluation no scene comes twice.
    """

    def __init__(self, length, batch_size, shuffle, seed, share=(0, 1)):
        self.length, self.batch_size, self.shuffle, self.seed, self.share = length, batch_size, shuffle, seed, share
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch, first=0):
        """The epoch to come, and the first of its batches: those before are left out."""
        self.epoch, self.first = epoch, first

    def __len__(self):
        length = self.length if self.shuffle else self.length - self.share[0]
        return -(-length // self.batch_size) - self.first

    def __iter__(self):
        order, (rank, world) = np.arange(self.length), self.share
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for start in range(self.first * self.batch_size, self.length, self.batch_size):
            end = min(start + self.batch_size, self.length)
            if self.shuffle:
                end += (start - end) % world
            batch = order.take(np.arange(start + rank, end, world), mode="wrap")
            if len(batch):
                yield [(self.epoch, int(i)) for i in batch]


def start_worker(_):
    """One thread a worker process, the cores belong to the training; signals are the main process's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(2))  # all are told to end? main is to hear it first


def loader(dataset, batch_size, workers, shuffle, seed, pin=False, share=(0, 1)):
    """DataLoader of collated batches; call loader.batch_sampler.set_epoch(epoch) before each pass.

    pin: batches in page-locked memory, from where a copy to a GPU need not be waited for.
    share: which part of each batch (`EpochBatches`).

    It has a generator of its own: it draws a number for its workers, which would move the random state of the training,
    and differently with and without workers and in a run that was resumed.
    """
    batches = EpochBatches(len(dataset), batch_size, shuffle, seed, share)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                                       persistent_workers=workers > 0, worker_init_fn=start_worker, pin_memory=pin,
                                       generator=torch.Generator())
