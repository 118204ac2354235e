"""The scene folder: reading it, voxels, augmentation, superpoints from points, batches.

    <root>/{train,val,test}/<scene>/
      coord.npy (N,3) m   color.npy (N,3) 0..255   normal.npy (N,3), optional
      segment20.npy (N,) -1 = ignore   instance.npy (N,) -1 = none   superpoint.npy (N,), all three optional
      color/{i}.jpg  depth/{i}.png (u16 mm, 0 = none)  pose/{i}.txt (camera_to_world)
      intrinsic/intrinsic_color.txt

This is the layout of a ScanNet prepared by Pointcept, plus frames as ScanNet exports them; a folder without frames is a
valid 3D-only scene, one without labels can be predicted but not trained on.

The camera and the augmentation: voxels are made from augmented coordinates, and every voxel keeps `world_coord`, the
mean of its points' unaugmented coordinates. Only world_coord is ever projected. Images change in colour alone.

Axes: N points, M voxels, V views, S superpoints, G instances, L pieces (the points that a voxel and a superpoint
share), K classes, H, W image size.
"""

import signal
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates, uniform_filter1d

from scenes.folder import IGNORE, NUM_CLASSES, STUFF, load_frames, load_scene
from scenes.points import complete, voxel_majority, voxel_means, voxelise

MAX_WARP_CELLS = 20_000_000  # of the elastic warp's noise grid, 12 bytes each: 160 000 cubic metres
CACHE_BYTES = 2**30  # decoded scenes and frames that a loading process keeps

# -------------------------------------------------------------------------------------------------------- augmentation
# Each takes what it changes and a numpy Generator and returns new arrays; coord is (N, 3) f32 metres.


def flip(coord, normal, rng):
    """Mirror x and y, each with probability 0.5."""
    sign = np.array([*rng.choice([-1, 1], 2), 1], np.float32)
    return coord * sign, normal * sign


