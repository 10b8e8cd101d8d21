"""Things that must be done one after another."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

_logger = logging.getLogger(__name__)


class Lane:
    "Jobs in order, one at a time; different lanes do not wait for each other."

    def __init__(
        self,
        name: str,  # for the log
    ):
        self._name = name
        self._jobs: deque[Callable[[], Awaitable[None]]] = deque()
        self._task: asyncio.Task | None = None

    def put(
        self,
        job: Callable[[], Awaitable[None]],
        first: bool = False,  # before those that wait
    ) -> None:
        "Let a job be done; an error in it is logged and ends that job only."
        (self._jobs.appendleft if first else self._jobs.append)(job)
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        "End the running job, forget the others."
        self._jobs.clear()
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def idle(self) -> None:
        "Return when nothing is left to do."
        while self._task:
            await asyncio.wait({self._task})

    async def _work(self) -> None:
        try:
            while self._jobs:
                job = self._jobs.popleft()
                try:
                    await job()
                except Exception:
                    _logger.exception("%s: a job has failed", self._name)
        finally:
            self._task = None


def delays(
    first: float = 0.5,  # seconds
    most: float = 5.0,
) -> Iterator[float]:
    "How long to wait before the next try: twice as long each time up to a limit, never quite the same for two that wait."
    delay = first
    while True:
        yield delay * random.uniform(0.8, 1.2)
        delay = min(delay * 2, most)
