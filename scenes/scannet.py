"""Official ScanNet files -> scene folders of data.py; a checkpoint -> the benchmark's submission files.

    python scannet.py SCANS --out data/scannet                       # points, labels and every 20th frame
    python scannet.py SCANS --out data/scannet --frames-only         # frames beside a ScanNet that Pointcept prepared
    python scannet.py submit runs/bifusion/best.pt --data data/scannet --split val --out submission

SCANS is the download's folder, or scans/ in it. A scan that cannot be read is listed with the reason and the others go
on; after Ctrl-C or a fault the same command goes on where it stopped. Frames come from the .sens, from exported
color/ depth/ pose/ intrinsic/, or from scannet_frames_25k, and are stored as they were recorded, byte for byte.

Files may be damaged in any way: a number that says how much follows is compared with what is there before it is
used, so that a fault is one ValueError that names the file, and reading takes no more memory than about twice the file.

Frame: metres, +z up, axisAlignment applied to points and poses alike.
Format: github.com/ScanNet/ScanNet (README, SensReader, BenchmarkScripts), MIT; the data has its own terms of use.
"""

import argparse
import io
import json
import mmap
import os
import re
import shutil
import signal
import struct
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from scenes.folder import IGNORE, NYU40_IDS, STUFF
from scenes.ply import fault, read_ply
from scenes.points import vertex_normals

SPLITS = ("train", "val", "test")
SCENE_NAME = re.compile(r"scene\d{4}_\d\d")
LABEL_TABLE = "scannetv2-labels.combined.tsv"
FRAME_FOLDERS = ("scannet_frames_25k", "scannet_frames_test")  # with every 100th frame
FRAME_PARTS = ("color", "depth", "intrinsic", "pose")  # pose, which says that all is there, at the end
SCANNET200_IDS = [i for first, last in re.findall(r"(\d+)-?(\d*)", (  # of the column "id" in LABEL_TABLE, inclusive
    "1-11 13-19 21-24 26-29 31-36 38-42 44-52 54-59 62-80 82 84 86-90 93 95-107 110 112 115-116 118 120-122 125 128 "
    "130-132 134 136 138-141 145 148 154-157 159 161 163 165-166 168-170 177 180 185 188 191 193 195 202 208 213-214 "
    "221 229-230 232-233 242 250 261 264 276 283 286 300 304 312 323 325 331 342 356 370 392 395 399 408 417 488 540 "
    "562 570 572 581 609 748 776 1156 1163-1176 1178-1191")) for i in range(int(first), int(last or first) + 1)]
MAX_PIXELS = 2**22  # of an image; ScanNet's have 1296x968

# ------------------------------------------------------------------------------------------------- reading the files

SENS_HEADER = struct.Struct("<64f ii IIII f Q")
SENS_FRAME = struct.Struct("<16f QQ QQ")


