"""AdamW, Muon with AdamW, and the learning rate as a pure function of the step."""

import inspect
import math

import torch
from torch import nn


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and norms (1-D) are not pulled to zero.

    `fused` is one kernel in place of hundreds, on devices that have it, the CPU among them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = fused and parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def scheduled(
    step: int, peak: float, low: float, warmup_steps: int, decay_steps: int, shape: str = "cosine"
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Rises in a line over `warmup_steps`, so that step `warmup_steps` is the first at `peak`, then
    falls along half a `cosine` or a `linear` line and is `low` from step `decay_steps` on.
    `decay_steps` of 0 or less means that no end is known: it stays at `peak`. A run shorter than
    its warm-up just rises.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if decay_steps <= 0:
        return peak
    if step >= decay_steps:
        return low
    done = (step - warmup_steps) / (decay_steps - warmup_steps)
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (peak - low) * left


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers inside a model's blocks: what Muon is for.

    Raises:
        ValueError: for a model that has none.
    """
    found = [
        module.weight
        for name, module in model.named_modules()
        if "blocks" in name.split(".") and isinstance(module, nn.Linear)
    ]
    if not found:
        raise ValueError("--model.optimizer=muon: this model has no hidden matrices; use adamw")
    return found


def muon(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
    embedding_weight_decay: float = 0.0,
) -> "MuonAdamW":
    """Muon for the hidden matrices, AdamW for all else, each with a weight decay of its own.

    AdamW's pulls on embeddings and head, and not on biases and norms (1-D).

    Raises:
        ValueError: for a model that has no hidden matrices.
    """
    hidden = hidden_matrices(model)
    others = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
    # one group where nothing tells them apart, as in checkpoints from before there was a decay
    tables = [p for p in others if p.ndim >= 2 or not embedding_weight_decay]
    vectors = [p for p in others if p.ndim < 2 and embedding_weight_decay]
    groups = [
        {"params": tables, "muon": False, "weight_decay": embedding_weight_decay},
        {"params": vectors, "muon": False, "weight_decay": 0.0},
        {"params": hidden, "muon": True, "weight_decay": weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    fused = fused and hidden[0].device.type in ("cpu", "cuda")
    return MuonAdamW(groups, lr=learning_rate, betas=betas, fused=fused)


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups that say `muon`, AdamW for the others: one optimizer with one state.

    Muon (Jordan et al. 2024): a matrix moves along its averaged gradient with all singular values
    brought near 1, so that rare directions learn as fast as frequent ones. torch.optim.Muon takes
    matrix after matrix and knows no other parameters; this takes all of a size at once.

    Args:
        groups: parameter groups, each with `muon`; a muon group has matrices only.
        **settings: as for torch.optim.AdamW.
    """

    momentum = 0.9  # 0.95 is the usual one; runs of some hundred steps end lower with this

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            # torch wraps a class's step with its hooks, which this step has around it already
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self.muon_step(group)
        return loss

    def muon_step(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:  # AdamW looks for a step in every state that it loads
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        grads = [p.grad for p in params]
        averages = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, averages, self.momentum)  # Nesterov: a step ahead
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, orthogonalise(updates), alpha=-group["lr"])


def orthogonalise(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same matrices with singular values near the square root of long side over short side.

    So a matrix of any shape changes by about as much per entry as a square one does. All of a size
    go through the iteration as one batch, a tall one lying on its side.
    """
    done: list[torch.Tensor] = [torch.empty(0)] * len(matrices)
    batches: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault((min(matrix.shape), max(matrix.shape)), []).append(i)
    for (short, long), batch in batches.items():
        lying = [matrices[i] if matrices[i].shape[0] == short else matrices[i].mT for i in batch]
        ready = newton_schulz(torch.stack(lying)) * math.sqrt(long / short)
        for i, matrix in zip(batch, ready, strict=True):
            done[i] = matrix if matrices[i].shape[0] == short else matrix.mT
    return done


def newton_schulz(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(N, R, C), R at most C, to the same with singular values of about 0.7 to 1.2, in bf16.

    Each step is an odd quintic of the matrix, with coefficients that make small singular values
    grow fastest (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.type_as(x)
