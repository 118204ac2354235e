"""Where the time of one training step goes, by part of the network, and how much of it no implementation can save.

    split = split_step(step, model, device)      # step: a function that does one training step of the model
    split["decoder"]                             # {"forward", "backward", "product", "gather": seconds}

`step` lays the ranges of losses and optimiser itself: with record_function("losses"): ... (bench.train_step does). All
that lies in no part's range is "rest": standardisation, FiLM, gate, blend, heads, statistics, and Python between them.
"""

import contextlib
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import model as networks

PARTS = ("image tower", "sampling", "sparse U-Net", "decoder", "losses", "optimiser", "rest")
PRODUCTS = frozenset("aten::" + name for name in (
    "mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "_convolution", "mkldnn_convolution", "cudnn_convolution",
    "cudnn_convolution_transpose", "_slow_conv2d_forward", "slow_conv_transpose2d", "convolution_backward",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_flash_attention_forward", "_flash_attention_backward", "_efficient_attention_forward",
    "_efficient_attention_backward", "_cudnn_attention_forward", "_cudnn_attention_backward",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"))
SPARSE = ("SubMConvFunction", "SparseConvFunction", "SparseInverseConvFunction", "SparseImplicitGemmFunction")


def split_step(step, model, device):
    """Where the time of one step goes.

    Ranges of torch.profiler are laid round the parts of the forward pass. A node of the backward pass belongs to the
    part whose operation made it: both have one sequence number; the sum of gradients into a weight belongs to the
    node before it. Every operation counts for its self time, that is without the operations that it calls: on CPU the
    elapsed time, so that all together are the step; on CUDA the duration of the kernels that it launched, so that
    all together are the time the GPU was busy.

    The floor is the self time of PRODUCTS: dense convolutions, matrix products, fused attention, forward and
    backward, at the step's own shapes and in its own memory. On CPU spconv calls aten::mm once a kernel offset, on
    gathered rows: these products are in the floor, its gathers and scatters stand apart; what builds its neighbour
    tables does neither. On CUDA its kernels gather and multiply in one and count as products.

    Returns {part: {"forward", "backward": seconds, together all; "product", "gather": of them}}.
    """
    cuda = device != "cpu"
    patches = [(model.unet, "forward", "sparse U-Net"), (model.decoder, "forward", "decoder"),
               (networks, "superpoint_means", "decoder"), (networks, "link_views", "sampling"),
               (networks, "sample_views", "sampling")]
    if hasattr(model, "tower"):
        patches.append((model.tower, "forward", "image tower"))
    with contextlib.ExitStack() as stack:
        for owner, name, part in patches:
            stack.enter_context(mock.patch.object(owner, name, record_function(part)(getattr(owner, name))))
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
        profiler = stack.enter_context(profile(activities=activities))
        with record_function("rest"):
            step()
            if cuda:
                torch.cuda.synchronize()
    split = {part: dict.fromkeys(("forward", "backward", "product", "gather"), 0.0) for part in PARTS}
    where, made_by, node_part = {}, {}, "rest"  # of each event: part, "forward" or "backward", within a sparse conv
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        part, direction, sparse = where.get(id(event.cpu_parent), ("rest", "forward", False))
        if event.name in PARTS:
            part = event.name
        elif event.name.startswith("autograd::engine::evaluate_function"):
            part = node_part = made_by.get(event.sequence_nr, node_part)
            direction = "backward"
        elif direction == "forward" and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = part
        sparse = sparse or event.name.removesuffix("Backward") in SPARSE
        where[id(event)] = part, direction, sparse
        seconds = event.self_cpu_time_total / 1e6
        if cuda:
            seconds = sum(k.duration for k in event.kernels if k.name not in PARTS) / 1e6
        split[part][direction] += seconds
        if event.name in PRODUCTS or (cuda and sparse):
            split[part]["product"] += seconds
        elif sparse:
            split[part]["gather"] += seconds
    return split
