/**
 * Underlines every step of an answer in its rendered Markdown, and maps a point to its step.
 *
 * Rendering removes Markdown's syntax and keeps the order of the text, so the shown text is aligned
 * with the source piece by piece.  The underlines are CSS highlights: the document is not changed.
 */

import { indexAt, stepEnds } from "./steps";
import type { Group } from "./types";

/** Characters of a text node that are contiguous in the source. */
interface Run {
  node: Text;
  start: number;
  source: number;
  length: number;
}

const NAMES = ["step-even", "step-odd", "step-one"] as const;
/** Search distance by number of characters: short matches are more often accidental. */
const LOOK_AHEAD: [number, number][] = [
  [8, 600],
  [3, 60],
  [2, 12],
  [1, 6],
];
const PROBE = LOOK_AHEAD[0]![0];

export const canMark = "highlights" in CSS;

/** The steps of one rendered answer. */
export class Marks {
  #runs: Run[] = [];
  #ends: number[] = [];
  #ranges: [string, AbstractRange][] = [];

  /** Underline the steps, and remove earlier underlines. */
  show(root: HTMLElement, source: string, groups: readonly Group[], from = 0): void {
    this.clear();
    this.#ends = stepEnds(groups);
    this.#runs = align(root, source, from);
    for (const run of this.#runs) this.#underline(run, groups);
    for (const [name, range] of this.#ranges) highlightOf(name).add(range);
  }

  /** Remove the underlines. */
  clear(): void {
    for (const [name, range] of this.#ranges) highlightOf(name).delete(range);
    this.#ranges = [];
  }

  /** Offset in the source of the text at a point of the window; null if there is none. */
  offsetAt(x: number, y: number): number | null {
    const caret = caretAt(x, y);
    const run =
      caret &&
      this.#runs.find(
        ({ node, start, length }) =>
          node === caret.node && caret.offset >= start && caret.offset < start + length,
      );
    return run ? run.source + caret.offset - run.start : null;
  }

  #underline(run: Run, groups: readonly Group[]): void {
    let offset = 0;
    while (offset < run.length) {
      const step = indexAt(this.#ends, run.source + offset);
      const group = groups[step];
      if (!group) return;
      const end = Math.min(run.length, this.#ends[step]! - run.source);
      const name = group.tokens.length < 2 ? "step-one" : step % 2 ? "step-odd" : "step-even";
      const range = new StaticRange({
        startContainer: run.node,
        startOffset: run.start + offset,
        endContainer: run.node,
        endOffset: run.start + end,
      });
      this.#ranges.push([name, range]);
      offset = end;
    }
  }
}

/** Align the shown text with the source, which begins at ``from``. */
export function align(root: HTMLElement, source: string, from = 0): Run[] {
  const runs: Run[] = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode() as Text | null; node; node = walker.nextNode() as Text | null) {
    const parent = node.parentElement;
    // Of a rendered formula only the source is in the text.
    if (parent?.closest(".katex") && parent.localName !== "annotation") continue;
    if (parent?.closest(".code-head") || (!node.data.trim() && !parent?.closest("pre"))) continue;
    from = alignNode(node, source, from, runs);
  }
  return runs;
}

function alignNode(node: Text, source: string, from: number, runs: Run[]): number {
  const text = node.data;
  let start = 0;
  while (start < text.length) {
    const match = findAhead(source, text.slice(start, start + PROBE), from);
    if (match < 0) {
      start += 1;
      continue;
    }
    let length = 1;
    while (start + length < text.length && text[start + length] === source[match + length]) length += 1;
    runs.push({ node, start, source: match, length });
    start += length;
    from = match + length;
  }
  return from;
}

/** The next offset of a text, or of its first characters, in the source; -1 if it is not nearby. */
function findAhead(source: string, text: string, from: number): number {
  for (const [characters, distance] of LOOK_AHEAD) {
    if (characters > text.length) continue;
    const match = source.slice(from, from + distance + characters).indexOf(text.slice(0, characters));
    if (match >= 0) return from + match;
  }
  return -1;
}

function highlightOf(name: string): Highlight {
  let highlight = CSS.highlights.get(name);
  if (!highlight) {
    highlight = new Highlight();
    CSS.highlights.set(name, highlight);
  }
  return highlight;
}

if (canMark) for (const name of NAMES) highlightOf(name);

function caretAt(x: number, y: number): { node: Node; offset: number } | null {
  if ("caretPositionFromPoint" in document) {
    const caret = document.caretPositionFromPoint(x, y);
    return caret && { node: caret.offsetNode, offset: caret.offset };
  }
  const range = (document as Document).caretRangeFromPoint?.(x, y);
  return range ? { node: range.startContainer, offset: range.startOffset } : null;
}
