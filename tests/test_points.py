"""scenes/points.py: voxels against slow loops; normals, superpoints and what `complete` makes of a bare scan."""

import numpy as np
import pytest

from scenes import points
from scenes.points import IGNORE, complete, estimate_normals, superpoints_from_points, vertex_normals
from scenes.points import voxel_majority, voxel_means, voxelise


def plane(axis, at=0.0, size=2.0, spacing=0.05):
    """Points (n, 3) f32 of a square across this axis from the origin on, and its normals."""
    u, v = (a.ravel() for a in np.meshgrid(*[np.arange(spacing / 2, size, spacing)] * 2))
    coord = np.insert(np.stack([u, v], 1), axis, at, axis=1).astype(np.float32)
    return coord, np.tile(np.eye(3, dtype=np.float32)[axis], (len(coord), 1))


def test_voxels_have_the_members_means_and_majorities_of_a_slow_loop():
    rng = np.random.default_rng(0)
    coord = (rng.uniform(-1, 1, (500, 3)) * (1, 2, 0.5) + (5, -3, 0)).astype(np.float32)
    labels, values = rng.integers(-1, 4, 500), rng.normal(size=(500, 2)).astype(np.float32)
    grid, point_to_voxel = voxelise(coord, 0.3)
    cells = ((coord - coord.min(0)) / np.float32(0.3)).astype(int).tolist()
    slow = {cell: [i for i in range(500) if cells[i] == list(cell)] for cell in sorted(map(tuple, cells))}
    assert 50 < len(slow) < 300 and grid.dtype == point_to_voxel.dtype == np.int64
    np.testing.assert_array_equal(grid, list(slow))
    mean = voxel_means(values, point_to_voxel, len(grid))
    majority = voxel_majority(labels, point_to_voxel, len(grid), 4)
    for row, members in enumerate(slow.values()):
        np.testing.assert_array_equal(np.flatnonzero(point_to_voxel == row), members)
        np.testing.assert_allclose(mean[row], values[members].mean(0), atol=1e-5)
        votes = [int((labels[members] == k).sum()) for k in range(4)]
        assert majority[row] == (votes.index(max(votes)) if max(votes) else IGNORE)  # the lowest on a tie
    assert (majority == IGNORE).any()


def test_the_order_of_the_points_does_not_matter_and_a_voxel_leads_to_itself():
    rng = np.random.default_rng(1)
    coord, order = rng.uniform(-3, 3, (400, 3)).astype(np.float32), rng.permutation(400)
    grid, point_to_voxel = voxelise(coord, 0.25)
    other_grid, other_row = voxelise(coord[order], 0.25)
    np.testing.assert_array_equal(grid, other_grid)
    np.testing.assert_array_equal(point_to_voxel[order], other_row)
    again, rows = voxelise((grid + 0.5).astype(np.float32), 1.0)
    np.testing.assert_array_equal(again, grid)
    np.testing.assert_array_equal(rows, np.arange(len(grid)))


@pytest.mark.parametrize("far", [1e7, 1e18, 1e30, 3e38])
def test_points_however_far_apart_get_voxels_of_their_own_and_near_ones_keep_theirs(far):
    coord = np.array([[0, 0, 0], [far, far, far], [-far, 0, 0], [0.03, 0, 0], [0.031, 0, 0]], np.float32)
    with np.errstate(over="ignore"):
        grid, point_to_voxel = voxelise(coord, 0.02)
    first = [1, 3, 0, 2, 2] if far == 1e7 else [1, 2, 0, 1, 1]  # beside 1e18 m no double knows 3 cm
    assert point_to_voxel.tolist() == first and grid.min() == 0
    if far == 1e7:
        np.testing.assert_array_equal(grid - [5e8, 0, 0], [[-5e8, 0, 0], [0, 0, 0], [1, 0, 0], [5e8, 5e8, 5e8]])


def test_estimated_normals_stand_on_a_plane_and_point_into_a_room():
    floor = plane(2)[0]
    np.testing.assert_allclose(np.abs(estimate_normals(floor)[:, 2]), 1, atol=1e-5)
    corner, expected = (np.concatenate(parts) for parts in zip(plane(0), plane(1), plane(2)))
    inner = (corner > 0.2).sum(1) == 2  # off the edges
    for sign, shift in ((1, 0), (-1, 7)):  # the corner below and the one above
        normal = estimate_normals(sign * corner + shift, chunk=700)  # several chunks
        assert ((normal * expected * sign).sum(1)[inner] > 0.999).all()


