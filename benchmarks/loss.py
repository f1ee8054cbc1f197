"""Validation loss and time of a config, and of nanoGPT's CPU recipe on the same text."""

import statistics
from pathlib import Path

from benchmarks.common import columns, fit, markdown, median
from benchmarks.nanogpt import NanoGPT


def add_arguments(parser):
    parser.add_argument("--config", required=True, help="one of ours, such as cpu/seconds_15")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2, 3, 4])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to alternate with")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of our fit")


def measure(args) -> tuple[dict, str]:
    """Losses are exact, of the last step, in nats per character: mean and standard deviation."""
    # fit runs in another folder
    config = Path(args.config).resolve() if Path(args.config).is_file() else args.config
    nanogpt = NanoGPT(args.nanogpt) if args.nanogpt else None
    ours, theirs, rounds = [], [], args.rounds if nanogpt else 0
    for turn in range(max(len(args.seeds), rounds)):
        if turn < len(args.seeds):
            seed = args.seeds[turn]
            run = fit(f"--config={config}", f"--seed_everything={seed}", *args.flag)
            ours.append({"seed": seed, **run})
            print("ours   ", ours[-1], flush=True)
        if turn < rounds:
            theirs.append({"seed": 1337 + turn, **nanogpt.train(seed=1337 + turn)})
            print("nanoGPT", theirs[-1], flush=True)
    rows = [row(f"`{Path(args.config).stem}`", ours, theirs)]
    figures = {"config": args.config, "ours": columns(ours)}
    if theirs:
        rows.append(row("nanoGPT's CPU recipe", theirs, theirs))
        figures["nanogpt"] = columns(theirs)
    header = ["", "loss", "runs", "training", "share", "whole command", "share"]
    return figures, markdown(header, rows)


def row(name: str, runs: list[dict], peers: list[dict]) -> list[str]:
    """Mean loss, and median seconds with their share of the peers' median."""
    losses = [run["loss"] for run in runs]
    deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    cells = [name, f"{statistics.mean(losses):.4f}{deviation}", str(len(runs))]
    for kind in ("training", "command"):
        seconds = median(runs, kind)
        share = f"1/{median(peers, kind) / seconds:.1f}" if peers else ""
        cells += [f"{seconds:.1f} s", share]
    return cells
