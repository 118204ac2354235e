"""scenes/boxes.py: same bytes for the same seed, exact geometry, clean labels, nothing half-made."""

import itertools

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from scenes import boxes, generate
from scenes.folder import CLASS_NAMES

SIZE = (64, 48)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small data set, made by two processes."""
    folder = tmp_path_factory.mktemp("rooms")
    assert boxes.generate(folder, train=1, val=1, seed=3, workers=2, image_size=SIZE) == 2
    return folder


@pytest.fixture(scope="module", params=["train", "val"])
def scene(request, root):
    """One scene folder as a dict: points, and the list of frames (image, depth, camera_to_world)."""
    folder = root / request.param / "room_0000"
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    frames = [(np.array(Image.open(folder / "color" / f"{i}.jpg")),
               np.array(Image.open(folder / "depth" / f"{i}.png")) / 1000,
               np.loadtxt(folder / "pose" / f"{i}.txt")) for i in range(generate.FRAMES)]
    return {**arrays, "folder": folder, "frames": frames,
            "intrinsics": np.loadtxt(folder / "intrinsic" / "intrinsic_depth.txt")[:3, :3]}


def slow_cast(room, origin, direction):
    """First hit (t, box) of one ray in float64: cuts every plane of every box and asks whether the cut lies on it."""
    hits = [(np.inf, 0)]
    for box, (center, half, yaw) in enumerate(zip(room["box_center"], room["box_half"], room["box_yaw"])):
        turn = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        o, d = turn @ (origin - center), turn @ direction
        for axis, sign in itertools.product(range(3), (-1, 1)):
            t = (sign * half[axis] - o[axis]) / d[axis]
            on_face = (np.delete(np.abs(o + t * d) - half, axis) <= 0).all()
            if t > 0 and on_face and (box, axis, sign) != (0, 2, 1):  # there is no ceiling
                hits.append((t, box))
    return min(hits)


def test_scenes_and_seeds_differ(root):
    colors = [np.load(root / split / "room_0000" / "color.npy")[:100] for split in ("train", "val")]
    rng = np.random.default_rng((4, 0, 0))
    colors.append(boxes.sample_points(boxes.make_room(rng), rng)["color"][:100])
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(colors, 2))


def assert_consistent(segment, instance, superpoint):
    """Superpoints are numbered without gaps and lie in one class and one instance; instances have one class."""
    np.testing.assert_array_equal(instance == -1, (segment == boxes.WALL) | (segment == boxes.FLOOR))
    np.testing.assert_array_equal(np.unique(superpoint), np.arange(superpoint.max() + 1))
    assert len(np.unique([superpoint, segment, instance], axis=1).T) == superpoint.max() + 1
    things = np.unique([instance, segment], axis=1)[0]
    np.testing.assert_array_equal(things[things >= 0], np.arange(instance.max() + 1))
    assert segment.min() >= 0 and segment.max() < len(CLASS_NAMES)


def test_a_scene_folder_has_all_files_in_the_agreed_form_and_consistent_labels(scene):
    count = len(scene["coord"])
    assert count > 30_000
    expected = {"coord": ((count, 3), "f4"), "normal": ((count, 3), "f4"), "color": ((count, 3), "u1"),
                "segment20": ((count,), "i4"), "instance": ((count,), "i4"), "superpoint": ((count,), "i4")}
    assert {name: (scene[name].shape, scene[name].dtype) for name in expected} == expected
    np.testing.assert_allclose(np.linalg.norm(scene["normal"], axis=1), 1, atol=1e-5)
    for image, depth, pose in scene["frames"]:
        assert image.shape == (48, 64, 3) and depth.shape == (48, 64) and pose.shape == (4, 4)
    color, depth = (scene["folder"] / "intrinsic" / f"intrinsic_{name}.txt" for name in ("color", "depth"))
    assert color.read_bytes() == depth.read_bytes() and np.loadtxt(color).shape == (4, 4)
    assert_consistent(scene["segment20"], scene["instance"], superpoint := scene["superpoint"])
    extents = [np.ptp(scene["coord"][superpoint == i], axis=0) for i in range(superpoint.max() + 1)]
    assert np.linalg.norm(extents, axis=1).max() < 1.5


def test_the_rooms_are_those_that_lie_in_data_folders_and_stand_in_results():
    """Other numbers than these mean other bytes: raise GENERATOR, and measure anew what results/README.md says."""
    rng = np.random.default_rng((0, 0, 0))
    points = boxes.sample_points(boxes.make_room(rng), rng)
    assert boxes.GENERATOR == 1 and len(points["coord"]) == 63_117 and points["superpoint"].max() == 367
    np.testing.assert_allclose(points["coord"].mean(axis=0, dtype=float), (1.941224, 1.856669, 0.866112), atol=2e-6)
    assert points["color"].mean() == pytest.approx(138.191998, abs=1e-4)
    assert np.bincount(points["segment20"])[:8].tolist() == [22534, 10868, 0, 0, 0, 3292, 1608, 4541]


def test_every_class_has_a_shape_and_the_members_of_a_group_differ_in_nothing_but_their_pattern():
    assert set(boxes.CLASSES) | {"wall", "floor"} == set(CLASS_NAMES)
    assert sum(len(names) for names, *_ in boxes.GROUPS) == len(CLASS_NAMES) - 2
    for names, *rest in boxes.GROUPS:
        assert {boxes.CLASSES[name][:3] for name in names} == {tuple(rest)}
        patterns = [boxes.CLASSES[name][3] for name in names]
        assert patterns == (list(range(len(names))) if len(names) > 1 else [None]) and len(names) <= len(boxes.PATTERNS)


def test_all_patterns_have_the_same_mean_and_variance():
    cells = (np.arange(1000) + 0.5) / 1000
    u, v = np.meshgrid(cells, cells)
    for pattern, period in enumerate((1, np.sqrt(2), 1)):
        sign = boxes.pattern_sign(pattern, u * period, v * period)
        assert set(np.unique(sign)) == {-1, 1} and abs(sign.mean()) < 1e-3  # so the variance is 1 within 1e-6


def test_points_and_voxels_of_all_patterns_share_mean_variance_and_smoothness():
    rng, figures = np.random.default_rng(0), [[] for _ in boxes.PATTERNS]
    for number in range(12):
        room = boxes.make_room(rng)
        points = boxes.sample_points(room, rng)
        if number < 3:
            assert_consistent(points["segment20"], points["instance"], points["superpoint"])
        for thing in range(2, len(room["thing_label"])):
            mine = points["instance"] == thing - 2
            color = (points["color"][mine] / 255 - room["thing_color"][thing]).mean(axis=1)
            # stripes run upwards: voxels of 5 cm above one another would agree if the points still showed them
            key = np.floor(points["coord"][mine] / 0.05 + 1).astype(int) @ (10**6, 10**3, 1)
            key, row = np.unique(key, return_inverse=True)
            mean, pairs = np.bincount(row, color) / np.bincount(row), np.diff(key) == 1
            up = np.corrcoef(mean[:-1][pairs], mean[1:][pairs])[0, 1]
            figures[room["thing_pattern"][thing]].append((color.mean(), color.std(), up))
    mean, deviation, up = np.array([np.mean(rows, axis=0) for rows in figures]).T        # (patterns,)
    np.testing.assert_allclose(mean, 0, atol=0.005)
    np.testing.assert_allclose(deviation, boxes.CONTRAST, atol=0.005)
    np.testing.assert_allclose(up, up.mean(), atol=0.02)


def test_rays_and_noise_free_depth_agree_with_slow_independent_rays():
    rng, room = np.random.default_rng(1), boxes.make_room(np.random.default_rng(5))
    origin = np.array([*room["size"][:2] / 2, 2.1])
    directions = rng.normal(size=(300, 3)) - (0, 0, 0.7)
    t, box = boxes.cast_rays(room, origin, directions)
    slow = [slow_cast(room, origin, direction) for direction in directions]
    np.testing.assert_allclose(t, [hit for hit, _ in slow], atol=1e-4)
    np.testing.assert_array_equal(box, [which for _, which in slow])
    assert (box > 0).any() and np.isinf(t).any()
    intrinsics, pose = generate.intrinsics_for((40, 30), 1.2), generate.look(origin, 0.7, 0.6)
    _, depth = boxes.render(room, pose, intrinsics, (40, 30))
    for u, v in ((0, 0), (39, 29), (20, 15), (7, 22), (33, 4)):  # depth is along the axis, through the pixel's centre
        hit, _ = slow_cast(room, origin, pose[:3, :3] @ np.linalg.inv(intrinsics) @ (u, v, 1))
        assert depth[v, u] == pytest.approx(hit if np.isfinite(hit) else 0, abs=1e-3)


def test_frames_and_points_agree_both_ways(scene):
    tree, seen = cKDTree(scene["coord"]), np.zeros(len(scene["coord"]), dtype=bool)
    for _, depth, pose in scene["frames"]:
        v, u = np.nonzero(depth)
        z = depth[v, u]
        camera = np.stack([u, v, np.ones_like(u)], axis=1) @ np.linalg.inv(scene["intrinsics"]).T * z[:, None]
        distance, _ = tree.query(camera @ pose[:3, :3].T + pose[:3, 3])
        # point spacing, plus the sensor's noise; faces that look down have no points
        assert np.quantile(distance - 0.004 * z ** 2, 0.99) < 0.06
        camera = (scene["coord"] - pose[:3, 3]) @ pose[:3, :3]
        pixel = camera @ scene["intrinsics"].T
        front = camera[:, 2] > 0.05
        u, v = np.round(pixel[:, :2] / np.where(front, pixel[:, 2], 1)[:, None]).astype(int).T
        rows = np.flatnonzero(front & (u >= 0) & (u < SIZE[0]) & (v >= 0) & (v < SIZE[1]))
        seen[rows] |= np.abs(depth[v[rows], u[rows]] - camera[rows, 2]) < 0.05
    assert seen.mean() > 0.6


def test_cameras_are_rigid_level_and_in_free_space(scene, root):
    split = ("train", "val").index(scene["folder"].parent.name)
    room = boxes.make_room(np.random.default_rng((3, split, 0)))         # the scene's own room
    for _, depth, pose in scene["frames"]:
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-5)
        assert np.linalg.det(pose[:3, :3]) > 0
        assert abs(pose[2, 0]) < 1e-6 and pose[2, 1] < 0                 # x is level, y points down
        assert (pose[:3, 3] > 0.2).all() and (pose[:2, 3] < room["size"][:2] - 0.2).all()
        assert not boxes.inside_boxes(room, pose[None, :3, 3], 0.01).any()
        assert (depth > 0).mean() > 0.5


def test_rooms_of_many_seeds_can_be_made_and_their_furniture_does_not_overlap():
    for seed in range(30):
        room = boxes.make_room(np.random.default_rng(seed))
        assert len(room["thing_label"]) >= 2 + 6
        for box, thing in list(enumerate(room["box_thing"]))[1:]:
            corners = np.array(np.meshgrid(*[(-0.999, 0, 0.999)] * 3)).reshape(3, -1).T
            c, s = np.cos(room["box_yaw"][box]), np.sin(room["box_yaw"][box])
            turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
            world = (corners * room["box_half"][box]) @ turn + room["box_center"][box]
            assert (world > 0).all() and (world < room["size"]).all()
            others = room["box_thing"] != thing           # the shell stays row 0
            rest = {**room, **{key: room[key][others] for key in ("box_center", "box_half", "box_yaw")}}
            assert not boxes.inside_boxes(rest, world).any()


def test_a_stopped_run_leaves_no_half_made_room_and_the_next_in_one_process_ends_with_the_same_bytes(
        root, tmp_path, monkeypatch):
    save, calls, asked = np.save, iter(range(9)), {"train": 1, "val": 1, "seed": 3, "workers": 1, "image_size": SIZE}

    def fail_midway(path, array):
        if next(calls) == 8:                     # in the middle of the second scene's points
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(np, "save", fail_midway)
    with pytest.raises(KeyboardInterrupt):
        boxes.generate(tmp_path, **asked)
    monkeypatch.undo()
    made = tmp_path / "train" / "room_0000" / "coord.npy"
    before = made.stat().st_mtime_ns
    assert not list((tmp_path / "val").iterdir())
    assert boxes.generate(tmp_path, **asked) == 1 and made.stat().st_mtime_ns == before
    first, second = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                     for folder in (root, tmp_path))
    assert first == second and len(first) > 50


def test_the_command_makes_what_is_missing_and_refuses_a_folder_of_others(root, tmp_path, capsys, monkeypatch):
    def run(seed):
        monkeypatch.setattr("sys.argv", ["rooms", "--out", str(tmp_path), "--train", "1", "--val", "0", "--seed", seed])
        boxes.main()
        return capsys.readouterr().out

    assert run("3") == f"{tmp_path}: 1 rooms made\n"
    assert run("3") == f"{tmp_path}: 0 rooms made\n"
    made = np.load(tmp_path / "train" / "room_0000" / "coord.npy")
    np.testing.assert_array_equal(made, np.load(root / "train" / "room_0000" / "coord.npy"))
    with pytest.raises(SystemExit):
        run("4")
    assert "holds rooms made with {'generator': 1, 'seed': 3, " in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose another folder with --out or delete"):
        boxes.generate(tmp_path, train=1, val=0, seed=3, image_size=SIZE)
    (tmp_path / "rooms.json").unlink()
    with pytest.raises(ValueError, match="they are not generated rooms; choose another folder with --out"):
        boxes.generate(tmp_path)
    assert not (tmp_path / "rooms.json").exists()


@pytest.mark.parametrize("wrong", [{"train": -1}, {"seed": -1}, {"workers": 0}, {"image_size": (0, 120)}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected train, val and seed >= 0, workers >= 1 and images of 8x8 or more"):
        boxes.generate(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
