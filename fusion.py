"""Points into images and features back: projection, visibility, view sampling, range standardisation, gate, FiLM.

Needs torch only and imports no other file of this project: copy it and it works. The use in short:

    links = link_views(points, world_to_camera, intrinsics, depth)       # which view sees which point, where
    feat_2d, seen = sample_views(feature_maps, links, extent, len(points))
    feat_2d, feat_3d = standardise_2d(feat_2d), standardise_3d(feat_3d)  # Standardise: equal width, equal RMS
    feat_2d, feat_3d = film(feat_2d, feat_3d, coord, normal)             # FiLM: geometry modulates both
    alpha = gate(feat_2d, feat_3d, seen)                                 # SimpleFusion or LiteFusionGate
    fused = blend(feat_2d, feat_3d, alpha)                               # alpha f2d + (1 - alpha) f3d

Axes: N points (voxels), V views, L links (pairs of a point and a view that sees it), C, D channels, H, W image size.
Project the coordinates of the scan itself, never augmented ones: the cameras do not turn with the augmentation. FiLM
reads the augmented ones, as the 3D branch does.

Sources: gate and FiLM as BiFusion defines them; FiLM after Perez et al. (2018); LayerNorm after Ba et al. (2016);
visibility by comparing with a depth map as in BPNet (Hu et al. 2021) and OpenScene (Peng et al. 2023), with z > 0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

DEPTH_TOLERANCE = 0.05  # metres between a point and the depth map, BPNet's value
GEOMETRY_CHANNELS = 16  # of `geometry_code`


class Links(NamedTuple):
    """Every pair of a point and a view that sees it, sorted by point, then by view."""

    point: torch.Tensor  # (L,) int64, row of the point
    view: torch.Tensor  # (L,) int64, index of the view
    uv: torch.Tensor  # (L, 2) float, pixels (column, row); an integer is the centre of a pixel


def project_points(points, world_to_camera, intrinsics):
    """Project world points into one image with a pinhole camera.

    Args:
        points:          (N, 3) float, world frame, metres.
        world_to_camera: (4, 4) float, rigid; camera looks along +z, x right, y down.
        intrinsics:      (3, 3) float, pixels, for the image size in use.

    Returns:
        uv:    (N, 2) float, pixels (column, row), unrounded; may lie outside the image; finite but
               meaningless where depth <= 0.
        depth: (N,) float, metres along +z.

    Raises: ValueError: points is not (N, 3).
    Source: pinhole model, Hartley & Zisserman (2004), ch. 6.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be (N, 3), got {tuple(points.shape)}")
    camera = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]  # (N, 3) camera frame
    depth = camera[:, 2]
    z = torch.where(depth > 0, depth, torch.ones_like(depth)).clamp(min=1e-6)
    uv = (camera @ intrinsics.T)[:, :2] / z[:, None]  # (N, 2)
    return uv, depth


@torch.no_grad()
def link_views(points, world_to_camera, intrinsics, depth=None, *, image_size=None, point_batch=None, view_batch=None,
               tolerance=DEPTH_TOLERANCE):
    """Find every view that sees a point: in front of the camera, inside the image, agreeing with the depth map.

    Args:
        points:          (N, 3) float, world frame, metres, NOT augmented. One that is not finite is unseen.
        world_to_camera: (V, 4, 4) float.  intrinsics: (V, 3, 3) float, pixels, for the depth maps' size.
        depth:           (V, H, W) float, metres along +z, 0 = no reading (the point counts as unseen). None: no depth
                         is known, nothing hides a point, and image_size is (W, H).
        point_batch, view_batch: (N,) and (V,) int, the scene of each; a view sees its own scene alone. None: all one.
        tolerance:       metres by which a point may differ from the depth map.

    Returns: Links. No view or no visible point gives empty links.
    Raises: ValueError: shapes that do not fit each other, or neither depth nor image_size.
    """
    if depth is None and image_size is None:
        raise ValueError("link_views needs depth maps, or image_size=(W, H) where there are none")
    views = len(world_to_camera if depth is None else depth)
    if world_to_camera.shape != (views, 4, 4) or intrinsics.shape != (views, 3, 3):
        raise ValueError(f"{views} {'cameras' if depth is None else 'depth maps'} need world_to_camera ({views}, 4, 4) "
                         f"and intrinsics ({views}, 3, 3), got {(*world_to_camera.shape,)} and {(*intrinsics.shape,)}")
    if (point_batch is None) != (view_batch is None):
        raise ValueError("point_batch and view_batch belong together: give both or neither")
    size = points.new_tensor(image_size if depth is None else depth.shape[:0:-1])  # (W, H)
    everyone = torch.arange(len(points), device=points.device)
    found = [(everyone[:0], everyone[:0], points.new_zeros(0, 2))]
    for view in range(views):
        point = everyone if view_batch is None else (point_batch == view_batch[view]).nonzero().squeeze(1)
        with torch.autocast(points.device.type, enabled=False):  # a pixel needs full precision
            uv, z = project_points(points[point], world_to_camera[view], intrinsics[view])
        # a pixel reaches half a pixel around its centre
        inside = ((z > 0) & ((uv >= -0.5) & (uv < size - 0.5)).all(1)).nonzero().squeeze(1)
        point, uv, z = point[inside], uv[inside], z[inside]
        if depth is not None:
            column, row = uv.round().long().unbind(1)
            reading = depth[view, row, column]
            agrees = (reading > 0) & ((reading - z).abs() <= tolerance)
            point, uv = point[agrees], uv[agrees]
        if len(point):  # else what is kept, though empty, would scatter over the heap and hold it open
            found.append((point, torch.full_like(point, view), uv))
    point, view, uv = (torch.cat(values) for values in zip(*found))
    order = point.argsort(stable=True)  # the views of a point stay in order
    return Links(point[order], view[order], uv[order])


