"""Lines whose prompts begin alike, one behind the other: then their common beginning is in the cache.

Within a window that moves over the input, so that memory does not grow with it. What records stand for, and
the order in which `tandem queue results` shows them, is not touched: that goes by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tandem.offline.lines import BadLine, Entry

MAX_LINES = 512
MAX_BYTES = 8 << 20  # of prompts; one more line may go beyond
KEY_CHARS = 4096  # beginnings that are longer count as the same: their lines stay in the input's order

Numbered = tuple[int, Entry | BadLine]


def grouped(
    lines: Iterable[Numbered], max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES
) -> Iterator[Numbered]:
    """Every line once, sorted by prompt within each window. Bad lines come first of theirs."""
    window: list[tuple[str, Numbered]] = []
    num_bytes = 0
    for line in lines:
        prompt = _prompt(line[1])
        num_bytes += len(prompt)
        window.append((prompt[:KEY_CHARS], line))
        if len(window) >= max_lines or num_bytes >= max_bytes:
            yield from _in_order(window)
            window, num_bytes = [], 0
    yield from _in_order(window)


def _in_order(window: list[tuple[str, Numbered]]) -> Iterator[Numbered]:
    window.sort(key=lambda keyed: keyed[0])
    return (line for _, line in window)


def _prompt(found: Entry | BadLine) -> str:
    """A text that begins as the prompt does: the text itself, token ids or messages as JSON."""
    if isinstance(found, BadLine):
        return ""
    prompt = found.body.get("prompt", found.body.get("messages"))
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
