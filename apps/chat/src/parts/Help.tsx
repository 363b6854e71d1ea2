import { helping } from "../state";
import { Dialog } from "./Dialog";
import { SHORTCUTS } from "./shortcuts";

/** The list of keyboard shortcuts. */
export function Help() {
  return (
    <Dialog title="Keyboard shortcuts" close={() => (helping.value = false)}>
      <dl class="keys">
        {SHORTCUTS.map(([keys, meaning]) => (
          <div key={keys}>
            <dt>
              <kbd>{keys}</kbd>
            </dt>
            <dd>{meaning}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}
