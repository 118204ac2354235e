"""The maps of a frozen image tower, kept on disk: as long as the tower is frozen they are the same every epoch.

    cache = FeatureCache("data/clip_cache", tower, image_size=(320, 240), limit_gb=50)
    if cache.fill(folders_and_frames, device, workers=2):    # computes what is missing, once
        levels = cache.read(folder, frame)                    # list of (C, h, w) float16, instead of image and tower

One file a view, in half precision, in a folder named by the tower (its weights, its normalisation, its precision, the
image size); the file's name comes from the bytes of the view's colour and depth files. So another tower, other
weights, another size or a changed image never meets an old entry. A file is written beside its place and renamed, and
begins with a checksum of the rest: what a kill or a full disk leaves behind is never used. Points, their augmentation
and the poses play no part: they come after the maps.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import start_worker
from scenes.folder import frame_files, load_frames
from tower import MAX_DEPTH, VIEW_CHUNK

FORMAT = 1  # raise it whenever the same tower gives other numbers or a file another meaning
CHECKSUM = 16  # bytes


def digest(*parts):
    """Checksum of byte strings and arrays, CHECKSUM bytes."""
    result = hashlib.blake2b(digest_size=CHECKSUM)
    for part in parts:
        result.update(part)
    return result.digest()


class FeatureCache:
    """What ClipTower.encode gives for single views, on disk. A data loader's worker may hold a copy.

    Args:
        root:       folder of the caches of all towers.
        tower:      ClipTower; its weights must not change as long as the cache is in use.
        image_size: (W, H) at which the frames are read.
        limit_gb:   largest size of root, in 10^9 bytes.
    """

    def __init__(self, root, tower, image_size, limit_gb):
        self.root, self.image_size, self.limit = Path(root), tuple(image_size), limit_gb * 1e9
        state = {k: v for k, v in tower.visual.state_dict().items() if not k.endswith("num_batches_tracked")}
        description = (FORMAT, tower.precision, MAX_DEPTH, self.image_size, list(state), str(tower.visual))
        numbers = [v.detach().cpu().contiguous().numpy() for v in (*state.values(), tower.mean, tower.std)]
        self.folder = self.root / digest(repr(description).encode(), *numbers).hex()
        width, height = self.image_size
        with torch.no_grad():
            device = tower.mean.device
            empty = tower.encode(torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device),
                                 torch.zeros(1, height, width, device=device))
        self.shapes = [tuple(level.shape[1:]) for level in empty]
        self.entry_bytes = CHECKSUM + 2 * sum(int(np.prod(shape)) for shape in self.shapes)
        self._encode = tower.encode  # for fill alone

    def __getstate__(self):
        """A worker process gets no tower."""
        return self.__dict__ | {"_encode": None}

    def path(self, folder, frame):
        """Where the entry of a view is, by the bytes of its files."""
        color, depth = (path.read_bytes() for path in frame_files(folder, frame))
        return self.folder / digest(digest(color), digest(depth)).hex()

    def read(self, folder, frame):
        """The levels of a view, list of (C, h, w) float16; None where there is no whole entry.

        A damaged entry is removed, so that the next `fill` makes it anew.
        """
        path, entry = self.path(folder, frame), b""
        with contextlib.suppress(OSError):  # none there, as a rule
            entry = path.read_bytes()
        if len(entry) != self.entry_bytes or digest(entry[CHECKSUM:]) != entry[:CHECKSUM]:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        values, levels = np.frombuffer(entry, np.float16, offset=CHECKSUM), []
        for shape in self.shapes:
            size = int(np.prod(shape))
            levels.append(values[:size].reshape(shape))
            values = values[size:]
        return levels

    def write(self, path, levels):
        """Keep the levels of one view. Raises OSError where the disk is full (nothing half-written stays) and
        OverflowError where half precision cannot hold them."""
        values = np.concatenate([level.detach().cpu().half().numpy().ravel() for level in levels])
        if not np.isfinite(values).all():
            raise OverflowError("they exceed half precision, 65,504, or are not finite")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            beside.write_bytes(digest(values) + values.tobytes())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def fill(self, views, device, workers=0, until=iter):
        """Compute every entry that is not there, or not of its size; what is in it `read` checks.

        The last bits of a map depend on the views that went through the tower beside it. So these are always the same:
        a chunk of VIEW_CHUNK neighbours in the list, whole where one of them is missing. A fill that was killed ends
        with the very bits of one that was left alone.

        Args:
            views: list of (scene folder, frame id).
            until: function of an iterable -> its items up to a stop (guard.StopSignals.until).

        Returns:
            True where every view has its entry now; False, with a line that says why, where it must do without.

        Raises:
            ValueError, OSError: an image that cannot be read.
        """
        paths = [self.path(*view) for view in
                 until(tqdm(views, desc="frozen tower: checking its maps", leave=False, disable=None))]
        if len(paths) < len(views):
            return False
        view_of = dict(zip(paths, views))  # views of the same bytes have one entry
        sizes = {path: _size(path) for path in view_of}
        paths, missing = list(view_of), {path for path, size in sizes.items() if size != self.entry_bytes}
        need = len(missing) * self.entry_bytes
        used = self._used() - sum(sizes[path] for path in missing) if missing else 0  # damaged ones are replaced
        if used + need > self.limit:
            print(f"frozen tower: its maps would need {need / 1e9:.1f} GB beside the {used / 1e9:.1f} GB in "
                  f"{self.root}, more than --cache-gb {self.limit / 1e9:g}; the tower runs in every step instead. To "
                  f"make room delete the other subfolders of {self.root}, of other towers (this one's is "
                  f"{self.folder.name}), or raise --cache-gb")
            return False
        chunks = [range(start, min(start + VIEW_CHUNK, len(paths))) for start in range(0, len(paths), VIEW_CHUNK)]
        loader = torch.utils.data.DataLoader(
            _Frames(list(view_of.values()), self.image_size), num_workers=workers, worker_init_fn=start_worker,
            batch_sampler=[chunk for chunk in chunks if any(paths[row] in missing for row in chunk)],
            generator=torch.Generator())  # its own: a run must draw the same random numbers with and without a cache
        error, count = None, len(missing)
        with tqdm(total=count, desc="frozen tower: computing its maps once", unit="view", dynamic_ncols=True,
                  disable=not missing) as bar:
            for rows, image, depth in until(loader):
                with torch.no_grad():
                    levels = self._encode(image.to(device), depth.to(device))
                written = [(i, paths[row]) for i, row in enumerate(rows.tolist()) if paths[row] in missing]
                try:
                    for i, path in written:
                        self.write(path, [level[i] for level in levels])
                        missing.remove(path)
                except (OSError, OverflowError) as found:  # of the writing alone
                    error = found
                    break
                bar.update(len(written))
        if error:
            print(f"frozen tower: its maps cannot be kept in {self.root} ({error}); the tower runs in every step "
                  "instead")
        elif missing:
            print(f"frozen tower: stopped after {count - len(missing)} of {count} maps; these are kept")
        return not missing

    def _used(self):
        """Bytes in root. What a kill left half-written, an hour ago or more, is deleted."""
        used = 0
        for path in self.root.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another run has renamed it meanwhile
                state = path.stat()
                if path.suffix == ".tmp" and state.st_mtime < time.time() - 3600:
                    path.unlink()
                else:
                    used += state.st_size
        return used


def _size(path):
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _Frames(torch.utils.data.Dataset):
    """Row, image (3, H, W) uint8 and depth (H, W) of single views."""

    def __init__(self, views, image_size):
        self.views, self.image_size = views, image_size

    def __len__(self):
        return len(self.views)

    def __getitem__(self, row):
        folder, frame = self.views[row]
        frames = load_frames(folder, [frame], self.image_size)
        return row, frames["image"][0], frames["depth"][0]
