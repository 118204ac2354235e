"""Tests of stages.py: the curriculum's table, ramp, plans, rates and clip."""

import dataclasses

import pytest
import torch
from torch import nn

from stages import (CURRICULUM, INSTANCE, PARTS, PLAN_B, PLANS, apply_row, clip_by_branch, curriculum, parameter_groups,
                    row_at, set_rates, stage_epochs)

MOMENTS = [epoch + share for epoch in range(129) for share in (0.0, 0.5, 0.99)]


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


def test_the_table_is_what_the_design_says():
    assert stage_epochs(CURRICULUM) == {1: (0, 20), 2: (21, 60), 3: (61, 128)}
    assert [(row.first_epoch, row.fusion, row.film) for row in CURRICULUM] == [
        (0, "identity", False), (21, "simple", True), (41, "learned", True), (61, "learned", True)]
    stability, fixed, learned, enhancement = CURRICULUM
    assert (stability.trains, stability.losses) == (("3d",), ("semantic",))
    assert set(fixed.losses) == {"semantic", *INSTANCE, "alignment"}
    assert set(learned.losses) == set(enhancement.losses) == {*fixed.losses, "gate"}
    assert [row.blank for row in CURRICULUM] == [0, 0, 0, 0.1]
    assert curriculum() == CURRICULUM


@pytest.mark.parametrize("compress", [1, 1.5, 2, 5.375, 6, 8, 43, 129, 1e9, float("inf")])
def test_compress_divides_every_end_and_leaves_each_row_an_epoch(compress):
    rows, first = curriculum(compress), 0
    for row, whole in zip(rows, CURRICULUM):
        assert row.first_epoch == first <= row.last_epoch
        assert abs(row.last_epoch + 1 - (whole.last_epoch + 1) / compress) <= (0.5 if compress <= 8 else 4)
        assert row.ramp_epochs == whole.ramp_epochs / compress
        assert row_at(rows, row.first_epoch) == row_at(rows, row.last_epoch + 0.99) == row
        first = row.last_epoch + 1


@pytest.mark.parametrize(("ask", "said"), [
    *[(lambda value=value: curriculum(value), "must be at least 1") for value in (0.5, 0, -2, float("nan"))],
    *[(lambda epoch=epoch: row_at(CURRICULUM, epoch), "outside the curriculum of 129 epochs")
      for epoch in (-1, -0.01, 129, 1000)],
    (lambda: curriculum(plan="C"), r"unknown plan 'C'.*'A', 'B', 'full'"),
    (lambda: apply_row(PartsModel(("3d", "wheels")), CURRICULUM[0]), r"'wheels'.*'film'")])
def test_a_length_epoch_plan_or_part_that_cannot_be_is_refused_with_the_choices(ask, said):
    with pytest.raises((KeyError, ValueError), match=said):
        ask()


