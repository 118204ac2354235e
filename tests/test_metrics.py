"""metrics.py: IoU and AP against the reference vectors and slow loops, edges, errors."""

import copy
import json
import math
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from metrics import MIN_REGION, InstanceAP, instance_ap, iou_of, semantic_iou

VECTORS = Path(__file__).parent / "metric_vectors"
CASES = [f"p{number:02}" for number in range(1, 9)]


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
    iou = [expected["per_class"][name]["iou"] for name in expected["classes"]]
    iou = [math.nan if value is None else value for value in iou]
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


def watched(make, kept, count=6):
    """Scenes, dicts of arrays from make(), one at a time; fails where one but the last `kept` ones is still held."""
    scenes = []  # weak references to the arrays of each
    for _ in range(count):
        scene = make()
        scenes.append([weakref.ref(array) for array in scene.values()])
        yield scene
        del scene
        assert all(ref() is None for references in scenes[:len(scenes) - kept] for ref in references)


def test_scenes_are_streamed_one_at_a_time():
    scenes = watched(lambda: {"gt": np.zeros(10, dtype=np.int64), "pred": np.zeros(10, dtype=np.int64)}, kept=1)
    assert semantic_iou(map(dict.values, scenes), [0, 1])["confusion"][0, 0] == 60


def test_neither_the_order_of_points_and_scenes_nor_torch_in_place_of_numpy_matters():
    scenes = random_scenes(3, range(4))
    gt, pred = (np.concatenate(part)[::-1].copy() for part in zip(*scenes))
    as_torch = torch.from_numpy(gt), torch.from_numpy(pred).to(torch.int16)
    for other in ((gt, pred), as_torch):
        np.testing.assert_array_equal(semantic_iou(scenes, range(4))["confusion"],
                                      semantic_iou([other], range(4))["confusion"])


def test_a_sum_of_confusion_matrices_gives_the_iou_over_all_scenes():
    scenes = list(random_scenes(0, range(4)))
    parts = [semantic_iou(part, range(4))["confusion"] for part in (scenes[:1], scenes[1:], [])]
    for key, value in iou_of(sum(parts)).items():
        np.testing.assert_array_equal(value, semantic_iou(scenes, range(4))[key])


def test_what_is_outside_the_classes_is_a_false_negative_or_ignored_and_an_absent_class_is_left_out_of_the_mean():
    result = semantic_iou([([0, 0, 1, 1, -1, 9], [0, -1, 1, 1, 0, 1])], [0, 1, 2])
    assert result["iou"][:2].tolist() == [0.5, 1.0] and math.isnan(result["iou"][2]) and result["miou"] == 0.75
    assert result["confusion"].tolist() == [[1, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0]]


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


def reference_scenes(case):
    """The scenes of a reference case, one at a time, as instance_ap takes them."""
    arrays = np.load(VECTORS / f"{case}.npz")
    for k in range(int(arrays["n_scenes"])):
        gt = arrays[f"s{k}_gt"]
        masks = np.unpackbits(arrays[f"s{k}_masks_packed"], axis=1)[:, :len(gt)].astype(bool)
        yield {"gt": gt, "masks": masks, "labels": arrays[f"s{k}_pred_label"], "scores": arrays[f"s{k}_pred_conf"]}


