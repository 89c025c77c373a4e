// A study's cells as a table of pictures or numbers. Rows are made when they come into view.
const study = JSON.parse(document.getElementById("study").textContent);
const { axes, cells, heat, measures } = study;
const AT_ONCE = 24; // rows of a page
const byPlace = new Map(cells.map((cell) => [cell.place.join(), cell]));
const state = { rows: study.rows, columns: study.columns, fixed: axes.map(() => 0), show: "" };

const element = (kind, text = "", more = {}) => {
  const made = Object.assign(document.createElement(kind), more);
  if (text) made.textContent = text;
  return made;
};

const number = (value) =>
  typeof value === "number" ? String(Number(value.toPrecision(4))) : (value ?? "");

const colour = (share) => {
  const at = Math.min(Math.max(share, 0), 1) * (heat.length - 1);
  const low = Math.min(Math.floor(at), heat.length - 2);
  return heat[low].map((part, i) => Math.round(part + (heat[low + 1][i] - part) * (at - low)));
};

const choice = (name, options, chosen, changed) => {
  const label = element("label", name);
  const select = element("select");
  select.name = name;
  options.forEach(([value, text]) => select.append(element("option", text, { value })));
  select.value = chosen;
  select.addEventListener("change", () => { changed(select.value); draw(); });
  label.append(select);
  return label;
};

const drawControls = () => {
  const controls = document.getElementById("controls");
  const names = [["-1", "none"], ...axes.map((axis, i) => [String(i), axis.name])];
  const other = (from, to) => (value) => {
    if (Number(value) === state[to]) state[to] = state[from]; // two axes change places
    state[from] = Number(value);
    drawControls();
  };
  const shown = [["", "pictures"], ...measures.map((name) => [name, name])];
  controls.replaceChildren(
    choice("Rows", names, String(state.rows), other("rows", "columns")),
    choice("Columns", names, String(state.columns), other("columns", "rows")),
    ...axes.flatMap((axis, i) => i === state.rows || i === state.columns ? [] : [
      choice(axis.name, axis.labels.map((label, at) => [String(at), label]),
        String(state.fixed[i]), (value) => { state.fixed[i] = Number(value); }),
    ]),
    choice("Show", shown, state.show, (value) => { state.show = value; }),
  );
};

const detail = (cell) => {
  const lines = axes.map((axis, i) => `${axis.name}: ${axis.labels[cell.place[i]]}`);
  lines.push(`status: ${cell.status}${cell.cause ? `: ${cell.cause}` : ""}`);
  Object.entries(cell.measures).forEach(([name, value]) => lines.push(`${name}: ${number(value)}`));
  if (cell.run) lines.push(`recording: ${cell.run}`);
  document.getElementById("detail").textContent = lines.join("\n");
};

const drawn = (cell, range) => {
  const button = element("button", "", { className: "cell", type: "button" });
  const held = cell && document.getElementById(`picture${cell.number}`);
  if (cell && state.show) {
    const value = cell.measures[state.show];
    const span = element("span", typeof value === "number" ? number(value) : value || cell.status);
    if (typeof value === "number") {
      const [red, green, blue] = colour((value - range[0]) / (range[1] - range[0] || 1));
      button.style.background = `rgb(${red}, ${green}, ${blue})`;
      button.style.color = red * 0.3 + green * 0.6 + blue * 0.1 > 130 ? "#000" : "#fff";
    }
    button.append(span);
  } else if (held) {
    const { width, height } = cell;
    const src = `data:image/webp;base64,${held.textContent}`;
    button.append(element("img", "", { src, width, height, alt: cell.title }));
  } else {
    button.append(element("span", cell ? cell.empty : "missing"));
  }
  if (cell) {
    button.title = cell.title;
    button.addEventListener("click", () => {
      document.querySelectorAll(".cell[aria-pressed]").forEach((b) => b.removeAttribute("aria-pressed"));
      button.setAttribute("aria-pressed", "true");
      detail(cell);
    });
  }
  return button;
};

// Append rows to a table, a page at a time, as their end comes into view.
const pagewise = (body, count, row) => {
  let done = 0;
  const end = element("tr");
  const more = () => {
    const until = Math.min(done + AT_ONCE, count);
    for (; done < until; done++) end.before(row(done));
    if (done >= count) { watch.disconnect(); end.remove(); }
  };
  const watch = new IntersectionObserver((seen) => { if (seen.some((s) => s.isIntersecting)) more(); },
    { rootMargin: "400px" });
  body.replaceChildren(end);
  more();
  if (done < count) watch.observe(end);
};

const labels = (axis) => (axis < 0 ? [""] : axes[axis].labels);

const draw = () => {
  const across = labels(state.columns);
  const down = labels(state.rows);
  const values = cells.map((cell) => cell.measures[state.show]).filter((v) => typeof v === "number");
  const range = [Math.min(...values), Math.max(...values)];
  const name = (axis) => (axis < 0 ? "" : axes[axis].name);
  const head = element("tr");
  head.append(element("th", [name(state.rows), name(state.columns)].filter(Boolean).join(" \\ ")),
    ...across.map((label) => element("th", label, { scope: "col" })));
  document.getElementById("head").replaceChildren(head);
  pagewise(document.getElementById("body"), down.length, (row) => {
    const line = element("tr");
    line.append(element("th", down[row], { scope: "row" }));
    across.forEach((_, column) => {
      const place = [...state.fixed];
      if (state.rows >= 0) place[state.rows] = row;
      if (state.columns >= 0) place[state.columns] = column;
      const at = element("td");
      at.append(drawn(byPlace.get(place.join()), range));
      line.append(at);
    });
    return line;
  });
};

const drawNumbers = () => {
  const head = element("tr");
  const names = [...axes.map((axis) => axis.name), "status", ...measures];
  head.append(...names.map((name) => element("th", name, { scope: "col" })));
  document.getElementById("names").replaceChildren(head);
  pagewise(document.getElementById("numbers"), cells.length, (at) => {
    const cell = cells[at];
    const line = element("tr");
    line.append(...cell.place.map((where, i) => element("td", axes[i].labels[where])),
      element("td", cell.status),
      ...measures.map((name) => element("td", String(number(cell.measures[name])))));
    return line;
  });
};

drawControls();
draw();
drawNumbers();
