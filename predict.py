"""A checkpoint and any scan -> labelled .ply files, a list of instances and pictures.

    python predict.py runs/bifusion/best.pt scan.ply
    python predict.py runs/bifusion/best.pt data/rooms/val/room_0000 [more scans] --out predictions

A scan is a .ply (points or mesh, ascii or binary), a .npy (N, 3) or (N, 6) or .npz (coord, color, normal) of points, a
scene folder, or a folder with one such file and frames (color/ depth/ pose/ intrinsic/). Metres, z up, colours 0..255.
Whatever is missing is computed or done without, and said in one line. Writes for each scan into <out>/
    <scan>_semantic.ply   points in class colours; property `label` is the NYU40 id, as in ScanNet's own label files
    <scan>_instances.ply  a colour an instance; `label` as above, `instance` its number in the list, 0 = none
    <scan>_instances.txt  the list: class, score, points, box
    <scan>.png            colours, classes, instances, and the ground truth where there is one
CloudCompare and MeshLab open the .ply files. A large scan is predicted in tiles; an object on a border becomes two.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from data import collate, evenly_spread, instance_targets, scene_item
from metrics import semantic_iou
from scenes.folder import CLASS_COLORS, CLASS_NAMES, IGNORE, NYU40_IDS, load_frames, read_scan
from scenes.points import complete, voxelise
from tower import VIEW_CHUNK
from train import RECIPES, instances_of_scene, load_model, to_device

NO_LABEL = np.array([90, 90, 90], np.uint8)
NO_INSTANCE = np.array([225, 225, 225], np.uint8)
TILE_VOXELS = 300_000  # of a tile, its margin apart
MARGIN = 1.0  # metres around a tile that the network sees as well
POINTWISE = ("coord", "color", "normal", "segment", "instance", "superpoint")  # of a scene
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


def tiles(coord, voxel_size, limit):
    """Cut a scan across its longer horizontal side until no tile holds more than limit voxels.

    Returns a list of (core, rows): point indices of the tile, and of the tile with MARGIN around it.
    """
    parts, waiting = [], [np.arange(len(coord))]
    while waiting:
        rows = waiting.pop()
        axis = np.ptp(coord[rows, :2], axis=0).argmax()
        if len(rows) <= limit or len(voxelise(coord[rows], voxel_size)[0]) <= limit:
            parts.append(rows)
            continue
        left = coord[rows, axis] < np.median(coord[rows, axis])
        if not left.any():
            raise ValueError(f"{len(rows)} points lie above one another, too many for a tile; check the coordinates")
        waiting += [rows[~left], rows[left]]
    if len(parts) == 1:
        return [(parts[0], parts[0])]
    out = []
    for core in parts:
        low, high = coord[core, :2].min(0) - MARGIN, coord[core, :2].max(0) + MARGIN
        out.append((core, np.flatnonzero(((coord[:, :2] >= low) & (coord[:, :2] <= high)).all(1))))
    return out


def scan_frames(scene, path, config, count):
    """At most count frames of a scan of `read_scan`, as data.load_frames; the cameras see its points as stored."""
    frames = load_frames(path, evenly_spread(scene["frame_ids"], count), RECIPES[config.preset]["image_size"])
    frames["world_to_camera"][:, :3, 3] += frames["world_to_camera"][:, :3, :3] @ scene["origin"]
    return frames


def encode_frames(tower, frames, device):
    """The frames with the tower's maps instead of their images, so that it runs once for all tiles."""
    chunks = [[torch.from_numpy(frames[key][i : i + VIEW_CHUNK]).to(device) for key in ("image", "depth")]
              for i in range(0, len(frames["depth"]), VIEW_CHUNK)]
    levels = [np.concatenate(level) for level in zip(*([x.cpu().numpy() for x in tower.encode(*c)] for c in chunks))]
    return frames | {"image": frames["image"][:, :, :0, :0]} | {f"level_{k}": v for k, v in enumerate(levels)}


