"""scenes/folder.py: scene folders and scans of any form, good, bad and hostile. Other tests take its file makers."""

import pickle
import re
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from plyfile import PlyData, PlyElement

from conftest import Payload
from scenes.folder import load_frames, load_scene, read_ply, read_scan

ENCODINGS = ("ascii", "binary_little_endian", "binary_big_endian")
SCENE_ARRAYS = ("coord.npy", "color.npy", "normal.npy", "segment20.npy", "instance.npy", "superpoint.npy")
XYZ = "property float x\nproperty float y\nproperty float z\n"
FACE = "element face 1\nproperty list uchar int vertex_index\n"
POINTS = np.zeros((4, 3))


def camera_to_world(yaw=0.0):
    """A level camera (4, 4), 3 m before the middle of the scenes below; yaw 0 looks along world +y."""
    c, s = np.cos(yaw), np.sin(yaw)  # columns: right, down, forward, position
    return np.array([[c, 0, -s, 2 + 3 * s], [s, 0, c, 3 - 3 * c], [0, -1, 0, 1], [0, 0, 0, 1]])


def write_scene(folder, points=200, frames=(), size=(64, 48), seed=0, **arrays):
    """Write a scene folder: points in a box around (2, 3, 1) m and frames (ids) that look at it; return the folder.

    Frame i has a depth map of 1000 + 10 i mm. arrays: .npy files by name, in place of those made (None = leave out).
    """
    rng = np.random.default_rng(seed)
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    coord = rng.uniform((1, 2.2, 0.4), (3, 3.8, 1.6), (points, 3)).astype(np.float32)
    normal = rng.normal(size=coord.shape)
    made = {"coord": coord, "color": rng.integers(0, 256, (points, 3)).astype(np.uint8),
            "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
            "segment20": rng.integers(-1, 20, points), "instance": rng.integers(-1, 4, points)}
    for name, array in {**made, **arrays}.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    width, height = size
    camera = np.eye(4)
    camera[:2, :3] = [[0.9 * width, 0, 0.47 * width], [0, 0.85 * width, 0.52 * height]]
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", camera)
    for i in frames:
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(folder / "color" / f"{i}.jpg")
        Image.fromarray(np.full((height, width), 1000 + 10 * i, np.uint16)).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", camera_to_world(0.2 * i))
    return folder


def sheet(columns=6, rows=5):
    """A level sheet of (columns x rows) points 10 cm apart: coord (N, 3) f32, color (N, 3) u8, triangles (F, 3)."""
    x, y = (a.ravel() for a in np.meshgrid(np.arange(columns), np.arange(rows)))
    first = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    faces = first[:, None, None] + [[0, 1, columns], [1, columns + 1, columns]]
    color = (np.arange(len(x))[:, None] * 3 + [0, 40, 80]) % 256
    return np.stack([x, y, 0 * x], 1).astype(np.float32) / 10, color.astype(np.uint8), faces.reshape(-1, 3)


def write_ply(path, coord, color=None, faces=None, encoding="binary_little_endian", names="red green blue", **columns):
    """A .ply with coordinates, colours and columns of the arrays' types, and a property that nobody asked for."""
    columns |= {"quality": np.arange(len(coord)).astype("i2")} | dict(zip("xyz", np.transpose(coord)))
    columns |= {} if color is None else dict(zip(names.split(), np.transpose(color)))
    elements = [PlyElement.describe(np.rec.fromarrays(list(columns.values()), names=list(columns)), "vertex")]
    if faces is not None:
        rows = np.array([(np.array(face, "i4"),) for face in faces], [("vertex_indices", "O")])
        elements.append(PlyElement.describe(rows, "face"))
    PlyData(elements, encoding == "ascii", ">" if "big" in encoding else "<").write(str(path))
    return path


def damage(data, how, place, value):
    """The bytes of a file cut short, with bits turned, with bytes replaced by a large number, or swapped about."""
    at = int(place * len(data))
    head, byte, tail = data[:at], data[at : at + 1], data[at + 1 :]
    return {"cut": head, "flip": head + bytes(b ^ (1 << value % 8) for b in byte) + tail, "swap": byte + tail + head,
            "large": head + b"\xff" * 8 + tail[7:], "digits": head + b"9" * 12 + byte + tail}[how]


