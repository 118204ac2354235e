"""Timings side by side: each part of this project against the plain way of doing the same, in the same run.

    python bench.py                                # everything, a few minutes on two cores
    python bench.py --only voxelise projection     # some of it
    python bench.py --preset base --device cuda    # the training step at full size: where its time goes, its floor
    python bench.py --control runs/bifusion/stage3.pt runs/baseline/stage3.pt   # AP beside that of plain groupings

Ours and the alternative take turns and the median is given, so that a busy machine disturbs both alike. That both
compute the same is checked in tests/test_bench.py. Memory is the largest extra amount during one call.
"""

import argparse
import ctypes
import importlib.metadata
import io
import json
import os
import platform
import struct
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch.profiler import record_function

from cache import FeatureCache
from data import SceneDataset, collate
from experiments.profile_step import split_step
from fusion import link_views, sample_views
from guard import Guard, all_finite
from losses import LOSS_WEIGHTS, weighted_sum
from metrics import InstanceAP, _intersections, _unique_ids, instance_ap
from model import PRESETS, Attention, QueryDecoder, build_model, superpoint_graph, superpoint_means
from scenes.folder import NYU40_IDS, STUFF, THINGS, usable_frames
from scenes.points import voxelise
from scenes.rooms import write_scene
from scenes.scannet import prepare, read_sens
from stages import apply_setting, clip_by_branch, parameter_groups, setting_at, stage_epochs
from tower import SCRATCH
from train import RECIPES, instances_of_scene, load_model, loss_terms, to_device


class Row(NamedTuple):
    """One line of the table."""

    what: str
    ours: str
    alternative: str = "-"
    ratio: float | None = None  # alternative over ours: above 1 we are faster, or smaller
    goal: float | None = None  # least ratio that is wanted
    note: str = ""


def timed(*functions, repeats=5, device="cpu"):
    """Median seconds of each function; they take turns.

    In each turn a function runs twice and the second call counts: after NumPy's matrix product its BLAS threads spin
    for some milliseconds, on the core that the next function would use.
    """
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for times, function in zip(seconds, functions):
            for counts in (False, True):
                start = time.perf_counter()
                function()
                if device != "cpu":
                    torch.cuda.synchronize()
                if counts:
                    times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in seconds]


def extra_memory(function, device="cpu"):
    """Largest extra memory of one call, MB; None where the system cannot tell (on CPU only Linux can)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call would find memory that earlier ones left
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
        before = _status_kb("VmRSS")
        function()
        return (_status_kb("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status_kb(key):
    """One number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


# ------------------------------------------------------------------------------------------------- a scan to work on

ROOM = np.array([8.0, 6.0, 2.5])  # metres


def box_room(num_points, seed=0):
    """A room of ROOM with 12 boxes in it: points (N, 3) f32 on all surfaces with 3 mm of noise, boxes (13, 2, 3)."""
    rng = np.random.default_rng(seed)
    low = rng.uniform((0, 0, 0), (7, 5, 0), (12, 3))
    high = np.minimum(low + rng.uniform(0.4, (1, 1, 1.4), (12, 3)), ROOM)
    boxes = np.concatenate([[[np.zeros(3), ROOM]], np.stack([low, high], 1)])
    edge = boxes[:, 1] - boxes[:, 0]
    area = np.repeat(edge.prod(1, keepdims=True) / edge, 2, axis=1).ravel()  # (13 * 6,), two faces an axis
    face = rng.choice(len(area), num_points, p=area / area.sum())
    place = rng.random((num_points, 3))
    place[np.arange(num_points), face // 2 % 3] = face % 2
    points = boxes[face // 6, 0] + place * edge[face // 6]
    return (points + rng.normal(0, 0.003, points.shape)).astype(np.float32), boxes


def box_views(boxes, num_views, image_size, seed=1, inwards=False):
    """Cameras at eye height, facing anywhere or the middle of the room.

    Returns world_to_camera (V, 4, 4), intrinsics (V, 3, 3), exact depth (V, H, W), all f32.
    """
    rng = np.random.default_rng(seed)
    width, height = image_size
    focal = width / 2 / np.tan(np.radians(35))
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3) @ np.linalg.inv(intrinsics).T  # z = 1
    matrices, depths = [], []
    for _ in range(num_views):
        yaw, pitch, center = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5), rng.uniform((0.5, 0.5, 1.5), ROOM - 0.5)
        if inwards:
            yaw = np.arctan2(*(ROOM / 2 - center)[1::-1])
        forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), -np.sin(pitch)])
        right = np.array([np.sin(yaw), -np.cos(yaw), 0])
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([right, np.cross(forward, right), forward])
        matrix[:3, 3] = -matrix[:3, :3] @ center
        hits = (boxes[:, :, None] - center) / (rays @ matrix[:3, :3])  # (13, 2, R, 3) by the slab method
        enter, leave = hits.min(1).max(-1), hits.max(1).min(-1)
        enter[0] = leave[0]  # the room itself is seen from inside
        depths.append(np.where((enter <= leave) & (enter > 0), enter, np.inf).min(0).reshape(height, width))
        matrices.append(matrix)
    return [np.asarray(a, np.float32) for a in (matrices, [intrinsics] * num_views, depths)]


