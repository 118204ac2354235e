"""A checkpoint and any scan -> labelled .ply files, a list of instances and pictures.

    python predict.py runs/bifusion/best.pt data/rooms/val/room_0000 scan.ply [more scans] --out predictions

A scan is a .ply (points or mesh, ascii or binary), a .npy (N, 3) or (N, 6) or .npz (coord, color, normal) of points, a
scene folder, or a folder with one such file and frames (color/ depth/ pose/ intrinsic/). Metres, z up, colours 0..255.
Whatever is missing is computed or done without, and said in one line. A scan that fails is named at the end, the others
are done. Writes for each scan into <out>/
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
from plyfile import PlyData, PlyElement

from metrics import semantic_iou
from scenes.folder import CLASS_NAMES, IGNORE, NYU40_IDS, SCENE, THINGS, load_frames, message, read_scan
from scenes.picture import class_colors, draw, instance_colors
from scenes.points import complete, instance_targets, voxelise  # torch and the networks only once a scan is read

TILE_VOXELS = 300_000  # of a tile, its margin apart
MARGIN = 1.0  # metres around a tile that the network sees as well
MIN_SCORE = 0.3  # instances below it stay out of list, .ply and picture


def open_checkpoint(path, device="cpu"):
    """-> model, Config of train.load_model; every fault of file or device (None: a GPU where there is one) as one
    FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found; a checkpoint is made by: python train.py")
    import torch
    from train import load_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
        return load_model(path, device)[:2]
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on the kind of device
        raise ValueError(f"device {device!r} cannot be used ({error}); try --device cpu") from error
    except (TypeError, KeyError, AttributeError) as error:  # a field of it is missing, unknown or odd
        raise ValueError(f"{path} is no checkpoint of this version of train.py: {error}") from error


def tiles(coord, voxel_size, limit):
    """Cut a scan across its longer horizontal side until no tile holds more than limit voxels.

    Returns a list of (core, rows): point indices of the tile, and of the tile with MARGIN around it.
    """
    def cut(rows):
        if len(rows) <= limit or len(voxelise(coord[rows], voxel_size)[0]) <= limit:
            return [rows]
        axis = np.ptp(coord[rows, :2], axis=0).argmax()
        left = coord[rows, axis] < np.median(coord[rows, axis])
        if not left.any():
            raise ValueError(f"{len(rows)} points lie above one another, too many for a tile; check the coordinates")
        return cut(rows[left]) + cut(rows[~left])

    cores, place = cut(np.arange(len(coord))), coord[:, :2]
    around = ((place >= place[core].min(0) - MARGIN) & (place <= place[core].max(0) + MARGIN) for core in cores)
    return [(core, np.flatnonzero(near.all(1))) for core, near in zip(cores, around)]


def encode_frames(tower, frames, device):
    """The frames with the tower's maps instead of their images, so that it runs once for all tiles."""
    import torch
    from tower import VIEW_CHUNK

    chunks = [[torch.from_numpy(frames[key][i : i + VIEW_CHUNK]).to(device) for key in ("image", "depth")]
              for i in range(0, len(frames["depth"]), VIEW_CHUNK)]
    levels = [np.concatenate(level) for level in zip(*([x.cpu().numpy() for x in tower.encode(*c)] for c in chunks))]
    return frames | {"image": frames["image"][:, :, :0, :0]} | {f"level_{k}": v for k, v in enumerate(levels)}


