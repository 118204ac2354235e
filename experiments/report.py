"""Runs -> a table, the three success criteria with PASS or FAIL, curves.

    python report.py runs/fused --against runs/baseline                 # exit code 1 if a criterion fails
    python report.py runs/fused_s{0,1,2} --against runs/base_s{0,1,2}   # paired by seed, mean and standard deviation
    python report.py runs/fused --classes                               # IoU of every class too
    python report.py --failures --out failures.png                      # each failure mode without and with its cure

Reads config.json and log.jsonl of each run folder and writes curves.png beside the log. `train.py` calls `draw_curves`
while it trains. Exit code: 0 no criterion failed, 1 one failed, 2 a run could not be read.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

from metrics import FUSION_BAND, criteria, epoch_fault, final_miou, fusion_epochs, is_finite

STAGE_NAMES = {1: "stability", 2: "alignment", 3: "enhancement"}
SAME_KEYS = ("data", "epochs", "seed", "preset", "compress", "plan", "voxel_size", "batch_size", "lr",
             "weight_decay")  # what two runs must share to be compared
VERDICTS = {True: "PASS", False: "FAIL", None: "n/a"}


# ------------------------------------------------------------------------------------------------------ reading runs


def read_run(folder):
    """Read one run folder.

    Returns:
        dict with name (str, the folder's), folder (Path), config (dict), log (list of dicts, see `read_log`),
        notes (list of str, what was left out of the log).

    Raises:
        FileNotFoundError, ValueError: no such folder, no config.json or log.jsonl in it, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a run folder, such as runs/<name>")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a run that train.py wrote")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is not valid JSON: {error}") from None
    log, notes = read_log(folder / "log.jsonl")
    return {"name": folder.resolve().name, "folder": folder, "config": config, "log": log, "notes": notes}


