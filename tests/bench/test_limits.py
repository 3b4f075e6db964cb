"""What a machine is said to be able to do."""

from __future__ import annotations

import pytest
import torch

from bench import limits as module
from bench.limits import Limits, best, limits


def test_the_best_of_limits_is_taken_one_by_one() -> None:
    assert best(Limits(1.0, 20.0), Limits(2.0, 10.0)) == Limits(2.0, 20.0)


def test_the_fastest_of_each_kind_is_the_limit(monkeypatch) -> None:
    monkeypatch.setattr(module, "SIDE", 64)
    seconds = {"sum": 0.2, "own": 0.1, "product": 0.5, "ours": 1.0}
    reads = {name: module._Probe(100, lambda: None) for name in ("sum", "own")}
    products = {name: module._Probe(10, lambda: None) for name in ("product", "ours")}
    monkeypatch.setattr(module, "_probes", lambda large, device: (reads, products))
    monkeypatch.setattr(module, "interleave", lambda arms, rounds: {name: [seconds[name]] for name in arms})
    assert limits(1) == Limits(1000.0, 20.0)


@pytest.mark.parametrize("native", ["auto", "off"])
def test_probes_do_what_their_amounts_say(monkeypatch, native) -> None:
    monkeypatch.setenv("TANDEM_NATIVE", native)
    monkeypatch.setattr(module, "SIZE", 32)
    reads, products = module._probes(torch.ones(64, 64), "cpu")
    assert ("own, one row" in reads, "own, many rows" in products) == ((native == "auto",) * 2)
    assert reads["sum"].call() == 64 * 64
    if native == "auto":
        assert torch.equal(reads["own, one row"].call(), torch.full((1, 64), 64.0))
        assert torch.equal(products["own, many rows"].call(), torch.full((module.ROWS, 64), 64.0))
    for probe in (*reads.values(), *products.values()):
        assert probe.seconds() > 0
