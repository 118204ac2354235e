"""Train BiFusion or its 3D baseline through the curriculum.

    python train.py --stage 1                         # stage 1 on generated rooms (made on first use)
    python train.py                                   # the whole curriculum: stages 1, 2, 3
    python train.py --model baseline                  # the 3D baseline, same epochs, data and rates
    python train.py --preset base --data data/scannet # full size, CLIP ViT-B/16, on your own scans
    python train.py --resume --out runs/bifusion      # go on where a run stopped

A run is a folder: config.json, log.jsonl (one line an epoch), curves.png, stage{1,2,3}.pt, last.pt, best.pt.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from cache import FeatureCache
from data import CLASS_NAMES, THINGS, SceneDataset, evenly_spread, loader, usable_frames
from losses import (LOSS_WEIGHTS, alignment_loss, branch_loss, gate_prior, instance_loss, semantic_loss,
                    weighted_sum)
from metrics import InstanceAP, semantic_iou
from model import PRESETS, build_model, select_instances, superpoint_graph, superpoint_sizes
from report import draw_curves, read_log
from stages import (PLAN_B, PLANS, STAGES, apply_setting, clip_by_branch, parameter_groups, set_rates,
                    setting_at, stage_epochs)
from tower import SCRATCH

ROOMS = "data/rooms"  # generated on first use
WARM_UP = 0.02  # share of the curriculum over which the learning rate rises
MAX_SKIPPED_IN_A_ROW = 10

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
    batch_size: int = option(None, "scenes a step")
    lr: float = option(None, "base learning rate")
    weight_decay: float = option(None, "of AdamW")
    clip: str = option(None, "image tower: a model name of open_clip, as ViT-B-16, RN50, convnext_base; or clip_small")
    clip_weights: str = option(None, f"of the tower: a local file, a pretrained tag of open_clip, or {SCRATCH!r}")
    tower_rate: float = option(None, "learning rate of a pretrained tower in stage 3 over the base rate, at most 0.1")
    precision: str = option("fp32", "of image tower and decoder; the rest stays fp32", ("fp32", "bf16"))
    checkpoint_tower: bool = option(False, "recompute the tower's activations in the backward pass: less memory")
    cache: str = option("data/clip_cache", "folder for the maps of a frozen tower")
    cache_gb: float = option(50.0, "largest size of that folder, GB; 0 = no cache")


# may differ when a run goes on
HOW_NOT_WHAT = ("stage", "resume", "device", "workers", "out", "checkpoint_tower", "cache", "cache_gb")


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
        known = json.loads(saved.read_text())
        for name, value in known.items():
            if name in HOW_NOT_WHAT or name not in Config.__dataclass_fields__:
                continue
            if name in given and given[name] != value:
                sys.exit(f"--{name.replace('_', '-')} {given[name]} differs from {value} of the run in {config.out}; "
                         "leave the flag out, or start a new run with another --out")
            setattr(config, name, value)
    elif Path(config.out, "log.jsonl").exists():
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
        torch.device(config.device)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    for name in ("voxel_size", "views", "batch_size", "lr"):
        if not 0 < getattr(config, name) < math.inf:
            sys.exit(f"--{name.replace('_', '-')} must be above 0 and finite, got {getattr(config, name)}")
    if not 0 < config.tower_rate <= 0.1:
        sys.exit(f"--tower-rate must be above 0 and at most 0.1, or the pretraining is lost; got {config.tower_rate}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"--device {config.device}: no CUDA device here; leave the flag out or give --device cpu")
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
    if "branch" in setting.losses and "logits_2d" in out:
        terms["branch"] = branch_loss(out["logits_2d"], out["logits_3d"], batch["segment"], out["seen"], index, scenes)
    if "alignment" in setting.losses and "feat_2d" in out:
        terms["alignment"] = alignment_loss(out["feat_3d"], out["feat_2d"], out["seen"], index, scenes)
    if "gate" in setting.losses and "alpha" in out:
        terms["gate"] = gate_prior(out["alpha"], out["seen"], index, scenes)
    return terms


def cached_maps(model, config, train_set, val_set):
    """The cache of the frozen tower's maps, filled with every view that training and evaluation may take, or None."""
    if not config.cache_gb:
        return None
    model.eval()
    cache = FeatureCache(config.cache, model.tower, train_set.image_size, config.cache_gb)
    views = [(folder, frame) for folder in train_set.folders for frame in usable_frames(folder)[0]]
    views += [(folder, frame) for folder in val_set.folders
              for frame in evenly_spread(usable_frames(folder)[0], val_set.views)]
    return cache if cache.fill(views, next(model.parameters()).device, config.workers) else None


