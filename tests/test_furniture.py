"""The furniture: what the pack holds and whose it is, the random models, the making of a pack."""

import re
import zipfile
from collections import Counter

import numpy as np
import pytest

from scenes import furniture
from scenes.folder import CLASS_NAMES, STUFF

THINGS = [name for i, name in enumerate(CLASS_NAMES) if i not in STUFF]
ROW = re.compile(r"^\| (\S+/\S+) \| (.+?) \| (\w+) \| ([\d.]+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
SIZES = {  # of the random models of a class: least and most extent along x, y, z
    "window": ((0.5, 0.04, 0.6), (2.5, 0.3, 2.3)), "curtain": ((0.8, 0.03, 0.9), (2.6, 0.15, 2.4)),
    "shower curtain": ((0.8, 0.03, 1.6), (1.9, 0.15, 2.0)), "picture": ((0.2, 0.015, 0.2), (1.5, 0.05, 1.2)),
    "refrigerator": ((0.55, 0.6, 0.8), (0.95, 0.9, 2.0)), "toilet": ((0.34, 0.6, 0.29), (0.5, 0.8, 0.9)),
    "bathtub": ((1.35, 0.6, 0.5), (1.9, 0.9, 0.9)), "counter": ((1.0, 0.5, 0.85), (3.1, 1.9, 1.6)),
    "door": ((0.7, 0.02, 1.9), (1.0, 0.15, 2.2)), "sink": ((0.35, 0.3, 0.15), (0.7, 0.6, 1.2)),
    "bookshelf": ((0.5, 0.25, 0.9), (1.2, 0.4, 2.2))}


@pytest.fixture(scope="module")
def models():
    return furniture.load()


def check(model):
    """What a Model promises."""
    low, high = model.triangles.min((0, 1)), model.triangles.max((0, 1))
    assert (model.triangles.dtype, model.color.dtype) == (np.float32, np.uint8)
    assert model.triangles.shape == (len(model.color), 3, 3) and model.color.shape[1:] == (3,)
    assert 10 <= len(model.color) <= 1500
    assert model.label in (*THINGS, "") and model.place in ("floor", "wall", "top")
    assert model.elevation >= 0 and (model.elevation == 0 or model.place == "wall")
    assert abs(low[2]) < 1e-6 and np.abs(low + high)[:2].max() < 1e-5, "z from 0, the footprint centred"
    np.testing.assert_array_equal(model.size, high - low)
    assert model.size.min() >= 0.02 and model.size.max() <= 4 and model.elevation + high[2] < 2.5


def test_every_model_of_the_pack_keeps_the_contract_and_has_a_name_of_its_own(models):
    for model in models:
        check(model)
    assert len(models) == len({model.name for model in models}) > 300
    assert (furniture.HERE / "furniture.npz").stat().st_size <= 4e6


def test_the_list_names_class_author_and_licence_of_every_model_of_the_pack(models):
    text = (furniture.HERE / "FURNITURE.md").read_text()
    rows = {name: rest for name, *rest in ROW.findall(text)}
    assert len(rows) == text.count("\n| ") - 1 == len(models)
    for model in models:
        label, place, elevation, author, licence = rows[model.name]
        assert (label.strip("-"), place, float(elevation)) == (model.label, model.place, model.elevation)
        assert author.strip() and licence in ("CC0 1.0", "CC-BY 3.0", "CC-BY 3.0 US"), model.name
        assert licence != "CC0 1.0" or model.name.startswith("blendswap-cc-0/")
    assert rows["blendswap-cc-0/winchesterSofa"][-1] == "CC-BY 3.0"  # as the file in its own folder asks
    assert "All were changed" in text


def test_every_thing_of_scannet_has_three_models_or_random_ones(models):
    count = Counter(model.label for model in models)
    assert {label: count[label] for label in THINGS if count[label] < 3 and label not in furniture.RANDOM} == {}
    assert {place for place in ("floor", "wall", "top") if any(m.place == place and not m.label for m in models)} == {
        "floor", "wall", "top"}


def test_fronts_face_minus_y(models):
    """The upper quarter of what has a back rest, head board or tank lies behind its middle, handles lie before it."""
    def upper(model):
        middles = model.triangles.mean(1)
        return middles[middles[:, 2] > 0.75 * model.size[2], 1].mean()

    behind = {label: [upper(model) > 0 for model in models if model.label == label] for label in ("chair", "sofa")}
    assert all(np.mean(found) > 0.9 for found in behind.values()), behind
    assert all(upper(model) > 0 for model in models if model.label == "toilet" and model.place == "floor")
    for seed in range(10):
        toilet, fridge, tub, sink = (furniture.parametric(label, np.random.default_rng(seed))
                                     for label in ("toilet", "refrigerator", "bathtub", "sink"))
        assert toilet.place == "wall" or upper(toilet) > 0.1
        corners, tops = fridge.triangles.reshape(-1, 3), [model.triangles.reshape(-1, 3) for model in (tub, sink)]
        assert all(top[top[:, 2].argmax(), 1] > 0.05 for top in tops), "taps are behind"
        body = corners[np.abs(corners[:, 0]) > 0.49 * fridge.size[0]]
        assert corners[:, 1].min() < body[:, 1].min() - 0.02, "handles are in front"


@pytest.mark.parametrize("label", furniture.RANDOM)
def test_random_models_keep_the_contract_differ_by_seed_and_are_the_same_of_one_seed(label):
    made = [furniture.parametric(label, np.random.default_rng(seed)) for seed in range(30)]
    for model in made:
        check(model)
        assert model.name == model.label == label
    sizes, (least, most) = np.array([model.size for model in made]), SIZES[label]
    assert (sizes.min(0) > np.array(least) - 0.02).all() and (sizes.max(0) < np.array(most) + 0.02).all()
    assert len({model.triangles.tobytes() for model in made}) == len({model.color.tobytes() for model in made}) == 30
    again = furniture.parametric(label, np.random.default_rng(7))
    assert all(np.array_equal(getattr(again, key), getattr(made[7], key)) for key in ("triangles", "color"))


def test_curtains_hang_in_folds_bathtubs_are_hollow_and_pictures_have_several_colours():
    for seed in range(10):
        curtain, tub, picture = (furniture.parametric(label, np.random.default_rng(seed))
                                 for label in ("curtain", "bathtub", "picture"))
        cloth = np.unique(curtain.triangles[12:].reshape(-1, 3), axis=0)  # after the rod; x ascends
        hem = cloth[cloth[:, 2] < 1e-3, 1]
        assert (np.diff(np.sign(np.diff(hem))) != 0).sum() >= 4, "ups and downs of the hem"
        corners = tub.triangles.reshape(-1, 3)
        middle = corners[np.hypot(*corners[:, :2].T) < 0.2, 2]
        assert 0.05 < middle[middle > 0].min() < 0.2 < 0.4 < tub.size[2]
        assert len(np.unique(picture.color, axis=0)) >= 3


def test_the_same_share_of_every_class_is_held_out_on_every_machine(models):
    held, count = (Counter(model.label for model in found) for found in (filter(furniture.hidden, models), models))
    assert all(1 <= held[label] <= 0.34 * n for label, n in count.items() if n >= 3), held
    assert {m.name for m in models if m.label == "bathtub" and furniture.hidden(m)} == {"scopia/islandBath"}


def test_welding_joins_vertices_of_a_cell_and_drops_what_is_left_without_three_corners():
    vertices = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0.001, 0, 0), (5, 5, 5.0)])
    points, faces = furniture.welded(vertices, np.array([(0, 1, 2), (3, 1, 2), (0, 3, 1), (4, 1, 2)]), 0.1)
    np.testing.assert_allclose(sorted(map(tuple, points)), [(0, 1, 0), (0.0005, 0, 0), (1, 0, 0), (5, 5, 5)])
    assert len(faces) == 2, "one of two equal triangles, none with two corners in one cell"


