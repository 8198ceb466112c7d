"use strict";
// Keys for the buttons and links that the page has anyway; they can be switched off, and the choice is remembered.
(() => {
  const form = document.getElementById("label");
  if (!form) return;
  const note = document.getElementById("note");
  const keys = document.getElementById("keys");
  keys.checked = localStorage.getItem("keys") !== "off";
  keys.addEventListener("change", () => localStorage.setItem("keys", keys.checked ? "on" : "off"));
  let isSent = false;
  form.addEventListener("submit", (event) => {
    if (isSent) event.preventDefault(); // a key held down labels one pair only
    isSent = true;
  });
  const follow = (relation) => document.querySelector(`a[rel=${relation}]`)?.click();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement === note) return note.blur();
    if (!keys.checked || event.repeat || event.ctrlKey || event.altKey || event.metaKey || document.activeElement === note) return;
    if (event.key === "ArrowLeft") follow("prev");
    else if (event.key === "ArrowRight") follow("next");
    else if (event.key === "n") note.focus();
    else {
      const button = form.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
      if (!button) return;
      form.requestSubmit(button);
    }
    event.preventDefault();
  });
})();
