"""The page of tinted tokens (plumbing/page.py), read back as a browser would read it."""

import html.parser

import pytest
import torch
from conftest import WORDS, tiny, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from plumbing import page
from rollout import from_texts
from teacher import Pair, log_probs

TAGS = set("html head meta title style body h1 h2 p section span wbr br".split())
EMPTY_TAGS = ("meta", "wbr", "br")  # without an end
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "style", "title"}
EVIL = [
    "<script>document.title='broken'</script>",
    "</script>",
    "<!--",
    "-->",
    "&lt;",
    "&",
    "\"'`",
    "<img/src=x/onerror=document.title='broken'>",
    '"onmouseover="document.title=1',
    "</p></section>",
    "{names}",
]
ROWS = [
    {"ids": [1, 10, 11, 12], "answer": None},
    {"ids": [1, 7], "answer": None},
    {"ids": [1, 9], "answer": None},
]
K = 4


class Page(html.parser.HTMLParser):
    """tags, attributes: all names; words: the text; tokens: [{"class", "tint", "note", "text"}]."""

    def __init__(self, source):
        super().__init__()
        self.tags = set()
        self.attributes = set()
        self.comments = []
        self.open = []
        self.words = ""
        self.tokens = []
        self.feed(source)
        self.tokens = self.tokens[5:]  # those before are the scale

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.attributes.update(attributes)
        if tag not in EMPTY_TAGS:
            self.open.append(tag)
        if tag == "span":
            tint = float(attributes["style"].removeprefix("--tint:"))
            token = {"class": attributes["class"], "tint": tint, "text": ""}
            self.tokens.append({**token, "note": attributes["title"].splitlines()})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if self.open[-1:] == ["span"]:
            self.tokens[-1]["text"] += data

    def handle_comment(self, data):
        self.comments.append(data)


def pair_of(tokenizer):
    """Two tiny models over a tokenizer's words."""
    size = len(tokenizer)
    student = tiny("llama", seed=0, vocab_size=size)
    teacher = tiny("llama", seed=1, vocab_size=size)
    return Pair(student, teacher, tokenizer, size, [WORDS.index("[EOS]")])