DAMAGE = given(how=st.sampled_from(["cut", "flip", "large", "digits", "swap"]), place=st.floats(0, 1),
               value=st.integers(0, 255))
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scene_or_clear_error(path, read):
    """Run read; a ValueError must name the file, what was expected and what was found."""
    try:
        read()
    except ValueError as error:
        assert str(path) in str(error) and "expected" in str(error) and "found" in str(error)


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("faces", "expected"), [
    ([[0, 1, 7, 6], [1, 2, 8, 7]], [[0, 1, 7], [0, 7, 6], [1, 2, 8], [1, 8, 7]]), (None, None), [sheet()[2]] * 2,
    ([[0, 1, 7, 6], [1, 2, 8]], [[0, 1, 7], [0, 7, 6], [1, 2, 8]])], ids=["quads", "no faces", "triangles", "mixed"])
def test_a_ply_of_any_encoding_gives_the_same_points_and_triangles(tmp_path, encoding, faces, expected):
    coord, color, _ = sheet()
    mesh = read_ply(write_ply(tmp_path / "a.ply", coord, color, faces, encoding, nx=np.zeros(30), ny=np.full(30, 2.0),
                              nz=np.zeros(30), label=np.arange(30).astype(np.uint16)))
    assert mesh["coord"].dtype == np.float32 and mesh["color"].dtype == np.uint8 and mesh["normal"].dtype == np.float32
    for key, values in (("coord", coord), ("color", color), ("label", np.arange(30)), ("faces", expected),
                        ("normal", np.tile([0, 1, 0], (30, 1)))):
        np.testing.assert_array_equal(mesh[key], values, err_msg=key)


@pytest.mark.parametrize("names", ["red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue"])
@pytest.mark.parametrize(("kind", "values"), [("u1", [0, 51, 255]), ("f4", [0.0, 0.2, 1.0]), ("f8", [0.0, 51.0, 255.0]),
                                              ("u2", [0, 51 * 257, 65535])])
def test_colours_of_any_name_and_range_become_bytes(tmp_path, names, kind, values):
    coord, color = np.repeat([[0], [1e6 + 0.25], [2]], 3, 1), np.repeat(np.array(values, kind)[:, None], 3, 1)
    mesh = read_ply(write_ply(tmp_path / "a.ply", coord, color, names=names))
    np.testing.assert_array_equal(mesh["color"], np.repeat([[0], [51], [255]], 3, 1))
    np.testing.assert_array_equal(mesh["coord"], coord)
    assert mesh["coord"].dtype == np.float64 and mesh["normal"] is mesh["label"] is mesh["faces"] is None


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


@given(data=st.binary(max_size=300), encoding=st.sampled_from(ENCODINGS))
@QUICK
def test_any_bytes_behind_a_ply_header_are_a_mesh_or_a_clear_error(tmp_path, data, encoding):
    path, face = tmp_path / "a.ply", "element face 2\nproperty list int uchar vertex_index\n"
    path.write_bytes(ply("", 2, encoding=encoding, face=face).encode() + data)
    scene_or_clear_error(path, lambda: read_ply(path))


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_a_mesh_of_triangles_takes_no_more_than_twice_its_file_in_memory(tmp_path, encoding):
    path = write_ply(tmp_path / "a.ply", *sheet(120, 100), encoding)
    assert peak_memory(lambda: read_ply(path)) < 2 * path.stat().st_size


def test_a_ply_is_a_scan_with_what_it_has_and_what_it_lacks_is_said(tmp_path):
    coord, color, faces = sheet()
    scene, notes = read_scan(write_ply(tmp_path / "a.ply", coord, color, faces))
    assert scene["name"] == "a" and notes == ["no frames: 3D only"]
    np.testing.assert_array_equal(scene["file_to_world"], np.eye(4))
    for key, values in (("coord", coord), ("color", color), ("faces", faces)):
        np.testing.assert_array_equal(scene[key], values)
    assert all(scene[key] is None for key in ("normal", "segment", "instance", "superpoint"))
    far = coord + np.array([431_000.25, 5_290_000.5, 320])  # f64, and millimetres matter
    scene, notes = read_scan(write_ply(tmp_path / "far.ply", far))
    assert notes == ["no colours: taken as grey", "no frames: 3D only"] and (scene["color"] == 127).all()
    assert scene["coord"].dtype == np.float32 and np.abs(scene["coord"]).max() < 4
    np.testing.assert_allclose(scene["coord"] - scene["file_to_world"][:3, 3], far, atol=1e-5)


