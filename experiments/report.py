"""Runs -> a table, the three success criteria with PASS or FAIL, curves.

    python -m experiments.report runs/fused --against runs/baseline                 # exit code 1 if a criterion fails
    python -m experiments.report runs/fused_s{0,1,2} --against runs/base_s{0,1,2}   # by seed, mean and deviation
    python -m experiments.report runs/fused --classes                               # IoU of every class too

Reads config.json and log.jsonl of each run folder and writes curves.png beside the log. Exit code: 0 no criterion
failed, 1 one failed, 2 a run could not be read.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from itertools import groupby, zip_longest
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from runs import read_log
from scenes.folder import CLASS_NAMES

MIN_STABLE_EPOCHS = 20  # consecutive epochs without a non-finite loss or gradient
FUSION_BAND = (0.3, 0.7)  # where fusion_2d_ratio must stay once the ramp is over, both ends included
MIN_SEEN = 0.05  # share of the voxels that frames must see for a fusion to be judged
SAME_KEYS = ("data", "epochs", "seed", "preset", "compress", "plan", "voxel_size", "batch_size", "lr",
             "weight_decay")  # what two runs must share to be compared
VERDICTS = {True: "PASS", False: "FAIL", None: "n/a"}
STAGES = {1: ("stability", "#eef2f7"), 2: ("alignment", "#fbf4e6"), 3: ("enhancement", "#edf5ee")}  # name, tint
PANELS = {  # title: keys of the log, or dict and key in it, in the order of the colors; what a log lacks is not drawn
    "Losses": ("losses semantic", "losses alignment", "losses instance_cls", "losses instance_bce",
               "losses instance_dice", "losses instance_score", "loss"),
    "Validation mIoU": ("val_miou",),
    "Validation AP of instances": ("val_ap", "val_ap25", "val_ap50"),
    "Share of the 2D branch": ("fusion_2d_ratio", "fusion_ramp"),
    "Gradient norm before clipping": ("grad_norm 3d", "grad_norm 2d", "grad_norm fusion", "grad_norm decoder"),
    "Features of seen voxels": ("rms_3d", "rms_2d", "cosine"),
}  # without the gate prior: the squared distance of fusion_2d_ratio from 0.5, far below the other losses
LOGARITHMIC = ("Losses", "Gradient norm before clipping")
COMPARED = ("val_miou", "val_ap50")  # drawn of every run; all else of the first alone


def read_run(folder):
    """Run folder -> dict of name, folder (Path), config (dict), log (see `read_log`); ValueError if one is broken."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no config.json that can be read ({error}); give the folder of a run that "
                         "train.py wrote, such as runs/<name>") from None
    log = read_log(folder / "log.jsonl")
    if not log:
        raise ValueError(f"{folder / 'log.jsonl'} is missing or holds no whole line; the run has not finished an epoch")
    return {"name": folder.resolve().name, "folder": folder, "config": config, "log": log}


def is_finite(value):
    """True for a finite number; False for None, NaN, infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def numbers(log, key):
    """{epoch: value} of a key of the log, or of a dict and a key in it ("losses semantic"), where it is finite."""
    name, _, inner = key.partition(" ")
    found = {entry["epoch"]: (entry.get(name) or {}).get(inner) if inner else entry.get(name) for entry in log}
    return {epoch: value for epoch, value in found.items() if is_finite(value)}


def mean(lines, key, digits=6):
    """The mean over lines of a number, or of a dict's numbers by name; None where it is nowhere."""
    values = [line[key] for line in lines if line.get(key) is not None]
    if values and isinstance(values[0], dict):
        return {name: mean(values, name, 4) for name in sorted({name for value in values for name in value})}
    return round(statistics.fmean(values), digits) if values else None


def final_miou(log):
    """(epoch, val mIoU) of the last epoch whose val_miou is a number, None if there is none."""
    return next(reversed(numbers(log, "val_miou").items()), None)


def criteria(log, baseline_log=None):
    """Judge a run by its log and the baseline's, or None: stability, performance, fusion; each has a function below.

    A log is `runs.read_log`'s: ascending epochs, each once, at least one; None stands for a number that is not finite.
    Returns list of three dicts: name; figure (str, as printed); passed (None: not judged); detail (str, why).
    """
    judged = {"stability": _stability(log), "performance": _performance(log, baseline_log), "fusion": _fusion(log)}
    return [{"name": name, "figure": figure, "passed": passed,
             "detail": "; ".join(details[:3] + [f"and {len(details) - 3} more"] * (len(details) > 3))}
            for name, (figure, passed, details) in judged.items()]


