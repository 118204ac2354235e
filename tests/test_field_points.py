"""Scans as people bring them: placeholders for normals, places and superpoints, colours of odd ranges and names, .ply
files with parts that nobody needs, and what is computed kept on disk."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from test_folder import ENCODINGS, XYZ, ply, sheet, write_ply, write_scene
from test_model import decoder
from test_points import plane

import data
from data import SceneDataset, Scenes
from scenes import folder, points
from scenes.folder import load_scene, read_ply, read_scan
from scenes.points import astray, complete, superpoints_from_points, vertex_normals


@pytest.fixture(scope="module")
def room(tiny_rooms):
    """Arrays of a generated room of 8,000 points."""
    path = sorted((tiny_rooms / "val").iterdir())[0]
    return {key: np.load(path / f"{key}.npy") for key in ("coord", "color", "normal")}


def bare(coord, normal=None, superpoint=None, **more):
    return {"coord": coord, "normal": normal, "superpoint": superpoint, **more}


def same_partition(a, b):
    """Whether two numberings group the points alike."""
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


# ---- placeholders


@pytest.mark.parametrize("value", [0, np.nan, np.inf, 1e-12])
@pytest.mark.parametrize("encoding", ENCODINGS[:2])
def test_normals_that_say_nothing_count_as_absent(room, value, encoding, tmp_path):
    coord, columns = room["coord"][::2], {}
    for name in ("nx", "ny", "nz"):
        columns[name] = np.full(len(coord), value, np.float32)
    scan, _ = read_scan(write_ply(tmp_path / "a.ply", coord, encoding=encoding, **columns))
    scene, notes = complete(scan)
    expected, said = complete(bare(scan["coord"]))
    assert notes == ["normals that are 0 or NaN: estimated", "no superpoints: computed"]
    assert said == ["no normals: estimated", "no superpoints: computed"]
    np.testing.assert_array_equal(scene["normal"], expected["normal"])
    np.testing.assert_array_equal(scene["superpoint"], expected["superpoint"])
    assert 5 < scene["superpoint"].max() + 1 <= len(coord) / 20


def test_where_some_normals_are_unknown_only_these_are_estimated_and_none_is_a_superpoint_of_its_own():
    coord, normal = (np.concatenate(parts) for parts in zip(plane(2), plane(1)))
    given, lost = normal.copy(), np.arange(len(coord)) % 7 == 3
    given[lost], given[3] = 0, np.nan
    scene, notes = complete(bare(coord, given))
    assert notes == ["normals that are 0 or NaN: estimated", "no superpoints: computed"]
    np.testing.assert_array_equal(scene["normal"][~lost], normal[~lost])
    assert (np.abs((scene["normal"] * normal).sum(1))[lost] > 0.99).mean() > 0.9
    assert np.bincount(scene["superpoint"]).min() >= 20 and np.isnan(given[3]).all()  # the input is as it was
    whole, notes = complete(bare(coord, normal))
    assert notes == ["no superpoints: computed"] and scene["superpoint"].max() <= whole["superpoint"].max() + 1


def mesh(spacing=0.05):
    """A floor and a wall of triangles: coord (N, 3), faces (F, 3)."""
    coord, _, faces = sheet(41, 41)
    coord = coord * np.float32(spacing / 0.1)
    wall = coord[:, [0, 2, 1]]
    return np.concatenate([coord, wall]), np.concatenate([faces, faces[:, ::-1] + len(coord)])


@pytest.mark.parametrize("given", ["faces", "normals", "neither"])
def test_a_mesh_that_shares_no_vertex_gets_what_the_welded_one_gets_and_searches_no_more_places(given, monkeypatch):
    coord, faces = mesh()
    corner, sizes, tree = faces.ravel(), [], points.cKDTree
    monkeypatch.setattr(points, "cKDTree", lambda x: sizes.append(len(x)) or tree(x))
    kept = {} if given == "neither" else {"faces": faces} if given == "faces" else \
        {"normal": vertex_normals(coord, faces)}
    welded, notes = complete(bare(coord, **kept))
    kept = {} if given == "neither" else {"faces": np.arange(len(corner)).reshape(-1, 3)} if given == "faces" else \
        {"normal": kept["normal"][corner]}
    loose, same_notes = complete(bare(coord[corner], **kept))
    assert len(corner) > 5 * len(coord) and max(sizes) <= len(coord) and notes == same_notes
    assert (np.abs((loose["normal"] * welded["normal"][corner]).sum(1)) > 0.999).mean() > (
        0.95 if given == "neither" else 0.9999)  # ties of which neighbours are the nearest
    if given != "neither":
        assert same_partition(loose["superpoint"], welded["superpoint"][corner])


def test_triangles_without_area_give_no_normal_and_the_neighbours_do():
    coord = np.repeat(plane(2)[0], 3, 0)
    scene, notes = complete(bare(coord, faces=np.arange(len(coord)).reshape(-1, 3)))
    assert notes[0] == "no normals: estimated" and (np.abs(scene["normal"][:, 2]) > 0.999).all()


def test_a_mesh_whose_triangles_are_wound_inside_out_gets_the_normals_of_its_points():
    coord, faces = mesh()
    scene, notes = complete(bare(coord, faces=faces[:, ::-1]))
    assert notes[0] == "no normals, the faces have normals that point out of the room: estimated"
    np.testing.assert_array_equal(scene["normal"], complete(bare(coord))[0]["normal"])
    level = np.abs(scene["normal"][:, 2]) > 0.9
    assert level.sum() > 1000 and (scene["normal"][level, 2] > 0).all()
    assert complete(bare(coord, faces=faces))[1][0] == "no normals: from the faces"


@pytest.mark.parametrize("at", [(0, 0, 0), (900, 0, 0)], ids=["in the room", "far off"])
def test_many_points_at_one_place_count_once(room, at, monkeypatch):
    sizes, tree, n = [], points.cKDTree, len(room["coord"])
    monkeypatch.setattr(points, "cKDTree", lambda x: sizes.append(len(x)) or tree(x))
    coord = np.concatenate([room["coord"], np.full((20_000, 3), at, np.float32)])
    scene, _ = complete(bare(coord))
    alone, _ = complete(bare(room["coord"]))
    assert max(sizes) <= n + 1 and scene["superpoint"].max() <= alone["superpoint"].max() + 1
    assert len(np.unique(scene["superpoint"][n:])) == 1
    assert (np.abs((scene["normal"][:n] * alone["normal"]).sum(1)) > 0.999).mean() > 0.99


@pytest.mark.parametrize("kind", ["noise", "isolated", "millimetres", "clusters", "one place", "few"])
def test_superpoints_are_never_more_than_a_twentieth_of_the_points(room, kind):
    rng, n = np.random.default_rng(0), 6000
    coord, normal = room["coord"][:n], rng.normal(size=(n, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    coord = {"noise": coord, "isolated": rng.uniform(0, 900, (n, 3)).astype(np.float32), "millimetres": coord * 1000,
             "clusters": np.repeat(coord[: n // 10], 10, 0) + rng.normal(0, 1e-3, (n, 3)).astype(np.float32),
             "one place": coord * 0, "few": coord[:7]}[kind]
    normal = normal[: len(coord)] if kind != "isolated" else None
    scene, _ = complete(bare(coord, normal))
    assert scene["superpoint"].max() + 1 <= max(1, len(coord) / 20) and scene["superpoint"].shape == (len(coord),)
    assert np.bincount(scene["superpoint"]).min() >= min(20, len(coord))
    if kind in ("noise", "isolated", "millimetres"):
        assert scene["superpoint"].max() > 3  # not one for all either
        ids = superpoints_from_points(coord, scene["normal"])
        assert 4 < ids.max() + 1 <= len(coord) / 20


def test_a_far_outlier_moves_no_superpoint(room):
    coord = np.concatenate([room["coord"], room["coord"].min(0, keepdims=True) + np.float32(30_000)])
    some, whole = (complete(bare(c, n))[0]["superpoint"] for c, n in (
        (coord, np.concatenate([room["normal"], room["normal"][:1]])), (room["coord"], room["normal"])))
    pairs, count = np.unique(np.stack([some[:-1], whole]), axis=1, return_counts=True)
    most = [count[pairs[1] == piece].max() for piece in range(whole.max() + 1)]
    assert sum(most) > 0.98 * len(whole) and some.max() <= whole.max() + 2


def test_superpoints_of_a_point_each_are_computed_anew_and_others_stay(room, tmp_path):
    n = len(room["coord"])
    for per, anew in ((1, True), (6, True), (20, False)):
        path = write_scene(tmp_path / str(per), n, coord=room["coord"], normal=room["normal"], color=room["color"],
                           segment20=None, instance=None, superpoint=np.arange(n) // per)
        scene, notes = complete(load_scene(path))
        assert notes == ["too many superpoints: computed anew"] * anew
        if anew:
            computed, _ = complete(bare(room["coord"], room["normal"]))
            np.testing.assert_array_equal(scene["superpoint"], computed["superpoint"])
        else:
            np.testing.assert_array_equal(scene["superpoint"], np.arange(n) // per)
    few = np.arange(900)  # under 1,000 are never too many
    np.testing.assert_array_equal(complete(bare(room["coord"][:900], room["normal"][:900], few))[0]["superpoint"], few)


@pytest.mark.parametrize("training", [True, False])
def test_queries_times_superpoints_are_bounded_in_training_and_evaluation(training, monkeypatch):
    net = decoder(layers=1).train(training)
    for count in (1, 150, 4000, 20_000, 69_241, 3_000_000):
        chosen = net.choose_queries(count)
        assert 1 <= len(chosen) == len(chosen.unique()) and len(chosen) * count <= 4000**2 and chosen.max() < count
        assert len(chosen) >= min(count // 2, 4000**2 // count) and (training or count > 4000 or len(chosen) == count)
    monkeypatch.setattr("model.MAX_QUERIES", 30)
    outs = net(torch.randn(200, 12))
    assert all(out["mask_logits"].shape[1] == 200 and out["mask_logits"].numel() <= 900 for out in outs)


# ---- colours


COLOURS = {  # name: (colours that a scan has otherwise, the odd values, what these become, said)
    "a hair over 1": (np.linspace(0, 1, 300), [1.0000001, -1e-7], [255, 0], False),
    "over 1": (np.linspace(0, 1, 300), [1.4, -0.2], [255, 0], True),
    "300 among bytes": (np.arange(300) % 256, [300, -4], [255, 0], True),
    "255.4": (np.arange(300) % 256 + 0.0, [255.4, -0.3], [255, 0], False),
    "16 bit among bytes": ((np.arange(300) % 256).astype("u2"), [40_000, 256], [255, 255], True),
    "16 bit": ((np.arange(300) * 219).astype("u2"), [65535, 257], [255, 1], False),
    "16 bit as float": (np.arange(300) * 219.0, [65535, 257], [255, 1], False),
    "16 bit as int": (np.arange(300) * 219, [65535, 257], [255, 1], False),
    "dark": (np.zeros(300), [1.0000001, 0.5], [255, 128], False), "black": (np.zeros(300), [0, 0], [0, 0], False),
    "white": (np.ones(300), [1, 1], [255, 255], False), "white of 255": (np.full(300, 255.0), [0, 9], [0, 9], False),
    "bytes up to 1": ((np.arange(300) % 2).astype("u1"), [1, 0], [1, 0], False),
    "16 bit up to 1": ((np.arange(300) % 2).astype("u2"), [1, 0], [1, 0], False)}


@pytest.mark.parametrize("form", ["ply", "npz", "folder"])
@pytest.mark.parametrize("case", COLOURS)
def test_one_extreme_value_decides_nothing(case, form, tmp_path):
    usual, odd, expected, said = COLOURS[case]
    color = np.concatenate([usual, odd]).astype(usual.dtype)[:, None].repeat(3, 1)
    color[:-2, 1:] = color[:-2, :1][::-1]
    coord = np.random.default_rng(0).uniform(0, 2, color.shape).astype(np.float32)
    if form == "ply":
        path = write_ply(tmp_path / "a.ply", coord, color.astype("i4") if usual.dtype.kind == "i" else color)
    elif form == "npz":
        np.savez(path := tmp_path / "a.npz", coord=coord, color=color)
    else:
        path = write_scene(tmp_path / "a", len(coord), coord=coord, color=color, segment20=None, instance=None)
    scene, notes = read_scan(path)
    top = 65535 if usual.max() > 255 else 1 if usual.max() <= 1 and usual.dtype.kind == "f" else 255
    np.testing.assert_array_equal(scene["color"][-2:], np.repeat([expected], 3, 0).T)
    np.testing.assert_array_equal(scene["color"][:-2], np.rint(color[:-2] * (255 / top)))
    assert [note for note in notes if "colours" in note] == [f"a few colours beyond 0..{top}: clipped"] * said


@pytest.mark.parametrize("color", [np.linspace(-1, 1, 300), np.linspace(0, 300, 300), np.arange(300) * 4,
                                   np.linspace(0, 1.5, 300), np.arange(300) * 1e5, np.arange(300) % 256 - 40,
                                   (np.arange(300) * 3).astype("u2"), (np.arange(300) * 13).astype("u2")])
def test_colours_out_of_every_range_are_refused(color, tmp_path):
    np.savez(tmp_path / "a.npz", coord=np.random.rand(300, 3), color=color[:, None].repeat(3, 1))
    with pytest.raises(ValueError, match=f"a.npz: expected colours in 0..255, .*, found {color.min()}..{color.max()}"):
        read_scan(tmp_path / "a.npz")


# ---- normals that say nothing, points far off


NORMALS = {"all alike": lambda n: 0 * n + [0, 0, 1], "askew": lambda n: 0 * n + [0.6, 0, 0.8],
           "noise": lambda n: np.random.default_rng(0).normal(size=n.shape), "of other axes": lambda n: n[:, [0, 2, 1]],
           "as colours": lambda n: (n + 1) / 2, "inside out": lambda n: -n,
           "random sides": lambda n: n * np.random.default_rng(0).choice((-1, 1), (len(n), 1))}
WHY = {"inside out": "point out of the room", "random sides": "point to both sides"}  # others: do not fit the points


@pytest.mark.parametrize("kind", NORMALS)
def test_normals_of_no_room_seen_from_inside_count_as_absent(room, kind, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, coord=room["coord"], normal=NORMALS[kind](room["normal"]))
    scan, superpoint = read_scan(path)[0], np.arange(len(room["coord"])) // 100
    scene, notes = complete(scan)
    expected, _ = complete(bare(scan["coord"]))
    why = f"normals that {WHY.get(kind, 'do not fit the points')}: estimated"
    assert notes == [why, "no superpoints: computed"]
    for key in ("normal", "superpoint"):
        np.testing.assert_array_equal(scene[key], expected[key])
    scene, notes = complete(scan | {"superpoint": superpoint})
    assert notes == [why] and scene["superpoint"] is superpoint
    np.testing.assert_array_equal(scene["normal"], expected["normal"])


def test_normals_of_a_room_are_kept_however_noisy_or_sparse(tiny_rooms):
    rng = np.random.default_rng(0)
    for path in tiny_rooms.glob("*/*"):
        coord, normal = np.load(path / "coord.npy"), np.load(path / "normal.npy")
        for noise in (0, 0.01, 0.03, 0.1):
            noisy = coord + rng.normal(0, noise, coord.shape).astype("f4")
            scene, notes = complete(bare(noisy, normal, np.zeros(len(coord), int)))
            assert notes == [] and scene["normal"] is not None
            np.testing.assert_array_equal(scene["normal"], normal)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_side_of_normals_is_told_in_a_whole_home_as_in_a_room(room, count):
    width, depth, _ = np.ptp(room["coord"], axis=0) + 0.05  # thin walls between rooms
    coord = np.concatenate([room["coord"] + np.float32([i % 3 * width, i // 3 * depth, 0]) for i in range(count)])
    normal = np.tile(room["normal"], (count, 1))
    assert astray(coord, normal) == ""
    for kind, why in WHY.items():
        assert astray(coord, NORMALS[kind](normal)) == f"normals that {why}"


def test_an_attic_that_shows_more_of_its_slopes_than_of_its_floor_keeps_its_normals():
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, 6, 0.05), np.arange(0, 6, 0.05)))
    slope, floor = np.minimum(x, 6 - x) * np.tan(np.pi / 6), (x > 2) & (x < 4)
    coord = np.concatenate([np.stack([x, y, 0.3 + slope], 1), np.stack([x, y, 0 * x], 1)[floor]]).astype("f4")
    down = np.stack([np.where(x < 3, 0.5, -0.5), 0 * x, np.full(len(x), -np.sqrt(0.75))], 1)
    normal = np.concatenate([down, np.tile([0, 0, 1], (floor.sum(), 1))]).astype("f4")
    scene, notes = complete(bare(coord, normal, np.zeros(len(coord), int)))
    assert notes == [] and scene["normal"] is normal


STRAYS = {"below": [[2, 2, -50.0]], "east": [[1e6, 0, 0]], "everywhere": [[-32768.0] * 3],
          "beyond": [[1e9, -1e9, 1e9]], "at 0": np.zeros((900, 3)), "half of them": np.full((9000, 3), -1e3)}


@pytest.mark.parametrize("off", [(0, 0, 0), (4.2e6, 1.7e5, 4.78e6)], ids=str)
@pytest.mark.parametrize("kind", STRAYS)
def test_invalid_points_far_off_or_at_0_change_nothing_of_the_others(room, kind, off, tmp_path):
    n, strays = len(room["coord"]), np.array(STRAYS[kind])
    np.save(tmp_path / "a.npy", np.concatenate([room["coord"].astype(float) + off, strays]))
    np.save(tmp_path / "b.npy", room["coord"].astype(float) + off)
    (scan, said), (clean, _) = (read_scan(tmp_path / f"{name}.npy") for name in "ab")
    assert [note for note in said if "long" in note] == []
    share = round(100 * len(strays) / (n + len(strays)))
    assert [note for note in said if "one place" in note] == [
        f"{share}% of the points lie at one place: remove them if they are invalid"] * (len(strays) > 1)
    back = [one["coord"][:n] - one["file_to_world"][:3, 3] - off for one in (scan, clean)]
    np.testing.assert_allclose(back[0], back[1], atol=1e-5)
    scan, clean = (complete(one)[0] for one in (scan, clean))
    assert ((scan["normal"][:n] * clean["normal"]).sum(1) > 0.99).mean() > 0.98
    assert 0.7 < (scan["superpoint"][:n].max() + 1) / (clean["superpoint"].max() + 1) < 1.5
    if far := any(off) or kind not in ("below", "at 0"):
        cores = sorted([core.tolist() for core, _ in points.tiles(scan["coord"], 0.1, 10**6, side=8.0)])
        assert far and cores == [[*range(n)], [*range(n, n + len(strays))]]


def test_a_stray_point_below_the_floor_does_not_lift_a_scene_and_one_too_far_names_it(room, tmp_path):
    for name, stray in (("plain", []), ("low", [[2, 2, -48]]), ("far", [[1e7, 1e7, 1e7]])):
        coord = np.concatenate([room["coord"], np.array(stray).reshape(-1, 3)]).astype("f4")
        write_scene(tmp_path / name / "train" / name, len(coord), coord=coord, normal=None)
    plain, low, far = (SceneDataset(tmp_path / name, "train", voxel_size=0.08, image_size=(32, 24))
                       for name in ("plain", "low", "far"))
    assert far.longest_side() == pytest.approx(plain.longest_side(), abs=0.05) and plain.longest_side() > 3
    plain, low = plain[0]["coord"][:, 2], low[0]["coord"][:, 2]
    assert low.min() < -40 and min(len(low), len(plain)) > 2000
    assert np.abs(np.quantile(low, (0.01, 0.5, 1)) - np.quantile(plain, (0.01, 0.5, 1))).max() < 0.1
    with pytest.raises(ValueError, match=r"^far: points span \[125000\d+ 125000\d+ 125000\d+\] voxels of 0.08 m"):
        far[0]
    far.voxel_size, far.augment = 10.0, True
    items = [far[epoch, 0] for epoch in range(4)]  # with and without elastic warps, which such a point would make huge
    assert all(np.isfinite(item["coord"]).all() and len(item["point_to_voxel"]) == len(coord) for item in items)


# ---- parts that nobody needs


def header(encoding, body, properties, vertices=3, faces="", extra=""):
    head = f"ply\nformat {encoding} 1.0\n{extra}element vertex {vertices}\n{properties}{faces}end_header\n"
    return head.encode() + (body if isinstance(body, bytes) else body.encode())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (0, 3, 1)], ids=["of one size", "of several"])
def test_lists_and_numbers_of_64_bit_on_vertices_are_passed_over(encoding, sizes, tmp_path):
    coord, values = np.random.default_rng(1).normal(size=(3, 3)).astype("f4"), [7, 2**53 + 1, 2**40]
    properties = ("property float X\nproperty int64 stamp\nproperty list uchar short seen\nproperty float Y\n"
                  "property float Z\nproperty uint64 label\nproperty float16 w\nproperty uchar Red\n"
                  "property uchar GREEN\nproperty uchar blue\nproperty uchar alpha\n")
    order = ">" if "big" in encoding else "<"
    rows = []
    for i, size in enumerate(sizes):
        parts = [(coord[i, 0], "f4"), (values[i], "i8"), (size, "u1"), (np.arange(size), "i2"), (coord[i, 1:], "f4"),
                 (i, "u8"), (0.5, "f2"), ([i, 20 * i, 255, 9], "u1")]
        rows.append(" ".join(" ".join(f"{x:.9g}" if kind == "f4" else str(x) for x in np.ravel(v)) for v, kind in parts)
                    if encoding == "ascii" else b"".join(np.array(v, order + kind).tobytes() for v, kind in parts))
    body = "\n".join(rows) if encoding == "ascii" else b"".join(rows)
    (tmp_path / "a.ply").write_bytes(header(encoding, body, properties))
    scan = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(scan["coord"], coord)
    np.testing.assert_array_equal(scan["color"], [[0, 0, 255], [1, 20, 255], [2, 40, 255]])
    assert scan["label"].tolist() == [0, 1, 2] and scan["notes"] == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_coordinates_and_faces_of_64_bit_and_polygons_of_any_size_are_read(encoding, tmp_path):
    coord, face = np.arange(15).reshape(5, 3) * 1000, np.array([4, 0, 1, 2, 3])
    properties = "property int64 x\nproperty int64 y\nproperty int64 z\n"
    faces = "element face 1\nproperty list uint64 int64 vertex_indices\n"
    order = ">i8" if "big" in encoding else "<i8"
    numbers = np.concatenate([coord.ravel(), face])
    body = " ".join(map(str, numbers)) if encoding == "ascii" else numbers.astype(order).tobytes()
    (tmp_path / "a.ply").write_bytes(header(encoding, body, properties, 5, faces))
    scan = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(scan["coord"], coord)
    np.testing.assert_array_equal(scan["faces"], [[0, 1, 2], [0, 2, 3]])


@pytest.mark.parametrize("token", ["nan", "-nan", "NaN", "-nan(ind)", "nan(ind)", "1.#QNAN", "-1.#IND", "1.#INF",
                                   "inf"])
def test_what_windows_writes_for_nan_makes_a_normal_unknown_and_a_coordinate_a_fault(token, tmp_path):
    properties, path = XYZ + XYZ.replace(" x", " nx").replace(" y", " ny").replace(" z", " nz"), tmp_path / "a.ply"
    path.write_text(ply(f"0 0 0 0 0 2\r\n1 0 0 {token} 1 0\r\n0 1 0 0 0 -3\r\n", 3, properties))
    np.testing.assert_array_equal(read_ply(path)["normal"], [[0, 0, 1], [0, 0, 0], [0, 0, -1]])
    path.write_text(ply(f"0 0 0 0 0 2\n1 {token} 0 0 1 0\n0 1 0 0 0 -3\n", 3, properties))
    with pytest.raises(ValueError, match="finite coordinates, found 1 of 3 points without; remove these points"):
        read_ply(path)


def test_a_text_with_more_digits_than_its_types_hold_keeps_them(tmp_path):
    (tmp_path / "a.ply").write_text(ply("431000.2512 5290000.5034 0.1\n431001.2 5290001.25 0.2\n", 2))
    scene, notes = read_scan(tmp_path / "a.ply")
    np.testing.assert_allclose(scene["coord"] - scene["file_to_world"][:3, 3], [[431000.2512, 5290000.5034, 0.1],
                                                                             [431001.2, 5290001.25, 0.2]], atol=1e-5)
    assert not [note for note in notes if "export doubles" in note]


@pytest.mark.parametrize("values", [["127.0", "0.0", "255.0"], ["0.498", "0.0", "1.0"], ["127", "0", "255"]])
def test_floats_under_uchar_in_a_text_are_the_colours_that_they_are(values, tmp_path):
    properties = XYZ + "property uchar red\nproperty uchar green\nproperty uchar blue\n"
    (tmp_path / "a.ply").write_text(ply("\n".join(f"{i} 0 0 {' '.join(values)}" for i in range(4)), 4, properties))
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply")["color"], [[127, 0, 255]] * 4)
    dark = ply("0 0 0 1 0 1\n1 0 0 1 1 0\n", 2, properties)  # whole numbers under uchar are bytes, however dark
    (tmp_path / "b.ply").write_text(dark)
    np.testing.assert_array_equal(read_ply(tmp_path / "b.ply")["color"], [[1, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_long_header_of_comments_in_any_letters_is_read(encoding, end, tmp_path):
    coord, color, faces = sheet()
    content = write_ply(tmp_path / "a.ply", coord, color, faces, encoding).read_bytes()
    head, middle, body = content.partition(b"end_header\n")
    head = head.replace(b"element vertex", "".join(f"comment Fläche {i}, property float x\nobj_info 部屋\n"
                                                   for i in range(4000)).encode() + b"element vertex")
    assert len(head) > 2**17
    (tmp_path / "b.ply").write_bytes((head + middle).replace(b"\n", end.encode()) + body)
    for key, value in read_ply(tmp_path / "b.ply").items():
        np.testing.assert_array_equal(value, {"coord": coord, "color": color, "faces": faces, "notes": []}.get(key))


@pytest.mark.parametrize("names", [
    "R G B", "Red Green Blue", "RED GREEN BLUE", "r g b", "diffuse_red diffuse_green diffuse_blue", "scalar_R scalar_G "
    "scalar_B", "scalar_Red scalar_Green scalar_Blue", "Diffuse_Red Diffuse_Green Diffuse_Blue"])
def test_colours_are_found_under_the_names_that_programs_write(names, tmp_path):
    coord, color, _ = sheet()
    np.testing.assert_array_equal(read_ply(write_ply(tmp_path / "a.ply", coord, color, names=names))["color"], color)
    both = dict(zip(("diffuse_red", "diffuse_green", "diffuse_blue"), 255 - color.T))
    if "iffuse" not in names:  # the plain ones count
        path = write_ply(tmp_path / "b.ply", coord, color, names=names if "scalar" not in names else "r g b", **both)
        np.testing.assert_array_equal(read_ply(path)["color"], color)


def test_colours_of_gaussian_splatting_are_those_of_degree_0(tmp_path):
    coord, color, _ = sheet()
    f_dc = (color / 255 - 0.5) / 0.28209479177387814
    f_dc[3] = [9, -9, 0]  # beyond what can be shown
    path = write_ply(tmp_path / "a.ply", coord, f_dc.astype("f4"), names="f_dc_0 f_dc_1 f_dc_2", nx=0 * coord[:, 0],
                     ny=0 * coord[:, 0], nz=0 * coord[:, 0], opacity=coord[:, 0])
    scan, notes = read_scan(path)
    color[3] = [255, 0, 128]
    np.testing.assert_array_equal(scan["color"], color)
    assert not scan["normal"].any() and notes == ["no frames: 3D only"]


@pytest.mark.parametrize("polygons", [[[0, 1, 2], [0, 2, 3]], [[0, 1, 2], [3, 2, 0, 1]]], ids=["triangles", "mixed"])
def test_a_vertex_takes_the_mean_of_its_faces_colours(polygons, tmp_path):
    vertex = np.array([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (5, 5, 5)], [(a, "f4") for a in "xyz"])
    face = np.array([(np.array(p, "i4"), *color) for p, color in zip(polygons, [(10, 20, 30), (250, 60, 31)])],
                    [("vertex_indices", "O"), ("R", "u1"), ("G", "u1"), ("B", "u1")])
    PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]).write(str(tmp_path / "a.ply"))
    mean = [130, 40, 30]
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply")["color"], [
        mean, [10, 20, 30] if len(polygons[1]) == 3 else mean, mean, [250, 60, 31], [127] * 3])


def test_seven_columns_of_a_npy_are_points_colours_and_alpha(tmp_path):
    coord, color, _ = sheet()
    np.save(tmp_path / "a.npy", np.concatenate([coord, color, color[:, :1]], 1))
    scan, notes = read_scan(tmp_path / "a.npy")
    np.testing.assert_array_equal(scan["color"], color)
    assert notes == ["columns 4 to 6 taken as colours", "no frames: 3D only"]
    np.save(tmp_path / "a.npy", np.concatenate([coord, color, coord], 1))
    with pytest.raises(ValueError, match=r"columns x y z or x y z red green blue \(alpha\); an .npz may hold normals"):
        read_scan(tmp_path / "a.npy")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_polygons_that_end_in_a_smaller_one_are_read_and_a_cut_mesh_is_refused_at_once(encoding, tmp_path):
    coord, _, _ = sheet()
    quads = np.stack([np.arange(20), np.arange(20) + 1, np.arange(20) + 7, np.arange(20) + 6], 1).tolist()
    path = write_ply(tmp_path / "a.ply", coord, faces=[*quads, [0, 1, 7]], encoding=encoding)
    assert read_ply(path)["faces"][-2:].tolist() == [[19, 26, 25], [0, 1, 7]] and len(read_ply(path)["faces"]) == 41
    path = write_ply(path, coord, faces=quads * 50, encoding=encoding)
    path.write_bytes(path.read_bytes()[:-9000] + b"\n" * (encoding == "ascii"))
    with pytest.raises(ValueError, match="1000 numbers announced in"):
        read_ply(path)


def test_no_type_of_a_header_is_anything_but_a_number_and_no_text_has_numbers_to_spare(tmp_path):
    for kind in ("object", "O", "V8", "str", "datetime64", "f4,f4", "(9,)f4"):
        (tmp_path / "a.ply").write_bytes(header("binary_little_endian", bytes(64), XYZ + f"property {kind} a\n", 1))
        with pytest.raises(ValueError, match=r"a.ply: expected a whole .ply, found a file that cannot be read"):
            read_ply(tmp_path / "a.ply")
    (tmp_path / "a.ply").write_text(ply("0 0 0 9\n1 0 0 9\n", 2))  # a column that the header does not name
    with pytest.raises(ValueError, match="more numbers than its header announces"):
        read_ply(tmp_path / "a.ply")


# ---- what is costly is kept


@pytest.fixture
def root(room, tmp_path):
    for i in range(2):
        write_scene(tmp_path / "data" / "train" / f"scene_{i}", 4000, normal=None, coord=room["coord"][i : i + 4000],
                    color=room["color"][:4000], segment20=np.zeros(4000, int))
    return tmp_path / "data"


def dataset(root, computed):
    return SceneDataset(root, "train", voxel_size=0.3, image_size=(32, 24), computed=computed)


def same(one, two):
    return all(np.array_equal(one[key], two[key]) for key in one)


def count_completions(monkeypatch):
    done = []
    monkeypatch.setattr(data, "complete", lambda scene: done.append(scene["name"]) or complete(scene))
    return done


def test_what_a_scene_lacks_is_computed_once_and_kept_by_its_content(root, tmp_path, monkeypatch):
    kept, done = tmp_path / "cache" / "points", count_completions(monkeypatch)
    plain = [dataset(root, None)[i] for i in range(2)]
    assert not kept.parent.exists()
    for _ in range(3):
        assert all(same(dataset(root, kept)[i], plain[i]) for i in range(2))
    assert done == ["scene_0", "scene_1"] * 2 and len(list(kept.iterdir())) == 2
    coord = np.load(root / "train" / "scene_0" / "coord.npy")
    np.save(root / "train" / "scene_0" / "coord.npy", coord + np.array([0, 0, 1]))
    np.save(root / "train" / "scene_1" / "normal.npy", np.zeros_like(coord))
    changed = [dataset(root, kept)[i] for i in range(2)]
    assert done[4:] == ["scene_0", "scene_1"] and not same(changed[0], plain[0]) and len(list(kept.iterdir())) == 4
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    assert same(dataset(root, kept)[0], changed[0]) and done[6:] == ["scene_0"]


@pytest.mark.parametrize("harm", [lambda b: b[:100], lambda b: b[:-1], lambda b: b"",
                                  lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:]])
def test_a_damaged_entry_is_computed_anew(harm, root, tmp_path, monkeypatch):
    expected, done = dataset(root, tmp_path / "points")[0], count_completions(monkeypatch)
    (path,) = (tmp_path / "points").iterdir()
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    assert same(dataset(root, tmp_path / "points")[0], expected) and done == ["scene_0"]
    assert path.read_bytes() == whole and list((tmp_path / "points").iterdir()) == [path]


def test_what_another_process_keeps_at_the_same_moment_is_no_fault(root, tmp_path, monkeypatch):
    replace, me, both, done = os.replace, os.getpid(), tmp_path / "both", []

    def meanwhile(*paths):  # another process writes the same before this one is done
        if not done:
            done.append(monkeypatch.setattr(os, "getpid", lambda: me + 1))
            done.append(dataset(root, both)[0])
        replace(*paths)

    monkeypatch.setattr(os, "replace", meanwhile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = dataset(root, both)[0]
    plain = dataset(root, None)[0]
    assert same(first, plain) and same(done[1], plain) and same(dataset(root, both)[0], plain)
    assert len(list(both.iterdir())) == 1


def test_a_folder_that_takes_nothing_costs_the_keeping_and_is_said_once(root, tmp_path, monkeypatch):
    (tmp_path / "points").write_text("a file")
    full = OSError(28, "No space left on device")
    folder.WARN_ONCE.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            first = [dataset(root, tmp_path / "points")[i] for i in range(2)]
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
        second = [dataset(root, tmp_path / "more")[i] for i in range(2)]
    assert all(same(*pair) for pair in zip(first, second)) and list((tmp_path / "more").iterdir()) == []
    assert [str(w.message).partition(": ")[2] for w in caught] == [
        "normals and superpoints cannot be kept here (File exists)",
        "normals and superpoints cannot be kept here (No space left on device)"]


def test_placeholders_are_said_once_before_training_and_without_a_cache_nothing_is_written(root, tmp_path):
    write_scene(root / "val" / "scene")
    for i in range(2):
        np.save(root / "train" / f"scene_{i}" / "normal.npy", np.zeros((4000, 3)))
    folder.WARN_ONCE.cache_clear()
    for gb in (0, 1):
        scenes = Scenes(root, 0.3, (32, 24), 2, 0, 0, torch.device("cpu"), tmp_path / "cache", gb)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scenes.read(0, 0.0, None)
            assert len(list(scenes.batches(0))) == 1
        assert [str(w.message) for w in caught] == [
            f"scenes of {root / 'train'}: normals that are 0 or NaN: estimated"] * (gb == 0)
        assert Path(tmp_path / "cache").exists() == (gb > 0)
