import { useEffect, useRef, useState } from "preact/hooks";

import * as race from "../race";
import { model, racing, ready } from "../state";
import { summarise } from "../steps";
import type { Lane, Verdict } from "../types";
import { counted } from "../words";
import { Dialog } from "./Dialog";
import { SUGGESTIONS } from "./Empty";

const STAGES = {
  "": "",
  "warm-up": "Warming up",
  plain: "Running plain decoding",
  mtp: "Running multi-token decoding",
  done: "",
} as const;

/** Plain and multi-token decoding of the same prompt, side by side. */
export function Race() {
  const [text, setText] = useState(race.lastQuestion() || SUGGESTIONS[0]!);
  const [tokens, setTokens] = useState(128);
  const status = useRef<HTMLDivElement>(null);
  useEffect(() => race.stopRace, []);
  useEffect(() => status.current?.scrollIntoView({ block: "nearest" }), [race.verdict.value, race.failure.value]);
  const running = race.stage.value !== "" && race.stage.value !== "done";
  const canStart = ready.value && !!model.value?.adapter && text.trim() !== "";
  return (
    <Dialog title="Race" wide close={() => (racing.value = false)}>
      <form
        class="race-form"
        onSubmit={(event) => {
          event.preventDefault();
          if (canStart) void race.runRace(text, tokens);
        }}
      >
        <label>
          Prompt
          <textarea rows={2} dir="auto" autofocus value={text} onInput={(event) => setText(event.currentTarget.value)} />
        </label>
        <label class="number">
          Max tokens
          <input
            type="number"
            min={8}
            max={2000}
            value={tokens}
            onChange={(event) => setTokens(Math.min(2000, Math.max(8, Math.round(event.currentTarget.valueAsNumber || 128))))}
          />
        </label>
        {running ? (
          <button type="button" onClick={race.stopRace}>
            Stop
          </button>
        ) : (
          <button type="submit" class="primary" disabled={!canStart}>
            Start
          </button>
        )}
      </form>
      {model.value && !model.value.adapter && <p class="bad">A race needs a model with an adapter.</p>}
      <div class="lanes">
        <LaneView lane="plain" title="Plain decoding" />
        <LaneView lane="mtp" title="Multi-token decoding" />
      </div>
      <div role="status" class="verdict" ref={status}>
        {race.failure.value && <p class="bad">{race.failure.value}</p>}
        {STAGES[race.stage.value] && <p class="muted">{STAGES[race.stage.value]}</p>}
        {race.verdict.value && <VerdictView verdict={race.verdict.value} />}
      </div>
      <p class="muted small-print">
        Both answers use greedy decoding and run one after the other, without cached prompts, after a short
        warm-up. Timing starts after the first step, so the prompt is not included. If other programs use
        the model during the race, the result says so.
      </p>
    </Dialog>
  );
}

function LaneView({ lane, title }: { lane: Lane; title: string }) {
  const box = useRef<HTMLDivElement>(null);
  const { groups, end } = race.lanes.value[lane];
  const summary = summarise(groups);
  useEffect(() => box.current?.scrollTo({ top: box.current.scrollHeight }), [groups.length]);
  return (
    <section class="lane" aria-label={title}>
      <h3>{title}</h3>
      <p class="muted">
        {groups.length
          ? `${counted(summary.tokens, "token")} in ${counted(summary.steps, "step")}, ${summary.tokensPerSecond.toFixed(1)} per second`
          : "Waiting"}
      </p>
      <div class="lane-text" tabIndex={0} role="region" aria-label={`${title}: answer`} ref={box}>
        {groups.map((group, index) => (
          <span key={index} class={group.tokens.length < 2 ? "step one" : index % 2 ? "step odd" : "step even"}>
            {group.tokens.join("")}
          </span>
        ))}
      </div>
      {end && (
        <p class="hash">
          SHA-256 of the token ids <code>{end.sha256}</code>
        </p>
      )}
    </section>
  );
}

function VerdictView({ verdict }: { verdict: Verdict }) {
  return (
    <>
      <p class={verdict.identical ? "good" : "bad"}>
        {verdict.identical
          ? "Identical output: both hashes match."
          : `The outputs differ from token ${(verdict.differs_at ?? 0) + 1} on. Rounding can decide between two tokens of nearly equal probability; mlx-mtp verify checks whether it did here.`}
      </p>
      {verdict.speed_up !== null && (
        <p>
          <strong>{verdict.speed_up.toFixed(2)}x</strong> the speed of plain decoding:{" "}
          {verdict.mtp_tps.toFixed(1)} instead of {verdict.plain_tps.toFixed(1)} tokens per second
          {verdict.speed_up < 1 && ". Multi-token decoding is slower here; the Steps panel explains why"}.
        </p>
      )}
      {verdict.others > 0 && (
        <p class="bad">
          The timing is unreliable: {counted(verdict.others, "other answer")} used the model during the race.
          Run it again when nothing else uses the model.
        </p>
      )}
    </>
  );
}
