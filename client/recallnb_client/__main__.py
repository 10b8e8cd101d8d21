"""The command: `python -m recallnb_client --config client.ini`."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from .check import check
from .client import Client
from .config import Config, load_config
from .qq import NcatbotQQ
from .server import RecallServer

_logger = logging.getLogger("recallnb_client")


def main(arguments: list[str] | None = None) -> None:
    "Run until SIGINT or SIGTERM, or check and leave."
    parser = argparse.ArgumentParser(prog="python -m recallnb_client", description="Joins a recallnb server to QQ. Stops on Ctrl-C or SIGTERM.")
    parser.add_argument("--config", type=Path, default=Path("client.ini"), metavar="FILE", help="settings; default: client.ini in this folder")
    parser.add_argument("--check", action="store_true", help="test the server, the key and NapCat, say what is wrong, and leave")
    given = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a sign shall not end the bot
        stream.reconfigure(errors="replace")
    try:
        config = load_config(given.config)
        # Others stay at WARNING: below, httpx and websockets log addresses with tokens, and ncatbot whole chats.
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        _logger.setLevel(config.log.level)
        config.bot.work_dir.mkdir(parents=True, exist_ok=True)
        os.chdir(config.bot.work_dir)
        if given.check:
            sys.exit(not asyncio.run(check(config)))
        with only_one(config.bot.work_dir / "client.lock"):
            asyncio.run(run(config))
    except (ValueError, OSError, RuntimeError) as error:
        _logger.debug("the start failed", exc_info=True)
        sys.exit(f"recallnb_client: {error}")


async def run(config: Config) -> None:
    "Serve until a signal comes; a second one ends at once."
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end(number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop.set)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last one is Windows'
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
    server = RecallServer(config.server)
    qq = NcatbotQQ(config.napcat, config.bot.qq, lambda event: client.receive(event))
    client = Client(config, server, qq, owed=config.bot.work_dir / "owed.jsonl")
    client.resume()
    serving, stopping = asyncio.create_task(qq.run()), asyncio.create_task(stop.wait())
    _logger.info("started: server %s, NapCat %s", config.server.url, config.napcat.url)
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    _logger.info("stopping")
    stopping.cancel()
    serving.cancel()
    ended = await asyncio.gather(serving, return_exceptions=True)
    await client.close()
    await server.close()
    if not isinstance(ended[0], asyncio.CancelledError):
        raise ended[0]


@contextlib.contextmanager
def only_one(file: Path) -> Iterator[None]:
    "Hold a lock as long as the block runs; RuntimeError if another process has it: two clients would answer everything twice."
    with file.open("a+b") as handle:
        try:
            if sys.platform == "win32":
                import msvcrt

                handle.seek(0)
                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another client runs in {file.parent}: stop it, or set [bot] work_dir to another folder") from None
        yield


if __name__ == "__main__":
    main()
