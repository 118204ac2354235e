"""Runs that are killed, stopped by a signal or met by a full disk go on to the same end, bit for bit."""

import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from kill import differences, kill_and_resume, same, start

import train
from runs import Run, read_checkpoint, read_log
from tower import MapCache

SHORT = ("--compress", 43, "--batch-size", 1)  # 4 epochs of 4 steps: one of stage 1, two of stage 2, one of stage 3


@pytest.fixture(scope="module")
def whole(run_train, tmp_path_factory):
    """A run that was left alone: its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_train(out, *SHORT)
    return out


def finish(process, seconds=60):
    """Exit code of a process, negative for the signal that ended it."""
    process.join(seconds)
    assert not process.is_alive(), "still running"
    return process.exitcode


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it never came to that"
        time.sleep(0.005)


def stop_at(monkeypatch, number, call):
    """Send this process a signal within this call of train.to_device, a step's or an evaluation's batch."""
    real, count = train.to_device, iter(range(10**9))

    def to_device(batch, device):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return real(batch, device)

    monkeypatch.setattr(train, "to_device", to_device)


def test_a_run_killed_at_random_moments_ends_as_one_that_was_left_alone(whole, tiny_rooms, tmp_path):
    kills, met = kill_and_resume(tmp_path / "run", tiny_rooms, 3, 0.5, random.Random(1), *SHORT)
    assert kills == 3 and met
    assert differences(whole, tmp_path / "run") == []
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_worker_processes_change_no_bit_and_neither_does_a_kill_that_leaves_them_orphans(whole, tiny_rooms, tmp_path):
    out = tmp_path / "run"
    process = start(out, tiny_rooms, *SHORT, "--workers", 1)
    wait_for((out / "stage2.pt").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert finish(start(out, tiny_rooms, "--resume", "--workers", 1)) == 0
    assert differences(whole, out) == []


def test_a_run_killed_before_its_first_last_pt_begins_anew(whole, run_train, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    (out / "last.pt.tmp").write_bytes(b"half")
    run_train(out, "--resume")
    assert differences(whole, out) == []
    assert not list(out.glob("*.tmp"))


# calls of to_device in an epoch: four steps, then one for each of the two val scenes
@pytest.mark.parametrize(("number", "call", "epoch", "step"), [
    (signal.SIGTERM, 8, 1, 3), (signal.SIGINT, 10, 1, 4)], ids=["middle of the ramp", "evaluation"])
def test_a_signal_saves_the_step_reached_and_resuming_there_gives_the_same_run(
        whole, run_train, tmp_path, monkeypatch, capsys, number, call, epoch, step):
    out = tmp_path / "run"
    stop_at(monkeypatch, number, call)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_train(out, *SHORT)
    monkeypatch.undo()
    assert stop.value.code == 128 + number
    assert re.search(rf"stopped in epoch {epoch} after step {step} of 4; all of it is in {out}/last.pt; go on with: "
                     rf"python train.py --resume --out {out}( --device cpu)? --workers 0", capsys.readouterr().err)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    state = read_checkpoint(out / "last.pt")
    assert (state["next"], state["steps"], state["row"]["stage"]) == ([epoch, step], 4, 2)
    assert [line["epoch"] for line in read_log(out / "log.jsonl")] == list(range(epoch))
    run_train(out, "--resume")
    assert differences(whole, out) == []
    assert len((out / "log.jsonl").read_text().splitlines()) == 4  # no epoch was logged twice


def test_a_signal_while_a_checkpoint_is_written_ends_after_it_and_resuming_evaluates_alone(
        whole, run_train, tmp_path, monkeypatch):
    out, real, saves = tmp_path / "run", torch.save, []

    def save(state, file):
        saves.append(state["next"])
        if len(saves) == 2:
            file.write(b"")
            os.kill(os.getpid(), signal.SIGTERM)
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as stop:
        run_train(out, *SHORT)
    monkeypatch.setattr(torch, "save", real)
    assert stop.value.code == 128 + signal.SIGTERM
    assert saves == [[0, 4], [1, 4]] and read_checkpoint(out / "last.pt")["next"] == [1, 4]
    assert [line["epoch"] for line in read_log(out / "log.jsonl")] == [0]
    taken, forward = [], train.forward
    monkeypatch.setattr(train, "forward", lambda model, *args: taken.append(model.row.stage) or forward(model, *args))
    run_train(out, "--resume")
    assert differences(whole, out) == []
    assert taken == [2] * 4 + [3] * 4  # rows of the epochs 2 and 3; nothing of epoch 1 but its evaluation


def test_what_was_stopped_in_its_first_epoch_is_not_begun_again(run_train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for flags, said in (((*SHORT, "--stage", 1), "already holds a run"),
                        (("--stage", 2), "already holds epoch 1, stage 2 starts at 1")):
        stop_at(monkeypatch, signal.SIGTERM, 1)
        for match in ("143", said):
            with pytest.raises(SystemExit, match=match):
                run_train(out, *flags)
        monkeypatch.undo()
        run_train(out, "--resume", *flags[-2:])


def test_sigterm_to_a_whole_group_with_its_workers_saves_too(whole, tiny_rooms, tmp_path):
    out = tmp_path / "run"
    process = start(out, tiny_rooms, *SHORT, "--workers", 1, output=tmp_path / "said", prepare=os.setsid)
    wait_for((out / "stage1.pt").exists)
    os.killpg(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM, (tmp_path / "said").read_text()
    assert re.search(rf"--resume --out {out}( --device cpu)? --workers 1", (tmp_path / "said").read_text())
    assert finish(start(out, tiny_rooms, "--resume")) == 0
    assert differences(whole, out) == []


def test_sigterm_to_a_whole_group_while_the_maps_are_computed_keeps_those_made(whole, tiny_rooms, tmp_path):
    def slowly():
        real = MapCache.fill

        def fill(self, files, load, workers, until, share):
            def slow(items):
                for item in until(items):
                    yield item
                    if maps():  # a chunk is done: wait for the signal, after which train.py no longer listens
                        wait_for(lambda: signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)

            return real(self, files, load, workers, slow, share)

        os.setsid()
        MapCache.fill = fill

    def maps():
        return [path for path in Path(f"{out}_cache").glob("*/*") if path.suffix != ".tmp"]

    out, said = tmp_path / "run", tmp_path / "said"
    process = start(out, tiny_rooms, *SHORT, "--workers", 1, output=said, prepare=slowly)
    wait_for(maps)
    os.killpg(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM, said.read_text()
    assert "Traceback" not in said.read_text()
    assert "stopped in epoch 1 after step 0 of 4" in said.read_text()
    made = len(maps())
    assert 0 < made < 40 and read_checkpoint(out / "last.pt")["next"] == [1, 0]
    assert finish(start(out, tiny_rooms, "--resume")) == 0
    assert len(maps()) > made
    assert differences(whole, out) == []


def test_a_second_ctrl_c_ends_at_once(tiny_rooms, tmp_path):
    def endless_step():
        real = train.clip_by_branch

        def clip_by_branch(*args):
            (tmp_path / "inside").touch()
            time.sleep(1000)
            return real(*args)

        train.clip_by_branch = clip_by_branch

    process = start(tmp_path / "run", tiny_rooms, *SHORT, output=tmp_path / "said", prepare=endless_step)
    wait_for((tmp_path / "inside").exists)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "once more to end at once" in (tmp_path / "said").read_text())
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert finish(process, 5) == -signal.SIGINT


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole_and_the_run_goes_on_later(
        whole, run_train, tiny_rooms, tmp_path):
    out = tmp_path / "run"
    run_train(out, *SHORT, "--stage", 1)
    before = {name: (out / name).read_bytes() for name in ("last.pt", "best.pt", "stage1.pt")}
    room = (out / "last.pt").stat().st_size // 2
    process = start(out, tiny_rooms, "--resume", output=tmp_path / "said",
                    prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert finish(process) == 1
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    assert f"What was saved before in {out} is whole. Mend it, then go on with: python train.py --resume" in said
    assert "last.pt" in said
    assert not list(out.glob("*.tmp"))
    assert before == {name: (out / name).read_bytes() for name in before}
    run_train(out, "--resume")
    assert differences(whole, out) == []


def test_half_a_line_of_the_log_is_left_out_and_cut_off_without_rewriting_the_lines_before(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"epoch": 0}\n{"epoch": 1, "lo')
    number = path.stat().st_ino
    assert read_log(path) == [{"epoch": 0}]
    Run(tmp_path).append({"epoch": 1})
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n' and path.stat().st_ino == number
    path.write_text('{"epo')
    assert read_log(path) == []
    path.write_text('{"epoch": 0}\n{"epoch": \n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: expected an epoch as a JSON object"):
        read_log(path)


def test_a_line_that_goes_back_takes_the_place_of_what_followed_and_keeps_it(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"epoch": {epoch}, "try": {go}}}\n' for go, epoch in ((1, 0), (1, 1), (1, 2), (2, 1))))
    first, second = read_log(path)
    assert (first, second.pop("replaced")) == ({"epoch": 0, "try": 1}, [{"epoch": e, "try": 1} for e in (1, 2)])
    assert second == {"epoch": 1, "try": 2}


def test_the_comparison_of_these_tests_sees_one_changed_bit(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    state = read_checkpoint(out / "last.pt")
    state["model"]["semantic_head.bias"][0] *= 1 + 1e-7
    torch.save(state, out / "last.pt")
    assert differences(whole, out) == ["last.pt: model"]
    assert not same(0.0, 0) and not same([1], [1, 2]) and not same(torch.zeros(1), -torch.zeros(1))
