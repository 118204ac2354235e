"""Generated rooms: the embedded default data, as scene folders with points, labels and posed RGB-D frames.

    python rooms.py --out data/rooms --train 32 --val 12 --seed 0
    python rooms.py --as-scannet data/raw --train 32 --val 12 --seed 0    # the same rooms as official ScanNet files

A room is a floor, four walls, furniture made of boxes and flat things on the walls, in ScanNet's 20 classes. Points are
sampled on the surfaces, frames are ray cast exactly, both with sensor-like noise. The same seed gives the same bytes,
whatever the number of processes.

What the data can and cannot show, openly: the rooms are BUILT so that images carry something which voxels cannot.
The classes of one group in GROUPS (cabinet and bookshelf, table and desk, ...) share one shape sampler and one colour
distribution and differ only in a surface pattern (stripes, checks, dots) with a wavelength of 6 to 8 cm. All patterns
have the same mean and variance, and the points' colours are smeared by COLOR_DRIFT, so a network that sees only points
can find the group but has to guess within it; in the frames the pattern is plain to see. A gain of the image branch on
these rooms shows that fusion works, not how much it would gain on real scans.

Frame: metres, +z up, the floor is z = 0, the room spans (0, 0, 0) to its size. There is no ceiling. --as-scannet turns
and shifts each room out of this frame, and its axisAlignment leads back. Room i of the split train is scene 2i there,
that of val is scene 2i + 1, so that a room keeps its name whatever the number of rooms.
"""
import argparse
import json
import math
import os
import shutil
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import Delaunay
from tqdm import tqdm

from scenes.folder import CLASS_COLORS, CLASS_NAMES, NYU40_IDS

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
LONGEST_EDGE = 0.15         # m; longer edges of the mesh would bridge a hole
WALL, FLOOR = CLASS_NAMES.index("wall"), CLASS_NAMES.index("floor")
PATTERNS = ("stripes", "checks", "dots")
CONTRAST = 0.25             # a pattern is colour + CONTRAST on half of the area and colour - CONTRAST on the other half


# ---- furniture ----
# A shape sampler returns (list of boxes (2, 3): centre and half size; footprint width, depth; low z, high z), metres,
# in the piece's own frame: origin on the floor in the middle of the footprint, +y is the back, z up.

def _box(x, y, z):
    """A box from three (low, high) intervals."""
    low, high = np.array([x, y, z], dtype=float).T
    return np.stack([(low + high) / 2, (high - low) / 2])


def _legs(w, d, height, thick=0.05):
    """Four legs in the corners of a w x d footprint."""
    return [_box(sorted((sx * w / 2, sx * (w / 2 - thick))), sorted((sy * d / 2, sy * (d / 2 - thick))), (0, height))
            for sx in (-1, 1) for sy in (-1, 1)]


def _block(rng, width, depth, height):
    """One solid box; every argument is a (low, high) range."""
    w, d, h = rng.uniform(*width), rng.uniform(*depth), rng.uniform(*height)
    return [_box((-w / 2, w / 2), (-d / 2, d / 2), (0, h))], w, d, 0.0, h


def _slab_with_back(rng, width, depth, seat, back, thick):
    """A low solid block with a higher slab along its back."""
    w, d, s, b, t = (rng.uniform(*r) for r in (width, depth, seat, back, thick))
    return [_box((-w / 2, w / 2), (-d / 2, d / 2 - t), (0, s)), _box((-w / 2, w / 2), (d / 2 - t, d / 2), (0, b))], \
        w, d, 0.0, b


def _tabletop(rng):
    """A top on four legs."""
    w, d, h = rng.uniform(0.9, 1.4), rng.uniform(0.6, 0.8), rng.uniform(0.68, 0.78)
    return [_box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.05, h)), *_legs(w, d, h - 0.05)], w, d, 0.0, h


def _chair(rng):
    """Seat, back and four legs."""
    w, h, top = rng.uniform(0.42, 0.52), rng.uniform(0.42, 0.48), rng.uniform(0.85, 1.0)
    back = _box((-w / 2, w / 2), (w / 2 - 0.06, w / 2), (h, top))
    return [_box((-w / 2, w / 2), (-w / 2, w / 2), (h - 0.06, h)), back, *_legs(w, w, h - 0.06)], w, w, 0.0, top


