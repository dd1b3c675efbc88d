import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { eventually } from './eventually.js';
import { EventId, eventCommon, Id, message, pageFault, type ScriptedPeer } from './peer.js';
import { attach, BUNDLED, type Program } from './program.js';

const RW = 6;

let program: Program;
let peer: ScriptedPeer;
async function start(): Promise<void> {
  ({ program, peer } = await attach(BUNDLED, { vcpus: 2 }));
  await program.run(`watch 0 5 ${RW}`);
}
afterEach(async () => {
  expect(await program.end()).toBe(0);
});

const event = (vcpu: number, kind: number, specific: Uint8Array = Buffer.alloc(0)) =>
  message(Id.event, 1, Buffer.concat([eventCommon(vcpu, kind), specific]));
const fault = (vcpu: number) => event(vcpu, EventId.pageFault, pageFault(0x5000n, 0x5000n, 1));

/** Changes some bytes of a message's body. */
function patched(bytes: Buffer, at: number, ...values: number[]): Buffer {
  const copy = Buffer.from(bytes);
  copy.set(values, at);
  return copy;
}

const HEADER = 8;

describe('a hypervisor that breaks the protocol', () => {
  const violations: [string, Buffer][] = [
    ['a message larger than any', Buffer.from([1, 0, 0xff, 0xff, 1, 0, 0, 0])],
    ['a reply that nobody asked for', message(Id.getVersion, 99, Buffer.alloc(24))],
    ['an unknown message', message(0x7777, 1, Buffer.alloc(0))],
    ['an empty event', message(Id.event, 1, Buffer.alloc(0))],
    [
      'an event cut inside its common part',
      message(Id.event, 1, eventCommon(0, EventId.pause).subarray(0, 543)),
    ],
    ['an event whose common part claims more than there is', patched(fault(0), HEADER, 0xff, 0xff)],
    ['an event whose common part is too short', patched(fault(0), HEADER, 8, 0)],
    ['a page fault cut inside its own part', event(0, EventId.pageFault, Buffer.alloc(23))],
    ['a page fault whose common part covers its own', patched(fault(0), HEADER, 0x30, 2)],
    ['a single step without its own part', event(0, EventId.singleStep)],
    ['a write to a register without its own part', event(0, EventId.controlRegister)],
    ['an event of a vCPU that does not exist', fault(2)],
    ['an event of vCPU 65535', fault(0xffff)],
    ['an event of an unknown kind', event(0, 14)],
  ];

  it.each(violations)('%s ends the session while listening', async (_, bytes) => {
    await start();
    peer.raw(bytes);
    expect(await program.run('listen 5000')).toEqual({ result: '1', events: [] });
    await expectSessionOver();
  });

  it.each<[string, Buffer]>([
    ...violations,
    // While listening the first is answered before the second is looked at.
    ['a second event before the first is answered', Buffer.concat([fault(0), fault(0)])],
  ])('%s ends the session while a command waits for its reply', async (_, bytes) => {
    await start();
    peer.answers.set(Id.readPhysical, () => {
      peer.raw(bytes);
      return 'silence';
    });
    expect(await program.result('read 0x1000 4')).toBe('1 0 ');
    await expectSessionOver();
  });

  it.each<[string, (reply: Buffer, seq: number) => Buffer]>([
    ['with another number', (body, seq) => message(Id.readPhysical, seq + 1, body)],
    ['to another command', (body, seq) => message(Id.writePhysical, seq, body)],
    ['without a status', (_, seq) => message(Id.readPhysical, seq, Buffer.alloc(7))],
    ['a byte short', (body, seq) => message(Id.readPhysical, seq, body.subarray(0, -1))],
    ['without data', (body, seq) => message(Id.readPhysical, seq, body.subarray(0, 8))],
  ])('a reply %s ends the session', async (_, spoil) => {
    await start();
    peer.answers.set(Id.readPhysical, ({ seq }) => {
      peer.raw(spoil(Buffer.alloc(8 + 4096), seq));
      return 'silence';
    });
    expect(await program.result('read 0x1000 4')).toBe('1 0 ');
    await expectSessionOver();
  });

  it('registers cut short end the session', async () => {
    await start();
    peer.answers.set(Id.getRegisters, () => Buffer.alloc(472 + 6 * 16));
    expect(await program.result('registers 0')).toMatch(/^1 /);
    await expectSessionOver();
  });

  it('a command that is never answered fails within a bounded time, and ends the session', async () => {
    await start();
    peer.answers.set(Id.readPhysical, () => 'silence');
    expect(await program.result('read 0x1000 4')).toBe('1 0 ');
    await expectSessionOver();
  });

  it('any bytes at all neither crash nor hang the program', async () => {
    const bytes = fc.uint8Array({ maxLength: 1200 });
    const plausible = fc
      .tuple(fc.integer({ min: 0, max: 64 }), fc.integer({ min: 0, max: 0xffff }), bytes)
      .map(([id, size, body]) => patched(message(id, 1, body), 2, size & 0xff, size >> 8));
    const nearlyEvent = fc
      .tuple(
        fc.integer({ min: 0, max: 2 }),
        fc.integer({ min: 0, max: 15 }),
        fc.uint8Array({ maxLength: 40 }),
      )
      .map(([vcpu, kind, specific]) => event(vcpu, kind, Buffer.from(specific)));
    const spoiledEvent = fc
      .tuple(nearlyEvent, fc.nat(40), fc.integer({ min: 0, max: 255 }))
      .map(([whole, at, value]) => patched(whole, at, value));
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.oneof(bytes, plausible, nearlyEvent, spoiledEvent), { maxLength: 5 }),
        async (pieces) => {
          const attached = await attach(BUNDLED, { vcpus: 2 });
          await attached.program.run(`watch-all 0 ${RW}`);
          attached.peer.toleratesAnyReply = true;
          for (const piece of pieces) attached.peer.raw(piece);
          for (const command of ['listen 5', 'listen 0'])
            expect(await attached.program.result(command)).toMatch(/^[01]$/);
          attached.peer.close();
          expect(await attached.program.result('destroy')).toBe('0');
          expect(await attached.program.end()).toBe(0);
        },
      ),
      { numRuns: 60 },
    );
    await start();
  });
});

