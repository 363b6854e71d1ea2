import { useEffect } from "preact/hooks";

import { newConversation, notify, remember } from "../actions";
import * as state from "../state";
import { isPhone, panelCovers } from "../widths";

/** Keyboard shortcuts of the whole page. */
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

/** Handle them while the page is shown. */
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
  else if (shouldClosePanel()) closePanel();
}

/** Close the panel, and return the focus to the message box. */
export function closePanel(): void {
  void remember({ panel: "" });
  focusOn("#composer");
}

/** Close the drawer of conversations on a narrow page. */
export function closeDrawer(): void {
  state.drawer.value = false;
  focusOn("#menu");
}

/** Cancel editing a message, and return the focus to its button. */
export function leaveEditing(): void {
  const id = state.editing.value;
  state.editing.value = null;
  requestAnimationFrame(() => focusOn(`#message-${id} .edit`));
}

function shouldClosePanel(): boolean {
  const panel = document.querySelector(".panel");
  return !!panel && (panelCovers.matches || panel.contains(document.activeElement));
}

/** Whether a key is part of an input method composition; for its final Enter, Safari reports only code 229. */
export function isComposing(event: KeyboardEvent): boolean {
  return event.isComposing || event.keyCode === 229;
}

// The code of the key, because Alt produces other characters on a Mac.
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
      notify(marks ? "Step underlines on" : "Step underlines off");
    },
    KeyR: () => (state.racing.value = true),
  }[event.code];
  if (!action) return;
  event.preventDefault();
  action();
}

/** Move the focus now if possible, or else after the next frame is rendered. */
export function focusOn(selector: string): void {
  const element = document.querySelector<HTMLElement>(selector);
  element?.focus();
  if (!element || document.activeElement !== element) {
    requestAnimationFrame(() => document.querySelector<HTMLElement>(selector)?.focus());
  }
}

function isTyping(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches("input, textarea, select");
}
