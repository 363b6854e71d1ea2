/** Puts conversations under headings by when they were last added to. */

import type { Summary } from "./types";

const DAY_MS = 86_400_000;

/** The latest first, as they come; headings that nothing stands under are left out. */
export function byAge(found: readonly Summary[], now = new Date()): [string, Summary[]][] {
  const today = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime();
  const groups = new Map<string, Summary[]>();
  for (const each of found) {
    const age = nameOf(Math.ceil((today - each.updated * 1000) / DAY_MS));
    if (!groups.has(age)) groups.set(age, []);
    groups.get(age)!.push(each);
  }
  return [...groups];
}

function nameOf(days: number): string {
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days <= 7) return "Last 7 days";
  if (days <= 30) return "Last 30 days";
  return "Older";
}
