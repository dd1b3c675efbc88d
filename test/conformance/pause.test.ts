import { describe, expect, it } from 'vitest';
import { eventually } from '../kvmi/eventually.js';
import { EventId, Id } from '../kvmi/peer.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';

const RW = 6;

describe.each(LIBRARIES)('with $library', ({ path }) => {
  const { start } = programsOn(path);

  describe.each(VCPU_COUNTS)('%s vCPUs', (vcpus) => {
    const all = Array.from({ length: vcpus }, (_, vcpu) => vcpu);
    const last = vcpus - 1;
    const batch = [
      '27:0001000000000000',
      ...all.map((vcpu) => `7:0${vcpu}000000000000000100000000000000`),
      '27:0101000000000000',
    ];
    const letGo = all.map((vcpu) => `0:0${vcpu}00000000000000000a000000000000`);

    it('are paused by one batch of which only the end is answered, and let go by answering their pauses', async () => {
      const { program, peer } = await start({ vcpus });
      const before = peer.received.length;
      expect(await program.result('pause')).toBe('0');
      expect(peer.log(before)).toEqual(batch);
      expect(new Set(peer.received.slice(before).map((m) => m.seq)).size).toBe(batch.length);
      expect(await program.run('resume')).toEqual({ result: '0', events: [] });
      await eventually(() => peer.log(before + batch.length)).toEqual(letGo);
    });

    it('are paused as often as they are resumed', async () => {
      const { program, peer } = await start({ vcpus });
      const before = peer.received.length;
      for (const command of ['pause', 'pause', 'resume']) expect(await program.result(command)).toBe('0');
      expect(peer.log(before)).toEqual(batch);
      await program.run('resume');
      await eventually(() => peer.log(before).length).toBe(batch.length + vcpus);
      expect(await program.result('resume')).toBe('0');
      await program.run('pause');
      expect(peer.log(before + batch.length + vcpus)).toEqual(batch);
    });

    it('are quiescent after a round of registers without an event, and not before', async () => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      peer.reportsPauses = false;
      await program.run('pause');
      // Each is inside the hypervisor's emulator, and raises its event before it serves its registers.
      const late = new Set(all);
      peer.answers.set(Id.getRegisters, ({ body }) => {
        const vcpu = body.readUInt16LE(0);
        if (late.delete(vcpu)) peer.raisePageFault(vcpu, 0x5000n, 0x5000n);
        return -11;
      });
      const rounds: number[] = [];
      for (let round = 0; round < 2; round++) {
        for (const vcpu of all) await program.run(`registers ${vcpu}`);
        rounds.push((await program.run('listen 0')).events.length);
      }
      expect(rounds).toEqual([vcpus, 0]);
      for (const vcpu of all) peer.raise(vcpu, EventId.pause);
      expect(await program.run('resume')).toEqual({ result: '0', events: [] });
      await eventually(() => peer.all(Id.eventReply).length).toBe(2 * vcpus);
    });

    it('have what they raised before the pause handled by resume', async () => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions emulate 11223344');
      const seqs = all.map((vcpu) => peer.raisePageFault(vcpu, 0x5000n, 0x5000n));
      await program.run('pause');
      const { result, events } = await program.run('resume');
      expect([result, events.length]).toEqual(['0', vcpus]);
      for (const seq of seqs) expect((await peer.reply(seq)).body.toString('hex', 32, 36)).toBe('11223344');
      // The events, then the pauses.
      await eventually(() => peer.all(Id.eventReply).length).toBe(2 * vcpus);
    });

    it('may report their pauses late, in any order, and between events', async () => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      peer.reportsPauses = false;
      await program.run('pause');
      const resumed = program.run('resume');
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
      for (const vcpu of all.slice(1).reverse()) peer.raise(vcpu, EventId.pause);
      await peer.reply(seq);
      peer.raise(0, EventId.pause);
      const { result, events } = await resumed;
      expect([result, events.length]).toEqual(['0', 1]);
      await eventually(() => peer.all(Id.eventReply).length).toBe(vcpus + 1);
    });

    it('stop again and again', async () => {
      const { program, peer } = await start({ vcpus });
      const before = peer.received.length;
      for (let i = 0; i < 10; i++) {
        expect(await program.result('pause')).toBe('0');
        expect(await program.result('resume')).toBe('0');
      }
      await eventually(() => peer.log(before)).toEqual(
        Array.from({ length: 10 }, () => [...batch, ...letGo]).flat(),
      );
    });

    it('can be read and changed while they stand still', async () => {
      const { program } = await start({ vcpus });
      await program.run('pause');
      expect(await program.result(`registers ${last}`)).toMatch(/^0 /);
      expect(await program.result('write 0x1000 aa')).toBe('0 1');
      expect(await program.result(`set-registers ${last}`)).toBe('0');
      expect(await program.result('resume')).toBe('0');
    });

    it('whose pause is refused run on', async () => {
      const { program, peer } = await start({ vcpus });
      peer.reportsPauses = false;
      peer.answers.set(Id.controlCommandResponse, () => -11);
      expect(await program.result('pause')).toBe('1');
      expect(await program.result('resume')).toBe('0');
      expect(peer.all(Id.eventReply)).toEqual([]);
      peer.answers.clear();
      peer.reportsPauses = true;
      expect(await program.result('pause')).toBe('0');
      expect(await program.result('resume')).toBe('0');
      await eventually(() => peer.all(Id.eventReply).length).toBe(vcpus);
    });

    it('are not touched by a resume without a pause', async () => {
      const { program, peer } = await start({ vcpus });
      const before = peer.received.length;
      expect(await program.result('resume')).toBe('0');
      expect(peer.log(before)).toEqual([]);
    });

    it('that report a pause nobody asked for stand still until the next resume', async () => {
      const { program, peer } = await start({ vcpus });
      const seq = peer.raise(last, EventId.pause);
      expect(await program.run('listen 10000')).toEqual({ result: '0', events: [] });
      await program.run('size');
      expect(peer.all(Id.eventReply)).toEqual([]);
      peer.reportsPauses = false;
      await program.run('pause');
      for (const vcpu of all.slice(0, -1)) peer.raise(vcpu, EventId.pause);
      expect(await program.result('resume')).toBe('0');
      await peer.reply(seq);
    });

    it('may be paused inside a callback, and are resumed after it', async () => {
      const { program, peer } = await start({ vcpus });
      await program.run(`watch 0 5 ${RW}`);
      await program.run('actions pause');
      peer.raisePageFault(last, 0x5000n, 0x5000n);
      expect((await program.run('listen 10000')).events.slice(1)).toEqual(['in pause 0']);
      expect(await program.result('resume')).toBe('0');
      await eventually(() => peer.all(Id.eventReply).length).toBe(vcpus + 1);
    });
  });
});
