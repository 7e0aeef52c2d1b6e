"""What a pack has become, and how that is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_ddp.amounts import counted
from alexnet_ddp.data.packs import pack_format as form
from alexnet_ddp.data.packs.facts import ENLARGED, told


@dataclass(frozen=True)
class Packed:
    """What a pack has become."""

    folder: Path
    stage: str
    samples: int
    classes: int
    shards: int
    source_bytes: int
    bytes: int
    found: dict[str, int]
    damaged: list[dict[str, Any]]
    threads: int
    made: int  # samples packed by this call; the others were there
    seconds: float  # that took
    notes: list[str]  # of the index, on the source

    def summary(self) -> str:
        """What `data pack` prints."""
        rate = self.made / max(1e-9, self.seconds)
        kept = self.samples + len(self.damaged) - self.made
        enlarged = self.found.get(ENLARGED, 0)
        lines = [
            ("packed", f"{counted(self.samples, 'image')} of {counted(self.classes, 'class', 'classes')} as "
                       f"{self.stage}"),
            ("before", f"{self.source_bytes:,} bytes"),
            ("after", f"{self.bytes:,} bytes in {counted(self.shards, 'shard')} "
                      f"({self.bytes / max(1, self.source_bytes):.2f} times the bytes before)"),
            ("found", told(self.found)),
            *([("enlarged", f"{enlarged:,} of {counted(self.samples, 'image')}: smaller than {self.stage}; they take "
                            "more bytes and show no more. A smaller stage enlarges fewer, maxN none")]
              if enlarged else []),
            *([("speed", f"{rate:,.0f} images a second on {self.threads} threads ({self.seconds:,.1f} s)")]
              if self.made else []),
            *([("kept", f"{counted(kept, 'image')} of the source {'was' if kept == 1 else 'were'} done before")]
              if kept else []),
            *([("skipped", f"{counted(len(self.damaged), 'damaged image')}, listed in {self.folder / form.PACK}")]
              if self.damaged else []),
            *(("note", f"of the source: {note}") for note in self.notes),
            ("lies in", str(self.folder.absolute())),
            ("use it", f"data.train={self.folder.absolute()} data.stored={self.stage}     (or data.val=...)"),
            ("", f"in a new run, or in one begun with data.stored={self.stage}; a run begun with another stage can't "
                 "switch"),
        ]
        return "\n".join(f"{name:<10}{value}" for name, value in lines)
