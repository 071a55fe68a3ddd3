"""Reading the images that a scan has found."""

import errno
import os

from data.images import RejectedError
from data.sources.table import SourceImage

# Archives are held open, for opening one per image is what a network file system is slow at.
_MOST_OPEN = 128
# What one file may have wrong with it while its neighbors are well.
_OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.EISDIR)


class ExtentReader:
    """Reads images from their extents: ``with ExtentReader() as reader: reader.read(image)``."""

    def __init__(self) -> None:
        self._archives: dict[str, int] = {}

    def __enter__(self) -> "ExtentReader":
        return self

    def __exit__(self, *raised: object) -> None:
        while self._archives:
            os.close(self._archives.popitem()[1])

    def read(self, image: SourceImage) -> bytes:
        """Return the encoded bytes.

        Raises RejectedError for an image that the file system does not give out, and ValueError when the bytes are no
        longer what the scan saw, or the file system as a whole gives out none.
        """
        try:
            if image.archived:
                return _read(self._descriptor(image.file), image)
            descriptor = _open(image.file)
            try:
                return _read(descriptor, image)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno == errno.EIO or (error.errno in _OF_ONE_FILE and not image.archived):
                raise RejectedError(f"cannot be read ({error.strerror})") from None
            raise ValueError(
                f"shard.source: cannot read {image.path} ({error.strerror}); mend that and run the same command again, "
                "or, if the source changed, shard it to a new output."
            ) from None

    def _descriptor(self, file: str) -> int:
        descriptor = self._archives.get(file)
        if descriptor is None:
            if len(self._archives) >= _MOST_OPEN:
                os.close(self._archives.pop(next(iter(self._archives))))
            descriptor = self._archives[file] = _open(file)
        return descriptor


def _open(file: str) -> int:
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC)


def _read(descriptor: int, image: SourceImage) -> bytes:
    content = os.pread(descriptor, image.size, image.offset)
    status = os.fstat(descriptor)
    # A file of its own may also have grown.
    changed = status.st_mtime_ns != image.mtime_ns or (not image.archived and status.st_size != image.size)
    if changed or len(content) != image.size:
        raise ValueError(f"shard.source: {image.file} changed while it was read; shard it again to a new output.")
    return content
