"""The scene folder and any other scan, read. Needs NumPy, Pillow and plyfile, and no other file of this project.

    <scene>/
      coord.npy (N, 3) m   color.npy (N, 3) 0..255   normal.npy (N, 3), optional
      segment20.npy (N,) -1 = ignore   instance.npy (N,) -1 = none   superpoint.npy (N,), all three optional
      color/{i}.jpg  depth/{i}.png (u16 mm, 0 = none)  pose/{i}.txt (camera_to_world)
      intrinsic/intrinsic_color.txt

This is Pointcept's layout of ScanNet with frames as ScanNet has them. `read_scan` also takes a .ply (points or mesh,
ascii or binary), a .npy of points (N, 3) or with colours (N, 6), an .npz with names of ARRAYS, and a folder with one of
these and frames. No reader runs code that a file may hold. A damaged file is one ValueError with the file, what was
expected and what was found. Axes: N points, F triangles, V views, S superpoints, H, W image size.
"""

import functools
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from plyfile import PlyData, PlyElementParseError

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
ARRAYS = {"coord": ("coord", "points", "xyz"), "color": ("color", "colors", "rgb"), "normal": ("normal", "normals")}
COLUMNS = {  # what a vertex of a .ply holds -> the names it goes by
    "coord": ("x y z",), "normal": ("nx ny nz", "normal_x normal_y normal_z"), "label": ("label",),
    "color": ("red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue")}
SCENE = ("coord", "color", "normal", "segment", "instance", "superpoint")  # arrays of a scene
TRIANGLES = {"face": {"vertex_indices": 3, "vertex_index": 3}}  # faces of known length are mapped, others read singly
WARN_ONCE = functools.cache(warnings.warn)  # a scene is read many times, and Python forgets what it has warned of
ELEMENT = re.compile(rb"\nelement\s+\S+\s+(\d+)(.*?)(?=\nelement|\Z)", re.DOTALL)  # rows and properties, in a .ply


def fault(path, expected, found):
    """The one form of an error about a file."""
    return ValueError(f"{path}: expected {expected}, found {str(found)[:200]}")


def message(error):
    """What an error says, in one line; of memory what was asked for; where it says nothing, its type."""
    said = " ".join(str(error).split())
    asked = re.search(r"(?i)(tried|unable) to allocate [\d.,]+ ?\w+", said)
    if asked or isinstance(error, MemoryError) or re.search("(?i)(out of|allocate|enough) memory|alloc_failed", said):
        return f"out of memory ({asked[0]})" if asked else "out of memory"
    return said[:500] if " " in said else repr(error)  # torch's go on for a screen


@contextmanager
def reading(path, expected):
    """Turn whatever a library raises on the bytes of a damaged file, MemoryError too, into a fault."""
    try:
        yield
    except Exception as error:
        raise fault(path, expected, f"a file that cannot be read: {message(error)}") from error


def _checked(path, array, shape):
    """An array of numbers of this shape (None = any length; a trailing axis of 1 is dropped)."""
    if array.ndim == len(shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        raise fault(path, f"shape {shape}".replace("None", "N"), array.shape)
    if array.dtype.kind not in "iuf":
        raise fault(path, "numbers", array.dtype)
    return array


def _finite(path, what, values):
    """The values (N, 3), of one point or more, all finite."""
    if len(values) == 0:
        raise fault(path, "at least one point", "none")
    if broken := int((~np.isfinite(values)).any(1).sum()):
        raise fault(path, f"finite {what}", f"{broken} of {len(values)} points without; remove these points")
    return values


def _to_bytes(path, color):
    """Colours (N, 3), as floats in 0..1 or 0..255, integers in 0..255 or of 16 bit -> 0..255 u8."""
    if color.dtype == np.uint8:
        return color
    low, high = _finite(path, "colours", color).min(), color.max()
    if low < 0 or (high > 255 and color.dtype != np.uint16):
        raise fault(path, "colours in 0..255, or floats in 0..1", f"{low}..{high}")
    scale = 255 if color.dtype.kind == "f" and high <= 1 else 1 / 257 if high > 255 else 1
    return np.rint(color * scale).astype(np.uint8)


def _unit(normal):
    """Normals (N, 3) -> f32 of length 1, or 0 where they say nothing."""
    normal = np.nan_to_num(normal.astype(np.float32), posinf=0, neginf=0)
    return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)


