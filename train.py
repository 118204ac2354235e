"""Train BiFusion or its 3D baseline through the curriculum.

    python train.py --stage 1                         # stage 1 on generated rooms (made on first use)
    python train.py                                   # the whole curriculum: stages 1, 2, 3
    python train.py --model baseline                  # the 3D baseline, same epochs, data and rates
    python train.py --preset base --data data/scannet # full size, CLIP ViT-B/16, on your own scans
    python train.py --resume --out runs/bifusion      # go on where a run stopped
    torchrun --nproc_per_node=2 train.py              # two processes that share every batch, a GPU each where there are

A run is a folder: config.json, log.jsonl (one line an epoch), curves.png, stage{1,2,3}.pt, last.pt, best.pt, and
skipped.jsonl (one line a skipped step) where a step was not finite. Ctrl-C or SIGTERM saves the step reached and ends.
"""

import argparse
import dataclasses
import errno
import json
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import ranks
from cache import FeatureCache
from data import SceneDataset, evenly_spread, loader
from experiments.report import draw_curves, read_log
from guard import (
    MAX_SKIPPED_IN_A_ROW,
    Guard,
    Stopped,
    StopSignals,
    all_finite,
    append_line,
    blame,
    cut_half_line,
    whole_file,
)
from losses import LOSS_WEIGHTS, alignment_loss, gate_prior, instance_loss, semantic_loss, weighted_sum
from metrics import InstanceAP, iou_of, semantic_iou
from model import PRESETS, build_model, select_instances, superpoint_graph, superpoint_sizes
from scenes.folder import CLASS_NAMES, THINGS, usable_frames
from stages import (
    PLAN_B,
    PLANS,
    STAGES,
    apply_setting,
    clip_by_branch,
    parameter_groups,
    set_rates,
    setting_at,
    stage_epochs,
)
from tower import SCRATCH

ROOMS = "data/rooms"  # generated on first use
WARM_UP = 0.02  # share of the curriculum over which the learning rate rises

# What a preset trains with unless a flag says otherwise.
RECIPES = {
    "small": {"voxel_size": 0.08, "image_size": (160, 120), "views": 5, "batch_size": 2, "lr": 3e-3,
              "weight_decay": 0.05, "tower_rate": 0.1},
    "base": {"voxel_size": 0.02, "image_size": (320, 240), "views": 10, "batch_size": 4, "lr": 1e-3,
             "weight_decay": 0.05, "tower_rate": 0.01},
}