def read(path, pair, rows=ROWS, **options):
    """Write the page of a pair, and read it."""
    page.write_page(pair, rows, path / "page.html", k=K, **options)
    return Page((path / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def saying(monkeypatch):
    """Makes the student write just these responses (token ids)."""

    def say(*responses, cut=False):
        def rollout(model, prompts, **_):
            r = from_texts(prompts, responses)
            r.truncated[:] = cut
            return r

        monkeypatch.setattr(page, "rollout", rollout)

    return say


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A page of three responses of unlike length, what the student wrote, and the pair."""
    pair = pair_of(word_tokenizer())
    kept = []

    def rollout(*args, **how):
        kept.append(page_rollout(*args, **how))
        return kept[0]

    page_rollout = page.rollout
    monkeypatch.setattr(page, "rollout", rollout)
    made = read(tmp_path, pair, max_new_tokens=20, temperature=0.5, seed=11)
    return made, kept[0], pair


# --- safe and whole ------------------------------------------------------------------------------


def test_what_models_prompts_and_paths_say_stays_text(tmp_path, saying):
    """Markup is shown as text: no element, comment or attribute comes of it."""
    pair = pair_of(word_tokenizer(WORDS + EVIL))
    pair.student.name_or_path = "".join(EVIL)
    ids = list(range(len(WORDS), len(WORDS) + len(EVIL)))
    saying(ids)
    made = read(tmp_path, pair, [{"ids": ids, "answer": "".join(EVIL)}])
    assert made.tags <= TAGS and made.attributes <= ATTRIBUTES
    assert not made.comments and not made.open
    assert [token["text"] for token in made.tokens] == EVIL
    assert [token["note"][0] for token in made.tokens] == EVIL
    assert " ".join(EVIL) in made.words and made.words.count("".join(EVIL)) >= 2


def test_the_page_runs_and_fetches_nothing(written, tmp_path):
    """It has no script and no address, and its own policy forbids both."""
    made, _, _ = written
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert made.tags <= TAGS and made.attributes <= ATTRIBUTES and not made.open
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in source
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in source


def test_every_token_of_a_response_is_on_the_page_once_and_in_order(written):
    """The order in which micro-batches graded them does not matter."""
    made, r, pair = written
    ids = [i for row in range(len(ROWS)) for i in r.response_ids(row)]
    assert len({len(r.response_ids(row)) for row in range(len(ROWS))}) > 1
    assert [token["text"] for token in made.tokens] == [
        page.visible(pair.tokenizer, i) for i in ids
    ]


# --- the numbers are those of the two models -----------------------------------------------------


def test_tint_and_note_follow_two_plain_forward_passes(written):
    """They give p(y), q(y), reward, overlap and likely shared tokens, at the page's temperature."""
    made, r, pair = written
    y = r.ids[r.is_response]  # (N,)
    log_p = log_probs(pair.student, r.ids, r.attention_mask, r.is_response, temperature=0.5)
    log_q = log_probs(pair.teacher, r.ids, r.attention_mask, r.is_response)
    assert len(made.tokens) == len(y) and "at temperature 0.5" in made.words
    sides = set()
    for token, log_p_t, log_q_t, y_t in zip(made.tokens, log_p.detach(), log_q.detach(), y):
        p = log_p_t.exp()
        q = log_q_t.exp()
        reward = (log_q_t - log_p_t)[y_t].item()
        Q = q.topk(K).indices.tolist()
        shared = [i for i in p.topk(K).indices.tolist() if i in Q]
        assert token["class"] == ("less" if reward < 0 else "more")
        assert token["tint"] == pytest.approx(min(abs(reward) / 2, 1), abs=0.006)
        assert token["note"][1] == (
            f"p {p[y_t]:.3g}, q {q[y_t]:.3g}, reward {reward:+.3f}, overlap {len(shared) / K:.2f}"
        )
        names = [page.visible(pair.tokenizer, i) for i in shared]
        assert token["note"][3:] == [
            f"{name}   p {p[i]:.3g}, q {q[i]:.3g}" for name, i in zip(names, shared)
        ]
        sides.add(token["class"])
    assert sides == {"less", "more"}


def test_a_thought_that_the_template_has_begun_is_a_thought_here_too(tmp_path, saying):
    """The page judges as accuracy does (R1-Distill's template ends with <think>)."""
    words = [*WORDS, "Answer:", "<think>"]
    saying([len(WORDS), WORDS.index("7")])
    made = read(
        tmp_path, pair_of(word_tokenizer(words)), [{"ids": [7, len(words) - 1], "answer": "7"}]
    )
    assert "no answer, 7 was asked for" in made.words


@pytest.mark.parametrize(
    "answer, cut, said",
    [
        ("7", False, "answer 7 ✓ right"),
        ("3", False, "answer 7 ✗ wrong, 3 was asked for"),
        (None, True, "✂ cut off"),
    ],
)
def test_the_verdict_stands_beside_length_and_mean_reward(tmp_path, saying, answer, cut, said):
    """Without an answer to compare with, nothing is judged."""
    pair = pair_of(word_tokenizer(WORDS + ["Answer:"]))
    saying([len(WORDS), WORDS.index("7")], cut=cut)
    made = read(tmp_path, pair, [{"ids": [7], "answer": answer}])
    rewards = [float(token["note"][1].split("reward ")[1].split(",")[0]) for token in made.tokens]
    assert said in made.words and "2 tokens" in made.words
    assert ("✓" in made.words or "✗" in made.words) == (answer is not None)
    mean = made.words.split("mean reward ")[1].split()[0]
    assert float(mean) == pytest.approx(sum(rewards) / 2, abs=0.002)


def test_a_token_that_the_teacher_rules_out_is_shown(tmp_path):
    """If log q is minus infinity the tint is full, and nothing raises."""
    reward = -torch.inf
    made = Page(page.tinted("a", reward, "note") * 6)
    assert made.tokens == [{"class": "less", "tint": 1.0, "text": "a", "note": ["note"]}]


# --- tokens as text ------------------------------------------------------------------------------


def test_parts_of_a_character_and_what_cannot_be_seen_are_named():
    """Bytes have the tokenizer's names, spaces and breaks a sign, control characters a number."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    shown = [page.visible(tokenizer, i) for i in tokenizer("é \n\t<\0\r").input_ids]
    assert shown == ["⟨Ã⟩", "⟨©⟩", "·", "↵", "⇥", "<", "⟨U+0000⟩", "⟨U+000D⟩"]
    assert page.escaped("a\u202eb\u2028<\n") == "a⟨U+202E⟩b⟨U+2028⟩&lt;\n"


def test_spaces_of_a_sentencepiece_token_are_seen():
    """Such a tokenizer decodes "▁a" to "a"; on the page it is "·a"."""
    inner = Tokenizer(models.WordLevel({"▁a": 0, "a": 1}, unk_token="a"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert [page.visible(tokenizer, i) for i in (0, 1)] == ["·a", "a"]
