import { afterEach, describe, expect, it } from 'vitest';
import { eventually } from './eventually.js';
import { Access, EventId, Id, type PeerOptions, type ScriptedPeer } from './peer.js';
import { attach, isBundled, type Program } from './program.js';

const [N, R, W, X, RW, RX, WX, RWX] = [1, 2, 4, 8, 6, 10, 12, 14];

let program: Program;
let peer: ScriptedPeer;
async function start(options: PeerOptions = {}): Promise<void> {
  ({ program, peer } = await attach(options));
}
afterEach(async () => {
  expect(await program.end()).toBe(0);
});

const pageAccesses = () => peer.all(Id.setPageAccess).map((m) => m.body.toString('hex'));
const pageAccess = (gpa: string, access: string) => `0000010000000000${gpa}${access}00000000000000`;
const GPA_5000 = '0050000000000000';

/** A reply that only lets the vCPU go on: the data it could carry is empty. */
const plainReply = (vcpu: string) => `${vcpu}00000000000000${'0006000000000000'}${'00'.repeat(272)}`;

describe('watching a frame', () => {
  it.each([
    ['RW', RW, '04'],
    ['W', W, '05'],
    ['X', X, '03'],
    ['WX', WX, '01'],
    ['RWX', RWX, '00'],
  ])('%s removes those permissions', async (_, access, permitted) => {
    await start();
    expect(await program.result(`watch 0 5 ${access}`)).toBe('0');
    expect(pageAccesses()).toEqual([pageAccess(GPA_5000, permitted)]);
  });

  it.each([
    ['R', R],
    ['RX', RX],
    ['nothing', 0],
    ['write to execute', 16],
    ['an unknown bit', 64],
  ])('for %s is refused without a message', async (_, access) => {
    await start();
    expect(await program.result(`watch 0 5 ${access}`)).toBe('1');
    expect(pageAccesses()).toEqual([]);
    if (access === R) await eventually(() => program.stderr).toContain('unsupported by EPT');
  });

  it('twice, or with a generic event, or against the hypervisor, is refused', async () => {
    await start();
    expect(await program.result(`watch 0 5 ${RW}`)).toBe('0');
    expect(await program.result(`watch 1 5 ${RW}`)).toBe('1');
    expect(await program.result(`watch-all 2 ${RW}`)).toBe('1');
    peer.answers.set(Id.setPageAccess, () => -22);
    expect(await program.result(`watch 3 6 ${RW}`)).toBe('1');
    peer.answers.clear();
    expect(await program.result(`watch 3 6 ${RW}`)).toBe('0');
  });

  it('ends with all permissions given back, and can begin again', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    expect(await program.run('clear 0')).toEqual({ result: '0', events: ['freed slot=0 status=0'] });
    expect(pageAccesses().at(-1)).toBe(pageAccess(GPA_5000, '07'));
    expect(await program.result(`watch 0 5 ${RW}`)).toBe('0');
  });

  it('needs the version of the events that the library knows', async () => {
    await start();
    const MEMORY = 1;
    expect(await program.result(`watch-type 0 ${MEMORY} 8`)).toBe('1');
    expect(await program.result(`watch-type 0 ${MEMORY} 10`)).toBe('1');
    expect(await program.result('watch-type 0 99 9')).toBe('1');
  });
});

describe('a generic event', () => {
  it('handles every frame whose access was set, and nothing can be set without it', async () => {
    await start();
    expect(await program.result(`trap 5 ${RW}`)).toBe('1');
    expect(await program.result(`watch-all 0 ${RW}`)).toBe('0');
    expect(await program.result(`watch-all 1 ${RW}`)).toBe('1');
    expect(await program.result(`watch 2 7 ${RW}`)).toBe('1');
    expect(await program.result(`trap 5 ${X}`)).toBe('1');
    expect(await program.result(`trap 5 ${RW}`)).toBe('0');
    expect(await program.result(`trap 6 ${R}`)).toBe('1');
    expect(await program.result(`trap 5 ${N}`)).toBe('0');
    expect(pageAccesses()).toEqual([pageAccess(GPA_5000, '04'), pageAccess(GPA_5000, '07')]);

    peer.raisePageFault(1, 0xabcn, 0x9abcn);
    const { events } = await program.run('listen 1000');
    expect(events).toHaveLength(1);
    expect(events[0]).toContain('slot=0 vcpu=1 view=0 gfn=0x9 access=2');
    expect(await program.result('clear 0')).toBe('0');
    expect(await program.result(`trap 5 ${RW}`)).toBe('1');
  });

  it.runIf(isBundled)(
    'that overlaps with another is asked first, and the event is answered once',
    async () => {
      await start();
      await program.run(`watch-all 0 ${RW}`);
      await program.run(`watch-all 1 ${W}`);
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n, Access.write);
      const { events } = await program.run('listen 1000');
      expect(events.map((line) => line.slice(0, 19))).toEqual(['event memory slot=0']);
      await peer.reply(seq);
      await program.run('listen 20');
      expect(peer.all(Id.eventReply)).toHaveLength(1);
    },
  );
});