def _panel(rng, width, low, high):
    """A flat thing on a wall; `low` and `high` are ranges of its lower and upper edge."""
    w, t, z0, z1 = rng.uniform(*width), rng.uniform(0.03, 0.06), rng.uniform(*low), rng.uniform(*high)
    return [_box((-w / 2, w / 2), (-t / 2, t / 2), (z0, z1))], w, t, z0, z1


# (class names, where it stands, shape sampler): the i-th class of a group wears PATTERNS[i]
GROUPS = (
    (("cabinet", "bookshelf"), "wall", lambda rng: _block(rng, (0.7, 1.1), (0.3, 0.45), (1.5, 2.0))),
    (("refrigerator", "otherfurniture"), "wall", lambda rng: _block(rng, (0.5, 0.7), (0.5, 0.65), (0.9, 1.3))),
    (("counter", "bathtub"), "wall", lambda rng: _block(rng, (1.2, 1.6), (0.55, 0.7), (0.55, 0.8))),
    (("bed", "sofa"), "wall",
     lambda rng: _slab_with_back(rng, (1.4, 1.8), (0.85, 1.05), (0.38, 0.46), (0.75, 0.95), (0.12, 0.2))),
    (("toilet", "sink"), "wall",
     lambda rng: _slab_with_back(rng, (0.4, 0.52), (0.5, 0.62), (0.4, 0.5), (0.75, 0.9), (0.14, 0.2))),
    (("table", "desk"), "free", _tabletop),
    (("chair",), "free", _chair),
    (("door", "curtain", "shower curtain"), "flat", lambda rng: _panel(rng, (0.8, 1.1), (0.0, 0.0), (1.95, 2.1))),
    (("window", "picture"), "flat", lambda rng: _panel(rng, (0.7, 1.1), (1.0, 1.15), (1.75, 2.0))),
)
CLASSES = {name: (place, sampler, pattern if len(names) > 1 else None)
           for names, place, sampler in GROUPS for pattern, name in enumerate(names)}


def pattern_sign(pattern, u, v):
    """+1 or -1, each on exactly half of the plane: the only thing that tells the classes of a group apart.

    Args:
        pattern: index into PATTERNS, int or int array.
        u, v:    in-plane position in wavelengths, float arrays of one shape.

    Returns:
        float32 array of that shape.
    """
    stripes = u % 1 < 0.5
    # the lattice of the checks is scaled by sqrt 2 so that all three patterns have the same shortest wavelength, 1
    checks = (u / math.sqrt(2) % 1 < 0.5) == (v / math.sqrt(2) % 1 < 0.5)
    dots = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 1 / (2 * math.pi)
    return np.where(np.choose(pattern, (stripes, checks, dots)), np.float32(1), np.float32(-1))


# ---- the room ----

def _turn(vectors, yaw):
    """Vectors (N, 3) turned about z by `yaw` rad, one for all or (N,)."""
    c, s = np.cos(yaw), np.sin(yaw)
    x, y, z = vectors.T
    return np.stack([c * x - s * y, s * x + c * y, z], axis=1)


def _footprints_overlap(a, b, margin):
    """Whether two upright boxes (x, y, half width, half depth, yaw, low z, high z) come closer than `margin`."""
    if min(a[6], b[6]) <= max(a[5], b[5]):
        return False
    delta = np.array([b[0] - a[0], b[1] - a[1]])
    for yaw in (a[4], b[4]):
        for axis in ((math.cos(yaw), math.sin(yaw)), (-math.sin(yaw), math.cos(yaw))):
            reach = margin
            for box in (a, b):
                c, s = math.cos(box[4]), math.sin(box[4])
                reach += box[2] * abs(c * axis[0] + s * axis[1]) + box[3] * abs(-s * axis[0] + c * axis[1])
            if abs(delta @ axis) >= reach:
                return False          # a separating axis
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
            length, across = (size[0], size[1]) if wall % 2 == 0 else (size[1], size[0])
            along = rng.uniform(width / 2, length - width / 2)
            off = across - depth / 2 if wall in (0, 3) else depth / 2
            x, y, yaw = (along, off, wall * math.pi / 2) if wall % 2 == 0 else (off, along, wall * math.pi / 2)
        clear = 0.4 if place == "flat" else depth / 2     # nothing may stand close in front of a flat thing
        keep = (x, y, width / 2, clear, yaw, z0, z1)
        if not any(_footprints_overlap(keep, other, 0.05) for other in taken):
            return (x, y, yaw), keep
    return None


