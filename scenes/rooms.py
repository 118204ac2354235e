"""Generated rooms: the default data, as scene folders with points, labels and posed RGB-D frames.

    python -m scenes.rooms --out data/rooms --train 32 --val 12 --seed 0

A room is a floor, four walls, furniture made of boxes and flat things on the walls, in ScanNet's 20 classes. Points are
sampled on the surfaces, frames are ray cast exactly, both with sensor-like noise. The same seed gives the same bytes,
whatever the number of processes. Frame: metres, +z up, the room spans (0, 0, 0) to its size, without a ceiling.

What the data can and cannot show: the rooms are BUILT so that images carry something which voxels cannot. The classes
of one group in GROUPS (cabinet and bookshelf, table and desk, ...) share one shape and one colour distribution and
differ only in a surface pattern (stripes, checks, dots) with a wavelength of 6 to 8 cm. All patterns have the same mean
and variance, and the points' colours are smeared by COLOR_DRIFT, so a network that sees only points can find the group
but has to guess within it; in the frames the pattern is plain to see. A gain of the image branch on these rooms shows
that fusion works, not how much it would gain on real scans.
"""
import argparse
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from scenes.folder import CLASS_NAMES

GENERATOR = 1               # goes into rooms.json: raise it whenever a change alters the bytes of a scene
POINTS_PER_M2 = 1000
POINT_NOISE = 0.003         # m, standard deviation on each axis
COLOR_DRIFT = 0.03          # m; a point's colour is taken about so far from it, as pose drift smears real scans.
                            # Without it the colours of 5 cm voxels give the pattern away, of 8 cm voxels in part
COLOR_NOISE = 0.015         # standard deviation, colours in [0, 1]
DROPPED_DEPTH = 0.03        # share of pixels without a reading
FRAMES = 8
PLACE_TRIES = 200           # for one piece of furniture
VIEW_RANGE = 3.0            # m; frames are chosen for what they see within it: patterns are resolved that far
PATCH = 0.5                 # m, edge of a superpoint
SPLITS = ("train", "val")
WALL, FLOOR = CLASS_NAMES.index("wall"), CLASS_NAMES.index("floor")
PATTERNS = ("stripes", "checks", "dots")
CONTRAST = 0.25             # a pattern is colour + CONTRAST on half of the area and colour - CONTRAST on the other half


# A shape turns its dimensions, drawn from the ranges in GROUPS, into (list of boxes (2, 3): centre and half size;
# footprint width, depth; low z, high z), metres, in the piece's own frame: origin on the floor in the middle of the
# footprint, +y is the back, z up.

def _box(x, y, z):
    """A box from three (low, high) intervals; a number is the width about 0."""
    low, high = np.array([i if isinstance(i, tuple) else (-i / 2, i / 2) for i in (x, y, z)]).T
    return np.stack([(low + high) / 2, (high - low) / 2])


def _legs(w, d, height, thick=0.05):
    """Four legs in the corners of a w x d footprint."""
    sides = [[(-edge / 2, thick - edge / 2), (edge / 2 - thick, edge / 2)] for edge in (w, d)]
    return [_box(x, y, (0, height)) for x in sides[0] for y in sides[1]]


def _block(w, d, height):
    return [_box(w, d, (0, height))], w, d, 0.0, height


def _slab_with_back(w, d, seat, back, thick):
    return [_box(w, (-d / 2, d / 2 - thick), (0, seat)), _box(w, (d / 2 - thick, d / 2), (0, back))], w, d, 0.0, back


def _tabletop(w, d, height):
    return [_box(w, d, (height - 0.05, height)), *_legs(w, d, height - 0.05)], w, d, 0.0, height


def _chair(w, seat, top):
    back = _box(w, (w / 2 - 0.06, w / 2), (seat, top))
    return [_box(w, w, (seat - 0.06, seat)), back, *_legs(w, w, seat - 0.06)], w, w, 0.0, top


