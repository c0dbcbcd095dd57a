// Numbers as people read them.

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return `${trimmed(seconds * 1000, seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${trimmed(seconds, seconds < 10 ? 2 : 1)} s`;
  return span(seconds);
}

export function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export function ago(seconds) {
  if (seconds < 1.5) return "now";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} d ago`;
}

export const count = (number) => Math.round(number).toLocaleString("en-US");

export function compact(number) {
  if (number < 10 && number % 1) return number.toFixed(1);
  if (number < 10000) return count(number);
  if (number < 1e6) return `${trimmed(number / 1e3, number < 1e5 ? 1 : 0)} k`;
  return `${trimmed(number / 1e6, number < 1e8 ? 1 : 0)} M`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${unit === 0 || number >= 99.5 ? Math.round(number) : trimmed(number, number < 10 ? 2 : 1)} ${units[unit]}`;
}

/** 100 % is all of it. */
export const percent = (share) => `${share < 1 ? Math.min(99, Math.round(share * 100)) : 100} %`;

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** The ends of an id, by which people tell them apart. */
export const short = (id, most = 18) => (id.length <= most ? id : `${id.slice(0, most - 7)}…${id.slice(-6)}`);

const trimmed = (number, digits) => number.toFixed(digits).replace(/\.0+$/, "");
