"""Furniture as coloured triangles: a pack of real models and, where these are few, random ones. Loading needs NumPy.

    python -m scenes.furniture sh3d  # makes furniture.npz and FURNITURE.md, 5 minutes

sh3d is the folder of the extracted Debian package sweethome3d-furniture 1.8-1 (dpkg-deb -x), whose libraries are CC0
and CC-BY 3.0. Making needs trimesh and fast-simplification, too.

A class is what ScanNet's own table of labels makes of the thing: "" where that is none of the 20, as a nightstand,
dresser, stool, shelf, lamp, television, stove or plant is; a wardrobe, bench, ottoman, television stand, crib, piano,
radiator, trash can or washing machine is otherfurniture, an armchair a chair, a vanity a cabinet.
"""

import re
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CHOICE = {  # class and place -> the models taken: file names, with the library where two have one
    "chair floor": """cafe-chair mid-century-chair bar-stool dining-chair office-chair blendswap-cc-0/armchair oakChair
        plasticChair sillaBlanca blendswap-cc-0/armchair2 blendswap-cc-0/chair modernArmchair antiqueChair
        blendswap-cc-0/chairWithCushion chair2 blendswap-cc-0/foldingChair osakaChair winchesterArmchair designChair
        thonet cafe_set_mota_chair cafe_set_tonon_chair blendswap-cc-by/chairWithCushion childChair ella_chair_f
        leaf_chair blendswap-cc-by/armchair1 fotel classSeat blendswap-cc-by/foldingChair plaidChair armChair2
        kitchenChair blendswap-cc-by/chair3 blendswap-cc-by/chair4 silla_teca armchair3 scopia/armchair
        scopia/armchair1 scopia/chair3 scopia/chair4 scopia/chair office_chair tubular_chair scopia/armchair2 bar_chair
        kids_desk_chair modern_armchair plastic_chair white_kitchen_chair baby_high_chair children_chair rattanArmchair
        ryokanChair chair-ottoman""",
    "sofa floor": """futon-couch mid-century-bench-sofa mid-century-sofa L_shaped_sofa sofa couch couch2
        blendswap-cc-0/sofa2 winchesterSofa cornerSofa blendswap-cc-by/sofa2 sofa3 couch3 clear_sofa simple_sofa
        beige_sofa_2seats beige_sofa burlap_sofa leather_sofa sofa_white_beige convertible-sofa-BZ-closed
        rattanSofa""",
    "table floor": """cafe-table folding-table glass-dining-table oakTable tableWithTablecloth technicalTable1
        technicalTable2 blendswap-cc-0/table cafe_set_mota_table cafe_set_tonon_table coffeeTable blendswap-cc-by/table
        ext_table black_table saloon_table coffee_table table3 table4 wooden_table_office metal_glass_table
        glass_table_office desk_table living_room_table table_wood_and_iron wooden_office_alder_table bar_table
        wooden_office_pear_table_rect wooden_office_pear_table wooden_office_teak_table white_kitchen_table
        coffee-table2 table-on-trestles table-with-leaning-feet round-table children_table rattanTable dressing-table
        """,
    "desk floor": "custom-desk desk lbDesk biurko3 simpleDesk officeTable kids_desk_table kids_wooden_desk",
    "cabinet floor": """filing-cabinet cupboard televisionCabinet drawersCabinet highCabinet lowerCabinet
        lowerCornerCabinet kitchenDrawersCabinet kitchenLowerCabinet kitchenSmallLowerCabinet modernVanity box_room
        office_box lockedLocker""",
    "cabinet wall": """glassDoorCabinet smallUpperCabinet upperCabinet upperCornerCabinet kitchenSmallUpperCabinet
        kitchenUpperCabinet kitchenGlassDoorCabinet""",
    "bed floor": """blendswap-cc-0/bed1 bed2 bedWithTexture bed3 juniorBed lettoCloud scopia/bed1 iron_bed children_bed
        hospital-bed captains-bed mezzanine-bed day_bed_frame convertible-sofa-BZ-opened air-mattress""",
    "bookshelf floor": """full-bookcase blendswap-cc-0/bookcase verticalShelves blendswap-cc-by/bookcase dining_room
        office_furniture1 kids_shelves utility-shelving shelves""",
    "counter floor": "islandExtension kitchenIsland",
    "refrigerator floor": "fridge refrigerator largeFridge chest-freezer",
    "toilet floor": "toiletsUnit toilets_unit_jay_hardy modernToilet",
    "toilet wall": "urinal small-urinal",
    "sink floor": "washbasin washbasin_jay_hardy",
    "sink wall": "bathroom3 bathroom4 small_lavatory",
    "bathtub floor": "bath_jay_hardy corner_bathtub islandBath",
    "shower curtain wall": "showerCurtain",
    "curtain wall": "curtain",
    "picture wall": "frame1 frame2",
    "door wall": """screen-door exterior-door-01 exterior-door-02 exterior-door-03 exterior-door-05 exterior-door-07
        showerDoor puerta elevator-door glass_door glassDoor2 door double_door_2 double_door_with_little_part
        double_door""",
    "window wall": """window-01 window-08 window-08-02 turn-window window_2x1_medium_with_large_pane
        window_2x1_with_sliders window_2x3_arched window_2x3_regular window_2x3 window_2x4_arched window_2x4 window_2x6
        window_3x1 window_4x1 window_4x3_arched window_4x3 window_4x5""",
    "otherfurniture floor": """residential-trashcan bullet-trash-can recycling-bin dustbin bathroomRadiator radiator
        radiator1 radiator2 radiator3 modernRadiator pianoAQueue piano pianoBench poolTable table_football table_tennis
        wardrobeWithSlidingDoors wardrobe wardrobe1 wardrobe2 tvStand puff katorlegaz/bench blendswap-cc-0/bench chest
        crib babyRockingBed bunkBed washing_machine clothes_washing_machine dryer_machine water_cooler clothes-rack
        clothes-horse step-ladder-metal step-ladder-wood workbench treadmill crate doll-house changing-table
        """,
    "otherfurniture wall": "radiatorAndTowels",
    " floor": """bedsideTable bedsideTable2 dresserWithDrawers silla2 stool stool2 green_stool kitchen_stool
        decorativePlant plant mediumIndoorPlant yuccaPlant maceta ficus suitcase backpack cardboard-box
        open-cardboard-box doubleOven oven stove propane-stove clothes-basket punching-ball fireExtinguisher
        living_lamp umbrellaFolded whiteBoard electricGuitar teddyBear bathmat round-carpet""",
    " wall": """window-blinds wall-flat-tv bathroom-tissue towel-rack wall-lamp-artwork cuckooClock rangeHood
        internal-unity-air-conditioning intercom dart_game wallLight towel3""",
    " top": """apple-ibook-2001 apple-imac-1998 apple_pc laptop led_tv tv microwave small-oven kitchenaid toaster
        coffee-maker coffee-mug bowl wine_bottle desklamp desk_lamp1 desk_lamp2 little_lamp1 little_lamp2 table_lamp
        lamp pedestal-vase-lamp phone inkjet_and_scanner_printer book vase1 vase2 vase3 jar orchids tulips littlePlant
        cactus apples teapot knifeStandSwap speaker2 speaker3 mini_stereo radio folded_clothes handbag briefcase
        aquarium bonsai-tree bowlWithFruits sneakers bandeja dvd breadBox""",
}
TURN = {}  # model -> degrees counter-clockwise from above that bring its front to -y
ELEVATION = {}  # model -> metres, where the catalogue has none or another
LABELS = {f"{library}.sh3f": licence for library, licence in (
    ("BlendSwap-CC-0", "CC0"), ("BlendSwap-CC-BY", "CC-BY 3.0"), ("KatorLegaz", "CC-BY 3.0 US"),
    ("Scopia", "CC-BY 3.0"))}
