import { describe, expect, it } from 'vitest';
import { eventually } from '../kvmi/eventually.js';
import { EventId, eventCommon, Id, message, pageFault } from '../kvmi/peer.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const RW = 6;

describe.each(LIBRARIES)('a hypervisor that goes away from $library', ({ path }) => {
  const { start } = programsOn(path);

  it('fails a listen that waits, and every call after it', async () => {
    const { program, peer } = await start();
    await program.run(`watch 0 5 ${RW}`);
    const listening = program.result('listen 60000');
    peer.close();
    expect(await listening).toBe('1');
    const failures: [string, string][] = [
      ['listen 60000', '1'],
      ['read 0x1000 4', '1 0 '],
      ['write 0x1000 aa', '1 0'],
      ['pause', '1'],
      ['watch 1 7 6', '1'],
      ['clear 0', '1'],
      ['watch-steps 2 1', '1'],
      ['set-registers 0', '1'],
      ['size', '2 0x0 0x0'],
      ['paging 0', '1'],
    ];
    for (const [command, result] of failures)
      expect([command, await program.result(command)]).toEqual([command, result]);
    expect(await program.result('registers 0')).toMatch(/^1 /);
    expect(await program.result('destroy')).toBe('0');
  });

  it.each<[string, string, number]>([
    ['read', 'read 0x1000 4', Id.readPhysical],
    ['write', 'write 0x1000 aa', Id.writePhysical],
    ['register read', 'registers 0', Id.getRegisters],
    ['register write', 'set-registers 0', Id.setRegisters],
    ['trap', 'watch 1 7 6', Id.setPageAccess],
    ['pause', 'pause', Id.controlCommandResponse],
    ['single step', 'watch-steps 1 1', Id.controlSingleStep],
  ])('fails a %s that waits for its reply, and destroy still ends', async (_, command, id) => {
    const { program, peer } = await start();
    peer.answers.set(id, () => {
      peer.close();
      return 'silence';
    });
    expect(await program.result(command)).toMatch(/^1/);
    expect(await program.result('listen 0')).toBe('1');
    expect(await program.result('destroy')).toBe('0');
  });

  it.each(VCPU_COUNTS)('fails a resume that waits for one of %s vCPUs', async (vcpus) => {
    const { program, peer } = await start({ vcpus });
    peer.reportsPauses = false;
    await program.run('pause');
    const resuming = program.result('resume');
    for (let vcpu = 0; vcpu < vcpus - 1; vcpu++) peer.raise(vcpu, EventId.pause);
    peer.close();
    expect(await resuming).toBe('1');
  });

  it('in the middle of a message fails a listen, the second one at the latest', async () => {
    const { program, peer } = await start();
    const event = Buffer.concat([eventCommon(0, EventId.pageFault), pageFault(0x5000n, 0x5000n, 1)]);
    peer.raw(message(Id.event, 1, event).subarray(0, 300));
    const listening = program.result('listen 60000');
    peer.close();
    await listening;
    expect(await program.result('listen 60000')).toBe('1');
  });

  it('while its event is being handled fails the next listen', async () => {
    const { program, peer } = await start();
    await program.run(`watch 0 5 ${RW}`);
    await program.run('actions read 0x3000');
    peer.answers.set(Id.readPhysical, () => {
      peer.close();
      return 'silence';
    });
    peer.raisePageFault(0, 0x5000n, 0x5000n);
    const { result, events } = await program.run('listen 10000');
    expect(result).toBe('0');
    expect(events[1]).toBe('in read 1');
    expect(await program.result('listen 0')).toBe('1');
    expect(await program.result('destroy')).toBe('0');
  });

  it('while it is being left does not keep destroy', async () => {
    for (const id of [Id.controlCommandResponse, Id.controlSingleStep, Id.controlEvents, Id.eventReply]) {
      const { program, peer } = await start();
      if (id === Id.eventReply) void peer.message((m) => m.id === id).then(() => peer.close());
      else
        peer.answers.set(id, () => {
          peer.close();
          return 'silence';
        });
      expect([id, await program.result('destroy')]).toEqual([id, '0']);
      await eventually(() => peer.closed).toBe(true);
    }
  });

  it('in effect, by not answering, fails the command within a bounded time', async () => {
    const { program, peer } = await start();
    peer.answers.set(Id.readPhysical, () => 'silence');
    expect(await program.result('read 0x1000 4')).toBe('1 0 ');
    peer.close();
    expect(await program.result('destroy')).toBe('0');
  });
});
