"""Official ScanNet files -> scene folders of data.py; a checkpoint -> the benchmark's submission files.

    python scannet.py SCANS --out data/scannet                       # points, labels and every 20th frame
    python scannet.py SCANS --out data/scannet --frames-only         # frames beside a ScanNet that Pointcept prepared
    python scannet.py submit runs/bifusion/best.pt --data data/scannet --split val --out submission

SCANS is the download's folder, or scans/ in it. A scan that cannot be read is listed with the reason and the others go
on; after Ctrl-C or a fault the same command goes on where it stopped. Frames come from the .sens, from exported
color/ depth/ pose/ intrinsic/, or from scannet_frames_25k. Images are stored as they were recorded, byte for byte.

Files may be damaged in any way: a number that says how much follows is compared with what is there before it is
used, so that a fault is one ValueError that names the file, and reading takes no more memory than about twice the file.

Frame: metres, +z up, axisAlignment applied to points and poses alike.
Format: github.com/ScanNet/ScanNet (README, SensReader, BenchmarkScripts), MIT; the data has its own terms of use.
"""

import argparse
import errno
import io
import itertools
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import CLASS_NAMES, IGNORE, NYU40_IDS

SPLITS = ("train", "val", "test")
SCENE_NAME = re.compile(r"scene\d{4}_\d\d")
LABEL_TABLE = "scannetv2-labels.combined.tsv"
FRAME_FOLDERS = ("scannet_frames_25k", "scannet_frames_test")
DEPTH_MODES = ("I;16", "I")  # of a PNG with one channel of 16 bit
STUFF = [CLASS_NAMES.index(name) for name in ("wall", "floor")]  # classes that are no instances
SCANNET200_IDS = [i for first, last in re.findall(r"(\d+)-?(\d*)", (  # of the column "id" in LABEL_TABLE, inclusive
    "1-11 13-19 21-24 26-29 31-36 38-42 44-52 54-59 62-80 82 84 86-90 93 95-107 110 112 115-116 118 120-122 125 128 "
    "130-132 134 136 138-141 145 148 154-157 159 161 163 165-166 168-170 177 180 185 188 191 193 195 202 208 213-214 "
    "221 229-230 232-233 242 250 261 264 276 283 286 300 304 312 323 325 331 342 356 370 392 395 399 408 417 488 540 "
    "562 570 572 581 609 748 776 1156 1163-1176 1178-1191")) for i in range(int(first), int(last or first) + 1)]

# -------------------------------------------------------------------------------------------------------- .ply

PLY_TYPES = {name: code for code, names in {
    "i1": "char int8", "u1": "uchar uint8", "i2": "short int16", "u2": "ushort uint16", "i4": "int int32",
    "u4": "uint uint32", "f4": "float float32", "f8": "double float64"}.items() for name in names.split()}
PLY_COLUMNS = {  # what a vertex holds -> the names it goes by
    "coord": ("x y z",), "normal": ("nx ny nz", "normal_x normal_y normal_z"), "label": ("label",),
    "color": ("red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue")}
PLY_CORNERS = ("vertex_indices", "vertex_index")
CHUNK = 2**14  # rows converted at a time
LINE = 2**20  # most characters of a line of text


def read_ply(path):
    """Read the points and triangles of a .ply, ascii or binary of either byte order; extra properties are ignored.

    Colours that are floats up to 1 or integers of 16 bit are scaled to 0..255; polygons are cut into triangles.

    Returns:
        dict: coord (N, 3) f32, f64 where the file has doubles; color (N, 3) u8, normal (N, 3) f32, label (N,) integer,
        faces (F, 3) integer; each of the last four is None where the file has none.

    Raises:
        FileNotFoundError; ValueError: the file is no .ply, is shorter than its header says, or holds numbers that are
        not finite; the message names the file, what was expected and what was found.

    Source: Turk, The PLY Polygon File Format (1994).
    """
    with open(path, "rb") as file:
        encoding, elements, start = _ply_header(path, file)
        vertices = next((count for name, count, _ in elements if name == "vertex"), 0)
        if vertices == 0:
            raise _fault(path, "at least one vertex", "none")
        body = _AsciiBody(path, file, start) if encoding == "ascii" else _BinaryBody(path, start, encoding)
        out = {"faces": None}
        for name, count, properties in elements:
            corners = next((i for i, (key, code, list_code) in enumerate(properties)
                            if name == "face" and key in PLY_CORNERS and list_code and code[0] != "f"), None)
            least = body.least_bytes(count, properties)
            if least > body.bytes_left():
                raise _fault(path, f"{count} rows of {name}, at least {least} bytes", f"{body.bytes_left()} bytes")
            if name == "vertex" and "coord" not in out:
                out.update(_ply_vertices(path, count, properties, body))
            elif corners is not None:
                out["faces"] = _ply_faces(path, count, properties, corners, body, vertices)
                if "coord" in out:
                    break  # nothing behind it is needed
            elif properties:
                has_list = any(list_code for _, _, list_code in properties)
                for _ in body.rows(count, properties) if has_list else body.chunks(count, properties):
                    pass
    return out


def _fault(path, expected, found):
    """The one form of an error about a file."""
    return ValueError(f"{path}: expected {expected}, found {found}")


