"""metrics.py: semantic IoU against the reference vectors and a slow loop; every way in which a criterion can fail."""

import copy
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from metrics import criteria, semantic_iou

VECTORS = Path(__file__).parent / "metric_vectors"
CASES = sorted(path.stem for path in VECTORS.glob("p*.json"))


def slow_semantic_iou(scenes, class_ids):
    """The same as semantic_iou by one Python step a point: (confusion, iou)."""
    k = len(class_ids)
    confusion = [[0] * (k + 1) for _ in range(k)]
    for gt, pred in scenes:
        for g, p in zip(gt, pred):
            if g in class_ids:
                confusion[class_ids.index(g)][class_ids.index(p) if p in class_ids else k] += 1
    iou = []
    for c in range(k):
        tp = confusion[c][c]
        fn = sum(confusion[c]) - tp
        fp = sum(confusion[r][c] for r in range(k)) - tp
        iou.append(tp / (tp + fp + fn) if tp + fp + fn else math.nan)
    return np.array(confusion), np.array(iou)


def random_scenes(seed, class_ids, count=3, points=400):
    """Scenes with labels inside and outside the classes, negative ones too."""
    rng = np.random.default_rng(seed)
    pool = [*class_ids, -1, -100, 0, 13, 255]
    return [(rng.choice(pool, points), rng.choice(pool, points)) for _ in range(count)]


def test_there_are_eight_reference_cases():
    assert len(CASES) == 8


@pytest.mark.parametrize("case", CASES)
def test_semantic_iou_meets_the_official_benchmark(case):
    expected = json.loads((VECTORS / f"{case}.json").read_text())["semantic"]
    arrays = np.load(VECTORS / f"{case}.npz")
    ids = expected["class_ids"]
    scenes = ((arrays[f"s{k}_sem_gt"], arrays[f"s{k}_sem_pred"]) for k in range(int(arrays["n_scenes"])))
    result = semantic_iou(scenes, ids)

    official = arrays["confusion"]  # (41, 41), row and column = NYU40 id, column 40 = outside the classes
    np.testing.assert_array_equal(result["confusion"], official[np.ix_(ids, [*ids, 40])])
    assert official.sum() == result["confusion"].sum()  # nothing was counted in other rows or columns
    per_class = [expected["per_class"][name] for name in expected["classes"]]
    tp = np.diagonal(result["confusion"])
    assert tp.tolist() == [c["tp"] for c in per_class]
    union = result["confusion"].sum(1) + result["confusion"][:, :-1].sum(0) - tp
    assert union.tolist() == [c["union"] for c in per_class]
    iou = [math.nan if c["iou"] is None else c["iou"] for c in per_class]
    np.testing.assert_allclose(result["iou"], iou, rtol=0, atol=1e-9)  # NaN must meet NaN
    assert result["miou"] == pytest.approx(expected["miou_nanmean"], abs=1e-9)


@pytest.mark.parametrize("class_ids", [[0, 1, 2], [7, 3, 39, 1], [5], [-4, 200000]])
def test_semantic_iou_agrees_with_a_slow_loop(class_ids):
    scenes = random_scenes(1, class_ids)
    confusion, iou = slow_semantic_iou(scenes, class_ids)
    result = semantic_iou(scenes, class_ids)
    np.testing.assert_array_equal(result["confusion"], confusion)
    np.testing.assert_array_equal(result["iou"], iou)
    assert result["miou"] == pytest.approx(np.nanmean(iou))
    assert result["confusion"].dtype == np.int64


def test_torch_and_numpy_inputs_give_the_same():
    scenes = random_scenes(2, range(5))
    as_torch = [(torch.from_numpy(gt), torch.from_numpy(pred).to(torch.int16)) for gt, pred in scenes]
    as_int16 = [(gt.astype(np.int16), pred) for gt, pred in scenes]
    for other in (as_torch, as_int16):
        np.testing.assert_array_equal(semantic_iou(scenes, range(5))["iou"], semantic_iou(other, range(5))["iou"])


def test_scenes_are_streamed_one_at_a_time():
    earlier = []  # weak references to the ground truth of the scenes given so far

    def generate():
        for _ in range(6):
            gt = np.zeros(10, dtype=np.int64)
            earlier.append(weakref.ref(gt))
            yield gt, gt.copy()
            del gt
            held = [ref for ref in earlier[:-1] if ref() is not None]
            assert not held, "scenes before the last one are still held"

    assert semantic_iou(generate(), [0, 1])["confusion"][0, 0] == 60


