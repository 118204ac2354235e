"""Box rooms: the default data, as scene folders with points, labels and posed RGB-D frames.

    python -m scenes.boxes --out data/rooms --train 32 --val 12 --seed 0

A room spans (0, 0, 0) to its size in metres. It is BUILT so that images carry something which voxels cannot: classes of
one group in GROUPS differ only in a surface pattern of 6 to 8 cm, which COLOR_DRIFT smears in the points, and all
patterns have one mean and variance. So a gain of the image branch shows that fusion works, not how much it would gain
on real scans. Same seed, same bytes.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np

from scenes import generate as shared
from scenes.folder import CLASS_NAMES
from scenes.generate import choose_views, footprints_overlap, intrinsics_for, rays_of, to_bytes, turn

ROOT, GENERATOR = "data/rooms", 1   # the latter is in rooms.json: raise it whenever a change alters a scene's bytes
POINTS_PER_M2, PATCH = 1000, 0.5    # m, edge of a superpoint
COLOR_DRIFT, COLOR_NOISE = 0.03, 0.015  # m, so far from a point its colour is taken, else 5 cm voxels show the pattern
VIEW_RANGE = 3.0                    # m; frames are chosen for what they see within it: patterns are resolved that far
WALL, FLOOR = CLASS_NAMES.index("wall"), CLASS_NAMES.index("floor")
PATTERNS, CONTRAST = ("stripes", "checks", "dots"), 0.25    # colour + CONTRAST on half of the area, - on the other half


def _box(*sides):
    """Low and high corner (2, 3) of a box from three (low, high) intervals; a number is the width about 0."""
    return np.array([i if isinstance(i, tuple) else (-i / 2, i / 2) for i in sides]).T


def _legs(w, d, height, thick=0.05):
    sides = [[(-edge / 2, thick - edge / 2), (edge / 2 - thick, edge / 2)] for edge in (w, d)]
    return [_box(x, y, (0, height)) for x in sides[0] for y in sides[1]]


# dimensions, metres -> boxes in the piece's own frame: origin on the floor in the middle of it, +y is the back, z up
SHAPES = {
    "block": lambda w, d, height: [_box(w, d, (0, height))],
    "panel": lambda w, thick, low, high: [_box(w, thick, (low, high))],
    "slab with back": lambda w, d, seat, back, thick: [
        _box(w, (-d / 2, d / 2 - thick), (0, seat)), _box(w, (d / 2 - thick, d / 2), (0, back))],
    "tabletop": lambda w, d, height: [_box(w, d, (height - 0.05, height)), *_legs(w, d, height - 0.05)],
    "chair": lambda w, seat, top: [
        _box(w, w, (seat - 0.06, seat)), _box(w, (w / 2 - 0.06, w / 2), (seat, top)), *_legs(w, w, seat - 0.06)],
}
# (class names, where it stands, shape, ranges of its dimensions): the i-th class of a group wears PATTERNS[i]
GROUPS = (
    (("cabinet", "bookshelf"), "wall", "block", ((0.7, 1.1), (0.3, 0.45), (1.5, 2.0))),
    (("refrigerator", "otherfurniture"), "wall", "block", ((0.5, 0.7), (0.5, 0.65), (0.9, 1.3))),
    (("counter", "bathtub"), "wall", "block", ((1.2, 1.6), (0.55, 0.7), (0.55, 0.8))),
    (("bed", "sofa"), "wall", "slab with back", ((1.4, 1.8), (0.85, 1.05), (0.38, 0.46), (0.75, 0.95), (0.12, 0.2))),
    (("toilet", "sink"), "wall", "slab with back", ((0.4, 0.52), (0.5, 0.62), (0.4, 0.5), (0.75, 0.9), (0.14, 0.2))),
    (("table", "desk"), "free", "tabletop", ((0.9, 1.4), (0.6, 0.8), (0.68, 0.78))),
    (("chair",), "free", "chair", ((0.42, 0.52), (0.42, 0.48), (0.85, 1.0))),
    (("door", "curtain", "shower curtain"), "flat", "panel", ((0.8, 1.1), (0.03, 0.06), (0.0, 0.0), (1.95, 2.1))),
    (("window", "picture"), "flat", "panel", ((0.7, 1.1), (0.03, 0.06), (1.0, 1.15), (1.75, 2.0))),
)
CLASSES = {name: (place, shape, ranges, pattern if len(names) > 1 else None)
           for names, place, shape, ranges in GROUPS for pattern, name in enumerate(names)}


def pattern_sign(pattern, u, v):
    """+1 or -1 (f32), each on exactly half of the plane: the only thing that tells the classes of a group apart.
    pattern: index into PATTERNS, int or int array; u, v: in-plane position in wavelengths, floats of one shape."""
    # the lattice of the checks is scaled by sqrt 2 so that all three patterns have the same shortest wavelength, 1
    stripes, checks = u % 1 < 0.5, (u / math.sqrt(2) % 1 < 0.5) == (v / math.sqrt(2) % 1 < 0.5)
    dots = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 1 / (2 * math.pi)
    return np.where(np.choose(pattern, (stripes, checks, dots)), np.float32(1), np.float32(-1))


def _try_place(rng, size, place, parts, taken):
    """The upright box that a piece of these parts keeps clear at a free place, or None if none turns up."""
    (width, depth, _), z = np.ptp(parts, axis=(0, 1)), parts[..., 2]
    for _ in range(200):
        if place == "free":
            yaw = rng.uniform(-math.pi, math.pi)
            c, s = abs(math.cos(yaw)), abs(math.sin(yaw))
            reach = np.array([c * width + s * depth, s * width + c * depth]) / 2
            x, y = rng.uniform(reach, size[:2] - reach)
        else:                         # back to a wall: 0 north (y = size), 1 west (x = 0), 2 south, 3 east
            wall = int(rng.integers(4))
            along = rng.uniform(width / 2, size[wall % 2] - width / 2)
            off = size[1 - wall % 2] - depth / 2 if wall in (0, 3) else depth / 2
            (x, y), yaw = ((along, off), (off, along))[wall % 2], wall * math.pi / 2
        # nothing may stand close in front of a flat thing
        keep = (x, y, yaw, width / 2, 0.4 if place == "flat" else depth / 2, z.min(), z.max())
        if not any(footprints_overlap(keep, other, 0.05) for other in taken):
            return keep
    return None


def make_room(rng):
    """Furnish a room at random: a dict of things (row 0 the floor, 1 the walls, then pieces) and of boxes (row 0 the
    shell, floor and walls seen from inside, then parts of pieces): size (3,) m; thing_label (T,) class index;
    thing_color (T, 3) mean in [0, 1]; thing_pattern (T,) index into PATTERNS, not worn by floor and walls;
    thing_wavelength (T,) m; thing_phase (T, 2) in wavelengths; box_center, box_half (B, 3) m; box_yaw (B,) rad, about
    z; box_thing (B,) row of the thing, not of the shell."""
    def draw(name):
        return name, np.array(SHAPES[CLASSES[name][1]](*(rng.uniform(*r) for r in CLASSES[name][2])))      # (P, 2, 3)

    size = np.array([*rng.uniform(3.4, 4.5, 2), 2.4])
    standing, flat = ([name for name, (place, *_) in CLASSES.items() if (place == "flat") == is_flat]
                      for is_flat in (False, True))
    names = rng.permutation(standing)[:rng.integers(7, 11)]       # so all classes occur about equally often
    pieces = [draw(name) for name in [*rng.permutation(flat), flat[rng.integers(len(flat))]][:rng.integers(3, 7)]]
    pieces += sorted(map(draw, names), key=lambda piece: -np.ptp(piece[1], axis=(0, 1))[:2].prod())  # large ones first
    things, boxes, taken = [(FLOOR, 0), (WALL, 0)], [(*size / 2, *size / 2, 0.0, 0)], []
    for name, parts in pieces:
        place, _, _, pattern = CLASSES[name]
        if (keep := _try_place(rng, size, place, parts, taken)) is None:    # it is left out
            continue
        taken.append(keep)
        x, y, yaw, *_ = keep
        center, half = turn(parts.mean(axis=1), yaw) + np.array((x, y, 0)), np.ptp(parts, axis=1) / 2
        boxes += [(*row, yaw, len(things)) for row in np.hstack((center, half))]
        pattern = rng.integers(len(PATTERNS)) if pattern is None else pattern             # alone in its group: any
        things.append((CLASS_NAMES.index(name), pattern))
    boxes, (label, pattern), n = np.array(boxes), np.array(things).T, len(things)
    return {
        "size": size, "thing_label": label, "thing_pattern": pattern, "thing_color": rng.uniform(0.32, 0.68, (n, 3)),
        "thing_wavelength": rng.uniform(0.06, 0.08, n), "thing_phase": rng.uniform(0, 1, (n, 2)),
        "box_center": boxes[:, 0:3], "box_half": boxes[:, 3:6], "box_yaw": boxes[:, 6],
        "box_thing": boxes[:, 7].astype(int)}


def _to_box(room, box, points):  # one box for all, or (N,)
    return turn(points - room["box_center"][box], -room["box_yaw"][box])


def inside_boxes(room, points, margin=0.0):
    """(N,) bool, True where a point (N, 3) lies in any part of a piece, grown by `margin` metres on all sides."""
    return np.any([(np.abs(_to_box(room, box, points)) < room["box_half"][box] + margin).all(axis=1)
                   for box in range(1, len(room["box_half"]))], axis=0)


def _surface(room, box, axis, local):
    """Row of the thing (N,) and colour (N, 3) at local (N, 3) in the frame of box (N,), on a face across axis (N,)."""
    thing = np.where(box == 0, axis != 2, room["box_thing"][box])
    rows = np.arange(len(axis))
    u, v = local[rows, np.array([1, 0, 0])[axis]], local[rows, np.array([2, 2, 1])[axis]]
    scale, phase = 1 / room["thing_wavelength"][thing], room["thing_phase"][thing]
    sign = pattern_sign(room["thing_pattern"][thing], u * scale + phase[:, 0], v * scale + phase[:, 1])
    return thing, room["thing_color"][thing] + (CONTRAST * (thing > 1) * sign)[:, None]  # floor and walls are plain


def sample_points(room, rng):
    """Sample the surfaces of a room (as from make_room) that can be seen from inside it: not faces that look down, nor
    where 1 cm in front is not free (a wall behind a cabinet). Returns a dict of shuffled arrays as a scene folder has
    them; a superpoint is a patch of about PATCH on one face, so it never holds two pieces."""
    half, yaw, size = room["box_half"], room["box_yaw"], room["size"]
    box, axis, sign = (a.ravel() for a in np.meshgrid(np.arange(len(half)), (0, 1, 2), (-1, 1), indexing="ij"))
    facing = np.where(box == 0, -sign, sign)                                     # the shell is seen from inside
    area = 4 * half[box].prod(axis=1) / half[box, axis] * ((axis != 2) | (facing > 0))
    face = np.repeat(np.arange(len(box)), np.round(area * POINTS_PER_M2).astype(int))
    box, axis, sign, facing = (a[face] for a in (box, axis, sign, facing))       # of each face -> of each point
    across = np.eye(3)[axis]                                                     # (N, 3)
    unit = np.where(across > 0, sign[:, None], rng.uniform(-1, 1, across.shape))  # in the box, -1 to 1
    normal = turn(across * facing[:, None], yaw[box])
    coord = turn(unit * half[box], yaw[box]) + room["box_center"][box]
    front = coord + 0.01 * normal
    order = rng.permutation(np.flatnonzero(((front > 0) & (front < size)).all(axis=1) & ~inside_boxes(room, front)))
    box, axis, sign, across, unit, coord, normal = (a[order] for a in (box, axis, sign, across, unit, coord, normal))
    thing, color = _surface(room, box, axis, unit * half[box] + rng.normal(0, COLOR_DRIFT, unit.shape))
    # superpoints: equal patches of each face; a leg, thin in two directions, is one patch
    patches = np.where(across > 0, 1, np.maximum(1, np.round(2 * half[box] / PATCH)))
    patch = np.minimum(np.floor((unit + 1) / 2 * patches), patches - 1).astype(int)
    side = np.where(np.median(half, axis=1)[box] < 0.05, 0, 1 + 2 * axis + (sign > 0))
    key = np.ravel_multi_index((box, side, *patch.T), (len(half), 7, *patch.max(axis=0) + 1))
    normal = normal + rng.normal(0, 0.05, normal.shape)
    return {
        "coord": (coord + rng.normal(0, 0.003, coord.shape)).astype(np.float32),
        "color": to_bytes(color + rng.normal(0, COLOR_NOISE, color.shape)),
        "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
        "segment20": room["thing_label"][thing].astype(np.int32),
        "instance": np.maximum(thing - 2, -1).astype(np.int32),
        "superpoint": np.unique(key, return_inverse=True)[1].ravel().astype(np.int32)}


def cast_rays(room, origin, directions):
    """First hit of each ray from origin (3,) m, inside the room and outside of all boxes, along directions (R, 3): t
    (R,) f32, the hit is origin + t * direction, inf where the ray leaves through the open top; and box (R,) int, row of
    the box hit, 0 also where there is none. Source: slab method, Kay & Kajiya (1986)."""
    t, hit = np.full(len(directions), np.inf, dtype=np.float32), np.zeros(len(directions), dtype=int)
    turned = {}                                                       # yaw -> directions (3, R) in frames so turned
    for box, (half, yaw) in enumerate(zip(room["box_half"], room["box_yaw"])):
        if yaw not in turned:
            d = np.ascontiguousarray(turn(directions, -yaw).T, np.float32)
            turned[yaw] = np.where(np.abs(d) < 1e-7, np.float32(1e-7), d)        # no division by zero
        inverse, start = 1 / turned[yaw], _to_box(room, box, origin[None])[0]
        a, b = ((side * half - start).astype(np.float32)[:, None] * inverse for side in (-1, 1))  # t at both planes
        enter, leave = np.minimum(a, b).max(axis=0), np.maximum(a, b).min(axis=0)
        nearer = (enter <= leave) & (enter > 0) & (enter < t) & (box > 0)
        t[nearer], hit[nearer] = enter[nearer], box
        if box == 0:                                                  # the rays start inside; there is no ceiling
            t = np.where(origin[2] + leave * turned[yaw][2] > room["size"][2] - 1e-4, np.float32(np.inf), leave)
    return t, hit


def render(room, camera_to_world, intrinsics, image_size, rng=None):
    """Render one frame, colour from four rays a pixel; rng: numpy Generator of exposure and noise, None: neither.
    Returns color (H, W, 3) u8; depth (H, W) f32 m along z, through the pixel's centre, 0 where there is no reading."""
    (width, height), origin = image_size, camera_to_world[:3, 3]
    # the centre, then a rotated grid: four distinct rows and columns keep fine stripes from turning into moire
    offsets = ((0, 0), (-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375))
    rays = np.concatenate([rays_of(intrinsics, image_size, at) for at in offsets])         # (5 H W, 3), z = 1
    rays = rays @ camera_to_world[:3, :3].T                                                # so t is the depth
    t, box = cast_rays(room, origin, rays)
    depth = np.where(np.isfinite(t), t, 0)[:height * width].reshape(height, width)
    rows = height * width + np.flatnonzero(np.isfinite(t[height * width:]))                # of the grid, on a surface
    box, local = box[rows], _to_box(room, box[rows], origin + t[rows, None] * rays[rows])
    axis = np.abs(np.abs(local) - room["box_half"][box]).argmin(axis=1)
    turned = room["box_yaw"][box] + np.where(axis == 0, 0.0, math.pi / 2)
    light = np.where(axis == 2, 1.0, 0.82 + 0.08 * np.cos(2 * turned))                     # above, a little from a side
    color = np.full(rays.shape, 0.8)                                                       # what lies above the walls
    color[rows] = _surface(room, box, axis, local)[1] * light[:, None]
    color = color.reshape(5, height, width, 3)[1:].mean(axis=0)
    if rng is not None:
        color = color * rng.uniform(0.8, 1.0) + rng.normal(0, COLOR_NOISE, color.shape)
        depth = np.where(depth > 0, depth + rng.normal(0, 1, depth.shape) * (0.001 + 0.001 * depth ** 2), 0)
        depth[rng.random(depth.shape) < 0.03] = 0      # no reading
    return to_bytes(color), depth.astype(np.float32)


