"""Lost streams, however they were cut: what the caller gets is one whole stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.client import generation_input
from tandem.errors import AlreadyExists, InvalidRequest, StreamBroken, Unavailable
from tandem.pb.v1 import generation_pb2 as pb
from tandem.progress import LONGEST_WAIT_S, StreamProgress
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy

SAMPLED = SamplingParams(temperature=1.0)
LOST = Unavailable("DRAINING", "no answer")


def progress_of(sampling=SAMPLED, *, resume_s=30.0, timeout_s=None, policy=None):
    speculation = SpeculationParams(policy=policy) if policy else None
    return StreamProgress(generation_input("x", sampling, speculation=speculation), timeout_s, resume_s)


def chunk_of(token_ids, texts, position):
    return pb.StreamGenerateResponse(
        token_chunk=pb.TokenChunk(
            position=position,
            token_ids=token_ids,
            text="".join(texts),
            logprobs=[pb.TokenLogprobs(logprob=-token_id) for token_id in token_ids],
        )
    )


def call(token_ids, texts, asked, sizes):
    """What a server sends for one call, in chunks of the sizes drawn."""
    at = len(asked.delivered_token_ids)
    assert list(asked.delivered_token_ids) == token_ids[:at]
    assert at < len(token_ids)  # something is left to generate, as the server demands
    yield pb.StreamGenerateResponse(admitted=pb.Admitted(request_id="r"))
    while at < len(token_ids):
        end = at + sizes.draw(st.integers(1, 4))
        yield chunk_of(token_ids[at:end], texts[at:end], at)
        at = min(end, len(token_ids))
    yield pb.StreamGenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


@given(
    output=st.lists(st.tuples(st.integers(0, 9), st.text(max_size=3)), min_size=1, max_size=12),
    data=st.data(),
)
def test_one_whole_stream_comes_out_of_many_lost_ones(output, data):
    token_ids, texts = [token_id for token_id, _ in output], [text for _, text in output]
    progress = progress_of()
    seen, seeds = [], set()
    for is_last in [*[False] * data.draw(st.integers(0, 4)), True]:
        asked = progress.rest()
        seeds.add(asked.sampling.seed)
        events = list(call(token_ids, texts, asked, data))
        kept = events if is_last else events[: data.draw(st.integers(0, len(events) - 1))]
        seen += [new for event in kept if (new := progress.take(event)) is not None]

    chunks = [event.token_chunk for event in seen if event.HasField("token_chunk")]
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == token_ids
    assert "".join(chunk.text for chunk in chunks) == "".join(texts)
    assert [entry.logprob for chunk in chunks for entry in chunk.logprobs] == [-t for t in token_ids]
    assert progress.has_ended
    at = 0
    for chunk in chunks:
        assert chunk.position == at
        at += len(chunk.token_ids)
    assert [event.WhichOneof("event") for event in seen].count("finished") == 1
    assert len(seeds) == 1  # made up once: another one would be another text


def test_a_seed_is_made_up_only_where_there_is_none():
    assert progress_of(SamplingParams(seed=4)).rest().sampling.seed == 4
    assert progress_of().rest().sampling.HasField("seed")
    assert not progress_of(resume_s=0).rest().sampling.HasField("seed")


@pytest.mark.parametrize(
    "progress",
    [
        progress_of(resume_s=0),
        progress_of(SamplingParams(n=2)),
        progress_of(policy=SpeculationPolicy.AUTO),
    ],
)
def test_what_would_not_be_exact_is_not_resumed(progress):
    progress.take(chunk_of([1], ["a"], 0))
    with pytest.raises(Unavailable):
        progress.wait_after(LOST)


def test_greedy_tokens_are_the_same_under_each_policy():
    progress = progress_of(SamplingParams(), policy=SpeculationPolicy.AUTO)
    progress.take(chunk_of([1], ["a"], 0))
    assert progress.wait_after(LOST) > 0


def test_a_call_that_never_began_is_not_tried_again():
    with pytest.raises(Unavailable):
        progress_of().wait_after(LOST)


@pytest.mark.parametrize("error", [InvalidRequest("BAD_PARAM", "x"), AlreadyExists("ID_IN_USE", "x")])
def test_what_is_no_loss_is_raised(error):
    progress = progress_of()
    progress.take(chunk_of([1], ["a"], 0))
    with pytest.raises(type(error)):
        progress.wait_after(error)


def test_a_server_that_still_runs_the_lost_request_is_waited_for():
    progress = progress_of()
    progress.take(chunk_of([1], ["a"], 0))
    waits = [progress.wait_after(LOST)]
    waits += [progress.wait_after(AlreadyExists("ID_IN_USE", "x")) for _ in range(8)]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_S
    with pytest.raises(Unavailable, match="no answer") as raised:  # the loss, not what came of it
        progress.wait_after(InvalidRequest("BAD_PARAM", "x"))
    assert isinstance(raised.value.__cause__, InvalidRequest)


def test_trying_ends_with_the_time():
    progress = progress_of(resume_s=1e-9)
    progress.take(chunk_of([1], ["a"], 0))
    progress.wait_after(LOST)
    with pytest.raises(Unavailable, match="no answer"):
        progress.wait_after(Unavailable("NO_DECODE", "not yet"))


@pytest.mark.parametrize("other", [chunk_of([2, 3], ["a", "b"], 0), chunk_of([1, 3], ["x", "b"], 0)])
def test_another_text_is_the_end(other):
    """A server with other weights came back: nothing is sewn together."""
    progress = progress_of()
    progress.take(chunk_of([1], ["a"], 0))
    progress.wait_after(LOST)
    progress.rest()
    with pytest.raises(StreamBroken, match="after 1 tokens") as raised:
        progress.take(other)
    with pytest.raises(StreamBroken):
        progress.wait_after(raised.value)


def test_every_call_has_what_is_left_of_the_time():
    assert progress_of().time_left_s is None
    assert 9 < progress_of(timeout_s=10).time_left_s <= 10
    assert progress_of(timeout_s=-1).time_left_s == 0
