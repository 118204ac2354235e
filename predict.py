"""A checkpoint and scene folders -> labelled .ply files and pictures.

    python predict.py runs/bifusion/best.pt data/rooms/val/room_0000 [more scene folders] --out predictions

Writes <out>/<scene>_semantic.ply, which CloudCompare and MeshLab open in class colours (its property `label` is the
NYU40 id, as in ScanNet's own label files), and <out>/<scene>.png: colours, prediction, and ground truth where there is
one. Neither labels nor frames are needed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from data import CLASS_COLORS, CLASS_NAMES, IGNORE, NYU40_IDS, collate, load_frames, load_scene, scene_item
from metrics import semantic_iou
from train import RECIPES, load_model, to_device

NO_LABEL = np.array([90, 90, 90], np.uint8)


def open_checkpoint(path, device="cpu"):
    """train.load_model with every fault of the file or the device as one clear error.

    Returns: model, Config.  Raises: FileNotFoundError, ValueError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found; a checkpoint is made by: python train.py")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on the kind of device
        raise ValueError(f"device {device!r} cannot be used ({error}); try --device cpu") from error
    try:
        model, config, state = load_model(path, device)
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:  # a field of it is missing, unknown or odd
        raise ValueError(f"{path} is no checkpoint of this version of train.py: {error}") from error
    if state["num_classes"] != len(CLASS_NAMES):
        raise ValueError(f"{path} predicts {state['num_classes']} classes, expected the {len(CLASS_NAMES)} of data.py")
    return model, config


@torch.no_grad()
def predict_scene(model, config, folder, device="cpu"):
    """Label every point of a scene.

    Args:
        model, config: as train.load_model returns them.
        folder:        scene folder; frames are used where there are some and the model has an image branch.

    Returns:
        scene:  dict of data.load_scene; its segment is None where every label is IGNORE; voxels, M.
        labels: (N,) int64 class index of each point.
        seen:   share of the voxels that a frame sees, 0 without frames; None for a model without image branch.

    Raises:
        FileNotFoundError, ValueError: as data.load_scene.
    """
    scene = load_scene(folder)
    if scene["segment"] is not None and (scene["segment"] == IGNORE).all():
        scene["segment"] = None  # no ground truth to show or to count
    ids, use_images = scene["frame_ids"], config.model == "bifusion" and model.setting.fusion != "identity"
    count = min(2 * config.views, len(ids)) if use_images else 0  # as many as evaluation takes
    chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, count).round().astype(int)]
    frames = load_frames(folder, chosen, RECIPES[config.preset]["image_size"])
    batch = to_device(collate([scene_item(scene, frames, config.voxel_size)]), device)
    scene["voxels"] = len(batch["grid_coord"])
    out = model(batch)
    labels = out["logits"].argmax(1)[batch["point_to_voxel"]].cpu().numpy()
    return scene, labels, out["stats"]["seen_share"] if use_images else None


def write_ply(path, coord, labels):
    """Points in class colours: x y z float, red green blue uchar, label ushort (NYU40 id; 0 = none)."""
    vertex = np.zeros(len(coord), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("green", "u1"),
                                   ("blue", "u1"), ("label", "u2")])
    vertex["x"], vertex["y"], vertex["z"] = coord.T
    vertex["red"], vertex["green"], vertex["blue"] = class_colors(labels).T
    vertex["label"] = np.array([*NYU40_IDS, 0])[labels]  # IGNORE is the last
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(path))


def class_colors(labels):
    """(N,) class index or IGNORE -> (N, 3) u8."""
    return np.vstack([CLASS_COLORS, NO_LABEL])[labels]  # IGNORE, -1, is the last


