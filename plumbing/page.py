"""plumbing/page.py: a few responses to read, every token tinted by its reward (paper 2.2, 6.2).

    reward        log q(y) - log p(y) of a token y, nats; p the student that wrote it, q the teacher
    mean reward   its mean over a response; the paper's Figure 14. It says little about one token

One HTML file without a script, which fetches nothing. The paper has no such page.
"""

import functools
import html
import math

from analysis import diagnose
from loss import support_of
from plumbing.answers import CHECKERS, read_answer, text_said
from plumbing.files import write_whole
from plumbing.slots import rollout
from rollout import seed_of
from teacher import grade, read_by_teacher

SHOWN = 5  # how many of the tokens that both models find likely stand in the note of a token
FULL_TINT = 2.0  # nats: a reward this far from 0, or further, has the full colour
SHAPES = {" ": "·", "\n": "↵", "\t": "⇥"}
STYLE = """
body { max-width: 50rem; margin: 1.5rem auto; padding: 0 1rem; color: #1c1c1e; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
section { border-top: 1px solid #999; margin-top: 1.5rem }
.prompt { white-space: pre-wrap; color: #55555a; border-left: 3px solid #999; padding-left: .8rem }
.response { line-height: 2 }
.response span { padding: .1em 0; margin-right: 2px }
.response span:hover { outline: 2px solid #1c1c1e }
.more { background: rgb(60 150 225 / calc(.55 * var(--tint))) }
.less { background: rgb(230 120 20 / calc(.55 * var(--tint)));
  border-bottom: 2px solid rgb(160 60 0 / var(--tint)) }
"""


