"""A figure for notebooks."""

from typing import TYPE_CHECKING

from lkq_hf.evaluation.plots import draw_entries, new_figure
from lkq_hf.inspection.collect import Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_kept(inspection: Inspection) -> "Figure":
    """Where the budget went: two maps for each scorer, with the layers down.

    On the left, which part of a layer's heads keeps each token of the prompt. On the right, how many entries each head
    keeps, as a multiple of the budget.

    Raises:
        ImportError: matplotlib is not installed.
    """
    count = len(inspection.kept)
    figure = new_figure(10.5, 1.2 + 1.7 * count)
    grid = figure.subplots(count, 2, squeeze=False, sharex="col", width_ratios=[6, 1])
    axes, right = grid[:, 0], grid[:, 1]
    for panel, by_head, (name, kept) in zip(axes, right, inspection.kept.items(), strict=True):
        draw_entries(by_head, inspection.entries(name).tolist(), inspection.budget)
        by_head.set_yticks([])
        by_head.set_title("entries", fontsize=9)
        share = kept.float().mean(1).numpy()
        panel.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="antialiased")
        ticks = range(0, len(inspection.layers), max(1, len(inspection.layers) // 6))
        panel.set_yticks(list(ticks), [str(inspection.layers[tick]) for tick in ticks])
        panel.set_ylabel("layer")
        panel.set_title(f"{name}, budget {inspection.budget} of {len(inspection.pieces):,} tokens", fontsize=9)
    axes[-1].set_xlabel("token of the prompt")
    right[-1].set_xlabel("KV head")
    figure.colorbar(axes[0].images[0], ax=axes, label="share of the layer's heads that keep it", shrink=0.9)
    figure.colorbar(right[0].images[0], ax=right, label="entries kept, times the budget", shrink=0.9)
    return figure
