import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { MemtablesError } from '../../src/errors.js';
import { cutConnection } from '../../src/libvmi/cut.js';
import { createHeartbeat, Watchdog } from '../../src/libvmi/watchdog.js';
import { LIBRARIES } from '../libvmi/libraries.js';
import { Peer } from '../libvmi/peer.js';

/** Longer than a busy machine ever takes for a call that is answered. */
const LIMIT_MS = 1000;
const PAUSE_VCPU = 7;
const GET_REGISTERS = 13;
const READ_PHYSICAL = 17;
const SET_PAGE_ACCESS = 21;

// A worker cannot load TypeScript.
const SESSION = new URL('../../dist/libvmi/open-session.js', import.meta.url);
const isBuilt = existsSync(SESSION);
if (!isBuilt) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn('SKIPPED: "a thread that is stuck" needs dist/: run npm run setup');
}

/** A session in a thread of its own: told one method call a message, it says how each ended. */
const THREAD = `
const { parentPort, workerData } = require('node:worker_threads');
import(workerData.module).then(({ openSession }) => {
  const session = openSession(workerData.options);
  session.onViolation(() => undefined);
  parentPort.postMessage('attached');
  parentPort.on('message', ([method, args]) => {
    parentPort.postMessage('begins');
    try {
      session[method](...args);
      parentPort.postMessage('done');
    } catch (error) {
      parentPort.postMessage(error.code ?? String(error));
    }
  });
});`;

describe.runIf(isBuilt).each(LIBRARIES)('a thread that is stuck in $library', ({ path }) => {
  let directory: string;
  let socket: string;
  let peer: Peer;
  let thread: Worker;
  let heartbeat: SharedArrayBuffer;
  let messages: string[];
  let watchdog: Watchdog | undefined;
  let stuck: MemtablesError[];

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'memtables-stuck-'));
    socket = join(directory, 'kvmi.sock');
    peer = await Peer.start({ socket, vcpus: 2, frames: 16 });
    heartbeat = createHeartbeat();
    stuck = [];
    messages = [];
    const options = { name: 'guest', socket, libraryPath: path, heartbeat };
    thread = new Worker(THREAD, { eval: true, workerData: { module: SESSION.href, options } });
    thread.on('message', (message: string) => messages.push(message));
    await next('attached');
  });

  afterEach(async () => {
    watchdog?.stop();
    watchdog = undefined;
    cutConnection(socket);
    await thread.terminate();
    await peer.stop();
    rmSync(directory, { recursive: true });
  });

  async function next(expected?: string): Promise<string> {
    while (messages.length === 0) await sleep(5);
    const message = messages.shift()!;
    if (expected !== undefined) expect(message).toBe(expected);
    return message;
  }

  async function call(method: string, ...args: unknown[]): Promise<string> {
    thread.postMessage([method, args]);
    await next('begins');
    return await next();
  }

  function watch(): void {
    watchdog = new Watchdog(heartbeat, { limitMs: LIMIT_MS }, (error) => {
      stuck.push(error);
      cutConnection(socket);
    });
  }

  test.each<[string, number, string, unknown[]]>([
    ['vmi_read_pa', READ_PHYSICAL, 'readPhysical', [0x3000n, 1]],
    ['vmi_get_vcpuregs', GET_REGISTERS, 'registers', [1]],
    ['vmi_set_mem_event', SET_PAGE_ACCESS, 'trapAccess', [3n]],
    ['vmi_pause_vm', PAUSE_VCPU, 'pause', []],
  ])(
    '%s, because nothing is answered any more, is freed by cutting the connection',
    async (name, command, method, args) => {
      peer.ask('onCommand', { command, action: 'ignore' });
      watch();
      expect(await call(method, ...args)).toBe('HYPERVISOR_GONE');
      expect(stuck.map(({ code, context }) => [code, context.call])).toEqual([['HYPERVISOR_STUCK', name]]);
      expect(await call('close')).toBe('done');
      peer.ask('disconnected');
    },
  );

  test('vmi_resume_vm, because a vCPU never stops, is freed by cutting the connection', async () => {
    peer.ask('neverPauses', 1);
    expect(await call('pause')).toBe('done');
    watch();
    expect(await call('resume')).toBe('HYPERVISOR_GONE');
    expect(stuck.map(({ context }) => context.call)).toEqual(['vmi_resume_vm']);
    expect(await call('close')).toBe('done');
    peer.ask('disconnected');
  });

  test('vmi_destroy, because nothing is answered any more, is freed by cutting the connection', async () => {
    peer.ask('onCommand', { command: PAUSE_VCPU, action: 'ignore' });
    watch();
    expect(await call('close')).toBe('done');
    expect(stuck.map(({ context }) => context.call)).toEqual(['vmi_destroy']);
    peer.ask('disconnected');
  });

  test('and is terminated: what is raised then is answered, and the guest is free once the connection is cut', async () => {
    thread.postMessage(['listen', [600_000]]);
    await next('begins');
    const ended = thread.terminate();
    await sleep(50);
    peer.ask('fault', { vcpu: 0, gva: 0x3000n, gpa: 0x3000n, access: 1 });
    peer.ask('answers', 1);
    cutConnection(socket);
    peer.ask('disconnected');
    await ended;
  });
});
