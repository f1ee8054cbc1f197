"""Text in, text out: a checkpoint file that writes on from a prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from gpt_lightning.checkpoint import KEY, model_of, read_checkpoint
from gpt_lightning.data.tokenizers import (
    UNKNOWN,
    ByteTokenizer,
    CharTokenizer,
    choose,
    tokenizer_from_state,
)
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.precision import for_writing
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import load_model

Tokenizer = CharTokenizer | ByteTokenizer


class Writer:
    """A model with its tokenizer.

    Example:
        >>> writer = Writer.load("lightning_logs/version_0/checkpoints/best.ckpt")
        >>> print(writer.write("ROMEO:", max_new_tokens=200, seed=1)[0])
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        unknown: str = "error",
        precision: str = "auto",
    ) -> "Writer":
        """Read model and tokenizer from a checkpoint; neither Lightning nor data is needed.

        Args:
            path: the checkpoint's file.
            device: where the model runs.
            unknown: what becomes of prompt characters that the model never saw: `error`, `drop`
                or `replace`.
            precision: of the weights: `fp32` as trained, `bf16`, `int8`, or `auto`, int8 where a
                measurement of some milliseconds finds it clearly quicker (`precision.for_writing`).

        Raises:
            ValueError: in one line, if the file is none of ours, or torn, or the precision unknown.
        """
        choose("unknown", unknown, UNKNOWN)
        checkpoint = read_checkpoint(path)
        prefix = "net."  # the attribute of the LightningModule that holds the model
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        entry = checkpoint[KEY]
        try:
            model = load_model(weights, **model_of(entry))
            tokenizer = tokenizer_from_state(entry["tokenizer"], unknown)
            if tokenizer.vocab_size != model.config.vocab_size:
                raise ValueError("another vocabulary")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--ckpt_path={path}: what it says of its model does not fit its weights: {error}"
            ) from error
        return cls(for_writing(model.to(device).eval(), precision), tokenizer)

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 500,
        sampling: Sampling | None = None,
        seed: int = 1337,
        num_samples: int = 1,
        stop: Sequence[str] = (),
    ) -> Iterator[list[str]]:
        """Write on from `prompt`, yielding what each of the samples has new (B strings a step).

        Args:
            prompt: what the text begins with; it is not repeated in what is yielded. An empty one
                begins at a line's start, as the lecture's does.
            max_new_tokens: tokens (characters, or bytes) to write at most.
            sampling: how tokens are drawn.
            seed: the same seed writes the same text.
            num_samples: B, texts written side by side.
            stop: strings that end a sample once written.

        Raises:
            ValueError: in one line, for a prompt with a character that the model never saw, or
                settings out of range, or a model whose predictions are no finite numbers.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"--{name}={value} must be at least 1")
        if "" in stop:
            raise ValueError("--stop='' would stop at once; give the characters to stop at")
        ids = self._encode(prompt, "--prompt") or self._line_start()
        stops = [self._encode(text, "--stop") for text in stop]
        generator = torch.Generator().manual_seed(seed)
        batch = torch.tensor([ids] * num_samples)
        decoders = [self.tokenizer.stream_decoder() for _ in range(num_samples)]
        sampling = sampling or Sampling()
        steps = generate(self.model, batch, max_new_tokens, sampling, generator, stops)
        try:
            for step in steps:
                yield [
                    "" if i is None else decode(i) for decode, i in zip(decoders, step, strict=True)
                ]
        except RuntimeError as error:  # torch's, of a draw
            if "probability tensor" not in str(error):
                raise
            raise ValueError("this model's predictions are no finite numbers") from error
        yield [decode(None) for decode in decoders]  # what is left of a character cut short

    def write(self, prompt: str = "", **settings) -> list[str]:
        """The texts that `stream` writes, whole, each with its prompt: `num_samples` strings."""
        texts = [prompt] * settings.get("num_samples", 1)
        for pieces in self.stream(prompt, **settings):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def _encode(self, text: str, flag: str) -> list[int]:
        try:
            return self.tokenizer.encode(text).tolist()
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error

    def _line_start(self) -> list[int]:
        try:
            return self.tokenizer.encode("\n").tolist() or [0]
        except ValueError:
            return [0]
