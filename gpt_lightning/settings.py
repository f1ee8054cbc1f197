"""The settings of a command: flags override configs, and configs override the checkpoint's.

`parse` returns only the settings that the user gave, without default values, so a missing setting
is one that was not given. `choose_length` then chooses the settings that depend on the text.
"""

import re
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from gpt_lightning.checkpoint import COMMAND, KEY, SECTIONS
from gpt_lightning.compatibility import trusted_settings
from gpt_lightning.config_files import expand_configs
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.errors import UserError, did_you_mean
from gpt_lightning.model import CONFIGS
from gpt_lightning.training.callbacks import GenerateText
from gpt_lightning.training.module import GPTModule
from gpt_lightning.training.optim import OptimizerConfig
from gpt_lightning.training.saving import BestAndLast

STEPS = 1000  # of a run whose length is not given: a minute or two on two cores
EPOCHS = 3  # of a short text: longer runs overfit (docs/experiments.md)
FEWEST_STEPS = 40
VALIDATION_STEPS = 250
CORPORA = ("corpus", "val_corpus", "test_corpus", "vocabulary_corpus")  # may be file names
LIMITED = ("train", "val", "test", "predict")  # --trainer.limit_train_batches, ...
GUESSES = {  # flags of other programs, and what they are here
    ("--seed",): "--seed_everything",
    ("--resume",): "--ckpt_path=last",
    ("--lr", "--learning-rate"): "--model.learning_rate",
    ("--gpus", "--devices"): "--trainer.devices",
    ("--device",): "--trainer.accelerator",
    ("--epochs", "--max_epochs", "--num_train_epochs"): "--trainer.max_epochs",
    ("--steps", "--max_iters"): "--trainer.max_steps",
    ("--data", "--dataset", "--text", "--file"): "--data.corpus",
    ("--batch-size", "--per_device_train_batch_size"): "--data.batch_size",
    ("--output_dir", "--out_dir"): "--trainer.default_root_dir",
}
TYPES = {  # in words
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true, false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
}
LOGGERS = {  # the name of a package, which is also the short name of its logger, and the class
    "csv": "CSVLogger",
    "tensorboard": "TensorBoardLogger",
    "wandb": "WandbLogger",
    "mlflow": "MLFlowLogger",
}

Settings = dict[str, Any]  # "seed_everything", "ckpt_path" and a dict for each of SECTIONS


def build_parser(command: str, description: str = "") -> ArgumentParser:
    """All flags of a command. The Trainer's many come last in `--help`."""
    parser = ArgumentParser(
        prog=f"{COMMAND} {command}",
        usage=f"{COMMAND} {command} [--config NAME_OR_FILE ...] [--flag=value ...]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # the one below prints what was given, without defaults
    )
    add = parser.add_argument
    add("-c", "--config", action="config", help="a shipped config or a YAML file")
    add("--print_config", action="store_true", help="print the settings as a config and exit")
    add("--seed_everything", type=NonNegativeInt, default=1337, help="seed of the run")
    path_help = "last, best, a file, or a run's folder: for fit its last, else its best"
    add("--ckpt_path", type=str | None, help=path_help)
    add("--init_from", type=str | None, help="fit: start from the weights of best, last or a file")
    add_class = parser.add_class_arguments
    add_class(TextDataModule, "data", skip={"seed"}, instantiate=False)
    add_model_arguments(parser)
    add_class(GPTModule, "model", skip={"model", "optimizer", "seed"}, instantiate=False)
    add_class(GenerateText, "sample", instantiate=False)
    add_class(BestAndLast, "checkpoint", skip={"folder"}, instantiate=False)
    skip = {"logger", *(f"limit_{part}_batches" for part in LIMITED)}
    options = {"sub_configs": True, "fail_untyped": False, "skip": skip}
    add_class(Trainer, "trainer", instantiate=False, **options)
    for part in LIMITED:  # Lightning's type makes a fraction of 1: all batches
        limit_help = "a number of batches, or a fraction of them such as 0.5"
        add(f"--trainer.limit_{part}_batches", type=int | float | None, help=limit_help)
    one = Literal[tuple(LOGGERS)] | Logger
    logger_help = "csv or tensorboard, in the run's folder; wandb, mlflow, a class; false: none"
    add("--trainer.logger", type=one | list[one] | bool | None, help=logger_help)
    return parser


