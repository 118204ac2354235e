"""The ways in which a 2D-3D fusion breaks: each reproduced without its cure and with it.

    python report.py --failures        # the table and failures.png; half a minute on one core

An experiment runs this project's own modules twice on the same data from the same seed. The first time the cure is
taken out by the smallest replacement that people commonly write in its place (named in the comment above it), the
second time everything is as train.py has it. Both give one figure of the same measure, and the more the worse. What
counts as sick and as well is said beside them, so an experiment that no longer shows its disease is seen to fail.

Needs everything that train.py needs. Data: one generated room of rooms.py, the preset `small` with a tower of random
numbers; where training has to show it, a toy (`Toy`) in which either branch alone is half blind.
"""

import functools
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn

from data import SceneDataset, augment_points, collate, scene_item
from fusion import DEPTH_TOLERANCE, FiLM, LiteFusionGate, Standardise, blend, link_views
from guard import Guard, all_finite
from losses import LOSS_WEIGHTS, match, semantic_loss, weighted_sum
from model import VoxelBatchNorm, build_model
from scenes.folder import IGNORE, NUM_CLASSES
from scenes.rooms import write_scene
from stages import LEARNED_GATE_FROM, apply_setting, clip_by_branch, parameter_groups, setting_at, stage_epochs
from tower import SCRATCH
from train import loss_terms

BEFORE = 1e-6  # of an epoch: the last moment of the stage before
STAGE_3 = replace(setting_at(70), blank=0.0)  # everything is on, and nothing is left to chance


class Finding(NamedTuple):
    """One failure mode in two figures."""

    name: str
    measure: str  # what both figures are; more is worse
    without: float  # the cure left out
    with_cure: float  # as the project has it
    sick: float  # without must reach this, or the experiment does not show the disease
    well: float  # with_cure must not exceed this

    @property
    def holds(self):
        return self.without >= self.sick and self.with_cure <= self.well


# ------------------------------------------------------------------------------------------------- data, model, a step


@functools.cache
def room(voxel_size=0.2, views=4, image_size=(64, 48), augment=False):
    """One generated room as data.collate makes it. Do not write into it."""
    with tempfile.TemporaryDirectory() as root:
        write_scene(Path(root, "train", "room"), 0)
        scenes = SceneDataset(root, "train", voxel_size=voxel_size, views=views, image_size=image_size, augment=augment)
        return collate([scenes[0]])


def small_model(setting=STAGE_3):
    """BiFusion of the preset `small`, its tower from scratch, ready to train in a setting; always the same numbers."""
    torch.manual_seed(0)
    model = build_model("bifusion", "small", NUM_CLASSES, clip_weights=SCRATCH)
    apply_setting(model, setting)
    return model.train()


def take_step(model, optimizer, batch, other=None, guard=None, guarded=True):
    """One step as in train.py's loop.

    Args:
        other:   function of the model's output -> dict of loss terms that stand in for ours.
        guard:   Guard, put to work before the forward and after a failed step; None = none.
        guarded: False takes the step whatever its numbers are.

    Returns True where the loss and the gradient norm of every branch were finite.
    """
    if guard:
        guard.remember()
    out = model(batch)
    terms = loss_terms(out, batch, model.setting) | (other(out) if other else {})
    loss = weighted_sum(terms, LOSS_WEIGHTS["bifusion"])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norms = clip_by_branch(model, model.setting.clip)
    finite = all_finite([loss.item(), *(norm.item() for norm in norms.values())])
    if finite or not guarded:
        optimizer.step()
    elif guard:
        guard.restore()
    return finite


def adamw(model):
    return torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05))


def lost_steps(batch, other=None, model=None, steps=3):
    """Share of the steps on a batch that raise, or that the guard skips because they are not finite."""
    model = model or small_model()
    optimizer, guard = adamw(model), Guard(model, os.devnull)

    def is_lost():
        try:
            return not take_step(model, optimizer, batch, other, guard)
        except ValueError:  # of a norm over a single row
            return True

    return sum(is_lost() for _ in range(steps)) / steps


def share_not_finite(tensors):
    values = torch.cat([t.detach().flatten() for t in tensors])
    return 1 - values.isfinite().float().mean().item()


# --------------------------------------------------------------------------------------------------- poor scenes


def no_view_sees_a_voxel():
    """Depth maps without a reading, as of a lost sensor."""
    batch = room() | {"depth": torch.zeros_like(room()["depth"])}

    def masked_mean(out):  # commonly written: the sum over the mask by the size of the mask
        distance = 1 - F.cosine_similarity(out["feat_3d"], out["feat_2d"].detach())
        return {"alignment": (distance * out["seen"]).sum() / out["seen"].sum()}

    return Finding("no view sees a voxel", "share of steps lost", lost_steps(batch, masked_mean), lost_steps(batch),
                   1, 0)