def rotate(coord, normal, rng):
    """Turn about z by any angle, about x and y by up to pi / 64."""
    turn = np.eye(3)
    for axis, limit in ((0, np.pi / 64), (1, np.pi / 64), (2, np.pi)):
        angle = rng.uniform(-limit, limit)
        c, s, (i, j) = np.cos(angle), np.sin(angle), [a for a in range(3) if a != axis]
        single = np.eye(3)
        single[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
        turn = single @ turn
    turn = turn.T.astype(np.float32)
    return coord @ turn, normal @ turn


def scale(coord, rng):
    """Scale by 0.9 to 1.1."""
    return coord * np.float32(rng.uniform(0.9, 1.1))


def elastic(coord, rng, spacing, magnitude):
    """Shift points by smooth noise: Gaussian on a grid of this spacing (m), box-blurred, times magnitude (m)."""
    low = coord.min(0)
    shape = np.ceil((coord.max(0) - low) / spacing).astype(int) + 3
    noise = rng.standard_normal((3, *shape), np.float32)
    for axis in (1, 2, 3, 1, 2, 3):
        noise = uniform_filter1d(noise, 3, axis=axis, mode="constant")
    position = ((coord - low) / spacing + 1).T
    shift = [map_coordinates(n, position, order=1, mode="nearest") for n in noise]
    return coord + np.float32(magnitude) * np.stack(shift, 1)


def jitter(coord, rng):
    """5 mm of noise on every point."""
    return coord + np.float32(0.005) * rng.standard_normal(coord.shape, np.float32)


def recolor(color, rng):
    """Colours (N, 3) f32 0..255: auto-contrast with probability 0.2, one shift of all by up to 5 %, noise of 5 %."""
    if rng.random() < 0.2:
        low, high = color.min(0), color.max(0)
        blend = np.float32(rng.random())
        color = (1 - blend) * color + blend * (color - low) * (255 / np.maximum(high - low, 1))
    color = color + rng.uniform(-1, 1, 3).astype(np.float32) * np.float32(0.05 * 255)
    color = color + np.float32(0.05 * 255) * rng.standard_normal(color.shape, np.float32)
    return color.clip(0, 255)


def augment_points(coord, normal, rng):
    """All geometric augmentations: (N, 3), (N, 3) -> the same. The caller keeps the old coord for projection."""
    extent = np.ptp(coord, axis=0).astype(np.float64)
    if np.prod(extent / 0.2 + 3) > MAX_WARP_CELLS:
        size = " x ".join(f"{e:.0f}" for e in extent)
        raise ValueError(f"the points span {size} m, too much to warp in 0.2 m cells; check the units (metres) and "
                         "outliers, or cut the scene into parts")
    coord, normal = rotate(*flip(coord, normal, rng), rng)
    coord = scale(coord, rng)
    if rng.random() < 0.5:
        coord = elastic(elastic(coord, rng, 0.2, 0.4), rng, 0.8, 1.6)
    return jitter(coord, rng), normal


def augment_images(image, rng):
    """(V, 3, H, W) u8 -> the same: brightness and contrast of each view by up to 20 %. Pixels stay where they are."""
    gain = rng.uniform(0.8, 1.2, (len(image), 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-25, 25, (len(image), 1, 1, 1)).astype(np.float32)
    return ((image - np.float32(127)) * gain + (127 + offset)).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- batches


def evenly_spread(values, count):
    """At most count of a list, from the first to the last in equal steps."""
    rows = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[row] for row in rows]


def scene_item(scene, frames, voxel_size, num_classes=NUM_CLASSES, rng=None, vary_images=True):
    """One scene as the networks take it.

    Args:
        scene: dict of `load_scene`.  frames: dict of `load_frames`.  voxel_size: metres.
        rng:   numpy Generator for the augmentation; None = none.  vary_images: False leaves the images as they are.

    Returns:
        dict of arrays, the keys of `collate` for one scene.
    """
    coord, color, normal = scene["coord"], scene["color"].astype(np.float32), scene["normal"]
    image = frames["image"]
    if rng is not None:
        coord, normal = augment_points(coord, normal, rng)
        color = recolor(color, rng)
        image = augment_images(image, rng) if vary_images else image
    grid_coord, point_to_voxel = voxelise(coord, voxel_size)
    m = len(grid_coord)
    means = voxel_means(np.concatenate([coord, scene["coord"], color, normal], 1), point_to_voxel, m)  # (M, 12)
    voxel_coord, world_coord, color, normal = np.split(means, 4, 1)
    middle = voxel_coord.mean(0)
    voxel_coord = voxel_coord - np.array([middle[0], middle[1], voxel_coord[:, 2].min()], np.float32)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    segment = scene["segment"]
    if segment is None:
        segment = np.full(len(coord), IGNORE, np.int64)
    superpoint = scene["superpoint"]
    point_instance, superpoint_instance, instance_label = instance_targets(segment, scene["instance"], superpoint,
                                                                           num_classes)
    piece, piece_points = np.unique(superpoint * m + point_to_voxel, return_counts=True)
    return {
        "name": scene["name"], "grid_coord": grid_coord.astype(np.int32), "coord": voxel_coord,
        "world_coord": world_coord, "color": color / np.float32(127.5) - 1, "normal": normal / np.maximum(length, 1e-6),
        "segment": voxel_majority(segment, point_to_voxel, m, num_classes), "point_segment": segment,
        "point_to_voxel": point_to_voxel, **frames, "image": image,
        "point_superpoint": superpoint, "point_instance": point_instance,
        "piece_voxel": piece % m, "piece_superpoint": piece // m, "piece_points": piece_points.astype(np.float32),
        "superpoint_instance": superpoint_instance, "instance_label": instance_label,
        "has_instances": np.array([scene["instance"] is not None]),
    }


def instance_targets(segment, instance, superpoint, num_classes=NUM_CLASSES):
    """What the query decoder is trained and judged by.

    An instance has the class of most of its labelled points; instances of STUFF and of no class are left out. A
    superpoint belongs to the instance that holds over half of its points.

    Args:
        segment: (N,) class or IGNORE.  instance: (N,) any id, below 0 = none; or None.  superpoint: (N,) 0..S-1.

    Returns:
        point_instance:      (N,) int64, class * 1000 + number from 1 on as the benchmark has it, 0 = none.
        superpoint_instance: (S,) int64, 0..G-1, IGNORE = none.
        instance_label:      (G,) int64 class of each instance; those that hold no superpoint are not among them.
    """
    s = superpoint.max() + 1
    nothing = np.zeros(len(segment), np.int64), np.full(s, IGNORE, np.int64), np.zeros(0, np.int64)
    if instance is None or (instance < 0).all():
        return nothing
    ids, own = np.unique(instance.clip(min=IGNORE), return_inverse=True)
    own = own.ravel() - (ids[0] == IGNORE)  # (N,) number of the instance, IGNORE = none
    label = voxel_majority(segment[own >= 0], own[own >= 0], own.max() + 1, num_classes)
    keep = ~np.isin(label, (IGNORE, *STUFF))
    own, label = np.append(np.where(keep, keep.cumsum() - 1, IGNORE), IGNORE)[own], label[keep]
    if not len(label):
        return nothing
    if len(label) > 999:
        raise ValueError(f"a scene may hold 999 instances (the benchmark's ids have no room for more), found "
                         f"{len(label)}; cut it into parts")
    point_instance = np.where(own >= 0, label[own] * 1000 + own + 1, 0)
    most = voxel_majority(own, superpoint, s, len(label))  # (S,) the instance with the most points, if any
    share = np.bincount(superpoint[own == most[superpoint]], minlength=s) / np.bincount(superpoint, minlength=s)
    owner = np.where(share > 0.5, most, IGNORE)
    held, owner = np.unique(np.append(owner, IGNORE), return_inverse=True)  # the first is IGNORE
    return point_instance, owner.ravel()[:-1] - 1, label[held[1:]]


class SceneDataset(torch.utils.data.Dataset):
    """The scenes of one split. dataset[i] or dataset[(epoch, i)]; what is random depends on (seed, epoch, i) alone.

    Args:
        root, split: folder and "train", "val" or "test".
        voxel_size:  metres.
        augment:     True: augmented, and `views` random frames; False: as it is, and `views` evenly spaced frames.
        views:       frames of a scene (all, where it has fewer); 0 reads no image.
        image_size:  (W, H) of the frames.

    Between epochs `use` may change how many views it reads, and whether as images or as maps of a frozen tower.

    Raises:
        FileNotFoundError: no such folder or no scene in it.
    """

    def __init__(self, root, split, *, voxel_size, augment=False, views=0, image_size=(160, 120),
                 num_classes=NUM_CLASSES, seed=0):
        folder = Path(root, split)
        self.folders = sorted(p.parent for p in folder.glob("*/coord.npy"))
        if not self.folders:
            raise FileNotFoundError(f"no scene in {folder}; generate rooms with: python rooms.py --out {root}, or give "
                                    "--data a folder with train/ and val/ scene folders")
        self.voxel_size, self.augment, self.views, self.image_size = voxel_size, augment, views, tuple(image_size)
        self.num_classes, self.seed = num_classes, seed
        self.cache, self.vary_images = None, augment
        self._cache, self._cached_bytes = {}, 0

    def use(self, views, cache=None, vary_images=True):
        """From here on other views: frames and maps that were kept in memory are forgotten where these change.

        Args:
            views:       frames of a scene.
            cache:       cache.FeatureCache, whose maps then stand in for the images; or None.
            vary_images: with augment alone; False as long as the image tower is frozen, so that an image gives the same
                         maps every time.
        """
        if (views, cache) != (self.views, self.cache):
            self._cache = {key: value for key, value in self._cache.items() if not isinstance(key, tuple)}
            self._cached_bytes = sum(map(_bytes_of, self._cache.values()))
        self.views, self.cache, self.vary_images = views, cache, vary_images

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, i))
        scene = self._once(i, lambda: complete(load_scene(self.folders[i], self.num_classes))[0])
        if self.augment and scene["segment"] is None:
            raise ValueError(f"{self.folders[i]} has no segment20.npy: it can be predicted but not trained on; move it "
                             "out of this split")
        ids = scene["frame_ids"]
        if self.augment:
            chosen = sorted(rng.permutation(ids).astype(int).tolist()[: self.views])
        else:
            chosen = evenly_spread(ids, self.views)
        single = [self._once((i, c), lambda c=c: self._frame(self.folders[i], c)) for c in chosen]
        empty = load_frames(self.folders[i], [], self.image_size, colors=self.cache is None)
        if self.cache is not None:
            empty |= {f"level_{k}": np.zeros((0, *shape), np.float16) for k, shape in enumerate(self.cache.shapes)}
        frames = {k: np.concatenate([empty[k], *(f[k] for f in single)]) for k in empty}
        return scene_item(scene, frames, self.voxel_size, self.num_classes, rng if self.augment else None,
                          self.vary_images)

    def _frame(self, folder, frame):
        """`load_frames` of one frame; with a cache without its image, but with the tower's maps of it."""
        frames = load_frames(folder, [frame], self.image_size, colors=self.cache is None)
        if self.cache is None:
            return frames
        levels = self.cache.read(folder, frame)
        if levels is None:
            raise ValueError(f"{self.cache.path(folder, frame)}: the tower's maps of frame {frame} of {folder} are "
                             "gone or damaged; go on with --resume, which makes them anew")
        return frames | {f"level_{k}": level[None] for k, level in enumerate(levels)}

    def _once(self, key, read):
        """What was read before, as long as the cache has room."""
        if key in self._cache:
            return self._cache[key]
        value = read()
        size = _bytes_of(value)
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[key] = value
            self._cached_bytes += size
        return value


