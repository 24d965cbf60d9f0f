"""Every snippet of README.md and docs/, run from top to bottom, page by page, as a reader would run it.

Each page gets a directory in which the models and files that the pages name exist: ``HuggingFaceTB/...`` and ``MODEL``
are a tiny random model, ``ADAPTER`` an adapter for it. So the snippets run unchanged, but for options that make long
commands short (SMALLER). What is not run is named, with the reason, in NOT_RUN and RUN_ELSEWHERE, and is checked as
far as it can be.
"""

import ast
import configparser
import importlib.util
import inspect
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from real_models import smollm2_directory
from small_checkpoint import save_small_checkpoint, save_texts

from lkq_hf.cli import app, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER = "model_cards/smollm2-135m-instruct-lookahead"

RUN_ELSEWHERE = {"sharing-on-the-hub.md": "tests/hub/test_documentation.py"}
"""Pages that need a Hub: the test named here runs them against one on loopback."""

NOT_RUN = {
    "make": "builds an environment of its own",
    "bash": "needs two GPUs",
    "pip": "installs packages",
    "python": "an example or the lm-eval harness: tests/examples and tests/evaluation run these",
    "accelerate": "starts processes of its own: tests/evaluation and tests/training run several",
    "torchrun": "starts processes of its own: tests/evaluation and tests/training run several",
    "vllm": "vLLM needs a GPU",
    "gptqmodel": "GPTQModel needs an environment of its own: tests/quantization/test_export.py runs it there",
}
"""First words of shell commands and modules of Python snippets that are not run here, and why."""

SMALLER = {
    "evaluate eviction": "--length 640 --examples 1 --device cpu",
    "evaluate perplexity": "--max-windows 2 --device cpu",
    "inspect": "--max-new-tokens 4 --device cpu",
    "profile": "--count 2 --device cpu",
    "generate-targets": "--count 4 --validation-count 2 --max-length 512 --max-new-tokens 4 --dtype float32 "
    "--device cpu",
    "train": "--count 4 --max-length 512 --max-new-tokens 4 --max-steps 1 --judge-prompts 2 --profile-prompts 2 "
    "--device-batch-size 2 --dtype float32 --device cpu",
    "quantize": "--num-samples 4 --model-seqlen 64 --device cpu",
}
"""Options added to a command; the last value of an option counts."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in found]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def imports(text: str) -> list[tuple[str, ast.Import | ast.ImportFrom]]:
    """The modules that a snippet imports, each with its statement."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node))
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_small_checkpoint(directory / "base", directory / "adapter")
    return directory


@pytest.fixture
def furnished(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the models and files that the pages name exist."""
    for name, kind in ((MODEL_NAME, "base"), ("MODEL", "base"), (ADAPTER, "adapter"), ("ADAPTER", "adapter")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(checkpoint / kind)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "targets").mkdir()  # of commands that are parsed only
    # Of `train`, which has no option for it.
    train = sys.modules["lkq_hf.cli.train"]
    make_targets = train.make_targets
    monkeypatch.setattr(train, "make_targets", lambda options: make_targets(replace(options, validation_count=2)))
    # The adapter that comes with the package is one for the tiny model, too.
    monkeypatch.setattr("lkq_hf.shipped.BESIDE", tmp_path)
    save_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block, page: str, names: dict) -> None:
    if {module.partition(".")[0] for module, _ in imports(block.text)} & NOT_RUN.keys():
        check_names(block.text)
        return
    # Empty lines before it, so that a traceback names the line of the page.
    exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)


def check_names(text: str) -> None:
    """Raises if a snippet that is not run names what lkq_hf does not have, or passes it what it does not take."""
    known = {}
    for module, statement in imports(text):
        if module.partition(".")[0] == "lkq_hf":
            found = importlib.import_module(module)
            if isinstance(statement, ast.ImportFrom):
                known |= {alias.asname or alias.name: getattr(found, alias.name) for alias in statement.names}
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in known:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(known[call.func.id]).bind_partial(*call.args, **keywords)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] != "lkq-hf":
        assert words[0] in NOT_RUN, f"neither run nor excused: {shlex.join(words)}"
        check_command(words)
        return
    subcommand = " ".join(words[1:3] if words[1] == "evaluate" else words[1:2])
    monkeypatch.setattr(sys, "argv", [*words, *SMALLER.get(subcommand, "").split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, f"failed: {shlex.join(words)}"


def check_command(words: list[str]) -> None:
    """Raises if a command that is not run names a file, target, extra or option that does not exist."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = re.findall(r"lkq-hf\[(.*?)\]", " ".join(words))
        assert all(name in setup["options.extras_require"] for extra in extras for name in extra.split(",")), words
    elif words[0] in ("accelerate", "torchrun"):
        parse(words[words.index("lkq_hf.cli") + 1 :])
    elif words[0] == "vllm":
        assert Path(words[2]).is_dir(), words
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None, words
    else:
        source = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), words


