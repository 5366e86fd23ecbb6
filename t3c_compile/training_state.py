"""The optimizer of a training run, and the checkpoint it is gone on from."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from t3c_compile import processes
from t3c_compile.controller import Controller
from t3c_compile.passes.digest import digest
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule

_WARMUP = 0.05
_CLIP = 1.0
_VERSION = 3
# The controller is a few hundred numbers with no scale of its own: it moves faster than the factors.
_CONTROLLER_LR = 1e-2
# In a sharded checkpoint, which is a folder: what is not sharded.
_REST = "rest.pt"


class TrainError(T3CError):
    """Training cannot start or go on; the message says why and what to do."""


class TrainingState:
    """Optimizer, schedule and checkpoint of one run; ``proxy`` is saved along where it has a state of its own."""

    def __init__(
        self, elastic: ElasticGraphModule, controller: Controller, proxy: object | None, lr: float, total: int
    ) -> None:
        self.total = total
        self.proxy = proxy if isinstance(proxy, Stateful) else None
        self.model = nn.ModuleDict({"elastic": elastic, "controller": controller})
        self.sharded = processes.is_sharded(elastic)
        # No weight decay: it would pull on the two factors of a product, and on the controller's raw weights.
        groups = [
            {"params": list(elastic.parameters()), "peak": lr},
            {"params": list(controller.parameters()), "peak": _CONTROLLER_LR},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
        # AdamW's own beginning, now: a checkpoint holds it for what no step has reached yet, too.
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, loss: Tensor, index: int) -> bool:
        """Backward and update; False, and no update, where the loss or the gradient is not finite in any process."""
        factor = min(1.0, (index + 1) / (_WARMUP * self.total)) * 0.5 * (1 + math.cos(math.pi * index / self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        processes.mean_gradients(self.model["controller"].parameters())
        norm = self._clip()
        if not bool(torch.isfinite(processes.mean(loss.detach().clone()) + norm)):
            return False
        self.optimizer.step()
        return True

    def _clip(self) -> Tensor:
        """Scale the gradient to norm ``_CLIP`` where it is longer; its norm before."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
        norms = [processes.gathered(nn.utils.get_total_norm(group)) for group in gradients]
        norm: Tensor = torch.stack(norms).norm()
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, _CLIP, norm)
        return norm

    def save(self, path: Path, setup: dict[str, Any], history: list[dict[str, float]]) -> None:
        """Write the checkpoint whole or not at all: a file, or for a sharded model a folder that all processes write.

        The folder is one of ``torch.distributed.checkpoint``: another number of processes may go on from it.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        rest = {"version": _VERSION, "setup": setup, "history": history}
        rest["proxy"] = None if self.proxy is None else self.proxy.state_dict()
        # All processes write into the one folder.
        temporary = path.with_name(f"{path.name}.tmp" if self.sharded else f"{path.name}.{os.getpid()}.tmp")
        if processes.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
        if self.sharded:
            dist.barrier()
            state_dict_saver.save(state, checkpoint_id=temporary)
            state = {}
        if not processes.is_first():
            return
        try:
            state |= rest
            torch.save(state | {"sha256": digest(state)}, temporary / _REST if self.sharded else temporary)
            old = path.with_name(f"{path.name}.old")
            if path.is_dir():
                path.rename(old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            temporary.unlink(missing_ok=True) if temporary.is_file() else shutil.rmtree(temporary, ignore_errors=True)

    def load(self, path: Path, setup: dict[str, Any]) -> list[dict[str, float]]:
        """The history of the epochs done.

        Raises:
            TrainError: the checkpoint is damaged, of another run, another model, or sharded where the model is not.
        """
        way_out = "delete it to start over, or name another file"
        if path.is_dir() != self.sharded:
            raise TrainError(f"checkpoint {path} is of {'an un' if self.sharded else 'a '}sharded run: {way_out}")
        try:
            state = torch.load(path / _REST if self.sharded else path, weights_only=True)
        except Exception as error:
            raise TrainError(f"checkpoint {path} cannot be read ({error}): {way_out}") from error
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            raise TrainError(f"checkpoint {path} is not one of this version's: {way_out}")
        if state.pop("sha256", None) != digest(state):
            raise TrainError(f"checkpoint {path} is damaged: its SHA-256 is not the one it holds; {way_out}")
        changed = [key for key, value in setup.items() if state["setup"].get(key) != value]
        if changed:
            raise TrainError(f"checkpoint {path} is of a run with other {', '.join(changed)}: {way_out}")
        if (self.proxy is None) != (state["proxy"] is None):
            raise TrainError(f"checkpoint {path} is of a run {'with' if self.proxy is None else 'without'} a proxy")
        try:
            if self.sharded:
                model, optimizer = get_state_dict(self.model, self.optimizer)
                state |= {"model": model, "optimizer": optimizer}
                state_dict_loader.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        except (RuntimeError, KeyError) as error:
            raise TrainError(f"checkpoint {path} is of another model: {way_out}") from error
        if self.proxy is not None:
            self.proxy.load_state_dict(state["proxy"])
        return list(state["history"])
