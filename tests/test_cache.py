"""Tests of cache.py and of training with it: what is read is what the tower computes, or nothing."""

import errno
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache as cache_module
import tower as tower_module
import train
from cache import FeatureCache
from conftest import Payload
from data import SceneDataset, collate
from guard import StopSignals
from scenes.folder import load_frames
from stages import apply_setting, setting_at
from tower import ClipTower, import_open_clip

SIZE = (40, 30)


@pytest.fixture
def scene(tmp_path):
    """A scene folder with 200 points and 5 frames, its number of files each."""
    folder, rng = tmp_path / "rooms" / "train" / "scene", np.random.default_rng(0)
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "coord.npy", rng.uniform(0, 3, (200, 3)).astype(np.float32))
    np.save(folder / "color.npy", rng.integers(0, 256, (200, 3), np.uint8))
    np.save(folder / "segment20.npy", rng.integers(0, 5, 200))
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", [[36, 0, 20], [0, 36, 15], [0, 0, 1]])
    for i in range(5):
        write_frame(folder, i, seed=i)
    return folder


def write_frame(folder, i, seed):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)).save(folder / "color" / f"{i}.jpg")
    depth = rng.integers(500, 4000, (SIZE[1], SIZE[0])).astype(np.uint16)
    Image.fromarray(depth).save(folder / "depth" / f"{i}.png")
    np.savetxt(folder / "pose" / f"{i}.txt", np.eye(4))


@pytest.fixture
def tower(make_model):
    return make_model(pretrained=True).tower.eval()


@pytest.fixture
def views(scene):
    return [(scene, i) for i in range(5)]


def make_cache(scene, tower, image_size=SIZE, limit_gb=1):
    return FeatureCache(scene.parents[1] / "cache", tower, image_size, limit_gb)


def own_levels(tower, folder, frame, image_size=SIZE):
    frames = load_frames(folder, [frame], image_size)
    with torch.no_grad():
        return [level[0] for level in tower.encode(*(torch.from_numpy(frames[key]) for key in ("image", "depth")))]


def is_hit(cache, tower, folder, frame):
    levels = cache.read(folder, frame)
    return levels is not None and all(
        level.dtype == np.float16 and np.allclose(level, own.numpy(), rtol=1e-3, atol=1e-4)
        for level, own in zip(levels, own_levels(tower, folder, frame), strict=True))


def entries(cache):
    return sorted(path for path in cache.folder.glob("*") if path.suffix != ".tmp")


# ---- a hit

def test_a_hit_is_the_towers_own_output_in_half_precision(scene, tower, views, capsys):
    cache = make_cache(scene, tower)
    assert cache.read(scene, 0) is None
    assert cache.fill(views[:3], "cpu") is True
    assert capsys.readouterr().out == ""
    assert all(is_hit(cache, tower, scene, i) for i in range(3))
    assert cache.read(scene, 3) is None
    assert [path.stat().st_size for path in entries(cache)] == 3 * [cache.entry_bytes]
    assert not np.array_equal(cache.read(scene, 0)[0], cache.read(scene, 1)[0])
    assert cache.shapes == [level.shape for level in cache.read(scene, 0)]


def test_only_chunks_of_which_something_is_missing_are_computed_and_only_that_is_written(scene, tower, views,
                                                                                         monkeypatch):
    monkeypatch.setattr(cache_module, "VIEW_CHUNK", 2)
    make_cache(scene, tower).fill(views[:3], "cpu")
    cache, counted = make_cache(scene, tower), []
    before = {path: path.stat().st_ino for path in entries(cache)}
    encode = cache._encode
    monkeypatch.setattr(cache, "_encode", lambda image, depth: counted.append(len(image)) or encode(image, depth))
    assert cache.fill(views, "cpu") is True
    assert counted == [2, 1]
    assert before == {path: path.stat().st_ino for path in before}
    assert cache.fill(views, "cpu") is True
    assert counted == [2, 1]
    assert all(is_hit(cache, tower, scene, i) for i in range(5))


