"""predict.py: labels, .ply and picture of scenes with and without labels and frames; errors in one line."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

import predict
from data import CLASS_COLORS, CLASS_NAMES, NYU40_IDS, collate, load_frames, load_scene, scene_item
from model import build_model
from stages import parameter_groups, stage_epochs
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
    assert len(lines) == 1
    for part in (room.name, "mIoU 0.", f"{len(labels)} points", f"{len(batch['grid_coord'])} voxels",
                 f"{len(np.unique(labels))} classes", "3D only" if name == "baseline" else "seen by frames"):
        assert part in lines[0]


def test_the_picture_shows_ground_truth_only_where_there_is_one(checkpoints, room, tmp_path, capsys):
    bare = copy_scene(room, tmp_path / "bare", "coord", "color", "normal")
    ignored = copy_scene(room, tmp_path / "ignored", "coord", "color", "normal", "segment20")
    np.save(ignored / "segment20.npy", np.full(len(np.load(room / "coord.npy")), -1))
    run(checkpoints["bifusion"], room, bare, ignored, out=tmp_path / "out")
    width = {}
    for name in (room.name, "bare", "ignored"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            width[name] = picture.width
            assert np.ptp(np.asarray(picture.convert("L"))) > 100  # something is drawn
    assert width["bare"] == width["ignored"] == width[room.name] * 2 / 3
    lines = capsys.readouterr().out.splitlines()
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
        assert str(folder) in message and "coord.npy" in message
    other = tmp_path / room.name
    assert "two scenes" in failure(checkpoints["baseline"], room, other, out=tmp_path)
    with pytest.raises(ValueError, match="--device cpu"):
        predict.open_checkpoint(checkpoints["baseline"], "tpu9")
