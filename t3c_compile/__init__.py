"""T3C: one PyTorch checkpoint, many budgets.

``transform`` makes a model elastic, ``snap`` its profiles, ``lower`` an artifact; ``load`` runs one. Importing this
package, and loading an artifact, imports neither torch nor the compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t3c_compile.artifact import lower
    from t3c_compile.benching import bench
    from t3c_compile.budget import Budget, BudgetError
    from t3c_compile.certifying import certify
    from t3c_compile.checkpoint import Checkpoint, CheckpointError, restore
    from t3c_compile.conformal import CertificateError
    from t3c_compile.manifest import ArtifactError
    from t3c_compile.passes.errors import T3CError
    from t3c_compile.passes.state import load_state
    from t3c_compile.runtime import InputError, Session, load
    from t3c_compile.sensing import sensitivity
    from t3c_compile.signing import SignatureError, sign
    from t3c_compile.snapping import snap
    from t3c_compile.training import train
    from t3c_compile.transforming import Config, transform
    from t3c_compile.tuning import tune

_HOME = {
    "ArtifactError": "manifest",
    "Budget": "budget",
    "BudgetError": "budget",
    "CertificateError": "conformal",
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "Config": "transforming",
    "InputError": "runtime",
    "Session": "runtime",
    "SignatureError": "signing",
    "T3CError": "passes.errors",
    "bench": "benching",
    "certify": "certifying",
    "load": "runtime",
    "load_state": "passes.state",
    "lower": "artifact",
    "restore": "checkpoint",
    "sensitivity": "sensing",
    "sign": "signing",
    "snap": "snapping",
    "train": "training",
    "transform": "transforming",
    "tune": "tuning",
}

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "CertificateError",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "InputError",
    "Session",
    "SignatureError",
    "T3CError",
    "bench",
    "certify",
    "load",
    "load_state",
    "lower",
    "restore",
    "sensitivity",
    "sign",
    "snap",
    "train",
    "transform",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"t3c_compile.{_HOME[name]}"), name)
    raise AttributeError(f"module 't3c_compile' has no attribute {name!r}")
