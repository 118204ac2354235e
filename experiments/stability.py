"""The stability map: recipes over peak learning rates, several seeds each, as the field measures stability.

    python -m experiments.stability                              # every run that is missing, two at a time; resumable
    python -m experiments.stability --recipes naive kept --rates 1e-2 3e-2 --seeds 0
    python -m experiments.stability --at-a-time 12 --device cuda # other flags are train.py's
    python -m experiments.stability --table results/stability    # table and stability.png of the lines that are there

A run is `experiments.ablate RECIPE SEED --lr RATE --compress 8`, a thread each; its line goes to OUT/RECIPE.jsonl,
its run folder is runs/, OUT's own name, RECIPE_RATE_sSEED.

LR sensitivity (Wortsman et al. 2023, arXiv 2309.14322) = mean over the rates of min(l, l0) - l*: l the val loss at the
end (semantic, unweighted), l0 the untrained network's, l* the best over the rates; of mIoU: the best less the mean
over the rates. A run that diverged ends at l0 and mIoU 0. Plateau: decades from the lowest to the highest rate around
the best one with a mIoU of at least 90 % of it. Spikes: steps whose semantic loss lies guard.SPIKE deviations above
the mean of the last 100. Clipped: steps whose gradient was longer than the row's clip, by branch.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.report import mean, read_run

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)
RECIPES = ("baseline", "naive", "naive_warm", "only_2d", "concat", "kept")  # of experiments.ablate
NAMES = {"kept": "curriculum", "baseline": "3D baseline", "only_2d": "2D alone", "concat": "concatenation",
         "joint": "all at once, with the measures", "naive_warm": "naive, the curriculum's warm-up"}
FIGURES = {"miou": "val mIoU", "loss": "val loss", "ap": "AP", "ratio": "ratio", "images_black": "images black",
           "points_black": "points black"}


def line_of(folder, recipe, rate, seed):
    """The line of a finished run: dict."""
    run, result = read_run(folder), json.loads(Path(folder, "blanked.json").read_text())
    log = run["log"]
    return {"recipe": recipe, "rate": rate, "seed": seed, "miou": result.get("as they are"),
            "loss": result.get("loss at the end"), "start": result["loss at the start"],
            "images_black": result.get("images black"), "points_black": result.get("points black"),
            "ap": log[-1]["val_ap"], "ratio": log[-1]["fusion_2d_ratio"], "diverged": "diverged" in result,
            "skipped": sum(line["skipped_steps"] for line in log), "spikes": mean(log, "spikes"),
            "clipped": mean(log, "clipped"), "update_rms": mean(log, "update_rms"),
            "commit": run["config"]["commit"]}


def read_lines(folder):
    """All lines below a folder: list of dicts, the last of those that are of one run."""
    found = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["recipe"], line["rate"], line["seed"]] = line
    return list(found.values())


def sweep(out, recipes, rates, seeds, flags, at_a_time):
    """Make every run that has no line yet; one that was stopped goes on where it was."""
    there = {(line["recipe"], line["rate"], line["seed"]) for line in read_lines(out)}
    jobs = [(recipe, rate, seed) for seed in seeds for rate in rates for recipe in recipes]
    jobs = [job for job in jobs if job not in there]
    Path(out).mkdir(parents=True, exist_ok=True)

    def make(job):
        recipe, rate, seed = job
        folder = Path("runs", Path(out).name, f"{recipe}_{rate:g}_s{seed}")
        again = ["--resume"] * (folder / "last.pt").is_file()
        command = [sys.executable, "-m", "experiments.ablate", recipe, str(seed), "--lr", str(rate), *flags,
                   "--out", str(folder), *again]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            return f"{folder}: {(done.stderr.strip() or 'it gave no reason').splitlines()[-1]}"
        with open(Path(out, f"{recipe}.jsonl"), "a") as file:
            file.write(json.dumps(line_of(folder, *job)) + "\n")

    with ThreadPoolExecutor(at_a_time) as pool:
        for failed in tqdm(pool.map(make, jobs), "stability map", len(jobs), unit="run"):
            if failed:
                tqdm.write(failed)


def by_rate(lines, key):
    """{rate: values of the seeds} of a recipe's lines, ascending; a run that diverged ends as the untrained network."""
    ends = {"miou": lambda line: 0.0, "loss": lambda line: line["start"], "ratio": lambda line: np.nan}
    return {rate: np.array([line[key] if line[key] is not None else ends[key](line)
                            for line in lines if line["rate"] == rate])
            for rate in sorted({line["rate"] for line in lines})}


