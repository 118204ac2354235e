"""Tests of model.py: sizes, agreement with dense convolutions, batches, edges, gradients in every stage."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix

from losses import LOSS_WEIGHTS, weighted_sum
from model import (
    IN_CHANNELS,
    PRESETS,
    Attention,
    QueryDecoder,
    SparseUNet,
    VoxelBatchNorm,
    build_model,
    largest_pieces,
    select_instances,
    superpoint_graph,
    superpoint_means,
    superpoint_sizes,
)
from stages import PARTS, apply_setting, setting_at
from train import loss_terms

SETTINGS = {"stage 1": 0, "ramp at 0": 21, "ramp": 23, "simple": 30, "learned": 50, "stage 3": 70}


def count(module):
    return sum(p.numel() for p in module.parameters())


def set_up(model, epoch, plan="full"):
    """Put a model into the setting of an epoch, as train.py does."""
    apply_setting(model, setting_at(epoch, plan=plan, pretrained=hasattr(model, "tower") and model.tower.pretrained))
    return model.train()


def backward(model, batch):
    loss = weighted_sum(loss_terms(model(batch), batch, model.setting), LOSS_WEIGHTS["bifusion"])
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss


def assert_finite_step(model, batch):
    loss = backward(model, batch)
    assert torch.isfinite(loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


AXES = {  # the key that tells the scene of each row of these keys; batch_index tells it of all others
    "view_batch": ("image", "depth", "world_to_camera", "intrinsics", "view_batch"),
    "superpoint_batch": ("superpoint_batch", "superpoint_instance"),
    "instance_batch": ("instance_batch", "instance_label"),
}


def scenes_of(batch):
    """The scenes of a batch as batches of one; the batch has one point a voxel, as make_batch gives it."""
    for s, name in enumerate(batch["names"]):
        single, rows = {"names": [name], "has_instances": batch["has_instances"][s : s + 1]}, batch["batch_index"] == s
        for key in batch.keys() - single.keys():
            axis = next((axis for axis, keys in AXES.items() if key in keys), "batch_index")
            single[key] = batch[key][batch[axis] == s]
        for key in ("batch_index", "view_batch", "point_batch", "superpoint_batch", "instance_batch"):
            single[key] = single[key] * 0
        for key in ("point_to_voxel", "piece_voxel", "point_superpoint", "piece_superpoint"):
            single[key] = single[key] - single[key].min()
        yield rows, single


# ---- sizes and names

def test_the_3d_branch_of_base_has_the_published_number_of_parameters():
    assert count(SparseUNet(IN_CHANNELS, **PRESETS["base"]["unet"])) == 39_155_904


def test_the_baseline_of_base_has_41_million_parameters():
    model = build_model("baseline", "base", 20)
    assert count(model) == pytest.approx(41e6, rel=0.02)
    assert count(model.decoder) > 1.5e6


def test_the_3d_branch_of_small_has_about_a_million():
    assert 0.95e6 < count(SparseUNet(IN_CHANNELS, **PRESETS["small"]["unet"])) < 1.15e6


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(KeyError, match=r"unknown preset 'huge'.*'base', 'small'"):
        build_model("bifusion", "huge", 20)
    with pytest.raises(KeyError, match=r"unknown model 'pointnet'.*'baseline', 'bifusion'"):
        build_model("pointnet", "small", 20)


def test_bifusion_of_base_has_89_million_parameters_and_its_tower_half_of_vit_b_16():
    model = build_model("bifusion", "base", 20, clip_weights="scratch")
    assert count(model) == pytest.approx(89e6, rel=0.05)
    assert count(model.tower.visual) == pytest.approx(43.3e6, rel=0.01)
    assert len(model.tower.visual.net.transformer.resblocks) == 6


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_every_parameter_stands_in_exactly_one_part(name):
    model = build_model(name, "small", 20)
    parts = model.parts()
    assert set(parts) <= set(PARTS)
    listed = [id(p) for parameters in parts.values() for p in parameters]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}


# ---- the sparse U-Net

def to_dense(features, cells, shape):
    dense = torch.zeros(1, features.shape[1], *shape)
    dense[0, :, cells[:, 0], cells[:, 1], cells[:, 2]] = features.T
    return dense


def dense_weight(conv, transposed=False):
    """spconv's (out, k, k, k, in) as torch's."""
    return conv.weight.permute((4, 0, 1, 2, 3) if transposed else (0, 4, 1, 2, 3))


def dense_unet(net, feat, cells):
    """SparseUNet by dense convolutions that are cut to the occupied cells after each, in eval mode."""
    shape = [-(-(n + 1) // 2**net.levels) * 2**net.levels for n in cells.amax(0).tolist()]
    masks = [to_dense(torch.ones(len(cells), 1), cells, shape)]
    for _ in range(net.levels):
        masks.append(F.max_pool3d(masks[-1], 2))

    def norm(bn, x):
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    def block(b, x, mask):
        residual = x
        if not isinstance(b.project, torch.nn.Identity):
            residual = norm(b.project[1], F.conv3d(x, b.project[0].weight[:, :, None, None, None]))
        y = F.relu(norm(b.bn1, F.conv3d(x, dense_weight(b.conv1), padding=1) * mask)) * mask
        y = norm(b.bn2, F.conv3d(y, dense_weight(b.conv2), padding=1) * mask)
        return F.relu(y + residual) * mask

    x = F.conv3d(to_dense(feat, cells, shape), dense_weight(net.stem), padding=2)
    x = F.relu(norm(net.stem_bn, x)) * masks[0]
    skips = []
    for level in range(net.levels):
        skips.append(x)
        mask = masks[level + 1]
        x = F.relu(norm(net.down_bn[level], F.conv3d(x, dense_weight(net.down[level]), stride=2))) * mask
        for b in net.encoder[level]:
            x = block(b, x, mask)
    for i, level in enumerate(reversed(range(net.levels))):
        mask = masks[level]
        x = F.conv_transpose3d(x, dense_weight(net.up[i], transposed=True), stride=2)
        x = torch.cat([F.relu(norm(net.up_bn[i], x)) * mask, skips.pop()], 1)
        for b in net.decoder[i]:
            x = block(b, x, mask)
    return x[0, :, cells[:, 0], cells[:, 1], cells[:, 2]].T


@pytest.mark.parametrize("extent", [(8, 4, 4), (7, 5, 3), (9, 9, 2), (1, 1, 13)])
def test_the_sparse_unet_computes_what_dense_convolutions_compute_and_loses_no_voxel(make_model, extent):
    net = make_model("baseline").unet
    cells = torch.stack(torch.meshgrid(*map(torch.arange, extent), indexing="ij"), -1).reshape(-1, 3)
    corner = (cells == torch.tensor(extent) - 1).all(1)
    cells = cells[(torch.rand(len(cells)) < 0.6) | corner]  # the corner gives an odd extent its last voxel
    feat = torch.randn(len(cells), IN_CHANNELS)
    batch_index = torch.zeros(len(cells), dtype=torch.long)
    for _ in range(3):
        net(feat, cells, batch_index, 1)  # running statistics away from their start
    with torch.no_grad():
        out = net.eval()(feat, cells, batch_index, 1)
        expected = dense_unet(net, feat, cells)
    assert out.shape == (len(cells), net.out_channels)
    assert torch.allclose(out, expected, atol=1e-4)
    assert out.std() > 1e-3


def test_batch_norm_of_a_single_voxel_uses_its_running_statistics():
    norm = VoxelBatchNorm(4)
    norm(torch.randn(100, 4) * 3 + 1)
    one = torch.randn(1, 4)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    assert torch.equal(norm(one), norm.eval()(one))
    assert all(torch.equal(v, state[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_a_batch_gives_what_its_scenes_give_singly(make_model, make_batch, train_steps, name):
    model, batch = make_model(name), make_batch(voxels=(150, 90, 40), views=(2, 0, 3))
    train_steps(model, setting_at(70), batch)
    model.eval()
    with torch.no_grad():
        whole = model(batch)
        for i, (rows, single) in enumerate(scenes_of(batch)):
            out = model(single)
            for layer, expected in zip(out["instances"][0], whole["instances"][i], strict=True):
                assert all(torch.allclose(layer[key], expected[key], atol=1e-4) for key in expected)
            assert torch.allclose(out["logits"], whole["logits"][rows], atol=1e-5)
            if name == "bifusion":
                assert torch.equal(out["seen"], whole["seen"][rows])
                assert torch.allclose(out["alpha"], whole["alpha"][rows], atol=1e-5)


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_the_order_of_the_voxels_does_not_matter(make_model, make_batch, train_steps, name):
    model, batch = make_model(name), make_batch()
    train_steps(model, setting_at(70), batch)
    model.eval()
    order = torch.randperm(len(batch["segment"]))
    rows = ("grid_coord", "batch_index", "color", "normal", "coord", "world_coord", "segment")
    shuffled = batch | {key: batch[key][order] for key in rows} | {"piece_voxel": order.argsort()}
    with torch.no_grad():
        assert torch.allclose(model(shuffled)["logits"], model(batch)["logits"][order], atol=1e-4)


def test_views_of_another_scene_are_not_looked_into(make_model, make_batch):
    model, batch = make_model(), make_batch()
    set_up(model, 50).eval()
    with torch.no_grad():
        before = model(batch)
        batch["image"][batch["view_batch"] == 1] = 0
        after = model(batch)
    first = batch["batch_index"] == 0
    assert torch.equal(before["feat_2d"][first], after["feat_2d"][first])
    assert not torch.equal(before["feat_2d"][~first], after["feat_2d"][~first])


# ---- edges

@pytest.mark.parametrize("epoch", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", ["one voxel", "no view", "no seen voxel", "all ignored", "no depth reading",
                                  "no instance", "instances not annotated", "all of these"])
def test_a_poor_scene_trains_on_with_finite_loss_and_gradients(make_model, make_batch, epoch, case):
    batch = make_batch(voxels=(1,), views=(2,)) if case in ("one voxel", "all of these") else make_batch(
        views=(0, 0) if case == "no view" else (2, 2))
    if case in ("no instance", "all of these"):
        batch["superpoint_instance"][:] = -1
        batch["instance_label"], batch["instance_batch"] = batch["instance_label"][:0], batch["instance_batch"][:0]
    if case == "instances not annotated":
        batch["has_instances"][:] = False
    if case == "one voxel":
        batch["segment"][:] = 1
    if case == "no seen voxel":
        batch["world_coord"] += 100
    if case in ("all ignored", "all of these"):
        batch["segment"][:] = -1
    if case in ("no depth reading", "all of these"):
        batch["depth"][:] = 0
    for name in ("baseline", "bifusion"):
        model = set_up(make_model(name), epoch)
        assert_finite_step(model, batch)
        if name == "bifusion" and epoch > 21 and case in ("no view", "no seen voxel", "no depth reading",
                                                           "all of these"):
            out = model(batch)
            assert not out["seen"].any()
            assert not out["alpha"].any()
            assert out["stats"]["fusion_2d_ratio"] is None


@pytest.mark.parametrize("epoch", SETTINGS.values(), ids=SETTINGS)
def test_huge_and_tiny_colours_train_finitely(make_model, make_batch, epoch):
    for scale in (1e-4, 1e4):
        batch = make_batch()
        batch["color"] *= scale
        assert_finite_step(set_up(make_model(), epoch), batch)


# ---- everything trains

@pytest.mark.parametrize("plan", ["full", "A", "B"])
@pytest.mark.parametrize("kind", ["baseline", "scratch", "pretrained"])
@pytest.mark.parametrize("epoch", SETTINGS.values(), ids=SETTINGS)
def test_every_trainable_parameter_gets_a_gradient_and_no_other_does(make_model, make_batch, epoch, kind, plan):
    model = make_model("baseline" if kind == "baseline" else "bifusion", pretrained=kind == "pretrained")
    set_up(model, epoch, plan)
    backward(model, make_batch())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["scratch", "pretrained"])
def test_after_a_few_steps_no_gradient_is_zero_throughout(make_model, make_batch, train_steps, kind):
    model, batch = make_model(pretrained=kind == "pretrained"), make_batch(voxels=(300, 200), views=(3, 3))
    optimizer = train_steps(model, setting_at(70, pretrained=kind == "pretrained"), batch)
    train_steps(model, model.setting, batch, optimizer=optimizer)
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert [name for name in dead if "score_head" not in name] == []  # that one learns where a mask's IoU is above 0.5


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_the_small_preset_of_build_model_runs_and_everything_is_on_before_a_stage_is_set(make_batch, name):
    model, batch = build_model(name, "small", 5), make_batch()
    out = model.eval()(batch)
    assert out["logits"].shape == (len(batch["segment"]), 5)
    apply_setting(model, setting_at(100, pretrained=True))  # the last of the curriculum
    expected = model(batch)
    assert out.keys() == expected.keys() and torch.equal(out["logits"], expected["logits"])
    assert "instances" in out and (name == "baseline" or out["alpha"].any())
    assert not build_model("bifusion", "small", 5).train().tower.visual.training  # its statistics are protected
    assert_finite_step(set_up(model, 70), batch)


def test_building_a_model_prints_nothing():
    code = "import model; model.build_model('bifusion', 'small', 20)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_a_gpu_gives_the_logits_of_the_cpu(make_model, make_batch, train_steps, name):
    model, batch = make_model(name), make_batch()
    train_steps(model, setting_at(70), batch)
    model.eval()
    with torch.no_grad():
        here = model(batch)["logits"]
        there = model.cuda()({k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()})["logits"].cpu()
    assert torch.allclose(here, there, atol=2e-2)


def test_both_models_of_one_seed_start_from_the_same_3d_weights():
    torch.manual_seed(3)
    baseline = build_model("baseline", "small", 20).state_dict()
    torch.manual_seed(3)
    bifusion = build_model("bifusion", "small", 20).state_dict()
    assert len(baseline) > 50
    assert all(torch.equal(value, bifusion[name]) for name, value in baseline.items())


# ---- the query decoder


def decoder(layers=2, channels=12, classes=5):
    return QueryDecoder(channels, dim=16, hidden=32, layers=layers, heads=4, num_classes=classes)


def test_superpoint_means_are_those_of_a_loop_over_the_points():
    voxel = torch.tensor([0, 0, 1, 2, 2, 2, 3])  # of seven points
    superpoint = torch.tensor([1, 0, 0, 1, 1, 2, 2])
    pieces, points = torch.stack([superpoint, voxel]).unique(dim=1, return_counts=True)
    batch = {"piece_superpoint": pieces[0], "piece_voxel": pieces[1], "piece_points": points.float(),
             "superpoint_batch": torch.zeros(3, dtype=torch.long)}
    feat = torch.randn(4, 5)
    expected = torch.stack([feat[voxel[superpoint == s]].mean(0) for s in range(3)])
    assert torch.allclose(superpoint_means(feat, batch), expected, atol=1e-6)
    assert superpoint_sizes(batch).tolist() == [2, 3, 2]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_softmax_over_the_allowed_keys(masked):
    attention, query, keys = Attention(16, 4), torch.randn(5, 16), torch.randn(9, 16)
    allowed = (torch.rand(5, 9) > 0.5) | (torch.arange(9) == 0) if masked else None
    q, (k, v) = attention.to_query(query), attention.to_key_value(keys).chunk(2, 1)
    heads = []
    for h in range(4):
        part = slice(4 * h, 4 * h + 4)
        logits = q[:, part] @ k[:, part].T / 2
        heads.append((logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(1) @ v[:, part])
    expected = attention.norm(query + attention.out(torch.cat(heads, 1)))
    assert torch.allclose(attention(query, keys, allowed), expected, atol=1e-5)


def test_the_decoder_predicts_before_the_first_and_after_each_layer():
    net, superpoint = decoder(layers=3), torch.randn(9, 12)
    net.choose_queries = torch.arange
    predictions = net(superpoint)
    assert len(predictions) == 4
    for prediction in predictions:
        assert {key: tuple(value.shape) for key, value in prediction.items()} == {
            "class_logits": (9, 6), "mask_logits": (9, 9), "score": (9,), "origin": (9,)}
        assert torch.equal(prediction["origin"], torch.arange(9))
    (last,) = net.eval()(superpoint)  # in evaluation the last alone
    assert all(torch.equal(last[key], predictions[-1][key]) for key in last)


def test_in_evaluation_all_superpoints_become_queries_up_to_a_limit(monkeypatch):
    net = decoder().eval()
    assert torch.equal(net.choose_queries(7), torch.arange(7))
    monkeypatch.setattr("model.MAX_QUERIES", 3)
    assert net.choose_queries(7).tolist() == [0, 2, 4] and net.choose_queries(3).tolist() == [0, 1, 2]


def test_a_random_share_of_superpoints_from_a_half_up_become_queries_in_training():
    net, superpoint = decoder(layers=1), torch.randn(40, 12)
    origins = [net(superpoint)[0]["origin"] for _ in range(60)]
    counts = [len(origin) for origin in origins]
    assert 20 <= min(counts) < 25 and 35 < max(counts) <= 40
    assert all(len(origin.unique()) == len(origin) for origin in origins)
    assert set(torch.cat(origins).tolist()) == set(range(40))
    sampled = net(superpoint)[0]  # before the first layer a query predicts the same, whoever else was drawn
    net.choose_queries = torch.arange
    query = net(superpoint)[0]
    assert torch.allclose(sampled["mask_logits"], query["mask_logits"][sampled["origin"]], atol=1e-5)


def test_a_query_looks_only_at_the_superpoints_of_its_mask_and_at_all_where_it_has_none():
    net, superpoint, seen = decoder(layers=1).eval(), torch.randn(6, 12), []
    net.cross[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    logits = torch.randn(6, 6)
    logits[0], logits[1] = -1, torch.tensor([1.0, -1, -1, -1, -1, 0])
    net.predict = lambda query, masks: {"mask_logits": logits}
    net(superpoint)
    assert seen[0][0].all() and seen[0][1].tolist() == [True, False, False, False, False, True]
    assert torch.equal(seen[0][1:], (logits >= 0)[1:] | ~(logits >= 0).any(1, keepdim=True)[1:])


@pytest.mark.parametrize("count", [1, 2])
def test_a_scene_of_one_or_two_superpoints_passes_the_decoder(count):
    net, superpoint = decoder(), torch.randn(count, 12, requires_grad=True)
    for mode in (True, False):
        predictions = net.train(mode)(superpoint)
        assert all(torch.isfinite(value).all() for p in predictions for value in p.values())
    masks, labels, scores = select_instances(predictions[-1], torch.full((count,), 500.0))
    assert len(masks) == len(labels) == len(scores) <= 5 * count


def slow_nms(score, label, masks, sizes):
    """Decayed score of each instance, from the formula of matrix NMS (linear), sets and loops; best first."""
    members = [set(row.nonzero()[:, 0].tolist()) for row in masks]

    def iou(a, b):
        points = lambda those: sum(sizes[s].item() for s in those)  # noqa: E731
        return points(members[a] & members[b]) / max(1, points(members[a] | members[b])) * (label[a] == label[b]).item()

    out = []
    for j in range(len(score)):
        factors = [(1 - iou(i, j)) / max(1e-6, 1 - max([iou(h, i) for h in range(i)], default=0)) for i in range(j)]
        out.append(score[j].item() * min([1.0, *factors]))
    return out


def test_select_instances_follows_its_formulas():
    for seed in range(10):
        torch.manual_seed(seed)
        logits, mask_logits, claimed = 2 * torch.randn(8, 4), 3 * torch.randn(8, 6), torch.rand(8) * 1.4 - 0.1
        mask_logits[5] = mask_logits[2] + 0.1  # two of almost the same mask
        mask_logits[7] = -1  # holds nothing
        sizes = torch.randint(20, 90, (6,)).float()
        prediction = {"class_logits": logits, "mask_logits": mask_logits, "score": claimed}
        masks, labels, scores = select_instances(prediction, sizes, top_k=15, min_points=100)
        pairs = []
        for q in range(8):
            inside = mask_logits[q] > 0
            mean = mask_logits[q].sigmoid()[inside].mean().item() if inside.any() else 0.0
            pairs += [(logits[q].softmax(0)[k].item() * claimed[q].clamp(0, 1).item(), mean, q, k) for k in range(3)]
        pairs = sorted(sorted(pairs, reverse=True)[:15], key=lambda pair: -pair[0] * pair[1])
        decayed = slow_nms(torch.tensor([p * m for p, m, _, _ in pairs]), torch.tensor([k for *_, k in pairs]),
                           torch.stack([mask_logits[q] > 0 for *_, q, _ in pairs]), sizes)
        expected = sorted(((s, q, k) for s, (*_, q, k) in zip(decayed, pairs)
                           if s > 0 and sizes[mask_logits[q] > 0].sum() >= 100), reverse=True)
        assert scores.tolist() == pytest.approx([s for s, _, _ in expected], abs=1e-5)
        assert labels.tolist() == [k for *_, k in expected]
        assert all(torch.equal(mask, mask_logits[q] > 0) for mask, (_, q, _) in zip(masks, expected, strict=True))


def test_of_two_equal_instances_one_is_left_and_the_best_keeps_its_score():
    masks = torch.tensor([[9.0, 9, -9], [9, 9, -9], [-9, -9, 9]])
    prediction = {"class_logits": 9 * torch.eye(4)[[0, 0, 1]], "mask_logits": masks,
                  "score": torch.tensor([0.9, 0.8, 0.7])}
    masks, labels, scores = select_instances(prediction, torch.full((3,), 200.0))
    assert labels[:2].tolist() == [0, 1] and scores[:2].tolist() == pytest.approx([0.9, 0.7], abs=2e-3)
    assert all(score < 1e-3 for score in scores[2:].tolist())


def test_superpoints_touch_where_their_voxels_have_a_common_face_in_one_scene():
    grid = torch.randint(0, 12, (300, 3), dtype=torch.int32)
    superpoint = torch.arange(300) % 60
    scene = superpoint % 2
    batch = {"grid_coord": grid, "batch_index": scene, "piece_voxel": torch.arange(300), "piece_superpoint": superpoint,
             "superpoint_batch": torch.arange(60) % 2}
    graph = torch.from_numpy(superpoint_graph(batch).toarray() > 0)[superpoint][:, superpoint]  # (300, 300), of voxels
    apart, same = (grid[:, None] - grid).abs(), scene[:, None] == scene
    assert graph[(apart.sum(2) <= 1) & same].all()
    near = ((apart.amax(2) <= 1) & same).float()
    member = torch.nn.functional.one_hot(superpoint).float()  # (300, 60)
    assert not graph[(member @ (member.T @ near @ member) @ member.T) == 0].any()


def test_a_mask_is_cut_to_its_largest_connected_piece():
    graph = torch.eye(6)
    for a, b in ((0, 1), (1, 2), (3, 4)):
        graph[a, b] = graph[b, a] = 1
    graph, sizes = csr_matrix(graph.numpy()), torch.tensor([10.0, 10, 10, 50, 1, 200])
    masks = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    assert largest_pieces(masks, graph, sizes).int().tolist() == [
        [0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


# ---- scenes without their images or without their points' colours

def blanked(model, batch, kind, grey=0.5):
    """model.blank of a batch whose first scene draws a blanking of this kind and whose second draws none."""
    draw = {"images": [0.0, 0.5], "points": [0.99, 0.5], "nothing": [0.5, 0.5]}[kind]
    real, torch.rand = torch.rand, lambda *shape: torch.tensor([draw, [grey, 0.9]])
    try:
        return model.blank(batch)
    finally:
        torch.rand = real


@pytest.mark.parametrize("kind", ["images", "points", "nothing"])
def test_blank_empties_one_branch_of_the_scene_drawn_and_touches_nothing_else(make_model, make_batch, kind):
    model, batch = make_model(), make_batch()
    del model.blank
    before = {key: value.clone() for key, value in batch.items() if torch.is_tensor(value)}
    apply_setting(model.train(), setting_at(70))
    found, whole = blanked(model, batch, kind)
    first, views = batch["batch_index"] == 0, batch["view_batch"] == 0
    expected = dict(before)
    if kind == "images":
        grey = torch.tensor(127, dtype=torch.uint8)
        expected["image"] = torch.where(views[:, None, None, None], grey, batch["image"])
    if kind == "points":
        expected["color"] = torch.where(first[:, None], 0.0, batch["color"])
        expected["normal"] = torch.where(first[:, None], 0.0, batch["normal"])
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == before[key].dtype for key in before)
    assert all(torch.equal(batch[key], before[key]) for key in before)  # the caller's own
    assert whole is None if kind == "nothing" else torch.equal(whole, ~first)
    batch["image"] = batch["image"][..., :0]  # as with a cache
    if kind != "nothing":
        with pytest.raises(ValueError, match="cannot be blanked where a cache has their maps"):
            blanked(model, batch, kind)


def test_a_blanked_scene_counts_as_unseen_and_not_in_the_stats(make_model, make_batch, monkeypatch):
    model, batch = make_model(), make_batch()
    apply_setting(model.train(), setting_at(70))
    first = batch["batch_index"] == 0
    monkeypatch.setattr(model, "blank", lambda batch: (batch, ~first))
    out = model(batch)
    assert not out["seen"][first].any() and out["seen"][~first].any()
    seen = out["seen"][~first]
    assert out["stats"]["seen_share"] == pytest.approx(seen.float().mean().item())
    assert out["alpha"][first].any()  # the gate is asked all the same
    monkeypatch.setattr(model, "blank", lambda batch: (batch, torch.zeros_like(first)))
    assert set(model(batch)["stats"].values()) == {None}


def test_scenes_are_blanked_in_training_in_stage_three_alone_as_often_as_it_says(make_model, make_batch):
    model, batch = make_model(), make_batch()
    del model.blank
    for epoch, training, expected in ((10, True, 0), (50, True, 0), (70, False, 0), (70, True, 0.2)):
        apply_setting(model, setting_at(epoch))
        model.train(training)
        state = torch.get_rng_state()
        whole = [model.blank(batch)[1] for _ in range(500)]
        if not expected:
            assert not any(torch.is_tensor(w) for w in whole)
            assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn, so nothing else moves
        else:
            share = sum((~w[[0, -1]]).float().mean().item() for w in whole if w is not None) / len(whole)
            assert abs(share - expected) < 0.04
