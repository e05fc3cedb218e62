"""Between HTTP and the engine's thread: opens and closes the door, starts requests, waits for their tokens.

Everything here runs on the asyncio loop; the engine's thread only ever calls `LiveRequest.notify_from_engine`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from slime.backends.embedded.engine import Engine, make_request
from slime.backends.embedded.protocol import GenerateCall, GenerateItem, RequestError, resolve_length
from slime.backends.embedded.replies import ReplyMaker
from slime.backends.embedded.scheduler import Request
from slime.backends.embedded.text import Codec, StopFinder

T = TypeVar("T")


class Disconnected(Exception):
    """The client went away; its requests have been aborted."""


class LiveRequest:
    """One sequence while its client waits for it."""

    def __init__(self, request: Request, replies: ReplyMaker) -> None:
        self.request, self.replies = request, replies
        self.count = 0
        self.is_finished = False
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        request.on_change = self.notify_from_engine

    def notify_from_engine(self, request: Request) -> None:
        """Called on the engine's thread."""
        count, is_finished = len(request.output), request.finish is not None
        self._loop.call_soon_threadsafe(self._note, count, is_finished)

    def _note(self, count: int, is_finished: bool) -> None:
        self.count, self.is_finished = count, is_finished
        self._changed.set()

    async def wait_finished(self) -> None:
        """Return once the last token is there."""
        while not self.is_finished:
            await self._changed.wait()
            self._changed.clear()

    def raise_failure(self) -> None:
        """Raise if the request ended because the engine failed."""
        finish = self.request.finish
        if finish is not None and finish.shown.get("status_code"):
            raise RequestError(finish.shown["message"], status=finish.shown["status_code"])

    async def wait_change(self) -> None:
        """Return once there is something new."""
        await self._changed.wait()
        self._changed.clear()