def test_normals_of_a_mesh_are_the_means_of_its_triangles_by_area():
    coord = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 1], [9, 9, 9]], np.float32)
    normal = vertex_normals(coord, np.array([[0, 1, 2], [0, 2, 3]]))  # areas 2 towards z and 1 towards x
    expected = [[1, 0, 2], [0, 0, 1], [1, 0, 2], [1, 0, 0], [0, 0, 0]]  # the last belongs to no triangle
    np.testing.assert_allclose(normal, expected / np.maximum(np.linalg.norm(expected, axis=1), 1)[:, None], atol=1e-6)


@pytest.mark.parametrize("second", [plane(0), plane(2, at=0.045)], ids=["perpendicular", "parallel, 4.5 cm apart"])
def test_superpoints_keep_surfaces_apart(second):
    first = plane(2)
    coord, normal = (np.concatenate(parts) for parts in zip(first, second))
    coord = coord + np.random.default_rng(8).normal(0, 0.001, coord.shape).astype(np.float32)
    ids = superpoints_from_points(coord, normal)
    assert ids.dtype == np.int64 and ids.shape == (len(coord),)
    assert not set(ids[: len(first[0])]) & set(ids[len(first[0]):])
    np.testing.assert_array_equal(np.unique(ids), np.arange(ids.max() + 1))
    assert 8 <= ids.max() + 1 <= 24  # 2 m planes on a 1 m grid: about four each
    assert np.bincount(ids).min() >= 20


def test_tiny_pieces_join_the_nearest_superpoint():
    coord, normal = plane(2)
    coord = np.concatenate([coord, [[0.5, 0.5, 0.4], [1.5, 1.5, 0.5], [1.5, 1.52, 0.5]]]).astype(np.float32)
    normal = np.concatenate([normal, [[1, 0, 0], [0, 1, 0], [0, 1, 0]]]).astype(np.float32)
    ids = superpoints_from_points(coord, normal)
    assert ids.max() + 1 == 4
    near = [np.linalg.norm(coord[:-3] - point, axis=1).argmin() for point in coord[-3:]]
    np.testing.assert_array_equal(ids[-3:], ids[near])


@pytest.mark.parametrize("fine", [10**6, 1500], ids=["on the points", "on small cells"])
def test_what_a_scan_lacks_is_computed_and_said(fine, monkeypatch):
    monkeypatch.setattr(points, "FINE_POINTS", fine)
    coord, expected = (np.concatenate(parts) for parts in zip(plane(2), plane(1)))
    scene, notes = complete({"coord": coord, "normal": None, "superpoint": None, "name": "a"})
    assert notes == ["no normals: estimated", "no superpoints: computed"] and scene["name"] == "a"
    assert scene["normal"].shape == coord.shape and scene["superpoint"].shape == (len(coord),)
    assert (np.abs((scene["normal"] * expected).sum(1)) > 0.9).mean() > 0.9
    assert 4 <= len(np.unique(scene["superpoint"])) == scene["superpoint"].max() + 1 < 100
    again, notes = complete(scene)
    assert notes == [] and again["normal"] is scene["normal"] and again["superpoint"] is scene["superpoint"]
    faces = np.array([[0, 1, 40], [1, 41, 40]])
    scene, notes = complete(scene | {"normal": None, "faces": faces})
    assert notes == ["no normals: from the faces, else estimated"]
    np.testing.assert_array_equal(scene["normal"][[0, 1, 40, 41]], vertex_normals(coord, faces)[[0, 1, 40, 41]])
    np.testing.assert_array_equal(np.delete(scene["normal"], [0, 1, 40, 41], 0),
                                  np.delete(again["normal"], [0, 1, 40, 41], 0))
    for n in (1, 2, 5):
        few, _ = complete({"coord": coord[:n], "normal": None, "superpoint": None})
        assert np.isfinite(few["normal"]).all() and few["superpoint"].shape == (n,)
