"""bench.py runs, and its step is a training step. Nothing here is timed."""

from unittest import mock

import pytest

from experiments import bench


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def setup(request, tmp_path_factory):
    """A Setup of the preset base, of some thousand voxels, four small views and tiny networks."""
    tiny = bench.PRESETS["small"] | {
        "unet": {"stem": 8, "encoder": (8, 16), "encoder_blocks": (1, 1), "decoder": (16, 8), "decoder_blocks": (1, 1)}}
    with mock.patch.dict(bench.PRESETS, base=tiny), mock.patch.object(bench, "VOXEL_SIZE", 0.2), \
            mock.patch.dict(bench.train.RECIPES["base"], image_size=(64, 48), batch_size=1, views=4):
        yield bench.Setup(tmp_path_factory.mktemp("bench"), "base", request.param)


def test_the_batch_is_a_room_whose_voxels_touch_and_are_seen(setup):
    batch = setup.batch
    assert 1000 < len(batch["coord"]) < 10_000 and batch["image"].shape == (4, 3, 48, 64)
    assert setup.cached["image"].shape == (4, 3, 0, 0) and setup.cached["level_0"].shape[:1] == (4,)
    cells = {tuple(cell) for cell in batch["grid_coord"].tolist()}
    near = sum((x + 1, y, z) in cells for x, y, z in cells) + sum((x, y + 1, z) in cells for x, y, z in cells)
    assert near > 0.8 * len(cells)  # a surface, not dust
    assert len(batch["superpoint_instance"]) > 5 and len(batch["instance_label"]) > 0
    assert setup.model("bifusion").encode_2d(batch)[1].sum() > 100


def test_a_step_of_a_frozen_tower_reads_its_maps_and_takes_every_weight_of_the_row_on(setup):
    for row, frozen in zip(bench.ROWS, (True, True, False, False), strict=True):
        step, model, batch = setup.step("bifusion", row)
        before = {name: value.clone() for name, value in model.named_parameters()}
        step()
        assert (batch is setup.cached) == frozen
        moved = {part for part, own in model.parts().items() for name, p in model.named_parameters()
                 if any(p is one for one in own) and not p.equal(before[name])}
        assert moved == set(row.trains)


def test_every_row_of_the_table_is_made(setup):
    def seconds(*functions):
        for function in functions:
            function()
        return [0.5] * len(functions)

    with mock.patch.object(bench, "seconds", seconds), mock.patch.object(bench, "ROWS", bench.ROWS[::3]):
        rows = [row for rows in bench.BENCHES.values() for row in rows(setup)]
    text = "\n".join(" ".join(row) for row in rows)
    for words in ("stage 1, stability 500.0 ms 500.0 ms baseline x 1.00", "stage 3: 2D branch, forward 500.0 ms 100.0%",
                  "stage 3: whole step", "predict"):
        assert words in text
    shares = [float(share[:-1]) for name, _, share, _ in rows if "::" in name]  # of the operations
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1 and "nan" not in text
