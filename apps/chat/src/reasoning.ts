/** The reasoning in an answer, which is shown folded. */

import type { Message } from "./types";

export interface Parts {
  reasoning: string;
  /** The text without the reasoning and its marks. */
  content: string;
  /** Where in the text the content begins. */
  from: number;
  /** Whether the reasoning has no closing mark yet. */
  open: boolean;
}

/** Split the text of a message by the last span of its steps; offsets count code points. */
export function splitReasoning({ text, groups }: Pick<Message, "text" | "groups">): Parts {
  const span = groups.findLast((group) => group.span)?.span;
  if (!span) return { reasoning: "", content: text, from: 0, open: false };
  const letters = [...text];
  const part = (start: number, end?: number) => letters.slice(start, end).join("");
  const [opening, inner, end = letters.length, after = letters.length] = span;
  const before = part(0, opening).trim() ? part(0, opening) : "";
  return {
    reasoning: part(inner, end),
    content: before + part(after),
    from: before ? 0 : part(0, after).length,
    open: span.length === 2,
  };
}
