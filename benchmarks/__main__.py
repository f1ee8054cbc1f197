"""`python -m benchmarks NAME`: measure, print a table, and write it to benchmarks/results."""

import argparse
from pathlib import Path

from benchmarks import big_text, generation, loss, overhead, same_shape, scale, tokenizers
from benchmarks.common import write_results

BENCHMARKS = (loss, same_shape, generation, overhead, scale, big_text, tokenizers)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module in BENCHMARKS:
        summary = module.__doc__.partition("\n")[0]
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--rounds", type=int, default=3, help="of each side (default: 3)")
        command.add_argument("--out", type=Path, default=Path("benchmarks/results"))
        module.add_arguments(command)
        command.set_defaults(measure=module.measure, name=name)
    args = parser.parse_args(argv)
    figures, table = args.measure(args)
    name = f"loss_{Path(args.config).stem}" if args.name == "loss" else args.name
    write_results(args.out, name, figures, table)


if __name__ == "__main__":
    main()
