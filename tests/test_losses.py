"""Tests of losses.py: agreement with slow formulas, ignored labels, batches, gradients."""

import math

import pytest
import torch

from losses import (IGNORE, LOSS_WEIGHTS, alignment_loss, branch_loss, gate_prior, scene_mean, semantic_loss,
                    weighted_sum)


def example(sizes=(40, 25), classes=4, scale=1.0):
    """logits (M, K) that ask for a gradient, labels with some ignored, batch_index."""
    count = sum(sizes)
    logits = (scale * torch.randn(count, classes)).requires_grad_()
    labels = torch.randint(-1, classes, (count,))
    return logits, labels, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def slow_semantic(logits, labels):
    """Cross-entropy + dice of one scene from their formulas, voxel by voxel, in Python floats."""
    rows = [(row, label) for row, label in zip(logits.tolist(), labels.tolist()) if label != IGNORE]
    if not rows:
        return 0.0
    probabilities = []
    for row, _ in rows:
        largest = max(row)
        powers = [math.exp(x - largest) for x in row]
        probabilities.append([p / sum(powers) for p in powers])
    entropy = -sum(math.log(p[label]) for p, (_, label) in zip(probabilities, rows)) / len(rows)
    dice = []
    for k in sorted({label for _, label in rows}):
        overlap = sum(p[k] for p, (_, label) in zip(probabilities, rows) if label == k)
        size = sum(p[k] for p in probabilities) + sum(label == k for _, label in rows)
        dice.append(1 - (2 * overlap + 1) / (size + 1))
    return entropy + sum(dice) / len(dice)


def test_semantic_loss_agrees_with_its_formula():
    logits, labels, _ = example((60,))
    loss = semantic_loss(logits, labels, torch.zeros(60, dtype=torch.long), 1)
    assert loss.item() == pytest.approx(slow_semantic(logits, labels), abs=1e-5)


def test_a_class_absent_from_the_scene_does_not_count_in_dice():
    logits, labels, index = example((60,), classes=6)
    labels[labels > 2] = 0
    assert semantic_loss(logits, labels, index, 1).item() == pytest.approx(slow_semantic(logits, labels), abs=1e-5)


def test_loss_of_a_batch_is_the_mean_of_its_scenes_losses():
    logits, labels, index = example((60, 7, 21))
    loss = semantic_loss(logits, labels, index, 3)
    single = [semantic_loss(logits[index == s], labels[index == s], index[index == s] * 0, 1) for s in range(3)]
    assert torch.allclose(loss, torch.stack(single).mean(), atol=1e-6)
    mixed = torch.randperm(88)
    assert torch.allclose(semantic_loss(logits[mixed], labels[mixed], index[mixed], 3), loss, atol=1e-6)


def test_alignment_and_branch_losses_of_a_batch_are_means_over_its_scenes_too():
    logits, labels, index = example((60, 7, 21))
    logits_2d, seen = torch.randn(88, 4), torch.rand(88) < 0.5
    alignment, branch = [], []
    for s in range(3):
        here = index == s
        zero = index[here] * 0
        alignment.append(alignment_loss(logits[here], logits_2d[here], seen[here], zero, 1))
        branch.append(branch_loss(logits_2d[here], logits[here], labels[here], seen[here], zero, 1))
    assert torch.allclose(alignment_loss(logits, logits_2d, seen, index, 3), torch.stack(alignment).mean(), atol=1e-6)
    whole = branch_loss(logits_2d, logits, labels, seen, index, 3)
    assert torch.allclose(whole, torch.stack(branch).mean(), atol=1e-6)


def test_ignored_voxels_change_neither_loss_nor_gradient():
    logits, labels, index = example((60,))
    loss = semantic_loss(logits, labels, index, 1)
    loss.backward()
    ignored = labels == IGNORE
    assert ignored.any()
    assert not logits.grad[ignored].any()
    kept = semantic_loss(logits[~ignored], labels[~ignored], index[~ignored], 1)
    assert torch.allclose(loss, kept, atol=1e-6)


def test_a_mask_leaves_voxels_out_as_an_ignored_label_does():
    logits, labels, index = example()
    mask = torch.rand(65) < 0.5
    masked = semantic_loss(logits, labels, index, 2, mask=mask)
    assert torch.allclose(masked, semantic_loss(logits, labels.where(mask, torch.tensor(IGNORE)), index, 2))


def test_a_scene_without_labels_adds_zero_and_counts():
    logits, labels, index = example()
    labels[index == 1] = IGNORE
    alone = semantic_loss(logits[index == 0], labels[index == 0], index[index == 0], 1)
    assert torch.allclose(semantic_loss(logits, labels, index, 2), alone / 2, atol=1e-6)


