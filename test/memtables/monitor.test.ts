import { describe, expect, test } from 'vitest';
import { CloakMap } from '../../src/cloak/cloak-map.js';
import { Monitor } from '../../src/memtables/monitor.js';
import type { CodeChange } from '../../src/memtables/patcher.js';
import type { Redirection } from '../../src/memtables/redirections.js';
import { SiteTable } from '../../src/memtables/sites.js';
import type { KernelImages } from '../../src/nt/kernel-images.js';
import type { Hypervisor, Violation } from '../../src/vmi/hypervisor.js';
import { InstructionCache } from '../../src/x86/instruction-cache.js';
import type { GprName } from '../../src/x86/registers.js';

const CODE = 0xffff_f800_0000_0000n;
const STORE_BYTE = [0x88, 0x11]; // mov [rcx], dl
const LOAD_BYTE = [0x0f, 0xb6, 0x01]; // movzx eax, byte ptr [rcx]
const LOAD_ENTRY = [0x8b, 0x84, 0x81, 0, 1, 0, 0]; // mov eax, [rcx + rax*4 + 0x100]
const LOAD_QWORD = [0x48, 0x8b, 0x01]; // mov rax, [rcx]
const ORIGINAL = 0x11;
const CURRENT = 0x22;

/** A monitor that sees this code at `CODE`, and memory that holds what was put there. */
function setUp(code: number[], registers: Partial<Record<GprName, bigint>> = {}) {
  const owner = { label: 'x', patch: { gva: 0n, bytes: Buffer.alloc(0) }, journalled: new Map() };
  const cloaks = new CloakMap<CodeChange>();
  const hide = (gpa: bigint, length: number) =>
    cloaks.hide({
      gpa,
      original: Buffer.alloc(length, ORIGINAL),
      current: Buffer.alloc(length, CURRENT),
      owner,
    });
  let flushes = 0;
  const hypervisor = {
    readPhysical: (_: bigint, length: number) => Buffer.alloc(length, CURRENT),
    flushCaches: () => {
      flushes++;
    },
  } as Partial<Hypervisor> as Hypervisor;
  const guest = { code };
  const range = { start: CODE, end: CODE + 0x10000n };
  const doubts: bigint[] = [];
  const images = {
    rangeAt: (gva: bigint) => (gva >= range.start && gva < range.end ? range : undefined),
    doubtList: () => doubts.push(CODE),
    nt: {
      ssdt: { start: 0n, end: 0n },
      memory: {
        isMapped: () => true,
        read: () => Buffer.from([...guest.code, ...Buffer.alloc(15)]).subarray(0, 15),
      },
    },
  } as unknown as KernelImages;
  const sites = new SiteTable();
  const monitor = new Monitor(hypervisor, images, cloaks, new InstructionCache(), sites, 50);
  const violate = (gpa: bigint, kind: 'read' | 'write', { gva = gpa, rip = CODE } = {}) =>
    monitor.handle({
      vcpu: 0,
      rip,
      gva,
      gpa,
      read: kind === 'read',
      write: kind === 'write',
      execute: false,
      register: (name) => registers[name] ?? 0n,
    } satisfies Violation);
  return { monitor, sites, hide, violate, guest, doubts, flushes: () => flushes };
}

describe('guest writes to hidden bytes', () => {
  test('the same write over and over is remembered once', () => {
    const { monitor, hide, violate } = setUp(STORE_BYTE);
    hide(0x1000n, 16);
    for (let i = 0; i < 5000; i++) violate(0x1004n, 'write');
    violate(0x1005n, 'write');
    violate(0x1ff0n, 'write');
    expect(monitor.cloakedWrites).toBe(5001);
    expect(monitor.writes).toEqual([
      { gpa: 0x1004n, length: 1 },
      { gpa: 0x1005n, length: 1 },
    ]);
    monitor.forgetWrites();
    expect(monitor.writes).toEqual([]);
  });

  test('more different ones than are remembered are not forgotten: which ones there were is unknown', () => {
    const { monitor, hide, violate } = setUp(STORE_BYTE);
    hide(0x1000n, 4096);
    hide(0x2000n, 4096);
    for (let gpa = 0x1000n; gpa < 0x1000n + 4096n; gpa++) violate(gpa, 'write');
    violate(0x2000n, 'write');
    expect(monitor.hasWork).toBe(true);
    expect(monitor.writes).toBe('unknown');
    monitor.forgetWrites();
    expect(monitor.hasWork).toBe(false);
  });

  test('what was read before a write is not answered from a cache after it', () => {
    const { hide, violate, guest, flushes } = setUp(STORE_BYTE);
    hide(0x1000n, 4);
    violate(0x1080n, 'write');
    guest.code = LOAD_QWORD;
    violate(0x0ffcn + 4n, 'read');
    expect(flushes()).toBe(1);
  });
});