def test_views_of_the_same_bytes_share_one_entry_wherever_they_stand(scene, tower, views, monkeypatch):
    monkeypatch.setattr(cache_module, "VIEW_CHUNK", 2)
    write_frame(scene, 5, seed=0)
    cache = make_cache(scene, tower)
    assert cache.fill([*views, (scene, 5)], "cpu") is True
    assert len(entries(cache)) == 5
    kept = cache.path(scene, 0).read_bytes()
    cache.path(scene, 4).unlink()
    assert cache.fill([*views, (scene, 5)], "cpu") is True
    assert cache.path(scene, 5).read_bytes() == kept


def test_worker_processes_fill_and_read_it_and_carry_no_tower(scene, tower, views):
    cache = make_cache(scene, tower)
    assert cache.fill(views, "cpu", workers=1) is True
    assert all(is_hit(cache, tower, scene, i) for i in range(5))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy._encode is None
    assert is_hit(copy, tower, scene, 4)


def test_augmented_points_of_every_epoch_meet_the_same_maps(scene, tower, views):
    dataset = SceneDataset(scene.parents[1], "train", voxel_size=0.1, augment=True, views=2, image_size=SIZE)
    plain = dataset[(0, 0)]
    dataset.use(2, make_cache(scene, tower), vary_images=False)
    dataset.cache.fill(views, "cpu")
    coords = []
    for epoch in (0, 1, 2):
        item = dataset[(epoch, 0)]
        chosen = sorted(np.random.default_rng((0, epoch, 0)).permutation(range(5)).tolist()[:2])
        coords.append(item["coord"])
        assert item["image"].shape == (2, 3, 0, 0)
        for row, frame in enumerate(chosen):
            assert np.array_equal(item["depth"][row], load_frames(scene, [frame], SIZE)["depth"][0])
            for k, level in enumerate(own_levels(tower, scene, frame)):
                assert np.allclose(item[f"level_{k}"][row], level.numpy(), rtol=1e-3, atol=1e-4)
    assert len({coord.tobytes() for coord in coords}) == 3
    assert np.array_equal(coords[0], plain["coord"])  # the cache changes nothing else
    assert all(np.array_equal(plain[key], dataset[(0, 0)][key]) for key in plain if key not in ("image", "name"))


def test_the_model_gives_nearly_the_same_from_the_maps_as_from_the_images(make_model, make_batch):
    model, batch = make_model(pretrained=True).eval(), make_batch()
    apply_setting(model, setting_at(50, pretrained=True))
    with torch.no_grad():
        expected = model(batch)
        levels = model.tower.encode(batch["image"], batch["depth"])
        given = {key: value for key, value in batch.items() if key != "image"} | {"image": torch.zeros(4, 3, 0, 0)}
        given |= {f"level_{k}": level.half() for k, level in enumerate(levels)}
        out = model(given)
    assert torch.allclose(out["feat_2d"], expected["feat_2d"], atol=1e-2)
    assert torch.allclose(out["logits"], expected["logits"], atol=1e-2)
    assert not torch.equal(out["logits"], expected["logits"])


def test_scenes_with_and_without_frames_make_one_batch_of_maps(scene, tower, views):
    bare = scene.with_name("bare")
    bare.mkdir()
    for name in ("coord.npy", "color.npy", "segment20.npy"):
        (bare / name).write_bytes((scene / name).read_bytes())
    dataset = SceneDataset(scene.parents[1], "train", voxel_size=0.1, views=2, image_size=SIZE)
    dataset.use(2, make_cache(scene, tower))
    dataset.cache.fill(views, "cpu")
    batch = collate([dataset[0], dataset[1]])
    assert batch["level_0"].shape[0] == len(batch["depth"]) == 2
    assert batch["view_batch"].tolist() == [1, 1]


# ---- what never meets an old entry, and what still does

