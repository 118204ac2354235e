"""One thing changed at a time: the gates, the naive recipe and injected faults, each a run of train.py.

    python ablate.py plain 0 --compress 8               # variant and seed: train, then judge it with inputs blanked
    python ablate.py --table runs/ablate                # mean and deviation over seeds, as a markdown table
    python ablate.py --blank runs/bifusion/stage3.pt    # any checkpoint with its images or its points' colours blanked

A variant is a function that changes the setting of a moment (stages.Setting), and where that does not reach a patch of
one name in train.py, model.py or fusion.py. All else, data, seeds, epochs, rates, is train.py's.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fusion
import model as networks
import stages
import train
from data import SceneDataset, loader
from guard import StopSignals, whole_file
from report import read_log

DROP = 0.1  # share of the scenes of which one branch is dropped
FAULT_RATE = 0.01  # share of the steps, for each fault


class FiLMFrom2D(nn.Module):
    """The common form of FiLM between branches: gamma and beta of the 3D branch from the 2D branch."""

    def __init__(self, dim, hidden=64):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * dim))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, feat_2d, feat_3d, coord, normal):
        gamma, beta = self.mlp(feat_2d).chunk(2, 1)
        return feat_2d, (1 + gamma) * feat_3d + beta


def plain(setting):
    """A learned gate from the first fused epoch on, and nothing that holds it."""
    losses = tuple(name for name in setting.losses if name not in ("branch", "gate"))
    parts = tuple(name for name in setting.parts if name not in ("branch", "film"))
    return replace(setting, fusion="learned", losses=losses, parts=tuple(dict.fromkeys((*parts, "gate"))), film=False,
                   blank=0.0)


def fixed(setting):
    setting = plain(setting)
    return replace(setting, fusion="simple", parts=tuple(name for name in setting.parts if name != "gate"))


def with_film(setting):
    setting = plain(setting)
    return replace(setting, film=True, parts=(*setting.parts, "film"))


def after_fixed(setting):
    return plain(setting) if setting.fusion == "learned" else fixed(setting)


def with_classifiers(setting):
    setting = plain(setting)
    return replace(setting, losses=(*setting.losses, "branch"), parts=(*setting.parts, "branch"))


def with_prior(setting):
    setting = plain(setting)
    return replace(setting, losses=(*setting.losses, "gate"))


def with_blanks(setting):
    return replace(plain(setting), blank=setting.blank)


def without_blanks(setting):
    return replace(setting, blank=0.0)


def without_film(setting):
    return replace(setting, film=False, parts=tuple(name for name in setting.parts if name != "film"))


def all_at_once(setting):
    """Every part from epoch 0 on, the tower at the base rate, no clip, the plain gate."""
    parts = ("3d", "decoder", "2d", "gate", "film", "tower", "tower_ends")
    losses = ("semantic", *stages.INSTANCE, "alignment")
    return replace(setting, parts=parts, losses=losses, tower_rate=1.0, clip=math.inf, fusion="learned", ramp=1.0,
                   film=True, blank=0.0)


def film_from_2d(seed):
    networks.FiLM = FiLMFrom2D


def no_standardisation(seed):
    fusion.Standardise.forward = lambda self, feat: self.linear(feat)


def drop_branches(seed):
    """In training alpha is 0 on all of a scene, or 1 where seen, each for DROP of the scenes."""
    whole = networks.blend

    def forward(self, batch):
        self.dropping = self.training and batch
        return plain_forward(self, batch)

    plain_forward = networks.BiFusion.forward

    def blend(feat_2d, feat_3d, alpha):
        if blend.model.dropping:
            index = blend.model.dropping["batch_index"]
            draw = torch.rand(len(blend.model.dropping["names"]))[index.cpu()].to(alpha.device)
            alpha = torch.where(draw < DROP, 0.0, torch.where(draw > 1 - DROP, (alpha > 0).float(), alpha))
        return whole(feat_2d, feat_3d, alpha)

    networks.BiFusion.forward, networks.blend = forward, blend
    on_new_model(lambda model: setattr(blend, "model", model))


def shared_head(seed):
    """The branch classifiers are the semantic head itself, on what it would read at alpha 1 and 0."""
    plain_forward = networks.BiFusion.forward

    def forward(self, batch):
        out = plain_forward(self, batch)
        if "feat_2d" in out:
            feat_2d, feat_3d = out["feat_2d"], out["feat_3d"]
            if self.setting.film:
                feat_2d, feat_3d = self.film(feat_2d, feat_3d, batch["coord"], batch["normal"])
            out["logits_2d"], out["logits_3d"] = self.semantic_head(feat_2d), self.semantic_head(feat_3d)
        return out

    networks.BiFusion.forward = forward


def on_new_model(do):
    """Call do(model) with the model that train.py makes."""
    make = train.new_model

    def new_model(*args, **kwargs):
        model = make(*args, **kwargs)
        do(model)
        return model

    train.new_model = new_model


def inject_faults(seed):
    """Each of four faults in FAULT_RATE of the training steps, drawn from the seed."""
    rng, now, counts = np.random.default_rng((seed, 4)), {}, dict.fromkeys(("nan", "inf", "burst", "ignored"), 0)
    state = {}

    def prepare(model):
        state["model"] = model
        model.standardise_3d.register_forward_hook(spoil)
        for name, parameters in model.parts().items():
            for parameter in parameters:
                parameter.register_hook(lambda grad, name=name: burst(grad, name))

    def spoil(module, args, out):
        return out.index_fill(0, torch.tensor([0], device=out.device), math.nan) if now.get("nan") else out

    def burst(grad, name):
        image = state["model"].setting.fusion != "identity"
        return 1e6 * grad if now.get("burst") and stages.PARTS[name] == ("2d" if image else "3d") else grad

    to_device, weigh = train.to_device, train.weighted_sum

    def spoiled(batch, device):
        batch = to_device(batch, device)
        now.clear()
        if state["model"].training:
            now.update(zip(counts, (rng.random(len(counts)) < FAULT_RATE).tolist()))
            for name in counts:
                counts[name] += now[name]
            if now["ignored"]:
                batch["segment"] = torch.full_like(batch["segment"], -1)
                batch["superpoint_instance"] = torch.full_like(batch["superpoint_instance"], -1)
                batch |= {key: batch[key][:0] for key in ("instance_label", "instance_batch")}
        return batch

    train.to_device = spoiled
    train.weighted_sum = lambda terms, weights: weigh(terms, weights) * (math.inf if now.get("inf") else 1)
    on_new_model(prepare)
    inject_faults.counts = counts


def as_it_is(setting):
    return setting


VARIANTS = {  # name: what it is, change of a setting with 2D on, patch made before training
    "baseline": ("3D baseline", as_it_is, None),
    "fixed": ("alpha fixed at 0.5", fixed, None),
    "plain": ("plain learned gate, no FiLM", plain, None),
    "film_geometry": ("plain + FiLM from geometry", with_film, None),
    "film_2d": ("plain + FiLM from 2D onto 3D", with_film, film_from_2d),
    "after_fixed": ("plain, learned after fixed", after_fixed, None),
    "classifiers": ("plain + branch classifiers", with_classifiers, None),
    "dropout": ("plain + branch dropout", plain, drop_branches),
    "prior": ("plain + prior", with_prior, None),
    "blanks": ("plain + inputs blanked in stage 3", with_blanks, None),
    "kept": ("the curriculum: after fixed, classifiers, prior, FiLM from geometry, inputs blanked", as_it_is, None),
    "kept_whole": ("the curriculum without blanked inputs", without_blanks, None),
    "kept_film_2d": ("the curriculum with FiLM from 2D onto 3D", as_it_is, film_from_2d),
    "kept_no_film": ("the curriculum without FiLM", without_film, None),
    "shared": ("shared head", as_it_is, shared_head),
    "naive": ("naive: all at once, base rate, no clip, no standardisation, plain gate", all_at_once,
              no_standardisation),
    "faults": ("the curriculum with faults injected", as_it_is, inject_faults),
}


BLANKED = {  # what is done to every batch of the val rooms
    "as they are": dict,
    "images black": lambda batch: batch | {"image": torch.zeros_like(batch["image"])},
    "no images": dict,
    "points black": lambda batch: batch | {"color": torch.full_like(batch["color"], -1),
                                           "normal": torch.zeros_like(batch["normal"])},
}


def blanked(path, names=tuple(BLANKED)):
    """Val mIoU of a checkpoint with its inputs blanked in each of these ways, keys of BLANKED: dict."""
    model, config, _ = train.load_model(path)
    result = {}
    for name in names:
        views = 2 * config.views if config.model == "bifusion" and name != "no images" else 0
        val_set = SceneDataset(config.data, "val", voxel_size=config.voxel_size, seed=config.seed, views=views,
                               image_size=train.RECIPES[config.preset]["image_size"])
        scenes = map(BLANKED[name], loader(val_set, config.batch_size, 0, False, config.seed))
        result[name] = round(train.evaluate(model, scenes, torch.device("cpu"))["miou"], 4)
    return result


def run(name, argv):
    _, change, patch = VARIANTS[name]
    config = train.parse_config(argv)
    at = stages.setting_at

    def setting_at(*args, **kwargs):
        setting = at(*args, **kwargs)
        return change(setting) if setting.fusion != "identity" or name == "naive" else setting

    whole, epochs = train.evaluate, iter(range(stages.stage_epochs(config.compress)[3][1], -1, -1))

    def evaluate(*args):  # after the last epoch alone: that is what is compared
        return {"miou": None, "iou": ()} if next(epochs) else whole(*args)

    train.setting_at, train.evaluate = setting_at, evaluate
    if patch:
        patch(config.seed)
    stop = StopSignals()
    train.train(config, stop)
    stop.release()
    train.evaluate = whole
    log = read_log(Path(config.out, "log.jsonl"))[0]
    result = {"variant": name, "seed": config.seed, "as they are": log[-1]["val_miou"]}
    result |= blanked(Path(config.out, "stage3.pt"), ("points black", "images black")[: 1 + (name != "baseline")])
    if name == "faults":
        result["faults"] = inject_faults.counts
    with whole_file(Path(config.out, "blanked.json")) as file:
        file.write(json.dumps(result, indent=1).encode())
    print(result)


def table(folder):
    """Markdown rows of all finished runs below a folder: mean and standard deviation over the seeds."""
    found = {}
    for path in sorted(Path(folder).glob("*/blanked.json")):
        result = json.loads(path.read_text())
        log = read_log(path.parent / "log.jsonl")[0]
        ratios = [line["fusion_2d_ratio"] for line in log if line["fusion_ramp"] == 1]
        found.setdefault(result["variant"], []).append(
            result | {"ratios": ratios, "skipped": sum(line["skipped_steps"] for line in log)})
    rows = ["| | seeds | val mIoU | fusion_2d_ratio | images black | points black | skipped |", "|---" * 7 + "|"]
    for name in VARIANTS:
        if name in found:
            runs = found[name]
            ratios = [ratio for run in runs for ratio in run["ratios"]]
            figures = [[run[key] for run in runs if key in run] for key in
                       ("as they are", "images black", "points black")]
            cells = [f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}" if values else "-"
                     for values in figures]
            cells.insert(1, f"{min(ratios):.2f}..{max(ratios):.2f}" if ratios else "-")
            seeds, skipped = (", ".join(str(run["seed"]) for run in runs), sum(run["skipped"] for run in runs))
            rows.append(" | ".join([f"| {VARIANTS[name][0]}", seeds, *cells, f"{skipped} |"]))
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(sys.argv[2]))
    elif sys.argv[1] == "--blank":
        for path in sys.argv[2:]:
            print(path, json.dumps(blanked(path)), flush=True)
    else:
        name, seed, *flags = sys.argv[1:]
        run(name, ["--model", "baseline" if name == "baseline" else "bifusion", "--seed", seed,
                   "--out", f"runs/ablate/{name}_s{seed}", "--workers", "0", *flags])
