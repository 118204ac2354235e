"""Furnished rooms: scene folders as a hand-held depth camera makes them.

    python -m scenes.rooms --out data/furnished --train 128 --val 24 --shifted 24 --seed 0

`furnish` sets a room up: walls with openings, furniture of scenes/furniture.py against walls, in the middle, on top of
one another. `scan` walks a camera through its triangles: 8 frames, and points of these and of more frames, with what a
sensor and its tracking do to them. `write_scene` is both. The same seed gives the same bytes.

<root>/shifted holds rooms made with other settings than train and val (SHIFTED): furniture that these never show, another
light, camera, noise and density. Frame: metres, +z up; clutter, ceilings and boards are unlabelled.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from scipy.spatial.transform import Rotation

from scenes import furniture
from scenes import generate as shared
from scenes.folder import CLASS_NAMES, IGNORE, STUFF
from scenes.generate import choose_views, footprints_overlap, intrinsics_for, to_bytes, turn
from scenes.points import complete as complete_points

ROOT = "data/furnished"
GENERATOR = "furnished 1"   # goes into rooms.json: raise it whenever a change alters the bytes of a scene
PATH_SIZE = (120, 90)       # pixels of the frames that make the points
MOST_POINTS = 75_000


@dataclass(frozen=True)
class Setting:
    """What rooms are made with. A pair is the range from which each room draws."""

    held_out: bool = False              # with the models that all others never show, or without them
    scan: bool = True                   # False: points lie evenly on all surfaces, hidden ones too, at their true place
    paint: bool = True                  # False: furniture keeps its colours, and all walls are white
    light: tuple = (0.1, 0.35)          # unevenness
    exposure: tuple = (0.8, 1.25)
    gamma: tuple = (0.85, 1.3)
    warmth: tuple = (-0.03, 0.08)       # more red, less blue
    field_of_view: tuple = (60, 74)     # degrees, horizontal
    height: tuple = (1.2, 1.75)         # m, of the camera
    reach: tuple = (3.5, 6.0)           # m, of the sensor
    noise: tuple = (0.003, 0.007)       # m, of a point, standard deviation on each axis
    drift: tuple = (0.003, 0.015)       # m, of a part of the path, standard deviation on each axis
    spacing: tuple = (0.022, 0.032)     # m, edge of the cells that hold one point
    views: int = 28                     # frames of the path


USUAL = Setting()
SHIFTED = Setting(held_out=True, light=(0.35, 0.55), exposure=(0.55, 0.8), gamma=(1.2, 1.6), warmth=(0.08, 0.16),
                  field_of_view=(50, 58), height=(0.9, 1.2), reach=(3.0, 4.0), noise=(0.008, 0.012),
                  drift=(0.015, 0.025), spacing=(0.035, 0.045), views=36)
SETTINGS = {"usual": USUAL, "no_scan": replace(USUAL, scan=False), "no_paint": replace(USUAL, paint=False)}

# kind of room -> range of its sides in m; class: (fewest, most) pieces, in the order in which they look for a place
LAYOUTS = {
    "bedroom": ((3.0, 4.6), {"bed": (1, 2), "cabinet": (1, 2), "desk": (0, 1), "bookshelf": (0, 1), "chair": (0, 1)}),
    "kitchen": ((2.8, 4.6), {"counter": (1, 2), "refrigerator": (1, 1), "table": (1, 1), "cabinet": (1, 2)}),
    "bathroom": ((2.0, 3.2), {"bathtub": (1, 1), "toilet": (1, 1), "sink": (1, 1), "cabinet": (0, 1)}),
    "living room": ((3.6, 6.0), {"sofa": (1, 3), "table": (0, 1), "bookshelf": (1, 2), "cabinet": (1, 2),
                                 "chair": (0, 2)}),
    "office": ((3.2, 5.6), {"desk": (2, 4), "bookshelf": (1, 2), "cabinet": (1, 2), "table": (0, 1),
                            "refrigerator": (0, 1)}),
    "studio": ((4.2, 6.0), {"counter": (1, 1), "refrigerator": (1, 1), "bed": (1, 1), "table": (1, 1), "sofa": (0, 1),
                            "desk": (0, 1), "cabinet": (1, 1)}),
    "washroom": ((1.8, 2.8), {"toilet": (1, 2), "sink": (1, 2), "shower curtain": (0, 1), "cabinet": (0, 1)}),
    "meeting room": ((3.6, 6.2), {"table": (1, 1), "cabinet": (0, 1), "chair": (1, 4), "bookshelf": (0, 1)}),
}
KINDS, WET, FLOORS = list(LAYOUTS), ("bathroom", "washroom"), ("plain", "carpet", "tiles", "boards", "boards")
# class -> share of its pieces that are random models: the pack has few or similar ones
RANDOM_SHARE = {"window": 0.5, "curtain": 0.8, "shower curtain": 0.7, "picture": 0.9, "refrigerator": 0.5,
                "toilet": 0.3, "bathtub": 0.5, "counter": 0.85, "door": 0.4, "sink": 0.3}


@cache
def pack(held_out):
    """{label: models} of the pack, those that are held out or the others."""
    models, hidden = {}, getattr(furniture, "hidden", lambda m: sum(m.name.encode()) % 5 == 0)
    for model in furniture.load():
        if hidden(model) == held_out:
            models.setdefault(model.label, []).append(model)
    return models


def cuboid(w, d, h, label=""):
    """A box as a model that stands on furniture."""
    vertices, faces = furniture.box((-w / 2, -d / 2, 0), (w / 2, d / 2, h))
    return furniture.Model("box", label, "top", 0.0, vertices, faces, np.full((12, 3), 128, np.uint8))


def some_color(rng):
    """A colour (3,) in [0, 1] as painted, woven or printed things have: mostly dull."""
    return np.clip(rng.uniform(0.1, 0.92) + rng.normal(0, 1, 3) * rng.choice([0.02, 0.06, 0.17]), 0.03, 0.97)


def wood(rng):
    return np.array([0.6, 0.43, 0.28]) * rng.uniform(0.5, 1.5) * rng.uniform(0.93, 1.07, 3)


def wall_color(rng):
    gray = rng.uniform(0.6, 0.95) if rng.random() < 0.8 else rng.uniform(0.3, 0.6)
    return np.clip(gray * (1 + rng.normal(0, 0.04, 3) + np.array([0.03, 0, -0.05]) * rng.uniform(0, 2)), 0.05, 0.97)


def texture(rng, kind, color):
    """A surface of cells: function of positions on it (n, 2) m -> colours (n, 3)."""
    low, high, spread, joint = {
        "plain": ((0.3, 0.3), (0.8, 0.8), 0.04, 0), "carpet": ((0.01, 0.01), (0.03, 0.03), 0.3, 0),
        "tiles": ((0.12, 0.12), (0.5, 0.5), 0.12, 0.012), "boards": ((0.07, 0.5), (0.2, 1.8), 0.35, 0.006),
        "stripes": ((0.04, 9), (0.3, 9), 0.3, 0)}[kind]
    size, spread, grout, salt = rng.uniform(low, high), spread * rng.uniform(0.4, 1), rng.uniform(0.5, 1.2), rng.integers(99)

    def paint(uv):
        cell = uv / size
        row = np.floor(cell[:, 0])
        along = cell[:, 1] + 0.37 * row * (kind == "boards")
        column = np.floor(along)
        mixed = (row * 7919 + column * 104729 + salt).astype(np.int64)
        shade = 1 + spread * (((mixed * mixed ^ mixed >> 3) * 2654435761 >> 8) % 1024 / 1024 - 0.5)
        gap = np.minimum((cell[:, 0] - row) * size[0], (along - column) * size[1]) < joint
        return color * np.where(gap, grout, shade)[:, None]
    return paint


class Room:
    """A room that is being furnished: what stands in it as triangles, and which places are taken.

    size: (3,) m.  walls: list of (origin (2,), along (2,), inward (2,), length, holes).  taken: upright boxes
    (x, y, yaw, half width, half depth, low z, high z).  parts: list of (triangles (F, 3, 3), colours (F, 3) in [0, 1],
    class name or "", texture or None).
    """

    def __init__(self, rng, setting, kind):
        self.rng, self.setting, self.kind, self.parts, self.boxes, self.taken = rng, setting, kind, [], [], []
        self.models = pack(setting.held_out)
        w, d, h = self.size = np.array([*rng.uniform(*LAYOUTS[kind][0], 2), rng.uniform(2.35, 2.9)])
        self.notch = np.array([w, d])                        # the lowest corner of what an L-shaped room lacks
        corners = [(0, 0), (w, 0), (w, d), (0, d)]
        if min(w, d) > 3.4 and rng.random() < 0.35:
            a, b = self.notch = np.array([w, d]) * rng.uniform(0.5, 0.75, 2)
            corners[2:3] = [(w, b), (a, b), (a, d)]
            self.taken.append(((w + a) / 2, (d + b) / 2, 0.0, (w - a) / 2, (d - b) / 2, 0.0, h))
        self.walls = []
        for start, end in zip(np.array(corners), np.roll(corners, -1, axis=0)):
            along = (end - start) / np.linalg.norm(end - start)
            self.walls.append((start, along, np.array([-along[1], along[0]]), np.linalg.norm(end - start), []))
        self.wall_paint = wall_color(rng) if setting.paint else np.full(3, 0.9)

    # ---- triangles
    def quad(self, corner, along, up, label, color, paint=None):
        """A rectangle corner + a along + b up, 0 <= a, b <= 1."""
        a, b, c, d = corner, corner + along, corner + along + up, corner + up
        self.parts.append((np.array([(a, b, c), (a, c, d)]), np.tile(color, (2, 1)), label, paint))
        self.boxes.append(None)

    def put(self, model, x, y, yaw, z=None, size=None, check=True, ignore=None, margin=0.03):
        """Stand a model at x, y, its front turned by yaw from -y; size: m, None as it is, a bit larger or smaller.

        Returns its box, or None where something is in the way (check; not the box `ignore`).
        """
        rng, extent = self.rng, np.ptp(model.vertices, axis=0)
        scale = rng.uniform(0.93, 1.07) * rng.uniform(0.96, 1.04, 3) if size is None else size / np.maximum(extent, 1e-3)
        w, d, h = extent * scale
        z = model.elevation if z is None else z
        box = (x, y, yaw, w / 2, d / 2, z, z + h)
        if check and (not self.holds(box) or any(
                footprints_overlap(box, other, margin) for other in self.taken if other is not ignore)):
            return None
        self.taken.append(box)
        self.boxes.append(box)
        vertices = turn(model.vertices * scale * (rng.choice([-1, 1]), 1, 1), yaw) + (x, y, z)
        self.parts.append((vertices[model.faces], self.painted(model.color / 255), model.label, None))
        return box

    def holds(self, box):
        """Whether an upright box lies between the outer walls and under the ceiling."""
        x, y, yaw, w, d, _, top = box
        c, s = abs(math.cos(yaw)), abs(math.sin(yaw))
        reach = np.array([c * w + s * d, s * w + c * d]) - 0.02
        return top < self.size[2] and ((x, y) >= reach).all() and ((x, y) <= self.size[:2] - reach).all()

    def painted(self, color):
        """Colours (F, 3) of a model as another owner has it: other brightness and contrast, now and then another hue."""
        rng, mean = self.rng, color.mean(axis=0)
        kept, contrast, dull, other = rng.uniform(0.7, 1.25), rng.uniform(0.6, 1.1), rng.uniform(0, 0.7), some_color(rng)
        which = rng.random()
        if not self.setting.paint:
            return color
        new = other if which < 0.3 else kept * (mean + dull * (mean.mean() - mean) * (which < 0.7))
        return np.clip(new + (color - mean) * contrast, 0, 1)

    def pick(self, label, fits=lambda model, extent: True):
        """A model of a class, by chance; None where none fits."""
        models = [m for m in self.models.get(label, []) if fits(m, np.ptp(m.vertices, axis=0))]
        if self.rng.random() < RANDOM_SHARE.get(label, 0) or label in RANDOM_SHARE and not models:
            return furniture.parametric(label, self.rng)
        return models[self.rng.integers(len(models))] if models else None

    # ---- places
    def against(self, model, tries=40, wall=None, at=None, z=None, margin=0.03):
        """Put a model's back to a wall, `at` m along it; its box or None."""
        rng, extent = self.rng, np.ptp(model.vertices, axis=0) * 1.08
        for _ in range(tries if at is None else 1):
            origin, along, inward, length, _ = wall or self.walls[rng.integers(len(self.walls))]
            if extent[0] > length:
                continue
            ends = extent[0] / 2, length - extent[0] / 2
            place = at or (rng.uniform(*ends) if rng.random() < 0.8 else rng.choice(ends))
            off = extent[1] / 2 + (0.0 if model.place == "wall" else abs(rng.normal(0, 0.03)))
            low = model.elevation + rng.uniform(-0.1, 0.1) * (model.elevation > 0.2) if z is None else z
            box = self.put(model, *(origin + along * place + inward * off), facing(inward), low, margin=margin)
            if box:
                return box
        return None

    def amid(self, model, tries=40, margin=0.3):
        """Put a model somewhere off the walls; its box or None."""
        for _ in range(tries):
            yaw = self.rng.integers(4) * math.pi / 2 + self.rng.normal(0, 0.06)
            box = self.put(model, *self.rng.uniform((0.4, 0.4), self.size[:2] - 0.4), yaw, margin=margin)
            if box:
                return box
        return None

    def beside(self, box, model, right, front, yaw=0.0, **how):
        """Put a model at (right, front) m from the middle of a box, in its frame: front is where it looks."""
        c, s = math.cos(box[2]), math.sin(box[2])
        return self.put(model, box[0] + c * right + s * front, box[1] + s * right - c * front, box[2] + yaw, **how)

    def on_top(self, box, model, tries=8, jitter=0.3):
        """Put a model on the piece of a box, where that is level; its box or None."""
        rng, half = self.rng, np.ptp(model.vertices, axis=0)[:2] / 2
        support = next(part[0] for part, of in zip(self.parts, self.boxes) if of is box)
        for _ in range(tries):
            right, front = rng.uniform(-1, 1, 2) * np.maximum(np.array(box[3:5]) - half - 0.02, 0)
            c, s = math.cos(box[2]), math.sin(box[2])
            feet = np.array([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]) * half * 0.8 + (right, front)
            z = [top_at(support, box[0] + c * r + s * f, box[1] + s * r - c * f) for r, f in feet]
            if np.ptp(z) < 0.03 and z[0] > 0.1:
                placed = self.beside(box, model, right, front, rng.normal(0, jitter), z=max(z), ignore=box, margin=0.0)
                if placed:
                    return placed
        return None

    def clutter(self, box, most):
        """Small things on top of a piece: unlabelled, as annotators leave them."""
        for _ in range(self.rng.integers(0, most + 1)):
            small = self.pick("", lambda m, e: m.place == "top" and (e < (0.9 * box[3] * 2, 0.9 * box[4] * 2, 0.8)).all())
            if small is None or self.rng.random() < 0.4:
                small = cuboid(*self.rng.uniform((0.05, 0.05, 0.02), (0.3, 0.25, 0.3)))
            self.on_top(box, small)

    def add(self, label):
        """A piece of a class where such a piece stands, with what belongs to it; its box or None."""
        rng, box = self.rng, None
        fits = {"desk": lambda m, e: True, "table": lambda m, e: (e[2] > 0.6) == (self.kind != "living room"),
                "": lambda m, e: m.place == "floor"}.get(label, lambda m, e: m.place != "top")
        model = self.pick(label, fits)
        if model is None:
            return None
        amid = {"table": 0.85, "chair": 0.4, "sofa": 0.25, "": 0.3}.get(label, 0.0)
        if rng.random() < amid and (box := self.amid(model)) is None or not amid or box is None:
            box = box or self.against(model)
        if box is None:
            return None
        w, d, low, top = 2 * box[3], 2 * box[4], box[5], box[6]
        if label == "bed":
            for side in (-1, 1):
                stand = self.pick("", lambda m, e: "bedside" in m.name) or self.pick("cabinet", lambda m, e: e[2] < 0.7)
                if rng.random() < 0.6 and stand is not None:
                    e = np.ptp(stand.vertices, axis=0)
                    self.clutter_if(self.beside(box, stand, side * (w / 2 + e[0] / 2 + 0.08), e[1] / 2 - d / 2 + 0.05), 2)
        if label in ("desk", "table") and top > 0.6:
            chair = self.pick("chair", lambda m, e: e[0] < 0.75 and e[2] < 1.2)
            depth = np.ptp(chair.vertices, axis=0)[1]
            sides = [(0, 0.0, d)] if label == "desk" else [(i, i * math.pi / 2, (d, w)[i % 2]) for i in range(4)]
            for i, yaw, across in sides:
                width = (w, d)[i % 2]
                seats = 1 if label == "desk" else int(width / rng.uniform(0.65, 0.9))
                for seat in range(seats):
                    if rng.random() < 0.85:
                        out, off = across / 2 + depth / 2 - rng.uniform(-0.25, 0.2), ((seat + 0.5) / seats - 0.5) * width
                        right, front = ((off, out), (out, off), (off, -out), (-out, off))[i]
                        self.beside(box, chair, right, front, math.pi + yaw + rng.normal(0, 0.25), ignore=box)
        if label == "sofa" and (low_table := self.pick("table", lambda m, e: e[2] < 0.56)) and rng.random() < 0.6:
            self.clutter_if(self.beside(box, low_table, rng.normal(0, 0.15), d / 2 + 0.4 + np.ptp(low_table.vertices, axis=0)[1] / 2), 3)
        if label == "counter":
            if sink := self.pick("sink", lambda m, e: m.place == "top"):
                self.on_top(box, sink, jitter=0.0)
            for right in np.arange(-w / 2 + 0.4, w / 2 - 0.2, 0.7):
                if rng.random() < 0.6 and (upper := self.pick("cabinet", lambda m, e: m.place == "wall")):
                    self.beside(box, upper, right, np.ptp(upper.vertices, axis=0)[1] / 2 - d / 2, ignore=box)
        if label == "bathtub":
            self.shower_curtain(box)
        if label in ("desk", "table", "counter", "cabinet", "bookshelf", "otherfurniture", "") and top < 1.5:
            self.clutter(box, 4)
        return box

    def clutter_if(self, box, most):
        if box:
            self.clutter(box, most)

    def shower_curtain(self, box):
        """A curtain along the front of a bathtub's box, drawn to a part of it."""
        width = 2 * box[3] * self.rng.uniform(0.35, 0.95)
        side = self.rng.choice([-1, 1]) * (box[3] - width / 2)
        low, high = self.rng.uniform(0.1, 0.4), self.rng.uniform(1.8, 2.05)
        self.beside(box, self.pick("shower curtain"), side, box[4] + 0.03, size=(width, 0.1, high - low), z=low, check=False)

    # ---- walls
    def opening(self, kind, tries=20):
        """Cut a door, passage or window into a wall, and fill it; False where no wall has room for it."""
        rng = self.rng
        width, low, high = {"door": (rng.uniform(0.8, 1.0), 0.0, rng.uniform(1.95, 2.1)),
                            "passage": (rng.uniform(0.8, 1.6), 0.0, rng.uniform(2.0, 2.2)),
                            "window": (rng.uniform(0.6, 2.2), rng.uniform(0.5, 1.1), rng.uniform(1.9, 2.25))}[kind]
        swing = rng.uniform(1.0, 2.0) if rng.random() < 0.4 else 0.0
        clear = 0.1 if kind == "window" else 0.9
        for _ in range(tries):
            origin, along, inward, length, holes = wall = self.walls[rng.integers(len(self.walls))]
            if width + 0.3 > length:
                continue
            at = rng.uniform(0.15 + width / 2, length - 0.15 - width / 2)
            middle, yaw = origin + along * at, facing(inward)
            keep = (*(middle + inward * clear / 2), yaw, width / 2 + 0.05, clear / 2, low, high)
            if any(footprints_overlap(keep, other, 0.0) for other in self.taken):
                continue
            self.taken.append(keep)
            holes.append((at - width / 2, at + width / 2, low, high))
            if kind != "passage":
                model, size = self.pick(kind), (width, 0.08, high - low)
                place, turned = middle - inward * (0.05 if kind == "door" else rng.uniform(0.02, 0.1)), 0.0
                if kind == "door" and swing:       # it turns into the room about one end
                    hinge = rng.choice([-1, 1])
                    turned = hinge * swing
                    place = middle + along * hinge * width / 2 - turn(np.array([[hinge * width / 2, 0, 0]]), yaw + turned)[0, :2]
                self.put(model, *place, yaw + turned, low, size, check=False)
            if kind == "window" and rng.random() < 0.65:
                self.curtains(middle, yaw, width, low, high)
            if kind == "passage" or kind == "door" and swing:
                self.corridor(wall, at, width)
            return True
        return False

    def curtains(self, middle, yaw, width, low, high):
        """Curtains at a window: one or two, down to its sill or the floor."""
        rng = self.rng
        bottom = rng.uniform(0.02, 0.15) if rng.random() < 0.5 else low - 0.1
        high = min(high + 0.15, self.size[2] - 0.03)
        model, share = self.pick("curtain"), rng.uniform(0.15, 0.5, 2)
        for side in ((-1, 1) if rng.random() < 0.75 else (rng.choice([-1, 1]),)):
            w = (width + 0.3) * share[max(side, 0)]
            right = side * ((width + 0.3) - w) / 2
            place = middle + turn(np.array([[right, -0.08, 0]]), yaw)[0, :2]
            self.put(model, *place, yaw, bottom, (w, 0.1, high - bottom), check=False)

    def corridor(self, wall, at, width):
        """A piece of what lies behind a door, now and then with a piece of furniture."""
        rng, (origin, along, inward, length, _) = self.rng, wall
        left, right = max(0, at - width / 2 - rng.uniform(0, 1)), min(length, at + width / 2 + rng.uniform(0, 1))
        far, up = rng.uniform(0.9, 2.5), np.array([0, 0, self.size[2]])
        a, b = np.append(origin + along * left - inward * 0.15, 0), np.append(along * (right - left), 0)
        out, color = np.append(-inward * far, 0), wall_color(rng)
        self.quad(a, b, out, "floor", color, texture(rng, rng.choice(FLOORS), wood(rng)))
        for corner, side in ((a, out), (a + b, out), (a + out, b)):
            self.quad(corner, side, up, "wall", color)
        if rng.random() < 0.4 and (model := self.pick(rng.choice(["cabinet", "bookshelf", "chair"]))):
            w, d, _ = np.ptp(model.vertices, axis=0)
            if w < right - left and d < far - 0.3:
                place = origin + along * (left + right) / 2 - inward * (0.15 + far - d / 2 - 0.05)
                self.put(model, *place, facing(inward), check=False)

    def shell(self):
        """Floor, walls with their holes, skirting, rugs, now and then a strip of ceiling."""
        rng, (w, d, h) = self.rng, self.size
        kinds, color = (("tiles",), some_color(rng)) if self.kind in WET and rng.random() < 0.7 else (FLOORS, some_color(rng))
        kind = rng.choice(kinds)
        paint = texture(rng, kind, wood(rng) if kind == "boards" else color)
        for x, y, a, b in ((0, 0, w, self.notch[1]), (0, self.notch[1], self.notch[0], d - self.notch[1])):
            if b > 0:
                self.quad(np.array([x, y, 0.0]), np.array([a, 0, 0]), np.array([0, b, 0]), "floor", color, paint)
        tiled = self.kind in WET and rng.random() < 0.6
        skirting = wall_color(rng) if rng.random() < 0.6 else None
        for origin, along, inward, length, holes in self.walls:
            kind = "tiles" if tiled else rng.choice(["plain", "stripes"], p=[0.85, 0.15])
            color = self.wall_paint if rng.random() < 0.85 or not self.setting.paint else wall_color(rng)
            paint = texture(rng, kind, color) if self.setting.paint else None
            u, start, out = np.append(along, 0), np.append(origin, 0), np.append(-inward * 0.15, 0)
            xs = np.unique([0, length, *(x for hole in holes for x in hole[:2])])
            zs = np.unique([0, h, *(z for hole in holes for z in hole[2:])])
            for x0, x1 in zip(xs[:-1], xs[1:]):
                for z0, z1 in zip(zs[:-1], zs[1:]):
                    if not any(x0 >= a and x1 <= b and z0 >= c and z1 <= e for a, b, c, e in holes):
                        self.quad(start + u * x0 + [0, 0, z0], u * (x1 - x0), np.array([0, 0, z1 - z0]), "wall", color, paint)
                        if z0 == 0 and skirting is not None:
                            self.quad(start + u * x0 - out * 0.08, u * (x1 - x0), np.array([0, 0, 0.08]), "wall", skirting)
            for a, b, low, high in holes:        # the wall is 15 cm thick
                for x in (a, b):
                    self.quad(start + u * x + [0, 0, low], out, np.array([0, 0, high - low]), "wall", color)
                for z in (low, high):
                    self.quad(start + u * a + [0, 0, z], u * (b - a), out, "wall" if z else "floor", color)
        if rng.random() < 0.12:
            depth = rng.uniform(0.3, 1) * self.notch[1]
            self.quad(np.array([0, 0, h]), np.array([w, 0, 0]), np.array([0, depth, 0]), "", np.full(3, 0.9))


