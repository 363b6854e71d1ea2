import { download, newConversation, remember } from "../actions";
import * as state from "../state";

const WORDS = {
  loading: "loading",
  ok: "",
  restarting: "restarting",
  broken: "not loaded",
  stopped: "stopped",
} as const;

/** Title, model and what can be opened beside. */
export function Header() {
  const shown = state.conversation.value;
  return (
    <header class="bar">
      <button
        type="button"
        class="quiet only-narrow"
        aria-expanded={state.drawer.value}
        aria-controls="sidebar"
        onClick={() => (state.drawer.value = !state.drawer.value)}
      >
        Menu
      </button>
      <h1 class="title">{shown?.title || "New conversation"}</h1>
      <ModelButton />
      <nav class="tools" aria-label="Tools">
        <Opens panel="steps" text="Steps" />
        <Opens panel="settings" text="Settings" />
        <button type="button" class="quiet" onClick={() => (state.racing.value = true)}>
          Race
        </button>
        {shown && <Export id={shown.id} />}
        <button type="button" class="quiet only-narrow" onClick={newConversation}>
          New
        </button>
      </nav>
    </header>
  );
}

function ModelButton() {
  const engine = state.engine.value;
  const name = engine?.model?.name ?? "no model";
  const word = engine ? WORDS[engine.state] : "connecting";
  return (
    <button
      type="button"
      class="quiet model"
      aria-expanded={state.settings.value.panel === "model"}
      onClick={() => toggle("model")}
    >
      <span class="model-name">{name}</span>
      {word && <span class="muted"> {word}</span>}
    </button>
  );
}

function Opens({ panel, text }: { panel: state.Panel; text: string }) {
  return (
    <button
      type="button"
      class="quiet"
      aria-expanded={state.settings.value.panel === panel}
      onClick={() => toggle(panel)}
    >
      {text}
    </button>
  );
}

function Export({ id }: { id: number }) {
  return (
    <select
      class="quiet"
      aria-label="Export this conversation"
      value=""
      onChange={(event) => {
        const format = event.currentTarget.value;
        event.currentTarget.value = "";
        if (format === "json" || format === "markdown") download(id, format);
      }}
    >
      <option value="">Export</option>
      <option value="markdown">as Markdown</option>
      <option value="json">as JSON</option>
    </select>
  );
}

function toggle(panel: state.Panel): void {
  void remember({ panel: state.settings.value.panel === panel ? "" : panel });
}
