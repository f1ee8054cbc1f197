"""The Trainer's commands: fit, validate, test and predict.

1. `Settings` are resolved: flags override configs, and configs override the checkpoint's settings.
   They contain no default values, so a missing setting is one that was not given.
2. Data, module and Trainer are built, and the automatic choices (number of steps, precision,
   validation interval) are added to the settings.
3. The command runs, and the settings are stored in the run's folder and in its checkpoints.
"""

import errno
import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt_lightning.checkpoint import (
    KEY,
    LOGS,
    SAFETENSORS,
    read_newest_intact,
    shell_command,
)
from gpt_lightning.compatibility import check_compatible, check_corpus, flags_to_repeat
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.errors import UserError, in_users_code, is_out_of_memory, with_flags
from gpt_lightning.files import unused
from gpt_lightning.fine_tuning import begin_from
from gpt_lightning.launchers import (
    REQUEUE_SIGNAL,
    SLURM_NOTE,
    adopt_torchrun,
    requeue,
    requeued_checkpoint,
    slurm_note,
)
from gpt_lightning.model import CONFIGS, config_from_dict
from gpt_lightning.run_loggers import loggers_in, open_loggers, resumed_loggers
from gpt_lightning.settings import (
    Settings,
    as_list,
    build_parser,
    check_trainer_settings,
    choose_length,
    flag_names,
    last_step,
    parse,
    restore,
)
from gpt_lightning.training.callbacks import (
    GenerateText,
    PredictionWriter,
    RunProgressBar,
    limit_note,
    validation_line,
)
from gpt_lightning.training.hardware import choose_compile, choose_precision
from gpt_lightning.training.module import GPTModule
from gpt_lightning.training.optim import OptimizerConfig
from gpt_lightning.training.report import Introduction, closing_table
from gpt_lightning.training.saving import (
    AtomicCheckpointIO,
    BestAndLast,
    Interrupted,
    find_best_and_last,
)

# The Trainer's settings where Lightning's own defaults do not fit; any of them can be given.
TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def run_trainer(argv: list[str], description: str = "", folder: Path | None = None) -> int:
    """Run the command `argv[0]` with the flags that follow; returns the exit code.

    `folder` is that of a new run, by default the next free `lightning_logs/version_N`.
    """
    silence_lightning()
    parser = build_parser(argv[0], description)
    try:
        return run_command(parser, argv, folder)
    except UserError as error:
        raise UserError(with_flags(str(error), flag_names(parser))) from error


