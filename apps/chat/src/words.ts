/** Text helpers of the page. */

/** A count with its noun: "1 draft", "2 drafts". */
export function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
