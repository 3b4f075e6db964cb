"""What a run leaves to look at: pictures, the server's figures, and a page in a real browser."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from bench.serve import report
from bench.serve.metrics import Slo, summarize
from bench.serve.page import page
from bench.serve.protocol import check_comparable, sentence
from bench.serve.record import Outcome, RequestRecord
from bench.serve.scrape import Reading, Scraper, acceptance, read
from bench.serve.session import Options, Run
from bench.serve.slo import Slos
from bench.serve.stages import spans_of
from tandem.errors import ConfigError

EXPOSITION = b"""# HELP tandem_requests_waiting Completions in the queue.
tandem_requests_waiting 3.0
tandem_requests_running 5.0
tandem_kv_reserved_bytes{role="decode",worker="decode-0"} 1e+06
tandem_kv_reserved_bytes{role="store",worker="store"} 0.0
tandem_kv_capacity_bytes{role="decode",worker="decode-0"} 4e+06
tandem_kv_capacity_bytes{role="store",worker="store"} 8.0
tandem_spec_draft_tokens_total{worker="decode-0"} 20.0
tandem_spec_draft_tokens_total{worker="decode-1"} 10.0
tandem_spec_accepted_tokens_total{worker="decode-0"} 12.0
"""
STAGES_MS = {"queue_ms": 10.0, "prefill_ms": 40.0, "kv_read_ms": 20.0, "decode_ms": 130.0}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def reading(at_s: float, drafted: float, accepted: float) -> Reading:
    return Reading(at_s, 2.0, 3.0, {"decode-0": 0.5, "store": 0.1}, drafted, accepted)


def document(**more):
    """Requests of two classes, some of them late, failed or without the service's timings."""
    records = []
    for index in range(120):
        begin = index / 20
        late_s = 0.02 if index % 10 == 0 else 0.0
        arrivals = [(begin + 0.05 + 0.01 * n, 1 + n % 2) for n in range(12)]
        one = RequestRecord(index, begin, begin + late_s, 30, 18, arrivals, begin + 0.2, Outcome.OK, "", 18)
        one.stages_ms, one.drafted, one.accepted = dict(STAGES_MS) if index % 3 else {}, 9, index % 10
        one.request_class = "batch" if index % 4 == 0 else "interactive"
        if index == 7:
            one.outcome, one.error = Outcome.FAILED, "QUEUE_FULL"
        records.append(one)
    slos = Slos(Slo(ttft_ms=60), {"batch": Slo(e2e_ms=9000)})
    options = Options(num_requests=120, slo=slos.default, class_slos=tuple(slos.by_class.items()))
    scraper = Scraper(
        "http://127.0.0.1:1/metrics", readings=[reading(n / 2, 10 * n, 6 * n) for n in range(9)]
    )
    run = Run(records, summarize(records, slos, []), scraper)
    return {**report.document(run, options, "somewhere", "model"), **more}


def test_the_servers_figures_are_read_from_its_metrics() -> None:
    found = read(EXPOSITION, 1.25)
    assert found == Reading(1.25, 3, 5, {"decode-0": 0.25, "store": 0.0}, 30, 12)
    assert read(b"vllm:num_requests_running 4\n", 0) is None
    later = [
        Reading(n, 0, 0, {}, drafted, accepted)
        for n, (drafted, accepted) in enumerate([(0, 0), (8, 6), (8, 6), (12, 7), (2, 1)])
    ]
    assert acceptance(later) == [(1, 0.75), (3, 0.25)]  # nothing drafted; a worker that began again
    with pytest.raises(ConfigError, match="is no URL"):
        Scraper("127.0.0.1:8000")


def test_where_the_time_went_sums_to_the_request() -> None:
    late = RequestRecord(0, 1.0, 1.02, end_s=1.22, stages_ms=dict(STAGES_MS))
    spans = spans_of(late)
    assert [span.colour for span in spans] == ["late", "queue", "prefill", "transfer", "decode"]
    assert spans[0].begin == 1.0
    assert spans[-1].end == pytest.approx(1.22)
    assert all(a.end == b.begin for a, b in itertools.pairwise(spans))
    unknown = RequestRecord(0, 1.0, 1.0, arrivals=[(1.1, 1)], end_s=1.3)
    assert spans_of(unknown) == [(1.0, 1.1, "other"), (1.1, 1.3, "decode")]
    assert spans_of(RequestRecord(0, 1.0, 1.0, end_s=1.3))[0] == (1.0, 1.3, "other")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = report.save(tmp_path, document())
    assert [file.name for file in pictures] == [
        "latencies.png",
        "over_time.png",
        "waterfall.png",
        "server.png",
    ]
    for file in pictures:
        data = file.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG")
        assert width >= 1000 <= 2 * height
    assert report.save(tmp_path, {**document(), "server": None})[-1].name == "waterfall.png"


