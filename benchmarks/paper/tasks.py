"""The tasks of the paper's tables that the data at hand allows, and loaders for the data that has to be brought along.

Every model takes one tensor; labels are classes [N], or the next tokens [N, T] of a language model.
"""

import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.paper import files

ROOT = Path(__file__).resolve().parents[2]
BYTES, WORDS = 128, 64
"""Tokens of one text: bytes of a language model, words of a classifier."""
_PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")


@dataclass(frozen=True)
class Task:
    """One data set with one model.

    Attributes:
        metric: ``accuracy`` in percent, or ``perplexity``.
        build: a fresh float32 model, from torch's global generator.
        train, calibration, test: of pairs (input, label). Nothing is fitted to ``test``.
        epochs: passes over ``train`` of everything that is fine-tuned, T3C included.
        float_epochs: those of the float32 model before.
        augment: of training inputs, by batch.
    """

    name: str
    metric: str
    build: Callable[[], nn.Module]
    train: Dataset[Any]
    calibration: Dataset[Any]
    test: Dataset[Any]
    batch: int
    float_epochs: int
    epochs: int
    float_lr: float
    lr: float
    label_smoothing: float = 0.0
    augment: Callable[[Tensor], Tensor] | None = None

    def batches(self) -> "Batches":
        """Training batches, shuffled anew at every pass."""
        return Batches(self.train, self.batch, self.augment)

    def calibration_inputs(self) -> list[tuple[Tensor]]:
        return [(x,) for x, _ in DataLoader(self.calibration, 60)]

    def labels(self, part: Dataset[Any]) -> Tensor:
        return torch.cat([y for _, y in DataLoader(part, 256)])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of logits [..., C], smoothed as the float32 model's training is."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=self.label_smoothing)

    def score(self, logits: Tensor, labels: Tensor) -> float:
        """The metric of logits [..., C]."""
        logits, labels = logits.flatten(0, -2), labels.flatten()
        if self.metric == "perplexity":
            return math.exp(float(F.cross_entropy(logits, labels)))
        return 100 * float((logits.argmax(-1) == labels).float().mean())


@dataclass(frozen=True)
class Batches:
    """Shuffled batches of a data set from torch's global generator; what is left at the end is dropped."""

    part: Dataset[Any]
    size: int
    augment: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.part) // self.size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in DataLoader(self.part, self.size, shuffle=True, drop_last=True):
            yield (self.augment(x) if self.augment else x), y


class Logits(nn.Module):
    """A transformers model: token ids [N, T] to its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits


def _digits(model: str) -> Task:
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    import data
    import models

    digits = data.load()
    parts = [TensorDataset(*part) for part in (digits.train, digits.calibration, digits.test)]
    float_lr, lr = {"cnn": (3e-3, 5e-4), "vit": (1e-3, 1e-4)}[model]
    epochs = {"cnn": 10, "vit": 5}[model]
    return Task(
        f"digits_{model}", "accuracy", models.MODELS[model], *parts, 32, 40, epochs, float_lr, lr, 0.1, data.augment
    )


def _transformers() -> Any:
    sys.path.insert(0, str(ROOT))
    from examples.models.torchvision_import import import_torchvision

    import_torchvision()
    import transformers

    return transformers


def bert(classes: int) -> nn.Module:
    """Two layers of BERT, 128 wide, over hashed words."""
    transformers = _transformers()
    config = transformers.BertConfig(
        vocab_size=files.VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=WORDS,
        type_vocab_size=1,
        num_labels=classes,
        pad_token_id=None,
    )
    return Logits(transformers.BertForSequenceClassification(config))


def llama() -> nn.Module:
    """Two layers of Llama, 128 wide, over bytes."""
    _transformers()
    from transformers import LlamaForCausalLM

    from examples.models.language import llama_config

    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 352, "max_position_embeddings": BYTES}
    return Logits(LlamaForCausalLM(llama_config(True, **sizes)))


def _classification(name: str, parts: tuple[files.Part, files.Part, files.Part], classes: int) -> Task:
    return Task(name, "accuracy", partial(bert, classes), *map(_dataset, parts), 16, 12, 2, 1e-3, 1e-4)


def _language(name: str, texts: tuple[bytes, bytes, bytes], most: int) -> Task:
    parts = [files.next_bytes(text, BYTES, most // share) for text, share in zip(texts, (1, 8, 8), strict=True)]
    return Task(name, "perplexity", llama, *map(_dataset, parts), 16, 5, 1, 3e-3, 5e-4)


def _dataset(part: files.Part) -> TensorDataset:
    return TensorDataset(*(torch.from_numpy(array) for array in part))


def _text() -> Task:
    library = Path(sysconfig.get_path("stdlib"))
    parts = files.package_windows([library / name for name in _PACKAGES], WORDS, 400)
    return _classification("text", parts, len(_PACKAGES))


def library_files() -> list[Path]:
    """The modules of Python's library that are one file."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _lm() -> Task:
    return _language("lm", files.split_files(library_files()), 1600)


def text_file_task(path: Path) -> Task:
    """Language modelling over the bytes of plain text files, for instance WikiText-103's (see ``files.read_texts``)."""
    return _language(f"text_file-{path.name}", files.read_texts(path), 200_000)


def glue_task(path: Path) -> Task:
    """A sentence classification set that Hugging Face's ``datasets`` wrote to ``path``, for instance GLUE's SST-2."""
    parts, classes = files.read_glue(path, WORDS)
    return _classification(f"glue-{path.name}", parts, classes)


def image_folder_task(path: Path, model: str = "resnet50", weights: Path | None = None, side: int = 224) -> Task:
    """Images in ``path``/train/CLASS and ``path``/val/CLASS, as ImageNet and CIFAR-100 are handed around.

    Args:
        model: a name torchvision knows.
        weights: a state dict to start from; then there is no float training.
        side: of the square cut out of the middle, in pixels.
    """
    train, calibration, test = files.image_folders(path, side)
    classes = len(test.classes)

    def build() -> nn.Module:
        _transformers()
        import torchvision

        built: nn.Module = torchvision.models.get_model(model, weights=None, num_classes=classes)
        if weights is not None:
            built.load_state_dict(torch.load(weights, weights_only=True))
        return built

    name, epochs = f"image_folder-{path.name}-{model}", 0 if weights else 90
    return Task(name, "accuracy", build, train, calibration, test, 64, epochs, 5, 1e-3, 1e-4, 0.1)


TASKS: dict[str, Callable[[], Task]] = {
    "digits_cnn": partial(_digits, "cnn"),
    "digits_vit": partial(_digits, "vit"),
    "text": _text,
    "lm": _lm,
}


def with_epochs(task: Task, epochs: int | None, float_epochs: int | None) -> Task:
    """``task`` with other numbers of epochs, where they are given."""
    return replace(
        task,
        epochs=task.epochs if epochs is None else epochs,
        float_epochs=task.float_epochs if float_epochs is None else float_epochs,
    )


def numpy_inputs(part: Dataset[Any], batch: int = 60) -> Iterator[np.ndarray[Any, Any]]:
    """The inputs of ``part`` in order, in batches as an artifact takes them."""
    for x, _ in DataLoader(part, batch):
        yield x.numpy()
