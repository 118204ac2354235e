"""Tests of data.py: scene folders good and bad, voxels, the camera under augmentation, superpoints, batches."""
import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import Payload
from data import EpochBatches, SceneDataset, collate, loader, scene_item
from scenes.folder import IGNORE, load_frames, load_scene
from scenes.points import voxelise

AUGMENTATIONS = ("flip", "rotate", "scale", "elastic", "jitter")
CAMERA_KEYS = ("depth", "world_to_camera", "intrinsics")


def camera_to_world(yaw=0.0):
    """A level camera (4, 4), 3 m before the middle of the scenes below; yaw 0 looks along world +y."""
    c, s = np.cos(yaw), np.sin(yaw)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, s, 0], [0, 0, -1], [-s, c, 0]]).T        # columns: right, down, forward
    matrix[:3, 3] = np.array([2.0, 3.0, 1.0]) - 3 * matrix[:3, 2]
    return matrix


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
        depth = np.full(depth_size[::-1], 1000 + 10 * i, np.uint16)
        Image.fromarray(depth).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", camera_to_world(0.2 * i))
    return folder


def truncate(path, keep):
    """Cut a file after a share (float) or a number (int) of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])


def members_by_cell(coord, voxel_size):
    """Slow voxels: {cell (x, y, z): list of its points}, in ascending order of the cells."""
    low, cells = coord.min(0), {}
    for i, point in enumerate(coord):
        cell = tuple(int(v) for v in np.floor((point - low) / np.float32(voxel_size)))
        cells.setdefault(cell, []).append(i)
    return dict(sorted(cells.items()))


def same(one, two):
    """Whether two items or batches are equal in every key."""
    return one.keys() == two.keys() and all(
        one[k].shape == two[k].shape and (one[k] == two[k]).all() if hasattr(one[k], "shape") else one[k] == two[k]
        for k in one)


@pytest.fixture
def scene_folder(tmp_path):
    return write_scene(tmp_path / "train" / "scene", frames=(0, 1))


# -------------------------------------------------------------------------------------------------------------- voxels


def test_voxels_have_the_members_means_and_majorities_of_a_slow_loop():
    rng = np.random.default_rng(0)
    coord = (rng.uniform(-1, 1, (500, 3)) * (1, 2, 0.5) + (5, -3, 0)).astype(np.float32)
    labels, values = rng.integers(-1, 4, 500), rng.normal(size=(500, 2)).astype(np.float32)
    grid, point_to_voxel = voxelise(coord, 0.3)
    slow = members_by_cell(coord, 0.3)
    assert 50 < len(slow) < 300
    np.testing.assert_array_equal(grid, list(slow))
    mean = data.voxel_means(values, point_to_voxel, len(grid))
    majority = data.voxel_majority(labels, point_to_voxel, len(grid), 4)
    for row, members in enumerate(slow.values()):
        np.testing.assert_array_equal(np.flatnonzero(point_to_voxel == row), members)
        np.testing.assert_allclose(mean[row], values[members].mean(0), atol=1e-5)
        votes = [int((labels[members] == k).sum()) for k in range(4)]
        assert majority[row] == (votes.index(max(votes)) if max(votes) else IGNORE)


def test_the_order_of_the_points_does_not_matter():
    rng = np.random.default_rng(1)
    coord = rng.uniform(0, 2, (300, 3)).astype(np.float32)
    order = rng.permutation(300)
    grid, point_to_voxel = voxelise(coord, 0.25)
    other_grid, other_row = voxelise(coord[order], 0.25)
    np.testing.assert_array_equal(grid, other_grid)
    np.testing.assert_array_equal(point_to_voxel[order], other_row)


def test_a_point_leads_to_its_voxel_and_back():
    coord = np.random.default_rng(2).uniform(-3, 3, (400, 3)).astype(np.float32)
    grid, point_to_voxel = voxelise(coord, 0.1)
    assert grid.min() == 0 and set(point_to_voxel) == set(range(len(grid)))
    inside = (coord - coord.min(0)) / 0.1 - grid[point_to_voxel]
    assert inside.min() > -1e-4 and inside.max() < 1 + 1e-4
    again, rows = voxelise((grid + 0.5).astype(np.float32), 1.0)
    np.testing.assert_array_equal(again, grid)
    np.testing.assert_array_equal(rows, np.arange(len(grid)))


@pytest.mark.parametrize("far", [1e7, 1e18, 1e30, 3e38])
def test_too_many_voxels_say_what_to_do(far):
    coord = np.array([[0, 0, 0], [far, far, far], [-far, 0, 0]], np.float32)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"overflows; take a larger voxel size.*metres"):
        voxelise(coord, 0.02)


def test_ignored_points_have_no_vote_unless_there_is_no_other():
    labels = np.array([-1, -1, -1, 3, -1, -1, 2, 1, 2, 0, 0, 2, 2])
    rows = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    assert data.voxel_majority(labels, rows, 4, 4).tolist() == [3, -1, 2, 0]


# ----------------------------------------------------------------------------------------- the camera and augmentation


def only(monkeypatch, names):
    """Let only these geometric augmentations run."""
    for name in set(AUGMENTATIONS) - set(names):
        pair = name in ("flip", "rotate")
        monkeypatch.setattr(data, name, (lambda coord, normal, rng: (coord, normal)) if pair else
                            lambda coord, *_: coord)


def check_projection(item, coord, folder):
    """Every voxel lies at the mean of its points' coordinates `coord`, and projects there in every frame."""
    camera = np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt")
    assert len(item["world_coord"]) == item["point_to_voxel"].max() + 1 > 50
    assert (item["world_coord"] >= coord.min(0) - 1e-5).all() and (item["world_coord"] <= coord.max(0) + 1e-5).all()
    for row, world in enumerate(item["world_coord"]):
        mean = coord[item["point_to_voxel"] == row].astype(np.float64).mean(0)
        np.testing.assert_allclose(world, mean, atol=1e-5)
        for view, (matrix, intrinsics) in enumerate(zip(item["world_to_camera"], item["intrinsics"])):
            pose = np.loadtxt(folder / "pose" / f"{view}.txt")
            x, y, z = pose[:3, :3].T @ (mean - pose[:3, 3])
            assert z > 1
            # files of 64x48 read at 32x24: half a pixel's centre moves, (u + 0.5) / 2 - 0.5
            u = (camera[0, 0] * x / z + camera[0, 2] + 0.5) / 2 - 0.5
            v = (camera[1, 1] * y / z + camera[1, 2] + 0.5) / 2 - 0.5
            got = intrinsics @ (matrix[:3, :3] @ world + matrix[:3, 3])
            np.testing.assert_allclose(got[:2] / got[2], (u, v), atol=0.005)


