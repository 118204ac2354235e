"""Points of a scan: voxels, normals, superpoints, instances. Needs NumPy and SciPy, and no other file of this project.

Axes: N points, M voxels, F triangles, C channels, S superpoints.
"""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

IGNORE = -1
VERSION = 3  # of what `complete` computes: raise it whenever the same scan gets other numbers
PATCH = 0.25  # metres, within which a surface is held against its plane
MARGIN = 1.0  # metres around a tile that the network sees as well
SMALLEST = 20  # points of a superpoint
FINE_POINTS = 500_000  # normals and superpoints of more points are computed on means over small cells


def voxelise(coord, voxel_size):
    """Points -> voxels of a regular grid that starts at the points' lowest corner.

    Args:
        coord: (N, 3) float, metres, finite.  voxel_size: metres.

    Returns:
        grid_coord:     (M, 3) int64 >= 0, in ascending order (x first): the order of the points does not matter.
        point_to_voxel: (N,) int64, row of grid_coord of each point.
    """
    coord = coord.astype(np.float64) if np.ptp(coord) > 1e4 else coord  # m; f32 is too coarse beside a point far off
    axes = [(axis - axis.min()) / coord.dtype.type(voxel_size) for axis in np.ascontiguousarray(coord.T)]
    x, y, z = (np.minimum(axis, 2.0**62).astype(np.int64) for axis in axes)  # a cast of more would wrap
    shape = [int(axis.max()) + 1 for axis in (x, y, z)]
    if shape[0] * shape[1] * shape[2] >= 2**63:  # one key cannot number them
        grid_coord, point_to_voxel = np.unique(np.stack([x, y, z], 1), axis=0, return_inverse=True)
        return grid_coord, point_to_voxel.ravel()
    cell, point_to_voxel = np.unique((x * shape[1] + y) * shape[2] + z, return_inverse=True)  # one key: fast
    return np.stack(np.unravel_index(cell, shape), 1), point_to_voxel


def voxel_means(values, point_to_voxel, num_voxels):
    """(N, C) -> (M, C) f32: the mean over each voxel's points."""
    count = np.bincount(point_to_voxel, minlength=num_voxels)
    sums = [np.bincount(point_to_voxel, values[:, c], num_voxels) for c in range(values.shape[1])]
    return (np.stack(sums, 1) / count[:, None]).astype(np.float32)


def voxel_majority(labels, point_to_voxel, num_voxels, num_classes):
    """(N,) -> (M,) int64: the most frequent label among a voxel's labelled points, the lowest on a tie; IGNORE where no
    point of it is labelled."""
    labelled = labels != IGNORE
    key = point_to_voxel[labelled] * num_classes + labels[labelled]
    votes = np.bincount(key, minlength=num_voxels * num_classes).reshape(num_voxels, num_classes)
    return np.where(votes.any(1), votes.argmax(1), IGNORE)


def vertex_normals(coord, faces):
    """Mean normal of the triangles at each vertex, weighted by their area: (N, 3) f32 unit, 0 where there is none."""
    a, b, c = (coord[faces[:, i]].astype(np.float64) for i in range(3))
    area = np.cross(b - a, c - a)  # (F, 3), twice the area long
    total = sum(np.stack([np.bincount(faces[:, i], area[:, j], len(coord)) for j in range(3)], 1) for i in range(3))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return (total / np.where(length > 0, length, 1)).astype(np.float32)


def _ceiling(coord):
    """Where the top tenth of the height begins; a point far off decides nothing."""
    return np.quantile(coord[:, 2], (0.001, 0.999)) @ (0.1, 0.9)


