"""Any open_clip image tower as dense RGB-D maps; its weights; the maps of a frozen tower, kept on disk.

    visual, mean, std = build_visual("ViT-B-16", "laion2b_s34b_b88k")  # a pretrained tag, a local file, or SCRATCH
    tower = ClipTower(visual, out_channels=256, mean=mean, std=std, pretrained=True)
    maps = tower(image, depth)                                          # (V, 256, h, w), a pixel every tower.stride
    cache = MapCache("data/clip_cache", tower, image_size=(320, 240), limit_gb=50)
    if cache.fill({view: (colour file, depth file), ...}, load):        # computes what is missing, once
        levels = cache.read(view)                                       # instead of tower.encode

Copy it beside clip_small.json and it works: needs torch and open_clip (with timm and safetensors, which it brings).

A tower is cut where its maps are still dense: a transformer after half of its blocks (ViT-B/16 after block 6 of 12), a
pyramid (ModifiedResNet, ConvNeXt, ...) after stride 16. What is cut away is not kept, so every parameter that is left
takes part in the output. Axes: V views, C channels, H, W image size, h, w map size.

Sources: CLIP (Radford et al. 2021) as open_clip builds it; resized position embeddings as in ViT (Dosovitskiy et al.
2021); doubling a plain ViT's map by a transposed convolution as in ViTDet (Li et al. 2022).
"""

import contextlib
import copy
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

SCRATCH = "scratch"  # instead of weights: a tower of random numbers, which trains from stage 2 on
MAX_DEPTH = 10.0  # metres that become 1 in the depth channel
VIEW_CHUNK = 32  # images that go through the tower at a time
COARSEST = 16  # pixels: levels of a pyramid beyond this stride are cut away
LAST_BLOCKS = 2  # of a transformer, that train in stage 3
FORMAT = 2  # of the maps on disk: raise it whenever the same tower gives other numbers or a file another meaning
CHECKSUM = 16  # bytes


# ------------------------------------------------------------------------------------------------------------- weights


def import_open_clip():
    """The module open_clip, which then knows this project's clip_small too."""
    import open_clip

    if "clip_small" not in open_clip.list_models():
        open_clip.add_model_config(Path(__file__).with_name("clip_small.json"))
    return open_clip


def build_visual(name, weights, load=True):
    """Build an open_clip image tower, whole, and fill it.

    Args:
        name:    a model of open_clip.list_models(), or "clip_small".
        weights: a pretrained tag of that model (open_clip downloads and caches it), the path of a file (.pt, .bin of
                 tensors or .safetensors, of a whole CLIP model or its `visual.` part), or SCRATCH.
        load:    False leaves random numbers in it: a checkpoint will fill it.

    Returns:
        visual: open_clip ModifiedResNet, VisionTransformer or TimmModel, with the activation of the tag; of a file,
                with that of the name (OpenAI's are "-quickgelu").
        mean, std: three floats each, of colours in 0..1 as the tag (of a file the name's first) was trained with.

    Raises:
        KeyError: unknown name.
        ValueError: weights that cannot be had, read or fitted; the message names them, the reason and the ways out.
    """
    open_clip = import_open_clip()
    if name not in open_clip.list_models():
        raise KeyError(f"unknown image tower {name!r}; choose from {', '.join(open_clip.list_models())}")
    config, tags = open_clip.get_model_config(name), open_clip.list_pretrained_tags_by_model(name)
    known = open_clip.get_pretrained_cfg(name, weights if weights in tags else (tags or [""])[0]) or {}
    visual = open_clip.model._build_vision_tower(
        config["embed_dim"], config["vision_cfg"] | {"timm_model_pretrained": False},
        quick_gelu=(known if weights in tags else config).get("quick_gelu", False))
    if load and weights != SCRATCH:
        load_weights(visual, name, weights_file(name, weights, tags))
    mean, std = known.get("mean"), known.get("std")
    return visual, mean or open_clip.OPENAI_DATASET_MEAN, std or open_clip.OPENAI_DATASET_STD