def test_npy_and_npz_of_points_are_read(tmp_path):
    coord, color, _ = sheet()
    np.save(tmp_path / "xyz.npy", coord * 1000)
    np.save(tmp_path / "xyzrgb.npy", np.concatenate([coord, color], 1))
    np.savez(tmp_path / "all.npz", points=coord, colors=color / 255, normals=2 * coord, other=np.zeros(3))
    scene, notes = read_scan(tmp_path / "xyz.npy")
    np.testing.assert_array_equal(scene["coord"], coord * 1000)
    assert notes[1] == "0..500 long: the units look like dm (a guess), --scale 0.1 makes metres"
    (scene, notes), (other, _) = read_scan(tmp_path / "xyzrgb.npy"), read_scan(tmp_path / "all.npz")
    assert notes == ["columns 4 to 6 taken as colours", "no frames: 3D only"]
    for found in (scene, other):
        np.testing.assert_array_equal(found["coord"], coord)
        np.testing.assert_array_equal(found["color"], color)
    np.testing.assert_allclose(np.linalg.norm(other["normal"], axis=1)[1:], 1, atol=1e-6)


def test_a_folder_is_a_scene_or_one_file_of_points_with_frames(tmp_path):
    scene_folder = write_scene(tmp_path / "scene", frames=(0, 1))
    scene, notes = read_scan(scene_folder)
    assert scene["frame_ids"] == [0, 1] and scene["segment"] is not None and notes == []
    for path in scene_folder.glob("*.npy"):
        path.rename(tmp_path / path.name)
    np.save(scene_folder / "scan.npy", np.load(tmp_path / "coord.npy"))
    np.savetxt(scene_folder / "pose" / "1.txt", np.full((4, 4), -np.inf))
    scene, notes = read_scan(scene_folder)
    assert scene["frame_ids"] == [0] and scene["name"] == "scene" and len(scene["coord"]) == 200
    assert notes == ["no colours: taken as grey", "1 of 2 frames have a pose that is not finite: 1"]
    np.save(scene_folder / "more.npy", scene["coord"])
    for path, found in ((scene_folder, 2), (tmp_path / "absent.ply", 0), (Path(__file__), 0)):
        with pytest.raises(FileNotFoundError, match=f"{path}: expected a scene folder .*, found {found} such"):
            read_scan(path)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.ply", "", "a whole .ply"), ("a.ply", "solid cube", "no end_header"), ("a.ply", ply("0 0 0\n", -5), "negative"),
    ("a.ply", "ply\nformat ascii 1.0\nelement face 0\nend_header\n", "vertex properties x y z, found none"),
    ("a.ply", ply("", vertices=0), "at least one point"), ("a.ply", ply("0 a 0\n"), "a file that cannot be read"),
    ("a.ply", ply("1 2 3\n", properties=XYZ.replace("float y", "float w")), "vertex properties x y z, found x, w"),
    ("a.ply", ply("1 0 0 0\n", properties=XYZ.replace("float x", "list uchar float x")), "a file that cannot be read"),
    ("a.ply", ply("0 0 0\n", 2**60), f"{3 * 2**60} numbers announced"), ("a.ply", ply("0 0 nan\n"), "found 1 of 1"),
    ("a.ply", ply("0 0 0\n" * 99, 90, encoding="binary_big_endian"), "270 numbers announced in 594 bytes"),
    ("a.ply", ply("0 0 0\n3 0 0 1\n", face=FACE), "faces of vertices 0..0, found 0..1"),
    ("a.ply", ply("0 0 0 300 1 1\n", properties=XYZ + XYZ.replace(" x", " r").replace(" y", " g").replace(" z", " b")),
     "colours in 0..255, or floats in 0..1, found 1.0..300.0"),
    ("a.npy", b"\x93NUMPY", "an array of numbers"), ("g.npz", b"PK\x03\x04", "an .npz with one of"),
    ("b.npy", np.zeros((5, 2)), "found (5, 2)"), ("c.npy", np.zeros(4), "shape (N, N), found (4,)"),
    ("d.npy", np.zeros((0, 3)), "at least one point"),
    ("e.npy", np.zeros((5, 4)), "red green blue (alpha); an .npz may hold normals, found (5, 4)"),
    ("f.npy", np.array([["a"] * 3]), "expected numbers"),
    ("h.npz", {"coord": POINTS, "color": np.zeros((3, 3))}, "[color]: expected shape (4, 3), found (3, 3)"),
    ("i.npz", {"colour": POINTS}, "with one of ('coord', 'points', 'xyz'), found a file that cannot"),
    ("j.npz", {"coord": POINTS, "color": POINTS + 300}, "colours in 0..255, or floats in 0..1"),
    ("k.npz", {"coord": POINTS, "color": POINTS * np.nan}, "finite colours, found 4 of 4"),
    ("l.npy", np.array([[0, 0, np.inf], [0, 0, 0]]), "finite coordinates, found 1 of 2 points without; remove these")])
