// The theme button of every page: any element with data-theme-toggle switches between light and dark.
"use strict";
window.reasonkv = window.reasonkv || {};
(() => {
  const root = document.documentElement;
  const isDark = () =>
    (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  for (const button of document.querySelectorAll("[data-theme-toggle]")) {
    const label = () => {
      button.textContent = isDark() ? "Light" : "Dark";
      button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    };
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      label();
      window.dispatchEvent(new Event("themechange")); // what is drawn on a canvas draws itself again
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      label();
      window.dispatchEvent(new Event("themechange"));
    });
    label();
  }
})();
