"""Who runs, who waits and in which row of the cache: bookkeeping without tensors.

Running requests fill rows 0..B-1; when one leaves, the last takes its row. A prompt that several waiting requests
share is computed once for all of them. Everything here runs on the engine's loop thread.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from slime.backends.embedded.protocol import SamplingParams

PREFILL_TOKENS = 2048
"""Prompt tokens computed in one pass, unless a single prompt is longer."""
SHORTEST_PREFIX = 16
"""A common prefix below this is computed again rather than copied."""


@dataclass
class Finish:
    """Why a request ended; `shown` is what the client reads."""

    shown: dict[str, Any]

    @property
    def kind(self) -> str:
        """stop, length or abort."""
        return str(self.shown["type"])


def stopped(matched: int | str) -> Finish:
    """Ended by a stop token or stop string."""
    return Finish({"type": "stop", "matched": matched})


def reached_length(length: int) -> Finish:
    """Made all the tokens it may make."""
    return Finish({"type": "length", "length": length})


def aborted(message: str, status_code: int | None = None) -> Finish:
    """Ended from outside, or by an error that has an HTTP status."""
    return Finish({"type": "abort", "message": message, "status_code": status_code, "err_type": None})


@dataclass
class LogProbs:
    """What was asked about tokens, one entry a token; a missing value (the first prompt token's) is None."""

    tokens: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    top: list[list[tuple[float, int]] | None] = field(default_factory=list)
    chosen: list[list[tuple[float, int]] | None] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """One sequence, from arrival to its last token."""

    rid: str
    prompt: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    seed: int
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end it: the model's end tokens and stop_token_ids, none with ignore_eos."""
    wants_log_probs: bool = False
    logprob_start: int = -1
    top_logprobs: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    find_stop: Callable[[list[int]], str | None] | None = None
    """Given the output, the stop string that it now contains."""
    on_change: Callable[["Request"], None] | None = None
    """Called on the loop thread after every token (when `wants_every_token`) and at the end."""
    wants_every_token: bool = False

    output: list[int] = field(default_factory=list)
    output_log_probs: LogProbs = field(default_factory=LogProbs)
    input_log_probs: LogProbs = field(default_factory=LogProbs)
    output_counts: Counter[int] = field(default_factory=Counter)
    weight_spans: list[dict[str, Any]] = field(default_factory=list)
    finish: Finish | None = None
    has_started: bool = False
    cached_tokens: int = 0
    num_retractions: int = 0
    weight_epoch: int = -1
    """Counts weight changes; keys and values of another epoch are not shared with new prompts."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt) + len(self.output)

    @property
    def num_stored(self) -> int:
        """Positions in the cache while it runs: all but the last token, which the next step computes."""
        return self.num_tokens - 1

    def tokens(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt + self.output

    def record_version(self, version: str) -> None:
        """Note that the token just made came from weights `version`."""
        end = len(self.output)
        if self.weight_spans and self.weight_spans[-1]["version"] == version:
            self.weight_spans[-1]["end"] = end
        else:
            self.weight_spans.append({"version": version, "start": end - 1, "end": end})


@dataclass
class PromptGroup:
    """Requests admitted together that start from the same tokens, and the rows they got."""

    tokens: list[int]
    requests: list[Request]
    rows: list[int]
    prefix_row: int = 0
    prefix_length: int = 0
    """Positions that are copied from `prefix_row` instead of being computed."""


class Room(Protocol):
    """Whether the cache can hold so many sequences of such a length."""

    def __call__(self, rows: int, length: int) -> bool: ...


class Scheduler:
    """The waiting queue and the rows of the running requests.

    is_steady: no prompt continues another's keys, and a request waits until it fits with all that it may make, so that
    none is ever retracted.
    """

    def __init__(self, max_running: int, has_room: Room, *, is_steady: bool = False) -> None:
        self.max_running, self.has_room, self.is_steady = max_running, has_room, is_steady
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def longest(self) -> int:
        """Positions of the longest running sequence, its next token included."""
        return max((request.num_tokens for request in self.running), default=0)

    def admit(self, epoch: int) -> list[PromptGroup]:
        """Move waiting requests into rows, first come first served, as far as rows, memory and one pass allow."""
        groups: dict[tuple[int, ...], PromptGroup] = {}
        first_row, budget = len(self.running), PREFILL_TOKENS
        longest = max(map(self._needs, self.running), default=0)
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            tokens = request.tokens()
            key = (*tokens, -1, request.logprob_start) if request.logprob_start >= 0 else tuple(tokens)
            longest = max(longest, self._needs(request))
            if self.running and not self.has_room(len(self.running) + 1, longest):
                break
            if key not in groups:
                if groups and budget < len(tokens):
                    break
                group = PromptGroup(tokens, [], [])
                if not self.is_steady:
                    self._find_prefix(group, request, first_row, epoch)
                    if self._gains_by_waiting(group, request, groups.values()):
                        break
                groups[key] = group
                budget -= len(tokens) - group.prefix_length
            self.waiting.popleft()
            groups[key].requests.append(request)
            groups[key].rows.append(len(self.running))
            self.running.append(request)
            request.weight_epoch = epoch
            if not request.has_started:
                is_first = len(groups[key].requests) == 1
                request.cached_tokens = groups[key].prefix_length if is_first else len(tokens) - 1
                request.has_started = True
        return list(groups.values())

    def _needs(self, request: Request) -> int:
        """Positions that must be free for a request to be admitted beside others."""
        return len(request.prompt) + request.max_new_tokens if self.is_steady else request.num_tokens + 1

    def _find_prefix(self, group: PromptGroup, request: Request, first_row: int, epoch: int) -> None:
        """The running sequence with the longest common prefix whose keys and values came from the present weights.

        At least the last token is computed, and every token whose log-probs were asked.
        """
        limit = _copyable(group, request)
        for row, other in enumerate(self.running[:first_row]):
            if other.weight_epoch != epoch:
                continue
            length = common_prefix(group.tokens, other.prompt, min(limit, other.num_stored))
            if length >= max(SHORTEST_PREFIX, group.prefix_length + 1):
                group.prefix_row, group.prefix_length = row, length

    def _gains_by_waiting(self, group: PromptGroup, request: Request, admitted: Iterable[PromptGroup]) -> bool:
        """Whether one more pass is worth it: the prompt could then copy a good part from one admitted in this pass."""
        limit, wanted = _copyable(group, request), group.prefix_length + SHORTEST_PREFIX
        return any(
            common_prefix(group.tokens, other.tokens, limit) >= wanted
            for other in admitted
            if any(one.max_new_tokens > 1 for one in other.requests)
        )

    def leave(self, row: int) -> int | None:
        """Free a row; returns the row whose sequence moves into it, if any."""
        last = len(self.running) - 1
        moved = self.running.pop()
        if row == last:
            return None
        self.running[row] = moved
        return last

    def retract(self, request: Request) -> None:
        """Queue a request that has just left its row, before all others."""
        request.num_retractions += 1
        self.waiting.appendleft(request)

    def overflowing(self) -> int | None:
        """The row to retract because the next step would not fit into memory: the latest one."""
        if len(self.running) > 1 and not self.has_room(len(self.running), self.longest()):
            return len(self.running) - 1
        return None


def _copyable(group: PromptGroup, request: Request) -> int:
    """How many of a prompt's first tokens need not be computed if another sequence has them."""
    limit = len(group.tokens) - 1
    if request.logprob_start >= 0 and not request.has_started:
        limit = min(limit, request.logprob_start)
    return limit


def common_prefix(a: list[int], b: list[int], limit: int) -> int:
    """Number of equal first elements, at most `limit`."""
    limit = min(limit, len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a[:limit], b, strict=False)))
