"""Training a lookahead adapter: prompts, the model's own responses, the loss, the trainer."""

from lkq_hf.training.arguments import LookaheadTrainingArguments
from lkq_hf.training.data import TargetCollator
from lkq_hf.training.prompts import PromptMix, build_prompts, split_documents
from lkq_hf.training.targets import generate_targets, load_targets
from lkq_hf.training.trainer import LookaheadTrainer

__all__ = [
    "LookaheadTrainer",
    "LookaheadTrainingArguments",
    "PromptMix",
    "TargetCollator",
    "build_prompts",
    "generate_targets",
    "load_targets",
    "split_documents",
]
