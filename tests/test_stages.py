"""Tests of stages.py: the curriculum's table, ramp, plans, rates and clip."""

import pytest
import torch
from torch import nn

from stages import (
    INSTANCE,
    PARTS,
    PLAN_B,
    PLANS,
    RAMP,
    STAGES,
    apply_setting,
    clip_by_branch,
    parameter_groups,
    set_rates,
    setting_at,
    stage_epochs,
)

EPOCHS = 129
MOMENTS = [epoch + share for epoch in range(EPOCHS) for share in (0.0, 0.5, 0.99)]


class PartsModel(nn.Module):
    """One small linear layer a part."""

    def __init__(self, names=tuple(PARTS)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 2) for _ in names)
        self.names = names

    def parts(self):
        return {name: list(layer.parameters()) for name, layer in zip(self.names, self.layers)}

    def loss(self, factors):
        return sum(f * (layer(torch.ones(4, 3)) ** 2).sum() for f, layer in zip(factors, self.layers))


def test_stages_take_the_documented_epochs():
    assert stage_epochs() == {1: (0, 20), 2: (21, 60), 3: (61, 128)}
    assert [setting_at(epoch).stage for epoch in range(EPOCHS)] == [1] * 21 + [2] * 40 + [3] * 68


@pytest.mark.parametrize("compress", [1, 1.5, 2, 6, 43, 129, 1e9, float("inf")])
def test_compress_divides_every_stage_and_leaves_each_an_epoch(compress):
    bounds = stage_epochs(compress)
    start = 0
    for number, length in ((1, 21), (2, 40), (3, 68)):
        first, last = bounds[number]
        assert first == start
        assert last - first + 1 == max(1, round(length / compress))
        start = last + 1
    for epoch in range(start):
        assert bounds[setting_at(epoch, compress).stage][0] <= epoch


@pytest.mark.parametrize("compress", [0.5, 0, -2, float("nan")])
def test_compress_below_one_is_refused(compress):
    with pytest.raises(ValueError, match="must be at least 1"):
        stage_epochs(compress)


@pytest.mark.parametrize("epoch", [-1, -0.01, EPOCHS, 1000])
def test_an_epoch_outside_the_curriculum_is_refused(epoch):
    with pytest.raises(ValueError, match="outside the curriculum of 129 epochs"):
        setting_at(epoch)


def test_an_unknown_plan_is_refused_with_the_choices():
    with pytest.raises(KeyError, match=r"unknown plan 'C'.*'A', 'B', 'full'"):
        setting_at(0, plan="C")


def test_stage_one_trains_3d_alone_with_the_semantic_loss():
    for epoch in (0, 10, 20.99):
        setting = setting_at(epoch)
        assert (setting.parts, setting.losses, setting.fusion, setting.ramp, setting.film) == (
            ("3d",), ("semantic",), "identity", 0.0, False)


