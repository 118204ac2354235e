"""The image tower: any open_clip image tower as dense RGB-D maps, and where its weights come from.

    visual, mean, std = build_visual("ViT-B-16", "laion2b_s34b_b88k")  # a pretrained tag, a local file, or SCRATCH
    tower = ClipTower(visual, out_channels=256, mean=mean, std=std, pretrained=True)
    maps = tower(image, depth)                                          # (V, 256, h, w), a pixel every tower.stride

Copy it beside clip_small.json and it works: needs torch and open_clip (with timm and safetensors, which it brings).

A tower is cut where its maps are still dense: a transformer after half of its blocks (ViT-B/16 after block 6 of 12), a
pyramid (ModifiedResNet, ConvNeXt, ...) after stride 16. What is cut away is not kept, so every parameter that is left
takes part in the output. Axes: V views, C channels, H, W image size, h, w map size.

Sources: CLIP (Radford et al. 2021) as open_clip builds it; resized position embeddings as in ViT (Dosovitskiy et al.
2021); doubling a plain ViT's map by a transposed convolution as in ViTDet (Li et al. 2022).
"""

import contextlib
import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SCRATCH = "scratch"  # instead of weights: a tower of random numbers, which trains from stage 2 on
MAX_DEPTH = 10.0  # metres that become 1 in the depth channel
VIEW_CHUNK = 32  # images that go through the tower at a time
COARSEST = 16  # pixels: levels of a pyramid beyond this stride are cut away
LAST_BLOCKS = 2  # of a transformer, that train in stage 3


@contextlib.contextmanager
def import_open_clip():
    """open_clip, without its notes and warnings of random weights on the screen, knowing this project's clip_small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            import open_clip

            if "clip_small" not in open_clip.list_models():
                open_clip.add_model_config(Path(__file__).with_name("clip_small.json"))
            yield open_clip
        finally:
            logging.disable(level)


# ------------------------------------------------------------------------------------------------------------- weights


def describe(name, weights):
    """How an open_clip model was trained, by what is known of these weights.

    Returns dict: config (open_clip's), tags (list of its pretrained tags), quick_gelu (bool), mean, std (three floats
    each). Of a file neither is known: its activation is that of the model's name (OpenAI's files are "-quickgelu"), its
    normalisation that of the model's first tag. Raises KeyError: unknown name.
    """
    with import_open_clip() as open_clip:
        if name not in open_clip.list_models():
            raise KeyError(f"unknown image tower {name!r}; choose from {', '.join(open_clip.list_models())}")
        config, tags = open_clip.get_model_config(name), open_clip.list_pretrained_tags_by_model(name)
        known = open_clip.get_pretrained_cfg(name, weights if weights in tags else (tags or [""])[0]) or {}
        quick = known.get("quick_gelu", False) if weights in tags else config.get("quick_gelu", False)
        return {"config": config, "tags": tags, "quick_gelu": quick,
                "mean": known.get("mean") or open_clip.OPENAI_DATASET_MEAN,
                "std": known.get("std") or open_clip.OPENAI_DATASET_STD}


def build_visual(name, weights, load=True):
    """Build an open_clip image tower, whole, and fill it.

    Args:
        name:    a model of open_clip.list_models(), or "clip_small".
        weights: a pretrained tag of that model (open_clip downloads and caches it), the path of a file (.pt, .bin of
                 tensors or .safetensors, of a whole CLIP model or its `visual.` part), or SCRATCH.
        load:    False leaves random numbers in it: a checkpoint will fill it.

    Returns:
        visual: open_clip ModifiedResNet, VisionTransformer or TimmModel.
        mean, std: three floats each, the normalisation of colours in 0..1 that the tower was trained with.

    Raises:
        KeyError: unknown name.
        ValueError: weights that cannot be had, read or fitted; the message names them, the reason and the ways out.
    """
    about = describe(name, weights)
    config = about["config"]
    with import_open_clip():
        from open_clip.model import _build_vision_tower

        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"] | {"timm_model_pretrained": False},
                                     about["quick_gelu"])
    if load and weights != SCRATCH:
        path = weights_file(name, weights)
        fill(visual, read_weights(path), name, path)
    return visual, about["mean"], about["std"]


def weights_file(name, weights):
    """The file of a pretrained tag (downloaded by open_clip where it is not cached yet), or of a path, here or beside
    this module. Raises ValueError where there is none, with the ways out."""
    with import_open_clip() as open_clip:
        from open_clip.pretrained import download_pretrained

        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights in tags:
            try:
                return download_pretrained(open_clip.get_pretrained_cfg(name, weights))
            except Exception as error:  # whatever the hub, the network or the disk raises
                raise ValueError(
                    f"CLIP weights {weights!r} of {name} could not be had ({_first_line(error)}); download them "
                    f"elsewhere and give the file by --clip-weights PATH, or train the tower from random weights by "
                    f"--clip-weights {SCRATCH}") from error
    path = next((path for path in (Path(weights), Path(__file__).parent / weights) if path.is_file()), None)
    if path is None:
        raise ValueError(f"CLIP weights {weights!r}: neither a file nor a pretrained tag of {name}; its tags: "
                         f"{', '.join(tags) or 'none'}; or --clip-weights {SCRATCH} for random weights")
    return path


def read_weights(path):
    """A file of tensors -> {key: tensor}, without running any code of it. Raises ValueError where it is broken."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript archives, which it refuses
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise all kinds on a damaged file
        raise ValueError(f"CLIP weights {path}: expected a file of tensors, found one that cannot be read, truncated "
                         f"or a program ({_first_line(error)}); a TorchScript archive that you trust becomes one by: "
                         "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW_FILE)") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    pairs = state.items() if isinstance(state, dict) else ()
    state = {str(key).removeprefix("module."): value for key, value in pairs
             if torch.is_tensor(value) and value.layout == torch.strided and not value.is_complex()
             and key not in ("input_resolution", "context_length", "vocab_size")}  # of OpenAI's archives
    if not state:
        raise ValueError(f"CLIP weights {path}: expected tensors by name, found none")
    return state


