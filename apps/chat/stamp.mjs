// Writes the hash of the sources to dist/.  hatch_build.py computes the same hash and refuses to
// build a wheel if the two differ.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const SOURCES = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"];

function filesBelow(folder) {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = `${folder}/${entry.name}`;
    return entry.isDirectory() ? filesBelow(path) : [path];
  });
}

const paths = [...SOURCES, ...filesBelow("src"), ...filesBelow("public")].sort();
const total = createHash("sha256");
for (const path of paths) {
  const content = createHash("sha256").update(readFileSync(path)).digest("hex");
  total.update(`${path} ${content}\n`);
}
writeFileSync(join("dist", "stamp.json"), `${JSON.stringify({ sources: total.digest("hex") })}\n`);
