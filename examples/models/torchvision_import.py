"""torchvision built for CUDA torch imports beside CPU torch only where the operators its extension would define exist.

timm imports it, and transformers does where it is installed.
"""

from typing import Any

import torch

# The operators go when their Library object does.
_KEPT: list[Any] = []


def import_torchvision() -> None:
    """Import torchvision.models, with any build of torchvision."""
    try:
        import torchvision.models
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision.models  # noqa: F401
