"""Metrics of a run: mIoU and AP as the ScanNet benchmark computes them, and three success criteria read from a log.

Needs numpy only (torch tensors are taken as they come) and imports no other file of this project: copy it and it works.

    result = semantic_iou(((gt, pred) for gt, pred in scenes), class_ids)   # streams, one bincount a scene
    result = instance_ap(scenes, class_ids)   # scenes: dicts of gt, masks, labels, scores; InstanceAP takes them singly
    for entry in criteria(log, baseline_log):                               # log: one dict an epoch, see `criteria`
        print(entry["name"], entry["figure"], entry["passed"])

Axes: N points of a scene, K classes, P predicted instances, G ground-truth instances.

Source: ScanNet's BenchmarkScripts/3d_evaluation (Dai et al. 2017) for what is counted; written from its rules.
"""

import math
from itertools import pairwise

import numpy as np

MIN_STABLE_EPOCHS = 20  # consecutive epochs without a non-finite loss or gradient
OVERLAPS = np.append(np.arange(0.5, 0.95, 0.05), 0.25)  # IoU thresholds, exactly these doubles: 0.5 to 0.9, then 0.25
MIN_REGION = 100  # points; smaller predictions are left out, smaller true instances need not be found
MAX_TABLE = 2**21  # largest span of ids for which a table replaces a sort
FUSION_BAND = (0.3, 0.7)  # where fusion_2d_ratio must stay once the ramp is over, both ends included


# ---------------------------------------------------------------------------------------------- semantic segmentation


def semantic_iou(scenes, class_ids):
    """IoU of every class and their mean, over all points of all scenes together, as the ScanNet benchmark counts.

    Points whose ground truth is not one of the classes are ignored. A prediction that is not one of the classes is
    wrong: it counts as a false negative of the true class and as a false positive of none.

    Args:
        scenes:    iterable (a generator will do, one scene is held at a time) of (gt, pred), each (N,) integer class
                   ids, numpy or torch; any integers, negative ones too. N may be 0.
        class_ids: K distinct integers: range(K), or data.NYU40_IDS.

    Returns:
        dict with
        confusion: (K, K + 1) int64, rows ground truth and columns prediction in the order of class_ids; the last
                   column counts predictions that are not one of the classes.
        iou:       (K,) float64, TP / (TP + FP + FN); NaN where that denominator is 0.
        miou:      float, mean of the IoUs that are not NaN; NaN if all are.

    Raises:
        ValueError: a class id twice; gt and pred of different length, not one-dimensional or not integers.
    """
    class_ids = _as_class_ids(class_ids)  # (K,)
    k = len(class_ids)
    order = np.argsort(class_ids)
    confusion = np.zeros((k, k + 1), dtype=np.int64)
    for number, (gt, pred) in enumerate(scenes):
        gt, pred = _as_ids(gt, "gt", number), _as_ids(pred, "pred", number)
        if len(gt) != len(pred):
            raise ValueError(f"scene {number}: gt has {len(gt)} points, pred has {len(pred)}; one label a point")
        row, column = _class_index(gt, class_ids, order), _class_index(pred, class_ids, order)  # (N,) 0..K, K = none
        cell = (row * (k + 1) + column)[row < k]
        confusion += np.bincount(cell, minlength=k * (k + 1)).reshape(k, k + 1)

    return iou_of(confusion)


def iou_of(confusion):
    """What `semantic_iou` returns, of a confusion matrix (K, K + 1) as it makes it, or of a sum of such."""
    k = len(confusion)
    tp = np.diagonal(confusion)  # (K,)
    union = confusion.sum(1) + confusion[:, :k].sum(0) - tp  # TP + FN + FP
    iou = np.where(union > 0, tp / np.maximum(union, 1), np.nan)
    miou = float(iou[union > 0].mean()) if union.any() else math.nan
    return {"confusion": confusion, "iou": iou, "miou": miou}


