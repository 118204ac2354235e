"""scenes/rooms.py and scenes/scan.py: same bytes for the same seed, all classes, honest labels, held-out furniture."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from scenes import furniture, generate, rooms, scan
from scenes.folder import CLASS_NAMES, STUFF

SIZE = (64, 48)
STEADY = replace(rooms.USUAL, drift=(0, 0), noise=(0, 0), views=12)
ARRAYS = {"coord": "f4", "color": "u1", "normal": "f4", "segment20": "i4", "instance": "i4", "superpoint": "i4"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A usual room, as those of train are, and a shifted one, made by two processes."""
    folder = tmp_path_factory.mktemp("furnished")
    assert rooms.generate(folder, train=0, val=1, shifted=1, seed=2, workers=2, image_size=SIZE) == 2
    return folder


@pytest.fixture(scope="module", params=["val", "shifted"])
def scene(root, request):
    """A room as a dict of its arrays; frames, list of (color, depth m, pose); intrinsics (3, 3)."""
    folder = root / request.param / "room_0000"
    frames = [(np.asarray(Image.open(folder / "color" / f"{i}.jpg")),
               np.asarray(Image.open(folder / "depth" / f"{i}.png")) / 1000,
               np.loadtxt(folder / "pose" / f"{i}.txt")) for i in range(generate.FRAMES)]
    return {**{name: np.load(folder / f"{name}.npy") for name in ARRAYS}, "frames": frames,
            "intrinsics": np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt")[:3, :3]}


@pytest.fixture(scope="module")
def plans():
    """The first eight rooms of a val split, of a seed that needs few tries, furnished, and their models."""
    put, models = rooms.Room.put, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms.Room, "put", lambda self, model, *a, **k: models.append(model) or put(self, model, *a, **k))
        rng = [np.random.default_rng((2, 1, i)) for i in range(len(rooms.KINDS))]
        return [rooms.furnish(rng[i], rooms.USUAL, kind) for i, kind in enumerate(rooms.KINDS)], models


def plain_room(*more):
    """A room of 4 x 3 x 2.5 m, white but for its parts `more`, with nothing in the way."""
    room = SimpleNamespace(size=np.array([4.0, 3.0, 2.5]), parts=[], taken=[])
    x, y, z = np.diag(room.size)
    for corner, along, up, label in ((0 * x, x, y, "floor"), (0 * x, x, z, "wall"), (0 * x, y, z, "wall"),
                                     (y, x, z, "wall"), (x, y, z, "wall")):
        rooms.Room.quad(room, corner, along, up, label, np.full(3, 0.9))
    room.parts += more
    return room


def block(low, high, label, color):
    return furniture.box(*zip(low, high)).astype(float), np.tile(color, (12, 1)), label, None, None


def test_a_scene_folder_has_all_files_in_the_agreed_form_and_consistent_labels(scene):
    count = len(scene["coord"])
    assert 4_000 < count <= scan.MOST_POINTS
    for name, kind in ARRAYS.items():
        assert scene[name].dtype == kind and scene[name].shape == ((count,) if kind == "i4" else (count, 3)), name
    np.testing.assert_allclose(np.linalg.norm(scene["normal"], axis=1), 1, atol=1e-5)
    segment, instance, superpoint = (scene[name] for name in ("segment20", "instance", "superpoint"))
    np.testing.assert_array_equal(instance < 0, (segment < 0) | np.isin(segment, STUFF))
    pairs = np.unique([instance[instance >= 0], segment[instance >= 0]], axis=1)
    np.testing.assert_array_equal(pairs[0], np.arange(pairs.shape[1]))        # one class each, no number left out
    assert pairs.shape[1] >= 4 and segment.max() < len(CLASS_NAMES)
    sizes = np.bincount(superpoint)
    assert sizes.min() >= 20 and len(sizes) > 20                              # as of any scan
    assert 0.1 < (segment == 1).mean() < 0.5 and 0.2 < (segment == 0).mean() < 0.7
    assert np.quantile(np.abs(scene["coord"][segment == 1, 2]), 0.9) < 0.08   # the floor is at 0
    assert len(np.unique(scene["color"], axis=0)) > 200


def test_what_the_frames_see_lies_at_the_points_and_the_cameras_are_in_the_room(scene):
    tree, low, high = cKDTree(scene["coord"]), scene["coord"].min(axis=0), scene["coord"].max(axis=0)
    for image, depth, pose in scene["frames"]:
        assert image.shape == (48, 64, 3) and depth.shape == (48, 64) and (depth > 0).mean() > 0.5
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-5)
        assert np.linalg.det(pose[:3, :3]) > 0 and pose[2, 1] < -0.5          # y points down
        assert (pose[:3, 3] > low + 0.1).all() and (pose[:2, 3] < high[:2] - 0.1).all() and 0.8 < pose[2, 3] < 1.9
        v, u = np.nonzero(depth)
        z = depth[v, u]
        camera = np.stack([u, v, np.ones_like(u)], axis=1) @ np.linalg.inv(scene["intrinsics"]).T * z[:, None]
        distance, _ = tree.query(camera @ pose[:3, :3].T + pose[:3, 3])
        assert np.quantile(distance - 0.003 * z ** 2, 0.9) < 0.08             # spacing and noise; few were not fused