def test_another_image_or_depth_file_is_another_entry_and_another_pose_is_not(scene, tower, views):
    cache = make_cache(scene, tower)
    cache.fill(views, "cpu")
    write_frame(scene.parent / "scene", 7, seed=70)
    (scene / "color" / "0.jpg").write_bytes((scene / "color" / "7.jpg").read_bytes())
    (scene / "depth" / "1.png").write_bytes((scene / "depth" / "7.png").read_bytes())
    np.savetxt(scene / "pose" / "2.txt", np.diag([-1, -1, 1, 1]))
    assert cache.read(scene, 0) is None
    assert cache.read(scene, 1) is None
    assert is_hit(cache, tower, scene, 2)
    assert cache.fill(views, "cpu") is True
    assert all(is_hit(cache, tower, scene, i) for i in range(5))


def test_a_renamed_folder_and_a_png_in_place_of_the_jpg_are_found_by_their_bytes(scene, tower, views):
    cache = make_cache(scene, tower)
    cache.fill(views, "cpu")
    moved = scene.rename(scene.with_name("elsewhere"))
    (moved / "color" / "3.jpg").rename(moved / "color" / "3.png")
    assert is_hit(cache, tower, moved, 3)


@pytest.mark.parametrize("change", ["one weight", "depth kernel", "batch norm statistic", "colours' mean", "precision",
                                    "image size"])
def test_another_tower_or_way_to_run_it_never_meets_an_old_entry(scene, tower, views, change):
    make_cache(scene, tower).fill(views, "cpu")
    size = SIZE
    with torch.no_grad():
        if change == "one weight":
            tower.visual.net.layer3[0].conv1.weight[0, 0, 0, 0] += 1e-6
        elif change == "depth kernel":
            tower.visual.net.conv1.depth.weight[0] = 0.1
        elif change == "batch norm statistic":
            tower.visual.net.bn1.running_var[0] += 0.1
        elif change == "colours' mean":
            tower.mean += 0.01
        elif change == "precision":
            tower.precision = "bf16"
        else:
            size = (44, 30)
    cache = make_cache(scene, tower, size)
    assert cache.read(scene, 0) is None
    assert cache.fill(views[:1], "cpu") is True
    assert is_hit(cache, tower, scene, 0) or size != SIZE


def test_neither_the_neck_nor_the_number_of_steps_makes_another_tower(scene, tower, views):
    make_cache(scene, tower).fill(views, "cpu")
    with torch.no_grad():
        tower.neck["lateral"][0].weight += 1
        tower.visual.net.bn1.num_batches_tracked += 1
    assert is_hit(make_cache(scene, tower), tower, scene, 0)


def test_gelu_never_meets_the_entries_of_quick_gelu_of_the_same_weights(scene):
    from open_clip.transformer import QuickGELU, VisionTransformer

    caches = []
    for activation in (torch.nn.GELU, QuickGELU):
        torch.manual_seed(0)
        visual = VisionTransformer(32, 8, 16, 2, 2, 2.0, output_dim=8, act_layer=activation)
        tower = ClipTower(visual, 8, (0.5,) * 3, (0.5,) * 3, pretrained=True).eval()
        caches.append(make_cache(scene, tower))
        assert caches[-1].read(scene, 0) is None
        assert caches[-1].fill([(scene, 0)], "cpu") is True
        assert is_hit(caches[-1], tower, scene, 0)
    assert not np.array_equal(*(cache.read(scene, 0)[0] for cache in caches))


# ---- damage, kills, full disks

@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "flipped bit", "flipped bit of the checksum",
                                    "zeros"])