def augmented(scene, frames, want):
    """Item of the first seed for which `want(item)` holds."""
    for seed in range(30):
        item = scene_item(dict(scene), frames, 0.2, rng=np.random.default_rng(seed))
        if want(item):
            return item
    raise AssertionError("no seed of 30 changed the points")


@pytest.mark.parametrize("names", [*[(name,) for name in AUGMENTATIONS], AUGMENTATIONS], ids="+".join)
def test_projection_uses_the_coordinates_before_augmentation(names, scene_folder, monkeypatch):
    scene, frames = load_scene(scene_folder), load_frames(scene_folder, [0, 1], (32, 24))
    coord = scene["coord"].copy()
    plain = scene_item(scene, frames, 0.2)
    check_projection(plain, coord, scene_folder)
    only(monkeypatch, names)

    def differs(item):
        """Whether points lie elsewhere, in metres (from the middle of the scene) and in voxels."""
        there, here = (one["coord"][one["point_to_voxel"]] for one in (item, plain))
        cells = [one["grid_coord"][one["point_to_voxel"]] for one in (item, plain)]
        return np.abs(there - here).max() > 0.002 and not np.array_equal(*cells)

    item = augmented(scene, frames, differs)
    check_projection(item, coord, scene_folder)
    np.testing.assert_array_equal(scene["coord"], coord)                      # nothing was changed in place
    for key in CAMERA_KEYS:
        np.testing.assert_array_equal(item[key], frames[key])

    # the classic fault, planted: world_coord taken after the augmentation
    augment = data.augment_points

    def leak(points, normal, rng):
        faulty["coord"], normal = augment(points, normal, rng)
        return faulty["coord"], normal

    monkeypatch.setattr(data, "augment_points", leak)
    for seed in range(30):
        faulty = dict(scene)
        item = scene_item(faulty, frames, 0.2, rng=np.random.default_rng(seed))
        if differs(item):
            break
    with pytest.raises(AssertionError):
        check_projection(item, coord, scene_folder)


@pytest.mark.parametrize("name", ["flip", "rotate"])
def test_normals_turn_with_the_points(name):
    rng = np.random.default_rng(3)
    normal = np.array([0.6, 0.48, 0.64], np.float32)
    plane = np.linalg.svd(normal[None])[2][1:]                                # two directions within the plane
    coord = (rng.uniform(-2, 2, (50, 2)) @ plane).astype(np.float32) + normal
    for seed in range(8):
        moved, turned = getattr(data, name)(coord, np.tile(normal, (50, 1)), np.random.default_rng(seed))
        assert np.abs((moved - moved.mean(0)) @ turned[0]).max() < 1e-5
        np.testing.assert_allclose((moved * turned).sum(1), 1, atol=1e-5)     # and still points to the same side
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.linalg.norm(coord, axis=1), rtol=1e-5)


def test_the_normals_of_an_item_stand_on_its_augmented_surface(tmp_path, monkeypatch):
    only(monkeypatch, ("flip", "rotate", "scale"))
    rng = np.random.default_rng(10)
    normal = np.array([0.6, 0.48, 0.64])
    coord = rng.uniform(-1, 1, (200, 2)) @ np.linalg.svd(normal[None])[2][1:]
    scene = load_scene(write_scene(tmp_path / "plane", coord=coord, normal=np.tile(normal, (200, 1))))
    for seed in range(6):
        item = scene_item(scene, load_frames(tmp_path, [], (32, 24)), 0.2, rng=np.random.default_rng(seed))
        flat = item["coord"] - item["coord"].mean(0)
        assert np.linalg.svd(flat)[1][1] > 1 and np.abs((flat * item["normal"]).sum(1)).max() < 1e-4


