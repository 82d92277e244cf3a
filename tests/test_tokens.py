"""Laws of experiments/tokens.py: the page of tinted tokens, read back as a browser would read it."""

import base64
import contextlib
import functools
import hashlib
import html.parser
import json
import shutil
import subprocess

import pytest
import torch
from conftest import WORDS, tiny, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments import tokens
from rollout import Rollout, left_pad
from teacher import Pair, split

TAGS = set(
    "html head meta title style body main h1 h2 p b span dl div dt dd section details summary script".split()
)
FETCHING = {
    "src",
    "href",
    "srcset",
    "action",
    "formaction",
    "poster",
    "data",
    "background",
    "ping",
    "xlink:href",
}
EVIL = [
    "<script>document.title='broken'</script>",
    "</script>",
    "<!--",
    "-->",
    "]]>",
    "&lt;",
    "&",
    "\"'`",
    "<img/src=x/onerror=document.title='broken'>",
    "'onmouseover='document.title=1",
    "</div></section>",
    "\\u003c",
    "a\u2028b\u2029",
]


class Page(html.parser.HTMLParser):
    """tags [(name, attributes)], comments, scripts [text], texts [[(class, style, text) a token] a response], words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.comments, self.scripts, self.texts, self.words, self.open = (
            [],
            [],
            [],
            [],
            "",
            [],
        )
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "script":
            self.scripts.append("")
        if attributes.get("class") == "text":
            self.texts.append([])
        if self.open and self.open[-1][1].get("class") == "text":
            self.texts[-1].append((attributes.get("class"), attributes.get("style"), ""))
        if tag != "meta":
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        elif any(attributes.get("class") == "text" for _, attributes in self.open):
            *style, text = self.texts[-1][-1]
            self.texts[-1][-1] = (*style, text + data)
        else:
            self.words += data

    def handle_comment(self, data):
        self.comments.append(data)


def pair_of(tokenizer, *, size=None, **shape):
    """Two tiny models over a tokenizer's words."""
    size = size or len(tokenizer)
    student, teacher = (tiny("llama", seed=seed, vocab_size=size, **shape) for seed in (0, 1))
    ends = [i for i in [tokenizer.eos_token_id] if i is not None]
    ending = dict(eos_ids=ends, merge_ends=True, pad_id=0, vocab_size=size)
    return Pair(
        student,
        teacher,
        tokenizer,
        ending,
        (split(student, size), split(teacher, size)),
        torch.device("cpu"),
        contextlib.nullcontext,
    )


def row(prompt, ids, answer=None):
    return {"prompt": prompt, "answer": answer, "ids": ids}


def saying(pair, *responses, cut=False):
    """The pair, but the student writes just these responses (token ids, of one length)."""

    def write(prompts, **_):
        (ids, seen), y = left_pad(prompts, 0), torch.tensor(responses)  # (B, P) both, (B, T)
        written = torch.ones_like(y, dtype=torch.bool)
        is_response = torch.cat([torch.zeros_like(seen), written], 1)  # (B, P+T)
        return Rollout(
            torch.cat([ids, y], 1),
            torch.cat([seen, written], 1),
            is_response,
            torch.zeros(y.shape),
            torch.full((len(y),), cut),
        )

    pair.write = write
    return pair


def written(pair, rows, path, **options):
    tokens.write_page(pair, rows, path / "page.html", **options)
    return Page((path / "page.html").read_text())


@functools.cache
def plain_pair():
    return pair_of(word_tokenizer())


ROWS = [
    row("3 7 +", [1, 10, 11, 12]),
    row("add", [1, 7]),
    row("digits", [1, 9]),
]  # to answers of unlike length


SEED = 11


@pytest.fixture
def page(tmp_path):
    return written(plain_pair(), ROWS, tmp_path, k=4, max_new_tokens=20, seed=SEED)


