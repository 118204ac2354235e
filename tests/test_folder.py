"""scenes/folder.py: scene folders and scans of any form, good, bad and hostile. Other tests take its file makers."""

import ast
import io
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import Payload
from scenes import folder
from scenes.folder import load_frames, load_scene, read_ply, read_scan

ROOT = Path(__file__).parents[1]
ENCODINGS = ("ascii", "binary_little_endian", "binary_big_endian")
XYZ = "property float x\nproperty float y\nproperty float z\n"


# ------------------------------------------------------------------------------------------------ files for the tests


def camera_to_world(yaw=0.0):
    """A level camera (4, 4), 3 m before the middle of the scenes below; yaw 0 looks along world +y."""
    c, s = np.cos(yaw), np.sin(yaw)
    matrix = np.array([[c, 0, -s, 2 + 3 * s], [s, 0, c, 3 - 3 * c], [0, -1, 0, 1], [0, 0, 0, 1]])
    return matrix  # its columns: right, down, forward, position


def write_scene(folder, points=200, frames=(), color_size=(64, 48), depth_size=(64, 48), seed=0, **arrays):
    """Write a scene folder: points in a box around (2, 3, 1) m and frames that look at it; return the folder.

    frames: ids; frame i has a depth map of 1000 + 10 i mm.  arrays: .npy files by name, in place of those made here
    (None = leave out); normals, labels and instances are made, superpoints are not.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    coord = rng.uniform((1, 2.2, 0.4), (3, 3.8, 1.6), (points, 3)).astype(np.float32)
    normal = rng.normal(size=coord.shape)
    made = {"coord": coord, "color": rng.integers(0, 256, (points, 3)).astype(np.uint8),
            "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
            "segment20": rng.integers(-1, 20, points), "instance": rng.integers(-1, 4, points)}
    for name, array in {**made, **arrays}.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir()
    width, height = color_size
    camera = np.eye(4)
    camera[:2, :3] = [[0.9 * width, 0, 0.47 * width], [0, 0.85 * width, 0.52 * height]]
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", camera)
    for i in frames:
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / "color" / f"{i}.jpg")
        Image.fromarray(np.full(depth_size[::-1], 1000 + 10 * i, np.uint16)).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", camera_to_world(0.2 * i))
    return folder


def grid_mesh(columns=6, rows=5):
    """A level sheet of (columns x rows) vertices at z = 0, 10 cm apart: coord (N, 3) f32, triangles (F, 3)."""
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    coord = np.stack([0.1 * x.ravel(), 0.1 * y.ravel(), 0 * x.ravel()], 1).astype(np.float32)
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    return coord, np.concatenate([np.stack([corner, corner + 1, corner + columns], 1),
                                  np.stack([corner + 1, corner + columns + 1, corner + columns], 1)])


def ply_bytes(columns, faces=None, encoding="binary_little_endian", list_types="uchar int"):
    """A .ply from {property name: (type, values)} and faces; written field by field."""
    codes = {"uchar": "B", "ushort": "H", "int": "i", "uint": "I", "float": "f", "double": "d", "short": "h"}
    kinds, values = zip(*columns.values())
    rows = [("".join(codes[kind] for kind in kinds), row) for row in zip(*values)]
    head = ["ply", f"format {encoding} 1.0", "comment made by a test", f"element vertex {len(rows)}"]
    head += [f"property {kind} {name}" for name, kind in zip(columns, kinds)]
    if faces is not None:
        head += [f"element face {len(faces)}", f"property list {list_types} vertex_indices"]
        length, index = (codes[kind] for kind in list_types.split())
        rows += [(f"{length}{len(face)}{index}", (len(face), *face)) for face in faces]
    if encoding == "ascii":
        body = "".join(" ".join(map(str, row)) + "\n" for _, row in rows).encode()
    else:
        body = b"".join(struct.pack((">" if "big" in encoding else "<") + form, *row) for form, row in rows)
    return "\n".join([*head, "end_header\n"]).encode() + body


def mesh_columns(coord, label=None):
    columns = {axis: ("float", coord[:, i].tolist()) for i, axis in enumerate("xyz")}
    for i, name in enumerate(("red", "green", "blue", "alpha")):
        columns[name] = ("uchar", [(40 * i + 3 * j) % 256 for j in range(len(coord))])
    if label is not None:
        columns["label"] = ("ushort", list(label))
    return columns


def damage(data, how, place, value):
    """The bytes of a file cut short, with bits turned, with bytes replaced by a large number, or swapped about."""
    at = int(place * len(data))
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :] if at < len(data) else data
    if how == "large":
        return data[:at] + b"\xff" * 8 + data[at + 8 :]
    if how == "digits":
        return data[:at] + b"9" * 12 + data[at:]
    return data[at:] + data[:at]


DAMAGE = given(how=st.sampled_from(["cut", "flip", "large", "digits", "swap"]), place=st.floats(0, 1),
               value=st.integers(0, 255))
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scene_or_clear_error(path, read):
    """Run read; a ValueError must name the file. Returns True where it went through."""
    try:
        read()
    except ValueError as error:
        assert str(path) in str(error) and "expected" in str(error) and "found" in str(error)
        return False
    return True


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def scene_folder(tmp_path):
    return write_scene(tmp_path / "train" / "scene", frames=(0, 1))


# --------------------------------------------------------------------------------------------------------------- .ply


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("polygons", ["triangles", "quads", "mixed", None])
def test_a_ply_of_any_encoding_gives_the_same_points_and_triangles(tmp_path, encoding, polygons):
    coord, triangles = grid_mesh()
    faces = {"triangles": triangles.tolist(), "quads": [[0, 1, 7, 6], [1, 2, 8, 7]], "mixed": [[0, 1, 7, 6], [1, 2, 8]],
             None: None}[polygons]
    columns = {"quality": ("short", [-7] * 30), **mesh_columns(coord, range(30)), "nx": ("double", [0.0] * 30),
               "ny": ("double", [2.0] * 30), "nz": ("double", [0.0] * 30)}
    (tmp_path / "a.ply").write_bytes(ply_bytes(columns, faces, encoding))
    mesh = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(mesh["coord"], coord)
    assert mesh["coord"].dtype == np.float32 and mesh["color"].dtype == np.uint8 and mesh["normal"].dtype == np.float32
    np.testing.assert_array_equal(mesh["color"][:, 2], (80 + 3 * np.arange(30)) % 256)
    np.testing.assert_array_equal(mesh["normal"], np.tile([0, 1, 0], (30, 1)))
    np.testing.assert_array_equal(mesh["label"], np.arange(30))
    expected = {"triangles": triangles, "quads": [[0, 1, 7], [0, 7, 6], [1, 2, 8], [1, 8, 7]],
                "mixed": [[0, 1, 7], [0, 7, 6], [1, 2, 8]]}
    if polygons is None:
        assert mesh["faces"] is None
    else:
        np.testing.assert_array_equal(mesh["faces"], expected[polygons])


@pytest.mark.parametrize("names", ["red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue"])
@pytest.mark.parametrize(("kind", "values"), [("uchar", [0, 51, 255]), ("float", [0.0, 0.2, 1.0]),
                                              ("float", [0.0, 51.0, 255.0]), ("ushort", [0, 51 * 257, 65535])])
def test_colours_of_any_name_and_range_become_bytes(tmp_path, names, kind, values):
    columns = {axis: ("double", [0.0, 1e6 + 0.25, 2.0]) for axis in "xyz"}
    (tmp_path / "a.ply").write_bytes(ply_bytes(columns | dict.fromkeys(names.split(), (kind, values))))
    mesh = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(mesh["color"], np.repeat([[0], [51], [255]], 3, 1))
    assert mesh["coord"].dtype == np.float64 and mesh["coord"][1, 0] == 1e6 + 0.25
    assert mesh["normal"] is mesh["label"] is mesh["faces"] is None


def test_elements_and_lists_that_nobody_asked_for_are_passed_over(tmp_path):
    head = ("ply\r\nformat ascii 1.0\r\nobj_info x\r\nelement camera 2\r\nproperty list uchar float view\r\n"
            "property float f\r\nelement vertex 3\r\nproperty float x\r\nproperty float y\r\nproperty float z\r\n"
            "element face 1\r\nproperty list uchar float texcoord\r\nproperty list uchar int vertex_index\r\n"
            "element edge 1\r\nproperty int a\r\nend_header\r\n")
    body = "2 0.5 0.5 1\r\n0 9\r\n0 0 0\r\n1 0 0\r\n0 1 0\r\n2 0.1 0.2 3 0 1 2\r\n7"
    (tmp_path / "a.ply").write_bytes((head + body).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(mesh["coord"], [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(mesh["faces"], [[0, 1, 2]])


def ply(body, vertices=1, properties=XYZ, encoding="ascii", face=""):
    return f"ply\nformat {encoding} 1.0\nelement vertex {vertices}\n{properties}{face}end_header\n{body}"


FACE = "element face 1\nproperty list uchar int vertex_index\n"


@pytest.mark.parametrize(("text", "reason"), [
    ("", "a whole .ply"), ("solid cube", "no end_header"), ("ply\nformat ascii 1.0\nelement vertex 1", "no end_header"),
    ("ply\nelement vertex 1\nend_header\n", "line 2: expected one of {format"), (ply("0 0 0\n", -5), "negative"),
    ("ply\nformat ascii 1.0\nelement face 0\nend_header\n", "'vertex'"), (ply("", vertices=0), "at least one point"),
    (ply("1 2\n", properties="property float x\nproperty float z\n"), "vertex properties x y z, found x, z"),
    (ply("1 0 0 0\n", properties=XYZ.replace("float x", "list uchar float x")), "expected numbers, found object"),
    (ply("0 0 0\n", 2**60), f"{3 * 2**60} numbers announced"), (ply("0 0 nan\n"), "finite coordinates, found 1 of 1"),
    (ply("0", 2**60, encoding="binary_little_endian"), f"{3 * 2**60} numbers announced"),
    (ply("0 0 0\n" * 99, 90, encoding="binary_big_endian"), "early end-of-file"), (ply("0 a 0\n"), "malformed input"),
    (ply("0 0 0\n\n0 0 0\n", 2), "row 1: property 'x': early end-of-line"), (ply("0 0 0 0\n"), "expected end-of-line"),
    (ply("0 0 0 0\n", properties=XYZ + "property float x\n"), "two properties with same name"),
    (ply("0 0 0\n3 0 0 1\n", face=FACE), "faces of vertices 0..0, found 0..1"),
    (ply("0 0 0\n900 0 0 0\n", face=FACE), "a whole .ply"),
    (ply("0 0 0 300 1 1\n", properties=XYZ + XYZ.replace("x", "red").replace("y\n", "green\n").replace("z", "blue")),
     "colours in 0..255, or floats in 0..1, found 1.0..300.0")])
def test_a_broken_ply_is_refused_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "broken.ply"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_ply(path)
    assert str(error.value).startswith(f"{path}: expected ") and reason in str(error.value)


@given(data=st.binary(max_size=300), encoding=st.sampled_from(ENCODINGS))
@QUICK
def test_any_bytes_behind_a_ply_header_are_a_mesh_or_a_clear_error(tmp_path, data, encoding):
    path = tmp_path / "a.ply"
    face = "element face 2\nproperty list int uchar vertex_index\n"
    path.write_bytes(ply("", 2, encoding=encoding, face=face).encode() + data)
    scene_or_clear_error(path, lambda: read_ply(path))


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_a_mesh_of_triangles_takes_no_more_than_twice_its_file_in_memory(tmp_path, encoding):
    coord, faces = grid_mesh(180, 150)
    (tmp_path / "a.ply").write_bytes(data := ply_bytes(mesh_columns(coord), faces, encoding))
    assert peak_memory(lambda: read_ply(tmp_path / "a.ply")) < 2 * len(data)


# ------------------------------------------------------------------------------------------------------ any other scan


def test_a_ply_is_a_scan_with_what_it_has_and_what_it_lacks_is_said(tmp_path):
    (coord, faces), path = grid_mesh(), tmp_path / "a.ply"
    path.write_bytes(ply_bytes(mesh_columns(coord), faces))
    scene, notes = read_scan(path)
    assert scene["name"] == "a" and notes == ["no frames: 3D only"] and not scene["origin"].any()
    for key in ("coord", "color", "faces"):
        np.testing.assert_array_equal(scene[key], read_ply(path)[key])
    assert all(scene[key] is None for key in ("normal", "segment", "instance", "superpoint"))
    far = coord + np.array([431_000.25, 5_290_000.5, 320])  # f64, and millimetres matter
    path.write_bytes(ply_bytes({axis: ("double", far[:, i].tolist()) for i, axis in enumerate("xyz")}))
    scene, notes = read_scan(path)
    assert notes == ["no colours: taken as grey", "no frames: 3D only"] and (scene["color"] == 127).all()
    assert scene["coord"].dtype == np.float32 and np.abs(scene["coord"]).max() < 4
    np.testing.assert_allclose(scene["coord"] + scene["origin"], far, atol=1e-5)


def test_npy_and_npz_of_points_are_read(tmp_path):
    coord, color = grid_mesh()[0], np.random.default_rng(0).integers(0, 256, (30, 3)).astype(np.uint8)
    np.save(tmp_path / "xyz.npy", coord * 1000)
    np.save(tmp_path / "xyzrgb.npy", np.concatenate([coord, color], 1))
    np.savez(tmp_path / "all.npz", points=coord, colors=color / 255, normals=2 * coord, other=np.zeros(3))
    scene, notes = read_scan(tmp_path / "xyz.npy")
    np.testing.assert_array_equal(scene["coord"], coord * 1000)
    assert notes[1] == "500 m long: are the units metres?"
    (scene, notes), (other, _) = read_scan(tmp_path / "xyzrgb.npy"), read_scan(tmp_path / "all.npz")
    assert notes == ["columns 4 to 6 taken as colours", "no frames: 3D only"]
    for found in (scene, other):
        np.testing.assert_array_equal(found["coord"], coord)
        np.testing.assert_array_equal(found["color"], color)
    np.testing.assert_allclose(np.linalg.norm(other["normal"], axis=1)[1:], 1, atol=1e-6)


def test_a_folder_is_a_scene_or_one_file_of_points_with_frames(scene_folder, tmp_path):
    scene, notes = read_scan(scene_folder)
    assert scene["frame_ids"] == [0, 1] and scene["segment"] is not None and notes == []
    for path in scene_folder.glob("*.npy"):
        path.rename(tmp_path / path.name)
    np.save(scene_folder / "scan.npy", np.load(tmp_path / "coord.npy"))
    np.savetxt(scene_folder / "pose" / "1.txt", np.full((4, 4), -np.inf))
    scene, notes = read_scan(scene_folder)
    assert scene["frame_ids"] == [0] and scene["name"] == "scene" and len(scene["coord"]) == 200
    assert notes == ["no colours: taken as grey", "1 frames skipped: their pose is not finite or not rigid"]
    np.save(scene_folder / "more.npy", scene["coord"])
    for path, found in ((scene_folder, 2), (tmp_path / "absent.ply", 0), (Path(__file__), 0)):
        with pytest.raises(FileNotFoundError, match=f"{path}: expected a scene folder .*, found {found} such"):
            read_scan(path)


POINTS = np.zeros((4, 3))


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.ply", b"ply\nnonsense", "a whole .ply"), ("a.npy", b"\x93NUMPY", "an array of numbers"),
    ("b.npy", np.zeros((5, 2)), "found (5, 2)"), ("c.npy", np.zeros(4), "shape (N, N), found (4,)"),
    ("d.npy", np.zeros((0, 3)), "at least one point"), ("e.npy", np.zeros((5, 4)), "shape (5, 3), found (5, 4)"),
    ("f.npy", np.array([["a"] * 3]), "expected numbers"), ("g.npz", b"PK\x03\x04", "an .npz with one of"),
    ("h.npz", {"coord": POINTS, "color": np.zeros((3, 3))}, "[color]: expected shape (4, 3), found (3, 3)"),
    ("i.npz", {"colour": POINTS}, "with one of ('coord', 'points', 'xyz'), found a file that cannot"),
    ("j.npz", {"coord": POINTS, "color": POINTS + 300}, "colours in 0..255, or floats in 0..1"),
    ("k.npz", {"coord": POINTS, "color": POINTS * np.nan}, "finite colours, found 4 of 4"),
    ("l.npy", np.array([[0, 0, np.inf], [0, 0, 0]]), "finite coordinates, found 1 of 2 points without; remove these")])
def test_a_file_that_holds_no_scan_is_refused_with_the_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    with pytest.raises(ValueError) as error:
        read_scan(path)
    assert str(error.value).startswith(str(path)) and reason in str(error.value) and "found" in str(error.value)


def scan_bytes(form):
    """A small scan in each form."""
    (coord, faces), out = grid_mesh(), io.BytesIO()
    if form in ENCODINGS:
        return ply_bytes(mesh_columns(coord, range(30)), faces, form)
    np.savez(out, coord=coord, color=np.zeros((30, 3))) if form == "npz" else np.save(out, coord)
    return out.getvalue()


@pytest.mark.parametrize("form", [*ENCODINGS, "npy", "npz"])
@DAMAGE
@QUICK
def test_a_damaged_file_is_a_scan_or_a_clear_error(tmp_path, form, how, place, value):
    path = tmp_path / f"a.{'ply' if form in ENCODINGS else form}"
    path.write_bytes(damage(scan_bytes(form), how, place, value))
    scene_or_clear_error(path, lambda: read_scan(path))


# ---------------------------------------------------------------------------------------------------- the scene folder


@pytest.mark.parametrize("form", ["as written here", "as Pointcept prepares it"])
def test_a_scene_folder_is_read_as_it_is(form, tmp_path):
    arrays = {}
    if form != "as written here":
        rng = np.random.default_rng(5)
        arrays = {"coord": rng.uniform(0, 3, (200, 3)), "color": rng.integers(0, 256, (200, 3)).astype(np.float32),
                  "segment20": rng.integers(-1, 20, (200, 1)).astype(np.int16), "segment200": np.zeros(200)}
    folder = write_scene(tmp_path / "scene", frames=(0, 1), **arrays)
    scene = load_scene(folder)
    assert scene["name"] == "scene" and scene["frame_ids"] == [0, 1] and scene["frames_skipped"] == 0
    for key, file, kind in (("coord", "coord", "f4"), ("color", "color", "u1"), ("normal", "normal", "f4"),
                            ("segment", "segment20", "i8"), ("instance", "instance", "i8")):
        stored = np.load(folder / f"{file}.npy")
        np.testing.assert_allclose(scene[key], stored.reshape(scene[key].shape), atol=1e-6)
        assert scene[key].dtype == np.dtype(kind) and len(scene[key]) == 200, key
    assert scene["superpoint"] is None


def test_optional_arrays_are_none_where_absent_and_superpoints_are_numbered_from_zero(tmp_path):
    bare = load_scene(write_scene(tmp_path / "bare", normal=None, segment20=None, instance=None))
    assert all(bare[key] is None for key in ("normal", "segment", "instance", "superpoint"))
    stored = np.random.default_rng(9).integers(5, 900, 200).astype(np.int32)
    scene = load_scene(write_scene(tmp_path / "stored", superpoint=stored, normal=np.tile([0, 3.0, np.nan], (200, 1)),
                                   color=np.full((200, 3), 0.2)))
    np.testing.assert_array_equal(np.unique(stored)[scene["superpoint"]], stored)
    assert (scene["normal"] == [0, 1, 0]).all() and (scene["color"] == 51).all()  # floats in 0..1 are recognised
    (tmp_path / "bare" / "color.npy").unlink()
    for name, missing in (("bare", r"color\.npy is missing"), ("none", r"none/coord\.npy is missing; a scene folder needs it")):
        with pytest.raises(FileNotFoundError, match=missing):
            load_scene(tmp_path / name)


def npy(name, array, match):
    """A case: this array in place of <name>.npy."""
    return pytest.param(lambda folder: np.save(folder / f"{name}.npy", array), match, id=f"{name} {match[:28]}")


def cut(file, keep, match):
    """A case: the file cut after a share (float) or a number (int) of its bytes."""
    def spoil(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    return pytest.param(spoil, match, id=f"{file} cut at {keep}")


def text(file, content, match):
    return pytest.param(lambda folder: (folder / file).write_text(content), match, id=f"{file} {content[:12]!r}")


def holed(rows, value):
    array = np.ones((200, 3), np.float32)
    array[rows, 1] = value
    return array


@pytest.mark.parametrize("spoil, match", [
    *[cut(f"{name}.npy", keep, rf"{name}\.npy: expected.*cannot be read")
      for name in ("coord", "color", "normal", "segment20", "instance", "superpoint") for keep in (0, 30, 0.8)],
    npy("coord", np.zeros((200, 4)), r"coord\.npy: expected shape \(N, 3\), found \(200, 4\)"),
    npy("coord", np.zeros(600), r"coord\.npy: expected shape \(N, 3\), found \(600,\)"),
    npy("coord", np.zeros((0, 3)), r"coord\.npy: expected at least one point"),
    npy("coord", np.zeros((200, 3), complex), r"coord\.npy: expected numbers, found complex"),
    npy("color", np.zeros((199, 3)), r"color\.npy: expected shape \(200, 3\), found \(199, 3\)"),
    npy("normal", np.zeros((201, 3)), r"normal\.npy: expected shape \(200, 3\), found \(201, 3\)"),
    npy("segment20", np.zeros(100, int), r"segment20\.npy: expected shape \(200,\), found \(100,\)"),
    npy("instance", np.zeros((200, 2), int), r"instance\.npy: expected shape \(200,\), found \(200, 2\)"),
    npy("superpoint", np.zeros(7, int), r"superpoint\.npy: expected shape \(200,\), found \(7,\)"),
    npy("segment20", np.full(200, 20), r"segment20\.npy: expected labels -1\.\.19, found 20\.\.20"),
    npy("segment20", np.full(200, -2), r"segment20\.npy: expected labels -1\.\.19, found -2\.\.-2"),
    npy("segment20", np.full(200, 255, np.uint8), r"expected labels -1\.\.19, found 255"),
    npy("coord", holed([3, 7], np.nan), r"scene/coord\.npy: expected finite coordinates, found 2 of 200 points"),
    npy("coord", holed(range(9), -np.inf), r"scene/coord\.npy: expected finite coordinates, found 9 of 200 points"),
    npy("color", holed([5], np.inf), r"scene/color\.npy: expected finite colours, found 1 of 200 points"),
    npy("color", holed([5], 256), r"color\.npy: expected colours in 0\.\.255, .* found 1.*256"),
    npy("color", holed([5], 256).astype(int), r"color\.npy: expected colours in 0\.\.255, .* found 1\.\.256"),
    npy("color", holed([5], -1), r"color\.npy: expected colours in 0\.\.255, .* found -1"),
    text("pose/1.txt", "1 0 0\n0 1 0\n0 0 1\n", r"1\.txt: expected shape \(4, 4\), found \(3, 3\)"),
    text("pose/1.txt", "1 0 0 0\n0 1 0\n", r"1\.txt: expected a matrix as text"),
    text("pose/1.txt", "no pose", r"1\.txt: expected a matrix as text"),
])
def test_a_bad_file_of_points_or_poses_is_named_with_what_is_wrong(spoil, match, scene_folder):
    np.save(scene_folder / "superpoint.npy", np.arange(200) // 10)
    spoil(scene_folder)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=match):
        load_scene(scene_folder)


def gray(mode):
    return pytest.param(lambda folder: Image.new(mode, (64, 48)).save(folder / "depth" / "1.png"),
                        rf"1\.png: expected an image.*one channel of 16 bit, found mode {mode}", id=f"depth as {mode}")


def renamed(source, target, match):
    return pytest.param(lambda folder: (folder / source).rename(folder / target), match, id=f"{source} as {target}")


@pytest.mark.parametrize("size", [(64, 48), (32, 24)], ids=["as it is", "resized"])
@pytest.mark.parametrize("spoil, match", [
    *[cut("color/1.jpg", keep, r"1\.jpg: expected an image") for keep in (0, 10, 300, 0.5, 0.9)],
    *[cut("depth/1.png", keep, r"1\.png: expected an image") for keep in (0, 10, 20, 33, 40, 50, 0.7, 0.8)],
    gray("RGB"), gray("L"), renamed("color/1.jpg", "depth/1.png", "1.* expected an image, found"),
    renamed("color/0.jpg", "depth/1.png", r"depth/1\.png: expected an image|color/0\.png: expected an image"),
    text("intrinsic/intrinsic_color.txt", "1 0\n0 1\n", r"intrinsic_color\.txt: expected shape \(3, 3\), found \(2, 2"),
    text("intrinsic/intrinsic_color.txt", "nan 0 1\n0 1 1\n0 0 1\n", r"intrinsic_color\.txt: expected finite numbers"),
    renamed("intrinsic/intrinsic_color.txt", "intrinsic/x.txt", r"intrinsic_color\.txt: expected a matrix")])
def test_a_bad_file_of_a_frame_is_named_with_what_is_wrong(spoil, match, size, scene_folder):
    spoil(scene_folder)
    with pytest.raises(ValueError, match=match):
        load_frames(scene_folder, [0, 1], size)


@pytest.mark.parametrize("name", ["color/0.jpg", "depth/0.png"])
def test_an_image_of_absurd_size_is_refused_before_it_is_unpacked(name, scene_folder):
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(out, "PNG")
    content = bytearray(out.getvalue())
    content[16:24] = struct.pack(">II", 9000, 9000)  # Pillow itself allows that
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (scene_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected an image, .* 9000x9000 pixels, more than"):
        load_frames(scene_folder, [0], (64, 48))


def test_frames_need_image_depth_and_a_finite_pose_and_come_in_numeric_order(tmp_path):
    scene_folder = write_scene(tmp_path / "scene", frames=(10, 2, 1, 30, 4, 5, 6, 7, 8))
    for name in ("depth/4.png", "color/5.jpg", "pose/30.txt"):
        (scene_folder / name).unlink()
    (scene_folder / "pose" / "notes.txt").write_text("not a pose")
    mirrored = np.diag([1.0, 1, -1, 1])
    for i, pose in ((6, np.full((4, 4), -np.inf)), (7, np.full((4, 4), np.nan)), (8, mirrored)):
        np.savetxt(scene_folder / "pose" / f"{i}.txt", pose)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene = load_scene(scene_folder)
    assert scene["frame_ids"] == [1, 2, 10] and scene["frames_skipped"] == 3
    for i in (1, 2, 10):
        np.savetxt(scene_folder / "pose" / f"{i}.txt", mirrored)
    with pytest.warns(UserWarning, match="scene: none of its 8 images has .* used 3D-only") as caught:
        assert [load_scene(scene_folder)["frame_ids"] for _ in range(3)] == [[], [], []]
    assert len(caught) == 1


def test_images_intrinsics_and_depth_of_scannet_sizes_come_to_one_size(tmp_path):
    scene_folder = write_scene(tmp_path / "scene", frames=(0,), color_size=(1296, 968), depth_size=(640, 480))
    np.savetxt(scene_folder / "intrinsic" / "intrinsic_color.txt",
               [[1170.0, 0, 650, 0], [0, 1160, 480, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = np.zeros((968, 1296, 3), np.uint8)
    image[:, 648:] = 255  # both halved at the same place
    Image.fromarray(image).save(scene_folder / "color" / "0.jpg", quality=95)
    depth = np.full((480, 640), 1000, np.uint16)
    depth[:, 320:] = 2345
    Image.fromarray(depth).save(scene_folder / "depth" / "0.png")
    frames = load_frames(scene_folder, [0], (160, 120))
    assert {key: (value.shape, value.dtype.str[1:]) for key, value in frames.items()} == {
        "image": ((1, 3, 120, 160), "u1"), "depth": ((1, 120, 160), "f4"), "world_to_camera": ((1, 4, 4), "f4"),
        "intrinsics": ((1, 3, 3), "f4")}
    expected = [[1170 / 8.1, 0, 650.5 / 8.1 - 0.5], [0, 1160 * 120 / 968, 480.5 * 120 / 968 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(frames["intrinsics"][0], expected, rtol=1e-6)
    np.testing.assert_array_equal(frames["depth"][0] == np.float32(1), np.tile(np.arange(160) < 80, (120, 1)))
    np.testing.assert_array_equal(frames["depth"][0] == np.float32(2.345), np.tile(np.arange(160) >= 80, (120, 1)))
    assert frames["image"][..., :78].max() < 30 and frames["image"][..., 82:].min() > 225
    without = load_frames(scene_folder, [0], (160, 120), colors=False)
    assert without["image"].shape == (1, 3, 0, 0)
    assert all(np.array_equal(without[key], frames[key]) for key in ("depth", "intrinsics", "world_to_camera"))


def test_depth_is_millimetres_and_not_interpolated_and_world_to_camera_inverts_the_pose(tmp_path):
    scene_folder = write_scene(tmp_path / "scene", frames=range(4))
    depth = np.random.default_rng(7).choice(np.array([0, 1000, 3001, 65535], np.uint16), (48, 64))
    Image.fromarray(depth).save(scene_folder / "depth" / "0.png")
    frames = load_frames(scene_folder, [3, 0, 2], (64, 48))
    np.testing.assert_array_equal(frames["depth"][1], depth.astype(np.float32) / 1000)
    for matrix, i in zip(frames["world_to_camera"], (3, 0, 2)):
        np.testing.assert_allclose(matrix @ camera_to_world(0.2 * i), np.eye(4), atol=1e-6)
    for size in ((32, 24), (50, 37), (100, 90)):
        values = np.unique(load_frames(scene_folder, [0], size)["depth"])
        np.testing.assert_array_equal(values, np.array([0, 1000, 3001, 65535], np.float32) / 1000)


# --------------------------------------------------------------------------------------------------- nothing runs code


@pytest.mark.parametrize("name", ["color/0.jpg", "depth/0.png"])
def test_a_postscript_file_in_place_of_an_image_is_refused_and_starts_no_ghostscript(name, scene_folder, monkeypatch):
    started = []
    real = Image.new("RGB", (64, 48))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: started.append(args) or real.im)
    real.save(scene_folder / name, "EPS")
    with pytest.raises(ValueError, match=f"{name}: expected an image"):
        load_frames(scene_folder, [0], (64, 48))
    assert not started
    with Image.open(scene_folder / name) as image:
        image.load()
    assert started  # the test can fail: this is what happens otherwise


@pytest.mark.parametrize("name", ["coord.npy", "color.npy", "normal.npy", "segment20.npy", "instance.npy",
                                  "superpoint.npy", "scan.npy", "coord.npz", "color.npz"])
@pytest.mark.parametrize("form", ["array of objects", "bare pickle"])
def test_no_array_ever_runs_what_is_pickled_in_it(name, form, scene_folder, tmp_path):
    touched, scene = tmp_path / "touched", name not in ("scan.npy", "coord.npz", "color.npz")
    path, objects = (scene_folder if scene else tmp_path) / name, np.array([Payload(touched)], dtype=object)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(touched)))
    elif name.endswith(".npy"):
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, **{"coord": np.zeros((5, 3)), name[:5]: objects})
    with pytest.raises(ValueError, match=f"{path}: expected an .*, found a file that cannot be read"):
        read_scan(scene_folder if scene else path)
    assert not touched.exists()
    with suppress(TypeError, IndexError):
        np.load(path, allow_pickle=True)[name[:5]]
    assert touched.exists()  # the test can fail: this is what happens otherwise


UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "eval", "exec", "compile", "__import__",
          "os.system", "os.popen", "torch.jit.load", "torch.hub.load", "yaml.load"}


def hazards(text):
    """The modules and calls of a source that could run what a file holds."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in modules if name.split(".")[0] in UNSAFE)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if (name in UNSAFE or (name == "torch.load" and given.get("weights_only") is not True)
                    or (name == "np.load" and given.get("allow_pickle", False) is not False)
                    or (name == "Image.open" and "formats" not in given)  # an EPS starts Ghostscript
                    or (name.startswith("subprocess.") and "shell" in given)):
                yield name


