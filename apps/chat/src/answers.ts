/** Follows answers while they are generated. */

import { ApiError, events } from "./api";
import { Announcer } from "./announce";
import * as state from "./state";
import type { AnswerEvent, Group, Message } from "./types";
import { counted } from "./words";

/** Interval between updates of the page; updating for every step would make it slow. */
const SHOW_MS = 40;
const followed = new Set<number>();

/** Show an answer as it streams, from its beginning. */
export async function watchAnswer(id: number): Promise<void> {
  if (followed.has(id)) return;
  followed.add(id);
  const announcer = new Announcer();
  const groups: Group[] = [];
  let timer = 0;
  let reasoning = false;
  const show = () => {
    timer = 0;
    update(id, { groups: [...groups], text: textOf(groups) });
  };
  try {
    const signal = new AbortController().signal;
    for await (const event of events<AnswerEvent>("GET", `/answers/${id}`, { signal })) {
      switch (event.type) {
        case "started":
          state.waiting.value = `Processing the prompt: ${counted(event.prompt_tokens, "token")}`;
          break;
        case "prefill":
          state.waiting.value = `Processing the prompt: ${counted(event.done, "token")} done`;
          break;
        case "group": {
          const { type: _, ...group } = event;
          state.waiting.value = "";
          groups.push(group);
          reasoning = group.span ? group.span.length === 2 : reasoning;
          if (!reasoning) announcer.add(group.tokens.join(""));
          timer ||= window.setTimeout(show, SHOW_MS);
          break;
        }
        case "end":
          clearTimeout(timer);
          if (groups.length) show();
          update(id, { state: event.state, stats: event.stats });
          announcer.end(event.state);
      }
    }
  } catch (error) {
    const lost = "The connection was lost. The text received so far is shown.";
    const text = error instanceof ApiError && error.status ? error.message : lost;
    update(id, { state: "interrupted", stats: { error: text } });
  } finally {
    clearTimeout(timer);
    followed.delete(id);
    state.waiting.value = "";
  }
}

function textOf(groups: readonly Group[]): string {
  return groups.map((group) => group.tokens.join("")).join("");
}

function update(id: number, values: Partial<Message>): void {
  const old = state.messages.value.get(id);
  if (old) state.messages.value = new Map(state.messages.value).set(id, { ...old, ...values });
}
