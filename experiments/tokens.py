"""experiments/tokens.py: a few responses to read, every token tinted by what the teacher thinks of it (paper 2.2, 6.2).

    reward at a token y_t    log q(y_t|s_t) - log p(y_t|s_t), nats: orange and underlined below 0, blue above, full tint from 2 nats on
    sequence mean reward     its mean over a response, the paper's Figure 14; it says little about a single token

The page is ours, the paper has none. It is one file and fetches nothing: its own content policy forbids it. What a
model or a prompt wrote is escaped in the text, and reaches the cards as JSON and text nodes, never as markup.

    python analysis.py --student S --teacher T --prompts F --tokens out.html   then open out.html; #r0t5 opens a card
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from analysis import diagnose
from plumbing.answers import read_answer, same_answer

TOP = 5  # likeliest tokens of each model on a card
SATURATION = 2.0  # nats: the full tint
LIMIT = 900_000  # bytes of a page; beyond it fewer responses are kept


def read(pair, r, k, temperature):
    """Every token of a rollout as both models see it: -> for each response {name: (T,) or (T, TOP)}, on the CPU.

    y, reward, p(y), q(y), overlap ratio, entropies, the student's likeliest tokens S and the teacher's Q.
    """

    def per_position(log_p, log_q, y):  # (N, V), (N, V), (N,)
        x = diagnose(log_p, log_q, y, k)  # {name: (N,)}
        (p, S), (q, Q) = (
            log_x.exp().topk(min(TOP, log_x.size(-1))) for log_x in (log_p, log_q)
        )  # (N, TOP)
        return {
            "y": y,
            "reward": x["reward"],
            "p_y": x["log_p"].exp(),
            "q_y": (x["log_p"] + x["reward"]).exp(),
            "overlap_ratio": x["overlap_ratio"],
            "H_p": x["entropy_student"],
            "H_q": x["entropy_teacher"],
            "S": S,
            "p_S": p,
            "Q": Q,
            "q_Q": q,
        }

    grid = {
        name: x.cpu() for name, x in pair.grade(r, per_position, temperature=temperature).items()
    }  # (B, T, ...)
    return [
        {name: x[row, written] for name, x in grid.items()}
        for row, written in enumerate(r.response_mask.cpu())
    ]


# --- tokens as text ------------------------------------------------------------------------------------------------


def pieces(tokenizer, before, ids):
    """The text that each token adds after the tokens `before`: list of str, which joined are the response.

    A token that ends inside a character (some of its UTF-8 bytes) adds "", the one that completes it the character.
    """

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids, out = [*before[-4:], *ids], []
    start, done = (
        0,
        len(before[-4:]),
    )  # ids[start:done] is text already, decoded again for the space that follows
    for end in range(done + 1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            out.append("")
        else:
            out.append(text[len(decode(ids[start:done])) :])
            start, done = done, end
    return out


def visible(tokenizer, i):
    """One token by itself, what has no shape spelt out: "␣the", "↵↵", "⟨U+200B⟩", "⟨bytes ðŁ⟩" of a character."""
    text, piece = (
        tokenizer.decode([i], clean_up_tokenization_spaces=False),
        str(tokenizer.convert_ids_to_tokens(i)),
    )
    if "\ufffd" in text:
        return f"⟨bytes {piece}⟩"
    if piece.startswith("▁") and not text.startswith(" "):  # sentencepiece drops the first space
        text = " " + text
    shapes = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(
        shapes.get(c) or (c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in text or piece
    )


def escaped(text):
    """Text of a model or a prompt as HTML; control characters, which vanish or turn the line around, are spelt out."""
    text = re.sub(
        "[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda c: f"⟨U+{ord(c[0]):04X}⟩",
        text,
    )
    return html.escape(text)


def tinted(text, reward):
    """A token as a span: the class says the sign of its reward, --a the size, 0 to 1; style marks spaces and breaks."""
    text = re.sub(
        "[ \n\t]",
        lambda c: f"<span class={'nl' if c[0] == chr(10) else 'sp'}>{c[0]}</span>",
        escaped(text),
    )
    strength = min(abs(reward) / SATURATION, 1)
    tint = (
        ""
        if strength < 0.005
        else f" class={'neg' if reward < 0 else 'pos'} style=--a:{strength:.2f}"
    )
    return f"<span{tint}>{text}</span>"


# --- the page ------------------------------------------------------------------------------------------------------


def marks(said, want, truncated):
    """Verdicts on a response as (class, sign and word): right or wrong where there is an answer to compare, cut off."""
    right = want is not None and same_answer(said, want)
    wrong = want is not None and not right and (said is not None or not truncated)
    return [
        mark
        for mark, holds in (
            (("right", "✓ correct"), right),
            (("wrong", "✗ incorrect"), wrong),
            (("cut", "✂ cut off"), truncated),
        )
        if holds
    ]


def facts(pairs):
    """(name, text) pairs as a list of definitions; what has no text is left out."""
    items = (
        f"<div><dt>{name}</dt><dd>{escaped(str(text))}</dd></div>" for name, text in pairs if text
    )
    return f"<dl>{''.join(items)}</dl>"


def section(pair, number, row, ids, truncated, values):
    """One response as HTML: verdict, facts, prompt, tinted text."""
    said, want = read_answer(pair.tokenizer.decode(ids, skip_special_tokens=True)), row["answer"]
    badges = "".join(
        f" <span class='mark {name}'>{text}</span>" for name, text in marks(said, want, truncated)
    )
    prompt = (
        row["prompt"]
        if isinstance(row["prompt"], str)
        else "\n".join(f"{message['role']}: {message['content']}" for message in row["prompt"])
    )
    text = f"<p class=prompt>{escaped(prompt)}</p>"
    if len(prompt) > 400:
        text = f"<details><summary>{escaped(' '.join(prompt.split())[:150])} …</summary>{text}</details>"
    mean = f"{values['reward'].mean():+.3f} nats a token".replace("-", "−")
    about = [("mean reward", mean), ("length", f"{len(ids)} tokens")]
    about += [] if want is None else [("wanted", want), ("said", said or "nothing")]
    tokens = map(tinted, pieces(pair.tokenizer, row["ids"], ids), values["reward"].tolist())
    return f"""<section><h2>response {number}{badges}</h2>
{facts(about)}{text}
<div class=text role=group aria-label="response {number}, arrow keys move by a token">{"".join(tokens)}</div>
</section>"""


def cards(values):
    """What the cards of one response show: list over tokens of the values of `read` in its order, four digits each."""

    def short(x):
        if isinstance(x, list):
            return [short(y) for y in x]
        return (
            x if isinstance(x, int) else float(f"{max(-1e4, min(x, 1e4)):.4g}")
        )  # JSON has no infinity

    return [list(row) for row in zip(*(short(x.tolist()) for x in values.values()))]


def write_page(pair, rows, out, *, k=16, max_new_tokens=128, temperature=1.0, seed=0):
    """One response to each of rows (from Pair.encode, {"prompt", "answer" or None, "ids"}), graded: -> an HTML file.

    Where the page would outgrow LIMIT, the last responses are left out and the page says so; the first always stays.
    """
    r = pair.write(
        [row["ids"] for row in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    graded = read(pair, r, k, temperature)
    sections = [
        section(pair, i, row, r.response_ids(i), bool(r.truncated[i]), graded[i])
        for i, row in enumerate(rows)
    ]
    for kept in range(len(rows), 0, -1):
        page = assemble(
            pair,
            sections[:kept],
            [cards(values) for values in graded[:kept]],
            k,
            temperature,
            len(rows),
        )
        if len(page) <= LIMIT:
            break
    Path(out).write_bytes(page)


def assemble(pair, sections, responses, k, temperature, asked):
    """The page around its sections, with the data of the cards: -> UTF-8 bytes."""
    ids = {i for tokens in responses for y, *_, S, _, Q, _ in tokens for i in (y, *S, *Q)}
    data = json.dumps(
        {
            "k": k,
            "names": {i: visible(pair.tokenizer, i) for i in sorted(ids)},
            "responses": responses,
        },
        separators=(",", ":"),
        allow_nan=False,
    )
    for c in "<>&":  # no way out of the script element; all else is ASCII already
        data = data.replace(c, f"\\u{ord(c):04x}")
    scale = "".join(map(tinted, ("≤ −2", "−1", "0", "+1", "≥ +2"), (-2, -1, 0, 1, 2)))
    names = facts([("student", pair.student.name_or_path), ("teacher", pair.teacher.name_or_path)])
    at = (
        ""
        if temperature == 1
        else f" The student wrote, and p is taken, at temperature {temperature:g}."
    )
    fewer = (
        ""
        if len(responses) == asked
        else (
            f"<p><b>Only the first {len(responses)} of {asked} responses fit into {LIMIT // 1000} kB.</b></p>"
        )
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>What the teacher thinks of every token</title><style>{STYLE}</style></head><body><main>
<h1>What the teacher thinks of every token</h1>{names}
<p>The student wrote, the teacher graded: the reward of a token y is log q(y) − log p(y), p the student, q the teacher.
<span class=neg style=--a:.6>Orange, underlined</span>: the teacher finds it less likely than the student does.
<span class=pos style=--a:.6>Blue</span>: more likely.{at}</p>
<p class=scale>{scale} <b>nats</b></p>
<p>−1 nat: 2.7 times less likely to the teacher; −2 nats: 7.4 times. Point at a token, tap it, or Tab to a text and use
the arrow keys; Escape closes.</p>{fewer}
{"".join(sections)}
</main><div id="card" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script></body></html>
""".encode()


