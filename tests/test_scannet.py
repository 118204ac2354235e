"""scannet.py: official files -> scene folders, with every trap of the format; damaged files; submissions."""

import io
import json
import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_ply import DAMAGE, QUICK, damage, grid_mesh, mesh_columns, peak_memory, ply_bytes, scene_or_clear_error

from conftest import Payload
from model import build_model
from scenes import scannet
from scenes.folder import NYU40_IDS, load_frames, load_scene
from stages import parameter_groups
from train import Config, save_checkpoint

AXIS = np.array([[0.8, -0.6, 0, 1.5], [0.6, 0.8, 0, -2.0], [0, 0, 1, 0.25], [0, 0, 0, 1]])
COLOR_SIZE, DEPTH_SIZE = (64, 48), (32, 24)


def sens_bytes(poses, count=None, depth_packing=1, shift=1000.0, name=b"StructureSensor"):
    """A .sens of these poses with jpeg and zlib; frame i has depth 1000 + i everywhere."""
    k = np.eye(4)
    k[0, 0] = k[1, 1] = 60
    k[:2, 2] = (COLOR_SIZE[0] - 1) / 2, (COLOR_SIZE[1] - 1) / 2
    kd = k.copy()
    kd[:2] *= 0.5
    out = struct.pack("<IQ", 4, len(name)) + name
    for matrix in (k, np.eye(4), kd, np.eye(4)):
        out += struct.pack("<16f", *matrix.ravel())
    out += struct.pack("<ii", 2, depth_packing) + struct.pack("<IIII", *COLOR_SIZE, *DEPTH_SIZE)
    out += struct.pack("<f", shift) + struct.pack("<Q", len(poses) if count is None else count)
    for i, pose in enumerate(poses):
        color, depth = jpeg_bytes(i), np.full(DEPTH_SIZE[::-1], 1000 + i, "<u2").tobytes()
        depth = zlib.compress(depth) if depth_packing == 1 else depth
        out += struct.pack("<16f", *np.asarray(pose).ravel()) + struct.pack("<QQQQ", i, i, len(color), len(depth))
        out += color + depth
    return out + b"IMU data that nobody reads"


def jpeg_bytes(i, size=COLOR_SIZE):
    out = io.BytesIO()
    Image.new("RGB", size, (10 * i % 256, 100, 50)).save(out, "JPEG")
    return out.getvalue()


def png_bytes(value=1000, size=DEPTH_SIZE, dtype=np.uint16):
    out = io.BytesIO()
    Image.fromarray(np.full(size[::-1], value, dtype)).save(out, "PNG")
    return out.getvalue()


def some_poses(count=5, lost=(3,)):
    poses = [np.eye(4) for _ in range(count)]
    for i, pose in enumerate(poses):
        pose[:3, 3] = i, 0.5, 1.5
    for i in lost:
        poses[i] = np.full((4, 4), -np.inf)
    return poses


def write_scan(folder, labelled=True, sens=True, axis=AXIS):
    """One official scan of 30 vertices in 6 segments (the columns of the sheet) and 4 groups, two of which overlap."""
    name = folder.name
    folder.mkdir(parents=True)
    coord, faces = grid_mesh()
    column = np.arange(30) % 6
    (folder / f"{name}_vh_clean_2.ply").write_bytes(ply_bytes(mesh_columns(coord), faces))
    text = "colorWidth = 64\nnumDepthFrames = 5\nsceneType = Bathroom / Toilet\n"
    if axis is not None:
        text = "axisAlignment = " + " ".join(map(str, axis.ravel())) + " \n" + text
    (folder / f"{name}.txt").write_text(text)
    if labelled:
        label = np.array([1, 2, 40, 50, 149, 39])[column]
        (folder / f"{name}_vh_clean_2.labels.ply").write_bytes(ply_bytes(mesh_columns(coord, label), faces))
        segments = np.array([700, 3, 41, 8, 9, 250000])[column]
        (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(
            {"params": {"kThresh": "0.01"}, "sceneId": name, "segIndices": segments.tolist()}))
        groups = [("wall", [700]), ("floor", [3, 41]), ("chair", [41, 8]), ("odd thing", [250000])]
        (folder / f"{name}.aggregation.json").write_text(json.dumps({"sceneId": name, "segGroups": [
            {"id": i, "objectId": i, "segments": s, "label": label} for i, (label, s) in enumerate(groups)]}))
        # the file of the other mesh: must not be taken
        (folder / f"{name}_vh_clean.aggregation.json").write_text(json.dumps({"segGroups": []}))
    if sens:
        (folder / f"{name}.sens").write_bytes(sens_bytes(some_poses()))
    return folder


