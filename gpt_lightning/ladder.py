"""Climb the ladder: `fit` every config of a folder, some seeds each, and compare the losses.

1. each (rung, seed) is a run of `fit` in a folder of its own: OUT/RUNG/seed_N;
2. what a run came to is read from its last checkpoint and its TensorBoard log;
3. the counted bigram, which needs no training, stands below the first rung;
4. the rows become ladder.md, ladder.csv and ladder.png.

What is done is known from the files alone, so the same command goes on where it was stopped.
"""

import contextlib
import csv
import io
import json
import os
import statistics
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from gpt_lightning.checkpoint import KEY, read_checkpoint
from gpt_lightning.config_files import chain, load_yaml
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.files import write_atomically
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.generation.writer import Writer
from gpt_lightning.lightning_cli import quiet, run_trainer
from gpt_lightning.messages import Parser
from gpt_lightning.training.lightning_module import GPTModule

COUNTED = "counted"


@dataclass
class Row:
    """One rung, over its seeds. Losses in nats per character, on the held-out text."""

    name: str
    title: str
    parameters: int | None = None
    losses: list[float] = field(default_factory=list)  # exact, one a seed
    estimates: list[float] = field(default_factory=list)  # the lecture's, where configs ask for it
    speeds: list[float] = field(default_factory=list)  # characters per second in training
    floor: float | None = None
    sample: str = ""
    missing: str = ""  # why there are no figures

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0

    @property
    def loss(self) -> str:
        """Mean and spread, as a person reads them."""
        if not self.losses:
            return ""
        spread = f" ± {self.spread:.4f}" if len(self.losses) > 1 else ""
        return f"{statistics.mean(self.losses):.4f}{spread}"


def climb(argv: list[str]) -> int:
    """The command `climb`; returns its exit code.

    Raises:
        ValueError: in one line, for flags or a folder that cannot be.
    """
    quiet()
    args, flags = parse(argv)
    rungs = find_rungs(args)
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_mixture(args.out, rungs, flags)
    waiting = [rung for rung in rungs if left_out(rung, args)]
    rows = []
    runs = (len(rungs) - len(waiting)) * len(args.seeds)
    with tqdm(total=runs, bar_format=BAR, disable=None) as bar:  # none where nobody looks
        for rung in rungs:
            for seed in () if rung in waiting else args.seeds:
                bar.set_description(f"{rung.stem}, seed {seed}")
                code = fit(rung, seed, args.out, flags, LadderBar(bar))
                if code:
                    bar.write("stopped; the same command goes on from here")
                    return code
                bar.n = round(bar.n) + 1
            rows.append(read_row(rung, args.out, args.seeds))
            bar.write(f"{rows[-1].title:<24} {rows[-1].loss or rows[-1].missing}")
    climbed = [row for row in rows if row.losses]
    if not climbed:
        return 0
    run = args.out / climbed[0].name / f"seed_{args.seeds[0]}"
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    rows.insert(0, counted_row(config))
    write_table(rows, args.out)
    print((args.out / "ladder.md").read_text(encoding="utf-8"))
    picture = draw(rows, config["data"]["corpus"], args.out)
    print(f"written: {args.out}/ladder.md, ladder.csv{picture}")
    print(f"watch:   tensorboard --logdir {args.out}")
    return 0


