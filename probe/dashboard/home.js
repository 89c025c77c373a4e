import { LIVE, carried, counterpart, lines, pause } from "./following.js";

// The player's home in Streamlit: payloads come from our own routes, the state goes into the address.
// A recording that grows is asked for again, and a player that has more steps takes the other's place.
const homes = new WeakMap();
const sleep = (/** @type {number} */ time) => new Promise((done) => setTimeout(done, time));
const CONTROLS = "button, select, input, summary, canvas, [tabindex]";

export default async function ({ data, parentElement }) {
  const had = homes.get(parentElement);
  if (had && had.id === data.id) {
    had.player?.repaint();
    return had.clean;
  }
  had?.clean();
  const home = settle(parentElement, data);
  homes.set(parentElement, home);
  try {
    await Promise.all(home.runs.map((run) => home.fetch(run)));
    if (!home.ended) home.begin();
  } catch (error) {
    home.tell(String(error.message ?? error));
  }
  return home.clean;
}

/** A home without a player in it. */
function settle(parent, data) {
  const runs = data.runs.map((/** @type {string} */ id) => ({ id, tag: "", opened: null, took: 0, failures: 0, problem: "", next: 0 }));
  const home = { id: data.id, runs, player: null, ended: false, fetch: load, begin, tell, clean };
  const told = make("div", "following", "", parent);
  let pressed = false, asking = 0;
  const press = (/** @type {Event} */ event) => { pressed = event.type === "pointerdown"; };
  const PRESSES = ["pointerdown", "pointerup", "pointercancel"];
  for (const name of PRESSES) addEventListener(name, press, true);

  function clean() {
    home.ended = true;
    home.player?.destroy();
    told.remove();
    for (const name of PRESSES) removeEventListener(name, press, true);
    if (homes.get(parent) === home) homes.delete(parent);
  }

  /** Ask for a run; true if there is something new. */
  async function load(run) {
    const began = performance.now();
    const answer = await fetch(address("run", { run: run.id }), { headers: run.tag ? { "If-None-Match": run.tag } : {} });
    if (answer.status === 304) return false;
    if (!answer.ok) throw Error(await answer.text());
    run.opened = await open(new Uint8Array(await answer.arrayBuffer()));
    [run.tag, run.took] = [answer.headers.get("etag") ?? "", performance.now() - began];
    return true;
  }

  function begin() {
    const { steps, following } = runs[0].opened.meta;
    const wished = fromAddress(location.search, steps);
    if (!(wished.step >= 0) && LIVE.includes(following.state)) wished.step = steps.length - 1;
    home.player = stand(parent, wished);
    tell();
    follow();
  }

  /** A player in an element. */
  function stand(element, state) {
    const { steps } = runs[0].opened.meta;
    const copies = runs.map(({ opened }) => ({ meta: opened.meta, parts: { ...opened.parts } }));
    const keep = (/** @type {any} */ now) => history.replaceState(history.state, "", toAddress(location.search, now, steps) + location.hash);
    const player = mount(element, copies, {
      state,
      changed: keep,
      ask: async (run, { what, ...fields }) => {
        asking += 1;
        try {
          const answer = await fetch(address(what, { run: runs[run].id, ...fields }));
          if (!answer.ok) throw Error(await answer.text());
          return new Uint8Array(await answer.arrayBuffer());
        } finally {
          asking -= 1;
        }
      },
    });
    player.box.classList.add("streamlit");
    return { ...player, steps, keep };
  }

  /** Say how far the recordings are, or what is wrong. */
  function tell(problem = "") {
    const rows = problem ? [{ state: "problem", text: problem, command: "" }] : lines(runs.map((run) => ({ name: run.opened.meta.name, following: run.opened.meta.following, problem: run.problem })));
    if (told.dataset.said === JSON.stringify(rows)) return;
    told.dataset.said = JSON.stringify(rows);
    told.replaceChildren(...rows.map(({ state, text, command }) => {
      const row = make("p", state, text);
      if (command) make("code", "", command, row);
      return row;
    }));
  }

  /** Ask again and again, while the page is seen, until every run is complete. */
  async function follow() {
    const wait = (run) => { run.next = performance.now() + pause(run.opened.meta.following.state, run.took, run.failures); };
    runs.forEach(wait);
    for (;;) {
      const next = Math.min(...runs.map((run) => run.next));
      if (next === Infinity) return;
      await sleep(Math.max(0, next - performance.now()));
      await visible();
      if (home.ended) return;
      let grown = false;
      for (const run of runs.filter((one) => one.next <= performance.now())) {
        try {
          grown = (await load(run)) || grown;
          [run.failures, run.problem] = [0, ""];
        } catch (error) {
          run.failures += 1;
          run.problem = error instanceof TypeError ? "The server does not answer. Start it again: probe view." : String(error.message ?? error);
        }
        wait(run);
      }
      if (home.ended) return;
      if (grown) await grow();
      tell();
    }
  }

  /** Let a player with what is new take the place of the one that is seen, once it has drawn all. */
  async function grow() {
    while (!home.ended) {
      const old = home.player;
      const given = { ...old.state };
      const { steps } = runs[0].opened.meta;
      const holder = make("div", "next", "");
      holder.inert = true;
      holder.style.width = `${old.box.clientWidth}px`;
      old.box.before(holder);
      const player = stand(holder, carried(old.state, old.steps, steps));
      keepChoices(old.box, player.box);
      const until = performance.now() + 2000;
      do await sleep(40); while (asking && performance.now() < until && !home.ended);
      while (!home.ended && busy(old.box)) await sleep(100);
      const same = ["reading", "branch", "per"].every((name) => given[name] === old.state?.[name]);
      if (home.ended || !same) {
        player.destroy();
        holder.remove();
        continue;
      }
      const wished = carried(old.state, old.steps, steps);
      if (player.state && old.state && Object.keys(wished).some((name) => wished[name] !== player.state[name])) player.choose(wished);
      swap(old, player, holder);
      home.player = player;
      return;
    }
  }
  /** Whether the reader's hand is on the player. */
  const busy = (box) => pressed || box.querySelector(OPEN_SELECT) !== null;

  function swap(old, player, holder) {
    const focused = /** @type {any} */ (parent.getRootNode()).activeElement;
    const inside = focused && old.box.contains(focused);
    const [before, after] = [old.box, player.box].map((box) => [...box.querySelectorAll(CONTROLS)]);
    const there = focused === old.box ? player.box : after[counterpart(before.map(named), before.indexOf(focused), after.map(named))];
    const playing = old.box.querySelector(".play")?.textContent.includes("Pause");
    holder.inert = false;
    old.box.replaceWith(player.box);
    old.destroy();
    holder.remove();
    if (inside) (there ?? player.box).focus({ preventScroll: true });
    if (player.state && new URLSearchParams(location.search).has("step")) player.keep(player.state);
    if (playing && player.state.step < player.steps.length - 1) player.box.querySelector(".play").click();
  }
  return home;
}

