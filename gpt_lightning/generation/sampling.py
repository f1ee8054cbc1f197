"""From logits to the next token: temperature, top-k, top-p and min-p, then one draw.

Legend: B samples, V vocabulary.
"""

from dataclasses import dataclass

import torch

from gpt_lightning.errors import UserError


@dataclass
class Sampling:
    """How the next token is chosen; each filter applies to what the previous one keeps.

    Args:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens whose probabilities sum to at least this (nucleus
            sampling, Holtzman et al. 2020).
        min_p: keep tokens with at least this fraction of the most likely token's probability
            (Nguyen et al. 2024).

    Raises:
        UserError: for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be 0 or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value} must be above 0 and at most 1")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) to the probabilities (B, V) that the next token is drawn from.

        Raises:
            UserError: if the model's logits are NaN or infinite.
        """
        # The lower id comes first among ties: top_k keeps exactly k tokens.
        ordered, ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
        if not ordered[:, 0].isfinite().all():  # torch sorts NaN as the largest
            raise UserError(
                "the model's logits are not finite numbers: its training diverged; train again "
                "with a lower learning_rate"
            )
        if self.temperature == 0:
            probs = torch.zeros_like(ordered)
            probs[:, 0] = 1.0
        else:
            # subtract the largest logit first: a small temperature must not overflow
            scaled = ((ordered - ordered[:, :1]).double() / self.temperature).float()
            if self.top_k is not None:
                scaled[:, self.top_k :] = -torch.inf
            probs = torch.softmax(scaled, dim=-1)
            if self.top_p is not None:
                before = probs.cumsum(dim=-1) - probs  # 0 for the most likely token: it stays
                probs = torch.where(before < self.top_p, probs, 0.0)
            if self.min_p is not None:
                probs = torch.where(probs >= self.min_p * probs[:, :1], probs, 0.0)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return torch.empty_like(probs).scatter_(-1, ids, probs)

    def sample(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Logits (B, V) to token ids (B,), drawn on the CPU: a seed is the same on every device."""
        probs = self.probabilities(logits.cpu())
        if self.temperature == 0:
            return probs.argmax(dim=-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)
