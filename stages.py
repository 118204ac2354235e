"""The curriculum as data: what trains in each stage, with which losses, fusion, rates and clip; plans A and B.

Needs torch only (nothing else is imported) and imports no other file of this project: copy it and it works on any
model with a method `parts()` that returns {part name: list of parameters}; see PARTS.

    epochs   0-20  stability    3D alone, semantic loss: what a plain 3D network does
            21-60  alignment    instances join, and 2D with FiLM: SimpleFusion ramped in from 0, then the learned gate
           61-128  enhancement  a pretrained tower's ends train, at a tenth of the rate or less; now and then a scene
                                comes without its images or without its points' colours: neither is relied on

No stage change moves the network's output: the ramp starts at 0, gate and FiLM start as what they replace. The 2D side
gets its gradient through the fused feature alone, so it grows with the ramp, from 0.
"""

from dataclasses import dataclass, replace

import torch

# part of the model -> the branch whose gradient is clipped together and logged under this name
PARTS = {
    "3d": "3d",  # sparse U-Net, its standardisation, the semantic head
    "decoder": "decoder",  # the query decoder
    "2d": "2d",  # neck of the image tower and the standardisation behind it
    "tower": "2d",  # the image tower but for its ends
    "tower_ends": "2d",  # conv1 (RGB-D) and the last blocks of the image tower
    "gate": "fusion",
    "film": "fusion",
}
INSTANCE = ("instance_cls", "instance_bce", "instance_dice", "instance_score")
RAMP = 0.125  # share of stage 2 over which alpha rises from 0 to 0.5: 5 of 40 epochs
LEARNED_GATE_FROM = 0.5  # share of stage 2 after which the learned gate takes over from SimpleFusion


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum, epochs inclusive."""

    name: str
    first_epoch: int
    last_epoch: int
    parts: tuple  # what trains, names of PARTS
    losses: tuple  # terms of losses.LOSS_WEIGHTS
    tower_rate: float  # learning rate of a pretrained tower over the base rate
    clip: float = 1.0  # largest gradient norm of each branch by itself
    use_2d: bool = True
    film: bool = False
    blank: float = 0.0  # share of the scenes with blanked images, and as many with blanked points


STAGES = {
    1: Stage("stability", 0, 20, ("3d",), ("semantic",), 0.0, use_2d=False),
    2: Stage("alignment", 21, 60, ("3d", "decoder", "2d", "film"), ("semantic", *INSTANCE, "alignment"), 0.0,
             film=True),
    3: Stage("enhancement", 61, 128, ("3d", "decoder", "2d", "film", "gate", "tower_ends"),
             ("semantic", *INSTANCE, "alignment", "gate"), 0.01, film=True, blank=0.1),
}
PLANS = {
    "full": "the curriculum as it stands",
    "A": "simplified: no CLIP, so nothing to fuse, and the semantic loss only, through all epochs",
    "B": "gradient clip 1.0, learning rate 1e-5, weight decay 1e-6 everywhere",
}
PLAN_B = {"clip": 1.0, "lr": 1e-5, "weight_decay": 1e-6}


@dataclass(frozen=True)
class Setting:
    """What holds at one moment of the training."""

    stage: int
    name: str
    parts: tuple
    losses: tuple
    tower_rate: float
    clip: float
    fusion: str  # "identity" (3D alone), "simple" (SimpleFusion) or "learned" (LiteFusionGate)
    ramp: float  # share of alpha in force, 0 to 1
    film: bool
    blank: float


def stage_epochs(compress=1.0):
    """First and last epoch (inclusive) of each stage with all lengths divided by compress, at least one epoch each.

    Returns {1: (0, 20), 2: (21, 60), 3: (61, 128)} for compress 1. Raises ValueError for compress below 1.
    """
    if not compress >= 1:
        raise ValueError(f"compress divides the stage lengths and must be at least 1, got {compress}")
    bounds, start = {}, 0
    for number, stage in STAGES.items():
        length = max(1, round((stage.last_epoch - stage.first_epoch + 1) / compress))
        bounds[number] = (start, start + length - 1)
        start += length
    return bounds


def setting_at(epoch, compress=1.0, plan="full", pretrained=False, tower_rate=None):
    """The setting in force at an epoch.

    Args:
        epoch:      float, 0-based; the fraction is the share of the epoch done (the ramp moves with every step).
        compress:   as `stage_epochs`.
        plan:       a key of PLANS.
        pretrained: False means the image tower starts from scratch: there is nothing to protect, so the whole tower
                    trains at the base rate from stage 2 on.
        tower_rate: learning rate of a pretrained tower over the base rate in stage 3; None = the stage's own.

    Returns:
        Setting.

    Raises:
        KeyError: unknown plan.  ValueError: an epoch outside the curriculum.
    """
    if plan not in PLANS:
        raise KeyError(f"unknown plan {plan!r}; choose from {sorted(PLANS)}")
    bounds = stage_epochs(compress)
    number = next((n for n, (first, last) in bounds.items() if first <= epoch < last + 1), None)
    if number is None:
        raise ValueError(f"epoch {epoch} lies outside the curriculum of {bounds[3][1] + 1} epochs")
    stage = STAGES[number]
    first, last = bounds[number]
    done = (epoch - first) / (last - first + 1)  # share of the stage
    setting = Setting(number, stage.name, stage.parts, stage.losses, stage.tower_rate, stage.clip,
                      "learned" if stage.use_2d else "identity", 1.0 if stage.use_2d else 0.0, stage.film, stage.blank)
    if plan == "A":
        return replace(setting, parts=("3d",), losses=("semantic",), tower_rate=0.0, fusion="identity", ramp=0.0,
                       film=False, blank=0.0)
    if number == 2:
        setting = replace(setting, ramp=min(1.0, done / RAMP))
        if done < LEARNED_GATE_FROM:
            setting = replace(setting, fusion="simple")
        else:
            setting = replace(setting, parts=(*setting.parts, "gate"), losses=(*setting.losses, "gate"))
    if tower_rate is not None and setting.tower_rate:
        setting = replace(setting, tower_rate=tower_rate)
    if not pretrained and number > 1:
        parts = dict.fromkeys((*setting.parts, "tower", "tower_ends"))  # a set that keeps its order
        setting = replace(setting, parts=tuple(parts), tower_rate=1.0)
    return replace(setting, clip=PLAN_B["clip"]) if plan == "B" else setting


def apply_setting(model, setting):
    """Put a model into a setting: which parameters take a gradient, and how the branches are fused.

    A part that does not train gets requires_grad False, so no gradient reaches it and no optimiser moves it.
    model needs `parts()`; where it has `setting` (BiFusion), the fusion reads it from there.
    """
    for name, parameters in model.parts().items():
        if name not in PARTS:
            raise KeyError(f"the model has a part {name!r}; stages.py knows {sorted(PARTS)}")
        for parameter in parameters:
            parameter.requires_grad_(name in setting.parts)
    model.setting = setting


def parameter_groups(model, lr, weight_decay):
    """One optimiser group a part, so that a part's rate can change with the stage; empty parts are left out.

    Returns a list for torch.optim: {"name", "params", "lr", "weight_decay"}. Norms and biases (one-dimensional
    parameters) are not decayed: they stand in a group of the same name.
    """
    groups = []
    for name, parameters in model.parts().items():
        for decay, chosen in ((weight_decay, [p for p in parameters if p.ndim > 1]),
                              (0.0, [p for p in parameters if p.ndim <= 1])):
            if chosen:
                groups.append({"name": name, "params": chosen, "lr": lr, "weight_decay": decay})
    return groups


def set_rates(optimizer, setting, lr):
    """Give every group of `parameter_groups` its rate: lr, and tower_rate * lr for the parts of the image tower."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (setting.tower_rate if group["name"].startswith("tower") else 1.0)


def clip_by_branch(model, clip):
    """Clip each branch's gradient norm by itself, so a burst in one does not shrink the step of another.

    Returns {branch: norm before clipping, 0-dim tensor} for the branches that have a gradient.
    """
    branches = {}
    for name, parameters in model.parts().items():
        branches.setdefault(PARTS[name], []).extend(p for p in parameters if p.grad is not None)
    return {branch: torch.nn.utils.clip_grad_norm_(parameters, clip)
            for branch, parameters in branches.items() if parameters}
