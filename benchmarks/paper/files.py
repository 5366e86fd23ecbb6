"""Data read from files: source text, plain text, image folders, and what Hugging Face's ``datasets`` wrote."""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.passes.errors import T3CError

Array = np.ndarray[Any, Any]
Part = tuple[Array, Array]
"""Inputs and labels, int64."""

VOCABULARY = 1024
_WORD = re.compile(rb"[^\W\d]\w{2,}")
# Of every text: what trains, calibrates and tests, in this order, so that no byte is in two parts.
_SHARES = (0.8, 0.9, 1.0)


def windows(ids: Array, length: int, most: int) -> Array:
    """At most ``most`` pieces of ``length`` of the tokens ``ids`` [n], evenly spread, none overlapping: int64."""
    count = len(ids) // length
    chosen = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    return ids[: count * length].reshape(count, length)[chosen].astype(np.int64)


def words(text: bytes) -> Array:
    """Words of three letters and more as ids from 1 to ``VOCABULARY`` - 1, by hash; 0 begins and fills."""
    return np.array([1 + zlib.crc32(word) % (VOCABULARY - 1) for word in _WORD.findall(text)], np.int64)


def _cut(text: bytes) -> list[bytes]:
    """A text in three parts, one after the other."""
    ends = [int(share * len(text)) for share in _SHARES]
    return [text[begin:end] for begin, end in zip([0, *ends[:2]], ends, strict=True)]


def source(folder: Path) -> list[bytes]:
    """The Python files of a package, its tests left out."""
    paths = sorted(path for path in folder.rglob("*.py") if not {"test", "tests"} & set(path.parts))
    if not paths:
        raise T3CError(f"{folder} holds no Python source")
    return [path.read_bytes() for path in paths]


def package_windows(folders: Sequence[Path], length: int, most: int) -> tuple[Part, Part, Part]:
    """Which of ``folders`` ``length`` tokens, a 0 and words of source, are from: training, calibration, test.

    Each file is cut in three, so a part sees other words of the same files. ``most`` is a class's training pieces.
    """
    parts = []
    for index, limit in enumerate((most, most // 8, most // 4)):
        texts = [b"\n".join(_cut(text)[index] for text in source(folder)) for folder in folders]
        by_class = [windows(words(text), length - 1, limit) for text in texts]
        labels = np.repeat(np.arange(len(folders)), [len(found) for found in by_class])
        parts.append((np.pad(np.concatenate(by_class), ((0, 0), (1, 0))), labels))
    return parts[0], parts[1], parts[2]


def split_files(paths: Sequence[Path]) -> tuple[bytes, bytes, bytes]:
    """Whole files as training, calibration and test text: of every ten, one calibrates and one tests."""
    if len(paths) < 10:
        raise T3CError(f"{len(paths)} files are too few to split: ten and more")
    kinds = [[path for i, path in enumerate(paths) if i % 10 in chosen] for chosen in (range(8), (8,), (9,))]
    train, calibration, test = (b"".join(path.read_bytes() for path in kind) for kind in kinds)
    return train, calibration, test


def read_texts(path: Path) -> tuple[bytes, bytes, bytes]:
    """Training, calibration and test text: a folder of three files with train, valid and test in their names (as
    WikiText-103 is), or one file that is cut in three."""
    if path.is_file():
        train, calibration, test = _cut(path.read_bytes())
        return train, calibration, test
    found = {name: sorted(path.glob(f"*{name}*")) for name in ("train", "valid", "test")}
    wrong = [name for name, files in found.items() if len(files) != 1]
    if wrong:
        raise T3CError(f"{path}: one file each with train, valid and test in its name is wanted; not so: {wrong}")
    train, calibration, test = (files[0].read_bytes() for files in found.values())
    return train, calibration, test


def next_bytes(text: bytes, length: int, most: int) -> Part:
    """Pieces of ``length`` bytes, and for every byte the one after it."""
    pieces = windows(np.frombuffer(text, np.uint8), length + 1, most)
    if not len(pieces):
        raise T3CError(f"a text of {len(text)} bytes holds no piece of {length + 1}")
    return pieces[:, :-1].copy(), pieces[:, 1:].copy()


def read_glue(path: Path, length: int) -> tuple[tuple[Part, Part, Part], int]:
    """A data set of sentences (or pairs of them) and labels that ``datasets`` saved: a 0 and words, cut or filled to
    ``length``. GLUE's test labels are not public: its validation split tests, and an eighth of training calibrates."""
    try:
        import datasets
    except ImportError:
        raise T3CError("GLUE is read by Hugging Face's datasets: pip install datasets, or name another task") from None
    data = datasets.load_from_disk(str(path))
    columns = [name for name in data["train"].column_names if name not in ("label", "idx")]

    def part(split: str) -> Part:
        sentences = zip(*(data[split][name] for name in columns), strict=True)
        cut = [words(" ".join(parts).encode())[: length - 1] for parts in sentences]
        ids = np.stack([np.pad(found, (1, length - 1 - len(found))) for found in cut])
        return ids, np.array(list(data[split]["label"]), np.int64)

    (x, y), test = part("train"), part("validation")
    order = np.random.default_rng(0).permutation(len(y))
    held, kept = order[: len(y) // 8], order[len(y) // 8 :]
    return ((x[kept], y[kept]), (x[held], y[held]), test), len(np.unique(y))


def image_folders(path: Path, side: int) -> tuple[Any, Any, Any]:
    """``path``/train and ``path``/val, a folder a class: training (cropped and mirrored at random), calibration (240
    training images, which do not train) and test."""
    missing = [name for name in ("train", "val") if not (path / name).is_dir()]
    if missing:
        raise T3CError(f"{path} has no folder {' and no '.join(missing)}: images lie in train/CLASS and val/CLASS")
    from examples.models.torchvision_import import import_torchvision

    import_torchvision()
    import torch
    from torch.utils.data import Subset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    # Mean and deviation of ImageNet's pixels, as torchvision's weights were trained with.
    ends = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    plain = v2.Compose([v2.Resize(round(side * 8 / 7)), v2.CenterCrop(side), *ends])
    moved = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), *ends])
    train, still, test = (
        ImageFolder(path / folder, transform)
        for folder, transform in (("train", moved), ("train", plain), ("val", plain))
    )
    if train.classes != test.classes:
        raise T3CError(f"{path}: train and val have other classes: {set(train.classes) ^ set(test.classes)}")
    order = np.random.default_rng(0).permutation(len(train))
    held = min(240, len(train) // 4)
    return Subset(train, order[held:].tolist()), Subset(still, order[:held].tolist()), test
