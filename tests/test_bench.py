"""What bench.py compares computes the same. Nothing here is timed."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from experiments import bench, profile_step
from fusion import link_views, sample_views
from scenes.points import voxelise
from stages import stage_epochs
from train import to_device


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


# ---- the parts of a training step


@pytest.fixture(scope="module")
def tiny_base():
    """Sizes of a step of base of 1,500 voxels, 30 superpoints and two views on any device."""
    with mock.patch.dict(bench.SIZES, dict.fromkeys(bench.SIZES, (1, 1500, 30, 2))), \
            mock.patch.dict(bench.PRESETS, base=bench.PRESETS["small"]):
        yield


def split_of(load, what, stage, device="cpu", **options):
    batch = to_device(load[what](0), device)
    step, model = bench.train_step("bifusion", batch, stage_epochs()[stage][1], device, "base", **options)
    step()
    return profile_step.split_step(step, model, device)


@pytest.fixture(scope="module")
def tiny_loads(tiny_base, tmp_path_factory):
    return bench.training_loads(tmp_path_factory.mktemp("scenes"), "base", "cpu")


def test_the_made_up_scenes_are_whole_training_batches(tiny_loads):
    load, size = tiny_loads
    plain, images, cached = (load[what](0) for what in ("3D only", "images", "cached maps"))
    assert len(plain["image"]) == 0 and images["image"].shape == (2, 3, 240, 320)
    assert cached["image"].shape == (2, 3, 0, 0) and cached["level_0"].shape[:1] == (2,)
    assert torch.equal(plain["grid_coord"], cached["grid_coord"]) and f"{len(plain['coord']):,} voxels" in size
    assert len(images["superpoint_instance"]) == 30 and images["superpoint_instance"].max() > 0
    links = link_views(images["world_coord"], images["world_to_camera"], images["intrinsics"], images["depth"])
    assert len(links.point) > 50


@pytest.mark.parametrize("stage, what", [(2, "cached maps"), (3, "images")])
def test_the_parts_of_a_step_add_up_to_the_whole(tiny_loads, stage, what):
    totals = []
    with mock.patch.object(profile_step, "profile", kept_profiles(totals)):
        split = split_of(tiny_loads[0], what, stage)
    whole = sum(cost["forward"] + cost["backward"] for cost in split.values())
    assert whole == pytest.approx(totals[0], rel=1e-3)
    for part, cost in split.items():
        assert cost["product"] + cost["gather"] <= (cost["forward"] + cost["backward"]) * (1 + 1e-6)
        assert cost["forward"] > 0
        assert (cost["backward"] > 0) == (part != "optimiser")
        assert (cost["gather"] > 0) == (part == "sparse U-Net")
    assert all(split[part]["product"] > 0 for part in ("image tower", "sparse U-Net", "decoder", "rest"))


def kept_profiles(totals):
    """torch.profiler.profile, but the length of the step's range goes into totals."""
    class Kept(profile_step.profile):
        def __exit__(self, *exception):
            super().__exit__(*exception)
            (whole,) = [e for e in self.events() if e.name == "rest"]
            totals.append(whole.cpu_time_total / 1e6)
    return Kept


def test_the_backward_of_a_part_is_that_of_its_own_operations(tiny_loads):
    """A frozen tower has no backward pass but its neck's; nothing of the decoder is left without its losses."""
    load = tiny_loads[0]
    with mock.patch.object(FunctionEvent, "self_cpu_time_total", 1e6):  # a second each: operations are counted
        frozen, trained = (split_of(load, "images", stage)["image tower"]["product"] for stage in (2, 3))
    assert 0 < frozen < trained
    batch = load["images"](0)
    step, model = bench.train_step("bifusion", batch, stage_epochs()[1][1], "cpu", "base")
    split = profile_step.split_step(step, model, "cpu")
    assert split["decoder"] == split["image tower"] == split["sampling"] == dict.fromkeys(split["rest"], 0.0)


@pytest.mark.parametrize("rows", [bench.steps_rows, bench.parts_rows])
def test_the_rows_of_a_step_run(tiny_base, rows):
    text = bench.table(rows("cpu", "base"))
    assert "stage 3" in text and "nan" not in text


@pytest.mark.gpu
def test_the_rows_of_a_step_run_on_a_gpu(tiny_base):
    text = bench.table([*bench.steps_rows("cuda", "base"), *bench.parts_rows("cuda", "base")])
    assert "GPU busy" in text and "bf16" in text and "nan" not in text


@pytest.mark.gpu
def test_the_kernels_of_the_parts_add_up_to_those_of_the_step(tiny_loads):
    split = split_of(tiny_loads[0], "images", 3, "cuda")
    for part in ("image tower", "sparse U-Net", "decoder", "rest"):
        assert 0 < split[part]["product"] < split[part]["forward"] + split[part]["backward"]
    assert split["sparse U-Net"]["gather"] == 0 and split["optimiser"]["forward"] > 0