def read_sens(path, every=1):
    """Open a .sens and walk through every k-th frame; the others are passed over without reading their images.

    Frames whose pose is not finite (tracking lost) are left out.

    Args:
        path:  the file.  every: k; frames 0, k, 2k, ... are given.

    Returns:
        header: dict, intrinsics_color (4, 4) pixels, color_size and depth_size (W, H), frame_count, suffix of the
                colour images (.jpg or .png).
        frames: generator of (index int, camera_to_world (4, 4) f64, color bytes: an image file of that suffix,
                depth (H, W) u16, mm, 0 = no reading).

    Raises:
        ValueError: the file is truncated or damaged, or packs its images in a way that ScanNet does not use; also
            while the frames are walked through.

    Source: ScanNet's SensReader, version 4.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        version, name_length = struct.unpack("<IQ", _take(path, file, size, 12, "header"))
        if version != 4:
            raise fault(path, "a .sens of version 4", f"version {version}")
        if name_length > size - 12:
            raise fault(path, f"a sensor name of {name_length} bytes", f"{size - 12} bytes")
        file.seek(name_length, os.SEEK_CUR)
        *matrices, color_packing, depth_packing, cw, ch, dw, dh, unit, count = SENS_HEADER.unpack(
            _take(path, file, size, SENS_HEADER.size, "header"))
        start = file.tell()
    if color_packing not in (1, 2) or depth_packing not in (0, 1) or unit != 1000:
        raise fault(path, "colour packed as 1 or 2, depth as 0 or 1, in mm", (color_packing, depth_packing, unit))
    if not (0 < cw * ch <= MAX_PIXELS and 0 < dw * dh <= MAX_PIXELS):
        raise fault(path, f"images of 1..{MAX_PIXELS} pixels", f"{cw}x{ch}, {dw}x{dh}")
    if count * SENS_FRAME.size > size - start:
        raise fault(path, f"{count} frames", f"{size - start} bytes")

    def frames():
        with open(path, "rb", buffering=0) as file:  # a buffer would read 8 KB of each frame that is passed over
            file.seek(start)
            for index in range(count):
                what = f"{path}, frame {index}"
                head = _take(what, file, size, SENS_FRAME.size, "header")
                *pose, _, _, color_bytes, depth_bytes = SENS_FRAME.unpack(head)
                if index % every or not np.isfinite(pose).all():
                    if color_bytes + depth_bytes > size - file.tell():
                        raise fault(what, f"{color_bytes + depth_bytes} bytes of images", f"{size - file.tell()} bytes")
                    file.seek(color_bytes + depth_bytes, os.SEEK_CUR)
                    continue
                color = _take(what, file, size, color_bytes, "colour")
                depth = _take(what, file, size, depth_bytes, "depth")
                if depth_packing == 1:
                    try:
                        depth = zlib.decompressobj().decompress(depth, dw * dh * 2 + 1)  # never more than it should be
                    except zlib.error as error:
                        raise fault(what, "depth packed by zlib", error) from None
                if len(depth) != dw * dh * 2:
                    raise fault(what, f"{dw * dh * 2} bytes of depth", f"{len(depth)} or more")
                yield index, np.reshape(pose, (4, 4)), color, np.frombuffer(depth, "<u2").reshape(dh, dw)

    return {"intrinsics_color": np.reshape(matrices[:16], (4, 4)), "color_size": (cw, ch), "depth_size": (dw, dh),
            "frame_count": count, "suffix": ".jpg" if color_packing == 2 else ".png"}, frames()


def _take(what, file, size, count, part):
    """The next bytes of a file of this size."""
    if count > size - file.tell():
        raise fault(what, f"{count} bytes of {part} at byte {file.tell()}", f"{size - file.tell()} bytes")
    return file.read(count)


def _read_json(path):
    """A .json whose lists of whole numbers are NumPy arrays, read piece by piece: [1, 2] -> array([1, 2], int32)."""
    arrays = []

    def keep(match):
        if len(arrays) == 2**13:
            raise fault(path, f"at most {2**13} lists of numbers", "more")
        arrays.append(_integers(path, data, *match.span(1)))
        return b'{"array": %d}' % (len(arrays) - 1)

    if os.path.getsize(path) == 0:
        raise fault(path, "JSON", "an empty file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        skeleton = re.sub(rb"\[(\s*\d[\d\s,]*)\]", keep, data)
    if len(skeleton) > 2**20:
        raise fault(path, "lists of whole numbers and at most 1 MB around them", f"{len(skeleton)} bytes")
    try:
        content = json.loads(skeleton, object_hook=lambda d: arrays[d["array"]] if d.keys() == {"array"} else d)
    except (ValueError, RecursionError, IndexError, TypeError) as error:
        raise fault(path, "JSON", error) from None
    if not isinstance(content, dict):
        raise fault(path, "a JSON object", type(content).__name__)
    return content


def _integers(path, data, start, end):
    """The whole numbers in data[start:end] with commas between: (n,) int32."""
    out = bytearray()
    while start <= end:
        stop = data.find(b",", min(start + 2**16, end), end)
        piece = data[start : end if stop < 0 else stop]
        start += len(piece) + 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # NumPy only warns of what is no number
                numbers = np.fromstring(piece.strip(), np.int32, sep=",")
            if len(numbers) != piece.count(b",") + 1 or re.search(rb"\d{10}", piece):
                raise ValueError("a number missing or of more than 9 digits")
        except (ValueError, DeprecationWarning) as error:
            raise fault(path, "whole numbers with commas between", error) from None
        out += numbers.tobytes()
    return np.frombuffer(out, np.int32)


def _read_text(path):
    """A small text file."""
    with open(path, "rb") as file:
        text = file.read(2**20)
    if len(text) == 2**20:
        raise fault(path, "a small text file", "1 MB or more")
    return text.decode("utf-8", "replace")


def _matrix(path, text=None):
    """16 numbers, of a whole text file if not given: (4, 4) f64."""
    text = _read_text(path) if text is None else text
    try:
        return np.array([float(word) for word in text.split()]).reshape(4, 4)
    except ValueError:
        raise fault(path, "16 numbers", repr(text[:60])) from None


def _axis_alignment(path):
    """axisAlignment (4, 4) of a scan's .txt; identity where it has none."""
    found = dict(re.findall(r"^\s*(\w+)\s*=(.*)$", _read_text(path), re.MULTILINE))
    if not found:
        raise fault(path, "lines of 'key = value'", "none")
    matrix = _matrix(path, found["axisAlignment"]) if "axisAlignment" in found else np.eye(4)
    turn = matrix[:3, :3]
    if not (np.abs(matrix).max() < 1e4 and np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3):  # False for NaN
        raise fault(path, "a rotation and a shift as axisAlignment", matrix.tolist())
    return matrix


