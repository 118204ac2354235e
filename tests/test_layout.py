"""A file of floor 0 works when copied alone into an empty folder, and imports go down the floors of the layout."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
FLOORS = (
    "fusion losses stages metrics guard runs tower scenes.folder scenes.points scenes.augment "
    "scenes.furniture scenes.generate",  # import no sibling
    "model data scenes.frames scenes.boxes scenes.scan scenes.scannet scenes.picture",
    "scenes.rooms",
    "train",
    "predict",
    "scenes.submit",  # and all of experiments/, which alone may import each other
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules.split()}

LEAN = ("spconv", "open_clip", "torchvision", "matplotlib", "PIL", "plyfile")  # not needed where torch is enough
NEEDS_NOT = {"tower": ("spconv", "matplotlib", "plyfile"), "folder": ("torch", "scipy", "matplotlib", "plyfile"),
             "points": ("torch", "PIL", "plyfile", "matplotlib")}
CALLS = {
    "fusion.py": """
points, depth = torch.tensor([[0.0, 0, 1], [0, 0, -1]]), torch.ones(1, 4, 4)
intrinsics = torch.tensor([[[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]])
links = fusion.link_views(points, torch.eye(4)[None], intrinsics, depth)
feat_2d, seen = fusion.sample_views(torch.ones(1, 3, 2, 2), links, (4, 4), 2)
assert seen.tolist() == [True, False]
feat_2d, feat_3d = fusion.Standardise(3, 8)(feat_2d), fusion.Standardise(5, 8)(torch.randn(2, 5))
feat_2d, feat_3d = fusion.FiLM(8)(feat_2d, feat_3d, points, points)
assert fusion.blend(feat_2d, feat_3d, fusion.LiteFusionGate(8)(feat_2d, feat_3d, seen)).shape == (2, 8)
""",
    "losses.py": """
logits, index = torch.randn(6, 3, requires_grad=True), torch.zeros(6, dtype=torch.long)
terms = {"semantic": losses.semantic_loss(logits, torch.arange(6) % 3, index, 1),
         "alignment": losses.alignment_loss(logits, torch.randn(6, 3), index == 0, index, 1)}
losses.weighted_sum(terms, losses.LOSS_WEIGHTS["bifusion"]).backward()
assert logits.grad.any()
""",
    "stages.py": """
class Model(torch.nn.Linear):
    def parts(self):
        return {"3d": list(self.parameters())}
model, row = Model(2, 1), stages.row_at(stages.curriculum(compress=2), 15)
stages.apply_row(model, row)
optimizer = torch.optim.SGD(stages.parameter_groups(model, 0.1, 0.0))
stages.set_rates(optimizer, row, 0.1)
model(torch.ones(1, 2)).sum().backward()
assert stages.clip_by_branch(model, row.clip)["3d"] > 0
""",
    "metrics.py": """
result = metrics.semantic_iou([(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))], [0, 1])
assert abs(result["miou"] - 0.5) < 1e-12
""",
    "runs.py": """
@runs.joined()
def main():
    run, model = runs.Run("run"), torch.nn.BatchNorm1d(2)
    runs.share_batch_norms(model)
    model(torch.randn(3, 2)).sum().backward()
    runs.average_gradients(model)
    run.start({"lr": 1})
    run.save({"model": model.state_dict()} | dict.fromkeys(("optimizer", "row", "ramp", "config")) | {"next": [0, 1]},
             runs.use("cpu"))
    run.append({"epoch": 0, "loss": runs.mean([1.0])[0]})
    assert runs.read_log("run/log.jsonl") == [{"epoch": 0, "loss": 1.0}] and run.reached() == 0
    assert runs.read_checkpoint("run/last.pt")["model"].keys() == model.state_dict().keys()
    assert list(runs.Stop().until([1, 2], agree=True)) == [1, 2] and runs.commit() is None  # no repository here
    return runs.gather(runs.rank())
assert main() == [0]
""",
    "guard.py": """
