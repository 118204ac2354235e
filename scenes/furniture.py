"""Furniture as coloured triangles: a pack of real models, and random ones where these are few. Loading needs NumPy.

    python -m scenes.furniture sh3d  # makes furniture.npz anew, and the columns author and licence of FURNITURE.md

sh3d: folder of the extracted Debian package sweethome3d-furniture 1.8-1; needs trimesh, scipy and fast-simplification.
The first columns of FURNITURE.md say which models are taken, as what class, and where they stand.
"""

import re
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LICENCES = {"BlendSwap-CC-0": "CC0 1.0", "BlendSwap-CC-BY": "CC-BY 3.0", "KatorLegaz": "CC-BY 3.0 US",
            "Scopia": "CC-BY 3.0"}  # of each library
MOST = 1500  # triangles of a model; half of it without a class
FLAT = 0.1  # metres, depth of windows and doors: theirs is that of the wall they are made for
COLORS = {"white": (226, 226, 222), "cream": (214, 202, 178), "wood": (158, 112, 70), "steel": (166, 168, 172),
          "dark": (42, 42, 46), "brass": (170, 140, 70), "bright": (232, 240, 248)}
# classes of which the pack has few or similar models: share of their pieces in a room that are random models
RANDOM = {"window": 0.6, "curtain": 0.8, "shower curtain": 0.8, "picture": 0.9, "refrigerator": 0.6, "toilet": 0.5,
          "bathtub": 0.6, "counter": 0.9, "door": 0.5, "sink": 0.5, "bookshelf": 0.3}
CUBE = np.array([(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6), (0, 2, 6),
                 (0, 6, 4), (1, 5, 7), (1, 7, 3)])  # triangles of the corners x y z, z changes first


@dataclass(frozen=True, eq=False)
class Model:
    """A piece of furniture of F triangles, which may face either way.

    label: one of scenes.folder.CLASS_NAMES, or "" for what annotators of ScanNet leave out of the 20.
    place: "floor", "wall" (hangs or is mounted on a wall, its back to it) or "top" (stands on furniture).
    elevation: metres of its lowest point above what it stands on, 0 on floor and top.
    triangles: (F, 3, 3) f32 m, x to the right, y to the back, z up; the footprint is centred at x = y = 0, the lowest
    point has z = 0, the front faces -y.  color: (F, 3) u8.  size: (3,) m.
    """

    name: str
    label: str
    place: str
    elevation: float
    triangles: np.ndarray
    color: np.ndarray

    @cached_property
    def size(self):
        return np.ptp(self.triangles, axis=(0, 1))


def _centred(name, label, place, elevation, triangles, color):
    low, high = triangles.min((0, 1)), triangles.max((0, 1))
    triangles = np.float32(triangles - [*(low + high)[:2] / 2, low[2]])
    return Model(name, label, place, elevation, triangles, np.uint8(color))


def load():
    """All models of furniture.npz beside this file: list of Model, each name once."""
    with np.load(HERE / "furniture.npz") as pack:
        data = dict(pack)
    facts = (data[key].tolist() for key in ("name", "label", "place", "elevation"))
    parts = (np.split(data[key], np.cumsum(data[count])[:-1]) for key, count in (
        ("vertices", "points"), ("faces", "triangles"), ("color", "triangles")))
    return [_centred(*row, vertices[faces] / 1000, color) for *row, vertices, faces, color in zip(*facts, *parts)]


def hidden(model):
    """Whether a model is one of those held out, a fifth of every class of three or more: bool, the same on every
    machine. The salt is one under which the classes come out even."""
    return zlib.crc32(f"{model.name}1056".encode()) % 1000 < 200


def box(*sides):
    """The triangles (12, 3, 3) of a box; sides: (low, high) along x, y, z."""
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(8, 3)[CUBE]