def make_room(rng):
    """Furnish a room at random; a piece that finds no place is left out.

    Args:
        rng: numpy Generator, the only source of chance.

    Returns:
        dict. Things: row 0 is the floor, row 1 the walls, then the pieces. Boxes: row 0 is the shell, floor and walls
        seen from inside; then the parts of the pieces.
            size (3,) m;
            thing_label (T,) class index; thing_color (T, 3) mean colour in [0, 1]; thing_pattern (T,) index into
            PATTERNS; thing_contrast (T,); thing_wavelength (T,) m; thing_phase (T, 2) in wavelengths;
            box_center, box_half (B, 3) m; box_yaw (B,) rad, turns the box's frame to the world's about z;
            box_thing (B,) row of the thing (meaningless for the shell).
    """
    size = np.array([rng.uniform(3.4, 4.5), rng.uniform(3.4, 4.5), 2.4])
    standing = [name for name, (place, _, _) in CLASSES.items() if place != "flat"]
    flat = [name for name, (place, _, _) in CLASSES.items() if place == "flat"]
    # drawn without replacement, so all classes occur about equally often
    names = list(rng.permutation(standing)[:rng.integers(7, 11)])
    panels = [*rng.permutation(flat), flat[rng.integers(len(flat))]]
    pieces = [(name, CLASSES[name][1](rng)) for name in panels[:rng.integers(3, 7)]]
    # large pieces first, while there is room for them
    pieces += sorted(((name, CLASSES[name][1](rng)) for name in names), key=lambda piece: -piece[1][1] * piece[1][2])

    labels, patterns, taken = [FLOOR, WALL], [0, 0], []
    boxes = [(*size / 2, *size / 2, 0.0, 0)]
    for name, (parts, width, depth, z0, z1) in pieces:
        found = _try_place(rng, size, CLASSES[name][0], width, depth, z0, z1, taken)
        if found is None:
            continue
        (x, y, yaw), keep = found
        taken.append(keep)
        for center, half in parts:
            boxes.append((*(_turn(center[None], yaw)[0] + (x, y, 0)), *half, yaw, len(labels)))
        labels.append(CLASS_NAMES.index(name))
        pattern = CLASSES[name][2]      # None: alone in its group, wears any
        patterns.append(int(rng.integers(len(PATTERNS))) if pattern is None else pattern)
    boxes, count = np.array(boxes), len(labels)
    return {
        "size": size, "thing_label": np.array(labels), "thing_pattern": np.array(patterns),
        "thing_color": rng.uniform(0.32, 0.68, (count, 3)),
        "thing_contrast": np.where(np.arange(count) < 2, 0.0, CONTRAST),     # floor and walls are plain
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
    """What lies at `local` (N, 3), a place in the frame of `box` (N,) on a face with normal axis `axis` (N,).

    Returns the row of the thing (N,) and the colour (N, 3).
    """
    thing = np.where(box == 0, (axis != 2).astype(int), room["box_thing"][box])
    rows = np.arange(len(axis))
    u, v = local[rows, np.array([1, 0, 0])[axis]], local[rows, np.array([2, 2, 1])[axis]]
    scale, phase = 1 / room["thing_wavelength"][thing], room["thing_phase"][thing]
    sign = pattern_sign(room["thing_pattern"][thing], u * scale + phase[:, 0], v * scale + phase[:, 1])
    return thing, room["thing_color"][thing] + (room["thing_contrast"][thing] * sign)[:, None]


# ---- points ----

def sample_points(room, rng):
    """Sample the surfaces that can be seen from inside the room.

    Left out: faces that look down, and points whose position 1 cm in front of the surface is not free (a face on the
    floor, against a wall or against another box; a wall behind a cabinet).

    Args:
        room: as from make_room.
        rng:  numpy Generator.

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


# ---- frames ----

def cast_rays(room, origin, directions):
    """First hit of each ray: exact, by the slab method in each box's own frame.

    Args:
        room:       as from make_room.
        origin:     (3,) m, inside the room and outside of all boxes.
        directions: (R, 3) of any length.

    Returns:
        t:   (R,) f32, the hit is origin + t * direction; inf where the ray leaves through the open top.
        box: (R,) int, row of the box hit; 0, the shell, also for a ray that hits nothing.

    Source: slab method, Kay & Kajiya (1986).
    """
    def slabs(o, d, half):
        """Entry and exit t of a box centred at the origin."""
        enter, leave = [], []
        for axis in range(3):
            inverse = 1 / d[axis]
            a, b = (np.float32(-half[axis] - o[axis]) * inverse, np.float32(half[axis] - o[axis]) * inverse)
            enter.append(np.minimum(a, b))
            leave.append(np.maximum(a, b))
        return np.maximum(np.maximum(*enter[:2]), enter[2]), np.minimum(np.minimum(*leave[:2]), leave[2])

    t, hit = np.full(len(directions), np.inf, dtype=np.float32), np.zeros(len(directions), dtype=int)
    turned = {}                                                       # yaw -> directions (3, R) in frames so turned
    for box, (half, yaw) in enumerate(zip(room["box_half"], room["box_yaw"])):
        if yaw not in turned:
            d = _turn(directions, -yaw).T.astype(np.float32)
            turned[yaw] = np.where(np.abs(d) < 1e-7, np.float32(1e-7), d)        # no division by zero
        enter, leave = slabs(_to_box(room, box, origin[None])[0], turned[yaw], half)
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
    """Choose FRAMES cameras in free space that together see much of the room.

    Greedy: out of 12 places x 12 directions x 2 pitches, always the view that shows most points not shown so far.

    Args:
        coord: (N, 3) points that should be seen; a few thousand are enough.

    Returns:
        list of FRAMES camera_to_world (4, 4).
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
                pose = look(place, yaw, pitch)
                camera = (coord - place) @ pose[:3, :3]
                pixel = camera @ intrinsics.T
                with np.errstate(divide="ignore", invalid="ignore"):
                    u, v = pixel[:, 0] / pixel[:, 2], pixel[:, 1] / pixel[:, 2]
                poses.append(pose)
                shown.append(near & (camera[:, 2] > 0) & (u > 0) & (u < image_size[0] - 1)
                             & (v > 0) & (v < image_size[1] - 1))
    shown, chosen = np.array(shown), []
    missing = np.ones(len(coord), dtype=bool)
    for _ in range(FRAMES):
        best = int((shown & missing).sum(axis=1).argmax())
        chosen.append(poses[best])
        missing &= ~shown[best]
    return chosen


def render(room, camera_to_world, intrinsics, image_size, rng=None):
    """Render one frame: colour from four rays a pixel, depth from the ray through the pixel's centre.

    Args:
        room:            as from make_room.
        camera_to_world: (4, 4).
        intrinsics:      (3, 3), pixels.
        image_size:      (width, height).
        rng:             numpy Generator of exposure and noise; None renders without either.

    Returns:
        color: (H, W, 3) uint8.
        depth: (H, W) f32, metres along the camera's z, 0 where there is no reading.
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


# ---- files ----

def write_scene(folder, seed, image_size=(160, 120)):
    """Generate one room and write it as a scene folder, straight into `folder`, which must not exist.

    Args:
        folder:     path of the new scene folder.
        seed:       int or sequence of int, for numpy's default_rng.
        image_size: (width, height) of colour and depth.
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


# ---- the same as official ScanNet files ----

def mesh_faces(coord, normal, superpoint):
    """Faces through the points: Delaunay triangles in the plane of each superpoint; the seams between them stay open.

    Args:
        coord, normal: (N, 3) m and unit.  superpoint: (N,) int, flat patches or legs, as from sample_points.

    Returns:
        (F, 3) int32 rows of coord, counter-clockwise seen from where the normals point to. A few points have no face.
    """
    order = np.argsort(superpoint, kind="stable")
    faces = []
    for rows in np.split(order, np.cumsum(np.bincount(superpoint))[:-1]):
        along, across = normal[rows] @ normal[rows[0]], np.cross(normal[rows[0]], normal[rows])[:, 2]
        side = np.where(np.abs(along) > 0.7, along < 0, 2 + (across > 0))             # a leg's patch goes round it
        for sheet in (rows[side == s] for s in np.unique(side)):
            if len(sheet) < 3:
                continue
            out = normal[sheet].mean(axis=0)
            out = out / np.linalg.norm(out)
            u = np.cross(out, np.eye(3)[np.abs(out).argmin()])
            plane = coord[sheet] @ np.stack([u, np.cross(out, u)], axis=1)                       # (n, 2)
            corner = sheet[Delaunay(plane).simplices]                                            # counter-clockwise
            a, b, c = coord[corner].transpose(1, 0, 2)
            longest = np.linalg.norm([b - a, c - b, a - c], axis=2).max(axis=0)
            slope = np.cross(b - a, c - a)
            upright = slope @ out > 0.5 * np.linalg.norm(slope, axis=1)     # else noise turns a sliver on its edge
            faces.append(corner[upright & (longest < LONGEST_EDGE)])
    return np.concatenate(faces).astype(np.int32)


def _write_ply(path, coord, color, faces, label=None):
    """A binary mesh with ScanNet's properties; `label` (N,) only in labels.ply."""
    columns = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), *((name, "u1") for name in ("red", "green", "blue", "alpha"))]
    columns += [] if label is None else [("label", "<u2")]
    vertex = np.zeros(len(coord), columns)
    vertex["x"], vertex["y"], vertex["z"] = coord.T
    vertex["red"], vertex["green"], vertex["blue"] = color.T
    vertex["alpha"] = 255
    if label is not None:
        vertex["label"] = label
    face = np.zeros(len(faces), [("count", "u1"), ("corner", "<i4", 3)])
    face["count"], face["corner"] = 3, faces
    types = {"<f4": "float", "u1": "uchar", "<u2": "ushort"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertex)}",
              *(f"property {types[kind]} {name}" for name, kind in columns), f"element face {len(face)}",
              "property list uchar int vertex_indices", "end_header", ""]
    path.write_bytes("\n".join(header).encode() + vertex.tobytes() + face.tobytes())


