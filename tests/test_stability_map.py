"""stability.py: figures that are known by hand; a sweep makes what is missing. probe.py: the AUC of the gate."""

import json
import math

import numpy as np
import pytest

from experiments import probe, report, stability


def line(rate, miou, loss, seed=0, recipe="kept", **other):
    return {"recipe": recipe, "rate": rate, "seed": seed, "miou": miou, "loss": loss, "start": 3.0, "ratio": 0.4,
            "ap": 0.2 + seed / 10, "images_black": 0.1, "points_black": None, "diverged": miou is None, "skipped": 0,
            "spikes": 0.01, "clipped": {"3d": 0.5}} | other


def test_sensitivity_plateau_and_divergence_are_those_of_a_map_known_by_hand():
    lines = [line(1e-3, 0.45, 1.25), line(1e-3, 0.47, 1.25, 1), line(1e-2, 0.50, 1.0), line(1e-2, 0.50, 1.0, 1),
             line(1e-1, 0.10, 9.0, skipped=4), line(1e-1, None, None, 1)]
    found = stability.judge(lines)
    assert found["sensitivity_loss"] == pytest.approx((0.25 + 0 + 2) / 3)  # 9.0 and the diverged run count as 3.0
    assert found["sensitivity_miou"] == pytest.approx(0.5 - (0.46 + 0.5 + 0.05) / 3)
    assert (found["plateau"], found["best"], found["diverged"], found["skipped"]) == (pytest.approx(1), 1e-2, 1e-1, 4)
    assert found["clipped"] == {"3d": 0.5}
    flat = stability.judge([line(rate, 0.4, 1.0) for rate in (1e-3, 1e-2)])
    assert flat["sensitivity_loss"] == flat["sensitivity_miou"] == 0 and flat["diverged"] is None


def test_the_table_of_committed_lines_has_a_row_a_recipe_and_is_drawn(tmp_path, capsys):
    for recipe in ("naive", "kept"):
        lines = [json.dumps(line(rate, 0.3, 1.5, seed, recipe)) for rate in (1e-3, 1e-2) for seed in (0, 1)]
        (tmp_path / f"{recipe}.jsonl").write_text("\n".join(lines) + "\n")
    stability.main(["--table", str(tmp_path)])
    said = capsys.readouterr().out
    assert ("| curriculum | 4 | 0.001 | 0.300 ± 0.000 | 0.250 ± 0.071 | 0.400 ± 0.000 | 0.100 ± 0.000 | - | 0.000 "
            "| 0.000 | 1.0 | - | 0 | 0.0100 | 3d 0.50 |") in said
    assert "| curriculum, AP | 0.250 ± 0.071 | 0.250 ± 0.071 |" in said and "| naive, points black | - | - |" in said
    with pytest.raises(SystemExit):
        stability.main(["--table", str(tmp_path), "--device", "cuda"])
    assert "takes no flags of train.py: --device cuda" in capsys.readouterr().err
    two = line(1e-2, 0.5, 1.0), line(1e-2, None, None, 1)
    assert stability.mean_and_deviation(two, "miou") == "0.500, 1 diverged"
    assert "| naive | 4 |" in said and (tmp_path / "stability.png").stat().st_size > 10_000


def test_a_sweep_makes_what_has_no_line_yet_goes_on_where_a_run_stopped_and_names_what_failed(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.jsonl").write_text(json.dumps(line(1e-3, 0.3, 1.0)) + "\n")
    stopped, commands = tmp_path / "runs/out/kept_0.01_s0", []
    stopped.mkdir(parents=True)
    (stopped / "last.pt").touch()

    class Done:
        returncode, stderr = 0, "first line\nwhy it failed"

    def run(command, env, **kwargs):
        commands.append(command)
        Done.returncode = int("naive" in command)
        return Done

    monkeypatch.setattr(stability.subprocess, "run", run)
    monkeypatch.setattr(stability, "line_of", lambda folder, recipe, rate, seed: line(rate, 0.2, 1.0, seed, recipe))
    monkeypatch.setattr(stability, "draw", lambda lines, path: None)
    flags = "--out out --recipes kept naive --rates 1e-3 1e-2 --seeds 0 --at-a-time 1 --device cuda"
    stability.main(flags.split())
    assert all(c[7:11] == ["--compress", "8", "--device", "cuda"] for c in commands)
    assert sorted((c[3], c[6], "--resume" in c) for c in commands) == [
        ("kept", "0.01", True), ("naive", "0.001", False), ("naive", "0.01", False)]
    assert len(stability.read_lines("out")) == 2
    assert "naive_0.001_s0: why it failed" in capsys.readouterr().out


def test_the_auc_of_a_gate_that_knows_of_one_that_is_fixed_and_of_one_that_is_wrong():
    right = np.array([True, True, False, False])
    assert [probe.auc(np.array(alpha), right) for alpha in ([0.9, 0.8, 0.1, 0.2], [0.5] * 4, [0, 0.1, 0.2, 0.3])] == [
        1, 0.5, 0]
    assert math.isnan(probe.auc(np.ones(2), np.array([True, True])))


def test_the_report_shows_what_the_probe_left_without_a_verdict(tmp_path):
    found = {"alpha_deviation": 0.1, "alpha_auc": 0.64, "as they are": 0.7, "images black": 0.3, "points black": 0.6,
             "both black": 0.05}
    (tmp_path / "probe.json").write_text(json.dumps(found))
    log = [{"epoch": 0, "clipped": {"3d": 0.5, "2d": 0.25}, "spikes": 0.0},
           {"epoch": 1, "clipped": {"3d": 1.0}, "spikes": 0.125}]
    assert report.watched({"folder": tmp_path, "log": log}) == [
        "steps clipped: 2d 0.25, 3d 0.75; loss spikes 0.0625",
        "gate: deviation of alpha 0.100, AUC 0.640 (a fixed 0.5: 0 and 0.5)",
        "mIoU whole 0.700, images black 0.300, points black 0.600, both 0.050: images add +0.400, points +0.100"]
    assert report.watched({"folder": tmp_path / "none", "log": [{"epoch": 0}]}) == []
