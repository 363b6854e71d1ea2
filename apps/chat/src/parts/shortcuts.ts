import { useEffect } from "preact/hooks";

import { newConversation, remember } from "../actions";
import * as state from "../state";

/** Keys that work everywhere on the page. */
export const SHORTCUTS: [string, string][] = [
  ["Enter", "send the message"],
  ["Shift + Enter", "a new line"],
  ["Esc", "stop the answer, or close what is open"],
  ["Alt + N", "new conversation"],
  ["Alt + F", "search the conversations"],
  ["Alt + M", "go to the message box"],
  ["Alt + S", "underline the steps, or not"],
  ["Alt + R", "race"],
  ["↑ in an empty box", "edit your last message"],
  ["↑ ↓ in the list", "another conversation; F2 renames, Delete deletes"],
  ["?", "this list"],
];

/** Listen to them as long as the page is there. */
export function useShortcuts(stop: () => Promise<void>): void {
  useEffect(() => {
    const listen = (event: KeyboardEvent) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
        if (state.editing.value !== null) state.editing.value = null;
        else if (state.answering.value) void stop();
        else if (state.drawer.value) state.drawer.value = false;
      } else if (event.altKey && !event.ctrlKey && !event.metaKey) onAlt(event);
      else if (event.key === "?" && !isTyping(event.target)) state.helping.value = true;
    };
    addEventListener("keydown", listen);
    return () => removeEventListener("keydown", listen);
  }, []);
}

// The code of the key, for Alt makes other letters on a Mac.
function onAlt(event: KeyboardEvent): void {
  const action = {
    KeyN: () => {
      newConversation();
      focusOn("#composer");
    },
    KeyF: () => {
      state.drawer.value = true;
      focusOn("#search");
    },
    KeyM: () => focusOn("#composer"),
    KeyS: () => void remember({ marks: !state.settings.value.marks }),
    KeyR: () => (state.racing.value = true),
  }[event.code];
  if (!action) return;
  event.preventDefault();
  action();
}

/** Move the focus: at once where that is possible, else when what is to be shown is there. */
export function focusOn(selector: string): void {
  const found = document.querySelector<HTMLElement>(selector);
  found?.focus();
  if (!found || document.activeElement !== found) {
    requestAnimationFrame(() => document.querySelector<HTMLElement>(selector)?.focus());
  }
}

function isTyping(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches("input, textarea, select");
}