class Frontend:
    """Starts generate calls and answers them; also runs commands on the engine's thread for the other routes."""

    def __init__(self, engine: Engine, codec: Codec | None, end_tokens: frozenset[int]) -> None:
        self.engine, self.codec, self.end_tokens = engine, codec, end_tokens
        self.live: dict[str, LiveRequest] = {}
        self.door = asyncio.Event()
        self.door.set()
        self._drained = asyncio.Condition()

    async def run(self, function: Callable[[], T]) -> T:
        """Run a command between two steps of the engine."""
        future: Future[T] = self.engine.call(function)
        return await asyncio.wrap_future(future)

    # Requests

    async def start(self, call: GenerateCall) -> list[LiveRequest]:
        """Wait until the door is open, then hand the call's requests to the engine.

        A request whose id is in flight is a retry: the older one ends, so that never two are computed.
        """
        await self.door.wait()
        reason = self.engine.why_unavailable()
        if reason is not None:
            raise RequestError(reason, status=503)
        lives = [self._live(item, wants_every_token=call.stream) for item in call.items]
        older = {self.live[live.request.rid].request for live in lives if live.request.rid in self.live}
        if older:
            self.engine.call(lambda: self.engine.abort(older.__contains__, "The request was sent again."))
        self.live |= {live.request.rid: live for live in lives}
        self.engine.submit([live.request for live in lives])
        return lives

    def _live(self, item: GenerateItem, *, wants_every_token: bool) -> LiveRequest:
        prompt = item.input_ids
        if prompt is None:
            if self.codec is None:
                raise RequestError("The served folder has no tokenizer, so text cannot be read: send input_ids.")
            prompt = self.codec.encode(item.text or "")
            if not prompt:
                raise RequestError("The text has no tokens; an empty prompt cannot be continued.")
        sampling = item.sampling
        if sampling.stop and self.codec is None:
            raise RequestError(
                "The served folder has no tokenizer, so stop strings cannot be found: use stop_token_ids."
            )
        length = resolve_length(len(prompt), sampling.max_new_tokens, self.engine.settings.context_length)
        start = item.logprob_start_len if item.return_logprob else -1
        if start > len(prompt):
            raise RequestError(
                f"logprob_start_len={start} is higher than the number of input tokens {len(prompt)}. "
                "Please use a smaller logprob_start_len."
            )
        request = make_request(
            self.engine,
            rid=item.rid,
            prompt=prompt,
            sampling=sampling,
            max_new_tokens=length,
            stop_tokens=frozenset() if sampling.ignore_eos else self.end_tokens | sampling.stop_token_ids,
            wants_log_probs=item.return_logprob,
            logprob_start=start if 0 <= start < len(prompt) else -1,
            top_logprobs=item.top_logprobs_num,
            token_ids_logprob=item.token_ids_logprob,
            find_stop=StopFinder(self.codec, sampling.stop) if sampling.stop and self.codec is not None else None,
            wants_every_token=wants_every_token,
        )
        return LiveRequest(request, ReplyMaker(request, self.codec, item.return_text_in_logprobs))

    async def generate(self, call: GenerateCall, disconnected: Awaitable[None]) -> list[dict[str, Any]]:
        """All replies of a call, in order; raises `Disconnected` when the client leaves before."""
        watch = asyncio.ensure_future(disconnected)
        lives: list[LiveRequest] = []
        try:
            lives = await _unless(watch, self.start(call))
            for live in lives:
                await _unless(watch, live.wait_finished())
                live.raise_failure()
            return [live.replies.final(self.engine.weight_version) for live in lives]
        finally:
            watch.cancel()
            await self._forget(lives)

    async def stream(self, call: GenerateCall, disconnected: Awaitable[None]) -> AsyncIterator[dict[str, Any]]:
        """Cumulative replies as tokens come, each with its `index` when the call has several sequences."""
        watch = asyncio.ensure_future(disconnected)
        lives: list[LiveRequest] = []
        try:
            lives = await _unless(watch, self.start(call))
            waits = {asyncio.ensure_future(live.wait_change()): index for index, live in enumerate(lives)}
            while waits:
                done, _ = await asyncio.wait({watch, *waits}, return_when=asyncio.FIRST_COMPLETED)
                if watch in done:
                    for task in waits:
                        task.cancel()
                    raise Disconnected
                for task in done:
                    index = waits.pop(task)  # type: ignore[arg-type]
                    live = lives[index]
                    is_finished = live.is_finished
                    if is_finished:
                        reply = live.replies.final(self.engine.weight_version)
                    elif live.count % live.request.sampling.stream_interval == 0:
                        reply = live.replies.chunk(live.count)
                    else:
                        reply = None
                    if not is_finished:
                        waits[asyncio.ensure_future(live.wait_change())] = index
                    if reply is not None:
                        yield reply | {"index": index} if call.is_list else reply
        finally:
            watch.cancel()
            await self._forget(lives)

    async def _forget(self, lives: list[LiveRequest]) -> None:
        """Drop requests that were answered, and abort those that nobody waits for any more."""
        unfinished = {live.request for live in lives if not live.is_finished}
        for live in lives:
            if self.live.get(live.request.rid) is live:
                del self.live[live.request.rid]
        async with self._drained:
            self._drained.notify_all()
        if unfinished:
            self.engine.call(lambda: self.engine.abort(unfinished.__contains__))

    # Control

    async def abort(self, rid: str | None, *, everything: bool) -> None:
        """End all requests, or those whose id begins with the id of a live one, as SGLang does."""
        if everything:
            await self.run(lambda: self.engine.abort(lambda request: True))
        elif rid and rid in self.live:
            await self.run(lambda: self.engine.abort(lambda request: request.rid.startswith(rid)))

    async def pause(self, mode: str) -> None:
        """Let no request in, and end, queue again or freeze those inside."""
        self.engine.check_pause(mode)
        self.door.clear()
        await self.run(lambda: self.engine.pause(mode))

    async def resume(self) -> None:
        """Generate again and open the door."""
        await self.run(self.engine.resume)
        self.door.set()

    async def when_idle(self, function: Callable[[], T]) -> T:
        """Run a command that must not meet requests: at once when paused, else after those inside have ended."""
        if not self.door.is_set():
            return await self.run(function)
        self.door.clear()
        try:
            async with self._drained:
                await self._drained.wait_for(lambda: not self.live)
            return await self.run(function)
        finally:
            self.door.set()


async def _unless(watch: "asyncio.Future[None]", work: Awaitable[T]) -> T:
    """The result of `work`, or `Disconnected` when `watch` ends first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        task.cancel()
