import { describe, expect, it } from 'vitest';
import { Access, Id, type ScriptedPeer } from '../kvmi/peer.js';
import type { Program } from '../kvmi/program.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const RW = 6;
const MAX_DATA = 256;
const GVA = 0xfffff801_00005000n;
const GPA = 0x5000n;

const bytesFrom = (first: number, length: number) =>
  Buffer.from(Array.from({ length }, (_, i) => (first + i) & 0xff));

/** What a vCPU is told to read instead of its memory. */
async function dataOf(peer: ScriptedPeer, seq: number): Promise<{ at: bigint; data: string; rest: string }> {
  const { body } = await peer.reply(seq);
  expect(body).toHaveLength(288);
  const size = body.readUInt32LE(24);
  return {
    at: body.readBigUInt64LE(16),
    data: body.toString('hex', 32, 32 + size),
    rest: body.toString('hex', 32 + size),
  };
}

async function watch(program: Program): Promise<void> {
  await program.run(`watch-all 0 ${RW}`);
  for (const gfn of [5, 6]) expect(await program.result(`trap ${gfn} ${RW}`)).toBe('0');
}

describe.each(LIBRARIES)('emulated reads with $library', ({ path }) => {
  const { start } = programsOn(path);

  it('carry nothing but the data, from the violation on', async () => {
    const { program, peer } = await start();
    await watch(program);
    await program.run('actions emulate 0102030405060708');
    const seq = peer.raisePageFault(0, GVA + 0xff8n, GPA + 0xff8n);
    await program.run('listen 10000');
    const { body } = await peer.reply(seq);
    expect(body.toString('hex', 0, 40)).toBe(
      `${'0000000000000000'}${'0006000000000000'}${'f85f000001f8ffff'}${'0800000000000000'}${'0102030405060708'}`,
    );
    expect(body.subarray(40).every((byte) => byte === 0)).toBe(true);
  });

  it.each(['emulate', 'emulate-allocated'])('are of any width from 1 to 256 bytes: %s', async (action) => {
    const { program, peer } = await start();
    await watch(program);
    for (let width = 1; width <= MAX_DATA; width++) {
      const data = bytesFrom(width, width).toString('hex');
      await program.run(`actions ${action} ${data}`);
      const seq = peer.raisePageFault(width & 1, GVA + BigInt(width), GPA + BigInt(width));
      expect((await program.run('listen 10000')).result).toBe('0');
      const rest = '00'.repeat(MAX_DATA - width);
      expect(await dataOf(peer, seq)).toEqual({ at: GVA + BigInt(width), data, rest });
    }
  });

  it('may be of no bytes: the guest sees its memory', async () => {
    const { program, peer } = await start();
    await watch(program);
    await program.run('actions emulate-size 0');
    const seq = peer.raisePageFault(0, GVA, GPA);
    await program.run('listen 10000');
    expect(await dataOf(peer, seq)).toEqual({ at: GVA, data: '', rest: '00'.repeat(MAX_DATA) });
  });

  it.each([257, 4096, 4294967295])('of %s bytes are not answered, and listen succeeds', async (size) => {
    const { program, peer } = await start();
    await watch(program);
    await program.run(`actions emulate-size ${size}`);
    peer.raisePageFault(0, GVA, GPA);
    expect((await program.run('listen 10000')).result).toBe('0');
    await program.run('size');
    expect(peer.all(Id.eventReply)).toEqual([]);
    // Another vCPU is none the worse for it.
    await program.run('actions emulate 11');
    const seq = peer.raisePageFault(1, GVA, GPA);
    await program.run('listen 10000');
    expect((await dataOf(peer, seq)).data).toBe('11');
  });

  it.each([1, 2, 3, 4, 5, 6, 7])(
    'that cross into another page are two pieces: %s bytes on the first',
    async (onFirst) => {
      const { program, peer } = await start({ vcpus: 1 });
      await watch(program);
      const data = bytesFrom(0x40, 8);
      const pieces = [
        {
          gva: GVA + 0x1000n - BigInt(onFirst),
          gpa: GPA + 0x1000n - BigInt(onFirst),
          data: data.subarray(0, onFirst),
        },
        { gva: GVA + 0x1000n, gpa: GPA + 0x1000n, data: data.subarray(onFirst) },
      ];
      for (const piece of pieces) {
        await program.run(`actions emulate ${piece.data.toString('hex')}`);
        const seq = peer.raisePageFault(0, piece.gva, piece.gpa);
        const { events } = await program.run('listen 10000');
        expect(events[0]).toContain(
          `gfn=0x${(piece.gpa >> 12n).toString(16)} access=2 gla=0x${piece.gva.toString(16)}`,
        );
        expect(await dataOf(peer, seq)).toMatchObject({ at: piece.gva, data: piece.data.toString('hex') });
      }
    },
  );

  it.each([1, 3, 7])('with fewer bytes than are read are passed on as they are: %s bytes', async (length) => {
    const { program, peer } = await start();
    await watch(program);
    await program.run(`actions emulate ${'ab'.repeat(length)}`);
    const seq = peer.raisePageFault(0, GVA, GPA);
    await program.run('listen 10000');
    expect(await dataOf(peer, seq)).toMatchObject({ at: GVA, data: 'ab'.repeat(length) });
  });

  it.each(VCPU_COUNTS)(
    'of a string instruction are one event an element: %s vCPUs at once',
    async (vcpus) => {
      const { program, peer } = await start({ vcpus });
      await watch(program);
      // rep movsq from the watched page, across its end, to another watched page: a read, then a write, eight times.
      for (let element = 0; element < 8; element++) {
        const from = 0xfd0n + 8n * BigInt(element);
        const data = bytesFrom(0x10 * element, 8).toString('hex');
        await program.run(`actions emulate ${data}`);
        const reads = Array.from({ length: vcpus }, (_, vcpu) =>
          peer.raisePageFault(vcpu, GVA + from, GPA + from),
        );
        for (let answered = 0; answered < vcpus; )
          answered += (await program.run('listen 10000')).events.length;
        for (const seq of reads) expect(await dataOf(peer, seq)).toMatchObject({ at: GVA + from, data });

        await program.run('actions');
        const to = 0x800n + 8n * BigInt(element);
        const writes = Array.from({ length: vcpus }, (_, vcpu) =>
          peer.raisePageFault(vcpu, GVA + to, GPA + to, Access.write),
        );
        for (let answered = 0; answered < vcpus; )
          answered += (await program.run('listen 10000')).events.length;
        for (const seq of writes) expect(await dataOf(peer, seq)).toMatchObject({ at: 0n, data: '' });
      }
    },
  );

  it('on several vCPUs are not mixed up', async () => {
    const { program, peer } = await start({ vcpus: 8 });
    await watch(program);
    for (let vcpu = 7; vcpu >= 0; vcpu--) {
      const gva = GVA + 0x100n * BigInt(vcpu);
      await program.run(`actions emulate ${bytesFrom(vcpu, 16).toString('hex')}`);
      const seq = peer.raisePageFault(vcpu, gva, GPA + 0x100n * BigInt(vcpu));
      await program.run('listen 10000');
      expect((await peer.reply(seq)).body.readUInt16LE(0)).toBe(vcpu);
      expect(await dataOf(peer, seq)).toMatchObject({ at: gva, data: bytesFrom(vcpu, 16).toString('hex') });
    }
  });
});
