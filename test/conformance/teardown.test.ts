import { describe, expect, it } from 'vitest';
import { eventually } from '../kvmi/eventually.js';
import { EventId, Id, type ScriptedPeer } from '../kvmi/peer.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const RW = 6;

describe.each(LIBRARIES)('destroying with $library', ({ path }) => {
  const { start } = programsOn(path);

  it.each(VCPU_COUNTS)(
    'pauses, turns single steps and events off, resumes and disconnects: %s vCPUs',
    async (vcpus) => {
      const { program, peer } = await start({ vcpus });
      const before = peer.received.length;
      expect(await program.result('destroy')).toBe('0');
      await eventually(() => peer.closed).toBe(true);
      const each = (line: (vcpu: string) => string | string[]) =>
        Array.from({ length: vcpus }, (_, vcpu) => line(vcpu.toString().padStart(2, '0'))).flat();
      expect(peer.log(before)).toEqual([
        '27:0001000000000000',
        ...each((vcpu) => `7:${vcpu}000000000000000100000000000000`),
        '27:0101000000000000',
        ...each((vcpu) => `63:${vcpu}000000000000000000000000000000`),
        ...each((vcpu) =>
          ['01', '02', '06', '0b'].map((kind) => `9:${vcpu}00000000000000${kind}00000000000000`),
        ),
        ...each((vcpu) => `0:${vcpu}00000000000000000a000000000000`),
      ]);
    },
  );

  it.each(VCPU_COUNTS)('answers what was raised before, without calling back: %s vCPUs', async (vcpus) => {
    const { program, peer } = await start({ vcpus });
    await program.run(`watch 0 5 ${RW}`);
    const seqs = Array.from({ length: vcpus }, (_, vcpu) => peer.raisePageFault(vcpu, 0x5000n, 0x5000n));
    expect(await program.run('destroy')).toEqual({ result: '0', events: [] });
    for (const seq of seqs) expect((await peer.reply(seq)).body.readUInt32LE(24)).toBe(0);
    await eventually(() => pausesAnswered(peer)).toBe(vcpus);
  });

  it('answers a single step that nobody handles', async () => {
    const { program, peer } = await start({ vcpus: 1 });
    const seq = peer.raise(0, EventId.singleStep, Buffer.alloc(8));
    expect(await program.run('destroy')).toEqual({ result: '0', events: [] });
    expect((await peer.reply(seq)).body.toString('hex')).toBe('0000000000000000000b000000000000');
  });

  it('repeats the value of a register that was about to be written', async () => {
    const { program, peer } = await start({ vcpus: 2 });
    const write = Buffer.alloc(24);
    write.writeBigUInt64LE(3n, 0);
    write.writeBigUInt64LE(0x1122334455667788n, 16);
    const [cr, msr] = [peer.raise(0, EventId.controlRegister, write), peer.raise(1, EventId.msr, write)];
    expect(await program.result('destroy')).toBe('0');
    expect((await peer.reply(cr)).body.toString('hex')).toBe(
      '0000000000000000' + '0001000000000000' + '8877665544332211',
    );
    expect((await peer.reply(msr)).body.toString('hex', 16)).toBe('8877665544332211');
  });

  it('leaves the permissions of pages as they are', async () => {
    const { program, peer } = await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('destroy');
    await eventually(() => peer.closed).toBe(true);
    expect(peer.all(Id.setPageAccess)).toHaveLength(1);
  });

  it('makes good for a clearing that was put off', async () => {
    const { program, peer } = await start({ vcpus: 1 });
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

  it('ends although the hypervisor refuses everything', async () => {
    const { program, peer } = await start({ vcpus: 2 });
    for (const id of [Id.controlCommandResponse, Id.controlEvents, Id.controlSingleStep])
      peer.answers.set(id, () => -22);
    peer.reportsPauses = false;
    expect(await program.result('destroy')).toBe('0');
    await eventually(() => peer.closed).toBe(true);
  });
});

function pausesAnswered(peer: ScriptedPeer): number {
  return peer.all(Id.eventReply).filter((m) => m.body.readUInt8(9) === EventId.pause).length;
}