def test_a_file_that_holds_no_scan_is_refused_with_the_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if isinstance(content, bytes | str):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    with pytest.raises(ValueError, match=f"{path}.*: expected .*, found ") as error:
        read_scan(path)
    assert reason in str(error.value)


@pytest.mark.parametrize("form", [*ENCODINGS, "npy", "npz"])
@DAMAGE
@QUICK
def test_a_damaged_file_is_a_scan_or_a_clear_error(tmp_path, form, how, place, value):
    coord, color, faces = sheet()
    path = tmp_path / f"a.{'ply' if form in ENCODINGS else form}"
    if form in ENCODINGS:
        write_ply(path, coord, color, faces, form, label=np.arange(30).astype(np.uint16))
    else:
        np.savez(path, coord=coord, color=color) if form == "npz" else np.save(path, coord)
    path.write_bytes(damage(path.read_bytes(), how, place, value))
    scene_or_clear_error(path, lambda: read_scan(path))


@pytest.mark.parametrize("form", ["as written here", "as Pointcept prepares it"])
def test_a_scene_folder_is_read_as_it_is(form, tmp_path):
    rng = np.random.default_rng(5)
    arrays = {} if form == "as written here" else {
        "coord": rng.uniform(0, 3, (200, 3)), "color": rng.integers(0, 256, (200, 3)).astype(np.float32),
        "segment20": rng.integers(-1, 20, (200, 1)).astype(np.int16), "segment200": np.zeros(200)}
    path = write_scene(tmp_path / "scene", frames=(0, 1), **arrays)
    scene = load_scene(path)
    assert scene["name"] == "scene" and scene["frame_ids"] == [0, 1] and scene["notes"] == []
    for key, file, kind in (("coord", "coord", "f4"), ("color", "color", "u1"), ("normal", "normal", "f4"),
                            ("segment", "segment20", "i8"), ("instance", "instance", "i8")):
        stored = np.load(path / f"{file}.npy")
        np.testing.assert_allclose(scene[key], stored.reshape(scene[key].shape), atol=1e-6)
        assert scene[key].dtype == np.dtype(kind) and len(scene[key]) == 200, key


def test_optional_arrays_are_none_where_absent_and_superpoints_are_numbered_from_zero(tmp_path):
    bare = load_scene(write_scene(tmp_path / "bare", normal=None, segment20=None, instance=None))
    assert all(bare[key] is None for key in ("normal", "segment", "instance", "superpoint"))
    stored = np.random.default_rng(9).integers(5, 900, 200).astype(np.int32)
    normal = np.where(np.arange(200)[:, None] < 9, [0, 3, np.nan], [0, 3.0, 0])
    scene = load_scene(write_scene(tmp_path / "stored", superpoint=stored, normal=normal,
                                   color=np.full((200, 3), 0.2)))
    np.testing.assert_array_equal(np.unique(stored)[scene["superpoint"]], stored)
    assert (scene["normal"][9:] == [0, 1, 0]).all() and not scene["normal"][:9].any()
    assert (scene["color"] == 51).all()  # floats in 0..1 are recognised
    (tmp_path / "bare" / "color.npy").unlink()
    for missing in ("bare/color.npy", "none/coord.npy"):
        with pytest.raises(FileNotFoundError, match=f"{missing} is missing; a scene folder needs it"):
            load_scene((tmp_path / missing).parent)


def spoil(path, content):
    """Put in place of a file an array, text, a picture (form, mode, size), or its own bytes up to a place."""
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        if isinstance(content, tuple):
            Image.new(*content[1:]).save(path, content[0])
            content = 100 if content[0] == "PNG" else None  # the head must do
        path.write_bytes(path.read_bytes()[:content])


def holed(rows, value, kind=np.float32):
    return np.where(np.arange(200)[:, None] < rows, value, np.ones(3)).astype(kind)