def evil(tmp_path):
    """A page on which everything that a model, a prompt, an answer or a path can say is hostile: Page, ids."""
    pair = pair_of(word_tokenizer(WORDS + EVIL))
    pair.student.name_or_path = pair.teacher.name_or_path = "".join(EVIL)
    ids = list(range(len(WORDS), len(WORDS) + len(EVIL)))
    rows = [
        row(" ".join(EVIL), [1], "".join(EVIL)),
        row([{"role": EVIL[1], "content": " ".join(EVIL) * 9}], [1]),
    ]
    return written(saying(pair, ids, ids[::-1]), rows, tmp_path, k=4), ids


def test_what_models_and_prompts_write_stays_text(tmp_path):
    """Markup in tokens, prompts, answers and names is shown, not obeyed: it makes no element, comment or attribute."""
    page, ids = evil(tmp_path)
    assert (
        {tag for tag, _ in page.tags} <= TAGS
        and len(page.scripts) == 2
        and not page.comments
        and not page.open
    )
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert [text for *_, text in page.texts[0]] == [" " + word for word in EVIL]
    assert page.words.count(" ".join(EVIL)) >= 2 and page.words.count("".join(EVIL)) >= 3
    names = [page.data["names"][str(i)] for i in ids]
    assert [
        name.replace("⟨U+2028⟩", "\u2028").replace("⟨U+2029⟩", "\u2029") for name in names
    ] == EVIL
    assert page.scripts[0].isascii() and not set("<>&") & set(page.scripts[0])


