import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { loadGuest } from '../../src/guest/loader.js';
import { predictChecksum } from '../../src/guest/workload-model.js';
import { serveGuest } from '../../src/host/host.js';
import {
  controlCmdResponse,
  EventId,
  encodeMessage,
  introspectorToQemu,
  MessageId,
  PageAccess,
  pauseVcpu,
  qemuToIntrospector,
  vcpuHeader,
} from '../../src/host/kvmi-wire.js';
import type { HostStatistics } from '../../src/host/statistics.js';
import { StatisticsClient } from '../../src/host/statistics-client.js';
import { createMachine } from '../../src/machine/create-machine.js';
import type { Machine } from '../../src/machine/machine.js';
import { type Gpa, PAGE_SIZE } from '../../src/vmi/address.js';
import { Introspector } from './introspector.js';

const VCPUS = 2;
const artefacts = readGuestArtefacts();

let directory: string;
let socket: string;
let machine: Machine;
let client: StatisticsClient;
let stop: AbortController;
let ended: Promise<void>;
/** The frames of all pages with switch tables. */
let frames: Gpa[];
let log: string[];

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'memtables-host-'));
  socket = join(directory, 'tool');
  machine = createMachine({ vcpus: VCPUS, memoryBytes: 32 << 20 });
  const guest = loadGuest(machine, { image: artefacts.image, hal: artefacts.hal, seed: 11 });
  machine.setTimer(0xd1, 1000);
  const pages = new Set(artefacts.sites.sites.map(({ tableRva }) => BigInt(tableRva & ~(PAGE_SIZE - 1))));
  frames = [...pages].map((page) => guest.translate(guest.kernelBase + page)!);
  stop = new AbortController();
  log = [];
  ended = serveGuest(machine, guest, artefacts, {
    socket,
    signal: stop.signal,
    log: (line) => log.push(line),
  });
  ended.catch(() => {});
  client = await connectSoon(`${socket}.stats`);
});

afterEach(async () => {
  stop.abort();
  await ended;
  client.close();
  machine.close();
  rmSync(directory, { recursive: true, force: true });
});

async function connectSoon(path: string): Promise<StatisticsClient> {
  for (;;) {
    try {
      return await StatisticsClient.connect(path);
    } catch {
      await sleep(5);
    }
  }
}

async function until(condition: (statistics: HostStatistics) => boolean): Promise<HostStatistics> {
  for (;;) {
    const statistics = await client.statistics();
    if (condition(statistics)) return statistics;
    await sleep(5);
  }
}

/** Nothing of the last tool is left, the guest runs on, and has noticed nothing. */
async function expectUnharmed(): Promise<void> {
  const before = await client.statistics();
  expect(before).toMatchObject({ restrictedFrames: 0, outstandingEvents: 0, paused: [false, false] });
  const earlier = before.guest!;
  const { guest, violations } = await until(
    (now) =>
      now.guest!.switches['one-level'] > earlier.switches['one-level'] &&
      now.guest!.processors.every(({ ticks }, vcpu) => ticks > earlier.processors[vcpu]!.ticks),
  );
  expect(guest).toMatchObject({ integrityMismatches: 0, userErrors: 0 });
  expect(guest!.bugCheck).toBeUndefined();
  for (const { form, seed, count, checksum } of guest!.streams) {
    expect(predictChecksum(artefacts.sites.calls, form, seed, BigInt(count))).toBe(checksum);
  }
  expect(violations.read).toBe(before.violations.read);
}

