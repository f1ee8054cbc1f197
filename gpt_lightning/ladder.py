"""Train every rung of the lecture's ladder with several seeds, and compare the losses.

1. Each (rung, seed) is a run of `fit` in its own folder, OUT/RUNG/seed_N.
2. The results of a run are read from its last checkpoint and its TensorBoard log, if there is one.
3. A bigram model made by counting, which needs no training, is added below the first rung.
4. The rows become ladder.md, ladder.csv and ladder.png, and each rung a page that runs its model.

The files alone record what is done, so the same command resumes an interrupted climb.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import statistics
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.checkpoint import KEY, quoted, read_checkpoint, run_history
from gpt_lightning.config_files import CONFIGS, load_config
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.errors import UserError
from gpt_lightning.export.html import Rung, export_html
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.lightning_cli import run_trainer
from gpt_lightning.model import num_parameters
from gpt_lightning.model.lecture import Bigram, BigramConfig

LAST = "checkpoints/last.ckpt"
PAGES = "pages"  # folder of the rungs' pages


@dataclass
class Row:
    """Results of one rung. Losses are in nats per character, on the held-out text."""

    name: str
    title: str
    idea: str = ""  # what it adds to the rung before it
    checkpoint: Path | None = None  # of its first seed
    page: str = ""  # file that runs its model, relative to the table
    parameters: int = 0
    losses: list[float] = field(default_factory=list)  # exact, one for each seed
    estimates: list[float] = field(default_factory=list)  # the lecture's, if the config asks for it
    speeds: list[float] = field(default_factory=list)  # characters per second in training
    floor: float | None = None
    sample: str = ""

    def figures(self) -> dict:
        """The columns of ladder.csv; None where a figure is missing."""
        return {
            "name": self.name,
            "rung": self.title,
            "parameters": self.parameters,
            "val_loss_mean": mean(self.losses),
            "val_loss_sd": spread(self.losses),
            "val_losses": " ".join(f"{loss:.5f}" for loss in self.losses),
            "estimate_val_mean": mean(self.estimates),
            "chars_per_second": mean(self.speeds),
            "floor": self.floor,
            "sample": self.sample,
        }


def mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def climb(argv: list[str]) -> int:
    """The command `climb`; returns its exit code."""
    args, flags = build_parser().parse_known_args(argv)
    for flag in flags:
        if flag.split("=")[0] in ("--seed_everything", "--ckpt_path", "--print_config"):
            raise UserError(
                f"{flag} is not a flag of climb: --seeds gives the seeds, and the same command "
                "resumes an interrupted climb"
            )
    seeds, names = args.seeds.split(","), args.rungs.split(",") if args.rungs is not None else None
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds={args.seeds} must be whole numbers such as 1337,1338")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={args.seeds} names a seed twice")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={args.out} cannot be a folder: {error.strerror}") from error
    rows: list[Row] = []
    failed = False
    for rung in find_rungs(args.configs, names):
        if not names and rung.stem.endswith("_gpu") and not torch.cuda.is_available():
            print(f"{rung.stem} is skipped: it needs a GPU")
            continue
        row = Row(rung.stem, *title_and_idea(rung))
        for seed in seeds:
            folder = args.out / rung.stem / f"seed_{seed}"
            code = fit(rung, seed, folder, flags)
            if code == 2:
                failed = True
            elif code:
                print("stopped; the same command resumes")
                return code
            else:
                add_results(row, folder)
                print(f"{row.title}, seed {seed}: {row.losses[-1]:.4f}", flush=True)
        if row.losses:
            rows.append(row)
    if rows:
        data = read_checkpoint(rows[0].checkpoint)[KEY]["settings"]["data"]
        write_pages(rows, args.out)
        write_results([counted_bigram(data), *rows], data["corpus"], args.out)
    return 2 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpt_lightning climb",
        usage="%(prog)s [--out DIR] [--seeds N,N,...] [--rungs NAME,...] [any flag of fit]",
        description="Train every config of a folder with several seeds, and write a table, a "
        "picture and a page for each config. The same command resumes it. Flags of fit are passed "
        "to every run, for example --data.corpus=tinyshakespeare.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    help_out = f"folder of the results {default}"
    add("--out", type=Path, default=Path("ladder"), metavar="DIR", help=help_out)
    help_configs = f"folder of the rungs, or a shipped one {default}"
    add("--configs", default="lecture", metavar="DIR", help=help_configs)
    help_seeds = f"seeds of each rung {default}"
    add("--seeds", default="1337,1338,1339", metavar="N,N", help=help_seeds)
    help_rungs = "only these rungs (default: all, those that end in _gpu only with a GPU)"
    add("--rungs", metavar="NAME,NAME", help=help_rungs)
    return parser


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


def title_and_idea(rung: Path) -> tuple[str, str]:
    """The name of a rung and what it adds: its config's first comment, before and after a colon."""
    first_line = rung.read_text(encoding="utf-8").partition("\n")[0]
    title, _, idea = first_line.removeprefix("#").partition(":")
    return title.strip(), idea.strip()


