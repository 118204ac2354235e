"""Scenes into batches: voxels, augmentation, targets of the decoder, the data set, its loaders.

The camera and the augmentation: voxels are made from augmented coordinates, and every voxel keeps `world_coord`, the
mean of its points' unaugmented coordinates. Only world_coord is ever projected. Images change in colour alone.

Axes: N points, M voxels, V views, S superpoints, G instances, L pieces (the points that a voxel and a superpoint
share), K classes, H, W image size.
"""

import shutil
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import runs
from scenes.augment import augment_images, augment_points, blank, recolor
from scenes.folder import IGNORE, WARN_ONCE, load_frames, load_scene, read_classes, usable_frames
from scenes.points import VERSION, complete, instance_targets, lacks, voxel_majority, voxel_means, voxelise
from tower import MapCache, digest

KEPT_BYTES = 2**30  # decoded scenes and frames that all loading processes keep in memory together
PATIENCE = 120  # seconds without a batch after which the loading processes are given up


def evenly_spread(values, count):
    """At most count of a list, from the first to the last in equal steps."""
    rows = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[row] for row in rows]


def scene_item(scene, frames, voxel_size, rng=None, vary_images=True):
    """One scene as the networks take it: dict of arrays, the keys of `collate`.

    Args:
        scene: dict of `load_scene`, completed.  frames: dict of `load_frames`.  voxel_size: metres.
        rng:   numpy Generator for the augmentation; None = none.  vary_images: False leaves the images as they are.
    """
    coord, color, normal = scene["coord"], scene["color"].astype(np.float32), scene["normal"]
    image = frames["image"]
    if rng is not None:
        coord, normal = augment_points(coord, normal, rng)
        color = recolor(color, rng)
        image = augment_images(image, rng) if vary_images else image
    grid_coord, point_to_voxel = voxelise(coord, voxel_size)
    m, shape = len(grid_coord), grid_coord.max(0) + 1
    if shape.max() >= 2**31 or shape.astype(float).prod() >= 2**62:  # spconv's indices would wrap
        raise ValueError(f"{scene['name']}: points span {shape} voxels of {voxel_size} m: no metres or points far off?")
    means = voxel_means(np.concatenate([coord, scene["coord"], color, normal], 1), point_to_voxel, m)  # (M, 12)
    voxel_coord, world_coord, color, normal = np.split(means, 4, 1)
    voxel_coord = voxel_coord - [*voxel_coord.mean(0)[:2], np.quantile(voxel_coord[:, 2], 0.001, method="lower")]
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    segment, superpoint, classes = scene["segment"], scene["superpoint"], scene["classes"]
    if segment is None:
        segment = np.full(len(coord), IGNORE, np.int64)
    point_instance, superpoint_instance, instance_label = instance_targets(segment, scene["instance"], superpoint,
                                                                           classes.things)
    piece, piece_points = np.unique(superpoint * m + point_to_voxel, return_counts=True)
    return {
        "name": scene["name"], "grid_coord": grid_coord.astype(np.int32), "coord": voxel_coord,
        "world_coord": world_coord, "color": color / np.float32(127.5) - 1, "normal": normal / np.maximum(length, 1e-6),
        "segment": voxel_majority(segment, point_to_voxel, m, len(classes.names)), "point_segment": segment,
        "point_to_voxel": point_to_voxel, **frames, "image": image,
        "point_superpoint": superpoint, "point_instance": point_instance,
        "piece_voxel": piece % m, "piece_superpoint": piece // m, "piece_points": piece_points.astype(np.float32),
        "superpoint_instance": superpoint_instance, "instance_label": instance_label,
        "has_instances": np.array([scene["instance"] is not None]), "whole": np.array([True]),
    }