def every_label_is_ignored():
    batch = room() | {"segment": torch.full_like(room()["segment"], IGNORE)}

    def own_mean(out):  # commonly written: the mean that F.cross_entropy takes itself
        return {"semantic": F.cross_entropy(out["logits"], batch["segment"], ignore_index=IGNORE)}

    return Finding("every label is ignored", "share of steps lost", lost_steps(batch, own_mean), lost_steps(batch),
                   1, 0)


def no_instance():
    batch = room() | {"superpoint_instance": torch.full_like(room()["superpoint_instance"], IGNORE),
                      "instance_label": room()["instance_label"][:0], "instance_batch": room()["instance_batch"][:0]}
    masks = torch.zeros(0, len(batch["superpoint_batch"]), dtype=torch.bool)  # (0, S)

    def mean_over_matches(out):  # commonly written: the mean over matched masks, of which there are none
        prediction = out["instances"][0][-1]
        query, instance = match(prediction, batch["instance_label"], masks)
        bce = F.binary_cross_entropy_with_logits(prediction["mask_logits"][query], masks[instance].float())
        return {"instance_bce": bce}

    return Finding("no instance in the scene", "share of steps lost", lost_steps(batch, mean_over_matches),
                   lost_steps(batch), 1, 0)


def one_voxel():
    """A scene, or a crop, that is one voxel at some level of the U-Net."""
    points = {"coord": np.zeros((1, 3), np.float32), "color": np.full((1, 3), 90, np.uint8),
              "normal": np.array([[0, 0, 1]], np.float32), "segment": np.array([4]), "instance": np.array([0]),
              "superpoint": np.array([0]), "name": "one voxel"}
    frames = {key: room()[key].numpy()[:0] for key in ("image", "depth", "world_to_camera", "intrinsics")}
    batch, model = collate([scene_item(points, frames, 0.2)]), small_model()
    for module in model.modules():
        if isinstance(module, VoxelBatchNorm):
            module.__class__ = nn.BatchNorm1d  # commonly written
    return Finding("a scene of one voxel", "share of steps lost", lost_steps(batch, model=model), lost_steps(batch),
                   1, 0)


# ------------------------------------------------------------------------------------------- numbers out of range


def tower_emits_inf():
    figures = []
    for guarded in (False, True):  # False: commonly written, clip and step (a norm that is NaN makes all weights NaN)
        model = small_model()
        model.tower.register_forward_hook(lambda module, args, out: out * math.inf)
        take_step(model, adamw(model), room(), guard=Guard(model, os.devnull), guarded=guarded)
        figures.append(share_not_finite(model.parameters()))
    return Finding("the tower emits inf", "share of weights not finite after the step", *figures, 0.5, 0)


def skipped_step_leaves_its_statistics():
    figures = []
    for restore in (False, True):
        model = small_model()
        guard = Guard(model, os.devnull) if restore else None  # None: commonly written, `if not finite: continue`
        bad = room() | {"color": room()["color"].index_fill(0, torch.tensor([3]), math.nan)}
        take_step(model, adamw(model), bad, guard=guard)
        with torch.no_grad():
            figures.append(share_not_finite([model.eval()(room())["logits"]]))
    return Finding("a bad step is skipped, no more", "share of later predictions not finite", *figures, 0.5, 0)


def fp16_overflow():
    """Activations that outgrow 65504, the largest number of fp16, in a tower under autocast."""
    figures = []
    for dtype in (torch.float16, torch.bfloat16):  # fp16: commonly written, and what torch.autocast takes on a GPU
        model = small_model()
        model.tower.visual.net.conv1.rgb.weight.data *= 1e6
        with torch.no_grad(), mock.patch("tower.autocast", lambda like, _, d=dtype: torch.autocast("cpu", d)):
            feat_2d, seen = model.encode_2d(room())
        figures.append(share_not_finite([feat_2d[seen]]))
    return Finding("activations beyond fp16", "share of image features not finite", *figures, 0.5, 0)


