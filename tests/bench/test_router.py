"""The router on a virtual clock: everything that arrives ends, and nothing is left on any book."""

import json

from bench import router


def test_a_simulation_loses_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(router, "QUEUE_LENGTHS", (10, 100))
    router.run(8, 3000, tmp_path, as_json=False)
    document = json.loads((tmp_path / "router.json").read_text())
    for row in document["simulated"]:
        assert row["admitted"] + row["refused"] == 3000
        assert row["owned_at_the_end"] == 0
        assert row["decisions_per_s"] > 0
    under, over = document["simulated"]
    assert over["most_waiting"] > under["most_waiting"], "more than the workers hold has to wait"
    assert [cost["length"] for cost in document["queue"]] == [10, 100]
    assert "left over" in capsys.readouterr().out
