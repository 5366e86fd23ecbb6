"""Whether data is such as a model was captured for: the number, dtypes and shapes of its inputs."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from t3c_compile.passes.errors import DataError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.infer_values import InputSpec


def require_fitting(model: ElasticGraphModule, inputs: tuple[Any, ...], what: str) -> None:
    """Raise :class:`DataError` where ``inputs``, called ``what``, are none of ``model``; nothing is run.

    A size that was free in the capture may be any above 0, the same wherever it stands.
    """
    specs = model.meta["t3c_inputs"]
    names = [node.name for node in model.eval_graph.nodes if node.op == "placeholder"]
    values = tree_leaves(inputs)
    if len(values) != len(specs):
        raise DataError(
            f"{what} has {len(values)} inputs (labels apart), the model takes {len(specs)}: {', '.join(names)}"
        )
    free: dict[str, int] = {}
    for value, spec, name in zip(values, specs, names, strict=True):
        if not isinstance(spec, InputSpec):
            continue  # a number or a flag, which the graph holds
        if not isinstance(value, Tensor):
            raise DataError(f"{what}: input {name!r} is a {type(value).__name__}, the model takes a tensor")
        if value.dtype != spec.dtype:
            wanted = str(spec.dtype).removeprefix("torch.")
            raise DataError(
                f"{what}: input {name!r} is {str(value.dtype).removeprefix('torch.')}, the model takes {wanted}: "
                f"convert it with .to(torch.{wanted}), or transform the model with inputs of that type"
            )
        same = value.dim() == len(spec.shape) and all(
            size > 0 and size == (want if isinstance(want, int) else free.setdefault(want[0], size))
            for size, want in zip(value.shape, spec.shape, strict=True)
        )
        if not same:
            wanted = ", ".join(str(want) if isinstance(want, int) else "any" for want in spec.shape)
            raise DataError(
                f"{what}: input {name!r} has shape {list(value.shape)}, the model takes [{wanted}]: give it such data, "
                "or transform the model with inputs of that shape"
            )
