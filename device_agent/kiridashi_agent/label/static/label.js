"use strict";
// Keys for the buttons, and nothing is answered unseen: a second tap, or one before the frame has been there for a
// moment, does not count.
(() => {
  const GUARD_MS = 350;
  let shown = Infinity;
  let sent = false;

  window.addEventListener("load", () => { shown = performance.now(); });

  document.addEventListener("submit", (event) => {
    const early = performance.now() - shown < GUARD_MS && event.target.matches(".answers, .undo");
    if (sent || early) {
      event.preventDefault();
      return;
    }
    sent = true;
    document.body.classList.add("sent");
    if (event.submitter) event.submitter.classList.add("pressed");
  });

  const list = document.querySelector(".scroll");
  const look = () => list.classList.toggle("more", list.scrollTop + list.clientHeight < list.scrollHeight - 8);
  if (list) {
    list.addEventListener("scroll", look);
    window.addEventListener("resize", look);
    look();
  }

  window.addEventListener("pageshow", (event) => {
    if (event.persisted) location.reload();
  });

  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input")) return;
    const key = event.key === "Backspace" ? "z" : event.key.toLowerCase();
    if (!/^[1-9unz]$/.test(key)) return;
    const button = document.querySelector(`button[data-key="${key}"]`);
    if (!button) return;
    event.preventDefault();
    button.click();
  });
})();
