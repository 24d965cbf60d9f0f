"""A figure for notebooks."""

from typing import TYPE_CHECKING

from lkq_hf.evaluation.plots import new_figure
from lkq_hf.inspection.collect import Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_kept(inspection: Inspection) -> "Figure":
    """Which part of each layer's heads keeps each token: one map for each scorer, layers down and the prompt across.

    Raises:
        ImportError: matplotlib is not installed.
    """
    count = len(inspection.kept)
    figure = new_figure(9, 1.2 + 1.7 * count)
    axes = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, kept) in zip(axes, inspection.kept.items(), strict=True):
        share = kept.float().mean(1).numpy()
        panel.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="antialiased")
        ticks = range(0, len(inspection.layers), max(1, len(inspection.layers) // 6))
        panel.set_yticks(list(ticks), [str(inspection.layers[tick]) for tick in ticks])
        panel.set_ylabel("layer")
        panel.set_title(f"{name}, budget {inspection.budget} of {len(inspection.pieces):,} tokens", fontsize=9)
    axes[-1].set_xlabel("token of the prompt")
    figure.colorbar(axes[0].images[0], ax=axes, label="share of the layer's heads that keep it", shrink=0.9)
    return figure
