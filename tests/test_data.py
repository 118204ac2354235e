"""Tests of data.py and scenes/augment.py: the camera under augmentation, items, targets, batches, loaders."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import write_scene

import data
from data import EpochBatches, SceneDataset, Scenes, collate, scene_item
from scenes import augment
from scenes.folder import IGNORE, SCANNET20, STUFF, load_frames, load_scene
from scenes.points import complete

AUGMENTATIONS = ("flip", "rotate", "scale", "elastic", "jitter")
CAMERA_KEYS = ("depth", "world_to_camera", "intrinsics")


def same(one, two):
    """Whether two items or batches are equal in every key."""
    return one.keys() == two.keys() and all(
        one[k].shape == two[k].shape and (one[k] == two[k]).all() if hasattr(one[k], "shape") else one[k] == two[k]
        for k in one)


def read(folder, frames=()):
    """A scene and these frames of it, 32x24 pixels."""
    return complete(load_scene(folder))[0], load_frames(folder, frames, (32, 24))


@pytest.fixture
def scene_folder(tmp_path):
    return write_scene(tmp_path / "train" / "scene", frames=(0, 1))


def only(monkeypatch, names):
    """Let only these geometric augmentations run."""
    for name in set(AUGMENTATIONS) - set(names):
        leave = (lambda coord, normal, rng: (coord, normal)) if name in ("flip", "rotate") else lambda coord, *_: coord
        monkeypatch.setattr(augment, name, leave)


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


@pytest.mark.parametrize("names", [*[(name,) for name in AUGMENTATIONS], AUGMENTATIONS], ids="+".join)
def test_projection_uses_the_coordinates_before_augmentation(names, scene_folder, monkeypatch):
    scene, frames = read(scene_folder, [0, 1])
    coord, plain = scene["coord"].copy(), scene_item(scene, frames, 0.2)
    check_projection(plain, coord, scene_folder)
    only(monkeypatch, names)

    def augmented():
        """Item of the first seed that moves points, in metres (from the middle of the scene) and in voxels."""
        for seed in range(30):
            given.update(scene)
            item = scene_item(given, frames, 0.2, rng=np.random.default_rng(seed))
            there, here = (one["coord"][one["point_to_voxel"]] for one in (item, plain))
            cells = [one["grid_coord"][one["point_to_voxel"]] for one in (item, plain)]
            if np.abs(there - here).max() > 0.002 and not np.array_equal(*cells):
                return item
        raise AssertionError("no seed of 30 changed the points")

    given = {}
    item = augmented()
    check_projection(item, coord, scene_folder)
    np.testing.assert_array_equal(scene["coord"], coord)  # nothing was changed in place
    for key in CAMERA_KEYS:
        np.testing.assert_array_equal(item[key], frames[key])

    # the classic fault, planted: world_coord taken after the augmentation
    real = data.augment_points

    def leak(points, normal, rng):
        given["coord"], normal = real(points, normal, rng)
        return given["coord"], normal

    monkeypatch.setattr(data, "augment_points", leak)
    item = augmented()
    with pytest.raises(AssertionError):
        check_projection(item, coord, scene_folder)


def test_normals_turn_with_the_points_and_a_scene_stays_upright(tmp_path, monkeypatch):
    only(monkeypatch, ("flip", "rotate", "scale"))
    normal = np.array([0.6, 0.48, 0.64])
    plane = np.random.default_rng(10).uniform(-1, 1, (200, 2)) @ np.linalg.svd(normal[None])[2][1:]
    scene, frames = read(write_scene(tmp_path / "plane", coord=plane + normal, normal=np.tile(normal, (200, 1))))
    for seed in range(6):
        item = scene_item(scene, frames, 0.2, rng=np.random.default_rng(seed))
        flat = item["coord"] - item["coord"].mean(0)
        assert np.linalg.svd(flat)[1][1] > 1 and np.abs((flat * item["normal"]).sum(1)).max() < 1e-4
        for change in (augment.flip, augment.rotate):  # the normals still point to the same side
            moved, turned = change(scene["coord"], scene["normal"], np.random.default_rng(seed))
            np.testing.assert_allclose((moved * turned).sum(1), 1, atol=1e-5)
            up = change(np.eye(3, dtype=np.float32)[2:], normal[None], np.random.default_rng(seed))[0]
            assert up[0, 2] > np.cos(np.pi / 64 * np.sqrt(2)) - 1e-5


def test_image_augmentation_changes_colours_and_moves_no_pixel():
    rng = np.random.default_rng(4)
    image = np.stack([rng.permutation(144).reshape(3, 6, 8) + 50 for _ in range(5)]).astype(np.uint8)  # 50..193
    out = augment.augment_images(image, rng)
    assert out.dtype == np.uint8 and out.shape == image.shape
    for before, after in zip(image.reshape(5, -1), out.reshape(5, -1)):
        assert not np.array_equal(before, after)
        assert (np.diff(after[np.argsort(before)].astype(int)) >= 0).all()  # the order of all pixels stays
    assert len({view.mean() - old.mean() for view, old in zip(out, image)}) == 5


def test_colours_stay_in_their_range_under_augmentation(scene_folder):
    scene, frames = read(scene_folder)
    np.testing.assert_allclose(scene_item(scene, frames, 0.05)["color"].max(), 1, atol=0.02)
    for seed in range(10):
        item = scene_item(scene, frames, 0.05, rng=np.random.default_rng(seed))
        assert item["color"].min() >= -1 and item["color"].max() <= 1 and item["color"].std() > 0.3
        np.testing.assert_allclose(np.linalg.norm(item["normal"], axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("unit", [1000, 1e6])
def test_coordinates_in_other_units_than_metres_are_named_before_they_fill_the_memory(unit, tmp_path):
    write_scene(tmp_path / "train" / "scene", 50, coord=np.random.default_rng(6).uniform(0, 5, (50, 3)) * unit)
    for epoch in range(3):
        with pytest.raises(ValueError, match=r"metres"):
            dataset_of(tmp_path, voxel_size=0.02, augment=True)[epoch, 0]


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("points", [1, 2, 5])
def test_a_scene_of_one_or_few_points_works(points, augment, tmp_path):
    folder = write_scene(tmp_path / "train" / "dot", points, frames=(0, 1), normal=None)
    batch = collate([dataset_of(tmp_path, voxel_size=0.01, augment=augment)[1, 0]])
    assert batch["grid_coord"].shape == (points, 3) and batch["grid_coord"].min(0).values.tolist() == [0, 0, 0]
    np.testing.assert_allclose(batch["coord"][:, :2].mean(0), 0, atol=1e-5)  # centred
    assert batch["coord"][:, 2].min() == 0
    assert all(value.isfinite().all() for value in batch.values() if torch.is_tensor(value))
    world = batch["world_coord"][batch["point_to_voxel"]]
    np.testing.assert_allclose(world, np.load(folder / "coord.npy"), atol=1e-5)


@pytest.mark.parametrize(("labels", "augment"), [(np.full(200, -1), True), (None, False)], ids=["ignored", "no file"])
def test_a_scene_without_labels_gives_ignored_voxels_and_without_a_file_of_them_it_does_not_train(
        labels, augment, tmp_path):
    write_scene(tmp_path / "train" / "scene", segment20=labels, instance=None)
    batch = collate([dataset_of(tmp_path, augment=augment)[0]])
    assert (batch["segment"] == IGNORE).all() and (batch["point_segment"] == IGNORE).all()
    assert len(batch["segment"]) == len(batch["grid_coord"]) and len(batch["point_segment"]) == 200
    assert not batch["has_instances"].any()
    if labels is None:
        with pytest.raises(ValueError, match=r"scene has no segment20.npy: it can be predicted but not trained on"):
            dataset_of(tmp_path, augment=True)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three scenes of different size: with 9 frames, without frames, with 2 frames."""
    folder = tmp_path_factory.mktemp("scenes")
    for i, (points, frames) in enumerate(((200, range(9)), (120, ()), (160, (4, 7)))):
        for split in ("train", "val"):
            write_scene(folder / split / f"scene_{i}", points, frames, seed=i)
    return folder


