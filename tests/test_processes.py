"""Several processes: the gradients of one, one log, one decision, one end. On the CPU, by gloo."""

import copy
import hashlib
import json
import math
import multiprocessing
import os
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
import runs
import train
from data import EpochBatches, Scenes, collate
from losses import LOSS_WEIGHTS, weighted_sum
from model import VoxelBatchNorm, import_spconv
from stages import curriculum

SHORT = ("--compress", 64)  # 4 epochs of 2 steps, one a row
PLAIN = (*SHORT, "--model", "baseline")  # quick
STORES = []  # of torchrun's own; they live as long as the processes


def start(work, output=os.devnull, world=2):
    """work() in this many processes as torchrun would start them (forks: torch is imported once); a list of them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    import_spconv()  # here, once for all forks

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
    hung = [process.kill() for process in started if process.is_alive()]
    assert not hung, "still running"
    return [process.exitcode for process in started]


def results(work, folder, world=2):
    """What work() returns in each of these processes, which have joined."""
    @runs.joined()
    def run():
        torch.save(work(), folder / f"{runs.rank()}.pt")

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
    return hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())).hexdigest()


@pytest.fixture(scope="module")
def whole(tiny_rooms, tmp_path_factory):
    """Folder of a run of two processes that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(training(folder, tiny_rooms, *PLAIN))) == [0, 0]
    return folder


