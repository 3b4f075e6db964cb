"""The decode worker: one step thread that advances every running sequence by one forward at a time.

The life of a request here:
 1. `start` reserves blocks for the longest possible output, or refuses after a moment's patience: the
    router gives credits back when it cancels, and that may be a step before the blocks are free.
 2. A task fetches the KV from the store into those blocks, off the step loop.
 3. The sequence joins the running batch; `Started` is emitted.
 4. Each step: one packed forward (decoder.py), find stops, emit, let finished sequences leave; then a chunk
    of a prompt that came without KV (local_prefill.py), so that who joins waits for one such chunk.
 5. Blocks go back to the pool in the step that ends the sequence, or when its KV has been published.
A sequence that is cancelled or late leaves at the next step; one whose KV is still arriving keeps its
blocks until the last byte is written.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable

from decode_worker.accounting import account, failure_in
from decode_worker.decoder import Advance, Decoder, PlainDecoder
from decode_worker.handover import Handover
from decode_worker.local_prefill import LocalPrefill
from decode_worker.prefetch import Prefetches
from decode_worker.publisher import Publisher
from decode_worker.reservation import Reservations
from decode_worker.restore import KvRestorer
from decode_worker.reuse import NOTHING, Reuse
from decode_worker.scheduler import DecodeScheduler
from decode_worker.sequence import DecodeSequence, Emit, Event
from kvstore.key import KvHandle
from tandem.config import DecodeConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.cores import Cores, OwnCores
from tandem.engine.model_runner import ModelRunner
from tandem.engine.work_state import sampling_state
from tandem.errors import DeadlineExceeded, Internal, TandemError, Unavailable
from tandem.ledger import PoolAudit
from tandem.output import OutputDelta
from tandem.profiling.spans import steps
from tandem.tokenizer import Tokenizer
from tandem.work import Work

log = logging.getLogger(__name__)


class DecodeWorker:
    """Plain class behind the gRPC service and the Ray actor. Start it inside a running event loop.

    `start` is called with an `emit` per router: it gets lists of events, on the event loop, as
    handover.py says.
    """

    def __init__(
        self,
        config: DecodeConfig,
        model: ModelRunner,
        pool: BlockPool,
        tokenizer: Tokenizer,
        restorer: KvRestorer,
        decoder: Decoder | None = None,
        reuse: Reuse = NOTHING,
        cores: Cores | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._tokenizer = tokenizer
        self._restorer = restorer
        self._publisher = Publisher(reuse, model.cache, pool, self._note_freed)
        self._reservations = Reservations(pool, self._publisher.give_up, reuse.names)
        self._prefetches = Prefetches(pool, self._reservations, restorer)
        self._decoder = decoder or PlainDecoder(model)
        self._cores = cores or OwnCores(1)
        self._scheduler = DecodeScheduler(config.max_batch)
        self._prompts = LocalPrefill(model, config.prefill_tokens, restorer.token_cost, config.stall_s)
        self._inbox: deque[DecodeSequence] = deque()  # KV in place, not yet in the scheduler
        self._restoring: dict[DecodeSequence, asyncio.Task[None]] = {}  # event loop only
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False  # event loop only: no more starts
        self._releases: set[asyncio.Task[None]] = set()  # event loop only
        self._loop = asyncio.get_running_loop()
        self._handover = Handover()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        coming = len(self._restoring) + len(self._inbox) + len(self._prefetches)
        return self._scheduler.num_waiting + len(self._prompts) + coming

    def audit(self) -> PoolAudit:
        return self._pool.audit()

    def start(self, work: Work, handle: KvHandle | None, emit: Emit) -> DecodeSequence:
        """Take a request, without a handle its prompt too. Call on the event loop. What goes wrong later is
        emitted.

        Raises at once what no waiting can mend: NEVER_FITS, BAD_PARAM, DRAINING.
        """
        if self._draining:
            raise Unavailable.draining()
        work.check_vocabulary(self._model.vocab_size)
        self._reservations.check_fits(work)
        sequence = DecodeSequence(
            work,
            handle,
            emit,
            output=work.output_stream(self._tokenizer, self._model.eos_token_ids),
            sampling=sampling_state(work, self._model),
        )
        task = self._restoring[sequence] = self._loop.create_task(self._restore(sequence))
        task.add_done_callback(lambda task: self._restored(sequence, task))
        return sequence

    def prefetch(self, work: Work, handle: KvHandle) -> None:
        """Fetch KV while its prompt is computed. Call on the event loop; `start` or `cancel_prefetch` comes.

        What fails later is done again by `start`. Raises NEVER_FITS.
        """
        if not self._draining:
            self._reservations.check_fits(work)
            self._prefetches.start(work, handle)

    def cancel_prefetch(self, key: tuple[str, int]) -> None:
        self._prefetches.give_up(key)

    def cancel(self, sequence: DecodeSequence) -> None:
        """Stop working on a sequence and free what it holds. Call on the event loop."""
        sequence.is_cancelled = True
        if task := self._restoring.get(sequence):
            task.cancel()
        with self._wake:
            self._wake.notify()

    async def stop(self) -> None:
        """End every sequence, then the step thread."""
        self._draining = True
        await self._prefetches.stop()
        for task in list(self._restoring.values()):
            task.cancel()
        while tasks := [*self._restoring.values(), *self._releases]:
            await asyncio.wait(tasks)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        await self._publisher.stop()

    # --- event loop ---

    async def _restore(self, sequence: DecodeSequence) -> None:
        try:
            async with asyncio.timeout_at(sequence.work.deadline_s):
                started = await self._prefetches.fetch(sequence)
        except asyncio.CancelledError:
            self._free(sequence)
            raise
        except TimeoutError:
            self._refuse(sequence, DeadlineExceeded("transfer", sequence.output.num_tokens))
        except TandemError as error:
            self._refuse(sequence, error)
        except Exception:
            bug = Internal.bug()
            log.exception("restore of %s failed (%s)", sequence.work.request_id, bug.error_id)
            self._refuse(sequence, bug)
        else:
            if started is not None:
                sequence.emit([(sequence, started)])
            with self._wake:
                self._inbox.append(sequence)
                self._wake.notify()
            release = self._loop.create_task(self._restorer.give_up_stored(sequence))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    def _restored(self, sequence: DecodeSequence, task: asyncio.Task[None]) -> None:
        """The task is over; one that was cancelled before its first step did nothing at all."""
        del self._restoring[sequence]
        self._prefetches.give_up(sequence.work.key)  # unless the sequence has taken it
        if task.cancelled() and not sequence.is_cancelled:
            sequence.emit([(sequence, Unavailable.draining())])

    def _refuse(self, sequence: DecodeSequence, error: TandemError) -> None:
        self._free(sequence)
        sequence.emit([(sequence, error)])

    def _note_freed(self) -> None:
        self._reservations.note_freed()

    # --- step thread ---

    def _run(self) -> None:
        for _ in steps("decode step", self._wait_for_work):
            try:
                self._cores.take()
                self._step()
            except Exception:  # the top of the loop: one bad step must not end the worker
                log.exception("decode step failed")
        for sequence in self._take_out(lambda sequence: True):
            self._end(sequence, Unavailable.draining())

    def _wait_for_work(self) -> bool:
        with self._wake:
            while True:
                while self._inbox:
                    sequence = self._inbox.popleft()
                    (self._scheduler if sequence.handle else self._prompts).join(sequence)
                if self._stopping:
                    return False
                if self._scheduler.num_running or self._scheduler.num_waiting or self._prompts:
                    return True
                self._cores.rest()
                self._wake.wait()

    def _step(self) -> None:
        """Advance every running sequence by at least one token, then some prompt."""
        self._drop_departed()
        if batch := self._scheduler.schedule():
            self._step_batch(batch)
        self._step_prompts(is_alone=not batch and not self._restoring)

    def _step_batch(self, batch: list[DecodeSequence]) -> None:
        try:
            advances = self._decoder.step(batch)
        except Exception as error:
            self._fail(batch, error)
            return
        advanced = zip(batch, advances, strict=True)
        events = [(sequence, self._try_accept(sequence, advance)) for sequence, advance in advanced]
        self._decoder.settle(batch)
        for sequence in self._scheduler.leave(lambda sequence: sequence.is_finished):
            self._leave(sequence)
        self._handover.put(events)

    def _step_prompts(self, *, is_alone: bool) -> None:
        """Compute some more of the prompts that came without KV."""
        chosen = self._prompts.next(is_alone=is_alone, num_cores=self._cores.num_cores)
        if not chosen:
            return
        try:
            complete = self._prompts.step(chosen)
        except Exception as error:
            self._fail(list(chosen), error)
            return
        events = [(sequence, self._try_accept(sequence, advance)) for sequence, advance in complete]
        self._handover.put(events)
        for sequence, _ in complete:
            if sequence.is_finished:
                self._leave(sequence)
            else:
                self._scheduler.join(sequence)

    def _try_accept(self, sequence: DecodeSequence, advance: Advance) -> Event:
        try:
            event = account(sequence, advance)
        except Exception as error:  # its text cannot be made: no reason to fail the others
            sequence.is_finished = True
            return failure_in([sequence], error)
        if isinstance(event, OutputDelta) and event.finish is not None:
            self._publisher.keep(sequence)
        return event

    def _drop_departed(self) -> None:
        for sequence in self._take_out(lambda sequence: sequence.is_cancelled):
            self._leave(sequence)
        for sequence in self._take_out(lambda sequence: sequence.work.time_left_s() <= 0):
            self._end(sequence, DeadlineExceeded("decode", sequence.output.num_tokens))

    def _take_out(self, is_gone: Callable[[DecodeSequence], bool]) -> list[DecodeSequence]:
        return [*self._scheduler.leave(is_gone), *self._prompts.leave(is_gone)]

    def _fail(self, batch: list[DecodeSequence], error: Exception) -> None:
        """A forward failed: its sequences end, the worker goes on."""
        failure = failure_in(batch, error)
        for sequence in self._take_out(lambda sequence: sequence in batch):
            self._leave(sequence)
        self._handover.put([(sequence, failure) for sequence in batch])

    def _end(self, sequence: DecodeSequence, error: TandemError) -> None:
        self._leave(sequence)
        self._handover.put([(sequence, error)])

    def _leave(self, sequence: DecodeSequence) -> None:
        """A sequence that has run is over."""
        self._decoder.leave(sequence)
        self._free(sequence)

    def _free(self, sequence: DecodeSequence) -> None:
        if sequence.blocks:
            self._pool.release(sequence.work.request_id, generation=sequence.work.epoch)
            sequence.blocks = []
            self._loop.call_soon_threadsafe(self._note_freed)
