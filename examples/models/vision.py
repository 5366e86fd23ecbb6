"""ResNet, ViT and Swin of the paper from torchvision, and timm's common families, with random weights."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from examples.models import Builder
from examples.models.torchvision_import import import_torchvision

import_torchvision()
import timm  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from timm.models._efficientnet_builder import decode_arch_def  # noqa: E402
from torchvision import models  # noqa: E402

_SMALL_CLASSES = 16


@torch.no_grad()
def settled(model: nn.Module, image: tuple[int, int, int]) -> nn.Module:
    """``model`` in eval mode, scaled so that every layer says something.

    Linear weights keep their input's variance (recipes start them nearer to zero, heads at zero), and batch norms get
    the statistics of a few random images, of the shape ``image``.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None  # a cumulative mean
        model.train()(torch.randn(4, *image))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def _image(small: bool, sizes: tuple[int, int]) -> int:
    return sizes[1] if small else sizes[0]


def _builder(name: str, make: Callable[[bool], nn.Module], sizes: tuple[int, int] = (224, 64)) -> Builder:
    """``sizes``: of the images, full and small."""

    def build(small: bool) -> nn.Module:
        torch.manual_seed(0)
        side = _image(small, sizes)
        return settled(make(small), (3, side, side))

    def images(count: int, seed: int, small: bool) -> tuple[Tensor]:
        side = _image(small, sizes)
        return (torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)),)

    return Builder(name, build, lambda small: images(1, 1, small), lambda small: images(3, 2, small))


def _resnet(layers: list[int], small: list[int]) -> Callable[[bool], nn.Module]:
    def make(is_small: bool) -> nn.Module:
        if is_small:
            return timm.models.resnet.ResNet(
                timm.models.resnet.Bottleneck,
                small,
                num_classes=_SMALL_CLASSES,
                channels=(16, 24, 32, 48),
                zero_init_last=False,
            )
        return models.ResNet(models.resnet.Bottleneck, layers)

    return make


def _vit(layers: int, width: int, heads: int, small_layers: int) -> Callable[[bool], nn.Module]:
    def make(small: bool) -> nn.Module:
        if small:
            return models.VisionTransformer(64, 16, small_layers, 2, 64, 160, num_classes=_SMALL_CLASSES)
        return models.VisionTransformer(224, 16, layers, heads, width, 4 * width)

    return make


def _swin_t(small: bool) -> nn.Module:
    if small:
        return models.SwinTransformer([4, 4], 48, [2, 1], [2, 4], [4, 4], num_classes=_SMALL_CLASSES)
    return models.SwinTransformer([4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.2)


def _timm(
    name: str, small_name: str = "", both: Mapping[str, Any] = MappingProxyType({}), **small: Any
) -> Callable[[bool], nn.Module]:
    """A timm model with ``both`` as arguments; its small variant is ``small_name`` (the same by default) with ``small``
    too."""

    def make(is_small: bool) -> nn.Module:
        if is_small:
            return timm.create_model(small_name or name, num_classes=_SMALL_CLASSES, **both, **small)
        return timm.create_model(name, **both)

    return make


def _mobilenetv3(small: bool) -> nn.Module:
    if not small:
        return timm.create_model("mobilenetv3_large_100")
    blocks = [["ds_r1_k3_s2_e1_c16_nre"], ["ir_r1_k5_s2_e3_c24_se0.25_nre"], ["ir_r1_k3_s2_e4_c32_se0.25"]]
    return timm.models.mobilenetv3.MobileNetV3(
        decode_arch_def([*blocks, ["cn_r1_k1_s1_c96"]]),
        num_classes=_SMALL_CLASSES,
        num_features=128,
        act_layer=nn.Hardswish,
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid"),
    )


MODELS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        _builder("resnet50", _resnet([3, 4, 6, 3], [1, 1, 1, 1])),
        _builder("resnet101", _resnet([3, 4, 23, 3], [1, 2, 1, 1])),
        _builder("vit_b_16", _vit(12, 768, 12, 1)),
        _builder("vit_l_16", _vit(24, 1024, 16, 2)),
        _builder("swin_t", _swin_t),
        _builder(
            "timm_resnet18",
            _timm("resnet18", both={"zero_init_last": False}, layers=(1, 1, 1, 1), channels=(16, 24, 32, 48)),
        ),
        _builder(
            "timm_vit_small",
            _timm("vit_small_patch16_224", img_size=64, embed_dim=64, depth=1, num_heads=2),
        ),
        _builder(
            "timm_swin_tiny",
            _timm(
                "swin_tiny_patch4_window7_224",
                img_size=64,
                window_size=4,
                embed_dim=48,
                depths=(2, 1),
                num_heads=(2, 4),
            ),
        ),
        _builder(
            "timm_convnext_tiny",
            _timm("convnext_tiny", both={"ls_init_value": 1.0}, depths=(1, 1, 1, 1), dims=(16, 32, 48, 64)),
        ),
        _builder("timm_mobilenetv3_large", _mobilenetv3),
        _builder("timm_efficientnet_b0", _timm("efficientnet_b0", "test_efficientnet")),
    )
}
