"""Timings: training steps by stage beside the 3D baseline's, where the time of a step goes and its floor, its memory;
projection and sampling, instance AP, prediction of a scan. A minute or two on two cores.

    python -m experiments.bench                                   # preset small
    python -m experiments.bench --preset base --device cuda       # full size, a tower of random weights
    python -m experiments.bench --only steps predict              # some of it

Times are medians by torch.utils.benchmark. Data: one generated room, for base as dense and as large as a scan of
ScanNet; a batch is that room as often as the recipe has scenes, each time augmented differently.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

import model as networks
import runs
import train
from data import collate, evenly_spread, scene_item
from fusion import link_views, sample_views
from guard import Guard
from losses import LOSS_WEIGHTS, weighted_sum
from metrics import instance_ap
from predict import predict_scene
from scenes.folder import NYU40_IDS, load_frames, load_scene
from scenes.boxes import write_scene
from stages import apply_row, clip_by_branch, curriculum, parameter_groups, set_rates
from tower import SCRATCH

ROWS = curriculum()
SIZES = {  # scenes of a batch, voxels of each (about; None: the room as it is), views of each
    ("small", "cpu"): (2, None, 5), ("small", "cuda"): (2, None, 5), ("base", "cpu"): (1, 40_000, 4),
    ("base", "cuda"): (4, 100_000, 10)}
PARTS = ("image tower", "sampling", "sparse U-Net", "decoder", "losses", "optimiser", "rest")
PRODUCTS = re.compile("aten::.*(mm|conv|attention)")  # dense convolutions, matrix products, fused attention
SPARSE = ("SubMConvFunction", "SparseConvFunction", "SparseInverseConvFunction", "SparseImplicitGemmFunction")


def seconds(*functions, turns=3):
    """Median time of one call of each, a list; they take turns, so that a busy machine disturbs all alike."""
    timers = [Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
              for function in functions]
    return np.median([[timer.blocked_autorange(min_run_time=0.1).median for timer in timers] for _ in range(turns)], 0)


def ms(value):
    return f"{1000 * value:.1f} ms"


class Setup:
    """What the rows share. Attributes: preset, device; config, train.Config of BiFusion; folder, the scene's; batch,
    with images, and cached, with the frozen tower's maps."""

    def __init__(self, root, preset, device):
        self.preset, self.device, self.folder = preset, device, Path(root, "room")
        self.config = train.parse_config(["--preset", preset, "--tower-weights", SCRATCH, "--device", device,
                                          "--out", f"{root}/no run"])
        scenes, voxels, views = SIZES[preset, device]
        write_scene(self.folder, 0)
        if voxels:
            densify(self.folder, voxels)
        scene, image_size = load_scene(self.folder), train.RECIPES[preset]["image_size"]
        frames = load_frames(self.folder, evenly_spread(scene["frame_ids"], views), image_size)
        frames = {key: np.resize(value, (views, *value.shape[1:])) for key, value in frames.items()}  # some twice
        self.batch = train.to_device(collate([scene_item(scene, frames, self.config.voxel_size,
                                                         np.random.default_rng(i)) for i in range(scenes)]), device)
        with torch.no_grad():
            levels = self.model("bifusion").tower.eval().encode(self.batch["image"], self.batch["depth"])
        self.cached = self.batch | {"image": self.batch["image"][..., :0, :0]} \
            | {f"level_{k}": level.half() for k, level in enumerate(levels)}

    def model(self, name):
        torch.manual_seed(0)
        return train.new_model(replace(self.config, model=name)).to(self.device)

    def step(self, name, row):
        """A function that does one step of train.py's loop in a row, with the maps of a tower that is frozen; model."""
        model, batch = self.model(name), self.batch if "tower" in row.trains else self.cached
        optimizer = torch.optim.AdamW(parameter_groups(model, self.config.lr, self.config.weight_decay), fused=True)
        apply_row(model, row)
        set_rates(optimizer, row, self.config.lr)
        model.ramp, guard = row.ramp(row.last_epoch), Guard(model)
        model.train()

        def step():
            torch.manual_seed(0)  # the same superpoints become queries
            guard.remember()
            with record_function("losses"):  # the model within it is no part of them
                terms, _ = train.forward(model, batch, row)
                loss = weighted_sum(terms, LOSS_WEIGHTS[name])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            with record_function("optimiser"):
                numbers = (loss, *terms.values(), *clip_by_branch(model, row.clip).values())
                assert guard.accepts(torch.stack([number.detach() for number in numbers]).tolist()), "not finite"
                optimizer.step()

        return step, model