BAR = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}{postfix}]"


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Our own flags, and those that are handed on to `fit`."""
    parser = Parser(
        prog="python -m gpt_lightning climb",
        usage="%(prog)s [--out DIR] [--seeds N,N,...] [any flag of fit]",
        description="Train every config of a folder, several seeds each, and write a table and a "
        "picture. Stopped half-way, the same command goes on. Flags of fit go to every run: "
        "--data.corpus=tinyshakespeare.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("ladder"), metavar="DIR", help="(default: ladder)")
    add(
        "--configs",
        type=Path,
        default=Path("configs/lecture"),
        metavar="DIR",
        help="the rungs, in the order of their names (default: configs/lecture)",
    )
    add("--seeds", default="1337,1338,1339", metavar="N,N", help="(default: 1337,1338,1339)")
    add("--rungs", metavar="NAME,NAME", help="only these (default: all; *_gpu with a GPU only)")
    args, flags = parser.parse_known_args(argv)
    try:
        args.seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    except ValueError:
        raise ValueError(f"--seeds={args.seeds}: expected numbers, as in 1337,1338") from None
    for flag, ours in (("--seed_everything", "--seeds"), ("--ckpt_path", "--out")):
        if any(given.split("=")[0] == flag for given in flags):
            raise ValueError(f"{flag} is climb's own affair; use {ours}")
    return args, flags


def find_rungs(args: Namespace) -> list[Path]:
    """The config files asked for, lowest rung first."""
    found = {path.stem: path for path in sorted(args.configs.glob("*.yaml"))}
    if not found:
        raise ValueError(
            f"--configs={args.configs}: no config there; run climb in the project's folder, or "
            "name a folder of your own"
        )
    if args.rungs is None:
        return list(found.values())
    names = args.rungs.split(",")
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"--rungs={unknown[0]} is no config there (there are: {', '.join(found)})")
    return [path for name, path in found.items() if name in names]


def left_out(rung: Path, args: Namespace) -> bool:
    """Whether a rung waits for a GPU; named in so many words it is climbed all the same."""
    return rung.stem.endswith("_gpu") and not args.rungs and not torch.cuda.is_available()


def refuse_mixture(out: Path, rungs: list[Path], flags: list[str]) -> None:
    """Raise a ValueError if `out` was climbed with other flags or configs than these."""
    path = out / "climb.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"configs": {}}
    if known.get("flags", flags) != flags:
        raise ValueError(
            f"--out={out} was climbed with the flags {' '.join(known['flags']) or '(none)'}; "
            "give the same, or another --out"
        )
    for rung in rungs:
        made_of = settings(rung)
        if known["configs"].get(rung.stem, made_of) != made_of:
            raise ValueError(
                f"{rung} has changed since --out={out} was climbed; give another --out"
            )
        known["configs"][rung.stem] = made_of
    with write_atomically(path) as file:
        file.write(json.dumps(known | {"flags": flags}, indent=1).encode())


def settings(rung: Path) -> list[dict]:
    """All that a rung is made of, so that a change anywhere in its chain is noticed."""
    parts = chain(str(rung))
    texts = [Path(p).read_text(encoding="utf-8") if os.path.exists(p) else p for p in parts]
    return [yaml.safe_load(text) for text in texts]


# one run


class LadderBar(ProgressBar):
    """Moves the ladder's bar along with one run."""

    is_enabled = False  # what a run prints goes the usual way

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar, self.before = bar, round(bar.n)

    def disable(self) -> None:
        """The bar is not this run's to hide."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % 50 == 0 and trainer.max_steps > 0:
            self.bar.n = self.before + trainer.global_step / trainer.max_steps
            self.bar.refresh()


def fit(rung: Path, seed: int, out: Path, flags: list[str], bar: LadderBar) -> int:
    """Run, or go on with, `fit` for one rung and seed; does nothing if that is done."""
    folder = out / rung.stem / f"seed_{seed}"
    argv = ["fit", "--config", str(rung), *flags, f"--seed_everything={seed}"]
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        checkpoint = read_checkpoint(last)
        if checkpoint["global_step"] >= max_steps(checkpoint):
            return 0
        argv = ["fit", f"--ckpt_path={last}"]
    with contextlib.redirect_stdout(io.StringIO()):  # a table says it better than 36 runs
        return run_trainer(argv, "", folder, bar)


def max_steps(checkpoint: dict) -> int:
    return load_yaml(checkpoint[KEY]["config"])["trainer"]["max_steps"]


# what came of it


def read_row(rung: Path, out: Path, seeds: list[int]) -> Row:
    """The row of a rung, from its runs' checkpoints and logs."""
    row = Row(rung.stem, title(rung))
    for seed in seeds:
        folder = out / rung.stem / f"seed_{seed}"
        last = folder / "checkpoints" / "last.ckpt"
        if not last.exists():
            row.missing = "needs a GPU"
            continue
        weights = read_checkpoint(last)["state_dict"]
        row.parameters = sum(w.numel() for name, w in weights.items() if name.startswith("net."))
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        series = {tag: [e.value for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
        row.losses.append(series["val/loss"][-1])
        row.estimates += series.get("estimate/val", [])[-1:]
        row.speeds.append(statistics.median(series["chars_per_second"]))
        row.floor = series.get("val/floor", [None])[-1]
        row.sample = row.sample or sample_line(Writer.load(last))
    return row


def title(rung: Path) -> str:
    """What a rung is called: its first comment, up to the colon."""
    first = rung.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").partition(":")[0] if first.startswith("#") else rung.stem


def sample_line(writer: Writer, seed: int = 1337) -> str:
    """The first line of some length that a model writes, drawn as the lecture draws."""
    text = writer.write(max_new_tokens=400, sampling=Sampling(temperature=1.0), seed=seed)[0]
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if len(line) >= 24), max(lines, key=len))[:56]


