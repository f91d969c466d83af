# SPDX-License-Identifier: Apache-2.0
"""Pictures as HTML: structure, escaping, and what they do in a browser when pointed at, clicked and steered by keys."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from chromium import Browser
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma4
from gemma4 import html
from gemma4.html.markup import Markup, colour, number, numbers_json, tag, visible
from gemma4.html.picture import FEW
from gemma4.html.png import packed, png
from gemma4.interp import dla, head_ablations, logit_lens, patching_grid
from gemma4.interp.pictures import ranges

VOID = {"img", "input", "meta"}
HOSTILE = [
    "</script><script>window.owned = 1</script>",
    "</style><img src=x onerror='window.owned = 2'>",
    '" onmouseover="window.owned = 3',
    "' autofocus onfocus='window.owned = 4'",
    "<!--",
    "&lt;b&gt;",
    "\u202eabc\u2066",
    "\ud800",
    "\x00\x1b[31m",
    "\u2028",
    "\u0301",
    "",
    "\n",
    "\t",
    " مرحبا",
    " שלום",
    "👩\u200d👩\u200d👧",
    "😀",
    "日本語",
    "\u200b",
    "\ufeff",
    "${window.owned = 5}",
]
PROMPT = "When Mary and John went to the store, John gave a book to"
CORRUPT = "When Mary and John went to the store, Mary gave a book to"


class Page(HTMLParser):
    """Elements of a page as (name, attributes), its text, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        assert len({key for key, _ in attributes}) == len(attributes)
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def named(self, name, class_=None):
        found = (attrs for one, attrs in self.elements if one == name)
        return [attrs for attrs in found if class_ is None or class_ in attrs.get("class", "").split()]


def rng():
    return np.random.default_rng(0)


def all_pictures(tokens=HOSTILE):
    """A page with every component, each token in every place where a text goes."""
    n, random = len(tokens), rng()
    examples = [html.Example(tokens, random.random(n)), html.Example(tokens[:1], np.array([np.nan]))]
    pairs = [(token, 1.5) for token in tokens]
    cards = [
        html.Card(
            i,
            f"feature {i} {tokens[0]}",
            [(tokens[1], tokens[2])],
            (np.array([100, 10, 1]), np.linspace(0, 8, 4)),
            pairs,
            pairs,
            [(1 - i, 0.25), (77, 0.1)],
            examples=examples,
        )
        for i in range(2)
    ]
    words = [list(tokens) for _ in tokens]
    return html.together(
        tokens[0],
        html.attention(random.dirichlet(np.ones(n), (2, n)), tokens, names=tokens[:2], title=tokens[1]),
        html.tokens(tokens, {tokens[0]: random.normal(size=n), tokens[1]: random.random(n)}, title=tokens[2]),
        html.heat(random.normal(size=(n, n)), tokens, tokens, words=words, tips=words, title=tokens[3]),
        html.bars(tokens, random.normal(size=n), title=tokens[4], small_print=tokens[5]),
        html.cards(cards, title=tokens[6]),
    )


# ---- structure and escaping ------------------------------------------------------------------------------------------


def test_a_page_with_hostile_texts_holds_no_element_of_theirs():
    plain = ["a", *(f"token {i}" for i in range(1, len(HOSTILE)))]
    mild, hostile = Page(all_pictures(plain).page()), Page(all_pictures().page())
    assert [name for name, _ in hostile.elements] == [name for name, _ in mild.elements]
    assert [set(attrs) for _, attrs in hostile.elements] == [set(attrs) for _, attrs in mild.elements]
    assert len(hostile.named("script")) == 1 and len(hostile.named("style")) == 1
    assert not any(key.startswith("on") for _, attrs in hostile.elements for key in attrs)


def test_a_page_fetches_nothing_and_runs_only_its_own_script():
    text = all_pictures().page()
    [policy] = [attrs["content"] for attrs in Page(text).named("meta") if "http-equiv" in attrs]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert not re.search(r"""(?:src|href)=["'](?!data:image/png;base64,)""", text)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


