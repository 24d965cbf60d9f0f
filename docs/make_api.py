"""Writes docs/api.md from the docstrings of the package: python docs/make_api.py

Sources are parsed, not imported, so that the page does not depend on the versions that are installed.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

INTRODUCTION = """# API reference

Generated from the docstrings by `python docs/make_api.py`; do not edit. Shapes are in brackets, in the order in which
the tensor stores them. The names in the first section can be imported from `lkq_hf` itself.
"""

# What a user calls, by the module in which it is written.
SECTIONS: dict[str, list[tuple[str, list[str]]]] = {
    "The main names": [
        ("lkq_hf.cache.cache", ["LookaheadCache"]),
        ("lkq_hf.cache.evicted", ["EvictedCache"]),
        ("lkq_hf.cache.prepare", ["prepare_model_for_eviction"]),
        ("lkq_hf.adapter.config", ["LookaheadKVConfig"]),
        ("lkq_hf.adapter.model", ["LookaheadKVModel"]),
        ("lkq_hf.training.arguments", ["LookaheadTrainingArguments"]),
        ("lkq_hf.training.trainer", ["LookaheadTrainer"]),
        ("lkq_hf.quantization.config", ["TwoStageGPTQConfig", "AdvancedOptions"]),
        ("lkq_hf.quantization.solve", ["SolverSwitches"]),
        ("lkq_hf.quantization.optimum_quantizer", ["TwoStageQuantizer"]),
        ("lkq_hf.shipped", ["shipped_adapter"]),
    ],
    "Scorers": [
        ("lkq_hf.scoring.base", ["PrefillAttention", "Scorer"]),
        ("lkq_hf.scoring.lookahead", ["LookaheadScorer"]),
        ("lkq_hf.scoring.snapkv", ["SnapKVScorer"]),
        ("lkq_hf.scoring.streaming", ["StreamingScorer"]),
        ("lkq_hf.scoring.random", ["RandomScorer"]),
        ("lkq_hf.scoring.oracle", ["OracleScorer"]),
    ],
    "Training data": [
        ("lkq_hf.training.prompts", ["PromptMix", "split_documents", "build_prompts"]),
        ("lkq_hf.training.targets", ["generate_targets", "load_targets"]),
        ("lkq_hf.text.documents", ["read_documents"]),
    ],
    "Quantized checkpoints": [
        ("lkq_hf.quantization.calibration_data", ["calibration_tokens"]),
        ("lkq_hf.quantization.export", ["export_checkpoint"]),
    ],
    "Evaluation": [
        ("lkq_hf.evaluation.eviction", ["EvictionEvaluator", "evaluate_eviction", "summarise"]),
        ("lkq_hf.evaluation.divergence", ["token_statistics"]),
        ("lkq_hf.evaluation.perplexity", ["text_windows", "token_nlls", "evaluate_perplexity"]),
        ("lkq_hf.evaluation.journal", ["Journal"]),
        ("lkq_hf.evaluation.tasks", ["build_task"]),
        ("lkq_hf.text.passages", ["Corpus"]),
        ("lkq_hf.evaluation.tasks.base", ["Task"]),
        ("lkq_hf.evaluation.tables", ["eviction_table"]),
        ("lkq_hf.evaluation.metrics", ["metric_path", "load_metric"]),
    ],
    "Looking inside": [
        ("lkq_hf.inspection.collect", ["inspect_eviction"]),
        ("lkq_hf.inspection.figure", ["plot_kept"]),
        ("lkq_hf.inspection.report", ["render_report"]),
    ],
    "The Hub": [
        ("lkq_hf.hub.push", ["push_to_hub"]),
        ("lkq_hf.hub.load", ["load_adapter"]),
        ("lkq_hf.adapter.injection", ["inject_adapter", "remove_adapter"]),
        ("lkq_hf.sharing.cards", ["write_card"]),
        ("lkq_hf.sharing.results", ["read_results"]),
    ],
}

Definition = ast.ClassDef | ast.FunctionDef


def find(module: str, name: str) -> Definition:
    """The definition of a name at the top of a module."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, Definition) and node.name == name:
            return node
    raise LookupError(f"{module} does not define {name}: correct SECTIONS in {Path(__file__).name}")


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}


