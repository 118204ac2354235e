"""What a checkpoint makes of scans that none of our writers made: Open3D fuses a room's frames into a coloured mesh.

    python -m tests.tsdf fuse data/furnished/val --out meshes   # a .ply a room, by Open3D, which must be installed
    python -m tests.tsdf score data/furnished/val --out meshes --checkpoint weights/small.pt

The rooms are those of scenes.rooms or scenes.boxes. Score: mIoU over the vertices of all meshes, with the frames beside
the mesh and without. A vertex has the label of the nearest point of the room within 4 cm, none beyond. The mesh covers
what its 8 frames see, and has its own holes.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from metrics import semantic_iou
from predict import WEIGHTS, open_checkpoint, predict_scene
from scenes.folder import CAMERA_FILE, CLASS_NAMES, IGNORE, frame_files, load_scene

VOXEL, FAR, NEAR = 0.02, 8.0, 0.04  # m


def fuse(folder, path):
    """A truncated signed distance volume of all frames of a scene folder, its surface as a .ply."""
    import open3d
    from open3d.core import Tensor, float32

    grid = open3d.t.geometry.VoxelBlockGrid(("tsdf", "weight", "color"), 3 * (float32,), ((1,), (1,), (3,)), VOXEL)
    camera = Tensor(np.loadtxt(folder / CAMERA_FILE)[:3, :3])
    for files in frame_files(folder)[0].values():
        color, depth = (open3d.t.io.read_image(str(file)) for file in files[:2])
        where = camera, Tensor(np.linalg.inv(np.loadtxt(files[2]))), 1000.0, FAR
        grid.integrate(grid.compute_unique_block_coordinates(depth, *where), depth, color, camera, *where)
    mesh = grid.extract_triangle_mesh(weight_threshold=0.5).to_legacy()
    open3d.io.write_triangle_mesh(str(path), mesh)


def labels_of(folder, coord):
    """Labels (n,) of places (n, 3) in the room of a scene folder."""
    room = load_scene(folder)
    distance, nearest = cKDTree(room["coord"]).query(coord, distance_upper_bound=NEAR)
    return np.where(np.isfinite(distance), np.append(room["segment"], IGNORE)[nearest], IGNORE)


def score(model, config, rooms, out, frames):
    """semantic_iou's result over the meshes of rooms."""
    def pairs():
        for folder in rooms:
            with tempfile.TemporaryDirectory() as beside:
                parts = ("color", "depth", "pose", "intrinsic") if frames else ()
                for source in (out / f"{folder.name}.ply", *(folder / part for part in parts)):
                    Path(beside, source.name).symlink_to(source.resolve())
                scene, found = predict_scene(model, config, beside)
            yield labels_of(folder, scene["coord"]), found["labels"]
    return semantic_iou(pairs(), range(len(CLASS_NAMES)))


def main():
    parser = argparse.ArgumentParser("python -m tests.tsdf", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("fuse", "score"))
    parser.add_argument("rooms", type=Path, help="folder of scenes, such as data/furnished/val")
    parser.add_argument("--out", type=Path, required=True, help="folder of the meshes")
    parser.add_argument("--checkpoint", default=WEIGHTS)
    args = parser.parse_args()
    rooms = sorted(folder for folder in args.rooms.iterdir() if folder.is_dir())
    if args.what == "fuse":
        args.out.mkdir(parents=True, exist_ok=True)
        for folder in rooms:
            fuse(folder, args.out / f"{folder.name}.ply")
        return
    if missing := [folder.name for folder in rooms if not (args.out / f"{folder.name}.ply").is_file()]:
        parser.error(f"{args.out} has no mesh of {', '.join(missing[:3])}: make them with fuse")
    model, config = open_checkpoint(args.checkpoint)
    for frames in (False, True)[: 1 + (config.model == "bifusion")]:
        found = score(model, config, rooms, args.out, frames)
        classes = ", ".join(f"{name} {iou:.2f}" for name, iou in zip(CLASS_NAMES, found["iou"]))
        print(f"{len(rooms)} meshes {'and their frames' if frames else 'alone'}: mIoU {found['miou']:.3f}; {classes}")


if __name__ == "__main__":
    main()