def test_pages_are_valid_text_without_hidden_characters():
    text = all_pictures().page()
    text.encode()
    assert not set("\u202e\u2066\ufeff\x00\x1b\u2028\u200b") & set(text)
    assert not [letter for letter in text if "\ud800" <= letter <= "\udfff"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None), max_size=12))
def test_any_text_comes_back_as_it_is_shown(text):
    made = tag("p", text, title=text, data_one=visible(text))
    page = Page(made)
    [attrs] = page.named("p")
    shown = "".join(page.texts)
    assert shown == attrs["title"]
    hidden = {c for c in made if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert hidden <= {"\n", "\u200c", "\u200d"}
    assert len(page.elements) == 1 and set(attrs) == {"title", "data-one"}
    assert attrs["data-one"] and "\n" not in attrs["data-one"]
    if text.isascii() and text.isprintable():
        assert shown == text and attrs["data-one"] == (text.replace(" ", "\u00b7") or "\u2205")


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("\n", "↵"),
        ("\t", "⇥"),
        ("", "∅"),
        ("\u0301", "\u25cc\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("\x00", "\\x00"),
        ("\u200d", "\\u200d"),
        ("a\u200db", "a\\u200db"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\U000e0041", "\\U000e0041"),
        ("<b>", "<b>"),
    ],
)
def test_a_token_is_shown_so_that_it_can_be_read(token, shown):
    assert visible(token) == shown


def test_markup_has_attributes_of_plain_names_alone():
    assert (
        tag("a", "x", class_="y", data_v=1, hidden=True, title=None, id=False) == '<a class="y" data-v="1" hidden>x</a>'
    )
    with pytest.raises(ValueError, match="no name of an attribute"):
        tag("a", **{'x onclick="y"': "z"})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.12345, "0.123"), (-12.345, "-12.3"), (99999, "99999"), (1e-4, "1.00e-4"), (2.5e7, "2.50e+7")],
)
def test_numbers_in_a_few_characters(value, text):
    assert number(value) == text and number(float("nan")) == "nan" and number(float("-inf")) == "-inf"


def test_colours_say_size_and_sign():
    assert colour(0.5, 2.0) == {"class_": "g4-c", "style": "--v:0.25"}
    assert colour(-9, 2.0) == {"class_": "g4-c g4-neg", "style": "--v:1"}
    assert colour(float("nan"), 2.0)["class_"] == "g4-c g4-nan"


def test_series_are_json_whatever_they_hold():
    values = np.array([1.5, np.nan, np.inf, -np.inf, -2e-9])
    assert json.loads(numbers_json(values)) == [1.5, None, float("inf"), float("-inf"), -2e-9]