def test_the_order_of_points_and_scenes_does_not_matter():
    scenes = random_scenes(3, range(4))
    gt, pred = (np.concatenate(part)[::-1] for part in zip(*scenes))
    np.testing.assert_array_equal(semantic_iou(scenes, range(4))["confusion"],
                                  semantic_iou([(gt, pred)], range(4))["confusion"])


def test_a_prediction_outside_the_classes_is_a_false_negative_and_no_false_positive():
    result = semantic_iou([(np.array([0, 0, 1, 1]), np.array([0, -1, 1, 1]))], [0, 1])
    assert result["iou"].tolist() == [0.5, 1.0]
    assert result["confusion"].tolist() == [[1, 0, 1], [0, 2, 0]]


def test_a_point_without_a_class_in_the_ground_truth_is_ignored_whatever_is_predicted():
    assert semantic_iou([(np.array([0, -1, 9]), np.array([0, 0, 1]))], [0, 1])["confusion"].sum() == 1


def test_an_absent_class_is_nan_and_left_out_of_the_mean():
    result = semantic_iou([(np.array([0, 0]), np.array([0, -1]))], [0, 1])
    assert result["iou"][0] == 0.5 and math.isnan(result["iou"][1])
    assert result["miou"] == 0.5


@pytest.mark.filterwarnings("error")
def test_no_scene_and_an_empty_scene_give_nan_without_a_warning():
    for scenes in ([], [(np.array([]), np.array([]))], [(np.array([-1]), np.array([0]))]):
        result = semantic_iou(scenes, [0, 1])
        assert np.isnan(result["iou"]).all() and math.isnan(result["miou"])


@pytest.mark.parametrize("gt, pred, message", [
    ([0, 1], [0], "scene 0: gt has 2 points, pred has 1"),
    ([[0]], [[0]], "must be \\(N,\\) integers"),
    ([0.0, 1.0], [0, 1], "gt must be \\(N,\\) integers"),
    ([0], [0.5], "pred must be \\(N,\\) integers"),
])
def test_wrong_labels_are_named(gt, pred, message):
    with pytest.raises(ValueError, match=message):
        semantic_iou([(np.array(gt), np.array(pred))], [0, 1])


def test_repeated_class_ids_are_refused():
    with pytest.raises(ValueError, match="distinct"):
        semantic_iou([], [1, 1])


# ---------------------------------------------------------------------------------------------------------- criteria


def make_log(epochs=40, ramp_from=10, miou=0.5, ratio=0.5):
    """A clean log: fusion ramps in over four epochs from ramp_from on."""
    return [{
        "epoch": e, "loss": 1.0, "losses": {"semantic": 0.6, "alignment": 0.4}, "grad_norm": {"3d": 1.0, "2d": 0.1},
        "skipped_steps": 0, "val_miou": miou * (e + 1) / epochs,
        "fusion_ramp": min(1.0, max(0, e - ramp_from) / 4), "fusion_2d_ratio": ratio if e >= ramp_from else None,
    } for e in range(epochs)]


def verdict(name, log, baseline_log=None):
    """The entry of one criterion."""
    return {entry["name"]: entry for entry in criteria(log, baseline_log)}[name]


def test_a_clean_run_above_its_baseline_passes_all_three():
    entries = criteria(make_log(), make_log(miou=0.4))
    assert [(e["name"], e["passed"]) for e in entries] == [("stability", True), ("performance", True), ("fusion", True)]
    assert "0.5000" in entries[1]["figure"] and "+0.1000" in entries[1]["figure"]


@pytest.mark.parametrize("change", [
    {"loss": None}, {"loss": math.nan}, {"loss": math.inf}, {"losses": {"semantic": 0.5, "alignment": None}},
    {"grad_norm": {"3d": None}}, {"skipped_steps": 1},
])
@pytest.mark.parametrize("epoch", [0, 30, 39])
def test_stability_fails_on_one_bad_epoch_even_beside_a_long_streak(change, epoch):
    log = make_log()
    log[epoch].update(change)
    entry = verdict("stability", log)
    assert entry["passed"] is False
    assert f"epoch {epoch}:" in entry["detail"]
    assert "39 of 40" in entry["figure"]


@pytest.mark.parametrize("key", ["loss", "skipped_steps"])
def test_stability_fails_where_the_log_does_not_say(key):
    log = make_log()
    del log[5][key]
    assert verdict("stability", log)["passed"] is False


