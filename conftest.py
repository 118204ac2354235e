"""What the tests share: made-up batches, networks of a few thousand parameters, tiny generated rooms."""

import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

SMALL_IMAGE = (64, 48)  # (W, H), instead of 160x120


class Payload:
    """Unpickled, it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pytest_configure(config):
    torch.set_num_threads(1)  # the tensors are tiny, and results do not depend on the number of cores
    tqdm.set_lock(threading.RLock())  # in place of one shared with all forks: killed, a fork would hold it for good
    tqdm.monitor_interval = 0  # its thread may hold the lock while a test forks, and the fork would wait for ever


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def camera_at(position, yaw):
    """world_to_camera (4, 4) of a level camera; yaw 0 looks along world +y, x right, y down, z forward."""
    c, s = np.cos(yaw), np.sin(yaw)
    right, forward = np.array([c, s, 0]), np.array([-s, c, 0])
    rotation = np.stack([right, [0, 0, -1], forward])  # rows: camera axes in the world
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, -rotation @ position
    return matrix


def _scene(rng, voxels, views, num_classes, image_size, extent=(21, 15, 11), voxel_size=0.1):
    """One scene of a batch as arrays: random voxels in a box, cameras that look into it, depth maps splatted."""
    width, height = image_size
    cells = rng.choice(np.prod(extent), voxels, replace=False)
    grid = np.stack(np.unravel_index(cells, extent), 1)  # (M, 3)
    world = (grid + 0.5 + rng.uniform(-0.3, 0.3, grid.shape)) * voxel_size + [3.0, -2.0, 0.5]
    middle = world.mean(0)
    intrinsics = np.array([[0.9 * width, 0, (width - 1) / 2], [0, 0.9 * width, (height - 1) / 2], [0, 0, 1]])
    matrices, depths = [], []
    for i in range(views):
        yaw = 2 * np.pi * i / views + 0.3
        matrix = camera_at(middle - 2.2 * np.array([-np.sin(yaw), np.cos(yaw), 0]), yaw)
        camera = world @ matrix[:3, :3].T + matrix[:3, 3]
        depth = np.zeros((height, width))
        for x, y, z in camera:
            column = round(intrinsics[0, 0] * x / z + intrinsics[0, 2])
            row = round(intrinsics[1, 1] * y / z + intrinsics[1, 2])
            if z > 0 and 0 <= column < width and 0 <= row < height:
                depth[row, column] = z if depth[row, column] == 0 else min(z, depth[row, column])
        matrices.append(matrix)
        depths.append(depth)
    normal = rng.normal(size=(voxels, 3))
    return {
        "grid_coord": grid.astype(np.int32), "color": rng.uniform(-1, 1, (voxels, 3)),
        "normal": normal / np.linalg.norm(normal, axis=1, keepdims=True),
        "coord": (world - [*middle[:2], world[:, 2].min()]), "world_coord": world,
        "segment": rng.integers(-1, num_classes, voxels),
        "image": rng.integers(0, 256, (views, 3, height, width)).astype(np.uint8),
        "depth": np.array(depths).reshape(views, height, width),
        "world_to_camera": np.array(matrices).reshape(views, 4, 4), "intrinsics": np.tile(intrinsics, (views, 1, 1)),
        **_superpoints(rng, voxels, num_classes),
    }


def _superpoints(rng, voxels, num_classes):
    """Superpoints of up to 10 voxels each, of one point a voxel; instances of up to 3 superpoints."""
    superpoint = np.unique(rng.permutation(np.arange(voxels) // 10), return_inverse=True)[1]  # (M,) 0..S-1
    count = superpoint.max() + 1
    owner = rng.permutation(np.arange(count) // 3 - 1)  # (S,) three superpoints are of no instance
    label = rng.integers(2, num_classes, owner.max() + 1)
    return {
        "point_superpoint": superpoint, "piece_superpoint": superpoint, "piece_voxel": np.arange(voxels),
        "piece_points": np.ones(voxels), "superpoint_instance": owner, "instance_label": label,
        "point_instance": np.where(owner >= 0, np.append(label, 0)[owner] * 1000 + owner + 1, 0)[superpoint],
        "has_instances": np.array([True]),
    }


def _make_batch(voxels=(150, 90), views=(2, 2), num_classes=5, image_size=SMALL_IMAGE, seed=0, **scene):
    """A batch as data.collate makes it, of made-up scenes with these numbers of voxels and views."""
    rng = np.random.default_rng(seed)
    scenes = [_scene(rng, m, v, num_classes, image_size, **scene) for m, v in zip(voxels, views)]
    batch = {"names": [f"scene_{i}" for i in range(len(scenes))]}
    for key in scenes[0]:
        value = torch.from_numpy(np.concatenate([s[key] for s in scenes]))
        batch[key] = value.float() if value.dtype == torch.float64 else value
    batch["batch_index"] = torch.repeat_interleave(torch.arange(len(scenes)), torch.tensor(voxels))
    batch["view_batch"] = torch.repeat_interleave(torch.arange(len(scenes)), torch.tensor(views))
    for like, key in (("superpoint_instance", "superpoint_batch"), ("instance_label", "instance_batch")):
        counts = torch.tensor([len(s[like]) for s in scenes])
        batch[key] = torch.repeat_interleave(torch.arange(len(scenes)), counts)
    first = torch.cumsum(torch.tensor([0, *(len(s["superpoint_instance"]) for s in scenes)]), 0)
    for key in ("point_superpoint", "piece_superpoint"):
        batch[key] = batch[key] + first[batch["batch_index"]]
    batch["point_to_voxel"] = batch["piece_voxel"] = torch.arange(sum(voxels))
    batch["point_segment"], batch["point_batch"] = batch["segment"], batch["batch_index"]
    return batch


def _make_model(name="bifusion", pretrained=False, num_classes=5, seed=0):
    """Baseline3D or BiFusion of a few ten thousand parameters; pretrained only sets the flag that protects a tower."""
    from model import IN_CHANNELS, Baseline3D, BiFusion, ClipTower, QueryDecoder, SparseUNet

    torch.manual_seed(seed)
    unet = SparseUNet(IN_CHANNELS, stem=8, encoder=(8, 16), encoder_blocks=(1, 1), decoder=(16, 8),
                      decoder_blocks=(1, 1))
    decoder = QueryDecoder(16, dim=16, hidden=32, layers=2, heads=2, num_classes=num_classes)
    if name == "baseline":
        return Baseline3D(unet, decoder, 16, num_classes)
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.modified_resnet import ModifiedResNet

    visual = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, width=8)
    tower = ClipTower(visual, 16, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, pretrained)
    return BiFusion(unet, tower, decoder, 16, num_classes, depth_tolerance=0.05)


def _row(epoch, pretrained=False, **curriculum_flags):
    """The row of the curriculum at an epoch; of a tower from scratch, as make_model's is, unless told otherwise."""
    from stages import curriculum, row_at

    return row_at(curriculum(pretrained=pretrained, **curriculum_flags), epoch)


