/** A running race: two answers, one after the other. */

import { signal } from "@preact/signals";

import { events } from "./api";
import * as state from "./state";
import type { Group, Lane, LaneEnd, RaceEvent, Verdict } from "./types";

export interface LaneState {
  groups: Group[];
  end: LaneEnd | null;
}

export const lanes = signal<Record<Lane, LaneState>>(emptyLanes());
export const stage = signal<"" | "warm-up" | Lane | "done">("");
export const verdict = signal<Verdict | null>(null);
export const failure = signal("");
let running: AbortController | null = null;

/** Answer ``text``, or the last question of the conversation, twice. */
export async function runRace(text: string, maxTokens: number): Promise<void> {
  stopRace();
  const controller = new AbortController();
  running = controller;
  [lanes.value, verdict.value, failure.value] = [emptyLanes(), null, ""];
  stage.value = "warm-up";
  try {
    const body = raceBody(text, maxTokens);
    for await (const event of events<RaceEvent>("POST", "/race", { body, signal: controller.signal })) {
      apply(event);
    }
  } catch (error) {
    if (!controller.signal.aborted) failure.value = (error as Error).message;
  } finally {
    if (running === controller) {
      running = null;
      stage.value = verdict.value ? "done" : "";
    }
  }
}

/** Stop the race. */
export function stopRace(): void {
  running?.abort();
  running = null;
  stage.value = "";
}

/** The last question of the conversation, the default prompt of a race. */
export function lastQuestion(): string {
  return state.shown.value.findLast((message) => message.role === "user")?.text ?? "";
}

function raceBody(text: string, maxTokens: number): object {
  const options = { ...state.options.value, max_tokens: maxTokens };
  if (options.layout === "plain") options.layout = "auto";
  const question = state.shown.value.findLast((message) => message.role === "user");
  if (text.trim() && text !== question?.text) return { text, options };
  return { conversation: state.conversation.value?.id, message: question?.id, options };
}

function apply(event: RaceEvent): void {
  switch (event.type) {
    case "lane":
      stage.value = event.lane;
      break;
    case "group": {
      const lane = lanes.value[event.lane];
      lanes.value = { ...lanes.value, [event.lane]: { ...lane, groups: [...lane.groups, event] } };
      break;
    }
    case "lane_end":
      lanes.value = { ...lanes.value, [event.lane]: { ...lanes.value[event.lane], end: event } };
      break;
    case "result":
      verdict.value = event;
      stage.value = "done";
      break;
    case "error":
      failure.value = event.message;
  }
}

function emptyLanes(): Record<Lane, LaneState> {
  return { plain: { groups: [], end: null }, mtp: { groups: [], end: null } };
}
