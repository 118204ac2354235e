"""The scene folder: reading it."""

import warnings
from pathlib import Path
from tokenize import TokenError

import numpy as np
from PIL import Image

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
MAX_PIXELS = 2**24  # of an image: a damaged header must not ask for gigabytes
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
        scene["normal"] = None
    for key, file in (("segment", "segment20.npy"), ("instance", "instance.npy")):
        if (folder / file).is_file():
            scene[key] = _read_array(folder / file, (n,)).astype(np.int64)
    if scene["segment"] is not None:
        low, high = scene["segment"].min(), scene["segment"].max()
        if low < IGNORE or high >= num_classes:
            raise ValueError(f"{folder / 'segment20.npy'}: expected labels {IGNORE}..{num_classes - 1}, "
                             f"found {low}..{high}")
    stored, scene["superpoint"] = folder / "superpoint.npy", None
    if stored.is_file():
        scene["superpoint"] = np.unique(_read_array(stored, (n,)), return_inverse=True)[1].ravel().astype(np.int64)
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