describe('a violation', () => {
  it('tells the callback where it was, and only what KVMI says about the registers', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    peer.view = 3;
    const seq = peer.raisePageFault(1, 0xfffff801_00005123n, 0x5123n, Access.read | Access.write);
    const { result, events } = await program.run('listen 1000');
    expect(result).toBe('0');
    expect(events).toEqual([
      'event memory slot=0 vcpu=1 view=3 gfn=0x5 access=6 gla=0xfffff80100005123 offset=0x123 rip=0x110 rcx=0x102 ' +
        'cr3=0x1aa000 cs=0xafb efer=0x0 gla_valid=0',
    ]);
    expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply('01'));
  });

  it('is answered with the data of the callback, from the violation on', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions emulate 0102030405060708');
    const seq = peer.raisePageFault(0, 0xfffff801_00005ff8n, 0x5ff8n);
    await program.run('listen 1000');
    const { body } = await peer.reply(seq);
    expect(body.toString('hex', 0, 40)).toBe(
      `${'0000000000000000'}${'0006000000000000'}${'f85f000001f8ffff'}${'0800000000000000'}${'0102030405060708'}`,
    );
    expect(body.subarray(40).every((byte) => byte === 0)).toBe(true);
    expect(body).toHaveLength(288);
  });

  it('takes up to 256 bytes, and frees the data that it owns', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run(`actions emulate-allocated ${'5a'.repeat(256)}`);
    for (let i = 0; i < 3; i++) {
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
      await program.run('listen 1000');
      const { body } = await peer.reply(seq);
      expect(body.readUInt32LE(24)).toBe(256);
      expect(body.subarray(32).every((byte) => byte === 0x5a)).toBe(true);
    }
  });

  it.runIf(isBundled).each([
    ['more data than fits', 'emulate-size 257'],
    ['absurdly much data', 'emulate-size 4294967295'],
    ['no data, though it says so', 'respond 8'],
  ])('with %s lets the vCPU go on with what memory holds', async (_, actions) => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run(`actions ${actions}`);
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    expect(await program.result('listen 1000')).toBe('0');
    expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply('00'));
  });

  it.each([
    ['DENY', 16],
    ['EMULATE', 2],
    ['EMULATE_NOWRITE', 4],
    ['an unknown response', 1 << 30],
  ])('cannot be refused: %s has no effect', async (_, response) => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run(`actions respond ${response}`);
    const before = peer.received.length;
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n, Access.write);
    await program.run('listen 1000');
    expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply('00'));
    expect(peer.received.length - before).toBe(1);
  });

  it('has its registers set before it is answered', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions set-rcx 0x4444 respond 128');
    const before = peer.received.length;
    const seq = peer.raisePageFault(1, 0x5000n, 0x5000n);
    await program.run('listen 1000');
    await peer.reply(seq);
    expect(peer.received.slice(before).map((m) => m.id)).toEqual([Id.setRegisters, Id.eventReply]);
    const body = peer.all(Id.setRegisters)[0]!.body;
    expect([body.readUInt16LE(0), body.readBigUInt64LE(8 + 16), body.readBigUInt64LE(8)]).toEqual([
      1,
      0x4444n,
      0x100n,
    ]);
  });

  it.runIf(isBundled)('answered with data and registers gets the data and keeps its registers', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions emulate aabb respond 128');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    await program.run('listen 1000');
    expect((await peer.reply(seq)).body.readUInt32LE(24)).toBe(2);
    expect(peer.all(Id.setRegisters)).toEqual([]);
  });

  it('may be handled with reads of memory', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions read 0x3000');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { events } = await program.run('listen 1000');
    expect(events[1]).toBe('in read 0');
    await peer.reply(seq);
  });

  it.runIf(isBundled).each([
    ['of a frame that nobody watches', 0x6000n, Access.read],
    ['whose access nobody handles', 0x5000n, Access.execute],
    ['without an access', 0x5000n, 0],
  ])('%s lets the vCPU go on', async (_, gpa, access) => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    const seq = peer.raisePageFault(0, gpa, gpa, access);
    expect(await program.run('listen 1000')).toEqual({ result: '0', events: [] });
    expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply('00'));
  });

  it.runIf(isBundled).each([
    ['a single step', EventId.singleStep, Buffer.alloc(8), ''],
    ['a breakpoint', EventId.breakpoint, Buffer.alloc(16), ''],
    ['a pause', EventId.pause, Buffer.alloc(0), ''],
    ['a write to CR3', EventId.controlRegister, registerWrite(0x1122334455667788n), '8877665544332211'],
    ['a write to an MSR', EventId.msr, registerWrite(0xd01n), '010d000000000000'],
  ])(
    'is not the only thing that nobody asked for: %s lets the vCPU go on, too',
    async (_, event, specific, reply) => {
      await start();
      const seq = peer.raise(1, event, specific);
      expect(await program.run('listen 1000')).toEqual({ result: '0', events: [] });
      const kind = event.toString(16).padStart(2, '0');
      expect((await peer.reply(seq)).body.toString('hex')).toBe(
        `010000000000000000${kind}000000000000${reply}`,
      );
    },
  );
});

