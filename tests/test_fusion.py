"""Tests of fusion.py: cameras, visibility, sampling, standardisation, gates, FiLM."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusion import (GEOMETRY_CHANNELS, FiLM, Links, LiteFusionGate, SimpleFusion, Standardise, blend, fusion_stats,
                    geometry_code, link_views, project_points, sample_views)

INTRINSICS = torch.tensor([[100.0, 0, 40], [0, 120, 30], [0, 0, 1]])
WIDTH, HEIGHT = 81, 61


def random_cameras(views, seed=0):
    """(V, 4, 4) rigid world_to_camera near the origin and (V, 3, 3) intrinsics."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(4).repeat(views, 1, 1)
    rotation = torch.linalg.qr(torch.randn(views, 3, 3, generator=generator))[0]
    matrix[:, :3, :3] = rotation * torch.linalg.det(rotation)[:, None, None]
    matrix[:, :3, 3] = torch.randn(views, 3, generator=generator)
    return matrix, INTRINSICS.repeat(views, 1, 1)


def slow_links(points, world_to_camera, intrinsics, depth, tolerance, point_batch=None, view_batch=None):
    """Visibility word by word, point after point, view after view: list of (point, view, u, v); depth may be None."""
    found = []
    for n, point in enumerate(points.tolist()):
        for v in range(len(world_to_camera)):
            matrix, k = world_to_camera[v].tolist(), intrinsics[v].tolist()
            x, y, z = (sum(matrix[r][c] * point[c] for c in range(3)) + matrix[r][3] for r in range(3))
            if z <= 0 or (view_batch is not None and view_batch[v] != point_batch[n]):
                continue
            column, row = k[0][0] * x / z + k[0][2], k[1][1] * y / z + k[1][2]
            if not (-0.5 <= column < WIDTH - 0.5 and -0.5 <= row < HEIGHT - 0.5):
                continue
            reading = z if depth is None else depth[v, math.floor(row + 0.5), math.floor(column + 0.5)].item()
            if reading > 0 and abs(reading - z) <= tolerance:
                found.append((n, v, column, row))
    return found


def test_a_known_camera_gives_the_pixels_computed_by_hand():
    points = torch.tensor([[0.0, 0, 2], [1, 0, 2], [0, -0.5, 2], [0.2, 0.1, 4]])
    uv, depth = project_points(points, torch.eye(4), INTRINSICS)
    assert torch.allclose(uv, torch.tensor([[40.0, 30], [90, 30], [40, 0], [45, 33]]))
    assert torch.allclose(depth, torch.tensor([2.0, 2, 2, 4]))


def test_a_turned_and_moved_camera_sees_what_stands_before_it():
    # camera at (1, 2, 0.5), looking along world +x, its right is world -y, its down is world -z
    rotation = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
    world_to_camera = torch.eye(4)
    world_to_camera[:3, :3] = rotation
    world_to_camera[:3, 3] = -rotation @ torch.tensor([1.0, 2, 0.5])
    uv, depth = project_points(torch.tensor([[3.0, 2, 0.5], [3, 1, 0.5], [3, 2, 1]]), world_to_camera, INTRINSICS)
    assert torch.allclose(depth, torch.tensor([2.0, 2, 2]))
    assert torch.allclose(uv, torch.tensor([[40.0, 30], [90, 30], [40, 0]]))  # 1 m to the right, 0.5 m up


def test_project_then_unproject_returns_the_point():
    world_to_camera, intrinsics = (m[0].double() for m in random_cameras(1, seed=3))
    points = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 4
    uv, depth = project_points(points, world_to_camera, intrinsics)
    front = depth > 0.05
    assert front.sum() > 50
    pixel = torch.cat([uv, torch.ones_like(depth)[:, None]], 1) * depth[:, None]
    camera = pixel @ torch.linalg.inv(intrinsics).T
    back = (camera - world_to_camera[:3, 3]) @ world_to_camera[:3, :3]
    assert torch.allclose(back[front], points[front], atol=1e-9)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (1, 4, 3)])
