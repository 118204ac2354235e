"""mIoU and AP exactly as the ScanNet benchmark computes them.

Needs numpy alone, takes torch tensors too, and imports no other file of this project: copy it and it works.

    result = semantic_iou(((gt, pred) for gt, pred in scenes), class_ids)   # streams, one bincount a scene
    result = instance_ap(scenes, class_ids)   # scenes: dicts of gt, masks, labels, scores; InstanceAP takes them singly

Axes: N points of a scene, K classes, P predicted instances, G ground-truth instances.

Source: ScanNet's BenchmarkScripts/3d_evaluation (Dai et al. 2017) for what is counted; written from its rules.
"""

import math
from collections import Counter, defaultdict

import numpy as np

OVERLAPS = np.append(np.arange(0.5, 0.95, 0.05), 0.25)  # IoU thresholds, exactly these doubles: 0.5 to 0.9, then 0.25
MIN_REGION = 100  # points; smaller predictions are left out, smaller true instances need not be found
MAX_CLASS = 9999  # largest class id of an instance: a table over class * 1000 + instance stays below 80 MB


# ---------------------------------------------------------------------------------------------- semantic segmentation


def semantic_iou(scenes, class_ids):
    """IoU of every class and their mean, over all points of all scenes together, as the ScanNet benchmark counts.

    Points whose ground truth is not one of the classes are ignored. A prediction that is not one of the classes is
    wrong: it counts as a false negative of the true class and as a false positive of none.

    Args:
        scenes:    iterable (a generator will do, one scene is held at a time) of (gt, pred), each (N,) integer class
                   ids, numpy or torch; any integers, negative ones too. N may be 0.
        class_ids: K distinct integers: range(K), or data.NYU40_IDS.

    Returns: dict with
        confusion: (K, K + 1) int64, rows ground truth and columns prediction in the order of class_ids; the last
                   column counts predictions that are not one of the classes.
        iou:       (K,) float64, TP / (TP + FP + FN); NaN where that denominator is 0.
        miou:      float, mean of the IoUs that are not NaN; NaN if all are.

    Raises:
        ValueError: a class id twice; gt and pred of different length, not one-dimensional or not integers.
    """
    class_ids = _as_class_ids(class_ids)  # (K,)
    k = len(class_ids)
    confusion = np.zeros((k, k + 1), dtype=np.int64)
    for number, (gt, pred) in enumerate(scenes):
        gt, pred = _as_ids(gt, "gt", number), _as_ids(pred, "pred", number)
        if len(gt) != len(pred):
            raise ValueError(f"scene {number}: gt has {len(gt)} points, pred has {len(pred)}; one label a point")
        row, column = _class_index(gt, class_ids), _class_index(pred, class_ids)  # (N,) 0..K, K = none
        cell = (row * (k + 1) + column)[row < k]
        confusion += np.bincount(cell, minlength=k * (k + 1)).reshape(k, k + 1)
    return iou_of(confusion)


def iou_of(confusion):
    """What `semantic_iou` returns, of a confusion matrix (K, K + 1) as it makes it, or of a sum of such."""
    k = len(confusion)
    tp = np.diagonal(confusion)  # (K,)
    union = confusion.sum(1) + confusion[:, :k].sum(0) - tp  # TP + FN + FP
    iou = np.where(union > 0, tp / np.maximum(union, 1), np.nan)
    return {"confusion": confusion, "iou": iou, "miou": _nan_mean(iou)}


