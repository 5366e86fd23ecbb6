"""BERT, RoBERTa, DistilBERT and TinyLlama of the paper from ``transformers``' configurations, with random weights.

Every model takes token ids and an attention mask (int64 [batch, tokens], 0 where padded) and gives logits; batch and
length are free.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from examples.models import Builder
from examples.models.torchvision_import import import_torchvision

import_torchvision()
import transformers  # noqa: E402

_SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 64,
}
_SMALL_DISTIL = {
    "vocab_size": 160,
    "dim": 64,
    "n_layers": 1,
    "n_heads": 4,
    "hidden_dim": 160,
    "max_position_embeddings": 64,
}
_TINY_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_VOCABULARY = {"bert_base": 30522, "roberta_base": 50265, "distilbert": 30522, "tinyllama": 32000}


class Logits(nn.Module):
    """A transformers model with positional tensors in and its logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def _bert(small: bool) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**(_SMALL if small else {})))


def _roberta(small: bool) -> nn.Module:
    sizes: dict[str, int] = _SMALL if small else {"vocab_size": 50265, "max_position_embeddings": 514}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, type_vocab_size=1))


def _distilbert(small: bool) -> nn.Module:
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**(_SMALL_DISTIL if small else {})))


def llama_config(small: bool, **changes: Any) -> Any:
    """TinyLlama-1.1B's configuration, or a small one of the same kind; ``changes`` win over both."""
    sizes = {**_SMALL, "num_key_value_heads": 2} if small else _TINY_LLAMA
    return transformers.LlamaConfig(**{**sizes, "use_cache": False, **changes})


def _tinyllama(small: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config(small))


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """``model`` in eval mode, its linears keeping their input's variance: recipes start them nearer to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
    return model.eval()


def _builder(name: str, make: Callable[[bool], nn.Module]) -> Builder:
    def build(small: bool) -> nn.Module:
        torch.manual_seed(0)
        return settled(Logits(make(small)))

    def inputs(small: bool, batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        words = _SMALL["vocab_size"] if small else _VOCABULARY[name]
        generator = torch.Generator().manual_seed(seed)
        # 0 and 1 are padding in one model or another.
        ids = torch.randint(2, words, (batch, tokens), generator=generator)
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        # All sequences but the first are padded.
        for row in range(1, batch):
            mask[row, tokens - 3 * row :] = 0
        return ids, mask

    def shapes(small: bool) -> Any:
        batch, tokens = Dim("batch", max=64), Dim("tokens", max=_SMALL["max_position_embeddings"] - 2 if small else 512)
        return ({0: batch, 1: tokens},) * 2

    return Builder(
        name,
        build,
        lambda small: inputs(small, 2, 16 if small else 128, 1),
        lambda small: inputs(small, 3, 23 if small else 57, 2),
        shapes,
    )


MODELS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        _builder("bert_base", _bert),
        _builder("roberta_base", _roberta),
        _builder("distilbert", _distilbert),
        _builder("tinyllama", _tinyllama),
    )
}
