"""mIoU and AP exactly as the ScanNet benchmark computes them, of numpy arrays or torch tensors; copied alone it works.

    result = semantic_iou(((gt, pred) for gt, pred in scenes), class_ids)   # streams, one bincount a scene
    result = instance_ap(scenes, class_ids)   # scenes: dicts of gt, masks, labels, scores; InstanceAP takes them singly

Axes: N points of a scene, K classes, P predicted instances, G ground-truth instances.
Source: ScanNet's BenchmarkScripts/3d_evaluation (Dai et al. 2017) for what is counted; written from its rules.
"""

from collections import defaultdict

import numpy as np

OVERLAPS = np.append(np.arange(0.5, 0.95, 0.05), 0.25)  # IoU thresholds, exactly these doubles: 0.5 to 0.9, then 0.25
MIN_REGION = 100  # points; smaller predictions are left out, smaller true instances need not be found
MAX_CLASS = 9999  # largest class id of an instance: a table over class * 1000 + instance stays below 80 MB


def semantic_iou(scenes, class_ids):
    """IoU of every class and their mean, over all points of all scenes together.

    Points whose ground truth is not one of the classes are ignored. A prediction that is not one of the classes is
    wrong: it counts as a false negative of the true class and as a false positive of none.

    Args:
        scenes:    iterable (one is held at a time) of (gt, pred), each (N,) integers of any value; N may be 0.
        class_ids: K distinct integers: range(K), or scenes.folder.NYU40_IDS.
    Returns: dict with
        confusion: (K, K + 1) int64, rows ground truth, columns prediction, in the order of class_ids, then "none".
        iou:       (K,) float64, TP / (TP + FP + FN); NaN where that denominator is 0.
        miou:      float, mean of the IoUs that are not NaN; NaN if all are.
    Raises ValueError: a class id twice; gt and pred of different length, not one-dimensional or not integers.
    """
    class_ids = _as_class_ids(class_ids)  # (K,)
    k = len(class_ids)
    confusion = np.zeros((k, k + 1), dtype=np.int64)
    for number, (gt, pred) in enumerate(scenes):
        gt = _as_array(gt, f"scene {number}: gt must be (N,) integers")
        pred = _as_array(pred, f"scene {number}: pred must be (N,) integers")
        if len(gt) != len(pred):
            raise ValueError(f"scene {number}: gt has {len(gt)} points, pred has {len(pred)}; one label a point")
        row, column = _class_index(gt, class_ids), _class_index(pred, class_ids)  # (N,) 0..K, K = none
        confusion += np.bincount((row * (k + 1) + column)[row < k], minlength=k * (k + 1)).reshape(k, k + 1)
    return iou_of(confusion)


def iou_of(confusion):
    """What `semantic_iou` returns, of a confusion matrix (K, K + 1) as it makes it, or of a sum of such."""
    tp = np.diagonal(confusion)  # (K,)
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - tp  # TP + FN + FP
    iou = np.where(union > 0, tp / np.maximum(union, 1), np.nan)
    return {"confusion": confusion, "iou": iou, "miou": _nan_mean(iou)}


def _nan_mean(values):
    """Mean of the values that are not NaN, NaN if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


def _as_array(values, expected, kinds="iu", dtype=np.int64, inner=()):
    """Array of dtype of a numpy array, torch tensor (any device) or list; ValueError with the text expected where its
    shape is not (any, *inner), its own dtype is of none of the kinds (unless it is empty) or a value is NaN."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    wrong = values.ndim == 0 or values.shape[1:] != inner or (values.size and values.dtype.kind not in kinds)
    if wrong or (values.dtype.kind == "f" and np.isnan(values).any()):
        raise ValueError(f"{expected}, got {values.shape} {values.dtype}")
    return values.astype(dtype, copy=False)


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


def instance_ap(scenes, class_ids):
    """`InstanceAP.result` over an iterable (one is held at a time) of scenes: dicts of `InstanceAP.add`'s arguments."""
    evaluator = InstanceAP(class_ids)
    for scene in scenes:
        evaluator.add(**scene)
        del scene  # before the next one is made
    return evaluator.result()