def _ply_header(path, file):
    """'ascii', '<' or '>'; list of (name, count, [(property, NumPy type, type of a list's length or None)]); bytes."""
    head = file.read(2**16)
    end = re.search(rb"\nend_header *(\r?\n)|\rend_header *\r", head)  # a file has one kind of line ends
    if not re.match(rb"ply *[\r\n]", head) or not end:
        raise _fault(path, "a header from 'ply' to 'end_header'", repr(head[:20]) if head else "an empty file")
    encoding, elements = None, []
    for line in re.split(r"[\r\n]+", head[:end.start()].decode("latin-1"))[1:]:
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                continue
            case ["format", "ascii" | "binary_little_endian" | "binary_big_endian" as word, "1.0"]:
                encoding = {"ascii": "ascii", "binary_little_endian": "<", "binary_big_endian": ">"}[word]
            case ["element", name, count] if re.fullmatch("[0-9]{1,20}", count):
                elements.append((name, int(count), []))
            case ["property", kind, name] if elements and kind in PLY_TYPES:
                elements[-1][2].append((name, PLY_TYPES[kind], None))
            case ["property", "list", length, kind, name] if (
                    elements and kind in PLY_TYPES and PLY_TYPES.get(length, "f")[0] != "f"):
                elements[-1][2].append((name, PLY_TYPES[kind], PLY_TYPES[length]))
            case _:
                raise _fault(path, "a line of a .ply header", repr(line[:80]))
    if encoding is None:
        raise _fault(path, "a line 'format ascii|binary_little_endian|binary_big_endian 1.0'", "none in its header")
    return encoding, elements, end.end()


class _BinaryBody:
    """What follows the header of a binary .ply."""

    def __init__(self, path, start, order):
        self.path, self.at, self.order = path, start, order
        self.data = np.memmap(path, np.uint8, "r")

    def bytes_left(self):
        return len(self.data) - self.at

    @staticmethod
    def least_bytes(count, properties):
        return count * sum(np.dtype(list_code or code).itemsize for _, code, list_code in properties)

    def chunks(self, count, properties):
        """Rows without lists, as structured arrays with the fields f0, f1, ..."""
        table = self._table(count, [(f"f{i}", self.order + code) for i, (_, code, _) in enumerate(properties)])
        self.at += table.nbytes
        for start in range(0, count, CHUNK):
            yield table[start : start + CHUNK]

    def rows(self, count, properties):
        """Rows of any kind one by one: a list of one array a property."""
        for _ in range(count):
            row = []
            for name, code, list_code in properties:
                length = int(self._take(1, list_code, name)[0]) if list_code else 1
                row.append(self._take(length, code, name))
            yield row

    def uniform_lists(self, count, properties, wanted):
        """The lists (count, k) of one property if they and all others are of one length, else None and no move."""
        start = self.at
        first = next(self.rows(1, properties))
        self.at, fields = start, []
        for i, ((_, code, list_code), value) in enumerate(zip(properties, first)):
            fields += [(f"n{i}", self.order + list_code)] if list_code else []
            fields += [(f"f{i}", self.order + code, (len(value),))]
        if max(map(len, first)) > 64 or count * np.dtype(fields).itemsize > self.bytes_left():
            return None
        table = self._table(count, fields)
        if any((table[f"n{i}"] != len(value)).any() for i, value in enumerate(first) if properties[i][2]):
            return None
        self.at += table.nbytes
        return table[f"f{wanted}"]

    def _table(self, count, fields):
        return np.ndarray(count, np.dtype(fields), self.data, self.at)

    def _take(self, length, code, name):
        size = length * np.dtype(code).itemsize
        if not 0 <= size <= self.bytes_left():
            raise _fault(self.path, f"{length} numbers of {name}", f"{self.bytes_left()} bytes")
        self.at += size
        return np.ndarray(length, self.order + code, self.data, self.at - size)


class _AsciiBody:
    """What follows the header of an ascii .ply; methods as of _BinaryBody."""

    def __init__(self, path, file, start):
        self.path, self.size, self.used = path, os.path.getsize(path), start
        file.seek(start)
        self.text = io.TextIOWrapper(file, "latin-1")

    def bytes_left(self):
        return self.size - self.used + 1  # the last number may stand without a line end

    @staticmethod
    def least_bytes(count, properties):
        return 2 * count * len(properties)

    def _lines(self, count):
        for i in range(count):
            line = self.text.readline(LINE)
            if not line.strip() or len(line) == LINE:
                raise _fault(self.path, f"{count} lines of numbers", f"{line[:20]!r} as number {i + 1}")
            self.used += len(line)
            yield line

    def chunks(self, count, properties):
        dtype = np.dtype([(f"f{i}", code) for i, (_, code, _) in enumerate(properties)])
        lines = self._lines(count if properties else 0)
        while part := list(itertools.islice(lines, CHUNK)):
            yield self._table(part, dtype)

    def _table(self, lines, dtype):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # 255.0 for an integer
                return np.loadtxt(lines, dtype, comments=None, ndmin=1)
        except (ValueError, OverflowError) as error:
            raise _fault(self.path, f"{len(dtype)} numbers a line", error) from None

    def rows(self, count, properties):
        for line in self._lines(count):
            words, row = iter(line.split()), []
            try:
                for _, code, list_code in properties:
                    length = int(next(words)) if list_code else 1
                    row.append(np.array(list(itertools.islice(words, length)), code))
                    if len(row[-1]) != length:
                        raise ValueError
            except (ValueError, OverflowError, StopIteration):
                raise _fault(self.path, "a list of numbers with its length before it", repr(line[:60])) from None
            yield row

    def uniform_lists(self, count, properties, wanted):
        return None


def _ply_vertices(path, count, properties, body):
    """coord, color, normal, label as read_ply returns them."""
    names = [name for name, _, _ in properties]
    if any(list_code for _, _, list_code in properties) or len(set(names)) < len(names):
        raise _fault(path, "vertex properties of one number each and different names", ", ".join(names))
    out, columns = dict.fromkeys(PLY_COLUMNS), {}
    for key, choices in PLY_COLUMNS.items():
        for choice in choices:
            if key not in columns and set(choice.split()) <= set(names):
                columns[key] = [names.index(name) for name in choice.split()]
                kind = np.result_type(*(properties[i][1] for i in columns[key]))
                if key in ("coord", "normal"):
                    kind = np.float64 if kind.itemsize > 4 and key == "coord" else np.float32
                out[key] = np.empty((count, len(columns[key])), kind)
    if out["coord"] is None:
        raise _fault(path, "vertex properties x y z", ", ".join(names) or "none")
    done = 0
    for rows in body.chunks(count, properties):
        for key, indices in columns.items():
            for j, i in enumerate(indices):
                out[key][done : done + len(rows), j] = rows[f"f{i}"]
        done += len(rows)
    for key, what in (("coord", "coordinates"), ("color", "colours"), ("label", "labels")):
        broken = 0 if out[key] is None else int((~np.isfinite(out[key])).any(1).sum())
        if broken:
            raise _fault(path, f"finite {what}", f"{broken} of {count} vertices without")
    if out["color"] is not None:
        out["color"] = _to_bytes(path, out["color"])
    if out["normal"] is not None:
        np.nan_to_num(out["normal"], copy=False, posinf=0, neginf=0)
    if out["label"] is not None:
        out["label"] = out["label"][:, 0]
        if out["label"].dtype.kind == "f":
            out["label"] = out["label"].clip(-1, 2**30).astype(np.int32)
    return out


