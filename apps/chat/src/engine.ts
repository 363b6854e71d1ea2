/** Follows how the engine stands, and loads other models. */

import { attempt, say } from "./actions";
import { ask } from "./api";
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
    const now = await ask<EngineState>("GET", "/state");
    if (JSON.stringify(now) !== JSON.stringify(before)) state.engine.value = now;
    if (now.state === "ok" && (before?.state !== "ok" || !state.facts.value)) {
      state.facts.value = await ask<Facts>("GET", "/facts");
    }
    if (before && now.error && now.error !== before.error) say(now.error, true);
  });
  if (state.locked.value) return;
  const resting = state.engine.value?.state === "ok";
  timer = window.setTimeout(() => void followEngine(), resting ? RESTING_MS : LOADING_MS);
}

/** What could be loaded without a download. */
export function localModels(): Promise<{ models: string[]; adapters: string[] }> {
  return ask("GET", "/models");
}

/** Load another model; null is the embedded one, and the model's own adapter. */
export async function chooseModel(name: string | null, adapter: string | null): Promise<boolean> {
  const done = await attempt(async () => {
    const body = { model: name, adapter_path: adapter };
    state.facts.value = null;
    state.engine.value = await ask<EngineState>("POST", "/model", body);
  });
  await followEngine();
  return done;
}