def render(coord, normal, color, size=(720, 600), azimuth=-60, elevation=50):
    """Look into a room from above, as into a doll's house: surfaces that turn away from the viewer are left out.

    Orthographic; every point is a small square, the nearest one wins.

    Args:
        coord, normal: (N, 3) metres and unit.  color: (N, 3) u8.  size: (W, H).  azimuth, elevation: degrees.

    Returns:
        (H, W, 3) u8 on white.
    """
    width, height = size
    az, el = np.radians([azimuth, elevation])
    toward = np.array([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)])  # scene -> viewer
    right = np.array([-np.sin(az), np.cos(az), 0])
    up = np.cross(toward, right)
    facing = normal @ toward
    front = (facing > 0) | (np.abs(normal).sum(1) == 0)
    shade = 0.7 + 0.3 * np.clip(normal @ (0.5 * toward + 0.4 * up + 0.6 * right), 0, 1)
    x, y, near = coord @ right, coord @ up, coord @ toward
    span = max(np.ptp(x) / width, np.ptp(y) / height, 1e-6) * 1.04  # metres a pixel
    column = (x - (x.max() + x.min()) / 2)[front] / span + width / 2
    row = height / 2 - (y - (y.max() + y.min()) / 2)[front] / span
    square = int(np.clip(round(2.0 * (width * height / max(1, front.sum())) ** 0.5), 1, 9))
    offsets = np.stack(np.meshgrid(*2 * [np.arange(square) - square // 2]), -1).reshape(-1, 2)
    order = np.argsort(near[front], kind="stable")  # far to near: the last one written stays
    paint = (color[front] * shade[front, None]).astype(np.uint8)[order]
    pixels = np.stack([column, row], 1).astype(int)[order]
    depth = np.full((height, width), -np.inf)
    image = np.full((height, width, 3), 255, np.uint8)
    for offset in offsets:
        c, r = (pixels + offset).T
        inside = (c >= 0) & (c < width) & (r >= 0) & (r < height)
        c, r, z = c[inside], r[inside], near[front][order][inside]
        win = z >= depth[r, c]
        c, r, z = c[win], r[win], z[win]
        depth[r, c] = z  # within one offset the order makes the nearest the last
        image[r, c] = paint[inside][win]
    return image


def draw(path, scene, labels, title):
    """One picture: input colours, prediction, ground truth where there is one, and a legend of the classes shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [("input colours", scene["color"]), ("prediction", class_colors(labels))]
    shown = set(labels.tolist())
    if scene["segment"] is not None:
        panels.append(("ground truth", class_colors(scene["segment"])))
        shown |= set(scene["segment"].tolist())
    figure = Figure(figsize=(5.4 * len(panels), 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, color) in zip(figure.subplots(1, len(panels)), panels):
        axis.imshow(render(scene["coord"], scene["normal"], color))
        axis.set_title(name, fontsize=13)
        axis.axis("off")
    patches = [Patch(facecolor=CLASS_COLORS[k] / 255, label=CLASS_NAMES[k]) for k in sorted(shown - {IGNORE})]
    if IGNORE in shown:
        patches.append(Patch(facecolor=NO_LABEL / 255, label="no label"))
    figure.suptitle(title, fontsize=14)
    columns = min(10 * len(panels) // 3, len(patches))  # what the picture is wide enough for
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="stage3.pt, best.pt, ... of a run")
    parser.add_argument("scenes", nargs="+", help="scene folders")
    parser.add_argument("--out", default="predictions", help="folder for the files (default predictions)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        names = [Path(folder).resolve().name for folder in args.scenes]
        if len(set(names)) < len(names):
            raise ValueError("two scenes of one name would overwrite each other; predict them into different --out")
        model, config = open_checkpoint(args.checkpoint, args.device)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for folder in args.scenes:
            scene, labels, seen = predict_scene(model, config, Path(folder).resolve(), args.device)
            name, title = scene["name"], scene["name"]
            if scene["segment"] is not None:
                miou = semantic_iou([(scene["segment"], labels)], range(len(CLASS_NAMES)))["miou"]
                title += f", mIoU {miou:.3f}"
            write_ply(out / f"{name}_semantic.ply", scene["coord"], labels)
            draw(out / f"{name}.png", scene, labels, f"{config.model}: {title}")
            views = {None: "3D only (this model has no image branch in use)", 0: "3D only (no frame sees it)"}
            sight = views.get(seen) or f"{seen:.0%} seen by frames"
            print(f"{title}: {len(labels)} points, {scene['voxels']} voxels, {sight}, "
                  f"{len(np.unique(labels))} classes -> {out}/{name}_semantic.ply, {out}/{name}.png")
    except (OSError, ValueError) as error:
        sys.exit("error: " + str(error).partition("\n")[0])  # torch's messages go on for a screen


if __name__ == "__main__":
    main()
