# %% [markdown]
# # Quickstart
#
# A model of your own becomes one artifact that runs under many budgets. Here it is a small convolutional network that
# reads 128 bytes of Python source and says which package of the standard library they come from: no download, and a
# minute from training to the running artifact. It is `examples/quickstart.py`, a script and a notebook in percent form.
#
# From a checkout of the source, on Linux with Python 3.11 to 3.13:
#
# ```sh
# python -m pip install -c constraints.txt .
# python -m examples.quickstart
# ```
#
# or, for the command alone, in an environment of its own:
#
# ```sh
# pipx run --spec . t3c-compile targets
# ```

# %% [markdown]
# ## A model and its data
#
# Any `torch.nn.Module` that `torch.export` can capture. Nothing in it knows of t3c-compile.

# %%
import json
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t3c_compile as t3c
from t3c_compile.backends.targets import host_target

PACKAGES = ("asyncio", "email", "idlelib", "unittest")


class Reader(nn.Module):
    """Bytes [batch, 128] to logits [batch, packages]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.conv = nn.Conv1d(32, 96, 7, stride=4)
        self.hidden = nn.Linear(96, 96)
        self.head = nn.Linear(96, len(PACKAGES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(self.embedding(x).transpose(1, 2)))
        return self.head(F.relu(self.hidden(x.mean(2))))


def windows() -> tuple[Tensor, Tensor]:
    """Windows of 128 bytes, shuffled, and the number of the package each is from."""
    library, found, labels = Path(sysconfig.get_path("stdlib")), [], []
    for label, package in enumerate(PACKAGES):
        source = b"".join(path.read_bytes() for path in sorted((library / package).glob("*.py")))
        pieces = np.frombuffer(source, np.uint8)[: len(source) // 128 * 128].reshape(-1, 128)
        found.append(np.minimum(pieces, 127)[:800].astype(np.int64))
        labels.append(np.full(len(found[-1]), label))
    order = np.random.default_rng(0).permutation(sum(map(len, found)))
    return torch.from_numpy(np.concatenate(found)[order]), torch.from_numpy(np.concatenate(labels)[order])


x, y = windows()
test_x, test_y, x, y = x[:800], y[:800], x[800:], y[800:]
batches = list(zip(x.split(64), y.split(64), strict=True))

# %% [markdown]
# It is trained as always.

# %%
torch.manual_seed(0)
model = Reader()
optimizer = torch.optim.Adam(model.parameters(), 5e-3)
for _ in range(6):
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def accuracy(logits: Tensor) -> float:
    return float((logits.argmax(1) == test_y).float().mean())


model.eval()
print(f"float32: {accuracy(model(test_x)):.1%} of the test windows")

# %% [markdown]
# ## Transform
#
# Linear layers and convolutions become factors that run at any rank and width. Calibration inputs tell which directions
# matter; without them the factors are those of the weights alone. The report says what became elastic and why a layer
# was kept.

# %%
calibration = [(inputs,) for inputs, _ in batches[:6]]
elastic = t3c.transform(model, calibration[0], calibration=calibration)
print(elastic.report)

# %% [markdown]
# The elastic model is an `nn.Module`, and equals `model` until ranks are cut.

# %% [markdown]
# ## Train
#
# One more epoch teaches the factors to be accurate at every rank. `t3c.train` is a loop ready to use; the loss of one
# step is a function for a loop of your own (`t3c_compile.training.ElasticLoss`).

# %%
result = t3c.train(elastic, batches, epochs=1, lr=3e-4, progress=False)
print({name: round(value, 3) for name, value in result.history[-1].items()})

# %% [markdown]
# ## Profiles
#
# `snap` picks a few operating points, from least to greatest, on the grid of ranks and widths that the target has
# kernels for. Each has a size, a cost, an accuracy and a certificate.

# %%
target = host_target()  # this machine; get_target("arm64") and others cross-compile
labels = torch.cat([labels for _, labels in batches[:6]])
profiles = t3c.snap(elastic, calibration, [target], labels, count=3)
for profile in profiles.profiles:
    quality = profile.quality
    print(
        f"{profile.name}: {profile.size_bytes / 1e3:.0f} kB, accuracy {quality['accuracy']:.1%}, KL {quality['kl']:.1e}"
    )

# %% [markdown]
# ## Lower
#
# All profiles are compiled into one folder, which stores every weight once.

# %%
folder = Path("build/quickstart")
folder.mkdir(parents=True, exist_ok=True)
artifact = t3c.lower(elastic, profiles, [target], folder / "reader.t3c", calibration[0])

# %% [markdown]
# ## Run
#
# Loading needs numpy and TVM's runtime, not torch. A budget picks the greatest profile that fits, and may change
# between two calls.

# %%
session = t3c.load(artifact)
inputs = test_x.numpy()
for budget in (t3c.Budget(), t3c.Budget(size_mb=session.profiles[0].size_mb)):
    profile = session.set_budget(budget)
    logits = torch.from_numpy(session.run(inputs))
    print(f"{budget}: {profile.name}, {1e3 * profile.size_mb:.0f} kB, {accuracy(logits):.1%} of the test windows")

# %% [markdown]
# ## Certify
#
# How far may the logits be from those of the full model? Samples that were used in nothing above say so, for all
# profiles at once; [what it promises](guarantees.md) is written into the artifact.

# %%
certificate = t3c.certify(artifact, [inputs], elastic, alpha=0.1)
print(certificate.statement)
print(
    json.dumps({p.name: round(b.drift["l2"], 2) for p, b in zip(session.profiles, certificate.profiles, strict=True)})
)
