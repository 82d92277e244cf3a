"""However student and teacher end a response, it is one event: in the rollout, in the grades, in the cold start."""

import json

import pytest
import torch
from conftest import WORDS, tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_opd import PROMPTS, config

import opd
from analysis import diagnose
from loss import full_vocab, top_k
from rollout import one_end, rollout
from teacher import Pair, log_probs

A, B = 2, 14  # [EOS] and "so": two ids that end a response
ASKED = [[5, 6, 7], [9]]


def paired(student, teacher, ends, merge_ends=True):
    pair = Pair.of(student, teacher, word_tokenizer(), word_tokenizer(), merge_ends=merge_ends)
    pair.ending["eos_ids"] = ends
    return pair


def both(log_p, log_q, y):
    return {
        "loss": full_vocab(log_p, log_q),
        "eq5": top_k(log_p, log_q, 4),
        **diagnose(log_p, log_q, y, 4),
    }


@given(
    st.integers(0, 99),
    st.permutations(range(8)),
    st.integers(2, 4),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_the_first_end_has_the_probability_of_all_of_them(seed, order, count, temperature):
    """Case 1: log-probabilities still sum to 1; what does not end a response keeps its probability."""
    z, ends = (
        torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) * 3,
        torch.tensor(order[:count]),
    )
    merged = (one_end(z, ends, temperature) / temperature).softmax(-1)
    p = (z / temperature).softmax(-1)
    torch.testing.assert_close(merged.sum(-1), torch.ones(5))
    torch.testing.assert_close(merged[:, ends[0]], p[:, ends].sum(-1))
    assert not merged[:, ends[1:]].any()
    torch.testing.assert_close(merged[:, order[count:]], p[:, order[count:]])


@pytest.mark.parametrize("ends", [[], [3]])
def test_with_one_end_nothing_changes(ends):
    """To the bit: these are the logits themselves."""
    z = torch.randn(2, 8)
    assert one_end(z, torch.tensor(ends, dtype=torch.long)) is z


def test_the_gradient_reaches_every_end_in_proportion_to_its_probability():
    """So a student goes on ending as it does, with its own token."""
    z = torch.randn(1, 8).requires_grad_()
    one_end(z, torch.tensor([3, 5, 6])).log_softmax(-1)[0, 3].backward()
    p = z.detach().softmax(-1)[0]
    torch.testing.assert_close(z.grad[0, [5, 6]] / z.grad[0, 3], p[[5, 6]] / p[3])
    assert z.grad[0, 3] > 0 > z.grad[0, 0]


def test_a_teacher_that_ends_with_another_token_grades_as_if_it_ended_with_the_students():
    """Case 1, the pairs of the paper's 3.1 and 5.1: every distance and the gradient are the ordinary pair's; token by
    token they are not.
    """
    student, teacher = (
        tiny("llama", vocab_size=len(WORDS)),
        tiny("qwen3", seed=1, vocab_size=len(WORDS)),
    )
    other = tiny("qwen3", seed=1, vocab_size=len(WORDS))
    head = other.get_output_embeddings().weight
    head.data[[A, B]] = head.data[[B, A]]
    found, gradients = {}, {}
    for name, model, merge in (
        ("ordinary", teacher, True),
        ("swapped", other, True),
        ("own", other, False),
    ):
        pair = paired(student, model, [A, B], merge)
        r = pair.write(ASKED, n=4, max_new_tokens=8, seed=0) if name == "ordinary" else r
        student.zero_grad()
        found[name] = pair.grade(r, both, scale=1.0)
        gradients[name] = student.get_output_embeddings().weight.grad.clone()
    for name, x in found["ordinary"].items():
        torch.testing.assert_close(
            found["swapped"][name], x, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
        )
    torch.testing.assert_close(gradients["swapped"], gradients["ordinary"])
    assert not torch.allclose(gradients["own"], gradients["ordinary"], rtol=0.1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_sampled_is_what_is_scored(architecture, temperature):
    """One entry in all three: the rollout's record, the plain scores, the grades."""
    student, ends = tiny(architecture, vocab_size=len(WORDS), spread=0.2), [A, B, 9]
    pair = paired(student, student, ends)
    r = pair.write(ASKED, n=16, max_new_tokens=8, temperature=temperature, seed=0)
    said = [r.response_ids(row) for row in range(len(r.ids))]
    assert {response[-1] for response in said if len(response) < 8} == {A}  # the student's own
    assert not {B, 9} & {token for response in said for token in response}
    plain = log_probs(
        student,
        r.ids,
        r.attention_mask,
        r.is_response,
        vocab_size=len(WORDS),
        ends=pair.ending["eos_ids"],
        temperature=temperature,
    )
    recorded, y = r.log_p[r.response_mask], r.ids[r.is_response]
    torch.testing.assert_close(
        plain.gather(-1, y.unsqueeze(-1)).squeeze(-1), recorded, rtol=0, atol=1e-4
    )
    graded = pair.grade(r, both, temperature=temperature, teacher_temperature=temperature)
    torch.testing.assert_close(graded["log_p"][r.response_mask], recorded, rtol=0, atol=1e-4)
    assert graded["reverse_kl"][r.response_mask].abs().max() < 1e-5


def test_an_end_that_is_named_twice_counts_once():
    """As where the list of a config and the end of its tokenizer are put together."""
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one_end(z, [2, 5, 2]), one_end(z, [2, 5])) and torch.equal(
        one_end(z, [2, 2]), z
    )
    how = dict(max_new_tokens=4, seeds=[0], merge_ends=True, n=8)
    twice, once = (
        rollout(tiny("llama"), [[5]], eos_ids=ends, **how) for ends in ([2, 5, 2], [2, 5])
    )
    assert torch.equal(twice.ids, once.ids) and torch.equal(twice.log_p, once.log_p)


def test_ends_that_are_not_merged_are_drawn_each():
    """--ends own, and `rollout` by itself: each end as it comes."""
    r = rollout(
        tiny("llama", spread=0.1), [[5]], n=400, max_new_tokens=8, eos_ids=[A, B], seeds=[0]
    )
    assert {r.response_ids(row)[-1] for row in range(400) if not r.truncated[row]} == {A, B}


def test_a_run_of_two_ends_saves_a_student_that_ends_with_its_own(tmp_path):
    """Its generation config names the student's own end first, and the teacher's; cold-start answers end with it."""
    for name, eos in (("student", "[EOS]"), ("teacher", "so")):
        model = tiny("llama", seed=len(name), vocab_size=len(WORDS))
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path / name)
        word_tokenizer(eos=eos).save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    with pytest.warns(UserWarning, match="--ends"):
        opd.distil(
            config(tmp_path, tmp_path / "run", steps=1, cold_start=3, cold_start_max_new_tokens=40)
        )
    saved = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [A, B]
    assert WORDS[A] == word_tokenizer().eos_token