def weights_file(name, weights, tags):
    """Path of the file of a pretrained tag, or of weights itself, here or beside this module."""
    if weights in tags:
        from open_clip import get_pretrained_cfg, pretrained

        try:
            return Path(pretrained.download_pretrained(get_pretrained_cfg(name, weights)))
        except Exception as error:  # whatever the hub, the network or the disk raises
            raise ValueError(f"CLIP weights {weights!r} of {name} could not be had ({_one_line(error)}); download "
                             "them elsewhere and give the file by --tower-weights PATH, or train the tower from random "
                             f"weights by --tower-weights {SCRATCH}") from error
    for path in (Path(weights), Path(__file__).parent / weights):
        if path.is_file():
            return path
    raise ValueError(f"CLIP weights {weights!r}: neither a file nor a pretrained tag of {name}; its tags: "
                     f"{', '.join(tags) or 'none'}; or --tower-weights {SCRATCH} for random weights")


def load_weights(visual, name, path):
    """Fill visual from a file of tensors, of which no code is run; the text tower's tensors are passed by."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load
        else:
            load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        state = load(path)
    except Exception as error:  # torch and safetensors raise all kinds on a damaged file
        raise ValueError(f"CLIP weights {path}: expected a file of tensors, found one that cannot be read, truncated "
                         f"or a program ({_one_line(error)}); a TorchScript archive that you trust becomes one by: "
                         "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW_FILE)") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    pairs = state.items() if isinstance(state, dict) else ()
    found = {str(key).removeprefix("module."): value for key, value in pairs if torch.is_tensor(value)}
    found = {key[len("visual."):]: found[key] for key in found if key.startswith("visual.")} or found
    try:
        visual.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"CLIP weights {path} are not those of {name} ({_one_line(error)}); give the tower that they "
                         "belong to by --tower NAME, in open_clip's layout (not that of Hugging Face's "
                         "transformers)") from error
    broken = [key for key, value in found.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"CLIP weights {path}: {len(broken)} tensors hold numbers that are not finite {broken[:2]}")


def _one_line(error):
    """The message of an error, its first 200 characters without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# --------------------------------------------------------------------------------------------------------- dense maps