def test_a_damaged_entry_is_not_used_and_is_made_anew(scene, tower, views, damage):
    cache = make_cache(scene, tower)
    cache.fill(views, "cpu")
    path = cache.path(scene, 2)
    whole = bytearray(path.read_bytes())
    if damage.startswith("flipped"):
        whole[3 if "checksum" in damage else 1000] ^= 4
    path.write_bytes({"truncated": whole[:-2], "longer": whole + b"\0\0", "empty": b"",
                      "zeros": bytes(len(whole))}.get(damage, whole))
    dataset = SceneDataset(scene.parents[1], "train", voxel_size=0.1, views=5, image_size=SIZE)
    dataset.use(5, cache)
    with pytest.raises(ValueError, match=r"frame 2 .* gone or damaged; go on with --resume"):
        dataset[0]
    assert len(entries(cache)) == 4
    assert cache.fill(views, "cpu") is True
    assert is_hit(cache, tower, scene, 2)
    assert dataset[0]["level_0"].shape[0] == 5


def test_an_entry_that_is_a_pickle_is_not_run_and_not_used(scene, tower, views, tmp_path):
    cache, touched = make_cache(scene, tower), tmp_path / "touched"
    cache.fill(views, "cpu")
    path = cache.path(scene, 2)
    content = pickle.dumps(Payload(touched))
    path.write_bytes(content + bytes(cache.entry_bytes - len(content)))
    assert cache.read(scene, 2) is None
    assert not path.exists() and not touched.exists()


def test_a_fill_looks_into_no_entry_and_replaces_one_of_another_size(scene, tower, views, monkeypatch):
    cache = make_cache(scene, tower)
    cache.fill(views, "cpu")
    path = cache.path(scene, 2)
    path.write_bytes(path.read_bytes()[:-2])
    monkeypatch.setattr(cache, "read", lambda *_: pytest.fail("an entry was read"))
    assert cache.fill(views, "cpu") is True
    monkeypatch.undo()
    assert is_hit(cache, tower, scene, 2)


def fill_slowly(cache, views):
    real = os.replace

    def slow(*names):
        time.sleep(0.2)  # with the file beside its place
        real(*names)

    os.replace = slow
    cache.fill(views, "cpu")


def test_a_kill_in_the_middle_leaves_whole_entries_or_none_and_the_next_fill_completes(scene, tower, views):
    cache = make_cache(scene, tower)
    child = multiprocessing.get_context("fork").Process(target=fill_slowly, args=(cache, views))
    child.start()
    until = time.time() + 60
    while len(entries(cache)) < 2 and time.time() < until and child.is_alive():
        time.sleep(0.02)
    time.sleep(0.05)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = entries(cache)
    assert 2 <= len(left) < 5
    assert list(cache.folder.glob("*.tmp"))  # it was killed in the middle of one
    hits = [i for i in range(5) if cache.read(scene, i) is not None]
    assert len(hits) == len(left)
    assert all(is_hit(cache, tower, scene, i) for i in hits)
    old = time.time() - 7200
    for path in cache.folder.glob("*.tmp"):
        os.utime(path, (old, old))
    assert cache.fill(views, "cpu") is True
    assert all(is_hit(cache, tower, scene, i) for i in range(5))
    assert not list(cache.folder.glob("*.tmp"))  # what an old kill left is swept up


@pytest.mark.parametrize("gone", [(0,), (1, 2), (4, 3, 0)])
def test_what_a_kill_left_out_comes_back_with_the_bits_of_a_fill_that_was_left_alone(scene, tower, views, gone):
    cache = make_cache(scene, tower)
    cache._encode = lambda image, depth: [level + len(image) for level in tower.encode(image, depth)]  # it shows
    cache.fill(views, "cpu")
    whole = {path: path.read_bytes() for path in entries(cache)}
    for i in gone:
        cache.path(scene, i).unlink()
    assert cache.fill(views, "cpu") is True
    assert {path: path.read_bytes() for path in entries(cache)} == whole


