"""Several processes: the gradients of one, one log, one decision, one end. On the CPU, by gloo."""

import copy
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill import TINY, differences

import guard
import ranks
import train
from data import EpochBatches, SceneDataset, collate, loader
from experiments.report import read_log
from losses import LOSS_WEIGHTS
from model import VoxelBatchNorm, import_spconv
from stages import apply_setting, setting_at
from train import WeightedLoss, load_checkpoint, to_device

SHORT = ("--compress", 64)  # 3 epochs of 2 steps, one a stage
STORES = []  # of the processes started
HERE = Path(__file__).resolve().parent.parent
MOMENTS = {"stage 1": 5, "stage 2": 30, "stage 2, learned gate": 50, "stage 3": 70}  # epochs


def start(work, output=os.devnull, world=2):
    """work() in this many processes as torchrun would start them (forks: torch is imported once); a list of them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own
    STORES.append(store)

    def run(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
        sys.stdout = sys.stderr = file = open(output, "a", buffering=1)  # noqa: SIM115 - open to the end
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        work()

    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in started:
        process.start()
    return started


def finish(started, seconds=60):
    """Exit codes, negative for the signal that ended a process; none of them may hang."""
    end = time.time() + seconds
    for process in started:
        process.join(max(0, end - time.time()))
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "still running"
    return [process.exitcode for process in started]


def results(work, folder, world=2):
    """What work() returns in each of these processes, which have joined."""
    @ranks.joined()
    def run():
        ranks.use("cpu")
        torch.save(work(), folder / f"{ranks.rank()}.pt")

    codes = finish(start(run, folder / "said", world))
    assert codes == [0] * world, (folder / "said").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def training(out, data, *flags, prepare=lambda: None):
    """A function that runs train.main on tiny rooms; prepare runs before it."""
    def work():
        train.RECIPES["small"] |= TINY | {"batch_size": 2}
        prepare()
        train.main(["--out", str(out), "--device", "cpu", "--workers", "0", "--cache", f"{data}_cache",
                    *([] if "--resume" in flags else ["--data", str(data)]), *map(str, flags)])
    return work


def fingerprint(model):
    """Of all weights and buffers."""
    return hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def _imported_once_for_all_forks():
    import open_clip  # noqa: F401

    import_spconv()


@pytest.fixture(scope="module")
def whole(tiny_rooms, tmp_path_factory):
    """A run of two processes that was left alone: its folder, and in said.txt what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    codes = finish(start(training(folder / "run", tiny_rooms, *SHORT), folder / "said.txt"))
    assert codes == [0, 0], (folder / "said.txt").read_text()
    return folder / "run"


# ---- shares

@pytest.mark.parametrize(("length", "batch_size", "world"), [(8, 4, 2), (7, 4, 2), (9, 6, 3), (1, 2, 2), (2, 8, 4)])
def test_the_shares_of_a_batch_are_equally_long_and_together_the_batch_of_one_process(length, batch_size, world):
    whole = EpochBatches(length, batch_size, True, seed=3)
    shares = [EpochBatches(length, batch_size, True, 3, (rank, world)) for rank in range(world)]
    for batches in (whole, *shares):
        batches.set_epoch(2)
    order = [i for batch in whole for i in batch]
    assert len({len(share) for share in (whole, *shares)}) == 1
    for batch, *parts in zip(whole, *shares):
        assert len({len(part) for part in parts}) == 1
        together = [part[k] for k in range(len(parts[0])) for part in parts]
        extra = len(together) - len(batch)
        assert together == batch + [order[k % length] for k in range(extra)] and extra < world
    assert len(list(shares[0])) == len(whole)


@pytest.mark.parametrize(("length", "world"), [(7, 2), (1, 2), (5, 3), (4, 4)])
def test_no_scene_is_evaluated_twice_or_left_out(length, world):
    shares = [EpochBatches(length, 2 * world, False, 0, (rank, world)) for rank in range(world)]
    assert all(len(list(share)) == len(share) for share in shares)
    seen = [[i for batch in share for _, i in batch] for share in shares]
    assert seen == [list(range(rank, length, world)) for rank in range(world)]


def test_in_one_process_nothing_is_reduced_or_copied():
    numbers, module = [1.0, None], torch.nn.Linear(1, 1)
    assert ranks.mean(numbers) is numbers and ranks.wrap(module) is module
    assert ranks.gather(numbers) == [numbers] and ranks.from_first(lambda: 3) == 3 and ranks.largest(2) == 2
    assert (ranks.rank(), ranks.world()) == (0, 1)


