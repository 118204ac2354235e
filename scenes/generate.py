"""What the generators of rooms share: footprints, cameras, the scene folder written, splits made in parallel."""

import argparse
import inspect
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from tqdm import tqdm

FRAMES = 8
PITCHES = (0, 0.2), (0.3, 0.55)     # rad below the horizon, of cameras to choose from


def turn(vectors, yaw):
    """Vectors (..., 3) turned about z by `yaw` rad, one or (...). scipy's Rotation would change the last bits."""
    c, s = np.cos(yaw), np.sin(yaw)
    x, y, z = np.moveaxis(np.asarray(vectors), -1, 0)
    return np.stack([c * x - s * y, s * x + c * y, z], axis=-1)


def footprints_overlap(a, b, margin):
    """Whether two upright boxes (x, y, yaw, half width, half depth, low z, high z) come closer than `margin`."""
    def close(angle):                 # along this axis
        reach = sum(w * abs(math.cos(yaw - angle)) + d * abs(math.sin(yaw - angle)) for _, _, yaw, w, d, *_ in (a, b))
        return abs((b[0] - a[0]) * math.cos(angle) + (b[1] - a[1]) * math.sin(angle)) < margin + reach

    axes = (a[2], a[2] + math.pi / 2, b[2], b[2] + math.pi / 2)
    return min(a[6], b[6]) > max(a[5], b[5]) and all(map(close, axes))


def to_bytes(color):
    """Colours in [0, 1] to uint8."""
    return np.round(np.clip(color, 0, 1) * 255).astype(np.uint8)


def intrinsics_for(image_size, field_of_view):
    """Intrinsics (3, 3) of a (width, height) image with square pixels; `field_of_view` is horizontal, in rad."""
    width, height = image_size
    focal = width / 2 / math.tan(field_of_view / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def rays_of(intrinsics, image_size, offset=(0.0, 0.0)):
    """A ray (H * W, 3) a pixel, in the camera's frame, z = 1."""
    u, v = np.meshgrid(np.arange(image_size[0]) + offset[0], np.arange(image_size[1]) + offset[1])
    return np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3) @ np.linalg.inv(intrinsics).T


def look(position, yaw, pitch):
    """camera_to_world (4, 4) of a camera at `position` looking along `yaw`, `pitch` rad below the horizon."""
    forward = np.array([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), -math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0])
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, position], axis=1)
    return pose


def choose_views(cast, places, coord, intrinsics, image_size, rng, reach, count=FRAMES, pitches=PITCHES):
    """`count` cameras, camera_to_world (4, 4), that together see much of coord (N, 3), some of the points of a room.

    Greedy: out of all places (P, 3) x 12 directions x 2 pitches, always the view that shows most points not shown so
    far. cast: function of origin (3,) and directions (R, 3) that gives t (R,) of the first hit.  reach: m, no point
    counts from farther away.
    """
    poses, shown = [], []
    for place in places:
        near = (cast(place, coord - place) > 0.98) & (np.linalg.norm(coord - place, axis=1) < reach)
        for yaw in rng.uniform(0, 2 * math.pi) + np.arange(12) * math.pi / 6:
            for pitch in [rng.uniform(*pair) for pair in pitches]:
                poses.append(look(place, yaw, pitch))
                pixel = (coord - place) @ poses[-1][:3, :3] @ intrinsics.T       # (N, 3): u z, v z, z
                inside = (pixel > 0) & (pixel < pixel[:, 2:] * (image_size[0] - 1, image_size[1] - 1, 2))
                shown.append(near & inside.all(axis=1))
    shown, chosen = np.array(shown), []
    for _ in range(count):
        best = shown.sum(axis=1).argmax()
        chosen.append(poses[best])
        shown &= ~shown[best]
    return chosen


def save_scene(folder, points, intrinsics, frames):
    """Write a scene folder: points, a dict of arrays by name; frames, of (color u8, depth m, camera_to_world)."""
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    for name, array in points.items():
        np.save(folder / f"{name}.npy", array)
    for i, (color, depth, camera_to_world) in enumerate(frames):
        Image.fromarray(color).save(folder / "color" / f"{i}.jpg", quality=92, subsampling=0)
        Image.fromarray(np.round(depth * 1000).astype(np.uint16)).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", camera_to_world, fmt="%.6f")
    camera = np.eye(4)
    camera[:3, :3] = intrinsics
    for name in ("color", "depth"):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", camera, fmt="%.6f")