def test_a_stop_ends_a_fill_after_the_chunk_in_hand_and_the_next_one_completes_it_bit_for_bit(
        scene, tower, views, monkeypatch, capsys):
    monkeypatch.setattr(cache_module, "VIEW_CHUNK", 2)
    cache, stop = make_cache(scene, tower), StopSignals()
    cache.fill(views, "cpu")
    whole = {path: path.read_bytes() for path in entries(cache)}
    shutil.rmtree(cache.root)
    written = cache.write

    def write(path, levels):
        written(path, levels)
        if len(entries(cache)) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cache, "write", write)
    stop.listen()
    try:
        assert cache.fill(views, "cpu", until=stop.until) is False
        assert stop.asked == signal.SIGINT
        assert cache.fill(views, "cpu", until=stop.until) is False
    finally:
        stop.release()
    assert capsys.readouterr().out == "frozen tower: stopped after 2 of 5 maps; these are kept\n"
    assert len(entries(cache)) == 2
    assert cache.fill(views, "cpu") is True
    assert {path: path.read_bytes() for path in entries(cache)} == whole


def test_an_image_that_cannot_be_read_is_not_blamed_on_the_folder_of_the_maps(scene, tower, views, capsys):
    content = (scene / "color" / "2.jpg").read_bytes()
    (scene / "color" / "2.jpg").write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"2\.jpg"):
        make_cache(scene, tower).fill(views, "cpu")
    (scene / "color" / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        make_cache(scene, tower).fill(views, "cpu")
    assert capsys.readouterr().out == ""


def test_a_damaged_entry_does_not_count_twice_against_the_limit(scene, tower, views):
    cache = make_cache(scene, tower)
    cache.limit = 5 * cache.entry_bytes
    assert cache.fill(views, "cpu") is True
    path = cache.path(scene, 1)
    path.write_bytes(path.read_bytes()[:-2])
    assert cache.fill(views, "cpu") is True
    assert is_hit(cache, tower, scene, 1)


def test_more_than_the_limit_gives_false_and_a_line_and_writes_nothing(scene, tower, views, capsys):
    entry = make_cache(scene, tower).entry_bytes / 1e9
    cache = make_cache(scene, tower, limit_gb=2.5 * entry)
    assert cache.fill(views, "cpu") is False
    said = capsys.readouterr().out
    assert f"delete the other subfolders of {cache.root}" in said and cache.folder.name in said
    assert "or raise --cache-gb" in said
    assert said.count("\n") == 1
    assert not cache.root.exists()
    assert cache.fill(views[:2], "cpu") is True
    assert cache.fill(views[2:3], "cpu") is False  # the old ones count
    assert cache.fill(views[:2], "cpu") is True  # and nothing more is needed for these
    tower.precision = "bf16"
    assert make_cache(scene, tower, limit_gb=2.5 * entry).fill(views[:1], "cpu") is False  # those of others too


@pytest.mark.parametrize("when", ["writing", "renaming", "making the folder"])
def test_a_full_disk_gives_false_and_a_line_and_leaves_no_half_file(scene, tower, views, capsys, monkeypatch, when):
    cache, count = make_cache(scene, tower), []

    def fails_at_the_third(real):
        def wrapped(*args, **kwargs):
            count.append(1)
            if len(count) >= 3:
                if when == "writing":
                    real(args[0], args[1][:100])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)
        return wrapped

    place, name = {"writing": (Path, "write_bytes"), "renaming": (os, "replace"),
                   "making the folder": (Path, "mkdir")}[when]
    monkeypatch.setattr(place, name, fails_at_the_third(getattr(place, name)))
    assert cache.fill(views, "cpu") is False
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert re.search(r"cannot be kept in .*No space left on device.*the tower runs in every step instead\n", said)
    assert not list(cache.root.glob("*/*.tmp"))
    assert len(entries(cache)) == (0 if when == "making the folder" else 2)
    assert cache.fill(views, "cpu") is True


def test_a_root_that_cannot_be_a_folder_gives_false_and_a_line(scene, tower, views, capsys):
    (scene.parents[1] / "cache").write_text("a file")
    assert make_cache(scene, tower).fill(views, "cpu") is False
    assert "cannot be kept" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1e6, torch.inf, torch.nan])
