"""Furnished rooms: scene folders with points, labels and posed RGB-D frames as a hand-held depth camera makes them.

    python -m scenes.rooms --out data/furnished --train 128 --val 24 --shifted 24 --seed 0

`furnish` sets a room up: walls with openings, models of scenes/furniture.py against walls, off them, on top of one
another. scenes/scan.py walks a camera through its triangles. The same seed gives the same bytes. <root>/shifted is made
with SHIFTED: furniture that train and val never show, another light, camera, noise and density.

Frame: metres, +z up. Unlabelled, as annotators of ScanNet leave it, is what is none of the 20 classes: clutter, plants,
stoves, a strip of ceiling. The first kind of room is number 0's, and so on: 8 rooms in a row show all classes.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from scenes import furniture
from scenes import generate as shared
from scenes.generate import footprints_overlap, turn
from scenes.scan import Triangles, scan

ROOT = "data/furnished"
GENERATOR = "furnished 1"   # goes into rooms.json: raise it whenever a change alters the bytes of a scene
THICK = 0.15                # m, of the walls


@dataclass(frozen=True)
class Setting:
    """What rooms are made with. A pair is the range from which each room draws."""

    held_out: bool = False              # furniture that all others never show, or all but that
    scan: bool = True                   # False: points lie evenly on all surfaces, hidden ones too, with true colours
    paint: bool = True                  # False: furniture keeps its colours, the walls are white
    light: tuple = (0.1, 0.35)          # unevenness
    exposure: tuple = (0.9, 1.35)
    gamma: tuple = (0.85, 1.3)
    warmth: tuple = (-0.03, 0.08)       # more red, less blue
    field_of_view: tuple = (60, 74)     # degrees, horizontal
    height: tuple = (1.2, 1.75)         # m, of the camera
    reach: tuple = (3.5, 6.0)           # m, of the sensor
    noise: tuple = (0.003, 0.007)       # m, of a point, standard deviation on each axis
    drift: tuple = (0.003, 0.015)       # m, of a part of the walk, standard deviation on each axis
    spacing: tuple = (0.034, 0.052)     # m, edge of the cells that hold one point: these lie half as far apart
    views: int = 28                     # frames of the walk


USUAL = Setting()
SHIFTED = Setting(held_out=True, light=(0.35, 0.55), exposure=(0.8, 1.1), gamma=(1.2, 1.45), warmth=(0.08, 0.16),
                  field_of_view=(50, 58), height=(0.9, 1.2), reach=(3.0, 4.0), noise=(0.008, 0.012),
                  drift=(0.015, 0.025), spacing=(0.06, 0.07), views=36)
SETTINGS = {"usual": USUAL, "no_scan": replace(USUAL, scan=False), "no_paint": replace(USUAL, paint=False)}

# kind of room -> range of its sides in m; class: (fewest, most) pieces, in the order in which they look for a place
LAYOUTS = {
    "bedroom": ((3.0, 4.4), {"bed": (1, 2), "cabinet": (1, 2), "otherfurniture": (1, 1), "desk": (1, 1),
                             "chair": (0, 1)}),
    "kitchen": ((2.8, 4.4), {"counter": (1, 2), "refrigerator": (1, 1), "table": (1, 1), "cabinet": (1, 2)}),
    "bathroom": ((2.1, 3.0), {"bathtub": (1, 1), "toilet": (1, 1), "sink": (1, 1), "cabinet": (0, 1)}),
    "living room": ((3.6, 5.6), {"sofa": (1, 3), "bookshelf": (1, 2), "cabinet": (1, 2), "chair": (1, 2),
                                 "curtain": (1, 1), "table": (0, 1)}),
    "office": ((3.2, 5.4), {"desk": (2, 4), "bookshelf": (1, 2), "cabinet": (1, 2), "refrigerator": (0, 1)}),
    "studio": ((4.0, 5.6), {"counter": (1, 1), "refrigerator": (1, 1), "bed": (1, 1), "table": (1, 1),
                            "sofa": (1, 1)}),
    "washroom": ((1.9, 3.0), {"bathtub": (0, 1), "toilet": (1, 2), "sink": (1, 2), "shower curtain": (1, 1)}),
    "meeting room": ((3.6, 5.8), {"table": (1, 1), "cabinet": (0, 1), "otherfurniture": (0, 1), "bookshelf": (0, 1)}),
}
KINDS, WET, FLOORS = list(LAYOUTS), ("bathroom", "washroom"), ("plain", "carpet", "tiles", "boards", "boards")
WHITE = ("refrigerator", "toilet", "bathtub", "sink")       # seldom painted in another colour


@cache
def pack(held_out):
    """The models of the pack: those that are held out, or the others."""
    return [model for model in furniture.load() if furniture.hidden(model) == held_out]


def some_color(rng, of="thing"):
    """A colour (3,) in [0, 1] as things (printed, woven, painted), walls or wood have it."""
    if of == "wood":
        return np.array([0.6, 0.43, 0.28]) * rng.uniform(0.5, 1.5) * rng.uniform(0.93, 1.07, 3)
    gray = rng.uniform(*(0.1, 0.92) if of == "thing" else (0.3, 0.6) if rng.random() < 0.2 else (0.6, 0.95))
    hue = rng.normal(0, 1, 3) * rng.choice((0.02, 0.06, 0.17) if of == "thing" else (0.02, 0.05))
    return np.clip(gray + hue, 0.03, 0.97)


def texture(rng, kind, color):
    """A surface of cells: function of positions on it (n, 2) m -> colours (n, 3)."""
    low, high, spread, joint = {
        "plain": ((0.3, 0.3), (0.8, 0.8), 0.04, 0), "carpet": ((0.01, 0.01), (0.03, 0.03), 0.3, 0),
        "tiles": ((0.12, 0.12), (0.5, 0.5), 0.12, 0.012), "boards": ((0.07, 0.5), (0.2, 1.8), 0.35, 0.006),
        "stripes": ((0.04, 9), (0.3, 9), 0.3, 0)}[kind]
    size, spread = rng.uniform(low, high), spread * rng.uniform(0.4, 1)
    grout, salt = rng.uniform(0.5, 1.2), rng.integers(99)

    def paint(place):
        cell = place / size
        cell[:, 1] += 0.37 * np.floor(cell[:, 0]) * (kind == "boards")
        row, column = np.floor(cell).astype(np.int64).T
        mixed = row * 7919 + column * 104729 + salt
        shade = 1 + spread * (((mixed * mixed ^ mixed >> 3) * 2654435761 >> 8) % 1024 / 1024 - 0.5)
        return color * np.where((cell % 1 * size).min(axis=1) < joint, grout, shade)[:, None]
    return paint


class Wall:
    """A wall of a length in m from one corner to another, (2,); holes: list of (low, high along it, low, high z)."""

    def __init__(self, start, end):
        self.start, self.length, self.holes = start, np.linalg.norm(end - start), []
        x, y = (end - start) / self.length
        self.along, self.inward, self.yaw = np.array([x, y, 0]), np.array([-y, x, 0]), math.atan2(-y, -x)

    def at(self, right, front=0.0, up=0.0):
        """A place (3,): right along the wall, front into the room."""
        return np.append(self.start, up) + self.along * right + self.inward * front


class Room:
    """A room that is being furnished.

    size: (3,) m.  notch: (2,), an L lacks what lies beyond it.  walls: list of Wall.
    taken: upright boxes (x, y, yaw, half width, half depth, low z, high z) of what is in the way.
    parts: as in scan.Triangles, with the box of each, None where it is no model.
    """

    def __init__(self, rng, setting, kind):
        self.rng, self.setting, self.kind, self.parts, self.taken = rng, setting, kind, [], []
        w, d, h = self.size = np.array([*rng.uniform(*LAYOUTS[kind][0], 2), rng.uniform(2.35, 2.9)])
        corners, self.notch = [(0, 0), (w, 0), (w, d), (0, d)], np.array([w, d])
        if min(w, d) > 3.4 and rng.random() < 0.35:
            a, b = self.notch = self.notch * rng.uniform(0.5, 0.75, 2)
            corners[2:3] = [(w, b), (a, b), (a, d)]
            self.taken.append(((w + a) / 2, (d + b) / 2, 0.0, (w - a) / 2, (d - b) / 2, 0.0, h))
        self.walls = [*map(Wall, np.array(corners), np.roll(corners, -1, axis=0))]

    def pick(self, label, fits=lambda model: model.place != "top"):
        """A model of a class by chance, out of those that fit; None where none does."""
        models = [model for model in pack(self.setting.held_out) if model.label == label and fits(model)]
        share = furniture.RANDOM.get(label, 0)
        if share and (self.rng.random() < share or not models):
            return next(filter(fits, (furniture.parametric(label, self.rng) for _ in range(50))), None)
        return models[self.rng.integers(len(models))] if models else None

    def repaint(self, color, label):
        """Colours (F, 3) u8 of a model as another owner has it: brightness, contrast, now and then another hue."""
        rng, color = self.rng, color / 255
        mean, other, which = color.mean(axis=0), some_color(rng), rng.random() + 0.25 * (label in WHITE)
        new = other if which < 0.3 else rng.uniform(0.75, 1.2) * (mean + rng.uniform(0, 0.5) * (mean.mean() - mean))
        return np.clip(new + (color - mean) * rng.uniform(0.6, 1.1), 0, 1) if self.setting.paint else color

    def put(self, model, x, y, yaw, z=None, size=None, check=True, ignore=None, margin=0.03):
        """Stand a model at x, y, its front turned by yaw from -y; size: (3,) m, None: about its own.

        Returns its box; None where something but the box `ignore` is in the way and check is true.
        """
        rng, own = self.rng, np.maximum(model.size, 1e-3)
        size = own * rng.uniform(0.93, 1.07) * rng.uniform(0.96, 1.04, 3) if size is None else np.array(size)
        z = model.elevation if z is None else z
        low = 0.0 if model.place == "wall" and z < 1 else z  # nothing stands under a sink
        box, c, s = (x, y, yaw, *size[:2] / 2, low, z + size[2]), abs(math.cos(yaw)), abs(math.sin(yaw))
        reach = np.array([c * size[0] + s * size[1], s * size[0] + c * size[1]]) / 2 - 0.02
        if check and (box[6] > self.size[2] or ((x, y) < reach).any() or ((x, y) > self.size[:2] - reach).any() or any(
                footprints_overlap(box, other, margin) for other in self.taken if other is not ignore)):
            return None
        triangles = turn(model.triangles / own * size * (rng.choice((-1, 1)), 1, 1), yaw) + np.array((x, y, z))
        self.parts.append((triangles, self.repaint(model.color, model.label), model.label, None, box))
        self.taken.append(box)
        return box

    def quad(self, corner, along, up, label, color, paint=None):
        """A rectangle corner + a along + b up, 0 <= a, b <= 1."""
        a, b, c, d = corner + np.array([(0, 0, 0), along, np.add(along, up), up])
        self.parts.append((np.array([(a, b, c), (a, c, d)]), np.tile(color, (2, 1)), label, paint, None))

    def stand(self, model, amid=False, z=None):
        """Put a model somewhere with its back to a wall, or amid the room; its box or None."""
        rng, (w, d, _) = self.rng, model.size * 1.08
        for _ in range(40):
            x, y = rng.uniform(0.4, self.size[:2] - 0.4)
            yaw = rng.integers(4) * math.pi / 2 + rng.normal(0, 0.06)
            wall = self.walls[rng.integers(len(self.walls))]
            if not amid:
                at = w / 2 + (wall.length - w) * (rng.random() if rng.random() < 0.8 else rng.integers(2))
                gap = 0.0 if model.place == "wall" else abs(rng.normal(0, 0.03))
                (x, y, _), yaw = wall.at(at, d / 2 + gap), wall.yaw
            if (amid or w < wall.length) and (box := self.put(model, x, y, yaw, z, margin=0.3 if amid else 0.03)):
                return box
        return None

    def beside(self, box, model, right, front, yaw=0.0, **how):
        """Put a model at (right, front) m from the middle of a box, in its frame: front is where it looks."""
        x, y, _ = turn((right, -front, 0.0), box[2])
        return self.put(model, box[0] + x, box[1] + y, box[2] + yaw, **how)

    def on_top(self, box, model, jitter=0.3):
        """Put a model on the piece of a box, where that is level; its box or None."""
        rng, half = self.rng, model.size[:2] / 2
        support = Triangles([next(part for part in self.parts if part[4] is box)])
        for _ in range(8):
            right, front = rng.uniform(-1, 1, 2) * np.maximum(np.array(box[3:5]) - half - 0.02, 0)
            feet = np.array([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]) * half * 0.8 + (right, -front)
            above = turn(np.column_stack([feet, np.full(5, 9.0)]), box[2]) + np.array((*box[:2], 0))
            z = 9 - support.hit(above, np.tile((0.0, 0.0, -1.0), (5, 1)))[0]
            if np.isfinite(z).all() and np.ptp(z) < 0.03 and (placed := self.beside(
                    box, model, right, front, rng.normal(0, jitter), z=z.max(), ignore=box, margin=0.0)):
                return placed
        return None

    def clutter(self, box, most):
        """Small things on top of the piece of a box, if there is one."""
        for _ in range(self.rng.integers(0, most + 1) if box else 0):
            small = self.pick("", lambda m: m.place == "top" and (m.size < (1.8 * box[3], 1.8 * box[4], 0.8)).all())
            if small is None or self.rng.random() < 0.4:
                w, d, h = self.rng.uniform((0.05, 0.05, 0.02), (0.3, 0.25, 0.3))
                block = furniture.box((-w / 2, w / 2), (-d / 2, d / 2), (0, h))
                small = furniture.Model("box", "", "top", 0.0, block, np.full((12, 3), 128))
            self.on_top(box, small)

    def add(self, what):
        """A piece of a class where such pieces stand, with what belongs to it, or an opening."""
        if what in ("door", "window", "passage"):
            return self.opening(what)
        rng, high = self.rng, self.kind != "living room"
        hung = what == "picture" or (what == "" and rng.random() < 0.4)
        model = self.pick(what, lambda m: m.place == "wall" if hung else m.place == "floor" if what == "" else
                          m.place != "top" and (what != "table" or (m.size[2] > 0.6) == high))
        amid = rng.random() < {"table": 0.85, "chair": 0.4, "sofa": 0.25, "": 0.3}.get(what, 0) and not hung
        box = model and self.stand(model, amid, rng.uniform(1.1, 1.7) if hung else None)
        if not box or hung:
            return
        w, d, top = 2 * box[3], 2 * box[4], box[6]
        if what == "bed":
            for side in (-1, 1):
                stand = self.pick("", lambda m: "bedside" in m.name) or self.pick("cabinet", lambda m: m.size[2] < 0.7)
                if rng.random() < 0.6 and stand:
                    right, front = side * (w + stand.size[0] + 0.15) / 2, (stand.size[1] - d + 0.1) / 2
                    self.clutter(self.beside(box, stand, right, front), 2)
        elif what in ("desk", "table") and top > 0.6:
            self.chairs(box, 1 if what == "desk" else 4)
        elif what == "sofa" and rng.random() < 0.6:
            if table := self.pick("table", lambda m: m.size[2] < 0.56):
                self.clutter(self.beside(box, table, rng.normal(0, 0.15), (d + table.size[1]) / 2 + 0.4), 3)
        elif what == "counter":
            if sink := self.pick("sink", lambda m: m.place == "top"):
                self.on_top(box, sink, jitter=0.0)
            for right in np.arange(0.4, w - 0.2, 0.7) - w / 2:
                if rng.random() < 0.6 and (upper := self.pick("cabinet", lambda m: m.place == "wall")):
                    self.beside(box, upper, right, (upper.size[1] - d) / 2, ignore=box)
        elif what == "bathtub":                              # a curtain, drawn to a part of it
            share, low, high = rng.uniform(0.35, 0.95), rng.uniform(0.1, 0.4), rng.uniform(1.8, 2.05)
            self.beside(box, self.pick("shower curtain"), rng.choice((-1, 1)) * (1 - share) * w / 2, d / 2 + 0.03,
                        size=(share * w, 0.1, high - low), z=low, check=False)
        if what not in ("chair", "sofa", "bathtub", "toilet", "shower curtain") and top < 1.6:
            self.clutter(box, 6)

    def chairs(self, box, sides):
        """Chairs at a table's box, fronts to it, now and then one missing: on its front or on all four sides."""
        rng, chair = self.rng, self.pick("chair", lambda m: m.size[0] < 0.75 and m.size[2] < 1.2)
        for side in range(sides):
            width, across = (box[3:5], box[4:2:-1])[side % 2]
            count = 1 if sides == 1 else int(2 * width / rng.uniform(0.65, 0.9))
            for seat in np.arange(count)[rng.random(count) < 0.85]:
                out, yaw = across + chair.size[1] / 2 - rng.uniform(-0.25, 0.2), side * math.pi / 2
                right, down, _ = turn((((2 * seat + 1) / count - 1) * width, -out, 0.0), yaw)
                self.beside(box, chair, right, -down, yaw + math.pi + rng.normal(0, 0.25), ignore=box)

    def opening(self, kind):
        """Cut a door, passage or window into a wall with room for it, and fill it."""
        rng = self.rng
        width, low, high = (rng.uniform(*pair) for pair in {
            "door": ((0.8, 1.0), (0, 0), (1.95, 2.1)), "passage": ((0.8, 1.6), (0, 0), (2.0, 2.2)),
            "window": ((0.6, 2.2), (0.5, 1.1), (1.9, 2.25))}[kind])
        swing = rng.choice((-1, 1)) * rng.uniform(1.0, 2.0) * (kind == "door" and rng.random() < 0.4)
        for _ in range(20):
            wall = self.walls[rng.integers(len(self.walls))]
            at, clear = width / 2 + 0.15 + rng.random() * (wall.length - width - 0.3), 0.1 if low else 0.9
            keep = (*wall.at(at, clear / 2)[:2], wall.yaw, width / 2 + 0.05, clear / 2, low, high)
            if width + 0.3 < wall.length and not any(footprints_overlap(keep, other, 0.0) for other in self.taken):
                break
        else:
            return
        wall.holes.append((at - width / 2, at + width / 2, low, high))
        frame = (*wall.at(at, -rng.uniform(0.03, 0.1))[:2], wall.yaw)
        if kind != "passage":                                # an open door turns into the room about one end
            hinge = np.sign(swing) * width / 2
            x, y, _ = turn((hinge, 0.0, 0.0), swing)
            self.beside(frame, self.pick(kind), hinge - x, y, swing, z=low, size=(width, 0.08, high - low), check=False)
        if kind == "window" and rng.random() < 0.65:
            low = rng.uniform(0.02, 0.15) if rng.random() < 0.5 else low - 0.1
            model, span, up = self.pick("curtain"), width + 0.3, min(high + 0.15, self.size[2] - 0.03) - low
            for side in ((-1,), (1,), (-1, 1), (-1, 1), (-1, 1))[rng.integers(5)]:
                share = rng.uniform(0.15, 0.5)
                self.beside((*wall.at(at)[:2], wall.yaw), model, side * (1 - share) * span / 2, 0.08, z=low,
                            size=(share * span, 0.1, up), check=False)
        if kind == "passage" or swing:
            self.corridor(wall, at, width)
        self.taken.append(keep)

    def corridor(self, wall, at, width):
        """A piece of what lies behind an opening, now and then with a piece of furniture at its end."""
        rng = self.rng
        left, right = max(0, at - width / 2 - rng.uniform(0, 1)), min(wall.length, at + width / 2 + rng.uniform(0, 1))
        far, color = rng.uniform(0.9, 2.5), some_color(rng, "wall")
        start, across, out = wall.at(left, -THICK), wall.along * (right - left), -wall.inward * far
        self.quad(start, across, out, "floor", color, texture(rng, rng.choice(FLOORS), some_color(rng, "wood")))
        for corner, side in ((start, out), (start + across, out), (start + out, across)):
            self.quad(corner, side, (0, 0, self.size[2]), "wall", color)
        model = self.pick(rng.choice(("cabinet", "bookshelf", "chair")))
        if rng.random() < 0.4 and (model.size[:2] < (right - left, far - 0.3)).all():
            end = start + across / 2 + out * (1 - (model.size[1] / 2 + 0.06) / far)
            self.put(model, *end[:2], wall.yaw, check=False)

    def shell(self):
        """Floor, walls with their holes, skirting, now and then a strip of ceiling."""
        rng, (w, d, h), (a, b), paint = self.rng, self.size, self.notch, self.setting.paint
        tiled, kind = self.kind in WET and rng.random() < 0.6, rng.choice(FLOORS)
        floor = texture(rng, "tiles" if tiled else kind, some_color(rng, "wood" if kind == "boards" else "thing"))
        self.quad((0, 0, 0), (w, 0, 0), (0, b, 0), "floor", np.ones(3), floor)
        if b < d:
            self.quad((0, b, 0), (a, 0, 0), (0, d - b, 0), "floor", np.ones(3), floor)
        main, skirting = some_color(rng, "wall") if paint else np.full(3, 0.9), some_color(rng, "wall")
        skirted = rng.random() < 0.6
        for wall in self.walls:
            color = some_color(rng, "wall") if paint and rng.random() < 0.15 else main
            striped = paint and rng.random() < 0.15
            cover = texture(rng, "tiles" if tiled else "stripes" if striped else "plain", color)
            xs = np.unique([0, wall.length, *(x for hole in wall.holes for x in hole[:2])])
            zs = np.unique([0, h, *(z for hole in wall.holes for z in hole[2:])])
            for x, width in zip(xs, np.diff(xs)):            # the wall in rectangles, those of the holes left out
                for z, height in zip(zs, np.diff(zs)):
                    if not any(hole[0] <= x < hole[1] and hole[2] <= z < hole[3] for hole in wall.holes):
                        self.quad(wall.at(x, 0, z), wall.along * width, (0, 0, height), "wall", color, cover)
                        if z == 0 and skirted:
                            self.quad(wall.at(x, 0.08 * THICK), wall.along * width, (0, 0, 0.08), "wall", skirting)
            for left, right, low, high in wall.holes:        # what is seen of the wall's thickness
                for x in (left, right):
                    self.quad(wall.at(x, 0, low), -wall.inward * THICK, (0, 0, high - low), "wall", color)
                for z in (low, high):
                    across, label = wall.along * (right - left), "wall" if z else "floor"
                    self.quad(wall.at(left, 0, z), across, -wall.inward * THICK, label, color)
        if rng.random() < 0.12:
            self.quad((0, 0, h), (w, 0, 0), (0, b * rng.uniform(0.3, 1), 0), "", np.full(3, 0.9))


