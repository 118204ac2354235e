"""Tests of data.py: scene folders good and bad, voxels, the camera under augmentation, superpoints, batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import write_scene

import data
from data import EpochBatches, SceneDataset, collate, loader, scene_item
from scenes.folder import IGNORE, load_frames, load_scene

AUGMENTATIONS = ("flip", "rotate", "scale", "elastic", "jitter")
CAMERA_KEYS = ("depth", "world_to_camera", "intrinsics")


def same(one, two):
    """Whether two items or batches are equal in every key."""
    return one.keys() == two.keys() and all(
        one[k].shape == two[k].shape and (one[k] == two[k]).all() if hasattr(one[k], "shape") else one[k] == two[k]
        for k in one)


@pytest.fixture
def scene_folder(tmp_path):
    return write_scene(tmp_path / "train" / "scene", frames=(0, 1))


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
