"""predict.py and scenes/picture.py: labels, .ply and picture of scans of any form; errors in one line."""

import contextlib
import io
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData
from test_folder import write_ply as write_mesh

import predict
import train
from data import collate, scene_item
from experiments.ship import ship
from metrics import instance_ap
from scenes import picture, points
from scenes.folder import CLASS_COLORS, CLASS_NAMES, NYU40_IDS, SCANNET20, load_frames, load_scene
from scenes.frames import best_views
from scenes.points import voxelise

@pytest.fixture(scope="module")
def predicted(checkpoints, room, tmp_path_factory):
    """The room and the same in other forms, predicted: {model: (folder of the files, lines of the screen)}."""
    scans, results = tmp_path_factory.mktemp("scans"), {}
    coord, color = (np.load(room / f"{name}.npy") for name in ("coord", "color"))
    (scans / "ignored").mkdir()
    for name, array in (("coord", coord), ("color", color), ("segment20", np.full(len(coord), -1))):
        np.save(scans / "ignored" / f"{name}.npy", array)
    shutil.copytree(room, scans / "phone", ignore=shutil.ignore_patterns("*.npy"))
    write_mesh(scans / "phone" / "mesh.ply", coord, color)
    write_mesh(scans / "far.ply", coord + np.float64(431_000.25), color)
    for name, given in (("baseline", []), ("bifusion", sorted(scans.iterdir()))):
        out, screen = tmp_path_factory.mktemp("predicted"), io.StringIO()
        with contextlib.redirect_stdout(screen):
            run(checkpoints[name], room, *given, out=out)
        results[name] = out, screen.getvalue().splitlines()
    return results


def run(checkpoint, *scenes, out):
    predict.main([str(checkpoint), *map(str, scenes), "--out", str(out), "--device", "cpu"])


def failure(checkpoint, *scenes, out):
    """The message with which predict.py exits."""
    with pytest.raises(SystemExit, match=r"^error: .*\Z") as stopped:  # one line; sys.exit prints a text and exits 1
        run(checkpoint, *scenes, out=out)
    return stopped.value.code


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_the_ply_holds_every_point_in_the_colour_of_its_voxel_s_class(checkpoints, predicted, room, name):
    (out, lines), scene = predicted[name], load_scene(room)
    vertex = PlyData.read(out / f"{room.name}_semantic.ply")["vertex"].data
    assert vertex.dtype.descr == [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "|u1"), ("green", "|u1"),
                                  ("blue", "|u1"), ("label", "<u2")]
    assert np.array_equal(np.stack([vertex[key] for key in "xyz"], 1), scene["coord"])
    model, config = predict.open_checkpoint(checkpoints[name])
    ids = np.array(scene["frame_ids"])
    frames = load_frames(room, ids[np.linspace(0, len(ids) - 1, 2 * config.views).round().astype(int)], (160, 120))
    batch = collate([scene_item(scene, frames, config.voxel_size)])
    with torch.no_grad():
        labels = model(batch)["logits"].argmax(1)[batch["point_to_voxel"]].numpy()
    assert not model.training and len(np.unique(labels)) > 1
    assert np.array_equal(vertex["label"], np.array(NYU40_IDS)[labels])
    assert np.array_equal(np.stack([vertex[key] for key in ("red", "green", "blue")], 1), CLASS_COLORS[labels])
    assert all(part in lines[0] for part in (
        room.name, "mIoU 0.", f"{len(labels)} points", f"{len(batch['grid_coord'])} voxels",
        f"{len(np.unique(labels))} classes", "3D only" if name == "baseline" else "seen by frames")), lines[0]


def test_scans_without_labels_frames_or_normals_are_predicted_and_what_they_lack_is_said(predicted, room):
    out, lines = predicted["bifusion"]
    said = {line.partition(": ")[0].partition(",")[0]: line for line in lines if " points, " in line}
    notes = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines if "no normals" in line}
    computed = "no normals: estimated; no superpoints: computed"
    assert notes == {"phone": computed} | dict.fromkeys(("ignored", "far"), f"no frames: 3D only; {computed}")
    assert [name for name, line in said.items() if "mIoU" in line] == [room.name]
    assert [name for name, line in said.items() if "% seen by frames" in line] == [room.name, "phone"]
    assert all("3D only (no frame sees it)" in said[name] for name in ("ignored", "far"))
    height, coord = {}, np.load(room / "coord.npy")
    for name in said:
        vertex = PlyData.read(out / f"{name}_instances.ply")["vertex"]
        assert {"label", "instance"} < set(vertex.data.dtype.names) and vertex.count == len(coord)
        grey = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        height[name] = len(grey)
        assert np.ptp(grey) > 100  # something is drawn
    assert {height[room.name] / height[name] for name in ("ignored", "phone", "far")} == {2}  # no ground truth
    vertex = PlyData.read(out / "far_semantic.ply")["vertex"]
    np.testing.assert_allclose(np.stack([vertex[key] for key in "xyz"], 1), coord + np.float64(431_000.25), atol=1e-4)


