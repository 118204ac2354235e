"""Train BiFusion or its 3D baseline through the curriculum.

    python train.py --stage 1                         # stage 1 on generated rooms (made on first use)
    python train.py                                   # the whole curriculum: stages 1, 2, 3
    python train.py --model baseline                  # the 3D baseline, same epochs, data and rates
    python train.py --preset base --data data/scannet # full size, CLIP ViT-B/16, on your own scans
    python train.py --resume --out runs/bifusion      # go on where a run stopped
    torchrun --nproc_per_node=2 train.py              # two processes that share every batch, a GPU each where there are

A run is a folder: config.json, log.jsonl (one line an epoch), stage{1,2,3}.pt, last.pt, best.pt, and skipped.jsonl (one
line a skipped step) where a step was not finite. Ctrl-C or SIGTERM saves the step reached and ends.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin while they wait take the core from whoever works on it
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when torch is imported

import torch
from tqdm import tqdm

import runs
from data import Scenes
from guard import Diverged, Guard
from losses import LOSS_WEIGHTS, alignment_loss, gate_prior, instance_loss, semantic_loss, weighted_sum
from metrics import InstanceAP, iou_of, semantic_iou
from model import PRESETS, build_model, instances_of_scene
from scenes import boxes as rooms  # the default data; scenes.rooms: furnished rooms
from scenes.folder import SCANNET20, Classes, message
from scenes.frames import warn
from stages import (INSTANCE, PLAN_B, PLANS, Row, apply_row, clip_by_branch, curriculum, parameter_groups, row_at,
                    set_rates, stage_epochs, update_rms)
from tower import SCRATCH, RGBDConv

ROOMS = rooms.ROOT  # generated on first use
WARM_UP = 0.1  # share of the curriculum's steps over which the rate of a part rises once it trains
BETAS = (0.9, 0.95)  # of AdamW; with 0.999 its mean of g^2 may lag behind (arXiv 2304.13013)

# What a preset trains with unless a flag says otherwise.
RECIPES = {
    "small": {"voxel_size": 0.08, "image_size": (160, 120), "views": 5, "batch_size": 2, "lr": 3e-3,
              "weight_decay": 0.05, "tower_rate": 0.1},
    "base": {"voxel_size": 0.02, "image_size": (320, 240), "views": 10, "batch_size": 4, "lr": 1e-3,
             "weight_decay": 0.05, "tower_rate": 0.01},
}


def option(default, text, choices=None):
    """A field of Config, from which its flag is made."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    """Everything a run can be told; each field is a flag of the same name. None: the preset's."""

    model: str = option("bifusion", "which model", ("bifusion", "baseline"))
    preset: str = option("small", "size of the networks and their recipe", tuple(PRESETS))
    stage: int = option(0, "one stage of the curriculum alone; 0 = all in turn", (0, 1, 2, 3))
    plan: str = option("full", "; ".join(f"{k}: {v}" for k, v in PLANS.items()), tuple(PLANS))
    compress: float = option(1.0, "divide the length of every stage by this")
    data: str = option(ROOMS, "folder with train/ and val/ scene folders")
    out: str = option("", "run folder; default runs/MODEL")
    seed: int = option(0, "of the weights, the order of the scenes and the augmentation")
    resume: bool = option(False, "go on from last.pt of the run folder, with that run's own settings")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    workers: int = option(2, "processes that load scenes, for train and val each; 0 = none")
    voxel_size: float = option(None, "metres")
    views: int = option(None, "frames of a scene in a training step; evaluation takes twice as many")
    batch_size: int = option(None, "scenes a step, of all processes together")
    lr: float = option(None, "base learning rate")
    weight_decay: float = option(None, "of AdamW; by default as much a step at any --lr as at the preset's, at most 10")
    tower: str = option(None, "image tower: a model of open_clip, as ViT-B-16, or timm:NAME of timm")
    tower_weights: str = option(None, f"a local file, a pretrained tag of the tower's library, or {SCRATCH!r}")
    tower_rate: float = option(None, "learning rate of a pretrained tower over the base rate")
    precision: str = option("fp32", "of image tower and decoder; the rest stays fp32", ("fp32", "bf16"))
    cache: str = option("data/clip_cache", "folder for the maps of a frozen tower, normals and superpoints")
    cache_gb: float = option(50.0, "largest size of that folder, GB; 0 = no cache")
    # without a flag:
    classes: dict = field(default=None)  # those of classes.json in the data folder; None = ScanNet's 20
    side: float = field(default=None)  # metres, the longest horizontal side of a train scene (of 8 of them)