def sample_views(feature_maps, links, extent, num_points):
    """Bring image features to the points: bilinear in every view that sees a point, then the mean over its views.

    The whole is one product of a sparse matrix (4 corners a link) with the maps; no (V, N, C) tensor is made.

    Args:
        feature_maps: (V, C, h, w) float; may be coarser than the image.
        links:        Links; their uv counts the pixels of the images.
        extent:       (W, H), the pixels that a map covers from the image's upper left corner on: the image's size, or
                      more where a tower pads the image to a multiple of its stride.
        num_points:   N.

    Returns: feat_2d (N, C) float, 0 where no view sees the point, differentiable in feature_maps; seen (N,) bool.
    """
    _, channels, h, w = feature_maps.shape
    count = torch.bincount(links.point, minlength=num_points)  # (N,) views that see the point
    position = (links.uv + 0.5) * links.uv.new_tensor([w / extent[0], h / extent[1]]) - 0.5  # (L, 2) in map pixels
    position = position.clamp(min=0).minimum(position.new_tensor([w - 1, h - 1]))  # the border repeats outside
    column, row = position.long().unbind(1)
    right, below = (column + 1).clamp(max=w - 1), (row + 1).clamp(max=h - 1)
    upper, lower = (links.view * (h * w) + y * w for y in (row, below))
    index = torch.stack([upper + column, upper + right, lower + column, lower + right], 1)  # (L, 4)
    fx, fy = position.frac().unbind(1)
    weight = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], 1)  # (L, 4)
    weight = weight / count[links.point].to(weight.dtype)[:, None]
    table = feature_maps.permute(0, 2, 3, 1).reshape(-1, channels)  # (V*h*w, C)
    offsets = F.pad(4 * count.cumsum(0), (1, 0))  # (N + 1,) links are sorted by point, so each point is one bag
    feat_2d = F.embedding_bag(index.view(-1), table, offsets, mode="sum", include_last_offset=True,
                              per_sample_weights=weight.view(-1).to(table.dtype))
    return feat_2d, count > 0


class Standardise(nn.Module):
    """Range standardisation: Linear + LayerNorm, so both branches enter the fusion with one width and RMS 1.

    Neither part has a bias or a scale to learn, so the output is the same for x and for 1000 x, and no branch can grow
    over the other during training. eps is small enough to hold from input scales of 1e-4 on.
    forward: (N, in_channels) float -> (N, dim) float of RMS 1 a row; rows of zeros stay zero.
    """

    def __init__(self, in_channels, dim):
        super().__init__()
        self.linear = nn.Linear(in_channels, dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-10, elementwise_affine=False)

    def forward(self, feat):
        if feat.shape[-1] != self.linear.in_features:
            raise ValueError(f"features have {feat.shape[-1]} channels, expected {self.linear.in_features}; "
                             "build Standardise with the branch's own width")
        return self.norm(self.linear(feat))


class SimpleFusion(nn.Module):
    """The gate that starts simple: alpha = 0.5 wherever a view sees the voxel, 0 elsewhere. Nothing to learn."""

    def forward(self, feat_2d, feat_3d, seen):
        """(N, D), (N, D), (N,) bool -> alpha (N,) float."""
        return 0.5 * seen.to(feat_3d.dtype)


