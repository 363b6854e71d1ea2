/** Why steps pay or do not pay here, from what was measured. */

import type { StepSummary } from "./steps";
import type { Costs, Facts, ModelInfo, Options } from "./types";
import { counted } from "./words";

const FEW_STEPS = 8;

/** Say in plain sentences what holds the speed back; the heaviest reason first. */
export function reasons(
  model: ModelInfo,
  facts: Facts,
  options: Options,
  summary: StepSummary,
): string[] {
  const found: string[] = [];
  if (!model.adapter) {
    found.push("This model has no adapter, so every step generates one token. Train one with mlx-mtp train.");
  }
  if (options.layout === "plain" || options.num_draft_tokens === 0) {
    found.push("Drafting is turned off in the settings of this conversation.");
  }
  if (facts.blas === "reference" && facts.runs_on === "cpu") {
    found.push("MLX multiplies matrices with its reference BLAS. OpenBLAS is several times faster.");
  }
  if (summary.steps >= FEW_STEPS) found.push(...fromSteps(summary, facts.costs, options));
  else found.push("Not enough steps yet to estimate acceptance.");
  if (model.adapter) found.push(...fromCosts(facts));
  return found;
}

function fromSteps(summary: StepSummary, costs: Costs, options: Options): string[] {
  const found = [
    `The average is ${summary.tokensPerStep.toFixed(2)} tokens per step over ${summary.steps} steps.`,
  ];
  const first = summary.positions[0];
  if (first?.seen) {
    const share = percent(first.held / first.seen);
    found.push(`The first draft token was accepted in ${share} of the steps that verified it.`);
  }
  if (summary.plainShare > 0.2) {
    found.push(
      `${percent(summary.plainShare)} of the steps drafted nothing because the planner expected drafts to cost more time than they save.`,
    );
  }
  if ((options.temp ?? 0) > 0.3) {
    found.push("Sampling at a higher temperature lowers acceptance because the model is less certain of the next token.");
  }
  const rows = Math.round(summary.drafted / Math.max(summary.steps, 1)) + 1;
  const ratio = costRatio(costs, rows);
  if (ratio !== null && rows > 1) {
    found.push(
      `Verifying ${counted(rows - 1, "draft")} takes ${timesAs(ratio)} a plain step, not counting mask tokens.`,
    );
  }
  return found;
}

function fromCosts(facts: Facts): string[] {
  if (!facts.measured) return ["Row costs have not been measured on this machine. Measure them with mlx-mtp tune."];
  const drafting = facts.costs.draft_ms.at(-1) ?? 0;
  const plain = facts.costs.forward_ms[0]?.[0] ?? 0;
  const found: string[] = [];
  for (const rows of [4, 8]) {
    const ratio = costRatio(facts.costs, rows);
    if (ratio !== null) found.push(`A step of ${rows} rows takes ${timesAs(ratio)} a step of 1 row.`);
  }
  if (plain > 0 && drafting > 0) {
    found.push(`Drafting adds up to ${drafting.toFixed(1)} ms to a step; a plain step takes ${plain.toFixed(1)} ms.`);
  }
  return found;
}

/** Time of a step of so many rows over that of one row, in a short context; null where unknown. */
export function costRatio(costs: Costs, rows: number): number | null {
  const times = costs.forward_ms[0];
  const at = costs.rows.findIndex((each) => each >= rows);
  if (!times || at < 0 || !times[0] || costs.rows[0] !== 1) return null;
  if (costs.rows[at] === rows || at === 0) return times[at]! / times[0];
  const [low, high] = [costs.rows[at - 1]!, costs.rows[at]!];
  const share = (rows - low) / (high - low);
  return (times[at - 1]! + share * (times[at]! - times[at - 1]!)) / times[0];
}

// A measured curve may dip below one row; nobody believes that more work takes less time.
function timesAs(ratio: number): string {
  return ratio > 1 ? `about ${ratio.toFixed(2)} times as long as` : "no longer than";
}

export function percent(share: number): string {
  return `${Math.round(100 * share)}%`;
}
