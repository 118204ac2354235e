"""What people's runs and machines are like: moved, changed, without labels, short of memory, almost right."""

import contextlib
import gc
import io
import json
import re
import shutil
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from kill import differences
from test_folder import write_ply
from torch import nn

import data
import model as model_module
import predict
import train
from data import Scenes, SceneDataset
from runs import Run, read_checkpoint
from scenes.folder import message, read_scan
from scenes.picture import draw
from tower import LITE0

HERE = Path(train.__file__).parent
SHORT = ("--compress", 43, "--model", "baseline")  # 4 epochs of 2 steps


@pytest.fixture(scope="module")
def whole(run_train, tmp_path_factory):
    """A run that was left alone: its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_train(out, *SHORT)
    return out


@pytest.fixture(scope="module")
def stage_1(run_train, tiny_rooms, tmp_path_factory):
    """Function: a copy of a run up to stage 1 and of its data, in a new folder; the data it knows are gone."""
    home = tmp_path_factory.mktemp("first")
    shutil.copytree(tiny_rooms, home / "data")
    run_train(home / "run", *SHORT, "--stage", 1, "--data", home / "data")
    kept = home.rename(home.parent / f"{home.name}_kept")
    return lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True)


def message_of(call, *args):
    """What a call says when it stops the program."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    return str(stop.value)


def test_a_run_and_its_data_that_moved_go_on_where_data_says_they_are_now_to_the_same_bits(
        run_train, whole, stage_1, tmp_path, capsys):
    home = stage_1(tmp_path)
    before = (home / "run" / "last.pt").read_bytes()
    said = message_of(run_train, home / "run", "--resume")
    assert said.startswith("error: no scene in ") and "or give --data a folder" in said and "\n" not in said
    assert (home / "run" / "last.pt").read_bytes() == before
    capsys.readouterr()
    run_train(home / "run", "--resume", "--data", home / "data")
    old = json.loads((stage_1(tmp_path / "2") / "run" / "config.json").read_text())["data"]
    assert f"--data is {home / 'data'} from here on, {old} before\n" in capsys.readouterr().out
    assert differences(whole, home / "run") == []
    assert json.loads((home / "run" / "config.json").read_text())["data"] == str(home / "data")
    assert read_checkpoint(home / "run" / "last.pt")["scenes"] == {
        str(path.parent.relative_to(home / "data")): path.stat().st_size for path in home.glob("data/*/*/coord.npy")}


@pytest.mark.parametrize("flags", [("--resume",), ("--stage", 2)], ids=str)
def test_other_scenes_than_before_are_refused_in_one_line_and_nothing_is_lost(run_train, stage_1, tmp_path, flags):
    home = stage_1(tmp_path)
    first, second, *_ = sorted((home / "data" / "train").iterdir())
    shutil.rmtree(first)
    np.save(second / "coord.npy", np.load(second / "coord.npy")[:-1])
    shutil.copytree(home / "data" / "val" / "room_0000", home / "data" / "val" / "room_0009")
    before = {path.name: path.read_bytes() for path in (home / "run").iterdir()}
    said = message_of(run_train, home / "run", *flags, "--data", home / "data")
    assert said.startswith(f"{home / 'data'} holds 6 scenes, the run had 6; 3 are gone, new or of another size, as "
                           "train/room_0000, train/room_0001, val/room_0009; epochs on other scenes cannot be compared")
    assert "\n" not in said and "by --data, or start a new run" in said
    assert {path.name: path.read_bytes() for path in (home / "run").iterdir()} == before


