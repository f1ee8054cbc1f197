"""Text from a model: token ids in, token ids out, or text in, text out.

`generate` works on token ids; `TextGenerator` puts a tokenizer around it.

Legend: B samples, T tokens of the prompt, V vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt_lightning.checkpoint import KEY, ONNX, model_and_tokenizer, read_checkpoint
from gpt_lightning.data.tokenizers import CharTokenizer, Tokenizer
from gpt_lightning.errors import UserError, at_least
from gpt_lightning.generation.onnx_model import load_onnx
from gpt_lightning.generation.quantize import quantize
from gpt_lightning.generation.sampling import NOT_FINITE, Sampling
from gpt_lightning.generation.scoring import Score, predictions, total
from gpt_lightning.generation.steps import GraphSteps, Steps
from gpt_lightning.generation.strings import BannedStrings, StopStrings
from gpt_lightning.model.attention import RecordedAttention

MAX_SAMPLES = 1 << 16  # texts at once


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    banned: BannedStrings | None = None,
) -> Iterator[list[int]]:
    """Continue B prompts; yield each step's B new ids as soon as they are drawn.

    Args:
        model: (ids (B, T), cache) -> logits (B, T, V). It is in eval mode meanwhile.
        ids: (B, T) int64, T at least 1; the last `block_size` tokens count.
        max_new_tokens: number of steps.
        sampling: how tokens are drawn.
        generator: a CPU generator; its seed decides the text.
        banned: strings that must not occur in the new texts.

    Raises:
        UserError: if the model's logits are not finite, or all tokens are banned.
    """
    device = next(model.parameters()).device
    mask = None if banned is None else banned.mask().to(device)
    was_training = model.training
    model.eval()
    steps = (GraphSteps if device.type == "cuda" else Steps)(model, ids, sampling, mask)
    most = min(max_new_tokens, sys.maxsize)
    try:
        for uniform in islice(uniforms(len(ids), generator, device), most):
            if banned is not None and mask is not None:
                mask.copy_(banned.mask())
            new = steps(uniform).tolist()
            if -1 in new:
                raise UserError(NOT_FINITE)
            yield new
            if banned is not None:
                banned.add(new)
    finally:
        model.train(was_training)


def uniforms(B: int, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    """Random numbers (B,) for one step after the other, drawn for many steps at once."""
    while True:
        yield from torch.rand(256, B, generator=generator).to(device)


def start_of(description: dict[str, Any]) -> str:
    """What an empty prompt continues: the separator of documents, or else a line break."""
    match description:
        case {"settings": {"data": {"separator": str(separator)}}} if separator:
            return separator
    return "\n"


class TextGenerator:
    """A model with its tokenizer: text in, text out.

    Args:
        start: what an empty prompt continues, if the tokenizer knows its characters.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, start: str = "\n"):
        self.model, self.tokenizer, self.start = model, tokenizer, start

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        unknown: str = "error",
    ) -> "TextGenerator":
        """Load model and tokenizer from a checkpoint or ONNX file, without Lightning and the data.

        Args:
            precision: of the weights: `auto`, `fp32`, `bf16` or `int8` (see `quantize`).
            unknown: for characters that the vocabulary lacks: `error`, `drop` or `replace`.

        Raises:
            UserError: for a file that is not an intact checkpoint, an unknown precision, or an ONNX
                file with another device than the CPU or another precision than fp32.
        """
        if Path(path).suffix == ONNX:
            onnx_model, tokenizer, description = load_onnx(path, device, precision, unknown)
            return cls(onnx_model, tokenizer, start_of(description))
        return cls.from_checkpoint(read_checkpoint(path), path, device, precision, unknown)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: dict[str, Any],
        path: str | Path,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        unknown: str = "error",
    ) -> "TextGenerator":
        """The same from the checkpoint that `read_checkpoint` has read from `path`."""
        model, tokenizer = model_and_tokenizer(checkpoint, path, unknown)
        start = start_of(checkpoint[KEY])
        return cls(quantize(model.to(device).eval(), precision), tokenizer, start)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The token ids of a prompt; of an empty one those of `start`, or else the first id.

        Raises:
            UserError: for an unknown character.
        """
        try:
            ids = self.tokenizer.encode(prompt).tolist()
        except UserError as error:
            raise UserError(f"prompt: {error}") from error
        if not ids:
            with suppress(UserError):  # its characters are not in the vocabulary
                ids = self.tokenizer.encode(self.start).tolist()
        return ids or [0]

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 500,
        sampling: Sampling | None = None,
        seed: int = 1337,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        ban: Sequence[str] = (),
    ) -> Iterator[list[str]]:
        """Continue `prompt`; yield the new text of each sample, token by token.

        Args:
            prompt: text to continue; it is not yielded. An empty prompt starts a new document if
                the checkpoint's texts had a separator, otherwise a new line, as in the lecture.
            max_new_tokens: largest number of tokens to generate.
            sampling: how tokens are drawn; by default from the model's own probabilities.
            seed: the same seed gives the same text.
            num_samples: B, number of texts to generate in parallel.
            stop: strings that end a sample, which includes the string.
            ban: strings that do not occur in the new text; a token that would complete one gets
                probability 0.

        Yields:
            B strings; a sample that has ended, or whose character is not complete, adds "".

        Raises:
            UserError: for an unknown character in `prompt` or `stop`, a setting out of range, a
                model whose logits are not finite, or if all tokens are banned.
        """
        at_least(1, max_new_tokens=max_new_tokens, num_samples=num_samples)
        if num_samples > MAX_SAMPLES:
            raise UserError(
                f"num_samples={num_samples} must be at most {MAX_SAMPLES}; run again with another "
                "seed for more"
            )
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed} must be 0 or more and below 2**63")
        stop, ban = ([given] if isinstance(given, str) else given for given in (stop, ban))
        for name, strings in (("stop", stop), ("ban", ban)):
            if "" in strings:
                raise UserError(f"{name}='' must have at least one character")
        if isinstance(self.tokenizer, CharTokenizer):
            for text in stop:
                if not set(text) <= set(self.tokenizer.vocabulary):
                    message = "has a character that is not in the vocabulary, so it never occurs"
                    raise UserError(f"stop={text!r} {message}")
        tokens = self.tokenizer.bytes_of_tokens() if ban else []
        steps = generate(
            self.model,
            torch.tensor([self.encode_prompt(prompt)] * num_samples),
            max_new_tokens,
            sampling or Sampling(),
            torch.Generator().manual_seed(seed),
            BannedStrings(ban, tokens, num_samples) if ban else None,
        )
        texts = [StopStrings(self.tokenizer.stream_decoder(), stop) for _ in range(num_samples)]
        for new in steps:
            yield [text(i) for text, i in zip(texts, new, strict=True)]
            if all(text.ended for text in texts):
                break
        yield [text(None) for text in texts]  # a character whose bytes are incomplete

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 500,
        sampling: Sampling | None = None,
        seed: int = 1337,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        ban: Sequence[str] = (),
    ) -> list[str]:
        """The complete texts of `stream`, with the prompt: `num_samples` strings."""
        steps = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            num_samples=num_samples,
            stop=stop,
            ban=ban,
        )
        return [prompt + "".join(pieces) for pieces in zip(*steps, strict=True)]

    def score(self, text: str, stride: int | None = None) -> Score:
        """What `text` costs the model, of which the first token is not predicted.

        Args:
            stride: distance of overlapping windows; without it they do not overlap.

        Raises:
            UserError: for an unknown character, or a text of less than two characters.
        """
        ids = self.tokenizer.encode(text)
        return total(predictions(self.model, ids, [(0, len(ids))], stride), self.tokenizer)

    @torch.inference_mode()
    def attention(self, text: str) -> torch.Tensor:
        """The attention weights on `text` in each layer and head: (L, H, T, T) fp32.

        Row t has the weights with which token t attends to tokens 0 to t; its sum is 1.

        Raises:
            UserError: for an unknown character, an empty text, one of more than `block_size`
                tokens, or a model without attention.
        """
        ids = torch.tensor(self.tokenizer.encode(text).tolist(), dtype=torch.long)
        block_size = self.model.config.block_size
        if not 0 < len(ids) <= block_size:
            raise UserError(f"text has {len(ids)} tokens; attention is for 1 to {block_size}")
        cache = RecordedAttention(block_size)
        self.model(ids[None].to(next(self.model.parameters()).device), cache)
        if not cache.weights:
            raise UserError(f"name={self.model.config.name}: this model has no attention")
        return torch.cat(cache.weights)
