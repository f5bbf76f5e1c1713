"""The folder of an evaluation: every response is on the disk before the next is asked for, so that any end is a pause.

samples.jsonl: a response a line, appended when it is drawn and again when it is judged; the later line counts, and at the end
the file is put in order with one line each. times.jsonl: seconds of the work behind them. identity.json: what the numbers
depend on; another model, task or seed is not mixed in. prompts.jsonl: what was asked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError, ConfigError
from rlpipe.evaluation.samples import Sample
from rlpipe.monitor.files import append_line, jsonable, write_json, write_text
from rlpipe.trajectory import Prompt

SAMPLES, TIMES, IDENTITY, PROMPTS = "samples.jsonl", "times.jsonl", "identity.json", "prompts.jsonl"


class Store:
    """found: decoder key → prompt uid → sample number → response · spent: decoder key → what drawing and judging them took ·
    workers: decoder key → numbers of rollout workers that drew them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[str, dict[str, dict[int, Sample]]] = {}
        self.labels: dict[str, str] = {}
        self.spent: dict[str, dict[str, float]] = {}
        self.workers: dict[str, set[int]] = {}

    @classmethod
    def open(cls, folder: Path, resume: bool, identity: Mapping[str, Any], prompts: Sequence[Prompt]) -> Store:
        """A new folder, or one to go on in. Raises ConfigError for a folder with results that is not to be resumed, or with
        those of something else; CheckpointError if it cannot be read or written."""
        check_folder(folder, resume)
        store = cls(folder)
        if (folder / IDENTITY).is_file():
            store._check_same(json.loads(json.dumps(jsonable(dict(identity)))), prompts)
            store._read()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"out={folder} cannot be made: {error.strerror or error}; choose another folder") from error
        known = {} if not resume else {line["uid"]: line for line in _lines(folder / PROMPTS)}
        known |= {prompt.uid: _shown(prompt) for prompt in prompts}
        write_json(folder / IDENTITY, identity)
        write_text(folder / PROMPTS, "".join(_json(line) + "\n" for line in known.values()))
        store._compact(store.found)
        return store

    def has(self, key: str, uid: str, samples: int) -> bool:
        """Whether all responses to a prompt are drawn."""
        drawn = self.found.get(key, {}).get(uid, {})
        return all(number in drawn for number in range(samples))

    def lacking(self, key: str, group: Sequence[Sample]) -> list[Sample]:
        """Those of a group that are not there yet: a response that is, and perhaps is judged, stays when it is drawn again."""
        return [sample for sample in group if sample.sample not in self.found.get(key, {}).get(sample.uid, {})]

    def group(self, key: str, uid: str, samples: int) -> list[Sample]:
        return [self.found[key][uid][number] for number in range(samples)]

    def add(self, key: str, label: str, groups: Iterable[Sequence[Sample]]) -> None:
        """Keep responses, judged or not, and wait until they are on the disk."""
        lines = []
        self.labels[key] = label
        for group in groups:
            for sample in group:
                self._take(key, sample)
                lines.append(_line(key, label, sample))
        if lines:
            append_line(self.folder / SAMPLES, "\n".join(lines))

    def spend(self, key: str, workers: int, **numbers: float) -> None:
        """Add to what a decoder took, e.g. seconds=1.2, tokens=640, on so many rollout workers."""
        append_line(self.folder / TIMES, _json({"key": key, "workers": workers} | numbers))
        self._count(key, workers, numbers)

    def finish(self, order: Sequence[str], prompts: Sequence[Prompt]) -> None:
        """Put samples.jsonl in order: decoders as given, then others of earlier calls; prompts as given; samples by number."""
        place = {prompt.uid: index for index, prompt in enumerate(prompts)}
        keys = [*dict.fromkeys(order), *sorted(self.found.keys() - set(order))]
        ordered = {
            key: dict(sorted(self.found[key].items(), key=lambda item: (place.get(item[0], len(place)), item[0])))
            for key in keys
            if key in self.found
        }
        self._compact(ordered)

    def _compact(self, found: Mapping[str, Mapping[str, Mapping[int, Sample]]]) -> None:
        lines = [
            _line(key, self.labels[key], drawn[number]) + "\n"
            for key, groups in found.items()
            for drawn in groups.values()
            for number in sorted(drawn)
        ]
        write_text(self.folder / SAMPLES, "".join(lines))

    def _read(self) -> None:
        for line in _lines(self.folder / SAMPLES):
            key = line.pop("key")
            self.labels[key] = line.pop("decoder")
            self._take(key, Sample(**line))
        for line in _lines(self.folder / TIMES):
            self._count(line.pop("key"), line.pop("workers"), line)
        write_text(self.folder / TIMES, "".join(_json(line) + "\n" for line in _lines(self.folder / TIMES)))

    def _take(self, key: str, sample: Sample) -> None:
        self.found.setdefault(key, {}).setdefault(sample.uid, {})[sample.sample] = sample

    def _count(self, key: str, workers: int, numbers: Mapping[str, float]) -> None:
        self.workers.setdefault(key, set()).add(workers)
        total = self.spent.setdefault(key, {})
        for name, value in numbers.items():
            total[name] = total.get(name, 0) + value

    def _check_same(self, identity: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        try:
            before = json.loads((self.folder / IDENTITY).read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / IDENTITY} cannot be read: {error}; choose another out=") from error
        for key in [*before, *(key for key in identity if key not in before)]:
            if before.get(key) != identity.get(key):
                raise ConfigError(
                    f"out={self.folder} was made with another {key} ({before.get(key)}, now {identity.get(key)}), and their "
                    "numbers do not mix; choose another folder"
                )
        asked = {line["uid"]: line for line in _lines(self.folder / PROMPTS)}
        for prompt in prompts:
            if asked.get(prompt.uid, _shown(prompt)) != _shown(prompt):
                raise ConfigError(f"out={self.folder}: prompt {prompt.uid} was another one then; choose another folder")


def check_folder(folder: Path, resume: bool) -> None:
    """ConfigError for a folder that is not to be written into."""
    if (folder / IDENTITY).is_file():
        if not resume:
            raise ConfigError(f"out={folder} holds an evaluation; resume=auto goes on with it, or choose another folder")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out={folder} is there already and holds something else; choose a folder of its own")


def _shown(prompt: Prompt) -> dict[str, Any]:
    return json.loads(_json({"uid": prompt.uid, "text": prompt.text, "answer": prompt.answer}))


def _line(key: str, label: str, sample: Sample) -> str:
    return _json({"decoder": label, "key": key} | dataclasses.asdict(sample))


def _json(value: Any) -> str:
    """One line; escaped, so that no text of a model can break it or the file's encoding."""
    return json.dumps(jsonable(value), allow_nan=False)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file, [] without it. A last line that was cut off in mid-writing is left out. Raises CheckpointError for one
    that is damaged further up."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no line end after it: the process died while it was written
                break
            raise CheckpointError(f"{path}:{number}: not JSON ({error}); remove the line and run the command again") from error
    return found