def read_log(path):
    """Read log.jsonl: one JSON object a line, one line an epoch.

    A half line at the end, as a killed run leaves it, is left out. Where a line goes back to an epoch already written,
    the run was resumed there: that line and those after it replace everything logged from that epoch on. What broke
    stability in the replaced lines stays with the line that replaced them, as replaced_faults: it did happen.

    Returns:
        log:   list of dicts in ascending epoch, each epoch once.
        notes: list of str saying what was left out or replaced.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError:        a broken line that is not the last one (the message names file and line), or no whole line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the run has not finished an epoch, or this is no run folder")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    log, notes = [], []
    for number, line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            if number != lines[-1][0]:
                raise ValueError(f"{path}, line {number}: broken JSON in the middle of the log; "
                                 "mend or delete this line") from None
            notes.append(f"{path}, line {number}: half a line at the end, left out")
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("epoch"), int):
            raise ValueError(f"{path}, line {number}: expected an object with an integer 'epoch', got {line[:60]}")
        replaced = [old for old in log if old["epoch"] >= entry["epoch"]]
        if replaced:
            faults = [f"epoch {old['epoch']}: {epoch_fault(old)}" for old in replaced if epoch_fault(old)]
            notes.append(f"{path}, line {number}: resumed at epoch {entry['epoch']}; the {len(replaced)} earlier "
                         f"line(s) from that epoch on are replaced, {len(faults)} with a non-finite or skipped step")
            log = log[:-len(replaced)]
            if faults:
                entry["replaced_faults"] = faults
        log.append(entry)
    if not log:
        raise ValueError(f"{path} holds no whole line; the run has not finished an epoch")
    return log, notes


# ----------------------------------------------------------------------------------------------------------- judging


def pair_by_seed(runs, baselines):
    """The baseline of each run: the one with its seed; a lone baseline serves every run (`judge` checks the seed).

    Returns:
        list as long as runs, of runs or None where there is no baseline, or none with this seed among several.

    Raises:
        ValueError: two baselines with the same seed.
    """
    by_seed = {}
    for baseline in baselines:
        seed = baseline["config"].get("seed")
        if seed in by_seed:
            raise ValueError(f"baselines {by_seed[seed]['folder']} and {baseline['folder']} have the same seed {seed}; "
                             "give one baseline a seed")
        by_seed[seed] = baseline
    only = baselines[0] if len(baselines) == 1 else None
    return [by_seed.get(run["config"].get("seed"), only) for run in runs]


def judge(run, baseline, baselines_given):
    """`metrics.criteria` of a run, where criterion 2 also fails if the two configs do not describe the same task.

    Args:
        run:             from `read_run`.
        baseline:        from `read_run`, or None.
        baselines_given: bool; with baselines given but none for this run's seed, criterion 2 fails.

    Returns:
        list of dicts as `metrics.criteria` returns it. A run of the baseline itself is not compared.
    """
    if run["config"].get("model") == "baseline":
        entries = criteria(run["log"])
        entries[1]["detail"] = "this run is a baseline"
        return entries
    entries = criteria(run["log"], baseline and baseline["log"])
    why = ""
    if baseline is None and baselines_given:
        why = f"no baseline with seed {run['config'].get('seed')} given"
    elif baseline is not None:
        why = config_differences(run["config"], baseline["config"])
    if why:
        entries[1].update(figure="not comparable", passed=False, detail=why)
    return entries


def config_differences(config, baseline_config):
    """The keys in which a run and its baseline differ though they must agree, as text; "" if they agree."""
    pairs = [(key, config.get(key), baseline_config.get(key)) for key in SAME_KEYS]
    differences = [f"{key} is {ours!r}, the baseline's {theirs!r}" for key, ours, theirs in pairs if ours != theirs]
    if baseline_config.get("model") != "baseline":
        differences.append(f"the run to compare with is a {baseline_config.get('model')!r}, not a 'baseline'")
    return "; ".join(differences)


# ---------------------------------------------------------------------------------------------------------- printing


def summary_table(runs):
    """One row a run, as text: epochs logged of those planned, val mIoU, fusion_2d_ratio after the ramp, cost."""
    rows = [("run", "model", "seed", "epochs", "best mIoU", "final mIoU", "final AP/50/25", "2D ratio", "range",
             "skipped", "minutes")]
    for run in runs:
        log, config = run["log"], run["config"]
        evaluated = [(e["val_miou"], -e["epoch"]) for e in log if is_finite(e.get("val_miou"))]
        best, final = max(evaluated, default=None), final_miou(log)
        ratios = [ratio for _, ratio in fusion_epochs(log) if is_finite(ratio)]
        rows.append((
            run["name"], str(config.get("model", "?")), str(config.get("seed", "?")),
            f"{len(log)}/{config.get('epochs', '?')}",
            f"{best[0]:.4f} @{-best[1]}" if best else "-",
            f"{final[1]:.4f} @{final[0]}" if final else "-",
            "/".join(f"{v:.3f}" if is_finite(v) else "-" for v in map(log[-1].get, ("val_ap", "val_ap50", "val_ap25"))),
            f"{ratios[-1]:.3f}" if ratios else "-",
            f"{min(ratios):.3f}..{max(ratios):.3f}" if ratios else "-",
            str(sum(e.get("skipped_steps") or 0 for e in log)),
            f"{sum(e.get('seconds') or 0 for e in log) / 60:.1f}",
        ))
    return _table(rows)


def seeds_summary(runs, pairs):
    """Mean and standard deviation (n - 1) of the final val mIoU and AP of each model, and of the paired difference.

    Args:
        runs:  list from `read_run`, baselines included.
        pairs: list of (run, baseline) that are comparable.
    """
    lines, by_model = [], {}
    for run in runs:
        last = run["log"][-1]
        for label, key in (("mIoU", "val_miou"), ("AP", "val_ap"), ("AP50", "val_ap50"), ("AP25", "val_ap25")):
            if is_finite(last.get(key)):
                by_model.setdefault((label, str(run["config"].get("model", "?"))), []).append(last[key])
    lines += [f"final val {label}, {model}: {_mean_and_deviation(v)}" for (label, model), v in sorted(by_model.items())]
    finals = [(final_miou(run["log"]), final_miou(baseline["log"])) for run, baseline in pairs]
    differences = [ours[1] - theirs[1] for ours, theirs in finals if ours and theirs and ours[0] == theirs[0]]
    if differences:
        lines.append(f"paired difference to the baseline: {_mean_and_deviation(differences, '+')}")
    return "\n".join(lines)


def class_table(runs):
    """IoU of every class at each run's last evaluated epoch, one column a run; "-" where a class does not occur."""
    from data import CLASS_NAMES  # data.py loads torch and more: only for those who ask for this table

    columns = []
    for run in runs:
        evaluated = [e["val_iou"] for e in run["log"] if e.get("val_iou")]
        columns.append(evaluated[-1] if evaluated else [])
    count = max(len(column) for column in columns)
    names = list(CLASS_NAMES) if len(CLASS_NAMES) == count else [f"class {i}" for i in range(count)]
    rows = [("class", *(run["name"] for run in runs))]
    for i, name in enumerate(names):
        values = [column[i] if i < len(column) else None for column in columns]
        rows.append((name, *(f"{v:.4f}" if is_finite(v) else "-" for v in values)))
    return _table(rows)