def _stability(log):
    """Every epoch from 0 to the last is in the log without an `epoch_fault`, and at least 20 follow one another."""
    faults = {entry["epoch"]: epoch_fault(entry) for entry in log}
    faults = [faults.get(epoch, "missing from the log") for epoch in range(log[-1]["epoch"] + 1)]
    bad = [f"epoch {epoch}: {fault}" for epoch, fault in enumerate(faults) if fault]
    longest = max(len(list(group)) * (not fault) for fault, group in groupby(faults))
    finite = f"{len(faults) - len(bad)} of {len(faults)} epochs finite"
    if not bad and longest < MIN_STABLE_EPOCHS:
        bad = [f"too short: at least {MIN_STABLE_EPOCHS} epochs are needed to show stability"]
    return f"{finite}, longest streak {longest} (needs {MIN_STABLE_EPOCHS})", not bad, bad


def epoch_fault(entry):
    """What broke stability in one epoch's log dict: a loss or gradient not finite, a skipped step; "" if nothing did.

    What was trained again after `--resume` counts too: a run that diverged is not stable because it was resumed.
    """
    values = {"loss": entry.get("loss")} | {f"loss {term}": v for term, v in (entry.get("losses") or {}).items()}
    values |= {f"gradient {branch}": norm for branch, norm in (entry.get("grad_norm") or {}).items()}
    faults = [f"{name} is not finite" for name, value in values.items() if not is_finite(value)]
    if entry.get("skipped_steps") != 0:
        faults.append(f"{entry.get('skipped_steps', 'unknown number of')} skipped steps")
    faults += [f"before it was resumed, epoch {old['epoch']}: {epoch_fault(old)}"
               for old in entry.get("replaced", ()) if epoch_fault(old)]
    return ", ".join(faults)


def _performance(log, baseline_log):
    """The last val mIoU lies above the baseline's of the same epoch (equal is not above); None where one is missing."""
    ours, theirs = final_miou(log), final_miou(baseline_log or [])
    figure = f"val mIoU {ours[1]:.4f} at epoch {ours[0]}" if ours else "no val mIoU"
    if baseline_log is None:
        return figure, None, ["no baseline to compare with"]
    if not (ours and theirs):
        return figure, None, [f"no val mIoU in the {'baseline' if ours else 'run'}'s log"]
    if ours[0] != theirs[0]:
        return "not comparable", False, [f"last evaluated at epoch {ours[0]}, the baseline at epoch {theirs[0]}"]
    figure += f", baseline {theirs[1]:.4f}, difference {ours[1] - theirs[1]:+.4f}"
    above = ours[1] > theirs[1]
    return figure, above, [] if above else ["not above the baseline"]


def _fusion(log):
    """fusion_2d_ratio is in [0.3, 0.7] at every epoch with fusion_ramp == 1; None where these see hardly a voxel."""
    fused, (low, high) = [entry for entry in log if (entry.get("fusion_ramp") or 0) >= 1], FUSION_BAND
    if not fused:
        return "no fusion_2d_ratio", None, ["no epoch with fusion after the ramp"]
    if (seen := statistics.mean(numbers(fused, "seen_share").values() or [1])) < MIN_SEEN:
        return f"{seen:.1%} of the voxels seen", None, [f"needs {MIN_SEEN:.0%}; do the cameras belong to the points?"]
    ratios = numbers(fused, "fusion_2d_ratio")
    bad = [f"epoch {entry['epoch']}: {entry.get('fusion_2d_ratio')}" for entry in fused
           if not low <= ratios.get(entry["epoch"], math.nan) <= high]
    span = f"{min(ratios.values()):.3f}..{max(ratios.values()):.3f}" if ratios else "never measured (no voxel was seen)"
    return f"fusion_2d_ratio {span} over {len(fused)} epochs, band {low}..{high}", not bad, bad


def judge(run, baselines):
    """`criteria` of a run against the baseline of its seed; criterion 2 fails where their configs are not one task.

    run is from `read_run`; baselines is {seed: such a run} and may be empty. A baseline itself is not compared.
    """
    is_baseline = run["config"].get("model") == "baseline"
    baseline = None if is_baseline else baselines.get(run["config"].get("seed"))
    entries = criteria(run["log"], baseline and baseline["log"])
    if is_baseline:
        entries[1]["detail"] = "this run is a baseline"
    elif baselines and incomparable(run, baseline):
        entries[1].update(figure="not comparable", passed=False, detail=incomparable(run, baseline))
    return entries


