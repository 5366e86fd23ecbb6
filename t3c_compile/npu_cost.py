"""What a profile costs on NPUs by their own compiler's estimate, as known before it is lowered."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from t3c_compile.backends.targets import Target
from t3c_compile.npu_artifact import split_profiles
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.profile import Profile, ProfileSet


def npu_costs(
    model: ElasticGraphModule, profile: Profile, inputs: tuple[Tensor, ...], targets: Sequence[Target], exact: bool
) -> dict[str, dict[str, Any]]:
    """The costs of ``profile`` by target, as ``lower`` writes them into the manifest, for the NPUs of ``targets``.

    ``inputs``: as for the model; ``exact``: as in ``lower``. Without the compiler, or where it cannot compile the
    profile (``lower`` says why), there are none, and the roofline's stay.
    """
    npus = [target for target in targets if target.cost == "vela"]
    if not npus or find_spec("ethosu") is None:
        return {}
    try:
        split = split_profiles(model, ProfileSet([profile], ""), inputs, exact)
        return {target.name: split.costs(target)[0] for target in npus}
    except T3CError:
        return {}