def _mean_and_deviation(values, sign=""):
    """'0.4123 ± 0.0051 (3 runs)'; a single run has no deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation} ({len(values)} run{'s' * (len(values) > 1)})"


def _table(rows):
    """Rows of strings as aligned text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ------------------------------------------------------------------------------------------------------------ curves

STAGE_TINTS = {1: "#eef2f7", 2: "#fbf4e6", 3: "#edf5ee"}
COLORS = {  # of a loss term or branch, the same in every run's picture
    "semantic": "#1f6fb4", "alignment": "#2c8c57", "instance_cls": "#b8397a", "instance_bce": "#7a5bb0",
    "instance_dice": "#8a6a3b", "instance_score": "#2a9aa8",
    "3d": "#1f6fb4", "2d": "#d9731a", "fusion": "#2c8c57", "decoder": "#b8397a",
}
INK, FAINT, BLUE, RED = "#222222", "#8a8f98", "#1f6fb4", "#c00000"


def draw_curves(log_or_logs, path):
    """Draw losses, val mIoU and AP, fusion_2d_ratio, gradient norms and range of a run over its epochs, 1650 x 840.

    Null or missing values leave gaps. The file is written beside its place and renamed, so it is never half there.

    Args:
        log_or_logs: a log (list of dicts, one an epoch, see `read_log`), or a dict name -> log: the first is the run
                     that all panels show, the others (the baseline) appear in the panels of mIoU and AP only.
        path:        where the .png goes.

    Raises:
        ValueError: a log is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: training starts without matplotlib
    from matplotlib.figure import Figure

    logs = log_or_logs if isinstance(log_or_logs, dict) else {"this run": log_or_logs}
    if not logs or not all(logs.values()):
        raise ValueError("nothing to draw: a log is empty; draw after the first epoch")
    log = next(iter(logs.values()))

    figure = Figure(figsize=(16.5, 8.4), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.045, right=0.905, top=0.92, bottom=0.065, wspace=0.52, hspace=0.33)
    _draw_losses(axes[0, 0], log)
    _draw_miou(axes[0, 1], logs)
    _draw_average_precision(axes[0, 2], logs)
    _draw_fusion(axes[1, 0], log)
    _draw_gradients(axes[1, 1], log)
    _draw_range(axes[1, 2], log)
    for ax in axes.flat:
        _dress(ax, log)

    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(unfinished, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # of a disk that is full


def _draw_losses(ax, log):
    """Total loss and every term but the gate prior (the squared distance of the fusion panel's curve from 0.5, far
    below the others); a cross on the axis marks an epoch that broke stability."""
    terms = sorted({term for entry in log for term in entry.get("losses") or {}} - {"gate"})
    curves = [("total", _series(log, lambda e: e.get("loss")), INK)]
    curves += [(term, _series(log, lambda e, t=term: (e.get("losses") or {}).get(t)), COLORS.get(term, FAINT))
               for term in terms]
    _draw_lines(ax, curves)
    _log_scale_if_wide(ax, curves)
    faulty = [entry["epoch"] for entry in log if epoch_fault(entry)]
    if faulty:
        ax.plot(faulty, [0.025] * len(faulty), "x", color=RED, transform=ax.get_xaxis_transform(), ms=6)
        ax.text(1, -0.12, "x  non-finite or skipped step", color=RED, fontsize=8.5, ha="right",
                transform=ax.transAxes)
    ax.set_title("Losses")
    ax.set_ylabel("loss, mean of the epoch")


def _draw_miou(ax, logs):
    """Val mIoU of the run and of the others given, with the last value in the label."""
    curves = []
    for i, (name, log) in enumerate(logs.items()):
        final = final_miou(log)
        curves.append((_short(name) + (f" {final[1]:.3f}" if final else ""), _series(log, lambda e: e.get("val_miou")),
                       BLUE if i == 0 else FAINT))
    _draw_lines(ax, curves)
    ax.set_ylim(bottom=0)
    ax.set_title("Validation mIoU")
    ax.set_ylabel("mIoU")


def _short(name, length=12):
    """A name cut to what the margin has room for."""
    return name if len(name) <= length else name[: length - 1] + "\u2026"


def _draw_average_precision(ax, logs):
    """Val AP, AP50 and AP25 of the run, AP50 of the others."""
    (_, log), *others = logs.items()
    curves = [(label, _series(log, lambda e, k=key: e.get(k)), color) for label, key, color in
              (("AP25", "val_ap25", "#2c8c57"), ("AP50", "val_ap50", BLUE), ("AP", "val_ap", INK))]
    curves += [(f"AP50 {_short(name, 9)}", _series(theirs, lambda e: e.get("val_ap50")), FAINT)
               for name, theirs in others]
    ax.set_ylim(0, 1.03)
    if any(map(math.isfinite, curves[0][1])):
        _draw_lines(ax, curves)
    else:
        ax.text(0.5, 0.5, "no instances in this run so far", transform=ax.transAxes, ha="center", va="center",
                color=INK)
    ax.set_title("Validation AP of instances")
    ax.set_ylabel("average precision")


def _draw_range(ax, log):
    """RMS of each branch's feature before the blend, and their cosine."""
    curves = [(label, _series(log, lambda e, k=key: e.get(k)), color) for label, key, color in
              (("rms 2d", "rms_2d", COLORS["2d"]), ("rms 3d", "rms_3d", COLORS["3d"]), ("cosine", "cosine", INK))]
    if any(map(math.isfinite, curves[0][1])):
        _draw_lines(ax, curves)
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    else:
        ax.text(0.5, 0.5, "no fusion in this run so far", transform=ax.transAxes, ha="center", va="center", color=INK)
    ax.set_title("Range and agreement of the branches")
    ax.set_ylabel("over seen voxels, mean of the epoch")


