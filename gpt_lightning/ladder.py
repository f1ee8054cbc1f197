"""Train every rung of the lecture's ladder with several seeds, and compare the losses.

1. Each (rung, seed) is a run of `fit` in its own folder, OUT/RUNG/seed_N.
2. The results of a run are read from its last checkpoint and its TensorBoard log.
3. A bigram model made by counting, which needs no training, is added below the first rung.
4. The rows become ladder.md, ladder.csv and ladder.png.

The files alone record what is done, so the same command resumes an interrupted climb.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from gpt_lightning.checkpoint import KEY, read_checkpoint
from gpt_lightning.config_files import CONFIGS, load_config
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.errors import UserError
from gpt_lightning.files import write_atomically
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.lightning_cli import run_trainer
from gpt_lightning.model import num_parameters
from gpt_lightning.model.lecture import Bigram, BigramConfig


@dataclass
class Row:
    """Results of one rung. Losses are in nats per character, on the held-out text."""

    name: str
    title: str
    parameters: int | None = None
    losses: list[float] = field(default_factory=list)  # exact, one for each seed
    estimates: list[float] = field(default_factory=list)  # the lecture's, if the config asks for it
    speeds: list[float] = field(default_factory=list)  # characters per second in training
    floor: float | None = None
    sample: str = ""

    @property
    def loss_text(self) -> str:
        """Mean and standard deviation over the seeds, for people."""
        if not self.losses:
            return "needs a GPU"
        spread = f" ± {statistics.stdev(self.losses):.4f}" if len(self.losses) > 1 else ""
        return f"{mean(self.losses):.4f}{spread}"

    def figures(self) -> dict:
        """The row for programs; None where a figure is missing."""
        return {
            "name": self.name,
            "rung": self.title,
            "parameters": self.parameters,
            "val_loss_mean": mean(self.losses),
            "val_loss_sd": statistics.stdev(self.losses) if len(self.losses) > 1 else None,
            "val_losses": " ".join(f"{loss:.5f}" for loss in self.losses),
            "estimate_val_mean": mean(self.estimates),
            "chars_per_second": mean(self.speeds),
            "floor": self.floor,
            "sample": self.sample,
        }


def mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def climb(argv: list[str]) -> int:
    """The command `climb`; returns its exit code.

    Raises:
        UserError: for a wrong flag, or a folder that has results of other settings.
    """
    args, flags = parse(argv)
    rungs = find_rungs(args.configs, args.rungs)
    check_same_settings(args.out, rungs, flags)
    skipped = []
    if not (args.rungs or torch.cuda.is_available()):
        skipped = [rung for rung in rungs if rung.stem.endswith("_gpu")]
    runs = (len(rungs) - len(skipped)) * len(args.seeds)
    rows, settings = [], None
    with tqdm(total=runs, unit="run", disable=None) as bar:  # no bar if stderr is not a terminal
        for rung in rungs:
            row = Row(rung.stem, title(rung))
            for seed in [] if rung in skipped else args.seeds:
                folder = args.out / rung.stem / f"seed_{seed}"
                bar.set_description(f"{rung.stem}, seed {seed}")
                code = fit(rung, seed, folder, flags)
                if code:
                    bar.write("stopped; the same command resumes")
                    return code
                add_results(row, folder)
                settings = settings or settings_of(folder)
                bar.update()
            rows.append(row)
            bar.write(f"{row.title:<24} {row.loss_text}")
    if settings is not None:
        write_results([counted_bigram(settings), *rows], settings["data"]["corpus"], args.out)
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `climb`, and those that are passed to `fit`."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt_lightning climb",
        usage="%(prog)s [--out DIR] [--seeds N,N,...] [--rungs NAME,...] [any flag of fit]",
        description="Train every config of a folder with several seeds, and write a table and a "
        "picture. If it is interrupted, the same command resumes. Flags of fit are passed to every "
        "run, for example --data.corpus=tinyshakespeare.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default="ladder", metavar="DIR", help="(default: ladder)")
    add(
        "--configs",
        default="lecture",
        metavar="DIR",
        help="the rungs, in the order of their names: a folder, or the name of a shipped one "
        "(default: lecture)",
    )
    add("--seeds", default="1337,1338,1339", metavar="N,N", help="(default: 1337,1338,1339)")
    add(
        "--rungs",
        type=lambda text: text.split(","),
        metavar="NAME,NAME",
        help="only these (default: all; those that end in _gpu only with a GPU)",
    )
    args, flags = parser.parse_known_args(argv)
    try:
        args.seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    except ValueError:
        raise UserError(f"--seeds={args.seeds} must be numbers, such as 1337,1338") from None
    for flag, instead in (("--seed_everything", "--seeds"), ("--ckpt_path", "--out")):
        if any(given.split("=")[0] == flag for given in flags):
            raise UserError(f"{flag} is set by climb; use {instead}")
    return args, flags


def find_rungs(folder: str, names: list[str] | None) -> list[Path]:
    """The config files of a folder, lowest rung first; only those of `names`, if given."""
    path = Path(folder) if Path(folder).is_dir() else CONFIGS / folder
    found = {rung.stem: rung for rung in sorted(path.glob("*.yaml"))}
    if not found:
        raise UserError(f"--configs={folder}: no such folder, or no configs in it")
    for name in names or []:
        if name not in found:
            raise UserError(f"--rungs={name} must be among {', '.join(found)}")
    return [rung for name, rung in found.items() if names is None or name in names]


def title(rung: Path) -> str:
    """The name of a rung: its config's first comment, up to the colon."""
    first_line = rung.read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("#").partition(":")[0].strip()