def _write_sens(path, intrinsic, frames, image_size):
    """A .sens of version 4; `intrinsic` (4, 4), frames are (camera_to_world, jpeg bytes, depth (H, W) u16 mm)."""
    name, eye = b"StructureSensor", np.eye(4)
    with open(path, "wb") as file:
        file.write(struct.pack("<IQ", 4, len(name)) + name)
        file.write(np.stack([intrinsic, eye, intrinsic, eye]).astype("<f4").tobytes())
        file.write(struct.pack("<2i4IfQ", 2, 1, *image_size, *image_size, 1000, len(frames)))    # jpeg, zlib u16
        for i, (pose, jpeg, depth) in enumerate(frames):
            depth = zlib.compress(depth.astype("<u2").tobytes())
            file.write(pose.astype("<f4").tobytes() + struct.pack("<4Q", 33333 * i, 33333 * i, len(jpeg), len(depth)))
            file.write(jpeg + depth)
        file.write(struct.pack("<Q15dQ", 1, *[0.0] * 15, 0))         # the tail: one reading of the motion sensor


def write_scan(folder, scene_folder, seed):
    """Write a room's scene folder as an official ScanNet scan, with frames both in the .sens and exported.

    Points and poses are turned and shifted by the inverse of the scan's axisAlignment, which is drawn from the seed.
    Images keep their bytes. Segments are the superpoints. Groups of the aggregation are the instances, objectId being
    the id, then floor and walls, which ScanNet groups too. As there, a second aggregation, which belongs to another
    mesh (not written), lies beside it.

    Args:
        folder:       path of the new scan, named like it.
        scene_folder: as from write_scene.
        seed:         int or sequence of int, for numpy's default_rng.
    """
    folder, scene_folder, rng = Path(folder), Path(scene_folder), np.random.default_rng(seed)
    coord, color, normal, segment, instance, superpoint = (
        np.load(scene_folder / f"{name}.npy")
        for name in ("coord", "color", "normal", "segment20", "instance", "superpoint"))
    alignment = np.eye(4)
    alignment[:3, :3] = _turn(np.eye(3), rng.uniform(-math.pi, math.pi)).T
    alignment[:3, 3] = rng.uniform((-5, -5, -0.5), (5, 5, 0.5))
    alignment = alignment.round(6)                                   # exactly what the .txt will say
    to_scan = np.linalg.inv(alignment)

    for name in ("color", "depth", "intrinsic"):
        shutil.copytree(scene_folder / name, folder / name)
    (folder / "pose").mkdir()
    frames = []
    for i in range(FRAMES):
        pose = to_scan @ np.loadtxt(scene_folder / "pose" / f"{i}.txt")
        np.savetxt(folder / "pose" / f"{i}.txt", pose, fmt="%.6f")
        with Image.open(folder / "depth" / f"{i}.png", formats=["PNG"]) as image:
            frames.append((pose, (folder / "color" / f"{i}.jpg").read_bytes(), np.asarray(image)))
    height, width = frames[0][2].shape
    _write_sens(folder / f"{folder.name}.sens", np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt"), frames,
                (width, height))

    faces = mesh_faces(coord, normal, superpoint)
    coord = coord @ to_scan[:3, :3].T + to_scan[:3, 3]
    mesh = f"{folder.name}_vh_clean_2"
    _write_ply(folder / f"{mesh}.ply", coord, color, faces)
    _write_ply(folder / f"{mesh}.labels.ply", coord, CLASS_COLORS[segment], faces, np.array(NYU40_IDS)[segment])
    segments = f"{mesh}.0.010000.segs.json"
    (folder / segments).write_text(json.dumps({"sceneId": folder.name, "segIndices": superpoint.tolist()}))
    groups = [(CLASS_NAMES[segment[mine][0]], np.unique(superpoint[mine]).tolist())
              for mine in (*(instance == i for i in range(instance.max() + 1)), segment == FLOOR, segment == WALL)]
    for name, of, listed in ((folder.name, segments, groups),
                             (f"{folder.name}_vh_clean", f"{folder.name}_vh_clean.segs.json", groups[::-1])):
        (folder / f"{name}.aggregation.json").write_text(json.dumps({
            "sceneId": f"scannet.{folder.name}", "appId": "Aggregator.v2", "segmentsFile": f"scannet.{of}",
            "segGroups": [{"id": i, "objectId": i, "segments": ids, "label": label}
                          for i, (label, ids) in enumerate(listed)]}))
    numbers = " ".join(f"{value:.6f}" for value in alignment.ravel())
    (folder / f"{folder.name}.txt").write_text(
        f"axisAlignment = {numbers}\ncolorHeight = {height}\ncolorWidth = {width}\ndepthHeight = {height}\n"
        f"depthWidth = {width}\nnumColorFrames = {FRAMES}\nnumDepthFrames = {FRAMES}\nsceneType = Generated\n")


