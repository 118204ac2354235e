"""scenes/scannet.py: official files -> scene folders, with every trap of the format; damaged files."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scannet_files import (AXIS, CAMERA, COLOR_SIZE, COLUMN, DEPTH_SIZE, GREY, SHEET, image_bytes, jpeg_bytes,
                           ply_bytes, sens_bytes, sheet_frames, write_exported, write_groups, write_room, write_scan,
                           write_sheet)
from test_folder import DAMAGE, QUICK, damage, peak_memory, scene_or_clear_error

from data import scene_item
from fusion import link_views
from scenes import boxes, generate, scannet
from scenes.folder import load_frames, load_scene, read_classes
from scenes.points import complete

ENDINGS = ("_vh_clean_2.ply", "_vh_clean_2.labels.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt",
           ".sens")


@pytest.fixture
def download(tmp_path):
    """A download: three labelled scans, one of them in no list, a test scan, split lists, label table."""
    root = tmp_path / "download"
    scans = [write_sheet(root / "scans" / name) for name in ("scene0000_00", "scene0011_00", "scene0500_00")]
    for scan in (*scans, write_scan(root / "scans_test" / "scene0707_00", axis=None)):
        (scan / f"{scan.name}.sens").write_bytes(sens_bytes(sheet_frames()))
    (root / "Tasks" / "Benchmark").mkdir(parents=True)
    for split, name in (("train", "scene0000_00"), ("val", "scene0011_00"), ("test", "scene0707_00")):
        (root / "Tasks" / "Benchmark" / f"scannetv2_{split}.txt").write_text(name + "\n")
    (root / "scannetv2-labels.combined.tsv").write_text(
        "id\traw_category\tcategory\tcount\tnyu40id\n1\twall\twall\t9\t1\n3\tfloor\tfloor\t9\t2\n2\tchair\tchair\t9\t5\n"
        "12\todd thing\tthing\t1\t40\n")
    return root


@pytest.fixture
def run(download, tmp_path, capsys):
    """Function: the command on the download; what it printed."""
    def command(*flags, scans=download):
        scannet.main([str(scans), "--out", str(tmp_path / "out"), "--workers", "1", *flags])
        return capsys.readouterr().out

    return command


@pytest.fixture
def prepared(tmp_path):
    """Function: the scene folder of scene0000_00 as Pointcept prepares it, with these points."""
    def make(coord=SHEET[0], split="train", name="scene0000_00"):
        scene = tmp_path / "out" / split / name
        scene.mkdir(parents=True)
        np.save(scene / "coord.npy", coord.astype(np.float32))
        np.save(scene / "color.npy", GREY)
        return scene

    return make


def test_a_download_becomes_scene_folders_that_data_py_reads(download, tmp_path, run):
    assert run("--frames", "2") == (f"skipped scene0500_00: in no split list\n"
                                    f"{tmp_path / 'out'}: 3 scenes made, 0 were there, 1 skipped, 0 scans not found\n")
    out = tmp_path / "out"
    scene = load_scene(out / "train" / "scene0000_00")
    np.testing.assert_allclose(scene["coord"], SHEET[0] @ AXIS[:3, :3].T + AXIS[:3, 3], atol=1e-6)
    np.testing.assert_array_equal(scene["color"], GREY)
    np.testing.assert_allclose(scene["normal"], np.tile(AXIS[:3, :3] @ [-0.5, 0, 1] / 1.25**0.5, (30, 1)), atol=1e-6)
    np.testing.assert_array_equal(scene["segment"], np.array([0, 1, -1, -1, -1, 19])[COLUMN])
    np.testing.assert_array_equal(scene["instance"], np.array([-1, -1, 0, 0, -1, 1])[COLUMN])  # the last group wins
    np.testing.assert_array_equal(scene["superpoint"], np.array([4, 0, 3, 1, 2, 5])[COLUMN])  # order of the ids
    segment200 = np.load(out / "train" / "scene0000_00" / "segment200.npy")
    np.testing.assert_array_equal(segment200, np.array([0, 2, 1, 1, -1, -1])[COLUMN])
    assert scene["frame_ids"] == [0, 2, 4]
    test = load_scene(out / "test" / "scene0707_00")
    assert test["segment"] is None and test["instance"] is None
    np.testing.assert_array_equal(test["coord"], SHEET[0])  # no axisAlignment
    assert sorted(p.name for p in out.iterdir()) == [
        "classes200.json", "scannet.json", "scannetv2_test.txt", "scannetv2_train.txt", "scannetv2_val.txt", "test",
        "train", "val"]
    shutil.copy(out / "classes200.json", out / "classes.json")
    classes = read_classes(out)
    assert np.array_equal(load_scene(out / "train" / "scene0000_00", classes)["segment"], segment200)
    assert (len(classes.names), classes.names[:3], classes.stuff) == (200, ["wall", "chair", "floor"], [0, 2])


def test_poses_follow_the_points_and_images_stay_byte_for_byte(tmp_path, run):
    run("--frames", "2")
    scene = tmp_path / "out" / "train" / "scene0000_00"
    assert (scene / "color" / "2.jpg").read_bytes() == jpeg_bytes(2)
    frames = load_frames(scene, [0, 2], COLOR_SIZE)
    for view, i in enumerate((0, 2)):
        point = np.array([i + 0.3, 0.7, 2.5])  # 1 m in front of camera i, in the frame of the .sens
        aligned = AXIS @ [*point, 1]
        np.testing.assert_allclose((frames["world_to_camera"][view] @ aligned)[:3], [0.3, 0.2, 1.0], atol=1e-5)
        np.testing.assert_allclose(frames["depth"][view], 1 + i / 1000, atol=1e-6)
    np.testing.assert_allclose(frames["intrinsics"][0], CAMERA[:3, :3], atol=1e-5)


def test_parallel_runs_write_the_same_files_as_one_process(download, tmp_path):
    for workers in (1, 2):
        scannet.prepare(download, tmp_path / str(workers), every=2, workers=workers)
    one, two = ({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
                for out in (tmp_path / "1", tmp_path / "2"))
    assert len(one) > 30 and one == two


def test_finished_scenes_are_skipped_and_half_written_ones_redone(download, tmp_path, monkeypatch):
    out, write = tmp_path / "out", scannet.write_frames

    def killed(target, *arguments):
        if "scene0011" in target.name:
            raise KeyboardInterrupt
        return write(target, *arguments)

    monkeypatch.setattr(scannet, "write_frames", killed)
    with pytest.raises(KeyboardInterrupt):
        scannet.prepare(download, out, workers=1)
    assert (out / "train" / "scene0000_00").is_dir() and not (out / "val" / "scene0011_00").exists()
    (out / ".unfinished" / "scene0011_00_1").mkdir(parents=True)  # as a killed process leaves it
    monkeypatch.undo()
    result = scannet.prepare(download, out, workers=1)
    assert (result["made"], result["there"]) == (2, 1)
    assert not (out / ".unfinished").exists() and load_scene(out / "val" / "scene0011_00")["frame_ids"] == [0]


def test_the_folder_of_the_scans_may_be_given_and_the_split_lists_apart(download, tmp_path, run):
    lists = tmp_path / "lists"
    (download / "Tasks" / "Benchmark").rename(lists)
    with pytest.raises(SystemExit, match=r"no split list.*scannetv2_train.txt.*--splits"):
        run(scans=download / "scans")
    assert "2 scenes made, 0 were there, 1 skipped, 1 scans not found" in run(
        "--splits", str(lists), scans=download / "scans")
    assert (tmp_path / "out" / "train" / "scene0000_00" / "segment200.npy").exists()  # the table lies beside scans/


@pytest.mark.parametrize(("folder", "flags", "reason"), [
    ("nowhere", (), r"nowhere is no folder; give the folder of the ScanNet download"),
    ("empty", (), r"no scan in .*empty: expected folders like scene0000_00 with scene0000_00_vh_clean_2\.ply"),
    ("download", ("--frames", "0"), r"expected --frames and --workers of 1 or more, got 0 and 1"),
    ("download", ("--frames-only",), r"no scene in .*out/train, val or test to add frames to"),
    ("download", ("--splits", "LISTS"), r"train.txt: expected names like scene0000_00, found '\.\./elsewhere'")])
def test_what_cannot_be_prepared_ends_with_the_reason(download, tmp_path, run, monkeypatch, folder, flags, reason):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("LISTS").mkdir()
    Path("LISTS/scannetv2_train.txt").write_text("scene0000_00\n../elsewhere\n")
    with pytest.raises(SystemExit, match=reason):
        run(*flags, scans=tmp_path / folder)


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("name", ENDINGS)
def test_a_scan_without_a_whole_file_is_listed_with_the_reason_and_the_others_go_on(
        download, tmp_path, run, name, how):
    path = download / "scans" / "scene0000_00" / f"scene0000_00{name}"
    before = path.read_bytes()[: 0 if name == ".txt" else path.stat().st_size // 3]
    path.unlink() if how == "missing" else path.write_bytes(before)
    said = run()
    assert (tmp_path / "out" / "val" / "scene0011_00" / "coord.npy").is_file()
    if how == "missing" and name in (".sens", "_vh_clean_2.ply"):
        assert ("scene0000_00: no frames" if name == ".sens" else "1 scans not found") in said
        return
    (line,) = [line for line in said.splitlines() if line.startswith("skipped scene0000_00: ")]
    assert str(path) in line and (how == "missing" or ("expected " in line and ", found " in line))
    assert "2 scenes made, 0 were there, 2 skipped" in said
    assert not (tmp_path / "out" / "train" / "scene0000_00").exists()
    assert not path.exists() if how == "missing" else path.read_bytes() == before


def test_files_of_another_scan_are_refused(tmp_path):
    scan = write_sheet(tmp_path / "scene0000_00")
    write_groups(scan, [("wall", [123456])])
    with pytest.raises(ValueError, match=r"aggregation\.json: expected segments of the scan's segs\.json"):
        scannet.read_scan(scan, labelled=True)
    few = ply_bytes(SHEET[0][:2], GREY[:2], label=np.array([1, 2]))
    (scan / "scene0000_00_vh_clean_2.labels.ply").write_bytes(few)
    with pytest.raises(ValueError, match=r"labels\.ply: expected labels of 30 vertices, found 2"):
        scannet.read_scan(scan, labelled=True)


@pytest.mark.parametrize(("groups", "instance"), [
    pytest.param([("x", [41]), ("x", [8]), ("x", [41]), ("x", [8, 9])], [-1, -1, 0, 1, 1, -1],
                 id="groups that are overwritten leave no gap in the ids, as in scene0217_00"),
    pytest.param([("wall", [250000]), ("chair", [3, 700])], [-1, -1, -1, -1, -1, 0],
                 id="walls and floors are no instances whatever their groups are called"),
    pytest.param([], [-1] * 6, id="no group, no instance")])
def test_instances_follow_the_groups(tmp_path, groups, instance):
    scan = write_sheet(tmp_path / "scene0001_00")
    write_groups(scan, groups)
    scene, _ = scannet.read_scan(scan, labelled=True)
    np.testing.assert_array_equal(scene["instance"], np.array(instance)[COLUMN])


def test_the_200_classes_are_200():
    ids = list(map(int, scannet.IDS_200))
    assert len(set(ids)) == 200 and ids == sorted(ids) and (ids[0], ids[-1]) == (1, 1191)


def visible_voxels(folder, scene):
    """The frames of a scene folder and the set of its 5 cm voxels that any of them sees."""
    frames = load_frames(folder, scene["frame_ids"], COLOR_SIZE)
    item = scene_item(complete(scene)[0], frames, 0.05)
    world, *views = (torch.from_numpy(item[key]) for key in ("world_coord", "world_to_camera", "intrinsics", "depth"))
    rows = np.unique(link_views(world, *views).point)
    return frames, {tuple(cell) for cell in item["grid_coord"][rows].tolist()}


@pytest.mark.parametrize("sens", [True, False], ids=["sens", "exported"])
def test_a_room_that_goes_through_the_official_files_comes_back_as_it_was(tmp_path, sens):
    folders = tmp_path / "room", tmp_path / "out" / "train" / "scene0001_00"
    boxes.write_scene(folders[0], (3, 0, 0), COLOR_SIZE)
    write_room(tmp_path / "raw" / "scans" / "scene0001_00", folders[0], sens)
    (tmp_path / "raw" / "scannetv2_train.txt").write_text("scene0001_00\n")
    scannet.main([str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--frames", "1", "--workers", "1"])
    direct, back = (load_scene(folder) for folder in folders)
    for key in ("color", "segment", "instance", "superpoint"):
        np.testing.assert_array_equal(back[key], direct[key], err_msg=key)
    assert np.abs(back["coord"] - direct["coord"]).max() < 1e-5
    assert back["frame_ids"] == direct["frame_ids"] == list(range(generate.FRAMES)) and back["notes"] == []
    back["normal"] = direct["normal"]  # the scan is without faces
    (old, expected), (new, found) = (visible_voxels(*both) for both in zip(folders, (direct, back)))
    for key in ("image", "depth"):
        np.testing.assert_array_equal(new[key], old[key])
    for key in ("world_to_camera", "intrinsics"):
        np.testing.assert_allclose(new[key], old[key], atol=1e-5, rtol=1e-6)
    assert len(expected) > 5000 and len(found ^ expected) <= 0.005 * len(expected)


def test_every_kth_frame_with_a_finite_pose_comes_out_of_a_sens(tmp_path):
    (tmp_path / "a.sens").write_bytes(sens_bytes(sheet_frames(range(9), lost=(4,))))
    intrinsics, frames = scannet.read_sens(tmp_path / "a.sens", every=2)
    frames = list(frames)
    np.testing.assert_array_equal(intrinsics, CAMERA)
    assert [index for index, *_ in frames] == [0, 2, 6, 8]
    for index, pose, color, depth in frames:
        assert pose[0, 3] == index and color == jpeg_bytes(index) and (depth == 1000 + index).all()
        assert depth.shape == DEPTH_SIZE[::-1] and depth.dtype == np.uint16


def test_frames_that_are_not_wanted_are_not_even_read(tmp_path):
    data = bytearray(sens_bytes(sheet_frames(range(3), lost=())))
    start = data.index(jpeg_bytes(1))
    data[start : start + len(jpeg_bytes(1)) + 20] = bytes(len(jpeg_bytes(1)) + 20)  # image and depth of frame 1
    (tmp_path / "a.sens").write_bytes(data)
    assert [index for index, *_ in scannet.read_sens(tmp_path / "a.sens", every=2)[1]] == [0, 2]
    with pytest.raises(ValueError, match=r"a\.sens, frame 1: expected depth packed by zlib"):
        list(scannet.read_sens(tmp_path / "a.sens")[1])


@pytest.mark.parametrize("padded", [False, True])
def test_exported_frames_and_frames_25k_are_read_where_there_is_no_sens(download, tmp_path, padded):
    (download / "scans" / "scene0000_00" / "scene0000_00.sens").unlink()
    for name in ("scene0000_00", "scene0011_00"):
        write_exported(download / ("scannet_frames_25k" if padded else "scans") / name,
                       sheet_frames((0, 20, 40, 100), lost=(40,)), padded=padded)
    result = scannet.prepare(download, tmp_path / "out", every=50, workers=1)
    assert (result["made"], result["notes"]) == (3, {})
    scene, other = (load_scene(tmp_path / "out" / path) for path in ("train/scene0000_00", "val/scene0011_00"))
    assert scene["frame_ids"] == ([0, 20, 100] if padded else [0, 100])  # a thinned set is not thinned again
    assert other["frame_ids"] == [0]  # of the .sens
    frames = load_frames(tmp_path / "out" / "train" / "scene0000_00", [100], COLOR_SIZE)
    np.testing.assert_allclose(frames["depth"], 1.1, atol=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_frames_only_adds_frames_in_the_frame_of_the_points_and_touches_no_array(tmp_path, run, prepared, aligned):
    matrix = AXIS if aligned else np.eye(4)
    scene = prepared(SHEET[0] @ matrix[:3, :3].T + matrix[:3, 3])
    before = {p.name: p.read_bytes() for p in scene.iterdir()}
    said = run("--frames", "2", "--frames-only")
    assert said == f"{tmp_path / 'out'}: 1 scenes made, 0 were there, 0 skipped, 0 scans not found\n"
    assert {name: (scene / name).read_bytes() for name in before} == before
    assert sorted(p.name for p in scene.iterdir()) == ["color", "color.npy", "coord.npy", "depth", "intrinsic", "pose"]
    np.testing.assert_allclose(np.loadtxt(scene / "pose" / "2.txt"), matrix @ sheet_frames()[2][1], atol=1e-7)
    assert load_scene(scene)["frame_ids"] == [0, 2, 4]
    assert "0 scenes made, 1 were there" in run("--frames", "2", "--frames-only")


@pytest.mark.parametrize("only", [(), ("--frames-only",)], ids=str)
def test_other_frames_than_the_first_time_are_said_and_scenes_that_are_there_keep_theirs(tmp_path, run, prepared, only):
    if only:
        prepared()
    assert "keep one" not in run("--frames", "2", *only) + run("--frames", "2", *only)
    scene = tmp_path / "out" / "train" / "scene0000_00"
    said = run("--frames", "1", *only).splitlines()[0]
    count = 1 if only else 3
    assert said == (f"{tmp_path / 'out'}: {count} scenes keep one frame in 2, new ones get one in 1; for one rate give "
                    "--frames 2, or delete these scenes (with --frames-only their color/ depth/ intrinsic/ pose/)")
    assert load_scene(scene)["frame_ids"] == [0, 2, 4]
    for path in (tmp_path / "out").glob("*/scene*"):
        for part in [path / name for name in scannet.FRAME_PARTS] if only else [path]:
            shutil.rmtree(part)
    assert "keep one" not in run("--frames", "1", *only) + run("--frames", "1", *only)  # of all anew
    assert load_scene(scene)["frame_ids"] == [0, 1, 2, 4]  # the pose of 3 is lost


@pytest.mark.parametrize(("change", "reason"), [
    ("other points", "coord.npy: expected the vertices of the scan's mesh"),
    ("a pickle", "coord.npy: expected an array of numbers"),
    ("color/ of others", "holds color/ without pose/; move it away first"),
    ("no frames", "no usable frame in a .sens, color/ and pose/ or scannet_frames_25k")])
def test_frames_only_leaves_a_scene_that_does_not_fit_as_it_was(download, run, prepared, change, reason):
    scene = prepared(SHEET[0] + 0.5 * (change == "other points"))
    if change == "a pickle":
        np.save(scene / "coord.npy", np.array([{}], dtype=object), allow_pickle=True)
    if change == "color/ of others":
        (scene / "color").mkdir()
    if change == "no frames":
        (download / "scans" / "scene0000_00" / "scene0000_00.sens").unlink()
    before = {p.name: p.is_file() and p.read_bytes() for p in scene.iterdir()}
    with pytest.raises(SystemExit):  # none made, none there
        run("--frames-only")
    result = scannet.prepare(download, scene.parents[1], frames_only=True, workers=1)
    assert reason in result["skipped"]["scene0000_00"]
    assert {p.name: p.is_file() and p.read_bytes() for p in scene.iterdir()} == before


def test_frames_only_says_when_there_is_no_mesh_to_compare_with(download, prepared, run):
    prepared()
    prepared(split="val", name="scene0012_00")
    (download / "scans" / "scene0000_00" / "scene0000_00_vh_clean_2.ply").unlink()
    said = run("--frames-only")
    assert "scene0000_00: no mesh to compare with: points taken as not axis-aligned" in said
    assert "1 scenes made, 0 were there, 0 skipped, 1 scans not found" in said


@pytest.mark.parametrize("name", [
    *(f"scene0000_00{ending}" for ending in ENDINGS), "color/20.jpg", "depth/20.png", "pose/20.txt",
    "intrinsic/intrinsic_color.txt"])
@DAMAGE
@QUICK
def test_a_scan_with_a_damaged_file_is_a_scene_or_a_clear_error(tmp_path, name, how, place, value):
    scan, of_frames = tmp_path / "scene0000_00", "/" in name or name.endswith(".sens")
    if not scan.is_dir():
        write_sheet(scan)
        write_exported(scan, sheet_frames((0, 20)))
        if name.endswith(".sens"):
            (scan / name).write_bytes(sens_bytes(sheet_frames(range(3), lost=(1,))))
        (tmp_path / "whole").write_bytes((scan / name).read_bytes())
    (scan / name).write_bytes(damage((tmp_path / "whole").read_bytes(), how, place, value))

    def read():
        if of_frames:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            scannet.write_frames(tmp_path / "out", [scan], 1, np.eye(4))
            return
        scene, axis = scannet.read_scan(scan, labelled=True)
        assert all(len(array) == len(scene["coord"]) for array in scene.values()) and np.isfinite(axis).all()
        assert np.isfinite(scene["coord"]).all() and scene["segment20"].max() < 20 and scene["segment20"].min() >= -1

    scene_or_clear_error(scan / name if of_frames else scan, read)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("color/20.jpg", b"", "expected a whole JPEG"),
    ("color/20.jpg", jpeg_bytes(20, (32, 24)), r"expected colour of \(64, 48\), found \(32, 24\)"),
    ("depth/20.png", image_bytes(sheet_frames()[0][3])[:60], "expected a whole PNG"),
    ("depth/20.png", image_bytes(np.zeros((24, 32), np.uint8)), "expected a whole PNG, found .*mode L, not 16 bit"),
    ("pose/20.txt", b"1 2 3", "expected 16 numbers, found .*size 3"),
    ("intrinsic/intrinsic_color.txt", b"nan " * 16, "expected intrinsics of an image of 64x48, found"),
    ("intrinsic/intrinsic_color.txt", b"1200 0 647.5 0 0 1200 483.5 0 0 0 1 0 0 0 0 1",  # of 1296x968
     "expected intrinsics of an image of 64x48, found")])
def test_a_frame_with_a_file_of_another_kind_is_refused(tmp_path, name, content, reason):
    write_exported(tmp_path / "scene0000_00", sheet_frames((0, 20)))
    (tmp_path / "scene0000_00" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {reason}"):
        scannet.write_frames(tmp_path / "out", [tmp_path / "scene0000_00"], 1, np.eye(4))


@pytest.mark.parametrize("content", [
    "", "[]", "7", "\0\xff", '{"segIndices": 1}', '{"segIndices": [1.5]}', '{"segIndices": ["1"]}',
    '{"segIndices": [1,]}', '{"segIndices": [[1], 2]}', '{"segIndices": [99999999999999999999]}',
    '{"segGroups": [7]}', '{"segGroups": [{"segments": 1}]}', '{"segGroups": [{"segments": [1.5]}]}',
    pytest.param("[" * 100_000, id="deep")])
def test_json_that_is_no_list_of_segments_is_refused(tmp_path, content):
    scan = write_sheet(tmp_path / "scene0000_00")
    for name in ("_vh_clean_2.0.010000.segs.json", ".aggregation.json"):
        path = scan / f"scene0000_00{name}"
        whole = path.read_bytes()
        path.write_text(content)
        with pytest.raises(ValueError, match=r"json: expected .* found"):
            scannet.read_scan(scan, labelled=True)
        path.write_bytes(whole)


HEAD = 12 + len("StructureSensor") + 256  # where the compression types stand


@pytest.mark.parametrize(("offset", "kind", "value", "reason"), [
    (0, "<I", 3, "a .sens of version 4, found version 3"),
    (4, "<Q", 2**63, f"{2**63} bytes at byte 12"),
    (HEAD, "<i", 9, "expected jpeg (2), depth by zlib (1) in mm (1000)"),
    (HEAD + 4, "<i", 2, "found 2, 2, 1000.0, 32x24"),
    (HEAD + 16, "<I", 2**32 - 1, f"depth images of 1..{scannet.MAX_PIXELS} pixels"),
    (HEAD + 20, "<I", 0, "found 2, 1, 1000.0, 32x0"),
    (HEAD + 24, "<f", float("nan"), "found 2, 1, nan"),
    (HEAD + 28, "<Q", 2**60, "frame 1: expected"),
    (HEAD + 36 + 80, "<Q", 2**62, f"frame 0: expected {2**62} bytes"),
    (HEAD + 36 + 88, "<Q", 2**64 - 1, f"frame 0: expected {2**64 - 1} bytes")])
def test_a_sens_whose_header_promises_too_much_is_refused(tmp_path, offset, kind, value, reason):
    data = bytearray(sens_bytes(sheet_frames(range(1))))
    struct.pack_into(kind, data, offset, value)
    path = tmp_path / "a.sens"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        list(scannet.read_sens(path)[1])
    assert str(path) in str(error.value) and reason in str(error.value)


def test_images_that_are_far_larger_than_they_should_be_are_refused_in_little_memory(tmp_path):
    bomb, data = zlib.compress(bytes(200 * 2**20)), sens_bytes(sheet_frames(range(1)))
    start = data.index(jpeg_bytes(0))
    whole = data[: start - 8] + struct.pack("<Q", len(bomb)) + jpeg_bytes(0) + bomb
    (tmp_path / "a.sens").write_bytes(whole)
    jpeg, png = bytearray(jpeg_bytes(0)), bytearray(image_bytes(sheet_frames()[0][3]))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 9000, 9000)  # Pillow itself allows that
    png[16:24] = struct.pack(">II", 2**30, 2**30)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))

    def read():
        with pytest.raises(ValueError, match=r"expected 1536 bytes of depth, found 1537 or more"):
            list(scannet.read_sens(tmp_path / "a.sens")[1])
        for image, kind in ((jpeg, "JPEG"), (png, "PNG")):
            with pytest.raises(ValueError, match=rf"a: expected a whole {kind}, found .*pixels"):
                scannet._check_image("a", bytes(image), kind)

    assert peak_memory(read) < 2 * len(whole) + 2**20
