"""Tests of rooms.py --as-scannet: every official file read by hand, and the way back through scannet.py."""

import functools
import json
import os
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

from data import scene_item
from fusion import link_views
from scenes import rooms
from scenes.folder import CLASS_NAMES, NYU40_IDS, load_frames, load_scene

SIZE = (64, 48)
SCANS = {"scene0000_00": "train", "scene0001_00": "val"}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two rooms written both ways: (folder of scene folders, folder of ScanNet files)."""
    direct, scannet = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("scannet")
    for root, as_scannet in ((direct, False), (scannet, True)):
        made = rooms.generate(root, train=1, val=1, seed=3, workers=1, image_size=SIZE, as_scannet=as_scannet)
        assert made == 2
    return direct, scannet


@pytest.fixture(scope="module", params=sorted(SCANS))
def pair(request, roots):
    """One room: (folder of the scan, its name, arrays and frame files of the scene folder written directly)."""
    direct = roots[0] / SCANS[request.param] / "room_0000"
    arrays = {path.stem: np.load(path) for path in direct.glob("*.npy")}
    return roots[1] / "scans" / request.param, request.param, {**arrays, "folder": direct}


def alignment_of(scan):
    """The axisAlignment of a scan's .txt, read by hand."""
    lines = dict(line.split(" = ") for line in (scan / f"{scan.name}.txt").read_text().splitlines())
    return np.array(lines["axisAlignment"].split(), float).reshape(4, 4)


@functools.cache
def vertices(path):
    """(N, 3) positions, the vertex element and (F, 3) faces of a .ply."""
    ply = PlyData.read(path, known_list_len={"face": {"vertex_indices": 3}})      # fails on any other number
    vertex = ply["vertex"]
    return np.stack([vertex["x"], vertex["y"], vertex["z"]], 1), vertex, np.array(ply["face"]["vertex_indices"])


def read_sens(path):
    """Header (dict), frames [(pose, colour, depth bytes)] and tail of a .sens, one field after the other."""
    raw = path.read_bytes()
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return values

    version, length = take("IQ")
    header = {"version": version, "name": take(f"{length}s")[0]}
    for key in ("color_intrinsic", "color_extrinsic", "depth_intrinsic", "depth_extrinsic"):
        header[key] = np.reshape(take("16f"), (4, 4))
    header["compression"], header["size"], header["shift"] = take("ii"), take("IIII"), take("f")[0]
    frames = []
    for _ in range(take("Q")[0]):
        pose = np.reshape(take("16f"), (4, 4))
        *_, color_bytes, depth_bytes = take("QQQQ")
        frames.append((pose, take(f"{color_bytes}s")[0], take(f"{depth_bytes}s")[0]))
    return header, frames, raw[at:]


def test_the_split_lists_name_all_scans_and_a_rerun_makes_nothing(roots):
    lists = {path.name: path.read_text() for path in roots[1].glob("*.txt")}
    assert lists == {"scannetv2_train.txt": "scene0000_00\n", "scannetv2_val.txt": "scene0001_00\n"}
    assert sorted(path.name for path in (roots[1] / "scans").iterdir()) == sorted(SCANS)
    assert not (roots[1] / ".unfinished").exists()
    assert rooms.generate(roots[1], train=1, val=1, seed=3, image_size=SIZE, as_scannet=True) == 0


def test_a_scan_has_the_official_files_and_no_others(pair):
    scan, name, _ = pair
    mesh = f"{name}_vh_clean_2"
    assert sorted(path.name for path in scan.iterdir()) == sorted([
        f"{mesh}.ply", f"{mesh}.labels.ply", f"{mesh}.0.010000.segs.json", f"{name}.aggregation.json",
        f"{name}_vh_clean.aggregation.json", f"{name}.txt", f"{name}.sens", "color", "depth", "pose", "intrinsic"])


