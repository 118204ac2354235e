"""Tests of tower.MapCache and of training with it: what is read is what the tower computes, or nothing."""

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import stages
import tower as tower_module
import train
from conftest import SMALL_IMAGE
from data import SceneDataset, Scenes, collate
from tower import LITE0, ClipTower, MapCache

SIZE = (40, 30)


class Views:
    """Five views, each a colour and a depth file of a folder; view: its number."""

    def __init__(self, folder):
        self.folder = folder
        for i in range(5):
            self.write(i, seed=i)

    def write(self, i, seed):
        rng, (width, height) = np.random.default_rng(seed), SIZE
        np.save(self.folder / f"color{i}.npy", rng.integers(0, 256, (3, height, width), np.uint8))
        np.save(self.folder / f"depth{i}.npy", rng.uniform(0.5, 4, (height, width)).astype(np.float32))

    def files(self, views=range(5)):
        return {i: (self.folder / f"color{i}.npy", self.folder / f"depth{i}.npy") for i in views}

    def load(self, i):
        return tuple(np.load(path) for path in self.files([i])[i])

    def fill(self, cache, views=range(5), **options):
        return cache.fill(self.files(views), self.load, **options)

    def cache(self, tower, limit_gb=1.0, image_size=SIZE):
        return MapCache(self.folder / "cache", tower, image_size, limit_gb)


@pytest.fixture
def tower(make_model):
    return make_model(pretrained=True).tower.eval()


@pytest.fixture
def views(tmp_path):
    return Views(tmp_path)


@pytest.fixture
def filled(views, tower):
    cache = views.cache(tower)
    assert views.fill(cache) is True
    return cache


def is_hit(cache, tower, views, i):
    with torch.no_grad():
        expected = tower.encode(*(torch.from_numpy(array)[None] for array in views.load(i)))
    levels = cache.read(i)
    return levels is not None and all(
        level.dtype == np.float16 and np.allclose(level, own[0].numpy(), rtol=1e-3, atol=1e-4)
        for level, own in zip(levels, expected, strict=True))


def entries(cache):
    return {path: path.read_bytes() for path in sorted(cache.folder.glob("*"))}


def test_a_hit_is_the_towers_own_output_in_half_precision(views, tower, capsys):
    cache = views.cache(tower)
    assert cache.read(0) is None
    assert views.fill(cache, range(3)) is True
    assert capsys.readouterr().out == ""
    assert all(is_hit(cache, tower, views, i) for i in range(3))
    assert cache.read(3) is None
    assert [len(entry) for entry in entries(cache).values()] == 3 * [cache.entry_bytes]
    assert not np.array_equal(cache.read(0)[0], cache.read(1)[0])
    assert cache.shapes == [level.shape for level in cache.read(0)]


def test_a_read_opens_the_entry_and_neither_of_the_images_and_a_fill_that_misses_nothing_opens_no_entry(
        views, filled, monkeypatch):
    opened, real = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda path, dtype: opened.append(path) or real(path, dtype))
    assert views.fill(filled) is True and not opened
    shutil.move(views.folder / "color0.npy", views.folder / "elsewhere")
    assert filled.read(0) is not None
    assert opened == [filled.paths[0]]


