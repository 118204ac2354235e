"""The curriculum as one table: what trains, losses, fusion, rates and clip of every epoch; plans A and B.

Needs torch alone and imports no other file of this project: copy it and it works on any model with a method `parts()`
that returns {part name: list of parameters}, see PARTS.

    row = row_at(curriculum(), epoch)                # of CURRICULUM, a shorter one, plan A, plan B
    apply_row(model, row)                            # who gets a gradient; model.row is what the forward reads
    model.ramp = row.ramp(epoch + step / steps)      # share of alpha in force
    set_rates(optimizer, row, lr)                    # and after backward clip_by_branch(model, row.clip)

No change of row moves the network's output: the ramp starts at 0, FiLM and gate start as what they replace, and the
batch norms of a pretrained tower keep its statistics. The 2D side gets its gradient through the fused feature alone, so
it grows with the ramp, from 0.
"""

from dataclasses import dataclass, replace

import torch

PARTS = {  # part of the model -> the branch whose gradient is clipped together and logged under this name
    "3d": "3d",  # sparse U-Net, its standardisation, the semantic head
    "decoder": "decoder",  # the query decoder
    "2d": "2d",  # neck of the image tower and the standardisation behind it
    "tower": "2d",  # the image tower
    "gate": "fusion", "film": "fusion",
}
RATES = {"decoder": 0.1}  # learning rates over the base rate where not 1; peers train their decoders at 1e-4
INSTANCE = ("instance_cls", "instance_bce", "instance_dice", "instance_score")


@dataclass(frozen=True)
class Row:
    """What holds from first_epoch to last_epoch, both inclusive."""

    stage: int  # 1, 2 or 3, of `train.py --stage`
    name: str
    first_epoch: int
    last_epoch: int
    trains: tuple  # names of PARTS; nothing else gets a gradient
    losses: tuple  # terms of losses.LOSS_WEIGHTS
    fusion: str = "identity"  # identity: 3D alone; simple: alpha 0.5 (SimpleFusion); learned: LiteFusionGate
    ramp_epochs: float = 0.0  # over which alpha rises from 0
    film: bool = False
    tower_rate: float = 0.0  # learning rate of the image tower over the base rate
    blank: float = 0.0  # share of the scenes without what the images show, and as many without colours and normals
    clip: float = 1.0  # largest gradient norm of each branch by itself

    def ramp(self, moment):
        """Share of alpha in force at a moment: a float, epoch + share of the epoch done."""
        if self.fusion == "identity":
            return 0.0
        return min(1.0, (moment - self.first_epoch) / self.ramp_epochs) if self.ramp_epochs else 1.0


CURRICULUM = (
    Row(1, "stability", 0, 20,  # what a plain 3D network does
        trains=("3d",),
        losses=("semantic",)),
    Row(2, "alignment, fixed gate", 21, 40,  # instances join, and 2D with FiLM; a pretrained tower stays frozen
        trains=("3d", "decoder", "2d", "film"),
        losses=("semantic", *INSTANCE, "alignment"),
        fusion="simple", ramp_epochs=5, film=True),
    Row(2, "alignment, learned gate", 41, 60,  # the tower trains
        trains=("3d", "decoder", "2d", "film", "gate", "tower"),
        losses=("semantic", *INSTANCE, "alignment", "gate"),
        fusion="learned", film=True, tower_rate=0.1),
    Row(3, "enhancement", 61, 128,  # no branch is relied on
        trains=("3d", "decoder", "2d", "film", "gate", "tower"),
        losses=("semantic", *INSTANCE, "alignment", "gate"),
        fusion="learned", film=True, tower_rate=0.1, blank=0.1),
)
PLANS = {
    "full": "the curriculum as it stands",
    "A": "simplified: no images, so nothing to fuse, and the semantic loss only, through all epochs",
    "B": "gradient clip 1.0, learning rate 1e-5, weight decay 1e-6 everywhere",
}
PLAN_B = {"clip": 1.0, "lr": 1e-5, "weight_decay": 1e-6}


