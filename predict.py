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
import os
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # as in train.py: threads that wait leave the core to others
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from data import collate, evenly_spread, instance_targets, scene_item
from metrics import semantic_iou
from scenes.folder import CLASS_NAMES, IGNORE, NYU40_IDS, load_frames, read_scan
from scenes.picture import class_colors, draw, instance_colors
from scenes.points import complete, voxelise
from tower import VIEW_CHUNK
from train import RECIPES, instances_of_scene, load_model, to_device

TILE_VOXELS = 300_000  # of a tile, its margin apart
MARGIN = 1.0  # metres around a tile that the network sees as well
POINTWISE = ("coord", "color", "normal", "segment", "instance", "superpoint")  # of a scene
MIN_SCORE = 0.3  # instances below it stay out of list, .ply and picture


def open_checkpoint(path, device="cpu"):
    """train.load_model with every fault of the file or the device as one FileNotFoundError or ValueError.

    Returns: model, Config.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found; a checkpoint is made by: python train.py")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on the kind of device
        raise ValueError(f"device {device!r} cannot be used ({error}); try --device cpu") from error
    try:
        return load_model(path, device)[:2]
    except (TypeError, KeyError, AttributeError) as error:  # a field of it is missing, unknown or odd
        raise ValueError(f"{path} is no checkpoint of this version of train.py: {error}") from error


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
    use_images = config.model == "bifusion" and model.row.fusion != "identity"
    frames = evenly_spread(scene["frame_ids"], 2 * config.views if use_images else 0)  # as many as evaluation takes
    frames = load_frames(path, frames, RECIPES[config.preset]["image_size"])
    frames["world_to_camera"][:, :3, 3] += frames["world_to_camera"][:, :3, :3] @ scene["origin"]  # points are shifted
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


def write_ply(path, coord, color, labels, instance=None):
    """Points with colours: x y z (as coord: float or double), red green blue uchar, label ushort (NYU40 id; 0 = none),
    and instance ushort where it is given (N,)."""
    columns = dict(zip("xyz", coord.T)) | dict(zip(("red", "green", "blue"), color.T))
    columns["label"] = np.array([*NYU40_IDS, 0], np.uint16)[labels]  # IGNORE is the last
    if instance is not None:
        columns["instance"] = instance.astype(np.uint16)
    vertex = np.rec.fromarrays(list(columns.values()), names=list(columns))
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(path))


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
            draw(out / f"{name}.png", scene, prediction["labels"], instance, prediction["true_instance"],
                 f"{config.model}: {title}")
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