def test_rotation_keeps_the_scene_upright_and_flip_keeps_the_floor_down():
    up = np.array([[0, 0, 1]], np.float32)
    for seed in range(20):
        turned = data.rotate(up, up, np.random.default_rng(seed))[0]
        assert turned[0, 2] > np.cos(np.pi / 64 * np.sqrt(2)) - 1e-5
        np.testing.assert_array_equal(data.flip(up, up, np.random.default_rng(seed))[0], up)


def test_image_augmentation_changes_colours_and_moves_no_pixel():
    rng = np.random.default_rng(4)
    image = np.stack([rng.permutation(144).reshape(3, 6, 8) + 50 for _ in range(5)]).astype(np.uint8)  # 50..193
    out = data.augment_images(image, rng)
    assert out.dtype == np.uint8 and out.shape == image.shape
    for before, after in zip(image.reshape(5, -1), out.reshape(5, -1)):
        assert not np.array_equal(before, after)
        assert (np.diff(after[np.argsort(before)].astype(int)) >= 0).all()    # the order of all pixels stays
        assert after.argmax() == before.argmax() or after[before.argmax()] == after.max()
    assert len({view.mean() - old.mean() for view, old in zip(out, image)}) == 5


def test_colours_stay_in_their_range_under_augmentation(scene_folder):
    scene, frames = load_scene(scene_folder), load_frames(scene_folder, [], (32, 24))
    plain = scene_item(scene, frames, 0.05)
    np.testing.assert_allclose(plain["color"][plain["point_to_voxel"]].max(), 1, atol=0.02)
    for seed in range(10):
        item = scene_item(scene, frames, 0.05, rng=np.random.default_rng(seed))
        assert item["color"].min() >= -1 and item["color"].max() <= 1 and item["color"].std() > 0.3
        np.testing.assert_allclose(np.linalg.norm(item["normal"], axis=1), 1, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_written_scene_is_read_back(scene_folder):
    scene = load_scene(scene_folder)
    assert scene["name"] == "scene" and scene["frame_ids"] == [0, 1] and scene["frames_skipped"] == 0
    for key, file, kind in (("coord", "coord", "f4"), ("color", "color", "u1"), ("normal", "normal", "f4"),
                            ("segment", "segment20", "i8"), ("instance", "instance", "i8")):
        np.testing.assert_allclose(scene[key], np.load(scene_folder / f"{file}.npy"), atol=1e-6)
        assert scene[key].dtype == np.dtype(kind), key


def test_a_scannet_folder_prepared_by_pointcept_is_taken_as_it_is(tmp_path):
    rng = np.random.default_rng(5)
    coord, color = rng.uniform(0, 3, (60, 3)), rng.integers(0, 256, (60, 3)).astype(np.float32)
    segment = rng.integers(-1, 20, (60, 1)).astype(np.int16)
    folder = tmp_path / "val" / "scene0011_00"
    folder.mkdir(parents=True)
    for name, array in {"coord": coord, "color": color, "segment20": segment, "instance": segment[:, 0].astype("i4"),
                        "segment200": segment, "normal": np.tile([0, 0, 1.0], (60, 1))}.items():
        np.save(folder / f"{name}.npy", array)
    item = SceneDataset(tmp_path, "val", voxel_size=0.01, views=4)[0]
    assert item["name"] == "scene0011_00" and item["image"].shape == (0, 3, 120, 160)
    np.testing.assert_array_equal(item["point_segment"], segment[:, 0])
    np.testing.assert_allclose(item["world_coord"][item["point_to_voxel"]], coord, atol=0.01)
    np.testing.assert_allclose((item["color"][item["point_to_voxel"]] + 1) * 127.5, color, atol=0.01)


def npy(name, array, match):
    """A case: this array in place of <name>.npy."""
    return pytest.param(lambda folder: np.save(folder / f"{name}.npy", array), match, id=f"{name} {match[:28]}")


def cut(file, keep, match):
    return pytest.param(lambda folder: truncate(folder / file, keep), match, id=f"{file} cut at {keep}")


def text(file, content, match):
    return pytest.param(lambda folder: (folder / file).write_text(content), match, id=f"{file} {content[:12]!r}")


def holed(shape, rows, value):
    array = np.ones(shape, np.float32)
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
    npy("segment20", np.array([None] * 200), r"segment20\.npy: .*cannot be read: .*bject"),
    npy("segment20", np.full(200, 20), r"segment20\.npy: expected labels -1\.\.19, found 20\.\.20"),
    npy("segment20", np.full(200, -2), r"segment20\.npy: expected labels -1\.\.19, found -2\.\.-2"),
    npy("segment20", np.full(200, 255, np.uint8), r"expected labels -1\.\.19, found 255"),
    npy("coord", holed((200, 3), [3, 7], np.nan), "scene scene: 2 of 200 points have coordinates"),
    npy("coord", holed((200, 3), range(9), -np.inf), "scene scene: 9 of 200 points have coordinates that are not fin"),
    npy("color", holed((200, 3), [5], np.inf), "scene scene: 1 of 200 points have colours"),
    npy("color", holed((200, 3), [1, 2, 3], np.nan), "scene scene: 3 of 200 points have colours that are not finite"),
    npy("color", holed((200, 3), [5], 256), r"color\.npy: expected colours in 0\.\.255, found 1.*256"),
    npy("color", holed((200, 3), [5], -1), r"color\.npy: expected colours in 0\.\.255, found -1"),
    text("pose/1.txt", "1 0 0\n0 1 0\n0 0 1\n", r"1\.txt: expected 4x4 numbers, found \(3, 3\)"),
    text("pose/1.txt", "1 0 0 0\n0 1 0\n", r"1\.txt: expected a matrix as text"),
    text("pose/1.txt", "no pose", r"1\.txt: expected a matrix as text"),
])
def test_a_bad_file_of_points_or_poses_is_named_with_what_is_wrong(spoil, match, scene_folder):
    np.save(scene_folder / "superpoint.npy", np.arange(200) // 10)
    spoil(scene_folder)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=match):
        load_scene(scene_folder)