def option(default, text, choices=None):
    """One field of Config: default, help text and choices, from which its flag is made."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    """Everything a run can be told; each field is a flag of the same name."""

    model: str = option("bifusion", "which model", ("bifusion", "baseline"))
    preset: str = option("small", "size of the networks and their recipe", tuple(PRESETS))
    stage: int = option(0, "one stage of the curriculum alone; 0 = all in turn", (0, *STAGES))
    plan: str = option("full", "; ".join(f"{k}: {v}" for k, v in PLANS.items()), tuple(PLANS))
    compress: float = option(1.0, "divide the length of every stage by this")
    data: str = option(ROOMS, "folder with train/ and val/ scene folders")
    out: str = option("", "run folder; default runs/MODEL")
    seed: int = option(0, "of the weights, the order of the scenes and the augmentation")
    resume: bool = option(False, "go on from last.pt of the run folder, with that run's own settings")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    workers: int = option(2, "worker processes that load scenes; 0 = in the main process")
    voxel_size: float = option(None, "metres")
    views: int = option(None, "frames of a scene in a training step; evaluation takes twice as many")
    batch_size: int = option(None, "scenes a step, of all processes together")
    lr: float = option(None, "base learning rate")
    weight_decay: float = option(None, "of AdamW")
    clip: str = option(None, "image tower: a model name of open_clip, as ViT-B-16, RN50, convnext_base; or clip_small")
    clip_weights: str = option(None, f"of the tower: a local file, a pretrained tag of open_clip, or {SCRATCH!r}")
    tower_rate: float = option(None, "learning rate of a pretrained tower in stage 3 over the base rate, at most 0.1")
    precision: str = option("fp32", "of image tower and decoder; the rest stays fp32", ("fp32", "bf16"))
    checkpoint_tower: bool = option(False, "recompute the tower's activations in the backward pass: less memory")
    cache: str = option("data/clip_cache", "folder for the maps of a frozen tower")
    cache_gb: float = option(50.0, "largest size of that folder, GB; 0 = no cache")


OF_THE_CALL = ("stage", "resume", "device", "workers", "out")  # never taken from the run that goes on
HOW_NOT_WHAT = ("checkpoint_tower", "cache", "cache_gb")  # taken from it, but may be given anew


def parse_config(argv=None):
    """Flags -> Config. A run that goes on (--resume, --stage 2, --stage 3) takes its settings from its config.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in dataclasses.fields(Config):
        shown = "the preset's" if f.default is None else f.default
        text = f"{f.metadata['help']} (default {shown})".replace("%", "%%")
        flag = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=f.type, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    config = Config(**given)
    config.out = config.out or f"runs/{config.model}"
    saved = Path(config.out, "config.json")
    if config.resume or config.stage > 1:
        if not saved.exists():
            sys.exit(f"{saved} not found: there is no run to go on from. Start it with: "
                     f"python train.py --stage 1 --model {config.model} --out {config.out}")
        try:
            known = json.loads(saved.read_text())
        except ValueError as error:
            sys.exit(f"{saved} is not valid JSON: {error}; write it anew from the config in {config.out}/last.pt, or "
                     "start a new run with another --out")
        for name, value in known.items():
            anew = name in OF_THE_CALL or (name in HOW_NOT_WHAT and name in given)
            if anew or name not in Config.__dataclass_fields__:
                continue
            if name in given and given[name] != value:
                sys.exit(f"--{name.replace('_', '-')} {given[name]} differs from {value} of the run in {config.out}; "
                         "leave the flag out, or start a new run with another --out")
            setattr(config, name, value)
    elif any(Path(config.out, name).exists() for name in ("log.jsonl", "last.pt")):
        sys.exit(f"{config.out} already holds a run. Go on with it: python train.py --resume --out {config.out}; "
                 "or choose another --out, or delete the folder")
    recipe = RECIPES[config.preset]
    for name in ("voxel_size", "views", "batch_size", "lr", "weight_decay", "tower_rate"):
        if getattr(config, name) is None:
            plan_b = PLAN_B if config.plan == "B" else {}
            setattr(config, name, plan_b.get(name, recipe[name]))
    config.clip = config.clip or PRESETS[config.preset]["clip"]
    if config.clip_weights is None:
        own = config.clip == PRESETS[config.preset]["clip"] and config.plan != "A"  # plan A has no use for a tower
        config.clip_weights = PRESETS[config.preset]["clip_weights"] if own else SCRATCH
        if config.plan != "A" and not own and config.model == "bifusion":
            sys.exit(f"--clip {config.clip} needs --clip-weights: a local file, a pretrained tag of open_clip, or "
                     f"{SCRATCH} for random weights")
    try:
        stage_epochs(config.compress)
    except ValueError as error:
        sys.exit(str(error))
    try:
        torch.zeros(1, device=ranks.use(config.device))
    except ValueError as error:
        sys.exit(str(error))
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on the kind of device
        reason = str(error).partition("\n")[0]
        sys.exit(f"--device {config.device} cannot be used here ({reason}); leave the flag out, or give --device cpu")
    for name in ("weight_decay", "cache_gb", "workers"):
        if not 0 <= getattr(config, name) < math.inf:
            sys.exit(f"--{name.replace('_', '-')} must be 0 or more and finite, got {getattr(config, name)}")
    for name in ("voxel_size", "views", "batch_size", "lr"):
        if not 0 < getattr(config, name) < math.inf:
            sys.exit(f"--{name.replace('_', '-')} must be above 0 and finite, got {getattr(config, name)}")
    if config.batch_size % ranks.world():
        sys.exit(f"--batch-size {config.batch_size}, the scenes of a step, cannot be shared evenly by {ranks.world()} "
                 "processes; give a multiple of their number, or torchrun another --nproc_per_node")
    if not 0 < config.tower_rate <= 0.1:
        sys.exit(f"--tower-rate must be above 0 and at most 0.1, or the pretraining is lost; got {config.tower_rate}")
    return config