MOST = 1500  # triangles of a model; of clutter a third


@dataclass(frozen=True, eq=False)
class Model:
    """A piece of furniture. V vertices, F triangles.

    name: str, unique.  label: one of scenes.folder.CLASS_NAMES, or "" for what annotators of ScanNet leave unlabelled.
    place: "floor", "wall" (hangs or is mounted on a wall, its back to it) or "top" (stands on furniture).
    elevation: metres of its lowest point above what it stands on, 0 on floor and top.
    vertices: (V, 3) f32 m, x to the right, y to the back, z up; the footprint is centred at x = y = 0, the lowest point
    has z = 0, the front faces -y.  faces: (F, 3) int32, rows of vertices.  color: (F, 3) u8.
    """

    name: str
    label: str
    place: str
    elevation: float
    vertices: np.ndarray
    faces: np.ndarray
    color: np.ndarray


def _model(name, label, place, elevation, vertices, faces, color):
    low, high = vertices.min(0), vertices.max(0)
    vertices = vertices - [*(low + high)[:2] / 2, low[2]]
    return Model(str(name), str(label), str(place), float(elevation), vertices.astype(np.float32),
                 faces.astype(np.int32), color.astype(np.uint8))


def load():
    """All models of furniture.npz beside this file: tuple of Model, the names unique."""
    with np.load(HERE / "furniture.npz") as pack:
        data = dict(pack)
    parts = [np.split(data[key], np.cumsum(data[count])[:-1]) for key, count in (
        ("vertices", "points"), ("faces", "triangles"), ("color", "triangles"))]
    return tuple(_model(*row[:4], row[4] / 1000, *row[5:]) for row in zip(
        data["name"], data["label"], data["place"], data["elevation"], *parts))