def top_at(triangles, x, y):
    """Height of the highest of triangles (F, 3, 3) above or below (x, y); -1 where there is none."""
    a, b, c = (triangles[:, i, :2] - (x, y) for i in range(3))
    areas = np.stack([p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0] for p, q in ((b, c), (c, a), (a, b))], axis=1)  # (F, 3)
    over = (areas >= 0).all(axis=1) | (areas <= 0).all(axis=1)
    weights, z = areas[over], triangles[over, :, 2]
    total = weights.sum(axis=1)
    return max(((weights * z).sum(axis=1)[total != 0] / total[total != 0]).tolist(), default=-1.0)


def facing(inward):
    """The yaw that turns a front, -y, into a direction (2,)."""
    return math.atan2(inward[0], -inward[1])


def furnish(rng, setting, kind):
    """A Room of a kind of KINDS, furnished by chance."""
    room = Room(rng, setting, kind)
    wet = kind in WET
    for what, low, high in (("door", 1, 2), ("window", 0 if wet else 1, 1 if wet else 3), ("passage", 0, 1)):
        for _ in range(rng.integers(low, high + 1)):
            room.opening(what)
    for label, (low, high) in LAYOUTS[kind][1].items():
        for _ in range(rng.integers(low, high + 1)):
            room.add(label)
    for label, share in (("otherfurniture", 0.5), ("otherfurniture", 0.3), ("chair", 0 if wet else 0.3), ("", 0.6), ("", 0.4)):
        if rng.random() < share:
            room.add(label)
    for label, most in (("picture", 4), ("", 2)):
        for _ in range(rng.integers(0, most + 1)):
            room.against(room.pick(label, lambda m, e: m.place == "wall" and e[2] > 0.1), z=rng.uniform(1.1, 1.7))
    room.shell()
    return room