def test_the_ramp_rises_steadily_from_zero_over_five_epochs_of_simple_fusion():
    assert [setting_at(21 + e).ramp for e in range(7)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    fine = [setting_at(21 + e / 50).ramp for e in range(400)]
    assert fine[0] == 0
    assert all(0 <= b - a <= 0.00401 for a, b in zip(fine, fine[1:]))
    assert RAMP * 40 == 5


def test_fusion_is_simple_then_learned_and_film_comes_in_stage_two():
    assert [setting_at(e).fusion for e in (20.99, 21, 40.99, 41, 60.99, 61, 128.99)] == [
        "identity", "simple", "simple", "learned", "learned", "learned", "learned"]
    assert [setting_at(e).film for e in (20.99, 21, 41, 61)] == [False, True, True, True]
    assert all(setting_at(e).ramp == 1 for e in MOMENTS if e >= 26)


@pytest.mark.parametrize("compress", [1, 5.375, 6, 43, 129])
@pytest.mark.parametrize("pretrained", [False, True])
def test_what_is_used_trains_and_what_is_not_used_does_not(compress, pretrained):
    last = stage_epochs(compress)[3][1]
    for epoch in range(last + 1):
        for moment in (epoch, epoch + 0.5):
            setting = setting_at(moment, compress, pretrained=pretrained)
            assert ("gate" in setting.parts) == (setting.fusion == "learned")
            assert ("film" in setting.parts) == setting.film == (setting.fusion != "identity")
            assert ("2d" in setting.parts) == ("alignment" in setting.losses) == (setting.fusion != "identity")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pretrained", [False, True])
def test_parts_and_losses_are_known_ones_at_every_moment(plan, pretrained):
    for epoch in MOMENTS:
        setting = setting_at(epoch, plan=plan, pretrained=pretrained)
        assert set(setting.parts) <= set(PARTS)
        assert len(set(setting.parts)) == len(setting.parts)
        assert set(setting.losses) <= {"semantic", *INSTANCE, "alignment", "gate"}
        assert setting.clip == 1.0


def test_a_pretrained_tower_is_frozen_until_its_ends_train_slowly_in_stage_three():
    for epoch in MOMENTS:
        setting = setting_at(epoch, pretrained=True)
        assert "tower" not in setting.parts
        assert ("tower_ends" in setting.parts) == (setting.stage == 3)
    assert 0 < setting_at(61, pretrained=True).tower_rate <= 0.1


def test_a_tower_from_scratch_trains_whole_at_the_base_rate_from_stage_two_on():
    for epoch in MOMENTS:
        setting = setting_at(epoch)
        assert ({"tower", "tower_ends"} <= set(setting.parts)) == (setting.stage > 1)
        assert setting.stage == 1 or setting.tower_rate == 1.0


def test_plan_a_is_stage_one_throughout():
    first = setting_at(0)
    for epoch in MOMENTS:
        setting = setting_at(epoch, plan="A")
        assert (setting.parts, setting.losses, setting.fusion, setting.ramp, setting.film, setting.tower_rate) == (
            first.parts, first.losses, "identity", 0.0, False, 0.0)
        assert setting.stage == setting_at(epoch).stage


def test_plan_b_is_the_curriculum_with_careful_numbers():
    assert PLAN_B == {"clip": 1.0, "lr": 1e-5, "weight_decay": 1e-6}
    for epoch in MOMENTS:
        assert setting_at(epoch, plan="B") == setting_at(epoch)


@pytest.mark.parametrize("epoch", [0, 21, 41, 61])
@pytest.mark.parametrize("pretrained", [False, True])
def test_exactly_the_parts_of_a_setting_ask_for_a_gradient(epoch, pretrained):
    model, setting = PartsModel(), setting_at(epoch, pretrained=pretrained)
    apply_setting(model, setting_at(128))  # whatever held before
    apply_setting(model, setting)
    assert model.setting == setting
    for name, parameters in model.parts().items():
        assert all(p.requires_grad == (name in setting.parts) for p in parameters)


def test_a_model_with_an_unknown_part_is_refused():
    with pytest.raises(KeyError, match=r"'wheels'.*'film'"):
        apply_setting(PartsModel(("3d", "wheels")), setting_at(0))


def test_rates_follow_the_stage_and_biases_are_not_decayed():
    model = PartsModel()
    groups = parameter_groups(model, lr=1.0, weight_decay=0.3)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])
    optimizer = torch.optim.SGD(groups)
    set_rates(optimizer, setting_at(61, pretrained=True), 0.5)
    rate = STAGES[3].tower_rate
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.5 * (rate if group["name"] in ("tower", "tower_ends") else 1))
    set_rates(optimizer, setting_at(61), 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_empty_parts_make_no_group():
    model = PartsModel()
    model.parts = lambda: {"3d": list(model.layers[0].parameters()), "film": []}
    assert {g["name"] for g in parameter_groups(model, 1.0, 0.1)} == {"3d"}
    assert clip_by_branch(model, 1.0) == {}


def test_a_burst_in_one_branch_does_not_change_the_step_of_another():
    steps = {}
    for burst in (1.0, 1e6):
        model = PartsModel()
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1, 0.0))
        before = [p.detach().clone() for p in model.parameters()]
        factors = [burst if PARTS[name] == "2d" else 1.0 for name in model.names]
        model.loss(factors).backward()
        norms = clip_by_branch(model, 1.0)
        optimizer.step()
        assert set(norms) == {"3d", "decoder", "2d", "fusion"}
        assert norms["2d"] > 1e5 * burst / 1e6
        moved = {"3d": [], "decoder": [], "2d": [], "fusion": []}
        for name, layer, old in zip(model.names, model.layers, zip(before[::2], before[1::2])):
            moved[PARTS[name]] += [p.detach() - o for p, o in zip(layer.parameters(), old)]
        steps[burst] = moved
    for branch in ("3d", "decoder", "fusion"):
        assert all(torch.equal(a, b) for a, b in zip(steps[1.0][branch], steps[1e6][branch]))
    for moved in steps.values():
        for step in moved.values():
            assert torch.cat([s.flatten() for s in step]).norm() <= 0.1 * 1.001  # rate times the clip


def test_clip_returns_the_norm_before_clipping_of_the_branches_that_have_a_gradient():
    model = PartsModel()
    apply_setting(model, setting_at(0))
    model.loss([100.0] * len(PARTS)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.layers[0].parameters()]).norm()
    norms = clip_by_branch(model, 1.0)
    assert set(norms) == {"3d"}
    assert torch.allclose(norms["3d"], expected)
    assert torch.cat([p.grad.flatten() for p in model.layers[0].parameters()]).norm() <= 1.001


def test_a_gradient_below_the_clip_is_left_as_it_is():
    model = PartsModel()
    model.loss([1e-4] * len(PARTS)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    clip_by_branch(model, 1.0)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before))
