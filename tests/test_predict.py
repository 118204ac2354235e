"""predict.py: labels, .ply and picture of scenes with and without labels and frames; errors in one line."""

import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData, PlyElement

import data
import predict
from data import collate, scene_item
from metrics import instance_ap
from model import build_model
from scenes.folder import CLASS_COLORS, CLASS_NAMES, NYU40_IDS, THINGS, load_frames, load_scene
from stages import parameter_groups, setting_at, stage_epochs
from train import RECIPES, Config, save_checkpoint, to_device


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Untrained checkpoints of preset small at the end of the curriculum: {model: path}."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for name in ("baseline", "bifusion"):
        torch.manual_seed(1)
        config = Config(model=name, device="cpu", voxel_size=0.25, views=2, batch_size=1, lr=1e-3, weight_decay=0.0)
        model = build_model(name, "small", len(CLASS_NAMES))
        torch.nn.init.normal_(model.semantic_head.weight)  # so that an untrained network finds several classes
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.0))
        paths[name] = folder / f"{name}.pt"
        save_checkpoint(paths[name], model, optimizer, config, epoch=stage_epochs()[3][1])
    return paths


@pytest.fixture(scope="module")
def room(tiny_rooms):
    return sorted((tiny_rooms / "val").iterdir())[0]


def copy_scene(room, folder, *names):
    """A scene folder with only these arrays of the room, without frames."""
    folder.mkdir()
    for name in names:
        np.save(folder / f"{name}.npy", np.load(room / f"{name}.npy"))
    return folder


def run(checkpoint, *scenes, out):
    predict.main([str(checkpoint), *map(str, scenes), "--out", str(out), "--device", "cpu"])


