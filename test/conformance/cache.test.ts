import { describe, expect, it } from 'vitest';
import { Id, PAGE, type ScriptedPeer } from '../kvmi/peer.js';
import type { Program } from '../kvmi/program.js';
import { LIBRARIES } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';
import { PRESENT, PT_ENTRY, ROOT, tables, VA } from './guest-memory.js';

/** A library keeps at most so many pages. */
const MAX_PAGES = 512;

const reads = (peer: ScriptedPeer) => peer.all(Id.readPhysical).length;

async function runAll(program: Program, ...commands: string[]): Promise<string> {
  let result = '';
  for (const command of commands) result = await program.result(command);
  return result;
}

describe.each(LIBRARIES)('what $library keeps', ({ path }) => {
  const { start } = programsOn(path);

  describe('of pages', () => {
    it('is used while the guest runs, and is stale until it is flushed', async () => {
      const { program, peer } = await start();
      await runAll(program, 'read 0 1', 'read 8 1');
      expect(reads(peer)).toBe(1);
      peer.memory[0] = 0x42;
      expect(await program.result('read 0 1')).toBe('0 1 00');
      expect(await runAll(program, 'flush', 'read 0 1')).toBe('0 1 42');
    });

    it('is stale while the guest stands still, and after it went on', async () => {
      const { program, peer } = await start();
      await runAll(program, 'pause', 'listen 0', 'read 0 1');
      peer.memory[0] = 0x42;
      expect(await program.result('read 0 1')).toBe('0 1 00');
      expect(await runAll(program, 'resume', 'read 0 1')).toBe('0 1 00');
      expect(await runAll(program, 'flush', 'read 0 1')).toBe('0 1 42');
    });

    it('is flushed by the flush of pages, not by that of translations', async () => {
      const { program, peer } = await start();
      await program.run('read 0 1');
      peer.memory[0] = 0x42;
      expect(await runAll(program, 'flush-translations', 'read 0 1')).toBe('0 1 00');
      expect(await runAll(program, 'flush-pages', 'read 0 1')).toBe('0 1 42');
    });

    it('is a second old at most, by a clock of whole seconds', async () => {
      const { program, peer } = await start();
      await program.run('read 0 1');
      peer.memory[0] = 0x42;
      expect(await runAll(program, 'pass-seconds 1', 'read 0 1')).toBe('0 1 00');
      expect(await runAll(program, 'pass-seconds 1', 'read 0 1')).toBe('0 1 42');
      peer.memory[0] = 0x43;
      expect(await runAll(program, 'pass-seconds 1', 'read 0 1')).toBe('0 1 42');
    });

    it('has what was written through the library', async () => {
      const { program, peer } = await start();
      await runAll(program, 'read 0 1', 'read 0x1000 1');
      peer.memory[8] = 0x44;
      expect(await runAll(program, 'write 0 43', 'read 0 1')).toBe('0 1 43');
      expect(await program.result('read 8 1')).toBe('0 1 44');
      expect(reads(peer)).toBe(3);
    });

    it('stays when a write is refused', async () => {
      const { program, peer } = await start();
      await program.run('read 0 1');
      peer.memory[0] = 0x42;
      peer.answers.set(Id.writePhysical, () => -14);
      expect(await runAll(program, 'write 8 43', 'read 0 1')).toBe('0 1 00');
    });

    it('includes that a page could not be read, for as long', async () => {
      const { program, peer } = await start();
      peer.answers.set(Id.readPhysical, () => -14);
      expect(await program.result('read 0 1')).toBe('1 0 ');
      peer.answers.clear();
      expect(await program.result('read 0 1')).toBe('1 0 ');
      expect(await program.result('read 0x1000 1')).toBe('0 1 00');
      expect(await runAll(program, 'pass-seconds 1', 'read 0 1')).toBe('1 0 ');
      expect(await runAll(program, 'pass-seconds 1', 'read 0 1')).toBe('0 1 00');
    });

    it('may become that it cannot be read', async () => {
      const { program, peer } = await start();
      await program.run('read 0 1');
      peer.answers.set(Id.readPhysical, () => -14);
      expect(await runAll(program, 'pass-seconds 2', 'read 0 1')).toBe('1 0 ');
      peer.answers.clear();
      expect(await program.result('read 0 1')).toBe('1 0 ');
      expect(await runAll(program, 'flush', 'read 0 1')).toBe('0 1 00');
    });

    it('is there in callbacks', async () => {
      const { program, peer } = await start();
      await runAll(program, 'watch 0 5 6', 'read 0x3000 8', 'actions read 0x3000');
      const seq = peer.raisePageFault(0, 0x5000n, 0x5000n);
      expect((await program.run('listen 10000')).events[1]).toBe('in read 0');
      await peer.reply(seq);
      expect(reads(peer)).toBe(1);
    });

    it('outlives the hypervisor', async () => {
      const { program, peer } = await start();
      await program.run('read 0 1');
      peer.close();
      expect(await program.result('listen 10000')).toBe('1');
      expect(await program.result('read 0 1')).toBe('0 1 00');
      expect(await program.result('read 0x1000 1')).toBe('1 0 ');
    });

    it(`is at most ${MAX_PAGES} pages, of which those read last outlive one more`, async () => {
      const { program, peer } = await start({ memory: Buffer.alloc(2 * MAX_PAGES * PAGE) });
      for (let page = 0; page < MAX_PAGES; page++) await program.run(`read ${page * PAGE} 1`);
      // The first is read anew, and so becomes the last.
      await runAll(program, 'pass-seconds 2', 'read 0 1', `read ${MAX_PAGES * PAGE} 1`);
      const before = reads(peer);
      await runAll(program, 'read 0 1', `read ${MAX_PAGES * PAGE} 1`);
      expect(reads(peer)).toBe(before);
    });

    it(`of ${MAX_PAGES} pages loses the oldest ones first`, async () => {
      const { program, peer } = await start({ memory: Buffer.alloc(2 * MAX_PAGES * PAGE) });
      for (let page = 0; page <= MAX_PAGES; page++) await program.run(`read ${page * PAGE} 1`);
      peer.received.splice(0);
      const kept = MAX_PAGES / 2;
      for (let page = kept; page <= MAX_PAGES; page++) await program.run(`read ${page * PAGE} 1`);
      expect(reads(peer)).toBe(0);
      await program.run(`read ${(kept - 1) * PAGE} 1`);
      expect(reads(peer)).toBe(1);
    });
  });

  describe('of translations', () => {
    const [BEFORE, AFTER] = [0x9abcn, 0x7abcn];
    const translated = (pa: bigint) => new RegExp(`^0 . 0x${pa.toString(16)} `);
    const remap = (peer: ScriptedPeer) => peer.memory.writeBigUInt64LE(0x7000n | PRESENT, PT_ENTRY);
    const LOOKUP = `translate ${ROOT} ${VA}`;
    const READ = `read-virtual ${ROOT} ${VA} 1`;
    const byteAt = (memory: Buffer, pa: bigint) =>
      `0 1 ${memory.toString('hex', Number(pa), Number(pa) + 1)}`;

    it('is stale until translations are flushed, whatever becomes of the pages', async () => {
      const memory = tables();
      const { program, peer } = await start({ memory });
      expect(await runAll(program, 'paging 0', READ)).toBe(byteAt(memory, BEFORE));
      remap(peer);
      expect(await runAll(program, 'flush-pages', 'pass-seconds 5', READ)).toBe(byteAt(memory, BEFORE));
      expect(await runAll(program, 'pause', 'listen 0', 'resume', READ)).toBe(byteAt(memory, BEFORE));
      expect(await runAll(program, 'flush-translations', 'flush-pages', READ)).toBe(byteAt(memory, AFTER));
    });

    it('is found anew from pages that may be stale', async () => {
      const memory = tables();
      const { program, peer } = await start({ memory });
      await runAll(program, 'paging 0', READ);
      remap(peer);
      expect(await runAll(program, 'flush-translations', READ)).toBe(byteAt(memory, BEFORE));
    });

    it('is of a page, not of an address', async () => {
      const memory = tables();
      const { program, peer } = await start({ memory });
      await runAll(program, 'paging 0', READ);
      remap(peer);
      await program.run('flush-pages');
      const next = VA + 1n;
      expect(await program.result(`read-virtual ${ROOT} ${next} 1`)).toBe(byteAt(memory, BEFORE + 1n));
    });

    it('is corrected by a lookup of the whole walk', async () => {
      const { program, peer } = await start({ memory: tables() });
      expect(await runAll(program, 'paging 0', LOOKUP)).toMatch(translated(BEFORE));
      remap(peer);
      await program.run('flush-pages');
      // The first answer still is the old one; the walk that comes with it finds the new one.
      expect(await program.result(LOOKUP)).toMatch(translated(BEFORE));
      expect(await program.result(LOOKUP)).toMatch(translated(AFTER));
    });

    it('is walked anew when what it led to cannot be read', async () => {
      const memory = tables();
      const { program, peer } = await start({ memory });
      await runAll(program, 'paging 0', READ);
      remap(peer);
      await program.run('flush-pages');
      peer.answers.set(Id.readPhysical, ({ body }) => {
        const gpa = Number(body.readBigUInt64LE(0));
        return gpa === 0x9000 ? -14 : peer.memory.subarray(gpa, gpa + PAGE);
      });
      expect(await program.result(READ)).toBe(byteAt(memory, AFTER));
    });

    it('does not include that an address is not mapped', async () => {
      const memory = tables({ pt: 0n });
      const { program, peer } = await start({ memory });
      expect(await runAll(program, 'paging 0', READ)).toBe('1 0 ');
      remap(peer);
      expect(await program.result(READ)).toBe('1 0 ');
      expect(await runAll(program, 'flush-pages', READ)).toBe(byteAt(memory, AFTER));
    });

    it('is of one page table', async () => {
      const memory = tables();
      const { program, peer } = await start({ memory });
      await runAll(program, 'paging 0', READ);
      memory.copy(peer.memory, 0x8000, ROOT, ROOT + PAGE);
      remap(peer);
      await program.run('flush-pages');
      expect(await program.result(`read-virtual ${0x8000} ${VA} 1`)).toBe(byteAt(peer.memory, AFTER));
      expect(await program.result(READ)).toBe(byteAt(peer.memory, BEFORE));
    });
  });
});
