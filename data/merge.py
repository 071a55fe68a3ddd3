"""Make one set of what was packed, by one process or by several: the rejected images, the manifest, a summary."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.manifest import SCHEMA_VERSION, Manifest
from data.pack import PackedShard
from data.publishing import write_atomically
from data.rejected import REJECTED_NAME, Rejected, count_reasons, encode_rejected
from data.repair import damaged_files
from data.sources import Source, describe


@dataclass(frozen=True)
class Merge:
    """All shards of a source in an output, in order."""

    output: Path
    source: Source
    packed: list[PackedShard]

    @cached_property
    def rejected(self) -> list[Rejected]:
        """Return what the scan rejected, and what did not decode."""
        return [*self.source.rejected, *(pair for done in self.packed for pair in done.rejected)]

    @cached_property
    def _listed(self) -> bytes:
        return encode_rejected(self.rejected) if self.rejected else b""

    def refuse_rejected(self, most: int) -> None:
        """Write the list of rejected images; raise ValueError if there are too many."""
        path, count = self.output / REJECTED_NAME, len(self.rejected)
        if self._listed:
            write_atomically(path, self._listed)
        else:
            path.unlink(missing_ok=True)  # of an attempt before images could be read
        if count > most:
            raise ValueError(
                f"shard.max_rejected: {count} images are rejected, {most} may be ({self._reasons()}); see {path}, "
                f"then run again with max_rejected={count}, or mend them and shard to a new output."
            )

    def publish(self, source: str, plan: dict[str, Any]) -> Manifest:
        """Write the manifest. Raises ValueError when there is nothing to list, or something listed is not there."""
        shards = tuple(done.shard for done in self.packed if done.shard.samples)
        if not shards:
            raise ValueError(f"shard.source: not one image of {source} decodes.")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            classes=self.source.classes,
            samples=sum(shard.samples for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            max_height=max(done.max_height for done in self.packed),
            max_width=max(done.max_width for done in self.packed),
            treatments=dict(sorted(sum((Counter(done.treatments) for done in self.packed), Counter()).items())),
            rejected=len(self.rejected),
            rejected_sha256=hashlib.sha256(self._listed).hexdigest() if self._listed else "",
            shards=shards,
            source=str(Path(source).resolve()),
            options=plan,
        )
        if damaged := damaged_files(self.output, manifest):
            raise incomplete(self.output, ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else ""))
        manifest.write(self.output)
        return manifest

    def table(self, manifest: Manifest, images: int, seconds: float) -> str:
        """Return what to say of a finished set, of which this process has looked at so many images."""
        rows = {
            "source": manifest.source,
            "classes": len(manifest.classes) or "none (unlabelled)",
            "samples": manifest.samples,
            **{f"  {treatment}": count for treatment, count in manifest.treatments.items()},
            "rejected": f"{len(self.rejected)} (see {REJECTED_NAME})" if self.rejected else 0,
            **{f"  {reason}": count for reason, count in count_reasons(self.rejected)},
            "ignored": describe(self.source.ignored) if self.source.ignored else 0,
            "shards": len(manifest.shards),
            "megabytes": f"{manifest.bytes / 1e6:.1f}",
            "seconds": f"{seconds:.1f}",
            "images/s": f"{images / max(seconds, 1e-9):.0f}",
        }
        width = max(map(len, rows)) + 2
        table = "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())
        return table.encode("utf-8", "backslashreplace").decode("utf-8")

    def _reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in count_reasons(self.rejected)[:3])


def incomplete(output: Path, lost: str) -> ValueError:
    """Return the error of shards that were written and are there no more."""
    return ValueError(
        f"shard.output: {output} has lost {lost} since they were written; run the same command of all parts again."
    )
