import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from chromium import EXECUTABLE, chromium_page

pytestmark = pytest.mark.real_model  # for SmolLM2's tokenizer; the model is tiny and random
needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium: apt-get install chromium")

HOSTILE = (
    "</script><script>document.title='owned'</script> <img src=x onerror=\"document.title='owned'\"> {{data}} "
    "{{style}} <style>body{display:none}</style> <!-- ]]> &amp; &lt; \u202e reversed \u2028 \x00\x1b[31m \"quotes' "
    "日本🙂 end"
)


class Elements(HTMLParser):
    """The elements of a page: their names and attributes."""

    def __init__(self, source):
        super().__init__()
        self.found = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def contrast(ink, shade, paper):
    """Contrast (WCAG 2.2) of computed colors, where ``shade`` is translucent and lies on ``paper``."""

    def numbers(color):
        values = [float(number) for number in re.findall(r"[\d.]+", color)]
        scale = 1 if color.startswith("color(srgb") else 255
        return [value / scale for value in values[:3]], values[3] if len(values) > 3 else 1.0

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    (over, alpha), (under, _) = numbers(shade), numbers(paper)
    ground = [alpha * a + (1 - alpha) * b for a, b in zip(over, under, strict=True)]
    low, high = sorted((luminance(numbers(ink)[0]), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory):
    """Path of a report about a hostile prompt, and the inspection that it shows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lkq_hf.inspection import inspect_eviction, render_report

    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base")
    model.load_adapter(str(checkpoint / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "base")
    prompt = "\n\n".join([HOSTILE, "A line of ordinary words, and another one." * 8, HOSTILE])
    inspection = inspect_eviction(
        model, tokenizer, prompt, 24, oracle=True, max_new_tokens=8, adapter="<b>adapter</b>"
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(inspection), encoding="utf-8")
    return path, inspection, prompt


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def status(page):
    return page.evaluate("document.getElementById('status').textContent")


def test_what_is_kept_is_what_the_cache_keeps(report, checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lkq_hf import LookaheadCache

    _, inspection, prompt = report
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base")
    model.load_adapter(str(checkpoint / "adapter"))
    ids = AutoTokenizer.from_pretrained(checkpoint / "base")(prompt, return_tensors="pt")["input_ids"]
    assert "".join(inspection.pieces) == prompt and len(inspection.pieces) == ids.shape[1]
    for scorer in ("lookahead", "snapkv"):
        cache = LookaheadCache(24, scorer=scorer)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for index, layer in enumerate(inspection.layers):
            assert torch.equal(inspection.kept[scorer][index], cache.layers[layer].kept()[0])
        assert inspection.kept[scorer].sum() == 24 * 3 * 2, "layers, KV heads"
        assert inspection.kept_bytes == cache.nbytes
    entry = 2 * 16 * 4  # key and value, head_dim, float32
    assert inspection.full_bytes == ids.shape[1] * 3 * 2 * entry
    assert inspection.kept_bytes == 24 * 3 * 2 * (entry + 4), "and each entry's position"
    assert torch.equal(inspection.overlap("oracle", "oracle"), torch.ones(3))
    best = inspection.attention_kept("oracle")
    assert best.mean() > inspection.attention_kept("snapkv").mean() and (best < 1).all()
    assert list(inspection.answers) == ["full cache", "lookahead", "snapkv", "oracle"]


def test_the_prompt_in_the_page_is_only_text(report):
    path, inspection, _ = report
    source = path.read_text(encoding="utf-8")
    elements = Elements(source).found
    names = [name for name, _ in elements]
    assert names.count("script") == source.count("</script>") == 2 and names.count("style") == 1
    assert not {"img", "link", "iframe", "object", "b"} & set(names)
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")]
    # Shaded without the script, too.
    shades = [
        float(style.removeprefix("--k:"))
        for _, attributes in elements
        if (style := attributes.get("style", "")).startswith("--k:")
    ]
    assert shades == pytest.approx((inspection.counts("lookahead") / inspection.heads).sqrt().tolist(), abs=1e-3)


def cells_of(source):
    """The tables of what each head keeps, ``{scorer: [layers][heads]}``, and the shade of each cell."""
    tables = {}
    for name, table in re.findall(r"<summary>([^<]*): entries of each head</summary>(.*?)</details>", source, re.S):
        rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.S)
        tables[name] = [re.findall(r'--n:([\d.]+)">([\d,]+)<', row) for row in rows]
    return tables


def test_the_page_shows_where_the_budget_went(report, checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lkq_hf.inspection import inspect_eviction, render_report

    path, inspection, prompt = report
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base")
    model.load_adapter(str(checkpoint / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "base")
    pages = {"global": (inspection, path.read_text(encoding="utf-8"))}
    for allocation in ("layer", "uniform"):
        other = inspect_eviction(model, tokenizer, prompt, 24, allocation=allocation)
        pages[allocation] = other, render_report(other)
    for allocation, (shown, source) in pages.items():
        tables = cells_of(source)
        assert list(tables) == (
            ["lookahead", "SnapKV", "oracle"] if allocation == "global" else ["lookahead", "SnapKV"]
        )
        for name, table in zip(shown.kept, tables.values(), strict=True):
            entries = shown.entries(name)
            assert [[int(count) for _, count in row] for row in table] == entries.tolist()
            shades = torch.tensor([[float(shade) for shade, _ in row] for row in table])
            torch.testing.assert_close(shades, (entries / 96).sqrt(), atol=1e-3, rtol=0)
            assert entries.sum() == 24 * 6
            if allocation != "global":
                assert (entries.sum(1) == 48).all()
    assert (pages["uniform"][0].entries("snapkv") == 24).all()
    assert len(set(inspection.entries("lookahead").flatten().tolist())) > 1
    assert "heads of all layers compete" in pages["global"][1]
    assert "Each head keeps the same number" in pages["uniform"][1]


def test_names_are_only_text_too(report):
    from lkq_hf.inspection import render_report

    inspection = report[1]
    kept = {"</script><img src=x>": inspection.kept["snapkv"], "snapkv": inspection.kept["snapkv"]}
    names = [name for name, _ in Elements(render_report(replace(inspection, model="<img>", kept=kept))).found]
    assert names.count("script") == 2 and "img" not in names


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_chromium(report, page, scheme):
    path, inspection, prompt = report
    page.requests.clear()
    page.errors.clear()
    page.open(path, scheme=scheme)
    assert page.requests == [path.resolve().as_uri()] and page.errors == []
    assert page.evaluate("document.title").startswith("What the cache keeps")
    shown = page.evaluate("document.getElementById('text').textContent")
    assert shown == re.sub(r"[\x00\x1b]", "\ufffd", prompt)
    shades = page.evaluate("[...document.querySelectorAll('#text span')].map(s => s.style.getPropertyValue('--k'))")
    expected = (inspection.counts("lookahead") / inspection.heads).sqrt().tolist()
    assert list(map(float, shades)) == pytest.approx(expected, abs=1e-3)
    # Text on the strongest shade is still readable (WCAG 2.2, level AA).
    for hue in ("--mine", "--other"):
        page.evaluate(
            "for (const [name, value] of [['--k', 1], ['--hue', 'var(" + hue + ")']])"
            "  document.querySelector('#text span').style.setProperty(name, value)"
        )
        color = "getComputedStyle(document.querySelector({!r})).{}".format
        ink, shade = (page.evaluate(color("#text span", name)) for name in ("color", "backgroundColor"))
        assert contrast(ink, shade, page.evaluate(color("body", "backgroundColor"))) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")


@needs_chromium
def test_the_keyboard_is_enough(report, page):
    path, inspection, _ = report
    page.open(path)
    order = []
    for _ in range(5):
        page.press("Tab", windowsVirtualKeyCode=9)
        order.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
    assert order == ["mode", "layer", "text", "by-layer", "by-head"]
    page.evaluate("document.getElementById('text').focus()")
    for _ in range(3):
        page.press("ArrowRight", windowsVirtualKeyCode=39)
    count = inspection.counts("lookahead")[2].item()
    assert f"Token 3 of {len(inspection.pieces)}" in status(page)
    assert f"lookahead: {count} of {inspection.heads} heads" in status(page)
    page.press("End", windowsVirtualKeyCode=35)
    assert f"Token {len(inspection.pieces)} of" in status(page)
    page.evaluate("document.getElementById('by-head').focus()")
    for _ in range(4):
        page.press("ArrowDown", windowsVirtualKeyCode=40)
    verb = "keeps" if inspection.kept["lookahead"][1, 1, -1] else "evicts"
    assert f"Layer {inspection.layers[1]}, head 1 {verb} it." in status(page)


@needs_chromium
def test_scorers_can_be_compared(report, page):
    path, inspection, _ = report
    page.open(path)
    page.evaluate("document.querySelector('input[value=lookahead-snapkv]').click()")
    page.evaluate("document.getElementById('layer').value = 2")
    page.evaluate("document.getElementById('layer').dispatchEvent(new Event('change', {bubbles: true}))")
    mine, other = (inspection.kept[name][2].sum(0) for name in ("lookahead", "snapkv"))
    found = page.evaluate("[...document.querySelectorAll('#text span')].map(s => s.classList.contains('o'))")
    assert found == (mine < other).tolist()
    page.evaluate("document.querySelectorAll('#text span')[5].click()")
    assert f"lookahead: {mine[5]} of 2 heads; SnapKV: {other[5]} of 2 heads" in status(page)
    # A map shows a kept entry in ink and an evicted one on paper.
    page.evaluate("document.querySelector('input[value=oracle]').click()")
    kept = inspection.kept["oracle"][2, 1]
    for token in (kept.nonzero()[3, 0].item(), (~kept).nonzero()[3, 0].item()):
        color = page.evaluate(
            f"""(() => {{
              const map = document.getElementById('by-head');
              const x = Math.floor(({token} + 0.5) * map.width / {len(kept)}), y = Math.floor(5.5 * map.height / 6);
              return [...map.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3);
            }})()"""
        )
        assert color == ([43, 123, 208] if kept[token] else [253, 253, 252])


def test_the_command(checkpoint, text, tmp_path, run):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text.read_text()[:1500])
    arguments = ["inspect", checkpoint / "base", "--prompt", prompt, "--budget", 32, "--device", "cpu"]
    code, output, _ = run(*arguments, "--adapter", checkpoint / "adapter", "--out", tmp_path / "a" / "report.html")
    source = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert code == 0 and re.search(r"32 of \d+ tokens per head on average \(from \d+ to \d+\)", output)
    # The chat template's tokens are there, and the oracle is not.
    assert html.escape("<|im_start|>user") in re.sub(r"</?span[^>]*>", "", source)
    assert "oracle" not in source.partition("<script")[0]
    more = ["--raw", "--oracle", "--allocation", "uniform", "--json"]
    code, output, _ = run(*arguments, "--out", tmp_path / "b.html", *more)
    found = json.loads(output)
    assert code == 0 and list(found["answers"]) == ["full cache", "snapkv", "streaming", "oracle"]
    assert found["allocation"] == "uniform" and found["entries"]["snapkv"] == [[32, 32]] * 3
    for allocation, said in (("all", "--allocation must be one of"), ("profile", "takes its numbers per head from")):
        code, _, error = run(*arguments, "--out", tmp_path / "c.html", "--allocation", allocation)
        assert code == 1 and said in error and not (tmp_path / "c.html").exists()
    source = (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "im_start" not in source and "sinks + recent" in source and "<h2>Answers</h2>" in source
    code, _, error = run(*arguments[:4], "--budget", 5000, "--out", tmp_path / "c.html", "--device", "cpu")
    assert code == 1 and "evicts nothing from a prompt of" in error and not (tmp_path / "c.html").exists()


def test_a_figure_for_notebooks(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from lkq_hf.inspection import plot_kept

    inspection = report[1]
    figure = plot_kept(inspection)
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(maps) == 6
    for shown, entries, (name, kept) in zip(maps[::2], maps[1::2], inspection.kept.items(), strict=True):
        assert shown.tolist() == kept.float().mean(1).tolist()
        assert entries.tolist() == (inspection.entries(name).double() / 24).tolist()
    figure.savefig(tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"lkq-hf\[plots\]"):
        plot_kept(inspection)
