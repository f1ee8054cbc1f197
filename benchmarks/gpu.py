"""Checks and figures that need a GPU: python -m benchmarks.gpu --text FILE --out FOLDER

Each section is a process of its own, and every figure goes to FOLDER/results.jsonl at once:

    equal     recorded steps (StepGraph) against eager ones: weights bit by bit
    resume    `fit` whole, killed and resumed, eager and compiled: last.ckpt bit by bit
    step      milliseconds of a step under the Trainer, GPU time, FLOP utilisation, longest kernels
    generation  characters a second of one and of 256 texts, with and without CUDA graphs
    fit       `fit --trainer.accelerator=gpu` as it is
    recipes   exact losses of training recipes, several at once
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import ROOT, read_closing_table

SECTIONS = {
    "equal": 90,
    "resume": 250,
    "step": 150,
    "generation": 90,
    "fit": 150,
    "recipes": 560,
}  # seconds at most
TARGET = 1.4697  # nats per character on tiny Shakespeare: nanoGPT's README, on an A100
NOMINAL_FLOPS = 989e12  # of an H100 or H200 in dense bf16: datasheet
SHAPES = {
    "bare": {},
    "4x256": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 32},
    "6x256": {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 512, "batch_size": 4},
    "6x384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64},
}
SMALL_TEXT = {"n_gram": 2, "weight_decay": 0.1, "embedding_weight_decay": 0.3}
SMALL_TEXT |= {"confidence_penalty": 0.1}
MODES = {
    "eager": {"cuda_graph": False},
    "graph": {"cuda_graph": True},
    "compiled": {"cuda_graph": False, "compile": True},
    "compiled graph": {"cuda_graph": True, "compile": True},
}
KINDS = {  # of runs that are stopped and resumed
    "graph": {},
    "lecture": {"name": "lecture", "optimizer": "adamw", "learning_rate": 1e-3},
    "eager": MODES["eager"],
    "compiled": {"compile": True},
    "compiled, deterministic": {"compile": True, "deterministic": True},
}
RECIPES = ["--config=gpu/seconds_10", "--config=gpu/minute_1"]

args: argparse.Namespace
write_lock = threading.Lock()


def record(name: str, **figures) -> None:
    line = json.dumps({"section": args.section, "name": name, **figures}, default=str)
    with write_lock, open(args.out / "results.jsonl", "a") as file:
        file.write(line + "\n")
    print(line[:700], flush=True)


def attempt(name: str, work, *arguments):
    """The result of `work`; an error is recorded, and the next measurement goes on."""
    try:
        return work(*arguments)
    except Exception as error:
        record(
            name,
            error=f"{type(error).__name__}: {error}"[:500],
            trace=traceback.format_exc()[-900:],
        )


# in this process


def fit_in_process(
    shape: dict, settings: dict, steps: int, precision: str = "bf16-mixed", callbacks=()
):
    """Train a new model on the text for some steps; returns its Trainer."""
    from gpt_lightning import GPTModule, OptimizerConfig, TextDataModule
    from gpt_lightning.model import CONFIGS

    seed_everything(1, verbose=False)
    given = {"name": "gpt", **shape, **settings}
    config = CONFIGS[given.pop("name")]

    def take(kind) -> dict:
        return {
            k: given.pop(k)
            for k in list(given)
            if k in kind.__dataclass_fields__ and k != "block_size"
        }

    data = TextDataModule(
        args.text, **{k: given.pop(k) for k in ("block_size", "batch_size") if k in given}
    )
    module = GPTModule(config(**take(config)), OptimizerConfig(**take(OptimizerConfig)), **given)
    trainer = Trainer(
        accelerator=args.accelerator, devices=1, precision=precision, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, limit_val_batches=0, callbacks=list(callbacks), log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def weights(trainer) -> dict:
    return {k: v.detach().cpu().clone() for k, v in trainer.lightning_module.state_dict().items()}


def differing(a: dict, b: dict) -> list[str]:
    return [name for name in a if name not in b or not torch.equal(a[name], b[name])]


def difference(a: dict, b: dict) -> dict:
    """How two sets of tensors differ."""
    names = differing(a, b)
    far = [float((a[k].double() - b[k].double()).abs().max()) for k in names if k in b]
    return {"equal": not names, "differ": len(names), "of": len(a), "largest": max(far, default=0)}


def section_equal() -> None:
    small = {"n_layer": 2, "n_head": 2, "n_embd": 128, "dropout": 0.1}
    small |= {"block_size": 64, "batch_size": 8}
    adamw = {"optimizer": "adamw", "learning_rate": 1e-3}
    cases = {
        "gpt, bf16-mixed": (small, "bf16-mixed", "eager"),
        "gpt, 32-true": (small, "32-true", "eager"),
        "gpt, bf16-true": (small, "bf16-true", "eager"),
        "gpt, adamw": (small | adamw, "bf16-mixed", "eager"),
        "lecture": (small | adamw | {"name": "lecture"}, "bf16-mixed", "eager"),
        "gpt, 4x256": (SHAPES["4x256"] | {"dropout": 0.1}, "bf16-mixed", "eager"),
        "gpt, compiled": (small, "bf16-mixed", "compiled"),
    }

    steps = 60 if args.accelerator == "gpu" else 6

    def compare(name: str, shape: dict, precision: str, plain: str) -> None:
        graph = {"eager": "graph", "compiled": "compiled graph"}[plain]
        a, again, b = (
            weights(fit_in_process(shape, MODES[mode], steps, precision))
            for mode in (plain, plain, graph)
        )
        record(name, repeats=not differing(a, again), **difference(a, b))

    for name, case in list(cases.items())[: None if args.accelerator == "gpu" else 1]:
        attempt(name, compare, name, *case)


def section_step() -> None:
    first, last = (30, 430) if args.accelerator == "gpu" else (2, 6)

    def measure(shape_name: str, mode: str) -> None:
        shape = SHAPES[shape_name]
        clock, profiled = Clock(first, last), Profile()
        settings = MODES[mode] | (SMALL_TEXT if shape else {})
        trainer = fit_in_process(shape, settings, last + 20, callbacks=[clock, profiled])
        seconds = (clock.times[last] - clock.times[first]) / (last - first)
        hparams, net = trainer.datamodule.hparams, trainer.lightning_module.net
        B, T, L, C = hparams.batch_size, hparams.block_size, net.config.n_layer, net.config.n_embd
        W = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear))
        flop = 6 * B * T * (W + 2 * L * T * C)  # attention over all T positions, without its mask
        record(
            f"{shape_name} {mode}",
            ms=round(1e3 * seconds, 3),
            characters_per_second=round(B * T / seconds),
            utilisation=round(flop / seconds / NOMINAL_FLOPS, 4),
            **profiled.figures(),
        )

    for shape_name in args.shapes if args.accelerator == "gpu" else ("bare",):
        for mode in args.modes if args.accelerator == "gpu" else ("eager",):
            attempt(f"{shape_name} {mode}", measure, shape_name, mode)


def section_generation() -> None:
    from gpt_lightning.data.tokenizers import ByteTokenizer
    from gpt_lightning.generation import generator
    from gpt_lightning.generation.quantize import quantize
    from gpt_lightning.generation.sampling import Sampling
    from gpt_lightning.generation.steps import GraphSteps, Steps
    from gpt_lightning.model import GPTConfig, build_model

    on_gpu = args.accelerator == "gpu"
    device = "cuda" if on_gpu else "cpu"
    kept = {}

    class KeptSteps(GraphSteps):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept["graph"] = self.one_token

    def replay_ms() -> float | None:
        """Milliseconds of the GPU for one token, without the CPU's work between two."""
        if not on_gpu or kept["graph"].graph is None:
            return None
        synchronize()
        start = time.perf_counter()
        for _ in range(100):
            kept["graph"].graph.replay()
        synchronize()
        return round(10 * (time.perf_counter() - start), 3)

    def measure(shape_name: str, precision: str, texts: int, tokens: int, sampling) -> None:
        shape = {"block_size": 256} | SHAPES[shape_name]
        shape.pop("batch_size", None)
        torch.manual_seed(1)
        model = build_model(GPTConfig(vocab_size=256, **shape))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
        written, figures = [], {}
        modes = {"graph": KeptSteps, "eager": Steps, "graph again": KeptSteps, "cpu": Steps}
        for mode, steps in modes.items():
            if mode == "cpu":
                tokens, replay = min(tokens, 40), replay_ms()
            where = "cpu" if mode == "cpu" else device
            generator.GraphSteps = generator.Steps = steps
            text = generator.TextGenerator(quantize(model.to(where).eval(), precision),
                                           ByteTokenizer())  # fmt: skip
            times, out = [], []
            start = time.perf_counter()
            for pieces in text.stream(
                max_new_tokens=tokens, num_samples=texts, sampling=Sampling(**sampling)
            ):
                out.append(pieces)
                times.append(time.perf_counter() - start)
            half = texts * (len(times) - len(times) // 2) / (times[-1] - times[len(times) // 2])
            figures[mode] = {
                "tokens_a_second": round(texts * tokens / times[-1]),
                "second_half": round(half),
                "first_token_s": round(times[0], 3),
                "first_100_tokens_s": round(times[min(99, tokens - 1)], 3),
            }
            written.append(out)
        begins = range(min(tokens, 40))
        record(
            f"{shape_name}, {precision}, {texts} texts {sampling or ''}",
            equal=written[0] == written[1],
            repeats=written[0] == written[2],
            equal_to_cpu=[written[0][i] == written[3][i] for i in begins].count(True),
            replay_ms=replay,
            **figures,
        )

    filters = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    cases = [
        ("bare", "fp32", 1, 1500, {}),
        ("6x384", "fp32", 1, 1500, {}),
        ("6x384", "bf16", 1, 1500, {}),
        ("bare", "fp32", 256, 600, {}),
        ("6x384", "bf16", 256, 600, {}),
        ("bare", "fp32", 256, 600, filters | {"repetition_penalty": 1.1}),
        ("bare", "fp32", 1, 500, {"temperature": 0.0}),
    ]
    small = [("bare", "fp32", 2, 10, {}), ("bare", "fp32", 2, 10, filters)]
    for case in cases if on_gpu else small:
        attempt("{}, {}, {} texts, {} tokens {}".format(*case), measure, *case)


class Profile(Callback):
    """Profiles ten steps near the end of the run."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == trainer.max_steps - 12:
            self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profiler.start()

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.max_steps - 2:
            synchronize()
            self.profiler.stop()

    def figures(self) -> dict:
        """Of a step: kernels, and milliseconds that the GPU works."""
        ranges = ("Optimizer.", "Torch-Compiled", "[pl]")
        kernels = [
            event
            for event in self.profiler.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation
            and not event.key.startswith(ranges)
        ]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        return {
            "gpu_ms": round(sum(event.self_device_time_total for event in kernels) / 1e4, 3),
            "kernels": round(sum(event.count for event in kernels) / 10),
            "longest": [
                [event.key[:90], round(event.self_device_time_total / 1e4, 3)]
                for event in kernels[:12]
            ],
        }


class Clock(Callback):
    """Notes the time after given numbers of steps."""

    def __init__(self, *steps: int):
        self.steps, self.times = steps, {}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            synchronize()
            self.times[trainer.global_step] = time.perf_counter()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# commands


class Command:
    """`python -m gpt_lightning` in a folder of its own; its lines with their times."""

    def __init__(self, tag: str, *flags: str, on_line=None):
        self.folder = args.work / args.section / re.sub(r"\W+", "_", tag)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
        }
        start, self.lines = time.time(), []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt_lightning", *flags],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line in self.process.stdout:
            self.lines.append((time.time() - start, line.rstrip()))
            if on_line:
                on_line(self.process, line)
        self.rc, self.seconds = self.process.wait(), time.time() - start
        self.output = "\n".join(line for _, line in self.lines)

    def last_checkpoint(self) -> Path:
        return next(self.folder.glob("lightning_logs/version_*/checkpoints/last.ckpt"))

    def figures(self) -> dict:
        if self.rc:
            return {"rc": self.rc, "tail": self.output[-600:]}
        found = [
            (at, re.match(r"step (\d+)  .*val (\d+\.\d+) nats", line)) for at, line in self.lines
        ]
        validations = [(float(m[2]), int(m[1]), round(at, 1)) for at, m in found if m]
        first = next(at for at, line in self.lines if line.startswith("run "))
        return {
            "command_seconds": round(self.seconds, 1),
            "to_first_step": round(first, 1),
            "best_and_step": min(validations)[:2],
            "target": next((v for v in validations if v[0] <= TARGET), None),  # loss, step, seconds
            **read_closing_table(self.output),
        }


def flags_of(settings: dict) -> list[str]:
    section = {"block_size": "data", "batch_size": "data", "deterministic": "trainer"}
    return [f"--{section.get(k, 'model')}.{k}={v}" for k, v in settings.items()]


def where() -> str:
    return f"--trainer.accelerator={args.accelerator}"


def section_resume() -> None:
    on_gpu = args.accelerator == "gpu"
    steps, every = (900, 200) if on_gpu else (30, 10)
    small = {"n_layer": 2, "n_head": 2, "n_embd": 128, "dropout": 0.1}
    small |= {"block_size": 128, "batch_size": 16}
    base = [
        "fit", where(), f"--data.corpus={args.text}", "--data.max_val_tokens=20000",
        "--trainer.precision=bf16-mixed", f"--trainer.max_steps={steps}", *flags_of(small),
        f"--trainer.val_check_interval={every}", f"--checkpoint.every_n_train_steps={every // 2}",
        "--sample.every_n_steps=0",
    ]  # fmt: skip

    def run(tag: str, settings: dict, signum: int | None) -> dict:
        def stop(process, line):
            if re.match(rf"step {2 * every}  .*val", line):
                process.send_signal(signum)

        command = Command(tag, *base, *flags_of(settings), on_line=stop if signum else None)
        if signum:
            last = command.last_checkpoint()
            resumed = Command(f"{tag} resumed", "fit", f"--ckpt_path={last}")
            record(tag, rc=command.rc, resumed_rc=resumed.rc, tail=resumed.output[-300:])
        saved = torch.load(command.last_checkpoint(), map_location="cpu", weights_only=True)
        return dict(tensors({name: saved[name] for name in ("state_dict", "optimizer_states")}))

    def compare(kind: str) -> None:
        signals = {"whole": None, "again": None, "term": signal.SIGTERM, "kill": signal.SIGKILL}
        states = {name: run(f"{kind} {name}", KINDS[kind], s) for name, s in signals.items()}
        for name in ("again", "term", "kill"):
            record(f"{kind}: whole = {name}", **difference(states["whole"], states[name]))

    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda kind: attempt(kind, compare, kind), args.kinds if on_gpu else ["graph"])
        )


def tensors(value, name: str = ""):
    """All tensors of a checkpoint with their paths."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from tensors(part, f"{name}.{i}")


def section_fit() -> None:
    short = [] if args.accelerator == "gpu" else ["--trainer.max_steps=20"]
    text = f"--data.corpus={args.text}"
    often = ["--config=gpu/seconds_10", text, "--trainer.val_check_interval=50"]
    commands = {
        "bare": [],
        "bare, eager": ["--model.cuda_graph=false"],
        "seconds_10, validated every 50 steps": often,
        "the same, compiled": [*often, "--model.compile=true"],
    }
    for name, flags in list(commands.items())[: None if args.accelerator == "gpu" else 1]:
        record(name, **Command(name, "fit", where(), *flags, *short).figures())


def section_recipes() -> None:
    small = ["--trainer.max_steps=2", "--data.max_val_tokens=2000", "--model.compile=false"]
    short = [] if args.accelerator == "gpu" else small

    def run(recipe: str, seed: int) -> None:
        flags = [*recipe.split(), f"--data.corpus={args.text}", f"--seed_everything={seed}", *short]
        command = Command(f"{recipe} seed {seed}", "fit", where(), *flags)
        record(recipe, seed=seed, at_once=args.at_once, **command.figures())

    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = [(recipe, seed) for seed in args.seeds for recipe in args.recipes]
        list(pool.map(lambda job: attempt(job[0], run, *job), jobs))


def main() -> None:
    global args
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=560, help="for all sections together")
    parser.add_argument("--accelerator", default="gpu", help="cpu: a test of this script")
    parser.add_argument("--text", type=os.path.abspath, required=True)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_results")))
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_work"))
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="flags of fit, quoted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--at_once", type=int, default=1, help="recipes that run at the same time")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="of section step")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="of section step")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of section resume")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out, args.work = args.out.resolve(), args.work.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        globals()[f"section_{args.section}"]()
        return
    deadline = time.time() + args.seconds
    for name in args.sections.split(","):
        seconds = deadline - time.time()
        if args.accelerator == "gpu":
            seconds = min(SECTIONS[name], seconds)
        if seconds < 10:
            break
        begin = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--section", name],
            start_new_session=True,
        )
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            rc = "out of time"
        print(f"== {name}: {time.time() - begin:.0f} s, {rc}", flush=True)


if __name__ == "__main__":
    main()
