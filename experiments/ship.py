"""A checkpoint as the weights that come along: what prediction needs, in half precision, compressed.

    python -m experiments.ship runs/furnished/last.pt    # weights/small.pt, which predict.py takes without a checkpoint
"""

import io
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import torch

import runs
from predict import WEIGHTS


def ship(checkpoint, path=WEIGHTS):
    """Write path (.pt) from a checkpoint of train.py: weights as bfloat16, norms whole, config with its classes, no
    optimiser; compressed, which torch.load reads."""
    state, plain = runs.read_checkpoint(checkpoint), io.BytesIO()
    model = {key: value.bfloat16() if value.ndim > 1 else value for key, value in state["model"].items()}
    config = state["config"] | {"data": "", "out": "", "cache": ""}
    torch.save({"model": model, "optimizer": {}, "next": state["next"], "row": state["row"], "ramp": state["ramp"],
                "config": config}, plain)
    Path(path).parent.mkdir(exist_ok=True)
    with ZipFile(plain) as parts, ZipFile(path, "w", ZIP_DEFLATED, compresslevel=9) as small:
        for name in parts.namelist():
            small.writestr(name, parts.read(name))


if __name__ == "__main__":
    ship(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
