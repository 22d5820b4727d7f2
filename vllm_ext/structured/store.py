# SPDX-License-Identifier: Apache-2.0
"""Specifications that an engine compiles when it starts, and compiled grammars kept on disk where loading is faster.

`prewarm` is a file of the user's: a JSON list, or one object a line, of {"json": schema}, {"regex": text},
{"choice": [...]}, {"grammar": text} or {"structural_tag": tag}, as a request has them under `structured_outputs`.

`store_dir` is ours (mode 0700): SPEC.json for each specification that was compiled, by digest, at most MOST_SPECS, so
that the next start compiles them before a request asks; beside it COMPILED.json where xgrammar's own form of the
grammar is small. Its JSON is about fifteen times what the grammar takes in memory and loads at 17 ms per megabyte
(measured), so large grammars compile faster than they load. Nothing in it is executed; what does not fit is dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xgrammar as xgr

from vllm_ext.structured.options import Options
from vllm_ext.structured.routing import Kind, Plan

logger = logging.getLogger("vllm.vllm_ext")

MOST_SPECS = 256
#: Largest compiled grammar that is written, and how many loaded ones stay in memory.
MOST_JSON_BYTES = 8 << 20
MOST_LOADED = 64
#: A compiled grammar is kept where its JSON loads in less than half the time that it took to compile.
LOAD_SECONDS_PER_BYTE = 17e-9
JSON_BYTES_PER_BYTE = 15
_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "structural_tag")


class SpecStore:
    """What one engine compiles at its start, and what it leaves for the next."""

    def __init__(self, options: Options, tokenizer_info: Any) -> None:
        """tokenizer_info: xgrammar's TokenizerInfo, which compiled grammars belong to."""
        self._prewarm, self._folder, self._info = options.prewarm, options.store_dir, tokenizer_info
        self._options = f"{options.whitespace}"
        self._mark = ""
        self._loaded: OrderedDict[Path, Any] = OrderedDict()
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            vocabulary = tokenizer_info.serialize_json() + xgr.get_serialization_version()
            self._mark = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]

    def list_specs(self) -> Iterator[tuple[Kind, str]]:
        """(kind, text) of what to compile at the start: the user's file, then the folder, the last used first."""
        if self._prewarm is not None:
            yield from read_specs(self._prewarm)
        if self._folder is not None:
            for path in self._list_kept("spec"):
                yield from read_specs(path)

    def load(self, plan: Plan) -> Any:
        """The compiled grammar of a plan, or None where none is kept, or it fits no more."""
        path = self._place_compiled(plan)
        if path is None:
            return None
        if path in self._loaded:
            return self._loaded[path]
        if not path.is_file():
            return None
        try:
            self._loaded[path] = xgr.CompiledGrammar.deserialize_json(path.read_text(encoding="utf-8"), self._info)
            while len(self._loaded) > MOST_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[path]
        except (RuntimeError, ValueError, OSError, UnicodeDecodeError) as error:
            logger.warning("vllm-ext: a stored grammar is compiled anew, %s: %s", path.name, error)
            path.unlink(missing_ok=True)
            return None

    def save(self, kind: str, text: str, plan: Plan, compiled: Any, seconds: float) -> None:
        """Keep the specification, and its compiled form (None for llguidance) where loading beats `seconds`.

        kind, text: as the request had them, by which the next one will be known again; a plan's text is another one.
        """
        if kind == "json_object":
            kind, text = plan.kind, plan.text
        path = self._place_spec(kind, text)
        if path is None:
            return
        if not path.exists():
            _write(path, json.dumps({kind: text}))
            self._list_kept("spec")
        if compiled is None or (place := self._place_compiled(plan)) is None or place.exists():
            return
        size = compiled.memory_size_bytes * JSON_BYTES_PER_BYTE
        if size < MOST_JSON_BYTES and size * LOAD_SECONDS_PER_BYTE * 2 < seconds:
            _write(place, compiled.serialize_json())
            self._list_kept("compiled")

    def _list_kept(self, what: str) -> list[Path]:
        """Files of one sort, the last written first; those beyond MOST_SPECS are deleted."""
        assert self._folder is not None
        kept = sorted(self._folder.glob(f"*.{what}.json"), key=_read_time, reverse=True)
        for path in kept[MOST_SPECS:]:
            path.unlink(missing_ok=True)
        return kept[:MOST_SPECS]

    def _place_spec(self, kind: str, text: str) -> Path | None:
        return self._place(f"{kind}\0{text}", "spec")

    def _place_compiled(self, plan: Plan) -> Path | None:
        if plan.engine != "xgrammar":
            return None
        return self._place(f"{plan.kind}\0{plan.text}\0{self._mark}", "compiled")

    def _place(self, text: str, what: str) -> Path | None:
        if self._folder is None:
            return None
        name = hashlib.sha256(f"{self._options}\0{text}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.{what}.json"


def read_specs(path: Path) -> Iterator[tuple[Kind, str]]:
    """(kind, text) of a file of specifications; what is none is logged and left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("vllm-ext: %s is not read: %s", path, error)
        return
    lines = [text] if text.lstrip().startswith("[") else [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            logger.warning("vllm-ext: line %d of %s is not JSON: %s", number, path, error)
            continue
        for entry in value if isinstance(value, list) else [value]:
            kinds = [kind for kind in _KINDS if isinstance(entry, dict) and kind in entry]
            if len(kinds) != 1:
                logger.warning("vllm-ext: line %d of %s has none of %s", number, path, ", ".join(_KINDS))
                continue
            given = entry[kinds[0]]
            yield kinds[0], given if isinstance(given, str) else json.dumps(given)


def _read_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another engine of the same folder deleted it
        return 0.0


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all; a full disk is logged."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning("vllm-ext: a specification is not stored: %s", error)
    finally:
        partial.unlink(missing_ok=True)