def test_means_hold_what_is_not_finite_and_leave_out_what_is_not_there(tmp_path):
    def work():
        rank = ranks.rank()
        found = ranks.mean([1.0 + rank, None if rank else 4.0, None, math.inf if rank else 1.0,
                            math.inf if rank else -math.inf])
        with ranks.alone():
            assert ranks.mean([1.0]) == [1.0] and ranks.gather(rank) == [rank]
        return found, ranks.gather(rank), ranks.from_first(lambda: rank), ranks.largest(10 * rank)

    one, other = results(work, tmp_path)
    assert str(one) == str(other) == "([1.5, 4.0, None, inf, nan], [0, 1], 0, 10)"


# ---- gradients

def gradients(made, pairs, fixed, device="cpu"):
    """{case and moment: (gradients, running statistics, loss terms)} of this process's share of two scenes."""
    found = {}
    for case, scenes in pairs.items():
        batch = to_device(collate([scenes[ranks.rank()]] if ranks.world() > 1 else scenes), device)
        for name, epoch in MOMENTS.items():
            model, setting = copy.deepcopy(made).to(device), setting_at(epoch, pretrained=made.tower.pretrained)
            model.decoder.choose_queries = torch.arange  # not at random
            apply_setting(model, setting)
            model.train()
            for module in model.modules():
                if fixed and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
            weighted_loss = ranks.wrap(WeightedLoss(model, LOSS_WEIGHTS["bifusion"]))
            loss, terms, _ = weighted_loss(batch, setting)
            loss.backward()
            numbers = ranks.mean([loss.item(), *(term.item() for term in terms.values())])
            found[f"{case}, {name}"] = ({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None},
                                        {n: b.cpu() for n, b in model.unet.named_buffers()}, numbers)
    return found


def assert_close(ours, whole):
    for key, (grads, buffers, numbers) in whole.items():
        assert ours[key][0].keys() == grads.keys(), key
        for name, grad in grads.items():
            torch.testing.assert_close(ours[key][0][name], grad, rtol=1e-4, atol=1e-5, msg=f"{key}: {name}")
        for name, buffer in buffers.items():
            torch.testing.assert_close(ours[key][1][name], buffer, rtol=1e-5, atol=1e-5, msg=f"{key}: {name}")
        assert ours[key][2] == pytest.approx(numbers, abs=1e-5)


@pytest.mark.parametrize("pretrained", [True, False])
def test_gradients_of_two_processes_with_half_the_batch_are_those_of_one_with_all_of_it(
        make_model, pairs_of_scenes, tmp_path, pretrained):
    pairs = pairs_of_scenes if pretrained else {case: pairs_of_scenes[case] for case in ("whole", "no frames")}
    args = make_model(pretrained=pretrained, num_classes=20), pairs, True
    whole = gradients(*args)
    for ours in results(lambda: gradients(*args), tmp_path):
        assert_close(ours, whole)
    trained = {name.partition(".")[0] for name in whole["whole, stage 3"][0]}
    assert {"unet", "decoder", "tower", "standardise_2d", "film", "gates", "semantic_head"} <= trained


def test_gradients_are_reduced_once_and_after_every_batch_norm(make_model, pairs_of_scenes, tmp_path):
    """Reductions in another order in another process are a deadlock under NCCL."""
    made, scenes = make_model(pretrained=True, num_classes=20), pairs_of_scenes["whole"]

    def work():
        found, reduce = {}, torch.distributed.all_reduce

        def norm(tensor, **group):
            order.append("norm")
            return reduce(tensor, **group)

        def bucket(state, bucket):
            order.append("gradients")
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        torch.distributed.all_reduce = norm
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 4096  # or this small model would be one bucket in any case
        for name, epoch in MOMENTS.items():
            model, setting = copy.deepcopy(made), setting_at(epoch, pretrained=True)
            apply_setting(model, setting)
            model.train()
            weighted_loss = ranks.wrap(WeightedLoss(model, LOSS_WEIGHTS["bifusion"]))
            weighted_loss.register_comm_hook(None, bucket)
            order = []
            loss, *_ = weighted_loss(collate([scenes[ranks.rank()]]), setting)
            loss.backward()
            norms = sum(isinstance(module, VoxelBatchNorm) for module in model.modules())
            found[name] = order == 2 * norms * ["norm"] + ["gradients"]
        torch.distributed.all_reduce = reduce
        return found

    assert results(work, tmp_path) == 2 * [dict.fromkeys(MOMENTS, True)]


def test_batch_norm_over_two_processes_is_that_of_one_with_all_voxels(make_model, pairs_of_scenes, tmp_path):
    pairs = {case: pairs_of_scenes[case] for case in ("whole", "no frames")}
    args = make_model(pretrained=True, num_classes=20), pairs, False
    whole = gradients(*args)
    for ours in results(lambda: gradients(*args), tmp_path):
        assert_close(ours, whole)
    assert whole["whole, stage 1"][1]["stem_bn.running_mean"].any()


