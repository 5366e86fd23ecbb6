"""The report page, in a real browser, against what the runtime and the manifest say; and the figures."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certified import Small, samples
from playwright.sync_api import Browser, Page, sync_playwright

from t3c_compile.budget import Budget, BudgetError
from t3c_compile.certifying import certify
from t3c_compile.cli import main
from t3c_compile.manifest import read_manifest, write_manifest
from t3c_compile.report import Report, ReportError, figures, read_report, write_page
from t3c_compile.report.page import page_data
from t3c_compile.runtime import choose, load

_LAUNCH = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_SCREENS = {"phone": (390, 844), "narrow": (360, 740), "desktop": (1280, 900)}
_KINDS = ("latency_ms", "size_mb", "energy_mj", "max_drift")
# What would run, or break the page, where a name were read as markup or left its script element.
_PROFILE = "</script><script>window.broken=1</script>"
_LAYER = "<img src=x onerror=window.broken=1>&amp;\u2028${`'\"\\"
_BASELINES = [
    {"name": "<b>int8</b>", "accuracy": 0.875, "latency_ms": 0.31, "size_mb": 0.6},
    {"name": "no latency", "accuracy": 0.75, "size_mb": 0.002},
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        # Where every test must run, one that cannot is a failure.
        missing = "chromium is not installed (on Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=_LAUNCH)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def artifact(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with six profiles, some of which cost less than a lesser one, as measured ones may.

    Its library knows fewer profiles: nothing here runs it.
    """
    folder = tmp_path_factory.mktemp("report")
    path = small.copy(folder, full=False)
    manifest, count = read_manifest(path), 6
    first = manifest["profiles"][0]
    names = ["first", _LAYER, "a.layer.with.a.name.much.longer.than.a.phone.is.wide.head"]
    ranks = [16, 16, 32, 48, 48, 64]
    manifest["profiles"] = [
        {
            **first,
            "name": _PROFILE if index == 2 else f"p{index}",
            "size_bytes": 1000 * 2**index + 7,
            "options": {
                names[0]: {"form": "svd", "rank": ranks[index], "bits": 4 + 2 * (index > 1)},
                names[1]: {"form": "dense", "rank": 0, "bits": 4 + 4 * (index > 3)},
                names[2]: {"form": "svd", "rank": 8 * (index + 1), "bits": 4},
            },
            "quality": {"kl": 0.1, "agreement": 0.9, "accuracy": 0.8 + 0.02 * index, "drift": 1 / (1 + index)}
            | {"drift_p95": 2 / (1 + index), "drift_max": 3 / (1 + index)},
            "certificate": {"bound": 2.5 / (1 + index), "share": 0.95, "statement": "At most `bound`."}
            | {"layers": dict(zip(names, np.array([0.5, 0.3, 0.2]) * 2.5 / (1 + index), strict=True))},
        }
        for index in range(count)
    ]
    for name, entry in manifest["targets"].items():
        entry["functions"] = [f"profile_{index}" for index in range(count)]
        entry["costs"] = [
            {"latency_ms": ms / 3, "energy_mj": ms**2 / 7, "source": "roofline: 20 GOP/s"}
            | ({"latency_p90_ms": ms, "source": "measured on the build machine"} if name == "x86_64" else {})
            for ms in (0.31, 0.29, 0.47, 0.53, 0.5, 0.7)
        ]
    bounds = [1.9, 1.3, 1.45, 0.9, 0.37, 0.41]
    manifest["targets"]["x86_64"]["conformal"] = {"alpha": 0.05, "delta": 0.05, "samples": 540} | {
        "reference": "the full model",
        "statement": "It holds.",
        "profiles": [
            {"drift": {"linf": b, "l2": b, "kl": b}, "scaled": {}, "agreement": 0.9, "to_greatest": b} for b in bounds
        ],
    }
    write_manifest(path, manifest)
    (folder / "baselines.json").write_text(json.dumps(_BASELINES))
    return path


@pytest.fixture(scope="module")
def report(artifact: Path) -> Report:
    return read_report(artifact, artifact.parent / "baselines.json")


@pytest.fixture(scope="module")
def file(report: Report, artifact: Path) -> Path:
    return write_page(report, artifact.parent / "report.html")


class _Opened:
    """A page in the browser; leaving it asserts that nothing went wrong in there and nothing else was fetched."""

    def __init__(self, browser: Browser, file: Path, screen: str = "desktop", scheme: str = "light") -> None:
        width, height = _SCREENS[screen]
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,  # type: ignore[arg-type]
            has_touch=screen != "desktop",
            reduced_motion="reduce",
        )
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.file = file

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, kind: Any, *_: Any) -> None:
        overflows = self.page.evaluate("document.documentElement.scrollWidth > innerWidth")
        broken = self.page.evaluate("window.broken")
        self.context.close()
        if kind is None:
            assert self.wrong == []
            assert self.requests == [self.file.as_uri()]
            assert not overflows
            assert broken is None


