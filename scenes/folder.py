"""The scene folder and any other scan, read. Needs NumPy and Pillow, and no other file of this project.

    <scene>/
      coord.npy (N, 3) m   color.npy (N, 3) 0..255   normal.npy (N, 3), optional
      segment20.npy (N,) -1 = ignore   instance.npy (N,) -1 = none   superpoint.npy (N,), all three optional
        (segment{K}.npy or segment.npy of the K classes of <root>/classes.json, where there is one)
      color/{i}.jpg  depth/{i}.png (u16 mm, 0 = none)  pose/{i}.txt (camera_to_world)
      intrinsic/intrinsic_color.txt

This is Pointcept's layout of ScanNet with frames as ScanNet has them. The last number in a file's name is its frame,
the suffix one of FRAME_FILES in any case: frame-000003.color.JPG, 3.npy, 03.txt are one. `read_scan` also takes a .ply
(points or mesh, ascii or binary), a .npy of points (N, 3) or with colours (N, 6), an .npz with names of ARRAYS, and a
folder with one of these and frames. No reader runs code that a file may hold. A damaged file is one ValueError with the
file, what was expected and what was found. Axes: N points, F triangles, V views, S superpoints, H, W image size.
"""

import functools
import json
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IGNORE = -1
CLASS_NAMES = ("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
               "counter", "desk", "curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub",
               "otherfurniture")
STUFF = (0, 1)  # wall and floor have no instances
NYU40_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
CLASS_COLORS = np.array([  # the colours in which ScanNet's benchmark shows its classes
    (174, 199, 232), (152, 223, 138), (31, 119, 180), (255, 187, 120), (188, 189, 34), (140, 86, 75), (255, 152, 150),
    (214, 39, 40), (197, 176, 213), (148, 103, 189), (196, 156, 148), (23, 190, 207), (247, 182, 210), (219, 219, 141),
    (255, 127, 14), (158, 218, 229), (44, 160, 44), (112, 128, 144), (227, 119, 194), (82, 84, 163)], np.uint8)


@dataclass(frozen=True)
class Classes:
    """A label set of K classes; a label is an index into it, 0..K-1, or IGNORE.

    names: list of K str.  stuff: list of the indices that have no instances.  ids: list of K int, 0..65535, by which
    written labels and submissions call them.  colors: list of K [r, g, b] in 0..255, or [] for colours of their own.
    """

    names: list
    stuff: list
    ids: list
    colors: list

    @property
    def things(self):
        return [k for k in range(len(self.names)) if k not in self.stuff]


SCANNET20 = Classes(list(CLASS_NAMES), list(STUFF), list(NYU40_IDS), CLASS_COLORS.tolist())
MAX_PIXELS = 2**26  # of an image, more than of most phones: a damaged header must not ask for gigabytes
FRAME_FILES = {"color": (".jpg", ".jpeg", ".png"), "depth": (".png", ".npy", ".tif", ".tiff"), "pose": (".txt",)}
FRAME_NUMBER, CAMERA_FILE = re.compile(r"(\d{1,18})\D*$"), "intrinsic/intrinsic_color.txt"
IN_PLACE = np.eye(4)  # file_to_world of what is neither shifted, turned nor scaled
CAMERAS = ("opencv", "opengl", "inverse", "inverse-opengl")  # x right, y down, z ahead; y up, z back; world_to_camera
UNITS = {"mm": 0.001, "cm": 0.01, "inches": 0.0254, "dm": 0.1, "feet": 0.3048, "km": 1000}  # metres
UP = {"x": (2, 3, 1), "y": (1, -3, 2), "z": (1, 2, 3), "-x": (3, 2, -1), "-y": (1, 3, -2), "-z": (1, -2, -3)}
ARRAYS = {"coord": ("coord", "points", "xyz"), "color": ("color", "colors", "rgb"), "normal": ("normal", "normals")}
COLUMNS = {  # what a vertex of a .ply holds -> the names it goes by, in small letters
    "coord": ("x y z",), "normal": ("nx ny nz", "normal_x normal_y normal_z"), "label": ("label",),
    "splat": ("f_dc_0 f_dc_1 f_dc_2",), "color": ("red green blue", "r g b", *(
        f"{of}_red {of}_green {of}_blue" for of in ("diffuse", "scalar")), "scalar_r scalar_g scalar_b")}
