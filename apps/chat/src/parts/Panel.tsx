import { settings } from "../state";
import { ModelPanel } from "./ModelPanel";
import { SettingsPanel } from "./SettingsPanel";
import { StepsPanel } from "./StepsPanel";
import { closePanel } from "./shortcuts";

const TITLES = { settings: "Settings", steps: "Steps", model: "Model" } as const;

/** The panel next to the conversation. */
export function Panel() {
  const panel = settings.value.panel;
  if (!panel) return null;
  return (
    <aside class="panel" aria-label={TITLES[panel]}>
      <div class="panel-head">
        <h2>{TITLES[panel]}</h2>
        <button
          type="button"
          class="quiet"
          onClick={closePanel}
        >
          Close
        </button>
      </div>
      {panel === "settings" && <SettingsPanel />}
      {panel === "steps" && <StepsPanel />}
      {panel === "model" && <ModelPanel />}
    </aside>
  );
}
