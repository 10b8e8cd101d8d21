"""Deletions that the server still owes to people."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_logger = logging.getLogger(__name__)


class Owed:
    "Messages that were taken back in QQ and that the server has not deleted yet; in a file, so that a restart does not forget them."

    def __init__(
        self,
        file: Path | None = None,  # None: in memory only
    ):
        self._file = file
        self._all: dict[tuple[str, str], None] = {}  # (scope, message), oldest first
        for line in file.read_text("utf-8").splitlines() if file and file.exists() else []:
            try:
                scope, message_id = json.loads(line)
                self._all[scope, message_id] = None
            except (ValueError, TypeError):
                _logger.error("%s: a line is not to be read and is left out: %.80r", file, line)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._all)

    def add(
        self,
        scope: str,
        message_id: str,
    ) -> None:
        "Note a deletion before it is tried."
        if (scope, message_id) not in self._all:
            self._all[scope, message_id] = None
            self._save()

    def discard(
        self,
        scope: str,
        message_id: str,
    ) -> None:
        "It is done, or can never be."
        if (scope, message_id) in self._all:
            del self._all[scope, message_id]
            self._save()

    def _save(self) -> None:
        if not self._file:
            return
        try:
            fresh = self._file.with_suffix(".new")
            with fresh.open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(one) + "\n" for one in self._all)
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(self._file)
        except OSError as error:  # the deletion itself must go on
            _logger.error("deletions that wait would be lost with this process: %s", error)