def test_the_page_fetches_nothing(page, tmp_path):
    """No address, no style from elsewhere; the policy allows this one script and nothing else."""
    text = (tmp_path / "page.html").read_text()
    assert not any(FETCHING & attributes.keys() for _, attributes in page.tags)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not any(
        word in text
        for word in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttp", "import(")
    )
    policy = next(
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_every_token_is_on_the_page_once_and_in_order(page):
    """The spans are the response, whatever order the micro-batches graded it in; the cards follow the same ids."""
    r = plain_pair().write([row["ids"] for row in ROWS], max_new_tokens=20, seed=SEED)
    assert (
        len(page.texts)
        == len(page.data["responses"])
        == len(set(r.response_mask.sum(1).tolist()))
        == 3
    )
    for i, (spans, cards) in enumerate(zip(page.texts, page.data["responses"])):
        assert [text for *_, text in spans] == [
            " " + WORDS[y] if y < len(WORDS) else "" for y in r.response_ids(i)
        ]
        assert [card[0] for card in cards] == r.response_ids(i)


def test_the_tint_follows_the_reward(page):
    """One class below 0, another above, the strength |log q(y) - log p(y)| / 2 up to 1, as two plain forward passes give it."""
    pair, seen = plain_pair(), set()
    for row, spans, cards in zip(ROWS, page.texts, page.data["responses"]):
        y = torch.tensor([card[0] for card in cards])
        whole, start = torch.cat([torch.tensor(row["ids"]), y])[None], len(row["ids"]) - 1
        log_p, log_q = (
            model(whole).logits[0, start:-1].log_softmax(-1).gather(-1, y[:, None])[:, 0].detach()
            for model in (pair.student, pair.teacher)
        )  # (T,)
        for (tint, style, _), card, reward in zip(
            spans, cards, (log_q - log_p).tolist(), strict=True
        ):
            assert card[1] == pytest.approx(reward, rel=1e-3, abs=1e-4)
            strength = min(abs(reward) / 2, 1)
            assert tint == (None if strength < 0.005 else "neg" if reward < 0 else "pos")
            assert tint is None or float(style.removeprefix("--a:")) == pytest.approx(
                strength, abs=0.006
            )
            seen |= {tint, strength}
    assert {"neg", "pos", 1} <= seen


def test_the_likeliest_tokens_are_those_of_the_softmax(page):
    """Top 5 of each model, ids and probabilities, and p(y), q(y), against the models run by themselves."""
    pair = plain_pair()
    for row, cards in zip(ROWS, page.data["responses"]):
        whole = torch.tensor([row["ids"] + [card[0] for card in cards]])
        start = len(row["ids"]) - 1
        p, q = (
            model(whole).logits[0, start:-1].softmax(-1).detach()
            for model in (pair.student, pair.teacher)
        )
        for t, (y, _, p_y, q_y, overlap, _, _, S, p_S, Q, q_Q) in enumerate(cards):
            for x, x_y, ids, values in ((p[t], p_y, S, p_S), (q[t], q_y, Q, q_Q)):
                assert ids == x.topk(5).indices.tolist()
                assert values == pytest.approx(x.topk(5).values.tolist(), rel=1e-3)
                assert x_y == pytest.approx(x[y].item(), rel=1e-3)
            assert (
                overlap
                == len(set(p[t].topk(4).indices.tolist()) & set(q[t].topk(4).indices.tolist())) / 4
            )


def test_the_student_is_graded_at_the_temperature_at_which_it_wrote(tmp_path):
    """p(y) on the page is the probability with which y was drawn, and the page names the temperature."""
    r = plain_pair().write(
        [row["ids"] for row in ROWS], max_new_tokens=20, temperature=0.5, seed=SEED
    )
    page = written(plain_pair(), ROWS, tmp_path, k=4, max_new_tokens=20, temperature=0.5, seed=SEED)
    drawn = r.log_p[r.response_mask].exp().tolist()
    assert [card[2] for cards in page.data["responses"] for card in cards] == pytest.approx(
        drawn, rel=1e-3
    )
    assert "at temperature 0.5" in page.words


def test_numbers_on_cards_are_short_and_finite():
    """Four digits; what the teacher rules out has a reward of -10,000, as JSON has no infinity."""
    y, reward, p_S = (
        torch.tensor([3, 4]),
        torch.tensor([-torch.inf, 1 / 3]),
        torch.tensor([[2 / 3], [1e-9]]),
    )
    assert tokens.cards({"y": y, "reward": reward, "p_S": p_S}) == [
        [3, -1e4, [0.6667]],
        [4, 0.3333, [1e-9]],
    ]


@pytest.mark.parametrize(
    "said, want, truncated, words",
    [
        ("7", "7.0", False, ["correct"]),
        ("6", "7", False, ["incorrect"]),
        (None, "7", False, ["incorrect"]),
        (None, "7", True, ["cut off"]),
        ("6", "7", True, ["incorrect", "cut off"]),
        ("7", "7", True, ["correct", "cut off"]),
        (None, None, True, ["cut off"]),
        ("7", None, False, []),
    ],
)
def test_right_wrong_and_cut_off(said, want, truncated, words):
    """A sign and a word each; cut off before any answer is neither; without an answer to compare nothing is judged."""
    given = tokens.marks(said, want, truncated)
    assert [text[2:] for _, text in given] == words and len({text[0] for _, text in given}) == len(
        given
    )


@pytest.mark.parametrize(
    "answer, cut, said",
    [("7", False, "✓ correct"), ("3", False, "✗ incorrect"), (None, True, "✂ cut off")],
)
def test_the_verdict_is_on_the_page(tmp_path, answer, cut, said):
    """Beside it stand the wanted answer, the length and the mean reward."""
    pair = pair_of(word_tokenizer(WORDS + ["Answer:"]))
    page = written(saying(pair, [16, 11], cut=cut), [row("add", [7], answer)], tmp_path, k=4)
    rewards = [card[1] for card in page.data["responses"][0]]
    assert [mark for mark in ("✓", "✗", "✂") if mark in page.words] == [
        said[0]
    ] and said in page.words
    assert "length2 tokens" in page.words and ("wanted" + answer if answer else "add") in page.words
    assert f"mean reward{sum(rewards) / 2:+.3f} nats".replace("-", "−") in page.words


def test_a_character_in_several_tokens_appears_once(tmp_path):
    """Bytes of one character: empty spans and then the character; broken bytes and controls are shown, not obeyed."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = tokenizer("é 😀\n<\0\r").input_ids + tokenizer("😀").input_ids[:2]
    page = written(saying(pair_of(tokenizer), ids), [row("x", ids[:1])], tmp_path, k=4)
    assert [text for *_, text in page.texts[0]] == [
        "",
        "é",
        " ",
        "",
        "",
        "",
        "😀",
        "\n",
        "<",
        "⟨U+0000⟩",
        "⟨U+000D⟩",
        "",
        "�",
    ]
    names = [page.data["names"][str(i)] for i in ids]
    assert (
        names[2] == "␣"
        and names[7] == "↵"
        and all(name.startswith("⟨bytes") for name in names[3:7])
    )


def test_spaces_of_a_sentencepiece_token_are_seen():
    """Such a tokenizer decodes "▁a" to "a"; on a card it is "␣a"."""
    inner = Tokenizer(models.WordLevel({"▁a": 0, "a": 1}, unk_token="a"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert [tokens.visible(tokenizer, i) for i in (0, 1)] == ["␣a", "a"]
    assert tokens.pieces(tokenizer, [1], [0, 1, 0]) == [" a", "a", " a"]


def test_a_page_stays_below_a_megabyte(tmp_path, monkeypatch):
    """8 responses of 128 tokens, all different among 49,152 words; beyond the limit it keeps fewer and says so."""
    pair = pair_of(
        word_tokenizer(WORDS + [f"<word{i}>" for i in range(49152 - len(WORDS))]), size=len(WORDS)
    )
    graded = []
    for y in torch.randperm(49152, generator=torch.Generator().manual_seed(0))[: 8 * 128 * 11].view(
        8, 128, 11
    ):
        one, few = torch.rand(128, dtype=torch.float64) - 1, torch.rand(128, 5, dtype=torch.float64)
        graded.append(
            {
                "y": y[:, 0],
                **dict.fromkeys(("reward", "p_y", "q_y", "overlap_ratio", "H_p", "H_q"), one),
                "S": y[:, 1:6],
                "p_S": few,
                "Q": y[:, 6:],
                "q_Q": few,
            }
        )
    saying(pair, *(values["y"].tolist() for values in graded), cut=True)
    monkeypatch.setattr(tokens, "read", lambda *_: graded)
    page = written(pair, [row("0", [1, 15])] * 8, tmp_path)
    size = (tmp_path / "page.html").stat().st_size
    assert (
        [len(text) for text in page.texts] == [128] * 8
        and 200_000 < size < 1_000_000
        and "Only" not in page.words
    )
    monkeypatch.setattr(tokens, "LIMIT", size // 2)
    page = written(pair, [row("0", [1, 15])] * 8, tmp_path)
    assert (tmp_path / "page.html").stat().st_size <= size // 2 and 1 < len(page.texts) < 8
    assert f"Only the first {len(page.texts)} of 8 responses" in page.words
    assert len(page.data["responses"]) == len(page.texts)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_the_page(tmp_path):
    """In headless chromium #r0t5 opens the card of token 5, its text as text, and nothing hostile has run."""
    evil(tmp_path)
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*browser, f"file://{tmp_path}/page.html#r0t5"], capture_output=True, text=True, timeout=90
    ).stdout
    assert "<title>What the teacher thinks of every token</title>" in dom
    card = dom[dom.index('<div id="card"') : dom.index('<script type="application/json"')]
    assert "hidden" not in card.split(">")[0] and "response 0, position 5" in card
    assert "&amp;lt;" in card and "<img" not in card and card.count('<td class="bar"') == 10
    assert dom.count('aria-describedby="card"') == 1 and dom.count('tabindex="0"') == 2
