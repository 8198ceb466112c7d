"use strict";
// Filters the list of questions. Without scripts the whole list is shown, worst regressions first.
(() => {
  const form = document.getElementById("filters");
  const list = document.getElementById("cases");
  const status = document.getElementById("shown");
  const cases = Array.from(list.children);
  const fits = {
    all: () => true,
    worse: (item) => item.dataset.outcome === "worse",
    better: (item) => item.dataset.outcome === "better",
    unanswerable: (item) => item.dataset.kind === "unanswerable",
    wrong: (item) => item.dataset.wrong === "yes",
  };
  const apply = () => {
    const wanted = new FormData(form);
    const words = wanted.get("words").trim().toLowerCase();
    const ordered = wanted.get("outcome") === "better" ? cases.slice().reverse() : cases;
    let count = 0;
    for (const item of ordered) {
      const isShown =
        fits[wanted.get("outcome")](item) &&
        (!wanted.get("document") || item.dataset.document === wanted.get("document")) &&
        (!words || item.textContent.toLowerCase().includes(words));
      item.hidden = !isShown;
      count += isShown;
    }
    list.append(...ordered);
    status.textContent = `${count} of ${cases.length} questions`;
  };
  const openAll = (isOpen) => {
    for (const item of cases) if (!item.hidden) item.firstElementChild.open = isOpen;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("open").addEventListener("click", () => openAll(true));
  document.getElementById("close").addEventListener("click", () => openAll(false));
  apply();
})();