def _to_bytes(path, color):
    """Colours (N, 3) of any number type -> 0..255 u8."""
    if color.dtype == np.uint8:
        return color
    low, high = color.min(), color.max()
    is_float = color.dtype.kind == "f"
    if low < 0 or high > (255 if is_float else 65535):
        raise _fault(path, "colours in 0..1, 0..255 or 0..65535", f"{low}..{high}")
    scale = 255 if is_float and high <= 1 else 1 / 257 if high > 255 else 1
    out = np.empty(color.shape, np.uint8)
    for start in range(0, len(color), CHUNK):
        out[start : start + CHUNK] = np.rint(color[start : start + CHUNK] * scale)
    return out


def _ply_faces(path, count, properties, corners, body, vertices):
    """Triangles (F, 3), or None where there are none; corners is the property to read."""
    def cut(polygons):  # (n, k) -> (n, k - 2, 3), fans about the first corner
        triangles = np.empty((len(polygons), max(polygons.shape[1] - 2, 0), 3), properties[corners][1])
        triangles[..., 0], triangles[..., 1], triangles[..., 2] = polygons[:, :1], polygons[:, 1:-1], polygons[:, 2:]
        return triangles

    polygons = body.uniform_lists(count, properties, corners) if count else np.empty((0, 3))
    if polygons is not None:
        faces = cut(polygons).reshape(-1, 3)
    else:
        data = bytearray()
        for row in body.rows(count, properties):
            data += cut(row[corners][None]).tobytes()
        faces = np.frombuffer(data, properties[corners][1]).reshape(-1, 3)
    if len(faces) and (faces.min() < 0 or faces.max() >= vertices):
        raise _fault(path, f"faces of vertices 0..{vertices - 1}", f"{faces.min()}..{faces.max()}")
    return faces if len(faces) else None


