import { change, notify, remember } from "../actions";
import * as state from "../state";
import type { Layout, Options } from "../types";

interface Field {
  name: "temp" | "top_p" | "top_k" | "min_p" | "repetition_penalty" | "max_tokens" | "thinking_budget" | "seed";
  label: string;
  hint: string;
  initial: number | null;
  min: number;
  max: number;
  step: number | "any";
}

const FIELDS: Field[] = [
  { name: "temp", label: "Temperature", hint: "0 for greedy", initial: 0, min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", hint: "1 to disable", initial: 1, min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", hint: "0 to disable", initial: 0, min: 0, max: 1_000_000, step: 1 },
  { name: "min_p", label: "Min p", hint: "relative to the top token", initial: 0, min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "empty to disable", initial: null, min: 0.1, max: 10, step: 0.05 },
  { name: "max_tokens", label: "Max tokens", hint: "per answer", initial: 1024, min: 1, max: 1_000_000, step: 1 },
  { name: "thinking_budget", label: "Max reasoning tokens", hint: "empty for no limit", initial: null, min: 0, max: 1_000_000, step: 1 },
  { name: "seed", label: "Seed", hint: "empty for random", initial: null, min: 0, max: 2 ** 52, step: 1 },
]; // prettier-ignore

/** System prompt, drafting and sampling options of the conversation that is shown. */
export function SettingsPanel() {
  const set = (values: Options) => void change({ options: { ...state.options.value, ...values } });
  return (
    <form class="fields" onSubmit={(event) => event.preventDefault()}>
      <label>
        System prompt
        <textarea
          rows={4}
          key={`system-${state.conversation.value?.id}`}
          defaultValue={state.systemPrompt.value}
          onChange={(event) => void change({ system_prompt: event.currentTarget.value })}
        />
      </label>
      <fieldset>
        <legend>Drafting</legend>
        <DraftSlider set={set} />
        <LayoutChoice set={set} />
        <label class="check">
          <input
            type="checkbox"
            checked={state.settings.value.marks}
            onChange={(event) => void remember({ marks: event.currentTarget.checked })}
          />
          Underline steps in answers
        </label>
      </fieldset>
      <fieldset>
        <legend>Sampling</legend>
        {FIELDS.map((field) => (
          <NumberField key={field.name} field={field} set={set} />
        ))}
      </fieldset>
      <div class="row">
        <button type="button" onClick={() => void makeDefault()}>
          Use for new conversations
        </button>
        <button type="button" onClick={() => void change({ options: {} })}>
          Reset
        </button>
      </div>
    </form>
  );
}

function DraftSlider({ set }: { set: (values: Options) => void }) {
  const maximum = state.model.value?.num_draft_tokens ?? 0;
  if (!maximum) return <p class="muted">This model has no adapter, so no tokens are drafted.</p>;
  const k = Math.min(state.options.value.num_draft_tokens ?? maximum, maximum);
  return (
    <label>
      <span>
        Draft tokens per step (k): <output>{k === 0 ? "none" : k}</output>
      </span>
      <input
        id="drafts"
        type="range"
        min={0}
        max={maximum}
        step={1}
        value={k}
        onInput={(event) => {
          const chosen = Number(event.currentTarget.value);
          set({ num_draft_tokens: chosen === maximum ? null : chosen });
        }}
      />
    </label>
  );
}

function LayoutChoice({ set }: { set: (values: Options) => void }) {
  return (
    <label>
      Layout
      <select
        value={state.options.value.layout ?? "auto"}
        onChange={(event) => set({ layout: event.currentTarget.value as Layout })}
      >
        <option value="auto">auto: fastest on this machine</option>
        <option value="tree">tree: several drafts for a position</option>
        <option value="linear">linear: masks after the last draft</option>
        <option value="quadratic">quadratic: masks after every draft</option>
        <option value="plain">plain: one token per step</option>
      </select>
    </label>
  );
}

function NumberField({ field, set }: { field: Field; set: (values: Options) => void }) {
  const value = state.options.value[field.name] ?? field.initial;
  return (
    <label class="number">
      <span>
        {field.label} <span class="muted">{field.hint}</span>
      </span>
      <input
        type="number"
        min={field.min}
        max={field.max}
        step={field.step}
        value={value ?? ""}
        onChange={(event) => {
          const input = event.currentTarget;
          if (input.value === "" && field.initial === null) set({ [field.name]: null });
          else if (input.value !== "" && !input.validity.rangeUnderflow && !input.validity.rangeOverflow) {
            set({ [field.name]: field.step === 1 ? Math.round(input.valueAsNumber) : input.valueAsNumber });
          } else {
            input.value = value === null ? "" : String(value);
            notify(`${field.label} must be between ${field.min} and ${field.max}`, true);
          }
        }}
      />
    </label>
  );
}

async function makeDefault(): Promise<void> {
  const defaults = { system_prompt: state.systemPrompt.value, options: state.options.value };
  await remember({ defaults });
  notify("Saved for new conversations");
}
