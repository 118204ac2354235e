"""scenes/submit.py: predictions in the form that the benchmark takes, whole or not at all."""

import shutil
from zipfile import ZipFile

import numpy as np
import pytest

from scenes import submit
from scenes.folder import CLASS_NAMES, NYU40_IDS, SCANNET20
from train import Config

CHAIR, FLOOR, OTHER = (CLASS_NAMES.index(name) for name in ("chair", "floor", "otherfurniture"))


@pytest.fixture
def found():
    """What the model is made to predict for a scene of 30 points."""
    return {"labels": np.arange(30) % 20, "classes": np.array([CHAIR, FLOOR, OTHER]),
            "members": [np.array([3, 4]), np.array([0]), np.array([29])], "scores": np.array([0.9, 0.8, 1e-7])}


@pytest.fixture
def run(tmp_path, monkeypatch, found):
    """Function: the command on a test split of two scenes."""
    data = tmp_path / "data"
    for name in ("scene0707_00", "scene0708_00"):
        (data / "test" / name).mkdir(parents=True)
        np.save(data / "test" / name / "coord.npy", np.zeros((30, 3), np.float32))
    (data / "scannetv2_test.txt").write_text("scene0708_00\nscene0707_00\n")
    monkeypatch.setattr(submit, "open_checkpoint", lambda path, device: (None, None))
    monkeypatch.setattr(submit, "predict_scene", lambda model, config, folder, device: (
        {"coord": np.load(folder / "coord.npy"), "classes": SCANNET20}, found))
    return lambda: submit.main(["best.pt", "--data", str(data), "--out", str(tmp_path / "sub")])


def test_labels_and_instances_of_each_scene_of_the_list_are_packed(tmp_path, run, found, capsys):
    run()
    assert capsys.readouterr().out == f"written: {tmp_path}/sub/semantic.zip {tmp_path}/sub/instance.zip\n"
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["instance.zip", "semantic.zip"]
    semantic, instance = (ZipFile(tmp_path / "sub" / f"{kind}.zip") for kind in ("semantic", "instance"))
    assert semantic.namelist() == ["scene0708_00.txt", "scene0707_00.txt"]
    assert semantic.read("scene0707_00.txt").decode() == "".join(f"{NYU40_IDS[k]}\n" for k in found["labels"])
    masks = [f"predicted_masks/scene0707_00_00{i}.txt" for i in (0, 1)]  # the floor is no instance
    assert instance.read("scene0707_00.txt").decode() == f"{masks[0]} 5 0.900000\n{masks[1]} 39 0.000000\n"
    for mask, members in zip(masks, ([3, 4], [29])):
        assert instance.read(mask).decode() == "".join("1\n" if i in members else "0\n" for i in range(30))
    assert len(instance.namelist()) == 6


def test_what_cannot_be_packed_is_named_and_the_files_that_were_there_stay(tmp_path, run, found):
    run()
    before = {path: path.read_bytes() for path in (tmp_path / "sub").glob("*.zip")}
    shutil.rmtree(tmp_path / "data" / "test" / "scene0707_00")
    with pytest.raises(SystemExit, match=r"1 of 2 scenes of the split are not in .* first scene0707_00; "
                                         r"python -m scenes\.scannet SCANS --out"):
        run()
    assert {path: path.read_bytes() for path in (tmp_path / "sub").glob("*.zip")} == before and len(before) == 2


def test_a_model_without_instances_gives_semantic_files_alone_and_says_so(tmp_path, run, found, capsys):
    found |= {"classes": np.array([], int), "members": [], "scores": np.array([])}
    run()
    assert "the model finds no instances: semantic files only" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["semantic.zip"]


def test_what_predict_finds_in_the_scenes_of_a_folder_is_packed(tiny_rooms, make_model, tmp_path, monkeypatch):
    config = Config(model="baseline", device="cpu", voxel_size=0.5)
    monkeypatch.setattr(submit, "open_checkpoint", lambda path, device: (make_model("baseline").eval(), config))
    room = next((tiny_rooms / "val").iterdir())
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / "data" / "val" / "scene0001_00").symlink_to(room)
    packed = submit.submit("best.pt", tmp_path / "data", "val", tmp_path / "sub")
    lines = ZipFile(packed[0]).read("scene0001_00.txt").split()
    assert len(lines) == len(np.load(room / "coord.npy")) and set(map(int, lines)) <= set(NYU40_IDS)
