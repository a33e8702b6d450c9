// JavaScript of the pages and of the site: what could be wrong, one statement a line, no line over 120 columns.
import js from "@eslint/js";
import stylistic from "@stylistic/eslint-plugin";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    languageOptions: {sourceType: "script", globals: globals.browser},
    plugins: {style: stylistic},
    linterOptions: {reportUnusedDisableDirectives: "error"},
    rules: {
      "no-implicit-globals": "off", // each file is the one script of its page
      "no-nested-ternary": "error",
      "no-unused-expressions": "error",
      "no-unused-vars": ["error", {args: "after-used", destructuredArrayIgnorePattern: "."}],
      "no-var": "error",
      "one-var": ["error", "never"],
      "prefer-const": "error",
      "style/max-len": ["error", {code: 120}],
      "style/max-statements-per-line": ["error", {max: 2}],
    },
  },
];
