"""Optimizers (AdamW, or Muon with AdamW) and the learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gpt_lightning.errors import UserError


@dataclass
class OptimizerConfig:
    """Which optimizer trains the model, and how its learning rate changes.

    Args:
        optimizer: `muon` (Muon for the matrices inside the blocks, AdamW for all other parameters)
            or `adamw`.
        learning_rate: peak learning rate of AdamW.
        muon_learning_rate: peak learning rate of Muon.
        schedule: shape of the decay after the warm-up: `linear` or `cosine`.
        min_lr: final learning rate of AdamW. Muon's ends at the same fraction of its peak.
        warmup_steps: steps over which the learning rates rise linearly to their peaks.
        lr_decay_steps: step at which the decay ends; by default the last step of the run. 0
            disables the decay.
        weight_decay: weight decay of all matrices with `adamw` (default 0.1), of the matrices
            inside the blocks with `muon` (default 0).
        embedding_weight_decay: with `muon`, weight decay of the embeddings and the output layer.
        beta1: AdamW's decay rate of the averaged gradient.
        beta2: AdamW's decay rate of the averaged squared gradient.

    Raises:
        UserError: if a value is out of its range.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 8e-3
    muon_learning_rate: float = 0.02
    schedule: Literal["linear", "cosine"] = "linear"
    min_lr: float = 0.0
    warmup_steps: int = 0
    lr_decay_steps: int | None = None
    weight_decay: float | None = None
    embedding_weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self):
        choices = {"optimizer": ("muon", "adamw"), "schedule": ("linear", "cosine")}
        for name, value in vars(self).items():
            if name in choices:
                if value not in choices[name]:
                    raise UserError(f"{name}={value} must be {' or '.join(choices[name])}")
            elif name in ("beta1", "beta2"):
                if not 0 <= value < 1:
                    raise UserError(f"{name}={value} must be at least 0 and below 1")
            elif value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name}={value} must be a number of at least 0")


def learning_rate_at(step: int, config: OptimizerConfig, decay_steps: int) -> float:
    """AdamW's learning rate at optimizer step `step`, counted from 0.

    It rises linearly, is first at its peak at step `warmup_steps`, and falls to `min_lr` at step
    `decay_steps`. With `decay_steps` of 0 or less it stays at its peak.
    """
    peak, low, warmup = config.learning_rate, config.min_lr, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if decay_steps <= 0:
        return peak
    if step >= decay_steps:
        return low
    done = (step - warmup) / (decay_steps - warmup)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (peak - low) * left


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, fused: bool = True, compile: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters.

    `fused` allows AdamW to run as one kernel. It must be False with gradient scaling (fp16).
    `compile` compiles Muon's step on a GPU.

    Raises:
        UserError: if Muon is asked for and the model has no matrices for it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    settings["fused"] = True if fused and device.type in ("cpu", "cuda") else None
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        weight_decay = 0.1 if config.weight_decay is None else config.weight_decay
        in_graph = bool(fused and device.type == "cuda")
        groups = decay_groups(parameters, weight_decay)
        optimizer = torch.optim.AdamW(groups, capturable=in_graph, **settings)
    else:
        hidden = hidden_matrices(model)
        hidden_ids = {id(p) for p in hidden}
        others = [p for p in parameters if id(p) not in hidden_ids]
        groups = decay_groups(others, config.embedding_weight_decay)
        muon = {"muon": True, "lr": config.muon_learning_rate}
        groups.append({"params": hidden, "weight_decay": config.weight_decay or 0.0, **muon})
        optimizer = MuonAdamW(groups, **settings)
        if compile and fused and device.type == "cuda":  # with a number, every new rate recompiles
            optimizer.muon_update = torch.compile(muon_update)
    if fused and device.type == "cuda":
        for group in optimizer.param_groups:  # a CUDA graph would keep a number
            group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizer


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups with weight decay for matrices and none for vectors (biases, norms)."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trainable weights of the linear layers inside a model's `blocks`, which Muon trains."""
    found = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks" in name.split(".")
    ]
    found = [weight for weight in found if weight.requires_grad]
    if not found:
        raise UserError(
            "optimizer=muon needs a model with matrices inside blocks; use optimizer=adamw"
        )
    return found


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the parameter groups with `muon=True`, AdamW for the others.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its
    averaged gradient with all singular values brought near 1, so that rare directions are learned
    as fast as frequent ones. AdamW is Loshchilov & Hutter 2019, arXiv:1711.05101.

    The arguments are those of torch.optim.AdamW, and:

    Args:
        groups: parameter groups. A group with `muon=True` contains only matrices. In each step,
            either all or none of the matrices of one shape (or its transpose) have a gradient.
        momentum: Muon's decay rate of the averaged gradient. 0.95 is the usual value; runs of some
            hundred steps end at a lower loss with 0.9.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        fused: bool | None = None,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(groups, defaults | dict(momentum=momentum, fused=fused, muon=False))
        self.muon_update = muon_update

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step. Returns the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["muon"]:
                self.adamw_step(group)
                continue
            batches: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                batches.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for params in batches.values():
                self.muon_step(params, group)
        return loss

    def adamw_step(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def muon_step(self, params: list[Tensor], group: dict) -> None:
        """Update matrices of one shape, or its transpose, as one batch.

        Their momentum is stacked in the state of the first one.
        """
        if all(p.grad is None for p in params):
            return
        state = self.state[params[0]]
        if not state:
            state["momentum"] = torch.stack([torch.zeros_like(wide(p)) for p in params])
        dtype = torch.bfloat16 if computes_bf16(params[0].device) else torch.float32
        grads = [p.grad for p in params]
        settings = group["lr"], group["weight_decay"], group["momentum"], dtype
        self.muon_update(params, grads, state["momentum"], *settings)


def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    momentum: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    beta: float,
    dtype: torch.dtype,
) -> None:
    """Muon's step for N matrices of one shape, or its transpose, in place.

    Args:
        momentum: (N, short side, long side) the averaged gradients, updated in place.
        beta: decay rate of `momentum`.
        dtype: of the Newton-Schulz iteration.
    """
    stacked = torch.stack([wide(grad) for grad in grads])  # (N, short side, long side)
    momentum.lerp_(stacked, 1 - beta)
    nesterov = stacked.lerp(momentum, beta)
    short, long = stacked.shape[1:]
    # the factor makes the entries of matrices of any shape change by about the same amount
    updates = newton_schulz(nesterov, dtype) * math.sqrt(long / short)
    for p, update in zip(params, updates.unbind(), strict=True):
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            wide(p).sub_(lr * update)
        else:
            wide(p).add_(update, alpha=-lr)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or a transposed view of it if it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (N, R, C), R at most C, with their singular values brought to about 0.7 to 1.2.

    Each of the five steps is an odd quintic polynomial in which small singular values grow fastest
    (Jordan et al. 2024). It is computed in `dtype`; bf16 is accurate enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.to(dtype)
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.type_as(x)


def computes_bf16(device: torch.device) -> bool:
    """Whether Muon computes in bf16 here; devices that only emulate it use fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu"
