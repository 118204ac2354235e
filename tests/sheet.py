"""Two pictures to check the furnished rooms by eye: every model by class, and some rooms with three of their frames.

    python -m tests.sheet data/furnished/val --out docs  # docs/furniture.jpg, docs/rooms.jpg
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scenes import furniture
from scenes.folder import CLASS_NAMES, SCANNET20, load_scene
from scenes.generate import intrinsics_for
from scenes.picture import class_colors, render
from scenes.scan import Triangles
from scenes.scan import render as photograph

LIGHT, BACK = np.array([-0.4, -0.6, 0.7]), 0.5  # direction to the lamp; radians, the angle of a model's view


def portrait(model, side=96):
    """A model as a camera in front of it, above and to its right sees it: (side, side, 3) u8."""
    toward = np.array([np.sin(BACK), -np.cos(BACK), 0.55]) / np.linalg.norm([1, 0.55])
    right = np.cross([0, 0, 1], toward) / np.linalg.norm(toward[:2])
    pose, radius = np.eye(4), np.linalg.norm(model.size) / 2
    pose[:3, :3] = np.stack([right, -np.cross(toward, right), -toward], 1)
    pose[:3, 3] = [0, 0, model.size[2] / 2] + 6 * radius * toward
    parts = Triangles([(model.triangles, model.color / 255, model.label, None)])
    *_, color = photograph(parts, lambda place, normal: 0.55 + 0.45 * (normal @ LIGHT).clip(0), pose[None],
                           intrinsics_for((side, side), 2 * np.arctan(1 / 5)), (side, side))
    return np.uint8(255 * color[0].clip(0, 1))


def tile(rows, names, path):
    """Write rows of pictures of one height a row, each under its name, as one .jpg."""
    high = [max(len(picture) for picture in row) + 14 for row in rows]
    sheet = Image.new("RGB", (max(sum(picture.shape[1] for picture in row) for row in rows), sum(high)), "white")
    for row, words, y in zip(rows, names, np.cumsum([0, *high])):
        for picture, word, x in zip(row, words, np.cumsum([0, *(picture.shape[1] for picture in row)])):
            sheet.paste(Image.fromarray(picture), (int(x), int(y) + 14))
            ImageDraw.Draw(sheet).text((int(x) + 2, int(y) + 1), word, "black")
    sheet.save(path, quality=70)


def room(folder, size=(240, 180)):
    """A room from above in its colours and its classes, and its first three frames."""
    scene = load_scene(folder)
    views = [render(scene["coord"], scene["normal"], color, size)
             for color in (scene["color"], class_colors(scene["segment"], SCANNET20))]
    frames = [Image.open(path).convert("RGB").resize(size) for path in sorted(folder.glob("color/*"))[:3]]
    return [*views, *map(np.array, frames)]


def main():
    parser = argparse.ArgumentParser("python -m tests.sheet", description=__doc__.splitlines()[0])
    parser.add_argument("rooms", type=Path, help="folder of generated rooms, such as data/furnished/val")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    order = [*CLASS_NAMES, ""]
    models = sorted(furniture.load(), key=lambda model: order.index(model.label))
    rng = np.random.default_rng(0)
    models += [furniture.parametric(label, rng) for label in furniture.RANDOM for _ in range(4)]
    rows = [models[i:i + 20] for i in range(0, len(models), 20)]
    tile([[portrait(model) for model in row] for row in rows],
         [[model.label or "(none)" for model in row] for row in rows], args.out / "furniture.jpg")
    rooms = sorted(folder for folder in args.rooms.iterdir() if folder.is_dir())[:8]
    tile([room(folder) for folder in rooms], [[folder.name, "classes", *3 * ["frame"]] for folder in rooms],
         args.out / "rooms.jpg")


if __name__ == "__main__":
    main()
