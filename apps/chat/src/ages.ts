/** Groups conversations by the age of their last message. */

import type { Summary } from "./types";

const DAY_MS = 86_400_000;

/** Groups in the order of the summaries, the latest first; empty groups are omitted. */
export function byAge(summaries: readonly Summary[], now = new Date()): [string, Summary[]][] {
  const today = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime();
  const groups = new Map<string, Summary[]>();
  for (const summary of summaries) {
    const age = nameOf(Math.ceil((today - summary.updated * 1000) / DAY_MS));
    if (!groups.has(age)) groups.set(age, []);
    groups.get(age)!.push(summary);
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