def test_a_pack_is_made_to_the_sizes_of_the_catalogue_with_fronts_colours_and_authors(tmp_path, monkeypatch):
    pytest.importorskip("trimesh")
    obj = ["mtllib chair.mtl"]
    for low, high in (((0, 0, 0), (2, 1, 2)), ((0, 1, 0), (2, 3, 0.2))):  # a seat, a rest; there y is up, z the front
        first = 1 + sum(line.startswith("v ") for line in obj)
        obj += [f"v {x} {y} {z}" for x, y, z in furniture.box(*zip(low, high)).reshape(-1, 3)]
        obj += [f"usemtl {'red' if low[1] else 'blue'}", *(f"f {first + i} {first + i + 1} {first + i + 2}"
                                                           for i in range(0, 36, 3))]
    catalogue = ("name=Test\nid#1=a\nmodel#1=/katorlegaz/chair/chair.obj\nwidth#1=50\ndepth#1=60\nheight#1=90\n"
                 "creator#1=Some One\nid#2=b\nmodel#2=/katorlegaz/car/car.obj\ncreator#2=Not Wanted\n")
    with zipfile.ZipFile(tmp_path / "KatorLegaz.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", catalogue)
        archive.writestr("katorlegaz/chair/chair.obj", "\n".join(obj))
        archive.writestr("katorlegaz/chair/chair.mtl", "newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    (tmp_path / "FURNITURE.md").write_text("Title\n\n| katorlegaz/chair | chair | floor | 0 | | |\n")
    monkeypatch.setattr(furniture, "HERE", tmp_path)
    furniture.make(tmp_path)
    (model,) = furniture.load()
    check(model)
    np.testing.assert_allclose(model.size, (0.5, 0.6, 0.9), atol=1e-3)
    red = (model.color == (255, 0, 0)).all(1)
    rest = model.triangles[red].reshape(-1, 3)
    assert set(map(tuple, model.color)) == {(255, 0, 0), (0, 0, 255)} and len(model.triangles) == 24
    assert rest[:, 1].min() > 0.23 and rest[:, 2].min() == pytest.approx(0.3, abs=1e-3), "the rest is behind and above"
    text = (tmp_path / "FURNITURE.md").read_text()
    assert text == "Title\n\n| katorlegaz/chair | chair | floor | 0 | Some One | CC-BY 3.0 US |\n"
