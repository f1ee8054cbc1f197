"""Text from a model: prefill, cached decoding, streaming, stop strings.

`generate` works on token ids; `TextGenerator` puts a tokenizer around it.

Legend: B samples, T tokens of the prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from gpt_lightning.checkpoint import model_and_tokenizer, read_checkpoint
from gpt_lightning.data.tokenizers import Tokenizer, tokenizer_from_state
from gpt_lightning.errors import UserError
from gpt_lightning.generation.quantize import quantize
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.generation.step_graphs import StepGraphs
from gpt_lightning.model.attention import KVCache


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    stop: Sequence[Sequence[int]] = (),
) -> Iterator[list[int | None]]:
    """Continue B prompts; yield each step's B new ids as soon as they are drawn.

    The model sees a window of at most `block_size` tokens. A full window restarts with its last
    three quarters, so that keys and values are computed again once in `block_size / 4` tokens.
    (The lecture moves its window by one token and computes all of it for every token.)

    Args:
        model: (ids (B, T), cache) -> logits (B, T, V). It is in eval mode meanwhile.
        ids: (B, T) int64, T at least 1; the last `block_size` tokens count.
        max_new_tokens: largest number of steps.
        sampling: how tokens are drawn.
        generator: a CPU generator; its seed decides the text.
        stop: token sequences that end a sample.

    Yields:
        B ids, None for samples that have ended, until all have.

    Raises:
        UserError: if the model's logits are not finite.
    """
    was_training = model.training
    model.eval()
    block_size = model.config.block_size
    window = ids[:, -block_size:].to(next(model.parameters()).device)  # (B, T)
    cache = KVCache(block_size)
    graphs = StepGraphs(model, cache, window) if window.device.type == "cuda" else None
    stop = [list(sequence) for sequence in stop]
    generated: list[list[int]] = [[] for _ in range(ids.shape[0])]
    ended = [False] * len(generated)
    try:
        for _ in range(max_new_tokens):
            logits = graphs(window) if graphs else model(window, cache)[:, -1]  # (B, V)
            new = sampling.sample(logits, generator)  # (B,)
            if window.shape[1] == block_size:
                window = window[:, block_size - block_size * 3 // 4 :]
                cache.length = 0
            window = torch.cat([window, new.to(window.device)[:, None]], dim=1)
            step = [None if end else i for end, i in zip(ended, new.tolist(), strict=True)]
            for row, i in enumerate(step):
                if i is not None:
                    generated[row].append(i)
                    ended[row] = any(generated[row][-len(s) :] == s for s in stop)
            yield step
            if all(ended):
                return
    finally:
        model.train(was_training)


class TextGenerator:
    """A model with its tokenizer: text in, text out."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        unknown: str = "error",
    ) -> "TextGenerator":
        """Load model and tokenizer from a checkpoint file, without Lightning and the data.

        Args:
            precision: of the weights: `auto`, `fp32`, `bf16` or `int8` (see `quantize`).
            unknown: for characters that the vocabulary lacks: `error`, `drop` or `replace`.

        Raises:
            UserError: for a file that is not an intact checkpoint, or an unknown precision.
        """
        model, tokenizer = model_and_tokenizer(read_checkpoint(path), path, unknown)
        return cls(quantize(model.to(device).eval(), precision), tokenizer)

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 500,
        sampling: Sampling | None = None,
        seed: int = 1337,
        num_samples: int = 1,
        stop: Sequence[str] = (),
    ) -> Iterator[list[str]]:
        """Continue `prompt`; yield the new text of each sample, token by token.

        Args:
            prompt: text to continue; it is not yielded. An empty prompt starts a new line, as in
                the lecture.
            max_new_tokens: largest number of tokens (characters or bytes) to generate.
            sampling: how tokens are drawn; by default from the model's own probabilities.
            seed: the same seed gives the same text.
            num_samples: B, number of texts to generate in parallel.
            stop: strings that end a sample.

        Yields:
            B strings; a sample that has ended, or whose character is not complete, adds "".

        Raises:
            UserError: for an unknown character in `prompt` or `stop`, a setting out of range, or a
                model whose logits are not finite.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed} must be 0 or more and below 2**63")
        stop = [stop] if isinstance(stop, str) else stop
        if "" in stop:
            raise UserError("stop='' must have at least one character")
        ids = self._encode(prompt, "prompt")
        if not ids:
            with suppress(UserError):  # a vocabulary without a line break
                ids = self._encode("\n", "prompt")
        stop_ids = [self._encode_stop(text) for text in stop]
        steps = generate(
            self.model,
            torch.tensor([ids or [0]] * num_samples),
            max_new_tokens,
            sampling or Sampling(),
            torch.Generator().manual_seed(seed),
            stop_ids,
        )
        decoders = [self.tokenizer.stream_decoder() for _ in range(num_samples)]
        for step in steps:
            yield ["" if i is None else decode(i) for decode, i in zip(decoders, step, strict=True)]
        yield [decode(None) for decode in decoders]  # a character whose bytes are incomplete

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 500,
        sampling: Sampling | None = None,
        seed: int = 1337,
        num_samples: int = 1,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The complete texts of `stream`, with the prompt: `num_samples` strings."""
        steps = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            num_samples=num_samples,
            stop=stop,
        )
        return [prompt + "".join(pieces) for pieces in zip(*steps, strict=True)]

    def _encode(self, text: str, field: str) -> list[int]:
        try:
            return self.tokenizer.encode(text).tolist()
        except UserError as error:
            raise UserError(f"{field}: {error}") from error

    def _encode_stop(self, text: str) -> list[int]:
        """The ids of a stop string; `unknown` does not apply, or another text would end samples."""
        try:
            return tokenizer_from_state(self.tokenizer.state()).encode(text).tolist()
        except UserError as error:
            message = "has a character that is not in the vocabulary, so it never occurs"
            raise UserError(f"stop={text!r} {message}") from error
