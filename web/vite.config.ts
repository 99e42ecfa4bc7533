import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

// The pages are static files inside the Python package: see docs/page.md.
export default defineConfig({
  base: './', // works under any prefix
  plugins: [svelte()],
  build: {
    outDir: '../src/motley/serve/pages',
    emptyOutDir: true,
    assetsInlineLimit: 0, // no data: addresses, so that the content security policy can stay strict
    modulePreload: { polyfill: false },
  },
  // `npm run dev` beside a running `motley serve`
  server: { proxy: { '/v1': 'http://127.0.0.1:8321', '/api': 'http://127.0.0.1:8321' } },
});
