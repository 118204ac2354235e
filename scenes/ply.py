"""Read a .ply: points, colours, normals, labels and triangles. Needs NumPy alone, and no other file of this project.

    mesh = read_ply("scan.ply")
    mesh["coord"]  # (N, 3)

Ascii or binary of either byte order, with any further elements and properties. The file may be damaged in any way: a
count is compared with the bytes that are there before it is used, and reading takes about twice the file's size.

Format: Turk, The PLY Polygon File Format (1994).
"""

import itertools
import os
import re
import warnings

import numpy as np

TYPES = {name: code for code, names in {
    "i1": "char int8", "u1": "uchar uint8", "i2": "short int16", "u2": "ushort uint16", "i4": "int int32",
    "u4": "uint uint32", "f4": "float float32", "f8": "double float64"}.items() for name in names.split()}
COLUMNS = {  # what a vertex holds -> the names it goes by
    "coord": ("x y z",), "normal": ("nx ny nz", "normal_x normal_y normal_z"), "label": ("label",),
    "color": ("red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue")}
CORNERS = ("vertex_indices", "vertex_index")
ORDERS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
CHUNK = 2**14  # rows converted at a time
LINE = 2**20  # most characters of a line


def read_ply(path):
    """Read the points and triangles of a .ply.

    Colours that are floats up to 1 or integers up to 65535 are scaled to 0..255; polygons are cut into triangles.

    Returns:
        dict: coord (N, 3) f32, f64 where the file has doubles; color (N, 3) u8, normal (N, 3) f32, label (N,) i32,
        faces (F, 3) integer; each of the last four is None where the file has none.

    Raises:
        FileNotFoundError; ValueError: the file is no .ply, is shorter than its header says, or holds numbers that are
        not finite; the message names the file, what was expected and what was found.
    """
    mesh = {"faces": None}
    with open(path, "rb") as file:
        order, elements = _header(path, file)
        vertices = next((count for name, count, _ in elements if name == "vertex"), 0)
        if vertices == 0:
            raise fault(path, "at least one vertex", "none")
        for name, count, properties in elements:
            row = sum(2 if order is None else np.dtype(list_code or code).itemsize for _, code, list_code in properties)
            left = os.path.getsize(path) - file.tell() + (order is None)  # the last number may lack its line end
            if count * row > left:
                raise fault(path, f"{count} rows of {name}, at least {count * row} bytes", f"{left} bytes")
            if not properties and name != "vertex":
                continue
            if any(list_code for _, _, list_code in properties):
                chunks = _rows_with_lists(path, file, order, count, properties)
            else:
                chunks = _rows(path, file, order, count, properties)
            corners = next((i for i, (key, code, list_code) in enumerate(properties)
                            if name == "face" and key in CORNERS and list_code and code[0] != "f"), None)
            if name == "vertex" and "coord" not in mesh:
                mesh.update(_vertices(path, count, properties, chunks))
            elif corners is not None:
                mesh["faces"] = _triangles(path, properties[corners][1], (row[corners] for row in chunks), vertices)
            else:
                for _ in chunks:  # an element that nobody asked for
                    pass
            if "coord" in mesh and mesh["faces"] is not None:
                break
    return mesh


def fault(path, expected, found):
    """The one form of an error about a file."""
    return ValueError(f"{path}: expected {expected}, found {str(found)[:200]}")


def _header(path, file):
    """Byte order (None = ascii), list of (element, count, [(property, NumPy type, type of a list's length)])."""
    head = file.read(2**16)
    end = re.search(rb"\nend_header *\r?\n", head)
    if not re.match(rb"ply *\r?\n", head) or not end:
        raise fault(path, "a header from 'ply' to 'end_header'", repr(head[:20]) if head else "an empty file")
    file.seek(end.end())
    order, elements = "", []
    for line in re.split(r"\r?\n", head[:end.start()].decode("latin-1"))[1:]:
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                continue
            case ["format", word, "1.0"] if word in ORDERS:
                order = ORDERS[word]
            case ["element", name, count] if re.fullmatch("[0-9]{1,20}", count):
                elements.append((name, int(count), []))
            case ["property", kind, name] if elements and kind in TYPES:
                elements[-1][2].append((name, TYPES[kind], None))
            case ["property", "list", length, kind, name] if (
                    elements and kind in TYPES and TYPES.get(length, "f")[0] != "f"):
                elements[-1][2].append((name, TYPES[kind], TYPES[length]))
            case _:
                raise fault(path, "a line of a .ply header", repr(line[:80]))
    if order == "":
        raise fault(path, f"a line 'format {'|'.join(ORDERS)} 1.0'", "none in the header")
    return order, elements


def _table(path, file, order, count, fields):
    """The next rows of a binary file, mapped; moves the file behind them."""
    dtype = np.dtype([(name, order + code, *shape) for name, code, *shape in fields])
    at = file.tell()
    file.seek(at + count * dtype.itemsize)
    return np.memmap(path, dtype, "r", at, count) if count else np.empty(0, dtype)


def _rows(path, file, order, count, properties):
    """Rows of plain numbers, CHUNK at a time: lists of one array (n,) a property."""
    fields = [(f"f{i}", code) for i, (_, code, _) in enumerate(properties)]
    table = None if order is None else _table(path, file, order, count, fields)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        part = _text_table(path, file, size, np.dtype(fields)) if order is None else table[start : start + size]
        yield [part[name] for name, _ in fields]


