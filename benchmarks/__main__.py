"""`python -m benchmarks NAME`, from the root of the repository."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import big_text, generation, loss, overhead, same_shape, scale, soak, step
from benchmarks.report import write

BESIDE = ("loss", "same_shape", "generation")  # those with nanoGPT in turn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, what in (
        ("loss", "loss and time of a config, nanoGPT's CPU recipe beside it"),
        ("same_shape", "characters a second in nanoGPT's CPU shape"),
        ("overhead", "the Trainer's step against a raw loop"),
        ("generation", "characters written a second, nanoGPT and transformers beside it"),
        ("scale", "time and memory against width, depth, context and text"),
        ("step", "where the time of a step goes"),
        ("big_text", "preparing gigabytes of text, and a step on them beside a small text's"),
        ("soak", "memory, open files and step time in a long run"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--rounds", type=int, default=3, help="of each side; medians")
        command.add_argument("--out", type=Path, default=Path("benchmarks/results"))
        if name in BESIDE:
            command.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
        if name in ("loss", "step"):
            command.add_argument("--config", type=Path, required=True, help="of ours")
        if name == "loss":
            command.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2, 3, 4])
        if name == "soak":
            command.add_argument("--minutes", type=float, default=60.0)
            command.add_argument("--picture", type=Path, default=Path("docs/soak.png"))
        if name in ("loss", "soak"):
            command.add_argument("--flag", action="append", default=[], help="more for our fit")
        if name == "big_text":
            command.add_argument("--gigabytes", type=float, default=2.0)
        if name in ("same_shape", "overhead", "scale", "big_text"):
            command.add_argument("--steps", type=int, default=40 if name == "scale" else 300)
    args = parser.parse_args(argv)
    # every process that is started from here finds this project, wherever it runs
    path = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    try:
        if args.rounds < 1 and args.name != "loss":
            raise ValueError(f"--rounds={args.rounds} must be at least 1")
        if args.name in BESIDE and args.nanogpt is None and args.rounds > 0:
            raise ValueError("--nanogpt=PATH is missing: a checkout of nanoGPT to compare with")
        name = args.name
        if name in ("loss", "step") and not args.config.is_file():
            raise ValueError(f"--config={args.config}: no such file")
        if name == "loss":
            found = loss.measure(args.nanogpt, args.config, args.seeds, args.rounds, args.flag)
            name = f"loss_{args.config.stem}"
        elif name == "same_shape":
            found = same_shape.measure(args.nanogpt, args.rounds, args.steps)
        elif name == "overhead":
            found = overhead.measure(args.rounds, args.steps)
        elif name == "scale":
            found = scale.measure(args.rounds, args.steps)
        elif name == "step":
            found = step.measure(args.config, args.rounds)
            name = f"step_{args.config.stem}"
        elif name == "big_text":
            found = big_text.measure(args.gigabytes, args.rounds, args.steps)
        elif name == "soak":
            found = soak.measure(args.minutes, args.flag, args.picture)
        else:
            found = generation.measure(args.nanogpt, args.rounds)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    write(args.out, name, *found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
