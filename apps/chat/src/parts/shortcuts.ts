import { useEffect } from "preact/hooks";

import { newConversation, remember, say } from "../actions";
import * as state from "../state";
import { isPhone, panelCovers } from "../widths";

/** Keys that work everywhere on the page. */
export const SHORTCUTS: [string, string][] = [
  ["Enter", "Send the message"],
  ["Shift + Enter", "Insert a new line"],
  ["Esc", "Stop the answer, or close the open panel"],
  ["Alt + N", "Start a new conversation"],
  ["Alt + F", "Search conversations"],
  ["Alt + M", "Go to the message box"],
  ["Alt + S", "Turn step underlines on or off"],
  ["Alt + R", "Open the race"],
  ["↑ in an empty box", "Edit your last message"],
  ["↑ ↓ in the list", "Move between conversations; F2 renames, Delete or ⌫ deletes"],
  ["?", "Show this list"],
];

/** Listen to them as long as the page is there. */
export function useShortcuts(stop: () => Promise<void>): void {
  useEffect(() => {
    const listen = (event: KeyboardEvent) => {
      if (document.querySelector("dialog[open], :popover-open")) return;
      if (event.key === "Escape") onEscape(stop);
      else if (event.altKey && !event.ctrlKey && !event.metaKey) onAlt(event);
      else if (event.key === "?" && !isTyping(event.target)) state.helping.value = true;
    };
    addEventListener("keydown", listen);
    return () => removeEventListener("keydown", listen);
  }, []);
}

function onEscape(stop: () => Promise<void>): void {
  if (state.editing.value !== null) leaveEditing();
  else if (state.drawer.value) closeDrawer();
  else if (state.busy.value) void stop();
  else if (isPanelInTheWay()) closePanel();
}

/** Close what is open beside, and go back to the message box. */
export function closePanel(): void {
  void remember({ panel: "" });
  focusOn("#composer");
}

/** Close the list of conversations where it covers the page. */
export function closeDrawer(): void {
  state.drawer.value = false;
  focusOn("#menu");
}

/** Give up editing a message, and go back to its button. */
export function leaveEditing(): void {
  const id = state.editing.value;
  state.editing.value = null;
  requestAnimationFrame(() => focusOn(`#message-${id} .edit`));
}

function isPanelInTheWay(): boolean {
  const panel = document.querySelector(".panel");
  return !!panel && (panelCovers.matches || panel.contains(document.activeElement));
}

/** Whether a key belongs to the making of a letter; Safari tells that of its last Enter by 229 alone. */
export function isComposing(event: KeyboardEvent): boolean {
  return event.isComposing || event.keyCode === 229;
}

// The code of the key, for Alt makes other letters on a Mac.
function onAlt(event: KeyboardEvent): void {
  const action = {
    KeyN: () => {
      newConversation();
      focusOn("#composer");
    },
    KeyF: () => {
      state.drawer.value = isPhone.matches;
      focusOn("#search");
    },
    KeyM: () => focusOn("#composer"),
    KeyS: () => {
      const marks = !state.settings.value.marks;
      void remember({ marks });
      say(marks ? "Step underlines on" : "Step underlines off");
    },
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
