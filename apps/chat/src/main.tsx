import { render } from "preact";

import { attempt, listConversations, newConversation, openConversation } from "./actions";
import { ask, openSession } from "./api";
import { followEngine } from "./engine";
import { App } from "./parts/App";
import * as state from "./state";
import { isPhone, panelCovers } from "./widths";
import "./styles/tokens.css";
import "./styles/layout.css";
import "./styles/controls.css";
import "./styles/list.css";
import "./styles/messages.css";
import "./styles/steps.css";
import "./styles/panels.css";
import "./styles/dialogs.css";
import "./styles/narrow.css";
import "./styles/print.css";

/** Take the token out of the address, where it would be seen, and exchange it for a cookie. */
async function enter(): Promise<void> {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  history.replaceState(null, "", "/");
  await attempt(() => openSession(token));
}

function wantedConversation(): number {
  return Number(new URLSearchParams(location.hash.slice(1)).get("c"));
}

function followAddress(): void {
  const wanted = wantedConversation();
  if (!wanted) newConversation();
  else if (wanted !== state.conversation.value?.id) void attempt(() => openConversation(wanted));
}

async function start(): Promise<void> {
  const wanted = wantedConversation();
  render(<App />, document.getElementById("app")!);
  await enter();
  if (state.locked.value) return;
  void followEngine();
  await attempt(async () => {
    const kept = await ask<Partial<state.Settings>>("GET", "/settings");
    state.settings.value = { ...state.FIRST_SETTINGS, ...kept };
    if (panelCovers.matches) state.settings.value = { ...state.settings.value, panel: "" };
    if (!wanted) newConversation();
    await listConversations();
  });
  if (wanted && !(await attempt(() => openConversation(wanted)))) newConversation();
  addEventListener("popstate", followAddress);
  isPhone.addEventListener("change", () => (state.drawer.value = false));
}

void start();