def _draw_fusion(ax, log):
    """fusion_2d_ratio with its band; epochs after the ramp outside the band get a red dot."""
    low, high = FUSION_BAND
    ax.axhspan(low, high, color="#2c8c57", alpha=0.16, lw=0, zorder=0.5)
    ax.text(0.01, high - 0.015, f"goal {low} to {high}", transform=ax.get_yaxis_transform(), fontsize=8, va="top",
            color="#2c6e49")
    ratio = _series(log, lambda e: e.get("fusion_2d_ratio"))
    ax.set_ylim(0, 1.03)
    if any(map(math.isfinite, ratio)):
        _draw_lines(ax, [("ramp", _series(log, lambda e: e.get("fusion_ramp")), FAINT), ("ratio", ratio, BLUE)])
        outside = [(e, r) for e, r in fusion_epochs(log) if is_finite(r) and not low <= r <= high]
        ax.plot([e for e, _ in outside], [r for _, r in outside], "o", color=RED, ms=3.5, zorder=4)
    else:
        ax.text(0.5, 0.5, "no fusion in this run so far", transform=ax.transAxes, ha="center", va="center", color=INK)
    ax.set_title("Share of the 2D branch: fusion_2d_ratio")
    ax.set_ylabel("mean alpha over seen voxels")


def _draw_gradients(ax, log):
    """Gradient norm of every branch before clipping."""
    branches = sorted({branch for entry in log for branch in entry.get("grad_norm") or {}})
    curves = [(branch, _series(log, lambda e, b=branch: (e.get("grad_norm") or {}).get(b)), COLORS.get(branch, FAINT))
              for branch in branches]
    _draw_lines(ax, curves)
    _log_scale_if_wide(ax, curves, factor=3)
    ax.set_title("Gradient norm by branch, before clipping")
    ax.set_ylabel("norm, mean of the epoch")


def _series(log, value_of):
    """A value for each epoch from 0 to the last, NaN where it is null or the epoch is missing."""
    values = [math.nan] * (log[-1]["epoch"] + 1)
    for entry in log:
        value = value_of(entry)
        values[entry["epoch"]] = value if is_finite(value) else math.nan
    return values


def _draw_lines(ax, curves):
    """Draw (name, values by epoch, color) curves; each is labelled at its end by `_label_ends`, in `_dress`."""
    for name, values, color in curves:
        seen = [math.isfinite(v) for v in [math.nan, *values, math.nan]]
        alone = [i for i in range(len(values)) if seen[i + 1] and not seen[i] and not seen[i + 2]]  # no line to either
        if any(seen):
            ax.plot(range(len(values)), values, color=color, lw=1.6, marker="o", ms=3.5, markevery=alone or [],
                    label=name)


