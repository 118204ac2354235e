"""A checkpoint and any scan -> labelled .ply files, a list of instances and pictures.

    python predict.py scan.ply                        # by the weights that come along, weights/small.pt
    python predict.py runs/bifusion/best.pt data/rooms/val/room_0000 scan.ply [more scans] --out predictions

A scan is a .ply (points or mesh, ascii or binary), a .npy (N, 3) or (N, 6) or .npz (coord, color, normal) of points, a
scene folder, or a folder with one such file and frames (color/ depth/ pose/ intrinsic/). Metres, z up, colours 0..255.
Whatever is missing is computed or done without, and said in one line, as is what looks like other units, another axis
or other cameras, with the flag that mends it. A scan that fails is named at the end, the others are done. Writes for
each scan into <out>/
    <scan>_semantic.ply   points in class colours; property `label` is the NYU40 id, as in ScanNet's own label files, or
                          of own classes the id that classes.json gives, the index where it gives none
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
from scenes.folder import CAMERAS, IGNORE, SCENE, UP, load_frames, message, read_scan
from scenes.picture import class_colors, draw, instance_colors
from scenes.points import complete, instance_targets, tiles  # torch and the networks only once a scan is read

WEIGHTS = Path(__file__).parent / "weights" / "small.pt"  # taken where no checkpoint is given; experiments/ship.py
ABOUT = ("no checkpoint given: weights/small.pt, trained on generated furnished rooms alone: on a real scan trust "
         "walls, floors and large furniture, little else; it expects metres and 1 to 4 cm between points; frames help")
TILE_VOXELS = 300_000  # of a tile, its margin apart
TILE_SIDE = 1.5  # times the longest side of a train scene: beyond it a network finds neither classes nor instances
TILE_FRAMES = 4  # times as many frames as evaluation takes may look at a tile, as far as they show more of it
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


def predict_scene(model, config, path, device="cpu", scale=None, up="z", cameras="opencv", depth_scale=None):
    """Label every point of a scan with the model and Config of `open_checkpoint`; scale, up as `read_scan`, which also
    raises, cameras, depth_scale as `load_frames`.

    Frames are used where there are some and the model has an image branch. Returns:
        scene:      dict of `read_scan`; its segment is None where every label is IGNORE.
        prediction: dict with labels (N,) int64 class index of each point; of the P instances, best first, members, list
                    of P int64 arrays of point indices, classes (P,) int64, scores (P,) float, P = 0 for a model
                    without a trained decoder; voxels, their number; seen, the share of the voxels that a frame sees, 0
                    without frames, None for a model without image branch; notes, list of str of `read_scan`.
    """
    import torch
    from data import collate, evenly_spread, scene_item
    from scenes.frames import best_views, doubt_cameras, sights
    from train import RECIPES, classes_of, instances_of_scene, to_device

    scene, notes = read_scan(path, classes_of(config), scale, up)
    scene, computed = complete(scene)
    if scene["segment"] is not None and (scene["segment"] == IGNORE).all():
        scene["segment"] = None  # no ground truth to show or to count
    use_images = config.model == "bifusion" and model.row.fusion != "identity"
    size, n = RECIPES[config.preset]["image_size"], len(scene["coord"])
    cut = tiles(scene["coord"], config.voxel_size, TILE_VOXELS, TILE_SIDE * (config.side or np.inf))
    placed = {"file_to_world": scene["file_to_world"], "cameras": cameras, "depth_scale": depth_scale}
    count = 2 * config.views if use_images and scene["frame_ids"] else 0  # as many as evaluation takes
    sight, cell = sights(path, scene, config.voxel_size, placed) if count and len(cut) > 1 else (None, None)
    found, labels, voxels, seen = [], np.zeros(n, np.int64), 0, 0.0
    for core, rows in cut:
        chosen = evenly_spread(scene["frame_ids"], count) if sight is None else [
            scene["frame_ids"][view] for view in best_views(sight[:, np.unique(cell[rows])], TILE_FRAMES * count)]
        frames = load_frames(path, chosen, size, **placed)
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
    if use_images and seen / voxels < 0.25 and (cameras, depth_scale) == (CAMERAS[0], None):  # no flag names them yet
        notes += doubt_cameras(path, scene, size)
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


def write_ply(path, coord, color, **more):
    """Points: x y z (float or double, as coord), red green blue uchar, and more."""
    columns = dict(zip(("x", "y", "z", "red", "green", "blue"), [*coord.T, *color.T])) | more
    vertex = np.rec.fromarrays(list(columns.values()), names=list(columns))
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(path))


def write(out, model, scene, prediction, min_score):
    """Write the four files of a scan into the folder out and say so; model is its name, for the picture."""
    labels, instance, rows = panoptic(prediction, min_score)
    classes, ids, own = scene["classes"], np.array(scene["classes"].ids, np.uint16), prediction["labels"]
    title, name, true_instance = scene["name"], scene["name"], None
    if prediction["notes"]:
        print(f"{name}: {'; '.join(prediction['notes'])}")
    back = np.linalg.inv(scene["file_to_world"])
    coord = scene["coord"] if (back == np.eye(4)).all() else scene["coord"] @ back[:3, :3].T + back[:3, 3]  # f64
    if scene["segment"] is not None:
        true_instance = instance_targets(scene["segment"], scene["instance"], scene["superpoint"], classes.things)[0]
        miou = semantic_iou([(scene["segment"], own)], range(len(ids)))["miou"]
        title += f", mIoU {miou:.3f}"
    table = "  #  class             score  points  x from .. to     y from .. to     z from .. to  (as the file)\n"
    for number, row in enumerate(rows, 1):
        points = coord[instance == number]
        box = "  ".join(f"{low:6.2f} .. {high:6.2f}" for low, high in zip(points.min(0), points.max(0)))
        table += (f"{number:3}  {classes.names[prediction['classes'][row]]:<16}  {prediction['scores'][row]:.3f}  "
                  f"{len(points):6}  {box}\n")
    (out / f"{name}_instances.txt").write_text(table)
    write_ply(out / f"{name}_semantic.ply", coord, class_colors(own, classes), label=ids[own])
    write_ply(out / f"{name}_instances.ply", coord, instance_colors(instance), label=ids[labels],
              instance=instance.astype("u2"))
    draw(out / f"{name}.png", scene, own, instance, true_instance, f"{model}: {title}")
    views = {None: "3D only (this model has no image branch in use)", 0: "3D only (no frame sees it)"}
    sight = views.get(prediction["seen"]) or f"{prediction['seen']:.0%} seen by frames"
    print(f"{title}: {len(coord)} points, {prediction['voxels']} voxels, {sight}, {len(np.unique(labels))} classes, "
          f"{len(rows)} instances -> {out}/{name}_semantic.ply, {name}_instances.ply, {name}_instances.txt, "
          f"{name}.png\n{table}", end="")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="a checkpoint (.pt), which may be left out, then .ply, .npy, .npz, "
                        "scene folders, folders with points and frames")
    parser.add_argument("--out", default="predictions", help="folder for the files (default predictions)")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="of the instances shown (default 0.3)")
    parser.add_argument("--scale", type=float, help="metres of a unit of points and poses, 0.001 for mm (default 1)")
    parser.add_argument("--up", choices=UP, default="z", help="the axis that points up; --up=-y if it starts with -")
    parser.add_argument("--cameras", choices=CAMERAS, default="opencv", help="x right, y down; y up; world_to_camera")
    parser.add_argument("--depth-scale", type=float, help="metres of a unit of depth (default 0.001, of floats 1)")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    args = parser.parse_args(argv)
    given = args.paths.pop(0) if args.paths[0].endswith(".pt") else None
    if not args.paths:
        parser.error(f"expected scans after the checkpoint {given}")
    if not given:
        print(ABOUT)
    paths = [*dict.fromkeys(Path(scene).resolve() for scene in args.paths)]
    stems = [path.name if path.is_dir() else path.stem for path in paths]
    out, network, failed, root = Path(args.out), None, [], os.path.commonpath([path.parent for path in paths])
    for path, stem in zip(paths, stems):
        name, readable = stem if stems.count(stem) == 1 else "_".join(path.relative_to(root).parts), False
        try:
            if not network:
                readable = bool(read_scan(path, scale=args.scale, up=args.up))  # a broken one is told in a second
                network = open_checkpoint(given or WEIGHTS, args.device)
            out.mkdir(parents=True, exist_ok=True)
            how = network[0].semantic_head.weight.device, args.scale, args.up, args.cameras, args.depth_scale
            scene, prediction = predict_scene(*network, path, *how)
            write(out, network[1].model, scene | {"name": name}, prediction, args.min_score)
        except Exception as error:  # the others go on
            said = message(error)
            if readable and not network:
                sys.exit(f"error: {said}")
            if said.startswith("out of memory"):
                said += f"; lower TILE_VOXELS, {TILE_VOXELS} voxels a tile, in predict.py, or give --device cpu"
            failed.append(f"error: {said}" if str(path) in said else f"error: {path}: {said}")
    if failed:
        sys.exit("\n".join(failed + [f"{len(failed)} of {len(paths)} scans failed"] * (len(paths) > 1)))


if __name__ == "__main__":
    main()