def test_no_source_reads_a_file_in_a_way_that_could_run_it():
    sources = [path for pattern in ("*.py", "scenes/*.py", "experiments/*.py") for path in ROOT.glob(pattern)
               if path.name not in ("conftest.py", "test_stability.py")]
    assert len(sources) > 15
    assert [(path.name, hazard) for path in sources for hazard in hazards(path.read_text())] == []
    for text in ("import pickle", "from pickle import loads", "import joblib.x", "torch.load(path)", "eval(text)",
                 "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=flag)", "Image.open(path)",
                 "subprocess.run(x, shell=True)"):
        assert len(list(hazards(text))) == 1, text


def test_the_file_copied_alone_reads_a_mesh_and_a_scene(tmp_path):
    shutil.copy(folder.__file__, tmp_path)
    (tmp_path / "a.ply").write_bytes(scan_bytes("ascii"))
    write_scene(tmp_path / "scene", frames=(0,))
    code = ("import sys; sys.path.insert(0, '.'); from folder import load_frames, read_scan\n"
            "assert read_scan('a.ply')[0]['faces'].shape == (40, 3) and read_scan('scene')[0]['frame_ids'] == [0]\n"
            "assert load_frames('scene', [0], (32, 24))['image'].shape == (1, 3, 24, 32)\n"
            "assert not {'torch', 'scipy', 'scenes', 'matplotlib'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
