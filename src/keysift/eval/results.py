"""A folder of results that survives being killed: one line a sample, on disk before the next sample starts."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

Record = dict[str, Any]
SETTINGS = "settings.json"
GROWS = ("tasks", "lengths", "runs", "samples", "data")  # what --extend may add to


class Key(NamedTuple):
    """Which sample of which run a line belongs to; ``length`` is None where a task has none."""

    run: str
    task: str
    length: int | None
    index: int  # type: ignore[assignment]  # the field's own word, though tuple has a method of that name


def key_of(record: Record) -> Key:
    return Key(*(record[field] for field in Key._fields))


class Folder:
    """Results under ``path``: ``settings.json``, and a file of lines for each run (and shard).

    Raises:
        ValueError: a folder that cannot be written, other settings than those it was begun with, a broken line, or
            another process at work on the same file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, extend: bool = False, shard: str = "") -> None:
        self.path, self._shard = path, shard
        self._open: dict[str, TextIO] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.settings = self._agree(json.loads(json.dumps(settings)), extend)
        except OSError as error:
            raise ValueError(f"cannot write to --out {path}: {error.strerror}") from error
        self.done = {key_of(record) for record in read_records(self.path)}

    def _agree(self, settings: dict[str, Any], extend: bool) -> dict[str, Any]:
        """Settle the folder's settings: begin, continue, or grow."""
        file = self.path / SETTINGS
        lines = any(self.path.glob("*.jsonl"))  # asked first: another shard may be beginning the folder
        if lines and not file.exists():
            raise ValueError(f"{self.path} holds .jsonl files but no {SETTINGS}: choose another --out folder")
        if file.exists():
            before = read_settings(self.path)
            if extend:
                settings = {**settings, **{k: _union(before.get(k), settings[k]) for k in GROWS}}
            if found := differences(before, settings):
                changed = [d for d in found if not (extend and _grows(d, before))]
                if changed:
                    may_grow = not extend and all(_grows(d, before) for d in found)
                    remedy = ", or add --extend to keep what is there and add to it" if may_grow else ""
                    raise ValueError(
                        f"{self.path} was begun with other settings: {'; '.join(changed)}: choose another --out{remedy}"
                    )
        replace_file(file, json.dumps(settings, indent=1) + "\n")
        return settings

    def append(self, records: Iterable[Record]) -> None:
        """Write lines and wait until they are on disk; a sample that is there already is not written again."""
        for record in records:
            if (key := key_of(record)) in self.done:
                continue
            out = self._file(key.run)
            try:
                out.write(json.dumps(record) + "\n")
                out.flush()
                os.fsync(out.fileno())
            except OSError as error:
                raise ValueError(
                    f"cannot write to {self.path}: {error.strerror}; what was written before is safe"
                ) from error
            self.done.add(key)

    def _file(self, run: str) -> TextIO:
        name = file_name(run, self._shard)
        if name not in self._open:
            self._open[name] = _locked(self.path / name)
        return self._open[name]

    def forget_failed(self) -> int:
        """Drop the samples that failed, so that they are done again; how many. A shard drops its own only."""
        failed = 0
        for file in sorted(self.path.glob(f"*.{self._shard}.jsonl" if self._shard else "*.jsonl")):
            with _locked(file) as held:  # nobody else may be writing what is replaced
                held.seek(0)
                lines = list(held)
                kept = [line for line in lines if not json.loads(line)["error"]]
                if len(kept) < len(lines):
                    replace_file(file, "".join(kept))
                failed += len(lines) - len(kept)
        self.done = {key_of(record) for record in read_records(self.path)}
        return failed

    def claim(self, runs: Iterable[str]) -> None:
        """Open and lock the files of these runs before the first sample, so that no work is lost to a late refusal."""
        try:
            for run in runs:
                self._file(run)
        except OSError as error:
            raise ValueError(f"cannot write to --out {self.path}: {error.strerror}") from error

    def close(self) -> None:
        for out in self._open.values():
            with contextlib.suppress(OSError):  # a full disk was told of when the line was written
                out.close()
        self._open.clear()


def file_name(run: str, shard: str = "") -> str:
    """A run's file: its name in characters that every file system takes."""
    slug = re.sub(r"[^A-Za-z0-9.=_]+", "-", run).strip("-")[:120]
    return f"{slug}{f'.{shard}' if shard else ''}.jsonl"


def read_settings(path: Path) -> dict[str, Any]:
    file = path / SETTINGS
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(held, dict) or not {*GROWS, "model"} <= {*held}:
            raise ValueError("it names no tasks, runs and so on")
        return held
    except OSError as error:
        raise ValueError(f"{path} holds no results: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(
            f"{file} is not what keysift writes: {error}; restore it, or choose another --out folder"
        ) from error


def read_records(path: Path) -> list[Record]:
    """All finished samples in the order of the files; a last line without its end is a killed run's and is left out."""
    found: dict[Key, Record] = {}
    for file in sorted(path.glob("*.jsonl")):
        text = file.read_bytes()
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
            try:
                record = json.loads(line)
                found.setdefault(key_of(record), record)["error"]  # every line has it
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} line {number} is damaged ({error}): delete that line, and its sample is done again"
                ) from error
    return list(found.values())


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """What changed from one nested dict of settings to another, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        out = []
        for key in sorted({*before, *after}):
            inner = f"{name}.{key}" if name else key
            out += differences(before.get(key), after.get(key), inner)
        return out
    if before == after:
        return []
    if isinstance(before, list) and isinstance(after, list) and len(before) + len(after) > 6:
        gone, new = [x for x in before if x not in after], [x for x in after if x not in before]
        parts = [f"{word} {', '.join(map(str, items))}" for word, items in (("without", gone), ("with", new)) if items]
        return [f"{name}: now {' and '.join(parts) or 'in another order'}"]
    return [f"{name}: {_short(before)} there, {_short(after)} here"]


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _grows(difference: str, before: dict[str, Any]) -> bool:
    """Whether a difference only adds: to what may grow, and to ``data`` what was not there."""
    name, _, key = difference.partition(":")[0].partition(".")
    return name in GROWS and (name != "data" or key not in before["data"])


def _union(before: Any, after: Any) -> Any:
    if isinstance(before, list):
        return before + [x for x in after if x not in before]
    if isinstance(before, dict):
        return {**before, **after}
    return max(before or 0, after)


def replace_file(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def _locked(path: Path) -> TextIO:
    """A file to add lines to, closed to other processes, less a last line that a killed one left without its end."""
    out: TextIO = path.open("a+", encoding="utf-8")
    _lock(out, path)
    out.buffer.seek(0)
    out.truncate(out.buffer.read().rfind(b"\n") + 1)
    return out


def _lock(out: TextIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {path}: wait for it, or choose another --out folder") from error
