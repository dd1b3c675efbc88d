import { execFile } from 'node:child_process';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { basename } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { isDeepStrictEqual, promisify } from 'node:util';
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
 * The same many times in a row: a thread that is ending, and the socket with which the host tries again and again to
 * reach the next tool, are gone a moment later, or longer where the processors are busy.
 */
async function settled(look: () => Holdings): Promise<Holdings> {
  let before = look();
  for (let same = 0; same < 20; ) {
    await sleep(50);
    const now = look();
    same = isDeepStrictEqual(now, before) ? same + 1 : 0;
    before = now;
  }
  return before;
}

/** What is held once it is `expected`, or when it has not become that for long. */
async function settledAs(expected: Holdings, look: () => Holdings): Promise<Holdings> {
  for (let tries = 0; tries < 400 && !isDeepStrictEqual(look(), expected); tries++) await sleep(50);
  return look();
}

/**
 * Opens and closes sessions in one thread (a worker of Node's keeps some memory of its own), each with reads and a trap;
 * prints by how many bytes the C heap has grown.
 */
const SESSIONS = 20;
const IN_ONE_THREAD = `
  import { setTimeout as sleep } from 'node:timers/promises';
  import koffi from 'koffi';
  import { openSession } from '${new URL('../../dist/libvmi/open-session.js', import.meta.url)}';
  const [socket, libraryPath] = process.argv.slice(1);
  koffi.struct('mallinfo2', Object.fromEntries(Array.from({ length: 10 }, (_, i) => ['field' + i, 'size_t'])));
  const mallinfo2 = koffi.load(null).func('mallinfo2 mallinfo2()');
  async function inUse() {
    // What is collected is freed by a thread in the background.
    for (let i = 0; i < 3; i++) {
      gc();
      await sleep(100);
    }
    return Number(mallinfo2().field7);
  }
  async function cycle() {
    const session = openSession({ name: 'embedded', socket, libraryPath });
    session.onViolation(() => undefined);
    session.pause();
    for (let gfn = 0n; gfn < 64n; gfn++) session.readPhysical(gfn << 12n, 4096);
    session.resume();
    session.trapAccess(100n);
    session.listen(5);
    session.close();
    // The host has to notice.
    await sleep(20);
  }
  for (let i = 0; i < 5; i++) await cycle();
  const before = await inUse();
  for (let i = 0; i < ${SESSIONS}; i++) await cycle();
  console.log((await inUse()) - before);`;
/** A block of 64 KB kept by each session would be twice as much. */
const MOST_GROWTH = SESSIONS * 32 * 1024;

const countsMemory = (() => {
  try {
    koffi.load(null).func('void mallinfo2()');
    return true;
  } catch {
    // biome-ignore lint/suspicious/noConsole: a skip has to be seen
    console.warn('SKIPPED: "sessions in one thread leave no memory behind" needs mallinfo2 (glibc 2.33)');
    return false;
  }
})();

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
      const after = await settledAs(before, look);
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

  test.runIf(countsMemory)('sessions in one thread leave no memory behind', async () => {
    const args = ['--expose-gc', '--input-type=module', '-e', IN_ONE_THREAD, host.socket, path];
    const { stdout } = await promisify(execFile)(process.execPath, args);
    // biome-ignore lint/suspicious/noConsole: figures, to be read
    console.info(
      `cycles: ${library}: ${SESSIONS} sessions, the C heap grew by ${Math.round(Number(stdout) / 1024)} KB`,
    );
    expect(Number(stdout)).toBeLessThan(MOST_GROWTH);
    await host.expectAsFound();
  });
});
