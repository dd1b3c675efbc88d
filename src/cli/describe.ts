// Results in words, for a person.
import type { EngineEvent, UnloadReport } from '../memtables/report.js';
import { hex } from '../vmi/address.js';
import { loadRefusal } from './reasons.js';

type Relocated = Extract<EngineEvent, { type: 'relocated' }>;

/** One line for each event; `undefined` for one that has been told of already. */
export function describeEvents(): (event: EngineEvent) => string | undefined {
  let waiting = false;
  return (event) => {
    switch (event.type) {
      case 'hooked':
        return `hooked ${event.name} at ${hex(event.function)}, ${event.replacedBytes} bytes moved to ${hex(event.trampoline)}`;
      case 'relocated':
        return describeRelocation(event);
      case 'refused':
        return `left the load at ${hex(event.site)}${inModule(event)} alone: ${inWords(event.reason)}`;
      case 'planned':
        return `planned ahead: ${plural(event.pages.length, 'page')} to trap, with ${plural(event.switches, 'switch', 'switches')}`;
      case 'taken-back':
        return `the guest wrote over ${event.owner} at ${hex(event.at)}: taken back`;
      case 'module-unloaded':
        return `the guest unloaded the module with ${event.owner} at ${hex(event.at)}: forgotten`;
      case 'unload-blocked': {
        const told = waiting;
        waiting = true;
        return told ? undefined : 'waiting for threads to leave the handlers';
      }
    }
  };
}

function describeRelocation(event: Relocated): string {
  const { form, site, entries, encoder, handlers, hits } = event;
  const what = `${form} switch at ${hex(site)}${inModule(event)} (${plural(entries, 'entry', 'entries')})`;
  const places = handlers.map(({ gva }) => hex(gva)).join(' and ');
  return `relocated ${what} to ${encoder} code at ${places} after ${plural(hits, 'hit')}`;
}

function inModule({ module }: { readonly module?: string }): string {
  return module === undefined ? '' : ` in ${module}`;
}

function inWords(reason: string): string {
  const words = loadRefusal(reason);
  return words === undefined ? reason : `${words} [${reason}]`;
}

export function counts(byName: Readonly<Record<string, number>>): string {
  const parts = Object.entries(byName).map(([name, count]) => `${name} ${count}`);
  return parts.length === 0 ? 'none' : parts.join(', ');
}

/** `1 hook`, `2 hooks`. */
export function plural(count: number, one: string, many = `${one}s`): string {
  return `${count.toLocaleString('en')} ${count === 1 ? one : many}`;
}

/** Nothing below that is of interest. */
export function inMilliseconds(report: UnloadReport): UnloadReport {
  return { ...report, seconds: Math.round(report.seconds * 1000) / 1000 };
}