# ---- data sets ----

def _place(split, index, as_scannet):
    """Where room `index` of a split lies below the root."""
    return f"scans/scene{2 * index + (split == 'val'):04d}_00" if as_scannet else f"{split}/room_{index:04d}"


def _write_whole(root, split, index, seed, image_size, as_scannet):
    """Write scene `index` of a split beside its place and rename it there, so that it exists whole or not at all."""
    final = root / _place(split, index, as_scannet)
    work = root / ".unfinished" / f"{split}_{index:04d}_{os.getpid()}"
    made, seed = work / "room", (seed, ("train", "val").index(split), index)
    shutil.rmtree(work, ignore_errors=True)
    try:
        write_scene(made, seed, image_size)
        if as_scannet:
            write_scan(work / final.name, made, seed)
            made = work / final.name
        made.rename(final)
    except OSError:
        if not final.is_dir():        # unless another run was faster: it has written the same bytes
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_spec(root):
    """What the rooms of a folder were made with: the dict of its rooms.json, {} where it has none.

    Raises ValueError where that file is broken.
    """
    spec = Path(root, "rooms.json")
    try:
        found = json.loads(spec.read_text()) if spec.exists() else {}
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"{spec}: expected a JSON object, found {found}; delete {root} and generate the rooms anew")
    return found