@pytest.mark.parametrize("gone", [(0,), (1, 2), (4, 3, 0)])
def test_a_fill_computes_chunks_of_which_something_is_missing_whole_and_writes_what_is_missing_with_the_same_bits(
        views, tower, monkeypatch, gone):
    monkeypatch.setattr(tower_module, "VIEW_CHUNK", 2)
    views.write(5, seed=0)  # the bytes of view 0: one entry for both
    cache, counted = views.cache(tower), []

    def encode(image, depth):
        counted.append(len(image))
        return [level + len(image) for level in ClipTower.encode(tower, image, depth)]  # shows who was beside it

    tower.encode = encode
    assert views.fill(cache, range(6)) is True and counted == [2, 2, 1]
    whole, numbers = entries(cache), {path: path.stat().st_ino for path in entries(cache)}
    assert len(whole) == 5 and cache.paths[5] == cache.paths[0]
    for i in gone:
        cache.paths[i].unlink()
    counted.clear()
    assert views.fill(cache, range(6)) is True and entries(cache) == whole
    assert sum(counted) == sum({0: 2, 1: 2, 2: 1}[chunk] for chunk in {i // 2 for i in gone})
    left = whole.keys() - {cache.paths[i] for i in gone}
    assert all(path.stat().st_ino == numbers[path] for path in left)


def test_several_threads_fill_it_and_a_pickled_copy_reads_it_without_a_tower(views, tower):
    cache = views.cache(tower)
    assert views.fill(cache, workers=3) is True
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.tower is None
    assert all(is_hit(copy, tower, views, i) for i in range(5))


def test_two_processes_share_the_chunks_and_end_with_the_bits_of_one(views, filled, tower, monkeypatch):
    monkeypatch.setattr(tower_module, "VIEW_CHUNK", 2)
    tower.encode = lambda image, depth: [level + len(image) for level in ClipTower.encode(tower, image, depth)]  # shows
    shutil.rmtree(filled.root)
    assert views.fill(filled) is True
    whole = entries(filled)
    shutil.rmtree(filled.root)
    assert views.fill(filled, share=(1, 2)) is True  # the second of three chunks
    assert set(entries(filled)) == {filled.paths[2], filled.paths[3]} and filled.read(0) is None
    assert views.fill(filled, share=(0, 2)) is True and entries(filled) == whole


def test_the_model_gives_nearly_the_same_from_the_maps_as_from_the_images(make_model, make_batch, row, put):
    model, batch = put(make_model(pretrained=True), row(50, pretrained=True)).eval(), make_batch()
    with torch.no_grad():
        expected = model(batch)
        levels = {f"level_{k}": x.half() for k, x in enumerate(model.tower.encode(batch["image"], batch["depth"]))}
        out = model(batch | {"image": torch.zeros(4, 3, 0, 0)} | levels)
    assert torch.allclose(out["feat_2d"], expected["feat_2d"], atol=1e-2)
    assert torch.allclose(out["logits"], expected["logits"], atol=1e-2)
    assert not torch.equal(out["logits"], expected["logits"])


def test_another_image_or_depth_is_another_entry_and_a_renamed_file_is_not(views, filled, tower):
    whole = entries(filled)
    views.write(7, seed=70)
    for name in ("color0", "depth1"):
        (views.folder / f"{name}.npy").write_bytes((views.folder / f"{name[:-1]}7.npy").read_bytes())
    for name in ("color", "depth"):
        (views.folder / f"{name}3.npy").rename(views.folder / f"{name}8.npy")
    assert views.fill(filled, (0, 1, 2, 8)) is True
    assert all(is_hit(filled, tower, views, i) for i in (0, 1, 2, 8))
    assert len(entries(filled)) == len(whole) + 2


@torch.no_grad()
@pytest.mark.parametrize("change", ["weight", "depth", "statistic", "activation", "mean", "precision", "size", "neck"])
def test_another_tower_or_way_to_run_it_never_meets_an_old_entry_but_another_neck_does(views, filled, tower, change):
    net = tower.visual.net
    if change == "activation":  # as GELU and QuickGELU of the same weights
        net.act1 = torch.nn.GELU()
    elif change == "precision":
        tower.precision = "bf16"
    elif change != "size":  # one number of one tensor
        {"weight": net.layer3[0].conv1.weight, "depth": net.conv1.depth.weight, "statistic": net.bn1.running_var,
         "mean": tower.mean, "neck": tower.neck["lateral"][0].weight}[change].view(-1)[0] += 1e-3
    net.bn1.num_batches_tracked += 1  # of no account
    cache = views.cache(tower, image_size=(44, 30) if change == "size" else SIZE)
    assert (cache.folder == filled.folder) == (change == "neck")


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "gone"])
def test_an_entry_of_another_size_is_not_used_and_a_fill_replaces_it_within_the_limit(views, filled, tower, damage):
    filled.limit, path = 5 * filled.entry_bytes, filled.paths[2]  # the damaged one does not count twice
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-1], "longer": whole + b"\0"}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    assert filled.read(2) is None
    assert views.fill(filled) is True
    assert is_hit(filled, tower, views, 2) and path.read_bytes() == whole


def test_a_kill_in_the_middle_leaves_whole_entries_or_none_and_the_next_fill_completes(views, tower, monkeypatch):
    cache, real = views.cache(tower), os.replace
    monkeypatch.setattr(os, "replace", lambda *names: time.sleep(0.2) or real(*names))  # with the file beside its place
    child = multiprocessing.get_context("fork").Process(target=views.fill, args=(cache,))
    child.start()
    until = time.time() + 60
    while len(entries(cache)) < 2 and time.time() < until and child.is_alive():
        time.sleep(0.02)
    time.sleep(0.05)
    child.kill()
    child.join()
    monkeypatch.undo()
    left = entries(cache)
    assert child.exitcode == -signal.SIGKILL and 2 <= len(left) < 5
    assert list(cache.root.glob("*.tmp"))  # it was killed in the middle of one
    assert views.fill(cache) is True
    assert all(is_hit(cache, tower, views, i) for i in range(5)) and left.items() <= entries(cache).items()


