"""One thing changed at a time: the gates, the naive recipe and injected faults, each a run of train.py.

    python ablate.py plain 0 --compress 8               # variant and seed: train, judge it with inputs blanked too
    python ablate.py --table runs/ablate                # mean and deviation over seeds, as a markdown table
    python ablate.py --blank runs/bifusion/stage3.pt    # a checkpoint of train.py with images or points blanked

A variant is a function that changes the setting of a moment (stages.Setting), and where that does not reach a patch of
names in train.py, model.py or fusion.py. All else, data, seeds, epochs, rates, is train.py's.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import fusion
import model as networks
import stages
import train
from data import SceneDataset, loader
from experiments.failures import FiLMOf2D
from experiments.report import read_log
from guard import StopSignals, whole_file

DROP = 0.1  # share of the scenes of which one branch is dropped
FAULT_RATE = 0.01  # share of the steps, for each fault


def plain(setting):
    """A learned gate from the first fused epoch on, and nothing that holds it."""
    return without_blanks(without_prior(without_fixed(without_film(setting))))


def fixed(setting):
    setting = plain(setting)
    return replace(setting, fusion="simple", parts=tuple(name for name in setting.parts if name != "gate"))


def with_film(setting):
    setting = plain(setting)
    return replace(setting, film=True, parts=(*setting.parts, "film"))


def lean(setting):
    """The curriculum without what holds the gate: learned from stage 2 on, no prior; scenes still blanked."""
    return replace(with_film(setting), blank=setting.blank)


def after_fixed(setting):
    return plain(setting) if setting.fusion == "learned" else fixed(setting)


def with_prior(setting):
    setting = plain(setting)
    return replace(setting, losses=(*setting.losses, "gate"))


def without_blanks(setting):
    return replace(setting, blank=0.0)


def without_film(setting):
    return replace(setting, film=False, parts=tuple(name for name in setting.parts if name != "film"))


def film_late(setting):
    return setting if setting.stage == 3 else without_film(setting)


def without_prior(setting):
    return replace(setting, losses=tuple(name for name in setting.losses if name != "gate"))


def without_fixed(setting):
    """The gate is learned from the first fused epoch on, under the prior."""
    return replace(setting, fusion="learned", parts=tuple(dict.fromkeys((*setting.parts, "gate"))),
                   losses=tuple(dict.fromkeys((*setting.losses, "gate"))))


def all_at_once(setting):
    """Every part from epoch 0 on, the tower at the base rate, no clip, the plain gate."""
    parts = ("3d", "decoder", "2d", "gate", "film", "tower", "tower_ends")
    losses = ("semantic", *stages.INSTANCE, "alignment")
    return replace(setting, parts=parts, losses=losses, tower_rate=1.0, clip=math.inf, fusion="learned", ramp=1.0,
                   film=True, blank=0.0)


def film_from_2d(seed):
    networks.FiLM = FiLMOf2D


def no_standardisation(seed):
    fusion.Standardise.forward = lambda self, feat: self.linear(feat)


def drop_branches(seed):
    """In training alpha is 0 on all of a scene, or 1 where seen, each for DROP of the scenes."""
    plain_forward, plain_blend, now = networks.BiFusion.forward, networks.blend, {}

    def forward(self, batch):
        now["batch"] = batch if self.training else None
        return plain_forward(self, batch)

    def blend(feat_2d, feat_3d, alpha):
        if now["batch"]:
            draw = torch.rand(len(now["batch"]["names"]))[now["batch"]["batch_index"].cpu()].to(alpha.device)
            alpha = torch.where(draw < DROP, 0.0, torch.where(draw > 1 - DROP, (alpha > 0).float(), alpha))
        return plain_blend(feat_2d, feat_3d, alpha)

    networks.BiFusion.forward, networks.blend = forward, blend


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
    faults, state, now = ("nan", "inf", "burst", "ignored"), {}, {}
    rng, counts = np.random.default_rng((seed, 4)), {}

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
            now.update(zip(faults, (rng.random(len(faults)) < FAULT_RATE).tolist()))
            for name in filter(now.get, faults):
                key = f"{name}, stage {state['model'].setting.stage}"
                counts[key] = counts.get(key, 0) + 1
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
    "dropout": ("plain + branch dropout", plain, drop_branches),
    "prior": ("plain + prior", with_prior, None),
    "kept": ("the curriculum: after fixed, prior, FiLM from geometry, inputs blanked", as_it_is, None),
    "kept_whole": ("the curriculum without blanked inputs", without_blanks, None),
    "kept_film_2d": ("the curriculum with FiLM from 2D onto 3D", as_it_is, film_from_2d),
    "kept_no_film": ("the curriculum without FiLM", without_film, None),
    "kept_film_late": ("the curriculum with FiLM from stage 3 on", film_late, None),
    "kept_no_prior": ("the curriculum without prior", without_prior, None),
    "kept_no_fixed": ("the curriculum, gate learned under its prior from stage 2 on", without_fixed, None),
    "lean": ("plain + FiLM from geometry, inputs blanked in stage 3", lean, None),
    "naive": ("naive: all parts from epoch 0, tower at the base rate, no clip, no standardisation, plain gate; FiLM "
              "from geometry; bad steps still skipped", all_at_once, no_standardisation),
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
    what, change, patch = VARIANTS[name]
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
    result, stop = {"variant": name, "what": what, "seed": config.seed}, StopSignals()
    try:
        result["as they are"] = train.train(config, stop)[-1]["val_miou"]
        train.evaluate = whole
        result |= blanked(Path(config.out, "stage3.pt"), ("points black", "images black")[: 1 + (name != "baseline")])
    except SystemExit as end:  # it diverged: a row of the table all the same
        result["diverged"] = str(end.code)
    finally:
        stop.release()
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
        found.setdefault((result["variant"], result.get("what", result["variant"])), []).append(
            result | {"ratios": ratios, "skipped": sum(line["skipped_steps"] for line in log)})
    rows = ["| | seeds | val mIoU | fusion_2d_ratio | images black | points black | skipped in all |", "|---" * 7 + "|"]
    order = list(VARIANTS)  # a variant of an earlier commit comes last
    for name, what in sorted(found, key=lambda key: order.index(key[0]) if key[0] in order else len(order)):
        runs = found[name, what]
        ratios = [ratio for run in runs for ratio in run["ratios"]]
        figures = [[run[key] for run in runs if key in run] for key in ("as they are", "images black", "points black")]
        cells = [f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") if v else "-"
                 for v in figures]
        cells.insert(1, f"{min(ratios):.2f}..{max(ratios):.2f}" if ratios else "-")
        seeds = ", ".join(f"{run['seed']}{' (diverged)' * ('diverged' in run)}" for run in runs)
        skipped = sum(run["skipped"] for run in runs)
        rows.append(" | ".join([f"| {what}", seeds, *cells, f"{skipped} |"]))
    return "\n".join(rows)


def main(argv):
    if len(argv) == 2 and argv[0] == "--table":
        print(table(argv[1]))
    elif len(argv) > 1 and argv[0] == "--blank":
        for path in argv[1:]:
            print(path, json.dumps(blanked(path)), flush=True)
    elif len(argv) > 1 and argv[0] in VARIANTS:
        name, seed, *flags = argv
        run(name, ["--model", "baseline" if name == "baseline" else "bifusion", "--seed", seed,
                   "--out", f"runs/ablate/{name}_s{seed}", "--workers", "0", *flags])
    else:
        sys.exit(f"{__doc__}\nvariants: {', '.join(VARIANTS)}")


if __name__ == "__main__":
    main(sys.argv[1:])
