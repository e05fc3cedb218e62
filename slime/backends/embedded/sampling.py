"""From logits to tokens and log-probs, one row a sequence.

Letters: B rows, V vocabulary. Log-probs are nats of the distribution after penalties, biases and temperature and before
top-k, top-p and min-p, as SGLang reports them; a greedy row has temperature 1. Log-probs of prompt tokens take no
temperature (`log_softmax` of the plain logits).

A row's random number depends on its seed and on the position of the token it makes and on nothing else, so a reply does
not change with what else runs or when a request came.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 256
"""The cumulative sum over the vocabulary is taken in blocks of this many tokens."""
SMALL_TOP_K = 1024
"""Up to here the likeliest top_k tokens are picked out; beyond, draws that fall outside are repeated."""
MAX_DRAWS = 8
"""Draws of one token before the vocabulary is sorted instead."""
MANY_TOKENS = 1 << 24
"""A top-k from here on limits nothing."""
MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number in [0, 1) from a seed, a position and a draw: rounds of SplitMix64 (Steele, Lea, Flood 2014)."""
    state = (seed & MASK64) ^ 0x9E3779B97F4A7C15
    for value in (position, draw + 0x632BE59BD9B4E019):
        state = (state + (value + 1) * 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


@dataclass
class SamplingRow:
    """How one sequence wants its next token.

    position is the index of the token that is made, counted from the start of the prompt. `output_counts` says how
    often each token came in the output so far; it is read only when a penalty is set.
    """

    temperature: float
    top_p: float
    top_k: int
    """At least the size of the vocabulary for no limit."""
    min_p: float
    seed: int
    position: int
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    forbidden: tuple[int, ...] = ()
    """Tokens that may not come now (stop tokens before min_new_tokens)."""
    output_counts: Counter[int] = field(default_factory=Counter)
    top_logprobs: int = 0
    token_ids_logprob: tuple[int, ...] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether penalties, biases or forbidden tokens apply."""
        return bool(
            self.forbidden
            or self.logit_bias
            or self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1.0
        )

    @property
    def is_truncated(self) -> bool:
        """Whether top-k, top-p or min-p may leave tokens out."""
        return self.top_p < 1.0 or self.top_k < MANY_TOKENS or self.min_p > 0.0


@dataclass
class Sampled:
    """One token with what was asked about it; log-probs in nats."""

    token: int
    log_prob: float
    top: list[tuple[float, int]] = field(default_factory=list)
    chosen: list[tuple[float, int]] = field(default_factory=list)


class Sampler:
    """Samples one token a row; keeps its scratch memory between steps."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = -(-vocab_size // BLOCK)
        self._scratch = torch.empty(0, self.num_blocks * BLOCK)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> list[Sampled]:
        """logits [B, V] of any float dtype -> one `Sampled` a row; its log-prob is NaN if the row was not finite."""
        x = self._prepare(logits, rows)
        maxima = x.amax(-1)
        wanted = [i for i, row in enumerate(rows) if row.top_logprobs or row.token_ids_logprob or row.is_truncated]
        kept = {i: x[i].clone() for i in wanted}
        tokens_greedy = x.argmax(-1) if any(row.temperature == 0 for row in rows) else None
        p = x.sub_(maxima[:, None]).exp_()
        block_sums = p.view(len(rows), self.num_blocks, BLOCK).sum(-1)
        cumulative = block_sums.double().cumsum_(-1)
        totals = cumulative[:, -1]
        noise = torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64)
        tokens = self._invert(p, block_sums, cumulative, noise * totals)
        self._truncate(tokens, p, block_sums, cumulative, rows)
        for i, row in enumerate(rows):
            if row.temperature == 0:
                tokens[i] = tokens_greedy[i]  # type: ignore[index]
        tokens.clamp_(max=self.vocab_size - 1)  # logits that are not finite point anywhere
        log_probs = (p.gather(1, tokens[:, None])[:, 0].double() / totals).log_()
        floor = torch.finfo(torch.float32).min
        out = []
        for i, (token, log_prob) in enumerate(zip(tokens.tolist(), log_probs.clamp_(min=floor).tolist(), strict=True)):
            sampled = Sampled(token, log_prob)
            if i in kept:
                row_log_probs = (kept[i] - maxima[i]).double() - totals[i].log()
                _add_asked(sampled, row_log_probs, rows[i].top_logprobs, rows[i].token_ids_logprob)
            out.append(sampled)
        return out

    def _prepare(self, logits: Tensor, rows: list[SamplingRow]) -> Tensor:
        """[B, V padded to whole blocks with minus infinity] fp32, after penalties, biases and temperature."""
        if self._scratch.shape[0] < len(rows):
            self._scratch = torch.full((len(rows), self.num_blocks * BLOCK), float("-inf"))
        x = self._scratch[: len(rows)]
        x[:, : self.vocab_size] = logits[:, : self.vocab_size]
        if self.vocab_size < x.shape[1]:
            x[:, self.vocab_size :] = float("-inf")
        for i, row in enumerate(rows):
            if row.changes_logits:
                _change_logits(x[i], row)
        temperatures = [row.temperature or 1.0 for row in rows]
        if any(t != 1.0 for t in temperatures):
            x.div_(torch.tensor(temperatures)[:, None])
        return x

    def _truncate(
        self, tokens: Tensor, p: Tensor, block_sums: Tensor, cumulative: Tensor, rows: list[SamplingRow]
    ) -> None:
        """Replace, in place, tokens [B] that top-k, top-p or min-p leave out.

        Drawing again until the token is among those kept samples from exactly those, and needs no sorted vocabulary.
        """
        totals = cumulative[:, -1]
        pending = []
        for i, row in enumerate(rows):
            if row.temperature != 0 and row.is_truncated:
                if row.top_k <= SMALL_TOP_K:
                    tokens[i] = _sample_sorted(p[i], float(totals[i]), row)
                else:
                    pending.append(i)
        for draw in range(1, MAX_DRAWS + 1):
            if not pending:
                return
            index = torch.tensor(pending)
            mine = p if len(pending) == len(rows) else p[index]
            is_kept = _is_kept(mine, tokens[index], totals[index], [rows[i] for i in pending]).tolist()
            pending = [i for i, kept in zip(pending, is_kept, strict=True) if not kept]
            if pending and draw < MAX_DRAWS:
                index = torch.tensor(pending)
                noise = torch.tensor([uniform(rows[i].seed, rows[i].position, draw) for i in pending]).double()
                tokens[index] = self._invert(p[index], block_sums[index], cumulative[index], noise * totals[index])
        for i in pending:
            tokens[i] = _sample_sorted(p[i], float(totals[i]), rows[i])

    def _invert(self, p: Tensor, block_sums: Tensor, cumulative: Tensor, mass: Tensor) -> Tensor:
        """The token at which the cumulative sum of p [B, V] passes `mass` [B]."""
        blocks = torch.searchsorted(cumulative, mass[:, None], right=True).clamp_(max=self.num_blocks - 1)
        before = cumulative.gather(1, blocks) - block_sums.gather(1, blocks)
        first_blocks = torch.arange(0, p.shape[0] * self.num_blocks, self.num_blocks)
        chosen = p.view(-1, BLOCK).index_select(0, blocks[:, 0] + first_blocks)
        inner = chosen.double().cumsum_(-1)
        offsets = torch.searchsorted(inner, mass[:, None] - before, right=True).clamp_(max=BLOCK - 1)
        # Rounding may point at a token without mass; take the likeliest one of its block then.
        impossible = chosen.gather(1, offsets) <= 0
        if impossible.any():
            offsets = torch.where(impossible, chosen.argmax(-1, keepdim=True), offsets)
        return (blocks * BLOCK + offsets)[:, 0]