def predict_scene(model, config, path, device="cpu", scan=None):
    """Label every point of a scan with the model and Config of `open_checkpoint`. Raises as `read_scan`.

    Frames are used where there are some and the model has an image branch; scan, what `read_scan` returned before.
    Returns:
        scene:      dict of `read_scan`; its segment is None where every label is IGNORE.
        prediction: dict with labels (N,) int64 class index of each point; of the P instances, best first, members, list
                    of P int64 arrays of point indices, classes (P,) int64, scores (P,) float, P = 0 for a model
                    without a trained decoder; voxels, their number; seen, the share of the voxels that a frame sees, 0
                    without frames, None for a model without image branch; notes, list of str of `read_scan`.
    """
    import torch
    from data import collate, evenly_spread, scene_item
    from train import RECIPES, instances_of_scene, to_device

    scene, notes = scan or read_scan(path)
    scene, computed = complete(scene)
    if scene["segment"] is not None and (scene["segment"] == IGNORE).all():
        scene["segment"] = None  # no ground truth to show or to count
    use_images = config.model == "bifusion" and model.row.fusion != "identity"
    frames = evenly_spread(scene["frame_ids"], 2 * config.views if use_images else 0)  # as many as evaluation takes
    frames = load_frames(path, frames, RECIPES[config.preset]["image_size"])
    frames["world_to_camera"][:, :3, 3] += frames["world_to_camera"][:, :3, :3] @ scene["origin"]  # points are shifted
    n, cut = len(scene["coord"]), tiles(scene["coord"], config.voxel_size, TILE_VOXELS)
    if use_images and len(cut) > 1:
        with torch.no_grad():
            frames = encode_frames(model.tower, frames, device)
    found, labels, voxels, seen = [], np.zeros(n, np.int64), 0, 0.0
    for core, rows in cut:
        part = scene | {key: scene[key][rows] for key in SCENE if scene[key] is not None}
        part["superpoint"] = np.unique(part["superpoint"], return_inverse=True)[1].ravel()
        batch = to_device(collate([scene_item(part, frames, config.voxel_size)]), device)
        with torch.no_grad():
            out = model(batch)
        inside = np.isin(rows, core)  # not in the margin
        labels[core] = out["logits"].argmax(1)[batch["point_to_voxel"]].cpu().numpy()[inside]
        voxels += len(batch["grid_coord"])
        seen += out["stats"]["seen_share"] * len(batch["grid_coord"]) if use_images else 0
        if "instances" in out:
            _, masks, label, score = (x.cpu().numpy() for x in instances_of_scene(out["instances"][0][-1], batch, 0))
            found += [(s, k, rows[mask & inside]) for s, k, mask in zip(score, label, masks) if (mask & inside).any()]
    scores, classes, members = zip(*sorted(found, key=lambda one: -one[0])) if found else ((), (), ())
    return scene, {"labels": labels, "voxels": voxels, "members": list(members), "classes": np.array(classes, np.int64),
                   "scores": np.array(scores, np.float32), "seen": seen / voxels if use_images else None,
                   "notes": notes + computed + [f"cut into {len(cut)} tiles"] * (len(cut) > 1)}


def panoptic(prediction, min_score=MIN_SCORE):
    """A prediction of `predict_scene` -> one label and at most one instance a point.

    Instances of min_score or more take their points, the best first; one that gets less than half of its points is left
    out, and points of none keep their semantic label. Returns labels (N,) int64; instance (N,) int64, 0 = none, else
    the number from 1 on; rows, list of int, the row of prediction that each number stands for.
    """
    labels, instance, rows = prediction["labels"].copy(), np.zeros_like(prediction["labels"]), []
    for row in np.flatnonzero(prediction["scores"] >= min_score).tolist():
        members = prediction["members"][row]
        free = members[instance[members] == 0]
        if 2 * len(free) >= len(members):
            rows.append(row)
            instance[free], labels[free] = len(rows), prediction["classes"][row]
    return labels, instance, rows


def write_ply(path, coord, color, labels, **more):
    """Points: x y z (float or double, as coord), red green blue uchar, label ushort (NYU40 id, 0 = none), and more."""
    label = np.array([*NYU40_IDS, 0], np.uint16)[labels]  # IGNORE is the last
    columns = dict(zip(("x", "y", "z", "red", "green", "blue"), [*coord.T, *color.T])) | {"label": label} | more
    vertex = np.rec.fromarrays(list(columns.values()), names=list(columns))
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(path))


