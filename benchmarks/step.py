"""Where the time of a training step goes, against what this machine's matrix products could do."""

import statistics
import time
from pathlib import Path

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import table
from gpt_lightning import GPTModule
from gpt_lightning.training.memory import keep_freed_memory
from gpt_lightning.training.optimizers import muon

VOCABULARY = 65
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear"),
    "softmax": ("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "copies and conversions": ("copy_", "cat", "fill_", "zero_", "stack"),
    "embeddings": ("index_select", "embedding_dense_backward"),
}


def kind_of(name: str) -> str:
    """Which of `KINDS` an operation is; element by element if none."""
    name = name.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names), "element by element")


def seconds_by_kind(work, rounds: int) -> dict[str, float]:
    """Seconds of one `work()`, split by the kind of operation, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            work()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / rounds
    return spent


def seconds_of(work, rounds: int) -> float:
    """Seconds of one `work()`: the median of `rounds`, without the profiler."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def product_rate(rows: int, inner: int, columns: int, rounds: int) -> float:
    """FLOP a second of a bf16 product (rows, inner) x (inner, columns) with nothing around it."""
    x, w = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    x @ w
    return 2 * rows * inner * columns / seconds_of(lambda: x @ w, rounds)


def measure(config: Path, rounds: int):
    """The step of `config` in bf16 with Muon: forward and backward, then the optimizer.

    Returns:
        all figures, and a table of milliseconds by kind of operation.
    """
    keep_freed_memory()
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not {"data", "model"} <= settings.keys():
        raise ValueError(f"--config={config}: choose one that gives data and model itself")
    B, T = settings["data"]["batch_size"], settings["data"]["block_size"]
    torch.manual_seed(1337)
    module = GPTModule(VOCABULARY, T, **settings["model"])
    hp, net = module.hparams, module.net
    optimizer = muon(module, hp.learning_rate, hp.weight_decay, (hp.beta1, hp.beta2))
    ids = torch.randint(VOCABULARY, (B, T + 1))
    batch = ids[:, :-1], ids[:, 1:]

    def gradients() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(batch, 0)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # so that a step can be timed by itself, repeated

    for _ in range(3):
        gradients()
        update()
    parts = {"forward and backward": gradients, "optimizer": update}
    seconds = {name: seconds_of(work, rounds) for name, work in parts.items()}
    kinds = {name: seconds_by_kind(work, rounds) for name, work in parts.items()}
    C = net.config.n_embd
    rates = {
        "square, 1024": product_rate(1024, 1024, 1024, 20),
        f"{B * T} x {C} by {C} x {4 * C}": product_rate(B * T, C, 4 * C, 20),
    }
    hidden = sum(p.numel() for g in optimizer.param_groups if g["muon"] for p in g["params"])
    # each weight takes part in three products a token (forward, and two backward), of two FLOP;
    # attention in as many, over T tokens, of which half is in vain behind the mask
    flop = 6 * B * T * (hidden + C * VOCABULARY + 2 * net.config.n_layer * T * C)
    whole = sum(seconds.values())
    names = sorted({kind for part in kinds.values() for kind in part})
    rows = []
    for kind in names:
        ms = [kinds[part].get(kind, 0.0) * 1e3 for part in parts]
        rows.append([kind, *(f"{value:.1f}" for value in ms), f"{sum(ms):.1f}"])
    rows.append(
        ["in all, without the profiler"]
        + [f"{seconds[part] * 1e3:.1f}" for part in parts]
        + [f"{whole * 1e3:.1f}"]
    )
    share = flop / whole / rates["square, 1024"]
    text = table(["milliseconds a step", *parts, "together"], rows) + (
        f"\nThe model's products are {flop / 1e9:.1f} GFLOP a step, {flop / whole / 1e9:.0f} "
        f"GFLOP/s: {share:.0%} of what the best ones reach here ("
        + ", ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
        + ").\n"
    )
    figures = {"config": str(config), "seconds": seconds, "kinds": kinds, "flop": flop}
    return {**figures, "product_flop_per_second": rates}, text