def failure(checkpoint, *scenes, out):
    """The message with which predict.py exits."""
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, *scenes, out=out)
    message = stopped.value.code
    assert isinstance(message, str), "sys.exit with a text prints it and exits 1"
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_the_ply_holds_every_point_in_the_colour_of_its_voxel_s_class(checkpoints, room, tmp_path, name, capsys):
    run(checkpoints[name], room, out=tmp_path)
    ply = PlyData.read(tmp_path / f"{room.name}_semantic.ply")
    vertex = ply["vertex"].data
    assert not ply.text and ply.byte_order == "<"
    assert [(p.name, p.val_dtype) for p in ply["vertex"].properties] == [
        ("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "u2")]
    scene = load_scene(room)
    assert np.array_equal(np.stack([vertex[k] for k in "xyz"], 1), scene["coord"])

    model, config = predict.open_checkpoint(checkpoints[name])
    assert not model.training
    ids = scene["frame_ids"]
    ids = [ids[i] for i in np.linspace(0, len(ids) - 1, 2 * config.views).round().astype(int)]
    frames = load_frames(room, ids, RECIPES["small"]["image_size"])
    batch = to_device(collate([scene_item(scene, frames, config.voxel_size)]), "cpu")
    with torch.no_grad():
        labels = model(batch)["logits"].argmax(1)[batch["point_to_voxel"]].numpy()
    assert len(np.unique(labels)) > 1
    assert np.array_equal(vertex["label"], np.array(NYU40_IDS)[labels])
    assert np.array_equal(np.stack([vertex[k] for k in ("red", "green", "blue")], 1), CLASS_COLORS[labels])

    lines = capsys.readouterr().out.splitlines()
    for part in (room.name, "mIoU 0.", f"{len(labels)} points", f"{len(batch['grid_coord'])} voxels",
                 f"{len(np.unique(labels))} classes", "3D only" if name == "baseline" else "seen by frames"):
        assert part in lines[0]


def test_the_picture_shows_ground_truth_only_where_there_is_one(checkpoints, room, tmp_path, capsys):
    bare = copy_scene(room, tmp_path / "bare", "coord", "color", "normal")
    ignored = copy_scene(room, tmp_path / "ignored", "coord", "color", "normal", "segment20")
    np.save(ignored / "segment20.npy", np.full(len(np.load(room / "coord.npy")), -1))
    run(checkpoints["bifusion"], room, bare, ignored, out=tmp_path / "out")
    height = {}
    for name in (room.name, "bare", "ignored"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            height[name] = picture.height
            assert np.ptp(np.asarray(picture.convert("L"))) > 100  # something is drawn
    assert height["bare"] == height["ignored"] == height[room.name] / 2
    lines = [line for line in capsys.readouterr().out.splitlines() if " points, " in line]
    assert "mIoU" in lines[0] and "mIoU" not in lines[1] + lines[2]
    assert "3D only (no frame sees it)" in lines[1]


def test_points_and_colours_are_enough_for_a_prediction(checkpoints, room, tmp_path):
    bare = copy_scene(room, tmp_path / "bare", "coord", "color")
    run(checkpoints["bifusion"], bare, out=tmp_path)
    assert PlyData.read(tmp_path / "bare_semantic.ply")["vertex"].count == len(np.load(room / "coord.npy"))


def test_the_picture_leaves_out_what_faces_away_and_shows_the_nearest():
    side = np.linspace(0, 2, 60)
    x, y = (a.ravel() for a in np.meshgrid(side, side))
    sheet = np.stack([x, y, np.zeros_like(x)], 1)
    coord = np.concatenate([sheet, sheet + np.array([0, 0, 0.5]), sheet + np.array([0, 0, 1])])
    normal = np.repeat([[0, 0, 1.0], [0, 0, 1.0], [0, 0, -1.0]], len(sheet), 0)  # the highest faces down: a ceiling
    color = np.repeat(np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8), len(sheet), 0)
    picture = predict.render(coord, normal, color, size=(90, 80), elevation=90)
    red, green, blue = (((picture.argmax(2) == k) & (picture.min(2) == 0)).sum() for k in range(3))
    assert picture.shape == (80, 90, 3) and blue == red == 0 and green > 3000


def test_a_checkpoint_that_cannot_be_used_says_why_in_one_line(checkpoints, room, tmp_path):
    state = torch.load(checkpoints["bifusion"], weights_only=True)

    def saved(name, **changes):
        torch.save(state | changes, tmp_path / name)
        return tmp_path / name

    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoints["bifusion"].read_bytes()[:5000])
    weights = {k: v for k, v in state["model"].items() if k != "semantic_head.bias"}
    code = tmp_path / "code.pt"
    torch.save({"model": sys.exit}, code)
    for path, reason in [(cut, "readable"), (code, "readable"), (tmp_path / "none.pt", "train.py"),
                         (saved("keys.pt", model=weights), "semantic_head.bias"),
                         (saved("config.pt", config=state["config"] | {"colour": 1}), "colour"),
                         (saved("preset.pt", config=state["config"] | {"preset": "huge"}), "huge"),
                         (saved("classes.pt", num_classes=7), "semantic_head")]:
        before = path.read_bytes() if path.exists() else None
        message = failure(path, room, out=tmp_path / "out")
        assert path.name in message and reason in message
        assert before is None or path.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_a_bad_scene_or_device_ends_in_one_line(checkpoints, room, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        message = failure(checkpoints["baseline"], folder, out=tmp_path)
        assert str(folder) in message and ("coord.npy" in message or "scene folder" in message)
    other = tmp_path / room.name
    assert "two scenes" in failure(checkpoints["baseline"], room, other, out=tmp_path)
    with pytest.raises(ValueError, match="--device cpu"):
        predict.open_checkpoint(checkpoints["baseline"], "tpu9")


# ---- instances


def scored(scores, masks, classes, labels):
    return {"scores": np.array(scores), "members": [np.flatnonzero(mask) for mask in masks],
            "classes": np.array(classes, int), "labels": np.array(labels)}


def test_panoptic_gives_each_point_to_its_best_instance_and_leaves_the_rest_semantic():
    prediction = scored([0.9, 0.8, 0.7, 0.2], [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0],
                                               [0, 0, 0, 0, 0, 1]], [4, 5, 6, 7], [0, 0, 0, 0, 1, 1])
    labels, instance, rows = predict.panoptic(prediction, min_score=0.5)
    assert rows == [0, 1]  # the third keeps one of its three points, the fourth is not sure enough
    assert instance.tolist() == [1, 1, 1, 2, 0, 0]
    assert labels.tolist() == [4, 4, 4, 5, 1, 1]
    assert prediction["labels"].tolist() == [0, 0, 0, 0, 1, 1]
    labels, instance, rows = predict.panoptic(scored([], np.zeros((0, 3)), [], [2, 2, 0]))
    assert labels.tolist() == [2, 2, 0] and instance.tolist() == [0, 0, 0] and rows == []


def test_the_list_and_the_ply_of_the_instances_say_the_same(checkpoints, room, tmp_path, monkeypatch, capsys):
    coord = load_scene(room)["coord"]
    masks = np.zeros((3, len(coord)), bool)
    masks[0, :400], masks[1, 400:1000], masks[2, 300:420] = True, True, True

    def predict_scene(model, config, folder, device):
        return load_scene(room) | {"origin": np.zeros(3)}, {
            "labels": np.zeros(len(coord), np.int64), "members": [np.flatnonzero(mask) for mask in masks], "voxels": 7,
            "seen": None, "classes": np.array([4, 18, 4]), "scores": np.array([0.91, 0.5, 0.4]), "notes": [],
            "true_instance": np.zeros(len(coord), np.int64)}

    monkeypatch.setattr(predict, "predict_scene", predict_scene)
    run(checkpoints["baseline"], room, out=tmp_path)
    vertex = PlyData.read(tmp_path / f"{room.name}_instances.ply")["vertex"].data
    assert np.array_equal(vertex["instance"], np.where(masks[0], 1, np.where(masks[1], 2, 0)))
    assert np.array_equal(np.unique(vertex["label"][:1000]), [5, 36]) and (vertex["label"][1000:] == 1).all()
    color = np.stack([vertex[k] for k in ("red", "green", "blue")], 1)
    assert len(np.unique(color, axis=0)) == 3
    table = (tmp_path / f"{room.name}_instances.txt").read_text()
    assert table in capsys.readouterr().out
    first, second = table.splitlines()[1:]
    assert first.split()[:4] == ["1", "chair", "0.910", "400"]
    assert second.split()[:4] == ["2", "bathtub", "0.500", "600"]
    box = [float(x) for x in second.split()[4:] if x != ".."]
    expected = np.stack([coord[400:1000].min(0), coord[400:1000].max(0)], 1).ravel()
    assert box == pytest.approx(expected, abs=0.006)


def test_a_predicted_instance_has_the_colour_of_the_true_one_that_it_lies_on():
    true = np.array([0, 0, 5001, 5001, 5001, 7002, 7002])
    found = np.array([0, 2, 1, 1, 0, 2, 2])
    ours, theirs = predict.instance_colors(found, true), predict.instance_colors(true)
    assert np.array_equal(ours[2], theirs[2]) and np.array_equal(ours[5], theirs[5])
    assert (ours[[0, 4]] == predict.NO_INSTANCE).all() and not np.array_equal(theirs[2], theirs[5])


def test_a_room_s_true_masks_as_prediction_give_ap_one(room):
    scene = load_scene(room)
    frames = load_frames(room, [], RECIPES["small"]["image_size"])
    batch = collate([scene_item(scene, frames, 0.25)])
    owner, labels = batch["superpoint_instance"], batch["instance_label"]
    masks = owner == torch.arange(len(labels))[:, None]
    layer = {"class_logits": 40.0 * torch.eye(len(CLASS_NAMES) + 1)[labels], "mask_logits": 40 * (masks.float() - 0.5),
             "score": torch.ones(len(labels))}
    gt, *found = predict.instances_of_scene(layer, batch, 0)
    result = instance_ap([dict(zip(("gt", "masks", "labels", "scores"), (gt, *found)))], THINGS)
    assert len(labels) > 5 and result["AP"] == result["AP25"] == 1


# ---- any scan


@pytest.fixture
def points():
    """coord (N, 3) f32, color (N, 3) u8, normal (N, 3) of a floor and a wall, and the triangles of a grid on both."""
    u, v = (a.ravel() for a in np.meshgrid(np.linspace(0, 2, 40), np.linspace(0, 2, 40)))
    floor, wall = np.stack([u, v, 0 * u], 1), np.stack([u, 0 * u, v + 0.05], 1)
    i = (np.arange(39)[:, None] * 40 + np.arange(39)).ravel()
    faces = np.concatenate([np.stack([i, i + 1, i + 40], 1), np.stack([i + 1, i + 41, i + 40], 1)])
    coord = np.concatenate([floor, wall]).astype(np.float32)
    color = np.random.default_rng(0).integers(0, 256, coord.shape).astype(np.uint8)
    normal = np.repeat([[0, 0, 1.0], [0, 1.0, 0]], 1600, 0).astype(np.float32)
    return coord, color, normal, np.concatenate([faces, faces[:, ::-1] + 1600])


def write_with_plyfile(path, coord, color=None, normal=None, faces=None, text=False, byte_order="<"):
    """A .ply as another library writes it, with a property that nobody asked for."""
    columns = {"x": coord[:, 0], "quality": np.arange(len(coord), dtype=np.float32), "y": coord[:, 1], "z": coord[:, 2]}
    if color is not None:
        columns |= dict(zip(("red", "green", "blue"), color.T))
    if normal is not None:
        columns |= dict(zip(("nx", "ny", "nz"), normal.T))
    vertex = np.zeros(len(coord), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        vertex[name] = column
    elements = [PlyElement.describe(vertex, "vertex")]
    if faces is not None:
        rows = np.zeros(len(faces), [("vertex_indices", "i4", (3,))])
        rows["vertex_indices"] = faces
        elements.append(PlyElement.describe(rows, "face"))
    PlyData(elements, text=text, byte_order=byte_order).write(str(path))
    return path


def test_a_folder_with_points_and_frames_is_seen_by_its_frames(checkpoints, room, tmp_path, capsys):
    folder = tmp_path / "phone"
    shutil.copytree(room, folder, ignore=shutil.ignore_patterns("*.npy"))
    write_with_plyfile(folder / "mesh.ply", np.load(room / "coord.npy"), np.load(room / "color.npy"))
    run(checkpoints["bifusion"], folder, out=tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "phone: no normals: estimated; no superpoints: computed"
    assert "seen by frames" in lines[1] and (tmp_path / "out" / "phone_instances.ply").is_file()


def test_far_coordinates_keep_their_millimetres(checkpoints, points, tmp_path):
    coord, color, normal, _ = points
    far = coord.astype(np.float64) + np.array([431_000.25, 5_290_000.5, 320])
    run(checkpoints["baseline"], write_with_plyfile(tmp_path / "far.ply", far, color, normal), out=tmp_path)
    vertex = PlyData.read(tmp_path / "far_semantic.ply")["vertex"]
    np.testing.assert_allclose(np.stack([vertex[k] for k in "xyz"], 1), far, atol=1e-4)
    near, _ = predict.read_scan(write_with_plyfile(tmp_path / "near.ply", coord, color, normal))
    np.testing.assert_allclose(np.ptp(predict.read_scan(tmp_path / "far.ply")[0]["coord"], 0), np.ptp(near["coord"], 0),
                               atol=1e-5)


def test_a_large_scan_is_cut_into_tiles_that_cover_each_point_once(points, monkeypatch):
    coord = np.concatenate([points[0] + np.array([2.1 * i, 0, 0], np.float32) for i in range(4)])
    assert len(predict.tiles(coord, 0.1, limit=10**6)) == 1
    cut = predict.tiles(coord, 0.1, limit=900)
    assert len(cut) >= 4
    assert np.array_equal(np.sort(np.concatenate([core for core, _ in cut])), np.arange(len(coord)))
    for core, rows in cut:
        assert len(data.voxelise(coord[core], 0.1)[0]) <= 900 and np.isin(core, rows).all()
        low, high = coord[core, :2].min(0), coord[core, :2].max(0)
        around = ((coord[:, :2] >= low - predict.MARGIN) & (coord[:, :2] <= high + predict.MARGIN)).all(1)
        assert np.array_equal(rows, np.flatnonzero(around))


def test_a_scan_in_tiles_gets_the_labels_of_the_whole(checkpoints, room, monkeypatch):
    model, config = predict.open_checkpoint(checkpoints["bifusion"])
    _, whole = predict.predict_scene(model, config, room)
    assert not any("tiles" in note for note in whole["notes"])

    def by_place(batch):  # a network whose labels depend on the place in the world alone
        out = forward(batch)
        band = (batch["world_coord"][:, 0] / 2).floor().long() % 20
        return out | {"logits": torch.nn.functional.one_hot(band, 20).float()}

    forward, model.forward = model.forward, by_place
    _, whole = predict.predict_scene(model, config, room)
    monkeypatch.setattr(predict, "TILE_VOXELS", whole["voxels"] // 3)
    _, parts = predict.predict_scene(model, config, room)
    assert any("tiles" in note for note in parts["notes"])
    assert (parts["labels"] == whole["labels"]).mean() > 0.85  # voxels on a border between bands differ with the grid
    assert np.array_equal(parts["true_instance"], whole["true_instance"])
    assert all(len(np.unique(m)) == len(m) for m in parts["members"])
    assert (np.diff(parts["scores"]) <= 0).all()


def test_frames_whose_pose_is_lost_are_counted_on_the_screen_and_without_any_the_scan_is_3d_only(
        checkpoints, room, tmp_path, capsys):
    scene = shutil.copytree(room, tmp_path / "scene")
    poses = sorted(scene.glob("pose/*.txt"))
    for lost in (poses[:2], poses):
        for path in lost:
            np.savetxt(path, np.full((4, 4), -np.inf))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(checkpoints["bifusion"], scene, out=tmp_path / "out")
        assert f"{len(lost)} frames skipped: their pose is not finite or not rigid" in capsys.readouterr().out
        assert [str(w.message) for w in caught if "used 3D-only" in str(w.message)] == (
            [] if len(lost) == 2 else [str(caught[-1].message)])


def test_frames_encoded_once_for_all_tiles_give_the_logits_of_their_images(make_model, make_batch, train_steps):
    model, batch = make_model(), make_batch(views=(3, 2))
    train_steps(model, setting_at(70), batch)
    model.eval()
    frames = {key: batch[key].numpy() for key in ("image", "depth", "world_to_camera", "intrinsics")}
    with torch.no_grad():
        encoded = predict.encode_frames(model.tower, frames, "cpu")
        assert encoded["image"].size == 0 and len(encoded["image"]) == 5
        logits = model(batch)["logits"]
        model.tower.visual.forward = None  # it must not run again
        again = model(batch | {key: torch.from_numpy(value) for key, value in encoded.items()})["logits"]
    assert torch.allclose(logits, again, atol=1e-5)