def incomparable(run, baseline):
    """Why a run and a baseline (None: not given) are not one task, as text: keys of the config; "" where they are."""
    if not baseline:
        return f"no baseline with seed {run['config'].get('seed')} given"
    expected = {key: run["config"].get(key) for key in SAME_KEYS} | {"model": "baseline"}
    return "; ".join(f"the baseline's {key} is {baseline['config'].get(key)!r}, expected {value!r}"
                     for key, value in expected.items() if baseline["config"].get(key) != value)


def watched(run):
    """What has no verdict, lines of text: clipped steps and spikes of the log; what `experiments.probe` left."""
    clipped, path, lines = mean(run["log"], "clipped"), run["folder"] / "probe.json", []
    if clipped:
        shares = ", ".join(f"{branch} {share:.2f}" for branch, share in clipped.items())
        lines = [f"steps clipped: {shares}; loss spikes {mean(run['log'], 'spikes'):.4f}"]
    if path.is_file():
        found = json.loads(path.read_text())
        whole, images, points = (found[key] for key in ("as they are", "images black", "points black"))
        lines += [f"gate: deviation of alpha {found['alpha_deviation']:.3f}, AUC {found['alpha_auc']:.3f} "
                  "(a fixed 0.5: 0 and 0.5)",
                  f"mIoU whole {whole:.3f}, images black {images:.3f}, points black {points:.3f}, both "
                  f"{found['both black']:.3f}: images add {whole - images:+.3f}, points {whole - points:+.3f}"]
    return lines


def summary_table(runs):
    """One row a run, as text: epochs logged of those planned, val mIoU and AP, last fusion_2d_ratio, cost."""
    rows = [("run", "model", "seed", "epochs", "best mIoU", "final mIoU", "final AP/50/25", "2D ratio", "skipped",
             "minutes")]
    for run in runs:
        log, config = run["log"], run["config"]
        miou, ratios = numbers(log, "val_miou"), [None, *numbers(log, "fusion_2d_ratio").values()]
        best, final = [f"{miou[e]:.4f} @{e}" for e in (max(miou, key=miou.get), max(miou))] if miou else ("-", "-")
        rows.append((run["name"], config.get("model", "?"), config.get("seed", "?"),
                     f"{len(log)}/{config.get('epochs', '?')}", best, final,
                     "/".join(_number(log[-1].get(key), 3) for key in ("val_ap", "val_ap50", "val_ap25")),
                     _number(ratios[-1], 3), sum(e.get("skipped_steps") or 0 for e in log),
                     f"{sum(e.get('seconds') or 0 for e in log) / 60:.1f}"))
    return _table(rows)


def seeds_summary(runs, baselines):
    """Mean and deviation over seeds of each model's last val mIoU and AP and of the difference by seed, as text."""
    values = defaultdict(list)
    for run in runs:
        for label, key in (("mIoU", "val_miou"), ("AP", "val_ap"), ("AP50", "val_ap50"), ("AP25", "val_ap25")):
            if is_finite(run["log"][-1].get(key)):
                values[f"final val {label}, {run['config'].get('model', '?')}"].append(run["log"][-1][key])
        baseline = baselines.get(run["config"].get("seed"))
        if run is not baseline and not incomparable(run, baseline):
            ours, theirs = final_miou(run["log"]), final_miou(baseline["log"])
            if ours and theirs and ours[0] == theirs[0]:
                values["paired difference to the baseline"].append(ours[1] - theirs[1])
    return "\n".join(f"{name}: {statistics.mean(v):.4f}" + (f" ± {statistics.stdev(v):.4f}" if len(v) > 1 else "")
                     + f" ({len(v)} run{'s' * (len(v) > 1)})" for name, v in sorted(values.items()))


def class_table(runs):
    """IoU of every class at each run's last evaluated epoch, one column a run; "-" where a class does not occur."""
    names = next((run["config"]["classes"]["names"] for run in runs if run["config"].get("classes")), CLASS_NAMES)
    columns = [([], *(e["val_iou"] for e in run["log"] if e.get("val_iou")))[-1] for run in runs]
    rows = [(name, *(_number(iou, 4) for iou in values)) for name, *values in zip_longest(names, *columns)]
    return _table([("class", *(run["name"] for run in runs)), *rows])


