"""The maps of a frozen image tower, kept on disk: as long as the tower is frozen they are the same every epoch.

    cache = FeatureCache("data/clip_cache", tower, image_size=(320, 240), limit_gb=50)
    if cache.fill(folders_and_frames, device, workers=2):    # computes what is missing, once
        levels = cache.read(folder, frame)                    # list of (C, h, w) float16, instead of image and tower

One file a view, in half precision, in a folder named by the tower (its weights, its normalisation, its precision, the
image size); the file's name comes from the bytes of the view's colour and depth files. So another tower, other
weights, another size or a changed image never meets an old entry. A file is written beside its place and renamed, and
begins with a checksum of the rest: what a kill or a full disk leaves behind is never read. Points, their augmentation
and the poses play no part: they come after the maps.
"""

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import frame_files, load_frames, start_worker
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
        """The levels of a view, list of (C, h, w) float16; None where there is no whole entry."""
        return self._read(self.path(folder, frame))

    def _read(self, path):
        try:
            entry = path.read_bytes()
        except OSError:  # none there, as a rule
            return None
        if len(entry) != self.entry_bytes or digest(entry[CHECKSUM:]) != entry[:CHECKSUM]:
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

    def fill(self, views, device, workers=0):
        """Compute every entry that is missing or damaged.

        Args:
            views: list of (scene folder, frame id).

        Returns:
            True where every view has its entry now; False, with a line that says why, where it must do without.
        """
        missing = [(f, i) for f, i in tqdm(views, desc="frozen tower: checking its maps", leave=False, disable=None)
                   if self.read(f, i) is None]
        need = len(missing) * self.entry_bytes
        used = self._used() if missing else 0
        if used + need > self.limit:
            print(f"frozen tower: its maps would need {need / 1e9:.1f} GB beside the {used / 1e9:.1f} GB in "
                  f"{self.root}, more than --cache-gb {self.limit / 1e9:g}; the tower runs in every step instead")
            return False
        loader = torch.utils.data.DataLoader(
            _Frames(missing, self.image_size), VIEW_CHUNK, num_workers=workers, worker_init_fn=start_worker,
            generator=torch.Generator())  # its own: a run must draw the same random numbers with and without a cache
        bar = tqdm(total=len(missing), desc="frozen tower: computing its maps once", unit="view", dynamic_ncols=True,
                   disable=not missing)
        try:
            for rows, image, depth in loader:
                with torch.no_grad():
                    levels = self._encode(image.to(device), depth.to(device))
                for i, row in enumerate(rows.tolist()):
                    self.write(self.path(*missing[row]), [level[i] for level in levels])
                bar.update(len(rows))
        except (OSError, OverflowError) as error:
            print(f"frozen tower: its maps cannot be kept in {self.root} ({error}); the tower runs in every step "
                  "instead", file=sys.stderr)
            return False
        finally:
            bar.close()
        return True

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