def write_exported(folder, padded=False, color_size=COLOR_SIZE, intrinsics_size=COLOR_SIZE):
    """Frames 0, 20, 100 and a lost one: as ScanNet exports them, or as in scannet_frames_25k."""
    for name in ("color", "depth", "pose", *(() if padded else ("intrinsic",))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, pose in zip((0, 20, 40, 100), some_poses(4, lost=(2,))):
        stem = f"{index:06d}" if padded else str(index)
        (folder / "color" / f"{stem}.jpg").write_bytes(jpeg_bytes(index, color_size))
        (folder / "depth" / f"{stem}.png").write_bytes(png_bytes(1000 + index))
        np.savetxt(folder / "pose" / f"{stem}.txt", pose)
    k = np.eye(4)
    k[:2, 2] = (np.array(intrinsics_size) - 1) / 2
    k[0, 0] = k[1, 1] = intrinsics_size[0]
    np.savetxt(folder / ("intrinsics_color.txt" if padded else "intrinsic/intrinsic_color.txt"), k)


@pytest.fixture
def download(tmp_path):
    """A download: two labelled scans, a test scan, one in no list, split lists, label table."""
    root = tmp_path / "download"
    for name in ("scene0000_00", "scene0011_00", "scene0500_00"):
        write_scan(root / "scans" / name)
    write_scan(root / "scans_test" / "scene0707_00", labelled=False, axis=None)
    (root / "Tasks" / "Benchmark").mkdir(parents=True)
    for split, name in (("train", "scene0000_00"), ("val", "scene0011_00"), ("test", "scene0707_00")):
        (root / "Tasks" / "Benchmark" / f"scannetv2_{split}.txt").write_text(name + "\n")
    (root / "scannetv2-labels.combined.tsv").write_text(
        "id\traw_category\tcategory\tcount\tnyu40id\n1\twall\twall\t9\t1\n3\tfloor\tfloor\t9\t2\n2\tchair\tchair\t9\t5\n"
        "12\todd thing\tthing\t1\t40\n")
    return root


# ------------------------------------------------------------------------------------------------- scans to scenes


def test_a_download_becomes_scene_folders_that_data_py_reads(download, tmp_path):
    out = tmp_path / "out"
    result = scannet.prepare(download, out, every=2, workers=1)
    assert result == {"made": 3, "there": 0, "absent": 0, "skipped": {"scene0500_00": "in no split list"}, "notes": {}}
    scene = load_scene(out / "train" / "scene0000_00")
    column = np.arange(30) % 6
    coord, _ = grid_mesh()
    np.testing.assert_allclose(scene["coord"], coord @ AXIS[:3, :3].T + AXIS[:3, 3], atol=1e-6)
    np.testing.assert_array_equal(scene["segment"], np.array([0, 1, -1, -1, -1, 19])[column])
    np.testing.assert_array_equal(scene["instance"], np.array([-1, -1, 0, 0, -1, 1])[column])  # the last group wins
    np.testing.assert_array_equal(scene["superpoint"], np.array([4, 0, 3, 1, 2, 5])[column])  # order of the ids
    np.testing.assert_allclose(scene["normal"], np.tile([0, 0, 1], (30, 1)), atol=1e-6)
    np.testing.assert_array_equal(scene["color"][:, 1], (40 + 3 * np.arange(30)) % 256)
    segment200 = np.load(out / "train" / "scene0000_00" / "segment200.npy")
    np.testing.assert_array_equal(segment200, np.array([0, 2, 1, 1, -1, -1])[column])
    assert scene["frame_ids"] == [0, 2, 4]
    test = load_scene(out / "test" / "scene0707_00")
    assert test["segment"] is None and test["instance"] is None
    assert sorted(p.name for p in out.iterdir()) == ["scannetv2_test.txt", "scannetv2_train.txt", "scannetv2_val.txt",
                                                     "test", "train", "val"]


def test_poses_follow_the_points_and_images_stay_byte_for_byte(download, tmp_path):
    scannet.prepare(download, tmp_path / "out", every=2, workers=1)
    scene = tmp_path / "out" / "train" / "scene0000_00"
    assert (scene / "color" / "2.jpg").read_bytes() == jpeg_bytes(2)
    frames = load_frames(scene, [0, 2], COLOR_SIZE)
    for view, i in enumerate((0, 2)):
        point = np.array([i + 0.3, 0.7, 2.5])  # 1 m in front of camera i, in the frame of the .sens
        aligned = AXIS @ [*point, 1]
        np.testing.assert_allclose((frames["world_to_camera"][view] @ aligned)[:3], [0.3, 0.2, 1.0], atol=1e-5)
        np.testing.assert_allclose(frames["depth"][view], 1 + i / 1000, atol=1e-6)
    np.testing.assert_allclose(frames["intrinsics"][0], [[60, 0, 31.5], [0, 60, 23.5], [0, 0, 1]], atol=1e-5)


def test_parallel_runs_write_the_same_files_as_one_process(download, tmp_path):
    for workers in (1, 2):
        scannet.prepare(download, tmp_path / str(workers), every=2, workers=workers)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) > 30
    assert files == sorted(p.relative_to(tmp_path / "2") for p in (tmp_path / "2").rglob("*") if p.is_file())
    assert all((tmp_path / "1" / f).read_bytes() == (tmp_path / "2" / f).read_bytes() for f in files)


