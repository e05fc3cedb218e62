"""The engine: one thread that owns the model and takes turns between commands, prompts and decoding steps.

Other threads hand it requests and commands (`submit`, `call`) and get them answered between two steps, so nothing ever
looks at the weights, the cache or the queues while they are in use.
"""

import ctypes
import gc
import math
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from slime.backends.embedded.attention import PrefillSegment
from slime.backends.embedded.cache import SlotCache
from slime.backends.embedded.deterministic import DeterministicPasses
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.passes import FastPasses, Passes
from slime.backends.embedded.protocol import RequestError
from slime.backends.embedded.sampling import Sampled, Sampler, SamplingRow, prompt_log_probs
from slime.backends.embedded.scheduler import (
    Finish,
    PromptGroup,
    Request,
    Scheduler,
    aborted,
    reached_length,
    stopped,
)

T = TypeVar("T")

KV_MEMORY_SHARE = 0.3
"""Largest part of the machine's memory that the key-value cache takes, if nobody says otherwise."""
DETERMINISTIC_SEED = 42
PAUSE_MODES = ("abort", "retract", "in_place")
MEMORY_TAGS = ("weights", "kv_cache", "cuda_graph")


@dataclass(frozen=True)
class EngineSettings:
    """Limits of one engine.

    max_total_tokens: positions that the cache may hold, over all sequences; without it, what fits into
    `kv_memory_share` of the machine's memory.
    """

    max_running_requests: int = 64
    context_length: int = 2048
    max_total_tokens: int | None = None
    random_seed: int = 0
    threads: int = 1
    kv_memory_share: float = KV_MEMORY_SHARE
    deterministic: bool = False
    """Whether a reply, bit by bit, depends on weights, prompt and seed only."""


