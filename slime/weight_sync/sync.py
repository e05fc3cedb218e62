"""Give every engine version n+1 of the weights, or none: pause, buckets, verify, continue."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from slime.weight_sync.base import Bucket, WeightEngine, WeightSource, WeightSyncError
from slime.weight_sync.digest import ExpectedDigests
from slime.weight_sync.proof import verify

logger = logging.getLogger(__name__)


class Transport(Protocol):
    """One way in which buckets travel. Called on trainer rank 0, engines paused, but for `assist`."""

    def connect(self, engines: Sequence[WeightEngine]) -> None:
        """Prepare for these engines; called again when the set of engines has changed."""

    def send(self, bucket: Bucket, version: str) -> None:
        """Deliver a bucket to every engine."""

    def finish(self, version: str) -> None:
        """All buckets were sent: make the engines hold `version`."""

    def assist(self) -> None:
        """The part of the trainer's other ranks in one `send` or `skip`."""

    def skip(self) -> None:
        """Instead of a `send` that did not happen, or did not come so far that the other ranks could go on."""

    def close(self) -> None: ...


class SenderTransport:
    """Base of transports that trainer rank 0 serves alone: the other ranks have no part in them."""

    def assist(self) -> None:
        """Nothing to do."""

    def skip(self) -> None:
        """Nobody waits."""


@dataclass
class SyncReport:
    """What one sync did. Times in seconds, wall clock, on trainer rank 0; they add up to `total_s`."""

    version: int
    num_tensors: int = 0
    size_bytes: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Of every tensor, under the engines' names: what every engine was proved to hold."""

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values())

    def metrics(self) -> dict[str, float]:
        """The report under its metric names."""
        named = {f"perf/update_weights_{phase}_time": seconds for phase, seconds in self.phases_s.items()}
        return {
            **named,
            "perf/update_weights_time": self.total_s,
            "perf/update_weights_bytes": float(self.size_bytes),
        }


class WeightSync:
    """Carries the weights of one trainer to its engines and proves that they arrived.

    While `sync` runs no engine generates. If anything fails the engines stay paused: a request that
    was waiting is never answered with weights that were not proved.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        transport: Transport,
        expected_digests: Callable[[], ExpectedDigests],
        bucket_size_bytes: int,
        is_sender: bool = True,
        pause_mode: str = "abort",
    ) -> None:
        """
        Args:
            source: the trainer's weights; every rank of the trainer makes its own WeightSync over it.
            transport: how buckets travel; on other ranks than the sender's only its `assist` is called.
            expected_digests: makes an empty collector in the engines' naming, one a sync.
            is_sender: true on trainer rank 0, which speaks to the engines; the others only take part in the gather.
            pause_mode: what becomes of requests in flight (SGLang's `abort`, `retract` or `in_place`).
        """
        self._source = source
        self._transport = transport
        self._expected_digests = expected_digests
        self._bucket_size_bytes = bucket_size_bytes
        self._is_sender = is_sender
        self._pause_mode = pause_mode
        self._engines: list[WeightEngine] = []

    def connect(self, engines: Sequence[WeightEngine]) -> None:
        """Name the engines that the next syncs must reach."""
        self._engines = list(engines)
        if self._is_sender:
            self._transport.connect(self._engines)

    def sync(self, version: int) -> SyncReport:
        """Bring all engines to `version`. Collective over the trainer's ranks.

        Raises:
            WeightSyncError: an engine could not be brought there or proved; all engines stay paused.
            EngineError: an engine refused or did not answer in time.
        """
        report = SyncReport(version)
        if not self._is_sender:
            for _ in self._source.buckets(self._bucket_size_bytes):
                self._transport.assist()
            return report
        if not self._engines:
            raise WeightSyncError("No engine is connected to the weight sync: call connect() first.")
        buckets = iter(self._source.buckets(self._bucket_size_bytes))
        try:
            self._bring_engines_to(str(version), buckets, report)
        except BaseException:
            for _ in buckets:  # the other ranks are on their way through the gather, and wait for this one
                self._transport.skip()
            raise
        logger.info(
            "weights version %s on %d engine(s), %.0f MB, %d tensors proved in %.2f s",
            version, len(self._engines), report.size_bytes / 1e6, report.num_tensors, report.total_s,
        )  # fmt: skip
        return report

    def _bring_engines_to(self, label: str, buckets: Iterator[Bucket], report: SyncReport) -> None:
        digests = self._expected_digests()
        with _phase(report, "pause"):
            self._on_all(lambda engine: engine.pause(self._pause_mode))
            # Frozen requests keep their keys and values; where there are none, nothing of older weights may stay.
            is_frozen = self._pause_mode == "in_place"
            self._on_all(lambda engine: engine.flush_cache(only_if_idle=is_frozen))
        while True:
            with _phase(report, "gather"):
                bucket = next(buckets, None)
                if bucket is None:
                    break
                try:
                    digests.add(bucket)
                except BaseException:
                    self._transport.skip()
                    raise
            with _phase(report, "send"):
                self._transport.send(bucket, label)
            report.num_tensors += len(bucket)
            report.size_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        with _phase(report, "send"):
            self._transport.finish(label)
        with _phase(report, "verify"):
            expected = digests.result()
            self._on_all(lambda engine: verify(engine, expected, label))
            report.digests = expected
        with _phase(report, "continue"):
            self._on_all(lambda engine: engine.resume())

    def close(self) -> None:
        if self._is_sender:
            self._transport.close()

    def _on_all(self, call: Callable[[WeightEngine], None]) -> None:
        on_each(self._engines, call)


def on_each(engines: Sequence[WeightEngine], call: Callable[[WeightEngine], None]) -> None:
    """Call all engines at once; wait for all of them; raise the first error, with the others appended."""
    with ThreadPoolExecutor(max(1, len(engines)), thread_name_prefix="weight-sync") as pool:
        futures = [pool.submit(call, engine) for engine in engines]
        errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"and: {other}")
        raise errors[0]


@contextmanager
def _phase(report: SyncReport, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        report.phases_s[name] = report.phases_s.get(name, 0.0) + time.perf_counter() - started
