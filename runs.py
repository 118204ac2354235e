"""The run folder and what may happen to a run: log, checkpoints, where to go on; signals; several processes.

A run folder holds config.json, log.jsonl (a line an epoch), last.pt, its copies stage{1,2,3}.pt and best.pt, and
skipped.jsonl. last.pt is saved before the evaluation and holds the next (epoch, step).

Several processes (torchrun --nproc_per_node=2 train.py) share every batch. In a single one the functions for them do
nothing; all processes call them in one order. Needs torch only and imports no other file of this project.
"""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


@contextlib.contextmanager
def whole_file(path):
    """Open a file for writing bytes beside path, renamed to path once it is whole and on the disk: so path holds the
    old or the new content, whenever the process is killed; a failed write leaves nothing."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # another process may write the same
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save says "unexpected pos"
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_log(path):
    """log.jsonl -> list of dicts, one an epoch, ascending; [] where no epoch is finished.

    Half a line at the end, as a killed run leaves it, is left out. A line that goes back to an epoch already written
    (the run was resumed there) takes the place of all from that epoch on and keeps it as `replaced`, list of dicts.
    """
    *lines, _ = Path(path).read_bytes().decode(errors="replace").split("\n") if Path(path).exists() else [""]
    log = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            epoch = entry["epoch"] + 0
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected an epoch as a JSON object, found {line[:60]!r}; mend or "
                             "delete this line") from None
        replaced = [old for old in log if old["epoch"] >= epoch]
        log = [*log[: len(log) - len(replaced)], entry | ({"replaced": replaced} if replaced else {})]
    return log


def read_checkpoint(path, device="cpu"):
    """A checkpoint as a dict, read without running any code of it. ValueError where it is broken or not ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises all kinds on a damaged file, and buries the cause in advice
        why = error.__context__ or error
        raise ValueError(f"{path} is not a readable checkpoint: {' '.join(str(why).split()) or repr(why)}") from error
    missing = {"model", "optimizer", "next", "row", "ramp", "config"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this version of train.py: it lacks {sorted(missing)}")
    return state


class Run:
    """A run folder, which rank 0 writes. Attributes: folder (Path); log, the lines of log.jsonl (list of dicts)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.log = from_first(lambda: read_log(self.folder / "log.jsonl"))

    def reached(self):
        """The last epoch of which anything is saved or logged, -1 for none."""
        last = self.folder / "last.pt"
        saved = [read_checkpoint(last)["next"][0]] if last.exists() else []
        return max([-1, *saved, *(line["epoch"] for line in self.log)])

    def start(self, config):
        """Make the folder and write config.json (dict); what a kill left half-written goes."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob("*.tmp"):
                unfinished.unlink()
            with whole_file(self.folder / "config.json") as file:
                file.write(json.dumps(config, indent=1).encode())
        gather(None)  # until all processes have come here

    def save(self, state, device):
        """Write last.pt: state (dict) and the random states of all processes, which must all call it."""
        state = state | {"torch_rng": gather(torch.get_rng_state()),
                         "cuda_rng": gather(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None}
        if rank() == 0:
            with whole_file(self.folder / "last.pt") as file:
                torch.save(state, file)
        gather(None)

    def finish(self, line, stage_ends, bar):
        """End an epoch: copies of last.pt as best.pt and stage{1,2,3}.pt where it is, the line (dict) for the log, and
        on the screen (tqdm's bar) what a stage came to. As long as no epoch has a val mIoU the last is the best."""
        *before, now = (-1.0 if each["val_miou"] is None else each["val_miou"] for each in [*self.log, line])
        best = max(before, default=-1.0)
        names = ["best.pt"] * (now > best or best < 0) + [f"stage{line['stage']}.pt"] * stage_ends
        for name in names if rank() == 0 else ():
            with open(self.folder / "last.pt", "rb") as last, whole_file(self.folder / name) as file:
                shutil.copyfileobj(last, file)
        self.append(line)
        if stage_ends:
            lines = [old for old in self.log if old["stage"] == line["stage"]]
            first, skipped = lines[0], sum(old["skipped_steps"] for old in lines)
            bar.write(f"stage {line['stage']}, epochs {first['epoch']}-{line['epoch']}: loss {show(first['loss'])} -> "
                      f"{show(line['loss'])}; val mIoU {show(first['val_miou'])} -> {show(line['val_miou'])}; AP "
                      f"{show(line['val_ap'])}; fusion_2d_ratio {show(line['fusion_2d_ratio'])}; {skipped} steps "
                      f"skipped; {sum(old['seconds'] for old in lines) / 60:.1f} min; {line['peak_memory_mb']} MB")

    def append(self, line):
        """Add a line to the log and bring it to the disk; half a line that a kill left is cut off."""
        self.log = [*(old for old in self.log if old["epoch"] < line["epoch"]), line]
        if rank() == 0:
            with open(self.folder / "log.jsonl", "ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # in place: the whole lines are never rewritten
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


class Sums(dict):
    """Running sums of an epoch, {name: [sum, count]}; a name may be "group/term"; None does not count."""

    def add(self, numbers):
        for name, value in numbers.items():
            if value is not None:
                total, count = self.get(name, (0.0, 0))
                self[name] = [total + value, count + 1]

    def mean(self, name):
        total, count = self.get(name, (0.0, 0))
        return finite(total / count) if count else None

    def means(self, group):
        return {name.partition("/")[2]: self.mean(name) for name in self if name.startswith(f"{group}/")}


def finite(value):
    """Six digits for the log: None where the value is missing or not finite."""
    return float(f"{float(value):.6g}") if value is not None and math.isfinite(value) else None


def show(value):
    return "-" if value is None else f"{value:.3f}"


def log_line(row, epoch, steps, sums, optimizer, result, device, seconds):
    """One line of the log: an epoch's means, and what the evaluation returned ({} where there was none)."""
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # of the main process
    return {
        "epoch": epoch, "stage": row.stage, "row": row.name, "loss": sums.mean("loss"), "losses": sums.means("losses"),
        "val_iou": [finite(v) for v in result.get("iou", ())],
        **{f"val_{name.lower()}": finite(result.get(name)) for name in ("miou", "loss", "AP", "AP50", "AP25")},
        "fusion_ramp": finite(row.ramp(epoch)) if "seen_share" in sums else 0.0,  # at the start of the epoch
        **{name: sums.mean(name) for name in ("fusion_2d_ratio", "seen_share", "rms_2d", "rms_3d", "cosine")},
        "grad_norm": sums.means("grad_norm"), "clipped": sums.means("clipped"), "spikes": sums.mean("spikes"),
        "update_rms": sums.mean("update_rms"), "skipped_steps": int(sums.get("skipped", [0])[0]), "steps": steps,
        "lr": {g["name"]: finite(g["lr"]) for g in optimizer.param_groups if g["name"] in row.trains},
        "seconds": round(seconds, 2), "peak_memory_mb": round(memory),
    }


def commit():
    """The commit of this code, "-dirty" where it was changed since; None outside of a repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                              cwd=Path(__file__).parent, check=True).stdout.strip()


class Stopped(Exception):
    """A signal asked the run to end, and everything up to here is saved."""


class Stop:
    """SIGINT (Ctrl-C) and SIGTERM ask for a stop, which the loop makes at its next whole step; a second one kills.
    Attribute: asked, number of the signal, 0 until one came."""

    def __init__(self):
        self.asked, self.before = 0, {}

    def listen(self):
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        self.asked = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # a DataLoader would raise in the middle of a step where its workers were told to end as well
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if rank() == 0:  # print may be what was interrupted
            os.write(2, b"\nstopping after this step; once more to end at once\n")

    def agreed(self):
        """Number of a signal that came to any of the processes, 0 for none: the same in all, which must all ask."""
        agreed = max(gather(self.asked))
        self.asked = self.asked or agreed  # one may have come this moment: the next time all hear of it
        return agreed

    def until(self, items, agree=False):
        """The items, up to a stop. agree: all processes, which must have equally many, stop before the same one."""
        items = iter(() if self.asked else items)  # no worker starts either
        while not self.asked or agree:
            try:
                item = None if self.asked else next(items, None)
            except RuntimeError:  # the worker that was to bring it has ended
                if not self.asked:
                    raise
                item = None
            if (agree and self.agreed()) or item is None:
                return
            yield item


_alone = []  # not empty within `alone`


def rank():
    """Number of this process; 0 writes the files and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextlib.contextmanager
def joined():
    """For as long as main runs (also as its decorator): join the processes that torchrun started; rank 0 alone has a
    stdout. Where one dies, torchrun ends the others and says which it was."""
    if together := int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed.nn  # loaded later, by an optimiser, its default arguments hold the group
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing if rank() else sys.stdout):
        yield
    if together:
        dist.destroy_process_group()


def use(device):
    """The torch.device of this process: "cpu" or "cuda", a GPU each; any device in a single process."""
    if world() > 1 and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank())}"
        torch.cuda.set_device(device)
    elif world() > 1 and device != "cpu":
        raise ValueError(f"it is one device for {world()} processes: give cuda, a GPU each")
    return torch.device(device)


