"""One thing changed at a time: a part left out, the naive recipe, a stress, each a run of train.py.

    python -m experiments.ablate concat 0 --compress 8            # variant, seed, flags of train.py, as --resume
    python -m experiments.ablate naive+poses 0 --compress 8       # under a stress of STRESS

A variant changes rows of the curriculum (stages.Row) or the model; data, seeds, epochs, rates are train.py's. A run is
evaluated after its last epoch alone; its result stands in blanked.json of the run folder.
"""

import contextlib
import json
import math
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader

import runs
import train
from data import SceneDataset, collate
from experiments.failures import FiLMOf2D
from guard import Diverged
from scenes.folder import IGNORE, load_frames
from stages import INSTANCE, PARTS, apply_row, curriculum
from tower import SCRATCH

FAULTS, FAULT_RATE = ("nan", "inf", "burst", "ignored"), 0.01  # share of the training steps, for each


def fused(*more, prior=True, **columns):
    """Function rows -> rows with other columns where 2D is on; there FiLM and gate train where they are in use, and
    `more` parts; a gate that is learned has its prior among the losses where prior says so."""
    def change(row):
        row = replace(row, **columns)
        gate = ("gate",) * (row.fusion == "learned")
        trains = (*(part for part in row.trains if part not in ("film", "gate")), *("film",) * row.film, *gate, *more)
        return replace(row, trains=tuple(dict.fromkeys(trains)),
                       losses=(*(loss for loss in row.losses if loss != "gate"), *gate * prior))
    return lambda rows: tuple(row if row.fusion == "identity" else change(row) for row in rows)


def joint(rows, losses=("semantic", *INSTANCE, "alignment", "gate"), **columns):
    """All parts at once from epoch 0."""
    columns = {"tower_rate": rows[-1].tower_rate, "fusion": "learned", "ramp_epochs": 0.0, "film": True} | columns
    return tuple(replace(row, trains=tuple(PARTS), losses=losses, **columns) for row in rows)


def film_of_2d(config, load=True):
    model = train.new_model(config, load)
    with torch.random.fork_rng(devices=[]):  # all that is drawn later stays as in the other variants
        model.film = FiLMOf2D(model.standardise_3d.linear.out_features)
    return model


def no_standardisation(config, load=True, build=train.new_model):
    """Nor the gain behind it, which makes up for its small range."""
    model = build(config, load)
    model.gain.fill_(1)
    model.standardise_2d.norm = model.standardise_3d.norm = torch.nn.Identity()
    return model


def unprotected(config, load=True):
    """No standardisation, no query-key norm, and the batch norms of the tower take the batch's statistics."""
    model = no_standardisation(config, load, no_query_key_norm)
    model.tower.pretrained = False
    return model


def from_the_start(rows):
    """The rows without stage 1: what comes after it begins at epoch 0."""
    return (replace(rows[1], first_epoch=0), *rows[2:])


def only_2d(config, load=True):
    """The image side alone: the same heads on seen voxels, zeros in place of the 3D features; its U-Net never runs."""
    model = train.new_model(config, load)
    model.encode_3d = lambda batch: batch["color"].new_zeros(len(batch["color"]), model.semantic_head.in_features)
    model.gates["simple"].forward = lambda feat_2d, feat_3d, seen: seen.to(feat_2d.dtype)
    return model


class Concat(torch.nn.Linear):
    """Linear over [feat_2d, feat_3d] where a view sees the voxel, in place of gate and blend; starts as their mean."""

    def __init__(self, dim):
        super().__init__(2 * dim, dim)
        torch.nn.init.zeros_(self.bias)
        self.weight.data = 0.5 * torch.eye(dim).repeat(1, 2)

    def forward(self, feat_2d, feat_3d, alpha):
        """alpha is SimpleFusion's: half of the ramp where seen, else 0."""
        return torch.lerp(feat_3d, super().forward(torch.cat([feat_2d, feat_3d], 1)), 2 * alpha[:, None])


def concat(config, load=True):
    model = train.new_model(config, load)
    model.gates["concat"] = Concat(model.semantic_head.in_features)
    model.blend = model.gates["concat"].__call__
    return model


def no_zero_start(config, load=True):
    """Gate and FiLM start at random, not as what they replace."""
    model = train.new_model(config, load)
    with torch.random.fork_rng(devices=[]):
        for mlp in (model.film.mlp, model.gates["learned"].mlp):
            mlp[-1].reset_parameters()
    return model


def cosine(lr, moment, last_stage, learning_rate=train.learning_rate):
    """train.learning_rate, which falls from the start."""
    return learning_rate(lr, moment, (0, last_stage[1]))


def no_query_key_norm(config, load=True):
    model = train.new_model(config, load)
    for attention in (*model.decoder.cross, *model.decoder.own):
        attention.query_norm = attention.key_norm = torch.nn.Identity()
    return model


