import { describe, expect, it } from 'vitest';
import { PAGE } from '../kvmi/peer.js';
import type { Program } from '../kvmi/program.js';
import { LIBRARIES } from '../libvmi/libraries.js';
import { programsOn } from './attached.js';
import { FRAMES, LARGE, NO_EXECUTE, PRESENT, PT_ENTRY, ROOT, tables, VA } from './guest-memory.js';

const IA32E = '4';
const CR0 = 224;
const CR4 = 248;

async function translate(program: Program, root: bigint | number = ROOT, va = VA): Promise<string> {
  expect(await program.result('paging 0')).toBe(IA32E);
  return program.result(`translate ${root} ${va}`);
}
const found = (pa: bigint, size: number) => `0 0 0x${pa.toString(16)} 0x${size.toString(16)}`;
const UNMAPPED = '1 1 0x0 0x0';

describe.each(LIBRARIES)('virtual memory with $library', ({ path }) => {
  const { start } = programsOn(path);

  it('cannot be used before the paging mode is known', async () => {
    const { program } = await start({ memory: tables() });
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(UNMAPPED);
    expect(await program.result(`read-virtual ${ROOT} ${VA} 4`)).toBe('1 0 ');
  });

  it('is translated by 4 KB pages, with the low and high bits of CR3 and entries ignored', async () => {
    const { program } = await start({
      memory: tables({ pt: 0x9000n | PRESENT | NO_EXECUTE | (0x7ffn << 52n) | 0xffen }),
    });
    expect(await translate(program, BigInt(ROOT) | 0x8000000000000fffn)).toBe(found(0x9abcn, PAGE));
  });

  it('is translated by 2 MB and 1 GB pages, whose attribute bit 12 is not an address', async () => {
    const { program, peer } = await start({
      memory: tables({ pd: 0x40200000n | PRESENT | LARGE | 0x1000n }),
    });
    expect(await translate(program)).toBe(found(0x40200000n | (VA & 0x1fffffn), 0x200000));
    tables({ pdpt: 0x80000000n | PRESENT | LARGE }).copy(peer.memory);
    await program.run('flush');
    expect(await translate(program)).toBe(found(0x80000000n | (VA & 0x3fffffffn), 0x40000000));
  });

  it.each([
    ['the top entry is not present', { pml4: 0x2000n }],
    ['the second entry is not present', { pdpt: 0x3000n | LARGE }],
    ['the third entry is not present', { pd: 0n }],
    ['the last entry is not present', { pt: 0x9000n | 0xffen }],
    ['a table is outside of memory', { pd: 0x000ffffffffff000n | PRESENT }],
  ])('is unmapped where %s', async (_, entries) => {
    const { program } = await start({ memory: tables(entries) });
    expect(await translate(program)).toBe(UNMAPPED);
  });

  it.each([
    ['a top entry that claims to be a page', { pml4: 0x2000n | PRESENT | LARGE }, found(0x9abcn, PAGE)],
    [
      'a 2 MB page with reserved bits',
      { pd: 0x40202000n | PRESENT | LARGE },
      found(0x40200000n | (VA & 0x1fffffn), 0x200000),
    ],
    [
      'a 1 GB page with reserved bits',
      { pdpt: 0x80200000n | PRESENT | LARGE },
      found(0x80000000n | (VA & 0x3fffffffn), 0x40000000),
    ],
  ])('is translated leniently: %s', async (_, entries, expected) => {
    const { program } = await start({ memory: tables(entries) });
    expect(await translate(program)).toBe(expected);
  });

  it('is translated leniently: the upper bits of an address are not looked at', async () => {
    const { program } = await start({ memory: tables() });
    expect(await translate(program, ROOT, VA & 0x0000ffff_ffffffffn)).toBe(found(0x9abcn, PAGE));
  });

  it('is unmapped where the root is outside of memory', async () => {
    const { program } = await start({ memory: tables() });
    expect(await translate(program, FRAMES * PAGE)).toBe(UNMAPPED);
  });

  it('survives tables that point to themselves', async () => {
    const { program, peer } = await start({ memory: tables() });
    peer.memory.fill(0, ROOT, ROOT + PAGE);
    for (let i = 0; i < 512; i++) peer.memory.writeBigUInt64LE(BigInt(ROOT) | PRESENT, ROOT + 8 * i);
    expect(await translate(program)).toBe(found(BigInt(ROOT) | (VA & 0xfffn), PAGE));
  });

  it('takes pages in transition for present only once it was told to, and from then on', async () => {
    const TRANSITION = 1n << 11n;
    const PROTOTYPE = 1n << 10n;
    const { program, peer } = await start({ memory: tables({ pt: 0x9000n | TRANSITION }) });
    expect(await translate(program)).toBe(UNMAPPED);
    expect(await program.result('paging 1')).toBe(IA32E);
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(found(0x9abcn, PAGE));
    await program.run('flush');
    expect(await translate(program)).toBe(found(0x9abcn, PAGE));
    tables({ pt: 0x9000n | TRANSITION | PROTOTYPE }).copy(peer.memory);
    await program.run('flush');
    expect(await translate(program)).toBe(UNMAPPED);
  });

  it('is read and written across pages that are not neighbours, up to the first unmapped one', async () => {
    const memory = tables();
    memory.writeBigUInt64LE(0x7000n | PRESENT, PT_ENTRY + 8);
    const { program, peer } = await start({ memory });
    await program.run('paging 0');
    const last = VA | 0xfffn;
    const expected = `${memory.toString('hex', 0x9fff, 0xa000)}${memory.toString('hex', 0x7000, 0x7003)}`;
    expect(await program.result(`read-virtual ${ROOT} ${last} 4`)).toBe(`0 4 ${expected}`);
    expect(await program.result(`write-virtual ${ROOT} ${last} aabb`)).toBe('0 2');
    expect([peer.memory[0x9fff], peer.memory[0x7000]]).toEqual([0xaa, 0xbb]);
    expect(await program.result(`read-virtual ${ROOT} ${last} ${PAGE + 2}`)).toMatch(
      new RegExp(`^1 ${PAGE + 1} `),
    );
  });

  it.each([
    ['paging is off', 0x80050033n & ~(1n << 31n), 0x3506f8n, '0'],
    ['paging is 32-bit', 0x80050033n, 0x3506d8n, '2'],
  ])('has no four-level mode when %s', async (_, cr0, cr4, mode) => {
    const { program, peer } = await start({ memory: tables() });
    peer.special = (bytes) => {
      bytes.writeBigUInt64LE(cr0, CR0);
      bytes.writeBigUInt64LE(cr4, CR4);
    };
    expect(await program.result('paging 0')).toBe(mode);
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(UNMAPPED);
  });

  it('of a guest with five levels is walked as if it had four', async () => {
    const { program, peer } = await start({ memory: tables() });
    peer.special = (bytes) => bytes.writeBigUInt64LE(0x3506f8n | (1n << 12n), CR4);
    expect(await translate(program)).toBe(found(0x9abcn, PAGE));
  });
});