def add_model_arguments(parser: ArgumentParser) -> None:
    """One flat flag `--model.FIELD` for each field of the model and optimizer configs."""
    names = Literal[tuple(CONFIGS)]
    parser.add_argument("--model.name", type=names, default="gpt", help="the architecture")
    added = {"vocab_size", "block_size"}  # these come from the data
    for config in (*CONFIGS.values(), OptimizerConfig):
        own = {item.name for item in fields(config)}
        skip = own & added
        parser.add_class_arguments(config, "model", as_group=False, skip=skip, instantiate=False)
        added |= own


def parse(parser: ArgumentParser, argv: list[str], base: Settings | None = None) -> Settings:
    """The settings that are given: flags over configs over `base`. No defaults."""
    expanded = expand_configs(argv)
    if any(arg.startswith("--trainer.logger.") for arg in argv):  # arguments of the class
        classes = {f"--trainer.logger={k}": f"--trainer.logger={v}" for k, v in LOGGERS.items()}
        expanded = [classes.get(arg, arg) for arg in expanded]
    if base is not None:
        expanded.insert(0, "--config=" + yaml.safe_dump(base, allow_unicode=True))
    try:
        namespace = parser.parse_args(expanded, defaults=False)
    except ArgumentError as error:
        message = unknown_flag(argv, parser) or plain_message(str(error))
        raise UserError(wrong_config(argv, parser) + message) from error
    text = parser.dump(namespace, skip_unset=False, skip_validation=True)
    given = yaml.safe_load(text) or {}  # plain types only
    given.pop("config", None)
    if (seed := given.get("seed_everything", 0)) >= 2**32:
        raise UserError(f"--seed_everything={seed} must be below 2**32")
    settings = {**given, **{section: given.get(section) or {} for section in SECTIONS}}
    for section in SECTIONS:
        if not isinstance(settings[section], dict):
            raise UserError(f"{section}: {settings[section]} must be a mapping of settings")
    if logger := settings["trainer"].get("logger"):
        several = isinstance(logger, list)
        settings["trainer"]["logger"] = (
            [full_logger(one) for one in logger] if several else full_logger(logger)
        )
    return settings


def full_logger(logger: str | dict[str, Any] | bool) -> str | dict[str, Any] | bool:
    """The setting of one logger, its class in place of `wandb` and `mlflow`."""
    name = logger["class_path"].split(".")[-1] if isinstance(logger, dict) else logger
    for package, class_name in LOGGERS.items():
        if name in (package, class_name) and find_spec(package) is None:
            raise UserError(f"--trainer.logger={name} needs a package: pip install {package}")
    if logger in ("wandb", "mlflow"):
        return {"class_path": f"lightning.pytorch.loggers.{LOGGERS[logger]}"}
    return logger


def unknown_flag(argv: list[str], parser: ArgumentParser) -> str | None:
    """A message about the first flag that does not exist, or None."""
    known = [f"--{path}" for path in ("help", *parser.get_defaults().keys())]
    if argv and not argv[0].startswith("-"):
        return f"unknown argument {argv[0]!r}; did you mean --data.corpus={argv[0]}?"
    for arg in argv:
        flag = arg.split("=")[0].removesuffix("+")
        nested = any(flag.startswith(f"{name}.") for name in known)
        if flag.startswith("--") and flag not in known and not nested:
            if flag == "--seeds":
                return "unknown flag --seeds; `climb` trains with several seeds"
            guess = next((ours for theirs, ours in GUESSES.items() if flag in theirs), None)
            hint = f"; did you mean {guess}?" if guess else did_you_mean(flag, known)
            return f"unknown flag {flag}{hint}"
    return None


