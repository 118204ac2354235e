"""A checkpoint as the weights that come along: what prediction needs, in half precision.

    python -m experiments.ship runs/furnished/last.pt    # weights/small.pt, which predict.py takes without a checkpoint
"""

import sys
from pathlib import Path

import torch

import runs
from predict import WEIGHTS


def ship(checkpoint, path=WEIGHTS):
    """Write path (.pt) from a checkpoint of train.py: weights in half precision, config with classes, no optimiser."""
    state = runs.read_checkpoint(checkpoint)
    model = {key: value.half() if value.ndim > 1 else value for key, value in state["model"].items()}
    config = state["config"] | {"data": "", "out": "", "cache": ""}
    Path(path).parent.mkdir(exist_ok=True)
    torch.save({"model": model, "optimizer": {}, "next": state["next"], "row": state["row"], "ramp": state["ramp"],
                "config": config}, path)


if __name__ == "__main__":
    ship(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