# one run


def fit(rung: Path, seed: str, folder: Path, flags: list[str]) -> int:
    """Start or resume the run of one rung and seed, unless it is complete.

    Returns:
        The exit code; 2 if the run has failed, as when its loss diverges.

    Raises:
        UserError: for a mistake, before the run starts.
    """
    argv = ["fit", f"--config={rung}", *flags, f"--seed_everything={seed}"]
    run, note = {"flags": flags, "config": load_config(rung)}, folder.with_suffix(".json")
    last = folder / LAST
    if last.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        complete = before.pop("complete", False)
        if before != run:
            raise UserError(f"{folder} has a run with other flags or configs; give another --out")
        checkpoint = read_checkpoint(last)  # complete, too, if it was killed after its last step
        steps = checkpoint[KEY]["settings"]["trainer"].get("max_steps", math.inf)
        if complete or checkpoint["global_step"] >= steps:
            return 0
        argv = ["fit", f"--ckpt_path={last}"]
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(run, indent=1), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the table is the summary of all runs
            code = run_trainer(argv, folder=folder)
    except UserError as error:
        if not folder.exists():
            note.unlink()
            raise
        print(f"{rung.stem}, seed {seed}: {error}", file=sys.stderr)
        return 2
    if code == 0:
        note.write_text(json.dumps({**run, "complete": True}, indent=1), encoding="utf-8")
    return code