def _panel(w, thick, low, high):
    return [_box(w, thick, (low, high))], w, thick, low, high


# (class names, where it stands, shape, ranges of its arguments): the i-th class of a group wears PATTERNS[i]
GROUPS = (
    (("cabinet", "bookshelf"), "wall", _block, ((0.7, 1.1), (0.3, 0.45), (1.5, 2.0))),
    (("refrigerator", "otherfurniture"), "wall", _block, ((0.5, 0.7), (0.5, 0.65), (0.9, 1.3))),
    (("counter", "bathtub"), "wall", _block, ((1.2, 1.6), (0.55, 0.7), (0.55, 0.8))),
    (("bed", "sofa"), "wall", _slab_with_back, ((1.4, 1.8), (0.85, 1.05), (0.38, 0.46), (0.75, 0.95), (0.12, 0.2))),
    (("toilet", "sink"), "wall", _slab_with_back, ((0.4, 0.52), (0.5, 0.62), (0.4, 0.5), (0.75, 0.9), (0.14, 0.2))),
    (("table", "desk"), "free", _tabletop, ((0.9, 1.4), (0.6, 0.8), (0.68, 0.78))),
    (("chair",), "free", _chair, ((0.42, 0.52), (0.42, 0.48), (0.85, 1.0))),
    (("door", "curtain", "shower curtain"), "flat", _panel, ((0.8, 1.1), (0.03, 0.06), (0.0, 0.0), (1.95, 2.1))),
    (("window", "picture"), "flat", _panel, ((0.7, 1.1), (0.03, 0.06), (1.0, 1.15), (1.75, 2.0))),
)
CLASSES = {name: (place, shape, ranges, pattern if len(names) > 1 else None)
           for names, place, shape, ranges in GROUPS for pattern, name in enumerate(names)}


def pattern_sign(pattern, u, v):
    """+1 or -1 (f32), each on exactly half of the plane: the only thing that tells the classes of a group apart.

    pattern: index into PATTERNS, int or int array; u, v: in-plane position in wavelengths, floats of one shape.
    """
    stripes = u % 1 < 0.5
    # the lattice of the checks is scaled by sqrt 2 so that all three patterns have the same shortest wavelength, 1
    checks = (u / math.sqrt(2) % 1 < 0.5) == (v / math.sqrt(2) % 1 < 0.5)
    dots = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 1 / (2 * math.pi)
    return np.where(np.choose(pattern, (stripes, checks, dots)), np.float32(1), np.float32(-1))


def _turn(vectors, yaw):
    """Vectors (N, 3) turned about z by `yaw` rad, one for all or (N,). scipy's Rotation would change the last bits."""
    c, s = np.cos(yaw), np.sin(yaw)
    x, y, z = vectors.T
    return np.stack([c * x - s * y, s * x + c * y, z], axis=1)


def _footprints_overlap(a, b, margin):
    """Whether two upright boxes (x, y, half width, half depth, yaw, low z, high z) come closer than `margin`."""
    if min(a[6], b[6]) <= max(a[5], b[5]):
        return False
    for angle in (a[4], a[4] + math.pi / 2, b[4], b[4] + math.pi / 2):      # is one of these a separating axis?
        reach = sum(w * abs(math.cos(yaw - angle)) + d * abs(math.sin(yaw - angle)) for _, _, w, d, yaw, *_ in (a, b))
        if abs((b[0] - a[0]) * math.cos(angle) + (b[1] - a[1]) * math.sin(angle)) >= margin + reach:
            return False
    return True


