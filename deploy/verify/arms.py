"""What is compared with what, and which of it passes.

The control compares this process with itself: other chunks, other company. Where it finds no difference at
all, raw KV that travelled must make none either; where a model's kernels are not exact, it may make no
greater one. Positive controls are KV whose digests are right and whose content is not: blocks in the wrong
order, which change but the last bits, as cached keys know their positions, and another prompt's KV. KV in
fewer bits, or rounded to the dtype of decode workers, must do less harm than that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc

from deploy.verify.drift import Drift
from deploy.verify.local import Local, Sample
from deploy.verify.passage import Passage
from tandem.audit import fetch_audit, fetch_audit_and_workers
from tandem.client import as_tandem_error
from tandem.config import ClusterConfig
from tandem.errors import ConfigError, FailedPrecondition, Unavailable
from tandem.internal import InternalPlane

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """One comparison over all samples. `codec` is that of KV that travelled; `dtypes` are those of both ends,
    where they differ."""

    name: str
    drift: Drift
    codec: str = ""
    of: str = "logits"
    dtypes: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether nothing may be lost on the way."""
        return self.codec == "raw" and not self.dtypes


@dataclass(slots=True)
class Findings:
    """Everything that was compared."""

    control: Arm
    travelled: list[Arm] = field(default_factory=list)
    wrong: list[Arm] = field(default_factory=list)  # the least wrong first
    num_flips: int = 0
    num_noticed: int = 0

    def passes(self, arm: Arm) -> bool:
        """Whether an arm found what it should."""
        if not arm.drift.is_finite:
            return False
        if arm is self.control:
            return True
        is_noticed = arm.drift.max_abs > self.control.drift.max_abs
        if arm in self.wrong:
            return is_noticed
        if arm.is_exact:
            return not is_noticed
        return arm.drift.mean_abs < self.wrong[-1].drift.mean_abs

    @property
    def arms(self) -> list[Arm]:
        return [self.control, *self.travelled, *self.wrong]

    @property
    def is_sound(self) -> bool:
        return self.num_noticed == self.num_flips > 0 and all(self.passes(arm) for arm in self.arms)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill and a decode worker, by name and channel."""

    prefill: tuple[str, grpc.aio.Channel]
    decode: tuple[str, grpc.aio.Channel]


class Verification:
    """Compares services with this process, in whose cache each sample has an area and two are spare."""

    def __init__(self, local: Local, samples: Sequence[Sample], plane: InternalPlane) -> None:
        self._local = local
        self._plane = plane
        self._samples = samples
        self._here, self._there = len(samples), len(samples) + 1
        self.findings = Findings(self._control())

    async def service(self, config: ClusterConfig, address: str) -> None:
        """KV from each of a service's prefill workers, and what each of its decode workers makes of it."""
        async with self._plane.channel(address) as router, _errors_of(address):
            await self._compare(config, router)

    async def _compare(self, config: ClusterConfig, router: grpc.aio.Channel) -> None:
        codec, held = config.kvstore.codec, config.kv_dtypes
        dtypes = "" if held.are_one else f"{held.prefill} → {held.decode}"
        passage = Passage(config, router)
        async with self._pairs(passage, router) as pairs:
            for pair in pairs:
                here, answers = await self._travel(passage, pair)
                way = f"{pair.prefill[0]} → "
                self.findings.travelled += [
                    Arm(way + "here", here, codec, dtypes=dtypes),
                    Arm(way + pair.decode[0], answers, codec, "log-probabilities", dtypes),
                ]
        if not self.findings.wrong:
            self.findings.wrong += [
                Arm("blocks out of order", await self._mislead(passage, is_shuffled=True), "raw"),
                Arm("a reversed prompt", await self._mislead(passage, is_shuffled=False), "raw"),
            ]

    def _control(self) -> Arm:
        drift, local = Drift(), self._local
        local.prefill_together(self._samples)
        together = local.follow_together(self._samples)
        for sample, logits in zip(self._samples, together, strict=True):
            local.prefill(self._here, sample.prompt)
            drift.add(local.follow(self._here, sample), logits)
        return Arm("here, other chunks", drift)

    async def _travel(self, passage: Passage, pair: Pair) -> tuple[Drift, Drift]:
        here, answers, local = Drift(), Drift(), self._local
        for sample in self._samples:
            work = passage.work(sample, len(sample.forced))
            found = await passage.prefill(pair.prefill[1], work)
            assert found is not None, "it was one when the service was asked"
            first, handle = found
            async with passage.held(handle):
                await passage.place(handle, local.reader.cache, local.area(self._there))
                going_on = replace(work, token_ids=work.token_ids + first.token_ids)
                deltas = await passage.decode(pair.decode[1], going_on, handle)
            local.prefill(self._here, sample.prompt)
            here.add(local.follow(self._here, sample), local.follow_read(self._there, sample))
            tokens = [token for delta in deltas for token in delta.token_ids]
            logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs]
            local.prefill(self._here, sample.prompt)
            logits = local.follow(self._here, sample, [*first.token_ids, *tokens[:-1]])
            answers.add_chosen(logits, tokens, logprobs)
        return here, answers

    async def _mislead(self, passage: Passage, *, is_shuffled: bool) -> Drift:
        """Store KV by ourselves that nothing but its meaning is wrong with. Of the first, flip bits too."""
        drift, local = Drift(), self._local
        for sample in self._samples:
            local.prefill(self._here, sample.prompt if is_shuffled else sample.prompt[::-1])
            handle = await passage.send(local, self._here, passage.work(sample, 1), is_shuffled)
            async with passage.held(handle):
                await passage.place(handle, local.cache, local.area(self._there))
                if not self.findings.num_flips:
                    noticed, tried = await passage.flip_bits(handle)
                    self.findings.num_noticed, self.findings.num_flips = noticed, tried
            local.prefill(self._here, sample.prompt)
            drift.add(local.follow(self._here, sample), local.follow(self._there, sample))
        return drift

    @asynccontextmanager
    async def _pairs(self, passage: Passage, router: grpc.aio.Channel) -> AsyncIterator[list[Pair]]:
        """Every worker in a pair at least; which side it is on shows when it is asked to prefill."""
        prefills: list[tuple[str, grpc.aio.Channel]] = []
        decodes: list[tuple[str, grpc.aio.Channel]] = []
        async with AsyncExitStack() as stack:
            _, addresses = await fetch_audit_and_workers(router, TIMEOUT_S)
            for address in addresses:
                worker = await stack.enter_async_context(self._plane.channel(address))
                [books] = await fetch_audit(worker, TIMEOUT_S)
                found = await passage.prefill(worker, passage.work(self._samples[0], 2))
                (decodes if found is None else prefills).append((books.pool, worker))
                if found is not None:
                    await stack.enter_async_context(passage.held(found[1]))
            if not prefills or not decodes:
                raise Unavailable("NO_PREFILL", "the service has no prefill or no decode worker now")
            most = max(len(prefills), len(decodes))
            yield [Pair(prefills[i % len(prefills)], decodes[i % len(decodes)]) for i in range(most)]


async def reach(address: str, plane: InternalPlane) -> None:
    """Raise `Unavailable` unless a router answers there: before a model is loaded for nothing."""
    async with plane.channel(address) as router, _errors_of(address):
        await fetch_audit_and_workers(router, TIMEOUT_S)


@asynccontextmanager
async def _errors_of(address: str) -> AsyncIterator[None]:
    """What fails against a service leaves with what to do about it."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise as_tandem_error(error, address) from error
    except FailedPrecondition as error:
        if error.reason != "FINGERPRINT_MISMATCH":
            raise
        raise ConfigError(
            f"the service at {address} runs another build of the model; give its --model, --draft, "
            "--dtype, --quantization and --config"
        ) from error