def fill(visual, state, name, path):
    """Put the image tower's part of a state into visual; keys of the text tower are ignored, all else must fit."""
    own = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    own = own or state  # a file of the image tower alone
    wanted = visual.state_dict()
    missing = [key for key in wanted if key not in own]
    unknown = [key for key in own if key not in wanted]
    shapes = [f"{key} is {tuple(own[key].shape)} instead of {tuple(wanted[key].shape)}"
              for key in wanted if key in own and own[key].shape != wanted[key].shape]
    if missing or unknown or shapes:
        raise ValueError(f"CLIP weights {path} are not those of {name}: {len(missing)} tensors are missing "
                         f"{missing[:2]}, {len(unknown)} unknown {unknown[:2]}, {len(shapes)} of another shape "
                         f"{shapes[:2]}; give the tower that they belong to by --clip NAME, in open_clip's layout (not "
                         "that of Hugging Face's transformers)")
    broken = [key for key, value in own.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"CLIP weights {path}: {len(broken)} tensors hold numbers that are not finite {broken[:2]}")
    visual.load_state_dict(own)


def _first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --------------------------------------------------------------------------------------------------------- dense maps


def autocast(like, precision):
    """Matrix products and convolutions in bfloat16 where precision is "bf16"; as they are where it is "fp32"."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=precision == "bf16")


class RGBDConv(nn.Module):
    """A convolution on RGB that also reads depth: conv(rgb) + conv_depth(depth), conv_depth starting at zero.

    At the start the output equals the RGB convolution's bit for bit, since an exact zero is added.
    forward: (V, 4, H, W), depth last.
    """

    def __init__(self, conv):
        super().__init__()
        self.rgb = conv
        self.depth = nn.Conv2d(1, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        nn.init.zeros_(self.depth.weight)

    def forward(self, rgbd):
        return self.rgb(rgbd[:, :3]) + self.depth(rgbd[:, 3:])


class Pyramid(nn.Module):
    """open_clip's ModifiedResNet up to stride 16: levels of strides 4, 8, 16."""

    def __init__(self, visual):
        super().__init__()
        visual.conv1 = RGBDConv(visual.conv1)
        visual.layer4 = visual.attnpool = None
        self.net, self.strides = visual, [4, 8, 16]

    def forward(self, rgbd):
        x = self.net.stem(rgbd)  # (V, width, H/4, W/4)
        levels = []
        for layer in (self.net.layer1, self.net.layer2, self.net.layer3):
            x = layer(x)
            levels.append(x)
        return levels

    def ends(self):
        return [self.net.conv1, self.net.layer3]