def _number(value, digits):
    """A number with that many digits, "-" for what is none."""
    return f"{value:.{digits}f}" if is_finite(value) else "-"


def _table(rows):
    """Rows as aligned text; the first column to the left, the others to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw_curves(logs, path):
    """Draw PANELS as a .png of 1650 x 840. logs: dict name -> log, first the run, then what it is compared with."""
    log, *_ = logs.values()
    figure = Figure(figsize=(16.5, 8.4), dpi=100, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    for title, ax in zip(PANELS, figure.subplots(2, 3).flat):
        if title == "Losses" and (faulty := [entry["epoch"] for entry in log if epoch_fault(entry)]):
            ax.plot(faulty, [0.02] * len(faulty), "rx", transform=ax.get_xaxis_transform(), label="bad epoch")
        if title == "Share of the 2D branch":
            ax.axhspan(*FUSION_BAND, color="C2", alpha=0.16, lw=0, label="goal")
        curves = []
        for i, key in enumerate(PANELS[title]):
            for name, entries in logs.items() if key in COMPARED else [("", log)]:
                if values := numbers(entries, key):
                    *_, last = values.values()
                    line = [values.get(epoch, math.nan) for epoch in range(entries[-1]["epoch"] + 1)]  # null: a gap
                    label = f"{key.split()[-1]} {name[:20]} {last:.3g}"
                    curves.append((last, label, line, f"C{i}" if entries is log else "grey"))
        for _, label, line, color in sorted(curves, reverse=True):  # by their last values, as the legend
            ax.plot(line, ".-", color=color, lw=1.6, ms=2.5, label=label)
        if title in LOGARITHMIC:
            ax.set_yscale("log", subs=[])  # no minor ticks
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
        else:
            ax.axhline(0, color="grey", lw=0.6)  # 0 is always in sight
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8.5, handlelength=1)
        ax.set_title(title, fontweight="bold", pad=18)
        ax.set(xlabel="epoch", xmargin=0)
        ax.grid(axis="y", color="#d5d9de", lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        for stage, entries in groupby(log, key=lambda entry: entry.get("stage")):
            epochs, (name, tint) = [entry["epoch"] for entry in entries], STAGES.get(stage, ("", "white"))
            ax.axvspan(epochs[0] - 0.5, epochs[-1] + 0.5, color=tint, lw=0, zorder=0)
            ax.text((epochs[0] + epochs[-1]) / 2, 1.01, name, color="grey", fontsize=8.5, ha="center",
                    transform=ax.get_xaxis_transform())
    figure.savefig(path)


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Judge runs by the three success criteria; exits 1 if one fails.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, such as runs/fused")
    parser.add_argument("--against", nargs="+", default=[], metavar="BASELINE", help="baselines, paired by seed")
    parser.add_argument("--classes", action="store_true", help="print the IoU of every class too")
    args = parser.parse_args(argv)
    try:
        runs, against = [read_run(folder) for folder in args.runs], [read_run(folder) for folder in args.against]
        baselines = {run["config"].get("seed"): run for run in against}
        if len(baselines) < len(against):
            raise ValueError(f"two baselines have the same seed, of {list(baselines)}; give one baseline a seed")
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2

    everything = list({run["folder"].resolve(): run for run in runs + against}.values())  # each folder once
    for run in everything:
        if len(run["log"]) < (planned := run["config"].get("epochs", 0)):
            print(f"note: {run['name']} has logged {len(run['log'])} of {planned} epochs; the verdicts cover these")
    print(summary_table(everything))
    if len(runs) > 1:
        print("\n" + seeds_summary(everything, baselines))
    if args.classes:
        print("\n" + class_table(everything))

    failed = False
    for run in runs:
        baseline = baselines.get(run["config"].get("seed"))
        print(f"\n{run['name']}" + (f" against {baseline['name']}" if baseline else ""))
        for number, entry in enumerate(judge(run, baselines), 1):
            detail = f"  [{entry['detail']}]" if entry["detail"] else ""
            print(f"  {number} {entry['name']:<11}  {VERDICTS[entry['passed']]:<4}  {entry['figure']}{detail}")
            failed |= entry["passed"] is False
        print("".join(f"    {line}\n" for line in watched(run)), end="")
        draw_curves({each["name"]: each["log"] for each in (run, baseline) if each}, run["folder"] / "curves.png")
        print(f"  curves: {run['folder'] / 'curves.png'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