def test_points_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"points must be \(N, 3\)"):
        link_views(torch.zeros(shape), torch.eye(4)[None], INTRINSICS[None], torch.ones(1, 4, 4))


def test_cameras_that_do_not_match_the_depth_maps_and_missing_arguments_are_refused():
    point, eye = torch.zeros(1, 3), torch.eye(4)[None]
    with pytest.raises(ValueError, match=r"2 depth maps need .*\(2, 4, 4\) .*\(2, 3, 3\), got \(1, 4, 4\) and \(1, 3"):
        link_views(point, eye, INTRINSICS[None], torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"2 cameras need .*got \(2, 4, 4\) and \(1, 3, 3\)"):
        link_views(point, eye.repeat(2, 1, 1), INTRINSICS[None], image_size=(4, 4))
    with pytest.raises(ValueError, match=r"needs depth maps, or image_size=\(W, H\)"):
        link_views(point, eye, INTRINSICS[None])
    with pytest.raises(ValueError, match="point_batch and view_batch belong together"):
        link_views(point, eye, INTRINSICS[None], image_size=(4, 4), view_batch=torch.zeros(1))


@pytest.mark.parametrize(("point", "reading", "seen"), [
    ((0.0, 0, 2), 2.0, True),
    ((0.0, 0, 2), 2.04, True),
    ((0.0, 0, 2), 1.9, False),  # something stands before it
    ((0.0, 0, 2), 2.1, False),  # the camera looks through where it should be
    ((0.0, 0, 2), 0.0, False),  # no reading
    ((0.0, 0, 0.03), 0.0, False),  # within the tolerance of 'no reading'
    ((0.0, 0, -2), 2.0, False),  # behind the camera
    ((0.0, 0, 0), 2.0, False),  # in the camera
    ((0.805, 0, 2), 2.0, True),  # column 80.25, the last pixel
    ((0.815, 0, 2), 2.0, False),  # column 80.75, beyond it
    ((-0.805, 0, 2), 2.0, True),  # column -0.25, the first pixel
    ((-0.815, 0, 2), 2.0, False),
    ((0.0, 0.505, 2), 2.0, True),  # row 60.3
    ((0.0, 0.515, 2), 2.0, False),
    ((0.0, -0.515, 2), 2.0, False),
])
def test_a_point_is_seen_only_in_front_inside_and_at_the_measured_depth(point, reading, seen):
    depth = torch.full((1, HEIGHT, WIDTH), reading)
    links = link_views(torch.tensor([point]), torch.eye(4)[None], INTRINSICS[None], depth)  # tolerance 5 cm
    assert len(links.point) == int(seen)


def test_the_depth_of_the_nearest_pixel_decides():
    depth = torch.zeros(1, HEIGHT, WIDTH)
    depth[0, 31, 42] = 2.0
    points = torch.tensor([[0.04, 1 / 60, 2], [0.048, 1 / 60, 2], [0.052, 1 / 60, 2], [0.04, 0.8 / 120, 2]])
    links = link_views(points, torch.eye(4)[None], INTRINSICS[None], depth)  # columns 42, 42.4, 42.6; row 30.4
    assert links.point.tolist() == [0, 1]


