"""Frames in this process's memory. A frame is kept as it came; nothing is copied."""

from __future__ import annotations

from kvstore.key import ObjectKey


class MemoryBackend:
    """A list of frames per key."""

    def __init__(self) -> None:
        self._frames: dict[ObjectKey, list[bytes]] = {}

    def put(self, key: ObjectKey, index: int, frame: bytes) -> None:
        frames = self._frames.setdefault(key, [])
        assert index == len(frames), (index, len(frames))
        frames.append(frame)

    def get(self, key: ObjectKey, index: int) -> bytes:
        return self._frames[key][index]

    def delete(self, key: ObjectKey) -> None:
        self._frames.pop(key, None)

    def close(self) -> None:
        self._frames.clear()


def open_backend(url: str) -> MemoryBackend:
    return MemoryBackend()
