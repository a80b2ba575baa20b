// Patches that are kept or not, over the picture as the model sees it. value: a list such as 3/7-12.
// A drag paints what its first patch became. With the keyboard: arrows move, Space or Enter turns
// a patch on or off, and with Shift an arrow paints along.
const board = element.querySelector(".board");
const count = element.querySelector(".count");
let kept = new Set(); // numbers of patches
let painting = null; // true: patches are put in, false: taken out, null: nothing is painted
let at = 0; // the patch that Tab reaches

function read(text) {
  const found = new Set();
  for (const part of text.split("/")) {
    const [first, last] = part.split("-").map(Number);
    for (let p = first; part && p <= (last ?? first) && p < props.grid ** 2; p++) found.add(p);
  }
  return found;
}

function write() {
  const runs = [];
  for (const p of [...kept].sort((a, b) => a - b)) {
    const run = runs[runs.length - 1];
    if (run && run[1] === p - 1) run[1] = p;
    else runs.push([p, p]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join("/");
}

function show() {
  for (const [p, cell] of [...board.children].entries()) {
    cell.setAttribute("aria-checked", kept.has(p));
    cell.tabIndex = p === at ? 0 : -1;
  }
  count.textContent = `${kept.size} of ${props.grid ** 2} patches kept`;
}

function build() {
  const n = props.grid ** 2;
  board.style.gridTemplateColumns = `repeat(${props.grid}, 1fr)`;
  board.style.backgroundImage = `url(${props.image})`;
  if (board.children.length !== n) {
    at = 0;
    board.replaceChildren(
      ...Array.from({ length: n }, (_, p) => {
        const cell = document.createElement("div");
        cell.setAttribute("role", "checkbox");
        cell.setAttribute(
          "aria-label",
          `patch ${p}, row ${Math.floor(p / props.grid) + 1}, column ${(p % props.grid) + 1}`,
        );
        return cell;
      }),
    );
  }
  kept = read(props.value || "");
  show();
}

function set(p, on) {
  if (on) kept.add(p);
  else kept.delete(p);
  show();
}

function finish() {
  if (painting === null) return;
  painting = null;
  props.value = write();
  trigger("input");
}

function cellAt(event) {
  const cell = document.elementFromPoint(event.clientX, event.clientY);
  return cell && cell.parentElement === board ? [...board.children].indexOf(cell) : -1;
}

board.addEventListener("pointerdown", (event) => {
  const p = cellAt(event);
  if (p < 0 || event.button) return;
  painting = !kept.has(p);
  at = p;
  set(p, painting);
  board.children[p].focus({ preventScroll: true });
  event.preventDefault();
});
board.addEventListener("pointermove", (event) => {
  const p = painting === null ? -1 : cellAt(event);
  if (p >= 0 && kept.has(p) !== painting) set(p, painting);
});
window.addEventListener("pointerup", finish);
window.addEventListener("pointercancel", finish);

board.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -props.grid, ArrowDown: props.grid }[event.key];
  const g = props.grid;
  if (step) {
    const next = at + step;
    const wraps = Math.abs(step) === 1 && Math.floor(next / g) !== Math.floor(at / g);
    if (next >= 0 && next < g * g && !wraps) {
      const on = kept.has(at);
      at = next;
      set(at, event.shiftKey ? on : kept.has(at));
      board.children[at].focus();
      if (event.shiftKey) {
        painting = on;
        finish();
      }
    }
  } else if (event.key === " " || event.key === "Enter") {
    painting = !kept.has(at);
    set(at, painting);
    finish();
  } else return;
  event.preventDefault();
});

element.addEventListener("click", (event) => {
  const wanted = event.target.dataset ? event.target.dataset.keep : undefined;
  if (wanted === undefined) return;
  const all = [...Array(props.grid ** 2).keys()];
  kept = new Set(wanted === "all" ? all : wanted === "none" ? [] : all.filter((p) => !kept.has(p)));
  painting = true;
  show();
  finish();
});
watch(["value", "image", "grid"], build);
build();