def _try_place(rng, size, place, width, depth, z0, z1, taken):
    """A free (x, y, yaw) for a piece and the upright box it keeps clear, or None if none turns up."""
    for _ in range(PLACE_TRIES):
        if place == "free":
            yaw = rng.uniform(-math.pi, math.pi)
            c, s = abs(math.cos(yaw)), abs(math.sin(yaw))
            rx, ry = (c * width + s * depth) / 2, (s * width + c * depth) / 2
            x, y = rng.uniform(rx, size[0] - rx), rng.uniform(ry, size[1] - ry)
        else:                         # back to a wall: 0 north (y = size), 1 west (x = 0), 2 south, 3 east
            wall = int(rng.integers(4))
            along = rng.uniform(width / 2, size[wall % 2] - width / 2)
            off = size[1 - wall % 2] - depth / 2 if wall in (0, 3) else depth / 2
            (x, y), yaw = ((along, off), (off, along))[wall % 2], wall * math.pi / 2
        clear = 0.4 if place == "flat" else depth / 2     # nothing may stand close in front of a flat thing
        keep = (x, y, width / 2, clear, yaw, z0, z1)
        if not any(_footprints_overlap(keep, other, 0.05) for other in taken):
            return (x, y, yaw), keep
    return None


def make_room(rng):
    """Furnish a room at random (rng: numpy Generator, the only source of chance).

    Returns:
        dict. Things: row 0 is the floor, row 1 the walls, then the pieces. Boxes: row 0 is the shell, floor and walls
        seen from inside; then the parts of the pieces.
            size (3,) m; thing_label (T,) class index; thing_color (T, 3) mean colour in [0, 1]; thing_pattern (T,)
            index into PATTERNS, not worn by floor and walls; thing_wavelength (T,) m; thing_phase (T, 2) in
            wavelengths; box_center, box_half (B, 3) m; box_yaw (B,) rad, turns the box's frame to the world's about z;
            box_thing (B,) row of the thing (meaningless for the shell).
    """
    def draw(name):
        _, shape, ranges, _ = CLASSES[name]
        return name, shape(*(rng.uniform(*r) for r in ranges))

    size = np.array([rng.uniform(3.4, 4.5), rng.uniform(3.4, 4.5), 2.4])
    standing = [name for name, (place, *_) in CLASSES.items() if place != "flat"]
    flat = [name for name, (place, *_) in CLASSES.items() if place == "flat"]
    # drawn without replacement, so all classes occur about equally often
    names = list(rng.permutation(standing)[:rng.integers(7, 11)])
    panels = [*rng.permutation(flat), flat[rng.integers(len(flat))]]
    pieces = [draw(name) for name in panels[:rng.integers(3, 7)]]
    pieces += sorted((draw(name) for name in names), key=lambda piece: -piece[1][1] * piece[1][2])  # large ones first
    labels, patterns, taken = [FLOOR, WALL], [0, 0], []
    boxes = [(*size / 2, *size / 2, 0.0, 0)]
    for name, (parts, width, depth, z0, z1) in pieces:
        found = _try_place(rng, size, CLASSES[name][0], width, depth, z0, z1, taken)
        if found is None:             # a piece that finds no place is left out
            continue
        (x, y, yaw), keep = found
        taken.append(keep)
        for center, half in parts:
            boxes.append((*(_turn(center[None], yaw)[0] + (x, y, 0)), *half, yaw, len(labels)))
        labels.append(CLASS_NAMES.index(name))
        pattern = CLASSES[name][3]      # None: alone in its group, wears any
        patterns.append(int(rng.integers(len(PATTERNS))) if pattern is None else pattern)
    boxes, count = np.array(boxes), len(labels)
    return {
        "size": size, "thing_label": np.array(labels), "thing_pattern": np.array(patterns),
        "thing_color": rng.uniform(0.32, 0.68, (count, 3)),
        "thing_wavelength": rng.uniform(0.06, 0.08, count), "thing_phase": rng.uniform(0, 1, (count, 2)),
        "box_center": boxes[:, 0:3], "box_half": boxes[:, 3:6], "box_yaw": boxes[:, 6],
        "box_thing": boxes[:, 7].astype(int)}


def _to_box(room, box, points):
    """World positions (N, 3) in the frame of `box`: one box for all, or an (N,) array of boxes."""
    return _turn(points - room["box_center"][box], -room["box_yaw"][box])


