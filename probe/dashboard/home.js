
// The player's home in Streamlit: payloads come from our own routes, the state goes into the address.
const homes = new WeakMap();

export default async function ({ data, parentElement }) {
  const had = homes.get(parentElement);
  if (had && had.id === data.id) {
    had.player?.repaint();
    return had.clean;
  }
  had?.player?.destroy();
  const home = { id: data.id, player: null, clean: () => {} };
  home.clean = () => {
    home.player?.destroy();
    homes.delete(parentElement);
  };
  homes.set(parentElement, home);
  const get = async (/** @type {string} */ path) => {
    const answer = await fetch(path);
    if (!answer.ok) throw Error(await answer.text());
    return new Uint8Array(await answer.arrayBuffer());
  };
  const address = (what, fields) => `/probe/${what}?${new URLSearchParams(fields)}`;
  parentElement.querySelector(":scope > .problem")?.remove();
  try {
    const runs = await Promise.all(data.runs.map(async (run) => open(await get(address("run", { run })))));
    if (homes.get(parentElement) !== home) return home.clean;
    const { steps } = runs[0].meta;
    home.player = mount(parentElement, runs, {
      state: fromAddress(location.search, steps),
      ask: (run, { what, ...fields }) => get(address(what, { run: data.runs[run], ...fields })),
      changed: (now) => history.replaceState(history.state, "", toAddress(location.search, now, steps) + location.hash),
    });
    home.player.box.classList.add("streamlit");
  } catch (error) {
    const problem = document.createElement("p");
    problem.className = "problem";
    problem.textContent = String(error.message ?? error);
    parentElement.append(problem);
  }
  return home.clean;
}
