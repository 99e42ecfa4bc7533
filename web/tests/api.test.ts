import { afterEach, describe, expect, it, vi } from 'vitest';
import { ChatError, serverSentEvents, streamChat, type ChatRequest, type Delta } from '../src/lib/api.ts';
import { messages } from '../src/lib/messages.ts';

const REQUEST: ChatRequest = { model: 'm', messages: [], temperature: 0, max_tokens: 9, thinking: true };

function streamOf(text: string, step: number): ReadableStream<Uint8Array> {
  const bytes = new TextEncoder().encode(text);
  return new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += step) controller.enqueue(bytes.slice(at, at + step));
      controller.close();
    },
  });
}

async function collect<T>(items: AsyncGenerator<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const item of items) all.push(item);
  return all;
}

const answerWith = (response: Response) => vi.stubGlobal('fetch', () => Promise.resolve(response));
const ask = (): Promise<Delta[]> => collect(streamChat(REQUEST, new AbortController().signal));
const chunk = (value: unknown) => `data: ${JSON.stringify(value)}\n\n`;

afterEach(() => vi.unstubAllGlobals());

describe('server-sent events', () => {
  it.each([1, 2, 3, 5, 1000])('are the same in pieces of %d bytes', async (step) => {
    const text = ': keep-alive\n\ndata: {"a":"数"}\r\n\r\nevent: x\ndata:1\ndata: 2\n\ndata: [DONE]\n\n';
    expect(await collect(serverSentEvents(streamOf(text, step)))).toEqual(['{"a":"数"}', '1\n2', '[DONE]']);
  });
});

describe('an answer', () => {
  it('comes with thinking, words, finish and usage', async () => {
    const text =
      chunk({ choices: [{ delta: { role: 'assistant', reasoning_content: 'hm' } }] }) +
      chunk({ choices: [{ delta: { content: '4' }, finish_reason: 'stop' }] }) +
      chunk({ choices: [], usage: { completion_tokens: 2 } }) +
      'data: [DONE]\n\n';
    answerWith(new Response(streamOf(text, 7)));
    expect(await ask()).toEqual([
      { reasoning: 'hm', content: '', finish: null, completionTokens: null },
      { reasoning: '', content: '4', finish: 'stop', completionTokens: null },
      { reasoning: '', content: '', finish: null, completionTokens: 2 },
    ]);
  });

  it.each([
    ['the server’s own sentence', Response.json({ error: { message: 'too long' } }, { status: 400 }), 'too long'],
    ['a queue that is full', new Response('<h1>no</h1>', { status: 503 }), messages.errors.busy],
    ['a bare status', new Response('', { status: 404 }), messages.errors.status(404)],
    ['an error in the stream', new Response(chunk({ error: { message: 'failed' } })), 'failed'],
    ['something that is no answer', new Response('data: {\n\n'), messages.errors.unreadable],
    ['a stream that breaks off', new Response(chunk({ choices: [] })), messages.errors.cut],
  ])('that fails says why in one sentence: %s', async (_, response, sentence) => {
    answerWith(response);
    await expect(ask()).rejects.toThrow(new ChatError(sentence));
  });

  it('that cannot be asked for says that the server is gone', async () => {
    vi.stubGlobal('fetch', () => Promise.reject(new TypeError('Failed to fetch')));
    await expect(ask()).rejects.toThrow(messages.errors.unreachable);
  });
});