def _as_array(values):
    """Numpy array of a numpy array, torch tensor (any device) or list; no copy where that is possible."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _as_ids(values, what, number, axis="N"):
    """(N,) int64 numpy array of what _as_array takes."""
    values = _as_array(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"scene {number}: {what} must be ({axis},) integers, got {values.shape} {values.dtype}")
    return values.astype(np.int64, copy=False)


def _as_class_ids(class_ids):
    """(K,) int64 of distinct integers."""
    class_ids = np.asarray(list(class_ids), dtype=np.int64)
    if len(class_ids) == 0 or len(np.unique(class_ids)) != len(class_ids):
        raise ValueError(f"class_ids must be one or more distinct integers, got {class_ids.tolist()}")
    return class_ids


def _class_index(ids, class_ids, order):
    """Position of every id in class_ids, K where it is none of them; order is the argsort of class_ids."""
    k = len(class_ids)
    position = order[np.searchsorted(class_ids, ids, sorter=order).clip(max=k - 1)]
    return np.where(class_ids[position] == ids, position, k)


# ---------------------------------------------------------------------------------------------- instance segmentation


def instance_ap(scenes, class_ids):
    """Average precision of predicted instances, as the ScanNet benchmark counts: `InstanceAP` over all scenes.

    Args:
        scenes:    iterable (a generator will do, one scene is held at a time) of dicts with gt, masks, labels and
                   scores as in `InstanceAP.add`; other keys are not read.
        class_ids: K distinct integers from 1 up: data.NYU40_IDS without wall and floor.

    Returns, raises: as `InstanceAP.result`, `InstanceAP` and `InstanceAP.add`.
    """
    evaluator = InstanceAP(class_ids)
    for scene in scenes:
        evaluator.add(scene["gt"], scene["masks"], scene["labels"], scene["scores"])
        del scene  # before the next one is made
    return evaluator.result()


class InstanceAP:
    """AP of predicted instances, scene by scene. Of each scene only scores and counts are kept.

    For every IoU threshold, class and scene, the true instances in ascending id each take the first prediction of
    their class, in the order given and not yet taken, whose IoU is larger. Every later one that also lies above, not
    taken, is a duplicate: the higher of the two scores stays with the true instance and the lower one is a false
    positive. A prediction above the threshold for no true instance of its class is a false positive, unless a share
    of it larger than the threshold lies on void points or on true instances of its class under MIN_REGION points.
    The order of the predictions therefore matters. Void is every point whose class is not in class_ids.

    Args:
        class_ids: K distinct integers from 1 up. Ids 0..999 of the ground truth (class 0) are always void.

    Raises:
        ValueError: a class id twice, none, or one below 1.

    Source: ScanNet's BenchmarkScripts/3d_evaluation (Dai et al. 2017); written from its rules.
    """

    def __init__(self, class_ids):
        self.class_ids = _as_class_ids(class_ids)  # (K,)
        if self.class_ids.min() < 1:
            raise ValueError(f"class_ids must be 1 or larger, got {self.class_ids.tolist()}; gt ids 0..999 are void")
        k = len(self.class_ids)
        self.num_scenes = 0
        self.hits = [[[] for _ in OVERLAPS] for _ in range(k)]  # scores of the true positives, by class and overlap
        self.false_alarms = [[[] for _ in OVERLAPS] for _ in range(k)]  # scores of the false positives
        self.missed = [[0 for _ in OVERLAPS] for _ in range(k)]  # number of true instances that no prediction met

    def add(self, gt, masks, labels, scores):
        """Count one scene. Arrays are numpy or torch; N and P may be 0, a mask may be empty.

        Args:
            gt:     (N,) integer, class * 1000 + instance; void where the class is none of class_ids; any integers.
            masks:  (P, N) bool, True = the point belongs to the prediction; they may overlap.
            labels: (P,) integer class ids; predictions of other classes are left out.
            scores: (P,) numbers, the higher the surer; any but NaN.

        Raises:
            ValueError: a shape or dtype other than these, different lengths, a NaN score; nothing is counted then.
        """
        number, k, order = self.num_scenes, len(self.class_ids), np.argsort(self.class_ids)
        gt, labels = _as_ids(gt, "gt", number), _as_ids(labels, "labels", number, "P")
        masks, scores = _as_array(masks), _as_array(scores)
        if masks.ndim != 2 or masks.shape[1] != len(gt) or masks.dtype != bool:
            raise ValueError(f"scene {number}: masks must be (P, {len(gt)}) bool, a row for each prediction and a "
                             f"column for each point of gt, got {masks.shape} {masks.dtype}")
        if scores.ndim != 1 or (scores.size and scores.dtype.kind not in "iuf"):
            raise ValueError(f"scene {number}: scores must be (P,) numbers, got {scores.shape} {scores.dtype}")
        if not len(masks) == len(labels) == len(scores):
            raise ValueError(f"scene {number}: {len(masks)} masks, {len(labels)} labels and {len(scores)} scores; "
                             "a prediction has one of each")
        scores = scores.astype(np.float64)
        if np.isnan(scores).any():
            raise ValueError(f"scene {number}: the score of prediction {np.isnan(scores).argmax()} is NaN")

        ids, instance, gt_size = _unique_ids(gt)  # (G,) ascending, (N,) 0..G-1, (G,)
        gt_class = _class_index(ids // 1000, self.class_ids, order)  # (G,) 0..K, K = void
        label_class = _class_index(labels, self.class_ids, order)  # (P,)
        rows = np.flatnonzero(label_class < k)  # predictions that count
        counts = _intersections(masks, rows, instance, len(ids))  # (p, G)
        size, void, own_class = counts.sum(1), counts[:, gt_class == k].sum(1), label_class[rows]  # (p,) each
        for c in sorted({*gt_class.tolist(), *own_class.tolist()} - {k}):
            of_class, keep = gt_class == c, (own_class == c) & (size >= MIN_REGION)  # (G,) bool, (p,) bool
            self._match(c, gt_size[of_class], size[keep], void[keep], counts[keep][:, of_class],
                        scores[rows[keep]].tolist())
        self.num_scenes += 1

    def _match(self, c, gt_size, size, void, intersection, score):
        """Count class c of one scene: gt_size (g,), size and void (p,), intersection (p, g) points, score p floats."""
        iou = intersection / (gt_size + size[:, None] - intersection)  # (p, g)
        large = gt_size >= MIN_REGION  # (g,)
        ignored = ((void + intersection[:, ~large].sum(1)) / size).tolist()  # share not held against a prediction
        highest = iou.max(1, initial=0).tolist()  # of each prediction
        pairs = {g: [] for g in np.flatnonzero(large).tolist()}  # true instance: its (prediction, IoU), in order
        for p, g in np.argwhere((iou > OVERLAPS.min()) & large).tolist():
            pairs[g].append((p, float(iou[p, g])))
        for o, threshold in enumerate(OVERLAPS.tolist()):
            taken = set()
            for candidates in pairs.values():
                best = None
                for p, overlap in candidates:
                    if p in taken or not overlap > threshold:
                        continue
                    if best is None:
                        best = score[p]
                        taken.add(p)
                    else:  # a duplicate, which stays free for the next true instance
                        self.false_alarms[c][o].append(min(best, score[p]))
                        best = max(best, score[p])
                if best is None:
                    self.missed[c][o] += 1
                else:
                    self.hits[c][o].append(best)
            self.false_alarms[c][o] += [score[p] for p in range(len(score))
                                        if highest[p] <= threshold and ignored[p] <= threshold]

    def merge(self, other):
        """Count the scenes of another InstanceAP of the same classes too. Raises ValueError where these differ."""
        if not np.array_equal(self.class_ids, other.class_ids):
            raise ValueError(f"cannot merge AP over the classes {self.class_ids.tolist()} with AP over "
                             f"{other.class_ids.tolist()}")
        self.num_scenes += other.num_scenes
        for own, more in ((self.hits, other.hits), (self.false_alarms, other.false_alarms)):
            for mine, theirs in zip(own, more):
                for scores, added in zip(mine, theirs):
                    scores += added
        self.missed = [[a + b for a, b in zip(*counts)] for counts in zip(self.missed, other.missed)]

    def result(self):
        """AP over the scenes added so far; more may follow.

        Returns:
            dict with
            ap:          (K, 10) float64, by class and by OVERLAPS (0.5 to 0.9, then 0.25); NaN where the ground truth
                         has no instance of MIN_REGION points or more, 0 where it has and no prediction counts.
            ap_by_class: (K,) float64, mean over the nine overlaps from 0.5 up.
            AP, AP50, AP25: float, mean over the classes that are not NaN of ap_by_class and of ap at 0.5 and at 0.25;
                         NaN if all are.
        """
        ap = np.array([[_average_precision(*counts) for counts in zip(*by_overlap)]
                       for by_overlap in zip(self.hits, self.false_alarms, self.missed)])
        ap_by_class = ap[:, :-1].mean(1)
        return {"ap": ap, "ap_by_class": ap_by_class, "AP": _nan_mean(ap_by_class), "AP50": _nan_mean(ap[:, 0]),
                "AP25": _nan_mean(ap[:, -1])}


def _average_precision(hits, false_alarms, missed):
    """Area under precision over recall from the scores of true and false positives; no envelope, ends at (0, 1)."""
    if not hits:
        return 0.0 if missed else math.nan
    cut = np.array(sorted({*hits, *false_alarms}))  # each distinct score
    tp, fp = (len(scores) - np.array(sorted(scores)).searchsorted(cut) for scores in (hits, false_alarms))  # >= cut
    recall = tp / (len(hits) + missed)
    recall = np.concatenate([recall[:1], recall, [0, 0]])
    return float(np.append(tp / (tp + fp), 1) @ (recall[:-2] - recall[2:])) / 2


def _nan_mean(values):
    """Mean of the values that are not NaN, NaN if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _intersections(masks, rows, instance, num_instances):
    """(p, G) int64, points of each of masks[rows] in each instance; masks (P, N) bool, instance (N,) 0..G-1.

    Eight masks at a time become one byte a point, so that one bincount over (byte, instance) serves all eight.
    """
    counts = np.zeros((len(rows), num_instances), dtype=np.int64)
    group = 8 if num_instances < 2**12 else 1  # the table below must stay small
    bits = np.arange(2**group) >> np.arange(group)[:, None] & 1  # (group, 2**group) of every byte
    byte = np.empty(len(instance), dtype=np.uint8)
    for start in range(0, len(rows), group):
        part = rows[start:start + group]
        byte.fill(0)
        for row in part[::-1]:  # bit i = mask part[i]
            byte += byte
            byte |= masks[row].view(np.uint8)
        inside = np.flatnonzero(byte != 0)
        cell = byte.take(inside) * np.intp(num_instances) + instance.take(inside)
        table = np.bincount(cell, minlength=2**group * num_instances).reshape(2**group, num_instances)
        counts[start:start + group] = bits[:len(part)].astype(np.float64) @ table  # exact, and faster than integers
    return counts


