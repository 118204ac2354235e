"""Tests of model.py: sizes, agreement with dense convolutions, batches, edges, gradients in every stage."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from data import collate
from losses import LOSS_WEIGHTS, weighted_sum
from model import (IN_CHANNELS, PRESETS, Attention, QueryDecoder, SparseUNet, VoxelBatchNorm, build_model,
                   import_spconv, instances_of_scene, largest_pieces, select_instances, superpoint_graph,
                   superpoint_means)
from stages import PARTS
from train import forward

EPOCHS = {"stage 1": 10, "ramp at 0": 21, "ramp": 23, "simple": 30, "learned": 50, "stage 3": 70}


def count(module):
    return sum(p.numel() for p in module.parameters())


def assert_finite_step(model, batch):
    model.zero_grad(set_to_none=True)
    loss = weighted_sum(forward(model, batch, model.row)[0], LOSS_WEIGHTS["bifusion"])
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and gradients and all(torch.isfinite(g).all() for g in gradients)


def test_the_networks_have_the_published_sizes_and_the_tower_half_of_vit_b_16():
    assert count(SparseUNet(IN_CHANNELS, **PRESETS["base"]["unet"])) == 39_155_904
    assert 0.95e6 < count(SparseUNet(IN_CHANNELS, **PRESETS["small"]["unet"])) < 1.15e6
    model = build_model("bifusion", "base", 20, tower_weights="scratch")
    parts = {name: sum(p.numel() for p in parameters) for name, parameters in model.parts().items()}
    assert parts["3d"] + parts["decoder"] == pytest.approx(41e6, rel=0.02) and parts["decoder"] > 1.5e6
    assert sum(parts.values()) == count(model) == pytest.approx(89e6, rel=0.05)
    assert count(model.tower.visual) == pytest.approx(43.3e6, rel=0.01)


@pytest.mark.parametrize(("name", "preset", "said"), [
    ("bifusion", "huge", "preset 'huge'.*'base', 'small'"), ("net", "small", "model 'net'.*'baseline', 'bifusion'")])
def test_unknown_names_are_refused_with_the_choices(name, preset, said):
    with pytest.raises(KeyError, match=f"unknown {said}"):
        build_model(name, preset, 20)


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_every_parameter_stands_in_exactly_one_part(make_model, name):
    model = make_model(name)
    assert model.parts().keys() <= PARTS.keys()
    assert sorted(id(p) for part in model.parts().values() for p in part) == sorted(id(p) for p in model.parameters())


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
    for down, bn, blocks, mask in zip(net.down, net.down_bn, net.encoder, masks[1:]):
        skips.append(x)
        x = F.relu(norm(bn, F.conv3d(x, dense_weight(down), stride=2))) * mask
        for b in blocks:
            x = block(b, x, mask)
    for up, bn, blocks, mask in zip(net.up, net.up_bn, net.decoder, masks[-2::-1]):
        x = F.conv_transpose3d(x, dense_weight(up, transposed=True), stride=2)
        x = torch.cat([F.relu(norm(bn, x)) * mask, skips.pop()], 1)
        for b in blocks:
            x = block(b, x, mask)
    return x[0, :, cells[:, 0], cells[:, 1], cells[:, 2]].T


@pytest.mark.parametrize("extent", [(8, 4, 4), (7, 5, 3), (9, 9, 2), (1, 1, 13)])
def test_the_sparse_unet_computes_what_dense_convolutions_compute_and_loses_no_voxel(make_model, extent):
    net = make_model("baseline").unet
    cells = torch.stack(torch.meshgrid(*map(torch.arange, extent), indexing="ij"), -1).reshape(-1, 3)
    corner = (cells == torch.tensor(extent) - 1).all(1)
    cells = cells[(torch.rand(len(cells)) < 0.6) | corner]  # the corner gives an odd extent its last voxel
    feat, batch_index = torch.randn(len(cells), IN_CHANNELS), torch.zeros(len(cells), dtype=torch.long)
    for _ in range(3):
        net(feat, cells, batch_index, 1)  # running statistics away from their start
    with torch.no_grad():
        out = net.eval()(feat, cells, batch_index, 1)
        expected = dense_unet(net, feat, cells)
    assert out.shape == (len(cells), net.out_channels) and out.std() > 1e-3
    assert torch.allclose(out, expected, atol=1e-4)


def test_batch_norm_of_a_single_voxel_uses_its_running_statistics():
    norm, one = VoxelBatchNorm(4), torch.randn(1, 4)
    norm(torch.randn(100, 4) * 3 + 1)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    assert torch.equal(norm(one), norm.eval()(one))
    assert all(torch.equal(v, state[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("case", ["whole", "no frames"])
@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_a_batch_gives_what_its_scenes_give_singly(make_model, pairs_of_scenes, row, train_steps, name, case):
    model, scenes = make_model(name, num_classes=20), pairs_of_scenes[case]
    batch = collate(scenes)
    train_steps(model, row(70), batch)
    model.eval()
    with torch.no_grad():
        whole = model(batch)
        for i, scene in enumerate(scenes):
            rows, out = batch["batch_index"] == i, model(collate([scene]))
            for layer, expected in zip(out["instances"][0], whole["instances"][i], strict=True):
                assert all(torch.allclose(layer[key], expected[key], atol=1e-4) for key in expected)
            assert torch.allclose(out["logits"], whole["logits"][rows], atol=1e-5)
            if name == "bifusion":
                assert torch.equal(out["seen"], whole["seen"][rows])
                assert torch.allclose(out["alpha"], whole["alpha"][rows], atol=1e-5)


@pytest.fixture
def trained(make_model, make_batch, row, train_steps):
    """Function: name -> (model after some steps of stage 3, in evaluation; batch)."""
    def train(name):
        model, batch = make_model(name), make_batch()
        train_steps(model, row(70), batch)
        return model.eval(), batch

    return train


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_the_order_of_the_voxels_does_not_matter(trained, name):
    model, batch = trained(name)
    order = torch.randperm(len(batch["segment"]))
    rows = ("grid_coord", "batch_index", "color", "normal", "coord", "world_coord", "segment")
    shuffled = batch | {key: batch[key][order] for key in rows} | {"piece_voxel": order.argsort()}
    assert torch.allclose(model(shuffled)["logits"], model(batch)["logits"][order], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_a_gpu_gives_the_logits_of_the_cpu(trained, name):
    model, batch = trained(name)
    here = model(batch)["logits"]
    there = model.cuda()({k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()})["logits"].cpu()
    assert torch.allclose(here, there, atol=2e-2)


def test_views_of_another_scene_are_not_looked_into(trained):
    model, batch = trained("bifusion")
    before, first = model(batch)["feat_2d"], batch["batch_index"] == 0
    batch["image"][batch["view_batch"] == 1] = 0
    same = (model(batch)["feat_2d"] == before).all(1)
    assert same[first].all() and not same[~first].all()


CASES = {  # what becomes of a batch
    "one voxel": lambda b: b["segment"].fill_(1), "no view": lambda b: None,
    "no seen voxel": lambda b: b["world_coord"].add_(100), "all ignored": lambda b: b["segment"].fill_(-1),
    "no depth reading": lambda b: b["depth"].zero_(), "not annotated": lambda b: b["has_instances"].fill_(False),
    "no instance": lambda b: b.update({k: b[k][:0] for k in ("instance_label", "instance_batch")},
                                      superpoint_instance=torch.full_like(b["superpoint_instance"], -1)),
    "huge colours": lambda b: b["color"].mul_(1e4), "tiny colours": lambda b: b["color"].mul_(1e-4),
}


@pytest.mark.parametrize("epoch", EPOCHS.values(), ids=EPOCHS)
@pytest.mark.parametrize("case", [*CASES, "all of these"])
def test_a_poor_scene_trains_on_with_finite_loss_and_gradients(make_model, make_batch, row, put, epoch, case):
    batch = make_batch(voxels=(1,), views=(2,)) if case in ("one voxel", "all of these") else make_batch(
        views=(0, 0) if case == "no view" else (2, 2))
    for name in ("no depth reading", "no instance", "all ignored") if case == "all of these" else (case,):
        CASES[name](batch)
    for name in ("baseline", "bifusion"):
        model = put(make_model(name), row(epoch), epoch).train()
        assert_finite_step(model, batch)
        if name == "bifusion" and epoch > 21 and case in ("no view", "no seen voxel", "no depth reading"):
            out = model(batch)
            assert not out["seen"].any() and not out["alpha"].any() and out["stats"]["fusion_2d_ratio"] is None
        out = model.eval()(batch)
        assert out["logits"].isfinite().all()
        for i, layers in enumerate(out.get("instances", ())):
            assert instances_of_scene(layers[-1], batch, i)[3].isfinite().all()


def test_a_blanked_scene_counts_as_unseen_and_not_in_the_stats(make_model, make_batch, row, put):
    model, batch = make_model(), make_batch()
    first, nothing = batch["batch_index"] == 0, torch.tensor([False, False])
    plain = put(model, row(70)).train()(batch)
    out = model(batch | {"whole": torch.tensor([False, True])})
    assert plain["seen"][first].any() and torch.equal(out["seen"], plain["seen"] & ~first)
    assert out["stats"]["seen_share"] == pytest.approx(plain["seen"][~first].float().mean().item())
    assert out["alpha"][first].any()  # the gate is asked all the same
    assert torch.equal(model(batch | {"whole": ~nothing})["seen"], plain["seen"])
    out = model(batch | {"whole": nothing})
    assert not out["seen"].any() and set(out["stats"].values()) == {None}
    for epoch, training in ((50, True), (70, False)):  # no scene is blanked there
        out = put(model, row(epoch)).train(training)(batch | {"whole": nothing})
        assert torch.equal(out["seen"], plain["seen"]) and out["stats"]["seen_share"] > 0


@pytest.mark.parametrize("plan", ["full", "A", "B"])
@pytest.mark.parametrize("kind", ["baseline", "scratch", "pretrained"])
@pytest.mark.parametrize("epoch", EPOCHS.values(), ids=EPOCHS)
def test_what_trains_and_nothing_else_gets_a_gradient(make_model, make_batch, row, put, epoch, kind, plan):
    model = make_model("baseline" if kind == "baseline" else "bifusion", pretrained=kind == "pretrained")
    put(model, row(epoch, kind == "pretrained", plan=plan), epoch).train()
    assert_finite_step(model, make_batch())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("pretrained", [False, True])
def test_after_a_few_steps_no_gradient_is_zero_throughout(make_model, make_batch, row, train_steps, pretrained):
    model, batch = make_model(pretrained=pretrained), make_batch(voxels=(300, 200), views=(3, 3))
    for module in model.tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1)  # open_clip starts a block's last at 0
    train_steps(model, row(70, pretrained), batch, steps=8)
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert [name for name in dead if "score_head" not in name] == []  # that one learns where a mask's IoU is above 0.5


@pytest.mark.parametrize("name", ["baseline", "bifusion"])
def test_the_small_preset_of_build_model_runs_and_everything_is_on_before_a_row_is_set(make_batch, row, put, name):
    model, batch = build_model(name, "small", 5), make_batch()
    out = model.eval()(batch)
    assert out["logits"].shape == (len(batch["segment"]), 5)
    expected = put(model, row(128, pretrained=True))(batch)  # the last of the curriculum
    assert out.keys() == expected.keys() and torch.equal(out["logits"], expected["logits"])
    assert "instances" in out and (name == "baseline" or out["alpha"].any())
    for weights, epoch in ((None, 60), (None, 61), ("scratch", 61)):  # a pretrained tower's statistics are protected
        bifusion = build_model("bifusion", "small", 5, tower_weights=weights)
        assert put(bifusion, row(epoch, pretrained=True)).train().tower.visual.training == (weights == "scratch")
    assert_finite_step(model.train(), batch)


def test_building_a_model_prints_nothing():
    code = "import model; model.build_model('bifusion', 'small', 20)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


def test_both_models_of_one_seed_start_from_the_same_3d_weights():
    baseline, bifusion = (torch.manual_seed(3) and build_model(name, "small", 20).state_dict()
                          for name in ("baseline", "bifusion"))
    assert len(baseline) > 50 and all(torch.equal(value, bifusion[name]) for name, value in baseline.items())


def decoder(layers=2, channels=12, classes=5):
    return QueryDecoder(channels, dim=16, hidden=32, layers=layers, heads=4, num_classes=classes)


def test_superpoint_means_are_those_of_a_loop_over_the_points():
    voxel, superpoint = torch.tensor([0, 0, 1, 2, 2, 2, 3]), torch.tensor([1, 0, 0, 1, 1, 2, 2])  # of seven points
    pieces, points = torch.stack([superpoint, voxel]).unique(dim=1, return_counts=True)
    batch = {"piece_superpoint": pieces[0], "piece_voxel": pieces[1], "piece_points": points.float(),
             "superpoint_batch": torch.zeros(3, dtype=torch.long)}
    feat = torch.randn(4, 5)
    expected = torch.stack([feat[voxel[superpoint == s]].mean(0) for s in range(3)])
    assert torch.allclose(superpoint_means(feat, batch), expected, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_attention_is_the_softmax_over_the_allowed_keys(share):
    attention, query, keys = Attention(16, 4), torch.randn(5, 16), torch.randn(9, 16)
    allowed = (torch.rand(5, 9) < share) | (torch.arange(9) == 0)
    q, (k, v) = attention.to_query(query), attention.to_key_value(keys).chunk(2, 1)
    heads = [(F.layer_norm(q[:, part], (4,)) @ F.layer_norm(k[:, part], (4,)).T / 2)
             .masked_fill(~allowed, -torch.inf).softmax(1) @ v[:, part]
             for part in (slice(4 * h, 4 * h + 4) for h in range(4))]
    expected = attention.norm(query + attention.out(torch.cat(heads, 1)))
    assert torch.allclose(attention(query, keys, allowed if share < 1 else None), expected, atol=1e-5)


def test_the_decoder_predicts_before_the_first_and_after_each_layer():
    net, superpoint = decoder(layers=3), torch.randn(9, 12)
    net.choose_queries = torch.arange
    shapes = {"class_logits": (9, 6), "mask_logits": (9, 9), "score": (9,), "origin": (9,)}
    predictions = net(superpoint)
    assert [{key: tuple(value.shape) for key, value in one.items()} for one in predictions] == 4 * [shapes]
    assert all(torch.equal(one["origin"], torch.arange(9)) for one in predictions)
    (last,) = net.eval()(superpoint)  # in evaluation the last alone
    assert all(torch.equal(last[key], predictions[-1][key]) for key in last)


def test_a_random_share_of_superpoints_from_a_half_up_become_queries_in_training_and_all_or_a_limit_else(monkeypatch):
    net, superpoint = decoder(layers=1), torch.randn(40, 12)
    origins = [net(superpoint)[0]["origin"] for _ in range(60)]
    counts = [len(origin.unique()) for origin in origins]
    assert counts == [*map(len, origins)] and 20 <= min(counts) < 25 and 35 < max(counts) <= 40
    assert set(torch.cat(origins).tolist()) == set(range(40))
    sampled, query = net(superpoint)[0], net.eval()(superpoint)[0]["origin"]
    assert torch.equal(query, torch.arange(40))
    monkeypatch.setattr("model.MAX_QUERIES", 5)
    assert net.choose_queries(7).tolist() == [0, 2, 4] and net.choose_queries(3).tolist() == [0, 1, 2]
    net.train().choose_queries = torch.arange
    everyone = net(superpoint)[0]  # before the first layer a query predicts the same, whoever else was drawn
    assert torch.allclose(sampled["mask_logits"], everyone["mask_logits"][sampled["origin"]], atol=1e-5)


def test_a_query_looks_only_at_the_superpoints_of_its_mask_and_at_all_where_it_has_none():
    net, superpoint, seen = decoder(layers=1).eval(), torch.randn(6, 12), []
    net.cross[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    logits = torch.randn(6, 6)
    logits[0], logits[1] = -1, torch.tensor([1.0, -1, -1, -1, -1, 0])
    net.predict = lambda query, masks: {"mask_logits": logits}
    net(superpoint)
    assert torch.equal(seen[0], (logits >= 0) | ~(logits >= 0).any(1, keepdim=True))
    assert seen[0][0].all() and seen[0][1].tolist() == [True, False, False, False, False, True]


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
        mask_logits[5], mask_logits[7] = mask_logits[2] + 0.1, -1  # two of almost the same mask; one holds nothing
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


def test_instances_of_a_scene_are_masks_over_its_own_points_and_counted_in_points(make_batch):
    batch = make_batch(voxels=(90, 300))  # superpoints of ten points
    batch["grid_coord"] //= 4  # all touch
    held = torch.arange(30) < torch.tensor([[12], [9]])  # 120 points, and 90, which are too few
    prediction = {"class_logits": 9 * torch.eye(6)[[3, 4]], "mask_logits": 18.0 * held - 9, "score": torch.ones(2)}
    (gt, masks, labels, scores), own = instances_of_scene(prediction, batch, 1), batch["point_batch"] == 1
    assert torch.equal(gt, batch["point_instance"][own]) and labels[0] == 3 and scores[0] > 0.99
    assert torch.equal(masks[0], held[0][batch["point_superpoint"][own] - 9]) and (masks.sum(1) == 120).all()


def test_superpoints_touch_where_their_voxels_have_a_common_face_in_one_scene():
    grid = torch.randint(0, 12, (300, 3), dtype=torch.int32)
    superpoint, scene = torch.arange(300) % 60, torch.arange(300) % 2
    batch = {"grid_coord": grid, "batch_index": scene, "piece_voxel": torch.arange(300), "piece_superpoint": superpoint,
             "superpoint_batch": torch.arange(60) % 2}
    graph = torch.from_numpy(superpoint_graph(batch).toarray() > 0)[superpoint][:, superpoint]  # (300, 300), of voxels
    apart, same = (grid[:, None] - grid).abs(), scene[:, None] == scene
    assert graph[(apart.sum(2) <= 1) & same].all()
    near, member = ((apart.amax(2) <= 1) & same).float(), F.one_hot(superpoint).float()  # (300, 300), (300, 60)
    assert not graph[(member @ (member.T @ near @ member) @ member.T) == 0].any()


def test_a_mask_is_cut_to_its_largest_connected_piece():
    graph = torch.eye(6)
    for a, b in ((0, 1), (1, 2), (3, 4)):
        graph[a, b] = graph[b, a] = 1
    graph, sizes = csr_matrix(graph.numpy()), torch.tensor([10.0, 10, 10, 50, 1, 200])
    masks = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    assert largest_pieces(masks, graph, sizes).int().tolist() == [
        [0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


def test_many_masks_are_cut_as_each_alone_is():
    graph = csr_matrix(torch.rand(200, 200).gt(0.985).float().numpy())
    graph, sizes = graph + graph.T, torch.randint(1, 5, (200,)).float()
    masks = torch.rand(900, 200) < torch.rand(900, 1)
    for mask, found in zip(masks, largest_pieces(masks, graph, sizes), strict=True):
        inside = mask.nonzero()[:, 0].numpy()
        piece = connected_components(graph[inside][:, inside])[1]
        best = np.bincount(piece, sizes.numpy()[inside], 1).argmax()
        assert found.nonzero()[:, 0].tolist() == inside[piece == best].tolist()
    assert largest_pieces(masks[:0], graph, sizes).shape == (0, 200)


def test_spconv_describes_its_cuda_kernels_only_where_there_is_a_gpu():
    import_spconv()
    from spconv import algo
    assert bool(algo.ALL_NATIVE_PARAMS) == bool(algo.ALL_IMPGEMM_PARAMS) == torch.cuda.is_available()
