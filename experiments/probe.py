"""What image tower and gate have learned, by linear probes; what is right where a frame sees.

    python -m experiments.probe runs/bifusion/stage3.pt ...    # a line each, and probe.json beside it, for report

A probe is ridge regression of the classes from features at the voxels that a frame sees, fitted on the train rooms and
judged on the val rooms.
Tower: before, after: mIoU of the probe on its levels, pretrained and trained. kept: R2 with which a linear map finds
the pretrained levels in the trained ones, the mean over channels; 1 = nothing is lost.
Gate: alpha_deviation, over seen voxels. alpha_auc: chance that alpha is higher where the probe on feat_2d is right and
the one on feat_3d wrong than the other way round. A gate fixed at 0.5 has deviation 0 and AUC 0.5.
The model itself, mIoU over val voxels: voxels, all; seen, unseen; perfect: all, if every seen one were right. Over val
points with inputs blanked: ablate.BLANKED.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu

import train
from data import collate
from experiments.ablate import blanked, open_run, rooms
from fusion import link_views, sample_views
from metrics import semantic_iou
from scenes.folder import IGNORE

RIDGE = 1e-3  # of the variance of a feature


def auc(values, positive):
    """Chance that a positive has a higher value than a negative, ties by half; NaN without either. (N,), (N,) bool."""
    high, low = values[positive], values[~positive]
    pairs = len(high) * len(low)
    return mannwhitneyu(high, low, method="asymptotic").statistic / pairs if pairs else math.nan


def miou(truth, found):
    return semantic_iou([(truth, found)], range(1 + int(max(truth.max(), found.max()))))["miou"]


@torch.no_grad()
def collect(path, device):
    """{(split, what): tensor} over the labelled voxels of all rooms. what: seen; segment; found, the model's answer;
    alpha; 2d, 3d, features; after, before, the tower's levels (before where it was pretrained)."""
    model, config, _ = open_run(path, device)
    if config.model == "baseline":
        raise ValueError(f"{path} is a 3D baseline, which has no image tower")
    towers, data = {"after": model.tower}, {}
    if model.tower.pretrained:
        towers["before"] = train.new_model(config).to(device).eval().tower
    for split in ("train", "val"):
        for scene in rooms(config, split):
            batch = train.to_device(collate([scene]), device)
            out, voxels = model(batch), batch["world_coord"]
            links = link_views(voxels, batch["world_to_camera"], batch["intrinsics"], batch["depth"],
                               tolerance=model.depth_tolerance)
            here = {"seen": out["seen"], "segment": batch["segment"], "found": out["logits"].argmax(1),
                    "alpha": out["alpha"], "2d": out["feat_2d"], "3d": out["feat_3d"]}
            for name, tower in towers.items():
                here[name] = torch.cat([
                    sample_views(level, links, [side * stride for side in level.shape[:1:-1]], len(voxels))[0]
                    for level, stride in zip(tower.encode(batch["image"], batch["depth"]), tower.visual.strides)], 1)
            for name, value in here.items():
                data.setdefault((split, name), []).append(value[batch["segment"] != IGNORE].cpu())
    return {key: torch.cat(value) for key, value in data.items()}


def probe(path, device=train.Config.device):
    """-> dict of what is listed above, floats; a tower from scratch has no before and kept. ValueError: a baseline."""
    data = collect(path, device)
    seen, truth, answer = (data["val", name] for name in ("seen", "segment", "found"))
    result = {"voxels": miou(truth, answer), "seen": miou(truth[seen], answer[seen]),
              "unseen": miou(truth[~seen], answer[~seen]), "perfect": miou(truth, truth.where(seen, answer))}
    data = {(split, name): value[data[split, "seen"]] for (split, name), value in data.items()}

    def fit(name, target):
        """The val scenes' target as ridge regression on these features tells it."""
        mean, std = data["train", name].mean(0), data["train", name].std(0).clamp(min=1e-6)
        known, asked = (F.pad((data[split, name] - mean) / std, (0, 1), value=1).double() for split in ("train", "val"))
        gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
        return asked @ torch.linalg.solve(gram, known.T @ target.double())

    truth, one_hot = data["val", "segment"], F.one_hot(data["train", "segment"])
    found = {name: fit(name, one_hot).argmax(1) for name in ("before", "after", "2d", "3d") if ("val", name) in data}
    result |= {name: miou(truth, value) for name, value in found.items()}
    if "before" in found:
        target = data["val", "before"].double()
        lost = (fit("after", data["train", "before"]) - target).square().mean(0) / target.var(0).clamp(min=1e-12)
        result["kept"] = 1 - lost.mean()
    alpha, right_2d, right_3d = data["val", "alpha"], found["2d"] == truth, found["3d"] == truth
    one = right_2d != right_3d  # where one alone is right
    result |= {"alpha_deviation": alpha.std(), "alpha_auc": auc(alpha[one].numpy(), right_2d[one].numpy())}
    return {name: round(float(value), 4) for name, value in result.items()} | blanked(path, device=device)


if __name__ == "__main__":
    for checkpoint in sys.argv[1:] or sys.exit(__doc__):
        line = json.dumps(probe(checkpoint))
        Path(checkpoint).with_name("probe.json").write_text(line)
        print(checkpoint, line, flush=True)
