"""What the client needs of QQ, whoever provides it."""

from typing import Protocol


class NotSent(Exception):
    "Nothing has left: it may be tried again."


class Away(NotSent):
    "There is no connection to QQ at the moment."


class Unconfirmed(Exception):
    "Nobody knows whether it has arrived: it must not be sent again."


class Missing(Exception):
    "QQ does not hand out what was asked for."


class QQ(Protocol):
    "A QQ account that is logged in somewhere."

    async def send(
        self,
        scope: str,  # private:<user_id> or group:<group_id>
        text: str,  # sent as it is
        quote: str = "",  # id of a message to quote
    ) -> str:  # id of the new message; empty: QQ did not tell
        "Send a text; NotSent or Unconfirmed."

    async def message(
        self,
        message_id: str,
    ) -> dict:  # like an event
        "Look a message up; Missing."

    async def forwarded(
        self,
        forward_id: str,
    ) -> list[dict]:  # each like an event
        "The messages in a forwarded one; Missing."
