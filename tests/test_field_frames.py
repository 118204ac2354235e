"""What people really bring: scans far off, in other units, with another axis up, other cameras, frames of any name."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData
from test_folder import camera_to_world, write_ply, write_scene
from test_predict import failure
from test_predict import run as predict_main
from test_report import make_log, verdict

import predict
from data import SceneDataset
from scenes import submit
from scenes.folder import SCANNET20, UNITS, UP, load_frames, load_scene, looks_like, read_scan, usable_frames
from scenes.frames import doubt_cameras, warn
from scenes.scannet import FRAME_PARTS

FAR = np.array([431_000.25, 5_290_000.5, 320.0])
SIZE = (64, 48)


@pytest.fixture
def run(checkpoints, monkeypatch):
    """Function: predict.py without pictures, of an untrained network."""
    monkeypatch.setattr(predict, "draw", lambda *_: None)
    return lambda *scans, out: predict_main(checkpoints["bifusion"], *scans, out=out)


def turn(up):
    """The rotation (3, 3) that takes the axes of a file to z up."""
    return np.sign(UP[up])[:, None] * np.eye(3)[np.abs(UP[up]) - 1]


def changed(room, out, points=lambda coord: coord, pose=lambda matrix: matrix):
    """A copy of a scene folder with other coordinates and poses."""
    shutil.copytree(room, out)
    np.save(out / "coord.npy", points(np.load(room / "coord.npy")))
    for file in out.glob("pose/*.txt"):
        np.savetxt(file, pose(np.loadtxt(file)), fmt="%.9f")
    return out


def moved(room, out):
    return changed(room, out, lambda coord: coord + FAR, lambda pose: pose + np.pad(FAR[:, None], ((0, 1), (3, 0))))


def dataset(folder):
    return SceneDataset(folder.parent.parent, folder.parent.name, voxel_size=0.25, views=4, image_size=SIZE)


def written(out, name):
    vertex = PlyData.read(out / f"{name}_semantic.ply")["vertex"]
    return np.stack([vertex[axis] for axis in "xyz"], 1), vertex["label"]


# ---- far from the origin

def test_a_scene_far_off_is_trained_on_like_one_at_the_origin(room, tmp_path):
    far = moved(room, tmp_path / "val" / "far")
    scene, there = load_scene(room), load_scene(far)
    assert np.abs(there["coord"]).max() < 20 and there["coord"].dtype == np.float32
    np.testing.assert_allclose(there["coord"] - there["file_to_world"][:3, 3] - FAR, scene["coord"], atol=1e-6)
    near_item = next(item for item in dataset(room) if item["name"] == room.name)
    (far_item,) = dataset(far)
    np.testing.assert_array_equal(far_item["grid_coord"], near_item["grid_coord"])
    for key in ("depth", "image", "segment", "normal"):
        np.testing.assert_array_equal(far_item[key], near_item[key])
    for coord, frames in ((near_item["world_coord"], near_item), (far_item["world_coord"], far_item)):
        seen = frames["world_to_camera"][:, :3, :3] @ coord.T + frames["world_to_camera"][:, :3, 3:]  # (V, 3, M)
        frames["in_camera"] = seen
    np.testing.assert_allclose(far_item["in_camera"], near_item["in_camera"], atol=1e-4)  # 0.5 m in f32


def test_a_scan_far_off_is_predicted_and_submitted_as_at_the_origin_and_written_where_it_was(
        checkpoints, run, room, tmp_path, capsys):
    far, coord = moved(room, tmp_path / "val" / "far"), np.load(room / "coord.npy")
    write_ply(tmp_path / "far_mm.ply", 1000 * (coord + FAR))
    write_ply(tmp_path / "near.ply", coord)
    run(room, far, tmp_path / "near.ply", out=tmp_path)
    run(tmp_path / "far_mm.ply", "--scale", "0.001", out=tmp_path)
    (_, near_label), (there, far_label) = written(tmp_path, room.name), written(tmp_path, "far")
    np.testing.assert_allclose(there, coord + FAR, atol=1e-3, rtol=0)
    assert (near_label == far_label).mean() > 0.999 and len(np.unique(near_label)) > 1
    seen = re.findall(r"(\S+), mIoU .* (\d+%) seen by frames", capsys.readouterr().out)
    assert [name for name, _ in seen] == [room.name, "far"] and len({share for _, share in seen}) == 1
    (mm, mm_label), (_, label) = written(tmp_path, "far_mm"), written(tmp_path, "near")
    np.testing.assert_allclose(mm, 1000 * (coord + FAR), atol=1, rtol=0)  # 1 mm
    assert (mm_label == label).mean() > 0.999
    packed = submit.submit(checkpoints["bifusion"], tmp_path, "val", tmp_path / "submission")
    np.testing.assert_array_equal(far_label, np.array(submit.ZipFile(packed[0]).read("far.txt").split(), int))


def test_coordinates_that_are_already_coarse_are_said_and_one_point_far_off_moves_nothing(tmp_path):
    coord = np.random.default_rng(0).uniform(0, 3, (400, 3))
    for kind, said in (("f4", ["coordinates near 5290002 in float32 are exact to 0.5: export doubles"]), ("f8", [])):
        np.save(tmp_path / f"{kind}.npy", (coord + FAR).astype(kind))
        assert read_scan(tmp_path / f"{kind}.npy")[1] == ["no colours: taken as grey", *said, "no frames: 3D only"]
    coord[7] = 1e6
    np.save(tmp_path / "one.npy", coord)
    scene, _ = read_scan(tmp_path / "one.npy")
    assert not scene["file_to_world"][:3, 3].any() and np.array_equal(scene["coord"], coord.astype("f4"))


# ---- units and the axis that points up

@pytest.mark.parametrize("unit", UNITS)
def test_units_are_told_by_the_size_of_a_room_with_the_flag_that_mends_them(tiny_rooms, unit):
    for folder in tiny_rooms.glob("*/*"):
        coord = np.load(folder / "coord.npy")
        (said,) = looks_like("scan", (coord / UNITS[unit]).astype(np.float32))
        assert f"the units look like {unit} (a guess), --scale {UNITS[unit]} makes metres" in said
        assert looks_like("scan", coord / UNITS[unit] * UNITS[unit]) == []
    cube = (coord - coord.min(0)) / np.ptp(coord, axis=0).max()
    for edge in (1, 2):
        assert "exactly 1 or 2 long, as normalised scans are: --scale" in looks_like("scan", edge * cube)[0]


def test_what_no_building_measures_is_refused_at_once_unless_the_scale_is_given(checkpoints, room, tmp_path):
    coord = np.load(room / "coord.npy")
    for factor, flag in ((1000, 0.001), (100, 0.01), (39.37, 0.0254)):
        write_ply(tmp_path / "scan.ply", coord * factor)
        message = failure(checkpoints["baseline"], tmp_path / "scan.ply", out=tmp_path)
        assert f"--scale {flag} makes metres, --scale 1 takes it as it is" in message
        scene, notes = read_scan(tmp_path / "scan.ply", scale=1)
        np.testing.assert_array_equal(scene["coord"], (coord * factor).astype("f4"))
        assert f"--scale {flag} makes metres" in notes[1]
    assert "--scale must be above 0, got -1.0" in failure(checkpoints["baseline"], room, "--scale", "-1", out=tmp_path)
    for size in ((120, 40, 3), (40, 25, 6.5), (45, 27, 9), (60, 40, 10), (40, 15, 15), (60, 1.6, 2.4), (1.2, 1, 2.4)):
        hall = np.random.default_rng(0).uniform(0, size, (500, 3))
        assert looks_like("scan", hall, refuse=True) == []  # a floor of one storey, halls, a corridor, a closet


@pytest.mark.parametrize("up", UP)
def test_a_floor_across_another_axis_is_said_and_the_flag_gives_the_labels_of_the_scan_that_stands(
        run, room, tiny_rooms, up, tmp_path):
    for folder in tiny_rooms.glob("*/*"):
        said = looks_like("scan", np.load(folder / "coord.npy") @ turn(up))
        assert said == ([] if up == "z" else [f"the floor seems to lie across {up[-1]}: --up" + "= "["-" not in up]
                                              + f"{up} turns it"])
    if up in ("y", "-x"):
        world = np.pad(turn(up).T, (0, 1)) + np.diag([0, 0, 0, 1])
        lies = changed(room, tmp_path / "lies", lambda coord: coord @ turn(up), lambda pose: world @ pose)
        np.save(lies / "normal.npy", np.load(lies / "normal.npy") @ turn(up))
        run(room, out=tmp_path)
        run(lies, f"--up={up}", out=tmp_path)
        (_, label), (coord, turned) = written(tmp_path, room.name), written(tmp_path, "lies")
        np.testing.assert_array_equal(label, turned)
        np.testing.assert_array_equal(coord, np.load(lies / "coord.npy"))


def test_parts_of_rooms_and_tilted_ones_raise_no_alarm_about_their_axis(tiny_rooms):
    tilt = np.deg2rad(20)
    tilted = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    count = 0
    for folder in tiny_rooms.glob("*/*"):
        coord = np.load(folder / "coord.npy")
        x, y, z = (coord < np.median(coord, axis=0)).T
        roof = coord[z & (coord[:, 2] < 0.1)] * [1, 1, 0] + [0, 0, 2.4]
        for part in (coord[x], coord[~x], coord[y], coord[x & y], coord[coord[:, 2] > 0.5],
                     coord[y & (coord[:, 2] > 0.5)], coord[x & ~z], coord @ tilted.T, np.concatenate([coord, roof])):
            assert looks_like("scan", part) == []
            count += len(part) > 100
    assert count == 54


# ---- cameras

OPENGL = np.diag([1.0, -1, -1, 1])


@pytest.mark.parametrize(("pose", "depth", "flags"), [
    (lambda pose: pose, 1, {}), (lambda pose: pose @ OPENGL, 1, {"cameras": "opengl"}),
    (np.linalg.inv, 1, {"cameras": "inverse"}), (lambda pose: pose, 0.1, {"depth_scale": 0.01}),
    (lambda pose: np.linalg.inv(pose @ OPENGL), 1, {"cameras": "inverse-opengl"}),
    (lambda pose: pose, 5, {"depth_scale": 0.0002}),
    (lambda pose: pose @ OPENGL, 4, {"cameras": "opengl", "depth_scale": 0.00025}),
    (lambda pose: pose, np.float32(1), {"depth_scale": 0.001})])
def test_frames_that_see_hardly_a_point_name_the_flags_with_which_they_would(room, tmp_path, pose, depth, flags):
    odd = changed(room, tmp_path / "odd", pose=pose)
    for file in odd.glob("depth/*.png"):
        values = np.asarray(Image.open(file)) * depth
        values = values.astype("u2") if depth == 0.1 else values  # cm
        np.save(file.with_suffix(".npy"), values)
        file.unlink()
    scene = load_scene(odd)
    (*said,) = doubt_cameras(odd, scene, SIZE)
    shown = "".join(f" --{key.replace('_', '-')} {value}" for key, value in flags.items())
    assert bool(said) == bool(flags) and (not said or re.fullmatch(
        rf"frames see \d% of the points; with{shown} [5-9]\d%", said[0]))
    frames, plain = load_frames(odd, [0, 3], SIZE, **flags), load_frames(room, [0, 3], SIZE)
    np.testing.assert_allclose(frames["world_to_camera"], plain["world_to_camera"], atol=1e-6)
    np.testing.assert_allclose(frames["depth"], plain["depth"], rtol=1e-6, atol=0.01 * (depth == 0.1))


def test_the_cameras_are_doubted_by_predict_and_before_training_and_the_flag_mends_them(
        run, room, tiny_rooms, tmp_path, capsys):
    odd = changed(room, tmp_path / "rooms" / "val" / "odd", pose=lambda pose: pose @ OPENGL)
    shutil.copytree(tmp_path / "rooms" / "val", tmp_path / "rooms" / "train")
    run(odd, out=tmp_path)
    said, mended = capsys.readouterr().out, tmp_path / "mended"
    assert re.search(r"^odd: frames see \d% of the points; with --cameras opengl \d\d%$", said, re.MULTILINE)
    mended.mkdir()
    run(odd, "--cameras", "opengl", out=mended)
    run(room, out=mended)
    assert "frames see" not in capsys.readouterr().out
    np.testing.assert_array_equal(written(mended, "odd")[1], written(mended, room.name)[1])
    for root, warned in ((tmp_path / "rooms", True), (tiny_rooms, False)):
        folders = sorted((root / "train").iterdir())[:3]
        warn(folders, SCANNET20, SIZE, images=True)
        out = capsys.readouterr().out
        assert (out.startswith(f"warning: {root}/train/odd: frames see") and "opengl" in out) if warned else out == ""
        warn(folders, SCANNET20, SIZE, images=False)
        assert capsys.readouterr().out == ""


def test_training_warns_before_it_starts(room, run_train, tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        changed(room, tmp_path / "rooms" / split / "odd", lambda coord: (coord * 3.28).astype("f4"))
    run_train(tmp_path / "run", "--data", tmp_path / "rooms", "--stage", 1, "--compress", 1000)
    out = capsys.readouterr().out
    warning = out.index(f"warning: {tmp_path}/rooms/train/odd: ")
    assert "the units look like feet" in out[warning:].splitlines()[0] and warning < out.index("epochs 0-")


def test_the_script_of_the_docs_mends_a_folder(room, tmp_path):
    docs = Path(__file__).parents[1].joinpath("docs/data.md").read_text()
    text = re.search(r"```python\n(.*?)```", docs, re.DOTALL)[1]
    file_to_world = np.eye(4)
    file_to_world[:3, :3] = turn("y")
    odd = changed(room, tmp_path / "train" / "odd", lambda coord: 1000 * (coord @ turn("y")),
                  lambda pose: np.linalg.inv(file_to_world) @ (pose * [1, 1, 1, 1000]) @ OPENGL)
    np.save(odd / "normal.npy", np.load(odd / "normal.npy") @ turn("y"))
    by_flags, _ = read_scan(odd, scale=0.001, up="y")
    frames = load_frames(odd, [1, 4], SIZE, True, by_flags["file_to_world"], "opengl")
    for old, new in (('"ROOT", 1.0', f"{str(tmp_path)!r}, 0.001"),
                     ("TURN = np.eye(3)", f"TURN = np.array({turn('y').tolist()})"),
                     ("CAMERA = np.eye(4)", "CAMERA = np.diag([1, -1, -1, 1])")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    exec(text, {})
    scene, plain, there = load_scene(odd), load_frames(room, [1, 4], SIZE), load_frames(odd, [1, 4], SIZE)
    for key in ("coord", "normal"):
        np.testing.assert_allclose(scene[key], np.load(room / f"{key}.npy"), atol=1e-5)
        np.testing.assert_allclose(by_flags[key], scene[key], atol=1e-5)
    for found in (there, frames):
        np.testing.assert_allclose(found["world_to_camera"], plain["world_to_camera"], atol=1e-5)


def test_frames_whose_intrinsics_or_depth_cannot_belong_to_the_images_are_not_used_and_it_is_said(tmp_path):
    for name, factor, depth in (("quarter", 0.25, SIZE), ("half", 0.5, SIZE), ("twice", 2, SIZE), ("x4", 4, SIZE),
                                ("plain", 1, (32, 24)), ("other aspect", 1, (48, 48)), ("on its side", 1, SIZE[::-1])):
        folder = write_scene(tmp_path / name, frames=(0, 1))
        matrix = np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt")
        matrix[:2] *= factor
        np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", matrix[:3, :3])  # 3x3 will do
        Image.fromarray(np.full(depth[::-1], 1000, np.uint16)).save(folder / "depth" / "0.png")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            usable, notes = usable_frames(folder)
        assert (list(usable), len(notes), len(caught)) == (([0, 1], 0, 0) if name == "plain" else ([], 1, 1))
        assert name == "plain" or (f"color of (64, 48), depth of {depth}, principal point "
                                   f"{[30.08 * factor, 24.96 * factor]}: ") in notes[0]


def test_fusion_is_not_judged_where_the_frames_see_hardly_a_voxel():
    for share, passed in ((0.01, None), (0.049, None), (0.06, True)):
        log = [entry | {"seen_share": share} for entry in make_log()]
        entry = verdict("fusion", log)
        assert entry["passed"] is passed and (passed or f"{share:.1%} of the voxels seen" in entry["figure"])


# ---- frames of any name and form

def named(folder, names):
    """Rename the files of frames; names: {part: name with {i}}."""
    for part, name in names.items():
        for file in list((folder / part).iterdir()):
            file.rename(file.with_name(name.format(i=int(file.stem))))
    return folder


@pytest.mark.parametrize("names", [
    {"color": "{i}.JPG", "depth": "{i}.PNG", "pose": "{i}.TXT"}, {"color": "{i}.jpeg"}, {"color": "{i:06d}.jpg"},
    {"color": "frame-{i:06d}.color.jpg", "depth": "frame-{i:06d}.depth.png", "pose": "frame-{i:06d}.pose.txt"},
    {"color": "scan2_rgb_{i:04d}.Jpeg", "depth": "depth{i}.png", "pose": "{i:09d}.txt"}])
def test_a_frame_is_the_last_number_in_its_names_whatever_stands_around_it(tmp_path, names):
    plain = load_frames(write_scene(tmp_path / "plain", frames=(3, 11)), [3, 11], SIZE)
    folder = named(write_scene(tmp_path / "named", frames=(3, 11)), names)
    (folder / "color" / "._3.jpg").write_bytes(b"left by a Mac")
    assert load_scene(folder)["frame_ids"] == [3, 11] and load_scene(folder)["notes"] == []
    for key, values in load_frames(folder, [3, 11], SIZE).items():
        np.testing.assert_array_equal(values, plain[key])


def test_what_is_dropped_is_said_with_its_cause_and_its_number(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=range(24))
    for i in range(0, 22, 2):
        (folder / "depth" / f"{i}.png").unlink()
    (folder / "pose" / "3.txt").unlink()
    (folder / "color" / "3.jpg").unlink()
    shutil.copy(folder / "color" / "5.jpg", folder / "color" / "0005.png")
    np.savetxt(folder / "pose" / "7.txt", 2 * camera_to_world())
    scene, notes = read_scan(folder)
    assert scene["frame_ids"] == [1, 9, 11, 13, 15, 17, 19, 21, 22, 23] and notes == [
        "11 of 24 frames have no depth: 0, 2, 4, 6, 8, 10, 12, 14, 16, ...",
        "1 of 24 frames have no color and no pose: 3", "1 of 24 frames have 2 color files: 5",
        "1 of 24 frames have a pose that is not rigid: 7"]
    for part in FRAME_PARTS[:1]:
        for file in (folder / part).iterdir():
            file.rename(file.with_suffix(".bmp"))
    with pytest.warns(UserWarning, match="3D-only, none of 24 images used: 11 of 24 frames have no color and"):
        assert load_scene(folder)["frame_ids"] == []


@pytest.mark.parametrize("kind", ["u2 png", "i8 npy", "u2 npy", "f4 npy", "f2 npy", "f8 npy", "f4 tiff", "u2 tif"])
def test_depth_is_millimetres_as_integers_and_metres_as_floats(tmp_path, kind):
    dtype, suffix = kind.split()
    folder = write_scene(tmp_path / "scene", frames=(0,))
    depth = np.random.default_rng(7).choice(np.array([0, 1000, 3000, 20000]), (48, 64))
    values = (depth / 1000 if dtype[0] == "f" else depth).astype(dtype)
    if dtype[0] == "f":
        values[:3, 0] = np.nan, np.inf, -1  # no readings
        depth[:3, 0] = 0
    (folder / "depth" / "0.png").unlink()
    file = folder / "depth" / f"0.{suffix}"
    np.save(file, values) if suffix == "npy" else Image.fromarray(values).save(file)
    assert load_scene(folder)["notes"] == []
    np.testing.assert_allclose(load_frames(folder, [0], SIZE)["depth"][0], depth / 1000, rtol=1e-6)
    assert set(load_frames(folder, [0], (50, 37))["depth"].flat) <= {0, 1, 3, 20}  # never mixed
    np.testing.assert_allclose(load_frames(folder, [0], SIZE, depth_scale=0.5)["depth"][0],
                               depth * (0.0005 if dtype[0] == "f" else 0.5), rtol=1e-6)


def test_colours_of_16_bit_keep_their_brightness(tmp_path):
    folder = write_scene(tmp_path / "scene", frames=(0, 1))
    grey = np.tile(np.arange(64, dtype=np.uint16) * 1000, (48, 1))
    (folder / "color" / "0.jpg").unlink()
    Image.fromarray(grey).save(folder / "color" / "0.png")
    image = load_frames(folder, [0], SIZE)["image"][0]
    np.testing.assert_array_equal(image, np.tile(grey // 257, (3, 1, 1)))
    assert load_scene(folder)["frame_ids"] == [0, 1]


def test_a_photo_of_48_megapixels_is_reduced_while_it_is_decoded_and_a_larger_claim_is_refused(tmp_path, monkeypatch):
    folder = write_scene(tmp_path / "scene", frames=(0,))
    photo = Image.new("L", (8064, 6048), 40)
    photo.paste(220, (4032, 0, 8064, 6048))
    photo.save(folder / "color" / "0.jpg")
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", [[6000, 0, 4031.5], [0, 6000, 3023.5], [0, 0, 1]])
    decoded, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: decoded.append(image.size) or convert(image, mode))
    frames = load_frames(folder, load_scene(folder)["frame_ids"], SIZE)
    assert decoded == [(1008, 756)]
    focal, (left, right) = 6000 / 126, (frames["image"][0, :, :, part] for part in (slice(31), slice(33, 64)))
    np.testing.assert_allclose(frames["intrinsics"][0], [[focal, 0, 31.5], [0, focal, 23.5], [0, 0, 1]], rtol=1e-6)
    assert np.abs(left - 40.0).max() < 3 and np.abs(right - 220.0).max() < 3
    monkeypatch.setattr("scenes.folder.MAX_PIXELS", 10**6)  # of what is decoded: the size of a photo is no matter
    np.testing.assert_array_equal(load_frames(folder, [0], SIZE)["image"], frames["image"])
    (folder / "color" / "0.jpg").unlink()
    photo.resize((1200, 900)).save(folder / "color" / "0.png")  # is decoded whole
    with pytest.raises(ValueError, match=r"0\.png: expected an image, found .* 1200x900 pixels, more than"):
        load_frames(folder, [0], SIZE)