def _write_whole(write_scene, job):
    """Write the room of a job (folder, seed) beside its place and rename it there: it exists whole or not at all."""
    final, seed = job
    try:
        with TemporaryDirectory(dir=final.parent.parent / ".unfinished", ignore_cleanup_errors=True) as work:
            write_scene(Path(work, "room"), seed)
            Path(work, "room").rename(final)
    except OSError:
        if not final.is_dir():        # unless another run was faster: it has written the same bytes
            raise


def read_spec(root):
    """What the rooms of a folder were made with: the dict of its rooms.json, {} without one; broken: ValueError."""
    spec = Path(root, "rooms.json")
    try:
        return dict(json.loads(spec.read_text())) if spec.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec}: expected a JSON object, found {error}; delete {root} and make it anew") from error


def generate(root, write_scene, counts, generator, seed, workers, image_size, **more):
    """Make the rooms of <root>/<split> that are not there yet, and return their number.

    root: folder of the data set; <root>/rooms.json records what it was made with.  write_scene: function of folder,
    seed (3 int), image_size and more.  counts: {split: number of rooms}; rooms beyond it are left alone.  generator:
    which, and its version.  seed: int >= 0.  workers: number of processes, None: one a CPU core.  image_size: (width,
    height) of the frames.  more: what else the rooms are made with.

    Raises ValueError: a number is out of range, or root holds other scenes, or rooms made with other settings.
    """
    root, workers = Path(root), os.cpu_count() if workers is None else workers
    if min(*counts.values(), seed) < 0 or workers < 1 or min(image_size) < 8:
        raise ValueError(f"expected {', '.join(counts)} and seed >= 0, workers >= 1 and images of 8x8 or more; got "
                         f"{counts}, seed {seed}, workers {workers}, images {image_size}")
    asked, found = {"generator": generator, "seed": seed, "image_size": list(image_size), **more}, read_spec(root)
    if found and found != asked:
        raise ValueError(f"{root} holds rooms made with {found}, asked for {asked}; "
                         f"choose another folder with --out or delete {root}")
    if not found and any(any(root.glob(f"{split}/[!.]*")) for split in counts):
        raise ValueError(f"{root} holds scenes but no rooms.json, so they are not generated rooms; "
                         "choose another folder with --out")
    for name in (*counts, ".unfinished"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not found:
        (root / "rooms.json").write_text(json.dumps(asked) + "\n")
    rooms = [(root / split / f"room_{i:04d}", (seed, number, i))
             for number, (split, count) in enumerate(counts.items()) for i in range(count)]
    jobs = [room for room in rooms if not room[0].is_dir()]
    with ProcessPoolExecutor(workers) as pool:                         # starts no process before its first job
        run = map if min(workers, len(jobs)) <= 1 else pool.map
        work = partial(_write_whole, partial(write_scene, image_size=tuple(image_size), **more))
        list(tqdm(run(work, jobs), "rooms", len(jobs), unit="room", disable=not jobs))
    shutil.rmtree(root / ".unfinished", ignore_errors=True)            # also what a killed run has left
    return len(jobs)


def complete(generate, root):
    """Generate the rooms of a folder that are not there yet; those made with another seed are completed with theirs."""
    spec = read_spec(root)
    if spec or not Path(root, "train").exists():
        generate(root, **{name: spec[name] for name in spec.keys() & inspect.signature(generate).parameters.keys()})


def main(generate, module):
    """The command line of a generator; its flags and their defaults are the arguments of its `generate`."""
    parser = argparse.ArgumentParser(f"python -m {module}")
    for name, default in ((name, flag.default) for name, flag in inspect.signature(generate).parameters.items()):
        if name not in ("workers", "image_size"):
            parser.add_argument(f"--{name}", default=default, type=type(default), help="default: %(default)s")
    args = vars(parser.parse_args())
    try:
        made = generate(**args)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args['out']}: {made} rooms made")