def test_the_ramp_rises_steadily_from_zero_over_five_epochs_and_is_over_then():
    def ramp(moment):
        return row_at(CURRICULUM, moment).ramp(moment)

    assert [ramp(21 + e) for e in range(7)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    fine = [ramp(21 + e / 50) for e in range(400)]
    assert all(0 <= b - a <= 0.00401 for a, b in zip(fine, fine[1:]))
    assert all(ramp(moment) == (0 if moment < 21 else 1) for moment in MOMENTS if not 21 <= moment < 26)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pretrained", [False, True])
def test_what_is_used_trains_and_what_is_not_used_does_not(plan, pretrained):
    for row in curriculum(plan=plan, pretrained=pretrained):
        assert ("gate" in row.trains) == (row.fusion == "learned") == ("gate" in row.losses)
        assert ("film" in row.trains) == row.film == (row.fusion != "identity")
        assert ("2d" in row.trains) == ("alignment" in row.losses) == (row.fusion != "identity")
        assert set(row.trains) <= set(PARTS)
        assert set(row.losses) <= {"semantic", *INSTANCE, "alignment", "gate"}
        assert row.clip == 1.0


@pytest.mark.parametrize(("flag", "rate"), [(None, 0.1), (0.03, 0.03), (0.0, 0.0)])
def test_a_pretrained_tower_is_frozen_until_all_of_it_trains_at_the_towers_rate_from_epoch_41_on(flag, rate):
    for row in curriculum(tower_rate=flag):
        assert ("tower" in row.trains) == (row.first_epoch >= 41)
        assert row.tower_rate == (rate if row.first_epoch >= 41 else 0)


def test_a_tower_from_scratch_trains_whole_at_the_base_rate_from_stage_two_on():
    for row in curriculum(pretrained=False, tower_rate=0.03):
        assert ("tower" in row.trains) == (row.stage > 1)
        assert row.tower_rate == (1 if row.stage > 1 else 0)


def test_plan_a_is_stage_one_throughout_and_plan_b_has_careful_numbers():
    for row, whole in zip(curriculum(plan="A"), CURRICULUM):
        assert (row.trains, row.losses, row.fusion, row.ramp(row.last_epoch)) == (("3d",), ("semantic",), "identity", 0)
        assert (row.stage, row.first_epoch, row.last_epoch) == (whole.stage, whole.first_epoch, whole.last_epoch)
    assert PLAN_B == {"clip": 1.0, "lr": 1e-5, "weight_decay": 1e-6}
    assert curriculum(plan="B") == CURRICULUM


@pytest.mark.parametrize("row", [*CURRICULUM, *curriculum(pretrained=False)])
def test_exactly_the_parts_of_a_row_ask_for_a_gradient(row):
    model = PartsModel()
    apply_row(model, CURRICULUM[-1])  # whatever held before
    apply_row(model, row)
    assert model.row == row
    for name, parameters in model.parts().items():
        assert all(p.requires_grad == (name in row.trains) for p in parameters)


def test_rates_follow_the_row_and_biases_are_not_decayed():
    model = PartsModel()
    groups = parameter_groups(model, lr=1.0, weight_decay=0.3)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])
    optimizer = torch.optim.SGD(groups)
    set_rates(optimizer, dataclasses.replace(CURRICULUM[-1], tower_rate=0.2), 0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx({"tower": 0.1, "decoder": 0.05}.get(group["name"], 0.5))


def test_the_rate_of_a_part_rises_from_the_step_in_which_it_joins_and_goes_on_so_after_a_resume():
    model, rates = PartsModel(), []
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0, 0.0))
    for epoch in (0, 0, 70, 70, 70, 70, 0, 70):
        set_rates(optimizer, row_at(CURRICULUM, epoch), 0.8, warm_up=4)
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        state, optimizer = optimizer.state_dict(), torch.optim.SGD(parameter_groups(model, 1.0, 0.0))
        optimizer.load_state_dict(state)
    assert [rate["3d"] for rate in rates] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
    assert [rate["gate"] for rate in rates[2:6]] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[2]["tower"] == pytest.approx(0.2 * CURRICULUM[-1].tower_rate)
    set_rates(optimizer, CURRICULUM[-1], 0.8, warm_up=0.5)  # shorter than a step: none
    assert {group["lr"] for group in optimizer.param_groups} == {0.8, 0.1 * 0.8}


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
        model.loss([burst if PARTS[name] == "2d" else 1.0 for name in model.names]).backward()
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
    for step in (step for moved in steps.values() for step in moved.values()):
        assert torch.cat([s.flatten() for s in step]).norm() <= 0.1 * 1.001  # rate times the clip


def test_clip_returns_the_norm_before_clipping_and_leaves_a_gradient_below_it_alone():
    model = PartsModel()
    apply_row(model, CURRICULUM[0])
    for factor, clipped in ((100.0, True), (1e-4, False)):
        model.zero_grad()
        model.loss([factor] * len(PARTS)).backward()
        before = torch.cat([p.grad.flatten() for p in model.layers[0].parameters()])
        norms = clip_by_branch(model, 1.0)
        after = torch.cat([p.grad.flatten() for p in model.layers[0].parameters()])
        assert set(norms) == {"3d"} and torch.allclose(norms["3d"], before.norm())
        assert after.norm() <= 1.001 and torch.equal(before, after) == (not clipped)
