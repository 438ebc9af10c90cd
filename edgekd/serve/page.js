"use strict";
// Nothing here leaves this server; no name of a file is shown, sent or kept.

const at = (id) => document.getElementById(id);
const TOKEN = "edgekd-token";
const KINDS = { "image/png": 1, "image/jpeg": 1, "application/dicom": 1 };
const VERDICTS = {
  pass: "Explanations: PASS", fail: "Explanations: FAIL", inconclusive: "Explanations: INCONCLUSIVE",
  invalid: "Explanations: INVALID", "": "Explanations: not judged",
};
let model = null; // what /model said
let image = null; // the file that is shown
let asked = null; // AbortController of what is under way

class Refused extends Error {
  constructor(status, message, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

async function call(path, body, signal) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.authorization = `Bearer ${token}`;
  if (body) headers["content-type"] = KINDS[body.type] ? body.type : "application/octet-stream";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal, cache: "no-store" });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Refused(0, "The server cannot be reached. Is it running, and is the file still there?");
  }
  let told = {};
  try {
    told = await answer.json();
  } catch (e) {
    if (e.name === "AbortError") throw e;
    if (answer.ok) throw new Refused(0, "The answer did not arrive whole");
  }
  if (answer.ok) return told;
  throw new Refused(answer.status, told.error || answer.statusText || `status ${answer.status}`);
}

function state(name, words = "") {
  document.body.dataset.state = name;
  at("told").textContent = words;
}

function begin() {
  if (asked) asked.abort();
  asked = new AbortController();
  return asked.signal;
}

function hide(id) {
  const focused = at(id).contains(document.activeElement);
  at(id).hidden = true;
  if (focused) at("file").focus(); // else the keyboard begins at the top again
}

function clear() {
  delete document.body.dataset.map;
  at("answer").hidden = true;
  hide("again");
  hide("controls");
  at("wrong").replaceChildren();
  at("caption").textContent = "";
  show(null, null);
}

function show(picture, overlay, words = "The image as the model sees it, and what it looks at, will be here.") {
  for (const [id, png] of [["picture", picture], ["overlay", overlay]]) {
    at(id).hidden = !png;
    if (png) at(id).src = `data:image/png;base64,${png}`;
    else at(id).removeAttribute("src");
  }
  at("nothing").hidden = !!picture;
  at("nothing").textContent = words;
}

