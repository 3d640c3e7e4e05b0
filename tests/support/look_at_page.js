// Evaluated in an open page by test_book.py. Returns what a reader would trip over.
async () => {
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  const article = document.querySelector("article") ?? document.body;
  const all = (selector) => [...article.querySelectorAll(selector)];
  const name = (element) => `${element.localName}.${element.className?.baseVal ?? element.className}: `
    + (element.innerText ?? "").trim().slice(0, 60);

  // Images without a text, or with a file name for one.
  const withoutAlt = all("img").filter((image) => {
    const alt = (image.getAttribute("alt") ?? "").trim();
    return !alt || /\.(svg|png|jpe?g|gif)$/i.test(alt) || /^(\.\.\/)*_images/.test(alt);
  }).map((image) => image.getAttribute("src"));

  // Prose in which markup was left standing, and equations that MathJax could not read.
  const markup = /\$\$|\\[([]|\\begin\{|#\s?\||\{(cite|ref|numref|eq|doc|term|prf:ref)[^}]*\}`/;
  const prose = all("p, li, td, th, dd, dt, figcaption, h1, h2, h3, h4").filter((element) => {
    const copy = element.cloneNode(true);
    copy.querySelectorAll("code, pre, script, style, mjx-container, p, li").forEach((inner) => inner.remove());
    return markup.test(copy.textContent);
  });
  const raw = [...prose, ...all("mjx-merror, [data-mjx-error]")].map(name);

  // What reaches past the window and does not lie in a box that scrolls.
  const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
  const inScroller = (element) => {
    for (let e = element; e && e !== article; e = e.parentElement) if (scrolls(e)) return true;
    return false;
  };
  const visible = (element) => element.checkVisibility() && element.getBoundingClientRect().width > 1;
  const sticksOut = (element) => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
  const tooWide = all("*").filter((e) => sticksOut(e) && visible(e) && !inScroller(e.parentElement) && !scrolls(e)
    && !e.closest("mjx-assistive-mml")).map(name);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth + 1 && !tooWide.length) tooWide.push(`the page: ${root.scrollWidth} px`);

  // Figures are drawn in black, and their twins for dark pages in white: what lies behind them must be the opposite.
  const colour = (element) => getComputedStyle(element).backgroundColor.match(/[\d.]+/g).map(Number);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, alpha = 1] = colour(e);
      if (alpha > 0.9) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const contrastWithBlack = ([r, g, b]) =>
    (0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05) / 0.05;
  const isTwin = (image) => image.getAttribute("src").endsWith(".dark.svg");
  const unreadable = (image) => isTwin(image) ? contrastWithBlack(behind(image)) > 3 : contrastWithBlack(behind(image)) < 7;
  const darkOnDark = all("img").filter((image) => visible(image) && unreadable(image))
    .map((image) => image.getAttribute("src"));

  // Text with less contrast than WCAG 2 asks for: 4.5, or 3 where it is large.
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const ownText = (element) => [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const faint = all("*").filter((element) => {
    if (!ownText(element) || !visible(element) || element.closest("mjx-container, svg, script, style, .headerlink, kbd, .search-button__kbd-shortcut")) return false;
    const style = getComputedStyle(element);
    const [r, g, b, alpha = 1] = style.color.match(/[\d.]+/g).map(Number);
    const ground = behind(element);
    const mixed = [r, g, b].map((value, i) => alpha * value + (1 - alpha) * ground[i]);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    return contrast(mixed, ground) < (large ? 3 : 4.5);
  }).map((element) => `${getComputedStyle(element).color} on ${behind(element)}: ${name(element)}`);

  // What a keyboard does not reach: boxes that scroll; and headers of tables that say nothing of what they head.
  const unreachable = [...all(".numbers, .pst-scrollable-table-container, pre").filter((box) => visible(box)
    && box.scrollWidth > box.clientWidth + 1 && scrolls(box) && box.tabIndex < 0),
    ...all("table.numbers th:not([scope])")].map(name);

  // Captions that nobody sees.
  const hiddenCaptions = all("figcaption, caption").filter((caption) => !caption.closest("details:not([open])")
    && !visible(caption)).map(name);

  return {
    hidden_captions: hiddenCaptions, faint, unreachable,
    without_alt: withoutAlt, raw, too_wide: tooWide, dark_on_dark: darkOnDark,
    theme: root.dataset.theme ?? "", stamp: { ...article.querySelector(".stamp")?.dataset },
  };
}
