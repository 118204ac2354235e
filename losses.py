"""The losses of BiFusion and their weights: semantic, instance with its matcher, alignment, gate prior.

Needs torch and scipy and imports no other file of this project: copy it and it works.

Every loss is the mean over the scenes of a batch of that scene's own loss, so a scene counts the same whatever its
size and whatever it is batched with. A scene without a single labelled voxel adds 0 and still counts as a scene.

Axes: M voxels of all scenes, B scenes, K classes, D channels; S superpoints, Q queries and G instances of one scene.
Sources: soft dice after Milletari et al. (V-Net, 2016), in its multi-class form; alignment as a cosine distance;
instance losses and matching after SPFormer (Sun et al. 2023) and OneFormer3D (Kolodiazhnyi et al. 2024), who follow
DETR (Carion et al. 2020).
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

IGNORE = -1
INSTANCE = ("instance_cls", "instance_bce", "instance_dice", "instance_score")
LOSS_WEIGHTS = {
    "bifusion": {  # the first five are 3.1 in all; alignment and gate stand apart
        "semantic": 0.4,
        "instance_cls": 1.0, "instance_bce": 0.8, "instance_dice": 0.6, "instance_score": 0.3,
        "alignment": 0.1,
        "gate": 0.3,
    },
    "baseline": dict.fromkeys(("semantic", *INSTANCE), 1.0),
}
NO_OBJECT = 0.1  # weight of the queries that match nothing in the class cross-entropy
OUTSIDE = 1e4  # added to the matching cost of a query made from a superpoint outside the instance


def scene_mean(values, mask, batch_index, num_scenes):
    """Mean over all scenes of the mean of values where mask, 0 where nowhere; (M,), (M,) bool, (M,) int64 -> scalar."""
    kept = batch_index[mask]
    total = values.new_zeros(num_scenes).index_add(0, kept, values[mask])  # (B,)
    count = torch.bincount(kept, minlength=num_scenes).clamp(min=1)
    return (total / count).mean()


def soft_dice(overlap, size):
    """1 - (2 sum(p t) + 1) / (sum p + sum t + 1) of overlap = sum(p t), size = sum p + sum t; p in [0, 1], t 0 or 1."""
    return 1 - (2 * overlap + 1) / (size + 1)


def semantic_loss(logits, labels, batch_index, num_scenes):
    """Cross-entropy + `soft_dice` of the softmax and the one-hot label, the mean over the classes that a scene holds.

    Args:
        logits:      (M, K) float; computed in float32.
        labels:      (M,) int64, IGNORE (-1) = leave out.
        batch_index: (M,) int64, scene of each voxel, below num_scenes.
        num_scenes:  B.

    Returns: scalar; 0 with a gradient of 0 where nothing is labelled.
    Raises ValueError: a label outside -1..K-1.
    """
    num_classes = logits.shape[1]
    if len(labels) and (labels.max() >= num_classes or labels.min() < IGNORE):
        raise ValueError(f"labels span {labels.min().item()}..{labels.max().item()}, "
                         f"logits have {num_classes} classes; pass labels in 0..{num_classes - 1} or {IGNORE}")
    keep = labels != IGNORE
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # (M,)
    cross_entropy = scene_mean(cross_entropy, keep, batch_index, num_scenes)

    scene = batch_index[keep]  # (m,)
    probability = logits[keep].softmax(1)  # (m, K)
    target = F.one_hot(labels[keep], num_classes).to(probability.dtype)  # (m, K)
    zeros = probability.new_zeros(num_scenes, num_classes)
    overlap = zeros.index_add(0, scene, probability * target)  # (B, K)
    size = zeros.index_add(0, scene, probability + target)  # (B, K)
    present = zeros.index_add(0, scene, target) > 0  # (B, K)
    dice = (soft_dice(overlap, size) * present).sum(1) / present.sum(1).clamp(min=1)  # (B,)
    return cross_entropy + dice.mean()


def mask_costs(mask_logits, masks):
    """BCE (mean over superpoints) and dice of every query with every instance: (Q, S), (G, S) -> (Q, G), (Q, G)."""
    probability, target = mask_logits.sigmoid(), masks.to(mask_logits.dtype)
    bce = F.softplus(mask_logits).sum(1, keepdim=True) - mask_logits @ target.T  # softplus(x) - x t, summed
    dice = soft_dice(probability @ target.T, probability.sum(1, keepdim=True) + target.sum(1))
    return bce / mask_logits.shape[1], dice


@torch.no_grad()
def match(prediction, labels, masks):
    """Assign instances to queries one to one at the least total cost, -0.5 p(class) + BCE + dice (Hungarian algorithm).

    Args:
        prediction: dict of class_logits (Q, K + 1), mask_logits (Q, S) and, where each query was made from a
                    superpoint, origin (Q,) int64, which. An instance then gets a query made from one of its own
                    superpoints wherever there is one left, as in OneFormer3D: the query knows from the start what it
                    is to find, and learns sooner. Learned queries have no origin: their cost alone decides.
        labels:     (G,) int64.  masks: (G, S) bool.

    Returns: query, instance: (min(Q, G),) int64 each, no query and no instance twice. With fewer queries than instances
        the costliest instances stay without one. A cost that is not finite counts as a large one: the loss will say so.
    """
    probability = prediction["class_logits"].float().softmax(1)  # (Q, K + 1)
    bce, dice = mask_costs(prediction["mask_logits"].float(), masks)
    cost = -0.5 * probability[:, labels] + bce + dice  # (Q, G)
    if "origin" in prediction:
        cost = cost + OUTSIDE * ~masks[:, prediction["origin"]].T
    cost = cost.nan_to_num(1e6, 1e6, 1e6).clamp(max=1e6)
    query, instance = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(query, device=labels.device), torch.as_tensor(instance, device=labels.device)


def layer_loss(prediction, labels, masks):
    """The four instance losses of one scene and one decoder layer.

    cls:   cross-entropy of all queries, target "no object" (last class, weight 0.1) where unmatched, weighted mean.
    bce:   binary cross-entropy of the matched masks, mean over superpoints and matched queries.
    dice:  `soft_dice` of the matched masks, mean over matched queries.
    score: squared error of the claimed IoU to that of the mask p > 0.5, mean over the matched queries where the latter
           is above 0.5.

    Args:
        prediction: dict of class_logits (Q, K + 1), mask_logits (Q, S), score (Q,) and, if any, origin (see `match`).
        labels:     (G,) int64, G may be 0 or exceed Q.  masks: (G, S) bool.

    Returns: dict of four scalars, finite where the prediction is; without instances cls alone is not 0.
    """
    class_logits, mask_logits = prediction["class_logits"].float(), prediction["mask_logits"].float()
    query, instance = match(prediction, labels, masks)
    no_object = class_logits.shape[1] - 1
    target = labels.new_full((len(class_logits),), no_object)  # (Q,)
    target[query] = labels[instance]
    weight = class_logits.new_ones(no_object + 1)
    weight[no_object] = NO_OBJECT
    matched, truth = mask_logits[query], masks[instance].to(mask_logits.dtype)  # (m, S)
    count = max(1, len(query))
    bce = F.binary_cross_entropy_with_logits(matched, truth, reduction="sum") / (count * matched.shape[1])
    probability = matched.sigmoid()
    dice = soft_dice((probability * truth).sum(1), probability.sum(1) + truth.sum(1))  # (m,)
    with torch.no_grad():
        positive = (matched > 0).to(truth.dtype)
        overlap = (positive * truth).sum(1)
        iou = overlap / (positive.sum(1) + truth.sum(1) - overlap).clamp(min=1)
        good = (iou > 0.5).to(truth.dtype)
    score = (good * (prediction["score"].float()[query] - iou).square()).sum() / good.sum().clamp(min=1)
    return {"instance_cls": F.cross_entropy(class_logits, target, weight), "instance_bce": bce,
            "instance_dice": dice.sum() / count, "instance_score": score}


def instance_loss(predictions, superpoint_instance, superpoint_batch, instance_label, instance_batch, has_instances):
    """`layer_loss`, mean over the decoder's layers, then over the scenes; one that is not annotated adds 0 and counts.

    Args:
        predictions:         list of B, one a scene, of lists of the layers' predictions (model.QueryDecoder.forward).
        superpoint_instance: (S of all scenes,) int64, number of the instance within its scene or -1.
        superpoint_batch:    (S of all scenes,) int64.
        instance_label:      (G of all scenes,) int64, in the order of those numbers.  instance_batch: the same shape.
        has_instances:       (B,) bool, False = not annotated.

    Returns: dict of the four INSTANCE terms, scalars.
    """
    sums = dict.fromkeys(INSTANCE, 0.0)
    for scene, layers in enumerate(predictions):
        labels = instance_label[instance_batch == scene]  # (G,)
        numbers = torch.arange(len(labels), device=labels.device)
        masks = superpoint_instance[superpoint_batch == scene] == numbers[:, None]  # (G, S)
        share = has_instances[scene].float() / (len(layers) * len(predictions))
        for prediction in layers:
            for name, loss in layer_loss(prediction, labels, masks).items():
                sums[name] = sums[name] + share * loss
    return sums


def alignment_loss(feat_3d, feat_2d, seen, batch_index, num_scenes):
    """1 - cosine between the branches on the voxels that a view sees, scalar in [0, 2]; 0 where no voxel is seen.

    The gradient stops at the 2D side: 3D moves towards what the images say, the images do not chase a noisy 3D.
    (M, D), (M, D), (M,) bool, (M,) int64, B.
    """
    distance = 1 - F.cosine_similarity(feat_3d.float(), feat_2d.detach().float())  # (M,)
    return scene_mean(distance, seen, batch_index, num_scenes)


def gate_prior(alpha, seen, batch_index, num_scenes):
    """(mean alpha of a scene's seen voxels - 0.5)^2: a weak prior that the learned gate weighs both branches alike.

    It acts on the mean alone, so single voxels may still go all 2D or all 3D, and it can be overruled: a gate with a
    reason to leave the band does. (M,) in [0, 1], (M,) bool, (M,) int64, B -> scalar; a scene with none seen adds 0.
    """
    kept = batch_index[seen]
    count = torch.bincount(kept, minlength=num_scenes)  # (B,)
    mean = alpha.new_zeros(num_scenes).index_add(0, kept, alpha[seen]) / count.clamp(min=1)  # (B,)
    return ((mean - 0.5).square() * (count > 0)).mean()


def weighted_sum(terms, weights):
    """Dict of scalar terms and dict of weights -> scalar loss; a term without a weight is an error."""
    missing = sorted(set(terms) - set(weights))
    if missing:
        raise KeyError(f"no weight for the loss terms {missing}; LOSS_WEIGHTS has {sorted(weights)}")
    return sum(weights[name] * term for name, term in terms.items())
