"""A small Llama that predicts the next byte of Python's library, from float32 training to a trained elastic model.

    python -m examples.llama.run       (about five minutes on one core)

What is compressed, certified and deployed gives the logits of the last token alone: those are what the next byte is
drawn from. Training uses the logits of all tokens.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from examples.llama.source import WINDOW, WORDS, Windows, text, windows
from examples.models.language import transformers
from t3c_compile.backends.targets import get_target
from t3c_compile.chain import Grid, chains
from t3c_compile.checkpoint import Checkpoint, restore
from t3c_compile.controller import Controller
from t3c_compile.groups import layer_groups
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.snapping import snap
from t3c_compile.training import LossWeights, train
from t3c_compile.transforming import Config, transform

GRID = Grid(16, (4, 6, 8))
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": WINDOW,
}
"""Half a million parameters."""
_STEPS, _BATCH, _LR = 500, 32, 4e-3
_ELASTIC_STEPS, _ELASTIC_LR = 150, 3e-4


class Llama(nn.Module):
    """Bytes int64 [batch, WINDOW] to logits: of all tokens, [batch, WINDOW, WORDS], or of the ``last`` one, [batch,
    WORDS]."""

    def __init__(self, model: nn.Module, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, logits_to_keep=1 if self.last else 0).logits
        return logits[:, 0] if self.last else logits


def train_float(seed: int = 0, progress: bool = True) -> nn.Module:
    """The float32 model of transformers, in eval mode; torch's global generator is seeded."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, use_cache=False))
    network, part = Llama(model, last=False), text("train")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS, pct_start=0.1)
    with Progress(disable=not progress, transient=True) as bar:
        for ids, following in bar.track(Windows(part, _STEPS, _BATCH), total=_STEPS, description="float training"):
            optimizer.zero_grad()
            F.cross_entropy(network(ids).flatten(0, 1), following.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Prepared:
    """The trained elastic model with logits of the last token, in eval mode, and windows that nothing was trained on.

    ``calibration`` holds input tuples and ``labels`` the byte after each of their windows; ``test`` both in one.
    """

    float_model: nn.Module
    elastic: ElasticGraphModule
    controller: Controller
    calibration: list[tuple[Tensor]]
    labels: Tensor
    test: tuple[Tensor, Tensor]
    seconds: float


def prepare(seed: int = 0, progress: bool = True) -> Prepared:
    """Train in float32, transform with calibration, train the elastic model, and put it onto the last token."""
    began, threads = time.monotonic(), torch.get_num_threads()
    # On one thread the result is the same whatever the machine's cores.
    torch.set_num_threads(1)
    try:
        model = train_float(seed, progress)
        ids, following = windows(text("calibration"), 240, seed=1)
        calibration = [(batch,) for batch in ids.split(60)]
        config = Config(rank_multiple=GRID.rank_multiple)
        every = transform(Llama(model, last=False), calibration[0], config, calibration=calibration, progress=progress)
        controller = Controller(chains(every, GRID), layer_groups(every))
        train(
            every,
            Windows(text("train"), _ELASTIC_STEPS, _BATCH // 2),
            epochs=1,
            controller=controller,
            weights=LossWeights(distillation=2.0, temperature=1.0),
            lr=_ELASTIC_LR,
            progress=progress,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "every.safetensors"
            Checkpoint(every, calibration[0], controller).save(path)
            elastic = restore(Llama(model, last=True), calibration[0], path).model.eval()
    finally:
        torch.set_num_threads(threads)
    test, after = windows(text("test"), 540, seed=2)
    seconds = time.monotonic() - began
    return Prepared(model, elastic, controller, calibration, following[:, -1], (test, after[:, -1]), seconds)


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """The share of windows whose next byte is the likeliest one."""
    return float((model(part[0]).argmax(1) == part[1]).float().mean())


def main() -> None:
    prepared = prepare()
    right = accuracy(Llama(prepared.float_model, last=True), prepared.test)
    print(f"{prepared.seconds:.0f} s; float32 predicts {right:.1%} of {len(prepared.test[1])} bytes")
    targets = [get_target("x86_64")]
    for profile in snap(prepared.elastic, prepared.calibration, targets, prepared.labels, prepared.controller).profiles:
        quality = profile.quality
        print(f"  {profile.name} {profile.size_bytes / 1e3:6.0f} kB {quality['accuracy']:.1%}, KL {quality['kl']:.2g}")


if __name__ == "__main__":
    main()