def test_maps_that_half_precision_cannot_hold_are_not_kept(scene, tower, views, capsys, monkeypatch, value):
    cache = make_cache(scene, tower)
    encode = cache._encode
    monkeypatch.setattr(cache, "_encode", lambda image, depth: [level + value for level in encode(image, depth)])
    assert cache.fill(views, "cpu") is False
    assert "half precision" in capsys.readouterr().out
    assert not entries(cache)


# ---- in training

@pytest.fixture(scope="module")
def encodes():
    """List of (number of views, takes gradients) of every pass through a tower; clear it at will."""
    calls, real = [], ClipTower.encode

    def encode(self, image, depth):
        takes = torch.is_grad_enabled() and any(p.requires_grad for p in self.visual.parameters())
        calls.append((len(image), takes))
        return real(self, image, depth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipTower, "encode", encode)
        yield calls


@pytest.fixture(scope="module")
def stage_two(run_train, encodes, tmp_path_factory):
    """Function: run stage 2 (two epochs) with flags after one and the same stage 1, whose weight file is gone by then.

    -> (run folder, lines of the log, passes through the tower in stage 2); the cache folder is one for all.
    """
    folder = tmp_path_factory.mktemp("stage_two")
    cache, first, weights = folder / "cache", folder / "first", folder / "clip.pt"
    torch.manual_seed(5)
    with import_open_clip() as open_clip:
        torch.save(open_clip.create_model("clip_small").state_dict(), weights)
    run_train(first, "--stage", 1, "--compress", 21, "--clip", "clip_small", "--clip-weights", weights)
    weights.unlink()

    def run(name, *flags):
        out = folder / name
        out.mkdir()
        for file in ("config.json", "log.jsonl", "stage1.pt"):
            (out / file).write_bytes((first / file).read_bytes())
        encodes.clear()
        log = run_train(out, "--stage", 2, "--cache", cache, *flags)
        return out, log, list(encodes)

    return run


@pytest.fixture(scope="module")
def cached_run(stage_two):
    return stage_two("cached")


def weights_of(run):
    return torch.load(run[0] / "stage2.pt", weights_only=True)["model"]


def test_stage_two_runs_the_tower_once_a_view_and_never_in_a_step(cached_run):
    _, log, calls = cached_run
    assert {line["stage"] for line in log} == {1, 2}
    assert not any(takes for _, takes in calls)
    assert calls[0] == (1, False)  # the shapes
    assert len(calls) < sum(line["steps"] for line in log if line["stage"] == 2)
    assert max(views for views, _ in calls) == tower_module.VIEW_CHUNK


