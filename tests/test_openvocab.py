"""openvocab.py: dense features in CLIP's space, texts found where they are, files without a text tower."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import openvocab
from fusion import link_views
from openvocab import dense_features, load_clip, search
from predict import heat, main
from tower import import_open_clip


@pytest.fixture(scope="module")
def clip_small():
    torch.manual_seed(0)
    with import_open_clip() as open_clip:
        return open_clip.create_model("clip_small").eval()


def tiny_vit():
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(image_size=32, patch_size=8, width=32, layers=3, heads=2, mlp_ratio=2,
                             output_dim=16).eval()


def test_a_resnets_dense_features_average_to_its_pooled_feature_where_attention_is_even(clip_small):
    pool = clip_small.visual.attnpool
    kept = {k: v.clone() for k, v in pool.state_dict().items()}
    with torch.no_grad():
        for weights in (pool.q_proj.weight, pool.q_proj.bias, pool.positional_embedding):
            weights.zero_()  # every place counts the same, wherever it is
        image = torch.randn(2, 3, 64, 64)
        dense = dense_features(clip_small.visual, image)
        assert torch.allclose(dense.mean((2, 3)), clip_small.visual(image), atol=1e-5)
        pool.load_state_dict(kept)


def test_a_vits_dense_features_have_a_pixel_a_patch_for_any_size_and_depend_on_it():
    visual = tiny_vit()
    image = torch.randn(1, 3, 40, 64)
    with torch.no_grad():
        dense = dense_features(visual, image)
        assert dense.shape == (1, 16, 5, 8)
        image[:, :, 8:16, 24:32] += 3
        moved = (dense_features(visual, image) - dense).norm(dim=1)[0]  # (5, 8)
    assert moved.argmax() == 1 * 8 + 3


def test_a_vit_without_its_last_attention_gives_the_values_of_the_last_block():
    visual = tiny_vit()
    last = visual.transformer.resblocks[-1]
    with torch.no_grad():
        last.attn.in_proj_weight[:64] = 0  # queries and keys: attention is even
        last.attn.in_proj_bias[:64] = 0
        one = torch.zeros(1, 3, 32, 32)  # one picture of equal patches, told apart by their positions alone
        visual.positional_embedding[1:] = visual.positional_embedding[1:2]
        visual.positional_embedding[0] = visual.positional_embedding[1] - visual.class_embedding
        # all tokens are equal now, so even attention to all is the same as a token's own value
        pooled = visual(one)
        dense = dense_features(visual, one)
    assert torch.allclose(dense[0, :, 0, 0], pooled[0], atol=1e-5)


def test_a_text_is_found_at_the_points_whose_pixels_fit_it(make_batch, monkeypatch):
    batch = make_batch(voxels=(600,), views=(1,))
    frames = {k: batch[k] for k in ("image", "depth", "world_to_camera", "intrinsics")}
    frames["image"] = torch.zeros_like(frames["image"])
    frames["image"][:, 0, :, :32] = 255  # red on the left of every picture, blue on the right
    frames["image"][:, 2, :, 32:] = 255
    monkeypatch.setattr(openvocab, "dense_features", lambda visual, rgb: F.avg_pool2d(rgb, 8))
    clip = types.SimpleNamespace(
        visual=types.SimpleNamespace(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0), patch_size=(8, 8)),
        encode_text=lambda tokens, normalize: tokens)
    points = batch["world_coord"]
    similarity, seen = search(clip, lambda texts: torch.eye(3)[[0, 2]], ["red", "blue"], points, frames)
    links = link_views(points, frames["world_to_camera"], frames["intrinsics"], frames["depth"])
    assert torch.equal(seen.nonzero()[:, 0], links.point)  # one view
    left, right = (links.point[side] for side in (links.uv[:, 0] < 22, links.uv[:, 0] > 41))
    assert len(left) > 5 and len(right) > 5
    assert torch.allclose(similarity[left], torch.tensor([1.0, 0.0]), atol=1e-5)
    assert torch.allclose(similarity[right], torch.tensor([0.0, 1.0]), atol=1e-5)
    assert not similarity[~seen].any()


def test_a_whole_clip_model_is_read_and_an_image_tower_alone_is_refused(clip_small, tmp_path):
    state = clip_small.state_dict()
    torch.save(state, tmp_path / "whole.pt")
    clip, tokenizer = load_clip("clip_small", str(tmp_path / "whole.pt"))
    assert all(torch.equal(value, clip.state_dict()[key]) for key, value in state.items())
    assert tokenizer(["a red chair"]).shape == (1, clip.context_length)
    torch.save({k: v for k, v in state.items() if k.startswith("visual.")}, tmp_path / "image.pt")
    with pytest.raises(ValueError, match="is no whole CLIP model clip_small"):
        load_clip("clip_small", str(tmp_path / "image.pt"))
    torch.save(clip_small.visual.state_dict(), tmp_path / "visual.pt")
    with pytest.raises(ValueError, match="image tower alone"):
        load_clip("clip_small", str(tmp_path / "visual.pt"))


def test_a_tower_of_timm_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="ViT-B-16 or RN50"):
        dense_features(torch.nn.Linear(1, 1), torch.zeros(1, 3, 8, 8))


def test_texts_without_a_pretrained_clip_are_refused_and_with_one_are_written(clip_small, run_train, tmp_path,
                                                                              tiny_rooms, capsys, monkeypatch):
    from plyfile import PlyData

    from train import RECIPES

    monkeypatch.setitem(RECIPES["small"], "image_size", (64, 48))
    scene = tiny_rooms / "val" / "room_0000"
    torch.save(clip_small.state_dict(), tmp_path / "clip.pt")
    run_train(tmp_path / "scratch", "--stage", 1, "--compress", 129, "--clip-weights", "scratch")
    with pytest.raises(SystemExit, match="trained without one"):
        main([str(tmp_path / "scratch" / "last.pt"), str(scene), "--text", "a chair", "--out", str(tmp_path / "none")])
    run_train(tmp_path / "run", "--stage", 1, "--compress", 129, "--clip-weights", tmp_path / "clip.pt")
    (tmp_path / "clip.pt").rename(tmp_path / "moved.pt")
    call = [str(tmp_path / "run" / "last.pt"), str(scene), "--text", "a chair", "red", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="neither a file nor a pretrained tag"):
        main([*call, "--device", "cpu"])
    main([*call, "--device", "cpu", "--clip-weights", str(tmp_path / "moved.pt")])
    assert "'a chair' up to" in capsys.readouterr().out
    for i in (1, 2):
        vertex = PlyData.read(str(tmp_path / "out" / f"room_0000_text_{i}.ply"))["vertex"]
        assert len(vertex) == len(np.load(scene / "coord.npy"))
        assert np.isfinite(vertex["similarity"]).all() and np.ptp(vertex["similarity"]) > 0
    assert (tmp_path / "out" / "room_0000_text.png").stat().st_size > 10_000


def test_heat_runs_from_blue_to_yellow_and_leaves_the_rest_grey():
    color = heat(np.linspace(0, 1, 101), np.arange(101) < 100)
    assert color[0].tolist() == [40, 50, 140]
    assert color[99].tolist() == [255, 225, 40]
    assert color[100].tolist() == [90, 90, 90]


def test_search_normalises_colours_as_the_model_was_trained(clip_small, make_batch, monkeypatch):
    batch, given = make_batch(voxels=(100,), views=(1,)), []
    frames = {k: batch[k] for k in ("image", "depth", "world_to_camera", "intrinsics")}
    frames["image"][:] = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    monkeypatch.setattr(openvocab, "dense_features", lambda visual, rgb: given.append(rgb) or rgb.new_ones(1, 64, 3, 4))
    monkeypatch.setattr(clip_small.visual, "image_mean", (0.5, 0.4, 0.1))
    monkeypatch.setattr(clip_small.visual, "image_std", (0.5, 0.2, 0.3))
    with import_open_clip() as open_clip:
        search(clip_small, open_clip.get_tokenizer("clip_small"), ["a chair"], batch["world_coord"], frames)
    assert torch.allclose(given[0][0, :, 5, 5], torch.tensor([-1.0, -1.0, 3.0]), atol=1e-4)
    assert given[0].shape[2] % 32 == given[0].shape[3] % 32 == 0


def test_points_go_through_in_chunks_with_one_result(clip_small, make_batch, monkeypatch):
    batch = make_batch(voxels=(150,), views=(2,))
    frames = {k: batch[k] for k in ("image", "depth", "world_to_camera", "intrinsics")}
    with import_open_clip() as open_clip:
        tokenizer = open_clip.get_tokenizer("clip_small")
    whole = search(clip_small, tokenizer, ["a chair", "red"], batch["world_coord"], frames)
    monkeypatch.setattr(openvocab, "POINT_CHUNK", 40)
    parts = search(clip_small, tokenizer, ["a chair", "red"], batch["world_coord"], frames)
    assert torch.allclose(whole[0], parts[0], atol=1e-6) and torch.equal(whole[1], parts[1])
    assert whole[0].shape == (150, 2) and whole[1].any()


def test_layer_scale_of_the_last_block_counts():
    visual = tiny_vit()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = dense_features(visual, image)
        visual.transformer.resblocks[-1].ls_2 = torch.nn.Threshold(1e9, 0.0)  # nothing passes
        assert not torch.allclose(dense_features(visual, image), before)
