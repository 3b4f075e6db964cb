"""Checks what the store sends, message by message, against the handle that was asked for.

Whatever does not fit, in whichever way, is KV_CORRUPT: the reader must not decode from it.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.assembly import Assembly
from kvstore.key import Buffer, KvHandle, require
from kvstore.records import ChunkHeader, ObjectHeader, Record, Seal
from kvstore.wire import decode, expect
from tandem.errors import DataLoss, InvalidRequest


class ReadCheck:
    """One reading of one object. It is complete when the seal has been checked."""

    def __init__(
        self,
        handle: KvHandle,
        tenant: str | None = None,
        on_header: Callable[[ObjectHeader], None] | None = None,
        first_block: int = 0,
    ) -> None:
        self.is_complete = False
        self._handle = handle
        self._tenant = tenant
        self._on_header = on_header
        self._first_block = first_block  # those before it are not asked for
        self._assembly: Assembly | None = None

    def accept(self, message: Buffer) -> tuple[ChunkHeader, memoryview] | None:
        """The chunk in this message, if it holds one."""
        try:
            return self._accept(*decode(message))
        except InvalidRequest as error:
            raise DataLoss from error

    def finish(self) -> None:
        """No more messages come."""
        if not self.is_complete:
            raise DataLoss

    def _accept(self, record: Record, payload: memoryview) -> tuple[ChunkHeader, memoryview] | None:
        require(not self.is_complete)
        if isinstance(record, ObjectHeader):
            require(self._assembly is None and self._is_expected(record))
            self._assembly = Assembly(record, self._first_block)
            if self._on_header is not None:
                self._on_header(record)
            return None
        assembly = self._assembly
        if assembly is None:
            raise DataLoss
        if isinstance(record, Seal):
            assembly.check(record)
            self.is_complete = True
            return None
        chunk = expect(ChunkHeader, record)
        assembly.add(chunk, payload)
        return chunk, payload

    def _is_expected(self, header: ObjectHeader) -> bool:
        is_ours = self._tenant is None or self._tenant == header.tenant
        return is_ours and header.handle(self._handle.store_epoch) == self._handle
