"""ablate.py: a variant changes what it says, and nothing outside of the model it builds. failures.py: how it ends."""

import json
import math
import signal
import sys
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import guard
import runs
import train
from experiments import ablate, failures, judge, probe, stability
from fusion import FiLM
from scenes.folder import SCANNET20, load_frames, usable_frames
from stages import INSTANCE, PARTS, apply_row, curriculum

CHANGES = {  # of the rows with 2D on; gate: whether it trains, prior: whether it is among the losses
    "less_blanked_scenes": {"blank": 0.0}, "less_gate_prior": {"prior": False}, "less_ramp": {"ramp_epochs": 0.0},
    "less_frozen_tower": {"tower": True, "tower_rate": 0.1},
    "concat": {"fusion": "simple", "gate": True, "prior": False}}
JOINT = {"trains": set(PARTS), "tower_rate": 0.1, "fusion": "learned", "ramp_epochs": 0, "film": True}
STARTS = {"less_stage_1": {}, "only_2d": {"fusion": "simple", "film": False, "ramp_epochs": 0.0, "blank": 0.0}}


@pytest.mark.parametrize("name", STARTS)
def test_without_stage_one_the_rows_after_it_begin_at_epoch_0(name):
    rows = ablate.VARIANTS[name][0](curriculum())
    assert [(row.first_epoch, row.last_epoch) for row in rows] == [(0, 40), (41, 60), (61, 128)]
    assert all(getattr(row, key) == value for row in rows for key, value in STARTS[name].items())
    assert all("2d" in row.trains and ("film" in row.trains) == row.film for row in rows)


@pytest.mark.parametrize("name", [name for name in ablate.VARIANTS if name not in STARTS])
def test_a_variant_changes_what_it_says_of_the_curriculum_and_no_more(name):
    for before, after in zip(curriculum(), ablate.VARIANTS[name][0](curriculum()), strict=True):
        expected, found = (asdict(row) | {"trains": set(row.trains), "losses": set(row.losses)}
                           for row in (before, after))
        if name.startswith("naive"):
            expected |= JOINT | {"losses": {"semantic", *INSTANCE, "alignment"}, "tower_rate": 1.0, "clip": math.inf,
                                 "blank": 0.0}
        elif name == "joint":
            expected |= JOINT | {"losses": {"semantic", *INSTANCE, "alignment", "gate"}}
        elif before.fusion != "identity":
            change = CHANGES.get(name, {})
            for key, word, to in (("trains", "gate", "gate"), ("trains", "tower", "tower"),
                                  ("losses", "gate", "prior")):
                if to in change:
                    expected[key] = expected[key] | {word} if change[to] else expected[key] - {word}
            expected |= {key: value for key, value in change.items() if key in expected}
        assert found == expected
        assert len(after.trains) == len(found["trains"]) and len(after.losses) == len(found["losses"])  # none twice


@pytest.fixture
def run(tiny_rooms, tmp_path, monkeypatch):
    """Function (variant, flags) -> log and blanked.json of a run of 4 epochs of 2 steps."""
    for key, value in {"image_size": (64, 48), "voxel_size": 0.25, "views": 2, "batch_size": 2}.items():
        monkeypatch.setitem(train.RECIPES["small"], key, value)

    def run(name, *flags):
        out = tmp_path / name
        ablate.main([name, "0", "--compress", "43", "--out", str(out), "--device", "cpu", "--cache",
                     str(tiny_rooms.parent / "cache"), "--data", str(tiny_rooms), *flags])
        return runs.read_log(out / "log.jsonl"), json.loads((out / "blanked.json").read_text())
    return run


class StopsInEpoch2(runs.Stop):
    def agreed(self):
        self.steps = getattr(self, "steps", 0) + 1  # asked once a step, and at the end of an epoch
        self.asked = signal.SIGTERM if self.steps > 5 else 0
        return super().agreed()


def test_a_run_is_evaluated_after_its_last_epoch_alone_also_where_it_was_resumed(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="go on with the same command and --resume"):
        patch.setattr(runs, "Stop", StopsInEpoch2)
        run("kept")
    log, result = run("kept", "--resume")
    assert [line["val_miou"] is not None for line in log] == [False, False, False, True]
    assert result["as they are"] == log[-1]["val_miou"] and {"points black", "images black"} < result.keys()


@pytest.mark.parametrize("variant, check", [
    ("less_film_geometry", lambda line, state: state["film.mlp.0.weight"].shape[1] == 64),  # reads features
    ("only_2d", lambda line, state: line["fusion_2d_ratio"] == 1 and line["grad_norm"]["3d"] > 0),
    ("concat", lambda line, state: not state["gates.concat.weight"].equal(0.5 * torch.eye(64).repeat(1, 2))),
    ("less_branch_clip", lambda line, state: set(line["grad_norm"]) == {"all"}),
    ("naive", lambda line, state: abs(line["rms_3d"] - 1) > 1e-3)])  # nothing standardises it