@pytest.mark.parametrize(("files", "content", "said"), [
    *[(" ".join(SCENE_ARRAYS), end, "an array of numbers, found a file that cannot be read") for end in (0, 30, -300)],
    ("coord.npy", np.zeros((200, 4)), "shape (N, 3), found (200, 4)"), ("coord.npy", np.zeros((0, 3)), "at least one"),
    ("coord.npy", np.zeros((200, 3), complex), "numbers, found complex"),
    ("color.npy normal.npy", np.zeros((199, 3)), "shape (200, 3), found (199, 3)"),
    ("instance.npy segment20.npy superpoint.npy", np.zeros((200, 2), int), "shape (200,), found (200, 2)"),
    *[("segment20.npy", np.full(200, label), f"labels -1..19, found {label}: ") for label in (20, -2)],
    *[("coord.npy", holed(2, bad), "finite coordinates, found 2 of 200 points") for bad in (np.nan, -np.inf)],
    ("color.npy", holed(1, np.inf), "finite colours, found 1 of 200 points"),
    ("color.npy", holed(9, 256), "colours in 0..255, or floats in 0..1, found 1.0..256.0"),
    ("color.npy", holed(9, 256, int), "colours in 0..255, or floats in 0..1, found 1..256"),
    ("color.npy", holed(9, -1), "colours in 0..255, or floats in 0..1, found -1.0..1.0"),
    ("pose/1.txt", "1 0 0\n0 1 0\n0 0 1\n", "shape (4, 4), found (3, 3)"),
    *[("pose/1.txt intrinsic/intrinsic_color.txt", x, "a matrix as text") for x in ("1 0 0 0\n0 1 0\n", "no pose")],
    ("intrinsic/intrinsic_color.txt", "1 0\n0 1\n", "shape (3, 3), found (2, 2)"),
    ("intrinsic/intrinsic_color.txt", "nan 0 1\n0 1 1\n0 0 1\n", "finite numbers"),
    *[("color/1.jpg", keep, "an image, found") for keep in (0, 10, 300, 1500, -300)],
    *[("depth/1.png", keep, "an image, found") for keep in (0, 10, 20, 33, 40, 50, -40, -25)],
    *[("depth/1.png", ("PNG", mode, (64, 48)), f"of 16 bit or floats, found mode {mode}") for mode in ("RGB", "L")],
    ("depth/1.png", ("JPEG", "RGB", (64, 48)), "one channel of 16 bit or floats, found mode RGB"),
    ("color/1.jpg depth/1.png", ("PNG", "1", (8300, 8200)), "8300x8200 pixels, more than"),  # Pillow itself allows that
    ("color/1.jpg depth/1.png", ("EPS", "RGB", (64, 48)), "cannot identify image file")])  # Ghostscript would run it