def slow_instance_counts(scenes, class_ids, min_region):
    """Matching by sets of points, one Python step each: {(class, overlap): (hits, false alarms, ids of the missed)}."""
    overlaps = [0.5, 0.55, 0.6000000000000001, 0.6500000000000001, 0.7000000000000002, 0.7500000000000002,
                0.8000000000000003, 0.8500000000000003, 0.9000000000000004, 0.25]
    counts = {(c, t): ([], [], []) for c in class_ids for t in overlaps}
    for scene in scenes:
        truth, void = {}, set()
        for point, i in enumerate(scene["gt"].tolist()):
            if i // 1000 in class_ids:
                truth.setdefault(i, set()).add(point)
            else:
                void.add(point)
        found = [(label, score, set(np.flatnonzero(mask).tolist()))
                 for mask, label, score in zip(scene["masks"], scene["labels"].tolist(), scene["scores"].tolist())]
        for (c, threshold), (hits, false_alarms, missed) in counts.items():
            own = {i: points for i, points in sorted(truth.items()) if i // 1000 == c}
            mine = [(score, points) for label, score, points in found if label == c and len(points) >= min_region]
            visited = set()
            for i, points in own.items():
                if len(points) < min_region:
                    continue
                matched = []
                for number, (score, member) in enumerate(mine):
                    if number not in visited and len(points & member) / len(points | member) > threshold:
                        if not matched:
                            visited.add(number)
                        matched.append(score)
                hits += sorted(matched)[-1:]
                false_alarms += sorted(matched)[:-1]
                missed += [] if matched else [i]
            for score, member in mine:
                if any(len(points & member) / len(points | member) > threshold for points in own.values()):
                    continue
                ignored = len(void & member) + sum(len(p & member) for p in own.values() if len(p) < min_region)
                if ignored / len(member) <= threshold:
                    false_alarms.append(score)
    return counts


def slow_average_precision(hits, false_alarms, missed):
    """AP point by point."""
    total = len(hits) + len(missed)
    if total == 0:
        return math.nan
    if not hits + false_alarms:
        return 0.0
    curve = []
    for u in sorted(set(hits + false_alarms)):
        tp, fp = sum(score >= u for score in hits), sum(score >= u for score in false_alarms)
        curve.append((tp / (tp + fp), tp / total))
    curve.append((1.0, 0.0))
    recall = [curve[0][1], *(r for _, r in curve), 0.0]
    return sum(precision * (recall[i] - recall[i + 2]) / 2 for i, (precision, _) in enumerate(curve))


def instance_scenes(seed, class_ids, count=2):
    """Small scenes in which everything happens: duplicates, splits, ties, void, small and empty ones, other classes."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n, p = int(rng.integers(0, 120)), int(rng.integers(0, 14))
        ids = [c * 1000 + i for c in [*class_ids, 1] for i in rng.integers(0, 6, 2)]
        gt = np.repeat(rng.choice([*ids, 0, 7, 999, -1, -3001, 250_000], 40), rng.integers(1, 14, 40))[:n]
        n, masks = len(gt), np.zeros((p, len(gt)), dtype=bool)
        labels = rng.choice([*class_ids, class_ids[0], 1], p)
        for row in range(p if n else 0):
            i = rng.choice(gt)
            masks[row] = (gt == i) & (rng.random(n) > rng.choice([0, 0.1, 0.4]))
            start = rng.integers(n)
            masks[row, start:start + rng.integers(0, 12)] ^= True
            if i // 1000 in class_ids and rng.random() < 0.8:
                labels[row] = i // 1000
        yield {"gt": gt, "masks": masks, "labels": labels, "scores": rng.integers(-2, 6, p) / 2}


def one_class(sizes, members, scores=None):
    """AP of class 5 at 0.25 to 0.9 for true instances of these sizes (None: void) and masks of [start, end) points."""
    gt = np.concatenate([np.full(abs(size), 5001 + i if size > 0 else 0) for i, size in enumerate(sizes)])
    masks = np.array([(np.arange(len(gt)) >= a) & (np.arange(len(gt)) < b) for a, b in members], dtype=bool)
    evaluator = InstanceAP([5])
    evaluator.add(gt, masks.reshape(-1, len(gt)), np.full(len(members), 5),
                  np.arange(len(members))[::-1] if scores is None else np.array(scores))
    return evaluator


@pytest.mark.parametrize("case", CASES)
def test_instance_ap_meets_the_official_benchmark_and_its_counts_a_slow_loop(case):
    expected = json.loads((VECTORS / f"{case}.json").read_text())["instance"]
    result = instance_ap(reference_scenes(case), expected["class_ids"])
    np.testing.assert_array_equal(metrics.OVERLAPS, expected["overlaps"])
    np.testing.assert_allclose(result["ap"], np.load(VECTORS / f"{case}.npz")["ap"], rtol=0, atol=1e-9)  # NaN meets NaN
    per_class = [expected["per_class"][name] for name in expected["classes"]]
    for key, found in (("ap", result["ap_by_class"]), ("ap50", result["ap"][:, 0]), ("ap25", result["ap"][:, 9])):
        official = [math.nan if c[key] is None else c[key] for c in per_class]
        np.testing.assert_allclose(found, official, rtol=0, atol=1e-9)
        assert result[key.upper()] == pytest.approx(expected[f"all_{key}"], abs=1e-9)
    assert_same_counts(list(reference_scenes(case)), expected["class_ids"], MIN_REGION)


def hits_of(evaluator, row, column):
    """Sorted scores of the true instances that were found, and how many were missed."""
    truth = evaluator.truth[row, column]
    return sorted(score for score in truth if not math.isnan(score)), sum(map(math.isnan, truth))


def assert_same_counts(scenes, class_ids, min_region):
    """InstanceAP against the slow loop: counts exactly, AP to 1e-12."""
    evaluator = InstanceAP(class_ids)
    for scene in scenes:
        evaluator.add(**scene)
    ap = evaluator.result()["ap"]
    for (c, t), (hits, false_alarms, missed) in slow_instance_counts(scenes, class_ids, min_region).items():
        row, column = list(class_ids).index(c), metrics.OVERLAPS.tolist().index(t)
        assert hits_of(evaluator, row, column) == (sorted(hits), len(missed))
        assert sorted(evaluator.false_alarms[row, column]) == sorted(false_alarms)
        expected = slow_average_precision(hits, false_alarms, missed)
        np.testing.assert_allclose(ap[row, column], expected, rtol=0, atol=1e-12)


def test_instance_ap_agrees_with_a_slow_loop_on_small_scenes(monkeypatch):
    monkeypatch.setattr(metrics, "MIN_REGION", 6)
    for seed in range(150):
        assert_same_counts(list(instance_scenes(seed, [5, 3, 40])), [5, 3, 40], 6)


def test_shared_points_agree_with_a_slow_loop_and_ids_out_of_range_count_as_0():
    rng = np.random.default_rng(0)
    gt, masks = rng.choice([-7, 0, 3, 5001, 5002, 9_999_999, 10_000_000, 2**62], 900), rng.random((9, 900)) < 0.1
    ids, size, shared = metrics.overlaps(gt, masks)
    assert ids.tolist() == [0, 3, 5001, 5002, 9_999_999]
    known = np.where(np.isin(gt, ids), gt, 0)
    assert size.tolist() == [(known == i).sum() for i in ids]
    np.testing.assert_array_equal(shared, [[(mask & (known == i)).sum() for i in ids] for mask in masks])


def test_a_perfect_prediction_has_an_ap_of_one_and_an_iou_at_the_threshold_does_not_match():
    assert one_class([100, 150], [(0, 100), (100, 250)]).result()["AP"] == 1
    half = one_class([200], [(0, 100)]).result()  # IoU 0.5 exactly
    assert half["AP50"] == 0 and half["AP25"] == 1


def test_a_duplicate_gives_its_lower_score_to_a_false_positive_and_stays_free():
    evaluator = one_class([200], [(0, 200), (0, 200), (0, 199)], [0.2, 0.9, 0.5])
    assert evaluator.truth[0, 0] == [0.9] and sorted(evaluator.false_alarms[0, 0]) == [0.2, 0.5]
    # at 0.25 the second mask is a duplicate of the first instance, then the match of the second one
    evaluator = one_class([100, 100], [(0, 100), (40, 160)], [0.9, 0.5])
    assert evaluator.truth[0, 9] == [0.9, 0.5] and evaluator.false_alarms[0, 9] == [0.5]


def test_the_order_of_predictions_decides_what_is_matched():
    both, first = (40, 160), (0, 100)  # `both` overlaps either instance by 60 / 160
    in_order, reverse = (one_class([100, 100], order, [0.5, 0.5]) for order in ([first, both], [both, first]))
    assert hits_of(in_order, 0, 9) == ([0.5, 0.5], 0) and hits_of(reverse, 0, 9) == ([0.5], 1)


def test_a_prediction_on_void_or_small_instances_is_left_out():
    for sizes in ([-100, 200], [99, -1, 200]):  # void, or an instance of 99 points
        evaluator = one_class(sizes, [(0, 100)])
        assert not any(evaluator.false_alarms.values())
        assert all(hits_of(evaluator, 0, o) == ([], 1) for o in range(10))
    evaluator = one_class([-50, 200], [(0, 100)])  # 50 of 100 on void: not above 0.5, but above 0.25; IoU 0.2
    assert evaluator.false_alarms[0, 0] == [0] and evaluator.false_alarms[0, 9] == []


def test_predictions_and_instances_below_the_least_size_are_left_out():
    assert one_class([200], [(0, 99)]).result()["AP25"] == 0 and hits_of(one_class([200], [(0, 99)]), 0, 9) == ([], 1)
    assert one_class([200], [(0, 100)]).truth[0, 9] == [0]
    assert math.isnan(one_class([99], [(0, 99)]).result()["AP"])
    assert one_class([100], [(0, 100)]).result()["AP"] == 1


def test_precision_is_not_raised_to_its_envelope():
    evaluator = InstanceAP([5])
    evaluator.truth[0, 0], evaluator.false_alarms[0, 0] = [4.0, 2.0, 1.0], [3.0]
    # recall 1, 2/3, 1/3, 1/3, 0 at precision 3/4, 2/3, 1/2, 1, 1
    steps = np.array([1 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3]) / 2
    assert evaluator.result()["AP50"] == pytest.approx(float(steps @ [3 / 4, 2 / 3, 1 / 2, 1, 1]), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_empty_scenes_and_empty_masks_work():
    nothing = instance_ap([], [5, 6])
    assert nothing["ap"].shape == (2, 10) and np.isnan(nothing["ap"]).all() and np.isnan(nothing["ap_by_class"]).all()
    assert all(math.isnan(nothing[key]) for key in ("AP", "AP50", "AP25"))
    empty = {"gt": np.zeros(0, int), "masks": np.zeros((3, 0), bool), "labels": [5, 5, 6], "scores": [1, 2, 3]}
    blind = {"gt": np.full(100, 5001), "masks": np.zeros((0, 100), bool), "labels": [], "scores": []}
    no_member = {**blind, "masks": np.zeros((1, 100), bool), "labels": [5], "scores": [1.0]}
    assert math.isnan(instance_ap([empty], [5, 6])["AP"])
    for scenes in ([blind], [no_member], [empty, blind]):
        result = instance_ap(scenes, [5, 6])
        assert result["AP"] == 0 and np.isnan(result["ap"][1]).all()


def test_ids_outside_the_classes_are_void_whatever_they_are():
    for other in (0, 999, -1, -5000, 6001, 4999, 10_005_001, 2**62, -2**62):
        gt = np.array([5001] * 100 + [other] * 120)
        masks = np.stack([gt == 5001, gt == other])
        assert instance_ap([{"gt": gt, "masks": masks, "labels": [5, 5], "scores": [1, 2]}], [5])["AP"] == 1


def test_torch_and_strided_predictions_give_the_same_and_are_left_as_they_were():
    scenes = list(reference_scenes("p02"))
    as_torch = [{key: torch.from_numpy(array) for key, array in scene.items()} for scene in scenes]
    for scene in as_torch:
        scene["scores"].requires_grad_()
    before = copy.deepcopy(scenes)
    found, expected = instance_ap(as_torch, [3, 4, 5]), instance_ap(scenes, [3, 4, 5])
    np.testing.assert_array_equal(found["ap"], expected["ap"])
    strided = [{**scene, "masks": np.asfortranarray(scene["masks"])} for scene in scenes]
    np.testing.assert_array_equal(instance_ap(strided, [3, 4, 5])["ap"], expected["ap"])
    assert all(np.array_equal(scene[key], old[key]) for scene, old in zip(scenes, before) for key in scene)


def test_instance_scenes_are_streamed_and_only_scores_are_kept():
    def make():
        gt = np.repeat([5001, 5002], 5000)
        return {"gt": gt, "masks": (gt == 5001)[None], "labels": np.array([5]), "scores": np.array([1.0])}

    assert instance_ap(watched(make, kept=0), [5])["AP"] == pytest.approx(0.5)
    evaluator = InstanceAP([5])
    evaluator.add(**make())
    assert len(pickle.dumps(evaluator)) < 3000  # of 10,000 points a scene


@pytest.mark.parametrize("change, message", [
    ({"masks": np.ones((2, 5), bool)}, r"scene 0: masks must be \(P, 4\) bool.*\(2, 5\)"),
    ({"masks": np.ones(4, bool)}, r"masks must be \(P, 4\) bool"),
    ({"masks": np.ones((2, 4), np.uint8)}, "uint8"),
    ({"labels": [5]}, "2 masks, 1 labels and 2 scores"),
    ({"scores": [1.0, 2.0, 3.0]}, "2 masks, 2 labels and 3 scores"),
    ({"scores": [[1.0], [2.0]]}, r"scores must be \(P,\)"),
    ({"scores": ["a", "b"]}, r"scores must be \(P,\) numbers"),
    ({"scores": [1.0, math.nan]}, "no NaN"),
    ({"labels": [5.0, 5.0]}, r"labels must be \(P,\) integers"),
    ({"gt": [0.0, 1, 2, 3]}, r"gt must be \(N,\) integers"),
    ({"gt": [[0, 1, 2, 3]]}, r"gt must be \(N,\) integers"),
])
def test_a_wrong_instance_scene_is_named_and_not_counted(change, message):
    good = {"gt": [5001] * 4, "masks": np.ones((2, 4), bool), "labels": [5, 5], "scores": [1.0, 2.0]}
    evaluator = InstanceAP([5])
    with pytest.raises(ValueError, match=message):
        evaluator.add(**{**good, **change})
    evaluator.add(**good)
    assert evaluator.num_scenes == 1


def test_shares_of_the_scenes_merge_into_the_ap_over_all_of_them(monkeypatch):
    monkeypatch.setattr(metrics, "MIN_REGION", 6)
    scenes = list(instance_scenes(1, [5, 3, 40], count=30))
    whole = instance_ap(scenes, [5, 3, 40])
    assert 0 < whole["AP"] < 1
    shares = [InstanceAP([5, 3, 40]) for _ in range(3)]  # the last stays empty
    for i, scene in enumerate(scenes):
        shares[i % 2].add(**scene)
    first, *others = map(pickle.loads, map(pickle.dumps, shares))
    for other in others:
        first.merge(other)
    assert first.num_scenes == 30
    for key, value in first.result().items():
        np.testing.assert_array_equal(value, whole[key])
    with pytest.raises(ValueError, match="cannot merge AP over the classes"):
        first.merge(InstanceAP([5, 3]))


@pytest.mark.parametrize("bad, message", [([], "distinct"), ([3, 3], "distinct"), ([0, 1], "must lie in 1..9999"),
                                          ([10_000], "must lie in 1..9999")])
def test_class_ids_must_be_distinct_and_those_of_instances_in_range(bad, message):
    with pytest.raises(ValueError, match=message):
        InstanceAP(bad)
    if message == "distinct":
        with pytest.raises(ValueError, match=message):
            semantic_iou([], bad)
