// Elements without markup in strings: whatever a request is called, it is text.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `properties` are attributes, but for `class`, `text` and functions, which listen. Those that are null are left out. */
export function el(tag, properties = {}, ...children) {
  return furnished(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  return furnished(document.createElementNS(SVG, tag), properties, children);
}

function furnished(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "text") element.textContent = value;
    else if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Writes only what differs, so that nothing that is selected or announced is disturbed. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/**
 * Makes the children of `parent` those of `items`, in order. Who has a key keeps its element, and with it the focus, wherever it goes;
 * `make(item)` makes one, `update(element, item)` writes into it.
 */
export function reconcile(parent, items, { key, make, update }) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const focused = document.activeElement;
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let element = known.get(name);
    known.delete(name);
    if (element === undefined) {
      element = make(item);
      element.dataset.key = name;
    }
    update(element, item);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const gone of known.values()) gone.remove();
  // What is moved loses it.
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}
