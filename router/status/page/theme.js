// Before anything is drawn: the colours that were chosen here last, if any were; else the system's.
"use strict";
{
  const chosen = localStorage.getItem("baton-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