def test_points_lie_on_the_surfaces_they_are_labelled_by_and_have_their_colours():
    room = plain_room(block((1.4, 1.0, 0.0), (2.6, 1.8, 0.7), "table", (0.9, 0.1, 0.1)),
                      block((0.0, 0.0, 0.0), (0.8, 1.6, 0.5), "sofa", (0.1, 0.1, 0.9)),
                      block((3, 2, 0), (3.3, 2.3, 0.4), "", (0, 0.9, 0)))
    points, intrinsics, frames = scan.scan(room, STEADY, np.random.default_rng(0), SIZE)
    segment, (red, green, blue) = points["segment20"], points["color"].T.astype(float)
    for name, dyed, top in (("table", red > 1.6 * blue, 0.7), ("sofa", blue > 1.6 * red, 0.5)):
        mine = segment == CLASS_NAMES.index(name)
        assert mine.sum() > 300 and (dyed == mine).mean() > 0.97
        assert abs(np.quantile(points["coord"][mine, 2], 0.95) - top) < 0.02
        assert len(np.unique(points["instance"][mine])) == 1
    assert ((segment < 0) == (green > 1.6 * red)).mean() > 0.97
    # each point that a frame sees at its depth has that pixel's colour: red, blue or neither
    right = total = 0
    for image, depth, pose in frames:
        camera = (points["coord"] - pose[:3, 3]) @ pose[:3, :3]
        pixel = camera @ intrinsics.T
        u, v = np.round(pixel[:, :2] / np.maximum(pixel[:, 2:], 0.1)).astype(int).T
        rows = np.flatnonzero((camera[:, 2] > 0.1) & (u >= 0) & (u < SIZE[0]) & (v >= 0) & (v < SIZE[1]))
        rows = rows[np.abs(depth[v[rows], u[rows]] - camera[rows, 2]) < 0.04]
        seen = image[v[rows], u[rows]].astype(float)
        dyed = (seen[:, 0] > 1.6 * seen[:, 2]) == (segment[rows] == CLASS_NAMES.index("table"))
        right, total = right + dyed.sum(), total + len(rows)
    assert total > 5000 and right / total > 0.95


def test_a_ray_finds_the_nearest_triangle_and_the_depth_is_along_the_axis():
    soup = scan.Triangles(plain_room(block((1, 1, 0), (2, 2, 0.8), "table", (1, 0, 0))).parts)
    down, away = np.array([[0.0, 0, -1], [0, 0, -2], [0, 0, 1]]), np.array([1.5, 1.5, 2.0])
    t, face, _ = soup.hit(away, down)
    np.testing.assert_allclose(t, [1.2, 0.6, np.inf], atol=1e-6)
    assert soup.label[face[:2]].tolist() == [CLASS_NAMES.index("table")] * 2 and face[2] == -1
    pose = generate.look((2.0, 1.5, 1.25), 0.0, 0.0)                          # level, to the wall at x = 4
    depth, face, color = scan.render(soup, lambda place, normal: -normal[:, 0] * 0.5, pose[None],
                                     generate.intrinsics_for(SIZE, 0.6), SIZE)
    np.testing.assert_allclose(depth, 2.0, atol=1e-5)
    assert (soup.label[face] == 0).all()
    np.testing.assert_allclose(color, 0.45, atol=1e-5)                        # the normal looks at the camera


def test_a_texture_lies_on_its_surface_whatever_way_that_faces():
    board = lambda place: np.stack([place[:, 0] > 1, place[:, 1] > 1, 0 * place[:, 0]], axis=1)  # noqa: E731
    parts = [(np.array([[(0, 0, 0), (3, 0, 0), (0, 3, 0)]]), np.zeros((1, 3)), "floor", board),
             (np.array([[(0, 0, 0), (0, 3, 0), (0, 0, 3)]]), np.ones((1, 3)), "wall", board),
             (np.array([[(0, 0, 0), (3, 0, 0), (0, 0, 3)]]), np.full((1, 3), 0.5), "wall", None)]
    soup = scan.Triangles(parts)
    color = soup.paint(np.array([0, 1, 2, 0]), np.array([(2, 0.5, 0), (0, 2, 0.5), (2, 0, 0.5), (0.5, 2, 0)], float))
    np.testing.assert_array_equal(color, [(1, 0, 0), (1, 0, 0), (0.5, 0.5, 0.5), (0, 1, 0)])


