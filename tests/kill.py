"""Kill a training again and again and compare what it ends with to a training that was left alone.

    python -m tests.kill --kills 20 --epochs 24

Every kill is a SIGKILL to a process at a random moment, every third one while a checkpoint is written; then `--resume`.
Weights, optimiser, random state and log must come out equal bit by bit; seconds and memory of an epoch may differ.
Generates six tiny rooms in a temporary folder. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from runs import read_checkpoint, read_log

TINY = {"image_size": (64, 48), "voxel_size": 0.25, "views": 2, "batch_size": 1}
VARYING = ("seconds", "peak_memory_mb")


def start(out, data, *flags, output=os.devnull, prepare=lambda: None):
    """A training of tiny rooms in a process of its own (a fork: torch is imported once); prepare runs in it first. Its
    frozen tower's maps lie beside the run folder, so that kills meet their making too."""
    def run():
        sys.stdout = sys.stderr = file = open(output, "w", buffering=1)  # noqa: SIM115 - open to the end
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        train.RECIPES["small"] |= TINY
        prepare()
        train.main(["--out", str(out), "--device", "cpu", "--cache", f"{out}_cache",
                    *([] if "--resume" in flags else ["--data", str(data)]),
                    *(() if "--workers" in flags else ("--workers", "0")), *map(str, flags)])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def kill_and_resume(out, data, kills, longest, rng, *flags):
    """Train with this many kills, each within longest seconds after none or one more checkpoint, then to the end.
    Returns how many kills there were and how many of them met a half-written checkpoint."""
    def going_on():
        return start(out, data, *(("--resume",) if Path(out, "config.json").exists() else flags))

    def written(pattern):
        found = set()
        for path in Path(out).glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    done = met = 0
    while done < kills:
        process, before, saved = going_on(), written("*.pt.*tmp"), written("last.pt")
        ahead, moment = rng.random() < 0.5, rng.uniform(0, longest)
        while process.is_alive() and ahead and written("last.pt") == saved:
            time.sleep(0.001)
        moment += time.time()
        while process.is_alive() and time.time() < moment:
            time.sleep(0.001)
        while done % 3 == 2 and process.is_alive() and not written("*.pt.*tmp") - before:
            pass
        if not process.is_alive():
            break  # it came to its end
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done += 1
        met += bool(written("*.pt.*tmp") - before)
        last = Path(out, "last.pt")
        print(f"kill {done}: {[name for name, _ in written('*.tmp')]}, last.pt goes on at "
              f"{read_checkpoint(last)['next'] if last.exists() else 'nothing'}", flush=True)
    process = going_on()
    process.join()
    assert process.exitcode == 0, f"the last training ended with {process.exitcode}"
    return done, met


def differences(one, other):
    """What differs between two run folders: list of str."""
    found = []
    for name in ("stage1.pt", "stage2.pt", "stage3.pt", "best.pt", "last.pt"):
        a, b = (comparable(Path(folder, name).read_bytes()) for folder in (one, other))
        found += [f"{name}: {key}" for key in a.keys() | b.keys() if not same(a.get(key), b.get(key))]
    logs = log_lines(one), log_lines(other)
    if logs[0] != logs[1]:
        wrong = [a["epoch"] for a, b in zip(*logs) if a != b]
        found.append(f"log.jsonl: epochs {wrong}, {len(logs[0])} and {len(logs[1])} lines")
    return found


@functools.lru_cache(16)  # the files of a run are copies of each other
def comparable(content):
    """The bytes of a checkpoint -> the checkpoint without what differs from run to run."""
    state = read_checkpoint(io.BytesIO(content))
    del state["config"], state["sums"]["seconds"]
    return state


def log_lines(out):
    """The log of a run folder without what differs from run to run."""
    return [{k: v for k, v in line.items() if k not in VARYING} for line in read_log(Path(out, "log.jsonl"))]


def same(a, b):
    """True where two nested values of a checkpoint are equal, tensors bit by bit."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=24, help="of the whole curriculum (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    tqdm.set_lock(threading.RLock())  # as conftest.py does, and for its reason
    from scenes import boxes

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        boxes.generate(folder / "rooms", train=4, val=2, workers=1, image_size=TINY["image_size"])
        for path in (folder / "rooms").glob("*/*/*.npy"):
            np.save(path, np.load(path)[::8])
        flags = ("--compress", str(129 / args.epochs))
        began = time.time()
        whole = start(folder / "whole", folder / "rooms", *flags, output=folder / "said")
        whole.join()
        assert whole.exitcode == 0, (folder / "said").read_text()
        took = time.time() - began
        print(f"python -m tests.kill {' '.join(sys.argv[1:])}\n"
              f"left alone: {args.epochs} epochs of 4 steps in {took:.1f} s", flush=True)
        kills, met = kill_and_resume(folder / "killed", folder / "rooms", args.kills, took / args.epochs,
                                     random.Random(args.seed), *flags)
        found = differences(folder / "whole", folder / "killed")
        print(f"{kills} kills, {met} of them while a file was written: "
              f"{'; '.join(found) if found else 'every checkpoint and the log equal bit by bit'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
