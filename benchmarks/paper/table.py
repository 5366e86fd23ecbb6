"""``docs/paper.md`` from the cells: tables, what was aimed at and reached, and what the paper has beyond them."""

from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.paper.baselines import BASELINES
from benchmarks.paper.t3c import SIZES, VARIANTS

Cell = dict[str, Any]
Row = dict[str, float]
"""Of one seed: score, size_kb, p50, p90, batch_p50, violations, drift; of T3C also bound and held; where known."""

TITLES = {
    "digits_cnn": "Images: a convolutional network on scikit-learn's digits",
    "digits_vit": "Images: a vision transformer on scikit-learn's digits",
    "text": "Text: a small BERT says which of 8 packages of Python's library 63 names are from",
    "lm": "Language: a small Llama over the bytes of Python's library",
}

_INTRO = """# The paper's tables on the tasks at hand

Written by `python -m benchmarks.paper` from `benchmarks/results/paper.json`; run it again rather than edit this page.

The paper's data sets are not here, so its tables are repeated on data that is: same columns, same methods, small
models. One T3C checkpoint gives the five T3C rows of a seed; every baseline is a checkpoint of its own. All start from
the same float32 model and are fine-tuned on the same data for the same epochs (PTQ-8b, PTQ-4b and SparseGPT are not
fine-tuned, which is what they are). Figures are means over seeds, with standard deviations.

How each was deployed, and what the columns are:

- Everything is compiled by this project for x86_64 and takes int8 activations (float32 aside); scores are those of the
  compiled libraries on the test split. Dense baselines are profiles of form dense. Unstructured sparsity makes no dense
  kernel faster: such models run as dense int8.
- **p50, p90**: milliseconds of `Session.run` at batch 1 on one thread; **batch**: the median at 32 samples. All methods
  of a seed were timed in turn in one process, on a machine shared with other work: ratios hold, figures drift. float32
  convolutions are not what these kernels are made for; that row is there for its score.
- **size**: kB (1000 bytes) of the weights deployed, at their own widths with scales and biases; sparse ones as a bit a
  weight and the int8 of those left, where that is less. A T3C row is that profile's share of the one store; what all
  five together take stands below each table.
- **certificate**: a bound on the 2-norm of the logits' drift from the full model that 95% of inputs keep (confidence
  95%, from calibration data); **held**: the share of test samples that did. Baselines have none. **drift** is the mean
  seen: T3C's from its own full model, the others' from the float32 model.
- **violations**: five latency budgets a seed, each the least for which the runtime picks that T3C profile. Of a T3C
  row: the share of calls above its own; of a baseline, which cannot move: above each, in the mean.

All of it was run on one core of a server processor with AVX512 and AMX, virtual and kept free for what is timed. Ranks
are multiples of 16 there. The artifacts of all methods were compiled before weights of fewer bits were rounded at load
and GELU lost its division (see CHANGELOG): today's are faster where weights have fewer than 8 bits, PTQ-4b, KD-PTQ,
MP-QAT, LoRA-Comp and T3C but its greatest profile, and drifts differ in the last digits. The text task's learning rates
were chosen on its calibration split (`python -m benchmarks.paper.learning_rate text`); its test split has 313 texts, so
that one is 0.32 points.
"""

_COMMAND = "python -m benchmarks.paper"
_BEYOND = (
    (
        "ImageNet-1k: ResNet-50 and -101, ViT-B/16 and -L/16, Swin-T",
        "`digits_cnn`, `digits_vit`",
        "the images in train/CLASS and val/CLASS, and torchvision's weights; `{} --tasks image_folder --data imagenet "
        "--model resnet50 --weights resnet50.pth` (`resnet101`, `vit_b_16`, `vit_l_16`, `swin_t`)",
    ),
    (
        "CIFAR-100",
        "`digits_cnn`",
        "the same, its images as files: `{} --tasks image_folder --data cifar100 --side 32 --model resnet50`, trained "
        "from scratch without `--weights`",
    ),
    (
        "GLUE: BERT, RoBERTa, DistilBERT",
        "`text`",
        '`pip install datasets`, and the set as `load_dataset("glue", "sst2").save_to_disk("sst2")` leaves it; '
        "`{} --tasks glue --data sst2`. The model is the small BERT over hashed words, not pre-trained",
    ),
    (
        "WikiText-103: TinyLlama",
        "`lm`",
        "its three text files in one folder; `{} --tasks text_file --data wikitext-103`. The model is the small Llama, "
        "and perplexity is by byte",
    ),
    (
        "latency on other devices",
        "x86_64",
        "the devices: `t3c-compile lower --target` compiles for them, `t3c-compile bench --rpc HOST:PORT` times them",
    ),
)