def parse(words: list[str]) -> None:
    """Parses the arguments of lkq-hf without running it."""
    command = typer.main.get_command(app)
    context = command.make_context("lkq-hf", list(words))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def run_page(page: Path, names: dict, monkeypatch: pytest.MonkeyPatch, languages: tuple[str, ...]) -> None:
    for block in blocks(page):
        if block.language not in languages:
            continue
        if block.language == "python":
            run_python(block, page.name, names)
        else:
            for words in commands(block):
                run_command(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_runs(page: Path, furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in RUN_ELSEWHERE:
        assert page.name in (ROOT / RUN_ELSEWHERE[page.name]).read_text()
        return
    run_page(page, {}, monkeypatch, ("python", "sh"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_its_language(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert len(found) * 2 == len(re.findall(r"^\s*```", text, re.MULTILINE)), "a block that is not found is not run"
    assert {block.language for block in found} <= {"python", "sh", "json", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not set(re.findall(r"`(--[a-z-]+)", text)) - all_options(typer.main.get_command(app))
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert "://" in link or (page.parent / link).exists(), link


def all_options(command) -> set[str]:
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return options.union({"--help"}, *(all_options(child) for child in getattr(command, "commands", {}).values()))


@pytest.mark.slow  # test_wheel.py runs those of the README outside of a clone
@pytest.mark.real_model
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_first_snippets_run_on_the_real_model(name: str, furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (MODEL_NAME, "MODEL"):
        (furnished / model).unlink()
        (furnished / model).symlink_to(smollm2_directory())
    (furnished / ADAPTER).unlink()
    (furnished / ADAPTER).symlink_to(ROOT / ADAPTER)
    names = {}
    for block in blocks(ROOT / name):
        if block.language == "python":
            run_python(block, name, names)
        elif "lkq-hf quantize" in block.text:
            return  # what follows needs what this command makes, in minutes or hours


@pytest.mark.parametrize(
    "text",
    [
        "import vllm\nfrom lkq_hf import NoSuchCache",
        "import vllm\nfrom lkq_hf import LookaheadCache\nLookaheadCache(entries=3)",
        "import vllm\nprint(",
    ],
)
def test_a_wrong_snippet_that_is_not_run_is_found(text: str) -> None:
    with pytest.raises((AttributeError, TypeError, SyntaxError)):
        run_python(Block("python", text, 1), "page", {})


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch -m lkq_hf.cli evaluate perplexity MODEL --text book.txt --oup results",
        "make tests",
        "python examples/quickstart.py --bugdet 3",
        "vllm serve no-such-checkpoint",
        "curl example.org",
        "lkq-hf quantize MODEL",
    ],
)
def test_a_wrong_command_is_found(command: str, furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # click's error for wrong options, of which typer may bring a copy of its own
    with pytest.raises((AssertionError, typer.Exit, typer.BadParameter.__base__)):
        run_command(shlex.split(command), monkeypatch)