@pytest.mark.parametrize("scenes", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_links_agree_with_a_slow_loop_with_and_without_depth_maps_and_several_scenes(measured, scenes):
    world_to_camera, intrinsics = random_cameras(4, seed=5)
    generator = torch.Generator().manual_seed(6)
    points = 1.5 * torch.randn(2000, 3, generator=generator)
    depth = torch.rand(4, HEIGHT, WIDTH, generator=generator) * 4
    depth[torch.rand(depth.shape, generator=generator) < 0.2] = 0
    # scenes that alternate: neither points nor views are in their order
    batch = {"point_batch": torch.arange(2000) % 2, "view_batch": torch.tensor([0, 1, 1, 0])} if scenes else {}
    depth = depth if measured else None
    links = link_views(points, world_to_camera, intrinsics, depth, image_size=(WIDTH, HEIGHT), tolerance=0.8, **batch)
    expected = slow_links(points, world_to_camera, intrinsics, depth, 0.8, **batch)
    assert len(expected) > 20
    assert list(zip(links.point.tolist(), links.view.tolist())) == [pair[:2] for pair in expected]
    assert torch.allclose(links.uv, torch.tensor([pair[2:] for pair in expected]), atol=2e-3)
    for view in range(4):
        uv, _ = project_points(points, world_to_camera[view], intrinsics[view])
        here = links.view == view
        assert torch.allclose(links.uv[here], uv[links.point[here]], atol=2e-3)


def test_links_keep_full_precision_under_autocast():
    (world_to_camera, intrinsics), points = random_cameras(4, seed=5), 1.5 * torch.randn(800, 3)
    expected = link_views(points, world_to_camera, intrinsics, image_size=(WIDTH, HEIGHT))
    with torch.autocast("cpu", torch.bfloat16):
        links = link_views(points, world_to_camera, intrinsics, image_size=(WIDTH, HEIGHT))
    assert len(expected.uv) and torch.equal(links.uv, expected.uv)


def test_linking_many_points_to_many_views_takes_little_memory():
    code = """if True:
        import resource, torch
        from fusion import link_views
        torch.set_num_threads(1)
        points = torch.rand(300_000, 3)[torch.rand(300_000).argsort()]
        pose = torch.eye(4).repeat(200, 1, 1)
        pose[:, 2, 3] = 1
        intrinsics = torch.tensor([[4., 0, 31.5], [0, 4., 23.5], [0, 0, 1]]).repeat(200, 1, 1)
        depth = torch.full((200, 48, 64), 9.0)  # every point projects into every view, and none agrees with the depth
        link_views(points[:100], pose[:2], intrinsics[:2], depth[:2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(link_views(points, pose, intrinsics, depth).point) == 0
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, check=True)
    assert float(done.stdout) < 229 / 2  # MB; one (N, V) matrix of floats has 229


def test_far_from_the_origin_a_point_meets_its_pixel_and_one_that_is_not_finite_is_unseen_and_hides_no_other():
    shift, world_to_camera = torch.tensor([40.0, -60, 3]), torch.eye(4)
    world_to_camera[:3, 3] = -shift
    points = torch.tensor([[0.3, 0.2, 2]]).repeat(7, 1) + shift
    points[1, 0], points[3, 2], points[5, 1] = torch.nan, torch.inf, -torch.inf
    links = link_views(points, world_to_camera[None], INTRINSICS[None], torch.full((1, HEIGHT, WIDTH), 2.0))
    assert links.point.tolist() == [0, 2, 4, 6]
    assert torch.allclose(links.uv, torch.tensor([55.0, 42]), atol=5e-3)


@pytest.mark.parametrize(("views", "num_points"), [(0, 5), (2, 0), (0, 0), (1, 2)])
def test_no_view_no_point_or_no_visible_point_gives_no_link_zero_features_and_a_zero_gradient(views, num_points):
    points = torch.tensor([[0.0, 0, -1], [9, 9, 1]])[torch.arange(num_points) % 2]  # behind the camera, beside it
    links = link_views(points, torch.eye(4).repeat(views, 1, 1), INTRINSICS.repeat(views, 1, 1),
                       torch.ones(views, HEIGHT, WIDTH))
    assert len(links.point) == len(links.view) == len(links.uv) == 0
    maps = torch.randn(views, 6, 4, 5, requires_grad=True)
    feat, seen = sample_views(maps, links, (WIDTH, HEIGHT), num_points)
    assert feat.shape == (num_points, 6) and not feat.any() and not seen.any()
    feat.sum().backward()
    assert not maps.grad.any()


def made_up_links(num_points, views, width, height, seed=0):
    """Links at random pixels, some on the outermost half pixel; about half of all pairs."""
    generator = torch.Generator().manual_seed(seed)
    pairs = (torch.rand(num_points, views, generator=generator) < 0.5).nonzero()
    uv = torch.rand(len(pairs), 2, generator=generator) * torch.tensor([width, height]) - 0.5
    return Links(pairs[:, 0], pairs[:, 1], uv.double())


def slow_sample(maps, links, image_size, num_points):
    """Bilinear sampling with repeated borders and the mean over views, one link after the other."""
    _, channels, h, w = maps.shape
    total, count = torch.zeros(num_points, channels, dtype=maps.dtype), torch.zeros(num_points)
    for n, v, (u, r) in zip(links.point.tolist(), links.view.tolist(), links.uv.tolist()):
        x = min(max((u + 0.5) * w / image_size[0] - 0.5, 0), w - 1)
        y = min(max((r + 0.5) * h / image_size[1] - 0.5, 0), h - 1)
        x0, y0 = math.floor(x), math.floor(y)
        x1, y1 = min(x0 + 1, w - 1), min(y0 + 1, h - 1)
        fx, fy = x - x0, y - y0
        value = ((1 - fx) * (1 - fy) * maps[v, :, y0, x0] + fx * (1 - fy) * maps[v, :, y0, x1]
                 + (1 - fx) * fy * maps[v, :, y1, x0] + fx * fy * maps[v, :, y1, x1])
        total[n] += value
        count[n] += 1
    return total / count.clamp(min=1)[:, None], count > 0


@pytest.mark.parametrize("map_size", [(48, 64), (12, 16), (5, 7), (1, 1)])
def test_sampling_agrees_with_a_slow_loop_and_is_the_mean_over_views(map_size):
    maps = torch.randn(3, 4, *map_size, dtype=torch.float64)
    links = made_up_links(40, 3, 64, 48)
    feat, seen = sample_views(maps, links, (64, 48), 40)
    expected, expected_seen = slow_sample(maps, links, (64, 48), 40)
    assert torch.allclose(feat, expected, atol=1e-12)
    assert torch.equal(seen, expected_seen) and 0 < seen.sum() < 40
    assert not feat[~seen].any()


def test_gradient_of_sampling_is_the_numerical_one():
    links = made_up_links(6, 2, 8, 6)
    maps = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: sample_views(m, links, (8, 6), 6)[0], (maps,))


def test_standardise_gives_unit_rms_and_forgets_the_scale_of_its_input():
    standardise = Standardise(32, 16)
    feat = torch.randn(200, 32)
    reference = standardise(feat)
    assert torch.allclose(reference.square().mean(1), torch.ones(200), atol=1e-4)
    for scale, tolerance in ((1e-4, 0.3), (1e-2, 1e-3), (1e2, 1e-4), (1e4, 1e-4)):
        assert torch.allclose(standardise(scale * feat), reference, atol=tolerance)


def test_standardise_keeps_rows_of_zeros_with_a_finite_gradient_and_says_which_width_it_expects():
    standardise, feat = Standardise(8, 4), torch.zeros(3, 8, requires_grad=True)
    out = standardise(feat)
    out.sum().backward()
    assert not out.any() and torch.isfinite(feat.grad).all()
    with pytest.raises(ValueError, match="features have 7 channels, expected 8"):
        standardise(torch.randn(3, 7))


def test_every_gate_starts_at_one_half_where_seen_and_is_zero_elsewhere():
    seen = torch.tensor([True, False, True, False])
    for gate in (SimpleFusion(), LiteFusionGate(8)):
        assert torch.equal(gate(torch.randn(4, 8), torch.randn(4, 8), seen), torch.tensor([0.5, 0, 0.5, 0]))


def test_blend_is_the_weighted_mean_and_exact_at_zero():
    feat_2d, feat_3d, alpha = torch.randn(50, 8), torch.randn(50, 8), torch.rand(50)
    expected = alpha[:, None] * feat_2d + (1 - alpha[:, None]) * feat_3d
    assert torch.allclose(blend(feat_2d, feat_3d, alpha), expected, atol=1e-6)
    assert torch.equal(blend(feat_2d, feat_3d, torch.zeros(50)), feat_3d)


def test_gate_and_blend_work_under_bf16_autocast():
    gate, feat_2d, feat_3d, seen = LiteFusionGate(8), torch.randn(50, 8), torch.randn(50, 8), torch.rand(50) < 0.8
    torch.nn.init.normal_(gate.mlp[-1].weight)
    expected = blend(feat_2d, feat_3d, gate(feat_2d, feat_3d, seen))
    with torch.autocast("cpu", torch.bfloat16):
        alpha = gate(feat_2d, feat_3d, seen)
        fused = blend(feat_2d, feat_3d, alpha)
    assert alpha.dtype == torch.bfloat16 and fused.dtype == torch.float32
    assert 0 < (fused - expected).abs().max() < 0.1
    assert torch.equal(fused[~seen], feat_3d[~seen])


def test_film_gives_both_branches_the_same_modulation_and_reads_geometry_alone():
    film = FiLM(8)
    for parameter in film.parameters():
        torch.nn.init.normal_(parameter)
    coord, normal = torch.randn(20, 3), F.normalize(torch.randn(20, 3), dim=1)
    feat = torch.randn(20, 8)
    a, b = film(feat, feat, coord, normal)
    assert torch.equal(a, b)
    zero, one = film(torch.zeros(20, 8), torch.ones(20, 8), coord, normal)  # beta, 1 + gamma + beta
    other, _ = film(feat, torch.randn(20, 8), coord, normal)
    assert torch.equal(other, a)  # what stands on the other side changes nothing
    assert torch.allclose(a, (one - zero) * feat + zero, atol=1e-4)
    moved, _ = film(feat, feat, coord + 0.7, normal)
    assert not torch.allclose(moved, a)
    code = geometry_code(torch.rand(20, 3) * torch.tensor([10.0, 10, 3]) - torch.tensor([5.0, 5, 0]), normal)
    assert code.shape == (20, GEOMETRY_CHANNELS) and code.abs().max() <= 3


def test_fusion_stats_count_seen_voxels_only():
    feat_2d, feat_3d = torch.tensor([[3.0, 4], [9, 9]]), torch.tensor([[4.0, 3], [7, 7]])
    stats = fusion_stats(feat_2d, feat_3d, torch.tensor([0.25, 0.0]), torch.tensor([True, False]))
    assert stats["seen_share"] == 0.5 and stats["fusion_2d_ratio"] == 0.25
    assert stats["rms_2d"] == pytest.approx(math.sqrt(12.5))
    assert stats["cosine"] == pytest.approx(24 / 25)
    nothing = fusion_stats(feat_2d, feat_3d, torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert nothing == {"seen_share": 0.0, "fusion_2d_ratio": None, "rms_2d": None, "rms_3d": None, "cosine": None}


@pytest.mark.gpu
def test_links_and_samples_are_the_same_on_a_gpu():
    world_to_camera, intrinsics = random_cameras(4, seed=5)
    points, depth, maps = torch.randn(300, 3), torch.rand(4, HEIGHT, WIDTH) * 2, torch.randn(4, 8, 15, 20)
    here = link_views(points, world_to_camera, intrinsics, depth, tolerance=0.5)
    there = link_views(points.cuda(), world_to_camera.cuda(), intrinsics.cuda(), depth.cuda(), tolerance=0.5)
    assert torch.equal(here.point, there.point.cpu())
    feat, _ = sample_views(maps, here, (WIDTH, HEIGHT), 300)
    feat_gpu, _ = sample_views(maps.cuda(), there, (WIDTH, HEIGHT), 300)
    assert torch.allclose(feat, feat_gpu.cpu(), atol=1e-3)
