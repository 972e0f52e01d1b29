// The only script of our own: a button that copies the command beside it.
"use strict";
for (const box of document.querySelectorAll(".command")) {
  const button = box.querySelector("button");
  const code = box.querySelector("code");
  if (!button || !code || !navigator.clipboard) continue;
  button.classList.remove("waits");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent.trim());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
