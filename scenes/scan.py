"""What a hand-held depth camera makes of a room of triangles: frames, and points with all that sensor and tracking do.

The light is soft and uneven, the camera dull. Points are those that frames of a walk see, so with occlusion, a limited
range, holes, drift and noise. Axes: F triangles, R rays, n hits, V views, H, W image.
"""

import math

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from scipy.spatial.transform import Rotation

from scenes.folder import CLASS_NAMES, IGNORE, STUFF
from scenes.generate import FRAMES, choose_views, footprints_overlap, intrinsics_for, rays_of, to_bytes
from scenes.points import complete

PATH_SIZE = (120, 90)               # pixels of the frames that make the points
PITCHES = (0.2, 0.45), (0.5, 0.85)  # rad below the horizon
MOST_POINTS = 75_000
SUBPIXELS = ((0, 0), (-0.33, 0.2), (0.33, -0.2))  # rays of a pixel of a frame, from its centre


class Triangles:
    """Parts of a room as one soup that rays can hit.

    parts: list of (triangles (F, 3, 3) m, color (F, 3) in [0, 1], class name or "", texture, ...). A texture is a
    function of positions (n, 2) m on a level or upright surface -> colours (n, 3); None: the triangles' colours.
    """

    def __init__(self, parts):
        corners, color, names, self.texture, *_ = zip(*parts)
        self.part = np.repeat(np.arange(len(parts)), [*map(len, corners)])                     # (F,)
        self.textured = np.array([texture is not None for texture in self.texture])
        self.corners, self.color = np.concatenate(corners), np.concatenate(color).astype(np.float32)
        self.label = np.array([CLASS_NAMES.index(name) if name else IGNORE for name in names])[self.part]
        self.instance = np.where((self.label == IGNORE) | np.isin(self.label, STUFF), IGNORE, self.part)
        self.scene = EmbreeScene()
        TriangleMesh(self.scene, self.corners.astype(np.float32))

    def hit(self, origin, directions):
        """First hits of rays from origin (3,) or (R, 3) along directions (R, 3): t (R,), inf where there is none; face
        (R,), -1 there; normal (R, 3), of any length and side."""
        origin = np.ascontiguousarray(np.broadcast_to(origin, directions.shape), np.float32)
        hit = self.scene.run(origin, np.ascontiguousarray(directions, np.float32), output=True)
        return np.where(hit["primID"] >= 0, hit["tfar"], np.float32(np.inf)), hit["primID"], hit["Ng"]

    def paint(self, face, place):
        """Colours (n, 3) of faces (n,) at places (n, 3) on them."""
        color, part = self.color[face], self.part[face]
        for one in np.unique(part[self.textured[part]]):
            rows = np.flatnonzero(part == one)
            a, b, c = self.corners[face[rows[0]]]
            across = np.abs(np.cross(b - a, c - a)).argmax()
            color[rows] = self.texture[one](np.delete(place[rows], across, axis=1))
        return color

    def sample(self, count, rng):
        """Random places (count, 3) on the triangles, evenly by area, and their faces (count,)."""
        a, b, c = self.corners.transpose(1, 0, 2)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
        face = rng.choice(len(area), count, p=area / area.sum())
        return np.einsum("fc,fck->fk", rng.dirichlet(np.ones(3), count), self.corners[face]), face


def render(triangles, light, poses, intrinsics, image_size, offset=(0.0, 0.0)):
    """What perfect cameras, camera_to_world (V, 4, 4), see: depth (V, H, W) m along z, inf where there is nothing; face
    (V, H, W), -1 there; color (V, H, W, 3). offset: of the rays from the pixels' centres."""
    rays = rays_of(intrinsics, image_size, offset)
    directions = (rays @ poses[:, :3, :3].transpose(0, 2, 1)).reshape(-1, 3).astype(np.float32)
    origin = np.repeat(poses[:, :3, 3], len(rays), axis=0).astype(np.float32)
    t, face, normal = triangles.hit(origin, directions)
    rows = np.flatnonzero(face >= 0)
    place, toward, normal = origin[rows] + t[rows, None] * directions[rows], directions[rows], normal[rows]
    normal = normal * -np.sign((normal * toward).sum(1, keepdims=True)) / np.linalg.norm(normal, axis=1, keepdims=True)
    color = np.full(directions.shape, 0.95, np.float32)                                    # the sky
    color[rows] = triangles.paint(face[rows], place) * light(place, normal)[:, None]
    shape = len(poses), *image_size[::-1]
    return t.reshape(shape), face.reshape(shape), color.reshape(*shape, 3)


