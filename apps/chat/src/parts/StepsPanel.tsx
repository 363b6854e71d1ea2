import * as state from "../state";
import { type Position, type StepSummary, rolling, summarise } from "../steps";
import type { Costs } from "../types";
import { percent, reasons } from "../why";
import { Meter } from "./Meter";

/** Statistics of the latest answer's steps, and what limits their speed. */
export function StepsPanel() {
  const groups = state.observed.value?.groups ?? [];
  const summary = summarise(groups);
  return (
    <div class="facts-panel">
      <section aria-labelledby="meter-title">
        <h3 id="meter-title">Tokens per step</h3>
        <Numbers summary={summary} />
        <Meter values={rolling(groups)} />
      </section>
      <section aria-labelledby="positions-title">
        <h3 id="positions-title">Acceptance by position</h3>
        <Positions positions={summary.positions} />
      </section>
      <SpeedLimits summary={summary} />
    </div>
  );
}

function Numbers({ summary }: { summary: StepSummary }) {
  if (!summary.steps) return <p class="muted">No answer yet.</p>;
  return (
    <dl class="numbers">
      <div>
        <dt>tokens per step</dt>
        <dd>{summary.tokensPerStep.toFixed(2)}</dd>
      </div>
      <div>
        <dt>tokens per second</dt>
        <dd>{summary.tokensPerSecond.toFixed(1)}</dd>
      </div>
      <div>
        <dt>drafts accepted</dt>
        <dd>
          {summary.accepted}/{summary.drafted}
        </dd>
      </div>
    </dl>
  );
}

function Positions({ positions }: { positions: Position[] }) {
  if (!positions.length) return <p class="muted">No drafts from mask tokens yet.</p>;
  return (
    <table class="positions">
      <caption class="unseen">Acceptance rate of drafts by mask position</caption>
      <thead>
        <tr>
          <th scope="col">Mask</th>
          <th scope="colgroup" colSpan={2}>
            Accepted of verified
          </th>
        </tr>
      </thead>
      <tbody>
        {positions.map(({ verified, accepted }, index) => (
          <tr key={index}>
            <th scope="row">{index + 1}</th>
            <td>
              <svg class="bar-of" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
                <rect class="bar-all" width="100" height="8" />
                <rect class="bar-accepted" width={verified ? (100 * accepted) / verified : 0} height="8" />
              </svg>
            </td>
            <td>
              {verified ? percent(accepted / verified) : "n/a"} ({accepted}/{verified})
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function SpeedLimits({ summary }: { summary: StepSummary }) {
  const { value: model } = state.model;
  const { value: facts } = state.facts;
  if (!model || !facts) return null;
  return (
    <section aria-labelledby="why-title">
      <h3 id="why-title">What limits speed here</h3>
      <ul class="reasons">
        {reasons(model, facts, state.options.value, summary).map((sentence) => (
          <li key={sentence}>{sentence}</li>
        ))}
      </ul>
      <details>
        <summary>Row costs</summary>
        <CostTable costs={facts.costs} />
        <p class="muted">
          {facts.costs.source}; {facts.device}, {facts.runs_on}
          {facts.runs_on === "cpu" && `, BLAS: ${facts.blas}`}
        </p>
      </details>
    </section>
  );
}

function CostTable({ costs }: { costs: Costs }) {
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Rows</th>
          {costs.contexts.map((length) => (
            <th scope="col" key={length}>
              Context {length}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {costs.rows.map((rows, index) => (
          <tr key={rows}>
            <th scope="row">{rows}</th>
            {costs.forward_ms.map((line, context) => (
              <td key={context}>
                {line[index]!.toFixed(1)} ms, {(line[index]! / line[0]!).toFixed(2)}x
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}
