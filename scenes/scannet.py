"""Official ScanNet files -> the scene folders that data.py reads.

    python -m scenes.scannet SCANS --out data/scannet                  # points, labels and every 20th frame
    python -m scenes.scannet SCANS --out data/scannet --frames-only    # frames beside a ScanNet that Pointcept prepared

SCANS is the download's folder, or scans/ in it. A scan that cannot be read is listed with the reason and the others go
on; after Ctrl-C or a fault the same command goes on where it stopped. Frames come from the .sens, from exported
color/ depth/ pose/ intrinsic/, or from scannet_frames_25k, and are stored as they were recorded, byte for byte.

Frame: metres, +z up, axisAlignment applied to points and poses alike.
Format: github.com/ScanNet/ScanNet (README, SensReader, BenchmarkScripts), MIT; the data has its own terms of use.
"""

import argparse
import csv
import io
import json
import operator
import os
import re
import shutil
import signal
import struct
import sys
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from tqdm import tqdm

from scenes.folder import (IGNORE, MAX_PIXELS, NYU40_IDS, STUFF, fault, frame_files, load_scene, read_ply,
                           reading)
from scenes.points import vertex_normals

SPLITS = ("train", "val", "test")
LABEL_TABLE = "scannetv2-labels.combined.tsv"
FRAME_FOLDERS = ("scannet_frames_25k", "scannet_frames_test")  # with every 100th frame
FRAME_PARTS = ("color", "depth", "intrinsic", "pose")  # pose, which says that all is there, at the end
IDS_200 = [str(i) for first, last in re.findall(r"(\d+)-?(\d*)", (  # of the column "id" in LABEL_TABLE, inclusive
    "1-11 13-19 21-24 26-29 31-36 38-42 44-52 54-59 62-80 82 84 86-90 93 95-107 110 112 115-116 118 120-122 125 128 "
    "130-132 134 136 138-141 145 148 154-157 159 161 163 165-166 168-170 177 180 185 188 191 193 195 202 208 213-214 "
    "221 229-230 232-233 242 250 261 264 276 283 286 300 304 312 323 325 331 342 356 370 392 395 399 408 417 488 540 "
    "562 570 572 581 609 748 776 1156 1163-1176 1178-1191")) for i in range(int(first), int(last or first) + 1)]
SENS_HEADER = struct.Struct("<64f ii IIII f Q")
SENS_FRAME = struct.Struct("<16f QQ QQ")


def read_sens(path, every=1):
    """Open a .sens and walk through every k-th frame (k: every) whose pose is finite; the others are not read.

    Returns the intrinsics (4, 4) of the colour images, pixels, and a generator of frames: index int, camera_to_world
    (4, 4) f64, the bytes of a JPEG, depth (H, W) u16, mm, 0 = no reading.
    Raises ValueError, also on the walk: the file is damaged, or packs its images in a way that ScanNet does not use.
    Source: ScanNet's SensReader, version 4.
    """
    with open(path, "rb") as file:
        version, name_length = struct.unpack("<IQ", _take(path, file, 12))
        if version != 4:
            raise fault(path, "a .sens of version 4", f"version {version}")
        _take(path, file, name_length, read=False)
        *matrices, color_packing, depth_packing, _, _, width, height, unit, count = SENS_HEADER.unpack(
            _take(path, file, SENS_HEADER.size))
        start = file.tell()
    if (color_packing, depth_packing, unit) != (2, 1, 1000) or not 0 < width * height <= MAX_PIXELS:
        raise fault(path, f"jpeg (2), depth by zlib (1) in mm (1000), depth images of 1..{MAX_PIXELS} pixels",
                    f"{color_packing}, {depth_packing}, {unit}, {width}x{height}")

    def frames():
        with open(path, "rb", buffering=0) as file:  # a buffer would read 8 KB of each frame that is passed over
            file.seek(start)
            for index in range(count):
                what = f"{path}, frame {index}"
                *pose, _, _, color_bytes, depth_bytes = SENS_FRAME.unpack(_take(what, file, SENS_FRAME.size))
                if index % every or not np.isfinite(pose).all():
                    _take(what, file, color_bytes + depth_bytes, read=False)
                    continue
                color, packed = _take(what, file, color_bytes), _take(what, file, depth_bytes)
                with reading(what, "depth packed by zlib"):
                    depth = zlib.decompressobj().decompress(packed, 2 * width * height + 1)  # never far too much
                if len(depth) != 2 * width * height:
                    raise fault(what, f"{2 * width * height} bytes of depth", f"{len(depth)} or more")
                yield index, np.reshape(pose, (4, 4)), color, np.frombuffer(depth, "<u2").reshape(height, width)

    return np.reshape(matrices[:16], (4, 4)), frames()


