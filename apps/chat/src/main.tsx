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

let ready = false;

/** Remove the token from the address, where it is visible, and exchange it for a cookie. */
async function signIn(): Promise<void> {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  const id = conversationInAddress();
  history.replaceState(null, "", id ? `/#c=${id}` : "/");
  await attempt(() => openSession(token));
}

function conversationInAddress(): number {
  return Number(new URLSearchParams(location.hash.slice(1)).get("c"));
}

/** Show the conversation in the address. Until the page is ready, ``start`` reads the address. */
async function followAddress(): Promise<void> {
  if (!ready) return;
  const id = conversationInAddress();
  if (!id) return newConversation();
  if (id === state.conversation.value?.id || (await attempt(() => openConversation(id)))) return;
  if (!state.conversation.value && id === conversationInAddress()) newConversation();
}

async function start(): Promise<void> {
  addEventListener("popstate", () => void followAddress());
  isPhone.addEventListener("change", () => (state.drawer.value = false));
  render(<App />, document.getElementById("app")!);
  await signIn();
  if (state.locked.value) return;
  void followEngine();
  await attempt(async () => {
    const saved = await ask<Partial<state.Settings>>("GET", "/settings");
    state.settings.value = { ...state.FIRST_SETTINGS, ...saved };
    if (panelCovers.matches) state.settings.value = { ...state.settings.value, panel: "" };
  });
  // The address is read only now: it may have changed while the page waited.
  ready = true;
  await Promise.all([followAddress(), attempt(listConversations)]);
}

void start();