def write_page(cells: Sequence[Cell], page: Path) -> None:
    """Write all there is; what has not been run is an empty row with its command."""
    others = sorted({cell["task"] for cell in cells} - set(TITLES))
    parts = [_INTRO]
    for task in (*TITLES, *others):
        mine = [cell for cell in cells if cell["task"] == task]
        parts += [f"## {TITLES.get(task, task)}\n", _table(task, mine), *_goals(mine), *_ablations(task, mine)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([*parts, _steps(cells), _beyond()]), encoding="utf-8")


def rows_of(cells: Iterable[Cell]) -> dict[str, list[Row]]:
    """One task's rows by label, a list of what each seed gave. T3C's are called ``T3C Tiny`` and so on."""
    cells = list(cells)
    times = {cell["seed"]: cell["times"] for cell in cells if cell["method"] == "latency"}
    rows: dict[str, list[Row]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        timed = times.get(cell["seed"], {})
        if cell["method"] in BASELINES:
            row = _row(cell, timed.get(f"{cell['method']}/p0"))
            rows.setdefault(BASELINES[cell["method"]].label, []).append(row)
        elif cell["method"] == "t3c":
            for profile in cell["profiles"]:
                row = _row({**profile, "store_bytes": cell["store_bytes"]}, timed.get(f"t3c/{profile['profile']}"))
                rows.setdefault(f"T3C {profile['size']}", []).append(row)
    return rows


def _row(cell: Cell, timed: Cell | None) -> Row:
    known = ("score", "drift", "bound", "held")
    row = {key: cell[key] for key in known if key in cell}
    row |= {"size_kb": cell["size_bytes"] / 1e3, "store_kb": cell["store_bytes"] / 1e3}
    return row | {key: value for key, value in (timed or {}).items() if value is not None}


def _table(task: str, cells: list[Cell]) -> str:
    rows = rows_of(cells)
    score = "perplexity" if _perplexity(cells) else "accuracy, %"
    heads = ("method", score, "p50", "p90", "batch", "size, kB", "of PTQ-8b", "drift", "certificate", "held")
    lines = [_line(*heads, "violations"), _line(*["---"] * 11)]
    seeds = {cell["seed"] for cell in cells}
    labels = {baseline.label: name for name, baseline in BASELINES.items()}
    for label in [*labels, *(f"T3C {size}" for size in SIZES)]:
        found = rows.get(label, [])
        if not found:
            method = labels.get(label, "t3c")
            lines.append(_line(label, f"`python -m benchmarks.paper --tasks {task} --methods {method}`", *[""] * 9))
            continue
        size, ptq8 = (_mean(of, "size_kb") for of in (found, rows.get("PTQ-8b", [])))
        fewer = f" ({len(found)} of {len(seeds)} seeds)" if len(found) < len(seeds) else ""
        cut = [_cell(found, "score", "{:.2f}") + fewer]
        cut += [_cell(found, key, "{:.3f}") for key in ("p50", "p90", "batch_p50")]
        cut += [f"{size:.1f}", "" if isnan(ptq8) else f"{size / ptq8:.2f}", _cell(found, "drift", "{:.2f}")]
        cut += [_cell(found, "bound", "{:.2f}"), _percent(found, "held"), _percent(found, "violations")]
        lines.append(_line(label, *cut))
    lines += ["", *(f"- **{b.label}**: {b.what}" for b in BASELINES.values()), ""]
    epochs = sorted({tuple(cell["epochs"]) for cell in cells})
    if epochs:
        lines.append(
            f"Seeds: {len(seeds)}. Epochs: "
            + "; ".join(f"{a} in float32, {b} of fine-tuning" for a, b in epochs)
            + f". Seconds on this machine: {sum(cell['seconds'] for cell in cells):.0f}.\n"
        )
    return "\n".join(lines)


def goals(cells: list[Cell]) -> list[tuple[str, str, bool | None]]:
    """What was aimed at, what was found, and whether that is reached (None: it cannot be said)."""
    rows = rows_of(cells)
    medium, ptq8, full = (rows.get(label, []) for label in ("T3C Medium", "PTQ-8b", "float32"))
    if not (medium and ptq8 and full):
        return []
    lower_is_better = _perplexity(cells)
    mine, limit = _mean(medium, "score"), _mean(medium, "size_kb")
    others = {label: found for label, found in rows.items() if not label.startswith("T3C") and label != "float32"}

    def better(label: str) -> float:
        score = _mean(others[label], "score")
        return -score if lower_is_better else score

    small = [label for label in others if _mean(others[label], "size_kb") <= limit]
    if small:
        found, reached = _against(medium, others, max(small, key=better), lower_is_better)
    else:
        least = min(others, key=lambda label: _mean(others[label], "size_kb"))
        found, reached = _against(medium, others, least, lower_is_better)
        found = f"no baseline is as small ({limit:.0f} kB); against the smallest, {found}"
    aim = "T3C Medium at least as good as the best baseline of at most its size, at 0.8 of its latency at most"
    drop = 100 * (mine / _mean(full, "score") - 1) if lower_is_better else _mean(full, "score") - mine
    unit, most = ("% of perplexity", 2.0) if lower_is_better else (" points", 0.5)
    store, dense = _mean(medium, "store_kb"), _mean(ptq8, "store_kb")
    beside = _against(medium, others, "PTQ-8b", lower_is_better)[0]
    return [
        (aim, found, reached),
        ("for comparison, T3C Medium beside PTQ-8b", beside, None),
        (f"T3C Medium loses at most {most:g}{unit} against float32", f"{drop:.2f}{unit}", drop <= most),
        (
            "all T3C profiles together are no larger than PTQ-8b, as files",
            f"{store:.0f} kB against {dense:.0f} kB",
            store <= dense,
        ),
    ]


def _against(medium: list[Row], others: dict[str, list[Row]], label: str, lower: bool) -> tuple[str, bool]:
    other = others[label]
    mine, theirs = _mean(medium, "score"), _mean(other, "score")
    ratio, batch = (_mean(medium, key) / _mean(other, key) for key in ("p50", "batch_p50"))
    text = f"{label} ({_mean(other, 'size_kb'):.0f} kB): {mine:.2f} against {theirs:.2f}, {ratio:.2f} of its p50"
    return f"{text} ({batch:.2f} in batches)", (mine <= theirs if lower else mine >= theirs) and ratio <= 0.8


def _goals(cells: list[Cell]) -> list[str]:
    said = {True: "reached", False: "**missed**", None: ""}
    lines = [_line(aim, text, said[reached]) for aim, text, reached in goals(cells)]
    return ["\n".join([_line("aim", "found", ""), _line(*["---"] * 3), *lines, ""])] if lines else []


def _ablations(task: str, cells: list[Cell]) -> list[str]:
    cells = [cell for cell in cells if cell["method"] in VARIANTS and cell["method"] != "t3c"]
    if not cells:
        command = f"`{_COMMAND} --tasks {task} --seeds 1 --ablations`"
        return [f"Without one of T3C's parts: {command}\n"]
    methods = {cell["method"] for cell in cells}
    seeds = set.intersection(*({c["seed"] for c in cells if c["method"] == method} for method in methods))
    lines = [f"Without one of T3C's parts (seeds {', '.join(map(str, sorted(seeds)))}): score, kB and certificate\n"]
    lines += [_line("", *SIZES), _line(*["---"] * 6)]
    for method, variant in VARIANTS.items():
        mine = [cell for cell in cells if cell["method"] == method and cell["seed"] in seeds]
        if mine:
            places = [[cell["profiles"][place] for cell in mine] for place in range(len(SIZES))]
            cut = [
                f"{mean(p['score'] for p in of):.2f}; {mean(p['size_bytes'] for p in of) / 1e3:.0f}; "
                f"{mean(p['bound'] for p in of):.2f}"
                for of in places
            ]
            lines.append(_line(variant.what, *cut))
    return ["\n".join([*lines, ""])]


def _steps(cells: Sequence[Cell]) -> str:
    lines = [
        "## A training step\n",
        "Milliseconds of a step on one batch, mean, in turn; the aims are a ratio of 1.5 and a certificate of 3%.\n",
    ]
    lines += [_line("task", "plain fine-tuning", "T3C", "ratio", "of which the certificate"), _line(*["---"] * 5)]
    timed = {cell["task"]: cell for cell in cells if cell["method"] == "steps"}
    for task in TITLES:
        if task in timed:
            cell = timed[task]
            times = f"{cell['plain_ms']:.1f}", f"{cell['elastic_ms']:.1f}", f"{cell['ratio']:.2f}"
            lines.append(_line(task, *times, f"{cell['certificate_share']:.1%}"))
        else:
            lines.append(_line(task, f"`python -m benchmarks.paper --tasks {task} --seeds 1 --steps`", "", "", ""))
    lines.append(
        "\nA third of T3C's steps trains the full model, a third the least options and a third sampled ones, the last "
        "two on the batch that the full model was last trained on, taught by the logits it had there; a sampled one in "
        "four measures a layer for the certificate.\n"
    )
    return "\n".join(lines)


def _beyond() -> str:
    lines = [_line("of the paper", "here", "what it takes"), _line(*["---"] * 3)]
    lines += [_line(paper, here, takes.format(_COMMAND)) for paper, here, takes in _BEYOND]
    return "\n".join(["## What the paper has beyond this\n", *lines, ""])


def _perplexity(cells: list[Cell]) -> bool:
    return any(cell["metric"] == "perplexity" for cell in cells)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _values(rows: list[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def _mean(rows: list[Row], key: str) -> float:
    values = _values(rows, key)
    return mean(values) if values else float("nan")


def _cell(rows: list[Row], key: str, form: str) -> str:
    values = _values(rows, key)
    if not values:
        return ""
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def _percent(rows: list[Row], key: str) -> str:
    values = _values(rows, key)
    return f"{100 * mean(values):.1f}%" if values else ""