def densify(folder, voxels, edge=0.02):
    """Make a room of write_scene as dense as a scan of ScanNet and cut it to about so many voxels of edge metres."""
    rng, names = np.random.default_rng(0), ("coord", "color", "normal", "segment20", "instance", "superpoint")
    scene = {name: np.load(folder / f"{name}.npy").repeat(10, 0) for name in names}
    shift = rng.uniform(-edge, edge, scene["coord"].shape)
    shift -= (shift * scene["normal"]).sum(1, keepdims=True) * scene["normal"]  # along the surface
    scene["coord"] = (scene["coord"] + shift).astype(np.float32)
    order = np.linalg.norm(scene["coord"] - scene["coord"].mean(0), axis=1).argsort()
    cells = np.unique(np.floor(scene["coord"][order] / edge), axis=0, return_index=True)[1]
    order = order[: np.sort(cells)[:voxels][-1] + 1]
    patch = np.column_stack([scene["superpoint"], np.floor(scene["coord"] / 0.25)])[order]  # some 15 to 1,000 voxels
    for name in names:
        np.save(folder / f"{name}.npy", scene[name][order])
    np.save(folder / "superpoint.npy", np.unique(patch, axis=0, return_inverse=True)[1].ravel())


def split_step(step, model, device):
    """Where the time of one step goes, by part of the network, and how much of it no implementation can save.

    Ranges of torch.profiler are laid round the parts of the forward pass. A node of the backward pass belongs to the
    part whose operation made it: both have one sequence number; the sum of gradients into a weight, to the node before
    it. Every operation counts for its self time: on CPU the elapsed time, on CUDA the duration of its kernels. "rest"
    is standardisation, FiLM, gate, blend, heads, and Python between them.

    The floor is the self time of PRODUCTS at the step's own shapes. On CPU spconv calls aten::mm on gathered rows: its
    gathers and scatters stand apart, its neighbour tables are in neither. On CUDA its kernels are products.

    Returns {part: {"forward", "backward": seconds, together all; "product", "gather": of them}}.
    """
    cuda = device != "cpu"
    ranges = [(model, "forward", "rest"), (model.tower, "forward", "image tower"),
              (model.unet, "forward", "sparse U-Net"), (model.decoder, "forward", "decoder"),
              (networks, "superpoint_means", "decoder"), (networks, "link_views", "sampling"),
              (networks, "sample_views", "sampling")]
    with contextlib.ExitStack() as stack:
        for owner, name, part in ranges:
            stack.enter_context(mock.patch.object(owner, name, record_function(part)(getattr(owner, name))))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]))
        with record_function("rest"):
            step()
            if cuda:
                torch.cuda.synchronize()
    split = {part: dict.fromkeys(("forward", "backward", "product", "gather"), 0.0) for part in PARTS}
    where, made_by, node_part = {}, {}, "rest"  # of each event: part, "forward" or "backward", within a sparse conv
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        part, direction, sparse = where.get(id(event.cpu_parent), ("rest", "forward", False))
        if event.name in PARTS:
            part = event.name
        elif event.name.startswith("autograd::engine::evaluate_function"):
            part = node_part = made_by.get(event.sequence_nr, node_part)
            direction = "backward"
        elif direction == "forward" and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = part
        sparse = sparse or event.name.removesuffix("Backward") in SPARSE
        where[id(event)] = part, direction, sparse
        own = 1e-6 * (sum(kernel.duration for kernel in event.kernels if kernel.name not in PARTS) if cuda
                      else event.self_cpu_time_total)
        split[part][direction] += own
        if PRODUCTS.match(event.name) or (cuda and sparse):
            split[part]["product"] += own
        elif sparse:
            split[part]["gather"] += own
    return split