class SceneDataset(torch.utils.data.Dataset):
    """The scenes of one split. dataset[i] or dataset[(epoch, i)]; what is random depends on (seed, epoch, i) alone.

    Args:
        root, split: folder and "train", "val" or "test"; FileNotFoundError where there is no scene.
        voxel_size:  metres.  image_size: (W, H) of the frames.
        views:       frames of a scene (all, where it has fewer); 0 reads no image.
        augment:     True: augmented, and random frames; False: as it is, and evenly spaced frames.
        maps:        tower.MapCache whose maps stand in for the images; or None.
        vary_images: False as long as the image tower is frozen, so that an image gives the same maps every time.
        blank:       share of the scenes without images, and as many without colours and normals (`augment.blank`).
        keep_bytes:  of scenes and frames that each process keeps in memory.
        computed:    folder in which what `complete` computes is kept; None = nowhere.

    Attribute: classes, Classes of the data set.
    """

    def __init__(self, root, split, *, voxel_size, image_size, views=0, augment=False, maps=None, vary_images=True,
                 blank=0.0, seed=0, keep_bytes=KEPT_BYTES, computed=None):
        folder = Path(root, split)
        self.folders = sorted(p.parent for p in folder.glob("[!.]*/coord.npy"))
        if not self.folders:
            raise FileNotFoundError(f"no scene in {folder}; generate rooms with: python -m scenes.boxes --out {root}, "
                                    "or give --data a folder with train/ and val/ scene folders, its place if moved")
        self.voxel_size, self.image_size, self.views, self.seed = voxel_size, tuple(image_size), views, seed
        self.classes = read_classes(root)
        self.augment, self.maps, self.vary_images, self.blank = augment, maps, vary_images, blank
        self.kept, self.room, self.computed = {}, keep_bytes, computed

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        rng, folder = np.random.default_rng((self.seed, epoch, i)), self.folders[i]
        scene = self._once(folder, lambda: self._complete(folder))
        if self.augment and scene["segment"] is None:
            raise ValueError(f"{folder} has no segment20.npy: it can be predicted but not trained on; move it out of "
                             "this split")
        ids, placed = scene["frame_ids"], scene["file_to_world"]
        chosen = sorted(rng.permutation(ids).astype(int).tolist()[: self.views]) if self.augment \
            else evenly_spread(ids, self.views)
        frames, files = self._frames(folder, {}, placed), scene["frame_files"]
        single = [self._once((folder, c), lambda c=c: self._frames(folder, {c: files[c]}, placed)) for c in chosen]
        frames = {k: np.concatenate([frames[k], *(f[k] for f in single)]) for k in frames}
        if not self.augment:
            return scene_item(scene, frames, self.voxel_size)
        return blank(scene_item(scene, frames, self.voxel_size, rng, self.vary_images), self.blank, rng)

    def _frames(self, folder, frames, file_to_world):
        """`load_frames` of one frame or none; with maps, without the image but with the tower's levels of it."""
        if self.maps is None:
            return load_frames(folder, frames, self.image_size, True, file_to_world)
        found = load_frames(folder, frames, self.image_size, False, file_to_world)
        for frame in frames:
            levels = self.maps.read((folder, frame))
            if levels is None:
                raise ValueError(f"the tower's maps of frame {frame} of {folder} are gone or damaged; go on with "
                                 "--resume, which makes them anew")
            return found | {f"level_{k}": level[None] for k, level in enumerate(levels)}
        return found | {f"level_{k}": np.zeros((0, *shape), np.float16) for k, shape in enumerate(self.maps.shapes)}

    def _complete(self, folder):
        """A scene, completed; what that computes is kept on disk, named by what it is computed from."""
        scene = load_scene(folder, self.classes)
        if not any(lacks(scene)[1:]):
            return scene
        given = {key: scene[key].tobytes() for key in ("coord", "normal", "superpoint") if scene[key] is not None}
        kept = self.computed and self.computed / (digest(repr((VERSION, *given)).encode(), *given.values()) + ".npz")
        with suppress(Exception):  # not there, or damaged, of which NumPy raises all kinds
            return scene | dict(np.load(kept))
        scene, notes = complete(scene)
        for note in (note for note in notes if not note.startswith("no ")):
            WARN_ONCE(f"scenes of {folder.parent}: {note}")
        if kept:
            try:
                self.computed.mkdir(parents=True, exist_ok=True)
                with runs.whole_file(kept) as file:
                    np.savez(file, normal=scene["normal"], superpoint=scene["superpoint"])
            except OSError as error:
                WARN_ONCE(f"{self.computed}: normals and superpoints cannot be kept here ({error.strerror})")
        return scene

    def _once(self, key, read):
        """What was read before, as long as there is room."""
        if key not in self.kept:
            value = read()
            size = sum(part.nbytes for part in value.values() if isinstance(part, np.ndarray))
            if size > self.room:
                return value
            self.kept[key], self.room = value, self.room - size
        return self.kept[key]

    def longest_side(self, count=8):
        """The longest horizontal side, metres, of so many of the scenes, but for a few points far off: float."""
        sides = (load_scene(folder, self.classes)["coord"][:, :2] for folder in evenly_spread(self.folders, count))
        return round(float(max(np.ptp(np.quantile(xy, (0.001, 0.999), axis=0), axis=0).max() for xy in sides)), 2)

    def view_files(self):
        """{(folder, frame id): (colour file, depth file)} of every view that an item may take."""
        frames = {folder: usable_frames(folder)[0] for folder in self.folders}
        return {(folder, frame): files[frame][:2] for folder, files in frames.items()
                for frame in (files if self.augment else evenly_spread(list(files), self.views))}

    def load_view(self, view):
        """Image (3, H, W) u8 and depth (H, W) of a view, as tower.MapCache.fill wants them."""
        frames = load_frames(view[0], [view[1]], self.image_size)
        return frames["image"][0], frames["depth"][0]


