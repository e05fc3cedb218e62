"""Which log-probs are reported: those of transformers' logits, at the temperature, before any top-p, top-k or min-p."""

import pytest
import torch

from tests.contracts.engine.speaking import Engine, Reference, output_log_probs

TEXT = "What is the sum of 3 and 5? The"


@pytest.fixture
def prompt(reference: Reference) -> list[int]:
    return reference.encode(TEXT)


def assert_near(engine: Engine, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=engine.log_prob_tolerance, rtol=0)


def test_greedy_log_probs_are_those_of_the_plain_logits(engine, prompt, reference):
    reply = engine.greedy(prompt, 24, ignore_eos=True)
    expected, _ = reference.log_probs(prompt, reply["output_ids"])
    assert_near(engine, output_log_probs(reply), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampled_log_probs_are_at_the_temperature(engine, prompt, reference, temperature):
    reply = engine.generate(prompt, temperature=temperature, max_new_tokens=24, ignore_eos=True)
    expected, _ = reference.log_probs(prompt, reply["output_ids"], temperature)
    assert_near(engine, output_log_probs(reply), expected)


@pytest.mark.parametrize("limit", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.8, "top_k": 5}], ids=str)
def test_limits_choose_the_tokens_but_do_not_enter_the_log_probs(engine, prompt, reference, limit):
    """The whole vocabulary stays in the denominator: kept tokens are not renormalised."""
    temperature = 0.9
    reply = engine.generate(prompt, temperature=temperature, max_new_tokens=24, ignore_eos=True, **limit)
    expected, _ = reference.log_probs(prompt, reply["output_ids"], temperature)
    assert_near(engine, output_log_probs(reply), expected)


def tokens_sampled(engine: Engine, prompt: list[int], **sampling: float) -> set[int]:
    """First tokens of 48 samples."""
    replies = engine.generate(prompt, max_new_tokens=1, n=48, ignore_eos=True, **sampling)
    return {reply["output_ids"][0] for reply in replies}


def test_top_k_keeps_the_k_likeliest(engine, prompt, reference):
    _, every = reference.log_probs(prompt, [0])
    assert tokens_sampled(engine, prompt, top_k=3) <= set(every[0].topk(3).indices.tolist())


def test_top_p_keeps_tokens_until_their_mass_reaches_p(engine, prompt, reference):
    """A token is kept when those likelier than it have less than p together (Holtzman et al., arXiv:1904.09751)."""
    _, every = reference.log_probs(prompt, [0])
    probs, order = every[0].exp().sort(descending=True)
    mass = probs.cumsum(0)
    top_p = float(mass[3] + mass[4]) / 2  # five tokens
    slack = 0.0 if engine.info["dtype"] == "float32" else 0.02
    kept = set(order[mass - probs < top_p + slack].tolist())
    assert 5 <= len(kept) < 30
    assert tokens_sampled(engine, prompt, top_p=top_p) <= kept


def test_min_p_keeps_tokens_above_a_share_of_the_likeliest(engine, prompt, reference):
    """arXiv:2407.01082."""
    _, every = reference.log_probs(prompt, [0])
    probs = every[0].exp()
    kept = set((probs >= 0.4 * probs.max() - 1e-6).nonzero().flatten().tolist())
    assert tokens_sampled(engine, prompt, min_p=0.4) <= kept


def test_without_limits_samples_are_many(engine, prompt):
    assert len(tokens_sampled(engine, prompt, temperature=2.0)) > 8


def test_prompt_log_probs_start_where_asked_and_the_first_has_none(engine, prompt, reference):
    start = 2
    reply = engine.generate(prompt, temperature=0, max_new_tokens=1, top_level={"logprob_start_len": start})
    triples = reply["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in triples] == prompt[start:]
    assert triples[0][0] is None
    expected, _ = reference.log_probs(prompt[: start + 1], prompt[start + 1 :])
    assert_near(engine, torch.tensor([log_prob for log_prob, _, _ in triples[1:]]), expected)


def test_the_likeliest_alternatives_come_with_each_token(engine, prompt, reference):
    reply = engine.greedy(prompt, 3, ignore_eos=True)
    with_top = engine.generate(
        prompt, temperature=0, max_new_tokens=3, ignore_eos=True, top_level={"top_logprobs_num": 2}
    )
    assert with_top["output_ids"] == reply["output_ids"]
    _, every = reference.log_probs(prompt, reply["output_ids"])
    for position, alternatives in enumerate(with_top["meta_info"]["output_top_logprobs"]):
        best = every[position].topk(2)
        assert [token for _, token, _ in alternatives] == best.indices.tolist()
        assert_near(engine, torch.tensor([log_prob for log_prob, _, _ in alternatives]), best.values)


def test_log_probs_do_not_depend_on_who_else_is_served(engine, prompt, reference):
    """One of eight different prompts in a batch, against itself alone."""
    others = [reference.encode("The wheel" + " turns" * n) for n in range(7)]
    alone = engine.greedy(prompt, 12, ignore_eos=True)
    together = engine.generate([prompt, *others], temperature=0, max_new_tokens=12, ignore_eos=True)[0]
    assert together["output_ids"] == alone["output_ids"]
    assert_near(engine, output_log_probs(together), output_log_probs(alone))


def test_a_prompt_seen_before_gives_the_same_log_probs_from_the_cache(engine, reference):
    prompt = reference.encode("A wheel turns; the wheel that turns the wheel turns too. " * 3)
    first, second = (engine.greedy(prompt, 8, ignore_eos=True) for _ in range(2))
    assert first["output_ids"] == second["output_ids"]
    assert_near(engine, output_log_probs(second), output_log_probs(first))
    assert 0 <= second["meta_info"]["cached_tokens"] < len(prompt)
