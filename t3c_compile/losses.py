"""The five terms of T3C's training objective (arXiv 2601.01299), for the trainer here or for a loop of your own.

``L = task + l_SD KL(full || elastic) + l_AUG KL(elastic || elastic on augmented input) + l_CERT max(0, D - eps)
+ l_BUD budget``. Logits are float32 [..., classes]; every term is a 0-d tensor, a mean over all leading dimensions.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3c_compile.backends.targets import Target
from t3c_compile.cost import kept_bytes, option_costs
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import DataError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option

_NO_LABEL = -100  # torch's cross entropy leaves it out


def task_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of ``logits`` [..., C] and int64 ``labels`` [...]; a label of -100 does not count.

    Raises:
        DataError: labels of another number or type, or of classes that there are not.
    """
    classes = logits.shape[-1]
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = str(labels.dtype).removeprefix("torch.") if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"labels are {found}, not int64 numbers of classes: convert them with .to(torch.int64)")
    if labels.numel() * classes != logits.numel():
        raise DataError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: give one for each "
            "prediction (each token, of a language model)"
        )
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != _NO_LABEL)]
    if len(wrong):
        raise DataError(f"label {int(wrong[0])} is no class: the model's logits have {classes}, numbered from 0")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def self_distillation(full_logits: Tensor, elastic_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(full / T) || softmax(elastic / T))``; no gradient flows into ``full_logits``, the teacher.

    T^2 keeps the gradient's size at any temperature (Hinton et al., https://arxiv.org/abs/1503.02531).
    """
    return temperature**2 * _kl(full_logits.detach() / temperature, elastic_logits / temperature)


def consistency(logits: Tensor, augmented_logits: Tensor) -> Tensor:
    """``KL(softmax(logits) || softmax(augmented))`` of one profile on an input and on its augmented copy.

    No gradient flows into ``logits``: the clean view leads (https://arxiv.org/abs/1904.12848).
    """
    return _kl(logits.detach(), augmented_logits)


def certificate_penalty(drift: Tensor, epsilon: float) -> Tensor:
    """``max(0, D - epsilon)`` of the spectral drift bound ``drift`` (0-d, in logits)."""
    return torch.relu(drift - epsilon)


def budget_penalty(cost: Tensor, budget: Tensor) -> Tensor:
    """Sum over resources of the relative excess ``max(0, cost / budget - 1)``.

    ``cost`` and ``budget`` are [resources] in the same units, ``budget`` positive; zero when every resource fits.
    """
    return torch.relu(cost / budget - 1).sum()


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over leading dimensions of ``KL(softmax(teacher) || softmax(student))``."""
    divergence = F.kl_div(
        F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True
    ).sum(-1)
    return divergence.mean()


class LevelsCost:
    """Roofline cost of a model at given levels of its layers' chains, differentiable in them.

    Args:
        elastic: the model.
        chains: every layer's options; the greatest ones cost 1 of every resource.
        target: whose roofline it is.
    """

    def __init__(self, elastic: ElasticGraphModule, chains: Mapping[str, tuple[Option, ...]], target: Target) -> None:
        layers = dict(elastic_layers(elastic))
        costs = [
            torch.tensor(
                [[one.latency_ms, one.energy_mj, one.size_bytes] for one in option_costs(layers[name], chain, target)]
            )
            for name, chain in chains.items()
        ]
        kept = torch.tensor([0.0, 0.0, float(kept_bytes(elastic))])
        unit = kept + torch.stack([of_layer[-1] for of_layer in costs]).sum(0)
        self._kept, self._costs = kept / unit, nn.utils.rnn.pad_sequence(costs, batch_first=True) / unit
        self.least = self._kept + self._costs[:, 0].sum(0)
        """Fractions at every layer's least option: no budget below this can be met."""

    def __call__(self, levels: Tensor) -> Tensor:
        """Latency, energy and size, float32 [3], as fractions of the greatest options' cost, at ``levels`` [layers,
        longest chain], which sum to 1 for each layer, as ``Controller.sample`` gives them."""
        cost: Tensor = self._kept + (levels[..., None] * self._costs).sum((0, 1))
        return cost