def collate(items):
    """Scenes -> one batch: dict of tensors, and names (list of B str).

    Voxels: grid_coord (M, 3) int32, batch_index (M,) int64, color (M, 3) f32 in [-1, 1], normal (M, 3) f32 augmented,
    coord (M, 3) f32 augmented, metres, xy from the middle of the scene, z above its floor (the lowest voxel but a
    thousandth), world_coord (M, 3) f32 NOT augmented, segment (M,) int64.
    Views: image (V, 3, H, W) u8, depth (V, H, W) f32 metres, world_to_camera (V, 4, 4), intrinsics (V, 3, 3),
    view_batch (V,) int64; with maps image is (V, 3, 0, 0) and level_0, level_1, ... (V, C, h, w) f16 are what the
    frozen tower made of it.
    Points: point_to_voxel (N,) row of the batch's voxels, point_segment, point_batch, point_instance (N,) int64
    (`instance_targets`), point_superpoint (N,) row of the batch's superpoints.
    Superpoints, instances: superpoint_batch (S,), superpoint_instance (S,) numbered within a scene, instance_label,
    instance_batch (G,) int64; piece_voxel, piece_superpoint (L,) rows, piece_points (L,) f32 points that both share.
    Scenes: has_instances (B,) bool, False = not annotated; whole (B,) bool, False = `blank` has blanked it.
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

    share: (rank, world); of every batch a process gets each world-th scene from its rank-th on. In training (shuffle)
    all get equally many: a batch that does not divide is completed from the start of the epoch's order.
    """

    def __init__(self, length, batch_size, shuffle, seed, share=(0, 1)):
        self.length, self.batch_size, self.shuffle, self.seed, self.share = length, batch_size, shuffle, seed, share
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch, first=0):
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