def write(out, model, scene, prediction, min_score):
    """Write the four files of a scan into the folder out and say so; model is its name, for the picture."""
    labels, instance, rows = panoptic(prediction, min_score)
    title, name, true_instance = scene["name"], scene["name"], None
    if prediction["notes"]:
        print(f"{name}: {'; '.join(prediction['notes'])}")
    coord = scene["coord"] + scene["origin"] if scene["origin"].any() else scene["coord"]  # f64 where it must be
    if scene["segment"] is not None:
        true_instance = instance_targets(scene["segment"], scene["instance"], scene["superpoint"], THINGS)[0]
        miou = semantic_iou([(scene["segment"], prediction["labels"])], range(len(CLASS_NAMES)))["miou"]
        title += f", mIoU {miou:.3f}"
    table = "  #  class             score  points  x from .. to     y from .. to     z from .. to  (m)\n"
    for number, row in enumerate(rows, 1):
        points = coord[instance == number]
        box = "  ".join(f"{low:6.2f} .. {high:6.2f}" for low, high in zip(points.min(0), points.max(0)))
        table += (f"{number:3}  {CLASS_NAMES[prediction['classes'][row]]:<16}  {prediction['scores'][row]:.3f}  "
                  f"{len(points):6}  {box}\n")
    (out / f"{name}_instances.txt").write_text(table)
    write_ply(out / f"{name}_semantic.ply", coord, class_colors(prediction["labels"]), prediction["labels"])
    write_ply(out / f"{name}_instances.ply", coord, instance_colors(instance), labels, instance=instance.astype("u2"))
    draw(out / f"{name}.png", scene, prediction["labels"], instance, true_instance, f"{model}: {title}")
    views = {None: "3D only (this model has no image branch in use)", 0: "3D only (no frame sees it)"}
    sight = views.get(prediction["seen"]) or f"{prediction['seen']:.0%} seen by frames"
    print(f"{title}: {len(coord)} points, {prediction['voxels']} voxels, {sight}, {len(np.unique(labels))} classes, "
          f"{len(rows)} instances -> {out}/{name}_semantic.ply, {name}_instances.ply, {name}_instances.txt, "
          f"{name}.png\n{table}", end="")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="stage3.pt, best.pt, ... of a run")
    parser.add_argument("scenes", nargs="+", help=".ply, .npy, .npz, scene folders, folders with points and frames")
    parser.add_argument("--out", default="predictions", help="folder for the files (default predictions)")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="of the instances shown (default 0.3)")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    args = parser.parse_args(argv)
    paths = [*dict.fromkeys(Path(scene).resolve() for scene in args.scenes)]
    stems = [path.name if path.is_dir() else path.stem for path in paths]
    out, network, failed, root = Path(args.out), None, [], os.path.commonpath([path.parent for path in paths])
    for path, stem in zip(paths, stems):
        name, scan = stem if stems.count(stem) == 1 else "_".join(path.relative_to(root).parts), None
        try:
            scan = read_scan(path)
            scan[0]["name"] = name
            network = network or open_checkpoint(args.checkpoint, args.device)
            out.mkdir(parents=True, exist_ok=True)
            device = network[0].semantic_head.weight.device
            write(out, network[1].model, *predict_scene(*network, path, device, scan), args.min_score)
        except Exception as error:  # the others go on
            said = message(error)
            if scan and not network:
                sys.exit(f"error: {said}")
            if said.startswith("out of memory"):
                said += f"; lower TILE_VOXELS, {TILE_VOXELS} voxels a tile, in predict.py, or give --device cpu"
            failed.append(f"error: {said}" if str(path) in said else f"error: {path}: {said}")
    if failed:
        sys.exit("\n".join(failed + [f"{len(failed)} of {len(paths)} scans failed"] * (len(paths) > 1)))


if __name__ == "__main__":
    main()