def test_the_picture_leaves_out_what_faces_away_and_shows_the_nearest():
    x, y = (a.ravel() for a in np.meshgrid(*2 * [np.linspace(0, 2, 60)]))
    coord = np.concatenate([np.stack([x, y, np.full_like(x, z)], 1) for z in (0, 0.5, 1)])
    normal = np.repeat([[0, 0, 1.0], [0, 0, 1.0], [0, 0, -1.0]], len(x), 0)  # the highest faces down: a ceiling
    color = np.repeat(np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8), len(x), 0)
    order = np.random.default_rng(0).permutation(len(coord))
    image = picture.render(coord[order], normal[order], color[order], size=(90, 80), elevation=90)
    red, green, blue = (((image.argmax(2) == k) & (image.min(2) == 0)).sum() for k in range(3))
    assert image.shape == (80, 90, 3) and blue == red == 0 and green > 3000
    few = picture.render(coord[:2], normal[:2], color[:2], size=(9, 8))  # squares that reach over the border
    assert few.shape == (8, 9, 3) and (few.max(2) < 255).any()


def test_a_checkpoint_or_device_that_cannot_be_used_says_why_in_one_line(checkpoints, room, tmp_path):
    state = torch.load(checkpoints["bifusion"], weights_only=True)
    config, weights, key = state["config"], state["model"], "semantic_head.bias"
    for name, content, reason in [
            ("cut", checkpoints["bifusion"].read_bytes()[:5000], "readable"), ("code", {"model": print}, "readable"),
            ("keys", state | {"model": {k: v for k, v in weights.items() if k != key}}, key),
            ("old", state | {"model": {k: v for k, v in weights.items() if k != "gain"}}, "gain"),
            ("classes", state | {"model": weights | {key: torch.zeros(7)}}, f"{key}: copying a param with shape"),
            ("config", state | {"config": config | {"colour": 1}}, "colour"), ("row", state | {"row": {}}, "version"),
            ("preset", state | {"config": config | {"preset": "huge"}}, "choose from ['base', 'small']")]:
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before, message = path.read_bytes(), failure(path, room, out=tmp_path / "out")
        assert path.name in message and reason in message and path.read_bytes() == before
    assert "none.pt not found; a checkpoint is made by" in failure(tmp_path / "none.pt", room, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"'tpu9' cannot be used .*; try --device cpu"):
        predict.open_checkpoint(checkpoints["baseline"], "tpu9")
    assert not (tmp_path / "out").exists()


def test_a_bad_scene_ends_in_one_line(checkpoints, room, tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        assert f"{folder}: expected a scene folder" in failure(checkpoints["baseline"], folder, out=tmp_path)


def scored(scores, masks, classes, labels):
    return {"scores": np.array(scores), "members": [np.flatnonzero(mask) for mask in masks],
            "classes": np.array(classes, int), "labels": np.array(labels)}


def test_panoptic_gives_each_point_to_its_best_instance_and_leaves_the_rest_semantic():
    prediction = scored([0.9, 0.8, 0.7, 0.2], [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0],
                                               [0, 0, 0, 0, 0, 1]], [4, 5, 6, 7], [0, 0, 0, 0, 1, 1])
    labels, instance, rows = predict.panoptic(prediction, min_score=0.5)
    assert rows == [0, 1]  # the third keeps one of its three points, the fourth is not sure enough
    assert instance.tolist() == [1, 1, 1, 2, 0, 0] and labels.tolist() == [4, 4, 4, 5, 1, 1]
    assert prediction["labels"].tolist() == [0, 0, 0, 0, 1, 1]
    labels, instance, rows = predict.panoptic(scored([], np.zeros((0, 3)), [], [2, 2, 0]))
    assert labels.tolist() == [2, 2, 0] and instance.tolist() == [0, 0, 0] and rows == []