def test_a_bad_file_is_named_with_what_is_wrong(files, content, said, tmp_path):
    for file in files.split():
        scene = write_scene(tmp_path / file.replace("/", "_"), frames=(0, 1), superpoint=np.arange(200) // 10)
        spoil(scene / file, content)
        for size in ((64, 48), (32, 24)):
            with np.errstate(all="ignore"), pytest.raises(ValueError) as error:
                load_scene(scene)
                load_frames(scene, [0, 1], size)
            assert str(error.value).startswith(f"{scene / file}: expected ") and said in str(error.value)


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
    assert scene["frame_ids"] == [1, 2, 10] and scene["notes"] == [
        "1 of 9 frames have no depth: 4", "1 of 9 frames have no color: 5", "1 of 9 frames have no pose: 30",
        "2 of 9 frames have a pose that is not finite: 6, 7", "1 of 9 frames have a pose that is not rigid: 8"]
    for i in (1, 2, 10):
        np.savetxt(scene_folder / "pose" / f"{i}.txt", mirrored)
    with pytest.warns(UserWarning, match="scene: 3D-only, none of 8 images used: .*not rigid: 1, 2, 8, 10") as caught:
        assert [load_scene(scene_folder)["frame_ids"] for _ in range(3)] == [[], [], []]
    assert len(caught) == 1


def test_images_intrinsics_and_depth_of_scannet_sizes_come_to_one_size(tmp_path):
    scene_folder = write_scene(tmp_path / "scene", frames=(0,), size=(1296, 968))
    np.savetxt(scene_folder / "intrinsic" / "intrinsic_color.txt", [[1170, 0, 650], [0, 1160, 480], [0, 0, 1]])
    right = np.arange(1296) >= 648  # both are halved at the same place
    Image.fromarray(np.tile(255 * right[:, None], (968, 1, 3)).astype(np.uint8)).save(scene_folder / "color" / "0.jpg")
    depth = np.tile(np.where(right[4::2][:640], 2345, 1000), (480, 1)).astype(np.uint16)
    Image.fromarray(depth).save(scene_folder / "depth" / "0.png")
    frames = load_frames(scene_folder, [0], (160, 120))
    assert {key: (value.shape, value.dtype.str[1:]) for key, value in frames.items()} == {
        "image": ((1, 3, 120, 160), "u1"), "depth": ((1, 120, 160), "f4"), "world_to_camera": ((1, 4, 4), "f4"),
        "intrinsics": ((1, 3, 3), "f4")}
    expected = [[1170 / 8.1, 0, 650.5 / 8.1 - 0.5], [0, 1160 * 120 / 968, 480.5 * 120 / 968 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(frames["intrinsics"][0], expected, rtol=1e-6)
    half = np.where(np.arange(160) < 80, np.float32(1), np.float32(2.345))
    np.testing.assert_array_equal(frames["depth"][0], np.tile(half, (120, 1)))
    assert frames["image"][..., :78].max() < 30 and frames["image"][..., 82:].min() > 225
    without = load_frames(scene_folder, [0], (160, 120), colors=False)
    assert without.pop("image").shape == (1, 3, 0, 0)
    assert all(np.array_equal(value, frames[key]) for key, value in without.items())


def test_depth_is_millimetres_and_not_interpolated_and_world_to_camera_inverts_the_pose(tmp_path):
    scene_folder = write_scene(tmp_path / "scene", frames=range(4))
    depth = np.random.default_rng(7).choice(np.array([0, 1000, 3001, 65535], np.uint16), (48, 64))
    Image.fromarray(depth).save(scene_folder / "depth" / "0.png")
    frames = load_frames(scene_folder, [3, 0, 2], (64, 48))
    np.testing.assert_array_equal(frames["depth"][1], depth / np.float32(1000))
    for matrix, i in zip(frames["world_to_camera"], (3, 0, 2)):
        np.testing.assert_allclose(matrix @ camera_to_world(0.2 * i), np.eye(4), atol=1e-6)
    for size in ((32, 24), (50, 37), (100, 90)):
        assert set(load_frames(scene_folder, [0], size)["depth"].flat) == set(frames["depth"][1].flat)


@pytest.mark.parametrize("form", ["array of objects", "bare pickle"])
@pytest.mark.parametrize("name", [*(f"scene/{name}" for name in SCENE_ARRAYS), "a.npy", "coord.npz", "color.npz"])
def test_no_array_ever_runs_what_is_pickled_in_it(name, form, tmp_path):
    scene, path, touched = write_scene(tmp_path / "scene"), tmp_path / name, tmp_path / "touched"
    objects = np.array([Payload(touched)], dtype=object)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(touched)))
    elif path.suffix == ".npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, **{"coord": np.zeros((5, 3)), path.stem: objects})
    with pytest.raises(ValueError, match=f"{path}: expected an .*, found a file that cannot be read"):
        read_scan(scene if path.parent == scene else path)
    assert not touched.exists()
    with suppress(TypeError, IndexError):
        np.load(path, allow_pickle=True)[path.stem]
    assert touched.exists()  # the test can fail: this is what happens otherwise


HAZARD = re.compile(  # what could run what a file holds; an EPS starts Ghostscript
    r"^ *(import|from) .*\b(pickle|dill|cloudpickle|joblib|shelve|marshal)\b|(?<![.\w])(eval|exec|compile|__import__)\("
    r"|os\.(system|popen)|torch\.(jit|hub)\.load\(|yaml\.load|shell=|allow_pickle=(?!False)"
    r"|torch\.load\((?!.*weights_only=True)|Image\.open\((?!.*formats=)", re.MULTILINE)


def test_no_source_reads_a_file_in_a_way_that_could_run_it():
    root = Path(__file__).parents[1]
    sources = [path for folder in (root, root / "scenes", root / "experiments") for path in folder.glob("*.py")
               if path.name not in ("conftest.py", "test_stability.py")]
    assert len(sources) > 15
    code = {path.name: re.sub(r'"[^"\n]*"', '""', path.read_text()) for path in sources}  # without texts
    assert [(name, found[0]) for name, text in code.items() for found in HAZARD.finditer(text)] == []
    for text in ("import pickle", "from pickle import loads", "import joblib.x", "torch.load(path)", "eval(text)",
                 "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=flag)", "Image.open(path)",
                 "torch.jit.load(path)", "subprocess.run(x, shell=True)"):
        assert HAZARD.search(f"x = 1\n    {text}"), text
