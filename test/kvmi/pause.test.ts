import { afterEach, describe, expect, it } from 'vitest';
import { eventually } from './eventually.js';
import { EventId, Id, type PeerOptions, type ScriptedPeer } from './peer.js';
import { attach, isBundled, type Program } from './program.js';

const RW = 6;

let program: Program;
let peer: ScriptedPeer;
async function start(options: PeerOptions = { vcpus: 2 }): Promise<void> {
  ({ program, peer } = await attach(options));
}
afterEach(async () => {
  expect(await program.end()).toBe(0);
});

const BATCH = [
  '27:0001000000000000',
  '7:00000000000000000100000000000000',
  '7:01000000000000000100000000000000',
  '27:0101000000000000',
];
const letGo = (vcpu: number) => `0:0${vcpu}00000000000000${'000a000000000000'}`;

describe('pausing', () => {
  it('is one batch of which only the end is answered, and every vCPU is let go by answering its pause', async () => {
    await start();
    const before = peer.received.length;
    expect(await program.result('pause')).toBe('0');
    expect(peer.log(before)).toEqual(BATCH);
    const numbers = peer.received.slice(before).map((m) => m.seq);
    expect(numbers).toEqual(numbers.map((_, i) => numbers[0]! + i));
    expect(await program.run('resume')).toEqual({ result: '0', events: [] });
    await eventually(() => peer.log(before + BATCH.length)).toEqual([letGo(0), letGo(1)]);
  });

  it('nests', async () => {
    await start();
    const before = peer.received.length;
    for (const command of ['pause', 'pause', 'resume']) expect(await program.result(command)).toBe('0');
    expect(peer.log(before)).toEqual(BATCH);
    await program.run('resume');
    await eventually(() => peer.log(before).length).toBe(BATCH.length + 2);
    expect(await program.result('resume')).toBe('0');
    await program.run('pause');
    expect(peer.log(before + BATCH.length + 2)).toEqual(BATCH);
  });

  it('that is refused leaves the guest running', async () => {
    await start();
    peer.reportsPauses = false;
    peer.answers.set(Id.controlCommandResponse, () => -11);
    expect(await program.result('pause')).toBe('1');
    expect(await program.result('resume')).toBe('0');
  });

  it('is not a barrier: a violation may come after it, and is handled by listen', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    peer.reportsPauses = false;
    await program.run('pause');
    const late = peer.raisePageFault(1, 0x5000n, 0x5000n);
    expect((await program.run('listen 1000')).events).toHaveLength(1);
    await peer.reply(late);
    peer.raise(0, EventId.pause);
    peer.raise(1, EventId.pause);
    expect(await program.result('resume')).toBe('0');
  });

  it('keeps reading registers and memory possible', async () => {
    await start();
    await program.run('pause');
    expect(await program.result('registers 1')).toMatch(/^0 /);
    expect(await program.result('write 0x1000 aa')).toBe('0 1');
    expect(await program.result('set-registers 1')).toBe('0');
    expect(await program.result('resume')).toBe('0');
  });
});

describe('resuming', () => {
  it('has callbacks handle what was raised before the pause', async () => {
    await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions emulate 11223344');
    const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
    await program.run('pause');
    const { result, events } = await program.run('resume');
    expect(result).toBe('0');
    expect(events).toHaveLength(1);
    expect((await peer.reply(seq)).body.toString('hex', 32, 36)).toBe('11223344');
    // The event, then both pauses.
    await eventually(() => peer.all(Id.eventReply).length).toBe(3);
  });

  it('waits for a vCPU that reports its pause late', async () => {
    await start();
    peer.reportsPauses = false;
    await program.run('pause');
    const resumed = program.run('resume');
    peer.raise(1, EventId.pause);
    peer.raise(0, EventId.pause);
    expect((await resumed).result).toBe('0');
  });

  it.runIf(isBundled)(
    'gives up on a vCPU that never stops, lets none go, and can be tried again',
    async () => {
      await start();
      peer.reportsPauses = false;
      await program.run('pause');
      peer.raise(0, EventId.pause);
      expect(await program.result('resume')).toBe('1');
      expect(peer.all(Id.eventReply)).toEqual([]);
      peer.raise(1, EventId.pause);
      expect(await program.result('resume')).toBe('0');
      await eventually(() => peer.all(Id.eventReply).length).toBe(2);
    },
  );

  it.runIf(isBundled)(
    'inside the callback of a vCPU that cannot stop before is refused instead of hanging',
    async () => {
      await start();
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions pause resume');
      peer.raisePageFault(0, 0x5000n, 0x5000n);
      const { result, events } = await program.run('listen 1000');
      expect(result).toBe('0');
      expect(events.slice(1)).toEqual(['in pause 0', 'in resume 1']);
      expect(await program.result('resume')).toBe('0');
      await eventually(() => peer.all(Id.eventReply).length).toBe(3);
    },
  );

  it('without a pause does nothing', async () => {
    await start();
    const before = peer.received.length;
    expect(await program.result('resume')).toBe('0');
    expect(peer.log(before)).toEqual([]);
  });
});
