"""What bench.py compares computes the same. Nothing here is timed."""

import numpy as np
import pytest
import torch

import bench
from data import voxelise
from fusion import link_views, sample_views


@pytest.fixture(scope="module")
def small_scan():
    return bench.scan(num_points=6000, num_views=4, image_size=(64, 48))


@pytest.mark.parametrize("plain", [bench.voxelise_by_unique, bench.voxelise_by_hash])
def test_the_plain_ways_to_voxelise_give_the_same_voxels_but_for_their_order(plain):
    coord, _ = bench.box_room(5000)
    cells, point_to_voxel = voxelise(coord, 0.1)
    plain_cells, plain_point_to_voxel = plain(coord, 0.1)
    assert len(plain_cells) == len(cells)
    np.testing.assert_array_equal(plain_cells[plain_point_to_voxel], cells[point_to_voxel])


def test_the_numpy_loop_finds_the_same_links(small_scan):
    links = link_views(*small_scan)
    views = bench.link_by_numpy(*[t.double().numpy() for t in small_scan])
    assert all(len(rows) > 100 for rows, _ in views)
    for view, (rows, uv) in enumerate(views):
        mine = links.view == view
        np.testing.assert_array_equal(links.point[mine].numpy(), rows)
        np.testing.assert_allclose(links.uv[mine].numpy(), uv, atol=1e-3)


def test_sampling_densely_gives_the_same_features(small_scan):
    links, count = link_views(*small_scan), len(small_scan[0])
    maps = torch.randn(4, 5, 12, 16)
    feat_2d, seen = sample_views(maps, links, (64, 48), count)
    dense, dense_seen = bench.sample_densely(maps, links, (64, 48), count)
    assert torch.equal(seen, dense_seen) and seen.any() and not seen.all()
    torch.testing.assert_close(feat_2d, dense, atol=1e-5, rtol=1e-5)


def test_depth_maps_of_the_box_room_agree_with_its_points():
    """Most points that a camera looks at lie on the surface that the depth map shows."""
    points, *views = bench.scan(num_points=6000, num_views=4, image_size=(64, 48))
    seen = len(link_views(points, *views).point)
    inside = len(link_views(points, *views, tolerance=100.0).point)
    assert seen > 0.4 * inside


def test_the_table_says_whether_a_goal_is_met():
    text = bench.table([bench.Row("a", "1 ms", "9 ms", 9.0, 8), bench.Row("b", "1 ms", "7 ms", 7.0, 8)])
    assert ">= 8 met" in text and ">= 8 MISSED" in text


def test_attention_written_out_gives_the_same_as_the_fused_one():
    attention, query, keys = bench.Attention(16, 4), torch.randn(5, 16), torch.randn(9, 16)
    allowed = (torch.rand(5, 9) > 0.5) | (torch.arange(9) == 0)
    expected = attention(query, keys, allowed)
    torch.testing.assert_close(bench.attend_explicitly(attention, query, keys, allowed), expected)