def test_a_process_with_a_single_voxel_trains_with_the_voxels_of_the_others(tmp_path):
    feat, weight = torch.randn(5, 3), torch.randn(5, 3)

    def work():
        norm, rows = VoxelBatchNorm(3).train(), feat
        if ranks.world() > 1:
            rows = feat[:1] if ranks.rank() else feat[1:]
        out = norm(rows.requires_grad_())
        (out * (weight[:1] if len(rows) == 1 else weight[5 - len(rows):])).sum().backward()
        return out.detach(), rows.grad, norm.running_mean, norm.running_var

    norm = VoxelBatchNorm(3).train()
    rows = feat.clone().requires_grad_()
    out = norm(rows)
    (out * weight).sum().backward()
    parts = results(work, tmp_path)
    for k, expected in ((0, out), (1, rows.grad)):
        assert torch.allclose(torch.cat([parts[1][k], parts[0][k]]), expected, atol=1e-5)
    for part in parts:
        assert torch.allclose(part[2], norm.running_mean) and torch.allclose(part[3], norm.running_var)


# ---- a run

def torchrun(code, folder):
    """Run this code by torchrun in two processes, with this folder's tests to import; what it printed."""
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path[:0] = [{str(HERE)!r}, {str(HERE / 'tests')!r}]\n{code}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun_trains_all_stages(device, data, folder):
    """A run of three epochs by torchrun: its log, after a look at its files and at the weights in both processes."""
    out = folder / "run"
    said = torchrun(f"""
from test_ranks import SHORT, fingerprint, ranks, train, training
evaluate = train.evaluate
def look(model, *args):
    with open({str(folder)!r} + f"/weights_{{ranks.rank()}}", "a") as file:
        print(fingerprint(model), file=file)
    return evaluate(model, *args)
train.evaluate = look
training({str(out)!r}, {str(data)!r}, *SHORT, "--device", {device!r})()
""", folder)
    assert said.count("stage 3: enhancement") == said.count("2 processes; 4 train") == 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert all(math.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in log)
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "curves.png", "stage1.pt", "stage2.pt",
                                                     "stage3.pt", "last.pt", "best.pt"}
    one, other = ((folder / f"weights_{rank}").read_text().split() for rank in (0, 1))
    assert one == other and len(set(one)) == 3
    return log


def test_torchrun_trains_all_stages_with_one_log_and_equal_weights_in_all_processes(tiny_rooms, tmp_path):
    torchrun_trains_all_stages("cpu", tiny_rooms, tmp_path)


def test_two_processes_log_what_one_logs_while_nothing_is_drawn_at_random(whole, run_train, tmp_path):
    one, two = run_train(tmp_path / "run", *SHORT, "--stage", 1)[0], read_log(whole / "log.jsonl")[0][0]
    assert one["steps"] == two["steps"] and one["lr"] == two["lr"]
    for key in ("loss", "val_miou"):
        assert two[key] == pytest.approx(one[key], abs=2e-3)
    assert two["grad_norm"]["3d"] == pytest.approx(one["grad_norm"]["3d"], rel=1e-3)


def test_evaluation_shared_by_two_processes_is_that_of_one(make_model, tiny_rooms, tmp_path):
    scenes = SceneDataset(tiny_rooms, "train", voxel_size=0.25, views=2, image_size=(64, 48))
    scenes.folders = scenes.folders[:3]

    def work():
        model = make_model(num_classes=20)
        apply_setting(model, setting_at(70))
        share = ranks.rank(), ranks.world()
        return train.evaluate(model, loader(scenes, 2, 0, False, 0, share=share), torch.device("cpu"))

    whole = work()
    assert whole["confusion"].sum() > 1000 and "AP" in whole
    for part in results(work, tmp_path):
        assert part.keys() == whole.keys()
        for key, value in whole.items():
            np.testing.assert_allclose(part[key], value, atol=1e-6)


# ---- steps that are not finite

def test_a_nan_in_one_process_skips_the_step_in_all_and_changes_nothing_in_any(tiny_rooms, tmp_path):
    out = tmp_path / "run"

    def prepare():
        to_device, remember, step = train.to_device, guard.Guard.remember, torch.optim.AdamW.step
        calls = iter(range(99))
        file = open(tmp_path / f"seen_{os.environ['RANK']}", "a", buffering=1)  # noqa: SIM115 - open to the end

        def poisoned(batch, device):
            if next(calls) == 1 and ranks.rank() == 1:
                batch["color"][0] = math.nan
            return to_device(batch, device)

        def look(self):
            print("before", fingerprint(self.model), file=file)
            remember(self)

        def count(self, *args, **kwargs):
            print("step", file=file)
            return step(self, *args, **kwargs)

        train.to_device, guard.Guard.remember, torch.optim.AdamW.step = poisoned, look, count

    said = tmp_path / "said.txt"
    codes = finish(start(training(out, tiny_rooms, "--compress", 10, "--stage", 1, prepare=prepare), said))
    assert codes == [0, 0], said.read_text()
    one, other = ((tmp_path / f"seen_{rank}").read_text().splitlines() for rank in (0, 1))
    assert one == other
    assert [line.split()[0] for line in one] == ["before", "step", "before", "before", "step", "before", "step"]
    assert one[2] == one[3] != one[0]
    log = read_log(out / "log.jsonl")[0]
    assert [line["skipped_steps"] for line in log] == [1, 0]
    record, = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert (record["epoch"], record["step"], record["first_not_finite"]) == (0, 1, "input color")
    assert len(record["scenes"]) == 2 and record["loss"] == "nan"
    assert [part["first_not_finite"] for part in record["processes"]] == ["not found, the second try was finite",
                                                                          "input color"]
    assert [name for part in record["processes"] for name in part["scenes"]] == record["scenes"]
    assert said.read_text().count("skipped, not finite: input color") == 1