def _image_size(what, data, formats):
    """(W, H) of an image file given as bytes; reads it as far as is needed to see that it is whole."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            size = image.size
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}")
            if image.format == "JPEG":
                image.draft(None, (1, 1))  # an eighth of the size: enough to see that it is whole
                image.load()
            else:
                if formats == ["PNG"] and image.mode not in ("I;16", "I"):
                    raise ValueError(f"mode {image.mode}, not 16 bit")
                image.verify()  # the check sums of a PNG
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise fault(what, "a whole " + " or ".join(formats), error) from None
    return size


# ------------------------------------------------------------------------------------------------ one scan


def read_scan(folder, labelled, ids_200=None):
    """The points and labels of one scan.

    Args:
        folder:   holds the official files <name>...; name is the folder's.
        labelled: False for the test scans, which have the mesh and <name>.txt alone.
        ids_200:  dict raw category -> id of ScanNet200, or None for 20 classes alone.

    Returns:
        dict of the arrays of a scene folder: coord, color, normal (if the mesh has faces), and if labelled superpoint,
        segment20, segment200 (if ids_200) and instance (groups of which most is wall or floor are none);
        axisAlignment (4, 4), applied to coord.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, damaged or of another scan.
    """
    stem = Path(folder, Path(folder).name)
    mesh_file = Path(f"{stem}_vh_clean_2.ply")
    mesh, axis = read_ply(mesh_file), _axis_alignment(f"{stem}.txt")
    if mesh["color"] is None:
        raise fault(mesh_file, "vertex properties red green blue", "none")
    n = len(mesh["coord"])
    if np.abs(mesh["coord"]).max() > 1e4:
        raise fault(mesh_file, "coordinates in metres, below 10 km", f"{np.abs(mesh['coord']).max():.3g}")
    coord = mesh["coord"] @ axis[:3, :3].T + axis[:3, 3]  # f64
    scene = {"coord": coord.astype(np.float32), "color": mesh["color"]}
    if mesh["faces"] is not None:
        scene["normal"] = vertex_normals(coord, mesh["faces"])
    if not labelled:
        return scene, axis
    segments_file, label_file = Path(f"{stem}_vh_clean_2.0.010000.segs.json"), Path(f"{stem}_vh_clean_2.labels.ply")
    segments, label = _read_json(segments_file).get("segIndices"), read_ply(label_file)["label"]
    for file, what, values in ((segments_file, "segIndices", segments), (label_file, "labels", label)):
        if not isinstance(values, np.ndarray) or len(values) != n:
            raise fault(file, f"{what} of {n} vertices", len(values) if isinstance(values, np.ndarray) else "none")
    segment_ids, superpoint = np.unique(segments, return_inverse=True)
    scene["superpoint"] = superpoint.astype(np.int32)
    class_of = np.full(41, IGNORE, np.int32)
    class_of[list(NYU40_IDS)] = np.arange(len(NYU40_IDS))
    scene["segment20"] = class_of[np.where((label >= 0) & (label <= 40), label, 0)]  # 50 and 149 occur
    owner, categories = _group_of_segment(f"{stem}.aggregation.json", segment_ids)
    # votes (groups + 1, classes + 1): vertices of each class, IGNORE first, in each group, none first
    votes = np.zeros((len(categories) + 1, len(NYU40_IDS) + 1), int)
    np.add.at(votes, (owner[superpoint] + 1, scene["segment20"] + 1), 1)
    is_thing = votes.any(1) & ~np.isin(votes.argmax(1) - 1, STUFF)
    is_thing[0] = False
    ids = np.where(is_thing, np.cumsum(is_thing) - 1, -1).astype(np.int32)  # 0, 1, ... in the order of the groups
    scene["instance"] = ids[owner + 1][superpoint]
    if ids_200 is not None:
        index = {category: SCANNET200_IDS.index(i) for category, i in ids_200.items() if i in SCANNET200_IDS}
        classes = np.array([index.get(category, IGNORE) for category in categories] + [IGNORE], np.int32)
        scene["segment200"] = classes[owner][superpoint]
    return scene, axis


def _group_of_segment(path, segment_ids):
    """Row of the group that owns each segment, -1 = none (S,); the categories of the groups."""
    groups = _read_json(path).get("segGroups")
    if not isinstance(groups, list):
        raise fault(path, "segGroups", "none")
    owner, categories = np.full(len(segment_ids), -1), []
    for row, group in enumerate(groups):
        segments = group.get("segments") if isinstance(group, dict) else None
        if not isinstance(segments, np.ndarray | list) or (isinstance(segments, list) and segments):
            raise fault(path, "a list of segment ids in each of segGroups", f"{str(group)[:60]} as number {row + 1}")
        known = np.isin(segment_ids, segments)
        if len(segments) and not known.any():
            raise fault(path, "segments of the scan's segs.json", f"none in group {row + 1}; is it another mesh's?")
        owner[known] = row  # the last group wins
        categories.append(str(group.get("label")))
    return owner, categories


def read_categories(path):
    """scannetv2-labels.combined.tsv -> dict raw category -> id of ScanNet200."""
    rows = [line.split("\t") for line in _read_text(path).splitlines()]
    if not rows or not {"id", "raw_category"} <= set(rows[0]):
        raise fault(path, "a table with the columns id and raw_category", str(rows[:1])[:80])
    key, value = rows[0].index("raw_category"), rows[0].index("id")
    return {row[key]: int(row[value]) for row in rows[1:] if len(row) > max(key, value) and row[value].isdecimal()}


# --------------------------------------------------------------------------------------------------------- frames


def write_frames(target, folders, every, axis):
    """Write color/, depth/, pose/ and intrinsic/ of a scene from the first of the folders that holds frames.

    Args:
        target:  scene folder.  every: take frames 0, k, 2k, ...; of scannet_frames_25k all, it is thinned already.
        folders: folders of this scan: with its .sens, or color/ depth/ pose/.
        axis:    (4, 4), from the frame of the poses to the frame of the points.

    Returns:
        int, the number of frames with a finite pose; None if no folder holds frames.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or damaged.
    """
    for folder in folders:
        sens = folder / f"{folder.name}.sens"
        if sens.is_file() or ((folder / "pose").is_dir() and (folder / "color").is_dir()):
            size, matrix_file, matrix, frames = _sens(sens, every) if sens.is_file() else _exported(folder, every)
            break
    else:
        return None
    near = np.abs(matrix[:2, 2] / size - 0.5) < 0.15  # the principal point is near the middle of the image
    if not (np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0 and near.all()):
        raise fault(matrix_file, f"intrinsics of an image of {size[0]}x{size[1]}", matrix.tolist())
    for name in FRAME_PARTS:
        (target / name).mkdir(parents=True)
    count = 0
    for what, index, pose, color, suffix, depth in frames:
        if (found := _image_size(what, color, ["JPEG", "PNG"])) != size:
            raise fault(what, f"colour of {size}", found)
        (target / "color" / f"{index}{suffix}").write_bytes(color)
        (target / "depth" / f"{index}.png").write_bytes(depth)
        np.savetxt(target / "pose" / f"{index}.txt", axis @ pose, fmt="%.9g")
        count += 1
    np.savetxt(target / "intrinsic" / "intrinsic_color.txt", matrix, fmt="%.9g")
    return count


def _sens(path, every):
    """Size of the colour images, file of their intrinsics, these (4, 4); generator of what write_frames writes."""
    header, frames = read_sens(path, every)

    def packed():
        for index, pose, color, depth in frames:
            png = io.BytesIO()  # depth is smooth and noisy: run lengths take a seventh of the time and 4 % more bytes
            Image.fromarray(depth).save(png, "PNG", compress_type=zlib.Z_RLE)
            yield f"{path}, frame {index}", index, pose, color, header["suffix"], png.getvalue()

    return header["color_size"], path, header["intrinsics_color"], packed()


def _exported(folder, every):
    """As _sens, from color/ depth/ pose/ with names like 120.txt, or 000120.txt in scannet_frames_25k."""
    is_thinned = not (folder / "intrinsic").is_dir()
    matrix_file = folder / ("intrinsics_color.txt" if is_thinned else "intrinsic/intrinsic_color.txt")
    files = []
    for pose in (folder / "pose").glob("*.txt"):
        color, depth = folder / "color" / f"{pose.stem}.jpg", folder / "depth" / f"{pose.stem}.png"
        color = color if color.exists() else color.with_suffix(".png")
        if pose.stem.isdecimal() and color.exists() and depth.exists() and (is_thinned or int(pose.stem) % every == 0):
            files.append((int(pose.stem), color, depth, pose))
    if not files:
        raise ValueError(f"{folder}: expected color/, depth/ and pose/ with files of the same numbers, found none")
    files.sort()

    def read():
        for index, color, depth, pose in files:
            matrix = _matrix(pose)
            if np.isfinite(matrix).all():
                png = depth.read_bytes()
                _image_size(depth, png, ["PNG"])
                yield color, index, matrix, color.read_bytes(), color.suffix, png

    size = _image_size(files[0][1], files[0][1].read_bytes(), ["JPEG", "PNG"])
    return size, matrix_file, _matrix(matrix_file), read()


# ------------------------------------------------------------------------------------------------ the whole data set


def prepare(scans, out, every=20, splits=None, workers=None, frames_only=False):
    """Make the scene folders of <out>/{train,val,test} that are not there yet.

    Args:
        scans:       the download's folder or scans/ in it.  out: folder of the data set.
        every:       k: frames 0, k, 2k, ...  splits: folder of the split lists, where they are not in the download.
        workers:     number of processes, default one a CPU core.
        frames_only: add frames to the scenes that are in out already and write nothing else.

    Returns:
        dict: made, there (finished before), absent (in a split list, not in scans), all int; skipped dict scene ->
        reason, notes dict scene -> remark.

    Raises:
        FileNotFoundError: no such folder, no scan, no split list.  ValueError: every or workers below 1.
    """
    out, workers = Path(out), (os.cpu_count() or 1) if workers is None else workers
    if every < 1 or workers < 1:
        raise ValueError(f"expected --frames and --workers of 1 or more, got {every} and {workers}")
    folders, files = _find(scans, splits)
    result = {"made": 0, "there": 0, "absent": 0, "skipped": {}, "notes": {}}
    if frames_only:
        scenes = sorted(path.parent for split in SPLITS for path in (out / split).glob("*/coord.npy"))
        scanned, ids_200 = folders, None
        if not scenes:
            raise FileNotFoundError(f"no scene in {out}/train, val or test to add frames to")
    else:
        lists = {split: files[f"scannetv2_{split}.txt"] for split in SPLITS if f"scannetv2_{split}.txt" in files}
        if not lists:
            raise FileNotFoundError(f"no split list beneath {scans}: expected scannetv2_train.txt, ... (ScanNet's "
                                    "Tasks/Benchmark); give their folder by --splits")
        scenes = [out / split / name for split, path in lists.items() for name in read_split(path)]
        ids_200 = read_categories(files[LABEL_TABLE]) if LABEL_TABLE in files else None
        scanned = {name: paths for name, paths in folders.items() if _mesh_of(paths)}
        if not scanned:
            raise FileNotFoundError(f"no scan beneath {scans}: expected folders like scene0000_00 with "
                                    "scene0000_00_vh_clean_2.ply")
        unlisted = scanned.keys() - {scene.name for scene in scenes}
        result["skipped"] = dict.fromkeys(sorted(unlisted), "in no split list")
        for split, path in lists.items():
            (out / split).mkdir(parents=True, exist_ok=True)
            (out / f"scannetv2_{split}.txt").write_bytes(path.read_bytes())
    jobs = []
    for scene in scenes:
        if (scene / "pose").is_dir() if frames_only else scene.is_dir():
            result["there"] += 1
        elif scene.name in scanned:
            jobs.append((scene, scanned[scene.name], every, ids_200, frames_only))
        else:
            result["absent"] += 1
    try:
        for scene, reason, note in _in_parallel(jobs, min(workers, len(jobs))):
            if reason:
                result["skipped"][scene.name] = reason
            else:
                result["made"] += 1
                result["notes"] |= {scene.name: note} if note else {}
    finally:
        shutil.rmtree(out / ".unfinished", ignore_errors=True)  # also what a killed run has left
    return result


def read_split(path):
    """The scene names of a split list."""
    names = _read_text(path).split()
    broken = [name for name in names if not SCENE_NAME.fullmatch(name)]
    if broken or not names:
        raise fault(path, "names like scene0000_00", repr(broken[0][:40]) if broken else "none")
    return names


def _find(scans, splits):
    """Folders of each scan; split lists and label table by name. Looks four levels deep, not into the scans."""
    scans = Path(scans).resolve()
    for root in filter(None, (scans, splits)):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{root} is no folder; give the folder of the ScanNet download")
    folders, files = {}, {path.name: path for path in scans.parent.glob("scannetv2*")}
    beside = [scans.parent / name for name in FRAME_FOLDERS]  # last: a .sens has more frames
    for root in filter(None, (scans, *beside, scans.parent / "Tasks", splits)):  # of lists, the last counts
        for place, inside, names in os.walk(root, followlinks=True):
            files |= {name: Path(place, name) for name in names if name.startswith("scannetv2")}
            for name in filter(SCENE_NAME.fullmatch, inside):
                folders.setdefault(name, []).append(Path(place, name))
            deep = len(Path(place).relative_to(root).parts) >= 4
            inside[:] = sorted((name for name in inside if not (deep or SCENE_NAME.fullmatch(name))),
                               key=lambda name: (name in FRAME_FOLDERS, name))
    return folders, files


def _mesh_of(folders):
    """The first of the folders of one scan that holds its mesh, or None."""
    return next((folder for folder in folders if (folder / f"{folder.name}_vh_clean_2.ply").is_file()), None)


def _in_parallel(jobs, workers):
    """Run _make_scene on each of the jobs in processes; yields what it returns."""
    with tqdm(total=len(jobs), desc="scans", unit="scan", disable=not jobs) as bar:
        if workers <= 1:
            for job in jobs:
                yield _make_scene(*job)
                bar.update()
            return
        pool = ProcessPoolExecutor(workers, initializer=signal.signal,  # Ctrl-C ends a worker without a word
                                   initargs=(signal.SIGINT, signal.SIG_DFL))
        try:
            for future in as_completed([pool.submit(_make_scene, *job) for job in jobs]):
                yield future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_scene(scene, folders, every, ids_200, frames_only):
    """Write a scene, or its frames, beside its place and rename it there: whole or not at all.

    Returns (scene, reason why it was skipped or None, remark or None).
    """
    part, note = scene.parent.parent / ".unfinished" / f"{scene.name}_{os.getpid()}", None
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        if there := [name for name in FRAME_PARTS if (scene / name).exists()]:
            raise ValueError(f"{scene} holds {there[0]}/ without pose/; move it away first")
        if frames_only:
            axis, note = _axis_of_points(scene, _mesh_of(folders))
        else:
            arrays, axis = read_scan(_mesh_of(folders), scene.parent.name != "test", ids_200)
            for name, array in arrays.items():
                np.save(part / f"{name}.npy", array)
        count = write_frames(part, folders, every, axis)
        if not frames_only:
            part.rename(scene)
        elif count is None:
            raise ValueError("no .sens, no color/ and pose/ and no scannet_frames_25k of this scan")
        else:
            for name in FRAME_PARTS:
                (part / name).rename(scene / name)
        return scene, None, note if count else "no frames" if count is None else "no usable frame"
    except (OSError, ValueError) as error:
        return scene, str(error), None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _axis_of_points(scene, folder):
    """axisAlignment if the points of a prepared scene had it applied, else identity (as Pointcept leaves them)."""
    if folder is None:
        return np.eye(4), "no mesh to compare with: points taken as not axis-aligned, as Pointcept stores them"
    try:
        with np.errstate(all="ignore"):  # mapped, so that NumPy looks at the file's size before it takes memory
            coord = np.load(scene / "coord.npy", mmap_mode="r", allow_pickle=False).astype(np.float64)
    except Exception as error:  # a damaged header makes NumPy raise nearly anything
        raise fault(scene / "coord.npy", "an array (N, 3)", error) from None
    mesh = read_ply(folder / f"{folder.name}_vh_clean_2.ply")["coord"]
    axis = _axis_alignment(folder / f"{folder.name}.txt")
    for matrix in (np.eye(4), axis):
        if coord.shape == mesh.shape and np.abs(mesh @ matrix[:3, :3].T + matrix[:3, 3] - coord).max() < 1e-3:
            return matrix, None
    raise fault(scene / "coord.npy", "the vertices of the scan's mesh, axis-aligned or not", f"others, {coord.shape}")


# --------------------------------------------------------------------------------------------------------- submission


def submit(checkpoint, data, split, out, device="cpu"):
    """Label the scenes of a split and write what the benchmark takes: <out>/semantic.zip and instance.zip.

    Returns a list of the .zip files written; instance.zip only if the model finds any instance.
    Raises FileNotFoundError, ValueError: a scene of the split is missing or a file has not a line for each vertex.
    """
    from predict import open_checkpoint, predict_scene  # spconv and open_clip, not needed to prepare

    data, out = Path(data), Path(out)
    listed = data / f"scannetv2_{split}.txt"
    names = read_split(listed) if listed.is_file() else sorted(p.parent.name for p in data.glob(f"{split}/*/coord.npy"))
    missing = [name for name in names if not (data / split / name / "coord.npy").is_file()]
    if missing or not names:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} scenes of the split are not in {data / split}, "
                                f"first {', '.join(missing[:3]) or 'none'}; python scannet.py SCANS --out {data}")
    model, config = open_checkpoint(checkpoint, device)
    (out / "semantic").mkdir(parents=True, exist_ok=True)
    semantic, instance, found = {}, {}, 0  # dict file -> number of lines that it must have
    for name in tqdm(names, desc="scenes", unit="scene"):
        scene, prediction = predict_scene(model, config, data / split / name, device)
        path, count = out / "semantic" / f"{name}.txt", len(scene["coord"])
        np.savetxt(path, np.array(NYU40_IDS)[prediction["labels"]], "%d")
        semantic[path] = count
        things = np.flatnonzero(~np.isin(prediction["classes"], STUFF))
        instance |= write_instances(out / "instance", name, count, [prediction["members"][i] for i in things],
                                    prediction["classes"][things], prediction["scores"][things])
        found += len(things)
    if not found:
        print("the model finds no instances: semantic files only")
    return [_zip_checked(files) for files in ((semantic, instance) if found else (semantic,))]


def write_instances(folder, name, count, members, classes, scores):
    """Write the instances of one scene as the benchmark takes them.

    Args:
        folder:  of the submission; gets <name>.txt and predicted_masks/<name>_000.txt, ...
        count:   N, vertices of the scene.  members: P arrays of vertex indices, or P masks (N,) bool.
        classes: (P,) index in data.CLASS_NAMES, not wall or floor.  scores: (P,) finite.

    Returns:
        dict file -> number of lines that it must have, the list of the scene first.
    """
    (folder / "predicted_masks").mkdir(parents=True, exist_ok=True)
    files, lines = {folder / f"{name}.txt": len(members)}, []
    for i, (rows, label, score) in enumerate(zip(members, classes, scores, strict=True)):
        path = folder / "predicted_masks" / f"{name}_{i:03d}.txt"
        text = np.tile(np.frombuffer(b"0\n", np.uint8), (count, 1))
        text[rows, 0] = ord("1")
        path.write_bytes(text.tobytes())
        files[path] = count
        lines.append(f"{path.relative_to(folder)} {NYU40_IDS[label]} {score:.6f}\n")
    (folder / f"{name}.txt").write_text("".join(lines))
    return files


def _zip_checked(files):
    """Pack files (dict file -> number of lines, the first in the folder to pack) once each has its lines."""
    for path, count in files.items():
        with path.open("rb") as stream:
            found = sum(1 for _ in stream)
        if found != count:
            raise fault(path, f"{count} lines", found)
    folder = next(iter(files)).parent
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.relative_to(folder))
    return folder.with_suffix(".zip")


# --------------------------------------------------------------------------------------------------------- commands


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    submitting = argv[:1] == ["submit"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="scannet.py submit" if submitting else "scannet.py")
    add = parser.add_argument
    if submitting:
        add("checkpoint", help="stage3.pt, best.pt, ... of a run")
        add("--data", default="data/scannet", help="prepared data set (default %(default)s)")
        add("--split", choices=("val", "test"), default="test", help="(default %(default)s)")
        add("--out", default="submission", help="folder for the files (default %(default)s)")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    else:
        add("scans", help="folder of the ScanNet download, or scans/ in it")
        add("--out", default="data/scannet", help="folder of the data set (default %(default)s)")
        add("--frames", type=int, default=20, metavar="K", dest="every", help="every K-th frame (default %(default)s)")
        add("--splits", help="folder of scannetv2_{train,val,test}.txt; default: in the download")
        add("--workers", type=int, help="processes; default: one a CPU core")
        add("--frames-only", action="store_true", help="add frames to the scenes in --out, such as Pointcept's")
    args = parser.parse_args(argv[1:] if submitting else argv)
    try:
        if submitting:
            print("written:", *submit(**vars(args)))
            return
        result = prepare(**vars(args))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
    except (OSError, ValueError, BrokenExecutor) as error:
        sys.exit(f"error: {error}")
    for kind, word in (("notes", ""), ("skipped", "skipped ")):
        for reason in sorted(set(result[kind].values())):
            names = sorted(name for name, other in result[kind].items() if other == reason)
            print(f"{word}{', '.join(names)}: {reason}")
    print(f"{args.out}: {result['made']} scenes made, {result['there']} were there, {len(result['skipped'])} skipped, "
          f"{result['absent']} scans not found")
    if result["made"] + result["there"] == 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