def box(low, high):
    """The triangles of a box: vertices (8, 3), faces (12, 3)."""
    corner = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    faces = np.array([(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6),
                      (0, 2, 6), (0, 6, 4), (1, 5, 7), (1, 7, 3)])
    return np.array(low) + corner * (np.array(high) - low), faces


def parametric(label, rng):
    """A random model; rng: numpy Generator. A first version: boxes."""
    size, place, elevation = {
        "window": ((1.2, 0.08, 1.2), "wall", 0.9), "curtain": ((1.2, 0.1, 2.2), "wall", 0.05),
        "shower curtain": ((1.2, 0.1, 1.8), "wall", 0.2), "picture": ((0.6, 0.03, 0.5), "wall", 1.4),
        "refrigerator": ((0.7, 0.7, 1.8), "floor", 0), "toilet": ((0.4, 0.7, 0.8), "floor", 0),
        "bathtub": ((1.7, 0.75, 0.6), "floor", 0), "counter": ((2.0, 0.6, 0.9), "floor", 0),
        "door": ((0.9, 0.06, 2.05), "wall", 0), "sink": ((0.6, 0.5, 0.85), "floor", 0)}[label]
    vertices, faces = box((0, 0, 0), np.array(size) * rng.uniform(0.8, 1.2, 3))
    return _model(label, label, place, elevation, vertices, faces, np.tile(rng.integers(60, 250, 3), (len(faces), 1)))


def catalogue(folder):
    """Of each library: path of the .sh3f, list of the properties of its models, dict."""
    for path in sorted(Path(folder).rglob("*.sh3f")):
        if path.name in LABELS:
            with zipfile.ZipFile(path) as archive:
                text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
            items = {}
            for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
                items.setdefault(number, {})[field] = value.strip()
            yield path, [*items.values()]


def simplify(vertices, faces, most):
    """Fewer triangles: vertices of one place become one, then edges collapse, then cells of a growing grid do."""
    import fast_simplification

    vertices, same = np.unique(np.round(vertices, 4), axis=0, return_inverse=True)
    faces = whole(same.reshape(-1)[faces])
    if len(faces) > most:
        vertices, faces = fast_simplification.simplify(vertices.astype(np.float32), faces, target_count=most)
        faces = whole(faces)
    cell = 0.005
    while len(faces) > most:
        _, first, same = np.unique(np.round(vertices / cell), axis=0, return_index=True, return_inverse=True)
        vertices, faces, cell = vertices[first], whole(same.reshape(-1)[faces]), cell * 1.2
    return vertices, faces


def whole(faces):
    """The triangles with three corners, each once."""
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    return faces[np.unique(np.sort(faces, axis=1), axis=0, return_index=True)[1]]