def test_another_model_is_trained_and_read_back_as_it_was_built(run, tmp_path, variant, check):
    log, result = run(variant, "--lr", "0.01")
    path = tmp_path / variant / "last.pt"
    state = torch.load(path, weights_only=True)
    assert check(log[-1], state["model"])
    group = state["optimizer"]["param_groups"][0]
    expected = ((0.9, 0.999), 0.05) if variant == "naive" else (train.BETAS, 0.05 * 0.3)  # naive: AdamW's own
    assert (tuple(group["betas"]), group["weight_decay"]) == (expected[0], pytest.approx(expected[1]))
    said = ablate.blanked(path, device="cpu")
    assert said["as they are"] == pytest.approx(log[-1]["val_miou"], abs=1e-4)
    assert said["images black"] == result["images black"] and set(said) == set(ablate.BLANKED)
    plain = train.parse_config(["--tower-weights", "scratch", "--out", str(tmp_path / "none")])
    assert type(train.new_model(plain).film) is FiLM  # nobody else's


def test_a_probe_finds_all_that_was_pretrained_in_a_tower_that_has_not_trained(run, tmp_path):
    run("kept", "--tower-rate", "0")
    found = probe.probe(tmp_path / "kept" / "last.pt", "cpu")
    assert found["before"] == found["after"] > 0 and found["kept"] == pytest.approx(1, abs=0.01)
    assert found["perfect"] > found["voxels"] > 0 and {"seen", "unseen"} < found.keys()
    run("baseline")
    with pytest.raises(ValueError, match=r"baseline/last\.pt is a 3D baseline"):
        probe.probe(tmp_path / "baseline" / "last.pt", "cpu")


def test_the_table_of_checkpoints_on_a_split_says_what_the_log_says(run, tiny_rooms, tmp_path, capsys, monkeypatch):
    def table(*flags):
        capsys.readouterr()
        judge.main([*(str(tmp_path / name / "last.pt") for name in log), "--device", "cpu", *flags])
        head, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
        return head, rows

    log = {name: run(name)[0][-1] for name in ("kept", "baseline")}
    head, rows = table("--inputs", "as they are", "no frames")
    assert head[:4] == ["checkpoint, val", "inputs", "mIoU", "AP"] and len(head) == 24
    assert [row[1] for row in rows] == ["as they are", "no frames"] * 2
    assert rows[0][2:] != rows[1][2:] and rows[2][2:] == rows[3][2:]  # the baseline has no frames to lose
    for row, line in zip(rows[::2], log.values()):
        logged = (line["val_miou"], line["val_ap"], *line["val_iou"])
        assert row[2:] == ["-" if value is None else f"{value:.3f}" for value in logged]
    head, found = table("--split", "train", "--data", str(tiny_rooms), "--inputs", *ablate.BLANKED)
    assert head[0] == "checkpoint, train" and len(found) == 2 * len(ablate.BLANKED) and found[0][2:] != rows[0][2:]
    with pytest.raises(SystemExit, match="2"):
        table("--split", "test")
    assert f"no scene in {tiny_rooms}/test" in capsys.readouterr().err
    monkeypatch.setattr(judge, "classes_of", lambda config: replace(SCANNET20, names=["floor"]))
    with pytest.raises(SystemExit, match="2"):
        table()
    assert "knows the classes ['floor'], " in capsys.readouterr().err


