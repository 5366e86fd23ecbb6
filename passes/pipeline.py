"""A pipeline is data: an ordered list of passes that prints as text and parses back."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from t3c_compile.passes.base import Pass
from t3c_compile.passes.decompose_conv import DecomposeConv
from t3c_compile.passes.decompose_linear import DecomposeLinear
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.express_in_aten import ExpressInAten
from t3c_compile.passes.find_elastic_layers import FindElasticLayers
from t3c_compile.passes.fold_batch_norm import FoldBatchNorm
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.insert_hooks import InsertHooks
from t3c_compile.passes.insert_quantizers import InsertQuantizers
from t3c_compile.passes.normalize_conv import NormalizeConv
from t3c_compile.passes.normalize_linear import NormalizeLinear
from t3c_compile.passes.replace_table import ReplaceTable

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        NormalizeLinear,
        NormalizeConv,
        FindElasticLayers,
        DecomposeLinear,
        DecomposeConv,
        ReplaceTable,
        InsertQuantizers,
        InsertHooks,
        FoldBatchNorm,
        ExpressInAten,
    )
}

Observer = Callable[[Pass], None]


class PipelineSyntaxError(T3CError):
    """The text is not a pipeline."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; ``str()`` of it is parsed back by :meth:`parse`.

    The text form is ``name{option=value,...}`` joined by ``;``, defaults left out.
    """

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return "; ".join(_print(p) for p in self.passes)

    @staticmethod
    def parse(text: str) -> "Pipeline":
        """Raises :class:`PipelineSyntaxError` naming the part that is wrong and what is known."""
        return Pipeline(tuple(_parse(part) for part in text.split(";") if part.strip()))

    def run(self, gm: GraphModule, before: Observer | None = None) -> PassResult:
        """Run the passes over ``gm`` (both graphs when it is elastic); ``before`` is called ahead of each."""
        modified = False
        for p in self.passes:
            if before is not None:
                before(p)
            if isinstance(gm, ElasticGraphModule):
                gm.run_pass(p)
                modified = True
            else:
                modified |= p(gm).modified
        return PassResult(gm, modified)

    def until(self, name: str) -> "Pipeline":
        """The passes up to and with ``name``."""
        index = [p.name for p in self.passes].index(name)
        return Pipeline(self.passes[: index + 1])

    def after(self, name: str) -> "Pipeline":
        """The passes that follow ``name``."""
        index = [p.name for p in self.passes].index(name)
        return Pipeline(self.passes[index + 1 :])


def default_pipeline(find: FindElasticLayers | None = None) -> Pipeline:
    """What ``transform`` runs after capture, in order; ``find`` carries the user's choices."""
    return Pipeline(
        (
            NormalizeLinear(),
            NormalizeConv(),
            find or FindElasticLayers(),
            DecomposeLinear(),
            DecomposeConv(),
            ReplaceTable(),
            InsertQuantizers(),
            InsertHooks(),
        )
    )


def _print(p: Pass) -> str:
    options = [f"{f.name}={getattr(p, f.name)}" for f in fields(p) if getattr(p, f.name) != f.default]
    return f"{p.name}{{{','.join(options)}}}" if options else p.name


def _parse(part: str) -> Pass:
    match = re.fullmatch(r"\s*([a-z0-9-]+)\s*(?:\{(.*)\})?\s*", part)
    if not match:
        raise PipelineSyntaxError(f"{part.strip()!r} is not a pass: write name or name{{option=value,...}}")
    name, text = match.groups()
    if name not in PASSES:
        raise PipelineSyntaxError(f"there is no pass {name!r}; known: {', '.join(PASSES)}")
    cls = PASSES[name]
    types: dict[str, Callable[[str], str | int | float]] = {f.name: type(f.default) for f in fields(cls)}  # type: ignore[misc]
    types |= {name: boolean for name, found in types.items() if found is bool}
    options: dict[str, str | int | float] = {}
    for item in filter(None, (text or "").split(",")):
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or key not in types:
            raise PipelineSyntaxError(f"{name} has no option {key!r}; known: {', '.join(types) or 'none'}")
        try:
            options[key] = types[key](value.strip())
        except ValueError as error:
            raise PipelineSyntaxError(
                f"{name}: {key}={value.strip()!r} is not a {getattr(types[key], '__name__', '')}"
            ) from error
    return cls(**options)


def boolean(text: str) -> bool:
    """``True`` or ``False``, which ``bool`` does not read."""
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"
