"""Timings: training steps by stage beside the 3D baseline's, where the time of a step goes, prediction of a scan. A
minute or two on two cores.

    python -m experiments.bench                                   # preset small
    python -m experiments.bench --preset base --device cuda       # full size, a tower of random weights
    python -m experiments.bench --only steps                      # or parts, predict

Times are medians by torch.utils.benchmark. Data: one furnished room; a batch is that room as often as the recipe has
scenes (base on the CPU: once), each time augmented differently.
"""

import argparse
import importlib.metadata
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

import runs
import train
from data import SceneDataset, collate
from guard import Guard
from losses import LOSS_WEIGHTS, weighted_sum
from model import PRESETS
from predict import predict_scene
from scenes.rooms import write_scene
from stages import apply_row, clip_by_branch, curriculum, parameter_groups, set_rates
from tower import SCRATCH

ROWS = curriculum()
VOXEL_SIZE = 0.05  # metres at least: the points of the room lie too far apart for voxels of base's 2 cm to touch


def seconds(*functions, turns=3):
    """Median time of one call of each, a list; they take turns, so that a busy machine disturbs all alike."""
    timers = [Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
              for function in functions]
    return np.median([[timer.blocked_autorange(min_run_time=0.1).median for timer in timers] for _ in range(turns)], 0)


def ms(value):
    return f"{1000 * value:.1f} ms"


class Setup:
    """What the rows share. Attributes: device; config, train.Config of BiFusion; folder, the scene's; batch, with
    images, and cached, with the frozen tower's maps."""

    def __init__(self, root, preset, device):
        self.device, self.folder = device, Path(root, "train", "room")
        self.config = config = train.parse_config([
            "--preset", preset, "--tower-weights", SCRATCH, "--device", device, "--out", f"{root}/no run",
            "--voxel-size", str(max(VOXEL_SIZE, train.RECIPES[preset]["voxel_size"]))])
        scenes, views = (1, 4) if (preset, device) == ("base", "cpu") else (config.batch_size, config.views)
        write_scene(self.folder, (0, 0, 3))  # a living room
        room = SceneDataset(root, "train", voxel_size=config.voxel_size, views=views, augment=True,
                            image_size=train.RECIPES[preset]["image_size"])
        self.batch = train.to_device(collate([room[epoch, 0] for epoch in range(scenes)]), device)
        with torch.no_grad():
            levels = self.model("bifusion").tower.eval().encode(self.batch["image"], self.batch["depth"])
        self.cached = self.batch | {"image": self.batch["image"][..., :0, :0]} \
            | {f"level_{k}": level.half() for k, level in enumerate(levels)}

    def model(self, name):
        torch.manual_seed(0)
        return train.new_model(replace(self.config, model=name)).to(self.device)

    def step(self, name, row):
        """A function that does one step of train.py's loop in a row; its model; its batch, of a frozen tower's maps."""
        model, batch = self.model(name), self.batch if "tower" in row.trains else self.cached
        optimizer = torch.optim.AdamW(parameter_groups(model, self.config.lr, self.config.weight_decay), fused=True)
        apply_row(model, row)
        set_rates(optimizer, row, self.config.lr)
        model.ramp, guard = row.ramp(row.last_epoch), Guard(model)
        model.train()

        def step():
            torch.manual_seed(0)  # the same superpoints become queries
            guard.remember()
            terms, _ = train.forward(model, batch, row)
            loss = weighted_sum(terms, LOSS_WEIGHTS[name])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            numbers = (loss, *terms.values(), *clip_by_branch(model, row.clip).values())
            assert guard.accepts(torch.stack([number.detach() for number in numbers]).tolist()), "not finite"
            optimizer.step()

        return step, model, batch


# functions of a Setup -> rows of the table: what, its figure, what stands beside it, note


def steps(setup):
    for row in ROWS:
        ours, baseline = seconds(*(setup.step(name, row)[0] for name in ("bifusion", "baseline")))
        yield f"step, stage {row.stage}, {row.name}", ms(ours), f"{ms(baseline)} baseline", f"x {ours / baseline:.2f}"


def parts(setup, operations=12):
    """The forward pass of each branch beside a whole step; by torch.profiler the operations of that step, forward and
    backward, that take longest by their own time, on CUDA that of their kernels."""
    clock = "self_cpu_time_total" if setup.device == "cpu" else "self_device_time_total"
    activities = {ProfilerActivity.CPU, ProfilerActivity.CPU if setup.device == "cpu" else ProfilerActivity.CUDA}
    for row in ROWS[1::2]:
        step, model, batch = setup.step("bifusion", row)
        *branches, whole = seconds(partial(model.encode_2d, batch), partial(model.encode_3d, batch), step)
        for name, spent in zip(("2D branch, forward", "3D branch, forward", "whole step"), (*branches, whole)):
            yield f"stage {row.stage}: {name}", ms(spent), f"{spent / whole:.1%}", ""
        with profile(activities=activities) as profiler:
            step()
        spent = {event.key: getattr(event, clock) / 1e6 for event in profiler.key_averages()
                 if event.device_type == DeviceType.CPU and not event.is_user_annotation}  # not the kernels once more
        for name in sorted(spent, key=spent.get, reverse=True)[:operations]:
            yield f"stage {row.stage}: {name:.33}", ms(spent[name]), f"{spent[name] / sum(spent.values()):.1%}", ""


def predict(setup):
    model = setup.model("bifusion").eval()
    (spent,) = seconds(lambda: predict_scene(model, setup.config, setup.folder, setup.device))
    yield "predict a scan", ms(spent), "", f"{len(np.load(setup.folder / 'coord.npy')):,} points, reading included"


BENCHES = {"steps": steps, "parts": parts, "predict": predict}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHES), default=tuple(BENCHES))
    args = parser.parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on the screen
    name = f" ({torch.cuda.get_device_name()})" if args.device == "cuda" else ""
    print(f"{args.preset} on {args.device}{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, spconv {importlib.metadata.version('spconv-cu118')}, commit {runs.commit()}")
    with tempfile.TemporaryDirectory() as root:
        setup = Setup(root, args.preset, args.device)
        print("a batch: {} scene(s), {:,} voxels, {} views".format(
            *(len(setup.batch[key]) for key in ("names", "coord", "image"))), flush=True)
        for bench in args.only:
            for row in BENCHES[bench](setup):
                print("{:42} {:>18}  {:24} {}".format(*row), flush=True)


if __name__ == "__main__":
    main()