def test_axis_alignments_are_rigid_turn_about_z_and_differ_from_scan_to_scan(roots):
    first, second = (alignment_of(roots[1] / "scans" / name) for name in SCANS)
    for matrix in (first, second):
        np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=3e-6)
        np.testing.assert_array_equal(matrix[[2, 2, 0, 1, 3, 3, 3, 3], [0, 1, 2, 2, 0, 1, 2, 3]], [0] * 7 + [1])
        assert np.linalg.det(matrix) > 0.99
        assert abs(matrix[0, 1]) > 0.05 and np.abs(matrix[:2, 3]).max() > 0.1
    assert np.abs(first - second).max() > 0.1


def test_both_meshes_hold_the_points_and_the_alignment_restores_them(pair):
    scan, name, direct = pair
    coord, vertex, faces = vertices(scan / f"{name}_vh_clean_2.ply")
    kinds = {"x": "<f4", "y": "<f4", "z": "<f4", "red": "|u1", "green": "|u1", "blue": "|u1", "alpha": "|u1"}
    assert vertex.data.dtype.descr == list(kinds.items())
    matrix = alignment_of(scan)
    aligned = coord.astype(float) @ matrix[:3, :3].T + matrix[:3, 3]
    assert np.abs(aligned - direct["coord"]).max() < 2e-6
    assert np.abs(coord - direct["coord"]).max() > 0.1
    np.testing.assert_array_equal(np.stack([vertex["red"], vertex["green"], vertex["blue"]], 1), direct["color"])

    label_coord, labelled, label_faces = vertices(scan / f"{name}_vh_clean_2.labels.ply")
    assert labelled.data.dtype.descr == [*kinds.items(), ("label", "<u2")]
    np.testing.assert_array_equal(label_coord, coord)
    np.testing.assert_array_equal(label_faces, faces)
    assert direct["segment20"].min() >= 0                # rooms have no unlabelled points
    np.testing.assert_array_equal(labelled["label"], [NYU40_IDS[index] for index in direct["segment20"]])


def test_faces_are_small_and_their_normals_are_those_of_the_points(pair):
    scan, name, direct = pair
    coord, _, faces = vertices(scan / f"{name}_vh_clean_2.ply")
    assert faces.min() >= 0 and faces.max() < len(coord) and len(faces) > 1.5 * len(coord)
    assert len(np.unique(np.sort(faces, 1), axis=0)) == len(faces)
    a, b, c = coord[faces].astype(float).transpose(1, 0, 2)
    assert max(np.linalg.norm(edge, axis=1).max() for edge in (b - a, c - b, a - c)) < 0.16
    normal = np.zeros(coord.shape)
    for corner in range(3):
        np.add.at(normal, faces[:, corner], np.cross(b - a, c - a))
    length = np.linalg.norm(normal, axis=1)
    assert (length > 0).mean() > 0.995
    wanted = direct["normal"] @ alignment_of(scan)[:3, :3]            # the inverse turn
    cosine = (normal * wanted).sum(1) / np.maximum(length, 1e-12)
    assert np.median(cosine) > np.cos(np.radians(8))
    assert (cosine > np.cos(np.radians(30))).mean() > 0.98
    assert (cosine > 0).mean() > 0.995                                # so none is inside out but for slivers