function registerWrite(value: bigint): Buffer {
  const bytes = Buffer.alloc(24);
  bytes.writeBigUInt64LE(value, 16);
  return bytes;
}

describe('listening', () => {
  it('succeeds with nothing to do', async () => {
    await start();
    expect(await program.run('listen 0')).toEqual({ result: '0', events: [] });
    expect(await program.run('listen 20')).toEqual({ result: '0', events: [] });
    expect(await program.result('listen 0xffffffff')).toBe('1');
  });

  it('drains everything that has arrived, without waiting', async () => {
    await start({ vcpus: 4 });
    await program.run(`watch 0 5 ${RW}`);
    const seqs = [0, 1, 2, 3].map((vcpu) => peer.raisePageFault(vcpu, 0x5000n, 0x5000n));
    // A reply to a command stands behind the events, so they have arrived.
    await program.run('size');
    expect(await program.result('pending')).toBe('4');
    const { events } = await program.run('listen 0');
    expect(events.map((line) => line.slice(0, 26))).toEqual(
      [0, 1, 2, 3].map((vcpu) => `event memory slot=0 vcpu=${vcpu}`),
    );
    await Promise.all(seqs.map((seq) => peer.reply(seq)));
    expect(await program.result('pending')).toBe('0');
  });

  it.runIf(isBundled)('inside a callback is refused, and so is destroying', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions listen destroy');
    peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { result, events } = await program.run('listen 1000');
    expect(result).toBe('0');
    expect(events.slice(1)).toEqual(['in listen 1', 'in destroy 1']);
  });
});

describe('clearing inside a callback', () => {
  it('waits until listen has paused the guest and handled what was raised before', async () => {
    await start({ vcpus: 2 });
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions clear 0 clear 0');
    const before = peer.received.length;
    const first = peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { result, events } = await program.run('listen 1000');
    expect(result).toBe('0');
    expect(events.slice(1)).toEqual(['in clear 0', 'in clear 1', 'freed slot=0 status=0']);
    await peer.reply(first);
    await eventually(() => peer.received.slice(before).map((m) => m.id)).toEqual([
      Id.eventReply,
      Id.controlCommandResponse,
      Id.pauseVcpu,
      Id.pauseVcpu,
      Id.controlCommandResponse,
      Id.setPageAccess,
      Id.eventReply,
      Id.eventReply,
    ]);
    expect(pageAccesses().at(-1)).toBe(pageAccess(GPA_5000, '07'));
  });

  it('still calls back for a violation that was under way', async () => {
    await start({ vcpus: 2 });
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions clear 0');
    // Raised while the pause is being asked for, so its event is on the wire before the pause is answered.
    let second = 0;
    peer.answers.set(Id.controlCommandResponse, ({ body }) => {
      if (body.readUInt8(0) === 0) second = peer.raisePageFault(1, 0x5008n, 0x5008n);
      return Buffer.alloc(0);
    });
    peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { result, events } = await program.run('listen 1000');
    expect(result).toBe('0');
    expect(events.filter((line) => line.startsWith('event')).map((line) => line.slice(0, 26))).toEqual([
      'event memory slot=0 vcpu=0',
      'event memory slot=0 vcpu=1',
    ]);
    expect(events.at(-1)).toBe('freed slot=0 status=0');
    await peer.reply(second);
  });

  it('is made good for by destroy', async () => {
    await start({ vcpus: 1 });
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions clear 0');
    await program.run('pause');
    await program.run('listen 0');
    // The callback runs inside resume, which does not do the deferred work.
    await program.run('resume');
    peer.answers.set(Id.controlCommandResponse, ({ body }) => {
      if (body.readUInt8(0) === 0) peer.raisePageFault(0, 0x5000n, 0x5000n);
      return Buffer.alloc(0);
    });
    await program.run('pause');
    expect((await program.run('resume')).events.slice(1)).toEqual(['in clear 0']);
    expect((await program.run('destroy')).events).toEqual(['freed slot=0 status=0']);
  });
});