def _picked(report: Report, target: str, kind: str, budget: float) -> str:
    """The runtime's choice; nothing where none fits."""
    try:
        return choose(report.targets[target].profiles, Budget(**{kind: budget})).name
    except BudgetError:
        return ""


def _grid(report: Report, target: str, kind: str) -> list[float]:
    """Budgets at, just below and just above what each profile needs, and between."""
    profiles = report.targets[target].profiles
    needs = sorted(
        float(p.drift_bound if kind == "max_drift" else p.needs[kind])  # type: ignore[arg-type]
        for p in profiles
    )
    near = [b for need in needs for b in (math.nextafter(need, 0), need, math.nextafter(need, math.inf))]
    return [needs[0] / 10, *near, *((low + high) / 2 for low, high in pairwise(needs)), 10 * needs[-1]]


# Types budgets into the field one after the other; gives what is picked then, and rank and bits of every layer.
_TYPE = """budgets => budgets.map(budget => {
  const field = document.getElementById("amount");
  field.value = budget;
  field.dispatchEvent(new Event("input"));
  const layers = [...document.querySelectorAll(".layer")].map(row => row.dataset);
  return [document.getElementById("picked").dataset.profile, layers.map(({rank, bits}) => [+rank, +bits])];
})"""


@pytest.mark.parametrize("target", ["x86_64", "arm64"])
def test_the_page_picks_what_the_runtime_picks(browser: Browser, file: Path, report: Report, target: str) -> None:
    options = {p.name: [[o["rank"], o["bits"]] for o in p.options.values()] for p in report.profiles}
    kinds = [kind for kind in _KINDS if target == "x86_64" or kind != "max_drift"]
    with _Opened(browser, file) as page:
        page.select_option("#target", label=target)
        assert page.eval_on_selector_all("[name=kind]", "found => found.map(one => one.value)") == kinds
        for kind in kinds:
            page.check(f"[name=kind][value={kind}]", force=True)
            budgets = _grid(report, target, kind)
            expected = [_picked(report, target, kind, budget) for budget in budgets]
            assert len(set(expected)) >= 3  # or the grid would show little
            found = page.evaluate(_TYPE, [repr(budget) for budget in budgets])
            assert [name for name, _ in found] == expected, kind
            assert [layers for name, layers in found if name] == [options[name] for name in expected if name]


@pytest.mark.parametrize(("screen", "scheme"), [("phone", "dark"), ("narrow", "light"), ("desktop", "light")])
def test_the_slider_moves_the_picture(browser: Browser, file: Path, report: Report, screen: str, scheme: str) -> None:
    def seen(page: Page) -> tuple[str, list[float], list[str], str]:
        picked = page.locator("#picked").get_attribute("data-profile") or ""
        budget = float(page.input_value("#amount"))
        assert picked == _picked(report, "x86_64", "size_mb", budget)
        bars = page.eval_on_selector_all(".bar > i", "bars => bars.map(bar => bar.getBoundingClientRect().width)")
        marked = page.eval_on_selector_all("#profiles tr.on td:first-child", "cells => cells.map(c => c.textContent)")
        assert marked == ([picked] if picked else [])
        points = page.locator("#size-plot .point.on").count()
        assert points == bool(picked)
        return picked, bars, marked, page.inner_text("#picked")

    with _Opened(browser, file, screen, scheme) as page:
        page.check("[name=kind][value=size_mb]", force=True)
        middle = seen(page)
        page.focus("#slider")
        page.keyboard.press("End")
        greatest = seen(page)
        page.keyboard.press("Home")
        none = seen(page)
        assert [greatest[0], none[0]] == ["p5", ""]
        assert middle[0] not in (greatest[0], none[0])
        assert all(low <= high for low, high in zip(middle[1], greatest[1], strict=True))
        assert middle[1] != greatest[1]
        # The third layer's rank: 48 of 64, the greatest there is.
        width = page.eval_on_selector_all(".bar.rank", "bars => bars[2].getBoundingClientRect().width")
        assert greatest[1][4] == pytest.approx(width * 48 / 64, abs=1)
        assert "No profile fits. The least size that can be had is 0.001007 MB, with p0." in none[3]
        for key in ("PageUp", "PageUp", "PageUp", "ArrowLeft"):
            page.keyboard.press(key)
        assert seen(page)[0] == "p1"
        page.click("#strip > div:last-child")
        assert seen(page)[0] == "p5"


