"""What a measurement read."""

import hashlib

from lkq_hf.evaluation.environment import digests


def test_files_and_directories_are_known_by_their_content(tmp_path):
    names = ("model.safetensors", "config.json", "README.md", ".partial-0-config.json")
    for path in (tmp_path / "text", *(tmp_path / "model" / name for name in names)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    (tmp_path / "model" / "more.json").mkdir()
    found = digests([tmp_path / "text", tmp_path / "model", "someone/something"])
    expected = [tmp_path / "text", *(tmp_path / "model" / name for name in ("config.json", "model.safetensors"))]
    assert found == {str(path): hashlib.sha256(path.name.encode()).hexdigest() for path in expected}
