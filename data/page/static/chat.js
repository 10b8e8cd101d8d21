"use strict";
// The chat: a message goes out, events come in, a recall becomes a card.

const talk = document.getElementById("talk"), box = document.getElementById("words-said"), user = document.getElementById("user"), nick = document.getElementById("name"), file = document.getElementById("file"), attached = document.getElementById("attached");
let hint = null, loaded = Promise.resolve();  // hint: while nothing was said; loaded: what was said before is shown
const make = (tag, className, text) => { const one = document.createElement(tag); one.className = className || ""; if (text !== undefined) one.textContent = text; return one; };

function put(element) {
  if (hint) { hint.remove(); hint = null; }
  talk.append(element);
  talk.scrollTop = talk.scrollHeight;
  return element;
}

function card(recall, question) {
  const found = recall.id !== null, box = make("details", found ? "card" : "card nothing");
  box.open = true;
  box.append(make("summary", "", found ? `${words.recall}: ${recall.text}` : words.nothing));
  box.append(make("div", "quiet", `${words.asked}: ${question}`));
  const list = make("ol");
  for (const one of recall.candidates.slice(0, 5)) {
    const row = make("li", one.id === recall.id ? "chosen" : ""), bar = make("span", "bar-of"), fill = make("i");
    fill.style.width = `${Math.max(0, one.score) * 100}%`;
    bar.append(fill);
    row.append(make("span", "", one.text), bar, make("span", "quiet", one.score.toFixed(2)));
    list.append(row);
  }
  if (recall.candidates.length) box.append(make("div", "quiet", words.candidates), list);
  box.append(make("div", "quiet", `${words.decoded}: ${recall.decoded}`));
  return box;
}

async function* events(response) {  // server-sent events of a POST, which EventSource cannot do
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const lines = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const name = lines.find((line) => line.startsWith("event: ")), data = lines.find((line) => line.startsWith("data: "));
      if (name && data) yield [name.slice(7), JSON.parse(data.slice(6))];
    }
  }
}

async function upload(picture) {
  const form = new FormData();
  form.append("file", picture);
  return (await (await ask("/api/upload", { method: "POST", body: form })).json()).id;
}

async function send(text, picture) {
  await loaded;
  const mine = put(make("div", "said mine", text));
  if (picture) { const image = make("img"); image.src = URL.createObjectURL(picture); image.alt = words.picture; mine.prepend(image); }
  const reply = put(make("div", "said waiting", "")), stop = put(make("button", "link quiet", words.stop)), control = new AbortController();
  let taken = false;  // does the server have it?
  stop.type = "button";
  stop.onclick = () => control.abort();  // the server notices, and ends the answer
  try {
    const body = { user_id: user.value, user_nickname: nick.value, content: text, timestamp: Date.now() / 1000, message_id: crypto.randomUUID ? crypto.randomUUID() : `page-${Date.now()}-${Math.random()}` };
    if (picture) body.images = [await upload(picture)];
    const response = await ask("/api/chat/private", { method: "POST", headers: { "Content-Type": "application/json", Accept: "text/event-stream" }, body: JSON.stringify(body), signal: control.signal });
    const cards = [];
    taken = true;
    for await (const [name, data] of events(response)) {
      if (name === "token" && !data.thinking) reply.textContent += data.text;
      else if (name === "recall") { const one = card(data, text); cards.push(one); reply.before(one); }
      else if (name === "restart") { reply.textContent = ""; cards.splice(0).forEach((one) => one.remove()); reply.before(make("p", "note", words.restarted)); }
      else if (name === "error") throw trouble(0, data);
      else if (name === "done") {
        if (data.status !== "ok") { reply.before(make("p", "note", words[data.status] || data.status)); reply.remove(); }
        if (data.notice) reply.before(make("p", "note", data.notice));
      }
      talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    reply.before(make("p", stopped ? "note" : "note danger", stopped ? words.stopped : error.message));
    if (!taken && !stopped && !box.value) box.value = text;  // to be sent again
    if (stopped || !reply.textContent) reply.remove();  // half an answer is in no history
  }
  stop.remove();
  reply.classList.remove("waiting");
}

function show() {
  attached.hidden = !file.files.length;
  attached.textContent = file.files.length ? file.files[0].name : "";
  if (attached.hidden) return;
  const away = make("button", "link", words.remove);
  away.type = "button";
  away.onclick = () => { file.value = ""; show(); box.focus(); };
  attached.append(" ", away);
}

function load() { loaded = loaded.then(() => attempt(earlier)); }

async function earlier() {
  talk.replaceChildren();
  if (!user.reportValidity() || !user.value) return;
  const found = await call("GET", `/api/chats/private:${user.value}/history?limit=30`);
  hint = make("div");
  hint.append(document.getElementById("empty").content.cloneNode(true));
  talk.append(hint);
  for (const one of found.messages) {
    const line = put(make("div", one.role === "user" ? "said mine" : "said", one.content));
    for (const id of [...one.images].reverse()) { const image = make("img"); image.src = `/api/uploads/${id}?scope=private:${user.value}`; image.alt = words.picture; line.prepend(image); }
  }
}

document.getElementById("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value.trim(), picture = file.files[0];
  if (!text && !picture || !user.reportValidity()) return;
  box.value = ""; file.value = ""; show();
  send(text, picture);
});
box.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) { event.preventDefault(); document.getElementById("say").requestSubmit(); } });
file.addEventListener("change", show);
talk.addEventListener("click", ({ target: { dataset } }) => {  // the example
  if (!dataset.question) return;
  user.value = dataset.user; nick.value = dataset.name; remember();
  load();
  send(dataset.question);
});
const remember = () => { sessionStorage.setItem("who", JSON.stringify([user.value, nick.value])); };
user.addEventListener("change", () => { nick.value = ""; remember(); load(); });
nick.addEventListener("change", remember);
[user.value, nick.value] = JSON.parse(sessionStorage.getItem("who")) || [user.value, nick.value];
load();