def test_a_second_run_meets_the_maps_of_the_first_bit_for_bit_in_worker_processes_too(stage_two, cached_run):
    again = stage_two("again", "--workers", 2)
    assert again[2] == [(1, False)]
    ours, theirs = weights_of(again), weights_of(cached_run)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_without_room_for_the_maps_the_run_says_so_and_the_images_lead_to_the_same_weights(stage_two, cached_run,
                                                                                           capsys):
    from_images = stage_two("images", "--cache-gb", 1e-6, "--cache", "elsewhere")
    assert "more than --cache-gb 1e-06" in capsys.readouterr().out
    steps = sum(line["steps"] for line in from_images[1] if line["stage"] == 2)
    assert len(from_images[2]) >= steps
    start = torch.load(cached_run[0] / "stage1.pt", weights_only=True)["model"]
    ours, theirs = weights_of(cached_run), weights_of(from_images)
    trained = [key for key in theirs if theirs[key].is_floating_point() and not torch.equal(theirs[key], start[key])]
    assert any(key.startswith("tower.neck") for key in trained)
    assert not any(key.startswith("tower.visual") for key in trained)
    off = sum((ours[key] - theirs[key]).square().sum() for key in trained).sqrt()
    way = sum((theirs[key] - start[key]).square().sum() for key in trained).sqrt()
    assert 0 < off < 0.1 * way
    for line, other in zip(cached_run[1], from_images[1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.01)


def test_a_damaged_entry_met_in_training_is_an_error_and_resuming_makes_it_anew(stage_two, cached_run, run_train,
                                                                              tmp_path):
    cache = shutil.copytree(cached_run[0].parent / "cache", tmp_path / "cache")
    whole = {path: path.read_bytes() for path in cache.glob("*/*")}
    for path, content in whole.items():
        path.write_bytes(content[:-2] + b"\x12\x34")
    with pytest.raises(SystemExit, match="gone or damaged; go on with --resume, which makes them anew"):
        stage_two("damaged", "--cache", cache)
    removed = [path for path in whole if not path.exists()]
    assert len(removed) == 1
    for path in whole.keys() - set(removed):
        path.write_bytes(whole[path])
    out = cached_run[0].parent / "damaged"
    shutil.copy(out / "stage1.pt", out / "last.pt")
    run_train(out, "--resume", "--stage", 2, "--cache", cache)
    assert whole == {path: path.read_bytes() for path in cache.glob("*/*")}
    ours, theirs = weights_of([out]), weights_of(cached_run)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_limit_of_zero_means_no_cache(make_model, scene):
    config = train.Config(cache=str(scene.parents[1] / "cache"), cache_gb=0.0)
    assert train.cached_maps(make_model(pretrained=True), config, None, None, 0) is None


def test_a_pretrained_run_goes_on_through_stage_three_and_predicts_without_its_weight_file(
        cached_run, run_train, encodes, tiny_rooms, tmp_path):
    import predict

    out = tmp_path / "run"
    shutil.copytree(cached_run[0], out)
    assert not Path(train.load_model(out / "last.pt")[1].clip_weights).exists()  # gone since stage 1
    encodes.clear()
    log = run_train(out, "--resume", "--checkpoint-tower")
    assert {line["stage"] for line in log} == {1, 2, 3}
    assert any(takes for _, takes in encodes)  # images again
    assert all(line["skipped_steps"] == 0 and line["loss"] is not None for line in log)
    model, _, _ = train.load_model(out / "last.pt")
    state, start = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (out, cached_run[0]))
    visual = [key for key in start if key.startswith("tower.visual")]
    moved = {key for key in visual if not torch.equal(start[key], state[key])}
    assert moved and all(key.startswith(("tower.visual.net.conv1", "tower.visual.net.layer3")) for key in moved)
    assert model.tower.pretrained
    room = next(tiny_rooms.glob("val/*"))
    predict.main([str(out / "last.pt"), str(room), "--out", str(tmp_path / "predicted"), "--device", "cpu"])
    assert list((tmp_path / "predicted").iterdir())


def test_another_tower_by_its_name_trains_from_scratch_in_bf16(run_train, encodes, tmp_path):
    encodes.clear()
    log = run_train(tmp_path / "run", "--compress", 129, "--clip", "PE-Core-T-16-384", "--clip-weights", "scratch",
                    "--precision", "bf16")
    assert [line["stage"] for line in log] == [1, 2, 3]
    assert all(line["skipped_steps"] == 0 and line["loss"] is not None for line in log)
    assert any(takes for _, takes in encodes)
    assert log[-1]["grad_norm"]["2d"] > 0
    model, config, _ = train.load_model(tmp_path / "run" / "last.pt")
    assert (config.clip, config.precision) == ("PE-Core-T-16-384", "bf16")
    assert (model.precision, model.tower.precision, model.tower.stride) == ("bf16", "bf16", 8)


def test_an_unknown_tower_stops_with_the_choices(run_train, tmp_path):
    with pytest.raises(SystemExit, match=r"unknown image tower 'ViT-Z-99'; choose from .*ViT-B-16"):
        run_train(tmp_path / "run", "--clip", "ViT-Z-99", "--clip-weights", "scratch")
    assert not (tmp_path / "run").exists()