def lamps(rng, setting, size):
    """The light of a room of a size (3,): function of places and unit normals (n, 3) -> (n,), about 1."""
    uneven, corner, sun = rng.uniform(*setting.light), rng.uniform(0.1, 0.4), rng.normal((0, 0, 1), (0.5, 0.5, 0))
    waves, phases, spots = rng.normal(0, 1.2, (3, 5)), rng.uniform(0, 7, 5), rng.uniform((0, 0, 0.3), size, (3, 3))
    waves, phases, spots, size, sun = (a.astype(np.float32) for a in (waves, phases, spots, size, sun))

    def light(place, normal):
        smooth = np.exp(0.5 * uneven * np.sin(place @ waves + phases).sum(axis=1))
        near = sum(np.exp(-((place - spot) ** 2).sum(axis=1) / 0.8) for spot in spots)
        edge = np.sort(np.minimum(np.abs(place), np.abs(place - size)), axis=1)[:, 1]      # m to where two walls meet
        shade = 0.75 + 0.25 * normal @ (sun / np.linalg.norm(sun))
        return shade * smooth * (1 + 2 * uneven * near) * (1 - corner * np.exp(-edge / 0.3))
    return light


def dull_camera(rng, setting):
    """Function of colours (V, H, W, 3) and gains (V,) -> colours as a camera has them: exposure, vignetting, white
    balance, contrast, noise."""
    exposure, gamma, warm = (rng.uniform(*pair) for pair in (setting.exposure, setting.gamma, setting.warmth))
    white = np.array([1 + warm, 1, 1 - 1.3 * warm]) * rng.uniform(0.97, 1.03, 3)
    dark, saturation, black = rng.uniform(0.05, 0.35), rng.uniform(0.55, 1.05), rng.uniform(0, 0.03)

    def develop(color, gains):
        y, x = (np.linspace(-1, 1, n) for n in color.shape[1:3])
        color = color * gains[:, None, None, None] * exposure * (1 - dark / 2 * (x ** 2 + y[:, None] ** 2))[..., None]
        gray = color.mean(axis=-1, keepdims=True)
        color = ((gray + (color - gray) * saturation) * white).clip(0, 1) ** gamma + black
        return color + rng.normal(0, 0.012, (*color.shape[:3], 1)) + rng.normal(0, 0.008, color.shape)
    return develop