def test_finished_scenes_are_skipped_and_half_written_ones_redone(download, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = scannet.write_frames

    def killed(target, *arguments):
        write(target, *arguments)
        if "scene0011" in target.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(scannet, "write_frames", killed)
    with pytest.raises(KeyboardInterrupt):
        scannet.prepare(download, out, workers=1)
    assert (out / "train" / "scene0000_00").is_dir() and not (out / "val" / "scene0011_00").exists()
    (out / ".unfinished" / "scene0011_00_1").mkdir(parents=True)  # as a killed process leaves it
    monkeypatch.undo()
    result = scannet.prepare(download, out, workers=1)
    assert (result["made"], result["there"]) == (2, 1)
    assert not (out / ".unfinished").exists() and load_scene(out / "val" / "scene0011_00")["frame_ids"] == [0]


def test_the_folder_of_the_scans_may_be_given_and_the_split_lists_apart(download, tmp_path):
    lists = tmp_path / "lists"
    (download / "Tasks" / "Benchmark").rename(lists)
    with pytest.raises(FileNotFoundError, match=r"no split list.*scannetv2_train.txt.*--splits"):
        scannet.prepare(download / "scans", tmp_path / "out")
    result = scannet.prepare(download / "scans", tmp_path / "out", splits=lists, workers=1)
    assert result["made"] == 2


@pytest.mark.parametrize("missing", ["_vh_clean_2.labels.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json",
                                     ".txt"])
def test_a_scan_with_a_missing_file_is_listed_and_the_others_go_on(download, tmp_path, missing, capsys):
    (download / "scans" / "scene0000_00" / f"scene0000_00{missing}").unlink()
    scannet.main([str(download), "--out", str(tmp_path / "out"), "--workers", "1"])
    text = capsys.readouterr().out
    assert "skipped scene0000_00: " in text and f"scene0000_00{missing}" in text
    assert "2 scenes made, 0 were there, 2 skipped" in text


def test_files_of_another_scan_are_refused(download, tmp_path):
    scan = download / "scans" / "scene0000_00"
    small = {axis: ("float", [0.0, 1.0]) for axis in "xyz"} | {"label": ("ushort", [1, 2])}
    (scan / "scene0000_00_vh_clean_2.labels.ply").write_bytes(ply_bytes(small))
    with pytest.raises(ValueError, match=r"labels\.ply: expected labels of 30 vertices, found 2"):
        scannet.read_scan(scan, labelled=True)
    write_scan(tmp_path / "scene0001_00")
    groups = tmp_path / "scene0001_00" / "scene0001_00.aggregation.json"
    groups.write_text(groups.read_text().replace("700", "123456"))
    with pytest.raises(ValueError, match=r"aggregation\.json: expected segments of the scan's segs\.json"):
        scannet.read_scan(groups.parent, labelled=True)


def test_groups_that_are_overwritten_leave_no_gap_in_the_ids(tmp_path):
    """As in scene0217_00, whose groups stand in the file twice."""
    scan = write_scan(tmp_path / "scene0217_00")
    groups = [{"id": i, "objectId": i, "segments": s, "label": "x"} for i, s in enumerate(([41], [8], [41], [8, 9]))]
    (scan / "scene0217_00.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    scene, _ = scannet.read_scan(scan, labelled=True)
    np.testing.assert_array_equal(scene["instance"], np.array([-1, -1, 0, 1, 1, -1])[np.arange(30) % 6])


def test_walls_and_floors_are_no_instances_whatever_their_groups_are_called(tmp_path):
    scan = write_scan(tmp_path / "scene0001_00")
    groups = [{"segments": [250000], "label": "wall"}, {"segments": [3, 700], "label": "chair"}]
    (scan / "scene0001_00.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    scene, _ = scannet.read_scan(scan, labelled=True)
    np.testing.assert_array_equal(scene["instance"], np.array([-1, -1, -1, -1, -1, 0])[np.arange(30) % 6])


def test_no_group_at_all_means_no_instance(tmp_path):
    scan = write_scan(tmp_path / "scene0001_00")
    (scan / "scene0001_00.aggregation.json").write_text('{"segGroups": []}')
    scene, _ = scannet.read_scan(scan, labelled=True)
    assert (scene["instance"] == -1).all()


# ----------------------------------------------------------------------------------------------------------- frames


def test_every_kth_frame_with_a_finite_pose_comes_out_of_a_sens(tmp_path):
    path = tmp_path / "a.sens"
    path.write_bytes(sens_bytes(some_poses(9, lost=(4,))))
    header, frames = scannet.read_sens(path, every=2)
    frames = list(frames)
    assert [index for index, *_ in frames] == [0, 2, 6, 8]
    assert header["frame_count"] == 9 and header["color_size"] == COLOR_SIZE and header["suffix"] == ".jpg"
    for index, pose, color, depth in frames:
        assert pose[0, 3] == index and color == jpeg_bytes(index) and (depth == 1000 + index).all()
        assert depth.shape == DEPTH_SIZE[::-1] and depth.dtype == np.uint16


def test_frames_that_are_not_wanted_are_not_even_read(tmp_path):
    data = bytearray(sens_bytes(some_poses(3, lost=())))
    start = data.index(jpeg_bytes(1))
    data[start : start + len(jpeg_bytes(1)) + 20] = bytes(len(jpeg_bytes(1)) + 20)  # image and depth of frame 1
    (tmp_path / "a.sens").write_bytes(data)
    assert [index for index, *_ in scannet.read_sens(tmp_path / "a.sens", every=2)[1]] == [0, 2]
    with pytest.raises(ValueError, match=r"a\.sens, frame 1: expected depth packed by zlib"):
        list(scannet.read_sens(tmp_path / "a.sens")[1])


@pytest.mark.parametrize("padded", [False, True])
def test_exported_frames_and_frames_25k_are_read(download, tmp_path, padded):
    for name in ("scene0000_00", "scene0011_00"):
        (download / "scans" / name / f"{name}.sens").unlink()
    write_exported(download / ("scannet_frames_25k" if padded else "scans") / "scene0000_00", padded)
    result = scannet.prepare(download, tmp_path / "out", every=50, workers=1)
    assert result["notes"] == {"scene0011_00": "no frames"}
    scene = load_scene(tmp_path / "out" / "train" / "scene0000_00")
    assert scene["frame_ids"] == ([0, 20, 100] if padded else [0, 100])  # a thinned set is not thinned again
    frames = load_frames(tmp_path / "out" / "train" / "scene0000_00", [100], COLOR_SIZE)
    np.testing.assert_allclose(frames["depth"], 1.1, atol=1e-6)


def test_a_sens_comes_before_frames_25k(download, tmp_path):
    write_exported(download / "scannet_frames_25k" / "scene0000_00", padded=True)
    scannet.prepare(download, tmp_path / "out", every=1, workers=1)
    assert load_scene(tmp_path / "out" / "train" / "scene0000_00")["frame_ids"] == [0, 1, 2, 4]


def test_intrinsics_of_images_of_another_size_are_refused(tmp_path):
    write_exported(tmp_path / "scene0000_00", color_size=(324, 242), intrinsics_size=(1296, 968))
    with pytest.raises(ValueError, match=r"intrinsic_color\.txt: expected intrinsics of an image of 324x242"):
        scannet.write_frames(tmp_path / "out", [tmp_path / "scene0000_00"], 1, np.eye(4))


def test_raw_depth_is_read_too(tmp_path):
    (tmp_path / "a.sens").write_bytes(sens_bytes(some_poses(1, lost=()), depth_packing=0))
    (_, _, _, depth), = scannet.read_sens(tmp_path / "a.sens")[1]
    assert (depth == 1000).all()


@pytest.mark.parametrize("aligned", [False, True])
def test_frames_only_adds_frames_in_the_frame_of_the_points_and_touches_no_array(download, tmp_path, aligned):
    scene = tmp_path / "out" / "train" / "scene0000_00"
    scene.mkdir(parents=True)
    coord, _ = grid_mesh()
    matrix = AXIS if aligned else np.eye(4)
    np.save(scene / "coord.npy", (coord @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32))
    np.save(scene / "color.npy", np.zeros((30, 3), np.uint8))
    before = {p.name: p.read_bytes() for p in scene.iterdir()}
    result = scannet.prepare(download, tmp_path / "out", every=2, frames_only=True, workers=1)
    assert (result["made"], result["skipped"], result["notes"]) == (1, {}, {})
    assert {name: (scene / name).read_bytes() for name in before} == before
    assert sorted(p.name for p in scene.iterdir()) == ["color", "color.npy", "coord.npy", "depth", "intrinsic", "pose"]
    np.testing.assert_allclose(np.loadtxt(scene / "pose" / "2.txt"), matrix @ some_poses()[2], atol=1e-7)
    assert load_scene(scene)["frame_ids"] == [0, 2, 4]
    assert scannet.prepare(download, tmp_path / "out", every=2, frames_only=True, workers=1)["there"] == 1


def test_frames_only_leaves_folders_of_others_alone(download, tmp_path):
    for name in ("scene0011_00", "scene0012_00"):
        (tmp_path / "out" / "val" / name).mkdir(parents=True)
        np.save(tmp_path / "out" / "val" / name / "coord.npy", grid_mesh()[0])
    (tmp_path / "out" / "val" / "scene0011_00" / "color").mkdir()
    result = scannet.prepare(download, tmp_path / "out", every=2, frames_only=True, workers=1)
    assert (result["made"], result["absent"]) == (0, 1)
    assert "holds color/ without pose/" in result["skipped"]["scene0011_00"]
    assert not (tmp_path / "out" / "val" / "scene0011_00" / "pose").exists()


def test_frames_only_says_when_there_is_no_mesh_to_compare_with(download, tmp_path):
    scene = tmp_path / "out" / "train" / "scene0000_00"
    scene.mkdir(parents=True)
    np.save(scene / "coord.npy", grid_mesh()[0])
    (download / "scans" / "scene0000_00" / "scene0000_00_vh_clean_2.ply").unlink()
    result = scannet.prepare(download, tmp_path / "out", frames_only=True, workers=1)
    assert "not axis-aligned" in result["notes"]["scene0000_00"]


@DAMAGE
@QUICK
def test_a_damaged_coord_npy_gets_no_frames(tmp_path, how, place, value):
    scan = tmp_path / "scene0000_00"
    if not scan.is_dir():
        write_scan(scan, sens=False)
    data = io.BytesIO()
    np.save(data, grid_mesh()[0])
    (tmp_path / "coord.npy").write_bytes(damage(data.getvalue(), how, place, value))
    scene_or_clear_error(tmp_path / "coord.npy", lambda: scannet._axis_of_points(tmp_path, scan))


def test_points_of_another_mesh_get_no_frames(download, tmp_path):
    scene = tmp_path / "out" / "train" / "scene0000_00"
    scene.mkdir(parents=True)
    np.save(scene / "coord.npy", grid_mesh()[0] + 0.5)
    result = scannet.prepare(download, tmp_path / "out", frames_only=True, workers=1)
    assert "coord.npy: expected the vertices of the scan's mesh" in result["skipped"]["scene0000_00"]
    assert sorted(p.name for p in scene.iterdir()) == ["coord.npy"]


# --------------------------------------------------------------------------------------------------- damaged files


@DAMAGE
@QUICK
def test_a_damaged_sens_is_read_or_a_clear_error(tmp_path, how, place, value):
    path = tmp_path / "scene0000_00.sens"
    path.write_bytes(damage(sens_bytes(some_poses(3, lost=(1,))), how, place, value))

    def read():
        header, frames = scannet.read_sens(path)
        assert all(depth.shape == header["depth_size"][::-1] for *_, depth in frames)

    scene_or_clear_error(path, read)


@pytest.mark.parametrize(("name", "said"), [
    ("_vh_clean_2.ply", "expected 30 rows of vertex"), ("_vh_clean_2.labels.ply", "expected 30 rows of vertex"),
    (".sens", "expected"), (".aggregation.json", "expected"), ("_vh_clean_2.0.010000.segs.json", "expected")])
def test_a_scan_with_a_truncated_file_is_listed_with_expected_and_found_and_the_others_go_on(
        download, tmp_path, capsys, name, said):
    path = download / "scans" / "scene0000_00" / f"scene0000_00{name}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    before = path.read_bytes()
    scannet.main([str(download), "--out", str(tmp_path / "out"), "--workers", "1"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped scene0000_00: ")]
    assert str(path) in line and said in line and ", found " in line
    assert (tmp_path / "out" / "val" / "scene0011_00" / "coord.npy").is_file()
    assert not (tmp_path / "out" / "train" / "scene0000_00").exists()
    assert path.read_bytes() == before


@pytest.mark.parametrize("form", ["array of objects", "bare pickle"])
def test_points_that_get_frames_never_run_what_is_pickled_in_them(download, tmp_path, form):
    scene, touched = tmp_path / "out" / "train" / "scene0000_00", tmp_path / "touched"
    scene.mkdir(parents=True)
    if form == "bare pickle":
        (scene / "coord.npy").write_bytes(pickle.dumps(Payload(touched)))
    else:
        np.save(scene / "coord.npy", np.array([Payload(touched)], dtype=object), allow_pickle=True)
    result = scannet.prepare(download, tmp_path / "out", frames_only=True, workers=1)
    assert "coord.npy" in result["skipped"]["scene0000_00"]
    assert not touched.exists()
    np.load(scene / "coord.npy", allow_pickle=True)
    assert touched.exists()  # the test can fail: this is what happens otherwise


@pytest.mark.parametrize("name", ["_vh_clean_2.ply", "_vh_clean_2.labels.ply", "_vh_clean_2.0.010000.segs.json",
                                  ".aggregation.json", ".txt"])
@DAMAGE
@QUICK
def test_a_scan_with_a_damaged_file_is_a_scene_or_a_clear_error(tmp_path, name, how, place, value):
    scan = tmp_path / "scene0000_00"
    if not scan.is_dir():
        write_scan(scan, sens=False)
        (tmp_path / "whole").write_bytes((scan / f"scene0000_00{name}").read_bytes())
    (scan / f"scene0000_00{name}").write_bytes(damage((tmp_path / "whole").read_bytes(), how, place, value))

    def read():
        scene, axis = scannet.read_scan(scan, labelled=True)
        assert all(len(array) == len(scene["coord"]) for array in scene.values()) and np.isfinite(axis).all()
        assert np.isfinite(scene["coord"]).all() and scene["segment20"].max() < 20 and scene["segment20"].min() >= -1

    scene_or_clear_error(scan, read)


@pytest.mark.parametrize("name", ["color/20.jpg", "depth/20.png", "pose/20.txt", "intrinsic/intrinsic_color.txt"])
@DAMAGE
@QUICK
def test_a_damaged_exported_frame_is_taken_or_a_clear_error(tmp_path, name, how, place, value):
    scan = tmp_path / "scene0000_00"
    if not scan.is_dir():
        write_exported(scan)
        (tmp_path / "whole").write_bytes((scan / name).read_bytes())
    (scan / name).write_bytes(damage((tmp_path / "whole").read_bytes(), how, place, value))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    scene_or_clear_error(scan / name, lambda: scannet.write_frames(tmp_path / "out", [scan], 1, np.eye(4)))


@pytest.mark.parametrize("name", ["color/0.jpg", "depth/0.png", "pose/0.txt", "intrinsic/intrinsic_color.txt"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"nan " * 16, png_bytes()[:60], b"1 " * 2**20],
                         ids=["empty", "zeros", "nan", "truncated image", "long"])
def test_a_frame_with_a_file_of_another_kind_is_refused_or_skipped(tmp_path, name, content):
    scan = tmp_path / "scene0000_00"
    write_exported(scan)
    (scan / name).write_bytes(content)
    out = tmp_path / "out"
    if scene_or_clear_error(scan / name, lambda: scannet.write_frames(out, [scan], 1, np.eye(4))):
        assert not (out / "pose" / "0.txt").exists() and name.startswith("pose")  # nan: tracking was lost


@pytest.mark.parametrize("content", [
    "", "[]", "7", '{"array": 3}', '{"segIndices": 1}', '{"segIndices": [1.5]}', '{"segIndices": [1,]}', "\0\xff",
    '{"segIndices": [,]}', '{"segIndices": [1 2]}', '{"segIndices": {"array": 9}}', '{"segIndices": {"array": "x"}}',
    '{"segIndices": [999999999999]}', pytest.param("[" * 100_000, id="deep"),
    pytest.param("{}," * 400_000, id="objects"),
    pytest.param('{"segIndices": [' + "[1]," * 70_000 + "0]}", id="many lists")])
def test_json_that_is_no_list_of_segments_is_refused(tmp_path, content):
    scan = write_scan(tmp_path / "scene0000_00", sens=False)
    for name in ("_vh_clean_2.0.010000.segs.json", ".aggregation.json"):
        path = scan / f"scene0000_00{name}"
        whole = path.read_bytes()
        path.write_text(content)
        with pytest.raises(ValueError, match=r"expected .* found"):
            scannet.read_scan(scan, labelled=True)
        path.write_bytes(whole)


def test_lists_of_numbers_longer_than_a_piece_are_read_whole(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 10**6, 50_000)
    (tmp_path / "a.json").write_text(json.dumps({"segIndices": numbers.tolist(), "other": [1.5, "x", []], "n": None}))
    content = scannet._read_json(tmp_path / "a.json")
    np.testing.assert_array_equal(content["segIndices"], numbers)
    assert content["other"] == [1.5, "x", []] and content["n"] is None


def huge(offset, kind, value):
    """A .sens of one frame with one number of it replaced."""
    data = bytearray(sens_bytes(some_poses(1, lost=())))
    struct.pack_into(kind, data, offset, value)
    return bytes(data)


HEAD = 12 + len("StructureSensor") + 256  # where the compression types stand


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "12 bytes of header"),
    (huge(0, "<I", 3), "a .sens of version 4, found version 3"),
    (huge(4, "<Q", 2**63), f"a sensor name of {2**63} bytes"),
    (huge(HEAD, "<i", 9), "colour packed as 1 or 2"),
    (huge(HEAD + 4, "<i", 2), "depth as 0 or 1"),
    (huge(HEAD + 8, "<I", 2**32 - 1), f"images of 1..{2**22} pixels"),
    (huge(HEAD + 16, "<I", 0), "64x48, 0x24"),
    (huge(HEAD + 24, "<f", float("nan")), "in mm"),
    (huge(HEAD + 28, "<Q", 2**60), f"{2**60} frames"),
    (huge(HEAD + 36 + 80, "<Q", 2**62), "frame 0: expected"),
    (huge(HEAD + 36 + 88, "<Q", 2**64 - 1), "frame 0: expected"),
])
def test_a_sens_whose_header_promises_too_much_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.sens"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(scannet.read_sens(path)[1])
    assert str(path) in str(error.value) and reason in str(error.value)


def test_a_depth_image_of_8_bit_is_refused(tmp_path):
    write_exported(tmp_path / "scene0000_00")
    (tmp_path / "scene0000_00" / "depth" / "20.png").write_bytes(png_bytes(7, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"20\.png: expected a whole PNG, found mode L, not 16 bit"):
        scannet.write_frames(tmp_path / "out", [tmp_path / "scene0000_00"], 1, np.eye(4))


def test_reading_json_takes_no_more_than_twice_the_file_in_memory(tmp_path):
    for numbers in (np.arange(400_000), np.zeros(2_000_000, int)):
        (tmp_path / "a.json").write_text(text := json.dumps({"segIndices": numbers.tolist()}, separators=(",", ":")))
        assert peak_memory(lambda: scannet._read_json(tmp_path / "a.json")) < 2 * len(text) + 2 * 2**20


def test_a_depth_image_that_unpacks_to_far_more_than_it_should_is_refused_in_little_memory(tmp_path):
    bomb = zlib.compress(bytes(200 * 2**20))
    data = sens_bytes(some_poses(1, lost=()))
    start = data.index(jpeg_bytes(0))
    whole = data[: start - 8] + struct.pack("<Q", len(bomb)) + jpeg_bytes(0) + bomb
    (tmp_path / "a.sens").write_bytes(whole)

    def read():
        with pytest.raises(ValueError, match=r"expected 1536 bytes of depth, found 1537 or more"):
            list(scannet.read_sens(tmp_path / "a.sens")[1])

    assert peak_memory(read) < 2 * len(whole) + 2**20


def test_a_jpeg_that_says_it_is_huge_is_refused_in_little_memory():
    data = bytearray(jpeg_bytes(0))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 9000, 9000)  # Pillow itself allows that

    def read():
        with pytest.raises(ValueError, match=r"a\.jpg: expected a whole JPEG, found 9000x9000 pixels"):
            scannet._image_size("a.jpg", bytes(data), ["JPEG"])

    assert peak_memory(read) < 2**20


def test_an_image_of_absurd_size_in_its_header_is_refused(tmp_path):
    write_exported(tmp_path / "scene0000_00")
    data = bytearray(png_bytes())
    data[16:24] = struct.pack(">II", 2**30, 2**30)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "scene0000_00" / "depth" / "0.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.png: expected a whole PNG"):
        scannet.write_frames(tmp_path / "out", [tmp_path / "scene0000_00"], 1, np.eye(4))


# -------------------------------------------------------------------------------------------------------- submission


def test_instances_are_written_in_the_benchmarks_form_and_packed_if_whole(tmp_path):
    folder = tmp_path / "instance"
    masks = [np.array([1, 0, 1], bool), np.array([1])]  # as a mask, as indices
    files = scannet.write_instances(folder, "scene0707_00", 3, masks, [4, 19], [0.75, 1e-7])
    files |= scannet.write_instances(folder, "scene0708_00", 3, [], [], [])
    assert (folder / "scene0707_00.txt").read_text() == (
        "predicted_masks/scene0707_00_000.txt 5 0.750000\npredicted_masks/scene0707_00_001.txt 39 0.000000\n")
    assert (folder / "predicted_masks" / "scene0707_00_000.txt").read_text() == "1\n0\n1\n"
    assert (folder / "predicted_masks" / "scene0707_00_001.txt").read_text() == "0\n1\n0\n"
    assert (folder / "scene0708_00.txt").read_text() == ""
    assert sorted(zipfile.ZipFile(scannet._zip_checked(files)).namelist()) == [
        "predicted_masks/scene0707_00_000.txt", "predicted_masks/scene0707_00_001.txt", "scene0707_00.txt",
        "scene0708_00.txt"]
    (folder / "predicted_masks" / "scene0707_00_001.txt").write_text("0\n1\n")
    with pytest.raises(ValueError, match=r"001\.txt: expected 3 lines, found 2"):
        scannet._zip_checked(files)


def test_submit_packs_labels_and_instances_of_each_scene_of_the_list(download, tmp_path, monkeypatch, capsys):
    import predict

    scannet.prepare(download, tmp_path / "data", workers=1)
    found = {"labels": np.arange(30) % 20, "members": [np.array([3, 4]), np.array([0]), np.array([29])],
             "classes": np.array([2, 1, 19]), "scores": np.array([0.9, 0.8, 0.5])}
    monkeypatch.setattr(predict, "open_checkpoint", lambda path, device: (None, None))
    monkeypatch.setattr(predict, "predict_scene", lambda model, config, folder, _: (load_scene(folder), found))
    command = ["submit", "best.pt", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "sub")]
    scannet.main(command)
    archive = zipfile.ZipFile(tmp_path / "sub" / "semantic.zip")
    assert archive.namelist() == ["scene0707_00.txt"]
    np.testing.assert_array_equal(np.loadtxt(archive.open("scene0707_00.txt")), np.array(NYU40_IDS)[found["labels"]])
    archive = zipfile.ZipFile(tmp_path / "sub" / "instance.zip")
    lines = archive.read("scene0707_00.txt").decode().split("\n")  # the floor is no instance
    assert lines == ["predicted_masks/scene0707_00_000.txt 3 0.900000",
                     "predicted_masks/scene0707_00_001.txt 39 0.500000", ""]
    assert np.flatnonzero(np.loadtxt(archive.open("predicted_masks/scene0707_00_000.txt"))).tolist() == [3, 4]
    found["labels"] = found["labels"][:29]
    with pytest.raises(SystemExit, match=r"scene0707_00\.txt: expected 30 lines, found 29"):
        scannet.main(command)
    (tmp_path / "data" / "scannetv2_test.txt").write_text("scene0707_00\nscene0708_00\n")
    with pytest.raises(SystemExit, match=r"1 of 2 scenes of the split are not in .* first scene0708_00"):
        scannet.main(command)