def learning_rate(config, progress):
    """Linear warm-up, then half a cosine to 0 over the whole curriculum; progress is the share of it done."""
    if progress < WARM_UP:
        return config.lr * (0.01 + 0.99 * progress / WARM_UP)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def loss_terms(out, batch, setting):
    """The loss terms of a setting that apply to this output, unweighted: dict of scalars."""
    index, scenes = batch["batch_index"], len(batch["names"])
    terms = {"semantic": semantic_loss(out["logits"], batch["segment"], index, scenes)}
    if "instance_cls" in setting.losses and "instances" in out:
        terms |= instance_loss(out["instances"], batch["superpoint_instance"], batch["superpoint_batch"],
                               batch["instance_label"], batch["instance_batch"], batch["has_instances"])
    if "alignment" in setting.losses and "feat_2d" in out:
        terms["alignment"] = alignment_loss(out["feat_3d"], out["feat_2d"], out["seen"], index, scenes)
    if "gate" in setting.losses and "alpha" in out:
        terms["gate"] = gate_prior(out["alpha"], out["seen"], index, scenes)
    return terms


class WeightedLoss(nn.Module):
    """Model and losses as one module, for ranks.wrap: of what it returns the loss alone carries a graph."""

    def __init__(self, model, weights):
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, batch, setting):
        """-> loss, its terms unweighted (dict of scalars), statistics of the fusion (dict, empty without one)."""
        out = self.model(batch)
        terms = loss_terms(out, batch, setting)
        loss = weighted_sum(terms, self.weights)
        return loss, {name: term.detach() for name, term in terms.items()}, out.get("stats", {})


def cached_maps(model, config, train_set, val_set, val_views, until=iter):
    """The cache of the frozen tower's maps, filled with every view that training and evaluation may take, or None.

    val_views: frames of a val scene.  until: as in FeatureCache.fill; None comes back after a stop as well.
    """
    if not config.cache_gb:
        return None
    model.eval()
    cache = FeatureCache(config.cache, model.tower, train_set.image_size, config.cache_gb)

    def fill():
        views = [(folder, frame) for folder in train_set.folders for frame in usable_frames(folder)[0]]
        views += [(folder, frame) for folder in val_set.folders
                  for frame in evenly_spread(usable_frames(folder)[0], val_views)]
        return cache.fill(views, next(model.parameters()).device, config.workers, until)

    return cache if ranks.from_first(fill) else None


@torch.no_grad()
def evaluate(model, scenes, device):
    """Val metrics over points (not voxels): metrics.semantic_iou's and, once the decoder is on, metrics.InstanceAP's.

    Scenes without labels do not count for mIoU, those without instance annotation not for AP. Of several processes each
    brings its own scenes, and all get the metrics over all of them.
    """
    model.eval()
    average_precision = InstanceAP(THINGS)

    def pairs():
        for batch in scenes:
            batch = to_device(batch, device)
            out = model(batch)
            for i, prediction in enumerate(out.get("instances", ())):
                if batch["has_instances"][i]:
                    average_precision.add(*instances_of_scene(prediction[-1], batch, i))
            predicted = out["logits"].argmax(1)[batch["point_to_voxel"]]  # (N,)
            yield batch["point_segment"].cpu(), predicted.cpu()

    confusion = semantic_iou(pairs(), range(len(CLASS_NAMES)))["confusion"]
    confusions, (average_precision, *others) = zip(*ranks.gather((confusion, average_precision)))
    for other in others:
        average_precision.merge(other)
    return iou_of(sum(confusions)) | (average_precision.result() if average_precision.num_scenes else {})


