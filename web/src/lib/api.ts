/** The server: what model it holds, and answers streamed as server-sent events (OpenAI's form). */

import { messages } from './messages.ts';

export interface Score {
  accuracy: number;
  standard_error: number;
  count: number;
}

/** GET api/about: what the model folder's about.json says, with the sizes the server knows. */
export interface About {
  model: string;
  parameters: number;
  active_parameters: number;
  context_length: number;
  about: string[];
  prompts: { family: string; text: string }[];
  accuracy: (Score & { families?: Record<string, Score> }) | null;
  /** How the accuracy was measured; the page starts with the same settings. */
  defaults?: { temperature?: number; max_tokens?: number; thinking?: boolean; remember?: boolean };
}

export interface Message {
  role: 'user' | 'assistant';
  content: string;
}

export interface ChatRequest {
  model: string;
  messages: Message[];
  temperature: number;
  max_tokens: number;
  thinking: boolean;
}

/** A piece of an answer. */
export interface Delta {
  reasoning: string;
  content: string;
  finish: string | null;
  completionTokens: number | null;
}

/** Something went wrong; the message is one sentence for the reader of the page. */
export class ChatError extends Error {}

export async function fetchAbout(): Promise<About> {
  const response = await request('api/about');
  return response.json();
}

export async function* streamChat(chat: ChatRequest, signal: AbortSignal): AsyncGenerator<Delta> {
  const response = await request('v1/chat/completions', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({
      ...chat,
      thinking: { type: chat.thinking ? 'enabled' : 'disabled' },
      stream: true,
      stream_options: { include_usage: true },
    }),
    signal,
  });
  try {
    for await (const data of serverSentEvents(response.body!)) {
      if (data === '[DONE]') return;
      yield readDelta(data);
    }
  } catch (error) {
    if (error instanceof ChatError || signal.aborted) throw error;
    throw new ChatError(messages.errors.cut);
  }
  throw new ChatError(messages.errors.cut);
}

/** The `data` of each event; comments (keep-alive) and other fields are passed over. */
export async function* serverSentEvents(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let pending = '';
  let data: string[] = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      pending += decoder.decode(value, { stream: !done });
      const lines = pending.split('\n');
      pending = lines.pop()!;
      for (const raw of lines) {
        const line = raw.endsWith('\r') ? raw.slice(0, -1) : raw;
        if (line.startsWith('data:')) {
          data.push(line.slice(line[5] === ' ' ? 6 : 5));
        } else if (line === '' && data.length) {
          yield data.join('\n');
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {}); // already broken or aborted: nothing left to free
  }
}

function readDelta(data: string): Delta {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ChatError(messages.errors.unreadable);
  }
  if (chunk.error) throw new ChatError(chunk.error.message ?? messages.errors.unreadable);
  const choice = chunk.choices?.[0];
  return {
    reasoning: choice?.delta?.reasoning_content ?? '',
    content: choice?.delta?.content ?? '',
    finish: choice?.finish_reason ?? null,
    completionTokens: chunk.usage?.completion_tokens ?? null,
  };
}

async function request(path: string, options?: RequestInit): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options?.signal?.aborted) throw error;
    throw new ChatError(messages.errors.unreachable);
  }
  if (response.ok) return response;
  throw new ChatError(await sentence(response));
}

/** What a refusal says: the server's own sentence where it sent one. */
async function sentence(response: Response): Promise<string> {
  const body = await response.text();
  try {
    const said = JSON.parse(body).error?.message;
    if (typeof said === 'string' && said) return said;
  } catch {
    // not JSON: a proxy's page, say; the status tells more than its HTML
  }
  return response.status === 429 || response.status === 503 ? messages.errors.busy : messages.errors.status(response.status);
}
