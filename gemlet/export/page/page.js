// The page: load the model beside it, tell stories with it. All computing is wllama's, in a worker of its own.
"use strict";

const element = (id) => document.getElementById(id);
const [form, prompt, tell, stop] = ["form", "prompt", "tell", "stop"].map(element);
const [progress, status, story, begun, told] = ["progress", "status", "story", "begun", "told"].map(element);

let wllama = null; // once the model is loaded
let telling = null; // the AbortController of the story that is being told

function say(message, error = false) {
  status.textContent = message;
  status.classList.toggle("error", error);
}

/** Files of the server, as Blobs; `loaded(fraction)` is called while they come. */
function download(names, loaded) {
  let [received, size] = [0, 0];
  return Promise.all(
    names.map(async (name) => {
      const answer = await fetch(name, { cache: "no-cache" }).catch(() => {
        throw new Error("The server does not answer. Is it still running?");
      });
      if (!answer.ok) {
        throw new Error(`The server has no ${name} (it says ${answer.status}). Was the whole folder put on it?`);
      }
      size += Number(answer.headers.get("Content-Length")); // of what is sent, which may be compressed
      const parts = [];
      for (const reader = answer.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) return new Blob(parts, { type: answer.headers.get("Content-Type") });
        parts.push(value);
        received += value.length;
        loaded(Math.min(1, received / size));
      }
    }),
  );
}

/** wllama, from the addresses of its two programs: one for most browsers, one for Safari. */
function engine(Wllama, standard, compat, logger) {
  const none = {}; // in place of a store: browsers have one for https and localhost alone, and the page needs none
  const made = new Wllama({ default: standard }, { logger, cacheManager: none, modelManager: none });
  made.setCompat({ worker: "wllama/compat.js", wasm: compat }); // unless told, it would ask a far server for it
  return made;
}

async function load() {
  say("Loading the model…");
  progress.hidden = false;
  const { Wllama } = await import("./wllama/index.js").catch((error) => {
    throw new Error(`wllama/index.js does not run (${error.message}). Was the whole folder put on the server?`);
  });
  const files = ["wllama/wllama.wasm", "wllama/compat.wasm"];
  const name = engine(Wllama, ...files).getWorkerResources().compat ? files[1] : files[0];
  const [program, model] = await download([name, "model.gguf"], (fraction) => (progress.value = fraction));
  progress.removeAttribute("value"); // starting takes a moment of unknown length

  // wllama does not notice every failure of its program and of llama.cpp; what they say is all there is to go by.
  const complaints = [];
  let abort;
  const aborted = new Promise((_, reject) => (abort = reject));
  const hear = (line) => String(line).startsWith("Aborted(") && abort(new Error(line));
  const logger = { debug() {}, log: hear, warn: hear, error: (...words) => complaints.push(words.join(" ")) };
  const address = URL.createObjectURL(program);
  const made = engine(Wllama, address, address, logger);
  const options = {
    n_ctx: Number(element("context").dataset.tokens),
    n_parallel: 1,
    n_gpu_layers: 0, // the same arithmetic in every browser
    cache_type_k: "f32",
    cache_type_v: "f32",
    log_level: 4, // errors
  };
  try {
    await Promise.race([made.loadModel([model], options), aborted]);
    if (!made.getLoadedContextInfo().success) throw new Error(complaints[0] ?? "no reason given");
  } catch (error) {
    throw new Error(`The model does not start in this browser (${error.message}). A newer one, or another, may do it.`);
  }
  URL.revokeObjectURL(address);
  wllama = made;
}

/** Settings as llama.cpp's server names them. The samplers and their order are those of `gemlet generate`. */
function settings() {
  const any = crypto.getRandomValues(new Uint32Array(1))[0] % 4294967295;
  return {
    temperature: element("temperature").valueAsNumber,
    top_p: element("top-p").valueAsNumber,
    seed: element("seed").value === "" ? any : element("seed").valueAsNumber,
    samplers: ["temperature", "top_p"],
    cache_prompt: false, // with what an earlier story left in the cache, the last bits would differ
  };
}

/** What ended a story early, for whoever reads the page. */
function explained(error) {
  const message = error.message ?? String(error);
  const [, needed, context] = message.match(/\((\d+) tokens\) exceeds .* \((\d+) tokens\)/) ?? [];
  if (needed) return `The beginning is too long: it has ${needed} tokens, and the model can read ${context}.`;
  // What is not UTF-8 leaves wllama without an answer: it takes the bytes of "GLUE", its request, for a length.
  if (message.includes("1163217991")) return "Here the model wrote bytes that are not text. Another seed may go on.";
  return `The story broke off: ${message}. If it does so again, reload the page.`;
}

async function run() {
  const chosen = settings();
  telling = new AbortController();
  tell.disabled = true;
  stop.disabled = false;
  story.hidden = false;
  story.setAttribute("aria-busy", "true");
  begun.textContent = prompt.value;
  told.textContent = "";
  say("Reading the beginning…");
  let [tokens, rate, ending] = [0, 0, ""];
  try {
    await wllama.createCompletion({
      prompt: prompt.value,
      ...chosen,
      stream: true,
      timings_per_token: true,
      abortSignal: telling.signal,
      onData({ choices: [choice], timings }) {
        if (choice) {
          told.append(choice.text);
          if (choice.finish_reason === "length") ending = ", up to the end of the model's context";
        }
        if (timings) [tokens, rate] = [timings.predicted_n, timings.predicted_per_second];
        say(`${tokens} tokens, ${Math.round(rate)} tokens/s`);
      },
    });
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    ending = ", stopped";
  } finally {
    telling = null;
    tell.disabled = false;
    stop.disabled = true;
    story.setAttribute("aria-busy", "false");
  }
  say(`${tokens} tokens, ${Math.round(rate)} tokens/s, seed ${chosen.seed}${ending}`);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (wllama && !telling) {
    run().catch((error) => say(explained(error), true));
  }
});
stop.addEventListener("click", () => telling?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") telling?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
for (const button of element("beginnings").children) {
  button.addEventListener("click", () => {
    prompt.value = button.textContent;
    form.requestSubmit();
  });
}
for (const output of form.querySelectorAll("output")) {
  const slider = element(output.htmlFor.value);
  const show = () => (output.value = slider.value);
  slider.addEventListener("input", show);
  show(); // a reloaded page keeps what was set
}

// A page that was opened as a file keeps the advice that stands in the status from the beginning.
if (location.protocol.startsWith("http")) {
  load()
    .then(() => {
      say("Ready.");
      tell.disabled = false;
    })
    .catch((error) => say(error.message, true))
    .finally(() => (progress.hidden = true));
}
