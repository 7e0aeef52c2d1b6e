"""Is all of it whole? A pack's checksums and members, and on request every image of any source decoded in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.amounts import counted
from alexnet_ddp.data.decoding.decode import DamagedImage, open_upright
from alexnet_ddp.data.decoding.stages import CHANNELS
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.index.table import IN_A_FILE, suffix_of
from alexnet_ddp.data.packs import pack_format as form
from alexnet_ddp.data.packs.facts import look, told
from alexnet_ddp.data.packs.parallel import cores_here, in_order
from alexnet_ddp.errors import UserError
from alexnet_ddp.progress import Progress

CHUNK = 16  # images a task
LISTED = 100  # problems and notes that are named; --json has all


@dataclass(frozen=True)
class Finding:
    """Something about one sample, or (sample None) about a file of a pack."""

    where: str  # file, and in a tar the member and its offset in bytes
    why: str
    sample: int | None = None


@dataclass
class Report:
    """What was looked at, what is wrong and what is merely worth knowing."""

    source: str
    stage: str = "original"  # what is stored there
    samples: int = 0
    shards: int = 0  # whose sha256 was compared
    decoded: int = 0  # images
    found: dict[str, int] = field(default_factory=dict)  # kinds of images, of those decoded
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not self.problems

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {"well": self.is_well, **asdict(self)}

    def summary(self) -> str:
        """What `data verify` prints."""
        lines = [f"{'source':<10}{self.source}: {counted(self.samples, 'sample')}"]
        if self.shards:
            lines.append(f"{'sums':<10}sha256 of {counted(self.shards, 'shard')} compared")
        lines.append(f"{'decoded':<10}{self._decoded}")
        for name, findings in (("note", self.notes), ("damaged", self.problems)):
            for one in findings[:LISTED]:
                sample = "" if one.sample is None else f" (sample {one.sample})"
                lines.append(f"{name:<10}{one.where}{sample}: {one.why}")
            if len(findings) > LISTED:
                lines.append(f"{name:<10}and {len(findings) - LISTED:,} more; --json has all")
        unseen = "" if self.decoded or self.is_raw else ", as far as one can tell without decoding"
        lines.append(f"{'verdict':<10}" + (f"all is well{unseen}" if self.is_well else
                                           f"{len(self.problems):,} damaged"))
        return "\n".join(lines)

    @property
    def is_raw(self) -> bool:
        return self.stage.startswith("raw")

    @property
    def _decoded(self) -> str:
        """What is known of the images' contents, and how to know more."""
        if self.is_raw:
            return f"nothing: {self.stage} is bare pixels, so that there is nothing to decode, and the sums tell all"
        if self.decoded:
            return f"{counted(self.decoded, 'image')} in full: {told(self.found)} among them"
        known = "the sums tell whether the pack's bytes are those that were written" if self.shards else \
            "this is no pack, so that without --decode only empty files are found"
        return f"nothing: {known}; --decode reads every image in full and names those that are damaged"


def verify(locator: str, *, decode: bool = False, threads: int | None = None, cache_dir: Path | None = None) -> Report:
    """Checks a pack's files against its pack.json; with `decode` every image of any source.

    Raises UserError where a source that is no pack can't be opened at all.
    """
    threads, report = threads or cores_here(), Report(locator)
    folder = Path(locator).expanduser()
    content = form.read_pack(folder) if folder.is_dir() else None
    if content is not None:
        _check_shards(folder, content, report, threads=threads)
        report.samples, report.stage = content["samples"], content["stage"]
    try:
        index = open_index(locator, cache_dir=cache_dir)
    except UserError as error:
        if content is None:
            raise
        report.problems.append(Finding(str(folder), str(error)))
        return report
    with index:
        report.samples, report.stage = len(index), index.stage
        if content is not None:
            _check_index(folder, content, index, report)
        elif not decode:
            _check_empty(index, report, threads=threads)
        if decode and not report.is_raw:  # bare pixels need no decoding
            _decode(index, report, threads=threads)
    return report


