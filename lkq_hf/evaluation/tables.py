"""Results as tables that read well on a terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "answer_match": "right",
    "word_f1": "F1 to full",
    "agreed_prefix": "same prefix",
    "token_agreement": "tokens matched",
    "nll": "NLL",
    "nll_gap": "NLL gap",
    "topk_recall": "top-k recall",
    "retained_attention_mass": "attention kept",
    "kv_bytes": "KV MiB",
    "entries_least": "least of a head",
    "entries_most": "most of a head",
}
"""Columns of `eviction_table`, and their titles."""


def table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Rows as a Markdown table with aligned columns.

    Args:
        rows: values by column; one that a row lacks, or that is None, is left empty.
        titles: the columns that are shown, and their titles. A column that no row has is left out.
    """
    shown = {key: title for key, title in titles.items() if any(row.get(key) is not None for row in rows)}
    lines = [list(shown.values()), *([_text(row.get(key)) for key in shown] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    numeric = [all(not isinstance(row.get(key), str) for row in rows) for key in shown]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    lines.insert(1, rule)
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        + " |"
        for line in lines
    )


def eviction_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summarise`: a table for each task and length."""
    parts = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        group = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        shown = [row | {"kv_bytes": row["kv_bytes"] / 2**20} for row in map(dict, group)]
        count = group[0]["examples"]
        parts.append(f"{task}, {length} tokens, {count} prompt{'s' if count > 1 else ''}")
        parts.append(table(shown, {"budget": "budget", "scorer": "scorer"} | TITLES))
    return "\n\n".join(parts)


def perplexity_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `evaluate_perplexity`."""
    titles = {
        "windows": "windows",
        "tokens": "tokens",
        "nll": "NLL",
        "perplexity": "perplexity",
        "kl": "KL to reference",
        "kl_p99": "KL, 99th percentile",
        "same_top": "same top token",
    }
    return table(rows, titles)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
