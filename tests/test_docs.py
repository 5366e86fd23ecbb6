"""Pages of the documentation that are made from the code: they hold all of it, and what they quote is there."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.exceptions import PluginError

from t3c_compile.backends.targets import read_targets, require_cpu

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        return importlib.import_module("docs_pages")


def _refusals() -> set[str]:
    """Names of all error classes, by what their bases are called."""
    text = "\n".join(
        path.read_text() for f in ("t3c_compile", "passes", "backends") for path in (REPO / f).rglob("*.py")
    )
    found, grown = set(), {"T3CError"}
    while grown != found:
        found, grown = grown, grown.union(re.findall(rf"^class (\w+)\((?:{'|'.join(grown)})\)", text, re.M))
    return found


def test_every_error_has_its_place(pages: ModuleType) -> None:
    page = pages.errors_page()
    assert len(_refusals()) > 25
    assert {line[3:] for line in page.splitlines() if line.startswith("## ")} == {*_refusals(), "Why a layer is kept"}
    # Of each kind of expression that a message is written as.
    for message in (
        "there is no data: batches is empty (is the batch size above the number of samples?)",
        "… inputs given, the model takes …",
        "parameter … holds NaN or infinity: repair the checkpoint before transforming it",
        "layers without quantizers (run insert-quantizers first): …",
        "a recurrent layer stays whole, in float",
        "the weight is computed in the graph (parametrized or generated), not a parameter",
        "the weight … is also read by …",
    ):
        assert f"- {message}\n" in page


def test_a_notebook_becomes_a_page(pages: ModuleType) -> None:
    source = '# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # %%x\n\n# %%\nprint("## no title")\n'
    assert pages.notebook_page(source) == (
        '# Title\n\nText.\n\n```python\nx = 1  # %%x\n```\n\n```python\nprint("## no title")\n```\n'
    )


def test_a_quote_is_the_source_and_must_be_there(pages: ModuleType) -> None:
    page = pages.on_page_markdown("a\n\n{{ source backends/targets.py UnknownTargetError }}\n")
    assert '\n```python title="backends/targets.py"\nclass UnknownTargetError(T3CError):\n' in page
    with pytest.raises(PluginError, match="no Gone"):
        pages.on_page_markdown("{{ source backends/targets.py Gone }}")


@pytest.mark.parametrize(
    "text",
    [
        '<script defer src="https://unpkg.com/mermaid"></script>',
        '<link rel="stylesheet" href=//fonts.googleapis.com/css>',
        '<img alt="" src="http://shields.io/badge.svg">',
        '<style>@font-face { src: url("https://fonts.gstatic.com/f.woff2") }</style>',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(pages: ModuleType, tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a href="https://arxiv.org/abs/2601.01299">a link</a><script src="assets/own.js"></script>')
    pages.on_post_build({"site_dir": str(tmp_path)})
    page.write_text(text)
    with pytest.raises(PluginError, match="another host"):
        pages.on_post_build({"site_dir": str(tmp_path)})


def test_the_board_of_the_guide_is_a_target() -> None:
    (board,) = read_targets(REPO / "docs/extend/board.toml").values()
    require_cpu(board)