@torch.no_grad()
def evaluate(model, scenes, device):
    """Val metrics over points (not voxels): metrics.semantic_iou's and, once the decoder is on, metrics.InstanceAP's.

    Scenes without labels do not count for mIoU, those without instance annotation not for AP.
    """
    model.eval()
    average_precision, judged = InstanceAP(THINGS), False

    def pairs():
        nonlocal judged
        for batch in scenes:
            batch = to_device(batch, device)
            out = model(batch)
            for i, prediction in enumerate(out.get("instances", ())):
                if batch["has_instances"][i]:
                    average_precision.add(*instances_of_scene(prediction[-1], batch, i))
                    judged = True
            predicted = out["logits"].argmax(1)[batch["point_to_voxel"]]  # (N,)
            yield batch["point_segment"].cpu(), predicted.cpu()

    result = semantic_iou(pairs(), range(len(CLASS_NAMES)))
    return result | (average_precision.result() if judged else {})


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


def save_checkpoint(path, model, optimizer, config, epoch):
    """Everything needed to go on after this epoch; written beside path, then renamed, so path is always whole."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
             "config": dataclasses.asdict(config), "num_classes": model.semantic_head.out_features,
             "torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    model = new_model(config, state["num_classes"], SCRATCH).to(device)  # the checkpoint holds the tower's weights too
    load_weights(model, state, path)
    apply_setting(model, setting_at(state["epoch"] + 0.999, config.compress, config.plan, is_pretrained(model)))
    return model.eval(), config, state


def new_model(config, num_classes, clip_weights):
    """The model of a Config, its image tower filled from clip_weights (tower.build_visual)."""
    model = build_model(config.model, config.preset, num_classes, depth_tolerance(config), config.clip, clip_weights)
    model.precision = config.precision
    if hasattr(model, "tower"):
        model.tower.precision, model.tower.checkpointing = config.precision, config.checkpoint_tower
        model.tower.pretrained = config.clip_weights != SCRATCH
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


def append_line(path, line):
    """Add an epoch to the log, on a line of its own even where a killed run left half a line."""
    half = path.exists() and not path.read_bytes().endswith(b"\n")
    if half:
        path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n")
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def finite(value):
    """A float of six digits for the log: None where it is missing or not finite."""
    return float(f"{float(value):.6g}") if value is not None and math.isfinite(value) else None


def mean_of(values):
    values = [v for v in values if v is not None]
    return finite(sum(values) / len(values)) if values else None


def train(config):
    # ---- seed, device, output folder
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    run = Path(config.out)
    bounds = stage_epochs(config.compress)
    total_epochs = bounds[3][1] + 1

    # ---- data
    recipe = RECIPES[config.preset]
    if config.data == ROOMS:
        import rooms

        known = Path(ROOMS, "rooms.json")  # rooms made with another seed are completed with theirs
        spec = json.loads(known.read_text()) if known.exists() else {}
        if spec or not Path(ROOMS, "train").exists():
            rooms.generate(ROOMS, seed=spec.get("seed", 0), image_size=tuple(spec.get("image_size", (160, 120))))
    use_images = config.model == "bifusion" and config.plan != "A"
    common = {"voxel_size": config.voxel_size, "image_size": recipe["image_size"], "seed": config.seed}
    train_set = SceneDataset(config.data, "train", augment=True, **common)
    val_set = SceneDataset(config.data, "val", **common)

    # ---- model, optimiser
    goes_on = config.resume or config.stage > 1  # then the checkpoint holds the tower's weights
    try:
        model = new_model(config, len(CLASS_NAMES), SCRATCH if goes_on else config.clip_weights).to(device)
    except KeyError as error:
        sys.exit(f"error: {error.args[0]}")  # an unknown --clip, with the choices
    pretrained = is_pretrained(model)
    if config.checkpoint_tower and use_images and not pretrained:
        sys.exit(f"--checkpoint-tower would update the batch norms of a tower from {SCRATCH} twice a step; "
                 "leave it out, or give --clip-weights")
    setting_of = partial(setting_at, compress=config.compress, plan=config.plan, pretrained=pretrained,
                         tower_rate=config.tower_rate)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.lr, config.weight_decay))
    weights = LOSS_WEIGHTS[config.model]

    # ---- where to start: anew, from the stage before, or from last.pt
    start, log = 0, []
    if goes_on:
        source = run / ("last.pt" if config.resume else f"stage{config.stage - 1}.pt")
        if not source.exists():
            sys.exit(f"{source} not found. It is made by: python train.py --stage {max(1, config.stage - 1)} "
                     f"--model {config.model} --out {config.out}")
        state = load_checkpoint(source, device)
        load_weights(model, state, source)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        start = state["epoch"] + 1
        log, _ = read_log(run / "log.jsonl")
        if config.stage > 1 and not config.resume and log[-1]["epoch"] >= start:
            sys.exit(f"{run} already holds epochs up to {log[-1]['epoch']}, stage {config.stage} starts at {start}. "
                     f"Go on with it: python train.py --resume --out {config.out}; or copy {source} and config.json to "
                     "a new folder")
        log = [line for line in log if line["epoch"] < start]
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config) | {"epochs": total_epochs}, indent=1))
    end = bounds[config.stage][1] if config.stage else total_epochs - 1
    best = max((line["val_miou"] for line in log if line["val_miou"] is not None), default=-1.0)
    count = sum(p.numel() for p in model.parameters())
    print(f"{config.model} ({config.preset}, {count / 1e6:.2f} M parameters) on {device}; {len(train_set)} train and "
          f"{len(val_set)} val scenes of {config.data}; epochs {start}-{end} of {total_epochs}; {run}/")
    bare = sum(not (folder / "instance.npy").is_file() for folder in train_set.folders)
    if bare and config.plan != "A":
        print(f"{bare} of {len(train_set)} train scenes have no instance.npy: they teach classes only, no instances")
    if use_images:
        print(f"image tower: {config.clip}, " + (f"weights {config.clip_weights}; frozen until stage 3" if pretrained
                                                 else "FROM SCRATCH, random weights; it trains from stage 2 on"))

    skipped_in_a_row, bar = 0, None
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
        views = config.views if use_images and setting.fusion != "identity" else 0
        frozen = views > 0 and not {"tower", "tower_ends"} & set(setting.parts)
        if train_loader is None or (views, not frozen) != (train_set.views, train_set.vary_images):
            train_set.views, val_set.views, train_set.vary_images = views, 2 * views, not frozen
            train_set.cache = val_set.cache = cached_maps(model, config, train_set, val_set) if frozen else None
            train_loader = loader(train_set, config.batch_size, config.workers, shuffle=True, seed=config.seed)
            val_loader = loader(val_set, config.batch_size, config.workers, shuffle=False, seed=config.seed)
        apply_setting(model, setting)
        model.train()
        train_loader.batch_sampler.set_epoch(epoch)
        sums, norms, stats, losses, skipped = {}, {}, [], [], 0
        for step, batch in enumerate(train_loader):
            # ---- batch
            batch = to_device(batch, device)
            now = epoch + step / steps
            model.setting = setting_of(now)  # the ramp moves with every step
            lr = learning_rate(config, now / total_epochs)
            set_rates(optimizer, setting, lr)

            # ---- forward and losses
            statistics = [buffer.clone() for buffer in model.buffers()]  # of the batch norms
            out = model(batch)
            terms = loss_terms(out, batch, setting)
            loss = weighted_sum(terms, weights)

            # ---- finite? -> backward -> clip -> step
            optimizer.zero_grad(set_to_none=True)
            norm = {}
            if torch.isfinite(loss):
                loss.backward()
                norm = clip_by_branch(model, setting.clip)
            if norm and all(torch.isfinite(n) for n in norm.values()):
                optimizer.step()
                skipped_in_a_row = 0
                losses.append(loss.item())
                for name, value in norm.items():
                    norms.setdefault(name, []).append(value.item())
                for name, term in terms.items():
                    sums.setdefault(name, []).append(term.item())
                if "stats" in out:
                    stats.append(out["stats"])
            else:
                for buffer, value in zip(model.buffers(), statistics):
                    buffer.copy_(value)  # or one NaN in a running mean would spoil every evaluation from here on
                skipped += 1
                skipped_in_a_row += 1
                bar.write(f"epoch {epoch} step {step}: skipped, not finite; scenes {', '.join(batch['names'])}; "
                          f"terms { {k: v.item() for k, v in terms.items()} }; gradient norms "
                          f"{ {k: v.item() for k, v in norm.items()} }")
                if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    break
            before, ratio = (log[-1] if log else {}), (stats[-1]["fusion_2d_ratio"] if stats else None)
            bar.set_postfix_str(f"loss {loss.item():.3f}, mIoU {show(before.get('val_miou'))}, "
                                f"AP {average_precisions(before)}, 2D {show(ratio, '{:.2f}')}", refresh=False)
            bar.update()

        # ---- evaluate, log, save
        diverged = skipped_in_a_row == MAX_SKIPPED_IN_A_ROW
        result = {"miou": None, "iou": ()} if diverged else evaluate(model, val_loader, device)
        miou = finite(result["miou"])
        line = {
            "epoch": epoch, "stage": setting.stage, "model": config.model, "loss": mean_of(losses),
            "losses": {name: mean_of(values) for name, values in sums.items()},
            "val_miou": miou, "val_iou": [finite(v) for v in result["iou"]],
            **{f"val_{name.lower()}": finite(result.get(name)) for name in ("AP", "AP50", "AP25")},
            "fusion_ramp": finite(setting.ramp) if stats else 0.0,  # at the start of the epoch
            **{name: mean_of([s[name] for s in stats])
               for name in ("fusion_2d_ratio", "seen_share", "rms_2d", "rms_3d", "cosine")},
            "grad_norm": {name: mean_of(values) for name, values in norms.items()},
            "skipped_steps": skipped, "steps": steps,
            "lr": {g["name"]: finite(g["lr"]) for g in optimizer.param_groups if g["name"] in setting.parts},
            "seconds": round(time.time() - began, 2), "peak_memory_mb": round(peak_memory_mb(device)),
        }
        log.append(line)
        append_line(run / "log.jsonl", line)
        if diverged:
            bar.close()
            sys.exit(f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite. The last good weights are in "
                     f"{run / 'last.pt'}; start anew with another --out and --plan B, or a lower --lr")
        if miou is not None and miou > best:
            best = miou
            save_checkpoint(run / "best.pt", model, optimizer, config, epoch)
        if epoch == bounds[setting.stage][1]:
            save_checkpoint(run / f"stage{setting.stage}.pt", model, optimizer, config, epoch)
        save_checkpoint(run / "last.pt", model, optimizer, config, epoch)  # last: a kill before repeats the epoch
        if epoch % 5 == 0 or epoch == bounds[setting.stage][1]:
            draw_curves(log, run / "curves.png")
        if epoch == bounds[setting.stage][1]:
            bar.close()
            print(summary(log, bounds, setting.stage), flush=True)
    return log


def peak_memory_mb(device):
    """Peak of the main process on CPU, of PyTorch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(argv=None):
    config = parse_config(argv)
    try:
        train(config)
    except (FileNotFoundError, ValueError) as error:  # bad input: the message says what to do, a traceback hides it
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")  # the last line of a worker's traceback
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what was finished up to the last epoch is in {config.out}. Go on with: "
                 f"python train.py --resume --out {config.out}")
    print(f"next: python train.py --stage {config.stage + 1} --out {config.out}" if config.stage in (1, 2)
          else f"next: python predict.py {config.out}/best.pt {config.data}/val/<scene>")


if __name__ == "__main__":
    main()
