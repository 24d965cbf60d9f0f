"""Tasks made from any text: seeded, of an exact number of tokens, through the model's own chat template.

corpus = Corpus(documents, tokenizer)
for example in build_task("needle_multi_key", corpus).examples(50, length=2048):
    ...
"""

from lkq_hf.evaluation.tasks.base import Example, Task
from lkq_hf.evaluation.tasks.needles import Needle, NeedleMultiKey, NeedleMultiValue
from lkq_hf.evaluation.tasks.reading import Continue, Explain, ParagraphQuestion, QuestionAnswering, Summarise
from lkq_hf.evaluation.tasks.tracking import FrequentWords, VariableTracking
from lkq_hf.text.passages import Corpus

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        Needle,
        NeedleMultiKey,
        NeedleMultiValue,
        VariableTracking,
        FrequentWords,
        ParagraphQuestion,
        Explain,
        Summarise,
        Continue,
    )
}
"""Tasks that need nothing but text, by name; `QuestionAnswering` also needs questions."""


def build_task(name: str, corpus: Corpus, seed: int = 0) -> Task:
    """The task of that name over a corpus.

    Raises:
        ValueError: no task has that name.
    """
    if name not in TASKS:
        hint = " (build QuestionAnswering with your questions)" if name == QuestionAnswering.kind else ""
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}{hint}")
    return TASKS[name](corpus, seed)


__all__ = ["TASKS", "Corpus", "Example", "QuestionAnswering", "Task", "build_task"]
