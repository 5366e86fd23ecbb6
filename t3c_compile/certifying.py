"""``certify``: conformal bounds on the drift of an artifact's own outputs, for all of its profiles at once.

A bound is an order statistic of the drifts seen on calibration samples. Of n independent samples, the share of all
inputs that lie below the k-th smallest drift is distributed as Beta(k, n + 1 - k), or higher where drifts tie,
whatever the distribution of inputs (S. Wilks, 1941, https://doi.org/10.1214/aoms/1177731788; V. Vovk, "Conditional
validity of inductive conformal predictors", 2012, https://arxiv.org/abs/1209.2673; A. Angelopoulos and S. Bates, 2021,
https://arxiv.org/abs/2107.07511, section 3.2). So k is the least for which that share is below 1 - alpha with a chance
of at most delta divided by the number of statements made (Bonferroni): then all of them hold at once with probability
1 - delta. Where all hold, any may be chosen after seeing the data: the scaled form of a bound is taken where its mean
is the lower one. The third form, for calls that run the greatest profile too, bounds what drift exceeds the distance
from that profile by.

The alternative is one joint score, the greatest drift of all profiles in units of each one's own, learnt from a part
of the samples: it pays for one statement instead of many. It is not tighter: Bonferroni raises k by a few samples,
while the greatest of several scores has a higher quantile than each of them (``benchmarks/certificates.py`` measures
both).
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from scipy.stats import beta, binom

from t3c_compile import qemu
from t3c_compile.conformal import CertificateError, ConformalCertificate, ProfileBounds
from t3c_compile.drift import METRICS, Array, agrees, drifts, logits_of, scales
from t3c_compile.manifest import STORE, ArtifactError, Manifest, check_files, read_manifest, write_manifest
from t3c_compile.progress import progress_bar
from t3c_compile.runtime import Session, checked_inputs, is_full, load, refusal
from t3c_compile.signing import Key, private_key, sign

if TYPE_CHECKING:
    from torch import nn

_BATCH = 64
"""Samples run at once where the batch is free."""

_STATEMENTS = 3 * len(METRICS) + 2
"""Of a profile: each metric of drift plain, scaled and compared, drift from the greatest profile, and agreement."""

_SCORES = "plain, scaled, compared"
"""What is kept of a batch: scores that another version kept are not taken for these."""

Scores = dict[str, Array]
Run = Callable[[list[Array]], list[Array]]


def certify(
    path: str | os.PathLike[str],
    inputs: Sequence[Array],
    reference: "Array | nn.Module | None" = None,
    *,
    alpha: float = 0.05,
    delta: float = 0.05,
    target: str | None = None,
    progress: bool = False,
    resume: str | os.PathLike[str] | None = None,
    key: Key | None = None,
) -> ConformalCertificate:
    """Certify every profile's drift from the full model, and write the certificate into the artifact's manifest.

    The compiled library itself runs: here, or under QEMU where the target is an arm64 one. The manifest is replaced in
    one moment at the end; a signature of the old one is gone then.

    Args:
        path: the ``NAME.t3c`` folder.
        inputs: an array for every input of the model, samples along the first dimension. Samples must be independent
            draws of what the model will meet, used neither in training nor in ``snap``.
        reference: the full model, or its logits [samples, ..., classes]; None where the artifact holds it itself
            (``snap(..., full_model=True)``).
        alpha: the share of inputs that may exceed a bound.
        delta: the chance that the samples mislead.
        target: whose library; the first that runs here by default.
        resume: a folder where finished batches are kept; after a call that was cut short it goes on from there.
        key: an Ed25519 private key to sign the artifact with, a PEM file or its content as bytes.

    Raises:
        CertificateError: too few samples (it says how many are needed), no reference, or arrays that do not fit.
        SigningKeyError: ``key`` is not such a key.
        InputError, ArtifactError: as for ``load`` and ``Session.run``.
    """
    folder = Path(path)
    if key is not None:
        private_key(key)  # what is wrong shows before the long work
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    count = _samples(inputs, manifest)
    full = (index for index, profile in enumerate(manifest["profiles"]) if is_full(profile["options"]))
    own = next(full, None) if reference is None else None
    if reference is None and own is None:
        raise CertificateError(
            f"{folder} does not hold the full model, from which drift is measured: give the model or its logits as the "
            "reference, or lower the artifact from snap(..., full_model=True)"
        )
    if isinstance(reference, np.ndarray) and len(reference) != count:
        raise CertificateError(f"the reference has the logits of {len(reference)} samples, the inputs have {count}")
    certified = len(manifest["profiles"]) - (own is not None)
    chance = chance_of_each(count, certified, alpha, delta)
    name, run = _runner(folder, manifest, target)
    batch = _BATCH if all(entry["shape"][0] == "batch" for entry in manifest["inputs"]) else 1
    files = manifest["files"]
    digest = "\n".join([_SCORES, *(files[file]["sha256"] for file in (STORE, manifest["targets"][name]["library"]))])
    parts: list[Scores] = []
    with progress_bar(progress) as bar:
        for start in bar.track(range(0, count, batch), description="certify"):
            chunk = [np.ascontiguousarray(array[start : start + batch]) for array in inputs]
            given = None if reference is None else _reference_logits(reference, chunk, slice(start, start + batch))

            def make(chunk: list[Array] = chunk, given: Array | None = given, start: int = start) -> Scores:
                return scores_of(run(chunk), given, own, start)

            parts.append(_kept(resume, digest, [*chunk, *([] if given is None else [given])], make))
    scores = {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}
    words = "the full model" + ("" if own is None else f" ({manifest['profiles'][own]['name']})")
    bounds = [
        ProfileBounds(dict.fromkeys(METRICS, 0.0), {}, 1.0, 0.0, dict.fromkeys(METRICS, 0.0))
        if index == own
        else profile_bounds({key: values[index] for key, values in scores.items()}, alpha, chance)
        for index in range(len(manifest["profiles"]))
    ]
    statement = _statement(words, count, alpha, delta)
    certificate = ConformalCertificate(alpha, delta, count, words, statement, tuple(bounds))
    manifest = read_manifest(folder)
    if manifest["files"] != files:
        raise ArtifactError(f"{folder} was replaced while it was being certified: certify it again")
    manifest["targets"][name]["conformal"] = certificate.to_json()
    write_manifest(folder, manifest)
    if key is not None:
        sign(folder, key)
    return certificate


def least_samples(alpha: float, chance: float) -> int:
    """The fewest samples whose greatest value bounds a share 1 - ``alpha`` of inputs but for ``chance``."""
    return math.ceil(math.log(chance) / math.log1p(-alpha))


def order_statistic(count: int, alpha: float, chance: float) -> int:
    """The least k for which the k-th smallest of ``count`` independent values (k from 1) is, but for ``chance``, at
    least the quantile 1 - ``alpha`` of what they were drawn from; above ``count`` where there are too few."""
    return int(binom.isf(chance, count, 1 - alpha)) + 1


def agreement_bound(agreeing: int, count: int, chance: float) -> float:
    """Lower bound of a probability seen ``agreeing`` times in ``count``, wrong with at most ``chance`` (C. Clopper and
    E. Pearson, 1934, https://doi.org/10.1093/biomet/26.4.404)."""
    return float(beta.ppf(chance, agreeing, count - agreeing + 1)) if agreeing else 0.0


def chance_of_each(count: int, profiles: int, alpha: float, delta: float) -> float:
    """What each statement may fail with; :class:`CertificateError` where ``count`` samples are too few for it."""
    for symbol, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise CertificateError(f"{symbol}={value} must lie between 0 and 1")
    if not profiles:
        raise CertificateError("the only profile is the full model itself: there is no drift to certify")
    chance = delta / (profiles * _STATEMENTS)
    if count < (needed := least_samples(alpha, chance)):
        raise CertificateError(
            f"{count} samples are too few: {needed} are needed for {profiles} profiles at alpha={alpha} and "
            f"delta={delta}; give more, or raise alpha or delta"
        )
    return chance


def profile_bounds(scores: Scores, alpha: float, chance: float) -> ProfileBounds:
    """Bounds of one profile, each wrong with at most ``chance``, from its scores [samples].

    For each metric ``m`` they hold the drift ``m``, the ``m scale`` of the profile's logits, and ``m beyond``: by how
    much drift exceeds the distance from the greatest profile, over that profile's scale. ``agrees`` is whether the
    top-1 class is the reference's, ``to_greatest`` the distance from the greatest profile in 2-norm.
    """
    count = len(scores["agrees"])
    k = order_statistic(count, alpha, chance)

    def quantile(values: Array) -> float:
        return float(np.sort(values)[k - 1])

    drift = {metric: quantile(scores[metric]) for metric in METRICS}
    factors = {metric: quantile(scores[metric] / scores[f"{metric} scale"]) for metric in METRICS}
    scaled = {m: factor for m, factor in factors.items() if factor * scores[f"{m} scale"].mean() < drift[m]}
    agreement = agreement_bound(int(scores["agrees"].sum()), count, chance)
    compared = {metric: quantile(scores[f"{metric} beyond"]) for metric in METRICS}
    return ProfileBounds(drift, scaled, agreement, quantile(scores["to_greatest"]), compared)


def scores_of(logits: list[Array], given: Array | None, own: int | None = None, start: int = 0) -> Scores:
    """What :func:`profile_bounds` takes, each [profiles, samples], from the logits of every profile on one batch.

    Drift is from ``given``, or else from the profile ``own``; ``start`` is how many samples came before.
    """
    reference = logits[own] if own is not None else given
    assert reference is not None
    found: list[dict[str, Array]] = []
    greatest = scales(logits[-1])
    for index, values in enumerate(logits):
        if values.shape != reference.shape:
            raise CertificateError(f"the reference has logits of shape {reference.shape}, the artifact {values.shape}")
        for what, checked in ((f"profile {index}", values), ("the reference", reference)):
            wrong = ~np.isfinite(checked).reshape(len(checked), -1).all(1)
            if wrong.any():
                raise CertificateError(f"{what} has logits that are not finite on sample {start + int(wrong.argmax())}")
        drift, apart = drifts(reference, values), drifts(logits[-1], values)
        found.append(
            drift
            | {f"{metric} scale": scale for metric, scale in scales(values).items()}
            | {f"{metric} beyond": (drift[metric] - apart[metric]) / greatest[metric] for metric in METRICS}
            | {"agrees": agrees(reference, values), "to_greatest": apart["l2"]}
        )
    return {key: np.stack([scores[key] for scores in found]) for key in found[0]}


def _statement(reference: str, count: int, alpha: float, delta: float) -> str:
    return (
        f"With probability {1 - delta:.4g} over the draw of {count} calibration samples, all of this holds at once, "
        f"for every profile and bound: at least {1 - alpha:.4g} of inputs have logits that drift from those of "
        f"{reference} by no more than the bound, and the share of inputs with the same top-1 class is at least the "
        "bound of the agreement. It assumes that the samples were independent draws of the inputs to come, and says "
        "nothing of other inputs."
    )


def _samples(inputs: Sequence[Array], manifest: Manifest) -> int:
    """How many samples ``inputs`` hold, which are as the manifest describes them."""
    for entry in manifest["inputs"]:
        if not entry["shape"] or entry["shape"][0] not in ("batch", 1):
            raise CertificateError(
                f"input {entry['name']!r} has shape {entry['shape']}: certify needs the samples of a call along the "
                "first dimension; lower the model with a free batch, or a batch of 1"
            )
    checked_inputs([array[:1] if np.ndim(array) else array for array in inputs], manifest["inputs"])
    counts = {len(array) for array in inputs}
    if len(counts) != 1:
        raise CertificateError(f"inputs hold different numbers of samples: {sorted(counts)}")
    return counts.pop()


def _runner(folder: Path, manifest: Manifest, target: str | None) -> tuple[str, Run]:
    """The target that is certified, and what runs its library: a batch to the logits of every profile."""
    entry = manifest["targets"].get(target)
    if entry is not None and refusal(entry) is not None and entry["machine"] == "aarch64" and not qemu.unavailable():

        def emulated(chunk: list[Array]) -> list[Array]:
            outputs = qemu.run_profiles(folder, str(target), *chunk)
            return [outputs[profile["name"]][0] for profile in manifest["profiles"]]

        return str(target), emulated
    session = load(folder, target)
    return session.target, lambda chunk: _run(session, chunk)


def _run(session: Session, chunk: list[Array]) -> list[Array]:
    found = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        found.append(logits_of(session.run(*chunk)))
    return found


def _reference_logits(reference: "Array | nn.Module", chunk: list[Array], part: slice) -> Array:
    if isinstance(reference, np.ndarray):
        return reference[part]
    # Whoever has a module has torch loaded; certifying by logits does not need it.
    import torch

    from t3c_compile.passes.fit_inputs import require_fitting
    from t3c_compile.passes.graph import ElasticGraphModule
    from t3c_compile.passes.path_gains import first_tensor

    tensors = tuple(torch.from_numpy(array) for array in chunk)
    training = reference.training
    reference.eval()
    if isinstance(reference, ElasticGraphModule):
        require_fitting(reference, tensors, "the reference")
        reference.set_full()
    with torch.no_grad():
        outputs = reference(*tensors)
    reference.train(training)
    logits: Array = first_tensor(outputs).numpy()
    return logits


def _kept(
    folder: str | os.PathLike[str] | None, digest: str, arrays: Sequence[Array], make: Callable[[], Scores]
) -> Scores:
    """What ``make`` returns, or what it returned before for the same artifact and ``arrays``. Files in ``folder`` are
    complete or absent, whenever the process is killed."""
    if folder is None:
        return make()
    key = hashlib.sha256(digest.encode())
    for array in arrays:
        key.update(f"{array.shape} {array.dtype}".encode())
        key.update(array.data)
    path = Path(folder) / f"{key.hexdigest()}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept)
    except (FileNotFoundError, BadZipFile, ValueError, EOFError):
        scores = make()
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **scores)
        temporary.replace(path)
    except OSError as error:
        raise CertificateError(f"finished batches cannot be kept in {folder}: {error}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
    return scores