def check_same_settings(out: Path, rungs: list[Path], flags: list[str]) -> None:
    """Raise a UserError if runs in `out` had other flags or configs; note those of this climb."""
    path = out / "climb.json"
    known: dict = {"flags": flags, "configs": {}}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    if known["flags"] != flags:
        raise UserError(
            f"--out={out} has results of the flags {' '.join(known['flags']) or '(none)'}; "
            "give the same flags, or another --out"
        )
    for rung in rungs:
        config = load_config(rung)
        if known["configs"].setdefault(rung.stem, config) != config:
            raise UserError(
                f"--out={out} has results of another version of {rung}; give another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(json.dumps(known, indent=1).encode())


# one run


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def settings_of(folder: Path) -> dict:
    """All settings of a run, from its checkpoint."""
    return read_checkpoint(last_checkpoint(folder))[KEY]["settings"]


def fit(rung: Path, seed: int, folder: Path, flags: list[str]) -> int:
    """Start or resume the run of one rung and seed, unless it is complete; returns an exit code."""
    argv = ["fit", f"--config={rung}", *flags, f"--seed_everything={seed}"]
    last = last_checkpoint(folder)
    if last.exists():
        checkpoint = read_checkpoint(last)
        steps = checkpoint[KEY]["settings"]["trainer"].get("max_steps", math.inf)
        if checkpoint["global_step"] >= steps:
            return 0
        argv = ["fit", f"--ckpt_path={last}"]
    with contextlib.redirect_stdout(io.StringIO()):  # the table is the summary of all runs
        return run_trainer(argv, folder=folder)


def add_results(row: Row, folder: Path) -> None:
    """Add the results of a complete run to the row of its rung."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    series = {tag: [e.value for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    row.losses.append(series["loss/val"][-1])
    row.estimates += series.get("estimate/val", [])[-1:]
    if speeds := series.get("speed/chars_per_second"):  # nothing is logged in a run of a few steps
        row.speeds.append(statistics.median(speeds))
    row.floor = series.get("loss/floor", [None])[-1]
    if not row.sample:
        generator = TextGenerator.load(last_checkpoint(folder), precision="fp32")
        row.parameters = num_parameters(generator.model)
        row.sample = sample_line(generator)


def sample_line(generator: TextGenerator) -> str:
    """The first line of 24 characters or more that a model generates, cut after 56."""
    lines = generator.generate(max_new_tokens=400)[0].splitlines()
    lines = [line.strip() for line in lines] or [""]
    return next((line for line in lines if len(line) >= 24), max(lines, key=len))[:56]


@torch.no_grad()
def counted_bigram(settings: dict) -> Row:
    """The row of the bigram model by counting, the optimum that the trained one approaches."""
    data = TextDataModule(**settings["data"])
    data.prepare_data()
    data.setup()
    config = BigramConfig(vocab_size=data.vocab_size, block_size=data.hparams.block_size)
    model = Bigram(config)
    spans = [data.tokens[start:stop].astype("int64") for start, stop in data.train_spans]
    model.count(torch.from_numpy(ids) for ids in spans)
    nats = 0.0
    for x, y in data.val_dataloader():
        nats += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
    return Row(
        "counted",
        "Counted bigram",
        num_parameters(model),
        losses=[nats / data.val_characters],
        floor=data.val_floor,
        sample=sample_line(TextGenerator(model, data.tokenizer)),
    )


# table and picture


def write_results(rows: list[Row], corpus: str, out: Path) -> None:
    table = markdown(rows)
    (out / "ladder.md").write_text(table, encoding="utf-8")
    with (out / "ladder.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].figures())
        writer.writeheader()
        writer.writerows(row.figures() for row in rows)
    picture = draw(rows, corpus, out / "ladder.png")
    print(table)
    print(f"written: {out}/ladder.md, ladder.csv{picture}")
    print(f"watch:   tensorboard --logdir {out}")


def markdown(rows: list[Row]) -> str:
    """The rows as a table for people."""
    header = "| rung | parameters | val loss | lecture's estimate | characters/s | sample |\n"
    text = header + "| --- | ---: | ---: | ---: | ---: | --- |\n"
    for row in rows:
        cells = [row.title, "", row.loss_text, "", "", ""]
        if row.losses:
            cells[1] = f"{row.parameters:,}"
            cells[3] = f"{mean(row.estimates):.4f}" if row.estimates else ""
            cells[4] = f"{mean(row.speeds):,.0f}" if row.speeds else ""
            sample = row.sample.replace("|", "\\|").replace("`", "'")
            cells[5] = f"`{sample}`"
        text += f"| {' | '.join(cells)} |\n"
    if rows[0].floor is not None:
        text += f"\nThe entropy of this text, its floor, is {rows[0].floor:.4f} nats per character."
    return text + "\n"


def draw(rows: list[Row], corpus: str, path: Path) -> str:
    """Draw the ladder; returns what to add to the list of files written."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return ' (for a picture: pip install "matplotlib>=3.8")'
    rows = [row for row in rows if row.losses]
    means, places = [statistics.mean(row.losses) for row in rows], range(len(rows))
    seeds, floor = max(len(row.losses) for row in rows), rows[0].floor
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.step(means, places, where="post", color="0.75", linewidth=1, zorder=1)
    axes.plot(means, places, "o", color="tab:blue", markersize=7)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line behind the text
    for place, row, loss in zip(places, rows, means, strict=True):
        axes.plot(row.losses, [place] * len(row.losses), ".", color="tab:blue", alpha=0.4)
        text = f"{loss:.2f}" + (f"  ({loss - means[place - 1]:+.2f})" if place else "")
        at = max(row.losses), place
        axes.annotate(text, at, (9, 0), textcoords="offset points", va="center", bbox=box)
    if floor is not None:
        axes.axvline(floor, color="tab:red", linestyle="--", linewidth=1)
        text, style = f"{floor:.2f}, the entropy of the text", dict(color="tab:red", va="center")
        axes.annotate(text, (floor, 0), (6, 0), textcoords="offset points", **style)
    axes.set_yticks(places, [row.title for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("loss on held-out text, nats per character (lower is better)")
    figure.suptitle("What each idea of the lecture gains", fontweight="bold")
    shown = f"mean of {seeds} seeds (small dots)" if seeds > 1 else "one seed"
    axes.set_title(f"{corpus}: {shown}; in brackets the change from the rung above", fontsize=9)
    axes.margins(x=0.16)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path)
    return f", {path.name}"