@pytest.mark.parametrize("size", [(64, 48), (32, 24)], ids=["as it is", "resized"])
@pytest.mark.parametrize("spoil, match", [
    *[cut("color/1.jpg", keep, r"1\.jpg: expected an image") for keep in (0, 10, 300, 0.5, 0.9)],
    *[cut("depth/1.png", keep, r"1\.png: expected an image") for keep in (0, 10, 20, 33, 40, 50, 0.7, 0.8)],
    pytest.param(lambda folder: Image.new("RGB", (64, 48)).save(folder / "depth" / "1.png"),
                 r"1\.png: expected an image.*one channel of 16 bit, found mode RGB", id="depth in colour"),
    pytest.param(lambda folder: Image.new("L", (64, 48)).save(folder / "depth" / "1.png"),
                 r"1\.png: expected an image.*one channel of 16 bit, found mode L", id="depth of 8 bit"),
    text("intrinsic/intrinsic_color.txt", "1 0\n0 1\n", r"intrinsic_color\.txt: expected 3x3 or 4x4 numbers"),
    text("intrinsic/intrinsic_color.txt", "nan 0 1\n0 1 1\n0 0 1\n", r"intrinsic_color\.txt: expected finite numbers"),
    pytest.param(lambda folder: (folder / "intrinsic" / "intrinsic_color.txt").unlink(),
                 r"intrinsic_color\.txt: expected a matrix", id="no intrinsics"),
])
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