describe('a read is answered with all hidden bytes that it may reach', () => {
  test('also when the code at RIP has been replaced by one that reads more', () => {
    const { hide, violate, guest } = setUp(LOAD_BYTE);
    hide(0x1004n, 4);
    violate(0x1000n, 'read');
    guest.code = LOAD_QWORD;
    const answer = violate(0x1000n, 'read');
    expect([...answer!.subarray(0, 8)]).toEqual([...Buffer.alloc(4, CURRENT), ...Buffer.alloc(4, ORIGINAL)]);
  });

  test('a read that does not reach one counts as a reader, and one that does as a hidden read', () => {
    const { monitor, hide, violate } = setUp(LOAD_BYTE);
    hide(0x1004n, 4);
    violate(0x1000n, 'read');
    expect([monitor.otherReads, monitor.cloakedReads.size]).toEqual([1, 0]);
    violate(0x1004n, 'read');
    expect([monitor.otherReads, [...monitor.cloakedReads]]).toEqual([1, [['1-byte', 1]]]);
  });

  test('memory itself answers where nothing is hidden within the longest answer', () => {
    const { hide, violate } = setUp(LOAD_BYTE);
    hide(0x1200n, 4);
    expect(violate(0x1000n, 'read')).toBeUndefined();
    expect(violate(0x1101n, 'read')).toHaveLength(256);
  });
});

describe('a load of a byte counts as one of a table', () => {
  const DISPLACEMENT = 0x1234n;
  const LOAD = [0x0f, 0xb6, 0x84, 0x02, 0x34, 0x12, 0, 0]; // movzx eax, byte ptr [rdx+rax+0x1234]

  test.each([
    ['base', { rdx: CODE, rax: 5n }],
    ['index', { rax: CODE, rdx: 5n }],
  ])('with the image base in the place of the %s', (_, registers) => {
    const { monitor, sites, violate } = setUp(LOAD, registers);
    violate(CODE + DISPLACEMENT + 5n, 'read');
    expect(monitor.tableLoads).toBe(1);
    expect([...sites.all()]).toMatchObject([{ rip: CODE, table: CODE + DISPLACEMENT, hits: 1 }]);
  });

  test('only where a register holds the image base: there are many readers of bytes', () => {
    const { monitor, violate } = setUp(LOAD, { rdx: CODE + 1n, rax: 5n });
    violate(CODE + DISPLACEMENT + 6n, 'read');
    expect([monitor.tableLoads, monitor.otherReads]).toEqual([0, 1]);
  });

  test.each([
    ['that is sign-extended', [0x0f, 0xbe, 0x84, 0x02]],
    ['into 16 bits', [0x66, 0x0f, 0xb6, 0x84, 0x02]],
    ['with a scale', [0x0f, 0xb6, 0x84, 0x42]],
  ])('but not one %s', (_, opcode) => {
    const { monitor, violate } = setUp([...opcode, 0x34, 0x12, 0, 0], { rdx: CODE, rax: 5n });
    violate(CODE + DISPLACEMENT + 5n, 'read');
    expect([monitor.tableLoads, monitor.otherReads]).toEqual([0, 1]);
  });
});

describe('a load of a table in an image of the kernel', () => {
  test('by code of an image is counted; what is read elsewhere is none', () => {
    const { monitor, violate, doubts } = setUp(LOAD_ENTRY);
    violate(0x1000n, 'read', { gva: CODE + 0x100n });
    violate(0x1000n, 'read', { gva: CODE + 0x10000n });
    expect([monitor.tableLoads, monitor.otherReads]).toEqual([1, 1]);
    expect(doubts).toEqual([]);
  });

  test('by code of no known image is counted, and has the list of modules read again', () => {
    const { monitor, violate, doubts } = setUp(LOAD_ENTRY);
    violate(0x1000n, 'read', { gva: CODE + 0x100n, rip: CODE + 0x20000n });
    expect([monitor.tableLoads, doubts.length]).toEqual([1, 1]);
  });
});

test('the copy of a load in a guarded handler counts for the site of the load, not as a load of its own', () => {
  const load = [0x8b, 0x8c, 0x82, 0, 0x10, 0, 0]; // mov ecx, [rdx+rax*4+0x1000]
  const { monitor, sites, violate } = setUp(load, { rdx: CODE, rax: 5n });
  const site = sites.find(CODE + 0x500n, CODE + 0x1000n)!;
  const redirection = { fallback: CODE } as Redirection;
  sites.replace(site, redirection);
  violate(CODE + 0x1014n, 'read');
  expect([...sites.all()]).toEqual([
    expect.objectContaining({ rip: CODE + 0x500n, beyondBound: 1, hits: 0 }),
  ]);
  expect([monitor.tableLoads, monitor.otherReads, monitor.staleEvents]).toEqual([0, 0, 0]);
});
