"""What /generate answers: SGLang's reply shapes, made from a request at some point of its life."""

import time
from dataclasses import dataclass, field
from typing import Any

from slime.backends.embedded.scheduler import LogProbs, Request
from slime.backends.embedded.text import Codec, TextStream, trimmed, without_beginning_stop


@dataclass
class ReplyMaker:
    """Makes the replies of one request: a cumulative one for each chunk of a stream, and the last one."""

    request: Request
    codec: Codec | None
    shows_token_text: bool = False
    received_at: float = field(default_factory=time.perf_counter)
    _stream: TextStream | None = None
    _has_sent: bool = False

    def chunk(self, count: int) -> dict[str, Any]:
        """The reply after the first `count` tokens, while more are to come."""
        text = None
        if self.codec is not None:
            params = self.request.sampling
            if self._stream is None:
                self._stream = TextStream(
                    self.codec, skip_special=params.skip_special_tokens, spaces=params.spaces_between_special_tokens
                )
            self._stream.read(self.request.output, count)
            text = without_beginning_stop(self._stream.printable, params.stop)
        meta = self._meta(count, None)
        self._stamp(meta)
        return self._reply(text, count, meta)

    def final(self, version: str) -> dict[str, Any]:
        """The reply of a finished request; `version` stands in when it made no token."""
        request, count = self.request, len(self.request.output)
        assert request.finish is not None
        meta = self._meta(count, request.finish.shown)
        meta["weight_versions"] = [dict(span) for span in request.weight_spans]
        meta["weight_version"] = request.weight_spans[-1]["version"] if request.weight_spans else version
        meta["e2e_latency"] = time.perf_counter() - self.received_at
        self._stamp(meta)
        return self._reply(self._final_text(), count, meta)

    def _final_text(self) -> str | None:
        if self.codec is None:
            return None
        request, params = self.request, self.request.sampling
        assert request.finish is not None
        matched = request.finish.shown.get("matched")
        ids = request.output
        if isinstance(matched, int) and not params.no_stop_trim:
            ids = ids[:-1]
        text = self.codec.decode(
            ids, skip_special=params.skip_special_tokens, spaces=params.spaces_between_special_tokens
        )
        return trimmed(text, matched, keeps_stop=params.no_stop_trim)

    def _reply(self, text: str | None, count: int, meta: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = {} if text is None else {"text": text}
        return reply | {"output_ids": self.request.output[:count], "meta_info": meta}

    def _stamp(self, meta: dict[str, Any]) -> None:
        if not self._has_sent:
            meta["response_sent_to_client_ts"] = time.time()
            self._has_sent = True

    def _meta(self, count: int, finish: dict[str, Any] | None) -> dict[str, Any]:
        request = self.request
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish,
            "prompt_tokens": len(request.prompt),
            "weight_version": request.weight_spans[-1]["version"] if request.weight_spans else None,
            "num_retractions": request.num_retractions,
        }
        if request.wants_log_probs:
            meta |= self._log_probs(count)
        cached = request.cached_tokens
        return meta | {
            "reasoning_tokens": 0,
            "completion_tokens": count,
            "cached_tokens": cached,
            "cached_tokens_details": {"device": cached, "host": 0} if cached else None,
            "dp_rank": None,
        }

    def _log_probs(self, count: int) -> dict[str, Any]:
        request = self.request
        inputs, outputs = request.input_log_probs, request.output_log_probs
        meta: dict[str, Any] = {
            "input_token_logprobs": self._triples(inputs, len(inputs.tokens)),
            "output_token_logprobs": self._triples(outputs, count),
            "output_token_logprobs_length": count,
        }
        if request.top_logprobs:
            meta["input_top_logprobs"] = self._lists(inputs.top, len(inputs.top))
            meta["output_top_logprobs"] = self._lists(outputs.top, count)
        if request.token_ids_logprob:
            meta["input_token_ids_logprobs"] = self._lists(inputs.chosen, len(inputs.chosen))
            meta["output_token_ids_logprobs"] = self._lists(outputs.chosen, count)
        return meta

    def _triples(self, report: LogProbs, count: int) -> list[list[Any]]:
        pairs = zip(report.values[:count], report.tokens[:count], strict=True)
        return [[value, token, self._text_of(token)] for value, token in pairs]

    def _lists(self, entries: list[list[tuple[float, int]] | None], count: int) -> list[list[list[Any]] | None]:
        return [
            None if entry is None else [[value, token, self._text_of(token)] for value, token in entry]
            for entry in entries[:count]
        ]

    def _text_of(self, token: int) -> str | None:
        if not self.shows_token_text or self.codec is None:
            return None
        return self.codec.decode([token], skip_special=False)
