"""Inputs that people really bring, each from public bug reports, made from one room: what predict.py makes of them."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData, PlyElement

import predict
from scenes.folder import load_frames, load_scene, read_scan
from scenes.points import complete

UTM = np.array([431000.25, 5290000.5, 320.0])


def write_ply(path, coord, color, normal=None, names=("red", "green", "blue"), dtype="f4", faces=None, text=False):
    fields = [(a, dtype) for a in "xyz"] + [(f"n{a}", "f4") for a in "xyz"] * (normal is not None)
    vertex = np.zeros(len(coord), fields + [(name, color.dtype.str[1:]) for name in names])
    for i, a in enumerate("xyz"):
        vertex[a], vertex[names[i]] = coord[:, i], color[:, i]
        if normal is not None:
            vertex[f"n{a}"] = normal[:, i]
    rows = np.zeros(0 if faces is None else len(faces), [("vertex_indices", "i4", (3,))])
    rows["vertex_indices"] = 0 if faces is None else faces
    elements = [PlyElement.describe(vertex, "vertex"), *[PlyElement.describe(rows, "face")] * (faces is not None)]
    PlyData(elements, text=text).write(str(path))


def change_matrices(folder, change):
    for file in folder.glob("*.txt"):
        np.savetxt(file, change(np.loadtxt(file)), fmt="%.9f")


@pytest.fixture(scope="module")
def cases(room, tmp_path_factory):
    """Folder of the cases."""
    out = tmp_path_factory.mktemp("cases")
    c, rgb, n = (np.load(room / f"{key}.npy") for key in ("coord", "color", "normal"))
    write_ply(out / "good.ply", c, rgb, n)
    write_ply(out / "bare.ply", c, rgb)
    write_ply(out / "normals_zero.ply", c, rgb, 0 * n)
    write_ply(out / "normals_nan.ply", c, rgb, n * np.nan)
    corner = np.repeat(c, 3, 0) + np.tile([[0, 0, 0], [.02, 0, 0], [0, .02, 0]], (len(c), 1))
    faces = np.arange(9 * len(c)).reshape(-1, 3)
    write_ply(out / "unwelded.ply", np.repeat(corner, 3, 0), np.repeat(rgb, 9, 0), faces=faces)
    write_ply(out / "utm.ply", c + UTM, rgb, n, dtype="f8")
    one = (rgb / 255).astype("f4")
    one[7, 0], one[8, 0] = 1.0000001, -1e-7
    write_ply(out / "color_float_over_1.ply", c, one, n)
    write_ply(out / "y_up.ply", c[:, [0, 2, 1]] * [1, 1, -1], rgb, n[:, [0, 2, 1]] * [1, 1, -1])
    write_ply(out / "mm.ply", c * 1000, rgb, n)
    write_ply(out / "cm.ply", c * 100, rgb, n)
    write_ply(out / "colors_R_G_B.ply", c, rgb, n, names=("R", "G", "B"))
    write_ply(out / "nan_ind.ply", c, rgb, n, text=True)
    lines = (out / "nan_ind.ply").read_text().split("\n")
    at = lines.index("end_header") + 3
    words = lines[at].split()
    lines[at] = " ".join([*words[:3], "-nan(ind)", *words[4:]])
    (out / "nan_ind.ply").write_text("\n".join(lines))
    write_ply(out / "price_$5_$6.ply", c, rgb, n)
    (out / "mac").mkdir()
    write_ply(out / "mac" / "scan.ply", c, rgb, n)
    (out / "mac" / "._scan.ply").write_bytes(b"\0" * 200)
    (out / "truncated.ply").write_bytes((out / "good.ply").read_bytes()[:9000])
    (out / "coord_alone").mkdir()
    np.save(out / "coord_alone" / "coord.npy", c)
    for name in ("utm_folder", "color_png_16_bit", "color_JPG", "names_padded", "depth_half_missing", "poses_opengl",
                 "intrinsics_x4"):
        shutil.copytree(room, out / name)
    np.save(out / "utm_folder" / "coord.npy", c + UTM)
    change_matrices(out / "utm_folder" / "pose", lambda pose: pose + np.pad(UTM[:, None], ((0, 1), (3, 0))))
    for image in (out / "color_png_16_bit" / "color").glob("*.jpg"):
        grey = np.asarray(Image.open(image).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 257).save(image.with_suffix(".png"))
        image.unlink()
    for image in (out / "color_JPG" / "color").glob("*.jpg"):
        image.rename(image.with_suffix(".JPG"))
    for image in (out / "names_padded" / "color").glob("*.jpg"):
        image.rename(image.with_name(f"{int(image.stem):06d}.jpg"))
    for depth in sorted((out / "depth_half_missing" / "depth").glob("*.png"))[::2]:
        depth.unlink()
    change_matrices(out / "poses_opengl" / "pose", lambda pose: pose @ np.diag([1, -1, -1, 1]))
    change_matrices(out / "intrinsics_x4" / "intrinsic",
                    lambda matrix: matrix * np.array([[4], [4], [1], [1]])[: len(matrix)])
    return out


@pytest.fixture(scope="module")
def predicted(cases, checkpoints, room, tmp_path_factory):
    """Function: a case and flags -> (labels, coordinates) of what is written, what is printed, the error or None."""
    out, known = tmp_path_factory.mktemp("out"), {}

    def run(name, *flags):
        key = (name, *flags)
        if key not in known:
            with pytest.MonkeyPatch.context() as patch:
                said, error = [], None
                patch.setattr(predict, "draw", lambda path, *args: path.write_bytes(b""))
                patch.setattr("builtins.print", lambda *text, **end: said.append(" ".join(map(str, text))))
                try:
                    predict.main([str(checkpoints["bifusion"]), str(room if name == "room" else cases / name), *flags,
                                  "--out", str(out), "--device", "cpu"])
                except SystemExit as stopped:
                    error = stopped.code
            stem = room.name if name == "room" else name.removesuffix(".ply")
            found = None
            if error is None:
                vertex = PlyData.read(str(out / f"{stem}_semantic.ply"))["vertex"]
                found = np.array(vertex["label"]), np.stack([vertex[a] for a in "xyz"], 1)
            known[key] = found, "\n".join(said), error
        return known[key]

    return run


@pytest.mark.parametrize("name, like, flags", [
    ("normals_zero.ply", "bare.ply", ()), ("normals_nan.ply", "bare.ply", ()), ("utm.ply", "good.ply", ()),
    ("utm_folder", "room", ()), ("color_float_over_1.ply", "good.ply", ()), ("y_up.ply", "good.ply", ("--up", "y")),
    ("mm.ply", "good.ply", ("--scale", "0.001")), ("cm.ply", "good.ply", ("--scale", "0.01")),
    ("colors_R_G_B.ply", "good.ply", ()), ("price_$5_$6.ply", "good.ply", ()), ("mac", "good.ply", ()),
    ("color_JPG", "room", ()), ("names_padded", "room", ()),
    ("poses_opengl", "room", ("--cameras", "opengl"))])
def test_a_case_is_labelled_as_the_scan_that_it_was_made_from(predicted, cases, name, like, flags):
    (found, written), _, error = predicted(name, *flags)
    (expected, coord), *_ = predicted(like)
    assert error is None and (found == expected).mean() > 0.995 and len(np.unique(expected)) > 3
    if name.startswith("utm"):
        np.testing.assert_allclose(written - UTM, coord, atol=1e-3)
    elif not flags:
        np.testing.assert_array_equal(written, coord)


@pytest.mark.parametrize("name, said", [
    ("normals_zero.ply", "normals that are 0 or NaN: estimated"), ("y_up.ply", "--up y"),
    ("depth_half_missing", "frames have no depth: "), ("poses_opengl", "--cameras opengl"),
    ("intrinsics_x4", "principal point"), ("coord_alone", "no colours: taken as grey")])
def test_what_looks_wrong_is_said_in_one_line_and_nothing_is_changed(predicted, name, said):
    _, printed, error = predicted(name)
    assert error is None and said in printed


@pytest.mark.parametrize("name, said", [("mm.ply", "look like mm .* --scale 0.001"), ("cm.ply", "cm .* --scale 0.01"),
                                        ("truncated.ply", "expected a whole .ply")])
def test_what_cannot_be_a_room_is_refused_in_one_line(predicted, name, said):
    _, _, error = predicted(name)
    assert error.startswith("error: ") and "\n" not in error
    assert re.search(said, error)


def test_a_bad_scan_among_others_is_named_at_the_end(cases, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "draw", lambda path, *args: path.write_bytes(b""))
    names = ("good.ply", "truncated.ply", "price_$5_$6.ply")
    with pytest.raises(SystemExit, match=r"(?s)truncated\.ply: expected a whole .*1 of 3 scans failed"):
        predict.main([str(checkpoints["bifusion"]), *(str(cases / name) for name in names), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.txt")} == {"good_instances.txt", "price_$5_$6_instances.txt"}


def test_arrays_of_the_cases(cases, room):
    good, _ = read_scan(cases / "good.ply")
    for name in ("color_float_over_1.ply", "colors_R_G_B.ply"):
        off = np.abs(read_scan(cases / name)[0]["color"].astype(int) - good["color"])
        assert np.delete(off, [7, 8], 0).max() <= 1  # the two that were changed
    normal = read_scan(cases / "nan_ind.ply")[0]["normal"]
    assert not normal[2].any() and np.allclose(np.delete(normal, 2, 0), np.delete(good["normal"], 2, 0), atol=1e-5)
    welded, loose = (complete(read_scan(cases / name)[0])[0] for name in ("bare.ply", "unwelded.ply"))
    assert loose["superpoint"].max() + 1 <= len(loose["coord"]) / 20
    assert loose["superpoint"].max() < 12 * welded["superpoint"].max()
    frames = load_frames(cases / "color_png_16_bit", load_scene(cases / "color_png_16_bit")["frame_ids"], (64, 48))
    plain = load_frames(room, load_scene(room)["frame_ids"], (64, 48))
    assert abs(frames["image"].mean() - plain["image"].mean()) < 12 and len(frames["image"]) == len(plain["image"])
