"""How much of what was pretrained is left in an image tower after training, by linear probes.

    python -m experiments.probe runs/bifusion/stage3.pt ...    # a line each: before, after, kept

Ridge regression from the tower's levels, sampled at the voxels that a frame sees, fitted on the train rooms and judged
on the val rooms: of the classes (mIoU), before and after training; and from the trained tower's levels to those of the
pretrained one (share of their variance that is explained, "kept": 1 = nothing is lost that a linear map cannot mend).
"""

import json
import sys

import torch
import torch.nn.functional as F

import train
from data import SceneDataset, collate
from fusion import link_views, sample_views
from metrics import semantic_iou
from scenes.folder import IGNORE, NUM_CLASSES

RIDGE = 1e-3  # of the variance of a feature


@torch.no_grad()
def levels_at_voxels(tower, batch, tolerance):
    """What a tower shows at the seen voxels of one scene: (M, C of all levels together); (M,) their rows."""
    links = link_views(batch["world_coord"], batch["world_to_camera"], batch["intrinsics"], batch["depth"],
                       tolerance=tolerance)
    found = []
    for level, stride in zip(tower.encode(batch["image"], batch["depth"]), tower.visual.strides):
        extent = [side * stride for side in level.shape[:1:-1]]
        found.append(sample_views(level, links, extent, len(batch["world_coord"]))[0])
    rows = links.point.unique()
    return torch.cat(found, 1)[rows], rows


def probe(path, device=train.Config.device):
    """-> dict of before, after (mIoU of the class probe), kept (R2); of a tower from scratch after alone."""
    model, config, _ = train.load_model(path, device)
    towers = {"after": model.tower}
    if model.tower.pretrained:
        towers["before"] = train.new_model(config).to(device).eval().tower
    data = {}
    for split in ("train", "val"):
        scenes = SceneDataset(config.data, split, voxel_size=config.voxel_size, views=2 * config.views,
                              image_size=train.RECIPES[config.preset]["image_size"])
        for i in range(len(scenes)):
            batch = train.to_device(collate([scenes[i]]), device)
            for name, tower in towers.items():
                feat, rows = levels_at_voxels(tower, batch, model.depth_tolerance)
                data.setdefault((split, name), []).append(feat)
            data.setdefault((split, "segment"), []).append(batch["segment"][rows])
    data = {key: torch.cat(value) for key, value in data.items()}
    truth = data["val", "segment"]

    def fit(name, target):
        """The val scenes' target as ridge regression on this tower's features tells it."""
        mean, std = data["train", name].mean(0), data["train", name].std(0).clamp(min=1e-6)
        known, asked = (F.pad((data[split, name] - mean) / std, (0, 1), value=1).double() for split in ("train", "val"))
        gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1], dtype=known.dtype, device=device)
        return asked @ torch.linalg.solve(gram, known.T @ target.double())

    labelled = (data["train", "segment"] != IGNORE)[:, None]
    one_hot = F.one_hot(data["train", "segment"].clamp(min=0), NUM_CLASSES) * labelled
    result = {"before": None, "kept": None}
    for name in towers:
        found = fit(name, one_hot).argmax(1)
        result[name] = round(float(semantic_iou([(truth.cpu(), found.cpu())], range(NUM_CLASSES))["miou"]), 4)
    if "before" in towers:
        target = data["val", "before"].double()
        left = (fit("after", data["train", "before"]) - target).square().mean(0) / target.var(0).clamp(min=1e-12)
        result["kept"] = round((1 - left).mean().item(), 4)
    return result


if __name__ == "__main__":
    for checkpoint in sys.argv[1:] or sys.exit(__doc__):
        print(checkpoint, json.dumps(probe(checkpoint)), flush=True)