def image_gradients_explode(burst=1e6):
    """Gradients of the image branch a million times too large: what is left of the 3D branch's own?"""
    def joint(model, clip):  # commonly written: one norm over all parameters
        nn.utils.clip_grad_norm_(model.parameters(), clip)

    figures = []
    for clip in (joint, clip_by_branch):
        norms = []
        for factor in (1.0, burst):
            model = small_model()
            for parameter in (*model.tower.parameters(), *model.standardise_2d.parameters()):
                parameter.register_hook(lambda grad, factor=factor: factor * grad)
            torch.manual_seed(0)  # of the superpoints that become queries
            weighted_sum(loss_terms(model(room()), room(), STAGE_3), LOSS_WEIGHTS["bifusion"]).backward()
            clip(model, STAGE_3.clip)
            norms.append(torch.cat([p.grad.flatten() for p in model.parts()["3d"]]).norm().item())
        figures.append(norms[0] / norms[1])
    return Finding("image gradients explode", "factor by which the 3D gradient shrinks", *figures, 1000, 1.001)


# ------------------------------------------------------------------------------------------------ changes of stage


def jump(model, before, after):
    """Largest change of a logit when the setting changes, on the same batch and weights."""
    logits = []
    for setting in (before, after):
        apply_setting(model, setting)
        with torch.no_grad():
            logits.append(model.eval()(room())["logits"])
    return (logits[1] - logits[0]).abs().max().item()


def trained(setting, steps=5):
    model = small_model(setting)
    optimizer = adamw(model)
    for _ in range(steps):
        take_step(model, optimizer, room())
    return model


def images_join_at_once():
    switch = stage_epochs()[2][0]
    before, after = setting_at(switch - BEFORE), setting_at(switch)
    model = trained(before)
    without = jump(model, before, replace(after, ramp=1.0))  # commonly written: the branch is on from here
    return Finding("the images join (stage 2)", "jump of the logits", without, jump(model, before, after), 0.1, 1e-5)


def gate_and_film_start_at_random():
    bounds = stage_epochs()
    learned = bounds[2][0] + LEARNED_GATE_FROM * (bounds[3][0] - bounds[2][0])
    with_cure, without = [], []
    for switch, module in ((bounds[2][0], lambda model: model.film), (learned, lambda model: model.gates["learned"])):
        before, after = setting_at(switch - BEFORE), setting_at(switch)
        model = trained(before)
        with_cure.append(jump(model, before, after))
        module(model).mlp[-1].reset_parameters()  # commonly written: nn.Linear's own start
        without.append(jump(model, before, after))
    return Finding("FiLM joins, the gate is learned (stage 2)", "jump of the logits (without: the smaller)",
                   min(without), max(with_cure), 0.1, 1e-5)


# ------------------------------------------------------------------------------------------------ cameras and points


def views():
    """The room for questions of geometry: fine voxels, all frames at the size of the preset."""
    return room(0.08, 8, (160, 120))


def misread(world_to_camera, tolerance, far=0.2):
    """How many voxels are given the image of another place: every pixel that a voxel is linked to is lifted back to
    the surface that it shows in truth, by the true pose.

    Returns:
        off:   share of all voxels with a pixel that shows a surface more than `far` metres away.
        other: share of all voxels with a pixel that shows a surface of another class.
    """
    batch = views()
    coord, depth, intrinsics = batch["world_coord"], batch["depth"], batch["intrinsics"]
    links = link_views(coord, world_to_camera, intrinsics, depth, tolerance)
    uv = links.uv.round().long()
    column, row = uv[:, 0].clamp(0, depth.shape[2] - 1), uv[:, 1].clamp(0, depth.shape[1] - 1)
    ray = F.pad(torch.stack([column, row], 1).float(), (0, 1), value=1)  # (L, 3)
    ray = (intrinsics.inverse()[links.view] @ ray[..., None]) * depth[links.view, row, column][:, None, None]
    pose = batch["world_to_camera"].inverse()[links.view]  # (L, 4, 4)
    surface = (pose[:, :3, :3] @ ray)[..., 0] + pose[:, :3, 3]  # (L, 3)
    nearest = torch.from_numpy(cKDTree(coord.numpy()).query(surface.numpy())[1])  # (L,)
    off = (surface - coord[links.point]).norm(dim=1) > far
    other = batch["segment"][nearest] != batch["segment"][links.point]
    return [len(links.point[wrong].unique()) / len(coord) for wrong in (off, other)]


def without_and_with_depth_test(world_to_camera):
    """`misread` without and with the depth test -> (off, off), (other, other)."""
    # commonly written: what is in front of the camera and inside the image is seen
    return zip(*(misread(world_to_camera, tolerance) for tolerance in (math.inf, DEPTH_TOLERANCE)))


def moved(metres):
    """world_to_camera of all views with each camera moved sideways."""
    pose = views()["world_to_camera"].inverse()
    pose[:, 0, 3] += metres
    return pose.inverse()