RANGES = {"compress": (1, 1e6), "voxel_size": (1e-3, 10), "views": (1, 1e4), "batch_size": (1, 1e4), "lr": (0, 10),
          "weight_decay": (0, 10), "tower_rate": (0, 1), "workers": (0, 1e3), "cache_gb": (0, 1e6)}
OF_THE_CALL = {"stage", "resume", "device", "workers", "out"}  # never taken from the run that goes on
MAY_CHANGE = {"data", "cache", "cache_gb", "batch_size", "views"}  # taken from it unless given: moved, or lacks memory


def parse_config(argv=None):
    """Flags -> Config. A run that goes on (--resume, --stage 2, --stage 3) takes its settings from its config.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    fields = Config.__dataclass_fields__
    for name, f in ((name, f) for name, f in fields.items() if f.metadata):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        shown = "the preset's" if f.default is None else f.default
        parser.add_argument(f"--{name.replace('_', '-')}", *["--clip-weights"] * (name == "tower_weights"), dest=name,
                            default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default {shown})", **kind)
    given = vars(parser.parse_args(argv))
    config = Config(**given)
    config.out = config.out or f"runs/{config.model}"
    saved = Path(config.out, "config.json")
    if config.resume or config.stage > 1:
        if not saved.exists():
            sys.exit(f"{saved} not found: there is no run to go on from. Start it with: "
                     f"python train.py --stage 1 --model {config.model} --out {config.out}")
        try:
            known = dict(json.loads(saved.read_text()))
        except (TypeError, ValueError) as error:
            sys.exit(f"{saved} is not valid JSON: {error}; start a new run with another --out")
        for name in fields.keys() & known.keys() - OF_THE_CALL:
            if name not in given:
                setattr(config, name, known[name])
            elif given[name] != known[name] and name in MAY_CHANGE:
                print(f"--{name.replace('_', '-')} is {given[name]} from here on, {known[name]} before")
            elif given[name] != known[name]:
                sys.exit(f"--{name.replace('_', '-')} {given[name]} differs from {known[name]} of the run in "
                         f"{config.out}; leave the flag out, or start a new run with another --out")
    elif any(Path(config.out, name).exists() for name in ("log.jsonl", "last.pt")):
        sys.exit(f"{config.out} already holds a run. Go on with it: python train.py --resume --out {config.out}; "
                 "or choose another --out, or delete the folder")
    own = PRESETS[config.preset] | RECIPES[config.preset] | (PLAN_B if config.plan == "B" else {})
    if config.plan == "A" or config.model == "baseline":  # no use for a tower
        own["tower_weights"] = SCRATCH
    elif config.tower not in (None, own["tower"]) and not config.tower_weights:
        sys.exit(f"--tower {config.tower} needs --tower-weights: a local file, a pretrained tag of its library, or "
                 f"{SCRATCH} for random weights")
    decay = own["weight_decay"] * own["lr"] / (config.lr or own["lr"])  # independent of the rate (arXiv 2309.14322)
    own["weight_decay"] = min(decay, RANGES["weight_decay"][1])
    for name, value in own.items():
        if name in fields and getattr(config, name) is None:
            setattr(config, name, value)
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:
            sys.exit(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, got {getattr(config, name)}")
    try:
        torch.zeros(1, device=runs.use(config.device))
    except (ValueError, RuntimeError, AssertionError) as error:  # what torch raises depends on the kind of device
        sys.exit(f"--device {config.device} cannot be used here ({str(error).splitlines()[0]}); leave the flag out, or "
                 "give --device cpu")
    if config.batch_size % runs.world():
        sys.exit(f"--batch-size {config.batch_size}, the scenes of a step, cannot be shared evenly by {runs.world()} "
                 "processes; give a multiple of their number, or torchrun another --nproc_per_node")
    return config


def new_model(config, load=True):
    """The model of a Config; load False leaves random numbers in its image tower, for a checkpoint to fill."""
    tolerance = max(0.05, config.voxel_size / 2)  # a voxel's mean lies up to half a voxel off a bent surface
    count = len(classes_of(config).names)
    model = build_model(config.model, config.preset, count, tolerance, config.tower, config.tower_weights, load)
    model.precision = config.precision
    if hasattr(model, "tower"):
        model.tower.precision = config.precision
    return model


def classes_of(config):
    """The label set of a Config: scenes.folder.Classes."""
    return Classes(**config.classes) if config.classes else SCANNET20


def load_model(path, device="cpu", build=new_model):
    """Rebuild the model of a checkpoint, ready for prediction. Returns model, Config, checkpoint."""
    state = runs.read_checkpoint(path, device)
    config = Config(**state["config"])
    try:
        model = build(config, load=False).to(device)  # the checkpoint holds the tower's weights
    except ValueError as error:  # a tower that this version does not know
        raise ValueError(f"{path} is of another version: {error}") from None
    load_weights(model, state, path)
    apply_row(model, Row(**state["row"]))
    model.ramp = state["ramp"]
    return model.eval(), config, state


def load_weights(model, state, path):
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # it lists the keys
        raise ValueError(f"{path} belongs to another model: {' '.join(str(error).split())[:400]}") from None


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def learning_rate(lr, moment, last_stage):
    """The base rate lr until the last stage (first, last epoch) begins, then half a cosine to 0 at its end: every
    part, whenever it joins, has its time at that rate (warm-up, stable, decay: Hu et al., arXiv 2404.06395)."""
    first, last = last_stage
    return lr * 0.5 * (1 + math.cos(math.pi * max(0.0, (moment - first) / (last + 1 - first))))


def forward(model, batch, row):
    """-> the loss terms of a row that apply to a batch, unweighted (dict of scalars); statistics of the fusion."""
    out, index, scenes = model(batch), batch["batch_index"], len(batch["names"])
    terms = {"semantic": semantic_loss(out["logits"], batch["segment"], index, scenes)}
    if {*INSTANCE} & {*row.losses} and "instances" in out:
        terms |= instance_loss(out["instances"], batch["superpoint_instance"], batch["superpoint_batch"],
                               batch["instance_label"], batch["instance_batch"], batch["has_instances"])
    if "alignment" in row.losses and "feat_2d" in out:
        terms["alignment"] = alignment_loss(out["feat_3d"], out["feat_2d"], out["seen"], index, scenes)
    if "gate" in row.losses and "alpha" in out:
        terms["gate"] = gate_prior(out["alpha"], out["seen"], index, scenes)
    return {name: term for name, term in terms.items() if name in row.losses}, out.get("stats", {})


def watched(found, row, branches, guard, optimizer, stem):
    """What a step that was taken shows of its stability: numbers for the log that steer nothing."""
    return {f"clipped/{branch}": float(found[f"grad_norm/{branch}"] > row.clip) for branch in branches} \
        | {"spikes": float(guard.is_spike(found["losses/semantic"])), "update_rms": update_rms(optimizer, stem)}


def explain(guard, model, batch, row, weights, loss):
    """What failed in a step, found by taking it again: fields of its record. loss: this process's own, a float."""
    look_on = math.isfinite(loss) or runs.world() > 1  # another's NaN comes over by the batch norms
    with runs.alone():  # each looks in its own scenes, as far as it comes
        culprit = guard.first_not_finite(batch, lambda batch: forward(model, batch, row)[0],
                                         (lambda terms: weighted_sum(terms, weights)) if look_on else None)
    found = runs.gather({"scenes": batch["names"], "first_not_finite": culprit})
    found.sort(key=lambda one: one["first_not_finite"].startswith("not found"))
    return {"scenes": [name for one in found for name in one["scenes"]], "found": found,
            "first_not_finite": found[0]["first_not_finite"]}


