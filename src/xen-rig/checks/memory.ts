import { strict as assert } from 'node:assert';
import { gpaOfFrame } from '../../vmi/address.js';
import {
  CROSSING,
  DATA_BASE,
  originalBytes,
  READ_4,
  READ_8,
  RESULT,
  resultOf,
  spareFrame,
  WRITTEN,
} from '../watched-guest.js';
import { type Check, quadword } from './bench.js';

const PAGE = 0x1000n;
/** Nothing is there in any PVH domain: above its memory, below what Xen adds at the end of 4 GB. */
const HOLE = 0x8000_0000n;
/** A library keeps a page for so long, by a clock of whole seconds. */
const STALE_SECONDS = 2;

const SPARE = gpaOfFrame(spareFrame(0));

export const MEMORY: readonly Check[] = [
  {
    name: 'physical memory is read at any alignment and length, across pages',
    async run(bench) {
      const program = await bench.attach();
      const start = gpaOfFrame(READ_8.gfn);
      for (const [offset, length] of [
        [0n, 1],
        [0xfffn, 1],
        [0xffdn, 7],
        [0x123n, 8191],
      ] as const) {
        const bytes = bench.read(start + offset, length).toString('hex');
        assert.equal(await program.result(`read ${start + offset} ${length}`), `0 ${length} ${bytes}`);
      }
    },
  },
  {
    name: 'physical memory is written across pages, with exactly the bytes',
    async run(bench) {
      const program = await bench.attach();
      const at = SPARE + PAGE - 3n;
      const before = bench.read(SPARE, 0x2000);
      assert.equal(await program.result(`write ${at} aabbccddee`), '0 5');
      const expected = Buffer.from(before);
      expected.set([0xaa, 0xbb, 0xcc, 0xdd, 0xee], 0xffd);
      assert(bench.read(SPARE, 0x2000).equals(expected));
      assert.equal(await program.result(`read ${at} 5`), '0 5 aabbccddee');
    },
  },
  {
    name: 'physical memory has holes and an end: reads and writes there fail, and the session goes on',
    async run(bench) {
      const program = await bench.attach();
      const end = BigInt((await program.result('size')).split(' ')[2]!);
      for (const address of [HOLE, end, end + 1n, 0xfff_ffff_f000n, 0xffff_ffff_ffff_fff0n]) {
        assert.match(await program.result(`read ${address} 4`), /^1 0 /);
        assert.equal(await program.result(`write ${address} 11223344`), '1 0');
      }
      assert.match(await program.result(`read ${READ_8.gpa} 8`), /^0 8 /);
    },
  },
  {
    name: 'physical memory of no bytes is no transfer',
    async run(bench) {
      const program = await bench.attach();
      assert.equal(await program.result('read 0 0'), '0 0 ');
      assert.equal(await program.result('write 0'), '0 0');
    },
  },
  {
    name: 'virtual memory is read and written across pages that are not neighbours',
    async run(bench) {
      const program = await bench.attach();
      assert.equal(await program.result('paging 0'), '4');
      const { pageTable } = bench.guest;
      const bytes = Buffer.concat([originalBytes(5).subarray(-3), originalBytes(6).subarray(0, 5)]);
      assert.equal(
        await program.result(`read-virtual ${pageTable} ${CROSSING.gva} 8`),
        `0 8 ${bytes.toString('hex')}`,
      );
      // The end of the page before the one that is written to, and the end of that page, which nobody uses.
      const at = WRITTEN.gva + PAGE - 2n;
      assert.equal(await program.result(`write-virtual ${pageTable} ${at - 2n} c1c2`), '0 2');
      assert.equal(bench.read(WRITTEN.gpa + PAGE - 4n, 2).toString('hex'), 'c1c2');
    },
  },
  {
    name: 'virtual memory ends at the first page that is not mapped, and the bytes before it are counted',
    async run(bench) {
      const program = await bench.attach();
      await program.run('paging 0');
      const { pageTable } = bench.guest;
      const last = DATA_BASE + 10n * PAGE - 4n;
      assert.match(await program.result(`read-virtual ${pageTable} ${last} 8`), /^1 4 /);
      assert.equal(await program.result(`write-virtual ${pageTable} ${last} ${quadword(0n)}`), '1 4');
      assert.match(await program.result(`read-virtual ${pageTable} ${DATA_BASE - 8n} 8`), /^1 0 /);
    },
  },
  {
    name: 'a page that was read is read anew once pages are flushed',
    async run(bench) {
      const program = await bench.attach();
      const read = `read ${resultOf(0, 'passes')} 8`;
      const before = await program.result(read);
      await bench.goesOn(0);
      await program.run('flush-pages');
      assert.notEqual(await program.result(read), before);
    },
  },
  {
    name: 'a page that was read grows old',
    async run(bench) {
      const program = await bench.attach();
      const read = `read ${resultOf(0, 'passes')} 8`;
      const before = await program.result(read);
      await bench.goesOn(0);
      await program.run(`pass-seconds ${STALE_SECONDS}`);
      assert.notEqual(await program.result(read), before);
    },
  },
  {
    name: 'a page that was read holds what was written through the library since, and the guest sees it',
    async run(bench) {
      const program = await bench.attach();
      await program.run(`read ${READ_4.gpa} 4`);
      assert.equal(await program.result(`write ${READ_4.gpa} 04030201`), '0 4');
      assert.equal(await program.result(`read ${READ_4.gpa} 4`), '0 4 04030201');
      await bench.goesOn(0);
      assert.equal(bench.result(0, 'seen4'), 0x01020304n);
      await program.run(`write ${READ_4.gpa} ${originalBytes(1).toString('hex', 0x10, 0x14)}`);
    },
  },
  {
    name: 'that a page cannot be read is forgotten by a flush',
    async run(bench) {
      const program = await bench.attach();
      assert.match(await program.result(`read ${HOLE} 4`), /^1 0 /);
      await program.run('flush');
      assert.match(await program.result(`read ${HOLE} 4`), /^1 0 /);
      const results = resultOf(0, 'passes') + RESULT.seen8;
      assert.match(await program.result(`read ${results} 8`), /^0 8 /);
    },
  },
];
