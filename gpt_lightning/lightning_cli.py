"""The Trainer's commands: fit, validate, test, predict.

LightningCLI, with what a person expects of it besides: a checkpoint brings its settings as
defaults, which flags override; a resumed run stays in its folder; mistakes end in one line.
"""

import logging
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt_lightning.checkpoint import (
    HOW,
    KEY,
    LOGS,
    go_on_with,
    read_whole,
    refuse_mismatch,
    run_folder,
)
from gpt_lightning.config_files import expand_configs, stored_settings
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.messages import nearest
from gpt_lightning.training.callbacks import GenerateText, RunBar
from gpt_lightning.training.checkpointing import AtomicCheckpointIO, BestAndLast, Interrupted
from gpt_lightning.training.length import STEPS, enough_steps
from gpt_lightning.training.lightning_module import GPTModule
from gpt_lightning.training.precision import choose_precision
from gpt_lightning.training.report import closing_table, introduction

DEFAULTS = {
    "val_check_interval": 250,  # batches, counted through the whole run:
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# what a checkpoint brings back as defaults; the rest is each command's own affair
STORED = ("seed_everything", "data", "model", "trainer", "checkpoint", "sample")


def run_trainer(
    argv: list[str], description: str, folder: Path | None = None, bar: Callback | None = None
) -> int:
    """Run the Trainer's command argv[0], which `--help` describes so; returns its exit code.

    Args:
        argv: command and flags.
        description: of the command.
        folder: of a new run; the next lightning_logs/version_N unless given.
        bar: shows the progress in place of `RunBar`.
    """
    quiet()
    try:
        GPTCLI(argv, description, folder, bar or RunBar())
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except Interrupted as stop:
        if rank_zero_only.rank == 0:
            print(f"{stop}\nGo on with: {go_on_with(stop.path)}", flush=True)
        return 128 + stop.signum
    return 0


def quiet() -> None:
    """Silence what Lightning says of every run and nobody can do anything about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", ".*but have no logger configured.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", r".*following callbacks: \['Timer'\].*")  # no longer wanted
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # what is logged is of all processes


class GPTCLI(LightningCLI):
    """The commands, their flags, and what is done before and after each."""

    def __init__(self, argv: list[str], description: str, folder: Path | None, bar: Callback):
        self.argv, self.folder = argv, folder
        self.why_precision = ""
        self.numbered = False  # whether the run's folder is the next version_N
        self.checkpoint: dict[str, Any] | None = None  # the one that the command goes on from
        self.path: Path | None = None  # its
        self.first_step = math.inf  # that `fit` goes on from
        command = argv[0]
        try:
            super().__init__(
                GPTModule,
                TextDataModule,
                save_config_callback=None,  # see _keep_config
                trainer_defaults={"callbacks": [bar]},  # and DEFAULTS, as flags
                seed_everything_default=1337,
                parser_kwargs={
                    "prog": HOW,
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    command: {
                        "exit_on_error": False,
                        "description": description,
                        "usage": f"{HOW} {command} [--config FILE ...] [--flag=value ...]",
                    },
                },
                auto_configure_optimizers=False,
            )
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            # once a step is taken, the checkpoint was all right
            began = hasattr(self, "trainer") and self.trainer.global_step > self.first_step
            if self.checkpoint is None or began:
                raise
            raise ValueError(
                f"--ckpt_path={self.path}: what it says of its run is not what this version writes "
                f"({type(error).__name__}: {str(error)[:100]})"
            ) from error

    # flags

    def subcommands(self) -> dict[str, set[str]]:
        """Only the command that is run: to build the parsers of all four takes a while."""
        command = self.argv[0]
        return {command: super().subcommands()[command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What people look for in `--help` first; the Trainer's many flags last."""
        parser.add_lightning_class_args(TextDataModule, "data")
        parser.add_lightning_class_args(GPTModule, "model")
        parser.add_lightning_class_args(GenerateText, "sample")
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in DEFAULTS.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # written once, by the data; see also the checkpoint, which needs no data to be read
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.block_size", "model.block_size")
        for target in ("data.seed", "model.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the flags, over those that the checkpoint was trained with, if one is given."""
        self.config = self._parse(parser, self.argv)
        command, given = self.argv[0], self.config[self.argv[0]]
        which = given.ckpt_path
        if which is None and command != "fit":
            which = "best"
        if which is None:
            return
        self.path, self.checkpoint = path, _ = read_whole(
            which, given.trainer.default_root_dir or "."
        )
        usual = vars(self._subcommand_parsers[command].get_defaults().trainer)
        own = {key: value for key, value in vars(given.trainer).items() if value != usual[key]}
        try:
            stored = stored_settings(self.checkpoint[KEY].get("config") or "", own)
        except ValueError as error:
            raise ValueError(f"--ckpt_path={path}: {error}") from error
        stored = as_it_was({key: value for key, value in stored.items() if key in STORED})
        if command != "fit":  # another text may be given, in the same vocabulary
            state = self.checkpoint[KEY]["tokenizer"]
            stored.setdefault("data", {})["vocabulary"] = state.get("vocabulary")
        argv = [command, "--config", yaml.safe_dump(stored, allow_unicode=True), *self.argv[1:]]
        self.config = self._parse(parser, argv)
        self.config[command].ckpt_path = str(path)
        ours, theirs = (
            self.config[command].model.optimizer,
            stored.get("model", {}).get("optimizer"),
        )
        if command == "fit" and theirs not in (None, ours):
            raise ValueError(
                f"--model.optimizer={ours} cannot take over the state of {theirs} in "
                f"--ckpt_path={path}; leave the flag away, or train anew without --ckpt_path"
            )

    def _parse(self, parser: LightningArgumentParser, argv: list[str]) -> Namespace:
        try:
            config = parser.parse_args(expand_configs(argv))
        except (ArgumentError, UnicodeDecodeError) as error:
            flags = self._subcommand_parsers[self.argv[0]]._option_string_actions
            raise ValueError(explain(str(error), self.argv, flags)) from error
        given = config[self.argv[0]]
        for name in STORED[1:]:
            if not isinstance(given[name], Namespace):  # which jsonargparse lets pass
                raise ValueError(f"--config: {name}: {given[name]} is no mapping of settings")
        if not 0 <= int(given.seed_everything) < 2**32:
            raise ValueError(
                f"--seed_everything={given.seed_everything} must be 0 or more and below 2**32"
            )
        return config

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's way, which lets a checkpoint's settings override the flags."""

    # building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        command, path = self.subcommand, self._get(self.config, "ckpt_path")
        if command != "fit" and config.logger is None:
            kwargs["logger"] = False  # a validation is no run, and gets no folder
        elif config.logger is None or config.logger is True:
            folder = run_folder(Path(path)) if path else self.folder
            step = self.checkpoint["global_step"] if self.checkpoint else 0
            self.numbered = folder is None
            kwargs["logger"] = TensorBoardLogger(
                folder.parent.parent if folder else config.default_root_dir or ".",
                name=folder.parent.name if folder else LOGS,
                version=folder.name if folder else None,
                default_hp_metric=False,
                # hides what a killed run logged after the step that it goes on from
                purge_step=step + 1,
                flush_secs=10,
            )
        if not config.plugins:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
        if config.accelerator in ("gpu", "cuda", "mps") and not gpu:
            raise ValueError(
                f"--trainer.accelerator={config.accelerator}: torch {torch.__version__} sees no "
                "GPU here; leave the flag away to train on what there is"
            )
        if command == "fit":
            refuse_trainer_settings(config)
            self._choose_precision(config, self._get(self.config_init, "model"))
        unsaid = config.max_steps == -1 and config.max_epochs is None
        if unsaid:
            config.max_steps = STEPS
        try:
            trainer = super().instantiate_trainer(**kwargs)
        # what Lightning raises for a bad setting; a TypeError for a number of devices
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            named = [key for key in re.findall(r"\w+", str(error)) if key in config]
            flags = [f"--trainer.{key}={config[key]}" for key in named[:1]]
            flags = flags or [flag for flag in self.argv if flag.startswith("--trainer.")]
            raise ValueError(f"{' '.join(flags)}: {error}") from error
        if unsaid and command == "fit" and not trainer.fast_dev_run:
            # not before: processes share the text, and the Trainer has just counted them
            self._choose_length(trainer, self._get(self.config_init, "data"))
        return trainer

    def _choose_length(self, trainer: Trainer, data: TextDataModule) -> None:
        """Choose how many steps the run takes, with the usual four validations and two samples."""
        config, hp, steps = self.config[self.subcommand], data.hparams, STEPS
        if not hp.overfit_batches:  # those are to be learnt by heart
            windows = hp.batch_size * trainer.world_size * trainer.accumulate_grad_batches
            tokens = sum(stop - start for start, stop in data.train_spans)
            steps = enough_steps(tokens, windows * hp.block_size)
        trainer.fit_loop.epoch_loop.max_steps = config.trainer.max_steps = steps
        if config.trainer.val_check_interval == DEFAULTS["val_check_interval"]:
            batches = steps * trainer.accumulate_grad_batches
            trainer.val_check_interval = config.trainer.val_check_interval = batches // 4
        if config.sample.every_n_steps == STEPS // 2:
            sampler = next(c for c in trainer.callbacks if isinstance(c, GenerateText))
            sampler.every_n_steps = config.sample.every_n_steps = steps // 2

    def _choose_precision(self, config: Namespace, model: Any) -> None:
        """Fill in --trainer.precision where nobody gave it; a resumed run keeps its own."""
        if config.precision is not None:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = "mps" if torch.backends.mps.is_available() else device
        device = "cpu" if config.accelerator == "cpu" else device
        width = 0 if model.hparams.name == "bigram" else model.net.config.n_embd
        config.precision, why = choose_precision(device, width)
        self.config[self.subcommand].trainer.precision = config.precision
        self.why_precision = f" ({why})"

    def after_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.model.run_config = self._parser(self.subcommand).dump(config, skip_none=False)
        if self.checkpoint is None:
            return
        settings = self.model.describe(self.datamodule)
        refuse_mismatch(
            self.checkpoint[KEY], settings, config.ckpt_path, corpus=self.subcommand == "fit"
        )
        odd = self.checkpoint["state_dict"].keys() ^ self.model.state_dict().keys()
        if odd:
            raise ValueError(
                f"--ckpt_path={config.ckpt_path} has weights that this version's model does not "
                f"have, or lacks some ({min(odd)}): use the gpt_lightning that wrote it"
            )

    # running

    def fit(self, model: GPTModule, datamodule: TextDataModule, **kwargs: Any) -> None:
        """The Trainer's, with the faults of a run told in a line: what, and how to go on."""
        try:
            self.trainer.fit(model, datamodule, **kwargs)
        except SystemExit:  # Lightning's end of a second Ctrl-C
            raise KeyboardInterrupt from None
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = fault(error, self.trainer.world_size)
            if reason is None:
                raise
            if self.keeper.safe is not None:
                path, step = self.keeper.safe
                reason += f". Step {step:,} is safe; go on with: {go_on_with(path)}"
            elif self.path is not None:
                reason = f"--ckpt_path={self.path}: {reason}"
            raise ValueError(reason) from error

    @property
    def keeper(self) -> BestAndLast:
        return next(c for c in self.trainer.callbacks if isinstance(c, BestAndLast))

    def before_fit(self) -> None:
        self.started = time.perf_counter()
        self.first_step = self.checkpoint["global_step"] if self.checkpoint else 0
        if 0 < self.trainer.max_steps <= self.first_step:
            raise ValueError(
                f"this run has done its {self.first_step} steps; go further with "
                f"--trainer.max_steps={2 * self.first_step}"
            )
        self._refuse_what_fails_later()
        if self.trainer.is_global_zero:
            self._keep_config()
            print(
                introduction(self.trainer, self.model, self.datamodule, self.why_precision),
                flush=True,
            )

    def _refuse_what_fails_later(self) -> None:
        """Raise a ValueError for what would fail or do nothing once the run's folder is made."""
        trainer = self.trainer
        loops = self.checkpoint["loops"] if self.checkpoint else {}
        epochs = loops["fit_loop"]["epoch_progress"]["current"]["processed"] if loops else 0
        if 0 < (trainer.max_epochs or 0) <= epochs:
            raise ValueError(
                f"this run has begun its {epochs} epochs already; go further with "
                f"--trainer.max_epochs={2 * epochs}"
            )
        interval = trainer.val_check_interval
        batches = self.datamodule.batches_per_epoch(
            trainer.world_size, trainer.accumulate_grad_batches
        )
        if trainer.check_val_every_n_epoch and type(interval) is int and interval > batches:
            raise ValueError(
                f"--trainer.val_check_interval={interval} is more than the {batches} batches of an "
                "epoch; with --trainer.check_val_every_n_epoch give a part of an epoch, up to 1.0"
            )
        try:
            self.datamodule.tokenizer.encode(self._get(self.config_init, "sample").prompt)
        except ValueError as error:
            raise ValueError(f"--sample.prompt: {error}") from error

    def _keep_config(self) -> None:
        """Write the whole configuration into the run's folder as config.yaml.

        A resumed run that changes it adds config-stepN.yaml and leaves the first as it is.
        """
        if self.trainer.fast_dev_run:
            return
        logger = self.trainer.logger
        folder = Path(logger and logger.log_dir or self.trainer.default_root_dir)
        while not self._make(folder, new=self.numbered):
            logger._version = None  # another run has taken this number in the meantime
            folder = Path(logger.log_dir)
        self.keeper.claim(folder / "checkpoints")  # before anything is written there
        if not logger:
            return
        path = folder / "config.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != self.model.run_config:
            path = path.with_name(f"config-step{self.first_step}.yaml")
        path.write_text(self.model.run_config, encoding="utf-8")

    def _make(self, folder: Path, new: bool = False) -> bool:
        """Make a folder; False where a new one was asked for, and there is one of that name."""
        try:
            folder.mkdir(parents=True, exist_ok=not new)
        except OSError as error:
            if new and folder.is_dir():
                return False
            raise ValueError(
                f"--trainer.default_root_dir={self.trainer.default_root_dir}: the folder {folder} "
                f"cannot be made ({error.strerror})"
            ) from error
        return True

    def after_fit(self) -> None:
        if self.trainer.global_step == self.first_step and not self.trainer.fast_dev_run:
            raise ValueError("no step was taken: the time of --trainer.max_time is used up")
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            seconds = time.perf_counter() - self.started
            print(closing_table(self.trainer, self.model, seconds, self.first_step), flush=True)

    def predict(self, model: GPTModule, datamodule: TextDataModule, **kwargs: Any) -> None:
        """Write the cost in nats of each held-out token to `predictions.npz`."""
        folder = Path(self.trainer.default_root_dir)
        self._make(folder)
        batches = self.trainer.predict(model, datamodule, **kwargs)
        if not batches:
            raise ValueError("--trainer.limit_predict_batches=0 leaves nothing to predict")
        nats = np.concatenate([nats.flatten().cpu().numpy() for nats, _ in batches])
        ids = np.concatenate([ids.flatten().cpu().numpy() for _, ids in batches])
        path, n = folder / "predictions.npz", 1
        while path.exists():
            path, n = folder / f"predictions-{n}.npz", n + 1
        np.savez(path, ids=ids, nats=nats)
        print(f"{len(ids):,} tokens, {nats.mean():.4f} nats each: {path} (ids, nats)")


def fault(error: Exception, world_size: int) -> str | None:
    """What a run's end is due to, in a line; None for a fault of our own."""
    text = str(error)
    if isinstance(error, ValueError):
        return text
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text}"
    refused = re.search("(not enough|can't allocate) memory", text)
    if refused or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return (
            "out of memory: a smaller --data.batch_size, --data.block_size or model takes less "
            f"({text.splitlines()[0] if text else 'MemoryError'})"
        )
    if "DataLoader worker" in text:
        return f"{text.splitlines()[0]} (--data.num_workers=0 does without)"
    if world_size > 1 and re.search("gloo|nccl|store|peer", text, re.IGNORECASE):
        return "another process of this run has ended"
    return None


def as_it_was(stored: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, with what went without saying before there was a choice."""
    model, trainer = stored.get("model"), stored.get("trainer")
    if model and trainer and "optimizer" not in model:
        model |= {"optimizer": "adamw", "schedule": "cosine"}
        if model["min_lr"] is None:
            model["min_lr"] = model["learning_rate"] / 10
        trainer["precision"] = trainer["precision"] or "32-true"
    if model and "look_ahead" not in model:
        model |= {"look_ahead": 0, "embedding_weight_decay": 0.0}
    if model and "n_gram" not in model:
        model["n_gram"] = 2 if model.get("name") == "gpt" else None
    return stored


def refuse_trainer_settings(config: Namespace) -> None:
    """Raise a ValueError for settings that Lightning takes, and stumbles over in the run."""
    for name in (
        "max_steps",
        "max_epochs",
        "limit_train_batches",
        "val_check_interval",
        "check_val_every_n_epoch",
        "accumulate_grad_batches",
        "log_every_n_steps",
    ):
        value = config[name]
        endless = value == -1 and name in ("max_steps", "max_epochs")
        if isinstance(value, int | float) and value <= 0 and not endless:
            raise ValueError(f"--trainer.{name}={value} must be above 0")
    if (config.gradient_clip_val or 0) < 0:
        raise ValueError(
            f"--trainer.gradient_clip_val={config.gradient_clip_val} must not be negative"
        )
    if re.search("spawn|fork|notebook", str(config.strategy)):
        raise ValueError(
            f"--trainer.strategy={config.strategy} is for notebooks: its processes' results do not "
            "come back to a command; use --trainer.strategy=ddp"
        )
    if config.overfit_batches:
        raise ValueError(
            f"--trainer.overfit_batches={config.overfit_batches} would replace the order of the "
            f"windows; use --data.overfit_batches={config.overfit_batches}"
        )


def explain(message: str, argv: list[str], flags: Any) -> str:
    """A parser's message, with the nearest right name for a mistyped flag or key."""
    following = [*argv[1:], ""]
    configs = [
        b if "=" not in a else a.partition("=")[2]
        for a, b in zip(argv, following, strict=True)
        if re.match(r"(-c|--config)(=|$)", a)
    ]
    where = f"--config={', '.join(configs)}: " if any(configs) else ""
    if found := re.search(r"unrecognized arguments: (--[\w.-]+)", message, re.IGNORECASE):
        return f"{found[1]} is no flag{nearest(found[1], flags)}"
    if found := re.search(r"does not accept option '([\w.]+)'", message):
        key = f"--{found[1]}"
        return f"{where}{found[1]} is no setting{nearest(key, flags).replace('--', '')}"
    if found := re.search(r'Parser key "([\w.]+)":', message):
        if found[1] == "config":
            return message.replace(found[0], "--config:", 1)
        given = any(re.match(rf"--{re.escape(found[1])}(=|$)", arg) for arg in argv)
        where = "" if given else where
        kinds = re.findall(
            r"Expected an? (?:<class '|typing\.Literal\[)?(.+?)(?:'>|\]|\n|$)", message
        )
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if kinds and value:
            kinds = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
            return f"{where}--{found[1]}={value[1]}: expected {kinds}"
        return where + message.replace(found[0], f"--{found[1]}:", 1)
    if "Unexpected config:" in message:
        return f"{where}no mapping of settings, such as  model: {{n_layer: 6}}"
    return where + message
