"""ply.py: every form of a .ply; damaged files; memory. Also what test_scannet.py makes its files with."""

import shutil
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scenes import ply
from scenes.ply import read_ply


def grid_mesh(columns=6, rows=5):
    """A level sheet of (columns x rows) vertices at z = 0, 10 cm apart: coord (N, 3) f32, triangles (F, 3)."""
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    coord = np.stack([0.1 * x.ravel(), 0.1 * y.ravel(), 0 * x.ravel()], 1).astype(np.float32)
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    return coord, np.concatenate([np.stack([corner, corner + 1, corner + columns], 1),
                                  np.stack([corner + 1, corner + columns + 1, corner + columns], 1)])


def ply_bytes(columns, faces=None, encoding="binary_little_endian", list_types="uchar int"):
    """A .ply from {property name: (type, values)} and faces; written field by field."""
    names = {"uchar": "B", "ushort": "H", "int": "i", "uint": "I", "float": "f", "double": "d", "short": "h"}
    n = len(next(iter(columns.values()))[1])
    head = ["ply", f"format {encoding} 1.0", "comment made by a test", f"element vertex {n}"]
    head += [f"property {kind} {name}" for name, (kind, _) in columns.items()]
    if faces is not None:
        head += [f"element face {len(faces)}", f"property list {list_types} vertex_indices"]
    body = []
    order = ">" if "big" in encoding else "<"
    for row in zip(*(values for _, values in columns.values())):
        if encoding == "ascii":
            body.append((" ".join(str(v) for v in row) + "\n").encode())
        else:
            body.append(struct.pack(order + "".join(names[kind] for kind, _ in columns.values()), *row))
    for face in faces if faces is not None else ():
        if encoding == "ascii":
            body.append((" ".join(map(str, [len(face), *face])) + "\n").encode())
        else:
            length, index = (names[kind] for kind in list_types.split())
            body.append(struct.pack(f"{order}{length}{len(face)}{index}", len(face), *face))
    return "\n".join([*head, "end_header\n"]).encode() + b"".join(body)


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


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("polygons", ["triangles", "quads", "mixed", None])
def test_a_ply_of_any_encoding_gives_the_same_points_and_triangles(tmp_path, encoding, polygons):
    coord, triangles = grid_mesh()
    faces = {"triangles": triangles.tolist(), "quads": [[0, 1, 7, 6], [1, 2, 8, 7]], "mixed": [[0, 1, 7, 6], [1, 2, 8]],
             None: None}[polygons]
    columns = {"quality": ("short", [-7] * 30), **mesh_columns(coord, range(30)), "nx": ("double", [0.0] * 30),
               "ny": ("double", [1.0] * 30), "nz": ("double", [0.0] * 30)}
    (tmp_path / "a.ply").write_bytes(ply_bytes(columns, faces, encoding))
    mesh = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(mesh["coord"], coord)
    assert mesh["coord"].dtype == np.float32 and mesh["color"].dtype == np.uint8 and mesh["normal"].shape == (30, 3)
    np.testing.assert_array_equal(mesh["color"][:, 2], (80 + 3 * np.arange(30)) % 256)
    np.testing.assert_array_equal(mesh["label"], np.arange(30))
    if polygons is None:
        assert mesh["faces"] is None
    else:
        expected = {"triangles": triangles, "quads": [[0, 1, 7], [0, 7, 6], [1, 2, 8], [1, 8, 7]],
                    "mixed": [[0, 1, 7], [0, 7, 6], [1, 2, 8]]}[polygons]
        np.testing.assert_array_equal(mesh["faces"], expected)


@pytest.mark.parametrize("names", ["red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue"])
@pytest.mark.parametrize(("kind", "values"), [("uchar", [0, 51, 255]), ("float", [0.0, 0.2, 1.0]),
                                              ("float", [0.0, 51.0, 255.0]), ("ushort", [0, 51 * 257, 65535])])
def test_colours_of_any_name_and_range_become_bytes(tmp_path, names, kind, values):
    columns = {axis: ("double", [0.0, 1e6 + 0.25, 2.0]) for axis in "xyz"}
    columns |= dict.fromkeys(names.split(), (kind, values))
    (tmp_path / "a.ply").write_bytes(ply_bytes(columns))
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
    mesh = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(mesh["coord"], [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(mesh["faces"], [[0, 1, 2]])


def test_plys_of_the_plyfile_package_are_read(tmp_path):
    from plyfile import PlyData, PlyElement

    vertex = np.array([(0, 0, 1, 7), (1, 0, 2, 8), (0, 1, 3, 9)], [("x", "f8"), ("y", "f8"), ("z", "f4"), ("q", "u4")])
    face = np.empty(2, [("vertex_indices", "O"), ("flags", "i2")])
    face["vertex_indices"] = [np.array([0, 1, 2], "u4"), np.array([2, 1, 0], "u4")]
    elements = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face", len_types={
        "vertex_indices": "u2"}, val_types={"vertex_indices": "u4"})]
    for text, order in ((True, "="), (False, "<"), (False, ">")):
        PlyData(elements, text=text, byte_order=order).write(str(tmp_path / "a.ply"))
        mesh = read_ply(tmp_path / "a.ply")
        np.testing.assert_array_equal(mesh["coord"], [[0, 0, 1], [1, 0, 2], [0, 1, 3]])
        np.testing.assert_array_equal(mesh["faces"], [[0, 1, 2], [2, 1, 0]])