def signature(name: str, node: Definition) -> str:
    """How the thing is called, one parameter a line where it does not fit into one."""
    if isinstance(node, ast.FunctionDef):
        parameters, returns = list_parameters(node.args), node.returns
    elif decorators(node) & {"dataclass"}:
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
        parameters = [field_text(field) for field in fields if not ast.unparse(field.target).startswith("_")]
        returns = None
    else:
        constructors = [p for p in node.body if isinstance(p, ast.FunctionDef) and p.name == "__init__"]
        if not constructors:
            return name  # it is called as its base class is
        parameters, returns = list_parameters(constructors[0].args), None
    arrow = f" -> {ast.unparse(returns)}" if returns is not None else ""
    line = f"{name}({', '.join(parameters)}){arrow}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){arrow}"


def list_parameters(arguments: ast.arguments) -> list[str]:
    """Parameters as they are written, without `self`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [parameter(*pair) for pair in zip(positional, defaults, strict=True) if pair[0].arg not in ("self", "cls")]
    if arguments.vararg:
        found.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        found.append("*")
    found += [parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*found, f"**{arguments.kwarg.arg}"] if arguments.kwarg else found


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation else "")
    equals = " = " if argument.annotation else "="
    return text if default is None else f"{text}{equals}{ast.unparse(default)}"


def field_text(field: ast.AnnAssign) -> str:
    """A field of a dataclass as a parameter; `field(default=1, ...)` is a default of 1."""
    text, value = f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}", field.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((k.value for k in value.keywords if k.arg == "default"), ast.Constant(...))
    return text if value is None else f"{text} = {ast.unparse(value)}"


def markdown(docstring: str) -> str:
    """A docstring with sections (`Args:`, `Raises:`) as Markdown."""
    text = re.sub(r":[a-z]+:`~?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", docstring)
    text = re.sub(r"(?<!`)``(?!`)", "`", text)
    lines: list[str] = []
    in_section = in_code = False
    for line in text.splitlines():
        heading = re.fullmatch(r"(Args|Attributes|Returns|Raises|Example|Yields):", line)
        if heading:
            in_section = True
            lines += [f"**{heading[1]}**", ""]
        elif line.lstrip().startswith((">>> ", "... ")):
            if not in_code:
                lines.append("```python")
            in_code = True
            lines.append(line.lstrip()[4:])
            continue
        elif not in_section or not line.startswith("    "):
            in_section = in_section and not line
            lines.append(line)
        elif line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            entry = re.fullmatch(r"    ([\w*, ]+?)( \([^)]*\))?: (.*)", line)
            lines.append(f"- `{entry[1]}`{entry[2] or ''}: {entry[3]}" if entry else line.strip())
        if in_code:
            lines.insert(-1, "```")
            in_code = False
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, "```"] if in_code else lines)).strip()


def describe(title: str, name: str, node: Definition) -> list[str]:
    return [title, f"```text\n{signature(name, node)}\n```", markdown(ast.get_docstring(node) or "")]


def members(node: ast.ClassDef) -> list[str]:
    """The methods and properties that have a docstring."""
    parts = []
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_") or not ast.get_docstring(member):
            continue
        if decorators(member) & {"property"}:
            parts += [f"#### `{node.name}.{member.name}`", markdown(ast.get_docstring(member) or "")]
        else:
            parts += describe(f"#### `{node.name}.{member.name}`", member.name, member)
    return parts


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION.strip()]
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}")
        for module, names in modules:
            for name in names:
                node = find(module, name)
                parts += describe(f"### `{name}`\n\n`{module}`", name, node)
                if isinstance(node, ast.ClassDef):
                    parts += members(node)
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