class Scenes:
    """Train and val scenes in batches; as long as the image tower is frozen, its maps stand in for the images.

    Args:
        root, voxel_size, image_size, seed: as SceneDataset.
        batch_size: scenes a step, of all processes together.  workers: processes that load, for train and val each.
        cache, cache_gb: folder of the maps and its largest size; 0 = the tower runs in every step.

    Attributes: steps, of an epoch; sizes, {split/scene: bytes}; train and val, SceneDataset; val_batches, DataLoader.
    """

    def __init__(self, root, voxel_size, image_size, batch_size, workers, seed, device, cache, cache_gb):
        self.common = {"voxel_size": voxel_size, "image_size": image_size, "seed": seed,
                       "keep_bytes": KEPT_BYTES // (2 * max(1, workers) * runs.world()),
                       "computed": Path(cache, "points") if cache_gb else None}
        self.root, self.batch_size, self.workers, self.device = root, batch_size, workers, device
        self.cache, self.cache_gb, self.now = cache, cache_gb, None
        self.make(0)
        self.steps = -(-len(self.train) // batch_size)
        self.sizes = {f"{split}/{folder.name}": (folder / "coord.npy").stat().st_size
                      for split, scenes in (("train", self.train), ("val", self.val)) for folder in scenes.folders}

    def __str__(self):
        bare = sum(not (folder / "instance.npy").is_file() for folder in self.train.folders)
        note = f" ({bare} train scenes have no instance.npy: they teach classes only)" if bare else ""
        return f"{len(self.train)} train and {len(self.val)} val scenes of {self.root}{note}"

    def make(self, views, blank=0.0, maps=None, vary_images=True):
        """The data sets, with this many frames a scene, twice as many in val."""
        common = self.common | {"maps": maps}
        self.train = SceneDataset(self.root, "train", views=views, augment=True, vary_images=vary_images, blank=blank,
                                  **common)
        self.val = SceneDataset(self.root, "val", views=2 * views, **common)

    def read(self, views, blank, frozen_tower, until=iter):
        """From here on batches hold this many frames a scene, some scenes blanked; nothing is made where none changes.

        frozen_tower: ClipTower that does not train, whose maps stand in for the images where they can be kept; or None.
        until:        as MapCache.fill.
        """
        frozen = views > 0 and frozen_tower is not None
        if self.now == (views, blank, frozen):
            return
        self.now, maps, share = (views, blank, frozen), None, (runs.rank(), runs.world())
        self.make(views)
        if frozen and self.cache_gb and not blank:  # maps cannot be blanked
            maps = MapCache(self.cache, frozen_tower.eval(), self.train.image_size, self.cache_gb)
            filled = maps.fill(self.train.view_files() | self.val.view_files(), self.train.load_view, self.workers,
                               until, share)
            maps = maps if all(runs.gather(filled)) else None  # the same in all processes
        self.make(views, blank, maps, not frozen)
        pixels = self.val.views * np.prod(self.val.image_size)
        need = (2 * self.workers + 1) * self.batch_size * (12 * max(self.sizes.values()) + 10 * pixels)  # bytes at most
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        if self.workers and free < need:  # a batch that finds no room there would never come
            print(f"/dev/shm has {free >> 20} MB free, {self.workers} loading processes may need {need >> 20}: "
                  "training does without them, slower; enlarge it (docker run --shm-size=8g)")
            self.workers = 0
        self.train_batches, self.val_batches = (
            torch.utils.data.DataLoader(  # its own generator: the training draws the same numbers whoever loads
                scenes, batch_sampler=EpochBatches(len(scenes), self.batch_size, shuffle, self.common["seed"], share),
                num_workers=self.workers, collate_fn=collate, persistent_workers=self.workers > 0,
                worker_init_fn=start_worker, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
                timeout=PATIENCE if self.workers else 0)
            for scenes, shuffle in ((self.train, True), (self.val, False)))

    def batches(self, epoch, first=0):
        """The train batches of an epoch from the step `first` on."""
        self.train_batches.batch_sampler.set_epoch(epoch, first)
        return self.train_batches
