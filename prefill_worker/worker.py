"""The prefill worker: one compute thread that turns prompts into first tokens and KV.

The life of a prompt here:
 1. `submit` (any thread) looks for its beginning in the store's cache, puts it in the inbox and wakes the
    compute thread.
 2. It waits in its length bucket, briefly, for company.
 3. Blocks for all of its tokens are taken from the pool, or it goes on waiting. What is cached is placed.
 4. It is computed in chunks of the token budget, or of what takes long; a long one takes turns with others.
 5. After each chunk, and during a long one, the hand-off sends what is finished to the store.
 6. The first token is sampled and emitted at once. If it ends the request, the KV is not needed.
 7. The hand-off seals the object and emits its handle; the blocks go back to the pool.
A prompt that is cancelled, late or fails leaves at the next of these steps and frees what it holds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from prefill_worker.buckets import LengthBuckets
from prefill_worker.handoff import HandoffContext
from prefill_worker.handoffs import Handoffs
from prefill_worker.job import Event, PrefillJob
from prefill_worker.runner import Chunk, PrefillRunner
from tandem.config import PrefillConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.cores import Cores, OwnCores
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import BadLogits, SampledToken
from tandem.engine.work_state import logprobs_of
from tandem.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    TandemError,
    Unavailable,
    failure_of,
)
from tandem.geometry import num_blocks
from tandem.ledger import PoolAudit
from tandem.profiling.spans import steps
from tandem.tokenizer import Tokenizer
from tandem.work import Work

log = logging.getLogger(__name__)


class PrefillWorker:
    """Plain class behind the gRPC service and the Ray actor. Start it inside a running event loop."""

    def __init__(
        self,
        config: PrefillConfig,
        model: ModelRunner,
        pool: BlockPool,
        tokenizer: Tokenizer,
        handoff: HandoffContext,
        draft: ModelRunner | None = None,
        cores: Cores | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._pool = pool
        self._tokenizer = tokenizer
        self._cores = cores or OwnCores(1)
        self._runner = PrefillRunner(model, config.token_budget, draft, self._cores)
        self.stats = self._runner.stats
        self._buckets = LengthBuckets(config)
        self._long: deque[PrefillJob] = deque()  # prompts with chunks left
        self._inbox: deque[PrefillJob] = deque()
        self._restored: deque[PrefillJob] = deque()  # with the cached part of their prompt in the pool
        self._handoffs = Handoffs(handoff, self._notify)
        self._prefixes = handoff.prefixes  # event loop only
        self._wake = threading.Condition()
        self._stopping = False
        self._long_is_next = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="prefill", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._buckets) + len(self._inbox)

    @property
    def num_running(self) -> int:
        finding = self._prefixes.num_running if self._prefixes else 0
        return len(self._long) + len(self._handoffs) + len(self._restored) + finding

    def audit(self) -> PoolAudit:
        return self._pool.audit()

    def submit(self, work: Work, emit: Callable[[Event], None]) -> PrefillJob:
        """Take a prompt. `emit` gets the first token, then the handle, or an error; on the event loop.

        Raises at once what no waiting can mend: NEVER_FITS, BAD_PARAM, DRAINING.
        """
        work.check_vocabulary(self._model.vocab_size)
        needed, most = num_blocks(len(work.token_ids), self._pool.block_size), self._pool.num_blocks
        if needed > most:
            raise InvalidRequest("NEVER_FITS", f"prompt needs {needed} KV blocks; the worker has {most}")
        if self._stopping:
            raise Unavailable.draining()
        job = PrefillJob(work, lambda event: self._post(emit, event))
        if self._prefixes is not None and self._prefixes.may_help(job):
            self._loop.call_soon_threadsafe(self._prefixes.start_find, job, self._enter)
        else:
            self._enter(job)
        return job

    def cancel(self, job: PrefillJob) -> None:
        """Stop working on a prompt. Call on the event loop; unknown or finished jobs are ignored."""
        job.is_cancelled = True
        self._handoffs.cancel(job)
        self._notify()

    async def stop(self) -> None:
        """Finish the current chunk, send the rest away, wait for hand-offs on their way."""
        self._stopping = True
        self._notify()
        await asyncio.to_thread(self._thread.join)
        if self._prefixes is not None:
            await self._prefixes.stop()
        await self._handoffs.stop()

    def _enter(self, job: PrefillJob) -> None:
        """In line for its blocks."""
        self._pass_on(job, self._inbox)

    def _go_on(self, job: PrefillJob) -> None:
        """Compute what was not cached."""
        self._pass_on(job, self._restored)

    def _pass_on(self, job: PrefillJob, line: deque[PrefillJob]) -> None:
        with self._wake:
            if not self._stopping:
                line.append(job)
                return self._wake.notify()
        return self._refuse(job, Unavailable.draining())

    def _notify(self) -> None:
        """Something changed that the compute thread may wait for, free blocks for one."""
        with self._wake:
            self._wake.notify()

    def _post(self, emit: Callable[[Event], None], event: Event) -> None:
        self._loop.call_soon_threadsafe(emit, event)

    # --- compute thread ---

    def _run(self) -> None:
        for _ in steps("prefill step", self._wait_for_work):
            try:
                self._cores.take()
                self._step()
            except Exception:  # the top of the loop: one bad step must not end the worker
                log.exception("prefill step failed")
        left = [*self._long, *self._buckets.drop(lambda job: True), *self._inbox, *self._restored]
        for line in (self._long, self._inbox, self._restored):
            line.clear()
        for job in left:
            self._refuse(job, Unavailable.draining())

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to compute; False when the worker stops."""
        with self._wake:
            while not self._stopping:
                while self._inbox:
                    self._buckets.add(self._inbox.popleft())
                while self._restored:
                    self._long.appendleft(self._restored.popleft())
                self._buckets.drop(self._is_departed)  # they hold nothing yet
                due_s, now_s = self._buckets.due_s(time.monotonic()), time.monotonic()
                is_due = due_s is not None and due_s <= now_s
                if self._long or (is_due and self._buckets.can_start_any(self._fits)):
                    return True
                self._cores.rest()
                self._wake.wait(self._nap_s(due_s, now_s))
        return False

    def _nap_s(self, due_s: float | None, now_s: float) -> float | None:
        if due_s is None:
            return None
        if due_s > now_s:
            return due_s - now_s
        return self._buckets.next_deadline_s() - now_s  # no memory: until a release or a deadline

    def _is_departed(self, job: PrefillJob) -> bool:
        if job.work.time_left_s() <= 0:
            self._refuse(job, DeadlineExceeded("prefill"))
        return job.is_cancelled

    def _step(self) -> None:
        chunks = self._next_chunks()
        if not chunks:
            return
        try:
            self._handoffs.begin(chunks)
            tokens = self._runner.run(chunks)
        except Exception as error:
            self._fail([chunk.job for chunk in chunks], error)
            return
        for chunk, token in zip(chunks, tokens, strict=True):
            self._finish_chunk(chunk.job, token)

    def _next_chunks(self) -> list[Chunk]:
        """The next forward: a chunk of a long prompt, or a batch of new ones; in turns, until it is late."""
        self._long = deque(job for job in self._long if not self._end_if_departed(job))
        is_next = self._long_is_next or not len(self._buckets)
        if self._long and (is_next or self._runner.is_late(self._long[0])):
            self._long_is_next = False
            return [self._chunk(self._long[0])]
        self._long_is_next = bool(self._long)  # its own first chunk was a long prompt's turn too
        batch = self._buckets.next_batch(self._allocate)
        for job in batch:
            self._runner.stats.queue_s += time.monotonic() - job.arrived_s
            if job.pieces and self._prefixes is not None:
                restore, token_s = self._prefixes.start_restore, self._runner.cost.per_token_s
                self._loop.call_soon_threadsafe(restore, job, self._go_on, token_s)
            elif job.num_left > self._runner.chunk_tokens:
                self._long.append(job)
        return [self._chunk(job) for job in batch if not job.pieces]

    def _chunk(self, job: PrefillJob) -> Chunk:
        return Chunk(job, min(job.num_left, self._runner.chunk_tokens))

    def _fits(self, job: PrefillJob) -> bool:
        return self._pool.can_allocate(job.num_tokens)

    def _allocate(self, job: PrefillJob) -> bool:
        work = job.work
        if self._pool.block_table(work.request_id, work.epoch) is not None:
            self._refuse(job, AlreadyExists("ID_IN_USE", "request_id is already running"))
            return False
        blocks = self._pool.allocate(work.request_id, job.num_tokens, generation=work.epoch)
        job.blocks = blocks or []
        return blocks is not None

    def _finish_chunk(self, job: PrefillJob, token: SampledToken | BadLogits | None) -> None:
        if job.num_left == 0 and job in self._long:
            self._long.remove(job)
        if self._end_if_departed(job):
            return
        try:
            if job.num_left == 0 and self._emit_first_token(job, token):
                self._end(job)
                return
        except Exception as error:
            self._fail([job], error)
            return
        self._handoffs.advance(job)
        if job.num_left == 0:
            self._free(job)

    def _emit_first_token(self, job: PrefillJob, token: SampledToken | BadLogits | None) -> bool:
        """Emit the first token; True if it is also the last, or could not be computed."""
        assert token is not None
        if isinstance(token, BadLogits):
            self._refuse(job, Internal.numerics())
            return True
        stream = job.work.output_stream(self._tokenizer, self._model.eos_token_ids)
        delta = stream.append(token.token_id, logprobs_of(token))
        job.emit(delta._replace(cached=job.hit))
        return delta.finish is not None

    def _fail(self, jobs: list[PrefillJob], error: Exception) -> None:
        """A computation raised: its prompts end, the worker goes on."""
        failure = failure_of(error)
        log.error("prefill of %d prompts failed (%s)", len(jobs), failure.error_id, exc_info=error)
        for job in jobs:
            self._refuse(job, failure)
            if job in self._long:
                self._long.remove(job)

    def _refuse(self, job: PrefillJob, error: TandemError) -> None:
        if not job.is_cancelled:
            job.emit(error)
        self._end(job)

    def _end_if_departed(self, job: PrefillJob) -> bool:
        if self._is_departed(job):
            self._end(job)
        return job.is_cancelled

    def _end(self, job: PrefillJob) -> None:
        """The prompt leaves: its hand-off gives up, its blocks are free once nobody reads them."""
        job.is_cancelled = True
        if job.is_handed_off:
            self._handoffs.give_up_soon(job)
        self._free(job)

    def _free(self, job: PrefillJob) -> None:
        if job.blocks:
            self._pool.release(job.work.request_id, generation=job.work.epoch)
            job.blocks = []