@torch.no_grad()
def evaluate(model, scenes, device, things=tuple(SCANNET20.things)):
    """Val metrics over points, not voxels: metrics.semantic_iou's and, once the decoder is on, metrics.InstanceAP's
    over the classes that are things; and loss: losses.semantic_loss, over voxels, the mean over scenes.

    Of several processes each brings its own scenes, and all get the metrics over all of them.
    """
    model.eval()
    average_precision, losses = InstanceAP([k + 1 for k in things]), []  # of the scenes

    def pairs():
        for batch in scenes:
            batch, count = to_device(batch, device), len(batch["names"])
            out = model(batch)
            losses.extend([semantic_loss(out["logits"], batch["segment"], batch["batch_index"], count).item()] * count)
            for i, prediction in enumerate(out.get("instances", ())):
                if batch["has_instances"][i]:
                    true, masks, labels, scores = instances_of_scene(prediction[-1], batch, i)
                    average_precision.add(true, masks, labels + 1, scores)  # 0 is void
            yield batch["point_segment"].cpu(), out["logits"].argmax(1)[batch["point_to_voxel"]].cpu()  # (N,) each

    confusion = semantic_iou(pairs(), range(model.semantic_head.out_features))["confusion"]
    confusions, (average_precision, *others), losses = zip(*runs.gather((confusion, average_precision, losses)))
    for other in others:
        average_precision.merge(other)
    return iou_of(sum(confusions)) | {"loss": sum(map(sum, losses)) / max(1, sum(map(len, losses)))} | (
        average_precision.result() if average_precision.num_scenes else {})