def test_segments_are_the_superpoints_and_groups_the_instances_then_floor_and_wall(pair):
    scan, name, direct = pair
    segments = json.loads((scan / f"{name}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"]
    np.testing.assert_array_equal(segments, direct["superpoint"])
    groups = json.loads((scan / f"{name}.aggregation.json").read_text())["segGroups"]
    ids = [group["objectId"] for group in groups]
    assert ids == [group["id"] for group in groups] == list(range(direct["instance"].max() + 3))
    assert [group["label"] for group in groups[-2:]] == ["floor", "wall"]
    covered = np.zeros(len(segments), int)
    for group in groups:
        mask = np.isin(segments, group["segments"])
        covered += mask
        assert {CLASS_NAMES[index] for index in np.unique(direct["segment20"][mask])} == {group["label"]}
        if group["label"] not in ("floor", "wall"):
            np.testing.assert_array_equal(mask, direct["instance"] == group["objectId"])
    assert (covered == 1).all()
    decoy = json.loads((scan / f"{name}_vh_clean.aggregation.json").read_text())["segGroups"]
    assert decoy[0]["segments"] != groups[0]["segments"]


def test_no_superpoint_of_many_rooms_straddles_two_instances_or_classes():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        points = rooms.sample_points(rooms.make_room(rng), rng)
        rows = np.unique(np.stack([points[key] for key in ("superpoint", "segment20", "instance")]), axis=1)
        assert rows.shape[1] == points["superpoint"].max() + 1
        # every instance has points: objectId, a row of the list of groups, is the instance
        assert len(np.unique(points["instance"])) == points["instance"].max() + 2


def test_the_sens_holds_the_very_frames_that_are_exported(pair):
    scan, name, direct = pair
    header, frames, tail = read_sens(scan / f"{name}.sens")
    assert (header["version"], header["name"]) == (4, b"StructureSensor")
    assert (header["compression"], header["size"], header["shift"]) == ((2, 1), SIZE * 2, 1000)
    camera = np.loadtxt(direct["folder"] / "intrinsic" / "intrinsic_color.txt")
    for kind in ("color", "depth"):
        np.testing.assert_allclose(header[f"{kind}_intrinsic"], camera, rtol=1e-6)
        np.testing.assert_array_equal(header[f"{kind}_extrinsic"], np.eye(4))
        np.testing.assert_array_equal(np.loadtxt(scan / "intrinsic" / f"intrinsic_{kind}.txt"), camera)
    assert len(frames) == rooms.FRAMES
    for kind, ending in (("color", "jpg"), ("depth", "png"), ("pose", "txt")):
        assert {path.name for path in (scan / kind).iterdir()} == {f"{i}.{ending}" for i in range(rooms.FRAMES)}
    matrix = alignment_of(scan)
    for i, (pose, color, depth) in enumerate(frames):
        image = (direct["folder"] / "color" / f"{i}.jpg").read_bytes()
        assert color == image == (scan / "color" / f"{i}.jpg").read_bytes()
        assert (scan / "depth" / f"{i}.png").read_bytes() == (direct["folder"] / "depth" / f"{i}.png").read_bytes()
        values = np.frombuffer(zlib.decompress(depth), "<u2").reshape(SIZE[::-1])
        np.testing.assert_array_equal(values, np.asarray(Image.open(scan / "depth" / f"{i}.png")))
        exported = np.loadtxt(scan / "pose" / f"{i}.txt")
        np.testing.assert_allclose(pose, exported, atol=2e-6)
        wanted = np.loadtxt(direct["folder"] / "pose" / f"{i}.txt")
        np.testing.assert_allclose(matrix @ exported, wanted, atol=5e-6)
        assert np.abs(exported - wanted).max() > 0.05
    readings, = struct.unpack_from("<Q", tail)
    assert len(tail) == 8 + 128 * readings


def test_points_and_poses_share_the_unaligned_frame(pair):
    scan, name, _ = pair
    coord, _, _ = vertices(scan / f"{name}_vh_clean_2.ply")
    camera = np.loadtxt(scan / "intrinsic" / "intrinsic_depth.txt")[:3, :3]
    seen = np.zeros(len(coord), bool)
    for i in range(rooms.FRAMES):
        pose = np.loadtxt(scan / "pose" / f"{i}.txt")
        depth = np.asarray(Image.open(scan / "depth" / f"{i}.png")) / 1000
        local = (coord - pose[:3, 3]) @ pose[:3, :3]
        front = local[:, 2] > 0.05
        column, row = np.round((local @ camera.T)[:, :2] / np.where(front, local[:, 2], 1)[:, None]).astype(int).T
        rows = np.flatnonzero(front & (column >= 0) & (column < SIZE[0]) & (row >= 0) & (row < SIZE[1]))
        seen[rows] |= np.abs(depth[row[rows], column[rows]] - local[rows, 2]) < 0.05
    assert seen.mean() > 0.5


def test_the_same_seed_gives_the_same_scan(roots, tmp_path):
    rooms.write_scan(tmp_path / "scene0001_00", roots[0] / "val" / "room_0000", (3, 1, 0))
    first, second = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
                     for folder in (roots[1] / "scans", tmp_path))
    assert {name: first[name] for name in first if name.startswith("scene0001")} == second


