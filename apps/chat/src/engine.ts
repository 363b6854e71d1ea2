/** Follows the state of the engine, and loads other models. */

import { attempt, notify, openConversation } from "./actions";
import { ApiError, ask } from "./api";
import * as state from "./state";
import type { EngineState, Facts } from "./types";

const IDLE_MS = 5000;
const GONE_MS = 1000;
const LOADING_MS = 400;
let timer = 0;

/** Poll the state of the engine, more often while it loads. */
export async function followEngine(): Promise<void> {
  clearTimeout(timer);
  const before = state.engine.value;
  await attempt(async () => {
    const now = await ask<EngineState>("GET", "/state").catch(markUnreachable);
    if (state.gone.value) await reconnect();
    if (JSON.stringify(now) !== JSON.stringify(before)) state.engine.value = now;
    if (now.state === "ok" && (before?.state !== "ok" || !state.facts.value)) {
      state.facts.value = await ask<Facts>("GET", "/facts");
    }
    if (before && now.error && now.error !== before.error) notify(now.error, true);
  });
  if (state.locked.value) return;
  timer = window.setTimeout(() => void followEngine(), pause());
}

function pause(): number {
  if (state.gone.value) return GONE_MS;
  return state.engine.value?.state === "ok" ? IDLE_MS : LOADING_MS;
}

/** The server responds again; an answer may have continued in the meantime. */
async function reconnect(): Promise<void> {
  state.gone.value = false;
  const shown = state.conversation.value;
  if (shown && state.editing.value === null) await openConversation(shown.id);
}

function markUnreachable(error: unknown): never {
  state.gone.value = error instanceof ApiError && error.status === 0;
  throw error;
}

/** Models and adapters that can be loaded without a download. */
export function localModels(): Promise<{ models: string[]; adapters: string[] }> {
  return ask("GET", "/models");
}

/** Load another model; null means the built-in model or the model's default adapter.  Returns the error, or "". */
export async function chooseModel(name: string | null, adapter: string | null): Promise<string> {
  let failure = "";
  await attempt(async () => {
    const body = { model: name, adapter_path: adapter };
    try {
      state.engine.value = await ask<EngineState>("POST", "/model", body);
      state.facts.value = null;
    } catch (error) {
      if (!(error instanceof ApiError) || error.status === 401) throw error;
      failure = error.message;
    }
  });
  await followEngine();
  return failure;
}