TYPES = dict(zip(*map(str.split, (  # of the numbers in a .ply -> NumPy's
    "char uchar short ushort int uint long ulong half float double int8 uint8 int16 uint16 int32 uint32 int64 uint64 "
    "float16 float32 float64", 2 * "i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 "))))
SCENE = ("coord", "color", "normal", "segment", "instance", "superpoint")  # arrays of a scene
WARN_ONCE = functools.cache(warnings.warn)  # a scene is read many times, and Python forgets what it has warned of
HEADER = re.compile(rb"ply\s.*?[\r\n]end_header[ \t]*(\r\n|\n|\r)", re.DOTALL)  # of a .ply
ELEMENT = re.compile(r"\nelement\s+(\S+)\s+(\S+)(.*?)(?=\nelement|\nend_header)", re.DOTALL)  # name, rows, properties
PROPERTY = re.compile(r"\nproperty[ \t]+(?:list[ \t]+(\S+)[ \t]+)?(\S+)[ \t]+(\S+)")  # (size,) type, name


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


def read_classes(root):
    """The label set of a data set: that of <root>/classes.json, SCANNET20 where there is none.

    The file is an object: names, list of 2 str or more; and, where wanted, stuff, list of those names that have no
    instances; ids, list of whole numbers; colors, list of [r, g, b]. Raises ValueError: a file of another form.
    """
    path = Path(root, "classes.json")
    if not path.is_file():
        return SCANNET20
    with reading(path, 'an object as {"names": ["road", "tree"], "stuff": ["road"]}, with "ids" and "colors" or not'):
        found = json.loads(path.read_text("utf-8-sig"))
        names, colors, stuff = found.pop("names"), found.pop("colors", []), found.pop("stuff", [])
        ids = found.pop("ids", list(range(len(names))))
        rules = {f"no {', '.join(found)}": not found, "a list of two names or more, each once":
                 names == [*names] and 2 <= len(names) == len({*names} - {""}) <= len("".join(names)),
                 "one id, 0..65535, a name": len(names) == len(ids) == len({range(2**16)[i] for i in ids} & {*ids}),
                 "colors, one a name, 0..255": np.shape(colors) in ((0,), (len(names), 3)) and {
                     value for color in colors for value in color} <= {*range(256)}}
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"it should have {'; '.join(broken)}")
        return Classes(names, [names.index(name) for name in stuff], ids, colors)


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
    if (lost := ~np.isfinite(values)).any():
        raise fault(path, f"finite {what}", f"{lost.any(1).sum()} of {len(values)} points without; remove these points")
    return values


def _to_bytes(path, color, few=0.02):
    """Colours (N, 3), floats in 0..1 or numbers in 0..255 or of 16 bit -> 0..255 u8; notes, list of str. The range is
    that of nearly all values but zeros: beyond it a few (share) are clipped, more are a fault."""
    if color.dtype == np.uint8:
        return color, []
    some = _finite(path, "colours", color)[color > 0]
    high = np.quantile(some, 1 - few, method="higher") if len(some) else 0
    top = 1 if color.dtype.kind == "f" and high <= 2 else 255 if high <= 510 else 65535
    scaled = color.astype(np.float32) * np.float32(255 / top)
    outside = (scaled < -0.5) | (scaled > 255.5)
    if outside.mean() > few or (510 < high < 4096):  # too little for 16 bit
        raise fault(path, "colours in 0..255, or floats in 0..1", f"{color.min()}..{color.max()}")
    return np.rint(scaled).clip(0, 255).astype("u1"), [f"a few colours beyond 0..{top}: clipped"] * int(outside.any())


def _unit(normal):
    """Normals (N, 3) -> f32 of length 1, or 0 where one is not finite or has no length: it says nothing."""
    normal = normal.astype(np.float32)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.divide(normal, length, out=np.zeros_like(normal), where=(length > 1e-6) & (length < np.inf))


