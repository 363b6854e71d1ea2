/** Follows how the engine stands, and loads other models. */

import { attempt, say } from "./actions";
import { ApiError, ask } from "./api";
import * as state from "./state";
import type { EngineState, Facts } from "./types";

const RESTING_MS = 5000;
const LOADING_MS = 400;
let timer = 0;

/** Ask how the engine stands, again and again; more often while it loads. */
export async function followEngine(): Promise<void> {
  clearTimeout(timer);
  const before = state.engine.value;
  await attempt(async () => {
    const now = await ask<EngineState>("GET", "/state").catch(noteSilence);
    state.gone.value = false;
    if (JSON.stringify(now) !== JSON.stringify(before)) state.engine.value = now;
    if (now.state === "ok" && (before?.state !== "ok" || !state.facts.value)) {
      state.facts.value = await ask<Facts>("GET", "/facts");
    }
    if (before && now.error && now.error !== before.error) say(now.error, true);
  });
  if (state.locked.value) return;
  const resting = state.gone.value || state.engine.value?.state === "ok";
  timer = window.setTimeout(() => void followEngine(), resting ? RESTING_MS : LOADING_MS);
}

function noteSilence(error: unknown): never {
  state.gone.value = error instanceof ApiError && error.status === 0;
  throw error;
}

/** What could be loaded without a download. */
export function localModels(): Promise<{ models: string[]; adapters: string[] }> {
  return ask("GET", "/models");
}

/** Load another model; null is the embedded one, and the model's own adapter.  Returns why not, or "". */
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
