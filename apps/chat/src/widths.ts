/** Widths at which the layout changes; keep them equal to those in styles/narrow.css. */

/** A panel covers the conversation. */
export const panelCovers = matchMedia("(max-width: 70rem)");
/** The list of conversations is a drawer. */
export const isPhone = matchMedia("(max-width: 48rem)");
