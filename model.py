"""The networks: SparseUNet, ClipTower, QueryDecoder, and Baseline3D and BiFusion put together from them; PRESETS.

    Baseline3D   voxels -> SparseUNet -> Standardise -> semantic head; superpoint means -> QueryDecoder -> instances
    BiFusion     the same, and frames -> ClipTower -> sampled at the voxels -> Standardise; FiLM, gate, blend -> heads

BiFusion is a Baseline3D: with its 2D branch off (fusion "identity") it computes exactly what Baseline3D computes.
Axes: M voxels of all scenes of a batch, V views of all scenes, S superpoints, Q queries, P predicted instances,
C, D channels, K classes, H, W image size.

Sources: U-Net layout of SpUNet-v1m1 (Pointcept), the spconv form of Mask3D's Res16UNet34C (Schult et al. 2023) after
MinkowskiNet (Choy et al. 2019); decoder after SPFormer (Sun et al. 2023) and OneFormer3D (Kolodiazhnyi et al. 2024);
matrix NMS of SOLOv2 (Wang et al. 2020).
"""

import functools
import importlib.util
import logging

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix, triu
from scipy.sparse.csgraph import connected_components
from torch import nn

from fusion import FiLM, LiteFusionGate, SimpleFusion, Standardise, blend, fusion_stats, link_views, sample_views
from stages import CURRICULUM
from tower import LITE0, SCRATCH, ClipTower, autocast, build_visual

IN_CHANNELS = 6  # colour and normal of a voxel
MAX_QUERIES = 4000  # of a scene; queries times superpoints are never more than its square, however many superpoints

PRESETS = {
    "small": {
        "unet": {"stem": 24, "encoder": (32, 48, 64), "encoder_blocks": (1, 1, 1),
                 "decoder": (64, 48, 32), "decoder_blocks": (1, 1, 1), "bn_momentum": 0.1},
        "dim": 64, "decoder": {"dim": 64, "hidden": 256, "layers": 3, "heads": 4},
        "tower": LITE0[0], "tower_weights": LITE0[1],
    },
    "base": {
        "unet": {"stem": 32, "encoder": (32, 64, 128, 256), "encoder_blocks": (2, 3, 4, 6),
                 "decoder": (256, 128, 96, 96), "decoder_blocks": (2, 2, 2, 2)},
        "dim": 256, "decoder": {"dim": 192, "hidden": 768, "layers": 3, "heads": 8},
        "tower": "ViT-B-16", "tower_weights": "laion2b_s34b_b88k",
    },
}


