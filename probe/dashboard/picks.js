// Presses of the buttons in the drawing of Anatomy: what was picked is told to the page, which draws
// anew, and the button that was pressed keeps the focus.
const listening = new WeakMap();

export default function ({ parentElement, setTriggerValue }) {
  listening.get(parentElement)?.();
  const BUTTON = ".anatomy [data-pick]";
  let wanted = null;

  function press(event) {
    const button = event.target.closest?.(BUTTON);
    if (!button) return;
    wanted = { ...button.dataset };
    setTriggerValue("picked", [wanted.pick, wanted.value]);
  }

  function leave(event) {
    if (event.target.closest && !event.target.closest(BUTTON)) wanted = null;
  }

  function keep() {
    if (!wanted || document.activeElement !== document.body) return;
    const again = [...document.querySelectorAll(BUTTON)].find(
      ({ dataset }) => dataset.pick === wanted.pick && dataset.value === wanted.value,
    );
    again?.focus({ preventScroll: true });
  }

  const drawn = new MutationObserver(keep);
  drawn.observe(document.body, { childList: true, subtree: true });
  document.addEventListener("click", press);
  document.addEventListener("pointerdown", leave, true);
  document.addEventListener("focusin", leave);
  document.body.dataset.picks = "on"; // from now on a press counts

  function stop() {
    delete document.body.dataset.picks;
    drawn.disconnect();
    document.removeEventListener("click", press);
    document.removeEventListener("pointerdown", leave, true);
    document.removeEventListener("focusin", leave);
    listening.delete(parentElement);
  }

  listening.set(parentElement, stop);
  return stop;
}
