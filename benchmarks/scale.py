"""How time and memory grow with width, depth, context and text."""

import statistics

from benchmarks import ours
from benchmarks.report import table

# 2048 characters a step in each, so that only what is named differs
VARIANTS = {
    "4 layers x 128, context 128, 1 MB": [],
    "width 256": ["--model.n_embd=256"],
    "width 512": ["--model.n_embd=512", "--model.n_head=8"],
    "depth 8": ["--model.n_layer=8"],
    "depth 16": ["--model.n_layer=16"],
    "context 256": ["--data.block_size=256", "--data.batch_size=8"],
    "context 1024": ["--data.block_size=1024", "--data.batch_size=2"],
    "10 MB of text": ["--data.corpus=playwright:1:10000000"],
}


def measure(rounds: int, steps: int):
    """Each variant of a bare `fit` in turn, `rounds` times, `steps` steps each.

    The first turn prepares the texts; it is not counted.

    Returns:
        all figures, and a table of medians: characters a second in training and the process's peak
        memory, each beside the first row's.
    """
    few = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    few += ["--sample.every_n_steps=0", "--trainer.limit_val_batches=2"]
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, flags in VARIANTS.items():
            found = ours.fit(None, *few, *flags)
            if turn:
                runs[name].append(found)
    medians = {
        name: [
            statistics.median(run[kind] for run in those) for kind in ("chars_per_second", "memory")
        ]
        for name, those in runs.items()
    }
    base = next(iter(medians.values()))
    rows = [
        [name, f"{speed:,.0f}", f"{speed / base[0]:.2f}", f"{mb:,.0f} MB", f"{mb / base[1]:.2f}"]
        for name, (speed, mb) in medians.items()
    ]
    header = ["", "characters a second", "share", "peak memory", "share"]
    return {"steps": steps, "runs": runs}, table(header, rows)
