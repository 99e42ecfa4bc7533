import { mount } from 'svelte';
import App from './App.svelte';
import './app.css';
import { messages } from './lib/messages.ts';

document.documentElement.lang = messages.language;
mount(App, { target: document.getElementById('app')! });