def convert(item, folder, most):
    """The model of a catalogue's item: vertices (V, 3) m, faces (F, 3), color (F, 3)."""
    import trimesh
    from scipy.spatial import cKDTree

    scene = trimesh.load_scene(folder / item["model"].lstrip("/"), process=False)
    parts = [part for part in scene.dump() if len(part.faces)]
    turn = np.array(item.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), float).reshape(3, 3)
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) @ turn  # its y is up, its z to the front
    corners = [part.vertices @ turn.T for part in parts]
    low, high = (of(np.concatenate(corners), axis=0) for of in (np.min, np.max))
    size = np.array([float(item[key]) for key in ("width", "depth", "height")]) / 100
    corners = [(corner - low) / np.maximum(high - low, 1e-6) * size for corner in corners]
    share = np.array([len(part.faces) for part in parts], float)
    limit = 4.0
    while np.minimum(share, limit).sum() < min(most, share.sum()) * 0.98:
        limit *= 1.1
    vertices, faces, color, total = [], [], [], 0
    for part, corner, budget in zip(parts, corners, np.minimum(share, limit)):
        points, triangles = simplify(corner, part.faces, int(budget))
        material, uv = getattr(part.visual, "material", None), getattr(part.visual, "uv", None)
        image = getattr(material, "image", None)
        if image is not None and uv is not None and len(uv):
            weights = np.random.default_rng(0).dirichlet(np.ones(3), 16)
            at = np.nan_to_num(np.einsum("sc,fck->fsk", weights, uv[part.faces])) % 1
            pixels = np.asarray(image.convert("RGB"))
            across, down = at[..., 0], 1 - at[..., 1]
            seen = pixels[(down * (pixels.shape[0] - 1)).astype(int), (across * (pixels.shape[1] - 1)).astype(int)]
            places = np.einsum("sc,fck->fsk", weights, corner[part.faces]).reshape(-1, 3)
            near = cKDTree(places).query(points[triangles].mean(1), k=16)[1]
            paint = seen.reshape(-1, 3)[near].mean(1) if len(triangles) else np.zeros((0, 3))
        else:
            paint = np.tile(np.asarray(getattr(material, "diffuse", [128] * 4))[:3], (len(triangles), 1))
        vertices.append(points)
        faces.append(triangles + total)
        color.append(paint)
        total += len(points)
    vertices, faces, color = map(np.concatenate, (vertices, faces, color))
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used], faces.reshape(-1, 3), color


def make(folder):
    """Write furniture.npz and FURNITURE.md from the folder of the extracted package."""
    wanted = {name: key.rpartition(" ")[::2] for key, names in CHOICE.items() for name in names.split()}
    rows, lines = [], []
    for path, items in catalogue(folder):
        with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(path) as archive:
            archive.extractall(place)
            for item in items:
                library, stem = item["model"].split("/")[1], Path(item["model"]).stem
                name = next((name for name in (stem, f"{library}/{stem}") if name in wanted), None)
                if name is None:
                    continue
                label, where = wanted.pop(name)
                vertices, faces, color = convert(item, Path(place), MOST if label else MOST // 3)
                rows.append((name, label, where, float(item.get("elevation", 0)) / 100, vertices, faces, color))
                lines.append(f"| {name} | {label or '-'} | {path.stem} | {item.get('creator')} | {LABELS[path.name]} |")
    assert not wanted, f"not in the catalogues: {[*wanted]}"
    columns = dict(zip(("name", "label", "place", "elevation", "vertices", "faces", "color"), zip(*rows)))
    np.savez_compressed(
        HERE / "furniture.npz", **{key: np.array(columns[key]) for key in ("name", "label", "place")},
        elevation=np.float32(columns["elevation"]), points=[*map(len, columns["vertices"])],
        triangles=[*map(len, columns["faces"])],
        vertices=np.round(np.concatenate([v - v.min(0) for v in columns["vertices"]]) * 1000).astype(np.uint16),
        faces=np.concatenate(columns["faces"]).astype(np.uint16), color=np.concatenate(columns["color"]).astype("u1"))
    (HERE / "FURNITURE.md").write_text("\n".join([
        "# The furniture of furniture.npz", "", "| model | class | library | author | licence |",
        "|---|---|---|---|---|", *lines, ""]))


if __name__ == "__main__":
    make(sys.argv[1])
