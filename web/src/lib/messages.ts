/** Every text of the page, so that a second language is one more object of this shape. */

const NBSP = '\u00a0'; // a number and its unit stay on one line
const number = new Intl.NumberFormat('en');
const short = new Intl.NumberFormat('en', { notation: 'compact', maximumSignificantDigits: 3 });
const percent = (share: number, error: number) => `${(100 * share).toFixed(1)} ± ${(100 * error).toFixed(1)}${NBSP}%`;
const seconds = (value: number) => `${value.toFixed(value < 0.1 ? 2 : value < 10 ? 1 : 0)}${NBSP}s`;

export const messages = {
  language: 'en',
  name: 'motley',
  title: (model: string) => `${model} · motley`,

  newChat: 'New chat',
  about: 'About this model',
  settings: 'Settings',
  close: 'Close',

  greeting: 'Talk to the model you trained',
  privacy: 'Answers come from the machine that serves this page. What you type goes nowhere else.',
  parameters: (all: number, active: number) =>
    `${short.format(all)} parameters` + (active < all ? `, ${short.format(active)} at work for each token` : ''),
  context: (tokens: number) => `reads up to ${number.format(tokens)} tokens`,
  accuracy: percent,
  accuracyMeaning: (count: number) =>
    `of ${number.format(count)} fresh problems, not seen in training, answered right (± one standard error)`,
  familyAccuracy: (share: number, error: number) => `${percent(share, error)} right`,
  canAndCannot: 'What it can and cannot do',
  tryOne: 'It was trained for these. Try one:',
  family: (id: string) => (id.charAt(0).toUpperCase() + id.slice(1)).replaceAll('_', ' ').replace(/:(.+)$/, ' ($1)'),

  conversation: 'Conversation',
  you: 'You',
  write: 'Write',
  question: 'Your message',
  placeholder: 'Ask something…',
  send: 'Send',
  stop: 'Stop',
  keys: 'Enter sends · Shift + Enter starts a new line',
  stopKey: 'Escape stops',
  latest: 'Go to the latest message',

  waiting: 'Reading…',
  thinking: 'Thinking…',
  answering: 'Answering',
  thought: (spent: number) => `Thought for ${seconds(spent)}`,
  thoughtStopped: 'Thinking was stopped',
  regenerate: 'Answer again',
  copy: 'Copy answer',
  copied: 'Copied',
  stopped: 'Stopped.',
  tooLong: (limit: number) => `Cut at the limit of ${number.format(limit)} tokens (see Settings).`,
  empty: 'The model gave no answer.',
  tokens: (count: number) => `${number.format(count)}${NBSP}${count === 1 ? 'token' : 'tokens'}`,
  speed: (rate: number) => `${number.format(rate < 10 ? Math.round(rate * 10) / 10 : Math.round(rate))}${NBSP}tokens/s`,
  firstToken: (spent: number) => `first after ${seconds(spent)}`,
  image: (words: string) => `Image, not loaded: ${words}`,

  temperature: 'Temperature',
  temperatureMeaning: '0 always takes the likeliest token; higher is more varied, and more often wrong.',
  maxTokens: 'Longest answer, in tokens',
  maxTokensMeaning: 'Thinking counts too.',
  think: 'Think',
  thinkMeaning: 'Let the model think before it answers.',
  remember: 'Send earlier messages along',
  rememberMeaning: 'Off: every question stands alone, as a model trained on single questions expects.',

  errors: {
    unreachable: 'The server cannot be reached: is `motley serve` still running?',
    cut: 'The connection broke before the answer was complete; try again.',
    busy: 'The server is busy with other questions; try again in a moment.',
    noAbout: 'The server gave no description of this model, so its abilities and example prompts are not shown.',
    status: (status: number) => `The server answered with status ${status}.`,
    unreadable: 'The server sent something that is not a chat answer; is this a motley server of the same version?',
  },
};
