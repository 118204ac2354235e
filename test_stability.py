"""The promises of BiFusion about numbers, as tests: nothing blows up, no stage change jolts, no branch is idle.

    pytest test_stability.py        # from scale and gate to a whole curriculum of 24 epochs on generated rooms
"""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train
from experiments import failures
from experiments.report import criteria
from fusion import FiLM, LiteFusionGate, SimpleFusion, Standardise, blend, fusion_stats
from guard import Guard
from losses import LOSS_WEIGHTS, gate_prior, weighted_sum
from stages import INSTANCE, clip_by_branch, curriculum

BEFORE = 1e-6  # of an epoch: the last moment of the row before
WEIGHTS = LOSS_WEIGHTS["bifusion"]
SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)
BAND = (0.3, 0.7)


@pytest.fixture
def logits_at(put):
    """Function: logits of a batch in a row of the curriculum, without a trace in the model."""
    def logits(model, row, batch, training=False, moment=None):
        with torch.no_grad():
            return put(copy.deepcopy(model), row, moment).train(training)(batch)["logits"]
    return logits


@pytest.mark.parametrize("name", failures.FAILURES)
def test_the_disease_shows_without_the_cure_and_not_with_it(name):
    measure, figure, sick, well = failures.FAILURES[name]
    assert figure(cured=False) >= sick > well, f"{measure}: the experiment no longer shows the disease"
    assert figure(cured=True) <= well, measure


@pytest.mark.parametrize("scale_2d", SCALES)
@pytest.mark.parametrize("scale_3d", SCALES)
def test_rms_ratio_of_the_branches_stays_in_range_whatever_the_scale_of_the_inputs(scale_2d, scale_3d):
    feat_2d = Standardise(96, 64)(scale_2d * torch.randn(500, 96))
    feat_3d = Standardise(32, 64)(scale_3d * torch.rand(500, 32))
    stats = fusion_stats(feat_2d, feat_3d, torch.full((500,), 0.5), torch.ones(500, dtype=torch.bool))
    assert 0.5 <= stats["rms_2d"] / stats["rms_3d"] <= 2 and 0.5 <= stats["rms_2d"] <= 2


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("branch", ["2d", "3d"])
def test_a_branch_of_the_model_that_grows_or_fades_does_not_take_over(make_model, make_batch, row, put, branch, factor):
    model = put(make_model(), row(70)).train()
    hook = model.tower if branch == "2d" else model.unet
    hook.register_forward_hook(lambda module, args, out: factor * out)
    stats = model(make_batch())["stats"]
    assert 0.5 <= stats["rms_2d"] / stats["rms_3d"] <= 2


def test_gate_starts_at_one_half_where_seen_and_at_zero_elsewhere(make_model, make_batch, row, put):
    model, batch = make_model(), make_batch()
    for epoch in (30, 50, 70):
        out = put(model, row(epoch))(batch)
        assert 0 < out["seen"].sum() < len(out["seen"])
        assert torch.equal(out["alpha"], 0.5 * out["seen"])


def test_a_trained_gate_still_gives_zero_to_a_voxel_that_no_view_sees(make_model, make_batch, row, train_steps):
    model, batch = make_model(), make_batch()
    train_steps(model, row(70), batch, steps=10)
    out = model(batch)
    assert not out["alpha"][~out["seen"]].any()
    assert out["alpha"][out["seen"]].std() > 0


def test_film_starts_as_the_identity_and_the_fixed_gate_has_nothing_to_learn():
    film = FiLM(16)
    feat_2d, feat_3d = torch.randn(50, 16), torch.randn(50, 16)
    out_2d, out_3d = film(feat_2d, feat_3d, 5 * torch.randn(50, 3), F.normalize(torch.randn(50, 3), dim=1))
    assert torch.equal(out_2d, feat_2d) and torch.equal(out_3d, feat_3d)
    assert not list(SimpleFusion().parameters())


