import { afterEach, describe, expect, it } from 'vitest';
import { Id, type Message, PAGE, type ScriptedPeer } from './peer.js';
import { attach, isBundled, type Program } from './program.js';

const FRAMES = 64;
const ROOT = 0x1000;

let program: Program;
let peer: ScriptedPeer;
async function attachTo(memory: Buffer = Buffer.alloc(FRAMES * PAGE)): Promise<void> {
  ({ program, peer } = await attach({ memory, vcpus: 1 }));
}
afterEach(async () => {
  expect(await program.end()).toBe(0);
});

function pattern(): Buffer {
  const memory = Buffer.alloc(FRAMES * PAGE);
  for (let i = 0; i < memory.length; i++) memory[i] = (i * 7 + (i >> 12)) & 0xff;
  return memory;
}

function ranges(messages: readonly Message[]): [number, number][] {
  return messages.map(({ body }) => [Number(body.readBigUInt64LE(0)), Number(body.readBigUInt64LE(8))]);
}

describe('physical memory', () => {
  it('is read in whole pages, whatever piece is wanted', async () => {
    const memory = pattern();
    await attachTo(memory);
    expect(await program.result('read 0x2ffe 5')).toBe(`0 5 ${memory.toString('hex', 0x2ffe, 0x3003)}`);
    expect(ranges(peer.all(Id.readPhysical))).toEqual([
      [0x2000, PAGE],
      [0x3000, PAGE],
    ]);
  });

  it('is written page by page, with exactly the bytes', async () => {
    await attachTo();
    expect(await program.result('write 0x4ffd aabbccddee')).toBe('0 5');
    expect(peer.all(Id.writePhysical).map((m) => m.body.toString('hex'))).toEqual([
      'fd4f0000000000000300000000000000aabbcc',
      '00500000000000000200000000000000ddee',
    ]);
    expect(await program.result('read 0x4ffc 7')).toBe('0 7 00aabbccddee00');
  });

  it('ends where the hypervisor says, and the bytes before the end are counted', async () => {
    await attachTo(pattern());
    const end = FRAMES * PAGE;
    expect(await program.result(`read ${end - 2} 4`)).toMatch(/^1 2 /);
    expect(await program.result(`read ${end} 1`)).toBe('1 0 ');
    expect(await program.result('read 0xfffffffffffff000 4096')).toBe('1 0 ');
    expect(await program.result('read 0xffffffffffffffff 2')).toBe('1 0 ');
    expect(await program.result(`write ${end - 2} 01020304`)).toBe('1 2');
    if (isBundled) expect(peer.all(Id.readPhysical)).toHaveLength(1);
  });

  it('of no bytes is no transfer', async () => {
    await attachTo();
    expect(await program.result('read 0 0')).toBe('0 0 ');
    expect(peer.all(Id.readPhysical)).toEqual([]);
  });

  it('that the hypervisor refuses is a failure, and the session goes on', async () => {
    await attachTo(pattern());
    peer.answers.set(Id.readPhysical, () => -14);
    peer.answers.set(Id.writePhysical, () => -14);
    expect(await program.result('read 0x1000 4')).toBe('1 0 ');
    expect(await program.result('write 0x1000 01')).toBe('1 0');
    peer.answers.clear();
    await program.run('flush');
    expect(await program.result('read 0x1000 4')).toMatch(/^0 4 /);
  });
});

describe('cached pages', () => {
  it.runIf(isBundled)('are never used while the guest runs, nor while a vCPU has yet to stop', async () => {
    await attachTo();
    for (const command of ['read 0 1', 'pause', 'read 0 1']) await program.run(command);
    peer.memory[0] = 0x42;
    expect(await program.result('read 0 1')).toBe('0 1 42');
  });

  it('are used while the guest stands still, until they are flushed', async () => {
    await attachTo();
    for (const command of ['pause', 'listen 0', 'flush', 'read 0 1', 'read 8 1']) await program.run(command);
    expect(peer.all(Id.readPhysical)).toHaveLength(1);
    peer.memory[0] = 0x42;
    await program.run('flush');
    expect(await program.result('read 0 1')).toBe('0 1 42');
  });

  it('see what was written through the library', async () => {
    await attachTo();
    for (const command of ['pause', 'listen 0', 'read 0 1', 'write 0 43']) await program.run(command);
    expect(await program.result('read 0 1')).toBe('0 1 43');
  });

  it.runIf(isBundled)('are forgotten when the guest goes on', async () => {
    await attachTo();
    for (const command of ['pause', 'listen 0', 'read 0 1', 'resume', 'pause', 'listen 0'])
      await program.run(command);
    peer.memory[0] = 0x44;
    expect(await program.result('read 0 1')).toBe('0 1 44');
  });

  it('of a refused read are not kept', async () => {
    await attachTo();
    for (const command of ['pause', 'listen 0']) await program.run(command);
    peer.answers.set(Id.readPhysical, () => -14);
    expect(await program.result('read 0 1')).toBe('1 0 ');
    peer.answers.clear();
    await program.run('flush');
    expect(await program.result('read 0 1')).toBe('0 1 00');
  });
});

const PRESENT = 1n;
const LARGE = 0x80n;
const NO_EXECUTE = 1n << 63n;
/** A kernel address with different indexes at every level. */
const VA = 0xfffff803_45678abcn;
const indexAt = (va: bigint, shift: bigint) => Number((va >> shift) & 511n);

