"""`--check`: what works and what does not, in words for the owner."""

from collections.abc import Callable

from .config import Config
from .qq import NcatbotQQ, NotConnected
from .server import RecallServer, Refused, Unavailable


async def check(
    config: Config,
    say: Callable[[str], None] = print,
) -> bool:  # is everything fine?
    "Try the server, the key and NapCat, each by itself."
    fine = True
    for name, test in (("服务器", _check_server), ("密钥", _check_key), ("NapCat", _check_napcat)):
        try:
            say(f"[正常] {name}：{await test(config)}")
        except _Wrong as problem:
            fine = False
            say(f"[{problem.mark}] {name}：{problem}")
    say("都正常，可以启动了。" if fine else "请先处理上面有误的地方，再运行一次 --check。")
    return fine


class _Wrong(Exception):
    "What is wrong, and what to do."

    mark = "有误"


class _Untried(_Wrong):
    "Why something could not be tried."

    mark = "没试"


async def _check_server(config: Config) -> str:
    server = RecallServer(config.server)
    try:
        found = await server.ready()
        return f"{config.server.url}，模型 {found.get('model', '?')}，{found.get('memories', '?')} 条记忆"
    except Unavailable as error:
        raise _Wrong(_explain(error, config)) from None
    except Refused as error:
        raise _Wrong(f"{config.server.url} 不像是 recallnb 服务器（{error}）：检查 [server] url") from None
    finally:
        await server.close()


async def _check_key(config: Config) -> str:
    server = RecallServer(config.server)
    try:
        await server.memories("0", limit=1)
        return "服务器接受" if config.server.key else "没有设置，服务器也不要求"
    except Unavailable as error:
        raise _Wrong(_explain(error, config)) if error.status else _Untried("要先连上服务器") from None
    except Refused as error:
        raise _Wrong(f"服务器不接受请求（{error}）：客户端和服务器的版本要配套") from None
    finally:
        await server.close()


def _explain(error: Unavailable, config: Config) -> str:
    "Why the server does not answer as it should."
    url = config.server.url
    if error.status == 403:
        return f"{url} 拒绝了请求（{error}）：没有密钥的服务器只能用 127.0.0.1 这个地址访问，用 SSH 隧道"
    if error.status == 401:
        return f"服务器不认这个密钥（{error}）：把服务器上设置的密钥写到 [server] key" if config.server.key else f"服务器要求密钥（{error}）：写到 [server] key"
    if error.status == 503:
        return f"{url} 在运行，但模型还没有准备好（{error}）：等一会儿再试"
    if error.status:
        return f"{url} 出错了（{error}）：看服务器的日志"
    return f"连不上 {url}（{error}）：服务器启动了吗？SSH 隧道开着吗？"


async def _check_napcat(config: Config) -> str:
    try:
        return f"{config.napcat.url}，登录的是 {await NcatbotQQ(config.napcat, config.bot.qq, lambda event: None).probe()}"
    except NotConnected as error:
        raise _Wrong(str(error)) from None
