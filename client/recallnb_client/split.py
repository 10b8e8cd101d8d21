"""Long answers in parts, as people send them."""

import re
import unicodedata

from .config import Send

_LINK = "[A-Za-z0-9=&/.%#?!]"  # behind a sign of ASCII: it stands within an address or a number
_ENDS = re.compile(rf"""(?:(?<=[。！？…])|(?<=[!?])(?!{_LINK}))[”’」』）)"']*|(?<=\n)|(?<=\.)\s+""")  # where a sentence is over
_COMMAS = re.compile(rf"(?<=[，、；： ])|(?<=[;,:])(?!{_LINK})")
_JOINERS = "\u200d\ufe0f\ufe0e"  # they tie a sign to its neighbour


def split_reply(
    text: str,
    most: int,  # characters of a part
) -> list[str]:
    "The text in parts of at most so many characters: cut after a sentence, else after a comma, else between two signs."
    parts, part = [], ""
    for piece in (piece for sentence in _pieces(text.strip(), _ENDS) for piece in _fitting(sentence, most)):
        if len((part + piece).strip()) > most:
            parts.append(part)
            part = ""
        part += piece
    return [part.strip() for part in [*parts, part] if part.strip()]


def pause_before(
    part: str,
    settings: Send,
) -> float:  # seconds
    "How long a person would type on this part."
    return min(settings.max_pause_s, settings.pause_s + settings.pause_per_char_s * len(part))


def _pieces(text: str, ends: re.Pattern) -> list[str]:
    "The text cut at these places, nothing left out."
    places = [0, *(found.end() for found in ends.finditer(text)), len(text)]
    return [text[start:end] for start, end in zip(places, places[1:]) if start < end]


def _fitting(sentence: str, most: int) -> list[str]:
    "A sentence in pieces that fit."
    if len(sentence) <= most:
        return [sentence]
    return [cut for piece in _pieces(sentence, _COMMAS) for cut in _hard_cuts(piece, most)]


def _hard_cuts(piece: str, most: int) -> list[str]:
    "A piece cut by length, but never through a sign that is put together from several characters."
    cuts = []
    while len(piece) > most:
        end = most
        while end > 1 and (_tied(piece[end]) or piece[end - 1] == "\u200d"):
            end -= 1
        end = end if end > 1 else most
        cuts.append(piece[:end])
        piece = piece[end:]
    return [*cuts, piece]


def _tied(char: str) -> bool:
    return char in _JOINERS or bool(unicodedata.combining(char)) or "\U0001f3fb" <= char <= "\U0001f3ff"
