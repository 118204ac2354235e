"""experiments/report.py: every way in which a criterion can fail, exit codes, broken logs, pairs by seed, pictures."""

import copy
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from experiments import report
from experiments.report import criteria, draw_curves
from runs import read_log


def make_log(epochs=40, model="bifusion", miou=0.5, ratio=0.5):
    """A clean log of four rows of epochs / 4 each; fusion ramps in over four epochs from the second on."""
    log = []
    for e in range(epochs):
        row = 4 * e // epochs
        fused = model == "bifusion" and row > 0
        losses = {"semantic": 2 / (e + 1)} | ({"alignment": 0.3, "instance_cls": 0.5} if fused else {})
        log.append({
            "epoch": e, "stage": (1, 2, 2, 3)[row], "model": model, "loss": sum(losses.values()), "losses": losses,
            "val_miou": miou * (e + 1) / epochs, "val_iou": [0.25, None, 0.75], "val_ap": 0.5, "val_ap50": 0.6,
            "fusion_2d_ratio": ratio if fused else None, "fusion_ramp": min(1.0, (e - epochs // 4) / 4) * fused,
            "grad_norm": {"3d": 1.5} | ({"2d": 0.1, "fusion": 0.4} if fused else {}),
            "skipped_steps": 0, "steps": 8, "seconds": 30.0,
        })
    return log


def write_run(folder, log, **config):
    """A run folder as train.py writes it; returns its path as text."""
    folder.mkdir()
    fields = {"model": log[0]["model"], "seed": 0, "epochs": len(log), "compress": 1, "data": "rooms",
              "preset": "small", "voxel_size": 0.05}
    (folder / "config.json").write_text(json.dumps(fields | config))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return str(folder)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """report.main draws nothing, for speed; the tests of the pictures call draw_curves itself."""
    monkeypatch.setattr(report, "draw_curves", lambda logs, path: None)


@pytest.fixture
def fused(tmp_path):
    return write_run(tmp_path / "fused", make_log())


@pytest.fixture
def base(tmp_path):
    return write_run(tmp_path / "base", make_log(model="baseline", miou=0.4))


def verdict(name, log, baseline_log=None):
    """The entry of one criterion."""
    return {entry["name"]: entry for entry in criteria(log, baseline_log)}[name]


def test_a_clean_run_above_its_baseline_passes_all_three_and_the_log_is_left_as_it_was():
    log = make_log()
    entries = criteria(log, make_log(miou=0.4))
    assert [(e["name"], e["passed"]) for e in entries] == [("stability", True), ("performance", True), ("fusion", True)]
    assert "0.5000" in entries[1]["figure"] and "+0.1000" in entries[1]["figure"]
    assert log == make_log()


@pytest.mark.parametrize("change", [
    {"loss": None}, {"loss": math.nan}, {"loss": math.inf}, {"losses": {"semantic": 0.5, "alignment": None}},
    {"grad_norm": {"3d": None}}, {"skipped_steps": 1}, {"skipped_steps": None},
])
@pytest.mark.parametrize("epoch", [0, 30, 39])
def test_stability_fails_on_one_bad_epoch_even_beside_a_long_streak(change, epoch):
    log = make_log()
    log[epoch].update(change)
    entry = verdict("stability", log)
    assert entry["passed"] is False
    assert f"epoch {epoch}:" in entry["detail"] and "39 of 40" in entry["figure"]


def test_stability_fails_where_the_log_does_not_say_and_names_three_epochs_at_most():
    log = make_log()
    del log[5]["loss"], log[7]["skipped_steps"], log[25]["loss"], log[26]["loss"]
    entry = verdict("stability", log)
    assert entry["passed"] is False
    assert "epoch 5:" in entry["detail"] and "epoch 7: unknown number of skipped steps" in entry["detail"]
    assert entry["detail"].endswith("; and 1 more") and "epoch 26" not in entry["detail"]


@pytest.mark.parametrize("missing, streak", [(0, 39), (25, 25)])
def test_a_missing_epoch_fails_stability_and_breaks_the_streak(missing, streak):
    log = make_log()
    del log[missing]
    entry = verdict("stability", log)
    assert entry["passed"] is False
    assert f"epoch {missing}: missing" in entry["detail"] and f"longest streak {streak} " in entry["figure"]


@pytest.mark.parametrize("epochs, passed", [(19, False), (20, True), (1, False)])
def test_stability_needs_twenty_epochs(epochs, passed):
    entry = verdict("stability", make_log(epochs))
    assert entry["passed"] is passed
    assert passed or "too short" in entry["detail"]


@pytest.mark.parametrize("baseline_miou, passed", [(0.5, False), (0.6, False), (0.49, True)])
def test_performance_needs_more_than_the_baseline_at_the_last_epoch_and_not_at_the_best(baseline_miou, passed):
    log, baseline_log = make_log(), make_log(miou=baseline_miou)
    log[20]["val_miou"], baseline_log[21]["val_miou"] = 0.9, 0.95
    entry = verdict("performance", log, baseline_log)
    assert entry["passed"] is passed
    assert f"0.5000 at epoch 39, baseline {baseline_miou:.4f}" in entry["figure"]


def test_performance_is_not_judged_without_a_baseline_or_an_evaluation_and_fails_when_the_last_epochs_differ():
    blind = [{**entry, "val_miou": None} for entry in make_log()]
    for log, baseline_log, passed, why in (
            (make_log(), None, None, "no baseline"), (make_log(), blind, None, "in the baseline's log"),
            (blind, make_log(), None, "in the run's log"),
            (make_log(), make_log(30, miou=0.1), False, "last evaluated at epoch 39, the baseline at epoch 29")):
        entry = verdict("performance", log, baseline_log)
        assert entry["passed"] is passed and why in entry["detail"]
        assert (entry["figure"] == "not comparable") is (passed is False)


@pytest.mark.parametrize("ratio, passed", [(0.2999, False), (0.71, False), (None, False), (math.nan, False),
                                           (0.3, True), (0.7, True)])
@pytest.mark.parametrize("epoch", [14, 25, 39])
def test_fusion_is_judged_at_every_epoch_after_the_ramp(ratio, passed, epoch):
    log = make_log()
    assert log[14]["fusion_ramp"] == 1 and log[13]["fusion_ramp"] < 1
    log[epoch]["fusion_2d_ratio"] = ratio
    log[11]["fusion_2d_ratio"] = 0.05  # within the ramp
    entry = verdict("fusion", log)
    assert entry["passed"] is passed and "over 26 epochs" in entry["figure"]
    assert passed or f"epoch {epoch}: {ratio}" in entry["detail"]


def test_fusion_cannot_be_judged_without_an_epoch_after_the_ramp_and_fails_when_no_voxel_is_ever_seen():
    assert verdict("fusion", make_log()[:12])["passed"] is None  # ends within the ramp
    baseline = [{k: v for k, v in entry.items() if not k.startswith("fusion")} for entry in make_log()]
    assert verdict("fusion", baseline)["passed"] is None
    blind = verdict("fusion", make_log(ratio=None))  # the ramp is over, and there is nothing to fuse
    assert blind["passed"] is False and "no voxel was seen" in blind["figure"]


def test_the_command_exits_0_when_all_pass_prints_each_figure_and_draws_a_picture(fused, base, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", fused, "--against", base])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(report.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.count("PASS") == 3 and "FAIL" not in out
    assert "40 of 40 epochs" in out and "+0.1000" in out and "0.500..0.500" in out
    with Image.open(Path(fused, "curves.png")) as image:
        image.load()
        assert image.format == "PNG" and image.size == (1650, 840)


@pytest.mark.parametrize("criterion, change", [
    ("stability", {"loss": None}), ("stability", {"skipped_steps": 2}), ("performance", {"val_miou": 0.4}),
    ("fusion", {"fusion_2d_ratio": 0.71}),
])
def test_each_criterion_can_fail_and_the_exit_code_is_1(tmp_path, base, capsys, criterion, change):
    log = make_log()
    log[-1].update(change)
    assert report.main([write_run(tmp_path / "bad", log), "--against", base]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if " FAIL " in line]
    assert len(failures) == 1 and criterion in failures[0]


def test_without_a_baseline_performance_is_not_judged_and_a_baseline_is_judged_for_stability_only(fused, base, capsys):
    assert report.main([fused]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 2 and out.count("n/a") == 1 and "no baseline" in out
    assert report.main([base, "--against", base]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 1 and out.count("n/a") == 2
    assert out.count("baseline     0") == 1  # one row, though it was given twice


@pytest.mark.parametrize("key, value", [("data", "other"), ("epochs", 129), ("preset", "base"), ("compress", 4),
                                        ("voxel_size", 0.02), ("model", "bifusion"), ("lr", 1e-5), ("seed", 1)])
def test_runs_of_different_configs_are_not_comparable(tmp_path, fused, capsys, key, value):
    log = make_log(model="baseline", miou=0.1)
    assert report.main([fused, "--against", write_run(tmp_path / "other", log, **{key: value})]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "performance" in line)
    assert "FAIL" in line and "not comparable" in line
    assert ("no baseline with seed 0" if key == "seed" else f"{key} is {value!r}, expected") in line


def test_runs_and_baselines_are_paired_by_seed_and_a_run_without_a_partner_fails(tmp_path, capsys):
    runs = [write_run(tmp_path / f"f{s}", make_log(miou=0.5 + 0.1 * s), seed=s) for s in range(3)]
    bases = [write_run(tmp_path / f"b{s}", make_log(model="baseline", miou=0.4 + 0.08 * s), seed=s) for s in range(3)]
    assert report.main([*runs, "--against", *bases[::-1]]) == 0
    out = capsys.readouterr().out
    assert all(f"f{s} against b{s}" in out for s in range(3))
    assert "final val mIoU, bifusion: 0.6000 ± 0.1000 (3 runs)" in out
    assert "final val mIoU, baseline: 0.4800 ± 0.0800 (3 runs)" in out
    assert "paired difference to the baseline: 0.1200 ± 0.0200 (3 runs)" in out
    assert report.main([*runs, "--against", *bases[1:]]) == 1
    out = capsys.readouterr().out
    assert "no baseline with seed 0" in out and "paired difference to the baseline: 0.1300" in out


def test_two_baselines_of_one_seed_are_refused_and_an_unfinished_run_is_named(tmp_path, fused, base, capsys):
    short = write_run(tmp_path / "short", make_log(24, model="baseline"), epochs=129)
    assert report.main([fused, "--against", base, short]) == 2
    assert "two baselines have the same seed, of [0]" in capsys.readouterr().err
    report.main([short])
    assert "short has logged 24 of 129 epochs" in capsys.readouterr().out


def test_the_class_table_shows_every_class_and_a_dash_for_an_absent_one(fused, capsys):
    report.main([fused, "--classes"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["wall", "0.2500"] in rows and ["floor", "-"] in rows and ["cabinet", "0.7500"] in rows
    assert ["sofa", "-"] in rows  # beyond the three that the log holds


@pytest.mark.parametrize("name, message", [("log.jsonl", "no whole line"),
                                           ("config.json", "has no config.json that can be read"),
                                           ("", "has no config.json that can be read")])
def test_a_folder_without_its_files_is_a_clear_error(fused, capsys, name, message):
    Path(fused, name or "config.json").unlink()
    assert report.main([fused if name else fused + "/nowhere"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ('{"epoch": 0}\n{"epo\n{"epoch": 2}\n', r"log\.jsonl, line 2: expected an epoch"),
    ("[1, 2]\n", "line 1: expected an epoch as a JSON object"), ('{"loss": 1.0}\n', "line 1: expected an epoch"),
    ('\n{"epoch": 0}\n{"epoch": "3"}\n', "line 3: expected an epoch"),
    ("", "no whole line"), ("\n\n", "no whole line"), ('{"epoch": 0, "lo', "no whole line"),
])
def test_a_broken_log_is_an_error_with_file_and_line(fused, text, message):
    Path(fused, "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.read_run(fused)
    assert report.main([fused]) == 2


def test_a_resumed_run_replaces_what_was_logged_from_there_on_and_is_judged_by_that_too(tmp_path):
    log = make_log()
    log[35]["loss"] = None
    again = [{**entry, "loss": 7.0} for entry in make_log()[30:34]]
    folder = write_run(tmp_path / "resumed", log + again)
    read = read_log(Path(folder, "log.jsonl"))
    assert read == [*log[:30], again[0] | {"replaced": log[30:]}, *again[1:]]
    assert report.main([folder]) == 1
    stability = verdict("stability", read)
    assert stability["passed"] is False  # it did happen, whatever came of it later
    assert stability["detail"] == "epoch 30: before it was resumed, epoch 35: loss is not finite"
    twice = log + make_log()[30:36] + make_log()[28:]  # replaced lines that replaced others
    read = read_log(Path(write_run(tmp_path / "twice", twice), "log.jsonl"))
    assert "epoch 28: before it was resumed, epoch 30: before" in verdict("stability", read)["detail"]


def test_half_a_line_at_the_end_is_left_out_and_epochs_trained_again_do_not_count_against_a_run(tmp_path):
    path = Path(write_run(tmp_path / "r", make_log()[:21] + make_log()[20:]), "log.jsonl")
    path.write_text(path.read_text() + json.dumps(make_log(41)[-1])[:-40])
    assert report.main([str(path.parent)]) == 0
    read = read_log(path)
    assert read[20].pop("replaced") == make_log()[20:21] and read == make_log()


def gaps(log):
    """The same log with nulls, a skipped step, a missing epoch and a ratio outside its band."""
    log = copy.deepcopy(log)
    log[12].update(loss=None, losses={"semantic": None}, val_miou=None, grad_norm={"3d": None}, skipped_steps=1)
    log[20].update(fusion_2d_ratio=0.9)
    return log[:15] + log[16:]


@pytest.mark.parametrize("logs", [
    {"r": make_log(1)}, {"r": gaps(make_log())},
    {"r": make_log(2, model="baseline"), "a baseline with a long name" * 3: make_log(model="baseline")},
    {"r": [{"epoch": 0, "stage": 1, "loss": None, "losses": {}, "grad_norm": {}, "skipped_steps": 8}]},
], ids=["one epoch", "gaps", "baselines", "nothing finite"])
@pytest.mark.filterwarnings("error")
def test_curves_are_laid_out_for_any_log_without_a_warning(monkeypatch, logs):
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path: figure.draw_without_rendering())
    draw_curves(logs, None)


def test_a_panel_shows_the_run_and_its_baseline_with_their_last_values_gaps_and_where_stability_broke(monkeypatch):
    drawn = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path: drawn.append(figure))
    draw_curves({"ours": gaps(make_log()), "base": make_log(model="baseline", miou=0.4)}, None)
    losses, miou, _, fusion, *_ = drawn[0].axes
    assert miou.get_legend_handles_labels()[1] == ["val_miou ours 0.5", "val_miou base 0.4"]
    values = {line.get_label().split()[0]: line.get_ydata() for panel in (losses, fusion) for line in panel.lines}
    assert values["fusion_2d_ratio"][20] == 0.9 and len(values["fusion_2d_ratio"]) == len(values["semantic"]) == 40
    assert [e for e, value in enumerate(values["semantic"]) if math.isnan(value)] == [12, 15]  # null, missing
    assert next(line for line in losses.lines if line.get_label() == "bad epoch").get_xdata().tolist() == [12]
