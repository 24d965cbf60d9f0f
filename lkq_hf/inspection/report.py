"""One self-contained HTML page about one eviction."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch

import lkq_hf
from lkq_hf.cache.allocation import MOST
from lkq_hf.inspection.collect import ORACLE, Inspection

ASSETS = Path(__file__).parent
NAMES = {"lookahead": "lookahead", "snapkv": "SnapKV", "streaming": "sinks + recent", ORACLE: "oracle"}

ALLOCATIONS = {
    "global": "The heads of all layers compete for them",
    "layer": "The heads of each layer compete for them",
    "uniform": "Each head keeps the same number",
    "profile": "How many each head keeps is fixed by the adapter's config",
}
"""How entries are shared out, as the beginning of a sentence."""

ORACLE_NOTE = (
    '<p class="note">The oracle keeps what the full cache\'s own answer attends to. No scorer can know that: it shows '
    "what the budget allows.</p>"
)


def render_report(inspection: Inspection) -> str:
    """The page as HTML. It loads nothing, and the prompt's text in it is only text."""
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    first = next(iter(inspection.kept))
    counts = inspection.counts(first)
    saved = 1 - inspection.kept_bytes / inspection.full_bytes
    values = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "script": script,
        "data": _json(_data(inspection)),
        "model": html.escape(inspection.model),
        "adapter": f" with the adapter {html.escape(inspection.adapter)}" if inspection.adapter else "",
        "first": html.escape(_name(first)),
        "budget": f"{inspection.budget:,}",
        "length": f"{len(inspection.pieces):,}",
        "heads": f"{inspection.heads:,}",
        "heads_in_layer": f"{inspection.heads // len(inspection.layers):,}",
        "layers": f"{len(inspection.layers):,}",
        "kept_bytes": _mebibytes(inspection.kept_bytes),
        "full_bytes": _mebibytes(inspection.full_bytes),
        "saved": f"{saved:.1%}",
        "no_head": f"{(counts == 0).float().mean().item():.0%}",
        "modes": _modes(list(inspection.kept)),
        "layer_options": "".join(f'<option value="{i}">{layer}</option>' for i, layer in enumerate(inspection.layers)),
        "tokens": _tokens(inspection.pieces, counts / inspection.heads),
        "layer_ticks": _ticks("layers", "top", {i: str(layer) for i, layer in enumerate(inspection.layers)}),
        "token_ticks": _ticks("tokens", "left", {i: f"{i + 1:,}" for i in range(len(inspection.pieces))}),
        "spread": _spread(inspection),
        "by_head_tables": _by_head(inspection),
        "how": ALLOCATIONS[inspection.allocation],
        "comparison": _comparison(inspection),
        "oracle_note": ORACLE_NOTE if ORACLE in inspection.kept else "",
        "by_layer": _by_layer(inspection),
        "answers": _answers(inspection.answers),
        "version": html.escape(lkq_hf.__version__),
    }
    return _fill((ASSETS / "report.html").read_text(encoding="utf-8"), values)


def _fill(template: str, values: Mapping[str, str]) -> str:
    # In one pass: what was filled in is not looked at again, whatever the prompt holds.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data).replace("<", "\\u003c")


def _data(inspection: Inspection) -> dict[str, object]:
    return {
        "length": len(inspection.pieces),
        "heads": next(iter(inspection.kept.values())).shape[1],
        "layers": inspection.layers,
        "names": {name: _name(name) for name in inspection.kept},
        # One bit for each layer, head and token.
        "kept": {name: _bits(kept) for name, kept in inspection.kept.items()},
    }


def _bits(kept: torch.Tensor) -> str:
    return base64.b64encode(numpy.packbits(kept.flatten().numpy(), bitorder="little").tobytes()).decode()


def _name(scorer: str) -> str:
    return NAMES.get(scorer, scorer)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _modes(scorers: list[str]) -> str:
    first, *others = scorers
    modes = {name: _name(name) for name in scorers}
    modes |= {f"{first}-{other}": f"{_name(first)} against {_name(other)}" for other in others}
    return "".join(
        f'<label><input type="radio" name="mode" value="{html.escape(mode)}"{" checked" if mode == first else ""}> '
        f"{html.escape(title)}</label>"
        for mode, title in modes.items()
    )


def _tokens(pieces: list[str], shares: torch.Tensor) -> str:
    spans = []
    for piece, share in zip(pieces, shares.tolist(), strict=True):
        kind = ' class="n"' if "\n" in piece else ' class="e"' if not piece else ""
        spans.append(f'<span{kind} style="--k:{share**0.5:.3f}">{_visible(piece)}</span>')
    return "".join(spans)


