"""NapCat's side for tests: a OneBot v11 WebSocket server on loopback, with faults of its own."""

import contextlib
import json
import threading
from urllib.parse import parse_qs, urlsplit

from fake_client import BOT
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve


class OneBot:
    """Greets with a lifecycle event, answers actions, keeps what is sent.

    Faults, changed at any time: `greets` (else it is silent from the start), `heartbeat_first`, `answers` (else actions stay without
    an answer), `slow` (seconds before a confirmation), `refuse` (how many sends are refused), `swallow` (how many sends are carried out without a confirmation, the connection
    being cut instead), `late` (how many are carried out and reported as timed out)."""

    def __init__(self, token="t0ken&+ 1", number=BOT, port=0, **faults):
        self.token, self.number = token, number
        self.greets, self.heartbeat_first, self.answers, self.online, self.slow, self.refuse, self.swallow, self.late = True, False, True, True, 0, 0, 0, 0
        vars(self).update(faults)
        self.sent, self.messages, self.greeted, self.turned_away = [], {}, 0, 0
        self.changed, self._connections = threading.Condition(), []
        self._server = serve(self._serve, "127.0.0.1", port)
        self.port = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"ws://127.0.0.1:{self.port}"

    def stop(self):
        self.cut()  # first: nobody who cannot answer at the moment is waited for
        self._server.shutdown()

    def cut(self):
        "Drop all connections without a word."
        with self.changed:  # whoever has been greeted is in the list
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # gone already
                connection.socket.shutdown(2)

    def event(self, *events):
        "Report events to whoever has been greeted."
        with self.changed:
            connections = list(self._connections)
        for event in events:
            for connection in connections:
                with contextlib.suppress(ConnectionClosed):
                    connection.send(json.dumps(event, ensure_ascii=False))

    def say(self, event):
        "Report a message that can be looked up afterwards."
        self.messages[str(event["message_id"])] = event
        self.event(event)
        return event

    def heartbeat(self, interval=100, online=True):
        self.event(self._meta("heartbeat", status={"online": online, "good": True}, interval=interval))

    def wait(self, condition, timeout=120):
        "Wait until something holds; what it was."
        with self.changed:
            assert self.changed.wait_for(condition, timeout), f"not in {timeout} s; sent so far: {self.sent[-5:]}"
            return condition()

    def wait_connected(self, count=1, timeout=120):
        self.wait(lambda: self.greeted >= count and self._connections, timeout)

    def texts(self, scope=None):
        "Texts of the messages that the bot sent."
        return ["".join(one["data"]["text"] for one in segments if one["type"] == "text") for where, segments in self.sent if scope in (None, where)]

    def _meta(self, kind, **fields):
        return {"time": 1_762_387_200, "self_id": self.number, "post_type": "meta_event", "meta_event_type": kind} | fields

    def _serve(self, connection):
        if self.token not in parse_qs(urlsplit(connection.request.path).query).get("access_token", []):
            connection.send(json.dumps({"status": "failed", "retcode": 1403, "data": None, "message": "token验证失败", "echo": None}))
            with self.changed:
                self.turned_away += 1
                self.changed.notify_all()
            return
        if self.heartbeat_first:
            connection.send(json.dumps(self._meta("heartbeat", status={"online": True, "good": True}, interval=30_000)))
        with self.changed:  # nobody reports an event between the greeting and the entry in the list
            if self.greets:
                connection.send(json.dumps(self._meta("lifecycle", sub_type="connect")))
            self._connections.append(connection)
            self.greeted += self.greets
            self.changed.notify_all()
        try:
            for frame in connection:
                self._act(connection, json.loads(frame))
        except ConnectionClosed:
            pass
        finally:
            with self.changed:
                self._connections.remove(connection)
                self.changed.notify_all()

    def _act(self, connection, request):
        action, params, answer = request["action"], request["params"], {"status": "ok", "retcode": 0, "data": {}, "echo": request["echo"]}
        if action in ("send_group_msg", "send_private_msg"):
            if self.refuse:
                self.refuse -= 1
                answer |= {"status": "failed", "retcode": 1200, "data": None, "message": "EventChecker Failed"}
            else:
                answer["data"] = {"message_id": 90_000 + len(self.sent)}
                scope = f"group:{params['group_id']}" if action == "send_group_msg" else f"private:{params['user_id']}"
                with self.changed:
                    self.sent.append((scope, params["message"]))
                    self.changed.notify_all()
                if self.late:
                    self.late -= 1
                    answer |= {"status": "failed", "retcode": 1200, "data": None, "message": "Timeout: NTEvent sendMsg"}
                if self.swallow:
                    self.swallow -= 1
                    return connection.socket.shutdown(2)
        elif action == "get_login_info":
            answer["data"] = {"user_id": self.number, "nickname": "小忆"}
        elif action == "get_status":
            answer["data"] = {"online": self.online, "good": True}
        elif action == "get_msg" and str(params["message_id"]) in self.messages:
            answer["data"] = self.messages[str(params["message_id"])]
        else:
            answer |= {"status": "failed", "retcode": 1400, "data": None, "message": "unknown"}
        if self.answers:
            threading.Timer(self.slow, self._confirm, (connection, json.dumps(answer))).start()

    def _confirm(self, connection, answer):
        with contextlib.suppress(ConnectionClosed):
            connection.send(answer)
