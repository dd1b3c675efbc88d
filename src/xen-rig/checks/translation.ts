import { strict as assert } from 'node:assert';
import { gpaOfFrame, pageOffset } from '../../vmi/address.js';
import type { AbiProgram } from '../abi-program.js';
import { CODE_PAGE, CROSSING, READ_8, spareFrame, WRITTEN } from '../watched-guest.js';
import { type Bench, type Check, quadword } from './bench.js';

const UNMAPPED = '1 1 0x0 0x0';
const found = (pa: bigint, size: number) => `0 0 0x${pa.toString(16)} 0x${size.toString(16)}`;
const [SIZE_4K, SIZE_2M, SIZE_1G] = [0x1000, 0x20_0000, 0x4000_0000];
const PRESENT = 1n;
const LARGE = 0x80n;
/** Tables of our own, in frames that the guest does not use, one for each level. */
const [PML4, PDPT, PD, PT] = [8, 9, 10, 11].map((index) => gpaOfFrame(spareFrame(index))) as [
  bigint,
  bigint,
  bigint,
  bigint,
];
/** The first entry of each table leads to it. */
const VA = 0x123n;

async function withPaging(bench: Bench): Promise<AbiProgram> {
  const program = await bench.attach();
  assert.equal(await program.result('paging 0'), '4');
  return program;
}

/** Makes the first entry of each table. */
async function enter(program: AbiProgram, entries: readonly [table: bigint, entry: bigint][]): Promise<void> {
  for (const [table, entry] of entries)
    assert.equal(await program.result(`write ${table} ${quadword(entry)}`), '0 8');
  await program.run('flush');
}

export const TRANSLATION: readonly Check[] = [
  {
    name: 'nothing is translated before the paging mode is known',
    async run(bench) {
      const program = await bench.attach();
      assert.equal(await program.result(`translate ${bench.guest.pageTable} ${READ_8.gva}`), UNMAPPED);
      assert.match(await program.result(`read-virtual ${bench.guest.pageTable} ${READ_8.gva} 1`), /^1 0 /);
    },
  },
  {
    name: "the guest's own addresses are translated, with the low bits of CR3 ignored",
    async run(bench) {
      const program = await withPaging(bench);
      const { pageTable } = bench.guest;
      for (const { gva, gfn } of [READ_8, CROSSING, WRITTEN, CODE_PAGE]) {
        const expected = found(gpaOfFrame(gfn) + BigInt(pageOffset(gva)), SIZE_4K);
        for (const root of [pageTable, pageTable | 0xfffn])
          assert.equal(await program.result(`translate ${root} ${gva}`), expected);
      }
    },
  },
  {
    name: 'addresses are translated by 4 KB, 2 MB and 1 GB pages, and not by entries that are not present',
    async run(bench) {
      const program = await withPaging(bench);
      const translate = () => program.result(`translate ${PML4} ${VA}`);
      await enter(program, [
        [PML4, PDPT | PRESENT],
        [PDPT, PD | PRESENT],
        [PD, PT | PRESENT],
        [PT, 0x5000n | PRESENT],
      ]);
      assert.equal(await translate(), found(0x5123n, SIZE_4K));
      await enter(program, [[PT, 0x5000n]]);
      assert.equal(await translate(), UNMAPPED);
      await enter(program, [[PD, 0x60_0000n | PRESENT | LARGE]]);
      assert.equal(await translate(), found(0x60_0123n, SIZE_2M));
      await enter(program, [[PDPT, 0x4000_0000n | PRESENT | LARGE]]);
      assert.equal(await translate(), found(0x4000_0123n, SIZE_1G));
      await enter(program, [[PDPT, 0n]]);
      assert.equal(await translate(), UNMAPPED);
    },
  },
  {
    name: 'a remapped page is followed after both caches were flushed',
    async run(bench) {
      const program = await withPaging(bench);
      await enter(program, [
        [PML4, PDPT | PRESENT],
        [PDPT, PD | PRESENT],
        [PD, PT | PRESENT],
        [PT, gpaOfFrame(READ_8.gfn) | PRESENT],
      ]);
      const read = `read-virtual ${PML4} ${VA} 16`;
      const bytes = (gfn: bigint) => `0 16 ${bench.read(gpaOfFrame(gfn) + VA, 16).toString('hex')}`;
      assert.equal(await program.result(read), bytes(READ_8.gfn));
      await enter(program, [[PT, gpaOfFrame(CROSSING.gfn) | PRESENT]]);
      assert.equal(await program.result(read), bytes(CROSSING.gfn));
    },
  },
  {
    name: 'a root outside of memory maps nothing, and tables that point to themselves come to an end',
    async run(bench) {
      const program = await withPaging(bench);
      for (const root of [0x8000_0000n, 0xf_ffff_ffff_f000n])
        assert.equal(await program.result(`translate ${root} ${VA}`), UNMAPPED);
      await enter(program, [[PML4, PML4 | PRESENT]]);
      assert.equal(await program.result(`translate ${PML4} ${VA}`), found(PML4 + VA, SIZE_4K));
    },
  },
];
