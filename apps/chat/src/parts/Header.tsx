import { copyMarkdown, download, newConversation, remember } from "../actions";
import * as state from "../state";
import { panelCovers } from "../widths";
import { focusOn } from "./shortcuts";

const STATE_LABELS = {
  loading: "loading",
  ok: "",
  restarting: "restarting",
  broken: "not loaded",
  stopped: "stopped",
} as const;

/** Title, model and panel buttons. */
export function Header() {
  const shown = state.conversation.value;
  const title = shown?.title || "New conversation";
  return (
    <header class="bar">
      <button
        type="button"
        id="menu"
        class="quiet only-narrow"
        aria-expanded={state.drawer.value}
        aria-controls="sidebar"
        onClick={() => {
          state.drawer.value = !state.drawer.value;
          if (state.drawer.value) focusOn("#sidebar button");
        }}
      >
        Menu
      </button>
      <h1 class="title" title={title}>
        {title}
      </h1>
      <button type="button" class="quiet only-narrow" onClick={newConversation}>
        New
      </button>
      <div class="second-row">
        <ModelButton />
        <nav class="tools" aria-label="Tools">
          <PanelButton panel="steps" text="Steps" />
          <PanelButton panel="settings" text="Settings" />
          <button type="button" class="quiet" onClick={() => (state.racing.value = true)}>
            Race
          </button>
          {shown && <Export id={shown.id} />}
        </nav>
      </div>
    </header>
  );
}

function ModelButton() {
  const engine = state.engine.value;
  const label = engine ? STATE_LABELS[engine.state] : "connecting";
  return (
    <button
      type="button"
      class="quiet model"
      title={`Model: ${engine?.model?.name ?? "none"}`}
      aria-expanded={state.settings.value.panel === "model"}
      onClick={() => toggle("model")}
    >
      <span class="model-name">{state.modelName.value || "no model"}</span>
      {label && <span class="muted">{label}</span>}
    </button>
  );
}

function PanelButton({ panel, text }: { panel: state.Panel; text: string }) {
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
  const actions: [string, () => void][] = [
    ["Save as Markdown", () => download(id, "markdown")],
    ["Save as JSON", () => download(id, "json")],
    ["Copy as Markdown", () => void copyMarkdown(id)],
  ];
  return (
    <>
      <button type="button" class="quiet" popovertarget="export">
        Export
      </button>
      <div id="export" class="menu" popover="auto" role="group" aria-label="Export this conversation">
        {actions.map(([text, run], index) => (
          <button
            key={text}
            type="button"
            class="quiet"
            autofocus={index === 0}
            onClick={() => {
              document.getElementById("export")?.hidePopover();
              run();
            }}
          >
            {text}
          </button>
        ))}
      </div>
    </>
  );
}

function toggle(panel: state.Panel): void {
  const opens = state.settings.value.panel !== panel;
  void remember({ panel: opens ? panel : "" });
  if (opens && panelCovers.matches) focusOn(".panel button");
}