def estimate_normals(coord, neighbours=12, chunk=50_000):
    """(N, 3) -> (N, 3) f32 unit: the direction of least spread of each point's neighbours; 0 in a scan of one or two.
    Turned to where a room is seen from: up on level surfaces (down in the top tenth of height), else to the middle."""
    tree, middle, ceiling = cKDTree(coord), np.median(coord, axis=0), _ceiling(coord)
    k = min(neighbours, len(coord))
    normal = np.zeros_like(coord, dtype=np.float32)
    for start in range(0, len(coord) if k >= 3 else 0, chunk):
        part = coord[start : start + chunk]
        near = coord[tree.query(part, k)[1]].astype(np.float64)  # (n, k, 3)
        near -= near.mean(1, keepdims=True)
        out = np.linalg.eigh(near.transpose(0, 2, 1) @ near)[1][:, :, 0]  # the axis of least spread
        inward = np.einsum("nc,nc->n", out[:, :2], (middle - part)[:, :2])
        upward = np.where(part[:, 2] > ceiling, -out[:, 2], out[:, 2])
        away = np.where(np.abs(out[:, 2]) > 0.5, upward, inward) < 0
        normal[start : start + chunk] = np.where(away[:, None], -out, out)
    return normal


def superpoints_from_points(coord, normal):
    """Superpoints of a scan from its points alone, coord, normal (N, 3) float, metres and unit: (N,) int64, 0..S-1.

    Components of the graph of 8 neighbours whose edges join points on one smooth surface (normals within 10 degrees,
    and neither point 2 cm off the other's tangent plane), cut at a grid of 1 m so that a wall is not one piece, those
    below SMALLEST points given to the nearest larger one. Where most points are on no smooth surface (normals of noise)
    the grid alone cuts; it grows until most pieces are large. So S <= max(1, N / SMALLEST).
    """
    n, k, cell = len(coord), min(9, len(coord)), 1.0
    distance, near = (a.reshape(n, k) for a in cKDTree(coord).query(coord, k))
    reach = 3 * np.median(distance[:, 1:]) if k > 1 else 0.0
    a, b = np.repeat(np.arange(n), k), near.ravel()
    step = coord[b] - coord[a]
    off = np.maximum(np.abs((step * normal[a]).sum(1)), np.abs((step * normal[b]).sum(1)))
    smooth = np.abs((normal[a] * normal[b]).sum(1)) > np.cos(np.radians(10))
    keep = smooth & (off < 0.02) & (distance.ravel() <= reach)
    graph = coo_matrix((np.ones(keep.sum(), bool), (a[keep], b[keep])), shape=(n, n))
    surface = connected_components(graph, directed=False)[1].astype(np.int64)
    least, large = min(SMALLEST, n), np.zeros(n, bool)
    surface *= (np.bincount(surface)[surface] >= least).mean() >= 0.5
    while large.mean() < 0.5:
        piece = np.unique(surface * n + voxelise(coord, cell)[1], return_inverse=True)[1]
        large, cell = np.bincount(piece)[piece] >= least, 2 * cell
    piece[~large] = piece[large][cKDTree(coord[large]).query(coord[~large])[1]]
    return np.unique(piece, return_inverse=True)[1]