def test_a_stop_ends_a_fill_after_the_chunk_in_hand_and_the_next_one_completes_it_bit_for_bit(
        views, filled, tower, monkeypatch, capsys):
    monkeypatch.setattr(tower_module, "VIEW_CHUNK", 2)
    shutil.rmtree(filled.root)
    views.fill(filled)
    whole = entries(filled)
    shutil.rmtree(filled.root)

    def until(items):
        for item in items:
            if entries(filled):
                return
            yield item

    assert views.fill(filled, until=until) is False
    assert capsys.readouterr().out == "frozen tower: stopped after 2 of 5 maps; these are kept\n"
    assert len(entries(filled)) == 2
    assert views.fill(filled, until=until) is False  # before it knows what is missing
    assert views.fill(filled) is True
    assert entries(filled) == whole


@pytest.mark.parametrize("named", [2, 0])
def test_an_image_that_cannot_be_read_is_not_blamed_on_the_folder_of_the_maps(views, tower, capsys, named):
    (views.folder / "color2.npy").unlink()
    with pytest.raises(FileNotFoundError, match="color2"):  # while it is named, or loaded
        views.cache(tower).fill({2: views.files()[named]}, views.load)
    assert capsys.readouterr().out == ""


def test_more_than_the_limit_gives_false_and_a_line_and_writes_nothing(views, tower, capsys):
    entry = views.cache(tower).entry_bytes / 1e9
    cache = views.cache(tower, 2.5 * entry)
    assert views.fill(cache) is False
    said = capsys.readouterr().out
    assert f"kept in {cache.root} (they need" in said and f"delete all subfolders but {cache.folder.name}" in said
    assert "raise it" in said and said.endswith("; the tower runs in every step instead\n") and said.count("\n") == 1
    assert not cache.root.exists()
    assert views.fill(cache, range(2)) is True
    assert views.fill(cache, range(2, 3)) is False  # the old ones count
    assert views.fill(cache, range(2)) is True  # and nothing more is needed for these
    tower.precision = "bf16"
    assert views.fill(views.cache(tower, 2.5 * entry), range(1)) is False  # those of others too


@pytest.mark.parametrize(("place", "name", "kept"), [(Path, "write_bytes", 2), (os, "replace", 2), (Path, "mkdir", 0)])
def test_a_full_disk_gives_false_and_a_line_and_leaves_no_half_file(
        views, tower, capsys, monkeypatch, place, name, kept):
    cache, count, real = views.cache(tower), iter(range(99)), getattr(place, name)

    def fails_at_the_third(*args, **kwargs):
        if next(count) < 2:
            return real(*args, **kwargs)
        if name == "write_bytes":
            real(args[0], args[1][:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, name, fails_at_the_third)
    assert views.fill(cache) is False
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "No space left on device" in said and said.endswith("; the tower runs in every step instead\n")
    assert not list(cache.root.glob("*.tmp")) and len(entries(cache)) == kept
    assert views.fill(cache) is True


def test_a_file_where_the_folder_should_be_gives_false_and_a_line(views, tower, capsys):
    cache = views.cache(tower)
    cache.root.write_text("a file")
    assert views.fill(cache) is False
    assert "cannot be kept in" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1e6, torch.inf, torch.nan])
def test_maps_that_half_precision_cannot_hold_are_not_kept(views, tower, capsys, value):
    cache, encode = views.cache(tower), tower.encode
    tower.encode = lambda image, depth: [level + value for level in encode(image, depth)]
    assert views.fill(cache) is False
    assert "half precision" in capsys.readouterr().out
    assert not entries(cache)


@pytest.fixture
def maps(tiny_rooms, tower, tmp_path):
    """Filled maps of the two frames that evaluation takes of each tiny room, and of all frames for training."""
    dataset = SceneDataset(tiny_rooms, "train", voxel_size=0.25, image_size=SMALL_IMAGE, views=2, augment=True)
    cache = MapCache(tmp_path / "cache", tower, SMALL_IMAGE, 1.0)
    assert cache.fill(dataset.view_files(), dataset.load_view) is True
    return cache