def _put(model, row, moment=None):
    """Put a model into a row of the curriculum, its ramp as it is at a moment (default: over)."""
    from stages import apply_row

    apply_row(model, row)
    model.ramp = row.ramp(row.last_epoch if moment is None else moment)
    return model


def _train_steps(model, row, batch, steps=4, lr=1e-2, optimizer=None):
    """Train in a row as train.py does and return the optimiser; gradients of the last step are left in place."""
    from losses import LOSS_WEIGHTS, weighted_sum
    from stages import clip_by_branch, parameter_groups, set_rates
    from train import forward

    optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, lr, 0.05))
    _put(model, row).train()
    set_rates(optimizer, row, lr)
    for _ in range(steps):
        loss = weighted_sum(forward(model, batch, row)[0], LOSS_WEIGHTS["bifusion"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        assert all(torch.isfinite(norm) for norm in clip_by_branch(model, row.clip).values())
        optimizer.step()
    return optimizer


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    torch.manual_seed(0)


make_batch = pytest.fixture(lambda: _make_batch, scope="session")
make_model = pytest.fixture(lambda: _make_model, scope="session")
row = pytest.fixture(lambda: _row, scope="session")
put = pytest.fixture(lambda: _put, scope="session")
train_steps = pytest.fixture(lambda: _train_steps, scope="session")


@pytest.fixture(scope="session")
def tiny_rooms(tmp_path_factory):
    """Folder of 4 train and 2 val generated rooms with frames of 64x48, thinned to every 8th point."""
    from scenes import boxes

    root = tmp_path_factory.mktemp("data") / "rooms"
    boxes.generate(root, train=4, val=2, workers=1, image_size=SMALL_IMAGE)
    for path in root.glob("*/*/*.npy"):
        np.save(path, np.load(path)[::8])
    return root


@pytest.fixture(scope="session")
def pairs_of_scenes(tiny_rooms):
    """{case: two scenes}; of the second something may be missing."""
    from data import SceneDataset
    from scenes.folder import IGNORE

    frames, bare = (SceneDataset(tiny_rooms, "train", voxel_size=0.25, views=views, image_size=SMALL_IMAGE)
                    for views in (2, 0))
    first, second, blind = frames[0], frames[1], bare[1]
    dot = SceneDataset(tiny_rooms, "train", voxel_size=100, views=2, image_size=SMALL_IMAGE)[1]
    unlabelled = {"segment": np.full_like(second["segment"], IGNORE)}
    unknown = {"has_instances": np.array([False]), "instance_label": second["instance_label"][:0],
               "superpoint_instance": np.full_like(second["superpoint_instance"], IGNORE)}
    return {"whole": [first, second], "no frames": [first, blind], "no labels": [first, second | unlabelled],
            "no instances": [first, second | unknown], "nothing to learn": [first, blind | unlabelled | unknown],
            "one voxel": [first, dot]}


@pytest.fixture(scope="session")
def run_train(tiny_rooms):
    """Function: run train.main on the tiny rooms with big voxels and small frames, and return the lines of its log.

    run_train(out, "--stage", 1, ...); images of 64x48, voxels of 25 cm, 2 frames, CPU, no worker processes.
    """
    from runs import read_log
    from train import RECIPES, main

    def run(out, *flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RECIPES["small"], "image_size", SMALL_IMAGE)
            patch.setitem(RECIPES["small"], "voxel_size", 0.25)
            patch.setitem(RECIPES["small"], "views", 2)
            patch.setitem(RECIPES["small"], "batch_size", 2)
            main(["--out", str(out), "--device", "cpu", "--workers", "0", "--cache", str(tiny_rooms.parent / "cache"),
                  *([] if "--resume" in flags else ["--data", str(tiny_rooms)]), *map(str, flags)])
        return read_log(out / "log.jsonl")

    return run


@pytest.fixture(scope="session")
def tiny_run(run_train, tmp_path_factory):
    """The whole curriculum in 24 epochs: (run folder, lines of the log)."""
    out = tmp_path_factory.mktemp("runs") / "bifusion"
    return out, run_train(out, "--compress", 129 / 24)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Untrained checkpoints of preset small in the last row of the curriculum: {model: path}."""
    from stages import curriculum
    from tower import LITE0
    from train import Config, new_model

    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for name in ("baseline", "bifusion"):
        torch.manual_seed(1)
        config = Config(model=name, device="cpu", voxel_size=0.25, views=2, tower=LITE0[0], tower_weights="scratch")
        model = new_model(config, load=False)
        torch.nn.init.normal_(model.semantic_head.weight)  # so that an untrained network finds several classes
        paths[name] = folder / f"{name}.pt"
        torch.save({"model": model.state_dict(), "optimizer": {}, "next": [129, 0], "ramp": 1.0,
                    "row": asdict(curriculum(pretrained=False)[-1]), "config": asdict(config)}, paths[name])
    return paths


@pytest.fixture(scope="session")
def room(tiny_rooms):
    """A scene folder of the tiny generated rooms."""
    return sorted((tiny_rooms / "val").iterdir())[0]