def html_of(content) -> str:
    return page(content, [RequestRecord.from_json(values) for values in content["records"]])


def test_the_page_says_what_the_server_said_and_what_classes_got() -> None:
    change = {"figure": "ttft_ms", "a": 10.0, "b": 12.0, "change": 0.2, "low": 0.1, "high": 0.3}
    cost = {
        "requests": 120,
        "same_texts": 1.0,
        "changes": [change],
        "client_cpu_ms": {"grpc": 2.0, "http": 1.5},
    }
    html = html_of(document(protocol=cost))
    assert "9 readings of http://127.0.0.1:1/metrics, 0 failed" in html.replace("&#x27;", "'")
    for title in ("KV reserved", "Acceptance", "By class", "Requests, as the router counts them"):
        assert title in html
    assert "<td>interactive</td><td>90</td><td>89</td>" in html
    assert "E2E ≤ 9000 ms" in html
    assert sentence(cost) == (
        "HTTP beside gRPC: equal texts in 100.0% of 120 requests; medians TTFT 10.00 to 12.00 ms "
        "(request by request +20.0%, 95 %: +10.0% to +30.0%); client CPU 2.00 to 1.50 ms per request"
    )
    assert "HTTP beside gRPC" in html
    without = document()
    del without["server"]
    assert "name the service's URL by --http-server" in html_of(without)


def test_what_cannot_be_compared_over_both_protocols_is_said_before() -> None:
    with pytest.raises(ConfigError, match="at least 20 requests"):
        check_comparable(Options(num_requests=19))
    with pytest.raises(ConfigError, match="conversations of token ids need gRPC"):
        check_comparable(Options(turns="3"))


MEASURING = """<script>
const all = [...document.querySelectorAll('*')];
const wide = all.filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const texts = [...document.querySelectorAll('svg text')].filter(e => {
  const text = e.getBoundingClientRect(), svg = e.closest('svg').getBoundingClientRect();
  return text.left < svg.left - 1 || text.right > svg.right + 1 || text.bottom > svg.bottom + 1;
});
document.title = `measured ${wide.length} ${texts.length} ${document.querySelectorAll('svg').length}`;
</script></body>"""


def browse(file: Path, width: int, picture: Path) -> tuple[str, list[str]]:
    """The page as the browser has it, and the lines of its console."""
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
    )
    command = [BROWSER, *options, f"--user-data-dir={file.parent / 'profile'}", f"--window-size={width},1600"]
    shown = subprocess.run(
        [*command, "--dump-dom", f"--screenshot={picture}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return shown.stdout, re.findall(r".*:CONSOLE.*", shown.stderr)


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """From disk: a clean console, nothing over the edges at two widths, and a picture that is not blank."""
    found = {"holding_rate": 8.0, "failing_rate": 9.0, "goodput_rps": 7.5, "goodput_ci": (7.0, 8.0)}
    trials = [
        {"rate": rate, "attainment": 1 - rate / 20, "stopped": rate > 8, "client_bottleneck": False}
        for rate in (2.0, 4.0, 8.0, 9.0)
    ]
    html = html_of(document(search={**found, "trials": trials}))
    file = tmp_path / "serve.html"
    file.write_text(html)
    _, said = browse(file, 1240, tmp_path / "wide.png")
    assert said == []
    measured = tmp_path / "measured.html"
    measured.write_text(html.replace("</body>", MEASURING))
    for width in (1240, 620):
        content, said = browse(measured, width, tmp_path / f"{width}.png")
        assert said == []
        over, cut, drawn = map(int, re.search(r"measured (\d+) (\d+) (\d+)", content).groups())
        assert (over, cut) == (0, 0), width
        assert drawn >= 12
    assert (tmp_path / "wide.png").stat().st_size > 50_000
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("</body>", "<script>missing()</script></body>"))
    assert "missing is not defined" in browse(broken, 1240, tmp_path / "broken.png")[1][0]