@pytest.mark.parametrize("missing", [0, 25])
def test_stability_fails_on_a_missing_epoch(missing):
    log = make_log()
    del log[missing]
    entry = verdict("stability", log)
    assert entry["passed"] is False
    assert f"epoch {missing}: missing" in entry["detail"]


def test_a_missing_epoch_breaks_the_streak():
    log = make_log()
    del log[25]
    assert "longest streak 25 " in verdict("stability", log)["figure"]


@pytest.mark.parametrize("epochs, passed", [(19, False), (20, True), (1, False)])
def test_stability_needs_twenty_epochs(epochs, passed):
    entry = verdict("stability", make_log(epochs))
    assert entry["passed"] is passed
    assert passed or "too short" in entry["detail"]


@pytest.mark.parametrize("baseline_miou, passed", [(0.5, False), (0.6, False), (0.49, True)])
def test_performance_needs_more_than_the_baseline(baseline_miou, passed):
    assert verdict("performance", make_log(), make_log(miou=baseline_miou))["passed"] is passed


def test_performance_compares_the_last_evaluated_epoch_and_not_the_best():
    log, baseline_log = make_log(miou=0.5), make_log(miou=0.6)
    log[20]["val_miou"], baseline_log[20]["val_miou"] = 0.9, 0.8
    entry = verdict("performance", log, baseline_log)
    assert entry["passed"] is False
    assert "0.5000 at epoch 39, baseline 0.6000" in entry["figure"]


def test_performance_fails_as_not_comparable_when_the_last_epochs_differ():
    entry = verdict("performance", make_log(), make_log(30, miou=0.1))
    assert entry["passed"] is False and entry["figure"] == "not comparable"
    assert "epoch 39" in entry["detail"] and "epoch 29" in entry["detail"]


def test_performance_cannot_be_judged_without_a_baseline_or_without_an_evaluation():
    assert verdict("performance", make_log())["passed"] is None
    blind = [{**entry, "val_miou": None} for entry in make_log()]
    assert verdict("performance", make_log(), blind)["passed"] is None
    assert verdict("performance", blind, make_log())["passed"] is None


@pytest.mark.parametrize("ratio, passed", [(0.29, False), (0.71, False), (0.2999, False), (None, False),
                                           (math.nan, False), (0.3, True), (0.7, True)])
@pytest.mark.parametrize("epoch", [14, 25, 39])
def test_fusion_is_judged_at_every_epoch_after_the_ramp(ratio, passed, epoch):
    log = make_log()
    assert log[14]["fusion_ramp"] == 1 and log[13]["fusion_ramp"] < 1
    log[epoch]["fusion_2d_ratio"] = ratio
    entry = verdict("fusion", log)
    assert entry["passed"] is passed
    assert passed or f"epoch {epoch}: {ratio}" in entry["detail"]


def test_fusion_is_not_judged_during_the_ramp():
    log = make_log()
    log[11]["fusion_2d_ratio"] = 0.05
    assert verdict("fusion", log)["passed"] is True
    assert "over 26 epochs" in verdict("fusion", log)["figure"]


def test_fusion_cannot_be_judged_without_an_epoch_after_the_ramp():
    assert verdict("fusion", make_log(12))["passed"] is None  # ends within the ramp
    baseline = [{k: v for k, v in entry.items() if not k.startswith("fusion")} for entry in make_log()]
    assert verdict("fusion", baseline)["passed"] is None


def test_fusion_fails_when_no_view_ever_sees_a_voxel():
    judged = verdict("fusion", make_log(ratio=None))  # the ramp is over, and there is nothing to fuse
    assert judged["passed"] is False
    assert "no voxel was seen" in judged["figure"]


def test_criteria_refuse_an_empty_log_and_a_repeated_epoch():
    log = make_log()
    for bad in ([], [*log, log[-1]], log[::-1]):
        with pytest.raises(ValueError, match="ascending epochs"):
            criteria(bad)
        with pytest.raises(ValueError, match="baseline_log"):
            criteria(log, bad)


def test_criteria_leave_the_log_as_it_was():
    log = make_log()
    before = copy.deepcopy(log)
    criteria(log, make_log(30))
    assert log == before


def test_metrics_works_copied_alone_into_an_empty_folder(tmp_path):
    shutil.copy(metrics.__file__, tmp_path)
    code = "import metrics, numpy as np; print(metrics.semantic_iou([(np.array([1]), np.array([1]))], [1])['miou'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1.0"
