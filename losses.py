"""The losses of BiFusion and their weights: semantic, branch, alignment, gate prior. Instances are not here yet.

Needs torch only and imports no other file of this project: copy it and it works.

Every loss is the mean over the scenes of a batch of that scene's own loss, so a scene counts the same whatever its
size and whatever it is batched with. A scene without a single labelled voxel adds 0 and still counts as a scene.

Axes: M voxels of all scenes, B scenes, K classes, D channels.
Sources: soft dice after Milletari et al. (V-Net, 2016), in its multi-class form; alignment as a cosine distance.
"""

import torch
import torch.nn.functional as F

IGNORE = -1

# The weights of the document this project began from: 3.1 in all. Alignment, branch and gate stand apart.
LOSS_WEIGHTS = {
    "bifusion": {
        "semantic": 0.4,
        "instance_cls": 1.0,
        "instance_bce": 0.8,
        "instance_dice": 0.6,
        "instance_score": 0.3,
        "alignment": 0.1,
        "branch": 0.3,
        "gate": 0.3,
    },
    "baseline": {"semantic": 1.0, "instance": 1.0},
}


def scene_mean(values, mask, batch_index, num_scenes):
    """Mean over scenes of the mean of values where mask; (M,), (M,) bool, (M,) int64 -> scalar.

    A scene where mask is False throughout adds 0 and counts as a scene.
    """
    kept = batch_index[mask]
    total = values.new_zeros(num_scenes).index_add(0, kept, values[mask])  # (B,)
    count = torch.bincount(kept, minlength=num_scenes).clamp(min=1)
    return (total / count).mean()


def semantic_loss(logits, labels, batch_index, num_scenes, mask=None):
    """Cross-entropy + soft multi-class dice.

    dice of a class = 1 - (2 sum(p t) + 1) / (sum p + sum t + 1) with p the softmax probability of the class and t its
    one-hot label over the labelled voxels of a scene; the mean is over the classes that the scene holds.

    Args:
        logits:      (M, K) float; computed in float32.
        labels:      (M,) int64, IGNORE (-1) = leave out.
        batch_index: (M,) int64, scene of each voxel, below num_scenes.
        num_scenes:  B.
        mask:        (M,) bool, optional: leave out where False.

    Returns:
        scalar; 0 with a gradient of 0 where nothing is labelled.

    Raises:
        ValueError: a label outside -1..K-1.
    """
    num_classes = logits.shape[1]
    if len(labels) and (labels.max() >= num_classes or labels.min() < IGNORE):
        raise ValueError(f"labels span {labels.min().item()}..{labels.max().item()}, "
                         f"logits have {num_classes} classes; pass labels in 0..{num_classes - 1} or {IGNORE}")
    keep = labels != IGNORE
    if mask is not None:
        keep = keep & mask
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
    dice = (1 - (2 * overlap + 1) / (size + 1)) * present
    dice = (dice.sum(1) / present.sum(1).clamp(min=1)).mean()
    return cross_entropy + dice


def branch_loss(logits_2d, logits_3d, labels, seen, batch_index, num_scenes):
    """A small classifier on each branch before the fusion: neither can be idle while the gate looks elsewhere.

    The mean of the two semantic losses, the 2D one over the voxels that a view sees. Arguments as `semantic_loss`.
    """
    loss_2d = semantic_loss(logits_2d, labels, batch_index, num_scenes, mask=seen)
    loss_3d = semantic_loss(logits_3d, labels, batch_index, num_scenes)
    return 0.5 * (loss_2d + loss_3d)


def alignment_loss(feat_3d, feat_2d, seen, batch_index, num_scenes):
    """1 - cosine between the branches on the voxels that a view sees, scalar in [0, 2]; 0 where no voxel is seen.

    The gradient stops at the 2D side: 3D moves towards what the images say, the images do not chase a noisy 3D.
    (M, D), (M, D), (M,) bool, (M,) int64, B.
    """
    distance = 1 - F.cosine_similarity(feat_3d.float(), feat_2d.detach().float(), dim=1)  # (M,)
    return scene_mean(distance, seen, batch_index, num_scenes)


def gate_prior(alpha, seen, batch_index, num_scenes):
    """(mean alpha of a scene's seen voxels - 0.5)^2: a weak prior that the learned gate weighs both branches alike.

    It acts on the mean alone, so single voxels may still go all 2D or all 3D, and it can be overruled: a gate with a
    reason to leave the band does. (M,) in [0, 1], (M,) bool, (M,) int64, B -> scalar; a scene without a seen voxel
    adds 0.
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
