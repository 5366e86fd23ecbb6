"""Convolution candidates become elastic convolutions: SVD for 1x1, Tucker-2 or CP for k x k, dense where grouped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor, nn
from torch.fx import GraphModule

from t3c_compile.passes.base import Pass
from t3c_compile.passes.elastic import CpConv2d, DenseConv2d, SvdConv2d, Tucker2Conv2d
from t3c_compile.passes.find_elastic_layers import Candidate
from t3c_compile.passes.low_rank import left_basis
from t3c_compile.passes.replace import candidates, kept_svd, replace_with_elastic
from t3c_compile.passes.resume import kept_factors

_CP_BLOCK = 8


@contextmanager
def _one_thread() -> Iterator[None]:
    """Alternating least squares is thousands of tiny products: handing them to threads makes it ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class DecomposeConv(Pass):
    """Replaces each conv2d candidate; every form is exact at its max rank.

    Tucker-2: Kim et al., https://arxiv.org/abs/1511.06530; CP: Lebedev et al., https://arxiv.org/abs/1412.6553.
    """

    name: ClassVar[str] = "decompose-conv"
    damping: float = 1e-2

    def apply(self, gm: GraphModule) -> bool:
        found = candidates(gm, "conv2d")
        for node, candidate in found:
            replace_with_elastic(gm, node, candidate, self._build)
        return bool(found)

    def _build(self, gm: GraphModule, candidate: Candidate, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if candidate.form == "dense":
            return DenseConv2d(weight, bias, candidate.conv, candidate.groups)
        if candidate.form == "svd":
            v, u = kept_svd(gm, candidate.layer, weight[:, :, 0, 0], self.damping)
            return SvdConv2d(v, u, bias, candidate.conv)
        if candidate.form == "cp":
            v, core, u = kept_factors(gm, candidate.layer, "cp", [weight], lambda: cp_factors(weight))
            return CpConv2d(v, core, u, bias, candidate.conv)
        v, core, u = kept_factors(gm, candidate.layer, "tucker2", [weight], lambda: tucker2_factors(weight))
        return Tucker2Conv2d(v, core, u, bias, candidate.conv)


def tucker2_factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``V`` [Ri, I], ``core`` [Ro, Ri, kh, kw], ``U`` [O, Ro] of a kernel [O, I, kh, kw], exact, sorted by energy.

    The bases are those of the higher-order SVD (Tucker-2 at full rank), so a prefix of both is the truncated HOSVD.
    """
    kernel = weight.detach()
    u, v = (left_basis(kernel.transpose(0, side).flatten(1)).to(kernel.dtype) for side in (0, 1))
    core = (u.T @ kernel.flatten(1)).reshape(-1, *kernel.shape[1:])
    return v.T, torch.einsum("rihw,is->rshw", core, v), u


def cp_factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``V`` [R, I], ``core`` [R, kh, kw], ``U`` [O, R] of a kernel [O, I, kh, kw], exact at R.

    The first components come from alternating least squares, up to the rank where CP stops paying and a few at a time
    on what the ones before left, so that every prefix of whole blocks is a better fit than the last. What they leave
    is written exactly, as the SVD of the rest at every kernel position.
    """
    out, inner, kh, kw = weight.shape
    kernel = weight.detach().to(torch.float64).reshape(out, inner, kh * kw)
    paying = max(1, kernel.numel() // (out + inner + kh * kw))
    rest, blocks = kernel, []
    with tensorly.backend_context("pytorch"), _one_thread():
        for _ in range(0, min(paying, out * inner), _CP_BLOCK):
            scale, (u, v, s) = parafac(
                rest, rank=_CP_BLOCK, n_iter_max=50, normalize_factors=True, init="random", random_state=0
            )
            order = torch.argsort(scale, descending=True)
            blocks.append(((u * scale)[:, order], v[:, order], s[:, order]))
            rest = rest - torch.einsum("or,ir,pr->oip", *blocks[-1])
    u, v, s = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
    tail_u, tail_s, tail_v = torch.linalg.svd(rest.permute(2, 0, 1), full_matrices=False)
    positions = torch.eye(kh * kw, dtype=torch.float64).repeat_interleave(tail_s.shape[1], dim=1)
    tail = (tail_u * tail_s[:, None, :]).permute(1, 0, 2).reshape(out, -1)
    tail_v = tail_v.reshape(-1, inner)
    order = torch.argsort(tail_s.reshape(-1), descending=True)
    u = torch.cat([u, tail[:, order]], dim=1)
    v = torch.cat([v.T, tail_v[order]])
    core = torch.cat([s, positions[:, order]], dim=1).T.reshape(-1, kh, kw)
    return v.to(weight.dtype), core.to(weight.dtype), u.to(weight.dtype)