# functions of a Setup -> rows of the table: what, its figure, what stands beside it, note


def steps(setup):
    for row in ROWS:
        ours, baseline = seconds(*(setup.step(name, row)[0] for name in ("bifusion", "baseline")))
        yield f"step, stage {row.stage}, {row.name}", ms(ours), f"{ms(baseline)} baseline", f"x {ours / baseline:.2f}"


def parts(setup):
    for row in ROWS[-2:]:
        step, model = setup.step("bifusion", row)
        (elapsed,), split = seconds(step), split_step(step, model, setup.device)
        split["all"] = {key: sum(cost[key] for cost in split.values()) for key in split["rest"]}
        whole = split["all"]["forward"] + split["all"]["backward"]
        for part, cost in split.items():
            own, other = cost["forward"] + cost["backward"], cost["product"] + cost["gather"]
            yield (f"stage {row.stage}: {part}", f"{ms(own)} {own / whole:.1%}", f"{ms(cost['product'])} products",
                   f"forward {ms(cost['forward'])}, backward {ms(cost['backward'])}, gathers {ms(cost['gather'])}, "
                   f"{1 - other / own:.1%} neither")
        yield f"stage {row.stage}: all, without the profiler", ms(elapsed), "", ""


def memory(setup):
    """The largest extra memory of a step; on the CPU Linux alone can tell."""
    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    step, _ = setup.step("bifusion", ROWS[-1])
    if setup.device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # or the step would find memory that earlier ones left
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
        before = status("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step()
    peak = status("VmHWM") if setup.device == "cpu" else torch.cuda.max_memory_allocated()
    yield "step, stage 3: memory", f"{(peak - before) / 2**20:.0f} MB", "", "gradients, optimiser; no weights"


def projection(setup):
    points, views = setup.batch["batch_index"] == 0, setup.batch["view_batch"] == 0  # of one scene
    scene = [setup.batch["world_coord"][points],
             *(setup.batch[key][views] for key in ("world_to_camera", "intrinsics", "depth"))]
    width, height = size = train.RECIPES[setup.preset]["image_size"]
    maps = torch.randn(len(scene[1]), 256, height // 8, width // 8, device=setup.device, requires_grad=True)
    project, both = seconds(lambda: link_views(*scene), lambda: sample_views(
        maps, link_views(*scene), size, len(scene[0]))[0].sum().backward())
    of = f"{len(scene[0]):,} voxels, {len(maps)} views {width}x{height}, {len(link_views(*scene).point):,} links"
    yield "project", ms(project), "", of
    yield "project and sample, forward and backward", ms(both), "", f"maps of 256 channels {width // 8}x{height // 8}"


def ap(setup, points=150_000, masks=60):
    rng = np.random.default_rng(0)
    own = np.repeat(np.arange(40), points // 40)  # (N,) number of the instance
    label, source = rng.choice(NYU40_IDS[2:], 40), rng.integers(0, 40, masks)
    found = (own == source[:, None]) & (rng.random((masks, len(own))) > 0.1)
    scene = {"gt": label[own] * 1000 + own + 1, "masks": found, "labels": label[source], "scores": rng.random(masks)}
    (spent,) = seconds(lambda: instance_ap([scene], NYU40_IDS[2:]))
    yield "instance AP of a scene", ms(spent), "", f"{points:,} points, {masks} masks"


def predict(setup):
    model = setup.model("bifusion").eval()
    (spent,) = seconds(lambda: predict_scene(model, setup.config, setup.folder, setup.device))
    yield "predict a scan", ms(spent), "", f"{len(np.load(setup.folder / 'coord.npy')):,} points, reading included"


BENCHES = {"steps": steps, "parts": parts, "memory": memory, "projection": projection, "ap": ap, "predict": predict}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(networks.PRESETS), default="small")
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