def silence_lightning() -> None:
    """Silence the notices that Lightning prints for every run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks.model_summary"):  # the user asks for their reports
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    for message in (
        ".*GPU available but not used.*",
        ".*but have no logger configured.*",
        ".*smaller than the logging interval.*",
        ".*sync_dist=True.*",  # what is logged is already reduced over processes
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*Previous log files in this directory will be deleted.*",  # see `keep_rows`
    ):
        warnings.filterwarnings("ignore", message)


def run_command(parser: ArgumentParser, argv: list[str], folder: Path | None) -> int:
    command, settings = argv[0], parse(parser, argv[1:])
    if settings.pop("print_config", False):
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
        return 0
    path, checkpoint, which = None, None, settings.get("ckpt_path")
    if which is None and command != "fit":
        which = "best"
    root = settings["trainer"].get("default_root_dir") or "."
    note = None
    if which is None and folder is None and SLURMEnvironment.detect():
        note = slurm_note(settings)
        which = requeued_checkpoint(note, Path(root))
    start, weights = settings.pop("init_from", None), None
    if start is not None and (command != "fit" or settings.get("ckpt_path") is not None):
        raise UserError("--init_from is for a new run: fit without --ckpt_path")
    if start is not None and "corpus" not in settings["data"]:
        raise UserError(f"--init_from={start} needs a text to train on: --data.corpus=NAME")
    texts_given = {"corpus", "val_corpus"} & settings["data"].keys()
    if which is not None:
        path, checkpoint = read_newest_intact(which, root, "last" if command == "fit" else "best")
        if path.suffix == SAFETENSORS:
            raise UserError(
                f"ckpt_path={path} has a model without the state of its training; evaluate scores "
                f"texts with it, and fit --init_from={path} starts a new run from it"
            )
        settings = restore(parser, argv, settings, checkpoint)
    elif start is not None:
        try:
            start, beginning = read_newest_intact(start, root)
            weights = begin_from(beginning, start, settings["data"], settings["model"])
        except UserError as error:
            raise UserError(str(error).replace("ckpt_path=", "init_from=")) from error
        if rank_zero_only.rank == 0:
            print(f"start  {start}, step {beginning['global_step']:,}")
    try:
        run = build(parser, command, settings, path, checkpoint, folder, texts_given)
    except UserError as error:
        if path is None or "corpus" in texts_given or not str(error).startswith("corpus="):
            raise
        advice = (
            f"ckpt_path={path} was trained on this text as it was then: run this where it was "
            "trained, or give corpus=PATH"
        )
        raise UserError(f"{error}; {advice}") from error
    run.slurm_note, run.module.initial_weights = note, weights
    if start is not None:
        run.module.run_settings["start"] = str(start)
    return execute(run)


@dataclass
class Run:
    """What a command works with."""

    command: str
    settings: Settings
    data: TextDataModule
    module: GPTModule
    trainer: Trainer
    path: Path | None  # the checkpoint it starts from
    first_step: int
    folder: Path | None  # of the run that is trained
    slurm_note: str | None = None  # see `slurm_note`


# building


def build(
    parser: ArgumentParser,
    command: str,
    settings: Settings,
    path: Path | None,
    checkpoint: dict | None,
    folder: Path | None,
    texts_given: set[str],
) -> Run:
    """Build data, module and Trainer, and complete the settings by the automatic choices."""
    seed = settings.setdefault("seed_everything", 1337)
    data = TextDataModule(**settings["data"], seed=seed)
    data.prepare_data()
    # before the sizes are checked, which another text may not fit
    if checkpoint is not None and not (command == "test" and data.hparams.test_corpus):
        corpus = checkpoint[KEY]["corpus"]
        check_corpus(corpus, data.describe(), path, command == "fit", texts_given)
    data.setup(command if command in ("fit", "test") else "validate")
    module = build_module(settings["model"], data, seed)
    compile_given = "compile" in settings["model"]
    settings["data"] = {k: v for k, v in data.hparams.items() if k != "seed"}
    settings["model"] = module.settings()["model"]
    given, barebones = set(settings["trainer"]), settings["trainer"].get("barebones", False)
    defaults = TRAINER_DEFAULTS | ({"log_every_n_steps": None} if barebones else {})
    settings["trainer"] = options = {**defaults, **settings["trainer"]}
    first_step = checkpoint["global_step"] if checkpoint else 0
    if checkpoint is not None:
        ours = module.describe(data)
        check_compatible(checkpoint[KEY], ours, path)
    reason, changes, loggers = "", {}, {}
    adopt_torchrun(options)
    if command == "fit":
        check_trainer_settings(options)
        device, world_size = probe_hardware(parser, options)
        choose_length(options, data, world_size)
        # In steps, not in epochs: Lightning takes an epoch that was cut short for a whole one.
        changes |= {"max_steps": last_step(options, data, world_size), "max_epochs": -1}
        if 0 < changes["max_steps"] <= first_step:
            raise UserError(
                f"this run has done its {first_step:,} steps; train further with "
                f"--trainer.max_steps={2 * first_step}"
            )
        if options.get("precision") is None:
            width = getattr(module.config, "n_embd", 0)
            options["precision"], reason = choose_precision(device, width)
        if not (compile_given or options.get("fast_dev_run")) and world_size == 1:
            batches = changes["max_steps"] * (options.get("accumulate_grad_batches") or 1)
            tokens = batches * data.hparams.batch_size * data.hparams.block_size
            chosen = choose_compile(device, module.config, tokens)
            settings["model"]["compile"] = module.hparams["compile"] = chosen
        if not (options.get("fast_dev_run") or barebones):
            if path is not None and path.parent.name == "checkpoints":
                folder = path.parent.parent
                root = options.get("default_root_dir")
                if root and Path(root).resolve() != folder.resolve().parent.parent:
                    raise UserError(
                        f"default_root_dir={root} is not where ckpt_path={path} resumes; drop it"
                    )
            elif folder is None:
                folder = new_run_folder(Path(options.get("default_root_dir") or ".") / LOGS)
            loggers = loggers_in(folder, first_step)
            if checkpoint is not None and path.parent.parent == folder:
                changes["logger"] = resumed_loggers(options.get("logger"), checkpoint)
        # in a SLURM job, Lightning resumes from any hpc_ckpt_*.ckpt in the default_root_dir
        changes["default_root_dir"] = str(folder or Path(LOGS))
    callbacks = own_callbacks(command, settings, reason, folder)
    trainer = build_trainer(parser, {**options, **changes}, callbacks, loggers, given)
    module.run_settings = deepcopy({k: v for k, v in settings.items() if k != "ckpt_path"})
    return Run(command, settings, data, module, trainer, path, first_step, folder)


def build_module(given: dict[str, Any], data: TextDataModule, seed: int) -> GPTModule:
    """The module of the flat `--model.*` settings."""
    of_models = {"name"} | {item.name for config in CONFIGS.values() for item in fields(config)}
    of_optimizer = {item.name for item in fields(OptimizerConfig)}
    model = {"name": "gpt", "vocab_size": data.vocab_size, "block_size": data.hparams.block_size}
    optimizer, other = {}, {}
    for name, value in given.items():
        part = model if name in of_models else optimizer if name in of_optimizer else other
        part[name] = value
    return GPTModule(config_from_dict(model), OptimizerConfig(**optimizer), seed=seed, **other)


def probe_hardware(parser: ArgumentParser, trainer: dict[str, Any]) -> tuple[str, int]:
    """Device type and number of processes of a Trainer with these settings."""
    names = ("accelerator", "devices", "num_nodes", "strategy")
    chosen = {name: trainer[name] for name in names if name in trainer}
    probe = build_trainer(parser, {**chosen, "barebones": True}, [], {}, set(chosen))
    environment = getattr(probe.strategy, "cluster_environment", None)
    if probe.num_nodes > 1 and isinstance(environment, LightningEnvironment):
        if "MASTER_ADDR" in os.environ:
            place = f"{os.environ['MASTER_ADDR']}:{environment.main_port}"
            print(f"waits for all {probe.num_nodes} nodes to connect to {place}", file=sys.stderr)
            return probe.strategy.root_device.type, probe.world_size
        raise UserError(
            f"--trainer.num_nodes={probe.num_nodes} would wait for the other nodes: start it with "
            "torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
        )
    return probe.strategy.root_device.type, probe.world_size


def build_trainer(
    parser: ArgumentParser,
    settings: dict[str, Any],
    callbacks: list[Callback],
    loggers: dict[str, Logger],
    given: set[str],
) -> Trainer:
    """The Trainer, with the user's own objects built from their settings.

    Args:
        loggers: those that a setting may give by their short names.
        given: the settings that the user gave, for error messages.
    """
    namespace = parser.parse_object({"trainer": deepcopy(settings)}, defaults=False)
    # errors of a user's own class keep their traceback, so its objects are built out here
    try:
        values = vars(parser.instantiate(namespace).trainer)
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name is None:  # Lightning's own words
            raise UserError(str(cause)) from error
        raise
    theirs = as_list(values.get("callbacks"))
    if any(isinstance(callback, ProgressBar) for callback in theirs):
        callbacks = [c for c in callbacks if not isinstance(c, ProgressBar)]
    values["callbacks"] = [*callbacks, *theirs]
    values["plugins"] = [*as_list(values.get("plugins")), AtomicCheckpointIO()]
    if (logger := values.get("logger")) in (None, True):
        logger = "tensorboard"
    named = [loggers.get(one) if isinstance(one, str) else one for one in as_list(logger)]
    values["logger"] = [one for one in named if one] or False
    try:
        return Trainer(**values)
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        flags = " ".join(f"--trainer.{name}={settings[name]}" for name in settings if name in given)
        raise UserError(f"{error} ({flags})") from error


def own_callbacks(
    command: str, settings: Settings, precision_reason: str, folder: Path | None
) -> list[Callback]:
    """The callbacks that the command adds. `GPTModule` adds `TrainingMetrics`."""
    callbacks: list[Callback] = []
    barebones = settings["trainer"].get("barebones", False)
    if settings["trainer"].get("enable_progress_bar", not barebones):
        callbacks.append(RunProgressBar())
    if command == "fit":
        callbacks.append(Introduction(settings, precision_reason, folder))
        callbacks.append(GenerateText(**settings["sample"]))
        if folder is not None and settings["trainer"].get("enable_checkpointing", True):
            callbacks.append(BestAndLast(**settings["checkpoint"], folder=folder / "checkpoints"))
    return callbacks


def new_run_folder(parent: Path) -> Path:
    """Create the next free `version_N`; two runs that start at once get different ones.

    The first process of a run does it for all. The others receive the name in
    `BestAndLast.setup` and do not use the one that this returns.
    """
    if rank_zero_only.rank != 0:
        return parent / "version"
    folder = parent
    try:
        str(parent).encode()  # TensorBoard takes no other names
        folder.mkdir(parents=True, exist_ok=True)
        for number in count():
            folder = parent / f"version_{number}"
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except UnicodeEncodeError as error:
        root = parent.parent
        raise UserError(f"default_root_dir={root} is not UTF-8; choose another name") from error
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror})") from error


# commands


def execute(run: Run) -> int:
    """Run the command; returns the exit code. What the user can mend becomes a `UserError`."""
    try:
        {"fit": fit, "validate": validate, "test": validate, "predict": predict}[run.command](run)
    except Interrupted as stop:
        return 128 + stop.signum
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or in_users_code(error):
            raise
        raise UserError(
            f"the disk is full: {error.filename or run.folder}; free some space and resume"
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = run.data.hparams
        raise UserError(
            f"out of memory: a smaller model, or a smaller value than "
            f"batch_size={sizes.batch_size} or block_size={sizes.block_size}, needs less"
        ) from error
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # otherwise gloo's threads abort at the exit
    return 0


def fit(run: Run) -> None:
    trainer, module, data = run.trainer, run.module, run.data
    keeper = find_best_and_last(trainer)
    check_prompt(run)
    if keeper is not None and trainer.is_global_zero:
        keeper.claim()  # before the Trainer opens the loggers, which write there
    note = run.folder / SLURM_NOTE if run.folder and run.slurm_note else None
    if run.folder is not None and trainer.is_global_zero:
        module.run_settings["logger_runs"] = open_loggers(trainer.loggers, run.first_step)
        if note is not None:
            note.write_text(run.slurm_note, encoding="utf-8")
    began = time.perf_counter()
    try:
        trainer.fit(module, data, ckpt_path=run.path)
    except BaseException as error:
        if keeper is not None and keeper.newest is not None and rank_zero_only.rank == 0:
            path, step = keeper.newest
            resume = shell_command("fit", path, *flags_to_repeat(run.settings))
            print(f"Step {step:,} is saved.\nResume with: {resume}", flush=True)
            if isinstance(error, Interrupted) and error.signum == REQUEUE_SIGNAL:
                requeue()
        if isinstance(error, SystemExit):  # how Lightning ends at a second Ctrl-C
            raise KeyboardInterrupt from None
        raise
    if trainer.global_step == run.first_step:
        raise UserError("no step was taken: --trainer.max_time has been reached")
    if trainer.is_global_zero:
        if note is not None:
            note.unlink(missing_ok=True)
        seconds = time.perf_counter() - began
        print(closing_table(trainer, module, data, seconds, run.first_step), flush=True)


def check_prompt(run: Run) -> None:
    prompt = run.settings["sample"].get("prompt", "")
    try:
        run.data.tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"prompt: {error}") from error


def validate(run: Run) -> None:
    """`validate` and `test`: the exact loss, in the Trainer's table and in a line as `fit` does."""
    data, trainer = run.data, run.trainer
    if trainer.is_global_zero:
        share = f"{data.val_tokens:,} of {len(data.val_ids):,} tokens"
        if data.val_text is data.corpus:
            share += f", held out (--data.val_fraction={data.hparams.val_fraction})"
        print(f"model  {run.path}")
        print(f"text   {data.val_text.name}: {share}", flush=True)
    evaluate, part = (trainer.test, "test") if run.command == "test" else (trainer.validate, "val")
    evaluate(run.module, data, ckpt_path=run.path)
    if trainer.is_global_zero and f"loss/{part}" in trainer.callback_metrics:
        line = validation_line(trainer.callback_metrics, run.first_step, part)
        print(line + limit_note(trainer, part))


def predict(run: Run) -> None:
    """Write the cost in nats of each held-out token to `predictions.npy`."""
    if run.trainer.world_size > 1:
        raise UserError("predict runs in one process: use --trainer.devices=1, without torchrun")
    path = unused(Path(run.trainer.default_root_dir, "predictions.npy"))
    writer = PredictionWriter(path)
    run.trainer.callbacks.append(writer)
    try:
        run.trainer.predict(run.module, run.data, ckpt_path=run.path, return_predictions=False)
    except OSError as error:
        if in_users_code(error):
            raise
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
    if not writer.count:
        raise UserError("--trainer.limit_predict_batches=0 leaves nothing to predict")
    print(f"{writer.count:,} tokens, {writer.nats / writer.count:.4f} nats each: {path}")