def scan(num_points=150_000, num_views=20, image_size=(320, 240), device="cpu"):
    """Points in the order of 2 cm voxels, as data.py gives them, and views: the four tensors of link_views."""
    points, boxes = box_room(num_points)
    points = points[np.argsort(voxelise(points, 0.02)[1], kind="stable")]
    return [torch.from_numpy(a).to(device) for a in (points, *box_views(boxes, num_views, image_size))]


def photo(rng, size=(1296, 968)):
    """A jpeg of about 130 KB, as those of a .sens."""
    coarse, jpeg = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(size), io.BytesIO()
    noise = rng.normal(0, 4, (*size[::-1], 1))
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=80)
    return jpeg.getvalue()


def write_sens(path, frames, color_size=(1296, 968), depth_size=(640, 480)):
    """A .sens as ScanNet's: jpeg of about 130 KB, zlib depth; its few distinct images are repeated."""
    rng, images = np.random.default_rng(0), []
    for _ in range(4):
        jpeg = photo(rng, color_size)
        far = np.asarray(Image.fromarray(rng.uniform(800, 4000, (8, 10)).astype(np.float32)).resize(depth_size))
        images.append((jpeg, zlib.compress((far + rng.normal(0, 2, far.shape)).astype("<u2").tobytes())))
    cameras = [np.eye(4) for _ in range(4)]
    for camera, (width, height) in ((cameras[0], color_size), (cameras[2], depth_size)):
        camera[[0, 1], [0, 1]], camera[:2, 2] = 0.9 * width, ((width - 1) / 2, (height - 1) / 2)
    with open(path, "wb") as file:
        file.write(struct.pack("<IQ4s", 4, 4, b"test") + np.array(cameras, "<f4").tobytes())
        file.write(struct.pack("<iiIIIIfQ", 2, 1, *color_size, *depth_size, 1000, frames))
        for i in range(frames):
            color, depth = images[i % len(images)]
            file.write(np.eye(4, dtype="<f4").tobytes() + struct.pack("<QQQQ", i, i, len(color), len(depth)))
            file.write(color + depth)


