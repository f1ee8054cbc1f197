"""`import`: a model of another program as a safetensors file that the commands read."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from gpt_lightning.commands.common import Parser, check_new, errors_name_flags, read_file
from gpt_lightning.commands.export import report
from gpt_lightning.errors import UserError

PROGRAMS = {  # the flags that each needs
    "nanogpt": ("meta",),
    "mingpt": ("text", "n_head"),
    "transformers": (),
}


def import_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning import",
        description="Read a model of another program and write it to a safetensors file, for "
        "generate, evaluate, export and fit --init_from. No code in its files is run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", help="nanoGPT's ckpt.pt, minGPT's model.pt, or a folder of a GPT2LMHeadModel")
    add("--from", dest="program", required=True, choices=PROGRAMS, help="the program")
    add("--meta", metavar="FILE", help="nanogpt: the meta.pkl beside the training data")
    add("--text", metavar="FILE", help="mingpt: the text that it was trained on")
    add("--n_head", type=int, metavar="N", help="mingpt: number of heads")
    add("--out", default="imported.safetensors", metavar="FILE", help="(default: %(default)s)")
    return parser


def main(argv: list[str]) -> None:
    """From flags to a file."""
    args = import_parser().parse_args(argv)
    with errors_name_flags(args) as flags:
        for name in ("meta", "text", "n_head"):
            value, needed = getattr(args, name), name in PROGRAMS[args.program]
            if needed and value is None:
                raise UserError(f"--from={args.program} needs --{name}; see import --help")
            if not needed and value is not None:
                raise UserError(f"{name}={value} is not for --from={args.program}")
            if not needed:
                del flags[name]  # in an error, n_head is then a setting in the file
        import_model(args)


def import_model(args: Namespace) -> None:
    from gpt_lightning.checkpoint import SAFETENSORS, shell_command, write_model_file

    out = Path(args.out)
    check_new("out", out, SAFETENSORS)
    checkpoint = read_model(args)
    try:
        write_model_file(out, checkpoint)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}") from error
    report(out, args.path, shell_command("generate", out))


def read_model(args: Namespace) -> dict[str, Any]:
    """The model as a checkpoint."""
    if args.program == "transformers":
        from gpt_lightning.export.transformers import import_transformers

        return import_transformers(args.path)
    from gpt_lightning.export.nanogpt import import_mingpt, import_nanogpt

    if args.program == "nanogpt":
        return import_nanogpt(args.path, args.meta)
    return import_mingpt(args.path, read_file(args.text, "--text"), args.n_head)
