// Real MSVC-built code under traps: what a lexer finds in a text must not depend on what is done to its switches.
import { setImmediate as letOthersRun } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import { type GuestModule, readGuestModule } from '../../src/guest/lexer-module.js';
import { lexerText } from '../../src/guest/lexer-text.js';
import { LEXER_PIECE_BYTES } from '../../src/guest/loader.js';
import type { LexerReport } from '../../src/guest/report.js';
import type { Engine } from '../../src/memtables/engine.js';
import type { EngineEvent } from '../../src/memtables/report.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { processes } from '../../src/nt/processes.js';
import { threads } from '../../src/nt/threads.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { workAll } from './relocated-guest.js';

const module = readGuestModule();
const MEGABYTE = 1 << 20;
const HOUR_MS = 3_600_000;
const LISTENS_AT_ONCE = 100;
/** In ticks; the other threads have one. */
const LONG_QUANTUM = 100;

/** Lets guest and engine work until `done`. */
async function serve(guest: EmbeddedGuest, engine: Engine, done: () => boolean): Promise<void> {
  for (; !done(); await letOthersRun()) {
    for (let listens = 0; listens < LISTENS_AT_ONCE && !done(); listens++) {
      guest.hypervisor.listen(1);
      workAll(engine);
    }
  }
}

/** A guest that runs little but its lexer, and that has found out what is in the text before anything is hooked. */
async function attachedTo(guest: EmbeddedGuest) {
  const attached = guest.attach({ threshold: 20 });
  favourLexer(guest, attached.kernel);
  const lexer = (): LexerReport => guest.report().lexer!;
  const read = async (pieces: number) => {
    const { pieces: before } = lexer();
    // The first that ends has been begun before.
    await serve(guest, attached.engine, () => lexer().pieces > before + BigInt(pieces));
  };
  await serve(guest, attached.engine, () => lexer()?.passes > 0n);
  return { ...attached, lexer, read };
}

function favourLexer({ machine, loaded }: EmbeddedGuest, kernel: Kernel): void {
  const { memory, profile } = kernel;
  const startAddress = BigInt(profile.offset('_ETHREAD', 'StartAddress'));
  const thread = [...processes(kernel)]
    .flatMap((process) => [...threads(kernel, process)])
    .find(({ gva }) => memory.readU64(gva + startAddress) === kernel.symbol('WlLexerThread'))!;
  const quantum = thread.gva + BigInt(profile.offset('_KTHREAD', 'QuantumReset'));
  machine.writePhysical(loaded.translate(quantum)!, Buffer.from([LONG_QUANTUM]));
}

function expectNothingNoticed(guest: EmbeddedGuest): void {
  const { lexer, integrity, bugCheck } = guest.report();
  expect(bugCheck).toBeUndefined();
  expect(lexer!.mismatches).toBe(0n);
  expect(integrity.mismatches).toBe(0n);
  expect(guest.wrongStreams()).toEqual([]);
}

/** What became of each of the lexer's table loads. */
function outcomes(guest: EmbeddedGuest, { sites }: GuestModule, events: readonly EngineEvent[]) {
  const { base } = guest.loaded.module!;
  return sites.map(({ name, loadRva }) => {
    const site = base + BigInt(loadRva);
    const event = events.find(
      (each) => (each.type === 'relocated' || each.type === 'refused') && each.site === site,
    );
    return { name, outcome: event?.type === 'refused' ? event.reason : event?.type };
  });
}

if (module === undefined) {
  describe.skip('the lexer of a real module (no .deps/binaries: run npm run binaries)', () =>
    test('finds the same unhooked, hooked and relocated'));
} else {
  describe('the lexer of a real module', () => {
    test('finds the same unhooked, hooked and relocated; each of its tables is relocated', async () => {
      const pieces = 4;
      const guest = EmbeddedGuest.boot({ seed: 21, text: lexerText(21, pieces * LEXER_PIECE_BYTES) });
      const before = guest.image();
      const { engine, events, lexer, read } = await attachedTo(guest);
      for (const name of module.defaultHooks) engine.hook(name);
      await read(pieces);
      engine.relocating = true;
      const areDecided = () => outcomes(guest, module, events).every(({ outcome }) => outcome !== undefined);
      await serve(guest, engine, areDecided);
      await read(pieces);
      expect(outcomes(guest, module, events)).toEqual([
        { name: 'ts_lex', outcome: 'relocated' },
        { name: 'ts_lex_keywords', outcome: 'relocated' },
      ]);
      engine.unload();
      await read(1);
      expectNothingNoticed(guest);
      expect(lexer().tokens).toBeGreaterThan(0n);
      expect(guest.image()).toBe(before);
    });

    test(
      'finds the same in 1 MB of text, unhooked and relocated',
      async () => {
        const guest = EmbeddedGuest.boot({ seed: 22, text: lexerText(22, MEGABYTE) });
        const before = guest.image();
        const { engine, events, read } = await attachedTo(guest);
        for (const name of module.defaultHooks) engine.hook(name);
        engine.relocating = true;
        const areDecided = () =>
          outcomes(guest, module, events).every(({ outcome }) => outcome !== undefined);
        await serve(guest, engine, areDecided);
        const [large, largest] = outcomes(guest, module, events);
        expect(large!.outcome).toBe('relocated');
        // The lexer nearly always stands in its switches here; what replaces one instruction is larger than any hole.
        expect(largest!.outcome).toMatch(/^(relocated|in-use|no-slack)$/);
        await read(MEGABYTE / LEXER_PIECE_BYTES);
        engine.unload();
        expectNothingNoticed(guest);
        expect(guest.image()).toBe(before);
      },
      HOUR_MS,
    );
  });
}