def _visible(text: str) -> str:
    """Escaped, and with a sign in the place of characters that HTML does not allow."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text.replace("\r", "")))


def _ticks(kind: str, side: str, labels: Mapping[int, str], count: int = 6) -> str:
    """Labels of an axis at the middle of their cells: the first, the last, and some between."""
    last = len(labels) - 1
    shown = sorted({round(last * step / (count - 1)) for step in range(count)})
    spans = "".join(
        f'<span style="{side}:{100 * (index + 0.5) / len(labels):.2f}%">{labels[index]}</span>' for index in shown
    )
    return f'<div class="ticks {kind}" aria-hidden="true">{spans}</div>'


def _comparison(inspection: Inspection) -> str:
    first = next(iter(inspection.kept))
    rows = []
    for name in inspection.kept:
        cells = [_percent(inspection.overlap(name, first).mean().item()) if name != first else ""]
        cells.append(f"{(inspection.counts(name) == 0).float().mean().item():.0%}")
        if ORACLE in inspection.kept:
            cells.append(_percent(inspection.overlap(name, ORACLE).mean().item()) if name != ORACLE else "")
        mass = inspection.attention_kept(name)
        if mass is not None:
            cells.append(_percent(mass.mean().item()))
        rows.append(f'<tr><th scope="row">{html.escape(_name(name))}</th>' + _cells(cells) + "</tr>")
    titles = [f"of {_name(first)}'s entries, also kept", "tokens that no head keeps"]
    titles += ["of the oracle's entries, also kept"] if ORACLE in inspection.kept else []
    titles += ["of the answer's attention, kept"] if inspection.attention is not None else []
    return _table("", titles, rows)


def _spread(inspection: Inspection) -> str:
    """For each scorer least, mean and most of heads, and of layers."""
    rows = []
    for name in inspection.kept:
        entries = inspection.entries(name).float()
        layers = entries.mean(1)
        numbers = [entries.min(), entries.mean(), entries.max(), layers.min(), layers.max()]
        cells = _cells([f"{number.item():,.0f}" for number in numbers])
        rows.append(f'<tr><th scope="row">{html.escape(_name(name))}</th>{cells}</tr>')
    titles = ["least of a head", "mean", "most of a head", "least of a layer, per head", "most of a layer, per head"]
    return _table("", titles, rows)


def _by_head(inspection: Inspection) -> str:
    """For each scorer a table of what each head keeps, shaded; that of the first one is open."""
    parts = []
    for place, name in enumerate(inspection.kept):
        entries = inspection.entries(name)
        rows = []
        for layer, counts in zip(inspection.layers, entries.tolist(), strict=True):
            # Square root, as in the maps: small numbers differ visibly.
            cells = "".join(
                f'<td class="heat" style="--n:{(count / (MOST * inspection.budget)) ** 0.5:.3f}">{count:,}</td>'
                for count in counts
            )
            rows.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
        titles = [f"head {head}" for head in range(entries.shape[1])]
        parts.append(
            f"<details{'' if place else ' open'}><summary>{html.escape(_name(name))}: entries of each head</summary>"
            f'<div class="wide">{_table("layer", titles, rows)}</div></details>'
        )
    return "".join(parts)


def _by_layer(inspection: Inspection) -> str:
    first, *others = inspection.kept
    titles, columns = [], []
    for other in others:
        titles.append(f"{_name(first)} keeps, of {_name(other)}'s")
        columns.append(inspection.overlap(first, other).tolist())
    for name in inspection.kept:
        mass = inspection.attention_kept(name)
        if mass is not None:
            titles.append(f"attention kept by {_name(name)}")
            columns.append(mass.tolist())
    rows = [
        f'<tr><th scope="row">{layer}</th>' + _cells([_percent(column[index]) for column in columns]) + "</tr>"
        for index, layer in enumerate(inspection.layers)
    ]
    return _table("layer", titles, rows)


def _table(corner: str, titles: list[str], rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in titles)
    corner = f'<th scope="col">{corner}</th>' if corner else "<td></td>"
    return f"<table><thead><tr>{corner}{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cells(values: list[str]) -> str:
    return "".join(f"<td>{value}</td>" for value in values)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _answers(answers: Mapping[str, str]) -> str:
    if not answers:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(_name(name))}</th><td class="answer">{_visible(answer)}</td></tr>'
        for name, answer in answers.items()
    )
    return f'<section><h2>Answers</h2><table class="answers"><tbody>{rows}</tbody></table></section>'
