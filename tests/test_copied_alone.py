"""fusion.py, losses.py, stages.py, metrics.py, guard.py and ranks.py work when copied alone into an empty folder;
tower.py does beside clip_small.json, and needs open_clip."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
OTHERS = ("spconv", "open_clip", "torchvision", "matplotlib")  # none of the six may need these

CALLS = {
    "fusion": """
points, depth = torch.tensor([[0.0, 0, 1], [0, 0, -1]]), torch.ones(1, 4, 4)
intrinsics = torch.tensor([[[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]])
links = fusion.link_views(points, torch.eye(4)[None], intrinsics, depth)
feat_2d, seen = fusion.sample_views(torch.ones(1, 3, 2, 2), links, (4, 4), 2)
assert seen.tolist() == [True, False]
feat_2d, feat_3d = fusion.Standardise(3, 8)(feat_2d), fusion.Standardise(5, 8)(torch.randn(2, 5))
feat_2d, feat_3d = fusion.FiLM(8)(feat_2d, feat_3d, points, points)
alpha = fusion.LiteFusionGate(8)(feat_2d, feat_3d, seen)
assert fusion.blend(feat_2d, feat_3d, alpha).shape == (2, 8)
""",
    "losses": """
logits, index = torch.randn(6, 3, requires_grad=True), torch.zeros(6, dtype=torch.long)
terms = {"semantic": losses.semantic_loss(logits, torch.arange(6) % 3, index, 1),
         "alignment": losses.alignment_loss(logits, torch.randn(6, 3), index == 0, index, 1)}
losses.weighted_sum(terms, losses.LOSS_WEIGHTS["bifusion"]).backward()
assert logits.grad.any()
""",
    "stages": """
class Model(torch.nn.Linear):
    def parts(self):
        return {"3d": list(self.parameters())}
model = Model(2, 1)
setting = stages.setting_at(30)
stages.apply_setting(model, setting)
optimizer = torch.optim.SGD(stages.parameter_groups(model, 0.1, 0.0))
stages.set_rates(optimizer, setting, 0.1)
model(torch.ones(1, 2)).sum().backward()
assert stages.clip_by_branch(model, setting.clip)["3d"] > 0
""",
    "metrics": """
result = metrics.semantic_iou([(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))], [0, 1])
assert abs(result["miou"] - 0.5) < 1e-12
""",
    "ranks": """
@ranks.joined()
def main():
    loss = ranks.wrap(torch.nn.Linear(2, 1))(torch.ones(1, 2)).sum()
    return ranks.mean([loss.item()]), ranks.gather(ranks.rank())
assert ranks.use("cpu").type == "cpu" and main()[1] == [0]
""",
    "guard": """
model = torch.nn.BatchNorm1d(2)
keeper = guard.Guard(model, "skipped.jsonl")
keeper.remember()
assert not guard.all_finite(model(torch.full((3, 2), float("nan"))).flatten().tolist())
keeper.restore()
assert not model.running_mean.any() and model.num_batches_tracked == 0
assert keeper.first_not_finite({"x": torch.tensor(float("inf"))}, None) == "input x"

plain = torch.nn.Linear(2, 1)  # without buffers
keeper = guard.Guard(plain, "skipped.jsonl")
keeper.remember()
keeper.restore()
assert keeper.first_not_finite({}, lambda batch: {"loss": plain(torch.full((1, 2), float("nan")))}) == "output of "

class Rotary(torch.nn.Module):  # a table for the last image size beside statistics
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))
    def forward(self, x):
        if len(x) != len(self.table):
            self.table = torch.arange(float(len(x)))
        self.mean += x.mean()
        return x + self.table
rotary = Rotary()
keeper = guard.Guard(rotary, "skipped.jsonl")
for size in (3, 4, 4):
    keeper.remember()
    rotary(torch.full((size,), float("nan")))
    keeper.restore()
    assert rotary.table.tolist() == list(range(size)) and rotary.mean == 0
rotary(torch.ones(4))
keeper.remember()
rotary.table += 1
rotary(torch.ones(4))
keeper.restore()
assert rotary.table.tolist() == [0, 1, 2, 3] and rotary.mean == 1
""",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_file_copied_alone_works_and_needs_neither_siblings_nor_spconv_nor_open_clip(name, tmp_path):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, {name}
assert {name}.__file__.startswith({str(tmp_path)!r})
{CALLS[name]}
loaded = [other for other in {OTHERS!r} if other in sys.modules]
assert not loaded, f"{name}.py brings {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_the_image_tower_works_beside_clip_small_json_alone(tmp_path):
    for name in ("tower.py", "clip_small.json"):
        shutil.copy(HERE / name, tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from tower import SCRATCH, ClipTower, build_visual
visual, mean, std = build_visual("clip_small", SCRATCH)
tower = ClipTower(visual, out_channels=32, mean=mean, std=std)
maps = tower(torch.zeros(2, 3, 48, 64, dtype=torch.uint8), torch.ones(2, 48, 64))
assert maps.shape == (2, 32, 48 // tower.stride, 64 // tower.stride)
assert "spconv" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