const address = (what, fields) => `/probe/${what}?${new URLSearchParams(fields)}`;
const OPEN_SELECT = CSS.supports("selector(select:open)") ? "select:open" : "select.open-is-not-known";
/** A control by what it is and is called. */
const named = (/** @type {Element} */ one) => `${one.tagName} ${one.getAttribute("aria-label") ?? (one.matches(".play") ? "play" : one.textContent)}`;

/** Choose in a new player what the old one has chosen beyond its state: speed, a channel, the wipe. */
function keepChoices(old, fresh) {
  const all = (/** @type {Element} */ box) => [...box.querySelectorAll("select[aria-label], input[aria-label]")];
  const [before, after] = [all(old), all(fresh)];
  const alike = (/** @type {Element[]} */ list, /** @type {Element} */ one) => list.filter((other) => named(other) === named(one));
  for (const one of before) {
    const other = alike(after, one)[alike(before, one).indexOf(one)]; // the second of two runs has its own
    if (!other || one.getAttribute("aria-label") === "Step" || other.value === one.value) continue;
    other.value = one.value;
    other.dispatchEvent(new Event(one.tagName === "SELECT" ? "change" : "input"));
  }
  [...old.querySelectorAll("details")].forEach((one, i) => { if (fresh.querySelectorAll("details")[i]) fresh.querySelectorAll("details")[i].open = one.open; });
}

/** Wait until the page is seen. */
const visible = () => new Promise((done) => {
  const look = () => {
    if (document.visibilityState !== "visible") return;
    document.removeEventListener("visibilitychange", look);
    done(undefined);
  };
  document.addEventListener("visibilitychange", look);
  look();
});
