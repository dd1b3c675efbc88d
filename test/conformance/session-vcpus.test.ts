import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { openSession } from '../../src/libvmi/open-session.js';
import type { LibvmiSession } from '../../src/libvmi/session.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { LIBRARIES, VCPU_COUNTS } from '../libvmi/libraries.js';
import { Peer } from '../libvmi/peer.js';

const PATIENCE_MS = 10_000;
const READ = 1;
const PAUSE_VCPU = 7;
const RAX = 0;

describe.each(LIBRARIES)('a session on $library', ({ path }) => {
  describe.each(VCPU_COUNTS)('with %s vCPUs', (vcpus) => {
    const all = Array.from({ length: vcpus }, (_, vcpu) => vcpu);
    const fault = (vcpu: number) => {
      const address = 0x3000 + 8 * vcpu;
      return { vcpu, gva: 0xffff_f800_0000_0000n + BigInt(address), gpa: BigInt(address), access: READ };
    };
    let directory: string;
    let peer: Peer;
    let session: LibvmiSession;

    beforeEach(async () => {
      directory = mkdtempSync(join(tmpdir(), 'memtables-vcpus-'));
      const socket = join(directory, 'kvmi.sock');
      peer = await Peer.start({ socket, vcpus, frames: 16 });
      session = openSession({ name: 'guest', socket, libraryPath: path });
    });

    afterEach(async () => {
      try {
        session.close();
      } finally {
        await peer.stop();
        rmSync(directory, { recursive: true });
      }
    });

    test('each has its own registers', () => {
      for (const vcpu of all) peer.ask('setRegister', vcpu, RAX, 0x100n + BigInt(vcpu));
      expect(all.map((vcpu) => session.registers(vcpu).rax)).toEqual(
        all.map((vcpu) => 0x100n + BigInt(vcpu)),
      );
      whileQuiescent(session, () => {
        for (const vcpu of all) session.setRegisters(vcpu, { ...session.registers(vcpu), rax: BigInt(vcpu) });
      });
      expect(all.map((vcpu) => peer.ask('register', vcpu, RAX))).toEqual(all.map(BigInt));
    });

    test('each has its violations answered with its own data', () => {
      session.trapAccess(3n);
      session.onViolation(({ vcpu, gpa }) => Uint8Array.of(vcpu, Number(gpa & 0xffn)));
      for (let round = 0; round < 20; round++) {
        for (const vcpu of all) peer.ask('fault', fault(vcpu));
        for (let answered = 0; answered < vcpus; ) answered += session.listen(PATIENCE_MS);
        const answers = peer.ask('answers', vcpus).sort((a, b) => a.vcpu - b.vcpu);
        expect(answers.map(({ vcpu, data }) => [vcpu, ...data])).toEqual(
          all.map((vcpu) => [vcpu, vcpu, 8 * vcpu]),
        );
      }
    });

    test('each that raises a violation while the guest is being paused is waited for', () => {
      const order: string[] = [];
      session.onViolation(({ vcpu }) => {
        order.push(`violation ${vcpu}`);
        return undefined;
      });
      for (const vcpu of all) peer.ask('onCommand', { command: PAUSE_VCPU, vcpu, action: fault(vcpu) });
      whileQuiescent(session, () => {
        order.push('work');
        expect(peer.ask('paused')).toEqual(all.map(() => true));
      });
      expect(order).toEqual([...all.map((vcpu) => `violation ${vcpu}`), 'work']);
      peer.ask('running');
    });

    test('all stop and go on, again and again', () => {
      for (let round = 0; round < 10; round++) {
        session.pause();
        session.registers(vcpus - 1);
        expect(peer.ask('paused')).toEqual(all.map(() => true));
        session.resume();
        peer.ask('running');
      }
    });

    test('all are free after closing with violations open', () => {
      session.trapAccess(3n);
      for (const vcpu of all) peer.ask('fault', fault(vcpu));
      session.close();
      peer.ask('disconnected');
      expect(peer.ask('outstanding')).toBe(0);
      expect(peer.ask('answers', vcpus)).toHaveLength(vcpus);
    });
  });
});
