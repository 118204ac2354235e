"""Tests of train.py: configuration, checkpoints, going on, the log, non-finite steps."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Payload
from kill import differences, log_lines, same
from PIL import Image

import train
from data import Scenes
from guard import MAX_SKIPPED_IN_A_ROW
from losses import weighted_sum
from runs import Stop, Stopped, commit, finite, read_checkpoint, read_log
from scenes import generate
from scenes.folder import CLASS_NAMES
from stages import INSTANCE, curriculum, stage_epochs
from tower import LITE0
from train import RECIPES, Config, learning_rate, load_model, main, parse_config

SHORT = ("--compress", 43)  # 4 epochs of 2 steps, one a row
CPU = torch.device("cpu")
LOG_KEYS = {"epoch", "stage", "row", "loss", "losses", "val_miou", "val_iou", "fusion_2d_ratio", "fusion_ramp",
            "seen_share", "rms_2d", "rms_3d", "cosine", "grad_norm", "skipped_steps", "steps", "lr", "seconds",
            "peak_memory_mb", "val_ap", "val_ap50", "val_ap25", "val_loss", "clipped", "spikes", "update_rms"}


def message_of(call, *args):
    """What a call says when it stops the program."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    return str(stop.value)


@pytest.fixture(scope="session")
def short_run(run_train, tmp_path_factory):
    """A finished BiFusion run of 4 epochs: its folder. Not to be written into: copy it."""
    out = tmp_path_factory.mktemp("short") / "bifusion"
    run_train(out, *SHORT)
    return out


@pytest.fixture
def run_copy(short_run, tmp_path):
    return shutil.copytree(short_run, tmp_path / "run")


@pytest.mark.parametrize(("flags", "said"), [
    ("--nonsense 1", "unrecognized arguments: --nonsense"),
    ("--stag 1", "unrecognized arguments: --stag"),  # no guessing from a part of a name
    ("--stage 4", "choose from 0, 1, 2, 3"), ("--preset huge", "choose from small, base"),
    ("--model pointnet", "choose from bifusion, baseline"), ("--plan C", "choose from full, A, B"),
    ("--seed x", "invalid int value"), ("--lr nan", "--lr must be from 0 to 10, got nan"),
    ("--compress 0.5", "--compress must be from 1 to 1e+06, got 0.5"),
    ("--cache-gb nan", "--cache-gb must be from 0 to 1e+06, got nan"),
    ("--workers -1", "--workers must be from 0 to 1000, got -1"),
    ("--weight-decay -1", "--weight-decay must be from 0 to 10, got -1.0"),
    ("--tower-rate 1.5", "--tower-rate must be from 0 to 1, got 1.5"),
    ("--batch-size 0", "--batch-size must be from 1 to 10000, got 0"),
    ("--voxel-size -1", "--voxel-size must be from 0.001 to 10, got -1.0"),
    ("--device abacus", "--device abacus cannot be used here"),
    ("--device xpu:7", "--device xpu:7 cannot be used here"),
    ("--tower RN50", "--tower RN50 needs --tower-weights: a local file, a pretrained tag of its library, or scratch"),
    *[(flags, "no run to go on from. Start it with: python train.py --stage 1 --model bifusion --out /")
      for flags in ("--stage 2", "--stage 3", "--resume")],
])
def test_a_flag_or_value_that_cannot_be_is_refused_before_anything_is_written(flags, said, tmp_path, capsys):
    message = message_of(parse_config, [*flags.split(), "--out", str(tmp_path / "run")])
    assert said in (message if message != "2" else capsys.readouterr().err.replace("'", ""))
    assert not (tmp_path / "run").exists()


def test_every_field_of_config_is_a_flag_with_a_help_text(capsys):
    message_of(main, ["--help"])
    said = capsys.readouterr().out
    for name, field in Config.__dataclass_fields__.items():
        is_flag = name not in ("classes", "side")  # which the data say
        assert (f"--{name.replace('_', '-')} " in said) == is_flag == bool(field.metadata.get("help"))