def dataset_of(root, **options):
    return SceneDataset(root, "train", **{"voxel_size": 0.3, "image_size": (32, 24), "views": 3, **options})


def chosen(item):
    """Frame ids of an item's views, as write_scene codes them in the depth."""
    return [round((float(depth[0, 0]) - 1) * 100) for depth in item["depth"]]


def test_an_item_follows_from_seed_epoch_and_index_alone(root):
    one, two = dataset_of(root, augment=True, seed=3), dataset_of(root, augment=True, seed=3)
    expected = {key: one[key] for key in [(e, i) for e in (0, 5) for i in range(3)]}
    for key in reversed(expected):  # another order, other scenes in memory
        assert same(two[key], expected[key])
    assert same(two[1], expected[0, 1])
    assert not same(expected[0, 1], expected[5, 1])
    assert not same(dataset_of(root, augment=True, seed=4)[0, 1], expected[0, 1])
    assert same(dataset_of(root)[0, 1], dataset_of(root, seed=9)[5, 1])  # not augmented: nothing is random


def test_training_views_are_random_by_epoch_and_evaluation_views_evenly_spaced(root):
    training, evaluation = dataset_of(root, augment=True), dataset_of(root)
    views = [chosen(training[epoch, 0]) for epoch in range(12)]
    assert all(len(set(ids)) == 3 and ids == sorted(ids) for ids in views)
    assert len(set(map(tuple, views))) > 6 and set().union(*views) == set(range(9))
    assert chosen(evaluation[0]) == chosen(evaluation[7, 0]) == [0, 4, 8]
    for dataset in (training, evaluation):
        assert chosen(dataset[2, 2]) == [4, 7]  # fewer than asked for: all of them
        assert chosen(dataset[2, 1]) == []