def _nan_mean(values):
    """Mean of the values that are not NaN, NaN if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _as_array(values):
    """Numpy array of a numpy array, torch tensor (any device) or list."""
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


def _class_index(ids, class_ids):
    """Position of every id in class_ids, K where it is none of them."""
    k, order = len(class_ids), np.argsort(class_ids)
    position = order[np.searchsorted(class_ids, ids, sorter=order).clip(max=k - 1)]
    return np.where(class_ids[position] == ids, position, k)


# ---------------------------------------------------------------------------------------------- instance segmentation


def instance_ap(scenes, class_ids):
    """`InstanceAP` over an iterable of scenes (a generator will do, one is held at a time), then its `result`.

    A scene is a dict of gt, masks, labels and scores, the arguments of `InstanceAP.add`.
    """
    evaluator = InstanceAP(class_ids)
    for scene in scenes:
        evaluator.add(**scene)
        del scene  # before the next one is made
    return evaluator.result()


class InstanceAP:
    """AP of predicted instances, scene by scene. Of each scene only scores and counts are kept.

    For every IoU threshold, class and scene, the true instances in ascending id each take the first prediction of
    their class, in the order given and not yet taken, whose IoU is larger. Every later one that also lies above, not
    taken, is a duplicate: the highest score of them all stays with the true instance, the others are false positives.
    A duplicate is not taken, so a later instance may have it; the order of the predictions therefore matters. A
    prediction above the threshold for no true instance of its class is a false positive, unless a share of it larger
    than the threshold lies on void points or on true instances of its class under MIN_REGION points. Void is every
    point whose class is not in class_ids.

    class_ids: K distinct integers, 1..MAX_CLASS: data.NYU40_IDS without wall and floor. Others raise ValueError.
    """

    def __init__(self, class_ids):
        self.class_ids = _as_class_ids(class_ids)  # (K,)
        if self.class_ids.min() < 1 or self.class_ids.max() > MAX_CLASS:
            raise ValueError(f"class_ids must lie in 1..{MAX_CLASS}, got {self.class_ids.tolist()}; 0 is void")
        self.num_scenes = 0
        self.hits = defaultdict(list)  # (class 0..K-1, overlap 0..9) -> scores of the true positives
        self.false_alarms = defaultdict(list)  # the same of the false positives
        self.missed = Counter()  # number of true instances that no prediction met

    def add(self, gt, masks, labels, scores):
        """Count one scene; on a ValueError (shape or dtype other than these, a NaN score) nothing is counted.

        Args: numpy or torch; N and P may be 0, a mask may be empty.
            gt:     (N,) integer, class * 1000 + instance; void where the class is none of class_ids; any integers.
            masks:  (P, N) bool, True = the point belongs to the prediction; they may overlap.
            labels: (P,) integer class ids; predictions of other classes are left out.
            scores: (P,) numbers, the higher the surer; any but NaN.
        """
        number = self.num_scenes
        gt, labels = _as_ids(gt, "gt", number), _as_ids(labels, "labels", number, "P")
        masks, scores = _as_array(masks), _as_array(scores)
        if masks.ndim != 2 or masks.shape[1] != len(gt) or masks.dtype != bool:
            raise ValueError(f"scene {number}: masks must be (P, {len(gt)}) bool, a row for each prediction and a "
                             f"column for each point of gt, got {masks.shape} {masks.dtype}")
        if scores.ndim != 1 or (scores.size and scores.dtype.kind not in "iuf") or np.isnan(scores).any():
            raise ValueError(f"scene {number}: scores must be (P,) numbers, no NaN, got {scores.shape} {scores.dtype}")
        if not len(masks) == len(labels) == len(scores):
            raise ValueError(f"scene {number}: {len(masks)} masks, {len(labels)} labels and {len(scores)} scores; "
                             "a prediction has one of each")
        k, label_class = len(self.class_ids), _class_index(labels, self.class_ids)  # (P,) 0..K, K = none of them
        ids, gt_size, shared = overlaps(gt, masks)  # (G,) ascending, (G,) points, (P, G) points
        gt_class = _class_index(ids // 1000, self.class_ids)  # (G,) 0..K, K = void
        size, void = shared.sum(1), shared[:, gt_class == k].sum(1)  # (P,) each
        for c in {*gt_class.tolist(), *label_class.tolist()} - {k}:
            own, keep = gt_class == c, (label_class == c) & (size >= MIN_REGION)  # (G,) bool, (P,) bool
            self._match(c, gt_size[own], size[keep], void[keep], shared[keep][:, own], scores[keep].tolist())
        self.num_scenes += 1

    def _match(self, c, gt_size, size, void, shared, scores):
        """Count class c of one scene: gt_size (g,), size, void and scores (p,), shared (p, g) points."""
        iou = shared / (gt_size + size[:, None] - shared)  # (p, g); size is never 0
        large = gt_size >= MIN_REGION  # (g,)
        ignored = (void + shared[:, ~large].sum(1)) / size  # (p,) share that is not held against a prediction
        most = np.maximum(iou.max(1, initial=0), ignored).tolist()  # a false positive where neither is above
        iou = iou.T[large].tolist()  # of every true instance p floats
        for o, threshold in enumerate(OVERLAPS.tolist()):
            taken = set()
            for of_instance in iou:
                above = [p for p, value in enumerate(of_instance) if value > threshold and p not in taken]
                if above:
                    taken.add(above[0])
                    *duplicates, best = sorted(scores[p] for p in above)
                    self.hits[c, o].append(best)
                    self.false_alarms[c, o] += duplicates
                else:
                    self.missed[c, o] += 1
            self.false_alarms[c, o] += [score for score, share in zip(scores, most) if share <= threshold]

    def merge(self, other):
        """Count the scenes of another InstanceAP of the same classes too. Raises ValueError where these differ."""
        if not np.array_equal(self.class_ids, other.class_ids):
            raise ValueError(f"cannot merge AP over the classes {self.class_ids} with AP over {other.class_ids}")
        self.num_scenes += other.num_scenes
        self.missed.update(other.missed)  # adds
        for own, more in ((self.hits, other.hits), (self.false_alarms, other.false_alarms)):
            for key, scores in more.items():
                own[key] += scores

    def result(self):
        """AP over the scenes added so far, as a dict; more may follow.

        Returns:
            ap:          (K, 10) float64, by class and by OVERLAPS (0.5 to 0.9, then 0.25); NaN where the ground truth
                         has no instance of MIN_REGION points or more, 0 where it has and no prediction counts.
            ap_by_class: (K,) float64, mean over the nine overlaps from 0.5 up.
            AP, AP50, AP25: float, mean over the classes that are not NaN of ap_by_class and of ap at 0.5 and at 0.25;
                         NaN if all are.
        """
        ap = np.array([[_average_precision(self.hits[c, o], self.false_alarms[c, o], self.missed[c, o])
                        for o in range(len(OVERLAPS))] for c in range(len(self.class_ids))])
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


def overlaps(gt, masks):
    """Points of every true instance, and those that every mask shares with it.

    Args: gt (N,) int64; ids below 0 or of a class above MAX_CLASS count as id 0.  masks: (P, N) bool.
    Returns: ids (G,) int64 ascending, each present in gt; their points (G,) int64; shared points (P, G) int64.
    """
    gt = np.where((gt >= 0) & (gt < (MAX_CLASS + 1) * 1000), gt, 0)
    count = np.bincount(gt)  # a table in place of np.unique, whose sort takes longer than all the rest
    ids = np.flatnonzero(count)  # (G,)
    row = np.zeros(len(count), np.intp)
    row[ids] = np.arange(len(ids))
    instance = row[gt]  # (N,) 0..G-1
    shared = [np.bincount(instance[np.flatnonzero(mask)], minlength=len(ids)) for mask in masks]
    return ids, count[ids], np.array(shared, dtype=np.int64).reshape(len(masks), len(ids))
