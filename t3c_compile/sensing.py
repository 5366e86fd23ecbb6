"""Sensitivity: what every option of every layer does to the outputs when all other layers are full."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t3c_compile.backends.targets import Target, get_target
from t3c_compile.certificate import logits_of
from t3c_compile.chain import chains, dense_layers
from t3c_compile.passes.elastic import full_width_known
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import with_dense
from t3c_compile.progress import progress_bar
from t3c_compile.snapping import grid_of, quality
from t3c_compile.transforming import observe


@dataclass(frozen=True)
class Effect:
    """What one layer at one option does to the full model's outputs.

    Attributes:
        drift: mean 2-norm of the difference of a sample's logits.
        kl: mean KL(full || this) of a prediction, nats.
        agreement: share of predictions with the full model's class.
        accuracy: share of predictions that are right, and ``accuracy_change`` from the full model's; None without
            labels.
    """

    layer: str
    option: Option
    drift: float
    kl: float
    agreement: float
    accuracy: float | None
    accuracy_change: float | None


def sensitivity(
    model: ElasticGraphModule,
    samples: Sequence[tuple[Any, ...]],
    labels: Tensor | None = None,
    targets: Sequence[Target | str] = ("x86_64",),
    progress: bool = False,
) -> list[Effect]:
    """Run ``model`` with one layer at one option and all others full, for every layer and every option of its chain.

    The layer's weights are rounded and its activations int8, with the ranges they have on the samples, as in a profile
    of :func:`t3c_compile.snap`; the others compute in float32. Every option takes two runs over the samples. ``model``
    is not changed.

    Args:
        samples: input tuples, batches as for ``snap``.
        labels: class indices of all samples in order (of all tokens, for a language model), for accuracy.
        targets: whose ranks and widths the chains have.

    Returns:
        One effect an option, by layer in the model's order and from the least option to the greatest.

    Raises:
        T3CError: there are no samples, or the targets share no width.
        UnknownTargetError: there is no such target.
    """
    if not samples:
        raise T3CError("sensitivity needs samples: a few hundred of real data")
    grid = grid_of([get_target(target) if isinstance(target, str) else target for target in targets])
    ladder = chains(model, grid)
    # A copy of the gates and ranges; the parameters are shared.
    alone = with_dense(model, dense_layers(model, ladder)).eval()
    alone.set_full()
    full = logits_of(alone, samples)
    right = quality(full, full, labels).get("accuracy")
    effects = []
    with progress_bar(progress) as bar:
        for layer, option in bar.track(
            [(layer, option) for layer, chain in ladder.items() for option in chain], description="options"
        ):
            alone.set_full()
            alone.set_options({layer: option})
            observe(alone, samples)
            with full_width_known(alone):
                found = quality(full, logits_of(alone, samples), labels)
            accuracy = found.get("accuracy")
            change = None if accuracy is None or right is None else accuracy - right
            effects.append(Effect(layer, option, found["drift"], found["kl"], found["agreement"], accuracy, change))
    return effects