def write_scans(root, count, num_points=150_000, frames=400):
    """Made-up scans of ScanNet's size, but of fewer frames, as ScanNet's files with a split list."""
    points, _ = box_room(num_points)
    rows = np.zeros(num_points, [*((axis, "f4") for axis in "xyz"), *((c, "u1") for c in ("red", "green", "blue"))])
    rows["x"], rows["y"], rows["z"] = points.T
    corners = np.sort(np.random.default_rng(0).integers(0, num_points, 2 * num_points)) % (num_points - 2)
    faces = np.zeros(2 * num_points, [("length", "u1"), ("vertex_indices", "i4", 3)])
    faces["length"], faces["vertex_indices"] = 3, corners[:, None] + np.arange(3)
    names = [f"scene{i:04d}_00" for i in range(count)]
    for name in names:
        stem = Path(root, name, name)
        stem.parent.mkdir(parents=True)
        for suffix in ("", ".labels"):
            head = [f"ply\nformat binary_little_endian 1.0\nelement vertex {num_points}"]
            head += [f"property {'float' if kind == '<f4' else 'uchar'} {key}" for key, kind in rows.dtype.descr]
            head += ["property ushort label"] if suffix else []
            head += [f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"]
            label = np.ones((num_points, 2), np.uint8)
            body = np.concatenate([rows.view((np.uint8, rows.itemsize)), label], 1) if suffix else rows
            Path(f"{stem}_vh_clean_2{suffix}.ply").write_bytes("\n".join(head).encode() + body.tobytes()
                                                               + faces.tobytes())
        segments = np.arange(num_points) // 50
        Path(f"{stem}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments.tolist()}))
        groups = [{"segments": part.tolist(), "label": "wall"} for part in np.array_split(np.unique(segments), 30)]
        Path(f"{stem}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
        Path(f"{stem}.txt").write_text("sceneType = none\n")
        write_sens(f"{stem}.sens", frames)
    Path(root, "scannetv2_train.txt").write_text("\n".join(names))


# what a step of `base` is timed on: scenes, and of each the voxels of 2 cm (about), superpoints, views
SIZES = {"cpu": (1, 40_000, 600, 4), "cuda": (4, 100_000, 1500, 10)}


def write_box_scene(folder, seed, voxels, superpoints, views):
    """A scene folder as ScanNet's, cut out of a box_room: the points nearest to its middle, images of 1296x968."""
    folder, rng, image_size = Path(folder), np.random.default_rng(seed), (640, 480)
    points, boxes = box_room(600_000, seed)  # 7 of a voxel's 27 neighbours are occupied
    points = points[np.argsort(np.linalg.norm(points - ROOM / 2, axis=1))[: int(1.7 * voxels)]]
    centers = points[rng.choice(len(points), superpoints, replace=False)]
    superpoint = cKDTree(centers).query(points)[1]  # (N,)
    instance = cKDTree(centers[:30]).query(centers)[1][superpoint]  # (N,) instances are groups of superpoints
    arrays = {"coord": points, "color": rng.integers(0, 256, points.shape, np.uint8), "superpoint": superpoint,
              "normal": rng.normal(size=points.shape).astype(np.float32), "instance": instance,
              "segment20": rng.integers(0, 20, 30)[instance]}
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    matrices, intrinsics, depths = box_views(boxes, views, image_size, seed + 1, inwards=True)
    for i, (matrix, depth) in enumerate(zip(matrices, depths)):
        (folder / "color" / f"{i}.jpg").write_bytes(photo(rng))
        Image.fromarray((1000 * depth).round().astype(np.uint16)).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", np.linalg.inv(matrix))
    camera = np.diag([1296 / 640, 968 / 480, 1]) @ intrinsics[0].astype(float)
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", camera)


# --------------------------------------------------------------------------------------------------- the plain ways


def sens_by_struct(path):
    """A .sens number by number, every image unpacked: list of pose (4, 4), colour (H, W, 3), depth (H, W)."""
    with open(path, "rb") as file:
        def number(kind):
            return struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]

        def matrix():
            return np.array([[number("f") for _ in range(4)] for _ in range(4)])

        number("I")
        file.read(number("Q"))
        for _ in range(4):
            matrix()
        number("i"), number("i"), number("I"), number("I")
        width, height = number("I"), number("I")
        number("f")
        frames = []
        for _ in range(number("Q")):
            pose, _, _, color_bytes, depth_bytes = matrix(), number("Q"), number("Q"), number("Q"), number("Q")
            color = np.asarray(Image.open(io.BytesIO(file.read(color_bytes)), formats=["JPEG"]))
            depth = np.frombuffer(zlib.decompress(file.read(depth_bytes)), "<u2").reshape(height, width)
            frames.append((pose, color, depth))
    return frames


def voxelise_by_unique(coord, voxel_size):
    """np.unique over the rows. Returns as voxelise."""
    grid = ((coord - coord.min(0)) / np.float32(voxel_size)).astype(np.int64)
    cells, inverse = np.unique(grid, axis=0, return_inverse=True)
    return cells, inverse.ravel()


def voxelise_by_hash(coord, voxel_size):
    """FNV-1a over the three cell numbers, one argsort, np.unique: the usual way. Voxels come in the hash's order."""
    grid = ((coord - coord.min(0)) / np.float32(voxel_size)).astype(np.int64)
    key = np.full(len(grid), 14695981039346656037, np.uint64)
    for axis in grid.astype(np.uint64).T:
        key = (key ^ axis) * np.uint64(1099511628211)
    order = np.argsort(key)
    _, inverse, count = np.unique(key[order], return_inverse=True, return_counts=True)
    point_to_voxel = np.empty(len(grid), np.int64)
    point_to_voxel[order] = inverse.ravel()
    return grid[order[np.cumsum(count) - count]], point_to_voxel


def view_by_numpy(points, world_to_camera, intrinsics, depth, tolerance=0.05):
    """The points that one view sees, in float64: (l,) rows, (l, 2) uv. All points are transformed, all are rounded."""
    height, width = depth.shape
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], 1)  # (N, 4)
    camera = (homogeneous @ world_to_camera.T)[:, :3]
    z = camera[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = (camera @ intrinsics.T)[:, :2] / z[:, None]
        column, row = np.round(uv).astype(np.int64).T
    inside = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    reading = np.zeros(len(points))
    reading[inside] = depth[row[inside], column[inside]]
    seen = (inside & (reading > 0) & (np.abs(reading - z) <= tolerance)).nonzero()[0]
    return seen, uv[seen]


def link_by_numpy(points, world_to_camera, intrinsics, depth):
    """view_by_numpy over the views: list of V pairs."""
    return [view_by_numpy(points, *view) for view in zip(world_to_camera, intrinsics, depth)]


def sample_densely(feature_maps, links, image_size, num_points):
    """grid_sample of all points in all views, (V, C, N), then the masked mean. Returns as sample_views."""
    num_views = len(feature_maps)
    size = torch.tensor(image_size, device=feature_maps.device)
    grid = feature_maps.new_zeros(num_views, num_points, 2)
    mask = feature_maps.new_zeros(num_views, num_points)
    grid[links.view, links.point] = (2 * links.uv + 1) / size - 1
    mask[links.view, links.point] = 1
    sampled = F.grid_sample(feature_maps, grid[:, None], padding_mode="border", align_corners=False)[:, :, 0]
    count = mask.sum(0)  # (N,)
    return ((sampled * mask[:, None]).sum(0) / count.clamp(min=1)).T, count > 0


def attend_explicitly(self, query, keys, allowed=None):
    """model.Attention.forward with the weights of all heads, (h, Q, S), written out."""
    q = self.to_query(query).unflatten(1, (self.heads, -1)).transpose(0, 1)
    k, v = self.to_key_value(keys).unflatten(1, (2, self.heads, -1)).permute(1, 2, 0, 3)
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    weights = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(2)
    return self.norm(query + self.out((weights @ v).transpose(0, 1).flatten(1)))


def instance_scene(seed, num_points=150_000, num_masks=60):
    """A scene as instance_ap takes it, points in random order: ~40 instances of 18 classes, a third of them void.

    Masks are true instances with a tenth of their points lost and 0.2 % of all points added, the last fifth of them
    balls anywhere; of 60 masks, eight show an instance a second time.
    """
    rng = np.random.default_rng(seed)
    points, _ = box_room(num_points, seed)
    centers = points[rng.choice(num_points, 60, replace=False)]
    cell = ((centers**2).sum(1) - 2 * points @ centers.T).argmin(1)  # (N,) nearest centre
    common = 1 / np.arange(1, 19)  # a room has many chairs and one fridge
    label_of = rng.choice(NYU40_IDS[2:], 60, p=common / common.sum())
    label_of[40:] = rng.choice([0, 1, 2], 20)  # unannotated, wall, floor
    gt = np.where(label_of > 0, label_of * 1000 + np.arange(1, 61), 0)[cell]  # (N,)
    source = np.append(np.arange(num_masks - num_masks // 5) % 40, rng.integers(0, 40, num_masks // 5))
    masks = np.zeros((num_masks, num_points), dtype=bool)
    for p, mask in enumerate(masks):
        if p < num_masks - num_masks // 5:
            mask[:] = (cell == source[p]) & (rng.random(num_points) > 0.1)
            mask[rng.integers(0, num_points, num_points // 500)] = True
        else:
            mask[:] = ((points - points[rng.integers(num_points)]) ** 2).sum(1) < rng.uniform(0.3, 0.8) ** 2
    return {"gt": gt, "masks": masks, "labels": label_of[source], "scores": rng.random(num_masks)}


def intersect_by_pairs(gt, masks, labels, scores, count=np.count_nonzero):
    """Overlaps of each mask, one pass over all points each: [{gt id of its class: points}], [points on void].

    The masks of the true instances are made once. NumPy counts a bool array by count_nonzero or, slower, by sum.
    """
    instances = {i: gt == i for i in np.unique(gt).tolist() if i // 1000 in NYU40_IDS[2:]}
    void = ~np.isin(gt // 1000, NYU40_IDS[2:])
    overlaps = [{i: int(count(np.logical_and(own, mask))) for i, own in instances.items() if i // 1000 == label}
                for mask, label in zip(masks, labels.tolist())]
    return overlaps, [int(count(np.logical_and(void, mask))) for mask in masks]


# ------------------------------------------------------------------------------------------------------------- rows


def voxelise_rows(device):
    """data.voxelise."""
    coord, _ = box_room(1_000_000)
    ours, unique, hashed = timed(lambda: voxelise(coord, 0.02), lambda: voxelise_by_unique(coord, 0.02),
                                 lambda: voxelise_by_hash(coord, 0.02), repeats=5)
    what = "voxelise 1 M points at 2 cm"
    note = f"{len(voxelise(coord, 0.02)[0]):,} voxels; NumPy {np.__version__}"
    return [Row(what, ms(ours), f"{ms(unique)} np.unique", unique / ours, 20, note),
            Row(what, ms(ours), f"{ms(hashed)} hash, argsort", hashed / ours, 1)]


def projection_rows(device):
    """fusion.link_views."""
    views = scan(device=device)
    arrays = [t.double().cpu().numpy() for t in views]
    ours, alternative = timed(lambda: link_views(*views), lambda: link_by_numpy(*arrays), device=device)
    links, n = link_views(*views), len(views[0])
    theirs = np.concatenate([view * n + rows for view, (rows, _) in enumerate(link_by_numpy(*arrays))])
    differ = len(np.setxor1d((links.view * n + links.point).cpu().numpy(), theirs))
    return [Row("project 150 k points, 20 views 320x240", ms(ours), f"{ms(alternative)} NumPy loop",
                alternative / ours, 8, f"{len(theirs):,} links, {differ} differ")]


def sampling_rows(device):
    """fusion.sample_views."""
    views, image_size, rows = scan(device=device), (320, 240), []
    links, count = link_views(*views), len(views[0])
    for channels in (64, 256):
        maps = torch.randn(20, channels, 60, 80, device=device)
        functions = [lambda f=f, m=maps: f(m, links, image_size, count) for f in (sample_views, sample_densely)]
        ours, alternative = timed(*functions, repeats=3, device=device)
        what = f"sample 20 maps of {channels} channels"
        rows.append(Row(what, ms(ours), f"{ms(alternative)} dense", alternative / ours,
                        note="150 k points, maps 80x60"))
        ours, alternative = (extra_memory(f, device) for f in functions)
        if ours is not None:
            rows.append(Row(f"{what}: memory", f"{ours:.0f} MB", f"{alternative:.0f} MB dense",
                            alternative / max(ours, 1)))
    return rows


def rooms_rows(device):
    """rooms.write_scene."""
    with tempfile.TemporaryDirectory() as folder:
        names = iter(range(1000))
        (seconds,) = timed(lambda: write_scene(Path(folder, f"room_{(i := next(names))}"), i), repeats=5)
    return [Row("generate rooms", f"{1 / seconds:.2f} / s", note="one process, points and 8 frames of 160x120")]


def steps_rows(device, preset="small"):
    """Loading of a training item, and training steps beside the 3D baseline's."""
    with tempfile.TemporaryDirectory() as folder:
        load, size = training_loads(folder, preset, device)
        rows, seconds, batches = [], dict.fromkeys(load, np.inf), {}
        for epoch, (what, function) in enumerate([*load.items()] * 3):  # the first time is left out
            start = time.perf_counter()
            batches[what] = function(epoch)
            seconds[what] = seconds[what] if epoch < len(load) else min(seconds[what], time.perf_counter() - start)
    scenes = len(batches["3D only"]["names"])
    kept = "scenes and frames kept in memory" if preset == "small" else "nothing kept in memory"
    for what, s in seconds.items():
        rows.append(Row(f"load a training item, {what}", ms(s / scenes), f"{ms(seconds['3D only'] / scenes)} 3D only",
                        seconds["3D only"] / s, None, kept))
    repeats = 1 if (preset, device) == ("base", "cpu") else 3
    bounds, batches = stage_epochs(), {what: to_device(batch, device) for what, batch in batches.items()}
    for stage in (1, 3) if preset == "small" else (3,):
        steps = [train_step("bifusion", batches["images"], bounds[stage][1], device, preset)[0],
                 train_step("baseline", batches["3D only"], bounds[stage][1], device, preset)[0]]
        ours, baseline = timed(*steps, repeats=repeats, device=device)
        rows.append(Row(f"training step, stage {stage}", f"{1 / ours:.2f} / s", f"{1 / baseline:.2f} / s baseline",
                        baseline / ours, None, size))
    steps = [train_step(*case, bounds[2][1], device, preset)[0]
             for case in (("bifusion", batches["cached maps"]), ("baseline", batches["3D only"]))]
    ours, baseline = timed(*steps, repeats=repeats, device=device)
    loaded = (seconds["3D only"] + baseline) / (seconds["cached maps"] + ours)
    rows.append(Row("training step, stage 2, cached maps", f"{1 / ours:.2f} / s", f"{1 / baseline:.2f} / s baseline",
                    baseline / ours, 0.8, f"{ours / baseline:.2f} times the baseline's, at most 1.25 wanted; "
                    f"{1 / loaded:.2f} with loading"))
    return rows


def training_loads(folder, preset, device):
    """Made-up training scenes: {what is loaded: function of an epoch -> collated batch of the recipe}, and their size.

    "images" are decoded, "cached maps" are those of a frozen tower on disk (of random weights), "3D only" has no view.
    """
    recipe = RECIPES[preset]
    scenes, voxels, superpoints, views = SIZES[torch.device(device).type]
    if preset == "small":
        scenes, views = 4, recipe["views"]
    for i in range(scenes):
        path = Path(folder, "train", f"room_{i}")
        if preset == "small":
            write_scene(path, i, recipe["image_size"])
        else:
            write_box_scene(path, i, voxels, superpoints, views)
    sets = {what: SceneDataset(folder, "train", voxel_size=recipe["voxel_size"], image_size=recipe["image_size"],
                               augment=True, views=0 if what == "3D only" else views)
            for what in ("3D only", "images", "cached maps")}
    frozen = sets["cached maps"]
    tower = build_model("bifusion", preset, 20, clip_weights=SCRATCH).tower.eval().to(device)
    frozen.use(views, FeatureCache(Path(folder, "cache"), tower, recipe["image_size"], limit_gb=50), vary_images=False)
    frozen.cache.fill([(path, i) for path in frozen.folders for i in usable_frames(path)[0]], device)

    def load(what, epoch):
        if preset != "small":  # ScanNet does not fit into the memory that a loading process keeps
            sets[what]._cache, sets[what]._cached_bytes = {}, 0
        return collate([sets[what][(epoch, i)] for i in range(scenes)])

    count = len(load("3D only", 0)["coord"])
    return ({what: lambda epoch, what=what: load(what, epoch) for what in sets},
            f"{scenes} scene{'s' * (scenes > 1)}, {count:,} voxels, {scenes * views} views")


def train_step(name, batch, epoch, device, preset="small", precision="fp32", checkpointing=False, guarded=True):
    """A function that does one step of train.py's loop with this model in the setting of this epoch, and the model.

    The image tower is of random weights, but protected as a pretrained one. Every step draws the same queries and
    blanks no scene.
    """
    setting = replace(setting_at(epoch, pretrained=True), blank=0.0)
    model = build_model(name, preset, 20, clip_weights=SCRATCH).to(device)
    model.precision = precision
    if name == "bifusion":
        model.tower.pretrained, model.tower.precision, model.tower.checkpointing = True, precision, checkpointing
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05), fused=True)
    apply_setting(model, setting)
    model.train()
    guard = Guard(model, "unused")

    def step():
        torch.manual_seed(0)
        if guarded:
            guard.remember()
        out = model(batch)
        with record_function("losses"):
            terms = loss_terms(out, batch, setting)
            loss = weighted_sum(terms, LOSS_WEIGHTS[name])
        with record_function("optimiser"):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with record_function("optimiser"):
            norm = clip_by_branch(model, setting.clip)
            if guarded:
                scalars = [loss, *terms.values(), *norm.values()]
                assert all_finite(torch.stack([scalar.detach() for scalar in scalars]).tolist())
            optimizer.step()

    return step, model


def parts_rows(device, preset="small"):
    """Where the time of a step goes, the floor beside each part; sampling at full size; memory; on a GPU, its use."""
    rows, bounds = [], stage_epochs()
    with tempfile.TemporaryDirectory() as folder:
        load, size = training_loads(folder, preset, device)
        batches, seconds = {}, {}
        for what in load:
            start = time.perf_counter()
            batches[what] = load[what](0)
            seconds[what] = time.perf_counter() - start
            batches[what] = to_device(batches[what], device)
    for stage, what in ((2, "cached maps"), (3, "images")):
        step, model = train_step("bifusion", batches[what], bounds[stage][1], device, preset)
        (plain,) = timed(step, repeats=1, device=device)
        split = split_step(step, model, device)
        whole, floor, gather = (sum(sum(cost[key] for key in keys) for cost in split.values())
                                for keys in (("forward", "backward"), ("product",), ("gather",)))
        name = f"step of {preset}, stage {stage}"
        rows.append(Row(f"{name}: data", ms(seconds[what]), note=f"{what}; in worker processes, beside the step"))
        for part, cost in split.items():
            own = cost["forward"] + cost["backward"]
            note = f"forward {ms(cost['forward'])}, backward {ms(cost['backward'])}"
            note += f"; gathers of sparse convolutions {ms(cost['gather'])}" * (cost["gather"] > 0)
            rows.append(Row(f"{name}: {part}", f"{ms(own)} {own / whole:.1%}", f"{ms(cost['product'])} products",
                            note=note))
        other = 1 - (floor + gather) / whole
        rows.append(Row(f"{name}: all", ms(whole), f"{ms(floor)} products", (floor + gather) / whole, 0.85,
                        f"{other:.1%} is no convolution, product or attention, at most 15 % wanted; the gathers of "
                        f"sparse convolutions, {gather / whole:.1%}, count as convolution; {size}"))
        if device != "cpu":
            rows.append(Row(f"{name}: GPU busy", f"{ms(plain)} elapsed", f"{ms(whole)} kernels", whole / plain, 0.85))
            other_precision = train_step("bifusion", batches[what], bounds[stage][1], device, preset, "bf16")[0]
            full, half = timed(step, other_precision, repeats=3, device=device)
            rows.append(Row(f"{name}: bf16", ms(half), f"{ms(full)} fp32", full / half, note="tower and decoder"))
            del other_precision
    step3 = plain
    del step, model
    views, image_size = scan(device=device), (320, 240)  # 150 k points, 20 views
    maps = torch.randn(20, 256, 30, 40, device=device, requires_grad=True)

    def sampling():
        sample_views(maps, link_views(*views), image_size, len(views[0]))[0].sum().backward()

    (seconds,) = timed(sampling, repeats=3, device=device)
    voxels = len(batches["images"]["coord"])
    share = step3 * len(views[0]) / voxels
    if preset == "base":
        rows.append(Row("project and sample 20 views, 150 k points, 256 channels", ms(seconds),
                        f"{ms(share)} step", share / seconds, 10,
                        f"both ways; the step is stage 3's, times {len(views[0]) / voxels:.2f} for its voxels"))
    mine, theirs = (extra_memory(train_step("bifusion", batches["images"], bounds[3][1], device, preset,
                                            checkpointing=c)[0], device) for c in (True, False))
    if mine is not None:
        rows.append(Row(f"step of {preset}, stage 3: memory", f"{mine:.0f} MB --checkpoint-tower", f"{theirs:.0f} MB",
                        theirs / max(mine, 1), note=f"gradients and optimiser included, weights not; {size}"))
    return rows


def guard_rows(device):
    """A training step of preset small, whole recipe, with and without what guard.py does in it."""
    recipe = RECIPES["small"]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(recipe["batch_size"]):
            write_scene(Path(folder, "train", f"room_{i}"), i, recipe["image_size"])
        scenes = SceneDataset(folder, "train", voxel_size=recipe["voxel_size"], image_size=recipe["image_size"],
                              augment=True, views=recipe["views"])
        batch = to_device(collate([scenes[i] for i in range(len(scenes))]), device)
    rows = []
    for stage in (1, 3):
        epoch = stage_epochs()[stage][0]
        guarded, bare = (train_step("bifusion", batch, epoch, device, guarded=g)[0] for g in (True, False))
        ours, without = timed(guarded, bare, repeats=7, device=device)
        model = build_model("bifusion", "small", 20).to(device)
        guard, scalars = Guard(model, "unused"), [torch.ones((), device=device) for _ in range(13)]
        (alone,) = timed(lambda: (guard.remember(), all_finite(torch.stack(scalars).tolist())), repeats=50,  # noqa: B023
                         device=device)
        rows.append(Row(f"guarded training step, stage {stage}", ms(ours), f"{ms(without)} bare", without / ours, 0.98,
                        f"the guard's work alone: {1e6 * alone:.0f} us, {100 * alone / without:.3f} % of a step"))
    return rows


def scannet_rows(device):
    """scannet.read_sens and scannet.prepare."""
    with tempfile.TemporaryDirectory() as folder:
        path, count, rows = Path(folder, "a.sens"), 40, []
        write_sens(path, count)
        functions = [lambda k=k: list(read_sens(path, k)[1]) for k in (1, 20)]
        every, some, plain = timed(*functions, lambda: sens_by_struct(path), repeats=3)
        for k, seconds in ((1, every), (20, some)):
            rows.append(Row(f"read a .sens, wanted: 1 frame of {k}", ms(seconds / count), f"{ms(plain / count)} struct",
                            plain / seconds, 3, f"a frame passed; {count} of 1296x968 and 640x480"))
        write_scans(Path(folder, "scans"), 6)
        start = time.perf_counter()
        made = prepare(Path(folder, "scans"), Path(folder, "out"), every=20, workers=2)["made"]
        rows.append(Row("prepare ScanNet, 2 processes", f"{60 * made / (time.perf_counter() - start):.1f} / min",
                        note="scans of 150 k points, 300 k faces, 400 frames of which 20 are kept"))
    return rows


def instance_ap_rows(device):
    """metrics.instance_ap, matching and all, against the overlaps alone."""
    scenes = [instance_scene(seed) for seed in range(10)]
    ours, by_sum, by_count = timed(lambda: instance_ap(scenes, NYU40_IDS[2:]),
                                   lambda: [intersect_by_pairs(**scene, count=np.sum) for scene in scenes],
                                   lambda: [intersect_by_pairs(**scene) for scene in scenes], repeats=3)
    pairs = differ = 0
    for scene in scenes:
        ids, instance, _ = _unique_ids(scene["gt"])
        counts = _intersections(scene["masks"], np.arange(len(scene["masks"])), instance, len(ids))
        overlaps, void = intersect_by_pairs(**scene)
        for count, overlap, on_void in zip(counts, overlaps, void):
            found = [*count[np.searchsorted(ids, list(overlap))], count[~np.isin(ids // 1000, NYU40_IDS[2:])].sum()]
            pairs += len(found)
            differ += sum(a != b for a, b in zip(found, [*overlap.values(), on_void]))
    note = f"{pairs:,} overlaps, {differ} differ; ours with matching"
    what = "instance_ap 10 scenes x 150 k points x 60 masks"
    return [Row(what, ms(ours), f"{ms(by_sum)} NumPy pairs, sum", by_sum / ours, 5, note),
            Row(what, ms(ours), f"{ms(by_count)} NumPy pairs, count_nonzero", by_count / ours)]


def decoder_rows(device):
    """model.QueryDecoder of base, forward and backward, 200 queries: time, and memory over superpoints."""
    sizes, rows = PRESETS["base"], []
    torch.manual_seed(0)
    decoder = QueryDecoder(sizes["dim"], num_classes=20, **sizes["decoder"]).to(device)
    decoder.choose_queries = lambda count: torch.randperm(count)[:200]

    def step(count, explicit=False):
        feat = torch.randn(count, sizes["dim"], device=device, requires_grad=True)

        def run():
            forward, Attention.forward = Attention.forward, attend_explicitly if explicit else Attention.forward
            try:
                sum(p["class_logits"].sum() + p["mask_logits"].square().sum() + p["score"].sum()
                    for p in decoder(feat)).backward()
            finally:
                Attention.forward = forward
        return run

    ours, explicit = timed(step(1500), step(1500, explicit=True), repeats=5, device=device)
    what = "decoder of base, 200 queries, forward + backward"
    rows.append(Row(f"{what}: 1,500 superpoints", ms(ours), f"{ms(explicit)} softmax written out", explicit / ours,
                    note=f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M parameters"))
    for count in (1500, 6000, 24000):
        mine, theirs = extra_memory(step(count), device), extra_memory(step(count, explicit=True), device)
        if mine is not None:
            rows.append(Row(f"{what}: memory, {count:,}", f"{mine:.0f} MB", f"{theirs:.0f} MB softmax written out",
                            theirs / max(mine, 1), note=f"{1024 * mine / count:.1f} kB a superpoint"))
    return rows


@torch.no_grad()
def control_rows(checkpoints, root, device):
    """AP of trained decoders beside that of instances made from the same model's class of each superpoint alone.

    One instance a superpoint, and one a connected piece of superpoints of one class; walls and floors are left out, the
    score is the mean probability of the class. Rows of text.
    """
    lines = [("checkpoint", "instances", "AP", "AP50", "AP25")]
    for path in checkpoints:
        model, config, _ = load_model(path, device)
        scenes = SceneDataset(root, "val", voxel_size=config.voxel_size, views=2 * config.views,
                              image_size=RECIPES[config.preset]["image_size"])
        judged = {"query decoder": InstanceAP(THINGS), "touching superpoints of one class": InstanceAP(THINGS),
                  "every superpoint": InstanceAP(THINGS)}
        for i in range(len(scenes)):
            batch = to_device(collate([scenes[i]]), device)
            out = model(batch)
            if "instances" not in out:
                raise SystemExit(f"{path}: its decoder is not trained yet; give stage2.pt or stage3.pt of a run")
            gt, *found = instances_of_scene(out["instances"][0][-1], batch, 0)
            judged["query decoder"].add(gt, *found)
            score, label = superpoint_means(out["logits"].softmax(1), batch).max(1)  # (S,)
            score, label = score.cpu().numpy(), label.cpu().numpy()
            superpoint, graph = batch["point_superpoint"].cpu().numpy(), superpoint_graph(batch).tocoo()
            graph.data *= label[graph.row] == label[graph.col]
            graph.eliminate_zeros()
            for name, piece in (("touching superpoints of one class", connected_components(graph, directed=False)[1]),
                                ("every superpoint", np.arange(len(label)))):
                things = np.unique(piece[~np.isin(label, STUFF)])
                first = np.array([np.flatnonzero(piece == t)[0] for t in things], int)
                masks = piece[superpoint] == things[:, None]
                mean = np.array([score[piece == t].mean() for t in things])
                judged[name].add(gt, masks, label[first], mean)
        for name, metric in judged.items():
            result = metric.result()
            lines.append((str(path), name, *(f"{result[key]:.3f}" for key in ("AP", "AP50", "AP25"))))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def ms(seconds):
    return f"{1000 * seconds:.1f} ms"


BENCHES = {"voxelise": voxelise_rows, "projection": projection_rows, "sampling": sampling_rows, "rooms": rooms_rows,
           "steps": steps_rows, "parts": parts_rows, "guard": guard_rows, "decoder": decoder_rows,
           "instance_ap": instance_ap_rows, "scannet": scannet_rows}
OF_PRESET = ("steps", "parts")  # those that depend on --preset


def table(rows):
    """The rows as aligned text."""
    lines = [("what", "ours", "alternative", "ratio", "goal", "note")]
    for row in rows:
        goal = "-" if row.goal is None else f">= {row.goal:g} {'met' if row.ratio >= row.goal else 'MISSED'}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append((row.what, row.ours, row.alternative, ratio, goal, row.note))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small",
                        help=f"of {' and '.join(OF_PRESET)}; base times these alone (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHES), metavar="PART",
                        help=f"which of {', '.join(BENCHES)} (default all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of PyTorch (default %(default)s); OMP_NUM_THREADS sets NumPy's as well")
    parser.add_argument("--device", default="cpu", help="for projection, sampling, steps, parts (default %(default)s)")
    parser.add_argument("--control", nargs="+", metavar="CHECKPOINT", help="instead: AP beside plain groupings")
    parser.add_argument("--data", default="data/rooms", help="of --control (default %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on the screen
    torch.set_num_threads(args.threads)
    if args.device != "cpu":
        torch.cuda.set_device(args.device)  # what synchronize and the memory's statistics act on
    if args.control:
        return print(control_rows(args.control, args.data, args.device))
    name = platform.processor() or platform.machine()
    if args.device != "cpu":
        name += ", " + torch.cuda.get_device_name(args.device)
    print(f"{os.cpu_count()} cores ({name}), {args.threads} threads, device {args.device}, torch {torch.__version__}, "
          f"spconv {importlib.metadata.version('spconv-cu118')}\n", flush=True)
    names = args.only or (BENCHES if args.preset == "small" else OF_PRESET)
    print(table([row for name in names
                 for row in BENCHES[name](args.device, *[args.preset] * (name in OF_PRESET))]))


if __name__ == "__main__":
    main()
