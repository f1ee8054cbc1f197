"""`export`: a checkpoint's model in a format of other programs."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from gpt_lightning.commands.common import Parser, check_new, errors_name_flags
from gpt_lightning.errors import UserError

OUT = {  # what --out is if it is not given
    "safetensors": "model.safetensors",
    "transformers": "model_transformers",
    "onnx": "model.onnx",
    "html": "model.html",
}
PRECISIONS = {"safetensors": ("fp32", "fp16", "bf16"), "html": ("int8", "fp16", "fp32")}


def export_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning export",
        description="Write a model in another format. safetensors is the file to share: generate, "
        "evaluate and fit --init_from read it, and it cannot contain code.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--to", required=True, choices=OUT, help="the format")
    add("--ckpt_path", default="best", metavar="PATH", help="last, best, a file or a run's folder")
    add(
        "--out",
        metavar="PATH",
        help="the new file or folder (default: model.safetensors, model.onnx, ...)",
    )
    precision_help = "; ".join(f"{to}: {', '.join(names)}" for to, names in PRECISIONS.items())
    precision_help = f"of the weights in the file, the first by default; {precision_help}"
    add("--precision", help=precision_help)
    add("--root", default=".", metavar="DIR", help="folder of lightning_logs")
    return parser


def main(argv: list[str]) -> None:
    """From flags to a file, or a folder."""
    args = export_parser().parse_args(argv)
    with errors_name_flags(args):
        export(args)


def export(args: Namespace) -> None:
    from safetensors import SafetensorError

    from gpt_lightning.checkpoint import (
        net_weights,
        read_newest_intact,
        shell_command,
        write_model_file,
    )

    out = Path(OUT[args.to] if args.out is None else args.out)
    check_new("out", out, Path(OUT[args.to]).suffix)
    precisions = PRECISIONS.get(args.to, ())
    if args.precision not in (None, *precisions):
        advice = f"choose {', '.join(precisions)}" if precisions else "drop it"
        raise UserError(f"precision={args.precision} is not one of to={args.to}: {advice}")
    path, checkpoint = read_newest_intact(args.ckpt_path, args.root)
    for name, weight in net_weights(checkpoint).items():
        if not weight.isfinite().all():
            raise UserError(f"ckpt_path={path}: {name} is not finite: its training diverged")
    try:
        if args.to == "safetensors":
            write_model_file(out, checkpoint, args.precision or precisions[0])
            use = shell_command("generate", out)
        elif args.to == "html":
            exporter("html")(path, checkpoint, out, args.precision or precisions[0])
            use = "open it in a browser"
        elif args.to == "onnx":
            exporter("onnx")(path, checkpoint, out)
            use = shell_command("generate", out)
        else:
            use = exporter("transformers")(path, checkpoint, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written: {error}") from error
    report(out, f"{path}, step {checkpoint['global_step']:,}", use)


def exporter(name: str) -> Any:
    """The function export_NAME of gpt_lightning/export/NAME.py."""
    try:
        module = import_module(f"gpt_lightning.export.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f'to={name} needs {error.name}: pip install -e ".[export]"') from error
    return getattr(module, f"export_{name}")


def report(out: Path, source: str, use: str) -> None:
    """Print what was written, and the command or the code that uses it."""
    files = [out] if out.is_file() else out.iterdir()
    size = sum(file.stat().st_size for file in files)
    shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    print(f"{out}: {shown}, from {source}\n{use}")