def _bytes_of(arrays):
    return sum(value.nbytes for value in arrays.values() if isinstance(value, np.ndarray))


def collate(items):
    """Scenes -> one batch.

    Returns:
        dict of tensors: names (list of B str);
        grid_coord (M, 3) int32, batch_index (M,) int64, color (M, 3) f32 in [-1, 1], normal (M, 3) f32 augmented,
        coord (M, 3) f32 augmented, metres, xy from the middle of the scene, z above its lowest voxel,
        world_coord (M, 3) f32 NOT augmented, segment (M,) int64;
        image (V, 3, H, W) u8, depth (V, H, W) f32 metres, world_to_camera (V, 4, 4), intrinsics (V, 3, 3),
        view_batch (V,) int64, the scene of each view; with a cache image is (V, 3, 0, 0) and level_0, level_1, ...
        (V, C, h, w) f16 are what the frozen tower made of it;
        point_to_voxel (N,) int64 row of the batch's voxels, point_segment (N,) int64, point_batch (N,) int64,
        point_superpoint (N,) int64 row of the batch's superpoints, point_instance (N,) int64 (`instance_targets`);
        superpoint_batch (S,) int64, superpoint_instance (S,) int64, numbered within a scene;
        instance_label (G,) int64, instance_batch (G,) int64, has_instances (B,) bool, False = not annotated;
        piece_voxel, piece_superpoint (L,) int64 rows of the batch, piece_points (L,) f32 points that both share.
    """
    batch, voxels, superpoints = {"names": [item["name"] for item in items]}, 0, 0
    items = list(items)
    for i, item in enumerate(items):  # rows of a scene -> rows of the batch
        items[i] = item | {key: item[key] + voxels for key in ("point_to_voxel", "piece_voxel")} \
                        | {key: item[key] + superpoints for key in ("point_superpoint", "piece_superpoint")}
        voxels, superpoints = voxels + len(item["grid_coord"]), superpoints + len(item["superpoint_instance"])
    for key in items[0]:
        if key != "name":
            batch[key] = torch.from_numpy(np.concatenate([item[key] for item in items]))
    for key, like in (("batch_index", "grid_coord"), ("view_batch", "image"), ("point_batch", "point_segment"),
                      ("superpoint_batch", "superpoint_instance"), ("instance_batch", "instance_label")):
        counts = torch.tensor([len(item[like]) for item in items])
        batch[key] = torch.repeat_interleave(torch.arange(len(items)), counts)
    return batch