def _take(what, file, count, read=True):
    """The next bytes of a file, which is compared with a damaged count first; nothing where they are passed over."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if count > left:
        raise fault(what, f"{count} bytes at byte {file.tell()}", f"{left} bytes")
    return file.read(count) if read else file.seek(count, os.SEEK_CUR)


def _integers(values):
    """A list out of a .json -> (n,) int64; TypeError for anything but whole numbers."""
    return np.array([operator.index(value) for value in values], int)


def _matrix(path, text):
    """16 numbers as text or bytes -> (4, 4) f64."""
    with reading(path, "16 numbers"):
        return np.array(text.split(), float).reshape(4, 4)


def _axis_alignment(path):
    """axisAlignment (4, 4) of a scan's .txt; identity where it has none."""
    found = dict(re.findall(r"^\s*(\w+)\s*=(.*)$", Path(path).read_text("utf-8", "replace"), re.MULTILINE))
    if not found:
        raise fault(path, "lines of 'key = value'", "none")
    matrix = _matrix(path, found.get("axisAlignment", "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"))
    turn = matrix[:3, :3]
    if not (np.abs(matrix).max() < 1e4 and np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3):  # False for NaN
        raise fault(path, "a rotation and a shift as axisAlignment", matrix.tolist())
    return matrix


def _check_image(what, data, kind):
    """(W, H) of the bytes of a JPEG, or of a PNG of 16 bit; decodes as much as is needed to see that it is whole."""
    with reading(what, f"a whole {kind}"), Image.open(io.BytesIO(data), formats=[kind]) as image:
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}")
        if kind == "PNG" and image.mode not in ("I;16", "I"):
            raise ValueError(f"mode {image.mode}, not 16 bit")
        image.draft(None, (1, 1))  # of a JPEG an eighth of the size is enough
        image.load()
        return size


