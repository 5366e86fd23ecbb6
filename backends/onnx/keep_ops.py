"""``t3c::`` ops through ``torch.onnx.export``: each stays one node, in a domain of its own, until it is expanded.

The exporter folds constants and would make float32 weights of any integer ones it sees being scaled; an op that it does
not know it leaves alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

DOMAIN = "t3c"

_ATTRIBUTES = {
    "float": OpSchema.AttrType.FLOAT,
    "int": OpSchema.AttrType.INT,
    "List[int]": OpSchema.AttrType.INTS,
}
_TYPES = ["tensor(float)", "tensor(int8)", "tensor(int64)", "tensor(int32)"]


def translations(ops: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """The ``custom_translation_table`` that keeps every one of ``ops`` (torch operators with one output)."""
    return {op: _translation(op) for op in ops}


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a torch schema is an input of the node; the others are attributes."""
    return "Tensor" in str(argument.type)


def _translation(op: Any) -> Callable[..., Any]:
    schema = op._schema
    node = Op(Opset(DOMAIN, 1), schema.name.partition("::")[2], _onnx_schema(schema))

    def keep(*args: Any, **kwargs: Any) -> Any:
        names = [argument.name for argument in schema.arguments]
        values = {argument.name: argument.default_value for argument in schema.arguments}
        values |= dict(zip(names, args, strict=False)) | kwargs
        inputs = [values.pop(argument.name) for argument in schema.arguments if is_tensor(argument)]
        return node(*inputs, **values)

    return keep


def _onnx_schema(schema: Any) -> OpSchema:
    inputs: list[Any] = []
    attributes: list[Any] = []
    for argument in schema.arguments:
        if is_tensor(argument):
            kind = OpSchema.FormalParameterOption.Optional
            inputs.append(OpSchema.FormalParameter(argument.name, f"T{len(inputs)}", param_option=kind))
        else:
            attributes.append(OpSchema.Attribute(argument.name, _ATTRIBUTES[str(argument.type)], required=True))
    constraints = [(parameter.type_str, _TYPES, "") for parameter in inputs]
    return OpSchema(
        schema.name.partition("::")[2],
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter("y", inputs[0].type_str)],
        type_constraints=constraints,
        attributes=attributes,
    )