def astray(coord, normal):
    """Why normals (N, 3), 0 = unknown, are not those of a room seen from inside: str, "" where they may be. They are
    held against the planes of flat patches. Those turned round have level surfaces (below the top tenth of height) that
    look down, and look away from the middle. Not found: where neither says it, as in terrain, or sides that differ by
    surface."""
    known = np.flatnonzero(np.abs(normal) @ np.ones(3, np.float32))
    known = known[np.unique(coord[known] @ (1, np.pi, np.e), return_index=True)[1]]  # those at one place count once
    some = known[:: len(known) // 5000 + 1]
    if len(some) <= 30:
        return ""
    tree, along = cKDTree(coord[known]), []
    for seed in some[:: len(some) // 100 + 1]:
        near = np.sort(tree.query_ball_point(coord[seed], PATCH))
        near = known[near[:: len(near) // 60 + 1] if len(near) > 15 else tree.query(coord[seed], 30)[1]]
        patch = coord[near].astype(np.float64) - coord[seed]
        spread, axes = np.linalg.eigh(np.cov(patch.T))
        if spread[0] < 0.02 * spread[1] and spread[1] > 0.05 * spread[2]:
            along.append(normal[near] @ axes[:, 0])
    if len(along) > 4 and np.mean([np.abs(one).mean() for one in along]) < 0.7:
        return "normals that do not fit the points"
    if len(along) > 4 and np.mean([abs(np.sign(one).mean()) for one in along]) < 0.5:  # of random sides 0.15
        return "normals that point to both sides"
    level = some[(np.abs(normal[some, 2]) > 0.8) & (coord[some, 2] < _ceiling(coord))]
    inward = ((np.median(coord, axis=0) - coord[some]) * normal[some]).sum(1) > 0
    turned = len(level) > 30 and (normal[level, 2] > 0).mean() < 0.5 and inward.mean() < 0.5
    return "normals that point out of the room" * bool(turned)


def lacks(scene):
    """What of a scan `complete` must compute: normal (N, 3) f32, 0 where it is unknown; why, str, of the normals and of
    the superpoints, "" where nothing is to be computed."""
    given, s, n = scene["normal"], scene["superpoint"], len(scene["coord"])
    pieces = "no superpoints" if s is None else "too many superpoints" * bool(s.max() >= max(1000, n / 20))
    normal = np.zeros((n, 3), np.float32) if given is None else np.nan_to_num(given)
    if why := astray(scene["coord"], normal):
        return 0 * normal, why, pieces
    return normal, "no normals" if given is None else "normals that are 0 or NaN" * (not normal.any(1).all()), pieces


def complete(scene):
    """A scan with normals (by its faces where it has some) and superpoints; list of str, what was computed and why.
    Those that are placeholders or `astray` are computed anew; points at one place (0.1 mm) count once.

    scene: dict with coord (N, 3) f32; normal (N, 3) or None, superpoint (N,) or None, faces (F, 3) or missing.
    """
    coord, superpoint, (normal, why, pieces) = scene["coord"], scene["superpoint"], lacks(scene)
    if not why and not pieces:
        return scene, []
    edge, unknown = 1e-4, ~normal.any(1)  # metres
    grid, point_to_cell = voxelise(coord, edge)
    if why and scene.get("faces") is not None:
        places = voxel_means(coord, point_to_cell, len(grid))
        of_faces = vertex_normals(places, point_to_cell[scene["faces"]])
        if odd := astray(places, of_faces):
            why += f", the faces have {odd}"
        else:
            normal[unknown] = of_faces[point_to_cell[unknown]]
    left = ~normal.any(1)
    while len(grid) > FINE_POINTS:
        edge = max(0.02, 1.5 * edge)
        grid, point_to_cell = voxelise(coord, edge)
    cells = voxel_means(coord, point_to_cell, len(grid))
    if left.any():
        normal[left] = estimate_normals(cells)[point_to_cell[left]]
    how = "estimated" if left.sum() == unknown.sum() else "from the faces" + ", else estimated" * bool(left.any())
    notes = [f"{why}: {how}"] * bool(why) + [f"{pieces}: computed" + " anew" * (superpoint is not None)] * bool(pieces)
    if pieces:
        superpoint = superpoints_from_points(cells, voxel_means(normal, point_to_cell, len(grid)))[point_to_cell]
    return scene | {"normal": normal, "superpoint": superpoint}, notes


def tiles(coord, voxel_size, limit, side=np.inf):
    """Cut a scan across its longer horizontal side until no tile holds more than limit voxels or is longer than side.

    Returns a list of (core, rows): point indices of the tile, and of the tile with MARGIN around it.
    """
    def cut(rows):  # in the middle, not at the median: points far off are a tile of their own
        extent = np.ptp(coord[rows, :2], axis=0)
        if extent.max() <= side and (len(rows) <= limit or len(voxelise(coord[rows], voxel_size)[0]) <= limit):
            return [rows]
        axis = extent.argmax()
        left = coord[rows, axis] < coord[rows, axis].min() + extent[axis] / 2
        if not left.any():
            raise ValueError(f"{len(rows)} points lie above one another, too many for a tile; check the coordinates")
        return cut(rows[left]) + cut(rows[~left])

    cores, place = cut(np.arange(len(coord))), coord[:, :2]
    around = ((place >= place[core].min(0) - MARGIN) & (place <= place[core].max(0) + MARGIN) for core in cores)
    return [(core, np.flatnonzero(near.all(1))) for core, near in zip(cores, around)]


def apart_by_class(segment, own):
    """Instances (N,) 0..G-1 or IGNORE -> the same, told apart where an id is unique within a class alone, as in KITTI:
    where two classes or more hold 100 of its points and a tenth of them each. segment (N,) class or IGNORE."""
    count = max(segment.max(), 0) + 1
    labelled = (own >= 0) & (segment >= 0)
    votes = np.bincount(own[labelled] * count + segment[labelled], minlength=(own.max() + 1) * count).reshape(-1, count)
    large = votes >= np.maximum(100, votes.sum(1, keepdims=True) / 10)  # (G, K)
    if (large.sum(1) < 2).all():
        return own
    kind = np.where(labelled & large[own, segment], segment, votes.argmax(1)[own])  # (N,) of the rest the most frequent
    ids, apart = np.unique(np.where(own < 0, IGNORE, own * count + kind), return_inverse=True)
    return apart.ravel() - (ids[0] == IGNORE)


def instance_targets(segment, instance, superpoint, things):
    """What the query decoder is trained and judged by.

    An instance has the class of most of its labelled points (`apart_by_class` comes first); those of no class and of
    none of things are left out. A superpoint belongs to the instance that holds over half of its points.

    Args:
        segment: (N,) class or IGNORE.  instance: (N,) any id, below 0 = none; or None.  superpoint: (N,) 0..S-1.
        things:  the classes that have instances.

    Returns:
        point_instance:      (N,) int64, (class + 1) * 1000 + number from 1 on, 0 = none: the benchmark's form.
        superpoint_instance: (S,) int64, 0..G-1, IGNORE = none.
        instance_label:      (G,) int64 class of each instance; those that hold no superpoint are not among them.
    """
    s = superpoint.max() + 1
    nothing = np.zeros(len(segment), np.int64), np.full(s, IGNORE, np.int64), np.zeros(0, np.int64)
    if instance is None or (instance < 0).all():
        return nothing
    ids, own = np.unique(instance.clip(min=IGNORE), return_inverse=True)
    own = apart_by_class(segment, own.ravel() - (ids[0] == IGNORE))  # (N,) number of the instance, IGNORE = none
    label = voxel_majority(segment[own >= 0], own[own >= 0], own.max() + 1, max(segment.max(), 0) + 1)
    keep = np.isin(label, things)
    own, label = np.append(np.where(keep, keep.cumsum() - 1, IGNORE), IGNORE)[own], label[keep]
    if not len(label):
        return nothing
    if len(label) > 999:
        raise ValueError(f"a scene may hold 999 instances (the benchmark's ids have no room for more), found "
                         f"{len(label)}; cut it into parts")
    point_instance = np.where(own >= 0, label[own] * 1000 + 1000 + own + 1, 0)
    most = voxel_majority(own, superpoint, s, len(label))  # (S,) the instance with the most points, if any
    share = np.bincount(superpoint[own == most[superpoint]], minlength=s) / np.bincount(superpoint, minlength=s)
    owner = np.where(share > 0.5, most, IGNORE)
    held, owner = np.unique(np.append(owner, IGNORE), return_inverse=True)  # the first is IGNORE
    return point_instance, owner.ravel()[:-1] - 1, label[held[1:]]
