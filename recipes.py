"""recipes.py: how the questions are put, and when an answer has gone wrong (paper 5).

The prompt templates of 5.2 as data, and the test for degenerate repetition with which 5.1 filters the teacher's
responses and opd.py watches the student's. Not here yet: the cold start itself and the mixing of prompts.
"""

TEMPLATES = {
    "none": "{question}",
    # DAPO's, the student's default in the paper
    "answer": "Solve the following math problem step by step. The last line of your response should be of the form "
              "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
              'Remember to put your answer on its own line after "Answer:".',
    # that of the teacher JustRL. The authors' released data has a literal \boxed{{}} here, an escape left over
    "boxed": "{question} Please reason step by step, and put your final answer within \\boxed{}.",
}


def apply_template(question, template):
    """Put a question into a template, by name or as a string with {question} in it: str -> str.

    Raises ValueError without one.
    """
    form = TEMPLATES.get(template, template)
    if "{question}" not in form:
        raise ValueError(f"template {template!r} is none of {', '.join(TEMPLATES)} and has no {{question}} in it")
    return form.replace("{question}", question)


def in_template(rows, template):
    """Put every question into a template: list of {"prompt": text or chat messages, ...} -> the same, new rows.

    Of a chat it is the last message that is put into it.
    """
    def put(prompt):
        if isinstance(prompt, str):
            return apply_template(prompt, template)
        return [*prompt[:-1], {**prompt[-1], "content": apply_template(prompt[-1]["content"], template)}]
    return [{**row, "prompt": put(row["prompt"])} for row in rows]


def is_degenerate(text_or_ids, *, loops=4, shortest=16, longest_period=32, gram=8, repeated=0.5):
    """Has this response fallen into repetition? Text counts in words, token ids in tokens; bool.

    True when it ends in a loop: one block of at most `longest_period` items, `loops` times or more in a row, over at
    least `shortest` items; or when, of `gram` * 8 items or more, over half of its runs of `gram` have occurred before
    in it.
    The paper drops "degenerately repetitive" responses without a rule; this one is ours.
    """
    items = text_or_ids.split() if isinstance(text_or_ids, str) else list(text_or_ids)
    for period in range(1, min(longest_period, len(items) // loops) + 1):
        span = max(period * loops, shortest)
        if len(items) >= span and all(items[-i] == items[-i - period] for i in range(1, span - period + 1)):
            return True
    grams = [tuple(items[i:i + gram]) for i in range(len(items) - gram + 1)]
    return len(items) >= gram * 8 and len(set(grams)) < (1 - repeated) * len(grams)
