"""The default GPT as a model of transformers, which it does not know without this module.

    import gpt_lightning.export.transformers_model
    model = AutoModelForCausalLM.from_pretrained(folder)

`generate` works without a cache of keys and values: n-gram embeddings need earlier tokens, which
transformers does not pass on.

Legend: B batch, T time, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from gpt_lightning.model import GPT, build_model, config_from_dict
from gpt_lightning.model.gpt import rotary_table


class GPTLightningConfig(PreTrainedConfig):
    """Settings of the model as `config_to_dict` gives them, under `model`."""

    model_type = "gpt_lightning"
    model: dict[str, Any] | None = None


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
        **others: Any,
    ) -> CausalLMOutput:
        """Logits of the last `block_size` positions; with labels (B, T) the loss in nats per token.

        Raises:
            ValueError: if a text is padded.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("this model has no padding: give texts of one length, or one text")
        block_size = self.net.config.block_size
        logits = self.net(input_ids[:, -block_size:])
        loss = None
        if labels is not None:
            targets = labels[:, -block_size:][:, 1:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(GPTLightningConfig.model_type, GPTLightningConfig)
AutoModelForCausalLM.register(GPTLightningConfig, GPTLightningForCausalLM)
