"""Sharing adapters and quantized checkpoints on the Hub: cards, pushing, and loading with clear errors."""

from lkq_hf.cache.sharing import push_cache
from lkq_hf.hub.complete import check_complete
from lkq_hf.hub.load import adapter_config, load_adapter
from lkq_hf.hub.push import push_to_hub
from lkq_hf.sharing.cards import render_card, write_card, write_draft, write_training_record
from lkq_hf.sharing.contents import Contents, read_contents
from lkq_hf.sharing.results import read_results

__all__ = [
    "Contents",
    "adapter_config",
    "check_complete",
    "load_adapter",
    "push_cache",
    "push_to_hub",
    "read_contents",
    "read_results",
    "render_card",
    "write_card",
    "write_draft",
    "write_training_record",
]