async function expectSessionOver(): Promise<void> {
  const failures: [string, string][] = [
    ['listen 5000', '1'],
    ['read 0x1000 4', '1 0 '],
    ['write 0x1000 aa', '1 0'],
    ['pause', '1'],
    ['watch 1 7 6', '1'],
    ['clear 0', '1'],
    ['set-registers 0', '1'],
    ['size', '2 0x0 0x0'],
    ['paging 0', '1'],
  ];
  for (const [command, result] of failures)
    expect([command, await program.result(command)]).toEqual([command, result]);
  expect(await program.result('destroy')).toBe('0');
  await eventually(() => peer.closed).toBe(true);
}

describe('messages split at any byte', () => {
  it('are put together again', async () => {
    await start();
    peer.toleratesAnyReply = true;
    const bytes = fault(0);
    for (const at of [1, 4, 8, 9, 300, 552, bytes.length - 1]) {
      peer.raw(bytes.subarray(0, at));
      // Its first piece has arrived, and waits.
      expect(await program.run('listen 10')).toEqual({ result: '0', events: [] });
      peer.raw(bytes.subarray(at));
      const { result, events } = await program.run('listen 1000');
      expect([result, events.length]).toEqual(['0', 1]);
    }
  });

  it('while a command waits are put together again', async () => {
    await start();
    peer.toleratesAnyReply = true;
    peer.answers.set(Id.readPhysical, ({ seq }) => {
      const reply = message(Id.readPhysical, seq, Buffer.concat([Buffer.alloc(8), Buffer.alloc(4096, 0x77)]));
      const stream = Buffer.concat([fault(1), reply]);
      peer.raw(stream.subarray(0, 500));
      setTimeout(() => peer.raw(stream.subarray(500, 1000)), 5);
      setTimeout(() => peer.raw(stream.subarray(1000)), 10);
      return 'silence';
    });
    expect(await program.result('read 0x1000 4')).toBe('0 4 77777777');
    expect((await program.run('listen 0')).events).toHaveLength(1);
  });
});