def voxels_behind_a_surface():
    """The poses are right: what stands behind a table is not on the picture of the table."""
    _, other = without_and_with_depth_test(views()["world_to_camera"])
    return Finding("voxels behind a surface", "share of voxels reading another class", *other, 0.1, 0.01)


def inverted_pose():
    """camera_to_world taken for world_to_camera: rigid and finite, so no check of the numbers finds it."""
    off, _ = without_and_with_depth_test(views()["world_to_camera"].inverse())
    return Finding("the pose is inverted", "share of voxels reading > 0.2 m off", *off, 0.02, 0.002)


def pose_off_by_30_cm():
    """The depth test unlinks the voxels whose surface a wrong pose contradicts: most that read another class."""
    _, other = without_and_with_depth_test(moved(0.3))
    return Finding("the pose is off by 0.3 m", "share of voxels reading another class", *other, 0.2, 0.1)


def pose_off_by_50_cm():
    _, other = without_and_with_depth_test(moved(0.5))
    return Finding("the pose is off by 0.5 m", "share of voxels reading another class", *other, 0.2, 0.1)


def pose_off_along_a_plane():
    """What is left: a wall moved along itself contradicts nothing, so its voxels read the wall beside their place. The
    depth test halves this and does no more; nothing here mends a pose."""
    off, _ = without_and_with_depth_test(moved(0.5))
    return Finding("the same, along planes: about halved", "share of voxels reading > 0.2 m off", *off, 0.7, 0.45)


def points_turn_and_cameras_stay():
    """Augmentation turns the points, the cameras stay where they were."""
    plain, item = views(), room(0.08, 8, (160, 120), augment=True)
    turned, _ = augment_points(plain["world_coord"].numpy(), plain["normal"].numpy(), np.random.default_rng(0))

    def seen(coord):
        links = link_views(coord, plain["world_to_camera"], plain["intrinsics"], plain["depth"])
        return len(links.point.unique()) / len(coord)

    whole = seen(plain["world_coord"])
    # commonly written: the coordinates that the network gets are the ones projected
    return Finding("augmented points are projected", "share of seen voxels that lose their image",
                   *(1 - min(1, seen(coord) / whole) for coord in (torch.from_numpy(turned), item["world_coord"])),
                   0.9, 0.05)


# ------------------------------------------------------------------------------------------ a branch is left behind