def test_without_the_scan_points_lie_exactly_on_all_surfaces_and_with_it_only_on_seen_ones(monkeypatch):
    monkeypatch.setattr(scan, "MOST_POINTS", 10_000)
    room = plain_room(block((1.5, 1, 0), (2.5, 2, 0.7), "table", (1, 0, 0)))
    bare, _, _ = scan.scan(room, rooms.SETTINGS["no_scan"], np.random.default_rng(1), SIZE)
    seen, _, _ = scan.scan(room, STEADY, np.random.default_rng(1), SIZE)
    for points, under in ((bare, True), (seen, False)):
        table = points["segment20"] == CLASS_NAMES.index("table")
        assert (points["coord"][table, 2] < 1e-4).any() == under              # its underside stands on the floor
    assert np.abs(bare["coord"][bare["segment20"] == 1, 2]).max() < 1e-6
    assert bare["color"][bare["segment20"] == 1].std() == 0                   # their own colour, no light on it


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(root, tmp_path):
    assert rooms.generate(tmp_path, train=0, val=1, seed=2, workers=1, image_size=SIZE) == 1
    first, second = ({path.relative_to(folder): path.read_bytes() for path in (folder / "val").rglob("*.*")}
                     for folder in (root, tmp_path))
    assert first == second and len(first) == 6 + 3 * generate.FRAMES + 2
    with pytest.raises(ValueError, match=r"holds rooms made with .* choose another folder with --out or delete"):
        rooms.generate(tmp_path, train=0, val=1, seed=2, image_size=SIZE, setting="no_scan")
    with pytest.raises(ValueError, match="unknown setting 'none'; choose from usual, no_scan, no_paint"):
        rooms.generate(tmp_path, setting="none")


def test_eight_rooms_in_a_row_have_every_class_and_each_has_floor_walls_and_a_way_in(plans):
    shown = [{part[2] for part in room.parts} for room in plans[0]]
    assert set.union(*shown) == {*CLASS_NAMES, ""}
    assert all({"floor", "wall", "door"} <= labels for labels in shown)
    for room in plans[0]:
        corners = np.concatenate([part[0].reshape(-1, 3) for part in room.parts if part[2] in ("floor", "wall")])
        assert corners[:, 2].min() == 0 and corners[:, 2].max() == pytest.approx(room.size[2])
        assert any(hole[2] == 0 for wall in room.walls for hole in wall.holes)  # one can walk in


def test_large_pieces_stand_apart_in_the_room_and_on_the_floor(plans):
    for room in plans[0]:
        pieces = [(label, box) for *_, label, _, box in room.parts if box and label in (
            "bed", "sofa", "table", "desk", "bookshelf", "counter", "refrigerator", "bathtub")]
        inside = [(label, box) for label, box in pieces if min(box[:2]) > 0 and (box[:2] < room.size[:2]).all()]
        assert inside or room.kind in rooms.WET
        lacking = (*((room.notch + room.size[:2]) / 2), 0, *((room.size[:2] - room.notch) / 2), 0, 3)  # of an L
        for i, (label, box) in enumerate(inside):
            assert box[5] == 0, label
            assert not any(generate.footprints_overlap(box, other, -0.01) for _, other in inside[i + 1:]), label
            assert room.notch[0] == room.size[0] or not generate.footprints_overlap(box, lacking, -0.03), label


def test_small_things_stand_on_what_is_level_and_nowhere_else():
    room = rooms.Room(np.random.default_rng(0), rooms.USUAL, "office")
    room.taken.clear()
    block = furniture.box((-0.1, 0.1), (-0.1, 0.1), (0, 0.2))
    small = furniture.Model("box", "", "top", 0.0, block, np.full((12, 3), 9, np.uint8))
    table = replace(small, label="table", triangles=block * (6, 4, 3.5))
    roof = replace(table, triangles=table.triangles * (table.triangles[..., 2:] < 0.1))   # without its top
    box = room.put(table, 1.5, 1.5, 0.3, size=(1.2, 0.8, 0.7))
    placed = room.on_top(box, small)
    assert placed[5] == pytest.approx(0.7, abs=1e-6)
    assert np.hypot(placed[0] - 1.5, placed[1] - 1.5) < np.hypot(0.5, 0.3)
    other = room.put(roof, 1.5, 1.5, 0.3, size=(1.2, 0.8, 0.7), check=False)
    assert room.on_top(other, small) is None


def test_held_out_furniture_is_in_the_shifted_rooms_alone(plans):
    usual, shifted = ({model.name for model in rooms.pack(held_out)} for held_out in (False, True))
    assert not usual & shifted and len(usual | shifted) == len(furniture.load()) and len(shifted) > 30
    assert not {model.name for model in plans[1]} & shifted
    assert rooms.SHIFTED.held_out and not any(setting.held_out for setting in rooms.SETTINGS.values())
    assert (np.median([getattr(rooms.SHIFTED, name) for name in ("spacing", "noise", "light", "warmth")], axis=1)
            > [getattr(rooms.USUAL, name)[1] for name in ("spacing", "noise", "light", "warmth")]).all()
