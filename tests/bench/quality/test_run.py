"""Models under evaluation: one that answers from a list, and real ones."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from bench.quality import paths, perplexity, report
from bench.quality.model import ServedModel
from bench.quality.run import evaluate
from tandem.client import TandemClient
from tandem.errors import ConfigError, InvalidRequest, Unavailable
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama
from tests.e2e.harness import running
from tests.serving import tokenizer


class Listed:
    """Answers what a list says, and remembers how it was asked."""

    def __init__(self, answers: dict[str, str], error: Exception | None = None) -> None:
        self.answers, self.error = answers, error
        self.asked: list[SamplingParams] = []

    async def complete(self, prompt: str, sampling: SamplingParams) -> str:
        self.asked.append(sampling)
        if self.error and prompt not in self.answers:
            raise self.error
        return self.answers.get(prompt, "")


async def test_figures_come_from_the_answers(tmp_path: Path) -> None:
    task = paths.best_paths(4, 8, 3, 0)
    first, second, third, _ = task.problems
    refused = InvalidRequest("PROMPT_TOO_LONG", "the prompt is too long")
    model = Listed({first.prompt: first.right, second.prompt: second.right, third.prompt: "no"}, refused)
    results = await evaluate(task, model, samples=3, seed=1)
    greedy, sampled = results.rows
    assert (greedy.score, greedy.problems, greedy.samples) == (0.5, 4, 1)
    assert (sampled.score, sampled.setting, sampled.samples) == (0.5, "T 0.7, top_p 0.95", 3)
    assert greedy.low < 0.5 < greedy.high
    assert len(results.items) == 16
    whys = {item.problem: item.why for item in results.items}
    assert whys["2"] == "no tool call with paths"
    assert whys["3"] == "PROMPT_TOO_LONG: the prompt is too long"
    drawn = [one for one in model.asked if one.temperature]
    assert {(one.temperature, one.top_p) for one in drawn} == {(0.7, 0.95)}
    assert len({one.seed for one in drawn}) == 12
    again = Listed(model.answers, refused)
    await evaluate(task, again, samples=3, seed=1)
    assert sorted(one.seed for one in again.asked) == sorted(one.seed for one in model.asked)

    content = report.document(results, {"seed": 1, "input_file": Path("x"), "limit": None}, "a model")
    report.save(tmp_path, results, content)
    with (tmp_path / "quality.csv").open() as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [item.score for item in results.items]
    page = (tmp_path / "quality.md").read_text()
    assert "| greedy | share of gold paths | 4 | 1 | 0.500 | 0.150 to 0.850 |" in page
    assert json.loads((tmp_path / "quality.json").read_text())["options"]["input_file"] == "x"
    console = Console(width=140)
    with console.capture() as shown:
        report.show(results, content, console)
    assert "1 × PROMPT_TOO_LONG" not in shown.get()  # it came four times
    assert "4 × PROMPT_TOO_LONG" in shown.get()


async def test_a_service_that_is_gone_ends_the_run() -> None:
    task = paths.best_paths(2, 8, 3, 0)
    with pytest.raises(Unavailable):
        await evaluate(task, Listed({}, Unavailable("DRAINING", "gone")), samples=0, seed=0)


@pytest.mark.e2e
async def test_a_log_likelihood_is_the_models_own() -> None:
    """Of every token that the context has not, though the service only reports what it generates."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    context, continuation = "The answer is", " B, so"
    ids = torch.tensor([tokenizer().encode(context + continuation)])  # a byte is a token
    with torch.inference_mode():
        log_probs = reference(ids).logits[0].log_softmax(-1)
    first = len(context)
    expected = sum(log_probs[place - 1, ids[0, place]].item() for place in range(first, ids.shape[1]))
    async with running() as cluster, TandemClient(cluster.address) as client:
        found = await ServedModel(client, 2).log_likelihood(context, continuation)
    assert found == pytest.approx(expected, abs=1e-3)


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 60))
def test_windows_score_every_token_but_the_first_once(num_tokens: int, stride: int, more: int) -> None:
    found = list(perplexity.windows(num_tokens, stride, stride + more))
    scored = [place for window in found for place in range(window.first, window.end)]
    assert scored == list(range(1, num_tokens))
    assert all(window.begin < window.first < window.end <= window.begin + stride + more for window in found)


def test_perplexity_is_that_of_the_published_recipe(tmp_path: Path) -> None:
    """Beside transformers, whose loss over labels with -100 is the recipe's own form."""
    text = tmp_path / "wiki.test.raw"
    text.write_text(" = Title = \n\n Some text , as in WikiText , of a few words .\n" * 4)
    found = perplexity.measure(text, tiny_llama(), stride=16, max_length=64, limit=150)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    ids = torch.tensor([tokenizer().encode(text.read_text())[:150]])
    nats, count, before = 0.0, 0, 0
    for begin in range(0, 150, 16):
        end = min(begin + 64, 150)
        labels = ids[:, begin:end].clone()
        labels[:, : max(before - begin, 0)] = -100
        num = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            nats += reference(ids[:, begin:end], labels=labels).loss.item() * num
        count, before = count + num, end
        if end == 150:
            break
    assert (found.tokens, count) == (149, 149)
    assert found.nats == pytest.approx(nats / count, rel=1e-4)
    with pytest.raises(ConfigError, match="the stride must be"):
        perplexity.measure(text, tiny_llama(), stride=64, max_length=64)


def tandem_quality(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "quality", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.e2e
def test_the_command_asks_a_service_of_its_own(tmp_path: Path) -> None:
    questions = tmp_path / "test.jsonl"
    questions.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    arguments = ("--input", questions, "--samples", 2, "--model", tiny_llama(), "--out", tmp_path)
    done = tandem_quality("gsm8k", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(row["setting"], row["problems"]) for row in found["rows"]] == [
        ("greedy", 1),
        ("T 0.7, top_p 0.95", 1),
    ]
    items = json.loads((tmp_path / "quality.json").read_text())["items"]
    assert [item["sample"] for item in items] == [0, 0, 1]
    assert all(item["answer"] for item in items)
    assert len({item["answer"] for item in items}) == 3


@pytest.mark.e2e
def test_the_command_ends_with_one_if_grading_is_unsound(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"question": "1 + 1?", "answer": "I do not know."}) + "\n")
    assert tandem_quality("gsm8k", "--input", broken, "--check", "--out", tmp_path / "out").returncode == 1
    missing = tandem_quality("gsm8k", "--input", tmp_path / "no")
    assert (missing.returncode, "cannot read" in missing.stderr) == (2, True)
    assert "Traceback" not in missing.stderr
