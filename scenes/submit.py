"""A checkpoint -> the files that the ScanNet benchmark takes.

    python -m scenes.submit runs/bifusion/best.pt --data data/scannet --split val --out submission

Writes <out>/semantic.zip, and <out>/instance.zip if the model finds any instance. The data set is one that
scenes.scannet prepared: points in the order of the mesh's vertices.

Format: kaldir.vc.in.tum.de/scannet_benchmark/documentation. Semantic: <scene>.txt, the id of its class (NYU40 id) a
vertex. Instance: <scene>.txt with lines 'mask file, NYU40 id, confidence', masks with 0 or 1 a vertex.
"""

import argparse
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
from tqdm import tqdm

from predict import open_checkpoint, predict_scene
from scenes.scannet import read_split


def submit(checkpoint, data, split, out, device="cpu"):
    """Label the scenes of a split and pack them; returns a list of the .zip files written.

    Raises FileNotFoundError: a scene of the split is missing.
    """
    data, out = Path(data), Path(out)
    file = data / f"scannetv2_{split}.txt"
    names = read_split(file) if file.is_file() else sorted(p.parent.name for p in data.glob(f"{split}/[!.]*/coord.npy"))
    missing = [name for name in names if not (data / split / name / "coord.npy").is_file()]
    if missing or not names:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} scenes of the split are not in {data / split}, first "
                                f"{', '.join(missing[:3]) or 'none'}; python -m scenes.scannet SCANS --out {data}")
    model, config = open_checkpoint(checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    parts, found = [out / "semantic.unfinished", out / "instance.unfinished"], 0
    with ZipFile(parts[0], "w", ZIP_DEFLATED) as semantic, ZipFile(parts[1], "w", ZIP_DEFLATED) as instance:
        for name in tqdm(names, desc="scenes", unit="scene"):
            scene, prediction = predict_scene(model, config, data / split / name, device)
            count, labels, classes = len(scene["coord"]), prediction["labels"], scene["classes"]
            semantic.writestr(f"{name}.txt", "".join(f"{classes.ids[label]}\n" for label in labels))
            things, lines = np.flatnonzero(~np.isin(prediction["classes"], classes.stuff)), []
            for i, row in enumerate(things):
                path = f"predicted_masks/{name}_{i:03d}.txt"
                mask = np.tile(np.frombuffer(b"0\n", np.uint8), (count, 1))
                mask[prediction["members"][row], 0] = ord("1")
                instance.writestr(path, mask.tobytes())
                lines.append(f"{path} {classes.ids[prediction['classes'][row]]} {prediction['scores'][row]:.6f}\n")
            instance.writestr(f"{name}.txt", "".join(lines))
            found += len(things)
    if not found:
        parts.pop().unlink()
        print("the model finds no instances: semantic files only")
    return [part.replace(part.with_suffix(".zip")) for part in parts]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scenes.submit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="stage3.pt, best.pt, ... of a run")
    parser.add_argument("--data", default="data/scannet", help="prepared data set (default %(default)s)")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="(default %(default)s)")
    parser.add_argument("--out", default="submission", help="folder for the files (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        print("written:", *submit(**vars(args)))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