@torch.no_grad()
def predict_scene(model, config, path, device="cpu"):
    """Label every point of a scan.

    Args:
        model, config: as train.load_model returns them.
        path:          as `read_scan`; frames are used where there are some and the model has an image branch.

    Returns:
        scene:      dict of `read_scan`; its segment is None where every label is IGNORE.
        prediction: dict with labels (N,) int64 class index of each point; of the P instances, best first, members, list
                    of P int64 arrays of point indices, classes (P,) int64, scores (P,) float, P = 0 for a model
                    without a trained decoder; true_instance (N,) int64, data.instance_targets; voxels, their number;
                    seen, the share of the voxels that a frame sees, 0 without frames, None for a model without image
                    branch; notes, list of str of `read_scan`.

    Raises:
        FileNotFoundError, ValueError: as `read_scan`.
    """
    scene, notes = read_scan(path)
    scene, computed = complete(scene)
    notes += computed
    if scene["segment"] is not None and (scene["segment"] == IGNORE).all():
        scene["segment"] = None  # no ground truth to show or to count
    use_images = config.model == "bifusion" and model.setting.fusion != "identity"
    frames = scan_frames(scene, path, config, 2 * config.views if use_images else 0)  # as many as evaluation takes
    n, cut = len(scene["coord"]), tiles(scene["coord"], config.voxel_size, TILE_VOXELS)
    if use_images and len(cut) > 1:
        frames = encode_frames(model.tower, frames, device)
    members, classes, scores, labels, voxels, seen = [], [], [], np.zeros(n, np.int64), 0, 0.0
    for core, rows in cut:
        part = scene | {key: scene[key][rows] for key in POINTWISE if scene[key] is not None}
        part["superpoint"] = np.unique(part["superpoint"], return_inverse=True)[1].ravel()
        batch = to_device(collate([scene_item(part, frames, config.voxel_size)]), device)
        out = model(batch)
        inside = np.zeros(n, bool)
        inside[core] = True
        inside = inside[rows]
        labels[core] = out["logits"].argmax(1)[batch["point_to_voxel"]].cpu().numpy()[inside]
        voxels += len(batch["grid_coord"])
        seen += out["stats"]["seen_share"] * len(batch["grid_coord"]) if use_images else 0
        if "instances" in out:
            _, masks, label, score = (x.cpu().numpy() for x in instances_of_scene(out["instances"][0][-1], batch, 0))
            for mask, k, value in zip(masks, label, score):
                if (mask & inside).any():
                    members.append(rows[mask & inside])
                    classes.append(k)
                    scores.append(value)
    scores = np.array(scores, np.float32)
    order = np.argsort(-scores, kind="stable")
    if len(cut) > 1:
        notes.append(f"cut into {len(cut)} tiles")
    true_instance = np.zeros(n, np.int64)
    if scene["segment"] is not None:
        true_instance = instance_targets(scene["segment"], scene["instance"], scene["superpoint"])[0]
    return scene, {"labels": labels, "members": [members[i] for i in order], "scores": scores[order],
                   "classes": np.array(classes, np.int64)[order], "true_instance": true_instance, "voxels": voxels,
                   "seen": seen / voxels if use_images else None, "notes": notes}


def panoptic(prediction, min_score=MIN_SCORE):
    """Semantic labels and instances -> one label and at most one instance a point.

    Instances of min_score or more take their points, the best first; one that gets less than half of its points
    because better ones were there before is left out. All other points keep their semantic label.

    Args:
        prediction: dict with labels (N,), members, classes (P,), scores (P,), best first (`predict_scene`).

    Returns:
        labels: (N,) int64.  instance: (N,) int64, 0 = none, else the number from 1 on.
        rows:   list of int, the row of prediction that each number stands for.
    """
    labels, rows = prediction["labels"].copy(), []
    instance = np.zeros(len(labels), np.int64)
    for row in np.flatnonzero(prediction["scores"] >= min_score).tolist():
        mask = prediction["members"][row]
        free = mask[instance[mask] == 0]
        if 2 * len(free) >= max(1, len(mask)):
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


