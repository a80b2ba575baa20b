"use strict";
// Show one pair of plans at a time, the one that is chosen. Without this script all are shown.
const [first, second] = ["first", "second"].map((id) => document.getElementById(id));
const pairs = [...document.querySelectorAll("[data-pair]")];

function show() {
  const chosen = [first.value, second.value];
  for (const pair of pairs) {
    pair.hidden = !pair.dataset.pair.split(" ").every((name) => chosen.includes(name));
  }
  document.getElementById("one-plan").hidden = chosen[0] !== chosen[1];
}

if (pairs.length > 1) {
  document.getElementById("choose").hidden = false;
  [first.selectedIndex, second.selectedIndex] = [0, 1];
  first.addEventListener("change", show);
  second.addEventListener("change", show);
  show();
}
