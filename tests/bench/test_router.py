"""The router on a virtual clock: everything that arrives ends, and nothing is left on any book."""

import json

from bench import router
from router.policy import POLICIES


def test_a_simulation_loses_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(router, "QUEUE_LENGTHS", (10, 100))
    monkeypatch.setattr(router, "SESSIONS", 50)
    monkeypatch.setattr(router, "TRACED", 100)
    router.run(24, 1500, tmp_path, as_json=False)
    document = json.loads((tmp_path / "router.json").read_text())
    for row in document["simulated"]:
        assert row["admitted"] + row["refused"] == 1500
        assert row["owned_at_the_end"] == 0
        assert row["decisions_per_s"] > 0
    rows = {(row["policy"], row["load"]): row for row in document["simulated"]}
    assert {policy for policy, _ in rows} == set(POLICIES)
    for policy in POLICIES:
        under, over = (rows[policy, load] for load in router.LOADS)
        assert over["most_waiting"] > under["most_waiting"], "more than the workers hold has to wait"
    same = {policy: rows[policy, 0.7]["same_worker"] for policy in POLICIES}
    print(same)
    assert same["session"] > 1.5 * same["least-loaded"]
    assert same["kv-aware"] > 1.1 * same["least-loaded"]
    assert [cost["length"] for cost in document["queue"]] == [10, 100]
    assert "left over" in capsys.readouterr().out