class FiLMOf2D(nn.Module):
    """FiLM as commonly written: features of one branch modulate the other. It starts as the identity, as ours."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 2 * dim))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, feat_2d, feat_3d, coord, normal):
        gamma, beta = self.mlp(feat_2d).chunk(2, 1)
        return feat_2d, (1 + gamma) * feat_3d + beta


class Toy(nn.Module):
    """The fusion between two made-up branches: 16 classes, 4 patterns seen in 2D alone x 4 shapes seen in 3D alone."""

    def __init__(self, to_width, film, dim=32):
        super().__init__()
        self.patterns, self.shapes = torch.randn(2, 4, 48)
        self.to_2d, self.to_3d, self.film = to_width(48, dim), to_width(48, dim), film(dim)
        self.gate, self.head = LiteFusionGate(dim), nn.Linear(dim, 16)

    def forward(self, pattern, shape, scale_2d):
        """(N,), (N,) in 0..3 -> logits (N, 16), mean alpha."""
        noise_2d, noise_3d = 0.5 * torch.randn(2, len(shape), 48)
        feat_2d = self.to_2d(scale_2d * (self.patterns[pattern] + noise_2d))
        feat_3d = self.to_3d(self.shapes[shape] + noise_3d)
        coord, normal = 4 * torch.rand(len(shape), 3), torch.zeros(len(shape), 3)
        feat_2d, feat_3d = self.film(feat_2d, feat_3d, coord, normal)
        alpha = self.gate(feat_2d, feat_3d, torch.ones(len(shape), dtype=torch.bool))
        return self.head(blend(feat_2d, feat_3d, alpha)), alpha.mean()


def train_toy(to_width=Standardise, film=FiLM, scale_2d=1.0, steps=300, count=400):
    """Train the toy with the semantic loss alone -> error rate and fusion_2d_ratio, means of the last 20 steps."""
    torch.manual_seed(0)
    toy, scene = Toy(to_width, film), torch.zeros(count, dtype=torch.long)
    optimizer, watched = torch.optim.AdamW(toy.parameters(), 3e-3, weight_decay=0.05), []
    for _ in range(steps):
        pattern, shape = torch.randint(4, (2, count))
        logits, ratio = toy(pattern, shape, scale_2d)
        labels = 4 * pattern + shape
        optimizer.zero_grad()
        semantic_loss(logits, labels, scene, 1).backward()
        nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        watched.append([(logits.argmax(1) != labels).float().mean().item(), ratio.item()])
    return np.mean(watched[-20:], 0).tolist()


def branches_a_thousand_apart():
    # commonly written: a linear layer brings each branch to the common width, and no norm follows. At scale 1 it solves
    # the toy too (error 0); at 1,000 five times the steps do not help it (0.75)
    without, with_cure = (train_toy(to_width, scale_2d=1000.0)[0] for to_width in (nn.Linear, Standardise))
    return Finding("2D features 1,000 times too large", "error rate (one branch alone: 0.75)", without, with_cure,
                   0.4, 0.02)


def learned_gate_collapses():
    # commonly written: FiLM (or attention) from 2D onto 3D beside a learned gate. All of 2D can pass through it, so
    # the gate closes; semantic loss alone in both runs, without the prior. The toy is solved either way: what is lost
    # here is the meaning of the gate, not yet accuracy
    without, with_cure = (abs(train_toy(film=film)[1] - 0.5) for film in (FiLMOf2D, FiLM))
    return Finding("the learned gate collapses", "distance of fusion_2d_ratio from 0.5", without, with_cure, 0.4, 0.2)


# -------------------------------------------------------------------------------------------------- table and picture

EXPERIMENTS = (branches_a_thousand_apart, learned_gate_collapses, tower_emits_inf, skipped_step_leaves_its_statistics,
               fp16_overflow, image_gradients_explode, no_view_sees_a_voxel, every_label_is_ignored, no_instance,
               one_voxel, images_join_at_once, gate_and_film_start_at_random, voxels_behind_a_surface, inverted_pose,
               pose_off_by_30_cm, pose_off_by_50_cm, pose_off_along_a_plane, points_turn_and_cameras_stay)


def table(findings):
    """The findings as text: one row each, with the limits that were asked for."""
    rows = [("failure", "measure", "without", "with", "sick", "well", "ok")]
    rows += [(f.name, f.measure, *(f"{value:.3g}" for value in f[2:4]), f">= {f.sick:g}", f"<= {f.well:g}",
              "yes" if f.holds else "NO") for f in findings]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(findings, path, zero=1e-5):
    """Draw the findings to a .png: a red dot without the cure, a green one with it, on one logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    red, green, ink, faint = "#c00000", "#2c8c57", "#222222", "#8a8f98"
    figure = Figure(figsize=(11.5, 1.25 + 0.42 * len(findings)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.34, right=0.97, top=1 - 0.75 / figure.get_figheight(),
                           bottom=0.5 / figure.get_figheight())
    for row, finding in enumerate(findings):
        values = [max(value, zero) for value in (finding.without, finding.with_cure)]
        ax.plot(values, [row, row], color="#c9ced6", lw=2, zorder=1)
        for value, shown, color, side in zip(values, finding[2:4], (red, green), (1, -1)):
            ax.plot(value, row, "o", color=color, ms=8, zorder=2)
            ax.annotate(f"{shown:.2g}" if shown < 1000 else f"{shown:,.0f}", (value, row), (8 * side, 0), color=color,
                        textcoords="offset points", ha="left" if side > 0 else "right", va="center", fontsize=9)
        ax.text(-0.02, row - 0.17, finding.name, transform=ax.get_yaxis_transform(), ha="right", va="center",
                fontsize=10, color=ink if finding.holds else red)
        ax.text(-0.02, row + 0.24, finding.measure, transform=ax.get_yaxis_transform(), ha="right", va="center",
                fontsize=8, color=faint)
    ax.set_xscale("log")
    ax.set_xlim(zero / 4, max(10, *(8 * finding.without for finding in findings)))
    ticks = [zero, *(10.0**power for power in range(-4, 6))]
    ax.set_xticks(ticks, ["0", *(f"{tick:,g}" if tick < 1e4 else f"{tick:,.0f}" for tick in ticks[1:])], fontsize=8)
    ax.minorticks_off()
    ax.set_ylim(len(findings) - 0.4, -0.7)
    ax.set_yticks([])
    ax.grid(axis="x", color="#e6e9ed", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.plot([], [], "o", color=red, label="without the cure")
    ax.plot([], [], "o", color=green, label="with it")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9)
    figure.text(0.01, 1 - 0.4 / figure.get_figheight(), "Each failure without its cure and with it; more is worse",
                fontsize=12, fontweight="bold", color=ink)
    figure.savefig(path, format="png")
