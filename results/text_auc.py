"""How well `predict.py --text` ranks the points of a class, over the val rooms: area under the ROC curve, chance 0.5.

    PYTHONPATH=. python results/text_auc.py        # in the project's folder, with data/rooms generated
"""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from data import CLASS_NAMES, load_frames, load_scene
from openvocab import load_clip, search

WORDS = ("cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "desk", "curtain", "toilet", "sink",
         "bathtub")

clip, tokenizer = load_clip("clip_small", "clip_small.pt")
found = {among: {word: [] for word in WORDS} for among in ("all points", "furniture")}
for folder in sorted(path.parent for path in Path("data/rooms/val").glob("*/coord.npy")):
    scene = load_scene(folder)
    frames = {k: torch.from_numpy(v) for k, v in load_frames(folder, scene["frame_ids"], (160, 120)).items()}
    similarity, seen = search(clip, tokenizer, [f"a {w}" for w in WORDS], torch.from_numpy(scene["coord"]), frames)
    similarity, label = similarity.numpy()[seen.numpy()], scene["segment"][seen.numpy()]
    for among, rows in (("all points", label >= 0), ("furniture", label > 1)):
        for i, word in enumerate(WORDS):
            own = label[rows] == CLASS_NAMES.index(word)
            count = own.sum()
            if count >= 50:
                ranks = rankdata(similarity[rows, i])
                above = ranks[own].sum() - count * (count + 1) / 2
                found[among][word].append(above / (count * (len(own) - count)))
for among, words in found.items():
    means = {word: np.mean(values) for word, values in words.items()}
    print(f"{among:10}  mean {np.mean(list(means.values())):.3f} ", "  ".join(f"{w} {v:.2f}" for w, v in means.items()))