def generate(root, train=32, val=12, seed=0, workers=None, image_size=(160, 120), as_scannet=False):
    """Make the rooms of <root>/train and <root>/val that are not there yet, or of <root>/scans as ScanNet has them.

    Args:
        root:       folder of the data set; <root>/rooms.json records what it was made with.
        train, val: number of rooms. Rooms beyond these numbers are left alone.
        seed:       int >= 0; same seed, same bytes.
        workers:    number of processes, default one a CPU core.
        image_size: (width, height) of the frames.
        as_scannet: True: official ScanNet files and split lists, see write_scan.

    Returns:
        int, the number of rooms made now.

    Raises:
        ValueError: a number is out of range, or root holds rooms made with another seed or other settings.
    """
    root, workers = Path(root), (os.cpu_count() or 1) if workers is None else workers
    if min(train, val, seed) < 0 or workers < 1 or min(image_size) < 8:
        raise ValueError("expected train, val and seed >= 0, workers >= 1 and images of 8x8 or more; got "
                         f"train {train}, val {val}, seed {seed}, workers {workers}, images {image_size}")
    asked = {"generator": GENERATOR, "seed": seed, "image_size": list(image_size)}
    flag, own = "--out", ("train/*", "val/*")
    if as_scannet:
        asked["as_scannet"] = True
        flag, own = "--as-scannet", ("scans/*", "scannetv2_*")
    spec = root / "rooms.json"
    if spec.exists():
        found = read_spec(root)
        if found != asked:
            raise ValueError(f"{root} holds rooms made with {found}, asked for {asked}; "
                             f"choose another folder with {flag} or delete {root}")
    elif any(any(root.glob(pattern)) for pattern in own):
        raise ValueError(f"{root} holds scenes but no rooms.json, so they are not generated rooms; "
                         f"choose another folder with {flag}")
    for name in (("scans",) if as_scannet else ("train", "val")) + (".unfinished",):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not spec.exists():
        part = root / ".unfinished" / f"rooms_{os.getpid()}.json"
        part.write_text(json.dumps(asked) + "\n")
        part.replace(spec)

    jobs = [(root, split, i, seed, tuple(image_size), as_scannet) for split, count in (("train", train), ("val", val))
            for i in range(count) if not (root / _place(split, i, as_scannet)).is_dir()]
    with tqdm(total=len(jobs), desc="rooms", unit="room", disable=not jobs) as bar:
        if min(workers, len(jobs)) <= 1:
            for job in jobs:
                _write_whole(*job)
                bar.update()
        else:
            pool = ProcessPoolExecutor(min(workers, len(jobs)))
            try:
                for future in [pool.submit(_write_whole, *job) for job in jobs]:
                    future.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
    shutil.rmtree(root / ".unfinished", ignore_errors=True)       # also what a killed run has left
    if as_scannet:
        for split, odd in (("train", 0), ("val", 1)):
            names = sorted(path.name for path in (root / "scans").glob("scene*_00") if int(path.name[5:-3]) % 2 == odd)
            if names:                 # an empty list would look like a broken one
                (root / f"scannetv2_{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return len(jobs)


def _image_size(text):
    """'160x120' -> (160, 120)."""
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 160x120, got {text!r}") from None
    return width, height


def main():
    parser = argparse.ArgumentParser(description="Generate rooms, as scene folders or as ScanNet files.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", default="data/rooms", help="folder of the data set")
    place.add_argument("--as-scannet", metavar="DIR", help="write the rooms to DIR as official ScanNet files instead "
                       "(DIR/scans/ and DIR/scannetv2_{train,val}.txt), to try what reads ScanNet")
    parser.add_argument("--train", type=int, default=32, help="number of training rooms")
    parser.add_argument("--val", type=int, default=12, help="number of validation rooms")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--workers", type=int, help="processes; default: one a CPU core")
    parser.add_argument("--image-size", type=_image_size, default=(160, 120), metavar="WxH", help="pixels of a frame")
    args = parser.parse_args()
    try:
        made = generate(args.as_scannet or args.out, args.train, args.val, args.seed, args.workers, args.image_size,
                        as_scannet=args.as_scannet is not None)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.as_scannet or args.out}: {made} rooms made, {args.train + args.val - made} were there")


if __name__ == "__main__":
    main()


def complete(root):
    """Generate the rooms of a folder that are not there yet; those made with another seed are completed with theirs."""
    spec = read_spec(root)
    if spec or not Path(root, "train").exists():
        generate(root, seed=spec.get("seed", 0), image_size=tuple(spec.get("image_size", (160, 120))))
