"""Pictures of a scan: colours of classes and instances, a look into the room from above. N points, H, W image size."""

import numpy as np

NO_LABEL = np.array([90, 90, 90], np.uint8)
NO_INSTANCE = np.array([225, 225, 225], np.uint8)


def class_colors(labels, classes):
    """(N,) index of scenes.folder.Classes or IGNORE -> (N, 3) u8."""
    own = np.array(classes.colors or instance_colors(np.arange(len(classes.names)) + 1), np.uint8)
    return np.vstack([own, NO_LABEL])[labels]  # IGNORE, -1, is the last


def instance_colors(instance, like=None):
    """(N,) ids, 0 = none -> (N, 3) u8, neighbouring ids far apart in hue. With like (N,), another labelling of the
    points, each instance takes the colour of the one there that shares most of its points, if over half of them."""
    ids, inverse = np.unique(instance, return_inverse=True)
    key = ids.copy()
    for i, number in enumerate(ids if like is not None else ()):
        there, count = np.unique(like[instance == number], return_counts=True)
        if number and there[count.argmax()] and 2 * count.max() > count.sum():
            key[i] = there[count.argmax()]
    hue, level = key * 0.618 % 1, 0.75 + 0.25 * (key * 0.38 % 1)  # steps of the golden ratio
    ramp = np.clip(np.abs((hue[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    color = (255 * level[:, None] * (0.3 + 0.7 * ramp)).astype(np.uint8)
    color[ids == 0] = NO_INSTANCE
    return color[inverse.ravel()]


def render(coord, normal, color, size=(720, 600), azimuth=-60, elevation=50):
    """Look into a room from above, as into a doll's house: surfaces that turn away from the viewer are left out.

    coord, normal: (N, 3) metres and unit.  color: (N, 3) u8.  size: (W, H).  azimuth, elevation: degrees.
    Returns (H, W, 3) u8 on white. Orthographic; every point is a small square, the nearest one wins.
    """
    width, height = size
    az, el = np.radians([azimuth, elevation])
    toward = np.array([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)])  # scene -> viewer
    right = np.array([-np.sin(az), np.cos(az), 0])
    up = np.cross(toward, right)
    front = (normal @ toward > 0) | (np.abs(normal).sum(1) == 0)
    shade = 0.7 + 0.3 * np.clip(normal @ (0.5 * toward + 0.4 * up + 0.6 * right), 0, 1)
    x, y = coord @ right, coord @ up
    span = max(np.ptp(x) / width, np.ptp(y) / height, 1e-6) * 1.04  # metres a pixel
    column = (x - (x.max() + x.min()) / 2)[front] / span + width / 2
    row = height / 2 - (y - (y.max() + y.min()) / 2)[front] / span
    square = int(np.clip(round(2.0 * (width * height / max(1, front.sum())) ** 0.5), 1, 9))
    offsets = np.stack(np.meshgrid(*2 * [np.arange(square) - square // 2 + 4]), -1).reshape(-1, 2)
    order = np.argsort((coord @ toward)[front], kind="stable")  # far to near: what is painted last stays
    c, r = (np.stack([column, row], 1).astype(int)[order, None] + offsets).reshape(-1, 2).T  # pixels of all squares
    image = np.full((height + 8, width + 8, 3), 255, np.uint8)  # with room for half a square on each side
    image[r, c] = (color[front] * shade[front, None]).astype(np.uint8)[order].repeat(len(offsets), 0)
    return image[4:-4, 4:-4]


def draw(path, scene, labels, instance, true_instance, title):
    """One picture: input colours, classes, instances, below them the ground truth where there is one; and a legend.

    scene: dict with coord, normal, color, classes and segment (or None).  labels, instance, true_instance: (N,), as
    predict.py.
    """
    from matplotlib.figure import Figure  # not at the top: it takes a second
    from matplotlib.patches import Patch

    classes, panels, shown = scene["classes"], [("input colours", scene["color"])], set(labels.tolist())
    panels += [("classes", class_colors(labels, classes)), ("instances", instance_colors(instance, true_instance))]
    if scene["segment"] is not None:
        panels += [None, ("classes, ground truth", class_colors(scene["segment"], classes)),
                   ("instances, ground truth", instance_colors(true_instance))]
        shown |= set(scene["segment"].tolist())
    figure = Figure(figsize=(16.2, 5.3 * len(panels) / 3), dpi=100, layout="constrained")
    for axis, panel in zip(figure.subplots(len(panels) // 3, 3, squeeze=False).flat, panels):
        axis.axis("off")
        if panel:
            axis.imshow(render(scene["coord"], scene["normal"], panel[1]))
            axis.set_title(panel[0], fontsize=13)
    shown = sorted(shown, key=lambda k: k % (len(classes.names) + 1))  # IGNORE comes last
    colors = dict(zip([[*classes.names, "no label"][k] for k in shown], class_colors(shown, classes)))
    figure.legend(handles=[Patch(facecolor=color / 255, label=name) for name, color in colors.items()],
                  loc="outside lower center", ncols=min(10, len(colors)), frameon=False)
    figure.suptitle(title, fontsize=14, parse_math=False)  # a $ in it is one
    figure.savefig(path)