model = torch.nn.BatchNorm1d(2)
keeper = guard.Guard(model, "skipped.jsonl")
keeper.remember()
assert not keeper.accepts(model(torch.full((3, 2), float("nan"))).flatten().tolist())
keeper.restore()
assert not model.running_mean.any() and model.num_batches_tracked == 0
assert keeper.first_not_finite({"x": torch.tensor(float("inf"))}, None) == "input x"
plain = torch.nn.Linear(2, 1)  # without buffers
keeper = guard.Guard(plain)
keeper.remember()
keeper.restore()
assert keeper.first_not_finite({}, lambda batch: {"loss": plain(torch.full((1, 2), float("nan")))}) == "output of "
model.register_buffer("table", torch.zeros(1))  # for the last image size; the forward puts another in its place
keeper = guard.Guard(model)
for size in (3, 4, 4):
    keeper.remember()
    model.table = model.table if len(model.table) == size else torch.arange(float(size))
    model(torch.full((3, 2), float("nan")))
    keeper.restore()
    assert model.table.tolist() == list(range(size)) and not model.running_mean.any()
""",
    "tower.py": """
visual, mean, std = tower.build_visual(tower.LITE0[0], tower.SCRATCH)
images = tower.ClipTower(visual, out_channels=32, mean=mean, std=std)
maps = images(torch.zeros(2, 3, 48, 64, dtype=torch.uint8), torch.ones(2, 48, 64))
assert maps.shape == (2, 32, 48 // images.stride, 64 // images.stride)
""",
    "scenes/folder.py": """
np.save("scan.npy", np.random.rand(9, 6))
assert folder.read_scan("scan.npy")[0]["coord"].shape == (9, 3)
""",
    "scenes/points.py": """
scene, notes = points.complete({"coord": np.random.rand(50, 3), "normal": None, "superpoint": None})
assert len(notes) == 2 and len(points.voxelise(scene["coord"], 2.0)[0]) == 1
""",
}
TORCH = [path for path in CALLS if not path.startswith("scenes")]  # in one process: torch takes seconds to import


@pytest.mark.parametrize("paths", [TORCH, ["scenes/folder.py"], ["scenes/points.py"]], ids=" ".join)
def test_a_file_copied_alone_works_and_needs_neither_siblings_nor_what_others_need(paths, tmp_path):
    code = f"import os, sys, {'torch' if paths is TORCH else 'numpy as np'}\n"
    for path in paths:
        name = Path(path).stem
        (folder := tmp_path / name).mkdir()
        shutil.copy(HERE / path, folder)
        code += f"""
os.chdir({str(folder)!r})
sys.path.insert(0, {str(folder)!r})
import {name}
assert {name}.__file__.startswith({str(folder)!r})
{CALLS[path]}
loaded = [other for other in {NEEDS_NOT.get(name, LEAN)!r} if other in sys.modules]
assert not loaded, f"{name}.py brings {{loaded}}"
sys.path.remove({str(folder)!r})
del sys.modules[{name!r}], {name}  # no other file finds it
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


SOURCES = {".".join(path.relative_to(HERE).with_suffix("").parts): path for folder in (".", "scenes", "experiments")
           for path in HERE.joinpath(folder).glob("*.py") if path.name not in ("conftest.py", "test_stability.py")}


def siblings(module):
    """Modules of this project that a file imports anywhere in it, within functions too: set of str."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & SOURCES.keys()


def test_every_file_has_a_floor_and_imports_go_down_the_floors_and_never_in_a_circle():
    def walk(module, way):
        if module in way:
            wrong.append(" imports ".join((*way[way.index(module):], module)))
        elif module not in done:
            for other in siblings(module):
                walk(other, (*way, module))
            done.add(module)

    extra = {module for module in SOURCES if not module.startswith("experiments.")} ^ FLOOR.keys()
    assert not extra, f"too many or missing, on no floor of this test: {sorted(extra)}"
    done, wrong, floor = set(), [], {module: FLOOR.get(module, len(FLOORS) - 1) for module in SOURCES}
    for module in sorted(SOURCES):
        walk(module, ())
        wrong += [f"{module} (floor {floor[module]}) imports {other} (floor {floor[other]})"
                  for other in siblings(module) if floor[other] >= floor[module]
                  and not (module.startswith("experiments.") and other.startswith("experiments."))]
    assert not wrong, "\n".join(wrong)
    assert siblings("train") >= {"runs", "data", "model", "stages", "scenes.folder", "scenes.boxes"}  # the walk works
