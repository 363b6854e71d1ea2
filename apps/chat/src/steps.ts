/** Statistics of an answer's steps: tokens generated and drafts accepted. */

import type { Group } from "./types";
import { counted } from "./words";

const ORIGINS: Record<string, string> = {
  mask: "mask tokens",
  native: "MTP modules",
  heads: "heads",
  "draft-model": "the draft model",
  lookup: "lookup",
};

export interface Position {
  /** Drafts at this position that were verified, because all earlier ones were accepted. */
  verified: number;
  accepted: number;
}

export interface StepSummary {
  steps: number;
  tokens: number;
  drafted: number;
  accepted: number;
  /** Share of steps without draft tokens. */
  plainShare: number;
  lookupSteps: number;
  tokensPerStep: number;
  /** Tokens per second after the first step. */
  tokensPerSecond: number;
  /** By position of the draft, starting with the first, in steps without lookup. */
  positions: Position[];
}

/** Summarise the steps of an answer. */
export function summarise(groups: readonly Group[]): StepSummary {
  const tokens = total(groups, (group) => group.tokens.length);
  const later = groups.slice(1);
  const ms = total(later, (group) => group.ms);
  return {
    steps: groups.length,
    tokens,
    drafted: total(groups, (group) => group.drafted),
    accepted: total(groups, (group) => group.accepted),
    plainShare: groups.length ? later.filter((group) => !group.drafted).length / groups.length : 0,
    lookupSteps: groups.filter((group) => group.source === "lookup").length,
    tokensPerStep: groups.length ? tokens / groups.length : 0,
    tokensPerSecond: ms > 0 ? (total(later, (group) => group.tokens.length) / ms) * 1000 : 0,
    positions: positionsOf(groups.filter((group) => group.source && !group.source.includes("lookup"))),
  };
}

function positionsOf(groups: readonly Group[]): Position[] {
  const length = Math.max(0, ...groups.map((group) => group.drafted));
  return Array.from({ length }, (_, position) => ({
    verified: groups.filter((group) => group.drafted > position && group.accepted >= position).length,
    accepted: groups.filter((group) => group.drafted > position && group.accepted > position).length,
  }));
}

/** Tokens per step around each step, over the last ``window`` of them. */
export function rolling(groups: readonly Group[], window = 16): number[] {
  let sum = 0;
  return groups.map((group, index) => {
    sum += group.tokens.length - (groups[index - window]?.tokens.length ?? 0);
    return sum / Math.min(index + 1, window);
  });
}

/** Describe a step in words. */
export function describeStep(groups: readonly Group[], index: number): string {
  const group = groups[index]!;
  const head = `Step ${index + 1} of ${groups.length}: ${counted(group.tokens.length, "token")}`;
  if (!group.drafted) return `${head}, no draft tokens`;
  const origins = group.source.split("+").map((source) => ORIGINS[source] ?? source);
  return `${head}, ${group.accepted} of ${counted(group.drafted, "draft")} accepted, from ${origins.join(" and ")}`;
}

/** Describe the origin of one token of a step. */
export function describeToken(group: Group, token: number): string {
  if (token < group.accepted) return `draft ${token + 1} of ${group.drafted}, accepted`;
  if (group.drafted > group.accepted && token === group.accepted) {
    return `from the model; draft ${token + 1} was rejected`;
  }
  return "from the model";
}

/** The end offset of every step in the joined text. */
export function stepEnds(groups: readonly Group[]): number[] {
  let end = 0;
  return groups.map((group) => (end += total(group.tokens, (token) => token.length)));
}

/** The index of the first of the ascending ``ends`` that is greater than ``offset``. */
export function indexAt(ends: readonly number[], offset: number): number {
  let low = 0;
  let high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle]! > offset) high = middle;
    else low = middle + 1;
  }
  return low;
}

function total<Item>(items: readonly Item[], value: (item: Item) => number): number {
  return items.reduce((sum, item) => sum + value(item), 0);
}
