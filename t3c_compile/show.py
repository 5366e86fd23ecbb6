"""Tables a person reads, from the same rows that ``--json`` prints."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]


def show(title: str, rows: Sequence[Row], as_json: bool) -> None:
    """Print ``rows`` (all with the same keys) as a table, or as a JSON list."""
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    for name in rows[0] if rows else ():
        table.add_column(
            escape(name.replace("x86_64", "x86-64").replace("_", " ")),
            justify="right" if _is_number(rows[0][name]) else "left",
        )
    for row in rows:
        table.add_row(*(escape(_text(value)) for value in row.values()))
    console = Console()
    # Piped output has no width of its own; a table cut to 80 columns would lose its numbers.
    (console if console.is_terminal else Console(width=200)).print(table)


def summarize_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Ranks and widths of a profile in a few words: the range of ranks, and how many layers have each width."""
    ranks = [option["rank"] for option in options.values() if option["form"] != "dense"]
    widths = Counter(option["bits"] for option in options.values())
    spread = f"{min(ranks)}-{max(ranks)}" if ranks else "dense"
    return {"rank": spread, "bits": " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items()))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
