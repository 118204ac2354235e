"""A checkpoint and scene folders -> labelled .ply files, a list of instances and pictures.

    python predict.py runs/bifusion/best.pt data/rooms/val/room_0000 [more scene folders] --out predictions

Writes for each scene into <out>/
    <scene>_semantic.ply   points in class colours; property `label` is the NYU40 id, as in ScanNet's own label files
    <scene>_instances.ply  a colour an instance; `label` as above, `instance` its number in the list, 0 = none
    <scene>_instances.txt  the list: class, score, points, box
    <scene>.png            colours, classes, instances, and the ground truth where there is one
CloudCompare and MeshLab open the .ply files. Neither labels nor frames are needed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from data import CLASS_COLORS, CLASS_NAMES, IGNORE, NYU40_IDS, collate, load_frames, load_scene, scene_item
from metrics import semantic_iou
from train import RECIPES, instances_of_scene, load_model, to_device

NO_LABEL = np.array([90, 90, 90], np.uint8)
NO_INSTANCE = np.array([225, 225, 225], np.uint8)
MIN_SCORE = 0.3  # instances below it stay out of list, .ply and picture


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
        scene:      dict of data.load_scene; its segment is None where every label is IGNORE.
        prediction: dict with labels (N,) int64 class index of each point; masks (P, N) bool, classes (P,) int64,
                    scores (P,) float of the instances, best first, P = 0 for a model without a trained decoder;
                    true_instance (N,) int64, data.instance_targets; voxels, M; seen, the share of the voxels that a
                    frame sees, 0 without frames, None for a model without image branch.

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
    out = model(batch)
    prediction = {"labels": out["logits"].argmax(1)[batch["point_to_voxel"]].cpu().numpy(),
                  "voxels": len(batch["grid_coord"]), "seen": out["stats"]["seen_share"] if use_images else None,
                  "true_instance": batch["point_instance"].cpu().numpy(), "classes": np.zeros(0, np.int64),
                  "masks": np.zeros((0, len(scene["coord"])), bool), "scores": np.zeros(0, np.float32)}
    if "instances" in out:
        _, *found = instances_of_scene(out["instances"][0][-1], batch, 0)
        prediction |= {key: value.cpu().numpy() for key, value in zip(("masks", "classes", "scores"), found)}
    return scene, prediction


def panoptic(prediction, min_score=MIN_SCORE):
    """Semantic labels and instances -> one label and at most one instance a point.

    Instances of min_score or more take their points, the best first; one that gets less than half of its points
    because better ones were there before is left out. All other points keep their semantic label.

    Args:
        prediction: dict with labels (N,), masks (P, N), classes (P,), scores (P,), best first (`predict_scene`).

    Returns:
        labels: (N,) int64.  instance: (N,) int64, 0 = none, else the number from 1 on.
        rows:   list of int, the row of prediction that each number stands for.
    """
    labels, rows = prediction["labels"].copy(), []
    instance = np.zeros(len(labels), np.int64)
    for row in np.flatnonzero(prediction["scores"] >= min_score).tolist():
        mask = prediction["masks"][row]
        free = mask & (instance == 0)
        if 2 * free.sum() >= max(1, mask.sum()):
            rows.append(row)
            instance[free], labels[free] = len(rows), prediction["classes"][row]
    return labels, instance, rows


def instance_table(coord, prediction, instance, rows):
    """The instances of `panoptic` as text: number, class, score, points, box (metres, along the axes)."""
    lines = ["  #  class             score  points  x from .. to     y from .. to     z from .. to  (m)"]
    for number, row in enumerate(rows, 1):
        points = coord[instance == number]
        box = "  ".join(f"{low:6.2f} .. {high:6.2f}" for low, high in zip(points.min(0), points.max(0)))
        lines.append(f"{number:3}  {CLASS_NAMES[prediction['classes'][row]]:<16}  {prediction['scores'][row]:.3f}  "
                     f"{len(points):6}  {box}")
    return "\n".join(lines)


def write_ply(path, coord, labels, color, instance=None):
    """Points with colours: x y z float, red green blue uchar, label ushort (NYU40 id; 0 = none), with instance (N,)
    also instance ushort."""
    fields = [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "u2")]
    vertex = np.zeros(len(coord), fields + ([("instance", "u2")] if instance is not None else []))
    vertex["x"], vertex["y"], vertex["z"] = coord.T
    vertex["red"], vertex["green"], vertex["blue"] = color.T
    vertex["label"] = np.array([*NYU40_IDS, 0])[labels]  # IGNORE is the last
    if instance is not None:
        vertex["instance"] = instance
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(path))


def class_colors(labels):
    """(N,) class index or IGNORE -> (N, 3) u8."""
    return np.vstack([CLASS_COLORS, NO_LABEL])[labels]  # IGNORE, -1, is the last


def instance_colors(instance, like=None):
    """(N,) ids, 0 = none -> (N, 3) u8, neighbouring ids far apart in hue. With like (N,), another labelling of the
    points, each instance takes the colour of the one there that shares most of its points, if over half of them."""
    ids, inverse = np.unique(instance, return_inverse=True)
    key = ids.copy()
    for i, number in enumerate(ids if like is not None else ()):
        there, count = np.unique(like[instance == number], return_counts=True)
        if number and there[count.argmax()] and 2 * count.max() > count.sum():
            key[i] = there[count.argmax()]
    hue, level = key * 0.618 % 1, 0.75 + 0.25 * (key * 0.38 % 1)  # steps of the golden ratio
    ramp = np.clip(np.abs((hue[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    color = (255 * level[:, None] * (0.3 + 0.7 * ramp)).astype(np.uint8)
    color[ids == 0] = NO_INSTANCE
    return color[inverse.ravel()]


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


def draw(path, scene, prediction, instance, title):
    """One picture: input colours, classes, instances, below the ground truth where there is one; and a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels, true_instance = prediction["labels"], prediction["true_instance"]
    panels = {(0, 0): ("input colours", scene["color"]), (0, 1): ("classes", class_colors(labels)),
              (0, 2): ("instances", instance_colors(instance, true_instance))}
    shown = set(labels.tolist())
    if scene["segment"] is not None:
        panels |= {(1, 1): ("classes, ground truth", class_colors(scene["segment"])),
                   (1, 2): ("instances, ground truth", instance_colors(true_instance))}
        shown |= set(scene["segment"].tolist())
    rows = 1 + max(row for row, _ in panels)
    figure = Figure(figsize=(16.2, 5.3 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    for place, axis in np.ndenumerate(axes):
        axis.axis("off")
        if place in panels:
            name, color = panels[place]
            axis.imshow(render(scene["coord"], scene["normal"], color))
            axis.set_title(name, fontsize=13)
    patches = [Patch(facecolor=CLASS_COLORS[k] / 255, label=CLASS_NAMES[k]) for k in sorted(shown - {IGNORE})]
    if IGNORE in shown:
        patches.append(Patch(facecolor=NO_LABEL / 255, label="no label"))
    figure.suptitle(title, fontsize=14)
    if rows == 2:
        axes[1, 0].legend(handles=patches, loc="center", ncols=2, frameon=False, fontsize=13)
    else:
        figure.legend(handles=patches, loc="outside lower center", ncols=min(10, len(patches)), frameon=False)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="stage3.pt, best.pt, ... of a run")
    parser.add_argument("scenes", nargs="+", help="scene folders")
    parser.add_argument("--out", default="predictions", help="folder for the files (default predictions)")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="of the instances shown (default 0.3)")
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
            scene, prediction = predict_scene(model, config, Path(folder).resolve(), args.device)
            labels, instance, rows = panoptic(prediction, args.min_score)
            name, title = scene["name"], scene["name"]
            if scene["segment"] is not None:
                miou = semantic_iou([(scene["segment"], prediction["labels"])], range(len(CLASS_NAMES)))["miou"]
                title += f", mIoU {miou:.3f}"
            coord, table = scene["coord"], instance_table(scene["coord"], prediction, instance, rows)
            write_ply(out / f"{name}_semantic.ply", coord, prediction["labels"], class_colors(prediction["labels"]))
            write_ply(out / f"{name}_instances.ply", coord, labels, instance_colors(instance), instance)
            (out / f"{name}_instances.txt").write_text(table + "\n")
            draw(out / f"{name}.png", scene, prediction, instance, f"{config.model}: {title}")
            views = {None: "3D only (this model has no image branch in use)", 0: "3D only (no frame sees it)"}
            sight = views.get(prediction["seen"]) or f"{prediction['seen']:.0%} seen by frames"
            print(f"{title}: {len(coord)} points, {prediction['voxels']} voxels, {sight}, "
                  f"{len(np.unique(labels))} classes, {len(rows)} instances -> {out}/{name}_semantic.ply, "
                  f"{name}_instances.ply, {name}_instances.txt, {name}.png\n{table}")
    except (OSError, ValueError) as error:
        sys.exit("error: " + str(error).partition("\n")[0])  # torch's messages go on for a screen


if __name__ == "__main__":
    main()
