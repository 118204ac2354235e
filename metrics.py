"""Metrics of a run: mIoU as the ScanNet benchmark computes it, and the three success criteria read from a log.

Needs numpy only (torch tensors are taken as they come) and imports no other file of this project: copy it and it works.

    result = semantic_iou(((gt, pred) for gt, pred in scenes), class_ids)   # streams, one bincount a scene
    for entry in criteria(log, baseline_log):                               # log: one dict an epoch, see `criteria`
        print(entry["name"], entry["figure"], entry["passed"])

Axes: N points of a scene, K classes.

Source: ScanNet's BenchmarkScripts/3d_evaluation (Dai et al. 2017) for what is counted; written from its rules.
"""

import math
from itertools import pairwise

import numpy as np

MIN_STABLE_EPOCHS = 20  # consecutive epochs without a non-finite loss or gradient
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
    class_ids = np.asarray(list(class_ids), dtype=np.int64)  # (K,)
    k = len(class_ids)
    order = np.argsort(class_ids)
    if k == 0 or len(np.unique(class_ids)) != k:
        raise ValueError(f"class_ids must be one or more distinct integers, got {class_ids.tolist()}")

    confusion = np.zeros((k, k + 1), dtype=np.int64)
    for number, (gt, pred) in enumerate(scenes):
        gt, pred = _as_ids(gt, "gt", number), _as_ids(pred, "pred", number)
        if len(gt) != len(pred):
            raise ValueError(f"scene {number}: gt has {len(gt)} points, pred has {len(pred)}; one label a point")
        row, column = _class_index(gt, class_ids, order), _class_index(pred, class_ids, order)  # (N,) 0..K, K = none
        cell = (row * (k + 1) + column)[row < k]
        confusion += np.bincount(cell, minlength=k * (k + 1)).reshape(k, k + 1)

    tp = np.diagonal(confusion)  # (K,)
    union = confusion.sum(1) + confusion[:, :k].sum(0) - tp  # TP + FN + FP
    iou = np.where(union > 0, tp / np.maximum(union, 1), np.nan)
    miou = float(iou[union > 0].mean()) if union.any() else math.nan
    return {"confusion": confusion, "iou": iou, "miou": miou}


def _as_ids(values, what, number):
    """(N,) int64 numpy array of a numpy array, torch tensor (any device) or list."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"scene {number}: {what} must be (N,) integers, got {values.shape} {values.dtype}")
    return values.astype(np.int64)


def _class_index(ids, class_ids, order):
    """Position of every id in class_ids, K where it is none of them; order is the argsort of class_ids."""
    k = len(class_ids)
    position = order[np.searchsorted(class_ids, ids, sorter=order).clip(max=k - 1)]
    return np.where(class_ids[position] == ids, position, k)


# ------------------------------------------------------------------------------------------------- criteria of a run


def criteria(log, baseline_log=None):
    """Judge a run by its log: stability, performance, fusion.

    1. stability: no epoch from 0 to the last is missing or has a non-finite loss, a non-finite gradient or a skipped
       step, and at least 20 such epochs follow one another. So a run of fewer than 20 epochs FAILS however clean it
       is, a compressed one (`--compress`) too: stability was not shown.
    2. performance: the val mIoU at the last evaluated epoch lies above the baseline's (equal is not above). The last
       evaluated epochs must be the same one, else FAIL as not comparable. Whether data, seed and so on agree stands
       in the configs, which this function does not see: `report.py` compares them.
    3. fusion: fusion_2d_ratio lies in [0.3, 0.7] at every epoch with fusion_ramp == 1; an epoch there without a
       finite ratio fails.

    Args:
        log: list of dicts in ascending epoch, each epoch once; None stands for a non-finite number. Keys read:
             epoch int; loss float; losses {term: float}; grad_norm {branch: float}; skipped_steps int;
             val_miou float or None (not evaluated); fusion_2d_ratio float or None (no fusion active);
             fusion_ramp float 0..1.
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
