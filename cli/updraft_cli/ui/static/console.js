// The theme, the state of the connection, and charts that follow the server. htmx replaces everything else by itself.
import { drawAll, refreshAll } from "./charts.js";

const YEAR_S = 31_536_000;
const FORBIDDEN = 403;
const PATIENCE_MS = 2000;
const STARTED_AGAIN = "The console was started again, with another token. This page shows the last state; open the address that it printed.";
const AWAY = "The console does not answer. This page shows the last state and reconnects by itself. If the console was started again, open the address that it printed.";

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function startTheme() {
  const button = document.getElementById("theme");
  if (!button) return;
  const label = () => {
    button.textContent = isDark() ? "Light theme" : "Dark theme";
  };
  const changed = () => {
    label();
    drawAll();
  };
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    document.cookie = `updraft-theme=${theme}; Max-Age=${YEAR_S}; Path=/; SameSite=Strict`;
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  label();
  button.hidden = false;
}

function startConnection() {
  const notice = document.createElement("p");
  notice.id = "connection";
  notice.className = "notice notice-warn";
  notice.setAttribute("role", "status");
  notice.hidden = true;
  document.getElementById("main")?.before(notice);
  const tell = (text) => {
    if (notice.textContent !== text) notice.textContent = text;
    notice.hidden = !text;
  };
  let numOpened = 0;
  document.body.addEventListener("htmx:sseOpen", () => {
    numOpened += 1;
    tell("");
  });
  document.body.addEventListener("htmx:sseError", async () => {
    const before = numOpened;
    const options = { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) };
    const status = await fetch("/static/icon.svg", options).then((answer) => answer.status, () => 0);
    if (numOpened === before) tell(status === FORBIDDEN ? STARTED_AGAIN : AWAY); // else it has come back meanwhile
  });
}

// A browser opens six connections to one address at most, and each page that follows holds one: a hidden one gives its back.
function startStream() {
  const main = document.getElementById("main");
  if (typeof htmx === "undefined" || !main) return;
  let source = null;
  let isResting = false;
  const rest = () => {
    if (!source || source.readyState === EventSource.CLOSED) return;
    source.close();
    isResting = true;
  };
  htmx.createEventSource = (address) => {
    source = new EventSource(address, { withCredentials: true });
    if (document.hidden) rest();
    return source;
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) rest();
    else if (isResting) {
      isResting = false;
      // For htmx-sse, these parts are new: it opens a stream and listens to it.
      for (const part of [main, ...main.querySelectorAll("[sse-swap], [hx-trigger]")]) htmx.trigger(part, "htmx:afterProcessNode");
    }
  });
}

// The frame of a page, its navigation and the places of its charts, follows no events.
function followNames(event) {
  const { names } = JSON.parse(event.detail.data);
  if (names.join(" ") !== document.getElementById("main").dataset.names) location.reload();
}

// The newest versions are at the right end of the lineage.
for (const graph of document.querySelectorAll(".lineage")) graph.parentElement.scrollLeft = graph.parentElement.scrollWidth;

// The server does not know what a person opened, so an update must not close it.
if (typeof Idiomorph !== "undefined") {
  Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) => !(name === "open" && node.tagName === "DETAILS");
}

document.querySelector(".pages [aria-current]")?.scrollIntoView({ inline: "center", block: "nearest" }); // on a phone

startTheme();
startConnection();
startStream();
document.body.addEventListener("sse:series", refreshAll);
document.body.addEventListener("sse:series", followNames);
drawAll();
