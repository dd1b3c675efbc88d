import { afterEach, describe, expect, it } from 'vitest';
import { eventually } from './eventually.js';
import { Access, EventId, Id, type ScriptedPeer } from './peer.js';
import { attach, BUNDLED, type Program } from './program.js';

const [W, RW] = [4, 6];

let program: Program;
let peer: ScriptedPeer;
async function start(): Promise<void> {
  ({ program, peer } = await attach(BUNDLED, { vcpus: 2 }));
}
afterEach(async () => {
  expect(await program.end()).toBe(0);
});

describe('an event callback', () => {
  it('that overlaps with another is asked first, and the event is answered once', async () => {
    await start();
    await program.run(`watch-all 0 ${RW}`);
    await program.run(`watch-all 1 ${W}`);
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n, Access.write);
    const { events } = await program.run('listen 10000');
    expect(events.map((line) => line.slice(0, 19))).toEqual(['event memory slot=0']);
    await peer.reply(seq);
    await program.run('size');
    expect(peer.all(Id.eventReply)).toHaveLength(1);
  });

  it('that answers with data but sets none lets the vCPU go on with what memory holds', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions respond 8');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    expect(await program.result('listen 10000')).toBe('0');
    expect((await peer.reply(seq)).body.toString('hex', 16)).toBe('00'.repeat(272));
  });

  it('that answers with data and registers has the data sent and the registers left', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions emulate aabb respond 128');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    await program.run('listen 10000');
    expect((await peer.reply(seq)).body.readUInt32LE(24)).toBe(2);
    expect(peer.all(Id.setRegisters)).toEqual([]);
  });

  it('that listens or destroys is refused', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions listen destroy');
    peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { result, events } = await program.run('listen 10000');
    expect(result).toBe('0');
    expect(events.slice(1)).toEqual(['in listen 1', 'in destroy 1']);
  });

  it('that resumes, while the vCPU that it handles cannot have stopped, is refused instead of hanging', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions pause resume');
    peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { result, events } = await program.run('listen 10000');
    expect(result).toBe('0');
    expect(events.slice(1)).toEqual(['in pause 0', 'in resume 1']);
    expect(await program.result('resume')).toBe('0');
    await eventually(() => peer.all(Id.eventReply).length).toBe(3);
  });
});

describe('a resume', () => {
  it('gives up on a vCPU that never stops, lets none go, and can be tried again', async () => {
    await start();
    peer.reportsPauses = false;
    await program.run('pause');
    peer.raise(0, EventId.pause);
    expect(await program.result('resume')).toBe('1');
    expect(peer.all(Id.eventReply)).toEqual([]);
    peer.raise(1, EventId.pause);
    expect(await program.result('resume')).toBe('0');
    await eventually(() => peer.all(Id.eventReply).length).toBe(2);
  });
});

describe('listening', () => {
  it('ends, however many events the commands of callbacks bring in', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions respond 128');
    let raised = 1;
    // Before the reply to what the one vCPU's callback wants, the next event of the other.
    peer.answers.set(Id.setRegisters, ({ body }) => {
      if (raised++ < 2000) peer.raisePageFault(1 - body.readUInt16LE(0), 0x5000n, 0x5000n);
      return Buffer.alloc(0);
    });
    peer.raisePageFault(0, 0x5000n, 0x5000n);
    let handled = (await program.run('listen 10000')).events.length;
    expect(handled).toBeLessThan(1000);
    while (handled < 2000) handled += (await program.run('listen 10000')).events.length;
    expect(handled).toBe(2000);
  });
});

describe('single steps', () => {
  it.each([32, 100, 0xffffffff])('of vCPU %s, for which an event has no bit, are refused', async (vcpu) => {
    await start();
    await program.run('watch-steps 0 1');
    for (const command of [`step 1 ${vcpu} 1`, `toggle 0 ${vcpu} 1`, `toggle 0 ${vcpu} 0`])
      expect(await program.result(command)).toBe('1');
  });
});

describe('virtual memory', () => {
  it('is not written before the paging mode is known', async () => {
    await start();
    expect(await program.result('write-virtual 0x1000 0x2000 aa')).toBe('1 0');
    expect(peer.all(Id.writePhysical)).toEqual([]);
  });

  it('is translated anew once the translations of its page table were flushed', async () => {
    await start();
    // Every entry of the table leads to itself.
    for (let i = 0; i < 512; i++) peer.memory.writeBigUInt64LE(0x1001n, 0x1000 + 8 * i);
    await program.run('paging 0');
    expect(await program.result('read-virtual 0x1000 0x2008 1')).toBe('0 1 01');
    peer.memory.fill(0, 0x1000, 0x2000);
    await program.run('flush-pages');
    expect(await program.result('read-virtual 0x1000 0x2008 1')).toBe('0 1 00');
    await program.run('flush-translations 0x1000');
    expect(await program.result('read-virtual 0x1000 0x2008 1')).toBe('1 0 ');
  });
});
