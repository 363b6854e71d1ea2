import { defineConfig } from "vite";

// Everything is served from / by mlx-mtp app; its policy forbids inline scripts and data: scripts.
export default defineConfig({
  base: "/",
  // Every browser that shows the page reads the smallest kind of KaTeX's fonts.
  plugins: [
    {
      name: "woff2-only",
      enforce: "pre",
      transform: (code, id) =>
        id.endsWith("katex.min.css")
          ? code.replace(/,url\([^)]*\) format\("(?:woff|truetype)"\)/g, "")
          : undefined,
    },
  ],
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    target: "es2022",
    // The first that know light-dark(), which would else be taken apart.
    cssTarget: ["chrome123", "safari17.5", "firefox127"],
    outDir: "dist",
    emptyOutDir: true,
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    reportCompressedSize: true,
  },
});
