"""The page: one HTML file with everything in it, made of ``template/`` and a report's numbers."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t3c_compile.report.data import Report, ReportError, TargetReport
from t3c_compile.runtime import LATENCY_MARGIN
from t3c_compile.show import summarize_options

_TEMPLATE = Path(__file__).with_name("template")
# What could end a script element or begin a comment, in a form that JSON reads as the same characters.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def write_page(report: Report, output: str | os.PathLike[str]) -> Path:
    """Write ``report`` as one HTML file that needs no network. Raises :class:`ReportError` where it cannot be written.

    Names from the artifact are in the file as JSON alone, and its script puts them on the page as text.
    """
    parts = {
        "page.css": (_TEMPLATE / "page.css").read_text(encoding="utf-8"),
        "charts.js": (_TEMPLATE / "charts.js").read_text(encoding="utf-8"),
        "page.js": (_TEMPLATE / "page.js").read_text(encoding="utf-8"),
        "report.json": json.dumps(page_data(report), allow_nan=False).translate(_ESCAPES),
    }
    page = (_TEMPLATE / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        before, after = page.split(f"{{{{{name}}}}}")
        page = before + text + after
    path = Path(output)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}") from error
    return path


def page_data(report: Report) -> dict[str, Any]:
    """The numbers of the page as its script reads them: floats unrounded, so that its choices are the runtime's."""
    return {
        "name": report.name,
        "quality": report.quality,
        "layers": report.layers,
        "tools": dict(report.tools),
        "margin": LATENCY_MARGIN,
        "baselines": [asdict(baseline) for baseline in report.baselines],
        "sensitivity": report.sensitivity(),
        "profiles": [
            {
                "name": profile.name,
                **summarize_options(profile.options),
                "size_mb": profile.size_mb,
                "quality": dict(profile.quality),
                "bound": profile.certificate["bound"],
                "share": profile.certificate.get("share"),
                "statement": profile.certificate.get("statement"),
                "options": [dict(profile.options[layer]) for layer in report.layers],
            }
            for profile in report.profiles
        ],
        "targets": [{"name": name, **_target(target)} for name, target in report.targets.items()],
    }


def _target(target: TargetReport) -> dict[str, Any]:
    certificate = target.conformal
    return {
        "statement": None if certificate is None else certificate.statement,
        "share": None if certificate is None else 1 - certificate.alpha,
        "kernels": None if target.kernels is None else [asdict(times) for times in target.kernels],
        "unmeasured": target.unmeasured,
        "costs": [
            {
                "latency_ms": profile.latency_ms,
                "latency_source": profile.latency_source,
                "energy_mj": profile.energy_mj,
                "energy_source": profile.energy_source,
                "needs": profile.needs,
                "drift_bound": profile.drift_bound,
                "bounds": None if certificate is None else dict(certificate.profiles[profile.index].drift),
                "agreement": None if certificate is None else certificate.profiles[profile.index].agreement,
            }
            for profile in target.profiles
        ],
    }
