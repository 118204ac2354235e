"""Own classes: classes.json is read or refused, travels in the checkpoint, and trains, judges and predicts."""

import json
import shutil

import numpy as np
import pytest
from plyfile import PlyData

import predict
import train
from scenes import submit
from scenes.folder import IGNORE, NYU40_IDS, SCANNET20, load_scene, read_classes, read_scan
from scenes.points import instance_targets

OWN = {"names": ["thing", "floor", "other"], "stuff": ["floor"], "ids": [7, 900, 3],
       "colors": [[1, 2, 3], [9, 9, 9], [200, 0, 0]]}


@pytest.fixture
def own_rooms(tiny_rooms, tmp_path):
    """Generated rooms in three classes of one's own."""
    root = tmp_path / "own"
    shutil.copytree(tiny_rooms, root)
    for file in root.glob("*/*/segment20.npy"):
        labels = np.load(file)
        np.save(file.with_name("segment.npy"), np.where(labels == 1, 1, np.where(labels % 2 == 0, 0, 2)))
        file.unlink()
    (root / "classes.json").write_text(json.dumps(OWN))
    return root


def flags(root, out, *more):
    return ["--data", str(root), "--out", str(out), "--compress", "43", "--workers", "0",
            "--cache", str(root / "cache"), *more]


def test_own_classes_train_judge_predict_and_travel_in_the_checkpoint(own_rooms, tmp_path, monkeypatch, capsys):
    for key, value in {"image_size": (64, 48), "voxel_size": 0.25, "views": 2, "batch_size": 2}.items():
        monkeypatch.setitem(train.RECIPES["small"], key, value)
    out = tmp_path / "run"
    train.main(flags(own_rooms, out))
    log = train.runs.read_log(out / "log.jsonl")
    assert len(log[-1]["val_iou"]) == 3 and log[-1]["val_ap"] is not None
    assert json.loads((out / "config.json").read_text())["classes"]["names"] == OWN["names"]
    room = sorted((own_rooms / "val").iterdir())[0]
    predict.main([str(out / "last.pt"), str(room), "--out", str(tmp_path / "found")])
    vertex = PlyData.read(str(tmp_path / "found" / f"{room.name}_semantic.ply"))["vertex"]
    assert set(np.unique(vertex["label"])) <= set(OWN["ids"])
    for number, color in zip(OWN["ids"], OWN["colors"]):
        rows = vertex["label"] == number
        assert (np.stack([vertex[key][rows] for key in ("red", "green", "blue")], 1) == color).all()
    assert "mIoU" in capsys.readouterr().out  # its ground truth is of these classes
    (path, *_), = [submit.submit(out / "last.pt", own_rooms, "val", tmp_path / "sent")[:1]]
    with submit.ZipFile(path) as packed:
        assert {int(line) for line in packed.read(packed.namelist()[0]).split()} <= set(OWN["ids"])

    (own_rooms / "classes.json").write_text(json.dumps(OWN | {"names": ["thing", "ground", "other"], "stuff": []}))
    with pytest.raises(SystemExit, match=r"expected the run's 3 classes, thing, floor, other .* found 3, thing"):
        train.main(flags(own_rooms, out, "--resume"))


def test_without_classes_json_the_classes_are_scannets_and_files_are_found_by_their_number(own_rooms, tmp_path):
    classes = read_classes(own_rooms)
    assert (classes.names, classes.stuff, classes.things) == (OWN["names"], [1], [0, 2])
    assert read_classes(tmp_path) is SCANNET20 and SCANNET20.things == list(range(2, 20))
    room = sorted((own_rooms / "train").iterdir())[0]
    labels = np.load(room / "segment.npy")
    assert np.array_equal(load_scene(room, classes)["segment"], labels)
    (own_rooms / "classes.json").write_text(json.dumps(OWN), "utf-8-sig")  # as Windows writes it
    assert read_classes(own_rooms) == classes
    np.save(room / "segment3.npy", labels * 0)
    assert not load_scene(room, classes)["segment"].any()  # the number of classes in its name comes first


@pytest.mark.parametrize("content, said", [
    ("[1]", "object"), ('{"names": ["a"]}', "two names"), ('{"names": ["a", "a"]}', "two names"), ("{}", "names"),
    ('{"names": ["a", "b"], "stuff": ["c"]}', "'c' is not in list"), ('{"names": ["a", "b"], "ids": [1]}', "ids"),
    ('{"names": ["a", "b"], "ids": [1, 70000]}', "ids"), ('{"names": ["a", "b"], "colors": [[1, 2, 3]]}', "colors"),
    ('{"names": ["a", "b"], "colors": [[1, 2, 3], [1, 2, 300]]}', "colors"),
    ('{"names": ["a", "b"], "hue": 1}', "hue"), ('{"names": "abc"}', "a list of two names"),
    ('{"names": {"0": "a", "1": "b"}}', "a list of two names"), ('{"names": ["a", null]}', "expected str instance"),
    ('{"names": ["a", ""]}', "a list of two names"), ('{"names": [1, 2]}', "expected str instance"),
    ('{"names": ["a", "b"], "ids": [1.0, 2]}', "range indices must be integers"),
    ('{"names": ["a", "b"], "ids": [-1, 2]}', "one id, 0..65535, a name")])
def test_a_classes_json_of_another_form_is_refused_by_what_is_wrong(tmp_path, content, said):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"classes\.json: expected an object as .*{said}"):
        read_classes(tmp_path)


@pytest.mark.parametrize("labels, said", [
    (NYU40_IDS, r"24, 28, 33, 34, 36, 39: NYU40 ids\?"), ((0, 199), r"199: indices of ScanNet200\?"),
    ((2, 27, 1191), r"27, 1191: ids of scannetv2-labels"), ((0, 255), r"255: points without a class\? .* -1"),
    ((-5, 3), "-5: another data set's"), (range(9, 5000), r"20, 21, .*, 27 \.\.\.: another")])
def test_foreign_labels_are_named_in_training_and_left_out_in_a_prediction(tiny_rooms, tmp_path, labels, said):
    room = tmp_path / "room"
    shutil.copytree(sorted((tiny_rooms / "val").iterdir())[0], room)
    count = len(np.load(room / "coord.npy"))
    np.save(room / "segment20.npy", np.resize(labels, count))
    with pytest.raises(ValueError, match=rf"segment20\.npy: expected labels -1\.\.19, found .*{said}"):
        load_scene(room)
    scene, notes = read_scan(room)
    assert scene["segment"] is None and any("labels left out" in note for note in notes)
    (room / "color.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"color\.npy"):
        load_scene(room)
    scene, notes = read_scan(room)
    assert (scene["color"] == 127).all() and "no colours: taken as grey" in notes


def test_instance_ids_that_are_unique_within_a_class_alone_are_told_apart():
    segment, instance = np.repeat([4, 5, 4, 1, IGNORE, 6], [300, 200, 150, 300, 10, 20]), np.repeat(
        [0, 0, 1, 0, 0, 0], [300, 200, 150, 300, 10, 20])
    points, _, labels = instance_targets(segment, instance, np.arange(len(segment)) // 10, SCANNET20.things)
    assert sorted(labels.tolist()) == [4, 4, 5]
    sizes = np.unique(points[points > 0], return_counts=True)[1].tolist()
    assert sorted(sizes) == [150, 200, 300] and points[segment == 1].sum() == 0
    segment[300:405] = 4  # 95 points of another class are noise: the instance stays one
    segment[650:] = 4
    _, _, labels = instance_targets(segment, instance, np.arange(len(segment)) // 10, SCANNET20.things)
    assert labels.tolist() == [4, 4]