describe('a host whose tool dies', () => {
  type Death = (tool: Introspector) => Promise<void> | void;

  const trapEverything = async (tool: Introspector) => {
    for (let vcpu = 0; vcpu < VCPUS; vcpu++) await tool.enable(vcpu, EventId.PF);
    await tool.setAccess(...frames.map((gpa) => ({ gpa, access: PageAccess.EXECUTE })));
  };
  const answerSome = async (tool: Introspector, count: number) => {
    for (let answered = 0; answered < count; answered++) tool.answer(await tool.event());
  };

  const DEATHS: [string, Death][] = [
    ['before it has said anything', () => {}],
    ['with pages trapped, and no event answered', async (tool) => void (await trapEverything(tool))],
    [
      'with an event unanswered on every vCPU',
      async (tool) => {
        await trapEverything(tool);
        await answerSome(tool, 20);
        await tool.event();
        await tool.event();
      },
    ],
    [
      'with answers still on their way',
      async (tool) => {
        await trapEverything(tool);
        await answerSome(tool, 33);
      },
    ],
    [
      'amid a message',
      async (tool) => {
        await trapEverything(tool);
        await answerSome(tool, 7);
        tool.raw(encodeMessage(MessageId.WRITE_PHYSICAL, 9, Buffer.alloc(500)).subarray(0, 100));
        await sleep(5);
      },
    ],
    [
      'with the guest paused',
      async (tool) => {
        await trapEverything(tool);
        await tool.pauseAll(VCPUS);
        await tool.event();
        await tool.event();
      },
    ],
    [
      'with pauses due behind events',
      async (tool) => {
        await trapEverything(tool);
        await tool.event();
        await tool.event();
        await tool.pauseAll(VCPUS);
      },
    ],
    [
      'amid a pause, with replies off',
      async (tool) => {
        tool.post(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 0, now: 1 }));
        tool.post(MessageId.PAUSE_VCPU, vcpuHeader.encode({ vcpu: 0 }), pauseVcpu.encode({ wait: 1 }));
        await sleep(5);
      },
    ],
    [
      'while it single-steps',
      async (tool) => {
        await tool.enable(0, EventId.SINGLESTEP);
        await tool.singleStep(0, true);
        await answerSome(tool, 50);
      },
    ],
  ];

  it('goes on with its guest, unhindered, and serves the next: at every moment', async () => {
    const tool = await Introspector.listen(socket);
    try {
      let accepted = tool.accept();
      await accepted;
      await until(({ attached, guest }) => attached && guest !== undefined);
      for (const [when, prepare] of DEATHS) {
        await prepare(tool);
        accepted = tool.accept();
        tool.hangUp();
        await accepted;
        await until(({ attached }) => attached);
        await expectUnharmed().catch((cause) => {
          throw new Error(`a tool that died ${when} left something behind`, { cause });
        });
      }
      expect(log.filter((line) => line.includes('attached')).length).toBe(DEATHS.length + 1);
    } finally {
      tool.close();
    }
  });
});

describe('a host and what listens on its socket', () => {
  const listening: Server[] = [];
  afterEach(() => {
    for (const server of listening.splice(0)) server.close();
  });

  async function listen(): Promise<() => Promise<Socket>> {
    const server = createServer({ pauseOnConnect: true });
    listening.push(server);
    server.listen(socket);
    await once(server, 'listening');
    return async () => {
      const [connection] = (await once(server, 'connection')) as [Socket];
      connection.on('error', () => {});
      return connection;
    };
  }

  it('waits until there is one, and introduces itself in one message', async () => {
    await sleep(50);
    expect((await client.statistics()).attached).toBe(false);
    const accept = await listen();
    const peer = await accept();
    const chunk = await new Promise<Buffer>((resolve) => {
      peer.once('data', resolve);
      peer.resume();
    });
    expect(chunk.length).toBe(qemuToIntrospector.size);
    expect(qemuToIntrospector.decode(chunk)).toMatchObject({ structSize: qemuToIntrospector.size });
    // Not attached before the tool has answered.
    expect((await client.statistics()).attached).toBe(false);
    const answer = introspectorToQemu.encode({ structSize: introspectorToQemu.size });
    peer.write(answer.subarray(0, 10));
    await sleep(20);
    expect((await client.statistics()).attached).toBe(false);
    peer.write(answer.subarray(10));
    await until(({ attached }) => attached);
    peer.destroy();
    await until(({ attached }) => !attached);
  });

  it.each([
    ['hangs up at once', (peer: Socket) => peer.destroy()],
    ['hangs up amid the handshake', (peer: Socket) => peer.end(Buffer.from([24, 0, 0]))],
    ['speaks another protocol', (peer: Socket) => peer.write('GET / HTTP/1.1\r\n\r\n'.repeat(20))],
    ['announces a handshake of no size', (peer: Socket) => peer.write(Buffer.alloc(24))],
  ])('tries again when it %s', async (_what, behave) => {
    const accept = await listen();
    const peer = await accept();
    const next = accept();
    peer.resume();
    behave(peer);
    (await next).destroy();
    await until(({ guest }) => (guest?.switches['one-level'] ?? 0) > 0);
    expect((await client.statistics()).attached).toBe(false);
  });
});
