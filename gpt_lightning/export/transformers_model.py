"""The default GPT as a model of transformers, which it does not know without this module.

    import gpt_lightning.export.transformers_model
    model = AutoModelForCausalLM.from_pretrained(folder)

`generate` uses transformers' cache of keys and values up to block_size tokens. Beyond that, the
window moves by a token each step, so all its tokens get new positions and are computed again.

Legend: B batch, T time, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from gpt_lightning.export.past_key_values import PastKeyValues
from gpt_lightning.model import GPT, build_model, config_from_dict
from gpt_lightning.model.gpt import rotary_table


class GPTLightningConfig(PreTrainedConfig):
    """Settings of the model as `config_to_dict` gives them, under `model`."""

    model_type = "gpt_lightning"
    model: dict[str, Any] | None = None

    @property
    def num_hidden_layers(self) -> int:
        return (self.model or {}).get("n_layer", 0)

    @property
    def vocab_size(self) -> int:
        return (self.model or {}).get("vocab_size", 0)


class GPTLightningForCausalLM(PreTrainedModel, GenerationMixin):
    """Any model of this package: token ids (B, T) -> logits (B, T, V)."""

    config_class = GPTLightningConfig

    def __init__(self, config: GPTLightningConfig):
        super().__init__(config)
        self.net: Any = build_model(config_from_dict(config.model or {}))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers builds models without memory; this buffer is not in the file
        if isinstance(module, GPT):
            module.get_buffer("rotary").copy_(rotary_table(module.config))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits of the last `block_size` positions; with labels (B, T) the loss in nats per token.

        Args:
            cache: of the first tokens of `input_ids`, which are not computed again; the others are
                added to it. Only for up to `block_size` tokens without labels.

        Raises:
            ValueError: if a text is padded, or for a cache of another kind.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("this model has no padding: give texts of one length, or one text")
        if not isinstance(cache, DynamicCache | None):
            raise ValueError(f"{type(cache).__name__}: this model works with a DynamicCache only")
        block_size = self.net.config.block_size
        past = None
        if cache is not None and labels is None and input_ids.shape[1] <= block_size:
            past = PastKeyValues(
                cache.get_seq_length(), lambda layer, k, v: cache.update(k, v, layer)
            )
        logits = self.net(input_ids[:, -block_size:], past)
        loss = None
        if labels is not None:
            targets = labels[:, -block_size:][:, 1:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of `forward`, with all tokens: n-grams need those that the cache has."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the latter before 5.24
        return {"input_ids": input_ids, "attention_mask": attention_mask, "cache": cache}


AutoConfig.register(GPTLightningConfig.model_type, GPTLightningConfig)
AutoModelForCausalLM.register(GPTLightningConfig, GPTLightningForCausalLM)