def read_scan(folder, labelled, classes_200=None):
    """The points and labels of one scan.

    folder: holds the official files <name>..., where name is the folder's; labelled: False for the test scans, which
    have the mesh and <name>.txt alone; classes_200: dict raw category -> class of ScanNet200, or None.

    Returns a dict of the arrays of a scene folder (coord, color, normal if the mesh has faces; if labelled superpoint,
    segment20, segment200 if classes_200, and instance, of groups of which most is neither wall nor floor), and the
    axisAlignment (4, 4) applied to coord.
    Raises FileNotFoundError, ValueError: a file that is missing, damaged or of another scan.
    """
    stem = Path(folder, Path(folder).name)
    mesh_file = f"{stem}_vh_clean_2.ply"
    mesh, axis = read_ply(mesh_file), _axis_alignment(f"{stem}.txt")
    if mesh["color"] is None:
        raise fault(mesh_file, "vertex properties red green blue", "none")
    if np.abs(mesh["coord"]).max() > 1e4:
        raise fault(mesh_file, "coordinates in metres, below 10 km", f"{np.abs(mesh['coord']).max():.3g}")
    coord, n = mesh["coord"] @ axis[:3, :3].T + axis[:3, 3], len(mesh["coord"])  # f64
    scene = {"coord": coord.astype(np.float32), "color": mesh["color"]}
    if mesh["faces"] is not None:
        scene["normal"] = vertex_normals(coord, mesh["faces"])
    if not labelled:
        return scene, axis
    segments_file, label_file = Path(f"{stem}_vh_clean_2.0.010000.segs.json"), f"{stem}_vh_clean_2.labels.ply"
    content, label = segments_file.read_bytes(), read_ply(label_file)["label"]
    with reading(segments_file, "an object with segIndices, a list of whole numbers"):
        segments = _integers(json.loads(content)["segIndices"])
    for file, what, values in ((segments_file, "segIndices", segments), (label_file, "labels", label)):
        if values is None or len(values) != n:
            raise fault(file, f"{what} of {n} vertices", "none" if values is None else len(values))
    segment_ids, superpoint = np.unique(segments, return_inverse=True)
    scene["superpoint"] = superpoint.astype(np.int32)
    class_of = np.full(41, IGNORE, np.int32)
    class_of[list(NYU40_IDS)] = range(len(NYU40_IDS))
    scene["segment20"] = class_of[np.where((label >= 0) & (label <= 40), label, 0)]  # 50 and 149 occur
    owner, categories = _groups(f"{stem}.aggregation.json", segment_ids)
    group = owner[superpoint] + 1  # (N,) 0 = in no group
    votes = np.zeros((len(categories) + 1, len(NYU40_IDS) + 1), int)  # vertices of each class, IGNORE first, by group
    np.add.at(votes, (group, scene["segment20"] + 1), 1)
    is_thing = votes.any(1) & ~np.isin(votes.argmax(1) - 1, STUFF)
    is_thing[0] = False
    scene["instance"] = np.where(is_thing, np.cumsum(is_thing) - 1, -1)[group].astype(np.int32)  # 0, 1, ... as listed
    if classes_200 is not None:
        classes = [IGNORE] + [classes_200.get(category, IGNORE) for category in categories]
        scene["segment200"] = np.array(classes, np.int32)[group]
    return scene, axis


def _groups(path, segment_ids):
    """Row of the group that owns each segment, -1 = none (S,); the categories of the groups."""
    content = Path(path).read_bytes()
    with reading(path, "an object with segGroups, each with segments, a list of whole numbers"):
        groups = [(str(group.get("label")), _integers(group["segments"])) for group in json.loads(content)["segGroups"]]
    owner = np.full(len(segment_ids), -1)
    for row, (_, segments) in enumerate(groups):
        known = np.isin(segment_ids, segments)
        if len(segments) and not known.any():
            raise fault(path, "segments of the scan's segs.json", f"none in group {row + 1}; is it another mesh's?")
        owner[known] = row  # the last group wins
    return owner, [category for category, _ in groups]


