"""What only a CUDA device can show: the whole of training and prediction on it, and checkpoints that change devices.

    pytest -m gpu            # with those of the other files; skipped where there is no CUDA device
"""

import numpy as np
import pytest
import torch
from test_processes import torchrun_trains_all_stages

from data import SceneDataset, collate
from predict import open_checkpoint, predict_scene
from train import RECIPES, load_model, to_device

pytestmark = pytest.mark.gpu
SHORT = ("--compress", 43)  # 4 epochs: one of stage 1, two of stage 2, one of stage 3


@pytest.fixture(scope="module")
def runs(run_train, tmp_path_factory):
    """Folder of short runs made on each device, with the pretrained tower of the preset."""
    root = tmp_path_factory.mktemp("devices")
    for device in ("cpu", "cuda"):
        run_train(root / device, *SHORT, "--device", device)
    return root


def logits_on(path, device, tiny_rooms):
    model, config, _ = load_model(path, device)
    scenes = SceneDataset(tiny_rooms, "val", voxel_size=config.voxel_size, views=4, image_size=(64, 48))
    with torch.no_grad():
        return model(to_device(collate([scenes[0], scenes[1]]), device))["logits"].cpu()


@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_a_checkpoint_of_either_device_predicts_the_same_labels_on_both(runs, tiny_rooms, made_on):
    here, there = (logits_on(runs / made_on / "stage3.pt", device, tiny_rooms) for device in ("cpu", "cuda"))
    clear = here.topk(2, 1).values.diff(dim=1).abs().squeeze(1) > 1e-2  # the rest are ties of floating point
    assert clear.float().mean() > 0.9
    assert torch.equal(here.argmax(1)[clear], there.argmax(1)[clear])


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_the_other_device(run_train, tmp_path, first, second):
    run_train(tmp_path / "run", *SHORT, "--stage", 1, "--device", first)
    log = run_train(tmp_path / "run", "--resume", "--device", second)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert sum(line["skipped_steps"] for line in log) == 0


@pytest.mark.parametrize("flags", [("--precision", "bf16"), ("--cache-gb", 0), ("--tower-weights", "scratch"),
                                   ("--tower", "RN50", "--tower-weights", "scratch")])
def test_every_way_of_running_the_tower_runs_on_cuda(run_train, tmp_path, flags):
    log = run_train(tmp_path / "run", *SHORT, "--device", "cuda", *flags)
    assert len(log) == 4 and all(np.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in log)


def test_a_scan_is_predicted_on_cuda_as_on_the_cpu(runs, tiny_rooms, monkeypatch):
    monkeypatch.setitem(RECIPES["small"], "image_size", (64, 48))
    found = [predict_scene(*open_checkpoint(runs / "cuda" / "stage3.pt", device), tiny_rooms / "val" / "room_0000",
                           device)[1]["labels"] for device in ("cpu", "cuda")]
    assert (found[0] == found[1]).mean() > 0.99


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_torchrun_trains_all_stages_on_two_gpus(tiny_rooms, tmp_path):
    torchrun_trains_all_stages("cuda", tiny_rooms, tmp_path)
