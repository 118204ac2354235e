"""bench.py runs, and its parts of a step add up. Nothing here is timed."""

from unittest import mock

import pytest
from torch.autograd.profiler_util import FunctionEvent

from experiments import bench
from fusion import link_views


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def setup(request, tmp_path_factory):
    """A Setup of the preset base, of 1,500 voxels, two small views and tiny networks."""
    tiny = bench.networks.PRESETS["small"] | {
        "unet": {"stem": 8, "encoder": (8, 16), "encoder_blocks": (1, 1), "decoder": (16, 8), "decoder_blocks": (1, 1)}}
    with mock.patch.dict(bench.SIZES, {("base", request.param): (1, 1500, 2)}), \
            mock.patch.dict(bench.networks.PRESETS, base=tiny), \
            mock.patch.dict(bench.train.RECIPES["base"], image_size=(64, 48)):
        yield bench.Setup(tmp_path_factory.mktemp("bench"), "base", request.param)


def test_the_batch_is_a_dense_room_that_its_views_see(setup):
    batch = setup.batch
    assert 1200 < len(batch["coord"]) < 2500 and batch["image"].shape == (2, 3, 48, 64)
    assert setup.cached["image"].shape == (2, 3, 0, 0) and setup.cached["level_0"].shape[:1] == (2,)
    cells = {tuple(cell) for cell in batch["grid_coord"].tolist()}
    near = sum((x + 1, y, z) in cells for x, y, z in cells) + sum((x, y + 1, z) in cells for x, y, z in cells)
    assert near > 0.8 * len(cells)  # a surface, not dust
    assert len(batch["superpoint_instance"]) > 5 and len(batch["instance_label"]) > 0
    assert len(link_views(*(batch[key] for key in ("world_coord", "world_to_camera", "intrinsics", "depth"))).point)


def test_the_parts_of_a_step_add_up_to_the_whole(setup):
    """Of CPU time; on a GPU of the kernels."""
    totals = []

    class Kept(bench.profile):
        def __exit__(self, *exception):
            super().__exit__(*exception)
            totals.extend(e.cpu_time_total / 1e6 for e in self.events() if e.name == "rest" and e.cpu_parent is None)

    with mock.patch.object(bench, "profile", Kept):
        split = bench.split_step(*setup.step("bifusion", bench.ROWS[3]), setup.device)
    whole, cpu = sum(cost["forward"] + cost["backward"] for cost in split.values()), setup.device == "cpu"
    assert not cpu or whole == pytest.approx(totals[0], rel=1e-3)
    for part, cost in split.items():
        assert cost["product"] + cost["gather"] <= (cost["forward"] + cost["backward"]) * (1 + 1e-6)
        assert cost["forward"] > 0 and (cost["backward"] > 0) == (part != "optimiser")
        assert (cost["gather"] > 0) == (cpu and part == "sparse U-Net")
    assert all(split[part]["product"] > 0 for part in ("image tower", "sparse U-Net", "decoder", "rest"))


def test_the_backward_of_a_part_is_that_of_its_own_operations(setup):
    """Less of the tower trains in stage 2 than in stage 3; in stage 1 neither tower nor decoder does anything."""
    with mock.patch.object(FunctionEvent, "self_cpu_time_total", 1e6):  # a second each: operations are counted
        alone, frozen, trained = (bench.split_step(*setup.step("bifusion", bench.ROWS[i]), "cpu") for i in (0, 2, 3))
    assert 0 < frozen["image tower"]["product"] < trained["image tower"]["product"]
    assert alone["decoder"] == alone["image tower"] == alone["sampling"] == dict.fromkeys(alone["rest"], 0.0)


def test_every_row_of_the_table_is_made(setup):
    def seconds(*functions):
        for function in functions:
            function()
        return [0.5] * len(functions)

    cost = {"forward": 1.0, "backward": 3.0, "product": 2.0, "gather": 1.0}
    with mock.patch.object(bench, "seconds", seconds), mock.patch.object(bench, "ROWS", bench.ROWS[::3]), \
            mock.patch.object(bench, "split_step", lambda *_: dict.fromkeys(bench.PARTS, cost)):
        text = "\n".join(" ".join(row) for rows in bench.BENCHES.values() for row in rows(setup))
    for words in ("stage 1, stability 500.0 ms 500.0 ms baseline x 1.00", "memory", "project", "AP", "predict",
                  "stage 3: all 28000.0 ms 100.0% 14000.0 ms products forward 7000.0 ms", "ms, 25.0% neither"):
        assert words in text
    assert "nan" not in text