def open_scenes(config, goes_on, device):
    """The Scenes of a Config, which learns their classes and size. ValueError: a run that goes on had other classes."""
    if config.data == ROOMS:
        runs.from_first(lambda: rooms.complete(ROOMS))
    scenes = Scenes(config.data, config.voxel_size, RECIPES[config.preset]["image_size"], config.batch_size,
                    config.workers, config.seed, device, config.cache, config.cache_gb)
    classes, own = classes_of(config), scenes.val.classes
    if goes_on and own != classes:
        raise ValueError(f"{config.data}: expected the run's {len(classes.names)} classes, "
                         f"{', '.join(classes.names[:3])} ..., found {len(own.names)}, {', '.join(own.names[:3])} ...; "
                         "mend its classes.json, or start a new run with another --out")
    config.classes = None if own == SCANNET20 else asdict(own)
    config.side = config.side or scenes.train.longest_side()
    return scenes


def go_on(config, run, model, optimizer, guard, scenes, first, device):
    """Fill model, optimiser and guard from last.pt, or from the end of the stage before the one that begins at epoch
    `first`. Returns the next (epoch, step) and the running sums of that epoch. Other scenes than its are refused."""
    name = "last.pt" if config.resume else f"stage{config.stage - 1}.pt"
    if not (run.folder / name).exists():
        sys.exit(f"{run.folder / name} not found. It is made by: python train.py --stage {max(1, config.stage - 1)} "
                 f"--model {config.model} --out {config.out}")
    held = run.reached()
    if not config.resume and held >= first:
        sys.exit(f"{run.folder} already holds epoch {held}, stage {config.stage} starts at {first}. Go on with it: "
                 f"python train.py --resume --out {config.out}; or copy {name} and config.json to a new folder")
    state, now = runs.read_checkpoint(run.folder / name, device), scenes.sizes
    before = state.get("scenes", now)  # a checkpoint of before has none
    if before != now:
        other = sorted({key for key, _ in before.items() ^ now.items()})
        sys.exit(f"{config.data} holds {len(now)} scenes, the run had {len(before)}; {len(other)} are gone, new or of "
                 f"another size, as {', '.join(other[:3])}; epochs on other scenes cannot be compared. Give the folder "
                 "of the run's own scenes by --data, or start a new run with another --out")
    load_weights(model, state, run.folder / name)
    optimizer.load_state_dict(state["optimizer"])
    runs.set_random_state(state, device)
    guard.skipped_in_a_row, guard.recent = state["skipped_in_a_row"], state.get("recent", [])
    (epoch, step), logged = state["next"], {line["epoch"] for line in run.log}
    evaluated = step == state["steps"] and (epoch in logged or not config.resume)
    step = step * scenes.steps // state["steps"]  # another --batch-size has others
    return (epoch + 1, 0, runs.Sums()) if evaluated else (epoch, step, runs.Sums(state["sums"]))