def test_flags_left_out_take_the_presets_values_and_plan_b_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run of the user lies in runs/
    config = parse_config([])
    assert all(getattr(config, name) == value for name, value in RECIPES["small"].items() if name != "image_size")
    assert (config.out, parse_config(["--model", "baseline"]).out) == ("runs/bifusion", "runs/baseline")
    assert (config.tower, config.tower_weights) == LITE0
    assert parse_config(["--tower", "RN50", "--tower-weights", "scratch"]).tower == "RN50"
    assert parse_config(["--clip-weights", "scratch"]).tower_weights == "scratch"  # its name of before
    assert parse_config(["--plan", "A", "--preset", "base"]).tower_weights == "scratch"
    careful = parse_config(["--plan", "B"])
    assert (careful.lr, careful.weight_decay) == (1e-5, 1e-6)
    assert parse_config(["--plan", "B", "--lr", "2e-5"]).lr == 2e-5
    for lr in (0.03, 3e-4):  # the share by which a step shrinks the weights is that at the preset's rate
        config = parse_config(["--lr", str(lr)])
        assert config.lr * config.weight_decay == pytest.approx(3e-3 * 0.05)
    assert parse_config(["--lr", "0.03", "--weight-decay", "0.05"]).weight_decay == 0.05
    assert [parse_config(["--lr", lr]).weight_decay for lr in ("0", "1e-6")] == [0.05, 10]  # which --resume takes


def test_a_run_that_goes_on_takes_its_own_settings_and_a_flag_that_differs_is_refused(tmp_path):
    flags = ["--out", str(tmp_path), "--cache-gb", "0", "--cache", "here", "--workers", "0", "--compress", "43"]
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(parse_config(flags))))
    again = parse_config(["--resume", "--out", str(tmp_path), "--compress", "43", "--seed", "0"])  # as they were
    assert (again.cache_gb, again.cache, again.compress) == (0, "here", 43)
    assert again.workers == Config.workers  # of the call
    assert parse_config(["--resume", "--out", str(tmp_path), "--cache-gb", "3"]).cache_gb == 3
    for flag, value in (("--lr", "0.5"), ("--seed", "7"), ("--model", "baseline"), ("--compress", "2.0"),
                        ("--plan", "A"), ("--voxel-size", "0.5"), ("--tower-weights", "scratch")):
        said = message_of(parse_config, ["--resume", "--out", str(tmp_path), flag, value])
        assert f"{flag} {value} differs from" in said and "start a new run with another --out" in said


@pytest.mark.parametrize("lacks", ["train", "val", "weights"])
def test_data_or_weights_that_cannot_be_had_stop_the_run_before_it_begins(lacks, tiny_rooms, tmp_path):
    root, flags = (tiny_rooms, ["--tower-weights", "nowhere.pt"]) if lacks == "weights" else (tmp_path / "data", [])
    if lacks == "val":
        shutil.copytree(tiny_rooms / "train", root / "train")
        (root / "val" / "empty").mkdir(parents=True)
    said = message_of(main, ["--data", str(root), "--out", str(tmp_path / "run"), "--device", "cpu", *flags])
    assert said.startswith("error: weights " if flags else f"error: no scene in {root / lacks}; generate rooms "
                           f"with: python -m scenes.boxes --out {root}, or give --data a folder with train/ and val/")
    assert (f"nowhere.pt of {LITE0[0]} cannot be had" in said) == (lacks == "weights")
    assert "\n" not in said and not (tmp_path / "run").exists()


def test_default_rooms_are_completed_with_their_own_seed_and_broken_json_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec, asked = Path("data/rooms/rooms.json"), []
    monkeypatch.setattr(generate, "generate", lambda *_: asked.append((_[4], tuple(_[6]))))
    for text in ("", '{"generator": 1, "seed": 5, "image_size": [64, 48]}'):
        if text:
            spec.parent.mkdir(parents=True)
            spec.write_text(text)
        assert "python -m scenes.boxes" in message_of(main, ["--device", "cpu", "--out", "run"])
    assert asked == [(0, (160, 120)), (5, (64, 48))]
    for path in (spec, Path("run/config.json")):
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"seed": ')
    said = message_of(main, ["--out", "new", "--device", "cpu"])
    assert said.startswith(f"error: {spec}: expected a JSON object, found ") and "delete data" in said
    assert message_of(main, ["--resume", "--out", "run"]).startswith("run/config.json is not valid JSON")


