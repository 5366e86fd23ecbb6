"""Saving and loading: the user's own weights, an elastic checkpoint, and back to the original architecture.

python examples/checkpoints.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import t3c_compile as t3c


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 96)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x)))


def main() -> None:
    torch.manual_seed(0)
    example = (torch.randn(8, 64),)
    folder = Path(tempfile.mkdtemp())

    # A state_dict of one's own, as torch.compile or DDP has left it, goes into the model before transform.
    torch.save(torch.compile(Net()).state_dict(), folder / "mine.pt")
    model = Net()
    t3c.load_state(model, torch.load(folder / "mine.pt"))

    elastic = t3c.transform(model, example)
    batches = [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(5)]
    result = t3c.train(elastic, batches, epochs=2, progress=False)
    t3c.Checkpoint(elastic, example, result.controller).save(folder / "elastic.safetensors")

    loaded = t3c.Checkpoint.load(folder / "elastic.safetensors")
    print("without the class:", "equal" if torch.equal(loaded.model(*example), elastic(*example)) else "different")
    restored = t3c.restore(Net(), example, folder / "elastic.safetensors")
    print("into the class:", "equal" if torch.equal(restored.model(*example), elastic(*example)) else "different")

    dense = Net()
    elastic.to_dense(dense)  # its state_dict is what it returns
    worst = (dense(*example) - elastic(*example)).abs().max()
    print(f"back to dense: within {float(worst):.0e}")


if __name__ == "__main__":
    main()