def _unique_ids(ids):
    """np.unique(ids, return_inverse=True, return_counts=True) of (N,) int64, without a sort where they span little."""
    low, high = (min(int(ids.min()), 0), int(ids.max())) if len(ids) else (0, MAX_TABLE)
    if high - low >= MAX_TABLE:
        return np.unique(ids, return_inverse=True, return_counts=True)
    offset = ids - low if low else ids
    count = np.bincount(offset)
    present = np.flatnonzero(count)
    row = np.empty(len(count), dtype=np.min_scalar_type(len(present)))  # small, to stay in the cache
    row[present] = np.arange(len(present))
    return present + low, row[offset], count[present]


# ------------------------------------------------------------------------------------------------- criteria of a run


def criteria(log, baseline_log=None):
    """Judge a run by its log: stability, performance, fusion.

    1. stability: no epoch from 0 to the last is missing or has a non-finite loss, a non-finite gradient or a skipped
       step, and at least 20 such epochs follow one another. What was trained again after `--resume` counts as well
       (replaced_faults): a run that diverged is not stable because it was resumed before that epoch. A run of fewer
       than 20 epochs FAILS however clean it is, a compressed one (`--compress`) too: stability was not shown.
    2. performance: the val mIoU at the last evaluated epoch lies above the baseline's (equal is not above). The last
       evaluated epochs must be the same one, else FAIL as not comparable. Whether data, seed and so on agree stands
       in the configs, which this function does not see: `report.py` compares them.
    3. fusion: fusion_2d_ratio lies in [0.3, 0.7] at every epoch with fusion_ramp == 1; an epoch there without a
       finite ratio fails.

    Args:
        log: list of dicts in ascending epoch, each epoch once; None stands for a non-finite number. Keys read:
             epoch int; loss float; losses {term: float}; grad_norm {branch: float}; skipped_steps int;
             val_miou float or None (not evaluated); fusion_2d_ratio float or None (no fusion active);
             fusion_ramp float 0..1; replaced_faults list of str or missing: what broke stability in earlier lines
             that this one replaced (report.read_log).
        baseline_log: the same for the baseline, or None.

    Returns:
        list of three dicts, in the order above: name; figure (str, as printed); passed (bool, or None where it cannot
        be judged: no baseline or no val mIoU for 2, no epoch with fusion after the ramp for 3, as in a baseline or
        plan A run); detail (str, what failed and where; may be empty).

    Raises:
        ValueError: a log is empty or its epochs do not ascend.
    """
    for name, entries in (("log", log), ("baseline_log", baseline_log)):
        epochs = None if entries is None else [entry["epoch"] for entry in entries]
        if epochs is not None and (not epochs or any(b <= a for a, b in pairwise(epochs))):
            raise ValueError(f"{name} must hold ascending epochs, each once, at least one; got {epochs}")
    return [_stability(log), _performance(log, baseline_log), _fusion(log)]