/** Tables at 0x1000 to 0x4000, of which a test changes single entries. */
function tables(entries: { pml4?: bigint; pdpt?: bigint; pd?: bigint; pt?: bigint }): Buffer {
  const memory = pattern();
  memory.fill(0, ROOT, ROOT + 4 * PAGE);
  const levels: [number, bigint, bigint][] = [
    [ROOT, 39n, entries.pml4 ?? 0x2000n | PRESENT],
    [0x2000, 30n, entries.pdpt ?? 0x3000n | PRESENT],
    [0x3000, 21n, entries.pd ?? 0x4000n | PRESENT],
    [0x4000, 12n, entries.pt ?? 0x9000n | PRESENT],
  ];
  for (const [table, shift, entry] of levels) memory.writeBigUInt64LE(entry, table + 8 * indexAt(VA, shift));
  return memory;
}

async function translate(root: bigint | number = ROOT, va = VA): Promise<string> {
  expect(await program.result('paging 0')).toBe('4');
  return program.result(`translate ${root} ${va}`);
}
const found = (pa: bigint, size: number) => `0 0 0x${pa.toString(16)} 0x${size.toString(16)}`;
const UNMAPPED = '1 1 0x0 0x0';

describe('virtual memory', () => {
  it('cannot be used before the paging mode is known', async () => {
    await attachTo(tables({}));
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(UNMAPPED);
    expect(await program.result(`read-virtual ${ROOT} ${VA} 4`)).toBe('1 0 ');
  });

  it('is translated by 4 KB pages, with the low and high bits of CR3 and entries ignored', async () => {
    await attachTo(tables({ pt: 0x9000n | PRESENT | NO_EXECUTE | (0x7ffn << 52n) | 0xffen }));
    expect(await translate(BigInt(ROOT) | 0x8000000000000fffn)).toBe(found(0x9abcn, PAGE));
  });

  it('is translated by 2 MB and 1 GB pages, whose attribute bit 12 is not an address', async () => {
    await attachTo(tables({ pd: 0x40200000n | PRESENT | LARGE | 0x1000n }));
    expect(await translate()).toBe(found(0x40200000n | (VA & 0x1fffffn), 0x200000));
    tables({ pdpt: 0x80000000n | PRESENT | LARGE }).copy(peer.memory);
    await program.run('flush');
    expect(await translate()).toBe(found(0x80000000n | (VA & 0x3fffffffn), 0x40000000));
  });

  it.each([
    ['the top entry is not present', { pml4: 0x2000n }],
    ['the second entry is not present', { pdpt: 0x3000n | LARGE }],
    ['the third entry is not present', { pd: 0n }],
    ['the last entry is not present', { pt: 0x9000n | 0xffen }],
    ['a table is outside of memory', { pd: 0x000ffffffffff000n | PRESENT }],
  ])('is unmapped where %s', async (_, entries) => {
    await attachTo(tables(entries));
    expect(await translate()).toBe(UNMAPPED);
  });

  it.runIf(isBundled).each([
    ['a top entry claims to be a page', { pml4: 0x2000n | PRESENT | LARGE }],
    ['a 2 MB page has reserved bits', { pd: 0x40202000n | PRESENT | LARGE }],
    ['a 1 GB page has reserved bits', { pdpt: 0x80200000n | PRESENT | LARGE }],
  ])('is unmapped where %s', async (_, entries) => {
    await attachTo(tables(entries));
    expect(await translate()).toBe(UNMAPPED);
  });

  it('is unmapped where the root is outside of memory', async () => {
    await attachTo(tables({}));
    expect(await translate(FRAMES * PAGE)).toBe(UNMAPPED);
  });

  it.runIf(isBundled)('is unmapped at an address that is not canonical', async () => {
    await attachTo(tables({}));
    expect(await translate(ROOT, VA & 0x0000ffffffffffffn)).toBe(UNMAPPED);
  });

  it('survives tables that point to themselves', async () => {
    await attachTo(tables({}));
    peer.memory.fill(0, ROOT, ROOT + PAGE);
    for (let i = 0; i < 512; i++) peer.memory.writeBigUInt64LE(BigInt(ROOT) | PRESENT, ROOT + 8 * i);
    expect(await translate()).toBe(found(BigInt(ROOT) | (VA & 0xfffn), PAGE));
  });

  it('takes pages in transition for present only when told to', async () => {
    const TRANSITION = 1n << 11n;
    const PROTOTYPE = 1n << 10n;
    await attachTo(tables({ pt: 0x9000n | TRANSITION }));
    expect(await translate()).toBe(UNMAPPED);
    expect(await program.result('paging 1')).toBe('4');
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(found(0x9abcn, PAGE));
    tables({ pt: 0x9000n | TRANSITION | PROTOTYPE }).copy(peer.memory);
    await program.run('flush');
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(UNMAPPED);
  });

  it('is read and written across pages that are not neighbours, up to the first unmapped one', async () => {
    const memory = tables({});
    const entry = 0x4000 + 8 * indexAt(VA, 12n);
    memory.writeBigUInt64LE(0x7000n | PRESENT, entry + 8);
    await attachTo(memory);
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
    await attachTo(tables({}));
    peer.special = (bytes) => {
      bytes.writeBigUInt64LE(cr0, 224);
      bytes.writeBigUInt64LE(cr4, 248);
    };
    expect(await program.result('paging 0')).toBe(mode);
    expect(await program.result(`translate ${ROOT} ${VA}`)).toBe(UNMAPPED);
  });

  it.runIf(isBundled)('of a guest with five levels is not guessed at', async () => {
    await attachTo(tables({}));
    peer.special = (bytes) => bytes.writeBigUInt64LE(0x3506f8n | (1n << 12n), 248);
    expect(await program.result('paging 0')).toBe('1');
  });
});
