"""Writes the table and the plots of ``docs/performance.md`` from a results file.

python -m benchmarks.report benchmarks/results/h200.json
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table: benchmarks.report -->", "<!-- end of table -->"

#: Columns of other engines, in the names of the anchors file.
OTHERS = ("sglang_new", "vllm")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def fastest(anchor_us: dict[str, float], base: bool) -> float | None:
    """The best of the others, with or without LoRA."""
    return min(
        (us for name, us in anchor_us.items() if name.endswith("base") == base), default=None
    )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines; microseconds per layer."""
    lines = [
        "| model | tokens | rank | layout | base | their base | LoRA | SGLang | vLLM | roofline "
        "| LoRA / roofline | error |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        anchor = row.get("anchor_us", {})
        numbers = [
            row["base"]["us"],
            fastest(anchor, base=True),
            row["lora"]["us"],
            *(anchor.get(name) for name in OTHERS),
            row["roofline_us"],
        ]
        cells = [
            row["model"],
            row["tokens"],
            row["rank"],
            row["layout"],
            *("" if number is None else f"{number:.1f}" for number in numbers),
            f"{row['lora']['us'] / row['roofline_us']:.2f}",
            f"{row['lora']['error']:.1e}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric means per token count."""
    lines = [
        "| tokens | LoRA / roofline | best other / roofline | LoRA / best other | points won |",
        "|--:|--:|--:|--:|--:|",
    ]
    groups: list[tuple[Any, list[dict[str, Any]]]] = [
        (tokens, [row for row in rows if row["tokens"] == tokens])
        for tokens in sorted({row["tokens"] for row in rows})
    ]
    for name, group in [*groups, ("all", list(rows))]:
        ours = geometric_mean(row["lora"]["us"] / row["roofline_us"] for row in group)
        compared = [row for row in group if row.get("anchor_us")]
        # Routing is drawn at random, and not with their draw: each is divided by its own roofline.
        own = [row["lora"]["us"] / row["roofline_us"] for row in compared]
        best = [
            (fastest(row["anchor_us"], base=False) or math.nan) / row["anchor_roofline_us"]
            for row in compared
        ]
        ratio = geometric_mean(a / b for a, b in zip(own, best, strict=True))
        won = sum(a <= b for a, b in zip(own, best, strict=True))
        lines.append(
            f"| {name} | {ours:.2f} | {geometric_mean(best):.2f} | {ratio:.2f} "
            f"| {won} of {len(compared)} |"
        )
    return lines


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Multiples of the roofline over tokens, one panel per model; needs matplotlib."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["rank"] == 16 and row["layout"] == "per_expert"]
    models = sorted({row["model"] for row in rows})
    figure, panels = plt.subplots(1, len(models), figsize=(4 * len(models), 3.5), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in mine]
        panel.plot(tokens, [row["lora"]["us"] / row["roofline_us"] for row in mine], "o-")
        for name in OTHERS:
            known = [row for row in mine if name in row.get("anchor_us", {})]
            panel.plot(
                [row["tokens"] for row in known],
                [row["anchor_us"][name] / row["anchor_roofline_us"] for row in known],
                "x--",
            )
        panel.axhline(1, color="gray", linewidth=1)
        panel.set(title=model, xlabel="tokens of the batch", xscale="log", ylim=(0, 4.5))
        panel.set_xticks(tokens, map(str, tokens))
        panel.minorticks_off()
    panels[0][0].set_ylabel("LoRA time / roofline (rank 16)")
    names = ["this project", "SGLang (newest engine)", "vLLM 0.33", "roofline"]
    figure.legend(names, loc="lower center", ncol=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(folder / "performance.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", action="store_true", help="also docs/performance.png")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    rows = results["rows"]
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    origin = f"`{arguments.results.name}`: {results['setup']}; {results['date']}; "
    origin += f"`{results['command']}`"
    lines = [BEGIN, "", origin, "", *summary(rows), "", *table(rows), "", END]
    DOCUMENT.write_text(before + "\n".join(lines) + after, encoding="utf-8")
    if arguments.plot:
        plot(rows, DOCUMENT.parent)


if __name__ == "__main__":
    main()
