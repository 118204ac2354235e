"""Tests of losses.py: agreement with slow formulas, ignored labels, batches, gradients."""

import itertools
import math

import pytest
import torch

from losses import (IGNORE, INSTANCE, LOSS_WEIGHTS, NO_OBJECT, OUTSIDE, alignment_loss, gate_prior, instance_loss,
                    layer_loss, mask_costs, match, scene_mean, semantic_loss, weighted_sum)


def example(sizes=(40, 25), classes=4, scale=1.0):
    """logits (M, K) that ask for a gradient, labels with some ignored, batch_index."""
    count = sum(sizes)
    logits = (scale * torch.randn(count, classes)).requires_grad_()
    labels = torch.randint(-1, classes, (count,))
    return logits, labels, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def queries(q=7, s=12, classes=5, scale=2.0):
    """A prediction of q queries over s superpoints, as QueryDecoder makes it, that asks for a gradient."""
    return {"class_logits": (scale * torch.randn(q, classes + 1)).requires_grad_(),
            "mask_logits": (scale * torch.randn(q, s)).requires_grad_(), "score": torch.rand(q).requires_grad_(),
            "origin": torch.randint(0, s, (q,))}


def instances(g=4, s=12, classes=5):
    """labels (G,), masks (G, S): every instance has at least one superpoint, some superpoints have none."""
    owner = torch.cat([torch.arange(g), torch.randint(-1, g, (max(0, s - g),))])[torch.randperm(s)]
    return torch.randint(0, classes, (g,)), owner == torch.arange(g)[:, None]


def slow_costs(logits, mask):
    """BCE and dice of one query and one instance, superpoint by superpoint, in Python floats."""
    p, t = [1 / (1 + math.exp(-x)) for x in logits.tolist()], [float(x) for x in mask.tolist()]
    bce = -sum(math.log(a) if b else math.log(1 - a) for a, b in zip(p, t)) / len(p)
    return bce, 1 - (2 * sum(a * b for a, b in zip(p, t)) + 1) / (sum(p) + sum(t) + 1)


def slow_layer(prediction, labels, masks, pairs):
    """The four losses for a given assignment [(query, instance)], in Python floats."""
    logits, total, weights = prediction["class_logits"].tolist(), 0.0, 0.0
    for q, row in enumerate(logits):
        target = next((labels[g].item() for a, g in pairs if a == q), len(row) - 1)
        weight = NO_OBJECT if target == len(row) - 1 else 1.0
        total += weight * (math.log(sum(map(math.exp, row))) - row[target])
        weights += weight
    costs = [slow_costs(prediction["mask_logits"][q], masks[g]) for q, g in pairs]
    errors = []
    for q, g in pairs:
        positive = prediction["mask_logits"][q] > 0
        iou = (positive & masks[g]).sum().item() / max(1, (positive | masks[g]).sum().item())
        if iou > 0.5:
            errors.append((prediction["score"][q].item() - iou) ** 2)
    return {"instance_cls": total / weights, "instance_bce": sum(c[0] for c in costs) / len(pairs),
            "instance_dice": sum(c[1] for c in costs) / len(pairs), "instance_score": sum(errors) / max(1, len(errors))}


def slow_semantic(logits, labels):
    """Cross-entropy + dice of one scene from their formulas, voxel by voxel, in Python floats."""
    rows = [(row, label) for row, label in zip(logits.tolist(), labels.tolist()) if label != IGNORE]
    powers = [[math.exp(x - max(row)) for x in row] for row, _ in rows]
    probabilities = [[p / sum(row) for p in row] for row in powers]
    entropy = -sum(math.log(p[label]) for p, (_, label) in zip(probabilities, rows)) / len(rows)
    dice = []
    for k in sorted({label for _, label in rows}):
        overlap = sum(p[k] for p, (_, label) in zip(probabilities, rows) if label == k)
        size = sum(p[k] for p in probabilities) + sum(label == k for _, label in rows)
        dice.append(1 - (2 * overlap + 1) / (size + 1))
    return entropy + sum(dice) / len(dice)


def test_semantic_loss_agrees_with_its_formula_and_a_class_absent_from_the_scene_does_not_count_in_dice():
    logits, labels, index = example((60,), classes=6)
    for held in (labels, labels.where(labels <= 2, 0)):
        assert semantic_loss(logits, held, index, 1).item() == pytest.approx(slow_semantic(logits, held), abs=1e-5)