@contextlib.contextmanager
def alone():
    """Within it this process neither waits for the others nor shares its batch norms, as if there were none."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def gather(value):
    """[value of rank 0, of rank 1, ...], in every process; any object."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(make):
    """What make() returns in rank 0, the only one that calls it, in every process."""
    return gather(make() if rank() == 0 else None)[0]


def mean(numbers):
    """List of floats or None -> the means over the processes that have one; not finite where one of them is not."""
    columns = [[number for number in column if number is not None] for column in zip(*gather(numbers))]
    return [sum(column) / len(column) if column else None for column in columns]


def set_random_state(state, device):
    """The random state of this process as Run.save found it, if as many processes train now."""
    if len(state["torch_rng"]) != world():
        print(f"number of processes: {len(state['torch_rng'])} when the checkpoint was made, {world()} now; it goes "
              "on, but not with the same random numbers")
        return
    torch.set_rng_state(state["torch_rng"][rank()].cpu())
    if device.type == "cuda" and state["cuda_rng"]:
        torch.cuda.set_rng_state(state["cuda_rng"][rank()].cpu(), device)


def average_gradients(model):
    """After backward: the mean gradient over the processes in every one, by one reduction; what none has stays None.

    In place of DistributedDataParallel, which must be wrapped anew whenever requires_grad changes and whose reductions
    mix with those of `share_batch_norms` in an order that NCCL does not allow.
    """
    if world() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = parameters[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters), used])
    dist.all_reduce(flat)
    *gradients, used = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, gradient, count in zip(parameters, gradients, used.tolist()):
        if count:
            parameter.grad = (gradient / world()).view_as(parameter)