def instances_of_scene(prediction, batch, i):
    """Scene i of a batch as InstanceAP.add takes it: gt (N,), masks (P, N) bool, labels (P,), scores (P,)."""
    rows, points = batch["superpoint_batch"] == i, batch["point_batch"] == i
    chosen = rows.nonzero()[:, 0].cpu().numpy()
    graph = superpoint_graph(batch)[chosen][:, chosen]
    masks, labels, scores = select_instances(prediction, superpoint_sizes(batch)[rows], graph)
    superpoint = batch["point_superpoint"][points] - rows.int().argmax()  # (N,) row of the scene's own superpoints
    return batch["point_instance"][points], masks[:, superpoint], labels, scores


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def save_checkpoint(path, model, optimizer, config, epoch, step=1, steps=1, skipped_in_a_row=0, partial=None):
    """Everything needed to go on from here, bit for bit on a CPU; path is whole at every moment (guard.whole_file).

    All processes call it, rank 0 writes; none goes on before the file is whole.

    Args:
        epoch, step, steps: the epoch that the weights come from, its steps done and its steps in all.
        partial:            of an epoch that is not logged yet, what its line will be made of (`train`); else None.
    """
    stage = next((n for n, (_, last) in stage_epochs(config.compress).items() if epoch <= last), None)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "step": step,
             "steps": steps, "stage": stage, "skipped_in_a_row": skipped_in_a_row, "partial": partial,
             "config": dataclasses.asdict(config), "num_classes": model.semantic_head.out_features,
             "torch_rng": ranks.gather(torch.get_rng_state())}  # a random state a process
    if config.device.startswith("cuda"):
        state["cuda_rng"] = ranks.gather(torch.cuda.get_rng_state(config.device))
    if ranks.rank() == 0:
        with whole_file(path) as file:
            torch.save(state, file)
    ranks.wait()


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint without running any code of it. Raises ValueError where it is broken or not ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]  # torch goes on for a screen
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    missing = {"model", "optimizer", "epoch", "config", "num_classes"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {sorted(missing)}")
    return state


def load_model(path, device="cpu"):
    """Rebuild the model of a checkpoint, ready for prediction. Returns model, Config, checkpoint."""
    state = load_checkpoint(path, device)
    config = Config(**state["config"])
    model = new_model(config, state["num_classes"], load=False).to(device)  # the checkpoint holds the tower's weights
    load_weights(model, state, path)
    moment = state["epoch"] + min(0.999, state.get("step", 1) / state.get("steps", 1))
    apply_setting(model, setting_at(moment, config.compress, config.plan, is_pretrained(model)))
    return model.eval(), config, state


def new_model(config, num_classes, load):
    """The model of a Config; load False leaves random numbers in its image tower, for a checkpoint to fill."""
    model = build_model(config.model, config.preset, num_classes, depth_tolerance(config), config.clip,
                        config.clip_weights, load)
    model.precision = config.precision
    if hasattr(model, "tower"):
        model.tower.precision, model.tower.checkpointing = config.precision, config.checkpoint_tower
    return model


def load_weights(model, state, path):
    wrong = model.load_state_dict({k: v for k, v in state["model"].items()
                                   if k in model.state_dict() and v.shape == model.state_dict()[k].shape}, strict=False)
    extra = sorted(set(state["model"]) - set(model.state_dict()))
    if wrong.missing_keys or extra:
        raise ValueError(f"{path} belongs to another model: {len(wrong.missing_keys)} weights are missing or of "
                         f"another shape (first: {wrong.missing_keys[:3]}), {len(extra)} unknown (first: {extra[:3]})")


def depth_tolerance(config):
    """A voxel's mean point lies up to about half a voxel off the surface where the surface bends."""
    return max(0.05, config.voxel_size / 2)


def is_pretrained(model):
    return hasattr(model, "tower") and model.tower.pretrained


def show(value, form="{:.3f}"):
    return "-" if value is None else form.format(value)


def average_precisions(line):
    """AP / AP50 / AP25 of a line of the log, as text."""
    return " / ".join(show(line.get(f"val_{name}"), "{:.2f}") for name in ("ap", "ap50", "ap25"))


def summary(log, bounds, number):
    """The table at the end of a stage."""
    lines = [line for line in log if line["stage"] == number]
    if not lines:
        return ""
    last, first, end = lines[-1], *bounds[number]

    minutes = sum(line["seconds"] for line in lines) / 60
    rows = {
        "epochs": f"{first}-{end}",
        "loss": f"{show(lines[0]['loss'])} -> {show(last['loss'])}",
        "val mIoU": f"{show(lines[0]['val_miou'])} -> {show(last['val_miou'])}"
                    f"   best {show(max((x['val_miou'] for x in lines if x['val_miou'] is not None), default=None))}",
        "val AP / AP50 / AP25": average_precisions(last),
        "fusion_2d_ratio": show(last["fusion_2d_ratio"]),
        "voxels seen": show(last["seen_share"], "{:.0%}"),
        "skipped steps": str(sum(line["skipped_steps"] for line in lines)),
        "time": f"{minutes:.1f} min",
        "peak memory, main process": f"{last['peak_memory_mb']:.0f} MB",
    }
    width = max(map(len, rows))
    title = f"stage {number}: {STAGES[number].name}"
    return "\n".join([f"\n{title}", "-" * 44, *(f"{k:<{width}}  {v}" for k, v in rows.items()), "-" * 44])


def logged(path):
    """The log of a run to go on with, [] where no epoch is finished; half a line of a killed run is cut off."""
    cut_half_line(path)
    return read_log(path)[0] if path.exists() and path.stat().st_size else []


def good_checkpoint(run):
    """Which checkpoint of a run to go back to, in words: the latest whose weights are all finite."""
    good = []
    for path in run.glob("*.pt"):
        state = load_checkpoint(path)
        if all(torch.isfinite(value).all() for value in state["model"].values()):
            good.append((state["epoch"], state.get("step", 1), path.name == "last.pt", path))
    return (f"The last good weights are in {max(good)[-1]}, of epoch {max(good)[0]}" if good
            else f"No checkpoint in {run} has finite weights")


def resume_command(config):
    """The command that goes on with a run as it was going."""
    flags = [f" --{name} {getattr(config, name)}" for name in ("stage", "device", "workers")
             if getattr(config, name) != Config.__dataclass_fields__[name].default]
    return f"{ranks.launcher()} train.py --resume --out {config.out}{''.join(flags)}"


def finite(value):
    """A float of six digits for the log: None where it is missing or not finite."""
    return float(f"{float(value):.6g}") if value is not None and math.isfinite(value) else None


def mean_of(values):
    values = [v for v in values if v is not None]
    return finite(sum(values) / len(values)) if values else None


def train(config, stop):
    # ---- seed, device, output folder
    torch.manual_seed(config.seed)
    device = ranks.use(config.device)
    first, run = ranks.rank() == 0, Path(config.out)
    bounds = stage_epochs(config.compress)
    total_epochs = bounds[3][1] + 1

    # ---- data
    recipe = RECIPES[config.preset]
    if config.data == ROOMS and first:
        from scenes import rooms

        spec = rooms.read_spec(ROOMS)  # rooms made with another seed are completed with theirs
        if spec or not Path(ROOMS, "train").exists():
            rooms.generate(ROOMS, seed=spec.get("seed", 0), image_size=tuple(spec.get("image_size", (160, 120))))
    ranks.wait()
    use_images = config.model == "bifusion" and config.plan != "A"
    common = {"voxel_size": config.voxel_size, "image_size": recipe["image_size"], "seed": config.seed}
    train_set = SceneDataset(config.data, "train", augment=True, **common)
    val_set = SceneDataset(config.data, "val", **common)

    # ---- model, optimiser
    log = ranks.from_first(lambda: logged(run / "log.jsonl"))
    goes_on = config.resume or config.stage > 1
    if config.resume and config.stage < 2 and not (run / "last.pt").exists() and len(log) < 2:
        goes_on, log = False, []  # killed before its first checkpoint: from the beginning, which comes to the same
    try:  # the checkpoint of a run that goes on holds the tower's weights
        model = new_model(config, len(CLASS_NAMES), load=not goes_on).to(device)
    except KeyError as error:
        sys.exit(f"error: {error.args[0]}")  # an unknown --clip, with the choices
    pretrained = is_pretrained(model)
    if config.checkpoint_tower and use_images and not pretrained:
        sys.exit(f"--checkpoint-tower would update the batch norms of a tower from {SCRATCH} twice a step; "
                 "leave it out, or give --clip-weights")
    optimizer = torch.optim.AdamW(parameter_groups(model, config.lr, config.weight_decay), fused=True)
    weights = LOSS_WEIGHTS[config.model]
    ranks.own_random_numbers(config.seed)

    def setting_of(moment):
        return setting_at(moment, config.compress, config.plan, pretrained, config.tower_rate)

    # ---- where to start: anew, from the stage before, or from last.pt
    start, first_step, skipped_in_a_row, partial = 0, 0, 0, None
    if goes_on:
        source = run / ("last.pt" if config.resume else f"stage{config.stage - 1}.pt")
        if not source.exists():
            sys.exit(f"{source} not found. It is made by: python train.py --stage {max(1, config.stage - 1)} "
                     f"--model {config.model} --out {config.out}")
        state = load_checkpoint(source, device)
        load_weights(model, state, source)
        optimizer.load_state_dict(state["optimizer"])
        random = state["torch_rng"] if isinstance(state["torch_rng"], list) else [state["torch_rng"]]
        if len(random) != ranks.world():
            print(f"number of processes: {len(random)} when {source} was made, {ranks.world()} now; it goes on, but "
                  "not with the same random numbers")
        if ranks.rank() < len(random):
            torch.set_rng_state(random[ranks.rank()].cpu())
        if device.type == "cuda" and ranks.rank() < len(state.get("cuda_rng", ())):
            torch.cuda.set_rng_state(state["cuda_rng"][ranks.rank()].cpu(), device)
        partial, skipped_in_a_row = state.get("partial"), state.get("skipped_in_a_row", 0)
        start, first_step = (state["epoch"], state["step"]) if partial else (state["epoch"] + 1, 0)
        held = [line["epoch"] for line in log]
        if config.stage > 1 and not config.resume and (run / "last.pt").exists():
            held.append(load_checkpoint(run / "last.pt")["epoch"])  # of an epoch that is not logged yet
        if config.stage > 1 and not config.resume and max(held, default=-1) >= start:
            sys.exit(f"{run} already holds epochs up to {max(held)}, stage {config.stage} starts at {start}. "
                     f"Go on with it: python train.py --resume --out {config.out}; or copy {source} and config.json to "
                     "a new folder")
        log = [line for line in log if line["epoch"] < start]
    ranks.wait()  # all have read what is there
    if first:
        run.mkdir(parents=True, exist_ok=True)
        for unfinished in run.glob("*.tmp"):  # of a run killed while it saved
            unfinished.unlink()
        with whole_file(run / "config.json") as file:
            file.write(json.dumps(dataclasses.asdict(config) | {"epochs": total_epochs}, indent=1).encode())
    end = bounds[config.stage][1] if config.stage else total_epochs - 1
    best = max((line["val_miou"] for line in log if line["val_miou"] is not None), default=-1.0)
    count = sum(p.numel() for p in model.parameters())
    print(f"{config.model} ({config.preset}, {count / 1e6:.2f} M parameters) on {device}"
          f"{f', {ranks.world()} processes' if ranks.world() > 1 else ''}; {len(train_set)} train and "
          f"{len(val_set)} val scenes of {config.data}; epochs {start}-{end} of {total_epochs}; {run}/")
    bare = sum(not (folder / "instance.npy").is_file() for folder in train_set.folders)
    if bare and config.plan != "A":
        print(f"{bare} of {len(train_set)} train scenes have no instance.npy: they teach classes only, no instances")
    if use_images:
        print(f"image tower: {config.clip}, " + (f"weights {config.clip_weights}; frozen until stage 3" if pretrained
                                                 else "FROM SCRATCH, random weights; it trains from stage 2 on"))

    bar = trained = None
    guard = Guard(model, run / "skipped.jsonl" if first else None)
    stop.listen()
    steps = -(-len(train_set) // config.batch_size)
    train_loader = None
    for epoch in range(start, end + 1):
        # ---- stage and rates
        began = time.time()
        setting = setting_of(epoch)
        if bar is None or epoch == bounds[setting.stage][0]:
            last = min(end, bounds[setting.stage][1])
            bar = tqdm(total=(last - epoch + 1) * steps, desc=f"stage {setting.stage} {setting.name}", unit="step",
                       dynamic_ncols=True)
            bar.update(first_step)
        views = config.views if use_images and setting.fusion != "identity" else 0
        frozen = views > 0 and not {"tower", "tower_ends"} & set(setting.parts)
        if train_loader is None or (views, not frozen) != (train_set.views, train_set.vary_images):
            # after a stop in here the loop takes no step and saves
            cache = cached_maps(model, config, train_set, val_set, 2 * views, stop.until) if frozen else None
            train_set.use(views, cache, vary_images=not frozen)
            val_set.use(2 * views, cache)
            pin = device.type == "cuda"
            share = ranks.rank(), ranks.world()
            train_loader = loader(train_set, config.batch_size, config.workers, True, config.seed, pin, share)
            val_loader = loader(val_set, config.batch_size, config.workers, False, config.seed, pin, share)
        apply_setting(model, setting)
        model.train()
        if setting.parts != trained:
            weighted_loss, trained = ranks.wrap(WeightedLoss(model, weights)), setting.parts
        train_loader.batch_sampler.set_epoch(epoch, first_step)
        part = partial or {"losses": [], "terms": {}, "norms": {}, "stats": [], "skipped": 0, "seconds": 0.0}
        began -= part["seconds"]
        done, first_step, partial = first_step, 0, None  # steps done; the next epoch begins at its beginning
        if done:  # stopped before its evaluation, it is evaluated as its last step left it
            model.setting = setting_of(epoch + (done - 1) / steps)
        for step, batch in enumerate(stop.until_agreed(train_loader), done):
            # ---- batch
            batch = to_device(batch, device)
            now = epoch + step / steps
            model.setting = setting_of(now)  # the ramp moves with every step
            lr = learning_rate(config, now / total_epochs)
            set_rates(optimizer, setting, lr)

            # ---- forward and losses
            guard.remember()
            loss, terms, stats = weighted_loss(batch, setting)

            # ---- backward -> clip -> finite? -> step
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = clip_by_branch(model, setting.clip)
            scalars = [loss, *terms.values(), *norm.values()]
            own = torch.stack([scalar.detach() for scalar in scalars]).tolist()  # one transfer for them all
            numbers = ranks.mean([*own, *stats.values()])
            values, norm = dict(zip(terms, numbers[1:])), dict(zip(norm, numbers[1 + len(terms):]))
            stats = dict(zip(stats, numbers[len(own):]))
            if all_finite(numbers[:len(own)]):
                optimizer.step()
                skipped_in_a_row = 0
                part["losses"].append(numbers[0])
                for key, found in (("terms", values), ("norms", norm)):
                    for name, value in found.items():
                        part[key].setdefault(name, []).append(value)
                if stats.get("seen_share") is not None:  # None where every scene of the step was blanked
                    part["stats"].append(stats)
            else:
                guard.restore()
                part["skipped"] += 1
                skipped_in_a_row += 1
                look_on = math.isfinite(own[0]) or ranks.world() > 1  # another's NaN comes over by the batch norms
                with ranks.alone():  # each looks in its own scenes, as far as it comes
                    culprit = guard.first_not_finite(
                        batch, lambda batch, setting=setting: loss_terms(model(batch), batch, setting),
                        (lambda terms: weighted_sum(terms, weights)) if look_on else None)
                found = blame(ranks.gather({"scenes": batch["names"], "first_not_finite": culprit}))
                record = guard.record(epoch=epoch, step=step, stage=setting.stage, **found, loss=numbers[0],
                                      losses=values, grad_norm=norm)
                bar.write(f"epoch {epoch} step {step}: skipped, not finite: {found['first_not_finite']}; scenes "
                          f"{', '.join(found['scenes'])}; more in {run / 'skipped.jsonl'}")
                if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    break
            done = step + 1
            before, ratio = (log[-1] if log else {}), stats.get("fusion_2d_ratio")
            bar.set_postfix_str(f"loss {numbers[0]:.3f}, mIoU {show(before.get('val_miou'))}, "
                                f"AP {average_precisions(before)}, 2D {show(ratio, '{:.2f}')}", refresh=False)
            bar.update()

        # ---- evaluate, log, save
        diverged = skipped_in_a_row == MAX_SKIPPED_IN_A_ROW
        ranks.share_buffers(model)
        result = {"miou": None, "iou": ()} if diverged else evaluate(model, stop.until(val_loader), device)
        if stop.agreed() and not diverged:  # the epoch goes on from here, or is evaluated anew
            part["seconds"] = time.time() - began
            save_checkpoint(run / "last.pt", model, optimizer, config, epoch, done, steps, skipped_in_a_row, part)
            bar.close()
            raise Stopped(f"stopped in epoch {epoch} after step {done} of {steps}")
        miou = finite(result["miou"])
        line = {
            "epoch": epoch, "stage": setting.stage, "model": config.model, "loss": mean_of(part["losses"]),
            "losses": {name: mean_of(values) for name, values in part["terms"].items()},
            "val_miou": miou, "val_iou": [finite(v) for v in result["iou"]],
            **{f"val_{name.lower()}": finite(result.get(name)) for name in ("AP", "AP50", "AP25")},
            "fusion_ramp": finite(setting.ramp) if part["stats"] else 0.0,  # at the start of the epoch
            **{name: mean_of([s[name] for s in part["stats"]])
               for name in ("fusion_2d_ratio", "seen_share", "rms_2d", "rms_3d", "cosine")},
            "grad_norm": {name: mean_of(values) for name, values in part["norms"].items()},
            "skipped_steps": part["skipped"], "steps": steps,
            "lr": {g["name"]: finite(g["lr"]) for g in optimizer.param_groups if g["name"] in setting.parts},
            "seconds": round(time.time() - began, 2), "peak_memory_mb": round(peak_memory_mb(device)),
        }
        log.append(line)
        if first:
            append_line(run / "log.jsonl", json.dumps(line))
        if diverged:
            bar.close()
            sys.exit(f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, the last of them {record}. "
                     f"{good_checkpoint(run)}; start anew with another --out and --plan B, or a lower --lr")
        place = {"step": steps, "steps": steps, "skipped_in_a_row": skipped_in_a_row}
        if miou is not None and miou > best:
            best = miou
            save_checkpoint(run / "best.pt", model, optimizer, config, epoch, **place)
        if epoch == bounds[setting.stage][1]:
            save_checkpoint(run / f"stage{setting.stage}.pt", model, optimizer, config, epoch, **place)
        save_checkpoint(run / "last.pt", model, optimizer, config, epoch, **place)  # a kill before repeats the epoch
        if first and (epoch % 5 == 0 or epoch == bounds[setting.stage][1]):
            draw_curves(log, run / "curves.png")
        if epoch == bounds[setting.stage][1]:
            bar.close()
            print(summary(log, bounds, setting.stage), flush=True)
        if stop.agreed() and epoch < end:  # while it was saved
            bar.close()
            raise Stopped(f"stopped after epoch {epoch}")
    return log


def peak_memory_mb(device):
    """Peak of the main process on CPU, of PyTorch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@ranks.joined()
def main(argv=None):
    config, stop = parse_config(argv), StopSignals(ranks.largest, quiet=ranks.rank() > 0)
    try:
        train(config, stop)
    except (FileNotFoundError, ValueError) as error:  # bad input: the message says what to do, a traceback hides it
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")  # the last line of a worker's traceback
    except RuntimeError as error:
        lost = ranks.lost(error)
        if not lost:
            raise
        sys.exit(f"{lost}. What was saved before in {config.out} is whole; go on with: {resume_command(config)}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"error: {error}. What was saved before in {config.out} is whole. Make room there, then go on with: "
                 f"{resume_command(config)}")
    except Stopped as where:
        print(f"{where}; all of it is in {config.out}/last.pt. Go on with: {resume_command(config)}", file=sys.stderr)
        ranks.wait()  # or torchrun would end this one with the first that has ended
        sys.exit(128 + stop.asked)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what was finished up to the last epoch is in {config.out}. Go on with: "
                 f"{resume_command(config)}")
    finally:
        stop.release()
    print(f"next: {ranks.launcher()} train.py --stage {config.stage + 1} --out {config.out}" if config.stage in (1, 2)
          else f"next: python predict.py {config.out}/best.pt {config.data}/val/<scene>")


if __name__ == "__main__":
    main()
