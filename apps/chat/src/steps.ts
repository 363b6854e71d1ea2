/** What steps of an answer tell: how many tokens they gave, and which drafts held. */

import type { Group } from "./types";
import { counted } from "./words";

export interface Position {
  /** Drafts at this position that were looked at, for all before them held. */
  seen: number;
  held: number;
}

export interface StepSummary {
  steps: number;
  tokens: number;
  drafted: number;
  accepted: number;
  /** Share of steps that drafted nothing. */
  plainShare: number;
  lookupSteps: number;
  tokensPerStep: number;
  /** Tokens a second behind the first step. */
  tokensPerSecond: number;
  /** By position of the mask token, the first one first. */
  positions: Position[];
}

/** Sum up the steps of an answer. */
export function summarise(groups: readonly Group[]): StepSummary {
  const tokens = total(groups, (each) => each.tokens.length);
  const later = groups.slice(1);
  const ms = total(later, (each) => each.ms);
  return {
    steps: groups.length,
    tokens,
    drafted: total(groups, (each) => each.drafted),
    accepted: total(groups, (each) => each.accepted),
    plainShare: groups.length ? later.filter((each) => !each.drafted).length / groups.length : 0,
    lookupSteps: groups.filter((each) => each.source === "lookup").length,
    tokensPerStep: groups.length ? tokens / groups.length : 0,
    tokensPerSecond: ms > 0 ? (total(later, (each) => each.tokens.length) / ms) * 1000 : 0,
    positions: positionsOf(groups.filter((each) => each.source === "mask")),
  };
}

function positionsOf(groups: readonly Group[]): Position[] {
  const most = Math.max(0, ...groups.map((each) => each.drafted));
  return Array.from({ length: most }, (_, at) => ({
    seen: groups.filter((each) => each.drafted > at && each.accepted >= at).length,
    held: groups.filter((each) => each.drafted > at && each.accepted > at).length,
  }));
}

/** Tokens per step around each step, over the last ``window`` of them. */
export function rolling(groups: readonly Group[], window = 16): number[] {
  let sum = 0;
  return groups.map((each, at) => {
    sum += each.tokens.length - (groups[at - window]?.tokens.length ?? 0);
    return sum / Math.min(at + 1, window);
  });
}

/** Say in words what a step did. */
export function describeStep(groups: readonly Group[], at: number): string {
  const group = groups[at]!;
  const head = `Step ${at + 1} of ${groups.length}: ${counted(group.tokens.length, "token")}`;
  if (!group.drafted) return `${head}, no draft tokens`;
  const origin = group.source === "lookup" ? "from lookup" : "from mask tokens";
  return `${head}, ${group.accepted} of ${counted(group.drafted, "draft")} accepted, ${origin}`;
}

/** Say where one token of a step is from. */
export function describeToken(group: Group, token: number): string {
  if (token < group.accepted) return `draft ${token + 1} of ${group.drafted}, accepted`;
  if (group.drafted > group.accepted && token === group.accepted) {
    return `from the model; draft ${token + 1} was rejected`;
  }
  return "from the model";
}

/** Where each step ends in the joined text. */
export function stepEnds(groups: readonly Group[]): number[] {
  let at = 0;
  return groups.map((each) => (at += total(each.tokens, (token) => token.length)));
}

/** The first of rising ``ends`` that lies behind ``offset``. */
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