def read_ply(path):
    """Read the points and triangles of a .ply. Polygons are cut into triangles.

    Returns a dict: coord (N, 3) of the file's type, f32 or f64 as a rule; color (N, 3) u8, normal (N, 3) f32 unit,
    label (N,) i32, faces (F, 3) integer; each of the last four is None where the file has none.
    Raises ValueError: no .ply, a damaged one, coordinates that are not finite, colours out of range.
    """
    with open(path, "rb") as file:
        head, end, _ = file.read(2**16).partition(b"end_header")
    with reading(path, "a whole .ply"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of np.loadtxt about a list of no numbers
        if not end:
            raise ValueError(f"it starts with {head[:20]} and has no end_header")
        numbers = sum(int(rows) * properties.count(b"\nproperty") for rows, properties in ELEMENT.findall(head))
        if numbers > Path(path).stat().st_size:  # each takes a byte or more; told before it asks for memory
            raise ValueError(f"{numbers} numbers announced in {Path(path).stat().st_size} bytes")
        try:
            ply = PlyData.read(str(path), known_list_len=TRIANGLES)
        except PlyElementParseError:  # polygons
            ply = PlyData.read(str(path))
        vertex = ply["vertex"].data
    raw, names = {}, vertex.dtype.names or ()
    for key, choices in COLUMNS.items():
        for choice in [choice.split() for choice in choices if set(choice.split()) <= set(names)][:1]:
            raw[key] = _checked(path, np.stack([vertex[name] for name in choice], 1), (None, len(choice)))
    if "coord" not in raw:
        raise fault(path, "vertex properties x y z", ", ".join(names) or "none")
    label = raw["label"][:, 0].astype(np.int32) if "label" in raw else None
    polygons = next((e[name] for e in ply if e.name == "face" for name in TRIANGLES["face"] if name in e), ())
    return _points(path, raw) | {"label": label, "faces": _triangles(path, polygons, len(vertex))}


def _triangles(path, polygons, vertices):
    """Triangles (F, 3), or arrays of corners to cut into fans about the first -> triangles (F, 3); None without any."""
    if isinstance(polygons, np.ndarray) and polygons.ndim == 2:
        faces = np.array(polygons, polygons.dtype.newbyteorder("="))
    else:
        faces = np.array([(p[0], *pair) for p in map(np.ndarray.tolist, polygons) for pair in zip(p[1:-1], p[2:])])
    if len(faces) and (faces.dtype.kind == "f" or faces.min() < 0 or faces.max() >= vertices):
        raise fault(path, f"faces of vertices 0..{vertices - 1}", f"{faces.min()}..{faces.max()}")
    return faces if len(faces) else None


def _read_arrays(path):
    """Points of a .npy, (N, 3) or with colours (N, 6), or of an .npz with the names of ARRAYS: dict as `read_ply`."""
    if path.suffix.lower() == ".npy":
        values = _read_array(path, (None, None))
        raw = {"coord": values[:, :3], "color": values[:, 3:]} if values.shape[1] == 6 else {"coord": values}
        n = len(values)
    else:
        with reading(path, f"an .npz with one of {ARRAYS['coord']}"), open(path, "rb") as file, np.load(file) as found:
            raw = {key: np.asarray(found[name]) for key, keys in ARRAYS.items() for name in keys[::-1] if name in found}
            n = len(raw["coord"])
    return _points(path, {key: _checked(f"{path}[{key}]", array, (n, 3)) for key, array in raw.items()})


def _points(path, raw):
    """coord and, where the dict has them, color and normal as a file holds them -> the same as `read_ply` returns."""
    return {"coord": _finite(path, "coordinates", raw["coord"]),
            "color": _to_bytes(path, raw["color"]) if "color" in raw else None,
            "normal": _unit(raw["normal"]) if "normal" in raw else None}


def read_scan(path):
    """Read a scan of any of the forms named at the top of this file.

    Returns a dict as `load_scene`, and a list of str, what was missing or odd and what was done about it. A .ply adds
    faces (F, 3) or None. Color is grey where the file has none. Coordinates beyond 10 km are shifted by origin (3,)
    f64, else 0: coord + origin is what the file holds.
    Raises FileNotFoundError: a path that holds no scan; ValueError: as `load_scene` and `read_ply`.
    """
    path, notes, readers = Path(path), [], {".ply": read_ply, ".npy": _read_arrays, ".npz": _read_arrays}
    if (path / "coord.npy").is_file():
        scene = load_scene(path) | {"origin": np.zeros(3)}
    else:
        files = path.iterdir() if path.is_dir() else [path]
        files = [file for file in files if file.suffix.lower() in readers and file.is_file()
                 and not (path.is_dir() and file.name.startswith("."))]
        if len(files) != 1:
            raise FileNotFoundError(f"{path}: expected a scene folder with coord.npy, a .ply, .npy or .npz of points, "
                                    f"or a folder with one such file and frames, found {len(files)} such files")
        kind = files[0].suffix.lower()
        scene = dict.fromkeys(SCENE) | readers[kind](files[0]) | {"name": path.stem}
        scene["frame_ids"], scene["frames_skipped"] = usable_frames(path)
        far = np.abs(scene["coord"]).max() > 1e4  # metres, where f32 is too coarse
        scene["origin"] = np.floor(scene["coord"].min(0).astype(np.float64)) if far else np.zeros(3)
        scene["coord"] = (scene["coord"] - scene["origin"]).astype(np.float32)
        if scene["color"] is None:
            scene["color"] = np.full(scene["coord"].shape, 127, np.uint8)
            notes.append("no colours: taken as grey")
        elif kind == ".npy":
            notes.append("columns 4 to 6 taken as colours")
    size, skipped = np.ptp(scene["coord"], axis=0).max(), scene["frames_skipped"]
    odd = {f"{size:.0f} m long: are the units metres?": size > 100,
           f"{skipped} frames skipped: their pose is not finite or not rigid": skipped,
           "no frames: 3D only": not scene["frame_ids"]}
    return scene, notes + [note for note, holds in odd.items() if holds]


def load_scene(folder):
    """Read one scene folder, frames apart.

    Returns a dict: name str, coord (N, 3) f32 metres, color (N, 3) u8; normal (N, 3) f32 unit, segment, instance (N,)
    int64 and superpoint (N,) int64 0..S-1, each None where the folder has none; frame_ids, frames_skipped of
    `usable_frames`. Raises FileNotFoundError: no coord.npy or no color.npy; ValueError: a file that is truncated or of
    another shape, lengths that differ, labels or colours out of range, coordinates that are not finite.
    """
    folder = Path(folder)
    file = {key: folder / f"{'segment20' if key == 'segment' else key}.npy" for key in SCENE}
    coord = _finite(file["coord"], "coordinates", _read_array(file["coord"], (None, 3)).astype(np.float32))
    n, scene = len(coord), {"name": folder.name, "coord": coord}
    scene["color"] = _to_bytes(file["color"], _read_array(file["color"], (n, 3)))
    scene["normal"] = _unit(_read_array(file["normal"], (n, 3))) if file["normal"].is_file() else None
    for key in ("segment", "instance", "superpoint"):
        scene[key] = _read_array(file[key], (n,)).astype(np.int64) if file[key].is_file() else None
    labels = scene["segment"]
    if labels is not None and (labels.min() < IGNORE or labels.max() >= NUM_CLASSES):
        raise fault(file["segment"], f"labels {IGNORE}..{NUM_CLASSES - 1}", f"{labels.min()}..{labels.max()}")
    if scene["superpoint"] is not None:
        scene["superpoint"] = np.unique(scene["superpoint"], return_inverse=True)[1]
    scene["frame_ids"], scene["frames_skipped"] = usable_frames(folder)
    return scene


def frame_files(folder, frame):
    """The colour and the depth file of a frame."""
    path = Path(folder, "color", f"{frame}.jpg")
    return path if path.exists() else path.with_suffix(".png"), Path(folder, "depth", f"{frame}.png")


def usable_frames(folder):
    """Ids (list of int, ascending) of the frames with image, depth and a finite, rigid pose; number of bad poses."""
    ids = sorted(int(path.stem) for path in (folder / "pose").glob("*.txt") if path.stem.isdigit())
    ids = [i for i in ids if all(path.exists() for path in frame_files(folder, i))]
    usable = []
    for i in ids:
        pose = _read_matrix(folder / "pose" / f"{i}.txt", 4)
        turn = pose[:3, :3]  # ScanNet writes -inf where tracking was lost
        if np.isfinite(pose).all() and np.allclose(turn @ turn.T, np.eye(3), atol=0.01) and np.linalg.det(turn) > 0:
            usable.append(i)
    images = sum(1 for _ in (folder / "color").glob("*.*"))
    if images and not usable:
        WARN_ONCE(f"scene {folder}: none of its {images} images has depth/{{i}}.png and a finite, rigid "
                  "pose/{i}.txt of its number, without leading zeros; used 3D-only")
    return usable, len(ids) - len(usable)


def load_frames(folder, frame_ids, image_size, colors=True):
    """Read frames (list of int), resized to image_size (W, H), with intrinsics to match.

    Colour and depth images may differ in size (ScanNet: 1296x968 and 640x480): they are registered, so both are
    resized. A pixel's centre is an integer, so u' = (u + 0.5) s - 0.5 moves the principal point.

    Returns a dict: image (V, 3, H, W) u8, (V, 3, 0, 0) with colors False, where maps of the tower stand in for it;
    depth (V, H, W) f32 metres, 0 = no reading; world_to_camera (V, 4, 4), intrinsics (V, 3, 3) f32 for image_size.
    Raises ValueError: an image or a matrix that cannot be read.
    """
    folder, (width, height), v = Path(folder), image_size, len(frame_ids)
    camera_file = folder / "intrinsic" / "intrinsic_color.txt"
    camera = _read_matrix(camera_file, 3) if v else np.eye(3)
    if not np.isfinite(camera).all():
        raise fault(camera_file, "finite numbers", camera)
    frames = {"image": np.zeros((v, 3, height * colors, width * colors), np.uint8),
              "depth": np.zeros((v, height, width), np.float32),
              "world_to_camera": np.tile(np.eye(4, dtype=np.float32), (v, 1, 1)),
              "intrinsics": np.tile(camera.astype(np.float32), (v, 1, 1))}
    for i, frame in enumerate(frame_ids):
        color_file, depth_file = frame_files(folder, frame)
        color, size = _read_image(color_file, image_size, "RGB", decode=colors)
        frames["image"][i] = color.transpose(2, 0, 1)
        frames["depth"][i] = _read_image(depth_file, image_size)[0].astype(np.float32) / 1000  # mm -> m
        pose = _read_matrix(folder / "pose" / f"{frame}.txt", 4)
        frames["world_to_camera"][i, :3, :3] = pose[:3, :3].T  # the inverse of a rigid motion
        frames["world_to_camera"][i, :3, 3] = -pose[:3, :3].T @ pose[:3, 3]
        scale = np.array([width / size[0], height / size[1]])
        frames["intrinsics"][i, :2] *= scale[:, None]
        frames["intrinsics"][i, :2, 2] += 0.5 * scale - 0.5
    return frames


def _read_array(path, shape):
    """A .npy of this shape, `_checked`; never a pickle."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a scene folder needs it")
    with reading(path, "an array of numbers"):
        array = np.array(np.lib.format.open_memmap(path, "r"))  # mapped first: that checks the size of the file
    return _checked(path, array, shape)


def _read_matrix(path, size):
    """The first rows and columns, size of each, of a matrix in a text file."""
    with reading(path, "a matrix as text"):
        matrix = np.loadtxt(path, ndmin=2)
    return _checked(path, matrix[:size, :size], (size, size))


def _read_image(path, image_size, mode=None, decode=True):
    """An image of a mode, or one of 16 bit, as an array of image_size (0, 0, 3) without decode; its own (W, H)."""
    with reading(path, "an image"), Image.open(path, formats=("JPEG", "PNG")) as image:  # an EPS starts Ghostscript
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}")
        if not decode:
            return np.zeros((0, 0, 3), np.uint8), size
        if mode:
            image.draft(mode, image_size)  # a JPEG of several times the size is decoded smaller
            image = image.convert(mode)
        elif image.mode not in ("I;16", "I"):
            raise ValueError(f"expected one channel of 16 bit, found mode {image.mode}")
        smooth = Image.Resampling.BILINEAR if mode else Image.Resampling.NEAREST  # depths are not mixed
        return np.asarray(image if image.size == tuple(image_size) else image.resize(image_size, smooth)), size