@pytest.mark.parametrize(("length", "batch_size", "world"), [(8, 4, 2), (7, 4, 2), (9, 6, 3), (1, 2, 2), (2, 8, 4)])
def test_the_shares_of_a_batch_are_the_batch_of_one_process_and_in_training_equally_long(length, batch_size, world):
    def batches(shuffle, share=(0, 1)):
        sampler = EpochBatches(length, batch_size, shuffle, 3, share)
        sampler.set_epoch(2)
        made = list(sampler)
        assert len(made) == len(sampler)
        return made

    whole, shares = batches(True), [batches(True, (rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {len(whole)}
    order = [i for batch in whole for i in batch]
    for batch, *parts in zip(whole, *shares):
        together = [i for row in zip(*parts, strict=True) for i in row]
        extra = len(together) - len(batch)
        assert together == batch + [order[k % length] for k in range(extra)] and extra < world
    for rank in range(world):  # no scene is evaluated twice or left out
        found = [i for batch in batches(False, (rank, world)) for _, i in batch]
        assert found == list(range(rank, length, world))


def test_means_hold_what_is_not_finite_and_leave_out_what_is_not_there(tmp_path):
    def work():
        rank = runs.rank()
        found = runs.mean([1.0 + rank, None if rank else 4.0, None, math.inf if rank else 1.0,
                           math.inf if rank else -math.inf])
        with runs.alone():
            assert runs.mean([1.0]) == [1.0] and runs.gather(rank) == [rank]
        return found, runs.gather(rank), runs.from_first(lambda: rank)

    assert [str(found) for found in results(work, tmp_path)] == ["([1.5, 4.0, None, inf, nan], [0, 1], 0)"] * 2


def gradients(made, pairs, put, still):
    """{case and row: (gradients, running statistics, loss terms)} of this process's share of two scenes.

    still: the batch norms do not train, so gradients alone are compared.
    """
    found = {}
    kinds = torch.nn.modules.batchnorm._BatchNorm if still else torch.nn.BatchNorm2d  # a tower's: each process's own
    for case, scenes in pairs.items():
        batch = collate([scenes[runs.rank()]] if runs.world() > 1 else scenes)
        for row in curriculum(pretrained=made.tower.pretrained):
            model = put(copy.deepcopy(made), row).train()
            model.decoder.choose_queries = torch.arange  # not at random
            runs.share_batch_norms(model.unet)
            for module in model.modules():
                if isinstance(module, kinds):
                    module.eval()
            terms, _ = train.forward(model, batch, row)
            weighted_sum(terms, LOSS_WEIGHTS["bifusion"]).backward()
            runs.average_gradients(model)
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found[f"{case}, {row.name}"] = (grads, dict(model.unet.named_buffers()),
                                            runs.mean([term.item() for term in terms.values()]))
    return found


@pytest.mark.parametrize(("pretrained", "still", "cases"), [
    (True, True, ("whole", "no frames", "no labels", "no instances", "nothing to learn")),
    (False, True, ("whole",)), (True, False, ("whole", "one voxel"))],
    ids=["pretrained", "from scratch", "batch norms train"])
def test_gradients_of_two_processes_with_half_the_batch_are_those_of_one_with_all_of_it(
        make_model, pairs_of_scenes, put, tmp_path, pretrained, still, cases):
    pairs = {case: pairs_of_scenes[case] for case in cases}
    args = make_model(pretrained=pretrained, num_classes=20), pairs, put, still
    whole = gradients(*args)
    for ours in results(lambda: gradients(*args), tmp_path):
        for key, (grads, buffers, numbers) in whole.items():
            torch.testing.assert_close(ours[key][0], grads, rtol=1e-4, atol=1e-5, msg=lambda why, key=key: key + why)
            torch.testing.assert_close(ours[key][1], buffers, rtol=1e-5, atol=1e-5, msg=lambda why, key=key: key + why)
            assert ours[key][2] == pytest.approx(numbers, abs=1e-5), key
    trained = {name.partition(".")[0] for name in whole["whole, enhancement"][0]}
    assert {"unet", "decoder", "tower", "standardise_2d", "film", "gates", "semantic_head"} <= trained
    assert whole["whole, stability"][1]["stem_bn.running_mean"].any() != still


def test_gradients_are_reduced_once_and_after_every_batch_norm(make_model, pairs_of_scenes, row, put, tmp_path):
    """Reductions in another order in another process are a deadlock under NCCL."""
    made, scenes = make_model(pretrained=True, num_classes=20), pairs_of_scenes["whole"]

    def work():
        reduce, order = torch.distributed.all_reduce, []
        torch.distributed.all_reduce = lambda tensor, **group: order.append(len(tensor)) or reduce(tensor, **group)
        model = put(made, row(70, pretrained=True)).train()
        runs.share_batch_norms(model.unet)
        sum(train.forward(model, collate([scenes[runs.rank()]]), model.row)[0].values()).backward()
        runs.average_gradients(model)
        norms = sum(isinstance(module, VoxelBatchNorm) for module in model.modules())
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        return len(order) == 4 * norms + 1 and order[-1] == len(trained) + sum(trained) > max(order[:-1])

    assert results(work, tmp_path) == [True, True]


def torchrun_trains_all_stages(device, data, folder):
    """A run by torchrun in two processes: its log, after a look at its files and at the weights in both processes."""
    out, script, tests = folder / "run", folder / "script.py", Path(__file__).parent
    script.write_text(f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(tests.parent)!r}, {str(tests)!r}]
from test_processes import SHORT, fingerprint, runs, train, training
evaluate = train.evaluate
def look(model, *args):
    with open({str(folder)!r} + f"/weights_{{runs.rank()}}", "a") as file:
        print(fingerprint(model), file=file)
    return evaluate(model, *args)
train.evaluate = look
training({str(out)!r}, {str(data)!r}, *SHORT, "--device", {device!r})()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads  # alive at the interpreter's end they can abort it
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("stage 3, epochs 3-3: loss") == done.stdout.count("2 process(es)") == 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in log)
    assert {path.name for path in out.iterdir()} == {"config.json", "log.jsonl", "stage1.pt", "stage2.pt", "stage3.pt",
                                                     "last.pt", "best.pt"}
    one, other = ((folder / f"weights_{rank}").read_text().split() for rank in (0, 1))
    assert one == other and len(set(one)) == 4
    return log


def test_torchrun_trains_all_stages_with_one_log_and_equal_weights_in_all_processes(tiny_rooms, tmp_path):
    torchrun_trains_all_stages("cpu", tiny_rooms, tmp_path)


def test_two_processes_log_what_one_logs_while_nothing_is_drawn_at_random(whole, run_train, tmp_path):
    one, two = run_train(tmp_path / "run", *PLAIN, "--stage", 1)[0], runs.read_log(whole / "log.jsonl")[0]
    assert one["steps"] == two["steps"] and one["lr"] == two["lr"]
    assert [two[key] for key in ("loss", "val_miou")] == pytest.approx([one["loss"], one["val_miou"]], abs=2e-3)
    assert two["grad_norm"]["3d"] == pytest.approx(one["grad_norm"]["3d"], rel=1e-3)


def test_evaluation_shared_by_three_processes_of_which_one_gets_no_scene_is_that_of_one(
        make_model, tiny_rooms, row, put, tmp_path):
    def work():
        scenes = Scenes(tiny_rooms, 0.25, (64, 48), 2, 0, 0, torch.device("cpu"), "", 0)  # two val scenes
        scenes.read(1, 0.0, None)
        return train.evaluate(put(make_model(num_classes=20), row(70)), scenes.val_batches, torch.device("cpu"))

    whole = work()
    assert whole["confusion"].sum() > 1000 and "AP" in whole
    for part in results(work, tmp_path, world=3):
        assert part.keys() == whole.keys()
        for key, value in whole.items():
            np.testing.assert_allclose(part[key], value, atol=1e-6)


def at_batch(number, act):
    """Let the second process do act(batch) when it comes to this batch of a run, a step's or an evaluation's."""
    to_device, calls = train.to_device, iter(range(99))

    def patched(batch, device):
        if next(calls) == number and runs.rank() == 1:
            act(batch)
        return to_device(batch, device)

    train.to_device = patched


def test_a_nan_in_one_process_skips_the_step_in_all_and_changes_nothing_in_any(tiny_rooms, tmp_path):
    def prepare():
        remember = guard.Guard.remember

        def look(self):
            with open(tmp_path / f"seen_{runs.rank()}", "a") as file:
                print(fingerprint(self.model), file=file)
            remember(self)

        guard.Guard.remember = look
        at_batch(1, lambda batch: batch["color"][0].fill_(math.nan))

    out, said, flags = tmp_path / "run", tmp_path / "said", ("--compress", 10, "--stage", 1, "--model", "baseline")
    assert finish(start(training(out, tiny_rooms, *flags, prepare=prepare), said)) == [0, 0], said.read_text()
    one, other = ((tmp_path / f"seen_{rank}").read_text().split() for rank in (0, 1))
    assert one == other  # weights and statistics before each of the four steps
    assert one[0] != one[1] == one[2] != one[3]
    assert [line["skipped_steps"] for line in runs.read_log(out / "log.jsonl")] == [1, 0]
    record, = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert (record["epoch"], record["step"], record["first_not_finite"]) == (0, 1, "input color")
    assert len(record["scenes"]) == 2 and record["loss"] == "nan"
    assert [one["first_not_finite"] for one in record["found"]] == ["input color",
                                                                    "not found, the second try was finite"]
    assert [name for part in record["found"] for name in part["scenes"]] == record["scenes"]
    assert said.read_text().count("skipped, not finite: input color") == 1


def test_a_signal_to_one_process_stops_all_at_one_step_and_resuming_gives_the_run_left_alone(
        whole, tiny_rooms, tmp_path):
    def prepare():  # batch 3, after two steps and an evaluation: epoch 1, step 0
        at_batch(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))

    out, said = tmp_path / "run", tmp_path / "said"
    codes = finish(start(training(out, tiny_rooms, *PLAIN, prepare=prepare), said))
    assert codes == [128 + signal.SIGTERM] * 2, said.read_text()
    state = runs.read_checkpoint(out / "last.pt")
    assert state["next"] == [1, 1]
    assert len(state["torch_rng"]) == 2 and not torch.equal(*state["torch_rng"])
    assert finish(start(training(out, tiny_rooms, "--resume"))) == [0, 0]
    assert differences(whole, out) == []


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(whole, run_train, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.copy(out / "stage2.pt", out / "last.pt")
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:3]))
    assert [line["epoch"] for line in run_train(out, "--resume")] == [0, 1, 2, 3]
    assert "number of processes: 2 when the checkpoint was made, 1 now" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    (("--batch-size", 3), "cannot be shared evenly by 2 processes"),
    (("--device", "cuda:1"), "one device for 2 processes"), ((), "coord.npy: expected an array of numbers")],
    ids=["batch size", "device", "a broken file of one process"])
def test_bad_input_ends_all_processes_with_the_message_and_none_waits_for_another(tiny_rooms, tmp_path, flags, message):
    root, out, said = shutil.copytree(tiny_rooms, tmp_path / "data"), tmp_path / "run", tmp_path / "said"
    broken = sorted((root / "train").iterdir())[2] / "coord.npy"
    broken.write_bytes(broken.read_bytes()[:200])
    assert finish(start(training(out, root, *PLAIN, *flags), said)) == [1, 1]
    assert message in said.read_text()
    assert not flags or ("Traceback" not in said.read_text() and not out.exists())