def inside_boxes(room, points, margin=0.0):
    """(N,) bool, True where a point (N, 3) lies in any part of a piece, grown by `margin` metres on all sides."""
    inside = np.zeros(len(points), dtype=bool)
    for box in range(1, len(room["box_half"])):
        inside |= (np.abs(_to_box(room, box, points)) < room["box_half"][box] + margin).all(axis=1)
    return inside


def _surface(room, box, axis, local):
    """Row of the thing (N,) and colour (N, 3) at local (N, 3) in the frame of box (N,), on a face across axis (N,)."""
    thing = np.where(box == 0, (axis != 2).astype(int), room["box_thing"][box])
    rows = np.arange(len(axis))
    u, v = local[rows, np.array([1, 0, 0])[axis]], local[rows, np.array([2, 2, 1])[axis]]
    scale, phase = 1 / room["thing_wavelength"][thing], room["thing_phase"][thing]
    sign = pattern_sign(room["thing_pattern"][thing], u * scale + phase[:, 0], v * scale + phase[:, 1])
    return thing, room["thing_color"][thing] + (CONTRAST * (thing > 1) * sign)[:, None]  # floor and walls are plain


def sample_points(room, rng):
    """Sample the surfaces of a room (as from make_room) that can be seen from inside it.

    Left out: faces that look down, and points whose position 1 cm in front of the surface is not free (a face on the
    floor, against a wall or against another box; a wall behind a cabinet).

    Returns:
        dict of shuffled arrays: coord (N, 3) f32 m; color (N, 3) u8; normal (N, 3) f32 unit, into the room;
        segment20 (N,) int32; instance (N,) int32, -1 for walls and floor; superpoint (N,) int32, 0..S-1, a patch of
        about PATCH on one face.
    """
    half, yaw = room["box_half"], room["box_yaw"]
    box, axis = np.divmod(np.arange(6 * len(half)) // 2, 3)                      # of each face
    sign = np.tile((-1, 1), 3 * len(half))
    inward = np.where(box == 0, -1, 1)                                           # the shell is seen from inside
    area = 4 * half[box].prod(axis=1) / half[box, axis] * ~((axis == 2) & (sign * inward < 0))
    face = np.repeat(np.arange(len(box)), np.round(area * POINTS_PER_M2).astype(int))
    box, axis, sign, inward = box[face], axis[face], sign[face], inward[face]    # of each point
    rows = np.arange(len(face))
    unit = rng.uniform(-1, 1, (len(face), 3))                                    # place in the box, faces at -1 and 1
    unit[rows, axis] = sign
    normal = np.zeros_like(unit)
    normal[rows, axis] = sign * inward
    normal = _turn(normal, yaw[box])
    coord = _turn(unit * half[box], yaw[box]) + room["box_center"][box]
    front = coord + 0.01 * normal
    free = ((front > 0) & (front < room["size"])).all(axis=1) & ~inside_boxes(room, front)
    order = rng.permutation(np.flatnonzero(free))
    box, axis, sign, unit, coord, normal = (a[order] for a in (box, axis, sign, unit, coord, normal))
    drift = rng.normal(0, COLOR_DRIFT, unit.shape)
    thing, color = _surface(room, box, axis, unit * half[box] + drift)
    # superpoints: equal patches of each face; a leg, thin in two directions, is one patch
    patches = np.maximum(1, np.round(2 * half[box] / PATCH))
    patch = np.minimum(np.floor((unit + 1) / 2 * patches), patches - 1).astype(int)
    patch[np.arange(len(axis)), axis] = 0
    side = np.where(np.median(half, axis=1)[box] < 0.05, 0, 1 + 2 * axis + (sign > 0))
    key = np.ravel_multi_index((box, side, *patch.T), (len(half), 7, *patch.max(axis=0) + 1))
    normal = normal + rng.normal(0, 0.05, normal.shape)
    return {
        "coord": (coord + rng.normal(0, POINT_NOISE, coord.shape)).astype(np.float32),
        "color": _to_bytes(color + rng.normal(0, COLOR_NOISE, color.shape)),
        "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
        "segment20": room["thing_label"][thing].astype(np.int32),
        "instance": np.maximum(thing - 2, -1).astype(np.int32),
        "superpoint": np.unique(key, return_inverse=True)[1].ravel().astype(np.int32)}


def _to_bytes(color):
    """Colours in [0, 1] to uint8."""
    return np.round(np.clip(color, 0, 1) * 255).astype(np.uint8)


def cast_rays(room, origin, directions):
    """First hit of each ray: exact, by the slab method in each box's own frame.

    Args:
        origin: (3,) m, inside the room and outside of all boxes.  directions: (R, 3) of any length.

    Returns:
        t:   (R,) f32, the hit is origin + t * direction; inf where the ray leaves through the open top.
        box: (R,) int, row of the box hit; 0, the shell, also for a ray that hits nothing.

    Source: slab method, Kay & Kajiya (1986).
    """
    t, hit = np.full(len(directions), np.inf, dtype=np.float32), np.zeros(len(directions), dtype=int)
    turned = {}                                                       # yaw -> directions (3, R) in frames so turned
    for box, (half, yaw) in enumerate(zip(room["box_half"], room["box_yaw"])):
        if yaw not in turned:
            d = np.ascontiguousarray(_turn(directions, -yaw).T, np.float32)
            turned[yaw] = np.where(np.abs(d) < 1e-7, np.float32(1e-7), d)        # no division by zero
        inverse, start = 1 / turned[yaw], _to_box(room, box, origin[None])[0]
        a, b = ((side * half - start).astype(np.float32)[:, None] * inverse for side in (-1, 1))  # t at both planes
        enter, leave = np.minimum(a, b).max(axis=0), np.maximum(a, b).min(axis=0)
        if box == 0:                                                  # the rays start inside; there is no ceiling
            t = np.where(origin[2] + leave * turned[yaw][2] > room["size"][2] - 1e-4, np.float32(np.inf), leave)
            continue
        nearer = (enter <= leave) & (enter > 0) & (enter < t)
        t[nearer] = enter[nearer]
        hit[nearer] = box
    return t, hit


def intrinsics_for(image_size, field_of_view):
    """Intrinsics (3, 3) of a (width, height) image with square pixels; `field_of_view` is horizontal, in rad."""
    width, height = image_size
    focal = width / 2 / math.tan(field_of_view / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def look(position, yaw, pitch):
    """camera_to_world (4, 4) of a camera at `position` looking along `yaw`, `pitch` rad below the horizon."""
    forward = np.array([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), -math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return pose


def choose_views(room, coord, intrinsics, image_size, rng):
    """FRAMES cameras, camera_to_world (4, 4), in free space that together see much of coord (N, 3), some of the points.

    Greedy: out of 12 places x 12 directions x 2 pitches, always the view that shows most points not shown so far.
    """
    size = room["size"]
    places = rng.uniform((0.3, 0.3, 1.3), (size[0] - 0.3, size[1] - 0.3, 1.7), (400, 3))
    for margin in (0.3, 0.15, 0.02):            # 0.02 leaves free space in any room
        free = places[~inside_boxes(room, places, margin)][:12]
        if len(free):
            break
    poses, shown = [], []
    for place in free:
        t, _ = cast_rays(room, place, coord - place)
        near = (t > 0.98) & (np.linalg.norm(coord - place, axis=1) < VIEW_RANGE)
        start = rng.uniform(0, 2 * math.pi)
        for yaw in start + np.arange(12) * math.pi / 6:
            for pitch in (rng.uniform(0, 0.2), rng.uniform(0.3, 0.55)):
                poses.append(look(place, yaw, pitch))
                pixel = (coord - place) @ poses[-1][:3, :3] @ intrinsics.T       # (N, 3): u z, v z, z
                inside = (pixel > 0) & (pixel < pixel[:, 2:] * (image_size[0] - 1, image_size[1] - 1, 2))
                shown.append(near & inside.all(axis=1))
    shown, chosen = np.array(shown), []
    for _ in range(FRAMES):
        best = shown.sum(axis=1).argmax()
        chosen.append(poses[best])
        shown &= ~shown[best]
    return chosen


def render(room, camera_to_world, intrinsics, image_size, rng=None):
    """Render one frame: colour from four rays a pixel, depth from the ray through the pixel's centre.

    Args:
        camera_to_world: (4, 4).  intrinsics: (3, 3), pixels.  image_size: (width, height).
        rng: numpy Generator of exposure and noise; None renders without either.

    Returns:
        color: (H, W, 3) uint8.  depth: (H, W) f32, metres along the camera's z, 0 where there is no reading.
    """
    width, height = image_size
    origin, rotation = camera_to_world[:3, 3], camera_to_world[:3, :3]
    u, v = np.meshgrid(np.arange(width), np.arange(height))                                # (H, W)
    # the centre, then a rotated grid: four distinct rows and columns keep fine stripes from turning into moire
    offsets = ((0, 0), (-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375))
    pixels = np.stack([np.stack([u + du, v + dv, np.ones_like(u)], axis=-1) for du, dv in offsets])  # (5, H, W, 3)
    rays = (pixels.reshape(-1, 3) @ np.linalg.inv(intrinsics).T) @ rotation.T              # z = 1: t is the depth
    t, box = cast_rays(room, origin, rays)
    depth = np.where(np.isfinite(t[:height * width]), t[:height * width], 0).reshape(height, width)
    t, box, rays = t[height * width:], box[height * width:], rays[height * width:]         # (4 H W,)
    color = np.full((len(t), 3), 0.8)                                                      # what lies above the walls
    rows = np.flatnonzero(np.isfinite(t))
    box = box[rows]
    local = _to_box(room, box, origin + t[rows, None] * rays[rows])
    axis = np.abs(np.abs(local) - room["box_half"][box]).argmin(axis=1)
    # light from above and a little from one side
    turned = room["box_yaw"][box] + np.where(axis == 0, 0.0, math.pi / 2)
    light = np.where(axis == 2, 1.0, 0.82 + 0.08 * np.cos(2 * turned))
    color[rows] = _surface(room, box, axis, local)[1] * light[:, None]
    color = color.reshape(4, height, width, 3).mean(axis=0)
    if rng is not None:
        color = color * rng.uniform(0.8, 1.0) + rng.normal(0, COLOR_NOISE, color.shape)
        # well under a 5 cm visibility tolerance: 17 mm at 4 m
        depth = np.where(depth > 0, depth + rng.normal(0, 1, depth.shape) * (0.001 + 0.001 * depth ** 2), 0)
        depth[rng.random(depth.shape) < DROPPED_DEPTH] = 0
    return _to_bytes(color), depth.astype(np.float32)


def write_scene(folder, seed, image_size=(160, 120)):
    """Generate one room and write it as a scene folder, straight into `folder`, which must not exist.

    seed: int or sequence of int, for numpy's default_rng; image_size: (width, height) of colour and depth.
    """
    rng, folder = np.random.default_rng(seed), Path(folder)
    room = make_room(rng)
    points = sample_points(room, rng)
    intrinsics = intrinsics_for(image_size, math.radians(rng.uniform(66, 74)))
    views = choose_views(room, points["coord"][:4000].astype(float), intrinsics, image_size, rng)
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    for name, array in points.items():
        np.save(folder / f"{name}.npy", array)
    for i, camera_to_world in enumerate(views):
        color, depth = render(room, camera_to_world, intrinsics, image_size, rng)
        Image.fromarray(color).save(folder / "color" / f"{i}.jpg", quality=92, subsampling=0)
        Image.fromarray(np.round(depth * 1000).astype(np.uint16)).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", camera_to_world, fmt="%.6f")
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsics
    for name in ("color", "depth"):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", matrix, fmt="%.6f")


def _write_whole(image_size, job):
    """Write the room of a job (folder, seed) beside its place and rename it there: it exists whole or not at all."""
    final, seed = job
    work = final.parent.parent / ".unfinished" / f"{final.parent.name}_{final.name}_{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        write_scene(work, seed, image_size)
        work.rename(final)
    except OSError:
        if not final.is_dir():        # unless another run was faster: it has written the same bytes
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_spec(root):
    """What the rooms of a folder were made with: the dict of its rooms.json, {} without one; broken: ValueError."""
    spec = Path(root, "rooms.json")
    try:
        found = json.loads(spec.read_text()) if spec.exists() else {}
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"{spec}: expected a JSON object, found {found}; delete {root} and generate the rooms anew")
    return found


def generate(root, train=32, val=12, seed=0, workers=None, image_size=(160, 120)):
    """Make the rooms of <root>/train and <root>/val that are not there yet.

    Args:
        root:       folder of the data set; <root>/rooms.json records what it was made with.
        train, val: number of rooms; rooms beyond it are left alone.  seed: int >= 0.
        workers:    number of processes, default one a CPU core.  image_size: (width, height) of the frames.

    Returns:
        int, the number of rooms made now.

    Raises:
        ValueError: a number is out of range, or root holds other scenes, or rooms made with other settings.
    """
    root, workers = Path(root), (os.cpu_count() or 1) if workers is None else workers
    if min(train, val, seed) < 0 or workers < 1 or min(image_size) < 8:
        raise ValueError("expected train, val and seed >= 0, workers >= 1 and images of 8x8 or more; got "
                         f"train {train}, val {val}, seed {seed}, workers {workers}, images {image_size}")
    asked, found = {"generator": GENERATOR, "seed": seed, "image_size": list(image_size)}, read_spec(root)
    if found and found != asked:
        raise ValueError(f"{root} holds rooms made with {found}, asked for {asked}; "
                         f"choose another folder with --out or delete {root}")
    if not found and any(any(root.glob(f"{split}/*")) for split in SPLITS):
        raise ValueError(f"{root} holds scenes but no rooms.json, so they are not generated rooms; "
                         "choose another folder with --out")
    for name in (*SPLITS, ".unfinished"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not found:
        (root / "rooms.json").write_text(json.dumps(asked) + "\n")
    rooms = [(root / split / f"room_{i:04d}", (seed, number, i))
             for number, (split, count) in enumerate(zip(SPLITS, (train, val))) for i in range(count)]
    jobs = [(folder, seed) for folder, seed in rooms if not folder.is_dir()]
    with ProcessPoolExecutor(workers) as pool:                         # starts no process before its first job
        run = map if min(workers, len(jobs)) <= 1 else pool.map
        made = run(partial(_write_whole, tuple(image_size)), jobs)
        list(tqdm(made, "rooms", len(jobs), unit="room", disable=not jobs))
    shutil.rmtree(root / ".unfinished", ignore_errors=True)            # also what a killed run has left
    return len(jobs)


def complete(root):
    """Generate the rooms of a folder that are not there yet; those made with another seed are completed with theirs."""
    spec = read_spec(root)
    if spec or not Path(root, "train").exists():
        generate(root, seed=spec.get("seed", 0), image_size=tuple(spec.get("image_size", (160, 120))))


def main():
    parser = argparse.ArgumentParser(prog="python -m scenes.rooms", description="Generate rooms as scene folders.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/rooms", help="folder of the data set")
    parser.add_argument("--train", type=int, default=32, help="number of training rooms")
    parser.add_argument("--val", type=int, default=12, help="number of validation rooms")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    args = parser.parse_args()
    try:
        made = generate(args.out, args.train, args.val, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {made} rooms made, {args.train + args.val - made} were there")


if __name__ == "__main__":
    main()
