"""Characters per second in training: nanoGPT's CPU shape and batch, AdamW on both sides."""

import statistics
import tempfile
from pathlib import Path

from benchmarks import ours
from benchmarks.nanogpt import NanoGPT
from benchmarks.report import table

CONFIG = Path("configs/nanogpt_cpu.yaml")


def measure(checkout: Path, rounds: int, steps: int):
    """Runs of `steps` steps of `configs/nanogpt_cpu.yaml` in bf16 and in fp32, and nanoGPT's
    (fp32, as it trains on CPUs), taking turns.

    Ours counts every step, the first ones too; of nanoGPT's the median step after the 20th.
    """
    runs: dict[str, list[dict]] = {"bf16-mixed": [], "32-true": [], "nanoGPT": []}
    length = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        peer = NanoGPT(checkout, Path(folder))
        for _ in range(rounds):
            for precision in ("bf16-mixed", "32-true"):
                flag = f"--trainer.precision={precision}"
                runs[precision].append(ours.fit(CONFIG, flag, *length))
            flags = [f"--max_iters={steps}", "--eval_interval=100000"]
            runs["nanoGPT"].append(peer.train(*flags))
    rate = {
        name: statistics.median(run["chars_per_second"] for run in those)
        for name, those in runs.items()
    }
    rows = [
        [name, f"{value:,.0f}", f"{value / rate['nanoGPT']:.2f}"] for name, value in rate.items()
    ]
    header = ["", "characters a second", "of nanoGPT's"]
    return {"steps": steps, "runs": runs}, table(header, rows)