def furnish(rng, setting, kind):
    """A Room of a kind of KINDS, furnished by chance: tried again (20 times) until it has what its layout asks for."""
    wet, layout = kind in WET, LAYOUTS[kind][1]
    wanted = {"door": (1, 2 - wet), "window": (not wet, 2 - wet), "passage": (0, 1 - wet), **layout,
              "picture": (not wet, 4), "": (2, 5)}
    for _ in range(20):
        room, full = Room(rng, setting, kind), rng.uniform(0.3, 0.55)
        for what, (fewest, most) in wanted.items():
            for _ in range(rng.integers(fewest, most + 1)):
                room.add(what)
        for what in rng.choice([*layout, "otherfurniture", "", "", "cabinet" if wet else "chair"], 16):
            area = sum(4 * box[3] * box[4] for *_, box in room.parts if box and box[5] < 1)
            if area < full * room.size[:2].prod():
                room.add(str(what))
        if {what for what, (fewest, _) in wanted.items() if fewest} <= {part[2] for part in room.parts}:
            break
    room.shell()
    return room


def write_scene(folder, seed, image_size=(160, 120), setting="usual"):
    """Write the room of a seed, (seed, split, number), as a scene folder, straight into `folder`, which is new."""
    rng, chosen = np.random.default_rng(seed), SHIFTED if seed[1] == 2 else SETTINGS[setting]
    room = furnish(rng, chosen, KINDS[seed[2] % len(KINDS)])
    shared.save_scene(Path(folder), *scan(room, chosen, rng, image_size))


def generate(out=ROOT, train=128, val=24, shifted=0, seed=0, workers=None, image_size=(160, 120), setting="usual"):
    """`scenes.generate.generate` of furnished rooms: make those that are not there yet, and return their number."""
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting {setting!r}; choose from {', '.join(SETTINGS)}")
    counts = {"train": train, "val": val, "shifted": shifted}
    return shared.generate(out, write_scene, counts, GENERATOR, seed, workers, image_size, setting=setting)


complete, main = partial(shared.complete, generate), partial(shared.main, generate, "scenes.rooms")

if __name__ == "__main__":
    main()
