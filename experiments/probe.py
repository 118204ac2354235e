"""How much of what was pretrained is left in an image tower after training, by linear probes.

    python -m experiments.probe runs/bifusion/stage3.pt ...    # a line each: before, after, kept

Ridge regression from the tower's levels, sampled at the voxels that a frame sees, fitted on the train rooms and judged
on the val rooms: of the classes (mIoU), before and after training; and of the pretrained tower's levels from the
trained one's (share of their variance that is explained, "kept": 1 = nothing is lost that a linear map cannot mend).
"""

import json
import sys

import torch
import torch.nn.functional as F

import train
from data import SceneDataset, collate
from fusion import link_views, sample_views
from metrics import semantic_iou
from scenes.folder import NUM_CLASSES

RIDGE = 1e-3  # of the variance of a feature


@torch.no_grad()
def probe(path, device=train.Config.device):
    """-> dict of before, after (mIoU of the class probe), kept (R2); of a tower from scratch after alone."""
    model, config, _ = train.load_model(path, device)
    towers, data = {"after": model.tower}, {}
    if model.tower.pretrained:
        towers["before"] = train.new_model(config).to(device).eval().tower
    for split in ("train", "val"):
        scenes = SceneDataset(config.data, split, voxel_size=config.voxel_size, views=2 * config.views,
                              image_size=train.RECIPES[config.preset]["image_size"])
        for i in range(len(scenes)):
            batch = train.to_device(collate([scenes[i]]), device)
            voxels = batch["world_coord"]
            links = link_views(voxels, batch["world_to_camera"], batch["intrinsics"], batch["depth"],
                               tolerance=model.depth_tolerance)
            rows = links.point.unique()
            data.setdefault((split, "segment"), []).append(batch["segment"][rows])
            for name, tower in towers.items():
                levels = [sample_views(level, links, [side * stride for side in level.shape[:1:-1]], len(voxels))[0]
                          for level, stride in zip(tower.encode(batch["image"], batch["depth"]), tower.visual.strides)]
                data.setdefault((split, name), []).append(torch.cat(levels, 1)[rows])
    data = {key: torch.cat(value) for key, value in data.items()}

    def fit(name, target):
        """The val scenes' target as ridge regression on this tower's features tells it."""
        mean, std = data["train", name].mean(0), data["train", name].std(0).clamp(min=1e-6)
        known, asked = (F.pad((data[split, name] - mean) / std, (0, 1), value=1).double() for split in ("train", "val"))
        gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1], dtype=known.dtype, device=device)
        return asked @ torch.linalg.solve(gram, known.T @ target.double())

    classes = torch.arange(NUM_CLASSES, device=device)
    found = {name: fit(name, data["train", "segment"][:, None] == classes).argmax(1) for name in towers}
    truth = data["val", "segment"].cpu()
    result = {name: semantic_iou([(truth, found[name].cpu())], range(NUM_CLASSES))["miou"] for name in towers}
    if "before" in towers:
        target = data["val", "before"].double()
        lost = (fit("after", data["train", "before"]) - target).square().mean(0) / target.var(0).clamp(min=1e-12)
        result["kept"] = 1 - lost.mean().item()
    return {name: round(float(value), 4) for name, value in result.items()}


if __name__ == "__main__":
    for checkpoint in sys.argv[1:] or sys.exit(__doc__):
        print(checkpoint, json.dumps(probe(checkpoint)), flush=True)