def test_no_image_is_read_for_zero_views_and_a_batch_without_views_is_one(root, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was read"))
    batch = collate([dataset_of(root, views=0, augment=True)[0], dataset_of(root)[1]])
    assert batch["image"].shape == (0, 3, 24, 32) and batch["depth"].shape == (0, 24, 32)
    assert batch["view_batch"].shape == (0,) and batch["view_batch"].dtype == torch.int64


def scenes_of(root, workers=0):
    return Scenes(root, 0.3, (32, 24), 2, workers, 1, torch.device("cpu"), root / "cache", 0)


def test_a_full_memory_changes_nothing_and_all_loading_processes_together_keep_no_more_than_kept_bytes(root):
    expected = [dataset_of(root, augment=True)[1, i] for i in range(3)]
    dataset = dataset_of(root, augment=True, keep_bytes=6000)
    for _ in range(2):
        assert all(same(dataset[1, i], expected[i]) for i in range(3))
    kept = sum(part.nbytes for value in dataset.kept.values() for part in value.values() if hasattr(part, "nbytes"))
    assert 0 < kept == 6000 - dataset.room <= 6000
    for workers in (0, 1, 2):
        scenes = scenes_of(root, workers)
        scenes.read(2, 0.0, None)
        assert 0 < (scenes.train.room + scenes.val.room) * max(1, workers) <= data.KEPT_BYTES


def test_blanked_scenes_lose_their_images_or_their_points_and_say_so(root):
    plain, blanked = (dataset_of(root, augment=True, blank=share) for share in (0.0, 0.3))
    kinds = []
    for epoch in range(40):
        before, after = plain[epoch, 0], blanked[epoch, 0]
        images, points = (len(np.unique(after[key])) == 1 for key in ("image", "color"))
        kinds.append((images, points))
        assert before["whole"].all() and after["whole"].tolist() == [not (images or points)]
        assert (not after["normal"].any()) == points
        for key in before.keys() - {"whole", *["image"] * images, *["color", "normal"] * points}:
            np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    shares = np.mean(kinds, 0)
    assert (shares > 0.15).all() and (shares < 0.45).all() and (True, True) not in kinds


@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_is_its_scenes_one_behind_the_other(root, augment):
    dataset = dataset_of(root, augment=augment)
    batch = collate(items := [dataset[2, i] for i in (1, 0, 2)])
    rows = [len(item["grid_coord"]) for item in items]
    assert batch["names"] == ["scene_1", "scene_0", "scene_2"] and batch["view_batch"].tolist() == [1, 1, 1, 2, 2]
    assert batch["batch_index"].tolist() == np.repeat([0, 1, 2], rows).tolist()
    assert batch["point_batch"].tolist() == [0] * 120 + [1] * 200 + [2] * 160
    owner = dict.fromkeys(("grid_coord", "color", "normal", "coord", "world_coord", "segment"), "batch_index") \
        | dict.fromkeys(("image", *CAMERA_KEYS), "view_batch") | {
            "point_segment": "point_batch", "point_instance": "point_batch",
            "superpoint_instance": "superpoint_batch", "instance_label": "instance_batch"}
    for b, item in enumerate(items):
        for key, index in owner.items():
            np.testing.assert_array_equal(batch[key][batch[index] == b], item[key], err_msg=key)
        mine = batch["point_to_voxel"][batch["point_batch"] == b]
        np.testing.assert_array_equal(mine, item["point_to_voxel"] + sum(rows[:b]))
        assert (batch["batch_index"][mine] == b).all()
    kinds = {"grid_coord": torch.int32, "image": torch.uint8, **dict.fromkeys(("has_instances", "whole"), torch.bool)}
    kinds |= dict.fromkeys(("color", "normal", "coord", "world_coord", "piece_points", *CAMERA_KEYS), torch.float32)
    assert all(value.dtype == kinds.get(key, torch.int64) for key, value in batch.items() if key != "names")
    assert same(collate([dataset[2, i] for i in (1, 0, 2)]), batch)  # collate changed nothing it was given


def test_every_scene_comes_once_an_epoch_in_an_order_that_epoch_and_seed_make():
    def order(epoch, **options):
        batches = EpochBatches(11, 4, **{"shuffle": True, "seed": 2, **options})
        batches.set_epoch(epoch)
        assert [len(batch) for batch in batches] == [4, 4, 3] and {e for batch in batches for e, _ in batch} == {epoch}
        return [i for batch in batches for _, i in batch]

    assert order(0) == order(0) not in (order(1), order(0, seed=3))
    assert sorted(order(0)) == sorted(order(1)) == order(0, shuffle=False) == list(range(11))


def test_batches_are_the_same_with_and_without_workers_and_from_a_step_in_an_epoch_on(root):
    orders, both = [], [scenes_of(root, workers) for workers in (0, 2)]
    for scenes in both:
        scenes.read(3, 0.0, None)
    for epoch in (0, 1, 4):
        plain, parallel = (list(scenes.batches(epoch)) for scenes in both)
        assert len(plain) == len(parallel) == both[0].steps == 2
        assert all(same(a, b) for a, b in zip(plain, parallel))
        rest = list(both[0].batches(epoch, 1))
        assert len(rest) == 1 and same(rest[0], plain[1])
        orders.append((plain[0]["names"], plain[0]["world_coord"].shape, float(plain[0]["coord"].sum())))
    assert orders[0] != orders[1] != orders[2]
    assert [batch["names"] for batch in both[0].val_batches] == [["scene_0", "scene_1"], ["scene_2"]]
    assert sum(len(batch["depth"]) for batch in both[0].val_batches) == 6 + 2  # twice as many views


def slow_targets(segment, instance, superpoint):
    """points.instance_targets with dictionaries: {id: class}, owner of each superpoint as an id or None."""
    label = {}
    for i in sorted({*instance.tolist()} - {j for j in instance.tolist() if j < 0}):
        votes = [k for k in segment[instance == i].tolist() if k != IGNORE]
        best = max(sorted(set(votes)), key=votes.count) if votes else IGNORE
        if best not in (IGNORE, *STUFF):
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
    points, superpoints, labels = data.instance_targets(segment, instance, superpoint, SCANNET20.things)
    number = {i: n for n, i in enumerate(label)}  # every instance with a class counts for the benchmark
    expected = [label[i] * 1000 + 1000 + number[i] + 1 if i in label else 0 for i in instance.tolist()]
    np.testing.assert_array_equal(points, expected)
    held = [i for i in label if i in owner]  # those that own a superpoint can be learnt
    np.testing.assert_array_equal(labels, [label[i] for i in held])
    np.testing.assert_array_equal(superpoints, [held.index(i) if i in held else IGNORE for i in owner])


@pytest.mark.parametrize("instance", [None, np.full(6, -1), np.array([4, 4, 4, 5, 5, -1])])
def test_a_scene_without_instances_has_no_targets_and_more_than_the_benchmark_numbers_are_refused(instance):
    segment, many = np.array([0, 0, 1, -1, -1, 7]), np.arange(1000)
    points, superpoints, labels = data.instance_targets(segment, instance, np.arange(6) // 2, SCANNET20.things)
    assert not points.any() and (superpoints == IGNORE).all() and len(labels) == 0
    with pytest.raises(ValueError, match="999 instances"):
        data.instance_targets(np.full(1000, 5), many, many, SCANNET20.things)


def test_pieces_join_every_voxel_and_superpoint_that_share_points(root):
    batch = collate([dataset_of(root)[i] for i in (0, 1)])
    pairs = torch.stack([batch["point_superpoint"], batch["point_to_voxel"]])
    pieces, points = pairs.unique(dim=1, return_counts=True)
    assert torch.equal(torch.stack([batch["piece_superpoint"], batch["piece_voxel"]]), pieces)
    assert torch.equal(batch["piece_points"], points.float())
    assert torch.equal(batch["superpoint_batch"][batch["point_superpoint"]], batch["point_batch"])
    assert torch.equal(batch["batch_index"][batch["piece_voxel"]], batch["superpoint_batch"][batch["piece_superpoint"]])
