"""Several processes that train one model: which of them this is, what they share and reduce, how they end together.

    torchrun --nproc_per_node=2 train.py ...     # starts them; python train.py is the one process of rank 0

    @ranks.joined()                              # for as long as main runs
    def main(): ...

    device = ranks.use("cuda")                   # this process's own GPU
    loss = ranks.wrap(module)(batch)             # DistributedDataParallel: .backward() averages the gradients
    numbers = ranks.mean(numbers)                # what each found -> what all know
    parts = ranks.gather(value)                  # list, one a process
    spec = ranks.from_first(make)                # rank 0 makes something, the others wait for it

In one process all of these do nothing, so there is one training loop for both. All processes must call them in the same
order. Needs torch only and imports no other file of this project: copy it and it works.
"""

import contextlib
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)  # of a process that waits: rank 0 may be generating rooms or filling a cache
# All gradients go in one bucket, which is reduced when the last of them is there. A layer that trains in front of every
# `batch_norm`, as the U-Net's first convolution, has its gradient after their reductions: one order in all processes,
# as NCCL needs it.
ONE_BUCKET = 1 << 20  # MB
LOST = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL")  # in what torch says of a lost process

_here = {"rank": 0, "world": 1}  # and in several processes: store, others, group (of gradients and batch norms)


def rank():
    """Number of this process; 0 writes the files and talks."""
    return _here["rank"]


def world():
    """Number of processes."""
    return _here["world"]


def launcher():
    """How as many processes are started again: "python", or torchrun with their number."""
    return "python" if world() == 1 else f"torchrun --nproc_per_node={world()}"


# --------------------------------------------------------------------------------------------------- beginning and end


