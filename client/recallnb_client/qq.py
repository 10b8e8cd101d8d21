"""QQ through ncatbot 4.4.1.post1 and NapCat: the only module that imports ncatbot, and only when a connection is made.

ncatbot does what it is asked for and a few things more. What is kept away here, each with a test in tests/test_client_qq.py:

| ncatbot | here |
|---|---|
| on import makes ./logs, empties the root logger's handlers, reads config.yaml of the working directory | a temporary folder for the logs, the handlers put back, the null device for the settings |
| `start` asks on stdin, installs and starts NapCat, writes config.yaml with tokens, logs the token, loads plugins | never called: the adapter is connected directly, which is remote mode at its barest |
| waits for the first frame, and when it reconnects, without limit, and blocks the loop | a limit for the first frame; a lost connection ends, and `run` connects anew |
| an unknown segment drops the event; a handler of its own task for each event | the raw event is taken as it comes, in order |
| `text=` is parsed as CQ codes; a text "None" is lost | segments are built here |
| an answer from NapCat is awaited in a thread for 300 s, and six of those block every other | a future with a limit |
| goes through the system's proxy | not to NapCat |"""

import asyncio
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from .config import NapCat
from .lane import delays
from .port import Away, Missing, NotSent, Unconfirmed

_logger = logging.getLogger(__name__)
FIRST_FRAME_S = 10.0  # NapCat sends a lifecycle event at once
LOOKUP_S = 5.0
LOOK_S = 5.0  # between two looks whether heartbeats have begun


class NotConnected(Exception):
    "Why there is no connection to NapCat, in words for its owner."


class _Reply(asyncio.Future):
    "An answer that NapCat owes; ncatbot puts it in as into a queue."

    def put(self, message: dict) -> None:
        if not self.done():
            self.set_result(message)


def import_ncatbot(settings: NapCat):  # the module ncatbot.core
    "ncatbot, without traces: no folder, no settings file, nobody's log handlers gone."
    root, kind = logging.getLogger(), logging.getLoggerClass()
    handlers, level = root.handlers[:], root.level
    with tempfile.TemporaryDirectory(prefix="recallnb-client-") as folder:
        wanted = {"LOG_FILE_PATH": folder, "LOG_LEVEL": "ERROR", "FILE_LOG_LEVEL": "ERROR", "NCATBOT_CONFIG_PATH": os.devnull}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            import ncatbot.core
            import ncatbot.core.adapter.adapter
            from ncatbot.utils import ncatbot_config
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
            for handler in [handler for handler in root.handlers if handler not in handlers]:
                root.removeHandler(handler)
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
            logging.setLoggerClass(kind)
    for key, value in {"ws_uri": settings.url, "ws_token": settings.token, "remote_mode": True, "skip_plugin_load": True,
                       "enable_webui": False, "enable_webui_interaction": False}.items():
        ncatbot_config.update_value(key, value)
    # A lost connection is to end; otherwise ncatbot would block the loop while it looks for a new one.
    ncatbot.core.adapter.adapter.napcat_service_ok = lambda *_, **__: False
    return ncatbot.core