def mlp_from_zero(in_channels, hidden, out_channels):
    """Two layers, the last of which starts at zero, so what it steers starts as if it were not there."""
    mlp = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, out_channels))
    nn.init.zeros_(mlp[-1].weight)
    nn.init.zeros_(mlp[-1].bias)
    return mlp


class LiteFusionGate(nn.Module):
    """alpha = sigmoid(MLP([feat_2d, feat_3d]: 2 D -> 64 -> 1)), 0 where no view sees the voxel; at the start exactly
    SimpleFusion's 0.5, so switching over changes nothing."""

    def __init__(self, dim, hidden=64):
        super().__init__()
        self.mlp = mlp_from_zero(2 * dim, hidden, 1)

    def forward(self, feat_2d, feat_3d, seen):
        """(N, D), (N, D), (N,) bool -> alpha (N,) float in [0, 1]."""
        first, relu, last = self.mlp
        weight_2d, weight_3d = first.weight.chunk(2, 1)  # (hidden, D) each: as one product, without an (N, 2 D) copy
        hidden = F.linear(feat_2d, weight_2d, first.bias) + F.linear(feat_3d, weight_3d)  # (N, hidden)
        logit = last(relu(hidden)).squeeze(1)  # (N,)
        return torch.sigmoid(logit) * seen.to(logit.dtype)


class FiLM(nn.Module):
    """(1 + gamma) f + beta on both branches, gamma and beta (N, D) from the geometry of the voxel. Starts as identity.

    Conditioned on geometry alone: a FiLM that reads the other branch is a way round the gate. The same modulation for
    both branches: geometry tells how to read a feature, wherever it came from. The code is coarse on purpose
    (wavelengths of 4 and 8 m in the plane): one fine enough to name a place learns the training rooms by heart.
    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
    """

    def __init__(self, dim, hidden=64):
        super().__init__()
        self.mlp = mlp_from_zero(GEOMETRY_CHANNELS, hidden, 2 * dim)

    def forward(self, feat_2d, feat_3d, coord, normal):
        """Modulate both branches, (N, D) each, alike; rows of feat_2d that no view sees get a value too.

        Args: coord (N, 3) metres, xy from the middle of the scene, z above the floor, augmented as the 3D branch sees
            it, unlike the world coordinates that link_views takes; normal (N, 3) unit, 0 where unknown.
        """
        gamma, beta = self.mlp(geometry_code(coord, normal)).chunk(2, 1)  # (N, D) each
        scale = 1 + gamma
        return (scale * feat_2d).add_(beta), (scale * feat_3d).add_(beta)  # in place: one (N, D) less each


def geometry_code(coord, normal):
    """coord, normal as in FiLM.forward -> (N, GEOMETRY_CHANNELS) of order 1: normal (3), height (1), sin and cos of x
    and y at wavelengths of 8 and 4 m and of the height at 4 and 2 m (12)."""
    turns = coord.new_tensor([[1 / 8, 1 / 8, 1 / 4], [1 / 4, 1 / 4, 1 / 2]])  # (2, 3) turns a metre
    angle = (2 * torch.pi * coord[:, None] * turns).flatten(1)  # (N, 6)
    return torch.cat([normal, coord[:, 2:], angle.sin(), angle.cos()], 1)


def blend(feat_2d, feat_3d, alpha):
    """fused = alpha feat_2d + (1 - alpha) feat_3d; (N, D), (N, D), (N,) -> (N, D). alpha 0 gives feat_3d exactly."""
    return torch.lerp(feat_3d, feat_2d, alpha[:, None].to(feat_3d.dtype))  # under autocast a gate gives less precision


@torch.no_grad()
def fusion_stats(feat_2d, feat_3d, alpha, seen):
    """What to watch in a fusion, dict of floats over the voxels that a view sees, None where there is none:
    fusion_2d_ratio (mean alpha), rms_2d, rms_3d, cosine (mean between the branches); and seen_share (of all voxels)."""
    feat_2d, feat_3d = feat_2d[seen].float(), feat_3d[seen].float()
    rows = (alpha[seen].float(), feat_2d.square().mean(1), feat_3d.square().mean(1),
            F.cosine_similarity(feat_2d, feat_3d))  # (seen voxels,) each
    share, ratio, square_2d, square_3d, cosine = torch.stack([x.mean() for x in (seen.float(), *rows)]).tolist()
    stats = {"fusion_2d_ratio": ratio, "rms_2d": square_2d**0.5, "rms_3d": square_3d**0.5, "cosine": cosine}
    return {"seen_share": share if len(seen) else None} | (stats if share > 0 else dict.fromkeys(stats))