def add_results(row: Row, folder: Path) -> None:
    """Add the results of a complete run to the row of its rung."""
    history = run_history(read_checkpoint(folder / LAST))
    if not history["val_losses"]:
        raise UserError(f"{folder} was not validated: drop --trainer.limit_val_batches=0")
    row.losses.append(history["val_losses"][-1][1])
    row.floor = history["floor"]
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    series = {tag: [e.value for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    row.estimates += series.get("estimate/val", [])[-1:]
    if speeds := series.get("speed/chars_per_second"):  # nothing is logged in a run of a few steps
        row.speeds.append(statistics.median(speeds))
    if row.checkpoint is None:
        row.checkpoint = folder / LAST
        generator = TextGenerator.load(row.checkpoint, precision="fp32")
        row.parameters = num_parameters(generator.model)
        row.sample = sample_line(generator)


def sample_line(generator: TextGenerator) -> str:
    """The first line of 24 characters or more that a model generates, cut after 56."""
    lines = [line.strip() for line in generator.generate(max_new_tokens=400)[0].splitlines()]
    return next((line[:56].strip() for line in lines if len(line) >= 24), "")


@torch.no_grad()
def counted_bigram(data_settings: dict) -> Row:
    """The row of the bigram model by counting, the optimum that the trained one approaches."""
    data = TextDataModule(**data_settings)
    data.prepare_data()
    data.setup()
    config = BigramConfig(vocab_size=data.vocab_size, block_size=data.hparams.block_size)
    model = Bigram(config)
    spans = [data.tokens[start:stop].astype("int64") for start, stop in data.train_spans]
    model.count(torch.from_numpy(ids) for ids in spans)
    nats = 0.0
    for x, y in data.val_dataloader():
        nats += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
    row = Row("counted", "Counted bigram", parameters=num_parameters(model))
    row.losses.append(nats / data.val_characters)
    row.floor = data.val_floor
    row.sample = sample_line(TextGenerator(model, data.tokenizer))
    return row


# pages, table and picture


def write_pages(rows: list[Row], out: Path) -> None:
    """Write a page that runs the model of each rung, with links to the pages beside it."""
    (out / PAGES).mkdir(exist_ok=True)
    for before, row, after in zip([None, *rows[:-1]], rows, [*rows[1:], None], strict=True):
        beside = {"previous": before, "next": after}
        links = {word: (f"{r.name}.html", r.title) for word, r in beside.items() if r}
        row.page = f"{PAGES}/{row.name}.html"
        rung = Rung(row.title, row.idea, links)
        export_html(row.checkpoint, read_checkpoint(row.checkpoint), out / row.page, rung=rung)


def write_results(rows: list[Row], corpus: str, out: Path) -> None:
    table = markdown(rows)
    (out / "ladder.md").write_text(table, encoding="utf-8")
    with (out / "ladder.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].figures())
        writer.writeheader()
        writer.writerows(row.figures() for row in rows)
    draw(rows, corpus, out / "ladder.png")
    print(f"\n{table}\nwritten to {out}; watch with: tensorboard --logdir {quoted(str(out))}")


def markdown(rows: list[Row]) -> str:
    """The rows as a table for people."""
    text = "| rung | parameters | val loss | lecture's estimate | characters/s | sample |\n"
    text += "| --- | ---: | ---: | ---: | ---: | --- |\n"
    for row in rows:
        deviation = spread(row.losses)
        loss = f"{mean(row.losses):.4f}" + (f" ± {deviation:.4f}" if deviation else "")
        estimate = f"{mean(row.estimates):.4f}" if row.estimates else ""
        speed = f"{mean(row.speeds):,.0f}" if row.speeds else ""
        sample = row.sample.replace("|", "\\|").replace("`", "'")
        title = f"[{row.title}]({quote(row.page)})" if row.page else row.title
        cells = [title, f"{row.parameters:,}", loss, estimate, speed, f"`{sample}`"]
        text += f"| {' | '.join(cells)} |\n"
    if (floor := rows[0].floor) is not None:
        text += f"\nThe entropy of this text, its floor, is {floor:.4f} nats per character.\n"
    return text


def draw(rows: list[Row], corpus: str, path: Path) -> None:
    """Draw the ladder, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print('no picture: it needs pip install "matplotlib>=3.8"')
        return
    means, places = [statistics.mean(row.losses) for row in rows], range(len(rows))
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.step(means, places, where="post", color="0.75", linewidth=1, zorder=1)
    axes.plot(means, places, "o", color="tab:blue", markersize=7)
    beside = {"textcoords": "offset points", "va": "center"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line behind the text
    for place, row, loss in zip(places, rows, means, strict=True):
        axes.plot(row.losses, [place] * len(row.losses), ".", color="tab:blue", alpha=0.4)
        text = f"{loss:.2f}" + (f"  ({loss - means[place - 1]:+.2f})" if place else "")
        axes.annotate(text, (max(row.losses), place), (9, 0), bbox=box, **beside)
    if (floor := rows[0].floor) is not None:
        axes.axvline(floor, color="tab:red", linestyle="--", linewidth=1)
        text = f"{floor:.2f}, the entropy of the text"
        axes.annotate(text, (floor, 0), (6, 0), color="tab:red", **beside)
    axes.set_yticks(places, [row.title for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("loss on held-out text, nats per character (lower is better)")
    figure.suptitle("What each idea of the lecture gains", fontweight="bold")
    shown = "mean of the seeds (small dots); in brackets the change from the rung above"
    axes.set_title(f"{corpus}: {shown}", fontsize=9, parse_math=False)
    axes.margins(x=0.16)
    axes.spines[["top", "right", "left"]].set_visible(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks characters of a file's name
        figure.savefig(path)
