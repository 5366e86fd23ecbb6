"""The shape of a pass.

A pass is a frozen dataclass with a ``name``; its fields are its options. Calling it on a ``torch.fx.GraphModule``
checks what it requires, rewrites the graph in place and checks what it ensures, so it can stand in a ``torch.fx``
PassManager.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from t3c_compile.passes.elastic import ElasticLayer
from t3c_compile.passes.errors import PassConditionError


@dataclass
class LayerRecord:
    """One line of the transform report: a layer made elastic, or one kept with the reason."""

    layer: str
    op: str
    form: str = ""
    shape: tuple[int, ...] = ()
    max_rank: int = 0
    reason: str = ""


@dataclass
class Report:
    """What the passes did, by layer name. ``kept`` layers stay as they were, each with its reason."""

    elastic: dict[str, LayerRecord] = field(default_factory=dict)
    kept: dict[str, LayerRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.elastic)} elastic layers, {len(self.kept)} kept"]
        for record in self.elastic.values():
            shape = "x".join(map(str, record.shape))
            rank = f", max rank {record.max_rank}" if record.max_rank else ""
            reason = f" ({record.reason})" if record.reason else ""
            lines.append(f"  elastic {record.layer}: {record.op} {shape} as {record.form}{rank}{reason}")
        lines += [f"  kept    {r.layer}: {r.op}: {r.reason}" for r in self.kept.values()]
        lines += [f"  note    {note}" for note in self.notes]
        return "\n".join(lines)


def report_of(gm: GraphModule) -> Report:
    """The report that travels with a graph, made on first use."""
    report: Report = gm.meta.setdefault("t3c_report", Report())
    return report


@dataclass(frozen=True)
class Pass:
    """Base of every pass; see the module's docstring."""

    name: ClassVar[str]

    def requires(self, gm: GraphModule) -> None:
        """Raise :class:`PassConditionError` when ``gm`` is not ready for this pass."""

    def apply(self, gm: GraphModule) -> bool:
        """Rewrite ``gm`` in place; True when something changed."""
        raise NotImplementedError

    def ensures(self, gm: GraphModule) -> None:
        """Raise :class:`PassConditionError` when the pass did not deliver what it promises."""

    def __call__(self, gm: GraphModule) -> PassResult:
        self.requires(gm)
        modified = self.apply(gm)
        if modified:
            gm.graph.lint()
            gm.recompile()
        self.ensures(gm)
        return PassResult(gm, modified)

    def fail(self, message: str) -> PassConditionError:
        return PassConditionError(f"{self.name}: {message}")


def elastic_calls(gm: GraphModule) -> Iterator[tuple[Node, ElasticLayer]]:
    """The call nodes of elastic layers, in graph order."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, ElasticLayer):
                yield node, module


def get_attr(gm: nn.Module, target: str) -> Any:
    """The parameter, buffer or module at a qualified name; None where there is none."""
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def add_call(like: Node, target: Any, *args: Any) -> Node:
    """A call placed where the graph inserts, with the example value it gives and the place in the model of ``like``."""
    node = like.graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key in ("nn_module_stack", "stack_trace")}
    sources = node.all_input_nodes
    if all("val" in source.meta for source in sources):
        node.meta["val"] = target(*map_arg(args, lambda source: source.meta["val"]))
    return node


def bound(node: Node) -> dict[str, Any]:
    """A node's arguments by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def erase_dead_attrs(gm: GraphModule) -> None:
    """Drop ``get_attr`` nodes nobody reads; dead-code elimination lints before it deletes, so they must go first."""
    for node in reversed(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
