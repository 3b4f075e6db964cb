"""Grouping by prefix on a real service: a cache that holds few beginnings is hit more often."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from deploy.queue.asking import LineReader, ServiceAsker, Texts
from tandem.client import TandemClient
from tandem.offline import source
from tandem.offline.lines import LineParser
from tandem.offline.progress import Progress
from tandem.offline.results import Results
from tandem.offline.runner import Limits, Runner
from tandem.offline.source import FileSource
from tests.e2e.harness import BLOCK_BYTES, config, running

NUM_BEGINNINGS, LINES_EACH, TOKENS = 6, 8, 128


def interleaved(path: Path) -> None:
    """A file in which no two lines in a row begin alike."""
    with path.open("w") as file:
        for turn in range(LINES_EACH):
            for beginning in range(NUM_BEGINNINGS):
                prompt = [(7 * beginning + n) % 90 for n in range(TOKENS)] + [100 + turn]
                file.write(json.dumps({"token_ids": prompt, "max_tokens": 2}) + "\n")


async def hit_rate(folder: Path, path: Path) -> float:
    """The share of prompt tokens that came from the cache, over the whole file."""
    beginning_bytes = TOKENS // 16 * BLOCK_BYTES
    settings = config(cache={"prefix_bytes": 3 * beginning_bytes}, kvstore={"prefix_tokens": 16})
    async with running(settings) as cluster, TandemClient(cluster.address) as client:
        texts = Texts(None)
        reader, results = LineReader(texts), Results(folder / "results.jsonl")
        lines = FileSource(path, LineParser(False, {}), reader.check, results.finished)
        asker = ServiceAsker(client, reader, texts, (await client.models())[0].name)
        runner = Runner(lines, asker, results, Progress(48, 0, 0), Limits(max_in_flight=1))
        await asyncio.wait_for(runner.run(), 60)
        await results.close()
    records = (folder / "results.jsonl").read_text().splitlines()
    bodies = [json.loads(record)["response"]["body"] for record in records]
    assert len(bodies) == NUM_BEGINNINGS * LINES_EACH
    usages = [body["usage"] for body in bodies]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    return cached / sum(usage["prompt_tokens"] for usage in usages)


async def test_an_interleaved_file_hits_the_cache_more_often_than_in_its_own_order(tmp_path, monkeypatch):
    path = tmp_path / "requests.jsonl"
    interleaved(path)
    (tmp_path / "own").mkdir()
    (tmp_path / "grouped").mkdir()
    together = await hit_rate(tmp_path / "grouped", path)
    monkeypatch.setattr(source, "grouped", lambda lines: lines)
    apart = await hit_rate(tmp_path / "own", path)
    print(f"hit rate {together:.3f} grouped, {apart:.3f} in the file's order")
    assert apart < 0.1
    assert together > apart + 0.3