@pytest.mark.parametrize("theirs", ["scans/scene0000_00/scene0000_00.txt", "scannetv2_val.txt"])
def test_a_download_of_scannet_is_left_alone(tmp_path, theirs):
    (tmp_path / theirs).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / theirs).write_text("theirs")
    with pytest.raises(ValueError, match=r"not generated rooms.*--as-scannet"):
        rooms.generate(tmp_path, as_scannet=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / theirs]


def test_scene_folders_and_scans_do_not_share_a_folder(roots):
    for root, other in zip(roots, (True, False)):
        with pytest.raises(ValueError, match="holds rooms made with"):
            rooms.generate(root, train=1, val=1, seed=3, image_size=SIZE, as_scannet=other)


def test_the_command_line_writes_scans_and_refuses_both_forms_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rooms.py", "--as-scannet", str(tmp_path), "--train", "0", "--val", "0"])
    rooms.main()
    assert f"{tmp_path}: 0 rooms made" in capsys.readouterr().out
    assert (tmp_path / "scans").is_dir()
    sys.argv += ["--out", "elsewhere"]
    with pytest.raises(SystemExit):
        rooms.main()
    assert "not allowed with" in capsys.readouterr().err


def visible_voxels(folder, scene):
    """The frames of a scene folder and the set of its 5 cm voxels that any of them sees."""
    frames = load_frames(folder, scene["frame_ids"], SIZE)
    item = scene_item(scene, frames, 0.05)
    world, matrices, intrinsics, depth = (
        torch.from_numpy(item[key]) for key in ("world_coord", "world_to_camera", "intrinsics", "depth"))
    rows = np.unique(link_views(world, matrices, intrinsics, depth).point)
    return frames, {tuple(cell) for cell in item["grid_coord"][rows].tolist()}


@pytest.fixture(scope="module", params=["sens", "exported"])
def prepared(request, roots, tmp_path_factory):
    """What scannet.py makes of the scans when one kind of frames is left: the folder of the data set."""
    from scenes import scannet

    raw, out = (tmp_path_factory.mktemp(name) for name in ("raw", "out"))
    shutil.copytree(roots[1], raw, copy_function=os.link, dirs_exist_ok=True)
    for name in SCANS:
        scan = raw / "scans" / name
        if request.param == "exported":
            (scan / f"{name}.sens").unlink()
        else:
            for kind in ("color", "depth", "pose", "intrinsic"):
                shutil.rmtree(scan / kind)
    scannet.main([str(raw / "scans"), "--out", str(out), "--frames", "1"])
    return out


@pytest.mark.parametrize("name", sorted(SCANS))
def test_rooms_that_go_through_scannet_equal_those_written_directly(roots, prepared, name):
    folders = roots[0] / SCANS[name] / "room_0000", prepared / SCANS[name] / name
    direct, back = (load_scene(folder) for folder in folders)
    for key in ("color", "segment", "superpoint"):
        np.testing.assert_array_equal(back[key], direct[key], err_msg=key)
    things = direct["instance"] >= 0
    np.testing.assert_array_equal(back["instance"][things], direct["instance"][things])
    assert np.abs(back["coord"] - direct["coord"]).max() < 1e-5
    assert ((back["normal"] * direct["normal"]).sum(1) > np.cos(np.radians(30))).mean() > 0.98
    assert back["frame_ids"] == direct["frame_ids"] and back["frames_skipped"] == 0
    (old, expected), (new, found) = (visible_voxels(*both) for both in zip(folders, (direct, back)))
    for key in ("image", "depth"):
        np.testing.assert_array_equal(new[key], old[key])
    np.testing.assert_allclose(new["world_to_camera"], old["world_to_camera"], atol=1e-5)
    assert len(expected) > 5000
    assert len(found ^ expected) <= 0.005 * len(expected)


@pytest.mark.parametrize("name", sorted(SCANS))
def test_walls_and_floors_are_groups_of_a_scan_but_no_instances_of_its_scene_folder(roots, prepared, name):
    direct, back = (np.load(folder / "instance.npy") for folder in (
        roots[0] / SCANS[name] / "room_0000", prepared / SCANS[name] / name))
    np.testing.assert_array_equal(back, direct)