def test_loss_of_a_batch_is_the_mean_of_its_scenes_losses_in_any_order_of_voxels():
    logits, labels, index = example((60, 7, 21))
    feat_2d, seen = torch.randn(88, 4), torch.rand(88) < 0.5
    for loss, voxels in ((semantic_loss, (logits, labels)), (alignment_loss, (logits, feat_2d, seen))):
        whole = loss(*voxels, index, 3)
        single = [loss(*(v[index == s] for v in voxels), index[index == s] * 0, 1) for s in range(3)]
        assert torch.allclose(whole, torch.stack(single).mean(), atol=1e-6)
        mixed = torch.randperm(88)
        assert torch.allclose(loss(*(v[mixed] for v in voxels), index[mixed], 3), whole, atol=1e-6)


def test_ignored_voxels_change_neither_loss_nor_gradient_and_a_scene_without_labels_adds_zero_and_counts():
    logits, labels, index = example()
    labels[index == 1] = IGNORE
    loss = semantic_loss(logits, labels, index, 2)
    loss.backward()
    ignored = labels == IGNORE
    assert ignored[index == 0].any() and not logits.grad[ignored].any()
    kept = semantic_loss(logits[~ignored], labels[~ignored], index[~ignored], 1)
    assert torch.allclose(loss, kept / 2, atol=1e-6)


def test_loss_is_zero_with_a_zero_gradient_when_every_label_is_ignored_and_of_no_voxel_at_all():
    logits, _, index = example()
    for count in (65, 0):
        feat, none = logits[:count], torch.full((count,), IGNORE)
        for loss in (semantic_loss(feat, none, index[:count], 2),
                     alignment_loss(feat, feat.detach(), none > 0, index[:count], 2)):
            assert loss.item() == 0
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            assert not gradient.any()


