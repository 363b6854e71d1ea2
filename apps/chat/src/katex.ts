/** KaTeX with its styles and fonts: a chunk of its own, which is loaded with the first formula. */

import "katex/contrib/copy-tex"; // A selection is copied with the sources of its formulas.
import "katex/dist/katex.min.css";

export { renderToString } from "katex";
