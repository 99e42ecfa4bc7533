/** The conversation: asks, streams, stops, asks again. It lives in this page only and is gone when it closes. */

import { flushSync } from 'svelte';
import { ChatError, streamChat, type Message } from './api.ts';
import { messages } from './messages.ts';

export class Settings {
  temperature = $state(0.6);
  maxTokens = $state(512);
  thinking = $state(true);
  remember = $state(true);
}

type Phase = 'waiting' | 'thinking' | 'answering' | 'done' | 'stopped' | 'failed';

export class Answer {
  reasoning = $state('');
  content = $state('');
  phase = $state<Phase>('waiting');
  /** One sentence: why there is no (whole) answer. */
  note = $state('');
  thoughtSeconds = $state<number | null>(null);
  firstTokenSeconds = $state<number | null>(null);
  tokens = $state<number | null>(null);
  tokensPerSecond = $state<number | null>(null);
  streaming = $derived(this.phase === 'waiting' || this.phase === 'thinking' || this.phase === 'answering');
}

export class Exchange {
  answer = $state(new Answer());
  constructor(readonly question: string) {}
}

const now = () => performance.now() / 1000;
const SHORTEST = 0.02; // seconds; a rate over less says nothing

export class Chat {
  exchanges = $state<Exchange[]>([]);
  model = $state('');
  settings = new Settings();
  busy = $derived(this.exchanges.at(-1)?.answer.streaming ?? false);
  #stop = new AbortController();

  async ask(question: string): Promise<void> {
    if (this.busy || !question.trim()) return;
    this.exchanges.push(new Exchange(question.trim()));
    await this.#answer();
  }

  async regenerate(): Promise<void> {
    const last = this.exchanges.at(-1);
    if (this.busy || !last) return;
    last.answer = new Answer();
    await this.#answer();
  }

  stop(): void {
    this.#stop.abort();
  }

  clear(): void {
    this.stop();
    this.exchanges = [];
  }

  /** What is sent: the last question, and before it the exchanges that came to an answer. */
  #messages(): Message[] {
    const earlier = this.settings.remember ? this.exchanges.slice(0, -1) : [];
    return [
      ...earlier
        .filter((exchange) => exchange.answer.content)
        .flatMap(({ question, answer }): Message[] => [
          { role: 'user', content: question },
          { role: 'assistant', content: answer.content },
        ]),
      { role: 'user', content: this.exchanges.at(-1)!.question },
    ];
  }

  async #answer(): Promise<void> {
    const answer = this.exchanges.at(-1)!.answer;
    const { temperature, maxTokens, thinking } = this.settings;
    const stop = (this.#stop = new AbortController());
    const painter = new Painter(answer);
    const started = now();
    let firstToken: number | null = null;
    const endThought = () => {
      if (firstToken !== null && answer.thoughtSeconds === null) answer.thoughtSeconds = now() - firstToken;
    };
    try {
      const request = { model: this.model, messages: this.#messages(), temperature, max_tokens: maxTokens, thinking };
      for await (const delta of streamChat(request, stop.signal)) {
        if (delta.reasoning || delta.content) {
          firstToken ??= now();
          answer.firstTokenSeconds ??= firstToken - started;
        }
        if (delta.reasoning) answer.phase = 'thinking';
        if (delta.content) {
          if (answer.phase === 'thinking') endThought();
          answer.phase = 'answering';
        }
        painter.add(delta.reasoning, delta.content);
        if (delta.finish === 'length') answer.note = messages.tooLong(maxTokens);
        if (delta.completionTokens !== null) answer.tokens = delta.completionTokens;
      }
      const spent = now() - (firstToken ?? now());
      if (answer.tokens && spent > SHORTEST) answer.tokensPerSecond = (answer.tokens - 1) / spent; // without the first
      painter.finish();
      if (!answer.content && !answer.note) answer.note = messages.empty;
      if (answer.phase === 'thinking') endThought();
      answer.phase = 'done';
    } catch (error) {
      painter.finish();
      if (answer.phase === 'thinking') endThought();
      answer.phase = stop.signal.aborted ? 'stopped' : 'failed';
      answer.note = stop.signal.aborted ? messages.stopped : (error as Error).message;
      if (!stop.signal.aborted && !(error instanceof ChatError)) throw error; // a fault of this page: to the console
    }
  }
}

const FRAME_MS = 16;
const REST = 4; // milliseconds left to the browser for each millisecond spent on painting

/** Gathers pieces and shows them at most once a frame, less often when showing them is slow. */
class Painter {
  #reasoning = '';
  #content = '';
  #timer: ReturnType<typeof setTimeout> | undefined;
  #wait = FRAME_MS;

  constructor(readonly answer: Answer) {}

  add(reasoning: string, content: string): void {
    this.#reasoning += reasoning;
    this.#content += content;
    this.#timer ??= setTimeout(() => this.#paint(), this.#wait);
  }

  finish(): void {
    clearTimeout(this.#timer);
    this.#paint();
  }

  #paint(): void {
    const started = performance.now();
    this.answer.reasoning += this.#reasoning;
    this.answer.content += this.#content;
    this.#reasoning = this.#content = '';
    flushSync();
    this.#wait = Math.max(FRAME_MS, REST * (performance.now() - started));
    this.#timer = undefined;
  }
}