class Engine:
    """Continuous batching over one `ServedModel`.

    `start` runs the loop in a thread; without it, `step` makes one turn in the caller's thread (tests, benchmarks).
    """

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        self.model, self.settings, self.weights = model, settings, model.weights
        self.cache = SlotCache(model.cache_shapes, settings.max_running_requests, settings.context_length, model.dtype)
        self.max_total_tokens = settings.max_total_tokens or self._affordable_tokens()
        self.max_total_tokens = max(self.max_total_tokens, settings.context_length + 1)
        self.scheduler = Scheduler(settings.max_running_requests, self._has_room, is_steady=settings.deterministic)
        self.passes = self._new_passes(Sampler(model.vocab_size))
        self.weight_version = "default"
        self.weight_epoch = 0
        self.is_paused = False
        self.released: set[str] = set()
        self.steps = self.generated_tokens = self.prompt_tokens = 0
        self._num_seeded = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def _new_passes(self, sampler: Sampler) -> Passes:
        if not self.settings.deterministic:
            return FastPasses(self.model, self.cache, sampler)
        passes = DeterministicPasses(self.model, self.cache, sampler)
        passes.prove()
        return passes

    # From other threads

    def start(self) -> None:
        """Run the loop in its own thread."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the present step."""
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the loop thread between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # the caller gets it
                future.set_exception(error)

        self._commands.put(command)
        return future

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; their `on_change` is called on the loop thread."""
        requests = list(requests)
        self._commands.put(lambda: self._accept(requests))

    def next_seed(self) -> int:
        """The seed of a request that brings none: from the engine's seed and a counter.

        In deterministic mode one for all, as SGLang has it: a counter would tell in which order requests came.
        """
        if self.settings.deterministic:
            return DETERMINISTIC_SEED
        self._num_seeded += 1
        return (self.settings.random_seed << 32) + self._num_seeded

    # On the loop thread

    def _loop(self) -> None:
        torch.set_num_threads(self.settings.threads)
        try:
            while True:
                is_idle = not self._can_step()
                while is_idle or not self._commands.empty():
                    command = self._commands.get()
                    if command is None:
                        return
                    command()
                    is_idle = not self._can_step()
                self.step()
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits that nothing will come any more."""
        self.failure = error
        finish = aborted(f"The engine failed: {type(error).__name__}: {error}", status_code=500)
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(request, finish)

    def _can_step(self) -> bool:
        return not self.is_paused and not self.released and len(self.scheduler) > 0

    def _accept(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute the prompts that can be admitted, else the next token of every running sequence.

        Returns whether there was anything to do.
        """
        groups = self.scheduler.admit(self.weight_epoch)
        if groups:
            self._prefill(groups)
        elif self.scheduler.running:
            while (row := self.scheduler.overflowing()) is not None:
                request = self.scheduler.running[row]
                self._leave(row)
                self.scheduler.retract(request)
            self._decode()
        else:
            return False
        self.steps += 1
        return True

    def run_until_idle(self) -> None:
        """Step until nothing runs or waits."""
        while self.step():
            pass

    def _prefill(self, groups: list[PromptGroup]) -> None:
        self.cache.reserve(len(self.scheduler.running), self.scheduler.longest())
        tokens: list[int] = []
        positions: list[int] = []
        segments = []
        keep: list[int] = []
        scored: list[tuple[PromptGroup, Request, int, int]] = []
        for group in groups:
            if group.prefix_length:
                self.cache.copy(group.prefix_row, group.rows, group.prefix_length)
            start, new = len(tokens), group.tokens[group.prefix_length :]
            segments.append(PrefillSegment(start, len(new), group.prefix_length, tuple(group.rows)))
            tokens += new
            positions += range(group.prefix_length, len(group.tokens))
            scorers = [
                r for r in group.requests if r.logprob_start >= 0 and not r.output and not r.input_log_probs.tokens
            ]
            if scorers:
                first = start + scorers[0].logprob_start - group.prefix_length
                scored += [(group, request, len(keep), len(tokens) - first) for request in scorers]
                keep += range(first, len(tokens) - 1)
            keep.append(len(tokens) - 1)
        self.prompt_tokens += len(tokens)
        logits = self.passes.prefill(tokens, positions, keep, segments)
        self._score_prompts(logits, scored)
        lasts, position = [], -1
        for group in groups:
            group_scores = [s for s in scored if s[0] is group]
            position += group_scores[0][3] if group_scores else 1
            lasts += [position] * len(group.requests)
        rows = [row for group in groups for row in group.rows]
        self._emit(rows, logits[torch.tensor(lasts)])

    def _score_prompts(self, logits: torch.Tensor, scored: list[tuple[PromptGroup, Request, int, int]]) -> None:
        """Log-probs of prompt tokens for the requests that asked; the first token asked about has none."""
        for group, request, offset, count in scored:
            targets = group.tokens[request.logprob_start :]
            report = request.input_log_probs
            report.tokens = targets
            values, tops, chosen = prompt_log_probs(
                logits[offset : offset + count - 1], targets[1:], request.top_logprobs, request.token_ids_logprob
            )
            report.values, report.top, report.chosen = [None, *values], [None, *tops], [None, *chosen]

    def _decode(self) -> None:
        running = self.scheduler.running
        self.cache.reserve(len(running), self.scheduler.longest())
        last = [request.output[-1] for request in running]
        logits = self.passes.decode(last, [request.num_stored for request in running])
        self._emit(list(range(len(running))), logits)

    def _emit(self, rows: list[int], logits: torch.Tensor) -> None:
        """Sample one token for each of `rows` from logits [len(rows), V] and end the requests that are done."""
        requests = [self.scheduler.running[row] for row in rows]
        sampled = self.passes.sample(logits, [_sampling_row(request) for request in requests])
        done = []
        for row, request, token in zip(rows, requests, sampled, strict=True):
            if request.max_new_tokens == 0:
                request.finish = reached_length(0)
            elif math.isnan(token.log_prob):
                request.finish = aborted(f"The logits after {request.num_tokens} tokens are not finite.", 500)
            else:
                self._append(request, token)
                request.finish = _finish_of(request)
            if request.finish is not None:
                done.append(row)
        for row in sorted(done, reverse=True):
            self._leave(row)
        for request in requests:
            if request.on_change is not None and (request.finish is not None or request.wants_every_token):
                request.on_change(request)

    def _append(self, request: Request, sampled: Sampled) -> None:
        self.generated_tokens += 1
        request.output.append(sampled.token)
        request.record_version(self.weight_version)
        if request.sampling.frequency_penalty or request.sampling.presence_penalty:
            request.output_counts[sampled.token] += 1
        elif request.sampling.repetition_penalty != 1.0:
            request.output_counts[sampled.token] = 1
        if request.wants_log_probs:
            report = request.output_log_probs
            report.tokens.append(sampled.token)
            report.values.append(sampled.log_prob)
            report.top.append(sampled.top)
            report.chosen.append(sampled.chosen)

    def _leave(self, row: int) -> None:
        """Take a request out of its row and close the gap."""
        moved = self.scheduler.leave(row)
        if moved is not None:
            self.cache.copy(moved, [row], self.scheduler.running[row].num_stored)

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        if request.on_change is not None:
            request.on_change(request)

    # Commands, to be run with `call`

    @torch.inference_mode()
    def abort(self, is_meant: Callable[[Request], bool], reason: str | None = None) -> int:
        """End the requests that `is_meant` picks, keeping what they have made; returns how many."""
        waiting = [request for request in self.scheduler.waiting if is_meant(request)]
        for request in waiting:
            self.scheduler.waiting.remove(request)
        running = [(row, request) for row, request in enumerate(self.scheduler.running) if is_meant(request)]
        for row, _ in reversed(running):
            self._leave(row)
        for request in waiting:
            self._end(request, aborted(reason or ("Aborted" if request.output else "Abort in waiting queue")))
        for _, request in running:
            self._end(request, aborted(reason or "Aborted"))
        return len(waiting) + len(running)

    def check_pause(self, mode: str) -> None:
        """Raise `RequestError` for a pause that cannot keep its promise."""
        if mode == "retract" and self.settings.deterministic:
            raise RequestError(
                "A retracted reply is computed again as if it were a prompt, which gives other bits than token by "
                "token, and this engine runs with --enable-deterministic-inference. Pause with mode abort or in_place."
            )

    def pause(self, mode: str) -> None:
        """Stop generating: end all requests (abort), queue them again (retract) or freeze them (in_place)."""
        self.check_pause(mode)
        self.is_paused = True
        if mode == "abort":
            self.abort(lambda request: True)
        elif mode == "retract":
            for request in reversed(list(self.scheduler.running)):
                self.scheduler.leave(len(self.scheduler.running) - 1)
                self.scheduler.retract(request)

    def resume(self) -> None:
        """Generate again."""
        self.is_paused = False

    def flush_cache(self) -> bool:
        """Forget cached keys and values; false when requests are running or waiting (unless they wait paused)."""
        if self.scheduler.running or (self.scheduler.waiting and not self.is_paused):
            return False
        self.cache.release()
        return True

    def weights_changed(self, version: str | None) -> None:
        """Note that weights were written: what is cached belongs to older ones."""
        self.weight_epoch += 1
        if version is not None:
            self.weight_version = version

    def release_memory(self, tags: Iterable[str]) -> None:
        """Give the memory of `weights` and `kv_cache` back to the operating system; nothing is generated meanwhile."""
        tags = _checked_tags(tags)
        if self.scheduler.running or (self.scheduler.waiting and not self.is_paused):
            raise RequestError(
                f"Memory can be released only when nothing runs, but {len(self.scheduler.running)} requests run and "
                f"{len(self.scheduler.waiting)} wait. Call /pause_generation with mode abort or retract first."
            )
        if "kv_cache" in tags:
            self.cache.release()
        if "weights" in tags:
            self.weights.release()
            self.weight_epoch += 1
        self.released |= tags
        give_back_memory()

    def resume_memory(self, tags: Iterable[str]) -> None:
        """Allow the use of released memory again; released weights must be loaded before anything is generated."""
        self.released -= _checked_tags(tags)

    def why_unavailable(self) -> str | None:
        """Why nothing can be generated now, if so (a pause is no reason: requests wait for its end)."""
        if self.failure is not None:
            return (
                f"The engine's loop ended with {type(self.failure).__name__}: {self.failure}. Start the engine again."
            )
        if self.released:
            tags = ", ".join(sorted(self.released))
            return f"The memory of {tags} is released. Call /resume_memory_occupation first."
        missing = self.weights.missing()
        if missing:
            return (
                f"{len(missing)} weight tensors such as {missing[0]} were released and not loaded again. "
                "Load weights (/update_weights_from_disk or /update_weights_from_shared_memory) first."
            )
        return None

    # Memory

    def _affordable_tokens(self) -> int:
        """Positions that fit into a share of the machine's memory."""
        import os

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        wanted = self.settings.max_running_requests * self.settings.context_length
        return min(wanted, int(memory * self.settings.kv_memory_share) // self.cache.bytes_per_position)

    def _has_room(self, rows: int, length: int) -> bool:
        return rows * length <= self.max_total_tokens


def _checked_tags(tags: Iterable[str]) -> set[str]:
    tags = set(tags)
    unknown = tags - set(MEMORY_TAGS)
    if unknown:
        raise RequestError(f"Unknown memory tag {sorted(unknown)[0]!r}; known are {', '.join(MEMORY_TAGS)}.")
    return tags


def give_back_memory() -> None:
    """Return freed memory to the operating system (glibc keeps it otherwise)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # not glibc: freed blocks of this size are unmapped anyway
        return


def _sampling_row(request: Request) -> SamplingRow:
    params = request.sampling
    is_too_early = len(request.output) < params.min_new_tokens
    wants = request.wants_log_probs
    return SamplingRow(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=request.seed,
        position=request.num_tokens,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        forbidden=tuple(request.stop_tokens) if is_too_early else (),
        output_counts=request.output_counts,
        top_logprobs=request.top_logprobs if wants else 0,
        token_ids_logprob=request.token_ids_logprob if wants else (),
    )


def _finish_of(request: Request) -> Finish | None:
    """Whether the request ends with its last token: stop string before stop token before length, as SGLang decides."""
    if request.find_stop is not None and (matched := request.find_stop(request.output)) is not None:
        return stopped(matched)
    if request.output[-1] in request.stop_tokens:
        return stopped(request.output[-1])
    if len(request.output) >= request.max_new_tokens:
        return reached_length(request.max_new_tokens)
    return None


def make_request(engine: Engine, **fields: Any) -> Request:
    """A `Request` whose seed, if `sampling` has none, is the engine's next one."""
    seed = fields["sampling"].sampling_seed
    return Request(seed=engine.next_seed() if seed is None else seed, **fields)
