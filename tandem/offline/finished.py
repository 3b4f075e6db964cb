"""Which lines of the input have their record: one bit a line."""

from __future__ import annotations


class FinishedLines:
    """A set of line numbers that takes an eighth of a byte for each line up to the highest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0
        self.num_repeated = 0  # lines added more than once

    def __contains__(self, line: object) -> bool:
        assert isinstance(line, int)
        index = line >> 3
        return index < len(self._bits) and bool(self._bits[index] >> (line & 7) & 1)

    def add(self, line: int) -> None:
        if line in self:
            self.num_repeated += 1
            return
        index = line >> 3
        if index >= len(self._bits):
            self._bits.extend(bytes(index + 1 - len(self._bits)))
        self._bits[index] |= 1 << (line & 7)
        self.count += 1