XYZ = "property float x\nproperty float y\nproperty float z\n"


@pytest.mark.parametrize(("text", "reason"), [
    ("", "an empty file"),
    ("solid cube", "a header from 'ply' to 'end_header'"),
    ("ply\nformat ascii 1.0\nelement vertex 1\n" + XYZ, "a header from 'ply' to 'end_header'"),
    ("ply\nelement vertex 1\n" + XYZ + "end_header\n0 0 0\n", "a line 'format"),
    ("ply\nformat ascii 2.0\nend_header\n", "a line of a .ply header, found 'format ascii 2.0'"),
    ("ply\nformat ascii 1.0\nelement vertex -5\n" + XYZ + "end_header\n", "found 'element vertex -5'"),
    ("ply\nformat ascii 1.0\nelement face 0\nend_header\n", "at least one vertex"),
    ("ply\nformat ascii 1.0\nelement vertex 1\nend_header\n0 0 0\n", "vertex properties x y z, found none"),
    (f"ply\nformat ascii 1.0\nelement vertex {2**60}\n{XYZ}end_header\n0 0 0\n", f"{2**60} rows of vertex"),
    (f"ply\nformat binary_little_endian 1.0\nelement vertex {2**60}\n{XYZ}end_header\n0", f"{2**60} rows of vertex"),
    (f"ply\nformat ascii 1.0\nelement a {10**19}\nelement vertex 1\n{XYZ}end_header\n0 0 nan\n", "finite coordinates"),
    (f"ply\nformat ascii 1.0\nelement vertex 2\n{XYZ}end_header\n0 0 0\n\n0 0 0\n", "2 lines of numbers"),
    (f"ply\nformat ascii 1.0\nelement vertex 1\n{XYZ}end_header\n0 zero 0\n", "3 numbers a line"),
    (f"ply\nformat ascii 1.0\nelement vertex 1\n{XYZ}end_header\n0 0 0 0 0\n", "3 numbers a line"),
    (f"ply\nformat ascii 1.0\nelement vertex 1\n{XYZ}element face 1\nproperty list uchar int vertex_index\nend_header\n"
     "0 0 0\n3 0 0 1\n", r"faces of vertices 0..0, found 0..1"),
    (f"ply\nformat ascii 1.0\nelement vertex 1\n{XYZ}element face 1\nproperty list uchar int vertex_index\nend_header\n"
     "0 0 0\n900 0 0 0\n", "numbers and lists with their length before them"),
    (f"ply\nformat ascii 1.0\nelement vertex 1\n{XYZ}property float x\nend_header\n0 0 0 0\n", "different names"),
])
def test_a_broken_ply_is_refused_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "broken.ply"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_ply(path)
    assert str(error.value).startswith(f"{path}: expected ") and reason in str(error.value)


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@DAMAGE
@QUICK
def test_a_damaged_ply_is_a_mesh_or_a_clear_error(tmp_path, encoding, how, place, value):
    coord, faces = grid_mesh()
    path = tmp_path / "a.ply"
    path.write_bytes(damage(ply_bytes(mesh_columns(coord, range(30)), faces, encoding), how, place, value))
    scene_or_clear_error(path, lambda: read_ply(path))


@given(data=st.binary(max_size=300), encoding=st.sampled_from(["ascii", "binary_little_endian"]))
@QUICK
def test_any_bytes_behind_a_ply_header_are_a_mesh_or_a_clear_error(tmp_path, data, encoding):
    path = tmp_path / "a.ply"
    path.write_bytes(f"ply\nformat {encoding} 1.0\nelement vertex 2\n{XYZ}element face 2\n"
                     "property list int uchar vertex_index\nend_header\n".encode() + data)
    scene_or_clear_error(path, lambda: read_ply(path))


def test_reading_takes_no_more_than_twice_the_file_in_memory(tmp_path):
    coord, faces = grid_mesh(180, 150)
    spare = 2 * 2**20  # what a piece of text and a piece of rows take while they are converted
    for encoding in ("ascii", "binary_little_endian", "binary_big_endian"):
        (tmp_path / "a.ply").write_bytes(data := ply_bytes(mesh_columns(coord), faces, encoding))
        assert peak_memory(lambda: read_ply(tmp_path / "a.ply")) < 2 * len(data) + spare


def test_the_file_copied_alone_reads_a_mesh_and_needs_numpy_alone(tmp_path):
    shutil.copy(ply.__file__, tmp_path)
    (tmp_path / "a.ply").write_bytes(ply_bytes(mesh_columns(grid_mesh()[0]), grid_mesh()[1]))
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from scenes import ply
mesh = ply.read_ply({str(tmp_path / "a.ply")!r})
assert mesh["coord"].shape == (30, 3) and mesh["faces"].shape == (40, 3)
assert not {{"torch", "PIL", "scipy", "data"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
