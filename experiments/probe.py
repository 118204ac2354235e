"""How much of what was pretrained is left in an image tower after training; what is right where a frame sees.

    python -m experiments.probe runs/bifusion/stage3.pt ...    # a line each

before, after: mIoU of a linear probe on the tower's levels, pretrained and trained: ridge regression of the classes at
the voxels that a frame sees, fitted on the train rooms and judged on the val rooms. kept: R2 with which a linear map
finds the pretrained levels in the trained ones, the mean over channels; 1 = nothing is lost.
voxels, seen, unseen: mIoU of the model itself over all val voxels, those that a frame sees, the others; perfect: over
all if every seen one were right.
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
def probe(path, device=train.Config.device):
    """-> dict of what is listed above, floats; a tower from scratch has no before and kept. ValueError: a baseline."""
    model, config, _ = train.load_model(path, device)
    if config.model == "baseline":
        raise ValueError(f"{path} is a 3D baseline, which has no image tower")
    towers, data, judged = {"after": model.tower}, {}, {"voxels": [], "seen": [], "unseen": [], "perfect": []}
    if model.tower.pretrained:
        towers["before"] = train.new_model(config).to(device).eval().tower
    for split in ("train", "val"):
        scenes = SceneDataset(config.data, split, voxel_size=config.voxel_size, views=2 * config.views,
                              image_size=train.RECIPES[config.preset]["image_size"])
        for i in range(len(scenes)):
            batch = train.to_device(collate([scenes[i]]), device)
            voxels, truth = batch["world_coord"], batch["segment"]
            links = link_views(voxels, batch["world_to_camera"], batch["intrinsics"], batch["depth"],
                               tolerance=model.depth_tolerance)
            seen = torch.zeros_like(truth, dtype=torch.bool).index_fill(0, links.point, True)
            rows = seen & (truth != IGNORE)
            data.setdefault((split, "segment"), []).append(truth[rows])
            for name, tower in towers.items():
                levels = [sample_views(level, links, [side * stride for side in level.shape[:1:-1]], len(voxels))[0]
                          for level, stride in zip(tower.encode(batch["image"], batch["depth"]), tower.visual.strides)]
                data.setdefault((split, name), []).append(torch.cat(levels, 1)[rows])
            if split == "val":
                found = model(batch)["logits"].argmax(1)
                pairs = truth.cpu(), found.cpu()
                judged["voxels"].append(pairs)
                judged["perfect"].append((truth.cpu(), truth.where(seen, found).cpu()))
                for name, part in (("seen", seen.cpu()), ("unseen", ~seen.cpu())):
                    judged[name].append(tuple(labels[part] for labels in pairs))
    data = {key: torch.cat(value) for key, value in data.items()}

    def fit(name, target):
        """The val scenes' target as ridge regression on this tower's features tells it."""
        mean, std = data["train", name].mean(0), data["train", name].std(0).clamp(min=1e-6)
        known, asked = (F.pad((data[split, name] - mean) / std, (0, 1), value=1).double() for split in ("train", "val"))
        gram = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1], dtype=known.dtype, device=device)
        return asked @ torch.linalg.solve(gram, known.T @ target.double())

    classes, truth = torch.arange(NUM_CLASSES, device=device), data["val", "segment"].cpu()
    judged |= {name: [(truth, fit(name, data["train", "segment"][:, None] == classes).argmax(1).cpu())]
               for name in towers}
    result = {name: semantic_iou(pairs, range(NUM_CLASSES))["miou"] for name, pairs in judged.items()}
    if "before" in towers:
        target = data["val", "before"].double()
        lost = (fit("after", data["train", "before"]) - target).square().mean(0) / target.var(0).clamp(min=1e-12)
        result["kept"] = 1 - lost.mean().item()
    return {name: round(float(value), 4) for name, value in result.items()}


if __name__ == "__main__":
    for checkpoint in sys.argv[1:] or sys.exit(__doc__):
        print(checkpoint, json.dumps(probe(checkpoint)), flush=True)