class NcatbotQQ:
    "A QQ account behind NapCat. `run` keeps it connected."

    def __init__(
        self,
        settings: NapCat,
        number: str,  # of the bot; empty: whoever is logged in
        receive: Callable[[dict], None],  # gets each event, in order
    ):
        self._settings, self._number, self._receive = settings, number, receive
        self._bot = import_ncatbot(settings).BotClient()
        adapter = self._bot.adapter
        self._parse, adapter._handle_event = adapter._handle_event, self._on_event
        self._answer, adapter._handle_response = adapter._handle_response, self._on_response
        self._bot.api.async_callback = self.call
        self._bot.event_handlers = {name: [] for name in self._bot.event_handlers}  # its own want the plugins
        self._bot.add_startup_handler(self._on_startup)
        self._connected, self._refusal = asyncio.Event(), ""
        self._heard, self._patience = 0.0, 0.0  # time of the last frame; seconds that may pass until the next one, 0: unknown
        no_proxy = {os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")} | {urlsplit(settings.url).hostname or ""}
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(sorted(no_proxy - {""}))

    async def run(self) -> None:
        "Connect, and connect anew whenever the connection ends; until it is cancelled."
        waits, said = delays(1.0, 30.0), ""
        while True:
            try:
                await self._connect()
                waits, said = delays(1.0, 30.0), ""
                await self._stay()
            except NotConnected as error:
                if str(error) != said:
                    _logger.error("NapCat: %s", error)
                said = str(error)
            finally:
                await self._disconnect()
            await asyncio.sleep(next(waits))

    async def send(self, scope: str, text: str, quote: str = "") -> str:
        "Send a text as one plain segment; NotSent, Away or Unconfirmed."
        kind, _, number = scope.partition(":")
        segments = [{"type": "reply", "data": {"id": quote}}] if quote else []
        segments.append({"type": "text", "data": {"text": text}})
        post = self._bot.api.send_group_msg if kind == "group" else self._bot.api.send_private_msg
        try:
            return await post(number, segments)
        except (NotSent, Unconfirmed):
            raise
        except AttributeError:  # ncatbot, of an answer without data
            return ""
        except Exception as error:  # ncatbot, of an answer that says no
            # NapCat reports a time-out of its own for messages that did go out, too.
            late = "timeout" in str(error).lower() or "超时" in str(error)
            raise (Unconfirmed if late else NotSent)(f"NapCat says: {error}") from error

    async def message(self, message_id: str) -> dict:
        "Look a message up; Missing."
        return await self._look_up("get_msg", {"message_id": message_id})

    async def forwarded(self, forward_id: str) -> list[dict]:
        "The messages in a forwarded one; Missing."
        found = await self._look_up("get_forward_msg", {"message_id": forward_id})
        return [message for message in found.get("messages") or [] if isinstance(message, dict)]

    async def probe(self) -> str:  # the bot's name and number
        "Connect once, and leave; NotConnected says what is wrong."
        try:
            await self._connect()
            who, state = await self._look_up("get_login_info", {}), await self._look_up("get_status", {})
        except Missing as error:
            raise NotConnected(f"连上了，但 NapCat 不回答请求（{error}）：重启 NapCat 再试") from None
        finally:
            await self._disconnect()
        if state.get("online") is False:
            raise NotConnected("连上了，但 QQ 不在线：请到 NapCat 里重新登录")
        return f"{who.get('nickname', '')}（{who.get('user_id', '')}）"

    async def call(self, path: str, params: dict | None = None, limit: float | None = None) -> dict:
        "Let NapCat do something and return its answer; Away, or Unconfirmed if no answer came."
        adapter, echo = self._bot.adapter, str(uuid.uuid4())
        client = adapter.client
        if not self._connected.is_set() or client is None or client.state.name != "OPEN":
            raise Away("NapCat is not connected")
        reply = adapter.pending_requests[echo] = _Reply()
        try:
            async with asyncio.timeout(limit or self._settings.send_timeout_s):
                await client.send(json.dumps({"action": path.strip("/"), "params": params or {}, "echo": echo}))
                return await reply
        except TimeoutError:
            raise Unconfirmed("NapCat did not answer in time") from None
        except asyncio.CancelledError:
            if not reply.cancelled():
                raise
            raise Unconfirmed("the connection was lost before NapCat answered") from None
        except Exception as error:  # of websockets: part of it may have gone out
            raise Unconfirmed(f"the connection was lost: {error}") from error
        finally:
            adapter.pending_requests.pop(echo, None)

    async def _look_up(self, action: str, params: dict) -> dict:
        try:
            answer = await self.call(action, params, LOOKUP_S)
        except (NotSent, Unconfirmed) as error:
            raise Missing(str(error)) from None
        if answer.get("retcode") != 0 or not isinstance(answer.get("data"), dict):
            raise Missing(f"NapCat says: {answer.get('message') or answer.get('wording') or 'no'}")
        return answer["data"]

    async def _connect(self) -> None:
        "Open a connection and wait until NapCat greets; NotConnected says why it does not."
        self._refusal, self._patience = "", 0.0
        self._task = asyncio.create_task(self._bot.adapter.connect_websocket())
        greeted = asyncio.create_task(self._connected.wait())
        try:
            await asyncio.wait({self._task, greeted}, timeout=FIRST_FRAME_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            greeted.cancel()
        if self._task.done():
            raise NotConnected(self._refusal or explain(self._task.exception(), self._settings))
        if not self._connected.is_set():
            raise NotConnected(self._refusal or f"{self._settings.url} 接受了连接，但 {FIRST_FRAME_S:g} 秒内没有发来 OneBot 的 lifecycle 事件：确认这个端口是 NapCat 的 WebSocket 服务器")
        if self._number and self._self_id != self._number:
            raise NotConnected(f"NapCat 登录的是 {self._self_id}，不是 [bot] qq = {self._number}：换一个账号登录，或改配置")
        _logger.info("connected to NapCat at %s as %s", self._settings.url, self._self_id)

    async def _stay(self) -> None:
        "Return when the connection has ended or has fallen silent."
        loop = asyncio.get_running_loop()
        while True:
            left = self._heard + self._patience - loop.time() if self._patience else None
            if left is not None and left <= 0:
                return _logger.warning("NapCat has fallen silent: no heartbeat for %.0f s; connecting anew", self._patience)
            await asyncio.wait({self._task}, timeout=LOOK_S if left is None else max(left, 0.05))
            if self._task.done():
                return _logger.warning("the connection to NapCat was lost; connecting anew")

    async def _disconnect(self) -> None:
        "End the connection; whoever waits for an answer learns that none will come."
        self._connected.clear()
        adapter = self._bot.adapter
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await adapter.cleanup()

    async def _on_response(self, message: dict) -> None:
        self._heard = asyncio.get_running_loop().time()
        if message.get("echo") is None:
            self._note_refusal(message)
        else:
            await self._answer(message)

    async def _on_event(self, event: dict) -> None:
        "Every frame that is no answer. Must not raise: ncatbot would take it for the end of the connection."
        self._heard = asyncio.get_running_loop().time()
        try:
            if event.get("post_type") in ("message", "notice"):
                self._receive(event)
            elif event.get("post_type") == "meta_event":
                self._on_heartbeat(event)
                await self._parse(event)
            elif "retcode" in event:
                self._note_refusal(event)
        except Exception:
            _logger.exception("an event of type %s was not understood", event.get("post_type"))

    def _on_heartbeat(self, event: dict) -> None:
        if event.get("meta_event_type") != "heartbeat":
            return
        self._patience = 3 * float(event.get("interval") or 0) / 1000
        if (event.get("status") or {}).get("online") is False:
            _logger.error("NapCat: QQ 已经掉线，请到 NapCat 里重新登录")

    async def _on_startup(self, event) -> None:
        "NapCat's greeting, on every connection."
        self._self_id = event.self_id
        self._connected.set()

    def _note_refusal(self, message: dict) -> None:
        said = message.get("message") or message.get("wording") or f"retcode {message.get('retcode')}"
        self._refusal = f"NapCat 拒绝了连接（{said}）：[napcat] token 要和 NapCat 网络配置里的 token 一样"


def explain(
    error: BaseException | None,
    settings: NapCat,
) -> str:
    "Why a connection failed, in words for the bot's owner; never with the token."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"NapCat 拒绝了连接（HTTP {status}）：[napcat] token 要和 NapCat 网络配置里的 token 一样"
    if status:
        return f"{settings.url} 不是 WebSocket 服务器（HTTP {status}）：检查 [napcat] url，端口要用 NapCat 里“WebSocket 服务器”的端口"
    if isinstance(error, ConnectionRefusedError):
        return f"{settings.url} 没有程序在监听：启动 NapCat，并在它的网络配置里启用“WebSocket 服务器”"
    if isinstance(error, TimeoutError):
        return f"{settings.url} 没有回应：检查地址、防火墙和隧道"
    if isinstance(error, OSError):
        return f"连不上 {settings.url}（{error.strerror or type(error).__name__}）：检查地址和网络"
    return f"{settings.url} 关闭了连接（{type(error).__name__}）：检查 [napcat] token，并看 NapCat 的日志"