function make(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

const percent = (p) => `${(100 * p).toFixed(1)} %`;
const sentence = (s) => (s ? s[0].toUpperCase() + s.slice(1) + (/[.!?]$/.test(s) ? "" : ".") : "");

function wrong(title, words) {
  at("wrong").replaceChildren(make("strong", title), words);
}

function failed(e, retry) {
  if (e.name === "AbortError") return;
  if (e.status === 401) return door();
  const busy = [503, 504, 408].includes(e.status);
  state(busy ? "busy" : "error");
  const title = busy ? "Too busy to answer" : e.status ? "No answer" : "Not connected";
  wrong(title, sentence(e.message || "Something went wrong on this page"));
  at("again").onclick = retry;
  if (retry && (busy || !e.status)) at("again").hidden = false;
  else hide("again");
}

function door() {
  state("locked");
  if (sessionStorage.getItem(TOKEN)) {
    wrong("Wrong token", "The server does not know it. Enter it again.");
    sessionStorage.removeItem(TOKEN);
  }
  at("door").hidden = false;
  at("drop").hidden = true;
  at("token").focus();
}

async function enter() {
  try {
    model = await call("model");
  } catch (e) {
    return failed(e, enter);
  }
  at("drop").hidden = false;
  hide("door");
  at("wrong").replaceChildren();
  hide("again");
  state("empty");
  introduce(model);
  if (image) ask(image);
}

function times(l, digits) {
  const p95 = l.p95_ms !== null ? `, p95 ${l.p95_ms.toFixed(digits)} ms` : "";
  return `p50 ${l.p50_ms.toFixed(digits)} ms${p95}`;
}

function measured(l) {
  if (!l) return "not measured";
  const other = l.on_device ? "" : ", which is not the profile's device";
  return `${times(l, 2)}, measured on ${l.machine}${other}`;
}

function introduce(m) {
  document.title = `${m.name}: EdgeKD at the bedside`;
  at("name").textContent = m.name;
  at("use").textContent = m.intended_use.replace(/^Research use\.\s*/i, "");
  const l = m.latency;
  at("latency").textContent = l
    ? `${m.precision}: ${times(l, 1)}, ${l.on_device ? "on this kind of device" : `on ${l.machine}`}`
    : `${m.precision}, latency not measured`;
  const badge = at("verdict");
  badge.hidden = false;
  badge.className = `badge ${m.verdict}`;
  badge.textContent = (VERDICTS[m.verdict] || m.verdict.toUpperCase());
  at("despite").hidden = !m.despite;
  at("despite").textContent = `Bundled despite that: ${m.despite}`;
  at("of").replaceChildren(...m.classes.map((c) => new Option(c, c)));
  const rows = [
    ["verdict on explanations", (m.verdict || "not judged").toUpperCase()],
    ...m.reasons.map((r) => ["", r]),
    ...(m.despite ? [["bundled despite that", m.despite]] : []),
    ["intended use", m.intended_use],
    ["model", `${m.precision}, ${m.size[1]} × ${m.size[0]} pixels, sha256 ${m.sha256}`],
    ["runs", `${m.runtime} on ${m.device}, profile ${m.profile}`],
    ["latency", measured(l)],
    ["signed by", m.signer ? m.signer + (m.trusted ? "" : " (a key that nobody asked for)") : "nobody"],
    ["abstains", m.abstain_below > 0 ? `below a probability of ${m.abstain_below.toFixed(2)}` : "never"],
    ["unusual images", m.knows_usual ? "are warned of" : "are not known to this model: no warning is given"],
    ["limits", `${m.limits.max_bytes / 1e6} MB and ${m.limits.max_pixels / 1e6} megapixels an image`],
  ];
  at("facts").replaceChildren(...rows.flatMap(([k, v]) => [make("dt", k), make("dd", v)]));
}

async function ask(file) {
  const signal = begin();
  image = file;
  clear();
  if (!model) return failed(new Refused(0, "The server cannot be reached"), enter);
  if (file.size > model.limits.max_bytes) {
    const most = model.limits.max_bytes / 1e6;
    return failed(new Refused(413, `this file has ${(file.size / 1e6).toFixed(1)} MB, and this server takes ${most} MB`));
  }
  state("loading", "The model looks at the image…");
  try {
    const told = await call("predict", file, signal);
    answered(told);
    const foremost = Object.entries(told.probabilities).sort((a, b) => b[1] - a[1])[0][0];
    at("of").value = foremost;
    await explain(foremost, signal);
  } catch (e) {
    failed(e, () => ask(file));
  }
}

async function explain(label, signal) {
  document.body.dataset.map = "drawing";
  at("nothing").hidden = false;
  at("nothing").textContent = "Drawing what it looks at…";
  try {
    const told = await call(`explain?label=${encodeURIComponent(label)}`, image, signal);
    show(told.picture, told.overlay);
    at("picture").alt = "The image, prepared as the model sees it";
    at("overlay").alt = `Score-CAM map: what speaks for ${told.explained}`;
    at("caption").textContent = told.overlay
      ? `Bright: what speaks for ${told.explained}. No proof of a finding.`
      : `No map: nothing in this image speaks for ${told.explained} alone.`;
    at("controls").hidden = false;
    at("opacity").disabled = !told.overlay;
  } catch (e) {
    if (e.name === "AbortError" || e.status === 401) throw e;
    // the answer stays: it is the map that is missing
    show(at("picture").hidden ? null : at("picture").src.split(",")[1], null, "No map.");
    at("caption").textContent = `No map: ${e.message}`;
    at("controls").hidden = false;
    at("opacity").disabled = true;
  } finally {
    if (asked.signal === signal) delete document.body.dataset.map; // else the next map's
  }
}

function answered(told) {
  const sorted = Object.entries(told.probabilities).sort((a, b) => b[1] - a[1]);
  const abstains = told.abstained !== "";
  at("label").textContent = abstains ? "No answer" : told.label;
  at("sure").textContent = abstains ? "" : percent(sorted[0][1]);
  at("why-not").hidden = !abstains;
  at("why-not").textContent = `The model abstains: ${told.abstained}.`;
  at("unusual").hidden = told.warnings.length === 0;
  at("warnings").replaceChildren(...told.warnings.map((w) => make("li", w)));
  at("classes").replaceChildren(...sorted.map(([name, p], i) => row(name, p, i === 0)));
  at("classes").parentElement.classList.toggle("many", sorted.length > 6);
  at("took").textContent = `Answered in ${told.ms.toFixed(0)} ms. Image sha256 ${told.image.slice(0, 12)}, in the audit log.`;
  at("answer").hidden = false;
  const words = abstains ? `No answer. ${told.abstained}` : `Answer: ${told.label}, ${percent(sorted[0][1])}`;
  const warned = told.warnings.length ? "Unusual image: do not rely on the answer. " : "";
  state(abstains ? "abstained" : told.warnings.length ? "warning" : "answer", warned + words);
}

function row(name, p, first) {
  const made = make("tr", undefined, first ? "first" : "");
  const head = make("th", name);
  head.scope = "row";
  const cell = make("td");
  const line = make("div", undefined, "row");
  const track = make("div", undefined, "track");
  track.setAttribute("aria-hidden", "true");
  const bar = make("div", undefined, "bar");
  bar.style.width = `${100 * p}%`;
  track.append(bar);
  line.append(track, make("span", percent(p)));
  cell.append(line);
  made.append(head, cell);
  return made;
}

function fade() {
  at("overlay").style.opacity = at("opacity").value / 100;
  at("percent").textContent = `${at("opacity").value} %`;
}

at("opacity").addEventListener("input", fade);
at("of").addEventListener("change", () => {
  explain(at("of").value, begin()).catch((e) => failed(e, () => ask(image)));
});
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) ask(file);
  at("file").value = ""; // the same file again is a change, too
});
at("file").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return; // Space does it by itself
  event.preventDefault();
  at("file").click();
});
at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = at("token").value.trim();
  at("token").value = "";
  if (/^[!-~]+$/.test(token)) {
    sessionStorage.setItem(TOKEN, token);
    enter();
  } else { // the browser could not send it
    wrong("Wrong token", "A token has plain letters, digits and signs alone, and no spaces. Enter it again.");
    at("token").focus();
  }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop" && !at("drop").hidden) {
      const { files } = event.dataTransfer;
      if (files.length === 1) ask(files[0]);
      else if (files.length) {
        begin();
        clear();
        failed(new Refused(400, `one image at a time, ${files.length} were dropped`));
      }
    }
  });
}
fade();
enter();