def judge(lines):
    """One recipe's lines -> dict of sensitivity_loss, sensitivity_miou, plateau (decades), best (rate), diverged (first
    rate or None), skipped, spikes, clipped; definitions above."""
    losses = [np.minimum(values, [line["start"] for line in lines if line["rate"] == rate]).mean()
              for rate, values in by_rate(lines, "loss").items()]
    miou = {rate: values.mean() for rate, values in by_rate(lines, "miou").items()}
    rates, values = np.array([*miou]), np.array([*miou.values()])
    best, poor = values.argmax(), np.flatnonzero(values < 0.9 * values.max())
    low, high = max(poor[poor < best], default=-1) + 1, min(poor[poor > best], default=len(rates)) - 1
    return {"sensitivity_loss": float(np.mean(losses) - min(losses)),
            "sensitivity_miou": float(values.max() - values.mean()),
            "plateau": float(np.log10(rates[high] / rates[low])), "best": float(rates[best]),
            "diverged": min((line["rate"] for line in lines if line["diverged"]), default=None),
            "skipped": sum(line["skipped"] for line in lines), "spikes": mean(lines, "spikes"),
            "clipped": mean(lines, "clipped")}


def table(lines):
    """Markdown: a row a recipe; the first figures are of its best rate."""
    rows = ["| recipe | runs | best rate | mIoU | AP | ratio | images black | points black | LR sensitivity, loss "
            "| mIoU | plateau, decades | diverged from | skipped | spikes | clipped |", "|---" * 15 + "|"]
    for recipe in dict.fromkeys(line["recipe"] for line in lines):
        own = [line for line in lines if line["recipe"] == recipe]
        found = judge(own)
        best = [line for line in own if line["rate"] == found["best"]]
        cells = [NAMES.get(recipe, recipe), f"{len(own)}", f"{found['best']:g}",
                 *(mean_and_deviation(best, key) for key in FIGURES if key != "loss")]
        clipped = ", ".join(f"{branch} {share:.2f}" for branch, share in (found["clipped"] or {}).items())
        rows.append(f"| {' | '.join(cells)} | {found['sensitivity_loss']:.3f} | {found['sensitivity_miou']:.3f} "
                    f"| {found['plateau']:.1f} | {found['diverged'] or '-'} | {found['skipped']} "
                    f"| {found['spikes'] or 0:.4f} | {clipped} |")
    return "\n".join(rows)


def table_by_rate(lines):
    """Markdown: a row a recipe and figure, a column a rate; mean ± deviation of the seeds that there are."""
    rates = sorted({line["rate"] for line in lines})
    rows = [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for recipe in dict.fromkeys(line["recipe"] for line in lines):
        for key, name in FIGURES.items():
            cells = [mean_and_deviation([line for line in lines if (line["recipe"], line["rate"]) == (recipe, rate)],
                                        key) for rate in rates]
            rows.append(f"| {NAMES.get(recipe, recipe)}, {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def mean_and_deviation(lines, key):
    """A figure of some runs, as a cell; those that diverged have none and are counted."""
    values, diverged = [line[key] for line in lines if line[key] is not None], sum(line["diverged"] for line in lines)
    return (f"{np.mean(values):.3f}" if values else "-") + (
        f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "") + f", {diverged} diverged" * (diverged > 0)


def draw(lines, path):
    """Val mIoU, val loss and ratio over the rate: mean and range of the seeds, a curve a recipe."""
    figure = Figure(figsize=(13, 4), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic([["val mIoU", "val loss", "fusion_2d_ratio"]])
    for i, recipe in enumerate(dict.fromkeys(line["recipe"] for line in lines)):
        own = [line for line in lines if line["recipe"] == recipe]
        for axis, key in zip(axes.values(), ("miou", "loss", "ratio")):
            if key == "ratio" and recipe in ("baseline", "only_2d", "concat"):
                continue
            rates, values = zip(*by_rate(own, key).items())
            axis.plot(rates, [v.mean() for v in values], "o-", color=f"C{i}", label=NAMES.get(recipe, recipe))
            axis.fill_between(rates, [v.min() for v in values], [v.max() for v in values], color=f"C{i}", alpha=0.2)
    for name, axis in axes.items():
        axis.set(xscale="log", xlabel="peak learning rate", title=name)
        axis.grid(color="#d5d9de", lw=0.6)
    figure.legend(*axes["val mIoU"].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    axes["fusion_2d_ratio"].axhspan(0.3, 0.7, color="C2", alpha=0.12, lw=0)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", default="results/stability", help="folder of the lines")
    parser.add_argument("--at-a-time", type=int, default=2, help="runs, a core each")
    parser.add_argument("--table", metavar="FOLDER", help="no runs: the table of the lines in this folder")
    args, flags = parser.parse_known_args(argv)
    if args.table and flags:
        parser.error(f"--table makes no runs, so it takes no flags of train.py: {' '.join(flags)}")
    if not args.table:
        sweep(args.out, args.recipes, args.rates, args.seeds, ["--compress", "8", *flags], args.at_a_time)
    lines = read_lines(args.table or args.out)
    print(table(lines), table_by_rate(lines), sep="\n\n")
    draw(lines, Path(args.table or args.out, "stability.png"))


if __name__ == "__main__":
    main()
