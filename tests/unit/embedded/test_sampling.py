"""Sampling: the right distribution, the right log-probs, and noise that depends on seed and position only."""

import math
from collections import Counter

import pytest
import torch

from slime.backends.embedded.protocol import ALL_TOKENS
from slime.backends.embedded.sampling import Sampler, SamplingRow, prompt_log_probs, uniform

VOCAB = 300


def row(**fields) -> SamplingRow:
    return SamplingRow(**(dict(temperature=1.0, top_p=1.0, top_k=ALL_TOKENS, min_p=0.0, seed=1, position=0) | fields))


def draws(logits: torch.Tensor, count: int = 4000, **fields) -> Counter[int]:
    sampler = Sampler(logits.shape[-1])
    rows = [row(position=position, **fields) for position in range(count)]
    return Counter(sampled.token for sampled in sampler.sample(logits.expand(count, -1), rows))


def peaked(**weights: float) -> torch.Tensor:
    """Logits of a vocabulary in which only the named tokens (t3=0.5) have mass."""
    logits = torch.full((VOCAB,), -1e9)
    for name, probability in weights.items():
        logits[int(name[1:])] = math.log(probability)
    return logits


def test_noise_is_uniform_and_depends_on_seed_and_position():
    numbers = torch.tensor(
        [uniform(seed, position) for seed in range(100) for position in range(100)], dtype=torch.float64
    )
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01 and abs(float(numbers.var()) - 1 / 12) < 0.003
    assert len(set(numbers.tolist())) == 10_000
    assert uniform(-5, 3) != uniform(5, 3) and uniform(2**63 - 1, 0) == uniform(2**63 - 1, 0)


def test_tokens_come_as_often_as_their_probability():
    counts = draws(peaked(t3=0.5, t7=0.3, t299=0.2))
    assert set(counts) == {3, 7, 299}
    for token, probability in ((3, 0.5), (7, 0.3), (299, 0.2)):
        assert abs(counts[token] / 4000 - probability) < 0.03


def test_a_token_does_not_depend_on_the_other_rows():
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [row(seed=i, position=9) for i in range(5)]
    together = [s.token for s in Sampler(VOCAB).sample(logits, rows)]
    alone = [Sampler(VOCAB).sample(logits[i : i + 1], [rows[i]])[0].token for i in range(5)]
    assert together == alone


def test_temperature_zero_takes_the_likeliest_and_reports_it_unscaled():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    sampled = Sampler(VOCAB).sample(logits, [row(temperature=0.0)])[0]
    assert sampled.token == int(logits.argmax())
    assert sampled.log_prob == pytest.approx(float(torch.log_softmax(logits[0], -1).max()), abs=1e-5)


def test_log_probs_are_scaled_by_temperature_and_not_by_top_p():
    """p = (0.5, 0.3, 0.2) at temperature 0.5 is (0.25, 0.09, 0.04) / 0.38, also when top-p leaves only the first."""
    logits = peaked(t3=0.5, t7=0.3, t9=0.2)[None]
    sampled = Sampler(VOCAB).sample(logits, [row(temperature=0.5, top_p=0.1)])[0]
    assert sampled.token == 3
    assert sampled.log_prob == pytest.approx(math.log(0.25 / 0.38), abs=1e-5)


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (dict(top_k=1), {3}),
        (dict(top_k=2), {3, 7}),
        (dict(top_p=0.4), {3}),
        (dict(top_p=0.6), {3, 7}),
        (dict(top_p=0.95), {3, 7, 9}),
        (dict(min_p=0.5), {3, 7}),
        (dict(min_p=0.1), {3, 7, 9}),
        (dict(top_k=2, top_p=0.4), {3}),
        (dict(top_p=0.99, min_p=0.5), {3, 7}),
    ],
)
def test_truncation_keeps_the_likeliest_tokens(truncation, kept):
    """p = (0.5, 0.3, 0.2)."""
    counts = draws(peaked(t3=0.5, t7=0.3, t9=0.2), count=600, **truncation)
    assert set(counts) == kept
    total = sum(p for token, p in ((3, 0.5), (7, 0.3), (9, 0.2)) if token in kept)
    assert abs(counts[3] / 600 - 0.5 / total) < 0.07


