"""Arguments of the training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from lkq_hf.training.soft_allocation import SOFT_ALLOCATIONS


@dataclass
class LookaheadTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with what is particular to lookahead adapters.

    Args:
        max_prompt_length: longer prompts lose tokens from their middle; None for no limit.
        max_response_length: longer responses are cut; None for no limit.
        importance_heads: "query" compares the importance per query head, as the paper does; "kv" compares its mean
            over the query heads of each KV head, which is what eviction ranks by.
        importance_power: importance is raised to this power before it is compared; 1 is the paper's objective.
        eviction_weight: weight of a second objective: how far the model's predictions over the evicted cache are from
            those over the full one (`lkq_hf.training.eviction`). 0, as in the paper, leaves it out; it needs the
            attention implementation "sdpa" or "eager".
        eviction_budgets: smallest and largest budget of that objective; each step draws one, log-uniformly.
        eviction_temperature: softness of that objective's choice of entries, see
            `soft_top_k`.
        eviction_allocation: how that objective shares a budget out among heads, as the adapter will be used:
            "global", "layer" or "uniform", see `LookaheadCache`. "profile" follows from "global".
        recompute: read each layer again in the backward pass, instead of holding what it computed. Needs a fraction
            of the memory and takes one more pass of the response and of the lookahead tokens.
        recall_budgets: budgets for which the evaluation reports the recall of the most important entries.

    The defaults are the best of the recorded runs (docs/training-an-adapter.md). The paper (LookaheadKV, arXiv
    2603.10899) has a learning rate of 1e-3, an importance power of 1, and no second objective.
    """

    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up, in steps or as a share of all steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The data set's columns are all used."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Prompts of similar length share a batch."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "All parameters of an adapter get a gradient, so DDP need not search."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts lose tokens in the middle."})
    max_response_length: int | None = field(default=512, metadata={"help": "Longer responses are cut."})
    importance_heads: str = field(
        default="query", metadata={"help": "Heads whose importance is compared.", "choices": ["query", "kv"]}
    )
    importance_power: float = field(
        default=1.5, metadata={"help": "Power of the importance that is compared; 1 as in the paper."}
    )
    eviction_weight: float = field(default=0.5, metadata={"help": "Weight of what the response loses; 0: paper."})
    eviction_budgets: list[int] = field(
        default_factory=lambda: [48, 320], metadata={"help": "Smallest and largest budget of that objective."}
    )
    eviction_temperature: float = field(default=0.1, metadata={"help": "Softness of the entries' choice."})
    eviction_allocation: str = field(
        default="global",
        metadata={"help": "How that objective shares a budget out.", "choices": list(SOFT_ALLOCATIONS)},
    )
    recompute: bool = field(default=True, metadata={"help": "Recompute each layer in the backward pass."})
    recall_budgets: list[int] = field(
        default_factory=lambda: [64, 128, 256], metadata={"help": "Budgets for recall in the evaluation."}
    )

    @property
    def n_gpu(self) -> int:
        """At most 1: a process trains on one GPU, and several GPUs take one process each (``accelerate launch``)."""
        # transformers would take all that it sees, by nn.DataParallel, whose copies of a model know nothing of each
        # other's hooks.
        return min(super().n_gpu, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_heads not in ("query", "kv"):
            raise ValueError(f'importance_heads must be "query" or "kv", got {self.importance_heads!r}')
        if not 0 < self.importance_power <= 4:
            raise ValueError(f"importance_power must be above 0 and at most 4, got {self.importance_power}")
        if self.eviction_weight < 0 or not self.eviction_temperature > 0:
            raise ValueError(
                "eviction_weight must not be negative and eviction_temperature must be positive, got "
                f"{self.eviction_weight} and {self.eviction_temperature}"
            )
        if self.eviction_allocation not in SOFT_ALLOCATIONS:
            raise ValueError(
                f"eviction_allocation must be one of {', '.join(SOFT_ALLOCATIONS)}, got {self.eviction_allocation!r}"
            )
        if len(self.eviction_budgets) != 2 or not 1 <= self.eviction_budgets[0] <= self.eviction_budgets[1]:
            raise ValueError(
                f"eviction_budgets must be a smallest and a largest budget, at least 1, got {self.eviction_budgets}"
            )
