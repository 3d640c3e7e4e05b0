// A term of the glossary shows its sentence when it is pointed at, focused or tapped. Without this file it is a link.
document.addEventListener("DOMContentLoaded", () => {
  const bubble = document.createElement("div");
  bubble.className = "term-bubble";
  bubble.id = "term-bubble";
  bubble.setAttribute("role", "tooltip");
  bubble.hidden = true;
  document.body.append(bubble);
  let shown = null;

  const hide = () => {
    shown?.removeAttribute("aria-describedby");
    bubble.hidden = true;
    shown = null;
  };
  const stand = () => {
    if (!shown) return;
    const place = shown.getBoundingClientRect();
    const left = Math.min(place.left, document.documentElement.clientWidth - bubble.offsetWidth - 8);
    const below = place.bottom + bubble.offsetHeight + 12 < window.innerHeight;
    bubble.style.left = `${Math.max(8, left)}px`;
    bubble.style.top = `${below ? place.bottom + 6 : place.top - bubble.offsetHeight - 6}px`;
  };
  const show = (link) => {
    if (shown === link) return;
    hide();
    shown = link;
    bubble.textContent = link.dataset.meaning;
    bubble.hidden = false;
    link.setAttribute("aria-describedby", bubble.id);
    stand();
  };

  for (const link of document.querySelectorAll("a.term-link[title]")) {
    link.dataset.meaning = link.title;
    link.removeAttribute("title"); // else the browser would show it a second time
    link.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && show(link));
    link.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hide());
    link.addEventListener("focus", () => show(link));
    link.addEventListener("blur", hide);
    let tapped = false;
    link.addEventListener("pointerdown", (event) => { tapped = event.pointerType === "touch"; });
    link.addEventListener("click", (event) => {
      if (!tapped) return;
      event.preventDefault(); // the first tap explains; the glossary is in the sidebar
      show(link);
    });
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", stand, { passive: true });
  document.addEventListener("pointerdown", (event) => event.target.closest("a.term-link") || hide());
});