def _text_table(path, file, count, dtype):
    """The next lines of an ascii file."""
    lines = [file.readline(LINE).decode("latin-1") for _ in range(count)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 255.0 for an integer; no line at all
            table = np.loadtxt(lines, dtype, comments=None, ndmin=1)
    except (ValueError, OverflowError) as error:
        raise fault(path, f"{len(dtype)} numbers a line", error) from None
    if len(table) != count:
        raise fault(path, f"{count} lines of numbers", f"{len(table)} before an empty line or the end")
    return table


def _rows_with_lists(path, file, order, count, properties):
    """Rows of numbers and lists: lists of one array a property, (n,), or (n, k) for a list. n is 1 unless uniform."""
    def read(length, code):
        if order is None:
            numbers = np.array(list(itertools.islice(words, length)), code)
        else:
            size = length * np.dtype(code).itemsize
            numbers = np.frombuffer(file.read(size) if 0 <= size <= left else b"", order + code)
        if len(numbers) != length:
            raise ValueError(f"{len(numbers)} of {length} numbers")
        return numbers

    start, left = file.tell(), os.path.getsize(path) - file.tell()
    for index in range(count):
        line = file.readline(LINE).decode("latin-1") if order is None else ""
        words, row = iter(line.split()), []
        try:
            for _, code, list_code in properties:
                row.append(read(int(read(1, list_code)[0]), code)[None] if list_code else read(1, code))
        except (ValueError, OverflowError) as error:
            raise fault(path, "numbers and lists with their length before them", f"{line[:40]!r} {error}") from None
        if index == 0 and order:  # are all lists as long as those of the first row?
            fields = [field for i, (_, code, list_code) in enumerate(properties) for field in (
                [(f"n{i}", list_code), (f"f{i}", code, row[i].shape[1:])] if list_code else [(f"f{i}", code)])]
            size = np.dtype(fields).itemsize
            if count * size <= left:
                file.seek(start)
                table = _table(path, file, order, count, fields)
                if all((table[f"n{i}"] == values.shape[1]).all() for i, values in enumerate(row) if values.ndim == 2):
                    for at in range(0, count, CHUNK):
                        yield [table[f"f{i}"][at : at + CHUNK] for i in range(len(row))]
                    return
                file.seek(start + size)
        yield row


def _vertices(path, count, properties, chunks):
    """coord, color, normal, label as read_ply returns them."""
    names = [name for name, _, _ in properties]
    if any(list_code for _, _, list_code in properties) or len(set(names)) < len(names):
        raise fault(path, "vertex properties of one number each and different names", ", ".join(names))
    mesh, columns = dict.fromkeys(COLUMNS), {}
    for key, choices in COLUMNS.items():
        found = next((choice.split() for choice in choices if set(choice.split()) <= set(names)), None)
        if found:
            columns[key] = [names.index(name) for name in found]
            codes = {properties[i][1] for i in columns[key]}
            kind = {"coord": "f8" if "f8" in codes else "f4", "normal": "f4", "label": "i4",
                    "color": "u1" if codes == {"u1"} else "f4"}[key]
            mesh[key] = np.empty((count, len(found)), kind)
    if mesh["coord"] is None:
        raise fault(path, "vertex properties x y z", ", ".join(names) or "none")
    done = 0
    for rows in chunks:
        with np.errstate(invalid="ignore", over="ignore"):  # a label that is no number, a huge colour
            for key, indices in columns.items():
                for j, i in enumerate(indices):
                    mesh[key][done : done + len(rows[i]), j] = rows[i]
        done += len(rows[0])
    for key, what in (("coord", "coordinates"), ("color", "colours")):
        broken = 0 if mesh[key] is None else int((~np.isfinite(mesh[key])).any(1).sum())
        if broken:
            raise fault(path, f"finite {what}", f"{broken} of {count} vertices without")
    if mesh["color"] is not None and mesh["color"].dtype != np.uint8:
        is_float = any(properties[i][1][0] == "f" for i in columns["color"])
        mesh["color"] = _to_bytes(path, mesh["color"], is_float)
    if mesh["normal"] is not None:
        np.nan_to_num(mesh["normal"], copy=False, posinf=0, neginf=0)
    if mesh["label"] is not None:
        mesh["label"] = mesh["label"][:, 0]
    return mesh


def _to_bytes(path, color, is_float):
    """Colours (N, 3) f32, from floats in 0..1 or 0..255 or integers up to 65535 -> 0..255 u8."""
    low, high = color.min(), color.max()
    if low < 0 or high > (255 if is_float else 65535):
        raise fault(path, "colours in 0..1, 0..255 or 0..65535", f"{low}..{high}")
    color *= 255 if is_float and high <= 1 else 1 / 257 if high > 255 else 1
    return np.rint(color, out=color).astype(np.uint8)


def _triangles(path, code, chunks, vertices):
    """Polygons (n, k) -> triangles (F, 3), fans about the first corner; None where there are none."""
    data = bytearray()
    for polygons in chunks:
        cut = np.empty((len(polygons), max(polygons.shape[1] - 2, 0), 3), code)  # (n, k - 2, 3)
        cut[..., 0], cut[..., 1], cut[..., 2] = polygons[:, :1], polygons[:, 1:-1], polygons[:, 2:]
        data += cut.tobytes()
    faces = np.frombuffer(data, code).reshape(-1, 3)
    if len(faces) and (faces.min() < 0 or faces.max() >= vertices):
        raise fault(path, f"faces of vertices 0..{vertices - 1}", f"{faces.min()}..{faces.max()}")
    return faces if len(faces) else None
