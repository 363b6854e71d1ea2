import { useEffect, useState } from "preact/hooks";

import { chooseModel, localModels } from "../engine";
import * as state from "../state";
import { counted } from "../words";

const OWN = "";
const TYPED = " typed";

/** Which model and adapter are loaded, and others that could be. */
export function ModelPanel() {
  const [found, setFound] = useState<{ models: string[]; adapters: string[] } | null>(null);
  const chosen = state.engine.value?.chosen;
  const [model, setModel] = useState(chosen?.model ?? OWN);
  const [adapter, setAdapter] = useState(chosen?.adapter_path ?? OWN);
  const [failed, setFailed] = useState("");
  useEffect(() => {
    localModels().then(setFound, () => setFound({ models: [], adapters: [] }));
  }, []);
  const busy = state.engine.value?.state === "loading" || state.engine.value?.state === "restarting";
  return (
    <form
      class="fields"
      onSubmit={(event) => {
        event.preventDefault();
        void chooseModel(model.trim() || null, adapter.trim() || null).then(setFailed);
      }}
    >
      <Standing />
      <Choice
        label="Model"
        own="Built-in model"
        names={found?.models ?? []}
        value={model}
        set={setModel}
      />
      <Choice
        label="Adapter"
        own="Default for the model"
        names={found?.adapters ?? []}
        value={adapter}
        set={setAdapter}
      />
      <p class="muted">
        The lists show the local Hugging Face cache. You can also enter the path of a folder. Nothing is
        downloaded.
      </p>
      <button type="submit" class="primary" disabled={busy}>
        Load
      </button>
      {failed && (
        <p class="bad" role="alert">
          {failed}
        </p>
      )}
    </form>
  );
}

function Choice(props: {
  label: string;
  own: string;
  names: string[];
  value: string;
  set: (value: string) => void;
}) {
  const listed = props.value === OWN || props.names.includes(props.value);
  const [typing, setTyping] = useState(!listed);
  return (
    <>
      <label>
        {props.label}
        <select
          value={typing && !listed ? TYPED : props.value}
          onChange={(event) => {
            const value = event.currentTarget.value;
            setTyping(value === TYPED);
            props.set(value === TYPED ? " " : value);
          }}
        >
          <option value={OWN}>{props.own}</option>
          {props.names.map((each) => (
            <option key={each} value={each}>
              {each}
            </option>
          ))}
          <option value={TYPED}>Folder…</option>
        </select>
      </label>
      {typing && !listed && (
        <label>
          {props.label} folder
          <input value={props.value.trimStart()} onInput={(event) => props.set(event.currentTarget.value || " ")} />
        </label>
      )}
    </>
  );
}

function Standing() {
  const [since, setSince] = useState(0);
  const engine = state.engine.value;
  const loading = engine?.state === "loading" || engine?.state === "restarting";
  useEffect(() => {
    if (!loading) return;
    const began = Date.now();
    setSince(0);
    const timer = setInterval(() => setSince(Math.round((Date.now() - began) / 1000)), 500);
    return () => clearInterval(timer);
  }, [loading]);
  if (!engine) return <p class="muted">Connecting</p>;
  return (
    <div aria-live="polite">
      {loading ? (
        <>
          <label>
            Loading, {since} s
            <progress />
          </label>
        </>
      ) : (
        <p>
          <strong>{engine.model?.name ?? "No model"}</strong>
          {engine.model &&
            (engine.model.adapter
              ? `, up to ${counted(engine.model.num_draft_tokens, "draft token")} per step`
              : ", no adapter")}
        </p>
      )}
      {engine.error && <p class="bad">{engine.error}</p>}
    </div>
  );
}
