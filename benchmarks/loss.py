"""Loss and time of a config, beside nanoGPT's CPU recipe on the same text."""

import statistics
import tempfile
from pathlib import Path

from benchmarks import ours
from benchmarks.nanogpt import NanoGPT
from benchmarks.report import spread, table


def measure(checkout: Path, config: Path, seeds: list[int], rounds: int, flags: list[str]):
    """Train `config` with each seed and nanoGPT's recipe `rounds` times, taking turns.

    Returns:
        all figures, and a table of exact validation losses (nats per character, last step), seconds
        of training alone and of the whole command, and what share of nanoGPT's each is.
    """
    mine, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        peer = NanoGPT(checkout, Path(folder)) if rounds else None
        for turn in range(max(len(seeds), rounds)):
            if turn < len(seeds):
                seed = seeds[turn]
                given = [f"--seed_everything={seed}", *flags]
                mine.append({"seed": seed, **ours.fit(config, *given)})
                print("ours   ", mine[-1], flush=True)
            if turn < rounds:
                theirs.append({"seed": 1337 + turn, **peer.train(seed=1337 + turn)})
                print("nanoGPT", theirs[-1], flush=True)
    rows = [line(f"`{config.stem}`", mine, theirs)]
    if theirs:
        rows.append(line("nanoGPT's CPU recipe", theirs, theirs))
    header = ["", "loss", "runs", "training", "share", "whole command", "share"]
    return {"config": str(config), "ours": mine, "nanogpt": theirs}, table(header, rows)


def line(name: str, runs: list[dict], peers: list[dict]) -> list[str]:
    """Mean and spread of the losses, medians of the seconds, each beside the peers' median."""
    cells = [name, spread([run["loss"] for run in runs], 4), str(len(runs))]
    for kind in ("training", "command"):
        seconds = statistics.median(run[kind] for run in runs)
        share = seconds / statistics.median(run[kind] for run in peers) if peers else None
        cells += [f"{seconds:.1f} s", f"1/{1 / share:.1f}" if share else ""]
    return cells