@pytest.mark.parametrize("scale", [1e3, 1e8, 1e30])
def test_huge_logits_give_a_finite_loss_and_gradient(scale):
    logits, labels, index = example(scale=scale)
    loss = semantic_loss(logits, labels, index, 2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


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


def test_alignment_is_one_minus_the_cosine_over_seen_voxels_and_finite_for_zero_features():
    feat_3d, feat_2d = torch.randn(30, 8), torch.randn(30, 8)
    seen, index = torch.arange(30) % 3 == 0, torch.zeros(30, dtype=torch.long)
    expected = [1 - (a @ b / a.norm() / b.norm()).item() for a, b, s in zip(feat_3d, feat_2d, seen) if s]
    assert alignment_loss(feat_3d, feat_2d, seen, index, 1).item() == pytest.approx(sum(expected) / 10, abs=1e-6)
    assert alignment_loss(feat_3d, 3 * feat_3d, seen, index, 1).abs() < 1e-6
    zero = torch.zeros(30, 8, requires_grad=True)
    loss = alignment_loss(zero, feat_2d, seen, index, 1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(zero.grad).all()


def test_alignment_moves_the_3d_side_alone_and_only_where_seen():
    feat_3d, feat_2d = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    seen = torch.arange(30) < 10
    alignment_loss(feat_3d, feat_2d, seen, torch.zeros(30, dtype=torch.long), 1).backward()
    assert feat_2d.grad is None
    assert feat_3d.grad[:10].abs().sum(1).gt(0).all() and not feat_3d.grad[10:].any()


def test_scene_mean_agrees_with_a_loop():
    values, mask, index = torch.randn(50), torch.rand(50) < 0.6, torch.randint(0, 3, (50,))
    expected = sum(values[mask & (index == s)].mean() for s in range(3)) / 4  # a fourth scene without any voxel
    assert torch.allclose(scene_mean(values, mask, index, 4), expected, atol=1e-6)


def test_the_five_weights_of_bifusion_are_the_documented_ones():
    weights = LOSS_WEIGHTS["bifusion"]
    five = {"semantic": 0.4, "instance_cls": 1.0, "instance_bce": 0.8, "instance_dice": 0.6, "instance_score": 0.3}
    assert {name: weights[name] for name in five} == five
    assert sum(five.values()) == pytest.approx(3.1)
    assert LOSS_WEIGHTS["baseline"] == dict.fromkeys(["semantic", *INSTANCE], 1.0) and set(INSTANCE) < set(five)


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
    loss = gate_prior(alpha, torch.zeros(6, dtype=torch.bool), index, 3)
    assert loss == 0 and not torch.autograd.grad(loss, alpha)[0].any()  # nothing is seen


def test_mask_costs_agree_with_their_formulas():
    prediction, (_, masks) = queries(), instances()
    bce, dice = mask_costs(prediction["mask_logits"], masks)
    for q, g in itertools.product(range(7), range(4)):
        expected = slow_costs(prediction["mask_logits"][q], masks[g])
        assert (bce[q, g].item(), dice[q, g].item()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("learned", [False, True], ids=["from superpoints", "learned"])
@pytest.mark.parametrize("q, g", [(5, 3), (3, 5), (4, 4), (1, 3)])
def test_the_matching_is_the_cheapest_of_all_one_to_one_assignments_with_and_without_origin(q, g, learned):
    for _ in range(5):
        prediction, (labels, masks) = queries(q), instances(g)
        outside = [[0 if learned or masks[b, o] else OUTSIDE for b in range(g)] for o in prediction["origin"].tolist()]
        if learned:
            del prediction["origin"]
        query, instance = match(prediction, labels, masks)
        assert len(query) == len(set(query.tolist())) == len(set(instance.tolist())) == min(q, g)
        probability = prediction["class_logits"].softmax(1)
        cost = [[-0.5 * probability[a, labels[b]].item() + sum(slow_costs(prediction["mask_logits"][a], masks[b]))
                 + outside[a][b] for b in range(g)] for a in range(q)]
        pairs = ([zip(chosen, range(g)) for chosen in itertools.permutations(range(q), g)] if q >= g else
                 [zip(range(q), chosen) for chosen in itertools.permutations(range(g), q)])
        best = min(sum(cost[a][b] for a, b in assignment) for assignment in pairs)
        assert sum(cost[a][b] for a, b in zip(query.tolist(), instance.tolist())) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("q, g", [(7, 4), (3, 6), (1, 1)])
def test_the_four_instance_losses_agree_with_their_formulas(q, g):
    scored = 0
    for _ in range(10):
        prediction, (labels, masks) = queries(q), instances(g)
        with torch.no_grad():  # some queries are near an instance, so that some scores count
            prediction["mask_logits"][:g] += 6 * (masks[:q].float() - 0.5)
        pairs = list(zip(*(x.tolist() for x in match(prediction, labels, masks))))
        expected = slow_layer(prediction, labels, masks, pairs)
        losses = {name: value.item() for name, value in layer_loss(prediction, labels, masks).items()}
        assert losses == pytest.approx(expected, abs=1e-4)
        scored += expected["instance_score"] > 0
    assert scored


def test_the_order_of_queries_instances_and_superpoints_does_not_change_the_instance_losses():
    prediction, (labels, masks) = queries(), instances()
    q, g, s = torch.randperm(7), torch.randperm(4), torch.randperm(12)
    mixed = {"class_logits": prediction["class_logits"][q], "mask_logits": prediction["mask_logits"][q][:, s],
             "score": prediction["score"][q], "origin": s.argsort()[prediction["origin"]][q]}
    before, after = layer_loss(prediction, labels, masks), layer_loss(mixed, labels[g], masks[g][:, s])
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in INSTANCE)


def test_true_masks_and_classes_cost_nothing_and_a_wrong_class_or_mask_costs_much():
    labels, masks = instances(g=4, classes=5)
    perfect = {"class_logits": 40.0 * torch.eye(6)[torch.cat([labels, torch.tensor([5, 5, 5])])],
               "mask_logits": 80.0 * (torch.cat([masks, torch.zeros(3, 12, dtype=torch.bool)]).float() - 0.5),
               "score": torch.ones(7), "origin": torch.cat([masks.int().argmax(1), torch.zeros(3, dtype=torch.long)])}
    assert all(v < 1e-6 for v in layer_loss(perfect, labels, masks).values())
    assert layer_loss(perfect, (labels + 1) % 5, masks)["instance_cls"] > 10
    wrong = layer_loss(perfect, labels, masks.roll(1, 1))
    assert wrong["instance_bce"] > 5 and wrong["instance_dice"] > 0.3
    assert layer_loss(perfect | {"score": torch.zeros(7)}, labels, masks)["instance_score"] == 1


@pytest.mark.parametrize("sizes, g", [({}, 0), ({"q": 2}, 9), ({"q": 1, "s": 1}, 1), ({"scale": 1e4}, 4)],
                         ids=["no instances", "more than queries", "one superpoint", "huge logits"])
def test_instance_losses_and_their_gradients_are_finite_and_without_instances_only_the_class_is_supervised(sizes, g):
    prediction, (labels, masks) = queries(**sizes), instances(g, sizes.get("s", 12))
    losses = layer_loss(prediction, labels, masks)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values()) and losses["instance_cls"] > 0
    assert all(torch.isfinite(prediction[key].grad).all() for key in ("class_logits", "mask_logits", "score"))
    assert g or [losses[name].item() for name in INSTANCE[1:]] == [0, 0, 0]


def test_a_nan_in_a_prediction_reaches_the_loss_instead_of_stopping_the_matcher():
    prediction = {name: value.detach() for name, value in queries().items()}
    prediction["mask_logits"][2, 3] = math.nan
    prediction["class_logits"][4, 1] = math.inf
    assert not torch.isfinite(sum(layer_loss(prediction, *instances(g=7)).values()))


def batch_of_scenes(counts, superpoints=(12, 9, 5)):
    """predictions of two layers a scene, and the five other arguments of instance_loss."""
    scenes = [instances(g, s) for g, s in zip(counts, superpoints)]
    owner = [torch.where(masks.any(0), masks.int().argmax(0) if len(masks) else -1, -1) for _, masks in scenes]
    predictions = [[queries(6, s), queries(6, s)] for s in superpoints[: len(counts)]]
    number, sizes = torch.arange(len(counts)), torch.tensor([len(o) for o in owner])
    return (predictions, torch.cat(owner), number.repeat_interleave(sizes), torch.cat([labels for labels, _ in scenes]),
            number.repeat_interleave(torch.tensor(counts)), torch.ones(len(counts), dtype=torch.bool)), scenes


def test_instance_loss_is_the_mean_over_scenes_and_layers_and_a_scene_without_annotation_adds_zero_and_counts():
    arguments, scenes = batch_of_scenes((4, 0, 5))
    for annotated in ([True, True, True], [True, True, False]):
        loss = instance_loss(*arguments[:-1], torch.tensor(annotated))
        for name in INSTANCE:
            single = [layer_loss(layer, *scene)[name] * known
                      for layers, scene, known in zip(arguments[0], scenes, annotated) for layer in layers]
            assert torch.allclose(loss[name], torch.stack(single).mean(), atol=1e-6)


def test_the_score_learns_only_where_the_mask_is_good_and_learns_the_iou():
    labels, masks = torch.tensor([1, 2]), torch.tensor([[True] * 6 + [False] * 6, [False] * 6 + [True] * 6])
    logits = 8.0 * (masks.float() - 0.5)
    logits[0, 4:8] *= -1  # 4 of its 6 superpoints, and 2 of the other's: IoU 0.5, not above
    logits[1, 6] *= -1  # 5 of 6
    prediction = queries(2) | {"mask_logits": logits, "score": torch.tensor([0.2, 0.3], requires_grad=True),
                               "origin": torch.tensor([0, 11])}
    layer_loss(prediction, labels, masks)["instance_score"].backward()
    assert prediction["score"].grad.tolist() == pytest.approx([0, 2 * (0.3 - 5 / 6)])


def test_an_instance_gets_a_query_of_its_own_superpoints_however_well_others_fit():
    labels, masks = torch.tensor([1, 2]), torch.tensor([[True] * 4 + [False] * 8, [False] * 4 + [True] * 8])
    prediction = queries(3)
    prediction["mask_logits"] = 8 * (masks[[0, 1, 1]].float() - 0.5)
    prediction["class_logits"] = 9.0 * torch.eye(6)[[1, 2, 2]]
    prediction["origin"] = torch.tensor([7, 2, 9])  # the first query fits instance 0 but comes from instance 1
    query, instance = match(prediction, labels, masks)
    assert dict(zip(instance.tolist(), query.tolist())) == {0: 1, 1: 2}
    prediction["origin"] = torch.tensor([7, 5, 9])  # none comes from instance 0: the cheapest it is
    query, instance = match(prediction, labels, masks)
    assert dict(zip(instance.tolist(), query.tolist()))[0] == 0