STYLE = """
:root { --page: #fbfaf8; --ink: #1c1c1e; --soft: #66666c; --line: #dddad4; --card: #fff; --bar: #cfdcf0;
  --neg: 230 120 20; --neg-max: .55; --pos: 60 150 225; --pos-max: .55; --edge: 160 60 0;
  --right: #146c43; --wrong: #b3261e; --cut: #7a5200 }
@media (prefers-color-scheme: dark) { :root { --page: #16171a; --ink: #e8e6e3; --soft: #9c9ca4; --line: #35363c;
  --card: #232429; --bar: #35496b; --neg: 215 100 10; --neg-max: .6; --pos: 40 130 215; --pos-max: .55;
  --edge: 255 170 90; --right: #6fd6a0; --wrong: #ff9b93; --cut: #f0c263 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 22rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .5rem }
h2 { font-size: 1.05rem; margin: 0 0 .3rem }
main > p { margin: .6rem 0 }
section { border-top: 1px solid var(--line); margin-top: 1.6rem; padding-top: 1.2rem }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; margin: 0; font-size: .9rem }
dl div { display: flex; gap: .4rem }
dt { color: var(--soft); white-space: nowrap }
dd { margin: 0 }
.mark { font-size: .85rem; border: 1px solid; border-radius: 1em; padding: .05em .6em; margin-left: .4em }
.right { color: var(--right) }
.wrong { color: var(--wrong) }
.cut { color: var(--cut); border-style: dashed }
section > .prompt, details { border-left: 3px solid var(--line); padding-left: .8rem; margin: .7rem 0 0 }
.prompt { white-space: pre-wrap }
.prompt, summary { color: var(--soft) }
.text { white-space: pre-wrap; line-height: 1.9; margin-top: .8rem; tab-size: 4 }
.text > span { cursor: pointer; border-radius: 3px; padding: .1em 0; box-decoration-break: clone }
.text > span:hover, .text > .open { outline: 2px solid var(--ink) }
.neg { background: rgb(var(--neg) / calc(var(--a) * var(--neg-max)));
  box-shadow: inset 0 -2px rgb(var(--edge) / var(--a)) }
.pos { background: rgb(var(--pos) / calc(var(--a) * var(--pos-max))) }
.nl::before { content: "↵" }
.text > span:empty::before { content: "▯" }
.text .sp { background: radial-gradient(circle at 50% 58%, rgb(125 125 130 / .75) .05em, transparent .07em) }
.scale > span { display: inline-block; padding: .1em .6em; font-size: .85rem }
#card { position: absolute; width: min(23rem, 100vw - 1rem); padding: .7rem .8rem; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); box-shadow: 0 6px 24px rgb(0 0 0 / .28); font-size: .85rem;
  line-height: 1.4; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
#card:not(.pinned) { pointer-events: none }
#card p { margin: .15rem 0; white-space: pre-wrap }
#card table { border-collapse: collapse; width: 100%; margin: .5rem 0; table-layout: fixed }
#card th, #card td { padding: .1rem .3rem; text-align: left; vertical-align: top }
#card .name { width: 30% }
#card .bar { background: linear-gradient(to right, var(--bar) var(--w), transparent var(--w)) }
#card code { font: .85rem ui-monospace, monospace }
#card .y { font-weight: 700; font-size: 1rem }
#card .head { display: flex; justify-content: space-between; gap: 1rem }
#card .soft { color: var(--soft); white-space: nowrap }
"""