def read_ply(path):
    """Read the points and triangles of a .ply. Polygons are cut into triangles.

    Returns a dict: coord (N, 3) of the file's type, f32 or f64 as a rule; color (N, 3) u8, of the vertices, else the
    mean over their faces; normal (N, 3) f32 unit, 0 = unknown; label (N,) i32; faces (F, 3) integer; each of the last
    four is None where the file has none; notes, list of str, what was odd and what was done about it.
    Raises ValueError: no .ply, a damaged one, coordinates that are not finite, colours out of range.
    """
    with open(path, "rb") as file, reading(path, "a whole .ply"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elements = _elements(file)
        vertex, face = elements.get("vertex", {}), elements.get("face", {})
        raw, of_faces = ({key: np.stack([of[name] for name in names.split()], 1) for key, choices in COLUMNS.items()
                          for names in reversed(choices) if {*names.split()} <= of.keys()} for of in (vertex, face))
    if "coord" not in raw:
        raise fault(path, "vertex properties x y z", ", ".join(vertex) or "none")
    raw = {"color": (0.5 + 0.28209479 * raw["splat"]).clip(0, 1)} | raw if "splat" in raw else raw
    n, label = len(raw["coord"]), raw["label"][:, 0].astype(np.int32) if "label" in raw else None
    polygons = next((face[k] for k in ("vertex_indices", "vertex_index") if np.ndim(face.get(k, ())[:1]) == 2), ())
    faces = _triangles(path, polygons, n)
    if faces is not None and "color" in of_faces and "color" not in raw:
        color = _to_bytes(path, of_faces["color"])[0].repeat([*map(len, polygons)], 0)  # of each corner
        corner = np.concatenate([*polygons]).astype(np.int64).clip(0, n - 1)
        *total, count = (np.bincount(corner, weights, n) for weights in (*color.T, None))
        raw["color"] = np.where(count > 0, total / count.clip(1), 127).T.round().astype(np.uint8)  # else grey
    return _points(path, raw) | {"label": label, "faces": faces}


def _elements(file):
    """The elements of an open .ply: {name: {property in small letters: its numbers}}. Numbers are (n,), of lists (n, k)
    where all are as long, else n arrays; in a text they are doubles where the declared type holds them not to 1e-4."""
    data, found = np.asarray(np.memmap(file, mode="r")), {}
    if not (header := HEADER.match(data)):
        raise ValueError(f"it starts with {data[:20].tobytes()} and has no end_header")
    head, data = header[0].decode("ascii", "replace").replace("\r", "\n"), data[header.end() :]
    order = "<" if "\nformat binary_l" in head else ">" if "\nformat binary_b" in head else ""  # "" = a text
    if not order:  # it goes on as the bytes of doubles; Windows writes NaN as 1.#QNAN
        data = np.fromstring(re.sub(rb"1\.#\w+", b"nan", data.tobytes()).strip(), sep=" ").view(np.uint8)

    def take(kind, count):
        nonlocal data
        values, data = np.ndarray(count, kind, data), data[np.dtype(kind).itemsize * count :]
        return values

    def take_row():  # a list begins with its size
        return [take(kind, int(take(size, 1)[0]) if size else 1) for size, kind in kinds]

    for name, rows, properties in ((name, int(n), PROPERTY.findall(rest)) for name, n, rest in ELEMENT.findall(head)):
        kinds = [[kind and (order + TYPES[kind] if order else "f8") for kind in kinds] for *kinds, _ in properties]
        start, row = data, take_row() if rows else [np.zeros(1)] * len(kinds)
        layout = [field for i, (size, kind) in enumerate(kinds)  # of all rows, if they are as the first
                  for field in ((f"{i} size", size or "u1", (len(size[:1]),)), (f"{i}", kind, row[i].shape))]
        data, fit = start, len(start) // max(1, np.dtype(layout).itemsize)
        table = take(layout, min(rows, fit))
        same = all((table[f"{i} size"] == len(one)).all() for i, one in enumerate(row))
        columns = [table[f"{i}"] for i in range(len(kinds))]
        if same and rows - fit > (len(data) if any(size for size, _ in kinds) else 0):
            raise ValueError(f"{rows * len(kinds)} numbers announced in {len(start)} bytes")
        if fit < rows or not same:
            data = start
            columns = zip(*[take_row() for _ in range(rows)])
        for (size, kind, key), values in zip(properties, columns):
            if not size:
                values = np.reshape(values, -1)
                exact = values.astype(TYPES[kind])
                values = exact if order or (np.abs(exact - values) <= 1e-4).all() else values
            found.setdefault(name, {}).setdefault(key.lower(), values)
    if not order and len(data):
        raise ValueError("more numbers than its header announces")
    return found


def _triangles(path, polygons, vertices):
    """Triangles (F, 3), or arrays of corners to cut into fans about the first -> triangles (F, 3); None without any."""
    if isinstance(polygons, np.ndarray) and polygons.shape[1:] == (3,):
        faces = np.array(polygons, polygons.dtype.newbyteorder("="))
    else:
        faces = np.array([(p[0], *pair) for p in map(np.ndarray.tolist, polygons) for pair in zip(p[1:-1], p[2:])])
    faces = faces.astype(int) if faces.dtype.kind == "f" and (faces == np.rint(faces)).all() else faces  # of a text
    if len(faces) and (faces.dtype.kind == "f" or faces.min() < 0 or faces.max() >= vertices):
        raise fault(path, f"faces of vertices 0..{vertices - 1}", f"{faces.min()}..{faces.max()}")
    return faces if len(faces) else None


def _read_arrays(path):
    """Points of a .npy, (N, 3) or with colours (N, 6), or of an .npz with the names of ARRAYS: dict as `read_ply`."""
    if path.suffix.lower() == ".npy":
        values = _read_array(path, (None, None))
        if values.shape[1] not in (3, 6, 7):
            raise fault(path, "columns x y z or x y z red green blue (alpha); an .npz may hold normals", values.shape)
        raw = {"coord": values[:, :3], "color": values[:, 3:6]} if values.shape[1] > 3 else {"coord": values}
        n = len(values)
    else:
        with reading(path, f"an .npz with one of {ARRAYS['coord']}"), open(path, "rb") as file, np.load(file) as found:
            raw = {key: np.asarray(found[name]) for key, keys in ARRAYS.items() for name in keys[::-1] if name in found}
            n = len(raw["coord"])
    return _points(path, {key: _checked(f"{path}[{key}]", array, (n, 3)) for key, array in raw.items()})


def _points(path, raw):
    """coord and, where the dict has them, color and normal as a file holds them -> these and notes as of `read_ply`."""
    color, notes = _to_bytes(path, raw["color"]) if "color" in raw else (None, [])
    return {"coord": _finite(path, "coordinates", raw["coord"]), "color": color, "notes": notes,
            "normal": _unit(raw["normal"]) if "normal" in raw else None}


def read_scan(path, classes=SCANNET20, scale=None, up="z"):
    """Read a scan of any of the forms named at the top of this file, to label it by these Classes.

    scale: metres of a unit, None = 1, but refused where no building is as large; up: of UP, the axis that points up.
    Returns a dict as `load_scene`, and a list of str, what was missing or odd and what was done about it. A .ply adds
    faces (F, 3) or None. Color is grey where the file has none; labels of other classes are left out.
    Raises FileNotFoundError: a path that holds no scan; ValueError: as `load_scene` and `read_ply`.
    """
    path, notes, readers = Path(path), [], {".ply": read_ply, ".npy": _read_arrays, ".npz": _read_arrays}
    if (path / "coord.npy").is_file():
        scene = load_scene(path, classes, scale, up, to_predict=True)
    else:
        files = path.iterdir() if path.is_dir() else [path]
        files = [file for file in files if file.suffix.lower() in readers and file.is_file()
                 and not (path.is_dir() and file.name.startswith("."))]
        if len(files) != 1:
            raise FileNotFoundError(f"{path}: expected a scene folder with coord.npy, a .ply, .npy or .npz of points, "
                                    f"or a folder with one such file and frames, found {len(files)} such files")
        kind = files[0].suffix.lower()
        scene = dict.fromkeys(SCENE) | readers[kind](files[0]) | {"name": path.stem, "classes": classes}
        scene = _placed(path, scene, scale, up)
        if scene["color"] is None:
            scene["color"] = np.full(scene["coord"].shape, 127, np.uint8)
            notes.append("no colours: taken as grey")
        elif kind == ".npy":
            notes.append("columns 4 to 6 taken as colours")
    notes += looks_like(path, scene["coord"], refuse=scale is None) + scene["notes"]
    return scene, notes + ["no frames: 3D only"] * (not scene["frame_ids"])


def looks_like(path, coord, refuse=False):
    """What is odd about points (N, 3), list of str: many at one place; no metres or another axis up, with the flag that
    mends it. refuse: ValueError for what no building measures. A floor has nothing above it and walls on all sides."""
    some, count = np.unique(coord[:: len(coord) // 4000 + 1].astype(np.float64), axis=0, return_counts=True)
    notes = [f"{count.max() / count.sum():.0%} of the points lie at one place: remove them if they are invalid"] * int(
        count.max() > max(9, 0.01 * count.sum()))
    low, high = np.quantile(some, (0.01, 0.99), axis=0)
    short, _, long = np.sort(high - low)
    if np.abs(np.ptp(coord, axis=0).max() - [1, 2]).min() < 1e-5:
        return [*notes, "exactly 1 or 2 long, as normalised scans are: --scale makes metres, with the metres of a unit"]
    if short > 20 or short > max(6, 0.4 * long) or 0 < long < 0.3 or (long > 50 and short < 0.02 * long):  # no hall
        unit = min(UNITS, key=lambda unit: abs(np.log(UNITS[unit] * max(short, long / 20) / 2.6)))
        said = f"{short:.4g}..{long:.4g} long: the units look like {unit} (a guess), --scale {UNITS[unit]} makes metres"
        if refuse and (short > 20 or long > 500):
            raise fault(path, "a building in metres", f"{said}, --scale 1 takes it as it is")
        return [*notes, said]
    ends = np.stack([(some < low + 0.04 * short).mean(0), (some > high - 0.04 * short).mean(0)])  # (2, 3) shares
    for i, up in enumerate(UP if short > 0.35 * long else ()):
        (floor, top), walls = ends[:: 1 if i < 3 else -1, i % 3], np.delete(ends, i % 3, 1)
        if up != "z" and floor > max(0.1, 3 * top, 0.8 * walls.max()) and walls.max() < 2 * max(walls.min(), 0.03):
            return [*notes, f"the floor seems to lie across {up[-1]}: --up{'=' if '-' in up else ' '}{up} turns it"]
    return notes


def _placed(folder, scene, scale, up):
    """A scene with coord (N, 3) and normal as a file holds them -> the same as `load_scene` returns it."""
    if not 0 < (scale := 1 if scale is None else scale) < np.inf:
        raise ValueError(f"--scale must be above 0, got {scale}")
    coord, normal, file_to_world, rows = scene["coord"], scene["normal"], np.eye(4), np.array(UP[up])
    turn = np.sign(rows)[:, None] * np.eye(3)[np.abs(rows) - 1]
    some = coord[:: len(coord) // 1000 + 1]  # points far off, or many at one place, decide nothing
    middle = np.median(some[np.unique(some @ (1, np.pi, np.e), return_index=True)[1]], axis=0)
    far, notes = np.abs(middle).max(), []
    if coord.dtype.kind == "f" and np.spacing(far) * scale > 1e-3:
        notes.append(f"coordinates near {far:.0f} in {coord.dtype} are exact to {np.spacing(far):.2g}: export doubles")
    origin = middle.astype(np.float64) * (far * scale > 1e4)  # beyond 10 km f32 is too coarse
    file_to_world[:3] = scale * np.column_stack([turn, -turn @ origin])
    if (file_to_world != np.eye(4)).any():
        coord = (coord - origin) @ file_to_world[:3, :3].T  # f64
        normal = None if normal is None else (normal @ turn.T).astype(np.float32)
    coord = _finite(folder, "coordinates", coord.astype(np.float32, copy=False))
    files, more = usable_frames(folder)
    return scene | {"coord": coord, "normal": normal, "file_to_world": file_to_world, "frame_ids": list(files),
                    "frame_files": files, "notes": [*scene.get("notes", ()), *notes, *more]}


def load_scene(folder, classes=SCANNET20, scale=None, up="z", to_predict=False):
    """Read one scene folder, frames apart, labelled by these Classes; scale, up: as `read_scan`. to_predict: colours
    that are missing are taken as grey, labels of other classes left out, which the notes say.

    Returns a dict: name str, classes, coord (N, 3) f32 metres, color (N, 3) u8; normal (N, 3) f32 unit, segment,
    instance (N,) int64 and superpoint (N,) int64 0..S-1, each None where the folder has none; file_to_world (4, 4) f64,
    which took the file's coordinates to coord, near 0 if they lie beyond 10 km; frame_files, dict of `usable_frames`;
    frame_ids, its keys; notes, list of str. Raises FileNotFoundError: no coord.npy or color.npy; ValueError: a file cut
    or of another shape, lengths that differ, labels or colours out of range, coordinates that are not finite.
    """
    folder = Path(folder)
    file = {key: folder / f"{key}.npy" for key in SCENE}
    if (own := folder / f"segment{len(classes.names)}.npy").is_file():
        file["segment"] = own
    coord = _finite(file["coord"], "coordinates", _read_array(file["coord"], (None, 3)))
    n, scene = len(coord), {"name": folder.name, "coord": coord, "classes": classes, "notes": []}
    if to_predict and not file["color"].is_file():
        scene["color"] = np.full((n, 3), 127, np.uint8)
        scene["notes"].append("no colours: taken as grey")
    else:
        scene["color"], scene["notes"] = _to_bytes(file["color"], _read_array(file["color"], (n, 3)))
    scene["normal"] = _unit(_read_array(file["normal"], (n, 3))) if file["normal"].is_file() else None
    for key in ("segment", "instance", "superpoint"):
        scene[key] = _read_array(file[key], (n,)).astype(np.int64) if file[key].is_file() else None
    found = set() if scene["segment"] is None else {*np.unique(scene["segment"]).tolist()}
    if foreign := sorted(found - {*range(IGNORE, len(classes.names))}):
        error = fault(file["segment"], f"labels {IGNORE}..{len(classes.names) - 1}", foreign_labels(foreign))
        if not to_predict:
            raise error
        scene["notes"].append(f"labels left out, {error}")
        scene["segment"] = scene["instance"] = None
    if scene["superpoint"] is not None:
        scene["superpoint"] = np.unique(scene["superpoint"], return_inverse=True)[1]
    return _placed(folder, scene, scale, up)


def foreign_labels(labels):
    """What labels outside of the classes seem to be: str, of a sorted list of int."""
    kinds = {40: "NYU40 ids? Class index = scenes.folder.NYU40_IDS.index(id), -1 where it is not among them",
             199: "indices of ScanNet200? Copy classes200.json, which scenes.scannet writes, to <root>/classes.json",
             1191: "ids of scannetv2-labels.combined.tsv? python -m scenes.scannet maps them"}
    one = len(labels) == 1 and labels[0] in (-100, 255, 65535)
    seems = f"points without a class? They must have {IGNORE}" if one else next(
        (text for limit, text in kinds.items() if labels[0] >= 0 and labels[-1] <= limit), "another data set's?")
    return f"{', '.join(map(str, labels[:8]))}{' ...' * (len(labels) > 8)}: {seems}; or name your own in classes.json"


def frame_files(folder):
    """{id: [colour, depth, pose file]}, ascending, of frames that have one of each; {what is wrong: ids} of others."""
    found, whole, faulty = {}, {}, {}
    for part, suffixes in FRAME_FILES.items():
        for path in Path(folder, part).glob("[!.]*"):
            if path.suffix.lower() in suffixes and (number := FRAME_NUMBER.search(path.stem)):
                found.setdefault(int(number[1]), {part: [] for part in FRAME_FILES})[part].append(path)
    for i, files in sorted(found.items()):
        counts = [(len(same), part) for part, same in files.items() if len(same) != 1]
        if wrong := " and ".join(f"{n or 'no'} {part}{' files' * (n > 1)}" for n, part in counts):
            faulty.setdefault(wrong, []).append(i)
        else:
            whole[i] = [file for (file,) in files.values()]
    return whole, faulty


def usable_frames(folder):
    """The frames with image, depth and a finite, rigid pose: dict as `frame_files`; list of str: which others there are
    and why not, and where intrinsics and depth cannot be those of the images."""
    folder, (files, faulty), usable = Path(folder), frame_files(folder), {}
    total = len(files) + sum(map(len, faulty.values()))
    for i, (*_, file) in files.items():
        pose = _read_matrix(file, 4)
        turn, finite = pose[:3, :3], np.isfinite(pose).all()  # ScanNet writes -inf where tracking was lost
        if finite and np.allclose(turn @ turn.T, np.eye(3), atol=0.01) and np.linalg.det(turn) > 0:
            usable[i] = files[i]
        else:
            faulty.setdefault(f"a pose that is not {'rigid' if finite else 'finite'}", []).append(i)
    notes = [f"{len(ids)} of {total} frames have {wrong}: {', '.join(map(str, ids[:9]))}{', ...' * (len(ids) > 9)}"
             for wrong, ids in faulty.items()]
    with suppress(ValueError, StopIteration):  # a damaged file, which load_frames names where it is needed; no frame
        color, depth = (_read_image(file, None, decode=False)[1] for file in next(iter(usable.values()))[:2])
        center = _read_matrix(folder / CAMERA_FILE, 3)[:2, 2]
        if not 0.95 < color[0] * depth[1] / (color[1] * depth[0]) < 1.05 or np.abs(center / color - 0.5).max() > 0.2:
            usable = {}
            notes.append(f"frames are not used: color of {color}, depth of {depth}, principal point {center.tolist()}: "
                         "the aspects must be equal and the point near the middle")
    if not usable and (images := sum(1 for _ in (folder / "color").glob("*.*"))):
        WARN_ONCE(f"scene {folder}: 3D-only, none of {images} images used: {'; '.join(notes) or 'no number or suffix'}")
    return usable, notes


def load_frames(folder, ids, image_size, colors=True, file_to_world=IN_PLACE, cameras="opencv", depth_scale=None):
    """Read frames (ids, list of int or dict of files), resized to image_size (W, H), with intrinsics to match.

    Colour and depth images may differ in size (ScanNet: 1296x968 and 640x480): they are registered, so both are
    resized. A pixel's centre is an integer, so u' = (u + 0.5) s - 0.5 moves the principal point. file_to_world: of
    `load_scene`; cameras: of CAMERAS; depth_scale: metres of a unit of depth, None = 0.001 of integers, 1 of floats.

    Returns a dict: image (V, 3, H, W) u8, (V, 3, 0, 0) with colors False, where maps of the tower stand in for it;
    depth (V, H, W) f32 metres, 0 = no reading; world_to_camera (V, 4, 4), intrinsics (V, 3, 3) f32 for image_size.
    Raises ValueError: an image or a matrix that cannot be read.
    """
    folder, (width, height), v, y = Path(folder), image_size, len(ids), -1 if "opengl" in cameras else 1
    camera_file, files = folder / CAMERA_FILE, ids if isinstance(ids, dict) or not v else frame_files(folder)[0]
    camera = _read_matrix(camera_file, 3) if v else np.eye(3)
    if not np.isfinite(camera).all():
        raise fault(camera_file, "finite numbers", camera)
    frames = {"image": np.zeros((v, 3, height * colors, width * colors), np.uint8),
              "depth": np.zeros((v, height, width), np.float32),
              "world_to_camera": np.tile(np.eye(4, dtype=np.float32), (v, 1, 1)),
              "intrinsics": np.tile(camera.astype(np.float32), (v, 1, 1))}
    for i, frame in enumerate(ids):
        color_file, depth_file, pose_file = files.get(frame) or [folder / part / str(frame) for part in FRAME_FILES]
        color, size = _read_image(color_file, image_size, "RGB", decode=colors)
        frames["image"][i] = color.transpose(2, 0, 1)
        depth = _read_image(depth_file, image_size)[0]
        units = 1 / depth_scale if depth_scale else 1 if depth.dtype.kind == "f" else 1000  # a metre
        frames["depth"][i] = np.nan_to_num(depth.astype(np.float32), posinf=0).clip(0) / np.float32(units)
        pose = _read_matrix(pose_file, 4)  # f64: it may lie far off
        pose = file_to_world @ (np.linalg.inv(pose) if "inverse" in cameras else pose)
        pose[:3, :3] *= np.array([1, y, y]) / np.cbrt(np.linalg.det(file_to_world[:3, :3]))
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
    """An image of a mode, or depth, as an array of image_size, (0, 0, 3) without decode; its own (W, H)."""
    array = _read_array(path, (None, None)) if path.suffix.lower() == ".npy" else None
    with reading(path, "an image"), (
            Image.open(path, formats=("JPEG", "PNG", "TIFF")) if array is None else  # an EPS starts Ghostscript
            Image.fromarray(array.astype(np.float32 if array.dtype.kind == "f" else np.int32))) as image:
        size = image.size
        if not decode:
            return np.zeros((0, 0, 3), np.uint8), size
        image.draft(mode, image_size)  # a JPEG of several times the size is decoded smaller
        if image.size[0] * image.size[1] > MAX_PIXELS:
            raise ValueError(f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}")
        if mode:
            if image.mode[0] == "I":  # grey of 16 bit, which Pillow would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = image.convert(mode)
        elif image.mode not in ("I;16", "I;16B", "I", "F"):
            raise ValueError(f"expected one channel of 16 bit or floats, found mode {image.mode}")
        smooth = Image.Resampling.BILINEAR if mode else Image.Resampling.NEAREST  # depths are not mixed
        return np.asarray(image if image.size == tuple(image_size) else image.resize(image_size, smooth)), size
