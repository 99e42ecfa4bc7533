import { describe, expect, it } from 'vitest';
import corpus from '../../tests/serve/xss_corpus.json';
import { render } from '../src/lib/markdown.ts';

function html(source: string): string {
  const box = document.createElement('div');
  box.append(render(source));
  return box.innerHTML;
}

describe('markdown of a model', () => {
  it.each(corpus)('is inert: %s', (attack) => {
    const nodes = [...render(attack).querySelectorAll('*')];
    for (const node of nodes) {
      expect(node.tagName).toMatch(/^(A|BLOCKQUOTE|BR|CODE|DEL|EM|H\d|HR|LI|OL|P|PRE|S|SPAN|STRONG|TABLE|TBODY|TD|TH|THEAD|TR|UL)$/);
      for (const { name } of node.attributes) expect(name).toMatch(/^(href|start|align|target|rel|class)$/);
      if (node.hasAttribute('href')) expect(node.getAttribute('href')).toMatch(/^(https?:\/\/|mailto:)/i);
    }
  });

  it('shows what it is meant to show', () => {
    expect(html('**a** _b_ `c`\nd')).toBe('<p><strong>a</strong> <em>b</em> <code>c</code><br>\nd</p>\n');
    expect(html('3. c\n4. d')).toContain('<ol start="3">');
    expect(html('|a|\n|-:|\n|1|')).toContain('<td align="right">1</td>');
  });

  it('opens links elsewhere, tells the other side nothing, and names the host', () => {
    expect(html('[bank](https://evil.example/bank)')).toContain(
      '<a href="https://evil.example/bank" target="_blank" rel="noopener noreferrer">bank<span class="host"> (evil.example)</span></a>',
    );
    expect(html('https://docs.example/a')).not.toContain('class="host"');
    expect(html('[write](mailto:a@b.example)')).toContain('href="mailto:a@b.example"');
  });

  it('turns an image into a link that loads nothing', () => {
    expect(render('![a cat](https://cats.example/1.png)').querySelector('img')).toBeNull();
    expect(html('![a cat](https://cats.example/1.png)')).toContain('Image, not loaded: a cat');
  });
});