def write_scene(folder, seed, image_size=(160, 120)):
    """Write the room of a seed (int or sequence of int) as a scene folder, straight into `folder`, which is new."""
    room = make_room(rng := np.random.default_rng(seed))
    points, intrinsics = sample_points(room, rng), intrinsics_for(image_size, math.radians(rng.uniform(66, 74)))
    places = rng.uniform((0.3, 0.3, 1.3), (*room["size"][:2] - 0.3, 1.7), (400, 3))
    places = places[~inside_boxes(room, places, 0.3)][:12]          # the tall pieces of a room leave half of it free
    some = points["coord"][:4000].astype(float)
    views = choose_views(lambda *ray: cast_rays(room, *ray)[0], places, some, intrinsics, image_size, rng, VIEW_RANGE)
    frames = ((*render(room, view, intrinsics, image_size, rng), view) for view in views)
    shared.save_scene(Path(folder), points, intrinsics, frames)


def generate(out=ROOT, train=32, val=12, seed=0, workers=None, image_size=(160, 120)):
    """`scenes.generate.generate` of box rooms: make those that are not there yet, and return their number."""
    return shared.generate(out, write_scene, {"train": train, "val": val}, GENERATOR, seed, workers, image_size)


complete, main = partial(shared.complete, generate), partial(shared.main, generate, "scenes.boxes")

if __name__ == "__main__":
    main()