class EpochBatches(torch.utils.data.Sampler):
    """Batches of (epoch, index) pairs, so order and augmentation follow from (seed, epoch) in any worker process.

    share: (rank, world); of every batch process `rank` of `world` gets each world-th scene from its rank-th on. In
    training (shuffle) all get equally many: a batch that does not divide, as the last may, is completed from the start
    of the epoch's order. In evaluation no scene comes twice.
    """

    def __init__(self, length, batch_size, shuffle, seed, share=(0, 1)):
        self.length, self.batch_size, self.shuffle, self.seed, self.share = length, batch_size, shuffle, seed, share
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch, first=0):
        """The epoch to come, and the first of its batches: those before are left out."""
        self.epoch, self.first = epoch, first

    def __len__(self):
        length = self.length if self.shuffle else self.length - self.share[0]
        return -(-length // self.batch_size) - self.first

    def __iter__(self):
        order, (rank, world) = np.arange(self.length), self.share
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for start in range(self.first * self.batch_size, self.length, self.batch_size):
            end = min(start + self.batch_size, self.length)
            if self.shuffle:
                end += (start - end) % world
            batch = order.take(np.arange(start + rank, end, world), mode="wrap")
            if len(batch):
                yield [(self.epoch, int(i)) for i in batch]


def start_worker(_):
    """One thread a worker process, the cores belong to the training; signals are the main process's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(2))  # all are told to end? main is to hear it first


def loader(dataset, batch_size, workers, shuffle, seed, pin=False, share=(0, 1)):
    """DataLoader of collated batches; call loader.batch_sampler.set_epoch(epoch) before each pass.

    pin: batches in page-locked memory, from where a copy to a GPU need not be waited for.
    share: which part of each batch (`EpochBatches`).

    It has a generator of its own: it draws a number for its workers, which would move the random state of the training,
    and differently with and without workers and in a run that was resumed.
    """
    batches = EpochBatches(len(dataset), batch_size, shuffle, seed, share)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                                       persistent_workers=workers > 0, worker_init_fn=start_worker, pin_memory=pin,
                                       generator=torch.Generator())
