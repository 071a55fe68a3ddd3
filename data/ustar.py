"""Read a tar of plain files from front to back, believing nothing that it says.

`tarfile` follows what headers ask for: links, long names, sizes of gigabytes. Shards hold none of that, so here a
header that is not a plain file's, or asks for more than there is, ends the reading with the place and the reason.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20


class TarDamageError(Exception):
    """The bytes are not those of a plain tar; the message says where and why."""


class Member(NamedTuple):
    """A file in a tar; ``offset`` is that of its content."""

    name: str
    offset: int
    content: bytes


class HashedTar:
    """Members and SHA-256 of a tar of ``size`` bytes, from one pass over it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._digest, self._position = hashlib.sha256(), 0

    def members(self) -> Iterator[Member]:
        """Yield the members up to the end of the archive. Raises TarDamageError."""
        while any(header := self._read(BLOCK)):
            name, size = self._interpret(header)
            offset = self._position
            padded = self._read(size + -size % BLOCK)
            if any(padded[size:]):
                raise TarDamageError(f"byte {offset + size}: {name!r} is followed by other bytes than zeros")
            yield Member(name, offset, padded[:size])
        if any(map(any, self._rest())):
            raise TarDamageError("other bytes than zeros follow the end of the archive")

    def sha256(self) -> str:
        """Return the hexadecimal checksum of the whole file, read to its end."""
        for _ in self._rest():
            pass
        return self._digest.hexdigest()

    def _interpret(self, header: bytes) -> tuple[str, int]:
        """Return a member's name and size."""
        at = self._position - BLOCK
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise TarDamageError(f"byte {at}: {error}") from None
        if info.type != tarfile.REGTYPE or info.linkname:
            raise TarDamageError(f"byte {at}: {info.name!r} is not a plain file")
        if not 0 <= info.size <= self._size - self._position:
            raise TarDamageError(f"byte {at}: {info.name!r} announces {info.size} bytes, more than there are")
        return info.name, info.size

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._digest.update(content)
        self._position += len(content)
        if len(content) < size:
            raise TarDamageError(f"it ends at byte {self._position}, within a member or before the archive's end")
        return content

    def _rest(self) -> Iterator[bytes]:
        while chunk := self._file.read(_CHUNK):
            self._digest.update(chunk)
            self._position += len(chunk)
            yield chunk