def poses_off(folder, frames, *args, **kwargs):
    """load_frames, where the camera of every second frame of a train room, by its name, stands 0.5 m away."""
    found = load_frames(folder, frames, *args, **kwargs)
    for camera, frame in zip(found["world_to_camera"], frames) if Path(folder).parent.name == "train" else ():
        rng = np.random.default_rng((zlib.crc32(Path(folder).name.encode()), frame))
        way = rng.normal(size=3)
        if rng.random() < 0.5:
            camera[:3, 3] -= camera[:3, :3] @ (0.5 * way / np.linalg.norm(way)).astype(np.float32)
    return found


class FewRooms(SceneDataset):
    """A quarter of the train rooms, each four times, so that an epoch has as many steps."""

    def __init__(self, root, split, **options):
        super().__init__(root, split, **options)
        if split == "train":
            self.folders = 4 * self.folders[: max(1, len(self.folders) // 4)]


def with_faults(config, load=True, build=train.new_model):
    """Each of FAULTS in FAULT_RATE of the training steps, drawn from the seed; faults.jsonl has a line for each."""
    model, rng = build(config, load), np.random.default_rng((config.seed, 4))

    def draw(module, args):
        batch, row = args[0], model.row
        if model.training and "faults" not in batch:  # a batch that is looked at again keeps its own
            batch["faults"] = [fault for fault, number in zip(FAULTS, rng.random(len(FAULTS))) if number < FAULT_RATE]
            with open(Path(config.out, "faults.jsonl"), "a") as file:
                file.writelines(json.dumps({"fault": fault, "stage": row.stage}) + "\n" for fault in batch["faults"])
            if "ignored" in batch["faults"]:
                batch |= {key: torch.full_like(batch[key], IGNORE) for key in ("segment", "superpoint_instance")} \
                    | {key: batch[key][:0] for key in ("instance_label", "instance_batch")}
        model.faults = batch.get("faults", ())

    def spoil_features(module, args, out):
        return out.index_fill(0, torch.tensor([0], device=out.device), math.nan) if "nan" in model.faults else out

    def spoil_logits(module, args, out):
        # each is finite, the difference of two is not: the loss of a voxel of any class but 0 is infinite
        offset = 3e38 * torch.tensor([1] + [-1] * (out.shape[1] - 1), device=out.device)
        return out + offset if "inf" in model.faults else out

    def burst(grad, branch):
        struck = "3d" if model.row.fusion == "identity" else "2d"
        return 1e6 * grad if "burst" in model.faults and branch == struck else grad

    model.register_forward_pre_hook(draw)
    model.standardise_3d.register_forward_hook(spoil_features)
    model.semantic_head.register_forward_hook(spoil_logits)
    for name, parameters in model.parts().items():
        for parameter in parameters:
            parameter.register_hook(lambda grad, branch=PARTS[name]: burst(grad, branch))
    return model


# all at once, AdamW's own betas and decay, one rate that falls throughout, no clip, prior or blanked scenes; FiLM of
# geometry, the gate's start and the guard stay
NAIVE = (partial(joint, losses=("semantic", *INSTANCE, "alignment"), tower_rate=1.0, clip=math.inf, blank=0.0),
         unprotected)
VARIANTS = {  # name: function rows -> rows; function (config, load) -> model
    "baseline": (fused(), train.new_model),
    "naive": NAIVE,
    "naive_warm": NAIVE,  # with the curriculum's warm-up
    "joint": (joint, train.new_model),  # all at once with every measure but the stages
    "only_2d": (lambda rows: fused(prior=False, fusion="simple", film=False, ramp_epochs=0.0, blank=0.0)(
        from_the_start(rows)), only_2d),
    "concat": (fused("gate", fusion="simple"), concat),
    "kept": (fused(), train.new_model),  # the curriculum
    "less_stage_1": (from_the_start, train.new_model),  # the curriculum less one part, from here on
    "less_frozen_tower": (lambda rows: fused("tower", tower_rate=rows[-1].tower_rate)(rows), train.new_model),
    "less_standardisation": (fused(), no_standardisation),
    "less_branch_clip": (fused(), train.new_model),  # one clip for all
    "less_ramp": (fused(ramp_epochs=0.0), train.new_model),
    "less_zero_start": (fused(), no_zero_start),
    "less_film_geometry": (fused(), film_of_2d),  # FiLM from 2D onto 3D instead
    "less_gate_prior": (fused(prior=False), train.new_model),
    "less_blanked_scenes": (fused(blank=0.0), train.new_model),
}
PLAIN = {"stages.RATES": {}, "train.learning_rate": cosine, "train.BETAS": (0.9, 0.999)}
PATCHES = {  # variant: {name: other value}
    "naive": {"train.WARM_UP": 0.02} | PLAIN,
    "naive_warm": PLAIN,
    "less_branch_clip": {"stages.PARTS": dict.fromkeys(PARTS, "all")},
}
STRESS = {  # any variant + one of these: {name: other value}
    "poses": {"data.load_frames": poses_off},
    "one_frame": {"train.RECIPES": {key: own | {"views": 1} for key, own in train.RECIPES.items()}},
    "few_rooms": {"data.SceneDataset": FewRooms},
    "faults": {},  # with_faults around the variant's own model
}
BLANKED = {  # what is done to every batch of a split
    "as they are": dict,
    "images black": lambda batch: batch | {"image": torch.zeros_like(batch["image"])},
    "points black": lambda batch: batch | {"color": torch.full_like(batch["color"], -1),
                                           "normal": torch.zeros_like(batch["normal"])},
    "both black": lambda batch: BLANKED["points black"](BLANKED["images black"](batch)),
    "no frames": lambda batch: batch | {key: batch[key][:0] for key in (
        "image", "depth", "world_to_camera", "intrinsics", "view_batch")},
}


def open_run(path, device):
    """`train.load_model` of a checkpoint of train.py or of a variant."""
    of_variant = Path(path).parent / "blanked.json"
    variant = json.loads(of_variant.read_text())["variant"] if of_variant.exists() else "kept"
    return train.load_model(path, device, VARIANTS[variant.partition("+")[0]][1])


def blanked(path, names=tuple(BLANKED), device=train.Config.device):
    """Val mIoU of a checkpoint, of train.py or of a variant, with its inputs blanked in these ways: dict."""
    model, config, _ = open_run(path, device)
    return {name: round(judge(model, config, device, BLANKED[name])["miou"], 4) for name in names}


def rooms(config, split):
    """The scenes of a run's data as train.py evaluates them."""
    return SceneDataset(config.data, split, voxel_size=config.voxel_size, seed=config.seed,
                        views=2 * config.views if config.model == "bifusion" else 0,
                        image_size=train.RECIPES[config.preset]["image_size"])


def judge(model, config, device, change=dict, split="val"):
    """What train.evaluate says of a model on a split, whose batches go through the function `change`."""
    scenes = rooms(config, split)
    batches = map(change, DataLoader(scenes, config.batch_size, collate_fn=collate))
    return train.evaluate(model, batches, torch.device(device), scenes.classes.things)


@contextlib.contextmanager
def patched(variant, stress):
    """What PATCHES and STRESS say, for as long as a run lasts."""
    with contextlib.ExitStack() as patches:
        for target, value in (PATCHES.get(variant, {}) | STRESS.get(stress, {})).items():
            patches.enter_context(mock.patch(target, value))
        yield


def run(name, argv):
    """Train a variant as train.py would, judge it with its inputs blanked too, and write blanked.json."""
    (change, build), config, stop = VARIANTS[name.partition("+")[0]], train.parse_config(argv), runs.Stop()
    build = partial(with_faults, build=build) if name.endswith("+faults") else build
    rows = change(curriculum(config.compress, config.plan, config.tower_weights != SCRATCH, config.tower_rate))
    path, result = Path(config.out, "blanked.json"), {"variant": name, "seed": config.seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))  # tells `blanked` how the model is built
    try:
        log = train.train(config, rows, build, {rows[-1].last_epoch}, stop)
        result |= {"as they are": log[-1]["val_miou"], "loss at the end": log[-1]["val_loss"]}
        names = ("points black",) if name == "baseline" else ("points black", "images black")
        result |= blanked(Path(config.out, "last.pt"), names, config.device)
    except Diverged as error:  # a row of the table all the same
        result["diverged"] = str(error)
    except runs.Stopped as where:
        sys.exit(f"{where}; go on with the same command and --resume")
    finally:
        stop.release()
    torch.manual_seed(config.seed)  # the weights that the training began from; it made the rooms, where it had to
    untrained = apply_row(build(config).to(config.device), rows[0])
    result["loss at the start"] = judge(untrained, config, config.device)["loss"]
    path.write_text(json.dumps(result, indent=1))
    print(result)


def main(argv):
    match argv:
        case [name, seed, *flags] if (variant := name.partition("+"))[0] in VARIANTS and variant[2] in ("", *STRESS):
            with patched(variant[0], variant[2]):
                run(name, ["--model", "baseline" if variant[0] == "baseline" else "bifusion", "--seed", seed,
                           *["--weight-decay", "0.05"] * variant[0].startswith("naive"),
                           "--out", f"runs/ablate/{name}_s{seed}", "--workers", "0", *flags])
        case _:
            sys.exit(f"{__doc__}\nvariants: {', '.join(VARIANTS)}; stress: {', '.join(STRESS)}")


if __name__ == "__main__":
    main(sys.argv[1:])