class Scene:
    """The triangles of a room as arrays, to be looked at.

    triangles: (F, 3, 3) f32 m.  color: (F, 3) in [0, 1].  label, instance: (F,) int, instance IGNORE for walls, floors
    and clutter.  paint: (F,) number of the texture in `textures`, -1: plain.
    """

    def __init__(self, room):
        count = [len(part[0]) for part in room.parts]
        self.size = room.size
        self.triangles = np.concatenate([part[0] for part in room.parts]).astype(np.float32)
        self.color = np.concatenate([part[1] for part in room.parts]).astype(np.float32)
        labels = np.array([CLASS_NAMES.index(part[2]) if part[2] else IGNORE for part in room.parts])
        things = (labels >= 0) & ~np.isin(labels, STUFF)
        self.label = np.repeat(labels, count)
        self.instance = np.repeat(np.where(things, np.cumsum(things) - 1, IGNORE), count)
        self.textures = [part[3] for part in room.parts]
        self.part = np.repeat(np.arange(len(count)), count)
        self.painted = np.repeat([part[3] is not None for part in room.parts], count)
        self.tree = EmbreeScene()
        TriangleMesh(self.tree, self.triangles)

    def cast(self, origin, directions):
        """First hit of rays from origin (R, 3) or (3,) along directions (R, 3): t (R,), inf where there is none."""
        t = self.tree.run(np.ascontiguousarray(np.broadcast_to(origin, directions.shape), np.float32),
                          np.ascontiguousarray(directions, np.float32), query="DISTANCE")
        return np.where(t < 1e6, t, np.inf)

    def albedo(self, face, place):
        """Colours (n, 3) of faces (n,) at places (n, 3) on them."""
        color = self.color[face]
        rows = np.flatnonzero(self.painted[face])
        part = self.part[face[rows]]
        order = np.argsort(part, kind="stable")
        rows, part = rows[order], part[order]
        for some in np.split(rows, np.flatnonzero(np.diff(part)) + 1) if len(rows) else ():
            a, b, c = self.triangles[face[some[0]]]
            axis = np.abs(np.cross(b - a, c - a)).argmax()
            uv = place[some][:, [i for i in (0, 1, 2) if i != axis]]
            color[some] = self.textures[self.part[face[some[0]]]](uv.astype(float))
        return color

    def see(self, poses, intrinsics, image_size, light, offset=(0.0, 0.0)):
        """What cameras (V, 4, 4) see: depth (V, H, W), inf where nothing; face (V, H, W), -1; color (V, H, W, 3)."""
        width, height = image_size
        u, v = np.meshgrid(np.arange(width) + offset[0], np.arange(height) + offset[1])
        rays = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3) @ np.linalg.inv(intrinsics).T
        directions = np.einsum("vij,pj->vpi", poses[:, :3, :3], rays).reshape(-1, 3).astype(np.float32)
        origins = np.repeat(poses[:, :3, 3], len(rays), axis=0).astype(np.float32)
        hit = self.tree.run(origins, directions, output=True)
        face, t, normal = hit["primID"], hit["tfar"], hit["Ng"]
        rows = np.flatnonzero(face >= 0)
        place = origins[rows] + t[rows, None] * directions[rows]
        color = np.full(directions.shape, 0.95, np.float32)       # the sky
        normal = normal[rows] / np.maximum(np.linalg.norm(normal[rows], axis=1, keepdims=True), 1e-9)
        normal *= np.where((normal * directions[rows]).sum(axis=1, keepdims=True) > 0, -1, 1)
        color[rows] = self.albedo(face[rows], place) * light(place, normal)[:, None]
        shape = len(poses), height, width
        return np.where(face >= 0, t, np.inf).reshape(shape), face.reshape(shape), color.reshape(*shape, 3)


