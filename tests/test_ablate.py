"""ablate.py: every variant changes what it says and nothing else, and its patches reach what train.py calls."""

import json
import math

import pytest
import torch

import fusion
import model as networks
import train
from experiments import ablate
from stages import PARTS, setting_at

UNCHANGED = ("baseline", "kept", "kept_film_2d", "faults")


@pytest.fixture(autouse=True)
def _patches_end_with_the_test(monkeypatch):
    for owner, names in ((train, ("setting_at", "evaluate", "new_model", "to_device", "weighted_sum")),
                         (networks, ("FiLM", "blend")), (networks.BiFusion, ("forward",)),
                         (fusion.Standardise, ("forward",))):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.parametrize("name", ablate.VARIANTS)
@pytest.mark.parametrize("epoch", [21, 25, 40, 41, 50, 60, 61, 70])
def test_a_variant_changes_what_it_says_and_no_more(name, epoch):
    before = setting_at(epoch, pretrained=True)
    after = ablate.VARIANTS[name][1](before)
    assert set(after.parts) <= set(PARTS) and len(set(after.parts)) == len(after.parts)
    assert (after.stage, after.name) == (before.stage, before.name)
    first, last = {"kept_whole": (61, 128), "kept_film_late": (21, 60), "kept_no_prior": (41, 128),
                   "kept_no_fixed": (21, 40)}.get(name, (21, 128))
    assert (after == before) == (name in UNCHANGED or not first <= epoch <= last)
    if name not in (*UNCHANGED, "naive"):
        assert (after.clip, after.ramp, after.tower_rate) == (before.clip, before.ramp, before.tower_rate)
        assert ("gate" in after.parts) == (after.fusion == "learned") and ("film" in after.parts) == after.film
        assert set(after.parts) - {"gate", "film"} == set(before.parts) - {"gate", "film"}
        assert set(after.losses) - {"gate"} == set(before.losses) - {"gate"}
    if name in ("plain", "film_geometry", "film_2d", "dropout", "prior", "lean"):
        assert after.fusion == "learned" and after.film == (name in ("film_geometry", "film_2d", "lean"))
        assert ("gate" in after.losses) == (name == "prior") and (after.blank == 0 or name == "lean")
    if name.startswith("kept"):
        assert after.film == (name != "kept_no_film" and (name != "kept_film_late" or epoch > 60))
        assert after.blank == before.blank * (name != "kept_whole")
        assert after.fusion == ("learned" if name == "kept_no_fixed" else before.fusion)
        assert ("gate" in after.losses) == (after.fusion == "learned" and name != "kept_no_prior")
    if name == "naive":
        assert (after.clip, after.tower_rate, after.ramp) == (math.inf, 1.0, 1.0)


def run(name, tiny_rooms, tmp_path, monkeypatch, *flags):
    for key, value in {"image_size": (64, 48), "voxel_size": 0.25, "views": 2, "batch_size": 2}.items():
        monkeypatch.setitem(train.RECIPES["small"], key, value)
    ablate.main([name, "0", "--compress", "43", "--data", str(tiny_rooms), "--out", str(tmp_path / "run"),
                 "--device", "cpu", "--cache", str(tmp_path / "cache"), *flags])
    return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


def test_injected_faults_are_skipped_or_clipped_and_counted(tiny_rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "FAULT_RATE", 0.4)
    log = run("faults", tiny_rooms, tmp_path, monkeypatch)
    counts = json.loads((tmp_path / "run" / "blanked.json").read_text())["faults"]
    records = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    named = [record["first_not_finite"] for record in records]
    assert set(named) == {"output of standardise_3d", "weighted loss"}
    of = {fault: sum(n for key, n in counts.items() if key.startswith(fault)) for fault in ("nan", "inf", "burst")}
    assert named.count("output of standardise_3d") == of["nan"] and of["burst"] > 0
    assert named.count("weighted loss") <= of["inf"]  # a step may have both
    assert sum(line["skipped_steps"] for line in log) == len(records)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_variant_that_diverges_stays_in_the_table(tiny_rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "FAULT_RATE", 1.0)
    monkeypatch.setattr(train, "MAX_SKIPPED_IN_A_ROW", 2)
    run("faults", tiny_rooms, tmp_path, monkeypatch)
    assert "0 (diverged) | -" in ablate.table(tmp_path)


def test_patches_reach_the_model_that_train_makes(tiny_rooms, tmp_path, monkeypatch):
    ablate.no_standardisation(0)
    ablate.film_from_2d(0)
    run("dropout", tiny_rooms, tmp_path, monkeypatch)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert abs(log[-1]["rms_3d"] - 1) > 0.1  # nothing standardises it
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert state["film.mlp.0.weight"].shape[1] == 64  # reads features, not geometry
    assert networks.blend.__module__ == "ablate"


def test_blanking_is_measured_on_val_and_unknown_words_get_the_variants(tiny_rooms, tmp_path, monkeypatch, capsys):
    log = run("kept", tiny_rooms, tmp_path, monkeypatch)
    capsys.readouterr()
    ablate.main(["--blank", str(tmp_path / "run" / "last.pt")])
    said = json.loads(capsys.readouterr().out.partition(" ")[2])
    assert said["as they are"] == pytest.approx(log[-1]["val_miou"], abs=1e-4)
    assert set(said) == set(ablate.BLANKED)
    with pytest.raises(SystemExit, match="kept_film_2d"):
        ablate.main(["unknown", "0"])