def test_the_list_and_the_ply_of_the_instances_say_the_same(room, tmp_path, capsys):
    scene = load_scene(room)
    coord, i = scene["coord"], np.arange(len(scene["coord"]))
    masks = [i < 400, (i >= 400) & (i < 1000), (i >= 300) & (i < 420)]
    prediction = scored([0.91, 0.5, 0.4], masks, [4, 18, 4], np.zeros(len(coord), int))
    predict.write(tmp_path, "baseline", scene, prediction | {"voxels": 7, "seen": None, "notes": []}, 0.3)
    vertex = PlyData.read(tmp_path / f"{room.name}_instances.ply")["vertex"]
    label, instance, *color = (vertex[key] for key in ("label", "instance", "red", "green", "blue"))
    assert np.array_equal(instance, np.where(masks[0], 1, np.where(masks[1], 2, 0)))
    assert np.array_equal(np.unique(label[:1000]), [5, 36]) and (label[1000:] == 1).all()
    assert np.unique(color, axis=1).shape == (3, 3)
    table = (tmp_path / f"{room.name}_instances.txt").read_text()
    assert table in capsys.readouterr().out
    first, second = (line.split() for line in table.splitlines()[1:])
    assert first[:4] == ["1", "chair", "0.910", "400"] and second[:4] == ["2", "bathtub", "0.500", "600"]
    box = [float(x) for x in second[4:] if x != ".."]
    assert box == pytest.approx(np.stack([coord[400:1000].min(0), coord[400:1000].max(0)], 1).ravel(), abs=0.006)


def test_a_predicted_instance_has_the_colour_of_the_true_one_that_it_lies_on():
    true = np.array([0, 0, 5001, 5001, 5001, 7002, 7002])
    found = np.array([0, 2, 1, 1, 0, 2, 2])
    ours, theirs = picture.instance_colors(found, true), picture.instance_colors(true)
    assert np.array_equal(ours[2], theirs[2]) and np.array_equal(ours[5], theirs[5])
    assert (ours[[0, 4]] == picture.NO_INSTANCE).all() and not np.array_equal(theirs[2], theirs[5])


def test_a_room_s_true_masks_as_prediction_give_ap_one(room):
    batch = collate([scene_item(load_scene(room), load_frames(room, [], (64, 48)), 0.25)])
    labels = batch["instance_label"]
    masks = batch["superpoint_instance"] == torch.arange(len(labels))[:, None]
    layer = {"class_logits": 40.0 * torch.eye(len(CLASS_NAMES) + 1)[labels], "mask_logits": 40 * (masks.float() - 0.5),
             "score": torch.ones(len(labels))}
    gt, masks, labels, scores = train.instances_of_scene(layer, batch, 0)
    result = instance_ap([{"gt": gt, "masks": masks, "labels": labels + 1, "scores": scores}],
                         [k + 1 for k in SCANNET20.things])
    assert len(labels) > 5 and result["AP"] == result["AP25"] == 1


def test_a_large_scan_is_cut_into_tiles_that_cover_each_point_once():
    coord = np.random.default_rng(0).uniform(0, (9, 2, 1), (6000, 3)).astype(np.float32)
    ((core, rows),) = points.tiles(coord, 0.1, limit=10**6)
    assert np.array_equal(core, np.arange(6000)) and np.array_equal(rows, core)
    cut = points.tiles(coord, 0.1, limit=900)
    assert len(cut) >= 4 and np.array_equal(np.sort(np.concatenate([core for core, _ in cut])), np.arange(len(coord)))
    for core, rows in cut:
        assert len(voxelise(coord[core], 0.1)[0]) <= 900 and np.isin(core, rows).all()
        off = np.maximum(coord[core].min(0) - coord, coord - coord[core].max(0))[:, :2].max(1)  # metres to the tile
        assert np.array_equal(rows, np.flatnonzero(off <= points.MARGIN))
    with pytest.raises(ValueError, match="6000 points lie above one another, too many for a tile"):
        points.tiles(coord * [0, 0, 1], 1e-4, limit=900)