describe('single steps', () => {
  const control = (enable: number) => `01000000000000000${enable}00000000000000`;
  const controls = () => peer.all(Id.controlSingleStep).map((m) => m.body.toString('hex'));

  it('are switched on, reported, and switched off', async () => {
    await start();
    expect(await program.result('watch-steps 0 2')).toBe('0');
    expect(await program.result('watch-steps 1 3')).toBe('1');
    const seq = peer.raise(1, EventId.singleStep, Buffer.alloc(8));
    const { events } = await program.run('listen 1000');
    expect(events).toEqual(['event step slot=0 vcpu=1 gla=0x110 offset=0x110']);
    expect((await peer.reply(seq)).body.toString('hex')).toBe('0100000000000000000b000000000000');
    expect(await program.result('clear 0')).toBe('0');
    expect(controls().slice(0, 2)).toEqual([control(1), control(0)]);
  });

  it('of no vCPU, or refused by the hypervisor, are not registered', async () => {
    await start();
    expect(await program.result('watch-steps 0 0')).toBe('1');
    peer.answers.set(Id.controlSingleStep, ({ body }) =>
      body.readUInt16LE(0) === 1 ? -95 : Buffer.alloc(0),
    );
    expect(await program.result('watch-steps 0 3')).toBe('1');
    expect(
      controls()
        .filter((body) => body.startsWith('00'))
        .at(-1),
    ).toBe('00'.repeat(16));
    peer.answers.clear();
    expect(await program.result('watch-steps 0 3')).toBe('0');
  });

  it('are toggled by a response', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions respond 32');
    for (const enable of [1, 0]) {
      const seq = peer.raisePageFault(1, 0x5000n, 0x5000n);
      await program.run('listen 1000');
      await peer.reply(seq);
      expect(controls().at(-1)).toBe(control(enable));
    }
  });

  it('are toggled by a call, which must change something', async () => {
    await start();
    await program.run('watch-steps 0 1');
    expect(await program.result('toggle 0 1 1')).toBe('0');
    expect(await program.result('toggle 0 1 1')).toBe('1');
    expect(await program.result('toggle 0 1 0')).toBe('0');
    expect(await program.result('toggle 0 1 0')).toBe('1');
    if (isBundled) expect(await program.result('toggle 0 2 1')).toBe('1');
  });

  it.runIf(isBundled)('are counted down, and the callback runs at the last', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    expect(await program.result('step 0 1 0')).toBe('1');
    expect(await program.result('step 0 2 1')).toBe('1');
    expect(await program.result('step 0 1 2')).toBe('0');
    const outcomes = [];
    for (let i = 0; i < 2; i++) {
      const seq = peer.raise(1, EventId.singleStep, Buffer.alloc(8));
      outcomes.push((await program.run('listen 1000')).events);
      await peer.reply(seq);
    }
    expect(outcomes).toEqual([[], ['event steps-done slot=0']]);
    expect(controls()).toEqual([control(1), control(0)]);
  });

  it.runIf(isBundled)('are not counted down where they are watched', async () => {
    await start();
    await program.run('watch-steps 0 2');
    expect(await program.result('step 1 1 1')).toBe('1');
    expect(await program.result('step 1 0 1')).toBe('0');
  });
});