@pytest.mark.parametrize(("screen", "scheme"), [("phone", "light"), ("desktop", "dark")])
def test_it_is_light_and_dark(browser: Browser, file: Path, screen: str, scheme: str) -> None:
    def seen(page: Page) -> str:
        color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return "light" if sum(int(part) for part in color[4:-1].split(",")) > 600 else "dark"

    other = {"light": "dark", "dark": "light"}
    with _Opened(browser, file, screen, scheme) as page:
        assert seen(page) == scheme
        assert page.inner_text("#theme").lower() == other[scheme]
        page.click("#theme")
        assert seen(page) == other[scheme]
        assert page.inner_text("#theme").lower() == scheme


def test_everything_in_the_report_is_on_the_page(browser: Browser, file: Path, report: Report) -> None:
    source = file.read_text()
    assert source.count("<script") == 2
    assert source.count("</script") == 2
    with _Opened(browser, file) as page:
        assert page.locator("#latency-plot .point").count() == 6 + 1
        assert page.locator("#size-plot .point").count() == 6 + 2
        assert page.locator("#certificate-plot .point").count() == 12
        assert page.locator("#sensitivity-plot .cell").count() == 3 * 6
        rows = page.eval_on_selector_all("#profiles tbody tr", "rows => rows.map(row => row.innerText)")
        for row, profile, cost in zip(rows, report.profiles, report.targets["x86_64"].profiles, strict=True):
            assert profile.name in row
            assert f"{cost.latency_ms:#.3g}" in row
            assert "measured" in row
            assert f"{100 * profile.quality['accuracy']:.2f}%" in row
            assert f"≤ {profile.certificate['bound']:#.3g}" in row
        assert page.locator(".layer code").all_inner_texts() == list(report.layers)
        # The tooltip of the baseline, by keyboard.
        page.locator("#latency-plot .point.second").focus()
        assert page.inner_text("#tip").splitlines() == ["<b>int8</b>", "87.50% accuracy", "0.31 ms"]
        assert "It holds." in page.inner_text("#statements")
        assert "report copy.t3c --measure" in page.inner_text("#kernels-note")
        page.select_option("#target", label="arm64")
        assert page.locator("#certificate-plot .point").count() == 6
        assert "roofline" in page.inner_text("#profiles tbody tr:first-child")
        assert "it is for aarch64" in page.inner_text("#kernels-note")


def test_what_is_not_known_is_left_out(browser: Browser, artifact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(artifact, tmp_path / "old.t3c"))
    manifest = read_manifest(path)
    for profile in manifest["profiles"]:
        profile["certificate"] = {"bound": profile["certificate"]["bound"]}
        profile["quality"] = {key: profile["quality"][key] for key in ("kl", "agreement", "drift")}
    write_manifest(path, manifest)
    report = read_report(path)
    assert report.sensitivity() is None
    with _Opened(browser, write_page(report, tmp_path / "report.html"), "phone") as page:
        assert "there is no map" in page.inner_text("#sensitivity-note")
        assert page.locator("#sensitivity-plot").is_hidden()
        assert "same class" in page.inner_text("#latency-caption").lower()
        assert page.locator("#certificate-plot .whisker").count() == 0
        assert page.locator("#certificate-plot .point").count() == 12
    with pytest.raises(ReportError, match="has no accuracy to compare baselines with"):
        read_report(path, artifact.parent / "baselines.json")


