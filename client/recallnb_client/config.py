"""client.ini: what the owner of a bot sets, typed and checked.

An environment variable RECALLNB_CLIENT_<SECTION>__<KEY>, such as RECALLNB_CLIENT_SERVER__KEY, wins over the file,
so that no secret has to be in it."""

import configparser
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

ENVIRONMENT = "RECALLNB_CLIENT_"
WAYS = ("at", "quote", "name", "prefix")  # of addressing the bot in a group
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

Names = tuple[str, ...]


@dataclass(frozen=True)
class Server:
    "The recallnb server."

    url: str = "http://127.0.0.1:9999"
    key: str = field(default="", repr=False)
    answer_timeout_s: float = 180.0
    notice_after_s: float = 20.0
    give_up_s: float = 600.0


@dataclass(frozen=True)
class NapCat:
    "NapCat's WebSocket server."

    url: str = "ws://127.0.0.1:3001"
    token: str = field(default="", repr=False)
    send_timeout_s: float = 30.0


@dataclass(frozen=True)
class Bot:
    "Who the bot is, and who owns it."

    qq: str = ""
    owners: Names = ()
    names: Names = ("小忆",)
    work_dir: Path = Path("work")


@dataclass(frozen=True)
class Lists:
    "Who is served: nobody on `block`, and nobody else than `allow` where it is not empty."

    allow: Names = ()
    block: Names = ()

    def admits(
        self,
        number: str,  # of a person or a group
    ) -> bool:
        "Is this one served?"
        return number not in self.block and (not self.allow or number in self.allow)


@dataclass(frozen=True)
class Group:
    "How the bot behaves in a group."

    enabled: bool = True
    learn: bool = True
    answer: Names = WAYS
    prefixes: Names = ()
    probability: float = 0.0


@dataclass(frozen=True)
class Limits:
    "How much is taken in."

    messages: int = 20
    per_s: float = 60.0
    debounce_s: float = 0.8
    interruptions: int = 3
    waiting: int = 200
    images: int = 4
    image_mb: float = 8.0


@dataclass(frozen=True)
class Send:
    "How answers are sent."

    max_chars: int = 800
    pause_s: float = 0.6
    pause_per_char_s: float = 0.03
    max_pause_s: float = 4.0
    attempts: int = 4


@dataclass(frozen=True)
class Log:
    "What is logged."

    level: str = "INFO"


@dataclass(frozen=True)
class Config:
    "All of client.ini."

    server: Server = Server()
    napcat: NapCat = NapCat()
    bot: Bot = Bot()
    users: Lists = Lists()
    groups: Lists = Lists()
    group: Group = Group()
    limits: Limits = Limits()
    send: Send = Send()
    log: Log = Log()
    group_of: Mapping[str, Group] = field(default_factory=dict)  # sections [group:<number>]

    def group_settings(
        self,
        number: str,  # of the group
    ) -> Group:
        "What holds in this group."
        return self.group_of.get(number, self.group)


SECTIONS = {part.name: part.default for part in fields(Config) if part.name != "group_of"}  # name -> defaults


def load_config(
    file: Path,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    "Read client.ini; ValueError names what is wrong in it, FileNotFoundError a file that is not there."
    if not file.is_file():
        raise FileNotFoundError(f"no settings file {file}: copy client.example.ini to it and fill it in")
    parser = configparser.ConfigParser(interpolation=None, default_section="", inline_comment_prefixes=None)
    try:
        parser.read_string(file.read_text("utf-8-sig"), str(file))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; save it as UTF-8, with lines `key = value` under a [section]") from None
    written = {section: dict(parser[section]) for section in parser.sections()}
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT):
            section, found, key = name.removeprefix(ENVIRONMENT).lower().partition("__")
            if not found:
                raise ValueError(f"{name} in the environment names no setting: write {ENVIRONMENT}<SECTION>__<KEY>")
            written.setdefault(section, {})[key] = value
    config = _build(written)
    return replace(config, bot=replace(config.bot, work_dir=file.resolve().parent / config.bot.work_dir))


def _build(written: dict[str, dict[str, str]]) -> Config:
    "The settings out of texts, later sections [group:…] on top of [group]."
    parts = {name: _section(name, defaults, written.pop(name, {})) for name, defaults in SECTIONS.items()}
    special = {}
    for section, values in written.items():
        number = section.removeprefix("group:").strip()
        if not section.startswith("group:") or not re.fullmatch(r"\d{1,20}", number):
            raise ValueError(f"unknown section [{section}]{_did_you_mean(section, SECTIONS)}; a group's own settings stand in [group:<number>]")
        special[number] = _section(section, parts["group"], values)
    return _checked(Config(**parts, group_of=special))


def _section(
    name: str,
    defaults,  # a dataclass
    values: dict[str, str],
):
    "The defaults with what is written."
    types = {part.name: type(getattr(defaults, part.name)) for part in fields(defaults)}
    changes = {}
    for key, text in values.items():
        if key not in types:
            raise ValueError(f"[{name}] has no setting {key!r}{_did_you_mean(key, types)}")
        try:
            changes[key] = _READ[types[key]](text.strip())
        except (ValueError, KeyError):
            raise ValueError(f"[{name}] {key} = {text!r} is not {_WANTED[types[key]]}") from None
    return replace(defaults, **changes)


def _names(text: str) -> Names:
    return tuple(part.strip() for part in re.split("[,，]", text) if part.strip())


_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_READ = {bool: lambda text: _TRUTH[text.lower()], tuple: _names, type(Path()): Path, int: int, float: float, str: str}
_WANTED = {bool: "true or false", tuple: "a list with commas", type(Path()): "a path", int: "a whole number", float: "a number", str: "a text"}


def _did_you_mean(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"


def _checked(config: Config) -> Config:
    "The settings, if they make sense; ValueError otherwise."
    def need(truth: bool, what: str) -> None:
        if not truth:
            raise ValueError(what)

    for name, url, schemes in (("server", config.server.url, ("http", "https")), ("napcat", config.napcat.url, ("ws", "wss"))):
        parts = urlsplit(url)
        need(parts.scheme in schemes and bool(parts.hostname), f"[{name}] url = {url!r} is no address: write {schemes[0]}://<host>:<port>")
    numbers = {"bot.qq": (config.bot.qq,) if config.bot.qq else (), "bot.owners": config.bot.owners}
    numbers |= {f"{name}.{kind}": getattr(getattr(config, name), kind) for name in ("users", "groups") for kind in ("allow", "block")}
    for name, values in numbers.items():
        for value in values:
            need(value.isascii() and value.isdigit(), f"{name}: {value!r} is no QQ number: write digits only")
    for name, group in {"group": config.group, **{f"group:{number}": group for number, group in config.group_of.items()}}.items():
        need(0 <= group.probability <= 1, f"[{name}] probability = {group.probability} must lie between 0 and 1")
        for way in group.answer:
            need(way in WAYS, f"[{name}] answer: {way!r} is none of {', '.join(WAYS)}")
    for section in ("server", "napcat", "limits", "send"):
        for part in fields(getattr(config, section)):
            value = getattr(getattr(config, section), part.name)
            least = 1 if isinstance(value, int) and part.name != "images" else 0
            need(isinstance(value, str) or least <= value < 1e6, f"[{section}] {part.name} = {value} must be at least {least}")
    need(config.send.max_chars >= 20, f"[send] max_chars = {config.send.max_chars} must be at least 20")
    need(config.log.level in LEVELS, f"[log] level = {config.log.level!r} is none of {', '.join(LEVELS)}")
    return config