def test_conv1_on_rgbd_gives_the_rgb_towers_output_bit_for_bit_at_the_start():
    from open_clip import OPENAI_DATASET_MEAN as MEAN
    from open_clip import OPENAI_DATASET_STD as STD
    from open_clip.modified_resnet import ModifiedResNet

    from model import ClipTower

    visual = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, width=8).eval()
    rgb_tower = copy.deepcopy(visual)
    tower = ClipTower(visual, 16, MEAN, STD, pretrained=True).eval()
    image, depth = torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8), 8 * torch.rand(3, 48, 64)
    rgb = (image.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        rgbd = torch.cat([rgb, depth[:, None]], 1)
        assert torch.equal(tower.visual.net.conv1(rgbd), rgb_tower.conv1(rgb))
        x, expected = rgb_tower.stem(rgb), 0
        assert torch.equal(tower.visual.net.stem(rgbd), x)
        for layer, lateral in zip((rgb_tower.layer1, rgb_tower.layer2, rgb_tower.layer3), tower.neck["lateral"]):
            x = layer(x)
            expected = expected + F.interpolate(lateral(x), (12, 16), mode="bilinear", align_corners=False)
        expected = tower.neck["smooth"](expected)
        assert torch.allclose(tower(image, depth), expected, atol=1e-5)
        assert torch.equal(tower(image, depth), tower(image, 0 * depth))


def test_bifusion_with_its_2d_branch_off_computes_exactly_what_the_baseline_computes(
        make_model, make_batch, row, put, train_steps):
    fused, baseline, batch = make_model(), make_model("baseline", seed=1), make_batch()
    train_steps(fused, row(70), batch)
    shared = baseline.state_dict().keys()
    baseline.load_state_dict({name: value for name, value in fused.state_dict().items() if name in shared})
    alone = replace(row(70), fusion="identity", trains=("3d", "decoder"), losses=("semantic", *INSTANCE))
    for held in (row(10), row(70, plan="A"), alone):
        for training in (False, True):
            outputs = []
            for model in (fused, baseline):
                torch.manual_seed(0)  # of the share of superpoints that become queries
                outputs.append(put(model, held).train(training)(batch))
            assert torch.equal(outputs[0]["logits"], outputs[1]["logits"])
            assert ("instances" in outputs[0]) == ("instances" in outputs[1]) == (held is alone)
            ours, theirs = ([layer for scene in out.get("instances", ()) for layer in scene] for out in outputs)
            assert all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b)
    gradients = []
    for model in (fused, baseline):
        model.zero_grad()
        torch.manual_seed(0)
        weighted_sum(train.forward(model, batch, alone)[0], WEIGHTS).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(baseline.named_parameters()).keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("compress", [1, 8])
def test_no_change_of_row_moves_the_logits(make_model, make_batch, train_steps, logits_at, pretrained, compress):
    model, batch, optimizer = make_model(pretrained=pretrained), make_batch(), None
    rows = curriculum(compress, pretrained=pretrained)
    for before, after in zip(rows, rows[1:]):
        optimizer = train_steps(model, before, batch, steps=8, optimizer=optimizer)
        for training in (False, True):
            old = logits_at(model, before, batch, training, after.first_epoch - BEFORE)
            new = logits_at(model, after, batch, training, after.first_epoch)
            assert (old - new).abs().max() <= 1e-5
    # the test can fail: once gate and FiLM are trained, going back to what they replaced is a jolt
    train_steps(model, after, batch, steps=8, optimizer=optimizer)
    new = logits_at(model, after, batch)
    for before in (replace(after, fusion="simple"), replace(after, film=False)):
        assert (logits_at(model, before, batch) - new).abs().max() > 1e-3


@pytest.mark.parametrize("epoch", [10, 30, 50, 70])
def test_which_parts_train_and_plan_b_change_no_logit(make_model, make_batch, row, train_steps, logits_at, epoch):
    model, batch = make_model(), make_batch()
    train_steps(model, row(70), batch)
    logits = logits_at(model, row(epoch), batch)
    for other in (row(epoch, pretrained=True), row(epoch, plan="B")):
        assert torch.equal(logits_at(model, other, batch), logits)


def test_a_step_of_the_ramp_moves_the_logits_little(make_model, make_batch, row, train_steps, logits_at):
    model, batch = make_model(), make_batch()
    train_steps(model, row(10), batch, steps=8)
    moments = [21 + 5 * i / 40 for i in range(41)]  # 8 steps an epoch, 5 epochs
    logits = [logits_at(model, row(21), batch, moment=moment) for moment in moments]
    jumps = [(b - a).abs().max().item() for a, b in zip(logits, logits[1:])]
    whole = (logits[-1] - logits[0]).abs().max().item()
    assert max(jumps) <= whole / 10 and whole > 1e-2


