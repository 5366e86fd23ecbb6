"""The methods T3C is compared with, one file a family; each starts from the same float32 model."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.paper.baselines import low_rank, pruned, quantized, sparse_gpt
from benchmarks.paper.deploy import Compressed
from benchmarks.paper.training import Start


@dataclass(frozen=True)
class Baseline:
    """``label`` is the paper's name; ``what`` says in the table what was done and how it is deployed."""

    label: str
    compress: Callable[[Start], Compressed]
    what: str


BASELINES = {
    "fp32": Baseline("float32", quantized.float32, "not compressed; float32 kernels"),
    "ptq8": Baseline("PTQ-8b", quantized.ptq(8), "rounded after training; dense int8"),
    "ptq4": Baseline("PTQ-4b", quantized.ptq(4), "rounded after training; dense, weights of 4 bits"),
    "qat8": Baseline("QAT-8b", quantized.qat8, "trained through the rounding; dense int8"),
    "mp_qat": Baseline(
        "MP-QAT",
        quantized.mixed_precision,
        "4 or 8 bits a layer by sensitivity, at most 5 in the mean, then QAT; dense",
    ),
    "kd_ptq": Baseline(
        "KD-PTQ", quantized.distilled, "4 bits, fitted to the float32 model's outputs, no labels; dense"
    ),
    "magprune": Baseline(
        "MagPrune", pruned.magnitude, "80% of all layers gone, the smallest weights; int8, stored sparse, run dense"
    ),
    "moveprune": Baseline(
        "MovePrune", pruned.movement, "80% of each layer gone, by movement; int8, stored sparse, run dense"
    ),
    "sparsegpt": Baseline(
        "SparseGPT", sparse_gpt.compress, "half the weights gone in one shot, the rest corrected; int8, run dense"
    ),
    "lr_ft": Baseline(
        "LR+FT", low_rank.fine_tuned, "SVD / Tucker-2 of a quarter of the multiply-adds, fine-tuned; int8 chains"
    ),
    "lora_comp": Baseline(
        "LoRA-Comp", low_rank.adapted, "4 bits, frozen, beside trained adapters of rank 8 at 8 bits; dense"
    ),
}