@functools.cache
def import_spconv():
    """spconv.pytorch without the warning that torch.fx logs at its first import; or spconv_triton.pytorch, of the same
    classes and weights, where it is installed and there is a GPU or no spconv. Without a GPU it does not describe its
    CUDA kernels, which takes seconds."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    triton = importlib.util.find_spec("spconv_triton")
    if triton and (torch.cuda.is_available() or not importlib.util.find_spec("spconv")):
        print("sparse convolutions by spconv-triton, because it is installed; its kernels compile first, for minutes")
        return importlib.import_module("spconv_triton.pytorch")
    if not torch.cuda.is_available():
        core = importlib.import_module("spconv.core")
        core.ALL_NATIVE_PARAMS, core.ALL_IMPGEMM_PARAMS = [], []
    return importlib.import_module("spconv.pytorch")


class VoxelBatchNorm(nn.BatchNorm1d):
    """BatchNorm over voxels that also trains on a level of a single voxel, by its running statistics."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)

    def forward(self, feat):
        if self.training and len(feat) < 2:
            return F.batch_norm(feat, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(feat)


class SparseBlock(nn.Module):
    """Residual block: SubM3 - BN - ReLU - SubM3 - BN, plus the input (1x1 + BN where the widths differ), ReLU."""

    def __init__(self, in_channels, channels, level):
        super().__init__()
        key = {"bias": False, "indice_key": f"level{level}"}  # convolutions of one level share their neighbour table
        self.conv1 = import_spconv().SubMConv3d(in_channels, channels, 3, **key)
        self.bn1 = VoxelBatchNorm(channels)
        self.conv2 = import_spconv().SubMConv3d(channels, channels, 3, **key)
        self.bn2 = VoxelBatchNorm(channels)
        self.project = nn.Identity() if in_channels == channels else nn.Sequential(
            nn.Linear(in_channels, channels, bias=False), VoxelBatchNorm(channels))

    def forward(self, x):
        residual = self.project(x.features)
        x = self.conv1(x)
        x = self.conv2(x.replace_feature(self.bn1(x.features).relu_()))  # in place: no backward needs what was there
        return x.replace_feature(self.bn2(x.features).add_(residual).relu_())


class SparseUNet(nn.Module):
    """Sparse residual U-Net on voxels; all its sparse convolutions are bias-free.

    Stem SubM 5^3; a level down is a strided convolution 2^3 and residual blocks; a level up is the inverse convolution,
    the skip of that level concatenated, residual blocks.

    Args: in_channels of a voxel; stem, its width; encoder, encoder_blocks, width and blocks of each level, fine to
        coarse; decoder, decoder_blocks, the same on the way up; bn_momentum, 0.01 looks back over some 100 steps.
    """

    def __init__(self, in_channels, stem, encoder, encoder_blocks, decoder, decoder_blocks, bn_momentum=0.01):
        super().__init__()
        spconv = import_spconv()
        self.levels, self.out_channels = len(encoder), decoder[-1]
        self.stem = spconv.SubMConv3d(in_channels, stem, 5, bias=False, indice_key="stem")
        self.stem_bn = VoxelBatchNorm(stem)
        self.down, self.down_bn, self.encoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.up, self.up_bn, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        widths = (stem, *encoder)
        for level in range(self.levels):
            channels = encoder[level]
            self.down.append(spconv.SparseConv3d(widths[level], channels, 2, 2, bias=False, indice_key=f"down{level}"))
            self.down_bn.append(VoxelBatchNorm(channels))
            self.encoder.append(nn.Sequential(*(SparseBlock(channels, channels, level + 1)
                                                for _ in range(encoder_blocks[level]))))
        for width, blocks, level in zip(decoder, decoder_blocks, reversed(range(self.levels))):
            self.up.append(spconv.SparseInverseConv3d(channels, width, 2, bias=False, indice_key=f"down{level}"))
            self.up_bn.append(VoxelBatchNorm(width))
            self.decoder.append(nn.Sequential(*(SparseBlock(width + widths[level] if b == 0 else width, width, level)
                                                for b in range(blocks))))
            channels = width
        for norm in (m for m in self.modules() if isinstance(m, VoxelBatchNorm)):
            norm.momentum = bn_momentum
        self.convs = [(m, m.algo) for m in self.modules() if hasattr(m, "indice_key")]  # spconv's choice for CUDA

    def forward(self, feat, grid_coord, batch_index, num_scenes):
        """(M, in_channels), (M, 3) int >= 0, (M,) int, B -> (M, out_channels)."""
        spconv = import_spconv()
        if not feat.is_cuda and "triton" in spconv.__name__:
            raise ValueError("spconv-triton computes on a GPU alone: give --device cuda, or uninstall it")
        for conv, default in self.convs:
            conv.algo = default if feat.is_cuda else spconv.ConvAlgo.Native  # spconv has one algorithm on CPU
        step = 2**self.levels  # a strided convolution drops what lies beyond the last whole cell
        shape = [(extent // step + 1) * step for extent in grid_coord.amax(0).tolist()]
        indices = torch.cat([batch_index[:, None].int(), grid_coord.int()], 1).contiguous()  # (M, 4)
        x = self.stem(spconv.SparseConvTensor(feat, indices, shape, num_scenes))
        x = x.replace_feature(self.stem_bn(x.features).relu_())
        skips = []
        for down, bn, blocks in zip(self.down, self.down_bn, self.encoder):
            skips.append(x.features)
            x = down(x)
            x = blocks(x.replace_feature(bn(x.features).relu_()))
        for up, bn, blocks in zip(self.up, self.up_bn, self.decoder):
            x = up(x)
            x = blocks(x.replace_feature(torch.cat([bn(x.features).relu_(), skips.pop()], 1)))
        return x.features  # (M, out_channels)


def superpoint_means(feat, batch):
    """(M, D) -> (S, D): the mean over a superpoint's points, each with the feature of its voxel."""
    count, points = len(batch["superpoint_batch"]), batch["piece_points"][:, None]
    total, size = (x.new_zeros(count, x.shape[1]).index_add(0, batch["piece_superpoint"], x)
                   for x in (feat[batch["piece_voxel"]] * points, points))  # (S, D), (S, 1)
    return total / size


def mlp(in_channels, hidden, out_channels):
    return nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, out_channels))


class Attention(nn.Module):
    """Multi-head attention of queries (Q, C) on keys (S, C), where allowed (Q, S) bool is True, residual, LayerNorm.
    Queries and keys are normalised in each head (Dehghani et al. 2023, arXiv 2302.05442), so that no learning rate
    makes its logits grow without bound."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_query, self.to_key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.query_norm, self.key_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.out, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, query, keys, allowed=None):
        q = self.query_norm(self.to_query(query).unflatten(1, (self.heads, -1))).transpose(0, 1)  # (h, Q, C/h)
        k, v = self.to_key_value(keys).unflatten(1, (2, self.heads, -1)).permute(1, 2, 0, 3)  # (h, S, C/h) each
        k = self.key_norm(k)
        x = F.scaled_dot_product_attention(q[None], k[None], v[None], allowed)[0]  # (h, Q, C/h); fused: no (h, Q, S)
        return self.norm(query + self.out(x.transpose(0, 1).flatten(1)))


class QueryDecoder(nn.Module):
    """Instances of a scene from the features of its superpoints: every query becomes one class, mask and score.

    A layer is masked cross-attention to the superpoints, self-attention among the queries, a feed-forward network, each
    with residual and LayerNorm after it. A query looks only at the superpoints that its mask of the layer before holds;
    at all where it holds none. In training a random share of superpoints, U(0.5, 1), become queries, else all; both as
    far as MAX_QUERIES allows.

    Args: in_channels, D of the superpoints; dim, width C; hidden, of the feed-forward network; num_classes, K.
    """

    def __init__(self, in_channels, dim, hidden, layers, heads, num_classes):
        super().__init__()
        self.to_key = nn.Sequential(nn.Linear(in_channels, dim), nn.LayerNorm(dim))
        self.to_query = mlp(in_channels, dim, dim)
        self.to_mask = mlp(in_channels, dim, dim)
        self.cross, self.own = (nn.ModuleList(Attention(dim, heads) for _ in range(layers)) for _ in range(2))
        self.feed = nn.ModuleList(nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
                                  for _ in range(layers))
        self.feed_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.class_head = mlp(dim, dim, num_classes + 1)
        self.score_head = mlp(dim, dim, 1)

    def forward(self, superpoint):
        """(S, D) of ONE scene -> predictions of the untouched queries and after each layer, layers + 1 in all; in
        evaluation the last alone. Each a dict of class_logits (Q, K + 1), the last "no object"; mask_logits (Q, S);
        score (Q,), the IoU that the mask claims; origin (Q,) int64, the superpoint that each query was made from."""
        keys, masks = self.to_key(superpoint), self.to_mask(superpoint)  # (S, C)
        origin = self.choose_queries(len(superpoint)).to(superpoint.device)  # (Q,)
        query = self.to_query(superpoint[origin])  # (Q, C)
        predictions = [self.predict(query, masks)]
        for cross, own, feed, norm in zip(self.cross, self.own, self.feed, self.feed_norm):
            allowed = predictions[-1]["mask_logits"].detach() >= 0  # (Q, S)
            allowed = allowed | ~allowed.any(1, keepdim=True)
            query = cross(query, keys, allowed)
            query = own(query, query)
            query = norm(query + feed(query))
            predictions = [*(predictions if self.training else ()), self.predict(query, masks)]
        return [prediction | {"origin": origin} for prediction in predictions]

    def choose_queries(self, count):
        """The superpoints, out of count, that become queries: (Q,) int64 on the CPU."""
        most = max(1, min(count, MAX_QUERIES**2 // count))
        if not self.training:
            return torch.arange(most) * count // most  # all, or evenly spread
        share = 0.5 + 0.5 * torch.rand(()).item()
        return torch.randperm(count)[: min(most, max(1, round(share * count)))]

    def predict(self, query, masks):
        """(Q, C), (S, C) -> one prediction of `forward`, origin apart."""
        query = self.norm(query)
        return {"class_logits": self.class_head(query), "mask_logits": query @ masks.T,
                "score": self.score_head(query).squeeze(1)}


def superpoint_graph(batch):
    """Which superpoints of a batch touch: (S, S) scipy.sparse, not 0 where two have points in one block of 2^3 voxels;
    of two sets of blocks, one shifted by a voxel, so that voxels with a common face always share one."""
    voxel, superpoint = batch["piece_voxel"], batch["piece_superpoint"]
    place = torch.cat([2 * batch["batch_index"][:, None], batch["grid_coord"].long()], 1)[voxel]  # (L, 4)
    edges = torch.tensor([1, 2, 2, 2], device=place.device)
    block = torch.cat([(place + shift) // edges for shift in (0, 1)])  # (2L, 4)
    block = block.unique(dim=0, return_inverse=True)[1].cpu().numpy()
    shape = (len(batch["superpoint_batch"]), block.max() + 1)
    inside = coo_matrix((np.ones(len(block), np.float32), (superpoint.repeat(2).cpu().numpy(), block)), shape).tocsr()
    return inside @ inside.T


def largest_pieces(masks, graph, sizes):
    """Cut masks (P, S) bool to their largest connected piece, in points, the first of several; graph of
    `superpoint_graph`, sizes (S,)."""
    graph, sizes, some = triu(graph, 1), sizes.cpu().numpy(), max(1, 2**16 // len(sizes))  # at a time: little memory
    cut = [_largest_pieces(part.numpy(), graph, sizes) for part in masks.cpu().split(some)]
    return torch.from_numpy(np.concatenate(cut)).to(masks.device)


def _largest_pieces(masks, graph, sizes):
    """`largest_pieces` of arrays, by one graph whose nodes are pairs of mask and superpoint."""
    row, edge = np.nonzero(masks[:, graph.row] & masks[:, graph.col])  # within a mask
    ends = (row * masks.shape[1] + end[edge] for end in (graph.row, graph.col))
    inside = coo_matrix((np.ones(len(row), bool), tuple(ends)), (masks.size, masks.size))
    piece = connected_components(inside, directed=False)[1]
    points = np.bincount(piece, (masks * sizes).ravel(), 1)[piece].reshape(masks.shape)
    piece = piece.reshape(masks.shape)
    best = np.where(masks, points, -1).argmax(1)
    return masks & (piece == np.take_along_axis(piece, best[:, None], 1))


@torch.no_grad()
def select_instances(prediction, sizes, graph=None, top_k=None, min_points=100):
    """The instances of a scene out of the last prediction of its queries; sizes (S,) float, points of a superpoint.

    With a graph (`superpoint_graph`) every mask is cut to its largest connected piece: without positions a query cannot
    tell two like objects apart (Mask3D splits its masks by DBSCAN). The top_k pairs of query and class with the largest
    p(class) * claimed IoU are kept (None: half as many as superpoints, but 100 or more); that times the mean
    p(superpoint) over the mask is their score. Then matrix NMS lowers the score of whatever overlaps a better one of
    its class: by the least of (1 - IoU with a better one) / (1 - that one's own largest IoU with a still better one),
    IoU in points.

    Returns: masks (P, S) bool of min_points or more, labels (P,) int64, scores (P,) in 0..1, best first; P may be 0.
    """
    probability = prediction["class_logits"].float().softmax(1)[:, :-1]  # (Q, K)
    probability = (probability * prediction["score"].float().clamp(0, 1)[:, None]).nan_to_num(0)
    top_k = top_k or max(100, len(sizes) // 2)
    score, pair = probability.flatten().topk(min(top_k, probability.numel()))  # (k,)
    query, label = pair // probability.shape[1], pair % probability.shape[1]
    logits = prediction["mask_logits"].float()[query]  # (k, S)
    masks = logits > 0 if graph is None else largest_pieces(logits > 0, graph, sizes)
    score = score * (logits.sigmoid() * masks).sum(1) / masks.sum(1).clamp(min=1)
    order = score.argsort(descending=True, stable=True)
    score, label, masks = score[order], label[order], masks[order]
    points = (masks * sizes).sum(1)  # (k,)
    overlap = (masks * sizes) @ masks.T.to(sizes.dtype)  # (k, k)
    iou = overlap / (points[:, None] + points - overlap).clamp(min=1)
    iou = (iou * (label[:, None] == label)).triu(1)  # [i, j]: i is better than j
    decay = ((1 - iou) / (1 - iou.amax(0)[:, None]).clamp(min=1e-6)).amin(0)  # (k,)
    score = score * decay.clamp(max=1)
    order = score.argsort(descending=True, stable=True)
    order = order[((score > 0) & (points >= min_points))[order]]
    return masks[order], label[order], score[order]


def instances_of_scene(prediction, batch, i):
    """Scene i of a batch, nearly as InstanceAP.add takes it (there a class is one more, 0 is void): gt (N,), masks
    (P, N) bool, labels (P,) class index, scores (P,)."""
    rows, points = (batch["superpoint_batch"] == i).nonzero()[:, 0], batch["point_batch"] == i
    superpoint = batch["point_superpoint"][points] - rows[0]  # (N,) row of the scene's own superpoints
    graph = superpoint_graph(batch)[rows.cpu().numpy()][:, rows.cpu().numpy()]
    masks, *found = select_instances(prediction, superpoint.bincount(minlength=len(rows)).float(), graph)
    return batch["point_instance"][points], masks[:, superpoint], *found


class Baseline3D(nn.Module):
    """The 3D baseline: sparse U-Net, standardisation, semantic head, query decoder (of D = dim)."""

    def __init__(self, unet, decoder, dim, num_classes):
        super().__init__()
        self.unet = unet
        self.standardise_3d = Standardise(unet.out_channels, dim)
        # of what head and decoder read: a step of Adam, about as long as the rate, moves a logit by the gain times that
        self.register_buffer("gain", torch.tensor(4.0))
        self.semantic_head = nn.Linear(dim, num_classes)
        self.decoder = decoder
        self.row, self.ramp = CURRICULUM[-1], 1.0  # what is on; stages.apply_row gives it another
        self.precision = "fp32"  # of the decoder; "bf16" runs its matrix products in bfloat16

    def forward(self, batch):
        """Segment a batch of scenes.

        Args: batch, dict as data.collate makes it: names list of B str, grid_coord (M, 3) int, batch_index (M,) int64,
            color (M, 3), normal (M, 3), superpoint_batch, piece_voxel, piece_superpoint, piece_points.
        Returns: dict of logits (M, K), feat_3d (M, D) and, once the decoder is on, instances: list of B, one a scene,
            of what QueryDecoder.forward returns.
        """
        feat_3d = self.encode_3d(batch)
        return {"feat_3d": feat_3d} | self.segment(feat_3d, batch)

    def segment(self, feat, batch):
        """(M, D) -> logits of the voxels and instances of the scenes, as `forward` returns them."""
        feat = self.gain * feat
        out = {"logits": self.semantic_head(feat)}
        if "decoder" in self.row.trains:
            superpoint, scene = superpoint_means(feat, batch), batch["superpoint_batch"]
            with autocast(feat, self.precision):
                out["instances"] = [self.decoder(superpoint[scene == i]) for i in range(len(batch["names"]))]
        return out

    def encode_3d(self, batch):
        """-> feat_3d (M, D) of RMS 1."""
        feat = torch.cat([batch["color"], batch["normal"]], 1)  # (M, 6)
        return self.standardise_3d(self.unet(feat, batch["grid_coord"], batch["batch_index"], len(batch["names"])))

    def parts(self):
        """Parameters by part of stages.PARTS, each in exactly one."""
        return {"3d": [*self.unet.parameters(), *self.standardise_3d.parameters(), *self.semantic_head.parameters()],
                "decoder": list(self.decoder.parameters())}


class BiFusion(Baseline3D):
    """Baseline3D with an image tower, FiLM and a gate. `row` and `ramp` say what is on (stages.apply_row)."""

    blend = staticmethod(blend)  # experiments put others in its place

    def __init__(self, unet, tower, decoder, dim, num_classes, depth_tolerance):
        super().__init__(unet, decoder, dim, num_classes)
        self.tower, self.depth_tolerance = tower, depth_tolerance
        self.standardise_2d = Standardise(tower.out_channels, dim)
        self.film = FiLM(dim)
        self.gates = nn.ModuleDict({"simple": SimpleFusion(), "learned": LiteFusionGate(dim)})

    def forward(self, batch):
        """Segment a batch of scenes from voxels and frames.

        Args: batch, as Baseline3D, and coord (M, 3) and world_coord (M, 3) metres, image (V, 3, H, W) uint8, depth
            (V, H, W) metres, world_to_camera (V, 4, 4), intrinsics (V, 3, 3), view_batch (V,) int64; in place of the
            image it may hold level_0, level_1, ... (V, C, h, w), what a frozen tower's encode gives for it
            (tower.MapCache). FiLM reads coord, which is augmented as the 3D branch sees it; frames are linked by
            world_coord, which is not. whole (B,) bool, where there, is False for a scene that data.py has blanked.
        Returns: dict as Baseline3D; with a fusion other than "identity" also feat_2d (M, D), seen (M,) bool, alpha
            (M,), stats (fusion.fusion_stats). Scenes that are not whole count as unseen in seen and are left out of
            stats: alignment and gate prior pass them by.
        """
        row, feat_3d = self.row, self.encode_3d(batch)
        if row.fusion == "identity":
            return {"feat_3d": feat_3d} | self.segment(feat_3d, batch)
        feat_2d, seen = self.encode_2d(batch)
        out = {"feat_3d": feat_3d, "feat_2d": feat_2d, "seen": seen}
        if row.film:
            feat_2d, feat_3d = self.film(feat_2d, feat_3d, batch["coord"], batch["normal"])
        out["alpha"] = alpha = self.ramp * self.gates[row.fusion](feat_2d, feat_3d, seen)  # (M,)
        fused = self.blend(feat_2d, feat_3d, alpha)  # (M, D)
        whole = batch.get("whole") if self.training and row.blank else None  # (B,), False = blanked by data.py
        rows = slice(None) if whole is None else whole[batch["batch_index"]]  # (M,)
        out["stats"] = fusion_stats(feat_2d[rows], feat_3d[rows], alpha[rows], seen[rows])
        if whole is not None:
            out["seen"] = seen & rows
        return out | self.segment(fused, batch)

    def encode_2d(self, batch):
        """-> feat_2d (M, D) of RMS 1 where seen, else 0; seen (M,) bool."""
        depth, voxels = batch["depth"], batch["world_coord"]
        feat_2d = voxels.new_zeros(len(voxels), self.tower.out_channels)
        seen = voxels.new_zeros(len(voxels), dtype=torch.bool)
        if len(depth):
            levels = [batch[key] for key in sorted(batch) if key.startswith("level_")]
            maps = self.tower(batch["image"], depth, levels)  # (V, C, h, w)
            extent = [side * self.tower.stride for side in maps.shape[:1:-1]]  # (W, H), padding included
            links = link_views(voxels, batch["world_to_camera"], batch["intrinsics"], depth,
                               point_batch=batch["batch_index"], view_batch=batch["view_batch"],
                               tolerance=self.depth_tolerance)
            feat_2d, seen = sample_views(maps, links, extent, len(voxels))
        return self.standardise_2d(feat_2d), seen

    def parts(self):
        """Parameters by part of stages.PARTS, each in exactly one."""
        parts = super().parts() | self.tower.parts()
        parts["2d"] = [*parts["2d"], *self.standardise_2d.parameters()]
        return parts | {"gate": list(self.gates.parameters()), "film": list(self.film.parameters())}

    def train(self, mode=True):
        """As nn.Module.train, but the batch norms of a pretrained tower keep its statistics, also where it trains: by
        those of a batch of two rooms the val mIoU of single epochs collapsed."""
        super().train(mode)
        if self.tower.pretrained:
            self.tower.visual.eval()
        return self


def build_model(name, preset, num_classes, depth_tolerance=0.05, tower=None, tower_weights=None, load=True):
    """Build "baseline" or "bifusion" (name) in a preset (a key of PRESETS) for num_classes.

    Args: depth_tolerance, metres by which a voxel may differ from a depth map and count as seen; tower, tower_weights,
        load, name and weights of the image tower, None = the preset's, and whether to load them (tower.build_visual).
    Raises: KeyError: unknown name or preset.  ValueError: unknown tower, weights that cannot be had or do not fit.
    """
    for kind, given, choices in (("preset", preset, PRESETS), ("model", name, ("baseline", "bifusion"))):
        if given not in choices:
            raise KeyError(f"unknown {kind} {given!r}; choose from {sorted(choices)}")
    sizes = PRESETS[preset]
    unet = SparseUNet(IN_CHANNELS, **sizes["unet"])
    decoder = QueryDecoder(sizes["dim"], num_classes=num_classes, **sizes["decoder"])
    if name == "baseline":
        return Baseline3D(unet, decoder, sizes["dim"], num_classes)
    weights = tower_weights or sizes["tower_weights"]
    with torch.random.fork_rng(devices=[]):  # so the 3D part starts from the same weights as the baseline's
        visual, mean, std = build_visual(tower or sizes["tower"], weights, load)
        clip_tower = ClipTower(visual, sizes["dim"], mean, std, pretrained=weights != SCRATCH)
    return BiFusion(unet, clip_tower, decoder, sizes["dim"], num_classes, depth_tolerance)
