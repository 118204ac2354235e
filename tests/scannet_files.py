"""Official ScanNet files for tests: a sheet of 30 vertices, or a generated room."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from plyfile import PlyData, PlyElement

from scenes.folder import CLASS_NAMES, NYU40_IDS

AXIS = np.array([[0.8, -0.6, 0, 1.5], [0.6, 0.8, 0, -2.0], [0, 0, 1, 0.25], [0, 0, 0, 1]])
COLOR_SIZE, DEPTH_SIZE = (64, 48), (32, 24)
CAMERA = np.array([[60, 0, 31.5, 0], [0, 60, 23.5, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # of the colour images
SHEET = (np.array([(0.1 * x, 0.1 * y, 0.05 * x) for y in range(5) for x in range(6)], np.float32),  # rises with x
         np.array([[i + a, i + b, i + 6] for row in range(4) for i in range(6 * row, 6 * row + 5)
                   for a, b in ((0, 1), (1, 7))]))
GREY = np.repeat(np.arange(30, dtype=np.uint8)[:, None], 3, 1) * 5
COLUMN = np.arange(30) % 6  # of the sheet: one segment each


def ply_bytes(coord, color, faces=None, label=None):
    """A mesh with ScanNet's properties; label (N,) only in labels.ply."""
    columns = {"x": coord[:, 0], "y": coord[:, 1], "z": coord[:, 2]} | dict(zip(("red", "green", "blue"), color.T))
    columns |= {"alpha": np.full(len(coord), 255)} | ({} if label is None else {"label": label})
    kinds = {"x": "f4", "y": "f4", "z": "f4", "label": "u2"}  # colours: u1
    vertex = np.zeros(len(coord), [(name, kinds.get(name, "u1")) for name in columns])
    for name, values in columns.items():
        vertex[name] = values
    face = np.zeros(0 if faces is None else len(faces), [("vertex_indices", "i4", (3,))])
    face["vertex_indices"] = np.zeros((0, 3)) if faces is None else faces
    out = io.BytesIO()
    PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")], byte_order="<").write(out)
    return out.getvalue()


def image_bytes(array, kind="PNG"):
    Image.fromarray(array).save(out := io.BytesIO(), kind)
    return out.getvalue()


def jpeg_bytes(i, size=COLOR_SIZE):
    return image_bytes(np.full((*size[::-1], 3), (10 * i % 256, 100, 50), np.uint8), "JPEG")


def sheet_frames(indices=range(5), lost=(3,)):
    """Frames (index, pose, jpeg, depth): frame i stands at (i, 0.5, 1.5) and sees 1 m + i mm; a lost pose is -inf."""
    def pose(i):
        return np.array([[1, 0, 0, i], [0, 1, 0, 0.5], [0, 0, 1, 1.5], [0, 0, 0, 1]])

    return [(i, np.full((4, 4), -np.inf) if i in lost else pose(i), jpeg_bytes(i),
             np.full(DEPTH_SIZE[::-1], 1000 + i, np.uint16)) for i in indices]


def sens_bytes(frames, camera=CAMERA):
    """A .sens of version 4, jpeg and zlib."""
    sizes = (*Image.open(io.BytesIO(frames[0][2])).size, *frames[0][3].shape[::-1])
    out = struct.pack("<IQ", 4, 15) + b"StructureSensor" + np.array([camera, np.eye(4)] * 2, "<f4").tobytes()
    out += struct.pack("<2i4IfQ", 2, 1, *sizes, 1000, len(frames))
    for i, pose, color, depth in frames:
        depth = zlib.compress(depth.tobytes())
        out += pose.astype("<f4").tobytes() + struct.pack("<4Q", i, i, len(color), len(depth)) + color + depth
    return out + b"IMU data that nobody reads"


def write_exported(folder, frames, camera=CAMERA, padded=False):
    """Frames as ScanNet exports them, or (padded) as in scannet_frames_25k."""
    for name in ("color", "depth", "pose", *(() if padded else ("intrinsic",))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, pose, color, depth in frames:
        stem = f"{i:06d}" if padded else str(i)
        (folder / "color" / f"{stem}.jpg").write_bytes(color)
        (folder / "depth" / f"{stem}.png").write_bytes(image_bytes(depth))
        np.savetxt(folder / "pose" / f"{stem}.txt", pose)
    np.savetxt(folder / ("intrinsics_color.txt" if padded else "intrinsic/intrinsic_color.txt"), camera)


def write_scan(folder, coord=SHEET[0], color=GREY, faces=SHEET[1], axis=AXIS, label=None, segments=None, groups=()):
    """The files of one scan but its frames; label (N,) NYU40 ids, None in a test scan; groups: (category, segments)."""
    folder.mkdir(parents=True)
    stem = f"{folder}/{folder.name}"
    Path(f"{stem}_vh_clean_2.ply").write_bytes(ply_bytes(coord, color, faces))
    rows = [] if axis is None else ["axisAlignment = " + " ".join(map(str, axis.ravel())) + " "]
    Path(f"{stem}.txt").write_text("\n".join([*rows, "colorWidth = 64", "sceneType = Bathroom / Toilet\n"]))
    if label is not None:
        Path(f"{stem}_vh_clean_2.labels.ply").write_bytes(ply_bytes(coord, color, faces, label))
        Path(f"{stem}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(
            {"params": {"kThresh": "0.01"}, "sceneId": folder.name, "segIndices": segments.tolist()}))
        write_groups(folder, groups)
        Path(f"{stem}_vh_clean.aggregation.json").write_text('{"segGroups": []}')  # of another mesh: not to be taken
    return folder


def write_groups(folder, groups):
    Path(f"{folder}/{folder.name}.aggregation.json").write_text(json.dumps({"segGroups": [
        {"id": i, "objectId": i, "segments": segments, "label": label} for i, (label, segments) in enumerate(groups)]}))


def write_sheet(folder):
    """A labelled scan of the sheet: each column a segment; of its four groups two overlap."""
    return write_scan(folder, label=np.array([1, 2, 40, 50, 149, 39])[COLUMN],
                      segments=np.array([700, 3, 41, 8, 9, 250000])[COLUMN],
                      groups=[("wall", [700]), ("floor", [3, 41]), ("chair", [41, 8]), ("odd thing", [250000])])


def write_room(folder, room, sens):
    """A generated room (scene folder) as a labelled scan without faces, moved by the inverse of AXIS."""
    coord, color, segment, instance, superpoint = (
        np.load(room / f"{name}.npy") for name in ("coord", "color", "segment20", "instance", "superpoint"))
    back = np.linalg.inv(AXIS)
    groups = [(CLASS_NAMES[segment[mine][0]], np.unique(superpoint[mine]).tolist()) for mine in (
        *(instance == i for i in range(instance.max() + 1)), segment == 1, segment == 0)]  # ScanNet groups these too
    write_scan(folder, coord @ back[:3, :3].T + back[:3, 3], color, None, AXIS, np.array(NYU40_IDS)[segment],
               superpoint, groups)
    frames = [(i, back @ np.loadtxt(room / "pose" / f"{i}.txt"), (room / "color" / f"{i}.jpg").read_bytes(),
               np.asarray(Image.open(room / "depth" / f"{i}.png")).astype(np.uint16))
              for i in range(len([*(room / "pose").iterdir()]))]
    camera = np.loadtxt(room / "intrinsic" / "intrinsic_color.txt")
    if sens:
        Path(f"{folder}/{folder.name}.sens").write_bytes(sens_bytes(frames, camera))
    else:
        write_exported(folder, frames, camera)
