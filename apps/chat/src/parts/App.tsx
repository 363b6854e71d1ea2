import { useSignalEffect } from "@preact/signals";

import { importFile, stop } from "../actions";
import * as state from "../state";
import { Composer } from "./Composer";
import { Header } from "./Header";
import { Help } from "./Help";
import { Panel } from "./Panel";
import { Race } from "./Race";
import { Sidebar } from "./Sidebar";
import { Thread } from "./Thread";
import { closeDrawer, useShortcuts } from "./shortcuts";
import { useDrop } from "./drop";

/** The whole page. */
export function App() {
  useTheme();
  useTitle();
  useShortcuts(stop);
  const dropping = useDrop(importFile);
  if (state.locked.value) return <Locked />;
  return (
    <div class={`page ${state.drawer.value ? "with-drawer" : ""}`}>
      <a class="skip" href="#composer">
        Skip to the message box
      </a>
      <Sidebar />
      <div class="backdrop" onClick={closeDrawer} />
      <main inert={state.drawer.value}>
        <Header />
        {state.gone.value && (
          <p class="gone" role="alert">
            mlx-mtp app is not responding. If it has exited, start it again and open the address that it prints.
            Your conversations are saved.
          </p>
        )}
        <Thread />
        <Composer />
      </main>
      <Panel />
      {state.racing.value && <Race />}
      {state.helping.value && <Help />}
      <Notice />
      {dropping && <p class="drop">Drop an exported JSON file here to import it</p>}
      <p class="unseen" aria-live="polite" role="log">
        {state.spoken.value}
      </p>
    </div>
  );
}

function Notice() {
  const notice = state.notice.value;
  return (
    <div class="notices" role="status">
      {notice && <p class={notice.bad ? "notice bad" : "notice"}>{notice.text}</p>}
    </div>
  );
}

function Locked() {
  return (
    <main class="locked">
      <h1>Access key required</h1>
      <p>
        Open the address that <code>mlx-mtp app</code> printed when it started. It contains an
        access key that changes on every start.
      </p>
    </main>
  );
}

function useTheme() {
  useSignalEffect(() => {
    document.documentElement.dataset.theme = state.settings.value.theme;
  });
}

function useTitle() {
  useSignalEffect(() => {
    const title = state.conversation.value?.title;
    document.title = title ? `${title} - mlx-mtp` : "mlx-mtp";
  });
}