def lamps(rng, setting, size):
    """The light of a room: function of places and normals (n, 3) -> (n,), about 1."""
    uneven, sun = rng.uniform(*setting.light), rng.normal(0, 1, 3) * (0.5, 0.5, 0) + (0, 0, 1)
    sun /= np.linalg.norm(sun)
    waves, phases = rng.normal(0, 1.2, (3, 5)), rng.uniform(0, 2 * math.pi, 5)
    spots, corner = rng.uniform((0, 0, 0.3), size, (3, 3)), rng.uniform(0.1, 0.4)

    def light(place, normal):
        shade = 0.75 + 0.25 * normal @ sun
        shade *= np.exp(0.5 * uneven * np.sin(place @ waves + phases).sum(axis=1))
        near = sum(np.exp(-((place - spot) ** 2).sum(axis=1) / 0.8) for spot in spots)
        edge = np.sort(np.minimum(np.abs(place), np.abs(place - size)), axis=1)[:, 1]   # m from where two walls meet
        return shade * (1 + 2 * uneven * near) * (1 - corner * np.exp(-edge / 0.3))
    return light


def camera(rng, setting):
    """A dull camera: function of colours (V, H, W, 3) -> colours, with exposure, vignetting, white balance, noise."""
    exposure, gamma, warm = (rng.uniform(*pair) for pair in (setting.exposure, setting.gamma, setting.warmth))
    white = np.array([1 + warm, 1, 1 - 1.3 * warm]) * rng.uniform(0.97, 1.03, 3)
    dark, saturation, black = rng.uniform(0.05, 0.35), rng.uniform(0.55, 1.05), rng.uniform(0, 0.03)

    def develop(color, gains, rng):
        y, x = (np.linspace(-1, 1, n) for n in color.shape[1:3])
        color = color * gains[:, None, None, None] * exposure * (1 - dark / 2 * (x ** 2 + y[:, None] ** 2))[..., None]
        gray = color.mean(axis=-1, keepdims=True)
        color = ((gray + (color - gray) * saturation) * white).clip(0, 1) ** gamma + black
        return color + rng.normal(0, 0.015, (*color.shape[:3], 1)) + rng.normal(0, 0.01, color.shape)
    return develop