def autocast(like, precision):
    """Matrix products and convolutions in bfloat16 where precision is "bf16"; as they are where it is "fp32"."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=precision == "bf16")


class RGBDConv(nn.Module):
    """A convolution on RGB that also reads depth: conv(rgb) + conv_depth(depth), conv_depth starting at zero.

    At the start the output equals the RGB convolution's bit for bit, since an exact zero is added. The depth's is of
    the same class, so it pads alike ("same" padding is a class of timm's).
    forward: (V, 4, H, W), depth last.
    """

    def __init__(self, conv):
        super().__init__()
        self.rgb, self.depth = conv, copy.deepcopy(conv)
        self.depth.in_channels, self.depth.bias = 1, None
        self.depth.weight = nn.Conv2d(1, conv.out_channels, conv.kernel_size, bias=False).weight
        nn.init.zeros_(self.depth.weight)

    def forward(self, rgbd):
        return self.rgb(rgbd[:, :3]) + self.depth(rgbd[:, 3:])


# A kind of tower has: net, what is left of open_clip's; strides of its levels; ends, what trains in stage 3


class Pyramid(nn.Module):
    """open_clip's ModifiedResNet up to stride 16: levels of strides 4, 8, 16."""

    def __init__(self, visual):
        super().__init__()
        visual.conv1 = RGBDConv(visual.conv1)
        visual.layer4, visual.attnpool = nn.Identity(), None
        self.net, self.strides, self.ends = visual, [4, 8, 16], [visual.conv1, visual.layer3]

    def forward(self, rgbd):
        return self.net.forward_intermediates(rgbd, [1, 2, 3], intermediates_only=True)["image_intermediates"]


class Transformer(nn.Module):
    """open_clip's VisionTransformer up to half of its blocks: one level, a pixel a patch, for any image size.

    Its own forward_intermediates knows one image size: it adds the position embedding as it is.
    """

    def __init__(self, visual):
        super().__init__()
        visual.conv1 = RGBDConv(visual.conv1)
        visual.transformer.prune_intermediate_layers([max(1, len(visual.transformer.resblocks) // 2) - 1])
        visual.ln_post = visual.proj = visual.attn_pool = visual.attn_pool_contrastive = None
        self.net, self.strides = visual, [visual.conv1.rgb.stride[0]]
        self.ends = [visual.conv1, *visual.transformer.resblocks[-LAST_BLOCKS:]]

    def forward(self, rgbd):
        from timm.layers import resample_abs_pos_embed

        x = self.net.conv1(rgbd)  # (V, C, h, w)
        size = x.shape[-2:]
        x = torch.cat([self.net.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        position = resample_abs_pos_embed(self.net.positional_embedding[None], size, self.net.grid_size)
        x = self.net.transformer(self.net.ln_pre(x + position))  # (V, 1 + h w, C)
        return [x[:, 1:].transpose(1, 2).unflatten(2, size)]  # (V, C, h, w)


class TimmTrunk(nn.Module):
    """A timm tower of open_clip: a pyramid up to stride 16, or half of the blocks."""

    def __init__(self, visual):
        super().__init__()
        self.net, patch = visual.trunk, getattr(visual.trunk, "patch_embed", None)
        if hasattr(patch, "output_fmt") and hasattr(self.net, "dynamic_img_size"):  # timm's plain transformers
            self.net.dynamic_img_size = True
            patch.flatten, patch.output_fmt = False, type(patch.output_fmt)("NHWC")
        for module in self.net.modules():  # for any image size: the patches, and Swin's windows
            for flag, value in (("strict_img_size", False), ("dynamic_mask", True)):
                if hasattr(module, flag):
                    setattr(module, flag, value)
        # a tower of parallel stems (FastViT) reads the image by several convolutions
        first = [n for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
        for name in first:
            self.net.set_submodule(name, RGBDConv(self.net.get_submodule(name)))
        strides = [level["reduction"] for level in self.net.feature_info]
        if len(set(strides)) == 1:
            self.indices = [max(1, len(strides) // 2) - 1]
        else:
            self.indices = [i for i, s in enumerate(strides) if 4 <= s <= COARSEST and s not in strides[i + 1:]]
        self.strides = [strides[i] for i in self.indices]
        self.net.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        blocks = next(m for n, m in self.net.named_children() if n in ("stages", "blocks", "layers"))
        blocks = getattr(blocks[-1], "blocks", blocks)  # of the last stage, where there are stages
        self.ends = [*(self.net.get_submodule(name) for name in first), *blocks[-LAST_BLOCKS:]]

    def forward(self, rgbd):
        rope = getattr(self.net, "rope", None)  # EVA's rotary positions
        if hasattr(rope, "update_feat_shape"):
            rope.update_feat_shape([side // self.strides[0] for side in rgbd.shape[2:]])
        return self.net.forward_intermediates(rgbd, indices=self.indices, intermediates_only=True, stop_early=True)


KINDS = {"ModifiedResNet": Pyramid, "VisionTransformer": Transformer, "TimmModel": TimmTrunk}  # open_clip's: ours


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

    Raises:
        ValueError: another kind of tower, or one that gives no maps of any image size.
    """

    def __init__(self, visual, out_channels, mean, std, pretrained=False):
        super().__init__()
        if type(visual).__name__ not in KINDS:
            raise ValueError(f"image tower of type {type(visual).__name__}; expected one of {sorted(KINDS)}")
        self.pretrained, self.out_channels, self.precision = pretrained, out_channels, "fp32"  # train.py sets it
        try:
            self.visual = KINDS[type(visual).__name__](visual)
            strides = self.visual.strides
            sides = [3 * max(strides), 4 * max(strides)]
            with torch.no_grad():
                levels = self.visual.eval()(torch.zeros(1, 4, *sides))
            found, wanted = [list(level.shape[2:]) for level in levels], [[a // s for a in sides] for s in strides]
            assert found == wanted, f"{found} in place of {wanted}"
        except (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(f"{type(getattr(visual, 'trunk', visual)).__name__} gives no maps for images of any size "
                             f"({_one_line(error)}); take another --tower") from error
        self.train()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.multiple = max(strides)  # sides are padded to multiples of it
        self.stride = min(strides) if len(strides) > 1 else strides[0] // 2  # of the map, in pixels
        if len(strides) > 1:
            lateral = [nn.Conv2d(level.shape[1], out_channels, 1) for level in levels]
        else:
            lateral = [nn.ConvTranspose2d(levels[0].shape[1], out_channels, 2, stride=2)]
        smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.neck = nn.ModuleDict({"lateral": nn.ModuleList(lateral), "smooth": nn.Sequential(nn.GELU(), smooth)})

    def forward(self, image, depth, levels=None):
        """One map a view, in bounded chunks of views.

        Args:
            image:  (V, 3, H, W) uint8.  depth: (V, H, W) metres, 0 = no reading.
            levels: what `encode` gave for these views (MapCache's); the image is not looked at then.

        Returns:
            (V, out_channels, h, w) float32; pixel (0, 0) covers the image's first stride x stride pixels. H and W need
            not be multiples of the stride: the image is padded at its right and lower border, nothing is cropped, so
            the map covers (w * stride, h * stride) pixels.
        """
        maps = []
        for start in range(0, len(depth), VIEW_CHUNK):
            rows = slice(start, start + VIEW_CHUNK)
            given = levels and [level[rows].float() for level in levels]
            maps.append(self.join(given or self.encode(image[rows], depth[rows])))
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
            out, *coarser = (lateral(level) for lateral, level in zip(self.neck["lateral"], levels))
            for level in coarser:
                out = out + F.interpolate(level, out.shape[-2:], mode="bilinear", align_corners=False)
            return self.neck["smooth"](out).float()

    def parts(self):
        """Parameters by part of stages.PARTS."""
        ends = [p for module in self.visual.ends for p in module.parameters()]
        known = {id(p) for p in ends}
        return {"tower": [p for p in self.visual.parameters() if id(p) not in known], "tower_ends": ends,
                "2d": list(self.neck.parameters())}


# -------------------------------------------------------------------------------------------- maps of a frozen tower


def digest(*parts):
    """Checksum of byte strings and arrays, CHECKSUM bytes."""
    result = hashlib.blake2b(digest_size=CHECKSUM)
    for part in parts:
        result.update(part)
    return result.digest()


class MapCache:
    """What ClipTower.encode gives for single views, on disk: of a frozen tower it is the same every epoch.

    One file a view, in half precision, in a folder named by the tower (its weights, normalisation, precision, the image
    size); the file's name comes from the bytes of the view's two images. So another tower, size or image never meets an
    old entry. A file is written beside its place and renamed, and begins with a checksum of the rest: what a kill or a
    full disk leaves behind is never used. A data loader's worker may hold a copy, which carries no tower.

    Args:
        root:       folder of the maps of all towers.
        tower:      ClipTower in evaluation; its weights must not change as long as the cache is in use.
        image_size: (W, H) of the frames.
        limit_gb:   largest size of root, in 10^9 bytes.

    Attributes: shapes, list of (C, h, w), one a level; paths, {view: file}, of the views that `fill` was given.
    """

    def __init__(self, root, tower, image_size, limit_gb):
        self.root, self.limit, self.tower, self.paths = Path(root), limit_gb * 1e9, tower, {}
        width, height = image_size
        with torch.no_grad():
            image = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=tower.mean.device)
            self.shapes = [tuple(level.shape[1:]) for level in tower.encode(image, image[:, 0].float())]
        self.ends = np.cumsum([np.prod(shape) for shape in self.shapes]).tolist()  # of the levels, in values
        self.entry_bytes = CHECKSUM + 2 * self.ends[-1]
        state = {k: v for k, v in tower.visual.state_dict().items() if not k.endswith("num_batches_tracked")}
        description = (FORMAT, tower.precision, MAX_DEPTH, width, height, list(state), str(tower.visual))
        numbers = [v.detach().cpu().contiguous().numpy() for v in (*state.values(), tower.mean, tower.std)]
        self.folder = self.root / digest(repr(description).encode(), *numbers).hex()

    def __getstate__(self):
        return self.__dict__ | {"tower": None}

    def read(self, view):
        """The levels of a view, list of (C, h, w) float16; None where there is no whole entry.

        A damaged entry is removed, so that the next `fill` makes it anew.
        """
        path, entry = self.paths.get(view), b""
        if path is None:
            return None
        with contextlib.suppress(OSError):
            entry = path.read_bytes()
        if len(entry) != self.entry_bytes or digest(memoryview(entry)[CHECKSUM:]) != entry[:CHECKSUM]:
            path.unlink(missing_ok=True)
            return None
        levels = np.split(np.frombuffer(entry, np.float16, offset=CHECKSUM), self.ends[:-1])
        return [level.reshape(shape) for level, shape in zip(levels, self.shapes)]

    def write(self, path, levels):
        """Keep the levels of one view. Raises OSError where the disk is full (nothing half-written stays) and
        OverflowError where half precision cannot hold them."""
        values = np.concatenate([level.cpu().half().numpy().ravel() for level in levels])
        if not np.isfinite(values).all():
            raise OverflowError("they exceed half precision, 65,504, or are not finite")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.root / f"{path.name}.{os.getpid()}.tmp"
        try:
            beside.write_bytes(digest(values) + values.tobytes())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def fill(self, files, load, workers=0, until=iter, share=(0, 1)):
        """Compute every entry that is not there, or not of its size; what is in it `read` checks.

        The last bits of a map depend on the views that went through the tower beside it. So these are always the same:
        VIEW_CHUNK neighbours in the list, whole where one of them is missing. A fill that was killed, or shared among
        processes, ends with the same bits.

        Args:
            files:   {view: (colour file, depth file)}; a view is anything that can be a key. They must not change
                     until the next fill.
            load:    function of a view -> image (3, H, W) uint8, depth (H, W) float32 metres, arrays.
            workers: threads that load.
            until:   function of an iterable -> its items up to a stop.
            share:   (rank, world): this process computes the chunks whose number modulo world is rank.

        Returns:
            True where every view of this process's share has its entry; False, with a line that says why, where not.

        Raises:
            ValueError, OSError: an image that cannot be read.
        """
        self.paths = {view: self.folder / digest(*(digest(Path(file).read_bytes()) for file in pair)).hex()
                      for view, pair in until(tqdm(files.items(), desc="frozen tower: checking its maps", leave=False,
                                                   disable=None))}
        if len(self.paths) < len(files):
            return False
        view_of = {path: view for view, path in self.paths.items()}  # of equal bytes one entry
        sizes = {path: path.stat().st_size for path in self.root.glob("*/*")}
        missing = {path for path in view_of if sizes.get(path) != self.entry_bytes}
        used = sum(size for path, size in sizes.items() if path not in missing)  # damaged ones are replaced
        need = len(missing) * self.entry_bytes
        if missing and used + need > self.limit:
            print(f"frozen tower: its maps would need {need / 1e9:.1f} GB beside the {used / 1e9:.1f} GB in "
                  f"{self.root}, more than --cache-gb {self.limit / 1e9:g}; the tower runs in every step instead. To "
                  f"make room delete the other subfolders of {self.root}, of other towers (this one's is "
                  f"{self.folder.name}), or raise --cache-gb")
            return False
        paths, device, why = list(view_of), self.tower.mean.device, None
        chunks = [paths[i : i + VIEW_CHUNK] for i in range(0, len(paths), VIEW_CHUNK)][share[0] :: share[1]]
        missing.intersection_update(path for chunk in chunks for path in chunk)
        count = len(missing)
        with (ThreadPoolExecutor(max(1, workers)) as pool, tqdm(
                total=count, desc="frozen tower: computing its maps once", unit="view", disable=not missing) as bar):
            for chunk in until([chunk for chunk in chunks if not missing.isdisjoint(chunk)]):
                arrays = zip(*pool.map(load, [view_of[path] for path in chunk]))
                with torch.no_grad():
                    levels = self.tower.encode(*(torch.from_numpy(np.stack(a)).to(device) for a in arrays))
                try:
                    for i, path in enumerate(chunk):
                        if path in missing:
                            self.write(path, [level[i] for level in levels])
                            missing.remove(path)
                            bar.update()
                except (OSError, OverflowError) as error:  # of the writing alone
                    why = f"its maps cannot be kept in {self.root} ({error}); the tower runs in every step instead"
                    break
        if missing:
            print("frozen tower: " + (why or f"stopped after {count - len(missing)} of {count} maps; these are kept"))
        return not missing