def vertex_normals(coord, faces):
    """Mean normal of the triangles at each vertex, weighted by their area: (N, 3) f32 unit, 0 where there is none."""
    a, b, c = (coord[faces[:, i]].astype(np.float64) for i in range(3))
    area = np.cross(b - a, c - a)  # (F, 3), twice the area long
    total = sum(np.stack([np.bincount(faces[:, i], area[:, j], len(coord)) for j in range(3)], 1) for i in range(3))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return (total / np.where(length > 0, length, 1)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- .sens

SENS_HEADER = struct.Struct("<64f ii IIII f Q")
SENS_FRAME = struct.Struct("<16f QQ QQ")
MAX_PIXELS = 2**22  # of an image; ScanNet's have 1296x968


def read_sens(path, every=1):
    """Open a .sens and walk through every k-th frame; the others are passed over without reading their images.

    Frames whose pose is not finite (tracking lost) are left out.

    Args:
        path:  the file.  every: k; frames 0, k, 2k, ... are given.

    Returns:
        header: dict, intrinsics_color and intrinsics_depth (4, 4) pixels, color_size and depth_size (W, H),
                suffix of the colour images (.jpg or .png), frame_count, and what _sens_header adds.
        frames: generator of (index int, camera_to_world (4, 4) f64, color bytes: an image file of that suffix,
                depth (H, W) u16, mm, 0 = no reading).

    Raises:
        ValueError: the file is truncated or damaged, or packs its images in a way that ScanNet does not use; also
            while the frames are walked through.

    Source: ScanNet's SensReader, version 4.
    """
    header = _sens_header(path)
    return header, _sens_frames(path, header, every)


def _sens_header(path):
    """As read_sens, and for _sens_frames: start, size of the file, packing of colour and depth, depth unit."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        version, name_length = struct.unpack("<IQ", _take(path, file, size, 12, "header"))
        if version != 4:
            raise _fault(path, "a .sens of version 4", f"version {version}")
        if name_length > size - 12:
            raise _fault(path, f"a sensor name of {name_length} bytes", f"{size - 12} bytes")
        file.seek(name_length, os.SEEK_CUR)
        *matrices, color, depth, cw, ch, dw, dh, unit, count = SENS_HEADER.unpack(
            _take(path, file, size, SENS_HEADER.size, "header"))
        start = file.tell()
    if color not in (0, 1, 2) or depth not in (0, 1):
        raise _fault(path, "colour packed as 0, 1 or 2 and depth as 0 or 1", f"{color} and {depth}")
    if not (0 < cw * ch <= MAX_PIXELS and 0 < dw * dh <= MAX_PIXELS and 0 < unit < 1e9):
        raise _fault(path, f"images of 1..{MAX_PIXELS} pixels and a depth unit", f"{cw}x{ch}, {dw}x{dh} and {unit}")
    if count * SENS_FRAME.size > size - start:
        raise _fault(path, f"{count} frames", f"{size - start} bytes")
    intrinsics_color, _, intrinsics_depth, _ = np.array(matrices).reshape(4, 4, 4)
    return {"intrinsics_color": intrinsics_color, "intrinsics_depth": intrinsics_depth, "color_size": (cw, ch),
            "depth_size": (dw, dh), "frame_count": count, "suffix": ".jpg" if color == 2 else ".png",
            "start": start, "file_size": size, "packing": (color, depth), "unit": unit}


def _sens_frames(path, header, every):
    """The generator of read_sens."""
    size, (color_packing, depth_packing) = header["file_size"], header["packing"]
    (cw, ch), (dw, dh) = header["color_size"], header["depth_size"]
    with open(path, "rb", buffering=0) as file:  # a buffer would read 8 KB of each frame that is passed over
        file.seek(header["start"])
        for index in range(header["frame_count"]):
            what = f"{path}, frame {index}"
            *pose, _, _, color_bytes, depth_bytes = SENS_FRAME.unpack(
                _take(what, file, size, SENS_FRAME.size, "header"))
            if color_bytes + depth_bytes > size - file.tell():
                raise _fault(what, f"{color_bytes + depth_bytes} bytes of images", f"{size - file.tell()} bytes")
            pose = np.array(pose).reshape(4, 4)
            if index % every or not np.isfinite(pose).all():
                file.seek(color_bytes + depth_bytes, os.SEEK_CUR)
                continue
            color, depth = file.read(color_bytes), file.read(depth_bytes)
            if color_packing == 0:
                if len(color) != cw * ch * 3:
                    raise _fault(what, f"{cw * ch * 3} bytes of colour", len(color))
                color = _png(Image.frombytes("RGB", (cw, ch), color))
            depth = _unzip(what, depth, dw * dh * 2) if depth_packing == 1 else depth
            if len(depth) != dw * dh * 2:
                raise _fault(what, f"{dw * dh * 2} bytes of depth", len(depth))
            depth = np.frombuffer(depth, "<u2").reshape(dh, dw)
            if header["unit"] != 1000:
                depth = np.rint(depth * np.float32(1000 / header["unit"])).clip(0, 65535).astype(np.uint16)
            yield index, pose, color, depth


def _take(what, file, size, count, part):
    """The next bytes of a file of this size."""
    if count > size - file.tell():
        raise _fault(what, f"{count} bytes of {part} at byte {file.tell()}", f"{size - file.tell()} bytes")
    return file.read(count)


def _unzip(what, data, size):
    """zlib data that must unpack to this size; never unpacks more than that."""
    unpacker = zlib.decompressobj()
    try:
        out = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise _fault(what, "depth packed by zlib", error) from None
    if not unpacker.eof or len(out) != size:
        raise _fault(what, f"{size} bytes of depth", f"{'more' if len(out) > size else len(out)}")
    return out


def _png(image):
    out = io.BytesIO()
    image.save(out, "PNG", compress_type=zlib.Z_RLE)  # depth is smooth and noisy: a seventh of the time, 4 % more
    return out.getvalue()


# ------------------------------------------------------------------------------------------- .json, .txt, images


def _read_json(path):
    """A .json whose lists of whole numbers are NumPy arrays, read piece by piece: [1, 2] -> array([1, 2], int32)."""
    arrays = []

    def keep(match):
        if len(arrays) == 2**16:
            raise _fault(path, f"at most {2**16} lists of numbers", "more")
        arrays.append(_integers(path, data, *match.span(1)))
        return b'{"array": %d}' % (len(arrays) - 1)

    if os.path.getsize(path) == 0:
        raise _fault(path, "JSON", "an empty file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        skeleton = re.sub(rb"\[(\s*\d[\d\s,]*)\]", keep, data)
    if len(skeleton) > 2**20:
        raise _fault(path, "lists of whole numbers and at most 1 MB around them", f"{len(skeleton)} bytes")
    try:
        content = json.loads(skeleton, object_hook=lambda d: arrays[d["array"]] if d.keys() == {"array"} else d)
    except (ValueError, RecursionError, IndexError, TypeError) as error:
        raise _fault(path, "JSON", error) from None
    if not isinstance(content, dict):
        raise _fault(path, "a JSON object", type(content).__name__)
    return content


def _integers(path, data, start, end):
    """The whole numbers in data[start:end] with commas between: (n,) int32."""
    cuts = [start]
    while cuts[-1] < end:
        comma = data.find(b",", min(cuts[-1] + 2**16, end), end)
        cuts.append(end if comma < 0 else comma + 1)
    pieces = list(itertools.pairwise(cuts))
    values = np.empty(sum(data[a:b].count(b",") for a, b in pieces) + 1, np.int32)
    done = 0
    for a, b in pieces:
        piece = data[a:b]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                numbers = np.fromstring(piece.rstrip(b", \t\r\n"), np.int32, sep=",")
            if re.search(rb"\d{10}", piece):
                raise ValueError("a number of more than 9 digits")
            values[done : done + len(numbers)] = numbers
        except (ValueError, DeprecationWarning) as error:
            raise _fault(path, "whole numbers with commas between", error) from None
        done += len(numbers)
    if done != len(values):
        raise _fault(path, f"{len(values)} whole numbers", done)
    return values


def _read_text(path):
    """A small text file."""
    with open(path, "rb") as file:
        text = file.read(LINE)
    if len(text) == LINE:
        raise _fault(path, "a small text file", "1 MB or more")
    return text.decode("utf-8", "replace")


def _matrix(path, words):
    """16 words -> (4, 4) f64."""
    try:
        return np.array([float(word) for word in words]).reshape(4, 4)
    except ValueError:
        raise _fault(path, "16 numbers", repr(" ".join(words)[:60])) from None


def _axis_alignment(path):
    """axisAlignment (4, 4) of a scan's .txt; identity where it has none."""
    for line in _read_text(path).splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            matrix = _matrix(path, value.split())
            turn = matrix[:3, :3]
            if not (np.isfinite(matrix).all() and np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3):
                raise _fault(path, "a rotation and a shift as axisAlignment", matrix.tolist())
            return matrix
    if "=" not in _read_text(path):
        raise _fault(path, "lines of 'key = value'", "none")
    return np.eye(4)


def _image_size(what, data, formats, modes=None):
    """(W, H) of an image file given as bytes; reads it as far as is needed to see that it is whole."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            size, mode = image.size, image.mode
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{size[0]}x{size[1]} pixels, more than {MAX_PIXELS}")
            if image.format == "JPEG":
                image.draft(None, (1, 1))  # an eighth of the size: enough to see that it is whole
                image.load()
            else:
                image.verify()  # the check sums of a PNG
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise _fault(what, "a whole " + " or ".join(formats), error) from None
    if modes and mode not in modes:
        raise _fault(what, f"an image of mode {modes[0]}", mode)
    return size


# ------------------------------------------------------------------------------------------------ one scan


def read_scan(folder, labelled, ids_200=None):
    """The points and labels of one scan.

    Args:
        folder:   holds <name>_vh_clean_2.ply, <name>.txt and, if labelled, <name>_vh_clean_2.labels.ply,
                  <name>_vh_clean_2.0.010000.segs.json and <name>.aggregation.json; name is the folder's.
        labelled: False for the test scans, which have the first two.
        ids_200:  dict raw category -> id of ScanNet200, or None for 20 classes alone.

    Returns:
        dict of the arrays of a scene folder: coord, color, normal (if the mesh has faces), superpoint (if segmented),
        segment20, segment200 (if ids_200) and instance (if labelled; groups of which most is wall or floor are none);
        axisAlignment (4, 4), applied to coord.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, damaged or of another scan.
    """
    stem = Path(folder, Path(folder).name)
    mesh_file = Path(f"{stem}_vh_clean_2.ply")
    mesh, axis = read_ply(mesh_file), _axis_alignment(f"{stem}.txt")
    if mesh["color"] is None:
        raise _fault(mesh_file, "vertex properties red green blue", "none")
    n = len(mesh["coord"])
    if np.abs(mesh["coord"]).max() > 1e4:
        raise _fault(mesh_file, "coordinates in metres, below 10 km", f"{np.abs(mesh['coord']).max():.3g}")
    coord = mesh["coord"] @ axis[:3, :3].T + axis[:3, 3]  # f64
    scene = {"coord": coord.astype(np.float32), "color": mesh["color"]}
    if mesh["faces"] is not None:
        scene["normal"] = vertex_normals(coord, mesh["faces"])
    segments_file = Path(f"{stem}_vh_clean_2.0.010000.segs.json")
    if labelled or segments_file.exists():
        segments = _read_json(segments_file).get("segIndices")
        if not isinstance(segments, np.ndarray) or len(segments) != n:
            raise _fault(segments_file, f"segIndices of {n} vertices",
                         f"{len(segments)} of them" if isinstance(segments, np.ndarray) else "none")
        segment_ids, superpoint = np.unique(segments, return_inverse=True)
        scene["superpoint"] = superpoint.astype(np.int32)
    if labelled:
        label_file, groups_file = Path(f"{stem}_vh_clean_2.labels.ply"), Path(f"{stem}.aggregation.json")
        label = read_ply(label_file)["label"]
        if label is None or len(label) != n:
            raise _fault(label_file, f"labels of {n} vertices", "none" if label is None else len(label))
        class_of = np.full(41, IGNORE, np.int32)
        class_of[list(NYU40_IDS)] = np.arange(len(NYU40_IDS))
        scene["segment20"] = class_of[np.where((label >= 0) & (label <= 40), label, 0)]  # 50 and 149 occur
        owner, categories = _group_of_segment(groups_file, segment_ids)
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
        raise _fault(path, "segGroups", "none")
    owner, categories = np.full(len(segment_ids), -1), []
    for row, group in enumerate(groups):
        segments = group.get("segments") if isinstance(group, dict) else None
        if not isinstance(segments, np.ndarray | list) or (isinstance(segments, list) and segments):
            raise _fault(path, "a list of segment ids in each of segGroups", f"{str(group)[:60]} as number {row + 1}")
        known = np.isin(segment_ids, segments)
        if len(segments) and not known.any():
            raise _fault(path, "segments of the scan's segs.json", f"none in group {row + 1}; is it another mesh's?")
        owner[known] = row  # the last group wins
        categories.append(str(group.get("label")))
    return owner, categories


def read_categories(path):
    """scannetv2-labels.combined.tsv -> dict raw category -> id of ScanNet200."""
    rows = [line.split("\t") for line in _read_text(path).splitlines()]
    if not rows or not {"id", "raw_category"} <= set(rows[0]):
        raise _fault(path, "a table with the columns id and raw_category", str(rows[:1])[:80])
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
        if sens.is_file():
            cameras, frames = _frames_of_sens(sens, every)
            break
        if (folder / "pose").is_dir() and (folder / "color").is_dir():
            cameras, frames = _exported_frames(folder, every)
            break
    else:
        return None
    for name in ("color", "depth", "pose", "intrinsic"):
        (target / name).mkdir(parents=True)
    count = 0
    for index, pose, color, suffix, depth in frames:
        (target / "color" / f"{index}{suffix}").write_bytes(color)
        (target / "depth" / f"{index}.png").write_bytes(depth)
        np.savetxt(target / "pose" / f"{index}.txt", axis @ pose, fmt="%.9g")
        count += 1
    for name, matrix in cameras.items():
        np.savetxt(target / "intrinsic" / f"intrinsic_{name}.txt", matrix, fmt="%.9g")
    return count


def _frames_of_sens(path, every):
    """cameras, dict of the two intrinsics; generator of (index, pose, color bytes, suffix, depth .png bytes)."""
    header, frames = read_sens(path, every)

    def packed():
        for index, pose, color, depth in frames:
            what = f"{path}, frame {index}"
            if (size := _image_size(what, color, ["JPEG", "PNG"])) != header["color_size"]:
                raise _fault(what, f"colour of {header['color_size']}", size)
            yield index, pose, color, header["suffix"], _png(Image.fromarray(depth))

    return _cameras(path, header["intrinsics_color"], header["intrinsics_depth"], header["color_size"],
                    header["depth_size"]), packed()


def _exported_frames(folder, every):
    """As _frames_of_sens, from color/ depth/ pose/ with names like 120.txt, or 000120.txt in scannet_frames_25k."""
    exported = (folder / "intrinsic").is_dir()
    names = [folder / "intrinsic" / f"intrinsic_{c}.txt" if exported else folder / f"intrinsics_{c}.txt"
             for c in ("color", "depth")]
    stems = {int(path.stem): path.stem for path in (folder / "pose").glob("*.txt") if path.stem.isdecimal()}
    files = {}
    for index in sorted(stems):
        color = [folder / "color" / (stems[index] + suffix) for suffix in (".jpg", ".png")]
        color, depth = next(filter(Path.exists, color), None), folder / "depth" / f"{stems[index]}.png"
        if color and depth.exists() and not (exported and index % every):
            files[index] = color, depth, folder / "pose" / f"{stems[index]}.txt"
    if not files:
        return {}, ()

    def images(color, depth):
        data = color.read_bytes(), depth.read_bytes()
        return *data, (_image_size(color, data[0], ["JPEG", "PNG"]), _image_size(depth, data[1], ["PNG"], DEPTH_MODES))

    *_, sizes = images(*next(iter(files.values()))[:2])

    def read():
        for index, (color, depth, pose) in files.items():
            matrix = _matrix(pose, _read_text(pose).split())
            if np.isfinite(matrix).all():
                *data, found = images(color, depth)
                if found != sizes:
                    raise _fault(color, f"sizes of colour and depth as in the first frame, {sizes}", found)
                yield index, matrix, data[0], color.suffix, data[1]

    first = _matrix(names[0], _read_text(names[0]).split())
    second = _matrix(names[1], _read_text(names[1]).split()) if names[1].exists() else None
    return _cameras(names[0], first, second, *sizes), read()


def _cameras(path, color, depth, color_size, depth_size):
    """Intrinsics (4, 4) of both cameras for the images as they are; those of depth follow from colour if None."""
    if depth is None:
        depth = _resized(path, color, color_size)
        scale = np.array(depth_size) / color_size
        depth[[0, 1], [0, 1]] *= scale
        depth[:2, 2] *= (np.array(depth_size) - 1) / (np.array(color_size) - 1)
    return {"color": _resized(path, color, color_size), "depth": _resized(path, depth, depth_size)}


def _resized(path, intrinsics, size):
    """Intrinsics for an image of this size: people shrink ScanNet's images and leave the matrix as it was.

    The size that a matrix was written for is the one whose middle is near its principal point.
    """
    focal, middle = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    for written_for in (size, (1296, 968), (640, 480)):
        if np.isfinite(intrinsics).all() and (focal > 0).all() and (np.abs(middle / written_for - 0.5) < 0.15).all():
            out, scale = intrinsics.copy(), np.array(size) / written_for
            out[[0, 1], [0, 1]] = focal * scale
            out[:2, 2] = (middle + 0.5) * scale - 0.5  # the centre of a pixel is a whole number
            return out
    raise _fault(path, f"intrinsics of an image of {size[0]}x{size[1]}", np.round(intrinsics[:3, :3], 1).tolist())


# ------------------------------------------------------------------------------------------------ the whole data set


def prepare(scans, out, every=20, splits=None, frames_from=None, workers=None, frames_only=False):
    """Make the scene folders of <out>/{train,val,test} that are not there yet.

    Args:
        scans:       the download's folder or scans/ in it.  out: folder of the data set.
        every:       k: frames 0, k, 2k, ...  splits: folder of the split lists, where they are not in the download.
        frames_from: folder of scannet_frames_25k (scenes in it), where it is not in or beside the download.
        workers:     number of processes, default one a CPU core.
        frames_only: add frames to the scenes that are in out already and write nothing else.

    Returns:
        dict: made int, there int (finished before), absent int (in a split list, not in scans),
        skipped dict scene -> reason, notes dict scene -> remark.

    Raises:
        FileNotFoundError: no such folder, no scan, no split list.  ValueError: out was made with another k.
    """
    out, workers = Path(out), (os.cpu_count() or 1) if workers is None else workers
    if every < 1 or workers < 1:
        raise ValueError(f"expected --frames and --workers of 1 or more, got {every} and {workers}")
    folders, files = _find(scans, splits, frames_from)
    spec = out / "scannet.json"
    if spec.exists() and (found := _read_json(spec).get("frames")) != every:
        raise ValueError(f"{out} was made with --frames {found}, asked for {every}; choose another --out or delete it")
    skipped, jobs, there, absent = {}, [], 0, 0
    if frames_only:
        for coord in sorted(path for split in SPLITS for path in (out / split).glob("*/coord.npy")):
            scene = coord.parent
            if scene.name not in folders:
                skipped[scene.name] = f"no folder of this scan beneath {scans}"
            elif (scene / "pose").is_dir() and not (scene / "frames.tmp").is_dir():
                there += 1
            else:
                jobs.append((_add_frames, scene, folders[scene.name], every))
        if not jobs and not there and not skipped:
            raise FileNotFoundError(f"no scene in {out}/train, val or test; --frames-only adds frames to scenes that "
                                    "are there; leave it out to make them")
    else:
        lists = {split: read_split(files[f"scannetv2_{split}.txt"]) for split in SPLITS
                 if f"scannetv2_{split}.txt" in files}
        if not lists:
            raise FileNotFoundError(f"no split list beneath {scans}: expected scannetv2_train.txt, scannetv2_val.txt, "
                                    "scannetv2_test.txt (ScanNet's Tasks/Benchmark); give their folder by --splits")
        split_of = {name: split for split, names in lists.items() for name in names}
        ids_200 = read_categories(files[LABEL_TABLE]) if LABEL_TABLE in files else None
        scanned = {name: paths for name, paths in folders.items() if _mesh_of(paths)}
        if not scanned:
            raise FileNotFoundError(f"no scan beneath {scans}: expected folders like scene0000_00 with "
                                    "scene0000_00_vh_clean_2.ply")
        skipped.update(dict.fromkeys(sorted(scanned.keys() - split_of), "in no split list"))
        absent = len(split_of.keys() - scanned)
        for name in sorted(scanned.keys() & split_of):
            scene = out / split_of[name] / name
            if scene.is_dir():
                there += 1
            else:
                jobs.append((_make_scene, scene, scanned[name], every, ids_200))
        for split in lists:
            (out / split).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[f"scannetv2_{split}.txt"], out / f"scannetv2_{split}.txt")
    part = out / f"scannet.json.{os.getpid()}"
    part.write_text(json.dumps({"frames": every}) + "\n")
    part.replace(spec)
    result = {"made": 0, "there": there, "absent": absent, "skipped": skipped, "notes": {}}
    try:
        for scene, reason, note in _in_parallel(jobs, workers):
            if reason:
                skipped[scene.name] = reason
            else:
                result["made"] += 1
                if note:
                    result["notes"][scene.name] = note
    finally:
        shutil.rmtree(out / ".unfinished", ignore_errors=True)  # also what a killed run has left
    return result


def read_split(path):
    """The scene names of a split list."""
    names = _read_text(path).split()
    broken = [name for name in names if not SCENE_NAME.fullmatch(name)]
    if broken or not names:
        raise _fault(path, "names like scene0000_00", repr(broken[0][:40]) if broken else "none")
    return names


def _find(scans, splits, frames_from):
    """Folders of each scan; split lists and label table by name. Looks four levels deep, not into the scans."""
    scans = Path(scans).resolve()
    if not scans.is_dir():
        raise FileNotFoundError(f"{scans} not found; give the folder of the ScanNet download")
    given = [Path(root) for root in (frames_from, splits) if root]
    for root in given:
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder")
    wanted, folders, files = {LABEL_TABLE, *(f"scannetv2_{split}.txt" for split in SPLITS)}, {}, {}
    for root in (*given, scans, *(scans.parent / name for name in ("Tasks", "tasks", *FRAME_FOLDERS))):
        for place, inside, names in os.walk(root, followlinks=True):  # what is found first counts
            for name in wanted.intersection(names):
                files.setdefault(name, Path(place, name))
            for name in filter(SCENE_NAME.fullmatch, inside):
                if not Path(place, name, "coord.npy").exists():  # a prepared scene
                    folders.setdefault(name, []).append(Path(place, name))
            deep = len(Path(place).relative_to(root).parts) >= 4
            inside[:] = sorted((name for name in inside if not (deep or SCENE_NAME.fullmatch(name) or name[0] == ".")),
                               key=lambda name: (name in FRAME_FOLDERS, name))
    for path in scans.parent.glob("scannetv2*"):
        if path.name in wanted:
            files.setdefault(path.name, path)
    return folders, files


def _mesh_of(folders):
    """The first of the folders of one scan that holds its mesh, or None."""
    return next((folder for folder in folders if (folder / f"{folder.name}_vh_clean_2.ply").is_file()), None)


def _in_parallel(jobs, workers):
    """Run (function, scene, ...) in processes; yields (scene, reason why it was skipped or None, note)."""
    with tqdm(total=len(jobs), desc="scans", unit="scan", disable=not jobs) as bar:
        if min(workers, len(jobs)) <= 1:
            for job in jobs:
                yield _attempt(*job)
                bar.update()
            return
        pool = ProcessPoolExecutor(min(workers, len(jobs)), initializer=signal.signal,
                                   initargs=(signal.SIGINT, signal.SIG_DFL))  # Ctrl-C ends a worker without a word
        try:
            for future in as_completed([pool.submit(_attempt, *job) for job in jobs]):
                yield future.result()
                bar.update()
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, perhaps for memory; the same command with fewer --workers "
                             "goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt(function, scene, *arguments):
    """One job of _in_parallel; a fault of the scan's files ends this scan, a full disk ends the run."""
    try:
        return scene, None, function(scene, *arguments)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return scene, str(error), None


def _make_scene(scene, folders, every, ids_200):
    """Write a scene beside its place and rename it there, so that it exists whole or not at all; returns a note."""
    part = scene.parent.parent / ".unfinished" / f"{scene.name}_{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        arrays, axis = read_scan(_mesh_of(folders), scene.parent.name != "test", ids_200)
        part.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        count = write_frames(part, folders, every, axis)
        part.rename(scene)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return None if count else "no frames" if count is None else "no usable frame"


def _add_frames(scene, folders, every):
    """Put frames beside the arrays of a scene, in the frame of its points; returns a note."""
    whole, note = scene / "frames.tmp", None
    if not whole.is_dir():
        there = [name for name in ("color", "depth", "pose", "intrinsic") if (scene / name).exists()]
        if there:
            raise ValueError(f"{scene} holds {there[0]}/ from elsewhere; move it away first")
        part = scene.parent.parent / ".unfinished" / f"{scene.name}_{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            axis, note = _axis_of_points(scene, _mesh_of(folders))
            if write_frames(part, folders, every, axis) is None:
                raise ValueError("no .sens, no color/ and pose/ and no scannet_frames_25k of this scan")
            part.rename(whole)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    for name in ("color", "depth", "intrinsic", "pose"):  # pose, which says that all is there, at the end
        if (whole / name).is_dir():
            (whole / name).rename(scene / name)
    whole.rmdir()
    return note


def _axis_of_points(scene, folder):
    """axisAlignment if the points of a prepared scene had it applied, else identity (as Pointcept leaves them)."""
    if folder is None:
        return np.eye(4), "no mesh to compare with: points taken as not axis-aligned, as Pointcept stores them"
    try:
        with np.errstate(all="ignore"):  # mapped, so that NumPy looks at the file's size before it takes memory
            coord = np.load(scene / "coord.npy", mmap_mode="r", allow_pickle=False).astype(np.float64)
    except Exception as error:  # a damaged header makes NumPy raise nearly anything
        raise _fault(scene / "coord.npy", "an array (N, 3)", error) from None
    mesh = read_ply(folder / f"{folder.name}_vh_clean_2.ply")["coord"]
    axis = _axis_alignment(folder / f"{folder.name}.txt")
    for matrix in (np.eye(4), axis):
        if coord.shape == mesh.shape and np.abs(mesh @ matrix[:3, :3].T + matrix[:3, 3] - coord).max() < 1e-3:
            return matrix, None
    raise _fault(scene / "coord.npy", "the vertices of the scan's mesh, axis-aligned or not", f"others, {coord.shape}")


# --------------------------------------------------------------------------------------------------------- submission


def submit(checkpoint, data, split, out, device="cpu"):
    """Label the scenes of a split and write what the benchmark takes: <out>/semantic.zip and instance.zip.

    Returns:
        list of the .zip files written: semantic.zip, and instance.zip if the model finds instances.

    Raises:
        FileNotFoundError, ValueError: a scene of the split list is missing or a file has not a line for each vertex.
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
    vertices, has_instances = {}, False
    for name in tqdm(names, desc="scenes", unit="scene"):
        scene, labels = predict_scene(model, config, data / split / name, device)[:2]
        vertices[name] = len(scene["coord"])
        _write_lines(out / "semantic" / f"{name}.txt", np.array(NYU40_IDS)[labels])
        # INSTANCES GO IN HERE, once predict_scene finds them: write_instances(out / "instance", name, masks, classes,
        # scores); has_instances = True
    zips = [_zip_checked(out / "semantic", vertices)]
    return [*zips, _zip_checked(out / "instance", vertices)] if has_instances else zips


def write_instances(folder, name, masks, labels, scores):
    """Write the instances of one scene as the benchmark takes them.

    Args:
        folder: of the submission; gets <name>.txt and predicted_masks/<name>_000.txt, ...
        masks:  (P, N) bool, True = member.  labels: (P,) index in data.CLASS_NAMES.  scores: (P,) float.

    Raises:
        ValueError: a label is wall, floor or no class, a score is not finite, lengths differ.
    """
    masks, labels, scores = np.asarray(masks), np.asarray(labels), np.asarray(scores)
    if masks.ndim != 2 or not len(masks) == len(labels) == len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{name}: expected masks (P, N), labels (P,), finite scores (P,), found {masks.shape}, "
                         f"{labels.shape}, {scores.shape}")
    allowed = {k: nyu40_id for k, nyu40_id in enumerate(NYU40_IDS) if k not in STUFF}
    if not set(labels.tolist()) <= allowed.keys():
        raise ValueError(f"{name}: expected instance classes {sorted(allowed)}, found {sorted(set(labels.tolist()))}")
    (Path(folder) / "predicted_masks").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (mask, label, score) in enumerate(zip(masks, labels.tolist(), scores.tolist())):
        mask_file = f"predicted_masks/{name}_{i:03d}.txt"
        _write_lines(Path(folder) / mask_file, mask.astype(np.uint8))
        lines.append(f"{mask_file} {allowed[label]} {score:.6f}")
    _write_lines(Path(folder) / f"{name}.txt", lines)


def _write_lines(path, values):
    path.write_text("".join(f"{value}\n" for value in values))


def _zip_checked(folder, vertices):
    """Pack a submission folder once every scene has its file and every file of vertices its number of lines."""
    files = []
    for name, count in vertices.items():
        file = folder / f"{name}.txt"
        masks = [folder / line.split()[0] for line in file.open()] if folder.name == "instance" else []
        for path in masks or ([] if folder.name == "instance" else [file]):
            with path.open("rb") as stream:
                found = sum(1 for _ in stream)
            if found != count:
                raise _fault(path, f"{count} lines, one a vertex", found)
        files += [file, *masks]
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(folder))
    return target


# --------------------------------------------------------------------------------------------------------- commands


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    submitting = argv[:1] == ["submit"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="scannet.py submit" if submitting else "scannet.py")
    if submitting:
        parser.add_argument("checkpoint", help="stage3.pt, best.pt, ... of a run")
        parser.add_argument("--data", default="data/scannet", help="prepared data set (default %(default)s)")
        parser.add_argument("--split", choices=("val", "test"), default="test", help="(default %(default)s)")
        parser.add_argument("--out", default="submission", help="folder for the files (default %(default)s)")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    else:
        parser.add_argument("scans", help="folder of the ScanNet download, or scans/ in it")
        parser.add_argument("--out", default="data/scannet", help="folder of the data set (default %(default)s)")
        parser.add_argument("--frames", type=int, default=20, metavar="K", dest="every",
                            help="take every K-th frame (default %(default)s)")
        parser.add_argument("--splits", help="folder of scannetv2_{train,val,test}.txt; default: in the download")
        parser.add_argument("--frames-from", help="folder of scannet_frames_25k; default: in or beside the download")
        parser.add_argument("--workers", type=int, help="processes; default: one a CPU core")
        parser.add_argument("--frames-only", action="store_true",
                            help="add frames to the scenes in --out, such as a ScanNet that Pointcept prepared")
    args = parser.parse_args(argv[1:] if submitting else argv)
    try:
        if submitting:
            print("written:", *submit(**vars(args)))
            return
        result = prepare(**vars(args))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for kind in ("notes", "skipped"):
        by_reason = {}
        for name, reason in sorted(result[kind].items()):
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            print(f"{'skipped ' * (kind == 'skipped')}{', '.join(names)}: {reason}")
    print(f"{args.out}: {result['made']} scenes made, {result['there']} were there, {len(result['skipped'])} skipped, "
          f"{result['absent']} scans of the split lists not found")


if __name__ == "__main__":
    main()