def position_embedding(visual, size):
    """A VisionTransformer's for maps of size (h, w): (1 + h w, C), bicubic where its own grid differs."""
    known, grid = visual.positional_embedding, visual.grid_size
    if tuple(size) == tuple(grid):
        return known
    maps = known[1:].T.unflatten(1, grid)[None]  # (1, C, gh, gw)
    maps = F.interpolate(maps, size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([known[:1], maps[0].flatten(1).T])


class Transformer(nn.Module):
    """open_clip's VisionTransformer up to half of its blocks: one level, a pixel a patch, for any image size."""

    def __init__(self, visual):
        super().__init__()
        blocks = visual.transformer.resblocks
        visual.transformer.resblocks = blocks[: max(1, len(blocks) // 2)]
        visual.conv1 = RGBDConv(visual.conv1)
        visual.ln_post = visual.proj = visual.attn_pool = visual.attn_pool_contrastive = None
        self.net, self.strides = visual, [visual.conv1.rgb.stride[0]]

    def forward(self, rgbd):
        x = self.net.conv1(rgbd)  # (V, C, h, w)
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (V, h w, C)
        x = torch.cat([self.net.class_embedding.expand(len(x), 1, -1), x], 1)  # (V, 1 + h w, C)
        x = self.net.ln_pre(x + position_embedding(self.net, size))
        for block in self.net.transformer.resblocks:
            x = block(x)
        return [x[:, 1:].transpose(1, 2).unflatten(2, size)]  # (V, C, h, w)

    def ends(self):
        return [self.net.conv1, *self.net.transformer.resblocks[-LAST_BLOCKS:]]


class TimmTrunk(nn.Module):
    """A timm tower of open_clip, by timm's own forward_intermediates: a pyramid up to stride 16, or half of the blocks.

    Raises ValueError where timm cannot give maps of any image size.
    """

    def __init__(self, visual):
        super().__init__()
        self.net, patch = visual.trunk, getattr(visual.trunk, "patch_embed", None)
        self.rope = getattr(self.net, "rope", None)  # EVA's rotary positions
        if hasattr(patch, "strict_img_size"):
            patch.strict_img_size = False
        if hasattr(patch, "output_fmt") and hasattr(self.net, "dynamic_img_size"):  # timm's plain transformers
            self.net.dynamic_img_size = True
            patch.flatten, patch.output_fmt = False, type(patch.output_fmt)("NHWC")
        for block in self.net.modules():
            if hasattr(block, "dynamic_mask"):  # Swin's windows
                block.dynamic_mask = True
        # a tower of parallel stems (FastViT) reads the image by several convolutions
        self.first = [n for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
        for name in self.first:
            self.net.set_submodule(name, RGBDConv(self.net.get_submodule(name)))
        try:
            strides = [level["reduction"] for level in self.net.feature_info]
            if len(set(strides)) == 1:
                self.indices = [max(1, len(strides) // 2) - 1]
            else:
                self.indices = [i for i, s in enumerate(strides) if 4 <= s <= COARSEST and s not in strides[i + 1:]]
            self.strides = [strides[i] for i in self.indices]
            self.net.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
            sides = [3 * max(self.strides), 4 * max(self.strides)]
            with torch.no_grad():
                probe = self.eval()(torch.zeros(1, 4, *sides))
            found, wanted = [level.shape[2:] for level in probe], [[a // s for a in sides] for s in self.strides]
            assert [list(shape) for shape in found] == wanted, f"{found} in place of {wanted}"
        except (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(f"timm's {type(self.net).__name__} gives no maps for images of any size "
                             f"({_first_line(error)}); take another --clip") from error

    def forward(self, rgbd):
        if hasattr(self.rope, "update_feat_shape"):
            self.rope.update_feat_shape([side // self.strides[0] for side in rgbd.shape[2:]])
        return self.net.forward_intermediates(rgbd, indices=self.indices, intermediates_only=True, stop_early=True)

    def ends(self):
        blocks = next(m for n, m in self.net.named_children() if n in ("stages", "blocks", "layers"))
        blocks = getattr(blocks[-1], "blocks", blocks)  # of the last stage, where there are stages
        return [*(self.net.get_submodule(name) for name in self.first), *blocks[-LAST_BLOCKS:]]


class ClipTower(nn.Module):
    """Dense RGB-D features from an open_clip image tower: levels of one or more strides, and a neck that joins them.

    The neck brings a pyramid's levels to one width by 1x1 convolutions and sums them at the finest stride; a plain
    transformer's single level is normalised over its channels and doubled in resolution. GELU and a 3x3 convolution
    follow: while the tower is frozen, the neck is all that learns to read it.

    Args:
        visual:       open_clip ModifiedResNet, VisionTransformer or TimmModel, whole; it is cut here.
        out_channels: channels of the map.
        mean, std:    of colours in 0..1, three floats each (`build_visual`).
        pretrained:   True where visual holds trained weights: stages.py then protects it.
    """

    def __init__(self, visual, out_channels, mean, std, pretrained=False):
        super().__init__()
        kinds = {"ModifiedResNet": Pyramid, "VisionTransformer": Transformer, "TimmModel": TimmTrunk}
        if type(visual).__name__ not in kinds:
            raise ValueError(f"image tower of type {type(visual).__name__}; expected one of {sorted(kinds)}")
        self.pretrained, self.out_channels = pretrained, out_channels
        self.checkpointing, self.precision = False, "fp32"  # set by train.py
        self.visual = kinds[type(visual).__name__](visual)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.multiple = max(self.visual.strides)  # sides are padded to multiples of it
        self.stride = min(self.visual.strides)  # of the map, in pixels
        with torch.no_grad():
            widths = [level.shape[1] for level in self.visual.eval()(torch.zeros(1, 4, *[2 * self.multiple] * 2))]
        self.train()
        if len(widths) > 1:
            lateral = [nn.Conv2d(width, out_channels, 1) for width in widths]
        else:
            self.stride //= 2
            lateral = [nn.ConvTranspose2d(widths[0], out_channels, 2, stride=2)]
        smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.neck = nn.ModuleDict({"lateral": nn.ModuleList(lateral), "smooth": nn.Sequential(nn.GELU(), smooth)})

    def forward(self, image, depth, levels=None):
        """One map a view, in bounded chunks of views.

        Args:
            image:  (V, 3, H, W) uint8.  depth: (V, H, W) metres, 0 = no reading.
            levels: what `encode` gave for these views (a cache's); the image is not looked at then.

        Returns:
            (V, out_channels, h, w) float32; pixel (0, 0) covers the image's first stride x stride pixels. H and W need
            not be multiples of the stride: the image is padded at its right and lower border, nothing is cropped, so
            the map covers (w * stride, h * stride) pixels.
        """
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.visual.parameters())
        maps = []
        for start in range(0, len(depth), VIEW_CHUNK):
            part = slice(start, start + VIEW_CHUNK)
            if levels is not None:
                given = [level[part].float() for level in levels]
            elif trains and self.checkpointing:
                given = checkpoint(self.encode, image[part], depth[part], use_reentrant=False)
            else:
                given = self.encode(image[part], depth[part])
            maps.append(self.join(given))
        return torch.cat(maps)

    def encode(self, image, depth):
        """(V, 3, H, W) uint8, (V, H, W) metres -> list of levels (V, C, h, w) float32, what a frozen tower repeats."""
        rgb = (image.float() / 255 - self.mean) / self.std  # (V, 3, H, W) as CLIP was trained
        rgbd = torch.cat([rgb, (depth / MAX_DEPTH).clamp(0, 1).unsqueeze(1)], 1)  # depth in 0..1, 0 = no reading
        down, right = (-size % self.multiple for size in depth.shape[1:])
        rgbd = F.pad(rgbd, (0, right, 0, down))  # with the mean colour and no depth
        with autocast(rgbd, self.precision):
            return [level.float() for level in self.visual(rgbd)]

    def join(self, levels):
        """The neck: list of levels (V, C, h, w) -> (V, out_channels, h, w) float32."""
        if len(levels) == 1:
            x = levels[0].permute(0, 2, 3, 1)  # (V, h, w, C)
            levels = [F.layer_norm(x, x.shape[3:]).permute(0, 3, 1, 2)]  # of its channels a few are huge
        with autocast(levels[0], self.precision):
            out = 0
            for level, lateral in zip(levels, self.neck["lateral"]):
                x = lateral(level)
                if torch.is_tensor(out):
                    x = F.interpolate(x, out.shape[-2:], mode="bilinear", align_corners=False)
                out = out + x
            return self.neck["smooth"](out).float()

    def parts(self):
        """Parameters by part of stages.PARTS."""
        ends = [p for module in self.visual.ends() for p in module.parameters()]
        known = {id(p) for p in ends}
        return {"tower": [p for p in self.visual.parameters() if id(p) not in known], "tower_ends": ends,
                "2d": list(self.neck.parameters())}


class MapCache:  # TEMPORARY
    def __init__(self, root, tower, image_size, limit_gb):
        from cache import FeatureCache
        self.inner = FeatureCache(root, tower, image_size, limit_gb)
        self.shapes = self.inner.shapes
    def fill(self, files, load, workers, until, share):
        return self.inner.fill(list(files), torch.device("cpu"), workers, until)
    def read(self, view):
        return self.inner.read(*view)