def test_submit_of_a_model_without_instances_writes_semantic_files_and_says_so(tiny_rooms, tmp_path, capsys):
    config = Config(model="baseline", device="cpu", voxel_size=0.5, batch_size=1)
    model = build_model("baseline", "small", 20)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.0))
    save_checkpoint(tmp_path / "a.pt", model, optimizer, config, epoch=1)
    room = next((tiny_rooms / "val").iterdir())
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / "data" / "val" / "scene0001_00").symlink_to(room)
    scannet.main(["submit", str(tmp_path / "a.pt"), "--data", str(tmp_path / "data"), "--split", "val",
                  "--out", str(tmp_path / "sub"), "--device", "cpu"])
    assert "the model finds no instances: semantic files only" in capsys.readouterr().out
    lines = zipfile.ZipFile(tmp_path / "sub" / "semantic.zip").read("scene0001_00.txt").split()
    assert len(lines) == len(np.load(room / "coord.npy")) and set(map(int, lines)) <= set(NYU40_IDS)
    assert not (tmp_path / "sub" / "instance.zip").exists()


def test_the_200_classes_are_200():
    ids = scannet.SCANNET200_IDS
    assert len(ids) == len(set(ids)) == 200 and ids == sorted(ids) and (ids[0], ids[-1]) == (1, 1191)


def test_the_plain_reader_of_the_bench_reads_the_same_frames(tmp_path):
    from experiments import bench

    bench.write_sens(tmp_path / "a.sens", 3, color_size=COLOR_SIZE, depth_size=DEPTH_SIZE)
    plain = bench.sens_by_struct(tmp_path / "a.sens")
    for (_, pose, color, depth), (plain_pose, plain_color, plain_depth) in zip(
            scannet.read_sens(tmp_path / "a.sens")[1], plain, strict=True):
        np.testing.assert_array_equal(pose, plain_pose)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(color))), plain_color)
        np.testing.assert_array_equal(depth, plain_depth)
