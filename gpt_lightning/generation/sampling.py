"""From logits to the next token: temperature, top-k, top-p, min-p, then one draw.

Legend: B samples side by side, V vocabulary.
"""

from dataclasses import dataclass

import torch

TINY = torch.finfo(torch.float32).tiny  # below it a temperature would be 0 in float32


@dataclass
class Sampling:
    """How the next token is chosen from the model's logits.

    The filters apply in this order, each to what the one before left.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keeps the k likeliest tokens.
        top_p: keeps the likeliest tokens that together reach this probability (nucleus sampling,
            Holtzman et al. 2020).
        min_p: keeps tokens of at least this share of the likeliest one's probability (Nguyen et
            al. 2024).

    Raises:
        ValueError: in one line that names the flag, for a setting out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature={self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top_k={self.top_k} must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"--{name}={value} must be above 0 and at most 1")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) to the probabilities (B, V) that the next token is drawn from."""
        # Ties are broken by the lower id, so that top_k keeps exactly k and 0 always picks one.
        ordered, ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
        if self.temperature == 0:
            probs = torch.zeros_like(ordered)
            probs[:, 0] = 1.0
        else:
            # subtracting the largest first: a tiny temperature must not overflow
            scaled = (ordered - ordered[:, :1]) / max(self.temperature, TINY)
            if self.top_k is not None:
                scaled[:, self.top_k :] = -torch.inf
            probs = torch.softmax(scaled, dim=-1)
            if self.top_p is not None:
                before = probs.cumsum(dim=-1) - probs  # the likeliest always stays
                probs = torch.where(before < max(self.top_p, TINY), probs, 0.0)
            if self.min_p is not None:
                probs = torch.where(probs >= self.min_p * probs[:, :1], probs, 0.0)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return torch.empty_like(probs).scatter_(-1, ids, probs)

    def sample(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Logits (B, V) to token ids (B,). The draw is made on the CPU: a seed means the same
        text on every device, as far as the logits agree."""
        probs = self.probabilities(logits.cpu())
        if self.temperature == 0:
            return probs.argmax(dim=-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)
