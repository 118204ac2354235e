"""report.py: verdicts and exit codes, broken logs, pairs by seed, pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import report
from experiments.report import draw_curves
from metrics import criteria

REPORT = Path(report.__file__)


def make_log(epochs=30, model="bifusion", miou=0.5, ratio=0.5):
    """A clean log of three stages of epochs / 3 each; fusion ramps in over the first epoch of stage 2."""
    log = []
    for e in range(epochs):
        stage = 1 + 3 * e // epochs
        fused = model == "bifusion" and stage > 1
        losses = {"semantic": 2 / (e + 1)} | ({"alignment": 0.3, "instance_cls": 0.5} if fused else {})
        log.append({
            "epoch": e, "stage": stage, "model": model, "loss": sum(losses.values()), "losses": losses,
            "val_miou": miou * (e + 1) / epochs, "val_iou": [0.25, None, 0.75],
            "fusion_2d_ratio": ratio if fused else None, "fusion_ramp": float(fused),
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


def picture_size(path):
    """(width, height) of a png, read whole."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_the_command_exits_0_when_all_pass_and_prints_each_figure(fused, base):
    done = subprocess.run([sys.executable, REPORT, fused, "--against", base], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PASS") == 3 and "FAIL" not in done.stdout
    assert "30 of 30 epochs" in done.stdout and "+0.1000" in done.stdout and "0.500..0.500" in done.stdout
    assert picture_size(Path(fused, "curves.png"))[0] == 1650


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


def test_without_a_baseline_performance_is_not_judged_and_the_rest_is(fused, capsys):
    assert report.main([fused]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 2 and out.count("n/a") == 1 and "no baseline" in out


def test_a_baseline_as_the_run_is_judged_for_stability_only(base, capsys):
    assert report.main([base, "--against", base]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 1 and out.count("n/a") == 2
    assert out.count("baseline     0") == 1  # one row, though it was given twice


@pytest.mark.parametrize("key, value", [("seed", 1), ("data", "other"), ("epochs", 129), ("preset", "base"),
                                        ("compress", 4), ("voxel_size", 0.02), ("model", "bifusion")])
def test_runs_of_different_configs_are_not_comparable(tmp_path, fused, capsys, key, value):
    log = make_log(model="baseline", miou=0.1)
    assert report.main([fused, "--against", write_run(tmp_path / "other", log, **{key: value})]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "performance" in line)
    assert "FAIL" in line and "not comparable" in line and f"{value!r}" in line


def test_runs_and_baselines_are_paired_by_seed(tmp_path, capsys):
    runs = [write_run(tmp_path / f"f{s}", make_log(miou=0.5 + 0.1 * s), seed=s) for s in range(3)]
    bases = [write_run(tmp_path / f"b{s}", make_log(model="baseline", miou=0.4 + 0.08 * s), seed=s) for s in range(3)]
    assert report.main([*runs, "--against", *bases[::-1]]) == 0
    out = capsys.readouterr().out
    assert all(f"f{s} against b{s}" in out for s in range(3))
    assert "final val mIoU, bifusion: 0.6000 ± 0.1000 (3 runs)" in out
    assert "final val mIoU, baseline: 0.4800 ± 0.0800 (3 runs)" in out
    assert "paired difference to the baseline: +0.1200 ± 0.0200 (3 runs)" in out


def test_a_run_whose_seed_no_baseline_has_fails(tmp_path, capsys):
    bases = [write_run(tmp_path / f"b{s}", make_log(model="baseline", miou=0.1), seed=s) for s in (1, 2)]
    assert report.main([write_run(tmp_path / "f", make_log(), seed=3), "--against", *bases]) == 1
    assert "no baseline with seed 3" in capsys.readouterr().out


def test_two_baselines_of_one_seed_are_refused(tmp_path, fused, base, capsys):
    again = write_run(tmp_path / "again", make_log(model="baseline"))
    assert report.main([fused, "--against", base, again]) == 2
    assert "same seed 0" in capsys.readouterr().err


def test_an_unfinished_run_is_named(tmp_path, capsys):
    report.main([write_run(tmp_path / "short", make_log(24), epochs=129)])
    assert "short has logged 24 of 129 epochs" in capsys.readouterr().out


def test_the_class_table_shows_every_class_and_a_dash_for_an_absent_one(fused, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", type(sys)("data"))
    sys.modules["data"].CLASS_NAMES = ("wall", "floor", "chair")
    report.main([fused, "--classes"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["wall", "0.2500"] in rows and ["floor", "-"] in rows and ["chair", "0.7500"] in rows


# ------------------------------------------------------------------------------------------------------------ the log


def test_half_a_line_at_the_end_is_left_out_with_a_note(fused, capsys):
    path = Path(fused, "log.jsonl")
    whole, _ = report.read_log(path)
    path.write_text(path.read_text()[:-40])
    log, notes = report.read_log(path)
    assert log == whole[:-1]
    assert len(notes) == 1 and "line 30: half a line" in notes[0]
    assert report.main([fused]) == 0
    assert "half a line" in capsys.readouterr().out


def test_a_broken_line_in_the_middle_is_an_error_with_file_and_line(fused, capsys):
    path = Path(fused, "log.jsonl")
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:25]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 7: broken JSON"):
        report.read_log(path)
    assert report.main([fused]) == 2
    assert "line 7" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["[1, 2]", '{"loss": 1.0}', '{"epoch": "3"}'])
def test_a_line_that_is_no_epoch_is_an_error(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1: expected an object with an integer 'epoch'"):
        report.read_log(path)


@pytest.mark.parametrize("text", ["", "\n\n", '{"epoch": 0, "lo'])
def test_a_log_without_a_whole_line_is_an_error(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="no whole line"):
        report.read_log(path)


def test_a_resumed_run_replaces_what_was_logged_from_there_on_and_says_so(tmp_path):
    log = make_log()
    log[25]["loss"] = None
    again = [{**entry, "loss": 7.0} for entry in make_log()[20:24]]
    folder = write_run(tmp_path / "resumed", log + again)
    read, notes = report.read_log(Path(folder, "log.jsonl"))
    assert read[0:20] + read[21:] == log[:20] + again[1:]  # 24..29 belong to the abandoned attempt
    assert read[20] == again[0] | {"replaced_faults": ["epoch 25: loss is not finite"]}
    assert len(notes) == 1 and "resumed at epoch 20" in notes[0] and "1 with a non-finite" in notes[0]
    stability = criteria(read)[0]
    assert stability["passed"] is False  # it did happen, whatever came of it later
    assert stability["detail"] == "epoch 20: before it was resumed, epoch 25: loss is not finite"
    again = report.read_log(Path(write_run(tmp_path / "twice", log + make_log()[20:26] + make_log()[22:]), "log.jsonl"))
    assert len(again[1]) == 2 and criteria(again[0])[0]["passed"] is False  # still, after it was resumed once more


def test_epochs_that_were_killed_and_trained_again_without_a_fault_do_not_count_against_a_run(tmp_path):
    read, notes = report.read_log(Path(write_run(tmp_path / "r", make_log()[:21] + make_log()[20:]), "log.jsonl"))
    assert len(notes) == 1 and read == make_log()
    assert criteria(read)[0]["passed"] is True


@pytest.mark.parametrize("missing, message", [("log.jsonl", "log.jsonl does not exist"),
                                              ("config.json", "has no config.json")])
def test_a_folder_without_its_files_is_a_clear_error(fused, capsys, missing, message):
    Path(fused, missing).unlink()
    assert report.main([fused]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_folder_and_a_broken_config_are_clear_errors(tmp_path, fused, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    Path(fused, "config.json").write_text("{")
    assert report.main([fused]) == 2
    assert "config.json is not valid JSON" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ curves


def gaps(log):
    """The same log with nulls, a skipped step, a missing epoch and a ratio outside its band."""
    log[12].update(loss=None, losses={"semantic": None}, val_miou=None, grad_norm={"3d": None}, skipped_steps=1)
    log[20].update(fusion_2d_ratio=0.9)
    return log[:15] + log[16:]


@pytest.mark.parametrize("logs", [
    make_log(1), make_log(2), make_log(129), make_log(model="baseline"), gaps(make_log()),
    {"fused": make_log(5), "a baseline with a long name": make_log(model="baseline")},
    [{"epoch": 0, "stage": 1, "loss": None, "losses": {}, "val_miou": None, "grad_norm": {}, "skipped_steps": 8}],
], ids=["one epoch", "two epochs", "whole", "baseline", "gaps", "two runs", "nothing finite"])
@pytest.mark.filterwarnings("error")
def test_curves_are_drawn_for_any_log_without_a_warning(tmp_path, logs):
    draw_curves(logs, tmp_path / "curves.png")
    assert picture_size(tmp_path / "curves.png") == (1650, 840)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_null_values_and_missing_epochs_are_gaps_in_a_curve():
    values = report._series(gaps(make_log()), lambda entry: entry["val_miou"])
    assert len(values) == 30 and [e for e, v in enumerate(values) if v != v] == [12, 15]


def test_an_empty_log_is_refused_before_anything_is_written(tmp_path):
    for logs in ([], {}, {"run": make_log(3), "baseline": []}):
        with pytest.raises(ValueError, match="a log is empty"):
            draw_curves(logs, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_importing_report_loads_neither_matplotlib_nor_torch():
    code = "import sys, report; print([m for m in ('matplotlib', 'torch', 'data') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPORT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- failure modes

def test_failures_prints_a_row_an_experiment_draws_them_and_exits_1_where_one_does_not_hold(tmp_path, capsys,
                                                                                            monkeypatch):
    from experiments import failures

    good = failures.Finding("jolt", "jump of the logits", 1.5, 0.0, 0.1, 1e-5)
    cured = good._replace(name="no disease", without=0.0)
    ill = good._replace(name="no cure", with_cure=0.2)
    for findings, code in (([good], 0), ([good, cured], 1), ([ill, good], 1)):
        monkeypatch.setattr(failures, "EXPERIMENTS", [lambda f=f: f for f in findings])
        assert report.main(["--failures", "--out", str(tmp_path / "modes.png")]) == code
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in said[2:-1]] == ["yes" if f is good else "NO" for f in findings]
        assert said[2].startswith(findings[0].name)
        assert f"{findings[0].without:.3g}" in said[2].split()
        assert picture_size(tmp_path / "modes.png")[0] == 1265


@pytest.mark.parametrize("flags", [[], ["--failures", "runs/x"]])
def test_neither_runs_nor_failures_and_both_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(flags)
    assert stop.value.code == 2
    assert "give run folders, such as runs/fused, or --failures alone" in capsys.readouterr().err