def curriculum(compress=1.0, plan="full", pretrained=True, tower_rate=None):
    """CURRICULUM as a run follows it: tuple of Row.

    Args:
        compress:   divides all lengths; every row keeps at least one epoch.  plan: a key of PLANS.
        pretrained: False: the image tower has random weights, nothing to protect; it trains at the base rate.
        tower_rate: of the rows in which a pretrained tower trains; None: theirs.

    Raises KeyError for an unknown plan, ValueError for compress below 1.
    """
    if plan not in PLANS:
        raise KeyError(f"unknown plan {plan!r}; choose from {sorted(PLANS)}")
    if not compress >= 1:
        raise ValueError(f"compress divides the lengths of the stages and must be at least 1, got {compress}")
    rows, first = [], 0
    for row in CURRICULUM:
        last = max(first, round((row.last_epoch + 1) / compress) - 1)
        row = replace(row, first_epoch=first, last_epoch=last, ramp_epochs=row.ramp_epochs / compress)
        if plan == "A":
            row = replace(row, trains=("3d",), losses=("semantic",), fusion="identity", film=False, blank=0.0)
        elif not pretrained and row.fusion != "identity":
            row = replace(row, trains=tuple(dict.fromkeys((*row.trains, "tower"))), tower_rate=1.0)
        elif tower_rate is not None and "tower" in row.trains:
            row = replace(row, tower_rate=tower_rate)
        rows.append(replace(row, clip=PLAN_B["clip"]) if plan == "B" else row)
        first = last + 1
    return tuple(rows)


def row_at(rows, epoch):
    """The row that holds at an epoch; a fraction is the share of the epoch done. ValueError outside of all."""
    for row in rows:
        if row.first_epoch <= epoch < row.last_epoch + 1:
            return row
    raise ValueError(f"epoch {epoch} lies outside the curriculum of {rows[-1].last_epoch + 1} epochs")


def stage_epochs(rows):
    """{stage: (first epoch, last epoch)}: {1: (0, 20), 2: (21, 60), 3: (61, 128)} of CURRICULUM."""
    epochs = {}
    for row in rows:
        epochs[row.stage] = epochs.get(row.stage, (row.first_epoch,))[0], row.last_epoch
    return epochs


def apply_row(model, row):
    """Let the parts that a row trains, and no others, take a gradient; the forward reads model.row. Returns model."""
    for name, parameters in model.parts().items():
        if name not in PARTS:
            raise KeyError(f"the model has a part {name!r}; stages.py knows {sorted(PARTS)}")
        for parameter in parameters:
            parameter.requires_grad_(name in row.trains)
    model.row = row
    return model


def parameter_groups(model, lr, weight_decay):
    """Groups for torch.optim, a part each, whose rate can change with the row. Norms and biases (one-dimensional) are
    not decayed: they stand in a group of the same name."""
    groups = [{"name": name, "params": [p for p in parameters if (p.ndim > 1) == decays], "lr": lr,
               "weight_decay": weight_decay if decays else 0.0}
              for name, parameters in model.parts().items() for decays in (True, False)]
    return [group for group in groups if group["params"]]


def set_rates(optimizer, row, lr, warm_up=1):
    """Give every group of `parameter_groups` its rate: lr, by RATES, and tower_rate * lr for the image tower.

    Over the first warm_up steps in which a part trains, whenever it joins, its rate rises to that: Adam does not know
    yet how large its gradients are, and steps of full length spoil what the others, and the pretraining, have learnt.
    """
    for group in optimizer.param_groups:
        group["steps"] = group.get("steps", 0) + (group["name"] in row.trains)  # kept by the optimiser's state_dict
        rate = row.tower_rate if group["name"] == "tower" else RATES.get(group["name"], 1.0)
        group["lr"] = min(1.0, group["steps"] / warm_up) * lr * rate


def clip_by_branch(model, clip):
    """Clip each branch's gradient norm by itself: a burst in one does not shrink the step of another. Returns {branch:
    norm before clipping, 0-dim tensor} for the branches that have a gradient."""
    branches = {}
    for name, parameters in model.parts().items():
        branches.setdefault(PARTS[name], []).extend(p for p in parameters if p.grad is not None)
    return {branch: torch.nn.utils.clip_grad_norm_(parameters, clip)
            for branch, parameters in branches.items() if parameters}


def update_rms(optimizer, parameter):
    """RMS of g^2 over its running mean, of a parameter after a step of AdamW; None where it took none. Above 2 or so
    the mean lags behind: a loss spike is near (Wortsman et al. 2023, arXiv 2304.13013)."""
    if parameter is None or parameter.grad is None:
        return None
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    mean = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
    return (parameter.grad.square() / mean.clamp(min=1e-16)).mean().sqrt().item()