# ---- going on

def test_a_signal_to_one_process_stops_all_at_one_step_and_resuming_gives_the_run_left_alone(
        whole, tiny_rooms, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said.txt"

    def prepare():
        to_device, calls = train.to_device, iter(range(99))

        def stop(batch, device):
            if next(calls) == 3 and os.environ["RANK"] == "1":  # two steps and an evaluation before: epoch 1, step 0
                os.kill(os.getpid(), signal.SIGTERM)
            return to_device(batch, device)

        train.to_device = stop

    codes = finish(start(training(out, tiny_rooms, *SHORT, prepare=prepare), said))
    assert codes == [128 + signal.SIGTERM] * 2, said.read_text()
    assert said.read_text().count(f"torchrun --nproc_per_node=2 train.py --resume --out {out}") == 1
    state = load_checkpoint(out / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 1)
    assert len(state["torch_rng"]) == 2 and not torch.equal(*state["torch_rng"])
    assert finish(start(training(out, tiny_rooms, "--resume"))) == [0, 0]
    assert differences(whole, out) == []


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(whole, run_train, tiny_rooms, tmp_path, capsys):
    out, said = shutil.copytree(whole, tmp_path / "run"), tmp_path / "said.txt"
    for name in ("stage3.pt", "last.pt"):
        shutil.copy(out / "stage2.pt", out / name)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:2]))
    assert [line["epoch"] for line in run_train(out, "--resume")] == [0, 1, 2]
    assert re.search("processes: 2 when .*last.pt was made, 1 now", capsys.readouterr().out)
    state = load_checkpoint(out / "stage2.pt")
    state["torch_rng"] = state["torch_rng"][0]  # as before there were several
    torch.save(state, out / "last.pt")
    assert finish(start(training(out, tiny_rooms, "--resume"), said)) == [0, 0]
    assert re.search("processes: 1 when .*last.pt was made, 2 now", said.read_text())


# ---- ends

def test_a_killed_process_ends_the_other_with_a_message_and_the_command_to_go_on(tiny_rooms, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said.txt"
    started = start(training(out, tiny_rooms, "--compress", 1), said)
    end = time.time() + 60
    while not (out / "last.pt").exists() and time.time() < end:
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGKILL)
    assert finish(started, 15) == [1, -signal.SIGKILL]
    text = said.read_text()
    assert f"rank 0: lost contact with rank 1 (process {started[1].pid}), which has ended" in text
    assert f"go on with: torchrun --nproc_per_node=2 train.py --resume --out {out}" in text
    assert "Traceback" not in text
    assert load_checkpoint(out / "last.pt")["epoch"] == len(read_log(out / "log.jsonl")[0]) - 1


def test_what_one_process_cannot_read_ends_all_and_is_said_once(tiny_rooms, tmp_path):
    root, said = shutil.copytree(tiny_rooms, tmp_path / "data"), tmp_path / "said.txt"
    broken = sorted((root / "train").iterdir())[2] / "coord.npy"
    broken.write_bytes(broken.read_bytes()[:200])
    assert finish(start(training(tmp_path / "run", root, *SHORT), said)) == [1, 1]
    text = said.read_text()
    assert text.count("error: ") == text.count(str(broken)) == 1
    assert "Traceback" not in text and "lost contact" not in text


@pytest.mark.parametrize(("flags", "message"), [(("--batch-size", 3), "cannot be shared evenly by 2 processes"),
                                                (("--device", "cuda:1"), "one device for 2 processes")])
def test_flags_that_several_processes_cannot_have_are_refused_once(tiny_rooms, tmp_path, flags, message):
    out, said = tmp_path / "run", tmp_path / "said.txt"
    assert finish(start(training(out, tiny_rooms, *flags), said)) == [1, 1]
    assert said.read_text().count(message) == 1 and "Traceback" not in said.read_text()
    assert not out.exists()
