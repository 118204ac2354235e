"""Tests of tower.py: the libraries' RGB towers bit for bit, images of any size, weights of all kinds, the curriculum.

The kinds are Lite0 and tiny towers of every family that open_clip builds; some are tested at full size too.
"""

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tower as tower_module
from conftest import Payload
from fusion import link_views
from losses import LOSS_WEIGHTS, weighted_sum
from model import BiFusion
from stages import parameter_groups, set_rates
from tower import LITE0, LITE0_PACKAGE, MAX_DEPTH, SCRATCH, TIMM, ClipTower, build_visual
from train import forward

OPENAI = (0.48145466, 0.4578275, 0.40821073)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std
HALVES = ((0.5,) * 3, (0.5,) * 3)
PACKAGE = LITE0_PACKAGE.replace("-", "_")
TEXT = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 1, "layers": 1}
TINY = {  # vision_cfg; the timm models are those of timm's own tests
    "tiny_vit": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "tiny_timm_vit": {"timm_model_name": "test_vit", "image_size": 160},
    "tiny_convnext": {"timm_model_name": "test_convnext", "image_size": 160},
    "tiny_tf": {"timm_model_name": "tf_mobilenetv3_small_minimal_100", "image_size": 160},  # of "same" padding
}
PLAIN = ("tiny_vit", "tiny_timm_vit", "PE-Core-T-16-384", "ViTamin-S", "ViT-B-16")  # one level, which the neck doubles
KINDS = (LITE0[0], *TINY, "PE-Core-T-16-384", "MobileCLIP2-S0", "ViTamin-S")
NAMED = ("ViT-B-16", "RN50")
FEW = (LITE0[0], "tiny_vit", "tiny_timm_vit", "tiny_convnext")


@pytest.fixture(scope="module")
def visuals(tmp_path_factory):
    """Function: name -> (whole RGB tower in evaluation, mean, std), random but with every batch norm in motion."""
    folder, known = tmp_path_factory.mktemp("configs"), {}
    for name, vision in TINY.items():
        timm = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"} if "timm" in str(vision) else {}
        config = {"embed_dim": 16, "vision_cfg": vision | timm, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)

    def get(name):
        if name not in known:
            torch.manual_seed(0)
            visual, mean, std = build_visual(name, SCRATCH)
            for module in visual.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.data.uniform_(0.5, 1)  # open_clip starts a block's last at 0
                    module.running_mean.normal_(0, 0.1)
            known[name] = visual.eval().to(memory_format=torch.channels_last), mean, std  # as ClipTower has it
        return known[name]

    return get


@pytest.fixture(scope="module")
def make_tower(visuals):
    """Function: name -> a ClipTower of its own, in evaluation."""
    known = {}

    def make(name, pretrained=True):
        if name not in known:
            visual, mean, std = visuals(name)
            torch.manual_seed(1)
            known[name] = ClipTower(copy.deepcopy(visual), 16, mean, std).eval()
        tower = copy.deepcopy(known[name])
        tower.pretrained = pretrained
        return tower

    return make


@pytest.fixture(scope="module")
def make_bifusion(make_model, make_tower):
    """Function: name -> conftest's BiFusion with this image tower."""
    def make(name, pretrained=True):
        model = make_model()
        return BiFusion(model.unet, make_tower(name, pretrained=pretrained), model.decoder, 16, 5, 0.05)

    return make


def views(size, count=1):
    """Random image (V, 3, H, W) uint8 and depth (V, H, W) of size (W, H)."""
    width, height = size
    generator = torch.Generator().manual_seed(7)
    image = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    return image, 8 * torch.rand(count, height, width, generator=generator)


def use_depth(tower):
    """As after some training: a depth kernel that is no longer zero."""
    for module in tower.modules():
        if isinstance(module, tower_module.RGBDConv):
            torch.nn.init.normal_(module.depth.weight, std=0.05)


