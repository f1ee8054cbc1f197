"""Training speed in nanoGPT's CPU shape and batch, AdamW on both sides."""

from pathlib import Path

from benchmarks.common import columns, fit, markdown, median
from benchmarks.nanogpt import NanoGPT


def add_arguments(parser):
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--steps", type=int, default=300)


def measure(args) -> tuple[dict, str]:
    """Our `nanogpt_cpu` in bf16 and fp32, and nanoGPT (fp32, as it trains on CPUs), in turn.

    Our speed counts every step; nanoGPT's is that of the median step after the 20th.
    """
    flags = ["--config=nanogpt_cpu", f"--trainer.max_steps={args.steps}"]
    flags.append(f"--trainer.val_check_interval={args.steps}")
    runs: dict[str, list[dict]] = {"bf16-mixed": [], "32-true": [], "nanoGPT": []}
    nanogpt, length = NanoGPT(args.nanogpt), (f"--max_iters={args.steps}", "--eval_interval=100000")
    for _ in range(args.rounds):
        for precision in ("bf16-mixed", "32-true"):
            runs[precision].append(fit(*flags, f"--trainer.precision={precision}"))
        runs["nanoGPT"].append(nanogpt.train(*length))
    speed = {name: median(these, "chars_per_second") for name, these in runs.items()}
    rows = [[name, f"{s:,.0f}", f"{s / speed['nanoGPT']:.2f}"] for name, s in speed.items()]
    table = markdown(["", "characters a second", "of nanoGPT's"], rows)
    return {"steps": args.steps, **{name: columns(these) for name, these in runs.items()}}, table
