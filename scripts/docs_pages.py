"""What mkdocs needs beside the files of docs/: pages made from the code, and a check that no page loads from elsewhere.

mkdocs calls the functions whose names begin with ``on_`` (``hooks`` in mkdocs.yml).
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from t3c_compile.cli import build_parser

REPO = Path(__file__).resolve().parent.parent
SOURCES = ("t3c_compile", "passes", "backends")
# What a browser loads by itself, rather than when its reader clicks.
_LOADS = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b[^>]*\shref=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import ["'](?:https?:)?//"""
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code and from files at the top of the tree."""
    pages = {
        "quickstart.md": notebook_page((REPO / "examples/quickstart.py").read_text()),
        "errors.md": errors_page(),
        "reference/cli.md": commands_page(),
        "changelog.md": (REPO / "CHANGELOG.md").read_text(),
        "contributing.md": (REPO / "CONTRIBUTING.md")
        .read_text()
        .replace("](docs/", "](")
        .replace("CHANGELOG", "changelog"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the source of a function or class where a page names it: ``{{ source FILE NAME }}`` on a line of its own."""
    return re.sub(r"^\{\{ source (\S+) (\S+) \}\}$", lambda found: _source(*found.groups()), markdown, flags=re.M)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions as ``:func:`name```; Markdown leaves the role standing."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)


def _source(file: str, name: str) -> str:
    text = (REPO / file).read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join([f'```python title="{file}"', *text.splitlines()[start - 1 : node.end_lineno], "```"])
    raise PluginError(f"{file} has no {name}")


def on_post_build(config: Any) -> None:
    """Refuse a site with a page or a style sheet that loads anything from another host."""
    for file in Path(config["site_dir"]).rglob("*"):
        if file.suffix in (".html", ".css") and (found := _LOADS.search(file.read_text())):
            raise PluginError(f"{file} loads from another host: {found.group()}")


def notebook_page(source: str) -> str:
    """A script in percent form as Markdown: its Markdown cells as text, its code cells as blocks."""
    parts = []
    for cell in re.split(r"^# %%", source, flags=re.M)[1:]:
        head, _, body = cell.partition("\n")
        if head.strip() == "[markdown]":
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """The help of every command."""
    parser = build_parser()
    (subparsers,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    parts = [
        "# Command line",
        '`--json` prints one JSON document on stdout, all else goes to stderr: errors as `{"error": ..., "message": '
        "...}`, progress bars where it is a terminal. Exit codes: 0 done, 1 bad input, 2 usage, 3 no profile fits the "
        "budget, 4 missing or damaged artifact, 130 stopped from the keyboard.",
    ]
    for name, command in subparsers.items():
        parts.append(f"## {name}\n\n```text\n{command.format_help().strip()}\n```")
    return "\n\n".join(parts) + "\n"


@dataclass
class Refusal:
    """An error class: what its docstring says, where it is, and the messages it is raised with."""

    module: str
    base: str
    doc: str
    messages: list[str] = field(default_factory=list)


def errors_page() -> str:
    """Every error class of the package with its messages, and every reason for which a layer is kept."""
    trees = {path: ast.parse(path.read_text()) for folder in SOURCES for path in sorted((REPO / folder).rglob("*.py"))}
    classes = _classes(trees)
    assigned = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.Assign)]
    constants = {ast.unparse(node.targets[0]): text for node in assigned if (text := _template(node.value))}
    # A function that returns an error, such as a pass's `fail`, is raised in place of its class.
    makers = {
        node.name: node.returns.id
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id in classes
    }
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                kind = called if called in classes else makers.get(called)
                message = _template(node.args[-1], constants) if kind else ""
                if kind and re.search(r"[a-z]", message) and message not in classes[kind].messages:
                    classes[kind].messages.append(message)
    parts = [
        "# Errors and their way out",
        "Every refusal is a `T3CError` (a `ValueError`): the message names the layer, the op, what was wrong and what "
        "to do. This page is made from the code. `…` stands for what the message names.",
    ]
    for name, refusal in sorted(classes.items()):
        exit_code = {"BudgetError": 3, "ArtifactError": 4, "SignatureError": 4}.get(name, 1)
        parts.append(f"## {name}\n\n{refusal.doc}")
        parts.append(f"From `{refusal.module}`, a `{refusal.base}`; the command line exits with {exit_code}.")
        parts.append("\n".join(f"- {_escaped(message)}" for message in refusal.messages))
    reasons = sorted(set(_reasons(trees)))
    parts.append("## Why a layer is kept")
    parts.append("A layer that cannot be elastic stays as it is, and `elastic.report.kept` gives one of these reasons:")
    parts.append("\n".join(f"- {_escaped(reason)}" for reason in reasons))
    return "\n\n".join(part for part in parts if part) + "\n"


def _classes(trees: dict[Path, ast.Module]) -> dict[str, Refusal]:
    """``T3CError`` and what derives from it, by name."""
    found: dict[str, Refusal] = {}
    defined = [
        (path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    bases = {node.name: node.bases[0].id for _, node in defined if node.bases and isinstance(node.bases[0], ast.Name)}

    def derives(name: str) -> bool:
        return name == "T3CError" or (name in bases and derives(bases[name]))

    for path, node in defined:
        if derives(node.name):
            module = ".".join(path.relative_to(REPO).with_suffix("").parts)
            module = module if module.startswith("t3c_compile") else f"t3c_compile.{module}"
            found[node.name] = Refusal(module, bases[node.name], (ast.get_docstring(node) or "").replace("``", "`"))
    return found


def _template(node: ast.expr, constants: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text of a string expression; ``…`` for what is put in, but for a constant of a module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, constants) or "…" for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return constants.get(node.value.id, "")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_template(node.left, constants) or "…") + (_template(node.right, constants) or "…")
    return ""


def _reasons(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Reasons for which a layer is kept: what stands in the passes that write them into the report.

    That is their constants, the strings that stand for a refused candidate, and those given to the report at once.
    """
    for tree in trees.values():
        if not any(isinstance(node, ast.Call) and ast.unparse(node.func) == "LayerRecord" for node in ast.walk(tree)):
            continue
        for statement in tree.body:
            if isinstance(statement, ast.Assign):
                yield from filter(None, [_template(statement.value)])
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Dict):
                yield from filter(None, map(_template, statement.value.values))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            inner = list(ast.walk(function))
            refuses = function.returns is not None and ast.unparse(function.returns) in ("Candidate | str", "str")
            keeps = any(isinstance(n, ast.Call) and ast.unparse(n.func) in ("_keep", "LayerRecord") for n in inner)
            for node in inner:
                returned = refuses and isinstance(node, ast.Return) and node.value is not None
                given = keeps and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason"
                if (returned or given) and len(text := _template(node.value)) > 20:
                    yield text


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text).replace("\n", " ")