SCRIPT = """'use strict';
const data = JSON.parse(document.getElementById('data').textContent), card = document.getElementById('card');
const texts = [...document.querySelectorAll('.text')];
let open = null, pinned = false;                // the token whose card shows; does it stay when the mouse leaves?

const make = (tag, name, ...content) => {       // strings become text nodes, never markup
  const element = document.createElement(tag);
  element.className = name;
  element.append(...content);
  return element;
};
const number = x => x >= 0.001 || x === 0 ? x.toFixed(3) : x.toExponential(1).replace('-', '−');
const tokenAt = node => node instanceof Element ? node.closest('.text > span') : null;
const place = token => [texts.indexOf(token.parentNode), [...token.parentNode.children].indexOf(token)];

function fill(r, t) {
  const [y, reward, p, q, overlap, Hp, Hq, S, pS, Q, qQ] = data.responses[r][t];
  const name = i => make('td', '', make('code', i === y ? 'y' : '', data.names[i]), i === y ? ' ◂' : '');
  const bar = x => {
    const cell = make('td', 'bar', number(x));
    cell.style.setProperty('--w', 100 * x + '%');
    return cell;
  };
  const head = ['student', 'p', 'teacher', 'q'].map((x, n) => make('th', n % 2 ? '' : 'name', x));
  const times = Math.exp(Math.abs(reward)), factor = times < 1000 ? times.toPrecision(3) : times.toExponential(1);
  card.replaceChildren(
    make('p', 'head', make('code', 'y', data.names[y]), make('span', 'soft', `response ${r}, position ${t}`)),
    make('p', '', make('b', '', 'reward ' + (reward < 0 ? '−' : '+') + Math.abs(reward).toFixed(3)), ' nats: q(y) is ',
      times < 1.005 ? 'as large as p(y)' : factor + ' times ' + (reward < 0 ? 'smaller' : 'larger')),
    make('p', '', `p(y) ${number(p)} student,  q(y) ${number(q)} teacher`),
    make('table', '', make('tr', '', ...head),
      ...S.map((i, n) => make('tr', '', name(i), bar(pS[n]), name(Q[n]), bar(qQ[n])))),
    make('p', '', `overlap ratio ${overlap.toFixed(3)}, ${Math.round(overlap * data.k)} of the top ${data.k}`),
    make('p', '', `entropy ${Hp.toFixed(3)} student, ${Hq.toFixed(3)} teacher, nats`));
}

function show(token, pin) {
  close();
  [open, pinned] = [token, pin];
  fill(...place(token));
  token.classList.add('open');
  token.setAttribute('aria-describedby', 'card');
  card.classList.toggle('pinned', pin);
  card.hidden = false;
  const box = [...token.getClientRects()].pop(), gap = 6, height = card.offsetHeight + gap;
  const above = box.bottom + height > innerHeight && box.top > height;
  const right = document.documentElement.clientWidth - card.offsetWidth - 8;
  card.style.left = scrollX + Math.max(8, Math.min(box.left, right)) + 'px';
  card.style.top = scrollY + (above ? box.top - height : box.bottom + gap) + 'px';
}

function close() {
  open?.classList.remove('open');
  open?.removeAttribute('aria-describedby');
  card.hidden = true;
  [open, pinned] = [null, false];
}

function select(token) {                        // one Tab stop a response: the token last visited
  for (const other of token.parentNode.children) other.tabIndex = other === token ? 0 : -1;
  token.focus();
  show(token, true);
}

function follow() {                             // #r0t5: token 5 of response 0
  const found = /^#r(\\d+)t(\\d+)$/.exec(location.hash), token = found && texts[found[1]]?.children[found[2]];
  if (!token) return;
  token.scrollIntoView({block: 'center'});
  select(token);
}

for (const text of texts) [...text.children].forEach((token, t) => {
  token.setAttribute('role', 'button');
  token.tabIndex = t ? -1 : 0;
});
document.addEventListener('mouseover', event => {
  const token = tokenAt(event.target);
  if (!pinned) token ? show(token, false) : close();
});
document.addEventListener('focusin', event => tokenAt(event.target) ? show(tokenAt(event.target), true) : close());
document.addEventListener('click', event => {
  const token = tokenAt(event.target);
  if (token) {
    select(token);
    history.replaceState(null, '', '#r' + place(token).join('t'));
  } else if (!card.contains(event.target)) close();
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') close();
  const token = tokenAt(document.activeElement), all = token && token.parentNode.children;
  const to = token && {ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling, Home: all[0],
    End: all[all.length - 1], Enter: token, ' ': token}[event.key];
  if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(to);
});
addEventListener('hashchange', follow);
addEventListener('resize', () => open && show(open, pinned));                  // a phone that is turned
follow();
"""
