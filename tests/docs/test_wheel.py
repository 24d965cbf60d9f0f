"""What is installed is whole: the README's snippets need no clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from real_models import smollm2_directory

import lkq_hf

ROOT = Path(lkq_hf.__file__).parents[1]
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory into which the package was installed from a wheel."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for name in ("lkq_hf", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(directory)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = directory.glob("*.whl")
    install = [*pip, "install", str(wheel), "--no-deps", "--no-index", "--target", str(directory / "installed")]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return wheel, directory / "installed"


def run(installed, code, cwd):
    environment = {**os.environ, "PYTHONPATH": str(installed[1]), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_adapter(installed, tmp_path):
    names = zipfile.ZipFile(installed[0]).namelist()
    assert sum(name.endswith("smollm2-135m-instruct-lookahead/adapter_model.safetensors") for name in names) == 1
    process = run(installed, "import lkq_hf; print(lkq_hf.__file__, lkq_hf.shipped_adapter())", tmp_path)
    package, adapter = process.stdout.split()
    assert Path(package).is_relative_to(installed[1]) and Path(adapter).is_relative_to(installed[1])
    shipped = Path(adapter) / "adapter_model.safetensors"
    assert shipped.read_bytes() == (Path(lkq_hf.shipped_adapter()) / shipped.name).read_bytes()


def test_the_wheel_is_typed_and_says_its_version(installed):
    archive = zipfile.ZipFile(installed[0])
    assert "lkq_hf/py.typed" in archive.namelist()
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"Version: {lkq_hf.__version__}\n" in archive.read(metadata).decode()
    assert f"\nversion: {lkq_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_an_adapter_that_does_not_come_with_the_package():
    with pytest.raises(FileNotFoundError, match="no adapter other comes with this installation"):
        lkq_hf.shipped_adapter("other")


@pytest.mark.real_model
def test_the_snippets_of_the_readme_run_outside_of_a_clone(installed, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = "".join(snippets)
    assert "shipped_adapter()" in code and "model_cards" not in code
    for name in ("MODEL", MODEL_NAME):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(smollm2_directory())
    (tmp_path / "book.txt").write_text((ROOT / "LICENSE").read_text()[:2000])
    process = run(installed, code + "print(cache)", tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("LookaheadCache(") == 2
