import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { basename } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import koffi from 'koffi';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Host, PROFILE } from '../cli/command.js';
import { LIBRARIES } from '../libvmi/libraries.js';

// The built one: its worker is a file of its own.
const { Attachment } = (await import(
  new URL('../../dist/index.js', import.meta.url).href
)) as typeof import('../../src/index.js');

/** Set it to 100 to look for leaks. */
const CYCLES = Number(process.env.MEMTABLES_TEST_CYCLES || 3);
/** What is made once and kept, such as the threads of Node's own pool, is there after these. */
const WARM_UP = 3;
const BYTES_PER_MB = 1024 * 1024;
const CYCLE_MS = 20_000;

/** What both processes hold that is counted exactly. */
interface Holdings {
  readonly toolDescriptors: Record<string, number>;
  readonly hostDescriptors: Record<string, number>;
  readonly toolThreads: number;
  readonly hostThreads: number;
  /** Mappings of the library's file. */
  readonly libraryMappings: number;
  /** Callbacks that C code could call. */
  readonly callbacks: number;
}

function holdings(host: number, library: string): Holdings {
  return {
    toolDescriptors: descriptors('self'),
    hostDescriptors: descriptors(host),
    toolThreads: readdirSync('/proc/self/task').length,
    hostThreads: readdirSync(`/proc/${host}/task`).length,
    libraryMappings: readFileSync('/proc/self/maps', 'utf8').split(`/${basename(library)}`).length - 1,
    callbacks: koffi.stats().callbacks,
  };
}

/** By kind: sockets, pipes, or the file. */
function descriptors(process: number | 'self'): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const descriptor of readdirSync(`/proc/${process}/fd`)) {
    let target: string;
    try {
      target = readlinkSync(`/proc/${process}/fd/${descriptor}`);
    } catch {
      // Closed meanwhile, as is the one of this very listing.
      continue;
    }
    const kind = target.replace(/:\[\d+\]$/, '');
    counts[kind] = (counts[kind] ?? 0) + 1;
  }
  return counts;
}

function total(counts: Readonly<Record<string, number>>): number {
  return Object.values(counts).reduce((sum, count) => sum + count, 0);
}

/** In bytes. */
function residentSize(process: number | 'self'): number {
  const line = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${process}/status`, 'utf8'));
  return Number(line?.[1]) * 1024;
}

/**
 * The same twice in a row: a thread that is ending, and the socket with which the host tries again and again to
 * reach the next tool, are gone a moment later.
 */
async function settled(look: () => Holdings): Promise<Holdings> {
  for (let before = look(); ; ) {
    await sleep(50);
    const now = look();
    if (JSON.stringify(now) === JSON.stringify(before)) return now;
    before = now;
  }
}

describe.each(LIBRARIES)('attaching again and again through $library', ({ library, path }) => {
  let host: Host;
  beforeEach(async () => {
    host = await Host.start();
  });
  afterEach(() => host.stop());

  async function cycle(): Promise<void> {
    const attachment = await Attachment.open({
      name: 'embedded',
      socket: host.socket,
      profile: PROFILE,
      library: path,
      threshold: 1,
    });
    await attachment.hook('nt!NtQuerySystemInformation');
    while ((await attachment.statistics()).relocations === 0) {}
    await attachment.unload();
    await host.expectAsFound();
  }

  test(
    `${CYCLES} times, with a relocation each time, leaves nothing behind`,
    async () => {
      const pid = host.command.process.pid!;
      const look = () => holdings(pid, path);
      const resident = () => [residentSize('self'), residentSize(pid)] as const;
      for (let i = 0; i < WARM_UP; i++) await cycle();
      const before = await settled(look);
      const [toolBefore, hostBefore] = resident();
      for (let i = 0; i < CYCLES; i++) await cycle();
      const after = await settled(look);
      const [toolAfter, hostAfter] = resident();
      const { restrictedFrames } = await host.client.statistics();
      const change = (from: number, to: number) => `${from} → ${to}`;
      const size = (from: number, to: number) =>
        `${change(Math.round(from / BYTES_PER_MB), Math.round(to / BYTES_PER_MB))} MB`;
      // biome-ignore lint/suspicious/noConsole: figures, to be read
      console.info(
        [
          `cycles: ${library}: ${CYCLES} cycles`,
          `descriptors ${change(total(before.toolDescriptors), total(after.toolDescriptors))}`,
          `host ${change(total(before.hostDescriptors), total(after.hostDescriptors))}`,
          `threads ${change(before.toolThreads, after.toolThreads)}`,
          `host ${change(before.hostThreads, after.hostThreads)}`,
          `mappings of the library ${change(before.libraryMappings, after.libraryMappings)}`,
          `callbacks ${change(before.callbacks, after.callbacks)}`,
          `RSS ${size(toolBefore, toolAfter)}`,
          `host ${size(hostBefore, hostAfter)}`,
          `restricted frames ${restrictedFrames}`,
          'image identical after each',
        ].join(', '),
      );
      expect(after).toEqual(before);
    },
    (WARM_UP + CYCLES) * CYCLE_MS,
  );
});
