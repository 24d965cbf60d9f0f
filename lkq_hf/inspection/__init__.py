"""Looking inside an eviction: which entries of one prompt are kept, as data, as a figure and as an HTML page."""

from lkq_hf.inspection.collect import Inspection, inspect_eviction
from lkq_hf.inspection.figure import plot_kept
from lkq_hf.inspection.report import render_report

__all__ = ["Inspection", "inspect_eviction", "plot_kept", "render_report"]