def test_a_scan_in_tiles_gets_the_labels_of_the_whole(checkpoints, room, monkeypatch):
    model, config = predict.open_checkpoint(checkpoints["bifusion"])

    def by_place(batch):  # a network whose labels depend on the place in the world alone
        return forward(batch) | {"logits": torch.eye(20)[(batch["world_coord"][:, 0] / 2).floor().long() % 20]}

    def all_of_it(layer, batch, i):  # a decoder that finds one instance, the whole tile
        n = len(batch["point_to_voxel"])
        return torch.zeros(n), torch.ones(1, n, dtype=torch.bool), torch.tensor([n % 20]), torch.rand(1)

    forward, model.forward = model.forward, by_place
    monkeypatch.setattr(train, "instances_of_scene", all_of_it)
    _, whole = predict.predict_scene(model, config, room)
    monkeypatch.setattr(predict, "TILE_VOXELS", whole["voxels"] // 3)
    _, parts = predict.predict_scene(model, config, room)
    assert whole["notes"] == [] and parts["notes"] == [f"cut into {len(parts['members'])} tiles"]
    assert (parts["labels"] == whole["labels"]).mean() > 0.85  # voxels on a border between bands differ with the grid
    assert np.array_equal(np.sort(np.concatenate(parts["members"])), *whole["members"])
    assert (np.diff(parts["scores"]) < 0).all() and parts["classes"].shape == parts["scores"].shape


def test_frames_whose_pose_is_lost_are_counted_and_without_any_the_scan_is_3d_only(checkpoints, room, tmp_path):
    scene, model = shutil.copytree(room, tmp_path / "scene"), predict.open_checkpoint(checkpoints["bifusion"])
    poses = sorted(scene.glob("pose/*.txt"))
    for lost, seen in ((poses[:2], True), (poses, False)):
        for path in lost:
            np.savetxt(path, np.full((4, 4), -np.inf))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, prediction = predict.predict_scene(*model, scene)
        ids = ", ".join(path.stem for path in lost)
        assert f"{len(lost)} of {len(poses)} frames have a pose that is not finite: {ids}" in prediction["notes"]
        assert (prediction["seen"] > 0) == seen
        assert sum(": 3D-only, none of" in str(warning.message) for warning in caught) == (not seen)


def test_the_views_of_a_tile_are_those_that_see_most_of_what_few_see():
    seen = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    assert [best_views(seen, count) for count in (0, 1, 2, 3, 9)] == [[], [0], [0, 2], [0, 1, 2], [0, 1, 2]]


def test_a_floor_of_rooms_has_frames_for_every_room_and_is_cut_as_large_as_the_train_scenes(
        checkpoints, room, tmp_path):
    model, config = predict.open_checkpoint(checkpoints["bifusion"])
    floor, (coord, frames) = tmp_path / "floor", (np.load(room / "coord.npy"), sorted((room / "pose").glob("*.txt")))
    copies, apart = 4, np.ptp(coord[:, 0]) + 0.5
    for name in ("color", "depth", "pose", "intrinsic"):
        (floor / name).mkdir(parents=True)
    shutil.copy(room / "intrinsic" / "intrinsic_color.txt", floor / "intrinsic")
    np.save(floor / "color.npy", np.tile(np.load(room / "color.npy"), (copies, 1)))
    np.save(floor / "coord.npy", np.concatenate([coord + np.array([i * apart, 0, 0]) for i in range(copies)]))
    for i in range(copies):
        for pose in frames:
            matrix, new = np.loadtxt(pose), 100 * i + int(pose.stem)
            matrix[0, 3] += i * apart
            np.savetxt(floor / "pose" / f"{new}.txt", matrix)
            for file in (room / "color" / f"{pose.stem}.jpg", room / "depth" / f"{pose.stem}.png"):
                shutil.copy(file, floor / file.parent.name / f"{new}{file.suffix}")
    _, single = predict.predict_scene(model, config, room)
    _, whole = predict.predict_scene(model, config, floor)  # 2 * 2 frames for four rooms
    config.side = float(np.ptp(coord[:, :2], axis=0).max())
    _, parts = predict.predict_scene(model, config, floor)
    assert parts["notes"][-1] == "cut into 4 tiles" and whole["notes"][-1:] != parts["notes"][-1:]
    assert whole["seen"] < 0.5 * single["seen"] < 0.5 * parts["seen"] * 1.1


def test_without_a_checkpoint_the_weights_that_come_along_are_taken_and_said(
        checkpoints, predicted, room, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "small.pt"
    assert predict.WEIGHTS.stat().st_size <= 4e6  # those of the repository, which today's code reads
    assert predict.open_checkpoint(predict.WEIGHTS)[1].preset == "small"
    ship(checkpoints["bifusion"], shipped)
    assert shipped.stat().st_size < 0.5 * sum(
        value.nbytes for value in torch.load(checkpoints["bifusion"], weights_only=True)["model"].values())
    monkeypatch.setattr(predict, "WEIGHTS", shipped)
    predict.main([str(room), "--out", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[0] == predict.ABOUT
    own, whole = (PlyData.read(folder / f"{room.name}_semantic.ply")["vertex"]["label"]
                  for folder in (tmp_path, predicted["bifusion"][0]))
    assert np.mean(own == whole) > 0.99  # half precision
    with pytest.raises(SystemExit):
        predict.main([str(shipped)])
    assert f"expected scans after the checkpoint {shipped}" in capsys.readouterr().err