def read_categories(path):
    """scannetv2-labels.combined.tsv -> dict raw category -> class of ScanNet200, of those that have one."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"id", "raw_category"} <= set(rows.fieldnames or ()):
            raise fault(path, "a table with the columns id and raw_category", rows.fieldnames)
        return {row["raw_category"]: IDS_200.index(row["id"]) for row in rows if row["id"] in IDS_200}


def write_frames(target, folders, every, axis):
    """Write color/, depth/, pose/ and intrinsic/ of a scene from the first of the folders that holds frames.

    target: scene folder; folders: of this scan; every: k, frames 0, k, 2k, ... are taken; axis: (4, 4), from the frame
    of the poses to the frame of the points. Returns the number of frames, 0 also if no folder holds any.
    Raises FileNotFoundError, ValueError: a file that is missing or damaged.
    """
    found = next(filter(None, (_frames_of(folder, every) for folder in folders)), None)
    if found is None:
        return 0
    camera_file, camera, frames = found
    for name in FRAME_PARTS:
        (target / name).mkdir(parents=True)
    sizes = []
    for what, index, pose, color, depth in frames:
        sizes.append(_check_image(what, color, "JPEG"))
        if sizes[-1] != sizes[0]:
            raise fault(what, f"colour of {sizes[0]}", sizes[-1])
        (target / "color" / f"{index}.jpg").write_bytes(color)
        (target / "depth" / f"{index}.png").write_bytes(depth)
        np.savetxt(target / "pose" / f"{index}.txt", axis @ pose, fmt="%.9g")
    if sizes and not (np.isfinite(camera).all() and camera[0, 0] > 0 and camera[1, 1] > 0
                      and (np.abs(camera[:2, 2] / sizes[0] - 0.5) < 0.15).all()):  # principal point near the middle
        raise fault(camera_file, "intrinsics of an image of {}x{}".format(*sizes[0]), camera.tolist())
    np.savetxt(target / "intrinsic" / "intrinsic_color.txt", camera, fmt="%.9g")
    return len(sizes)


def _frames_of(folder, every):
    """The frames that a folder holds in a .sens or in color/ depth/ pose/; None without any.

    Returns the file of the intrinsics, these (4, 4), and a generator of the frames with a finite pose: what an error
    names, index, camera_to_world (4, 4), the bytes of the JPEG, the bytes of the PNG.
    """
    sens = folder / f"{folder.name}.sens"
    if sens.is_file():
        camera, frames = read_sens(sens, every)
        return sens, camera, ((f"{sens}, frame {i}", i, pose, color, _png(depth)) for i, pose, color, depth in frames)
    if not (folder / "pose").is_dir() or not (folder / "color").is_dir():
        return None
    is_thinned = not (folder / "intrinsic").is_dir()  # scannet_frames_25k, with names like 000120.txt
    camera_file = folder / ("intrinsics_color.txt" if is_thinned else "intrinsic/intrinsic_color.txt")
    files = {i: files for i, files in frame_files(folder)[0].items() if is_thinned or i % every == 0}
    if not files:
        raise ValueError(f"{folder}: expected color/, depth/ and pose/ with files of the same numbers, found none")

    def read():
        for index, (color, depth, pose) in files.items():
            matrix, png = _matrix(pose, pose.read_bytes()), depth.read_bytes()
            if np.isfinite(matrix).all():
                _check_image(depth, png, "PNG")
                yield color, index, matrix, color.read_bytes(), png

    return camera_file, _matrix(camera_file, camera_file.read_bytes()), read()


def _png(depth):
    """A depth image (H, W) u16 as the bytes of a PNG."""
    png = io.BytesIO()  # depth is smooth and noisy: run lengths take a seventh of the time and 4 % more bytes
    Image.fromarray(depth).save(png, "PNG", compress_type=zlib.Z_RLE)
    return png.getvalue()


def prepare(scans, out, every=20, splits=None, workers=None, frames_only=False):
    """Make the scene folders of <out>/{train,val,test} that are not there yet.

    Args:
        scans:       the download's folder or scans/ in it.  out: folder of the data set.
        every:       k: frames 0, k, 2k, ...  splits: folder of the split lists, where they are not in the download.
        workers:     number of processes, default one a CPU core.
        frames_only: add frames to the scenes that are in out already and write nothing else.

    Returns a dict of int made, there (before), absent (in a split list, not in scans); and of dicts from scene to text,
    skipped with the reason and notes.
    Raises FileNotFoundError: no such folder, no scan, no split list.  ValueError: every or workers below 1.
    """
    out, workers = Path(out), os.cpu_count() if workers is None else workers
    if every < 1 or workers < 1:
        raise ValueError(f"expected --frames and --workers of 1 or more, got {every} and {workers}")
    folders, files = _find(scans, splits)
    result, classes_200 = {"skipped": {}, "notes": {}, "made": {}}, None
    if frames_only:
        scenes = sorted(path.parent for split in SPLITS for path in (out / split).glob("*/coord.npy"))
        if not scenes:
            raise FileNotFoundError(f"no scene in {out}/train, val or test to add frames to")
    else:
        folders = {name: paths for name, paths in folders.items() if _mesh_of(paths)}
        if not folders:
            raise FileNotFoundError(f"no scan in {scans}: expected folders like scene0000_00 with "
                                    "scene0000_00_vh_clean_2.ply, there or in scans/")
        lists = {split: files[name] for split in SPLITS if (name := f"scannetv2_{split}.txt") in files}
        if not lists:
            raise FileNotFoundError(f"no split list in {scans}: expected scannetv2_train.txt, ... (ScanNet's "
                                    "Tasks/Benchmark); give their folder by --splits")
        scenes = [out / split / name for split, path in lists.items() for name in read_split(path)]
        classes_200 = read_categories(files[LABEL_TABLE]) if LABEL_TABLE in files else None
        result["skipped"] |= dict.fromkeys(folders.keys() - {scene.name for scene in scenes}, "in no split list")
        for split, path in lists.items():
            (out / split).mkdir(parents=True, exist_ok=True)
            (out / f"scannetv2_{split}.txt").write_bytes(path.read_bytes())
        if classes_200 is not None:  # as scenes.folder.read_classes takes it, once its name is classes.json
            first = {k: name for name, k in reversed(classes_200.items())}
            names = [first.get(k, f"id {number}") for k, number in enumerate(IDS_200)]
            (out / "classes200.json").write_text(json.dumps({
                "names": names, "ids": [*map(int, IDS_200)], "stuff": [n for n in names if n in ("wall", "floor")]}))
    record, there = out / "scannet.json", sum((scene / "pose").is_dir() for scene in scenes)
    before = json.loads(record.read_text())["frames"] if there and record.is_file() else every
    if not there:
        record.write_text(json.dumps({"frames": every}))
    elif before != every:
        print(f"{out}: {there} scenes keep one frame in {before}, new ones get one in {every}; for one rate give "
              f"--frames {before}, or delete these scenes (with --frames-only their {'/ '.join(FRAME_PARTS)}/)")
    open_scenes = [scene for scene in scenes if not (scene / "pose" if frames_only else scene).is_dir()]
    jobs = [scene for scene in open_scenes if scene.name in folders]
    (out / ".unfinished").mkdir(parents=True, exist_ok=True)
    make = partial(_make_scene, every=every, classes_200=classes_200, frames_only=frames_only)
    try:  # at Ctrl-C the processes of the pool end the scans they are at; it starts none before its first job
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            run = pool.map if min(workers, len(jobs)) > 1 else map
            done = run(make, jobs, [folders[scene.name] for scene in jobs])
            for scene, (kind, text) in zip(jobs, tqdm(done, "scans", len(jobs), unit="scan", disable=not jobs)):
                result[kind][scene.name] = text
    finally:
        shutil.rmtree(out / ".unfinished", ignore_errors=True)  # also what a killed run has left
    made = len(result.pop("made")) + len(result["notes"])
    return result | {"made": made, "there": len(scenes) - len(open_scenes), "absent": len(open_scenes) - len(jobs)}


def read_split(path):
    """The scene names of a split list."""
    names = Path(path).read_text("utf-8", "replace").split()
    broken = [name for name in names if not re.fullmatch(r"scene\d{4}_\d\d", name)]
    if broken or not names:
        raise fault(path, "names like scene0000_00", repr(broken[0][:40]) if broken else "none")
    return names


def _find(scans, splits):
    """dict scan -> its folders, those with a .sens first; dict name -> file of the split lists and the label table."""
    scans, lists = Path(scans).absolute(), [Path(splits)] if splits else []
    for root in (scans, *lists):
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder; give the folder of the ScanNet download")
    bases, folders, files = (scans, scans.parent), {}, {}  # the parent: scans/ of the download may be given
    for place in (scans, scans / "scans", scans / "scans_test", *(b / name for b in bases for name in FRAME_FOLDERS)):
        for folder in sorted(place.glob("scene????_??")):
            folders.setdefault(folder.name, []).append(folder)
    for place in (*(place for base in bases[::-1] for place in (base, base / "Tasks/Benchmark")), *lists):
        files |= {path.name: path for path in place.glob("scannetv2*")}  # the last counts
    return folders, files


def _mesh_of(folders):
    """The first of the folders of one scan that holds its mesh, or None."""
    return next((folder for folder in folders if (folder / f"{folder.name}_vh_clean_2.ply").is_file()), None)


def _make_scene(scene, folders, every, classes_200, frames_only):
    """Write a scene, or its frames, beside its place and rename it there: whole or not at all.

    Returns "skipped" and the reason, "notes" and a remark, or "made" and None.
    """
    note = None
    try:
        with TemporaryDirectory(dir=scene.parent.parent / ".unfinished") as work:
            if frames_only:
                if there := [name for name in FRAME_PARTS if (scene / name).exists()]:
                    raise ValueError(f"{scene} holds {there[0]}/ without pose/; move it away first")
                arrays, (axis, note) = {}, _axis_of_points(scene, _mesh_of(folders))
            else:
                arrays, axis = read_scan(_mesh_of(folders), scene.parent.name != "test", classes_200)
            part = Path(work, scene.name)
            part.mkdir()
            for name, array in arrays.items():
                np.save(part / f"{name}.npy", array)
            count = write_frames(part, folders, every, axis)
            if frames_only and not count:
                raise ValueError("no usable frame in a .sens, color/ and pose/ or scannet_frames_25k of this scan")
            moves = [(part / name, scene / name) for name in FRAME_PARTS] if frames_only else [(part, scene)]
            for source, place in moves:
                source.rename(place)
        note = note if count else "no frames"
        return "notes" if note else "made", note
    except (OSError, ValueError) as error:
        return "skipped", str(error)


def _axis_of_points(scene, folder):
    """axisAlignment if the points of a prepared scene had it applied, else identity (as Pointcept leaves them)."""
    if folder is None:
        return np.eye(4), "no mesh to compare with: points taken as not axis-aligned, as Pointcept stores them"
    coord, mesh = load_scene(scene)["coord"], read_ply(folder / f"{folder.name}_vh_clean_2.ply")["coord"]
    for matrix in (np.eye(4), _axis_alignment(folder / f"{folder.name}.txt")):
        if coord.shape == mesh.shape and np.abs(mesh @ matrix[:3, :3].T + matrix[:3, 3] - coord).max() < 1e-3:
            return matrix, None
    raise fault(scene / "coord.npy", "the vertices of the scan's mesh, axis-aligned or not", f"others, {coord.shape}")


def main(argv=None):
    parser = argparse.ArgumentParser("python -m scenes.scannet", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", help="folder of the ScanNet download, or scans/ in it")
    parser.add_argument("--out", default="data/scannet", help="folder of the data set (default %(default)s)")
    parser.add_argument("--frames", type=int, default=20, dest="every", help="every K-th frame (default %(default)s)")
    parser.add_argument("--splits", help="folder of scannetv2_{train,val,test}.txt; default: in the download")
    parser.add_argument("--workers", type=int, help="processes; default: one a CPU core")
    parser.add_argument("--frames-only", action="store_true", help="add frames to the scenes in --out")
    args = parser.parse_args(argv)
    try:
        result = prepare(**vars(args))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
    except (OSError, ValueError, BrokenExecutor) as error:
        sys.exit(f"error: {error}")
    for kind, word in (("notes", ""), ("skipped", "skipped ")):
        for text in sorted(set(result[kind].values())):
            print(word + ", ".join(sorted(name for name in result[kind] if result[kind][name] == text)) + f": {text}")
    print(f"{args.out}: {result['made']} scenes made, {result['there']} were there, {len(result['skipped'])} skipped, "
          f"{result['absent']} scans not found")
    if result["made"] + result["there"] == 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
