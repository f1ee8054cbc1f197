"""Validation loss of each tokenizer on a text after the same training time."""

from pathlib import Path

from benchmarks.common import columns, fit, markdown, median

VARIANTS = {
    "char": [],
    "byte": ["--data.tokenizer=byte"],
    "word, 1,000": ["--data.tokenizer=word"],
    "word, 4,000": ["--data.tokenizer=word", "--data.max_vocab_size=4000"],
    "bpe, 500": ["--data.tokenizer=bpe", "--data.max_vocab_size=500"],
    "bpe, 1,000": ["--data.tokenizer=bpe"],
    "bpe, 4,000": ["--data.tokenizer=bpe", "--data.max_vocab_size=4000"],
}
RARE = {"char, min_count 3": ["--data.min_count=3"]}  # for a text with many rare characters


def add_arguments(parser):
    parser.add_argument("--corpus", default="tinyshakespeare")
    parser.add_argument("--seconds", type=int, default=60, help="of training (default: 60)")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *RARE], default=[*VARIANTS])
    parser.add_argument("--flag", action="append", default=[], help="a further flag of fit")


def measure(args) -> tuple[dict, str]:
    """Each run has as many steps as fit the time, so that its learning rate decays in full.

    A short run of the same settings measures the time of a step first.
    """
    corpus = str(Path(args.corpus).resolve()) if Path(args.corpus).exists() else args.corpus
    common = [f"--data.corpus={corpus}", "--sample.every_n_steps=0", *args.flag]
    runs: dict[str, list[dict]] = {name: [] for name in args.only}
    for seed in range(args.rounds):
        for name, these in runs.items():
            flags = [*common, *{**VARIANTS, **RARE}[name], f"--seed_everything={1337 + seed}"]
            probe = fit(*flags, *length(60), "--trainer.limit_val_batches=1")
            steps = max(1, round(args.seconds * 60 / probe["training"]))
            these.append(fit(*flags, *length(steps)))
            print(name, these[-1], flush=True)
    rows = [
        [
            name,
            f"{median(these, 'vocabulary'):,.0f}",
            f"{median(these, 'parameters') / 1e6:.1f}M",
            f"{median(these, 'steps'):,.0f}",
            f"{median(these, 'training'):.0f} s",
            f"{median(these, 'loss'):.3f}",
        ]
        for name, these in runs.items()
    ]
    header = ["tokenizer", "vocabulary", "parameters", "steps", "training", "loss"]
    figures = {"corpus": args.corpus, **{name: columns(these) for name, these in runs.items()}}
    return figures, markdown(header, rows)


def length(steps: int) -> list[str]:
    """The flags of a run with one validation, at its end."""
    return [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
