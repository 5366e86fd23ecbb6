"""``t3c::npu``: the call of a partition in a host's graph."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from t3c_compile.backends.ethosu import reference
from t3c_compile.backends.ethosu.program import Program

# The partitions of this process, by the hash of their flatbuffer.
_PROGRAMS: dict[str, Program] = {}


def register_program(name: str, program: Program) -> None:
    """Let ``t3c::npu`` find ``program``."""
    _PROGRAMS[name] = program


@dataclass(frozen=True)
class Signature:
    """What a call gives: JSON of [shape, dtype] of each output, for tracers."""

    text: str

    @staticmethod
    def of(program: Program) -> "Signature":
        return Signature(json.dumps([[list(tensor.shape), tensor.dtype] for tensor in program.outputs]))

    def empty(self, like: Tensor) -> list[Tensor]:
        return [like.new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in json.loads(self.text)]


@torch.library.custom_op("t3c::npu", mutates_args=())
def npu(inputs: list[Tensor], name: str, signature: str) -> list[Tensor]:
    """Run the partition ``name`` on int8 tensors in the NPU's layout; its outputs, int8, int16 or int32.

    The reference in torch is the meaning: exact integers (``reference.py``).
    """
    return reference.run(_PROGRAMS[name], inputs)


@npu.register_fake
def _(inputs: list[Tensor], name: str, signature: str) -> list[Tensor]:
    return Signature(signature).empty(inputs[0])