def scan(room, setting, rng, image_size):
    """Walk a camera through a room (size (3,) m, parts as in Triangles, taken: upright boxes that are full).

    Returns points, dict of arrays as a scene folder has them; intrinsics (3, 3); frames, list of (color (H, W, 3) u8,
    depth (H, W) f32 m along z, 0 = none, camera_to_world (4, 4) as the tracking has it, so with its drift).
    """
    def draw(name):
        return rng.uniform(*getattr(setting, name))

    def sense(depth, noise):
        """Depth (V, H, W) as a sensor has it; noise: m at 1 m."""
        holes = rng.random((len(depth), *(-(-n // 8) for n in depth.shape[1:]))) < 0.02
        holes = holes.repeat(8, axis=1).repeat(8, axis=2)[:, :depth.shape[1], :depth.shape[2]]
        noisy = depth + rng.normal(0, noise, depth.shape) * np.minimum(depth, 9) ** 2
        return np.where((depth > reach) | holes | (rng.random(depth.shape) < 0.03), 0, noisy).astype(np.float32)

    triangles, light, develop = Triangles(room.parts), lamps(rng, setting, room.size), dull_camera(rng, setting)
    angle, reach, spacing, drift = math.radians(draw("field_of_view")), draw("reach"), draw("spacing"), draw("drift")
    intrinsics, path_intrinsics = intrinsics_for(image_size, angle), intrinsics_for(PATH_SIZE, angle)
    # the walk: places to stand, at each some directions; tracking errs by place, and never finds the walls' axes
    places = rng.uniform((0.3, 0.3, setting.height[0]), (*room.size[:2] - 0.3, setting.height[1]), (400, 3))
    blocked = [any(footprints_overlap((x, y, 0, 0, 0, z - 0.1, z + 0.1), box, 0.2) for box in room.taken)
               for x, y, z in places]
    places = places[np.argsort(blocked, kind="stable")][:10]
    aims = triangles.sample(3500, rng)[0]
    poses = np.array(choose_views(lambda *ray: triangles.hit(*ray)[0], places, aims[aims[:, 2] < 1.9], path_intrinsics,
                                  PATH_SIZE, rng, reach, setting.views, PITCHES))
    stand = np.unique(poses[:, :3, 3], axis=0, return_inverse=True)[1].ravel()
    tracked, axes = poses.copy(), np.eye(4)
    tracked[:, :3, :3] = Rotation.from_rotvec(rng.normal(0, drift / 3, (10, 3))[stand]).as_matrix() @ poses[:, :3, :3]
    tracked[:, :3, 3] += rng.normal(0, drift, (10, 3))[stand]
    axes[:3, :3] = Rotation.from_euler("z", rng.normal(0, 0.04)).as_matrix()
    tracked = axes @ tracked
    # the points: what the frames of the walk see, one in a cell
    depth, face, color = render(triangles, light, poses, path_intrinsics, PATH_SIZE)
    gains = (0.42 / color.mean(axis=(1, 2, 3))) ** 0.6 * rng.uniform(0.9, 1.1, len(poses))  # the camera exposes itself
    color, depth = develop(color, gains), sense(depth, 0.0005).reshape(len(poses), -1, 1)
    rays, rows = rays_of(path_intrinsics, PATH_SIZE) @ tracked[:, :3, :3].transpose(0, 2, 1), np.flatnonzero(depth)
    coord = (rays * depth + tracked[:, None, :3, 3]).reshape(-1, 3)[rows]
    color, face = color.reshape(-1, 3)[rows], face.ravel()[rows]
    cell = np.floor((coord - coord.min(axis=0)) / spacing).astype(np.int64) @ (1, 2 ** 20, 2 ** 40)
    if not setting.scan:
        coord, face = triangles.sample(MOST_POINTS, rng)
        color, coord, cell = triangles.paint(face, coord), coord @ axes[:3, :3].T, np.arange(MOST_POINTS)
    _, first, row = np.unique(cell, return_index=True, return_inverse=True)
    coord, color = (np.stack([np.bincount(row.ravel(), column) for column in values.T], axis=1) /
                    np.bincount(row.ravel())[:, None] for values in (coord, color))
    keep = np.sort(rng.permutation(len(first))[:MOST_POINTS])
    coord = (coord[keep] + rng.normal(0, draw("noise") * setting.scan, (len(keep), 3))).astype(np.float32)
    face = face[first[keep]]
    instance = np.unique(np.append(IGNORE, triangles.instance[face]), return_inverse=True)[1][1:] - 1
    whole, _ = complete({"coord": coord, "normal": None, "superpoint": None})
    points = {"coord": coord, "color": to_bytes(color[keep]), "normal": whole["normal"],
              "segment20": triangles.label[face].astype(np.int32), "superpoint": whole["superpoint"].astype(np.int32),
              "instance": instance.astype(np.int32)}
    # the frames: those of the walk that show most
    seen = [render(triangles, light, poses[:FRAMES], intrinsics, image_size, at) for at in SUBPIXELS]
    image = to_bytes(develop(np.mean([color for _, _, color in seen], axis=0), gains[:FRAMES]))
    return points, intrinsics, list(zip(image, sense(seen[0][0], 0.0015), tracked))