def train(config, rows=None, build=new_model, evaluated=None, stop=None):
    """Train as a Config says and write its run folder; returns the log, list of dicts.

    Args:
        rows:  the curriculum, tuple of stages.Row; None: stages.curriculum as the config asks for it.
        build: function (config, load) -> model, as `new_model`.
        evaluated: container of the epochs that are evaluated; None: all.
        stop:  runs.Stop, which may end the training after any step.

    Raises runs.Stopped; guard.Diverged; FileNotFoundError, ValueError for bad input; OSError for a full disk.
    """
    # ---- seed, device, data
    torch.manual_seed(config.seed)
    device, run, stop = runs.use(config.device), runs.Run(config.out), stop or runs.Stop()
    goes_on = config.stage > 1 or (config.resume and run.reached() >= 0)
    scenes = open_scenes(config, goes_on, device)

    # ---- model, optimiser
    model = build(config, load=not goes_on).to(device)  # the checkpoint of a run that goes on holds the tower's weights
    tower, weights = getattr(model, "tower", None), LOSS_WEIGHTS[config.model]
    rows = rows or curriculum(config.compress, config.plan, tower is not None and tower.pretrained, config.tower_rate)
    runs.share_batch_norms(model.unet)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.lr, config.weight_decay), betas=BETAS, fused=True)
    stem = next((module.rgb.weight for module in model.modules() if isinstance(module, RGBDConv)), None)
    guard = Guard(model, run.folder / "skipped.jsonl" if runs.rank() == 0 else None)
    if runs.rank():  # rank 0 draws what a single process would draw
        torch.manual_seed(config.seed + (runs.rank() << 40))

    # ---- where to begin: one position, the next (epoch, step)
    stages, epochs, steps = stage_epochs(rows), rows[-1].last_epoch + 1, scenes.steps
    first, end = stages.get(config.stage, (0, epochs - 1))
    epoch, step, sums = go_on(config, run, model, optimizer, guard, scenes, first, device) if goes_on else \
        (0, 0, runs.Sums())
    if runs.rank() == 0:
        warn(scenes.train.folders[:3], scenes.train.classes, scenes.train.image_size,
             images=config.model == "bifusion" and config.plan != "A")
    run.start(asdict(config) | {"epochs": epochs, "commit": runs.commit()})
    size, words = sum(p.numel() for p in model.parameters()), f", tower {config.tower}, weights {config.tower_weights}"
    print(f"{config.model} ({config.preset}, {size / 1e6:.2f} M parameters{words if tower else ''}) on "
          f"{config.device}, {runs.world()} process(es); {scenes}; epochs {epoch}-{end} of {epochs}; {run.folder}/")
    bar = tqdm(total=max(0, end + 1 - epoch) * steps, initial=step, unit="step", disable=runs.rank() > 0)
    stop.listen()
    while epoch <= end:
        # ---- row of the curriculum, what it reads
        row, began = row_at(rows, epoch), time.time() - sums.pop("seconds", [0])[0]
        apply_row(model, row)
        scenes.read(config.views if tower and row.fusion != "identity" else 0, row.blank if tower else 0.0,
                    None if "tower" in row.trains else tower, stop.until)
        model.train()
        model.ramp = row.ramp(epoch + max(0, step - 1) / steps)  # of the last step, where all are done
        bar.set_description(f"stage {row.stage}, mIoU {runs.show(run.log[-1]['val_miou'] if run.log else None)}", False)
        for batch in stop.until(scenes.batches(epoch, step), agree=True):
            batch, moment = to_device(batch, device), epoch + step / steps
            model.ramp = row.ramp(moment)
            set_rates(optimizer, row, learning_rate(config.lr, moment, max(stages.values())), WARM_UP * epochs * steps)
            # ---- forward and losses
            guard.remember()
            terms, stats = forward(model, batch, row)
            loss = weighted_sum(terms, weights)
            # ---- backward -> clip -> finite? -> step
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            runs.average_gradients(model)
            norms = clip_by_branch(model, row.clip)
            numbers = {"loss": loss} | {f"losses/{k}": v for k, v in terms.items()} \
                | {f"grad_norm/{k}": v for k, v in norms.items()}
            own = torch.stack([value.detach() for value in numbers.values()]).tolist()  # one transfer for them all
            found = dict(zip([*numbers, *stats], runs.mean([*own, *stats.values()])))
            if guard.accepts([found[name] for name in numbers]):
                optimizer.step()
                sums.add(found | watched(found, row, norms, guard, optimizer, stem))
            else:
                guard.restore()
                why = explain(guard, model, batch, row, weights, own[0])
                guard.record(epoch=epoch, step=step, stage=row.stage, **why, **found)
                sums.add({"skipped": 1})
                bar.write(f"epoch {epoch} step {step}: skipped, not finite: {why['first_not_finite']}; scenes "
                          f"{', '.join(why['scenes'])}; more in {run.folder / 'skipped.jsonl'}")
                if guard.gives_up():
                    run.append(runs.log_line(row, epoch, steps, sums, optimizer, {}, device, time.time() - began))
                    raise Diverged(guard.skipped_in_a_row, why["first_not_finite"])
            step += 1
            bar.set_postfix_str(f"loss {found['loss']:.3f}", refresh=False)
            bar.update()

        # ---- save, evaluate, log
        runs.share_buffers(model)
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "next": [epoch, step],
                  "steps": steps, "sums": sums | {"seconds": [time.time() - began, 1]}, "row": asdict(row),
                  "ramp": model.ramp, "skipped_in_a_row": guard.skipped_in_a_row, "recent": guard.recent,
                  "scenes": scenes.sizes, "config": asdict(config)}, device)
        wanted = not stop.agreed() and (evaluated is None or epoch in evaluated)
        result = evaluate(model, stop.until(scenes.val_batches), device, scenes.val.classes.things) if wanted else {}
        if stop.agreed():  # the checkpoint goes on with the next step, or with the evaluation
            raise runs.Stopped(f"stopped in epoch {epoch} after step {step} of {steps}")
        line = runs.log_line(row, epoch, steps, sums, optimizer, result, device, time.time() - began)
        run.finish(line, epoch == stages[row.stage][1], bar)
        epoch, step, sums = epoch + 1, 0, runs.Sums()
    bar.close()
    return run.log


