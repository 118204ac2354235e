"""Open vocabulary: how well each point of a scan fits a text, by a whole CLIP model's own image and text towers.

    clip, tokenizer = load_clip("ViT-B-16", "laion2b_s34b_b88k")
    similarity, seen = search(clip, tokenizer, ["a red armchair", "whiteboard"], points, frames)

Which features stay in CLIP's space: those of the untouched pretrained tower, up to its last layer. BiFusion's own do
not; they come from its first half, go through a trained neck and are mixed with 3D. So this needs the frames and the
pretrained weights, and nothing that was trained here. Dense features of the last layer are taken past its attention,
as values alone (MaskCLIP, Zhou et al. 2022): an attention pool would mix the whole picture into every pixel.

Axes: N points, V views, T texts, E channels of CLIP's common space, H, W image size, h, w map size.
"""

import torch
import torch.nn.functional as F

from fusion import link_views, sample_views
from tower import VIEW_CHUNK, describe, import_open_clip, position_embedding, read_weights, weights_file

POINT_CHUNK = 200_000  # points that are projected at a time
ZOOM = 2  # frames are enlarged for finer maps: an object of a room is small in its frame, a CLIP picture is full of one


def load_clip(name, weights):
    """A whole open_clip model with its text tower, and its tokenizer.

    Args: as tower.build_visual, SCRATCH apart.
    Raises: KeyError and ValueError as there; ValueError where the file holds no text tower.
    """
    about = describe(name, weights)
    path = weights_file(name, weights)
    state = read_weights(path)
    if not any(key.startswith("visual.") for key in state):
        raise ValueError(f"{path} holds an image tower alone; a text needs the whole CLIP model")
    with import_open_clip() as open_clip:
        model, tokenizer = open_clip.create_model(name, quick_gelu=about["quick_gelu"]), open_clip.get_tokenizer(name)
    model.visual.image_mean, model.visual.image_std = about["mean"], about["std"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is no whole CLIP model {name} (image and text tower): "
                         + " ".join(str(error).split())[:200]) from error
    return model.eval(), tokenizer


def dense_features(visual, rgb):
    """(V, 3, H, W) normalised -> (V, E, h, w) in CLIP's common space, not of length 1.

    Raises ValueError for a tower of timm, whose last layers differ from model to model.
    """
    kind = type(visual).__name__
    if kind == "ModifiedResNet":
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(rgb)))))
        pool = visual.attnpool
        return pool.c_proj(pool.v_proj(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (V, E, h, w)
    if kind != "VisionTransformer" or visual.attn_pool is not None:
        raise ValueError(f"texts need a CLIP model of open_clip's own towers, as ViT-B-16 or RN50; this is {kind}")
    x = visual.conv1(rgb)  # (V, C, h, w)
    size = x.shape[-2:]
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)  # (V, 1 + h w, C)
    x = visual.ln_pre(x + position_embedding(visual, size))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    width, weight, bias = x.shape[2], last.attn.in_proj_weight, last.attn.in_proj_bias
    value = F.linear(last.ln_1(x), weight[2 * width:], bias[2 * width:])  # what every token would give to the others
    x = x + last.ls_1(last.attn.out_proj(value))
    x = visual.ln_post(x + last.ls_2(last.mlp(last.ln_2(x)))) @ visual.proj  # (V, 1 + h w, E)
    return x[:, 1:].transpose(1, 2).unflatten(2, size)


@torch.no_grad()
def search(clip, tokenizer, texts, points, frames, tolerance=0.05):
    """Cosine of every point's image feature, mean over the frames that see it, with every text.

    Args:
        clip, tokenizer: of `load_clip`.  texts: list of T str.
        points:          (N, 3) float, metres, world frame, on the device of clip and frames.
        frames:          dict of tensors image (V, 3, H, W) uint8, depth (V, H, W) metres, world_to_camera (V, 4, 4),
                         intrinsics (V, 3, 3).
        tolerance:       metres, as fusion.link_views.

    Returns:
        similarity: (N, T) float in [-1, 1], 0 where no frame sees the point.  seen: (N,) bool.
    """
    device = points.device
    text = clip.encode_text(tokenizer(texts).to(device), normalize=True)  # (T, E)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    depth = frames["depth"]
    height, width = depth.shape[1:]
    cell = clip.visual.patch_size[0] if hasattr(clip.visual, "patch_size") else 32  # pixels of a map's pixel
    size = [-(-side * ZOOM // cell) * cell for side in (height, width)]  # whole cells, so nothing is cropped
    maps = []
    for part in frames["image"].split(VIEW_CHUNK):
        rgb = (F.interpolate(part.float(), size, mode="bilinear", align_corners=False) / 255 - mean) / std
        maps.append(torch.einsum("vehw,te->vthw", F.normalize(dense_features(clip.visual, rgb), dim=1), text))
    maps, found = torch.cat(maps), []
    for part in points.split(POINT_CHUNK):
        links = link_views(part, frames["world_to_camera"], frames["intrinsics"], depth, tolerance)
        found.append(sample_views(maps, links, (width, height), len(part)))
    similarity, seen = zip(*found)
    return torch.cat(similarity), torch.cat(seen)