class InstanceAP:
    """AP of predicted instances, scene by scene, of which only scores are kept.

    For every IoU threshold, class and scene, the true instances in ascending id each take the first prediction of
    their class, in the order given and not yet taken, whose IoU is larger. Later ones above, not taken, are duplicates
    and stay free for later instances: the highest score of them all is the true positive's, the others are false
    positives. A prediction above for no true instance of its class is a false positive, unless a share of it larger
    than the threshold lies on void (points of none of class_ids) or on instances of its class under MIN_REGION points.

    class_ids: K distinct integers in 1..MAX_CLASS, else ValueError: scenes.folder.NYU40_IDS without wall and floor.
    """

    def __init__(self, class_ids):
        self.class_ids = _as_class_ids(class_ids)  # (K,)
        if self.class_ids.min() < 1 or self.class_ids.max() > MAX_CLASS:
            raise ValueError(f"class_ids must lie in 1..{MAX_CLASS}, got {self.class_ids.tolist()}; 0 is void")
        self.num_scenes = 0
        self.truth = defaultdict(list)  # (class 0..K-1, overlap 0..9) -> score that each true instance got, NaN: none
        self.false_alarms = defaultdict(list)  # the same key -> scores of the false positives

    def add(self, gt, masks, labels, scores):
        """Count one scene; on a ValueError (shape or dtype other than these, a NaN score) nothing is counted.

        gt:     (N,) integer, class * 1000 + instance; any other integer is void. N and P may be 0.
        masks:  (P, N) bool, True = the point belongs to the prediction; they may overlap or be empty.
        labels: (P,) integer class ids; predictions of other classes are left out.
        scores: (P,) numbers, the higher the surer; any but NaN.
        """
        scene = f"scene {self.num_scenes}"
        gt = _as_array(gt, f"{scene}: gt must be (N,) integers")
        labels = _as_array(labels, f"{scene}: labels must be (P,) integers")
        scores = _as_array(scores, f"{scene}: scores must be (P,) numbers, no NaN", "iuf", np.float64)
        masks = _as_array(masks, f"{scene}: masks must be (P, {len(gt)}) bool, a row for each prediction and a column "
                                 "for each point of gt", "b", bool, gt.shape)
        if not len(masks) == len(labels) == len(scores):
            raise ValueError(f"{scene}: {len(masks)} masks, {len(labels)} labels and {len(scores)} scores; "
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
                taken.update(above[:1])
                *duplicates, best = sorted(scores[p] for p in above) or [np.nan]
                self.truth[c, o].append(best)
                self.false_alarms[c, o] += duplicates
            self.false_alarms[c, o] += [score for score, share in zip(scores, most) if share <= threshold]

    def merge(self, other):
        """Count the scenes of another InstanceAP of the same classes too. Raises ValueError where these differ."""
        if not np.array_equal(self.class_ids, other.class_ids):
            raise ValueError(f"cannot merge AP over the classes {self.class_ids} with AP over {other.class_ids}")
        self.num_scenes += other.num_scenes
        for own, more in ((self.truth, other.truth), (self.false_alarms, other.false_alarms)):
            for key, scores in more.items():
                own[key] += scores

    def result(self):
        """AP over the scenes added so far, as a dict; more may follow.

        ap:          (K, 10) float64, by class and by OVERLAPS (0.5 to 0.9, then 0.25); NaN where the ground truth has
                     no instance of MIN_REGION points or more, 0 where it has and no prediction counts.
        ap_by_class: (K,) float64, mean over the nine overlaps from 0.5 up.
        AP, AP50, AP25: float, mean of ap_by_class, of ap at 0.5 and at 0.25 over classes that are not NaN, else NaN.
        """
        ap = np.array([[_average_precision(self.truth[c, o], self.false_alarms[c, o]) for o in range(len(OVERLAPS))]
                       for c in range(len(self.class_ids))])
        ap_by_class = ap[:, :-1].mean(1)
        return {"ap": ap, "ap_by_class": ap_by_class,
                "AP": _nan_mean(ap_by_class), "AP50": _nan_mean(ap[:, 0]), "AP25": _nan_mean(ap[:, -1])}


def _average_precision(truth, false_alarms):
    """Area under precision over recall, no envelope, ends at (0, 1); of the scores of InstanceAP at one key."""
    hits = sorted(score for score in truth if score == score)
    if not hits:
        return 0.0 if truth else np.nan
    cut = np.array(sorted({*hits, *false_alarms}))  # each distinct score
    tp, fp = (len(scores) - np.array(sorted(scores)).searchsorted(cut) for scores in (hits, false_alarms))  # >= cut
    recall = np.concatenate([tp[:1], tp, [0, 0]]) / len(truth)
    return float(np.append(tp / (tp + fp), 1) @ (recall[:-2] - recall[2:])) / 2


def overlaps(gt, masks):
    """(N,) int64, (P, N) bool -> ids (G,) of the true instances, ascending; their points (G,); shared points (P, G)."""
    gt = np.where((gt >= 0) & (gt < (MAX_CLASS + 1) * 1000), gt, 0)  # what is out of range is void, as id 0 is
    count = np.bincount(gt)  # a table in place of np.unique, whose sort takes longer than all the rest
    ids = np.flatnonzero(count)  # (G,)
    instance = (np.cumsum(count > 0) - 1)[gt]  # (N,) 0..G-1
    shared = [np.bincount(instance[np.flatnonzero(mask)], minlength=len(ids)) for mask in masks]
    return ids, count[ids], np.array(shared, dtype=np.int64).reshape(len(masks), len(ids))