def plain_message(message: str) -> str:
    """jsonargparse's message about a value of the wrong type, in words; others as they are."""
    message = " ".join(message.split())
    if re.match(r"unrecognized arguments?: [^-]", message):
        return f"{message}; quote a pattern of file names: --data.corpus='texts/*.txt'"
    key = re.match(r'Parser key "([\w.]+)": ', message)
    wrong = re.search(r"Expected an? (.*?)\. Got value: (.*)$", message)
    wrong = wrong or re.search(r"Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$", message)
    if key is None or wrong is None:
        return message
    if problem := re.search(r"Problem with given class_path '([\w.]+)': (.*?) - ", message):
        return f"--{key[1]}: {problem[1]}: {problem[2]}"
    types = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", wrong[1])
    words = [TYPES.get(one, one.strip("'")) for one in types.split(", ")]
    allowed = dict.fromkeys(word for word in words if not re.search(r"[<\[\]']", word))
    one_of = "one of: " if len(allowed) > 1 else ""
    return f"--{key[1]}={wrong[2]} must be {one_of}{', '.join(allowed)}"


def wrong_config(argv: list[str], parser: ArgumentParser) -> str:
    """The first config that does not parse, for an error message; "" if all do."""
    for i, arg in enumerate(argv):
        flag, equals, _ = arg.partition("=")
        if flag not in ("-c", "--config"):
            continue
        given = argv[i : i + (1 if equals else 2)]
        try:
            parser.parse_args(expand_configs(given), defaults=False)
        except ArgumentError:
            return " ".join(given) + ": "
    return ""


def flag_names(parser: ArgumentParser) -> dict[str, str]:
    """The flag of each setting: `{"n_embd": "--model.n_embd", ...}`; see `with_flags`."""
    paths = sorted(parser.get_defaults().keys(), key=lambda path: not path.startswith("trainer."))
    return {path.split(".")[-1]: f"--{path}" for path in paths}


def restore(
    parser: ArgumentParser, argv: list[str], settings: Settings, checkpoint: dict
) -> Settings:
    """The settings that the checkpoint was trained with, overridden by those that are given."""
    command, entry = argv[0], checkpoint[KEY]
    given, trainer = set(settings["trainer"]), dict(entry["settings"].get("trainer", {}))
    for key in list(given):
        if any(arg.startswith(f"--trainer.{key}+") for arg in argv):
            # added to the checkpoint's; an object whose class is given again replaces that one
            again = [class_path(item) for item in as_list(settings["trainer"][key])]
            kept = [item for item in as_list(trainer.get(key)) if class_path(item) not in again]
            trainer[key] = kept
            given -= {key}
    # what the user says replaces what the run chose: how long it is, and how often it validates
    for names in ({"max_steps", "max_epochs"}, {"val_check_interval", "check_val_every_n_epoch"}):
        if given & names:
            given |= names
    if command != "fit":
        # those of the training
        given |= {"callbacks", "logger", *(f"limit_{part}_batches" for part in LIMITED)}
    stored = trusted_settings({**entry["settings"], "trainer": trainer}, given)
    if command != "fit":  # any text may be given, in the checkpoint's vocabulary
        stored["data"]["vocabulary"] = entry["tokenizer"].get("vocabulary")
    # YAML takes no file names that are not UTF-8
    corpora = {name: stored["data"].pop(name, None) for name in CORPORA}
    restored = parse(parser, argv[1:], base=stored)
    for name, corpus in corpora.items():
        if corpus is not None:
            restored["data"].setdefault(name, str(corpus))
    before, now = (part["model"].get("optimizer", "muon") for part in (stored, restored))
    if command == "fit" and before != now:
        raise UserError(
            f"--model.optimizer={now} cannot continue from the optimizer state of {before} in the "
            "checkpoint; drop the flag, or start a new run without --ckpt_path"
        )
    return restored


def as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def class_path(item: Any) -> Any:
    return item.get("class_path") if isinstance(item, dict) else item