def scan(room, rng, image_size):
    """Walk a camera through a room (Room).

    Returns points, dict of arrays as a scene folder has them; intrinsics (3, 3); frames, list of (color (H, W, 3) u8,
    depth (H, W) f32 m along z, 0 = none, camera_to_world (4, 4) as the tracking has it, so with its drift).
    """
    setting, scene = room.setting, Scene(room)
    light, develop = lamps(rng, setting, room.size), camera(rng, setting)
    angle = math.radians(rng.uniform(*setting.field_of_view))
    intrinsics, path_intrinsics = intrinsics_for(image_size, angle), intrinsics_for(PATH_SIZE, angle)
    reach, spacing, noise, drift = (rng.uniform(*pair) for pair in (
        setting.reach, setting.spacing, setting.noise, setting.drift))
    # the path: places to stand, at each some directions
    places = rng.uniform((0.3, 0.3, setting.height[0]), (*room.size[:2] - 0.3, setting.height[1]), (400, 3))
    spheres = [(x, y, 0.0, 0.0, 0.0, z - 0.05, z + 0.05) for x, y, z in places]
    clear = [not any(footprints_overlap(box, sphere, 0.2) for box in room.taken) for sphere in spheres]
    places = places[np.array(clear)][:10] if any(clear) else places[:5]
    corners = scene.triangles.astype(float)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    some = rng.choice(len(area), 2500, p=area / area.sum())
    coord = np.einsum("fc,fck->fk", rng.dirichlet(np.ones(3), len(some)), corners[some])
    poses = np.array(choose_views(scene.cast, places, coord, path_intrinsics, PATH_SIZE, rng, reach, setting.views))
    stand = np.unique(poses[:, :3, 3], axis=0, return_inverse=True)[1].ravel()
    shift, tilt = rng.normal(0, drift, (len(places), 3)), rng.normal(0, drift / 3, (len(places), 3))
    tracked = poses.copy()
    tracked[:, :3, :3] = Rotation.from_rotvec(tilt[stand]).as_matrix() @ poses[:, :3, :3]
    tracked[:, :3, 3] += shift[stand]
    frame = np.eye(4)                                        # a scan is never quite aligned with the walls
    frame[:3, :3] = Rotation.from_euler("z", rng.normal(0, 0.04)).as_matrix()
    tracked = frame @ tracked

    def sense(depth):
        """Depth (V, H, W) as a sensor measures it: noise, a range, holes; 0 = no reading."""
        v, h, w = depth.shape
        holes = rng.random((v, -(-h // 8), -(-w // 8))) < 0.02
        holes = holes.repeat(8, axis=1).repeat(8, axis=2)[:, :h, :w] | (rng.random(depth.shape) < 0.03)
        noisy = depth + rng.normal(0, 1, depth.shape) * (0.001 + 0.0015 * np.minimum(depth, 9) ** 2)
        return np.where(holes | (depth > reach), 0, noisy).astype(np.float32)

    # the points: what all frames of the path see, one in a cell
    depth, face, color = scene.see(poses, path_intrinsics, PATH_SIZE, light)
    means = color.mean(axis=(1, 2, 3))
    gains = (0.42 / means) ** 0.6 * rng.uniform(0.9, 1.1, len(means))    # exposed by itself
    color, depth = develop(color, gains, rng), sense(depth)
    view, v, u = np.nonzero(depth)
    z = depth[view, v, u]
    rays = np.stack([u, v, np.ones_like(u)], axis=1) @ np.linalg.inv(path_intrinsics).T * z[:, None]
    world = np.einsum("nij,nj->ni", tracked[view, :3, :3], rays) + tracked[view, :3, 3]
    cell = np.floor((world - world.min(axis=0)) / spacing).astype(np.int64) @ (1, 2 ** 20, 2 ** 40)
    _, first, row = np.unique(cell, return_index=True, return_inverse=True)
    row, count = row.ravel(), np.bincount(row.ravel())
    coord, color_mean = (np.stack([np.bincount(row, column) for column in values.T], axis=1) / count[:, None]
                         for values in (world, color[view, v, u]))
    keep = np.sort(rng.permutation(len(first))[:MOST_POINTS])
    coord = (coord[keep] + rng.normal(0, noise, (len(keep), 3))).astype(np.float32)
    face = face[view, v, u][first[keep]]
    ids, instance = np.unique(np.append(scene.instance[face], IGNORE), return_inverse=True)
    done, _ = complete_points({"coord": coord, "normal": None, "superpoint": None})
    points = {"coord": coord, "color": to_bytes(color_mean[keep]), "normal": done["normal"],
              "segment20": scene.label[face].astype(np.int32), "instance": (instance.ravel()[:-1] - 1).astype(np.int32),
              "superpoint": done["superpoint"].astype(np.int32)}
    # the frames: the first of the path, colour from four rays a pixel
    key = poses[:shared.FRAMES]
    depth = sense(scene.see(key, intrinsics, image_size, light)[0])
    offsets = ((-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375))
    image = sum(scene.see(key, intrinsics, image_size, light, offset)[2] for offset in offsets) / len(offsets)
    image = to_bytes(develop(image, gains[:len(key)], rng))
    return points, intrinsics, list(zip(image, depth, tracked))


def write_scene(folder, seed, image_size=(160, 120), setting="usual"):
    """Write the room of a seed, (seed, split, number), as a scene folder, straight into `folder`, which is new."""
    rng = np.random.default_rng(seed)
    chosen = SHIFTED if seed[1] == 2 else SETTINGS[setting]
    room = furnish(rng, chosen, KINDS[seed[2] % len(KINDS)])
    shared.save_scene(Path(folder), *scan(room, rng, image_size))


def generate(root=ROOT, train=128, val=24, shifted=0, seed=0, workers=None, image_size=(160, 120), setting="usual"):
    """`scenes.generate.generate` of furnished rooms: make those that are not there yet, and return their number."""
    return shared.generate(root, write_scene, {"train": train, "val": val, "shifted": shifted}, GENERATOR, seed, workers,
                           image_size, setting=setting)


complete, main = partial(shared.complete, generate), partial(shared.main, generate, "scenes.rooms")

if __name__ == "__main__":
    main()
