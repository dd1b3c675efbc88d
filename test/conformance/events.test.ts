import { describe, expect, it } from 'vitest';
import { eventually } from '../kvmi/eventually.js';
import { Access, EventId, Id, type ScriptedPeer } from '../kvmi/peer.js';
import type { Program } from '../kvmi/program.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const [N, R, W, X, RW, RX, WX, RWX] = [1, 2, 4, 8, 6, 10, 12, 14];

const pageAccesses = (peer: ScriptedPeer) => peer.all(Id.setPageAccess).map((m) => m.body.toString('hex'));
const pageAccess = (gpa: string, access: string) => `0000010000000000${gpa}${access}00000000000000`;
const GPA_5000 = '0050000000000000';

/** A reply that only lets the vCPU go on: the data it could carry is empty. */
const plainReply = (vcpu: number) => `0${vcpu}00000000000000${'0006000000000000'}${'00'.repeat(272)}`;

/** How many events have been answered by now: the reply to a command comes after what was sent before it. */
async function answers(program: Program, peer: ScriptedPeer): Promise<number> {
  await program.run('size');
  return peer.all(Id.eventReply).length;
}

describe.each(LIBRARIES)('with $library', ({ path }) => {
  const { start } = programsOn(path);

  describe('watching a frame', () => {
    it.each([
      ['nothing at all', N, '07'],
      ['RW', RW, '04'],
      ['W', W, '05'],
      ['X', X, '03'],
      ['WX', WX, '01'],
      ['RWX', RWX, '00'],
    ])('for %s removes those permissions', async (_, access, permitted) => {
      const { program, peer } = await start();
      expect(await program.result(`watch 0 5 ${access}`)).toBe('0');
      expect(pageAccesses(peer)).toEqual([pageAccess(GPA_5000, permitted)]);
    });

    it.each([
      ['R', R],
      ['RX', RX],
      ['an access of zero', 0],
      ['write to execute', 16],
      ['an unknown bit', 64],
    ])('for %s is refused without a message', async (_, access) => {
      const { program, peer } = await start();
      expect(await program.result(`watch 0 5 ${access}`)).toBe('1');
      expect(pageAccesses(peer)).toEqual([]);
    });

    it('for reads alone says that EPT has no such page', async () => {
      const { program } = await start();
      await program.run(`watch 0 5 ${R}`);
      await eventually(() => program.stderr).toContain('unsupported by EPT');
    });

    it('twice, or with a generic event, or against the hypervisor, is refused', async () => {
      const { program, peer } = await start();
      expect(await program.result(`watch 0 5 ${RW}`)).toBe('0');
      expect(await program.result(`watch 1 5 ${RW}`)).toBe('1');
      expect(await program.result(`watch-all 2 ${RW}`)).toBe('1');
      peer.answers.set(Id.setPageAccess, () => -22);
      expect(await program.result(`watch 3 6 ${RW}`)).toBe('1');
      peer.answers.clear();
      expect(await program.result(`watch 3 6 ${RW}`)).toBe('0');
    });

    it('ends with all permissions given back, and can begin again', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      expect(await program.run('clear 0')).toEqual({ result: '0', events: ['freed slot=0 status=0'] });
      expect(pageAccesses(peer).at(-1)).toBe(pageAccess(GPA_5000, '07'));
      expect(await program.result(`watch 0 5 ${RW}`)).toBe('0');
    });

    it('does not end when the hypervisor refuses', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      peer.answers.set(Id.setPageAccess, () => -22);
      expect(await program.run('clear 0')).toEqual({ result: '1', events: ['freed slot=0 status=1'] });
      peer.answers.clear();
      expect(await program.result(`watch 1 5 ${RW}`)).toBe('1');
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
      expect((await program.run('listen 10000')).events).toHaveLength(1);
      await peer.reply(seq);
    });

    it('needs the version of the events that the library knows', async () => {
      const { program } = await start();
      const MEMORY = 1;
      expect(await program.result(`watch-type 0 ${MEMORY} 8`)).toBe('1');
      expect(await program.result(`watch-type 0 ${MEMORY} 10`)).toBe('1');
      expect(await program.result('watch-type 0 99 9')).toBe('1');
    });
  });

  describe('a generic event', () => {
    it('handles every frame whose access was set, and nothing can be set without it', async () => {
      const { program, peer } = await start();
      expect(await program.result(`trap 5 ${RW}`)).toBe('1');
      expect(await program.result(`watch-all 0 ${RW}`)).toBe('0');
      expect(await program.result(`watch-all 1 ${RW}`)).toBe('1');
      expect(await program.result(`watch 2 7 ${RW}`)).toBe('1');
      expect(await program.result(`trap 5 ${X}`)).toBe('1');
      expect(await program.result(`trap 5 ${RW}`)).toBe('0');
      expect(await program.result(`trap 6 ${R}`)).toBe('1');
      expect(await program.result(`trap 5 ${N}`)).toBe('0');
      expect(pageAccesses(peer)).toEqual([pageAccess(GPA_5000, '04'), pageAccess(GPA_5000, '07')]);

      peer.raisePageFault(1, 0xabcn, 0x9abcn);
      const { events } = await program.run('listen 10000');
      expect(events).toHaveLength(1);
      expect(events[0]).toContain('slot=0 vcpu=1 view=0 gfn=0x9 access=2');
      expect(await program.result('clear 0')).toBe('0');
      expect(await program.result(`trap 5 ${RW}`)).toBe('1');
      expect(await program.result(`trap 5 ${N}`)).toBe('0');
    });

    it('stands beside one for another access', async () => {
      const { program, peer } = await start();
      expect(await program.result(`watch-all 0 ${RW}`)).toBe('0');
      expect(await program.result(`watch-all 1 ${X}`)).toBe('0');
      peer.raisePageFault(0, 0x5000n, 0x5000n, Access.execute);
      peer.raisePageFault(1, 0x5000n, 0x5000n, Access.write);
      await program.run('size');
      const { events } = await program.run('listen 0');
      expect(events.map((line) => line.slice(0, 26))).toEqual([
        'event memory slot=1 vcpu=0',
        'event memory slot=0 vcpu=1',
      ]);
    });

    it('owns no frame: to be cleared it asks the hypervisor for nothing', async () => {
      const { program, peer } = await start();
      await program.run(`watch-all 0 ${RW}`);
      const before = peer.received.length;
      expect(await program.run('clear 0')).toEqual({ result: '0', events: ['freed slot=0 status=0'] });
      expect(peer.log(before)).toEqual([]);
    });
  });

  describe('a violation', () => {
    it('tells the callback where it was, and only what KVMI says about the registers', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      peer.view = 3;
      const seq = peer.raisePageFault(1, 0xfffff801_00005123n, 0x5123n, Access.read | Access.write);
      const { result, events } = await program.run('listen 10000');
      expect(result).toBe('0');
      expect(events).toEqual([
        'event memory slot=0 vcpu=1 view=3 gfn=0x5 access=6 gla=0xfffff80100005123 offset=0x123 rip=0x110 rcx=0x102 ' +
          'cr3=0x1aa000 cs=0xafb efer=0x0 gla_valid=0',
      ]);
      expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply(1));
    });

    it.each(VCPU_COUNTS)('of each of %s vCPUs is handled once, in the order it came', async (vcpus) => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      const order = Array.from({ length: vcpus }, (_, i) => (i * 3 + 1) % vcpus);
      const vcpusInOrder = [...new Set([...order, ...order.keys()])];
      for (let round = 0; round < 3; round++) {
        const seqs = vcpusInOrder.map((vcpu) => peer.raisePageFault(vcpu, 0x5000n, 0x5000n));
        const seen: string[] = [];
        while (seen.length < vcpus) seen.push(...(await program.run('listen 10000')).events);
        expect(seen.map((line) => line.slice(0, 26))).toEqual(
          vcpusInOrder.map((vcpu) => `event memory slot=0 vcpu=${vcpu}`),
        );
        for (const [i, seq] of seqs.entries())
          expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply(vcpusInOrder[i]!));
      }
      expect(await answers(program, peer)).toBe(3 * vcpus);
    });

    it.each([
      ['DENY', 16],
      ['EMULATE', 2],
      ['EMULATE_NOWRITE', 4],
      ['an unknown response', 1 << 30],
    ])('cannot be refused: %s has no effect', async (_, response) => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run(`actions respond ${response}`);
      const before = peer.received.length;
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n, Access.write);
      await program.run('listen 10000');
      expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply(0));
      expect(peer.received.length - before).toBe(1);
    });

    it.each(VCPU_COUNTS)(
      'has its registers set before it is answered: the last of %s vCPUs',
      async (vcpus) => {
        const { program, peer } = await start({ vcpus });
        const vcpu = vcpus - 1;
        await program.run(`watch 0 5 ${RW}`);
        await program.run('actions set-rcx 0x4444 respond 128');
        const before = peer.received.length;
        const seq = peer.raisePageFault(vcpu, 0x5000n, 0x5000n);
        await program.run('listen 10000');
        await peer.reply(seq);
        expect(peer.received.slice(before).map((m) => m.id)).toEqual([Id.setRegisters, Id.eventReply]);
        const body = peer.all(Id.setRegisters)[0]!.body;
        expect([body.readUInt16LE(0), body.readBigUInt64LE(8 + 16), body.readBigUInt64LE(8)]).toEqual([
          vcpu,
          0x4444n,
          0x100n,
        ]);
      },
    );

    it('may be handled with reads of memory', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions read 0x3000');
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
      const { events } = await program.run('listen 10000');
      expect(events[1]).toBe('in read 0');
      await peer.reply(seq);
    });
  });

  describe('a write to a watched frame', () => {
    it.each(VCPU_COUNTS)('is reported, completes, and is read afterwards: %s vCPUs', async (vcpus) => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      for (let vcpu = 0; vcpu < vcpus; vcpu++) {
        const gpa = 0x5010 + 8 * vcpu;
        const seq = peer.raisePageFault(vcpu, BigInt(gpa), BigInt(gpa), Access.write);
        const { events } = await program.run('listen 10000');
        expect(events[0]).toContain(`vcpu=${vcpu} view=0 gfn=0x5 access=4 gla=0x${gpa.toString(16)}`);
        expect((await peer.reply(seq)).body.toString('hex')).toBe(plainReply(vcpu));
        peer.memory[gpa] = 0x80 + vcpu;
        await program.run('flush');
        expect(await program.result(`read ${gpa} 1`)).toBe(`0 1 ${(0x80 + vcpu).toString(16)}`);
      }
    });

    it('through the library is no violation', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      expect(await program.result('write 0x5010 aabb')).toBe('0 2');
      expect(peer.memory.toString('hex', 0x5010, 0x5012)).toBe('aabb');
      expect(await program.run('listen 0')).toEqual({ result: '0', events: [] });
    });

    it('that reads as well is answered with data for the read', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions emulate 0102');
      const seq = peer.raisePageFault(0, 0x5010n, 0x5010n, Access.read | Access.write);
      expect((await program.run('listen 10000')).events[0]).toContain('access=6');
      expect((await peer.reply(seq)).body.readUInt32LE(24)).toBe(2);
    });
  });

  describe('an event that is not answered', () => {
    it.each([
      ['of a frame that nobody watches', 0x6000n, Access.read],
      ['whose access nobody handles', 0x5000n, Access.execute],
      ['without an access', 0x5000n, 0],
    ])('is a violation %s: listen succeeds, and the vCPU stands still', async (_, gpa, access) => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      peer.raisePageFault(0, gpa, gpa, access);
      expect(await program.run('listen 10000')).toEqual({ result: '0', events: [] });
      expect(await program.run('listen 0')).toEqual({ result: '0', events: [] });
      expect(await answers(program, peer)).toBe(0);
    });

    it.each([
      ['a single step', EventId.singleStep, Buffer.alloc(8)],
      ['a breakpoint', EventId.breakpoint, Buffer.alloc(16)],
      ['a write to CR3', EventId.controlRegister, registerWrite(3n)],
      ['a write to an MSR', EventId.msr, registerWrite(0xc0000080n)],
    ])('is %s that nobody asked for', async (_, event, specific) => {
      const { program, peer } = await start();
      peer.raise(1, event, specific);
      expect(await program.run('listen 10000')).toEqual({ result: '0', events: [] });
      expect(await answers(program, peer)).toBe(0);
    });

    it.each([
      ['SET_REGISTERS', 128, Id.setRegisters],
      ['TOGGLE_SINGLESTEP', 32, Id.controlSingleStep],
    ])('is one whose %s the hypervisor refuses', async (_, response, command) => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run(`actions respond ${response}`);
      peer.answers.set(command, () => -22);
      peer.raisePageFault(0, 0x5000n, 0x5000n);
      expect((await program.run('listen 10000')).result).toBe('0');
      expect(peer.all(command)).toHaveLength(1);
      expect(await answers(program, peer)).toBe(0);
    });

    it.each(VCPU_COUNTS.filter((vcpus) => vcpus > 1))(
      'leaves the others of %s vCPUs alone',
      async (vcpus) => {
        const { program, peer } = await start({ vcpus });
        await program.run(`watch 0 5 ${RW}`);
        peer.raisePageFault(0, 0x6000n, 0x6000n);
        for (let vcpu = 1; vcpu < vcpus; vcpu++) peer.raisePageFault(vcpu, 0x5000n, 0x5000n);
        await program.run('size');
        expect((await program.run('listen 0')).events).toHaveLength(vcpus - 1);
        expect(await answers(program, peer)).toBe(vcpus - 1);
      },
    );
  });

  describe('listening', () => {
    it('succeeds with nothing to do, and takes a signed timeout', async () => {
      const { program } = await start();
      expect(await program.run('listen 0')).toEqual({ result: '0', events: [] });
      expect(await program.run('listen 20')).toEqual({ result: '0', events: [] });
      expect(await program.result('listen 0x80000000')).toBe('1');
      expect(await program.result('listen 0xffffffff')).toBe('1');
    });

    it.each(VCPU_COUNTS)('handles all that came with the replies to commands: %s vCPUs', async (vcpus) => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      const seqs = Array.from({ length: vcpus }, (_, vcpu) => peer.raisePageFault(vcpu, 0x5000n, 0x5000n));
      // A reply to a command stands behind the events, so they have arrived.
      await program.run('size');
      expect(await program.result('pending')).toBe(String(vcpus));
      const { events } = await program.run('listen 0');
      expect(events.map((line) => line.slice(0, 26))).toEqual(
        Array.from({ length: vcpus }, (_, vcpu) => `event memory slot=0 vcpu=${vcpu}`),
      );
      await Promise.all(seqs.map((seq) => peer.reply(seq)));
      expect(await program.result('pending')).toBe('0');
    });

    it.each(VCPU_COUNTS)('takes one event off the socket: %s vCPUs', async (vcpus) => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      for (let vcpu = 0; vcpu < vcpus; vcpu++) peer.raisePageFault(vcpu, 0x5000n, 0x5000n);
      for (let vcpu = 0; vcpu < vcpus; vcpu++) {
        const { events } = await program.run('listen 10000');
        expect(events.map((line) => line.slice(0, 26))).toEqual([`event memory slot=0 vcpu=${vcpu}`]);
      }
    });

    it('goes on with what callbacks bring about: an event that comes before the reply to a read', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions read 0x3000');
      let second = 0;
      peer.answers.set(Id.readPhysical, () => {
        second ||= peer.raisePageFault(1, 0x5000n, 0x5000n);
        return Buffer.alloc(4096);
      });
      const first = peer.raisePageFault(0, 0x5000n, 0x5000n);
      const { events } = await program.run('listen 10000');
      expect(events.map((line) => line.slice(0, 26))).toEqual([
        'event memory slot=0 vcpu=0',
        'in read 0',
        'event memory slot=0 vcpu=1',
        'in read 0',
      ]);
      await Promise.all([peer.reply(first), peer.reply(second)]);
    });
  });

  describe('clearing inside a callback', () => {
    it.each(VCPU_COUNTS)(
      'waits until listen has paused the guest and handled what was raised before: %s vCPUs',
      async (vcpus) => {
        const { program, peer } = await start({ vcpus });
        await program.run(`watch 0 5 ${RW}`);
        await program.run('actions clear 0 clear 0');
        const before = peer.received.length;
        const first = peer.raisePageFault(0, 0x5000n, 0x5000n);
        const { result, events } = await program.run('listen 10000');
        expect(result).toBe('0');
        expect(events.slice(1)).toEqual(['in clear 0', 'in clear 1', 'freed slot=0 status=0']);
        await peer.reply(first);
        const every = <T>(value: T) => Array<T>(vcpus).fill(value);
        await eventually(() => peer.received.slice(before).map((m) => m.id)).toEqual([
          Id.eventReply,
          Id.controlCommandResponse,
          ...every(Id.pauseVcpu),
          Id.controlCommandResponse,
          Id.setPageAccess,
          ...every(Id.eventReply),
        ]);
        expect(pageAccesses(peer).at(-1)).toBe(pageAccess(GPA_5000, '07'));
      },
    );

    it('still calls back for a violation that was under way', async () => {
      const { program, peer } = await start({ vcpus: 2 });
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions clear 0');
      // Raised while the pause is being asked for, so its event is on the wire before the pause is answered.
      let second = 0;
      peer.answers.set(Id.controlCommandResponse, ({ body }) => {
        if (body.readUInt8(0) === 0) second = peer.raisePageFault(1, 0x5008n, 0x5008n);
        return Buffer.alloc(0);
      });
      peer.raisePageFault(0, 0x5000n, 0x5000n);
      const { result, events } = await program.run('listen 10000');
      expect(result).toBe('0');
      expect(events.filter((line) => line.startsWith('event')).map((line) => line.slice(0, 26))).toEqual([
        'event memory slot=0 vcpu=0',
        'event memory slot=0 vcpu=1',
      ]);
      expect(events.at(-1)).toBe('freed slot=0 status=0');
      await peer.reply(second);
    });

    it('fails the listen when the guest cannot be paused', async () => {
      const { program, peer } = await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions clear 0');
      peer.reportsPauses = false;
      peer.answers.set(Id.controlCommandResponse, () => -11);
      peer.raisePageFault(0, 0x5000n, 0x5000n);
      expect((await program.run('listen 10000')).result).toBe('1');
    });
  });
});

function registerWrite(which: bigint): Buffer {
  const bytes = Buffer.alloc(24);
  bytes.writeBigUInt64LE(which, 0);
  return bytes;
}