def rooms(root, maps, **options):
    return SceneDataset(root, "train", **{"voxel_size": 0.25, "image_size": SMALL_IMAGE, "views": 2, "maps": maps,
                                          "vary_images": False} | options)


def test_augmented_points_of_every_epoch_meet_the_same_maps_and_nothing_else_changes(tiny_rooms, maps, tower):
    with_maps, plain, coords = rooms(tiny_rooms, maps, augment=True), rooms(tiny_rooms, None, augment=True), set()
    for epoch in range(3):
        item, expected = with_maps[epoch, 0], plain[epoch, 0]
        coords.add(item["coord"].tobytes())
        assert item["image"].shape == (2, 3, 0, 0)
        with torch.no_grad():
            levels = tower.encode(*(torch.from_numpy(expected[key]) for key in ("image", "depth")))
        for k, level in enumerate(levels):
            assert np.allclose(item[f"level_{k}"], level.numpy(), rtol=1e-3, atol=1e-4)
        assert all(np.array_equal(expected[key], item[key]) for key in expected if key != "image")
    assert len(coords) == 3


def test_scenes_with_and_without_frames_make_one_batch_of_maps(tiny_rooms, maps):
    batch = collate([rooms(tiny_rooms, maps, views=0)[0], rooms(tiny_rooms, maps)[1]])
    assert batch["view_batch"].tolist() == [1, 1] and len(batch["depth"]) == 2
    assert [tuple(batch[f"level_{k}"].shape) for k in range(3)] == [(2, *shape) for shape in maps.shapes]


def test_a_map_that_is_gone_or_damaged_is_an_error_that_says_what_to_do(tiny_rooms, maps):
    dataset = rooms(tiny_rooms, maps)
    _, frame = view = next(iter(dataset.view_files()))
    maps.paths[view].write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"maps of frame {frame} of .* are gone or damaged; go on with --resume"):
        dataset[0]
    assert maps.fill(dataset.view_files(), dataset.load_view) is True
    assert len(dataset[0]["level_0"]) == 2