def test_a_run_that_lacked_memory_goes_on_with_smaller_batches_and_says_so(run_train, stage_1, tmp_path, capsys):
    home = stage_1(tmp_path)
    log = run_train(home / "run", "--resume", "--data", home / "data", "--batch-size", 1)
    assert "--batch-size is 1 from here on, 2 before" in capsys.readouterr().out
    assert [line["steps"] for line in log] == [2, 4, 4, 4]
    state = read_checkpoint(home / "run" / "last.pt")
    state["next"], state["sums"] = [3, 3], state["sums"] | {"seconds": [1.0, 1]}  # stopped within an epoch of 4 steps
    torch.save(state, home / "run" / "last.pt")
    (home / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log[:3]))
    taken, forward = [], train.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "forward", lambda *args: taken.append(args[1]["names"]) or forward(*args))
        run_train(home / "run", "--resume", "--batch-size", 2)
    assert [len(names) for names in taken] == [2]  # three of the four scenes were done: step 1 of 2 remains


def test_without_val_labels_best_is_the_last_and_the_next_command_names_files_that_exist(
        run_train, tiny_rooms, tmp_path, capsys):
    root = shutil.copytree(tiny_rooms, tmp_path / "data")
    for path in root.glob("val/*/segment20.npy"):
        path.unlink()
    (root / "val" / ".hidden").mkdir()
    np.save(root / "val" / ".hidden" / "coord.npy", np.zeros((1, 3)))
    log = run_train(tmp_path / "run", *SHORT, "--data", root)
    assert [line["val_miou"] for line in log] == [None] * 4
    best, last = (read_checkpoint(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert best["next"] == last["next"] == [3, 2]
    command, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: python predict.py ")]
    checkpoint, scene = map(Path, command.split()[3:])
    assert checkpoint == tmp_path / "run" / "best.pt" and scene == root / "val" / "room_0000" and scene.is_dir()


@pytest.mark.parametrize(("mious", "kept"), [([None, 0.2, 0.1, None], 1), ([None, None], 1), ([0.0, 0.0], 0)], ids=str)
def test_an_epoch_without_val_miou_is_the_best_only_as_long_as_none_has_one(tmp_path, mious, kept):
    run = Run(tmp_path)
    for epoch, miou in enumerate(mious):
        (tmp_path / "last.pt").write_text(str(epoch))
        run.finish({"epoch": epoch, "stage": 1, "val_miou": miou}, False, None)
    assert (tmp_path / "best.pt").read_text() == str(kept)


@pytest.fixture(scope="module")
def room(tiny_rooms):
    return tiny_rooms / "val" / "room_0000"


@pytest.fixture(scope="module")
def scans(room, tmp_path_factory):
    """A folder of scans: good.ply, a/scan.ply, a/scan.npy, b/scan.ply, mac/ (with a hidden file), cut.ply, p_$5_$6.ply.
    """
    folder = tmp_path_factory.mktemp("scans")
    coord, color = (np.load(room / f"{name}.npy")[::4] for name in ("coord", "color"))
    for name in ("good.ply", "a/scan.ply", "b/scan.ply", "mac/scan.ply", "p_$5_$6.ply"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_ply(folder / name, coord, color)
    np.save(folder / "a" / "scan.npy", coord)
    (folder / "mac" / "._scan.ply").write_bytes(bytes(200))
    (folder / "cut.ply").write_bytes((folder / "good.ply").read_bytes()[:3000])
    return folder


def predict_all(checkpoint, *scans, out):
    """predict.py on scans: what it printed, and with which text it exited (None: it did not)."""
    screen, left = io.StringIO(), None
    with contextlib.redirect_stdout(screen):
        try:
            predict.main([str(checkpoint), *map(str, scans), "--out", str(out), "--device", "cpu"])
        except SystemExit as stop:
            left = stop.code
    return screen.getvalue(), left


def made(out):
    return sorted(path.name.removesuffix("_semantic.ply") for path in out.glob("*_semantic.ply"))


def test_all_scans_that_can_be_are_predicted_and_the_others_named_at_the_end_with_the_reason(whole, scans, tmp_path):
    bad, absent = scans / "cut.ply", scans / "no.ply"
    _, left = predict_all(whole / "best.pt", scans / "good.ply", bad, absent, scans / "mac", out=tmp_path)
    assert made(tmp_path) == ["good", "mac"] and {"good.png", "mac.png"} < {path.name for path in tmp_path.iterdir()}
    first, second, last = left.splitlines()
    assert first.startswith(f"error: {bad}: expected a whole .ply, found ") and last == "2 of 4 scans failed"
    assert second.startswith(f"error: {absent}: expected a scene folder with coord.npy")
    assert predict_all(whole / "best.pt", scans / "good.ply", out=tmp_path)[1] is None


@pytest.mark.parametrize(("given", "names"), [
    (("a/scan.ply", "b/scan.ply", "good.ply"), ["a_scan.ply", "b_scan.ply", "good"]),
    (("a/scan.ply", "a/scan.npy"), ["scan.npy", "scan.ply"]),
    (("a/scan.ply", "a/../a/scan.ply"), ["scan"])], ids=str)
def test_scans_of_one_name_are_told_apart_by_their_whole_names_and_others_keep_theirs(
        whole, scans, tmp_path, given, names):
    assert predict_all(whole / "best.pt", *(scans / name for name in given), out=tmp_path)[1] is None
    assert made(tmp_path) == names
    assert len(list(tmp_path.iterdir())) == 4 * len(names)


def test_a_dollar_in_a_name_is_one_in_the_picture_too(room, tmp_path):
    scene, _ = read_scan(room)
    scene = {key: value[::50] if isinstance(value, np.ndarray) and key != "origin" else value
             for key, value in scene.items()} | {"segment": None}
    labels = np.zeros(len(scene["coord"]), int)
    for name, title in (("plain", "price 5 6"), ("dollars", "price $5_$6 $")):
        draw(tmp_path / f"{name}.png", scene, labels, labels, None, title)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "dollars.png").read_bytes()


@pytest.mark.parametrize(("error", "text"), [
    (MemoryError(), "error: {path}: out of memory; lower TILE_VOXELS, 300000 voxels a tile, in predict.py, or give "),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.90 GiB. GPU 0 has a total"),
     "error: {path}: out of memory (Tried to allocate 12.90 GiB); lower TILE_VOXELS, 300000 "),
    (KeyError("vertex"), "error: {path}: KeyError('vertex')"),
    (ValueError("\n$5: odd\nmath"), "error: {path}: $5: odd math"),
    (OSError(28, "No space left", "x.png"), "error: {path}: [Errno 28] No space left: 'x.png'")], ids=repr)
def test_no_failure_of_a_scan_is_without_words(whole, scans, tmp_path, monkeypatch, error, text):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(predict, "tiles", fail)
    left = predict_all(whole / "best.pt", scans / "good.ply", out=tmp_path)[1]
    assert left.startswith(text.format(path=scans / "good.ply")) and "\n" not in left


def test_what_an_error_says_is_one_line_with_what_was_asked_for_or_its_type():
    with pytest.raises(MemoryError) as numpys:
        np.zeros(2**50)
    for error, said in ((numpys.value, "out of memory (Unable to allocate 8.00 PiB)"), (EOFError(), "EOFError()"),
                        (RuntimeError("[enforce fail at alloc.cpp] . DefaultCPUAllocator: can't allocate memory: you "
                                      "tried to allocate 90000000 bytes. Error code 12"),
                         "out of memory (tried to allocate 90000000 bytes)"),
                        (RuntimeError("CUDA error: out of memory\nmore"), "out of memory"),
                        (RuntimeError("not enough memory"), "out of memory"), (KeyError("x"), "KeyError('x')"),
                        (ValueError("two\n lines"), "two lines"), (IndexError("list index out of range"),
                                                                   "list index out of range")):
        assert message(error) == said


def test_a_wrong_path_or_a_broken_scan_is_refused_before_torch_is_imported(scans, whole):
    code = f"""
import sys
sys.modules["torch"] = None  # an import of it fails
import predict
predict.main(["{whole / "best.pt"}", "{scans / "cut.ply"}", "{scans / "no.ply"}", "{scans}"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    cut, no, folder, last = done.stderr.splitlines()
    assert "cut.ply: expected a whole .ply" in cut and "no.ply: expected a scene" in no
    assert folder.endswith("found 3 such files") and last == "3 of 3 scans failed"


def test_a_checkpoint_that_cannot_be_had_ends_it_at_once(scans, tmp_path):
    left = predict_all(tmp_path / "no.pt", scans / "cut.ply", scans / "good.ply", scans / "mac", out=tmp_path)[1]
    assert left == f"error: {tmp_path / 'no.pt'} not found; a checkpoint is made by: python train.py"


def test_hidden_files_and_folders_are_no_scenes_of_a_split(tiny_rooms, tmp_path):
    root = shutil.copytree(tiny_rooms, tmp_path / "data")
    shutil.copytree(root / "train" / "room_0000", root / "train" / "._room_0000")
    (root / "train" / ".DS_Store").write_bytes(b"\0")
    for kind in ("color", "depth", "pose"):
        for path in (root / "train" / "room_0000" / kind).iterdir():
            path.with_name(f"._{path.name}").write_bytes(b"\0" * 99)
    scenes = SceneDataset(root, "train", voxel_size=0.25, views=2, image_size=(64, 48))
    assert [folder.name for folder in scenes.folders] == [f"room_000{i}" for i in range(4)]
    assert scenes[0]["depth"].shape == (2, 48, 64)


Usage = namedtuple("Usage", "total used free")


def scenes_with(tiny_rooms, workers, free, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", {"/dev/shm": Usage(free, 0, free)}.__getitem__)
    scenes = Scenes(tiny_rooms, 0.25, (64, 48), 2, workers, 0, torch.device("cpu"), "", 0)
    scenes.read(2, 0.0, None)
    return scenes


def test_the_training_loads_by_itself_where_dev_shm_has_no_room_for_the_batches_and_says_so(
        tiny_rooms, monkeypatch, capsys):
    plain = scenes_with(tiny_rooms, 0, 0, monkeypatch)
    assert capsys.readouterr().out == ""
    batches = list(plain.batches(0)) + list(plain.val_batches)
    held = max(sum(value.nbytes for value in batch.values() if torch.is_tensor(value)) for batch in batches)
    none = scenes_with(tiny_rooms, 2, 5 * held, monkeypatch)  # two batches on the way from each, and one in use
    said = capsys.readouterr().out
    assert none.train_batches.num_workers == none.val_batches.num_workers == none.train_batches.timeout == 0
    assert said.startswith(f"/dev/shm has {5 * held >> 20} MB free, 2 loading processes may need ")
    assert "docker run --shm-size" in said and said.count("\n") == 1
    none.read(1, 0.0, None)
    assert capsys.readouterr().out == ""  # said once
    assert [batch["names"] for batch in none.batches(0)] == [batch["names"] for batch in plain.batches(0)]
    two = scenes_with(tiny_rooms, 2, 30 * held, monkeypatch)
    assert two.train_batches.num_workers == 2 and two.train_batches.timeout == data.PATIENCE == 120
    assert capsys.readouterr().out == ""


class Hangs:
    def __reduce__(self):  # in a worker's feeder thread, as a tensor without shared memory
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


@pytest.mark.parametrize("kind", ["hangs", "is killed", "GPU", "numpy"])
def test_what_the_machine_does_to_a_training_is_one_line_with_what_to_lower_and_how_to_go_on(
        run_train, tmp_path, monkeypatch, kind):
    def collate(items):
        if kind == "hangs":
            return Hangs()
        raise SystemExit if kind == "is killed" else np.zeros(2**50)

    def forward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.90 GiB. GPU 0 has a total capacity")

    if kind == "GPU":
        monkeypatch.setattr(train, "forward", forward)
    else:
        monkeypatch.setattr(data, "collate", collate)
        monkeypatch.setattr(data, "PATIENCE", 2)
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # else it waits 5 s for the dead
        if kind == "is killed":
            monkeypatch.setattr(data, "start_worker", lambda _: __import__("os")._exit(1))
    said = message_of(run_train, tmp_path, *SHORT, "--workers", workers := int(kind != "GPU"))
    gc.collect()  # here ends a worker that hangs
    start = {"hangs": "DataLoader timed out after 2 seconds", "is killed": "DataLoader worker (pid",
             "GPU": "out of memory (Tried to allocate 12.90 GiB)",
             "numpy": "out of memory (Unable to allocate 8.00 PiB)"}[kind]
    assert said.startswith(f"error: {start}") and "\n" not in said
    assert "Lower --batch-size (2 now), --views (2) or --workers" in said
    assert re.search(rf"go on with: python train\.py --resume --out {tmp_path}( --device cpu)? --workers {workers}$",
                     said)


def test_an_error_of_the_program_itself_keeps_its_traceback(run_train, tmp_path, monkeypatch):
    def forward(*args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(train, "forward", forward)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_train(tmp_path, *SHORT)


class SparseConv(nn.Module):
    """A sparse convolution as spconv-triton 1.0.0 has it, without its kernels."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, bias=True, indice_key=None):
        super().__init__()
        self.indice_key, self.algo = indice_key, "MaskImplicitGemm"
        self.weight = nn.Parameter(torch.zeros(out_channels, *[kernel_size] * 3, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None


@pytest.fixture
def triton(monkeypatch):
    """spconv-triton in place of the one that may be installed; import_spconv forgets what it chose."""
    model_module.import_spconv()  # the real one, before a test feigns that there is no GPU
    kinds = dict.fromkeys(("SubMConv3d", "SparseConv3d", "SparseInverseConv3d"), SparseConv)
    for name, content in (("spconv_triton", {}), ("spconv_triton.pytorch", kinds)):
        module = types.ModuleType(name)
        module.__dict__.update(content | {"__spec__": types.SimpleNamespace(name=name)})
        monkeypatch.setitem(sys.modules, name, module)
    model_module.import_spconv.cache_clear()
    yield
    model_module.import_spconv.cache_clear()


def shapes(preset):
    with torch.device("meta"):
        built = model_module.build_model("bifusion", preset, 20, 0.05, *LITE0, False)
    return {key: tuple(value.shape) for key, value in built.state_dict().items()}, built


@pytest.mark.parametrize("preset", ["small", "base"])
def test_the_model_of_spconv_triton_has_the_keys_and_shapes_of_spconvs(triton, monkeypatch, capsys, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ours = shapes(preset)[0]
    assert model_module.import_spconv().__name__ == "spconv.pytorch" and capsys.readouterr().out == ""
    model_module.import_spconv.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    theirs, built = shapes(preset)
    assert capsys.readouterr().out == "sparse convolutions by spconv-triton, because it is installed; " \
        "its kernels compile first, for minutes\n"
    assert theirs == ours and sum(len(shape) == 5 for shape in ours.values()) > 10
    assert type(built.unet.stem) is SparseConv
    assert len(built.unet.convs) == sum(len(shape) == 5 for shape in ours.values())
    with pytest.raises(ValueError, match="spconv-triton computes on a GPU alone: give --device cuda"):
        built.unet(torch.zeros(1, 6), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long), 1)


def test_spconv_triton_is_taken_where_there_is_no_spconv(triton, monkeypatch):
    find = model_module.importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: None if name == "spconv" else find(name))
    assert model_module.import_spconv().__name__ == "spconv_triton.pytorch"


@pytest.mark.parametrize(("content", "cause"), [(b"", "EOFError()"), (b"<html>", "Unsupported operand 60"),
                                                (b"version https://git-lfs", "Unsupported operand 118")], ids=str)
def test_what_is_no_checkpoint_is_refused_by_its_cause_without_advice_to_run_its_code(tmp_path, content, cause):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_checkpoint(tmp_path / "a.pt")
    assert str(error.value) == f"{tmp_path / 'a.pt'} is not a readable checkpoint: {cause}"
