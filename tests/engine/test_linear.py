"""The kernel choice, and that a chosen kernel keeps rows independent at every row count."""

import pytest
import torch

from tandem.engine import linear as module
from tandem.engine.linear import TILE, RowTable, TiledLinear, choose, stable_rows, swap_linears


def make(out_features=96, in_features=64, *, exact=True, bias=True):
    torch.manual_seed(0)
    layer = torch.nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    if exact:
        layer.weight.copy_(layer.weight.half().float())
    return layer


@pytest.mark.parametrize("wanted", ["fp16", "fp32", "auto"])
@pytest.mark.parametrize("shape", [(96, 64), (100, 48), (33, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_do_not_depend_on_their_number(wanted, shape, bias):
    layer = make(*shape, bias=bias)
    chosen = choose(layer, wanted)
    x = torch.randn(200, shape[1])
    alone = torch.cat([chosen(row[None]) for row in x])
    torch.testing.assert_close(alone, layer(x), rtol=1e-5, atol=1e-5)
    for rows in (*range(1, 65), 127, 128, 129, 200):
        assert torch.equal(chosen(x[:rows]), alone[:rows]), rows


def test_auto_takes_half_precision_only_if_nothing_is_lost():
    assert choose(make(exact=True), "auto").choice.reason == "weights are exact in half precision"
    assert choose(make(exact=False), "auto").choice.kernel != "fp16"


def test_a_missing_operator_falls_back(monkeypatch):
    def missing(_):
        raise RuntimeError("no such operator")

    monkeypatch.setitem(module.KERNELS, "fp16", missing)
    choice = choose(make(), "fp16").choice
    assert choice.kernel in ("fp32", "plain")
    assert "fp16 is not available" in choice.reason


def test_an_unstable_kernel_is_not_taken(monkeypatch):
    def drifting(layer):
        return lambda x: layer(x) + torch.arange(len(x))[:, None]

    assert stable_rows(drifting(make()), 64) == ()
    monkeypatch.setitem(module.KERNELS, "fp16", drifting)
    assert "fp16 is not stable" in choose(make(), "fp16").choice.reason


def test_row_table_reaches_a_stable_count():
    table = RowTable((3, 8, TILE))
    assert [table.padded(n) for n in (0, 1, 3, 4, 9, 64, 65, 130)] == [0, 3, 3, 8, 64, 64, 67, 131]


def test_swap_reports_every_layer():
    model = torch.nn.Sequential(make(), torch.nn.SiLU(), make(48, 96, exact=False))
    report = swap_linears(model)
    assert set(report) == {"0", "2"}
    assert all(isinstance(model[int(name)], TiledLinear) for name in report)
    assert model(torch.randn(2, 5, 64)).shape == (2, 5, 48)
    assert model(torch.randn(0, 64)).shape == (0, 48)


def test_other_precisions_are_left_alone():
    model = torch.nn.Sequential(make().bfloat16())
    assert swap_linears(model)["0"].kernel == "torch"
    assert type(model[0]) is torch.nn.Linear