@pytest.mark.parametrize("name", [*KINDS, *NAMED])
def test_at_the_start_the_cut_rgbd_tower_gives_the_rgb_towers_own_levels_bit_for_bit(visuals, make_tower, name):
    rgb_tower, mean, std = visuals(name)
    tower = make_tower(name)
    side = getattr(rgb_tower, "image_size", 224)
    image, depth = views(side if isinstance(side, tuple) else (side, side))
    rgb = (image.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    indices = getattr(tower.visual, "indices", None) or [len(rgb_tower.transformer.resblocks) // 2 - 1]
    with torch.no_grad():
        levels = tower.encode(image, depth)
        expected = rgb_tower.forward_intermediates(rgb, indices, intermediates_only=True)
        expected = expected["image_intermediates"] if isinstance(expected, dict) else expected
        assert [level.shape for level in levels] == [level.shape for level in expected]
        assert all(torch.equal(level, other) for level, other in zip(levels, expected))
        assert torch.equal(tower(image, depth), tower(image, 0 * depth))
        use_depth(tower)
        assert not torch.equal(tower(image, depth), tower(image, 0 * depth))


def test_vit_b_16_is_cut_after_block_six_and_a_pyramid_after_stride_sixteen(make_tower):
    assert len(make_tower("ViT-B-16").visual.net.transformer.resblocks) == 6
    assert len(make_tower("tiny_timm_vit").visual.net.blocks) == 3
    for name, gone in (("RN50", (".layer4.", "attnpool")), ("tiny_convnext", (".stages.3.",)),
                       ("ViTamin-S", ("text", "head"))):
        assert not any(part in key for key in make_tower(name).state_dict() for part in gone)


@pytest.mark.parametrize("size", [(50, 37), (33, 96)])
@pytest.mark.parametrize("name", [*KINDS, *NAMED])
def test_a_map_covers_an_image_of_any_size_and_its_last_pixels_count(make_tower, name, size):
    tower = make_tower(name)
    use_depth(tower)
    image, depth = views(size)
    with torch.no_grad():
        maps = tower(image, depth)
        assert torch.isfinite(maps).all()
        for cells, side in zip(maps.shape[:1:-1], size):
            assert side <= cells * tower.stride < side + tower.multiple
        for row, column in ((-1, 3), (3, -1)):
            other, further = image.clone(), depth.clone()
            other[:, :, row, column] = 255 - other[:, :, row, column]
            further[:, row, column] = 9
            assert not torch.equal(tower(other, depth), maps)
            assert not torch.equal(tower(image, further), maps)


@pytest.mark.parametrize("name", ["EVA02-B-16", "swin_base_patch4_window7_224", "coca_base",
                                  "ViT-SO400M-14-SigLIP-384"])
def test_other_towers_of_open_clip_cover_an_image_of_any_size_too(name, monkeypatch):
    monkeypatch.setattr(tower_module, "autocast", lambda like, precision: torch.no_grad())  # none on "meta"
    with torch.device("meta"):  # shapes alone: neither memory nor time
        visual, mean, std = build_visual(name, SCRATCH)
        tower = ClipTower(visual, 8, mean, std).eval()
        maps = tower(torch.zeros(1, 3, 101, 150, dtype=torch.uint8), torch.zeros(1, 101, 150))
    for cells, side in zip(maps.shape[2:], (101, 150)):
        assert side <= cells * tower.stride < side + tower.multiple


def test_a_tower_that_cannot_take_any_image_size_says_so():
    with torch.device("meta"), pytest.raises(ValueError, match=r"RelPos gives no maps for images of any size .* take "
                                                               r"another --tower"):
        ClipTower(build_visual("vit_relpos_medium_patch16_cls_224", SCRATCH)[0], 8, OPENAI, OPENAI)
    with pytest.raises(ValueError, match=r"Linear gives no maps"):
        ClipTower(torch.nn.Linear(2, 2), 8, OPENAI, OPENAI)


@pytest.mark.parametrize("name", [*FEW, "PE-Core-T-16-384", "RN50"])
def test_what_changes_in_the_image_changes_most_at_its_own_place_in_the_map(make_tower, name):
    tower = make_tower(name)
    cell = tower.multiple
    image, depth = views((5 * cell, 4 * cell))
    for row, column in ((1, 3), (3, 0)):
        other = image.clone()
        other.unfold(2, cell, cell).unfold(3, cell, cell)[:, :, row, column] ^= 255
        with torch.no_grad():
            moved = (tower(other, depth) - tower(image, depth)).square().sum(1)  # (1, h, w)
        energy = F.avg_pool2d(moved, int(cell / tower.stride))  # a cell each
        assert divmod(energy.argmax().item(), 5) == (row, column)


@pytest.mark.parametrize("name", FEW[:3])
def test_colours_are_normalised_as_the_tower_learnt_them_and_depth_is_in_0_to_1(make_tower, name):
    tower, seen = make_tower(name), []
    tower.mean.copy_(torch.tensor([0.1, 0.5, 0.6]).view(3, 1, 1))
    tower.std.copy_(torch.tensor([0.2, 0.5, 0.4]).view(3, 1, 1))
    tower.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image, depth = torch.full((1, 3, 5, 6), 51, dtype=torch.uint8), torch.full((1, 5, 6), 4.0)
    depth[0, 0, :3] = torch.tensor([0.0, 10.0, 65.5])
    tower(image, depth)
    rgbd = seen[0]
    assert MAX_DEPTH == 10 and rgbd.shape == (1, 4, tower.multiple, tower.multiple)
    assert torch.allclose(rgbd[0, :3, 2, 2], torch.tensor([0.5, -0.6, -1.0]))
    assert torch.allclose(rgbd[0, 3, :2, :3], torch.tensor([[0.0, 1.0, 1.0], [0.4, 0.4, 0.4]]))
    assert not rgbd[:, :, 5:].any() and not rgbd[..., 6:].any()  # the padding


@pytest.mark.parametrize("name", [*FEW, "PE-Core-T-16-384", "ViTamin-S"])
def test_the_neck_doubles_a_plain_transformer_and_joins_a_pyramid_at_its_finest_stride(make_tower, name):
    tower = make_tower(name)
    side = 2 * tower.multiple
    image, depth = views((side, side))
    levels, maps = tower.encode(image, depth), tower(image, depth)
    finest = levels[0].shape[3] * (2 if name in PLAIN else 1)
    assert maps.shape == (1, 16, finest, finest) and maps.dtype == torch.float32
    assert (name in PLAIN and len(levels) == 1) or [side // level.shape[3] for level in levels] == [4, 8, 16]
    for level in levels:  # each has a say
        assert not torch.allclose(tower.join([torch.zeros_like(x) if x is level else x for x in levels]), maps)


@pytest.mark.parametrize("name", [*KINDS, *NAMED])
def test_every_parameter_exists_from_the_start_and_is_reached_by_gradient_and_optimiser(make_tower, name):
    tower = make_tower(name, pretrained=False)
    wanted = sorted(map(id, tower.parameters()))
    (tower(*views((40, 24))) * torch.rand(16, 1, 1)).square().sum().backward()
    assert sorted(map(id, tower.parameters())) == wanted
    assert not [key for key, parameter in tower.named_parameters() if parameter.grad is None]
    assert sorted(id(p) for part in tower.parts().values() for p in part) == wanted
    assert sorted(id(p) for group in parameter_groups(tower, 1.0, 0.1) for p in group["params"]) == wanted
    assert any(isinstance(module, tower_module.RGBDConv) for module in tower.modules())
    assert {id(p) for p in tower.visual.parameters()} == {id(p) for p in tower.parts()["tower"]}


@pytest.mark.parametrize("name", FEW[:2])
def test_views_go_through_in_chunks_that_change_nothing(make_tower, name, monkeypatch):
    tower = make_tower(name)
    image, depth = views((40, 24), 5)
    with torch.no_grad():
        whole, sizes = tower(image, depth), []
        tower.visual.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        levels = tower.encode(image, depth)
        monkeypatch.setattr(tower_module, "VIEW_CHUNK", 2)
        sizes.clear()
        assert torch.allclose(tower(image, depth), whole, atol=1e-6)
        assert sizes == [2, 2, 1]
        assert torch.allclose(tower(image, depth, levels), whole, atol=1e-6)
        assert sizes == [2, 2, 1]  # the levels stand in for the image


@pytest.fixture(scope="module")
def tiny_clip(visuals):
    """State of a whole tiny_vit, image and text tower, of random weights."""
    torch.manual_seed(3)
    return open_clip.create_model("tiny_vit").state_dict()


def transformers_names(state, prefix="vision_model.", whole=True):
    """The image tower of an open_clip ViT as transformers' CLIP names it (5.24, whose features agree to 5e-7)."""
    def name(key):
        for ours, theirs in (("transformer.resblocks", "encoder.layers"), ("conv1", "embeddings.patch_embedding"),
                             ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_", "layer_norm"),
                             ("c_fc", "fc1"), ("c_proj", "fc2"),
                             ("attn", "self_attn"), ("class_emb", "embeddings.class_emb"),
                             ("positional_embedding", "embeddings.position_embedding.weight")):
            key = key.replace(ours, theirs)
        return prefix + key

    own = {key[7:]: value for key, value in state.items() if key.startswith("visual.")}
    found = {name(key): value for key, value in own.items() if "in_proj" not in key and key != "proj"}
    for key in [key for key in own if "in_proj_" in key]:
        parts = zip("qkv", own[key].chunk(3))
        found |= {name(key).replace("in_proj_", f"{part}_proj."): value.clone() for part, value in parts}
    texts = {"text_model.embeddings.position_embedding.weight": torch.ones(8, 16), "logit_scale": torch.tensor(1.0),
             "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(16, 16),
             "visual_projection.weight": own["proj"].T, "text_projection.weight": torch.ones(16, 16)}
    return found | {f"{prefix}embeddings.position_ids": torch.arange(17)[None]} | (texts if whole else {})


FORMS = {"as open_clip saves": lambda state: state,
         "module. prefix": lambda state: {f"module.{key}": value for key, value in state.items()},
         "of torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
         "prefixes stacked": lambda state: {"model": {f"model._orig_mod.module.{k}": v for k, v in state.items()}},
         "NumPy's numbers": lambda state: {"best": np.float64(0.5), "state_dict": state, "epoch": [np.int64(3)]},
         "settings": lambda state: {"args": argparse.Namespace(lr=np.float32(1)), "model": state},
         "Hugging Face's CLIP": transformers_names,
         "Hugging Face's tower": lambda state: transformers_names(state, "", False),
         "model inside": lambda state: {"model": state},  # as DeiT's and DINO's
         "state_dict inside": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
         "halves, as OpenAI's": lambda state: {key: value.half() for key, value in state.items()},
         "OpenAI's archive as tensors": lambda state: state | {"input_resolution": torch.tensor(224)},
         "image tower alone": lambda state: {k[7:]: v for k, v in state.items() if k.startswith("visual.")}}


def save(state, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_a_file_of_every_usual_form_gives_its_values(tiny_clip, tmp_path, form):
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    save(FORMS.get(form, dict)(tiny_clip), path)
    visual = build_visual("tiny_vit", str(path))[0].state_dict()
    own = {key[7:]: value for key, value in tiny_clip.items() if key.startswith("visual.")}
    assert visual.keys() == own.keys()
    if form == "Hugging Face's tower":  # has no projection; it is cut away
        del own["proj"]
    assert all(torch.equal(visual[key], own[key].half().float() if "halves" in form and own[key].is_floating_point()
                           else own[key]) for key in own)


def test_a_number_of_numpy_is_read_by_its_name_before_numpy_2_too_and_an_object_of_it_is_refused(tiny_clip, tmp_path):
    old, new, path = b"numpy.core.multiarray", b"numpy._core.multiarray", tmp_path / "clip.pt"
    torch.save({"best": np.float64(0.5), "state_dict": tiny_clip}, path, _use_new_zipfile_serialization=False)
    for one, other in ((new, old), (old, new)):
        path.write_bytes(path.read_bytes().replace(one, other))
        assert other in path.read_bytes() and tower_module.read_weights(path)["proj"].equal(tiny_clip["visual.proj"])
    torch.save({"best": np.dtype(object), "state_dict": tiny_clip}, path)
    with pytest.raises(ValueError, match=r"clip\.pt: .*ObjectDType"):
        tower_module.read_weights(path)


def test_an_error_is_told_whole_with_the_first_cause_and_the_ends_of_long_lists(tiny_clip, tmp_path):
    path = tmp_path / "clip.pt"
    for change, said in (
            ({"visual.class_embedding": torch.zeros(7)}, r"size mismatch for class_embedding: copying a param with "
             r"shape torch\.Size\(\[7\]\) from checkpoint, the shape in current model is torch\.Size\(\[32\]\)\.\)"),
            ({"visual.more": torch.zeros(7)}, r'Unexpected key\(s\) in state_dict: "more"\.'),
            ({"code": print}, r"\(.*clip\.pt: Unsupported global: GLOBAL print was not an allowed global")):
        torch.save(tiny_clip | change, path)
        with pytest.raises(ValueError, match=said):
            build_visual("tiny_vit", str(path))
    torch.save({"visual.other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r'Missing key\(s\) in state_dict: "class_embedding", \.\.\., "ln_post.bias"\. '
                                         r'Unexpected key\(s\) in state_dict: "other"\.\)'):
        build_visual("tiny_vit", str(path))


HUB = "timm.models._builder.load_state_dict_from_hf"  # of timm's downloads


def offline(*args, **kwargs):
    raise OSError("no route to host\nmore lines")


SPOILT = {  # what becomes of a state and its first convolution, or of its file's bytes; what is said
    "truncated": (lambda raw: raw[:-2000], ""), "empty": (lambda raw: b"", ""),
    "text": (lambda raw: b"<html>404</html>", ""),
    "a program": (lambda state, conv: state | {conv: Payload("ran")}, r"Unsupported global: GLOBAL getattr was"),
    "another tower": (lambda state, conv: {"visual.weight": torch.zeros(1)}, "Missing key|shorter"),
    "text tower alone": (lambda state, conv: {k: v for k, v in state.items() if "visual" not in k}, "Missing key"),
    "one shape": (lambda state, conv: state | {conv: torch.zeros(8, 3, 3, 5)}, "mismatch for conv"),
    "one missing": (lambda state, conv: {k: v for k, v in state.items() if k != conv}, r'Missing key.* "conv|shorter'),
    "NaN": (lambda state, conv: state | {conv: state[conv] * torch.nan}, r"1 tensors .* not finite, \['conv"),
    "no tensors": (lambda state, conv: {"epoch": 3}, "it holds no tensors"),
    "a list": (lambda state, conv: [torch.zeros(3)], "'list'"),
    "state_dict of None": (lambda state, conv: {"state_dict": None}, "None"),
    "numbers for names": (lambda state, conv: {1: torch.zeros(3)}, "'int'"),
}


@pytest.mark.parametrize(("kind", "spoil"), [
    *(("tiny_vit", spoil) for spoil in (*SPOILT, "truncated safetensors", "TorchScript")),
    *((kind, spoil) for kind in (LITE0[0], "package") for spoil in (
        "truncated", "a program", "another tower", "one shape", "one missing", "NaN", "no tensors"))])
def test_a_file_that_will_not_do_is_refused_with_its_name_the_reason_and_ways_out(
        visuals, tiny_clip, tmp_path, monkeypatch, kind, spoil):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # before the installed package
    monkeypatch.setattr(HUB, lambda *args, **kwargs: pytest.fail("a download"))
    (folder := tmp_path / PACKAGE / "models").mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("open('ran', 'w')")
    path = folder / ("tower.safetensors" if "safetensors" in spoil else "tower.pth")
    name, weights = LITE0 if kind == "package" else (kind, str(path))
    state = tiny_clip if kind == "tiny_vit" else visuals(LITE0[0])[0].state_dict()
    change, said = SPOILT.get(spoil, (lambda raw: raw[:-2000], ""))
    if spoil == "TorchScript":
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    elif spoil in ("truncated", "empty", "text", "truncated safetensors"):
        save(state, path)
        path.write_bytes(change(path.read_bytes()))
    else:
        torch.save(change(dict(state), next(key for key in state if "conv" in key)), path)
    with pytest.raises(ValueError, match=rf"^weights {weights} of {name} cannot be had \(.*({said}).*\)\. .*[Gg]ive "
                                         r"--tower-weights a file .*scratch .*torch\.jit\.load") as caught:
        build_visual(name, weights)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "cell", "indices", "suffix", "normal"), [
    ("vit_small_patch14_dinov2", 14, [5], ".pt", IMAGENET), ("resnet18", 16, [1, 2, 3], ".pt", IMAGENET),
    ("vit_small_patch14_reg4_dinov2", 14, [5], ".safetensors", IMAGENET),
    ("tf_efficientnet_lite0", 16, [1, 2, 3], ".safetensors", HALVES),
    ("convnext_atto", 16, [0, 1, 2], ".pt", IMAGENET)])
def test_a_tower_of_timm_from_a_file_gives_timms_own_features_of_an_image_padded_with_the_mean_colour(
        tmp_path, name, cell, indices, suffix, normal):
    theirs = timm.create_model(name, **{"dynamic_img_size": True} if name.startswith("vit") else {}).eval()
    for value in theirs.state_dict().values():
        if value.ndim == 1:  # norms and layer scales, which start at almost nothing
            value.uniform_(0.5, 1)
    save(theirs.state_dict(), tmp_path / f"tower{suffix}")
    visual, *found = build_visual(TIMM + name, str(tmp_path / f"tower{suffix}"))
    tower, (image, depth) = ClipTower(visual, 16, *found, pretrained=True).eval(), views((150, 117))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in normal)
    rgb = mean.repeat(1, 1, -(-117 // cell) * cell, -(-150 // cell) * cell)  # patch 14: 154x126
    rgb[:, :, :117, :150] = image / 255
    with torch.no_grad():
        expected = theirs.to(memory_format=torch.channels_last).forward_intermediates(
            (rgb - mean) / std, indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(tower.encode(image, depth), expected, strict=True))
        assert tower.multiple == cell and torch.equal(tower(image, depth), tower(image, 0 * depth))


@pytest.mark.parametrize(("name", "classes"), [("test_vit", 7), ("test_convnext", 7), ("test_convnext", 0),
                                               ("test_vit", 0), ("deit_tiny_distilled_patch16_224", 7)])
def test_a_file_of_a_model_of_timm_may_have_any_classifier_or_none_but_nothing_else_missing(tmp_path, name, classes):
    state, path = timm.create_model(name, num_classes=classes).state_dict(), str(tmp_path / "tower.pt")
    torch.save(state, path)
    visual = build_visual(TIMM + name, path)[0].state_dict()
    assert visual.keys() == state.keys() and all(torch.equal(visual[key], state[key]) for key in state)
    del state[key := [*state][5]]
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf'Missing key\(s\) in state_dict: "{key}"\.'):
        build_visual(TIMM + name, path)


def test_a_map_of_an_odd_patch_covers_the_image_too(monkeypatch):
    monkeypatch.setattr(tower_module, "autocast", lambda like, precision: torch.no_grad())  # none on "meta"
    with torch.device("meta"):
        tower = ClipTower(build_visual("timm:convmixer_768_32", SCRATCH)[0], 8, *HALVES).eval()  # patch 7
        maps = tower(torch.zeros(1, 3, 101, 150, dtype=torch.uint8), torch.zeros(1, 101, 150))
    assert [side * tower.stride for side in maps.shape[2:]] == [105, 154]


def test_lite0_has_the_tensors_of_its_package_whose_code_is_not_run():
    path = next(Path(importlib.util.find_spec(PACKAGE).origin).parent.glob("models/*.pth"))
    ours, theirs = build_visual(*LITE0)[0].state_dict(), torch.load(path, weights_only=True)
    assert PACKAGE not in sys.modules
    for (key, value), (other, expected) in zip(ours.items(), theirs.items(), strict=True):
        assert torch.equal(value, expected) and key.rpartition(".")[2] == other.rpartition(".")[2]


def test_without_its_package_lite0_is_downloaded_and_where_that_fails_too_the_error_has_every_way_out(
        visuals, monkeypatch):
    state = visuals(LITE0[0])[0].state_dict()
    monkeypatch.setattr(tower_module, "LITE0_PACKAGE", f"{LITE0_PACKAGE}-that-is-not-here")
    monkeypatch.setattr(HUB, lambda *args, **kwargs: dict(state))
    assert all(torch.equal(value, state[key]) for key, value in build_visual(*LITE0)[0].state_dict().items())
    monkeypatch.setattr(HUB, offline)
    with pytest.raises(ValueError, match=r"^weights in1k of timm:tf_efficientnet_lite0 .*\(no route to host more "
                                         r"lines\)\. Install the package anew \(pip .*efficientnet-lite0-.*\); "
                                         r".*file.* tag \(in1k\); or scratch for"):
        build_visual(*LITE0)


@pytest.mark.parametrize(("name", "weights", "quick", "mean"), [
    ("ViT-B-16", "openai", True, OPENAI), ("ViT-B-16", "laion2b_s34b_b88k", False, OPENAI),
    ("ViT-B-16", "some_file.pt", False, OPENAI), ("ViT-B-16-quickgelu", "some_file.pt", True, OPENAI),
    ("ViT-B-16-quickgelu", SCRATCH, True, OPENAI), ("ViT-L-14", "laion2b_s32b_b82k", False, (0.5,) * 3),
    ("ViT-B-16-SigLIP", SCRATCH, None, (0.5,) * 3), ("MobileCLIP2-S0", SCRATCH, None, (0.0,) * 3),
    ("timm:vit_base_patch16_224", "some_file.pt", None, HALVES[0]),
    ("timm:vit_base_patch16_224", "dino", None, IMAGENET[0])])
def test_activation_and_normalisation_are_those_of_the_pretraining(name, weights, quick, mean):
    with torch.device("meta"):
        visual, found, _ = build_visual(name, weights, load=False)
    assert found == mean
    if quick is not None:
        kind = type(visual.transformer.resblocks[0].mlp.gelu).__name__
        assert kind == ("QuickGELU" if quick else "GELU")


def test_a_pretrained_tag_takes_open_clips_download(visuals, monkeypatch, tmp_path):
    state, asked = visuals("RN50")[0].state_dict(), []
    torch.save({f"visual.{key}": value for key, value in state.items()}, tmp_path / "RN50.pt")

    def download(config, **kwargs):
        asked.append(config)
        return str(tmp_path / "RN50.pt")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    visual, mean, _ = build_visual("RN50", "openai")
    assert all(torch.equal(value, state[key]) for key, value in visual.state_dict().items())
    assert asked == [open_clip.get_pretrained_cfg("RN50", "openai")]
    assert mean == OPENAI


def test_a_tag_that_cannot_be_downloaded_names_reason_and_ways_out_and_builds_no_random_tower(monkeypatch):
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    with torch.device("meta"), pytest.raises(ValueError, match=r"^weights openai of RN50 .*\(no route to host more "
                                             r"lines\)\. Give --tower-weights a file.* tag \(openai, .*scratch for"):
        build_visual("RN50", "openai")


@pytest.mark.parametrize(("name", "weights", "said"), [
    ("ViT-Z-99", SCRATCH, r"unknown image tower 'ViT-Z-99'; choose from open_clip\.list_models\(\) .* as ViT-"),
    ("RN50", "nowhere.pt", r"^weights nowhere.pt of RN50 .*No such file.* tag \(openai, .*; or scratch for"),
    ("coca_base", "laion2b_s34b_b88k", r"No such file.* tag \(it has none\)"),
    ("timm:resnet18", "in1k", r"^weights in1k of timm:resnet18 .*No such file.* tag \(a1_in1k, .*scratch for"),
    ("timm:tf_eficientnet_lite0", SCRATCH, r"tower 'timm:tf_ef.* as timm:tf_efficientnet_lite0, timm:"),
    ("timm:convnext_tinny", SCRATCH, r"as convnext_tiny, timm:convnext_tiny, timm:(?!.* convnext_tiny,)"),
    ("timm:vit_small_patch14_dinov2.lvd142m", SCRATCH, r"as timm:vit_small_patch14_dinov2, .*; a tag is given by"),
    ("timm:", SCRATCH, r"timm:NAME of timm\.list_models\(\), as .*timm:")])
def test_unknown_names_of_towers_and_weights_are_answered_with_the_choices(name, weights, said):
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        build_visual(name, weights)


@pytest.mark.parametrize("image_size", [(64, 48), (61, 45), (70, 50)])
def test_a_voxel_samples_the_map_where_its_pixel_is_for_image_sizes_off_the_stride_too(
        make_bifusion, make_batch, monkeypatch, image_size):
    model = make_bifusion("tiny_timm_vit")
    tower, batch = model.tower, make_batch(views=(1, 1), image_size=image_size)
    maps = torch.zeros(tower(batch["image"], batch["depth"]).shape)
    centre_x, centre_y = ((torch.arange(n) + 0.5) * tower.stride - 0.5 for n in (maps.shape[3], maps.shape[2]))
    maps[:, 0], maps[:, 1] = centre_x, centre_y[:, None]  # in pixels
    monkeypatch.setattr(tower, "forward", lambda image, depth, levels: maps)
    model.standardise_2d = torch.nn.Identity()
    feat, seen = model.encode_2d(batch)
    links = link_views(batch["world_coord"], batch["world_to_camera"], batch["intrinsics"], batch["depth"],
                       point_batch=batch["batch_index"], view_batch=batch["view_batch"], tolerance=0.05)
    assert torch.equal(seen.nonzero()[:, 0], links.point) and len(links.point) > 20
    ends = torch.stack([centre_x[[0, -1]], centre_y[[0, -1]]], 1)  # the border repeats
    assert torch.allclose(feat[links.point, :2], links.uv.maximum(ends[0]).minimum(ends[1]), atol=1e-3)


@pytest.mark.parametrize(("name", "epoch"), [
    *((name, epoch) for name in FEW for epoch in (10, 30, 50, 70)), ("MobileCLIP2-S0", 30)])  # timm's batch norms
def test_nothing_of_a_pretrained_tower_moves_before_epoch_41_and_all_of_it_trains_then_at_its_rate(
        make_bifusion, make_batch, row, train_steps, name, epoch):
    model, held, trains = make_bifusion(name), row(epoch, pretrained=True, tower_rate=0.5), epoch > 40
    before, neck = (copy.deepcopy(part.state_dict()) for part in (model.tower.visual, model.tower.neck))
    optimizer = train_steps(model, held, make_batch(), steps=3)
    assert all((p.grad is not None) == trains for p in model.tower.visual.parameters())
    weights = dict(model.tower.visual.named_parameters())  # the statistics of its batch norms stay
    assert all(torch.equal(before[key], value) != (trains and key in weights)
               for key, value in model.tower.visual.state_dict().items())
    assert all(torch.equal(neck[key], value) for key, value in model.tower.neck.state_dict().items()) == (epoch == 10)
    set_rates(optimizer, held, 1.0)
    assert {group["lr"] for group in optimizer.param_groups if group["name"] == "tower"} == {0.5 * trains}


@pytest.mark.parametrize("name", FEW)
def test_bf16_is_finite_and_close_and_leaves_the_sparse_convolutions_alone(make_bifusion, make_batch, row, put, name):
    model, batch, held = make_bifusion(name), make_batch(), row(70, pretrained=True)
    types, outputs, gradients = {"conv": set(), "tower": set(), "decoder": set()}, [], []

    def watch(module, part):
        module.register_forward_hook(lambda module, args, out: types[part].add(getattr(out, "features", out).dtype))

    for module in model.unet.modules():
        if hasattr(module, "indice_key"):
            watch(module, "conv")
    for module in model.tower.visual.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            watch(module, "tower")
    watch(model.decoder.to_mask, "decoder")
    for precision, kinds in (("fp32", {torch.float32}), ("bf16", {torch.float32, torch.bfloat16})):
        model.precision = model.tower.precision = precision
        put(model, held).train().zero_grad()
        outputs.append(model(batch))
        weighted_sum(forward(model, batch, held)[0], LOSS_WEIGHTS["bifusion"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert types == {"conv": {torch.float32}, "tower": kinds, "decoder": kinds}
    fp32, bf16 = outputs
    assert bf16["logits"].dtype == torch.float32 and 0 < (bf16["logits"] - fp32["logits"]).abs().max() < 0.1
    assert F.cosine_similarity(bf16["feat_2d"], fp32["feat_2d"])[fp32["seen"]].min() > 0.95
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.isfinite(value).all() for value in gradients[1].values())
