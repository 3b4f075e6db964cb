"""What an experiment writes."""

from __future__ import annotations

import csv
import json

from bench.eval.report import Report


def written(module, settings, found, folder) -> set[str]:
    """Names of the files, whose contents agree with one another."""
    report = Report(module, settings, found, "tandem eval any")
    files = report.save(folder / "new", with_plots=True)
    document = json.loads((folder / "new" / f"{module.NAME}.json").read_text())
    assert document["settings"]["target"] == str(settings.target)
    assert len(document["published"]) == len(found.published)
    with (folder / "new" / f"{module.NAME}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"]) > 0
    page = (folder / "new" / f"{module.NAME}.md").read_text()
    assert all(sheet.markdown() in page for sheet in found.sheets)
    assert all(f"({file.name})" in page for file in files if file.suffix == ".png")
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    return {file.name for file in files}
