import { describe, expect, it } from 'vitest';
import { BlockSplitter } from '../src/lib/blocks.ts';
import { render } from '../src/lib/markdown.ts';

const DOCUMENT = `# Title

A paragraph
of two lines.

- one
- two

  still two

- three

1. first

2. second

\`\`\`python
def f():

    return 1
\`\`\`

> quoted

| a | b |
|---|--:|
| 1 | 2 |

    indented code

    more of it

- a list with a fence
  ~~~
  - not an item

  ~~~

Last words, **bold**.
`;

function html(sources: string[]): string {
  const box = document.createElement('div');
  for (const source of sources) box.append(render(source));
  return box.innerHTML;
}

describe('blocks of a growing text', () => {
  it('joined are the text, and render as the whole text does', () => {
    const blocks = new BlockSplitter().split(DOCUMENT);
    expect(blocks.join('')).toBe(DOCUMENT);
    expect(blocks.length).toBeGreaterThan(7);
    expect(html(blocks)).toBe(html([DOCUMENT]));
  });

  it('are the same however the text arrives', () => {
    const whole = new BlockSplitter().split(DOCUMENT);
    for (const step of [1, 2, 3, 7, 50]) {
      const splitter = new BlockSplitter();
      let last: string[] = [];
      for (let end = step; end < DOCUMENT.length + step; end += step) {
        const blocks = splitter.split(DOCUMENT.slice(0, end));
        const kept = last.slice(0, -1);
        expect(blocks.slice(0, kept.length)).toEqual(kept); // what was finished stays as it was
        last = blocks;
      }
      expect(last).toEqual(whole);
    }
  });

  it('cut nothing inside an open fence', () => {
    expect(new BlockSplitter().split('```\na\n\nb\n\nc\n')).toHaveLength(1);
    expect(new BlockSplitter().split('````\n```\n\nb\n````\n\nc\n')).toHaveLength(2);
  });

  it('parse each part of a long answer once', () => {
    const paragraphs = 200;
    const splitter = new BlockSplitter();
    let text = '';
    let parsed = 0;
    for (let index = 0; index < paragraphs; index++) {
      text += `Paragraph ${index} says something.\n\n`;
      parsed += splitter.split(text).at(-1)!.length; // what the page parses again at this moment
    }
    expect(parsed).toBeLessThan(3 * text.length); // the whole answer each time would be 100 times its length
  });
});
