// Not a module: it runs before anything is painted, so that a page in the dark does not flash.
(() => {
  const chosen = localStorage.getItem("switchboard-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