@pytest.mark.parametrize(("cache_gb", "blank", "frozen"), [(0, 0, True), (1, 0.1, True), (1, 0, False), (1, 0, True)])
def test_no_maps_are_made_where_the_limit_is_zero_scenes_are_blanked_or_the_tower_trains(
        tiny_rooms, tower, tmp_path, cache_gb, blank, frozen):
    scenes = Scenes(tiny_rooms, 0.25, SMALL_IMAGE, 2, 0, 0, torch.device("cpu"), tmp_path / "maps", cache_gb)
    scenes.read(2, blank, tower if frozen else None)
    made = cache_gb > 0 and not blank and frozen
    assert (scenes.train.maps is not None) == (scenes.val.maps is not None) == (tmp_path / "maps").exists() == made


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
    """Function: run stage 2 (two epochs), here with the tower frozen to its end, with flags after one and the same
    stage 1, whose weight file is gone by then.

    -> (run folder, lines of the log, passes through the tower in stage 2); the cache folder is one for all.
    """
    folder = tmp_path_factory.mktemp("stage_two")
    cache, first, weights = folder / "cache", folder / "first", folder / "lite0.pt"
    torch.manual_seed(5)
    torch.save(timm.create_model(LITE0[0].removeprefix("timm:")).state_dict(), weights)
    run_train(first, "--stage", 1, "--compress", 21, "--tower-weights", weights)
    weights.unlink()

    def run(name, *flags):
        shutil.copytree(first, folder / name)
        encodes.clear()
        log = run_train(folder / name, "--stage", 2, "--cache", cache, *flags)
        return folder / name, log, list(encodes)

    frozen = tuple(replace(row, trains=tuple({*row.trains} - {"tower"} if row.stage == 2 else row.trains))
                   for row in stages.CURRICULUM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CURRICULUM", frozen)
        yield run


@pytest.fixture(scope="module")
def cached_run(stage_two):
    return stage_two("cached")


def weights_of(out, name="stage2.pt"):
    return torch.load(out / name, weights_only=True)["model"]


def same_weights(one, other):
    ours = weights_of(one)
    return all(torch.equal(ours[key], value) for key, value in weights_of(other).items())


def test_stage_two_runs_the_tower_once_a_view_and_a_second_run_with_workers_meets_the_same_maps(stage_two, cached_run):
    out, log, calls = cached_run
    assert {line["stage"] for line in log} == {1, 2}
    assert calls[0] == (1, False) and not any(takes for _, takes in calls)  # the shapes
    assert len(calls) < sum(line["steps"] for line in log if line["stage"] == 2)
    assert max(views for views, _ in calls) == tower_module.VIEW_CHUNK
    again = stage_two("again", "--workers", 2)
    assert again[2] == [(1, False)] and same_weights(again[0], out)


def test_without_room_for_the_maps_the_run_says_so_and_the_images_lead_to_the_same_weights(stage_two, cached_run,
                                                                                           capsys):
    from_images = stage_two("images", "--cache-gb", 1e-6, "--cache", "elsewhere")
    assert "--cache-gb is 1e-06" in capsys.readouterr().out
    assert len(from_images[2]) >= sum(line["steps"] for line in from_images[1] if line["stage"] == 2)
    start, ours, theirs = weights_of(cached_run[0], "stage1.pt"), weights_of(cached_run[0]), weights_of(from_images[0])
    trained = [key for key in theirs if theirs[key].is_floating_point() and not torch.equal(theirs[key], start[key])]
    assert any(key.startswith("tower.neck") for key in trained)
    assert not any(key.startswith("tower.visual") for key in trained)
    off = sum((ours[key] - theirs[key]).square().sum() for key in trained).sqrt()
    way = sum((theirs[key] - start[key]).square().sum() for key in trained).sqrt()
    assert 0 < off < 0.1 * way
    for line, other in zip(cached_run[1], from_images[1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.01)


def test_damaged_maps_met_in_training_are_an_error_and_resuming_makes_them_anew(stage_two, cached_run, run_train,
                                                                                monkeypatch, tmp_path):
    cache, fill = shutil.copytree(cached_run[0].parent / "cache", tmp_path / "cache"), MapCache.fill
    whole = {path: path.read_bytes() for path in cache.glob("*/*")}

    def fill_and_damage(self, *args):
        done = fill(self, *args)
        for path in whole:
            path.write_bytes(whole[path][:-2])
        return done

    monkeypatch.setattr(MapCache, "fill", fill_and_damage)
    with pytest.raises(SystemExit, match="gone or damaged; go on with --resume, which makes them anew"):
        stage_two("damaged", "--cache", cache)
    monkeypatch.undo()
    out = cached_run[0].parent / "damaged"
    run_train(out, "--resume", "--stage", 2, "--cache", cache)
    assert whole == {path: path.read_bytes() for path in cache.glob("*/*")}
    assert same_weights(out, cached_run[0])


def test_a_pretrained_run_goes_on_through_stage_three_and_predicts_without_its_weight_file(
        cached_run, run_train, encodes, tiny_rooms, tmp_path):
    import predict

    out = shutil.copytree(cached_run[0], tmp_path / "run")
    assert not Path(train.load_model(out / "last.pt")[1].tower_weights).exists()  # gone since stage 1
    encodes.clear()
    log = run_train(out, "--resume")
    assert {line["stage"] for line in log} == {1, 2, 3}
    assert any(takes for _, takes in encodes)  # images again
    assert all(line["skipped_steps"] == 0 and line["loss"] is not None for line in log)
    state, start = weights_of(out, "last.pt"), weights_of(cached_run[0], "last.pt")
    moved = {key for key in start if key.startswith("tower.visual") and not torch.equal(start[key], state[key])}
    weights = {f"tower.visual.{key}" for key, _ in train.load_model(out / "last.pt")[0].tower.visual.named_parameters()}
    assert moved == weights  # all of them, and no statistics of a batch norm
    assert train.load_model(out / "last.pt")[0].tower.pretrained
    predict.main([str(out / "last.pt"), str(next(tiny_rooms.glob("val/*"))), "--out", str(tmp_path / "predicted"),
                  "--device", "cpu"])
    assert list((tmp_path / "predicted").iterdir())


def test_another_tower_by_its_name_trains_from_scratch_in_bf16(run_train, encodes, tmp_path):
    encodes.clear()
    log = run_train(tmp_path / "run", "--compress", 129, "--tower", "PE-Core-T-16-384", "--tower-weights", "scratch",
                    "--precision", "bf16")
    assert sorted({line["stage"] for line in log}) == [1, 2, 3]
    assert all(line["skipped_steps"] == 0 and line["loss"] is not None for line in log)
    assert any(takes for _, takes in encodes) and log[-1]["grad_norm"]["2d"] > 0
    model, config, _ = train.load_model(tmp_path / "run" / "last.pt")
    assert (config.tower, config.precision) == ("PE-Core-T-16-384", "bf16")
    assert (model.precision, model.tower.precision, model.tower.stride) == ("bf16", "bf16", 8)