def counted_row(config: dict) -> Row:
    """The bigram by counting pairs, on a run's text: the loss that its training arrives at."""
    data = TextDataModule(**config["data"])
    model = GPTModule(
        data.vocab_size,
        data.hparams.block_size,
        name="bigram",
        optimizer="adamw",
        eval_iters=config["model"]["eval_iters"],
    )
    pieces = [torch.from_numpy(data.tokens[a:b].astype("int64")) for a, b in data.train_spans]
    model.net.count(pieces)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    metrics = trainer.validate(model, data, verbose=False)[0]
    return Row(
        COUNTED,
        "Counted bigram",
        parameters=data.vocab_size**2,
        losses=[metrics["val/loss"]],
        estimates=[metrics["estimate/val"]] if "estimate/val" in metrics else [],
        floor=metrics.get("val/floor"),
        sample=sample_line(Writer(model.net, data.tokenizer)),
    )


def write_table(rows: list[Row], out: Path) -> None:
    """ladder.md for people, ladder.csv for programs."""
    head = ["rung", "parameters", "val loss", "lecture's estimate", "characters/s", "it writes"]
    lines = [head, ["---", "---:", "---:", "---:", "---:", "---"]]
    for row in rows:
        if not row.losses:
            lines.append([row.title, "", row.missing, "", "", ""])
            continue
        sample = row.sample.replace("|", "\\|").replace("`", "'")
        lines.append(
            [
                row.title,
                f"{row.parameters:,}",
                row.loss,
                f"{statistics.mean(row.estimates):.4f}" if row.estimates else "",
                f"{statistics.mean(row.speeds):,.0f}" if row.speeds else "",
                f"`{sample}`",
            ]
        )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
    floor = next((row.floor for row in rows if row.floor is not None), None)
    if floor is not None:
        text += f"\nThe floor of this text is {floor:.4f} nats per character.\n"
    (out / "ladder.md").write_text(text, encoding="utf-8")
    with open(out / "ladder.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["name", "rung", "parameters", "val_loss_mean", "val_loss_sd", "val_losses"]
            + ["estimate_val_mean", "chars_per_second", "floor", "sample"]
        )
        for row in rows:
            known = bool(row.losses)
            table.writerow(
                [
                    row.name,
                    row.title,
                    row.parameters,
                    statistics.mean(row.losses) if known else None,
                    row.spread if len(row.losses) > 1 else None,
                    " ".join(f"{loss:.5f}" for loss in row.losses),
                    statistics.mean(row.estimates) if row.estimates else None,
                    statistics.mean(row.speeds) if row.speeds else None,
                    row.floor,
                    row.sample,
                ]
            )


def draw(rows: list[Row], corpus: str, out: Path) -> str:
    """ladder.png, of a text called `corpus`; returns what to add to the list of files written."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return ' (for a picture: pip install "matplotlib>=3.8")'
    rows = [row for row in rows if row.losses]
    means = [statistics.mean(row.losses) for row in rows]
    places, before = range(len(rows)), [None, *means]
    seeds = max(len(row.losses) for row in rows)
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.step(means, places, where="post", color="0.75", linewidth=1, zorder=1)
    for place, row, mean, last in zip(places, rows, means, before, strict=False):
        axes.plot(row.losses, [place] * len(row.losses), ".", color="tab:blue", alpha=0.4)
        axes.plot(mean, place, "o", color="tab:blue", markersize=7)
        text = f"{mean:.2f}" + (f"  ({mean - last:+.2f})" if last else "")
        at = (max(row.losses), place)
        box = {
            "facecolor": "white",
            "edgecolor": "none",
            "pad": 1,
        }  # over the line of the next rung
        axes.annotate(text, at, (9, 0), textcoords="offset points", va="center", bbox=box)
    axes.set_yticks(places, [row.title for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("loss on held-out text, nats per character (less is better)")
    figure.suptitle("What each idea of the lecture buys", fontweight="bold")
    each = f"mean of {seeds} seeds, each a small dot" if seeds > 1 else "one seed"
    axes.set_title(f"{corpus}: {each}; in brackets the change from the rung above", fontsize=9)
    if rows[0].floor is not None:
        axes.axvline(rows[0].floor, color="tab:red", linestyle="--", linewidth=1)
        axes.annotate(
            f"{rows[0].floor:.2f}, the floor: no model can do better",
            (rows[0].floor, 0),
            (6, 0),
            textcoords="offset points",
            color="tab:red",
            va="center",
        )
    axes.margins(x=0.16)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(out / "ladder.png")
    return ", ladder.png"