def test_loss_is_zero_with_a_zero_gradient_when_every_label_is_ignored():
    logits, labels, index = example()
    labels = torch.full_like(labels, IGNORE)
    for loss in (semantic_loss(logits, labels, index, 2),
                 branch_loss(logits, logits, labels, torch.ones(65, dtype=torch.bool), index, 2),
                 alignment_loss(logits, logits.detach(), torch.zeros(65, dtype=torch.bool), index, 2)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_losses_of_no_voxel_at_all_are_zero():
    empty, labels, index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    assert semantic_loss(empty, labels, index, 1) == 0
    assert alignment_loss(empty, empty, labels.bool(), index, 1) == 0


@pytest.mark.parametrize("scale", [1e3, 1e8, 1e30])
def test_huge_logits_give_a_finite_loss_and_gradient(scale):
    logits, labels, index = example(scale=scale)
    loss = semantic_loss(logits, labels, index, 2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_costs_much():
    labels, index = torch.arange(4).repeat(10), torch.zeros(40, dtype=torch.long)
    right = 50 * torch.nn.functional.one_hot(labels, 4).float()
    assert semantic_loss(right, labels, index, 1) < 1e-4
    assert semantic_loss(right.roll(1, 1), labels, index, 1) > 10


@pytest.mark.parametrize("label", [-2, 4, 255])
def test_a_label_out_of_range_is_refused_with_its_value(label):
    logits, labels, index = example()
    labels[3] = label
    with pytest.raises(ValueError, match=f"{label}.*logits have 4 classes"):
        semantic_loss(logits, labels, index, 2)


def test_half_precision_logits_are_computed_in_single_precision():
    logits, labels, index = example()
    half = logits.detach().half()
    assert torch.equal(semantic_loss(half, labels, index, 2), semantic_loss(half.float(), labels, index, 2))


def test_alignment_is_one_minus_the_cosine_over_seen_voxels():
    feat_3d, feat_2d = torch.randn(30, 8), torch.randn(30, 8)
    seen = torch.arange(30) % 3 == 0
    expected = [1 - (a @ b / a.norm() / b.norm()).item() for a, b, s in zip(feat_3d, feat_2d, seen) if s]
    loss = alignment_loss(feat_3d, feat_2d, seen, torch.zeros(30, dtype=torch.long), 1)
    assert loss.item() == pytest.approx(sum(expected) / 10, abs=1e-6)
    assert alignment_loss(feat_3d, 3 * feat_3d, seen, torch.zeros(30, dtype=torch.long), 1).abs() < 1e-6


def test_alignment_moves_the_3d_side_alone_and_only_where_seen():
    feat_3d, feat_2d = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    seen = torch.arange(30) < 10
    alignment_loss(feat_3d, feat_2d, seen, torch.zeros(30, dtype=torch.long), 1).backward()
    assert feat_2d.grad is None
    assert feat_3d.grad[:10].abs().sum(1).gt(0).all()
    assert not feat_3d.grad[10:].any()


def test_alignment_of_zero_features_is_finite():
    feat_3d = torch.zeros(4, 8, requires_grad=True)
    loss = alignment_loss(feat_3d, torch.randn(4, 8), torch.ones(4, dtype=torch.bool), torch.zeros(4).long(), 1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(feat_3d.grad).all()


def test_branch_loss_is_the_mean_of_both_and_reads_2d_where_seen():
    logits_3d, labels, index = example()
    logits_2d, seen = torch.randn(65, 4, requires_grad=True), torch.rand(65) < 0.5
    loss = branch_loss(logits_2d, logits_3d, labels, seen, index, 2)
    expected = semantic_loss(logits_2d, labels, index, 2, mask=seen) + semantic_loss(logits_3d, labels, index, 2)
    assert torch.allclose(loss, expected / 2)
    loss.backward()
    assert not logits_2d.grad[~seen].any()
    assert logits_2d.grad[seen & (labels != IGNORE)].any()
    assert logits_3d.grad[~seen & (labels != IGNORE)].any()


def test_scene_mean_agrees_with_a_loop():
    values, mask, index = torch.randn(50), torch.rand(50) < 0.6, torch.randint(0, 3, (50,))
    expected = sum(values[mask & (index == s)].mean() for s in range(3)) / 4  # a fourth scene without any voxel
    assert torch.allclose(scene_mean(values, mask, index, 4), expected, atol=1e-6)


def test_the_five_weights_of_bifusion_are_the_documented_ones():
    weights = LOSS_WEIGHTS["bifusion"]
    five = {"semantic": 0.4, "instance_cls": 1.0, "instance_bce": 0.8, "instance_dice": 0.6, "instance_score": 0.3}
    assert {name: weights[name] for name in five} == five
    assert sum(five.values()) == pytest.approx(3.1)
    assert LOSS_WEIGHTS["baseline"] == {"semantic": 1.0, "instance": 1.0}


def test_weighted_sum_multiplies_adds_and_refuses_a_term_without_weight():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(terms, {"a": 0.5, "b": 2.0, "c": 7.0}) == 7.0
    with pytest.raises(KeyError, match=r"\['b'\]"):
        weighted_sum(terms, {"a": 1.0})


def test_gate_prior_is_the_squared_distance_of_each_scenes_mean_from_one_half():
    alpha = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.2, 0.9], requires_grad=True)
    seen = torch.tensor([True, True, True, True, True, False])
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    loss = gate_prior(alpha, seen, index, 3)  # scene means 0.5, 0.2 and none
    assert torch.allclose(loss, torch.tensor(0.3**2 / 3))
    loss.backward()
    assert (alpha.grad[:3].abs() < 1e-6).all()  # single voxels far from 0.5 are free as long as the mean is there
    assert (alpha.grad[3:5] < 0).all()  # down the gradient: up, towards 0.5
    assert alpha.grad[5] == 0


def test_gate_prior_is_zero_and_finite_where_nothing_is_seen():
    alpha = torch.zeros(4, requires_grad=True)
    loss = gate_prior(alpha, torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), 1)
    loss.backward()
    assert loss == 0
    assert (alpha.grad == 0).all()