def test_injected_faults_are_recorded_and_skipped_or_clipped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "FAULT_RATE", 0.4)
    log, _ = run("kept+faults")  # of its 8 steps two get NaN, two inf, one a burst, one ignored labels: each its own
    injected, skipped = ([json.loads(line) for line in (tmp_path / "kept+faults" / name).read_text().splitlines()]
                         for name in ("faults.jsonl", "skipped.jsonl"))
    assert Counter(line["fault"] for line in injected) == {"nan": 2, "inf": 2, "burst": 1, "ignored": 1}
    assert Counter(line["first_not_finite"] for line in skipped) == {"output of standardise_3d": 2,
                                                                     "loss term semantic": 2}
    assert sum(line["skipped_steps"] for line in log) == len(skipped)
    assert any(norm > 1e3 for line in log for norm in line["grad_norm"].values())  # a burst that was clipped
    state = torch.load(tmp_path / "kept+faults" / "last.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_variant_that_diverges_has_a_line_and_another_error_does_not_pass_for_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "FAULT_RATE", 1.0)
    monkeypatch.setattr(guard, "MAX_SKIPPED_IN_A_ROW", 2)
    assert "2 steps in a row" in run("kept+faults")[1]["diverged"]
    line = stability.line_of(tmp_path / "kept+faults", "kept+faults", 0.01, 0)
    assert (line["diverged"], line["miou"], line["skipped"]) == (True, None, 2) and line["start"] > 1
    with pytest.raises(SystemExit, match="already holds a run"):
        run("kept+faults")
    monkeypatch.setattr(train, "train", lambda *args, **kwargs: sys.exit("the disk is full"))
    with pytest.raises(SystemExit, match="disk"):
        run("naive")
    assert "diverged" not in json.loads((tmp_path / "naive" / "blanked.json").read_text())


def test_unknown_words_get_the_variants():
    with pytest.raises(SystemExit, match="less_gate_prior"):
        ablate.main(["unknown", "0"])


@pytest.mark.parametrize("with_cure, code", [(0.0, 0), (0.5, 1)])
def test_failures_exits_with_1_where_one_is_not_as_promised(capsys, monkeypatch, with_cure, code):
    jolt = "jump of the logits", lambda cured: with_cure if cured else 1.5, 0.1, 1e-5
    monkeypatch.setattr(failures, "FAILURES", {"jolt": jolt})
    assert failures.main() == code
    assert capsys.readouterr().out.split()[-1] == ("NO" if code else "yes")


def test_the_image_side_alone_reads_no_point_and_concatenation_starts_as_the_mean_of_both(tmp_path):
    config = train.parse_config(["--tower-weights", "scratch", "--out", str(tmp_path / "none")])
    model = ablate.only_2d(config)
    feat = torch.randn(3, 64)
    assert not model.encode_3d({"color": torch.ones(3, 3)}).any()
    assert model.gates["simple"](feat, feat, torch.tensor([True, False, True])).tolist() == [1, 0, 1]
    model = ablate.concat(config)
    fused = model.blend(feat, 3 * feat, torch.tensor([0.5, 0.25, 0.0]))
    assert fused.allclose(torch.tensor([2, 2.5, 3])[:, None] * feat)
    assert {id(p) for p in model.gates["concat"].parameters()} < {id(p) for p in model.parts()["gate"]}
    assert ablate.no_zero_start(config).film.mlp[-1].weight.any()


def test_any_variant_runs_under_a_stress_and_none_of_it_stays(run):
    recipes, calm, name = train.RECIPES, run("kept")[0][-1], "kept+one_frame"
    (*_, line), result = run(name)
    assert line["losses"] != calm["losses"] and line["steps"] == calm["steps"] and result["variant"] == name
    assert line["seen_share"] < calm["seen_share"] and train.RECIPES is recipes
    with pytest.raises(SystemExit, match="few_rooms"):
        ablate.main(["naive+rain", "0"])


def test_few_rooms_are_a_quarter_four_times_and_half_of_the_poses_are_off_by_half_a_metre(tiny_rooms):
    for split, counts in (("train", (4, 1)), ("val", (2, 2))):
        scenes = ablate.FewRooms(tiny_rooms, split, voxel_size=0.25, image_size=(64, 48))
        assert (len(scenes), len({*scenes.folders})) == counts
    for split, share in (("train", 0.5), ("val", 0)):
        moved = []
        for folder in sorted((tiny_rooms / split).iterdir()):
            frames = usable_frames(folder)[0]
            right, off = (load(folder, frames, (16, 12)) for load in (load_frames, ablate.poses_off))
            eyes = [-(c[:, :3, :3].transpose(0, 2, 1) @ c[:, :3, 3:])[..., 0] for c in
                    (right["world_to_camera"], off["world_to_camera"])]
            moved += np.linalg.norm(eyes[0] - eyes[1], axis=1).round(4).tolist()
            assert np.array_equal(right["world_to_camera"][:, :3, :3], off["world_to_camera"][:, :3, :3])
        assert set(moved) <= {0.0, 0.5} and np.mean(moved) == pytest.approx(share / 2, abs=0.1)


def test_the_optimisers_and_norms_that_are_tried_do_what_they_say(tmp_path):
    config = train.parse_config(["--tower-weights", "scratch", "--lr", "0.03", "--out", str(tmp_path / "none")])
    feat, found = (torch.randn(2, 64), torch.randn(5, 64)), []
    for build in (train.new_model, ablate.no_query_key_norm):
        attention = build(config).decoder.cross[0]
        before = attention(*feat)
        attention.to_query.weight.data *= 100
        attention.to_query.bias.data *= 100
        found.append(attention(*feat).allclose(before, atol=1e-3))
    assert found == [True, False]  # with the norm the size of the queries says nothing
    for build, gain in ((train.new_model, 4), (ablate.unprotected, 1)):
        model = apply_row(build(config), curriculum()[0])
        assert model.segment(feat[0], {})["logits"].allclose(model.semantic_head(gain * feat[0]))

    with ablate.patched("naive", ""):
        assert train.WARM_UP == 0.02 and train.BETAS == (0.9, 0.999)
        assert train.learning_rate(1.0, 5, (5, 9)) == pytest.approx(0.5)
    with ablate.patched("naive_warm", ""):
        assert train.WARM_UP == 0.1 and train.learning_rate(1.0, 5, (5, 9)) == pytest.approx(0.5)
    assert train.WARM_UP == 0.1 and train.learning_rate(1.0, 5, (5, 9)) == 1
