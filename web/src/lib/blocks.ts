/**
 * Cuts growing markdown into blocks that render alone, so that each new token costs one open block and not the
 * whole answer again (parsing everything at every token is quadratic).
 *
 * A cut is made at a blank line outside a code fence, unless the next line may belong to what came before
 * (indented, or one more item of the same list). Where in doubt it does not cut: a coarser block is slower, never
 * wrong. One thing is given up: a link definition `[name]: address` counts only inside its own block.
 */

const ITEM = /^ {0,3}(?:[-*+]|\d{1,9}[.)])[ \t]/;
const OPENS_FENCE = /^[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(`{3,}|~{3,})/;
const CLOSES_FENCE = /^[ \t]*(`{3,}|~{3,})[ \t]*$/;

export class BlockSplitter {
  #finished: string[] = [];
  #blockStart = 0;
  #lineStart = 0; // of the first line not looked at yet
  #fence = ''; // what opened the fence we are in
  #afterBlank = false;
  #inList = false;

  /** The blocks of `text`, which must begin with the text of the call before. Joined they are `text` again. */
  split(text: string): string[] {
    for (let end; (end = text.indexOf('\n', this.#lineStart)) >= 0; this.#lineStart = end + 1) {
      this.#see(text.slice(this.#lineStart, end), text);
    }
    const open = text.slice(this.#blockStart);
    return open ? [...this.#finished, open] : this.#finished;
  }

  #see(line: string, text: string): void {
    if (this.#fence) {
      const marker = CLOSES_FENCE.exec(line)?.[1];
      if (marker?.startsWith(this.#fence)) this.#fence = '';
      return;
    }
    if (!line.trim()) {
      this.#afterBlank = true;
      return;
    }
    const belongs = /^[ \t]/.test(line) || (this.#inList && ITEM.test(line));
    if (this.#afterBlank && !belongs && this.#lineStart > this.#blockStart) {
      this.#finished.push(text.slice(this.#blockStart, this.#lineStart));
      this.#blockStart = this.#lineStart;
      this.#inList = false;
    }
    this.#afterBlank = false;
    this.#inList ||= ITEM.test(line);
    this.#fence = OPENS_FENCE.exec(line)?.[1] ?? '';
  }
}