@pytest.mark.parametrize("truncation", [dict(top_p=0.9), dict(top_k=4500), dict(top_p=0.9, top_k=4800)], ids=str)
def test_a_wide_truncation_keeps_many_tokens_alike(truncation):
    """Of 5,000 equally likely tokens those with the 4,500 lowest ids are kept (one more where the mass is just met)."""
    counts = draws(torch.zeros(5000), count=3000, **truncation)
    assert len(counts) > 1900
    assert 4200 < max(counts) <= 4501
    assert max(counts.values()) < 10


def test_a_narrow_truncation_ends_after_a_few_draws():
    """top-p 0.001 keeps 6 of 5,000 tokens: drawing again would take 800 times, so the vocabulary is sorted."""
    counts = draws(torch.zeros(5000), count=60, top_p=0.001)
    assert set(counts) <= set(range(6)) or len(counts) <= 6


def test_truncated_rows_do_not_disturb_others():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    rows = [row(seed=1), row(seed=2, top_p=0.3), row(seed=3, temperature=0.0), row(seed=4, top_k=5, min_p=0.1)]
    together = [s.token for s in Sampler(VOCAB).sample(logits, rows)]
    alone = [Sampler(VOCAB).sample(logits[i : i + 1], [rows[i]])[0].token for i in range(4)]
    assert together == alone


def test_asked_log_probs_of_other_tokens():
    logits = peaked(t3=0.5, t7=0.3, t9=0.2)[None]
    sampled = Sampler(VOCAB).sample(logits, [row(top_logprobs=2, token_ids_logprob=(9, 3))])[0]
    assert [token for _, token in sampled.top] == [3, 7]
    assert [token for _, token in sampled.chosen] == [9, 3]
    assert sampled.chosen[0][0] == pytest.approx(math.log(0.2), abs=1e-5)
    assert sampled.top[1][0] == pytest.approx(math.log(0.3), abs=1e-5)


def test_penalties_biases_and_forbidden_tokens():
    logits = torch.zeros(VOCAB)
    logits[4], logits[5], logits[6] = 2.0, -2.0, 1.0

    def best(**fields) -> list[tuple[float, int]]:
        return Sampler(VOCAB).sample(logits[None], [row(token_ids_logprob=(4, 5, 6), **fields)])[0].chosen

    def gap(chosen: list[tuple[float, int]]) -> float:
        return chosen[0][0] - chosen[2][0]

    counts = Counter({4: 3, 5: 1})
    assert gap(best()) == pytest.approx(1.0, abs=1e-5)
    assert gap(best(frequency_penalty=0.5, output_counts=counts)) == pytest.approx(1.0 - 1.5, abs=1e-5)
    assert gap(best(presence_penalty=0.5, output_counts=counts)) == pytest.approx(1.0 - 0.5, abs=1e-5)
    assert gap(best(repetition_penalty=2.0, output_counts=counts)) == pytest.approx(1.0 - 1.0, abs=1e-5)
    assert gap(best(logit_bias={6: 3.0})) == pytest.approx(1.0 - 3.0, abs=1e-5)
    chosen = best(repetition_penalty=2.0, output_counts=counts)
    assert chosen[1][0] - chosen[2][0] == pytest.approx(-4.0 - 1.0, abs=1e-5)  # a negative logit is multiplied
    assert Sampler(VOCAB).sample(logits[None], [row(temperature=0.0, forbidden=(4,))])[0].token == 6


def test_a_shorter_batch_after_a_longer_one_is_not_confused():
    sampler = Sampler(VOCAB)
    sampler.sample(torch.full((6, VOCAB), 5.0), [row()] * 6)
    sampled = sampler.sample(peaked(t8=1.0)[None], [row()])[0]
    assert sampled.token == 8 and sampled.log_prob == pytest.approx(0.0, abs=1e-6)


def test_prompt_log_probs_take_no_temperature():
    logits = torch.stack([peaked(t3=0.5, t7=0.5), peaked(t3=0.9, t7=0.1)])
    values, tops, chosen = prompt_log_probs(logits, [7, 3], 1, (7,))
    assert values == pytest.approx([math.log(0.5), math.log(0.9)], abs=1e-5)
    assert tops[1][0][1] == 3 and chosen[1][0] == (pytest.approx(math.log(0.1), abs=1e-5), 7)