class Shape:
    """A random model, put together of parts (triangles, color). The method named as a class makes one, its back at
    y = 0, its front towards -y, and returns place and elevation, if it does not stand on the floor."""

    def __init__(self, label, rng):
        self.shower, self.rng, self.u, self.parts = label == "shower curtain", rng, rng.uniform, []

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def paint(self, kinds):
        """A colour (3,) in 0..255 of one of these kinds, str of COLORS or any."""
        kind = self.pick(*kinds.split())
        base = COLORS.get(kind, self.u(40, 220) + self.rng.normal(0, self.u(0, 70), 3))
        base = np.array(base) * (self.u(0.4, 1.3) if kind == "wood" else 1)
        return np.clip(base + self.rng.normal(0, 10) + self.rng.normal(0, 3, 3), 0, 255)

    def box(self, color, *sides):
        self.parts.append((box(*sides), np.tile(color, (12, 1))))

    def cells(self, color, xs, y, zs, gap, knob=None):
        """Boxes in front of y between the edges xs and zs: doors, drawers, panels; knob: colour of their handles."""
        for i, (a, b) in enumerate(zip(xs, xs[1:])):
            for c, d in zip(zs, zs[1:]):
                self.box(color, (a + gap, b - gap), (y - 0.02, y), (c + gap, d - gap))
                upright = (a + 0.03, a + 0.06) if i else (b - 0.06, b - 0.03), (c + 0.3 * (d - c), d - 0.3 * (d - c))
                x, z = upright if b - a < d - c else ((a + 0.4 * (b - a), b - 0.4 * (b - a)), (d - 0.07, d - 0.05))
                if knob is not None:
                    self.box(knob, x, (y - 0.05, y - 0.02), z)

    def grid(self, points, color):
        """A surface through points (R, C, 3); color (3,), or one of each cell ((R - 1) (C - 1), 3)."""
        a, b, c, d = (of.reshape(-1, 3) for of in (points[:-1, :-1], points[:-1, 1:], points[1:, :-1], points[1:, 1:]))
        triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])
        self.parts.append((triangles, np.tile(np.broadcast_to(color, a.shape), (2, 1))))

    def lathe(self, color, y, *rings):
        """A surface through rings around x = 0 and y: (radius in x, in y, height, power: 2 an ellipse, more a box)."""
        turn, (rx, ry, z, p) = np.linspace(0, 2 * np.pi, 29) + np.pi / 28, np.array(rings, float).T[..., None]  # (R, 1)
        x, dy = (np.sign(of) * abs(of) ** (2 / p) * r for of, r in ((np.cos(turn), rx), (np.sin(turn), ry)))
        self.grid(np.stack([0 + x, y + dy, z + 0 * turn], -1), color)

    def tap(self, x, z):
        color, h = self.paint("steel steel brass dark"), z + self.u(0.08, 0.25)
        self.box(color, (x - 0.015, x + 0.015), (-0.06, -0.03), (z, h))
        self.box(color, (x - 0.012, x + 0.012), (-self.u(0.14, 0.2), -0.06), (h - 0.025, h))

    def window(self):
        low, y, edge = self.pick(0.1, *self.u(0.6, 1.2, 4)), (-self.u(0.04, FLAT), 0), self.u(0.03, 0.08)
        w, h = self.u(0.5, 2.4), min(self.u(0.6, 1.6) + (low == 0.1), 2.3 - low)
        color, level = self.paint("white white white wood dark steel"), self.u(0, h)
        for z in ((0, level), (level, h)):  # the sky, something in front of it, the night
            self.box(self.paint("bright bright bright any dark"), (0, w), (y[0] * 0.6, y[0] * 0.5), z)
        wings, (across, up) = self.rng.integers(1, 3 + (w > 1.4)), self.pick((1, 1), self.rng.integers(1, 4, 2))
        for posts, rails, thick in ((wings, 1, edge), (wings * up, across, edge / 3)):
            bars = [((x - thick, x + thick), (0, h)) for x in np.linspace(0, w, posts + 1)]
            for x, z in (*bars, *(((0, w), (z - thick, z + thick)) for z in np.linspace(0, h, rails + 1))):
                self.box(color, np.clip(x, 0, w), y, np.clip(z, 0, h))
        if self.u() < 0.6:
            self.box(self.paint("white cream wood"), (-0.04, w + 0.04), (-self.u(0.1, 0.25), 0), (-0.03, 0))
        return "wall", low

    def curtain(self):
        half, w = not self.shower and self.u() < 0.3, self.u(0.7, 1.7 if self.shower else 2.4)
        h = self.u(1.6, 1.95) if self.shower else self.u(0.9, 1.5) if half else self.u(2.0, 2.3)
        kinds, aside = "white white any cream" if self.shower else "any any white cream dark", self.u(0.25, 0.6) * w
        self.box(self.paint("steel wood dark white"), (-0.08, w + 0.08), (-0.07, -0.05), (h, h + 0.02))
        colors, pattern, each = np.stack([self.paint(kinds), self.paint(kinds)]), self.rng.integers(5), self.u(7, 14)
        pair = [[(0, aside / 2), (w - aside / 2, w)]] * (not self.shower)
        for left, right in self.pick([(0, w)], [(0, aside)], *pair):
            folds = max(3, int((right - left) * each))
            at, down = np.meshgrid(np.linspace(0, 1, min(80, folds * 6)), np.linspace(0, 1, 7))
            bend = np.cumsum(self.u(0.6, 1.4, at.shape[1]))  # folds of uneven width, deeper at the hem
            fold = np.sin(2 * np.pi * folds * bend / bend[-1] + self.u(-1, 1) * down) * (0.5 + down / 2)
            row, column = np.indices((6, at.shape[1] - 1)).reshape(2, -1)
            marked = (column // 3 % 2, row % 2, self.u(size=row.shape) < 0.15, 0 * row, 0 * row)[pattern]
            points = left + at * (right - left), self.u(0.02, 0.05) * fold - 0.06, h - h * down
            self.grid(np.stack(points, -1), colors[np.int64(marked)])
        return "wall", self.u(0.05, 0.25) if self.shower else 2.33 - h if half else self.u(0.01, 0.08)

    def picture(self):
        w, edge, front = np.exp(self.u(*np.log((0.2, 1.5)))), self.u(0.01, 0.06), -self.u(0.015, 0.04)
        h, shape = np.clip(w * self.u(0.6, 1.6), 0.2, 1.2), self.rng.integers(2, 9, 2)
        self.box(self.paint("wood dark white brass any"), (0, w), (front, 0), (0, h))
        self.box(self.paint("white cream"), (edge, w - edge), (front - 0.002, 0), (edge, h - edge))
        inset = edge + self.pick(0, self.u(0.1, 0.2)) * min(w, h)
        x, z = np.meshgrid(np.linspace(inset, w - inset, shape[1]), np.linspace(inset, h - inset, shape[0]))
        colors = np.stack([self.paint("any any white cream dark") for _ in range(self.rng.integers(2, 6))])
        self.grid(np.stack([x, 0 * x + front - 0.004, z], -1), self.rng.choice(colors, np.prod(shape - 1)))
        return "wall", self.u(1.4, 1.7) - h / 2

    def refrigerator(self):
        w, d, h = self.u(0.55, 0.95), self.u(0.6, 0.8), self.pick(self.u(0.8, 1.0), *self.u(1.4, 2.0, 4))
        color, split = self.paint("white white steel steel dark any"), self.pick(*self.u((0.3, 0.6), (0.45, 0.75)), 1)
        self.box(self.pick(color, self.paint("dark steel")), (0, w), (-d, 0), (0, h))
        doors = np.linspace(0, w, 2 + (w > 0.78)), -d, h * np.unique((0.03, split, 1))
        self.cells(color, *doors, 0.005, self.paint("steel dark white"))
        if w > 0.78 and self.u() < 0.5:
            self.box(self.paint("dark"), (0.1 * w, 0.35 * w), (-d - 0.023, -d), (h * 0.5, h * 0.65))

    def toilet(self):
        rx, ry, h, hung = self.u(0.17, 0.2), self.u(0.22, 0.28), self.u(0.37, 0.44), self.u() < 0.3
        color, foot, low, y = self.paint("white white white cream"), self.u(0.5, 0.75), 0.1 * hung, -0.2 - ry
        seat, lid, power = self.pick(color, color, self.paint("wood dark white")), self.u(), self.u(2, 3)
        tank, deep = self.u(0.17, 0.24), self.u(0.15, 0.19)
        self.lathe(color, y, *((k * rx, k * ry, z, p) for k, z, p in (
            (0, low, 2), (foot, low, 2), (foot * 0.9, (low + h) / 2, 2), (1, h - 0.05, power), (1, h, power),
            (0.75, h, power), (0.5, h - 0.15, 2), (0, h - 0.2, 2))))
        self.lathe(seat, y, *((k * rx, k * ry, h + z, power) for k, z in (
            (1, 0), (1, 0.03), *(((0, 0.04),) if lid < 0.5 else ((0.7, 0.03), (0.7, 0))))))  # closed, or a ring
        self.box(color, (-foot * rx, foot * rx), (y, 0), (low, h - 0.06))
        if lid > 0.75:
            self.box(seat, (-rx, rx), (-deep - 0.03, -deep - 0.01), (h + 0.02, h + 1.6 * ry))
        if not hung:
            self.box(color, (-tank, tank), (-deep, 0), (h - 0.02, h + self.u(0.28, 0.4)))
        return "wall" if hung else "floor", low

    def bathtub(self):
        w, d, h, p = self.u(0.7, 0.92), self.u(0.33, 0.42), self.u(0.45, 0.62), self.pick(2.5, 30, 30)
        color, foot, inner = self.paint("white white white cream steel"), 1 if p > 9 else 0.75, min(p, self.u(3, 8))
        skin, rim = self.pick(color, color, self.paint("any")), self.u(0.04, 0.09)
        self.lathe(skin, -d, (foot * w, foot * d, 0, p), (w, d, h - 0.04, p), (w, d, h, p))
        self.lathe(color, -d, (w, d, h, p), (w - rim, d - rim, h, inner), (0.85 * w, 0.75 * d, h * 0.5, inner),
                   (0.75 * w, 0.6 * d, 0.1, inner), (0, 0, 0.09, 2))
        self.tap(self.pick(-0.7, 0, 0.7) * w, h)

    def counter(self):
        w, d, h, plinth = self.u(1.0, 3.0), self.u(0.5, 0.65), self.u(0.82, 1.0), self.paint("dark")
        top, color = self.paint("wood dark cream steel white"), self.paint("white wood any cream")
        corner, leg, thick = self.pick(0, w - d), -d - self.u(0.5, 1.2), self.u(0.03, 0.06)
        legs = ((0, w), (-d, 0)), ((corner, corner + d), (leg, -d))  # the second makes it an L
        for x, (front, back) in legs[: 1 + (self.u() < 0.3)]:
            self.box(top, (x[0] - 0.01, x[1] + 0.01), (front - 0.03, back), (h, h + thick))
            self.box(color, x, (front, back), (0.1, h))
            self.box(plinth, x, (front + 0.05, back), (0, 0.1))
        doors = np.linspace(0, w, 1 + max(1, round(w / self.u(0.4, 0.6)))), -d, np.linspace(0.1, h, self.pick(2, 2, 4))
        self.cells(color * 0.97, *doors, 0.006, self.paint("steel dark brass"))
        if self.u() < 0.4:
            self.box(top, (0, w), (-0.02, 0), (h, h + self.u(0.1, 0.5)))

    def door(self):
        w, h, edge, y = self.u(0.7, 1.0), self.u(1.95, 2.15), self.u(0.04, 0.09), -self.u(0.02, FLAT - 0.05)
        color, knob = self.paint("white white cream wood wood any steel"), self.paint("steel brass dark")
        pane, count = self.pick(color * 0.9, color * 0.8, self.paint("bright steel")), self.rng.integers((2, 1), (4, 5))
        self.box(self.pick(color, self.paint("white wood dark")), (0, w), (y, 0), (0, h))
        self.box(color, (edge, w - edge), (y - 0.01, 0), (0, h - edge))
        self.cells(pane, np.linspace(edge, w - edge, count[0]), y, np.linspace(0.05, h - edge, count[1]), 0.08)
        x = self.pick(edge + 0.02, w - edge - 0.14)
        self.box(knob, (x, x + 0.12), (y - 0.06, y - 0.04), (1.0, 1.025))
        self.box(knob, (x + 0.045, x + 0.075), (y - 0.05, y), (0.95, 1.06))
        return "wall", 0

    def sink(self):
        w, d, deep, p = self.u(0.19, 0.32), self.u(0.17, 0.25), self.u(0.1, 0.18), self.pick(2, 3, 12)
        place, color = self.pick("floor", "wall", "top"), self.paint("white white cream steel")
        h = deep if place == "top" else self.u(0.8, 0.9)
        self.lathe(color, -d, (0.5 * w, 0.5 * d, h - deep, 2), (w, d, h - deep * 0.3, p), (w, d, h, p),
                   (w - 0.03, d - 0.03, h, p), (0.6 * w, 0.55 * d, h - deep * 0.75, p), (0, 0, h - deep * 0.8, 2))
        if place == "floor":
            self.lathe(color, -d, (0.1, 0.1, 0, 2), (0.07, 0.07, 0.2, 2), (0.09, 0.09, h - deep, 2))
        self.tap(0, h)
        return place, h - deep if place == "wall" else 0

    def bookshelf(self):
        w, d, h, full = self.u(0.5, 1.2), self.u(0.25, 0.4), self.u(0.9, 2.2), self.u(0.3, 1)
        color, shelves = self.paint("wood wood white dark any"), round(h / self.u(0.28, 0.4))
        levels = np.linspace(0.05, h - 0.02, shelves + 1)
        sides = ((0, 0.02), -d, 0, h), ((w - 0.02, w), -d, 0, h), ((0, w), -0.01, 0, h)
        for x, y, low, high in (*sides, *(((0, w), -d, z, z + 0.02) for z in levels)):
            self.box(color, x, (y, 0), (low, high))
        for z in levels[:-1]:
            ends = np.cumsum(self.u(0.02, 0.1, 40))
            for x in zip(ends, ends[1:][ends[1:] < w - 0.03]):
                if self.u() < full and len(self.parts) < 120:
                    y, tall = (-d * self.u(0.7, 0.95), -0.02), self.u(0.55, 0.95) * (levels[1] - levels[0])
                    self.box(self.paint("any any white dark"), x, y, (z, z + tall))


def parametric(label, rng):
    """A random Model of a class of RANDOM, whose name is the class; rng: numpy Generator."""
    shape = Shape(label, rng)
    place, elevation = getattr(shape, label.split()[-1])() or ("floor", 0)
    return _centred(label, label, place, elevation, *map(np.concatenate, zip(*shape.parts)))


def welded(vertices, faces, cell):
    """The vertices of one cell become their mean, triangles without three corners go, and of the same all but one."""
    same = np.unique(np.round(vertices / cell), axis=0, return_inverse=True)[1].reshape(-1)
    faces = same[faces][(same[faces] != np.roll(same[faces], 1, axis=1)).all(1)]
    vertices = np.stack([np.bincount(same, axis) for axis in vertices.T], 1) / np.bincount(same)[:, None]
    return vertices, faces[np.unique(np.sort(faces, axis=1), axis=0, return_index=True)[1]]


def thinned(vertices, faces, most):
    """At most so many triangles of a surface: vertices, faces."""
    if len(faces) <= most:
        return vertices, faces
    from fast_simplification import simplify
    from trimesh.triangles import area

    fewer = simplify(np.float32(vertices), faces, target_count=most)
    found = welded(*fewer, 1e-5)
    if area(fewer[0][fewer[1]]).sum() < 0.7 * area(vertices[faces]).sum() or len(found[1]) > most:  # it eats leaves
        tries = (welded(vertices, faces, cell) for cell in np.geomspace(0.004, 4, 80))
        return next(found for found in tries if len(found[1]) <= most)
    return found


def convert(path, item, most):
    """The .obj of an item of a catalogue in at most so many triangles: vertices (V, 3) m, faces, color (F, 3)."""
    import trimesh
    from scipy.spatial import cKDTree

    parts = [part for part in trimesh.load_scene(path, process=False).dump() if len(part.faces)]
    turn = np.array(item.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), float).reshape(3, 3)
    places = [(part.vertices @ turn.T)[:, [0, 2, 1]] * [1, -1, 1] for part in parts]  # there y is up, z to the front
    low, high = (of(np.concatenate(places), axis=0) for of in (np.min, np.max))
    scale = [float(item[key]) for key in ("width", "depth", "height")] / np.maximum(high - low, 1e-6) / 100
    places = [(vertices - low) * scale for vertices in places]
    counts = np.array([len(part.faces) for part in parts])
    sizes = [trimesh.triangles.area(place[part.faces]).sum() ** 0.5 + 1e-3 for place, part in zip(places, parts)]
    shares = (np.floor(np.minimum(counts, share * np.array(sizes))) for share in np.geomspace(1e6, 1, 2000))
    budgets = next(budgets for budgets in shares if budgets.sum() <= most)  # small parts keep all
    mesh, total = [], 0
    for part, place, budget in zip(parts, places, budgets):
        vertices, faces = thinned(*welded(place, part.faces, 1e-4), budget)
        material, uv = getattr(part.visual, "material", None), getattr(part.visual, "uv", None)
        color = np.tile(np.asarray(getattr(material, "diffuse", [128] * 3))[:3], (len(faces), 1))
        if uv is not None and material.image is not None and len(faces):  # the mean nearby
            pixels, mix = np.asarray(material.image.convert("RGB")), np.random.default_rng(0).dirichlet((1, 1, 1), 16)
            u, v = np.nan_to_num(mix @ uv[part.faces]).reshape(-1, 2).T % 1
            near = cKDTree((mix @ place[part.faces]).reshape(-1, 3)).query(vertices[faces].mean(1), k=16)[1]
            color = pixels[np.int64((1 - v) * (len(pixels) - 1)), np.int64(u * (pixels.shape[1] - 1))][near].mean(1)
        mesh.append((vertices, faces + total, color))
        total += len(vertices)
    vertices, faces, color = map(np.concatenate, zip(*mesh))
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used] - vertices[used].min(0), faces.reshape(-1, 3), color


