"""Is this message for the bot?"""

import random
import re
import time
from collections import deque
from collections.abc import Callable

from .config import Config, Group, Limits
from .message import Incoming


def served(
    message: Incoming,
    config: Config,
) -> bool:
    "Do the lists admit this person and this group?"
    kind, _, number = message.scope.partition(":")
    if not config.users.admits(message.user_id):
        return False
    return kind == "private" or (config.groups.admits(number) and config.group_settings(number).enabled)


def addressed(
    message: Incoming,
    group: Group,  # settings of its group
    names: tuple[str, ...],  # of the bot
    quotes_bot: bool,  # is a message of the bot quoted?
    draw: Callable[[], float] = random.random,  # from 0 to 1
) -> str:
    "Why it is for the bot: private, at, quote, prefix, name, chance; empty if it is not."
    if message.scope.startswith("private:"):
        return "private"
    typed = message.typed.lower()
    reasons = {
        "at": message.at_bot,
        "quote": quotes_bot,
        "prefix": any(typed.startswith(prefix.lower()) for prefix in group.prefixes),
        "name": any(name.lower() in typed for name in names),
    }
    for reason, holds in reasons.items():
        if holds and reason in group.answer:
            return reason
    return "chance" if group.probability and draw() < group.probability else ""


def wording(
    message: Incoming,
    group: Group,
    names: tuple[str, ...],
) -> str:
    "What was typed, without the prefix or the name that it begins with."
    typed = message.typed
    for opening in sorted((*group.prefixes, *names), key=len, reverse=True):
        if typed.lower().startswith(opening.lower()):
            return re.sub(r"^[\s,，:：、!！~]+", "", typed[len(opening) :])
    return typed


class RateLimit:
    "At most so many messages of one person in a span of time."

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,  # seconds
    ):
        self._limits, self._clock = limits, clock
        self._times: dict[str, deque[float]] = {}

    def allows(
        self,
        user_id: str,
    ) -> bool:
        "Count a message; is it still within the limit? Those beyond it are not counted."
        now = self._clock()
        times = self._times.setdefault(user_id, deque())
        while times and times[0] <= now - self._limits.per_s:
            times.popleft()
        if len(times) >= self._limits.messages:
            return False
        times.append(now)
        if len(self._times) > 10_000:  # people who have long gone
            self._times = {user: kept for user, kept in self._times.items() if kept and kept[-1] > now - self._limits.per_s}
        return True
