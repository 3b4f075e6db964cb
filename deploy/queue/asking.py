"""Lines of a queue as calls to a Tandem service, and its responses in OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from router.ask import Ask
from router.batches.entries import check_entry, metrics_of, read_entry
from router.http.generation import Generation
from router.http.logprobs import Logprobs, LogprobsReader
from router.http.shapes import Part, usage_json
from tandem.chat_template import ChatTemplate
from tandem.client import TandemClient
from tandem.errors import NotFound
from tandem.offline.lines import Entry
from tandem.offline.members import Answer
from tandem.output import FINISH_FROM_PB, OutputDelta, TokenLogprobs
from tandem.pb.v1 import generation_pb2 as pb
from tandem.prefix_usage import PrefixHit
from tandem.request import Timings, Usage
from tandem.sampling import bad_param
from tandem.tokenizer import Tokenizer


class Texts:
    """What is only known from the checkpoint's folder: the chat template and the tokenizer."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @cached_property
    def template(self) -> ChatTemplate | None:
        return ChatTemplate.from_dir(self._require("chat lines"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dir(self._require("chat lines, `echo` and `logprobs`"))

    def detokenize(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids)

    def _require(self, what: str) -> Path:
        if self._path is None:
            raise bad_param(f"{what} need the model's folder beside --server: give --model")
        return self._path


class LineReader:
    """What an entry asks for. Knows the model's texts, not the service."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def check(self, entry: Entry) -> None:
        """Raises `BadLine` for what can never be answered."""
        check_entry(entry, self.read)

    def read(self, entry: Entry) -> Generation:
        """Raises `BAD_PARAM`. Prompts of chats become token ids, as their template wrote them."""
        generation = read_entry(entry, lambda: self._texts.template, self._texts)
        if generation.has_logprobs:
            _ = self._texts.tokenizer
        return replace(generation, asks=[self._settle(ask) for ask in generation.asks])

    def _settle(self, ask: Ask) -> Ask:
        prompt = ask.prompt
        if isinstance(prompt, str) and not ask.add_special_tokens:
            prompt = self._texts.tokenizer.encode(prompt, add_special_tokens=False)
        return replace(ask, prompt=prompt)


class ServiceAsker:
    """Asks one service, at the lowest priority there is."""

    def __init__(self, client: TandemClient, reader: LineReader, texts: Texts, model: str) -> None:
        self._client = client
        self._reader = reader
        self._texts = texts
        self._model = model

    async def __call__(self, entry: Entry) -> Answer:
        """Raises the service's `TandemError`."""
        generation = self._reader.read(entry)
        responses = await asyncio.gather(*(self._ask(ask) for ask in generation.asks))
        completions = [completion for response in responses for completion in response.completions]
        usages = [_usage(completion.finished.usage) for completion in completions]
        choices = [
            generation.shape.choice(self._part(index, completion, generation))
            for index, completion in enumerate(completions)
        ]
        body = {
            "id": responses[0].request_id,
            "object": generation.shape.whole,
            "created": int(time.time()),
            "model": self._model,
            "choices": choices,
            "usage": usage_json(usages, generation.num_choices),
        }
        slowest = max((completion.finished.timings for completion in completions), key=lambda t: t.total_ms)
        output_tokens = sum(usage.completion for usage in usages)
        return Answer(responses[0].request_id, body, metrics_of(Timings.from_pb(slowest)), output_tokens)

    async def _ask(self, ask: Ask) -> pb.GenerateResponse:
        if ask.model not in ("", self._model):
            raise NotFound("NO_SUCH_MODEL", "not found")
        return await self._client.generate(
            ask.prompt,
            ask.sampling,
            priority=ask.priority,
            speculation=ask.speculation,
            timeout_s=ask.timeout_s,
        )

    def _part(self, index: int, completion: pb.Completion, generation: Generation) -> Part:
        finished = completion.finished
        which = finished.WhichOneof("matched_stop")
        return Part(
            index=index,
            text=generation.echoes[index // generation.num_choices] + completion.text,
            token_ids=list(completion.token_ids) if generation.return_token_ids else None,
            logprobs=self._logprobs(completion) if generation.has_logprobs else None,
            finish=FINISH_FROM_PB[finished.reason],
            matched_stop=getattr(finished, which) if which else None,
        )

    def _logprobs(self, completion: pb.Completion) -> list[Logprobs]:
        entries = tuple(TokenLogprobs.from_pb(entry) for entry in completion.logprobs)
        delta = OutputDelta(tuple(completion.token_ids), completion.text, entries)
        return LogprobsReader(self._texts.tokenizer.token_bytes).read(delta)


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt, usage.completion, PrefixHit.from_pb(usage), usage.drafted, usage.accepted)