def write_ply(path, coord, color, labels=None, instance=None, similarity=None):
    """Points with colours: x y z (as coord: float or double), red green blue uchar; where they are given, each (N,),
    label ushort (NYU40 id; 0 = none), instance ushort, similarity float."""
    fields = [(axis, coord.dtype.str) for axis in "xyz"]
    fields += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    extra = {} if labels is None else {"label": np.array([*NYU40_IDS, 0], np.uint16)[labels]}  # IGNORE is the last
    extra |= {} if instance is None else {"instance": instance.astype(np.uint16)}
    extra |= {} if similarity is None else {"similarity": similarity.astype(np.float32)}
    vertex = np.zeros(len(coord), fields + [(name, values.dtype.str) for name, values in extra.items()])
    vertex["x"], vertex["y"], vertex["z"] = coord.T
    vertex["red"], vertex["green"], vertex["blue"] = color.T
    for name, values in extra.items():
        vertex[name] = values
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
    labels, true_instance = prediction["labels"], prediction["true_instance"]
    panels = {(0, 0): ("input colours", scene["color"]), (0, 1): ("classes", class_colors(labels)),
              (0, 2): ("instances", instance_colors(instance, true_instance))}
    shown = set(labels.tolist())
    if scene["segment"] is not None:
        panels |= {(1, 1): ("classes, ground truth", class_colors(scene["segment"])),
                   (1, 2): ("instances, ground truth", instance_colors(true_instance))}
        shown |= set(scene["segment"].tolist())
    legend = {CLASS_NAMES[k]: CLASS_COLORS[k] for k in sorted(shown - {IGNORE})}
    draw_panels(path, scene, panels, title, legend | ({"no label": NO_LABEL} if IGNORE in shown else {}))


def draw_panels(path, scene, panels, title, legend=None):
    """The scan once for each of panels, {(row, column): (name, color (N, 3))}; legend {name: colour}."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, columns = (1 + max(place[axis] for place in panels) for axis in (0, 1))
    figure = Figure(figsize=(5.4 * columns, 5.3 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, axis in np.ndenumerate(axes):
        axis.axis("off")
        if place in panels:
            name, color = panels[place]
            axis.imshow(render(scene["coord"], scene["normal"], color))
            axis.set_title(name, fontsize=13)
    patches = [Patch(facecolor=color / 255, label=name) for name, color in (legend or {}).items()]
    figure.suptitle(title, fontsize=14)
    if patches and (1, 0) not in panels and rows == 2:
        axes[1, 0].legend(handles=patches, loc="center", ncols=2, frameon=False, fontsize=13)
    elif patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=min(10, len(patches)), frameon=False)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="stage3.pt, best.pt, ... of a run")
    parser.add_argument("scenes", nargs="+", help=".ply, .npy, .npz, scene folders, folders with points and frames")
    parser.add_argument("--out", default="predictions", help="folder for the files (default predictions)")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="of the instances shown (default 0.3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        names = [Path(folder).resolve().stem for folder in args.scenes]
        if len(set(names)) < len(names):
            raise ValueError("two scenes of one name would overwrite each other; predict them into different --out")
        model, config = open_checkpoint(args.checkpoint, args.device)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for folder in args.scenes:
            scene, prediction = predict_scene(model, config, Path(folder).resolve(), args.device)
            if prediction["notes"]:
                print(f"{scene['name']}: {'; '.join(prediction['notes'])}")
            labels, instance, rows = panoptic(prediction, args.min_score)
            name, title = scene["name"], scene["name"]
            if scene["segment"] is not None:
                miou = semantic_iou([(scene["segment"], prediction["labels"])], range(len(CLASS_NAMES)))["miou"]
                title += f", mIoU {miou:.3f}"
            coord = scene["coord"] + scene["origin"] if scene["origin"].any() else scene["coord"]
            table = instance_table(coord, prediction, instance, rows)
            write_ply(out / f"{name}_semantic.ply", coord, class_colors(prediction["labels"]), prediction["labels"])
            write_ply(out / f"{name}_instances.ply", coord, instance_colors(instance), labels, instance)
            (out / f"{name}_instances.txt").write_text(table + "\n")
            draw(out / f"{name}.png", scene, prediction, instance, f"{config.model}: {title}")
            views = {None: "3D only (this model has no image branch in use)", 0: "3D only (no frame sees it)"}
            sight = views.get(prediction["seen"]) or f"{prediction['seen']:.0%} seen by frames"
            print(f"{title}: {len(coord)} points, {prediction['voxels']} voxels, {sight}, "
                  f"{len(np.unique(labels))} classes, {len(rows)} instances -> {out}/{name}_semantic.ply, "
                  f"{name}_instances.ply, {name}_instances.txt, {name}.png\n{table}")
    except (KeyError, OSError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) else str(error)
        sys.exit("error: " + message.partition("\n")[0])  # torch's messages go on for a screen


if __name__ == "__main__":
    main()