@pytest.mark.parametrize("epoch", [10, 21, 30, 50, 70])
def test_a_pretrained_tower_is_frozen_and_trains_whole_from_epoch_41_on(
        make_model, make_batch, row, train_steps, epoch):
    model, batch = make_model(pretrained=True), make_batch()
    before = copy.deepcopy(model.tower.visual.state_dict())
    train_steps(model, row(epoch, pretrained=True), batch)
    assert all((p.grad is not None) == (epoch > 40) for p in model.tower.visual.parameters())
    weights = dict(model.tower.visual.named_parameters())
    for name, value in model.tower.visual.state_dict().items():  # the batch norms' statistics stay throughout
        assert torch.equal(before[name], value) == (epoch <= 40 or name not in weights), name


def test_a_tower_from_scratch_trains_in_stage_two(make_model, make_batch, row, train_steps):
    model, batch = make_model(), make_batch()
    before = copy.deepcopy(model.tower.visual.state_dict())
    train_steps(model, row(30), batch)
    assert all(not torch.equal(before[name], value) for name, value in model.tower.visual.state_dict().items())


@pytest.mark.parametrize("prior", [0.0, WEIGHTS["gate"]])
@pytest.mark.parametrize(("useful", "low", "high"), [("2d", BAND[1], 1.0), ("3d", 0.0, BAND[0])])
def test_the_gate_can_leave_the_band_when_one_branch_alone_is_useful_prior_or_not(useful, low, high, prior):
    gate, seen = LiteFusionGate(16), torch.ones(400, dtype=torch.bool)
    optimizer = torch.optim.Adam(gate.parameters(), 1e-2)
    for _ in range(200):
        feat_2d, feat_3d = torch.randn(400, 16), torch.randn(400, 16)
        alpha = gate(feat_2d, feat_3d, seen)
        wrong = (blend(feat_2d, feat_3d, alpha) - (feat_2d if useful == "2d" else feat_3d)).square().mean()
        loss = WEIGHTS["semantic"] * wrong + prior * gate_prior(alpha, seen, torch.zeros(400, dtype=torch.long), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert low < alpha.mean() < high


@pytest.mark.parametrize(("sign", "low", "high"), [(-1, BAND[1], 1.01), (1, -0.01, BAND[0])])
def test_fusion_2d_ratio_of_the_whole_model_can_leave_its_band(make_model, make_batch, row, put, sign, low, high):
    model, batch = put(make_model(), row(70)).train(), make_batch()
    optimizer = torch.optim.Adam(model.gates.parameters(), 1e-2)
    for _ in range(30):
        out = model(batch)
        optimizer.zero_grad()
        (sign * out["alpha"].sum() / out["seen"].sum()).backward()
        optimizer.step()
    assert low < model(batch)["stats"]["fusion_2d_ratio"] < high


def test_twenty_four_epochs_through_all_stages_are_finite_and_skip_no_step(tiny_run):
    folder, log = tiny_run
    assert [line["epoch"] for line in log] == list(range(24))
    assert {line["stage"] for line in log} == {1, 2, 3}
    for line in log:
        assert line["skipped_steps"] == 0 < line["steps"]
        json.dumps(line, allow_nan=False)  # raises where a number is not finite
        assert None not in (line["loss"], line["val_miou"], *line["losses"].values(), *line["grad_norm"].values())
    state = torch.load(folder / "last.pt", weights_only=True)["model"]  # weights and statistics
    assert all(torch.isfinite(value).all() for value in state.values())


def test_each_row_of_the_run_trains_its_branches_with_its_losses(tiny_run):
    for line in tiny_run[1]:
        fused = line["stage"] > 1
        assert set(line["losses"]) - {"gate"} == {"semantic", *(("alignment", *INSTANCE) if fused else ())}
        assert ("gate" in line["losses"]) == (line["row"] in ("alignment, learned gate", "enhancement"))
        assert set(line["grad_norm"]) == ({"3d", "decoder", "2d", "fusion"} if fused else {"3d"})
        assert (line["fusion_2d_ratio"] is not None) == fused and min(line["grad_norm"].values()) > 0


def test_fusion_2d_ratio_is_in_its_band_after_the_ramp_and_moves(tiny_run):
    ratios = [line["fusion_2d_ratio"] for line in tiny_run[1] if line["fusion_ramp"] == 1]
    assert len(ratios) >= 18
    assert all(BAND[0] <= ratio <= BAND[1] for ratio in ratios)
    assert len({round(ratio, 4) for ratio in ratios}) > 5  # nobody holds it


def test_both_branches_keep_one_range_and_the_loss_falls_during_the_run(tiny_run):
    _, log = tiny_run
    ratios = [line["rms_2d"] / line["rms_3d"] for line in log if line["rms_2d"] is not None]
    assert len(ratios) == 20 and all(0.5 <= ratio <= 2 for ratio in ratios)
    assert log[-1]["losses"]["semantic"] < 0.8 * log[0]["losses"]["semantic"]


def test_the_criteria_find_the_run_stable_and_fused(tiny_run):
    stability, _, fusion = criteria(tiny_run[1])
    assert stability["passed"] and fusion["passed"]


def guarded_step(model, batch, row, optimizer, guard):
    """One step as in train.py's loop. Returns the record where it was skipped, else None."""
    guard.remember()
    terms, _ = train.forward(model, batch, row)
    loss = weighted_sum(terms, WEIGHTS)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norms = clip_by_branch(model, row.clip)
    found = {"loss": loss.item()} | {f"losses/{k}": v.item() for k, v in terms.items()} \
        | {f"grad_norm/{k}": v.item() for k, v in norms.items()}
    if guard.accepts(found.values()):
        optimizer.step()
        return None
    guard.restore()
    first = guard.first_not_finite(batch, lambda batch: train.forward(model, batch, row)[0],
                                   (lambda terms: weighted_sum(terms, WEIGHTS)) if loss.isfinite() else None)
    return json.loads(guard.record(first_not_finite=first, **found))


def everything(model, optimizer):
    """Weights, statistics of the batch norms and state of the optimiser: one flat dict of copies."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer {i} {name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return state


def times(factor):
    """A hook that multiplies what it is given, a module's output or a gradient; sparse tensors too."""
    def hook(*given):
        value = given[-1]
        return value.replace_feature(factor * value.features) if hasattr(value, "features") else factor * value
    return hook


FAULTS = {  # what goes wrong -> function of model and batch that makes it so, what the record is to name
    "a NaN colour": (lambda model, batch: batch["color"][3].fill_(math.nan), "input color"),
    "an infinite position": (lambda model, batch: batch["coord"][0].fill_(math.inf), "input coord"),
    "a NaN weight": (lambda model, batch: model.film.mlp[0].weight.data[0].fill_(math.nan), "weight film.mlp.0.weight"),
    "a NaN in a sparse level": (lambda model, batch: model.unet.down[1].register_forward_hook(times(math.nan)),
                                "output of unet.down.1"),
    "an infinite image feature": (lambda model, batch: model.tower.visual.net.layer2.register_forward_hook(
        times(math.inf)), "output of tower.visual.net.layer2"),
    "a NaN in the decoder": (lambda model, batch: model.decoder.own[0].register_forward_hook(times(math.nan)),
                             "output of decoder.own.0"),
    "infinite logits": (lambda model, batch: model.semantic_head.register_forward_hook(times(math.inf)),
                        "output of semantic_head"),
    "an infinite gradient": (lambda model, batch: model.standardise_2d.linear.weight.register_hook(
        times(math.inf)), "gradient of standardise_2d.linear.weight"),
    "a gradient whose norm overflows": (lambda model, batch: model.semantic_head.weight.register_hook(times(1e30)),
                                        "norm of the gradient of semantic_head.weight"),
    "a gradient that overflows on its way": (
        lambda model, batch: model.tower.neck["lateral"][0].register_full_backward_pre_hook(
            lambda module, grad: tuple(math.inf * g for g in grad)), "gradient of tower.neck.lateral.0.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_step_leaves_every_bit_as_it_was_and_is_named_and_the_next_step_is_taken(
        make_model, make_batch, row, train_steps, tmp_path, fault):
    held, batch, model = row(70), make_batch(), make_model()
    optimizer = train_steps(model, held, batch, steps=2)
    guard = Guard(model, tmp_path / "skipped.jsonl")
    broken = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
    make, name = FAULTS[fault]
    whole = copy.deepcopy(model.state_dict())
    hook = make(model, broken)
    before = everything(model, optimizer)
    record = guarded_step(model, broken, held, optimizer, guard)
    after = everything(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(7), after[key].nan_to_num(7)) for key in before)
    assert record["first_not_finite"] == name
    assert record.keys() == {"first_not_finite", "loss", *(f"losses/{term}" for term in held.losses),
                             *(f"grad_norm/{branch}" for branch in ("3d", "decoder", "2d", "fusion"))}
    assert {"nan", "inf"} & {str(value) for key, value in record.items() if key != "first_not_finite"}
    assert json.loads((tmp_path / "skipped.jsonl").read_text()) == record
    assert sum(len(m._forward_hooks) for m in model.modules()) <= 1  # the fault's own
    if hasattr(hook, "remove"):
        hook.remove()
    model.load_state_dict(whole)
    assert guarded_step(model, batch, held, optimizer, guard) is None
    assert not torch.equal(model.semantic_head.weight, before["semantic_head.weight"])


def test_a_record_after_half_a_line_of_a_killed_run_stands_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"epoch": 0}\n{"epo')
    Guard(torch.nn.Linear(1, 1), path).record(epoch=1)
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


def test_the_losses_of_a_row_and_no_others_are_computed(make_model, make_batch, row, put):
    for losses in (("semantic", "instance_dice"), ("alignment", "gate")):
        some = replace(row(70), losses=losses)
        assert set(train.forward(put(make_model(), some).train(), make_batch(), some)[0]) == set(losses)


def test_an_infinite_loss_term_is_named_though_all_modules_are_finite(
        make_model, make_batch, row, put, tmp_path, monkeypatch):
    real = train.alignment_loss
    monkeypatch.setattr(train, "alignment_loss", lambda *args: real(*args) * math.inf)
    model = put(make_model(), row(70)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    record = guarded_step(model, make_batch(), row(70), optimizer, Guard(model, tmp_path / "skipped.jsonl"))
    assert (record["first_not_finite"], record["losses/alignment"]) == ("loss term alignment", "inf")
    assert isinstance(record["losses/semantic"], float)


def test_looking_for_the_culprit_leaves_random_state_gradients_and_statistics_alone(make_model, make_batch, row, put):
    model, batch, tried = put(make_model(), row(70)).train(), make_batch(), []
    guard = Guard(model)

    def forward(batch):
        tried.append(train.forward(model, batch, row(70))[0])
        return tried[-1]

    guard.remember()
    forward(batch)
    guard.restore()
    random, before = torch.get_rng_state(), everything(model, torch.optim.AdamW(model.parameters()))
    said = guard.first_not_finite(batch, forward, lambda terms: sum(terms.values()))
    assert said == "not found, the second try was finite"
    assert all(torch.equal(tried[0][name], tried[1][name]) for name in tried[0])  # the same queries drawn at random
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    after = everything(model, torch.optim.AdamW(model.parameters()))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("factor", [1e6, 1e12])
def test_a_burst_in_the_image_branch_is_clipped_and_leaves_the_step_of_the_3d_branch_as_without_it(
        make_model, make_batch, row, put, factor):
    after, held = [], row(70)
    for burst in (1.0, factor):
        model, batch = put(make_model(), held).train(), make_batch()
        for parameter in (*model.tower.parameters(), *model.standardise_2d.parameters()):
            parameter.register_hook(times(burst))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        torch.manual_seed(0)
        assert guarded_step(model, batch, held, optimizer, Guard(model)) is None
        after.append({name: torch.cat([p.detach().flatten() for p in parameters])
                      for name, parameters in model.parts().items()})
        largest = torch.cat([p.grad.flatten() for p in model.tower.parameters()]).norm()
    assert largest <= 1.0001 * held.clip
    for name in ("3d", "decoder", "gate", "film"):
        assert torch.equal(after[0][name], after[1][name]), name
    assert torch.isfinite(after[1]["tower"]).all()