def _log_scale_if_wide(ax, curves, factor=10):
    """Logarithmic y axis where all values are positive and span more than the factor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [v for _, series, _ in curves for v in series if math.isfinite(v)]
    if not values or min(values) <= 0 or max(values) < factor * min(values):
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 200 * min(values) else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _dress(ax, log):
    """Shade the stages, set the axes' looks, label the curves at their ends."""
    from matplotlib.ticker import MaxNLocator

    last = max([log[-1]["epoch"], *(line.get_xdata()[-1] for line in ax.lines if len(line.get_xdata()))])
    ax.set_xlim(-0.5, last + 0.5)
    stages = {}
    for entry in log:
        stages.setdefault(entry.get("stage"), []).append(entry["epoch"])
    for stage, epochs in stages.items():
        left, right = epochs[0] - 0.5, epochs[-1] + 0.5
        ax.axvspan(left, right, color=STAGE_TINTS.get(stage, "white"), lw=0, zorder=0)
        if (right - left) / (last + 1) > 0.14:  # narrower than its name otherwise
            ax.text((left + right) / 2, 1.015, STAGE_NAMES.get(stage, f"stage {stage}"), fontsize=8.5, color=FAINT,
                    ha="center", transform=ax.get_xaxis_transform())
    ax.set_title(ax.get_title(), loc="center", fontsize=11.5, fontweight="bold", color=INK, pad=20)
    ax.set_xlabel("epoch", fontsize=9, color=INK)
    ax.set_ylabel(ax.get_ylabel(), fontsize=9, color=INK)
    ax.tick_params(labelsize=8.5, colors="#555555", length=3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8))
    ax.grid(axis="y", color="#d5d9de", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    _label_ends(ax)


def _label_ends(ax, gap=0.05):
    """Write each curve's name right of the axes at the height where it ends, at least gap (of the axes) apart."""
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    ends = []
    for line in lines:
        y = [v for v in line.get_ydata() if math.isfinite(v)][-1]
        height = ax.transAxes.inverted().transform(ax.transData.transform((0, y)))[1]
        ends.append((height, line))
    ends.sort(key=lambda end: end[0])
    heights = [height for height, _ in ends]
    for i in range(1, len(heights)):  # push up, then the whole stack down into the axes
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for (_, line), height in zip(ends, heights):
        ax.text(1.012, height, line.get_label(), color=line.get_color(), fontsize=9, va="center",
                transform=ax.transAxes)


# -------------------------------------------------------------------------------------------------------------- main


def report_failures(path):
    """Run the experiments of failures.py: table, picture at path, exit code."""
    import failures  # spconv, open_clip and training: only for those who ask for this table

    findings = [experiment() for experiment in failures.EXPERIMENTS]
    print(failures.table(findings))
    try:
        failures.draw(findings, path)
    except OSError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(f"picture: {path}")
    return int(not all(finding.holds for finding in findings))


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Judge runs by the three success criteria; exits 1 if one fails.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder, such as runs/fused")
    parser.add_argument("--against", nargs="+", default=[], metavar="BASELINE",
                        help="baseline run folder; several are paired with the runs by seed")
    parser.add_argument("--classes", action="store_true", help="print the IoU of every class too")
    parser.add_argument("--failures", action="store_true", help="instead of runs: reproduce the failure modes, each "
                        "without its cure and with it; exits 1 if one is not as promised")
    parser.add_argument("--out", help="picture of --failures (default failures.png)")
    args = parser.parse_args(argv)
    if args.failures and not args.runs:
        return report_failures(args.out or "failures.png")
    if args.failures or args.out or not args.runs:
        parser.error("give run folders, such as runs/fused, or --failures alone, with --out")
    try:
        runs = [read_run(folder) for folder in args.runs]
        baselines = [read_run(folder) for folder in args.against]
        partners = pair_by_seed(runs, baselines)
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2

    everything = list({run["folder"].resolve(): run for run in runs + baselines}.values())  # each folder once
    for run in everything:
        for note in run["notes"]:
            print(f"note: {note}")
        planned = run["config"].get("epochs")
        if is_finite(planned) and len(run["log"]) < planned:
            print(f"note: {run['name']} has logged {len(run['log'])} of {planned} epochs; the verdicts cover these")
    print(summary_table(everything))
    if len(runs) > 1:
        comparable = [(run, baseline) for run, baseline in zip(runs, partners)
                      if baseline and not config_differences(run["config"], baseline["config"])]
        print("\n" + seeds_summary(everything, comparable))
    if args.classes:
        print("\n" + class_table(everything))

    failed = False
    for run, baseline in zip(runs, partners):
        print(f"\n{run['name']}" + (f" against {baseline['name']}" if baseline else ""))
        for number, entry in enumerate(judge(run, baseline, bool(baselines)), 1):
            detail = f"  [{entry['detail']}]" if entry["detail"] else ""
            print(f"  {number} {entry['name']:<11}  {VERDICTS[entry['passed']]:<4}  {entry['figure']}{detail}")
            failed |= entry["passed"] is False
        logs = {run["name"]: run["log"]} | ({baseline["name"]: baseline["log"]} if baseline else {})
        draw_curves(logs, run["folder"] / "curves.png")
        print(f"  curves: {run['folder'] / 'curves.png'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
