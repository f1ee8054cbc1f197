"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, one draw.

Everything is computed on the device of the logits, without a synchronization, so that a CUDA graph
can contain it. The random numbers come from the caller.

Legend: B samples, T tokens of the window, V vocabulary.
"""

from dataclasses import dataclass

import torch

from gpt_lightning.errors import UserError, at_least

NOT_FINITE = (
    "the model's logits are not finite numbers: its training diverged; train again with a lower "
    "learning_rate"
)


@dataclass
class Sampling:
    """How the next token is chosen; each filter applies to what the previous one keeps.

    Args:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely tokens; of equally likely ones, those with lower ids.
        top_p: keep the most likely tokens whose probabilities sum to at least this (nucleus
            sampling, Holtzman et al. 2020).
        min_p: keep tokens with at least this fraction of the most likely token's probability
            (Nguyen et al. 2024).
        repetition_penalty: for tokens that occur in the window, divides positive logits and
            multiplies negative ones, before the temperature; 1 changes nothing (Keskar et al. 2019,
            "CTRL").

    Raises:
        UserError: for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be 0 or a positive number")
        at_least(1, top_k=self.top_k)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value} must be above 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            penalty = self.repetition_penalty
            raise UserError(f"repetition_penalty={penalty} must be between 0.01 and 100")

    def sample(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        window: torch.Tensor | None = None,
        banned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw the next token of each sample.

        Args:
            logits: (B, V).
            uniform: (B,) fp32 random numbers in [0, 1), as `torch.rand` draws them.
            window: (B, T) the tokens that `repetition_penalty` applies to.
            banned: (B, V) bool, the tokens that must not be drawn.

        Returns:
            (B,) token ids; -1 where the logits are not finite.
        """
        logits = self._adjusted(logits, window, banned)
        finite = logits.amax(dim=-1).isfinite()
        if self.temperature == 0:
            ids = logits.argmax(dim=-1)  # the lowest id among ties
        else:
            ids = draw(self._weights(logits), uniform)
        return ids.masked_fill(~finite, -1)

    def probabilities(
        self, logits: torch.Tensor, window: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, V) to the probabilities (B, V) that `sample` draws the next token from."""
        weights = self._weights(self._adjusted(logits, window, None))
        return weights / weights.sum(dim=-1, keepdim=True)

    def _adjusted(
        self, logits: torch.Tensor, window: torch.Tensor | None, banned: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (B, V) in fp32 after the repetition penalty, -inf for banned tokens."""
        logits = logits.float()
        if self.repetition_penalty != 1 and window is not None:
            occurs = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, window, True)
            penalty = self.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(occurs, penalized, logits)
        return logits if banned is None else logits.masked_fill(banned, -torch.inf)

    def _weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, V) times a constant: the most likely token's weight is 1."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
        if self.top_k is not None or self.top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        # Subtract the largest logit first, so that a small temperature does not overflow. The
        # temperature itself has to fit into fp32.
        temperature = min(max(self.temperature, 1e-30), 1e30)
        weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
        if self.top_k is not None:
            weights[:, self.top_k :].zero_()
        if self.top_p is not None:
            sums = weights.cumsum(dim=-1)
            before = sums - weights  # 0 for the most likely token: it stays
            weights = weights.masked_fill(before >= self.top_p * sums[:, -1:], 0.0)
        if self.top_k is not None or self.top_p is not None:
            weights = torch.empty_like(weights).scatter_(1, ids, weights)
        if self.min_p is not None:
            weights = weights.masked_fill(weights < self.min_p, 0.0)
        return weights


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from each row of weights (B, V) by inversion of its cumulative distribution.

    Args:
        weights: at least 0; sums in fp32 must not underflow. `Sampling` makes the largest 1.
        uniform: (B,) fp32 multiples of 2**-24 in [0, 1).

    Returns:
        (B,) the first index whose cumulative sum exceeds `uniform` times the total.
    """
    # A sum that is computed in parallel may round up at a weight of 0, which must not be drawn.
    sums = weights.cumsum(dim=-1).masked_fill(weights == 0, 0.0)
    # At most 1 - 2**-24 times the total, which rounds to less than the total.
    threshold = uniform[:, None] * sums.amax(dim=-1, keepdim=True)
    return (sums > threshold).byte().argmax(dim=-1)  # the first index among equals
