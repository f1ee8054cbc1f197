"""Training speed and memory against width, depth, context and length of the text."""

from benchmarks.common import columns, fit, markdown, median

# each step has 2048 characters, so that only what is named differs
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


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=40)


def measure(args) -> tuple[dict, str]:
    """Variants of a bare `fit` in turn. The first turn prepares the texts and does not count."""
    few = [f"--trainer.max_steps={args.steps}", f"--trainer.val_check_interval={args.steps}"]
    few += ["--sample.every_n_steps=0", "--trainer.limit_val_batches=2"]
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for turn in range(args.rounds + 1):
        for name, flags in VARIANTS.items():
            run = fit(*few, *flags)
            if turn > 0:
                runs[name].append({kind: run[kind] for kind in ("chars_per_second", "memory")})
    first = next(iter(runs.values()))
    base_speed, base_memory = median(first, "chars_per_second"), median(first, "memory")
    rows = []
    for name, these in runs.items():
        speed, memory = median(these, "chars_per_second"), median(these, "memory")
        rows.append([name, f"{speed:,.0f}", f"{speed / base_speed:.2f}"])
        rows[-1] += [f"{memory:,.0f} MB", f"{memory / base_memory:.2f}"]
    table = markdown(["", "characters a second", "share", "peak memory", "share"], rows)
    return {"steps": args.steps, **{name: columns(these) for name, these in runs.items()}}, table
