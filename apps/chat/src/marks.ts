/**
 * Underlines each step of an answer in its rendered Markdown, and tells which step lies at a point.
 *
 * Rendering takes marks of Markdown away and leaves the rest in order, so the shown text is found
 * again in the source piece by piece.  The underlines are CSS highlights: the document stays as it is.
 */

import { indexAt, stepEnds } from "./steps";
import type { Group } from "./types";

/** Letters of a text node that stand one after the other in the source. */
interface Run {
  node: Text;
  start: number;
  source: number;
  length: number;
}

const NAMES = ["step-even", "step-odd", "step-one"] as const;
/** How far ahead to look for so many letters: the fewer, the likelier they stand there by chance. */
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

  /** Underline the steps; what was underlined before is not any more. */
  show(root: HTMLElement, source: string, groups: readonly Group[]): void {
    this.clear();
    this.#ends = stepEnds(groups);
    this.#runs = align(root, source);
    for (const run of this.#runs) this.#underline(run, groups);
    for (const [name, range] of this.#ranges) highlightOf(name).add(range);
  }

  /** Take the underlines away. */
  clear(): void {
    for (const [name, range] of this.#ranges) highlightOf(name).delete(range);
    this.#ranges = [];
  }

  /** Offset in the source of what is shown at a point of the window; null where nothing is. */
  offsetAt(x: number, y: number): number | null {
    const caret = caretAt(x, y);
    const run =
      caret &&
      this.#runs.find(
        (each) =>
          each.node === caret.node &&
          caret.offset >= each.start &&
          caret.offset < each.start + each.length,
      );
    return run ? run.source + caret.offset - run.start : null;
  }

  #underline(run: Run, groups: readonly Group[]): void {
    let at = 0;
    while (at < run.length) {
      const step = indexAt(this.#ends, run.source + at);
      const group = groups[step];
      if (!group) return;
      const end = Math.min(run.length, this.#ends[step]! - run.source);
      const name = group.tokens.length < 2 ? "step-one" : step % 2 ? "step-odd" : "step-even";
      const range = new StaticRange({
        startContainer: run.node,
        startOffset: run.start + at,
        endContainer: run.node,
        endOffset: run.start + end,
      });
      this.#ranges.push([name, range]);
      at = end;
    }
  }
}

/** Find the shown text in the source. */
export function align(root: HTMLElement, source: string): Run[] {
  const runs: Run[] = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  let from = 0;
  for (let node = walker.nextNode() as Text | null; node; node = walker.nextNode() as Text | null) {
    const around = node.parentElement;
    if (around?.closest(".code-head") || (!node.data.trim() && !around?.closest("pre"))) continue;
    from = alignNode(node, source, from, runs);
  }
  return runs;
}

function alignNode(node: Text, source: string, from: number, runs: Run[]): number {
  const text = node.data;
  let at = 0;
  while (at < text.length) {
    const found = findAhead(source, text.slice(at, at + PROBE), from);
    if (found < 0) {
      at += 1;
      continue;
    }
    let length = 1;
    while (at + length < text.length && text[at + length] === source[found + length]) length += 1;
    runs.push({ node, start: at, source: found, length });
    at += length;
    from = found + length;
  }
  return from;
}

/** Where the source goes on with a text, or at least with its beginning; -1 for nowhere near. */
function findAhead(source: string, text: string, from: number): number {
  for (const [letters, distance] of LOOK_AHEAD) {
    if (letters > text.length) continue;
    const found = source.slice(from, from + distance + letters).indexOf(text.slice(0, letters));
    if (found >= 0) return from + found;
  }
  return -1;
}

function highlightOf(name: string): Highlight {
  let found = CSS.highlights.get(name);
  if (!found) {
    found = new Highlight();
    CSS.highlights.set(name, found);
  }
  return found;
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
