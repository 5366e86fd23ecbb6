"""Python's own library as text: the ASCII ``.py`` files of the standard library that runs this.

A sample is a window of :data:`WINDOW` bytes, and what is predicted are the bytes that follow. Files are split once and
for all, so no window of one part overlaps another's.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

WORDS = 128
"""The vocabulary: ASCII."""
WINDOW = 64
PARTS = ("train", "train", "train", "train", "train", "train", "train", "train", "calibration", "test")
"""The part of each file, in turn over their sorted names."""


def text(part: str) -> Tensor:
    """All files of ``train``, ``calibration`` or ``test`` one after the other: int64 [bytes]."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = (library, *(library / name for name in ("asyncio", "collections", "email", "json", "unittest")))
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    chosen = [file.read_bytes() for i, file in enumerate(files) if PARTS[i % len(PARTS)] == part]
    return torch.tensor(list(b"".join(content for content in chosen if content.isascii())))


def windows(part: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` windows at random places of a text: int64 [count, WINDOW], and the same one byte later."""
    starts = torch.randint(len(part) - WINDOW, (count,), generator=torch.Generator().manual_seed(seed))
    places = starts[:, None] + torch.arange(WINDOW)
    return part[places], part[places + 1]


class Windows:
    """``steps`` batches of ``size`` random windows with their next bytes, anew at every pass, from torch's global
    generator."""

    def __init__(self, part: Tensor, steps: int, size: int) -> None:
        self.part, self.steps, self.size = part, steps, size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            yield windows(self.part, self.size, int(torch.randint(2**31, ())))