@pytest.mark.parametrize("name", ["coord", "color", "normal", "segment20", "instance", "superpoint"])
@pytest.mark.parametrize("form", ["array of objects", "bare pickle"])
def test_no_array_of_a_scene_ever_runs_what_is_pickled_in_it(name, form, scene_folder, tmp_path):
    touched, path = tmp_path / "touched", scene_folder / f"{name}.npy"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(touched)))
    else:
        np.save(path, np.array([Payload(touched)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=f"{path}: expected an array of numbers, found a file that cannot be read"):
        load_scene(scene_folder)
    assert not touched.exists()
    np.load(path, allow_pickle=True)
    assert touched.exists()  # the test can fail: this is what happens otherwise


def test_a_jpeg_in_place_of_a_depth_map_is_refused(scene_folder):
    (scene_folder / "depth" / "0.png").write_bytes((scene_folder / "color" / "0.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"depth/0\.png: expected an image"):
        load_frames(scene_folder, [0], (64, 48))


@pytest.mark.parametrize("unit", [1000, 1e6], ids=["millimetres", "micrometres"])
def test_coordinates_in_other_units_than_metres_are_named_before_they_fill_the_memory(unit, tmp_path):
    coord = np.random.default_rng(6).uniform(0, 5, (50, 3)) * unit
    write_scene(tmp_path / "train" / "scene", 50, coord=coord)
    dataset = SceneDataset(tmp_path, "train", voxel_size=0.02, augment=True)
    for epoch in range(3):
        with pytest.raises(ValueError, match=r"metres"):
            dataset[(epoch, 0)]


def test_what_is_missing_is_named(scene_folder, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for root, split in ((tmp_path / "nowhere", "train"), (tmp_path / "empty", "train"), (tmp_path, "val")):
        with pytest.raises(FileNotFoundError, match=rf"no scene in .*{split}.*python rooms\.py --out"):
            SceneDataset(root, split, voxel_size=0.1)
    with pytest.raises(FileNotFoundError, match=r"nowhere is no scene folder: it has no coord\.npy"):
        load_scene(tmp_path / "nowhere")
    (scene_folder / "color.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"color\.npy is missing"):
        load_scene(scene_folder)


def test_frames_whose_pose_is_lost_are_skipped_and_counted(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=range(5))
    for i, value in ((1, -np.inf), (3, np.nan)):
        np.savetxt(folder / "pose" / f"{i}.txt", np.full((4, 4), value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene = load_scene(folder)
    assert scene["frame_ids"] == [0, 2, 4] and scene["frames_skipped"] == 2


def test_a_scene_without_any_finite_pose_warns_once_and_is_used_3d_only(tmp_path):
    folder = write_scene(tmp_path / "train" / "lost", frames=(0, 1))
    for i in (0, 1):
        np.savetxt(folder / "pose" / f"{i}.txt", np.full((4, 4), -np.inf))
    dataset = SceneDataset(tmp_path, "train", voxel_size=0.1, augment=True, views=2)
    with pytest.warns(UserWarning, match="lost: none of its 2 images") as caught:
        items = [dataset[(epoch, 0)] for epoch in range(3)]
    assert len(caught) == 1
    assert all(item["image"].shape == (0, 3, 120, 160) for item in items)


def test_frames_are_in_numeric_order_and_need_image_depth_and_pose(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=(10, 2, 1, 30, 4, 5))
    (folder / "depth" / "4.png").unlink()
    (folder / "color" / "5.jpg").unlink()
    (folder / "pose" / "30.txt").unlink()
    (folder / "pose" / "notes.txt").write_text("not a pose")
    scene = load_scene(folder)
    assert scene["frame_ids"] == [1, 2, 10] and scene["frames_skipped"] == 0


def test_images_intrinsics_and_depth_of_scannet_sizes_come_to_one_size(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=(0,), color_size=(1296, 968), depth_size=(640, 480))
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt",
               [[1170.0, 0, 650, 0], [0, 1160, 480, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = np.zeros((968, 1296, 3), np.uint8)
    image[:, 648:] = 255                                                      # both halved at the same place
    Image.fromarray(image).save(folder / "color" / "0.jpg", quality=95)
    depth = np.full((480, 640), 1000, np.uint16)
    depth[:, 320:] = 2345
    Image.fromarray(depth).save(folder / "depth" / "0.png")
    frames = load_frames(folder, [0], (160, 120))
    assert {key: (value.shape, value.dtype.str[1:]) for key, value in frames.items()} == {
        "image": ((1, 3, 120, 160), "u1"), "depth": ((1, 120, 160), "f4"), "world_to_camera": ((1, 4, 4), "f4"),
        "intrinsics": ((1, 3, 3), "f4")}
    expected = [[1170 / 8.1, 0, 650.5 / 8.1 - 0.5], [0, 1160 * 120 / 968, 480.5 * 120 / 968 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(frames["intrinsics"][0], expected, rtol=1e-6)
    np.testing.assert_array_equal(frames["depth"][0] == np.float32(1), np.tile(np.arange(160) < 80, (120, 1)))
    np.testing.assert_array_equal(frames["depth"][0] == np.float32(2.345), np.tile(np.arange(160) >= 80, (120, 1)))
    assert frames["image"][..., :78].max() < 30 and frames["image"][..., 82:].min() > 225


def test_depth_is_millimetres_zero_stays_zero_and_nothing_is_interpolated(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=(0,))
    depth = np.random.default_rng(7).choice(np.array([0, 1000, 3001, 65535], np.uint16), (48, 64))
    Image.fromarray(depth).save(folder / "depth" / "0.png")
    np.testing.assert_array_equal(load_frames(folder, [0], (64, 48))["depth"][0], depth.astype(np.float32) / 1000)
    for size in ((32, 24), (50, 37), (100, 90)):
        values = np.unique(load_frames(folder, [0], size)["depth"])
        np.testing.assert_array_equal(values, np.array([0, 1000, 3001, 65535], np.float32) / 1000)


def test_world_to_camera_inverts_the_pose(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=range(4))
    matrices = load_frames(folder, [3, 0, 2], (64, 48))["world_to_camera"]
    for matrix, i in zip(matrices, (3, 0, 2)):
        np.testing.assert_allclose(matrix @ camera_to_world(0.2 * i), np.eye(4), atol=1e-6)


# ----------------------------------------------------------------------------------------- normals, superpoints, edges


def plane(axis, at=0.0, size=2.0, spacing=0.05):
    """Points (n, 3) f32 of a square across this axis from the origin on, and its normals."""
    u, v = (a.ravel() for a in np.meshgrid(*[np.arange(spacing / 2, size, spacing)] * 2))
    coord = np.insert(np.stack([u, v], 1), axis, at, axis=1).astype(np.float32)
    return coord, np.tile(np.eye(3, dtype=np.float32)[axis], (len(coord), 1))


def test_estimated_normals_stand_on_a_plane_and_point_into_a_room(tmp_path):
    floor = plane(2)[0]
    np.testing.assert_allclose(np.abs(data.estimate_normals(floor)[:, 2]), 1, atol=1e-5)
    corner, expected = (np.concatenate(parts) for parts in zip(plane(0), plane(1), plane(2)))
    inner = (corner > 0.2).sum(1) == 2                                        # off the edges
    for sign, shift in ((1, 0), (-1, 7)):                                     # the corner below and the one above
        normal = data.estimate_normals(sign * corner + shift, chunk=700)      # several chunks
        assert ((normal * expected * sign).sum(1)[inner] > 0.999).all()
    write_scene(tmp_path / "scene", len(corner), coord=corner, normal=None)
    np.testing.assert_array_equal(load_scene(tmp_path / "scene")["normal"], data.estimate_normals(corner))


@pytest.mark.parametrize("second", [plane(0), plane(2, at=0.045)], ids=["perpendicular", "parallel, 4.5 cm apart"])
def test_superpoints_keep_surfaces_apart(second):
    first = plane(2)
    coord, normal = (np.concatenate(parts) for parts in zip(first, second))
    coord = coord + np.random.default_rng(8).normal(0, 0.001, coord.shape).astype(np.float32)
    ids = data.superpoints_from_points(coord, normal)
    assert ids.dtype == np.int64 and ids.shape == (len(coord),)
    assert not set(ids[: len(first[0])]) & set(ids[len(first[0]):])
    np.testing.assert_array_equal(np.unique(ids), np.arange(ids.max() + 1))
    assert 8 <= ids.max() + 1 <= 24                    # 2 m planes on a 1 m grid: about four pieces each
    assert np.bincount(ids).min() >= 20


def test_tiny_pieces_join_the_nearest_superpoint():
    coord, normal = plane(2)
    coord = np.concatenate([coord, [[0.5, 0.5, 0.4], [1.5, 1.5, 0.5], [1.5, 1.52, 0.5]]]).astype(np.float32)
    normal = np.concatenate([normal, [[1, 0, 0], [0, 1, 0], [0, 1, 0]]]).astype(np.float32)
    ids = data.superpoints_from_points(coord, normal)
    assert ids.max() + 1 == 4
    near = [np.linalg.norm(coord[:-3] - point, axis=1).argmin() for point in coord[-3:]]
    np.testing.assert_array_equal(ids[-3:], ids[near])


def test_stored_superpoints_are_kept_and_absent_ones_are_computed(tmp_path):
    stored = np.random.default_rng(9).integers(5, 900, 200).astype(np.int32)
    scene = load_scene(write_scene(tmp_path / "stored", superpoint=stored))
    np.testing.assert_array_equal(np.unique(stored)[scene["superpoint"]], stored)  # numbered 0..S-1, in the same order
    scene = load_scene(write_scene(tmp_path / "absent"))
    np.testing.assert_array_equal(scene["superpoint"], data.superpoints_from_points(scene["coord"], scene["normal"]))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("points", [1, 2, 5])
def test_a_scene_of_one_or_few_points_works(points, augment, tmp_path):
    folder = write_scene(tmp_path / "train" / "dot", points, frames=(0, 1), normal=None)
    ids = load_scene(folder)["superpoint"]
    np.testing.assert_array_equal(np.unique(ids), np.arange(ids.max() + 1))
    batch = collate([SceneDataset(tmp_path, "train", voxel_size=0.01, augment=augment, views=2)[(1, 0)]])
    assert batch["grid_coord"].shape == (points, 3) and batch["grid_coord"].min() == 0
    assert all(value.isfinite().all() for value in batch.values() if torch.is_tensor(value))
    world = batch["world_coord"][batch["point_to_voxel"]]
    np.testing.assert_allclose(world, np.load(folder / "coord.npy"), atol=1e-5)


@pytest.mark.parametrize(("labels", "augment"), [(np.full(200, -1), True), (None, False)], ids=["ignored", "no file"])
def test_a_scene_without_labels_gives_ignored_voxels(labels, augment, tmp_path):
    write_scene(tmp_path / "train" / "scene", segment20=labels, instance=None)
    batch = collate([SceneDataset(tmp_path, "train", voxel_size=0.3, augment=augment)[0]])
    assert (batch["segment"] == IGNORE).all() and (batch["point_segment"] == IGNORE).all()
    assert len(batch["segment"]) == len(batch["grid_coord"]) and len(batch["point_segment"]) == 200
    assert load_scene(tmp_path / "train" / "scene")["instance"] is None


def test_a_scene_without_a_label_file_is_refused_in_training(tmp_path):
    write_scene(tmp_path / "train" / "scene", segment20=None)
    with pytest.raises(ValueError, match=r"scene has no segment20.npy: it can be predicted but not trained on"):
        SceneDataset(tmp_path, "train", voxel_size=0.3, augment=True)[0]


def test_colours_between_zero_and_one_are_refused_instead_of_turning_black(tmp_path):
    write_scene(tmp_path / "scene", color=np.random.default_rng(0).random((200, 3)).astype(np.float32))
    with pytest.raises(ValueError, match=r"color.npy: expected colours in 0..255"):
        load_scene(tmp_path / "scene")


# ------------------------------------------------------------------------------------------------------ items, batches


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three scenes of different size: with 9 frames, without frames, with 2 frames."""
    folder = tmp_path_factory.mktemp("scenes")
    for i, (points, frames) in enumerate(((200, range(9)), (120, ()), (160, (4, 7)))):
        write_scene(folder / "train" / f"scene_{i}", points, frames, seed=i)
    return folder


def dataset_of(root, **options):
    return SceneDataset(root, "train", **{"voxel_size": 0.3, "image_size": (32, 24), "views": 3, **options})


def chosen(item):
    """Frame ids of an item's views, as write_scene codes them in the depth."""
    return [round((float(depth[0, 0]) - 1) * 100) for depth in item["depth"]]


def test_an_item_follows_from_seed_epoch_and_index_alone(root):
    one, two = dataset_of(root, augment=True, seed=3), dataset_of(root, augment=True, seed=3)
    expected = {key: one[key] for key in [(e, i) for e in (0, 5) for i in range(3)]}
    for key in reversed(expected):                                            # another order, another cache
        assert same(two[key], expected[key])
    assert same(two[1], expected[0, 1])
    assert not same(expected[0, 1], expected[5, 1])
    assert not same(dataset_of(root, augment=True, seed=4)[0, 1], expected[0, 1])
    assert same(dataset_of(root)[0, 1], dataset_of(root, seed=9)[5, 1])       # not augmented: nothing is random


def test_training_views_are_random_by_epoch_and_evaluation_views_evenly_spaced(root):
    training, evaluation = dataset_of(root, augment=True), dataset_of(root)
    views = [chosen(training[epoch, 0]) for epoch in range(12)]
    assert all(len(set(ids)) == 3 and ids == sorted(ids) for ids in views)
    assert len(set(map(tuple, views))) > 6 and set().union(*views) == set(range(9))
    assert chosen(evaluation[0]) == chosen(evaluation[7, 0]) == [0, 4, 8]
    for dataset in (training, evaluation):
        assert chosen(dataset[2, 2]) == [4, 7]                                # fewer than asked for: all of them
        assert chosen(dataset[2, 1]) == []
    assert chosen(dataset_of(root, views=0)[0]) == []


def test_no_image_is_read_for_zero_views(root, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was read"))
    assert dataset_of(root, views=0, augment=True)[0]["image"].shape == (0, 3, 24, 32)


def test_a_full_cache_changes_nothing(root, monkeypatch):
    expected = [dataset_of(root, augment=True)[1, i] for i in range(3)]
    monkeypatch.setattr(data, "CACHE_BYTES", 6000)
    dataset = dataset_of(root, augment=True)
    for _ in range(2):
        assert all(same(dataset[1, i], expected[i]) for i in range(3))
    assert dataset._cached_bytes <= 6000


def test_what_is_used_no_longer_leaves_the_memory_and_scenes_stay(root):
    dataset = dataset_of(root, views=0)
    before = [dataset[0, i] for i in range(3)]
    scenes, bare = dataset._cache.copy(), dataset._cached_bytes
    dataset.use(2)
    assert sum(len(dataset[0, i]["depth"]) for i in range(3)) == 4
    assert len(dataset._cache) == 3 + 4 and dataset._cached_bytes > bare
    kept = dataset._cache.copy()
    dataset.use(2, vary_images=False)  # the same frames
    assert dataset._cache == kept
    dataset.use(0)
    assert dataset._cache == scenes and dataset._cached_bytes == bare
    assert all(same(dataset[0, i], before[i]) for i in range(3))


@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_is_its_scenes_one_behind_the_other(root, augment):
    dataset = dataset_of(root, augment=augment)
    items = [dataset[2, i] for i in (1, 0, 2)]
    batch = collate(items)
    rows = [len(item["grid_coord"]) for item in items]
    assert batch["names"] == ["scene_1", "scene_0", "scene_2"]
    assert batch["view_batch"].tolist() == [1, 1, 1, 2, 2]
    assert batch["batch_index"].tolist() == np.repeat([0, 1, 2], rows).tolist()
    assert batch["point_batch"].tolist() == [0] * 120 + [1] * 200 + [2] * 160
    for b, item in enumerate(items):
        for key, index in [*[(k, "batch_index") for k in ("grid_coord", "color", "normal", "coord", "world_coord",
                                                          "segment")],
                           *[(k, "view_batch") for k in ("image", *CAMERA_KEYS)], ("point_segment", "point_batch"),
                           ("point_instance", "point_batch"), ("superpoint_instance", "superpoint_batch"),
                           ("instance_label", "instance_batch")]:
            np.testing.assert_array_equal(batch[key][batch[index] == b], item[key], err_msg=key)
        mine = batch["point_to_voxel"][batch["point_batch"] == b]
        np.testing.assert_array_equal(mine, item["point_to_voxel"] + sum(rows[:b]))
        assert (batch["batch_index"][mine] == b).all()
    kinds = {"grid_coord": torch.int32, "image": torch.uint8, **dict.fromkeys(
        ("batch_index", "segment", "view_batch", "point_to_voxel", "point_segment", "point_batch", "point_superpoint",
         "point_instance", "superpoint_batch", "superpoint_instance", "instance_batch", "instance_label",
         "piece_voxel", "piece_superpoint"), torch.int64), "has_instances": torch.bool}
    assert all(value.dtype == kinds.get(key, torch.float32) for key, value in batch.items() if key != "names")
    assert same(collate([dataset[2, i] for i in (1, 0, 2)]), batch)           # collate changed nothing it was given


def test_scenes_without_frames_make_a_batch_without_views(root):
    item = dataset_of(root)[1]
    batch = collate([item, item])
    assert batch["image"].shape == (0, 3, 24, 32) and batch["depth"].shape == (0, 24, 32)
    assert batch["view_batch"].shape == (0,) and batch["view_batch"].dtype == torch.int64


def test_coordinates_are_centred_and_heights_start_at_the_lowest_voxel(root):
    for item in (dataset_of(root)[0], dataset_of(root, augment=True)[3, 0]):
        np.testing.assert_allclose(item["coord"][:, :2].mean(0), 0, atol=1e-5)
        assert item["coord"][:, 2].min() == 0
        assert item["grid_coord"].min(0).tolist() == [0, 0, 0]


def test_every_scene_comes_once_an_epoch_in_an_order_that_epoch_and_seed_make():
    batches = EpochBatches(11, 4, shuffle=True, seed=2)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        made = list(batches)
        assert [len(b) for b in made] == [4, 4, 3] and len(batches) == 3
        assert {e for b in made for e, _ in b} == {epoch}
        orders.append([i for b in made for _, i in b])
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] == orders[2] != orders[1]
    other = EpochBatches(11, 4, shuffle=True, seed=3)
    assert [i for b in other for _, i in b] != orders[0]
    assert [i for b in EpochBatches(11, 4, shuffle=False, seed=2) for _, i in b] == list(range(11))


def test_the_loader_gives_the_same_batches_with_and_without_workers(root):
    loaders = [loader(dataset_of(root, augment=True, seed=1), 2, workers, shuffle=True, seed=1) for workers in (0, 2)]
    orders = []
    for epoch in (0, 1, 4):
        for one in loaders:
            one.batch_sampler.set_epoch(epoch)
        plain, parallel = map(list, loaders)
        assert len(plain) == len(parallel) == 2
        assert all(same(a, b) for a, b in zip(plain, parallel))
        orders.append((plain[0]["names"], plain[0]["world_coord"].shape, float(plain[0]["coord"].sum())))
    assert orders[0] != orders[1] != orders[2]


# ---- instances


def slow_targets(segment, instance, superpoint):
    """data.instance_targets with dictionaries: {id: class}, owner of each superpoint as an id or None."""
    label = {}
    for i in sorted({*instance.tolist()} - {j for j in instance.tolist() if j < 0}):
        votes = [k for k in segment[instance == i].tolist() if k != IGNORE]
        best = max(sorted(set(votes)), key=votes.count) if votes else IGNORE
        if best not in (IGNORE, *data.STUFF):
            label[i] = best
    owner = []
    for s in range(superpoint.max() + 1):
        members = instance[superpoint == s].tolist()
        owner.append(next((i for i in label if 2 * members.count(i) > len(members)), None))
    return label, owner


@pytest.mark.parametrize("seed", range(20))
def test_instance_targets_are_those_of_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    superpoint = np.unique(rng.integers(0, 25, 300), return_inverse=True)[1]
    ids = rng.choice([-7, -1, 2, 3, 40, 999, 12345], superpoint.max() + 1)[superpoint]  # an id for most of a superpoint
    instance = np.where(rng.random(300) < 0.3, rng.choice([-1, 2, 3, 40, 50], 300), ids)
    kind = {i: rng.integers(-1, 6) for i in np.unique(instance)}
    segment = np.where(rng.random(300) < 0.2, rng.integers(-1, 6, 300), [kind[i] for i in instance])
    label, owner = slow_targets(segment, instance, superpoint)
    points, superpoints, labels = data.instance_targets(segment, instance, superpoint)
    number = {i: n for n, i in enumerate(label)}  # every instance with a class counts for the benchmark
    expected = [label[i] * 1000 + number[i] + 1 if i in label else 0 for i in instance.tolist()]
    np.testing.assert_array_equal(points, expected)
    held = [i for i in label if i in owner]  # those that own a superpoint can be learnt
    np.testing.assert_array_equal(labels, [label[i] for i in held])
    np.testing.assert_array_equal(superpoints, [held.index(i) if i in held else IGNORE for i in owner])


@pytest.mark.parametrize("instance", [None, np.full(6, -1), np.array([4, 4, 4, 5, 5, -1])],
                         ids=["no file", "none", "stuff alone"])
def test_a_scene_without_instances_has_no_targets(instance):
    points, superpoints, labels = data.instance_targets(np.array([0, 0, 1, -1, -1, 7]), instance, np.arange(6) // 2)
    assert not points.any() and (superpoints == IGNORE).all() and len(labels) == 0


def test_more_instances_than_the_benchmark_numbers_are_refused():
    many = np.arange(1000)
    with pytest.raises(ValueError, match="999 instances"):
        data.instance_targets(np.full(1000, 5), many, many)


def test_an_item_knows_whether_its_instances_are_annotated(tmp_path):
    write_scene(tmp_path / "train" / "known")
    write_scene(tmp_path / "train" / "unknown", instance=None)
    dataset = SceneDataset(tmp_path, "train", voxel_size=0.3)
    assert collate([dataset[0], dataset[1]])["has_instances"].tolist() == [True, False]


def test_pieces_join_every_voxel_and_superpoint_that_share_points(root):
    batch = collate([dataset_of(root)[i] for i in (0, 1)])
    pairs = torch.stack([batch["point_superpoint"], batch["point_to_voxel"]])
    pieces, points = pairs.unique(dim=1, return_counts=True)
    assert torch.equal(torch.stack([batch["piece_superpoint"], batch["piece_voxel"]]), pieces)
    assert torch.equal(batch["piece_points"], points.float())
    assert torch.equal(batch["superpoint_batch"][batch["point_superpoint"]], batch["point_batch"])
    assert torch.equal(batch["batch_index"][batch["piece_voxel"]], batch["superpoint_batch"][batch["piece_superpoint"]])
