"""What a checkpoint scores on a split of any scene folders: mIoU, AP and IoU by class, whole and with inputs blanked.

    python -m experiments.judge runs/bifusion/last.pt                             # the val rooms of its own data
    python -m experiments.judge runs/bifusion/last.pt --split shifted --data data/furnished --inputs "no frames"

Prints a Markdown table, a row a checkpoint and way of blanking (ablate.BLANKED), over all points as train.evaluate.
"""

import argparse
from itertools import islice

from experiments.ablate import BLANKED, judge, open_run, rooms
from train import Config, classes_of


def rows(path, split="val", data=None, inputs=tuple(BLANKED), device=Config.device):
    """Lines of the table, its head first: str. Data None: the checkpoint's own. ValueError: data of other classes."""
    model, config, _ = open_run(path, device)
    config.data = data or config.data
    names = rooms(config, split).classes.names
    if names != classes_of(config).names:
        raise ValueError(f"{path} knows the classes {classes_of(config).names}, {config.data} has {names}: give --data "
                         "of the same classes")
    yield f"| checkpoint, {split} | inputs | mIoU | AP | {' | '.join(names)} |"
    yield "|---" * (4 + len(names)) + "|"
    for name in inputs:
        found = judge(model, config, device, BLANKED[name], split)
        cells = (found["miou"], found.get("AP"), *found["iou"])
        yield f"| {path} | {name} | {' | '.join('-' if x is None or x != x else f'{x:.3f}' for x in cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser("python -m experiments.judge", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--split", default="val", help="folder of scenes below the data's (val)")
    parser.add_argument("--data", help="folder with that split; of the same classes (default: the checkpoint's)")
    parser.add_argument("--inputs", nargs="+", choices=BLANKED, default=["as they are"])
    parser.add_argument("--device", default=Config.device)
    args = parser.parse_args(argv)
    try:
        for i, path in enumerate(args.checkpoint):
            for line in islice(rows(path, args.split, args.data, args.inputs, args.device), 2 * bool(i), None):
                print(line, flush=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