def make(folder):
    """Write furniture.npz, and authors and licences into FURNITURE.md, from the folder of the extracted package."""
    text, models = (HERE / "FURNITURE.md").read_text(), []
    for library in sorted(path for path in Path(folder).rglob("*.sh3f") if path.stem in LICENCES):
        with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(library) as archive:
            archive.extractall(place)
            items, catalogue = {}, Path(place, "PluginFurnitureCatalog.properties").read_text("latin-1")
            for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", catalogue, re.MULTILINE):
                items.setdefault(number, {})[field] = value.strip()
            for item in items.values():
                path = Path(place, item["model"][1:])
                name = f"{path.parts[-3]}/{path.stem}"
                row = re.search(rf"^\| {re.escape(name)} \| (.+?) \| (\w+) \| ([\d.]+) \|.*$", text, re.MULTILINE)
                if row:
                    own = "".join(file.read_text(errors="ignore") for file in path.parent.glob("*LICENSE*"))
                    licence = "CC-BY 3.0" if "Attribution 3.0" in own else LICENCES[library.stem]  # not CC0 as the rest
                    text = text.replace(row[0], f"| {' | '.join((name, *row.groups(), item['creator'], licence))} |")
                    vertices, faces, color = convert(path, item, MOST // (1 + (row[1] == "-")))
                    if row[1] in ("window", "door"):
                        vertices[:, 1] *= min(1, FLAT / vertices[:, 1].max())
                    models.append((name, row[1].strip("-"), row[2], float(row[3]), vertices, faces, color))
    (HERE / "FURNITURE.md").write_text(text)
    name, label, where, elevation, vertices, faces, color = zip(*models)
    np.savez_compressed(
        HERE / "furniture.npz", name=name, label=label, place=where, elevation=elevation, points=[*map(len, vertices)],
        triangles=[*map(len, faces)], vertices=np.uint16(np.round(np.concatenate(vertices) * 1000)),
        faces=np.uint16(np.concatenate(faces)), color=np.uint8(np.concatenate(color)))


if __name__ == "__main__":
    make(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