def write_page(
    pair,
    rows,
    out,
    *,
    k=16,
    max_new_tokens=128,
    temperature=1.0,
    seed=0,
    checker="built-in",
):
    """Let the student answer each of the rows once, grade it, and write the page to the file `out`.

    rows: from plumbing.prompts.encode_rows, {"ids", "answer" or None}. k: of the overlap (Eq. 6).
    max_new_tokens: of a response, at most. checker: a name in answers.CHECKERS.
    """
    with pair.autocast():
        r = rollout(
            pair.student,
            [row["ids"] for row in rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[seed_of(seed, "page", i) for i in range(len(rows))],
            in_flight=pair.in_flight,
            **pair.sampling,
        )
    per_position = functools.partial(seen, k=k)
    teacher_reads = read_by_teacher(r, rows, pair.pad_id)
    grid = grade(  # {name: (B, T) or (B, T, SHOWN)}
        pair, r, per_position, teacher_reads=teacher_reads, temperature=temperature
    )
    parts = [head(pair, len(rows), k, temperature)]
    for i, row in enumerate(rows):
        written = r.response_mask[i]  # (T,)
        values = {name: x[i, written].tolist() for name, x in grid.items()}
        truncated = bool(r.truncated[i])
        parts.append(f"<section>\n<h2>Response {i + 1}</h2>")
        parts.append(section(pair, row, r.response_ids(i), truncated, values, checker))
        parts.append("</section>")
    parts.append("</body></html>\n")
    page = "\n".join(parts).encode()
    write_whole(out, lambda file: file.write(page))


def head(pair, count, k, temperature):
    """The page above its responses: what it shows, and what its colours and signs mean: str."""
    scale = [tinted(reward, float(reward)) for reward in ("-2", "-1", "0", "+1", "+2")]
    return HEAD.format(
        style=STYLE,
        student=escaped(pair.student.name_or_path),
        teacher=escaped(pair.teacher.name_or_path),
        scale=" ".join(scale),
        count=count,
        temperature=temperature,
        k=k,
    )


def seen(log_p, log_q, y, k):
    """What the page says of each token: (N, V), (N, V), (N,) -> {name: (N,) or (N, SHOWN)}."""
    values = diagnose(log_p, log_q, y, k)
    S, is_shared = support_of(log_p, log_q, k, "intersection")  # (N, k), (N, k)
    p = log_p.gather(-1, S).exp() * is_shared  # 0 for a token that is not shared
    p, places = p.topk(min(SHOWN, k))  # (N, SHOWN)
    shared = S.gather(-1, places)
    q = log_q.gather(-1, shared).exp()
    return {**values, "shared": shared, "shared_p": p, "shared_q": q}


# --- one response --------------------------------------------------------------------------------


def section(pair, row, ids, truncated, values, checker="built-in"):
    """One response as HTML: facts about it, its prompt as each model reads it, its tokens."""
    tokenizer = pair.tokenizer
    said = read_answer(text_said(pair, row["ids"], ids))
    mean = sum(values["reward"]) / len(ids)
    facts = [f"mean reward {mean:+.3f} nats", f"{len(ids)} tokens"]
    if truncated:
        facts.append("✂ cut off")
    if row["answer"] is not None:
        facts.append(verdict(said, row["answer"], checker))
    spans = []
    for t, i in enumerate(ids):
        of_token = {name: x[t] for name, x in values.items()}
        text = visible(tokenizer, i)
        title = note(tokenizer, text, of_token)
        spans.append(tinted(text, of_token["reward"], title))
    about = escaped("; ".join(facts))
    prompt = escaped(tokenizer.decode(row["ids"]))
    if "teacher_ids" in row:
        prompt += '</p>\n<p class="prompt">the teacher reads: '
        prompt += escaped(tokenizer.decode(row["teacher_ids"]))
    response = "".join(spans)
    return f"""<p>{about}</p>
<p class="prompt">{prompt}</p>
<p class="response">{response}</p>"""


def verdict(said, wanted, checker="built-in"):
    """The answer in a response, and whether it is the one that was asked for: str."""
    if said is None:
        return f"no answer, {wanted} was asked for"
    if CHECKERS[checker](said, wanted):
        return f"answer {said} ✓ right"
    return f"answer {said} ✗ wrong, {wanted} was asked for"


def note(tokenizer, text, values):
    """What is shown when the mouse points at a token."""
    reward = values["reward"]
    overlap = values["overlap_ratio"]
    p = math.exp(values["log_p"])
    q = math.exp(values["log_p"] + reward)
    numbers = f"p {p:.3g}, q {q:.3g}, reward {reward:+.3f}, overlap {overlap:.2f}"
    lines = [text, numbers, "likely to both:" if overlap > 0 else "no token is likely to both"]
    for i, p, q in zip(values["shared"], values["shared_p"], values["shared_q"]):
        if p > 0:
            other = visible(tokenizer, i)
            lines.append(f"{other}   p {p:.3g}, q {q:.3g}")
    return "\n".join(lines)


# --- text as HTML --------------------------------------------------------------------------------


def visible(tokenizer, i):
    """One token as text in which everything can be seen: "·the", "↵↵", "⟨U+200B⟩".

    A token that is only a part of a character has the tokenizer's name for it: "⟨ðŁ⟩".
    """
    text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
    piece = str(tokenizer.convert_ids_to_tokens(i))
    if "\ufffd" in text:
        return f"⟨{piece}⟩"
    if piece.startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece leaves out the space of a text's first word
    shapes = [SHAPES.get(c, c) for c in text or piece]
    return spelt_out("".join(shapes))


def spelt_out(text):
    """A text with the numbers of characters that cannot be seen, or turn a line: "⟨U+202E⟩"."""
    shapes = []
    for c in text:
        is_seen = c.isprintable() or c == "\n"
        shapes.append(c if is_seen else f"⟨U+{ord(c):04X}⟩")
    return "".join(shapes)


def escaped(text):
    """Text of a model, a prompt or a path as HTML, in an element or an attribute."""
    return html.escape(spelt_out(text))


def tinted(text, reward, title=""):
    """A token as a span whose colour is its reward. A line may break after a space."""
    side = "less" if reward < 0 else "more"
    tint = min(abs(reward) / FULL_TINT, 1)
    shown = escaped(text).replace("·", "·<wbr>").replace("↵", "↵<br>")
    attributes = f'class="{side}" style="--tint:{tint:.2f}" title="{escaped(title)}"'
    return f"<span {attributes}>{shown}</span>"


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What the teacher thinks of every token</title><style>{style}</style></head>
<body>
<h1>What the teacher thinks of every token</h1>
<p>student: {student}<br>teacher: {teacher}</p>
<p>The student wrote a response to each of {count} prompts, at temperature {temperature}. They are
numbered as they were drawn, and each stands below its prompt. The teacher graded every token. The
reward of a token y is log q(y) − log p(y), in nats, where p is the student and q the teacher:</p>
<p class="response">{scale}</p>
<p>Orange and underlined: the teacher finds the token less likely than the student does, at −1 nat
2.7 times, at −2 nats 7.4 times. Blue: more likely. White: as likely.</p>
<p>Point at a token to read p(y), q(y), its reward and the overlap: the share of the student's {k}
likeliest tokens that are among the teacher's {k} likeliest (Eq. 6). Below stand the likeliest
tokens of that share.</p>
<p>A dot · is a space, ↵ a line break, ⇥ a tab. ⟨…⟩ is a character that cannot be seen, or a token
that is only a part of one.</p>
"""