def test_a_real_artifact_measured(
    browser: Browser, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = small.copy(tmp_path), tmp_path / "report.html"
    certify(path, [samples(300, seed=2)], alpha=0.1)
    assert main(["report", str(path), "--measure", "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"artifact": str(path), "page": str(output)}]
    session = load(path)
    data = json.loads(output.read_text().split('id="report">')[1].split("</script>")[0])
    kernels = data["targets"][0]["kernels"]
    known = read_manifest(path)["targets"]["x86_64"]["kernels"]
    for times in kernels:
        steps = {kernel["name"]: kernel for kernel in times["kernels"]}
        assert len(steps) >= 3
        assert all(known[name] == step["schedule"] for name, step in steps.items() if name in known)
        assert all(step["calls"] == 1 and step["us"] >= 0 for step in steps.values())
    # The full model is three float32 layers.
    assert sum(kernel["calls"] for kernel in kernels[-1]["kernels"] if kernel["family"] == "float_linear") == 3
    needs = session.profiles[1].needs
    with _Opened(browser, output) as page:
        assert page.locator("#kernel-bars .share").count() == len(session.profiles)
        for kind, budget in (("latency_ms", needs["latency_ms"]), ("size_mb", needs["size_mb"]), ("max_drift", 1e-9)):
            page.check(f"[name=kind][value={kind}]", force=True)
            ((name, _),) = page.evaluate(_TYPE, [repr(budget)])
            assert name == session.set_budget(Budget(**{kind: budget})).name
        assert "float_linear" in page.inner_text("#kernel-table")


def test_what_cannot_be_reported_is_refused(
    artifact: Path, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(code: int, *arguments: str) -> str:
        assert main([*arguments, "--json"]) == code
        message: str = json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
        return message

    page = ["-o", str(tmp_path / "report.html")]
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged.t3c"))
    (damaged / "weights.safetensors").write_bytes(b"")
    for path in (tmp_path / "none.t3c", damaged):
        assert fails(4, "report", str(path), *page) == fails(4, "inspect", str(path))
    elsewhere = Path(shutil.copytree(artifact, tmp_path / "arm64.t3c"))
    manifest = read_manifest(elsewhere)
    del manifest["targets"]["x86_64"]
    write_manifest(elsewhere, manifest)
    message = fails(1, "report", str(elsewhere), "--measure", *page)
    assert "can be measured here: arm64: it is for aarch64" in message
    assert "is not a folder" in fails(1, "report", str(artifact), "-o", str(tmp_path / "no/report.html"))
    for given, said in (
        ("{", "Expecting property name"),
        ("{}", "a list of objects is needed"),
        ('[{"accuracy": 0.5, "size_mb": 1}]', "entry 0: an object with name, accuracy, latency_ms, size_mb is needed"),
        ('[{"name": "a", "accuracy": 0.5, "ms": 1}]', "entry 0: an object with name"),
        ('[{"name": "a", "accuracy": 76.1, "size_mb": 1}]', "accuracy is a share between 0 and 1"),
        ('[{"name": "a", "size_mb": 1}]', "accuracy is a share between 0 and 1, and it is needed"),
        ('[{"name": "a", "accuracy": 0.5, "size_mb": "1"}]', "size_mb is '1', a positive number is needed"),
        ('[{"name": "a", "accuracy": 0.5, "latency_ms": NaN}]', "latency_ms is nan, a positive number is needed"),
        ('[{"name": "a", "accuracy": 0.5}]', "latency_ms or size_mb is needed"),
    ):
        (tmp_path / "baselines.json").write_text(given)
        baselines = ["--baselines", str(tmp_path / "baselines.json")]
        assert said in fails(1, "report", str(artifact), *baselines, *page), given
    assert not (tmp_path / "report.html").exists()


def test_figures_show_the_report(report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profiles = report.targets["arm64"].profiles
    axes = figures.plot_pareto(report, "size_mb", "arm64").axes[0]
    dots, diamonds = axes.collections
    expected = [(p.size_mb, 100 * p.quality["accuracy"]) for p in profiles]
    assert np.allclose(dots.get_offsets(), expected)
    assert np.allclose(diamonds.get_offsets(), [(0.6, 87.5), (0.002, 75)])
    axes = figures.plot_pareto(report).axes[0]
    assert "90th percentile, measured" in axes.get_xlabel()
    assert len(axes.collections[1].get_offsets()) == 1
    _, dots, diamonds = figures.plot_certificates(report).axes[0].collections
    assert np.allclose(dots.get_offsets(), [(2.5 / (1 + i), 2 / (1 + i)) for i in range(6)])
    assert np.allclose(diamonds.get_offsets()[:, 0], [p.drift_bound for p in report.profiles])
    axes = figures.plot_sensitivity(report).axes[0]
    assert np.allclose(axes.images[0].get_array(), np.outer([0.5, 0.3, 0.2], [2.5 / (1 + i) for i in range(6)]))
    ranks, bits = figures.plot_layers(report, "p5").axes
    assert [bar.get_width() for bar in ranks.patches] == [64, 0, 48]
    assert [bar.get_width() for bar in bits.patches] == [6, 8, 4]
    figures.plot_layers(report, "p5").savefig(tmp_path / "layers.png")
    with pytest.raises(ReportError, match="were not measured: read the report with measure=True"):
        figures.plot_kernels(report)
    with pytest.raises(ReportError, match=r"no profile 'p9'; there are p0"):
        figures.plot_layers(report, "p9")
    with pytest.raises(ReportError, match=r"no target 'z80'; it has x86_64, arm64"):
        figures.plot_pareto(report, target="z80")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(figures.PlottingUnavailableError, match=r"pip install 't3c-compile\[report\]'"):
        figures.plot_pareto(report)


def test_the_page_needs_neither_torch_nor_matplotlib(artifact: Path, report: Report, tmp_path: Path) -> None:
    code = (
        "import sys; from t3c_compile.report import read_report, write_page\n"
        "write_page(read_report(sys.argv[1], sys.argv[2]), sys.argv[3])\n"
        "print(sorted(sys.modules.keys() & {'torch', 'tvm', 'matplotlib'}))"
    )
    output = tmp_path / "report.html"
    arguments = [str(artifact), str(artifact.parent / "baselines.json"), str(output)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert json.dumps(page_data(report)) == json.dumps(
        json.loads(output.read_text().split('id="report">')[1].split("</script>")[0])
    )