def epoch_fault(entry):
    """What broke stability in one epoch's log dict (keys as in `criteria`), "" if nothing did."""
    faults = ["loss is not finite"] if not is_finite(entry.get("loss")) else []
    faults += [f"loss {term} is not finite" for term, v in (entry.get("losses") or {}).items() if not is_finite(v)]
    faults += [f"gradient {b} is not finite" for b, v in (entry.get("grad_norm") or {}).items() if not is_finite(v)]
    if entry.get("skipped_steps") != 0:
        faults.append(f"{entry.get('skipped_steps', 'unknown number of')} skipped steps")
    faults += [f"before it was resumed, {fault}" for fault in entry.get("replaced_faults", ())]
    return ", ".join(faults)


def is_finite(value):
    """True for a finite number; False for None, NaN, infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def final_miou(log):
    """(epoch, val mIoU) of the last epoch whose val_miou is a number, None if there is none."""
    evaluated = [(entry["epoch"], entry["val_miou"]) for entry in log if is_finite(entry.get("val_miou"))]
    return evaluated[-1] if evaluated else None


def fusion_epochs(log):
    """[(epoch, fusion_2d_ratio or None)] of the epochs after the ramp; [] for a run in which no fusion is active."""
    return [(e["epoch"], e.get("fusion_2d_ratio")) for e in log if (e.get("fusion_ramp") or 0) >= 1]


def _stability(log):
    """Criterion 1."""
    faults = {entry["epoch"]: epoch_fault(entry) for entry in log}
    total = log[-1]["epoch"] + 1
    bad, streak, longest = [], 0, 0
    for epoch in range(total):
        fault = faults.get(epoch, "missing from the log")
        streak = 0 if fault else streak + 1
        longest = max(longest, streak)
        if fault:
            bad.append(f"epoch {epoch}: {fault}")
    detail = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    if not bad and longest < MIN_STABLE_EPOCHS:
        detail = f"too short: at least {MIN_STABLE_EPOCHS} epochs are needed to show stability"
    figure = f"{total - len(bad)} of {total} epochs finite, longest streak {longest} (needs {MIN_STABLE_EPOCHS})"
    return _entry("stability", figure, not bad and longest >= MIN_STABLE_EPOCHS, detail)


def _performance(log, baseline_log):
    """Criterion 2."""
    ours = final_miou(log)
    own_figure = f"val mIoU {ours[1]:.4f} at epoch {ours[0]}" if ours else "no val mIoU"
    if baseline_log is None:
        return _entry("performance", own_figure, None, "no baseline to compare with")
    theirs = final_miou(baseline_log)
    if ours is None or theirs is None:
        return _entry("performance", own_figure, None, f"no val mIoU in the {'baseline' if ours else 'run'}'s log")
    if ours[0] != theirs[0]:
        detail = f"the run was last evaluated at epoch {ours[0]}, the baseline at epoch {theirs[0]}"
        return _entry("performance", "not comparable", False, detail)
    figure = f"{own_figure}, baseline {theirs[1]:.4f}, difference {ours[1] - theirs[1]:+.4f}"
    return _entry("performance", figure, ours[1] > theirs[1], "" if ours[1] > theirs[1] else "not above the baseline")


def _fusion(log):
    """Criterion 3."""
    epochs = fusion_epochs(log)
    if not epochs:
        return _entry("fusion", "no fusion_2d_ratio", None, "no epoch with fusion after the ramp")
    ratios = [ratio for _, ratio in epochs if is_finite(ratio)]
    low, high = FUSION_BAND
    bad = [f"epoch {epoch}: {ratio}" for epoch, ratio in epochs if not (is_finite(ratio) and low <= ratio <= high)]
    span = f"{min(ratios):.3f}..{max(ratios):.3f}" if ratios else "never measured (no voxel was seen)"
    figure = f"fusion_2d_ratio {span} over {len(epochs)} epochs, band {low}..{high}"
    detail = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    return _entry("fusion", figure, not bad, detail)


def _entry(name, figure, passed, detail):
    """One entry of `criteria`."""
    return {"name": name, "figure": figure, "passed": passed, "detail": detail}