def prompt_log_probs(
    logits: Tensor, targets: list[int], top: int, token_ids: tuple[int, ...]
) -> tuple[list[float], list[list[tuple[float, int]]], list[list[tuple[float, int]]]]:
    """Log-probs of given tokens, without temperature.

    logits [N, V], targets N -> (log-probs N, the `top` likeliest of each position, those of `token_ids`).
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    values = log_probs.gather(1, torch.tensor(targets)[:, None])[:, 0].tolist()
    tops, chosen = [], []
    for row in log_probs:
        sampled = Sampled(0, 0.0)
        _add_asked(sampled, row, top, token_ids)
        tops.append(sampled.top)
        chosen.append(sampled.chosen)
    return values, tops, chosen


def _add_asked(sampled: Sampled, log_probs: Tensor, top: int, token_ids: tuple[int, ...]) -> None:
    if top:
        values, indices = log_probs.topk(min(top, log_probs.shape[0]))
        sampled.top = list(zip(values.tolist(), indices.tolist(), strict=True))
    if token_ids:
        sampled.chosen = [(float(log_probs[token]), token) for token in token_ids]


def _change_logits(x: Tensor, row: SamplingRow) -> None:
    """Penalties over the output so far, biases, forbidden tokens; in place on x [V]."""
    if row.repetition_penalty != 1.0 and row.output_counts:
        seen = torch.tensor(list(row.output_counts))
        values = x[seen]
        x[seen] = torch.where(values > 0, values / row.repetition_penalty, values * row.repetition_penalty)
    if (row.frequency_penalty or row.presence_penalty) and row.output_counts:
        tokens = torch.tensor(list(row.output_counts))
        counts = torch.tensor(list(row.output_counts.values()), dtype=x.dtype)
        x[tokens] -= row.frequency_penalty * counts + row.presence_penalty
    for token, bias in row.logit_bias.items():
        x[token] += bias
    if row.forbidden:
        x[[token for token in row.forbidden if token < x.shape[0]]] = float("-inf")


def _is_kept(p: Tensor, tokens: Tensor, totals: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Whether top-p, top-k and min-p keep the given tokens [R] of p [R, V]; equally likely tokens rank by their id."""
    mine = p.gather(1, tokens[:, None])
    is_before = p > mine
    ties = (p == mine) & (torch.arange(p.shape[1]) < tokens[:, None])
    is_before |= ties
    mass = (p * is_before).sum(-1, dtype=torch.float64) / totals
    top_p = torch.tensor([row.top_p if row.top_p < 1.0 else 2.0 for row in rows], dtype=torch.float64)
    is_kept = mass <= top_p
    if any(row.top_k < MANY_TOKENS for row in rows):
        is_kept &= is_before.sum(-1) < torch.tensor([row.top_k for row in rows])
    if any(row.min_p > 0.0 for row in rows):
        is_kept &= mine[:, 0] >= torch.tensor([row.min_p for row in rows]) * p.amax(-1)
    return is_kept


def _sample_sorted(p: Tensor, total: float, row: SamplingRow) -> int:
    """Sample from what top-k, top-p and min-p leave of p [V] (unnormalized, summing to `total`).

    Top-p keeps the smallest set of likeliest tokens whose mass reaches top_p; min-p keeps tokens at least min_p times
    as likely as the likeliest.
    """
    values, tokens = p.topk(row.top_k) if row.top_k < p.shape[0] else p.sort(descending=True)
    values = values.double() / total
    keep = torch.ones_like(values, dtype=torch.bool)
    if row.top_p < 1.0:
        keep &= values.cumsum(-1) - values <= row.top_p
    if row.min_p > 0.0:
        keep &= values >= row.min_p * values[0]
    cumulative = (values * keep).cumsum(-1)
    index = int(torch.searchsorted(cumulative, uniform(row.seed, row.position) * cumulative[-1], right=True))
    return int(tokens[min(index, int(keep.sum()) - 1)])