def _check_shards(folder: Path, content: dict[str, Any], report: Report, *, threads: int) -> None:
    """Sizes and sha256 of the shards, and no shards but those."""
    known = {shard["name"]: shard for shard in content["shards"]}

    def problem(name: str) -> str | None:
        try:
            size = (folder / name).stat().st_size
            if size != known[name]["bytes"]:
                return f"has {size:,} bytes, must have {known[name]['bytes']:,}"
            if form.sha256_of(folder / name) != known[name]["sha256"]:
                return f"its sha256 isn't the one in {form.PACK}: its bytes were changed or are failing"
            return None
        except OSError as error:
            return f"can't be read: {error.strerror or error}"

    with Progress(len(known), what="checking sums", unit="shards") as progress:
        for name, why in zip(known, in_order(problem, known, threads=threads), strict=True):
            report.shards += 1
            progress.update()
            if why:
                report.problems.append(Finding(str(folder / name), why + ". Pack again, or copy that shard again"))
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            report.problems.append(Finding(str(path), f"isn't in {form.PACK}. Move it out of the folder"))


def _check_index(folder: Path, content: dict[str, Any], index: Index, report: Report) -> None:
    """The members: as many in each shard, and all together the samples that pack.json names."""
    counts = np.bincount(index.table.containers, minlength=len(index.source.paths))
    found = {Path(path).name: int(count) for path, count in zip(index.source.paths, counts, strict=True)}
    for shard in content["shards"]:
        name, here = shard["name"], found.get(shard["name"], 0)
        if here != shard["samples"]:
            report.problems.append(Finding(str(folder / name), f"holds {counted(here, 'sample')}, must hold "
                                                               f"{shard['samples']:,}"))
    for name, now in (("stage", index.stage), ("samples", len(index)), ("classes", len(index.classes)),
                      ("identity", index.identity)):
        if content[name] != now:
            report.problems.append(Finding(str(folder / form.PACK), f"says {name} {content[name]}, the shards hold "
                                                                    f"{now}"))


def _check_empty(index: Index, report: Report, *, threads: int) -> None:
    """Files of no bytes, without reading any."""
    table, root = index.table, index.source.paths[0]
    report.problems += [Finding(index.where(row), "no bytes", row) for row in index.empty.tolist()]
    rows = np.flatnonzero(table.offsets == IN_A_FILE)
    cuts = [rows[first:first + 256].tolist() for first in range(0, len(rows), 256)]
    for sizes, cut in zip(in_order(lambda cut: [form.source_size(table, row, root) for row in cut], cuts,
                                   threads=threads), cuts, strict=True):
        for row, size in zip(cut, sizes, strict=True):
            if size <= 0:
                report.problems.append(Finding(index.where(row), "no bytes" if size == 0 else "is gone", row))


def _decode(index: Index, report: Report, *, threads: int) -> None:
    """Every image, in full."""
    found: Counter[str] = Counter()

    def judge(ids: range) -> list[tuple[tuple[str, ...], str | None, str | None]]:
        return [_judge(index, row) for row in ids]

    def cuts() -> Iterator[range]:
        for first in range(0, len(index), CHUNK):
            yield range(first, min(first + CHUNK, len(index)))

    with Progress(len(index), what="decoding") as progress:
        for ids, verdicts in zip(cuts(), in_order(judge, cuts(), threads=threads), strict=True):
            for row, (kinds, problem, note) in zip(ids, verdicts, strict=True):
                found.update(kinds)
                if problem:
                    report.problems.append(Finding(index.where(row), problem, row))
                if note:
                    report.notes.append(Finding(index.where(row), note, row))
            report.decoded += len(ids)
            progress.update(len(ids))
    report.found = dict(sorted(found.items()))


def _judge(index: Index, row: int) -> tuple[tuple[str, ...], str | None, str | None]:
    """(kinds, what is wrong, what is worth knowing) of one sample."""
    try:
        data = index.read(row)
        facts = look(data)
        open_upright(data, channels=CHANNELS)
    except DamagedImage as error:
        return (), str(error), None
    except (OSError, UserError) as error:
        return (), f"can't be read: {getattr(error, 'strerror', None) or error}", None
    name = "PNG" if suffix_of(index.table.path(row)).lower() == b".png" else "JPEG"
    if name == facts.format:
        return facts.kinds, None, None
    return facts.kinds, None, f"is a {facts.format} by its bytes, a {name} by its name (no harm: it is read)"
