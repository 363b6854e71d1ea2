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

/** Remove the token from the address, where it is visible, and exchange it for a cookie. */
async function signIn(): Promise<void> {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  history.replaceState(null, "", "/");
  await attempt(() => openSession(token));
}

function conversationInAddress(): number {
  return Number(new URLSearchParams(location.hash.slice(1)).get("c"));
}

function followAddress(): void {
  const id = conversationInAddress();
  if (!id) newConversation();
  else if (id !== state.conversation.value?.id) void attempt(() => openConversation(id));
}

async function start(): Promise<void> {
  const id = conversationInAddress();
  render(<App />, document.getElementById("app")!);
  await signIn();
  if (state.locked.value) return;
  void followEngine();
  await attempt(async () => {
    const saved = await ask<Partial<state.Settings>>("GET", "/settings");
    state.settings.value = { ...state.FIRST_SETTINGS, ...saved };
    if (panelCovers.matches) state.settings.value = { ...state.settings.value, panel: "" };
    if (!id) newConversation();
    await listConversations();
  });
  if (id && !(await attempt(() => openConversation(id)))) newConversation();
  addEventListener("popstate", followAddress);
  isPhone.addEventListener("change", () => (state.drawer.value = false));
}

void start();
