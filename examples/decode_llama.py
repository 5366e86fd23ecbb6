"""Greedy decoding with a key-value cache on a lowered artifact: one graph is both the prefill and the decode step.

The caches are inputs and outputs: keys and values of each layer, [batch, key-value heads, length, width];
``position`` says where the new tokens go. Run from the repository's root: ``python -m examples.decode_llama``, with
``--full`` for TinyLlama-1.1B's sizes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import t3c_compile as t3c
from examples.models.language import llama_config, settled, transformers
from t3c_compile.backends.targets import get_target

Run = Callable[..., Sequence[Any]]


class GivenCache:
    """What a transformers model asks of its cache, over tensors given from outside: nothing is changed in place."""

    def __init__(self, tensors: Sequence[Tensor], places: Tensor) -> None:
        self.tensors = list(tensors)
        self.places = places

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all places so far, the new ones written at ``places``."""
        for i, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.tensors[i] = self.tensors[i].index_copy(2, self.places, new)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention with grouped heads left to the operator: no cache is repeated for the heads that share it."""
    y = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2), None


transformers.AttentionInterface.register("grouped", grouped_attention)


class Decoder(nn.Module):
    """Token ids [batch, tokens], position [1] and caches in; logits of the last token [batch, words] and caches out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        places = position + torch.arange(input_ids.shape[1])
        visible = torch.arange(caches[0].shape[2]) <= places[:, None]
        cache = GivenCache(caches, places)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=visible[None, None],
            position_ids=places[None],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        return logits[:, 0], *cache.tensors


def build(small: bool, **changes: Any) -> Decoder:
    """A seeded decoder in eval mode; ``changes`` are of the model's configuration."""
    torch.manual_seed(0)
    config = llama_config(small, attn_implementation="grouped", **changes)
    decoder = settled(Decoder(transformers.LlamaForCausalLM(config)))
    assert isinstance(decoder, Decoder)
    return decoder


def empty_caches(decoder: Decoder, batch: int, length: int) -> list[Tensor]:
    """Caches for ``length`` tokens."""
    config = decoder.model.config
    width = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, length, width)
    return [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]


def inputs(decoder: Decoder, ids: Tensor, length: int) -> tuple[Tensor, ...]:
    """What the first call takes for prompts ``ids`` [batch, tokens]."""
    return ids, torch.zeros(1, dtype=torch.int64), *empty_caches(decoder, len(ids), length)


def dynamic_shapes(decoder: Decoder, length: int) -> Any:
    """Batch and number of new tokens free; as many tokens as the cache holds."""
    batch, tokens = Dim("batch", min=1, max=64), Dim("tokens", min=1, max=length)
    caches = 2 * decoder.model.config.num_hidden_layers
    return {0: batch, 1: tokens}, {}, ({0: batch},) * caches


def generate(run: Run, first: Sequence[Any], count: int) -> np.ndarray[Any, Any]:
    """``count`` greedy tokens [batch, count] after the prompts in ``first``, which :func:`inputs` gives.

    ``run`` is a session's, or a torch module: whatever takes and gives the tensors of ``Decoder.forward``.
    """
    ids, position, *caches = first
    found = []
    for _ in range(count):
        logits, *caches = run(ids, position, *caches)
        position, ids = position + ids.shape[1], logits.argmax(-1)[:, None]
        found.append(np.asarray(ids))
    return np.concatenate(found, 1)


def main() -> None:
    """Lower a decoder of random weights, generate with every profile, and compare the greatest with torch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--full", action="store_true", help="TinyLlama-1.1B's widths instead of small ones")
    parser.add_argument("--layers", type=int, help="number of layers")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--output", default="build/decode_llama.t3c", help="the artifact")
    arguments = parser.parse_args()
    decoder = build(not arguments.full, **({"num_hidden_layers": arguments.layers} if arguments.layers else {}))
    length = arguments.tokens + 16
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, decoder.model.config.vocab_size, (4, 8), generator=generator)
    example = inputs(decoder, prompts[:2], length)
    elastic = t3c.transform(decoder, example, dynamic_shapes=dynamic_shapes(decoder, length), progress=True).eval()
    # A step multiplies one row: what it costs are the bytes of the weights, and int8 activations would save nothing.
    elastic.set_activation_dtype("float32")
    profiles = t3c.snap(elastic, [example], [get_target("x86_64")], count=3, full_model=True, progress=True)
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    t3c.lower(elastic, profiles, ["x86_64"], arguments.output, example, progress=True)
    first = inputs(decoder, prompts[2:3], length)
    with torch.no_grad():
        expected = generate(decoder, first, arguments.tokens)
    session = t3c.load(arguments.output)
    for profile in session.profiles:
        session.set_profile(profile.name)
        start = time.perf_counter()
        found = generate(session.run, [x.numpy() for x in first], arguments.tokens)
        spent = 1e3 * (time.perf_counter() - start) / arguments.tokens
        same = int((found == expected).cumprod().sum())
        print(f"{profile.name}: {profile.size_mb:.3g} MB, {spent:.3g} ms a token, {same} tokens as torch's in float32")


if __name__ == "__main__":
    main()