def check_trainer_settings(trainer: dict[str, Any]) -> None:
    """Raise a UserError for settings that Lightning accepts but that train nothing."""
    for name in (
        "max_steps",
        "max_epochs",
        "val_check_interval",
        "check_val_every_n_epoch",
        "log_every_n_steps",
        "accumulate_grad_batches",
        "limit_train_batches",
    ):
        if trainer.get(name) == 0:
            raise UserError(f"--trainer.{name}=0 must be above 0")
    if (trainer.get("gradient_clip_val") or 0) < 0:
        clip = trainer["gradient_clip_val"]
        raise UserError(f"--trainer.gradient_clip_val={clip} must be 0 or more")
    if number := trainer.get("overfit_batches"):
        raise UserError(
            f"--trainer.overfit_batches={number} would replace the order of the windows; use "
            f"--data.overfit_batches={number}"
        )
    accumulate = trainer.get("accumulate_grad_batches") or 1
    batches = trainer.get("limit_train_batches")
    if accumulate > 1 and batches not in (None, 1.0) and batches % accumulate:
        raise UserError(
            f"--trainer.limit_train_batches={batches} must be a multiple of "
            f"--trainer.accumulate_grad_batches={accumulate}"
        )
    strategy = class_path(trainer.get("strategy")) or "auto"
    if re.search("fsdp|deepspeed|model_?parallel", strategy, re.IGNORECASE):
        raise UserError(
            f"--trainer.strategy={strategy} splits the parameters: Muon needs whole matrices, and "
            "gradients would be clipped by the norm of a part; use --trainer.strategy=ddp"
        )
    if strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        raise UserError(
            f"--trainer.strategy={strategy} is for notebooks: the results of its "
            "processes do not return to this command; use --trainer.strategy=ddp"
        )


def last_step(trainer: dict[str, Any], data: TextDataModule, world_size: int) -> int:
    """The number of steps that max_steps and max_epochs allow; -1 if there is no limit."""
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs") or -1
    if epochs < 0:
        return steps
    accumulate = trainer.get("accumulate_grad_batches") or 1
    batches = data.batches_per_epoch(world_size, accumulate)
    if (limit := trainer.get("limit_train_batches")) is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    in_epochs = epochs * -(-batches // accumulate)
    return in_epochs if steps < 0 else min(steps, in_epochs)


def choose_length(trainer: dict[str, Any], data: TextDataModule, world_size: int) -> None:
    """Complete the Trainer's settings of a `fit`: number of steps and validation interval."""
    accumulate = trainer.get("accumulate_grad_batches") or 1
    if trainer.get("max_steps") is None and trainer.get("max_epochs") is None:
        trainer["max_steps"] = choose_steps(data, world_size * accumulate)
    interval = trainer.get("val_check_interval")
    if interval is None and trainer.get("check_val_every_n_epoch") is None:
        steps = trainer.get("max_steps", -1)
        steps = VALIDATION_STEPS if steps < 1 else max(1, min(VALIDATION_STEPS, -(-steps // 4)))
        trainer["val_check_interval"] = interval = steps * accumulate
    batches = data.batches_per_epoch(world_size, accumulate)
    if trainer.get("check_val_every_n_epoch") and isinstance(interval, int) and interval > batches:
        raise UserError(
            f"--trainer.val_check_interval={interval} is more than the {batches} batches of an "
            "epoch; drop --trainer.check_val_every_n_epoch to count over the whole run"
        )
    if "check_val_every_n_epoch" not in trainer:
        # null counts batches over the whole run; a fraction is one of an epoch
        trainer["check_val_every_n_epoch"] = None if isinstance(interval, int) else 1


def choose_steps(data: TextDataModule, batches_per_step: int) -> int:
    """Steps of a run whose length is not given: 1,000, or three epochs of a shorter text."""
    if data.hparams.overfit_batches:
        return STEPS
    tokens = sum(stop - start for start, stop in data.train_spans)
    tokens_per_step = data.hparams.batch_size * data.hparams.block_size * batches_per_step
    steps = EPOCHS * tokens // tokens_per_step // 4 * 4  # four validations at equal distances
    return min(STEPS, max(FEWEST_STEPS, steps))