@contextlib.contextmanager
def joined():
    """Join the processes that torchrun started; nothing to do where it started none, or one.

    Within it rank 0 alone has a stdout and a stderr. Where one ends early the others do too, as soon as they wait for
    it (`lost`), and what the first says in its SystemExit, or its traceback, is printed once.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, number, count = next(iter(dist.rendezvous("env://")))
    dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=PATIENCE)
    _here.update(rank=number, world=count, store=store)
    _here["others"] = gather((socket.gethostname(), os.getpid()))
    spoken, nothing = (sys.stdout, sys.stderr), open(os.devnull, "w")  # noqa: SIM115 - open to the end
    if number:
        sys.stdout = sys.stderr = nothing
    try:
        yield
        dist.destroy_process_group()
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        _end_early(stop.code, spoken)
    except Exception as error:
        _end_early(lost(error) or traceback.format_exc(), spoken)
    finally:
        sys.stdout, sys.stderr = spoken
        nothing.close()
        _here.clear()
        _here.update(rank=0, world=1)


def _end_early(said, spoken):
    """End this process; the first that does says why, the others end because of it."""
    try:
        first = _here["store"].add("ended", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        first = True
    spoken[0].flush()
    if first:
        print(f"\n{said}", file=spoken[1], flush=True)
    os._exit(1)  # not by way of loaders and connections, which would wait for what is gone


def lost(error):
    """What to say where an error means that another process is gone; "" where it has another cause."""
    if world() == 1 or not any(sign in str(error) for sign in LOST):
        return ""
    host, end, gone = socket.gethostname(), time.time() + 3, []
    while not gone and time.time() < end:  # its connections close a moment before it is gone
        time.sleep(0.05)
        gone = [f"rank {i} (process {pid})" for i, (at, pid) in enumerate(_here["others"])
                if i != rank() and at == host and _is_gone(pid)]
    if gone:
        return f"rank {rank()}: lost contact with {', '.join(gone)}, which has ended"
    return f"rank {rank()}: lost contact with another process ({str(error).partition(chr(10))[0]})"


def _is_gone(pid):
    """True where there is no such process, or only what its parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def use(device):
    """The torch.device of this process, and the connection over which gradients and batch norms are reduced.

    device: "cpu", or "cuda" (a GPU a process), or any device in a single process. Raises ValueError for another.
    """
    if world() == 1:
        return torch.device(device)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is one device for {world()} processes; give cpu, or cuda: a GPU each")
    if device == "cuda":
        number = int(os.environ.get("LOCAL_RANK", rank()))
        if number >= torch.cuda.device_count():
            raise ValueError(f"{torch.cuda.device_count()} GPUs are here for {os.environ.get('LOCAL_WORLD_SIZE')} "
                             "processes, which need one each; give torchrun a lower --nproc_per_node")
        torch.cuda.set_device(number)
        device = f"cuda:{number}"
    if "group" not in _here:
        _here["group"] = dist.new_group(backend="gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    return torch.device(device)


def own_random_numbers(seed):
    """From here on every process draws others; rank 0 those that a single process would draw."""
    if rank():
        torch.manual_seed(seed + (rank() << 40))


@contextlib.contextmanager
def alone():
    """Within it this process neither waits for the others nor shares its batch norms, as if there were none."""
    count = _here["world"]
    _here["world"] = 1
    try:
        yield
    finally:
        _here["world"] = count


# ------------------------------------------------------------------------------------------------- shared and reduced


def mean(numbers):
    """List of floats or None -> the means over the processes that have one; not finite where one of them is not."""
    if world() == 1:
        return numbers
    rows = torch.tensor([[0.0 if number is None else number, number is not None] for number in numbers],
                        dtype=torch.float64)
    dist.all_reduce(rows)
    return [total / count if count else None for total, count in rows.tolist()]


def largest(number):
    """The largest integer that any process gives."""
    if world() == 1:
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gather(value):
    """[value of rank 0, of rank 1, ...], in every process."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(make):
    """What make() returns in rank 0, the only one that calls it, in every process."""
    values = [make() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def wait():
    """Until all processes have come here."""
    largest(0)


def wrap(module):
    """The module, of which .backward() leaves the mean gradient over the processes in every one.

    Wrap anew whenever requires_grad has changed. A parameter may be without use in some processes or in all: where no
    process used it, its gradient stays None. The module gets one such parameter more.
    """
    if world() == 1:
        return module
    # without a parameter that no process uses, torch warns at length that looking for one is in vain
    module.unused = torch.nn.Parameter(next(module.parameters()).new_zeros(1))
    return DistributedDataParallel(module, process_group=_here["group"], find_unused_parameters=True,
                                   bucket_cap_mb=ONE_BUCKET)


def share_buffers(module):
    """Rank 0's buffers in every process, as `wrap` does before each forward: the same statistics to evaluate with.

    Those of `batch_norm` are equal anyway. Batch norms of an image tower that trains from scratch are not among them: a
    process may have more views than another, or none, and would wait for a reduction that never comes.
    """
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0, group=_here["group"])


def batch_norm(feat, weight, bias, eps):
    """Batch norm over the rows of all processes together, as SyncBatchNorm, on any device.

    Args:
        feat: (N, C) float, N > 0.  weight, bias: (C,).  eps: added to the variance.

    Returns:
        (N, C); mean (C,), variance (C,) without Bessel's correction and number of rows (scalar) of all processes.
    """
    return _BatchNorm.apply(feat, weight, bias, eps)


class _BatchNorm(torch.autograd.Function):
    """`batch_norm`: one reduction forward, one backward. Gradients of weight and bias are this process's own."""

    @staticmethod
    def forward(ctx, feat, weight, bias, eps):
        variance, middle = torch.var_mean(feat, 0, correction=0)  # (C,) of the own rows
        rows = feat.new_zeros(world(), 2 * len(middle) + 1)
        rows[rank()] = torch.cat([middle, variance, middle.new_tensor([len(feat)])])
        dist.all_reduce(rows, group=_here["group"])
        middles, variances, counts = rows.split([len(middle), len(middle), 1], 1)  # (R, C), (R, C), (R, 1)
        total = counts.sum()
        share = counts / total
        middle = (share * middles).sum(0)  # (C,) of all rows
        variance = (share * (variances + (middles - middle).square())).sum(0)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(feat, weight, middle, inverse, total)
        ctx.mark_non_differentiable(middle, variance, total)
        scale = weight * inverse
        return torch.addcmul(bias - middle * scale, feat, scale), middle, variance, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        feat, weight, middle, inverse, total = ctx.saved_tensors
        normal = (feat - middle) * inverse  # (N, C)
        own = torch.stack([grad.sum(0), (grad * normal).sum(0)])  # (2, C) gradients of bias and weight
        every = own.clone()
        dist.all_reduce(every, group=_here["group"])
        every /= total
        return weight * inverse * (grad - every[0] - normal * every[1]), own[1], own[0], None