def share_buffers(model):
    """Rank 0's buffers in every process, to evaluate with. An image tower's batch norms are each process's own: one may
    have no view in a step and would keep the others waiting."""
    for buffer in model.buffers() if world() > 1 else ():
        dist.broadcast(buffer, 0)


def share_batch_norms(module):
    """Turn every BatchNorm1d of a module into one over the rows of all processes together, two at the least. In place
    of nn.SyncBatchNorm, which refuses a CPU: so what runs on GPUs is what the tests run."""
    for norm in module.modules() if world() > 1 else ():
        if isinstance(norm, nn.BatchNorm1d):
            norm.__class__ = type(f"Shared{type(norm).__name__}", (_SharedBatchNorm, type(norm)), {})


class _Sum(torch.autograd.Function):
    """The sum over the processes, of a tensor and of its gradient."""

    @staticmethod
    def forward(ctx, value):
        dist.all_reduce(value := value.clone())
        return value

    backward = forward


class _SharedBatchNorm:
    """forward of a BatchNorm1d over all processes."""

    def forward(self, feat):
        if not self.training or world() == 1:
            return super().forward(feat)
        total = _Sum.apply(torch.cat([feat.sum(0), feat.new_tensor([len(feat)])]))  # (C + 1,)
        mean, count = total[:-1] / total[-1], total[-1]
        variance = _Sum.apply((feat - mean).square().sum(0)) / count  # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (feat - mean) * ((variance + self.eps).rsqrt() * self.weight) + self.bias