@runs.joined()
def main(argv=None):
    config, stop = parse_config(argv), runs.Stop()
    launcher = "python" if runs.world() == 1 else f"torchrun --nproc_per_node={runs.world()}"
    again = " ".join([f"go on with: {launcher} train.py --resume --out {config.out}",
                      *(f"--{name} {getattr(config, name)}" for name in ("stage", "device", "workers")
                        if getattr(config, name) != getattr(Config, name))])
    try:
        train(config, stop=stop)
    except (FileNotFoundError, ValueError) as error:  # bad input; of a worker's traceback the last line
        sys.exit(f"error: {(str(error).strip() or repr(error)).splitlines()[-1]}")
    except OSError as error:
        sys.exit(f"error: {error}. What was saved before in {config.out} is whole. Mend it, then {again}")
    except Diverged as error:
        sys.exit(f"{error}; see {config.out}/skipped.jsonl. Start anew with another --out and --plan B, or lower --lr")
    except (MemoryError, RuntimeError) as error:  # torch's are known by their words alone
        if not (said := message(error)).startswith(("out of memory", "DataLoader timed out", "DataLoader worker")):
            raise
        sys.exit(f"error: {said}. Lower --batch-size ({config.batch_size} now), --views ({config.views}) or --workers; "
                 "a new run may take a larger --voxel-size, a container a larger /dev/shm (docker run --shm-size=8g). "
                 f"What was saved before in {config.out} is whole; {again}")
    except runs.Stopped as where:
        print(f"{where}; all of it is in {config.out}/last.pt; {again}", file=sys.stderr)
        sys.exit(128 + stop.asked)
    finally:
        stop.release()
    print(f"next: python train.py --stage {config.stage + 1} --out {config.out}" if config.stage in (1, 2) else
          f"next: python predict.py {config.out}/best.pt "
          f"{min(Path(config.data, 'val').glob('[!.]*/coord.npy')).parent}")


if __name__ == "__main__":
    main()