def test_text_can_be_read_on_every_colour_in_both_themes():
    style = Path(html.__path__[0], "view.css").read_text(encoding="utf-8")
    found = re.findall(r"--g4-(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colours = {name: ends for name, *ends in found}

    def luminance(code):
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in range(2):
        for behind in ("back", "soft", "pos", "neg"):
            assert contrast(colours["text"][theme], colours[behind][theme]) >= 4.5, (theme, behind)
        assert contrast(colours["dim"][theme], colours["back"][theme]) >= 4.5


# ---- components ------------------------------------------------------------------------------------------------------


def test_small_pictures_are_png_files():
    image = pytest.importorskip("PIL.Image")
    shares = np.linspace(0, 1, 6).reshape(2, 3)
    pixels = np.asarray(image.open(io.BytesIO(png(shares))).convert("RGBA"))
    assert pixels.shape == (2, 3, 4)
    assert pixels[..., 3].ravel().tolist() == [0, 51, 102, 153, 204, 255]
    assert png(np.array([[np.nan, 7.0]])) == png(np.array([[0.0, 1.0]]))


def test_numbers_of_a_pattern_are_kept_to_five_digits():
    values = rng().random((4, 5))
    raw = base64.b64decode(packed(values))
    assert np.allclose(np.array(struct.unpack("<20H", raw)).reshape(4, 5) / 65535, values, atol=1e-5)


def test_attention_holds_every_head():
    pattern = rng().dirichlet(np.ones(5), (3, 5))
    page = Page(html.attention(pattern, list("abcde"), title="A").fragment())
    heads = page.named("button", "g4-head")
    assert [head["data-name"] for head in heads] == ["head 0", "head 1", "head 2"]
    assert all(head["aria-expanded"] == "false" for head in heads)
    [root] = page.named("div", "g4-attention")
    assert json.loads(root["data-at"]) == [0, 1, 2, 3, 4] and json.loads(root["data-keys"]) == list("abcde")
    one = Page(html.attention(pattern[0, :2], ["x", "y"], keys=list("vwxyz"), at=[2, 3]).fragment())
    assert json.loads(one.named("div", "g4-attention")[0]["data-at"]) == [2, 3]


def test_keys_of_queries_may_be_an_array():
    picture = html.attention(np.ones((1, 2, 3)), ["a", "b"], keys=list("xyz"), at=np.arange(2))
    assert json.loads(Page(picture.fragment()).named("div", "g4-attention")[0]["data-at"]) == [0, 1]
    many = html.attention(np.ones((1, 3, 1)), list("abc"), keys=["k"], at=[0, 0, 0])
    assert json.loads(Page(many.fragment()).named("div", "g4-attention")[0]["data-at"]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: html.attention(np.zeros((2, 3, 3)), list("ab")), "2 names, 2 queries and 2 keys"),
        (lambda: html.attention(np.zeros(3), list("abc")), r"\[heads, queries, keys\]"),
        (lambda: html.attention(-np.ones((1, 1, 1)), ["a"]), "negative numbers"),
        (lambda: html.attention(np.zeros((9, 1000, 1000), np.int8), ["a"] * 1000), "choose heads"),
        (lambda: html.attention(-np.ones((1, 1, 1)), ["a"]), r"gemma4\.html\.heat for signed"),
        (lambda: html.attention(np.array([[-np.inf, np.nan]]), ["a"], keys=["b", "c"]), "negative numbers"),
        (lambda: html.attention(np.ones((1, 3, 1)), list("abc"), keys=["k"]), "3 queries are more than 1 keys"),
        (lambda: html.attention(np.ones((1, 2, 3)), ["a", "b"], keys=list("xyz"), at=[7, -3]), r"2 integers in 0\.\.2"),
        (lambda: html.attention(np.ones((1, 2, 2)), ["a", "b"], at=[0, 2]), r"2 integers in 0\.\.1"),
        (lambda: html.attention(np.ones((1, 2, 2)), ["a", "b"], at=[0]), r"2 integers in 0\.\.1"),
        (lambda: html.attention(np.ones((1, 2, 2)), ["a", "b"], at=[0.5, 1]), r"2 integers in 0\.\.1"),
        (lambda: html.heat([[1.0]], ["a"], ["b"], limit=0), "limit must be a finite number above 0, got 0"),
        (lambda: html.heat([[1.0]], ["a"], ["b"], limit=np.nan), "limit must be a finite number above 0"),
        (lambda: html.tokens(["a"], [1, 2]), "there are 1 tokens"),
        (lambda: html.tokens(["a"], {}), "at least one series"),
        (lambda: html.heat(np.zeros((2, 2)), ["a"], ["b", "c"]), "names of 1 rows and 2 columns"),
        (lambda: html.heat(np.zeros((1, 2)), ["a"], ["b", "c"], words=[["x"]]), r"words must be \[1, 2\]"),
        (lambda: html.bars(["a"], [1, 2]), "there are 1 labels"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_tokens_offer_their_series():
    page = Page(html.tokens(["a", "b"], {"loss": [1.0, -3.0], "rank": [0.0, np.nan]}).fragment())
    [root] = page.named("div", "g4-shaded")
    assert json.loads(root["data-series"])[0] == {"name": "loss", "limit": 3.0, "values": [1.0, -3.0]}
    first, second = page.named("span", "g4-t")
    assert (first["title"], second["title"]) == ("a (0)\nloss: 1.00", "b (1)\nloss: -3.00")
    assert first["style"] == "--v:0.333" and "g4-neg" in second["class"]
    assert len(page.named("option")) == 2
    assert not Page(html.tokens(["a"], [1.0]).fragment()).named("select")
    assert "0 tokens" in html.tokens([], []).fragment()


def test_cells_hold_numbers_or_words():
    page = Page(html.heat([[1.0, -2.0]], ["row"], [" a", "b"], title="T").fragment())
    cells = page.named("td")
    assert [cell["title"] for cell in cells] == ["row, ·a (0)\n1.00", "row, b (1)\n-2.00"]
    assert [cell["style"] for cell in cells] == ["--v:0.5", "--v:1"] and "g4-neg" in cells[1]["class"]
    assert "g4-two" in page.named("i")[0]["class"]  # both signs


def test_bars_stand_on_both_sides_of_zero():
    page = Page(html.bars(["up", "down", "none"], [3.0, -1.0, np.nan]).fragment())
    looks = [one["style"] for one in page.named("i")]
    assert looks == ["--x:25.00%;--w:75.00%", "--x:0.00%;--w:25.00%", "--x:25.00%;--w:0.00%"]


def test_cards_link_to_those_of_the_page():
    page = Page(all_pictures().page())
    assert [card["data-feature"] for card in page.named("article", "g4-card")] == ["0", "1"]
    assert {link["data-to"] for link in page.named("button", "g4-link")} == {"0", "1"}
    assert len(page.named("input", "g4-search")) == 1
    assert len(page.named("rect")) == 6


def test_pictures_have_no_ids():
    """A notebook shows many pictures in one document, and some of them twice."""
    page = Page(all_pictures().fragment() * 2)
    assert len(page.named("article", "g4-card")) == 4
    assert not [attrs["id"] for _, attrs in page.elements if "id" in attrs]


def test_a_saved_page_is_whole_and_never_replaces_another(tmp_path):
    file = tmp_path / "x.html"
    picture = html.tokens(["a"], [1.0], title="T")
    assert picture.save(file) == file and file.read_text(encoding="utf-8").endswith("</html>\n")
    with pytest.raises(FileExistsError):
        picture.save(file)
    picture.save(file, force=True)
    assert "Picture('T'" in repr(picture)


# ---- what a notebook shows -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny):
    ids = tiny.to_tokens(PROMPT)
    return tiny.to_str_tokens(ids), tiny.run_with_cache(ids, "*")[1]


def test_a_cache_shows_its_sites_and_patterns(tiny, run):
    tokens, cache = run
    text = cache._repr_html_()
    page = Page(text)
    assert len(text) < 150_000
    assert f"ActivationCache: {len(cache)} arrays" in page.texts[0]
    assert f"0-{tiny.n_layers - 1}" in page.texts and "float32" in page.texts and "resid_post" in text
    assert len(page.named("button", "g4-head")) == 16 and "16 of" in text
    [root] = page.named("div", "g4-attention")
    assert json.loads(root["data-keys"]) == [visible(token) for token in tokens]
    few = tiny.run_with_cache(PROMPT, "blocks.1.attn.hook_pattern", pos=[2, -1])[1]
    [root] = Page(few._repr_html_()).named("div", "g4-attention")
    assert json.loads(root["data-at"]) == [2, len(tokens) - 1] and len(json.loads(root["data-queries"])) == 2
    assert json.loads(root["data-keys"])[:3] == ["0", "1", visible(tokens[2])]


def test_the_pattern_that_a_cache_shows_is_the_captured_one(run):
    tokens, cache = run
    head = Page(cache._repr_html_()).named("button", "g4-head")[5]  # layer 1, head 1
    shares = np.frombuffer(base64.b64decode(head["data-v"]), "<u2").reshape(len(tokens), len(tokens)) / 65535
    assert head["data-name"] == "1.1"
    assert np.allclose(shares * float(head["data-top"]), cache["blocks.1.attn.hook_pattern"][1], atol=1e-5)


def test_long_prompts_are_cut_and_say_so(tiny):
    n = 4 * FEW
    _, cache = tiny.run_with_cache(np.arange(10, 10 + n), ["*pattern", "*hook_resid_p*"])
    text = cache._repr_html_()
    assert f"the last {FEW} of {n} positions" in text and len(text) < 200_000
    lens = logit_lens(tiny, cache)
    assert f"The last {FEW} of {n} positions" in lens._repr_html_() and len(lens._repr_html_()) < 200_000
    assert len(Page(lens.to_html().fragment()).named("td")) == n * (tiny.n_layers + 1)


def test_a_cache_without_model_and_an_empty_one_show_themselves(tiny, tmp_path):
    cache = tiny.run_with_cache([5], "blocks.0.attn.hook_pattern")[1]
    loaded = gemma4.interp.cache.ActivationCache.load(cache.save(tmp_path / "c.safetensors"))
    [root] = Page(loaded._repr_html_()).named("div", "g4-attention")
    assert json.loads(root["data-queries"]) == ["5"]
    assert "0 arrays" in tiny.run_with_cache([5], [])[1]._repr_html_()


def test_a_lens_shows_the_last_block_on_top(tiny, run):
    lens = logit_lens(tiny, run[1], target=" Mary")
    page = Page(lens._repr_html_())
    texts = page.texts[page.texts.index("after block") :]
    rows = [text for text in texts if text in lens.labels]
    assert rows[0] == str(tiny.n_layers - 1)
    cell = page.named("td")[len(run[0]) - 1]  # the last block, the last position
    lines = cell["title"].split("\n")
    assert lines[0] == f"after block {tiny.n_layers - 1}, at ·to (position {len(run[0]) - 1})"
    assert lines[1] == f"{number(lens.probs[-1, -1, 0])}  {visible(lens.tokens[-1][-1][0])}"
    assert cell["style"] == colour(lens.probs[-1, -1, 0], 1.0)["style"]
    first = page.named("td")[-len(run[0])]  # the embedding, the first position
    assert first["style"] == colour(lens.probs[0, 0, 0], 1.0)["style"] and first["title"].startswith(
        "after block embed"
    )
    assert len(lines) == 7 and lines[-1] == f"{number(lens.target_probs[-1, -1])}  the target"
    assert lens.prompt == run[0]


def test_grids_show_themselves(tiny):
    grid = patching_grid(tiny, PROMPT, CORRUPT, (" Mary", " John"), layers=[0, 3], positions=[-1, -2])
    text = grid._repr_html_()
    assert "Share of the clean run recovered" in text and len(Page(text).named("td")) == 4
    heads = head_ablations(tiny, PROMPT, (" Mary", " John"), layers=[3, 6])
    assert heads.change.shape == (2, 4)
    texts = Page(heads._repr_html_()).texts
    expected = [text for row in (1, 0) for text in (heads.rows[row], *map(number, heads.change[row]))]  # 6 above 3
    assert texts[-len(expected) :] == expected
    assert len(Page(heads.to_html(2).fragment()).named("td")) == 4
    for one in (heads, logit_lens(tiny, PROMPT), dla(tiny, PROMPT, pos=[0, 1])):
        assert one.to_html(99).fragment() == one.to_html().fragment()  # more than there are
    assert "layer \\ head" in texts
    by_head = patching_grid(tiny, PROMPT, CORRUPT, (" Mary", " John"), what="heads", layers=3, positions=[-1, -2])
    assert "layer.head \\ position" in Page(by_head._repr_html_()).texts
    assert by_head.to_html().title.endswith("layer.head by position")
    with pytest.raises(ValueError, match="last"):
        heads.to_html(0)


def test_ranges():
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if Browser.find() is None or sys.platform == "win32":
        pytest.skip("no Chromium here (Debian: chromium-headless-shell)")
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def opened(browser, tmp_path, picture, **options):
    browser.open(picture.save(tmp_path / "page.html"), **options)
    return browser


def tip(browser):
    return browser.run("(t => t && !t.hidden ? t.textContent : null)(document.querySelector('.g4-tip'))")


def test_hostile_texts_do_nothing_in_a_browser(browser, tmp_path):
    opened(browser, tmp_path, all_pictures())
    browser.click(".g4-head", 1)
    for selector in (".g4-t", ".g4-heat td", ".g4-bars td.g4-num"):
        browser.point(*browser.middle(selector))
        assert tip(browser)
    assert browser.run("window.owned") is None
    requests = [
        one["params"]["request"]["url"] for one in browser.messages if one["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert [one for one in browser.messages if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")] == []


def test_the_policy_stops_scripts_that_got_into_the_page(browser, tmp_path):
    page = html.tokens(["a"], [1.0]).page().replace("</main>", "</main><script>window.owned = 1</script>")
    (tmp_path / "evil.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "evil.html")
    assert browser.run("window.owned") is None and browser.run("window.gemma4View") is True


def test_a_head_is_enlarged_by_a_click_and_steered_by_keys(browser, tmp_path):
    pattern = np.tril(np.arange(1, 17, dtype=float).reshape(1, 4, 4) / 20)
    opened(browser, tmp_path, html.attention(np.concatenate([pattern, pattern[:, ::-1]]), [" a", "b", "c", "d"]))
    browser.click(".g4-head")
    assert browser.run("document.querySelector('.g4-head').getAttribute('aria-expanded')") == "true"
    said = "document.querySelector('.g4-said').textContent"
    assert browser.run(said) == "head 0: d (3) → d (3)  0.800"
    browser.run("document.querySelector('.g4-map').focus()")
    browser.press("ArrowLeft")
    browser.press("ArrowUp")
    assert browser.run(said) == "head 0: c (2) → c (2)  0.550"
    strengths = "[...document.querySelectorAll('.g4-stage .g4-t')].map(t => +t.style.getPropertyValue('--v'))"
    assert np.allclose(browser.run(strengths), [9 / 16, 10 / 16, 11 / 16, 0], atol=1e-3)
    browser.point(*browser.middle(".g4-stage .g4-t", 1))  # another query
    assert np.allclose(browser.run(strengths), [5 / 16, 6 / 16, 0, 0], atol=1e-3)
    x, y = browser.middle(".g4-head img", 0)
    browser.point(x - 50, y - 50)
    assert tip(browser) == "head 0: ·a (0) → ·a (0)  0.0500"
    browser.run("document.querySelector('.g4-map').focus()")
    browser.press("Escape")
    assert browser.run("document.querySelector('.g4-stage').hidden") is True
    assert browser.run("document.activeElement.className") == "g4-head"
    browser.run("document.querySelectorAll('.g4-head')[1].focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('.g4-stage strong').textContent") == "head 1"


def test_another_series_recolours_the_tokens(browser, tmp_path):
    opened(browser, tmp_path, html.tokens(["a", "b"], {"loss": [1.0, 2.0], "change": [-4.0, np.nan]}))
    browser.run(
        "(s => { s.selectedIndex = 1; s.dispatchEvent(new Event('change', { bubbles: true })) })"
        "(document.querySelector('.g4-series'))"
    )
    shown = browser.run("[...document.querySelectorAll('.g4-t')].map(t => [t.className, t.dataset.tip])")
    assert shown == [["g4-c g4-t g4-neg", "a (0)\nchange: -4.00"], ["g4-c g4-t g4-nan", "b (1)\nchange: nan"]]
    assert browser.run("document.querySelector('.g4-low').textContent") == "-4.00"


def test_arrow_keys_move_among_cells(browser, tmp_path):
    opened(browser, tmp_path, html.heat(np.arange(6).reshape(2, 3), ["r", "s"], ["a", "b", "c"]))
    browser.run("document.querySelector('.g4-cells').focus()")
    for key, said in (
        ("ArrowRight", "r, a (0)\n0"),
        ("ArrowRight", "r, b (1)\n1.00"),
        ("ArrowDown", "s, b (1)\n4.00"),
        ("ArrowDown", "s, b (1)\n4.00"),
        ("ArrowLeft", "s, a (0)\n3.00"),
    ):
        browser.press(key)
        assert tip(browser) == said
    assert browser.run("document.activeElement.getAttribute('aria-describedby')") == "g4-tip"
    browser.press("Escape")
    assert tip(browser) is None


def test_bars_are_sorted_and_back(browser, tmp_path):
    opened(browser, tmp_path, html.bars(["a", "b", "c"], [1.0, -3.0, 2.0]))
    order = "[...document.querySelectorAll('tbody th')].map(e => e.textContent).join('')"
    browser.click(".g4-sort")
    assert browser.run(order) == "bca"
    browser.click(".g4-sort")
    assert browser.run(order) == "abc"


def test_numbers_that_are_none_are_said(browser, tmp_path):
    """In the second head alone; its finite numbers stay as they are."""
    values = np.array([[[1, 0], [0.5, 0.5]], [[1, np.nan], [np.inf, 0.25]]])
    opened(browser, tmp_path, html.attention(values, ["a", "b"]))
    assert browser.run("[...document.querySelectorAll('.g4-head')].map(h => 'nan' in h.dataset)") == [False, True]
    browser.click(".g4-head", 1)
    said, tokens = "document.querySelector('.g4-said').textContent", ".g4-stage .g4-t"
    assert browser.run(said).endswith("0.250")
    assert browser.run(f"[...document.querySelectorAll('{tokens}')].map(t => t.matches('.g4-nan'))") == [True, False]
    browser.run("document.querySelector('.g4-map').focus()")
    browser.press("ArrowLeft")
    assert browser.run(said).endswith("nan")
    browser.press("ArrowUp")
    assert browser.run(said).endswith("1.00")
    browser.press("ArrowRight")
    assert browser.run(said).endswith("nan")


def test_a_search_and_links_stay_in_their_picture(browser, tmp_path):
    """Two pictures of cards in one document, whose cards have the same numbers."""
    one, two = (
        html.cards([html.Card(i, f"{name} {i}", near=[(1 - i, 1.0)]) for i in range(2)], title=name)
        for name in ("first", "second")
    )
    tall = html.Picture("", Markup('<div style="height:9000px"></div>'))
    opened(browser, tmp_path, html.together("both", one, tall, two, tall))
    browser.run("document.querySelectorAll('.g4-search')[1].focus()")
    browser.type("first")
    hidden = "[...document.querySelectorAll('.g4-card')].map(c => c.hidden)"
    assert browser.run(hidden) == [False, False, True, True]
    assert browser.run("[...document.querySelectorAll('output')].map(o => o.textContent)") == ["2 of 2", "0 of 2"]
    browser.run("document.querySelectorAll('.g4-card').forEach(c => { c.hidden = false; })")
    browser.run("document.querySelectorAll('.g4-card')[2].querySelector('.g4-link').click()")
    top = "document.querySelectorAll('.g4-card')[{}].getBoundingClientRect().top"
    assert abs(browser.run(top.format(3))) < 300 < abs(browser.run(top.format(1)))
    assert browser.run("document.activeElement === document.querySelectorAll('.g4-card')[3]")


def test_cards_are_searched(browser, tmp_path):
    examples = [[html.Example([word], np.ones(1))] for word in ("Maus", "Haus", "Ei")]
    cards = [html.Card(i, f"feature {i}", examples=one) for i, one in enumerate(examples)]
    opened(browser, tmp_path, html.cards(cards))
    browser.click(".g4-search")
    browser.type("AUS")
    hidden = "[...document.querySelectorAll('.g4-card')].map(c => c.hidden)"
    assert browser.run(hidden) == [False, False, True]
    assert browser.run("document.querySelector('output').textContent") == "2 of 3"


@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_shows_something(browser, tmp_path, dark):
    image = pytest.importorskip("PIL.Image")
    opened(browser, tmp_path, all_pictures(), dark=dark)
    pixels = np.asarray(image.open(browser.screenshot(tmp_path / "shot.png")).convert("RGB")).astype(int)
    assert pixels.shape == (700, 1000, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (np.median(pixels) < 60) == dark
    blue = pixels[..., 2] - pixels[..., 0]
    assert (blue > 60).mean() > 0.002


def test_fragments_of_a_notebook_share_one_script(browser, tmp_path):
    """Twice the same output, as cells of a notebook: a click enlarges once, and the page around keeps its style."""
    one = html.attention(np.ones((1, 1, 1)), ["a"]).fragment()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><p id=p>text</p>{one}{one}", encoding="utf-8")
    browser.open(tmp_path / "notebook.html")
    browser.click(".g4-head", 1)
    assert browser.run("[...document.querySelectorAll('.g4-stage')].map(s => s.hidden)") == [True, False]
    assert browser.run("getComputedStyle(document.querySelector('#p')).fontSize") == "16px"