def test_the_learning_rate_stays_until_stage_three_and_falls_to_zero():
    rates = [learning_rate(2.0, i / 10, (60, 99)) for i in range(1001)]
    assert [rates[i] for i in (0, 599, 800, 1000)] == pytest.approx([2, 2, 1, 0], abs=1e-9)
    assert sorted(rates)[::-1] == rates


@pytest.mark.parametrize(("own", "found"), [
    ({}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_do_not_spin_while_they_wait_unless_the_user_says_so(own, found):
    code = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT", "None"))
sys.meta_path.insert(0, Finder())
import train
"""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, env=env | own,
                          capture_output=True, text=True)
    assert done.stderr == f"{found}\n"  # what was set when torch was about to be imported


def test_every_line_of_the_log_has_all_keys_and_the_best_checkpoint_is_the_best_epoch(short_run):
    log = read_log(short_run / "log.jsonl")
    for line in log:
        assert set(line) == LOG_KEYS
        assert len(line["val_iou"]) == len(CLASS_NAMES)
        assert 0 <= line["val_miou"] <= 1
        assert set(line["lr"]) >= set(line["grad_norm"]) - {"fusion"}
        assert all((line[name] is None) == (line["stage"] == 1) for name in ("val_ap", "val_ap50", "val_ap25"))
    assert log[1]["fusion_2d_ratio"] < 0.4  # the ramp began and ended within this epoch, which is not full therefore
    assert [line["fusion_ramp"] for line in log] == [0, 0, 1, 1]
    assert finite(1.23456789e-8) == 1.23457e-8 and finite(None) is finite(math.nan) is finite(-math.inf) is None
    best = max(log, key=lambda line: line["val_miou"])
    assert read_checkpoint(short_run / "best.pt")["next"] == [best["epoch"], best["steps"]]
    for number, (_, last) in stage_epochs(curriculum(43)).items():
        assert read_checkpoint(short_run / f"stage{number}.pt")["next"] == [last, 2]


@pytest.fixture
def tiny_config(tiny_rooms, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES["small"], "image_size", (64, 48))
    return Config(data=str(tiny_rooms), out=str(tmp_path / "run"), device="cpu", workers=0, cache_gb=0.0, lr=1e-2,
                  weight_decay=0.0, voxel_size=0.25, views=2, batch_size=2, tower_rate=0.0)


@pytest.fixture
def build(make_model):
    return lambda config, load=True: make_model(num_classes=len(CLASS_NAMES))


def test_gradients_losses_and_gate_change_at_the_same_step(tiny_config, build, monkeypatch):
    rows = curriculum(8, pretrained=False)  # once the gate switched at epoch 5.5, its prior and gradient at 6
    rows = (*rows[:3], dataclasses.replace(rows[3], last_epoch=rows[3].first_epoch))
    seen, real = [], train.forward

    def forward(model, batch, row):
        for name, gate in model.gates.items():
            gate._forward_hooks.clear()
            gate.register_forward_hook(lambda *_, name=name: seen[-1][0].append(name))
        seen.append(([], {name for name, part in model.parts().items() if any(p.requires_grad for p in part)}))
        terms, stats = real(model, batch, row)
        seen[-1] += (set(terms),)
        return terms, stats

    monkeypatch.setattr(train, "forward", forward)
    log = train.train(tiny_config, rows, build, evaluated=())
    assert len(seen) == 2 * len(log) == 2 * (rows[-1].last_epoch + 1)
    for step, found in enumerate(seen):
        row = next(row for row in rows if row.first_epoch <= step // 2 <= row.last_epoch)
        assert found == ([row.fusion] * (row.fusion != "identity"), set(row.trains), set(row.losses)), step
    assert all(line["val_miou"] is None for line in log)  # none was to be evaluated
    _, *rates, last = (line["lr"]["3d"] for line in log)  # of an epoch's last step; the first are the warm-up's
    assert {*rates} == {0.01} and last == pytest.approx(0.005)  # halfway through the one epoch of stage 3


def test_the_ramp_of_a_checkpoint_and_of_a_run_stopped_in_its_evaluation_is_that_of_the_logged_miou(
        tiny_config, build, tmp_path, monkeypatch):
    rows = curriculum(43, pretrained=False)
    rows = rows[0], dataclasses.replace(rows[1], ramp_epochs=4.0)  # the last step is at an eighth of the ramp
    train.train(tiny_config, rows, build)
    model, _, state = load_model(tmp_path / "run" / "last.pt", build=build)
    assert model.ramp == state["ramp"] == 0.125 and model.row == rows[1]
    config, stop, real = dataclasses.replace(tiny_config, out=str(tmp_path / "stopped")), Stop(), train.evaluate

    def evaluate(model, *args):
        stop.asked = stop.asked or 15 * (model.row == rows[1])
        return real(model, *args)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped in epoch 1 after step 2 of 2"):
        patch.setattr(train, "evaluate", evaluate)
        train.train(config, rows, build, stop=stop)
    train.train(dataclasses.replace(config, resume=True), rows, build)
    assert log_lines(tmp_path / "stopped") == log_lines(tmp_path / "run")


def test_stage_by_stage_and_resumed_gives_the_run_in_one_go_bit_for_bit(short_run, run_train, tmp_path, capsys):
    out, first = tmp_path / "run", {"config.json", "log.jsonl", "stage1.pt", "last.pt", "best.pt"}
    run_train(out, *SHORT, "--stage", 1)
    assert {path.name for path in out.iterdir()} == first
    config, said = json.loads((out / "config.json").read_text()), capsys.readouterr()
    assert (config["model"], config["epochs"], config["compress"], config["seed"]) == ("bifusion", 4, 43, 0)
    assert config["commit"] == commit()
    assert len(re.findall(r"stage 1, epochs 0-0: loss \d.* val mIoU \d.* 0 steps skipped", said.out + said.err)) == 1
    assert f"next: python train.py --stage 2 --out {out}" in said.out
    run_train(out, "--stage", 2)
    assert {path.name for path in out.iterdir()} == first | {"stage2.pt"}
    run_train(out, "--resume")
    assert differences(short_run, out) == []


def test_plan_a_and_the_baseline_run_without_images(run_train, tmp_path):
    for flags in (("--plan", "A"), ("--model", "baseline")):
        for line in run_train(tmp_path / flags[1], *SHORT, *flags):
            instances = flags[1] == "baseline" and line["stage"] > 1
            assert set(line["losses"]) == {"semantic", *(INSTANCE if instances else ())}
            assert line["fusion_2d_ratio"] is None
            assert set(line["grad_norm"]) == {"3d", *(("decoder",) if instances else ())}


def test_a_folder_that_holds_a_run_or_lacks_a_checkpoint_is_refused_and_left_alone(run_copy):
    for name in ("stage2.pt", "last.pt"):
        (run_copy / name).unlink()
    before = {path.name: path.read_bytes() for path in run_copy.iterdir()}
    for flags, said in (
            ("--stage 1", f"already holds a run. Go on with it: python train.py --resume --out {run_copy}"),
            ("--stage 2", "already holds epoch 3, stage 2 starts at 1"), ("--resume", "last.pt not found"),
            ("--stage 3", f"stage2.pt not found. It is made by: python train.py --stage 2 --model bifusion --out "
                          f"{run_copy}")):
        assert said in message_of(main, [*flags.split(), "--out", str(run_copy), "--device", "cpu"])
    assert before == {path.name: path.read_bytes() for path in run_copy.iterdir()}


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(("pattern", "flags", "said"), [
    ("coord.npy", ("--model", "baseline", "--workers", 1), "coord.npy: expected an array of numbers"),
    ("color/*.jpg", SHORT, ".jpg: expected an image, found")])
def test_a_broken_file_of_a_scene_stops_the_training_in_one_line_and_stays_as_it_is(
        pattern, flags, said, run_train, tiny_rooms, tmp_path):
    root = shutil.copytree(tiny_rooms, tmp_path / "data")
    files = list((root / "train").glob(f"*/{pattern}"))
    for path in files:
        halve(path)
    before = [path.read_bytes() for path in files]
    message = message_of(run_train, tmp_path / "run", *flags, "--data", root)
    assert message.startswith("error: ") and str(root / "train") in message and said in message
    assert "\n" not in message and before == [path.read_bytes() for path in files]


def test_poor_scenes_train_on_through_all_stages_with_finite_losses_and_gradients(
        run_train, tiny_rooms, tmp_path, capsys):
    root = shutil.copytree(tiny_rooms, tmp_path / "data")
    point, ignored, alone, lost = sorted((root / "train").iterdir())
    for path in point.glob("*.npy"):
        np.save(path, np.load(path)[:1])
    np.save(ignored / "segment20.npy", np.full(len(np.load(ignored / "coord.npy")), -1))
    np.save(alone / "instance.npy", np.full(len(np.load(alone / "coord.npy")), -1))
    for path in alone.glob("depth/*.png"):  # no voxel is seen
        Image.fromarray(np.zeros((48, 64), np.uint16)).save(path)
    for path in lost.glob("pose/*.txt"):
        np.savetxt(path, np.full((4, 4), -np.inf))
    for path in (lost / "instance.npy", *(root / "val").glob("*/instance.npy")):
        path.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = run_train(tmp_path / "run", *SHORT, "--data", root, "--batch-size", 1)
    said = [str(warning.message) for warning in caught if "3D-only" in str(warning.message)]
    assert len(said) == 1 and f"{lost.name}: 3D-only, none of 8 images used: 8 of 8 frames have a pose that" in said[0]
    assert "(1 train scenes have no instance.npy: they teach classes only)" in capsys.readouterr().out
    assert [line["stage"] for line in log] == [1, 2, 2, 3]
    for line in log:
        assert None not in (line["loss"], *line["losses"].values(), *line["grad_norm"].values())
        assert line["skipped_steps"] == 0 and line["val_ap"] is None
    assert 0 < log[-1]["seen_share"] < 1
    assert_finite(tmp_path / "run")


def test_a_checkpoint_rebuilds_its_model_and_gives_the_logged_miou_again(short_run, tiny_rooms):
    log = read_log(short_run / "log.jsonl")
    for name, epoch, row in (("stage1.pt", 0, "stability"), ("last.pt", 3, "enhancement")):
        model, config, state = load_model(short_run / name)
        assert not model.training
        assert (config.model, config.compress, state["next"]) == ("bifusion", 43, [epoch, 2])
        assert same(dict(model.state_dict()), dict(state["model"]))
        assert (model.row.name, model.row.first_epoch, model.ramp) == (row, epoch, float(epoch > 0))
        scenes = Scenes(tiny_rooms, config.voxel_size, (64, 48), 2, 0, config.seed, CPU, "", 0)
        scenes.read(config.views if epoch else 0, 0.0, None)
        found = train.evaluate(model, scenes.val_batches, CPU)
        assert found["miou"] == pytest.approx(log[epoch]["val_miou"], abs=1e-5)


def weights(**changed):
    return lambda state: state | {"model": state["model"] | changed}


@pytest.mark.parametrize(("change", "said"), [
    (None, "is not a readable checkpoint"),
    (lambda state: [1, 2], r"is not a checkpoint of this version of train\.py: it lacks \['config'"),
    (lambda state: {"model": {}}, r"it lacks \['config', 'next', 'optimizer', 'ramp', 'row'\]"),
    (lambda state: state | {"model": dict(list(state["model"].items())[:-1])}, "belongs to another model: .*Missing"),
    (weights(wheels=torch.zeros(3)), "belongs to another model: .*wheels"),
    (weights(**{"semantic_head.weight": torch.zeros(3, 3)}), r"another model: .*\(\[3, 3\]\)"),
], ids=["half", "a list", "keys missing", "a weight missing", "a weight too many", "another shape"])
def test_a_broken_or_foreign_checkpoint_stops_with_its_name_and_the_reason_and_stays_as_it_is(run_copy, change, said):
    path = run_copy / "last.pt"
    if change:
        torch.save(change(torch.load(path, weights_only=True)), path)
    else:
        halve(path)
    before = path.read_bytes()
    message = message_of(main, ["--resume", "--out", str(run_copy), "--device", "cpu"])
    assert str(path) in message and re.search(said, message)
    assert path.read_bytes() == before


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["top", "model"])
def test_a_checkpoint_never_runs_what_is_pickled_in_it(run_copy, tmp_path, place, new_format):
    touched, path = tmp_path / "touched", run_copy / "last.pt"
    state = torch.load(path, weights_only=True)
    (state["model"] if place == "model" else state)["extra"] = Payload(touched)
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    said = message_of(main, ["--resume", "--out", str(run_copy), "--device", "cpu"])
    assert f"{path} is not a readable checkpoint" in said and not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # the test can fail: this is what happens otherwise


def poison(monkeypatch, steps):
    """Make the loss NaN at these steps of the run, counted from 0."""
    real, count = weighted_sum, iter(range(10**9))

    def poisoned(terms, weights):
        return real(terms, weights) * (math.nan if next(count) in steps else 1.0)

    monkeypatch.setattr(train, "weighted_sum", poisoned)


def skipped(out):
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def assert_finite(out):
    state = read_checkpoint(out / "last.pt")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_step_whose_loss_or_gradient_is_not_finite_is_skipped_counted_and_named(
        run_train, tmp_path, monkeypatch, capsys):
    clip, calls = train.clip_by_branch, iter(range(99))
    monkeypatch.setattr(train, "clip_by_branch", lambda model, limit: clip(model, limit) | (
        {"3d": torch.tensor(math.inf)} if next(calls) == 7 else {}))
    poison(monkeypatch, {1, 4})
    log = run_train(tmp_path, *SHORT)
    assert [line["skipped_steps"] for line in log] == [1, 0, 1, 1]
    assert all(line["loss"] is not None and math.isfinite(line["loss"]) for line in log)
    assert_finite(tmp_path)
    said, records = capsys.readouterr(), skipped(tmp_path)
    lines = [line for line in (said.out + said.err).splitlines() if "skipped, not finite" in line]
    assert len(lines) == len(records) == 3
    assert "epoch 0 step 1: skipped, not finite: weighted loss; scenes room_000" in lines[0]
    assert re.search("stage 1, epochs 0-0: .* 1 steps skipped", said.out + said.err)
    for record, place in zip(records, ((0, 1, 1), (2, 0, 2), (3, 1, 3))):
        assert (record["epoch"], record["step"], record["stage"]) == place
        assert len(record["scenes"]) == 2 and record["scenes"][0].startswith("room_000")
        assert record["found"] == [{key: record[key] for key in ("scenes", "first_not_finite")}]
        assert all(isinstance(value, float) for key, value in record.items() if key.startswith("losses/"))
    for record in records[:2]:
        assert record["loss"] == "nan" and record["first_not_finite"] == "weighted loss"
        assert {value for key, value in record.items() if key.startswith("grad_norm/")} == {"nan"}
    assert records[2]["grad_norm/3d"] == "inf" and isinstance(records[2]["loss"], float)
    terms = {key.partition("/")[2] for key in records[1] if key.startswith("losses/")}
    assert terms == {"semantic", "alignment", "gate", *INSTANCE} and "fusion_2d_ratio" in records[1]


def test_ten_non_finite_steps_in_a_row_end_the_run_with_advice_and_fewer_do_not(run_train, tmp_path, monkeypatch):
    assert MAX_SKIPPED_IN_A_ROW == 10
    poison(monkeypatch, {1, 2, 3, *range(5, 100)})
    said = message_of(run_train, tmp_path, "--stage", 1, "--compress", 5, "--batch-size", 1, "--model", "baseline")
    assert "10 steps in a row were not finite" in said and "Start anew with another --out and --plan B" in said
    record = skipped(tmp_path)[-1]
    assert (record["epoch"], record["step"], record["first_not_finite"]) == (3, 2, "weighted loss")
    log = read_log(tmp_path / "log.jsonl")  # of 4 epochs of 4 steps
    assert [line["skipped_steps"] for line in log] == [3, 3, 4, 3]
    assert [line["val_miou"] is None for line in log] == [False, False, False, True]
    assert read_checkpoint(tmp_path / "last.pt")["next"] == [2, 4]  # the last epoch before the end
    assert_finite(tmp_path)
